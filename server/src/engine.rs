//! Performs what the registry decides, against leases and verbs.
//!
//! A break travels: watcher thread → notice thread → registry → notices to the sessions and a
//! deadline in the fence thread's queue → (all drained, or the deadline) → fence → release →
//! teardown thread (deregister, unmap) → audit record. No step up to the release waits for a
//! client, for the async runtime, or for another file.
//!
//! Here are the engine's parts, its threads and how actions are carried out; `sessions`, `files`
//! and `pins` hold what clients ask for, `revocation` what the kernel does.

mod exports;
mod files;
mod obstacles;
mod pins;
mod reads;
mod revocation;

pub(crate) use revocation::drain_budget;
mod sessions;

use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use pinfold_leases::{Fenced, FileIdentity, GuardId, LeaseBreakTime, Watcher, WeakDescription};
use pinfold_proto::v1;
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore, broadcast};

use crate::breakers::{Breaks, Looks};
use crate::config::{Config, DeviceChoice};
use crate::error::{Error, Result};
use crate::fabric::{Fabric, Link, Severed};
use crate::fence::{self, Order};
use crate::gate::Gate;
use crate::held::HeldFile;
use crate::ids::{PinId, SessionId};
use crate::ladder::Ladder;
use crate::lives::Lives;
use crate::passage::Passages;
use crate::registry::{Action, Limits, Record, Registry};
use crate::session::Outbox;
use crate::sync::locked;
use exports::Served;
use sessions::random;

pub(crate) use files::PageOrder;
pub(crate) use pins::{Granted, PinOrder, StreamPiece, TransportWish};

/// How long a new pin waits for the revocation of an earlier guarding.
const PATIENCE: Duration = Duration::from_secs(10);
/// Revocation records that a slow watcher may be behind.
const RECORDS_KEPT: usize = 256;
/// Calls of clients that may block at a time.
const CLIENT_WORK_AT_A_TIME: usize = 64;
/// Pieces of the stream path at a time.
const STREAM_WORK_AT_A_TIME: usize = 32;
/// Pins that wait for others to close a file.
const PINS_WAITING_AT_A_TIME: usize = 64;

/// Threads that destroy queue pairs, a session's on one: it hangs with a write that hangs in a fault.
const SEVERING_THREADS: usize = 8;

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
    fences: Sender<Order>,
    ladder: Ladder,
    teardowns: Sender<Retired>,
    severances: Sender<Severed>,
    /// Sealed files that are fenced: letting them go writes to their file system.
    unseals: Sender<Cut>,
    /// Of the threads that may block, so many at most work for clients: the rest is for ending
    /// sessions, which must not wait for other clients' slow calls.
    client_work: Arc<Semaphore>,
    /// So many pins at most wait for others to close a file: each looks again and again.
    waiting_pins: Arc<Semaphore>,
    /// And so many at most move bytes for them, so that pins and commits need not wait behind those.
    stream_work: Arc<Semaphore>,
    limits: Limits,
    sessions: Mutex<HashMap<SessionId, Arc<SessionParts>>>,
    files: Mutex<HashMap<GuardId, Arc<HeldFile>>>,
    inodes: Mutex<HashMap<FileIdentity, Inode>>,
    passages: Mutex<Passages>,
    lives: Mutex<Lives>,
    breaks: Mutex<Breaks>,
    looks: Mutex<Looks>,
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
    connecting: AsyncMutex<()>,
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
        let mut exports = BTreeMap::new();
        for export in &config.exports {
            exports.insert(export.name.clone(), Served::open(export)?);
        }
        let fabrics = Fabric::open_all(&config.rdma_devices)?.into_iter().map(Arc::new).collect();
        let (watcher, breaks) = Watcher::start()?;
        let (fences, orders) = fence::queue();
        let ladder = Ladder::start(&fences)?;
        let (teardowns, retired_files) = channel();
        let (severances, severed) = channel();
        let (unseals, sealed) = channel();
        let lease_break_time = LeaseBreakTime::open()?;
        let engine = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            registry: Mutex::new(Registry::new(u64::from_ne_bytes(random()), config.limits)),
            lease_break_time,
            exports,
            fabrics,
            rdma_declined: config.rdma_devices.iter().all(|choice| *choice == DeviceChoice::None),
            watcher,
            fences,
            ladder,
            teardowns,
            severances,
            unseals,
            client_work: Arc::new(Semaphore::new(CLIENT_WORK_AT_A_TIME)),
            waiting_pins: Arc::new(Semaphore::new(PINS_WAITING_AT_A_TIME)),
            stream_work: Arc::new(Semaphore::new(STREAM_WORK_AT_A_TIME)),
            limits: config.limits,
            sessions: Mutex::default(),
            files: Mutex::default(),
            inodes: Mutex::default(),
            passages: Mutex::default(),
            lives: Mutex::default(),
            breaks: Mutex::default(),
            looks: Mutex::default(),
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
        fence::vital_crew("pinfold-sever", SEVERING_THREADS, severed, Severed::destroy)?;
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

    /// Deregistering and destroying block, so this is for threads that may, but for what a break
    /// and a drain lead to: notices and orders.
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
            Action::DropRegions { guard, pin, session } => self.drop_regions(guard, pin, session),
            Action::DropSession { session } => {
                let parts = locked(&self.sessions).remove(&session);
                if let Some(parts) = parts {
                    parts.disconnect();
                }
            }
        }
    }

    fn drop_regions(&self, guard: GuardId, pin: PinId, session: SessionId) {
        let Some(file) = self.file(guard) else { return };
        let failed = file.drop_segments(pin);
        self.registry().left(guard, pin);
        if failed > 0 {
            // A key lives on. Only through the queue pair of its own session, which shares its
            // protection domain, could it be used; so that goes.
            if let Some(parts) = self.parts(session) {
                parts.disconnect();
            }
        }
    }

    fn order(&self, order: Order) {
        // The thread ends only with the engine.
        let _ = self.fences.send(order);
    }

    /// Does a client's work where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.blocking_within(&self.client_work, work).await
    }

    /// Does a piece of stream work for a session that there is.
    async fn streaming<T: Send + 'static>(
        &self,
        piece: StreamPiece,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.demand_session(piece.session)?;
        self.blocking_within(&self.stream_work, work).await
    }

    async fn blocking_within<T: Send + 'static>(
        &self,
        limit: &Arc<Semaphore>,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let engine = self.arc();
        // Never closed. It goes with the work: a call that is given up does not make room.
        let place = Arc::clone(limit).acquire_owned().await.map_err(|_| Error::Task)?;
        let work = move || {
            let _place = place;
            work(&engine)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Task)?
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
