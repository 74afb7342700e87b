//! `vm test`: runs the lab's test binaries in one guest, and sums up what they say.

use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cargo::{self, ON_EACH_KERNEL, TestBinary};
use crate::kernel::Suite;
use crate::libtest::{LAB_LINE, Report, Tally};
use crate::vm::{self, End, Job, Options};
use crate::{paths, setup};

/// Tests in files of this name make sense on Debian 12's kernel only: what it lacks.
const ON_BOOKWORM: &str = "on_bookworm_";

/// Tests in files of this name run on the newer rdma-core, and so do the programs that they start.
const ON_NEWER_RDMA_CORE: &str = "on_newer_rdma_core_";

/// Tests in files of this name are about the wire between two hosts.
const ONLY_ACROSS_HOSTS: &str = "across_hosts_";

/// Too long for CI on the kernel between the newest and the oldest: there it is of `make test-full`, and
/// of who asks for it by name.
const TOO_LONG_ON_TRIXIE: &str = "on_each_kernel_hazards";

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
    fn named(&self, suffix: &str) -> Self {
        let name = format!("{}-{suffix}", self.binary.name);
        Self { binary: TestBinary { name, ..self.binary.clone() }, filter: self.filter.clone() }
    }

    fn is(&self, prefix: &str) -> bool {
        self.binary.name.starts_with(prefix)
    }
}

/// One boot: its guest, and what runs there.
struct Plan {
    options: Options,
    selected: Vec<Selected>,
}

