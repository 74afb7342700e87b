//! A commit flushes what was written, and nothing else. That killing the guest can't show: what has
//! reached the medium's addresses survives it, flushed or not. So the kernel's write-backs are counted.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ops::Range;

use pinfold_client::{IfExists, Pin, PinRequest, Session, Transport};
use pinfold_lab::{EXPORT, Lab, Pattern, WriteBacks, on_each_file_system};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;

/// A file of whole pages and a bit, which were all flushed by a first commit: made writable for the
/// pin, they count as written.
async fn pinned(lab: &Lab, session: &Session, transport: Transport) -> (Pin, WriteBacks) {
    session.create(EXPORT, "file", PAGES * PAGE + 100, IfExists::Fail).await.unwrap();
    let write_backs = WriteBacks::of(&lab.path("file"));
    let request = PinRequest::read_write(EXPORT, "file").transport(transport);
    let pin = session.pin(request).await.unwrap();
    pin.commit().await.unwrap();
    println!("{} pages are written back by the first commit", write_backs.take().len());
    (pin, write_backs)
}

async fn write(session: &Session, pin: &Pin, bytes: Range<u64>) {
    let len = (bytes.end - bytes.start) as usize;
    let mut buffer = session.buffer(len).await.unwrap();
    Pattern(5).fill(bytes.start, buffer.as_mut_slice());
    pin.write(bytes.start, buffer, len).await.unwrap();
}

async fn read(session: &Session, pin: &Pin, bytes: Range<u64>) {
    let len = (bytes.end - bytes.start) as usize;
    let buffer = session.buffer(len).await.unwrap();
    let (_, report) = pin.read(bytes.start, len, buffer).await.unwrap();
    assert_eq!(report.rdma_bytes, len as u64, "{report:?}");
}

fn pages(numbers: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
    numbers.into_iter().collect()
}

