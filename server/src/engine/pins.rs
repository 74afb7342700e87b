//! Pins, the bytes that move by them, and commits.

use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pinfold_leases::{
    Break, Description, Error as FileError, FileIdentity, Guard, GuardTier, Located, LockKind,
    Mapping, RelativePath, waiting_breakers,
};
use pinfold_proto::{Bytes, v1};
use pinfold_verbs::{Error as VerbsError, ProtectionDomain, Quirks, RegistrationMode, with_causes};
use tokio::sync::oneshot;

use super::ending::Unpinned;
use super::files::still_draining;
use super::obstacles::{FileWait, KeptOpen, Obstacles, TRY_AGAIN, keep_open};
use super::sessions::no_device;
use super::{Engine, PATIENCE, SessionParts, UNPIN_AT_MOST, locked};
use crate::config::{GuardWish, OnTruncate, Policy};
use crate::error::{Error, Result};
use crate::fabric::{self, Fabric};
use crate::fence::Order;
use crate::gate::Inside;
use crate::held::{Exported, HeldFile};
use crate::ids::{Generation, Life, PinId, SessionId};
use crate::passage::Waiting;
use crate::registry::{PinAccess, Reason, Refusal, Standing, Terms, Transport};
use crate::revocation_cost::{Cost, time_limit};
use crate::wire;

/// A stream write enters the kernel with so many bytes at a time: no more than that of it can land
/// after the file has been let go.
const WRITE_CALL_BYTES: usize = 64 << 10;

/// The ways by which a pin's bytes can travel; the stream path always can.
#[derive(Debug)]
pub(crate) struct Ways {
    /// Offset, length, address and key of each region; none: by the stream path only.
    pub segments: Vec<v1::Segment>,
    /// The device's rules for this kind of registration.
    pub quirks: v1::Quirks,
    /// Why there are no segments.
    pub no_rdma_because: String,
    /// Why the client can't flush by itself; absent: it can.
    pub no_flush_because: Option<String>,
    /// Why it can't use atomics.
    pub no_atomics_because: Option<String>,
    /// Why it can't write 8 bytes as one step.
    pub no_atomic_write_because: Option<String>,
}

impl Ways {
    pub(super) fn stream(no_rdma_because: String) -> Self {
        let quirks = v1::Quirks { start_alignment_bytes: 1, path_mtu_bytes: 0 };
        let because = Some("the pin goes by the stream path only".to_owned());
        Self {
            segments: Vec::new(),
            quirks,
            no_rdma_because,
            no_flush_because: because.clone(),
            no_atomics_because: because.clone(),
            no_atomic_write_because: because,
        }
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

/// Who wants a pin, and which.
#[derive(Clone, Copy)]
struct Asker<'a> {
    id: SessionId,
    session: &'a SessionParts,
    order: &'a PinOrder,
    kept_open: Option<&'a KeptOpen>,
}

/// A file that is to be pinned.
pub(super) struct Found {
    pub(super) located: Located,
    /// Not later than it was looked for.
    pub(super) at: Instant,
}

/// What came of an attempt that waits for nobody.
enum Tried {
    Pinned(Box<Granted>),
    MustWait(Found),
}

/// What making a pin ready needs to know.
pub(super) struct Registration<'a> {
    file: &'a HeldFile,
    mapping: &'a Mapping,
    pin: PinId,
    range: &'a Range<u64>,
    reach: Range<u64>,
    order: &'a PinOrder,
}

/// How a pin's bytes are to be registered.
struct Route {
    domain: ProtectionDomain,
    mode: RegistrationMode,
    quirks: Quirks,
    fabric: Arc<Fabric>,
    /// The first byte that a key may reach.
    start: u64,
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
    /// Gives the pin back if the grant gets lost on its way to the client.
    pub claim: Claim,
}

/// A pin that its client does not know of yet: dropped, it is given back. A call's work may end long after
/// its caller has been told that it took too long.
#[derive(Debug)]
pub(crate) struct Claim {
    engine: Weak<Engine>,
    session: SessionId,
    pin: PinId,
    taken: bool,
}

