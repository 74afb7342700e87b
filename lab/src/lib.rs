//! The tests that run in the lab VM, one file per hazard, and what they share.
//!
//! Everything here needs the lab's kernel, its two DAX file systems and its soft NIC:
//! `cargo xtask vm test`. What is missing is a failure, never a skip. The tests use Pinfold as its
//! users do: `pinfoldd` is a process, clients are the library or the command line, and whoever
//! truncates a file is another process than the one that guards it.
#![forbid(unsafe_code)]

mod answer;
pub mod barrier;
mod command;
pub mod crash;
mod daemon;
mod devdax;
mod failing_disk;
mod flushes;
mod foreign;
mod guarded;
pub mod hazard;
mod pattern;
mod pinned;
mod place;
mod process;
mod queue_pairs;
mod random;
mod screen;
mod story;
pub mod torture;
mod trace;
mod write_backs;

pub use answer::Answer;
pub use command::{Finished, Running, doctor, finding};
pub use daemon::{Daemon, SystemCall};
pub use devdax::DevDax;
pub use failing_disk::{Extents, FailingDisk};
pub use flushes::{Flushes, rdma_core_version};
pub use foreign::{ForeignClient, ForeignLane, reason_of};
pub use guarded::{Bench, Holder, LeaseBreakTimeSet, Sysctl};
pub use pattern::Pattern;
pub use pinned::truncate_under_pinned_registration;
pub use place::{FileSystem, Unmounted, device_name, required};
pub use process::{
    Busy, Frozen, HugePages, Mounted, Opener, Process, Truncation, read_by_another_process,
    remote_fault_hangs, remote_faults_that_hang, rewrite_by_another_process, shell, tool,
};
pub use queue_pairs::queue_pairs;
pub use random::Random;
pub use screen::{Screen, summary};
pub use story::taken_back;
pub use write_backs::WriteBacks;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pinfold_client::{
    ConnectOptions, Event, Events, RdmaDevice, RemoteSlice, Revocation, Segment, Session,
};

/// Far beyond anything that works: only a hang reaches it.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// What the lab's exports are called.
pub const EXPORT: &str = "lab";

/// A daemon that exports a folder of its own on one of the lab's file systems.
#[derive(Debug)]
pub struct Lab {
    /// The file system under test.
    pub file_system: FileSystem,
    /// The daemon.
    pub daemon: Daemon,
    folder: tempfile::TempDir,
}

impl Lab {
    /// Runs a test against a new daemon, and fails it if it hangs.
    pub fn run<F: Future<Output = ()>>(file_system: FileSystem, test: impl FnOnce(Self) -> F) {
        Self::run_long(file_system, DEADLINE, test);
    }

    /// As [`Lab::run`], on both DAX file systems at a time: for a test that mostly waits.
    pub fn run_on_both<F: Future<Output = ()>>(test: impl Fn(Self) -> F) {
        let both = [FileSystem::Ext4, FileSystem::Xfs].map(Self::start);
        in_time(DEADLINE, async {
            let [ext4, xfs] = both.map(test);
            tokio::join!(ext4, xfs);
        });
    }

    /// As [`Lab::run`], for a test that has more to do than others.
    pub fn run_long<F: Future<Output = ()>>(
        file_system: FileSystem,
        deadline: Duration,
        test: impl FnOnce(Self) -> F,
    ) {
        Self::run_in(deadline, || Self::start(file_system), test);
    }

    /// As [`Lab::run`], with an export of this policy, `guard=none` or so.
    pub fn run_with_policy<F: Future<Output = ()>>(
        file_system: FileSystem,
        policy: &str,
        test: impl FnOnce(Self) -> F,
    ) {
        let start = || {
            let folder = tempfile::tempdir_in(file_system.mount_point()).unwrap();
            let daemon = Daemon::start_with_policy(&[], folder.path(), policy);
            Self { file_system, daemon, folder }
        };
        Self::run_in(DEADLINE, start, test);
    }

    fn run_in<F: Future<Output = ()>>(
        deadline: Duration,
        start: impl FnOnce() -> Self,
        test: impl FnOnce(Self) -> F,
    ) {
        in_time(deadline, async { test(start()).await });
    }

    fn start(file_system: FileSystem) -> Self {
        let folder = tempfile::tempdir_in(file_system.mount_point()).unwrap();
        let daemon = Daemon::start(&[(EXPORT, folder.path())]);
        Self { file_system, daemon, folder }
    }

