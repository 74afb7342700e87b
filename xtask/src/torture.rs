//! `vm torture`: runs the lab's torture rig in a guest, on both file systems; and the same with
//! mistakes made on purpose, each of which must turn it red.

use std::fmt;
use std::fs;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::libtest::Tally;
use crate::vm::{self, Job, Options};
use crate::{cargo, paths, setup};

/// The line with a result begins so, as in `lab/src/torture/outcome.rs`; JSON follows.
const RESULT_LINE: &str = "torture-result ";
const FILE_SYSTEMS: [&str; 2] = ["ext4", "xfs"];
/// What a run does besides its seconds: starting, the last looks, and an emulated machine's pace.
const AROUND: Duration = Duration::from_secs(400);
/// In CI, on each file system.
const BRIEFLY: u64 = 60;
/// A mutant that lives longer is not noticed; as a rule it takes seconds.
const MUTANT_LIMIT: u64 = 120;
/// On each file system, in `test-full`.
const LONG: u64 = 600;

/// How to run it.
#[derive(Args, Clone, Debug)]
pub(crate) struct Wishes {
    /// Seconds on each file system
    #[arg(long, default_value_t = BRIEFLY)]
    seconds: u64,
    /// What the schedule comes from; another one each time, and printed, if not given
    #[arg(long)]
    seed: Option<u64>,
    /// Only on this file system
    #[arg(long, value_name = "ext4|xfs", value_parser = FILE_SYSTEMS)]
    on: Option<String>,
    /// A mistake that pinfoldd makes on purpose: the run must turn red
    #[arg(long, value_enum, value_name = "NAME")]
    mutant: Option<Mutant>,
    /// After a run without a mistake, one with each, until it is noticed: what CI does
    #[arg(long, conflicts_with = "mutant")]
    mutants: bool,
    /// Write the result down in docs/results: what `test-full` does
    #[arg(long, conflicts_with_all = ["mutant", "mutants"])]
    record: bool,
}

impl Wishes {
    fn of(seconds: u64) -> Self {
        Self { seconds, seed: None, on: None, mutant: None, mutants: false, record: false }
    }
}

/// What `PINFOLD_MUTANT` may be: `leases/src/mutant.rs`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Mutant {
    /// No mistake, but the pauses that the others come with: must stay green
    Slow,
    /// The file is let go with no fence
    NoFence,
    /// The file is let go, and the fence falls after that
    ReleaseBeforeFence,
    /// The memory is unmapped while regions are still registered on it
    UnmapBeforeDeregister,
}

const MISTAKES: [Mutant; 3] =
    [Mutant::NoFence, Mutant::ReleaseBeforeFence, Mutant::UnmapBeforeDeregister];

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("none is skipped");
        f.write_str(value.get_name())
    }
}

/// One run of the rig: where, for how long at most, and with which mistake.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Run {
    file_system: &'static str,
    seconds: u64,
    mutant: Option<Mutant>,
}

impl Run {
    fn on_each(seconds: u64, mutant: Option<Mutant>) -> impl Iterator<Item = Self> {
        FILE_SYSTEMS.into_iter().map(move |file_system| Self { file_system, seconds, mutant })
    }

    fn is_wanted(&self, wishes: &Wishes) -> bool {
        wishes.on.as_ref().is_none_or(|name| name == self.file_system)
    }

    fn must_be_red(&self) -> bool {
        self.mutant.is_some_and(|mutant| MISTAKES.contains(&mutant))
    }
}

/// `vm torture`.
pub(crate) fn run(options: &Options, wishes: &Wishes) -> Result<Tally> {
    let seed = wishes.seed.unwrap_or_else(new_seed);
    let mistakes = MISTAKES.into_iter().filter(|_| wishes.mutants);
    let mistakes = mistakes.flat_map(|mutant| Run::on_each(MUTANT_LIMIT, Some(mutant)));
    let runs = Run::on_each(wishes.seconds, wishes.mutant).chain(mistakes);
    let runs: Vec<_> = runs.filter(|run| run.is_wanted(wishes)).collect();
    let (tally, results) = carry_out(options, &runs, seed)?;
    if wishes.record {
        record(results)?;
    }
    Ok(tally)
}

