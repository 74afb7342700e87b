//! A remote write faults on a frozen file system, and holds the server's memory lock until the thaw:
//! no mprotect(2) of that process comes back, whatever it is for.
#![forbid(unsafe_code)]

use pinfold_client::{ConnectOptions, DrainPolicy, Event, PinRequest, RdmaDevice, Reason, Session};
use pinfold_lab::{
    DEADLINE, Daemon, EXPORT, FileSystem, ForeignClient, ForeignLane, Frozen, Lab,
    LeaseBreakTimeSet, Opener, SystemCall, Truncation, device_name, eventually, in_time,
    next_revocation, on_each_file_system, queue_pairs, read_by_another_process, remote_fault_hangs,
    remote_faults_that_hang, remote_slice,
};
use pinfold_proto::v1;

const PAGE: usize = 4096;
/// Clients have two seconds to drain.
const LEASE_BREAK_TIME: u32 = 6;
/// And so that the kernel's own time is far off.
const LONG_BREAK: u32 = 45;

/// Another process opens the file, which takes as long as the kernel makes it wait. That works on a
/// frozen file system.
fn reader(lab: &Lab, name: &str) -> tokio::task::JoinHandle<Opener> {
    let path = lab.path(name);
    tokio::task::spawn_blocking(move || Opener::reading(&path))
}

/// Ends of queue pairs that take requests.
fn ready() -> usize {
    queue_pairs().values().filter(|state| *state == "RTS").count()
}

async fn write_to(lab: &Lab, session: &Session, name: &str, byte: u8) {
    let pin = session.pin(PinRequest::read_write(EXPORT, name)).await.unwrap();
    let mut buffer = session.buffer(PAGE).await.unwrap();
    buffer.as_mut_slice().fill(byte);
    pin.write(0, buffer, PAGE).await.unwrap();
    pin.commit().await.unwrap();
    pin.unpin().await.unwrap();
    let content = read_by_another_process(&lab.path(name));
    assert!(content == [byte; PAGE], "what was written to {name:?}");
}

on_each_file_system! {
    async fn other_files_are_given_back_meanwhile_and_that_one_after_the_thaw(lab in Lab) {
        let _short = LeaseBreakTimeSet::to(LEASE_BREAK_TIME);
        for name in ["stuck", "other"] {
            lab.make_file(name, PAGE as u64);
        }
        let deaf = lab.options().drain_policy(DrainPolicy::Ignore).lanes(3);
        let deaf = lab.session_with(deaf).await;
        let mut told_deaf = deaf.events();
        let stuck = deaf.pin(PinRequest::read_write(EXPORT, "stuck")).await.unwrap();
        let beside = [
            deaf.pin(PinRequest::read_write(EXPORT, "stuck")).await.unwrap(),
            deaf.pin(PinRequest::read_write(EXPORT, "stuck")).await.unwrap(),
        ];
        let session = lab.session().await;
        let mut told = session.events();
        let other = session.pin(PinRequest::read_write(EXPORT, "other")).await.unwrap();
        let buffer = session.buffer(PAGE).await.unwrap();
        other.write(0, buffer, PAGE).await.unwrap();

        let connected = queue_pairs();
        assert_eq!(ready(), 8, "both ends of three lanes and of one: {connected:?}");

        let frozen = Frozen::start(lab.file_system.mount_point());
        let buffer = deaf.buffer(PAGE).await.unwrap();
        let key = remote_slice(&stuck.grant().segments[0], 0, PAGE);
        let hanging = deaf.raw_write(key, buffer);
        let breaking = async {
            eventually("a remote write hangs in a fault", async || remote_fault_hangs()).await;

            // Nobody thaws it: who wants another file gets it because we let go.
            let opened = reader(&lab, "other").await.unwrap();
            assert!(remote_fault_hangs(), "it was thawed too soon");
            let timings = next_revocation(&mut told).await.timings.unwrap();
            println!("the other file: {timings:?}");
            assert!(timings.break_pending_at_release && timings.drained.is_some());
            lab.daemon.logged_of(&lab.path("other"), "the fence hangs");
            drop(opened);

            // That file itself is beyond help until the thaw; the server says so, and goes on.
            let reader = reader(&lab, "stuck");
            assert!(matches!(told_deaf.next().await, Some(Event::Draining { .. })));
            let error = lab.daemon.logged_of(&lab.path("stuck"), "regions hang too");
            assert_eq!(error["level"], "ERROR");
            // Of its three queue pairs one hangs, and the others do not wait for that.
            eventually("all three of them take nothing more", async || ready() == 5).await;
            assert!(remote_fault_hangs() && !reader.is_finished());
            frozen.thaw();
            let opened = reader.await.unwrap();
            let timings = next_revocation(&mut told_deaf).await.timings.unwrap();
            println!("the one that is stuck: {timings:?}");
            assert_eq!(timings.drained, None);
            drop(opened);
        };
        let hanging = async {
            // It was in the kernel before the fence, and may end either way once it is thawed.
            println!("the write that hung: {}", hanging.await.unwrap().1);
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = breaking => {}
            () = hanging => unreachable!(),
        }

        let cut_off = async || queue_pairs().len() <= connected.len() - 3;
        eventually("the server has destroyed its queue pairs", cut_off).await;
        drop(beside);
        for name in ["stuck", "other"] {
            let record = lab.daemon.audit_record(&lab.path(name));
            assert_eq!(record["failed_regions"], 0, "{record}");
        }
        lab.nothing_is_held().await;
        // Its other sessions were not touched, and new ones are served.
        write_to(&lab, &session, "other", b'O').await;
        write_to(&lab, &lab.session().await, "stuck", b'S').await;
        deaf.close().await;
    }
}