    /// Starts another daemon on the same folder; the old one must be gone.
    pub fn restart(&mut self) {
        self.daemon = Daemon::start(&[(EXPORT, self.folder.path())]);
    }

    /// As [`Lab::restart`], where a session may be silent for so many seconds only. The old one ends.
    pub fn restart_with_time_to_live(&mut self, seconds: u32) {
        assert!(self.daemon.terminate().success());
        let seconds = seconds.to_string();
        let device = daemon::server_device();
        let arguments = ["--rdma-device", &device, "--time-to-live", &seconds];
        self.daemon = Daemon::start_with(&[(EXPORT, self.folder.path())], &arguments);
    }

    /// As [`Lab::restart`], and clients find it where the old one was.
    pub fn restart_at_same_address(&mut self) {
        self.daemon = self.daemon.successor(&[(EXPORT, self.folder.path())]);
    }

    /// A file in the export.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The exported folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until the daemon has none of the export's files open or mapped: it takes down what was
    /// released in the background.
    pub async fn nothing_is_held(&self) {
        let is_free = async || self.daemon.files_open_beneath(self.folder()) == 0;
        eventually("no file of the export is open", is_free).await;
    }

    /// Connects a client.
    pub async fn session(&self) -> Session {
        self.session_with(self.options()).await
    }

    /// How clients connect here.
    pub fn options(&self) -> ConnectOptions {
        ConnectOptions::new(&self.daemon.url).rdma_device(RdmaDevice::Named(device_name()))
    }

    /// Connects a client in another way.
    pub async fn session_with(&self, options: ConnectOptions) -> Session {
        Session::connect(options).await.unwrap()
    }

    /// Makes a file of zeroes as a local user would.
    pub fn make_file(&self, name: &str, len: u64) {
        let file = std::fs::File::create(self.path(name)).unwrap();
        std::io::Write::write_all(&mut &file, &vec![0; len as usize]).unwrap();
        file.sync_all().unwrap();
    }
}

/// What a raw request needs to name `len` bytes at `offset` within a segment, or beyond it.
pub fn remote_slice(key: &Segment, offset: u64, len: usize) -> RemoteSlice {
    let address = key.remote_address + offset;
    RemoteSlice { address, key: key.remote_key.into(), len }
}

/// Waits for the notice and then for the end of a revocation.
pub async fn next_revocation(events: &mut Events) -> Revocation {
    loop {
        match events.next().await.expect("the session ended") {
            Event::Revoked { revocation, .. } => return revocation,
            Event::Draining { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Runs a test, and fails it if it hangs.
pub fn in_time(deadline: Duration, test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::time::timeout(deadline, test).await.expect("the test hangs");
    });
}

/// Asks again and again until it is so; for what no event tells.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let give_up = tokio::time::Instant::now() + DEADLINE / 2;
    while !is_so().await {
        assert!(tokio::time::Instant::now() < give_up, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// As [`on_each_file_system`], with an export of this policy.
#[macro_export]
macro_rules! on_each_file_system_with {
    ($policy:literal; $($(#[$about:meta])* async fn $name:ident($lab:pat_param in Lab) $body:block)*) => {
        $($(#[$about])* async fn $name($lab: $crate::Lab) $body)*

        mod ext4 {
            $(#[test] fn $name() {
                $crate::Lab::run_with_policy($crate::FileSystem::Ext4, $policy, super::$name)
            })*
        }

        mod xfs {
            $(#[test] fn $name() {
                $crate::Lab::run_with_policy($crate::FileSystem::Xfs, $policy, super::$name)
            })*
        }
    };
}

/// Defines each test once for ext4 and once for XFS, both with DAX.
#[macro_export]
macro_rules! on_each_file_system {
    ($($(#[$about:meta])* async fn $name:ident($lab:pat_param in Lab) $body:block)*) => {
        $($(#[$about])* async fn $name($lab: $crate::Lab) $body)*

        mod ext4 {
            $(#[test] fn $name() { $crate::Lab::run($crate::FileSystem::Ext4, super::$name) })*
        }

        mod xfs {
            $(#[test] fn $name() { $crate::Lab::run($crate::FileSystem::Xfs, super::$name) })*
        }
    };
}
