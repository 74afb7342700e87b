//! The pins of a session: which are there, and what the server's notices mean for them.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc, watch};

use crate::pin_state::{Finished, Gone, PinState};
use crate::transfer::{Abandoned, Running};
use crate::{DrainNotice, Loss, Revocation};

/// All pins of one session.
#[derive(Debug)]
pub(crate) struct PinTable {
    inner: Mutex<Inner>,
    /// Takes the numbers of pins that the server waits for and that are drained now.
    drained: mpsc::UnboundedSender<u64>,
    /// Told when somebody waits for what is in flight, and not for an operation of their own.
    urge: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Inner {
    pins: HashMap<u64, Arc<PinCell>>,
    /// Pin requests so far …
    requests: u64,
    /// … and those of them that have no answer yet.
    expected: BTreeSet<u64>,
    /// What the stream said about pins whose grant is still on its way: the answer to a pin request
    /// and the notices come on different streams, so a notice can overtake the grant. Kept until all
    /// requests are answered that had begun by then.
    early: HashMap<u64, Early>,
    loss: Option<Loss>,
}

#[derive(Debug)]
struct Early {
    /// Requests that had begun.
    requests: u64,
    state: PinState,
}

/// One pin, shared by its handle and by the operations on it.
#[derive(Debug)]
pub(crate) struct PinCell {
    id: u64,
    state: Mutex<PinState>,
    /// Told when the last operation has ended, and when the pin is no longer live.
    changed: Notify,
    drained: mpsc::UnboundedSender<u64>,
    urge: watch::Sender<()>,
    /// Writes that nobody waits for, and that may not have ended yet.
    abandoned: Mutex<Vec<Abandoned>>,
}

/// An operation in flight; counted out when it is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    cell: Arc<PinCell>,
    /// Of the transfer that it is a part of, if somebody may have to wait for the end of that.
    _running: Option<Arc<Running>>,
}

/// A pin request without an answer yet.
#[derive(Debug)]
pub(crate) struct Expected<'a> {
    table: &'a PinTable,
    request: u64,
}

impl PinTable {
    pub(crate) fn new(drained: mpsc::UnboundedSender<u64>) -> Self {
        Self { inner: Mutex::default(), drained, urge: watch::Sender::new(()) }
    }

    /// Tells when somebody waits for what is in flight, and not for an operation of their own.
    pub(crate) fn urges(&self) -> watch::Receiver<()> {
        self.urge.subscribe()
    }

    /// To be called before a pin request is sent, and kept until its answer is taken.
    pub(crate) fn expect(&self) -> Expected<'_> {
        let mut inner = lock(&self.inner);
        let request = inner.requests;
        inner.requests += 1;
        inner.expected.insert(request);
        Expected { table: self, request }
    }

    /// Forgets a pin that was given back.
    pub(crate) fn remove(&self, id: u64) {
        lock(&self.inner).pins.remove(&id);
    }

    /// Lets nothing begin on these pins any more.
    pub(crate) fn drain(&self, ids: &[u64], notice: DrainNotice) {
        let mut inner = lock(&self.inner);
        for &id in ids {
            match inner.apply(id, |state| state.drain(notice)) {
                // Nothing can be in flight on a pin that is not here: it was given back, or its grant was
                // lost. Fails only when the session is over, and nobody waits any more.
                Some(true) | None => drop(self.drained.send(id)),
                Some(false) => drop(self.urge.send(())),
            }
        }
    }

    /// The keys of these pins are dead.
    pub(crate) fn revoke(&self, ids: &[u64], revocation: Revocation) {
        let mut inner = lock(&self.inner);
        for &id in ids {
            inner.apply(id, |state| state.revoke(revocation));
        }
    }

    /// How the session ended, if it has.
    pub(crate) fn loss(&self) -> Option<Loss> {
        lock(&self.inner).loss.clone()
    }

    /// The session is over, and every pin with it.
    pub(crate) fn lose(&self, loss: &Loss) {
        let mut inner = lock(&self.inner);
        inner.loss = Some(loss.clone());
        for cell in inner.pins.values() {
            lock(&cell.state).lose(loss.clone());
            cell.changed.notify_waiters();
        }
    }
}

