//! One connected queue pair and the task that drives it.
//!
//! The task owns the [`Lane`], and the lane owns every buffer from the post to the completion. So
//! a caller that stops waiting loses its buffer to the task, which frees it when the device has let
//! go: never earlier.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use pinfold_verbs::{
    Buffer, Completed, CompletionStatus, Error as VerbsError, Lane, Piece, PostError,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::Loss;
use crate::control::Control;
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
}

/// Something for the lane to do.
pub(crate) struct Work {
    pub(crate) asked: Asked,
    pub(crate) pieces: Vec<Piece>,
    pub(crate) buffer: Buffer,
    pub(crate) claim: Claim,
    pub(crate) reply: oneshot::Sender<Done>,
}

/// What an operation holds until the device is done with it.
pub(crate) struct Claim {
    /// Room in the send queue.
    pub(crate) _room: OwnedSemaphorePermit,
    /// Counts the operation on its pin; absent for a raw one.
    pub(crate) _ticket: Option<Ticket>,
}

/// How an operation ended.
pub(crate) struct Done {
    pub(crate) buffer: Buffer,
    pub(crate) result: Result<CompletionStatus, VerbsError>,
}

/// The way to a lane's task.
#[derive(Clone, Debug)]
pub(crate) struct LaneHandle {
    work: mpsc::UnboundedSender<Work>,
    room: Arc<Semaphore>,
}

/// The lane takes nothing any more.
#[derive(Debug)]
pub(crate) struct Broken;

struct Driver {
    lane: Lane<Pending>,
    /// Bounded by `room`: each message holds a part of it.
    work: mpsc::UnboundedReceiver<Work>,
    room: Arc<Semaphore>,
    in_flight: usize,
}

/// What the lane keeps for an operation, and hands back with its completion.
pub(crate) struct Pending {
    reply: oneshot::Sender<Done>,
    claim: Claim,
}

impl LaneHandle {
    /// Starts the task of a lane with room for `depth` requests.
    pub(crate) fn start(lane: Lane<Pending>, depth: u32, control: Control) -> Self {
        let (sender, work) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(depth as usize));
        let driver = Driver { lane, work, room: room.clone(), in_flight: 0 };
        tokio::spawn(async move {
            let ended = std::pin::pin!(control.ended());
            driver.run(ended).await;
        });
        Self { work: sender, room }
    }

    /// Whether it takes work.
    pub(crate) fn is_live(&self) -> bool {
        !self.work.is_closed()
    }

    /// Waits for room in the send queue.
    pub(crate) async fn room(&self, requests: u32) -> Result<OwnedSemaphorePermit, Broken> {
        self.room.clone().acquire_many_owned(requests).await.map_err(|_| Broken)
    }

    /// Hands over an operation, or back if the lane has broken.
    pub(crate) fn submit(&self, work: Work) -> Result<(), Work> {
        self.work.send(work).map_err(|refused| refused.0)
    }
}

impl Driver {
    /// Runs until the last handle is gone, the queue pair has broken or the session is over, and
    /// nothing is in flight.
    async fn run(mut self, mut session_over: Pin<&mut impl Future<Output = Loss>>) {
        let (mut open, mut in_session) = (true, true);
        while open || self.in_flight > 0 {
            tokio::select! {
                _ = &mut session_over, if in_session => {
                    in_session = false;
                    self.abort();
                }
                work = self.work.recv(), if open => match work {
                    Some(work) => self.post(work),
                    None => open = false,
                },
                completed = self.lane.next_completion(), if self.in_flight > 0 => match completed {
                    Ok(completed) => self.complete(completed),
                    Err(error) => {
                        // Without completions nobody knows what the device still uses: destroying
                        // the queue pair, which the end of the task does, is the way to find out.
                        tracing::error!(%error, "cannot take completions; dropping the lane");
                        self.retire();
                        return;
                    }
                },
            }
        }
    }

    fn post(&mut self, work: Work) {
        let Work { asked, pieces, buffer, claim, reply } = work;
        if self.work.is_closed() {
            return answer(reply, buffer, Ok(CompletionStatus::Flushed), claim);
        }
        let pending = Pending { reply, claim };
        let posted = match asked {
            Asked::Transfer(Direction::Write) => self.lane.post_write(buffer, &pieces, pending),
            Asked::Transfer(Direction::Read) => self.lane.post_read(buffer, &pieces, pending),
            Asked::Flush => {
                let ranges: Vec<_> = pieces.iter().map(|piece| piece.remote).collect();
                self.lane.post_flush(buffer, &ranges, pending)
            }
        };
        match posted {
            Ok(()) => self.in_flight += 1,
            Err(PostError { buffer, tag, error }) => {
                if matches!(error, VerbsError::PostSend { .. }) {
                    self.retire();
                }
                answer(tag.reply, buffer, Err(error), tag.claim);
            }
        }
    }

    fn complete(&mut self, completed: Completed<Pending>) {
        self.in_flight -= 1;
        if !completed.status.is_success() {
            // The queue pair is in the error state now: what follows would only be flushed.
            self.retire();
        }
        let Pending { reply, claim } = completed.tag;
        answer(reply, completed.buffer, Ok(completed.status), claim);
    }

    /// Nothing of a session that is over may land later, when a partition heals: the device stops
    /// trying, and what is in flight ends as flushed instead of after all its retries.
    fn abort(&mut self) {
        if let Err(error) = self.lane.abort() {
            tracing::warn!(%error, "cannot stop the queue pair of a session that is over");
        }
        self.retire();
    }

    /// Takes no more work; what is handed over already is answered as flushed.
    fn retire(&mut self) {
        self.work.close();
        self.room.close();
    }
}

/// The answer goes out before the claim ends, so a pin is drained only when its last operation's
/// result is on its way.
fn answer(
    reply: oneshot::Sender<Done>,
    buffer: Buffer,
    result: Result<CompletionStatus, VerbsError>,
    claim: Claim,
) {
    // Fails when the caller stopped waiting; the buffer is freed here then.
    let _ = reply.send(Done { buffer, result });
    drop(claim);
}
