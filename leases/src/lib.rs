//! Keeps a file's extents in place while they are mapped, and says when it no longer can.
//!
//! A storage program that lets hardware or another process use the blocks behind a mapping has one
//! problem: any local process may truncate the file meanwhile. Linux offers no lock against that,
//! but it does offer a *lease* (`F_SETLEASE`, fcntl(2)) and, since Linux 6.19, a *delegation*
//! (`F_SETDELEG`): the kernel tells the holder that somebody wants the file, and lets them wait
//! until the holder has let go, or until `/proc/sys/fs/lease-break-time` seconds are over. This
//! crate turns that into types whose order can't be got wrong:
//!
//! ```text
//!  Export ──locate──► Located ──open──► Description ──arm──► Armed ──map──► Guard + Mapping
//!                                                                             │       │ share
//!                                        Break ◄── Watcher                    │       ▼
//!                                                                             │     Share (held by
//!                                                          Fenced ◄──fence────┼───── a region)
//!                                                             │               │
//!                                                             └──► Guard::release
//! ```
//!
//! # A worked example
//!
//! A file is made and guarded, hardware gets a share of its mapping, and somebody empties it:
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use pinfold_leases::{BreakKind, Create, Export, GuardState, RelativePath, Watcher};
//!
//! # let folder = tempfile::tempdir()?;
//! let (watcher, breaks) = Watcher::start()?;
//! let export = Export::open(folder.path())?;
//! let _only_we = export.lock()?;
//! let create = Create { size: 1 << 20, mode: 0o600, dax: false };
//! let file = export.create(&RelativePath::parse("data")?, &create)?;
//!
//! // From here on the kernel tells us first.
//! let (guard, mapping) = file.arm(&watcher)?.map(1 << 20)?;
//! let undisturbed = || guard.state().is_ok_and(|state| state == GuardState::Held);
//! mapping.populate(0..1 << 20, undisturbed)?;
//! let share = mapping.share()?; // its address and length are for the hardware
//!
//! let path = folder.path().join("data");
//! let local_user = std::thread::spawn(move || std::fs::File::create(path));
//!
//! let news = breaks.recv()?; // the user waits, and the file is still whole
//! assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Writer));
//! assert_eq!(file.size()?, 1 << 20);
//! mapping.flush(0..1 << 20)?; // what the hardware wrote until now
//! let fenced = mapping.fence()?; // from here on it reaches nothing
//! let released = guard.release(fenced)?; // and the user proceeds
//! assert!(!released.lapsed, "because we let go, not because time ran out");
//! local_user.join().expect("no panic")?;
//! drop(share); // once the hardware has forgotten the addresses
//! # Ok(())
//! # }
//! ```
//!
//! # What there is to choose
//!
//! * [`Description::arm`] takes the strongest guard that the kernel has: everybody who wants the file
//!   waits until it is released.
//! * [`Guard::outwait`] leaves a reader to the kernel, which lets it through when lease-break-time is
//!   over and holds writers back as before ([`GuardState::ReadersPass`]).
//! * [`Description::arm_to_seal`] makes whoever would cut or move the file fail at once instead, and
//!   lets readers pass. It outlives a crash; [`Located::unseal`] lifts what is left then.
//! * [`Description::unguarded`] has the types and no guard.
//! * [`Description::arm_when_free`] waits for others to close the file.
//!
//! A DAX device (`/dev/dax0.0`) is an [`Export`] with one file, the device. Nobody can truncate it, so
//! it needs no guard ([`GuardTier::NotNeeded`]), and all else is as with files.
//!
//! # Order
//!
//! The order of a teardown is carried by types: [`Guard::release`] takes a [`Fenced`], which only
//! [`Mapping::fence`] makes, and [`Mapping::fenced_by_return`] once every share is back; the memory stays mapped until the [`Mapping`] and every [`Share`] of
//! it are gone. A guard can't be let go without a fence:
//!
//! ```compile_fail,E0061
//! fn too_early(guard: pinfold_leases::Guard) {
//!     guard.release(); // no `Fenced`, no release
//! }
//! ```
//!
//! nor with a fence that somebody made up:
//!
//! ```compile_fail,E0451
//! fn forged(guard: pinfold_leases::Guard, id: pinfold_leases::GuardId) {
//!     guard.release(pinfold_leases::Fenced { guard: id });
//! }
//! ```
//!
//! nor twice:
//!
//! ```compile_fail,E0382
//! fn twice(a: pinfold_leases::Guard, b: pinfold_leases::Guard, fenced: pinfold_leases::Fenced) {
//!     a.release(fenced);
//!     b.release(fenced);
//! }
//! ```
//!
//! and there is no call that unmaps: the last share does.
//!
//! ```compile_fail,E0599
//! fn unmap(mapping: pinfold_leases::Mapping) {
//!     mapping.unmap();
//! }
//! ```
//!
//! The crate knows nothing of RDMA, of networks or of any async runtime. `examples/hold.rs` holds
//! a file on any Linux and prints who wants it.
//!
//! # What a guard does not do
//!
//! A lease sees opens and truncate(2). It sees no unlink, no rename and no change of attributes (a
//! delegation does), and neither sees `fallocate` through a description that exists already; but a
//! guard is granted only while no other description does. And it fails open: after
//! `lease-break-time` the kernel lets the breaker through whatever the holder does. Who must not
//! be late fences well before ([`LeaseBreakTime`]).
//!
//! # Rights
//!
//! A guard needs the file's owner or CAP_LEASE; a seal the same and CAP_LINUX_IMMUTABLE; both write
//! permission. Everything else needs nothing.