/// A client that was written from the protocol alone, with a pin on a file and a connection.
struct Holder {
    client: ForeignClient,
    lane: ForeignLane,
    pin: v1::PinResponse,
}

impl Holder {
    async fn of(daemon: &Daemon, export: &str) -> Self {
        Self::of_file(daemon, export, "file").await
    }

    async fn of_file(daemon: &Daemon, export: &str, name: &str) -> Self {
        let mut client = ForeignClient::open(&daemon.url).await;
        let lane = client.connect().await;
        let export = export.to_owned();
        let request = v1::PinRequest { export, ..client.pin_request(name) };
        let pin = client.stub.pin(request).await.unwrap().into_inner();
        Self { client, lane, pin }
    }

    async fn write(&self, byte: u8) {
        let status = self.lane.write(&self.pin.segments[0], 0, &[byte; PAGE]).await;
        assert!(status.is_success(), "{status}");
    }

    fn is_connected(&self) -> bool {
        queue_pairs().contains_key(&self.lane.server_queue_pair.into())
    }
}

/// Three sessions have a pin on a file of the file system that is frozen, and a fourth has one on a
/// file of the other.
async fn the_last_rung(frozen: FileSystem, other: FileSystem) {
    let _short = LeaseBreakTimeSet::to(LEASE_BREAK_TIME);
    let folder = |at: FileSystem| {
        let folder = tempfile::tempdir_in(at.mount_point()).unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [0; PAGE]).unwrap();
        // Of a file that is not written back yet when it is mapped XFS leaves the pages writable when
        // it is frozen.
        std::fs::File::open(path).unwrap().sync_all().unwrap();
        folder
    };
    let (cold, warm) = (folder(frozen), folder(other));
    let path = cold.path().join("file");
    let daemon = Daemon::start(&[(EXPORT, cold.path()), ("warm", warm.path())]);
    let stuck = Holder::of(&daemon, EXPORT).await;
    let deaf = Holder::of(&daemon, EXPORT).await;
    let mut drained = Holder::of(&daemon, EXPORT).await;
    let apart = Holder::of(&daemon, "warm").await;
    // From here on its NIC need not fault: that would wait for the memory lock.
    apart.write(b'1').await;

    let ice = Frozen::start(frozen.mount_point());
    let (cut_off, key) = (stuck.lane.server_queue_pair, stuck.pin.segments[0]);
    let hanging = tokio::spawn(async move { stuck.lane.write(&key, 0, &[b'2'; PAGE]).await });
    eventually("a remote write hangs in a fault", async || remote_fault_hangs()).await;
    let opened = path.clone();
    let reader = tokio::task::spawn_blocking(move || Opener::reading(&opened));
    drained.client.next_draining().await;
    drained.client.say_drained(&[drained.pin.pin_id]);
    daemon.logged_of(&path, "regions hang too");
    eventually("the connections of those that have a pin are gone", async || {
        !deaf.is_connected() && !drained.is_connected()
    })
    .await;
    assert!(apart.is_connected(), "it has no pin on that file");
    apart.write(b'2').await;
    assert!(remote_fault_hangs() && !reader.is_finished(), "it was thawed too soon");
    ice.thaw();

    drop(reader.await.unwrap());
    println!("the write that hung: {}", hanging.await.unwrap());
    let is_gone = async || !queue_pairs().contains_key(&cut_off.into());
    eventually("the connection that hung is gone too", is_gone).await;
    assert_eq!(daemon.audit_record(&path)["failed_regions"], 0);
    apart.write(b'3').await;
    // Another connection, and each is as before.
    for Holder { mut client, .. } in [deaf, drained] {
        let lane = client.connect().await;
        let pin = client.pin("file").await;
        let again = Holder { client, lane, pin };
        again.write(b'4').await;
        let Holder { mut client, pin, .. } = again;
        client.commit(pin.pin_id, pin.generation).await.unwrap();
        client.unpin(pin.pin_id).await.unwrap();
    }
    assert!(read_by_another_process(&path) == [b'4'; PAGE]);
    let Holder { mut client, pin, .. } = apart;
    client.unpin(pin.pin_id).await.unwrap();
    assert!(read_by_another_process(&warm.path().join("file")) == [b'3'; PAGE]);
    for folder in [cold, warm] {
        let is_free = async || daemon.files_open_beneath(folder.path()) == 0;
        eventually("no file is open", is_free).await;
    }
}

