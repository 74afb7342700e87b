//! The lane: a connection that writes and reads, and owns the buffers of what is in flight.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::mem;
use std::ops::Range;
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use smallvec::SmallVec;

use crate::buffer::Buffer;
use crate::completion::{CompletionQueue, CompletionStatus, WorkCompletion};
use crate::error::Error;
use crate::extended::{Chained, Lack};
use crate::pd::ProtectionDomain;
use crate::queue_pair::{Connected, Endpoint, Init, Mtu, Posted, QueuePair, QueuePairBuilder};
use crate::region::{Access, RemoteKey};
use crate::sys::{self, ffi};

/// A range of the peer's memory. Plain data: whether the peer agrees, the completion tells.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct RemoteSlice {
    /// The address of the first byte, as the peer names it.
    pub address: u64,
    /// The key to it.
    pub key: RemoteKey,
    /// The number of bytes.
    pub len: usize,
}

/// A part of an operation: these bytes of the buffer, to or from those of the peer.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Piece {
    /// Bytes of the buffer.
    pub local: Range<usize>,
    /// Bytes of the peer, as many.
    pub remote: RemoteSlice,
}

/// What is done to 8 bytes of the peer as one step (IBTA 9.4.5; for a write annex A19). They are a number
/// in the byte order of the peer's host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Atomic {
    /// Adds to it, and wraps around.
    FetchAdd(u64),
    /// Replaces it, if it is what was expected.
    CompareSwap {
        /// What it must be.
        expected: u64,
        /// What it becomes.
        new: u64,
    },
    /// Replaces it, whatever it is, and brings nothing back (ATOMIC WRITE). The device begins it when all
    /// flushes that were posted before it have ended.
    Write(u64),
}

/// One that brings back what was there.
#[derive(Clone, Copy)]
enum Fetching {
    Add(u64),
    CompareSwap { expected: u64, new: u64 },
}

/// What a work request asks for.
#[derive(Clone, Copy)]
enum Request {
    Write,
    Read,
    Atomic(Fetching),
}

impl Request {
    fn opcode(self) -> ffi::ibv_wr_opcode::Type {
        match self {
            Self::Write => ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            Self::Read => ffi::ibv_wr_opcode::IBV_WR_RDMA_READ,
            Self::Atomic(Fetching::Add(_)) => ffi::ibv_wr_opcode::IBV_WR_ATOMIC_FETCH_AND_ADD,
            Self::Atomic(Fetching::CompareSwap { .. }) => {
                ffi::ibv_wr_opcode::IBV_WR_ATOMIC_CMP_AND_SWP
            }
        }
    }

    fn target(self, remote: &RemoteSlice) -> ffi::wr_t {
        let (remote_addr, rkey) = (remote.address, remote.key.get());
        let (compare_add, swap) = match self {
            Self::Write | Self::Read => {
                return ffi::wr_t { rdma: ffi::rdma_t { remote_addr, rkey } };
            }
            Self::Atomic(Fetching::Add(number)) => (number, 0),
            Self::Atomic(Fetching::CompareSwap { expected, new }) => (expected, new),
        };
        ffi::wr_t { atomic: ffi::atomic_t { remote_addr, compare_add, swap, rkey } }
    }
}

/// What an operation asks for.
struct Ask<'a> {
    what: Request,
    pieces: &'a [Piece],
    /// What is read back behind them.
    probe: Option<RemoteSlice>,
}

impl Ask<'_> {
    fn requests(&self) -> usize {
        self.pieces.len() + usize::from(self.probe.is_some())
    }
}

/// A work request, and the list that it points to.
struct WorkRequest {
    list: ffi::ibv_sge,
    raw: ffi::ibv_send_wr,
}

impl WorkRequest {
    fn empty() -> Self {
        Self { list: sys::zeroed(), raw: sys::zeroed() }
    }

    /// Fills in all but the list and the flags, and returns where it is.
    fn fill(
        &mut self,
        id: u64,
        what: Request,
        remote: &RemoteSlice,
        next: *mut ffi::ibv_send_wr,
    ) -> *mut ffi::ibv_send_wr {
        self.raw.wr_id = id;
        self.raw.sg_list = &raw mut self.list;
        self.raw.num_sge = 1;
        self.raw.opcode = what.opcode();
        self.raw.wr = what.target(remote);
        self.raw.next = next;
        &raw mut self.raw
    }
}

/// Where a buffer is, for the device.
#[derive(Clone, Copy)]
struct Local {
    address: u64,
    local_key: u32,
}

impl Local {
    fn of(buffer: &Buffer) -> Self {
        Self { address: buffer.address(), local_key: buffer.local_key() }
    }

