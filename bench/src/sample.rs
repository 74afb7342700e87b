//! Times of the same thing, several times over.

use std::time::Duration;

use serde::Serialize;

/// What was measured, in the order in which it was.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Sample {
    microseconds: Vec<u64>,
}

impl Sample {
    /// Adds one.
    pub(crate) fn add(&mut self, time: Duration) {
        self.microseconds.push(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// The one in the middle, or the lower of two; 0 if there is none.
    pub(crate) fn median_microseconds(&self) -> u64 {
        let mut sorted = self.microseconds.clone();
        sorted.sort_unstable();
        sorted.get(sorted.len().saturating_sub(1) / 2).copied().unwrap_or(0)
    }

    /// How many times as long this takes as the other.
    pub(crate) fn ratio_to(&self, other: &Self) -> f64 {
        self.median_microseconds() as f64 / other.median_microseconds().max(1) as f64
    }

    /// For people.
    pub(crate) fn summary(&self) -> String {
        let ms = |microseconds: u64| microseconds as f64 / 1000.0;
        let least = self.microseconds.iter().min().copied().unwrap_or(0);
        let most = self.microseconds.iter().max().copied().unwrap_or(0);
        format!(
            "median {:8.2} ms   ({:.2} to {:.2})",
            ms(self.median_microseconds()),
            ms(least),
            ms(most)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(microseconds: &[u64]) -> Sample {
        let mut sample = Sample::default();
        microseconds.iter().for_each(|time| sample.add(Duration::from_micros(*time)));
        sample
    }

    #[test]
    fn the_median_is_what_was_measured() {
        assert_eq!(sample(&[30, 10, 20]).median_microseconds(), 20);
        assert_eq!(sample(&[40, 10, 20, 30]).median_microseconds(), 20);
        assert_eq!(sample(&[]).median_microseconds(), 0);
    }

    #[test]
    fn a_ratio_says_how_many_times_as_long() {
        assert_eq!(sample(&[500]).ratio_to(&sample(&[50])), 10.0);
        assert_eq!(sample(&[7]).ratio_to(&sample(&[0])), 7.0, "less than can be measured");
    }
}
