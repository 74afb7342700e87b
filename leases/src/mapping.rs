//! A mapped file, the shares of it that hardware holds, and the fence over it.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::mman::{MapFlags, MmapAdvise};

use crate::description::Description;
use crate::error::{Error, Result};
use crate::sys;
use crate::watch::GuardId;

/// Mappings start on and fill a multiple of this, so that the file system can use huge pages.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// A mapping is fenced in pieces of so many bytes, each of which holds the process's memory lock for as
/// long as devices walk its pages. Larger only where there would be more than [`PIECES_MAX`].
const PIECE: usize = 2 << 30;
/// Each piece is a map area, of which a process has some 65,000 (`vm.max_map_count`).
const PIECES_MAX: usize = 1024;

/// A file mapped shared, for reading and writing, from its first byte on. Made by
/// [`Armed::map`](crate::Armed::map), and unmapped when it and every share of it are gone.
///
/// There are no references to the bytes: others write them, and a page past the file's end would
/// raise SIGBUS. [`read_at`](Self::read_at) and [`write_at`](Self::write_at) copy, for devices, which
/// have no read(2) and write(2).
#[derive(Debug)]
pub struct Mapping {
    inner: Arc<Inner>,
    guard: GuardId,
}

#[derive(Debug)]
struct Inner {
    address: NonNull<u8>,
    len: usize,
    map_sync: bool,
    /// Of a device: what it flushes by.
    view: Option<View>,
    /// The mapping keeps the kernel's description open; this keeps ours with it, so that the file
    /// can be guarded again while an old mapping lives. Dropped after the unmapping.
    description: Description,
    fenced: AtomicBool,
    shares: AtomicUsize,
    pinned_shares: AtomicUsize,
    #[cfg(feature = "mutants")]
    unmapped: AtomicBool,
}

// SAFETY: the pointer is to memory that only system calls and hardware reach, never a reference.
unsafe impl Send for Inner {}
// SAFETY: as above; what changes is atomic.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        #[cfg(feature = "mutants")]
        if self.unmapped.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the mapping is ours, and its last holder is being dropped: every share was given
        // back, so no hardware uses it either.
        unsafe { unmap_or_leave(self.address, self.len, Some(&self.description)) };
    }
}

/// Proof that nothing reaches the file through the mapping any more: what
/// [`Guard::release`](crate::Guard::release) asks for.
#[derive(Debug)]
#[must_use = "the guard is released with it"]
pub struct Fenced {
    pub(crate) guard: GuardId,
}

/// Why a fence is not complete.
#[derive(Debug, thiserror::Error)]
pub enum FenceFailed {
    /// Hardware has pinned pages, which a page table can't take back: the fence is complete once
    /// every pinned region has been deregistered. Nothing new can be registered meanwhile.
    #[error("{shares} pinned regions still reach the file; deregister them, then fence again")]
    PinnedShares {
        /// How many are out.
        shares: usize,
    },
    /// Somebody has a share of the mapping: who wants to do without the fence returns them all.
    #[error("{shares} regions have a share of the mapping; deregister them, then ask again")]
    Shares {
        /// How many are out.
        shares: usize,
    },
    /// The kernel refused. Deregistering every region is a fence too.
    #[error("mprotect failed")]
    Kernel {
        /// Its word.
        source: std::io::Error,
    },
}

impl Mapping {
    /// Maps at least `len` bytes of the file, with `MAP_SYNC` where the file system can.
    pub(crate) fn new(description: &Description, guard: GuardId, len: u64) -> Result<Self> {
        let wanted =
            usize::try_from(len).ok().and_then(|len| len.checked_next_multiple_of(HUGE_PAGE));
        let len = wanted.and_then(NonZeroUsize::new).ok_or_else(|| {
            let source = std::io::Error::from_raw_os_error(libc::EINVAL);
            memory(description, "mmap", wanted.unwrap_or(usize::MAX), source)
        })?;
        let failed = |call| move |source| memory(description, call, len.get(), source);
        let not_mapped = |source: std::io::Error| match source.raw_os_error() {
            // A device without a driver.
            Some(libc::ENXIO) => {
                let path = description.path().to_owned();
                Error::MediumLost { path, start: 0, end: len.get() as u64, source }
            }
            _ => failed("mmap")(source),
        };
        let view = View::of(description).map_err(not_mapped)?;
        let (address, map_sync) = map_file(len, description).map_err(not_mapped)?;
        let inner = Inner {
            address,
            len: len.get(),
            map_sync,
            view,
            description: description.clone(),
            fenced: AtomicBool::new(false),
            shares: AtomicUsize::new(0),
            pinned_shares: AtomicUsize::new(0),
            #[cfg(feature = "mutants")]
            unmapped: AtomicBool::new(false),
        };
        inner.cut_into_pieces().map_err(failed("madvise(MADV_SEQUENTIAL)"))?;
        // A child that inherited the mapping would keep the guard alive after this process.
        inner.advise(MmapAdvise::MADV_DONTFORK).map_err(failed("madvise(MADV_DONTFORK)"))?;
        inner.advise(MmapAdvise::MADV_DONTDUMP).map_err(failed("madvise(MADV_DONTDUMP)"))?;
        Ok(Self { inner: Arc::new(inner), guard })
    }

