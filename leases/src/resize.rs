//! Growing and shrinking a file in pieces, under a guard, with a look between two pieces.
//!
//! Three rules keep what a local process has in the file. Bytes that were ever visible are neither zeroed nor
//! cut by a growth. Space is allocated past the end of the file first, so that a file system without room
//! leaves the size alone. And a size never goes back to undo something.

use std::ops::Range;

use rustix::fs::FallocateFlags;

use crate::description::{Description, MappingKind};
use crate::door::pass;
use crate::error::{Error, Result};
use crate::export::denied_or_failed;
use crate::guard::{Armed, GuardTier};

/// Bytes that one fallocate(2) allocates. Large, for contiguous extents (ext4's longest has 128 MiB).
const ALLOCATED_AT_A_TIME: u64 = 256 << 20;
/// Storage that a file system may keep for its own account of a file's extents, as ext4 does.
const METADATA_BYTES: u64 = 64 << 10;
/// Bytes that one pwrite(2) zeroes.
const ZEROED_AT_A_TIME: usize = 1 << 20;
/// Bytes that one ftruncate(2) cuts off.
const CUT_AT_A_TIME: u64 = 64 << 30;

/// How far a change of size has come.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Progress {
    /// Bytes that are finished.
    pub done_bytes: u64,
    /// Bytes that there are to do.
    pub total_bytes: u64,
}

/// Is asked between two pieces whether to go on.
pub type GoOn<'a> = &'a mut dyn FnMut(Progress) -> bool;

/// How a change of size ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Resized {
    /// The file's size now.
    pub size: u64,
    /// False: it stopped early, because somebody wants the file or because [`GoOn`] said so.
    pub complete: bool,
}

/// The guard under which a file grows: it decides how unused space can be given back.
#[derive(Clone, Copy)]
pub struct Under<'a> {
    /// Its tier now.
    pub tier: GuardTier,
    /// Whether the kernel has let somebody into the file meanwhile, because lease-break-time ran out.
    pub lapsed: &'a dyn Fn() -> bool,
}

/// How others are held off while a file grows.
#[derive(Clone, Copy)]
pub(crate) enum Hold<'a> {
    /// The file has no name yet, so nobody else can reach it. It takes its space with it.
    Unnamed,
    /// A guard, or none.
    Guard(Under<'a>),
}

impl Hold<'_> {
    /// Whether zeroes can be written to what is added, and no byte of anybody is lost.
    fn may_zero(self) -> bool {
        match self {
            Self::Unnamed => true,
            Self::Guard(Under { tier, .. }) => {
                matches!(tier, GuardTier::Lease | GuardTier::Delegation)
            }
        }
    }
}

impl Description {
    /// Makes the file longer while it is guarded and perhaps mapped: allocated, reading as zeroes, flushed.
    /// fallocate(2) through the guarded description breaks no guard, as a change of size by other calls would.
    ///
    /// A file that is larger already stays as it is. If it is told to stop, the file ends where the
    /// allocation ended.
    ///
    /// # Errors
    ///
    /// [`Error::NoSpace`]: the size did not change. Space that was allocated past the end is given back as
    /// far as the guard allows it. It stays in use (`kept_bytes`) where nothing guards the file, where it is
    /// sealed, and on ext4 under a delegation: ext4 punches no hole past the end, and ftruncate(2) would
    /// break the delegation. [`Armed::give_back`] frees it later.
    pub fn grow(&self, size: u64, under: Under<'_>, go_on: GoOn<'_>) -> Result<Resized> {
        let old = self.size()?;
        self.grow_held(old..size.max(old), Hold::Guard(under), false, go_on)
    }

