//! A pin: the right to reach a range of a file with one-sided transfers.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pinfold_proto::v1;
use pinfold_verbs::{Buffer, CompletionStatus, Piece, RemoteKey, RemoteSlice};

use crate::fabric::{Fabric, Failure, Operation};
use crate::file::FileName;
use crate::lane::Direction;
use crate::pin_table::PinCell;
use crate::plan::{self, Request};
use crate::session::Core;
use crate::{Access, Error, FileIdentity, Grant, TransferError};

/// What to pin.
#[derive(Clone, Debug)]
pub struct PinRequest {
    pub(crate) export: String,
    pub(crate) path: String,
    range: Option<Range<u64>>,
    access: Access,
    expected_identity: Option<FileIdentity>,
}

/// A pin on a file.
///
/// Dropping it gives it back in the background; [`unpin`](Self::unpin) waits for that. Who pins the
/// same file again without waiting may be refused with
/// [`Reason::FileDraining`](crate::Reason::FileDraining).
#[derive(Debug)]
pub struct Pin {
    core: Arc<Core>,
    fabric: Arc<Fabric>,
    file: FileName,
    grant: Grant,
    cell: Arc<PinCell>,
    given_back: bool,
}

/// Which way the bytes of a write went.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WriteReport {
    /// By RDMA: the server's CPU saw none of them.
    pub rdma_bytes: u64,
    /// By gRPC.
    pub stream_bytes: u64,
}

/// Which way the bytes of a read came. Fewer than asked for: the file ends there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ReadReport {
    /// By RDMA: the server's CPU saw none of them.
    pub rdma_bytes: u64,
    /// By gRPC.
    pub stream_bytes: u64,
}

/// What a commit did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CommitReport {
    /// How long the server's flush took.
    pub flush: Duration,
}

impl PinRequest {
    /// Pins the whole file for reading.
    pub fn read(export: impl Into<String>, path: impl Into<String>) -> Self {
        Self::new(export.into(), path.into(), Access::Read)
    }

    /// Pins the whole file for reading and writing.
    pub fn read_write(export: impl Into<String>, path: impl Into<String>) -> Self {
        Self::new(export.into(), path.into(), Access::ReadWrite)
    }

    /// Pins these bytes only.
    #[must_use]
    pub fn range(mut self, range: Range<u64>) -> Self {
        self.range = Some(range);
        self
    }

    /// Refuses with [`Reason::FileChanged`](crate::Reason::FileChanged) if the path names another
    /// file than this one by now.
    #[must_use]
    pub fn expect_identity(mut self, identity: FileIdentity) -> Self {
        self.expected_identity = Some(identity);
        self
    }

    fn new(export: String, path: String, access: Access) -> Self {
        Self { export, path, range: None, access, expected_identity: None }
    }

    pub(crate) fn to_wire(&self, session_id: Vec<u8>) -> v1::PinRequest {
        v1::PinRequest {
            session_id,
            export: self.export.clone(),
            path: self.path.clone(),
            range: self.range.as_ref().map(to_wire_range),
            access: v1::Access::from(self.access).into(),
            expected_identity: self.expected_identity.map(Into::into),
        }
    }
}

impl Pin {
    /// What was granted.
    pub fn grant(&self) -> &Grant {
        &self.grant
    }

    /// Says whether a transfer could begin now, and if not why: what a pin's user asks who has
    /// missed events.
    ///
    /// # Errors
    ///
    /// [`Error::Draining`], [`Error::Revoked`], [`Error::SessionLost`].
    pub fn check(&self) -> Result<(), Error> {
        self.cell.check().map_err(|gone| self.gone(gone))
    }

    /// Writes the buffer's first `len` bytes at `offset` in the file. When it returns, the server's
    /// NIC has taken them; they survive power loss after a [`commit`](Self::commit).
    ///
    /// Waits for room in the send queue. Giving up on the future is safe: the buffer stays with the
    /// device until it is done, and is freed then.
    ///
    /// # Errors
    ///
    /// Before anything is sent: [`Error::OutsidePin`], [`Error::PastEnd`], [`Error::Misaligned`],
    /// [`Error::ReadOnlyPin`], [`Error::BufferTooSmall`], [`Error::Draining`], [`Error::Revoked`],
    /// [`Error::SessionLost`]. Afterwards: [`Error::RemoteRefused`], [`Error::LaneLost`]; what
    /// was written is not known then. The error brings the buffer back.
    pub async fn write(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        if let Err(error) = self.check_writable() {
            return Err(TransferError::new(error, buffer));
        }
        let requests = plan::write(&self.grant, offset, len);
        let (buffer, bytes) = self.transfer(Direction::Write, offset, requests, buffer).await?;
        Ok((buffer, WriteReport { rdma_bytes: bytes, stream_bytes: 0 }))
    }

    /// Reads `len` bytes at `offset` in the file into the buffer, fewer where the file ends.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), but for [`Error::ReadOnlyPin`] and [`Error::PastEnd`].
    pub async fn read(
        &self,
        offset: u64,
        len: usize,
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        let requests = plan::read(&self.grant, offset, len);
        let (buffer, bytes) = self.transfer(Direction::Read, offset, requests, buffer).await?;
        Ok((buffer, ReadReport { rdma_bytes: bytes, stream_bytes: 0 }))
    }

    /// Makes every write to the pin that has returned survive power loss.
    ///
    /// # Errors
    ///
    /// [`Error::Draining`], [`Error::Revoked`], and [`Error::Refused`] with
    /// [`Reason::StaleGeneration`](crate::Reason::StaleGeneration): nothing is known to be durable
    /// then but what an earlier commit acknowledged.
    pub async fn commit(&self) -> Result<CommitReport, Error> {
        self.commit_bytes(None).await
    }

