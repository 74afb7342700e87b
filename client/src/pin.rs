//! A pin: the right to reach a range of a file.

mod again;
mod at_once;
mod atomics;
mod digest;
mod durable;
mod flush;
mod pipeline;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pinfold_proto::v1;
use pinfold_verbs::{Buffer as RegisteredBuffer, CompletionStatus};

use crate::fabric::{self, Fabric, Failure, Of, Operation};
use crate::file::FileName;
use crate::lane::{Asked, Direction};
use crate::ledger::{Commit, Ledger, Write};
use crate::pieces::{self, StreamPath};
use crate::pin_state::Gone;
use crate::pin_table::{PinCell, Ticket};
use crate::plan::{Part, Plan, Reach, Refusal, StreamPiece, Ways};
use crate::session::Core;
use crate::transfer::Transfer;
use crate::{
    Access, Buffer, Error, FileIdentity, Grant, Life, Loss, Reason, TransferError, Transport,
    WriteFate,
};

use at_once::Wanted;
pub use durable::DurableReport;
pub use flush::FlushReport;
pub use pipeline::{Pipeline, Transferred};

/// How long a refusal waits for the notice that explains it: the two come on different streams, a
/// moment apart.
const NOTICE_PATIENCE: Duration = Duration::from_secs(5);

/// What to pin.
#[derive(Clone, Debug)]
pub struct PinRequest {
    pub(crate) export: String,
    pub(crate) path: String,
    range: Option<Range<u64>>,
    access: Access,
    expected_identity: Option<FileIdentity>,
    expected_life: Option<Life>,
    pub(crate) transport: Transport,
    exclusive: bool,
    steal: bool,
    pub(crate) reserve_end: u64,
    wait: Duration,
    pub(crate) track_writes: bool,
}

/// A pin on a file.
///
/// Dropping it gives it back in the background; [`unpin`](Self::unpin) waits for that. Who pins the
/// same file again without waiting may be refused with
/// [`Reason::FileDraining`](crate::Reason::FileDraining).
#[derive(Debug)]
pub struct Pin {
    core: Arc<Core>,
    /// Absent: by the stream path only.
    fabric: Option<Arc<Fabric>>,
    /// RDMA was asked for, so the stream path is not to be used.
    rdma_only: bool,
    file: FileName,
    grant: Grant,
    /// The file's end, as far as this client knows.
    valid_end: AtomicU64,
    /// How many batches of RDMA writes have returned, or were abandoned …
    written: AtomicU64,
    /// … and how many of them are known to be in the server's memory.
    proven: AtomicU64,
    /// What `written` was when the last one was abandoned.
    abandoned: AtomicU64,
    /// How many writes have returned of which a part went by the stream path …
    streamed: AtomicU64,
    /// … and how many of them a commit of the whole pin has covered.
    streamed_committed: AtomicU64,
    cell: Arc<PinCell>,
    /// What became of the writes; absent if nobody wants to know.
    ledger: Option<Mutex<Ledger>>,
    given_back: AtomicBool,
}

/// A write's lines in the ledger: failed, unless it is told otherwise.
struct Entry<'a> {
    ledger: &'a Mutex<Ledger>,
    writes: Vec<Write>,
}

/// A commit's line in the ledger: it came to nothing, unless it is told otherwise.
struct CommitEntry<'a> {
    ledger: &'a Mutex<Ledger>,
    commit: Option<Commit>,
}

/// Counts a batch of RDMA writes when it has returned, or when nobody waits for that any more.
struct Batch<'a> {
    pin: &'a Pin,
    returned: bool,
}

/// Bytes that went each way.
#[derive(Clone, Copy, Debug, Default)]
struct Carried {
    rdma: u64,
    stream: u64,
}

/// Which way the bytes of a write went.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct WriteReport {
    /// By RDMA: the server's CPU saw none of them.
    pub rdma_bytes: u64,
    /// By the stream path: gRPC, through the server's CPU.
    pub stream_bytes: u64,
}