impl Claim {
    /// The grant is on its way to the client.
    pub(crate) fn take(&mut self) {
        self.taken = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.taken
            && let Some(engine) = self.engine.upgrade()
        {
            // The session may be over too: then nothing is left to give back.
            let _ = engine.begin_unpin(self.session, self.pin);
        }
    }
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
    /// Refuse if somebody else has changed the file since.
    pub expected_life: Option<Life>,
    /// How its bytes are to travel.
    pub transport: TransportWish,
    /// Keep others off.
    pub exclusive: bool,
    /// Take the pins of others back for it.
    pub steal: bool,
    /// Keys reach up to here, if that is past the range.
    pub reserve_end: u64,
    /// If others have the file open: wait so long for them.
    pub wait: Duration,
    /// By which the client can withdraw it; 0: by none.
    pub number: u64,
}

/// The call that waits for a pin.
struct Caller<'a> {
    id: SessionId,
    answer: &'a oneshot::Sender<Result<Granted>>,
}

impl Engine {
    /// Guards a file, if it isn't yet, and registers a range of it for a session. Once begun it
    /// runs to its end; if nobody waits for the answer any more, the pin is given back.
    pub(crate) async fn pin(&self, id: SessionId, order: PinOrder) -> Result<Granted> {
        let (answer, waiting) = oneshot::channel();
        let engine = self.arc();
        tokio::spawn(async move {
            let granted = engine.pin_to_the_end(order, &Caller { id, answer: &answer }).await;
            // If nobody takes it, its claim gives the pin back.
            let _ = answer.send(granted);
        });
        waiting.await.map_err(|_| Error::Task)?
    }

    async fn pin_to_the_end(&self, order: PinOrder, caller: &Caller<'_>) -> Result<Granted> {
        let mut wait = FileWait::new(order.wait);
        let granted = self.pin_when_free(&order, &mut wait, caller).await;
        wait.end(self);
        granted
    }

    /// Whether nobody waits for the answer any more.
    fn is_given_up(&self, order: &PinOrder, caller: &Caller<'_>) -> bool {
        caller.answer.is_closed() || self.is_withdrawn(caller.id, order.number)
    }

    async fn pin_when_free(
        &self,
        order: &PinOrder,
        wait: &mut FileWait,
        caller: &Caller<'_>,
    ) -> Result<Granted> {
        let id = caller.id;
        let mut obstacles = Obstacles::default();
        loop {
            let error = match self.try_to_pin(id, order, wait.kept_open()).await {
                Ok(granted) => return Ok(granted),
                Err(error) => error,
            };
            let located = match self.locate(order.export.clone(), order.path.clone()).await {
                // Whatever stood in the way before.
                Err(quiesced @ Error::Quiesced { .. }) => {
                    self.demand_session(id)?;
                    if !wait.is_worth(&quiesced) || self.is_given_up(order, caller) {
                        return Err(quiesced);
                    }
                    wait.pause_outside(self).await?;
                    obstacles = Obstacles::default();
                    continue;
                }
                located => located,
            };
            let just_let_through = || located.as_ref().is_ok_and(|at| self.just_let_through(at));
            if obstacles.pass(&error, just_let_through) {
                tokio::time::sleep(TRY_AGAIN).await;
            } else if wait.is_worth(&error) && !self.is_given_up(order, caller) {
                wait.pause(self, located?).await?;
                // What passes by itself starts anew after a wait.
                obstacles = Obstacles::default();
            } else {
                return Err(error);
            }
        }
    }

