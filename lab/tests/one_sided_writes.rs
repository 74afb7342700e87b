//! Bytes written one-sided are in the file, and really went by RDMA.
#![forbid(unsafe_code)]

use pinfold_client::{Durability, GuardTier, IfExists, PinRequest};
use pinfold_lab::{EXPORT, Pattern, on_each_file_system, read_by_another_process};

const LEN: usize = 1 << 20;
const CHUNK: usize = 64 << 10;

on_each_file_system! {
    async fn what_was_written_is_in_the_file(lab in Lab) {
        let session = lab.session().await;
        // A length that is no multiple of a page: the last piece ends in the middle of one.
        let size = LEN as u64 - 123;
        let made = session.create(EXPORT, "file", size, IfExists::Fail).await.unwrap();
        assert!(made.created);
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let grant = pin.grant().clone();
        assert_eq!((grant.range.clone(), grant.valid_end), (0..size, size));
        assert!(grant.dax && grant.map_sync, "{grant:?}");
        assert_eq!(grant.guard, GuardTier::Delegation, "the newest kernel offers delegations");
        assert_eq!(grant.durability, [Durability::Commit]);

        let pattern = Pattern(1);
        let mut sent = 0;
        let mut buffer = session.buffer(CHUNK).await.unwrap();
        while sent < size {
            let len = CHUNK.min((size - sent) as usize);
            pattern.fill(sent, &mut buffer.as_mut_slice()[..len]);
            let (back, report) = pin.write(sent, buffer, len).await.unwrap();
            assert_eq!((report.rdma_bytes, report.stream_bytes), (len as u64, 0));
            buffer = back;
            sent += len as u64;
        }
        pin.commit().await.unwrap();

        buffer.as_mut_slice().fill(0);
        let (buffer, report) = pin.read(CHUNK as u64, CHUNK, buffer).await.unwrap();
        assert_eq!(report.rdma_bytes, CHUNK as u64);
        pattern.check(CHUNK as u64, &buffer.as_slice()[..CHUNK], "read back by RDMA");

        pin.unpin().await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        assert_eq!(content.len() as u64, size, "exactly the bytes that were asked for");
        pattern.check(0, &content, "read by another process");
    }

    async fn a_file_can_be_pinned_again_and_again_and_nothing_is_left_behind(lab in Lab) {
        let session = lab.session().await;
        lab.make_file("file", 8192);
        let mut generations = Vec::new();
        for round in 0..5u64 {
            let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
            generations.push(pin.grant().generation);
            let mut buffer = session.buffer(8192).await.unwrap();
            Pattern(round).fill(0, buffer.as_mut_slice());
            pin.write(0, buffer, 8192).await.unwrap();
            pin.unpin().await.unwrap();
            // It opens the file: with no pins nobody is held up.
            let content = read_by_another_process(&lab.path("file"));
            Pattern(round).check(0, &content, "after the unpin");
        }
        generations.dedup();
        assert_eq!(generations.len(), 5, "no generation is used twice");
        session.close().await;
        let mut lab = lab;
        assert!(lab.daemon.terminate().success());
    }
}
