//! What is in flight on a lane, and who takes its completions from the device: pure.
//!
//! Who waits alone takes the completions itself, so that no other task stands between the device and it:
//! also those of operations that are posted and not waited for yet. As soon as several wait, or nobody does
//! any more, the lane's own task takes them all and wakes each one: else a task that is busy with something
//! else would keep the others waiting.

use std::task::Waker;

use pinfold_verbs::CompletionStatus;

/// The number of an operation on its lane. Used again when it has ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Slot(usize);

/// The operations of a lane: `B` is what comes back to who waits, `C` what an operation holds until the
/// device is done with it.
#[derive(Debug)]
pub(crate) struct Book<B, C> {
    operations: Vec<Operation<B, C>>,
    free: Vec<usize>,
    in_flight: usize,
    /// Of them, those that somebody has begun to wait for.
    awaited: usize,
    /// Operations that have ended, and whose answer nobody has taken yet.
    answers: usize,
    driver: Driver,
    /// Wakes the lane's task.
    task: Option<Waker>,
    open: bool,
}

#[derive(Debug)]
enum Operation<B, C> {
    Free,
    InFlight { claim: C, waiter: Waiter },
    Ended(B, CompletionStatus),
}

#[derive(Debug)]
enum Waiter {
    /// Will look soon.
    Coming,
    Waits(Waker),
    /// Nobody.
    Gone,
}

/// Who takes completions.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Driver {
    Nobody,
    /// The only one who waits.
    Waiter(Slot),
    Task,
}

/// What somebody who waits for an operation does next.
#[derive(Debug)]
pub(crate) enum Turn<B> {
    /// It has ended. If there is a waker, the lane's task has to be woken.
    Ended(B, CompletionStatus, Option<Waker>),
    /// Takes completions, or is woken by the device.
    Drive,
    /// Is woken by the lane's task, which has to be woken if there is a waker.
    Wait(Option<Waker>),
}

/// What the lane's task does next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Duty {
    /// Takes completions, or is woken by the device.
    Drive,
    /// Nothing until it is woken.
    Rest,
    /// Ends the lane: it is closed, nothing is in flight, and every answer has been taken.
    End,
}

/// What is to be dropped and woken, in this order and outside of any lock.
#[derive(Debug)]
pub(crate) struct Aftermath<B, C> {
    pub(crate) buffer: Option<B>,
    pub(crate) claim: Option<C>,
    pub(crate) wake: [Option<Waker>; 2],
}

impl<B, C> Book<B, C> {
    pub(crate) fn new() -> Self {
        let (operations, free) = (Vec::new(), Vec::new());
        let driver = Driver::Nobody;
        let (in_flight, awaited, answers) = (0, 0, 0);
        Self { operations, free, in_flight, awaited, answers, driver, task: None, open: true }
    }

