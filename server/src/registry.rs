//! Who holds what, and what happens when somebody wants it back: a pure state machine. Events and
//! the time come in, actions go out; no clock, no I/O, no locks.
//!
//! A guarding of a file lives so:
//!
//! ```text
//!            break, or        all drained, or
//!            shutdown         the budget is spent        fenced           released, regions
//!   Held ──────────────► Draining ─────────────► Fencing ───────► Released ────────► (gone)
//!     │                                             ▲
//!     └───────────── the last pin is gone ──────────┘
//! ```
//!
//! A reader need not end it: where the policy leaves readers to the kernel, the file stays `Held`, and
//! is looked at again when the kernel has let the reader through.
//!
//! Nothing new starts on a file that is not `Held`. A commit counts as durable if its flush ended
//! before the fence was complete, and so before the release.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use pinfold_leases::{BreakKind, FileIdentity, GuardId, GuardState, NoOutwait};

use crate::ids::{Generation, PinId, SessionId};

/// What one server holds at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Sessions at a time.
    pub sessions: usize,
    /// Pins of one session at a time.
    pub pins_per_session: usize,
    /// Bytes under the pins of one session, what they reserve included. A region costs the kernel
    /// some bytes for each of its pages.
    pub pinned_bytes_per_session: u64,
    /// Bytes that one pin may reserve past the end of its file.
    pub reserved_bytes_per_pin: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 1024,
            pins_per_session: 4096,
            pinned_bytes_per_session: 8 << 40,
            reserved_bytes_per_pin: 64 << 30,
        }
    }
}

/// How many revoked pins of a session are remembered at least, so that a late commit is told
/// "stale".
const REMEMBERED_PINS: usize = 1024;

/// What a client may do with a pin.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum PinAccess {
    /// RDMA READ.
    Read,
    /// RDMA READ and WRITE.
    ReadWrite,
}

/// Why a file is taken back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Reason {
    /// A local process wants the file.
    Break(BreakKind),
    /// The server goes down.
    Shutdown,
    /// A client wants the file shorter.
    Shrink,
    /// A client wants the file gone.
    Remove,
    /// An operator wants it free.
    Operator,
    /// An operator wants its whole export free.
    Quiesce,
    /// A client wants the file for itself.
    Steal,
    /// A local process has taken the file's name away.
    NameGone,
    /// What was written to the file may not be on its medium.
    WriteBackFailed,
}

/// How long after lease-break-time a file is looked at whose reader was left to the kernel.
pub(crate) const OUTWAIT_GRACE: Duration = Duration::from_secs(1);

/// What may be done with a reader, by the file's policy and the kernel's settings of this moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Readers {
    /// The pins are taken back for it.
    Revoke,
    /// The kernel lets it through after this time, and the pins stay.
    Outwait(Duration),
    /// The policy says the same, but it can't be done.
    CannotOutwait(NoOutwait),
}

/// Why pins were taken back for a reader though the policy leaves readers to the kernel.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum NotOutwaited {
    /// From the start.
    #[error(transparent)]
    Refused(#[from] NoOutwait),
    /// The kernel's setting was changed after the reader came.
    #[error("the kernel had not let the reader through when fs.lease-break-time was over")]
    Overdue,
}

/// How a pin's bytes travel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Transport {
    /// By RDMA, and by the stream path where a quirk wants it.
    Rdma,
    /// By the stream path only.
    Stream,
}

/// What a pin is to be.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Terms {
    /// Bytes of the file.
    pub(crate) range: Range<u64>,
    /// What may be done with them.
    pub(crate) access: PinAccess,
    /// Whether others must keep off.
    pub(crate) exclusive: bool,
}

/// What the engine has to do next, in this order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Action {
    /// Tell a session to drain.
    NotifyDraining {
        /// Whom.
        session: SessionId,
        /// Which of its pins.
        pins: Vec<PinId>,
        /// What is being revoked.
        generation: Generation,
        /// Why.
        reason: Reason,
        /// How long it has.
        budget: Duration,
    },
    /// Fence this file when `at` has come, unless it happened before.
    FenceAt {
        /// Which file.
        guard: GuardId,
        /// When.
        at: Instant,
    },
    /// Fence this file now.
    FenceNow {
        /// Which file.
        guard: GuardId,
        /// Whether somebody waits for it.
        urgent: bool,
    },
    /// Look what became of a reader at this time.
    LookAt {
        /// Which file.
        guard: GuardId,
        /// When.
        at: Instant,
    },
    /// Tell a session that its pins are gone.
    NotifyRevoked {
        /// Whom.
        session: SessionId,
        /// Which of its pins.
        pins: Vec<PinId>,
        /// What was revoked.
        generation: Generation,
        /// Why.
        reason: Reason,
        /// How it went.
        timings: Timings,
    },
    /// Deregister the memory regions of a pin whose file stays.
    DropRegions {
        /// Which file.
        guard: GuardId,
        /// Which pin.
        pin: PinId,
        /// Whose.
        session: SessionId,
    },
    /// Destroy a session's queue pair and forget the session.
    DropSession {
        /// Which.
        session: SessionId,
    },
}

/// When each step of a revocation was done, from the break on.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Timings {
    /// The news was there, and the sessions were about to be told.
    pub noticed: Duration,
    /// The last pin was drained; `None` if the budget ran out first.
    pub drained: Option<Duration>,
    /// Nothing can land any more.
    pub fenced: Duration,
    /// The guard was let go.
    pub released: Duration,
    /// The breaker was still held back when we let go.
    pub break_pending: bool,
}

/// Why the registry refuses.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The session has ended or never was.
    #[error("this session has ended or is unknown; open a new one")]
    UnknownSession,
    /// The pin was given back, or is not this session's.
    #[error("pin {pin} is not held by this session; pin the file again")]
    UnknownPin {
        /// As asked for.
        pin: PinId,
    },
    /// The generation is over.
    #[error(
        "generation {asked} of pin {pin} is over: the file was taken back meanwhile, and what was not \
         committed before is not durable; pin it again and write it again"
    )]
    Stale {
        /// As asked for.
        pin: PinId,
        /// As asked for.
        asked: Generation,
    },
    /// Another pin overlaps, and one of the two is exclusive.
    #[error(
        "bytes {}..{} are held by pin {pin} of {holder}{}; wait until it is given back, or pin other \
         bytes", range.start, range.end, if *exclusive { ", exclusively" } else { "" }
    )]
    RangeHeld {
        /// The other pin.
        pin: PinId,
        /// Its bytes.
        range: Range<u64>,
        /// Its client.
        holder: String,
        /// Whether the other one is exclusive.
        exclusive: bool,
    },
    /// The pin does not allow writing.
    #[error("pin {pin} allows reading only; pin the file with read-write access")]
    ReadOnly {
        /// As asked for.
        pin: PinId,
    },
    /// The file is on its way out.
    #[error("the file is being taken back right now; pin it again in a moment")]
    Draining,
    /// The kernel could not write the file back.
    #[error(
        "what was written by pin {pin} and not committed before may be missing on the medium: the kernel \
         could not write the file back (the server's log says why); free space on its file system or \
         replace the device, then pin the file and write it again"
    )]
    WriteBackFailed {
        /// As asked for.
        pin: PinId,
    },
    /// A limit.
    #[error("{what} is limited to {limit}; give some back or end a session")]
    Quota {
        /// Of what.
        what: &'static str,
        /// How many.
        limit: u64,
    },
    /// The server goes down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// How a file's guarding stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Standing {
    /// Pins can be had.
    Held {
        /// Of this guarding.
        generation: Generation,
        /// How many there are, those included that are still being made.
        pins: usize,
        /// How many of them clients have.
        granted: usize,
    },
    /// It is being taken back.
    Going,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Registry {
    incarnation: u64,
    limits: Limits,
    guardings: u64,
    last_pin: u64,
    last_session: u64,
    shutting_down: bool,
    sessions: HashMap<SessionId, Session>,
    files: HashMap<GuardId, File>,
    by_identity: HashMap<FileIdentity, GuardId>,
    pins: HashMap<PinId, Pin>,
}

#[derive(Debug)]
struct Session {
    number: u64,
    client_name: String,
    pins: BTreeSet<PinId>,
    pinned_bytes: u64,
    /// Newest last.
    revoked: VecDeque<Revoked>,
}

/// A pin that was taken back.
#[derive(Clone, Copy, Debug)]
struct Revoked {
    pin: PinId,
    write_back_failed: bool,
}