    pub(super) async fn try_to_pin(
        &self,
        id: SessionId,
        order: &PinOrder,
        kept_open: Option<KeptOpen>,
    ) -> Result<Granted> {
        let session = self.session(id)?;
        let (wanted, parts, slot) = (order.clone(), Arc::clone(&session), kept_open.clone());
        let len = order.range.as_ref().map_or(0, |range| range.end.saturating_sub(range.start));
        let tried = self.long_call(&order.export, len, move |engine| {
            let asker = Asker { id, session: &parts, order: &wanted, kept_open: slot.as_ref() };
            engine.pin_at_once(&asker)
        });
        let found = match tried.await? {
            Tried::Pinned(granted) => return Ok(*granted),
            Tried::MustWait(found) => found,
        };
        let located = &found.located;
        let turn = self.take_turn(located).await?;
        if order.steal {
            // Nobody loses a pin for a request that can't be granted.
            let range = usable_range(order.range.clone(), located.size())?;
            let end = range.end.max(order.reserve_end);
            self.registry().demand_room_after(id, located.identity(), end - range.start)?;
            if let Some(file) = self.held(located.identity()) {
                self.demand_obtainable(&session, &file, &range, order)?;
            }
            self.demand_still_named(&order.export, &order.path, located).await?;
            // In the same turn as the new guarding: nobody comes between.
            self.take_back(located, Reason::Steal).await?;
        }
        let held = self.settled(located).await?.map(|(file, _)| file);
        let order = order.clone();
        self.long_call(&order.export.clone(), len, move |engine| {
            let _turn = turn;
            let (session, kept_open) = (session.as_ref(), kept_open.as_ref());
            engine.pin_in_turn(&Asker { id, session, order: &order, kept_open }, &found, held)
        })
        .await
    }

    /// Pins where there is nobody to wait for, as there almost never is: all on one thread, since each
    /// change of threads costs more than most of the work.
    fn pin_at_once(&self, asker: &Asker<'_>) -> Result<Tried> {
        let order = asker.order;
        if order.transport == TransportWish::Rdma {
            self.demand_link(asker.session)?;
        }
        let found = self.find(order)?;
        if order.steal {
            return Ok(Tried::MustWait(found));
        }
        let Some(_turn) = self.turn_if_free(found.located.identity()) else {
            return Ok(Tried::MustWait(found));
        };
        let standing = self.registry().standing(found.located.identity());
        let held = match standing {
            Some((_, Standing::Going)) => return Ok(Tried::MustWait(found)),
            Some((guard, Standing::Held { .. })) => self.file(guard),
            None => None,
        };
        let granted = self.pin_in_turn(asker, &found, held)?;
        Ok(Tried::Pinned(Box::new(granted)))
    }

    /// Finds the file that is to be pinned, if it is the one that is meant.
    fn find(&self, order: &PinOrder) -> Result<Found> {
        let reserve_limit = self.limits.reserved_bytes_per_pin;
        let at = Instant::now();
        let located = self.export(&order.export)?.locate(&order.path)?;
        if order.expected.is_some_and(|expected| expected != located.identity()) {
            return Err(Error::FileChanged { path: located.path().to_owned() });
        }
        if order.reserve_end.saturating_sub(located.size()) > reserve_limit {
            let what = "what one pin may reserve past the end of a file";
            return Err(Refusal::Quota { what, limit: reserve_limit }.into());
        }
        Ok(Found { located, at })
    }

    /// Only in the inode's turn. `held`: it is guarded already.
    fn pin_in_turn(
        &self,
        asker: &Asker<'_>,
        found: &Found,
        held: Option<Arc<HeldFile>>,
    ) -> Result<Granted> {
        let Asker { id, session, order, kept_open } = *asker;
        let policy = self.policy(&order.export)?;
        let file = match held {
            Some(file) => file,
            None => self.guard(&found.located, policy, order, kept_open)?,
        };
        if file.policy() != policy {
            let (path, tier) = (file.path().to_owned(), file.tier());
            return Err(Error::HeldOtherwise { path, tier });
        }
        // Before the look whether the export is quiesced, so that one of the two is seen.
        file.reach_by(&order.export);
        let granted = self.demand_found(&file, found, order).and_then(|name| {
            demand_life(&file, order.expected_life)?;
            let granted = self.pin_on(&file, id, session, order)?;
            file.names().keep(granted.pin, name);
            if self.demand_session(id).is_err() {
                // It may have ended before the line above, and then nobody else forgets the name.
                file.names().drop(granted.pin);
            }
            Ok(granted)
        });
        if granted.is_err() {
            let unused = self.registry().release_if_unused(file.id());
            self.perform(unused);
        }
        granted
    }

