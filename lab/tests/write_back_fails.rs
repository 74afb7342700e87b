//! A disk that does not take what the page cache writes back. The kernel says so once for each open file
//! and counts the pages as clean then, so whatever asks next is told that all is well.
#![forbid(unsafe_code)]
#![allow(clippy::single_range_in_vec_init, reason = "a fate is made of lists of ranges")]

use pinfold_client::{
    Code, ConnectOptions, Error, Event, FileChange, KeepPolicy, KeptSession, Pin, PinRequest,
    RdmaDevice, Reason, RevocationReason, Session, Transport,
};
use pinfold_lab::{
    DEADLINE, Daemon, EXPORT, Extents, FailingDisk, FileSystem, Finished, Pattern, device_name,
    in_time, next_revocation,
};

const PAGE: usize = 4096;
/// Of the file, half of which each of two clients writes.
const LEN: usize = 64 * PAGE;
const HALF: usize = LEN / 2;

/// A daemon that exports such a disk, with a file of zeroes on it.
struct Host {
    /// Before the disk that it serves from goes.
    daemon: Daemon,
    disk: FailingDisk,
    extents: Extents,
}

impl Host {
    fn start(file_system: FileSystem) -> Self {
        let disk = FailingDisk::new(file_system);
        let path = disk.path("file");
        std::fs::write(&path, [0; LEN]).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let extents = disk.extents(&path);
        let daemon = Daemon::start(&[(EXPORT, &disk.path(""))]);
        Self { daemon, disk, extents }
    }

    fn options(&self) -> ConnectOptions {
        let device = RdmaDevice::Named(device_name());
        ConnectOptions::new(&self.daemon.url).rdma_device(device)
    }

    async fn session(&self) -> Session {
        Session::connect(self.options()).await.unwrap()
    }

    async fn pinfold(&self, arguments: &[&str]) -> Finished {
        self.daemon.pinfold(&device_name(), arguments).await
    }

    fn medium(&self) -> Vec<u8> {
        self.disk.medium(&self.extents, LEN)
    }
}

fn request(transport: Transport) -> PinRequest {
    PinRequest::read_write(EXPORT, "file").transport(transport).track_writes()
}

async fn write(session: &Session, pin: &Pin, offset: usize) {
    let mut buffer = session.buffer(HALF).await.unwrap();
    Pattern(3).fill(offset as u64, buffer.as_mut_slice());
    pin.write(offset as u64, buffer, HALF).await.unwrap();
}

fn written(offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Pattern(3).fill(offset as u64, &mut bytes);
    bytes
}

/// The only answers that a commit may give once a write-back has failed.
fn assert_tells_of_it(error: &Error) {
    match error {
        Error::Refused { reason, code, .. } => {
            assert_eq!(
                (*reason, *code),
                (Some(Reason::WriteBackFailed), Code::DataLoss),
                "{error}"
            );
        }
        Error::Draining { notice, .. } => {
            assert_eq!(notice.reason, RevocationReason::WriteBackFailed, "{error}");
        }
        Error::Revoked { revocation, .. } => {
            assert_eq!(revocation.reason, RevocationReason::WriteBackFailed, "{error}");
        }
        other => panic!("{other:?}"),
    }
}

/// Two clients write to the file; the disk takes none of it.
async fn nothing_is_called_durable(host: Host, transport: Transport, in_background: bool) {
    let (one, two) = (host.session().await, host.session().await);
    let mut events = two.events();
    let first = one.pin(request(transport)).await.unwrap();
    let second = two.pin(request(transport)).await.unwrap();
    host.disk.fail_writes(&host.extents);
    write(&one, &first, 0).await;
    write(&two, &second, HALF).await;
    if in_background {
        host.disk.write_back();
    }
    let refused = first.commit().await.unwrap_err();
    println!("the first: {refused}");
    assert_eq!(refused.reason(), Some(Reason::WriteBackFailed), "{refused:?}");
    assert!(host.medium() == [0; LEN], "the disk has taken it");
    assert_tells_of_it(&first.commit().await.expect_err("the second commit says durable"));
    assert_tells_of_it(&second.commit().await.expect_err("another client's commit says durable"));
    let fate = first.write_fate().unwrap();
    assert_eq!((fate.committed, fate.acknowledged), (vec![], vec![]));
    assert_eq!(fate.unknown, [0..HALF as u64]);

    let revocation = next_revocation(&mut events).await;
    assert_eq!(revocation.reason, RevocationReason::WriteBackFailed);
    assert_eq!(second.write_fate().unwrap().unknown, [HALF as u64..LEN as u64]);
    let logged = host.daemon.logged_error("write-back failed");
    assert!(logged["error"].as_str().unwrap().contains("Input/output error"), "{logged}");

    // A new life begins, on a disk that works again.
    host.disk.heal();
    let again = one.pin(request(transport)).await.unwrap();
    let grant = again.grant();
    assert_ne!(grant.life, first.grant().life);
    write(&one, &again, 0).await;
    again.commit().await.unwrap();
    let medium = host.medium();
    assert!(medium[..HALF] == written(0, HALF), "committed, and not on the medium");
}

