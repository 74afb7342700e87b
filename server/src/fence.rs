//! The thread on which fences fall: its own deadline queue, and nothing of the async runtime, so
//! that nothing a client or a task does can make a fence late.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Instant;

use pinfold_leases::GuardId;

use crate::error::{Error, Result};

/// What the thread is told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Fence this file now.
    Now(GuardId),
    /// Fence this file at that time, unless it has happened.
    At(GuardId, Instant),
}

/// Deadlines, soonest first.
#[derive(Debug, Default)]
pub(crate) struct Deadlines(BinaryHeap<Reverse<(Instant, GuardId)>>);

impl Deadlines {
    /// Takes one up.
    pub(crate) fn add(&mut self, at: Instant, guard: GuardId) {
        self.0.push(Reverse((at, guard)));
    }

    /// When the next one is.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes the next one out if it is due.
    pub(crate) fn pop_due(&mut self, now: Instant) -> Option<GuardId> {
        let due = self.next()? <= now;
        due.then(|| self.0.pop().map(|Reverse((_, guard))| guard)).flatten()
    }
}

/// A thread that was started and takes orders, but has nobody yet to carry them out.
pub(crate) fn queue() -> (Sender<Order>, Receiver<Order>) {
    channel()
}

/// Starts the thread. `fence` is called for each order that is due; it must bear being called for
/// a file that is fenced already. Ends when all senders are gone.
pub(crate) fn start(
    orders: Receiver<Order>,
    fence: impl Fn(GuardId) + Send + 'static,
) -> Result<()> {
    const NAME: &str = "pinfold-fence";
    std::thread::Builder::new()
        .name(NAME.to_owned())
        .spawn(move || run(&orders, &fence))
        .map(drop)
        .map_err(|source| Error::Thread { name: NAME, source })
}

fn run(orders: &Receiver<Order>, fence: &dyn Fn(GuardId)) {
    let mut deadlines = Deadlines::default();
    loop {
        while let Some(guard) = deadlines.pop_due(Instant::now()) {
            fence(guard);
        }
        let order = match deadlines.next() {
            Some(at) => orders.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match order {
            Ok(Order::Now(guard)) => fence(guard),
            Ok(Order::At(guard, at)) => deadlines.add(at, guard),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn deadlines_come_out_in_time_order_and_not_before_they_are_due() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let guard = GuardId::simulated;
        let mut deadlines = Deadlines::default();
        for (ms, number) in [(30, 3), (10, 1), (20, 2)] {
            deadlines.add(at(ms), guard(number));
        }
        assert_eq!(deadlines.pop_due(at(9)), None);
        assert_eq!(deadlines.next(), Some(at(10)));
        assert_eq!(deadlines.pop_due(at(25)), Some(guard(1)));
        assert_eq!(deadlines.pop_due(at(25)), Some(guard(2)));
        assert_eq!(deadlines.pop_due(at(25)), None);
    }
}