    /// What goes to a range of the peer, or comes from it.
    fn list(self, start: usize, remote: &RemoteSlice) -> ffi::ibv_sge {
        // At most `MESSAGE_BYTES_MAX`, as was checked.
        let length = u32::try_from(remote.len).unwrap_or(u32::MAX);
        ffi::ibv_sge { addr: self.address + start as u64, length, lkey: self.local_key }
    }
}

/// A lane that isn't connected: it has an endpoint to tell the peer, and no way to post.
///
/// ```compile_fail,E0599
/// # use pinfold_verbs::{Buffer, UnconnectedLane};
/// # fn f(lane: UnconnectedLane, buffer: Buffer) {
/// lane.post_write(buffer, &[], ());
/// # }
/// ```
#[derive(Debug)]
pub struct UnconnectedLane {
    queue_pair: QueuePair<Init>,
    completions: CompletionQueue,
    depth: u32,
    probed: Buffer,
}

impl UnconnectedLane {
    /// Creates a lane on which up to `depth` pieces may be in flight (at least 1, and no more than
    /// the device can), with a completion queue of its own.
    ///
    /// # Errors
    ///
    /// Those of [`Buffer::new`], [`CompletionQueue::new`] and [`QueuePairBuilder::build`].
    pub fn new(domain: &ProtectionDomain, depth: u32) -> Result<Self, Error> {
        let device = domain.device();
        let depth = depth.min(device.capabilities().max_qp_wr).max(1);
        let probed = Buffer::new(domain, PROBE_BYTES)?;
        let completions = CompletionQueue::new(device, depth)?;
        let queue_pair = QueuePairBuilder::new(domain)
            .completion_queue(&completions)
            .send_depth(depth)
            .inline_bytes(INLINE_BYTES)
            .extended_requests()
            .remote_access(Access::default())
            .build()?;
        Ok(Self { queue_pair, completions, depth, probed })
    }

    /// What the peer must know to connect to this end.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.queue_pair.endpoint()
    }

    /// Connects to the peer. **It may block for a second**: see [`QueuePair::connect`].
    ///
    /// # Errors
    ///
    /// [`LaneConnectFailed`] with the lane, which may be tried again.
    pub fn connect<T: Send>(
        self,
        peer: &Endpoint,
        path_mtu: Mtu,
    ) -> Result<Lane<T>, LaneConnectFailed> {
        let Self { queue_pair, completions, depth, probed } = self;
        match queue_pair.connect(peer, path_mtu) {
            Ok(queue_pair) => {
                let port = queue_pair.protection_domain().device().port();
                Ok(Lane {
                    inline_bytes: queue_pair.inline_bytes(),
                    queue_pair,
                    completions,
                    table: Mutex::new(Table::new(depth)),
                    depth,
                    probed: Some(probed),
                    max_piece_bytes: port.max_message_bytes.clamp(1, MESSAGE_BYTES_MAX),
                    turn: tokio::sync::Mutex::new(()),
                })
            }
            Err(failed) => Err(LaneConnectFailed {
                lane: Box::new(Self { queue_pair: *failed.queue_pair, completions, depth, probed }),
                error: failed.error,
            }),
        }
    }
}

/// A connect that went wrong, with the lane.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct LaneConnectFailed {
    /// The lane, which may be tried again.
    pub lane: Box<UnconnectedLane>,
    /// Why.
    #[source]
    pub error: Error,
}

impl From<LaneConnectFailed> for Error {
    fn from(failed: LaneConnectFailed) -> Self {
        failed.error
    }
}

/// A connection that writes to and reads from a peer's memory without the peer's processor.
///
/// An operation is a buffer, some pieces and a tag: the caller's note of what it was, often the
/// sender of a oneshot channel. It comes back as a [`Completed`] with buffer and tag when *all* its
/// pieces have ended. The pieces go out in the order of the posts; a READ sees what was written
/// before it on the same lane.
///
/// After the first error everything that is or will be posted comes back as
/// [`Flushed`](CompletionStatus::Flushed): a failed lane never hangs, and never recovers.
///
/// Dropping it destroys the queue pair and then frees the buffers in flight; their tags are dropped.
pub struct Lane<T> {
    queue_pair: QueuePair<Connected>,
    completions: CompletionQueue,
    table: Mutex<Table<Buffer, T>>,
    depth: u32,
    /// Where probes read to: nobody looks at it. Absent only while the lane is dropped.
    probed: Option<Buffer>,
    max_piece_bytes: u32,
    /// Writes up to this length travel with their request.
    inline_bytes: u32,
    /// One task at a time arms the queue and waits for its event.
    turn: tokio::sync::Mutex<()>,
}

