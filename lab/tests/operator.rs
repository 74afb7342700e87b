//! An operator's verbs: revoke a file's pins; quiesce an export, so that its file system can be
//! unmounted or frozen, and resume it.
#![forbid(unsafe_code)]

use std::time::Duration;

use pinfold_client::{
    Buffer, Code, CompletionStatus, ConnectOptions, Error, KeepPolicy, KeptPin, KeptSession, Pin,
    PinRequest, RdmaDevice, Reason, RevocationReason, Session, Transport,
};
use pinfold_lab::{
    Answer, DEADLINE, Daemon, EXPORT, FileSystem, Frozen, LeaseBreakTimeSet, Pattern, SystemCall,
    Truncation, device_name, eventually, in_time, next_revocation, on_each_file_system,
    read_by_another_process, remote_slice,
};

const LEN: usize = 64 << 10;
const PIECE: usize = 4096;

fn policy() -> KeepPolicy {
    KeepPolicy::new().longest_delay(Duration::from_millis(200))
}

fn request() -> PinRequest {
    PinRequest::read_write(EXPORT, "file")
}

fn quiesced<'a>(says: &'a [&'a str]) -> Answer<'a> {
    Answer { code: Code::Unavailable, reason: Reason::ExportQuiesced, exit: 6, says }
}

/// Writes one piece by RDMA.
async fn write(pin: &Pin, seed: u64, session: &Session) {
    let mut buffer = session.buffer(PIECE).await.unwrap();
    Pattern(seed).fill(0, buffer.as_mut_slice());
    let (_, report) = pin.write(0, buffer, PIECE).await.unwrap();
    assert_eq!(report.rdma_bytes, PIECE as u64);
}

async fn write_kept(pin: &KeptPin, seed: u64, mut buffer: Buffer) -> Buffer {
    Pattern(seed).fill(0, buffer.as_mut_slice());
    let (buffer, report) = pin.write(0, buffer, PIECE).await.unwrap();
    assert_eq!(report.rdma_bytes, PIECE as u64);
    pin.commit().await.unwrap();
    buffer
}

/// Has its pin taken back by a quiesce, and holds it again after the resume.
async fn comes_back(pin: &KeptPin) {
    let interruption = pin.resume().await.unwrap().expect("an interruption");
    assert!(interruption.cause.to_string().contains("quiesces"), "{interruption:?}");
    assert!(interruption.attempts > 1, "it was refused meanwhile: {interruption:?}");
}

/// Stops at the first error.
async fn write_on(pin: &Pin, session: &Session) -> Error {
    let mut buffer = session.buffer(PIECE).await.unwrap();
    loop {
        match pin.write(0, buffer, PIECE).await {
            Ok((back, _)) => buffer = back,
            Err(failed) => return failed.error,
        }
    }
}

on_each_file_system! {
    async fn a_revoked_file_is_drained_and_fenced_and_others_go_on(lab in Lab) {
        lab.make_file("file", LEN as u64);
        lab.make_file("other", LEN as u64);
        let (session, beside) = (lab.session().await, lab.session().await);
        let mut events = session.events();
        let pin = session.pin(request()).await.unwrap();
        let other = beside.pin(PinRequest::read_write(EXPORT, "other")).await.unwrap();
        let key = pin.grant().segments[0];
        let revoking = lab.pinfold(&["revoke", "lab/file", "--json"]);
        let (error, revoked) = tokio::join!(write_on(&pin, &session), revoking);
        assert!(matches!(error, Error::Draining { .. } | Error::Revoked { .. }), "{error}");
        assert!(error.to_string().contains("revoked by an operator"), "{error}");
        assert!(revoked.stdout.contains("\"revoked_pins\":1"), "{revoked:?}");
        let revocation = next_revocation(&mut events).await;
        assert_eq!(revocation.reason, RevocationReason::Operator);
        assert!(revocation.timings.unwrap().drained.is_some(), "{revocation:?}");
        let record = lab.daemon.audit_record(&lab.path("file"));
        assert_eq!((&record["reason"], &record["pins"]), (&"operator".into(), &1.into()));

        // Nobody else wants the file, so only the fence stands between the old key and it.
        let mut buffer = session.buffer(PIECE).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let (_, status) = session.raw_write(remote_slice(&key, 0, PIECE), buffer).await.unwrap();
        assert_eq!(status, CompletionStatus::RemoteAccess);
        let content = read_by_another_process(&lab.path("file"));
        assert!(content.iter().all(|byte| *byte != 0xee), "the key was dead");
        write(&other, 1, &beside).await;
        let again = session.pin(request()).await.unwrap();
        write(&again, 2, &session).await;
        again.unpin().await.unwrap();
        other.unpin().await.unwrap();
        lab.nothing_is_held().await;
    }

    async fn a_quiesced_file_system_unmounts_and_its_clients_come_back(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let session = KeptSession::connect(lab.options(), policy()).await.unwrap();
        let pin = session.pin(request()).await.unwrap();
        let buffer = session.buffer(PIECE).await.unwrap();
        let buffer = write_kept(&pin, 1, buffer).await;
        let operator = lab.session().await;
        let quieted = operator.quiesce(EXPORT).await.unwrap();
        println!("{quieted:?}");
        assert_eq!(quieted.beside, [""; 0]);
        let record = lab.daemon.audit_record(&lab.path("file"));
        assert_eq!(record["reason"], "quiesce");
        let refused = operator.pin(request()).await.unwrap_err();
        quiesced(&["export lab has been quiesced", "`pinfold resume lab`"]).check(refused);
        // Fails if a file, a mapping or the folder is open.
        let unmounted = lab.file_system.unmount("dax=always");
        let (code, reason) = (Code::NotFound, Reason::FileNotFound);
        let folder = lab.folder().to_str().unwrap();
        let gone = Answer { code, reason, exit: 4, says: &[folder] };
        gone.check(operator.resume(EXPORT).await.unwrap_err());
        unmounted.mount();
        assert!(operator.resume(EXPORT).await.unwrap());
        comes_back(&pin).await;
        write_kept(&pin, 2, buffer).await;
        pin.unpin().await.unwrap();
        Pattern(2).check(0, &read_by_another_process(&lab.path("file"))[..PIECE], "written after");
        lab.nothing_is_held().await;
    }
}

/// Freezes one file system, and works on the other one meanwhile, through the same daemon.
async fn freeze(frozen: FileSystem, other: FileSystem) {
    let (cold, warm) = (folder(frozen), folder(other));
    let exports = [("cold", cold.path()), ("warm", warm.path())];
    let daemon = Daemon::start(&exports);
    let options = || ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let kept = KeptSession::connect(options(), policy()).await.unwrap();
    let pin = kept.pin(PinRequest::read_write("cold", "file")).await.unwrap();
    let buffer = write_kept(&pin, 1, kept.buffer(PIECE).await.unwrap()).await;
    let session = Session::connect(options()).await.unwrap();
    let held = session.pin(PinRequest::read_write("warm", "file")).await.unwrap();

    assert_eq!(session.quiesce("cold").await.unwrap().revoked_pins, 1);
    let ice = Frozen::start(frozen.mount_point());
    // The pin that was there, another one, and a local process that wants the file.
    write(&held, 2, &session).await;
    held.commit().await.unwrap();
    let second = session.pin(PinRequest::read_write("warm", "file")).await.unwrap();
    write(&second, 3, &session).await;
    let mut events = session.events();
    Truncation::start(warm.path().join("file"), 10).done().await;
    let revocation = next_revocation(&mut events).await;
    assert!(revocation.timings.unwrap().break_pending_at_release, "{revocation:?}");
    let refused = session.stat("cold", "file").await.unwrap_err();
    quiesced(&["export cold has been quiesced"]).check(refused);
    let entries = session.list("", "").await.unwrap();
    let quiet: Vec<_> = entries.iter().map(|entry| entry.quiesced.is_some()).collect();
    assert_eq!(quiet, [true, false], "{entries:?}");
    ice.thaw();

    assert!(session.resume("cold").await.unwrap());
    comes_back(&pin).await;
    write_kept(&pin, 4, buffer).await;
    pin.unpin().await.unwrap();
    let content = read_by_another_process(&cold.path().join("file"));
    Pattern(4).check(0, &content[..PIECE], "written after the thaw");
    let is_free = async || daemon.files_open_beneath(cold.path()) == 0;
    eventually("no file of the export is open", is_free).await;
}

/// A daemon with a stream write that hangs inside the kernel.
struct Hung {
    daemon: Daemon,
    folder: tempfile::TempDir,
    operator: Session,
    writer: Session,
    pin: Option<Pin>,
    hanging: Option<tokio::task::JoinHandle<()>>,
}

impl Hung {
    async fn start(file_system: FileSystem) -> Self {
        let folder = folder(file_system);
        let daemon = Daemon::start(&[(EXPORT, folder.path())]);
        let options =
            || ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
        let operator = Session::connect(options()).await.unwrap();
        let writer = Session::connect(options()).await.unwrap();
        let pin = Some(writer.pin(request().transport(Transport::Stream)).await.unwrap());
        Self { daemon, folder, operator, writer, pin, hanging: None }
    }

    /// Once the file system is frozen.
    async fn write(&mut self) {
        let pin = self.pin.take().unwrap();
        let mut buffer = self.writer.buffer(PIECE).await.unwrap();
        Pattern(1).fill(0, buffer.as_mut_slice());
        // It was in the kernel before the file was let go, and may end either way once it is thawed.
        self.hanging = Some(tokio::spawn(async move { drop(pin.write(0, buffer, PIECE).await) }));
        let inside = async || self.daemon.threads_in(SystemCall::Pwrite) == 1;
        eventually("the stream write is inside the kernel", inside).await;
    }

    /// An operator has seen that it takes too long, and gives up.
    async fn quiesce_is_overtaken(&self) {
        let resuming = async {
            eventually("it is quiesced", async || {
                self.operator.list("", "").await.unwrap()[0].quiesced.is_some()
            })
            .await;
            assert!(self.operator.resume(EXPORT).await.unwrap());
        };
        let (overtaken, ()) = tokio::join!(self.operator.quiesce(EXPORT), resuming);
        let (code, says) = (Code::Aborted, ["was resumed before all of it was let go"]);
        Answer { code, ..quiesced(&says) }.check(overtaken.unwrap_err());
    }

    async fn quiesce_in_vain(&self) {
        let finished = self.daemon.pinfold(&device_name(), &["quiesce", EXPORT]).await;
        let says = [
            &format!("still open: {} (", self.folder.path().join("file").display()) as &str,
            "export lab is quiesced, but after 10 s",
            "is the file system frozen",
            "quiesce it again",
        ];
        let (code, reason) = (Code::Unavailable, Reason::FileDraining);
        let answer = Answer { code, reason, exit: 6, says: &says };
        answer.check_finished(&finished, &["quiesce"]);
        let entries = self.operator.list("", "").await.unwrap();
        let quiet = entries[0].quiesced.as_ref().expect("it stays quiesced");
        assert!(!quiet.complete, "{quiet:?}");
    }

    async fn quiesce(&self) {
        println!("{:?}", self.operator.quiesce(EXPORT).await.unwrap());
        assert_eq!(self.daemon.files_open_beneath(self.folder.path()), 0);
    }

    async fn works_on(self) {
        assert!(self.operator.resume(EXPORT).await.unwrap());
        self.hanging.unwrap().await.unwrap();
        let pin = self.operator.pin(request()).await.unwrap();
        write(&pin, 2, &self.operator).await;
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        let content = read_by_another_process(&self.folder.path().join("file"));
        Pattern(2).check(0, &content[..PIECE], "written after the thaw");
    }
}

/// On both file systems at once: a quiesce takes ten seconds to give up.
async fn quiesces_that_hang() {
    let _short = LeaseBreakTimeSet::to(1);
    let both = [FileSystem::Ext4, FileSystem::Xfs];
    let mut ext4 = Hung::start(both[0]).await;
    let mut xfs = Hung::start(both[1]).await;
    // Thawed before the daemons are ended, whatever comes.
    let frozen = both.map(|file_system| Frozen::start(file_system.mount_point()));
    ext4.write().await;
    xfs.write().await;
    ext4.quiesce_is_overtaken().await;
    tokio::join!(ext4.quiesce_in_vain(), xfs.quiesce_in_vain());
    // One operator has given up, and it is served on while it hangs; another has not.
    assert!(ext4.operator.resume(EXPORT).await.unwrap());
    ext4.operator.stat(EXPORT, "file").await.unwrap();
    tokio::join!(async { drop(frozen) }, ext4.quiesce(), xfs.quiesce());
    tokio::join!(ext4.works_on(), xfs.works_on());
}

#[test]
fn a_quiesce_that_hangs_says_on_which_file_and_can_be_taken_up_again() {
    in_time(DEADLINE, quiesces_that_hang());
}

/// The files of one export can be reached by another in which it lies: each is quiesced alone, and
/// says that the other is not.
async fn nested(file_system: FileSystem) {
    let outer = tempfile::tempdir_in(file_system.mount_point()).unwrap();
    let folder = outer.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("file"), vec![0; LEN]).unwrap();
    let daemon = Daemon::start(&[("outer", outer.path()), ("inner", &folder)]);
    let options = || ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options()).await.unwrap();
    let kept = KeptSession::connect(options(), policy()).await.unwrap();
    let by_outer = || PinRequest::read_write("outer", "folder/file");
    let by_inner = || PinRequest::read_write("inner", "file");

    // Opened by the outer one, for both.
    let first = session.pin(by_outer()).await.unwrap();
    let pin = kept.pin(by_inner()).await.unwrap();
    let buffer = write_kept(&pin, 1, kept.buffer(PIECE).await.unwrap()).await;
    let quieted = session.quiesce("outer").await.unwrap();
    assert_eq!((quieted.revoked_pins, quieted.beside), (2, vec!["inner".to_owned()]));
    assert!(matches!(first.check(), Err(Error::Draining { .. } | Error::Revoked { .. })));
    quiesced(&["export outer"]).check(session.pin(by_outer()).await.unwrap_err());
    // The inner one is served on.
    pin.resume().await.unwrap().expect("an interruption");
    let buffer = write_kept(&pin, 2, buffer).await;
    assert!(session.resume("outer").await.unwrap());
    // Opened by the inner one, for both.
    let second = session.pin(by_outer()).await.unwrap();
    let quieted = session.quiesce("inner").await.unwrap();
    assert_eq!((quieted.revoked_pins, quieted.beside), (2, vec!["outer".to_owned()]));
    assert!(matches!(second.check(), Err(Error::Draining { .. } | Error::Revoked { .. })));
    let third = session.pin(by_outer()).await.unwrap();
    write(&third, 3, &session).await;
    assert_eq!(session.quiesce("inner").await.unwrap().revoked_pins, 0, "it is quiet");
    third.check().expect("no other export's pins are taken for that");
    assert_eq!(session.quiesce("outer").await.unwrap().beside, [""; 0]);
    assert_eq!(daemon.files_open_beneath(outer.path()), 0);
    for export in ["inner", "outer"] {
        assert!(session.resume(export).await.unwrap());
    }
    comes_back(&pin).await;
    write_kept(&pin, 4, buffer).await;
    pin.unpin().await.unwrap();
    Pattern(4).check(0, &read_by_another_process(&folder.join("file"))[..PIECE], "written after");
}

#[test]
fn exports_that_lie_in_each_other_are_quiesced_one_by_one() {
    for file_system in [FileSystem::Ext4, FileSystem::Xfs] {
        in_time(DEADLINE, nested(file_system));
    }
}

fn folder(file_system: FileSystem) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(file_system.mount_point()).unwrap();
    std::fs::write(folder.path().join("file"), vec![0; LEN]).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_after_a_quiesce_holds_up_nobody() {
    for (frozen, other) in
        [(FileSystem::Ext4, FileSystem::Xfs), (FileSystem::Xfs, FileSystem::Ext4)]
    {
        tokio::time::timeout(DEADLINE, freeze(frozen, other)).await.expect("the test hangs");
    }
}
