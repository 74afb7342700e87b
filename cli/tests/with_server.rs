//! The built command against a server without RDMA, on this host's own file system: every command,
//! what it prints, what it leaves, how it exits.
//!
//! The server runs in a process of its own, which is this test program started again: a process that
//! guards files must not fork, or the copies of its descriptors keep files busy for a moment.

#[path = "with_server/copies.rs"]
mod copies;
#[path = "with_server/names.rs"]
mod names;
#[path = "with_server/restarts.rs"]
mod restarts;
#[path = "with_server/unmixed.rs"]
mod unmixed;

use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use pinfold_server::Server;
use pinfold_server::config::{Config, ExportConfig};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;
use tempfile::TempDir;

/// Only to end a test that would hang; nothing is measured by it.
const DEADLINE: Duration = Duration::from_secs(120);

/// Names the folder to serve, in the process that serves it.
const SERVE: &str = "PINFOLD_TEST_SERVE";

const ODD: usize = (3 << 20) + 123;

/// What the server's process runs; in a run of all tests it has nothing to do.
#[test]
fn serve_until_standard_input_ends() {
    let Some(folder) = std::env::var_os(SERVE) else { return };
    let export = ExportConfig::new("data", folder);
    let mut config = Config::new(vec![export]);
    config.rdma_devices = vec![];
    config.state_folder = Some(std::env::var_os(STATE).unwrap().into());
    // Nothing here waits for the end of it.
    config.unseen_breaker_pause = DEADLINE * 2;
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let server = Server::start(config).await.unwrap();
        let port: u16 = std::env::var(PORT).unwrap().parse().unwrap();
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        println!("\nlistening at http://{}", listener.local_addr().unwrap());
        let input_ends = tokio::task::spawn_blocking(|| {
            std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
        });
        server.serve(listener, async { input_ends.await.unwrap() }).await.unwrap();
    });
}