#[derive(Debug)]
struct File {
    identity: FileIdentity,
    generation: Generation,
    pins: BTreeSet<PinId>,
    /// How many of them are live.
    live: usize,
    /// Those that are exclusive, by their first byte: no other pin overlaps one of these, so they lie
    /// one after the other.
    exclusive: BTreeMap<u64, PinId>,
    /// Given back, but their keys and stream writes may still be on their way out.
    leaving: HashMap<PinId, Range<u64>>,
    /// A reader waits for the kernel; when to look what became of it.
    outwaiting: Option<Instant>,
    /// No commit of this guarding succeeds any more.
    write_back_failed: bool,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Held,
    Draining {
        revocation: Revocation,
        waiting: BTreeSet<PinId>,
        by: Instant,
    },
    /// `fenced`: nothing lands any more, so no flush that ends now covers anything new. `by`: when
    /// the fence falls even if a stream transfer is still inside the kernel.
    Fencing {
        revocation: Option<Revocation>,
        fenced: bool,
        by: Option<Instant>,
    },
    Released,
}

impl Session {
    fn lose(&mut self, pin: PinId, terms: &Terms) {
        self.pins.remove(&pin);
        self.pinned_bytes -= terms.range.end - terms.range.start;
    }

    fn revoked(&self, pin: PinId) -> Option<&Revoked> {
        self.revoked.iter().find(|revoked| revoked.pin == pin)
    }
}

impl File {
    fn take_in(&mut self, id: PinId, terms: &Terms) {
        self.pins.insert(id);
        if terms.exclusive {
            self.exclusive.insert(terms.range.start, id);
        }
    }

    fn lose(&mut self, id: PinId, pin: &Pin) {
        self.pins.remove(&id);
        self.live -= usize::from(pin.live);
        if pin.terms.exclusive {
            self.exclusive.remove(&pin.terms.range.start);
        }
    }
}

impl Phase {
    /// The fence is to fall because nobody uses the file. Nobody waits for it either, so it waits
    /// for every stream write that is inside the kernel.
    fn unused() -> Self {
        Self::Fencing { revocation: None, fenced: false, by: None }
    }

    /// The fence is to fall because the file is taken back.
    fn due(revocation: Revocation, by: Instant) -> Self {
        Self::Fencing { revocation: Some(revocation), fenced: false, by: Some(by) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Revocation {
    reason: Reason,
    not_outwaited: Option<NotOutwaited>,
    since: Instant,
    timings: Timings,
}

#[derive(Debug)]
struct Pin {
    session: SessionId,
    guard: GuardId,
    terms: Terms,
    transport: Transport,
    /// Its keys are out.
    live: bool,
}

/// Why a file is taken back, and what the audit record says beside that.
#[derive(Clone, Copy, Debug)]
struct Taking {
    reason: Reason,
    not_outwaited: Option<NotOutwaited>,
}

impl Taking {
    fn because(reason: Reason) -> Self {
        Self { reason, not_outwaited: None }
    }
}

/// When a break came, and what time there is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BreakTimes {
    /// When the kernel's clock started.
    pub at: Instant,
    /// Not before `at`.
    pub now: Instant,
    /// How long clients may drain, from `at` on.
    pub budget: Duration,
}

/// What a commit needs to know of a pin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PinView {
    /// Its file.
    pub guard: GuardId,
    /// Its bytes.
    pub range: Range<u64>,
}

/// A session as an operator sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct SessionView {
    /// Its secret, for telling the asker's own.
    pub id: SessionId,
    /// Counts sessions of this run.
    pub number: u64,
    /// As the client says.
    pub client_name: String,
    /// How many it holds.
    pub pins: usize,
}

/// A guarded file as an operator sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct FileView {
    /// Its guarding.
    pub guard: GuardId,
    /// Of the guarding.
    pub generation: Generation,
    /// Where its revocation stands.
    pub stage: Stage,
    /// Ordered by id: pin, number of its session, terms, transport.
    pub pins: Vec<(PinId, u64, Terms, Transport)>,
}

/// Where a file's revocation stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Stage {
    /// Not begun.
    Held,
    /// Clients drain.
    Draining,
    /// The fence is due.
    Fencing,
    /// The guard is let go.
    Released,
}

impl Registry {
    /// An empty one. `incarnation` is above that of every earlier run that had the same state folder.
    pub(crate) fn new(incarnation: u64, limits: Limits) -> Self {
        Self {
            incarnation,
            limits,
            guardings: 0,
            last_pin: 0,
            last_session: 0,
            shutting_down: false,
            sessions: HashMap::new(),
            files: HashMap::new(),
            by_identity: HashMap::new(),
            pins: HashMap::new(),
        }
    }

    /// The first half of every generation.
    pub(crate) fn incarnation(&self) -> u64 {
        self.incarnation
    }

    /// Takes a session up under a random id.
    pub(crate) fn open_session(&mut self, id: SessionId, client_name: &str) -> Result<(), Refusal> {
        if self.shutting_down {
            return Err(Refusal::ShuttingDown);
        }
        if self.sessions.len() >= self.limits.sessions {
            return Err(Refusal::Quota {
                what: "the number of sessions",
                limit: self.limits.sessions as u64,
            });
        }
        self.last_session += 1;
        let session = Session {
            number: self.last_session,
            client_name: client_name.to_owned(),
            pins: BTreeSet::new(),
            pinned_bytes: 0,
            revoked: VecDeque::new(),
        };
        self.sessions.insert(id, session);
        Ok(())
    }

    /// Whether the session lives.
    pub(crate) fn demand_session(&self, id: SessionId) -> Result<(), Refusal> {
        self.sessions.get(&id).map(drop).ok_or(Refusal::UnknownSession)
    }

    /// Ends a session: fences are ordered, then its queue pairs go, then its pins.
    pub(crate) fn end_session(&mut self, id: SessionId, now: Instant) -> Vec<Action> {
        let Some(session) = self.sessions.get(&id) else { return Vec::new() };
        let pins: Vec<PinId> = session.pins.iter().copied().collect();
        let mut actions = vec![Action::DropSession { session: id }];
        for pin in pins {
            actions.extend(self.drop_pin(pin, now));
        }
        self.sessions.remove(&id);
        // All orders first: what hangs with the queue pairs or with one file must not keep the fence of
        // another.
        actions.sort_by_key(|action| match action {
            Action::DropSession { .. } => 1,
            Action::DropRegions { .. } => 2,
            _ => 0,
        });
        actions
    }

    /// A file was guarded and mapped.
    pub(crate) fn add_file(
        &mut self,
        identity: FileIdentity,
        guard: GuardId,
    ) -> Result<Generation, Refusal> {
        if self.shutting_down {
            return Err(Refusal::ShuttingDown);
        }
        self.guardings += 1;
        let generation = Generation { incarnation: self.incarnation, counter: self.guardings };
        let file = File {
            identity,
            generation,
            pins: BTreeSet::new(),
            live: 0,
            exclusive: BTreeMap::new(),
            leaving: HashMap::new(),
            outwaiting: None,
            write_back_failed: false,
            phase: Phase::Held,
        };
        self.files.insert(guard, file);
        self.by_identity.insert(identity, guard);
        Ok(generation)
    }

    /// Whether a file is guarded now, and how it stands.
    pub(crate) fn standing(&self, identity: FileIdentity) -> Option<(GuardId, Standing)> {
        let guard = *self.by_identity.get(&identity)?;
        let file = self.files.get(&guard)?;
        match file.phase {
            Phase::Held => {
                let (generation, pins) = (file.generation, file.pins.len());
                let standing = Standing::Held { generation, pins, granted: file.live };
                Some((guard, standing))
            }
            Phase::Draining { .. } | Phase::Fencing { .. } => Some((guard, Standing::Going)),
            // The file can be guarded anew while what was is taken down.
            Phase::Released => None,
        }
    }

    /// The client of the file's first pin, by its name.
    pub(crate) fn a_holder(&self, guard: GuardId) -> Option<&str> {
        let pin = self.files.get(&guard)?.pins.first()?;
        let session = self.sessions.get(&self.pins.get(pin)?.session)?;
        Some(&session.client_name)
    }

    /// Lets a file go that turned out to have no use.
    pub(crate) fn release_if_unused(&mut self, guard: GuardId) -> Option<Action> {
        let file = self.files.get_mut(&guard)?;
        if !matches!(file.phase, Phase::Held) || !file.pins.is_empty() {
            return None;
        }
        file.phase = Phase::unused();
        Some(Action::FenceNow { guard, urgent: false })
    }