    /// Length in bytes: a multiple of 2 MiB, so it reaches past the file's end.
    #[allow(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.inner.len
    }

    /// In how many pieces it is fenced.
    pub fn pieces(&self) -> usize {
        self.inner.pieces().count()
    }

    /// Bytes of each piece but the last. A region should lie in one, and they start at multiples of it.
    pub fn piece_len(&self) -> usize {
        self.inner.piece_len()
    }

    /// Whether the mapping took `MAP_SYNC`: the file's metadata is durable before a page of it can
    /// be written (mmap(2)). Only then is flushing data alone enough.
    pub fn map_sync(&self) -> bool {
        self.inner.map_sync
    }

    /// A share for hardware that follows this process's page tables (RDMA on-demand paging): a
    /// fence cuts it off at once.
    pub fn share(&self) -> Result<Share> {
        self.inner.shares.fetch_add(1, Ordering::SeqCst);
        // Counted first, looked second: either the fence sees the share or the share sees the fence.
        let share = Share { inner: Arc::clone(&self.inner) };
        self.demand_open()?;
        Ok(share)
    }

    /// A share for hardware that pins pages: only its return is a fence.
    pub fn pinned_share(&self) -> Result<PinnedShare> {
        self.inner.pinned_shares.fetch_add(1, Ordering::SeqCst);
        let share = PinnedShare { inner: Arc::clone(&self.inner) };
        self.demand_open()?;
        Ok(share)
    }

    fn demand_open(&self) -> Result<()> {
        if self.inner.fenced.load(Ordering::SeqCst) { Err(Error::AlreadyFenced) } else { Ok(()) }
    }

    /// Makes the pages of `range` present and writable, so that hardware need not fault on them,
    /// in pieces of 2 MiB: a piece holds the process's `mmap_lock`, which the fence needs too.
    /// Stops with [`Error::Broken`] when `go_on` says no. The range must end within the file.
    pub fn populate(&self, range: Range<u64>, mut go_on: impl FnMut() -> bool) -> Result<()> {
        let range = self.checked(range)?;
        let mut at = range.start;
        while at < range.end {
            if !go_on() {
                return Err(Error::Broken);
            }
            let end = range.end.min((at + 1).next_multiple_of(HUGE_PAGE));
            self.populate_piece(at..end)?;
            at = end;
        }
        Ok(())
    }

    fn populate_piece(&self, piece: Range<usize>) -> Result<()> {
        let piece = self.whole_pages(piece);
        // SAFETY: the range lies inside our own mapping (`checked`), and populating discards nothing.
        unsafe { sys::advise(self.at(piece.start), piece.len(), MmapAdvise::MADV_POPULATE_WRITE) }
            .map_err(|e| self.inner.failed("madvise(MADV_POPULATE_WRITE)", &piece, e))
    }

    /// As [`Description::drop_cached`], also of pages that hardware has mapped by following page tables:
    /// it faults on them again (madvise(2), `MADV_DONTNEED`, which discards nothing of a shared mapping).
    pub fn drop_cached(&self, range: Range<u64>) -> Result<()> {
        let range = self.checked(range)?;
        let pages = range.start - range.start % HUGE_PAGE
            ..range.end.next_multiple_of(HUGE_PAGE).min(self.inner.len);
        // SAFETY: the range lies inside our own mapping, which is shared: its pages stay with the file.
        unsafe { sys::advise(self.at(pages.start), pages.len(), MmapAdvise::MADV_DONTNEED) }
            .map_err(|e| self.inner.failed("madvise(MADV_DONTNEED)", &pages, e))?;
        self.inner.description.drop_cached(range.start as u64..range.end as u64)
    }

    /// Fills `to` with the bytes from `offset` on. Fails with [`Error::AlreadyFenced`] after a fence,
    /// and with [`Error::MediumLost`] where there is nothing to be read: never with a signal.
    pub fn read_at(&self, to: &mut [u8], offset: u64) -> Result<()> {
        let range = self.checked(offset..offset.saturating_add(to.len() as u64))?;
        let mut done = 0;
        while done < to.len() {
            let from = self.at(range.start + done);
            // SAFETY: `checked`: the range is our own mapping; `to` is somebody's memory.
            let copied = unsafe { sys::copy_out(from, &mut to[done..]) };
            done += self.copied(copied, range.start + done..range.end)?;
        }
        Ok(())
    }

    /// Writes `from` to the bytes from `offset` on, as [`read_at`](Self::read_at) reads. They are in
    /// the CPU's caches then: durable is what [`flush`](Self::flush) has written back.
    pub fn write_at(&self, from: &[u8], offset: u64) -> Result<()> {
        let range = self.checked(offset..offset.saturating_add(from.len() as u64))?;
        let mut done = 0;
        while done < from.len() {
            let to = self.at(range.start + done);
            // SAFETY: `checked`: the range is our own mapping, and there are no references into it.
            let copied = unsafe { sys::copy_in(to, &from[done..]) };
            done += self.copied(copied, range.start + done..range.end)?;
        }
        Ok(())
    }

    fn copied(&self, copied: std::io::Result<usize>, rest: Range<usize>) -> Result<usize> {
        match copied {
            Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                self.demand_open()?;
                Err(self.inner.lost(rest, e))
            }
            Err(e) => Err(self.inner.failed("process_vm_readv", &rest, e)),
            Ok(done) => Ok(done),
        }
    }

    /// Writes what was stored in `range`, by hardware too, back to the medium (msync(2) with
    /// `MS_SYNC`; a device's caches by hand). Works after the fence as well.
    pub fn flush(&self, range: Range<u64>) -> Result<()> {
        self.share_for_flush().flush(range)
    }

    /// What a flush needs, to be carried to another thread: it keeps the memory mapped meanwhile.
    pub fn share_for_flush(&self) -> Flusher {
        Flusher { inner: Arc::clone(&self.inner) }
    }

    /// The fence: from the moment this returns `Ok`, nothing reaches the file through the mapping
    /// (mprotect(2) with `PROT_NONE`, a barrier for everything that follows page tables: the MMU
    /// notifier waits for the device). A fenced mapping is never made accessible again. Any thread
    /// may call it, and again. If the kernel refuses, the fence is complete when every share has
    /// been returned.
    pub fn fence(&self) -> Result<Fenced, FenceFailed> {
        self.fence_by_pieces(|| ())
    }

    /// As [`fence`](Self::fence), and tells whenever another piece has been cut off: a fence that tells of
    /// none hangs, and one that does is merely slow. After a piece that the kernel refuses the others are
    /// cut off all the same.
    pub fn fence_by_pieces(&self, piece_done: impl FnMut()) -> Result<Fenced, FenceFailed> {
        self.inner.fenced.store(true, Ordering::SeqCst);
        let cut = self.cut(piece_done);
        let pinned = self.inner.pinned_shares.load(Ordering::SeqCst);
        let following = self.inner.shares.load(Ordering::SeqCst);
        match cut {
            _ if pinned > 0 => Err(FenceFailed::PinnedShares { shares: pinned }),
            Err(source) if following > 0 => Err(FenceFailed::Kernel { source }),
            _ => Ok(Fenced { guard: self.guard }),
        }
    }

    /// The fence without a system call, for when [`fence`](Self::fence) hangs: mprotect(2) wants the
    /// process's memory lock (`mmap_lock`), and a fault that hangs, as on a frozen file system, keeps
    /// that. From the first call on no share is given out any more; once every share has been returned,
    /// nothing is left that could reach the file. Never waits.
    pub fn fenced_by_return(&self) -> Result<Fenced, FenceFailed> {
        self.inner.fenced.store(true, Ordering::SeqCst);
        let pinned = self.inner.pinned_shares.load(Ordering::SeqCst);
        match pinned + self.inner.shares.load(Ordering::SeqCst) {
            0 => Ok(Fenced { guard: self.guard }),
            shares => Err(FenceFailed::Shares { shares }),
        }
    }

    #[cfg(not(feature = "mutants"))]
    fn cut(&self, piece_done: impl FnMut()) -> std::io::Result<()> {
        self.inner.cut(piece_done)
    }

    /// What the chosen mutant does for a cut.
    #[cfg(feature = "mutants")]
    fn cut(&self, piece_done: impl FnMut()) -> std::io::Result<()> {
        use crate::mutant::{self, Mutant};
        match mutant::chosen() {
            None
            | Some(
                Mutant::Slow
                | Mutant::NoSync
                | Mutant::NamesWithoutSync
                | Mutant::CommitWithoutFlush,
            ) => self.inner.cut(piece_done),
            Some(Mutant::NoFence) => Ok(()),
            Some(Mutant::ReleaseBeforeFence) => {
                let inner = Arc::clone(&self.inner);
                mutant::late(move || drop(inner.cut(|| ())));
                Ok(())
            }
            Some(Mutant::UnmapBeforeDeregister) => self.inner.unmap(),
        }
    }

    fn checked(&self, range: Range<u64>) -> Result<Range<usize>> {
        self.inner.checked(range)
    }

    fn whole_pages(&self, range: Range<usize>) -> Range<usize> {
        whole_pages(range, self.inner.len)
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        self.inner.at(offset)
    }
}

