//! The life of a kept pin as a pure state machine: no clock, no I/O, no runtime.
//!
//! ```text
//!          interrupt           renewed            take
//!   Held ────────────► Away ────────────► Back ──────────► Held (the new one)
//!                     │  ▲ ▲                │
//!                stop │  │ └── interrupt ───┘
//!                     ▼  │ retry
//!                   Stopped
//! ```
//! The user's calls go through in `Held` only: who has not taken the report of an interruption does
//! not write a byte after it.

use std::fmt;
use std::sync::Arc;

use crate::pin_state::Gone;
use crate::{DrainNotice, Error, Generation, Loss, Revocation, WriteFate};

/// What interrupted a kept pin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum InterruptionCause {
    /// The server wants it back: it will be revoked in a moment.
    Draining(DrainNotice),
    /// It was taken back.
    Revoked(Revocation),
    /// Its session was lost.
    SessionLost(Loss),
}

/// The report of an interruption of a kept pin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interruption {
    /// What interrupted it; the first thing, if there were several before the report was taken.
    pub cause: InterruptionCause,
    /// What became of the bytes written since the pin was first granted, or since the last report
    /// was taken.
    pub fate: WriteFate,
    /// The generation that ended.
    pub old: Generation,
    /// The generation that goes on; absent while the pin is not held again.
    pub new: Option<Generation>,
    /// How often it was tried to have it again.
    pub attempts: u32,
    /// How often the pin was taken back again after it had been renewed, before this report was
    /// taken. No writes of this client are in there: none could begin.
    pub repeats: u32,
}

/// How a file is not the one that was pinned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FileChange {
    /// The path names another file.
    Replaced,
    /// A local process has written to it, cut it or grown it meanwhile, or set its times.
    Modified,
    /// The server could not write it back to its medium: what was written and not committed may be missing.
    NotWrittenBack,
    /// It is shorter than what the pin could reach.
    Shrunk {
        /// Where the bytes that the pin could reach ended.
        needed: u64,
        /// Where the file ends.
        size: u64,
    },
}

/// Why a pin is not kept any longer.
#[derive(Clone, Debug)]
pub(crate) enum Stopped {
    Changed(FileChange),
    GaveUp { attempts: u32, source: Arc<Error> },
}

/// A kept pin; `P` is the pin itself.
#[derive(Debug)]
pub(crate) struct KeptState<P> {
    phase: Phase<P>,
}

#[derive(Debug)]
enum Phase<P> {
    Held(P),
    Away(Gap<P>),
    Back(Gap<P>, P),
    Stopped(Gap<P>, Stopped),
}

/// An interruption whose report is not taken yet.
#[derive(Clone, Debug)]
pub(crate) struct Gap<P> {
    /// The last pin that the user could use.
    pub(crate) old: P,
    pub(crate) cause: InterruptionCause,
    pub(crate) attempts: u32,
    pub(crate) repeats: u32,
}

/// What the user gets.
#[derive(Debug)]
pub(crate) enum View<'a, P> {
    Held(&'a P),
    /// Interrupted; the new pin may be there already.
    Interrupted(&'a Gap<P>, Option<&'a P>),
    Stopped(&'a Gap<P>, &'a Stopped),
}

impl<P: Clone> KeptState<P> {
    pub(crate) fn new(pin: P) -> Self {
        Self { phase: Phase::Held(pin) }
    }

    pub(crate) fn view(&self) -> View<'_, P> {
        match &self.phase {
            Phase::Held(pin) => View::Held(pin),
            Phase::Away(gap) => View::Interrupted(gap, None),
            Phase::Back(gap, new) => View::Interrupted(gap, Some(new)),
            Phase::Stopped(gap, why) => View::Stopped(gap, why),
        }
    }

    /// The pin that is there now is going.
    pub(crate) fn interrupt(&mut self, cause: InterruptionCause) {
        let gap = match &self.phase {
            Phase::Held(old) => Gap { old: old.clone(), cause, attempts: 0, repeats: 0 },
            Phase::Back(gap, _) => Gap { repeats: gap.repeats + 1, ..gap.clone() },
            Phase::Away(_) | Phase::Stopped(..) => return,
        };
        self.phase = Phase::Away(gap);
    }

    /// It is gone, and this is the whole of the cause.
    pub(crate) fn explain(&mut self, cause: InterruptionCause) {
        if let Phase::Away(gap) = &mut self.phase
            && gap.repeats == 0
        {
            gap.cause = cause;
        }
    }

    /// One more try to have it again.
    pub(crate) fn attempt(&mut self) {
        if let Phase::Away(gap) = &mut self.phase {
            gap.attempts = gap.attempts.saturating_add(1);
        }
    }

    /// It is there again.
    pub(crate) fn renewed(&mut self, new: P) {
        if let Phase::Away(gap) = &self.phase {
            self.phase = Phase::Back(gap.clone(), new);
        }
    }

    /// It will not be there again.
    pub(crate) fn stop(&mut self, why: Stopped) {
        if let Phase::Away(gap) = &self.phase {
            self.phase = Phase::Stopped(gap.clone(), why);
        }
    }

    /// It is to be tried after all.
    pub(crate) fn retry(&mut self) {
        if let Phase::Stopped(gap, _) = &self.phase {
            self.phase = Phase::Away(gap.clone());
        }
    }

    /// The user takes the report, and goes on with the new pin.
    pub(crate) fn take(&mut self) -> Option<(Gap<P>, P)> {
        let Phase::Back(gap, new) = &self.phase else { return None };
        let taken = (gap.clone(), new.clone());
        self.phase = Phase::Held(taken.1.clone());
        Some(taken)
    }
}

