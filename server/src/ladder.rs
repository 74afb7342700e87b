//! What is done when the fence itself hangs, or is slow.
//!
//! Cutting a file off is an mprotect(2) for each piece of it, which wants the process's memory lock for
//! itself. It walks every page of every region, so a large file takes long: as long as pieces are cut off
//! and regions deregistered, it is slow and does not hang, and no client pays for it. A remote
//! write that faults on a frozen file system holds that lock until the thaw, and so no fence of the
//! process comes back, whatever file it is for. Deregistering a region wants no such lock: it waits
//! for what is under way in that region, and for nothing else. So the rungs are
//!
//! 1. the fence, on a thread of its own, which is waited for as long as [`PATIENCE`];
//! 2. region by region, on threads that were started before: while the lock is held none can be
//!    started or ended. A file is fenced when every region has returned its share of the mapping.
//!    Where pages are pinned there is no other fence, and several threads help;
//! 3. the queue pairs of its sessions, destroyed without waiting for it: that proves nothing, but cuts
//!    off what can be.
//!
//! A file whose own region is the one that hangs is beyond all of them until the thaw.
//!
//! Large regions are deregistered between the fence and the release: whoever is let through would walk
//! their pages once more, and everybody else's faults would wait for that.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pinfold_leases::{FenceFailed, Fenced, Mapping};

use crate::error::Result;
use crate::fence::{self, Order};
use crate::held::HeldFile;
use crate::revocation_cost::time_limit;
use crate::sync::locked;

/// How long the fence may take before the next rung.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long regions may take at most before the last rung, which costs clients their connections that
/// have done nothing to lose them: on a machine that is busy everything takes long.
const LONGEST_WITH_REGIONS: Duration = Duration::from_secs(2);
/// A walk of all pages that takes longer than this is felt by whoever is let through.
const FELT: Duration = Duration::from_millis(5);
/// Threads that deregister, for each file system. As many of its files may hang at a time before they keep
/// others of the same one waiting.
pub(crate) const THREADS: usize = 16;

/// How a fence ended.
type Outcome = Result<Fenced, FenceFailed>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ladder {
    fences: SyncSender<Arc<HeldFile>>,
    first_rung: Arc<FirstRung>,
    /// See the function of this name.
    side_by_side: usize,
}

/// The threads of the second rung, of one file system.
#[derive(Debug)]
pub(crate) struct Regions(Arc<Waiting>);

/// Files whose regions are to be deregistered.
#[derive(Debug, Default)]
struct Waiting {
    files: Mutex<VecDeque<Arc<HeldFile>>>,
    more: Condvar,
    closed: AtomicBool,
}

impl Regions {
    /// Starts the threads.
    pub(crate) fn start(orders: &Sender<Order>) -> crate::error::Result<Self> {
        let waiting = Arc::<Waiting>::default();
        for _ in 0..THREADS {
            let (waiting, orders) = (Arc::clone(&waiting), orders.clone());
            fence::vital("pinfold-regions", move || {
                while let Some(file) = waiting.next() {
                    deregister(&file, &orders);
                }
            })?;
        }
        Ok(Self(waiting))
    }

    /// Makes room for so many files at a time: handing one over needs no memory then.
    pub(crate) fn make_room(&self, files: usize) {
        let room = files * side_by_side();
        if locked(&self.0.files).capacity() >= room {
            return;
        }
        // Without the lock, which the fence thread takes: allocating may wait for the process's memory lock.
        let mut roomy = VecDeque::with_capacity(room);
        let mut waiting = locked(&self.0.files);
        if waiting.capacity() >= room || waiting.len() > room {
            return;
        }
        roomy.append(&mut waiting);
        let before = std::mem::replace(&mut *waiting, roomy);
        drop(waiting);
        drop(before);
    }

    /// Never waits, however many files hang.
    fn hand_over(&self, file: &Arc<HeldFile>, threads: usize) {
        let mut waiting = locked(&self.0.files);
        for _ in 0..threads {
            waiting.push_back(Arc::clone(file));
        }
        drop(waiting);
        self.0.more.notify_all();
    }
}

impl Drop for Regions {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::SeqCst);
        // With the lock, so that nobody is between looking and waiting.
        drop(locked(&self.0.files));
        self.0.more.notify_all();
    }
}

