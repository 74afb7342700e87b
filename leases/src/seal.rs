//! The seal: the append-only flag over a mapped file, with a mark that says whose it is.
//!
//! The order is what makes it safe: mark, guard, map, flag, then let the guard go; and back: flag,
//! then mark. So there is no moment without either guard or flag while something is mapped, and no
//! crash leaves a flag of ours without its mark. (The journal keeps the order of the two.) Writing
//! the mark under our own delegation would wait for ourselves, and under the flag it is refused.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use rustix::fs::{
    AtFlags, IFlags, Mode, OFlags, StatxAttributes, StatxFlags, XattrFlags, ioctl_getflags,
    ioctl_setflags,
};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};

use crate::description::Description;
use crate::door::pass;
use crate::error::{Error, Result};
use crate::export::{Located, denied_or_failed};
use crate::guard::{Armed, Guard};
use crate::mapping::Mapping;
use crate::openers::openers;
use crate::sys::{self, LeaseType};
use crate::watch::Watcher;

/// The mark: an append-only flag beside it is ours.
const MARK: &str = "user.pinfold.seal";
/// What the mark holds: which layout of the seal it stands for.
const LAYOUT: &[u8] = b"1";
/// The capability that the flag takes.
const CAPABILITY: &str = "CAP_LINUX_IMMUTABLE";
/// How long guard and flag overlap. The kernel looks at the flag first and at the lease next
/// (`vfs_truncate`, `do_dentry_open`): a truncate between the two when the flag was set still
/// meets the lease, and is seen.
pub(crate) const SETTLE: Duration = Duration::from_millis(20);

/// A guarded file that is marked to be sealed, with nothing mapped on it yet. Dropping it lets the
/// guard go and takes the mark off.
#[derive(Debug)]
pub struct ArmedToSeal {
    armed: Option<Armed>,
    /// None once the mark belongs to a sealed guard.
    marked: Option<Description>,
}

impl Drop for ArmedToSeal {
    fn drop(&mut self) {
        // First the guard: under it, taking the mark off would wait for ourselves.
        drop(self.armed.take());
        if let Some(file) = self.marked.take() {
            // A mark alone does no harm: whoever seals the file next writes it again.
            let _ = pass("fremovexattr").and_then(|()| rustix::fs::fremovexattr(file.fd(), MARK));
        }
    }
}

impl Description {
    /// The first half of a seal ([`GuardTier::Sealed`](crate::GuardTier::Sealed)): marks the file and guards it. The second is
    /// [`ArmedToSeal::map`].
    ///
    /// Refused with [`Error::Denied`] without CAP_LINUX_IMMUTABLE, with [`Error::NoSeal`] where the
    /// file system has no append-only flag or no user extended attributes (tmpfs before Linux 6.6),
    /// and as [`arm`](Self::arm) is.
    pub fn arm_to_seal(&self, watcher: &Watcher) -> Result<ArmedToSeal> {
        self.demand_sealable()?;
        pass("fsetxattr")
            .and_then(|()| rustix::fs::fsetxattr(self.fd(), MARK, LAYOUT, XattrFlags::empty()))
            .map_err(|e| no_seal(self, "fsetxattr", e))?;
        let mut marked = ArmedToSeal { armed: None, marked: Some(self.clone()) };
        // On failure `marked` is dropped, and the mark with it.
        marked.armed = Some(self.arm(watcher)?);
        Ok(marked)
    }

    fn demand_sealable(&self) -> Result<()> {
        let flags = pass("FS_IOC_GETFLAGS")
            .and_then(|()| ioctl_getflags(self.fd()))
            .map_err(|e| no_seal(self, "FS_IOC_GETFLAGS", e))?;
        if flags.contains(IFlags::APPEND) {
            // Set since we opened it, and not by us.
            return Err(denied_or_failed(Errno::PERM.into(), "seal", self.path()));
        }
        let capable = capabilities(None)
            .is_ok_and(|sets| sets.effective.contains(CapabilitySet::LINUX_IMMUTABLE));
        if capable { Ok(()) } else { Err(denied(self, "seal", Errno::PERM)) }
    }
}

impl ArmedToSeal {
    /// Maps at least the first `len` bytes, sets the flag, and lets the guard go. From here on
    /// whoever would cut, unlink, rename or link the file fails at once with EPERM; readers pass,
    /// and so does who opens it for appending: what they add lies past the mapped content. The
    /// guard's [`state`](Guard::state) is broken once the flag is gone (root may clear it); that is
    /// looked at every two seconds, and reported as a [`Break`](crate::Break) by a writer.
    ///
    /// Refused with [`Error::Broken`] if somebody wanted to change the file meanwhile. A program
    /// that ends without a release leaves the file sealed: see [`Located::unseal`].
    pub fn map(mut self, len: u64) -> Result<(Guard, Mapping)> {
        let armed = self.armed.take().expect("set by arm_to_seal, taken only here");
        let sealed = armed.map_sealed(len)?;
        self.marked = None;
        Ok(sealed)
    }
}

