//! How large the pieces of the stream path are: so small that what is under way ends soon.
//!
//! A drain ends when the pieces have that are under way, and a server that hears nothing else of a client
//! hears of it piece by piece. So the size follows the time that a piece takes, from its start to its
//! answer: it doubles while that is short, and halves where it is long. A slow link gets short pieces, a
//! fast one long pieces after a few.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Before anything is known of the link.
const FIRST: usize = 64 << 10;
const SHORTEST: usize = 8 << 10;
const LONGEST: usize = 1 << 20;
/// A piece that takes no longer than this may be longer: time enough for the delay of any link.
const QUICK: Duration = Duration::from_millis(500);
/// A piece that takes longer than this is too long: a drain may have to end within a second or two.
const SLOW: Duration = Duration::from_secs(1);

/// The size for one session.
#[derive(Debug)]
pub(crate) struct Pace(Mutex<Size>);

/// The policy: pure.
#[derive(Debug)]
struct Size {
    bytes: usize,
    /// Only what was begun after the last change tells of the present size.
    changed: Option<Instant>,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Size { bytes: FIRST, changed: None }))
    }

    /// How long the next piece may be.
    pub(crate) fn piece_bytes(&self) -> usize {
        self.lock().bytes
    }

    /// A piece was answered.
    pub(crate) fn learn(&self, bytes: usize, begun: Instant) {
        self.lock().learn(bytes, begun, Instant::now());
    }

    fn lock(&self) -> MutexGuard<'_, Size> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Size {
    fn learn(&mut self, bytes: usize, begun: Instant, now: Instant) {
        if self.changed.is_some_and(|changed| begun < changed) {
            return;
        }
        let took = now.saturating_duration_since(begun);
        let next = match took {
            // A shorter one says nothing of the size.
            _ if took <= QUICK && bytes >= self.bytes => (self.bytes * 2).min(LONGEST),
            _ if took > SLOW => (self.bytes / 2).max(SHORTEST),
            _ => return,
        };
        if next != self.bytes {
            (self.bytes, self.changed) = (next, Some(now));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends pieces over a link, four at a time, for so many rounds; says how large they are then.
    fn after(size: &mut Size, bytes_per_second: f64, delay: Duration, rounds: usize) -> usize {
        let mut now = Instant::now();
        for _ in 0..rounds {
            let (begun, bytes) = (now, size.bytes);
            let takes = Duration::from_secs_f64((4 * bytes) as f64 / bytes_per_second);
            now = begun + takes + delay;
            for _ in 0..4 {
                size.learn(bytes, begun, now);
            }
            now += Duration::from_millis(1);
        }
        size.bytes
    }

    fn fresh() -> Size {
        Size { bytes: FIRST, changed: None }
    }

    #[test]
    fn a_fast_link_gets_long_pieces_after_a_few() {
        assert_eq!(after(&mut fresh(), 1e9, Duration::ZERO, 4), LONGEST);
        assert_eq!(after(&mut fresh(), 1e9, Duration::from_millis(200), 4), LONGEST);
    }

    #[test]
    fn what_is_under_way_on_a_slow_link_ends_soon() {
        for megabits in [0.5, 1.0, 5.0, 10.0] {
            let bytes_per_second = megabits * 1e6 / 8.0;
            for delay in [Duration::ZERO, Duration::from_millis(200)] {
                for mut size in [fresh(), Size { bytes: LONGEST, changed: None }] {
                    let bytes = after(&mut size, bytes_per_second, delay, 20);
                    let drain = 4.0 * bytes as f64 / bytes_per_second;
                    assert!(drain <= 1.5, "{megabits} Mbit/s, {delay:?}: {bytes} bytes, {drain} s");
                }
            }
        }
    }

    #[test]
    fn short_pieces_and_those_from_before_say_nothing() {
        let (mut size, now) = (fresh(), Instant::now());
        size.learn(100, now, now);
        assert_eq!(size.bytes, FIRST);
        size.learn(FIRST, now, now);
        size.learn(2 * FIRST, now - SLOW, now + 2 * SLOW);
        assert_eq!(size.bytes, 2 * FIRST, "begun before the change");
    }
}
