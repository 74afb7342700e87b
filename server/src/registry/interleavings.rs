//! The registry among everything that may come in any order: a small world of clients, breakers, a
//! fence thread that may fail, and a teardown that may be late. After each step the invariants of the
//! design are looked at; in the end nothing may be left.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::num::NonZeroUsize;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits {
    sessions: 3,
    pins_per_session: 4,
    pinned_bytes_per_session: 300,
    reserved_bytes_per_pin: 0,
};
/// As the engine's first try again.
const RETRY: Duration = Duration::from_millis(5);
/// What an ended world takes at most to come to rest.
const ROUNDS: usize = 1000;

/// Numbers name the n-th of what there is, modulo how many there are.
#[derive(Clone, Debug)]
enum Step {
    OpenSession,
    EndSession(usize),
    Guard(u64),
    BeginPin {
        session: usize,
        guard: usize,
        range: Range<u64>,
        reads: bool,
        exclusive: bool,
    },
    FinishPin(usize),
    AbandonPin(usize),
    Unpin {
        session: usize,
        pin: usize,
    },
    Drained {
        session: usize,
        pin: usize,
    },
    Break {
        guard: usize,
        kind: BreakKind,
        readers: Readers,
        budget: u64,
    },
    Look {
        guard: usize,
        state: Option<GuardState>,
    },
    TakeBack {
        guard: usize,
        reason: Reason,
        budget: u64,
    },
    ReleaseIfUnused(usize),
    ShutDown,
    Pass(u64),
    /// The fence thread gets to run; its next so many tries fail.
    Fence {
        failures: usize,
    },
    Retire(usize),
    BeginCommit {
        session: usize,
        pin: usize,
    },
    EndFlush(usize),
    BeginTransfer {
        session: usize,
        pin: usize,
        writes: bool,
    },
    EndTransfer(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let n = || 0..8_usize;
    let kind = || prop_oneof![Just(BreakKind::Reader), Just(BreakKind::Writer)];
    let readers = prop_oneof![
        Just(Readers::Revoke),
        (0..20_u64).prop_map(|ms| Readers::Outwait(Duration::from_millis(ms))),
        Just(Readers::CannotOutwait(NoOutwait::Never)),
    ];
    let state = prop_oneof![
        Just(None),
        Just(Some(GuardState::Held)),
        Just(Some(GuardState::ReadersPass)),
        kind().prop_map(|kind| Some(GuardState::Broken(kind))),
    ];
    let reason = prop_oneof![Just(Reason::Shrink), Just(Reason::Remove)];
    let range = (0..80_u64, 1..80_u64).prop_map(|(start, length)| start..start + length);
    let step = prop_oneof![
        2 => Just(Step::OpenSession),
        1 => n().prop_map(Step::EndSession),
        4 => (0..3_u64).prop_map(Step::Guard),
        6 => (n(), n(), range, any::<bool>(), prop::bool::weighted(0.2)).prop_map(
            |(session, guard, range, reads, exclusive)| {
                Step::BeginPin { session, guard, range, reads, exclusive }
            }
        ),
        6 => n().prop_map(Step::FinishPin),
        1 => n().prop_map(Step::AbandonPin),
        2 => (n(), n()).prop_map(|(session, pin)| Step::Unpin { session, pin }),
        5 => (n(), n()).prop_map(|(session, pin)| Step::Drained { session, pin }),
        4 => (n(), kind(), readers, 0..30_u64).prop_map(|(guard, kind, readers, budget)| {
            Step::Break { guard, kind, readers, budget }
        }),
        1 => (n(), state).prop_map(|(guard, state)| Step::Look { guard, state }),
        1 => (n(), reason, 0..30_u64)
            .prop_map(|(guard, reason, budget)| Step::TakeBack { guard, reason, budget }),
        1 => n().prop_map(Step::ReleaseIfUnused),
        4 => (0..20_u64).prop_map(Step::Pass),
        // So long that a reader is looked after who was left to the kernel.
        1 => (980..1020_u64).prop_map(Step::Pass),
        5 => (0..3_usize).prop_map(|failures| Step::Fence { failures }),
        3 => n().prop_map(Step::Retire),
        3 => (n(), n()).prop_map(|(session, pin)| Step::BeginCommit { session, pin }),
        3 => n().prop_map(Step::EndFlush),
        3 => (n(), n(), any::<bool>())
            .prop_map(|(session, pin, writes)| Step::BeginTransfer { session, pin, writes }),
        3 => n().prop_map(Step::EndTransfer),
    ];
    // A world that goes down is rare.
    let steps = prop::collection::vec(step, 1..120);
    (steps, prop::option::weighted(0.1, 0..120_usize)).prop_map(|(mut steps, down)| {
        if let Some(at) = down.filter(|at| *at < steps.len()) {
            steps.insert(at, Step::ShutDown);
        }
        steps
    })
}

/// One guarding, as the kernel, the NIC and the clients know it.
#[derive(Debug)]
struct Guarding {
    identity: FileIdentity,
    generation: Generation,
    /// By when it must be fenced: somebody waits.
    wanted_by: Option<Instant>,
    /// Pins whose clients were told to drain and have not answered.
    undrained: BTreeSet<PinId>,
    /// Granted, with keys that work until they are dropped or the fence falls.
    keys: BTreeMap<PinId, Terms>,
    stream_writes: usize,
    /// It has had a pin, so it goes with the last one.
    was_pinned: bool,
    fenced: bool,
    released: bool,
    /// A reader was left to the kernel.
    outwaits: bool,
}

/// Everything that was ever asked of one pin.
#[derive(Debug)]
struct Known {
    session: SessionId,
    guard: GuardId,
    granted: Option<Generation>,
    terms: Terms,
    /// How often the engine was told to drop its regions.
    dropped: usize,
    told_to_drain: usize,
    told_revoked: usize,
}

struct World {
    registry: Registry,
    now: Instant,
    sessions: Vec<SessionId>,
    guardings: BTreeMap<GuardId, Guarding>,
    pins: BTreeMap<PinId, Known>,
    /// With the fence thread.
    orders: Vec<(Instant, GuardId)>,
    /// What that thread has fenced and not yet let go.
    releasing: Option<GuardId>,
    failures: usize,
    flushes: Vec<(GuardId, PinId, Generation)>,
    transfers: Vec<(GuardId, PinId)>,
    generations: HashSet<Generation>,
    names: u64,
}

fn nth<T: Clone>(all: impl IntoIterator<Item = T>, n: usize) -> Option<T> {
    let all: Vec<T> = all.into_iter().collect();
    (!all.is_empty()).then(|| all[n % all.len()].clone())
}

impl World {
    fn new() -> Self {
        Self {
            registry: Registry::new(7, LIMITS),
            now: Instant::now(),
            sessions: Vec::new(),
            guardings: BTreeMap::new(),
            pins: BTreeMap::new(),
            orders: Vec::new(),
            releasing: None,
            failures: 0,
            flushes: Vec::new(),
            transfers: Vec::new(),
            generations: HashSet::new(),
            names: 0,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::OpenSession => self.open_session(),
            Step::EndSession(n) => self.end_session(n),
            Step::Guard(file) => self.guard(file),
            Step::BeginPin { session, guard, range, reads, exclusive } => {
                let access = if reads { PinAccess::Read } else { PinAccess::ReadWrite };
                self.begin_pin(session, guard, Terms { range, access, exclusive });
            }
            Step::FinishPin(n) => self.finish_pin(n),
            Step::AbandonPin(n) => self.abandon_pin(n),
            Step::Unpin { session, pin } => self.unpin(session, pin),
            Step::Drained { session, pin } => self.drained(session, pin),
            Step::Break { guard, kind, readers, budget } => {
                self.broken(guard, kind, readers, budget);
            }
            Step::Look { guard, state } => self.look(guard, state),
            Step::TakeBack { guard, reason, budget } => self.take_back(guard, reason, budget),
            Step::ReleaseIfUnused(n) => {
                let Some(guard) = nth(self.guardings.keys().copied(), n) else { return };
                let action = self.registry.release_if_unused(guard);
                self.perform(action.into_iter().collect());
            }
            Step::ShutDown => self.shut_down(),
            Step::Pass(ms) => self.now += Duration::from_millis(ms),
            Step::Fence { failures } => {
                self.failures = failures;
                self.run_fence_thread();
            }
            Step::Retire(n) => self.retire(n),
            Step::BeginCommit { session, pin } => self.begin_commit(session, pin),
            Step::EndFlush(n) => self.end_flush(n),
            Step::BeginTransfer { session, pin, writes } => {
                self.begin_transfer(session, pin, writes);
            }
            Step::EndTransfer(n) => self.end_transfer(n),
        }
        self.check();
    }

