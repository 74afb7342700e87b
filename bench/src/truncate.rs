//! How long a truncate waits for the file: ours with so many pins, beside a C program that holds a lease
//! on a file of the same length with as many regions, fences with one mprotect(2) and lets go.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pinfold_client::{IfExists, Session};
use tokio::runtime::Runtime;

use crate::Run;
use crate::peer::Peer;
use crate::pins::pin_pages;
use crate::place::{EXPORT, Storage, several_threads, text};
use crate::report::Goal;
use crate::statistics::Pairs;
use crate::turns::alternate;

const PAGE: u64 = 4096;

/// As many as one session can have.
const MANY: u64 = 4096;

/// To take so many takes half a minute.
const ROUNDS_OF_MANY: usize = 5;

/// More than a session can have, on as many pages as [`MANY`] have. To take so many takes minutes, so who
/// has them lets the file be truncated once.
pub(crate) const MOST: u64 = 100_000;

const PEER: &str = "C: holds as many regions, one mprotect, lets go";

const NAME: &str = "truncated";

const SETTING: &str = "/proc/sys/fs/lease-break-time";

/// As short as the setting can be: the server has no time for a drain then, and fences at once.
const NO_TIME: &str = "1";

/// The setting as it was, which it will be again.
struct BreakTime(String);

/// A session that drains when it is told to.
struct Ours {
    // Before the runtime, in which it ends.
    session: Arc<Session>,
    runtime: Runtime,
    file: PathBuf,
}

struct Theirs {
    holder: Peer,
    file: PathBuf,
}

/// With clients that drain, and without.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let mut sides = (Ours::start(run.storage)?, Theirs::start(run.storage)?);
    for pins in run.pick(&[0, 1, 64], &[64]) {
        waits(run, &mut sides, "truncate_wait_with_drain", Goal::None, *pins)?;
    }
    let _at_once = BreakTime::set(NO_TIME)?;
    for pins in run.pick(&[1, 64, MANY], &[1, 64]) {
        waits(run, &mut sides, "truncate_wait", Goal::AtMost(2.0), *pins)?;
    }
    Ok(())
}

fn waits(
    run: &mut Run<'_>,
    (ours, theirs): &mut (Ours, Theirs),
    name: &str,
    goal: Goal,
    pins: u64,
) -> Result<()> {
    let rounds = if pins < MANY { run.rounds } else { run.rounds.min(ROUNDS_OF_MANY) };
    let pairs = alternate(rounds, || ours.time(pins).map(ms), || theirs.time(pins).map(ms))?;
    run.add(format!("{name}/{pins}"), PEER, "ms", &pairs, goal);
    Ok(())
}

/// One truncate of a file with [`MOST`] pins. Theirs goes first: its regions are gone by then.
pub(crate) fn run_once(run: &mut Run<'_>, file: &Path) -> Result<()> {
    let _at_once = BreakTime::set(NO_TIME)?;
    let theirs = ms(Theirs::start(run.storage)?.time(MOST)?);
    let mut pairs = Pairs::default();
    pairs.add(ms(truncate(file)?), theirs);
    run.add(format!("truncate_wait/{MOST}"), PEER, "ms", &pairs, Goal::AtMost(2.0));
    Ok(())
}

fn ms(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

fn length(pins: u64) -> u64 {
    pins.clamp(1, MANY) * PAGE
}

/// By this process, which holds nothing of the file.
fn truncate(path: &Path) -> Result<Duration> {
    let failed = || format!("cannot truncate {}", path.display());
    let started = Instant::now();
    let file = OpenOptions::new().write(true).open(path).with_context(failed)?;
    file.set_len(0).with_context(failed)?;
    Ok(started.elapsed())
}

impl Ours {
    fn start(storage: &Storage) -> Result<Self> {
        let runtime = several_threads()?;
        let session = Arc::new(runtime.block_on(storage.connect())?);
        Ok(Self { session, runtime, file: storage.path(NAME) })
    }

    fn time(&mut self, pins: u64) -> Result<Duration> {
        let held = self.runtime.block_on(async {
            self.session.create(EXPORT, NAME, length(pins), IfExists::Resize).await?;
            pin_pages(&self.session, NAME, pins).await
        })?;
        let took = truncate(&self.file)?;
        drop(held);
        Ok(took)
    }
}

impl Theirs {
    fn start(storage: &Storage) -> Result<Self> {
        let file = storage.foreign_file("held", PAGE as usize)?;
        let arguments = ["hold", &storage.places.device, text(&file)?];
        let mut holder = Peer::start(&storage.peer("guards"), &arguments)?;
        holder.hear("ready")?;
        Ok(Self { holder, file })
    }

    fn time(&mut self, pins: u64) -> Result<Duration> {
        fs::write(&self.file, vec![0; length(pins) as usize])?;
        fs::File::open(&self.file)?.sync_all()?;
        if pins == 0 {
            return truncate(&self.file);
        }
        self.holder.say(&format!("hold {} {pins}", length(pins)))?;
        self.holder.hear("held")?;
        let took = truncate(&self.file)?;
        self.holder.hear("gone")?;
        Ok(took)
    }
}

impl BreakTime {
    fn set(seconds: &str) -> Result<Self> {
        let before = fs::read_to_string(SETTING).context(SETTING)?;
        let denied = || format!("cannot set {SETTING} for a moment: the bench must be root");
        fs::write(SETTING, seconds).with_context(denied)?;
        Ok(Self(before))
    }
}

impl Drop for BreakTime {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SETTING, &self.0) {
            eprintln!("{SETTING} was {} and is {NO_TIME} now: {error}", self.0.trim());
        }
    }
}