    /// Frees space that lies allocated past the end of the file, and leaves the size as it is.
    fn give_back(&self, under: Under<'_>) -> Result<()> {
        if (under.lapsed)() {
            return Err(Error::Broken);
        }
        let size = self.size()?;
        match under.tier {
            // To the size that it has: the kernel frees what lies behind it.
            GuardTier::Lease => self.truncate(size),
            GuardTier::Delegation | GuardTier::ReadDelegation => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let all = (i64::MAX as u64).saturating_sub(size);
                pass("fallocate")
                    .and_then(|()| rustix::fs::fallocate(self.fd(), flags, size, all))
                    .map_err(|e| self.failed("fallocate", e.into()))
            }
            // Others may have written there by now, or nothing but the seal's owner may be cut.
            GuardTier::Unguarded | GuardTier::NotNeeded | GuardTier::Sealed => Ok(()),
        }
    }

    /// Bytes of storage that the file holds.
    pub fn allocated(&self) -> Result<u64> {
        Ok(self.attributes()?.allocated)
    }

    /// Grows a file from `range.start`, its size now, to `range.end`.
    pub(crate) fn grow_held(
        &self,
        range: Range<u64>,
        hold: Hold<'_>,
        zeroed: bool,
        go_on: GoOn<'_>,
    ) -> Result<Resized> {
        self.demand_file()?;
        let Range { start: old, end } = range;
        #[cfg(feature = "mutants")]
        if crate::mutant::syncs_nothing() {
            self.truncate(end)?;
            return Ok(Resized { size: end, complete: true });
        }
        if end == old {
            self.sync_size()?;
            return Ok(Resized { size: old, complete: true });
        }
        let allocated = self.allocated()?;
        let grown = self
            .demand_room(old, end)
            .and_then(|()| self.add(old..end, hold.may_zero() && zeroed, hold, go_on));
        let reached = match grown {
            Ok(reached) => reached,
            Err(error) => return Err(self.undo(error, allocated, hold)),
        };
        if reached < end
            && let Hold::Guard(under) = hold
        {
            // Frees the space past the point at which it stopped. If that fails the space stays in use, and
            // the next growth finds it there.
            let _ = self.give_back(under);
        }
        self.sync_size()?;
        Ok(Resized { size: reached, complete: reached == end })
    }

    /// Allocates and, if asked to, zeroes. Returns where the file ends then.
    fn add(&self, range: Range<u64>, zeroed: bool, hold: Hold<'_>, go_on: GoOn<'_>) -> Result<u64> {
        let Range { start: old, end } = range;
        let total_bytes = end - old;
        let allocated = match self.allocate_past_end(old..end, zeroed, go_on)? {
            Allocated::To(to) => to,
            // Then zeroes do it, if nobody is there to lose bytes by them.
            Allocated::Unsupported if hold.may_zero() => {
                return self.zero(old..end, total_bytes, go_on);
            }
            Allocated::Unsupported => {
                let error = std::io::Error::from_raw_os_error(libc::EOPNOTSUPP);
                return Err(self.failed("fallocate", error));
            }
        };
        if zeroed && allocated < end {
            // Told to stop before anything was zeroed.
            return Ok(old);
        }
        if zeroed {
            return self.zero(old..end, total_bytes, go_on);
        }
        if allocated > old {
            // The space is there, so this sets the size and nothing else. It never makes a file shorter,
            // should somebody have appended meanwhile to one that nothing guards.
            self.allocate(old..allocated, FallocateFlags::empty())
                .map_err(|e| self.no_space(allocated - old, "fallocate", e.into()))?;
        }
        Ok(allocated)
    }

    fn allocate_past_end(
        &self,
        range: Range<u64>,
        zeroed: bool,
        go_on: GoOn<'_>,
    ) -> Result<Allocated> {
        let Range { start, end } = range;
        let total_bytes = end - start;
        let mut at = start;
        while at < end {
            let done_bytes = if zeroed { 0 } else { at - start };
            if !go_on(Progress { done_bytes, total_bytes }) {
                return Ok(Allocated::To(at));
            }
            let next = (at / ALLOCATED_AT_A_TIME + 1).saturating_mul(ALLOCATED_AT_A_TIME).min(end);
            match self.allocate(at..next, FallocateFlags::KEEP_SIZE) {
                Ok(()) => at = next,
                Err(rustix::io::Errno::OPNOTSUPP) if at == start => {
                    return Ok(Allocated::Unsupported);
                }
                Err(e) => return Err(self.no_space(total_bytes, "fallocate", e.into())),
            }
        }
        Ok(Allocated::To(at))
    }

    fn allocate(&self, range: Range<u64>, flags: FallocateFlags) -> rustix::io::Result<()> {
        let len = range.end - range.start;
        loop {
            match pass("fallocate")
                .and_then(|()| rustix::fs::fallocate(self.fd(), flags, range.start, len))
            {
                Err(rustix::io::Errno::INTR) => {}
                done => return done,
            }
        }
    }

    /// Writes zeroes from the end of the file on, which makes it longer piece by piece. Returns its end.
    fn zero(&self, range: Range<u64>, total_bytes: u64, go_on: GoOn<'_>) -> Result<u64> {
        let Range { start, end } = range;
        let at_most = |left: u64| ZEROED_AT_A_TIME.min(usize::try_from(left).unwrap_or(usize::MAX));
        let zeroes = vec![0; at_most(end - start)];
        let mut at = start;
        while at < end && go_on(Progress { done_bytes: at - start, total_bytes }) {
            let piece = at_most(end - at);
            self.write_at(&zeroes[..piece], at)?;
            at += piece as u64;
        }
        Ok(at)
    }

    fn undo(&self, error: Error, allocated_before: u64, hold: Hold<'_>) -> Error {
        let Hold::Guard(under) = hold else { return error };
        // If this fails, the bytes are counted as kept.
        let _ = self.give_back(under);
        match error {
            Error::NoSpace { path, bytes, source, .. } => {
                let allocated = self.allocated().unwrap_or(allocated_before);
                let kept_bytes = allocated.saturating_sub(allocated_before);
                let kept_bytes = if kept_bytes > METADATA_BYTES { kept_bytes } else { 0 };
                Error::NoSpace { path, bytes, kept_bytes, source }
            }
            error => error,
        }
    }

    /// Asked before anything is allocated: a file system that was filled up for a moment has failed the
    /// writes of others.
    fn demand_room(&self, old: u64, end: u64) -> Result<()> {
        let stat = pass("fstatvfs")
            .and_then(|()| rustix::fs::fstatvfs(self.fd()))
            .map_err(|e| self.failed("fstatvfs", e.into()))?;
        // tmpfs without a limit has no blocks.
        if stat.f_blocks == 0 {
            return Ok(());
        }
        // Space past its end that the file has already.
        let has = self.allocated()?.saturating_sub(old);
        let needed = (end - old).saturating_sub(has);
        if needed <= stat.f_bavail.saturating_mul(stat.f_frsize) {
            return Ok(());
        }
        Err(self.no_space(end - old, "fallocate", std::io::Error::from_raw_os_error(libc::ENOSPC)))
    }

    fn truncate(&self, size: u64) -> Result<()> {
        pass("ftruncate")
            .and_then(|()| rustix::fs::ftruncate(self.fd(), size))
            .map_err(|e| denied_or_failed(e.into(), "ftruncate", self.path()))
    }

    fn sync_size(&self) -> Result<()> {
        #[cfg(feature = "mutants")]
        if crate::mutant::syncs_no_names() {
            return Ok(());
        }
        self.sync()
    }
}