impl Inner {
    /// Each piece by itself, and all of them: the first refusal is the answer.
    fn cut(&self, mut piece_done: impl FnMut()) -> std::io::Result<()> {
        let mut refused = Ok(());
        for piece in self.pieces() {
            // SAFETY: the piece lies inside our own mapping, and this crate makes no references into it.
            let cut = unsafe { sys::make_inaccessible(self.at(piece.start), piece.len()) };
            refused = refused.and(cut);
            piece_done();
        }
        refused
    }

    /// Makes a map area of each piece: mprotect(2) on a part of one would have to make one, and a fence
    /// must not need memory or meet a limit. Neighbours that differ are never merged, so every other one
    /// is said to be read from start to end, which means nothing on DAX and little elsewhere.
    fn cut_into_pieces(&self) -> std::io::Result<()> {
        for piece in self.pieces().skip(1).step_by(2) {
            // SAFETY: the piece lies inside our own mapping; the advice concerns reading ahead.
            unsafe { sys::advise(self.at(piece.start), piece.len(), MmapAdvise::MADV_SEQUENTIAL) }?;
        }
        Ok(())
    }

    fn piece_len(&self) -> usize {
        self.len.div_ceil(PIECES_MAX).next_multiple_of(HUGE_PAGE).max(PIECE)
    }

