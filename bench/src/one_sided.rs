//! One-sided writes and reads through the client library, beside the same in C.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pinfold_client::{Buffer, Pin, Session, Transport};
use pinfold_verbs::{
    Device, Endpoint, Gid, Lane, Mtu, Piece, ProtectionDomain, QueuePairNumber, RemoteKey,
    RemoteSlice, UnconnectedLane,
};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::Run;
use crate::peer::Peer;
use crate::perftest;
use crate::place::{Storage, several_threads, text};
use crate::report::Goal;
use crate::turns::alternate;

/// Of each file; bandwidths go round in it.
const FILE_BYTES: usize = 16 << 20;

/// Transfers in flight where bandwidth is measured.
const DEPTH: usize = 16;

/// What a round of a bandwidth carries, or more. Rounds are short: what disturbs the machine disturbs
/// few of them, and of those the median knows nothing.
const ROUND_BYTES: usize = 1 << 20;

/// Transfers in a round, one after the other.
const ROUND_TRANSFERS: u64 = 50;

/// Each is two processes.
const PERFTEST_ROUNDS_MAX: usize = 11;

const PAGE: usize = 4096;

const KIB: usize = 1 << 10;

const C_ASLEEP: &str = "C on libibverbs, asleep between completions, as we are";
const C_POLLS: &str = "C on libibverbs, polls without end";
const IB_WRITE_BW: &str = "ib_write_bw --odp --mmap, polls without end";

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum What {
    Write,
    Read,
}

/// How the C program waits for completions.
#[derive(Clone, Copy, Debug)]
enum How {
    Asleep,
    Polls,
}

/// The transfers of a round, the same on both sides.
#[derive(Clone, Copy, Debug)]
struct Job {
    what: What,
    bytes: usize,
    depth: usize,
    count: u64,
}

/// The client library, with a pin.
struct Ours {
    // Dropped in this order: the pin goes with its session, the session with the runtime.
    pin: Arc<Pin>,
    buffers: Vec<Buffer>,
    _session: Session,
    runtime: Runtime,
}

/// A C program, and the one that it writes to.
struct Theirs {
    initiator: Peer,
    _target: Peer,
}

/// What the client library stands on, beside the same target in C.
struct Bare {
    lane: Lane<()>,
    buffer: Option<pinfold_verbs::Buffer>,
    address: u64,
    key: RemoteKey,
    runtime: Runtime,
    _target: Peer,
}

/// Bandwidth and latency of writes and of reads.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let mut theirs = Theirs::start(run.storage)?;
    through_the_library(run, &mut theirs)?;
    beside_perftest(run)?;
    by_one_thread(run, &mut theirs)?;
    without_the_library(run, &mut theirs)
}

fn through_the_library(run: &mut Run<'_>, theirs: &mut Theirs) -> Result<()> {
    let mut ours = Ours::start(run.storage, several_threads()?, "several")?;
    let sizes = [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB];
    for what in [What::Write, What::Read] {
        for bytes in run.pick(&sizes, &[4 * KIB, 64 * KIB]) {
            let job = Job::bandwidth(what, *bytes);
            let name = format!("{}_bandwidth/{}", what.word(), size(*bytes));
            let pairs = alternate(
                run.rounds,
                || Ok(job.mb_per_s(ours.time(job)?)),
                || Ok(job.mb_per_s(theirs.time(job, How::Asleep)?)),
            )?;
            run.add(name, C_ASLEEP, "MB/s", &pairs, Goal::AtLeast(0.98));
        }
        for bytes in latency_sizes(run) {
            let job = Job::latency(what, *bytes);
            let name = format!("{}_latency/{}", what.word(), size(*bytes));
            let sides =
                [(C_ASLEEP, How::Asleep, Goal::AtMost(1.05)), (C_POLLS, How::Polls, Goal::None)];
            for (peer, how, goal) in sides {
                let pairs = alternate(
                    run.rounds,
                    || Ok(job.microseconds(ours.time(job)?)),
                    || Ok(job.microseconds(theirs.time(job, how)?)),
                )?;
                run.add(name.clone(), peer, "us", &pairs, goal);
            }
        }
    }
    Ok(())
}

