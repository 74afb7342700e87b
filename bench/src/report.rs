//! What was measured, as a row: for programs as JSON, for people as a line.

use pinfold_verbs::Device;
use serde::Serialize;

use crate::statistics::{Pairs, Spread};

/// What ours to theirs should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// Of times and sizes.
    AtMost(f64),
    /// Of bandwidths.
    AtLeast(f64),
    /// It tells where time goes, and is judged by nobody.
    None,
}

/// A thing that was measured, ours beside that of a peer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// What it stands beside.
    pub(crate) peer: &'static str,
    pub(crate) unit: &'static str,
    /// Medians.
    ours: f64,
    theirs: f64,
    /// The median of the rounds' ratios, ours to theirs, and where the middle half of them lies.
    ratio: f64,
    ratio_lower_quartile: f64,
    ratio_upper_quartile: f64,
    /// The ratio should be `at most` or `at least` that.
    goal: Option<f64>,
    goal_is: Option<&'static str>,
    holds: Option<bool>,
    rounds: usize,
}

/// What it was measured with.
#[derive(Debug, Serialize)]
pub(crate) struct Head {
    commit: String,
    kernel: String,
    device: String,
    rdma_core: String,
    processor: String,
    quick: bool,
}

/// All of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    #[serde(flatten)]
    head: Head,
    rows: Vec<Row>,
}

impl Goal {
    fn number(self) -> Option<f64> {
        match self {
            Self::AtMost(number) | Self::AtLeast(number) => Some(number),
            Self::None => None,
        }
    }

    fn words(self) -> Option<&'static str> {
        match self {
            Self::AtMost(_) => Some("at most"),
            Self::AtLeast(_) => Some("at least"),
            Self::None => None,
        }
    }

    fn holds(self, ratio: f64) -> Option<bool> {
        match self {
            Self::AtMost(most) => Some(ratio <= most),
            Self::AtLeast(least) => Some(ratio >= least),
            Self::None => None,
        }
    }
}

impl Row {
    /// `None` if there was no round.
    pub(crate) fn new(
        name: String,
        peer: &'static str,
        unit: &'static str,
        pairs: &Pairs,
        goal: Goal,
    ) -> Option<Self> {
        let Spread { lower_quartile, median, upper_quartile } = pairs.ratio()?;
        Some(Self {
            name,
            peer,
            unit,
            ours: rounded(pairs.ours()?.median),
            theirs: rounded(pairs.theirs()?.median),
            ratio: rounded(median),
            ratio_lower_quartile: rounded(lower_quartile),
            ratio_upper_quartile: rounded(upper_quartile),
            goal: goal.number(),
            goal_is: goal.words(),
            holds: goal.holds(median),
            rounds: pairs.rounds(),
        })
    }

    /// For people.
    pub(crate) fn line(&self) -> String {
        let spread =
            format!("{:.2} to {:.2}", self.ratio_lower_quartile, self.ratio_upper_quartile);
        let verdict = match (self.goal_is, self.goal, self.holds) {
            (Some(is), Some(goal), Some(true)) => format!("holds: {is} {goal}"),
            (Some(is), Some(goal), _) => format!("MISSED: {is} {goal}"),
            _ => String::new(),
        };
        format!(
            "{:<38} {:>9} {:>9} {:<6} {:>6.2}  ({spread:<14}) {verdict:<22} {}",
            self.name, self.ours, self.theirs, self.unit, self.ratio, self.peer
        )
    }
}

/// Above the lines.
pub(crate) fn heading() -> String {
    let [name, ours, theirs, unit, ratio] = ["", "ours", "theirs", "", "ratio"];
    format!("{name:<38} {ours:>9} {theirs:>9} {unit:<6} {ratio:>6}  (middle half)")
}

impl Head {
    /// What this machine is.
    pub(crate) fn new(device: &Device, commit: String, quick: bool) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            commit,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            device: device.name().to_owned(),
            rdma_core: rdma_core(&read("/proc/self/maps")).unwrap_or("unknown").to_owned(),
            processor: processor(&read("/proc/cpuinfo")).unwrap_or("unknown").to_owned(),
            quick,
        }
    }
}

impl Report {
    pub(crate) fn new(head: Head, rows: Vec<Row>) -> Self {
        Self { head, rows }
    }
}

/// Four digits say all that such a measurement knows.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let digits = (3.0 - value.abs().log10().floor()).clamp(0.0, 9.0);
    let scale = 10f64.powf(digits);
    (value * scale).round() / scale
}

/// rdma-core's version, which its libibverbs has at the end of its name (`libibverbs.so.1.14.44.0`).
fn rdma_core(maps: &str) -> Option<&str> {
    let (_, version) = maps.lines().find_map(|line| line.split_once("/libibverbs.so."))?;
    // Interface and its revision come first.
    version.splitn(3, '.').nth(2)
}

fn processor(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: f64, theirs: f64, goal: Goal) -> Row {
        let mut pairs = Pairs::default();
        pairs.add(ours, theirs);
        Row::new("name".to_owned(), "a peer", "µs", &pairs, goal).unwrap()
    }

    #[test]
    fn a_goal_looks_the_right_way() {
        let cases = [
            (105.0, Goal::AtMost(1.05), Some(true)),
            (106.0, Goal::AtMost(1.05), Some(false)),
            (98.0, Goal::AtLeast(0.98), Some(true)),
            (97.0, Goal::AtLeast(0.98), Some(false)),
            (500.0, Goal::None, None),
        ];
        for (ours, goal, holds) in cases {
            assert_eq!(row(ours, 100.0, goal).holds, holds, "{ours} {goal:?}");
        }
    }

    #[test]
    fn a_missed_goal_is_not_missed_by_who_reads() {
        assert!(row(3.0, 1.0, Goal::AtMost(2.0)).line().contains("MISSED: at most 2"));
        assert!(row(1.0, 1.0, Goal::AtMost(2.0)).line().contains("holds: at most 2"));
        assert!(!row(1.0, 1.0, Goal::None).line().contains(':'));
    }

    #[test]
    fn a_row_has_the_names_that_programs_look_for() {
        let json = serde_json::to_value(row(3.0, 2.0, Goal::AtLeast(0.9))).unwrap();
        for (key, value) in [
            ("name", "name".into()),
            ("peer", "a peer".into()),
            ("unit", "µs".into()),
            ("ours", 3.0.into()),
            ("theirs", 2.0.into()),
            ("ratio", 1.5.into()),
            ("goal", 0.9.into()),
            ("goal_is", "at least".into()),
            ("holds", true.into()),
            ("rounds", serde_json::Value::from(1)),
        ] {
            assert_eq!(json[key], value, "{key}");
        }
    }

    #[test]
    fn four_digits_remain() {
        let cases = [(0.0, 0.0), (1.23456, 1.235), (123456.7, 123457.0), (0.000123456, 0.0001235)];
        for (value, expected) in cases {
            assert_eq!(rounded(value), expected);
        }
    }

    #[test]
    fn versions_are_found_where_they_stand() {
        let maps = "7f00-7f01 r-xp 0 fd:01 1 /usr/lib/libibverbs.so.1.14.44.0\n";
        assert_eq!(rdma_core(maps), Some("44.0"));
        assert_eq!(rdma_core("7f00-7f01 r-xp 0 fd:01 1 /usr/lib/libc.so.6\n"), None);
        assert_eq!(processor("x\nmodel name\t: A CPU\n"), Some("A CPU"));
    }
}
