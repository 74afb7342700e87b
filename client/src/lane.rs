//! One connected queue pair: its task, and those who transfer over it.
//!
//! Who transfers posts for itself, and as a rule takes its own completion; the task does so for several
//! at a time and for those that nobody waits for ([`Book`] has the rules). The [`Lane`] has every buffer
//! from the post to the completion, and the task has the lane: a caller that stops waiting leaves its
//! buffer there, and it is freed when the device has let go, never earlier.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pinfold_verbs::{
    Atomic, Buffer, Completed, CompletionStatus, Error as VerbsError, Lane, Piece, PostError,
    RemoteSlice,
};
use smallvec::SmallVec;
use tokio::sync::{Semaphore, SemaphorePermit, oneshot, watch};

use crate::book::{Aftermath, Book, Duty, Slot, Turn};
use crate::control::Control;
use crate::patience::Patience;
use crate::pin_table::Ticket;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Direction {
    Write,
    Read,
}

/// What an operation asks of the device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Asked {
    Transfer(Direction),
    /// To make the pieces' remote ends durable; the buffer has no part in it.
    Flush,
    /// On the remote end of the only piece; what was there comes into the buffer.
    Atomic(Atomic),
    /// To write the first so many pieces; of the others only the remote ends count.
    WriteThen(Then, usize),
}

/// What goes out behind a write with the same call.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Then {
    /// A read of the one piece that is left, for nobody: the write is in memory when it ends.
    Probe,
    /// To make the pieces that are left durable.
    Flush,
}

/// A lane that is shared. Its task has it for good; everybody else for a moment.
#[derive(Debug)]
pub(crate) struct SharedLane {
    // Dropped first: only then the device is done with what is in the book.
    lane: Lane<Slot>,
    book: Mutex<Book<Buffer, Claim>>,
    /// What fits in the send queue.
    room: Semaphore,
    /// Absent: sleeps at once.
    patience: Option<Patience>,
}

/// What an operation holds until the device is done with it.
#[derive(Debug)]
pub(crate) struct Claim {
    /// Its part of the send queue.
    requests: u32,
    /// Counts the operation on its pin; absent for a raw one.
    _ticket: Option<Ticket>,
}

/// An operation that was posted. Its future is ready when it has ended.
#[derive(Debug)]
pub(crate) struct InFlight {
    lane: Weak<SharedLane>,
    slot: Slot,
    /// When it was posted, if it may look before it sleeps; and whether it has done so.
    posted: Option<Instant>,
    looked: bool,
    ended: bool,
}

/// The lane takes nothing any more.
#[derive(Debug)]
pub(crate) struct Closed;

/// The completion can't be had: the lane is gone with its runtime, or because the device gave no
/// completions any more. The buffer went with it.
#[derive(Debug)]
pub(crate) struct Lost;

/// Why an operation was not posted, with its buffer.
#[derive(Debug)]
pub(crate) enum NotPosted {
    Closed(Buffer),
    Refused(Buffer, VerbsError),
}

impl SharedLane {
    /// Starts the task of a lane. It takes over what is in flight when it is `urged`, and ends with the
    /// session.
    pub(crate) async fn start(
        lane: Lane<Slot>,
        patience: Option<Patience>,
        control: Control,
        urged: watch::Receiver<()>,
    ) -> Weak<Self> {
        let room = Semaphore::new(lane.depth());
        let lane = Arc::new(Self { lane, book: Mutex::new(Book::new()), room, patience });
        let shared = Arc::downgrade(&lane);
        let (ready, is_ready) = oneshot::channel();
        tokio::spawn(tend(lane, control, urged, ready));
        // Fails when the runtime is shutting down; whoever posts learns of it.
        let _ = is_ready.await;
        shared
    }

    /// Whether it takes operations.
    pub(crate) fn is_open(&self) -> bool {
        self.book().is_open()
    }

    /// Whether it takes [`Asked::Flush`].
    pub(crate) fn can_flush(&self) -> bool {
        self.lane.no_flush_because().is_none()
    }