/// What everybody measures with. It polls, which the library does not yet.
fn beside_perftest(run: &mut Run<'_>) -> Result<()> {
    let mut ours = Ours::start(run.storage, several_threads()?, "beside-perftest")?;
    run.storage.foreign_file("perftest", FILE_BYTES)?;
    for bytes in run.pick(&[4 * KIB, 64 * KIB, 1024 * KIB], &[64 * KIB]) {
        let job = Job::bandwidth(What::Write, *bytes);
        let pairs = alternate(
            run.rounds.min(PERFTEST_ROUNDS_MAX),
            || Ok(job.mb_per_s(ours.time(job)?)),
            || perftest::write_bandwidth(run.storage, *bytes, DEPTH),
        )?;
        let name = format!("write_bandwidth/{}", size(*bytes));
        run.add(name, IB_WRITE_BW, "MB/s", &pairs, Goal::AtLeast(0.98));
    }
    Ok(())
}

/// The library where the application has a runtime of one thread: what waking other threads costs.
fn by_one_thread(run: &mut Run<'_>, theirs: &mut Theirs) -> Result<()> {
    let mut ours = Ours::start(run.storage, one_thread()?, "one")?;
    for bytes in latency_sizes(run) {
        let job = Job::latency(What::Write, *bytes);
        let pairs = alternate(
            run.rounds,
            || Ok(job.microseconds(ours.time(job)?)),
            || Ok(job.microseconds(theirs.time(job, How::Asleep)?)),
        )?;
        run.add(
            format!("write_latency_one_thread/{}", size(*bytes)),
            C_ASLEEP,
            "us",
            &pairs,
            Goal::None,
        );
    }
    let job = Job::bandwidth(What::Write, 4 * KIB);
    let pairs = alternate(
        run.rounds,
        || Ok(job.mb_per_s(ours.time(job)?)),
        || Ok(job.mb_per_s(theirs.time(job, How::Asleep)?)),
    )?;
    run.add("write_bandwidth_one_thread/4 KiB".to_owned(), C_ASLEEP, "MB/s", &pairs, Goal::None);
    Ok(())
}

/// What of the library's time is that of the verbs crate beneath it.
fn without_the_library(run: &mut Run<'_>, theirs: &mut Theirs) -> Result<()> {
    let mut bare = Bare::start(run.storage)?;
    for bytes in latency_sizes(run) {
        let job = Job::latency(What::Write, *bytes);
        let pairs = alternate(
            run.rounds,
            || Ok(job.microseconds(bare.time(job)?)),
            || Ok(job.microseconds(theirs.time(job, How::Asleep)?)),
        )?;
        run.add(
            format!("write_latency_bare_lane/{}", size(*bytes)),
            C_ASLEEP,
            "us",
            &pairs,
            Goal::None,
        );
    }
    Ok(())
}

