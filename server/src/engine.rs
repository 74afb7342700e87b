//! Performs what the registry decides, against leases and verbs.
//!
//! A break travels: watcher thread → notice thread → registry → notices to the sessions and a
//! deadline in the fence thread's queue → (all drained, or the deadline) → fence → release →
//! teardown thread (deregister, unmap) → audit record. No step up to the release waits for a
//! client, for the async runtime, or for another file.
//!
//! Here are the engine's parts, its threads and how actions are carried out; `sessions`, `files`
//! and `pins` hold what clients ask for, `revocation` what the kernel does.

mod commits;
mod ending;
mod exports;
mod files;
mod inspection;
mod names;
mod obstacles;
mod pins;
mod reads;
mod revocation;

pub(crate) use revocation::drain_budget;
mod sessions;
mod sizes;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use pinfold_leases::{
    Fenced, FileIdentity, GuardId, LeaseBreakTime, NameWatch, NameWatcher, Watcher, WeakDescription,
};
use pinfold_proto::v1;
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore, broadcast, mpsc, oneshot};

use crate::breakers::{Breaks, Looks};
use crate::config::{Config, DeviceChoice};
use crate::error::Result;
use crate::fabric::{Fabric, Link, Severed};
use crate::fence::{self, Order};
use crate::gate::Gate;
use crate::held::HeldFile;
use crate::ids::{PinId, SessionId};
use crate::ladder::Ladder;
use crate::passage::Passages;
use crate::pool::Pool;
use crate::registry::{Action, Limits, Record, Registry};
use crate::revocation_cost::{Budget, host_memory, usual_memory_limit};
use crate::room::{self, Room};
use crate::session::Outbox;
use crate::state::{LifeBook, StateFolder, first_incarnation};
use crate::sync::locked;
use exports::{Opened, Served};

pub(crate) use files::PageOrder;
pub(crate) use pins::{Granted, PinOrder, StreamPiece, TransportWish};
pub(crate) use sizes::Caller;

/// How long a new pin waits for the revocation of an earlier guarding.
const PATIENCE: Duration = Duration::from_secs(10);
/// Revocation records that a slow watcher may be behind.
const RECORDS_KEPT: usize = 256;
/// Queue pairs that are connected at a time: the kernel may take a second to resolve an address.
const CONNECTING_AT_A_TIME: usize = 8;
/// How long an unpin is waited for; it goes on after that.
const UNPIN_AT_MOST: Duration = Duration::from_secs(60);
/// Pages of what operators see that are made at a time.
const OPERATORS_AT_A_TIME: usize = 2;
/// How long one may take.
const INSPECT_AT_MOST: Duration = Duration::from_secs(30);
/// Threads of a server without an export.
const THREADS_OF_ITS_OWN: usize = 64;
/// How long connecting one may take.
const CONNECT_AT_MOST: Duration = Duration::from_secs(60);
/// Pins that wait for others to close a file.
const PINS_WAITING_AT_A_TIME: usize = 64;

/// Threads that stop queue pairs, which waits for no write.
const SEVERING_THREADS: usize = 2;
/// Threads that destroy queue pairs that have stopped, a session's on one: it hangs with a write that hangs
/// in a fault.
const DESTROYING_THREADS: usize = 8;

/// Files that are taken back on a worker of the runtime before other tasks get their turn, such as those
/// that carry notices to the clients.
const FILES_PER_TURN: usize = 64;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Engine {
    me: Weak<Self>,
    registry: Mutex<Registry>,
    lease_break_time: LeaseBreakTime,
    exports: BTreeMap<String, Served>,
    fabrics: Vec<Arc<Fabric>>,
    /// The operator wants no device.
    rdma_declined: bool,
    watcher: Watcher,
    name_watcher: NameWatcher,
    fences: Sender<Order>,
    ladder: Ladder,
    teardowns: Sender<Retired>,
    severances: Sender<Severance>,
    /// Sealed files that are fenced: letting them go writes to their file system.
    unseals: Sender<Cut>,
    /// Where queue pairs are connected.
    connecting: Pool,
    /// What operators ask for, which waits for no file system.
    operators: Pool,
    /// So many pins at most wait for others to close a file: each looks again and again.
    waiting_pins: Arc<Semaphore>,
    limits: Limits,
    room: Room,
    region_budget: Arc<Budget>,
    sessions: Mutex<HashMap<SessionId, Arc<SessionParts>>>,
    files: Mutex<HashMap<GuardId, Arc<HeldFile>>>,
    inodes: Mutex<HashMap<FileIdentity, Inode>>,
    passages: Mutex<Passages>,
    /// Of files that are left alone for somebody who did not wait.
    visits: Mutex<HashMap<FileIdentity, NameWatch>>,
    lives: LifeBook,
    breaks: Mutex<Breaks>,
    looks: Mutex<Looks>,
    /// Pins that end while a stream transfer of theirs is inside the kernel: the last one out orders the rest.
    leaving: Mutex<HashMap<(GuardId, PinId), Leaving>>,
    /// Sessions that are over, as long as something of them is left.
    ended: Mutex<HashMap<SessionId, Weak<SessionParts>>>,
    retired: Notify,
    records: broadcast::Sender<v1::RevocationRecord>,
}

