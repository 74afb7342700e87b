//! One call fails while a server starts, or while it goes down: it serves as far as it can, or ends and
//! says why, and nothing is left behind.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pinfold_client::{ConnectOptions, PinRequest, RdmaDevice, Session};
use pinfold_lab::torture::leaks::rdma;
use pinfold_lab::{Daemon, EXPORT, FileSystem, Finished, Pattern, device_name, eventually};
use pinfold_leases::fault::{AT_START, Control, VARIABLE, told_in};
use pinfold_verbs::with_causes;
use serde_json::Value;
use tempfile::TempDir;

use super::{LEN, PAGE};

/// The export whose files are sealed while they are pinned.
const SEALED: &str = "sealed";

/// What fails when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    at_start: bool,
    seam: &'static str,
}

impl Run {
    /// By its word.
    pub(super) fn of(word: &str) -> Option<Self> {
        match word {
            "start-leases" => Some(Self { at_start: true, seam: "leases" }),
            "end-leases" => Some(Self { at_start: false, seam: "leases" }),
            "end-verbs" => Some(Self { at_start: false, seam: "verbs" }),
            _ => None,
        }
    }

    /// Calls without which the run has shown nothing.
    fn wanted(self) -> &'static [&'static str] {
        match (self.at_start, self.seam) {
            (true, _) => &["open", "statx", "flock"],
            (false, "leases") => &["mprotect", "munmap", "FS_IOC_SETFLAGS"],
            (false, _) => &["ibv_dereg_mr", "ibv_destroy_qp", "ibv_dealloc_pd"],
        }
    }
}

/// Two folders to serve, one file in each.
struct Place {
    plain: TempDir,
    sealed: TempDir,
}

/// Makes one call after the other fail.
pub(super) async fn run(file_system: FileSystem, run: Run) {
    let folder = || tempfile::tempdir_in(file_system.mount_point()).unwrap();
    let place = Place { plain: folder(), sealed: folder() };
    let (before, began) = (rdma(), Instant::now());
    let mut made = BTreeMap::<String, u32>::new();
    for n in 1.. {
        place.make_files();
        let failed = match run.at_start {
            true => place.fails_at_start(n).await,
            false => place.fails_at_the_end(run.seam, n).await,
        };
        let about = format!("call {n}, {failed:?}");
        println!("faults: {about}, after {:?}", began.elapsed());
        eventually(&format!("as before {about}"), async || rdma() == before).await;
        place.is_free(&about);
        let Some(call) = failed else { break };
        *made.entry(call).or_default() += 1;
    }
    let calls = made.values().sum::<u32>();
    println!("faults: {run:?}: {calls} calls in {:?}: {made:?}", began.elapsed());
    for call in run.wanted() {
        assert!(made.contains_key(*call), "{call} was never made");
    }
}

impl Place {
    fn make_files(&self) {
        for folder in [&self.plain, &self.sealed] {
            std::fs::write(folder.path().join("file"), Pattern(1).bytes(0, LEN as usize)).unwrap();
        }
    }

    /// Where a server takes orders about its seams.
    fn socket(&self) -> PathBuf {
        self.plain.path().with_extension("faults")
    }

    /// A server with this at [`AT_START`].
    fn serve(&self, device: &str, at_start: &str) -> Result<Daemon, Finished> {
        let socket = self.socket();
        // Of the one before.
        let _ = std::fs::remove_file(&socket);
        let socket = format!("{VARIABLE}={}", socket.display());
        let at_start = format!("{AT_START}={at_start}");
        let sealed = format!("{SEALED}={},on_truncate=deny", self.sealed.path().display());
        let arguments = ["--rdma-device", device, "--export", &sealed];
        let prefix = ["env", &socket, &at_start];
        Daemon::try_start_as(&prefix, &[(EXPORT, self.plain.path())], &arguments)
    }

