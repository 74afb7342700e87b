//! `vm crash`: cuts the power of a guest in which files are made, filled and removed, and has the next
//! guest look for all that was acknowledged; and the same with mistakes made on purpose, each of which
//! must turn it red.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::libtest::Tally;
use crate::qemu::Kept;
use crate::torture::new_seed;
use crate::vm::{self, End, Job, Options};
use crate::{cargo, paths, setup};

/// A line about a step that the server has acknowledged begins so; the place follows. As in
/// `lab/src/crash/words.rs`.
const ACKNOWLEDGED: &str = "crash-ack ";
/// The line with a result begins so, as in `lab/src/crash/check.rs`; JSON follows.
const RESULT_LINE: &str = "crash-result ";
/// What the shell says of a program that ended before the power did.
const DIED: &str = "crash-died ";
/// Where files are made: two file systems with DAX, and one on a disk.
const PLACES: [&str; 3] = ["ext4", "xfs", "page-cache"];
/// Steps that each place takes before the cut: at least so many, and less than so many more.
const STEPS: (u64, u64) = (6, 16);
/// The file after which a place rests, if it does; not one that comes by `pinfold put`.
const LAST_FILE: u64 = 3;
/// Looking, and working until the cut, on an emulated machine.
const LIMIT: Duration = Duration::from_secs(400);
/// MiB of the disk.
const DISK_MIB: u64 = 256;

/// How to run it.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Wishes {
    /// What the work and the moment of the cut come from; another one each time, and printed, if not
    /// given
    #[arg(long)]
    seed: Option<u64>,
    /// Only in this place
    #[arg(long, value_name = "PLACE", value_parser = PLACES)]
    on: Option<String>,
    /// A mistake that pinfoldd makes on purpose: the run must turn red where that loses anything
    #[arg(long, value_enum, value_name = "NAME")]
    mutant: Option<Mutant>,
    /// After a cut without a mistake, one with a mistake in each place: what CI does
    #[arg(long, conflicts_with = "mutant")]
    mutants: bool,
    /// Cuts, one after the other, of guests with the same storage
    #[arg(long, default_value_t = 1)]
    cuts: u64,
}

/// What `PINFOLD_MUTANT` may be, of what concerns a power cut: `leases/src/mutant.rs`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Mutant {
    /// Files of holes, nothing flushed, no MAP_SYNC
    NoSync,
    /// Files that are made, resized or removed are not flushed, nor their names
    NamesWithoutSync,
    /// Commits flush nothing; with DAX the bytes are on the medium all the same
    CommitWithoutFlush,
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().expect("none is skipped");
        f.write_str(value.get_name())
    }
}

/// What is done in a place up to a cut.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Work {
    place: &'static str,
    mutant: Option<Mutant>,
}

impl Work {
    /// A power cut leaves the host's memory alone, and with it all that DAX has stored: there only
    /// metadata can be lost.
    fn must_be_red(self) -> bool {
        match self.mutant {
            None => false,
            Some(Mutant::NoSync | Mutant::NamesWithoutSync) => true,
            Some(Mutant::CommitWithoutFlush) => self.place == "page-cache",
        }
    }
}

/// `vm crash`.
pub(crate) fn run(options: &Options, wishes: &Wishes) -> Result<Tally> {
    setup::require_lab()?;
    let seed = wishes.seed.unwrap_or_else(new_seed);
    println!("== crash: seed {seed}; `cargo xtask vm crash --seed {seed}` repeats its steps");
    let rounds = rounds(wishes);
    let mutants = rounds.iter().flatten().any(|work| work.mutant.is_some());
    let mutants = mutants.then(cargo::mutants).transpose()?;
    let programs = cargo::programs()?;
    let rig = Rig { seed, mutants: mutants.unwrap_or_else(|| programs.clone()), programs };
    let storage = Storage::new(options.fs_size)?;
    let mut tally = Tally::default();
    let mut before: Option<Round> = None;
    for number in 0..=rounds.len() {
        let next = rounds.get(number).map(|works| Round { number, works: works.clone() });
        let mut script = String::new();
        if let Some(cut) = &before {
            script += &rig.check(cut, &storage.said(cut.number));
        }
        if let Some(next) = &next {
            script += &rig.work(next);
        }
        let kept = Some(storage.kept(number > 0));
        let goals = next.as_ref().map(|next| rig.goals(next));
        let lines = boot(&Options { kept, ..options.clone() }, script, goals)?;
        if let Some(cut) = &before {
            tally += judge(cut, &results(&lines))?;
        }
        if let Some(next) = &next {
            fs::write(storage.said(next.number), lines.join("\n") + "\n")?;
        }
        before = next;
    }
    Ok(tally)
}

