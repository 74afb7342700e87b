//! The objects against a real device, both ends in one process.
//!
//! `cargo test -p pinfold-verbs --no-run`, then in the lab's VM (soft NIC, DAX file systems):
//! `cargo xtask vm run -- <the test binary> --ignored --test-threads=1`. The device is the first
//! with an active port, or `PINFOLD_TEST_DEVICE`.

use std::collections::BTreeSet;
use std::env;
use std::error::Error as _;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use pinfold_verbs::{
    Access, Atomic, Buffer, Completed, CompletionStatus, Connected, Device, Error, Gid, Lack, Lane,
    Memory, MemoryRegion, Mtu, Outcome, Piece, ProtectionDomain, QueuePair, QueuePairBuilder,
    QueuePairNumber, QueuePairState, RegistrationMode, RemoteSlice, SelfTestError, UnconnectedLane,
    devices, flush_test, self_test,
};

const PAGE: usize = 4096;

/// What a transfer may take under software emulation.
const DEADLINE: Duration = Duration::from_secs(5);

fn device() -> Device {
    match env::var("PINFOLD_TEST_DEVICE") {
        Ok(name) => Device::open(&name).unwrap(),
        Err(_) => Device::open_first().unwrap(),
    }
}

fn is_rxe(device: &Device) -> bool {
    device.name().starts_with("rxe")
}

/// rxe has on-demand paging from 6.15 on; so a kernel that changes this is noticed.
fn kernel_has_rxe_paging() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(|part| part.trim().parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap(), numbers.next().unwrap());
    version >= (6, 15)
}

fn lab_directory(variable: &str) -> PathBuf {
    let path = env::var_os(variable).unwrap_or_else(|| panic!("{variable} must name a directory"));
    PathBuf::from(path)
}

/// Anonymous memory with a byte that nobody writes here.
fn memory(len: usize) -> MmapRaw {
    let mut map = MmapMut::map_anon(len).unwrap();
    map.fill(0xee);
    MmapRaw::from(map)
}

/// The bytes as the processor sees them.
fn bytes(memory: &impl Memory) -> Vec<u8> {
    let at = |index| memory.as_ptr().wrapping_add(index);
    // SAFETY: within the memory, which the tests keep accessible.
    (0..memory.len()).map(|index| unsafe { at(index).read_volatile() }).collect()
}

struct Pair<T> {
    lane: Lane<T>,
    domain: ProtectionDomain,
    responder: QueuePair<Connected>,
}

impl<T: Send> Pair<T> {
    /// A lane in a domain of its own, connected to a queue pair in that one.
    fn new(target: &ProtectionDomain, depth: u32) -> Self {
        Self::allowing(Access::REMOTE_READ_WRITE, target, depth)
    }

    fn allowing(access: Access, target: &ProtectionDomain, depth: u32) -> Self {
        let device = target.device();
        let mtu = Mtu::largest_within(device.port().active_mtu_bytes).unwrap();
        let domain = ProtectionDomain::new(device).unwrap();
        let lane = UnconnectedLane::new(&domain, depth).unwrap();
        let responder = QueuePairBuilder::new(target).remote_access(access).build().unwrap();
        let (to_lane, to_responder) = (lane.endpoint(), responder.endpoint());
        let responder = responder.connect(&to_lane, mtu).unwrap();
        let lane = lane.connect(&to_responder, mtu).unwrap();
        Self { lane, domain, responder }
    }

    fn buffer(&self, content: &[u8]) -> Buffer {
        let mut buffer = Buffer::new(&self.domain, content.len()).unwrap();
        buffer.as_mut_slice().copy_from_slice(content);
        buffer
    }

    fn wait(&self) -> Completed<T> {
        let started = Instant::now();
        loop {
            if let Some(done) = self.lane.poll().unwrap() {
                return done;
            }
            assert!(started.elapsed() < DEADLINE, "an operation never ended");
            thread::yield_now();
        }
    }
}

impl Pair<()> {
    fn write(&self, content: &[u8], remote: RemoteSlice) -> Completed<()> {
        let piece = Piece { local: 0..content.len(), remote };
        self.lane.post_write(self.buffer(content), &[piece], ()).unwrap();
        self.wait()
    }