impl From<Gone> for InterruptionCause {
    fn from(gone: Gone) -> Self {
        match gone {
            Gone::Draining(notice) => Self::Draining(notice),
            Gone::Revoked(revocation) => Self::Revoked(revocation),
            Gone::Lost(loss) => Self::SessionLost(loss),
        }
    }
}

impl fmt::Display for InterruptionCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Draining(notice) => notice.reason.fmt(f),
            Self::Revoked(revocation) => revocation.reason.fmt(f),
            Self::SessionLost(loss) => write!(f, "the session was lost: {loss}"),
        }
    }
}

impl fmt::Display for FileChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Replaced => f.write_str("its path names another file now"),
            Self::Modified => {
                f.write_str("a process of the storage host has changed its bytes meanwhile")
            }
            Self::NotWrittenBack => f.write_str(
                "the server could not write it back to its medium, and what was not committed may be \
                 missing there",
            ),
            Self::Shrunk { needed, size } => {
                write!(f, "it ends at byte {size} now, and the pin reached up to {needed}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOST: InterruptionCause = InterruptionCause::SessionLost(Loss::StreamEnded);
    const BROKE: InterruptionCause = InterruptionCause::SessionLost(Loss::ConnectionBroke);

    #[test]
    fn nothing_goes_through_until_the_report_is_taken() {
        let mut state = KeptState::new(1);
        assert!(matches!(state.view(), View::Held(1)));
        assert!(state.take().is_none());
        state.interrupt(LOST);
        state.attempt();
        state.attempt();
        assert!(matches!(state.view(), View::Interrupted(_, None)));
        assert!(state.take().is_none());
        state.renewed(2);
        assert!(matches!(state.view(), View::Interrupted(_, Some(2))));
        let (gap, new) = state.take().unwrap();
        assert_eq!((gap.old, new, gap.attempts, gap.repeats), (1, 2, 2, 0));
        assert!(matches!(state.view(), View::Held(2)));
        assert!(state.take().is_none(), "once");
    }

    #[test]
    fn a_pin_that_goes_again_before_that_is_the_same_interruption() {
        let mut state = KeptState::new(1);
        state.interrupt(LOST);
        state.attempt();
        state.renewed(2);
        state.interrupt(BROKE);
        state.explain(BROKE);
        assert!(matches!(state.view(), View::Interrupted(_, None)));
        state.attempt();
        state.renewed(3);
        let (gap, new) = state.take().unwrap();
        assert_eq!((gap.old, new, gap.attempts, gap.repeats), (1, 3, 2, 1));
        assert_eq!(gap.cause, LOST);
    }

    #[test]
    fn a_cause_is_completed_and_a_second_notice_changes_nothing() {
        let mut state = KeptState::new(1);
        state.interrupt(LOST);
        state.interrupt(BROKE);
        assert!(matches!(state.view(), View::Interrupted(gap, None) if gap.cause == LOST));
        state.explain(BROKE);
        assert!(matches!(state.view(), View::Interrupted(gap, None) if gap.cause == BROKE));
    }

    #[test]
    fn what_is_stopped_goes_on_only_when_it_is_told_to() {
        let mut state = KeptState::new(1);
        state.stop(Stopped::Changed(FileChange::Replaced));
        assert!(matches!(state.view(), View::Held(1)));
        state.interrupt(LOST);
        state.stop(Stopped::Changed(FileChange::Replaced));
        state.renewed(2);
        state.interrupt(BROKE);
        assert!(state.take().is_none());
        assert!(matches!(state.view(), View::Stopped(..)));
        state.retry();
        assert!(matches!(state.view(), View::Interrupted(gap, None) if gap.cause == LOST));
        state.renewed(2);
        assert_eq!(state.take().unwrap().1, 2);
    }
}