/// What outlives one guarding of an inode.
#[derive(Clone, Debug, Default)]
struct Inode {
    /// Opening, guarding and resizing take turns.
    turn: Arc<AsyncMutex<()>>,
    /// While an old mapping lives, only its own description can be guarded again.
    description: Option<WeakDescription>,
    /// Of earlier guardings that were let go while stream writes were inside the kernel.
    left_behind: Vec<Arc<Gate>>,
}

#[derive(Debug)]
struct SessionParts {
    outbox: Outbox,
    link: Mutex<Option<Link>>,
    /// The name of the device, for who must not wait until the kernel has connected to it.
    device: OnceLock<String>,
    /// When the session made its last call, apart from its stream.
    last_call: Mutex<Instant>,
    /// Connecting may block in the kernel; one at a time.
    connecting: Arc<AsyncMutex<()>>,
    /// Numbers of pin requests that nobody waits for any more: the newest.
    withdrawn: Mutex<BTreeSet<u64>>,
}

/// Queue pairs that are to be destroyed.
#[derive(Debug)]
struct Severance {
    queue_pairs: Severed,
    /// The session's stream ends when the last of these goes, and a client takes its end for the end of its
    /// keys.
    _parts: Arc<SessionParts>,
    /// Closed when it is done.
    _done: Option<mpsc::Sender<Infallible>>,
}

/// What is left to do for a pin that has ended.
#[derive(Debug)]
struct Leaving {
    /// As in [`Severance`].
    parts: Option<Arc<SessionParts>>,
    /// Told when its keys are dead.
    done: Option<oneshot::Sender<()>>,
}

/// A file that is fenced, and is to be let go.
#[derive(Debug)]
struct Cut {
    file: Arc<HeldFile>,
    fenced: Fenced,
    late_stream_writes: usize,
}

/// A file whose guard was let go, for the thread that takes it down.
#[derive(Debug)]
struct Retired {
    file: Arc<HeldFile>,
    record: Option<Record>,
    late_stream_writes: usize,
}

