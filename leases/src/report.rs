//! What to tell of one guard, given what is seen of it: pure, so that it can be tried against a model
//! of the kernel.

use crate::guard::GuardState;
use crate::watch::BreakKind;

/// What has been told of a guard.
#[derive(Debug, Default)]
pub(crate) struct Told(Option<BreakKind>);

impl Told {
    /// What to tell now, if anything. A signal is only the reason to look: its descriptor number may
    /// have been used again since it was sent, so what counts is the state that the kernel shows
    /// now. `None`: it shows none.
    pub(crate) fn see(&mut self, state: Option<GuardState>) -> Option<BreakKind> {
        let kind = match state {
            Some(GuardState::Held) => return None,
            Some(GuardState::Broken(kind)) => kind,
            // The reader has come and gone through before we looked.
            Some(GuardState::ReadersPass) => BreakKind::Reader,
            // Not to know is to assume the worst.
            None => BreakKind::Writer,
        };
        if self.0.is_some_and(|told| told >= kind) {
            return None;
        }
        self.0 = Some(kind);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The kernel's side of one guard (`__break_lease` and `time_out_leases` in fs/locks.c), with a
    /// clock of its own.
    struct Kernel {
        delegation: bool,
        now: u64,
        /// lease-break-time; 0 is never.
        period: u64,
        readers_pass: bool,
        /// A pending break, and when it expires, if ever.
        reader: Option<Option<u64>>,
        writer: Option<Option<u64>>,
    }

    impl Kernel {
        fn expiry(&self) -> Option<u64> {
            (self.period > 0).then_some(self.now + self.period)
        }

        fn time_out(&mut self) {
            if self.reader.flatten().is_some_and(|at| self.now > at) {
                (self.reader, self.readers_pass) = (None, true);
            }
        }

        fn reader_comes(&mut self) {
            self.time_out();
            if !self.readers_pass && self.reader.is_none() && self.writer.is_none() {
                self.reader = Some(self.expiry());
            }
        }

        fn writer_comes(&mut self) {
            self.time_out();
            if self.writer.is_none() {
                self.writer = Some(self.expiry());
            }
        }

        /// As `Lease::state` reads it. A writer's expiry looks no different from its wait.
        fn state(&mut self) -> GuardState {
            self.time_out();
            match (self.writer, self.reader, self.readers_pass) {
                (Some(_), ..) => GuardState::Broken(BreakKind::Writer),
                (None, None, false) => GuardState::Held,
                (None, None, true) if self.delegation => GuardState::ReadersPass,
                _ => GuardState::Broken(BreakKind::Reader),
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Reader,
        Writer,
        Wait(u64),
        SetPeriod(u64),
        /// A signal arrives, late or in time or for another file, or a rescan comes.
        Look,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            Just(Step::Reader),
            Just(Step::Writer),
            (0u64..9).prop_map(Step::Wait),
            (0u64..5).prop_map(Step::SetPeriod),
            Just(Step::Look),
        ];
        prop::collection::vec(step, 0..24)
    }

    proptest! {
        /// However breaks, time and looks fall together: after the last look everybody who came has
        /// been told of, once, and nobody else; a reader never after a writer.
        #[test]
        fn each_break_is_told_once(delegation: bool, steps in steps()) {
            let mut kernel = Kernel {
                delegation,
                now: 0,
                period: 3,
                readers_pass: false,
                reader: None,
                writer: None,
            };
            let (mut told, mut said) = (Told::default(), Vec::new());
            let (mut looked_at_reader, mut reader_came, mut writer_came) = (false, false, false);
            for step in steps.into_iter().chain([Step::Look]) {
                match step {
                    Step::Reader => kernel.reader_comes(),
                    Step::Writer => kernel.writer_comes(),
                    Step::Wait(seconds) => kernel.now += seconds,
                    Step::SetPeriod(period) => kernel.period = period,
                    Step::Look => {
                        looked_at_reader |= reader_came && !writer_came;
                        said.extend(told.see(Some(kernel.state())));
                    }
                }
                reader_came |= kernel.reader.is_some();
                writer_came |= kernel.writer.is_some();
            }
            let mut expected = Vec::new();
            expected.extend(looked_at_reader.then_some(BreakKind::Reader));
            expected.extend(writer_came.then_some(BreakKind::Writer));
            prop_assert_eq!(said, expected);
        }
    }

    #[test]
    fn what_cannot_be_learned_is_told_as_the_worst_and_once() {
        let mut told = Told::default();
        assert_eq!(told.see(None), Some(BreakKind::Writer));
        assert_eq!(told.see(None), None);
        assert_eq!(told.see(Some(GuardState::Held)), None);
        assert_eq!(told.see(Some(GuardState::Broken(BreakKind::Reader))), None);
    }
}