/// An operation that has ended.
#[derive(Debug)]
pub struct Completed<T> {
    /// The buffer, the caller's again.
    pub buffer: Buffer,
    /// The caller's note.
    pub tag: T,
    /// How it ended: the first status that wasn't success, if any.
    pub status: CompletionStatus,
    /// Bytes of all its pieces if it succeeded. Else 0, and nothing is known: each piece may have
    /// transferred all, a part or none of its bytes.
    pub bytes: usize,
}

impl<T: Send> Lane<T> {
    /// Starts to copy pieces of the buffer into the peer's memory (RDMA WRITE).
    ///
    /// # Errors
    ///
    /// [`PostError`] with everything in it; nothing was started. [`Error::QueueFull`] when there
    /// are fewer [free slots](Self::free_slots) than pieces; [`Error::NoPieces`],
    /// [`Error::EmptyPiece`], [`Error::PieceOutOfBounds`], [`Error::PieceLengthsDiffer`],
    /// [`Error::PieceTooLong`], [`Error::RemoteOverflow`], [`Error::ForeignBuffer`] for a mistake
    /// of the caller; [`Error::PostSend`] when the device refuses.
    pub fn post_write(&self, buffer: Buffer, pieces: &[Piece], tag: T) -> Result<(), PostError<T>> {
        self.post(buffer, &Ask { what: Request::Write, pieces, probe: None }, tag)
    }

    /// As [`post_write`](Self::post_write), and then reads 1 to 8 bytes back, with the same call; nobody
    /// gets them. When it ends well the peer has all pieces in its memory, where its processors find them:
    /// a write alone is over when the peer's device has it (IBTA 9.7.5.1.1, ordering of READ behind WRITE).
    ///
    /// It takes the room of one piece more.
    ///
    /// # Errors
    ///
    /// Those of [`post_write`](Self::post_write); [`Error::PieceTooLong`] also for a longer probe.
    pub fn post_write_proven(
        &self,
        buffer: Buffer,
        pieces: &[Piece],
        probe: RemoteSlice,
        tag: T,
    ) -> Result<(), PostError<T>> {
        match check_remote(pieces.len(), &probe, PROBE_BYTES as u32) {
            Ok(()) => {
                self.post(buffer, &Ask { what: Request::Write, pieces, probe: Some(probe) }, tag)
            }
            Err(error) => Err(PostError { buffer, tag, error }),
        }
    }

    /// Starts to copy from the peer's memory into pieces of the buffer (RDMA READ).
    ///
    /// # Errors
    ///
    /// Those of [`post_write`](Self::post_write).
    pub fn post_read(&self, buffer: Buffer, pieces: &[Piece], tag: T) -> Result<(), PostError<T>> {
        self.post(buffer, &Ask { what: Request::Read, pieces, probe: None }, tag)
    }

    /// Starts an atomic on 8 bytes of the peer. What they were before comes into the buffer's first 8
    /// bytes; but for [`Atomic::Write`], where the buffer has no part in it.
    ///
    /// # Errors
    ///
    /// Those of [`post_write`](Self::post_write); [`Error::NoAtomics`], for a write
    /// [`Error::NoAtomicWrite`]; [`Error::MisalignedAtomic`]; [`Error::PieceLengthsDiffer`] where `remote` is not 8 bytes long.
    pub fn post_atomic(
        &self,
        buffer: Buffer,
        remote: RemoteSlice,
        atomic: Atomic,
        tag: T,
    ) -> Result<(), PostError<T>> {
        if let Err(error) = check_atomic(&remote) {
            return Err(PostError { buffer, tag, error });
        }
        let what = match atomic {
            Atomic::FetchAdd(number) => Fetching::Add(number),
            Atomic::CompareSwap { expected, new } => Fetching::CompareSwap { expected, new },
            Atomic::Write(number) => {
                let write = Chained::AtomicWrite(remote, number.to_ne_bytes());
                return self.post_extended(buffer, &[], [write].into_iter(), tag);
            }
        };
        let device = self.queue_pair.protection_domain().device();
        if !device.capabilities().atomics {
            let error = Error::NoAtomics { device: device.device_name() };
            return Err(PostError { buffer, tag, error });
        }
        let pieces = &[Piece { local: 0..ATOMIC_BYTES, remote }];
        self.post(buffer, &Ask { what: Request::Atomic(what), pieces, probe: None }, tag)
    }

    /// Why [`Atomic::Write`] is not for this lane, if so.
    #[must_use]
    pub fn no_atomic_write_because(&self) -> Option<Lack> {
        self.queue_pair.no_atomic_write_because()
    }

    /// Waits for an operation to end. Waits for ever when none is in flight: whoever posts, wakes
    /// it. Several tasks may wait, and each operation goes to one of them. Dropping the future
    /// loses nothing.
    ///
    /// It stays with the tokio runtime in which it is first called.
    ///
    /// # Errors
    ///
    /// [`Error::NoRuntime`]; [`Error::PollCompletionQueue`], [`Error::ArmCompletionQueue`] or
    /// [`Error::AwaitCompletion`], after which the lane is of no use.
    pub async fn next_completion(&self) -> Result<Completed<T>, Error> {
        let _turn = self.turn.lock().await;
        poll_fn(|context| self.poll_completion(context)).await
    }

