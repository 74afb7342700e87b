//! `hazards`: runs the hazard table on every kernel of the lab, and writes down what it showed: the
//! results in `docs/hazards.json`, the table in `docs/guarantees.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::kernel::Suite;
use crate::vm::Options;
use crate::{paths, test};

/// The file in `lab/tests` whose lines are collected.
const TEST: &str = "on_each_kernel_hazards";
/// What the lines begin with, as in `lab/src/hazard.rs`.
const CELL: &str = "hazard-cell ";
const KERNEL: &str = "hazard-kernel ";
/// Around the table in guarantees.md.
const BEGIN: &str = "<!-- The table is written by `cargo xtask hazards`. -->\n";
const END: &str = "<!-- The table ends. -->\n";
/// The kernels, the oldest first.
const SUITES: [Suite; 3] = [Suite::Bookworm, Suite::Trixie, Suite::Newest];
/// The columns, in their order; what is not among them is a mistake.
const TIERS: [&str; 4] = ["unguarded", "lease", "delegation", "sealed"];

/// `docs/hazards.json`.
#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Results {
    /// Suite → release.
    kernels: BTreeMap<String, String>,
    /// What the tests were built from.
    commit: String,
    rows: Vec<Row>,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
struct Row {
    hazard: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    note: String,
    /// Tier → suite → file system → outcome.
    outcomes: BTreeMap<String, BTreeMap<String, BTreeMap<String, String>>>,
}

/// One line of the test.
#[derive(Debug, Deserialize)]
struct Cell {
    hazard: String,
    tier: String,
    place: String,
    outcome: String,
    #[serde(default)]
    note: String,
}

/// Boots each kernel, collects, writes.
pub(crate) fn run(options: &Options, limit: Duration) -> Result<()> {
    let mut results =
        Results { kernels: BTreeMap::new(), commit: paths::commit()?, rows: Vec::new() };
    for suite in SUITES {
        let options = Options { kernel: suite, ..options.clone() };
        let lines = test::collect(&options, TEST, limit)?;
        results.take(&suite.to_string(), &lines)?;
    }
    let json = results.to_json()?;
    fs::write(json_path(), &json).context("cannot write docs/hazards.json")?;
    write_table()?;
    println!(
        "docs/hazards.json and docs/guarantees.md are written; `git diff docs` shows what changed"
    );
    Ok(())
}

/// Writes the table from what is written down.
pub(crate) fn write_table() -> Result<()> {
    let json = fs::read_to_string(json_path()).context("cannot read docs/hazards.json")?;
    let results: Results = serde_json::from_str(&json)?;
    let text = fs::read_to_string(text_path())?;
    Ok(fs::write(text_path(), replaced(&text, &results.table())?)?)
}

fn json_path() -> PathBuf {
    paths::root().join("docs/hazards.json")
}

fn text_path() -> PathBuf {
    paths::root().join("docs/guarantees.md")
}

/// The text with the table in it exchanged.
fn replaced(text: &str, table: &str) -> Result<String> {
    let parts = text.split_once(BEGIN).and_then(|(head, rest)| {
        let (_, tail) = rest.split_once(END)?;
        Some((head, tail))
    });
    let (head, tail) = parts.context("docs/guarantees.md has no place for the table")?;
    Ok(format!("{head}{BEGIN}{table}{END}{tail}"))
}

impl Results {
    fn take(&mut self, suite: &str, lines: &[String]) -> Result<()> {
        for line in lines {
            if let Some(release) = line.strip_prefix(KERNEL) {
                self.kernels.insert(suite.to_owned(), release.to_owned());
            }
            if let Some(cell) = line.strip_prefix(CELL) {
                self.add(suite, serde_json::from_str(cell).with_context(|| line.clone())?);
            }
        }
        ensure!(self.kernels.contains_key(suite), "the test on {suite} printed no kernel");
        Ok(())
    }

