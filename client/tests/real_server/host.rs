//! A server without RDMA that exports a folder as "data", on a runtime of its own.

use std::fs;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use pinfold_client::{ConnectOptions, RdmaDevice, Session};
use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use pinfold_proto::v1::session_event::Event;
use pinfold_proto::v1::session_request::Message;
use pinfold_server::Server;
use pinfold_server::config::{Config, ExportConfig};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::transport::{Channel, Endpoint};

/// Only to end a test that would hang; nothing is measured by it.
const DEADLINE: Duration = Duration::from_secs(120);

pub(crate) struct Host {
    pub(crate) endpoint: String,
    folder: TempDir,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<()>>,
}

impl Host {
    pub(crate) fn start() -> Self {
        Self::start_with(|config| config)
    }

    pub(crate) fn start_with(change: impl FnOnce(Config) -> Config) -> Self {
        // Every guarded file takes a descriptor.
        let limit = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
        // On the disk of the build, where /tmp may be memory.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let export = ExportConfig::new("data", folder.path());
        let config = change(Config { rdma_devices: Vec::new(), ..Config::new(vec![export]) });
        let (stop, stopped) = oneshot::channel();
        let (started, endpoint) = std::sync::mpsc::channel();
        let serving = std::thread::spawn(move || {
            // One worker, as on a host with two processors.
            let mut runtime = tokio::runtime::Builder::new_multi_thread();
            let runtime = runtime.worker_threads(1).enable_all().build().unwrap();
            let served = runtime.spawn(async move {
                let server = Server::start(config).await.expect("a server");
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                started.send(format!("http://{}", listener.local_addr().unwrap())).unwrap();
                // An error: dropped by a test that failed; then it stops as well.
                server.serve(listener, async { drop(stopped.await) }).await.expect("served");
            });
            runtime.block_on(served).unwrap();
        });
        let endpoint = endpoint.recv().expect("the server starts");
        Self { endpoint, folder, stop: Some(stop), serving: Some(serving) }
    }

    pub(crate) fn options(&self) -> ConnectOptions {
        ConnectOptions::new(&self.endpoint).rdma_device(RdmaDevice::None)
    }

    pub(crate) async fn connect(&self) -> Session {
        Session::connect(self.options()).await.unwrap()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn make_file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Has the server go down, as SIGTERM does, and does not wait for that.
    pub(crate) fn begin_to_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            // Fails when the server has failed.
            let _ = stop.send(());
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.begin_to_stop();
        let served = self.serving.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(served, Some(Ok(()))), "the server failed");
        }
    }
}

/// A session of a client that knows the protocol only, over one connection.
pub(crate) struct RawSession {
    pub(crate) client: PinfoldClient<Channel>,
    pub(crate) id: Vec<u8>,
    pub(crate) say: mpsc::UnboundedSender<v1::SessionRequest>,
    /// Not read any further than the welcome.
    _events: Streaming<v1::SessionEvent>,
}

impl RawSession {
    /// The server may send so many bytes of each call unasked.
    pub(crate) async fn open(host: &Host, window_bytes: u32) -> Self {
        let endpoint = Endpoint::from_shared(host.endpoint.clone()).unwrap();
        let endpoint = endpoint.initial_stream_window_size(window_bytes);
        let mut client = PinfoldClient::new(endpoint.connect().await.unwrap());
        let (say, said) = mpsc::unbounded_channel();
        let hello = v1::Hello { client_name: "raw".to_owned() };
        say.send(v1::SessionRequest { message: Some(Message::Hello(hello)) }).unwrap();
        let stream = UnboundedReceiverStream::new(said);
        let mut events = client.session(stream).await.unwrap().into_inner();
        let welcome = events.message().await.unwrap().unwrap();
        let Some(Event::Welcome(welcome)) = welcome.event else { panic!("{welcome:?}") };
        Self { client, id: welcome.session_id, say, _events: events }
    }
}

/// Waits, but not for ever: so long only if something is broken.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it never came")
}

/// Asks until it is so; for what no event tells.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let asking = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(DEADLINE, asking).await.unwrap_or_else(|_| panic!("never: {what}"));
}
