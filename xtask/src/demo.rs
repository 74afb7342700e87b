//! `demo`: from a fresh clone to Pinfold at work in the lab, in one command.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::Result;

use crate::vm::{self, End, Job, Options};
use crate::{cargo, setup};

/// The demo takes a minute; an emulated and busy machine more.
const LIMIT: Duration = Duration::from_secs(600);

/// Installs what is missing, builds, and runs the lab's program `demo` in a guest.
pub(crate) fn run(options: &Options) -> Result<End> {
    setup::run(false)?;
    eprintln!("demo: building");
    let programs = cargo::programs()?;
    let mut bin_dir = OsString::from("PINFOLD_BIN_DIR=");
    bin_dir.push(&programs);
    let argv = vec!["env".into(), bin_dir, programs.join("demo").into_os_string()];
    vm::run(options, &Job::Run(argv, LIMIT), &None)
}
