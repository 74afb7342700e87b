//! What CI does, step by step, and the same steps one by one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::libtest::Tally;
use crate::vm::Options;
use crate::{cargo, crash, faults, setup, test, torture};

/// A lab run with all of its tests, on an emulated and busy machine.
pub(crate) const LAB_LIMIT: Duration = Duration::from_secs(1800);

/// A step by its name; it gives the tests that it counted.
type Step<'a> = (&'static str, Box<dyn FnOnce() -> Result<Tally> + 'a>);

/// All of CI. Stops at the first step that fails.
pub(crate) fn test(options: &Options) -> Result<Tally> {
    run(ci(options))
}

/// All of CI, and what takes too long for it.
pub(crate) fn test_full(options: &Options) -> Result<Tally> {
    let mut steps = ci(options);
    steps.push(("all kernels", Box::new(|| test::run_too_long(options, LAB_LIMIT))));
    steps.push(("all faults", Box::new(|| faults::run(options))));
    steps.push(("torture for long", Box::new(|| torture::run_long(options))));
    run(steps)
}

fn ci(options: &Options) -> Vec<Step<'_>> {
    vec![
        ("setup", Box::new(|| untested(setup::run(true)))),
        ("format", Box::new(|| untested(format()))),
        ("clippy", Box::new(|| untested(clippy()))),
        ("docs", Box::new(|| untested(docs()))),
        ("test", Box::new(|| cargo::test(&["test", "--locked", "--no-fail-fast"]))),
        ("lab", Box::new(|| test::run(options, None, LAB_LIMIT))),
        ("torture", Box::new(|| torture::run_in_ci(options))),
        ("faults", Box::new(|| faults::run_in_ci(options))),
        ("crash", Box::new(|| crash::run_in_ci(options))),
    ]
}

fn run(steps: Vec<Step<'_>>) -> Result<Tally> {
    let mut sum = Tally::default();
    let mut table = Vec::new();
    for (name, step) in steps {
        println!("== {name}");
        let began = Instant::now();
        let tally = step().with_context(|| format!("step {name} failed"))?;
        let row = format!("== {name}: {:.0} s", began.elapsed().as_secs_f32());
        println!("{row}");
        table.push(row);
        sum += tally;
    }
    println!("\n{}", table.join("\n"));
    Ok(sum)
}

/// Format and clippy.
pub(crate) fn lint() -> Result<()> {
    format()?;
    clippy()
}

/// The programs and all else that is built.
pub(crate) fn build() -> Result<()> {
    cargo::run(&["build", "--workspace", "--all-targets", "--locked"], &[])
}

/// The reference of every crate; a broken link is an error.
pub(crate) fn docs() -> Result<()> {
    let args = ["doc", "--workspace", "--no-deps", "--locked"];
    cargo::run(&args, &[("RUSTDOCFLAGS", "-D warnings")])
}

fn format() -> Result<()> {
    cargo::run(&["fmt", "--all", "--check"], &[])
}

fn clippy() -> Result<()> {
    let args = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    cargo::run(&args, &[])
}

fn untested(done: Result<()>) -> Result<Tally> {
    done.map(|()| Tally::default())
}
