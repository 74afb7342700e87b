//! What a write costs its program, in instructions beside C's: callgrind counts them, so the machine's noise has
//! no part in it, nor has what the kernel does. How many of the writes sleep differs a little from run to run, and
//! with it what a sleep costs in user space.

use std::io::stdin;
use std::path::Path;

use anyhow::{Context, Result};

use crate::Run;
use crate::job::{Job, KIB, What};
use crate::one_sided::{How, Ours, Theirs, one_thread};
use crate::peer::Peer;
use crate::place::{Places, Storage};
use crate::report::Goal;
use crate::statistics::Pairs;

/// What is counted is what the second takes more than the first: starting and connecting are in both.
const COUNTS: [u64; 2] = [160, 1760];

const PEER: &str = "C on libibverbs; both counted by callgrind, in user space only";

/// One at a time, and many.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let jobs = [
        ("write_instructions/8 B", Job::latency(What::Write, 8)),
        ("write_instructions_pipelined/4 KiB", Job::bandwidth(What::Write, 4 * KIB)),
    ];
    for &(name, job) in run.pick(&jobs, &jobs[1..]) {
        let mut pairs = Pairs::default();
        let ours = each(run.storage, job, ours)?;
        pairs.add(ours, each(run.storage, job, in_c)?);
        run.add(name.to_owned(), PEER, "instructions", &pairs, Goal::None);
    }
    Ok(())
}

/// Does what it is told on the standard input, until that ends: with the library, in a runtime of one thread.
pub(crate) fn obey(places: &Places, url: &str) -> Result<()> {
    let mut ours = Ours::connect(url, &places.device, one_thread()?, "obedient")?;
    println!("ready");
    for line in stdin().lines() {
        let line = line?;
        let job = Job::from_line(&line).with_context(|| format!("what is `{line}`?"))?;
        println!("took {}", ours.time(job)?.as_nanos());
    }
    Ok(())
}

/// Instructions per transfer.
fn each(
    storage: &Storage,
    job: Job,
    run: impl Fn(&Storage, Job, &Path) -> Result<()>,
) -> Result<f64> {
    let count = |count| {
        let log = tempfile::NamedTempFile::new_in(&storage.places.tmpfs)?;
        run(storage, job.times(count), log.path())?;
        let text = std::fs::read_to_string(log.path())?;
        collected(&text).with_context(|| format!("callgrind counted nothing:\n{text}"))
    };
    let [fewer, more] = [count(COUNTS[0])?, count(COUNTS[1])?];
    Ok((more - fewer) / (COUNTS[1] - COUNTS[0]) as f64)
}

fn ours(storage: &Storage, job: Job, log: &Path) -> Result<()> {
    let program = std::env::current_exe().context("where is this program?")?;
    let Places { dax, device, address, peers, .. } = &storage.places;
    let address = address.to_string();
    let arguments = ["--obey", storage.url(), "--device", device, "--address", &address];
    let [dax, peers] = [dax, peers].map(|path| path.display().to_string());
    let arguments = [&arguments[..], &["--dax", &dax, "--peers", &peers]].concat();
    let mut peer = counted(storage, log, &program, &arguments)?;
    peer.hear("ready")?;
    peer.time(&job.line())?;
    peer.end()
}

fn in_c(storage: &Storage, job: Job, log: &Path) -> Result<()> {
    let start = |program: &Path, arguments: &[&str]| counted(storage, log, program, arguments);
    let mut theirs = Theirs::start_by(storage, "counted", &[], start)?;
    theirs.time(job, How::Asleep)?;
    theirs.end()
}

fn counted(storage: &Storage, log: &Path, program: &Path, arguments: &[&str]) -> Result<Peer> {
    let log = format!("--log-file={}", log.display());
    let program = program.display().to_string();
    let counting = ["--tool=callgrind", "--callgrind-out-file=/dev/null", &log, &program];
    let temporary = [("TMPDIR", storage.places.tmpfs.as_path())];
    Peer::start_with(Path::new("valgrind"), &[&counting[..], arguments].concat(), temporary)
}

/// Of callgrind's last words.
fn collected(log: &str) -> Option<f64> {
    log.lines().find_map(|line| line.split_once("Collected :")?.1.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found() {
        let log = "==7== Events    : Ir\n==7== Collected : 2576478\n==7== \n";
        assert_eq!(collected(log), Some(2_576_478.0));
        assert_eq!(collected("==7== Process terminating"), None);
    }
}
