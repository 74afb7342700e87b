//! The program after the power cut.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::expected::Expected;
use super::place::Place;
use super::words::{Said, name};

/// The line with the result begins so; JSON follows.
pub const RESULT_LINE: &str = "crash-result ";

/// What was found in one place.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Where.
    pub place: String,
    /// How often each kind of step was acknowledged.
    pub acknowledged: BTreeMap<&'static str, u64>,
    /// What must not be.
    pub findings: Vec<Finding>,
}

/// Something that must not be.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Which check failed.
    pub check: &'static str,
    /// What was seen.
    pub what: String,
}

/// Looks for all that was acknowledged; `said` is what was heard before the cut.
pub fn check(place: Place, folder: &str, said: &str) -> Result<Outcome> {
    demand_replay(place)?;
    let mut expected = Expected::default();
    let mut acknowledged = BTreeMap::new();
    for said in said.lines().filter_map(|line| Said::of_line(line, place)) {
        expected.hear(&said);
        if let Some(step) = step(&said) {
            *acknowledged.entry(step).or_default() += 1;
        }
    }
    let folder = place.mount_point().join(folder);
    let mut findings = Vec::new();
    for file in expected.files() {
        let content = content(&folder.join(name(file)))?;
        if let Err(wrong) = expected.check(file, content.as_deref()) {
            let what = format!("{}: {wrong}", name(file));
            findings.push(Finding { check: wrong.check(), what });
        }
    }
    Ok(Outcome { place: place.to_string(), acknowledged, findings })
}

/// Else the power was not cut, and nothing would be proved.
fn demand_replay(place: Place) -> Result<()> {
    let output = Command::new("dmesg").output().context("dmesg did not start")?;
    let log = String::from_utf8_lossy(&output.stdout);
    ensure!(log.contains(place.replay()), "{place} was mounted without replaying its journal");
    Ok(())
}

fn step(said: &Said) -> Option<&'static str> {
    match said {
        Said::Created { .. } => Some("creations"),
        Said::Grew { .. } => Some("growths"),
        Said::Committed { .. } => Some("commits"),
        Said::Removed { .. } => Some("removals"),
        Said::Creating { .. } | Said::Growing { .. } | Said::Removing { .. } => None,
    }
}

fn content(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

impl Outcome {
    /// For people, and one line for programs.
    pub fn print(&self) {
        println!("crash: {}: acknowledged before the cut: {:?}", self.place, self.acknowledged);
        for Finding { check, what } in &self.findings {
            println!("crash: {}: {check}: {what}", self.place);
        }
        let json = serde_json::to_string(self).expect("plain data");
        println!("{RESULT_LINE}{json}");
    }
}