/// In CI: one cut without a mistake, and one with a mistake in each place.
pub(crate) fn run_in_ci(options: &Options) -> Result<Tally> {
    run(options, &Wishes { mutants: true, cuts: 1, ..Wishes::default() })
}

/// What is done in each guest but the last, which only looks.
fn rounds(wishes: &Wishes) -> Vec<Vec<Work>> {
    let is_wanted = |work: &Work| wishes.on.as_ref().is_none_or(|place| place == work.place);
    let everywhere = |mutant: fn(&str) -> Option<Mutant>, otherwise: Option<Mutant>| {
        let works =
            PLACES.into_iter().map(|place| Work { place, mutant: mutant(place).or(otherwise) });
        works.filter(is_wanted).collect::<Vec<_>>()
    };
    let mut rounds: Vec<_> =
        (0..wishes.cuts).map(|_| everywhere(|_| None, wishes.mutant)).collect();
    if wishes.mutants {
        rounds.push(everywhere(mistake, None));
    }
    rounds
}

/// The one that must be noticed in this place.
fn mistake(place: &str) -> Option<Mutant> {
    Some(match place {
        "ext4" => Mutant::NoSync,
        "xfs" => Mutant::NamesWithoutSync,
        _ => Mutant::CommitWithoutFlush,
    })
}

/// A guest's work.
#[derive(Clone, Debug)]
struct Round {
    number: usize,
    works: Vec<Work>,
}

impl Round {
    /// Of each file system.
    fn folder(&self) -> String {
        format!("round-{}", self.number)
    }
}

/// What scripts are made of.
struct Rig {
    seed: u64,
    programs: PathBuf,
    mutants: PathBuf,
}

impl Rig {
    fn program(&self) -> String {
        vm::quoted(&self.programs.join("crash").to_string_lossy())
    }

    /// All places at once, until the power is gone.
    fn work(&self, round: &Round) -> String {
        let (program, folder) = (self.program(), round.folder());
        let mut script = String::new();
        for work @ Work { place, mutant } in &round.works {
            let last = self.last_file(round, work).map(|file| format!(" {file}"));
            let last = last.unwrap_or_default();
            let servers = if mutant.is_some() { &self.mutants } else { &self.programs };
            let servers = vm::quoted(&servers.to_string_lossy());
            let mutant = mutant.map(|name| format!("PINFOLD_MUTANT={name} ")).unwrap_or_default();
            let seed = self.number(round, place);
            script += &format!(
                "({mutant}PINFOLD_BIN_DIR={servers} {program} work {place} {folder} {seed}{last}; \
                 echo '{DIED}{place}') &\n"
            );
        }
        script + "wait\n"
    }

    fn check(&self, round: &Round, said: &Path) -> String {
        let (program, folder) = (self.program(), round.folder());
        let said = vm::quoted(&said.to_string_lossy());
        let line =
            |work: &Work| format!("{program} check {} {folder} {said} || exit 1\n", work.place);
        round.works.iter().map(line).collect()
    }

    /// How many steps each place takes at least before the power goes.
    fn goals(&self, round: &Round) -> Vec<Goal> {
        let (least, more) = STEPS;
        let goal = |work: &Work| {
            if let Some(file) = self.last_file(round, work) {
                let json = format!("{{\"Created\":{{\"file\":{file}}}}}");
                return Goal { begin: format!("{ACKNOWLEDGED}{} {json}", work.place), left: 1 };
            }
            let left = least + self.number(round, work.place) % more;
            Goal { begin: format!("{ACKNOWLEDGED}{} ", work.place), left }
        };
        round.works.iter().map(goal).collect()
    }

