//! Threads for one file system's calls, started before any call comes: a call begins on one of them, waits
//! in their queue, or is refused at once because nothing of what is under way comes back.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::error::Result;
use crate::fence::vital;
use crate::sync::locked;

/// Calls that wait for a thread at most.
const WAITING_AT_MOST: usize = 1024;

/// Why a call did not run to its end.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum NotDone {
    /// It had no effect.
    #[error("none of the {busy} calls under way has ended for {} s", still_for.as_secs())]
    StandsStill {
        /// Calls under way.
        busy: usize,
        /// Since one last began or ended.
        still_for: Duration,
    },
    /// It had no effect.
    #[error("{WAITING_AT_MOST} calls wait already")]
    TooMany,
    /// It goes on, and nobody is told how it ends.
    #[error("the call has not come back for {} s, and goes on", waited.as_secs())]
    TooLong {
        /// How long its caller waited.
        waited: Duration,
    },
    /// It panicked.
    #[error("a task of the server failed")]
    Panicked,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Debug)]
struct State {
    queue: VecDeque<Job>,
    threads: usize,
    /// Of the threads.
    busy: usize,
    /// When all are busy and no call has begun or ended for so long, nothing comes back.
    still_after: Duration,
    /// When a call last began or ended.
    moved: Instant,
    closed: bool,
}

struct Job {
    ticket: Arc<Ticket>,
    work: Box<dyn FnOnce() + Send>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("ticket", &self.ticket).finish_non_exhaustive()
    }
}

const WAITING: u8 = 0;
const BEGUN: u8 = 1;
const GIVEN_UP: u8 = 2;

/// Decides once between the thread that would begin a call and the caller who gives it up.
#[derive(Debug, Default)]
struct Ticket(AtomicU8);

impl Ticket {
    fn take(&self, to: u8) -> bool {
        self.0.compare_exchange(WAITING, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// Takes a call out of the queue when its caller goes away.
struct Waiter<'a> {
    pool: &'a Pool,
    ticket: Arc<Ticket>,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        if self.ticket.take(GIVEN_UP) {
            let job = self.pool.take_out(&self.ticket);
            // Not under the lock: what the call was to work with may take locks of its own.
            drop(job);
        }
    }
}

impl Pool {
    /// Starts so many threads. When all are busy and no call has begun or ended for `still_after`, new
    /// calls are refused.
    pub(crate) fn start(name: &'static str, threads: usize, still_after: Duration) -> Result<Self> {
        let state = State {
            queue: VecDeque::with_capacity(WAITING_AT_MOST),
            threads,
            busy: 0,
            still_after,
            moved: Instant::now(),
            closed: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), more: Condvar::new() });
        let pool = Self { shared };
        for _ in 0..threads {
            let shared = Arc::clone(&pool.shared);
            vital(name, move || shared.work())?;
        }
        Ok(pool)
    }

    /// Does a call's work on one of the threads. A call that is given up before it begins, because this
    /// is dropped, has no effect. It is waited for `at_most` from its beginning.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        at_most: Duration,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> std::result::Result<T, NotDone> {
        let (done, mut ended) = oneshot::channel();
        let ticket = Arc::new(Ticket::default());
        let waiter = Waiter { pool: self, ticket: Arc::clone(&ticket) };
        let still_after = self.shared.state().still_after;
        let work = Box::new(move || {
            // The caller may have gone; then nobody is told.
            let _ = done.send(catch_unwind(AssertUnwindSafe(work)));
        });
        self.push(Job { ticket, work })?;
        loop {
            let begun = waiter.ticket.0.load(Ordering::SeqCst) == BEGUN;
            let patience = if begun { at_most } else { still_after };
            match tokio::time::timeout(patience, &mut ended).await {
                Ok(Ok(Ok(value))) => return Ok(value),
                Ok(_) => return Err(NotDone::Panicked),
                Err(_) if begun => return Err(NotDone::TooLong { waited: at_most }),
                // It begins anew if the thread was faster.
                Err(_) => match self.still() {
                    Some(still) if waiter.ticket.take(GIVEN_UP) => {
                        drop(self.take_out(&waiter.ticket));
                        return Err(still);
                    }
                    _ => {}
                },
            }
        }
    }

    /// A call that has begun is getting on.
    pub(crate) fn note_progress(&self) {
        self.shared.state().moved = Instant::now();
    }

    fn push(&self, job: Job) -> std::result::Result<(), NotDone> {
        let mut state = self.shared.state();
        if let Some(still) = state.still(Instant::now()) {
            return Err(still);
        }
        if state.queue.len() >= WAITING_AT_MOST {
            return Err(NotDone::TooMany);
        }
        state.queue.push_back(job);
        drop(state);
        self.shared.more.notify_one();
        Ok(())
    }

    fn still(&self) -> Option<NotDone> {
        self.shared.state().still(Instant::now())
    }

    fn take_out(&self, ticket: &Arc<Ticket>) -> Option<Job> {
        let mut state = self.shared.state();
        let at = state.queue.iter().position(|job| Arc::ptr_eq(&job.ticket, ticket))?;
        state.queue.remove(at)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.more.notify_all();
    }
}

