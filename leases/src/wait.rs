//! Waiting until a file is free: woken by the kernel when somebody closes it.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use crate::description::Description;
use crate::error::{Error, Result};
use crate::export::Located;
use crate::guard::{Armed, GuardTier};
use crate::watch::Watcher;

/// The kernel tells of a close a moment before it counts the description as gone (`__fput`): so
/// after each one there are several tries, at growing distances.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// How often to try without being told: for what nobody tells (a lease that another process lets
/// go, a watch that the kernel refused).
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Ends waits from another thread. Clones are the same handle; a cancelled one stays so.
#[derive(Clone)]
pub struct Cancel(Arc<OwnedFd>);

impl fmt::Debug for Cancel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cancel").finish_non_exhaustive()
    }
}

impl Cancel {
    /// A new handle (eventfd(2)). Fails where no descriptor is left.
    pub fn new() -> Result<Self> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(|fd| Self(Arc::new(fd)))
            .map_err(|e| Error::Wait { call: "eventfd", source: e.into() })
    }

    /// Ends every wait with this handle, those to come too, with [`Error::Cancelled`].
    pub fn cancel(&self) {
        // It fails only when the counter is full, and then it is readable, which is what counts.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }
}

impl Description {
    /// As [`arm_at_most`](Self::arm_at_most), but waits while others have the file open: as soon as
    /// the last of them has closed it, it is guarded. Blocks the calling thread until `until` (then
    /// [`Error::Busy`] says who is in the way) or until `cancel` ends it.
    ///
    /// Who opens the file next isn't held up by a wait: the guard is tried for, not queued for.
    pub fn arm_when_free(
        &self,
        watcher: &Watcher,
        strongest: GuardTier,
        until: Instant,
        cancel: &Cancel,
    ) -> Result<Armed> {
        let link = format!("/proc/self/fd/{}", self.fd().as_raw_fd());
        Wait { until, cancel, longest: LONGEST_PAUSE }
            .for_success(&link, || self.arm_quietly(watcher, strongest))
            .map_err(|error| self.with_openers(error))
    }
}

impl Located {
    /// As [`open`](Self::open), but waits while another process holds the file by a lease of its
    /// own, which was told by this that we want it. `until` and `cancel` are as for
    /// [`Description::arm_when_free`].
    pub fn open_when_free(&self, until: Instant, cancel: &Cancel) -> Result<Description> {
        Wait { until, cancel, longest: LONGEST_PAUSE }.for_success(&self.link(), || self.open())
    }
}

/// Tells when somebody closes a file: readable from then on. For who waits in an event loop; a
/// thread has [`Description::arm_when_free`].
///
/// It opens nothing, so it breaks no lease; a mapping counts as open until it is unmapped. A close is
/// told a moment before the kernel counts the description as gone, so one try right after it is not
/// enough.
#[derive(Debug)]
pub struct CloseWatch(OwnedFd);

impl CloseWatch {
    /// Forgets what it has told.
    pub fn drain(&self) {
        // Which events they were doesn't matter.
        while rustix::io::read(&self.0, &mut [0u8; 4096]).is_ok_and(|len| len > 0) {}
    }
}

impl AsFd for CloseWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for CloseWatch {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Located {
    /// Watches for closes of the file (inotify(7)). `None` without the right to read the file, or
    /// with the user's watches used up.
    pub fn watch_closes(&self) -> Option<CloseWatch> {
        Closes::watch(&self.link()).0.map(CloseWatch)
    }
}

struct Wait<'a> {
    until: Instant,
    cancel: &'a Cancel,
    longest: Duration,
}

/// What ended a pause.
enum Woken {
    Closed,
    Cancelled,
    Timeout,
}

