//! `bench`: measures in the lab, and keeps what was measured.

use std::ffi::OsString;
use std::fs;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::vm::{self, End, Job, Options};
use crate::{cargo, paths};

/// The fence's bench takes half a minute; an emulated and busy machine more.
const LIMIT: Duration = Duration::from_secs(600);

/// Builds, runs a bench in a guest, and writes its JSON to `target/bench/`.
pub(crate) fn run(options: &Options, bench: &str, arguments: &[OsString]) -> Result<End> {
    let programs = cargo::programs()?;
    let program = programs.join("pinfold-bench").into_os_string();
    let argv = [program, bench.into()].into_iter().chain(arguments.iter().cloned()).collect();
    let (output, printed) = mpsc::channel();
    let end = vm::run(options, &Job::Run(argv, LIMIT), &Some(output))?;
    if matches!(end, End::Exit(0)) {
        let json: Vec<u8> = printed.try_iter().flatten().collect();
        let folder = paths::target_dir()?.join("bench");
        fs::create_dir_all(&folder)?;
        let path = folder.join(bench).with_extension("json");
        fs::write(&path, json).with_context(|| format!("cannot write {}", path.display()))?;
        eprintln!("written to {}", path.display());
    }
    Ok(end)
}