    fn open_session(&mut self) {
        self.names += 1;
        let id = SessionId::new(u128::from(self.names).to_be_bytes());
        let full = self.sessions.len() >= LIMITS.sessions;
        match self.registry.open_session(id, "client") {
            Ok(()) => {
                assert!(!full, "a session too many");
                self.sessions.push(id);
            }
            Err(Refusal::Quota { .. }) => assert!(full),
            Err(refusal) => assert_eq!(refusal, Refusal::ShuttingDown),
        }
    }

    fn end_session(&mut self, n: usize) {
        let Some(id) = nth(self.sessions.iter().copied(), n) else { return };
        self.sessions.retain(|session| *session != id);
        let pins: Vec<PinId> = self.pins_of(id);
        self.forget_undrained(&pins);
        let actions = self.registry.end_session(id, self.now);
        let goes = |action: &Action| *action == Action::DropSession { session: id };
        let at = actions.iter().position(goes).expect("its queue pairs go");
        let late = |action: &Action| matches!(action, Action::DropRegions { .. });
        assert!(
            !actions[..at].iter().any(late) && actions[at + 1..].iter().all(late),
            "{actions:?}"
        );
        self.perform(actions);
    }

    fn pins_of(&self, session: SessionId) -> Vec<PinId> {
        let own = self.pins.iter().filter(|(_, known)| known.session == session);
        own.map(|(pin, _)| *pin).collect()
    }