impl State {
    /// Whether everybody is busy and nothing moves.
    fn still(&self, now: Instant) -> Option<NotDone> {
        let still_for = now.saturating_duration_since(self.moved);
        let still = self.busy == self.threads && still_for >= self.still_after;
        still.then_some(NotDone::StandsStill { busy: self.busy, still_for })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// What each thread does.
    fn work(&self) {
        let mut state = self.state();
        loop {
            if let Some(job) = state.queue.pop_front() {
                if job.ticket.take(BEGUN) {
                    state.busy += 1;
                    state.moved = Instant::now();
                    drop(state);
                    (job.work)();
                    state = self.state();
                    state.busy -= 1;
                    state.moved = Instant::now();
                }
                continue;
            }
            if state.closed {
                return;
            }
            state = self.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    /// A call that hangs until its sender is dropped.
    fn hanging() -> (Sender<()>, impl FnOnce() + Send + 'static) {
        let (free, hang) = channel::<()>();
        (free, move || {
            // Until the other end is dropped.
            let _ = hang.recv();
        })
    }

    #[tokio::test]
    async fn a_call_that_is_given_up_in_the_queue_has_no_effect() {
        let pool = Arc::new(Pool::start("test", 1, LONG).unwrap());
        let (free, hang) = hanging();
        let (for_first, (began, begun)) = (Arc::clone(&pool), oneshot::channel());
        let first = tokio::spawn(async move {
            let work = move || {
                began.send(()).unwrap();
                hang();
            };
            for_first.run(LONG, work).await
        });
        begun.await.unwrap();
        let (effect, effects) = channel();
        let second = pool.run(LONG, move || effect.send(()).unwrap());
        assert!(tokio::time::timeout(Duration::ZERO, second).await.is_err());
        assert!(effects.recv().is_err(), "its work is dropped with it");
        drop(free);
        first.await.unwrap().unwrap();
        assert_eq!(pool.run(LONG, || 7).await, Ok(7));
    }

    #[tokio::test]
    async fn what_waits_behind_calls_that_hang_is_refused() {
        let pool = Arc::new(Pool::start("test", 1, Duration::from_millis(1)).unwrap());
        let (free, hang) = hanging();
        let (for_first, (began, begun)) = (Arc::clone(&pool), oneshot::channel());
        let short = Duration::from_millis(1);
        let first = tokio::spawn(async move {
            let work = move || {
                began.send(()).unwrap();
                hang();
            };
            for_first.run(short, work).await
        });
        begun.await.unwrap();
        // The first of these may be in the queue for a moment.
        for _ in 0..3 {
            let refused = pool.run(LONG, || panic!("it has been refused")).await;
            let refused: std::result::Result<(), _> = refused;
            assert!(matches!(refused, Err(NotDone::StandsStill { busy: 1, .. })), "{refused:?}");
        }
        // One that has begun goes on.
        assert_eq!(first.await.unwrap(), Err(NotDone::TooLong { waited: short }));
        drop(free);
    }

    #[tokio::test]
    async fn a_call_that_panics_costs_no_thread() {
        let pool = Pool::start("test", 1, LONG).unwrap();
        assert_eq!(
            pool.run(LONG, || panic!("as it should")).await,
            Err::<(), _>(NotDone::Panicked)
        );
        assert_eq!(pool.run(LONG, || 1).await, Ok(1));
    }

    #[test]
    fn it_stands_still_only_if_all_are_busy() {
        let now = Instant::now();
        let later = now + LONG;
        let of = |busy| State {
            queue: VecDeque::new(),
            threads: 2,
            busy,
            still_after: LONG,
            moved: now,
            closed: false,
        };
        assert_eq!(of(1).still(later), None);
        assert_eq!(of(2).still(now), None);
        assert!(of(2).still(later).is_some());
    }
}