#[test]
fn the_doctor_finds_the_server_and_says_why_there_is_no_rdma() {
    let host = Host::start();
    let done = host.run(&["doctor", "--json"]);
    assert_eq!(done.code, 0, "{done:?}");
    let report: Value = serde_json::from_str(&done.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let of = |check: &str| findings.iter().find(|finding| finding["check"] == check).unwrap();
    assert_eq!(
        (&of("reachable")["result"], &of("exports")["found"]),
        (&"ok".into(), &"data".into())
    );
    assert_eq!(of("rdma")["result"], "limited");
    assert!(!of("rdma")["why"].as_str().unwrap().is_empty());
    let done = host.run(&["doctor", "--transport", "rdma"]);
    assert_eq!(done.code, 8, "{done:?}");
    assert!(done.stdout.contains("missing  rdma"), "{done:?}");
}

/// A storage host: a folder, served.
struct Host {
    folder: TempDir,
    state: TempDir,
    url: String,
    /// Ended by its input when this is dropped.
    server: Running,
}

/// Names its state folder.
const STATE: &str = "PINFOLD_TEST_STATE";

/// Names the port to listen at, in the process that serves; 0: any.
const PORT: &str = "PINFOLD_TEST_PORT";

/// A process at work; killed if it is dropped before its end.
struct Running {
    child: Child,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    /// What `wait_for` has read.
    seen: String,
}

#[derive(Debug)]
struct Finished {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Host {
    fn start() -> Self {
        // Where the build goes is a disk, more likely than /tmp.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (server, url) = Self::serve(folder.path(), state.path(), "0");
        Self { folder, state, url, server }
    }

    fn serve(folder: &Path, state: &Path, port: &str) -> (Running, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "serve_until_standard_input_ends", "--nocapture"])
            .env(SERVE, folder)
            .env(STATE, state)
            .env(PORT, port)
            .stdin(Stdio::piped());
        let mut server = Running::start(command);
        let line = wait_for(&server.stdout, &mut server.seen, "listening at ");
        let url = line.trim_start_matches("listening at ").to_owned();
        (server, url)
    }

    /// Ends the server without a word, and starts another one at the same address.
    fn kill_and_serve_again(&mut self) {
        self.kill_server();
        self.serve_again();
    }

    fn kill_server(&mut self) {
        self.server.signal(Signal::KILL);
        self.server.child.wait().unwrap();
    }

    fn serve_again(&mut self) {
        let port = self.url.rsplit(':').next().unwrap();
        (self.server, self.url) = Self::serve(self.folder.path(), self.state.path(), port);
    }

    /// Has the server end in order, and waits until it has.
    fn end_server(&mut self) {
        drop(self.server.child.stdin.take());
        let ended = self.server.end();
        assert_eq!(ended.code, 0, "the server failed: {}{}", ended.stdout, ended.stderr);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn make_file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn start_command(&self, args: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pinfold"));
        command.args(["--server", &self.url]).args(args).stdin(Stdio::null());
        Running::start(command)
    }

    fn run(&self, args: &[&str]) -> Finished {
        self.start_command(args).finish()
    }

    /// Runs a command that has to succeed, and reads what it printed.
    fn json(&self, args: &[&str]) -> Value {
        let finished = self.run(&[args, &["--json"]].concat());
        assert_eq!(finished.code, 0, "{args:?}: {}", finished.stderr);
        serde_json::from_str(&finished.stdout).unwrap_or_else(|e| panic!("{args:?}: {e}"))
    }

    fn assert_fails(&self, args: &[&str], code: i32, words: &[&str]) {
        let finished = self.run(args);
        assert_eq!(finished.code, code, "{args:?}: {}{}", finished.stdout, finished.stderr);
        for word in words {
            assert!(finished.stderr.contains(word), "{args:?}: {word:?}: {}", finished.stderr);
        }
        assert_eq!(finished.stdout, "", "{args:?}");
    }

    /// Holds a pin from here on.
    fn hold(&self, args: &[&str]) -> Running {
        let mut holding = self.start_command(&[&["pin"], args, &["--hold"]].concat());
        holding.wait_for_stdout("holding the pin");
        holding
    }

    /// A local process cuts the file; done when it has got through.
    fn truncate(&self, name: &str) {
        let mut command = Command::new("sh");
        command.args(["-c", ": > \"$0\""]).arg(self.path(name)).stdin(Stdio::null());
        let truncated = Running::start(command).finish();
        assert_eq!(truncated.code, 0, "{}", truncated.stderr);
        assert_eq!(fs::metadata(self.path(name)).unwrap().len(), 0);
    }

    /// What the server's process has open of the folder, the folder itself included.
    fn open_files(&self) -> Vec<PathBuf> {
        let open = fs::read_dir(format!("/proc/{}/fd", self.server.child.id())).unwrap();
        let targets = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        targets.filter(|target| target.starts_with(self.folder.path())).collect()
    }

    /// A pin that is gone may leave its file to be cleared up for a moment.
    fn assert_nothing_is_held(&self) {
        let begin = Instant::now();
        loop {
            let ps = self.json(&["ps"]);
            let files = ps["files"].as_array().unwrap();
            let pins: usize = files.iter().map(|file| file["pins"].as_array().unwrap().len()).sum();
            assert_eq!(pins, 0, "{ps}");
            if files.is_empty() {
                return;
            }
            assert!(begin.elapsed() < DEADLINE, "{ps}");
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.server.child.stdin.take());
        if !std::thread::panicking() {
            let ended = self.server.end();
            assert_eq!(ended.code, 0, "the server failed: {}{}", ended.stdout, ended.stderr);
        }
    }
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .env("NO_COLOR", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Self { child, stdout, stderr, seen: String::new() }
    }

    fn wait_for_stdout(&mut self, start: &str) -> String {
        wait_for(&self.stdout, &mut self.seen, start)
    }

    /// What it has read is not part of what `finish` gives.
    fn wait_for_stderr(&mut self, start: &str) -> String {
        wait_for(&self.stderr, &mut String::new(), start)
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Until it is told to go on; it hears nobody meanwhile.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let status = format!("/proc/{}/status", self.child.id());
        until("it has stopped", || fs::read_to_string(&status).unwrap().contains("State:\tT"));
    }

    fn finish(mut self) -> Finished {
        self.end()
    }

    fn end(&mut self) -> Finished {
        let stdout = std::mem::take(&mut self.seen) + &rest(&self.stdout);
        let stderr = rest(&self.stderr);
        // Both outputs are closed: it is on its way out.
        let status = self.child.wait().unwrap();
        let code = status.code().unwrap_or_else(|| panic!("it died: {status}; {stderr}"));
        Finished { code, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail if it has ended, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines(output: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, lines) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines() {
            // Nobody may be interested any more.
            if line.is_err() || line.is_ok_and(|line| sender.send(line).is_err()) {
                break;
            }
        }
    });
    lines
}

fn wait_for(lines: &Receiver<String>, seen: &mut String, start: &str) -> String {
    loop {
        let line = lines
            .recv_timeout(DEADLINE)
            .unwrap_or_else(|error| panic!("no line {start:?} after {seen:?}: {error}"));
        *seen += &line;
        seen.push('\n');
        if line.starts_with(start) {
            return line;
        }
    }
}

fn rest(lines: &Receiver<String>) -> String {
    let mut text = String::new();
    loop {
        match lines.recv_timeout(DEADLINE) {
            Ok(line) => text += &(line + "\n"),
            Err(RecvTimeoutError::Disconnected) => return text,
            Err(RecvTimeoutError::Timeout) => panic!("it does not end; it said {text:?}"),
        }
    }
}

/// Asks until it is so; for what no event tells.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < DEADLINE, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Different at every offset up to far beyond a page and a chunk.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + (at >> 8) * 7 + (at >> 16) * 13) as u8).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn what_is_put_comes_back_to_the_byte() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let (from, to) = (local.path().join("from"), local.path().join("to"));
    for (len, chunk) in [(0, "1M"), (1, "1M"), (4096, "1M"), (ODD, "1M"), (ODD, "4K"), (77, "16M")]
    {
        fs::write(&from, pattern(len)).unwrap();
        let put = host.json(&["put", text(&from), "data/name", "--chunk", chunk]);
        assert_eq!((&put["bytes"], &put["durable"]), (&len.into(), &true.into()), "{put}");
        assert_eq!((&put["rdma_bytes"], &put["stream_bytes"]), (&0.into(), &len.into()), "{put}");
        assert_eq!(put["stream_because"].is_string(), len > 0, "{put}");
        assert!(fs::read(host.path("name")).unwrap() == pattern(len), "{len} bytes differ");
        let get = host.json(&["get", "data/name", text(&to), "--chunk", chunk]);
        assert_eq!((&get["rdma_bytes"], &get["stream_bytes"]), (&0.into(), &len.into()), "{get}");
        assert!(fs::read(&to).unwrap() == pattern(len), "{len} bytes differ");
    }
    assert_eq!(names(local.path()), ["from", "to"], "nothing else is left");
    host.assert_nothing_is_held();
}

