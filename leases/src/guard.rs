//! The kernel's promise to tell us first, from arming it to letting it go.

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::description::Description;
use crate::error::{Error, Result};
use crate::mapping::{Fenced, Mapping};
use crate::openers::openers;
use crate::sys::{self, LeaseType};
use crate::watch::{BreakKind, GuardId, Shared, Watcher};

/// How often a delegation is asked for again when the kernel's inode lock is busy for a moment.
const DELEGATION_TRIES: u32 = 20;

/// What holds the file still; the later, the stronger.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum GuardTier {
    /// `F_SETLEASE`: opens and truncate(2) wait. Unlink, rename, link and attribute changes don't.
    Lease,
    /// `F_SETDELEG`, Linux 6.19: those wait too, and nfsd's changes of size.
    Delegation,
}

impl fmt::Display for GuardTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GuardTier::Lease => "lease",
            GuardTier::Delegation => "delegation",
        })
    }
}

/// Whether the guard holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GuardState {
    /// Nobody wants the file.
    Held,
    /// Somebody does, and waits; or the kernel has let them through already.
    Broken(BreakKind),
}

/// What guard and armed file share: the armed kernel lease, which is let go only through
/// [`Lease::unlock`], never by being dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: GuardId,
    pub(crate) tier: GuardTier,
    pub(crate) description: Description,
}

impl Lease {
    pub(crate) fn state(&self) -> io::Result<GuardState> {
        let held = match self.tier {
            GuardTier::Lease => sys::lease_get(self.description.fd()),
            GuardTier::Delegation => sys::delegation_get(self.description.fd()),
        }?;
        Ok(match held {
            LeaseType::Write => GuardState::Held,
            LeaseType::Read => GuardState::Broken(BreakKind::Reader),
            LeaseType::None => GuardState::Broken(BreakKind::Writer),
        })
    }

    /// Whether the kernel has taken the lease away: it wipes the signal then.
    fn lapsed(&self) -> bool {
        sys::signal_get(self.description.fd()).is_ok_and(|signal| signal == 0)
    }

    fn unlock(&self) {
        // A failure means that it has lapsed: there is nothing left to unlock then.
        let _ = match self.tier {
            GuardTier::Lease => sys::lease_set(self.description.fd(), LeaseType::None),
            GuardTier::Delegation => sys::delegation_set(self.description.fd(), LeaseType::None),
        };
        self.description.disclaim();
    }
}

/// A guarded file with nothing mapped on it yet. Dropping it lets the guard go.
#[derive(Debug)]
pub struct Armed {
    lease: Option<Arc<Lease>>,
    watch: Arc<Shared>,
}

impl Description {
    /// Asks the kernel for the strongest guard that it offers on this file: a delegation, else a
    /// lease. Refused with [`Error::Busy`] while any other description of the file is open.
    ///
    /// May come again on the same description after a release, also while an older, fenced mapping
    /// of it lives.
    pub fn arm(&self, watcher: &Watcher) -> Result<Armed> {
        self.arm_at_most(watcher, GuardTier::Delegation)
    }

    /// As [`arm`](Self::arm), but asks for nothing stronger than `strongest`, for who wants names
    /// and attributes of the file to stay free.
    pub fn arm_at_most(&self, watcher: &Watcher, strongest: GuardTier) -> Result<Armed> {
        let watch = watcher.shared();
        let id = watch.next_id();
        // Setting a lease that is there already would succeed and, over a pending break, never
        // signal again: it must have been unlocked first.
        if !self.claim() {
            return Err(Error::AlreadyArmed { path: self.path().to_owned() });
        }
        let tier = self
            .prepare(watch.thread())
            .and_then(|()| self.set_strongest(strongest))
            .inspect_err(|_| self.disclaim())?;
        let lease = Arc::new(Lease { id, tier, description: self.clone() });
        watch.add(Arc::clone(&lease));
        let armed = Armed { lease: Some(lease), watch: Arc::clone(watch) };
        // A break between arming and `add` had no entry to be matched with.
        armed.demand_held()?;
        Ok(armed)
    }

    /// Names signal and thread, which each unlock wipes.
    fn prepare(&self, thread: libc::pid_t) -> Result<()> {
        let failed = |call| move |source| self.failed(call, source);
        sys::signal_set(self.fd(), *sys::BREAK_SIGNAL).map_err(failed("fcntl(F_SETSIG)"))?;
        sys::owner_set(self.fd(), thread).map_err(failed("fcntl(F_SETOWN_EX)"))
    }