    fn add(&mut self, suite: &str, cell: Cell) {
        let found = self.rows.iter().position(|row| row.hazard == cell.hazard);
        let index = found.unwrap_or_else(|| {
            let (hazard, note) = (cell.hazard, String::new());
            self.rows.push(Row { hazard, note, outcomes: BTreeMap::new() });
            self.rows.len() - 1
        });
        let row = &mut self.rows[index];
        if !cell.note.is_empty() {
            row.note = cell.note;
        }
        let suites = row.outcomes.entry(cell.tier).or_default();
        suites.entry(suite.to_owned()).or_default().insert(cell.place, cell.outcome);
    }

    /// A row a line, so that a change shows as such.
    fn to_json(&self) -> Result<String> {
        let rows: Vec<String> =
            self.rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
        let kernels = serde_json::to_string(&self.kernels)?;
        let commit = serde_json::to_string(&self.commit)?;
        let rows = rows.join(",\n");
        Ok(format!("{{\"kernels\":{kernels},\n\"commit\":{commit},\n\"rows\":[\n{rows}\n]}}\n"))
    }

    fn table(&self) -> String {
        let releases: Vec<_> =
            SUITES.iter().filter_map(|suite| self.kernels.get(&suite.to_string())).collect();
        let releases: Vec<_> = releases.iter().map(|release| format!("`{release}`")).collect();
        let mut text = format!("Last result: {} at {}.\n\n", releases.join(", "), self.commit);
        text += &format!(
            "| hazard | {} | |\n|---|{}---|\n",
            TIERS.join(" | "),
            "---|".repeat(TIERS.len())
        );
        for row in &self.rows {
            let cells: Vec<_> = TIERS.iter().map(|tier| self.column(row, tier)).collect();
            text += &format!("| {} | {} | {} |\n", row.hazard, cells.join(" | "), row.note);
        }
        text
    }

    /// The outcome that most cells have, and where it is another.
    fn column(&self, row: &Row, tier: &str) -> String {
        let Some(suites) = row.outcomes.get(tier) else { return String::new() };
        let mut by_outcome: BTreeMap<&str, BTreeSet<(&str, &str)>> = BTreeMap::new();
        for (suite, places) in suites {
            for (place, outcome) in places {
                by_outcome.entry(outcome).or_default().insert((suite, place));
            }
        }
        let most =
            by_outcome.iter().max_by_key(|(_, cells)| cells.len()).map(|(outcome, _)| *outcome);
        let most = most.unwrap_or_default();
        let mut text = shown(most);
        for (outcome, cells) in by_outcome.iter().filter(|(outcome, _)| **outcome != most) {
            text += &format!("; {}: {}", self.named(suites, cells), shown(outcome));
        }
        text
    }

    /// Names cells by kernel, by file system, or by both where it is neither all of the one nor of
    /// the other.
    fn named(
        &self,
        all: &BTreeMap<String, BTreeMap<String, String>>,
        cells: &BTreeSet<(&str, &str)>,
    ) -> String {
        let places_of = |suite: &str| -> Vec<&str> {
            cells.iter().filter(|(s, _)| *s == suite).map(|(_, place)| *place).collect()
        };
        let mut everywhere = all.keys().map(|suite| places_of(suite));
        let first = everywhere.next().unwrap_or_default();
        if !first.is_empty() && everywhere.all(|places| places == first) {
            return first.join(", ");
        }
        let mut names = Vec::new();
        for suite in SUITES.map(|suite| suite.to_string()) {
            let places = places_of(&suite);
            let release = self.kernels.get(&suite).map_or(&*suite, |release| series(release));
            match places.len() {
                0 => {}
                n if all.get(&suite).is_some_and(|places| places.len() == n) => {
                    names.push(release.to_owned());
                }
                _ => names.push(format!("{} on {release}", places.join(", "))),
            }
        }
        names.join(", ")
    }
}

/// What nothing stands against is to be seen at a glance.
fn shown(outcome: &str) -> String {
    match outcome {
        "not covered" => "**not covered**".to_owned(),
        outcome => outcome.to_owned(),
    }
}