    /// Whether a file is in the state in which pins can be made.
    pub(crate) fn is_held(&self, guard: GuardId) -> bool {
        self.files.get(&guard).is_some_and(|file| matches!(file.phase, Phase::Held))
    }

    /// Whether a file is being taken back, or nobody uses it any more.
    pub(crate) fn is_going(&self, guard: GuardId) -> bool {
        self.files.get(&guard).is_some_and(|file| !matches!(file.phase, Phase::Held))
    }

    /// Whether whoever wants a file has to wait for somebody else than for this server.
    pub(crate) fn has_time(&self, guard: GuardId) -> bool {
        let phase = self.files.get(&guard).map(|file| &file.phase);
        matches!(phase, Some(Phase::Held | Phase::Draining { .. }))
    }

    /// Whether the fence is due and not yet complete.
    pub(crate) fn is_fencing(&self, guard: GuardId) -> bool {
        let phase = self.files.get(&guard).map(|file| &file.phase);
        matches!(phase, Some(Phase::Fencing { fenced: false, .. }))
    }

    /// Starts a pin: from here on it keeps its file, but nobody has a key yet.
    pub(crate) fn begin_pin(
        &mut self,
        session: SessionId,
        guard: GuardId,
        terms: Terms,
    ) -> Result<PinId, Refusal> {
        let wanted = terms.range.end - terms.range.start;
        let holder = self.sessions.get(&session).ok_or(Refusal::UnknownSession)?;
        self.demand_room(holder.pins.len(), holder.pinned_bytes, wanted)?;
        let file = self.files.get(&guard).ok_or(Refusal::Draining)?;
        if !matches!(file.phase, Phase::Held) {
            return Err(Refusal::Draining);
        }
        self.demand_free(file, &terms)?;
        self.last_pin += 1;
        let id = PinId(self.last_pin);
        self.sessions.entry(session).and_modify(|holder| {
            holder.pins.insert(id);
            holder.pinned_bytes += wanted;
        });
        self.files.entry(guard).and_modify(|file| file.take_in(id, &terms));
        // Until its regions are there, no byte travels in any way.
        let pin = Pin { session, guard, terms, transport: Transport::Stream, live: false };
        self.pins.insert(id, pin);
        Ok(id)
    }

    /// Whether a session has room for a pin of so many bytes, once all pins of a file are taken back.
    pub(crate) fn demand_room_after(
        &self,
        session: SessionId,
        taken: FileIdentity,
        wanted: u64,
    ) -> Result<(), Refusal> {
        let holder = self.sessions.get(&session).ok_or(Refusal::UnknownSession)?;
        let taken = self.by_identity.get(&taken);
        let stays = |pin: &&PinId| Some(&self.pins[pin].guard) != taken;
        let staying = holder.pins.iter().filter(stays).map(|pin| &self.pins[pin].terms.range);
        let (pins, bytes) = staying
            .fold((0, 0), |(pins, bytes), range| (pins + 1, bytes + (range.end - range.start)));
        self.demand_room(pins, bytes, wanted)
    }

    fn demand_room(&self, pins: usize, bytes: u64, wanted: u64) -> Result<(), Refusal> {
        let limit = self.limits.pins_per_session;
        if pins >= limit {
            let (what, limit) = ("the number of pins of one session", limit as u64);
            return Err(Refusal::Quota { what, limit });
        }
        let limit = self.limits.pinned_bytes_per_session;
        if bytes.saturating_add(wanted) > limit {
            return Err(Refusal::Quota { what: "the bytes under one session's pins", limit });
        }
        Ok(())
    }

    fn demand_free(&self, file: &File, wanted: &Terms) -> Result<(), Refusal> {
        let overlaps =
            |held: &Range<u64>| held.start < wanted.range.end && wanted.range.start < held.end;
        // Of those that lie one after the other, the last that begins before the end of what is wanted
        // reaches furthest.
        let last = file.exclusive.range(..wanted.range.end).next_back().map(|(_, pin)| pin);
        let mut in_the_way = last.filter(|pin| overlaps(&self.pins[pin].terms.range));
        if wanted.exclusive && in_the_way.is_none() && file.exclusive.len() < file.pins.len() {
            in_the_way = file.pins.iter().find(|pin| overlaps(&self.pins[pin].terms.range));
        }
        let Some(pin) = in_the_way else {
            // Whoever left just now may still write: an exclusive pin waits until that is over.
            let leaving = wanted.exclusive && file.leaving.values().any(overlaps);
            return if leaving { Err(Refusal::Draining) } else { Ok(()) };
        };
        let held = &self.pins[pin];
        let holder = self.sessions.get(&held.session);
        Err(Refusal::RangeHeld {
            pin: *pin,
            range: held.terms.range.clone(),
            holder: holder.map_or("a session that is ending".to_owned(), |s| s.client_name.clone()),
            exclusive: held.terms.exclusive,
        })
    }

    /// The regions of a pin are registered. Only what this lets pass may be handed out: the file
    /// may have been broken, or the session have ended, while they were made.
    pub(crate) fn finish_pin(
        &mut self,
        pin: PinId,
        transport: Transport,
    ) -> Result<Generation, Refusal> {
        let entry = self.pins.get_mut(&pin).ok_or(Refusal::UnknownSession)?;
        let file = self.files.get_mut(&entry.guard).ok_or(Refusal::Draining)?;
        if !matches!(file.phase, Phase::Held) {
            return Err(Refusal::Draining);
        }
        file.live += usize::from(!entry.live);
        entry.live = true;
        entry.transport = transport;
        Ok(file.generation)
    }

    /// A pin is given up before its keys were out.
    pub(crate) fn abandon_pin(&mut self, pin: PinId, now: Instant) -> Vec<Action> {
        self.drop_pin(pin, now)
    }

    /// A session gives a pin back. To give a revoked one back is no error: its keys are dead.
    pub(crate) fn unpin(
        &mut self,
        session: SessionId,
        pin: PinId,
        now: Instant,
    ) -> Result<Vec<Action>, Refusal> {
        let holder = self.sessions.get(&session).ok_or(Refusal::UnknownSession)?;
        if holder.pins.contains(&pin) {
            return Ok(self.drop_pin(pin, now));
        }
        match holder.revoked(pin) {
            Some(_) => Ok(Vec::new()),
            None => Err(Refusal::UnknownPin { pin }),
        }
    }

    fn drop_pin(&mut self, id: PinId, now: Instant) -> Vec<Action> {
        let Some(pin) = self.pins.remove(&id) else { return Vec::new() };
        if let Some(session) = self.sessions.get_mut(&pin.session) {
            session.lose(id, &pin.terms);
        }
        let Some(file) = self.files.get_mut(&pin.guard) else { return Vec::new() };
        file.lose(id, &pin);
        // Orders first: a deregistration that hangs must not keep a fence from falling.
        let mut actions = Vec::new();
        match &file.phase {
            Phase::Held if file.pins.is_empty() => {
                file.phase = Phase::unused();
                actions.push(Action::FenceNow { guard: pin.guard, urgent: false });
            }
            Phase::Draining { .. } => actions.extend(self.pin_drained(pin.guard, id, now)),
            _ => {}
        }
        if let Some(file) = self.files.get_mut(&pin.guard) {
            file.leaving.insert(id, pin.terms.range.clone());
        }
        actions.push(Action::DropRegions { guard: pin.guard, pin: id, session: pin.session });
        actions
    }

    /// The kernel says that somebody wants the file. `readers` is what may be done with one,
    /// `budget` how long clients may drain.
    pub(crate) fn handle_break(
        &mut self,
        guard: GuardId,
        kind: BreakKind,
        readers: Readers,
        times: &BreakTimes,
    ) -> Vec<Action> {
        let taking = Taking::because(Reason::Break(kind));
        match (kind, readers) {
            (BreakKind::Reader, Readers::Outwait(time)) => {
                self.leave_to_kernel(guard, times.at + time + OUTWAIT_GRACE)
            }
            (BreakKind::Reader, Readers::CannotOutwait(why)) => {
                let not_outwaited = Some(why.into());
                self.take_back(guard, Taking { not_outwaited, ..taking }, times)
            }
            _ => self.take_back(guard, taking, times),
        }
    }

