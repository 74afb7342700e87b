//! The notices that wait for one session: a set, not a queue, so that none is ever dropped.
//!
//! There is one entry per guarding, with all pins of the session that it concerns. `Revoked`
//! replaces a `Draining` of the same guarding that was not sent yet. So no more waits than the pins
//! that a session can hold; a client that lets more pile up, or that takes nothing for too long,
//! can't be told, and its session has to end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::ids::{Generation, PinId};
use crate::registry::{Reason, Timings};

/// Pins named by one message: it stays below 16 KiB.
const PINS_PER_MESSAGE: usize = 1024;

/// One message for the client.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Notice {
    /// The newest heartbeat that was not answered yet.
    HeartbeatReply {
        sequence: u64,
    },
    Draining {
        pins: Vec<PinId>,
        generation: Generation,
        reason: Reason,
        /// Left of the time to drain.
        budget: Duration,
    },
    Revoked {
        pins: Vec<PinId>,
        generation: Generation,
        reason: Reason,
        timings: Timings,
    },
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Notices {
    reply: Option<u64>,
    draining: BTreeMap<Generation, Draining>,
    revoked: BTreeMap<Generation, Revoked>,
    /// Pins in both.
    pins: usize,
    pins_at_most: usize,
    /// Since when notices wait and the transport has taken nothing.
    stuck_since: Option<Instant>,
}

#[derive(Debug)]
struct Draining {
    pins: Vec<PinId>,
    reason: Reason,
    until: Instant,
}

#[derive(Debug)]
struct Revoked {
    pins: Vec<PinId>,
    reason: Reason,
    timings: Timings,
}

impl Notices {
    /// For a session that can hold so many pins.
    pub(crate) fn new(pins_of_session: usize) -> Self {
        Self {
            reply: None,
            draining: BTreeMap::new(),
            revoked: BTreeMap::new(),
            pins: 0,
            // Those that it holds may drain while those that it held before wait as revoked.
            pins_at_most: pins_of_session.saturating_mul(2),
            stuck_since: None,
        }
    }

    /// A heartbeat is to be answered: only the newest one.
    pub(crate) fn answer(&mut self, sequence: u64) {
        self.reply = Some(sequence);
    }

    /// Pins of this guarding are to be drained by `until`.
    pub(crate) fn drain(
        &mut self,
        pins: Vec<PinId>,
        generation: Generation,
        reason: Reason,
        until: Instant,
        now: Instant,
    ) {
        self.add(pins.len(), now);
        let entry = Draining { pins: Vec::new(), reason, until };
        self.draining.entry(generation).or_insert(entry).pins.extend(pins);
    }

    /// Pins of this guarding are gone.
    pub(crate) fn revoke(
        &mut self,
        pins: Vec<PinId>,
        generation: Generation,
        reason: Reason,
        timings: Timings,
        now: Instant,
    ) {
        if let Some(unsaid) = self.draining.remove(&generation) {
            self.pins -= unsaid.pins.len();
        }
        self.add(pins.len(), now);
        let entry = Revoked { pins: Vec::new(), reason, timings };
        self.revoked.entry(generation).or_insert(entry).pins.extend(pins);
    }

    /// The next message. Heartbeats are answered first, and what has a deadline comes before what is
    /// over.
    pub(crate) fn take(&mut self, now: Instant) -> Option<Notice> {
        let notice = self.next(now)?;
        // The transport takes something.
        self.stuck_since = (self.pins > 0).then_some(now);
        Some(notice)
    }

    fn next(&mut self, now: Instant) -> Option<Notice> {
        if let Some(sequence) = self.reply.take() {
            return Some(Notice::HeartbeatReply { sequence });
        }
        if let Some(mut entry) = self.draining.first_entry() {
            let generation = *entry.key();
            let pins = some_of(&mut entry.get_mut().pins);
            let Draining { reason, until, pins: ref rest } = *entry.get();
            if rest.is_empty() {
                entry.remove();
            }
            self.pins -= pins.len();
            let budget = until.saturating_duration_since(now);
            return Some(Notice::Draining { pins, generation, reason, budget });
        }
        let mut entry = self.revoked.first_entry()?;
        let generation = *entry.key();
        let pins = some_of(&mut entry.get_mut().pins);
        let Revoked { reason, timings, pins: ref rest } = *entry.get();
        if rest.is_empty() {
            entry.remove();
        }
        self.pins -= pins.len();
        Some(Notice::Revoked { pins, generation, reason, timings })
    }

    /// Whether the client can't be told: the transport has taken nothing for this long although
    /// notices wait, or more wait than a session's pins can bring about.
    pub(crate) fn is_stuck(&self, patience: Duration, now: Instant) -> bool {
        let silent = |since: Instant| now.saturating_duration_since(since) >= patience;
        self.pins > self.pins_at_most || self.stuck_since.is_some_and(silent)
    }

    fn add(&mut self, pins: usize, now: Instant) {
        self.pins += pins;
        self.stuck_since.get_or_insert(now);
    }
}

