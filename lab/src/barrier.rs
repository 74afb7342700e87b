//! Streams of one-sided operations that are cut off by a fence, with both ends of each connection in
//! this process: only leases and verbs are at work.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use pinfold_leases::{Description, Share};
use pinfold_verbs::{
    Access, Buffer, CompletionStatus, Connected, Device, Lane, MemoryRegion, Mtu, Piece,
    ProtectionDomain, QueuePair, QueuePairBuilder, RemoteKey, RemoteSlice, UnconnectedLane,
};

use crate::{Bench, DEADLINE, Random};

const PAGE: usize = 4096;
/// Operations of a stream that are in flight.
const DEPTH: usize = 16;
/// The fence falls before each stream has ended more of them than this.
const LATEST: usize = 40;

/// What one operation was.
pub struct Note {
    number: usize,
    /// It was posted when the fence had returned.
    late: bool,
}

/// Posts the operation of this number, of one request or of several that each end.
pub type Post<'a> = &'a (dyn Fn(Remote, &Lane<Note>, Buffer, Note) + Sync);

/// Where a stream comes from.
pub struct Source {
    domain: ProtectionDomain,
    buffers: Vec<Buffer>,
    access: Access,
}

/// What is seen of one stream in a round.
#[derive(Default)]
struct Seen {
    /// Ended well so far.
    done: AtomicUsize,
    /// Their numbers.
    numbers: Mutex<Vec<usize>>,
}

/// What became of a file and of two streams to it when the fence fell.
pub struct Round {
    /// The file's bytes before.
    pub before: Vec<u8>,
    /// And from the moment on that the fence had returned: nothing has changed them since.
    pub then: Vec<u8>,
    /// Of each stream, the operations that ended well.
    pub done: [Vec<usize>; 2],
    /// Of each stream, how many were refused.
    pub refused: [usize; 2],
}

impl Note {
    /// Which operation of its stream it is.
    pub fn number(&self) -> usize {
        self.number
    }
}

impl Source {
    /// One whose far ends allow so much.
    pub fn new(device: &Device, access: Access) -> Self {
        let domain = ProtectionDomain::new(device).unwrap();
        let buffers = (0..DEPTH).map(|_| Buffer::new(&domain, PAGE).unwrap()).collect();
        Self { domain, buffers, access }
    }

    /// A connection, and its far end, which reaches what is registered in `target`.
    fn connect(&self, target: &ProtectionDomain) -> (Lane<Note>, QueuePair<Connected>) {
        let lane = UnconnectedLane::new(&self.domain, DEPTH as u32).unwrap();
        let far_end = QueuePairBuilder::new(target).remote_access(self.access).build().unwrap();
        let (near, far) = (lane.endpoint(), far_end.endpoint());
        // What on-demand paging needs on this device.
        let far_end = far_end.connect(&near, Mtu::Mtu4096).unwrap();
        (lane.connect(&far, Mtu::Mtu4096).unwrap(), far_end)
    }

    /// Posts one operation after the other until one is refused, and waits until all have come back.
    /// How many were refused.
    fn stream(
        &mut self,
        lane: &Lane<Note>,
        seen: &Seen,
        fenced: &AtomicBool,
        post: impl Fn(&Lane<Note>, Buffer, Note),
    ) -> usize {
        let started = Instant::now();
        let (mut number, mut refused) = (0, 0);
        loop {
            while refused == 0
                && let Some(buffer) = self.buffers.pop()
            {
                post(lane, buffer, Note { number, late: fenced.load(Ordering::SeqCst) });
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
                    assert!(!done.tag.late, "what was posted after the fence has succeeded");
                    seen.numbers.lock().unwrap().push(done.tag.number);
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
pub struct Remote {
    address: u64,
    key: RemoteKey,
}

impl Remote {
    fn of(region: &MemoryRegion<Share>) -> Self {
        Self { address: region.remote_address(), key: region.remote_key() }
    }

    /// Bytes of the file.
    pub fn slice(self, offset: usize, len: usize) -> RemoteSlice {
        RemoteSlice { address: self.address + offset as u64, key: self.key, len }
    }
}

/// Overwrites a page of the file; each write of it changes all of its bytes.
pub fn write_page(file: Remote, page: usize, lane: &Lane<Note>, mut buffer: Buffer, note: Note) {
    buffer.as_mut_slice().fill(byte_of(note.number));
    let remote = file.slice(page * PAGE, PAGE);
    lane.post_write(buffer, &[Piece { local: 0..PAGE, remote }], note).unwrap();
}

/// What the write of this number leaves.
pub fn byte_of(number: usize) -> u8 {
    1 + (number % 251) as u8
}

fn content(file: &Description, len: usize) -> Vec<u8> {
    let mut content = vec![0; len];
    file.read_at(&mut content, 0).unwrap();
    content
}

/// Streams to "file" from both sources, and fences it at another moment each time. Fails if anything
/// changes after that, or if what was posted after it succeeds.
pub fn round(
    bench: &Bench,
    len: usize,
    sources: &mut [Source; 2],
    posts: [Post<'_>; 2],
    random: &mut Random,
) -> Round {
    let file = bench.open("file");
    let (guard, mapping) = file.unguarded(&bench.watcher).unwrap().map(len as u64).unwrap();
    mapping.populate(0..len as u64, || true).unwrap();
    let [first, second] = sources;
    let target = ProtectionDomain::new(first.domain.device()).unwrap();
    let share = mapping.share().unwrap();
    let region = target.register_on_demand(share, 0..len, first.access).unwrap();
    let ((to_first, first_end), (to_second, second_end)) =
        (first.connect(&target), second.connect(&target));
    let remote = Remote::of(&region);
    let before = content(&file, len);
    let (seen_first, seen_second) = (Seen::default(), Seen::default());
    let fence_is_back = AtomicBool::new(false);
    let moment = (1 + random.below(LATEST), 1 + random.below(LATEST));

    let (then, refused) = thread::scope(|scope| {
        let first = scope.spawn(|| {
            first.stream(&to_first, &seen_first, &fence_is_back, |lane, buffer, note| {
                posts[0](remote, lane, buffer, note);
            })
        });
        let second = scope.spawn(|| {
            second.stream(&to_second, &seen_second, &fence_is_back, |lane, buffer, note| {
                posts[1](remote, lane, buffer, note);
            })
        });
        seen_first.wait_for(moment.0);
        seen_second.wait_for(moment.1);
        let fenced = mapping.fence().unwrap();
        fence_is_back.store(true, Ordering::SeqCst);
        let then = content(&file, len);
        guard.release(fenced).unwrap();
        // If the fence were none, this would end the streams.
        region.deregister().unwrap();
        (then, [first.join().unwrap(), second.join().unwrap()])
    });
    first_end.destroy().unwrap();
    second_end.destroy().unwrap();
    assert!(refused.iter().all(|refused| *refused > 0), "a stream was not cut off");

    let now = content(&file, len);
    let changed: Vec<usize> = (0..len).filter(|at| now[*at] != then[*at]).collect();
    let at = changed.first();
    assert!(changed.is_empty(), "{} bytes changed after the fence, from {at:?} on", changed.len());
    let done = [seen_first, seen_second].map(|seen| seen.numbers.into_inner().unwrap());
    Round { before, then, done, refused }
}
