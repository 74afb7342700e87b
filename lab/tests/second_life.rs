//! A file is truncated and grown again by a local process: no remote byte may appear in the data
//! of its second life.
#![forbid(unsafe_code)]

use pinfold_client::{CompletionStatus, DrainPolicy, PinRequest};
use pinfold_lab::{
    EXPORT, on_each_file_system, read_by_another_process, remote_slice, rewrite_by_another_process,
};

const LEN: usize = 256 << 10;
const PIECE: usize = 4096;
const SESSIONS: usize = 4;
const PINS_PER_SESSION: usize = 100;

on_each_file_system! {
    async fn no_stale_byte_appears_in_it(lab in Lab) {
        lab.make_file("file", LEN as u64);
        // The worst client: it never drains and goes on writing with the key that it has.
        let session = lab.session_with(lab.options().drain_policy(DrainPolicy::Ignore)).await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let key = pin.grant().segments[0];
        let path = lab.path("file");
        let local = tokio::task::spawn_blocking(move || rewrite_by_another_process(&path, 'L', LEN));

        let mut buffer = session.buffer(PIECE).await.unwrap();
        buffer.as_mut_slice().fill(b'R');
        let mut landed = 0u64;
        let refused = loop {
            let offset = landed % (LEN / PIECE) as u64 * PIECE as u64;
            let remote = remote_slice(&key, offset, PIECE);
            let (back, status) = session.raw_write(remote, buffer).await.unwrap();
            if !status.is_success() {
                break status;
            }
            buffer = back;
            landed += 1;
        };
        println!("{landed} writes landed before the fence, then: {refused}");
        assert_eq!(refused, CompletionStatus::RemoteAccess);
        assert!(landed > 0, "nothing was written before the truncate");
        local.await.unwrap();

        // The key stays dead, also now that there are bytes at its addresses again.
        for _ in 0..3 {
            let mut buffer = session.buffer(PIECE).await.unwrap();
            buffer.as_mut_slice().fill(b'R');
            let remote = remote_slice(&key, 0, PIECE);
            let (_, status) = session.raw_write(remote, buffer).await.unwrap();
            assert_eq!(status, CompletionStatus::RemoteAccess);
        }
        let content = read_by_another_process(&lab.path("file"));
        assert_eq!(content.len(), LEN);
        let foreign = content.iter().filter(|byte| **byte != b'L').count();
        assert_eq!(foreign, 0, "remote bytes in the second life");
    }

    /// Deregistering so many regions takes longer than rewriting the file, so what stands between the
    /// two lives is the fence alone.
    async fn keys_are_dead_before_anybody_gets_the_file(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let mut holders = Vec::new();
        for _ in 0..SESSIONS {
            let session = lab.session().await;
            let mut pins = Vec::new();
            for _ in 0..PINS_PER_SESSION {
                pins.push(session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap());
            }
            let mut buffer = session.buffer(PIECE).await.unwrap();
            buffer.as_mut_slice().fill(b'R');
            holders.push((session, pins, buffer));
        }
        let path = lab.path("file");
        let rewriting = tokio::task::spawn_blocking(move || {
            // Opening it waits for the release.
            std::fs::write(path, vec![b'L'; LEN]).unwrap();
        });
        rewriting.await.unwrap();
        let mut statuses = Vec::new();
        for (number, (session, pins, buffer)) in holders.into_iter().enumerate() {
            let key = pins[0].grant().segments[0];
            let remote = remote_slice(&key, (number * PIECE) as u64, PIECE);
            statuses.push(session.raw_write(remote, buffer).await.unwrap().1);
        }
        let content = read_by_another_process(&lab.path("file"));
        let foreign = content.iter().filter(|byte| **byte != b'L').count();
        assert_eq!(foreign, 0, "remote bytes in the second life; the writes said {statuses:?}");
        assert_eq!(statuses, vec![CompletionStatus::RemoteAccess; SESSIONS]);
    }
}