/// In CI: briefly, and with each mistake until it is noticed.
pub(crate) fn run_in_ci(options: &Options) -> Result<Tally> {
    run(options, &Wishes { mutants: true, ..Wishes::of(BRIEFLY) })
}

/// For ten minutes on each file system; the result is written down.
pub(crate) fn run_long(options: &Options) -> Result<Tally> {
    run(options, &Wishes { record: true, ..Wishes::of(LONG) })
}

/// A run takes the place of the one before on the same file system.
fn record(results: Vec<Value>) -> Result<()> {
    let kernel = results.first().and_then(|result| result["kernel"].as_str());
    let kernel = kernel.context("the rig named no kernel")?.to_owned();
    let folder = paths::root().join("docs/results");
    fs::create_dir_all(&folder)?;
    let commit = paths::commit()?;
    let path = folder.join(format!("torture-{kernel}.json"));
    let before: Value = match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => json!({"runs": []}),
    };
    let runs = before["runs"].as_array().cloned().unwrap_or_default();
    let written = json!({"kernel": kernel, "runs": merged(runs, results, &commit)});
    fs::write(&path, serde_json::to_string_pretty(&written)? + "\n")?;
    println!("docs/results/torture-{kernel}.json is written");
    Ok(())
}

fn merged(mut runs: Vec<Value>, results: Vec<Value>, commit: &str) -> Vec<Value> {
    for mut result in results {
        result["commit"] = json!(commit);
        runs.retain(|run| run["file_system"] != result["file_system"]);
        runs.push(result);
    }
    runs.sort_by_key(|run| run["file_system"].to_string());
    runs
}

/// Another one each time.
pub(crate) fn new_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // Short enough to be typed, and for every reader of JSON.
    u64::from(now.subsec_nanos()) ^ now.as_secs() & 0xffff_ffff
}

/// Builds, boots once, runs one after the other; a run that ends as it must is a test passed.
fn carry_out(options: &Options, runs: &[Run], seed: u64) -> Result<(Tally, Vec<Value>)> {
    setup::require_lab()?;
    println!(
        "== torture: seed {seed}; `cargo xtask vm torture --seed {seed}` repeats its schedule"
    );
    let mutants = runs.iter().any(|run| run.mutant.is_some()).then(cargo::mutants).transpose()?;
    let programs = cargo::programs()?;
    let mut script = String::new();
    for run in runs {
        let servers = run.mutant.and(mutants.as_ref()).unwrap_or(&programs);
        let rig = programs.join("torture");
        script += &line(run, seed, &rig.to_string_lossy(), &servers.to_string_lossy());
    }
    let limit = runs.iter().map(|run| Duration::from_secs(run.seconds) + AROUND).sum();
    let results = boot(options, script, limit)?;
    ensure!(results.len() == runs.len(), "{} results of {} runs", results.len(), runs.len());
    let mut tally = Tally::default();
    for (run, result) in runs.iter().zip(&results) {
        let verdict = verdict(run, result);
        println!("== torture: {}", told(run, result, &verdict));
        match verdict {
            Ok(()) => tally.passed += 1,
            Err(_) => tally.failed += 1,
        }
    }
    Ok((tally, results))
}

/// The shell's line for a run. Its status is in its result.
fn line(run: &Run, seed: u64, rig: &str, servers: &str) -> String {
    let Run { file_system, seconds, mutant } = run;
    let mutant = mutant.map(|mutant| format!("PINFOLD_MUTANT={mutant} ")).unwrap_or_default();
    let (rig, servers) = (vm::quoted(rig), vm::quoted(servers));
    format!("{mutant}PINFOLD_BIN_DIR={servers} {rig} {file_system} {seconds} {seed}\n")
}

