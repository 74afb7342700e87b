//! btrfs, where each write-back puts pages to another place on the disk: what hardware is given are
//! pages, which stay, and a lease holds the file still as elsewhere.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;

use pinfold_client::{
    ConnectOptions, Error, Pin, PinRequest, RdmaDevice, RevocationReason, Session, Transport,
};
use pinfold_lab::{
    DEADLINE, Daemon, EXPORT, FileSystem, Mounted, Pattern, Truncation, device_name, eventually,
    next_revocation, read_by_another_process, shell,
};

const BLOCK: usize = 64 << 10;
const BLOCKS: u64 = 8;
const LEN: u64 = BLOCKS * BLOCK as u64;

/// A btrfs in a file of memory, with a daemon on it.
struct Lab {
    session: Session,
    daemon: Daemon,
    mounted: Mounted,
    image: tempfile::NamedTempFile,
}

impl Lab {
    async fn start() -> Self {
        let image = tempfile::NamedTempFile::new_in(FileSystem::Tmpfs.mount_point()).unwrap();
        image.as_file().set_len(256 << 20).unwrap();
        shell(&format!("mkfs.btrfs -q {} >/dev/null", image.path().display()));
        let mounted = Mounted::image("btrfs", image.path());
        std::fs::write(mounted.path().join("file"), vec![0; LEN as usize]).unwrap();
        let daemon = Daemon::start(&[(EXPORT, mounted.path())]);
        let device = RdmaDevice::Named(device_name());
        let options = ConnectOptions::new(&daemon.url).rdma_device(device);
        let session = Session::connect(options).await.unwrap();
        Self { session, daemon, mounted, image }
    }

    fn path(&self) -> std::path::PathBuf {
        self.mounted.path().join("file")
    }

    async fn pin(&self, transport: Transport) -> Pin {
        let request = PinRequest::read_write(EXPORT, "file").transport(transport);
        self.session.pin(request).await.unwrap()
    }

    /// Writes everything, once; gives how many bytes went by RDMA.
    async fn write(&self, pin: &Pin, pattern: Pattern) -> u64 {
        let mut buffer = self.session.buffer(BLOCK).await.unwrap();
        let mut by_rdma = 0;
        for block in 0..BLOCKS {
            let offset = block * BLOCK as u64;
            pattern.fill(offset, buffer.as_mut_slice());
            let (back, report) = pin.write(offset, buffer, BLOCK).await.unwrap();
            by_rdma += report.rdma_bytes;
            buffer = back;
        }
        by_rdma
    }
}

/// Where the file's first block lies on the disk.
fn place(path: &Path) -> String {
    let output = Command::new("filefrag").arg("-v").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|line| line.trim_start().starts_with("0:"));
    line.unwrap_or_else(|| panic!("no extent in {text}")).split(':').nth(2).unwrap().to_owned()
}

/// Each round is written back to another place, and the next round still lands in the file.
#[tokio::test]
async fn what_is_written_by_rdma_survives_that_its_blocks_move() {
    tokio::time::timeout(DEADLINE, async {
        let lab = Lab::start().await;
        let pin = lab.pin(Transport::Rdma).await;
        for round in 1..4 {
            assert_eq!(lab.write(&pin, Pattern(round)).await, LEN);
            pin.commit().await.unwrap();
        }
        lab.write(&pin, Pattern(9)).await;
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        let Lab { session, daemon, mounted, image } = lab;
        session.close().await;
        drop((daemon, mounted));
        // From the disk, not from the page cache.
        let again = Mounted::image("btrfs", image.path());
        let content = read_by_another_process(&again.path().join("file"));
        assert_eq!(content.len() as u64, LEN);
        Pattern(9).check(0, &content, "after a new mount");
    })
    .await
    .expect("the test hangs");
}

/// So the test before tests something.
#[tokio::test]
async fn its_blocks_do_move() {
    let lab = Lab::start().await;
    let mut places = Vec::new();
    for round in 1..3 {
        let pin = lab.pin(Transport::Rdma).await;
        lab.write(&pin, Pattern(round)).await;
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        let is_free = async || lab.daemon.files_open_beneath(lab.mounted.path()) == 0;
        eventually("the file is closed", is_free).await;
        places.push(place(&lab.path()));
    }
    assert_ne!(places[0], places[1]);
}

async fn cut_during_writes(transport: Transport) {
    let lab = Lab::start().await;
    let mut events = lab.session.events();
    let pin = lab.pin(transport).await;
    let (started, going) = tokio::sync::oneshot::channel();
    let writing = async {
        let mut started = Some(started);
        let mut buffer = lab.session.buffer(BLOCK).await.unwrap();
        buffer.as_mut_slice().fill(b'R');
        for round in 0.. {
            match pin.write(round % BLOCKS * BLOCK as u64, buffer, BLOCK).await {
                Ok((back, _)) => buffer = back,
                Err(failed) => return failed.error,
            }
            if round == BLOCKS + 3
                && let Some(started) = started.take()
            {
                started.send(()).unwrap();
            }
        }
        unreachable!("the loop has no end")
    };
    let cutting = async {
        going.await.unwrap();
        Truncation::start(lab.path(), BLOCK as i64).done().await;
    };
    let (error, ()) = tokio::join!(writing, cutting);
    assert!(matches!(error, Error::Draining { .. } | Error::Revoked { .. }), "{error:?}");
    assert_eq!(next_revocation(&mut events).await.reason, RevocationReason::LocalWriter);
    let audit = lab.daemon.audit_record(&lab.path());
    assert_eq!(audit["break_pending_at_release"], true, "{audit}");
    // Its second life is its own.
    std::fs::write(lab.path(), vec![b'L'; LEN as usize]).unwrap();
    let content = read_by_another_process(&lab.path());
    assert!(content.iter().all(|byte| *byte == b'L'), "nothing of the client came after");
}

#[tokio::test]
async fn a_truncate_waits_for_writes_by_stream() {
    tokio::time::timeout(DEADLINE, cut_during_writes(Transport::Stream)).await.expect("it hangs");
}

#[tokio::test]
async fn a_truncate_waits_for_writes_by_rdma() {
    tokio::time::timeout(DEADLINE, cut_during_writes(Transport::Rdma)).await.expect("it hangs");
}
