//! `vm faults`: each call to the kernel and to libibverbs fails once in a server, as it starts, serves and
//! goes down, and in its client.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::libtest::Tally;
use crate::vm::{self, Job, Options};
use crate::{cargo, setup};

/// Where, and whose calls: `lab/src/bin/faults.rs`.
const RUNS: [&str; 6] = [
    "ext4 verbs",
    "ext4 own-verbs",
    "ext4 start-leases",
    "xfs end-leases",
    "xfs end-verbs",
    "xfs leases",
];
/// The others take minutes. Their calls fail in the first two as well, or in `cargo test`, without a server
/// around them.
const IN_CI: usize = 4;
/// All of them, on an emulated and busy machine.
const LIMIT: Duration = Duration::from_secs(1200);

/// `vm faults`.
pub(crate) fn run(options: &Options) -> Result<Tally> {
    carry_out(options, &RUNS)
}

/// In CI: what takes seconds.
pub(crate) fn run_in_ci(options: &Options) -> Result<Tally> {
    carry_out(options, &RUNS[..IN_CI])
}

/// Builds, boots once, runs one after the other.
fn carry_out(options: &Options, runs: &[&str]) -> Result<Tally> {
    setup::require_lab()?;
    let folder = cargo::mutants()?.to_string_lossy().into_owned();
    let mut script = format!("failed=0\nexport PINFOLD_BIN_DIR={}\n", vm::quoted(&folder));
    for (number, run) in runs.iter().enumerate() {
        script += &format!(
            "PINFOLD_FAULTS=$TMPDIR/faults{number} \"$PINFOLD_BIN_DIR/faults\" {run} || \
             failed=$((failed + 1))\n"
        );
    }
    let argv = ["sh", "-c", &(script + "exit $failed\n")].map(Into::into).to_vec();
    let failed = vm::run(options, &Job::Run(argv, LIMIT), &None)?.status()?;
    ensure!(usize::from(failed) <= runs.len(), "the guest's shell ended with {failed}");
    let failed = u32::from(failed);
    Ok(Tally { passed: runs.len() as u32 - failed, failed })
}