    /// They are drained, or gone.
    fn forget_undrained(&mut self, pins: &[PinId]) {
        for guarding in self.guardings.values_mut() {
            guarding.undrained.retain(|pin| !pins.contains(pin));
        }
    }

    fn guard(&mut self, file: u64) {
        let identity = FileIdentity { device: 1, inode: file, birth_time_ns: 0 };
        let standing = self.registry.standing(identity);
        let stands = self
            .guardings
            .iter()
            .any(|(_, guarding)| guarding.identity == identity && !guarding.released);
        assert_eq!(standing.is_some(), stands, "a file is guarded once");
        if stands {
            return;
        }
        self.names += 1;
        let guard = GuardId::simulated(self.names);
        let Ok(generation) = self.registry.add_file(identity, guard) else { return };
        assert!(self.generations.insert(generation), "{generation} was there before");
        let guarding = Guarding {
            identity,
            generation,
            wanted_by: None,
            undrained: BTreeSet::new(),
            keys: BTreeMap::new(),
            stream_writes: 0,
            was_pinned: false,
            fenced: false,
            released: false,
            outwaits: false,
        };
        self.guardings.insert(guard, guarding);
    }

    fn begin_pin(&mut self, session: usize, guard: usize, terms: Terms) {
        let Some(session) = nth(self.sessions.iter().copied(), session) else { return };
        let Some(guard) = nth(self.guardings.keys().copied(), guard) else { return };
        let Ok(pin) = self.registry.begin_pin(session, guard, terms.clone()) else { return };
        let (granted, dropped, told_to_drain, told_revoked) = (None, 0, 0, 0);
        let known = Known { session, guard, granted, terms, dropped, told_to_drain, told_revoked };
        assert!(self.pins.insert(pin, known).is_none(), "pin {pin} was there before");
        let guarding = self.guardings.get_mut(&guard).unwrap();
        assert!(guarding.wanted_by.is_none(), "a pin on what is taken back");
        guarding.was_pinned = true;
    }

