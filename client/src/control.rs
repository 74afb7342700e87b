//! The way to the server: calls that end when the session does.

use std::future::Future;

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::{Error, Loss};

/// Carries the calls of one session.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) client: PinfoldClient<Channel>,
    pub(crate) endpoint: String,
    /// Goes with every call.
    pub(crate) session_id: Vec<u8>,
    /// How the session ended, once it has.
    pub(crate) loss: watch::Receiver<Option<Loss>>,
}

impl Control {
    /// Makes a call. `doing` completes "the server refused to …". The call is given up when the
    /// session ends, so that a dead server holds nobody up.
    pub(crate) async fn call<T, F>(
        &self,
        doing: impl FnOnce() -> String,
        rpc: impl FnOnce(PinfoldClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        tokio::select! {
            // An answer that is there counts, also when the session ended meanwhile.
            biased;
            answer = rpc(self.client.clone()) => answer
                .map(Response::into_inner)
                .map_err(|status| Error::from_status(status, &self.endpoint, doing())),
            loss = self.ended() => Err(self.lost(loss)),
        }
    }

    /// Connects a queue pair; says how to reach the server's end.
    pub(crate) async fn connect_queue_pair(
        &self,
        client: v1::Endpoint,
        server_device: &str,
        number: u32,
    ) -> Result<(v1::Endpoint, u32), Error> {
        let doing = || "connect a queue pair".to_owned();
        let request = v1::ConnectQueuePairRequest {
            session_id: self.session_id.clone(),
            client: Some(client),
            server_device: server_device.to_owned(),
            number,
        };
        let answer = self
            .call(doing, |mut client| async move { client.connect_queue_pair(request).await })
            .await?;
        let server =
            answer.server.ok_or_else(|| Error::Protocol { doing: doing(), what: "no endpoint" })?;
        Ok((server, answer.path_mtu_bytes))
    }

    /// Waits for the end of the session.
    pub(crate) async fn ended(&self) -> Loss {
        let mut loss = self.loss.clone();
        match loss.wait_for(Option::is_some).await {
            Ok(loss) => loss.clone().unwrap_or(Loss::Closed),
            // The task that keeps the session was dropped with its runtime.
            Err(_) => Loss::Closed,
        }
    }

    pub(crate) fn lost(&self, loss: Loss) -> Error {
        Error::SessionLost { endpoint: self.endpoint.clone(), loss }
    }
}
