//! A transfer that is one request, or one with what proves it behind it, and can be posted now, which most are:
//! no plan, no wait but that for its completion. What is here is what a small transfer costs the client.

use std::ops::Range;
use std::slice;
use std::sync::Arc;

use pinfold_verbs::{Buffer as RegisteredBuffer, CompletionStatus, Piece};
use smallvec::{SmallVec, smallvec};

use super::{Batch, Entry, Pin, failed};
use crate::fabric::{self, Fabric, NotBegun, Of, Operation};
use crate::lane::{Asked, Direction, InFlight, Lost, Then};
use crate::plan::Part;
use crate::{Access, Buffer, TransferError};

/// What is to be done with bytes of the file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Wanted {
    Read,
    Write,
    WriteThen(Then),
}

impl From<Direction> for Wanted {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Read => Self::Read,
            Direction::Write => Self::Write,
        }
    }
}

/// One that is under way. Dropping it abandons it; nobody has to wait for its end then: what comes later by RDMA
/// goes by the same queue pair, behind it, and before anything goes another way a READ proves this
/// ([`Pin::settle`]).
pub(super) struct AtOnce<'a> {
    in_flight: InFlight,
    /// Absent: a read, or it has ended.
    batch: Option<Batch<'a>>,
    direction: Direction,
    range: Range<u64>,
    entry: Option<Entry<'a>>,
    ended: Option<Result<(RegisteredBuffer, CompletionStatus), Lost>>,
    fabric: &'a Arc<Fabric>,
    pin: &'a Pin,
}

impl Pin {
    /// Begins a transfer of all these bytes; or gives the buffer back, where something is to be found out or
    /// waited for first.
    pub(super) fn at_once(
        &self,
        wanted: Wanted,
        offset: u64,
        len: usize,
        buffer: Buffer,
    ) -> Result<AtOnce<'_>, Buffer> {
        let writes = wanted != Wanted::Read;
        let allowed = !writes || self.grant.access == Access::ReadWrite;
        let piece =
            self.reach().one_request(offset, len).filter(|_| allowed && len <= buffer.len());
        let (Some(fabric), Some(piece), true) = (&self.fabric, piece, self.cell.is_settled())
        else {
            return Err(buffer);
        };
        let Some((asked, pieces)) = self.requests(wanted, piece) else { return Err(buffer) };
        let buffer = buffer.into_registered(fabric.id())?;
        let direction = if writes { Direction::Write } else { Direction::Read };
        let operation = Operation { asked, pieces: &pieces, buffer, of: Of::Pin(&self.cell) };
        match fabric.begin(operation) {
            Ok(in_flight) => {
                let batch = writes.then_some(Batch { pin: self, returned: false });
                // Only now: of one that was not begun everything is known.
                let part = Part { offset, bytes: 0..len };
                let entry = writes.then(|| self.enter(slice::from_ref(&part))).flatten();
                let (range, ended) = (part.stretch(), None);
                Ok(AtOnce { in_flight, batch, direction, range, entry, ended, fabric, pin: self })
            }
            Err(NotBegun::MustWait(buffer) | NotBegun::Failed(_, buffer)) => {
                Err(Buffer::registered(buffer, fabric.id()))
            }
        }
    }

    /// `None`: nothing can prove the write.
    fn requests(&self, wanted: Wanted, piece: Piece) -> Option<(Asked, SmallVec<[Piece; 2]>)> {
        let (then, behind) = match wanted {
            Wanted::Read => return Some((Asked::Transfer(Direction::Read), smallvec![piece])),
            Wanted::Write => return Some((Asked::Transfer(Direction::Write), smallvec![piece])),
            Wanted::WriteThen(then @ Then::Probe) => (then, self.reach().probe()?),
            Wanted::WriteThen(then @ Then::Flush) => {
                (then, Piece { local: 0..0, remote: piece.remote })
            }
        };
        Some((Asked::WriteThen(then, 1), smallvec![piece, behind]))
    }
}

impl AtOnce<'_> {
    /// Waits for its end. Cancellation-safe.
    pub(super) async fn wait(&mut self) {
        if self.ended.is_some() {
            return;
        }
        let ended = (&mut self.in_flight).await;
        if let Some(batch) = self.batch.take() {
            batch.returned();
        }
        if let (Ok((_, status)), Some(entry)) = (&ended, self.entry.take())
            && status.is_success()
        {
            entry.succeed();
        }
        self.ended = Some(ended);
    }

    /// The bytes of the file.
    pub(super) fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Of one that has ended, once.
    pub(super) fn result(&mut self) -> Result<Buffer, TransferError> {
        let own = |buffer| Buffer::registered(buffer, self.fabric.id());
        let doing = || self.pin.doing(self.direction, &self.range);
        match self.ended.take() {
            Some(Ok((buffer, status))) if status.is_success() => Ok(own(buffer)),
            Some(Ok((buffer, status))) => {
                Err(TransferError { error: failed(status, doing()), buffer: Some(own(buffer)) })
            }
            Some(Err(Lost)) | None => {
                Err(TransferError { error: fabric::lost(doing()), buffer: None })
            }
        }
    }
}
