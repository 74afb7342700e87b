//! `demo`: from a fresh clone to Pinfold at work in the lab, in one command.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::vm::{self, End, Job, Options};
use crate::{cargo, setup, signals, terminal};

/// The demo takes a minute; an emulated and busy machine more.
const LIMIT: Duration = Duration::from_secs(600);

/// Installs what is missing, builds, and runs the lab's program `demo` in a guest.
pub(crate) fn run(options: &Options) -> Result<End> {
    setup::run(false)?;
    eprintln!("demo: building");
    let programs = cargo::programs()?;
    let mut bin_dir = OsString::from("PINFOLD_BIN_DIR=");
    bin_dir.push(&programs);
    let mut argv = vec!["env".into(), bin_dir, programs.join("demo").into_os_string()];
    argv.extend(screen().into_iter().map(OsString::from));
    vm::run(options, &Job::Run(argv, LIMIT), &None)
}

/// Installs what is missing, builds, and gives a prompt in a guest where `pinfoldd` runs.
pub(crate) fn run_try(options: &Options) -> Result<End> {
    setup::run(false)?;
    eprintln!("try: building");
    let programs = cargo::programs()?;
    let start = ["/bin/sh", "-c", include_str!("try.sh"), "sh"].map(OsString::from);
    let argv = start.into_iter().chain([programs.into_os_string()]).chain(vm::shell()).collect();
    vm::run(options, &Job::Terminal(argv), &None)
}

/// Builds, and runs the lab's program `demo-local` on this machine.
pub(crate) fn run_local() -> Result<u8> {
    setup::run_for_build(false)?;
    eprintln!("demo-local: building");
    let programs = cargo::programs()?;
    let mut demo = Command::new(programs.join("demo-local"));
    demo.args(screen()).env("PINFOLD_BIN_DIR", &programs);
    let mut demo = signals::unblocked(|| demo.spawn())?.context("demo-local did not start")?;
    let status = demo.wait()?;
    Ok(if status.success() { 0 } else { 1 })
}

/// What the program can't see from inside the guest: whether its output ends at a terminal.
fn screen() -> Vec<String> {
    if !std::io::stdout().is_terminal() {
        return Vec::new();
    }
    let (_, columns) = terminal::size();
    let mut args = vec!["--width".to_owned(), columns.to_string()];
    // https://no-color.org
    if std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) {
        args.push("--colour".to_owned());
    }
    args
}
