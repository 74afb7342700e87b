//! A write and what proves it, or makes it durable, as one.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pinfold_verbs::Piece;

use super::at_once::Wanted;
use super::{Batch, CommitEntry, CommitReport, Pin, WriteReport};
use crate::fabric::{Fabric, Of, Operation};
use crate::lane::{Asked, Direction, Then};
use crate::plan::{Part, Plan};
use crate::transfer::Transfer;
use crate::{Buffer, Error, TransferError};

/// What a durable write did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DurableReport {
    /// Which way the bytes went.
    pub write: WriteReport,
    /// Absent: the server's NIC made them durable (RDMA FLUSH), and its processor did nothing.
    pub commit: Option<CommitReport>,
}

/// The work requests of a durable write, for one call of the device.
struct Chain {
    requests: Vec<Piece>,
    /// How many of them write.
    writes: usize,
    then: Then,
}

/// The commit of a write whose chain has ended: its line in the ledger, and whether the FLUSH or READ in
/// the chain stands behind every write that the line would move to "committed".
struct Claim<E> {
    entry: E,
    covers_all: bool,
}

impl<E> Claim<E> {
    /// `enter` begins the line, `count` tells whether no other write has returned meanwhile. In this order:
    /// an overlapping write that returns after the count belongs to a later commit then.
    fn begin(enter: impl FnOnce() -> E, count: impl FnOnce() -> bool) -> Self {
        let entry = enter();
        Self { entry, covers_all: count() }
    }
}

/// What has returned on a pin: batches of RDMA writes, and writes by the stream path.
#[derive(Clone, Copy, Eq, PartialEq)]
struct Returned {
    batches: u64,
    streamed: u64,
}

