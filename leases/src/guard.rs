//! The kernel's promise to tell us first, from arming it to letting it go.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::LeaseBreakTime;
use crate::description::Description;
use crate::error::{Error, NoOutwait, Result};
use crate::mapping::{Fenced, Mapping, unmap_what_is_left};
use crate::openers::{self, OwnKind, OwnLease, openers};
use crate::seal;
use crate::sys::{self, LeaseType};
use crate::watch::{BreakKind, GuardId, Shared, Watcher};

/// How often a delegation is asked for again when the kernel's inode lock is busy for a moment.
const DELEGATION_TRIES: u32 = 20;

/// What holds the file still; the later, the stronger.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum GuardTier {
    /// Nothing: made only by [`Description::unguarded`], for who asks for it by name.
    Unguarded,
    /// `F_SETLEASE`: opens and truncate(2) wait. Unlink, rename, link and attribute changes don't.
    Lease,
    /// A [`Delegation`](Self::Delegation) that the kernel has downgraded for a reader whom nobody
    /// let through: readers pass, whoever would change the file or its name still waits.
    ReadDelegation,
    /// `F_SETDELEG`, Linux 6.19: those wait too, and nfsd's changes of size.
    Delegation,
    /// The append-only flag (`FS_APPEND_FL`, ioctl_iflags(2)), set over the mapping: shrinking,
    /// punching, unlinking, renaming and linking fail at once with EPERM, for root too, and readers
    /// pass. Outlives a crash.
    Sealed,
    /// Nothing, and nothing is needed: a DAX device, which nobody can cut.
    NotNeeded,
}

impl fmt::Display for GuardTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GuardTier::Unguarded => "unguarded",
            GuardTier::Lease => "lease",
            GuardTier::ReadDelegation => "delegation (read)",
            GuardTier::Delegation => "delegation",
            GuardTier::Sealed => "sealed",
            GuardTier::NotNeeded => "not needed",
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
    /// A reader waited for as long as lease-break-time and was let through by the kernel, which has
    /// downgraded the delegation: readers pass from now on, and writers are held back and reported
    /// as before. For a plain lease this is [`Broken`](Self::Broken), since a downgraded lease lets
    /// `open(O_RDONLY|O_TRUNC)` through without a word.
    ReadersPass,
}

/// What guard and armed file share: the armed kernel lease, which is let go only through
/// [`Lease::unlock`], never by being dropped.
#[derive(Debug)]
pub(crate) struct Lease {
    pub(crate) id: GuardId,
    pub(crate) tier: GuardTier,
    pub(crate) description: Description,
    /// Somebody waits for it whom the kernel has not told us of.
    pub(crate) overlooked: AtomicBool,
}

impl Lease {
    fn new(id: GuardId, tier: GuardTier, description: &Description) -> Self {
        let overlooked = AtomicBool::new(false);
        Self { id, tier, description: description.clone(), overlooked }
    }

    pub(crate) fn state(&self) -> io::Result<GuardState> {
        let told = self.state_in_kernel()?;
        let overlooked = self.overlooked.load(Ordering::Relaxed);
        Ok(if overlooked { GuardState::Broken(BreakKind::Writer) } else { told })
    }

    fn state_in_kernel(&self) -> io::Result<GuardState> {
        let held = match self.tier {
            GuardTier::Unguarded | GuardTier::NotNeeded => return Ok(GuardState::Held),
            GuardTier::Sealed => return self.state_of_seal(),
            GuardTier::Lease | GuardTier::Delegation | GuardTier::ReadDelegation => {
                self.kind_in_kernel()?
            }
        };
        Ok(match held {
            LeaseType::Write => GuardState::Held,
            LeaseType::Read if self.tier > GuardTier::Lease && self.downgraded() => {
                GuardState::ReadersPass
            }
            LeaseType::Read => GuardState::Broken(BreakKind::Reader),
            LeaseType::None => GuardState::Broken(BreakKind::Writer),
        })
    }

    /// Without the flag anybody may have cut the file already.
    fn state_of_seal(&self) -> io::Result<GuardState> {
        let sealed = seal::is_append_only(self.description.fd())?;
        Ok(if sealed { GuardState::Held } else { GuardState::Broken(BreakKind::Writer) })
    }

    fn is_kernel_lease(&self) -> bool {
        !matches!(self.tier, GuardTier::Unguarded | GuardTier::Sealed | GuardTier::NotNeeded)
    }

    /// Whether the kernel has downgraded the lease for a reader. If that can't be learned, it has
    /// not: the caller takes it for a break, which is the safe side.
    fn downgraded(&self) -> bool {
        openers::own_lease(self.description.fd())
            .is_some_and(|lease| lease == OwnLease { breaking: false, kind: OwnKind::Read })
    }

    /// Whether the kernel has let somebody through: for a writer it takes the lease away and wipes
    /// the signal, for a reader it downgrades it.
    fn lapsed(&self) -> bool {
        match self.tier {
            GuardTier::Unguarded | GuardTier::NotNeeded => false,
            GuardTier::Sealed => self.state_of_seal().is_ok_and(|state| state != GuardState::Held),
            _ => {
                // /proc tells more, and takes longer: it is asked only where there may be more.
                let may_be_downgraded =
                    self.kind_in_kernel().map_or(true, |kind| kind == LeaseType::Read);
                sys::signal_get(self.description.fd()).is_ok_and(|signal| signal == 0)
                    || (may_be_downgraded && self.downgraded())
            }
        }
    }