/// Commits of both clients at once: one of them takes the kernel's only report.
async fn of_commits_at_a_time_none_says_durable(host: Host) {
    const COMMITS: usize = 8;
    let (one, two) = (host.session().await, host.session().await);
    let pins =
        [one.pin(request(Transport::Stream)).await, two.pin(request(Transport::Stream)).await];
    let pins = pins.map(|pin| std::sync::Arc::new(pin.unwrap()));
    host.disk.fail_writes(&host.extents);
    write(&one, &pins[0], 0).await;
    write(&two, &pins[1], HALF).await;
    let mut commits = tokio::task::JoinSet::new();
    for number in 0..COMMITS {
        let pin = pins[number % 2].clone();
        commits.spawn(async move { pin.commit().await });
    }
    for refused in commits.join_all().await {
        assert_tells_of_it(&refused.expect_err("a commit says durable"));
    }
    assert!(host.medium() == [0; LEN]);
}

async fn a_growth_that_meets_the_error_does_not_hide_it(host: Host) {
    let session = host.session().await;
    let pin = session.pin(request(Transport::Stream)).await.unwrap();
    host.disk.fail_writes(&host.extents);
    write(&session, &pin, 0).await;
    host.disk.write_back();
    let refused = session.grow(EXPORT, "file", 2 * LEN as u64).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::WriteBackFailed), "{refused:?}");
    assert_tells_of_it(&pin.commit().await.expect_err("the commit says durable"));
}

async fn a_kept_pin_stops(host: Host) {
    let session = KeptSession::connect(host.options(), KeepPolicy::default()).await.unwrap();
    let pin = session.pin(request(Transport::Stream)).await.unwrap();
    host.disk.fail_writes(&host.extents);
    let mut buffer = session.buffer(HALF).await.unwrap();
    Pattern(3).fill(0, buffer.as_mut_slice());
    pin.write(0, buffer, HALF).await.unwrap();
    let refused = pin.commit().await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::WriteBackFailed), "{refused:?}");
    pin.interrupted().await;
    let stopped = pin.resume().await.unwrap_err();
    let unwritten = FileChange::NotWrittenBack;
    assert!(
        matches!(&stopped, Error::FileChanged { change, .. } if *change == unwritten),
        "{stopped:?}"
    );
    let fate = pin.interruption().unwrap().fate;
    assert_eq!((fate.acknowledged, fate.unknown), (vec![], vec![0..HALF as u64]));
    host.disk.heal();
    pin.accept_change();
    pin.resume().await.unwrap();
    pin.commit().await.unwrap();
}

/// In the page cache all looks well.
async fn a_digest_is_of_the_medium(host: Host, transport: Transport) {
    let session = host.session().await;
    let pin = session.pin(request(transport)).await.unwrap();
    host.disk.fail_writes(&host.extents);
    write(&session, &pin, 0).await;
    host.disk.write_back();
    host.disk.heal();
    assert!(host.medium() == [0; LEN]);
    assert_eq!(pin.digest(0, HALF).await.unwrap(), digest_of(&[0; HALF]));
}

