//! A server that a test plays by hand: it gets each session stream as a conversation.

use std::net::SocketAddr;
use std::time::Duration;

use pinfold_client::{ConnectOptions, RdmaDevice, Reason};
use pinfold_proto::ERROR_DOMAIN;
use pinfold_proto::v1::pinfold_server::{Pinfold, PinfoldServer};
use pinfold_proto::v1::session_event::Event;
use pinfold_proto::v1::session_request::Message;
use pinfold_proto::v1::{self, SessionEvent, SessionRequest};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

/// The id in every `Welcome`.
pub(crate) const SESSION_ID: &[u8] = b"sixteen bytes id";

/// A file name for which `Stat` never answers.
pub(crate) const HANGS: &str = "hangs";

/// In every `Welcome`: so small that a test sees several pieces.
pub(crate) const PIECE: usize = 16;

/// A running server.
pub(crate) struct Scripted {
    address: SocketAddr,
    conversations: mpsc::UnboundedReceiver<Conversation>,
    calls: mpsc::UnboundedReceiver<Call>,
}

/// A call that the test answers.
pub(crate) enum Call {
    Pin(Asked<v1::PinRequest, v1::PinResponse>),
    Unpin(Asked<v1::UnpinRequest, v1::UnpinResponse>),
    Commit(Asked<v1::CommitRequest, v1::CommitResponse>),
    Write(Asked<v1::WriteRequest, v1::WriteResponse>),
    Read(Asked<v1::ReadRequest, v1::ReadResponse>),
    Watch(Asked<v1::WatchRequest, mpsc::UnboundedReceiver<Result<v1::RevocationRecord, Status>>>),
}

/// A request, and where its answer goes.
pub(crate) struct Asked<Q, A> {
    pub(crate) request: Q,
    answer: oneshot::Sender<Result<A, Status>>,
}

impl<Q, A> Asked<Q, A> {
    pub(crate) fn answer(self, answer: A) {
        // The client may have gone away.
        let _ = self.answer.send(Ok(answer));
    }

    pub(crate) fn refuse(self, status: Status) {
        // The client may have gone away.
        let _ = self.answer.send(Err(status));
    }
}

/// The server's side of one session stream.
pub(crate) struct Conversation {
    heard: Streaming<SessionRequest>,
    say: mpsc::UnboundedSender<Result<SessionEvent, Status>>,
}

impl Scripted {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, conversations) = mpsc::unbounded_channel();
        let (calls_sender, calls) = mpsc::unbounded_channel();
        let service = PinfoldServer::new(Service { conversations: sender, calls: calls_sender });
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, conversations, calls }
    }

    /// How to connect to it, without an RDMA device.
    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::new(format!("http://{}", self.address)).rdma_device(RdmaDevice::None)
    }

    /// The next session stream that a client opens.
    pub(crate) async fn conversation(&mut self) -> Conversation {
        soon(self.conversations.recv()).await.expect("the server runs")
    }

    /// The next call that a client makes.
    pub(crate) async fn call(&mut self) -> Call {
        soon(self.calls.recv()).await.expect("the server runs")
    }

    /// The next call, which must be a `Write`.
    pub(crate) async fn write(&mut self) -> Asked<v1::WriteRequest, v1::WriteResponse> {
        match self.call().await {
            Call::Write(asked) => asked,
            _ => panic!("another call than Write"),
        }
    }

    /// The next call, which must be a `Read`.
    pub(crate) async fn read(&mut self) -> Asked<v1::ReadRequest, v1::ReadResponse> {
        match self.call().await {
            Call::Read(asked) => asked,
            _ => panic!("another call than Read"),
        }
    }

    /// Whether no call waits for its answer.
    pub(crate) fn is_quiet(&mut self) -> bool {
        self.calls.try_recv().is_err()
    }
}

impl Scripted {
    /// Whether no client has opened another session stream.
    pub(crate) fn has_no_other_conversation(&mut self) -> bool {
        self.conversations.try_recv().is_err()
    }
}

impl Conversation {
    /// What the client says next; `None` when it has closed its half.
    pub(crate) async fn hear(&mut self) -> Option<Message> {
        let request = soon(self.heard.message()).await.ok()??;
        Some(request.message.expect("a message"))
    }

    /// What the client says next that is no heartbeat.
    pub(crate) async fn hear_past_heartbeats(&mut self) -> Option<Message> {
        loop {
            match self.hear().await {
                Some(Message::Heartbeat(_)) => {}
                other => return other,
            }
        }
    }

    pub(crate) fn say(&self, event: Event) {
        self.say.send(Ok(SessionEvent { event: Some(event) })).expect("the client listens");
    }

    pub(crate) fn fail(self, status: Status) {
        self.say.send(Err(status)).expect("the client listens");
    }

    /// Hears `Hello` and says `Welcome`.
    pub(crate) async fn welcome(
        &mut self,
        heartbeat_interval: Duration,
        time_to_live: Duration,
    ) -> v1::Hello {
        let Some(Message::Hello(hello)) = self.hear().await else {
            panic!("the first message is no hello");
        };
        self.say(Event::Welcome(v1::Welcome {
            session_id: SESSION_ID.to_vec(),
            heartbeat_interval_ms: heartbeat_interval.as_millis() as u32,
            time_to_live_ms: time_to_live.as_millis() as u32,
            server_version: "1.2.3".to_owned(),
            stream_piece_bytes_max: PIECE as u32,
            ..Default::default()
        }));
        hello
    }

    /// A welcome to a session in which time plays no part.
    pub(crate) async fn welcome_for_long(&mut self) {
        self.welcome(Duration::from_secs(60), Duration::from_secs(600)).await;
    }
}