impl Pin {
    /// Writes the buffer's first `len` bytes at `offset` in the file, and makes sure that they are in the
    /// server's memory, where its processors and every reader find them: [`write`](Self::write) alone returns
    /// when the server's NIC has them. A small READ goes out behind the write with the same call of the device,
    /// so it takes one way to the server and back. Where the server's caches survive power loss (eADR) that is
    /// all that durability takes; elsewhere see [`write_durable`](Self::write_durable).
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write).
    pub async fn write_visible(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        let before = self.returned();
        let buffer = match self.at_once(Wanted::WriteThen(Then::Probe), offset, len, buffer) {
            Ok(mut begun) => {
                begun.wait().await;
                match begun.result() {
                    Ok(buffer) => {
                        self.count_proof(before);
                        return Ok((buffer, by_rdma(len)));
                    }
                    Err(failed) => self.for_another_try(failed).await?,
                }
            }
            Err(buffer) => buffer,
        };
        let part = Part { offset, bytes: 0..len };
        let plan = match self.plan_of(&part, &buffer) {
            Ok(plan) => plan,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        if let Some((fabric, chain)) = self.chain(plan, Then::Probe, part.stretch()) {
            let (buffer, write, before) = self.run_chain(fabric, &chain, &part, buffer).await?;
            self.count_proof(before);
            return Ok((buffer, write));
        }
        let (buffer, write) = self.write(offset, buffer, len).await?;
        match self.prove_writes().await {
            Ok(()) => Ok((buffer, write)),
            Err(error) => Err(TransferError::new(error, buffer)),
        }
    }

    /// Writes the buffer's first `len` bytes at `offset` in the file, and makes them survive power loss: as
    /// [`write`](Self::write) with [`flush`](Self::flush) where the server and this host have that, else with
    /// [`commit_range`](Self::commit_range); but in one way to the server and back, or in two, instead of two,
    /// or three. What does it goes out behind the write with the same call of the device.
    ///
    /// # Errors
    ///
    /// Those of [`write`](Self::write) and [`commit`](Self::commit). The write may have ended well then, and
    /// only be not known to be durable: [`write_fate`](Self::write_fate) tells.
    pub async fn write_durable(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, DurableReport), TransferError> {
        let then = if self.may_flush() { Then::Flush } else { Then::Probe };
        let part = Part { offset, bytes: 0..len };
        let before = self.returned();
        let buffer = match self.at_once(Wanted::WriteThen(then), offset, len, buffer) {
            Ok(mut begun) => {
                begun.wait().await;
                match begun.result() {
                    Ok(buffer) => {
                        let claim = self.claim(part.stretch(), before);
                        return self.now_durable(then, &part, claim, (buffer, by_rdma(len))).await;
                    }
                    Err(failed) => self.for_another_try(failed).await?,
                }
            }
            Err(buffer) => buffer,
        };
        let plan = match self.plan_of(&part, &buffer) {
            Ok(plan) => plan,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        let Some((fabric, chain)) = self.chain(plan, then, part.stretch()) else {
            return self.write_and_then(&part, buffer).await;
        };
        let (buffer, write, before) = self.run_chain(fabric, &chain, &part, buffer).await?;
        let claim = self.claim(part.stretch(), before);
        self.now_durable(then, &part, claim, (buffer, write)).await
    }

    async fn now_durable(
        &self,
        then: Then,
        part: &Part,
        claim: Claim<Option<CommitEntry<'_>>>,
        (buffer, write): (Buffer, WriteReport),
    ) -> Result<(Buffer, DurableReport), TransferError> {
        match self.after_chain(then, part.stretch(), claim).await {
            Ok(commit) => Ok((buffer, DurableReport { write, commit })),
            Err(error) => Err(TransferError::new(error, buffer)),
        }
    }

    fn plan_of(&self, part: &Part, buffer: &Buffer) -> Result<Plan, Error> {
        self.check_writable()?;
        self.prepare(|ways| self.reach().write(ways, part.offset, part.bytes.len()), buffer)
    }

    /// `None`: one call can't do it. The whole write must go by RDMA, there must be something to prove it
    /// with, and all must fit in the send queue.
    fn chain(&self, plan: Plan, then: Then, range: Range<u64>) -> Option<(&Arc<Fabric>, Chain)> {
        let (fabric, writes) = (self.fabric.as_ref()?, plan.requests.len());
        if writes == 0 || !plan.pieces.is_empty() {
            return None;
        }
        let mut requests = plan.requests;
        match then {
            Then::Probe => requests.push(self.reach().probe()?),
            Then::Flush => requests.extend(self.reach().flush(range).ok()?),
        }
        let fits = (writes + 1..=fabric.depth()).contains(&requests.len());
        fits.then_some((fabric, Chain { requests, writes, then }))
    }

    /// Also says what had returned on this pin before.
    async fn run_chain(
        &self,
        fabric: &Arc<Fabric>,
        chain: &Chain,
        part: &Part,
        buffer: Buffer,
    ) -> Result<(Buffer, WriteReport, Returned), TransferError> {
        let buffer = match buffer.into_registered(fabric.id()) {
            Ok(registered) => registered,
            Err(buffer) => return Err(TransferError::new(self.foreign_buffer(), buffer)),
        };
        let (offset, len, range) = (part.offset, part.bytes.len(), part.stretch());
        let entry = self.enter(std::slice::from_ref(part));
        self.cell.settled(&range).await;
        let before = self.returned();
        let mut transfer = Transfer::new(&self.cell, Direction::Write, range);
        let batch = Batch { pin: self, returned: false };
        let operation = Operation {
            asked: Asked::WriteThen(chain.then, chain.writes),
            pieces: &chain.requests,
            buffer,
            of: Of::Transfer(&transfer),
        };
        let doing = || format!("write {len} bytes at byte {offset} of {}, and prove it", self.file);
        let ran = self.run(fabric, operation, doing).await;
        batch.returned();
        transfer.end();
        let own = |buffer| Buffer::registered(buffer, fabric.id());
        let buffer = match ran {
            Ok(buffer) => own(buffer),
            Err((error, buffer)) => return Err(TransferError { error, buffer: buffer.map(own) }),
        };
        if let Some(entry) = entry {
            entry.succeed();
        }
        Ok((buffer, by_rdma(len), before))
    }

    /// Begins the commit of a range that a chain has just written and proved.
    fn claim(&self, range: Range<u64>, before: Returned) -> Claim<Option<CommitEntry<'_>>> {
        let enter = || self.enter_commit(Some(range));
        Claim::begin(enter, || self.count_proof(before) || self.ledger.is_none())
    }

    /// Counts what is behind a write that has just returned, if no other write has returned since `before`:
    /// then it stands behind all.
    fn count_proof(&self, before: Returned) -> bool {
        let after = Returned { batches: before.batches + 1, ..before };
        let alone = self.returned() == after;
        if alone {
            self.proven.fetch_max(after.batches, Ordering::Release);
        }
        alone
    }

    /// Does what remains to be done when a chain has ended well.
    async fn after_chain(
        &self,
        then: Then,
        range: Range<u64>,
        claim: Claim<Option<CommitEntry<'_>>>,
    ) -> Result<Option<CommitReport>, Error> {
        match then {
            Then::Flush if claim.covers_all => {
                if let Some(entry) = claim.entry {
                    entry.durable();
                }
                Ok(None)
            }
            Then::Flush => Ok(self.flush(range).await?.commit),
            Then::Probe if claim.covers_all => {
                self.ask_for_commit(claim.entry, Some(range)).await.map(Some)
            }
            Then::Probe => self.commit_bytes(Some(range)).await.map(Some),
        }
    }

    /// One after the other: what goes by the stream path, too, and what does not fit in the send queue.
    async fn write_and_then(
        &self,
        part: &Part,
        buffer: Buffer,
    ) -> Result<(Buffer, DurableReport), TransferError> {
        let (buffer, write) = self.write(part.offset, buffer, part.bytes.len()).await?;
        let range = part.stretch();
        let done = if self.may_flush() {
            self.flush(range).await.map(|report| report.commit)
        } else {
            self.commit_range(range).await.map(Some)
        };
        match done {
            Ok(commit) => Ok((buffer, DurableReport { write, commit })),
            Err(error) => Err(TransferError::new(error, buffer)),
        }
    }

    /// Whether server and host have RDMA FLUSH.
    fn may_flush(&self) -> bool {
        let offered = self.grant.no_flush_because.is_none();
        offered && self.fabric.as_ref().is_some_and(|fabric| fabric.can_flush())
    }

    fn returned(&self) -> Returned {
        Returned {
            batches: self.written.load(Ordering::Acquire),
            streamed: self.streamed.load(Ordering::Acquire),
        }
    }
}

