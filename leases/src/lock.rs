//! Locks for those who ask for them. They stop no truncate and no open: a guard does that. They make
//! what is in use visible (/proc/locks, lslocks(8)), and keep programs apart that lock too.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
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
    /// How each byte is locked, from this one to the next that is listed. Neighbours differ.
    runs: BTreeMap<u64, Count>,
}

/// How many locks there are on each byte of a run.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct Count {
    shared: usize,
    exclusive: usize,
}

impl Count {
    fn of(&mut self, kind: LockKind) -> &mut usize {
        match kind {
            LockKind::Shared => &mut self.shared,
            LockKind::Exclusive => &mut self.exclusive,
        }
    }

    fn strongest(self) -> Option<LockKind> {
        match self {
            Self { exclusive: 1.., .. } => Some(LockKind::Exclusive),
            Self { shared: 1.., .. } => Some(LockKind::Shared),
            Self { .. } => None,
        }
    }
}

impl RangeLocks {
    fn add(&mut self, range: &Range<u64>, kind: LockKind) {
        self.change(range, |count| *count.of(kind) += 1);
    }

    fn remove(&mut self, range: &Range<u64>, kind: LockKind) {
        self.change(range, |count| *count.of(kind) -= 1);
    }

    /// What lies inside stays different from its neighbours, so only the ends are to be looked at.
    fn change(&mut self, range: &Range<u64>, change: impl Fn(&mut Count)) {
        for end in [range.start, range.end] {
            let count = self.at(end);
            self.runs.entry(end).or_insert(count);
        }
        self.runs.range_mut(range.clone()).for_each(|(_, count)| change(count));
        for end in [range.start, range.end] {
            if self.before(end) == self.at(end) {
                self.runs.remove(&end);
            }
        }
    }

    fn at(&self, byte: u64) -> Count {
        self.runs.range(..=byte).next_back().map(|(_, count)| *count).unwrap_or_default()
    }

    fn before(&self, byte: u64) -> Count {
        self.runs.range(..byte).next_back().map(|(_, count)| *count).unwrap_or_default()
    }

    /// Cuts `range` where it is locked in another way, and says how each piece is.
    fn pieces(&self, range: &Range<u64>) -> Vec<(Range<u64>, Option<LockKind>)> {
        let (mut start, mut kind) = (range.start, self.at(range.start).strongest());
        let mut pieces = Vec::new();
        for (at, count) in
            self.runs.range((Bound::Excluded(range.start), Bound::Excluded(range.end)))
        {
            let next = count.strongest();
            if next != kind {
                pieces.push((start..*at, kind));
                (start, kind) = (*at, next);
            }
        }
        pieces.push((start..range.end, kind));
        pieces
    }
}

/// A locked range of a file (an OFD lock, fcntl(2)), until it is dropped. It keeps the description
/// open.
#[derive(Debug)]
#[must_use = "the range is unlocked when this is dropped"]
pub struct RangeLock {
    description: Description,
    range: Range<u64>,
    kind: LockKind,
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
        locks.add(&range, kind);
        let locked = self.apply(&locks, &range);
        if locked.is_err() {
            locks.remove(&range, kind);
            // Unlocking can fail for want of memory only; then more is locked than is used.
            let _ = self.apply(&locks, &range);
        }
        drop(locks);
        locked.map(|()| RangeLock { description: self.clone(), range, kind })
    }

    /// Drops many locks at once: what lies together is one call to the kernel then, which searches all
    /// locks on the file for each. They are all to be this description's.
    pub fn unlock_ranges(&self, locks: impl IntoIterator<Item = RangeLock>) {
        let mut held = self.range_locks();
        let mut freed: Option<Range<u64>> = None;
        for mut lock in locks {
            debug_assert!(lock.description.is(self), "another description's");
            let range = std::mem::take(&mut lock.range);
            held.remove(&range, lock.kind);
            let before = freed.unwrap_or(range.clone());
            freed = Some(before.start.min(range.start)..before.end.max(range.end));
        }
        if let Some(freed) = freed {
            // As above: more is locked than is used, until the description is closed.
            let _ = self.apply(&held, &freed);
        }
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
        // Dropped with others before.
        if self.range.is_empty() {
            return;
        }
        let mut locks = self.description.range_locks();
        locks.remove(&self.range, self.kind);
        // As above: more is locked than is used, until the description is closed.
        let _ = self.description.apply(&locks, &self.range);
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
            made in prop::collection::vec((0u64..40, 1u64..20, any::<bool>()), 0..12),
            dropped in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
            start in 0u64..50,
            len in 1u64..30,
        ) {
            let mut locks = RangeLocks::default();
            let mut held: Vec<(Range<u64>, LockKind)> = Vec::new();
            for (start, len, shared) in made {
                let kind = if shared { LockKind::Shared } else { LockKind::Exclusive };
                locks.add(&(start..start + len), kind);
                held.push((start..start + len, kind));
            }
            for index in dropped {
                if !held.is_empty() {
                    let (range, kind) = held.swap_remove(index.index(held.len()));
                    locks.remove(&range, kind);
                }
            }
            let (mut at, mut last) = (start, None);
            for (piece, kind) in locks.pieces(&(start..start + len)) {
                prop_assert_eq!(piece.start, at, "no gap, no overlap");
                prop_assert_ne!(last, Some(kind), "one call for what lies together");
                for byte in piece.clone() {
                    let covering = held.iter().filter(|held| held.0.contains(&byte));
                    prop_assert_eq!(kind, covering.map(|held| held.1).max());
                }
                (at, last) = (piece.end, Some(kind));
            }
            prop_assert_eq!(at, start + len);
            while let Some((range, kind)) = held.pop() {
                locks.remove(&range, kind);
            }
            prop_assert!(locks.runs.is_empty(), "nothing is left behind");
        }
    }
}