    fn leave_to_kernel(&mut self, guard: GuardId, at: Instant) -> Vec<Action> {
        let Some(file) = self.files.get_mut(&guard) else { return Vec::new() };
        match file.phase {
            // A file that nobody uses holds nobody up, not even a reader.
            Phase::Fencing { revocation: None, .. } => {
                vec![Action::FenceNow { guard, urgent: true }]
            }
            Phase::Held if file.outwaiting.is_none() => {
                file.outwaiting = Some(at);
                vec![Action::LookAt { guard, at }]
            }
            _ => Vec::new(),
        }
    }

    /// Whether it is time to look what became of a reader.
    pub(crate) fn reader_is_due(&self, guard: GuardId, now: Instant) -> bool {
        let file = self.files.get(&guard);
        file.is_some_and(|file| {
            matches!(file.phase, Phase::Held) && file.outwaiting.is_some_and(|at| at <= now)
        })
    }

    /// What became of it, as the kernel says now (`None`: it can't be learned).
    pub(crate) fn reader_looked_at(
        &mut self,
        guard: GuardId,
        state: Option<GuardState>,
        times: &BreakTimes,
    ) -> Vec<Action> {
        if let Some(file) = self.files.get_mut(&guard) {
            file.outwaiting = None;
        }
        let (kind, not_outwaited) = match state {
            Some(GuardState::Held | GuardState::ReadersPass) => return Vec::new(),
            Some(GuardState::Broken(BreakKind::Reader)) => {
                (BreakKind::Reader, Some(NotOutwaited::Overdue))
            }
            Some(GuardState::Broken(BreakKind::Writer)) | None => (BreakKind::Writer, None),
        };
        let taking = Taking { not_outwaited, ..Taking::because(Reason::Break(kind)) };
        self.take_back(guard, taking, times)
    }

    /// Whether the server goes down.
    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutting_down
    }

    /// The server goes down: nothing new starts. Returns the files that are to be taken back.
    pub(crate) fn begin_shut_down(&mut self) -> Vec<GuardId> {
        self.shutting_down = true;
        let mut guards: Vec<GuardId> = self.files.keys().copied().collect();
        guards.sort_unstable();
        guards
    }

    /// A client wants the file's extents changed: its pins are taken back first.
    pub(crate) fn take_back_for(
        &mut self,
        guard: GuardId,
        reason: Reason,
        now: Instant,
        budget: Duration,
    ) -> Vec<Action> {
        self.take_back(guard, Taking::because(reason), &BreakTimes { at: now, now, budget })
    }

    /// The kernel could not write a file back: what was written by whichever pin may be lost, so all are
    /// taken back. One that is on its way out goes on so, and its clients are told all the same.
    pub(crate) fn write_back_failed(
        &mut self,
        guard: GuardId,
        now: Instant,
        budget: Duration,
    ) -> Vec<Action> {
        let Some(file) = self.files.get_mut(&guard) else { return Vec::new() };
        file.write_back_failed = true;
        self.take_back_for(guard, Reason::WriteBackFailed, now, budget)
    }

    fn take_back(&mut self, guard: GuardId, taking: Taking, times: &BreakTimes) -> Vec<Action> {
        let Taking { reason, not_outwaited } = taking;
        let BreakTimes { at: since, now, budget } = *times;
        // Unknown: it was released while the news was under way.
        let Some(file) = self.files.get_mut(&guard) else { return Vec::new() };
        let at = since + budget;
        match &mut file.phase {
            Phase::Held => {}
            // It was going anyway; now somebody waits for it.
            Phase::Fencing { revocation: None, by, .. } => {
                let at = by.map_or(at, |by| by.min(at));
                *by = Some(at);
                return vec![
                    Action::FenceAt { guard, at },
                    Action::FenceNow { guard, urgent: true },
                ];
            }
            _ => return Vec::new(),
        }
        let waiting: BTreeSet<PinId> =
            file.pins.iter().copied().filter(|pin| self.pins[pin].live).collect();
        let timings = Timings { noticed: now - since, ..Timings::default() };
        let revocation = Revocation { reason, not_outwaited, since, timings };
        let generation = file.generation;
        if waiting.is_empty() || at <= now {
            let drained = waiting.is_empty().then_some(now - since);
            let timings = Timings { drained, ..timings };
            let revocation = Revocation { timings, ..revocation };
            file.phase = Phase::due(revocation, at);
            return vec![Action::FenceNow { guard, urgent: true }];
        }
        let mut actions: Vec<Action> = by_session(&self.pins, &waiting)
            .into_iter()
            .map(|(session, pins)| Action::NotifyDraining {
                session,
                pins,
                generation,
                reason,
                budget: at - now,
            })
            .collect();
        actions.push(Action::FenceAt { guard, at });
        file.phase = Phase::Draining { revocation, waiting, by: at };
        actions
    }

    /// A session says that it has nothing in flight on these pins. Unknown ones, and those of
    /// others, are passed over: the answer may cross with a revocation.
    pub(crate) fn drained(
        &mut self,
        session: SessionId,
        pins: &[PinId],
        now: Instant,
    ) -> Vec<Action> {
        let own = |pin: &&PinId| self.pins.get(pin).is_some_and(|entry| entry.session == session);
        let own: Vec<(GuardId, PinId)> =
            pins.iter().filter(own).map(|pin| (self.pins[pin].guard, *pin)).collect();
        own.into_iter().flat_map(|(guard, pin)| self.pin_drained(guard, pin, now)).collect()
    }

    fn pin_drained(&mut self, guard: GuardId, pin: PinId, now: Instant) -> Option<Action> {
        let file = self.files.get_mut(&guard)?;
        let Phase::Draining { revocation, waiting, by } = &mut file.phase else { return None };
        waiting.remove(&pin);
        if !waiting.is_empty() {
            return None;
        }
        revocation.timings.drained = Some(now - revocation.since);
        file.phase = Phase::due(*revocation, *by);
        Some(Action::FenceNow { guard, urgent: true })
    }

    /// Whether the fence is due: by order, or because the deadline of a drain has come; not while
    /// clients may still drain, whatever the file was looked at for. If so: the time by which it falls
    /// even if a stream write is still inside the kernel; `None` as long as nobody waits for the file.
    pub(crate) fn fence_due(&mut self, guard: GuardId, now: Instant) -> Option<Option<Instant>> {
        let file = self.files.get_mut(&guard)?;
        match &file.phase {
            Phase::Draining { revocation, by, .. } if *by <= now => {
                file.phase = Phase::due(*revocation, *by);
            }
            _ => {}
        }
        match file.phase {
            Phase::Fencing { by, .. } => Some(by),
            _ => None,
        }
    }

    /// The fence is complete.
    pub(crate) fn fenced(&mut self, guard: GuardId, now: Instant) {
        let Some(file) = self.files.get_mut(&guard) else { return };
        let Phase::Fencing { revocation, fenced, .. } = &mut file.phase else { return };
        *fenced = true;
        if let Some(revocation) = revocation {
            revocation.timings.fenced = now - revocation.since;
        }
    }

    /// The guard is let go: from here on no commit of this generation succeeds. Returns the
    /// revocation for the audit record, unless the file just had no pins left. `break_pending`
    /// tells, of the time since the break, whether the breaker was still held back.
    pub(crate) fn released(
        &mut self,
        guard: GuardId,
        now: Instant,
        break_pending: impl FnOnce(Duration) -> bool,
    ) -> (Vec<Action>, Option<Record>) {
        let Some(file) = self.files.get_mut(&guard) else { return (Vec::new(), None) };
        let Phase::Fencing { revocation, .. } = &file.phase else { return (Vec::new(), None) };
        let revocation = *revocation;
        file.phase = Phase::Released;
        let (generation, write_back_failed) = (file.generation, file.write_back_failed);
        let gone = std::mem::take(&mut file.pins);
        (file.live, file.exclusive) = (0, BTreeMap::new());
        let live: BTreeSet<PinId> =
            gone.iter().copied().filter(|pin| self.pins[pin].live).collect();
        let sessions = by_session(&self.pins, &live);
        for pin in &gone {
            self.forget_revoked(*pin, write_back_failed);
        }
        let Some(revocation) = revocation else { return (Vec::new(), None) };
        let released = now - revocation.since;
        let break_pending = break_pending(released);
        let timings = Timings { released, break_pending, ..revocation.timings };
        let record = Record {
            generation,
            reason: revocation.reason,
            not_outwaited: revocation.not_outwaited,
            since: revocation.since,
            pins: live.len(),
            sessions: sessions.len(),
            timings,
        };
        // It may have failed only after the file was wanted.
        let reason = if write_back_failed { Reason::WriteBackFailed } else { revocation.reason };
        let actions = sessions
            .into_iter()
            .map(|(session, pins)| Action::NotifyRevoked {
                session,
                pins,
                generation,
                reason,
                timings,
            })
            .collect();
        (actions, Some(record))
    }

    fn forget_revoked(&mut self, id: PinId, write_back_failed: bool) {
        let remembered = self.limits.pins_per_session.max(REMEMBERED_PINS);
        let Some(pin) = self.pins.remove(&id) else { return };
        let Some(session) = self.sessions.get_mut(&pin.session) else { return };
        session.lose(id, &pin.terms);
        if session.revoked.len() >= remembered {
            session.revoked.pop_front();
        }
        session.revoked.push_back(Revoked { pin: id, write_back_failed });
    }

    /// Everything of this guarding is deregistered, unmapped and closed.
    pub(crate) fn retired(&mut self, guard: GuardId) {
        let Some(file) = self.files.remove(&guard) else { return };
        if self.by_identity.get(&file.identity) == Some(&guard) {
            self.by_identity.remove(&file.identity);
        }
    }

    /// Whether nothing is guarded any more.
    pub(crate) fn is_idle(&self) -> bool {
        self.files.is_empty()
    }

    /// Nothing of this pin can write any more.
    pub(crate) fn left(&mut self, guard: GuardId, pin: PinId) {
        if let Some(file) = self.files.get_mut(&guard) {
            file.leaving.remove(&pin);
        }
    }

    /// The sessions that have pins on a file.
    pub(crate) fn sessions_on(&self, guard: GuardId) -> BTreeSet<SessionId> {
        let Some(file) = self.files.get(&guard) else { return BTreeSet::new() };
        file.pins.iter().map(|pin| self.pins[pin].session).collect()
    }

    /// How many pins are on a file, also while they are being taken back.
    pub(crate) fn pins_on(&self, guard: GuardId) -> usize {
        self.files.get(&guard).map_or(0, |file| file.live)
    }

    /// Checks that a commit may start. After its flush, [`Registry::demand_unfenced`] decides.
    pub(crate) fn begin_commit(
        &self,
        session: SessionId,
        pin: PinId,
        asked: Generation,
    ) -> Result<PinView, Refusal> {
        let entry = self.live_pin(session, pin, asked)?;
        Ok(PinView { guard: entry.guard, range: entry.terms.range.clone() })
    }

    /// Checks that a transfer on the stream path may start: not from the break on.
    pub(crate) fn begin_transfer(
        &self,
        session: SessionId,
        pin: PinId,
        asked: Generation,
        access: PinAccess,
    ) -> Result<PinView, Refusal> {
        let entry = self.live_pin(session, pin, asked)?;
        if access == PinAccess::ReadWrite && entry.terms.access == PinAccess::Read {
            return Err(Refusal::ReadOnly { pin });
        }
        if !self.is_held(entry.guard) {
            return Err(Refusal::Draining);
        }
        Ok(PinView { guard: entry.guard, range: entry.terms.range.clone() })
    }

    fn live_pin(&self, session: SessionId, pin: PinId, asked: Generation) -> Result<&Pin, Refusal> {
        let holder = self.sessions.get(&session).ok_or(Refusal::UnknownSession)?;
        let entry = self.pins.get(&pin).filter(|entry| entry.live && entry.session == session);
        let entry = entry.ok_or_else(|| match holder.revoked(pin) {
            Some(Revoked { write_back_failed: true, .. }) => Refusal::WriteBackFailed { pin },
            Some(_) => Refusal::Stale { pin, asked },
            None => Refusal::UnknownPin { pin },
        })?;
        self.demand_unfenced(entry.guard, pin, asked)?;
        Ok(entry)
    }

    /// All sessions, ordered by number.
    pub(crate) fn sessions_view(&self) -> Vec<SessionView> {
        let mut sessions: Vec<SessionView> = self
            .sessions
            .iter()
            .map(|(id, session)| SessionView {
                id: *id,
                number: session.number,
                client_name: session.client_name.clone(),
                pins: session.pins.len(),
            })
            .collect();
        sessions.sort_by_key(|session| session.number);
        sessions
    }

    /// A file with so many of its pins from `first` on, and which comes after those.
    fn file_view(
        &self,
        guard: GuardId,
        file: &File,
        first: PinId,
        at_most: usize,
    ) -> (FileView, Option<PinId>) {
        let stage = match file.phase {
            Phase::Held => Stage::Held,
            Phase::Draining { .. } => Stage::Draining,
            Phase::Fencing { .. } => Stage::Fencing,
            Phase::Released => Stage::Released,
        };
        let mut ids = file.pins.range(first..);
        let pins = ids.by_ref().take(at_most).map(|id| {
            let pin = &self.pins[id];
            let session = self.sessions.get(&pin.session).map_or(0, |session| session.number);
            (*id, session, pin.terms.clone(), pin.transport)
        });
        let pins = pins.collect();
        (FileView { guard, generation: file.generation, stage, pins }, ids.next().copied())
    }

    /// A flush that returned before the fence was complete made its range durable; later it is
    /// stale, since the file may be another's before anybody looks.
    pub(crate) fn demand_unfenced(
        &self,
        guard: GuardId,
        pin: PinId,
        asked: Generation,
    ) -> Result<(), Refusal> {
        match self.files.get(&guard) {
            Some(File { write_back_failed: true, .. }) => Err(Refusal::WriteBackFailed { pin }),
            Some(File { phase: Phase::Fencing { fenced: true, .. } | Phase::Released, .. }) => {
                Err(Refusal::Stale { pin, asked })
            }
            Some(file) if file.generation == asked => Ok(()),
            _ => Err(Refusal::Stale { pin, asked }),
        }
    }
}