impl Waiting {
    fn next(&self) -> Option<Arc<HeldFile>> {
        let files = locked(&self.files);
        let idle =
            |files: &mut VecDeque<_>| files.is_empty() && !self.closed.load(Ordering::SeqCst);
        let waited = self.more.wait_while(files, idle);
        waited.unwrap_or_else(PoisonError::into_inner).pop_front()
    }
}

/// Threads for one file whose pages are pinned. More than there are processors only get in each other's way.
fn side_by_side() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(THREADS)
}

/// How far a file has come.
#[derive(Debug)]
pub(crate) enum Climbed {
    /// It is fenced, or not, and nobody is at it any more.
    Done(Outcome),
    /// Somebody is at it, and will order its fence again.
    UnderWay,
    /// The same; the fence has not come back in time, and regions are being deregistered as well. To be
    /// looked at again at this time. `hangs`: it should have come further by now, whatever the size of its
    /// regions. `news`: the first time for this file.
    Late { look_at: Instant, hangs: bool, news: bool },
    /// The same; since the last look it has come further, by so many pieces and regions in all.
    Slow { look_at: Instant, steps: usize },
    /// The same; nothing has gone on since the last look, and it is time for the last rung. Said once for
    /// each try; `news`: of this file for the first time.
    RegionsHang { news: bool },
}

/// What is to be done with a file that is fenced.
#[derive(Debug)]
pub(crate) enum Fence {
    /// To be let go.
    Complete(Fenced),
    /// Its large regions are being deregistered first; that orders its fence again. It is to be let go at
    /// this time at the latest.
    RegionsFirst { release_by: Instant },
}

/// The thread of the first rung, as others see it.
#[derive(Debug)]
struct FirstRung {
    /// It has not come back from a file.
    busy: AtomicBool,
    started: Instant,
    /// Microseconds from `started` to its last step …
    last_us: AtomicU64,
    /// … and how many the next one may take.
    allowed_us: AtomicU64,
}

impl FirstRung {
    fn new() -> Self {
        let started = Instant::now();
        let (last_us, allowed_us) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { busy: AtomicBool::new(false), started, last_us, allowed_us }
    }

    /// It begins with a file whose pieces should take so long.
    fn begin(&self, piece: Duration) {
        let allowed = PATIENCE / 2 + piece.saturating_mul(2);
        self.allowed_us.store(micros(allowed), Ordering::Relaxed);
        self.step();
    }

    fn step(&self) {
        self.last_us.store(micros(self.started.elapsed()), Ordering::Relaxed);
    }