#[test]
fn the_report_says_which_path_and_why() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let from = local.path().join("from");
    fs::write(&from, pattern(5000)).unwrap();
    let put = host.run(&["put", text(&from), "data/name"]);
    assert_eq!(put.code, 0, "{}", put.stderr);
    assert!(put.stdout.starts_with("data/name: 5000 bytes in "), "{}", put.stdout);
    assert!(
        put.stdout.contains(", 0 by RDMA and 5000 by stream, durable\n  by stream because: "),
        "{}",
        put.stdout
    );
    // Who asks for it needs no reason.
    let put = host.json(&["--transport", "stream", "put", text(&from), "data/name"]);
    assert_eq!((&put["stream_bytes"], &put["stream_because"]), (&5000.into(), &Value::Null));
    for args in [
        &["put", text(&from), "data/name"] as &[&str],
        &["get", "data/name", "-"],
        &["pin", "data/name"],
    ] {
        let args = [args, &["--transport", "rdma"]].concat();
        host.assert_fails(&args, 8, &["RDMA", "hint: "]);
    }
}

#[test]
fn a_get_can_go_to_standard_output() {
    let host = Host::start();
    let content: String = (0..100_000).map(|line| format!("{line}\n")).collect();
    host.make_file("name", content.as_bytes());
    let get = host.run(&["get", "data/name", "-", "--chunk", "4K", "--window", "5"]);
    assert_eq!(get.code, 0, "{}", get.stderr);
    assert!(get.stdout == content, "exactly the bytes, in their order");
    assert!(get.stderr.contains(&format!("{} by stream", content.len())), "{}", get.stderr);
}

#[test]
fn a_get_replaces_a_file_and_nothing_else() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let to = local.path().join("to");
    fs::write(&to, "before").unwrap();
    host.assert_fails(&["get", "data/none", text(&to)], 4, &["data/none"]);
    assert_eq!(fs::read(&to).unwrap(), b"before");
    host.make_file("name", b"after");
    assert_eq!(host.run(&["get", "data/name", text(&to)]).code, 0);
    assert_eq!(fs::read(&to).unwrap(), b"after");
    assert_eq!(names(local.path()), ["to"]);
}

#[test]
fn a_get_that_is_cut_short_leaves_no_part_of_a_file() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let to = local.path().join("to");
    let getting = start_long_get(&host, &to);
    host.truncate("name");
    let got = getting.finish();
    assert_eq!(got.code, 7, "{}", got.stderr);
    assert_eq!(got.stdout, "");
    let what = format!("cannot get data/name into {}: of {} bytes", text(&to), 4_u64 << 30);
    assert!(got.stderr.contains(&what), "{}", got.stderr);
    assert!(got.stderr.contains("a local process wants to change the file"), "{}", got.stderr);
    assert!(got.stderr.contains("hint: "), "{}", got.stderr);
    assert!(names(local.path()).is_empty(), "{:?}", names(local.path()));
    host.assert_nothing_is_held();
}

/// Gets a file that has far more bytes than can be read in requests of a page before the test goes
/// on; some have come when this returns.
fn start_long_get(host: &Host, to: &Path) -> Running {
    // Sparse: it takes no room.
    fs::File::create(host.path("name")).unwrap().set_len(4 << 30).unwrap();
    let getting =
        host.start_command(&["get", "data/name", text(to), "--chunk", "4K", "--window", "1"]);
    let folder = to.parent().unwrap();
    let some = || {
        let part = names(folder).into_iter().next()?;
        assert!(part.starts_with(".to.pinfold-"), "{part}");
        (fs::metadata(folder.join(part)).ok()?.len() > 0).then_some(())
    };
    let begin = Instant::now();
    while some().is_none() {
        assert!(begin.elapsed() < DEADLINE, "nothing is read");
        std::thread::yield_now();
    }
    getting
}

#[test]
fn ctrl_c_in_a_get_or_a_put_unpins_and_says_what_is_left() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let to = local.path().join("to");
    // The second is what comes when the terminal or the connection that it runs on has gone.
    for signal in [Signal::INT, Signal::HUP] {
        let getting = start_long_get(&host, &to);
        getting.signal(signal);
        let got = getting.finish();
        assert_eq!(got.code, 130, "{}", got.stderr);
        assert!(got.stderr.contains(&format!("interrupted; {} is as it was", text(&to))));
        assert!(names(local.path()).is_empty(), "{:?}", names(local.path()));
        host.assert_nothing_is_held();
    }

    fs::remove_file(host.path("name")).unwrap();
    // Not sparse: holes are not carried.
    fs::write(&to, vec![7; 64 << 20]).unwrap();
    let putting =
        host.start_command(&["put", text(&to), "data/name", "--chunk", "4K", "--window", "1"]);
    let begin = Instant::now();
    while host.json(&["ps"])["files"].as_array().unwrap().is_empty() {
        assert!(begin.elapsed() < DEADLINE, "nothing is pinned");
    }
    putting.signal(Signal::INT);
    let put = putting.finish();
    assert_eq!(put.code, 130, "{}", put.stderr);
    assert!(put.stderr.contains("interrupted; data/name is incomplete"), "{}", put.stderr);
    host.assert_nothing_is_held();
}

#[test]
fn an_output_that_can_not_be_written_is_an_error_with_words() {
    let host = Host::start();
    host.make_file("name", b"bytes");
    let full = || Stdio::from(fs::OpenOptions::new().write(true).open("/dev/full").unwrap());
    for args in [&["ls"][..], &["ps"], &["get", "data/name", "-"], &["completions", "bash"]] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pinfold"));
        command.args(["--server", &host.url]).args(args).stdin(Stdio::null());
        let done = command.stdout(full()).output().unwrap();
        let stderr = String::from_utf8(done.stderr).unwrap();
        assert_eq!(done.status.code(), Some(10), "{args:?}: {stderr}");
        assert!(stderr.contains("No space left on device"), "{args:?}: {stderr}");
        // Nor can the error be written: the code is all that is left.
        command.stdout(full()).stderr(full());
        assert_eq!(command.status().unwrap().code(), Some(10), "{args:?}");
    }
}