    fn read(&self, remote: RemoteSlice) -> Completed<()> {
        let piece = Piece { local: 0..remote.len, remote };
        self.lane.post_read(self.buffer(&vec![0; remote.len]), &[piece], ()).unwrap();
        self.wait()
    }
}

/// A range of the region, or beyond it.
fn slice<M: Memory>(region: &MemoryRegion<M>, offset: usize, len: usize) -> RemoteSlice {
    let address = region.remote_address() + offset as u64;
    RemoteSlice { address, key: region.remote_key(), len }
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn the_device_says_what_it_is() {
    let device = device();
    assert!(devices().unwrap().iter().any(|name| name.as_str() == device.name()));
    let port = device.port();
    assert_eq!(device.query_port().unwrap(), port);
    assert!(Mtu::from_bytes(port.active_mtu_bytes).is_some(), "{port:?}");
    assert!(port.max_message_bytes >= 1 << 20, "{port:?}");
    let capabilities = device.capabilities();
    assert!(capabilities.max_qp_wr >= 64 && capabilities.max_mr_size >= 1 << 30);
    assert!(capabilities.max_qp_rd_atom >= 1 && capabilities.max_qp_init_rd_atom >= 1);
    assert_ne!(capabilities.page_size_cap & PAGE as u64, 0);
    println!("{device:?} {port:?} {:?} {capabilities:?}", device.address().unwrap());
    if is_rxe(&device) {
        assert_eq!(capabilities.odp.is_usable(), kernel_has_rxe_paging());
        assert!(device.address().unwrap().gid.ip().is_ipv4(), "the IPv4 one, not the first");
    }
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn an_absent_device_is_answered_with_those_present() {
    let error = Device::open("rxe_of_nobody").unwrap_err();
    assert!(error.to_string().contains(device().name()), "{error}");
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn the_self_test_finds_no_quirk_in_pinned_memory() {
    let report = self_test(&device(), RegistrationMode::Pinned).unwrap();
    println!("{report:#?}");
    assert!(report.quirks.allow_any_message(), "{}", report.quirks);
    assert!(report.checks.iter().all(|check| check.outcome == Outcome::Holds));
    assert!(report.elapsed < Duration::from_secs(2), "{:?}", report.elapsed);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn the_self_test_finds_the_quirks_of_rxe_on_demand() {
    let device = device();
    let found = self_test(&device, RegistrationMode::OnDemand);
    if is_rxe(&device) && !kernel_has_rxe_paging() {
        let error = found.unwrap_err();
        println!("{error}");
        assert!(matches!(error, SelfTestError::NoOnDemandPaging { .. }), "{error}");
        assert!(error.to_string().contains("6.15"), "the remedy: {error}");
        return;
    }
    let report = found.unwrap();
    println!("{report:#?}");
    assert!(report.elapsed < Duration::from_secs(2), "{:?}", report.elapsed);
    if is_rxe(&device) {
        assert_eq!(report.quirks.start_alignment_bytes, 4096);
        assert_eq!(report.quirks.path_mtu_bytes, Some(4096));
        assert_eq!(report.quirks.max_region_bytes, (2 << 30) - 4096);
    }
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn atomics_change_eight_bytes_as_one_step_and_bring_what_was_there() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let access = Access { remote_atomic: true, ..Access::REMOTE_READ_WRITE };
    let region = target.register_pinned(memory(PAGE), 0..PAGE, access).unwrap();
    let pair = Pair::allowing(access, &target, 4);
    let there = u64::from_ne_bytes([0xee; 8]);
    let word = slice(&region, 8, 8);
    let asked = |atomic| {
        pair.lane.post_atomic(pair.buffer(&[0; 8]), word, atomic, ()).unwrap();
        let done = pair.wait();
        assert!(done.status.is_success(), "{atomic:?}: {}", done.status);
        u64::from_ne_bytes(done.buffer.as_slice().try_into().unwrap())
    };
    assert_eq!(asked(Atomic::FetchAdd(5)), there);
    assert_eq!(asked(Atomic::CompareSwap { expected: there, new: 7 }), there + 5);
    assert_eq!(asked(Atomic::CompareSwap { expected: there + 5, new: 7 }), there + 5);
    assert_eq!(asked(Atomic::FetchAdd(0)), 7);
    let content = bytes(region.memory());
    assert!(content[..8].iter().chain(&content[16..]).all(|byte| *byte == 0xee));

    let refused = |remote| {
        let post = pair.lane.post_atomic(pair.buffer(&[0; 8]), remote, Atomic::FetchAdd(1), ());
        post.unwrap_err().error
    };
    assert!(matches!(refused(slice(&region, 4, 8)), Error::MisalignedAtomic { .. }));
    assert!(matches!(refused(slice(&region, 8, 16)), Error::PieceLengthsDiffer { .. }));
}

/// That of Debian 12 knows this one already.
#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn an_atomic_write_replaces_eight_bytes_and_nothing_else() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let pair = Pair::new(&target, 2);
    assert_eq!(pair.lane.no_atomic_write_because(), None);
    let word = slice(&region, 16, 8);
    pair.lane.post_atomic(pair.buffer(&[1; 8]), word, Atomic::Write(77), ()).unwrap();
    let done = pair.wait();
    assert!(done.status.is_success(), "{}", done.status);
    assert_eq!(done.buffer.as_slice(), [1; 8], "the buffer has no part in it");
    let content = bytes(region.memory());
    assert_eq!(content[16..24], 77_u64.to_ne_bytes());
    assert!(content[..16].iter().chain(&content[24..]).all(|byte| *byte == 0xee));

    let misplaced = slice(&region, 12, 8);
    let post = pair.lane.post_atomic(pair.buffer(&[0; 8]), misplaced, Atomic::Write(1), ());
    assert!(matches!(post.unwrap_err().error, Error::MisalignedAtomic { .. }));
    assert_eq!(pair.lane.free_slots(), 2);
    let reading = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ).unwrap();
    let word = slice(&reading, 16, 8);
    pair.lane.post_atomic(pair.buffer(&[0; 8]), word, Atomic::Write(1), ()).unwrap();
    assert_eq!(pair.wait().status, CompletionStatus::RemoteAccess);
}

/// The MTU of the loopback interface, put back at the end.
struct LoopbackMtu(String);

impl LoopbackMtu {
    fn set(bytes: u32) -> Self {
        let was = std::fs::read_to_string("/sys/class/net/lo/mtu").unwrap();
        std::fs::write("/sys/class/net/lo/mtu", bytes.to_string()).unwrap();
        Self(was)
    }
}

impl Drop for LoopbackMtu {
    fn drop(&mut self) {
        std::fs::write("/sys/class/net/lo/mtu", &self.0).unwrap();
    }
}

/// Which rdma-core this runs on, the lab says: with that of Debian 12, 44, there is none.
#[test]
#[ignore = "needs an RDMA device and an old rdma-core: cargo xtask vm test loopback"]
fn an_old_rdma_core_has_no_flush_and_that_is_said() {
    let device = device();
    let why = flush_test(&device).unwrap_err().to_string();
    let said = format!(
        "RDMA device {} can't be used for RDMA FLUSH: this host's libibverbs or its provider can't \
         ask for it (rdma-core 45 or newer can, for soft RoCE)",
        device.name()
    );
    assert_eq!(why, said);
    let target = ProtectionDomain::new(&device).unwrap();
    let pair = Pair::new(&target, 1);
    assert_eq!(pair.lane.no_flush_because(), Some(Lack::Library));
    let remote = RemoteSlice { address: 4096, key: 1.into(), len: 8 };
    let refused = pair.lane.post_flush(pair.buffer(&[0; 8]), &[remote], ()).unwrap_err();
    assert_eq!(refused.error.to_string(), said);
    assert_eq!(pair.lane.free_slots(), 1);
}

#[test]
#[ignore = "needs the lab, whose network it changes: cargo xtask vm test loopback"]
fn without_a_path_mtu_of_a_page_rxe_on_demand_is_refused() {
    lab_directory("PINFOLD_LAB_EXT4");
    let _lo = LoopbackMtu::set(1500);
    let device = device();
    assert_eq!(device.port().active_mtu_bytes, 1024);
    let report = self_test(&device, RegistrationMode::Pinned).unwrap();
    assert!(report.quirks.allow_any_message(), "{}", report.quirks);
    if kernel_has_rxe_paging() {
        let error = self_test(&device, RegistrationMode::OnDemand).unwrap_err();
        println!("{error}");
        assert!(matches!(error, SelfTestError::Misplaced { .. }), "{error}");
        assert!(error.to_string().contains("at least 4200"), "the remedy: {error}");
    }
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn the_device_is_open_above_the_files_to_come() {
    let device = device();
    let file = File::open("/proc/self/exe").unwrap();
    let (file, device) = (file.as_fd().as_raw_fd(), device.as_fd().as_raw_fd());
    assert!(device > file + 500, "device {device}, file {file}");
    let link = std::fs::read_link(format!("/proc/self/fd/{device}")).unwrap();
    assert!(link.starts_with("/dev/infiniband"), "{link:?}");
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn writes_and_reads_reach_their_bytes() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let access = Access::REMOTE_READ_WRITE;
    let region = target.register_pinned(memory(4 * PAGE), 0..4 * PAGE, access).unwrap();
    let pair = Pair::new(&target, 8);

    let content: Vec<u8> = (0..=255).cycle().take(9000).collect();
    let done = pair.write(&content, slice(&region, 333, 9000));
    assert!(done.status.is_success(), "{}", done.status);
    assert_eq!(done.bytes, 9000);
    let seen = bytes(region.memory());
    assert_eq!(&seen[333..9333], content);
    assert!(seen[..333].iter().chain(&seen[9333..]).all(|byte| *byte == 0xee));

    let done = pair.read(slice(&region, 300, 9100));
    assert_eq!(done.buffer.as_slice(), &seen[300..9400]);
    assert_eq!(done.bytes, 9100);

    // Three pieces of one buffer to three places: one operation.
    let pieces = [(0..100, 4 * PAGE - 100), (100..101, 0), (4000..5000, 12000)].map(
        |(local, offset): (std::ops::Range<usize>, usize)| Piece {
            remote: slice(&region, offset, local.len()),
            local,
        },
    );
    pair.lane.post_write(pair.buffer(&content), &pieces, ()).unwrap();
    let done = pair.wait();
    assert_eq!((done.status, done.bytes), (CompletionStatus::Success, 1101));
    assert_eq!(pair.lane.free_slots(), 8);
    let seen = bytes(region.memory());
    assert_eq!(&seen[4 * PAGE - 100..], &content[..100]);
    assert_eq!(seen[0], content[100]);
    assert_eq!(&seen[12000..13000], &content[4000..5000]);
    let memory = region.deregister().unwrap();
    assert_eq!(bytes(&memory), seen);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_write_and_its_proof_are_one_operation() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let access = Access::REMOTE_READ_WRITE;
    let region = target.register_pinned(memory(4 * PAGE), 0..4 * PAGE, access).unwrap();
    let pair = Pair::new(&target, 3);
    let probe = slice(&region, 0, 8);
    let content: Vec<u8> = (0..=255).cycle().take(2 * PAGE).collect();
    let pieces = |len| {
        let at = |index| index * PAGE..index * PAGE + len;
        [0, 1].map(|index| Piece { local: at(index), remote: slice(&region, index * PAGE, len) })
    };
    // One that travels with its request, and one that does not.
    for len in [8, PAGE] {
        let buffer = pair.buffer(&content);
        pair.lane.post_write_proven(buffer, &pieces(len), probe, ()).unwrap();
        let done = pair.wait();
        assert_eq!((done.status, done.bytes), (CompletionStatus::Success, 2 * len));
        assert_eq!(done.buffer.as_slice(), content, "the probe reads to another place");
        assert_eq!(pair.lane.free_slots(), 3);
        assert!(pair.lane.poll().unwrap().is_none(), "one operation has ended twice");
        let seen = bytes(region.memory());
        assert_eq!(seen[..len], content[..len]);
        assert_eq!(seen[PAGE..PAGE + len], content[PAGE..PAGE + len]);
    }

    // The proof has to succeed, too.
    let beyond = slice(&region, 4 * PAGE, 8);
    let buffer = pair.buffer(&[7; 8]);
    let piece = [Piece { local: 0..8, remote: slice(&region, 0, 8) }];
    let nine = slice(&region, 0, 9);
    let refused = pair.lane.post_write_proven(buffer, &piece, nine, ()).unwrap_err();
    assert!(matches!(refused.error, Error::PieceTooLong { piece: 1, len: 9, limit: 8 }));
    pair.lane.post_write_proven(refused.buffer, &piece, beyond, ()).unwrap();
    let done = pair.wait();
    assert_eq!((done.status, done.bytes), (CompletionStatus::RemoteAccess, 0));
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn one_byte_too_many_is_refused_and_the_lane_is_lost() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let access = Access::REMOTE_READ_WRITE;
    let region = target.register_pinned(memory(4 * PAGE), 100..433, access).unwrap();
    assert_eq!(region.len(), 333);
    let pair = Pair::new(&target, 4);
    assert!(pair.write(&[1; 333], slice(&region, 0, 333)).status.is_success());
    let before = bytes(region.memory());

    // Behind the bad one, a good one in flight: it is flushed.
    let remote = slice(&region, 0, 334);
    let bad = Piece { local: 0..334, remote };
    pair.lane.post_write(pair.buffer(&[2; 334]), &[bad], ()).unwrap();
    let good = Piece { local: 0..333, remote: slice(&region, 0, 333) };
    pair.lane.post_write(pair.buffer(&[3; 333]), std::slice::from_ref(&good), ()).unwrap();
    assert_eq!(pair.wait().status, CompletionStatus::RemoteAccess);
    assert_eq!(pair.wait().status, CompletionStatus::Flushed);
    assert_eq!(pair.lane.queue_pair().query_state().unwrap(), QueuePairState::Error);

    // And what is posted later comes back, too: nothing hangs.
    let done = pair.write(&[4; 333], slice(&region, 0, 333));
    assert_eq!((done.status, done.bytes), (CompletionStatus::Flushed, 0));
    assert_eq!(pair.lane.free_slots(), 4);
    assert_eq!(bytes(region.memory()), before);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_key_dies_with_its_region() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let access = Access::REMOTE_READ_WRITE;
    let region = target.register_pinned(memory(PAGE), 0..PAGE, access).unwrap();
    let pair = Pair::new(&target, 4);
    let remote = slice(&region, 0, PAGE);
    assert!(pair.write(&[1; PAGE], remote).status.is_success());
    let memory = region.deregister().unwrap();
    assert_eq!(pair.write(&[2; PAGE], remote).status, CompletionStatus::RemoteAccess);
    assert_eq!(bytes(&memory), [1; PAGE]);

    // The same by dropping.
    let region = target.register_pinned(memory, 0..PAGE, access).unwrap();
    let remote = slice(&region, 0, PAGE);
    drop(region);
    let pair = Pair::new(&target, 4);
    assert_eq!(pair.read(remote).status, CompletionStatus::RemoteAccess);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_key_is_refused_on_a_queue_pair_of_another_domain() {
    let device = device();
    let (target, other) =
        (ProtectionDomain::new(&device).unwrap(), ProtectionDomain::new(&device).unwrap());
    let access = Access::REMOTE_READ_WRITE;
    let region = target.register_pinned(memory(PAGE), 0..PAGE, access).unwrap();
    let pair = Pair::new(&other, 4);
    let done = pair.write(&[1; PAGE], slice(&region, 0, PAGE));
    assert_eq!(done.status, CompletionStatus::RemoteAccess);
    assert_eq!(bytes(region.memory()), [0xee; PAGE]);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_destroyed_queue_pair_answers_nobody() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let Pair { lane, domain, responder } = Pair::new(&target, 4);
    responder.destroy().unwrap();
    let buffer = Buffer::new(&domain, PAGE).unwrap();
    let piece = Piece { local: 0..PAGE, remote: slice(&region, 0, PAGE) };
    lane.post_write(buffer, &[piece], ()).unwrap();
    // The peer is silent, so it would take some 15 seconds; giving up brings it back at once.
    assert!(lane.poll().unwrap().is_none());
    lane.abort().unwrap();
    let pair = Pair { lane, domain, responder: Pair::<()>::new(&target, 1).responder };
    assert_eq!(pair.wait().status, CompletionStatus::Flushed);
    assert_eq!(bytes(region.memory()), [0xee; PAGE]);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_region_for_reading_can_not_be_written() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ).unwrap();
    let pair = Pair::new(&target, 4);
    assert!(pair.read(slice(&region, 0, PAGE)).status.is_success());
    let done = pair.write(&[1; 8], slice(&region, 0, 8));
    assert_eq!(done.status, CompletionStatus::RemoteAccess);
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_refused_post_gives_everything_back() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let pair: Pair<&str> = Pair::new(&target, 2);
    let piece = || Piece { local: 0..8, remote: slice(&region, 0, 8) };

    let three = [piece(), piece(), piece()];
    let refused = pair.lane.post_write(pair.buffer(&[7; 8]), &three, "three").unwrap_err();
    assert!(matches!(refused.error, Error::QueueFull { pieces: 3, free: 2, depth: 2 }));
    assert_eq!((refused.tag, refused.buffer.as_slice()), ("three", &[7; 8][..]));

    let foreign = Buffer::new(&target, 8).unwrap();
    let refused = pair.lane.post_write(foreign, &[piece()], "foreign").unwrap_err();
    assert!(matches!(refused.error, Error::ForeignBuffer));

    let beyond = Piece { local: 1..9, ..piece() };
    let refused = pair.lane.post_read(refused_by(&pair), &[beyond], "beyond").unwrap_err();
    assert!(matches!(
        refused.error,
        Error::PieceOutOfBounds { piece: 0, start: 1, end: 9, len: 8 }
    ));

    // None of it took a slot.
    assert_eq!(pair.lane.free_slots(), 2);
    pair.lane.post_write(refused.buffer, &[piece(), piece()], "good").unwrap();
    assert_eq!(pair.wait().tag, "good");
}

fn refused_by(pair: &Pair<&str>) -> Buffer {
    let mut buffer = pair.buffer(&[0; 8]);
    assert!(buffer.capacity() >= PAGE);
    buffer.set_len(PAGE).unwrap();
    assert!(matches!(buffer.set_len(usize::MAX), Err(Error::BufferTooSmall { .. })));
    buffer.set_len(8).unwrap();
    buffer
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_lane_may_be_dropped_with_operations_in_flight() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let len = 1 << 20;
    let region = target.register_pinned(memory(len), 0..len, Access::REMOTE_READ_WRITE).unwrap();
    for _ in 0..3 {
        let pair = Pair::new(&target, 8);
        let tag = std::sync::Arc::new(());
        for _ in 0..8 {
            let buffer = Buffer::new(&pair.domain, len).unwrap();
            let piece = Piece { local: 0..len, remote: slice(&region, 0, len) };
            pair.lane.post_write(buffer, &[piece], std::sync::Arc::clone(&tag)).unwrap();
        }
        drop(pair);
        assert_eq!(std::sync::Arc::strong_count(&tag), 1, "tags are dropped with the lane");
    }
    // The queue pair's end was a barrier: nothing changes any more.
    let seen = bytes(region.memory());
    thread::sleep(Duration::from_millis(50));
    assert!(seen == bytes(region.memory()));
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_connect_may_be_tried_again() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let port = target.device().port();
    let mtu = Mtu::largest_within(port.active_mtu_bytes).unwrap();
    let domain = ProtectionDomain::new(target.device()).unwrap();
    let lane = UnconnectedLane::new(&domain, 1).unwrap();
    let responder = QueuePairBuilder::new(&target).build().unwrap();
    assert_eq!(responder.query_state().unwrap(), QueuePairState::Init);
    let (to_lane, to_responder) = (lane.endpoint(), responder.endpoint());

    let mut small = to_responder;
    small.path_mtu_bytes = 512;
    let failed = lane.connect::<()>(&small, Mtu::Mtu1024).unwrap_err();
    assert!(matches!(failed.error, Error::PathMtuTooLarge { asked: 1024, limit: 512, .. }));
    let mut nobody = to_responder;
    nobody.gid = Gid::default();
    let failed = failed.lane.connect::<()>(&nobody, mtu).unwrap_err();
    assert!(matches!(failed.error, Error::BadEndpoint { .. }));
    // An address of another family than ours: the kernel refuses it.
    nobody.gid = std::net::Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 77).into();
    nobody.queue_pair_number = QueuePairNumber::new(17);
    let started = Instant::now();
    let failed = failed.lane.connect::<()>(&nobody, mtu).unwrap_err();
    println!("{} ({:?}) after {:?}", failed.error, failed.error.source(), started.elapsed());
    assert!(matches!(failed.error, Error::ModifyQueuePair { .. }), "{}", failed.error);

    let responder = responder.connect(&to_lane, mtu).unwrap();
    let lane: Lane<()> = failed.lane.connect(&to_responder, mtu).unwrap();
    assert_eq!(lane.queue_pair().query_state().unwrap(), QueuePairState::ReadyToSend);
    assert_eq!(lane.queue_pair().path_mtu(), mtu);
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let pair = Pair { lane, domain, responder };
    assert!(pair.write(&[5; 100], slice(&region, 7, 100)).status.is_success());
    assert_eq!(&bytes(region.memory())[6..108][..3], &[0xee, 5, 5]);
}

#[tokio::test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
async fn a_waiting_task_is_woken() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let pair: Pair<u32> = Pair::new(&target, 4);
    let piece = [Piece { local: 0..64, remote: slice(&region, 0, 64) }];

    // Waiting before the post, and a wait that is given up, lose nothing.
    let idle = tokio::time::timeout(Duration::from_millis(20), pair.lane.next_completion());
    assert!(idle.await.is_err());
    for round in 0..50 {
        let mut buffer = pair.buffer(&[0; 64]);
        let wait = async { pair.lane.next_completion().await.unwrap() };
        let post = async {
            tokio::task::yield_now().await;
            buffer.as_mut_slice().fill(u8::try_from(round).unwrap());
            pair.lane.post_write(buffer, &piece, round).unwrap();
        };
        let both = async { tokio::join!(wait, post).0 };
        let done = tokio::time::timeout(DEADLINE, both).await.expect("woken");
        assert_eq!((done.tag, done.status), (round, CompletionStatus::Success));
        assert_eq!(bytes(region.memory())[..64], [u8::try_from(round).unwrap(); 64]);
    }

    // A failed lane wakes as well.
    pair.lane.abort().unwrap();
    pair.lane.post_write(pair.buffer(&[0; 64]), &piece, 99).unwrap();
    let done = tokio::time::timeout(DEADLINE, pair.lane.next_completion()).await;
    assert_eq!(done.expect("woken").unwrap().status, CompletionStatus::Flushed);
}

#[tokio::test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
async fn no_completion_is_missed_whenever_it_comes() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let pair: Pair<u32> = Pair::new(&target, 1);
    let piece = [Piece { local: 0..64, remote: slice(&region, 0, 64) }];
    let mut buffer = pair.buffer(&[0; 64]);
    // The completion falls before the first look, between it and the arming, or after.
    for round in 0..2000 {
        pair.lane.post_write(buffer, &piece, round).unwrap();
        let posted = Instant::now();
        while posted.elapsed() < Duration::from_micros(u64::from(round % 400)) {}
        let done = tokio::time::timeout(DEADLINE, pair.lane.next_completion()).await;
        buffer = done.unwrap_or_else(|_| panic!("missed in round {round}")).unwrap().buffer;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
async fn each_operation_goes_to_one_of_several_waiting_tasks() {
    const OPERATIONS: u32 = 200;
    let target = ProtectionDomain::new(&device()).unwrap();
    let region = target.register_pinned(memory(PAGE), 0..PAGE, Access::REMOTE_READ_WRITE).unwrap();
    let pair: Pair<u32> = Pair::new(&target, 8);
    let buffers: Vec<Buffer> = (0..8).map(|_| pair.buffer(&[1; 64])).collect();
    let piece = Piece { local: 0..64, remote: slice(&region, 0, 64) };
    let lane = std::sync::Arc::new(pair.lane);
    for (tag, buffer) in (0..).zip(buffers) {
        lane.post_write(buffer, std::slice::from_ref(&piece), tag).unwrap();
    }
    let (finished, mut all) = tokio::sync::mpsc::unbounded_channel();
    let next = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(8));
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let (lane, piece) = (std::sync::Arc::clone(&lane), piece.clone());
            let (finished, next) = (finished.clone(), std::sync::Arc::clone(&next));
            tokio::spawn(async move {
                loop {
                    let done = lane.next_completion().await.unwrap();
                    assert!(done.status.is_success(), "{}", done.status);
                    finished.send(done.tag).unwrap();
                    let tag = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    if tag < OPERATIONS {
                        let pieces = std::slice::from_ref(&piece);
                        lane.post_write(done.buffer, pieces, tag).unwrap();
                    }
                }
            })
        })
        .collect();
    // A poll in between steals some, and leaves none behind.
    let mut seen = BTreeSet::new();
    let collect = async {
        while seen.len() < OPERATIONS as usize {
            if let Some(done) = lane.poll().unwrap() {
                assert!(seen.insert(done.tag));
                let tag = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if tag < OPERATIONS {
                    lane.post_write(done.buffer, std::slice::from_ref(&piece), tag).unwrap();
                }
            }
            while let Ok(tag) = all.try_recv() {
                assert!(seen.insert(tag), "operation {tag} came twice");
            }
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
    };
    tokio::time::timeout(4 * DEADLINE, collect).await.expect("all operations end");
    tasks.iter().for_each(tokio::task::JoinHandle::abort);
    assert_eq!(seen, (0..OPERATIONS).collect());
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn waiting_needs_a_runtime() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let pair: Pair<()> = Pair::new(&target, 1);
    let mut wait = Box::pin(pair.lane.next_completion());
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let poll = std::future::Future::poll(wait.as_mut(), &mut context);
    assert!(matches!(poll, std::task::Poll::Ready(Err(Error::NoRuntime))));
}

