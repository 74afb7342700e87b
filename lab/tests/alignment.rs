//! Any offset and any length, on a device that places data rightly only from page starts on: what
//! its quirk forbids goes by the stream path. Ten thousand random operations against a model.
#![forbid(unsafe_code)]

use std::time::Duration;

use pinfold_client::{CompletionStatus, Pin, PinRequest, Session, Transport};
use pinfold_lab::{EXPORT, FileSystem, Lab, Random, read_by_another_process, remote_slice};

const LEN: usize = 256 << 10;
const LONGEST: usize = 12 << 10;
/// Under emulation an operation takes some ten milliseconds.
const DEADLINE: Duration = Duration::from_secs(1200);

#[derive(Default)]
struct Count {
    rdma_bytes: u64,
    stream_bytes: u64,
}

async fn operate(
    session: &Session,
    pin: &Pin,
    operations: u32,
    model: &mut [u8],
    random: &mut Random,
) -> Count {
    let mut count = Count::default();
    let mut buffer = session.buffer(LONGEST).await.unwrap();
    for round in 0..operations {
        let len = 1 + random.below(if round % 4 == 0 { LONGEST } else { 600 });
        let offset = random.below(LEN - len + 1);
        let what = format!("operation {round} of seed {}: {len} bytes at {offset}", random.seed());
        if random.below(3) == 0 {
            let (back, report) = pin.read(offset as u64, len, buffer).await.expect(&what);
            assert!(back.as_slice()[..len] == model[offset..offset + len], "read, {what}");
            count.rdma_bytes += report.rdma_bytes;
            count.stream_bytes += report.stream_bytes;
            buffer = back;
        } else {
            random.fill(&mut buffer.as_mut_slice()[..len]);
            model[offset..offset + len].copy_from_slice(&buffer.as_slice()[..len]);
            let (back, report) = pin.write(offset as u64, buffer, len).await.expect(&what);
            assert_eq!(report.rdma_bytes + report.stream_bytes, len as u64, "{what}");
            count.rdma_bytes += report.rdma_bytes;
            count.stream_bytes += report.stream_bytes;
            buffer = back;
        }
        if random.below(500) == 0 {
            pin.commit().await.expect(&what);
        }
    }
    count
}

async fn against_a_model(lab: Lab, transport: Transport, operations: u32, seed: u64) {
    lab.make_file("file", LEN as u64);
    let session = lab.session().await;
    let request = PinRequest::read_write(EXPORT, "file").transport(transport);
    let pin = session.pin(request).await.unwrap();
    let mut model = vec![0; LEN];
    let mut random = Random::new(seed);
    let count = operate(&session, &pin, operations, &mut model, &mut random).await;
    println!("{} bytes by RDMA, {} by the stream path", count.rdma_bytes, count.stream_bytes);
    match transport {
        Transport::Stream => assert_eq!(count.rdma_bytes, 0),
        _ => assert!(count.rdma_bytes > 0 && count.stream_bytes > 0, "both ways were taken"),
    }
    pin.unpin().await.unwrap();
    assert!(read_by_another_process(&lab.path("file")) == model, "the file is not the model");
}

#[test]
fn ten_thousand_random_operations_by_rdma_where_it_can_be() {
    Lab::run_long(FileSystem::Ext4, DEADLINE, |lab| {
        against_a_model(lab, Transport::Auto, 10_000, 20_261_120)
    });
}

#[test]
fn a_thousand_more_on_the_other_file_system() {
    Lab::run_long(FileSystem::Xfs, DEADLINE, |lab| {
        against_a_model(lab, Transport::Auto, 1_000, 20_261_121)
    });
}

/// Ten thousand of them run on any host: `client/tests/stream_path.rs`.
#[test]
fn a_thousand_random_operations_by_the_stream_path() {
    Lab::run_long(FileSystem::Xfs, DEADLINE, |lab| {
        against_a_model(lab, Transport::Stream, 1_000, 20_261_122)
    });
}

/// What would happen without the library's care: the device reports success and misplaces the data.
#[test]
fn a_raw_write_off_a_page_start_lands_elsewhere_and_reports_success() {
    Lab::run(FileSystem::Ext4, |lab| async move {
        lab.make_file("file", 8192);
        let session = lab.session().await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let mut buffer = session.buffer(64).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let key = pin.grant().segments[0];
        let (_, status) = session.raw_write(remote_slice(&key, 100, 64), buffer).await.unwrap();
        assert_eq!(status, CompletionStatus::Success);
        pin.unpin().await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        assert!(content[100..164].iter().all(|byte| *byte == 0), "nothing where it should be");
        assert!(content[..64].iter().all(|byte| *byte == 0xee), "all of it at the page's start");
    });
}
