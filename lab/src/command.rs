//! The command `pinfold` as a process, as people and scripts use it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{Lab, device_name, tool};

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
        let mut command = Command::new(tool("pinfold"));
        command.args(["--server", &self.daemon.url, "--rdma-device", &device_name()]);
        command.args(arguments).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Running { child, stdout }
    }
}

impl Running {
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