/// How far space was allocated.
enum Allocated {
    To(u64),
    /// The file system has no fallocate(2) for this file (ext4 without extents).
    Unsupported,
}

impl Armed {
    /// Whether nobody wants the file.
    pub fn is_held(&self) -> bool {
        self.demand_held().is_ok()
    }

    /// Makes the file longer, which nobody has mapped. What is added is allocated, reads as zeroes, and is
    /// flushed; on fs-DAX it is written with zeroes, because a mapping of unwritten extents is populated
    /// slowly, with the process's memory lock held. Stops as soon as somebody wants the file.
    ///
    /// # Errors
    ///
    /// As [`Description::grow`].
    pub fn grow(&self, size: u64, go_on: GoOn<'_>) -> Result<Resized> {
        let file = self.description();
        let old = file.size()?;
        let zeroed = file.kind()? == MappingKind::FsDax;
        let mut go_on = |progress| self.is_held() && go_on(progress);
        let lapsed = || self.lapsed();
        let hold = Hold::Guard(Under { tier: self.tier(), lapsed: &lapsed });
        file.grow_held(old..size.max(old), hold, zeroed, &mut go_on)
    }

    /// Makes the file shorter, and flushes that. Stops as soon as somebody wants the file. Under a delegation
    /// a change of size breaks the holder's own guard: [arm](Description::arm_at_most) a
    /// [lease](GuardTier::Lease) for it.
    pub fn shrink(&self, size: u64, go_on: GoOn<'_>) -> Result<Resized> {
        let file = self.description();
        file.demand_file()?;
        let old = file.size()?;
        let mut at = old;
        while at > size {
            let progress = Progress { done_bytes: old - at, total_bytes: old - size };
            if !self.is_held() || !go_on(progress) {
                break;
            }
            let next = size.max((at - 1) / CUT_AT_A_TIME * CUT_AT_A_TIME);
            file.truncate(next)?;
            at = next;
        }
        file.sync_size()?;
        Ok(Resized { size: at, complete: at <= size })
    }

    /// Frees space that lies allocated past the end of the file, as a growth that failed may have left it.
    ///
    /// # Errors
    ///
    /// [`Error::Broken`] if somebody wants the file.
    pub fn give_back(&self) -> Result<()> {
        self.demand_held()?;
        self.description().give_back(Under { tier: self.tier(), lapsed: &|| self.lapsed() })
    }
}
