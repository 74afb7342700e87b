//! RDMA FLUSH by client and server: what the grant offers, what reaches the medium by it, and that the
//! right to it dies with the pin.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::time::Instant;

use pinfold_client::{
    CompletionStatus, Durability, Error, Grant, IfExists, Pin, PinRequest, Session, Transport,
};
use pinfold_lab::{
    EXPORT, FileSystem, Flushes, ForeignClient, Lab, Pattern, Truncation, WriteBacks, device_name,
    doctor, finding, on_each_file_system, rdma_core_version,
};

const PAGE: u64 = 4096;
const PAGES: u64 = 64;

/// A file of whole pages and a bit, all of it flushed.
async fn pinned(session: &Session) -> Pin {
    session.create(EXPORT, "file", PAGES * PAGE + 100, IfExists::Fail).await.unwrap();
    let pin = session.pin(PinRequest::read_write(EXPORT, "file").track_writes()).await.unwrap();
    pin.commit().await.unwrap();
    assert_eq!(pin.grant().durability, [Durability::Commit, Durability::Flush]);
    assert_eq!(pin.grant().no_flush_because, None);
    pin
}

async fn write(session: &Session, pin: &Pin, bytes: Range<u64>) {
    let len = (bytes.end - bytes.start) as usize;
    let mut buffer = session.buffer(len).await.unwrap();
    Pattern(5).fill(bytes.start, buffer.as_mut_slice());
    pin.write(bytes.start, buffer, len).await.unwrap();
}

/// Flushes a range, and checks that the NIC has flushed just that.
async fn flush(pin: &Pin, flushes: &Flushes, bytes: Range<u64>) {
    let report = pin.flush(bytes.clone()).await.unwrap();
    assert_eq!(report.commit, None);
    let flushed = flushes.take();
    assert_eq!(flushed.ranges, [addresses(pin.grant(), &bytes)]);
    let len = bytes.end - bytes.start;
    assert!(flushed.written_back >= len, "{} of {len} bytes", flushed.written_back);
}

/// What each way takes, for all pages and for one.
async fn cost(session: &Session, pin: &Pin) {
    for bytes in [0..PAGES * PAGE, PAGE..2 * PAGE] {
        write(session, pin, bytes.clone()).await;
        let started = Instant::now();
        pin.flush(bytes.clone()).await.unwrap();
        let flush = started.elapsed();
        write(session, pin, bytes.clone()).await;
        let started = Instant::now();
        pin.commit_range(bytes.clone()).await.unwrap();
        let len = bytes.end - bytes.start;
        println!("{len} bytes: flush {flush:?}, commit {:?}", started.elapsed());
    }
}

/// In the server's mapping; a file as small is one segment.
fn addresses(grant: &Grant, bytes: &Range<u64>) -> Range<u64> {
    let start = grant.segments[0].remote_address - grant.segments[0].file_offset;
    start + bytes.start..start + bytes.end
}