/// What a command prints to a terminal.
fn on_a_terminal(host: &Host, args: &[&str], variables: &[(&str, &str)]) -> String {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let other_end =
        fs::File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pinfold"));
    command.args(["--server", &host.url]).args(args).stdin(Stdio::null()).stdout(other_end);
    command.env_remove("NO_COLOR").env("TERM", "xterm").envs(variables.iter().copied());
    let mut child = command.spawn().unwrap();
    // It holds the other end too.
    drop(command);
    let mut shown = Vec::new();
    // Ends with an error when nobody holds the other end any more.
    let _ = fs::File::from(terminal).read_to_end(&mut shown);
    assert!(child.wait().unwrap().success());
    String::from_utf8(shown).unwrap()
}

#[test]
fn colours_are_for_terminals_that_want_them() {
    let host = Host::start();
    host.make_file("name", b"");
    let args = ["ls", "-l", "data"];
    let coloured = on_a_terminal(&host, &args, &[]);
    assert!(coloured.starts_with("\u{1b}[1mKIND"), "{coloured:?}");
    for without in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        let plain = on_a_terminal(&host, &args, &[without]);
        assert!(plain.starts_with("KIND"), "{without:?}: {plain:?}");
    }
    assert!(!host.run(&args).stdout.contains('\u{1b}'));
}

#[test]
fn ls_and_stat_show_what_is_there() {
    let host = Host::start();
    host.make_file("b", &pattern(ODD));
    host.make_file("a\tb", b"");
    fs::create_dir(host.path("old")).unwrap();
    fs::write(host.path("old/c"), "c").unwrap();

    let exports = host.json(&["ls"]);
    assert_eq!(exports["folder"], Value::Null);
    assert_eq!(
        (&exports["entries"][0]["name"], &exports["entries"][0]["kind"]),
        (&"data".into(), &"export".into())
    );
    let folder = host.json(&["ls", "data/"]);
    let found: Vec<_> = folder["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            (
                entry["name"].as_str().unwrap(),
                entry["kind"].as_str().unwrap(),
                entry["size"].as_u64(),
            )
        })
        .collect();
    assert_eq!(
        found,
        [("a\tb", "file", Some(0)), ("b", "file", Some(ODD as u64)), ("old", "folder", None)]
    );
    assert_eq!(host.run(&["ls", "data"]).stdout, "a\\tb\nb\nold/\n");
    assert_eq!(host.run(&["ls", "data/old/"]).stdout, "c\n");
    assert_eq!(host.run(&["ls", "data/b"]).stdout, "b\n", "a file lists itself");
    let long = host.run(&["ls", "-l", "data"]).stdout;
    assert!(long.starts_with("KIND "), "{long}");
    assert!(long.lines().any(|line| line.contains(&ODD.to_string()) && line.ends_with("  b")));

    let stat = host.json(&["stat", "data/b"]);
    assert_eq!((&stat["size"], &stat["pins"]), (&ODD.into(), &0.into()), "{stat}");
    assert_eq!((&stat["guard"], &stat["generation"]), (&Value::Null, &Value::Null), "{stat}");
    let holding = host.hold(&["data/b"]);
    let stat = host.json(&["stat", "data/b"]);
    assert_eq!(stat["pins"], 1, "{stat}");
    assert!(stat["guard"].is_string() && stat["generation"].is_string(), "{stat}");
    assert_eq!(host.json(&["ls", "data"])["entries"][1]["pins"], 1);
    holding.signal(Signal::INT);
    assert_eq!(holding.finish().code, 130);
}

/// More than a page of the protocol.
#[test]
fn a_large_folder_is_listed_to_its_end() {
    let host = Host::start();
    fs::create_dir(host.path("many")).unwrap();
    let expected: Vec<String> = (0..10_001).map(|number| format!("{number:05}")).collect();
    // The file system gives them back in an order of its own.
    for name in &expected {
        fs::write(host.path("many").join(name), b"").unwrap();
    }
    let listed = host.run(&["ls", "data/many"]);
    assert_eq!(listed.code, 0, "{}", listed.stderr);
    assert!(listed.stdout.lines().eq(expected.iter().map(String::as_str)), "each once, in order");
}

#[test]
fn ps_shows_who_holds_what() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    let ps = host.run(&["ps"]);
    assert_eq!((ps.code, ps.stdout.as_str()), (0, "no file is pinned\n"), "{}", ps.stderr);
    let holding = host.hold(&["data/name", "--range", "4K..1M", "--read-only"]);
    let ps = host.json(&["ps"]);
    let file = &ps["files"][0];
    assert!(file["path"].as_str().unwrap().ends_with("/name"), "{ps}");
    assert_eq!(file["state"], "held");
    let pin = &file["pins"][0];
    assert_eq!((&pin["start"], &pin["end"]), (&4096.into(), &(1 << 20).into()), "{ps}");
    assert_eq!((&pin["access"], &pin["transport"]), (&"read".into(), &"stream".into()), "{ps}");
    assert_eq!(pin["exclusive"], false);
    assert!(pin["client"].as_str().unwrap().starts_with("pinfold on "), "{ps}");
    let sessions = ps["sessions"].as_array().unwrap();
    assert_eq!(sessions.iter().filter(|session| session["yours"] == true).count(), 1, "{ps}");
    let table = host.run(&["ps"]).stdout;
    let row = table.lines().nth(1).unwrap();
    for word in ["held", "4096..1048576", "read", "stream", "pinfold on ", "/name"] {
        assert!(row.contains(word), "{word:?} is not in {table}");
    }
    holding.signal(Signal::TERM);
    let held = holding.finish();
    assert_eq!(held.code, 130);
    assert_eq!(held.stderr, "pinfold: interrupted; the pin is given back\n");
    host.assert_nothing_is_held();
}