    fn finish_pin(&mut self, n: usize) {
        let unfinished = self.pins.iter().filter(|(_, known)| known.granted.is_none());
        let Some(pin) = nth(unfinished.map(|(pin, _)| *pin), n) else { return };
        let Ok(generation) = self.registry.finish_pin(pin, Transport::Rdma) else { return };
        let known = self.pins.get_mut(&pin).unwrap();
        known.granted = Some(generation);
        let guarding = self.guardings.get_mut(&known.guard).unwrap();
        assert_eq!(guarding.generation, generation);
        assert!(guarding.wanted_by.is_none(), "a key for what is taken back");
        assert_eq!(known.dropped, 0, "a key for a pin that is gone");
        guarding.keys.insert(pin, known.terms.clone());
    }

    /// As the engine does when `finish_pin` refuses, or when a registration fails.
    fn abandon_pin(&mut self, n: usize) {
        let unfinished = self.pins.iter().filter(|(_, known)| known.granted.is_none());
        let Some(pin) = nth(unfinished.map(|(pin, _)| *pin), n) else { return };
        let actions = self.registry.abandon_pin(pin, self.now);
        self.perform(actions);
    }

    fn unpin(&mut self, session: usize, pin: usize) {
        let Some(session) = nth(self.sessions.iter().copied(), session) else { return };
        let Some(pin) = nth(self.pins.keys().copied(), pin) else { return };
        let own = self.pins[&pin].session == session;
        let result = self.registry.unpin(session, pin, self.now);
        assert!(own || result == Err(Refusal::UnknownPin { pin }), "a pin of others: {result:?}");
        if own {
            self.forget_undrained(&[pin]);
        }
        self.perform(result.unwrap_or_default());
    }

    fn drained(&mut self, session: usize, pin: usize) {
        let Some(session) = nth(self.sessions.iter().copied(), session) else { return };
        let Some(pin) = nth(self.pins.keys().copied(), pin) else { return };
        if self.pins[&pin].session == session {
            self.forget_undrained(&[pin]);
        }
        let actions = self.registry.drained(session, &[pin], self.now);
        self.perform(actions);
    }

    fn broken(&mut self, guard: usize, kind: BreakKind, readers: Readers, budget: u64) {
        let Some(guard) = nth(self.guardings.keys().copied(), guard) else { return };
        let budget = Duration::from_millis(budget);
        let times = BreakTimes { at: self.now, now: self.now, budget };
        let outwaits = kind == BreakKind::Reader && matches!(readers, Readers::Outwait(_));
        if outwaits {
            self.guardings.entry(guard).and_modify(|guarding| guarding.outwaits = true);
        } else {
            self.wanted(guard, budget);
        }
        let actions = self.registry.handle_break(guard, kind, readers, &times);
        self.perform(actions);
    }

    fn look(&mut self, guard: usize, state: Option<GuardState>) {
        let Some(guard) = nth(self.guardings.keys().copied(), guard) else { return };
        self.look_at(guard, state);
    }

    fn look_at(&mut self, guard: GuardId, state: Option<GuardState>) {
        if !self.registry.reader_is_due(guard, self.now) {
            return;
        }
        assert!(self.guardings[&guard].outwaits, "nobody was left to the kernel");
        let budget = Duration::from_millis(10);
        if !matches!(state, Some(GuardState::Held | GuardState::ReadersPass)) {
            self.wanted(guard, budget);
        }
        let times = BreakTimes { at: self.now, now: self.now, budget };
        let actions = self.registry.reader_looked_at(guard, state, &times);
        self.perform(actions);
    }

    fn take_back(&mut self, guard: usize, reason: Reason, budget: u64) {
        let Some(guard) = nth(self.guardings.keys().copied(), guard) else { return };
        let budget = Duration::from_millis(budget);
        self.wanted(guard, budget);
        let actions = self.registry.take_back_for(guard, reason, self.now, budget);
        self.perform(actions);
    }