on_each_file_system! {
    async fn a_flush_reaches_the_medium_without_the_server(lab in Lab) {
        let session = lab.session().await;
        let pin = pinned(&session).await;
        let by_server = WriteBacks::of(&lab.path("file"));
        let flushes = Flushes::start();
        write(&session, &pin, 3 * PAGE..4 * PAGE).await;
        write(&session, &pin, 8 * PAGE..10 * PAGE + 1).await;
        write(&session, &pin, PAGES * PAGE..PAGES * PAGE + 100).await;
        assert!(flushes.take().ranges.is_empty(), "a write is no flush");

        flush(&pin, &flushes, 3 * PAGE..4 * PAGE).await;
        let fate = pin.write_fate().unwrap();
        assert_eq!(fate.committed, vec![3 * PAGE..4 * PAGE; 1]);
        let (middle, end) = (8 * PAGE..10 * PAGE + 1, PAGES * PAGE..PAGES * PAGE + 100);
        assert_eq!(fate.acknowledged, [middle, end.clone()]);
        flush(&pin, &flushes, 7 * PAGE + 5..10 * PAGE + 1).await;
        assert_eq!(pin.write_fate().unwrap().acknowledged, vec![end; 1]);
        flush(&pin, &flushes, 0..PAGES * PAGE + 100).await;
        assert!(pin.write_fate().unwrap().is_all_committed());
        assert!(by_server.take().is_empty(), "the server's processor had no part in it");

        cost(&session, &pin).await;
        let beyond = pin.flush(0..PAGES * PAGE + 101).await.unwrap_err();
        assert!(matches!(beyond, Error::OutsidePin { .. }), "{beyond}");
        pin.unpin().await.unwrap();
        let content = std::fs::read(lab.path("file")).unwrap();
        Pattern(5).check(3 * PAGE, &content[3 * PAGE as usize..][..PAGE as usize], "by RDMA");
    }

    async fn a_durable_write_is_flushed_by_the_nic(lab in Lab) {
        let session = lab.session().await;
        let pin = pinned(&session).await;
        let by_server = WriteBacks::of(&lab.path("file"));
        let flushes = Flushes::start();
        // One that travels with its request, pages, and more than fits in one call of the device.
        let narrow = lab.session_with(lab.options().send_window(1)).await;
        let one_by_one = narrow.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        for (session, pin, bytes) in [
            (&session, &pin, 2 * PAGE..2 * PAGE + 8),
            (&session, &pin, 5 * PAGE..8 * PAGE),
            (&narrow, &one_by_one, 9 * PAGE..10 * PAGE),
        ] {
            let len = (bytes.end - bytes.start) as usize;
            let mut buffer = session.buffer(len).await.unwrap();
            Pattern(6).fill(bytes.start, buffer.as_mut_slice());
            let (_, report) = pin.write_durable(bytes.start, buffer, len).await.unwrap();
            assert_eq!((report.write.rdma_bytes, report.commit), (len as u64, None));
            assert_eq!(flushes.take().ranges, [addresses(pin.grant(), &bytes)]);
        }
        assert!(pin.write_fate().unwrap().is_all_committed());
        assert!(by_server.take().is_empty(), "the server's processor had no part in it");
        pin.unpin().await.unwrap();
        one_by_one.unpin().await.unwrap();
        let content = std::fs::read(lab.path("file")).unwrap();
        for bytes in [2 * PAGE..2 * PAGE + 8, 5 * PAGE..8 * PAGE, 9 * PAGE..10 * PAGE] {
            let there = &content[bytes.start as usize..bytes.end as usize];
            Pattern(6).check(bytes.start, there, "by a durable write");
        }
    }

    async fn a_durable_write_is_published_by_an_atomic_one(lab in Lab) {
        let session = lab.session().await;
        let pin = pinned(&session).await;
        assert_eq!(pin.grant().no_atomic_write_because, None);
        let by_server = WriteBacks::of(&lab.path("file"));
        let (record, pointer) = (5 * PAGE, 16..24);
        let mut buffer = session.buffer(PAGE as usize).await.unwrap();
        Pattern(7).fill(record, buffer.as_mut_slice());
        let (_, report) = pin.write_durable(record, buffer, PAGE as usize).await.unwrap();
        assert_eq!(report.commit, None);
        pin.write_atomic(pointer.start, record).await.unwrap();
        let flushes = Flushes::start();
        flush(&pin, &flushes, pointer.clone()).await;
        assert!(pin.write_fate().unwrap().is_all_committed());
        assert!(by_server.take().is_empty(), "the server's processor had no part in it");
        pin.unpin().await.unwrap();
        let content = std::fs::read(lab.path("file")).unwrap();
        assert_eq!(content[pointer.start as usize..pointer.end as usize], record.to_ne_bytes());
        Pattern(7).check(record, &content[record as usize..][..PAGE as usize], "by RDMA");
    }

    async fn what_went_by_the_stream_path_is_committed_by_the_server(lab in Lab) {
        let session = lab.session().await;
        let pin = pinned(&session).await;
        // The device misplaces what does not start on a page.
        write(&session, &pin, PAGE + 1..3 * PAGE).await;
        let report = pin.flush(PAGE..3 * PAGE).await.unwrap();
        assert!(report.commit.is_some(), "{report:?}");
        assert!(pin.write_fate().unwrap().is_all_committed());
        // Whether of other ranges too, only a commit of the whole pin tells.
        pin.commit().await.unwrap();
        write(&session, &pin, 5 * PAGE..6 * PAGE).await;
        flush(&pin, &Flushes::start(), 5 * PAGE..6 * PAGE).await;
    }

    async fn a_flush_after_the_revocation_is_refused(lab in Lab) {
        lab.make_file("file", 4 * PAGE);
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let pin = client.pin("file").await;
        let key = &pin.segments[0];
        let page = Pattern(1).bytes(0, PAGE as usize);
        assert!(lane.write(key, 0, &page).await.is_success());
        assert!(lane.flush(key, 0, PAGE as usize).await.is_success());

        let truncation = Truncation::start(lab.path("file"), 2 * PAGE as i64);
        client.next_draining().await;
        client.say_drained(&[pin.pin_id]);
        client.next_revoked().await;
        truncation.done().await;
        assert_eq!(lane.flush(key, 0, PAGE as usize).await, CompletionStatus::RemoteAccess);
        assert_eq!(std::fs::read(lab.path("file")).unwrap()[..PAGE as usize], page);

        let lane = client.connect().await;
        let pin = client.pin("file").await;
        let key = &pin.segments[0];
        assert!(lane.flush(key, 0, PAGE as usize).await.is_success());
        client.unpin(pin.pin_id).await.unwrap();
        assert_eq!(lane.flush(key, 0, PAGE as usize).await, CompletionStatus::RemoteAccess);
    }

    async fn a_pin_for_reading_is_not_flushed(lab in Lab) {
        lab.make_file("file", PAGE);
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let request = client.pin_request("file");
        let access = pinfold_proto::v1::Access::Read.into();
        let request = pinfold_proto::v1::PinRequest { access, ..request };
        let pin = client.stub.pin(request).await.unwrap().into_inner();
        assert_eq!(pin.no_flush_because, "the pin is for reading only");
        let refused = lane.flush(&pin.segments[0], 0, PAGE as usize).await;
        assert!(!refused.is_success());
    }
}

#[test]
fn memory_that_forgets_is_not_flushed() {
    Lab::run(FileSystem::Tmpfs, async |lab: Lab| {
        lab.make_file("file", PAGE);
        let session = lab.session().await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let why = "the file is tmpfs, and only fs-DAX is flushed by the NIC";
        assert_eq!(pin.grant().no_flush_because.as_deref(), Some(why));
        assert!(!pin.grant().durability.contains(&Durability::Flush));
        let refused = pin.flush(0..PAGE).await.unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
        pin.unpin().await.unwrap();
        let by_stream = PinRequest::read_write(EXPORT, "file").transport(Transport::Stream);
        let pin = session.pin(by_stream).await.unwrap();
        let why = "the pin goes by the stream path only";
        assert_eq!(pin.grant().no_flush_because.as_deref(), Some(why));
    });
}

#[test]
fn the_doctor_finds_it() {
    assert!(rdma_core_version() >= 45);
    let finished = doctor(&[], &["--json"]);
    let report: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    let found = finding(&report, &device_name(), "flush");
    assert_eq!(found["result"], "ok", "{found}");
}