#[test]
fn files_grow_shrink_and_go() {
    let host = Host::start();
    host.make_file("name", b"12345");
    assert_eq!(host.json(&["grow", "data/name", "4K"])["size"], 4096);
    assert_eq!(host.json(&["grow", "data/name", "+1"])["size"], 4097);
    let mut expected = vec![0; 4097];
    expected[..5].copy_from_slice(b"12345");
    assert_eq!(fs::read(host.path("name")).unwrap(), expected);
    host.assert_fails(&["grow", "data/name", "4K"], 5, &["data/name", "shrink"]);
    host.assert_fails(&["shrink", "data/name", "8K"], 5, &["data/name", "grow"]);
    host.assert_fails(&["grow", "data/name", "+18446744073709551615"], 5, &["data/name"]);
    let shrunk = host.json(&["shrink", "data/name", "3"]);
    assert_eq!((&shrunk["size"], &shrunk["revoked_pins"]), (&3.into(), &0.into()));
    assert_eq!(fs::read(host.path("name")).unwrap(), b"123");
    assert_eq!(host.run(&["rm", "data/name"]).stdout, "data/name: removed\n");
    assert!(!host.path("name").exists());
    for args in [&["rm", "data/name"] as &[&str], &["grow", "data/name", "1"]] {
        host.assert_fails(args, 4, &["data/name"]);
    }
}

#[test]
fn a_pin_stays_when_its_file_grows_and_goes_when_it_shrinks() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    let holding = host.hold(&["data/name", "--reserve", "+1M"]);
    assert_eq!(host.json(&["grow", "data/name", "1M"])["size"], 1 << 20);
    assert_eq!(host.json(&["stat", "data/name"])["pins"], 1);
    assert_eq!(host.json(&["shrink", "data/name", "1K"])["revoked_pins"], 1);
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    assert_eq!(fs::read(host.path("name")).unwrap(), pattern(1024));
}

#[test]
fn a_pinned_file_is_removed_only_with_revoke() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    let holding = host.hold(&["data/name"]);
    host.assert_fails(&["rm", "data/name"], 6, &["data/name", "hint: ", "--revoke"]);
    assert!(host.path("name").exists());
    assert_eq!(host.json(&["rm", "data/name", "--revoke"])["revoked_pins"], 1);
    assert!(!host.path("name").exists());
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    host.assert_nothing_is_held();
}

#[test]
fn a_held_pin_and_a_watcher_are_told_of_a_local_truncate() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    host.make_file("other", &pattern(ODD));
    let mut watching = host.start_command(&["watch", "--count", "1"]);
    watching.wait_for_stderr("watching ");
    let mut one_file = host.start_command(&["watch", "data/name", "--count", "1"]);
    one_file.wait_for_stderr("watching data/name");

    let holding = host.hold(&["data/other"]);
    host.truncate("other");
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    let why = "the pin on data/other was taken back: a local process wants to change the file";
    assert!(held.stderr.contains(why), "{}", held.stderr);
    let rows = ["notice: ", "break ", "notice ", "drained ", "fenced ", "released "];
    let found: Vec<&str> = held
        .stdout
        .lines()
        .filter_map(|line| rows.into_iter().find(|row| line.starts_with(row)))
        .collect();
    assert_eq!(found, rows, "{}", held.stdout);
    let told = watching.finish();
    assert_eq!(told.code, 0, "{}", told.stderr);
    let line = format!("{}: a local process wants to change", text(&host.path("other")));
    assert!(told.stdout.starts_with(&line), "{}", told.stdout);
    assert_eq!(told.stdout.lines().count(), 1, "no picture into a pipe: {}", told.stdout);

    // The other watcher has heard of that too, and waits for its own.
    let mut holding = host.start_command(&["pin", "data/name", "--hold", "--json"]);
    let granted: Value = serde_json::from_str(&holding.wait_for_stdout("{")).unwrap();
    assert_eq!((&granted["event"], &granted["transport"]), (&"granted".into(), &"stream".into()));
    assert!(granted["no_rdma_because"].is_string(), "{granted}");
    host.truncate("name");
    let held = holding.finish();
    assert_eq!(held.code, 7);
    let events: Vec<Value> =
        held.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let kinds: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["granted", "draining", "revoked"]);
    assert_eq!(events[2]["reason"], "local_writer");
    let told = one_file.finish();
    assert_eq!(told.code, 0, "{}", told.stderr);
    assert!(told.stdout.starts_with(text(&host.path("name"))), "{}", told.stdout);
    host.assert_nothing_is_held();
}

#[test]
fn a_watch_in_json_says_all_and_ends_with_ctrl_c() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    // It says nothing before the first revocation: the session list tells that it is there.
    let mut watching = host.start_command(&["watch", "--json"]);
    let holding = host.hold(&["data/name"]);
    let mut second = host.start_command(&["watch"]);
    second.wait_for_stderr("watching ");
    host.truncate("name");
    assert_eq!(holding.finish().code, 7);
    second.wait_for_stdout(text(&host.path("name")));
    second.signal(Signal::INT);
    let told = second.finish();
    assert_eq!(told.code, 130);
    assert!(told.stderr.contains("interrupted"), "{}", told.stderr);
    // Should the first have come too late for that one, there is another.
    host.make_file("name", &pattern(4096));
    let holding = host.hold(&["data/name"]);
    host.truncate("name");
    assert_eq!(holding.finish().code, 7);
    let record: Value = serde_json::from_str(&watching.wait_for_stdout("{")).unwrap();
    assert_eq!((&record["reason"], &record["pins"]), (&"local_writer".into(), &1.into()));
    assert_eq!(record["timings"]["break_pending_at_release"], true, "{record}");
    assert!(record["unmapped_us"].is_u64(), "{record}");
}

