//! `vm test`: runs the lab's test binaries in one guest, and sums up what they say.

use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{self, TestBinary};
use crate::kernel::Suite;
use crate::libtest::{LAB_LINE, Report, Tally};
use crate::vm::{self, End, Job, Options};
use crate::{paths, setup};

/// Tests in files of this name make sense on Debian 12's kernel only: what it lacks.
const ON_BOOKWORM: &str = "on_bookworm_";

/// What runs a second time across two hosts: the main job, whose bytes must cross a wire.
const ACROSS_HOSTS: [&str; 5] =
    ["dead_keys", "one_sided_writes", "second_life", "stream_path", "truncate_during_writes"];

/// A test binary with what of it to run.
#[derive(Clone)]
struct Selected {
    binary: TestBinary,
    /// None for all of its tests.
    filter: Option<String>,
}

impl Selected {
    /// The same tests under a name of their own.
    fn across_hosts(&self) -> Self {
        let name = format!("{}-across-two-hosts", self.binary.name);
        Self { binary: TestBinary { name, ..self.binary.clone() }, filter: self.filter.clone() }
    }
}

/// Builds, boots (once for most tests, once for those across two hosts, once for those on Debian
/// 12's kernel), runs, sums up.
pub(crate) fn run(options: &Options, filter: Option<&str>, limit: Duration) -> Result<Tally> {
    setup::require_lab()?;
    let began = Instant::now();
    let (programs, binaries) = cargo::programs_and_lab_tests()?;
    println!("== lab: build: {:.0} s", began.elapsed().as_secs_f32());
    let (old, new): (Vec<Selected>, Vec<Selected>) =
        select(binaries, filter)?.into_iter().partition(|s| s.binary.name.starts_with(ON_BOOKWORM));
    ensure!(
        !(old.is_empty() && new.is_empty()),
        "no lab test matches; `ls lab/tests` shows the files"
    );
    let mut sum = Tally::default();
    let mut lines = Vec::new();
    let across: Vec<Selected> = new
        .iter()
        .filter(|selected| ACROSS_HOSTS.contains(&selected.binary.name.as_str()))
        .map(Selected::across_hosts)
        .collect();
    let on_bookworm = Options { kernel: Suite::Bookworm, ..options.clone() };
    let two_hosts = Options { hosts: 2, ..options.clone() };
    for (options, selected) in [(options, new), (&two_hosts, across), (&on_bookworm, old)] {
        if selected.is_empty() {
            continue;
        }
        let script = script(&selected, &programs.to_string_lossy());
        let report = boot(options, script, limit)?;
        let names: Vec<_> = selected.into_iter().map(|selected| selected.binary.name).collect();
        let (tally, table) = report.sum(&names);
        sum += tally;
        lines.extend(table);
    }
    for line in lines {
        println!("{line}");
    }
    ensure!(sum != Tally::default(), "the lab's tests ran, but there was none in them");
    Ok(sum)
}

fn boot(options: &Options, script: String, limit: Duration) -> Result<Report> {
    let (sender, output) = mpsc::channel();
    let reader = thread::spawn(|| read(output));
    let argv = ["sh", "-c", &script].map(Into::into).to_vec();
    let end = vm::run(options, &Job::Run(argv, limit), &Some(sender))?;
    if let End::Interrupted(signal) = end {
        bail!("interrupted by signal {signal}");
    }
    reader.join().ok().context("the reader of the guest's output panicked")
}

/// Reads until the session is over; a line may come in pieces.
fn read(output: Receiver<Vec<u8>>) -> Report {
    let began = Instant::now();
    let mut report = Report::default();
    let mut held = Vec::new();
    for bytes in output {
        held.extend(bytes);
        while let Some(end) = held.iter().position(|&byte| byte == b'\n') {
            let line: Vec<_> = held.drain(..=end).collect();
            report.line(String::from_utf8_lossy(&line).trim_end(), began.elapsed());
        }
    }
    report
}

/// A filter takes whole files by their name, or single tests by theirs.
fn select(binaries: Vec<TestBinary>, filter: Option<&str>) -> Result<Vec<Selected>> {
    let mut selected = Vec::new();
    for binary in binaries {
        let whole = filter.is_none_or(|filter| binary.name.contains(filter));
        let filter = filter.filter(|_| !whole).map(str::to_owned);
        if filter.as_deref().map_or(Ok(true), |filter| has_test(&binary, filter))? {
            selected.push(Selected { binary, filter });
        }
    }
    Ok(selected)
}

/// Listing runs no test, so it needs no guest.
fn has_test(binary: &TestBinary, filter: &str) -> Result<bool> {
    let output = Command::new(&binary.path)
        .args([filter, "--list", "--format=terse"])
        .output()
        .with_context(|| format!("{} did not start", binary.path.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|line| line.ends_with(": test")))
}

/// Each binary after the other: they share the guest's files, NIC and kernel settings.
fn script(selected: &[Selected], programs: &str) -> String {
    let lab = paths::root().join("lab");
    let mut script = format!(
        "cd {} || exit 126\nexport PINFOLD_BIN_DIR={}\nfailed=0\n",
        vm::quoted(&lab.to_string_lossy()),
        vm::quoted(programs)
    );
    for Selected { binary, filter } in selected {
        let name = &binary.name;
        let path = vm::quoted(&binary.path.to_string_lossy());
        let filter = filter.as_deref().map(vm::quoted).unwrap_or_default();
        script += &format!(
            "echo '{LAB_LINE}{name}'\n{path} --test-threads=1 {filter}\nstatus=$?\n\
             echo \"{LAB_LINE}{name} ended $status\"\n[ $status = 0 ] || failed=1\n"
        );
    }
    script + "exit $failed\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(name: &str) -> TestBinary {
        TestBinary { name: name.to_owned(), path: "/t/x y".into() }
    }

    #[test]
    fn a_file_name_selects_all_of_its_tests() {
        let binaries = vec![binary("truncate")];
        let selected = select(binaries, Some("trunc")).unwrap();
        assert_eq!(selected.len(), 1);
        assert!(selected[0].filter.is_none());
    }

    #[test]
    fn the_script_survives_odd_paths_and_goes_on_after_a_failure() {
        let selected = [Selected { binary: binary("a"), filter: Some("it's".to_owned()) }];
        let script = script(&selected, "/t/debug");
        assert!(script.contains(r"'/t/x y' --test-threads=1 'it'\''s'"), "{script}");
        assert!(script.ends_with("exit $failed\n"));
    }
}