    /// As [`next_completion`](Self::next_completion), for who writes futures. Of several tasks that
    /// poll, the last one is woken.
    ///
    /// # Errors
    ///
    /// Those of [`next_completion`](Self::next_completion).
    pub fn poll_completion(&self, context: &mut Context<'_>) -> Poll<Result<Completed<T>, Error>> {
        loop {
            if let Some(done) = self.take()? {
                return Poll::Ready(Ok(done));
            }
            // What came in between the last look and the arming gives no event.
            if self.completions.arm()?
                && let Some(done) = self.take()?
            {
                return Poll::Ready(Ok(done));
            }
            // What comes in from here on gives one, even when a `poll` elsewhere takes it first.
            ready!(self.completions.poll_event(context))?;
        }
    }

    /// Takes an operation that has ended, without waiting.
    ///
    /// # Errors
    ///
    /// [`Error::PollCompletionQueue`], after which the lane is of no use.
    pub fn poll(&self) -> Result<Option<Completed<T>>, Error> {
        self.take()
    }

    /// Gives up on everything that is in flight: it comes back soon, mostly as
    /// [`Flushed`](CompletionStatus::Flushed), and so does what is posted later.
    ///
    /// # Errors
    ///
    /// [`Error::ModifyQueuePair`].
    pub fn abort(&self) -> Result<(), Error> {
        self.queue_pair.fail()
    }