/// `6.1` of `6.1.0-50-amd64`.
fn series(release: &str) -> &str {
    let end = release.match_indices('.').nth(1).map_or(release.len(), |(at, _)| at);
    &release[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(lines: &[(&str, &str, &str, &str)]) -> Results {
        let kernels = [("bookworm", "6.1.0-50"), ("trixie", "6.12.1"), ("newest", "7.2.12")];
        let kernels = kernels.map(|(suite, release)| (suite.to_owned(), release.to_owned()));
        let commit = "abc".to_owned();
        let mut results = Results { kernels: kernels.into(), commit, rows: Vec::new() };
        for (suite, tier, place, outcome) in lines {
            let cell = format!(
                r#"{CELL}{{"hazard":"open","tier":"{tier}","place":"{place}","outcome":"{outcome}"}}"#
            );
            results.take(suite, &[cell]).unwrap();
        }
        results
    }

    fn column(lines: &[(&str, &str, &str, &str)]) -> String {
        let results = results(lines);
        results.column(&results.rows[0], "lease")
    }

    #[test]
    fn what_is_the_same_everywhere_is_said_once() {
        assert_eq!(
            column(&[("newest", "lease", "a", "held"), ("trixie", "lease", "b", "held")]),
            "held"
        );
    }

    #[test]
    fn an_exception_is_named_by_kernel_and_place() {
        let mut lines = vec![("newest", "lease", "a", "held"), ("newest", "lease", "b", "held")];
        lines.extend([("trixie", "lease", "a", "n/a"), ("trixie", "lease", "b", "held")]);
        assert_eq!(column(&lines), "held; a on 6.12: n/a");
        lines[3].3 = "n/a";
        lines.push(("newest", "lease", "c", "held"));
        assert_eq!(column(&lines), "held; 6.12: n/a");
        lines[0].3 = "n/a";
        lines.extend([("newest", "lease", "d", "held"), ("newest", "lease", "e", "held")]);
        lines.remove(3);
        lines.push(("trixie", "lease", "b", "held"));
        assert_eq!(column(&lines), "held; a: n/a");
    }

    #[test]
    fn what_is_written_is_read_again() {
        let results = results(&[("newest", "lease", "a", "held")]);
        let read: Results = serde_json::from_str(&results.to_json().unwrap()).unwrap();
        assert_eq!(read, results);
    }

    /// Who changes one without the other changes it back with `cargo xtask hazards`.
    #[test]
    fn the_table_shows_the_results() {
        let json = fs::read_to_string(json_path()).unwrap();
        let results: Results = serde_json::from_str(&json).unwrap();
        let text = fs::read_to_string(text_path()).unwrap();
        assert!(replaced(&text, &results.table()).unwrap() == text, "docs/guarantees.md is stale");
        assert_eq!(results.to_json().unwrap(), json);
    }

    #[test]
    fn every_assumption_is_written_down() {
        let tests = paths::root().join("leases/tests/on_each_kernel_assumptions.rs");
        let tests = fs::read_to_string(tests).unwrap();
        let text = fs::read_to_string(text_path()).unwrap();
        let names = tests.lines().filter_map(|line| {
            let (number, words) =
                line.strip_prefix("fn a")?.strip_suffix("() {")?.split_once('_')?;
            Some((number.parse::<u32>().ok()?, words.replace('_', " ")))
        });
        let rows: Vec<_> = names.map(|(n, words)| format!("| A{n} | {words} |\n")).collect();
        assert!(rows.len() > 20, "{rows:?}");
        let is_row = |line: &&str| {
            line.strip_prefix("| A")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        };
        assert_eq!(text.lines().filter(is_row).count(), rows.len());
        for row in rows {
            assert!(text.contains(&row), "docs/guarantees.md lacks {row}");
        }
    }

    #[test]
    fn every_tier_has_its_column() {
        let json = fs::read_to_string(json_path()).unwrap();
        let results: Results = serde_json::from_str(&json).unwrap();
        for row in &results.rows {
            for tier in row.outcomes.keys() {
                assert!(TIERS.contains(&tier.as_str()), "{tier} of {:?}", row.hazard);
            }
        }
    }
}
