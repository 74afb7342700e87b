//! Speaks gRPC: unpack, call the engine, pack.

use std::sync::Arc;

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_server::Pinfold;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::audit::micros;
use crate::config::Config;
use crate::engine::Engine;
use crate::error::Error;
use crate::ids::PinId;
use crate::registry::Standing;
use crate::{session, wire};

/// The service over one engine.
#[derive(Debug)]
pub(crate) struct Service {
    engine: Arc<Engine>,
    config: Config,
}

impl Service {
    /// Serves what the engine does.
    pub(crate) fn new(engine: Arc<Engine>, config: Config) -> Self {
        Self { engine, config }
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Pinfold for Service {
    type SessionStream = ReceiverStream<Result<v1::SessionEvent, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Answer<Self::SessionStream> {
        let engine = Arc::clone(&self.engine);
        let events = session::start(engine, &self.config, request.into_inner()).await?;
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn connect_queue_pair(
        &self,
        request: Request<v1::ConnectQueuePairRequest>,
    ) -> Answer<v1::ConnectQueuePairResponse> {
        let request = request.into_inner();
        let id = wire::session_id(&request.session_id)?;
        let client = wire::endpoint(request.client)?;
        let (server, mtu) = self.engine.connect(id, client).await?;
        Ok(Response::new(v1::ConnectQueuePairResponse {
            server: Some(wire::own_endpoint(&server)),
            path_mtu_bytes: mtu.bytes(),
        }))
    }

    async fn create(&self, request: Request<v1::CreateRequest>) -> Answer<v1::CreateResponse> {
        let request = request.into_inner();
        self.engine.demand_session(wire::session_id(&request.session_id)?)?;
        let if_exists = request.if_exists();
        let path = wire::path(&request.path)?;
        let (export, size) = (request.export, wire::file_size(request.size)?);
        let made = self.engine.create(export.clone(), path.clone(), size).await;
        let (identity, created) = match made {
            Err(Error::File(pinfold_leases::Error::Exists { .. }))
                if if_exists == v1::IfExists::Resize =>
            {
                (self.engine.resize(export, path, size).await?, false)
            }
            made => (made?, true),
        };
        let identity = Some(wire::identity(identity));
        Ok(Response::new(v1::CreateResponse { identity, created }))
    }

    async fn stat(&self, request: Request<v1::StatRequest>) -> Answer<v1::StatResponse> {
        let request = request.into_inner();
        self.engine.demand_session(wire::session_id(&request.session_id)?)?;
        let path = wire::path(&request.path)?;
        let found = self.engine.locate(request.export, path).await?;
        let (generation, pins) = match self.engine.standing(found.identity()) {
            Some(Standing::Held { generation, pins }) => (Some(wire::generation(generation)), pins),
            Some(Standing::Going) | None => (None, 0),
        };
        Ok(Response::new(v1::StatResponse {
            identity: Some(wire::identity(found.identity())),
            size: found.size(),
            allocated: found.allocated(),
            dax: found.dax(),
            generation,
            pins: u32::try_from(pins).unwrap_or(u32::MAX),
        }))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let request = request.into_inner();
        let id = wire::session_id(&request.session_id)?;
        self.engine.demand_session(id)?;
        let granted = self.engine.pin(id, wire::pin_order(request)?).await?;
        Ok(Response::new(wire::granted(granted)))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        let request = request.into_inner();
        let id = wire::session_id(&request.session_id)?;
        self.engine.unpin(id, PinId(request.pin_id)).await?;
        Ok(Response::new(v1::UnpinResponse {}))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Answer<v1::CommitResponse> {
        let request = request.into_inner();
        let id = wire::session_id(&request.session_id)?;
        self.engine.demand_session(id)?;
        let (pin, generation, range) = wire::commit(&request)?;
        let took = self.engine.commit(id, pin, generation, range).await?;
        Ok(Response::new(v1::CommitResponse { flush_us: micros(took) }))
    }
}
