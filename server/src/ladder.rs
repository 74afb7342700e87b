//! What is done when the fence itself hangs.
//!
//! Cutting a file off is one mprotect(2), which wants the process's memory lock for itself. A remote
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

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pinfold_leases::{FenceFailed, Fenced};

use crate::error::Result;
use crate::fence::{self, Order};
use crate::held::HeldFile;
use crate::sync::locked;

/// How long the fence may take before the next rung.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long regions may take at most before the last rung, which costs clients their connections that
/// have done nothing to lose them: on a machine that is busy everything takes long.
const LONGEST_WITH_REGIONS: Duration = Duration::from_secs(2);
/// Threads that deregister, for each file system. As many of its files may hang at a time before they keep
/// others of the same one waiting.
pub(crate) const THREADS: usize = 16;

/// How a fence ended.
type Outcome = Result<Fenced, FenceFailed>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ladder {
    fences: SyncSender<Arc<HeldFile>>,
    /// The thread of the first rung has not come back from an earlier file.
    busy: Arc<AtomicBool>,
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
        let mut waiting = locked(&self.0.files);
        let room = files * side_by_side();
        let more = room.saturating_sub(waiting.len());
        waiting.reserve(more);
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
    /// The same; the fence hangs. To be looked at again at this time, when regions will have had enough.
    /// Said once for each try; `news`: of this file for the first time.
    Hangs { regions_until: Instant, news: bool },
    /// The same; regions hang too, for so long that it is time for the last rung. Said once for each
    /// try; `news`: of this file for the first time.
    RegionsHang { news: bool },
}

impl Ladder {
    /// Starts the threads. They order a file's fence again when they have done something for it that
    /// nobody waited for.
    pub(crate) fn start(orders: &Sender<Order>) -> crate::error::Result<Self> {
        let busy = Arc::new(AtomicBool::new(false));
        let (fences, to_fence) = sync_channel(1);
        let (sender, free) = (orders.clone(), Arc::clone(&busy));
        fence::vital("pinfold-cut", move || cut_off(&to_fence, &sender, &free))?;
        Ok(Self { fences, busy, side_by_side: side_by_side() })
    }

    /// Takes a file as far as it can be taken in [`PATIENCE`]. For the fence thread only.
    pub(crate) fn climb(
        &self,
        file: &Arc<HeldFile>,
        lease_break_time: impl Fn() -> Option<Duration>,
    ) -> Climbed {
        let hangs = || Some(Instant::now() + patience_with_regions(lease_break_time()));
        match file.cutting().begin() {
            Begun::Now => {}
            Begun::Earlier { overdue: true } => {
                return Climbed::RegionsHang { news: file.cutting().is_first_hang_of_regions() };
            }
            Begun::Earlier { overdue: false } => return Climbed::UnderWay,
            Begun::Ended(outcome) => return Climbed::Done(outcome),
        }
        if self.busy.swap(true, Ordering::SeqCst) {
            // One that hangs is enough: this one would too.
            return self.drop_regions(file, hangs());
        }
        // The thread is free, so there is room; it ends only with this.
        let _ = self.fences.send(Arc::clone(file));
        match file.cutting().wait(PATIENCE) {
            // Pages are pinned, or the kernel refuses: to deregister every region is a fence too.
            Some(Err(_)) => self.drop_regions(file, None),
            Some(Ok(fenced)) => Climbed::Done(Ok(fenced)),
            None => self.drop_regions(file, hangs()),
        }
    }

    /// If the fence hangs: until when regions have time.
    fn drop_regions(&self, file: &Arc<HeldFile>, hangs: Option<Instant>) -> Climbed {
        let regions = file.begin_dropping_regions();
        // One thread if the fence hangs: a region of this file may be what it hangs on, and it must
        // not take them all.
        let threads = if hangs.is_some() { 1 } else { regions.clamp(1, self.side_by_side) };
        let climbed = file.cutting().leave_to(threads, hangs);
        file.file_system().regions().hand_over(file, threads);
        climbed
    }
}

