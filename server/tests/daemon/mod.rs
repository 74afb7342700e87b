//! The real `pinfoldd` on this host, under limits of its own, and a client written from the `.proto`.
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use pinfold_proto::v1::session_event::Event;
use pinfold_proto::v1::session_request::Message;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tonic_types::StatusExt as _;

/// Only to end a test that would hang; nothing is measured by it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Ended when dropped.
pub(crate) struct Daemon {
    pub(crate) url: String,
    child: Child,
    log: Arc<Log>,
    /// Where the exports lie, one named "data" among them.
    pub(crate) folder: TempDir,
    _state: TempDir,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
}

impl Log {
    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Daemon {
    /// Serves a new folder as "data".
    pub(crate) fn start() -> Self {
        Self::start_by(&[], Stdio::null())
    }

    /// As [`start`](Self::start), run by another command that sets limits.
    pub(crate) fn start_by(prefix: &[&str], stdout: Stdio) -> Self {
        // Where the build goes is a disk, more likely than /tmp.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let export = format!("data={}", folder.path().display());
        let mut command = match prefix {
            [] => Command::new(env!("CARGO_BIN_EXE_pinfoldd")),
            [by, arguments @ ..] => {
                let mut command = Command::new(by);
                command.args(arguments).arg(env!("CARGO_BIN_EXE_pinfoldd"));
                command
            }
        };
        command.args(["--rdma-device", "none", "--listen", "127.0.0.1:0", "--log-format", "json"]);
        command.arg("--state-dir").arg(state.path());
        command.args(["--export", &export]).stdin(Stdio::null());
        let mut child = command.stdout(stdout).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, writer) = (child.stderr.take().unwrap(), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                writer.lines().push(line);
                writer.more.notify_all();
            }
        });
        let mut daemon = Self { url: String::new(), child, log, folder, _state: state };
        let line = daemon.logged("\"listening");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        daemon.url = line["url"].as_str().unwrap().to_owned();
        daemon
    }

    /// Waits until a line of the log holds these words.
    pub(crate) fn logged(&self, words: &str) -> String {
        let lines = self.log.lines();
        let missing = |lines: &mut Vec<String>| !lines.iter().any(|line| line.contains(words));
        let waited = self.log.more.wait_timeout_while(lines, DEADLINE, missing);
        let (lines, _) = waited.unwrap();
        let found = lines.iter().find(|line| line.contains(words)).cloned();
        drop(lines);
        found.unwrap_or_else(|| panic!("{words:?} is not in the log"))
    }

    /// How many lines of the log hold these words.
    pub(crate) fn times_logged(&self, words: &str) -> usize {
        self.log.lines().iter().filter(|line| line.contains(words)).count()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn ended(&mut self) -> ExitStatus {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begin.elapsed() < DEADLINE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{:#?}", self.log.lines());
        }
    }
}

/// A session by hand.
pub(crate) struct Client {
    pub(crate) stub: PinfoldClient<Channel>,
    pub(crate) id: Vec<u8>,
    said: mpsc::UnboundedSender<v1::SessionRequest>,
    heard: Streaming<v1::SessionEvent>,
}

impl Client {
    pub(crate) async fn open(url: &str) -> Self {
        Self::try_open(url).await.unwrap()
    }

    pub(crate) async fn try_open(url: &str) -> Result<Self, Status> {
        let stub = PinfoldClient::connect(url.to_owned()).await;
        let mut stub = stub.map_err(|error| Status::unavailable(error.to_string()))?;
        let (said, stream) = mpsc::unbounded_channel();
        let say = |message| v1::SessionRequest { message: Some(message) };
        let hello = v1::Hello { client_name: "a test".to_owned() };
        said.send(say(Message::Hello(hello))).unwrap();
        let mut heard = stub.session(UnboundedReceiverStream::new(stream)).await?.into_inner();
        let first = heard.message().await?.and_then(|event| event.event);
        let Some(Event::Welcome(welcome)) = first else { panic!("not welcome: {first:?}") };
        let beat = said.downgrade();
        tokio::spawn(async move {
            let mut sequence = 0;
            while let Some(said) = beat.upgrade() {
                sequence += 1;
                let _ = said.send(say(Message::Heartbeat(v1::Heartbeat { sequence })));
                drop(said);
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        });
        Ok(Self { stub, id: welcome.session_id, said, heard })
    }

    pub(crate) async fn next_event(&mut self) -> Option<Event> {
        loop {
            match self.heard.message().await.unwrap()?.event? {
                Event::HeartbeatReply(_) => {}
                event => return Some(event),
            }
        }
    }

    /// Answers a notice.
    pub(crate) fn say_drained(&self, pin_ids: Vec<u64>) {
        let message = Some(Message::Drained(v1::Drained { pin_ids }));
        self.said.send(v1::SessionRequest { message }).unwrap();
    }

    /// Ends the session, and waits until the server has ended it.
    pub(crate) async fn close(self) {
        let Self { said, mut heard, .. } = self;
        drop(said);
        while let Ok(Some(_)) = heard.message().await {}
    }

    pub(crate) async fn create(&mut self, name: &str, size: u64) -> Result<(), Status> {
        let request = v1::CreateRequest {
            session_id: self.id.clone(),
            export: "data".to_owned(),
            path: name.to_owned(),
            size,
            ..Default::default()
        };
        self.stub.create(request).await.map(drop)
    }

    pub(crate) async fn pin(&mut self, name: &str) -> Result<v1::PinResponse, Status> {
        let mut request = v1::PinRequest {
            session_id: self.id.clone(),
            export: "data".to_owned(),
            path: name.to_owned(),
            ..Default::default()
        };
        request.set_access(v1::Access::ReadWrite);
        self.stub.pin(request).await.map(tonic::Response::into_inner)
    }

    pub(crate) async fn write(
        &mut self,
        pin: &v1::PinResponse,
        data: Vec<u8>,
    ) -> Result<(), Status> {
        let request = v1::WriteRequest {
            session_id: self.id.clone(),
            pin_id: pin.pin_id,
            generation: pin.generation,
            offset: 0,
            data: data.into(),
        };
        self.stub.write(request).await.map(drop)
    }

    pub(crate) async fn commit(&mut self, pin: &v1::PinResponse) -> Result<(), Status> {
        let request = v1::CommitRequest {
            session_id: self.id.clone(),
            pin_id: pin.pin_id,
            generation: pin.generation,
            ..Default::default()
        };
        self.stub.commit(request).await.map(drop)
    }

    pub(crate) async fn inspect(&mut self) -> Result<v1::InspectResponse, Status> {
        let request = v1::InspectRequest { session_id: self.id.clone(), ..Default::default() };
        self.stub.inspect(request).await.map(tonic::Response::into_inner)
    }
}

/// The reason that an error carries for programs.
pub(crate) fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

/// Asks until it is so; for what no event tells.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begin = Instant::now();
    while !is_so().await {
        assert!(begin.elapsed() < DEADLINE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs a test to its end, or to the deadline.
pub(crate) fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async { tokio::time::timeout(DEADLINE, test).await.expect("it hangs") });
}

/// Numbers of the threads of a process.
pub(crate) fn threads(pid: u32) -> Vec<String> {
    let entries = Path::new("/proc").join(pid.to_string()).join("task").read_dir().unwrap();
    let mut threads: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    threads.sort();
    threads
}
