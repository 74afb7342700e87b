//! A write and what proves it, or makes it durable, as one.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pinfold_verbs::Piece;

use super::at_once::Wanted;
use super::{Batch, CommitReport, Pin, WriteReport};
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
                let buffer = begun.result()?;
                self.count_proof(before);
                return Ok((buffer, by_rdma(len)));
            }
            Err(buffer) => buffer,
        };
        let part = Part { offset, bytes: 0..len };
        let plan = match self.plan_of(&part, &buffer) {
            Ok(plan) => plan,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        if let Some((fabric, chain)) = self.chain(plan, Then::Probe, part.stretch()) {
            let (buffer, write, _) = self.run_chain(fabric, &chain, &part, buffer).await?;
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
                let buffer = begun.result()?;
                let alone = self.count_proof(before);
                return self.now_durable(then, &part, alone, (buffer, by_rdma(len))).await;
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
        let (buffer, write, alone) = self.run_chain(fabric, &chain, &part, buffer).await?;
        self.now_durable(then, &part, alone, (buffer, write)).await
    }

    async fn now_durable(
        &self,
        then: Then,
        part: &Part,
        alone: bool,
        (buffer, write): (Buffer, WriteReport),
    ) -> Result<(Buffer, DurableReport), TransferError> {
        let enough = alone || self.ledger.is_none();
        match self.after_chain(then, part.stretch(), enough).await {
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

    /// True: no other write has returned on this pin meanwhile. What is behind the write stands behind none
    /// that has; and a pin that keeps account of its writes would count that one, too.
    async fn run_chain(
        &self,
        fabric: &Arc<Fabric>,
        chain: &Chain,
        part: &Part,
        buffer: Buffer,
    ) -> Result<(Buffer, WriteReport, bool), TransferError> {
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
        Ok((buffer, by_rdma(len), self.count_proof(before)))
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

    /// What is left to do when a chain has ended well. `enough`: it stands for all that counts.
    async fn after_chain(
        &self,
        then: Then,
        range: Range<u64>,
        enough: bool,
    ) -> Result<Option<CommitReport>, Error> {
        match then {
            Then::Flush if enough => {
                if let Some(entry) = self.enter_commit(Some(range)) {
                    entry.durable();
                }
                Ok(None)
            }
            Then::Flush => Ok(self.flush(range).await?.commit),
            Then::Probe if enough => self.commit_proven(Some(range)).await.map(Some),
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
