//! The library against the real server, on this machine's own file system and without RDMA: what
//! works on any Linux.

#[path = "../src/random.rs"]
mod random;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::Arc;

use pinfold_client::{
    Access, AllocationProgress, Buffer, ConnectOptions, Durability, EntryKind, Error, Event,
    FileState, IfExists, Pin, PinRequest, RdmaDevice, ReadReport, Reason, Revocation,
    RevocationReason, Session, Transport, WriteReport,
};
use pinfold_server::Server;
use pinfold_server::config::{Config, ExportConfig};
use random::Random;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, oneshot};
use tokio::task::JoinHandle;

/// These servers live in the test's own process, and pinfoldd never starts another one: between fork
/// and exec the child has all of its parent's files open, and a pin is refused then, rightly. So a
/// test that starts a shell runs alone.
static FORKS: RwLock<()> = RwLock::const_new(());

/// Keeps a test apart from those that start a shell, or from all others.
enum Turn {
    WithOthers { _lock: RwLockReadGuard<'static, ()> },
    Alone { _lock: RwLockWriteGuard<'static, ()> },
}

/// A server without RDMA that exports a folder as "data".
struct Host {
    turn: Turn,
    folder: TempDir,
    endpoint: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Host {
    async fn start() -> Self {
        Self::start_in(Turn::WithOthers { _lock: FORKS.read().await }).await
    }

    /// For a test that calls [`shell`](Self::shell).
    async fn start_alone() -> Self {
        Self::start_in(Turn::Alone { _lock: FORKS.write().await }).await
    }

    async fn start_in(turn: Turn) -> Self {
        // On the disk of the build, where /tmp may be memory.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let export = ExportConfig::new("data", folder.path());
        let config = Config { rdma_devices: Vec::new(), ..Config::new(vec![export]) };
        let server = Server::start(config).await.expect("a server");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(async move {
            let shutdown = async {
                // Dropped by a test that failed: then it stops as well.
                let _ = stopped.await;
            };
            server.serve(listener, shutdown).await.expect("served");
        });
        Self { turn, folder, endpoint, stop, serving }
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        self.serving.await.unwrap();
    }

    /// As a user connects who does not care for devices.
    async fn connect(&self) -> Session {
        let session = Session::connect(ConnectOptions::new(&self.endpoint)).await.unwrap();
        assert!(!session.has_rdma());
        session
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Runs a shell command in the export, as a local process that knows nothing of pins.
    fn shell(&self, command: &str) -> JoinHandle<ExitStatus> {
        assert!(matches!(self.turn, Turn::Alone { .. }), "others could be pinning");
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(command).current_dir(self.folder.path());
        tokio::task::spawn_blocking(move || shell.status().expect("a shell"))
    }
}

fn everything() -> PinRequest {
    PinRequest::read_write("data", "file")
}

async fn put(session: &Session, pin: &Pin, offset: u64, bytes: &[u8]) -> WriteReport {
    let mut buffer = session.buffer(bytes.len()).await.unwrap();
    buffer.as_mut_slice().copy_from_slice(bytes);
    pin.write(offset, buffer, bytes.len()).await.expect("written").1
}

async fn get(session: &Session, pin: &Pin, offset: u64, len: usize) -> (Vec<u8>, ReadReport) {
    let buffer = session.buffer(len).await.unwrap();
    let (buffer, report) = pin.read(offset, len, buffer).await.expect("read");
    (buffer.as_slice()[..report.stream_bytes as usize].to_vec(), report)
}

/// Commits where the medium can: memory can't.
async fn commit(pin: &Pin) {
    let outcome = pin.commit().await;
    if pin.grant().durability.contains(&Durability::Commit) {
        outcome.expect("durable");
    } else {
        assert_eq!(outcome.unwrap_err().reason(), Some(Reason::UnsupportedFile));
    }
}

fn assert_taken_back(error: &Error) {
    assert!(matches!(error, Error::Draining { .. } | Error::Revoked { .. }), "{error:?}");
}

/// Waits until the session has heard that a pin is gone.
async fn revocation(events: &mut pinfold_client::Events) -> Revocation {
    loop {
        match events.next().await.expect("the session lives") {
            Event::Revoked { revocation, .. } => return revocation,
            Event::Draining { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 31 + index / 4093) as u8).collect()
}

/// Requests that the server has not read yet look like an attack on its HTTP/2 if there are thousands, and
/// it would break the connection off.
#[tokio::test(flavor = "multi_thread")]
async fn a_digest_is_of_what_the_file_has() {
    let host = Host::start().await;
    let session = host.connect().await;
    let bytes: Vec<u8> = (0..100_000_u32).map(|at| (at * 7 + (at >> 8)) as u8).collect();
    fs::write(host.path("file"), &bytes).unwrap();
    let pin = session.pin(everything()).await.unwrap();
    for range in [0..bytes.len(), 0..1, 4095..70_001, 99_999..100_000] {
        let digest = pin.digest(range.start as u64, range.len()).await.unwrap();
        assert_eq!(digest, *blake3::hash(&bytes[range.clone()]).as_bytes(), "{range:?}");
    }
    put(&session, &pin, 5000, b"other").await;
    let digest = pin.digest(4096, 4096).await.unwrap();
    assert_ne!(
        digest,
        *blake3::hash(&bytes[4096..8192]).as_bytes(),
        "a write that returned counts"
    );
    let refused = pin.digest(1, bytes.len()).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::RangePastEnd), "{refused}");
    let refused = pin.digest(0, pin.digest_bytes_max() + 1).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::MalformedRequest), "{refused}");
    pin.unpin().await.unwrap();
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_made_once_and_beneath_the_export() {
    let host = Host::start().await;
    let session = host.connect().await;
    assert!(session.make_folder("data", "a").await.unwrap());
    assert!(session.make_folder("data", "a/b").await.unwrap());
    assert!(!session.make_folder("data", "a").await.unwrap());
    assert!(host.path("a/b").is_dir());
    fs::write(host.path("file"), b"").unwrap();
    for (path, reason) in [
        ("../out", Reason::PathOutsideExport),
        ("/out", Reason::PathOutsideExport),
        ("none/b", Reason::FileNotFound),
        ("file", Reason::FileExists),
    ] {
        let refused = session.make_folder("data", path).await.unwrap_err();
        assert_eq!(refused.reason(), Some(reason), "{path}: {refused}");
    }
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_calls_at_once_wait_for_their_turn() {
    let host = Host::start().await;
    fs::write(host.path("file"), b"some").unwrap();
    let session = Arc::new(host.connect().await);
    let stat = |session: Arc<Session>| async move { session.stat("data", "file").await };
    let calls: Vec<_> = (0..20_000).map(|_| tokio::spawn(stat(session.clone()))).collect();
    for call in calls {
        assert_eq!(call.await.unwrap().unwrap().size, 4);
    }
    host.stop().await;
}

/// What a server announces to each client before anything else (RFC 9113, 6.5 and 6.9).
#[tokio::test(flavor = "multi_thread")]
async fn a_whole_piece_fits_in_what_a_client_may_send_unasked() {
    const SETTINGS: u8 = 4;
    const WINDOW_UPDATE: u8 = 8;
    const INITIAL_WINDOW_SIZE: u16 = 4;
    const MAX_FRAME_SIZE: u16 = 5;
    const PIECE: u32 = 1 << 20;
    let host = Host::start().await;
    let address = host.endpoint.strip_prefix("http://").unwrap().to_owned();
    let told = tokio::task::spawn_blocking(move || {
        let mut connection = TcpStream::connect(address).unwrap();
        connection.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").unwrap();
        let mut told = HashMap::new();
        while !(told.contains_key("frame") && told.contains_key("connection")) {
            let mut head = [0; 9];
            connection.read_exact(&mut head).unwrap();
            let mut body = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            connection.read_exact(&mut body).unwrap();
            let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
            if head[3] == WINDOW_UPDATE {
                told.insert("connection", 65_535 + number(&body));
            }
            for setting in body.chunks_exact(6).filter(|_| head[3] == SETTINGS) {
                match u16::from_be_bytes([setting[0], setting[1]]) {
                    INITIAL_WINDOW_SIZE => {
                        told.insert("call", number(&setting[2..]));
                    }
                    MAX_FRAME_SIZE => {
                        told.insert("frame", number(&setting[2..]));
                    }
                    _ => {}
                }
            }
        }
        told
    });
    let told = told.await.unwrap();
    assert!(told["call"] > PIECE, "{told:?}");
    assert!(told["connection"] > 4 * PIECE, "{told:?}");
    assert!(told["frame"] >= PIECE / 8 && told["frame"] < PIECE, "{told:?}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_go_to_any_offset_and_come_back() {
    const LEN: usize = 3 << 20;
    let host = Host::start().await;
    let session = host.connect().await;
    session.create("data", "file", LEN as u64, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    assert!(pin.grant().segments.is_empty());
    let because = pin.grant().no_rdma_because.as_deref();
    assert!(because.is_some() && because == session.no_rdma_because(), "{because:?}");

    let mut model = vec![0; LEN];
    let bytes = pattern((2 << 20) + 17);
    for (offset, len) in [(0, 1), (100, 5000), (4095, 2), (777_777, bytes.len()), (LEN - 3, 3)] {
        let report = put(&session, &pin, offset as u64, &bytes[..len]).await;
        assert_eq!(report, WriteReport { rdma_bytes: 0, stream_bytes: len as u64 });
        model[offset..offset + len].copy_from_slice(&bytes[..len]);
    }
    let (read, report) = get(&session, &pin, 99, LEN - 99).await;
    assert_eq!(report, ReadReport { rdma_bytes: 0, stream_bytes: LEN as u64 - 99 });
    assert!(read == model[99..]);
    commit(&pin).await;
    pin.unpin().await.unwrap();
    assert!(host.bytes("file") == model);
    session.close().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_of_a_part_reaches_that_part_only() {
    let host = Host::start().await;
    let session = host.connect().await;
    session.create("data", "file", 10_000, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything().range(101..5003)).await.unwrap();
    put(&session, &pin, 101, &[1; 4902]).await;
    let buffer = session.buffer(10).await.unwrap();
    let failed = pin.write(100, buffer, 1).await.unwrap_err();
    assert!(matches!(failed.error, Error::OutsidePin { .. }), "{failed}");
    let failed = pin.read(5000, 4, failed.buffer.unwrap()).await.unwrap_err();
    assert!(matches!(failed.error, Error::OutsidePin { .. }), "{failed}");

    let reader = PinRequest::read("data", "file").transport(Transport::Stream);
    let reader = session.pin(reader).await.unwrap();
    let failed = reader.write(0, failed.buffer.unwrap(), 1).await.unwrap_err();
    assert!(matches!(failed.error, Error::ReadOnlyPin { .. }), "{failed}");
    let (read, _) = get(&session, &reader, 99, 4).await;
    assert_eq!(read, [0, 0, 1, 1]);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_truncate_during_writes_gets_through_and_the_writer_is_told() {
    const LEN: usize = 1 << 20;
    let host = Host::start_alone().await;
    let session = host.connect().await;
    let mut events = session.events();
    session.create("data", "file", LEN as u64, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    let mut records = session.watch().await.unwrap();

    let (begun, writes) = oneshot::channel();
    let buffer = session.buffer(LEN).await.unwrap();
    let writing = tokio::spawn(write_until_refused(pin, buffer, begun));
    writes.await.unwrap();
    let status = host.shell(": > file").await.unwrap();
    assert!(status.success());
    assert_eq!(host.bytes("file"), b"", "a write after the release");
    let (pin, buffer) = writing.await.unwrap();
    assert_eq!(host.bytes("file"), b"", "a write after the release");

    let revocation = revocation(&mut events).await;
    assert_eq!(revocation.generation, pin.grant().generation);
    assert_eq!(revocation.reason, RevocationReason::LocalWriter);
    assert!(revocation.timings.unwrap().break_pending_at_release);
    let failed = pin.read(0, 1, buffer).await.unwrap_err();
    assert!(matches!(failed.error, Error::Revoked { .. }), "{failed}");

    let record = records.next().await.unwrap().unwrap();
    assert_eq!(record.generation, revocation.generation);
    assert_eq!((record.reason, record.pins, record.sessions), (revocation.reason, 1, 1));
    assert_eq!(record.late_stream_writes, 0);
    assert_eq!(PathBuf::from(record.path).file_name().unwrap(), "file");
    assert!(record.unmapped >= record.timings.released);

    // A second life.
    drop(pin);
    session.create("data", "file", 5000, IfExists::Resize).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    assert_ne!(pin.grant().generation, revocation.generation);
    put(&session, &pin, 4321, b"again").await;
    commit(&pin).await;
    pin.unpin().await.unwrap();
    let bytes = host.bytes("file");
    assert_eq!((bytes.len(), &bytes[4321..4326]), (5000, b"again".as_slice()));
    host.stop().await;
}

async fn write_until_refused(
    pin: Pin,
    mut buffer: Buffer,
    begun: oneshot::Sender<()>,
) -> (Pin, Buffer) {
    let len = buffer.len();
    buffer.as_mut_slice().fill(0xee);
    let mut begun = Some(begun);
    loop {
        match pin.write(1, buffer, len - 1).await {
            Ok((back, _)) => buffer = back,
            Err(failed) => {
                assert_taken_back(&failed.error);
                return (pin, failed.buffer.expect("the buffer"));
            }
        }
        if let Some(begun) = begun.take() {
            begun.send(()).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exclusive_pin_keeps_others_off_and_names_its_holder() {
    let host = Host::start().await;
    let options = ConnectOptions::new(&host.endpoint).client_name("the holder");
    let holder = Session::connect(options).await.unwrap();
    let other = host.connect().await;
    holder.create("data", "file", 10_000, IfExists::Fail).await.unwrap();
    let exclusive = holder.pin(everything().range(0..5000).exclusive()).await.unwrap();
    let refused = other.pin(PinRequest::read("data", "file")).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::RangeHeld));
    assert!(refused.to_string().contains("the holder"), "{refused}");
    let beside = other.pin(everything().range(5000..10_000)).await.unwrap();
    exclusive.unpin().await.unwrap();
    let all = other.pin(PinRequest::read("data", "file")).await.unwrap();
    let refused = holder.pin(everything().exclusive()).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::RangeHeld));
    drop((beside, all));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_grows_under_a_pin_that_has_reserved_room() {
    let host = Host::start().await;
    let session = host.connect().await;
    session.create("data", "file", 4000, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything().reserve_end(10_000)).await.unwrap();
    assert_eq!((pin.grant().range.clone(), pin.grant().reserved_end), (0..4000, 10_000));
    let buffer = session.buffer(10).await.unwrap();
    let failed = pin.write(3999, buffer, 2).await.unwrap_err();
    assert!(matches!(failed.error, Error::OutsidePin { .. }), "{failed}");

    let refused = session.grow("data", "file", 3999).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::BadRange));
    let valid_end = session.grow("data", "file", 7001).await.unwrap();
    assert_eq!(valid_end, 7001);
    pin.check().expect("its pins stay");
    pin.extend_to(valid_end);
    assert_eq!(pin.usable(), 0..7001);
    put(&session, &pin, 3998, &pattern(3003)).await;
    let failed = pin.write(7001, failed.buffer.unwrap(), 1).await.unwrap_err();
    assert!(matches!(failed.error, Error::OutsidePin { .. }), "{failed}");
    let (read, _) = get(&session, &pin, 0, 7001).await;
    assert_eq!(read[3998..], pattern(3003));
    commit(&pin).await;
    pin.unpin().await.unwrap();
    let bytes = host.bytes("file");
    assert_eq!((bytes.len(), &bytes[3998..]), (7001, pattern(3003).as_slice()));
    host.stop().await;
}

/// Appends to a file as a program of the host does: it waits for a guard on it.
fn append(path: &Path, record: &str) {
    let mut file = fs::File::options().append(true).open(path).unwrap();
    file.write_all(record.as_bytes()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn growing_keeps_what_local_processes_append_meanwhile() {
    const ROUNDS: usize = 10;
    const GROWTH: u64 = 64 << 20;
    let host = Host::start().await;
    let session = host.connect().await;
    let (mut grown, mut stopped) = (0, 0);
    for round in 0..ROUNDS {
        let (name, record) = (format!("log{round}"), format!("<record {round}>"));
        let path = host.path(&name);
        fs::write(&path, b"").unwrap();
        let (begun, begins) = std::sync::mpsc::channel();
        let appending = tokio::task::spawn_blocking({
            let (path, record) = (path.clone(), record.clone());
            move || {
                // In the middle of the growth, or behind it if it shows no progress.
                let _ = begins.recv();
                append(&path, &record);
            }
        });
        let shown = |_| {
            let _ = begun.send(());
        };
        match session.grow_with_progress("data", &name, GROWTH, shown).await {
            Ok(_) => grown += 1,
            Err(error) if error.reason() == Some(Reason::FileDraining) => stopped += 1,
            Err(error) => panic!("{error}"),
        }
        drop(begun);
        appending.await.unwrap();
        let mut found = fs::read(&path).unwrap();
        found.retain(|byte| *byte != 0);
        assert_eq!(String::from_utf8(found).unwrap(), record);
        fs::remove_file(path).unwrap();
    }
    println!("{grown} growths beside an append, and {stopped} that stopped for it");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_appears_when_it_is_whole_and_shows_its_progress() {
    const SIZE: u64 = 768 << 20;
    let host = Host::start().await;
    let session = host.connect().await;
    let mut last = 0;
    let created = session
        .create_with_progress("data", "file", SIZE, IfExists::Fail, |progress| {
            let AllocationProgress { done_bytes, total_bytes } = progress;
            assert!(done_bytes >= last && done_bytes < SIZE && total_bytes == SIZE, "{progress:?}");
            last = done_bytes;
        })
        .await
        .unwrap();
    assert!(created.created);
    assert_eq!(fs::metadata(host.path("file")).unwrap().len(), SIZE);
    // Nobody has it open any more: it can be pinned at once.
    let pin = session.pin(everything()).await.unwrap();
    let (read, _) = get(&session, &pin, SIZE - 4096, 4096).await;
    assert_eq!(read, vec![0; 4096]);
    pin.unpin().await.unwrap();
    let taken = session.create("data", "file", 1, IfExists::Fail).await.unwrap_err();
    assert_eq!(taken.reason(), Some(Reason::FileExists));
    let end = session.grow_with_progress("data", "file", SIZE + 1, |_| {}).await.unwrap();
    assert_eq!(end, SIZE + 1);
    let names: Vec<_> = fs::read_dir(host.folder.path()).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_no_room_for_changes_nothing() {
    let host = Host::start().await;
    let session = host.connect().await;
    session.create("data", "file", 8192, IfExists::Fail).await.unwrap();
    let before = session.stat("data", "file").await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    let grow_in_vain = async || {
        let refused = session.grow("data", "file", 1 << 46).await.unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::NoSpace), "{refused}");
        let after = session.stat("data", "file").await.unwrap();
        assert_eq!((after.size, after.allocated), (before.size, before.allocated));
    };
    grow_in_vain().await;
    pin.unpin().await.unwrap();
    grow_in_vain().await;
    let refused = session.create("data", "new", 1 << 46, IfExists::Fail).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::NoSpace), "{refused}");
    assert!(!host.path("new").exists());
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shrink_takes_all_pins_back_first() {
    let host = Host::start().await;
    let (one, two) = (host.connect().await, host.connect().await);
    let mut events = two.events();
    one.create("data", "file", 10_000, IfExists::Fail).await.unwrap();
    let mine = one.pin(everything()).await.unwrap();
    let theirs = two.pin(everything().range(5..6)).await.unwrap();
    put(&one, &mine, 0, &pattern(10_000)).await;
    let refused = one.shrink("data", "file", 10_001).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::BadRange));
    assert_eq!(one.shrink("data", "file", 123).await.unwrap(), 2);
    assert_taken_back(&mine.check().unwrap_err());
    assert_eq!(revocation(&mut events).await.reason, RevocationReason::Shrink);
    assert!(matches!(theirs.check(), Err(Error::Revoked { .. })));

    let pin = two.pin(everything()).await.unwrap();
    assert_eq!(pin.grant().range, 0..123);
    assert_eq!(get(&two, &pin, 0, 123).await.0, pattern(123));
    pin.unpin().await.unwrap();
    assert_eq!(host.bytes("file"), pattern(123));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_file_is_removed_only_if_asked_in_so_many_words() {
    let host = Host::start().await;
    let session = host.connect().await;
    let mut events = session.events();
    session.create("data", "file", 100, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    let refused = session.remove("data", "file", false).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::FilePinned));
    pin.check().unwrap();
    assert_eq!(session.remove("data", "file", true).await.unwrap(), 1);
    assert_eq!(revocation(&mut events).await.reason, RevocationReason::Remove);
    assert!(!host.path("file").exists());
    let refused = session.stat("data", "file").await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::FileNotFound));

    session.create("data", "file", 100, IfExists::Fail).await.unwrap();
    assert_eq!(session.remove("data", "file", false).await.unwrap(), 0);
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_is_listed_with_its_pins() {
    let host = Host::start().await;
    let session = host.connect().await;
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("folder/inner"), b"abc").unwrap();
    std::os::unix::fs::symlink("/etc", host.path("link")).unwrap();
    session.create("data", "file", 4096, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();

    let exports = session.list("", "").await.unwrap();
    assert_eq!((exports[0].name.as_str(), exports[0].kind), ("data", EntryKind::Export));
    let entries = session.list("data", "").await.unwrap();
    let seen: Vec<_> = entries.iter().map(|entry| (entry.name.as_str(), entry.kind)).collect();
    let expected =
        [("file", EntryKind::File), ("folder", EntryKind::Folder), ("link", EntryKind::Other)];
    assert_eq!(seen, expected);
    assert_eq!((entries[0].size, entries[0].pins), (4096, 1));
    assert!(entries[0].allocated >= 4096);
    let inner = session.list("data", "folder").await.unwrap();
    assert_eq!((inner.len(), inner[0].size, inner[0].pins), (1, 3, 0));
    for outside in ["..", "link"] {
        let refused = session.list("data", outside).await.unwrap_err();
        assert!(matches!(refused, Error::Refused { .. }), "{outside}: {refused:?}");
    }

    let stat = session.stat("data", "file").await.unwrap();
    assert_eq!((stat.pins, stat.guard), (1, Some(pin.grant().guard)));
    assert!(stat.page_size_bytes >= 4096);
    pin.unpin().await.unwrap();
    let stat = session.stat("data", "folder/inner").await.unwrap();
    assert_eq!((stat.pins, stat.guard, stat.generation), (0, None, None));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inspection_tells_who_holds_what() {
    let host = Host::start().await;
    let mine = host.connect().await;
    let options = ConnectOptions::new(&host.endpoint).client_name("somebody else");
    let theirs = Session::connect(options.rdma_device(RdmaDevice::None)).await.unwrap();
    mine.create("data", "file", 10_000, IfExists::Fail).await.unwrap();
    let pin = mine.pin(everything().range(7..99).exclusive()).await.unwrap();
    let reader = theirs.pin(PinRequest::read("data", "file").range(100..200)).await.unwrap();

    let seen = mine.inspect().await.unwrap();
    assert_eq!(seen.sessions.len(), 2);
    let [me, other] = [true, false].map(|yours| {
        seen.sessions.iter().find(|session| session.yours == yours).expect("a session")
    });
    assert_eq!((me.pins, me.rdma_device.as_deref()), (1, None));
    assert_eq!((other.client_name.as_str(), other.pins), ("somebody else", 1));
    assert_ne!(me.number, other.number);

    let [file] = seen.files.as_slice() else { panic!("{seen:?}") };
    assert_eq!(PathBuf::from(&file.path).file_name().unwrap(), "file");
    assert_eq!(file.generation, pin.grant().generation);
    assert_eq!((file.guard, file.state), (pin.grant().guard, FileState::Held));
    let [first, second] = file.pins.as_slice() else { panic!("{file:?}") };
    assert_eq!((first.pin_id, first.session), (pin.grant().pin_id, me.number));
    assert_eq!((first.range.clone(), first.exclusive), (7..99, true));
    assert_eq!((first.access, first.transport), (Access::ReadWrite, Transport::Stream));
    assert_eq!((second.pin_id, second.session), (reader.grant().pin_id, other.number));
    assert_eq!((second.range.clone(), second.exclusive), (100..200, false));
    assert_eq!((second.access, second.transport), (Access::Read, Transport::Stream));
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_rdma_is_refused_with_the_reason() {
    let host = Host::start().await;
    let session = host.connect().await;
    session.create("data", "file", 100, IfExists::Fail).await.unwrap();
    let refused = session.pin(everything().transport(Transport::Rdma)).await.unwrap_err();
    assert!(matches!(refused, Error::StreamOnly { .. }), "{refused}");
    // By name, on this host or on the server, it is no session.
    let options = ConnectOptions::new(&host.endpoint).server_device("nosuchdevice9");
    let refused = Session::connect(options).await.unwrap_err();
    assert!(
        matches!(refused, Error::NoRdmaDevice { .. } | Error::ServerHasNoRdmaDevice { .. }),
        "{refused}"
    );
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_end_with_the_server() {
    let host = Host::start().await;
    let session = host.connect().await;
    let mut events = session.events();
    session.create("data", "file", 100, IfExists::Fail).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    host.stop().await;
    assert_eq!(revocation(&mut events).await.reason, RevocationReason::Shutdown);
    assert!(matches!(pin.check(), Err(Error::Revoked { .. })));
}

impl Random {
    /// Mostly short, sometimes longer than a piece of the stream path.
    fn stretch(&mut self, within: &std::ops::Range<u64>) -> (u64, usize) {
        let longest = match self.below(100) {
            0 => 1_500_000,
            1..5 => 40_000,
            _ => 5000,
        };
        let offset = within.start + self.below(within.end - within.start);
        let len = 1 + self.below(longest.min(within.end - offset));
        (offset, len as usize)
    }
}

/// The file and a vector in memory, after each of 10,000 operations drawn by lot.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_operations_agree_with_a_model() {
    const FILE_BYTES: u64 = 3_000_001;
    let seed = std::env::var("PINFOLD_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("PINFOLD_SEED={seed}");
    let mut random = Random(seed);
    let host = Host::start().await;
    let session = host.connect().await;
    session.create("data", "file", FILE_BYTES, IfExists::Fail).await.unwrap();
    let mut model = vec![0_u8; FILE_BYTES as usize];
    let mut buffer = session.buffer(FILE_BYTES as usize).await.unwrap();
    let mut pin = session.pin(everything()).await.unwrap();
    let mut by_stream = 0;
    for operation in 0..10_000 {
        let usable = pin.usable();
        match random.below(1000) {
            0..500 => {
                let (offset, len) = random.stretch(&usable);
                let first = random.below(256) as usize;
                for (index, byte) in buffer.as_mut_slice()[..len].iter_mut().enumerate() {
                    *byte = (first + index * 13) as u8;
                }
                let at = offset as usize;
                model[at..at + len].copy_from_slice(&buffer.as_slice()[..len]);
                let written = pin.write(offset, buffer, len).await;
                let (back, report) = written.expect("written");
                assert_eq!(report, WriteReport { rdma_bytes: 0, stream_bytes: len as u64 });
                buffer = back;
                by_stream += len;
            }
            500..980 => {
                let (offset, len) = random.stretch(&usable);
                let (back, report) = pin.read(offset, len, buffer).await.expect("read");
                assert_eq!(report, ReadReport { rdma_bytes: 0, stream_bytes: len as u64 });
                buffer = back;
                let at = offset as usize;
                let same = buffer.as_slice()[..len] == model[at..at + len];
                assert!(same, "operation {operation}: {len} bytes at {offset}; seed {seed}");
                by_stream += len;
            }
            980..990 => commit(&pin).await,
            _ => {
                pin.unpin().await.unwrap();
                let start = random.below(FILE_BYTES);
                let end = start + 1 + random.below(FILE_BYTES - start);
                pin = session.pin(everything().range(start..end)).await.unwrap();
                assert_eq!(pin.usable(), start..end);
            }
        }
    }
    pin.unpin().await.unwrap();
    assert!(host.bytes("file") == model, "seed {seed}");
    assert!(by_stream > 10 << 20, "{by_stream} bytes only");
    host.stop().await;
}