    /// Opens, guards and maps a file, with room for what a pin reserves past its end.
    fn guard(
        &self,
        located: &Located,
        policy: Policy,
        order: &PinOrder,
        kept_open: Option<&KeptOpen>,
    ) -> Result<Arc<HeldFile>> {
        let file_system = Arc::clone(self.file_system(&order.export)?);
        let exported = Exported { policy, file_system };
        // Refused before it is opened: that alone may change the file.
        located.kind()?;
        let guardable = located.can_be_guarded()?;
        if policy.guard != GuardWish::None && !guardable {
            return Err(Error::CannotBeGuarded { path: located.path().to_owned() });
        }
        self.room.demand_for_file()?;
        self.demand_quiet(located)?;
        self.let_breakers_pass(located)?;
        let description = self.open(located)?;
        keep_open(kept_open, &description);
        let kind = description.kind()?;
        let held =
            self.arm_and_map(&description, policy, order.reserve_end).inspect_err(|error| {
                // So early that there was nothing to take back yet.
                if matches!(error, Error::File(FileError::Broken)) {
                    let changed = description.times().changed_ns;
                    self.begin_passage(&description, changed, Waiting::Seen);
                }
            })?;
        let identity = description.identity();
        let _guarding = self.lives.guarding();
        let life = self.lives.guarded(identity, located.times(), description.times());
        let file = HeldFile::new(description, life, kind, exported, guardable, held);
        let file = Arc::new(file);
        // Known to the fence before it is known to the registry.
        let files = {
            let mut files = locked(&self.files);
            files.insert(file.id(), Arc::clone(&file));
            files.len()
        };
        file.file_system().regions().make_room(files);
        let added = self.registry().add_file(identity, file.id());
        if let Err(refusal) = added {
            self.give_back_unused(&file);
            self.retire(&file, None, 0);
            return Err(refusal.into());
        }
        // News of a break that came before the registry knew the file went nowhere.
        if let Some(kind) = file.broken() {
            self.handle_break(Break { guard: file.id(), kind, at: Instant::now() });
        }
        self.lives.write_down();
        Ok(file)
    }

    /// Lets a file go that has no regions yet.
    fn give_back_unused(&self, file: &HeldFile) {
        let (identity, modified) =
            (file.description().identity(), file.description().times().modified_ns);
        self.lives.leaving(identity);
        let fenced = file.mapping().and_then(|mapping| mapping.fence().ok());
        let released = fenced.and_then(|fenced| file.release(fenced));
        let is_known = released.is_some_and(|released| !released.lapsed);
        self.lives.let_go(identity, modified.filter(|_| is_known));
    }

    fn arm_and_map(
        &self,
        description: &Description,
        policy: Policy,
        reserve_end: u64,
    ) -> Result<(Guard, Mapping)> {
        // Only once it is guarded can the size not change any more.
        let len = || Ok::<_, FileError>(description.size()?.max(reserve_end).max(1));
        Ok(match policy.on_truncate {
            OnTruncate::Deny => description.arm_to_seal(&self.watcher)?.map(len()?)?,
            OnTruncate::Recall => {
                description.arm_at_most(&self.watcher, policy.strongest())?.map(len()?)?
            }
        })
    }

    /// After a break, whoever waited goes first.
    fn let_breakers_pass(&self, located: &Located) -> Result<()> {
        let (identity, changed) = (located.identity(), located.times().changed_ns);
        let now = Instant::now();
        let (recent, over, left) = {
            let mut passages = locked(&self.passages);
            let over = passages.is_over(identity, changed, now);
            (passages.is_recent(identity, now), over, passages.left_alone(identity, now))
        };
        if let Some(left) = left {
            return Err(Error::LeftAlone { path: located.path().to_owned(), left });
        }
        if !over || (recent && !waiting_breakers(identity).is_empty()) {
            return Err(Refusal::Draining.into());
        }
        Ok(())
    }

