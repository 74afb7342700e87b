//! When to try again: pure, with the time as an argument.

use std::time::{Duration, Instant};

/// How often, and for how long, a kept pin is tried to be had again.
///
/// The first try comes at once. Each one after it waits: the first delay, then longer by the factor
/// each time, up to the longest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KeepPolicy {
    first_delay: Duration,
    factor: u32,
    longest_delay: Duration,
    give_up_after: Option<Duration>,
}

impl KeepPolicy {
    /// 50 ms, then twice as long each time, up to 5 s; never gives up.
    pub fn new() -> Self {
        Self {
            first_delay: Duration::from_millis(50),
            factor: 2,
            longest_delay: Duration::from_secs(5),
            give_up_after: None,
        }
    }

    /// How long to wait after the first failure. At least a millisecond.
    #[must_use]
    pub fn first_delay(mut self, delay: Duration) -> Self {
        self.first_delay = delay.max(Duration::from_millis(1));
        self
    }

    /// By how much longer each wait is. At least 1, which is always the same.
    #[must_use]
    pub fn factor(mut self, factor: u32) -> Self {
        self.factor = factor.max(1);
        self
    }

    /// How long to wait at most. At least a millisecond.
    #[must_use]
    pub fn longest_delay(mut self, delay: Duration) -> Self {
        self.longest_delay = delay.max(Duration::from_millis(1));
        self
    }

    /// Gives a pin up if it could not be had again for this long after it was interrupted. Default:
    /// never.
    #[must_use]
    pub fn give_up_after(mut self, patience: Duration) -> Self {
        self.give_up_after = Some(patience);
        self
    }
}

impl Default for KeepPolicy {
    fn default() -> Self {
        Self::new()
    }
}

/// How far the policy has got in one row of failures.
#[derive(Debug)]
pub(crate) struct Backoff {
    policy: KeepPolicy,
    next: Duration,
    give_up_at: Option<Instant>,
}

impl Backoff {
    /// The row begins now.
    pub(crate) fn new(policy: KeepPolicy, now: Instant) -> Self {
        let next = policy.first_delay.min(policy.longest_delay);
        // A moment too far away to be named never comes.
        let give_up_at = policy.give_up_after.and_then(|patience| now.checked_add(patience));
        Self { policy, next, give_up_at }
    }

    /// One that never gives up.
    pub(crate) fn endless(policy: KeepPolicy, now: Instant) -> Self {
        Self { give_up_at: None, ..Self::new(policy, now) }
    }

    /// When it is over.
    pub(crate) fn give_up_at(&self) -> Option<Instant> {
        self.give_up_at
    }

    /// A try has failed: how long to wait before the next one; `None`: there is none.
    pub(crate) fn failed(&mut self, now: Instant) -> Option<Duration> {
        let left = self.give_up_at.map(|end| end.saturating_duration_since(now));
        if left == Some(Duration::ZERO) {
            return None;
        }
        let delay = self.next;
        self.next = delay.saturating_mul(self.policy.factor).min(self.policy.longest_delay);
        Some(left.map_or(delay, |left| delay.min(left)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn policy() -> KeepPolicy {
        KeepPolicy::new().first_delay(ms(10)).factor(3).longest_delay(ms(100))
    }

    #[test]
    fn delays_grow_up_to_the_longest() {
        let now = Instant::now();
        let mut backoff = Backoff::new(policy(), now);
        let delays: Vec<_> = (0..5).map(|_| backoff.failed(now).unwrap()).collect();
        assert_eq!(delays, [ms(10), ms(30), ms(90), ms(100), ms(100)]);
        assert_eq!(backoff.give_up_at(), None);
    }

    #[test]
    fn the_last_try_comes_when_patience_ends_and_none_after_it() {
        let begin = Instant::now();
        let mut backoff = Backoff::new(policy().give_up_after(ms(50)), begin);
        assert_eq!(backoff.give_up_at(), Some(begin + ms(50)));
        assert_eq!(backoff.failed(begin), Some(ms(10)));
        assert_eq!(backoff.failed(begin + ms(30)), Some(ms(20)), "not past the end");
        assert_eq!(backoff.failed(begin + ms(50)), None);
        assert_eq!(backoff.failed(begin + ms(5000)), None);
        let mut endless = Backoff::endless(policy().give_up_after(ms(50)), begin);
        assert_eq!(endless.failed(begin + ms(5000)), Some(ms(10)));
    }

    #[test]
    fn senseless_policies_make_no_busy_loop_and_no_overflow() {
        let now = Instant::now();
        let policy = KeepPolicy::new()
            .first_delay(Duration::ZERO)
            .factor(0)
            .longest_delay(Duration::MAX)
            .give_up_after(Duration::MAX);
        let mut backoff = Backoff::new(policy.clone(), now);
        assert_eq!(backoff.failed(now), Some(ms(1)));
        assert_eq!(backoff.failed(now), Some(ms(1)));
        let mut backoff = Backoff::new(policy.factor(u32::MAX), now);
        for _ in 0..10 {
            assert!(backoff.failed(now).is_some());
        }
    }
}
