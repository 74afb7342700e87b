//! Performs what the registry decides, against leases and verbs.
//!
//! A break travels: watcher thread → `breaks` thread → registry → notices to the sessions and a
//! deadline in the fence thread's queue → (all drained, or the deadline) → fence → release →
//! a thread of its own for deregistering and unmapping → audit record. No step up to the release
//! waits for a client, for the async runtime, or for another file.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use pinfold_leases::{
    Break, BreakKind, Create, Description, Entry, Error as FileError, Export, FenceFailed,
    FileIdentity, GuardId, LeaseBreakTime, Located, Mapping, RelativePath, Watcher,
    WeakDescription, waiting_breakers,
};
use pinfold_proto::v1;
use pinfold_verbs::{Endpoint, Error as VerbsError, Mtu, ProtectionDomain, RegistrationMode};
use tokio::sync::{Mutex as AsyncMutex, Notify, Semaphore, broadcast, mpsc};
use tonic::Status;

use crate::audit::{self, Teardown};
use crate::config::Config;
use crate::error::{Error, Result, with_causes};
use crate::fabric::{self, Fabric, Link};
use crate::fence::{self, Order};
use crate::held::HeldFile;
use crate::ids::{Generation, PinId, SessionId};
use crate::registry::{
    Action, Limits, PinAccess, Reason, Record, Refusal, Registry, Standing, Terms, Transport,
};
use crate::wire;

/// A drain takes a third of lease-break-time, and never longer than this.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);
/// How long a new pin waits for the revocation of an earlier guarding.
const PATIENCE: Duration = Duration::from_secs(10);
/// How soon a fence that could not be completed is tried again.
const FENCE_RETRY_FIRST: Duration = Duration::from_millis(5);
/// … and how late at most.
const FENCE_RETRY_LAST: Duration = Duration::from_millis(100);
/// Revocation records that a slow watcher may be behind.
const RECORDS_KEPT: usize = 256;
/// How soon a pin is tried again when what stands in its way will pass.
const TRY_AGAIN: Duration = Duration::from_millis(20);
/// Calls of clients that may block at a time.
const CLIENT_WORK_AT_A_TIME: usize = 64;
/// Pieces of the stream path at a time.
const STREAM_WORK_AT_A_TIME: usize = 32;
/// Stands in a gate for work of the server's own; no pin has it.
const NO_PIN: PinId = PinId(0);
/// Names in one listing.
const LONGEST_LISTING: usize = 10_000;
/// Permission bits of the files that clients create, before the umask.
const FILE_MODE: u32 = 0o644;

/// What a session's stream carries to the client.
pub(crate) type Outbox = mpsc::Sender<Result<v1::SessionEvent, Status>>;
/// The same without keeping the stream open.
pub(crate) type WeakOutbox = mpsc::WeakSender<Result<v1::SessionEvent, Status>>;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Engine {
    me: Weak<Self>,
    registry: Mutex<Registry>,
    lease_break_time: LeaseBreakTime,
    exports: HashMap<String, Export>,
    fabrics: Vec<Arc<Fabric>>,
    watcher: Watcher,
    fences: Sender<Order>,
    teardowns: Sender<Retired>,
    /// Of the threads that may block, so many at most work for clients: the rest is for ending
    /// sessions, which must not wait for other clients' slow calls.
    client_work: Arc<Semaphore>,
    /// And so many at most move bytes for them, so that pins and commits need not wait behind those.
    stream_work: Arc<Semaphore>,
    limits: Limits,
    sessions: Mutex<HashMap<SessionId, Arc<SessionParts>>>,
    files: Mutex<HashMap<GuardId, Arc<HeldFile>>>,
    inodes: Mutex<HashMap<FileIdentity, Inode>>,
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
    /// The last guarding ended by a break: somebody may still be on their way in.
    broken: bool,
}

#[derive(Debug)]
struct SessionParts {
    outbox: Outbox,
    link: Mutex<Option<Link>>,
    /// The name of the device, for who must not wait until the kernel has connected to it.
    device: OnceLock<String>,
    /// Connecting may block in the kernel; one at a time.
    connecting: AsyncMutex<()>,
}

/// A file whose guard was let go, for the thread that takes it down.
#[derive(Debug)]
struct Retired {
    file: Arc<HeldFile>,
    record: Option<Record>,
    late_stream_writes: usize,
}

/// The ways by which a pin's bytes can travel; the stream path always can.
#[derive(Debug)]
pub(crate) struct Ways {
    /// Offset, length, address and key of each region; none: by the stream path only.
    pub segments: Vec<v1::Segment>,
    /// The device's rules for this kind of registration.
    pub quirks: v1::Quirks,
    /// Why there are no segments.
    pub no_rdma_because: String,
}

impl Ways {
    fn stream(no_rdma_because: String) -> Self {
        let quirks = v1::Quirks { start_alignment_bytes: 1, path_mtu_bytes: 0 };
        Self { segments: Vec::new(), quirks, no_rdma_because }
    }
}

/// How a client wants its bytes to travel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum TransportWish {
    /// By RDMA where it can be.
    Either,
    /// By RDMA or not at all.
    Rdma,
    /// By the stream path only.
    Stream,
}

/// Where a stream transfer starts, and on whose behalf.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamPiece {
    /// Whose.
    pub session: SessionId,
    /// By which right.
    pub pin: PinId,
    /// Of which guarding.
    pub generation: Generation,
    /// In the file.
    pub offset: u64,
}

/// In which direction a file's size may change.
#[derive(Clone, Copy, Debug)]
enum Resize {
    Exactly,
    Longer,
    Shorter,
}

impl Resize {
    /// To be asked of the size that the file has in the end, when nobody else can change it.
    fn demand(self, now: u64, wanted: u64) -> Result<()> {
        let why = match self {
            Self::Longer if wanted < now => {
                "a file grows to a size that is not below its own; shrink it instead"
            }
            Self::Shorter if wanted > now => {
                "a file shrinks to a size that is not above its own; grow it instead"
            }
            _ => return Ok(()),
        };
        Err(Error::BadRange { start: now, end: wanted, why })
    }
}

/// What making a pin ready needs to know.
struct Registration<'a> {
    file: &'a HeldFile,
    mapping: &'a Mapping,
    pin: PinId,
    range: &'a Range<u64>,
    reach: Range<u64>,
    order: &'a PinOrder,
}

