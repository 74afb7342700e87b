//! The thread on which fences fall: its own deadline queue, and nothing of the async runtime, so
//! that nothing a client or a task does can make a fence late.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pinfold_leases::GuardId;

use crate::error::{Error, Result};
use crate::sync::locked;

/// More than a vital thread has in use at a time.
const WARM_BYTES: usize = 64 << 10;

/// What the thread is told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Fence this file now: somebody waits for it.
    Now(GuardId),
    /// Fence this file when nobody waits for another one.
    Idle(GuardId),
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
    vital("pinfold-fence", move || run(&orders, &fence))
}

/// Starts a thread without which breakers would be let through by the kernel while a NIC still
/// writes: if it panics the process ends, and every key with it.
pub(crate) fn vital(name: &'static str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    struct Vital;
    impl Drop for Vital {
        fn drop(&mut self) {
            if std::thread::panicking() {
                std::process::abort();
            }
        }
    }
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _vital = Vital;
            // The allocator asks the kernel for a thread's memory when the thread first wants some, and
            // that would hang when a fence does.
            drop(std::hint::black_box(vec![0_u8; WARM_BYTES]));
            work();
        })
        .map(drop)
        .map_err(|source| Error::Thread { name, source })
}

/// Starts several such threads for one queue: each takes the next thing, works, and comes back for
/// more. They end when all senders are gone.
pub(crate) fn vital_crew<T: Send + 'static>(
    name: &'static str,
    threads: usize,
    queue: Receiver<T>,
    work: impl Fn(T) + Clone + Send + 'static,
) -> Result<()> {
    let queue = Arc::new(Mutex::new(queue));
    for _ in 0..threads {
        let (queue, work) = (Arc::clone(&queue), work.clone());
        vital(name, move || {
            loop {
                // Who waits for the next one holds the lock, and the others wait for that.
                let next = locked(&queue).recv();
                let Ok(next) = next else { return };
                work(next);
            }
        })?;
    }
    Ok(())
}

/// What is to be fenced, most urgent first: deadlines that have come, then orders that somebody
/// waits for, then files that are merely unused.
#[derive(Debug, Default)]
struct Queue {
    deadlines: Deadlines,
    now: VecDeque<GuardId>,
    idle: VecDeque<GuardId>,
}

impl Queue {
    fn add(&mut self, order: Order) {
        match order {
            Order::At(guard, at) => self.deadlines.add(at, guard),
            Order::Now(guard) => self.now.push_back(guard),
            Order::Idle(guard) => self.idle.push_back(guard),
        }
    }

    fn pop(&mut self, now: Instant) -> Option<GuardId> {
        let due = self.deadlines.pop_due(now);
        due.or_else(|| self.now.pop_front()).or_else(|| self.idle.pop_front())
    }
}

fn run(orders: &Receiver<Order>, fence: &dyn Fn(GuardId)) {
    let mut queue = Queue::default();
    loop {
        // Everything that has been ordered, before the next fence: a long row of unused files must
        // not come before somebody who waits.
        orders.try_iter().for_each(|order| queue.add(order));
        if let Some(guard) = queue.pop(Instant::now()) {
            fence(guard);
            continue;
        }
        let order = match queue.deadlines.next() {
            Some(at) => orders.recv_timeout(at.saturating_duration_since(Instant::now())),
            None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match order {
            Ok(order) => queue.add(order),
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

    #[test]
    fn who_is_waited_for_comes_before_what_is_merely_unused() {
        let start = Instant::now();
        let guard = GuardId::simulated;
        let mut queue = Queue::default();
        queue.add(Order::Idle(guard(1)));
        queue.add(Order::Idle(guard(2)));
        queue.add(Order::Now(guard(3)));
        queue.add(Order::At(guard(4), start));
        queue.add(Order::At(guard(5), start + Duration::from_secs(1)));
        let popped: Vec<_> = std::iter::from_fn(|| queue.pop(start)).collect();
        assert_eq!(popped, [guard(4), guard(3), guard(1), guard(2)]);
    }
}