    /// Pieces that may be in flight at a time.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth as usize
    }

    /// Pieces that may be posted now.
    #[must_use]
    pub fn free_slots(&self) -> usize {
        self.table().free_requests as usize
    }

    /// The longest piece, in bytes.
    #[must_use]
    pub fn max_piece_bytes(&self) -> usize {
        self.max_piece_bytes as usize
    }

    /// This end.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.queue_pair.endpoint()
    }

    /// The connection under it: its peer, path MTU and state.
    #[must_use]
    pub fn queue_pair(&self) -> &QueuePair<Connected> {
        &self.queue_pair
    }

    fn post(&self, buffer: Buffer, ask: &Ask<'_>, tag: T) -> Result<(), PostError<T>> {
        if let Err(error) = self.check(&buffer, ask.pieces) {
            return Err(PostError { buffer, tag, error });
        }
        // Most operations are of one piece: then nothing is allocated.
        let empty = WorkRequest::empty;
        match ask.requests() {
            1 => self.send(buffer, ask, tag, &mut [empty()]),
            2 => self.send(buffer, ask, tag, &mut [empty(), empty()]),
            more => {
                let mut requests: Vec<_> = (0..more).map(|_| empty()).collect();
                self.send(buffer, ask, tag, &mut requests)
            }
        }
    }

    /// Whether these pieces can be sent from this buffer, or come into it.
    pub(crate) fn check(&self, buffer: &Buffer, pieces: &[Piece]) -> Result<(), Error> {
        if !self.queue_pair.protection_domain().is_same(buffer.protection_domain()) {
            return Err(Error::ForeignBuffer);
        }
        check_pieces(pieces, buffer.len(), self.max_piece_bytes)
    }

    /// Fills in a request for each piece, and one for the probe, and posts them with one call.
    fn send(
        &self,
        buffer: Buffer,
        ask: &Ask<'_>,
        tag: T,
        requests: &mut [WorkRequest],
    ) -> Result<(), PostError<T>> {
        let Ask { what, pieces, probe } = *ask;
        let ours = Local::of(&buffer);

        // Held across the post, so that no completion is looked at before its operation is known.
        let mut table = self.table();
        let bytes = pieces.iter().map(|piece| piece.remote.len).sum();
        let slot = table.insert(buffer, tag, requests.len(), bytes, self.depth)?;
        let mut next: *mut ffi::ibv_send_wr = ptr::null_mut();
        let (of_pieces, of_probe) = requests.split_at_mut(pieces.len());
        if let (Some(remote), Some(into), [request]) = (probe, &self.probed, of_probe) {
            request.list = Local::of(into).list(0, &remote);
            request.raw.send_flags = self.send_flags(Request::Read, request.list.length, true);
            next = request.fill(request_id(slot, pieces.len()), Request::Read, &remote, next);
        }
        for (index, (piece, request)) in pieces.iter().zip(of_pieces).enumerate().rev() {
            request.list = ours.list(piece.local.start, &piece.remote);
            request.raw.send_flags = self.send_flags(what, request.list.length, next.is_null());
            next = request.fill(request_id(slot, index), what, &piece.remote, next);
        }

        // SAFETY: `next` is the first of the requests, which are linked to each other and to their
        // lists, and outlive the call. The buffer is registered, as long as the pieces say, and
        // in the table: it leaves only when the last of its requests has completed, and with it all,
        // or after the queue pair is destroyed (`Drop`). So does what the probe reads into.
        match unsafe { self.queue_pair.post(next) } {
            Posted::All => Ok(()),
            Posted::UpTo { refused, error } => {
                let accepted = requests.iter().position(|it| ptr::eq(&raw const it.raw, refused));
                if accepted == Some(0) {
                    let (buffer, tag) = table.remove(slot);
                    return Err(PostError { buffer, tag, error });
                }
                // Some pieces are with the device, or (without a word from it) all may be. They
                // come back once the queue pair has failed, and the operation with them.
                let accepted = accepted.unwrap_or(requests.len());
                tracing::warn!(%error, accepted, "an operation was posted in part only");
                self.give_up(table, slot, accepted);
                Ok(())
            }
        }
    }

    /// Only the last request of an operation tells of its end: when it has ended, so have those before
    /// it. One that fails tells of that in any case (IBTA 10.7.3.1, 11.4.1.1).
    fn send_flags(&self, what: Request, len: u32, last: bool) -> u32 {
        let mut flags = ffi::ibv_send_flags(0);
        if last {
            flags |= ffi::ibv_send_flags::IBV_SEND_SIGNALED;
        }
        if matches!(what, Request::Write) && len <= self.inline_bytes {
            flags |= ffi::ibv_send_flags::IBV_SEND_INLINE;
        }
        flags.0
    }

    /// Has what was posted of an operation come back, and the operation with it.
    fn give_up(&self, mut table: MutexGuard<'_, Table<Buffer, T>>, slot: u32, accepted: usize) {
        table.give_up(slot, accepted);
        drop(table);
        self.mark_the_end(slot, accepted);
    }

    /// Fails the queue pair, and posts something behind a part of an operation: when that comes back, so
    /// has all before it. It carries no byte.
    fn mark_the_end(&self, slot: u32, index: usize) {
        if let Err(error) = self.queue_pair.fail() {
            tracing::error!(%error, "cannot fail the queue pair either");
        }
        let mut mark: ffi::ibv_send_wr = sys::zeroed();
        mark.wr_id = request_id(slot, index);
        mark.opcode = ffi::ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        mark.send_flags = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
        // SAFETY: one request without memory, which outlives the call.
        if let Posted::UpTo { error, .. } = unsafe { self.queue_pair.post(&raw mut mark) } {
            tracing::error!(%error, "an operation comes back only with the end of the lane");
        }
    }

    /// Posts writes of the pieces, if there are any, and behind them what else is to be done, with one call.
    pub(crate) fn post_extended(
        &self,
        buffer: Buffer,
        pieces: &[Piece],
        behind: impl ExactSizeIterator<Item = Chained>,
        tag: T,
    ) -> Result<(), PostError<T>> {
        let (ours, requests) = (Local::of(&buffer), pieces.len() + behind.len());

        // Held across the post, so that no completion is looked at before its operation is known.
        let mut table = self.table();
        let bytes = pieces.iter().map(|piece| piece.remote.len).sum();
        let slot = table.insert(buffer, tag, requests, bytes, self.depth)?;
        let writes = pieces.iter().map(|Piece { local, remote }| {
            let list = ours.list(local.start, remote);
            Chained::Write { list, remote: *remote }
        });
        // Most chains are a write and one thing behind it: then nothing is allocated.
        let chain: SmallVec<[_; 2]> = writes.chain(behind).collect();
        // SAFETY: the buffer is registered, as long as the pieces say, and in the table: it leaves only when
        // the last of the requests has completed, and with it all, or after the queue pair is destroyed
        // (`Drop`).
        let posted = unsafe { self.queue_pair.post_chain(&chain, |index| request_id(slot, index)) };
        let Err(error) = posted else { return Ok(()) };
        let never_began = matches!(error, Error::NoFlush { .. } | Error::NoAtomicWrite { .. });
        if pieces.is_empty() || never_began {
            // The device knows nothing of the buffer.
            let (buffer, tag) = table.remove(slot);
            return Err(PostError { buffer, tag, error });
        }
        tracing::warn!(%error, "an operation may have been posted in part");
        self.give_up(table, slot, requests);
        Ok(())
    }

    fn take(&self) -> Result<Option<Completed<T>>, Error> {
        let mut table = self.table();
        if table.done.is_empty() {
            self.completions.drain(|completion| table.settle(completion))?;
        }
        Ok(table.done.pop_front().map(|operation| Completed {
            buffer: operation.buffer,
            tag: operation.tag,
            status: operation.status,
            bytes: operation.bytes,
        }))
    }
}

