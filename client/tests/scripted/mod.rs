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
use tokio::sync::mpsc;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

/// The id in every `Welcome`.
pub(crate) const SESSION_ID: &[u8] = b"sixteen bytes id";

/// A file name for which `Stat` never answers.
pub(crate) const HANGS: &str = "hangs";

/// A running server.
pub(crate) struct Scripted {
    address: SocketAddr,
    conversations: mpsc::UnboundedReceiver<Conversation>,
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
        let service = PinfoldServer::new(Service { conversations: sender });
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
        Self { address, conversations }
    }

    /// How to connect to it, without an RDMA device.
    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::new(format!("http://{}", self.address)).rdma_device(RdmaDevice::None)
    }

    /// The next session stream that a client opens.
    pub(crate) async fn conversation(&mut self) -> Conversation {
        soon(self.conversations.recv()).await.expect("the server runs")
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

struct Service {
    conversations: mpsc::UnboundedSender<Conversation>,
}

#[tonic::async_trait]
impl Pinfold for Service {
    type SessionStream = UnboundedReceiverStream<Result<SessionEvent, Status>>;

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

    async fn connect_queue_pair(
        &self,
        _: Request<v1::ConnectQueuePairRequest>,
    ) -> Result<Response<v1::ConnectQueuePairResponse>, Status> {
        Err(no_device())
    }

    async fn pin(&self, _: Request<v1::PinRequest>) -> Result<Response<v1::PinResponse>, Status> {
        Err(no_device())
    }

    async fn unpin(
        &self,
        _: Request<v1::UnpinRequest>,
    ) -> Result<Response<v1::UnpinResponse>, Status> {
        Err(no_device())
    }

    async fn commit(
        &self,
        _: Request<v1::CommitRequest>,
    ) -> Result<Response<v1::CommitResponse>, Status> {
        Err(no_device())
    }
}

fn no_device() -> Status {
    refusal(Code::FailedPrecondition, Reason::NoRdmaDevice, "no device")
}