/// Waits, but not for ever: so long only if something is broken.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it never came")
}

pub(crate) fn refusal(code: Code, reason: Reason, message: &str) -> Status {
    let details = ErrorDetails::with_error_info(reason.as_str(), ERROR_DOMAIN, []);
    Status::with_error_details(code, message, details)
}

type Answer<T> = Result<Response<T>, Status>;

struct Service {
    conversations: mpsc::UnboundedSender<Conversation>,
    calls: mpsc::UnboundedSender<Call>,
}

impl Service {
    /// Lets the test answer.
    async fn ask<Q, A>(
        &self,
        request: Request<Q>,
        call: impl FnOnce(Asked<Q, A>) -> Call,
    ) -> Result<Response<A>, Status> {
        let (answer, answered) = oneshot::channel();
        let asked = Asked { request: request.into_inner(), answer };
        self.calls.send(call(asked)).map_err(|_| Status::internal("the test is over"))?;
        answered.await.map_err(|_| Status::internal("the test does not answer"))?.map(Response::new)
    }
}

#[tonic::async_trait]
impl Pinfold for Service {
    type SessionStream = UnboundedReceiverStream<Result<SessionEvent, Status>>;
    type AllocateStream = UnboundedReceiverStream<Result<v1::AllocateEvent, Status>>;
    type WatchStream = UnboundedReceiverStream<Result<v1::RevocationRecord, Status>>;

    async fn session(
        &self,
        request: Request<Streaming<SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (say, said) = mpsc::unbounded_channel();
        let conversation = Conversation { heard: request.into_inner(), say };
        self.conversations.send(conversation).expect("the test runs");
        Ok(Response::new(UnboundedReceiverStream::new(said)))
    }

    /// Knows one session and no file.
    async fn stat(
        &self,
        request: Request<v1::StatRequest>,
    ) -> Result<Response<v1::StatResponse>, Status> {
        let request = request.into_inner();
        if request.path == HANGS {
            return std::future::pending().await;
        }
        if request.session_id != SESSION_ID {
            return Err(refusal(Code::Unauthenticated, Reason::UnknownSession, "no such session"));
        }
        Err(refusal(Code::NotFound, Reason::FileNotFound, "no file data/absent"))
    }

    async fn create(
        &self,
        request: Request<v1::CreateRequest>,
    ) -> Result<Response<v1::CreateResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(v1::CreateResponse {
            identity: Some(v1::FileIdentity { device: 1, inode: request.size, birth_time_ns: 3 }),
            created: request.if_exists() == v1::IfExists::Fail,
        }))
    }

    async fn allocate(
        &self,
        _: Request<v1::AllocateRequest>,
    ) -> Result<Response<Self::AllocateStream>, Status> {
        Err(Status::unimplemented("not part of these scripts"))
    }

    async fn connect_queue_pair(
        &self,
        _: Request<v1::ConnectQueuePairRequest>,
    ) -> Result<Response<v1::ConnectQueuePairResponse>, Status> {
        Err(refusal(Code::FailedPrecondition, Reason::NoRdmaDevice, "no device"))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        self.ask(request, Call::Pin).await
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        self.ask(request, Call::Unpin).await
    }

    async fn commit(&self, request: Request<v1::CommitRequest>) -> Answer<v1::CommitResponse> {
        self.ask(request, Call::Commit).await
    }

    async fn write(&self, request: Request<v1::WriteRequest>) -> Answer<v1::WriteResponse> {
        self.ask(request, Call::Write).await
    }

    async fn read(&self, request: Request<v1::ReadRequest>) -> Answer<v1::ReadResponse> {
        self.ask(request, Call::Read).await
    }

    async fn list(&self, _: Request<v1::ListRequest>) -> Answer<v1::ListResponse> {
        Err(Status::unimplemented("list"))
    }

    async fn grow(&self, _: Request<v1::GrowRequest>) -> Answer<v1::GrowResponse> {
        Err(Status::unimplemented("grow"))
    }

    async fn shrink(&self, _: Request<v1::ShrinkRequest>) -> Answer<v1::ShrinkResponse> {
        Err(Status::unimplemented("shrink"))
    }

    async fn remove(&self, _: Request<v1::RemoveRequest>) -> Answer<v1::RemoveResponse> {
        Err(Status::unimplemented("remove"))
    }

    async fn digest(&self, _: Request<v1::DigestRequest>) -> Answer<v1::DigestResponse> {
        Err(Status::unimplemented("digest"))
    }

    async fn make_folder(
        &self,
        _: Request<v1::MakeFolderRequest>,
    ) -> Answer<v1::MakeFolderResponse> {
        Err(Status::unimplemented("make_folder"))
    }

    async fn revoke(&self, _: Request<v1::RevokeRequest>) -> Answer<v1::RevokeResponse> {
        Err(Status::unimplemented("revoke"))
    }

    async fn quiesce(&self, _: Request<v1::QuiesceRequest>) -> Answer<v1::QuiesceResponse> {
        Err(Status::unimplemented("quiesce"))
    }

    async fn resume(&self, _: Request<v1::ResumeRequest>) -> Answer<v1::ResumeResponse> {
        Err(Status::unimplemented("resume"))
    }

    async fn inspect(&self, _: Request<v1::InspectRequest>) -> Answer<v1::InspectResponse> {
        Err(Status::unimplemented("inspect"))
    }

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Answer<Self::WatchStream> {
        let records = self.ask(request, Call::Watch).await?.into_inner();
        Ok(Response::new(UnboundedReceiverStream::new(records)))
    }
}
