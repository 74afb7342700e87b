//! The command `pinfold` as a process, as people and scripts use it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::process::{memlock_prefix, prefixed};
use crate::{Daemon, Lab, device_name, tool};

/// What a command that has ended leaves.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it said about failures.
    pub stderr: String,
}

/// A command at work; killed if it is dropped before its end.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Lab {
    /// Runs `pinfold` against this lab's daemon, to its end.
    pub async fn pinfold(&self, arguments: &[&str]) -> Finished {
        self.start_pinfold(arguments).finish().await
    }

    /// Starts `pinfold` against this lab's daemon.
    pub fn start_pinfold(&self, arguments: &[&str]) -> Running {
        Running::pinfold(&self.daemon.url, &[], &device_name(), arguments)
    }

    /// Runs `pinfold` where it may lock only so many bytes of memory.
    pub async fn pinfold_with_memlock(&self, bytes: usize, arguments: &[&str]) -> Finished {
        let prefix = memlock_prefix(bytes);
        let prefix: Vec<&str> = prefix.iter().map(String::as_str).collect();
        Running::pinfold(&self.daemon.url, &prefix, &device_name(), arguments).finish().await
    }
}

impl Daemon {
    /// Runs `pinfold` against this daemon with a device of the client's, to its end.
    pub async fn pinfold(&self, device: &str, arguments: &[&str]) -> Finished {
        Running::pinfold(&self.url, &[], device, arguments).finish().await
    }
}

/// Runs `pinfoldd doctor`, started by another command, to its end.
pub fn doctor(prefix: &[&str], arguments: &[&str]) -> Finished {
    let mut command = prefixed(prefix, &tool("pinfoldd"));
    let output = command.arg("doctor").args(arguments).output().unwrap();
    let code = output.status.code().unwrap_or_else(|| panic!("it died: {}", output.status));
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Finished { code, stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// What a doctor's report says about a subject's check.
pub fn finding<'a>(report: &'a Value, subject: &str, check: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    let found = findings.iter().find(|f| f["subject"] == subject && f["check"] == check);
    found.unwrap_or_else(|| panic!("no {check} of {subject} in {report:#}"))
}

impl Running {
    fn pinfold(url: &str, prefix: &[&str], device: &str, arguments: &[&str]) -> Self {
        let mut command = prefixed(prefix, &tool("pinfold"));
        command.args(["--server", url, "--rdma-device", device]);
        command.args(arguments);
        Self::start(command)
    }

    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout }
    }

    /// Starts a client that writes to a file until it can't (`src/bin/writer.rs`); device `none`: by the
    /// stream path.
    pub fn writer(url: &str, device: &str, file: &str) -> Self {
        let mut command = Command::new(tool("writer"));
        command.args([url, device, file]);
        Self::start(command)
    }

    /// Reads up to a line that starts so; gives that line.
    pub fn wait_for_line(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            let read = self.stdout.read_line(&mut line).unwrap();
            assert_ne!(read, 0, "the command ended without saying {start:?}");
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for its end.
    pub async fn finish(mut self) -> Finished {
        tokio::task::spawn_blocking(move || self.read_to_the_end()).await.unwrap()
    }

    fn read_to_the_end(&mut self) -> Finished {
        let mut from = self.child.stderr.take().unwrap();
        let stderr = std::thread::spawn(move || {
            let mut stderr = String::new();
            from.read_to_string(&mut stderr).map(|_| stderr)
        });
        let mut stdout = String::new();
        self.stdout.read_to_string(&mut stdout).unwrap();
        let stderr = stderr.join().unwrap().unwrap();
        let status = self.child.wait().unwrap();
        let code = status.code().unwrap_or_else(|| panic!("it died: {status}; {stderr}"));
        Finished { code, stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended, as it should.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