#[test]
fn an_exclusive_pin_keeps_others_off_and_names_its_holder() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    let holding = host.hold(&["data/name", "--exclusive", "--range", "0..1M"]);
    host.assert_fails(&["pin", "data/name"], 6, &["data/name", "pinfold on ", "hint: "]);
    assert_eq!(host.run(&["pin", "data/name", "--range", "1M..2M"]).code, 0, "beside it");
    assert_eq!(host.json(&["ps"])["files"][0]["pins"][0]["exclusive"], true);
    holding.signal(Signal::INT);
    assert_eq!(holding.finish().code, 130);
    assert_eq!(host.run(&["pin", "data/name", "--exclusive"]).code, 0);
}

#[test]
fn an_exclusive_pin_can_be_stolen() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    let mut holding = host.start_command(&["pin", "data/name", "--exclusive", "--hold", "--json"]);
    let old = event(&mut holding);
    host.assert_fails(&["pin", "data/name", "--exclusive"], 6, &["data/name", "pinfold on "]);
    host.assert_fails(&["pin", "data/name", "--steal"], 2, &["--exclusive"]);
    let mut stealing =
        host.start_command(&["pin", "data/name", "--exclusive", "--steal", "--hold", "--json"]);
    let new = event(&mut stealing);
    let counter = |grant: &Value| -> u64 {
        grant["generation"].as_str().unwrap().rsplit('.').next().unwrap().parse().unwrap()
    };
    assert!(counter(&new) > counter(&old), "{new} after {old}");
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    let why = "the pin on data/name was taken back: another client has stolen the file";
    assert!(held.stderr.contains(why), "{}", held.stderr);
    stealing.signal(Signal::INT);
    assert_eq!(stealing.finish().code, 130);
    host.assert_nothing_is_held();
}

#[test]
fn what_is_refused_has_its_exit_code_and_its_words() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    fs::create_dir(host.path("folder")).unwrap();
    std::os::unix::fs::symlink("name", host.path("link")).unwrap();
    let from = host.path("name");
    for (args, code, word) in [
        (&["stat", "nothing/name"] as &[&str], 4, "nothing"),
        (&["stat", "data/none"], 4, "data/none"),
        (&["ls", "data/none"], 4, "none"),
        (&["ls", "nothing"], 4, "nothing"),
        (&["watch", "data/none"], 4, "data/none"),
        (&["pin", "data/folder"], 5, "folder"),
        (&["pin", "data/link"], 5, "link"),
        (&["pin", "data/../name"], 5, "../name"),
        (&["pin", "data/name", "--range", "7..7"], 5, "7..7"),
        (&["pin", "data/name", "--range", "0..1M"], 5, "1048576"),
        (&["get", "data/folder", "-"], 5, "folder"),
        (&["put", text(&from), "data/folder"], 5, "folder"),
        (&["rm", "data/folder"], 5, "folder"),
        (&["--rdma-device", "nosuchdevice9", "pin", "data/name"], 8, "nosuchdevice9"),
    ] {
        host.assert_fails(args, code, &[word]);
    }
    let opened = fs::File::options().append(true).open(host.path("name")).unwrap();
    host.assert_fails(&["pin", "data/name"], 6, &["data/name", "hint: "]);
    drop(opened);
    assert_eq!(host.run(&["pin", "data/name"]).code, 0);
    host.assert_nothing_is_held();
}

/// The next line of a command that prints JSON.
fn event(running: &mut Running) -> Value {
    serde_json::from_str(&running.wait_for_stdout("{")).unwrap()
}

#[test]
fn a_kept_pin_outlives_a_local_opener_and_a_server() {
    let mut host = Host::start();
    host.make_file("name", &pattern(ODD));
    let mut keeping =
        host.start_command(&["pin", "data/name", "--range", "..4K", "--keep", "--json"]);
    let granted = event(&mut keeping);
    assert_eq!((&granted["event"], &granted["end"]), (&"granted".into(), &4096.into()));

    // A local process opens it for writing, and changes nothing.
    drop(fs::File::options().write(true).open(host.path("name")).unwrap());
    let mut events = Vec::new();
    while events.last().is_none_or(|last: &Value| last["event"] != "granted") {
        events.push(event(&mut keeping));
    }
    let kinds: Vec<_> = events.iter().map(|event| event["event"].as_str().unwrap()).collect();
    // The notice is told if the end did not come first.
    assert!(kinds.ends_with(&["revoked", "kept", "granted"]), "{kinds:?}");
    let revoked = &events[events.len() - 3];
    assert_eq!(
        (&revoked["reason"], &revoked["generation"]),
        (&"local_writer".into(), &granted["generation"])
    );
    let kept = &events[events.len() - 2];
    assert_eq!(kept["generation"], granted["generation"]);
    assert_eq!(kept["new_generation"], events[events.len() - 1]["generation"]);
    assert!(kept["attempts"].as_u64().unwrap() >= 1, "{kept}");

    host.kill_and_serve_again();
    let [lost, kept, granted] = [(); 3].map(|()| event(&mut keeping));
    assert_eq!((&lost["event"], &kept["event"]), (&"lost".into(), &"kept".into()), "{lost} {kept}");
    assert_eq!((&granted["event"], &granted["end"]), (&"granted".into(), &4096.into()));
    assert_eq!(kept["new_generation"], granted["generation"]);
    let ps = host.json(&["ps"]);
    assert_eq!(ps["files"][0]["pins"].as_array().unwrap().len(), 1, "{ps}");

    keeping.signal(Signal::INT);
    let kept = keeping.finish();
    assert_eq!(kept.code, 130, "{}", kept.stderr);
    assert_eq!(kept.stderr, "pinfold: interrupted; the pin is given back\n");
    host.assert_nothing_is_held();
}

