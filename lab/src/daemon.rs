//! `pinfoldd` as a process, and what it says.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use crate::process::{memlock_prefix, prefixed};
use crate::{DEADLINE, EXPORT, Finished, device_name, tool};

/// A system call, by its number on x86-64.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u32)]
pub enum SystemCall {
    /// ioctl(2)
    Ioctl = 16,
    /// pwrite(2)
    Pwrite = 18,
    /// openat(2)
    Openat = 257,
}

/// A running daemon; ended when dropped.
#[derive(Debug)]
pub struct Daemon {
    /// Where clients reach it.
    pub url: String,
    /// Where its state folder lies.
    state: Arc<TempDir>,
    child: Child,
    log: Arc<Log>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Log {
    lines: Mutex<Vec<Value>>,
    /// When each line came.
    times: Mutex<Vec<Instant>>,
    more: Condvar,
}

impl Daemon {
    /// Starts one with the lab's soft NIC on a free port, and waits until it listens.
    pub fn start(exports: &[(&str, &Path)]) -> Self {
        Self::start_with(exports, &["--rdma-device", &server_device()])
    }

    /// Starts another one when this one is gone: it listens where this one did, and has its state folder.
    pub fn successor(&self, exports: &[(&str, &Path)]) -> Self {
        let command = on_storage_host(&[], self.port());
        let arguments = ["--rdma-device", &server_device()];
        let started = Self::try_start(command, Arc::clone(&self.state), exports, &arguments);
        started.unwrap_or_else(|ended| panic!("pinfoldd did not start: {ended:?}"))
    }

    /// Waits until it has written down that it is alive, later than this call: a file that nobody has
    /// changed since then is known to its successor.
    pub fn wait_for_sign_of_life(&self) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let lives = self.state.path().join(STATE_FOLDER).join("lives");
        let is_later = |line: &str| {
            let at_ns = line.strip_prefix("alive ").and_then(|at_ns| at_ns.parse().ok());
            at_ns.is_some_and(|at_ns: u128| at_ns > now.as_nanos())
        };
        let begin = Instant::now();
        while !std::fs::read_to_string(&lives).unwrap_or_default().lines().any(is_later) {
            assert!(begin.elapsed() < DEADLINE, "no sign of life in {}", lives.display());
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port in the URL")
    }

    /// Starts one with these arguments on a free port, and waits until it listens.
    pub fn start_with(exports: &[(&str, &Path)], arguments: &[&str]) -> Self {
        Self::started(on_storage_host(&[], 0), exports, arguments)
    }

    /// Starts one with the lab's soft NIC that may lock only so many bytes of memory.
    pub fn start_with_memlock(exports: &[(&str, &Path)], bytes: usize) -> Self {
        let prefix = memlock_prefix(bytes);
        let prefix: Vec<&str> = prefix.iter().map(String::as_str).collect();
        Self::started(on_storage_host(&prefix, 0), exports, &["--rdma-device", &device_name()])
    }

    /// Starts one with the lab's soft NIC by way of another command, which takes rights away.
    pub fn start_as(prefix: &[&str], exports: &[(&str, &Path)]) -> Self {
        Self::started(on_storage_host(prefix, 0), exports, &["--rdma-device", &device_name()])
    }

    /// As [`start_as`](Self::start_as), with these arguments; or what became of it.
    pub fn try_start_as(
        prefix: &[&str],
        exports: &[(&str, &Path)],
        arguments: &[&str],
    ) -> Result<Self, Finished> {
        Self::try_started(on_storage_host(prefix, 0), exports, arguments)
    }

    /// Starts one that exports a folder with a policy, `guard=none` or so, run by a command that runs
    /// it, `["setpriv", …]` or nothing.
    pub fn start_with_policy(by: &[&str], folder: &Path, policy: &str) -> Self {
        let export = format!("{EXPORT}={},{policy}", folder.display());
        let arguments = ["--rdma-device", &server_device(), "--export", &export];
        Self::started(on_storage_host(by, 0), &[], &arguments)
    }

