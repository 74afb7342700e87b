//! Runs cargo: the steps of CI, and the builds that the lab needs.

use std::env;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::libtest::{self, Tally};
use crate::paths;

/// Packages whose programs the lab's tests and the demo start.
const PROGRAMS: [&str; 6] =
    ["build", "--bins", "--locked", "-ppinfold-server", "-ppinfold-cli", "-ppinfold-lab"];

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
    let status = command.envs(variables.iter().copied()).status().context("cargo did not start")?;
    ensure!(status.success(), "{} ended with {status}", shown(args));
    Ok(())
}

/// Runs tests, passes their output on, and counts.
pub(crate) fn test<S: AsRef<OsStr>>(args: &[S]) -> Result<Tally> {
    let mut child = command(args).stdout(Stdio::piped()).spawn().context("cargo did not start")?;
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

/// Builds the lab's tests and finds them.
pub(crate) fn lab_tests() -> Result<Vec<TestBinary>> {
    let args = [
        "test",
        "--no-run",
        "--locked",
        "-ppinfold-lab",
        "--message-format=json-render-diagnostics",
    ];
    let mut child = command(&args).stdout(Stdio::piped()).spawn().context("cargo did not start")?;
    let mut found: Vec<_> = lines(&mut child)?.filter_map(|line| test_binary(&line)).collect();
    let status = child.wait()?;
    ensure!(status.success(), "{} ended with {status}", shown(&args));
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// An integration test in one of cargo's JSON messages.
fn test_binary(message: &str) -> Option<TestBinary> {
    let message: Value = serde_json::from_str(message).ok()?;
    let target = message.get("target")?;
    if target.get("kind")?.get(0)?.as_str()? != "test" {
        return None;
    }
    let name = target.get("name")?.as_str()?.to_owned();
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
    fn only_integration_tests_are_lab_tests() {
        let of_kind = |kind: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","executable":"/t/x-1",
                    "target":{{"kind":["{kind}"],"name":"truncate"}}}}"#
            )
        };
        let found = test_binary(&of_kind("test")).unwrap();
        assert_eq!((found.name.as_str(), found.path), ("truncate", PathBuf::from("/t/x-1")));
        assert!(test_binary(&of_kind("lib")).is_none());
        assert!(test_binary(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
