//! How long to look for a completion before sleeping: pure.
//!
//! To sleep and be woken costs more than a short transfer takes. So who waits alone may look for as long
//! as transfers took lately, up to what was allowed; when they take longer than that, looking is in vain,
//! and it falls off quickly.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long to look, as it stands.
#[derive(Debug)]
pub(crate) struct Patience {
    at_most_ns: u64,
    now_ns: AtomicU64,
}

impl Patience {
    /// None: never to look.
    pub(crate) fn new(at_most: Duration) -> Option<Self> {
        let at_most_ns = u64::try_from(at_most.as_nanos()).unwrap_or(u64::MAX);
        (at_most_ns > 0).then(|| Self { at_most_ns, now_ns: AtomicU64::new(at_most_ns) })
    }

    /// How long to look for the next one.
    pub(crate) fn now(&self) -> Duration {
        Duration::from_nanos(self.now_ns.load(Ordering::Relaxed))
    }

    /// A transfer took so long from its post to its end.
    pub(crate) fn learn(&self, took: Duration) {
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let next = match took_ns > self.at_most_ns {
            true => self.now_ns.load(Ordering::Relaxed) / 2,
            // Some take longer than others.
            false => took_ns.saturating_mul(2).min(self.at_most_ns),
        };
        self.now_ns.store(next, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn it_follows_what_transfers_take() {
        let patience = Patience::new(us(100)).unwrap();
        assert_eq!(patience.now(), us(100));
        patience.learn(us(10));
        assert_eq!(patience.now(), us(20));
        patience.learn(us(80));
        assert_eq!(patience.now(), us(100));
    }

    #[test]
    fn where_looking_is_in_vain_it_falls_off_and_comes_back() {
        let patience = Patience::new(us(64)).unwrap();
        for _ in 0..20 {
            patience.learn(us(65));
        }
        assert_eq!(patience.now(), Duration::ZERO);
        patience.learn(us(5));
        assert_eq!(patience.now(), us(10));
    }

    #[test]
    fn without_time_there_is_none() {
        assert!(Patience::new(Duration::ZERO).is_none());
    }
}
