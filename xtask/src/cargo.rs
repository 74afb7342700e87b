//! Runs cargo: the steps of CI, and the builds that the lab needs.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::libtest::{self, Tally};
use crate::{paths, signals};

/// What the lab's tests and the demo start, with the breaker, which does to files what the hazard
/// table is about. The whole workspace: without this crate what is shared would have other features
/// than in `cargo test`, and be compiled twice.
const PROGRAMS: [&str; 6] = ["build", "--workspace", "--bins", "--locked", "--example", "breaker"];
/// With the tests, in one go: built apart, the two would differ in features of what they share,
/// which would then be compiled twice.
const TESTS: [&str; 2] = ["--tests", "--message-format=json-render-diagnostics"];

/// Test files of this name need what the lab has, whichever package they are of.
const IN_THE_LAB: &str = "in_the_lab_";
/// Test files of this name are about the kernel: they run on each, whichever package they are of.
pub(crate) const ON_EACH_KERNEL: &str = "on_each_kernel_";

/// A test binary of the lab.
#[derive(Clone, Debug)]
pub(crate) struct TestBinary {
    /// The name of its file in `lab/tests/`, without `.rs`.
    pub(crate) name: String,
    /// Where cargo put it.
    pub(crate) path: PathBuf,
}

/// Runs cargo to its end, on our own streams.
pub(crate) fn run<S: AsRef<OsStr>>(args: &[S], variables: &[(&str, &str)]) -> Result<()> {
    let mut command = command(args);
    command.envs(variables.iter().copied());
    let mut child = signals::unblocked(|| command.spawn())?.context("cargo did not start")?;
    let status = child.wait()?;
    ensure!(status.success(), "{} ended with {status}", shown(args));
    Ok(())
}

/// Runs tests, passes their output on, and counts.
pub(crate) fn test<S: AsRef<OsStr>>(args: &[S]) -> Result<Tally> {
    let mut command = command(args);
    command.stdout(Stdio::piped());
    let mut child = signals::unblocked(|| command.spawn())?.context("cargo did not start")?;
    let mut tally = Tally::default();
    for line in lines(&mut child)? {
        println!("{line}");
        tally += libtest::result(&line).unwrap_or_default();
    }
    let status = child.wait()?;
    ensure!(status.success(), "{} ended with {status}; {tally}", shown(args));
    Ok(tally)
}

/// Builds `pinfoldd`, `pinfold` and the lab's own programs; gives their folder.
pub(crate) fn programs() -> Result<PathBuf> {
    run(&PROGRAMS, &[])?;
    Ok(paths::target_dir()?.join("debug"))
}

/// Builds what is measured as it is shipped, optimised; gives its folder.
pub(crate) fn bench_programs() -> Result<PathBuf> {
    run(
        &[
            "build",
            "--release",
            "--bins",
            "--locked",
            "-p",
            "pinfold-bench",
            "-p",
            "pinfold-server",
        ],
        &[],
    )?;
    Ok(paths::target_dir()?.join("release"))
}

/// Builds a `pinfoldd` that makes mistakes on purpose, and the lab's program that has calls fail, and
/// puts them aside, into a folder of their own, which is returned. What [`programs`] builds must be built
/// after that.
pub(crate) fn mutants() -> Result<PathBuf> {
    const BINS: [&str; 4] = ["--bin", "pinfoldd", "--bin", "faults"];
    // As many features of what is shared as in the other builds.
    let features = ["--features", "pinfold-server/mutants,pinfold-lab/mutants"];
    let only = |argument: &&str| *argument != "--bins";
    let args: Vec<&str> = PROGRAMS.into_iter().filter(only).chain(BINS).chain(features).collect();
    run(&args, &[])?;
    let built = paths::target_dir()?.join("debug");
    let aside = built.join("mutants");
    fs::create_dir_all(&aside)?;
    for name in ["pinfoldd", "faults"] {
        fs::copy(built.join(name), aside.join(name))
            .with_context(|| format!("no {name} was built"))?;
    }
    Ok(aside)
}

/// Builds the same and the lab's tests; gives the programs' folder and the tests.
pub(crate) fn programs_and_lab_tests() -> Result<(PathBuf, Vec<TestBinary>)> {
    let args = [&PROGRAMS[..], &TESTS[..]].concat();
    let mut command = command(&args);
    command.stdout(Stdio::piped());
    let mut child = signals::unblocked(|| command.spawn())?.context("cargo did not start")?;
    let mut found: Vec<_> =
        lines(&mut child)?.filter_map(|line| test_binary(&line, paths::root())).collect();
    let status = child.wait()?;
    ensure!(status.success(), "{} ended with {status}", shown(&args));
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok((paths::target_dir()?.join("debug"), found))
}

/// An integration test for the lab in one of cargo's JSON messages: one of the package `lab`, or one that
/// lies with what it is about.
fn test_binary(message: &str, root: &Path) -> Option<TestBinary> {
    let message: Value = serde_json::from_str(message).ok()?;
    let target = message.get("target")?;
    let manifest = Path::new(message.get("manifest_path")?.as_str()?);
    let package = manifest.strip_prefix(root).ok()?.parent()?;
    let name = target.get("name")?.as_str()?.to_owned();
    let is_named_so = [IN_THE_LAB, ON_EACH_KERNEL].iter().any(|prefix| name.starts_with(prefix));
    let is_for_the_lab = package == Path::new("lab") || is_named_so;
    if !is_for_the_lab || target.get("kind")?.get(0)?.as_str()? != "test" {
        return None;
    }
    let path = message.get("executable")?.as_str()?.into();
    Some(TestBinary { name, path })
}

fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(paths::root());
    command
}

fn lines(child: &mut Child) -> Result<impl Iterator<Item = String> + use<>> {
    let stdout = child.stdout.take().context("cargo has no stdout")?;
    let lines = BufReader::new(stdout).split(b'\n').map_while(Result::ok);
    Ok(lines.map(|line| String::from_utf8_lossy(&line).into_owned()))
}

fn shown<S: AsRef<OsStr>>(args: &[S]) -> String {
    let words: Vec<_> = args.iter().map(|word| word.as_ref().to_string_lossy()).collect();
    format!("`cargo {}`", words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_integration_tests_of_the_lab_are_lab_tests() {
        let message = |folder: &str, kind: &str, name: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","executable":"/t/x-1",
                    "manifest_path":"{folder}/Cargo.toml",
                    "target":{{"kind":["{kind}"],"name":"{name}"}}}}"#
            )
        };
        let find = |message: &str| test_binary(message, Path::new("/c"));
        let found = find(&message("/c/lab", "test", "truncate")).unwrap();
        assert_eq!((found.name.as_str(), found.path), ("truncate", PathBuf::from("/t/x-1")));
        assert!(find(&message("/c/lab", "lib", "truncate")).is_none());
        assert!(find(&message("/c/verbs", "test", "truncate")).is_none());
        assert!(find(&message("/c/leases", "test", "on_each_kernel_x")).is_some());
        assert!(find(&message("/c/verbs", "test", "in_the_lab_x")).is_some());
        assert!(find(&message("/other/lab", "test", "truncate")).is_none());
        assert!(find(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
