//! Locks for those who ask for them. They stop no truncate and no open: a guard does that. They make
//! what is in use visible (/proc/locks, lslocks(8)), and keep programs apart that lock too.

use std::ops::Range;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::description::Description;
use crate::door::pass;
use crate::error::{Error, Result};
use crate::export::{Attributes, Export, denied_or_failed};
use crate::openers::flock_holder;
use crate::seal::link_of;

/// How a range is locked.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum LockKind {
    /// With others who share it.
    Shared,
    /// By this description alone.
    Exclusive,
}

/// The locks on one description. The kernel keeps one kind per byte and description, so what
/// overlaps is counted here.
#[derive(Debug, Default)]
pub(crate) struct RangeLocks {
    next: u64,
    held: Vec<(u64, Range<u64>, LockKind)>,
}

impl RangeLocks {
    /// Cuts `range` where a lock on it begins or ends, and says how each piece is locked.
    fn pieces(&self, range: &Range<u64>) -> Vec<(Range<u64>, Option<LockKind>)> {
        let ends = self.held.iter().flat_map(|(_, held, _)| [held.start, held.end]);
        let mut cuts: Vec<u64> = ends.filter(|at| range.contains(at)).collect();
        cuts.extend([range.start, range.end]);
        cuts.sort_unstable();
        cuts.dedup();
        let strongest = |at: u64| {
            self.held.iter().filter(|(_, held, _)| held.contains(&at)).map(|held| held.2).max()
        };
        cuts.windows(2).map(|cut| (cut[0]..cut[1], strongest(cut[0]))).collect()
    }
}

/// A locked range of a file (an OFD lock, fcntl(2)), until it is dropped. It keeps the description
/// open.
#[derive(Debug)]
#[must_use = "the range is unlocked when this is dropped"]
pub struct RangeLock {
    description: Description,
    number: u64,
}

impl Description {
    /// Locks bytes `range` against other descriptions that lock (OFD lock, fcntl(2)). Breaks no
    /// guard. Locks of one description never stand in each other's way, and each is undone by
    /// itself: what several cover stays locked until the last is dropped.
    ///
    /// Does not wait: [`Error::RangeLocked`] if another description has a part of it. An empty
    /// range, or one that ends beyond 2^63-1, is [`Error::File`] with EINVAL.
    pub fn lock_range(&self, range: Range<u64>, kind: LockKind) -> Result<RangeLock> {
        if range.is_empty() || i64::try_from(range.end).is_err() {
            return Err(self.failed("fcntl(F_OFD_SETLK)", Errno::INVAL.into()));
        }
        let mut locks = self.range_locks();
        let number = locks.next;
        locks.next += 1;
        locks.held.push((number, range.clone(), kind));
        let locked = self.apply(&locks, &range);
        if locked.is_err() {
            locks.held.retain(|held| held.0 != number);
            // Unlocking can fail for want of memory only; then more is locked than is used.
            let _ = self.apply(&locks, &range);
        }
        locked.map(|()| RangeLock { description: self.clone(), number })
    }

    /// Makes the kernel's locks on `range` what ours say.
    fn apply(&self, locks: &RangeLocks, range: &Range<u64>) -> Result<()> {
        for (piece, kind) in locks.pieces(range) {
            self.set_lock(&piece, kind)?;
        }
        Ok(())
    }

    fn set_lock(&self, piece: &Range<u64>, kind: Option<LockKind>) -> Result<()> {
        let mut lock = flock(piece, kind);
        match pass("fcntl(F_OFD_SETLK)")
            .and_then(|()| fcntl(self.fd(), FcntlArg::F_OFD_SETLK(&lock)))
        {
            Ok(_) => Ok(()),
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => {
                let asked = fcntl(self.fd(), FcntlArg::F_OFD_GETLK(&mut lock));
                // -1: the holder is a description, which belongs to no process.
                let pid = asked.ok().and_then(|_| u32::try_from(lock.l_pid).ok());
                let path = self.path().to_owned();
                let pid = pid.filter(|pid| *pid > 0);
                Err(Error::RangeLocked { path, start: piece.start, end: piece.end, pid })
            }
            Err(e) => Err(self.failed("fcntl(F_OFD_SETLK)", e.into())),
        }
    }
}

fn flock(piece: &Range<u64>, kind: Option<LockKind>) -> libc::flock {
    let kind = match kind {
        None => libc::F_UNLCK,
        Some(LockKind::Shared) => libc::F_RDLCK,
        Some(LockKind::Exclusive) => libc::F_WRLCK,
    };
    // `lock_range` has checked that both fit.
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: piece.start as libc::off_t,
        l_len: (piece.end - piece.start) as libc::off_t,
        l_pid: 0,
    }
}

impl Drop for RangeLock {
    fn drop(&mut self) {
        let mut locks = self.description.range_locks();
        let Some(at) = locks.held.iter().position(|held| held.0 == self.number) else { return };
        let (_, range, _) = locks.held.remove(at);
        // As above: more is locked than is used, until the description is closed.
        let _ = self.description.apply(&locks, &range);
    }
}

/// The lock on an export, until it is dropped.
#[derive(Debug)]
#[must_use = "the export is unlocked when this is dropped"]
pub struct ExportLock {
    _folder: OwnedFd,
}

impl Export {
    /// Locks the directory, or the device's node, for one program (flock(2), `LOCK_EX`), so that no second one serves it.
    /// Does not wait: [`Error::ExportLocked`], with the holder's process id where /proc/locks tells.
    pub fn lock(&self) -> Result<ExportLock> {
        let failed = |call| move |e: Errno| denied_or_failed(e.into(), call, self.path());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let folder = pass("open")
            .and_then(|()| rustix::fs::open(link_of(self.root()), flags, Mode::empty()))
            .map_err(failed("open the export"))?;
        match pass("flock")
            .and_then(|()| rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive))
        {
            Ok(()) => Ok(ExportLock { _folder: folder }),
            Err(Errno::WOULDBLOCK) => {
                let identity = Attributes::of(self.root(), self.path())?.identity;
                let pid = flock_holder(identity);
                Err(Error::ExportLocked { path: self.path().to_owned(), pid })
            }
            Err(e) => Err(failed("flock")(e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_byte_is_locked_as_the_strongest_lock_on_it(
            held in prop::collection::vec((0u64..40, 1u64..20, any::<bool>()), 0..8),
            start in 0u64..50,
            len in 1u64..30,
        ) {
            let held: Vec<_> = held
                .into_iter()
                .map(|(start, len, shared)| {
                    let kind = if shared { LockKind::Shared } else { LockKind::Exclusive };
                    (0, start..start + len, kind)
                })
                .collect();
            let locks = RangeLocks { next: 0, held };
            let mut at = start;
            for (piece, kind) in locks.pieces(&(start..start + len)) {
                prop_assert_eq!(piece.start, at, "no gap, no overlap");
                for byte in piece.clone() {
                    let covering = locks.held.iter().filter(|held| held.1.contains(&byte));
                    prop_assert_eq!(kind, covering.map(|held| held.2).max());
                }
                at = piece.end;
            }
            prop_assert_eq!(at, start + len);
        }
    }
}