/// What the audit record says of a revocation up to its release.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Record {
    /// What was revoked.
    pub generation: Generation,
    /// Why.
    pub reason: Reason,
    /// Why the reader was not left to the kernel, where the policy leaves readers to it.
    pub not_outwaited: Option<NotOutwaited>,
    /// When it began.
    pub since: Instant,
    /// How many pins lost their keys.
    pub pins: usize,
    /// How many sessions those belonged to.
    pub sessions: usize,
    /// How it went.
    pub timings: Timings,
}

/// Pins grouped by session, both in a fixed order.
fn by_session(
    pins: &HashMap<PinId, Pin>,
    which: &BTreeSet<PinId>,
) -> BTreeMap<SessionId, Vec<PinId>> {
    let mut groups: BTreeMap<SessionId, Vec<PinId>> = BTreeMap::new();
    for pin in which {
        groups.entry(pins[pin].session).or_default().push(*pin);
    }
    groups
}

mod pages;

pub(crate) use pages::{InspectPage, PagePlace};

#[cfg(test)]
mod interleavings;

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_secs(3);

    /// A registry with a clock that only the test moves.
    struct World {
        registry: Registry,
        now: Instant,
    }

    fn session(number: u8) -> SessionId {
        SessionId::new([number; 16])
    }

    fn guard(number: u64) -> GuardId {
        GuardId::simulated(number)
    }

    fn inode(number: u64) -> FileIdentity {
        FileIdentity { device: 1, inode: number, birth_time_ns: 0 }
    }

    fn shared(range: Range<u64>) -> Terms {
        Terms { range, access: PinAccess::ReadWrite, exclusive: false }
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let limits = Limits {
                sessions: 3,
                pins_per_session: 4,
                pinned_bytes_per_session: 1000,
                ..Limits::default()
            };
            let mut registry = Registry::new(7, limits);
            registry.open_session(session(1), "one").unwrap();
            registry.open_session(session(2), "two").unwrap();
            Self { registry, now }
        }

        fn pass(&mut self, millis: u64) {
            self.now += Duration::from_millis(millis);
        }

        fn file(&mut self, number: u64) -> Generation {
            self.registry.add_file(inode(number), guard(number)).unwrap()
        }

        fn pin(&mut self, holder: u8, file: u64) -> PinId {
            let pin =
                self.registry.begin_pin(session(holder), guard(file), shared(0..100)).unwrap();
            self.registry.finish_pin(pin, Transport::Rdma).unwrap();
            pin
        }

        fn broken(&mut self, file: u64) -> Vec<Action> {
            self.broken_by(file, BreakKind::Writer, Readers::Revoke)
        }

        fn times(&self) -> BreakTimes {
            BreakTimes { at: self.now, now: self.now, budget: BUDGET }
        }

        fn broken_by(&mut self, file: u64, kind: BreakKind, readers: Readers) -> Vec<Action> {
            let times = self.times();
            self.registry.handle_break(guard(file), kind, readers, &times)
        }

        fn looked_at(&mut self, file: u64, state: Option<GuardState>) -> Vec<Action> {
            let times = self.times();
            self.registry.reader_looked_at(guard(file), state, &times)
        }

        fn released(&mut self, file: u64) -> (Vec<Action>, Option<Record>) {
            if self.registry.fence_due(guard(file), self.now).is_none() {
                self.now += BUDGET;
                assert!(self.registry.fence_due(guard(file), self.now).is_some());
            }
            self.registry.fenced(guard(file), self.now);
            self.registry.released(guard(file), self.now, |_| true)
        }
    }

    #[test]
    fn a_break_tells_every_session_and_sets_a_deadline() {
        let mut world = World::new();
        let generation = world.file(1);
        let (a, b, c) = (world.pin(1, 1), world.pin(2, 1), world.pin(1, 1));
        let reason = Reason::Break(BreakKind::Writer);
        let notice = |holder, pins| Action::NotifyDraining {
            session: session(holder),
            pins,
            generation,
            reason,
            budget: BUDGET,
        };
        assert_eq!(
            world.broken(1),
            [
                notice(1, vec![a, c]),
                notice(2, vec![b]),
                Action::FenceAt { guard: guard(1), at: world.now + BUDGET }
            ]
        );
        assert_eq!(world.broken(1), [], "one break is handled once");
    }

    #[test]
    fn the_fence_falls_when_the_last_pin_is_drained_and_not_before() {
        let mut world = World::new();
        world.file(1);
        let (a, b) = (world.pin(1, 1), world.pin(2, 1));
        world.broken(1);
        world.pass(10);
        assert_eq!(
            world.registry.drained(session(1), &[a, a, b], world.now),
            [],
            "b is not theirs"
        );
        world.pass(10);
        let fence = Action::FenceNow { guard: guard(1), urgent: true };
        assert_eq!(world.registry.drained(session(2), &[b], world.now), [fence]);
        world.pass(5);
        let (actions, record) = world.released(1);
        let timings = record.unwrap().timings;
        assert_eq!(timings.drained, Some(Duration::from_millis(20)));
        assert_eq!(timings.released, Duration::from_millis(25));
        assert_eq!(actions.len(), 2, "both sessions are told: {actions:?}");
    }

    #[test]
    fn the_fence_is_due_only_once_all_have_drained() {
        let mut world = World::new();
        world.file(1);
        let (a, b) = (world.pin(1, 1), world.pin(2, 1));
        assert!(!world.registry.is_fencing(guard(1)));
        world.broken(1);
        world.registry.drained(session(1), &[a], world.now);
        assert!(
            !world.registry.is_fencing(guard(1)),
            "a stream write that ends now brings no fence"
        );
        world.registry.drained(session(2), &[b], world.now);
        assert!(world.registry.is_fencing(guard(1)));
        world.released(1);
        assert!(!world.registry.is_fencing(guard(1)));
    }

    #[test]
    fn a_client_that_never_drains_is_fenced_at_the_deadline() {
        let mut world = World::new();
        world.file(1);
        world.pin(1, 1);
        world.broken(1);
        world.pass(3000);
        let (_, record) = world.released(1);
        assert_eq!(record.unwrap().timings.drained, None);
    }

    #[test]
    fn a_file_without_live_pins_holds_nobody_up() {
        let mut world = World::new();
        world.file(1);
        world.registry.begin_pin(session(1), guard(1), shared(0..1)).unwrap();
        assert_eq!(world.broken(1), [Action::FenceNow { guard: guard(1), urgent: true }]);
    }

    #[test]
    fn a_break_without_a_budget_fences_at_once_and_still_says_so() {
        let mut world = World::new();
        world.file(1);
        let pin = world.pin(1, 1);
        let times = BreakTimes { budget: Duration::ZERO, ..world.times() };
        let actions =
            world.registry.handle_break(guard(1), BreakKind::Reader, Readers::Revoke, &times);
        assert_eq!(actions, [Action::FenceNow { guard: guard(1), urgent: true }]);
        let (actions, _) = world.released(1);
        assert!(matches!(&actions[..], [Action::NotifyRevoked { pins, .. }] if *pins == [pin]));
    }

    #[test]
    fn no_key_goes_out_once_a_break_was_seen() {
        let mut world = World::new();
        world.file(1);
        let pin = world.registry.begin_pin(session(1), guard(1), shared(0..1)).unwrap();
        world.broken(1);
        assert_eq!(world.registry.finish_pin(pin, Transport::Rdma), Err(Refusal::Draining));
        let another = world.registry.begin_pin(session(1), guard(1), shared(0..1));
        assert_eq!(another, Err(Refusal::Draining));
    }

    #[test]
    fn a_commit_is_good_until_the_release_and_stale_after() {
        let mut world = World::new();
        let generation = world.file(1);
        let pin = world.pin(1, 1);
        let commit = |world: &World| world.registry.begin_commit(session(1), pin, generation);
        assert!(commit(&world).is_ok());
        world.broken(1);
        assert!(commit(&world).is_ok(), "draining");
        assert_eq!(world.registry.fence_due(guard(1), world.now), None, "they may still drain");
        world.pass(3000);
        assert!(world.registry.fence_due(guard(1), world.now).is_some());
        assert!(commit(&world).is_ok(), "the fence is due, not complete");
        world.registry.fenced(guard(1), world.now);
        let fenced = Err(Refusal::Stale { pin, asked: generation });
        assert_eq!(commit(&world), fenced, "fenced, not released");
        world.released(1);
        let stale = Err(Refusal::Stale { pin, asked: generation });
        assert_eq!(commit(&world), stale);
        let flushed_too_late = world.registry.demand_unfenced(guard(1), pin, generation);
        assert_eq!(flushed_too_late, Err(Refusal::Stale { pin, asked: generation }));
        assert_eq!(world.registry.unpin(session(1), pin, world.now), Ok(Vec::new()));
    }

    #[test]
    fn after_a_failed_write_back_no_commit_is_good_and_all_pins_go() {
        let mut world = World::new();
        let generation = world.file(1);
        let (one, two) = (world.pin(1, 1), world.pin(2, 1));
        let actions = world.registry.write_back_failed(guard(1), world.now, BUDGET);
        let reasons = actions.iter().filter_map(|action| match action {
            Action::NotifyDraining { reason, pins, .. } => Some((*reason, pins.clone())),
            _ => None,
        });
        let expected = [vec![one], vec![two]].map(|pins| (Reason::WriteBackFailed, pins));
        assert_eq!(reasons.collect::<Vec<_>>(), expected);
        let commit = |world: &World, holder, pin| {
            world.registry.begin_commit(session(holder), pin, generation).unwrap_err()
        };
        let flushed = world.registry.demand_unfenced(guard(1), two, generation);
        assert_eq!(flushed, Err(Refusal::WriteBackFailed { pin: two }), "while they drain");
        assert_eq!(commit(&world, 2, two), Refusal::WriteBackFailed { pin: two });
        let (_, record) = world.released(1);
        assert_eq!(record.unwrap().reason, Reason::WriteBackFailed);
        world.registry.retired(guard(1));
        assert_eq!(commit(&world, 1, one), Refusal::WriteBackFailed { pin: one }, "for good");
        let new = world.registry.add_file(inode(1), guard(2)).unwrap();
        let pin = world.pin(1, 2);
        assert!(world.registry.begin_commit(session(1), pin, new).is_ok(), "of the next guarding");
    }

    #[test]
    fn clients_are_told_of_a_write_back_that_fails_while_they_drain_for_another_reason() {
        let mut world = World::new();
        world.file(1);
        let pin = world.pin(1, 1);
        world.broken(1);
        let again = world.registry.write_back_failed(guard(1), world.now, BUDGET);
        assert_eq!(again, [], "they drain already");
        world.registry.drained(session(1), &[pin], world.now);
        let (actions, record) = world.released(1);
        let told =
            matches!(actions[..], [Action::NotifyRevoked { reason: Reason::WriteBackFailed, .. }]);
        assert!(told, "{actions:?}");
        let reason = record.unwrap().reason;
        assert_eq!(reason, Reason::Break(BreakKind::Writer), "the audit knows who wanted it");
    }

    #[test]
    fn another_generation_of_the_same_file_is_stale() {
        let mut world = World::new();
        let old = world.file(1);
        world.pin(1, 1);
        world.broken(1);
        world.released(1);
        let new = world.registry.add_file(inode(1), guard(9)).unwrap();
        assert_ne!(old, new);
        let pin = world.pin(1, 9);
        assert_eq!(
            world.registry.begin_commit(session(1), pin, old),
            Err(Refusal::Stale { pin, asked: old })
        );
        world.registry.retired(guard(1));
        let (found, _) = world.registry.standing(inode(1)).unwrap();
        assert_eq!(found, guard(9), "taking the old one down leaves the new one alone");
    }

    #[test]
    fn a_pin_counts_for_others_when_it_is_made() {
        let mut world = World::new();
        world.file(1);
        let terms = Terms { range: 0..10, access: PinAccess::Read, exclusive: false };
        let pin = world.registry.begin_pin(session(1), guard(1), terms).unwrap();
        let counts = |world: &World| match world.registry.standing(inode(1)) {
            Some((_, Standing::Held { pins, granted, .. })) => (pins, granted),
            other => panic!("{other:?}"),
        };
        assert_eq!(counts(&world), (1, 0), "it keeps the file, but nobody has it");
        world.registry.finish_pin(pin, Transport::Stream).unwrap();
        assert_eq!(counts(&world), (1, 1));
    }

    #[test]
    fn a_pin_belongs_to_its_session() {
        let mut world = World::new();
        let generation = world.file(1);
        let pin = world.pin(1, 1);
        let foreign = Refusal::UnknownPin { pin };
        assert_eq!(world.registry.unpin(session(2), pin, world.now), Err(foreign.clone()));
        assert_eq!(world.registry.begin_commit(session(2), pin, generation), Err(foreign));
        assert_eq!(world.registry.demand_session(session(3)), Err(Refusal::UnknownSession));
    }

    #[test]
    fn the_last_pin_lets_the_file_go_without_a_record() {
        let mut world = World::new();
        world.file(1);
        let (a, b) = (world.pin(1, 1), world.pin(1, 1));
        let dropped = |pin| Action::DropRegions { guard: guard(1), pin, session: session(1) };
        assert_eq!(world.registry.unpin(session(1), a, world.now), Ok(vec![dropped(a)]));
        let idle = Action::FenceNow { guard: guard(1), urgent: false };
        assert_eq!(world.registry.unpin(session(1), b, world.now), Ok(vec![idle, dropped(b)]));
        let sooner = Action::FenceAt { guard: guard(1), at: world.now + BUDGET };
        let urgent = Action::FenceNow { guard: guard(1), urgent: true };
        assert_eq!(world.broken(1), [sooner, urgent], "it is going, but now somebody waits");
        assert_eq!(world.released(1), (Vec::new(), None));
        world.registry.retired(guard(1));
        assert!(world.registry.is_idle());
    }

    #[test]
    fn a_session_that_ends_during_a_drain_counts_as_drained() {
        let mut world = World::new();
        world.file(1);
        let pin = world.pin(1, 1);
        world.broken(1);
        assert_eq!(
            world.registry.end_session(session(1), world.now),
            [
                Action::FenceNow { guard: guard(1), urgent: true },
                Action::DropSession { session: session(1) },
                Action::DropRegions { guard: guard(1), pin, session: session(1) }
            ]
        );
        assert_eq!(world.registry.demand_session(session(1)), Err(Refusal::UnknownSession));
    }

    #[test]
    fn one_files_break_leaves_the_others_alone() {
        let mut world = World::new();
        let (_, other) = (world.file(1), world.file(2));
        let (_, pin) = (world.pin(1, 1), world.pin(1, 2));
        world.broken(1);
        world.released(1);
        assert!(world.registry.is_held(guard(2)));
        assert!(world.registry.begin_commit(session(1), pin, other).is_ok());
    }

    #[test]
    fn limits_are_kept() {
        let mut world = World::new();
        world.file(1);
        for _ in 0..4 {
            world.pin(1, 1);
        }
        let refused = world.registry.begin_pin(session(1), guard(1), shared(0..1));
        assert!(matches!(refused, Err(Refusal::Quota { limit: 4, .. })));
        world.registry.open_session(session(3), "three").unwrap();
        assert!(matches!(
            world.registry.open_session(session(4), "four"),
            Err(Refusal::Quota { limit: 3, .. })
        ));
    }

    #[test]
    fn a_shutdown_takes_everything_back_and_starts_nothing() {
        let mut world = World::new();
        world.file(1);
        world.file(2);
        world.pin(1, 1);
        assert_eq!(world.registry.begin_shut_down(), [guard(1), guard(2)]);
        assert_eq!(world.registry.open_session(session(3), "three"), Err(Refusal::ShuttingDown));
        assert_eq!(world.registry.add_file(inode(3), guard(3)), Err(Refusal::ShuttingDown));
    }

    #[test]
    fn an_exclusive_pin_keeps_others_off_its_bytes_and_names_itself() {
        let mut world = World::new();
        world.file(1);
        let begin = |world: &mut World, holder, range, exclusive| {
            let terms = Terms { exclusive, ..shared(range) };
            world.registry.begin_pin(session(holder), guard(1), terms)
        };
        let first = begin(&mut world, 1, 10..20, true).unwrap();
        for range in [0..11, 19..30, 12..13, 0..100] {
            let refused = begin(&mut world, 2, range, false).unwrap_err();
            let held = Refusal::RangeHeld {
                pin: first,
                range: 10..20,
                holder: "one".to_owned(),
                exclusive: true,
            };
            assert_eq!(refused, held);
        }
        begin(&mut world, 2, 20..30, false).unwrap();
        begin(&mut world, 2, 0..10, true).unwrap();
        let over_a_shared_one = begin(&mut world, 1, 25..26, true).unwrap_err();
        assert!(matches!(over_a_shared_one, Refusal::RangeHeld { exclusive: false, .. }));
        world.registry.unpin(session(1), first, world.now).unwrap();
        begin(&mut world, 2, 12..13, false).unwrap();
    }

    #[test]
    fn exclusive_pins_in_a_row_keep_everybody_off_their_own_bytes_and_no_others() {
        let mut world = World::new();
        world.file(1);
        let mut held: Vec<(PinId, Range<u64>)> = Vec::new();
        for range in [20..30, 40..50, 10..20] {
            let terms = Terms { exclusive: true, ..shared(range.clone()) };
            held.push((world.registry.begin_pin(session(1), guard(1), terms).unwrap(), range));
        }
        while held.len() > 1 {
            for (start, end, exclusive) in (0..60)
                .flat_map(|start| (start + 1..=60).map(move |end| (start, end)))
                .flat_map(|(start, end)| [(start, end, false), (start, end, true)])
            {
                let terms = Terms { exclusive, ..shared(start..end) };
                let begun = world.registry.begin_pin(session(2), guard(1), terms);
                let others =
                    held.iter().filter(|(_, range)| range.start < end && start < range.end);
                let others: Vec<PinId> = others.map(|(pin, _)| *pin).collect();
                match begun {
                    Ok(pin) => {
                        assert!(others.is_empty(), "{start}..{end}: {others:?} hold it");
                        world.registry.unpin(session(2), pin, world.now).unwrap();
                        world.registry.left(guard(1), pin);
                    }
                    Err(Refusal::RangeHeld { pin, exclusive: true, .. }) => {
                        assert!(others.contains(&pin), "{start}..{end}: {pin}, not {others:?}");
                    }
                    Err(refusal) => panic!("{start}..{end}: {refusal}"),
                }
            }
            let (pin, _) = held.remove(0);
            world.registry.unpin(session(1), pin, world.now).unwrap();
            world.registry.left(guard(1), pin);
        }
    }

    #[test]
    fn there_is_time_while_clients_drain_and_none_from_the_fence_on() {
        let mut world = World::new();
        world.file(1);
        let pin = world.pin(1, 1);
        assert!(world.registry.has_time(guard(1)), "a reader may be left to the kernel");
        world.broken(1);
        assert!(world.registry.has_time(guard(1)));
        world.registry.drained(session(1), &[pin], world.now);
        assert!(!world.registry.has_time(guard(1)));
        world.released(1);
        assert!(!world.registry.has_time(guard(1)));
    }

    #[test]
    fn granted_pins_are_those_whose_keys_are_out() {
        let mut world = World::new();
        world.file(1);
        let counts = |world: &World| match world.registry.standing(inode(1)) {
            Some((_, Standing::Held { pins, granted, .. })) => (pins, granted),
            other => panic!("{other:?}"),
        };
        let (first, _second) = (world.pin(1, 1), world.pin(2, 1));
        let begun = world.registry.begin_pin(session(1), guard(1), shared(0..1)).unwrap();
        assert_eq!(counts(&world), (3, 2));
        world.registry.finish_pin(begun, Transport::Stream).unwrap();
        assert_eq!(counts(&world), (3, 3));
        world.registry.unpin(session(1), first, world.now).unwrap();
        assert_eq!(counts(&world), (2, 2));
        let given_up = world.registry.begin_pin(session(1), guard(1), shared(0..1)).unwrap();
        world.registry.abandon_pin(given_up, world.now);
        assert_eq!(counts(&world), (2, 2));
        world.registry.end_session(session(1), world.now);
        assert_eq!(counts(&world), (1, 1));
    }

    #[test]
    fn no_stream_transfer_starts_once_a_break_was_seen() {
        let mut world = World::new();
        let generation = world.file(1);
        let pin = world.pin(1, 1);
        let begin = |world: &World| {
            world.registry.begin_transfer(session(1), pin, generation, PinAccess::ReadWrite)
        };
        assert!(begin(&world).is_ok());
        world.broken(1);
        assert_eq!(begin(&world), Err(Refusal::Draining));
        world.released(1);
        assert_eq!(begin(&world), Err(Refusal::Stale { pin, asked: generation }));
    }

    #[test]
    fn a_pin_for_reading_is_not_written() {
        let mut world = World::new();
        let generation = world.file(1);
        let terms = Terms { access: PinAccess::Read, ..shared(0..1) };
        let pin = world.registry.begin_pin(session(1), guard(1), terms).unwrap();
        world.registry.finish_pin(pin, Transport::Stream).unwrap();
        let begin = |access| world.registry.begin_transfer(session(1), pin, generation, access);
        assert_eq!(begin(PinAccess::ReadWrite), Err(Refusal::ReadOnly { pin }));
        assert!(begin(PinAccess::Read).is_ok());
    }

    #[test]
    fn an_exclusive_pin_waits_until_who_left_can_write_no_more() {
        let mut world = World::new();
        world.file(1);
        let (left, other) = (world.pin(1, 1), world.pin(1, 1));
        let keeper = world.registry.begin_pin(session(2), guard(1), shared(200..300)).unwrap();
        for pin in [left, other] {
            world.registry.unpin(session(1), pin, world.now).unwrap();
        }
        let terms = Terms { exclusive: true, ..shared(0..100) };
        let begin =
            |world: &mut World| world.registry.begin_pin(session(2), guard(1), terms.clone());
        assert_eq!(begin(&mut world), Err(Refusal::Draining));
        world.registry.left(guard(1), left);
        assert_eq!(begin(&mut world), Err(Refusal::Draining), "the other one is on its way too");
        world.registry.left(guard(1), other);
        assert!(begin(&mut world).is_ok());
        assert!(world.registry.is_held(guard(1)), "{keeper} keeps it");
    }

    #[test]
    fn bytes_under_pins_are_limited_and_come_back() {
        let mut world = World::new();
        world.file(1);
        let pin = world.registry.begin_pin(session(1), guard(1), shared(0..900)).unwrap();
        let more = world.registry.begin_pin(session(1), guard(1), shared(0..200));
        assert!(matches!(more, Err(Refusal::Quota { limit: 1000, .. })), "{more:?}");
        world.registry.begin_pin(session(2), guard(1), shared(0..200)).unwrap();
        world.registry.unpin(session(1), pin, world.now).unwrap();
        world.registry.begin_pin(session(1), guard(1), shared(0..1000)).unwrap();
    }

    #[test]
    fn a_steal_is_measured_by_what_will_be_left() {
        let mut world = World::new();
        world.file(1);
        world.file(2);
        for _ in 0..3 {
            world.pin(1, 1);
        }
        world.pin(1, 2);
        let room = |world: &World, file, wanted| {
            world.registry.demand_room_after(session(1), inode(file), wanted)
        };
        assert_eq!(room(&world, 1, 900), Ok(()), "one pin of 100 bytes stays");
        assert!(matches!(room(&world, 1, 901), Err(Refusal::Quota { limit: 1000, .. })));
        assert_eq!(room(&world, 2, 700), Ok(()));
        assert!(matches!(room(&world, 3, 1), Err(Refusal::Quota { limit: 4, .. })));
    }

    const TEN: Readers = Readers::Outwait(Duration::from_secs(10));

    #[test]
    fn a_reader_that_is_left_to_the_kernel_takes_nothing_back() {
        let mut world = World::new();
        let generation = world.file(1);
        let pin = world.pin(1, 1);
        let at = world.now + Duration::from_secs(10) + OUTWAIT_GRACE;
        let look = Action::LookAt { guard: guard(1), at };
        assert_eq!(world.broken_by(1, BreakKind::Reader, TEN), [look]);
        assert_eq!(world.broken_by(1, BreakKind::Reader, TEN), [], "it is looked at once");
        assert!(world.registry.is_held(guard(1)));
        assert!(world.registry.begin_commit(session(1), pin, generation).is_ok());
        world.pin(2, 1);
        assert!(!world.registry.reader_is_due(guard(1), at - Duration::from_millis(1)));
        assert!(world.registry.reader_is_due(guard(1), at));
        assert_eq!(world.looked_at(1, Some(GuardState::ReadersPass)), []);
        assert!(!world.registry.reader_is_due(guard(1), at), "that was it");
        assert!(world.registry.is_held(guard(1)));
        assert_eq!(world.broken(1).len(), 3, "a writer is a break as ever");
    }

    #[test]
    fn a_reader_that_the_kernel_still_holds_up_then_takes_the_file_back() {
        let mut world = World::new();
        world.file(1);
        let pin = world.pin(1, 1);
        world.broken_by(1, BreakKind::Reader, TEN);
        world.pass(11_000);
        let actions = world.looked_at(1, Some(GuardState::Broken(BreakKind::Reader)));
        assert!(
            matches!(&actions[..], [Action::NotifyDraining { pins, .. }, Action::FenceAt { .. }]
            if *pins == [pin])
        );
        let record = world.released(1).1.unwrap();
        assert_eq!(record.reason, Reason::Break(BreakKind::Reader));
        assert_eq!(record.not_outwaited, Some(NotOutwaited::Overdue));
    }

    #[test]
    fn a_writer_does_not_wait_for_a_reader_that_is_left_to_the_kernel() {
        for unknown in [Some(GuardState::Broken(BreakKind::Writer)), None] {
            let mut world = World::new();
            world.file(1);
            world.pin(1, 1);
            let at = world.now + Duration::from_secs(10) + OUTWAIT_GRACE;
            world.broken_by(1, BreakKind::Reader, TEN);
            let actions = world.broken(1);
            assert!(matches!(
                &actions[..],
                [Action::NotifyDraining { .. }, Action::FenceAt { .. }]
            ));
            assert!(!world.registry.reader_is_due(guard(1), at), "it is going");

            // And one whose news has not come yet is found by the look.
            world.file(2);
            world.pin(1, 2);
            world.broken_by(2, BreakKind::Reader, TEN);
            let actions = world.looked_at(2, unknown);
            assert!(matches!(
                &actions[..],
                [
                    Action::NotifyDraining { reason: Reason::Break(BreakKind::Writer), .. },
                    Action::FenceAt { .. }
                ]
            ));
        }
    }

    #[test]
    fn a_reader_that_cant_be_left_to_the_kernel_is_revoked_for_with_the_reason() {
        let mut world = World::new();
        world.file(1);
        world.pin(1, 1);
        let readers = Readers::CannotOutwait(NoOutwait::Never);
        assert_eq!(world.broken_by(1, BreakKind::Reader, readers).len(), 2);
        let record = world.released(1).1.unwrap();
        assert_eq!(record.not_outwaited, Some(NotOutwaited::Refused(NoOutwait::Never)));
        // A writer was never to be outwaited.
        world.file(2);
        world.pin(1, 2);
        world.broken_by(2, BreakKind::Writer, readers);
        assert_eq!(world.released(2).1.unwrap().not_outwaited, None);
    }

    #[test]
    fn a_file_that_nobody_uses_holds_up_no_reader_either() {
        let mut world = World::new();
        world.file(1);
        let pin = world.pin(1, 1);
        world.registry.unpin(session(1), pin, world.now).unwrap();
        let urgent = Action::FenceNow { guard: guard(1), urgent: true };
        assert_eq!(world.broken_by(1, BreakKind::Reader, TEN), [urgent]);
    }
}