/// A pin that can be handed out.
#[derive(Debug)]
pub(crate) struct Granted {
    /// Its file.
    pub file: Arc<HeldFile>,
    /// Its name.
    pub pin: PinId,
    /// Of the guarding.
    pub generation: Generation,
    /// What may be done with it.
    pub access: PinAccess,
    /// Bytes of the file.
    pub range: Range<u64>,
    /// The file's size.
    pub valid_end: u64,
    /// How its bytes can travel.
    pub ways: Ways,
}

/// What a pin asks for.
#[derive(Clone, Debug)]
pub(crate) struct PinOrder {
    /// Name of the export.
    pub export: String,
    /// Path inside it.
    pub path: RelativePath,
    /// `None`: the whole file.
    pub range: Option<Range<u64>>,
    /// What may be done with it.
    pub access: PinAccess,
    /// Refuse unless the path names this file.
    pub expected: Option<FileIdentity>,
    /// How its bytes are to travel.
    pub transport: TransportWish,
    /// Keep others off.
    pub exclusive: bool,
    /// Keys reach up to here, if that is past the range.
    pub reserve_end: u64,
}

impl Engine {
    /// Opens the exports and the device, and starts the threads. Blocks for the device's self-test.
    pub(crate) fn start(config: &Config) -> Result<Arc<Self>> {
        let exports = config
            .exports
            .iter()
            .map(|export| Ok((export.name.clone(), Export::open(&export.directory)?)))
            .collect::<Result<_>>()?;
        let fabrics = Fabric::open_all(&config.rdma_devices)?.into_iter().map(Arc::new).collect();
        let (watcher, breaks) = Watcher::start()?;
        let (fences, orders) = fence::queue();
        let (teardowns, retired_files) = channel();
        let lease_break_time = LeaseBreakTime::open()?;
        let engine = Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            registry: Mutex::new(Registry::new(u64::from_ne_bytes(random()), config.limits)),
            lease_break_time,
            exports,
            fabrics,
            watcher,
            fences,
            teardowns,
            client_work: Arc::new(Semaphore::new(CLIENT_WORK_AT_A_TIME)),
            stream_work: Arc::new(Semaphore::new(STREAM_WORK_AT_A_TIME)),
            limits: config.limits,
            sessions: Mutex::default(),
            files: Mutex::default(),
            inodes: Mutex::default(),
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

    // ------------------------------------------------------------------------------ sessions

    /// Takes a session up; its events go to `outbox`.
    pub(crate) fn open_session(&self, outbox: Outbox, client_name: &str) -> Result<SessionId> {
        let id = SessionId::new(random());
        self.registry().open_session(id, client_name)?;
        let parts = SessionParts {
            outbox,
            link: Mutex::default(),
            device: OnceLock::new(),
            connecting: AsyncMutex::default(),
        };
        locked(&self.sessions).insert(id, Arc::new(parts));
        Ok(id)
    }

    /// Ends a session: its queue pair goes at once, then its pins.
    pub(crate) async fn end_session(&self, id: SessionId) {
        let engine = self.arc();
        let ended = tokio::task::spawn_blocking(move || {
            // The stream ends when these go, and a client takes its end for the end of its keys.
            let parts = locked(&engine.sessions).get(&id).cloned();
            let actions = engine.registry().end_session(id, Instant::now());
            engine.perform(actions);
            drop(parts);
        });
        if ended.await.is_err() {
            tracing::error!(session = %id, "ending a session failed");
        }
    }

    /// Whether the session lives.
    pub(crate) fn demand_session(&self, id: SessionId) -> Result<()> {
        Ok(self.registry().demand_session(id)?)
    }

    /// A session has nothing in flight on these pins any more.
    pub(crate) fn drained(&self, id: SessionId, pins: &[PinId]) {
        let actions = self.registry().drained(id, pins, Instant::now());
        // Only orders to the fence thread come out of this, so it does not block.
        self.perform(actions);
    }

    fn session(&self, id: SessionId) -> Result<Arc<SessionParts>> {
        self.demand_session(id)?;
        locked(&self.sessions).get(&id).cloned().ok_or(Refusal::UnknownSession.into())
    }

    /// Connects a new queue pair to the client's end; one that was there before is destroyed. A
    /// session stays on the device of its first queue pair: its keys are good on that one only.
    pub(crate) async fn connect(
        &self,
        id: SessionId,
        client: Endpoint,
        device: String,
    ) -> Result<(Endpoint, Mtu)> {
        let fabric = self.fabric_named(&device)?;
        let session = self.session(id)?;
        let for_link = Arc::clone(&session);
        // One at a time, and those that wait hold no thread.
        let _connecting = session.connecting.lock().await;
        self.blocking(move |engine| {
            let mut link = locked(&for_link.link);
            let connected = match &mut *link {
                None => {
                    let mut new = Link::new(fabric)?;
                    let connected = new.connect(&client)?;
                    // The first one that worked: keys are good on that device only.
                    let _ = for_link.device.set(new.fabric().device().name().to_owned());
                    *link = Some(new);
                    Ok(connected)
                }
                Some(link) if Arc::ptr_eq(link.fabric(), &fabric) => link.connect(&client),
                Some(link) => Err(Error::QueuePair {
                    why: format!(
                        "this session is on {} already; open another one for {}",
                        link.fabric().device().name(),
                        fabric.device().name()
                    ),
                }),
            };
            // The session may have ended while the kernel resolved the address; then nobody would
            // destroy the new queue pair but us.
            if let Err(ended) = engine.demand_session(id) {
                *link = None;
                return Err(ended);
            }
            connected
        })
        .await
    }

    fn fabric_named(&self, name: &str) -> Result<Arc<Fabric>> {
        let found = self.fabrics.iter().find(|f| name.is_empty() || f.device().name() == name);
        if let Some(fabric) = found {
            return Ok(Arc::clone(fabric));
        }
        if self.fabrics.is_empty() {
            return Err(no_device());
        }
        let known: Vec<&str> = self.fabrics.iter().map(|f| f.device().name()).collect();
        Err(Error::UnknownDevice { name: name.to_owned(), known: known.join(", ") })
    }

    // ------------------------------------------------------------------------------ files

    fn export(&self, name: &str) -> Result<&Export> {
        self.exports.get(name).ok_or_else(|| {
            let mut known: Vec<&str> = self.exports.keys().map(String::as_str).collect();
            known.sort_unstable();
            Error::ExportNotFound { name: name.to_owned(), known: known.join(", ") }
        })
    }

    /// Finds a file without opening it.
    pub(crate) async fn locate(&self, export: String, path: RelativePath) -> Result<Located> {
        self.blocking(move |engine| Ok(engine.export(&export)?.locate(&path)?)).await
    }

    /// How a file stands now, if it is guarded.
    pub(crate) fn standing(&self, identity: FileIdentity) -> Option<Standing> {
        self.registry().standing(identity).map(|(_, standing)| standing)
    }

    /// Makes a file of exactly `size` bytes, allocated, zeroed and durable.
    pub(crate) async fn create(
        &self,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<FileIdentity> {
        let create = Create { size, mode: FILE_MODE };
        self.blocking(move |engine| Ok(engine.export(&export)?.create(&path, &create)?.identity()))
            .await
    }

    /// What holds a file still, if it is guarded.
    pub(crate) fn guard_tier(&self, identity: FileIdentity) -> Option<pinfold_leases::GuardTier> {
        let (guard, _) = self.registry().standing(identity)?;
        Some(self.file(guard)?.tier())
    }

    /// Gives an existing file another size. Refused while it has pins.
    pub(crate) async fn resize(
        &self,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<FileIdentity> {
        let located = self.locate(export.clone(), path.clone()).await?;
        let identity = located.identity();
        let turn = self.take_turn(&located).await?;
        self.demand_unpinned(&located).await?;
        self.blocking(move |engine| {
            // A caller that goes away gives its turn up only when this is done.
            let _turn = turn;
            engine.resize_unguarded(&export, &path, &located, size, Resize::Exactly)?;
            Ok(identity)
        })
        .await
    }

    async fn demand_unpinned(&self, located: &Located) -> Result<()> {
        match self.settled(located).await? {
            Some((file, pins)) => Err(Error::FilePinned { path: file.path().to_owned(), pins }),
            None => Ok(()),
        }
    }

    /// Only in the inode's turn, while it is not guarded.
    fn resize_unguarded(
        &self,
        export: &str,
        path: &RelativePath,
        located: &Located,
        size: u64,
        resize: Resize,
    ) -> Result<()> {
        let description = self.open(located)?;
        // Nobody else has it open: what they see of it must not change under them.
        drop(description.arm(&self.watcher)?);
        self.demand_named(export, path, located.identity())?;
        resize.demand(description.size()?, size)?;
        Ok(description.resize(size)?)
    }

    /// Makes a file longer, under its guard if it has one. Returns its end.
    pub(crate) async fn grow(&self, export: String, path: RelativePath, size: u64) -> Result<u64> {
        let located = self.locate(export.clone(), path.clone()).await?;
        let turn = self.take_turn(&located).await?;
        let held = self.settled(&located).await?;
        self.blocking(move |engine| {
            let _turn = turn;
            match held {
                Some((file, _)) => engine.grow_guarded(&file, size)?,
                None => {
                    engine.resize_unguarded(&export, &path, &located, size, Resize::Longer)?;
                }
            }
            Ok(size)
        })
        .await
    }

    /// Grows a file under its guard, inside its gate: not once it has been given away.
    fn grow_guarded(&self, file: &HeldFile, size: u64) -> Result<()> {
        let inside = file.gate().enter(NO_PIN, true).ok_or(Refusal::Draining)?;
        let grown = (|| {
            if !self.registry().is_held(file.id()) {
                return Err(Refusal::Draining.into());
            }
            Resize::Longer.demand(file.description().size()?, size)?;
            Ok(file.description().grow(size)?)
        })();
        drop(inside);
        self.fence_if_awaited(file);
        grown
    }

    /// Makes a file shorter, after its pins have been revoked with notice. Returns how many.
    pub(crate) async fn shrink(
        &self,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<usize> {
        let located = self.locate(export.clone(), path.clone()).await?;
        Resize::Shorter.demand(located.size(), size)?;
        let turn = self.take_turn(&located).await?;
        self.demand_still_named(&export, &path, &located).await?;
        let revoked = self.take_back(&located, Reason::Shrink).await?;
        self.blocking(move |engine| {
            let _turn = turn;
            engine.resize_unguarded(&export, &path, &located, size, Resize::Shorter)?;
            Ok(revoked)
        })
        .await
    }

    /// Removes a file; its pins are revoked with notice first, or it is refused. Returns how many.
    pub(crate) async fn remove(
        &self,
        export: String,
        path: RelativePath,
        revoke_pins: bool,
    ) -> Result<usize> {
        let located = self.locate(export.clone(), path.clone()).await?;
        let turn = self.take_turn(&located).await?;
        if !revoke_pins {
            self.demand_unpinned(&located).await?;
        }
        self.demand_still_named(&export, &path, &located).await?;
        let revoked = self.take_back(&located, Reason::Remove).await?;
        self.blocking(move |engine| {
            let _turn = turn;
            engine.demand_named(&export, &path, located.identity())?;
            engine.export(&export)?.remove(&path)?;
            Ok(revoked)
        })
        .await
    }

    /// Takes a file back, and waits until its guard is let go. Returns how many pins it had.
    async fn take_back(&self, located: &Located, reason: Reason) -> Result<usize> {
        let Some((file, pins)) = self.settled(located).await? else { return Ok(0) };
        let budget = self.break_budget();
        let actions = self.registry().take_back_for(file.id(), reason, Instant::now(), budget);
        file.gate().close();
        self.perform(actions);
        // Nobody can pin it meanwhile: that takes a turn.
        match self.settled(located).await? {
            None => Ok(pins),
            Some(_) => Err(Refusal::Draining.into()),
        }
    }

    /// Lists a folder, with the number of pins on each file.
    pub(crate) async fn list(
        &self,
        export: String,
        path: Option<RelativePath>,
    ) -> Result<Vec<(Entry, usize)>> {
        self.blocking(move |engine| {
            let entries = engine.export(&export)?.list(path.as_ref(), LONGEST_LISTING)?;
            let with_pins = |entry: Entry| {
                let pins = match engine.standing(entry.identity) {
                    Some(Standing::Held { pins, .. }) => pins,
                    Some(Standing::Going) | None => 0,
                };
                (entry, pins)
            };
            Ok(entries.into_iter().map(with_pins).collect())
        })
        .await
    }

    /// The names of the exports, ordered.
    pub(crate) fn export_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.exports.keys().cloned().collect();
        names.sort_unstable();
        names
    }

    /// Who holds what now, as seen by one session.
    pub(crate) fn inspect(&self, id: SessionId) -> v1::InspectResponse {
        let (sessions, files) = self.registry().view();
        let device = |id| {
            let parts = locked(&self.sessions).get(&id).cloned()?;
            parts.device.get().cloned()
        };
        let sessions = sessions
            .into_iter()
            .map(|view| wire::session_info(&view, view.id == id, device(view.id)))
            .collect();
        let files = files
            .into_iter()
            .filter_map(|view| Some(wire::file_info(&view, self.file(view.guard)?.as_ref())))
            .collect();
        v1::InspectResponse { sessions, files }
    }

    /// Asked before pins are revoked, so that nobody loses them for a path that names another file
    /// by now.
    async fn demand_still_named(
        &self,
        export: &str,
        path: &RelativePath,
        located: &Located,
    ) -> Result<()> {
        let (export, path, identity) = (export.to_owned(), path.clone(), located.identity());
        self.blocking(move |engine| engine.demand_named(&export, &path, identity)).await
    }

    /// The path must still name the file: it may have been renamed or replaced since we looked.
    fn demand_named(
        &self,
        export: &str,
        path: &RelativePath,
        identity: FileIdentity,
    ) -> Result<()> {
        let export = self.export(export)?;
        match export.locate(path) {
            Ok(found) if found.identity() == identity => Ok(()),
            Ok(_) | Err(FileError::NotFound { .. }) => {
                Err(Error::FileChanged { path: export.path().join(path.as_path()) })
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn take_turn(&self, located: &Located) -> Result<Turn> {
        let identity = located.identity();
        let next = locked(&self.inodes).entry(identity).or_default().turn.clone();
        // Made first: it forgets the inode again, also if the wait is given up.
        let mut turn = Turn { engine: self.arc(), identity, held: None };
        let held = tokio::time::timeout(PATIENCE, next.lock_owned()).await;
        turn.held = Some(held.map_err(|_| still_draining(located))?);
        Ok(turn)
    }

    /// Waits for a revocation that is under way, and returns the guarded file with the number of
    /// its pins, or `None` where the file is not guarded.
    async fn settled(&self, located: &Located) -> Result<Option<(Arc<HeldFile>, usize)>> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        loop {
            let Some((guard, standing)) = self.registry().standing(located.identity()) else {
                return Ok(None);
            };
            let Some(file) = self.file(guard) else { return Ok(None) };
            if let Standing::Held { pins, .. } = standing {
                return Ok(Some((file, pins)));
            }
            tokio::time::timeout_at(give_up, file.wait_released())
                .await
                .map_err(|_| still_draining(located))?;
        }
    }

    /// Opens a file, by the description that it has already if an old mapping keeps one. Only to
    /// be called in the inode's turn, while it is not guarded: to open a file that we have guarded
    /// ourselves would break that guard and wait for ourselves.
    fn open(&self, located: &Located) -> Result<Description> {
        let identity = located.identity();
        let known = locked(&self.inodes).get(&identity).and_then(|inode| inode.description.clone());
        if let Some(description) = known.and_then(|weak| weak.upgrade()) {
            return Ok(description);
        }
        let description = located.open()?;
        let mut inodes = locked(&self.inodes);
        inodes.entry(identity).or_default().description = Some(description.downgrade());
        Ok(description)
    }

    fn file(&self, guard: GuardId) -> Option<Arc<HeldFile>> {
        locked(&self.files).get(&guard).cloned()
    }

    // ------------------------------------------------------------------------------ pins

    /// Guards a file, if it isn't yet, and registers a range of it for a session. Once begun it
    /// runs to its end; if nobody waits for the answer any more, the pin is given back.
    pub(crate) async fn pin(&self, id: SessionId, order: PinOrder) -> Result<Granted> {
        let (answer, waiting) = tokio::sync::oneshot::channel();
        let engine = self.arc();
        tokio::spawn(async move {
            let granted = engine.pin_to_the_end(id, order).await;
            if let Err(Ok(unwanted)) = answer.send(granted) {
                // The session may be over too: then there is nothing left to give back.
                let _ = engine.unpin(id, unwanted.pin).await;
            }
        });
        waiting.await.map_err(|_| Error::Task)?
    }

    async fn pin_to_the_end(&self, id: SessionId, order: PinOrder) -> Result<Granted> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        loop {
            match self.try_to_pin(id, &order).await {
                Err(error) if passes(&error) && tokio::time::Instant::now() < give_up => {
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                done => return done,
            }
        }
    }

    async fn try_to_pin(&self, id: SessionId, order: &PinOrder) -> Result<Granted> {
        let session = self.session(id)?;
        if order.transport == TransportWish::Rdma {
            let session = Arc::clone(&session);
            self.blocking(move |engine| engine.demand_link(&session).map(drop)).await?;
        }
        let reserve_limit = self.limits.reserved_bytes_per_pin;
        let located = self.locate(order.export.clone(), order.path.clone()).await?;
        if order.expected.is_some_and(|expected| expected != located.identity()) {
            return Err(Error::FileChanged { path: located.path().to_owned() });
        }
        if order.reserve_end.saturating_sub(located.size()) > reserve_limit {
            let what = "what one pin may reserve past the end of a file";
            return Err(Refusal::Quota { what, limit: reserve_limit }.into());
        }
        let turn = self.take_turn(&located).await?;
        let held = self.settled(&located).await?;
        let order = order.clone();
        self.blocking(move |engine| {
            let _turn = turn;
            let file = match held {
                Some((file, _)) => file,
                None => engine.guard(&located, order.reserve_end)?,
            };
            let granted = engine
                .demand_named(&order.export, &order.path, located.identity())
                .and_then(|()| engine.pin_on(&file, id, &session, &order));
            if granted.is_err() {
                let unused = engine.registry().release_if_unused(file.id());
                engine.perform(unused);
            }
            granted
        })
        .await
    }

    /// Opens, guards and maps a file, with room for what a pin reserves past its end.
    fn guard(&self, located: &Located, reserve_end: u64) -> Result<Arc<HeldFile>> {
        self.let_breakers_pass(located)?;
        let description = self.open(located)?;
        let armed = description.arm(&self.watcher)?;
        // Only now can the size not change any more.
        let size = description.size()?;
        let kind = description.kind()?;
        let (guard, mapping) = armed.map(size.max(reserve_end).max(1))?;
        let identity = description.identity();
        let file = Arc::new(HeldFile::new(description, kind, guard, mapping));
        // Known to the fence before it is known to the registry.
        locked(&self.files).insert(file.id(), Arc::clone(&file));
        let added = self.registry().add_file(identity, file.id());
        if let Err(refusal) = added {
            if let Some(Ok(fenced)) = file.fence() {
                file.release(fenced);
            }
            self.retire(&file, None, 0);
            return Err(refusal.into());
        }
        // News of a break that came before the registry knew the file went nowhere.
        if let Some(kind) = file.broken() {
            self.handle_break(Break { guard: file.id(), kind, at: Instant::now() });
        }
        Ok(file)
    }

    /// After a break, whoever waited goes first: unlink and rename hold nothing that would keep us
    /// from guarding the file again before they have woken up.
    fn let_breakers_pass(&self, located: &Located) -> Result<()> {
        let identity = located.identity();
        let broken = locked(&self.inodes).get(&identity).is_some_and(|inode| inode.broken);
        if !broken {
            return Ok(());
        }
        if !waiting_breakers(identity).is_empty() {
            return Err(Refusal::Draining.into());
        }
        locked(&self.inodes).entry(identity).and_modify(|inode| inode.broken = false);
        Ok(())
    }

    fn pin_on(
        &self,
        file: &Arc<HeldFile>,
        id: SessionId,
        session: &SessionParts,
        order: &PinOrder,
    ) -> Result<Granted> {
        let valid_end = file.description().size()?;
        let range = usable_range(order.range.clone(), valid_end)?;
        let mapping = file.mapping().ok_or(Refusal::Draining)?;
        let reach = range.start..reserved_end(range.end, order.reserve_end, mapping.len() as u64)?;
        let terms =
            Terms { range: reach.clone(), access: order.access, exclusive: order.exclusive };
        let pin = self.registry().begin_pin(id, file.id(), terms)?;
        let job = Registration { file, mapping: &mapping, pin, range: &range, reach, order };
        let ready = self.make_ready(session, &job);
        let (generation, ways) = ready.map_err(|error| {
            // The session may have ended meanwhile, and then nobody else knows of the regions.
            self.drop_regions(file.id(), pin, id);
            let actions = self.registry().abandon_pin(pin, Instant::now());
            self.perform(actions);
            // What fails on a mapping that is being fenced fails for that reason.
            if file.broken().is_some() { Refusal::Draining.into() } else { error }
        })?;
        let (access, file) = (order.access, Arc::clone(file));
        Ok(Granted { file, pin, generation, access, range, valid_end, ways })
    }

    /// Registers what the pin asks for, and lets the pin live.
    fn make_ready(
        &self,
        session: &SessionParts,
        job: &Registration<'_>,
    ) -> Result<(Generation, Ways)> {
        let ways = match job.order.transport {
            TransportWish::Stream => Ways::stream("it was not asked for".to_owned()),
            TransportWish::Rdma => self.register(session, job)?,
            TransportWish::Either => match self.register(session, job) {
                Err(error) if stream_can_serve(&error) => {
                    let because = with_causes(&error);
                    tracing::warn!(path = %job.file.path().display(), because, "no RDMA for a pin");
                    Ways::stream(because)
                }
                ways => ways?,
            },
        };
        let transport = if ways.segments.is_empty() { Transport::Stream } else { Transport::Rdma };
        let generation = self.registry().finish_pin(job.pin, transport)?;
        Ok((generation, ways))
    }

    fn register(&self, session: &SessionParts, job: &Registration<'_>) -> Result<Ways> {
        let Registration { file, mapping, pin, range, reach, order } = job;
        let (fabric, domain) = self.demand_link(session)?;
        let (mode, quirks) = fabric.mode_for(file.kind()).map_err(|why| Error::CannotRegister {
            path: file.path().to_owned(),
            kind: file.kind(),
            device: fabric.device().name().to_owned(),
            why: why.to_owned(),
        })?;
        if mode == RegistrationMode::Pinned && reach.end > range.end {
            return Err(Error::CannotRegister {
                path: file.path().to_owned(),
                kind: file.kind(),
                device: fabric.device().name().to_owned(),
                why: "pages past the end of a file can't be pinned, so nothing can be reserved there; \
                      ask for a pin without a reserve"
                    .to_owned(),
            });
        }
        // Below that, its key would reach bytes outside the pin: the device would move them there.
        let alignment = u64::from(quirks.start_alignment_bytes.max(1));
        let start = range.start.next_multiple_of(alignment);
        if start >= reach.end || (start > range.start && order.transport == TransportWish::Rdma) {
            return Err(Error::MisalignedPin { start: range.start, alignment });
        }
        let go_on = || self.registry().is_held(file.id()) && file.broken().is_none();
        if order.access == PinAccess::ReadWrite {
            mapping.populate((*range).clone(), go_on)?;
        }
        let manner = fabric::Manner { mode, quirks, access: order.access };
        let segments = fabric::register(&domain, mapping, start..reach.end, &manner, go_on)?;
        let told = segments.iter().map(wire::segment).collect();
        file.add_segments(*pin, segments);
        Ok(Ways { segments: told, quirks: wire::quirks(quirks), no_rdma_because: String::new() })
    }

    /// The session's device and protection domain, or why it has none.
    fn demand_link(&self, session: &SessionParts) -> Result<(Arc<Fabric>, ProtectionDomain)> {
        if self.fabrics.is_empty() {
            return Err(no_device());
        }
        let link = locked(&session.link);
        let link = link.as_ref().ok_or(Error::NoQueuePair)?;
        let domain = link.domain().ok_or(Error::NoQueuePair)?;
        Ok((Arc::clone(link.fabric()), domain.clone()))
    }

    /// Gives a pin back. When this returns its keys are dead.
    pub(crate) async fn unpin(&self, id: SessionId, pin: PinId) -> Result<()> {
        let last_of = self.blocking(move |engine| {
            let actions = engine.registry().unpin(id, pin, Instant::now())?;
            let last_of = actions.iter().find_map(|action| match action {
                Action::FenceNow { guard, .. } => engine.file(*guard),
                _ => None,
            });
            engine.perform(actions);
            Ok(last_of)
        });
        if let Some(file) = last_of.await? {
            // The fence kills the keys that the fence thread took out of this call's hands.
            let released = tokio::time::timeout(PATIENCE, file.wait_released()).await;
            released.map_err(|_| Error::StillDraining {
                path: file.path().to_owned(),
                waited: PATIENCE,
            })?;
        }
        Ok(())
    }

    /// Writes bytes of a pin through the kernel.
    pub(crate) async fn stream_write(&self, piece: StreamPiece, data: Vec<u8>) -> Result<()> {
        self.streaming(piece, move |engine| {
            let len = data.len() as u64;
            engine.inside(piece, len, PinAccess::ReadWrite, |file| {
                Ok(file.description().write_at(&data, piece.offset)?)
            })
        })
        .await
    }

    /// Reads bytes of a pin through the kernel.
    pub(crate) async fn stream_read(&self, piece: StreamPiece, len: usize) -> Result<Vec<u8>> {
        self.streaming(piece, move |engine| {
            engine.inside(piece, len as u64, PinAccess::Read, |file| {
                let mut data = vec![0; len];
                file.description().read_at(&mut data, piece.offset)?;
                Ok(data)
            })
        })
        .await
    }

    /// Does a piece of stream work inside the file's gate, if the pin allows it.
    fn inside<T>(
        &self,
        piece: StreamPiece,
        len: u64,
        access: PinAccess,
        work: impl FnOnce(&HeldFile) -> Result<T>,
    ) -> Result<T> {
        let StreamPiece { session, pin, generation, offset } = piece;
        let begin = || self.registry().begin_transfer(session, pin, generation, access);
        let view = begin()?;
        let file = self.file(view.guard).ok_or(Refusal::Draining)?;
        let writes = access == PinAccess::ReadWrite;
        let inside = file.gate().enter(pin, writes).ok_or(Refusal::Draining)?;
        // Once more, now that an unpin would wait for us.
        let done = begin().map_err(Error::from).and_then(|_| {
            piece_fits(offset, len, &view.range, file.description().size()?)?;
            work(&file)
        });
        drop(inside);
        self.fence_if_awaited(&file);
        done
    }

    /// After the last stream write is out: a fence may have waited for that.
    fn fence_if_awaited(&self, file: &HeldFile) {
        if file.gate().is_empty_for_good() {
            self.order(Order::Now(file.id()));
        }
    }

    /// Makes what landed in a range durable: only if the flush returned before the release.
    pub(crate) async fn commit(
        &self,
        id: SessionId,
        pin: PinId,
        generation: Generation,
        range: Option<Range<u64>>,
    ) -> Result<Duration> {
        self.blocking(move |engine| {
            let view = engine.registry().begin_commit(id, pin, generation)?;
            let stale = || Refusal::Stale { pin, asked: generation };
            let file = engine.file(view.guard).ok_or_else(stale)?;
            let range = committed_range(range, &view.range, file.description().size()?)?;
            if file.kind() == pinfold_leases::MappingKind::SharedMemory {
                return Err(Error::NotDurable { path: file.path().to_owned() });
            }
            let flusher = file.mapping().ok_or_else(stale)?.share_for_flush();
            let start = Instant::now();
            flusher.flush(range)?;
            if !file.map_sync() {
                // Without MAP_SYNC the blocks behind the data may not be recorded yet.
                file.description().sync()?;
            }
            let took = start.elapsed();
            // Too late if the fence has fallen, or if the kernel has let somebody through itself.
            engine.registry().demand_unfenced(view.guard, pin, generation)?;
            if file.lapsed() { Err(stale().into()) } else { Ok(took) }
        })
        .await
    }

    // ------------------------------------------------------------------------------ revocation

    fn handle_break(&self, news: Break) {
        let budget = self.break_budget();
        let actions =
            self.registry().handle_break(news.guard, news.kind, news.at, Instant::now(), budget);
        // Before anybody is told: from the break on no stream write enters the kernel.
        if let Some(file) = self.file(news.guard) {
            file.gate().close();
        }
        self.perform(actions);
    }

    /// How long clients may drain now.
    fn break_budget(&self) -> Duration {
        drain_budget(self.lease_break_time.read().unwrap_or_else(|error| {
            // Not to know is to assume the shortest.
            tracing::error!(error = with_causes(&error), "fencing at once");
            Some(Duration::from_secs(1))
        }))
    }

    /// The fence thread's work, for one file: fence, release, and hand the rest on.
    fn fence(&self, guard: GuardId) {
        let Some(by) = self.registry().fence_due(guard) else { return };
        let Some(file) = self.file(guard) else { return };
        let late_stream_writes = file.gate().close();
        if late_stream_writes > 0 {
            // The last one out orders the fence; who waits for the file waits until the deadline.
            match by {
                None => return,
                Some(by) if Instant::now() < by => return self.order(Order::At(guard, by)),
                Some(_) => {
                    let path = file.path().display();
                    tracing::error!(%path, late_stream_writes, "released with stream writes inside");
                }
            }
        }
        let fenced = match file.fence() {
            Some(Ok(fenced)) => fenced,
            Some(Err(error)) => return self.fence_again(&file, &error),
            None => return,
        };
        // No commit that ends later succeeds.
        self.registry().fenced(guard, Instant::now());
        let Some(released) = file.release(fenced) else { return };
        let now = Instant::now();
        let limit = self.lease_break_time.read().unwrap_or_default();
        let (actions, record) =
            self.registry().released(guard, now, |waited| still_pending(&released, waited, limit));
        if released.broken.is_some() {
            let identity = file.description().identity();
            locked(&self.inodes).entry(identity).and_modify(|inode| inode.broken = true);
        }
        file.announce_release();
        self.perform(actions);
        self.retire(&file, record, late_stream_writes);
    }

    /// Something still reaches the file: a region that is being registered at this moment, and will
    /// be dropped as soon as that is done, or one that the device refuses to deregister. For the
    /// second case the queue pairs go too, which is as good a barrier, and the next try finds the
    /// regions again.
    fn fence_again(&self, file: &HeldFile, error: &FenceFailed) {
        let tries = file.count_fence_failure();
        if tries == 1 {
            let error = with_causes(error);
            tracing::warn!(path = %file.path().display(), error, "a fence is not complete yet");
        }
        if file.has_failed_segments() {
            for session in self.registry().sessions_on(file.id()) {
                self.sever(session);
            }
        }
        let pause = FENCE_RETRY_FIRST * 2_u32.saturating_pow(tries.min(8));
        let at = Instant::now() + pause.min(FENCE_RETRY_LAST);
        self.order(Order::At(file.id(), at));
    }

    /// Destroys a session's queue pair; the client connects a new one, or not.
    fn sever(&self, id: SessionId) {
        let session = locked(&self.sessions).get(&id).cloned();
        if let Some(session) = session
            && let Some(link) = locked(&session.link).as_mut()
        {
            link.disconnect();
        }
    }

    /// Hands a released file to the thread that takes it down.
    fn retire(&self, file: &Arc<HeldFile>, record: Option<Record>, late_stream_writes: usize) {
        let file = Arc::clone(file);
        // The thread ends only with the engine.
        let _ = self.teardowns.send(Retired { file, record, late_stream_writes });
    }

    /// Deregisters and unmaps, and writes the audit record.
    fn take_down(&self, Retired { file, record, late_stream_writes }: Retired) {
        let (deregistered, unmapped, failed_regions) = file.tear_down();
        if let Some(record) = record {
            let teardown = Teardown {
                deregistered: deregistered - record.since,
                unmapped: unmapped - record.since,
                failed_regions,
                late_stream_writes,
            };
            audit::revocation(file.path(), file.tier(), &record, &teardown);
            // Nobody watches: no error.
            let _ = self.records.send(wire::record(file.path(), &record, &teardown));
        }
        self.forget(file);
    }

    fn forget(&self, file: Arc<HeldFile>) {
        let identity = file.description().identity();
        self.registry().retired(file.id());
        locked(&self.files).remove(&file.id());
        drop(file);
        self.prune(identity);
        self.retired.notify_waiters();
    }

    /// Forgets an inode that nobody uses.
    fn prune(&self, identity: FileIdentity) {
        let mut inodes = locked(&self.inodes);
        if inodes.get(&identity).is_some_and(Inode::is_unused) {
            inodes.remove(&identity);
        }
    }

    /// Takes everything back, with the same notices as for a break. Returns when nothing is guarded
    /// any more, or when that takes far too long.
    pub(crate) async fn shut_down(&self) {
        let budget = self.break_budget();
        let actions = self.registry().shut_down(Instant::now(), budget);
        self.perform(actions);
        let give_up = tokio::time::Instant::now() + budget + PATIENCE;
        loop {
            let changed = self.retired.notified();
            if self.registry().is_idle() {
                break;
            }
            if tokio::time::timeout_at(give_up, changed).await.is_err() {
                tracing::error!("files are still guarded; the kernel lets go of them now");
                break;
            }
        }
        let sessions = std::mem::take(&mut *locked(&self.sessions));
        // Their queue pairs go with them, and their streams end.
        let _ = tokio::task::spawn_blocking(move || drop(sessions)).await;
    }

    // ------------------------------------------------------------------------------ actions

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
                self.tell(session, wire::draining(&pins, generation, reason, budget));
            }
            Action::NotifyRevoked { session, pins, generation, reason, timings } => {
                self.tell(session, wire::revoked(&pins, generation, reason, &timings));
            }
            Action::FenceAt { guard, at } => self.order(Order::At(guard, at)),
            Action::FenceNow { guard, urgent: true } => self.order(Order::Now(guard)),
            Action::FenceNow { guard, urgent: false } => self.order(Order::Idle(guard)),
            Action::DropRegions { guard, pin, session } => self.drop_regions(guard, pin, session),
            Action::DropSession { session } => {
                let parts = locked(&self.sessions).remove(&session);
                if let Some(mut link) = parts.and_then(|parts| locked(&parts.link).take()) {
                    link.disconnect();
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
            self.sever(session);
        }
    }

    /// Never waits: a client that does not read its stream is fenced by the deadline.
    fn tell(&self, id: SessionId, event: v1::SessionEvent) {
        let Some(session) = locked(&self.sessions).get(&id).cloned() else { return };
        if session.outbox.try_send(Ok(event)).is_err() {
            tracing::warn!(session = %id, "a client does not read its events");
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

/// The right to open, guard or resize an inode.
struct Turn {
    engine: Arc<Engine>,
    identity: FileIdentity,
    held: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held = None;
        self.engine.prune(self.identity);
    }
}

impl Inode {
    fn is_unused(&self) -> bool {
        let closed = self.description.as_ref().is_none_or(|weak| weak.upgrade().is_none());
        closed && Arc::strong_count(&self.turn) == 1
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic under one of these locks left the maps whole: each change is one insert or remove.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn with(engine: &Weak<Engine>, work: impl FnOnce(&Engine)) {
    if let Some(engine) = engine.upgrade() {
        work(&engine);
    }
}

fn no_device() -> Error {
    Error::NoRdmaDevice {
        why:
            "there was none with an active port when it started; add one (rdma link add rxe0 type \
              rxe netdev IFACE makes a soft one) and restart pinfoldd, or use the stream path"
                .to_owned(),
    }
}

/// Whether a pin that can't go by RDMA for this reason can go by the stream path.
fn stream_can_serve(error: &Error) -> bool {
    matches!(
        error,
        Error::NoRdmaDevice { .. }
            | Error::NoQueuePair
            | Error::CannotRegister { .. }
            | Error::MisalignedPin { .. }
            | Error::Verbs(
                VerbsError::MemlockExceeded { .. }
                    | VerbsError::PinRefused { .. }
                    | VerbsError::PinFault { .. }
                    | VerbsError::NoOnDemandPaging { .. }
            )
    )
}

/// A piece of the stream path lies inside its pin and inside the file.
fn piece_fits(offset: u64, len: u64, pin: &Range<u64>, size: u64) -> Result<()> {
    let (start, end) = (offset, offset.saturating_add(len));
    if len == 0 {
        return Err(Error::BadRange { start, end, why: "the piece is empty" });
    }
    for (limit, what) in [(pin.end, "the pin"), (size, "the file")] {
        if start < pin.start || end > limit {
            return Err(Error::RangePastEnd { start, end, limit, what, remedy: "" });
        }
    }
    Ok(())
}

fn still_draining(located: &Located) -> Error {
    Error::StillDraining { path: located.path().to_owned(), waited: PATIENCE }
}

/// Whether what stands in the way of a pin will be gone in a moment: a revocation, or somebody who
/// was just let through and has not let go of the file yet. /proc shows no descriptor of a
/// truncate(2), and may show the one that we are closing.
fn passes(error: &Error) -> bool {
    let me = std::process::id();
    match error {
        Error::Refused(Refusal::Draining) => true,
        Error::File(FileError::Broken | FileError::AlreadyFenced) => true,
        Error::File(FileError::Busy { openers, .. }) => openers.iter().all(|o| o.pid == me),
        _ => false,
    }
}

/// Random bytes from the kernel (getrandom(2)).
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        // Interrupted calls are tried again; others don't fail for so few bytes.
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags).unwrap_or(0);
    }
    bytes
}

/// A third of the time that the kernel holds a breaker back, at most five seconds; nothing where
/// the kernel waits for one second only.
fn drain_budget(lease_break_time: Option<Duration>) -> Duration {
    match lease_break_time {
        None => LONGEST_DRAIN,
        Some(time) if time <= Duration::from_secs(1) => Duration::ZERO,
        Some(time) => (time / 3).min(LONGEST_DRAIN),
    }
}

/// Whether the kernel still held the breaker back when we let go. A reader's expiry leaves a read
/// lease behind, so for readers the clock decides.
fn still_pending(
    released: &pinfold_leases::Released,
    waited: Duration,
    lease_break_time: Option<Duration>,
) -> bool {
    let expired = lease_break_time.is_some_and(|time| waited >= time);
    match released.broken {
        None => false,
        Some(BreakKind::Writer) => !released.lapsed,
        Some(BreakKind::Reader) => !released.lapsed && !expired,
    }
}

/// The bytes of a pin, checked against the file's size.
fn usable_range(asked: Option<Range<u64>>, size: u64) -> Result<Range<u64>> {
    let range = asked.unwrap_or(0..size);
    let (start, end) = (range.start, range.end);
    if start == end {
        let why = if size == 0 { "the file is empty" } else { "the range is empty" };
        return Err(Error::BadRange { start, end, why });
    }
    if start > end {
        return Err(Error::BadRange { start, end, why: "it ends before it starts" });
    }
    if end > size {
        let remedy = ", or create the file with that size";
        return Err(Error::RangePastEnd { start, end, limit: size, what: "the file", remedy });
    }
    Ok(range)
}

/// Where the keys of a pin end: past the range if more is reserved, but inside the mapping.
fn reserved_end(end: u64, reserve_end: u64, mapped: u64) -> Result<u64> {
    let reach = end.max(reserve_end);
    if reach > mapped {
        let what = "what is mapped of the file while others have it pinned";
        let remedy = ", or wait until it has no pins";
        return Err(Error::RangePastEnd { start: end, end: reach, limit: mapped, what, remedy });
    }
    Ok(reach)
}

/// The bytes of a commit, checked against its pin.
fn committed_range(asked: Option<Range<u64>>, pin: &Range<u64>, size: u64) -> Result<Range<u64>> {
    let range = asked.unwrap_or(pin.start..pin.end.min(size));
    let (start, end) = (range.start, range.end);
    if start >= end {
        return Err(Error::BadRange {
            start,
            end,
            why: "the range is empty or ends before it starts",
        });
    }
    if start < pin.start || end > pin.end {
        let what = "the pin";
        return Err(Error::RangePastEnd { start, end, limit: pin.end, what, remedy: "" });
    }
    if end > size {
        // The device takes them, in the last page; growth will put zeroes there.
        let what = "the file";
        return Err(Error::RangePastEnd { start, end, limit: size, what, remedy: "" });
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drain_leaves_time_before_the_kernel_lets_go() {
        let budget = |seconds| drain_budget(Some(Duration::from_secs(seconds)));
        assert_eq!(drain_budget(None), Duration::from_secs(5), "the kernel waits for ever");
        assert_eq!(budget(1), Duration::ZERO);
        assert_eq!(budget(3), Duration::from_secs(1));
        assert_eq!(budget(45), Duration::from_secs(5));
        for seconds in 1..100 {
            assert!(budget(seconds) * 2 < Duration::from_secs(seconds), "{seconds}");
        }
    }

    #[test]
    fn ranges_are_checked_to_the_byte() {
        assert_eq!(usable_range(None, 10).unwrap(), 0..10);
        assert_eq!(usable_range(Some(3..10), 10).unwrap(), 3..10);
        assert!(matches!(usable_range(None, 0), Err(Error::BadRange { .. })));
        assert!(matches!(usable_range(Some(4..4), 10), Err(Error::BadRange { .. })));
        #[allow(clippy::reversed_empty_ranges, reason = "what a client may send")]
        let reversed = 5..4;
        assert!(matches!(usable_range(Some(reversed), 10), Err(Error::BadRange { .. })));
        assert!(matches!(usable_range(Some(3..11), 10), Err(Error::RangePastEnd { .. })));
    }

    #[test]
    fn a_commit_stays_inside_its_pin() {
        assert_eq!(committed_range(None, &(5..9), 100).unwrap(), 5..9);
        assert_eq!(committed_range(Some(6..7), &(5..9), 100).unwrap(), 6..7);
        assert!(matches!(committed_range(Some(7..7), &(5..9), 100), Err(Error::BadRange { .. })));
        for outside in [4..9, 5..10, 20..30] {
            let refused = committed_range(Some(outside), &(5..9), 100);
            assert!(matches!(refused, Err(Error::RangePastEnd { .. })));
        }
        assert_eq!(committed_range(None, &(5..9), 7).unwrap(), 5..7, "what there is of it");
        let vanishing = committed_range(Some(5..9), &(5..9), 7);
        assert!(matches!(vanishing, Err(Error::RangePastEnd { limit: 7, .. })));
    }

    #[test]
    fn a_size_changes_only_in_the_direction_that_was_asked_for() {
        assert!(Resize::Longer.demand(10, 9).is_err());
        assert!(Resize::Shorter.demand(10, 11).is_err());
        for resize in [Resize::Longer, Resize::Shorter, Resize::Exactly] {
            assert!(resize.demand(10, 10).is_ok());
        }
        assert!(Resize::Longer.demand(10, 11).is_ok() && Resize::Shorter.demand(10, 9).is_ok());
    }
}
