//! The one thread that hears the kernel's breaks.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::guard::{GuardTier, Lease};
use crate::openers;
use crate::overlooked::{Vigil, overlooked};
use crate::report::Told;
use crate::sys::{self, Signal, WatchedSignals};

/// How often all guards are looked at even if no signal came. A net under the signals, not the way
/// breaks are found.
const RESCAN: Duration = Duration::from_secs(1);

/// How often the flags of sealed files are looked at: the kernel sends no signal for them.
const SEAL_CHECK: Duration = Duration::from_secs(2);

/// Names one arming of one file within this process; never used again.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct GuardId(u64);

impl GuardId {
    /// A name without a guard, for simulations of code that handles breaks. It opens nothing: what
    /// counts for a release is the [`Fenced`](crate::Fenced).
    pub fn simulated(number: u64) -> Self {
        Self(number)
    }
}

impl fmt::Display for GuardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guard {}", self.0)
    }
}

/// What the breaker wants.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum BreakKind {
    /// To open the file for reading. Beware: `open(O_RDONLY|O_TRUNC)` counts as a reader too.
    Reader,
    /// To truncate it, to open it for writing, or, under a delegation, to unlink, rename, link or
    /// change it.
    Writer,
}

/// Somebody wants a guarded file and waits.
#[derive(Clone, Copy, Debug)]
pub struct Break {
    /// Which guard.
    pub guard: GuardId,
    /// What they want.
    pub kind: BreakKind,
    /// When the signal arrived here. The kernel's clock started a moment before.
    pub at: Instant,
}

/// Hears breaks on a thread of its own, with its own signal mask: nothing is asked of the
/// program's main. Each break of a guard is reported once, and once more if a writer comes after a
/// reader. The watcher must outlive the guards that it watches; when it is dropped, they are no
/// longer heard.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    thread: libc::pid_t,
    stop: AtomicBool,
    ids: AtomicU64,
    entries: Mutex<HashMap<RawFd, Entry>>,
    vigil: Vigil,
}

#[derive(Debug)]
struct Entry {
    lease: Arc<Lease>,
    told: Told,
    /// It came soon after a release: somebody may wait for it of whom the kernel doesn't tell.
    doubtful: bool,
}

impl Watcher {
    /// Starts the thread. Breaks come out of the receiver; one may name a guard that
    /// [`Description::arm`](crate::Description::arm) refused with [`Error::Broken`].
    ///
    /// A panic of the thread ends the process: unheard breaks would let breakers through while
    /// hardware still writes.
    pub fn start() -> Result<(Self, Receiver<Break>)> {
        Self::start_rescanning(RESCAN)
    }