#[test]
fn a_kept_pin_ends_with_its_file() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    let mut keeping = host.start_command(&["pin", "data/name", "--keep"]);
    keeping.wait_for_stdout("keeping the pin");
    host.truncate("name");
    let kept = keeping.finish();
    assert_eq!(kept.code, 7, "{}", kept.stderr);
    assert!(kept.stderr.contains("data/name is not the file that was pinned"), "{}", kept.stderr);
    assert!(kept.stdout.contains("released "), "the picture: {}", kept.stdout);

    let mut keeping = host.start_command(&["pin", "data/other", "--keep"]);
    assert_eq!(keeping.end().code, 4, "the first attempt is made once");
    host.make_file("name", &pattern(ODD));
    let mut keeping = host.start_command(&["pin", "data/name", "--keep"]);
    keeping.wait_for_stdout("keeping the pin");
    assert_eq!(host.json(&["rm", "data/name", "--revoke"])["revoked_pins"], 1);
    let kept = keeping.finish();
    assert_eq!(kept.code, 4, "{}", kept.stderr);
    assert!(kept.stderr.contains("could not be had again"), "{}", kept.stderr);
    host.assert_nothing_is_held();
    host.assert_fails(&["pin", "data/name", "--keep", "--hold"], 2, &["--keep"]);
}

#[test]
fn an_operator_revokes_the_pins_of_a_file() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    host.make_file("other", &pattern(4096));
    let holding = host.hold(&["data/name"]);
    let mut beside = host.start_command(&["pin", "data/other", "--hold", "--json"]);
    event(&mut beside);
    let mut watching = host.start_command(&["watch", "data/name", "--count", "1"]);
    watching.wait_for_stderr("watching data/name");
    let revoked = host.json(&["revoke", "data/name"]);
    assert_eq!((&revoked["file"], &revoked["revoked_pins"]), (&"data/name".into(), &1.into()));
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    let why = "the pin on data/name was taken back: revoked by an operator";
    assert!(held.stderr.contains(why), "{}", held.stderr);
    assert!(held.stdout.contains("an operator asked for it"), "{}", held.stdout);
    let told = watching.finish();
    let line = format!("{}: revoked by an operator", text(&host.path("name")));
    assert!(told.stdout.starts_with(&line), "{}", told.stdout);
    assert_eq!(host.json(&["stat", "data/other"])["pins"], 1, "the other file is left alone");
    assert_eq!(host.run(&["revoke", "data/name"]).stdout, "data/name: it had no pins\n");
    assert_eq!(host.run(&["pin", "data/name"]).code, 0, "it can be pinned again");
    host.assert_fails(&["revoke", "data/none"], 4, &["data/none"]);
    host.assert_fails(&["revoke", "data"], 2, &["EXPORT/PATH"]);
}

#[test]
fn a_quiesced_export_is_let_go_and_refused_until_it_is_resumed() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    host.make_file("busy", &pattern(4096));
    let holding = host.hold(&["data/name"]);
    let mut keeping = host.start_command(&["pin", "data/name", "--keep", "--json"]);
    assert_eq!(event(&mut keeping)["event"], "granted");
    // One waits for a file that is open elsewhere, so the server has it open too.
    let opened = fs::File::open(host.path("busy")).unwrap();
    let mut waiting = host.start_command(&["pin", "data/busy", "--wait", "600", "--json"]);
    until("the pin waits", || host.open_files().contains(&host.path("busy")));
    let quieted = host.json(&["quiesce", "data"]);
    assert_eq!((&quieted["revoked_pins"], &quieted["beside"]), (&2.into(), &Value::from([(); 0])));
    assert_eq!(host.open_files(), Vec::<PathBuf>::new(), "not even the folder");
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    assert!(held.stderr.contains("an operator quiesces the export"), "{}", held.stderr);

    let from = host.path("name");
    let to = host.path("copy");
    for args in [
        &["pin", "data/name"] as &[&str],
        &["stat", "data/name"],
        &["ls", "data"],
        &["put", text(&from), "data/new"],
        &["get", "data/name", text(&to)],
        &["rm", "data/name", "--revoke"],
        &["grow", "data/name", "8K"],
        &["shrink", "data/name", "1"],
        &["revoke", "data/name"],
        &["pin", "data/name", "--wait", "1"],
    ] {
        let says =
            ["export data has been quiesced for ", "by pinfold on ", "`pinfold resume data`"];
        host.assert_fails(args, 6, &says);
    }
    let listed = host.json(&["ls"]);
    assert_eq!(listed["entries"][0]["quiesced"]["complete"], true, "{listed}");
    let ps = host.run(&["ps"]).stdout;
    assert!(ps.contains("\nexport data: quiesced for "), "{ps}");
    assert_eq!(host.json(&["quiesce", "data"])["revoked_pins"], 0, "once more is no error");
    assert_eq!(host.open_files(), Vec::<PathBuf>::new());

    drop(opened);
    assert_eq!(host.json(&["resume", "data"])["was_quiesced"], true);
    assert_eq!(host.json(&["resume", "data"])["was_quiesced"], false);
    assert_eq!(event(&mut waiting)["event"], "granted", "it waited for that too");
    assert_eq!(waiting.finish().code, 0);
    let mut kinds = Vec::new();
    while kinds.last().is_none_or(|kind| kind != "granted") {
        let told = event(&mut keeping);
        if told["event"] == "revoked" {
            assert_eq!(told["reason"], "quiesce");
        }
        kinds.push(told["event"].as_str().unwrap().to_owned());
    }
    assert!(kinds.ends_with(&["revoked", "kept", "granted"].map(str::to_owned)), "{kinds:?}");
    keeping.signal(Signal::INT);
    assert_eq!(keeping.finish().code, 130);
    assert_eq!(host.json(&["ls"])["entries"][0]["quiesced"], Value::Null);
    for verb in ["quiesce", "resume"] {
        host.assert_fails(&[verb, "nothing"], 4, &["nothing", "this server exports data"]);
    }
    host.assert_nothing_is_held();
}

