//! One pin's life as a pure state machine: no clock, no I/O, no runtime.
//!
//! ```text
//!            drain                 revoke
//!   Live ───────────► Draining ───────────► Revoked
//!    │                   │                     ▲
//!    ├───────────────────┼─────────────────────┘
//!    └───────────────────┴──── lose ─────────► Lost
//! ```
//! Operations are counted in every phase, but begin in `Live` only. The server hears `Drained` once
//! per pin, when the first of these holds: the notice came and nothing was in flight, or the last
//! operation ended under the notice.

use crate::{DrainNotice, Loss, Revocation, RevocationReason};

/// Where a pin is in its life, and how much is in flight on it.
#[derive(Debug)]
pub(crate) struct PinState {
    phase: Phase,
    in_flight: usize,
    /// Somebody waits until nothing is in flight.
    awaited: bool,
}

#[derive(Debug)]
enum Phase {
    Live,
    Draining(DrainNotice),
    Revoked(Revocation),
    Lost(Loss),
}

/// Why an operation may not begin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Gone {
    Draining(DrainNotice),
    Revoked(Revocation),
    Lost(Loss),
}

impl Gone {
    /// Whether the pin ends because the server could not write the file back.
    pub(crate) fn is_of_write_back(&self) -> bool {
        let reason = match self {
            Self::Draining(notice) => notice.reason,
            Self::Revoked(revocation) => revocation.reason,
            Self::Lost(_) => return false,
        };
        reason == RevocationReason::WriteBackFailed
    }
}

/// What the end of an operation means.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Finished {
    /// Nobody waits for it.
    Unnoticed,
    /// It was the last one, and somebody here waits for it.
    Awaited,
    /// It was the last one, and the server waits for it.
    Drained,
}

impl PinState {
    pub(crate) fn new() -> Self {
        Self { phase: Phase::Live, in_flight: 0, awaited: false }
    }

    /// Whether nothing is in flight; else the last operation tells when it ends.
    pub(crate) fn await_idle(&mut self) -> bool {
        self.awaited = self.in_flight > 0;
        !self.awaited
    }

    /// Refuses what `begin` would refuse.
    pub(crate) fn check(&self) -> Result<(), Gone> {
        match &self.phase {
            Phase::Live => Ok(()),
            Phase::Draining(notice) => Err(Gone::Draining(*notice)),
            Phase::Revoked(revocation) => Err(Gone::Revoked(*revocation)),
            Phase::Lost(loss) => Err(Gone::Lost(loss.clone())),
        }
    }

    /// Counts an operation in; each success is paired with one `finish`.
    pub(crate) fn begin(&mut self) -> Result<(), Gone> {
        self.check()?;
        self.in_flight += 1;
        Ok(())
    }

    /// Counts an operation out.
    pub(crate) fn finish(&mut self) -> Finished {
        debug_assert!(self.in_flight > 0, "finish without begin");
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.in_flight > 0 {
            return Finished::Unnoticed;
        }
        let awaited = std::mem::take(&mut self.awaited);
        match self.phase {
            Phase::Draining(_) => Finished::Drained,
            Phase::Live | Phase::Revoked(_) | Phase::Lost(_) if awaited => Finished::Awaited,
            Phase::Live | Phase::Revoked(_) | Phase::Lost(_) => Finished::Unnoticed,
        }
    }

    /// Lets nothing begin any more. True: nothing is in flight either, the pin is drained.
    pub(crate) fn drain(&mut self, notice: DrainNotice) -> bool {
        if !matches!(self.phase, Phase::Live) {
            return false;
        }
        self.phase = Phase::Draining(notice);
        self.in_flight == 0
    }

    /// The keys are dead.
    pub(crate) fn revoke(&mut self, revocation: Revocation) {
        if matches!(self.phase, Phase::Live | Phase::Draining(_)) {
            self.phase = Phase::Revoked(revocation);
        }
    }

