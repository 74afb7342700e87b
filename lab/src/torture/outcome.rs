//! What a run comes to: counts, latencies, findings.

use std::collections::BTreeMap;

use serde::Serialize;

/// The line with the result begins so; JSON follows.
pub const RESULT_LINE: &str = "torture-result ";

/// A run on one file system.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// ext4 or xfs.
    pub file_system: String,
    /// The kernel's release.
    pub kernel: String,
    /// What the schedule came from.
    pub seed: u64,
    /// How long it ran.
    pub seconds: u64,
    /// The mistake that was made on purpose.
    pub mutant: Option<String>,
    /// How often each thing happened.
    pub counts: BTreeMap<String, u64>,
    /// Microseconds from a break to the release.
    pub break_to_release_us: Latencies,
    /// What must not be.
    pub findings: Vec<Finding>,
}

/// Something that must not be.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Which check failed.
    pub check: String,
    /// What was seen.
    pub what: String,
    /// How far into the run.
    pub at_ms: u64,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latencies {
    /// How many.
    pub count: usize,
    /// Half are below.
    pub p50: u64,
    /// Nine of ten are below.
    pub p90: u64,
    /// 99 of 100 are below.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl Latencies {
    /// Of these.
    pub fn of(mut values: Vec<u64>) -> Self {
        values.sort_unstable();
        let Some(last) = values.len().checked_sub(1) else { return Self::default() };
        let at = |percent: usize| values[last * percent / 100];
        Self { count: values.len(), p50: at(50), p90: at(90), p99: at(99), max: values[last] }
    }
}

impl Outcome {
    /// For people, and one line for programs.
    pub fn print(&self) {
        let Self { file_system, seed, seconds, counts, break_to_release_us: latency, .. } = self;
        let mutant = self.mutant.as_deref().map(|name| format!(", mutant {name}"));
        let mutant = mutant.unwrap_or_default();
        println!("torture: {file_system}, seed {seed}, {seconds} s{mutant}");
        for (name, count) in counts {
            println!("  {count:>8}  {name}");
        }
        println!(
            "  from break to release, of {}: p50 {} us, p90 {} us, p99 {} us, max {} us",
            latency.count, latency.p50, latency.p90, latency.p99, latency.max
        );
        for Finding { check, what, at_ms } in &self.findings {
            println!("  RED ({check}) after {at_ms} ms, seed {seed}: {what}");
        }
        println!("{RESULT_LINE}{}", serde_json::to_string(self).expect("plain data"));
    }
}
