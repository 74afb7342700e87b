//! Files so large that taking one back takes long: what is granted on them, and who feels it when a
//! local process wants one. The files are sparse, so they take no room; their regions do.
#![forbid(unsafe_code)]

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use pinfold_client::{Error, Pin, PinRequest, Reason, Session, Transport};
use pinfold_lab::{
    EXPORT, FileSystem, Lab, LeaseBreakTimeSet, Truncation, eventually, queue_pairs,
    read_by_another_process,
};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const PAGE: usize = 4096;

fn make_sparse(lab: &Lab, name: &str, len: u64) {
    File::create(lab.path(name)).unwrap().set_len(len).unwrap();
}

/// Of /proc/meminfo, in bytes.
fn memory(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// Read pins of the whole file, each by a session of its own.
async fn pin_by_sessions(lab: &Lab, name: &str, sessions: usize) -> Vec<(Session, Pin)> {
    let mut pins = Vec::new();
    for _ in 0..sessions {
        let session = lab.session().await;
        let began = Instant::now();
        let request = PinRequest::read(EXPORT, name).transport(Transport::Rdma);
        let pin = session.pin(request).await.unwrap();
        println!("{name} was pinned in {:?}", began.elapsed());
        pins.push((session, pin));
    }
    pins
}

async fn the_host_keeps_its_memory(lab: Lab) {
    // Long enough that only the memory counts.
    let _forever = LeaseBreakTimeSet::to(3600);
    make_sparse(&lab, "tebibyte", TIB);
    make_sparse(&lab, "some", 64 * GIB);
    let before = memory("MemAvailable");
    let (one, two) = (lab.session().await, lab.session().await);
    let request = || PinRequest::read(EXPORT, "tebibyte");
    let first = one.pin(request()).await.unwrap();
    let second = two.pin(request()).await.unwrap();
    let because = second.grant().no_rdma_because.clone().unwrap_or_default();
    assert!(because.contains("kernel memory"), "{because:?}");
    assert!(second.grant().segments.is_empty());
    let refused = two.pin(request().transport(Transport::Rdma)).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::QuotaExceeded), "{refused}");
    assert!(refused.to_string().contains("--region-memory-max-mib"), "{refused}");
    let left = memory("MemAvailable");
    println!("MemAvailable went from {} to {} MiB", before >> 20, left >> 20);
    assert!(left > memory("MemTotal") / 4, "{left}");
    // It reads all the same.
    let buffer = two.buffer(PAGE).await.unwrap();
    let (_, report) = second.read(TIB - PAGE as u64, PAGE, buffer).await.unwrap();
    assert_eq!(report.stream_bytes, PAGE as u64);
    drop(first);

    // What is given back can be had again.
    let mut pins = Vec::new();
    let refused = loop {
        let request = PinRequest::read(EXPORT, "some").transport(Transport::Rdma);
        match one.pin(request).await {
            Ok(pin) => pins.push(pin),
            Err(error) => break error,
        }
    };
    assert_eq!(refused.reason(), Some(Reason::QuotaExceeded), "{refused}");
    println!("64 GiB were pinned {} times", pins.len());
    pins.pop().unwrap().unpin().await.unwrap();
    let request = PinRequest::read(EXPORT, "some").transport(Transport::Rdma);
    two.pin(request).await.unwrap();
}

#[test]
fn pins_of_a_sparse_tebibyte_leave_the_host_its_memory() {
    Lab::run(FileSystem::Ext4, the_host_keeps_its_memory);
}