    pub(super) fn pin_on(
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
            self.drop_regions(file, pin, Some(session));
            let actions = self.registry().abandon_pin(pin, Instant::now());
            self.perform(actions);
            // What fails on a mapping that is being fenced fails for that reason.
            if file.is_wanted() { Refusal::Draining.into() } else { error }
        })?;
        let (access, file) = (order.access, Arc::clone(file));
        let claim = Claim { engine: Weak::clone(&self.me), session: id, pin, taken: false };
        Ok(Granted { file, pin, generation, access, range, valid_end, ways, claim })
    }

    /// Registers what the pin asks for, and lets the pin live.
    pub(super) fn make_ready(
        &self,
        session: &SessionParts,
        job: &Registration<'_>,
    ) -> Result<(Generation, Ways)> {
        job.file.lock_for(job.pin, job.reach.clone(), lock_kind(job.order.access))?;
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
        if ways.segments.is_empty() && job.order.access == PinAccess::ReadWrite {
            job.file.demand_stream_writes()?;
        }
        let transport = if ways.segments.is_empty() { Transport::Stream } else { Transport::Rdma };
        let generation = self.registry().finish_pin(job.pin, transport)?;
        Ok((generation, ways))
    }

    pub(super) fn register(&self, session: &SessionParts, job: &Registration<'_>) -> Result<Ways> {
        let Registration { file, mapping, pin, range, reach, order } = job;
        let Route { domain, mode, quirks, fabric, start } =
            self.route(session, file, range, order)?;
        let go_on = || self.registry().is_held(file.id()) && !file.is_wanted();
        if order.access == PinAccess::ReadWrite {
            mapping.populate((*range).clone(), go_on)?;
        }
        let flush = fabric.flush_for(file, order.access);
        let manner =
            fabric::Manner { mode, quirks: &quirks, access: order.access, flush: flush.is_ok() };
        let regions = fabric::regions(start..reach.end, mode, &quirks);
        let charges = self
            .region_budget
            .charge(file.cost(), self.time_to_cut_off(file), fabric.cost_of(mode), &regions)
            .map_err(|why| Error::TooCostly { path: file.path().to_owned(), why })?;
        let regions = regions.into_iter().zip(charges).collect();
        let segments = fabric::register(&domain, mapping, regions, &manner, go_on)
            .map_err(|error| error.registering(file.path()))?;
        let told = segments.iter().map(wire::segment).collect();
        file.add_segments(*pin, segments);
        Ok(Ways {
            segments: told,
            quirks: wire::quirks(&quirks),
            no_rdma_because: String::new(),
            no_flush_because: flush.err(),
            no_atomics_because: fabric.atomics_for(&quirks, order.access).err(),
            no_atomic_write_because: fabric.atomic_write_for(&quirks, order.access).err(),
        })
    }

    /// How long it may take to cut a file off; `None` where nobody waits for that in the kernel.
    fn time_to_cut_off(&self, file: &HeldFile) -> Option<Duration> {
        match file.tier() {
            GuardTier::Lease | GuardTier::Delegation | GuardTier::ReadDelegation => {}
            GuardTier::Unguarded | GuardTier::Sealed | GuardTier::NotNeeded => return None,
        }
        // Not to know is to assume the shortest.
        let time = self.lease_break_time.read().unwrap_or(Some(Duration::from_secs(1)));
        Some(time_limit(time))
    }

    /// Whether the pin could be had on a guarded file once others have none on it, as far as that is
    /// known before it is tried.
    fn demand_obtainable(
        &self,
        session: &SessionParts,
        file: &HeldFile,
        range: &Range<u64>,
        order: &PinOrder,
    ) -> Result<()> {
        let demand_rdma = || {
            let route = self.route(session, file, range, order)?;
            self.demand_affordable(file, &route, range.end.max(order.reserve_end))
        };
        let by_rdma = match order.transport {
            TransportWish::Stream => false,
            TransportWish::Rdma => demand_rdma().map(|()| true)?,
            TransportWish::Either => match demand_rdma() {
                Err(error) if stream_can_serve(&error) => false,
                affordable => affordable.map(|()| true)?,
            },
        };
        if !by_rdma && order.access == PinAccess::ReadWrite {
            file.demand_stream_writes()?;
        }
        // Our own locks are on the same description, so this meets those of other programs only.
        let reach = range.start..range.end.max(order.reserve_end);
        drop(file.description().lock_range(reach, lock_kind(order.access))?);
        Ok(())
    }

    /// Whether the regions of a pin could be had once others have none on the file.
    fn demand_affordable(&self, file: &HeldFile, route: &Route, end: u64) -> Result<()> {
        let regions = fabric::regions(route.start..end, route.mode, &route.quirks);
        let wanted = Cost::of_regions(route.fabric.cost_of(route.mode), &regions);
        self.region_budget
            .demand_room_after(file.cost(), self.time_to_cut_off(file), wanted)
            .map_err(|why| Error::TooCostly { path: file.path().to_owned(), why })
    }

    /// How a pin's bytes are to be registered, or why they can't be.
    fn route(
        &self,
        session: &SessionParts,
        file: &HeldFile,
        range: &Range<u64>,
        order: &PinOrder,
    ) -> Result<Route> {
        let reach_end = range.end.max(order.reserve_end);
        let (fabric, domain) = self.demand_link(session)?;
        let (mode, quirks) = fabric.mode_for(file.kind()).map_err(|why| Error::CannotRegister {
            path: file.path().to_owned(),
            kind: file.kind(),
            device: fabric.device().name().to_owned(),
            why: why.to_owned(),
        })?;
        if mode == RegistrationMode::Pinned && reach_end > range.end {
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
        if start >= reach_end || (start > range.start && order.transport == TransportWish::Rdma) {
            return Err(Error::MisalignedPin { start: range.start, alignment });
        }
        let quirks = quirks.clone();
        Ok(Route { domain, mode, quirks, fabric, start })
    }

    /// The session's device and protection domain, or why it has none.
    pub(super) fn demand_link(
        &self,
        session: &SessionParts,
    ) -> Result<(Arc<Fabric>, ProtectionDomain)> {
        if self.fabrics.is_empty() {
            return Err(no_device(self.rdma_declined));
        }
        let link = locked(&session.link);
        let link = link.as_ref().ok_or(Error::NoQueuePair)?;
        let domain = link.domain().ok_or(Error::NoQueuePair)?;
        Ok((Arc::clone(link.fabric()), domain.clone()))
    }

    /// Gives a pin back. When this returns its keys are dead.
    pub(crate) async fn unpin(&self, id: SessionId, pin: PinId) -> Result<()> {
        let Unpinned { fenced, done, guard } = match self.begin_unpin(id, pin) {
            Err(error @ Error::Refused(Refusal::UnknownSession)) => {
                // A client takes this for the end of its keys.
                self.until_ended(id).await;
                return Err(error);
            }
            begun => begun?,
        };
        if let Some(done) = done
            && tokio::time::timeout(UNPIN_AT_MOST, done).await.is_err()
        {
            return Err(Error::UnpinHangs { pin, waited: UNPIN_AT_MOST });
        }
        // A fence that began meanwhile may have taken the keys out of this call's hands, too.
        let fencing = guard.filter(|guard| self.registry().is_fencing(*guard));
        if let Some(file) = fenced.or_else(|| self.file(fencing?)) {
            let released = tokio::time::timeout(PATIENCE, file.wait_released()).await;
            released.map_err(|_| still_draining(file.path()))?;
        }
        Ok(())
    }

    /// Writes bytes of a pin through the kernel.
    pub(crate) async fn stream_write(&self, piece: StreamPiece, data: Bytes) -> Result<()> {
        self.streaming(piece, PinAccess::ReadWrite, move |engine| {
            let len = data.len() as u64;
            engine.inside(piece, len, PinAccess::ReadWrite, |file, inside| {
                file.demand_stream_writes()?;
                write_in_calls(file, inside, &data, piece.offset)
            })
        })
        .await
    }

    /// Does a piece of stream work on the threads of the file system.
    pub(super) async fn streaming<T: Send + 'static>(
        &self,
        piece: StreamPiece,
        access: PinAccess,
        work: impl FnOnce(&Arc<Self>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let StreamPiece { session, pin, generation, .. } = piece;
        let view = self.registry().begin_transfer(session, pin, generation, access)?;
        let file = self.file(view.guard).ok_or(Refusal::Draining)?;
        let (engine, file_system) = (self.arc(), Arc::clone(file.file_system()));
        drop(file);
        file_system.piece(move || work(&engine)).await
    }

    /// Does a piece of stream work inside the file's gate, if the pin allows it.
    pub(super) fn inside<T>(
        &self,
        piece: StreamPiece,
        len: u64,
        access: PinAccess,
        work: impl FnOnce(&HeldFile, &Inside<'_>) -> Result<T>,
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
            work(&file, &inside)
        });
        drop(inside);
        self.drop_if_out(&file, pin);
        self.fence_if_awaited(&file);
        if file.gate().is_empty_for_good() {
            let identity = file.description().identity();
            // After a release this may have been the last to keep the file open.
            drop(file);
            self.prune(identity);
        }
        done
    }

    /// After the last stream write is out: a fence may have waited for that. While clients drain it
    /// is not due, and the last of them will order it.
    pub(super) fn fence_if_awaited(&self, file: &HeldFile) {
        if file.gate().is_empty_for_good() && self.registry().is_fencing(file.id()) {
            self.order(Order::Now(file.id()));
        }
    }
}

