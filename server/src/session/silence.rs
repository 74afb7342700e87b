//! Judges the silence of a client: it loses its queue pairs after the grace, its session after the
//! time to live. Pure.

use std::time::{Duration, Instant};

/// What a client's silence has come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Verdict {
    /// It was heard not long ago, or has been cut off already.
    Wait,
    /// Its queue pairs are to be destroyed, once.
    CutOff,
    /// Its session is over.
    Over,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Silence {
    grace: Duration,
    time_to_live: Duration,
    heard: Instant,
    cut_off: bool,
}

impl Silence {
    pub(crate) fn new(grace: Duration, time_to_live: Duration, now: Instant) -> Self {
        Self { grace, time_to_live, heard: now, cut_off: false }
    }

    /// The client gave a sign of life at this time, in whatever way.
    pub(crate) fn heard(&mut self, at: Instant) {
        if at > self.heard {
            self.heard = at;
            self.cut_off = false;
        }
    }

    /// When to judge next, if nothing is heard until then.
    pub(crate) fn judge_at(&self) -> Instant {
        self.heard + if self.cut_off { self.time_to_live } else { self.grace }
    }

    pub(crate) fn judge(&mut self, now: Instant) -> Verdict {
        let silent = now.saturating_duration_since(self.heard);
        if silent >= self.time_to_live {
            return Verdict::Over;
        }
        if silent < self.grace || self.cut_off {
            return Verdict::Wait;
        }
        self.cut_off = true;
        Verdict::CutOff
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(5);
    const TIME_TO_LIVE: Duration = Duration::from_secs(10);

    #[test]
    fn a_silent_client_is_cut_off_once_and_then_given_up() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut silence = Silence::new(GRACE, TIME_TO_LIVE, start);
        assert_eq!((silence.judge(at(4)), silence.judge_at()), (Verdict::Wait, at(5)));
        assert_eq!((silence.judge(at(5)), silence.judge_at()), (Verdict::CutOff, at(10)));
        assert_eq!(silence.judge(at(9)), Verdict::Wait);
        assert_eq!(silence.judge(at(10)), Verdict::Over);
    }

    #[test]
    fn any_sign_of_life_counts_the_newest_and_lets_it_be_cut_off_again() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut silence = Silence::new(GRACE, TIME_TO_LIVE, start);
        silence.heard(at(3));
        silence.heard(at(1));
        assert_eq!(silence.judge(at(7)), Verdict::Wait);
        assert_eq!(silence.judge(at(8)), Verdict::CutOff);
        silence.heard(at(9));
        assert_eq!(silence.judge(at(13)), Verdict::Wait);
        assert_eq!(silence.judge(at(14)), Verdict::CutOff);
    }
}