impl Located {
    /// Whether the file is sealed: append-only, and marked as ours. Opens nothing.
    pub fn is_sealed(&self) -> bool {
        let marked = || rustix::fs::getxattr(self.link(), MARK, &mut [0u8; 16]).is_ok();
        is_append_only(self.fd()).unwrap_or(false) && marked()
    }

    /// Lifts the seal that a program left behind when it ended: clears the flag, then the mark.
    /// `false` if there was none; an append-only flag without our mark is left alone.
    ///
    /// Refused with [`Error::Busy`] while the file is open for writing or mapped so, which is how a
    /// program that still works on it holds it: the kernel tells, by a read lease. Needs
    /// CAP_LINUX_IMMUTABLE, and to be the file's owner or to have CAP_LEASE.
    pub fn unseal(&self) -> Result<bool> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd =
            match pass("open").and_then(|()| rustix::fs::open(self.link(), flags, Mode::empty())) {
                Err(Errno::AGAIN) => return Err(self.busy()),
                opened => opened.map_err(|e| denied_or_failed(e.into(), "open", self.path()))?,
            };
        match rustix::fs::fgetxattr(&fd, MARK, &mut [0u8; 16]) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(false),
            Ok(_) | Err(Errno::RANGE) => {}
            Err(e) => return Err(denied_or_failed(e.into(), "fgetxattr", self.path())),
        }
        let file = Description::new(fd, self.path().to_owned(), self.root())?;
        if let Err(e) = sys::lease_set(file.fd(), LeaseType::Read) {
            // Who is in the way is looked up by `busy`, and our own descriptor is not.
            let refused = file.not_guarded("F_SETLEASE", e);
            drop(file);
            return Err(if matches!(refused, Error::Busy { .. }) { self.busy() } else { refused });
        }
        // The lease goes with the descriptor.
        lift(&file).map(|()| true)
    }

    fn busy(&self) -> Error {
        Error::Busy { path: self.path().to_owned(), openers: openers(self.identity(), None) }
    }

    /// A descriptor's link in /proc leads to the inode, whatever its name is by now.
    pub(crate) fn link(&self) -> String {
        link_of(self.fd())
    }
}

pub(crate) fn link_of(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Asked of statx(2), which waits for nobody, a frozen file system neither.
pub(crate) fn is_append_only(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = pass("statx").and_then(|()| rustix::fs::statx(fd, c"", flags, StatxFlags::TYPE))?;
    Ok(found.stx_attributes.contains(StatxAttributes::APPEND))
}

/// Sets the flag and looks whether it is there.
pub(crate) fn set_flag(file: &Description) -> Result<()> {
    let flags = pass("FS_IOC_GETFLAGS")
        .and_then(|()| ioctl_getflags(file.fd()))
        .map_err(|e| no_seal(file, "FS_IOC_GETFLAGS", e))?;
    pass("FS_IOC_SETFLAGS")
        .and_then(|()| ioctl_setflags(file.fd(), flags | IFlags::APPEND))
        .map_err(|e| no_seal(file, "FS_IOC_SETFLAGS", e))?;
    let refused = match is_append_only(file.fd()) {
        Ok(true) => return Ok(()),
        // Then its loss could not be seen either.
        Ok(false) => no_seal(file, "statx(STATX_ATTR_APPEND)", Errno::OPNOTSUPP),
        Err(e) => file.failed("statx", e),
    };
    // Before the mark goes that says whose it is.
    clear_flag(file)?;
    Err(refused)
}

/// Clears the flag, if it is there.
pub(crate) fn clear_flag(file: &Description) -> Result<()> {
    let flags = pass("FS_IOC_GETFLAGS")
        .and_then(|()| ioctl_getflags(file.fd()))
        .map_err(|e| no_seal(file, "FS_IOC_GETFLAGS", e))?;
    if !flags.contains(IFlags::APPEND) {
        return Ok(());
    }
    pass("FS_IOC_SETFLAGS")
        .and_then(|()| ioctl_setflags(file.fd(), flags - IFlags::APPEND))
        .map_err(|e| no_seal(file, "FS_IOC_SETFLAGS", e))
}

/// Clears flag and mark, in this order.
pub(crate) fn lift(file: &Description) -> Result<()> {
    clear_flag(file)?;
    match pass("fremovexattr").and_then(|()| rustix::fs::fremovexattr(file.fd(), MARK)) {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(e) => Err(denied_or_failed(e.into(), "fremovexattr", file.path())),
    }
}

fn no_seal(file: &Description, call: &'static str, source: Errno) -> Error {
    match source {
        Errno::PERM | Errno::ACCESS => denied(file, call, source),
        Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS => {
            Error::NoSeal { path: file.path().to_owned(), call, source: source.into() }
        }
        _ => file.failed(call, source.into()),
    }
}

fn denied(file: &Description, call: &'static str, source: Errno) -> Error {
    let path = file.path().to_owned();
    Error::Denied { path, call, capability: CAPABILITY, source: source.into() }
}