on_each_file_system! {
    async fn a_commit_writes_back_each_page_that_was_written_by_rdma(lab in Lab) {
        let session = lab.session().await;
        let (pin, write_backs) = pinned(&lab, &session, Transport::Rdma).await;
        write(&session, &pin, 3 * PAGE..4 * PAGE).await;
        write(&session, &pin, 7 * PAGE..9 * PAGE + 1).await;
        write(&session, &pin, PAGES * PAGE..PAGES * PAGE + 100).await;
        pin.commit().await.unwrap();
        assert_eq!(write_backs.take(), pages([3, 7, 8, 9, PAGES]));

        pin.commit().await.unwrap();
        assert_eq!(write_backs.take(), pages([]), "all is on the medium already");
        write(&session, &pin, 3 * PAGE..4 * PAGE).await;
        pin.commit().await.unwrap();
        assert_eq!(write_backs.take(), pages([3]), "the NIC's second write to a page is seen too");
        write(&session, &pin, 0..PAGES * PAGE).await;
        pin.commit().await.unwrap();
        assert_eq!(write_backs.take(), pages(0..PAGES));
    }

    async fn a_page_that_was_read_since_the_last_commit_is_written_back_again(lab in Lab) {
        let session = lab.session().await;
        let (pin, write_backs) = pinned(&lab, &session, Transport::Rdma).await;
        let other = lab.session().await;
        let reader = PinRequest::read(EXPORT, "file").transport(Transport::Rdma);
        let reader = other.pin(reader).await.unwrap();
        // The read maps the page for reading only: the write after it has to fault once more.
        for (page, of, by, whose) in [
            (3, &session, &pin, "the same pin"),
            (5, &other, &reader, "another client's pin"),
        ] {
            let bytes = page * PAGE..(page + 1) * PAGE;
            write(&session, &pin, bytes.clone()).await;
            pin.commit().await.unwrap();
            assert_eq!(write_backs.take(), pages([page]), "{whose}");
            read(of, by, bytes.clone()).await;
            write(&session, &pin, bytes).await;
            pin.commit().await.unwrap();
            assert_eq!(write_backs.take(), pages([page]), "after a read by {whose}");
        }
    }

    async fn a_commit_of_a_range_writes_back_that_range(lab in Lab) {
        let session = lab.session().await;
        let (pin, write_backs) = pinned(&lab, &session, Transport::Rdma).await;
        write(&session, &pin, 0..16 * PAGE).await;
        pin.commit_range(4 * PAGE + 1..6 * PAGE + 1).await.unwrap();
        assert_eq!(write_backs.take(), pages(4..7));
        pin.commit().await.unwrap();
        assert_eq!(write_backs.take(), pages((0..4).chain(7..16)));
    }

    async fn a_durable_write_commits_what_it_wrote(lab in Lab) {
        let session = lab.session().await;
        let (pin, write_backs) = pinned(&lab, &session, Transport::Auto).await;
        write(&session, &pin, 20 * PAGE..22 * PAGE).await;
        // By RDMA; and, as soft-RoCE would misplace it, by the stream path.
        for bytes in [3 * PAGE..5 * PAGE, 7 * PAGE..7 * PAGE + 8, 9 * PAGE + 100..9 * PAGE + 200] {
            let len = (bytes.end - bytes.start) as usize;
            let mut buffer = session.buffer(len).await.unwrap();
            Pattern(7).fill(bytes.start, buffer.as_mut_slice());
            let (buffer, report) = pin.write_durable(bytes.start, buffer, len).await.unwrap();
            assert_eq!(buffer.len(), len);
            assert!(report.commit.is_some());
            let by_rdma = bytes.start.is_multiple_of(PAGE);
            assert_eq!(report.write.rdma_bytes > 0, by_rdma, "{report:?}");
            if by_rdma {
                assert_eq!(write_backs.take(), pages(bytes.start / PAGE..bytes.end.div_ceil(PAGE)));
            }
        }
        pin.commit().await.unwrap();
        assert!(write_backs.take().is_superset(&pages([20, 21])), "that was no part of it");
    }

    async fn a_visible_write_is_there_and_not_yet_durable(lab in Lab) {
        let session = lab.session().await;
        let (_pin, write_backs) = pinned(&lab, &session, Transport::Auto).await;
        let request = PinRequest::read_write(EXPORT, "file").track_writes();
        let pin = session.pin(request).await.unwrap();
        // By RDMA; and, as soft-RoCE would misplace it, by the stream path.
        for bytes in [3 * PAGE..5 * PAGE, 9 * PAGE + 100..9 * PAGE + 200] {
            let len = (bytes.end - bytes.start) as usize;
            let mut buffer = session.buffer(len).await.unwrap();
            Pattern(8).fill(bytes.start, buffer.as_mut_slice());
            let (buffer, report) = pin.write_visible(bytes.start, buffer, len).await.unwrap();
            assert_eq!(report.rdma_bytes > 0, bytes.start.is_multiple_of(PAGE), "{report:?}");
            let back = session.buffer(len).await.unwrap();
            let (back, _) = pin.read(bytes.start, len, back).await.unwrap();
            assert_eq!(back.as_slice(), buffer.as_slice());
            assert_eq!(write_backs.take(), pages([]));
            let fate = pin.write_fate().unwrap();
            assert_eq!((fate.acknowledged.last(), fate.committed.len()), (Some(&bytes), 0));
        }
        pin.commit().await.unwrap();
        assert!(pin.write_fate().unwrap().is_all_committed());
    }

    async fn what_came_by_the_stream_path_needs_none(lab in Lab) {
        let session = lab.session().await;
        let (pin, write_backs) = pinned(&lab, &session, Transport::Stream).await;
        write(&session, &pin, 0..8 * PAGE).await;
        pin.commit().await.unwrap();
        assert_eq!(write_backs.take(), pages([]), "write(2) stores past the caches with DAX");
    }
}