    fn pieces(&self) -> impl Iterator<Item = Range<usize>> {
        let (len, piece) = (self.len, self.piece_len());
        (0..len).step_by(piece).map(move |start| start..len.min(start + piece))
    }

    /// Once only: the addresses may be another mapping's afterwards.
    #[cfg(feature = "mutants")]
    fn unmap(&self) -> std::io::Result<()> {
        if self.unmapped.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        // SAFETY: not given: hardware still uses it, which is the mutant that is chosen.
        unsafe { sys::unmap(self.address, self.len) }
    }

    fn advise(&self, advice: MmapAdvise) -> std::io::Result<()> {
        // SAFETY: the range is our own mapping; the callers' advice concerns fork and core dumps.
        unsafe { sys::advise(self.address, self.len, advice) }
    }

    fn checked(&self, range: Range<u64>) -> Result<Range<usize>> {
        // Behind a device's last byte there is nothing, not even to be flushed.
        let len = self.view.as_ref().map_or(self.len, |view| view.len) as u64;
        if range.start >= range.end || range.end > len {
            return Err(Error::OutOfMapping { start: range.start, end: range.end, len });
        }
        Ok(range.start as usize..range.end as usize)
    }

    fn at(&self, offset: usize) -> NonNull<u8> {
        // SAFETY: every caller passes an offset that `checked` found inside the mapping.
        unsafe { self.address.add(offset) }
    }

