//! One-sided writes and reads through the client library, beside the same in C.

use std::num::NonZeroUsize;
use std::path::Path;
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
use crate::job::{DEPTH, FILE_BYTES, Job, KIB, PAGE, What, compare};
use crate::peer::Peer;
use crate::perftest::{self, Program};
use crate::place::{self, Storage, several_threads, text};
use crate::report::Goal;
use crate::turns::alternate;

/// Each is two processes.
const PERFTEST_ROUNDS_MAX: usize = 11;
const QUICK_PERFTEST_ROUNDS_MAX: usize = 5;

const C_ASLEEP: &str = "C on libibverbs, asleep between completions, as we are";
const C_POLLS: &str = "C on libibverbs, polls without end";

/// How the C program waits for completions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum How {
    Asleep,
    Polls,
}

/// The client library, with a pin.
pub(crate) struct Ours {
    // Dropped in this order: the pin goes with its session, the session with the runtime.
    pin: Arc<Pin>,
    buffers: Vec<Buffer>,
    _session: Session,
    runtime: Runtime,
}

/// A C program, and the one that it writes to.
pub(crate) struct Theirs {
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
            beside_c(run, job, "", job.goal(), |job| ours.time(job), theirs)?;
        }
        for bytes in run.pick(&[4 * KIB, 64 * KIB], &[4 * KIB]) {
            let job = Job::bandwidth(what, *bytes);
            beside_c(run, job, "_16_tasks", Goal::None, |job| ours.time_in_tasks(job), theirs)?;
        }
        for bytes in latency_sizes(run) {
            let job = Job::latency(what, *bytes);
            beside_c(run, job, "", job.goal(), |job| ours.time(job), theirs)?;
            let peer = (C_POLLS, Goal::None);
            let polls = |job| theirs.time(job, How::Polls);
            compare(run, job, "", peer, |job| ours.time(job), polls)?;
        }
    }
    Ok(())
}

fn beside_c(
    run: &mut Run<'_>,
    job: Job,
    way: &str,
    goal: Goal,
    ours: impl FnMut(Job) -> Result<Duration>,
    theirs: &mut Theirs,
) -> Result<()> {
    compare(run, job, way, (C_ASLEEP, goal), ours, |job| theirs.time(job, How::Asleep))
}

/// What everybody measures with.
fn beside_perftest(run: &mut Run<'_>) -> Result<()> {
    let mut ours = Ours::start(run.storage, several_threads()?, "beside-perftest")?;
    run.storage.foreign_file(perftest::FILE, FILE_BYTES)?;
    let bandwidths = run.pick(&[4 * KIB, 64 * KIB, 1024 * KIB], &[64 * KIB]);
    let latencies = run.pick(&[8, 64 * KIB], &[8]);
    let jobs = |job: fn(What, usize) -> Job, what, sizes: &[usize], program| {
        sizes.iter().map(move |bytes| (job(what, *bytes), program)).collect::<Vec<_>>()
    };
    let jobs = [
        jobs(Job::bandwidth, What::Write, bandwidths, Program::WriteBandwidth),
        jobs(Job::bandwidth, What::Read, bandwidths, Program::ReadBandwidth),
        jobs(Job::latency, What::Read, latencies, Program::ReadLatency),
    ];
    for (job, program) in jobs.concat() {
        let pairs = alternate(
            run.few_rounds(PERFTEST_ROUNDS_MAX, QUICK_PERFTEST_ROUNDS_MAX),
            || Ok(job.figure(ours.time(job)?)),
            || program.measure(run.storage, job),
        )?;
        run.add(job.row(""), program.words(), job.unit(), &pairs, job.goal());
    }
    Ok(())
}

/// The library where the application has a runtime of one thread: what waking other threads costs.
fn by_one_thread(run: &mut Run<'_>, theirs: &mut Theirs) -> Result<()> {
    let mut ours = Ours::start(run.storage, one_thread()?, "one")?;
    let latencies = latency_sizes(run).iter().map(|bytes| Job::latency(What::Write, *bytes));
    for job in latencies.chain([Job::bandwidth(What::Write, 4 * KIB)]) {
        beside_c(run, job, "_one_thread", Goal::None, |job| ours.time(job), theirs)?;
    }
    Ok(())
}

