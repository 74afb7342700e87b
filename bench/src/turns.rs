//! Measuring in turns.

use anyhow::Result;

use crate::statistics::Pairs;

/// Measures both sides once unnoted, and then so many times, in turns: who goes first changes from round
/// to round, so that neither always finds what the other has left.
pub(crate) fn alternate(
    rounds: usize,
    mut ours: impl FnMut() -> Result<f64>,
    mut theirs: impl FnMut() -> Result<f64>,
) -> Result<Pairs> {
    ours()?;
    theirs()?;
    let mut pairs = Pairs::default();
    for round in 0..rounds {
        if round % 2 == 0 {
            let first = ours()?;
            pairs.add(first, theirs()?);
        } else {
            let first = theirs()?;
            pairs.add(ours()?, first);
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn each_is_first_in_turn_and_the_first_of_all_does_not_count() {
        let order = RefCell::new(String::new());
        let note = |side: char, value: f64| {
            order.borrow_mut().push(side);
            Ok(value)
        };
        let pairs = alternate(3, || note('o', 6.0), || note('t', 3.0)).unwrap();
        assert_eq!(order.into_inner(), "ot".to_owned() + "ot" + "to" + "ot");
        assert_eq!((pairs.rounds(), pairs.ratio().unwrap().median), (3, 2.0));
    }

    #[test]
    fn a_failure_ends_it() {
        let mut times = 0;
        let ours = || {
            times += 1;
            anyhow::ensure!(times < 3, "broken");
            Ok(1.0)
        };
        assert!(alternate(5, ours, || Ok(1.0)).is_err());
        assert_eq!(times, 3);
    }
}
