//! `guard=none`: nothing holds pinned files still, and everything says so. And one server per
//! directory, whatever its policy.
#![forbid(unsafe_code)]

use std::path::Path;

use pinfold_client::{
    Code, ConnectOptions, GuardTier, PinRequest, RdmaDevice, Reason, Session, Transport,
};
use pinfold_lab::{
    Answer, Daemon, EXPORT, FileSystem, HugePages, Opener, Pattern, device_name,
    on_each_file_system_with, read_by_another_process,
};
use pinfold_leases::{Export, LockKind, RelativePath};

const PAGE: usize = 4096;
const LEN: usize = 4 * PAGE;

fn request() -> PinRequest {
    PinRequest::read_write(EXPORT, "file")
}

on_each_file_system_with! { "guard=none";
    async fn it_says_so_everywhere_and_holds_nobody_up(mut lab in Lab) {
        lab.make_file("file", LEN as u64);
        let path = lab.path("file");
        let opener = Opener::reading(&path);
        let session = lab.session().await;
        let pin = session.pin(request().transport(Transport::Rdma)).await.unwrap();
        assert_eq!(pin.grant().guard, GuardTier::Unguarded);
        assert_eq!(session.inspect().await.unwrap().files[0].guard, GuardTier::Unguarded);
        let stat = session.stat(EXPORT, "file").await.unwrap();
        assert_eq!(stat.guard, Some(GuardTier::Unguarded));
        let shown = lab.pinfold(&["pin", "lab/file"]).await;
        assert!(shown.stdout.contains("guard       unguarded"), "{}", shown.stdout);
        drop(opener);

        let mut buffer = session.buffer(LEN).await.unwrap();
        Pattern(3).fill(0, buffer.as_mut_slice());
        pin.write(0, buffer, LEN).await.unwrap();
        pin.commit().await.unwrap();
        Pattern(3).check(0, &read_by_another_process(&path), "unguarded");
        // From this thread: it would wait for itself.
        nix::unistd::truncate(&path, 10).unwrap();
        std::fs::rename(&path, lab.path("moved")).unwrap();
        pin.check().expect("nobody learns of it");
        assert!(lab.daemon.terminate().success());
        assert_eq!(lab.daemon.audit_record(&path)["guard"], "unguarded");
    }

    async fn locks_of_other_programs_are_honoured(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let other = Export::open(lab.folder()).unwrap();
        let other = other.locate(&RelativePath::parse("file").unwrap()).unwrap().open().unwrap();
        let page = PAGE as u64;
        let lock = other.lock_range(page..2 * page, LockKind::Shared).unwrap();
        let session = lab.session().await;
        let path = lab.path("file");
        let says = [path.to_str().unwrap(), "are locked by another open description", "unlock them there"];
        let (code, reason) = (Code::FailedPrecondition, Reason::RangeHeld);
        let locked = Answer { code, reason, exit: 6, says: &says };
        locked.check(session.pin(request()).await.unwrap_err());
        locked.check_command(&lab, &["pin", "lab/file"]).await;
        let beside = session.pin(request().range(0..page)).await.unwrap();
        let reading = session.pin(PinRequest::read(EXPORT, "file")).await.expect("it is shared");
        reading.unpin().await.unwrap();
        drop(lock);
        let whole = session.pin(request()).await.expect("ours lie on one description");
        assert!(other.lock_range(0..page, LockKind::Shared).is_err());
        whole.unpin().await.unwrap();
        assert!(other.lock_range(0..page, LockKind::Shared).is_err(), "the other pin has it");
        beside.unpin().await.unwrap();
        drop(other.lock_range(0..4 * page, LockKind::Exclusive).expect("unlocked with the pins"));
    }
}

#[tokio::test]
async fn hugetlbfs_is_served_by_pinned_registration() {
    const HUGE: usize = 2 << 20;
    let mounted = HugePages::mount(8);
    let path = mounted.path().join("file");
    std::fs::File::create_new(&path).unwrap().set_len(2 * HUGE as u64).unwrap();
    let daemon = Daemon::start_with_policy(&[], mounted.path(), "guard=none");
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options).await.unwrap();
    let pin = session.pin(request().transport(Transport::Rdma)).await.unwrap();
    assert_eq!((pin.grant().guard, pin.grant().dax), (GuardTier::Unguarded, false));
    let mut buffer = session.buffer(HUGE).await.unwrap();
    Pattern(5).fill(HUGE as u64, buffer.as_mut_slice());
    let (_, report) = pin.write(HUGE as u64, buffer, HUGE).await.unwrap();
    assert_eq!(report.rdma_bytes, HUGE as u64);
    let refused = session.pin(request().transport(Transport::Stream)).await.unwrap_err();
    let says = [path.to_str().unwrap(), "hugetlbfs", "use RDMA"];
    let (code, reason) = (Code::FailedPrecondition, Reason::UnsupportedFile);
    Answer { code, reason, exit: 5, says: &says }.check(refused);
    pin.unpin().await.unwrap();
    Pattern(5).check(HUGE as u64, &read_by_another_process(&path)[HUGE..], "by the CPU");
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(FileSystem::Ext4.mount_point()).unwrap();
    std::fs::create_dir(folder.path().join("inner")).unwrap();
    std::fs::write(folder.path().join("inner/file"), [0; PAGE]).unwrap();
    folder
}

fn export(name: &str, folder: &Path, policy: &str) -> String {
    format!("{name}={}{policy}", folder.display())
}

#[test]
fn a_second_server_on_a_directory_names_the_first() {
    let folder = folder();
    let none = ["--rdma-device", "none"];
    let mut first = Daemon::start_with(&[(EXPORT, folder.path())], &none);
    let refused = Daemon::refused(&[("other", folder.path())], &none);
    assert_eq!(refused.code, 6, "{}", refused.stderr);
    for words in [folder.path().to_str().unwrap(), &format!("process {}", first.pid())] {
        assert!(refused.stderr.contains(words), "{}", refused.stderr);
    }
    assert!(first.terminate().success());
    Daemon::start_with(&[("other", folder.path())], &none);
}

#[tokio::test]
async fn two_policies_never_hold_one_file() {
    let folder = folder();
    let inner = export("inner", &folder.path().join("inner"), ",guard=none");
    let exports = [(EXPORT, folder.path())];
    let daemon = Daemon::start_with(&exports, &["--rdma-device", "none", "--export", &inner]);
    let session = Session::connect(ConnectOptions::new(&daemon.url)).await.unwrap();
    let pin = session.pin(PinRequest::read_write("inner", "file")).await.unwrap();
    assert_eq!(pin.grant().guard, GuardTier::Unguarded);
    let guarded = || PinRequest::read_write(EXPORT, "inner/file");
    let refused = session.pin(guarded()).await.unwrap_err();
    let says = ["inner/file", "another export", "unguarded"];
    let (code, reason) = (Code::FailedPrecondition, Reason::FilePinned);
    Answer { code, reason, exit: 6, says: &says }.check(refused);
    pin.unpin().await.unwrap();
    assert_eq!(session.pin(guarded()).await.unwrap().grant().guard, GuardTier::Delegation);
}