/// What of the library's time is that of the verbs crate beneath it.
fn without_the_library(run: &mut Run<'_>, theirs: &mut Theirs) -> Result<()> {
    let mut bare = Bare::start(run.storage)?;
    for bytes in latency_sizes(run) {
        let job = Job::latency(What::Write, *bytes);
        beside_c(run, job, "_bare_lane", Goal::None, |job| bare.time(job), theirs)?;
    }
    Ok(())
}

fn latency_sizes(run: &Run<'_>) -> &'static [usize] {
    run.pick(&[8, 4 * KIB, 16 * KIB, 64 * KIB], &[8, 64 * KIB])
}

pub(crate) fn one_thread() -> Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

impl Ours {
    pub(crate) fn start(storage: &Storage, runtime: Runtime, name: &str) -> Result<Self> {
        Self::connect(storage.url(), &storage.places.device, runtime, name)
    }

    /// Of a server that somebody else has started.
    pub(crate) fn connect(url: &str, device: &str, runtime: Runtime, name: &str) -> Result<Self> {
        let (session, pin, buffers) = runtime.block_on(async {
            let session = place::connect(url, device).await?;
            let pin = place::pin(&session, name, FILE_BYTES as u64, Transport::Rdma).await?;
            let mut buffers = Vec::new();
            for _ in 0..DEPTH {
                buffers.push(session.buffer(1024 * KIB).await?);
            }
            anyhow::Ok((session, pin, buffers))
        })?;
        Ok(Self { pin, buffers, _session: session, runtime })
    }

    /// In one task of the runtime; several at a time in a pipeline, as the C program has them.
    pub(crate) fn time(&mut self, job: Job) -> Result<Duration> {
        let mut buffers: Vec<Buffer> = self.buffers.drain(..job.depth).collect();
        let pin = self.pin.clone();
        let task = self.runtime.spawn(async move {
            let started = Instant::now();
            match job.depth {
                1 => one_by_one(&pin, job, &mut buffers).await?,
                _ => pipelined(&pin, job, &mut buffers).await?,
            }
            anyhow::Ok((started.elapsed(), buffers))
        });
        let (took, back) = self.runtime.block_on(task)??;
        self.buffers.extend(back);
        Ok(took)
    }

    /// In as many tasks as there are to be transfers at a time: each has a buffer, and begins the next
    /// transfer when its last has ended.
    fn time_in_tasks(&mut self, job: Job) -> Result<Duration> {
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
        buffer = transfer(&pin, job, job.offset(number), buffer).await?;
    }
}

async fn one_by_one(pin: &Pin, job: Job, buffers: &mut Vec<Buffer>) -> Result<()> {
    let mut buffer = buffers.pop().context("no buffer")?;
    for number in 0..job.count {
        buffer = transfer(pin, job, job.offset(number), buffer).await?;
    }
    buffers.push(buffer);
    Ok(())
}

async fn pipelined(pin: &Pin, job: Job, buffers: &mut Vec<Buffer>) -> Result<()> {
    let window = NonZeroUsize::new(job.depth).context("a window of nothing")?;
    let mut pipeline = pin.pipeline(window);
    for number in 0..job.count {
        if let Some(done) = pipeline.next_if_full().await {
            buffers.push(done?.buffer);
        }
        let buffer = buffers.pop().context("no buffer left")?;
        match job.what {
            What::Read => pipeline.read(job.offset(number), job.bytes, buffer).await,
            _ => pipeline.write(job.offset(number), buffer, job.bytes).await,
        }
    }
    while let Some(done) = pipeline.next().await {
        buffers.push(done?.buffer);
    }
    Ok(())
}

async fn transfer(pin: &Pin, job: Job, offset: u64, buffer: Buffer) -> Result<Buffer> {
    let end = offset + job.bytes as u64;
    if job.what == What::Read {
        return read(pin, offset, job.bytes, buffer).await;
    }
    let (buffer, report) = match job.what {
        What::WriteAndRead => pin.write_visible(offset, buffer, job.bytes).await?,
        What::WriteAndFlush => {
            let (buffer, report) = pin.write_durable(offset, buffer, job.bytes).await?;
            ensure!(report.commit.is_none(), "a commit took the flush's place: {report:?}");
            (buffer, report.write)
        }
        What::Write | What::Read | What::WriteAndCommit => {
            pin.write(offset, buffer, job.bytes).await?
        }
    };
    by_rdma(report.rdma_bytes, job.bytes)?;
    if job.what == What::WriteAndCommit {
        pin.commit_range(offset..end).await?;
    }
    Ok(buffer)
}

async fn read(pin: &Pin, offset: u64, bytes: usize, buffer: Buffer) -> Result<Buffer> {
    let (buffer, report) = pin.read(offset, bytes, buffer).await?;
    by_rdma(report.rdma_bytes, bytes)?;
    Ok(buffer)
}

fn by_rdma(done: u64, of: usize) -> Result<()> {
    ensure!(done == of as u64, "only {done} of {of} bytes by RDMA");
    Ok(())
}

/// A target in C, and what it told of itself: endpoint and memory.
fn start_target(storage: &Storage, name: &str, also: &[&str]) -> Result<(Peer, String, String)> {
    let file = storage.foreign_file(name, FILE_BYTES)?;
    let arguments = [&["target", &storage.places.device, text(&file)?], also].concat();
    let mut target = Peer::start(&storage.peer("one_sided"), &arguments)?;
    let endpoint = target.hear("endpoint")?;
    let memory = target.hear("memory")?;
    Ok((target, endpoint, memory))
}

impl Theirs {
    fn start(storage: &Storage) -> Result<Self> {
        Self::start_as(storage, "theirs", &[])
    }

    /// One that can flush.
    pub(crate) fn start_with_flush(storage: &Storage) -> Result<Self> {
        Self::start_as(storage, "theirs-flushed", &["flush"])
    }

    fn start_as(storage: &Storage, file: &str, also: &[&str]) -> Result<Self> {
        Self::start_by(storage, file, also, Peer::start)
    }

    /// Whose initiator is started in a way of its own.
    pub(crate) fn start_by(
        storage: &Storage,
        file: &str,
        also: &[&str],
        start: impl FnOnce(&Path, &[&str]) -> Result<Peer>,
    ) -> Result<Self> {
        let (mut target, endpoint, memory) = start_target(storage, file, also)?;
        let arguments = [&["initiator", storage.places.device.as_str()], also].concat();
        let mut initiator = start(&storage.peer("one_sided"), &arguments)?;
        let own = initiator.hear("endpoint")?;
        target.say(&format!("connect {own}"))?;
        target.hear("ready")?;
        initiator.say(&format!("connect {endpoint} {memory}"))?;
        initiator.hear("ready")?;
        Ok(Self { initiator, _target: target })
    }

    pub(crate) fn time(&mut self, job: Job, how: How) -> Result<Duration> {
        let how = match how {
            How::Asleep => "sleep",
            How::Polls => "poll",
        };
        self.initiator.time(&format!("{} {how}", job.line()))
    }

    /// Has the initiator end by itself.
    pub(crate) fn end(self) -> Result<()> {
        self.initiator.end()
    }
}

impl Bare {
    fn start(storage: &Storage) -> Result<Self> {
        let runtime = one_thread()?;
        let (mut target, endpoint, memory) = start_target(storage, "bare", &[])?;
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
    fn an_endpoint_in_c_is_one_of_ours() {
        let endpoint = parse_endpoint("17 0 00000000000000000000ffff7f000001").unwrap();
        assert_eq!(endpoint.queue_pair_number.get(), 17);
        assert_eq!(endpoint.gid.octets()[10..], [0xff, 0xff, 127, 0, 0, 1]);
        assert!(parse_endpoint("17 0").is_none());
    }
}