    fn failed(&self, call: &'static str, range: &Range<usize>, source: std::io::Error) -> Error {
        memory(&self.description, call, range.len(), source)
    }

    fn lost(&self, range: Range<usize>, source: std::io::Error) -> Error {
        let path = self.description.path().to_owned();
        Error::MediumLost { path, start: range.start as u64, end: range.end as u64, source }
    }
}

/// A device's bytes once more, for reading: a CPU's caches are flushed by addresses that can be read,
/// and those of the mapping itself can't be any more after the fence.
#[derive(Debug)]
struct View {
    address: NonNull<u8>,
    len: usize,
    /// Pages are gone as a whole.
    page: usize,
}

impl View {
    fn of(description: &Description) -> std::io::Result<Option<Self>> {
        let Some(device) = description.device() else { return Ok(None) };
        let len = usize::try_from(device.size).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or(std::io::ErrorKind::InvalidInput)?;
        let address = sys::map_for_reading(len, description.fd())?;
        let view = Self { address, len: len.get(), page: device.align as usize };
        // SAFETY: the range is our own mapping; the advice concerns forks.
        unsafe { sys::advise(address, view.len, MmapAdvise::MADV_DONTFORK) }?;
        // SAFETY: as above, core dumps.
        unsafe { sys::advise(address, view.len, MmapAdvise::MADV_DONTDUMP) }?;
        Ok(Some(view))
    }

    /// Page by page, each looked at first: of one that is gone the kernel tells us in words.
    fn flush(&self, range: Range<usize>) -> std::io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at + 1).next_multiple_of(self.page));
            // SAFETY: every caller passes a range that `Inner::checked` found inside the device.
            let address = unsafe { self.address.add(at) };
            // SAFETY: one byte of our own mapping, into a variable.
            unsafe { sys::copy_out(address, &mut [0]) }?;
            // SAFETY: the page is there and readable. (Whoever takes the device from its driver in
            // this very moment makes that untrue, and ends the process: docs/guarantees.md.)
            unsafe { sys::write_back(address, end - at) };
            at = end;
        }
        Ok(())
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and its last user is being dropped.
        unsafe { unmap_or_leave(self.address, self.len, None) };
    }
}

/// A flush that keeps its memory mapped while it runs.
#[derive(Clone, Debug)]
pub struct Flusher {
    inner: Arc<Inner>,
}

impl Flusher {
    /// As [`Mapping::flush`].
    pub fn flush(&self, range: Range<u64>) -> Result<()> {
        let range = self.inner.checked(range)?;
        if let Some(view) = &self.inner.view {
            return view.flush(range.clone()).map_err(|source| self.inner.lost(range, source));
        }
        let range = whole_pages(range, self.inner.len);
        // SAFETY: the range lies inside our own mapping, which this value keeps.
        unsafe { sys::sync(self.inner.at(range.start), range.len()) }
            .map_err(|e| self.inner.description.not_written_back("msync", e))
    }

    /// Makes what was stored in `range`, by hardware too, survive power loss: flushes it, and without
    /// `MAP_SYNC` the file's metadata too, since the blocks behind the data may not be recorded yet.
    pub fn make_durable(&self, range: Range<u64>) -> Result<()> {
        #[cfg(feature = "mutants")]
        if crate::mutant::commits_nothing() {
            return Ok(());
        }
        self.flush(range)?;
        if self.inner.map_sync { Ok(()) } else { self.inner.description.sync() }
    }
}

fn memory(file: &Description, call: &'static str, len: usize, source: std::io::Error) -> Error {
    Error::Memory { call, path: file.path().to_owned(), len, source }
}

fn whole_pages(range: Range<usize>, len: usize) -> Range<usize> {
    let page = rustix::param::page_size();
    range.start - range.start % page..range.end.next_multiple_of(page).min(len)
}

