//! File systems on which a lease is worth nothing, or can't be had: refused before the file is
//! touched.
#![forbid(unsafe_code)]

use std::path::Path;

use pinfold_client::{Code, ConnectOptions, PinRequest, RdmaDevice, Reason, Session};
use pinfold_lab::{
    Answer, Daemon, EXPORT, FileSystem, Mounted, device_name, on_each_file_system,
    read_by_another_process,
};

const LEN: usize = 4096;

fn unsupported<'a>(says: &'a [&'a str]) -> Answer<'a> {
    let (code, reason) = (Code::FailedPrecondition, Reason::UnsupportedFile);
    Answer { code, reason, exit: 5, says }
}

/// A pin on `file` of this folder, by the library and by the command.
async fn refused(folder: &Path, file: &str, answer: Answer<'_>) {
    let daemon = Daemon::start(&[(EXPORT, folder)]);
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options).await.unwrap();
    answer.check(session.pin(PinRequest::read_write(EXPORT, file)).await.unwrap_err());
    let arguments = ["pin", &format!("{EXPORT}/{file}")];
    answer.check_finished(&daemon.pinfold(&device_name(), &arguments).await, &arguments);
    assert_eq!(daemon.files_open_beneath(folder), 0, "nothing is left open");
}

/// The file lies where a lease is worth nothing, or nobody knows.
async fn refused_on(kind: &str, folder: &Path, file: &str) {
    let path = folder.join(file);
    let says = [path.to_str().unwrap(), &format!("({kind})"), "export a directory on ext4, XFS"];
    refused(folder, file, unsupported(&says)).await;
}

#[tokio::test]
async fn an_overlay_is_refused_before_it_copies_the_file() {
    let layers = tempfile::tempdir_in(FileSystem::Ext4.mount_point()).unwrap();
    let layer = |name: &str| layers.path().join(name);
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(layer(name)).unwrap();
    }
    std::fs::write(layer("lower").join("file"), [7; LEN]).unwrap();
    let options = ["lower", "upper", "work"].map(|n| format!("{n}dir={}", layer(n).display()));
    let overlay = Mounted::new("overlay", &options.join(","));
    refused_on("overlay", overlay.path(), "file").await;
    assert!(!layer("upper").join("file").exists(), "the refused pin has copied the file");
    // One that need not be copied; whoever opens it in the upper layer would not meet a lease.
    std::fs::write(overlay.path().join("new"), [8; LEN]).unwrap();
    refused_on("overlay", overlay.path(), "new").await;
    assert_eq!(read_by_another_process(&overlay.path().join("file")), [7; LEN]);
}

#[tokio::test]
async fn ramfs_and_hugetlbfs() {
    for kind in ["ramfs", "hugetlbfs"] {
        let mounted = Mounted::new(kind, "mode=0755");
        let file = std::fs::File::create(mounted.path().join("file")).unwrap();
        file.set_len(2 << 20).unwrap();
        drop(file);
        if kind == "ramfs" {
            refused_on(kind, mounted.path(), "file").await;
            continue;
        }
        // This one can be had, by who asks for no guard by name.
        let path = mounted.path().join("file");
        let says = [path.to_str().unwrap(), "hugetlbfs", "grants no leases", "guard=none"];
        refused(mounted.path(), "file", unsupported(&says)).await;
    }
}

/// The lab's own root. It is 9p, and says that it is what it is on the other side.
#[tokio::test]
async fn one_that_is_mounted_for_reading() {
    let folder = std::env::current_dir().unwrap();
    let path = folder.join("Cargo.toml");
    let says = [path.to_str().unwrap(), "Read-only file system", "mounted for writing"];
    let (code, reason) = (Code::PermissionDenied, Reason::PermissionDenied);
    refused(&folder, "Cargo.toml", Answer { code, reason, exit: 9, says: &says }).await;
}

/// A setting of the kernel; back to what it was when dropped.
struct Setting(&'static str, String);

impl Setting {
    fn set(path: &'static str, value: &str) -> Self {
        let before = std::fs::read_to_string(path).unwrap();
        std::fs::write(path, value).unwrap();
        Self(path, before)
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        std::fs::write(self.0, &self.1).unwrap();
    }
}

on_each_file_system! {
    async fn a_kernel_that_grants_no_leases(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let session = lab.session().await;
        let off = Setting::set("/proc/sys/fs/leases-enable", "0");
        let path = lab.path("file");
        let says = [path.to_str().unwrap(), "grants no leases", "fs.leases-enable is 0"];
        unsupported(&says).check_pin(&lab, &session, "lab/file", None).await;
        lab.nothing_is_held().await;
        drop(off);
        session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap().unpin().await.unwrap();
    }
}