    fn set_strongest(&self, strongest: GuardTier) -> Result<GuardTier> {
        if strongest >= GuardTier::Delegation {
            match self.set_delegation() {
                Ok(()) => return Ok(GuardTier::Delegation),
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) => return Err(self.not_guarded("F_SETDELEG", e)),
            }
        }
        sys::lease_set(self.fd(), LeaseType::Write)
            .map_err(|e| self.not_guarded("F_SETLEASE", e))?;
        Ok(GuardTier::Lease)
    }

    /// `F_SETDELEG` says EAGAIN for another opener and for a busy inode lock alike; only the second
    /// passes.
    fn set_delegation(&self) -> io::Result<()> {
        let mut tries = 1;
        loop {
            match sys::delegation_set(self.fd(), LeaseType::Write) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && tries < DELEGATION_TRIES => {
                    tries += 1;
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
    }

    fn not_guarded(&self, call: &'static str, source: io::Error) -> Error {
        let path = self.path().to_owned();
        match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EBUSY) => {
                Error::Busy { path, openers: openers(self.identity(), Some(self)) }
            }
            Some(libc::EACCES | libc::EPERM) => {
                Error::Denied { path, call: "guard", capability: "CAP_LEASE", source }
            }
            Some(libc::EINVAL | libc::EOPNOTSUPP) => Error::NoGuard { path, source },
            _ => self.failed(call, source),
        }
    }
}

impl Armed {
    fn lease(&self) -> &Arc<Lease> {
        self.lease.as_ref().expect("taken only by map(self)")
    }

    /// Names this arming in [`Break`](crate::Break)s.
    pub fn id(&self) -> GuardId {
        self.lease().id
    }

    /// What holds the file still.
    pub fn tier(&self) -> GuardTier {
        self.lease().tier
    }

    fn demand_held(&self) -> Result<()> {
        match self.lease().state() {
            Ok(GuardState::Held) => Ok(()),
            Ok(GuardState::Broken(_)) => Err(Error::Broken),
            Err(source) => Err(self.lease().description.failed("fcntl(F_GETLEASE)", source)),
        }
    }

    /// Maps at least the first `len` bytes. From here on the guard is let go only with a fence.
    pub fn map(mut self, len: u64) -> Result<(Guard, Mapping)> {
        let mapping = Mapping::new(&self.lease().description, self.id(), len)?;
        let lease = self.lease.take().expect("taken only here");
        let guard = Guard { lease: Some(lease), watch: Arc::clone(&self.watch) };
        Ok((guard, mapping))
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.watch.remove(&lease);
            // Nothing is mapped, so there is nothing to fence.
            lease.unlock();
        }
    }
}

/// The kernel's promise over a mapped file. It ends by [`Guard::release`] and in no other way: one
/// that is dropped keeps its lease (and the description with it) until the process ends, since
/// letting go without a fence is what this crate exists to prevent.
#[derive(Debug)]
#[must_use = "a guard that is dropped holds up everybody who wants the file"]
pub struct Guard {
    lease: Option<Arc<Lease>>,
    watch: Arc<Shared>,
}

/// How a release went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Released {
    /// Somebody wanted the file.
    pub broken: Option<BreakKind>,
    /// The kernel had taken the guard away before: a writer was let through when lease-break-time
    /// ran out. (After a reader's expiry the kernel keeps a read lease, which this can't tell.)
    pub lapsed: bool,
}

/// A release with another guard's fence.
#[derive(Debug, thiserror::Error)]
#[error("that fence belongs to another guard")]
pub struct WrongFence {
    /// Still held.
    pub guard: Guard,
    /// Still good for its own guard.
    pub fenced: Fenced,
}

impl Guard {
    fn lease(&self) -> &Arc<Lease> {
        self.lease.as_ref().expect("taken only by release(self) and drop")
    }

    /// Names this guard in [`Break`](crate::Break)s.
    pub fn id(&self) -> GuardId {
        self.lease().id
    }

    /// What holds the file still.
    pub fn tier(&self) -> GuardTier {
        self.lease().tier
    }

    /// Whether the guard holds. Asking makes the kernel apply an expiry that is due.
    pub fn state(&self) -> Result<GuardState> {
        let lease = self.lease();
        lease.state().map_err(|source| lease.description.failed("fcntl(F_GETLEASE)", source))
    }

    /// Whether the kernel has let somebody through on its own, because lease-break-time ran out. For
    /// a writer only: a reader's expiry leaves a read lease behind, which this can't tell.
    pub fn lapsed(&self) -> bool {
        self.lease().lapsed()
    }

    /// Lets the guard go: who waits for the file proceeds.
    pub fn release(mut self, fenced: Fenced) -> Result<Released, Box<WrongFence>> {
        if fenced.guard != self.id() {
            return Err(Box::new(WrongFence { guard: self, fenced }));
        }
        let lease = self.lease.take().expect("taken only here");
        self.watch.remove(&lease);
        let broken = match lease.state() {
            Ok(GuardState::Broken(kind)) => Some(kind),
            Ok(GuardState::Held) | Err(_) => None,
        };
        let lapsed = lease.lapsed();
        lease.unlock();
        Ok(Released { broken, lapsed })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            // Still watched and still locked: see the type's documentation.
            std::mem::forget(lease);
        }
    }
}