impl Wait<'_> {
    /// Tries until it is not [`Error::Busy`] any more.
    fn for_success<T>(&self, link: &str, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
        // Before the first try, so that no close falls between try and wait.
        let closes = Closes::watch(link);
        let mut pause = self.longest;
        loop {
            let busy = match attempt() {
                Err(Error::Busy { path, openers }) => Error::Busy { path, openers },
                result => return result,
            };
            let left = self.until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(busy);
            }
            match closes.pause(pause.min(left), self.cancel)? {
                Woken::Closed => pause = SHORTEST_PAUSE,
                Woken::Timeout => pause = (pause * 2).min(self.longest),
                Woken::Cancelled => return Err(cancelled(busy)),
            }
        }
    }
}

fn cancelled(busy: Error) -> Error {
    match busy {
        Error::Busy { path, .. } => Error::Cancelled { path },
        error => error,
    }
}

/// Tells when somebody closes an inode (inotify(7)). It opens nothing, so it breaks no lease; a
/// mapping counts as open until it is unmapped.
struct Closes(Option<OwnedFd>);

impl Closes {
    /// Without the right to read the file, or with the user's watches used up, it tells nothing.
    fn watch(link: &str) -> Self {
        let watch = || {
            let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            let events = WatchFlags::CLOSE_WRITE | WatchFlags::CLOSE_NOWRITE;
            inotify::add_watch(&fd, link, events)?;
            rustix::io::Result::Ok(fd)
        };
        Self(watch().ok())
    }

    fn pause(&self, pause: Duration, cancel: &Cancel) -> Result<Woken> {
        let cancel = cancel.0.as_fd();
        let mut waited_for = vec![PollFd::from_borrowed_fd(cancel, PollFlags::IN)];
        waited_for.extend(self.0.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = Timespec {
            tv_sec: pause.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: pause.subsec_nanos().into(),
        };
        match poll(&mut waited_for, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => return Ok(Woken::Timeout),
            Ok(_) => {}
            Err(e) => return Err(Error::Wait { call: "poll", source: e.into() }),
        }
        if !waited_for[0].revents().is_empty() {
            return Ok(Woken::Cancelled);
        }
        self.drain();
        Ok(Woken::Closed)
    }

    /// Which events they were doesn't matter.
    fn drain(&self) {
        let Some(fd) = &self.0 else { return };
        while rustix::io::read(fd, &mut [0u8; 4096]).is_ok_and(|len| len > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    /// Only a hang reaches it.
    const DEADLINE: Duration = Duration::from_secs(30);

    #[test]
    fn a_watch_tells_of_closes_and_of_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let open = std::fs::File::create(&path).unwrap();
        let export = crate::Export::open(folder.path()).unwrap();
        let located = export.locate(&crate::RelativePath::parse("file").unwrap()).unwrap();
        let watch = located.watch_closes().unwrap();
        let has_told = || {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            poll(&mut [PollFd::new(&watch, PollFlags::IN)], Some(&now)).unwrap() == 1
        };
        let _reading = std::fs::File::open(&path).unwrap();
        assert!(!has_told());
        drop(open);
        assert!(has_told());
        watch.drain();
        assert!(!has_told());
    }

    #[test]
    fn a_close_wakes_the_wait_though_nobody_polls() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let link = file.path().to_str().unwrap().to_owned();
        let open = std::fs::File::open(file.path()).unwrap();
        let cancel = Cancel::new().unwrap();
        // Polling would come after the deadline.
        let wait =
            Wait { until: Instant::now() + DEADLINE, cancel: &cancel, longest: DEADLINE * 2 };
        let (tried, first_try) = channel();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let mut tries = 0;
                wait.for_success(&link, || {
                    tries += 1;
                    tried.send(()).unwrap();
                    let path = link.clone().into();
                    if tries > 1 { Ok(()) } else { Err(Error::Busy { path, openers: vec![] }) }
                })
            });
            first_try.recv().unwrap();
            drop(open);
            waiter.join().unwrap().unwrap();
        });
        assert!(wait.until > Instant::now());
    }
}