/// Builds, boots (once for most tests, once for those across two hosts, and once for each older
/// kernel), runs, sums up.
pub(crate) fn run(options: &Options, filter: Option<&str>, limit: Duration) -> Result<Tally> {
    let (programs, binaries) = build()?;
    let mut plans = plans(options, select(binaries, filter)?);
    if filter.is_none() && options.kernel != Suite::Trixie {
        leave_out_on_trixie(&mut plans);
    }
    ensure!(!plans.is_empty(), "no lab test matches; `ls lab/tests` shows the files");
    let mut sum = Tally::default();
    let mut lines = Vec::new();
    for Plan { options, selected } in plans {
        let (report, _) = boot(&options, script(&selected, &programs), limit)?;
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

/// Runs one test file and gives the lines that it printed, if it passed.
pub(crate) fn collect(options: &Options, name: &str, limit: Duration) -> Result<Vec<String>> {
    let (programs, binaries) = build()?;
    let binary = binaries.into_iter().find(|binary| binary.name == name);
    let binary = binary.with_context(|| format!("there is no lab/tests/{name}.rs"))?;
    let selected = [Selected { binary, filter: None }];
    let script = format!("export PINFOLD_HAZARDS=print\n{}", script(&selected, &programs));
    let (report, lines) = boot(options, script, limit)?;
    let (tally, _) = report.sum(&[name.to_owned()]);
    ensure!(tally.failed == 0 && tally.passed > 0, "{name} on {}: {tally}", options.kernel);
    Ok(lines)
}

/// Gives the programs' folder, and the tests.
fn build() -> Result<(String, Vec<TestBinary>)> {
    setup::require_lab()?;
    let began = Instant::now();
    let (programs, binaries) = cargo::programs_and_lab_tests()?;
    println!("== lab: build: {:.0} s", began.elapsed().as_secs_f32());
    Ok((programs.to_string_lossy().into_owned(), binaries))
}

/// Which tests run in which guest.
fn plans(options: &Options, selected: Vec<Selected>) -> Vec<Plan> {
    let (on_bookworm, rest): (Vec<_>, Vec<_>) =
        selected.into_iter().partition(|selected| selected.is(ON_BOOKWORM));
    let (on_each, main): (Vec<_>, Vec<_>) =
        rest.into_iter().partition(|selected| selected.is(ON_EACH_KERNEL));
    let (only_across, main): (Vec<_>, Vec<_>) =
        main.into_iter().partition(|selected| selected.is(ONLY_ACROSS_HOSTS));
    let across = main
        .iter()
        .filter(|selected| ACROSS_HOSTS.contains(&selected.binary.name.as_str()))
        .map(|selected| selected.named("across-two-hosts"))
        .chain(only_across)
        .collect();
    let older = |suite: Suite| -> Vec<_> {
        let is_other = options.kernel != suite;
        on_each.iter().filter(|_| is_other).map(|each| each.named(&suite.to_string())).collect()
    };
    let on = |kernel| Options { kernel, ..options.clone() };
    let mut plans = vec![
        Plan { options: options.clone(), selected: [main, on_each.clone()].concat() },
        Plan { options: Options { hosts: 2, ..options.clone() }, selected: across },
        Plan { options: on(Suite::Trixie), selected: older(Suite::Trixie) },
        Plan {
            options: on(Suite::Bookworm),
            selected: [on_bookworm, older(Suite::Bookworm)].concat(),
        },
    ];
    plans.retain(|plan| !plan.selected.is_empty());
    plans
}

fn leave_out_on_trixie(plans: &mut Vec<Plan>) {
    for plan in plans.iter_mut().filter(|plan| plan.options.kernel == Suite::Trixie) {
        plan.selected.retain(|selected| !selected.is(TOO_LONG_ON_TRIXIE));
    }
    plans.retain(|plan| !plan.selected.is_empty());
}

/// As [`run`], what it leaves out when nothing is named.
pub(crate) fn run_too_long(options: &Options, limit: Duration) -> Result<Tally> {
    let options = Options { kernel: Suite::Trixie, ..options.clone() };
    run(&options, Some(TOO_LONG_ON_TRIXIE), limit)
}

/// Gives what the tests reported, and every line of the guest.
fn boot(options: &Options, script: String, limit: Duration) -> Result<(Report, Vec<String>)> {
    let (sender, output) = mpsc::channel();
    let reader = thread::spawn(|| read(output));
    let argv = ["sh", "-c", &script].map(Into::into).to_vec();
    let end = vm::run(options, &Job::Run(argv, limit), &Some(sender))?;
    if let End::Interrupted(signal) = end {
        bail!("interrupted by signal {signal}");
    }
    reader.join().ok().context("the reader of the guest's output panicked")
}

/// Reads until the session is over.
fn read(output: Receiver<Vec<u8>>) -> (Report, Vec<String>) {
    let began = Instant::now();
    let (mut report, mut lines) = (Report::default(), Vec::new());
    vm::each_line(output, |line| {
        report.line(&line, began.elapsed());
        lines.push(line);
    });
    (report, lines)
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

/// Each binary after the other: they share the guest's files, NIC and kernel settings. What a plain
/// `cargo test` must ignore runs here.
fn script(selected: &[Selected], programs: &str) -> String {
    let lab = paths::root().join("lab");
    let mut script = format!(
        "cd {} || exit 126\nexport PINFOLD_BIN_DIR={}\nfailed=0\n",
        vm::quoted(&lab.to_string_lossy()),
        vm::quoted(programs)
    );
    for selected in selected {
        let prefix = if selected.is(ON_NEWER_RDMA_CORE) { "newer-rdma-core " } else { "" };
        let Selected { binary, filter } = selected;
        let name = &binary.name;
        let path = vm::quoted(&binary.path.to_string_lossy());
        let filter = filter.as_deref().map(vm::quoted).unwrap_or_default();
        script += &format!(
            "echo '{LAB_LINE}{name}'\n{prefix}{path} --test-threads=1 --include-ignored {filter}\nstatus=$?\n\
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

    fn planned(names: &[&str]) -> Vec<(Suite, u8, Vec<String>)> {
        let options = Options {
            kernel: Suite::Newest,
            fs_size: 384,
            lease_break_time: 10,
            hosts: 1,
            kept: None,
        };
        let selected =
            names.iter().map(|name| Selected { binary: binary(name), filter: None }).collect();
        plans(&options, selected)
            .into_iter()
            .map(|plan| {
                let names = plan.selected.into_iter().map(|selected| selected.binary.name);
                (plan.options.kernel, plan.options.hosts, names.collect())
            })
            .collect()
    }

    #[test]
    fn what_is_about_the_kernel_runs_last_and_on_each() {
        let names = ["across_hosts_z", "dead_keys", "on_bookworm_x", "on_each_kernel_y", "sizes"];
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        assert_eq!(
            planned(&names),
            [
                (Suite::Newest, 1, words(&["dead_keys", "sizes", "on_each_kernel_y"])),
                (Suite::Newest, 2, words(&["dead_keys-across-two-hosts", "across_hosts_z"])),
                (Suite::Trixie, 1, words(&["on_each_kernel_y-trixie"])),
                (Suite::Bookworm, 1, words(&["on_bookworm_x", "on_each_kernel_y-bookworm"])),
            ]
        );
        assert_eq!(planned(&["sizes"]), [(Suite::Newest, 1, words(&["sizes"]))]);
    }

    #[test]
    fn what_needs_a_newer_rdma_core_is_started_on_it() {
        let selected = ["on_newer_rdma_core_x", "sizes"]
            .map(|name| Selected { binary: binary(name), filter: None });
        let script = script(&selected, "/t/debug");
        assert_eq!(script.matches("\nnewer-rdma-core '/t/x y' --test").count(), 1, "{script}");
        assert_eq!(script.matches("\n'/t/x y' --test").count(), 1, "{script}");
    }

    #[test]
    fn the_script_survives_odd_paths_and_goes_on_after_a_failure() {
        let selected = [Selected { binary: binary("a"), filter: Some("it's".to_owned()) }];
        let script = script(&selected, "/t/debug");
        assert!(
            script.contains(r"'/t/x y' --test-threads=1 --include-ignored 'it'\''s'"),
            "{script}"
        );
        assert!(script.ends_with("exit $failed\n"));
    }
}