    /// Room in the send queue, if there is some and nobody waits for it.
    pub(crate) fn room_now(&self, requests: u32) -> Option<SemaphorePermit<'_>> {
        self.room.try_acquire_many(requests).ok()
    }

    /// Waits for room in the send queue.
    pub(crate) async fn room(&self, requests: u32) -> Result<SemaphorePermit<'_>, Closed> {
        self.room.acquire_many(requests).await.map_err(|_| Closed)
    }

    /// Posts an operation, for which there is room.
    pub(crate) fn post(
        self: &Arc<Self>,
        asked: Asked,
        buffer: Buffer,
        pieces: &[Piece],
        room: SemaphorePermit<'_>,
        ticket: Option<Ticket>,
    ) -> Result<InFlight, NotPosted> {
        let claim = Claim { requests: pieces.len() as u32, _ticket: ticket };
        let entered = self.book().enter(claim);
        let Ok(slot) = entered else { return Err(NotPosted::Closed(buffer)) };
        // Given back with the claim.
        room.forget();
        let posted = match asked {
            Asked::Transfer(Direction::Write) => self.lane.post_write(buffer, pieces, slot),
            Asked::Transfer(Direction::Read) => self.lane.post_read(buffer, pieces, slot),
            Asked::Flush => self.lane.post_flush(buffer, &remote_ends(pieces), slot),
            Asked::WriteThen(then, writes) => {
                let (writes, behind) = pieces.split_at(writes);
                match then {
                    Then::Probe => {
                        self.lane.post_write_proven(buffer, writes, behind[0].remote, slot)
                    }
                    Then::Flush => {
                        self.lane.post_write_flushed(buffer, writes, &remote_ends(behind), slot)
                    }
                }
            }
            Asked::Atomic(atomic) => self.lane.post_atomic(buffer, pieces[0].remote, atomic, slot),
        };
        match posted {
            Ok(()) => {
                let posted = self.patience.as_ref().map(|_| Instant::now());
                let lane = Arc::downgrade(self);
                Ok(InFlight { lane, slot, posted, looked: false, ended: false })
            }
            Err(PostError { buffer, error, .. }) => {
                if matches!(error, VerbsError::PostSend { .. }) {
                    self.close();
                }
                let after = self.book().withdraw(slot);
                self.conclude(after);
                Err(NotPosted::Refused(buffer, error))
            }
        }
    }

    /// Takes no more operations; ends when nothing is in flight.
    pub(crate) fn close(&self) {
        self.room.close();
        let task = self.book().close();
        wake(task);
    }

    /// Nothing of a session that is over may land later, when a partition heals: the device stops
    /// trying, and what is in flight ends as flushed instead of after all its retries.
    fn abort(&self) {
        if let Err(error) = self.lane.abort() {
            tracing::warn!(%error, "cannot stop the queue pair of a session that is over");
        }
        self.close();
    }

    /// `looks`: the operation of who found this, if it looks for one.
    fn settle(&self, completed: Completed<Slot>, looks: Option<Slot>) {
        let Completed { buffer, tag, status, .. } = completed;
        let after = self.book().settle(tag, buffer, status, looks);
        if !status.is_success() {
            self.room.close();
        }
        self.conclude(after);
    }

    /// The answer is there before the claim ends, so a pin is drained only when its last operation's
    /// result can be had.
    fn conclude(&self, after: Aftermath<Buffer, Claim>) {
        drop(after.buffer);
        if let Some(claim) = after.claim {
            self.room.add_permits(claim.requests as usize);
        }
        after.wake.into_iter().for_each(wake);
    }

    /// Takes a completion, or has the task woken when there is one.
    fn poll_completions(
        &self,
        context: &mut Context<'_>,
        looks: Option<Slot>,
    ) -> Poll<Result<(), VerbsError>> {
        self.lane.poll_completion(context).map_ok(|completed| self.settle(completed, looks))
    }

    /// Looks for a completion for as long as it is worth while. True: there was one.
    fn look(&self, posted: Instant, looks: Slot) -> Result<bool, VerbsError> {
        let patience = self.patience.as_ref().map_or(Duration::ZERO, Patience::now);
        loop {
            if let Some(completed) = self.lane.poll()? {
                self.settle(completed, Some(looks));
                return Ok(true);
            }
            if posted.elapsed() >= patience {
                return Ok(false);
            }
            std::hint::spin_loop();
        }
    }

    fn learn(&self, posted: Option<Instant>) {
        if let (Some(patience), Some(posted)) = (&self.patience, posted) {
            patience.learn(posted.elapsed());
        }
    }

    fn poll_task(&self, context: &mut Context<'_>) -> Poll<Result<(), VerbsError>> {
        loop {
            let duty = self.book().duty(context.waker());
            match duty {
                Duty::Rest => return Poll::Pending,
                Duty::End => return Poll::Ready(Ok(())),
                Duty::Drive => std::task::ready!(self.poll_completions(context, None))?,
            }
        }
    }

    fn book(&self) -> MutexGuard<'_, Book<Buffer, Claim>> {
        // Every change of it is a single step.
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The lane's task: until the lane is closed and nothing is in flight.
async fn tend(
    lane: Arc<SharedLane>,
    control: Control,
    urged: watch::Receiver<()>,
    ready: oneshot::Sender<()>,
) {
    // So that the device's events come by way of this runtime, whoever waits for them.
    let registered = poll_fn(|context| Poll::Ready(lane.poll_completions(context, None))).await;
    let _ = ready.send(());
    if let Poll::Ready(Err(error)) = registered {
        return end(lane, Some(error)).await;
    }
    let listener = tokio::spawn(listen(Arc::downgrade(&lane), control, urged));
    let ended = poll_fn(|context| lane.poll_task(context)).await;
    listener.abort();
    end(lane, ended.err()).await;
}

