//! The fence as a barrier: writes, reads and atomics are streaming when it falls, and from the moment
//! that it returns not one byte of the file changes. Only leases and verbs are at work here, in a
//! loop: both ends of each connection are in this process.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use pinfold_lab::{Bench, DEADLINE, Random, device_name, on_each_bench};
use pinfold_leases::{Description, Share};
use pinfold_verbs::{
    Access, Atomic, Buffer, CompletionStatus, Connected, Device, Lane, MemoryRegion, Mtu, Piece,
    ProtectionDomain, QueuePair, QueuePairBuilder, RemoteKey, RemoteSlice, UnconnectedLane,
};

const ROUNDS: usize = 100;
const PAGE: usize = 4096;
const WRITTEN_PAGES: usize = 32;
/// One word is added to, another one swapped, again and again.
const ATOMICS_PAGE: usize = WRITTEN_PAGES;
const READ_PAGE: usize = WRITTEN_PAGES + 1;
const PAGES: usize = WRITTEN_PAGES + 2;
const LEN: usize = PAGES * PAGE;
const WORD: usize = 8;
/// Operations of a stream that are in flight.
const DEPTH: usize = 16;
/// The fence falls before each stream has ended more of them than this.
const LATEST: usize = 40;
const ACCESS: Access = Access { remote_atomic: true, ..Access::REMOTE_READ_WRITE };

/// Where a stream comes from.
struct Source {
    domain: ProtectionDomain,
    buffers: Vec<Buffer>,
}

/// What one stream has seen of a round.
#[derive(Default)]
struct Seen {
    /// Ended well so far.
    done: AtomicUsize,
}

impl Source {
    fn new(device: &Device) -> Self {
        let domain = ProtectionDomain::new(device).unwrap();
        let buffers = (0..DEPTH).map(|_| Buffer::new(&domain, PAGE).unwrap()).collect();
        Self { domain, buffers }
    }

    /// A connection, and its far end, which reaches what is registered in `target`.
    fn connect(&self, target: &ProtectionDomain) -> (Lane<()>, QueuePair<Connected>) {
        let lane = UnconnectedLane::new(&self.domain, DEPTH as u32).unwrap();
        let far_end = QueuePairBuilder::new(target).remote_access(ACCESS).build().unwrap();
        let (near, far) = (lane.endpoint(), far_end.endpoint());
        // What on-demand paging needs on this device.
        let far_end = far_end.connect(&near, Mtu::Mtu4096).unwrap();
        (lane.connect(&far, Mtu::Mtu4096).unwrap(), far_end)
    }

    /// Posts one operation after the other until one is refused, and waits until all have come back.
    /// How many were refused.
    fn stream(
        &mut self,
        lane: &Lane<()>,
        seen: &Seen,
        post: impl Fn(&Lane<()>, Buffer, usize),
    ) -> usize {
        let started = Instant::now();
        let (mut number, mut refused) = (0, 0);
        loop {
            while refused == 0
                && let Some(buffer) = self.buffers.pop()
            {
                post(lane, buffer, number);
                number += 1;
            }
            if self.buffers.len() == DEPTH {
                return refused;
            }
            assert!(started.elapsed() < DEADLINE, "an operation never ended");
            let Some(done) = lane.poll().unwrap() else {
                thread::yield_now();
                continue;
            };
            self.buffers.push(done.buffer);
            match done.status {
                CompletionStatus::Success => {
                    seen.done.fetch_add(1, Ordering::Relaxed);
                }
                CompletionStatus::RemoteAccess | CompletionStatus::Flushed => refused += 1,
                other => panic!("{other}"),
            }
        }
    }
}

impl Seen {
    fn wait_for(&self, number: usize) {
        let started = Instant::now();
        while self.done.load(Ordering::Relaxed) < number {
            assert!(started.elapsed() < DEADLINE, "nothing is done");
            thread::yield_now();
        }
    }
}

/// How a stream names the file's bytes.
#[derive(Clone, Copy)]
struct Remote {
    address: u64,
    key: RemoteKey,
}

impl Remote {
    fn of(region: &MemoryRegion<Share>) -> Self {
        Self { address: region.remote_address(), key: region.remote_key() }
    }

    fn slice(self, offset: usize, len: usize) -> RemoteSlice {
        RemoteSlice { address: self.address + offset as u64, key: self.key, len }
    }
}

