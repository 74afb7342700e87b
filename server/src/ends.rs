//! What ends with a pin or a session, done on threads that were started before: side by side for
//! different files, one after the other for one file, and never refused.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use pinfold_leases::GuardId;

use crate::error::Result;
use crate::fence::vital;
use crate::sync::locked;

/// Files of one file system that may hang in their ends before other files of the same one wait.
pub(crate) const FILES_AT_A_TIME: usize = 8;

type Work = Box<dyn FnOnce() + Send>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Ends {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(GuardId, Work)>,
    /// Files that a thread is at.
    at_work: HashSet<GuardId>,
    closed: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("waiting", &self.queue.len()).finish_non_exhaustive()
    }
}

impl Ends {
    /// Starts the threads.
    pub(crate) fn start() -> Result<Self> {
        let ends = Self { shared: Arc::default() };
        for _ in 0..FILES_AT_A_TIME {
            let shared = Arc::clone(&ends.shared);
            vital("pinfold-ends", move || shared.work())?;
        }
        Ok(ends)
    }

    /// Orders work on a file. Does not wait.
    pub(crate) fn order(&self, file: GuardId, work: impl FnOnce() + Send + 'static) {
        locked(&self.shared.state).queue.push_back((file, Box::new(work)));
        self.shared.more.notify_one();
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        locked(&self.shared.state).closed = true;
        self.shared.more.notify_all();
    }
}

impl State {
    /// The oldest work of a file that no thread is at.
    fn next(&mut self) -> Option<(GuardId, Work)> {
        let at = self.queue.iter().position(|(file, _)| !self.at_work.contains(file))?;
        self.queue.remove(at)
    }
}

impl Shared {
    fn work(&self) {
        let mut state = locked(&self.state);
        loop {
            if let Some((file, work)) = state.next() {
                state.at_work.insert(file);
                drop(state);
                work();
                state = locked(&self.state);
                state.at_work.remove(&file);
                // What waits for this file wakes nobody by itself.
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
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_file_that_hangs_keeps_one_thread_and_no_other_file() {
        let ends = Ends::start().unwrap();
        let stuck = GuardId::simulated(1);
        let (free, hang) = channel::<()>();
        let (did, done) = channel();
        ends.order(stuck, move || {
            // Until the other end is dropped.
            let _ = hang.recv();
        });
        // More than there are threads: they wait for the first, and hold none.
        for number in 0..2 * FILES_AT_A_TIME {
            let did = did.clone();
            ends.order(stuck, move || did.send((1, number)).unwrap());
        }
        for file in 2..20 {
            let did = did.clone();
            ends.order(GuardId::simulated(file), move || did.send((file, 0)).unwrap());
        }
        let others: HashSet<_> = (2..20).map(|_| done.recv().unwrap().0).collect();
        assert_eq!(others, (2..20).collect());
        drop(free);
        let rest: Vec<_> = (0..2 * FILES_AT_A_TIME).map(|_| done.recv().unwrap()).collect();
        let in_order: Vec<_> = (0..2 * FILES_AT_A_TIME).map(|number| (1, number)).collect();
        assert_eq!(rest, in_order);
    }
}