mod create;
mod dax_device;
mod description;
mod door;
mod error;
mod export;
#[cfg(any(test, feature = "mutants"))]
pub mod fault;
mod guard;
mod layout;
mod lock;
mod mapping;
#[cfg(feature = "mutants")]
pub mod mutant;
mod names;
mod openers;
mod overlooked;
mod report;
mod resize;
mod seal;
mod sys;
mod wait;
mod watch;

pub use create::{Create, Unpublished};
pub use description::{Description, FileIdentity, FileTimes, MappingKind, WeakDescription};
pub use error::{Error, NoDaxDevice, NoOutwait, Result};
pub use export::{Entry, EntryKind, Export, Leftovers, Listing, Located, Page, RelativePath};
pub use guard::{Armed, Guard, GuardState, GuardTier, Released, WrongFence};
pub use layout::Layout;
pub use lock::{ExportLock, LockKind, RangeLock};
pub use mapping::{FenceFailed, Fenced, Mapping, PinnedShare, Share};
pub use names::{NameNews, NameState, NameWatch, NameWatcher};
pub use openers::{OpenMode, Opener, openers, waiting_breakers};
pub use resize::{GoOn, Progress, Resized, Under};
pub use seal::ArmedToSeal;
pub use wait::{Cancel, CloseWatch};
pub use watch::{Break, BreakKind, GuardId, Watcher};

use std::time::Duration;

const LEASE_BREAK_TIME: &str = "/proc/sys/fs/lease-break-time";

/// How long the kernel holds a breaker back: `/proc/sys/fs/lease-break-time`, kept open so that it
/// can still be read when no descriptor is left.
#[derive(Debug)]
pub struct LeaseBreakTime(std::fs::File);

impl LeaseBreakTime {
    /// Opens the setting.
    pub fn open() -> Result<Self> {
        let opened = std::fs::File::open(LEASE_BREAK_TIME);
        opened.map(Self).map_err(|source| Error::Sysctl { path: LEASE_BREAK_TIME, source })
    }

    /// What it is now; `None` means for ever (0 or less). To be asked at every break: root may
    /// change it at any time.
    pub fn read(&self) -> Result<Option<Duration>> {
        use std::os::unix::fs::FileExt;
        let failed = |source| Error::Sysctl { path: LEASE_BREAK_TIME, source };
        let mut text = [0; 32];
        let len = self.0.read_at(&mut text, 0).map_err(failed)?;
        let text = String::from_utf8_lossy(&text[..len]);
        let not_a_number = |_| failed(std::io::Error::other(format!("not a number: {text}")));
        let seconds: i64 = text.trim().parse().map_err(not_a_number)?;
        Ok(u64::try_from(seconds).ok().filter(|s| *s > 0).map(Duration::from_secs))
    }
}