impl<T> Lane<T> {
    fn table(&self) -> MutexGuard<'_, Table<Buffer, T>> {
        // Nothing panics while it is held, and if it did, the buffers must stay where they are.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Drop for Lane<T> {
    /// The order matters: queue pair, then buffers in flight; the fields follow (completion queue,
    /// channel, what probes read into, protection domain).
    fn drop(&mut self) {
        if self.queue_pair.release().is_err() {
            // The device may still read and write them, so they stay for good; whoever waits for
            // them is told by the end of the tag. Dropping the queue pair says it in the log.
            self.table().slots.drain(..).flatten().for_each(|operation| {
                mem::forget(operation.buffer);
            });
            mem::forget(self.probed.take());
        }
    }
}

impl<T> fmt::Debug for Lane<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane")
            .field("queue_pair", &self.queue_pair)
            .field("depth", &self.depth)
            .field("free", &self.table().free_requests)
            .finish_non_exhaustive()
    }
}

/// An operation that wasn't started, with all that the caller gave.
pub struct PostError<T> {
    /// The buffer.
    pub buffer: Buffer,
    /// The caller's note.
    pub tag: T,
    /// Why.
    pub error: Error,
}

impl<T> From<PostError<T>> for Error {
    fn from(refused: PostError<T>) -> Self {
        refused.error
    }
}

impl<T> fmt::Display for PostError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<T> fmt::Debug for PostError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostError").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<T> std::error::Error for PostError<T> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&self.error)
    }
}

/// The longest message of the protocol: 2 GiB (IBTA 9.7.2).
const MESSAGE_BYTES_MAX: u32 = 1 << 31;

/// What an atomic works on.
pub const ATOMIC_BYTES: usize = 8;

/// The longest probe of [`Lane::post_write_proven`]: it has no use for more.
pub const PROBE_BYTES: usize = 8;

/// Writes so short are copied into the request, so that the device needs not fetch them: a cache line.
const INLINE_BYTES: u32 = 64;

/// The number of a work request: its operation's slot, and its place in the operation.
fn request_id(slot: u32, index: usize) -> u64 {
    // An operation has no more requests than a queue pair has room for.
    u64::from(slot) << 32 | index as u64
}

fn check_pieces(pieces: &[Piece], len: usize, limit: u32) -> Result<(), Error> {
    if pieces.is_empty() {
        return Err(Error::NoPieces);
    }
    for (piece, Piece { local, remote }) in pieces.iter().enumerate() {
        let (start, end) = (local.start, local.end);
        if start > end || end > len {
            return Err(Error::PieceOutOfBounds { piece, start, end, len });
        }
        let bytes = end - start;
        if bytes != remote.len {
            return Err(Error::PieceLengthsDiffer { piece, local: bytes, remote: remote.len });
        }
        check_remote(piece, remote, limit)?;
    }
    Ok(())
}

fn check_atomic(remote: &RemoteSlice) -> Result<(), Error> {
    let (address, len) = (remote.address, remote.len);
    if len != ATOMIC_BYTES {
        return Err(Error::PieceLengthsDiffer { piece: 0, local: ATOMIC_BYTES, remote: len });
    }
    if !address.is_multiple_of(ATOMIC_BYTES as u64) {
        return Err(Error::MisalignedAtomic { address });
    }
    Ok(())
}

/// What holds for every range of the peer: it has bytes, no more than one request may have, and all of
/// them have addresses.
pub(crate) fn check_remote(piece: usize, remote: &RemoteSlice, limit: u32) -> Result<(), Error> {
    let len = remote.len;
    if len == 0 {
        return Err(Error::EmptyPiece { piece });
    }
    if len > limit as usize {
        return Err(Error::PieceTooLong { piece, len, limit });
    }
    if remote.address.checked_add(len as u64).is_none() {
        return Err(Error::RemoteOverflow { piece });
    }
    Ok(())
}

/// What is in flight. Pure: it knows nothing of the device.
struct Table<B, T> {
    slots: Vec<Option<Operation<B, T>>>,
    free_slots: Vec<u32>,
    free_requests: u32,
    done: VecDeque<Operation<B, T>>,
}

struct Operation<B, T> {
    buffer: B,
    tag: T,
    status: CompletionStatus,
    bytes: usize,
    /// Work requests that it takes room for.
    requests: u32,
    /// Which of them is the last: with it all have ended.
    last: u32,
}

impl<B, T> Table<B, T> {
    fn new(depth: u32) -> Self {
        Self {
            slots: (0..depth).map(|_| None).collect(),
            free_slots: (0..depth).rev().collect(),
            free_requests: depth,
            done: VecDeque::new(),
        }
    }

