//! Files that a test guards itself, with no daemon between it and the kernel.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use pinfold_leases::{Break, Description, Export, Located, RelativePath, Watcher};

use crate::{DEADLINE, FileSystem, tool};

/// So seldom that only signals report a break.
const NEVER: Duration = Duration::from_secs(1_000_000);

/// A folder on one of the lab's file systems, and a watcher that lives by signals alone.
#[derive(Debug)]
pub struct Bench {
    /// The folder as an export.
    pub export: Export,
    /// Hears breaks.
    pub watcher: Watcher,
    breaks: Receiver<Break>,
    folder: tempfile::TempDir,
}

impl Bench {
    /// An empty folder.
    pub fn on(file_system: FileSystem) -> Self {
        let folder = tempfile::tempdir_in(file_system.mount_point()).unwrap();
        let export = Export::open(folder.path()).unwrap();
        let (watcher, breaks) = Watcher::start_rescanning(NEVER).unwrap();
        Self { export, watcher, breaks, folder }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file as a local user would.
    pub fn make(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Finds a file without opening it.
    pub fn locate(&self, name: &str) -> Located {
        self.export.locate(&RelativePath::parse(name).unwrap()).unwrap()
    }

    /// Opens a file for guarding.
    pub fn open(&self, name: &str) -> Description {
        self.locate(name).open().unwrap()
    }

    /// The next break of all guards.
    pub fn next_break(&self) -> Break {
        self.breaks.recv_timeout(DEADLINE).expect("no break was reported")
    }

    /// Ends the watcher: what it has reported and nobody has asked for.
    pub fn rest(self) -> Vec<Break> {
        drop(self.watcher);
        self.breaks.iter().collect()
    }
}

/// `lab/src/bin/holder.rs` at work.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Holder {
    /// Starts it by a command that runs it, `["setpriv", …]` or nothing, and returns what it says
    /// first.
    pub fn start(by: &[&str], how: &str, folder: &Path, name: &str) -> (Self, String) {
        let holder = tool("holder");
        let mut words = by.iter().map(Path::new).chain([holder.as_path()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg(how).arg(folder).arg(name);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut this = Self { child, stdin, stdout };
        let line = this.line();
        (this, line)
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets the file go; says how that went.
    pub fn release(mut self) -> String {
        writeln!(self.stdin.take().unwrap()).unwrap();
        let line = self.line();
        assert!(self.child.wait().unwrap().success());
        line
    }

    /// Ends it with SIGKILL, and waits until it is gone.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// `fs.lease-break-time`, set for a test and put back after it.
#[derive(Debug)]
pub struct LeaseBreakTimeSet {
    before: String,
}

impl LeaseBreakTimeSet {
    const PATH: &str = "/proc/sys/fs/lease-break-time";

    /// Sets it, in seconds.
    pub fn to(seconds: u32) -> Self {
        let before = std::fs::read_to_string(Self::PATH).unwrap();
        let this = Self { before };
        this.change(seconds);
        this
    }

    /// Sets it to something else.
    pub fn change(&self, seconds: u32) {
        std::fs::write(Self::PATH, seconds.to_string()).unwrap();
    }
}

impl Drop for LeaseBreakTimeSet {
    fn drop(&mut self) {
        // Every other test has deadlines of its own.
        let _ = std::fs::write(Self::PATH, self.before.trim());
    }
}

/// A sysctl, set for a test and put back after it.
#[derive(Debug)]
pub struct Sysctl {
    path: String,
    before: String,
}

impl Sysctl {
    /// Sets it by its name, as in `vm.max_map_count`.
    pub fn set(name: &str, value: &str) -> Self {
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        let before = std::fs::read_to_string(&path).unwrap();
        let this = Self { path, before };
        std::fs::write(&this.path, value).unwrap();
        this
    }
}

impl Drop for Sysctl {
    fn drop(&mut self) {
        // Every other test has limits of its own.
        let _ = std::fs::write(&self.path, self.before.trim());
    }
}

/// Defines each test once for ext4 and once for XFS, both with DAX, with a [`Bench`] there.
#[macro_export]
macro_rules! on_each_bench {
    ($($(#[$about:meta])* fn $name:ident($bench:pat_param in Bench) $body:block)*) => {
        $($(#[$about])* fn $name($bench: $crate::Bench) $body)*

        mod ext4 {
            $(#[test] fn $name() { super::$name($crate::Bench::on($crate::FileSystem::Ext4)) })*
        }

        mod xfs {
            $(#[test] fn $name() { super::$name($crate::Bench::on($crate::FileSystem::Xfs)) })*
        }
    };
}