    fn hangs(&self) -> bool {
        // Looked at first: it may step meanwhile.
        let now = micros(self.started.elapsed());
        let since = now.saturating_sub(self.last_us.load(Ordering::Relaxed));
        since > self.allowed_us.load(Ordering::Relaxed)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Ladder {
    /// Starts the threads. They order a file's fence again when they have done something for it that
    /// nobody waited for.
    pub(crate) fn start(orders: &Sender<Order>) -> crate::error::Result<Self> {
        let first_rung = Arc::new(FirstRung::new());
        let (fences, to_fence) = sync_channel(1);
        let (sender, free) = (orders.clone(), Arc::clone(&first_rung));
        fence::vital("pinfold-cut", move || cut_off(&to_fence, &sender, &free))?;
        Ok(Self { fences, first_rung, side_by_side: side_by_side() })
    }

    /// Takes a file as far as it can be taken in [`PATIENCE`]. For the fence thread only.
    pub(crate) fn climb(
        &self,
        file: &Arc<HeldFile>,
        lease_break_time: impl Fn() -> Option<Duration>,
    ) -> Climbed {
        let patience = || patience_with_regions(lease_break_time()) + file.time_of_a_piece();
        let watch = || Some(Watch { until: Instant::now() + patience(), steps: file.steps() });
        match file.cutting().begin(file.steps(), patience) {
            Begun::Now => {}
            Begun::Earlier(Look::TooEarly) => return Climbed::UnderWay,
            Begun::Earlier(Look::GoesOn { look_at }) => {
                return Climbed::Slow { look_at, steps: file.steps() };
            }
            Begun::Earlier(Look::Stands) => {
                return Climbed::RegionsHang { news: file.cutting().is_first_hang_of_regions() };
            }
            Begun::Ended(outcome) => return Climbed::Done(outcome),
        }
        if self.first_rung.busy.swap(true, Ordering::SeqCst) {
            // One is enough: this one would have to wait for its memory lock too.
            return self.drop_regions(file, watch());
        }
        self.first_rung.begin(file.time_of_a_piece());
        // The thread is free, so there is room; it ends only with this.
        let _ = self.fences.send(Arc::clone(file));
        match file.cutting().wait(PATIENCE) {
            // Pages are pinned, or the kernel refuses: to deregister every region is a fence too.
            Some(Err(_)) => self.drop_regions(file, None),
            Some(Ok(fenced)) => Climbed::Done(Ok(fenced)),
            None => self.drop_regions(file, watch()),
        }
    }

    /// `watch`: if the fence has not come back.
    fn drop_regions(&self, file: &Arc<HeldFile>, watch: Option<Watch>) -> Climbed {
        let regions = file.begin_dropping_regions();
        // One thread if the fence may hang: a region of this file may be what it hangs on, and it must
        // not take them all.
        let threads = if watch.is_some() { 1 } else { regions.clamp(1, self.side_by_side) };
        let late = file.cutting().leave_to(threads, watch);
        file.file_system().regions().hand_over(file, threads);
        match late {
            None => Climbed::UnderWay,
            Some(look_at) => {
                let hangs = self.first_rung.hangs();
                let news = file.cutting().is_first_time_late(hangs);
                Climbed::Late { look_at, hangs, news }
            }
        }
    }

    /// What is to be done with a file that has been fenced. Large regions go first, once, and as long as
    /// there is time.
    pub(crate) fn before_release(
        &self,
        file: &Arc<HeldFile>,
        fenced: Fenced,
        lease_break_time: impl Fn() -> Option<Duration>,
    ) -> Fence {
        let is_felt = file.cost().now().walk > FELT;
        if !is_felt || !file.cutting().may_hold() {
            return Fence::Complete(fenced);
        }
        let regions = file.begin_dropping_regions();
        let threads = regions.clamp(1, self.side_by_side);
        let release_by = Instant::now() + time_limit(lease_break_time());
        file.cutting().hold(fenced, threads, release_by);
        file.file_system().regions().hand_over(file, threads);
        Fence::RegionsFirst { release_by }
    }
}

/// An eighth of the time that the kernel gives, within limits.
fn patience_with_regions(lease_break_time: Option<Duration>) -> Duration {
    let time = lease_break_time.unwrap_or(Duration::MAX);
    (time / 8).clamp(PATIENCE, LONGEST_WITH_REGIONS)
}

/// The thread of the first rung.
fn cut_off(files: &Receiver<Arc<HeldFile>>, orders: &Sender<Order>, rung: &FirstRung) {
    for file in files {
        let step = || {
            file.step();
            rung.step();
        };
        let cut = |mapping: Arc<Mapping>| mapping.fence_by_pieces(step);
        let outcome = file.mapping().map(cut);
        rung.busy.store(false, Ordering::SeqCst);
        if outcome.is_some_and(|outcome| file.cutting().cut(outcome)) {
            // The fence thread ends only with this one.
            let _ = orders.send(Order::Now(file.id()));
        }
    }
}

/// What a thread of the second rung does for one file.
fn deregister(file: &Arc<HeldFile>, orders: &Sender<Order>) {
    file.drop_regions();
    let outcome = || file.mapping().map(|mapping| mapping.fenced_by_return());
    if file.cutting().regions_dropped(outcome, || file.regions_are_gone()) {
        let _ = orders.send(Order::Now(file.id()));
    }
}

/// What is being done to cut one file off.
#[derive(Debug, Default)]
pub(crate) struct Cutting {
    state: Mutex<State>,
    cut: Condvar,
    /// How many threads deregister.
    threads: AtomicUsize,
    hang_was_told: AtomicBool,
    slowness_was_told: AtomicBool,
    hang_of_regions_was_told: AtomicBool,
    /// Its regions had their time between the fence and the release.
    was_held: AtomicBool,
}

/// When to look whether anything has gone on, and how far it had come at the last look.
#[derive(Clone, Copy, Debug)]
struct Watch {
    until: Instant,
    steps: usize,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing.
    #[default]
    Idle,
    /// Nothing, and it is not to be tried again before then.
    Pausing(Instant),
    /// The fence thread waits for the fence.
    Awaited,
    /// Nobody waits. If that is because the fence has not come back, and nothing has been said of
    /// regions yet: how that is watched.
    UnderWay { watch: Option<Watch> },
    /// It is fenced, and its regions are being deregistered; at this time that is enough.
    Holding { fenced: Fenced, release_by: Instant },
    /// What came of it, for the fence thread.
    Ended(Outcome),
}

/// What the fence thread finds.
#[derive(Debug)]
enum Begun {
    /// Nothing has been done: it begins.
    Now,
    /// Something is being done.
    Earlier(Look),
    /// What came of it; from here on nothing is being done.
    Ended(Outcome),
}

/// How something stands that is being done.
#[derive(Debug)]
enum Look {
    /// It has time until its next look.
    TooEarly,
    /// It has come further since the last look; the next is to be at this time.
    GoesOn { look_at: Instant },
    /// It has not. Said once.
    Stands,
}

impl Cutting {
    /// `steps`: how far it has come. `patience`: until the look after this one.
    fn begin(&self, steps: usize, patience: impl Fn() -> Duration) -> Begun {
        let mut state = locked(&self.state);
        match std::mem::take(&mut *state) {
            State::Pausing(until) if Instant::now() < until => {
                *state = State::Pausing(until);
                Begun::Earlier(Look::TooEarly)
            }
            State::Idle | State::Pausing(_) => {
                *state = State::Awaited;
                Begun::Now
            }
            State::Ended(outcome) => Begun::Ended(outcome),
            State::Awaited => unreachable!("only the thread that begins waits"),
            State::UnderWay { watch: Some(watch) } if watch.until <= Instant::now() => {
                let look_at = Instant::now() + patience();
                let goes_on = steps != watch.steps;
                let next = goes_on.then_some(Watch { until: look_at, steps });
                *state = State::UnderWay { watch: next };
                let look = if goes_on { Look::GoesOn { look_at } } else { Look::Stands };
                Begun::Earlier(look)
            }
            State::Holding { fenced, release_by } if release_by <= Instant::now() => {
                Begun::Ended(Ok(fenced))
            }
            other @ (State::UnderWay { .. } | State::Holding { .. }) => {
                *state = other;
                Begun::Earlier(Look::TooEarly)
            }
        }
    }

    /// Whether regions may have their time before the release: once.
    fn may_hold(&self) -> bool {
        !self.was_held.swap(true, Ordering::SeqCst)
    }

    /// Whether that is over, or under way.
    pub(crate) fn was_held(&self) -> bool {
        self.was_held.load(Ordering::SeqCst)
    }

    /// So many threads more deregister its regions before it is let go.
    fn hold(&self, fenced: Fenced, threads: usize, release_by: Instant) {
        let mut state = locked(&self.state);
        self.threads.fetch_add(threads, Ordering::SeqCst);
        *state = State::Holding { fenced, release_by };
    }

    /// It failed, and will be ordered again for then. Orders that come before are for a look at what is
    /// under way, and must not begin a try of their own: each try orders more than one.
    pub(crate) fn pause(&self, until: Instant) {
        *locked(&self.state) = State::Pausing(until);
    }

    /// Whether nothing has been said of it yet. A fence that is tried again hangs again, each time, and
    /// must not fill the log.
    fn is_first_time_late(&self, hangs: bool) -> bool {
        let told = if hangs { &self.hang_was_told } else { &self.slowness_was_told };
        !told.swap(true, Ordering::Relaxed)
    }

    /// The same of its regions, which may hang on a later try only.
    fn is_first_hang_of_regions(&self) -> bool {
        !self.hang_of_regions_was_told.swap(true, Ordering::Relaxed)
    }

    /// Waits for the fence; `None` if it takes longer.
    fn wait(&self, at_most: Duration) -> Option<Outcome> {
        let waiting = |state: &mut State| matches!(state, State::Awaited);
        let state = locked(&self.state);
        let (mut state, _) = self
            .cut
            .wait_timeout_while(state, at_most, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        match std::mem::take(&mut *state) {
            State::Ended(outcome) => Some(outcome),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Nobody waits from here on. `watch`: if that is because the fence has not come back. When to look
    /// again then.
    fn leave_to(&self, threads: usize, watch: Option<Watch>) -> Option<Instant> {
        self.threads.store(threads, Ordering::SeqCst);
        let mut state = locked(&self.state);
        // It may have come back this very moment; then the regions' threads say that all is done.
        if !matches!(*state, State::Ended(Ok(_))) {
            *state = State::UnderWay { watch };
        }
        watch.map(|watch| watch.until)
    }

    /// The fence has come back. Whether it is to be ordered again. If it failed when nobody waited any
    /// more, the regions decide.
    fn cut(&self, outcome: Outcome) -> bool {
        let mut state = locked(&self.state);
        match *state {
            State::Awaited => {
                *state = State::Ended(outcome);
                // Who is woken wants the lock.
                drop(state);
                self.cut.notify_all();
                false
            }
            State::UnderWay { .. } if outcome.is_ok() => {
                *state = State::Ended(outcome);
                true
            }
            State::Idle
            | State::Pausing(_)
            | State::UnderWay { .. }
            | State::Holding { .. }
            | State::Ended(_) => false,
        }
    }

    /// One of the threads found no region any more. Whether the fence is to be ordered again: by the
    /// last one.
    fn regions_dropped(
        &self,
        outcome: impl FnOnce() -> Option<Outcome>,
        before_release: impl FnOnce(),
    ) -> bool {
        if self.threads.fetch_sub(1, Ordering::SeqCst) > 1 {
            return false;
        }
        let Some(outcome) = outcome() else { return false };
        let mut state = locked(&self.state);
        match std::mem::take(&mut *state) {
            State::UnderWay { .. } => *state = State::Ended(outcome),
            State::Holding { fenced, .. } => {
                before_release();
                *state = State::Ended(Ok(fenced));
            }
            other => *state = other,
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: usize = 0;

    fn begin(cutting: &Cutting) -> Begun {
        cutting.begin(NOTHING, || Duration::from_secs(3600))
    }

    fn watched(until: Instant) -> Option<Watch> {
        Some(Watch { until, steps: NOTHING })
    }

    fn failed() -> Outcome {
        Err(FenceFailed::Shares { shares: 1 })
    }

    #[test]
    fn a_fence_that_comes_back_in_time_is_not_ordered_again() {
        let cutting = Cutting::default();
        assert!(matches!(begin(&cutting), Begun::Now));
        assert!(!cutting.cut(failed()), "somebody waits for it");
        assert!(cutting.wait(Duration::ZERO).is_some());
        assert!(matches!(begin(&cutting), Begun::Now), "it is tried again");
    }

    #[test]
    fn the_last_thread_orders_the_fence_and_says_what_came_of_it() {
        let cutting = Cutting::default();
        assert!(matches!(begin(&cutting), Begun::Now));
        assert!(cutting.wait(Duration::ZERO).is_none());
        assert_eq!(cutting.leave_to(2, None), None);
        assert!(!cutting.regions_dropped(|| panic!("it is not the last"), || ()));
        assert!(matches!(begin(&cutting), Begun::Earlier(Look::TooEarly)));
        assert!(cutting.regions_dropped(|| Some(failed()), || ()));
        assert!(matches!(begin(&cutting), Begun::Ended(Err(_))));
        assert!(matches!(begin(&cutting), Begun::Now));
    }

    #[test]
    fn regions_that_hang_are_found_on_each_try_and_told_of_once() {
        let cutting = Cutting::default();
        let over = Instant::now();
        for first in [true, false] {
            assert!(matches!(begin(&cutting), Begun::Now));
            assert_eq!(cutting.leave_to(1, watched(over)), Some(over));
            assert_eq!(cutting.is_first_time_late(true), first);
            assert!(matches!(begin(&cutting), Begun::Earlier(Look::Stands)));
            assert_eq!(cutting.is_first_hang_of_regions(), first);
            assert!(matches!(begin(&cutting), Begun::Earlier(Look::TooEarly)));
            assert!(cutting.regions_dropped(|| Some(failed()), || ()));
            assert!(matches!(begin(&cutting), Begun::Ended(Err(_))));
        }
    }

    #[test]
    fn regions_that_fail_at_first_and_hang_later_are_found() {
        let cutting = Cutting::default();
        let over = Instant::now();
        assert!(matches!(begin(&cutting), Begun::Now));
        let in_time = Instant::now() + Duration::from_secs(3600);
        assert_eq!(cutting.leave_to(1, watched(in_time)), Some(in_time));
        assert!(matches!(begin(&cutting), Begun::Earlier(Look::TooEarly)), "there is time");
        assert!(cutting.regions_dropped(|| Some(failed()), || ()));
        assert!(matches!(begin(&cutting), Begun::Ended(Err(_))));
        assert!(matches!(begin(&cutting), Begun::Now));
        cutting.leave_to(1, watched(over));
        assert!(matches!(begin(&cutting), Begun::Earlier(Look::Stands)));
        assert!(cutting.is_first_hang_of_regions(), "the log has not had it yet");
    }

    #[test]
    fn a_look_begins_no_try_before_it_is_time() {
        let cutting = Cutting::default();
        cutting.pause(Instant::now() + Duration::from_secs(3600));
        assert!(matches!(begin(&cutting), Begun::Earlier(Look::TooEarly)));
        assert!(matches!(begin(&cutting), Begun::Earlier(Look::TooEarly)));
        cutting.pause(Instant::now());
        assert!(matches!(begin(&cutting), Begun::Now));
    }

    #[test]
    fn the_last_rung_comes_well_before_the_kernel_lets_go() {
        let patience = |seconds| patience_with_regions(Some(Duration::from_secs(seconds)));
        assert_eq!(patience_with_regions(None), LONGEST_WITH_REGIONS);
        assert_eq!(patience(45), LONGEST_WITH_REGIONS);
        assert_eq!(patience(8), Duration::from_secs(1));
        assert_eq!(patience(1), Duration::from_millis(125));
        assert_eq!(patience_with_regions(Some(Duration::ZERO)), PATIENCE);
    }

    #[test]
    fn a_fence_that_goes_on_is_slow_and_never_hangs() {
        let cutting = Cutting::default();
        let look = |steps| cutting.begin(steps, || Duration::ZERO);
        assert!(matches!(look(0), Begun::Now));
        cutting.leave_to(1, watched(Instant::now()));
        for steps in 1..100 {
            assert!(matches!(look(steps), Begun::Earlier(Look::GoesOn { .. })), "{steps}");
        }
        assert!(matches!(look(99), Begun::Earlier(Look::Stands)));
        assert!(matches!(look(99), Begun::Earlier(Look::TooEarly)), "said once");
    }

    #[test]
    fn the_first_rung_hangs_when_a_piece_takes_far_longer_than_it_should() {
        let rung = FirstRung::new();
        rung.begin(Duration::from_secs(3600));
        assert!(!rung.hangs());
        rung.begin(Duration::ZERO);
        rung.last_us.store(0, Ordering::Relaxed);
        while rung.started.elapsed() <= PATIENCE {
            std::thread::yield_now();
        }
        assert!(rung.hangs());
        rung.step();
        assert!(!rung.hangs(), "it has come further");
    }

    /// Fenced, as the fence thread has it.
    fn fenced() -> Fenced {
        use pinfold_leases::{Create, Export, RelativePath, Watcher};
        let folder = tempfile::tempdir().unwrap();
        let create = Create { size: 1, mode: 0o600, dax: false };
        let name = RelativePath::parse("file").unwrap();
        let file = Export::open(folder.path()).unwrap().create(&name, &create).unwrap();
        let (watcher, _breaks) = Watcher::start().unwrap();
        let (guard, mapping) = file.unguarded(&watcher).unwrap().map(1).unwrap();
        let fenced = mapping.fence().unwrap();
        guard.release(mapping.fence().unwrap()).unwrap();
        fenced
    }

    #[test]
    fn regions_have_their_time_before_the_release_once() {
        let cutting = Cutting::default();
        assert!(cutting.may_hold() && !cutting.may_hold());
        let in_time = Instant::now() + Duration::from_secs(3600);
        cutting.hold(fenced(), 2, in_time);
        assert!(matches!(begin(&cutting), Begun::Earlier(Look::TooEarly)));
        assert!(!cutting.regions_dropped(|| Some(failed()), || panic!("one still works")));
        let mut told = false;
        assert!(cutting.regions_dropped(|| Some(failed()), || told = true));
        assert!(told);
        assert!(matches!(begin(&cutting), Begun::Ended(Ok(_))), "the fence was complete before");
    }

    #[test]
    fn regions_that_take_too_long_hold_up_no_release() {
        let cutting = Cutting::default();
        cutting.hold(fenced(), 1, Instant::now());
        assert!(matches!(begin(&cutting), Begun::Ended(Ok(_))));
        // The file is released, and its fence is not ordered for anything else.
        cutting.regions_dropped(|| None, || panic!("after the release"));
    }

    #[test]
    fn a_late_fence_that_failed_leaves_it_to_the_regions() {
        let cutting = Cutting::default();
        assert!(matches!(begin(&cutting), Begun::Now));
        cutting.leave_to(1, watched(Instant::now()));
        assert!(!cutting.cut(failed()));
        assert!(matches!(begin(&cutting), Begun::Earlier(_)));
        assert!(cutting.regions_dropped(|| Some(failed()), || ()));
    }
}