    /// Enters an operation of that many work requests and bytes, and says in which slot; or none, when
    /// there is no room, with what was given.
    fn reserve(&mut self, buffer: B, tag: T, requests: usize, bytes: usize) -> Result<u32, (B, T)> {
        let requests = match u32::try_from(requests) {
            Ok(requests) if (1..=self.free_requests).contains(&requests) => requests,
            _ => return Err((buffer, tag)),
        };
        // An operation has at least one request, so there are never fewer slots than requests.
        let Some(slot) = self.free_slots.pop() else { return Err((buffer, tag)) };
        self.free_requests -= requests;
        let (status, last) = (CompletionStatus::Success, requests - 1);
        self.slots[slot as usize] = Some(Operation { buffer, tag, status, bytes, requests, last });
        Ok(slot)
    }

    /// Takes back an operation of which nothing was posted.
    fn withdraw(&mut self, slot: u32) -> Option<(B, T)> {
        let operation = self.vacate(slot)?;
        Some((operation.buffer, operation.tag))
    }

    fn vacate(&mut self, slot: u32) -> Option<Operation<B, T>> {
        let operation = self.slots.get_mut(slot as usize)?.take()?;
        self.free_slots.push(slot);
        self.free_requests += operation.requests;
        Some(operation)
    }

    /// Notes that of an operation only so many requests were posted, and that a mark is posted behind
    /// them, in the room of one that was not.
    fn give_up(&mut self, slot: u32, accepted: usize) {
        if let Some(Some(operation)) = self.slots.get_mut(slot as usize) {
            operation.status = CompletionStatus::NotPosted;
            operation.last = u32::try_from(accepted).unwrap_or(u32::MAX);
        }
    }

    /// Takes in the end of a work request.
    fn settle(&mut self, completion: WorkCompletion) {
        let slot = (completion.id >> 32) as u32;
        let index = (completion.id & u64::from(u32::MAX)) as u32;
        let Some(Some(operation)) = self.slots.get_mut(slot as usize) else {
            tracing::error!(id = completion.id, "a completion without an operation");
            return;
        };
        if !completion.status.is_success() && operation.status.is_success() {
            operation.status = completion.status;
        }
        if index < operation.last {
            return;
        }
        if !operation.status.is_success() {
            operation.bytes = 0;
        }
        let ended = self.vacate(slot);
        self.done.extend(ended);
    }
}

impl<T> Table<Buffer, T> {
    fn insert(
        &mut self,
        buffer: Buffer,
        tag: T,
        pieces: usize,
        bytes: usize,
        depth: u32,
    ) -> Result<u32, PostError<T>> {
        let free = self.free_requests;
        self.reserve(buffer, tag, pieces, bytes).map_err(|(buffer, tag)| PostError {
            buffer,
            tag,
            error: Error::QueueFull { pieces, free, depth },
        })
    }