/// How others are to see the range of a pin.
fn lock_kind(access: PinAccess) -> LockKind {
    match access {
        PinAccess::Read => LockKind::Shared,
        PinAccess::ReadWrite => LockKind::Exclusive,
    }
}

/// Whether a pin that can't go by RDMA for this reason can go by the stream path.
pub(super) fn stream_can_serve(error: &Error) -> bool {
    matches!(
        error,
        Error::NoRdmaDevice { .. }
            | Error::NoQueuePair
            | Error::CannotRegister { .. }
            | Error::MisalignedPin { .. }
            | Error::TooCostly { .. }
            | Error::Registration {
                source: VerbsError::MemlockExceeded { .. }
                    | VerbsError::PinRefused { .. }
                    | VerbsError::PinFault { .. }
                    | VerbsError::NoOnDemandPaging { .. },
                ..
            }
    )
}

/// Writes call by call, and ends between two of them once the file has been let go. What was
/// written is not acknowledged then: it may have landed in the file's next life.
fn write_in_calls(file: &HeldFile, inside: &Inside<'_>, data: &[u8], start: u64) -> Result<()> {
    let mut offset = start;
    for bytes in data.chunks(WRITE_CALL_BYTES) {
        demand_ours(inside)?;
        file.write_at(bytes, offset)?;
        offset += bytes.len() as u64;
    }
    demand_ours(inside)
}