/// Which way the bytes of a read came. Fewer than asked for: the file ends there.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ReadReport {
    /// By RDMA: the server's CPU saw none of them.
    pub rdma_bytes: u64,
    /// By the stream path: gRPC, through the server's CPU.
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

    /// Refuses with [`Reason::FileModified`](crate::Reason::FileModified) unless no local process has changed
    /// the file's bytes since the life of an earlier grant, as far as the server knows; it remembers that
    /// across restarts.
    #[must_use]
    pub fn expect_life(mut self, life: Life) -> Self {
        self.expected_life = Some(life);
        self
    }

    fn new(export: String, path: String, access: Access) -> Self {
        Self {
            export,
            path,
            range: None,
            access,
            expected_identity: None,
            expected_life: None,
            transport: Transport::Auto,
            exclusive: false,
            steal: false,
            reserve_end: 0,
            wait: Duration::ZERO,
            track_writes: false,
        }
    }

    /// How the bytes are to travel. Default: [`Transport::Auto`].
    #[must_use]
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = transport;
        self
    }

    /// Keeps others off: refuses with [`Reason::RangeHeld`](crate::Reason::RangeHeld) if another pin
    /// overlaps the range, and as long as this one lasts the server refuses those that would.
    #[must_use]
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// For a failover: [exclusive](Self::exclusive), and whoever has pins on the file loses them. They are
    /// told to finish what is in flight, the server's NIC is fenced, and the file is guarded anew: nothing
    /// that an old holder sent lands after the grant. All pins of the file are revoked, also those that
    /// don't overlap and this session's own, as one fence cuts off a whole file.
    ///
    /// [`Grant::generation`](crate::Grant::generation) is a fencing token then: it is above that of every
    /// grant of the export before, the incarnation counting first, also across restarts of the server. A pin that is kept steals once, and waits for its turn when it is lost.
    #[must_use]
    pub fn steal(mut self) -> Self {
        self.exclusive = true;
        self.steal = true;
        self
    }

    /// Reserves room past the range, up to this byte of the file, for when the file grows: then
    /// [`Pin::extend_to`] lets the pin use it at once.
    #[must_use]
    pub fn reserve_end(mut self, end: u64) -> Self {
        self.reserve_end = end;
        self
    }

    /// If a process of the storage host has the file open, or its export is quiesced: waits for so long
    /// until it is free. The pin is had as soon as the last one has closed it, or soon after the export is
    /// resumed; with nothing to wait for [`Reason::FileBusy`](crate::Reason::FileBusy) or
    /// [`Reason::ExportQuiesced`](crate::Reason::ExportQuiesced) comes at once. To give up on the call ends
    /// the wait.
    #[must_use]
    pub fn wait(mut self, at_most: Duration) -> Self {
        self.wait = at_most;
        self
    }

    /// Keeps account of what becomes of the writes: [`Pin::write_fate`] tells then which bytes were
    /// committed, which were acknowledged, and of which nothing is known. It costs a short lock per
    /// write and commit, and some 50 bytes for each separate stretch of the file that was written;
    /// stretches of one fate that touch are one.
    #[must_use]
    pub fn track_writes(mut self) -> Self {
        self.track_writes = true;
        self
    }

    /// Pins only what was granted before, unchanged.
    pub(crate) fn expect(&mut self, grant: &Grant) {
        self.expected_identity = Some(grant.identity);
        self.expected_life = grant.life;
    }

    /// Waits for its turn from now on: two that steal from each other would never end.
    pub(crate) fn no_longer_steal(&mut self) {
        self.steal = false;
    }

    /// Pins whatever the path names.
    pub(crate) fn expect_any(&mut self) {
        self.expected_identity = None;
        self.expected_life = None;
    }

    /// Whether it may be held up for as long as it wants to wait.
    pub(crate) fn waits(&self) -> bool {
        !self.wait.is_zero()
    }

    pub(crate) fn to_wire(
        &self,
        session_id: Vec<u8>,
        transport: Transport,
        number: u64,
    ) -> v1::PinRequest {
        v1::PinRequest {
            session_id,
            export: self.export.clone(),
            path: self.path.clone(),
            range: self.range.as_ref().map(to_wire_range),
            access: v1::Access::from(self.access).into(),
            expected_identity: self.expected_identity.map(Into::into),
            transport: v1::Transport::from(transport).into(),
            exclusive: self.exclusive,
            steal: self.steal,
            reserve_end: self.reserve_end,
            wait_ms: u32::try_from(self.wait.as_millis()).unwrap_or(u32::MAX),
            expected_life: self.expected_life.map(Into::into),
            number,
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

    /// The bytes of the file that can be used now: the pin, as far as the file goes.
    pub fn usable(&self) -> Range<u64> {
        let reach = self.reach();
        let pinned = reach.range();
        pinned.start..pinned.end.min(reach.valid_end).max(pinned.start)
    }

    /// Tells the pin that the file ends here now, as [`Session::grow`](crate::Session::grow) or
    /// [`Session::stat`](crate::Session::stat) says: what the pin
    /// [reserved](PinRequest::reserve_end) can be used up to there from now on. An end below the
    /// known one changes nothing. Where the file does not go so far, the server refuses transfers.
    pub fn extend_to(&self, valid_end: u64) {
        self.valid_end.fetch_max(valid_end, Ordering::Relaxed);
    }

    /// Writes the buffer's first `len` bytes at `offset` in the file, by RDMA where it can be. When
    /// it returns, the server has them; they survive power loss after a [`commit`](Self::commit).
    ///
    /// Waits for room in the send queue. Giving up on the future is safe: what has begun goes on,
    /// and the buffer is freed when the device is done with it. A later transfer of the same bytes
    /// through this pin comes after what goes on.
    ///
    /// # Errors
    ///
    /// Before anything is sent: [`Error::OutsidePin`], [`Error::PastEnd`], [`Error::ReadOnlyPin`],
    /// [`Error::BufferTooSmall`], [`Error::Draining`], [`Error::Revoked`], [`Error::SessionLost`];
    /// on a pin that was asked for with [`Transport::Rdma`], [`Error::Misaligned`] and
    /// [`Error::ForeignBuffer`]. In the middle: [`Error::Draining`], [`Error::Revoked`],
    /// [`Error::RemoteRefused`], [`Error::LaneLost`], [`Error::Refused`], [`Error::Transport`]; what
    /// was written is not known then. The error brings the buffer back.
    pub async fn write(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        let buffer = match self.at_once(Wanted::Write, offset, len, buffer) {
            Ok(mut begun) => {
                begun.wait().await;
                match begun.result() {
                    Ok(buffer) => return Ok((buffer, durable::by_rdma(len))),
                    Err(failed) => self.for_another_try(failed).await?,
                }
            }
            Err(buffer) => buffer,
        };
        let parts = [Part { offset, bytes: 0..len }];
        self.write_planned(&parts, |ways| self.reach().write(ways, offset, len), buffer).await
    }

    /// Writes several stretches of the file from one buffer, with one call of the device as far as they
    /// go by RDMA and fit in the send queue. They may land in any order, so they must not overlap.
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`Error::BadParts`].
    pub async fn write_vectored(
        &self,
        parts: &[Part],
        buffer: Buffer,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.write_planned(parts, |ways| self.reach().write_parts(ways, parts), buffer).await
    }

    async fn write_planned(
        &self,
        parts: &[Part],
        plan: impl FnOnce(Ways) -> Result<Plan, Refusal>,
        buffer: Buffer,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        let plan = match self.check_writable().and_then(|()| self.prepare(plan, &buffer)) {
            Ok(plan) => plan,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        let entry = self.enter(parts);
        let range = hull(parts);
        let (buffer, carried) = self.transfer(Direction::Write, range, &plan, buffer).await?;
        if carried.stream > 0 {
            self.streamed.fetch_add(1, Ordering::Release);
        }
        if let Some(entry) = entry {
            entry.succeed();
        }
        Ok((buffer, WriteReport { rdma_bytes: carried.rdma, stream_bytes: carried.stream }))
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
        let buffer = match self.at_once(Wanted::Read, offset, len, buffer) {
            Ok(mut begun) => {
                begun.wait().await;
                let report = ReadReport { rdma_bytes: len as u64, stream_bytes: 0 };
                match begun.result() {
                    Ok(buffer) => return Ok((buffer, report)),
                    Err(failed) => self.for_another_try(failed).await?,
                }
            }
            Err(buffer) => buffer,
        };
        let parts = [Part { offset, bytes: 0..len }];
        self.read_planned(&parts, |ways| self.reach().read(ways, offset, len), buffer).await
    }

    /// Reads several stretches of the file into one buffer, with one call of the device as far as they
    /// come by RDMA and fit in the send queue. The file must have all of them, and their places in the
    /// buffer must not overlap.
    ///
    /// # Errors
    ///
    /// As [`write_vectored`](Self::write_vectored), but for [`Error::ReadOnlyPin`].
    pub async fn read_vectored(
        &self,
        parts: &[Part],
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        self.read_planned(parts, |ways| self.reach().read_parts(ways, parts), buffer).await
    }

    async fn read_planned(
        &self,
        parts: &[Part],
        plan: impl FnOnce(Ways) -> Result<Plan, Refusal>,
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        let plan = match self.prepare(plan, &buffer) {
            Ok(plan) => plan,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        let range = hull(parts);
        let (buffer, carried) = self.transfer(Direction::Read, range, &plan, buffer).await?;
        Ok((buffer, ReadReport { rdma_bytes: carried.rdma, stream_bytes: carried.stream }))
    }

    /// Makes every write to the pin that has returned survive power loss.
    ///
    /// # Errors
    ///
    /// [`Error::Draining`], [`Error::Revoked`], and [`Error::Refused`] with
    /// [`Reason::StaleGeneration`](crate::Reason::StaleGeneration): nothing is known to be durable
    /// then but what an earlier commit acknowledged. With
    /// [`Reason::WriteBackFailed`](crate::Reason::WriteBackFailed) the rest may be missing on the medium,
    /// also what other pins of the file wrote; all of them are revoked, and no later commit succeeds.
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
    pub async fn unpin(self) -> Result<(), Error> {
        self.give_back().await
    }

    /// What became of the bytes that were written through this pin, as far as is known now: also
    /// after the pin has been taken back, or its session has ended. Absent unless the pin was asked
    /// to [track its writes](PinRequest::track_writes).
    pub fn write_fate(&self) -> Option<WriteFate> {
        let mut ledger = lock(self.ledger.as_ref()?);
        if self.cell.check().is_err_and(|gone| gone.is_of_write_back()) {
            ledger.write_back_failed();
        }
        Some(ledger.fate())
    }

    pub(crate) fn new(
        core: Arc<Core>,
        fabric: Option<Arc<Fabric>>,
        request: &PinRequest,
        file: FileName,
        grant: Grant,
        cell: Arc<PinCell>,
    ) -> Self {
        Self {
            fabric: fabric.filter(|_| !grant.segments.is_empty()),
            core,
            rdma_only: request.transport == Transport::Rdma,
            file,
            valid_end: AtomicU64::new(grant.valid_end),
            written: AtomicU64::new(0),
            proven: AtomicU64::new(0),
            abandoned: AtomicU64::new(0),
            streamed: AtomicU64::new(0),
            streamed_committed: AtomicU64::new(0),
            grant,
            cell,
            ledger: request.track_writes.then(Mutex::default),
            given_back: AtomicBool::new(false),
        }
    }

    /// As [`unpin`](Self::unpin), while others may hold the pin too. Once begun it runs to its end.
    pub(crate) async fn give_back(&self) -> Result<(), Error> {
        self.given_back.store(true, Ordering::Relaxed);
        let (core, pin_id, cell) = (self.core.clone(), self.grant.pin_id, self.cell.clone());
        let control = &self.core.control;
        let ended = control.to_the_end(async move { core.unpin(pin_id, &cell).await }).await;
        ended.unwrap_or_else(|| Err(control.lost(Loss::Closed)))
    }

    /// The session that it belongs to.
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Its life.
    pub(crate) fn cell(&self) -> &PinCell {
        &self.cell
    }

    /// Begins a line for each part of a write.
    fn enter(&self, parts: &[Part]) -> Option<Entry<'_>> {
        let ledger = self.ledger.as_ref()?;
        let mut lines = lock(ledger);
        let writes = parts.iter().map(|part| lines.begin(part.stretch())).collect();
        Some(Entry { ledger, writes })
    }

    /// Begins a line for a commit.
    fn enter_commit(&self, range: Option<Range<u64>>) -> Option<CommitEntry<'_>> {
        let ledger = self.ledger.as_ref()?;
        let commit = Some(lock(ledger).begin_commit(range));
        Some(CommitEntry { ledger, commit })
    }

    fn reach(&self) -> Reach<'_> {
        Reach { grant: &self.grant, valid_end: self.valid_end.load(Ordering::Relaxed) }
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
        range: Range<u64>,
        plan: &Plan,
        buffer: Buffer,
    ) -> Result<(Buffer, Carried), TransferError> {
        let total = plan.len() as u64;
        let stream = plan.pieces.iter().map(|piece| piece.local.len() as u64).sum();
        if let Err(error) = self.settle(&range, plan).await {
            return Err(TransferError::new(error, buffer));
        }
        let mut transfer = Transfer::new(&self.cell, direction, range);
        let fabric = self.fabric.as_ref().filter(|_| !plan.requests.is_empty());
        let ran = match fabric {
            Some(fabric) if plan.pieces.is_empty() => {
                self.run_requests(fabric, &transfer, plan, buffer).await
            }
            Some(fabric) => self.run_both(fabric, &transfer, plan, buffer).await,
            None => self.run_pieces(&transfer, &plan.pieces, buffer).await,
        };
        transfer.end();
        Ok((ran?, Carried { rdma: total - stream, stream }))
    }

    /// Waits for abandoned writes to these bytes, so that none lands after what comes now. Where the
    /// server's CPU is to follow the NIC, a read makes sure that what the NIC took is in memory.
    async fn settle(&self, range: &Range<u64>, plan: &Plan) -> Result<(), Error> {
        self.cell.settled(range).await;
        let abandoned = self.abandoned.load(Ordering::Acquire);
        if plan.pieces.is_empty() || self.proven.load(Ordering::Acquire) >= abandoned {
            return Ok(());
        }
        self.prove_writes().await
    }

    /// Finds out, before anything is sent, what can be found out.
    fn prepare(
        &self,
        plan: impl FnOnce(Ways) -> Result<Plan, Refusal>,
        buffer: &Buffer,
    ) -> Result<Plan, Error> {
        // A revocation explains more than a range that no longer matters.
        self.check()?;
        let rdma = self.fabric.as_ref().is_some_and(|fabric| buffer.is_registered(fabric.id()));
        if self.rdma_only && !rdma {
            return Err(self.foreign_buffer());
        }
        let stream = (!self.rdma_only).then_some(self.core.stream_piece_bytes_max);
        let plan = plan(Ways { rdma, stream })
            .map_err(|refusal| Error::from_refusal(refusal, &self.file, self.reach()))?;
        let wanted = plan.buffer_end();
        if wanted > buffer.len() {
            return Err(Error::BufferTooSmall { wanted, capacity: buffer.len() });
        }
        Ok(plan)
    }

    fn foreign_buffer(&self) -> Error {
        Error::ForeignBuffer { doing: format!("reach {}", self.file) }
    }

    /// By the stream path only: the buffer stays here, and each piece copies when its turn comes.
    async fn run_pieces(
        &self,
        transfer: &Transfer<'_>,
        pieces: &[StreamPiece],
        mut buffer: Buffer,
    ) -> Result<Buffer, TransferError> {
        let done = match transfer.direction {
            Direction::Write => {
                let bytes = buffer.as_slice();
                let copy = |part: &pieces::Part| bytes[part.piece.local.clone()].to_vec();
                self.write_pieces(transfer, pieces, copy).await
            }
            Direction::Read => {
                let bytes = buffer.as_mut_slice();
                let take = |piece: &StreamPiece, data: Vec<u8>| {
                    bytes[piece.local.clone()].copy_from_slice(&data);
                };
                self.read_pieces(transfer, pieces, take).await
            }
        };
        with_buffer(done, buffer)
    }

    /// Both ways at a time. The device has the buffer meanwhile, so the stream path works on
    /// copies: it carries what a quirk forbids, which is little.
    async fn run_both(
        &self,
        fabric: &Arc<Fabric>,
        transfer: &Transfer<'_>,
        plan: &Plan,
        buffer: Buffer,
    ) -> Result<Buffer, TransferError> {
        let copies: Vec<Vec<u8>> = match transfer.direction {
            Direction::Write => {
                let bytes = buffer.as_slice();
                plan.pieces.iter().map(|piece| bytes[piece.local.clone()].to_vec()).collect()
            }
            Direction::Read => Vec::new(),
        };
        let mut arrived: Vec<(Range<usize>, Vec<u8>)> = Vec::new();
        let stream = async {
            match transfer.direction {
                Direction::Write => {
                    let copy =
                        |part: &pieces::Part| copies[part.index][part.within.clone()].to_vec();
                    self.write_pieces(transfer, &plan.pieces, copy).await
                }
                Direction::Read => {
                    let keep =
                        |piece: &StreamPiece, data| arrived.push((piece.local.clone(), data));
                    self.read_pieces(transfer, &plan.pieces, keep).await
                }
            }
        };
        let (sent, streamed) =
            tokio::join!(self.run_requests(fabric, transfer, plan, buffer), stream);
        let mut buffer = sent?;
        for (local, data) in arrived {
            buffer.as_mut_slice()[local].copy_from_slice(&data);
        }
        with_buffer(streamed, buffer)
    }

    async fn run_requests(
        &self,
        fabric: &Arc<Fabric>,
        transfer: &Transfer<'_>,
        plan: &Plan,
        buffer: Buffer,
    ) -> Result<Buffer, TransferError> {
        let mut registered = match buffer.into_registered(fabric.id()) {
            Ok(registered) => registered,
            Err(buffer) => return Err(TransferError::new(self.foreign_buffer(), buffer)),
        };
        let doing = || self.doing(transfer.direction, &transfer.range);
        for requests in plan.requests.chunks(fabric.depth()) {
            let batch = (transfer.direction == Direction::Write)
                .then(|| Batch { pin: self, returned: false });
            let operation = Operation {
                asked: Asked::Transfer(transfer.direction),
                pieces: requests,
                buffer: registered,
                of: Of::Transfer(transfer),
            };
            let ran = self.run(fabric, operation, doing).await;
            if let Some(batch) = batch {
                batch.returned();
            }
            registered = ran.map_err(|(error, buffer)| TransferError {
                error,
                buffer: buffer.map(|buffer| Buffer::registered(buffer, fabric.id())),
            })?;
        }
        Ok(Buffer::registered(registered, fabric.id()))
    }

    /// For messages.
    fn doing(&self, direction: Direction, range: &Range<u64>) -> String {
        let (file, len) = (&self.file, range.end - range.start);
        let what = match direction {
            Direction::Write => "write",
            Direction::Read => "read",
        };
        format!("{what} {len} bytes at byte {} of {file}", range.start)
    }

    async fn run(
        &self,
        fabric: &Arc<Fabric>,
        operation: Operation<'_>,
        doing: impl Fn() -> String,
    ) -> Result<RegisteredBuffer, (Error, Option<RegisteredBuffer>)> {
        let Operation { asked, pieces, mut buffer, of } = operation;
        for attempt in 1.. {
            let operation = Operation { asked, pieces, buffer, of };
            let (refused, status) = match fabric.run(&self.core.control, operation).await {
                Ok((buffer, status)) if status.is_success() => return Ok(buffer),
                Ok((buffer, status)) if again::is_refusal(status) => (buffer, status),
                Ok((buffer, status)) => return Err((failed(status, doing()), Some(buffer))),
                Err((Failure::Gone(gone), buffer)) => return Err((self.gone(gone), buffer)),
                Err((Failure::Lost, buffer)) => return Err((fabric::lost(doing()), buffer)),
                Err((Failure::Error(error), buffer)) => return Err((error, buffer)),
            };
            if let Err(gone) = self.refused_without_a_word().await {
                return Err((gone, Some(refused)));
            }
            if !again::may_repeat(asked) || attempt == again::TRIES {
                return Err((failed(status, doing()), Some(refused)));
            }
            again::log_another_try(&doing(), status);
            buffer = refused;
        }
        unreachable!("the last try returns")
    }

    async fn write_pieces(
        &self,
        transfer: &Transfer<'_>,
        pieces: &[StreamPiece],
        data: impl Fn(&pieces::Part) -> Vec<u8>,
    ) -> Result<(), Error> {
        let path = self.stream_path();
        let start =
            |part: &pieces::Part| Ok(path.write(&part.piece, data(part), self.begin(transfer)?));
        let pace = &self.core.control.pace;
        let done = pieces::run(pace, pieces, start, |_, ()| ()).await;
        self.explained(done).await
    }

    async fn read_pieces(
        &self,
        transfer: &Transfer<'_>,
        pieces: &[StreamPiece],
        take: impl FnMut(&StreamPiece, Vec<u8>),
    ) -> Result<(), Error> {
        let path = self.stream_path();
        let start = |part: &pieces::Part| Ok(path.read(&part.piece, self.begin(transfer)?));
        let done = pieces::run(&self.core.control.pace, pieces, start, take).await;
        self.explained(done).await
    }

    fn stream_path(&self) -> StreamPath<'_> {
        StreamPath {
            control: &self.core.control,
            pin_id: self.grant.pin_id,
            generation: self.grant.generation,
            file: self.file.to_string(),
        }
    }

    /// Counts an operation in.
    fn begin(&self, transfer: &Transfer<'_>) -> Result<Ticket, Error> {
        transfer.begin().map_err(|gone| self.gone(gone))
    }

    /// The server refuses stream pieces from the break on, and its notice of that comes on another
    /// stream, perhaps later.
    async fn explained<T>(&self, done: Result<T, Error>) -> Result<T, Error> {
        let error = match done {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let told = match error.reason() {
            Some(
                Reason::FileDraining
                | Reason::StaleGeneration
                | Reason::UnknownPin
                | Reason::UnknownSession,
            ) => tokio::time::timeout(NOTICE_PATIENCE, self.cell.gone()).await,
            _ => return Err(error),
        };
        Err(told.map_or(error, |gone| self.gone(gone)))
    }

    /// Everything that had returned when this began counts, so the proof begins after that.
    async fn commit_bytes(&self, range: Option<Range<u64>>) -> Result<CommitReport, Error> {
        self.check()?;
        let streamed = self.streamed.load(Ordering::Acquire);
        let entry = self.enter_commit(range.clone());
        self.prove_writes().await?;
        let whole = range.is_none();
        let report = self.ask_for_commit(entry, range).await?;
        if whole {
            self.streamed_committed.fetch_max(streamed, Ordering::Release);
        }
        Ok(report)
    }

    /// The writes that count must be in the server's memory already.
    async fn ask_for_commit(
        &self,
        entry: Option<CommitEntry<'_>>,
        range: Option<Range<u64>>,
    ) -> Result<CommitReport, Error> {
        let request = v1::CommitRequest {
            session_id: self.core.control.session_id.clone(),
            pin_id: self.grant.pin_id,
            generation: Some(self.grant.generation.into()),
            range: range.as_ref().map(to_wire_range),
        };
        let doing = || format!("commit {}", self.file);
        let call = self.core.control.call(doing, async |mut client| client.commit(request).await);
        let answer = call.await.inspect_err(|error| self.note_lost_writes(error))?;
        if let Some(entry) = entry {
            entry.durable();
        }
        Ok(CommitReport { flush: Duration::from_micros(answer.flush_us) })
    }

    /// What the server could not write back may be missing on its medium.
    fn note_lost_writes(&self, refused: &Error) {
        let lost = matches!(refused.reason(), Some(Reason::WriteBackFailed | Reason::MediumLost));
        if let Some(ledger) = self.ledger.as_ref().filter(|_| lost) {
            lock(ledger).write_back_failed();
        }
    }

    /// Makes sure that the RDMA writes that have returned are in the server's memory: a read behind
    /// them on the same queue pair pushes them there. The commit alone could overtake them, as it
    /// goes by TCP; and a write's own completion only says that the NIC has it.
    ///
    /// Writes of an earlier queue pair need no read: connecting a new one made the server destroy
    /// it, and that waits until all it took is in memory. Nor do those of the stream path, which
    /// the server has answered.
    async fn prove_writes(&self) -> Result<(), Error> {
        let written = self.written.load(Ordering::Acquire);
        let Some(fabric) = &self.fabric else {
            return Ok(());
        };
        if self.proven.load(Ordering::Acquire) >= written {
            return Ok(());
        }
        if let Some(request) = self.reach().probe() {
            let doing = || format!("read back from {} before the commit", self.file);
            let (buffer, pieces) = (fabric.small_buffer().await?, [request]);
            let asked = Asked::Transfer(Direction::Read);
            let operation = Operation { asked, pieces: &pieces, buffer, of: Of::Pin(&self.cell) };
            let ran = self.run(fabric, operation, doing).await;
            fabric.return_small_buffer(ran.map_err(|(error, _)| error)?);
        }
        // Of two commits at a time, each counts only what its own read stood behind.
        self.proven.fetch_max(written, Ordering::Release);
        Ok(())
    }

    fn gone(&self, gone: Gone) -> Error {
        Error::from_gone(gone, &self.file, &self.core.control.endpoint)
    }
}

