//! The way to the server: calls that end when the session does.
//!
//! A call runs in a task of its own to its end. A caller that stops waiting resets no HTTP/2 stream (a
//! server takes thousands of resets for an attack), and what came of the call is not lost on its way: where
//! it has to be undone the task does that.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::pace::Pace;
use crate::{Error, Loss};

/// Carries the calls of one session.
#[derive(Clone, Debug)]
pub(crate) struct Control {
    pub(crate) client: PinfoldClient<Channel>,
    /// For the stream path's bytes, over a connection of its own: what stands in a queue there holds up no
    /// notice and no heartbeat.
    pub(crate) bytes: PinfoldClient<Channel>,
    /// How large the pieces of the stream path are.
    pub(crate) pace: Arc<Pace>,
    pub(crate) endpoint: String,
    /// Goes with every call.
    pub(crate) session_id: Vec<u8>,
    /// How the session ended, once it has.
    pub(crate) loss: watch::Receiver<Option<Loss>>,
    pub(crate) heard: Arc<LastAnswer>,
    /// Where its calls run, also if a caller's runtime ends before.
    pub(crate) runtime: Handle,
}

/// When the server gave its last sign of life by the answer to a call.
#[derive(Debug)]
pub(crate) struct LastAnswer(Mutex<Instant>);

/// How a call ended without an answer.
#[derive(Debug)]
pub(crate) enum Unanswered {
    Refused(Status),
    Lost(Loss),
}

impl LastAnswer {
    pub(crate) fn now() -> Arc<Self> {
        Arc::new(Self(Mutex::new(Instant::now())))
    }

    pub(crate) fn last(&self) -> Instant {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

impl Control {
    /// Makes a call. `doing` completes "the server refused to …". It ends when the session does, so that
    /// a dead server holds nobody up; a caller that stops waiting does not end it.
    pub(crate) async fn call<T, F>(
        &self,
        doing: impl FnOnce() -> String,
        rpc: impl FnOnce(PinfoldClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Future<Output = Result<Response<T>, Status>> + Send + 'static,
    {
        let (control, call) = (self.clone(), rpc(self.client.clone()));
        let answer = self.to_the_end(async move { control.answer(call).await }).await;
        self.explain(answer.unwrap_or(Err(Unanswered::Lost(Loss::Closed))), doing)
    }

    /// As [`call`](Self::call), but a caller that stops waiting ends it: for what the server is to stop then.
    pub(crate) async fn call_until_dropped<T, F>(
        &self,
        doing: impl FnOnce() -> String,
        rpc: impl FnOnce(PinfoldClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = self.answer(rpc(self.client.clone())).await;
        self.explain(answer, doing)
    }

    /// Makes a call of the stream path, in a task that runs to its end already.
    pub(crate) async fn call_for_bytes<T, F>(
        &self,
        doing: impl FnOnce() -> String,
        rpc: impl FnOnce(PinfoldClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let answer = self.answer(rpc(self.bytes.clone())).await;
        self.explain(answer, doing)
    }

    /// Does a work in a task, which goes on when nobody waits for it. `None`: the runtime is shutting
    /// down. What it returns to nobody is dropped.
    pub(crate) async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Option<T> {
        ended(self.runtime.spawn(work)).await
    }

    async fn answer<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Unanswered> {
        tokio::select! {
            // An answer that is there counts, also when the session ended meanwhile.
            biased;
            answer = call => match answer {
                Ok(answer) => {
                    self.heard.note();
                    Ok(answer.into_inner())
                }
                Err(status) => Err(Unanswered::Refused(status)),
            },
            loss = self.ended() => Err(Unanswered::Lost(loss)),
        }
    }

    fn explain<T>(
        &self,
        answer: Result<T, Unanswered>,
        doing: impl FnOnce() -> String,
    ) -> Result<T, Error> {
        answer.map_err(|unanswered| match unanswered {
            Unanswered::Refused(status) => Error::from_status(status, &self.endpoint, doing()),
            Unanswered::Lost(loss) => self.lost(loss),
        })
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

/// What a task returned; `None`: it was dropped with its runtime.
async fn ended<T>(task: JoinHandle<T>) -> Option<T> {
    match task.await {
        Ok(done) => Some(done),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}