    /// Half of the places rest when they have made a file: else a commit that comes after it makes it
    /// durable too, and hides that its creation did not.
    fn last_file(&self, round: &Round, work: &Work) -> Option<u64> {
        let must_rest = work.mutant == Some(Mutant::NamesWithoutSync);
        let rests = must_rest || self.number(round, work.place).is_multiple_of(2);
        rests.then_some(LAST_FILE)
    }

    /// Another one for each round and place.
    fn number(&self, round: &Round, place: &str) -> u64 {
        let words = [round.number as u64, place.len() as u64];
        let mixed = words.iter().fold(self.seed, |sum, word| {
            (sum ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9)
        });
        mixed >> 32
    }
}

/// Steps of a place that are still to come before the cut.
#[derive(Debug)]
struct Goal {
    begin: String,
    left: u64,
}

/// The media, and what was said: gone with the run.
struct Storage {
    folder: PathBuf,
}

impl Storage {
    /// Empty files, sparse.
    fn new(fs_mib: u32) -> Result<Self> {
        let folder = paths::lab_dir()?.join(format!("crash-{}", std::process::id()));
        fs::create_dir_all(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
        let this = Self { folder };
        let Kept { disk, .. } = this.kept(false);
        let file = fs::File::create(&disk).with_context(|| format!("make {}", disk.display()))?;
        file.set_len(DISK_MIB << 20)?;
        let room = u64::from(2 * fs_mib) + DISK_MIB;
        println!("== crash: the guests' storage, {room} MiB at most: {}", this.folder.display());
        Ok(this)
    }

    fn kept(&self, used: bool) -> Kept {
        Kept { pmem: self.folder.join("pmem"), disk: self.folder.join("disk"), used }
    }

    fn said(&self, round: usize) -> PathBuf {
        self.folder.join(format!("said-{round}"))
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("crash: {} can't be removed: {error}", self.folder.display());
        }
    }
}

/// Gives the lines that the guest printed, to the cut that comes when the goals are reached; without
/// goals there is none.
fn boot(options: &Options, script: String, goals: Option<Vec<Goal>>) -> Result<Vec<String>> {
    let is_cut = goals.is_some();
    let (sender, output) = mpsc::channel();
    let reader = thread::spawn(move || read(output, goals, vm::cut_power));
    let argv = ["sh", "-c", &script].map(Into::into).to_vec();
    let end = vm::run(options, &Job::Run(argv, LIMIT), &Some(sender))?;
    let lines = reader.join().ok().context("the reader of the guest's output panicked")?;
    match end {
        End::PowerCut if is_cut => {}
        End::Exit(0) if !is_cut => {}
        End::PowerCut | End::Exit(_) => bail!("the guest's programs came to a wrong end"),
        End::Lost { why, .. } => bail!("the VM was lost: {why}"),
        End::Interrupted(signal) => bail!("interrupted by signal {signal}"),
    }
    let died = lines.iter().find_map(|line| line.strip_prefix(DIED));
    ensure!(died.is_none(), "in {}: ended before the power did", died.unwrap_or_default());
    Ok(lines)
}

/// Reads whole lines, and cuts the power once: on the step that reaches the last goal, or on a program's
/// end.
fn read(output: Receiver<Vec<u8>>, goals: Option<Vec<Goal>>, cut: impl FnOnce()) -> Vec<String> {
    let has_goals = goals.is_some();
    let (mut goals, mut cut) = (goals.unwrap_or_default(), Some(cut));
    let mut lines = Vec::new();
    vm::each_line(output, |line| {
        if let Some(goal) = goals.iter_mut().find(|goal| line.starts_with(&goal.begin)) {
            goal.left = goal.left.saturating_sub(1);
        }
        let is_time = goals.iter().all(|goal| goal.left == 0) || line.starts_with(DIED);
        lines.push(line);
        if has_goals
            && is_time
            && let Some(cut) = cut.take()
        {
            cut();
        }
    });
    lines
}

fn results(lines: &[String]) -> Vec<Value> {
    let results = lines.iter().filter_map(|line| line.strip_prefix(RESULT_LINE));
    results.filter_map(|json| serde_json::from_str(json).ok()).collect()
}