    fn remove(&mut self, slot: u32) -> (Buffer, T) {
        self.withdraw(slot).expect("the slot was filled under the same lock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(local: Range<usize>, len: usize) -> Piece {
        Piece { local, remote: RemoteSlice { address: 4096, key: RemoteKey::new(1), len } }
    }

    fn end(slot: u32, index: usize, status: CompletionStatus) -> WorkCompletion {
        WorkCompletion { id: request_id(slot, index), status, vendor_error: 0 }
    }

    #[test]
    fn a_lane_may_go_to_any_thread() {
        fn check<T: Send + Sync>() {}
        check::<Lane<std::cell::Cell<u8>>>();
        check::<UnconnectedLane>();
        check::<QueuePair<Connected>>();
        check::<Buffer>();
    }

    #[test]
    fn pieces_are_checked() {
        let good = [piece(0..100, 100), piece(4095..4096, 1)];
        check_pieces(&good, 4096, 1 << 20).unwrap();
        let refused = |pieces: &[Piece]| check_pieces(pieces, 4096, 1000).unwrap_err();
        assert!(matches!(refused(&[]), Error::NoPieces));
        assert!(matches!(
            refused(&[piece(0..1, 1), piece(8..8, 0)]),
            Error::EmptyPiece { piece: 1 }
        ));
        assert!(matches!(refused(&[piece(4000..4097, 97)]), Error::PieceOutOfBounds { .. }));
        let backwards = Range { start: 9, end: 8 };
        assert!(matches!(refused(&[piece(backwards, 1)]), Error::PieceOutOfBounds { .. }));
        assert!(matches!(refused(&[piece(0..8, 9)]), Error::PieceLengthsDiffer { .. }));
        assert!(matches!(refused(&[piece(0..1001, 1001)]), Error::PieceTooLong { .. }));
        let mut wrapping = piece(0..8, 8);
        wrapping.remote.address = u64::MAX - 7;
        assert!(matches!(refused(&[wrapping]), Error::RemoteOverflow { piece: 0 }));
    }

    #[test]
    fn an_operation_ends_with_its_last_request() {
        let mut table = Table::new(4);
        let slot = table.reserve("buffer", "tag", 3, 60).unwrap();
        assert_eq!(table.free_requests, 1);
        table.settle(end(slot, 2, CompletionStatus::Success));
        let done = table.done.pop_front().unwrap();
        assert_eq!((done.buffer, done.tag, done.bytes), ("buffer", "tag", 60));
        assert!(done.status.is_success());
        assert_eq!(table.free_requests, 4);
        assert_eq!(table.free_slots.len(), 4);
    }

    #[test]
    fn the_first_bad_status_wins_and_ends_nothing_before_the_last_request() {
        let mut table = Table::new(4);
        let slot = table.reserve((), (), 3, 60).unwrap();
        table.settle(end(slot, 1, CompletionStatus::RemoteAccess));
        assert!(table.done.is_empty(), "the device may still look at the third");
        table.settle(end(slot, 2, CompletionStatus::Flushed));
        let done = table.done.pop_front().unwrap();
        assert_eq!((done.status, done.bytes), (CompletionStatus::RemoteAccess, 0));
    }

    #[test]
    fn a_full_table_gives_everything_back() {
        let mut table = Table::new(2);
        let first = table.reserve("a", 1, 1, 8).unwrap();
        assert_eq!(table.reserve("b", 2, 2, 8), Err(("b", 2)));
        let second = table.reserve("b", 2, 1, 8).unwrap();
        assert_ne!(first, second);
        assert_eq!(table.reserve("c", 3, 1, 8), Err(("c", 3)));
        table.settle(end(first, 0, CompletionStatus::Success));
        table.reserve("c", 3, 1, 8).unwrap();
    }

    #[test]
    fn what_was_not_posted_is_withdrawn() {
        let mut table = Table::new(2);
        let slot = table.reserve("a", 1, 2, 8).unwrap();
        assert_eq!(table.withdraw(slot), Some(("a", 1)));
        assert_eq!(table.free_requests, 2);
        assert_eq!(table.free_slots.len(), 2);
    }

    #[test]
    fn a_partial_post_ends_with_the_mark_behind_what_was_accepted() {
        let mut table = Table::new(3);
        let slot = table.reserve("a", 1, 3, 24).unwrap();
        table.give_up(slot, 2);
        // What was accepted may have ended well before the queue pair failed, and tells nothing.
        table.settle(end(slot, 1, CompletionStatus::Flushed));
        assert!(table.done.is_empty());
        table.settle(end(slot, 2, CompletionStatus::Flushed));
        let done = table.done.pop_front().unwrap();
        assert_eq!((done.status, done.bytes), (CompletionStatus::NotPosted, 0));
        assert_eq!(table.free_requests, 3);
    }

    #[test]
    fn a_stray_completion_changes_nothing() {
        let mut table: Table<(), ()> = Table::new(1);
        table.settle(end(0, 0, CompletionStatus::Success));
        table.settle(end(77, 0, CompletionStatus::Success));
        assert_eq!(table.free_requests, 1);
        assert!(table.done.is_empty());
    }

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask vm run"]
    fn buffers_stay_when_the_queue_pair_can_not_be_destroyed() {
        let device = crate::Device::open_first().unwrap();
        let domain = ProtectionDomain::new(&device).unwrap();
        let lane = UnconnectedLane::new(&domain, 1).unwrap();
        let responder = QueuePairBuilder::new(&domain).build().unwrap();
        let (to_lane, to_responder) = (lane.endpoint(), responder.endpoint());
        let responder = responder.connect(&to_lane, Mtu::Mtu1024).unwrap();
        let lane = lane.connect(&to_responder, Mtu::Mtu1024).unwrap();
        // Nobody answers, so the operation stays in flight.
        responder.destroy().unwrap();
        lane.queue_pair.lose_handle();
        let buffer = Buffer::new(&domain, 4096).unwrap();
        let address = buffer.address();
        let tag = std::sync::Arc::new(());
        let key = RemoteKey::new(1);
        let piece = Piece { local: 0..8, remote: RemoteSlice { address: 4096, key, len: 8 } };
        lane.post_write(buffer, &[piece], std::sync::Arc::clone(&tag)).unwrap();

        drop(lane);
        assert_eq!(std::sync::Arc::strong_count(&tag), 1, "who waits is told");
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter_map(|line| line.split_once(' ')?.0.split_once('-')).any(
            |(start, end)| {
                let number = |text| u64::from_str_radix(text, 16).unwrap();
                (number(start)..number(end)).contains(&address)
            },
        );
        assert!(mapped, "the device may still read it");
    }
}