/// Hears for the lane's task what has nothing to do with completions.
async fn listen(lane: Weak<SharedLane>, control: Control, mut urged: watch::Receiver<()>) {
    let urges = async {
        while urged.changed().await.is_ok() {
            let Some(lane) = lane.upgrade() else { return };
            let task = lane.book().hand_over();
            wake(task);
        }
    };
    tokio::select! {
        _ = control.ended() => {}
        () = urges => {
            control.ended().await;
        }
    }
    if let Some(lane) = lane.upgrade() {
        lane.abort();
    }
}

/// Without completions nobody knows what the device still uses: destroying the queue pair is the way to
/// find out. That waits for the device, so not here.
async fn end(lane: Arc<SharedLane>, error: Option<VerbsError>) {
    if let Some(error) = error {
        tracing::error!(%error, "cannot take completions; dropping the lane");
    }
    lane.close();
    // Panics are in the log already, and a runtime that shuts down drops it too.
    let _ = tokio::task::spawn_blocking(move || drop(lane)).await;
}

impl Drop for SharedLane {
    fn drop(&mut self) {
        // From here on nobody finds the lane.
        self.book().waiting().for_each(Waker::wake);
    }
}

impl Future for InFlight {
    type Output = Result<(Buffer, CompletionStatus), Lost>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let (slot, mut drove) = (self.slot, false);
        loop {
            let Some(lane) = self.lane.upgrade() else { return Poll::Ready(Err(Lost)) };
            let turn = lane.book().wait(slot, context.waker(), drove);
            match turn {
                Turn::Ended(buffer, status, task) => {
                    self.ended = true;
                    lane.learn(self.posted);
                    wake(task);
                    return Poll::Ready(Ok((buffer, status)));
                }
                Turn::Wait(task) => {
                    wake(task);
                    return Poll::Pending;
                }
                Turn::Drive => drove = true,
            }
            if let Some(posted) = self.posted
                && !std::mem::replace(&mut self.looked, true)
                && let Ok(true) = lane.look(posted, slot)
            {
                continue;
            }
            match lane.poll_completions(context, Some(slot)) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => {
                    // The task gets the same error, and ends the lane: then this is woken.
                    lane.close();
                    return Poll::Pending;
                }
                Poll::Pending => {
                    let task = lane.book().rest(slot);
                    wake(task);
                    return Poll::Pending;
                }
            }
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        if let Some(lane) = self.lane.upgrade() {
            let after = lane.book().abandon(self.slot);
            lane.conclude(after);
        }
    }
}

fn remote_ends(pieces: &[Piece]) -> SmallVec<[RemoteSlice; 2]> {
    pieces.iter().map(|piece| piece.remote).collect()
}

fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}
