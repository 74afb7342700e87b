//! What test binaries print: their result lines, and the lab's own lines around them.

use std::fmt;
use std::ops::AddAssign;
use std::time::Duration;

/// Before and after each test binary the guest prints a line that begins so.
pub(crate) const LAB_LINE: &str = "== lab: ";

/// Tests by how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Did what they should.
    pub(crate) passed: u32,
    /// Did not.
    pub(crate) failed: u32,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Reads `test result: ok. 3 passed; 0 failed; …`.
pub(crate) fn result(line: &str) -> Option<Tally> {
    let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
    let count = |what: &str| {
        let part = counts.split("; ").find_map(|part| part.strip_suffix(what))?;
        part.trim().parse().ok()
    };
    Some(Tally { passed: count(" passed")?, failed: count(" failed")? })
}

/// One test binary's run.
#[derive(Debug)]
struct Run {
    name: String,
    began: Duration,
    took: Option<Duration>,
    tally: Option<Tally>,
}

/// Reads the guest's output, line by line.
#[derive(Debug, Default)]
pub(crate) struct Report {
    runs: Vec<Run>,
}

impl Report {
    /// Takes the next line, printed `at` some time.
    pub(crate) fn line(&mut self, line: &str, at: Duration) {
        if let Some(name) = line.strip_prefix(LAB_LINE) {
            match name.split_once(" ended ") {
                None => {
                    let name = name.to_owned();
                    self.runs.push(Run { name, began: at, took: None, tally: None });
                }
                Some((_, status)) => self.end(status, at),
            }
            return;
        }
        if let (Some(run), Some(tally)) = (self.runs.last_mut(), result(line)) {
            run.tally = Some(tally);
        }
    }

    /// A binary that ends badly with no failed test to show for it died.
    fn end(&mut self, status: &str, at: Duration) {
        let Some(run) = self.runs.last_mut() else { return };
        run.took = Some(at.saturating_sub(run.began));
        if status != "0" && run.tally.is_some_and(|tally| tally.failed == 0) {
            run.tally = None;
        }
    }

    /// The sum over the binaries that were to run, and a line on each for people.
    pub(crate) fn sum(&self, wanted: &[String]) -> (Tally, Vec<String>) {
        let mut sum = Tally::default();
        let mut lines = Vec::new();
        for name in wanted {
            let run = self.runs.iter().find(|run| run.name == *name);
            let took = run.and_then(|run| run.took).map_or(0.0, |took| took.as_secs_f32());
            let (tally, note) = match run {
                None => (Tally { passed: 0, failed: 1 }, "did not run"),
                Some(Run { tally: Some(tally), took: Some(_), .. }) => (*tally, ""),
                Some(Run { tally, .. }) => {
                    let passed = tally.map_or(0, |tally| tally.passed);
                    let failed = tally.map_or(0, |tally| tally.failed).max(1);
                    (Tally { passed, failed }, "died without a result")
                }
            };
            sum += tally;
            lines.push(format!("{took:7.1} s  {name}: {tally} {note}").trim_end().to_owned());
        }
        (sum, lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summed(output: &str, wanted: &[&str]) -> (u32, u32) {
        let mut report = Report::default();
        output.lines().for_each(|line| report.line(line, Duration::ZERO));
        let wanted: Vec<_> = wanted.iter().map(|&name| name.to_owned()).collect();
        let (sum, lines) = report.sum(&wanted);
        assert_eq!(lines.len(), wanted.len());
        (sum.passed, sum.failed)
    }

    #[test]
    fn a_result_line_is_read() {
        let line = "test result: FAILED. 3 passed; 12 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.00s";
        assert_eq!(result(line), Some(Tally { passed: 3, failed: 12 }));
        assert_eq!(result("test result: ok. nonsense"), None);
        assert_eq!(result("test a ... ok"), None);
    }

    #[test]
    fn binaries_are_summed() {
        let output = "== lab: a\ntest result: ok. 2 passed; 0 failed; 0 ignored\n== lab: a ended 0\n\
                      == lab: b\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n== lab: b ended 101\n";
        assert_eq!(summed(output, &["a", "b"]), (3, 1));
    }

    #[test]
    fn a_binary_that_dies_is_a_failure() {
        let output = "== lab: a\nrunning 3 tests\n== lab: a ended 134\n";
        assert_eq!(summed(output, &["a"]), (0, 1));
        let output =
            "== lab: a\ntest result: ok. 2 passed; 0 failed; 0 ignored\n== lab: a ended 139\n";
        assert_eq!(summed(output, &["a"]), (0, 1));
    }

    #[test]
    fn what_the_vm_did_not_reach_is_a_failure() {
        let output = "== lab: a\ntest result: ok. 2 passed; 0 failed; 0 ignored\n== lab: a ended 0\n\
                      == lab: b\n";
        assert_eq!(summed(output, &["a", "b", "c"]), (2, 2));
    }
}
