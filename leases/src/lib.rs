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
//! The order of a teardown is carried by types: [`Guard::release`] takes a [`Fenced`], which only
//! [`Mapping::fence`] makes; the memory stays mapped until the [`Mapping`] and every [`Share`] of
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

mod description;
mod error;
mod export;
mod guard;
mod layout;
mod lock;
mod mapping;
mod openers;
mod report;
mod seal;
mod sys;
mod wait;
mod watch;

pub use description::{Description, FileIdentity, MappingKind, WeakDescription};
pub use error::{Error, NoOutwait, Result};
pub use export::{Create, Entry, EntryKind, Export, Located, RelativePath};
pub use guard::{Armed, Guard, GuardState, GuardTier, Released, WrongFence};
pub use layout::Layout;
pub use lock::{ExportLock, LockKind, RangeLock};
pub use mapping::{FenceFailed, Fenced, Mapping, PinnedShare, Share};
pub use openers::{OpenMode, Opener, openers, waiting_breakers};
pub use seal::ArmedToSeal;
pub use wait::Cancel;
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