/// Each write of a page changes all of its bytes.
fn write(file: Remote, lane: &Lane<()>, mut buffer: Buffer, number: usize) {
    buffer.as_mut_slice().fill(1 + (number % 251) as u8);
    let remote = file.slice(number % WRITTEN_PAGES * PAGE, PAGE);
    lane.post_write(buffer, &[Piece { local: 0..PAGE, remote }], ()).unwrap();
}

/// An addition, a swap, a read, and so on. `swapped`: what the swapped word is at first.
fn other(file: Remote, swapped: u64, lane: &Lane<()>, buffer: Buffer, number: usize) {
    let word = |index| file.slice(ATOMICS_PAGE * PAGE + index * WORD, WORD);
    let expected = swapped + number as u64 / 3;
    match number % 3 {
        0 => lane.post_atomic(buffer, word(0), Atomic::FetchAdd(1), ()),
        1 => {
            let swap = Atomic::CompareSwap { expected, new: expected + 1 };
            lane.post_atomic(buffer, word(1), swap, ())
        }
        _ => {
            let remote = file.slice(READ_PAGE * PAGE, PAGE);
            lane.post_read(buffer, &[Piece { local: 0..PAGE, remote }], ())
        }
    }
    .unwrap();
}

fn content(file: &Description) -> Vec<u8> {
    let mut content = vec![0; LEN];
    file.read_at(&mut content, 0).unwrap();
    content
}

fn number_in(content: &[u8], word: usize) -> u64 {
    let at = ATOMICS_PAGE * PAGE + word * WORD;
    u64::from_ne_bytes(content[at..at + WORD].try_into().unwrap())
}

/// One fence. What was refused of the writes, and of the others.
fn round(bench: &Bench, sources: &mut [Source; 2], random: &mut Random) -> [usize; 2] {
    let file = bench.open("file");
    let (guard, mapping) = file.unguarded(&bench.watcher).unwrap().map(LEN as u64).unwrap();
    mapping.populate(0..LEN as u64, || true).unwrap();
    let [writes, others] = sources;
    let target = ProtectionDomain::new(writes.domain.device()).unwrap();
    let region = target.register_on_demand(mapping.share().unwrap(), 0..LEN, ACCESS).unwrap();
    let ((to_write, write_end), (to_others, others_end)) =
        (writes.connect(&target), others.connect(&target));
    let remote = Remote::of(&region);
    let before = content(&file);
    let swapped = number_in(&before, 1);
    let (written, rest) = (Seen::default(), Seen::default());
    // It falls at another moment each time.
    let moment = (1 + random.below(LATEST), 1 + random.below(LATEST));

    let (then, refused) = thread::scope(|scope| {
        let writing = scope.spawn(|| {
            writes.stream(&to_write, &written, |lane, buffer, number| {
                write(remote, lane, buffer, number);
            })
        });
        let others = scope.spawn(|| {
            others.stream(&to_others, &rest, |lane, buffer, number| {
                other(remote, swapped, lane, buffer, number);
            })
        });
        written.wait_for(moment.0);
        rest.wait_for(moment.1);
        let fenced = mapping.fence().unwrap();
        let then = content(&file);
        guard.release(fenced).unwrap();
        // If the fence were none, this would end the streams.
        region.deregister().unwrap();
        (then, [writing.join().unwrap(), others.join().unwrap()])
    });
    write_end.destroy().unwrap();
    others_end.destroy().unwrap();

    assert!(number_in(&then, 0) > number_in(&before, 0), "nothing was added");
    assert!(number_in(&then, 1) > swapped || moment.1 < 3, "nothing was swapped");
    let now = content(&file);
    let changed: Vec<usize> = (0..LEN).filter(|at| now[*at] != then[*at]).collect();
    let first = changed.first();
    assert!(
        changed.is_empty(),
        "{} bytes changed after the fence, from {first:?} on",
        changed.len()
    );
    refused
}

on_each_bench! {
    fn nothing_in_flight_lands_after_it(bench in Bench) {
        bench.make("file", &[0; LEN]);
        let device = Device::open(&device_name()).unwrap();
        assert!(device.capabilities().atomics && device.capabilities().odp.rc_atomic);
        let mut sources = [Source::new(&device), Source::new(&device)];
        let mut random = Random::new(4711);
        let started = Instant::now();
        let mut refused = [0, 0];
        for _ in 0..ROUNDS {
            let of_round = round(&bench, &mut sources, &mut random);
            assert!(of_round.iter().all(|refused| *refused > 0), "a stream was not cut off");
            refused = [refused[0] + of_round[0], refused[1] + of_round[1]];
        }
        println!("{ROUNDS} fences in {:?}; they refused {refused:?}", started.elapsed());
    }
}
