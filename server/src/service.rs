//! Speaks gRPC: unpack, call the engine, pack.

use std::pin::Pin;
use std::sync::Arc;

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_server::Pinfold;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::allocation::{self, Allocation, Creation, Growth};
use crate::audit::micros;
use crate::config::Config;
use crate::door::Connection;
use crate::engine::{Caller, Engine};
use crate::error::Error;
use crate::held::smallest_page;
use crate::ids::{PinId, SessionId};
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

    /// The session that makes the call. Each call is a sign of life of it: heartbeats can be held up by the
    /// client's own bytes.
    fn caller(&self, session_id: &[u8]) -> Result<SessionId, Error> {
        let id = wire::session_id(session_id)?;
        self.engine.note_call(id);
        Ok(id)
    }

    /// A call's message. If its session lives, its connection may stay.
    fn message<T: OfSession>(&self, mut request: Request<T>) -> T {
        let connection = request.extensions_mut().remove::<Connection>();
        let message = request.into_inner();
        if let Some(connection) = connection.filter(Connection::is_new)
            && let Ok(id) = wire::session_id(message.session_id())
            && self.engine.demand_session(id).is_ok()
        {
            connection.settle();
        }
        message
    }
}

/// A call of a session.
trait OfSession {
    fn session_id(&self) -> &[u8];
}

macro_rules! of_session {
    ($($request:ident),* $(,)?) => {
        $(impl OfSession for v1::$request {
            fn session_id(&self) -> &[u8] {
                &self.session_id
            }
        })*
    };
}

of_session! {
    ConnectQueuePairRequest, CreateRequest, StatRequest, PinRequest, UnpinRequest, CommitRequest,
    WriteRequest, ReadRequest, DigestRequest, MakeFolderRequest, ListRequest, GrowRequest,
    ShrinkRequest, RemoveRequest, RevokeRequest, QuiesceRequest, ResumeRequest, InspectRequest,
    WatchRequest,
}

impl OfSession for v1::AllocateRequest {
    fn session_id(&self) -> &[u8] {
        use v1::allocate_request::What;
        match &self.what {
            Some(What::Create(create)) => &create.session_id,
            Some(What::Grow(grow)) => &grow.session_id,
            None => &[],
        }
    }
}

