//! The kernel's own NFS server on the same file systems, without its user space: exports are put
//! into its caches by hand (`/proc/net/rpc`), and the client is this kernel's too.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pinfold_leases::{Export, GuardTier, RelativePath};

use super::cell::{Bench, Outcome, make};
use super::place::{Place, run};
use crate::{DEADLINE, FileSystem};

/// `NFSEXP_INSECURE_PORT`, `NFSEXP_NOSUBTREECHECK`, `NFSEXP_FSID` (uapi/linux/nfsd/export.h).
const FLAGS: u32 = 0x2402;
/// `NFSEXP_CROSSMOUNT`
const CROSSES_MOUNTS: u32 = 0x4000;
/// The shortest that the server takes: until then nobody may open anything.
const GRACE_SECONDS: &str = "10";
const SERVER: &str = "/proc/fs/nfsd";

/// What an NFS client does: name of the row, thing of the breaker, note.
pub const NFS_HAZARDS: &[(&str, &str, &str)] = &[
    ("open for reading by an NFS client", "open-read", "it touches no extent"),
    ("open for writing by an NFS client", "open-write", "it touches no extent"),
    ("truncate(2) by an NFS client", "truncate", "the size changes under the guard"),
    ("unlink by an NFS client", "unlink", "the name changes, the file and its extents stay"),
    ("chmod by an NFS client", "chmod", "it changes an attribute, no extent"),
    ("open, then punch a hole by an NFS client", "open-punch", "the hole is made under the guard"),
];

/// A running server with a client on this host.
#[derive(Debug)]
pub struct Nfs {
    mount_point: tempfile::TempDir,
    base: PathBuf,
}

impl Nfs {
    /// Starts it for what is mounted below the lab's base, and waits until it serves.
    pub fn start(places: &[&Place]) -> Self {
        for module in ["nfsd", "nfs", "nfsv4"] {
            run("modprobe", &[module]);
        }
        run("mount", &["-t", "nfsd", "nfsd", SERVER]);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let expiry = (now + Duration::from_secs(100_000)).as_secs();
        let base = places[0].path().parent().unwrap().to_owned();
        tell("auth.unix.ip", &format!("nfsd 127.0.0.1 {expiry} lab"));
        export(0, &base, FLAGS | CROSSES_MOUNTS, expiry);
        for (number, place) in (1..).zip(places) {
            export(number, place.path(), FLAGS, expiry);
        }
        // Version 3 would need rpcbind.
        set("versions", "-3 +4");
        set("nfsv4gracetime", GRACE_SECONDS);
        set("portlist", "tcp 2049");
        set("threads", "4");
        let mount_point = tempfile::tempdir_in(FileSystem::Tmpfs.mount_point()).unwrap();
        let options = "addr=127.0.0.1,clientaddr=127.0.0.1,vers=4.2,sec=sys,proto=tcp,port=2049";
        let to = mount_point.path().to_str().unwrap();
        run("mount", &["-i", "-t", "nfs4", "-o", options, "127.0.0.1:/", to]);
        let nfs = Self { mount_point, base };
        for place in places {
            // The first open waits for the end of the grace period.
            let (_folder, path) = make(place.path());
            assert_eq!(fs::read(nfs.path(&path)).unwrap().len(), 64 << 10, "within {DEADLINE:?}");
        }
        nfs
    }

    /// One cell.
    pub fn run(&self, bench: &Bench, place: &Place, tier: GuardTier, thing: &str) -> Outcome {
        let (_folder, path) = make(place.path());
        bench.does_remotely(&path, tier, thing, &self.path(&path)).outcome()
    }

    /// What lies on another host can't be held still from this one: refused, with the reason.
    pub fn is_no_export(&self, place: &Place) {
        let (_folder, path) = make(place.path());
        let there = self.path(&path);
        let export = Export::open(there.parent().unwrap()).unwrap();
        let found = export.locate(&RelativePath::parse("file").unwrap()).unwrap();
        let error = found.open().and_then(|file| file.kind()).unwrap_err().to_string();
        for word in [there.to_str().unwrap(), "(NFS)", "export a directory on ext4, XFS"] {
            assert!(error.contains(word), "{word:?} is not in {error:?}");
        }
    }

    /// The client's way to a file of the server.
    fn path(&self, path: &Path) -> PathBuf {
        self.mount_point.path().join(path.strip_prefix(&self.base).unwrap())
    }
}

impl Drop for Nfs {
    fn drop(&mut self) {
        // A client that hangs keeps its mount; the guest ends soon.
        let _ = Command::new("umount").args(["-f", "-l"]).arg(self.mount_point.path()).status();
        let _ = fs::write(format!("{SERVER}/threads"), "0");
    }
}

/// Puts a folder under a number into the server's caches.
fn export(number: u8, path: &Path, flags: u32, expiry: u64) {
    let path = path.to_str().unwrap();
    tell("nfsd.export", &format!("lab {path} {expiry} {flags} 65534 65534 {number}"));
    // FSID_NUM: four bytes.
    tell("nfsd.fh", &format!("lab 1 \\x{number:02x}000000 {expiry} {path}"));
}

fn tell(cache: &str, line: &str) {
    let channel = format!("/proc/net/rpc/{cache}/channel");
    fs::write(&channel, format!("{line}\n")).unwrap_or_else(|e| panic!("{channel}: {line}: {e}"));
}

fn set(name: &str, value: &str) {
    fs::write(format!("{SERVER}/{name}"), format!("{value}\n"))
        .unwrap_or_else(|e| panic!("{name} {value}: {e}"));
}