#[test]
#[ignore = "needs an RDMA device and DAX file systems: cargo xtask vm test loopback"]
fn a_dax_file_is_registered_on_demand_and_never_pinned() {
    let device = device();
    let target = ProtectionDomain::new(&device).unwrap();
    let access = Access::REMOTE_READ_WRITE;
    for variable in ["PINFOLD_LAB_EXT4", "PINFOLD_LAB_XFS"] {
        let path = lab_directory(variable).join(format!("verbs-{}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        std::io::Write::write_all(&mut &file, &[0xee; 4 * PAGE]).unwrap();
        file.sync_all().unwrap();
        let map = MmapOptions::new().len(4 * PAGE).map_raw(&file).unwrap();

        let refused = target.register_pinned(map, 0..4 * PAGE, access).unwrap_err();
        assert!(matches!(refused.error(), Error::PinRefused { .. }), "{refused}");
        assert!(refused.to_string().contains("DAX"), "{refused}");
        assert!(refused.source().is_some());
        let map = refused.into_memory();

        let registered = target.register_on_demand(map, 0..4 * PAGE, access);
        if !device.capabilities().odp.supported {
            let refused = registered.unwrap_err();
            assert!(matches!(refused.error(), Error::NoOnDemandPaging { .. }), "{refused}");
            std::fs::remove_file(path).unwrap();
            continue;
        }
        let region = registered.unwrap();
        assert!(region.is_on_demand());
        let pair = Pair::new(&target, 4);
        assert_eq!(pair.lane.queue_pair().path_mtu(), Mtu::Mtu4096, "rxe misplaces with another");
        let content: Vec<u8> = (0..=250).cycle().take(2 * PAGE + 17).collect();
        let done = pair.write(&content, slice(&region, PAGE, content.len()));
        assert!(done.status.is_success(), "{}", done.status);
        drop(region.deregister().unwrap());
        let seen = std::fs::read(&path).unwrap();
        assert_eq!(&seen[PAGE..PAGE + content.len()], content);
        assert!(seen[..PAGE].iter().chain(&seen[PAGE + content.len()..]).all(|b| *b == 0xee));
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn a_region_must_lie_within_its_memory() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let refused = target.register_pinned(memory(PAGE), 1..PAGE + 1, Access::LOCAL).unwrap_err();
    assert!(matches!(refused.error(), Error::RangeOutOfBounds { .. }));
    assert_eq!(Memory::len(&refused.into_memory()), PAGE);
    let refused = Buffer::new(&target, 0).unwrap_err();
    assert!(matches!(refused, Error::RangeOutOfBounds { .. }), "{refused}");
}

#[test]
#[ignore = "needs an RDMA device: cargo xtask vm test loopback"]
fn memory_that_can_not_be_written_can_not_be_pinned_for_writing() {
    let target = ProtectionDomain::new(&device()).unwrap();
    let file = File::open("/proc/self/exe").unwrap();
    let map = MmapOptions::new().len(PAGE).map_raw_read_only(&file).unwrap();
    let refused = target.register_pinned(map, 0..PAGE, Access::REMOTE_READ_WRITE).unwrap_err();
    assert!(matches!(refused.error(), Error::PinFault { .. }), "{refused} {:?}", refused.source());
}