/// A place that is as it must be is a test passed.
fn judge(round: &Round, results: &[Value]) -> Result<Tally> {
    let places = round.works.len();
    ensure!(results.len() == places, "{} results of {places} places", results.len());
    let mut tally = Tally::default();
    for (work, result) in round.works.iter().zip(results) {
        let verdict = verdict(*work, result);
        println!("== crash: {}", told(*work, result, &verdict));
        match verdict {
            Ok(()) => tally.passed += 1,
            Err(_) => tally.failed += 1,
        }
    }
    Ok(tally)
}

fn verdict(work: Work, result: &Value) -> Result<(), String> {
    let findings = result["findings"].as_array().map(Vec::as_slice).unwrap_or_default();
    match (findings.first(), work.must_be_red()) {
        (None, false) | (Some(_), true) => Ok(()),
        (Some(finding), false) => Err(finding["what"].to_string()),
        (None, true) => Err("nothing was lost".to_owned()),
    }
}

fn told(work: Work, result: &Value, verdict: &Result<(), String>) -> String {
    let mutant = work.mutant.map(|mutant| format!(" with {mutant}")).unwrap_or_default();
    let outcome = match verdict {
        Ok(()) if work.must_be_red() => format!("red, as it must be: {}", result["findings"][0]),
        Ok(()) => "green".to_owned(),
        Err(why) => format!("FAILED: {why}"),
    };
    format!("{}{mutant}: {outcome}; acknowledged: {}", work.place, result["acknowledged"])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn goal(place: &str, left: u64) -> Goal {
        Goal { begin: format!("{ACKNOWLEDGED}{place} "), left }
    }

    fn cut_after(text: &str) -> (Vec<String>, bool) {
        let (sender, output) = mpsc::channel();
        for piece in text.as_bytes().chunks(7) {
            sender.send(piece.to_vec()).unwrap();
        }
        drop(sender);
        let mut was_cut = false;
        let goals = Some(vec![goal("ext4", 2), goal("xfs", 1)]);
        let lines = read(output, goals, || was_cut = true);
        (lines, was_cut)
    }

    #[test]
    fn the_power_goes_when_every_place_has_got_far_enough() {
        let line = |place: &str| format!("crash-ack {place} {{}}\n");
        let (both, xfs) = (line("ext4").repeat(2) + &line("xfs"), line("xfs"));
        assert!(cut_after(&both).1);
        assert!(!cut_after(&(line("ext4") + &xfs)).1);
        assert!(!cut_after(&both[..both.len() - 1]).1, "half a line is none");
        assert!(!cut_after(&both.replace("ack", "intent")).1);
        assert!(cut_after("crash-died xfs\n").1);
        assert_eq!(cut_after(&both).0.len(), 3);
    }

    #[test]
    fn a_mistake_must_lose_something() {
        let green = json!({"findings": []});
        let red = json!({"findings": [{"check": "name", "what": "file-3: gone"}]});
        let plain = Work { place: "xfs", mutant: None };
        assert_eq!(verdict(plain, &green), Ok(()));
        assert!(verdict(plain, &red).is_err());
        let no_sync = Work { mutant: Some(Mutant::NoSync), ..plain };
        assert!(verdict(no_sync, &green).is_err());
        assert_eq!(verdict(no_sync, &red), Ok(()));
        let unflushed = Work { mutant: Some(Mutant::CommitWithoutFlush), ..plain };
        assert_eq!(verdict(unflushed, &green), Ok(()), "DAX keeps the bytes");
        assert!(verdict(Work { place: "page-cache", ..unflushed }, &green).is_err());
    }

    #[test]
    fn in_ci_each_place_has_its_mistake_after_a_cut_without() {
        let wishes = Wishes { mutants: true, cuts: 1, ..Wishes::default() };
        let rounds = rounds(&wishes);
        let mutants = |round: &[Work]| round.iter().map(|work| work.mutant).collect::<Vec<_>>();
        let mistakes = [Mutant::NoSync, Mutant::NamesWithoutSync, Mutant::CommitWithoutFlush];
        assert_eq!(
            rounds.iter().map(|round| mutants(round)).collect::<Vec<_>>(),
            [vec![None; 3], mistakes.map(Some).to_vec()]
        );
    }
}