/// Of a write that went by RDMA as a whole.
pub(super) fn by_rdma(len: usize) -> WriteReport {
    WriteReport { rdma_bytes: len as u64, stream_bytes: 0 }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;
    use crate::ledger::{Ledger, Write};

    /// An overlapping write of another task returns after the n-th step of a claim.
    struct Other {
        ledger: RefCell<Ledger>,
        write: Cell<Option<Write>>,
        has_returned: Cell<bool>,
        after_step: usize,
        step: Cell<usize>,
    }

    impl Other {
        fn step_done(&self) {
            if self.step.get() == self.after_step
                && let Some(write) = self.write.take()
            {
                // As a write does it: counted first, acknowledged then.
                self.has_returned.set(true);
                self.ledger.borrow_mut().succeed(write);
            }
            self.step.set(self.step.get() + 1);
        }
    }

    #[test]
    fn a_write_that_returns_during_a_claim_is_not_called_committed_by_it() {
        for after_step in 0..3 {
            let mut ledger = Ledger::default();
            let own = ledger.begin(0..10);
            let write = ledger.begin(5..15);
            ledger.succeed(own);
            let other = Other {
                ledger: RefCell::new(ledger),
                write: Cell::new(Some(write)),
                has_returned: Cell::new(false),
                after_step,
                step: Cell::new(0),
            };
            other.step_done();
            let enter = || {
                let commit = other.ledger.borrow_mut().begin_commit(Some(0..10));
                other.step_done();
                commit
            };
            let count = || {
                let alone = !other.has_returned.get();
                other.step_done();
                alone
            };
            let claim = Claim::begin(enter, count);
            other.ledger.borrow_mut().end_commit(claim.entry, claim.covers_all);
            let fate = other.ledger.borrow().fate();
            assert!(!fate.committed.iter().any(|range| range.end > 5), "{after_step}: {fate:?}");
        }
    }
}