    /// As which the kernel has it now, or will once the one who waits is let through. Asking applies an
    /// expiry that is due.
    fn kind_in_kernel(&self) -> io::Result<LeaseType> {
        let fd = self.description.fd();
        match self.tier {
            GuardTier::Delegation | GuardTier::ReadDelegation => sys::delegation_get(fd),
            _ => sys::lease_get(fd),
        }
    }

    /// Lets the kernel's lease go, and keeps the right to arm.
    fn unlock(&self) {
        // A failure means that it has lapsed: there is nothing left to unlock then.
        let _ = match self.tier {
            GuardTier::Unguarded | GuardTier::Sealed | GuardTier::NotNeeded => Ok(()),
            GuardTier::Lease => sys::lease_set(self.description.fd(), LeaseType::None),
            GuardTier::Delegation | GuardTier::ReadDelegation => {
                sys::delegation_set(self.description.fd(), LeaseType::None)
            }
        };
    }

    /// Lets the lease go, and with it the right to arm.
    fn let_go(&self) {
        self.unlock();
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
    /// A DAX device can be cut by nobody: it gets [`GuardTier::NotNeeded`], whatever is asked for.
    ///
    /// May come again on the same description after a release, also while an older, fenced mapping
    /// of it lives.
    pub fn arm(&self, watcher: &Watcher) -> Result<Armed> {
        self.arm_at_most(watcher, GuardTier::Delegation)
    }

    /// As [`arm`](Self::arm), but asks for nothing stronger than `strongest`, for who wants names
    /// and attributes of the file to stay free. ([`GuardTier::Sealed`] comes by
    /// [`arm_to_seal`](Self::arm_to_seal) alone; here it asks for a delegation.)
    pub fn arm_at_most(&self, watcher: &Watcher, strongest: GuardTier) -> Result<Armed> {
        self.arm_quietly(watcher, strongest).map_err(|error| self.with_openers(error))
    }

    /// No guard at all: the file stays as free as if it weren't mapped, and no break is ever
    /// reported. Everything else is as with a guard, the fence before a release too.
    ///
    /// What it costs: a truncate is seen by nobody. On fs-DAX hardware that follows page tables
    /// gets an access error then; on shared memory with pinned pages its writes vanish without a
    /// word. It is what is left for hugetlbfs, which takes no lease.
    pub fn unguarded(&self, watcher: &Watcher) -> Result<Armed> {
        self.claim_to_arm()?;
        let tier = match self.device() {
            Some(_) => GuardTier::NotNeeded,
            None => GuardTier::Unguarded,
        };
        Ok(self.armed(watcher.shared(), tier))
    }

    fn claim_to_arm(&self) -> Result<()> {
        // Setting a lease that is there already would succeed and, over a pending break, never
        // signal again: it must have been unlocked first.
        let free = self.claim();
        if free { Ok(()) } else { Err(Error::AlreadyArmed { path: self.path().to_owned() }) }
    }

    fn armed(&self, watch: &Arc<Shared>, tier: GuardTier) -> Armed {
        let lease = Arc::new(Lease::new(watch.next_id(), tier, self));
        if lease.is_kernel_lease() {
            watch.add(Arc::clone(&lease));
        }
        Armed { lease: Some(lease), watch: Arc::clone(watch) }
    }

    /// As [`arm_at_most`](Self::arm_at_most), but who is in the way is not looked up.
    pub(crate) fn arm_quietly(&self, watcher: &Watcher, strongest: GuardTier) -> Result<Armed> {
        if strongest == GuardTier::Unguarded || self.device().is_some() {
            return self.unguarded(watcher);
        }
        let watch = watcher.shared();
        // An old mapping of the file may stand in the way of a guard.
        unmap_what_is_left();
        self.claim_to_arm()?;
        let tier = self
            .prepare(watch.thread())
            .and_then(|()| self.set_strongest(strongest))
            .inspect_err(|_| self.disclaim())?;
        let armed = self.armed(watch, tier);
        // A break between arming and `add` had no entry to be matched with.
        armed.demand_held()?;
        Ok(armed)
    }

    /// Looks up who is in the way.
    pub(crate) fn with_openers(&self, error: Error) -> Error {
        match error {
            Error::Busy { path, .. } => {
                Error::Busy { path, openers: openers(self.identity(), Some(self)) }
            }
            error => error,
        }
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

    pub(crate) fn not_guarded(&self, call: &'static str, source: io::Error) -> Error {
        let path = self.path().to_owned();
        match source.raw_os_error() {
            Some(libc::EAGAIN | libc::EBUSY) => Error::Busy { path, openers: Vec::new() },
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

    pub(crate) fn description(&self) -> &Description {
        &self.lease().description
    }

    /// Whether the kernel has let somebody in on its own, because lease-break-time ran out.
    pub(crate) fn lapsed(&self) -> bool {
        self.lease().lapsed()
    }

    pub(crate) fn demand_held(&self) -> Result<()> {
        match self.lease().state() {
            Ok(GuardState::Held) => Ok(()),
            Ok(GuardState::Broken(_) | GuardState::ReadersPass) => Err(Error::Broken),
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

    /// Puts the append-only flag in the lease's place, over a mapping that nobody else has yet.
    pub(crate) fn map_sealed(mut self, len: u64) -> Result<(Guard, Mapping)> {
        let description = &self.lease().description;
        let sealed = Lease::new(self.watch.next_id(), GuardTier::Sealed, description);
        let mapping = Mapping::new(&sealed.description, sealed.id, len)?;
        seal::set_flag(&sealed.description)?;
        // Who asked before the flag was there goes through as soon as the lease is gone.
        std::thread::sleep(seal::SETTLE);
        if let Err(error) = self.demand_no_writer() {
            seal::clear_flag(&sealed.description)?;
            return Err(error);
        }
        let lease = self.lease.take().expect("taken only here");
        self.watch.remove(&lease);
        lease.unlock();
        let sealed = Arc::new(sealed);
        self.watch.add(Arc::clone(&sealed));
        Ok((Guard { lease: Some(sealed), watch: Arc::clone(&self.watch) }, mapping))
    }

    /// A reader does no harm to a seal.
    fn demand_no_writer(&self) -> Result<()> {
        match self.lease().state() {
            Ok(GuardState::Broken(BreakKind::Writer)) => Err(Error::Broken),
            _ => Ok(()),
        }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            self.watch.remove(&lease);
            // Nothing is mapped, so there is nothing to fence.
            lease.let_go();
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
    /// Somebody wanted the file: who waits for it now, or was let through by the kernel. If a
    /// reader was let through and a writer waits now, the writer.
    pub broken: Option<BreakKind>,
    /// The kernel had let the one in `broken` through before, because lease-break-time ran out: a
    /// writer by taking the guard away, a reader by downgrading it. Of a seal: its flag was gone.
    pub lapsed: bool,
    /// The append-only flag of a seal could not be cleared, so the file stays as it is until
    /// [`Located::unseal`](crate::Located::unseal), which says why.
    pub still_sealed: bool,
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

    /// What holds the file still now: a delegation that was downgraded for a reader says so.
    pub fn tier(&self) -> GuardTier {
        match self.lease().tier {
            GuardTier::Delegation if self.readers_pass() => GuardTier::ReadDelegation,
            tier => tier,
        }
    }

    fn readers_pass(&self) -> bool {
        matches!(self.lease().state(), Ok(GuardState::ReadersPass))
    }

    /// Whether a reader may be left to the kernel here: after the returned time it downgrades the
    /// delegation and lets the reader through, and the mapping lives on; [`state`](Self::state) is
    /// [`ReadersPass`](GuardState::ReadersPass) then. To be asked at every
    /// [`Break`](crate::Break) by a reader, at once: the kernel's clock has started with the
    /// setting of that moment. Whoever still finds it broken a while after that time fences and
    /// releases: the setting was changed in between.
    ///
    /// Refused with [`Error::CannotOutwait`] unless the guard is a delegation, and while
    /// lease-break-time is 0 (the reader would wait for ever) or above `longest`.
    pub fn outwait(&self, limit: &LeaseBreakTime, longest: Duration) -> Result<Duration> {
        let path = &self.lease().description.path();
        let refuse = |why| Err(Error::CannotOutwait { path: path.to_path_buf(), why });
        if self.lease().tier != GuardTier::Delegation {
            return refuse(NoOutwait::NotADelegation { tier: self.lease().tier });
        }
        match limit.read()? {
            None => refuse(NoOutwait::Never),
            Some(time) if time > longest => refuse(NoOutwait::TooLong { time, longest }),
            Some(time) => Ok(time),
        }
    }

    /// Whether the guard holds. Asking makes the kernel apply an expiry that is due.
    pub fn state(&self) -> Result<GuardState> {
        let lease = self.lease();
        lease.state().map_err(|source| lease.description.failed("fcntl(F_GETLEASE)", source))
    }

    /// Whether the kernel has let somebody through on its own, because lease-break-time ran out: see
    /// [`Released::lapsed`].
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
        // Before `lapsed`: asking applies an expiry that is due.
        let broken = match lease.state() {
            Ok(GuardState::Broken(kind)) => Some(kind),
            Ok(GuardState::ReadersPass) => Some(BreakKind::Reader),
            Ok(GuardState::Held) | Err(_) => None,
        };
        let lapsed = lease.lapsed();
        if broken.is_some() {
            self.watch.let_go_for_somebody(&lease);
        }
        // Tried twice: else what fails in passing would leave the file append-only.
        let still_sealed = lease.tier == GuardTier::Sealed
            && (0..2).all(|_| seal::lift(&lease.description).is_err());
        lease.let_go();
        #[cfg(feature = "mutants")]
        if broken.is_some() {
            crate::mutant::pause();
        }
        Ok(Released { broken, lapsed, still_sealed })
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