    fn shut_down(&mut self) {
        let budget = Duration::from_millis(10);
        for guard in self.guardings.keys().copied().collect::<Vec<_>>() {
            self.wanted(guard, budget);
        }
        for guard in self.registry.begin_shut_down() {
            let actions = self.registry.take_back_for(guard, Reason::Shutdown, self.now, budget);
            self.perform(actions);
        }
    }

    /// Somebody waits for a file: its clients have so long, from the first who wants it on.
    fn wanted(&mut self, guard: GuardId, budget: Duration) {
        let Some(guarding) = self.guardings.get_mut(&guard) else { return };
        if guarding.released || guarding.wanted_by.is_some() {
            return;
        }
        guarding.wanted_by = Some(self.now + budget);
        guarding.undrained = guarding.keys.keys().copied().collect();
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let first_drop =
            actions.iter().position(|action| matches!(action, Action::DropRegions { .. }));
        let last_order =
            actions.iter().rposition(|action| matches!(action, Action::FenceNow { .. }));
        assert!(
            first_drop.is_none() || last_order.is_none() || last_order < first_drop,
            "a deregistration that hangs would keep a fence from falling: {actions:?}"
        );
        for action in actions {
            self.perform_one(action);
        }
    }

    fn perform_one(&mut self, action: Action) {
        match action {
            Action::NotifyDraining { session, pins, generation, .. } => {
                for pin in pins {
                    let known = self.told(pin, session, generation);
                    known.told_to_drain += 1;
                    assert_eq!(known.told_to_drain, 1, "pin {pin} is told to drain twice");
                }
            }
            Action::NotifyRevoked { session, pins, generation, .. } => {
                for pin in pins {
                    let known = self.told(pin, session, generation);
                    known.told_revoked += 1;
                    assert_eq!(known.told_revoked, 1, "pin {pin} is told twice that it is gone");
                    let guard = known.guard;
                    assert!(self.guardings[&guard].fenced, "told before the fence");
                }
            }
            Action::FenceAt { guard, at } | Action::LookAt { guard, at } => {
                self.orders.push((at, guard));
            }
            Action::FenceNow { guard, .. } => self.orders.push((self.now, guard)),
            Action::DropRegions { guard, pin, session } => {
                let known = self.pins.get_mut(&pin).unwrap();
                assert_eq!((known.guard, known.session), (guard, session));
                known.dropped += 1;
                assert_eq!(known.dropped, 1, "the regions of pin {pin} are dropped twice");
                self.guardings.entry(guard).and_modify(|guarding| {
                    guarding.keys.remove(&pin);
                });
                self.registry.left(guard, pin);
            }
            Action::DropSession { session } => {
                assert!(!self.sessions.contains(&session), "it has not ended");
            }
        }
    }

    fn told(&mut self, pin: PinId, session: SessionId, generation: Generation) -> &mut Known {
        let known = self.pins.get_mut(&pin).unwrap();
        assert_eq!(known.session, session, "somebody else's pin");
        assert_eq!(known.granted, Some(generation), "they never had that");
        known
    }

    /// `Engine::fence`, for one order after the other until a fence has fallen: others may come
    /// between that and the release.
    fn run_fence_thread(&mut self) {
        if let Some(guard) = self.releasing.take() {
            self.release(guard);
        }
        let now = self.now;
        let (due, later) = self.orders.drain(..).partition(|(at, _)| *at <= now);
        self.orders = later;
        let due: Vec<(Instant, GuardId)> = due;
        for order in due {
            if self.releasing.is_some() {
                self.orders.push(order);
                continue;
            }
            self.look_at(order.1, Some(GuardState::Broken(BreakKind::Reader)));
            self.fence(order.1);
        }
    }

    fn fence(&mut self, guard: GuardId) {
        let Some(by) = self.registry.fence_due(guard, self.now) else { return };
        let guarding = self.guardings.get_mut(&guard).unwrap();
        let in_time = guarding.wanted_by.is_none_or(|by| self.now < by);
        assert!(
            !in_time || guarding.undrained.is_empty(),
            "fenced while {:?} may still drain",
            guarding.undrained
        );
        if guarding.stream_writes > 0 {
            match by {
                // The last one out orders it.
                None => return,
                Some(by) if self.now < by => return self.orders.push((by, guard)),
                Some(_) => {}
            }
        }
        if guarding.fenced {
            return;
        }
        if self.failures > 0 {
            self.failures -= 1;
            return self.orders.push((self.now + RETRY, guard));
        }
        guarding.fenced = true;
        guarding.keys.clear();
        self.registry.fenced(guard, self.now);
        self.releasing = Some(guard);
    }