/// Maps the file at a multiple of 2 MiB, and says whether it took `MAP_SYNC`.
///
/// Addresses are looked for first, and asked for then; if somebody else is quicker, others are looked
/// for. Not by a reservation that the file is mapped over: a `MAP_FIXED` that the file system refuses
/// (`f_op->mmap`, after the kernel has taken away what was there) leaves a hole, which another thread
/// may get, so the reservation could neither be used any more nor given back.
fn map_file(len: NonZeroUsize, file: &Description) -> std::io::Result<(NonNull<u8>, bool)> {
    for _ in 0..MAP_TRIES {
        let (address, map_sync) = map_file_near(free_addresses(len)?, len, file)?;
        if address.as_ptr().align_offset(HUGE_PAGE) == 0 {
            return Ok((address, map_sync));
        }
        // SAFETY: the mapping was made here, and nothing uses it.
        unsafe { unmap_or_leave(address, len.get(), Some(file)) };
    }
    Err(std::io::Error::from_raw_os_error(libc::EBUSY))
}

fn map_file_near(
    place: NonNull<u8>,
    len: NonZeroUsize,
    file: &Description,
) -> std::io::Result<(NonNull<u8>, bool)> {
    let map = |flags, map_sync| {
        sys::map_near(place, len, flags, file.fd()).map(|address| (address, map_sync))
    };
    #[cfg(feature = "mutants")]
    if crate::mutant::syncs_nothing() {
        return map(MapFlags::MAP_SHARED, false);
    }
    match map(SYNCHRONOUS, true) {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => map(MapFlags::MAP_SHARED, false),
        mapped => mapped,
    }
}

const SYNCHRONOUS: MapFlags = MapFlags::MAP_SHARED_VALIDATE.union(MapFlags::MAP_SYNC);

/// Each is lost only to a thread that asks for memory between two calls.
const MAP_TRIES: u32 = 1000;

/// Finds `len` bytes (a multiple of 2 MiB) on a 2 MiB boundary that nothing uses just now.
fn free_addresses(len: NonZeroUsize) -> std::io::Result<NonNull<u8>> {
    let larger = len.checked_add(HUGE_PAGE).ok_or(std::io::ErrorKind::InvalidInput)?;
    let start = sys::reserve(larger)?;
    // SAFETY: our own reservation, which nothing uses.
    unsafe { unmap_or_leave(start, larger.get(), None) };
    let head = start.as_ptr().align_offset(HUGE_PAGE);
    // SAFETY: `head` is below 2 MiB, and the reservation was that much longer than `len`.
    Ok(unsafe { start.add(head) })
}

/// Addresses that munmap(2) would not give back.
#[derive(Debug)]
struct Left {
    address: NonNull<u8>,
    len: usize,
    /// As long as a mapping of the file lives, only its own description can be guarded.
    _description: Option<Description>,
}

// SAFETY: the addresses are used by nobody but munmap(2), by whichever thread.
unsafe impl Send for Left {}

static LEFT: Mutex<Vec<Left>> = Mutex::new(Vec::new());

fn left() -> MutexGuard<'static, Vec<Left>> {
    // No code that holds it can leave the list half-changed.
    LEFT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// munmap(2) may need memory (ENOMEM, also where it would cut a map in two and `vm.max_map_count` is
/// reached). What it refuses stays where it is, and is tried again before the next file is guarded, and
/// whenever somebody waits for an export to be let go.
///
/// # Safety
/// As for [`sys::unmap`].
unsafe fn unmap_or_leave(address: NonNull<u8>, len: usize, description: Option<&Description>) {
    // SAFETY: demanded of the caller.
    if unsafe { sys::unmap(address, len) }.is_err() {
        left().push(Left { address, len, _description: description.cloned() });
    }
}

/// Tries again what munmap(2) has refused.
pub(crate) fn unmap_what_is_left() {
    // SAFETY: what is in the list is ours, and used by nobody: see `unmap_or_leave`.
    left().retain(|left| unsafe { sys::unmap(left.address, left.len) }.is_err());
}

/// A share of a [`Mapping`] for hardware that follows page tables: as long as it lives, the
/// addresses are not given to anything else. It can't be pinned: the fence would not wait for it.
#[derive(Debug)]
pub struct Share {
    inner: Arc<Inner>,
}

/// A share of a [`Mapping`] for hardware that pins pages. No fence is complete while one lives.
#[derive(Debug)]
pub struct PinnedShare {
    inner: Arc<Inner>,
}

impl Share {
    /// First byte of the mapping. Not to be dereferenced: see [`Mapping`].
    pub fn as_ptr(&self) -> *mut u8 {
        self.inner.address.as_ptr()
    }