impl Expected<'_> {
    /// Takes in the pin that the server granted, with what was said about it meanwhile.
    pub(crate) fn admit(self, id: u64) -> Arc<PinCell> {
        let mut inner = lock(&self.table.inner);
        let early = inner.early.remove(&id).map(|early| early.state);
        let mut state = early.unwrap_or_else(PinState::new);
        if let Some(loss) = &inner.loss {
            state.lose(loss.clone());
        }
        let cell = Arc::new(PinCell {
            id,
            state: Mutex::new(state),
            changed: Notify::new(),
            drained: self.table.drained.clone(),
            urge: self.table.urge.clone(),
            abandoned: Mutex::default(),
        });
        inner.pins.insert(id, cell.clone());
        cell
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        let mut inner = lock(&self.table.inner);
        inner.expected.remove(&self.request);
        let oldest = inner.expected.first().copied().unwrap_or(inner.requests);
        inner.early.retain(|_, early| oldest < early.requests);
    }
}

impl Inner {
    /// Applies a notice to the pin, or keeps it for the grant that may be on its way. `None`: no grant
    /// is.
    fn apply<R>(&mut self, id: u64, notice: impl FnOnce(&mut PinState) -> R) -> Option<R> {
        if let Some(cell) = self.pins.get(&id) {
            let outcome = notice(&mut lock(&cell.state));
            cell.changed.notify_waiters();
            return Some(outcome);
        }
        if self.expected.is_empty() {
            return None;
        }
        let fresh = || Early { requests: self.requests, state: PinState::new() };
        Some(notice(&mut self.early.entry(id).or_insert_with(fresh).state))
    }
}

impl PinCell {
    /// Counts an operation in.
    pub(crate) fn begin(self: &Arc<Self>, running: Option<Arc<Running>>) -> Result<Ticket, Gone> {
        lock(&self.state).begin()?;
        Ok(Ticket { cell: self.clone(), _running: running })
    }

    /// Remembers a write that nobody waits for any more, until it has ended.
    pub(crate) fn abandon(&self, write: Abandoned) {
        let mut abandoned = lock(&self.abandoned);
        abandoned.retain(|write| !write.has_ended());
        abandoned.push(write);
    }

    /// Whether no write was abandoned of late: then nothing has to be waited for.
    pub(crate) fn is_settled(&self) -> bool {
        lock(&self.abandoned).is_empty()
    }

    /// Waits until no abandoned write of these bytes is under way.
    pub(crate) async fn settled(&self, range: &Range<u64>) {
        let under_way: Vec<_> =
            lock(&self.abandoned).iter().filter(|write| write.overlaps(range)).cloned().collect();
        for write in under_way {
            write.end().await;
        }
        lock(&self.abandoned).retain(|write| !write.has_ended());
    }

    /// Refuses what `begin` would refuse.
    pub(crate) fn check(&self) -> Result<(), Gone> {
        lock(&self.state).check()
    }

    /// Waits until the pin is no longer live, and says why.
    pub(crate) async fn gone(&self) -> Gone {
        loop {
            let told = self.changed.notified();
            if let Err(gone) = self.check() {
                return gone;
            }
            told.await;
        }
    }

    /// Waits until the pin is gone for good: no longer draining.
    pub(crate) async fn ended(&self) -> Gone {
        loop {
            let told = self.changed.notified();
            match self.check() {
                Ok(()) | Err(Gone::Draining(_)) => told.await,
                Err(gone) => return gone,
            }
        }
    }