/// Does a work of several steps in a task of its own: a call that is reset leaves none of it half done.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work).await.map_err(|_| Error::Task)?
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Pinfold for Service {
    type SessionStream = session::Events;
    type AllocateStream = ReceiverStream<Result<v1::AllocateEvent, Status>>;
    type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::RevocationRecord, Status>> + Send>>;

    async fn session(
        &self,
        mut request: Request<Streaming<v1::SessionRequest>>,
    ) -> Answer<Self::SessionStream> {
        let engine = Arc::clone(&self.engine);
        let connection = request.extensions_mut().remove::<Connection>();
        let events = session::start(engine, &self.config, request.into_inner()).await?;
        if let Some(connection) = connection {
            connection.settle();
        }
        Ok(Response::new(events))
    }

    async fn connect_queue_pair(
        &self,
        request: Request<v1::ConnectQueuePairRequest>,
    ) -> Answer<v1::ConnectQueuePairResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        let client = wire::endpoint(request.client)?;
        let number = wire::queue_pair_number(request.number)?;
        let connecting = self.engine.connect(id, number, client, request.server_device);
        let (server, mtu) = connecting.await?;
        Ok(Response::new(v1::ConnectQueuePairResponse {
            server: Some(wire::own_endpoint(&server)),
            path_mtu_bytes: mtu.bytes(),
        }))
    }

    async fn create(&self, request: Request<v1::CreateRequest>) -> Answer<v1::CreateResponse> {
        let creation = Creation::parse(self.message(request))?;
        Ok(Response::new(allocation::create(&self.engine, creation).await?))
    }

    async fn allocate(
        &self,
        request: Request<v1::AllocateRequest>,
    ) -> Answer<Self::AllocateStream> {
        let asked = Allocation::parse(self.message(request))?;
        let events = allocation::start(Arc::clone(&self.engine), asked)?;
        Ok(Response::new(ReceiverStream::new(events)))
    }

    async fn stat(&self, request: Request<v1::StatRequest>) -> Answer<v1::StatResponse> {
        let request = self.message(request);
        self.engine.demand_session(self.caller(&request.session_id)?)?;
        let path = wire::path(&request.path)?;
        let found = self.engine.locate(request.export, path).await?;
        let (generation, pins) = match self.engine.standing(found.identity()) {
            Some(Standing::Held { generation, granted, .. }) => {
                (Some(wire::generation(generation)), granted)
            }
            Some(Standing::Going) | None => (None, 0),
        };
        let held = self.engine.held(found.identity());
        let guard = held.as_ref().map(|file| wire::tier(file.tier()));
        Ok(Response::new(v1::StatResponse {
            identity: Some(wire::identity(found.identity())),
            size: found.size(),
            allocated: found.allocated(),
            dax: found.dax(),
            generation,
            pins: wire::count(pins),
            guard: guard.unwrap_or_default().into(),
            page_size_bytes: held.map_or_else(smallest_page, |file| file.page_size_bytes()),
        }))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        self.engine.demand_session(id)?;
        let mut granted = self.engine.pin(id, wire::pin_order(request)?).await?;
        granted.claim.take();
        Ok(Response::new(wire::granted(granted)))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        self.engine.unpin(id, PinId(request.pin_id)).await?;
        Ok(Response::new(v1::UnpinResponse {}))
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Answer<v1::CommitResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        self.engine.demand_session(id)?;
        let (pin, generation, range) = wire::commit(&request)?;
        let took = self.engine.commit(id, pin, generation, range).await?;
        Ok(Response::new(v1::CommitResponse { flush_us: micros(took) }))
    }

    async fn write(&self, request: Request<v1::WriteRequest>) -> Answer<v1::WriteResponse> {
        let v1::WriteRequest { session_id, pin_id, generation, offset, data } =
            self.message(request);
        let id = self.caller(&session_id)?;
        let piece = wire::stream_piece(id, pin_id, generation, offset)?;
        wire::piece_len(data.len())?;
        self.engine.stream_write(piece, data).await?;
        Ok(Response::new(v1::WriteResponse {}))
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Answer<v1::ReadResponse> {
        let v1::ReadRequest { session_id, pin_id, generation, offset, length } =
            self.message(request);
        let id = self.caller(&session_id)?;
        let piece = wire::stream_piece(id, pin_id, generation, offset)?;
        let len = wire::piece_len(length as usize)?;
        let data = self.engine.stream_read(piece, len).await?;
        Ok(Response::new(v1::ReadResponse { data }))
    }

    async fn digest(&self, request: Request<v1::DigestRequest>) -> Answer<v1::DigestResponse> {
        let v1::DigestRequest { session_id, pin_id, generation, offset, length } =
            self.message(request);
        let id = self.caller(&session_id)?;
        let piece = wire::stream_piece(id, pin_id, generation, offset)?;
        let len = wire::piece_len(length as usize)?;
        let blake3 = self.engine.stream_digest(piece, len).await?;
        Ok(Response::new(v1::DigestResponse { blake3 }))
    }

    async fn make_folder(
        &self,
        request: Request<v1::MakeFolderRequest>,
    ) -> Answer<v1::MakeFolderResponse> {
        let request = self.message(request);
        self.engine.demand_session(self.caller(&request.session_id)?)?;
        let path = wire::path(&request.path)?;
        let created = self.engine.make_folder(request.export, path).await?;
        Ok(Response::new(v1::MakeFolderResponse { created }))
    }

    async fn list(&self, request: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        let request = self.message(request);
        self.engine.demand_session(self.caller(&request.session_id)?)?;
        if request.export.is_empty() {
            // The operator's own list: never longer than a page.
            let entries = self.engine.export_entries();
            return Ok(Response::new(v1::ListResponse { entries, next_page_token: Vec::new() }));
        }
        let path = match request.path.as_str() {
            "" => None,
            path => Some(wire::path(path)?),
        };
        let page = wire::page(request.page_size, request.page_token)?;
        let (found, next) = self.engine.list(request.export, path, page).await?;
        let entries = found.into_iter().map(|(entry, pins)| wire::entry(entry, pins)).collect();
        let next_page_token = next.unwrap_or_default();
        Ok(Response::new(v1::ListResponse { entries, next_page_token }))
    }

    async fn grow(&self, request: Request<v1::GrowRequest>) -> Answer<v1::GrowResponse> {
        let growth = Growth::parse(self.message(request))?;
        Ok(Response::new(allocation::grow(&self.engine, growth).await?))
    }

    async fn shrink(&self, request: Request<v1::ShrinkRequest>) -> Answer<v1::ShrinkResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        self.engine.demand_session(id)?;
        let (path, size) = (wire::path(&request.path)?, wire::file_size(request.size)?);
        let (caller, _listening) = Caller::new(id);
        let revoked = self.engine.shrink(caller, request.export, path, size).await?;
        Ok(Response::new(v1::ShrinkResponse { revoked_pins: wire::count(revoked) }))
    }

    async fn remove(&self, request: Request<v1::RemoveRequest>) -> Answer<v1::RemoveResponse> {
        let request = self.message(request);
        self.engine.demand_session(self.caller(&request.session_id)?)?;
        let path = wire::path(&request.path)?;
        let engine = Arc::clone(&self.engine);
        let remove = async move { engine.remove(request.export, path, request.revoke_pins).await };
        let revoked = to_the_end(remove).await?;
        Ok(Response::new(v1::RemoveResponse { revoked_pins: wire::count(revoked) }))
    }

    async fn revoke(&self, request: Request<v1::RevokeRequest>) -> Answer<v1::RevokeResponse> {
        let request = self.message(request);
        self.engine.demand_session(self.caller(&request.session_id)?)?;
        let (engine, path) = (Arc::clone(&self.engine), wire::path(&request.path)?);
        let revoke = async move { engine.revoke(request.export, path).await };
        let revoked = to_the_end(revoke).await?;
        Ok(Response::new(v1::RevokeResponse { revoked_pins: wire::count(revoked) }))
    }

    async fn quiesce(&self, request: Request<v1::QuiesceRequest>) -> Answer<v1::QuiesceResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        self.engine.demand_session(id)?;
        let done = self.engine.quiesce(id, request.export).await?;
        let (revoked_pins, beside) = (wire::count(done.revoked_pins), done.beside);
        Ok(Response::new(v1::QuiesceResponse { revoked_pins, beside }))
    }

    async fn resume(&self, request: Request<v1::ResumeRequest>) -> Answer<v1::ResumeResponse> {
        let request = self.message(request);
        self.engine.demand_session(self.caller(&request.session_id)?)?;
        let was_quiesced = self.engine.resume(request.export).await?;
        Ok(Response::new(v1::ResumeResponse { was_quiesced }))
    }

    async fn inspect(&self, request: Request<v1::InspectRequest>) -> Answer<v1::InspectResponse> {
        let request = self.message(request);
        let id = self.caller(&request.session_id)?;
        self.engine.demand_session(id)?;
        let page = wire::inspect_page(request.page_size, &request.page_token)?;
        Ok(Response::new(self.engine.inspect(id, page).await?))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        let id = self.caller(&self.message(request).session_id)?;
        self.engine.demand_session(id)?;
        let engine = Arc::clone(&self.engine);
        // A watcher that is too slow misses records; its stream goes on with the newest.
        let records = BroadcastStream::new(self.engine.records())
            .take_while(move |_| engine.demand_session(id).is_ok())
            .filter_map(Result::ok)
            .map(Ok);
        Ok(Response::new(Box::pin(records)))
    }
}
