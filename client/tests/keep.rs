//! Kept pins against the real server, on this machine's own file system and without RDMA: truncated
//! under the pin, served by another server on the same port, replaced, shrunk.
#![allow(clippy::single_range_in_vec_init, reason = "a fate is made of lists of ranges")]

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pinfold_client::{
    Buffer, ConnectOptions, Durability, Error, FileChange, IfExists, Interruption,
    InterruptionCause, KeepPolicy, KeptPin, KeptSession, PinRequest, Reason, RevocationReason,
    TransferError, WriteFate,
};
use pinfold_server::Server;
use pinfold_server::config::{Config, ExportConfig};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const LEN: usize = 64 << 10;

/// A server without RDMA that exports a folder as "data", and can be started again.
struct Host {
    folder: TempDir,
    state: TempDir,
    address: String,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<()>>,
}

impl Host {
    async fn start() -> Self {
        // On the disk of the build, where /tmp may be memory.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let address = "127.0.0.1:0".to_owned();
        let state = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut host = Self { folder, state, address, stop: None, serving: None };
        host.serve().await;
        fs::write(host.path("file"), vec![0; LEN]).unwrap();
        host
    }

    /// On the same port as before.
    async fn serve(&mut self) {
        let directory = self.folder.path().to_owned();
        let export = ExportConfig::new("data", directory);
        let mut config = Config { rdma_devices: Vec::new(), ..Config::new(vec![export]) };
        config.state_folder = Some(self.state.path().to_owned());
        let server = Server::start(config).await.expect("a server");
        let listener = TcpListener::bind(&self.address).await.unwrap();
        self.address = listener.local_addr().unwrap().to_string();
        let (stop, stopped) = oneshot::channel();
        self.stop = Some(stop);
        self.serving = Some(tokio::spawn(async move {
            let shutdown = async {
                // Dropped by a test that failed: then it stops as well.
                let _ = stopped.await;
            };
            server.serve(listener, shutdown).await.expect("served");
        }));
    }

    async fn stop(&mut self) {
        self.stop.take().unwrap().send(()).unwrap();
        self.serving.take().unwrap().await.unwrap();
    }

    fn options(&self) -> ConnectOptions {
        ConnectOptions::new(format!("http://{}", self.address))
    }

    async fn connect(&self) -> KeptSession {
        KeptSession::connect(self.options(), quick()).await.unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path("file")).unwrap()
    }

    /// Changes the file as a local process does that knows nothing of pins: it waits for the release.
    async fn locally<T: Send + 'static>(
        &self,
        change: impl FnOnce(PathBuf) -> T + Send + 'static,
    ) -> T {
        let path = self.path("file");
        soon(tokio::task::spawn_blocking(move || change(path))).await.unwrap()
    }

    /// Gives the file this size. As long as that goes on nobody can pin it.
    async fn truncate(&self, size: u64) {
        self.locally(move |path| opened(&path).set_len(size).unwrap()).await;
    }
}

/// Opens a file for writing, and disturbs it by that.
fn opened(path: &Path) -> fs::File {
    fs::File::options().write(true).open(path).expect("opened after the release")
}

fn quick() -> KeepPolicy {
    KeepPolicy::new().longest_delay(Duration::from_millis(50))
}

fn everything() -> PinRequest {
    PinRequest::read_write("data", "file")
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it never came")
}

async fn try_to_put(
    session: &KeptSession,
    pin: &KeptPin,
    offset: u64,
    bytes: &[u8],
) -> Result<Buffer, TransferError> {
    let mut buffer = session.buffer(bytes.len()).await.unwrap();
    buffer.as_mut_slice().copy_from_slice(bytes);
    Ok(soon(pin.write(offset, buffer, bytes.len())).await?.0)
}

async fn put(session: &KeptSession, pin: &KeptPin, offset: u64, bytes: &[u8]) {
    try_to_put(session, pin, offset, bytes).await.expect("written");
}

/// Commits where the medium can: memory can't. Says whether it can.
async fn commit(pin: &KeptPin) -> bool {
    let outcome = pin.commit().await;
    let can = pin.grant().durability.contains(&Durability::Commit);
    if can {
        outcome.expect("durable");
    } else {
        assert_eq!(outcome.unwrap_err().reason(), Some(Reason::UnsupportedFile));
    }
    can
}

