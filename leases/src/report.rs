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