async fn no_more_than_can_be_given_back_in_time(lab: Lab) {
    let time = LeaseBreakTimeSet::to(2);
    make_sparse(&lab, "big", 64 * GIB);
    let session = lab.session().await;
    let mut pins = Vec::new();
    let refused = loop {
        let request = PinRequest::read(EXPORT, "big").transport(Transport::Rdma);
        match session.pin(request).await {
            Ok(pin) => pins.push(pin),
            Err(error) => break error,
        }
    };
    println!("64 GiB were pinned {} times: {refused}", pins.len());
    assert_eq!(refused.reason(), Some(Reason::QuotaExceeded), "{refused}");
    assert!(refused.to_string().contains("lease-break-time"), "{refused}");
    let served = session.pin(PinRequest::read(EXPORT, "big")).await.unwrap();
    let because = served.grant().no_rdma_because.clone().unwrap_or_default();
    assert!(because.contains("lease-break-time"), "{because}");
    // It is what is set now that counts.
    time.change(600);
    let request = PinRequest::read(EXPORT, "big").transport(Transport::Rdma);
    session.pin(request).await.unwrap();
}

#[test]
fn a_file_is_pinned_only_as_far_as_it_can_be_given_back_in_time() {
    Lab::run(FileSystem::Xfs, no_more_than_can_be_given_back_in_time);
}

/// Writes and commits, again and again. How often.
async fn write_and_commit(session: &Session, pin: &Pin, over: &AtomicBool) -> usize {
    let mut buffer = session.buffer(PAGE).await.unwrap();
    let mut rounds = 0;
    while !over.load(Ordering::Relaxed) {
        buffer.as_mut_slice().fill(rounds as u8);
        let (back, report) = pin.write(0, buffer, PAGE).await.unwrap();
        assert_eq!(report.rdma_bytes, PAGE as u64);
        pin.commit().await.unwrap();
        buffer = back;
        rounds += 1;
    }
    rounds
}

async fn nobody_else_is_hit(lab: &Lab, gib: u64, sessions: usize) {
    // Whether it would be granted is not what is asked here.
    let _long = LeaseBreakTimeSet::to(600);
    make_sparse(lab, "big", gib * GIB);
    lab.make_file("bystander", PAGE as u64);
    let holders = pin_by_sessions(lab, "big", sessions).await;
    let bystander = lab.session().await;
    let request = PinRequest::read_write(EXPORT, "bystander").transport(Transport::Rdma);
    let pin = bystander.pin(request).await.unwrap();
    let before = queue_pairs();
    let over = AtomicBool::new(false);
    let cutting = async {
        let began = Instant::now();
        Truncation::start(lab.path("big"), PAGE as i64).done().await;
        let took = began.elapsed();
        over.store(true, Ordering::Relaxed);
        took
    };
    let (rounds, took) = tokio::join!(write_and_commit(&bystander, &pin, &over), cutting);
    let record = lab.daemon.audit_record(&lab.path("big"));
    println!(
        "{gib} GiB by {sessions}: truncate took {took:?}, {rounds} commits beside it; {record}"
    );
    assert_eq!(record["failed_regions"], 0);
    assert_eq!(record["break_pending_at_release"], true, "{record}");
    for (_, pin) in &holders {
        let revoked = async || matches!(pin.check(), Err(Error::Revoked { .. }));
        eventually("the client is told", revoked).await;
    }
    let after = queue_pairs();
    for (number, state) in &before {
        assert_eq!(after.get(number), Some(state), "queue pair {number}: {after:?}");
    }
    assert!(!lab.daemon.has_logged("frozen"), "slow is not frozen");
    assert_eq!(read_by_another_process(&lab.path("big")).len(), PAGE);
}

#[test]
fn a_large_file_by_many_sessions_is_cut_and_nobody_else_is_hit() {
    for file_system in [FileSystem::Ext4, FileSystem::Xfs] {
        Lab::run(file_system, async |lab| nobody_else_is_hit(&lab, 64, 4).await);
    }
}

#[test]
fn a_larger_file_is_cut_and_nobody_else_is_hit() {
    for file_system in [FileSystem::Ext4, FileSystem::Xfs] {
        Lab::run(file_system, async |lab| nobody_else_is_hit(&lab, 200, 1).await);
    }
}