fn latency_sizes(run: &Run<'_>) -> &'static [usize] {
    run.pick(&[8, 4 * KIB, 16 * KIB, 64 * KIB], &[8, 64 * KIB])
}

fn one_thread() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// For people.
fn size(bytes: usize) -> String {
    match bytes {
        0..KIB => format!("{bytes} B"),
        _ => format!("{} KiB", bytes / KIB),
    }
}

impl What {
    fn word(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

impl Job {
    fn bandwidth(what: What, bytes: usize) -> Self {
        let count = (ROUND_BYTES / bytes).max(DEPTH) as u64;
        Self { what, bytes, depth: DEPTH, count }
    }

    fn latency(what: What, bytes: usize) -> Self {
        Self { what, bytes, depth: 1, count: ROUND_TRANSFERS }
    }

    /// Each begins on a page, as soft-RoCE needs it.
    fn stride(self) -> usize {
        self.bytes.next_multiple_of(PAGE)
    }

    fn places(self) -> usize {
        FILE_BYTES / self.stride()
    }

    fn offset(self, number: u64) -> u64 {
        number % self.places() as u64 * self.stride() as u64
    }

    fn mb_per_s(self, took: Duration) -> f64 {
        (self.bytes as u64 * self.count) as f64 / 1e6 / took.as_secs_f64()
    }

    /// For one of them.
    fn microseconds(self, took: Duration) -> f64 {
        took.as_secs_f64() * 1e6 / self.count as f64
    }
}

impl Ours {
    fn start(storage: &Storage, runtime: Runtime, name: &str) -> Result<Self> {
        let (session, pin, buffers) = runtime.block_on(async {
            let session = storage.connect().await?;
            let pin = storage.pin(&session, name, FILE_BYTES as u64, Transport::Rdma).await?;
            let mut buffers = Vec::new();
            for _ in 0..DEPTH {
                buffers.push(session.buffer(1024 * KIB).await?);
            }
            anyhow::Ok((session, pin, buffers))
        })?;
        Ok(Self { pin, buffers, _session: session, runtime })
    }

    /// In tasks of the runtime, as an application would: each has a buffer, and begins the next
    /// transfer when its last has ended.
    fn time(&mut self, job: Job) -> Result<Duration> {
        let next = Arc::new(AtomicU64::new(0));
        let buffers: Vec<Buffer> = self.buffers.drain(..job.depth).collect();
        let (took, back) = self.runtime.block_on(async {
            let mut tasks = JoinSet::new();
            let started = Instant::now();
            for buffer in buffers {
                tasks.spawn(work(self.pin.clone(), job, next.clone(), buffer));
            }
            let mut back = Vec::new();
            while let Some(ended) = tasks.join_next().await {
                back.push(ended??);
            }
            anyhow::Ok((started.elapsed(), back))
        })?;
        self.buffers.extend(back);
        Ok(took)
    }
}

async fn work(pin: Arc<Pin>, job: Job, next: Arc<AtomicU64>, mut buffer: Buffer) -> Result<Buffer> {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= job.count {
            return Ok(buffer);
        }
        let offset = job.offset(number);
        let (back, by_rdma) = match job.what {
            What::Write => {
                let (back, report) = pin.write(offset, buffer, job.bytes).await?;
                (back, report.rdma_bytes)
            }
            What::Read => {
                let (back, report) = pin.read(offset, job.bytes, buffer).await?;
                (back, report.rdma_bytes)
            }
        };
        ensure!(by_rdma == job.bytes as u64, "only {by_rdma} of {} bytes by RDMA", job.bytes);
        buffer = back;
    }
}

/// A target in C, and what it told of itself: endpoint and memory.
fn start_target(storage: &Storage, name: &str) -> Result<(Peer, String, String)> {
    let file = storage.foreign_file(name, FILE_BYTES)?;
    let arguments = ["target", &storage.places.device, text(&file)?];
    let mut target = Peer::start(&storage.peer("one_sided"), &arguments)?;
    let endpoint = target.hear("endpoint")?;
    let memory = target.hear("memory")?;
    Ok((target, endpoint, memory))
}

impl Theirs {
    fn start(storage: &Storage) -> Result<Self> {
        let (mut target, endpoint, memory) = start_target(storage, "theirs")?;
        let arguments = ["initiator", &storage.places.device];
        let mut initiator = Peer::start(&storage.peer("one_sided"), &arguments)?;
        let own = initiator.hear("endpoint")?;
        target.say(&format!("connect {own}"))?;
        target.hear("ready")?;
        initiator.say(&format!("connect {endpoint} {memory}"))?;
        initiator.hear("ready")?;
        Ok(Self { initiator, _target: target })
    }

    fn time(&mut self, job: Job, how: How) -> Result<Duration> {
        let Job { what, bytes, depth, count } = job;
        let (stride, places) = (job.stride(), job.places());
        let how = match how {
            How::Asleep => "sleep",
            How::Polls => "poll",
        };
        let line = format!("{} {bytes} {depth} {count} {stride} {places} {how}", what.word());
        self.initiator.time(&line)
    }
}

impl Bare {
    fn start(storage: &Storage) -> Result<Self> {
        let runtime = one_thread()?;
        let (mut target, endpoint, memory) = start_target(storage, "bare")?;
        let device = Device::open(&storage.places.device)?;
        let domain = ProtectionDomain::new(&device)?;
        let lane = UnconnectedLane::new(&domain, DEPTH as u32)?;
        let own = lane.endpoint();
        let gid: String = own.gid.octets().iter().map(|octet| format!("{octet:02x}")).collect();
        let (number, packet) = (own.queue_pair_number.get(), own.packet_sequence_number);
        target.say(&format!("connect {number} {packet} {gid}"))?;
        target.hear("ready")?;
        let peer = parse_endpoint(&endpoint).with_context(|| format!("endpoint {endpoint}"))?;
        let mtu = Mtu::from_bytes(PAGE as u32).context("4096 is a path MTU")?;
        let lane = lane.connect(&peer, mtu).map_err(pinfold_verbs::Error::from)?;
        let (address, key) = memory.split_once(' ').context("no key")?;
        let (address, key) = (address.parse()?, RemoteKey::new(key.parse()?));
        let buffer = Some(pinfold_verbs::Buffer::new(&domain, 1024 * KIB)?);
        Ok(Self { lane, buffer, address, key, runtime, _target: target })
    }

    /// One after the other.
    fn time(&mut self, job: Job) -> Result<Duration> {
        let mut buffer = self.buffer.take().context("no buffer left")?;
        let Self { lane, address, key, runtime, .. } = &*self;
        let (took, buffer) = runtime.block_on(async {
            let started = Instant::now();
            for number in 0..job.count {
                let address = address + job.offset(number);
                let remote = RemoteSlice { address, key: *key, len: job.bytes };
                let piece = Piece { local: 0..job.bytes, remote };
                lane.post_write(buffer, &[piece], ()).map_err(pinfold_verbs::Error::from)?;
                let done = lane.next_completion().await?;
                ensure!(done.status.is_success(), "{}", done.status);
                buffer = done.buffer;
            }
            Ok((started.elapsed(), buffer))
        })?;
        self.buffer = Some(buffer);
        Ok(took)
    }
}

/// Number of the queue pair, first packet and address.
fn parse_endpoint(words: &str) -> Option<Endpoint> {
    let mut words = words.split(' ');
    let queue_pair_number = QueuePairNumber::new(words.next()?.parse().ok()?);
    let packet_sequence_number = words.next()?.parse().ok()?;
    let gid = u128::from_str_radix(words.next()?, 16).ok()?;
    let gid = Gid::new(gid.to_be_bytes());
    Some(Endpoint {
        queue_pair_number,
        packet_sequence_number,
        gid,
        lid: 0,
        path_mtu_bytes: PAGE as u32,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_stays_within_the_file_and_starts_on_pages() {
        for bytes in [8, 4 * KIB, 5000, 1024 * KIB] {
            let job = Job::bandwidth(What::Write, bytes);
            for number in [0, 1, job.count - 1, u64::MAX] {
                let offset = job.offset(number) as usize;
                assert!(
                    offset.is_multiple_of(PAGE) && offset + bytes <= FILE_BYTES,
                    "{bytes} at {offset}"
                );
            }
        }
    }

    #[test]
    fn bandwidth_and_latency_are_of_the_whole_round() {
        let job = Job { what: What::Read, bytes: 1000, depth: 4, count: 2000 };
        let took = Duration::from_millis(500);
        assert_eq!((job.mb_per_s(took), job.microseconds(took)), (4.0, 250.0));
    }

    #[test]
    fn an_endpoint_in_c_is_one_of_ours() {
        let endpoint = parse_endpoint("17 0 00000000000000000000ffff7f000001").unwrap();
        assert_eq!(endpoint.queue_pair_number.get(), 17);
        assert_eq!(endpoint.gid.octets()[10..], [0xff, 0xff, 127, 0, 0, 1]);
        assert!(parse_endpoint("17 0").is_none());
    }
}