    /// Makes the writes to a range of the file survive power loss.
    ///
    /// # Errors
    ///
    /// As [`commit`](Self::commit), and [`Error::Refused`] for a range that is not pinned.
    pub async fn commit_range(&self, range: Range<u64>) -> Result<CommitReport, Error> {
        self.commit_bytes(Some(range)).await
    }

    /// Gives the pin back. When this returns, its keys are dead.
    ///
    /// # Errors
    ///
    /// [`Error::SessionLost`] and [`Error::Transport`]; the server ends the pin with the session
    /// then. A pin that was revoked meanwhile is no error: it is gone, as wanted.
    pub async fn unpin(mut self) -> Result<(), Error> {
        self.given_back = true;
        self.core.unpin(self.grant.pin_id, &self.cell).await
    }

    pub(crate) fn new(
        core: Arc<Core>,
        fabric: Arc<Fabric>,
        file: FileName,
        grant: Grant,
        cell: Arc<PinCell>,
    ) -> Self {
        Self { core, fabric, file, grant, cell, given_back: false }
    }

    fn check_writable(&self) -> Result<(), Error> {
        match self.grant.access {
            Access::ReadWrite => Ok(()),
            Access::Read => Err(Error::ReadOnlyPin { file: self.file.to_string() }),
        }
    }

    async fn transfer(
        &self,
        direction: Direction,
        offset: u64,
        requests: Result<Vec<Request>, plan::Refusal>,
        mut buffer: Buffer,
    ) -> Result<(Buffer, u64), TransferError> {
        // A revocation explains more than a range that no longer matters.
        if let Err(error) = self.check() {
            return Err(TransferError::new(error, buffer));
        }
        let requests = match requests {
            Ok(requests) => requests,
            Err(refusal) => {
                let error = Error::from_refusal(refusal, &self.file, &self.grant);
                return Err(TransferError::new(error, buffer));
            }
        };
        let len = requests.last().map_or(0, |request| request.local.end);
        if len > buffer.len() {
            let error = Error::BufferTooSmall { wanted: len, capacity: buffer.len() };
            return Err(TransferError::new(error, buffer));
        }
        let doing = || match direction {
            Direction::Write => format!("write {len} bytes at byte {offset} of {}", self.file),
            Direction::Read => format!("read {len} bytes at byte {offset} of {}", self.file),
        };
        for batch in requests.chunks(self.fabric.depth()) {
            buffer = self.run(direction, batch, buffer, doing).await?;
        }
        Ok((buffer, len as u64))
    }

    async fn run(
        &self,
        direction: Direction,
        requests: &[Request],
        buffer: Buffer,
        doing: impl Fn() -> String,
    ) -> Result<Buffer, TransferError> {
        let pieces = requests.iter().map(to_piece).collect();
        let operation = Operation { direction, pieces, buffer, pin: Some(&self.cell) };
        match self.fabric.run(&self.core.control, operation).await {
            Ok((buffer, status)) if status.is_success() => Ok(buffer),
            Ok((buffer, status)) => Err(TransferError::new(failed(status, doing()), buffer)),
            Err((Failure::Gone(gone), buffer)) => {
                Err(TransferError { error: self.gone(gone), buffer })
            }
            Err((Failure::Error(error), buffer)) => Err(TransferError { error, buffer }),
        }
    }

    async fn commit_bytes(&self, range: Option<Range<u64>>) -> Result<CommitReport, Error> {
        self.check()?;
        self.prove_writes().await?;
        let request = v1::CommitRequest {
            session_id: self.core.control.session_id.clone(),
            pin_id: self.grant.pin_id,
            generation: Some(self.grant.generation.into()),
            range: range.as_ref().map(to_wire_range),
        };
        let doing = || format!("commit {}", self.file);
        let answer =
            self.core.control.call(doing, async |mut client| client.commit(request).await).await?;
        Ok(CommitReport { flush: Duration::from_micros(answer.flush_us) })
    }

    /// Makes sure that the writes that have returned are in the server's memory: a read behind
    /// them on the same queue pair pushes them there. The commit alone could overtake them, as it
    /// goes by TCP; and a write's own completion only says that the NIC has it.
    ///
    /// Writes of an earlier queue pair need no read: connecting a new one made the server destroy
    /// it, and that waits until all it took is in memory.
    async fn prove_writes(&self) -> Result<(), Error> {
        let Some(request) = plan::probe(&self.grant) else {
            return Ok(());
        };
        let doing = || format!("read back from {} before the commit", self.file);
        let buffer = self.fabric.probe_buffer().await?;
        let buffer = self.run(Direction::Read, &[request], buffer, doing).await?;
        self.fabric.return_probe_buffer(buffer);
        Ok(())
    }

    fn gone(&self, gone: crate::pin_state::Gone) -> Error {
        Error::from_gone(gone, &self.file, &self.core.control.endpoint)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !self.given_back {
            self.core.give_back(self.grant.pin_id, self.cell.clone());
        }
    }
}

fn to_piece(request: &Request) -> Piece {
    Piece {
        local: request.local.clone(),
        remote: RemoteSlice {
            address: request.remote_address,
            key: RemoteKey::new(request.remote_key),
            len: request.local.len(),
        },
    }
}

fn to_wire_range(range: &Range<u64>) -> v1::ByteRange {
    v1::ByteRange { start: range.start, end: range.end }
}

/// Sorts a failed completion: what the server's NIC answered, or a connection that broke.
fn failed(status: CompletionStatus, doing: String) -> Error {
    match status {
        CompletionStatus::RemoteAccess
        | CompletionStatus::RemoteInvalidRequest
        | CompletionStatus::RemoteOperation => Error::RemoteRefused { doing, status },
        _ => Error::LaneLost { doing, status },
    }
}
