//! A write and what makes it durable, as one.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pinfold_verbs::Piece;

use super::{Batch, CommitReport, Pin, WriteReport};
use crate::fabric::{Fabric, Operation};
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
        let plan = |ways| self.reach().write(ways, offset, len);
        let plan = match self.check_writable().and_then(|()| self.prepare(plan, &buffer)) {
            Ok(plan) => plan,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        let part = Part { offset, bytes: 0..len };
        let chain = self.fabric.as_ref().and_then(|fabric| {
            let chain = self.chain(fabric, plan, part.stretch())?;
            Some((fabric, chain))
        });
        match chain {
            Some((fabric, chain)) => self.write_chain(fabric, &chain, &part, buffer).await,
            None => self.write_and_then(&part, buffer).await,
        }
    }

    /// `None`: one call can't do it.
    fn chain(&self, fabric: &Fabric, plan: Plan, range: Range<u64>) -> Option<Chain> {
        let writes = plan.requests.len();
        if writes == 0 || !plan.pieces.is_empty() {
            return None;
        }
        let (then, behind) = if self.may_flush(fabric) {
            (Then::Flush, self.reach().flush(range).ok()?)
        } else {
            (Then::Probe, vec![self.reach().probe()?])
        };
        let mut requests = plan.requests;
        requests.extend(behind);
        (requests.len() <= fabric.depth()).then_some(Chain { requests, writes, then })
    }

    async fn write_chain(
        &self,
        fabric: &Arc<Fabric>,
        chain: &Chain,
        part: &Part,
        buffer: Buffer,
    ) -> Result<(Buffer, DurableReport), TransferError> {
        let buffer = match buffer.into_registered(fabric.id()) {
            Ok(registered) => registered,
            Err(buffer) => return Err(TransferError::new(self.foreign_buffer(), buffer)),
        };
        let (offset, len, range) = (part.offset, part.bytes.len(), part.stretch());
        let entry = self.enter(std::slice::from_ref(part));
        self.cell.settled(&range).await;
        let before = self.returned();
        let transfer = Transfer::new(&self.cell, Direction::Write, range.clone());
        let batch = Batch { pin: self, returned: false };
        let operation = Operation {
            asked: Asked::WriteThen(chain.then, chain.writes),
            pieces: &chain.requests,
            buffer,
            transfer: Some(&transfer),
        };
        let doing = || format!("write {len} bytes at byte {offset} of {}, durably", self.file);
        let ran = self.run(fabric, operation, doing).await;
        batch.returned();
        transfer.end();
        let own = |buffer| Buffer::registered(buffer, fabric.id());
        let buffer =
            own(ran.map_err(|(error, buffer)| TransferError { error, buffer: buffer.map(own) })?);
        if let Some(entry) = entry {
            entry.succeed();
        }
        // What is behind the write stands behind no other that has returned meanwhile; and a pin that keeps
        // account of its writes would count that one, too.
        let alone = self.returned() == Returned { batches: before.batches + 1, ..before };
        let done = self.after_chain(chain.then, range, alone || self.ledger.is_none()).await;
        let write = WriteReport { rdma_bytes: len as u64, stream_bytes: 0 };
        match done {
            Ok(commit) => Ok((buffer, DurableReport { write, commit })),
            Err(error) => Err(TransferError::new(error, buffer)),
        }
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
        let done = if self.fabric.as_ref().is_some_and(|fabric| self.may_flush(fabric)) {
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
    fn may_flush(&self, fabric: &Fabric) -> bool {
        self.grant.no_flush_because.is_none() && fabric.can_flush()
    }

    fn returned(&self) -> Returned {
        Returned {
            batches: self.written.load(Ordering::Acquire),
            streamed: self.streamed.load(Ordering::Acquire),
        }
    }
}