impl Engine {
    /// Opens the exports and the device, and starts the threads. Blocks for the device's self-test.
    pub(crate) fn start(config: &Config) -> Result<Arc<Self>> {
        let opened = Opened::all(config)?;
        let fabrics = Fabric::open_all(&config.rdma_devices)?.into_iter().map(Arc::new).collect();
        let (watcher, breaks) = Watcher::start()?;
        let (fences, orders) = fence::queue();
        room::demand_to_start(THREADS_OF_ITS_OWN + opened.threads()?)?;
        let exports = opened.start(&fences)?;
        let ladder = Ladder::start(&fences)?;
        let operators = Pool::start("pinfold-operator", OPERATORS_AT_A_TIME, INSPECT_AT_MOST)?;
        let connecting = Pool::start("pinfold-connect", CONNECTING_AT_A_TIME, CONNECT_AT_MOST)?;
        let (teardowns, retired_files) = channel();
        let (severances, severed) = channel();
        let (unseals, sealed) = channel();
        let lease_break_time = LeaseBreakTime::open()?;
        let state = config.state_folder.as_deref().map(StateFolder::open).transpose()?;
        let incarnation = state
            .as_ref()
            .map_or_else(|| Ok(first_incarnation()), StateFolder::next_incarnation)?;
        let lives = LifeBook::open(state, incarnation)?;
        let engine = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            registry: Mutex::new(Registry::new(incarnation, config.limits)),
            lease_break_time,
            exports,
            fabrics,
            rdma_declined: config.rdma_devices.iter().all(|choice| *choice == DeviceChoice::None),
            watcher,
            name_watcher: NameWatcher::new(),
            fences,
            ladder,
            teardowns,
            severances,
            unseals,
            connecting,
            operators,
            waiting_pins: Arc::new(Semaphore::new(PINS_WAITING_AT_A_TIME)),
            limits: config.limits,
            room: Room::default(),
            region_budget: Budget::new(
                config.region_memory_bytes_max.unwrap_or_else(|| usual_memory_limit(host_memory())),
            ),
            sessions: Mutex::default(),
            files: Mutex::default(),
            inodes: Mutex::default(),
            passages: Mutex::new(Passages::new(config.unseen_breaker_pause)),
            visits: Mutex::default(),
            lives,
            breaks: Mutex::default(),
            looks: Mutex::default(),
            leaving: Mutex::default(),
            ended: Mutex::default(),
            retired: Notify::new(),
            records: broadcast::Sender::new(RECORDS_KEPT),
        });
        let this = Weak::clone(&engine.me);
        fence::start(orders, move |guard| with(&this, |engine| engine.fence(guard)))?;
        let this = Weak::clone(&engine.me);
        fence::vital("pinfold-notice", move || {
            for news in breaks {
                with(&this, |engine| engine.handle_break(news));
            }
        })?;
        let this = Weak::clone(&engine.me);
        fence::vital("pinfold-teardown", move || {
            for retired in retired_files {
                with(&this, |engine| engine.take_down(retired));
            }
        })?;
        let this = Weak::clone(&engine.me);
        fence::vital("pinfold-unseal", move || {
            for cut in sealed {
                with(&this, |engine| engine.let_go(cut));
            }
        })?;
        let (stopped, to_destroy) = channel();
        let stop = move |severance: Severance| {
            severance.queue_pairs.stop();
            // The threads end only with the engine.
            let _ = stopped.send(severance);
        };
        fence::vital_crew("pinfold-sever", SEVERING_THREADS, severed, stop)?;
        let destroy = |severance: Severance| {
            let Severance { queue_pairs, _parts, _done } = severance;
            queue_pairs.destroy();
        };
        fence::vital_crew("pinfold-destroy", DESTROYING_THREADS, to_destroy, destroy)?;
        let (this, watcher) = (Weak::clone(&engine.me), engine.name_watcher.clone());
        fence::vital("pinfold-names", move || names::hear(&watcher, &this))?;
        Ok(engine)
    }

    /// The devices; the first is the one that clients get unless they ask for another.
    pub(crate) fn fabrics(&self) -> &[Arc<Fabric>] {
        &self.fabrics
    }

    /// Every revocation from now on, when it is complete.
    pub(crate) fn records(&self) -> broadcast::Receiver<v1::RevocationRecord> {
        self.records.subscribe()
    }

    /// The first half of every generation of this run.
    pub(crate) fn incarnation(&self) -> u64 {
        self.registry().incarnation()
    }

    /// Waits for nothing: what may block is ordered from threads that were started before.
    fn perform(&self, actions: impl IntoIterator<Item = Action>) {
        for action in actions {
            self.perform_one(action);
        }
    }

    fn perform_one(&self, action: Action) {
        match action {
            Action::NotifyDraining { session, pins, generation, reason, budget } => {
                let Some(parts) = self.parts(session) else { return };
                parts.outbox.post(|notices, now| {
                    notices.drain(pins, generation, reason, now + budget, now);
                });
            }
            Action::NotifyRevoked { session, pins, generation, reason, timings } => {
                let Some(parts) = self.parts(session) else { return };
                parts.outbox.post(|notices, now| {
                    notices.revoke(pins, generation, reason, timings, now);
                });
            }
            Action::LookAt { guard, at } | Action::FenceAt { guard, at } => {
                self.order(Order::At(guard, at));
            }
            Action::FenceNow { guard, urgent: true } => self.order(Order::Now(guard)),
            Action::FenceNow { guard, urgent: false } => self.order(Order::Idle(guard)),
            Action::DropRegions { guard, pin, session } => {
                let parts = self.parts(session);
                self.drop_when_out(guard, pin, Leaving { parts, done: None });
            }
            Action::DropSession { session } => {
                let parts = locked(&self.sessions).remove(&session);
                if let Some(parts) = parts {
                    self.sever(parts, None);
                }
            }
        }
    }

    fn order(&self, order: Order) {
        // The thread ends only with the engine.
        let _ = self.fences.send(order);
    }

    /// A long call on a file of this export has finished a piece.
    fn note_progress(&self, export: &str) {
        if let Ok(file_system) = self.file_system(export) {
            file_system.note_progress();
        }
    }

    /// Does a call's work that names an export, on the threads of its file system.
    async fn call<T: Send + 'static>(
        &self,
        export: &str,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.long_call(export, 0, work).await
    }

    /// The same of a call that may touch so many bytes.
    async fn long_call<T: Send + 'static>(
        &self,
        export: &str,
        bytes: u64,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let engine = self.arc();
        self.file_system(export)?.call(bytes, move || work(&engine)).await
    }

    fn arc(&self) -> Arc<Self> {
        self.me.upgrade().expect("an engine lives only in an Arc")
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        locked(&self.registry)
    }
}

fn with(engine: &Weak<Engine>, work: impl FnOnce(&Engine)) {
    if let Some(engine) = engine.upgrade() {
        work(&engine);
    }
}