/// What was committed, in what the rest of the writes came to, on a medium that can or can't.
fn fate(can_commit: bool, committed: Range<u64>, acknowledged: Range<u64>) -> WriteFate {
    if can_commit {
        return WriteFate {
            committed: vec![committed],
            acknowledged: vec![acknowledged],
            unknown: vec![],
        };
    }
    WriteFate { committed: vec![], acknowledged: vec![committed, acknowledged], unknown: vec![] }
}

async fn resumed(pin: &KeptPin) -> Interruption {
    soon(pin.resume()).await.expect("held again").expect("an interruption")
}

async fn assert_modified(pin: &KeptPin) {
    let changed = soon(pin.resume()).await.unwrap_err();
    let modified = matches!(changed, Error::FileChanged { change: FileChange::Modified, .. });
    assert!(modified, "{changed}");
}

/// A local process has changed the file's bytes, and that is all right.
async fn accepted(pin: &KeptPin) -> Interruption {
    assert_modified(pin).await;
    pin.accept_change();
    resumed(pin).await
}

fn assert_interrupted(error: &Error) {
    assert!(matches!(error, Error::Interrupted { .. }), "{error:?}");
}

async fn assert_nothing_goes_through(session: &KeptSession, pin: &KeptPin) {
    assert_interrupted(&pin.check().unwrap_err());
    assert_interrupted(&try_to_put(session, pin, 0, b"never").await.unwrap_err().error);
    let buffer = session.buffer(10).await.unwrap();
    let failed = soon(pin.read(0, 10, buffer)).await.unwrap_err();
    assert_interrupted(&failed.error);
    assert!(failed.buffer.is_some());
    assert_interrupted(&pin.commit().await.unwrap_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_for_writing_is_reported_and_the_pin_goes_on() {
    let mut host = Host::start().await;
    let session = host.connect().await;
    let pin = session.pin(everything()).await.unwrap();
    assert_eq!(soon(pin.resume()).await.unwrap(), None, "nothing has happened");
    let first = pin.grant().generation;
    put(&session, &pin, 0, &[1; 5000]).await;
    let can_commit = commit(&pin).await;
    put(&session, &pin, 10_000, &[2; 5000]).await;

    host.locally(|path| drop(opened(&path))).await;
    let interruption = soon(pin.interrupted()).await;
    assert_eq!(interruption.old, first);
    let expected = fate(can_commit, 0..5000, 10_000..15_000);
    assert_eq!(interruption.fate, expected);
    // Whether it is held again already makes no difference.
    assert_nothing_goes_through(&session, &pin).await;

    let interruption = resumed(&pin).await;
    let InterruptionCause::Revoked(revocation) = &interruption.cause else {
        panic!("{interruption:?}");
    };
    assert_eq!((revocation.generation, revocation.reason), (first, RevocationReason::LocalWriter));
    assert_eq!((interruption.old, interruption.new), (first, Some(pin.grant().generation)));
    assert_ne!(pin.grant().generation, first);
    assert_eq!(interruption.fate, expected);
    assert!(interruption.attempts >= 1);
    assert_eq!(soon(pin.resume()).await.unwrap(), None, "it is told once");
    assert_eq!(pin.interruption(), None);

    pin.check().unwrap();
    assert_eq!(pin.write_fate(), WriteFate::default(), "a new account");
    put(&session, &pin, 20_000, &[3; 5000]).await;
    assert_eq!(pin.write_fate().acknowledged, [20_000..25_000]);
    let buffer = session.buffer(25_000).await.unwrap();
    let (buffer, _) = pin.read(0, 25_000, buffer).await.expect("read");
    for (at, byte) in [(0, 1), (4999, 1), (10_000, 2), (14_999, 2), (20_000, 3)] {
        assert_eq!(buffer.as_slice()[at], byte, "byte {at}");
    }
    commit(&pin).await;
    pin.unpin().await.unwrap();
    session.close().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_pins_go_on_in_one_session_with_a_server_that_was_started_again() {
    let mut host = Host::start().await;
    fs::write(host.path("other"), vec![0; LEN]).unwrap();
    let session = host.connect().await;
    let one = session.pin(everything().exclusive()).await.unwrap();
    let two = session.pin(PinRequest::read("data", "other").range(5..500)).await.unwrap();
    put(&session, &one, 7, b"before").await;
    let can_commit = commit(&one).await;
    put(&session, &one, 100, b"not durable").await;
    let mut buffer = session.buffer(5).await.unwrap();
    let old = one.grant().generation;

    host.stop().await;
    soon(one.interrupted()).await;
    soon(two.interrupted()).await;
    assert_nothing_goes_through(&session, &one).await;
    host.serve().await;
    let (first, second) = tokio::join!(resumed(&one), resumed(&two));
    // The server had the time to say so.
    for interruption in [&first, &second] {
        let InterruptionCause::Revoked(revocation) = &interruption.cause else {
            panic!("{interruption:?}");
        };
        assert_eq!(revocation.reason, RevocationReason::Shutdown);
    }
    assert_eq!(first.fate, fate(can_commit, 7..13, 100..111));
    assert_eq!(second.fate, WriteFate::default());
    assert_ne!(one.grant().generation.incarnation, old.incarnation);
    assert_eq!(two.grant().range, 5..500);

    let seen = session.session().await.unwrap().inspect().await.unwrap();
    assert_eq!(seen.sessions.len(), 1, "they share one: {seen:?}");
    assert_eq!(seen.sessions[0].pins, 2);
    assert!(seen.files.iter().flat_map(|file| &file.pins).any(|pin| pin.exclusive));

    buffer.as_mut_slice().copy_from_slice(b"after");
    one.write(7, buffer, 5).await.expect("an old buffer works");
    commit(&one).await;
    one.unpin().await.unwrap();
    two.unpin().await.unwrap();
    assert_eq!(host.bytes()[7..13], *b"aftere");
    session.close().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_took_its_name_is_another_file_until_that_is_accepted() {
    let mut host = Host::start().await;
    let session = host.connect().await;
    let pin = session.pin(everything()).await.unwrap();
    put(&session, &pin, 0, b"old").await;
    fs::write(host.path("new"), vec![b'n'; 100]).unwrap();
    let new = host.path("new");
    host.locally(move |file| fs::rename(new, file).unwrap()).await;
    // A plain lease does not see a rename.
    if pin.check().is_ok() {
        host.stop().await;
        host.serve().await;
    }
    let changed = soon(pin.resume()).await.unwrap_err();
    assert!(
        matches!(changed, Error::FileChanged { change: FileChange::Replaced, .. }),
        "{changed}"
    );
    assert!(matches!(pin.check(), Err(Error::FileChanged { .. })));
    let failed = try_to_put(&session, &pin, 0, b"never").await.unwrap_err();
    assert!(matches!(failed.error, Error::FileChanged { .. }), "{failed}");
    assert!(matches!(soon(pin.resume()).await, Err(Error::FileChanged { .. })), "it stays so");
    let interruption = pin.interruption().expect("the report is there all the same");
    assert_eq!((interruption.fate.acknowledged, interruption.new), (vec![0..3], None));

    pin.try_again();
    assert!(matches!(pin.check(), Err(Error::FileChanged { .. })), "that is not to accept it");
    pin.accept_change();
    let interruption = resumed(&pin).await;
    assert_eq!(interruption.fate.acknowledged, [0..3]);
    assert_eq!(pin.grant().range, 0..100);
    put(&session, &pin, 0, b"yes").await;
    pin.unpin().await.unwrap();
    assert_eq!(host.bytes()[..4], *b"yesn");

    // What was accepted is what is expected from then on.
    let pin = session.pin(everything()).await.unwrap();
    host.locally(|path| drop(opened(&path))).await;
    resumed(&pin).await;
    session.close().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_was_written_again_in_the_same_size_is_a_change() {
    let mut host = Host::start().await;
    let session = host.connect().await;
    let pin = session.pin(everything()).await.unwrap();
    put(&session, &pin, 0, b"old").await;
    host.locally(|path| fs::write(path, vec![b'n'; LEN]).unwrap()).await;
    assert_modified(&pin).await;
    let failed = try_to_put(&session, &pin, 0, b"never").await.unwrap_err();
    assert!(matches!(failed.error, Error::FileChanged { .. }), "{failed}");
    let direct = session.session().await.unwrap();
    let old_life = pin.grant().life.expect("the server tells");
    let refused = direct.pin(everything().expect_life(old_life)).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::FileModified), "{refused}");

    pin.accept_change();
    assert_eq!(resumed(&pin).await.fate.acknowledged, [0..3]);
    assert_ne!(pin.grant().life, Some(old_life));
    put(&session, &pin, 0, b"yes").await;
    // Who only reads changes nothing, and so does who is let go because nobody has it pinned.
    let life = pin.grant().life.unwrap();
    assert_eq!(host.locally(|path| fs::read(path).unwrap()).await[..4], *b"yesn");
    resumed(&pin).await;
    assert_eq!(pin.grant().life, Some(life));
    pin.unpin().await.unwrap();
    direct.grow("data", "file", 2 * LEN as u64).await.unwrap();
    let pin = direct.pin(everything().expect_life(life)).await.expect("what the server grew");
    pin.unpin().await.unwrap();

    // A restart is no change, and one that was made while no server ran is known.
    host.stop().await;
    host.serve().await;
    let direct = session.session().await.unwrap();
    direct.pin(everything().expect_life(life)).await.unwrap().unpin().await.unwrap();
    host.stop().await;
    fs::write(host.path("file"), b"another").unwrap();
    host.serve().await;
    let direct = session.session().await.unwrap();
    let refused = direct.pin(everything().expect_life(life)).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::FileModified), "{refused}");
    session.close().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_shorter_than_the_pin_is_told_how_much() {
    for range in [None, Some(100..5000)] {
        let mut host = Host::start().await;
        let session = host.connect().await;
        let mut request = everything();
        if let Some(range) = range.clone() {
            request = request.range(range);
        }
        let pin = session.pin(request).await.unwrap();
        host.truncate(2 * LEN as u64).await;
        accepted(&pin).await;
        let needed = pin.usable().end;
        host.truncate(4999).await;
        let changed = soon(pin.resume()).await.unwrap_err();
        let Error::FileChanged { change, .. } = &changed else { panic!("{changed}") };
        assert_eq!(*change, FileChange::Shrunk { needed, size: 4999 });
        assert!(changed.to_string().contains("4999"), "{changed}");

        pin.accept_change();
        match &range {
            None => {
                resumed(&pin).await;
                assert_eq!(pin.usable(), 0..4999);
            }
            // There is nothing to accept: these bytes are not there.
            Some(_) => {
                let gave_up = soon(pin.resume()).await.unwrap_err();
                let Error::GaveUp { source, .. } = &gave_up else { panic!("{gave_up}") };
                assert_eq!(source.reason(), Some(Reason::RangePastEnd));
                host.truncate(5000).await;
                pin.try_again();
                resumed(&pin).await;
                assert_eq!(pin.usable(), 100..5000);
            }
        }
        put(&session, &pin, 200, b"x").await;
        pin.unpin().await.unwrap();
        session.close().await;
        host.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_file_is_waited_for_and_an_absent_one_is_not() {
    let mut host = Host::start().await;
    let session = host.connect().await;
    let pin = session.pin(everything()).await.unwrap();
    let opened = host.locally(|path| opened(&path)).await;
    // The server waits some time by itself before it refuses the first attempt.
    let mut attempts = 0;
    soon(async {
        while attempts < 2 {
            attempts = pin.interruption().expect("interrupted").attempts;
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(opened);
    assert!(resumed(&pin).await.attempts >= 2);

    session.session().await.unwrap().remove("data", "file", true).await.unwrap();
    let gave_up = soon(pin.resume()).await.unwrap_err();
    let Error::GaveUp { source, .. } = &gave_up else { panic!("{gave_up}") };
    assert_eq!(source.reason(), Some(Reason::FileNotFound));
    // It is there again, and is another one.
    session.session().await.unwrap().create("data", "file", 10, IfExists::Fail).await.unwrap();
    pin.try_again();
    let changed = soon(pin.resume()).await.unwrap_err();
    assert!(matches!(changed, Error::FileChanged { .. }), "{changed}");
    pin.unpin().await.expect("nothing is held");
    session.close().await;
    host.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn patience_ends_when_the_policy_says_so() {
    let mut host = Host::start().await;
    let policy = quick().give_up_after(Duration::from_millis(1));
    let session = KeptSession::connect(host.options(), policy).await.unwrap();
    let pin = session.pin(everything()).await.unwrap();
    host.stop().await;
    let gave_up = soon(pin.resume()).await.unwrap_err();
    assert!(matches!(gave_up, Error::GaveUp { .. }), "{gave_up}");
    assert!(matches!(pin.check(), Err(Error::GaveUp { .. })));
    host.serve().await;
    // Each of these has a millisecond: one gets through in the end.
    let give_up = tokio::time::Instant::now() + Duration::from_secs(60);
    loop {
        pin.try_again();
        match soon(pin.resume()).await {
            Ok(interruption) => break assert!(interruption.is_some()),
            Err(Error::GaveUp { .. }) => {}
            Err(other) => panic!("{other}"),
        }
        assert!(tokio::time::Instant::now() < give_up, "never held again");
    }
    host.stop().await;
}