#[test]
fn the_last_rung_takes_the_connections_of_those_that_have_the_file_and_no_other() {
    for (frozen, other) in
        [(FileSystem::Ext4, FileSystem::Xfs), (FileSystem::Xfs, FileSystem::Ext4)]
    {
        in_time(DEADLINE, the_last_rung(frozen, other));
    }
}

/// More files hang than one file system has threads to deregister with.
async fn many_hang(frozen: FileSystem, other: FileSystem) {
    /// One more than those threads.
    const STUCK: usize = 17;
    let _short = LeaseBreakTimeSet::to(LONG_BREAK);
    let folder = |at: FileSystem| tempfile::tempdir_in(at.mount_point()).unwrap();
    let (cold, warm) = (folder(frozen), folder(other));
    let make = |path: std::path::PathBuf| {
        std::fs::write(&path, [0; PAGE]).unwrap();
        std::fs::File::open(path).unwrap().sync_all().unwrap();
    };
    let name = |number: usize| format!("file{number}");
    (0..STUCK).for_each(|number| make(cold.path().join(name(number))));
    make(warm.path().join("file"));
    let daemon = Daemon::start(&[(EXPORT, cold.path()), ("warm", warm.path())]);
    let mut apart = Holder::of(&daemon, "warm").await;
    apart.write(b'1').await;
    let mut stuck = Vec::new();
    for number in 0..STUCK {
        stuck.push(Holder::of_file(&daemon, EXPORT, &name(number)).await);
    }

    let ice = Frozen::start(frozen.mount_point());
    let hanging: Vec<_> = stuck
        .into_iter()
        .map(|Holder { lane, pin, client }| {
            let key = pin.segments[0];
            tokio::spawn(async move {
                let _client = client;
                lane.write(&key, 0, &[b'2'; PAGE]).await
            })
        })
        .collect();
    let all_hang = async || remote_faults_that_hang() >= STUCK;
    eventually("each of the writes hangs in a fault", all_hang).await;
    let readers: Vec<_> = (0..STUCK)
        .map(|number| {
            let path = cold.path().join(name(number));
            tokio::task::spawn_blocking(move || Opener::reading(&path))
        })
        .collect();
    for number in 0..STUCK {
        daemon.logged_of(&cold.path().join(name(number)), "regions hang too");
    }

    let path = warm.path().join("file");
    let reader = tokio::task::spawn_blocking(move || Opener::reading(&path));
    apart.client.next_draining().await;
    apart.client.say_drained(&[apart.pin.pin_id]);
    drop(reader.await.unwrap());
    let timings = apart.client.next_revoked().await.timings.unwrap();
    println!("the file of the other file system: {timings:?}");
    assert!(timings.break_pending_at_release, "the kernel's time ran out: {timings:?}");
    assert!(remote_faults_that_hang() >= STUCK, "it was thawed too soon");
    ice.thaw();
    for reader in readers {
        drop(reader.await.unwrap());
    }
    for hanging in hanging {
        println!("a write that hung: {}", hanging.await.unwrap());
    }
}

#[test]
fn files_that_hang_use_up_the_threads_of_their_own_file_system_only() {
    in_time(DEADLINE, many_hang(FileSystem::Ext4, FileSystem::Xfs));
}

/// A sealed file on ext4 and a guarded one on XFS, of one server.
async fn a_seal_waits_for_the_thaw_alone() {
    let folder = |at: FileSystem| tempfile::tempdir_in(at.mount_point()).unwrap();
    let (sealed, other) = (folder(FileSystem::Ext4), folder(FileSystem::Xfs));
    for folder in [&sealed, &other] {
        std::fs::write(folder.path().join("file"), [0; PAGE]).unwrap();
    }
    let export = format!("sealed={},on_truncate=deny", sealed.path().display());
    let arguments = ["--rdma-device", &device_name(), "--export", &export];
    let daemon = Daemon::start_with(&[(EXPORT, other.path())], &arguments);
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options).await.unwrap();
    let mut told = session.events();
    let seal = session.pin(PinRequest::read_write("sealed", "file")).await.unwrap();
    let _pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();

    let frozen = Frozen::start(FileSystem::Ext4.mount_point());
    let unpinned = tokio::spawn(seal.unpin());
    let lifting = async || daemon.threads_in(SystemCall::Ioctl) > 0;
    eventually("the seal is being lifted", lifting).await;
    Truncation::start(other.path().join("file"), 0).done().await;
    let timings = next_revocation(&mut told).await.timings.unwrap();
    println!("{timings:?}");
    assert!(timings.break_pending_at_release, "the kernel's time ran out: {timings:?}");
    frozen.thaw();
    // It waits for as long as it is patient.
    match unpinned.await.unwrap() {
        Ok(()) => {}
        Err(error) => assert_eq!(error.reason(), Some(Reason::FileDraining), "{error}"),
    }
    let lifted = async || daemon.files_open_beneath(sealed.path()) == 0;
    eventually("the sealed file is let go", lifted).await;
    std::fs::write(sealed.path().join("file"), b"cut").unwrap();
}

#[test]
fn a_seal_that_can_not_be_lifted_keeps_no_other_file() {
    in_time(DEADLINE, a_seal_waits_for_the_thaw_alone());
}