    /// Whether it takes operations.
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// Enters an operation, before it is posted; or gives the claim back if the lane is closed.
    pub(crate) fn enter(&mut self, claim: C) -> Result<Slot, C> {
        if !self.open {
            return Err(claim);
        }
        self.in_flight += 1;
        let operation = Operation::InFlight { claim, waiter: Waiter::Coming };
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                self.operations.push(Operation::Free);
                self.operations.len() - 1
            }
        };
        self.operations[slot] = operation;
        Ok(Slot(slot))
    }

    /// Takes back an operation that could not be posted.
    pub(crate) fn withdraw(&mut self, slot: Slot) -> Aftermath<B, C> {
        self.in_flight -= 1;
        let claim = match self.vacate(slot) {
            Operation::InFlight { claim, .. } => Some(claim),
            Operation::Free | Operation::Ended(..) => None,
        };
        Aftermath { buffer: None, claim, wake: [None, self.task_if_over()] }
    }

    /// The device is done with an operation. One that failed closes the lane: what follows would only be
    /// flushed. Who looks for the completion of its own operation finds the answer without being woken.
    pub(crate) fn settle(
        &mut self,
        slot: Slot,
        buffer: B,
        status: CompletionStatus,
        looks: Option<Slot>,
    ) -> Aftermath<B, C> {
        self.open &= status.is_success();
        self.in_flight -= 1;
        if self.driver == Driver::Waiter(slot) {
            self.driver = Driver::Nobody;
        }
        let mut after = Aftermath { buffer: None, claim: None, wake: [None, None] };
        match self.vacate(slot) {
            Operation::InFlight { claim, waiter: Waiter::Gone } => {
                after.claim = Some(claim);
                after.buffer = Some(buffer);
            }
            Operation::InFlight { claim, waiter } => {
                after.claim = Some(claim);
                if let Waiter::Waits(waker) = waiter {
                    self.awaited -= 1;
                    after.wake[0] = Some(waker).filter(|_| looks != Some(slot));
                }
                // Its number is free when the answer has been taken.
                self.free.pop();
                self.answers += 1;
                self.operations[slot.0] = Operation::Ended(buffer, status);
            }
            Operation::Free | Operation::Ended(..) => after.buffer = Some(buffer),
        }
        // What fails now with it, nobody may be waiting for yet.
        after.wake[1] = if status.is_success() { self.task_if_over() } else { self.hand_over() };
        after
    }

    /// Somebody waits for an operation. Who `drove` before, and does no longer, may have taken an event of
    /// the device on which the task relies: then the task has to look again.
    pub(crate) fn wait(&mut self, slot: Slot, waker: &Waker, drove: bool) -> Turn<B> {
        match &mut self.operations[slot.0] {
            Operation::InFlight { waiter: Waiter::Waits(known), .. } if known.will_wake(waker) => {}
            Operation::InFlight { waiter, .. } => {
                self.awaited += usize::from(!matches!(waiter, Waiter::Waits(_)));
                *waiter = Waiter::Waits(waker.clone());
            }
            Operation::Free | Operation::Ended(..) => {
                let Operation::Ended(buffer, status) = self.vacate(slot) else {
                    unreachable!("who waits has the only handle of its operation");
                };
                self.answers -= 1;
                return Turn::Ended(buffer, status, self.relieved(drove).or(self.task_if_over()));
            }
        }
        let alone = self.awaited == 1;
        match self.driver {
            Driver::Task => Turn::Wait(self.relieved(drove)),
            Driver::Nobody if alone => {
                self.driver = Driver::Waiter(slot);
                Turn::Drive
            }
            Driver::Waiter(driver) if alone && driver == slot => Turn::Drive,
            Driver::Nobody | Driver::Waiter(_) => Turn::Wait(self.hand_over()),
        }
    }

    /// Who was told to take completions has found none, and is woken by the device from here on; unless
    /// the task has taken over meanwhile: then it has to be woken, so that the device wakes it instead.
    pub(crate) fn rest(&self, slot: Slot) -> Option<Waker> {
        match self.driver {
            Driver::Waiter(driver) if driver == slot => None,
            _ => self.task.clone(),
        }
    }

    /// Nobody waits for an operation any more.
    pub(crate) fn abandon(&mut self, slot: Slot) -> Aftermath<B, C> {
        let mut after = Aftermath { buffer: None, claim: None, wake: [None, None] };
        if let Operation::InFlight { waiter, .. } = &mut self.operations[slot.0] {
            let was = std::mem::replace(waiter, Waiter::Gone);
            self.awaited -= usize::from(matches!(was, Waiter::Waits(_)));
            after.wake[1] = self.hand_over();
        } else if let Operation::Ended(buffer, _) = self.vacate(slot) {
            self.answers -= 1;
            after.buffer = Some(buffer);
            after.wake[1] = self.task_if_over();
        }
        after
    }

    /// Whatever is in flight is the task's from here on, which has to be woken.
    pub(crate) fn hand_over(&mut self) -> Option<Waker> {
        if self.in_flight > 0 {
            self.driver = Driver::Task;
        }
        self.task.clone()
    }

    /// Takes no operation any more; the task ends when the last has ended, and its answer is taken.
    pub(crate) fn close(&mut self) -> Option<Waker> {
        self.open = false;
        self.hand_over()
    }

    /// What the lane's task has to do.
    pub(crate) fn duty(&mut self, task: &Waker) -> Duty {
        if !self.task.as_ref().is_some_and(|known| known.will_wake(task)) {
            self.task = Some(task.clone());
        }
        if self.in_flight == 0 {
            self.driver = Driver::Nobody;
        }
        match self.driver {
            Driver::Task => Duty::Drive,
            _ if self.is_over() => Duty::End,
            Driver::Nobody | Driver::Waiter(_) => Duty::Rest,
        }
    }

    /// All who wait, for when there is nothing to wait for any more.
    pub(crate) fn waiting(&mut self) -> impl Iterator<Item = Waker> {
        self.operations.iter_mut().filter_map(|operation| match operation {
            Operation::InFlight { waiter: Waiter::Waits(waker), .. } => Some(waker.clone()),
            _ => None,
        })
    }

    fn vacate(&mut self, slot: Slot) -> Operation<B, C> {
        self.free.push(slot.0);
        std::mem::replace(&mut self.operations[slot.0], Operation::Free)
    }

    fn task_if_over(&self) -> Option<Waker> {
        self.is_over().then(|| self.task.clone()).flatten()
    }

    fn is_over(&self) -> bool {
        !self.open && self.in_flight == 0 && self.answers == 0
    }

    fn relieved(&self, drove: bool) -> Option<Waker> {
        (drove && self.driver == Driver::Task).then(|| self.task.clone()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    const DONE: CompletionStatus = CompletionStatus::Success;

    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    impl Bell {
        fn rung(&self) -> usize {
            self.0.swap(0, Ordering::Relaxed)
        }
    }

    fn bell() -> (Arc<Bell>, Waker) {
        let bell = Arc::new(Bell::default());
        (bell.clone(), bell.into())
    }

    type TestBook = Book<&'static str, &'static str>;

    fn ring(wakers: impl IntoIterator<Item = Option<Waker>>) {
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    #[test]
    fn who_waits_alone_takes_its_completion_itself() {
        let mut book = TestBook::new();
        let ((task, task_waker), (own, waiter)) = (bell(), bell());
        assert_eq!(book.duty(&task_waker), Duty::Rest);
        for _ in 0..3 {
            let slot = book.enter("claim").unwrap();
            assert!(matches!(book.wait(slot, &waiter, false), Turn::Drive));
            assert!(matches!(book.wait(slot, &waiter, false), Turn::Drive));
            assert!(book.rest(slot).is_none());
            let after = book.settle(slot, "buffer", DONE, Some(slot));
            assert_eq!((after.claim, after.buffer), (Some("claim"), None));
            ring(after.wake);
            assert_eq!(own.rung(), 0, "it looks again anyway");
            assert!(matches!(book.wait(slot, &waiter, false), Turn::Ended("buffer", DONE, None)));
            assert_eq!(book.duty(&task_waker), Duty::Rest);
        }
        assert_eq!((task.rung(), book.operations.len()), (0, 1));
    }

    #[test]
    fn who_waits_alone_takes_also_what_nobody_waits_for_yet() {
        let mut book = TestBook::new();
        let ((task, task_waker), (_, waiter)) = (bell(), bell());
        book.duty(&task_waker);
        let slots = ["a", "b", "c"].map(|claim| book.enter(claim).unwrap());
        for (at, slot) in slots.into_iter().enumerate() {
            if at == 1 {
                // The one before it brought this one along.
                let Turn::Ended("b", DONE, None) = book.wait(slot, &waiter, false) else {
                    panic!("it has ended")
                };
                continue;
            }
            assert!(matches!(book.wait(slot, &waiter, false), Turn::Drive));
            book.settle(slot, "own", DONE, Some(slot));
            if at == 0 {
                ring(book.settle(slots[1], "b", DONE, Some(slot)).wake);
            }
            assert!(matches!(book.wait(slot, &waiter, true), Turn::Ended("own", DONE, None)));
        }
        assert_eq!((task.rung(), book.awaited, book.in_flight), (0, 0, 0));
        assert_eq!(book.duty(&task_waker), Duty::Rest);
    }

    #[test]
    fn the_task_takes_completions_as_soon_as_two_wait() {
        let mut book = TestBook::new();
        let ((task, task_waker), (one, one_waker), (two, two_waker)) = (bell(), bell(), bell());
        book.duty(&task_waker);
        let first = book.enter("first").unwrap();
        assert!(matches!(book.wait(first, &one_waker, false), Turn::Drive));
        let second = book.enter("second").unwrap();
        let Turn::Wait(wake) = book.wait(second, &two_waker, false) else { panic!("two drive") };
        ring([wake]);
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::Drive));
        // The first one may be in the middle of its look.
        ring([book.rest(first)]);
        assert_eq!(task.rung(), 1);
        assert!(matches!(book.wait(first, &one_waker, false), Turn::Wait(None)));

        ring(book.settle(second, "b", DONE, None).wake);
        assert_eq!((one.rung(), two.rung()), (0, 1));
        assert!(matches!(book.wait(first, &one_waker, false), Turn::Wait(None)), "the task has it");
        ring(book.settle(first, "a", DONE, None).wake);
        assert_eq!((one.rung(), two.rung()), (1, 0));
        assert_eq!(book.duty(&task_waker), Duty::Rest);
        assert!(matches!(book.wait(second, &two_waker, false), Turn::Ended("b", DONE, None)));
        assert!(matches!(book.wait(first, &one_waker, false), Turn::Ended("a", DONE, None)));
    }

    /// It may have taken the event that the task waits for, and then the device tells the task nothing.
    #[test]
    fn who_is_relieved_in_the_middle_of_a_look_has_the_task_look_again() {
        let mut book = TestBook::new();
        let ((task, task_waker), (_, waiter)) = (bell(), bell());
        book.duty(&task_waker);
        let (first, second) = (book.enter("first").unwrap(), book.enter("second").unwrap());
        book.settle(second, "b", DONE, None);
        assert!(matches!(book.wait(first, &waiter, false), Turn::Drive));
        let third = book.enter("third").unwrap();
        let Turn::Wait(wake) = book.wait(third, &waiter, false) else { panic!("two drive") };
        ring([wake]);
        assert_eq!(task.rung(), 1);
        let Turn::Wait(wake) = book.wait(first, &waiter, true) else { panic!("it was relieved") };
        ring([wake]);
        assert_eq!(task.rung(), 1);
        book.settle(first, "a", DONE, None);
        let Turn::Ended("a", DONE, wake) = book.wait(first, &waiter, true) else { panic!("ended") };
        ring([wake]);
        assert_eq!(task.rung(), 1);
    }

    #[test]
    fn what_is_abandoned_keeps_buffer_and_claim_until_the_device_is_done() {
        let mut book = TestBook::new();
        let ((task, task_waker), (_, waiter)) = (bell(), bell());
        book.duty(&task_waker);
        let slot = book.enter("claim").unwrap();
        assert!(matches!(book.wait(slot, &waiter, false), Turn::Drive));
        let after = book.abandon(slot);
        assert_eq!((after.buffer, after.claim), (None, None));
        ring(after.wake);
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::Drive));
        let after = book.settle(slot, "buffer", DONE, None);
        assert_eq!((after.buffer, after.claim), (Some("buffer"), Some("claim")));
        assert_eq!((book.duty(&task_waker), book.awaited), (Duty::Rest, 0));

        let ended = book.enter("claim").unwrap();
        book.settle(ended, "buffer", DONE, None);
        assert_eq!(book.abandon(ended).buffer, Some("buffer"), "nobody took the answer");
        assert_eq!(book.free.len(), 1);
    }

    #[test]
    fn somebody_who_waits_for_the_end_has_the_task_take_over() {
        let mut book = TestBook::new();
        let ((task, task_waker), (_, waiter)) = (bell(), bell());
        book.duty(&task_waker);
        ring([book.hand_over()]);
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::Rest), "nothing is in flight");
        let slot = book.enter("claim").unwrap();
        assert!(matches!(book.wait(slot, &waiter, false), Turn::Drive));
        ring([book.hand_over()]);
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::Drive));
    }

    #[test]
    fn a_failure_closes_the_lane_and_the_last_answer_ends_it() {
        let mut book = TestBook::new();
        let ((task, task_waker), (_, waiter)) = (bell(), bell());
        book.duty(&task_waker);
        let (one, two) = (book.enter("one").unwrap(), book.enter("two").unwrap());
        let _ = book.wait(one, &waiter, false);
        let refused = book.settle(one, "a", CompletionStatus::RemoteAccess, None);
        ring(refused.wake);
        assert!(!book.is_open());
        assert_eq!(book.enter("late"), Err("late"));
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::Drive));
        ring(book.settle(two, "b", CompletionStatus::Flushed, None).wake);
        let told = (task.rung(), book.duty(&task_waker));
        assert_eq!(told, (1, Duty::Rest), "the answers are in the book");
        let Turn::Ended("a", _, None) = book.wait(one, &waiter, false) else { panic!("no answer") };
        ring(book.abandon(two).wake);
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::End));
    }

    #[test]
    fn what_could_not_be_posted_leaves_nothing() {
        let mut book = TestBook::new();
        let (task, task_waker) = bell();
        book.duty(&task_waker);
        let slot = book.enter("claim").unwrap();
        book.close();
        task.rung();
        let after = book.withdraw(slot);
        assert_eq!(after.claim, Some("claim"));
        ring(after.wake);
        assert_eq!((task.rung(), book.duty(&task_waker)), (1, Duty::End));
    }

    #[test]
    fn all_who_wait_can_be_woken() {
        let mut book = TestBook::new();
        let (waiting, waker) = bell();
        let (one, two) = (book.enter("one").unwrap(), book.enter("two").unwrap());
        let _ = (book.wait(one, &waker, false), book.wait(two, &waker, false));
        book.waiting().for_each(Waker::wake);
        assert_eq!(waiting.rung(), 2);
    }
}
