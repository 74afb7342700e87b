//! The gate of the stream path: who is inside the kernel with a write or read of a file, and the
//! point from which nobody enters any more.
//!
//! The fence covers the stream path with it: closed first, then waited for until nobody is inside
//! or the deadline has come.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::ids::PinId;

/// One file's gate.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    /// The file is let go whatever is inside.
    cut: bool,
    /// Everybody, for who waits until a pin is out.
    inside: HashMap<PinId, usize>,
    /// Those that a fence waits for: a read changes nothing.
    writing: usize,
}

/// The right to be inside; ends when dropped.
#[derive(Debug)]
#[must_use = "the gate counts it as long as it lives"]
pub(crate) struct Inside<'a> {
    gate: &'a Gate,
    pin: PinId,
    writes: bool,
}

impl Gate {
    /// Lets one transfer in; `None` once the gate is closed.
    pub(crate) fn enter(&self, pin: PinId, writes: bool) -> Option<Inside<'_>> {
        let mut state = self.state();
        if state.closed {
            return None;
        }
        *state.inside.entry(pin).or_default() += 1;
        state.writing += usize::from(writes);
        Some(Inside { gate: self, pin, writes })
    }

    /// From here on nobody enters. Returns how many writes are still inside.
    pub(crate) fn close(&self) -> usize {
        let mut state = self.state();
        state.closed = true;
        state.writing
    }

    /// The file is about to be let go. From here on nobody inside begins another call into the
    /// kernel. Returns how many writes may still be in one.
    pub(crate) fn cut(&self) -> usize {
        let mut state = self.state();
        state.closed = true;
        state.cut = true;
        state.writing
    }

    /// Whether it is closed and no write is inside: what a fence waits for.
    pub(crate) fn is_empty_for_good(&self) -> bool {
        let state = self.state();
        state.closed && state.writing == 0
    }

    /// Whether a transfer of this pin is inside. Once the pin is refused before the gate, "no" is final.
    pub(crate) fn is_inside(&self, pin: PinId) -> bool {
        self.state().inside.contains_key(&pin)
    }

    /// Waits until no transfer of this pin is inside. The pin must be refused before the gate by
    /// then, or this may never end.
    pub(crate) fn wait_until_out(&self, pin: PinId) {
        let state = self.state();
        drop(self.left.wait_while(state, |state| state.inside.contains_key(&pin)));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counting can't leave the state half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside<'_> {
    /// Whether the file is still ours, so that another call into the kernel may begin.
    pub(crate) fn may_go_on(&self) -> bool {
        !self.gate.state().cut
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.writing -= usize::from(self.writes);
        if let Some(count) = state.inside.get_mut(&self.pin) {
            *count -= 1;
            if *count == 0 {
                state.inside.remove(&self.pin);
                self.gate.left.notify_all();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_enters_a_closed_gate_and_those_inside_are_counted() {
        let gate = Gate::default();
        let first = gate.enter(PinId(1), true).unwrap();
        let second = gate.enter(PinId(2), true).unwrap();
        let _reader = gate.enter(PinId(2), false).unwrap();
        assert_eq!(gate.close(), 2, "a fence waits for writes, not for reads");
        assert!(gate.enter(PinId(1), false).is_none());
        assert!(!gate.is_empty_for_good());
        drop(first);
        assert_eq!(gate.close(), 1);
        drop(second);
        assert!(gate.is_empty_for_good());
    }

    #[test]
    fn an_open_gate_is_never_empty_for_good() {
        assert!(!Gate::default().is_empty_for_good());
    }

    #[test]
    fn who_is_inside_a_closed_gate_goes_on_until_it_is_cut() {
        let gate = Gate::default();
        let writer = gate.enter(PinId(1), true).unwrap();
        gate.close();
        assert!(writer.may_go_on(), "it may end while clients drain");
        assert_eq!(gate.cut(), 1);
        assert!(!writer.may_go_on());
        assert!(!gate.is_empty_for_good(), "its last call may still be under way");
        drop(writer);
        assert!(gate.is_empty_for_good());
    }

    #[test]
    fn a_gate_that_is_cut_is_closed() {
        let gate = Gate::default();
        assert_eq!(gate.cut(), 0);
        assert!(gate.enter(PinId(1), true).is_none());
    }

    #[test]
    fn waiting_for_one_pin_does_not_wait_for_another() {
        let gate = Gate::default();
        let _other = gate.enter(PinId(2), true).unwrap();
        gate.wait_until_out(PinId(1));
        std::thread::scope(|scope| {
            let mine = gate.enter(PinId(1), false).unwrap();
            let waiting = scope.spawn(|| gate.wait_until_out(PinId(1)));
            drop(mine);
            waiting.join().unwrap();
        });
    }
}