/// Takes out the first pins, as many as one message names.
fn some_of(pins: &mut Vec<PinId>) -> Vec<PinId> {
    let rest = pins.split_off(pins.len().min(PINS_PER_MESSAGE));
    std::mem::replace(pins, rest)
}

#[cfg(test)]
mod tests {
    use pinfold_leases::BreakKind;

    use super::*;

    const LIMIT: usize = 4096;
    const WHY: Reason = Reason::Break(BreakKind::Writer);
    const BUDGET: Duration = Duration::from_secs(5);

    fn generation(counter: u64) -> Generation {
        Generation { incarnation: 7, counter }
    }

    fn pins(numbers: std::ops::Range<u64>) -> Vec<PinId> {
        numbers.map(PinId).collect()
    }

    fn drained_pins(notice: Option<Notice>) -> Vec<PinId> {
        let Some(Notice::Draining { pins, .. }) = notice else { panic!("{notice:?}") };
        pins
    }

    #[test]
    fn each_of_many_guardings_is_told_once() {
        let (mut notices, now) = (Notices::new(LIMIT), Instant::now());
        for counter in 0..LIMIT as u64 {
            notices.drain(pins(counter..counter + 1), generation(counter), WHY, now + BUDGET, now);
        }
        let mut told = Vec::new();
        while let Some(notice) = notices.take(now) {
            told.extend(drained_pins(Some(notice)));
        }
        assert_eq!(told, pins(0..LIMIT as u64));
        assert!(!notices.is_stuck(Duration::ZERO, now), "nothing waits");
    }

    #[test]
    fn a_message_names_a_bounded_number_of_pins() {
        let (mut notices, now) = (Notices::new(LIMIT), Instant::now());
        notices.drain(pins(0..2500), generation(1), WHY, now + BUDGET, now);
        let sizes: Vec<_> =
            std::iter::from_fn(|| notices.take(now)).map(|n| drained_pins(Some(n)).len()).collect();
        assert_eq!(sizes, [1024, 1024, 452]);
    }

    #[test]
    fn the_time_spent_waiting_comes_off_the_budget() {
        let (mut notices, now) = (Notices::new(LIMIT), Instant::now());
        notices.drain(pins(0..1), generation(1), WHY, now + BUDGET, now);
        let Some(Notice::Draining { budget, .. }) = notices.take(now + Duration::from_secs(2))
        else {
            panic!("no notice");
        };
        assert_eq!(budget, Duration::from_secs(3));
    }

    #[test]
    fn revoked_replaces_a_draining_that_was_not_sent() {
        let (mut notices, now) = (Notices::new(LIMIT), Instant::now());
        notices.drain(pins(0..2), generation(1), WHY, now + BUDGET, now);
        notices.revoke(pins(0..2), generation(1), WHY, Timings::default(), now);
        let Some(Notice::Revoked { pins: told, .. }) = notices.take(now) else {
            panic!("no word of it");
        };
        assert_eq!((told, notices.take(now)), (pins(0..2), None));
    }

    #[test]
    fn a_heartbeat_is_answered_before_what_waits_and_only_the_newest() {
        let (mut notices, now) = (Notices::new(LIMIT), Instant::now());
        notices.drain(pins(0..1), generation(1), WHY, now + BUDGET, now);
        notices.answer(1);
        notices.answer(2);
        assert_eq!(notices.take(now), Some(Notice::HeartbeatReply { sequence: 2 }));
        assert_eq!(drained_pins(notices.take(now)), pins(0..1));
        assert_eq!(notices.take(now), None);
    }

    #[test]
    fn a_client_that_takes_nothing_is_stuck_and_one_that_takes_slowly_is_not() {
        let (mut notices, start) = (Notices::new(LIMIT), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        let patience = Duration::from_secs(10);
        notices.answer(1);
        assert!(!notices.is_stuck(patience, after(100)), "only a heartbeat waits");
        notices.drain(pins(0..2000), generation(1), WHY, start + BUDGET, start);
        notices.revoke(pins(5000..5001), generation(0), WHY, Timings::default(), after(5));
        assert!(!notices.is_stuck(patience, after(9)));
        assert!(notices.is_stuck(patience, after(10)));
        notices.take(after(9));
        assert!(!notices.is_stuck(patience, after(18)));
        assert!(notices.is_stuck(patience, after(19)));
    }

    #[test]
    fn more_than_a_session_can_hold_twice_means_that_it_does_not_listen() {
        let (mut notices, now) = (Notices::new(4), Instant::now());
        for counter in 0..8 {
            notices.revoke(
                pins(counter..counter + 1),
                generation(counter),
                WHY,
                Timings::default(),
                now,
            );
        }
        assert!(!notices.is_stuck(BUDGET, now));
        notices.drain(pins(9..10), generation(9), WHY, now + BUDGET, now);
        assert!(notices.is_stuck(BUDGET, now));
    }
}