    fn release(&mut self, guard: GuardId) {
        let was_wanted = self.guardings[&guard].wanted_by.is_some();
        let (actions, record) = self.registry.released(guard, self.now, |_| true);
        self.guardings.entry(guard).and_modify(|guarding| guarding.released = true);
        assert!(record.is_none() || was_wanted, "a record of what nobody wanted");
        let told = actions.iter().filter(|action| matches!(action, Action::NotifyRevoked { .. }));
        assert_eq!(told.count(), record.map_or(0, |record| record.sessions));
        assert_eq!(self.registry.released(guard, self.now, |_| true), (Vec::new(), None));
        self.perform(actions);
        // Whoever still had a key has been told.
        for (pin, known) in &self.pins {
            if known.guard == guard && known.granted.is_some() && known.dropped == 0 {
                assert_eq!(known.told_revoked, 1, "pin {pin} has lost its key unseen");
            }
        }
    }

    fn retire(&mut self, n: usize) {
        let released = self.guardings.iter().filter(|(_, guarding)| guarding.released);
        let Some(guard) = nth(released.map(|(guard, _)| *guard), n) else { return };
        self.guardings.remove(&guard);
        self.registry.retired(guard);
    }

    fn begin_commit(&mut self, session: usize, pin: usize) {
        let Some((session, pin, generation)) = self.granted(session, pin) else { return };
        let Ok(view) = self.registry.begin_commit(session, pin, generation) else { return };
        assert_eq!(self.pins[&pin].session, session, "a pin of others");
        assert_eq!(view.range, self.pins[&pin].terms.range);
        self.flushes.push((view.guard, pin, generation));
    }

    fn granted(&self, session: usize, pin: usize) -> Option<(SessionId, PinId, Generation)> {
        let session = nth(self.sessions.iter().copied(), session)?;
        let granted = |(pin, known): (&PinId, &Known)| known.granted.map(|of| (*pin, of));
        let (pin, generation) = nth(self.pins.iter().filter_map(granted), pin)?;
        Some((session, pin, generation))
    }

    fn end_flush(&mut self, n: usize) {
        if self.flushes.is_empty() {
            return;
        }
        let (guard, pin, generation) = self.flushes.swap_remove(n % self.flushes.len());
        if self.registry.demand_unfenced(guard, pin, generation).is_ok() {
            let guarding = &self.guardings[&guard];
            assert!(!guarding.fenced && !guarding.released, "durable after the fence");
        }
    }

    fn begin_transfer(&mut self, session: usize, pin: usize, writes: bool) {
        let Some((session, pin, generation)) = self.granted(session, pin) else { return };
        let access = if writes { PinAccess::ReadWrite } else { PinAccess::Read };
        let Ok(view) = self.registry.begin_transfer(session, pin, generation, access) else {
            return;
        };
        let known = &self.pins[&pin];
        assert_eq!((known.session, known.guard, known.dropped), (session, view.guard, 0));
        assert!(!writes || known.terms.access == PinAccess::ReadWrite, "a pin for reading");
        let guarding = self.guardings.get_mut(&view.guard).unwrap();
        assert!(guarding.wanted_by.is_none(), "a stream write after the break");
        assert!(!guarding.fenced);
        guarding.stream_writes += 1;
        self.transfers.push((view.guard, pin));
    }

    /// As the engine does when one leaves the gate.
    fn end_transfer(&mut self, n: usize) {
        if self.transfers.is_empty() {
            return;
        }
        let (guard, _) = self.transfers.swap_remove(n % self.transfers.len());
        let Some(guarding) = self.guardings.get_mut(&guard) else { return };
        guarding.stream_writes -= 1;
        if guarding.stream_writes == 0 && self.registry.is_fencing(guard) {
            self.orders.push((self.now, guard));
        }
    }