    /// Gives the call that failed, if so many were made.
    async fn fails_at_start(&self, n: u64) -> Option<String> {
        // Without a device the start makes no other calls of `leases`, and takes no seconds.
        let mut daemon = match self.serve("none", &format!("leases {n}")) {
            Ok(daemon) => daemon,
            Err(ended) => return Some(self.check_that_it_says_why(&ended)),
        };
        // Whatever comes from here on is no part of the start.
        let failed = Control::connect_to(&self.socket()).unwrap().disarm("leases").unwrap();
        let session = Session::connect(ConnectOptions::new(&daemon.url)).await.unwrap();
        for export in [EXPORT, SEALED] {
            let pin = session.pin(PinRequest::read_write(export, "file")).await.unwrap();
            let mut buffer = session.buffer(PAGE).await.unwrap();
            Pattern(2).fill(0, buffer.as_mut_slice());
            pin.write(0, buffer, PAGE).await.unwrap();
            pin.commit().await.unwrap();
            pin.unpin().await.unwrap();
        }
        session.close().await;
        assert!(daemon.terminate().success());
        for folder in [&self.plain, &self.sealed] {
            Pattern(2).check(
                0,
                &std::fs::read(folder.path().join("file")).unwrap()[..PAGE],
                "written",
            );
        }
        assert_eq!(told_of(&mut daemon), failed);
        failed
    }

    fn check_that_it_says_why(&self, ended: &Finished) -> String {
        let Finished { code, stdout, stderr } = ended;
        assert_eq!(stdout, "", "it has not listened");
        let failed =
            stderr.lines().find_map(told_in).expect("no call failed, and it did not start");
        let last = stderr.lines().last().unwrap_or_default();
        assert!([1, 6].contains(code) && last.starts_with("pinfoldd: "), "{code}: {stderr}");
        let path = |folder: &TempDir| folder.path().to_str().unwrap().to_owned();
        let names = [path(&self.plain), path(&self.sealed)];
        let is_named = names.iter().any(|name| last.contains(name));
        assert!(is_named, "no file is named after {failed}: {last}");
        failed.to_owned()
    }

    async fn fails_at_the_end(&self, seam: &str, n: u64) -> Option<String> {
        let mut daemon = self.serve(&device_name(), "").unwrap();
        let options = ConnectOptions::new(&daemon.url);
        let session = Session::connect(options.rdma_device(RdmaDevice::Named(device_name())));
        let session = session.await.unwrap();
        // One file, so that the calls come in the same order in each run.
        let export = if seam == "verbs" { EXPORT } else { SEALED };
        let pin = session.pin(PinRequest::read_write(export, "file")).await.unwrap();
        assert!(!pin.grant().segments.is_empty(), "{:?}", pin.grant());
        Control::connect_to(&self.socket()).unwrap().arm(seam, n).unwrap();
        daemon.ask_to_go();
        eventually("it has ended", async || daemon.ended().is_some()).await;
        let status = daemon.ended().unwrap();
        drop(pin);
        session.close().await;
        let failed = told_of(&mut daemon);
        assert!(status.success(), "{status} after call {n}, {failed:?}");
        failed
    }

    /// Nobody has the files any more, and nobody is kept from them.
    fn is_free(&self, about: &str) {
        for folder in [&self.plain, &self.sealed] {
            self.can_be_cut(&folder.path().join("file"), about);
        }
    }

    fn can_be_cut(&self, file: &Path, about: &str) {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        assert!(!locks.contains("LEASE") && !locks.contains("DELEG"), "{about}: {locks}");
        let open = File::options().write(true).open(file);
        let cut = open.and_then(|file| file.set_len(1)).map_err(|error| with_causes(&error));
        assert_eq!(cut, Ok(()), "{} after {about}", file.display());
    }
}

/// Which call failed, by what the server said before it ended.
fn told_of(daemon: &mut Daemon) -> Option<String> {
    let said = daemon.last_words();
    let text = |line: &Value| line.as_str().map_or_else(|| line.to_string(), str::to_owned);
    let lines: Vec<_> = said.iter().map(|(_, line)| text(line)).collect();
    let panicked = lines.iter().find(|line| line.contains("panicked"));
    assert!(panicked.is_none(), "{panicked:?}");
    lines.iter().find_map(|line| told_in(line)).map(str::to_owned)
}