impl Entry<'_> {
    fn succeed(mut self) {
        let mut ledger = lock(self.ledger);
        self.writes.drain(..).for_each(|write| ledger.succeed(write));
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut ledger = lock(self.ledger);
        self.writes.drain(..).for_each(|write| ledger.fail(write));
    }
}

impl CommitEntry<'_> {
    fn durable(mut self) {
        if let Some(commit) = self.commit.take() {
            lock(self.ledger).end_commit(commit, true);
        }
    }
}

impl Drop for CommitEntry<'_> {
    fn drop(&mut self) {
        if let Some(commit) = self.commit.take() {
            lock(self.ledger).end_commit(commit, false);
        }
    }
}

impl Batch<'_> {
    fn returned(mut self) {
        self.returned = true;
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        // Also if it failed: some of it may have landed.
        let written = self.pin.written.fetch_add(1, Ordering::Release) + 1;
        if !self.returned {
            self.pin.abandoned.fetch_max(written, Ordering::Release);
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if !*self.given_back.get_mut() {
            self.core.give_back(self.grant.pin_id, self.cell.clone());
        }
    }
}

/// Every change of a ledger is a single step.
fn lock(ledger: &Mutex<Ledger>) -> std::sync::MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A transfer gives its buffer back either way.
fn with_buffer(done: Result<(), Error>, buffer: Buffer) -> Result<Buffer, TransferError> {
    match done {
        Ok(()) => Ok(buffer),
        Err(error) => Err(TransferError::new(error, buffer)),
    }
}

/// The bytes of the file from the first to the last that the parts name.
fn hull(parts: &[Part]) -> Range<u64> {
    let start = parts.iter().map(|part| part.offset).min().unwrap_or(0);
    start..parts.iter().map(|part| part.stretch().end).max().unwrap_or(start)
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