fn digest_of(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

async fn a_put_that_is_resumed_ends_with_its_bytes_on_the_medium(host: Host) {
    let local = tempfile::NamedTempFile::new().unwrap();
    let wanted = written(0, LEN);
    std::fs::write(local.path(), &wanted).unwrap();
    host.disk.fail_writes(&host.extents);
    let local = local.path().to_str().unwrap();
    let put = ["--transport", "stream", "put", local, "lab/file"];
    let resumed = [&put[..], &["--resume", "--verify"]].concat();
    for arguments in [&put[..], &resumed] {
        let failed = host.pinfold(arguments).await;
        assert_eq!(failed.code, 14, "{arguments:?}: {failed:?}");
        assert!(failed.stderr.contains("hint: free space"), "{failed:?}");
    }
    assert!(host.medium() == [0; LEN]);
    host.disk.heal();
    let done = host.pinfold(&resumed).await;
    assert_eq!(done.code, 0, "{done:?}");
    assert!(done.stdout.contains("verified, durable"), "{done:?}");
    assert!(host.medium() == wanted, "{done:?}");
}

/// A thin pool that is full: ENOSPC where blocks were promised.
async fn a_disk_that_runs_full_at_write_back_is_no_other(file_system: FileSystem) {
    let disk = FailingDisk::thin(file_system);
    let path = disk.path("file");
    std::fs::File::create(&path).unwrap().set_len(LEN as u64).unwrap();
    disk.write_back();
    let daemon = Daemon::start(&[(EXPORT, &disk.path(""))]);
    let device = RdmaDevice::Named(device_name());
    let connect = || Session::connect(ConnectOptions::new(&daemon.url).rdma_device(device.clone()));
    let (one, two) = (connect().await.unwrap(), connect().await.unwrap());
    let mut events = one.events();
    let first = one.pin(request(Transport::Stream)).await.unwrap();
    let second = two.pin(request(Transport::Stream)).await.unwrap();
    disk.fill();
    write(&one, &first, 0).await;
    let refused = first.commit().await.unwrap_err();
    println!("{refused}");
    assert_eq!(refused.reason(), Some(Reason::WriteBackFailed), "{refused:?}");
    assert!(refused.to_string().contains("No space left on device"), "{refused}");
    assert_tells_of_it(&second.commit().await.expect_err("another client's commit says durable"));
    while !matches!(events.next().await, Some(Event::Revoked { .. })) {}
}

macro_rules! on_both {
    ($($name:ident: |$host:ident| $test:expr;)*) => {
        mod ext4 {
            use super::*;
            $(#[test] fn $name() {
                in_time(DEADLINE, async { let $host = Host::start(FileSystem::Ext4); $test.await });
            })*
        }

        mod xfs {
            use super::*;
            $(#[test] fn $name() {
                in_time(DEADLINE, async { let $host = Host::start(FileSystem::Xfs); $test.await });
            })*
        }
    };
}

on_both! {
    no_commit_says_durable_after_one_that_failed: |host|
        nothing_is_called_durable(host, Transport::Stream, false);
    no_commit_of_bytes_by_rdma_says_durable_after_one_that_failed: |host|
        nothing_is_called_durable(host, Transport::Rdma, false);
    no_commit_says_durable_after_write_back_failed_in_the_background: |host|
        nothing_is_called_durable(host, Transport::Stream, true);
    of_commits_at_a_time_none_says_durable: |host| super::of_commits_at_a_time_none_says_durable(host);
    a_growth_that_meets_the_error_does_not_hide_it: |host|
        super::a_growth_that_meets_the_error_does_not_hide_it(host);
    a_kept_pin_stops: |host| super::a_kept_pin_stops(host);
    a_digest_is_of_the_medium: |host|
        super::a_digest_is_of_the_medium(host, Transport::Stream);
    a_digest_of_bytes_by_rdma_is_of_the_medium: |host|
        super::a_digest_is_of_the_medium(host, Transport::Rdma);
    a_put_that_is_resumed_ends_with_its_bytes_on_the_medium: |host|
        super::a_put_that_is_resumed_ends_with_its_bytes_on_the_medium(host);
}

#[test]
fn a_full_pool_below_ext4() {
    in_time(DEADLINE, a_disk_that_runs_full_at_write_back_is_no_other(FileSystem::Ext4));
}

#[test]
fn a_full_pool_below_xfs() {
    in_time(DEADLINE, a_disk_that_runs_full_at_write_back_is_no_other(FileSystem::Xfs));
}