fn demand_ours(inside: &Inside<'_>) -> Result<()> {
    if inside.may_go_on() { Ok(()) } else { Err(Refusal::Draining.into()) }
}

/// A piece of the stream path lies inside its pin and inside the file.
pub(super) fn piece_fits(offset: u64, len: u64, pin: &Range<u64>, size: u64) -> Result<()> {
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

/// The bytes of a pin, checked against the file's size.
pub(super) fn usable_range(asked: Option<Range<u64>>, size: u64) -> Result<Range<u64>> {
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
pub(super) fn reserved_end(end: u64, reserve_end: u64, mapped: u64) -> Result<u64> {
    let reach = end.max(reserve_end);
    if reach > mapped {
        let what = "what is mapped of the file while others have it pinned";
        let remedy = ", or wait until it has no pins";
        return Err(Error::RangePastEnd { start: end, end: reach, limit: mapped, what, remedy });
    }
    Ok(reach)
}

/// The bytes of a commit, checked against its pin.
pub(super) fn committed_range(
    asked: Option<Range<u64>>,
    pin: &Range<u64>,
    size: u64,
) -> Result<Range<u64>> {
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

fn demand_life(file: &HeldFile, expected: Option<Life>) -> Result<()> {
    match expected {
        Some(known) if file.life().is_another_than(known) => {
            Err(Error::FileModified { path: file.path().to_owned() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