/// A mistake must be seen by what it does to bytes, not by what else goes wrong with it.
fn verdict(run: &Run, result: &Value) -> Result<(), String> {
    let findings = result["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    if !run.must_be_red() {
        let first = findings.first();
        return first.map_or(Ok(()), |finding| Err(finding["check"].to_string()));
    }
    match findings.iter().any(|finding| finding["check"] == "foreign") {
        true => Ok(()),
        false => Err("it was not noticed that bytes were misplaced".to_owned()),
    }
}

fn told(run: &Run, result: &Value, verdict: &Result<(), String>) -> String {
    let mutant = run.mutant.map(|mutant| format!(" with {mutant}")).unwrap_or_default();
    let outcome = match verdict {
        Ok(()) if run.must_be_red() => "red, as it must be".to_owned(),
        Ok(()) => "green".to_owned(),
        Err(why) => format!("FAILED: {why}"),
    };
    let first = result["findings"][0]["at_ms"].as_u64();
    let after = first.map(|at| format!(" after {:.1} s", at as f64 / 1000.0)).unwrap_or_default();
    format!("{}{mutant}: {outcome}{after}", run.file_system)
}

/// Gives the results that the guest printed.
fn boot(options: &Options, script: String, limit: Duration) -> Result<Vec<Value>> {
    let (sender, output) = mpsc::channel();
    let reader = thread::spawn(|| read(output));
    let argv = ["sh", "-c", &script].map(Into::into).to_vec();
    // What came of the runs is in what they have printed.
    vm::run(options, &Job::Run(argv, limit), &Some(sender))?.status()?;
    reader.join().ok().context("the reader of the guest's output panicked")
}

/// A line may come in pieces.
fn read(output: Receiver<Vec<u8>>) -> Vec<Value> {
    let text: Vec<u8> = output.into_iter().flatten().collect();
    let text = String::from_utf8_lossy(&text);
    let results = text.lines().filter_map(|line| line.trim_end().strip_prefix(RESULT_LINE));
    results.filter_map(|json| serde_json::from_str(json).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_takes_the_place_of_the_last_on_its_file_system() {
        let run = |file_system: &str, seed: u64| json!({"file_system": file_system, "seed": seed});
        let first = merged(Vec::new(), vec![run("xfs", 1), run("ext4", 1)], "a");
        let second = merged(first, vec![run("xfs", 2)], "b");
        let seen: Vec<_> =
            second.iter().map(|run| (run["seed"].as_u64(), run["commit"].as_str())).collect();
        assert_eq!(seen, [(Some(1), Some("a")), (Some(2), Some("b"))]);
    }

    fn on_ext4(mutant: Option<Mutant>) -> Run {
        Run { file_system: "ext4", seconds: 9, mutant }
    }

    #[test]
    fn a_mistake_must_show_in_the_bytes() {
        let green = json!({"findings": []});
        let late = json!({"findings": [{"check": "timer", "at_ms": 5}]});
        let foreign = json!({"findings": [{"check": "foreign", "at_ms": 1500}]});
        assert_eq!(verdict(&on_ext4(None), &green), Ok(()));
        assert!(verdict(&on_ext4(None), &late).is_err());
        assert_eq!(verdict(&on_ext4(Some(Mutant::Slow)), &green), Ok(()));
        let mutant = on_ext4(Some(Mutant::NoFence));
        assert!(verdict(&mutant, &green).is_err());
        assert!(verdict(&mutant, &late).is_err());
        assert_eq!(verdict(&mutant, &foreign), Ok(()));
        let told = told(&mutant, &foreign, &Ok(()));
        assert_eq!(told, "ext4 with no-fence: red, as it must be after 1.5 s");
    }

    #[test]
    fn only_a_mutant_gets_its_name() {
        let plain = line(&on_ext4(None), 7, "/t/rig", "/t/debug");
        assert_eq!(plain, "PINFOLD_BIN_DIR='/t/debug' '/t/rig' ext4 9 7\n");
        let mutant = line(&on_ext4(Some(Mutant::NoFence)), 7, "/t/rig", "/t/mutants");
        assert_eq!(
            mutant,
            "PINFOLD_MUTANT=no-fence PINFOLD_BIN_DIR='/t/mutants' '/t/rig' ext4 9 7\n"
        );
    }
}
