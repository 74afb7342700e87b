//! A kept pin outlives a truncate and the death of its server: what was committed is there, the
//! report is right, and the buffer that was registered before works by RDMA afterwards.
#![forbid(unsafe_code)]
#![allow(clippy::single_range_in_vec_init, reason = "a fate is made of lists of ranges")]

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use pinfold_client::{
    Buffer, Error, FileChange, InterruptionCause, KeepPolicy, KeptPin, KeptSession, PinRequest,
};
use pinfold_lab::{EXPORT, Pattern, on_each_file_system, read_by_another_process};

const LEN: usize = 64 << 10;
const HALF: usize = LEN / 2;
const PIECE: usize = 4096;

fn policy() -> KeepPolicy {
    KeepPolicy::new().longest_delay(Duration::from_millis(200))
}

/// Cuts the second half off and lets the file grow again, with the file open all the time: nobody
/// can pin it while it is short. Waits for the release, as any local process does.
async fn cut_and_grow(path: &Path) {
    let path = path.to_owned();
    let cutting = tokio::task::spawn_blocking(move || {
        let file = File::options().write(true).open(path).unwrap();
        file.set_len(HALF as u64).unwrap();
        file.set_len(LEN as u64).unwrap();
    });
    cutting.await.unwrap();
}

/// Writes one piece by RDMA, and hands the buffer back.
async fn write(pin: &KeptPin, pattern: Pattern, offset: usize, mut buffer: Buffer) -> Buffer {
    pattern.fill(offset as u64, &mut buffer.as_mut_slice()[..PIECE]);
    let (buffer, report) = pin.write(offset as u64, buffer, PIECE).await.unwrap();
    assert_eq!((report.rdma_bytes, report.stream_bytes), (PIECE as u64, 0), "not by RDMA");
    buffer
}

on_each_file_system! {
    async fn a_kept_pin_outlives_a_truncate(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let session = KeptSession::connect(lab.options(), policy()).await.unwrap();
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let old = pin.grant();
        let mut buffer = session.buffer(PIECE).await.unwrap();
        buffer = write(&pin, Pattern(1), 0, buffer).await;
        buffer = write(&pin, Pattern(1), HALF, buffer).await;
        pin.commit().await.unwrap();
        buffer = write(&pin, Pattern(2), PIECE, buffer).await;

        cut_and_grow(&lab.path("file")).await;
        let changed = pin.resume().await.unwrap_err();
        let modified = matches!(changed, Error::FileChanged { change: FileChange::Modified, .. });
        assert!(modified, "{changed}");
        pin.accept_change();
        let interruption = pin.resume().await.unwrap().expect("an interruption");
        assert_ne!(pin.grant().life, old.life);
        let InterruptionCause::Revoked(revocation) = &interruption.cause else {
            panic!("{interruption:?}");
        };
        assert_eq!(revocation.generation, old.generation);
        assert_eq!(interruption.old, old.generation);
        assert_eq!(interruption.new, Some(pin.grant().generation));
        assert_ne!(pin.grant().segments[0].remote_key, old.segments[0].remote_key);
        let piece = |start: usize| start as u64..(start + PIECE) as u64;
        assert_eq!(interruption.fate.committed, [piece(0), piece(HALF)]);
        assert_eq!(interruption.fate.acknowledged, [piece(PIECE)]);
        assert_eq!(interruption.fate.unknown, []);

        // The same buffer, by a new key over the same queue pair.
        write(&pin, Pattern(3), 2 * PIECE, buffer).await;
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        Pattern(1).check(0, &content[..PIECE], "what was committed");
        Pattern(2).check(PIECE as u64, &content[PIECE..][..PIECE], "what was acknowledged");
        Pattern(3).check(2 * PIECE as u64, &content[2 * PIECE..][..PIECE], "the new life");
        assert!(content[HALF..].iter().all(|byte| *byte == 0), "what the truncate cut");
    }

    async fn a_kept_pin_and_its_buffers_outlive_the_server(lab in Lab) {
        let mut lab = lab;
        lab.make_file("file", LEN as u64);
        let session = KeptSession::connect(lab.options(), policy()).await.unwrap();
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let old = pin.grant();
        let mut buffer = session.buffer(PIECE).await.unwrap();
        buffer = write(&pin, Pattern(1), 0, buffer).await;
        pin.commit().await.unwrap();
        buffer = write(&pin, Pattern(2), HALF, buffer).await;

        // What was written after its last sign of life might be a local process's.
        lab.daemon.wait_for_sign_of_life();
        lab.daemon.kill();
        let interruption = pin.interrupted().await;
        assert!(
            matches!(interruption.cause, InterruptionCause::SessionLost(_)),
            "{interruption:?}"
        );
        Pattern(1).check(0, &read_by_another_process(&lab.path("file"))[..PIECE], "committed");
        lab.restart_at_same_address();
        let interruption = pin.resume().await.unwrap().expect("an interruption");
        assert_eq!(interruption.fate.committed, [0..PIECE as u64]);
        assert_eq!(interruption.fate.acknowledged, [HALF as u64..(HALF + PIECE) as u64]);
        assert_eq!(interruption.fate.unknown, []);
        assert_ne!(pin.grant().generation.incarnation, old.generation.incarnation);

        // Registered before, by a queue pair that was made after.
        buffer = write(&pin, Pattern(3), HALF, buffer).await;
        let (buffer, report) = pin.read(0, PIECE, buffer).await.unwrap();
        assert_eq!((report.rdma_bytes, report.stream_bytes), (PIECE as u64, 0), "not by RDMA");
        Pattern(1).check(0, &buffer.as_slice()[..PIECE], "read back by RDMA");
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        session.close().await;
        let content = read_by_another_process(&lab.path("file"));
        Pattern(1).check(0, &content[..PIECE], "what was committed");
        Pattern(3).check(HALF as u64, &content[HALF..][..PIECE], "by the new server");
    }
}
