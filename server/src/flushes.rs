//! The flushes of one guarded file, and whether one has failed.
//!
//! The kernel reports a failed write-back to one flush of an open file description and counts the pages
//! as clean then: the next flush succeeds over bytes that the medium lacks. All pins of a file share its
//! description. So one failed flush spoils every later one, and also each that ran beside it: the other
//! one may have taken the kernel's report and not have said so yet. A flush is good only when all that
//! had begun before it ended have ended well.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Flushes {
    state: Mutex<State>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct State {
    begun: u64,
    under_way: BTreeSet<u64>,
    failed: bool,
}

/// How a flush went.
#[derive(Debug)]
pub(crate) enum Flushed<T, E> {
    /// Everything that it covers is on the medium.
    Good(T),
    /// The kernel reported an error.
    Failed(E),
    /// The kernel reported none to this flush, but has to another one.
    Spoilt,
}

impl Flushes {
    /// Runs a flush, and waits for those that had begun when it ended, if errors are reported `once`.
    /// `may_hide` tells of an error whether it may be the kernel's only report of a failed write-back.
    pub(crate) fn run<T, E>(
        &self,
        once: bool,
        flush: impl FnOnce() -> Result<T, E>,
        may_hide: impl FnOnce(&E) -> bool,
    ) -> Flushed<T, E> {
        let number = self.state().begin();
        let done = flush();
        let failed = done.as_ref().is_err_and(may_hide);
        let last = self.state().end(number, failed);
        self.ended.notify_all();
        // Where a failed flush meets its error again, it tells of it by itself.
        let is_good = || if once { self.wait_for_verdict(last) } else { !self.have_failed() };
        match done {
            Err(error) => Flushed::Failed(error),
            Ok(done) if is_good() => Flushed::Good(done),
            Ok(_) => Flushed::Spoilt,
        }
    }

    /// Whether one has failed.
    pub(crate) fn have_failed(&self) -> bool {
        self.state().failed
    }

    fn wait_for_verdict(&self, last: u64) -> bool {
        let state = self.ended.wait_while(self.state(), |state| state.verdict(last).is_none());
        state.unwrap_or_else(PoisonError::into_inner).verdict(last) == Some(true)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self) -> u64 {
        self.begun += 1;
        self.under_way.insert(self.begun);
        self.begun
    }

    /// Returns the number of the last flush that has begun by now.
    fn end(&mut self, number: u64, failed: bool) -> u64 {
        self.under_way.remove(&number);
        self.failed |= failed;
        self.begun
    }

    /// Whether a flush that ended when this one was the last is good; `None`: not known yet.
    fn verdict(&self, last: u64) -> Option<bool> {
        if self.failed {
            return Some(false);
        }
        let earlier = self.under_way.first().is_some_and(|first| *first <= last);
        (!earlier).then_some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(flushes: &Flushes, flush: impl FnOnce() -> Result<(), ()>) -> Flushed<(), ()> {
        flushes.run(true, flush, |()| true)
    }

    #[test]
    fn one_that_fails_spoils_all_later_ones() {
        let flushes = Flushes::default();
        assert!(matches!(run(&flushes, || Ok(())), Flushed::Good(())));
        assert!(matches!(run(&flushes, || Err(())), Flushed::Failed(())));
        assert!(matches!(run(&flushes, || Ok(())), Flushed::Spoilt));
        assert!(flushes.have_failed());
    }

    #[test]
    fn an_error_that_hides_none_spoils_nothing() {
        let flushes = Flushes::default();
        assert!(matches!(flushes.run(true, || Err::<(), _>(()), |()| false), Flushed::Failed(())));
        assert!(matches!(run(&flushes, || Ok(())), Flushed::Good(())));
    }

    #[test]
    fn one_that_ran_beside_a_failing_one_is_not_good() {
        let mut state = State::default();
        let (first, second) = (state.begin(), state.begin());
        let last = state.end(second, false);
        assert_eq!(state.verdict(last), None, "the first may have the kernel's report");
        state.end(first, true);
        assert_eq!(state.verdict(last), Some(false));
    }

    #[test]
    fn one_waits_for_earlier_ones_and_not_for_later_ones() {
        let mut state = State::default();
        let (first, second) = (state.begin(), state.begin());
        let last = state.end(second, false);
        let _later = state.begin();
        assert_eq!(state.verdict(last), None);
        state.end(first, false);
        assert_eq!(state.verdict(last), Some(true));
    }

    /// The second ends while the first has the kernel's report and has not told of it.
    #[test]
    fn a_thread_waits_for_the_others() {
        use std::sync::mpsc::channel;
        let flushes = Flushes::default();
        let (reported, first_has_it) = channel();
        let (second_is_back, told) = channel();
        let flushes = &flushes;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let failed = run(flushes, || {
                    reported.send(()).unwrap();
                    told.recv().unwrap();
                    Err(())
                });
                assert!(matches!(failed, Flushed::Failed(())));
            });
            first_has_it.recv().unwrap();
            let beside = run(flushes, || {
                second_is_back.send(()).unwrap();
                Ok(())
            });
            assert!(matches!(beside, Flushed::Spoilt), "{beside:?}");
        });
    }
}