    fn check(&self) {
        self.check_orders();
        self.check_pins();
        self.check_quotas();
    }

    /// Whatever hangs, the fence comes: an order for it is out as long as somebody waits.
    fn check_orders(&self) {
        for (guard, guarding) in &self.guardings {
            let Some(by) = guarding.wanted_by.filter(|_| !guarding.fenced) else { continue };
            let late = by.max(self.now + RETRY);
            let first = self.orders.iter().filter(|(_, of)| of == guard).map(|(at, _)| *at).min();
            assert!(first.is_some_and(|at| at <= late), "{guard} is wanted by {by:?}: {first:?}");
            // With nobody to wait for it comes at once, or when the last stream write is out.
            let is_free = guarding.undrained.is_empty() && guarding.stream_writes == 0;
            assert!(
                !is_free || first.is_some_and(|at| at <= self.now + RETRY),
                "{guard} holds somebody up though everybody has drained"
            );
        }
    }

    /// Each pin is held, or dropped, or has gone with its file; and no two that may not overlap do.
    fn check_pins(&self) {
        let all = InspectPage { from: None, size: NonZeroUsize::MAX };
        let (files, _) = self.registry.files_view(all);
        let mut held = HashSet::new();
        for file in files {
            let guarding = &self.guardings[&file.guard];
            assert_eq!(file.generation, guarding.generation);
            let is_of_use = !guarding.was_pinned || !file.pins.is_empty();
            assert!(is_of_use || self.registry.is_going(file.guard), "nobody uses {}", file.guard);
            assert!(!guarding.released || file.pins.is_empty(), "pins on what was let go");
            for (pin, _, terms, _) in &file.pins {
                held.insert(*pin);
                let clash = file.pins.iter().any(|(other, _, of_other, _)| {
                    other != pin
                        && (terms.exclusive || of_other.exclusive)
                        && terms.range.start < of_other.range.end
                        && of_other.range.start < terms.range.end
                });
                assert!(!clash, "pin {pin} is exclusive, or another one is");
            }
            for pin in guarding.keys.keys() {
                assert!(held.contains(pin), "a key without a pin: {pin}");
            }
        }
        for (pin, known) in &self.pins {
            let is_over = self.guardings.get(&known.guard).is_none_or(|of| of.released);
            let ways = usize::from(held.contains(pin)) + known.dropped;
            assert!(ways == 1 || (ways == 0 && is_over), "pin {pin} is nowhere: {known:?}");
        }
    }

    fn check_quotas(&self) {
        for id in &self.sessions {
            let session = &self.registry.sessions[id];
            assert!(session.pins.len() <= LIMITS.pins_per_session);
            let bytes = session.pins.iter().map(|pin| {
                let range = &self.registry.pins[pin].terms.range;
                range.end - range.start
            });
            assert_eq!(session.pinned_bytes, bytes.sum::<u64>());
            assert!(session.pinned_bytes <= LIMITS.pinned_bytes_per_session);
        }
        assert_eq!(self.registry.sessions.len(), self.sessions.len());
    }

    /// Everybody leaves; nothing may be left.
    fn end(mut self) {
        while !self.sessions.is_empty() {
            self.end_session(0);
            self.check();
        }
        self.shut_down();
        self.failures = 0;
        for _ in 0..ROUNDS {
            if self.registry.is_idle() {
                break;
            }
            self.end_transfer(0);
            self.now += RETRY;
            self.run_fence_thread();
            self.retire(0);
            self.check();
        }
        assert!(self.registry.is_idle(), "{:?}", self.registry);
        assert!(self.registry.pins.is_empty() && self.registry.by_identity.is_empty());
        for (pin, known) in &self.pins {
            let ends = known.dropped + known.told_revoked;
            assert!(ends <= 1, "pin {pin} ended twice");
            assert!(known.granted.is_none() || ends == 1, "pin {pin} never ended");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_invariants_hold_in_whatever_order_things_come(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.end();
    }
}
