//! Commits and names, against the real server on this machine's own file system: a file that has lost
//! the name of its pin holds nothing durable that anybody would find.

use std::fs;
use std::path::PathBuf;

use pinfold_client::{
    ConnectOptions, Error, Event, Events, PinRequest, RdmaDevice, Reason, RevocationReason, Session,
};
use pinfold_server::Server;
use pinfold_server::config::{Config, ExportConfig};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

const LEN: usize = 64 << 10;

/// A server without RDMA that exports a folder as "guarded" and one in it as "inner"; and another
/// folder, whose files nothing holds still, as "free".
struct Host {
    folder: TempDir,
    endpoint: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Host {
    async fn start() -> Self {
        // On the disk of the build, where /tmp may be memory.
        let folder = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::create_dir_all(path("guarded/inner")).unwrap();
        fs::create_dir(path("free")).unwrap();
        let free = format!("free={},guard=none", path("free").display());
        let mut config = Config::new(vec![
            ExportConfig::new("guarded", path("guarded")),
            ExportConfig::new("inner", path("guarded/inner")),
            free.parse().unwrap(),
        ]);
        config.rdma_devices = vec![];
        let server = Server::start(config).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(async move {
            server.serve(listener, async { stopped.await.unwrap() }).await.unwrap();
        });
        Self { folder, endpoint, stop, serving }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    fn make_file(&self, path: &str) {
        fs::write(self.path(path), vec![1; LEN]).unwrap();
    }

    async fn connect(&self) -> Session {
        let options = ConnectOptions::new(&self.endpoint).rdma_device(RdmaDevice::None);
        Session::connect(options).await.unwrap()
    }

    async fn end(self) {
        self.stop.send(()).unwrap();
        self.serving.await.unwrap();
    }
}

async fn revoked(events: &mut Events) -> RevocationReason {
    loop {
        if let Event::Revoked { revocation, .. } = events.next().await.expect("a session") {
            return revocation.reason;
        }
    }
}

fn is_too_late(error: &Error) -> bool {
    let reasons = [Reason::FileChanged, Reason::StaleGeneration, Reason::UnknownPin];
    match error {
        Error::Draining { .. } | Error::Revoked { .. } => true,
        error => error.reason().is_some_and(|reason| reasons.contains(&reason)),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_commit_is_called_durable_after_the_name_has_gone() {
    let host = Host::start().await;
    let session = host.connect().await;
    for turn in 0..50 {
        for export in ["guarded", "free"] {
            let (name, new) = (format!("{export}/f"), format!("{export}/new"));
            host.make_file(&name);
            let mut events = session.events();
            let pin = session.pin(PinRequest::read_write(export, "f")).await.unwrap();
            let buffer = session.buffer(LEN).await.unwrap();
            let (buffer, _) = pin.write(0, buffer, LEN).await.unwrap();
            pin.commit().await.unwrap();
            host.make_file(&new);
            match turn % 2 {
                0 => fs::rename(host.path(&new), host.path(&name)).unwrap(),
                _ => fs::remove_file(host.path(&name)).unwrap(),
            }
            let refused = pin.commit().await.expect_err("durable in a file without a name");
            assert!(is_too_late(&refused), "{refused}");
            drop(buffer);
            assert_eq!(revoked(&mut events).await, RevocationReason::NameGone);
        }
    }
    session.close().await;
    host.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_moves_takes_the_pins_that_were_made_through_it() {
    let host = Host::start().await;
    let session = host.connect().await;
    host.make_file("guarded/inner/f");
    let mut events = session.events();
    let outer = session.pin(PinRequest::read("guarded", "inner/f")).await.unwrap();
    let inner = session.pin(PinRequest::read("inner", "f")).await.unwrap();
    assert_eq!(outer.grant().generation, inner.grant().generation);
    fs::rename(host.path("guarded/inner"), host.path("guarded/moved")).unwrap();
    assert_eq!(revoked(&mut events).await, RevocationReason::NameGone);
    drop((outer, inner));

    // An export is its folder, wherever that is: by this path the file is still named.
    let inner = session.pin(PinRequest::read("inner", "f")).await.unwrap();
    fs::rename(host.path("guarded/moved"), host.path("guarded/inner")).unwrap();
    let mut buffer = session.buffer(LEN).await.unwrap();
    (buffer, _) = inner.read(0, LEN, buffer).await.unwrap();
    assert_eq!(buffer.as_slice()[..LEN], vec![1; LEN]);
    inner.unpin().await.unwrap();
    session.close().await;
    host.end().await;
}