/// An eighth of the time that the kernel gives, within limits.
fn patience_with_regions(lease_break_time: Option<Duration>) -> Duration {
    let time = lease_break_time.unwrap_or(Duration::MAX);
    (time / 8).clamp(PATIENCE, LONGEST_WITH_REGIONS)
}

/// The thread of the first rung.
fn cut_off(files: &Receiver<Arc<HeldFile>>, orders: &Sender<Order>, busy: &AtomicBool) {
    for file in files {
        let outcome = file.mapping().map(|mapping| mapping.fence());
        busy.store(false, Ordering::SeqCst);
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
    if file.cutting().regions_dropped(outcome) {
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
    hang_of_regions_was_told: AtomicBool,
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
    /// Nobody waits. If that is because the fence hangs, and nothing has been said of regions yet: until
    /// when those have time.
    UnderWay { hangs: Option<Instant> },
    /// What came of it, for the fence thread.
    Ended(Outcome),
}

/// What the fence thread finds.
#[derive(Debug)]
enum Begun {
    /// Nothing has been done: it begins.
    Now,
    /// Something is being done. `overdue` is said once.
    Earlier { overdue: bool },
    /// What came of it; from here on nothing is being done.
    Ended(Outcome),
}

impl Cutting {
    fn begin(&self) -> Begun {
        let mut state = locked(&self.state);
        match std::mem::take(&mut *state) {
            State::Pausing(until) if Instant::now() < until => {
                *state = State::Pausing(until);
                Begun::Earlier { overdue: false }
            }
            State::Idle | State::Pausing(_) => {
                *state = State::Awaited;
                Begun::Now
            }
            State::Ended(outcome) => Begun::Ended(outcome),
            State::Awaited => unreachable!("only the thread that begins waits"),
            State::UnderWay { hangs } => {
                let overdue = hangs.is_some_and(|until| until <= Instant::now());
                *state = State::UnderWay { hangs: hangs.filter(|_| !overdue) };
                Begun::Earlier { overdue }
            }
        }
    }

    /// It failed, and will be ordered again for then. Orders that come before are for a look at what is
    /// under way, and must not begin a try of their own: each try orders more than one.
    pub(crate) fn pause(&self, until: Instant) {
        *locked(&self.state) = State::Pausing(until);
    }

    /// Whether nothing has been said of it yet. A fence that is tried again hangs again, each time, and
    /// must not fill the log.
    fn is_first_hang(&self) -> bool {
        !self.hang_was_told.swap(true, Ordering::Relaxed)
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

    /// Nobody waits from here on. `hangs`: if that is because the fence hangs, until when regions have
    /// time.
    fn leave_to(&self, threads: usize, hangs: Option<Instant>) -> Climbed {
        self.threads.store(threads, Ordering::SeqCst);
        let mut state = locked(&self.state);
        // It may have come back this very moment; then the regions' threads say that all is done.
        if !matches!(*state, State::Ended(Ok(_))) {
            *state = State::UnderWay { hangs };
        }
        match hangs {
            Some(regions_until) => Climbed::Hangs { regions_until, news: self.is_first_hang() },
            None => Climbed::UnderWay,
        }
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
            State::Idle | State::Pausing(_) | State::UnderWay { .. } | State::Ended(_) => false,
        }
    }

    /// One of the threads found no region any more. Whether the fence is to be ordered again: by the
    /// last one.
    fn regions_dropped(&self, outcome: impl FnOnce() -> Option<Outcome>) -> bool {
        if self.threads.fetch_sub(1, Ordering::SeqCst) > 1 {
            return false;
        }
        let Some(outcome) = outcome() else { return false };
        let mut state = locked(&self.state);
        if matches!(*state, State::UnderWay { .. }) {
            *state = State::Ended(outcome);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed() -> Outcome {
        Err(FenceFailed::Shares { shares: 1 })
    }

    #[test]
    fn a_fence_that_comes_back_in_time_is_not_ordered_again() {
        let cutting = Cutting::default();
        assert!(matches!(cutting.begin(), Begun::Now));
        assert!(!cutting.cut(failed()), "somebody waits for it");
        assert!(cutting.wait(Duration::ZERO).is_some());
        assert!(matches!(cutting.begin(), Begun::Now), "it is tried again");
    }

    #[test]
    fn the_last_thread_orders_the_fence_and_says_what_came_of_it() {
        let cutting = Cutting::default();
        assert!(matches!(cutting.begin(), Begun::Now));
        assert!(cutting.wait(Duration::ZERO).is_none());
        assert!(matches!(cutting.leave_to(2, None), Climbed::UnderWay));
        assert!(!cutting.regions_dropped(|| panic!("it is not the last")));
        assert!(matches!(cutting.begin(), Begun::Earlier { overdue: false }));
        assert!(cutting.regions_dropped(|| Some(failed())));
        assert!(matches!(cutting.begin(), Begun::Ended(Err(_))));
        assert!(matches!(cutting.begin(), Begun::Now));
    }

    #[test]
    fn regions_that_hang_are_found_on_each_try_and_told_of_once() {
        let cutting = Cutting::default();
        let over = Instant::now();
        for first in [true, false] {
            assert!(matches!(cutting.begin(), Begun::Now));
            let left = cutting.leave_to(1, Some(over));
            assert!(matches!(left, Climbed::Hangs { news, .. } if news == first), "{left:?}");
            assert!(matches!(cutting.begin(), Begun::Earlier { overdue: true }));
            assert_eq!(cutting.is_first_hang_of_regions(), first);
            assert!(matches!(cutting.begin(), Begun::Earlier { overdue: false }));
            assert!(cutting.regions_dropped(|| Some(failed())));
            assert!(matches!(cutting.begin(), Begun::Ended(Err(_))));
        }
    }

    #[test]
    fn regions_that_fail_at_first_and_hang_later_are_found() {
        let cutting = Cutting::default();
        let over = Instant::now();
        assert!(matches!(cutting.begin(), Begun::Now));
        let in_time = Instant::now() + Duration::from_secs(3600);
        let left = cutting.leave_to(1, Some(in_time));
        assert!(matches!(left, Climbed::Hangs { news: true, .. }), "{left:?}");
        assert!(matches!(cutting.begin(), Begun::Earlier { overdue: false }), "there is time");
        assert!(cutting.regions_dropped(|| Some(failed())));
        assert!(matches!(cutting.begin(), Begun::Ended(Err(_))));
        assert!(matches!(cutting.begin(), Begun::Now));
        cutting.leave_to(1, Some(over));
        assert!(matches!(cutting.begin(), Begun::Earlier { overdue: true }));
        assert!(cutting.is_first_hang_of_regions(), "the log has not had it yet");
    }

    #[test]
    fn a_look_begins_no_try_before_it_is_time() {
        let cutting = Cutting::default();
        cutting.pause(Instant::now() + Duration::from_secs(3600));
        assert!(matches!(cutting.begin(), Begun::Earlier { overdue: false }));
        assert!(matches!(cutting.begin(), Begun::Earlier { overdue: false }));
        cutting.pause(Instant::now());
        assert!(matches!(cutting.begin(), Begun::Now));
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
    fn a_late_fence_that_failed_leaves_it_to_the_regions() {
        let cutting = Cutting::default();
        assert!(matches!(cutting.begin(), Begun::Now));
        cutting.leave_to(1, Some(Instant::now()));
        assert!(!cutting.cut(failed()));
        assert!(matches!(cutting.begin(), Begun::Earlier { .. }));
        assert!(cutting.regions_dropped(|| Some(failed())));
    }
}