#[test]
fn a_resume_ends_a_quiesce_that_waits_for_a_client() {
    let host = Host::start();
    host.make_file("name", &pattern(4096));
    let holding = host.hold(&["data/name"]);
    holding.stop();
    let quiescing = host.start_command(&["quiesce", "data"]);
    let quiesced = || host.json(&["ls"])["entries"][0]["quiesced"].clone();
    until("it is quiesced", || quiesced() != Value::Null);
    assert_eq!(quiesced()["complete"], false, "the client can't have drained");
    assert_eq!(host.json(&["resume", "data"])["was_quiesced"], true);
    let overtaken = quiescing.finish();
    assert_eq!((overtaken.code, &*overtaken.stdout), (6, ""), "{overtaken:?}");
    let says = "was resumed before all of it was let go; quiesce it again";
    assert!(overtaken.stderr.contains(says), "{overtaken:?}");

    assert_eq!(quiesced(), Value::Null, "the later command counts");
    host.json(&["stat", "data/name"]);
    // What had begun goes to its end: the pin that was to be drained is gone, and the next one stays.
    let mut next = host.start_command(&["pin", "data/name", "--wait", "600", "--hold"]);
    holding.signal(Signal::CONT);
    let revoked = holding.finish();
    assert_eq!(revoked.code, 7, "{revoked:?}");
    assert!(revoked.stderr.contains("an operator quiesces the export"), "{revoked:?}");
    next.wait_for_stdout("holding the pin");
    next.signal(Signal::INT);
    assert_eq!(next.finish().code, 130);
    host.assert_nothing_is_held();
    assert_eq!(host.json(&["quiesce", "data"])["revoked_pins"], 0);
    assert_eq!(host.open_files(), Vec::<PathBuf>::new(), "not even the folder");
}

#[test]
fn put_waits_until_the_file_is_closed_and_the_export_is_resumed() {
    let host = Host::start();
    let bytes = pattern(ODD);
    let local = host.folder.path().with_extension("local");
    fs::write(&local, &bytes).unwrap();
    // With bytes of another number, and with none: such a file can't be pinned.
    for (name, before) in [("longer", 5000), ("empty", 0)] {
        host.make_file(name, &pattern(before));
        let (path, remote) = (host.path(name), format!("data/{name}"));
        let opened = fs::File::open(&path).unwrap();
        let put = ["put", text(&local), &remote];
        host.assert_fails(&put, 6, &["is in use by"]);
        host.assert_fails(&[&put[..], &["--wait", "1"]].concat(), 6, &["is in use by"]);
        let waiting = host.start_command(&[&put[..], &["--wait", "600"]].concat());
        until("the put waits", || host.open_files().contains(&path));
        drop(opened);
        let done = waiting.finish();
        assert_eq!(done.code, 0, "{}", done.stderr);
        assert!(fs::read(&path).unwrap() == bytes, "{name}");
    }
    host.json(&["quiesce", "data"]);
    let waiting = host.start_command(&["put", text(&local), "data/new", "--wait", "600"]);
    until("the put has come", || host.json(&["ps"])["sessions"].as_array().unwrap().len() > 1);
    host.json(&["resume", "data"]);
    let done = waiting.finish();
    assert_eq!(done.code, 0, "{}", done.stderr);
    assert!(fs::read(host.path("new")).unwrap() == bytes);
    fs::remove_file(local).unwrap();
    host.assert_nothing_is_held();
}

#[test]
fn an_export_is_resumed_only_as_the_folder_that_it_was() {
    let host = Host::start();
    fs::create_dir(host.path("inner")).unwrap();
    host.json(&["quiesce", "data"]);
    let away = host.folder.path().with_extension("away");
    fs::rename(host.folder.path(), &away).unwrap();
    host.assert_fails(&["resume", "data"], 4, &[text(host.folder.path())]);
    fs::create_dir(host.folder.path()).unwrap();
    host.assert_fails(
        &["resume", "data"],
        7,
        &["not the directory or device that export data was"],
    );
    fs::remove_dir(host.folder.path()).unwrap();
    fs::rename(&away, host.folder.path()).unwrap();
    // While it is quiesced another server may have it.
    let state = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (other, url) = Host::serve(host.folder.path(), state.path(), "0");
    host.assert_fails(&["resume", "data"], 6, &["only one program may serve an export"]);
    drop(Host { folder: tempfile::tempdir().unwrap(), state, url, server: other });
    assert_eq!(host.json(&["resume", "data"])["was_quiesced"], true);
    assert_eq!(host.run(&["ls", "data"]).stdout, "inner/\n");
}