    /// Waits until nothing is in flight.
    pub(crate) async fn idle(&self) {
        loop {
            let told = self.changed.notified();
            if lock(&self.state).await_idle() {
                return;
            }
            // Fails when no lane is there to hear it.
            let _ = self.urge.send(());
            told.await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let finished = lock(&self.cell.state).finish();
        if finished == Finished::Drained {
            // Fails only when the session is over, and nobody waits any more.
            let _ = self.cell.drained.send(self.cell.id);
        }
        if finished != Finished::Unnoticed {
            self.cell.changed.notify_waiters();
        }
    }
}

/// Every change of the state is a single step, so a panic elsewhere can't leave it half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Generation, RevocationReason};

    const NOTICE: DrainNotice = DrainNotice {
        generation: Generation { incarnation: 1, counter: 2 },
        reason: RevocationReason::LocalReader,
        drain_budget: Duration::from_secs(1),
    };

    fn table() -> (PinTable, mpsc::UnboundedReceiver<u64>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (PinTable::new(sender), receiver)
    }

    #[test]
    fn only_the_named_pins_drain() {
        let (table, mut drained) = table();
        let (one, two) = (table.expect().admit(1), table.expect().admit(2));
        let ticket = one.begin(None).unwrap();
        table.drain(&[1], NOTICE);
        assert_eq!(one.check(), Err(Gone::Draining(NOTICE)));
        assert_eq!(two.check(), Ok(()));
        assert!(drained.try_recv().is_err(), "an operation is in flight");
        drop(ticket);
        assert_eq!(drained.try_recv(), Ok(1));
    }

    #[test]
    fn a_notice_that_overtakes_its_grant_is_kept() {
        let (table, mut drained) = table();
        let expected = table.expect();
        table.drain(&[7], NOTICE);
        assert_eq!(drained.try_recv(), Ok(7), "nothing can be in flight on it");
        assert_eq!(expected.admit(7).check(), Err(Gone::Draining(NOTICE)));
    }

    #[test]
    fn a_notice_for_a_pin_that_is_gone_is_answered_and_forgotten() {
        let (table, mut drained) = table();
        table.drain(&[7], NOTICE);
        assert_eq!(drained.try_recv(), Ok(7), "the server need not wait for it");
        assert_eq!(table.expect().admit(7).check(), Ok(()));
    }

    #[test]
    fn an_early_notice_is_kept_while_its_grant_may_come_and_no_longer() {
        let (table, _drained) = table();
        let (first, second) = (table.expect(), table.expect());
        table.drain(&[7], NOTICE);
        // Others overlap all the time.
        let third = table.expect();
        drop(first);
        assert_eq!(lock(&table.inner).early.len(), 1);
        drop(second);
        assert_eq!(lock(&table.inner).early.len(), 0, "the third began after the notice");
        assert_eq!(third.admit(7).check(), Ok(()));
    }

    #[test]
    fn a_pin_granted_after_the_end_is_lost() {
        let (table, _drained) = table();
        let expected = table.expect();
        table.lose(&Loss::StreamEnded);
        assert_eq!(expected.admit(1).check(), Err(Gone::Lost(Loss::StreamEnded)));
    }

    #[tokio::test]
    async fn gone_waits_for_the_notice() {
        let (table, _drained) = table();
        let pin = table.expect().admit(1);
        let waiter = tokio::spawn({
            let pin = pin.clone();
            async move { pin.gone().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        table.drain(&[1], NOTICE);
        assert_eq!(waiter.await.unwrap(), Gone::Draining(NOTICE));
        table.lose(&Loss::StreamEnded);
        assert_eq!(pin.gone().await, Gone::Lost(Loss::StreamEnded));
    }

    #[tokio::test]
    async fn idle_waits_for_the_last_operation() {
        let (table, _drained) = table();
        let pin = table.expect().admit(1);
        pin.idle().await;
        let ticket = pin.begin(None).unwrap();
        let waiter = tokio::spawn({
            let pin = pin.clone();
            async move { pin.idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(ticket);
        waiter.await.unwrap();
    }
}
