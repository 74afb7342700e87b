//! What can be said of measurements in turns. Pure.

/// The middle, and where the middle half lies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) lower_quartile: f64,
    pub(crate) median: f64,
    pub(crate) upper_quartile: f64,
}

/// What both sides took in the same rounds: the n-th of the one belongs to the n-th of the other, so what
/// slows the machine down for a while concerns both.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pairs {
    ours: Vec<f64>,
    theirs: Vec<f64>,
}

impl Spread {
    /// Of any measurements; `None` without any.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            lower_quartile: quantile(&sorted, 0.25)?,
            median: quantile(&sorted, 0.5)?,
            upper_quartile: quantile(&sorted, 0.75)?,
        })
    }
}

impl Pairs {
    /// Adds a round.
    pub(crate) fn add(&mut self, ours: f64, theirs: f64) {
        self.ours.push(ours);
        self.theirs.push(theirs);
    }

    /// How many rounds there were.
    pub(crate) fn rounds(&self) -> usize {
        self.ours.len()
    }

    /// What we took.
    pub(crate) fn ours(&self) -> Option<Spread> {
        Spread::of(self.ours.iter().copied())
    }

    /// What they took.
    pub(crate) fn theirs(&self) -> Option<Spread> {
        Spread::of(self.theirs.iter().copied())
    }

    /// Ours to theirs, of each round by itself.
    pub(crate) fn ratio(&self) -> Option<Spread> {
        Spread::of(self.ours.iter().zip(&self.theirs).map(|(ours, theirs)| ours / theirs))
    }
}

/// Between two measurements in proportion (R-7, what spreadsheets do).
fn quantile(sorted: &[f64], part: f64) -> Option<f64> {
    let place = part * sorted.len().checked_sub(1)? as f64;
    let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(below + (above - below) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_the_measurements() {
        let spread = Spread::of([40.0, 10.0, 20.0, 30.0]).unwrap();
        assert_eq!(spread, Spread { lower_quartile: 17.5, median: 25.0, upper_quartile: 32.5 });
        let spread = Spread::of([5.0, 1.0, 3.0]).unwrap();
        assert_eq!(spread, Spread { lower_quartile: 2.0, median: 3.0, upper_quartile: 4.0 });
        let alone = Spread::of([7.0]).unwrap();
        assert_eq!(alone, Spread { lower_quartile: 7.0, median: 7.0, upper_quartile: 7.0 });
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_ratio_is_that_of_rounds_not_of_medians() {
        let mut pairs = Pairs::default();
        // A machine that gets slower and slower: each round says "twice", the medians too, but what
        // stands side by side in the wrong order would not.
        for theirs in [10.0, 100.0, 1000.0] {
            pairs.add(2.0 * theirs, theirs);
        }
        let twice = Spread { lower_quartile: 2.0, median: 2.0, upper_quartile: 2.0 };
        assert_eq!((pairs.ratio(), pairs.rounds()), (Some(twice), 3));

        let mut pairs = Pairs::default();
        for (ours, theirs) in [(1.0, 1.0), (10.0, 5.0), (100.0, 10.0)] {
            pairs.add(ours, theirs);
        }
        assert_eq!(pairs.ratio().unwrap().median, 2.0);
        assert_eq!((pairs.ours().unwrap().median, pairs.theirs().unwrap().median), (10.0, 5.0));
    }
}