    /// As [`Watcher::start`], with another interval between two looks at all guards. Sealed files
    /// are looked at every two seconds all the same.
    pub fn start_rescanning(every: Duration) -> Result<(Self, Receiver<Break>)> {
        let (breaks, receiver) = channel();
        let (ready, started) = channel();
        let found = breaks.clone();
        let hears = spawn("pinfold-breaks", move || run(&ready, &breaks, every))?;
        let shared = started
            .recv()
            .map_err(io::Error::other)
            .and_then(|result| result)
            .map_err(|source| Error::Watcher { source })?;
        let mut watcher = Self { shared: Arc::clone(&shared), threads: vec![hears] };
        watcher.threads.push(spawn("pinfold-vigil", move || shared.keep_vigil(&found))?);
        Ok((watcher, receiver))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.vigil.end();
        sys::wake_thread(self.shared.thread);
        for thread in self.threads.drain(..) {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

/// Ends the process when its thread panics.
struct Vital;

impl Drop for Vital {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let vital = move || {
        let _vital = Vital;
        #[cfg(any(test, feature = "mutants"))]
        crate::fault::spare_this_thread();
        work();
    };
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(vital).map_err(|source| Error::Watcher { source })
}

fn run(ready: &Sender<io::Result<Arc<Shared>>>, breaks: &Sender<Break>, every: Duration) {
    // Before anybody can name this thread as a signal's owner, it must have them blocked.
    let signals = match WatchedSignals::block_in_this_thread() {
        Ok(signals) => signals,
        Err(error) => return drop(ready.send(Err(error))),
    };
    let shared = Arc::new(Shared {
        thread: sys::thread_id(),
        stop: AtomicBool::new(false),
        ids: AtomicU64::new(1),
        entries: Mutex::default(),
        vigil: Vigil::new(Instant::now()),
    });
    if ready.send(Ok(Arc::clone(&shared))).is_err() {
        return;
    }
    let mut rescan_at = Instant::now() + every;
    let mut check_seals_at = Instant::now() + SEAL_CHECK;
    while !shared.stop.load(Ordering::SeqCst) {
        let next = rescan_at.min(check_seals_at);
        match signals.wait(next.saturating_duration_since(Instant::now())) {
            Ok(Signal::Break(fd)) => shared.look_at(fd, breaks),
            Ok(Signal::Overflow) => shared.rescan(breaks),
            Ok(Signal::Timeout | Signal::Other) => {}
            // sigtimedwait fails only for arguments that are wrong, and ours don't change.
            Err(error) => panic!("waiting for lease breaks: {error}"),
        }
        // By the clock, not by the quiet: signals that keep coming don't put it off.
        if Instant::now() >= rescan_at {
            shared.rescan(breaks);
            rescan_at = Instant::now() + every;
        }
        if Instant::now() >= check_seals_at {
            shared.check_seals(breaks);
            check_seals_at = Instant::now() + SEAL_CHECK;
        }
    }
}

impl Shared {
    pub(crate) fn next_id(&self) -> GuardId {
        GuardId(self.ids.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn thread(&self) -> libc::pid_t {
        self.thread
    }

    pub(crate) fn add(&self, lease: Arc<Lease>) {
        let fd = lease.description.fd().as_raw_fd();
        // Taken first: a look that comes because of it waits, and finds it.
        let mut entries = self.entries();
        let doubtful =
            lease.tier == GuardTier::Delegation && self.vigil.guarded(lease.description.identity());
        entries.insert(fd, Entry { lease, told: Told::default(), doubtful });
    }

    /// To be called before it is let go.
    pub(crate) fn let_go_for_somebody(&self, lease: &Lease) {
        if lease.tier == GuardTier::Delegation {
            self.vigil.let_go(lease.description.identity());
        }
    }

    pub(crate) fn remove(&self, lease: &Lease) {
        let fd = lease.description.fd().as_raw_fd();
        let mut entries = self.entries();
        // The description may have been armed again since.
        if entries.get(&fd).is_some_and(|entry| entry.lease.id == lease.id) {
            entries.remove(&fd);
        }
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<RawFd, Entry>> {
        // No code that holds it can leave the map half-changed.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_at(&self, fd: RawFd, breaks: &Sender<Break>) {
        // No entry: a signal that was under way while its guard was released.
        if let Some(entry) = self.entries().get_mut(&fd) {
            entry.report(breaks);
        }
    }

    fn keep_vigil(&self, breaks: &Sender<Break>) {
        self.vigil.run(|| {
            let doubtful = |entry: &Entry| entry.doubtful;
            if !self.entries().values().any(doubtful) {
                return false;
            }
            // Not under the lock: it may take long.
            let locks = openers::locks();
            for inode in overlooked(&locks) {
                self.tell_of_overlooked(inode, breaks);
            }
            true
        });
    }

    fn tell_of_overlooked(&self, inode: &str, breaks: &Sender<Break>) {
        for entry in self.entries().values_mut() {
            let description = &entry.lease.description;
            if entry.doubtful && openers::is_inode(description, inode) {
                entry.lease.overlooked.store(true, Ordering::Relaxed);
                entry.report(breaks);
            }
        }
    }

    fn check_seals(&self, breaks: &Sender<Break>) {
        for entry in self.entries().values_mut() {
            if entry.lease.tier == GuardTier::Sealed {
                entry.report(breaks);
            }
        }
    }

    fn rescan(&self, breaks: &Sender<Break>) {
        for entry in self.entries().values_mut() {
            entry.report(breaks);
        }
    }
}

impl Entry {
    fn report(&mut self, breaks: &Sender<Break>) {
        if let Some(kind) = self.told.see(self.lease.state().ok()) {
            // Nobody listens any more: the program is ending.
            let _ = breaks.send(Break { guard: self.lease.id, kind, at: Instant::now() });
        }
    }
}