    /// Length of the mapping in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.inner.len
    }
}

impl PinnedShare {
    /// First byte of the mapping. Not to be dereferenced: see [`Mapping`].
    pub fn as_ptr(&self) -> *mut u8 {
        self.inner.address.as_ptr()
    }

    /// Length of the mapping in bytes.
    #[allow(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.inner.len
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.inner.shares.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for PinnedShare {
    fn drop(&mut self) {
        self.inner.pinned_shares.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Create, Export, RelativePath, Watcher};

    /// A file of one byte, and the folder that it is removed with.
    fn a_file() -> (tempfile::TempDir, Description) {
        let folder = tempfile::tempdir().unwrap();
        let export = Export::open(folder.path()).unwrap();
        let create = Create { size: 1, mode: 0o600, dax: false };
        let file = export.create(&RelativePath::parse("file").unwrap(), &create).unwrap();
        (folder, file)
    }

    /// The lines of /proc/self/maps of a file: address ranges and rights.
    fn areas_of(inode: &str) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let of_it = maps.lines().filter(|line| line.split_whitespace().nth(4) == Some(inode));
        of_it.map(str::to_owned).collect()
    }

    #[test]
    fn a_fence_goes_by_pieces_and_makes_no_map_area() {
        let (_folder, file) = a_file();
        let (watcher, _breaks) = Watcher::start().unwrap();
        let inode = file.identity().inode.to_string();
        let armed = file.unguarded(&watcher).unwrap();
        let (guard, mapping) = armed.map(3 * PIECE as u64 + 1).unwrap();
        assert_eq!(mapping.pieces(), 4);
        let before = areas_of(&inode);
        assert_eq!(before.len(), 4, "{before:?}");
        let mut cut = Vec::new();
        let fenced = mapping.fence_by_pieces(|| cut.push(areas_of(&inode))).unwrap();
        assert_eq!(cut.len(), 4);
        for (done, areas) in cut.iter().enumerate() {
            let ranges = |areas: &[String]| -> Vec<String> {
                areas.iter().map(|line| line.split(' ').next().unwrap().to_owned()).collect()
            };
            assert_eq!(ranges(areas), ranges(&before), "after piece {done}");
            let inaccessible = areas.iter().filter(|line| line.contains("---s")).count();
            assert_eq!(inaccessible, done + 1, "{areas:?}");
        }
        guard.release(fenced).unwrap();
    }

    #[test]
    fn the_largest_file_has_not_too_many_pieces() {
        let (_folder, file) = a_file();
        let (watcher, _breaks) = Watcher::start().unwrap();
        let armed = file.unguarded(&watcher).unwrap();
        let (guard, mapping) = armed.map(20 << 40).unwrap();
        assert!(mapping.pieces() <= PIECES_MAX, "{}", mapping.pieces());
        guard.release(mapping.fence().unwrap()).unwrap();
    }

    /// A `mmap(MAP_FIXED)` that fails may leave a hole where the reservation was. Whoever else asks
    /// for addresses gets it, and then two mappings share them.
    #[test]
    fn nobody_else_gets_the_addresses_while_a_file_is_mapped() {
        let (_folder, file) = a_file();
        let (watcher, _breaks) = Watcher::start().unwrap();
        let inode = file.identity().inode.to_string();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let len = NonZeroUsize::new(2 * HUGE_PAGE).unwrap();
                    while !done.load(Ordering::Relaxed) {
                        let address = sys::reserve(len).unwrap();
                        // SAFETY: our own reservation, which nothing uses.
                        unsafe { sys::unmap(address, len.get()) }.unwrap();
                    }
                });
            }
            let failed = (0..2000).find_map(|_| {
                let (guard, mapping) = match file.unguarded(&watcher).and_then(|armed| armed.map(1))
                {
                    Ok(made) => made,
                    Err(error) => return Some(error.to_string()),
                };
                let start = format!("{:x}-", mapping.inner.address.as_ptr() as usize);
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let there = maps.lines().find(|line| line.starts_with(&start)).unwrap_or_default();
                guard.release(mapping.fence().unwrap()).unwrap();
                (there.split_whitespace().nth(4) != Some(&inode)).then(|| there.to_owned())
            });
            done.store(true, Ordering::Relaxed);
            assert_eq!(failed, None);
        });
    }
}