    /// The session is over, and the pin with it. A revocation says more, so it stays.
    pub(crate) fn lose(&mut self, loss: Loss) {
        if matches!(self.phase, Phase::Live | Phase::Draining(_)) {
            self.phase = Phase::Lost(loss);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::Generation;

    const GENERATION: Generation = Generation { incarnation: 1, counter: 2 };
    const NOTICE: DrainNotice = DrainNotice {
        generation: GENERATION,
        reason: RevocationReason::LocalWriter,
        drain_budget: Duration::from_secs(5),
    };
    const REVOCATION: Revocation =
        Revocation { generation: GENERATION, reason: RevocationReason::LocalWriter, timings: None };

    #[test]
    fn an_idle_pin_is_drained_at_the_notice() {
        let mut pin = PinState::new();
        assert!(pin.drain(NOTICE));
        assert_eq!(pin.begin(), Err(Gone::Draining(NOTICE)));
    }

    #[test]
    fn a_busy_pin_is_drained_by_its_last_operation() {
        let mut pin = PinState::new();
        pin.begin().unwrap();
        pin.begin().unwrap();
        assert!(!pin.drain(NOTICE));
        assert_eq!(pin.finish(), Finished::Unnoticed);
        assert_eq!(pin.finish(), Finished::Drained);
    }

    #[test]
    fn without_a_notice_nobody_waits_for_the_last_operation() {
        let mut pin = PinState::new();
        pin.begin().unwrap();
        assert_eq!(pin.finish(), Finished::Unnoticed);
        assert_eq!(pin.begin(), Ok(()));
    }

    #[test]
    fn who_waits_for_the_last_operation_hears_of_it_once() {
        let mut pin = PinState::new();
        assert!(pin.await_idle());
        pin.begin().unwrap();
        pin.begin().unwrap();
        assert!(!pin.await_idle());
        assert_eq!(pin.finish(), Finished::Unnoticed);
        assert_eq!(pin.finish(), Finished::Awaited);
        pin.begin().unwrap();
        assert_eq!(pin.finish(), Finished::Unnoticed);
    }

    #[test]
    fn a_second_notice_is_not_answered_again() {
        let mut pin = PinState::new();
        assert!(pin.drain(NOTICE));
        assert!(!pin.drain(NOTICE));
    }

    #[test]
    fn a_revocation_outlives_what_comes_later() {
        let mut pin = PinState::new();
        pin.begin().unwrap();
        pin.revoke(REVOCATION);
        assert_eq!(pin.finish(), Finished::Unnoticed);
        pin.lose(Loss::StreamEnded);
        assert!(!pin.drain(NOTICE));
        assert_eq!(pin.check(), Err(Gone::Revoked(REVOCATION)));
    }

    #[test]
    fn a_lost_session_ends_the_drain() {
        let mut pin = PinState::new();
        pin.begin().unwrap();
        assert!(!pin.drain(NOTICE));
        pin.lose(Loss::StreamEnded);
        assert_eq!(pin.finish(), Finished::Unnoticed);
        assert_eq!(pin.begin(), Err(Gone::Lost(Loss::StreamEnded)));
    }

    /// Every schedule of three operations and a notice: exactly one `Drained` in total, and never
    /// while something is in flight.
    #[test]
    fn whatever_the_order_the_server_hears_it_once() {
        for schedule in 0..4_u32.pow(8) {
            let mut pin = PinState::new();
            let (mut in_flight, mut noticed, mut answers) = (0, false, 0);
            for step in (0..8).map(|digit| schedule / 4_u32.pow(digit) % 4) {
                match step {
                    0 if !noticed => {
                        noticed = true;
                        let drained = pin.drain(NOTICE);
                        assert_eq!(drained, in_flight == 0);
                        answers += u32::from(drained);
                    }
                    1 | 2 => {
                        let began = pin.begin().is_ok();
                        assert_eq!(began, !noticed);
                        in_flight += u32::from(began);
                    }
                    3 if in_flight > 0 => {
                        in_flight -= 1;
                        let drained = pin.finish() == Finished::Drained;
                        assert_eq!(drained, noticed && in_flight == 0);
                        answers += u32::from(drained);
                    }
                    _ => {}
                }
            }
            let expected = u32::from(noticed && in_flight == 0);
            assert_eq!(answers, expected, "schedule {schedule}");
        }
    }
}