    /// Runs one that does not start, to its end.
    pub fn refused(exports: &[(&str, &Path)], arguments: &[&str]) -> Finished {
        let (mut command, state) = (on_storage_host(&[], 0), state_folder());
        configure(&mut command, state.path(), exports, arguments);
        let output = command.output().unwrap();
        let code = output.status.code().unwrap_or_else(|| panic!("it died: {}", output.status));
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Finished { code, stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    fn started(command: Command, exports: &[(&str, &Path)], arguments: &[&str]) -> Self {
        let started = Self::try_started(command, exports, arguments);
        started.unwrap_or_else(|ended| panic!("pinfoldd did not start: {ended:?}"))
    }

    fn try_started(
        command: Command,
        exports: &[(&str, &Path)],
        arguments: &[&str],
    ) -> Result<Self, Finished> {
        Self::try_start(command, Arc::new(state_folder()), exports, arguments)
    }

    fn try_start(
        mut command: Command,
        state: Arc<TempDir>,
        exports: &[(&str, &Path)],
        arguments: &[&str],
    ) -> Result<Self, Finished> {
        configure(&mut command, state.path(), exports, arguments);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let writer = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                writer.add(line);
            }
        });
        let mut first = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let Some(url) = first.trim().strip_prefix("pinfoldd: listening on ") else {
            let status = child.wait().unwrap();
            reader.join().unwrap();
            let code = status.code().unwrap_or_else(|| panic!("it died: {status}; {}", log.text()));
            return Err(Finished { code, stdout: first, stderr: log.text() });
        };
        Ok(Self { url: url.to_owned(), state, child, log, reader: Some(reader) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the audit record of a revocation of this file.
    pub fn audit_record(&self, path: &Path) -> Value {
        let path = path.to_str().unwrap();
        self.log.wait_for(|line| line["target"] == "pinfold::audit" && line["path"] == path)
    }

    /// Waits until it has logged an error with these words.
    pub fn logged_error(&self, words: &str) -> Value {
        self.log.wait_for(|line| {
            line["level"] == "ERROR" && line["message"].as_str().is_some_and(|m| m.contains(words))
        })
    }

    /// Waits until it has logged these words.
    pub fn logged(&self, words: &str) -> Value {
        self.log.wait_for(|line| line["message"].as_str().is_some_and(|m| m.contains(words)))
    }

    /// Whether it has logged these words until now.
    pub fn has_logged(&self, words: &str) -> bool {
        let said = |line: &Value| line["message"].as_str().is_some_and(|m| m.contains(words));
        self.log.lines.lock().unwrap().iter().any(said)
    }

    /// Waits until it has logged these words, of this file.
    pub fn logged_of(&self, path: &Path, words: &str) -> Value {
        let path = path.to_str().unwrap();
        self.log.wait_for(|line| {
            line["path"] == path && line["message"].as_str().is_some_and(|m| m.contains(words))
        })
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Everything that it has logged, with the time at which each line came; to be called once it
    /// has ended.
    pub fn last_words(&mut self) -> Vec<(Instant, Value)> {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        let times = self.log.times.lock().unwrap().clone();
        times.into_iter().zip(self.log.lines.lock().unwrap().clone()).collect()
    }

    /// How many of its threads are inside this system call now.
    pub fn threads_in(&self, call: SystemCall) -> usize {
        let threads = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let inside = format!("{} ", call as u32);
        threads
            .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("syscall")).ok())
            .filter(|words| words.starts_with(&inside))
            .count()
    }

    /// Ends it without a chance to clean up, and waits until it is gone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks it to go (SIGTERM), and waits until it has.
    pub fn terminate(&mut self) -> ExitStatus {
        self.ask_to_go();
        self.child.wait().unwrap()
    }

    /// Asks it to go, and does not wait.
    pub fn ask_to_go(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    }

    /// How many files of this folder it has open or mapped.
    pub fn files_open_beneath(&self, folder: &Path) -> usize {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let open = descriptors
            .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
            .filter(|target| target != folder && target.starts_with(folder))
            .count();
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let beneath = |line: &&str| {
            line.split_once('/')
                .is_some_and(|(_, path)| PathBuf::from(format!("/{path}")).starts_with(folder))
        };
        open + maps.lines().filter(beneath).count()
    }
}

/// The soft NIC of the storage host.
pub(crate) fn server_device() -> String {
    std::env::var("PINFOLD_LAB_SERVER_DEVICE").unwrap_or_else(|_| device_name())
}

/// `pinfoldd` where clients are to reach it: here, or in the network namespace that the lab has for
/// the storage host.
fn on_storage_host(prefix: &[&str], port: u16) -> Command {
    let Ok(host) = std::env::var("PINFOLD_LAB_SERVER_HOST") else {
        let mut command = prefixed(prefix, &tool("pinfoldd"));
        command.args(["--listen", &format!("127.0.0.1:{port}")]);
        return command;
    };
    let address = crate::required("PINFOLD_LAB_SERVER_ADDRESS");
    let mut command =
        prefixed(&[&["ip", "netns", "exec", &host], prefix].concat(), &tool("pinfoldd"));
    command.args(["--listen", &format!("{address}:{port}"), "--plaintext-on-network"]);
    command
}

/// In the folder of its own that each daemon has.
const STATE_FOLDER: &str = "state";

/// Also a daemon of another user may make its state folder in it.
fn state_folder() -> TempDir {
    let folder = TempDir::new().unwrap();
    // Not when it is made: the umask would take the right away again.
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
    folder
}

fn configure(command: &mut Command, state: &Path, exports: &[(&str, &Path)], arguments: &[&str]) {
    // Some tests serve several file systems from one process, to see how far one keeps up the others.
    command.args(["--log-format", "json", "--share-fate"]).args(arguments);
    command.arg("--state-dir").arg(state.join(STATE_FOLDER));
    for (name, folder) in exports {
        command.arg("--export").arg(format!("{name}={}", folder.display()));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails if the test has ended it already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the daemon said:\n{}", self.log.text());
        }
    }
}

impl Log {
    fn add(&self, line: String) {
        let line = serde_json::from_str(&line).unwrap_or(Value::String(line));
        self.times.lock().unwrap().push(Instant::now());
        self.lines.lock().unwrap().push(line);
        self.more.notify_all();
    }

    fn wait_for(&self, wanted: impl Fn(&Value) -> bool) -> Value {
        let lines = self.lines.lock().unwrap();
        let (lines, waited) = self
            .more
            .wait_timeout_while(lines, DEADLINE, |lines| !lines.iter().any(&wanted))
            .unwrap();
        assert!(!waited.timed_out(), "the daemon did not log it");
        lines.iter().find(|line| wanted(line)).unwrap().clone()
    }

    fn text(&self) -> String {
        let lines = self.lines.lock().unwrap();
        let plain = |line: &Value| line.as_str().map_or_else(|| line.to_string(), str::to_owned);
        lines.iter().map(|line| plain(line) + "\n").collect()
    }
}
