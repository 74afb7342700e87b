//! The developer's tasks: `cargo xtask --help` names them.
#![forbid(unsafe_code)]

mod bench;
mod cargo;
mod console;
mod crash;
mod debian;
mod demo;
mod faults;
mod hazards;
mod initramfs;
mod kernel;
mod kvm;
mod libtest;
mod mirror;
mod mounts;
mod paths;
mod plot;
mod qemu;
mod rdma_core;
mod setup;
mod signals;
mod steps;
mod terminal;
mod test;
mod torture;
mod vm;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};

use kernel::{Kernel, Suite};
use libtest::Tally;
use vm::{End, Job};

/// The lab itself failed, not what ran in it.
const LAB_FAILED: u8 = 125;

/// Starts the developer's tasks.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that building and the lab need
    #[command(after_help = "Example:\n  cargo xtask setup --yes")]
    Setup {
        /// Don't ask
        #[arg(long)]
        yes: bool,
    },
    /// Build everything
    #[command(after_help = "Example:\n  cargo xtask build")]
    Build,
    /// All of CI: setup, format, clippy, docs, tests, the lab's tests, the torture rig, power cuts
    #[command(after_help = "Example:\n  cargo xtask test --kernel trixie")]
    Test {
        #[command(flatten)]
        options: vm::Options,
    },
    /// The same, and the torture rig for ten minutes on each file system, whose result is written down in docs/results
    #[command(after_help = "Example:\n  cargo xtask test-full")]
    TestFull {
        #[command(flatten)]
        options: vm::Options,
    },
    /// Format and clippy only
    #[command(after_help = "Example:\n  cargo xtask lint")]
    Lint,
    /// The reference of every crate
    #[command(after_help = "Example:\n  cargo xtask docs")]
    Docs,
    /// Install, build, and show Pinfold at work in a guest
    #[command(after_help = "Example:\n  cargo xtask demo")]
    Demo {
        #[command(flatten)]
        options: vm::Options,
    },
    /// The same on this machine's own file system: no RDMA, no guest, in seconds
    #[command(after_help = "Example:\n  cargo xtask demo-local")]
    DemoLocal,
    /// Leave the lab open: pinfoldd runs on DAX, and three commands to type are on the screen
    #[command(after_help = "Example:\n  cargo xtask try")]
    Try {
        #[command(flatten)]
        options: vm::Options,
    },
    /// Measure in the lab, side by side with what it is compared with; a full run's JSON goes to
    /// docs/performance, any other's to target/bench
    #[command(after_help = "Example:\n  cargo xtask bench --quick one-sided")]
    Bench {
        #[command(flatten)]
        options: vm::Options,
        #[command(flatten)]
        wishes: bench::Wishes,
    },
    /// Run the hazard table on every kernel, and write it down in docs/
    #[command(after_help = "Example:\n  cargo xtask hazards && git diff docs")]
    Hazards {
        #[command(flatten)]
        options: vm::Options,
        /// Run nothing: write the table again from docs/hazards.json
        #[arg(long)]
        only_table: bool,
    },
    /// The lab: a Debian kernel under QEMU with two DAX file systems and a soft NIC
    #[command(subcommand)]
    Vm(VmTask),
}

#[derive(Subcommand)]
enum VmTask {
    /// Run a command in a new guest and end with its status
    #[command(
        after_help = "Exit status: the command's own, 128+N if signal N ended it or us, 125 \
        if the VM failed or took too long.\n\
        The host's root is there, read-only; TMPDIR, $PINFOLD_LAB_EXT4 and $PINFOLD_LAB_XFS are \
        writable, $PINFOLD_LAB_DEVDAX is a DAX device; `newer-rdma-core COMMAND` runs it on rdma-core \
        56.\n\nExample:\n  \
        cargo xtask vm run -- sh -c 'uname -r; df $PINFOLD_LAB_XFS'"
    )]
    Run {
        #[command(flatten)]
        options: vm::Options,
        /// Seconds that the command may take
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        timeout: u64,
        /// The command and its arguments
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Run the lab's tests: most in one guest, those across two hosts and for older kernels in others
    #[command(after_help = "Exit status: 0 if all passed, 1 if not, or if nothing matched.\n\n\
        Example:\n  cargo xtask vm test truncate")]
    Test {
        #[command(flatten)]
        options: vm::Options,
        /// Seconds that all tests of a guest may take
        #[arg(long, value_name = "SECONDS", default_value_t = steps::LAB_LIMIT.as_secs())]
        timeout: u64,
        /// Part of the name of a file or of a test; without it, all
        filter: Option<String>,
    },
    /// Run the torture rig on both file systems: clients, local processes and accidents, at random
    #[command(after_help = "Exit status: 0 if nothing was found and every mutant was, else 1.\n\n\
        Example:\n  cargo xtask vm torture --seconds 60 --seed 4711")]
    Torture {
        #[command(flatten)]
        options: vm::Options,
        #[command(flatten)]
        wishes: torture::Wishes,
    },
    /// Cut the power of guests at work, and look in the next one for all that was acknowledged
    #[command(
        after_help = "Exit status: 0 if all was there and every mistake was noticed, else 1.\n\n\
        Example:\n  cargo xtask vm crash --on xfs --seed 4711"
    )]
    Crash {
        #[command(flatten)]
        options: vm::Options,
        #[command(flatten)]
        wishes: crash::Wishes,
    },
    /// Have each call to the kernel and to libibverbs fail once in a server
    #[command(
        after_help = "Exit status: 0 if nothing was left behind and every error told its file or \
        device, else 1.\n\nExample:\n  cargo xtask vm faults"
    )]
    Faults {
        #[command(flatten)]
        options: vm::Options,
    },
    /// Give a prompt in a new guest; leaving the shell ends it
    #[command(after_help = "Example:\n  cargo xtask vm shell --kernel bookworm")]
    Shell {
        #[command(flatten)]
        options: vm::Options,
    },
    /// Fill the cache with kernels and a newer rdma-core, so that later runs need no network
    #[command(after_help = "Example:\n  cargo xtask vm fetch --update newest")]
    Fetch {
        /// Look for newer versions of what is cached
        #[arg(long)]
        update: bool,
        /// Which kernels
        #[arg(value_enum, default_values_t = [Suite::Newest, Suite::Bookworm])]
        kernels: Vec<Suite>,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // `vm run` speaks for the command, so its own failures need a status of their own.
    let failure = match cli.task {
        Task::Vm(VmTask::Run { .. } | VmTask::Shell { .. }) => LAB_FAILED,
        _ => 1,
    };
    match signals::take_over().and_then(|()| run(cli.task)) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(failure)
        }
    }
}

fn run(task: Task) -> Result<u8> {
    match task {
        Task::Setup { yes } => setup::run(yes).map(|()| 0),
        Task::Build => steps::build().map(|()| 0),
        Task::Test { options } => Ok(verdict(steps::test(&options)?)),
        Task::TestFull { options } => Ok(verdict(steps::test_full(&options)?)),
        Task::Lint => steps::lint().map(|()| 0),
        Task::Docs => steps::docs().map(|()| 0),
        Task::Demo { options } => Ok(status(&demo::run(&options)?)),
        Task::DemoLocal => demo::run_local(),
        Task::Bench { options, wishes } => Ok(status(&bench::run(&options, &wishes)?)),
        Task::Hazards { only_table: true, .. } => hazards::write_table().map(|()| 0),
        Task::Hazards { options, .. } => hazards::run(&options, steps::LAB_LIMIT).map(|()| 0),
        Task::Try { options } => {
            ensure!(terminal::is_there(), "try needs a terminal; vm run needs none");
            Ok(status(&demo::run_try(&options)?))
        }
        Task::Vm(VmTask::Test { options, timeout, filter }) => {
            let limit = Duration::from_secs(timeout);
            Ok(verdict(test::run(&options, filter.as_deref(), limit)?))
        }
        Task::Vm(VmTask::Run { options, timeout, command }) => {
            let job = Job::Run(command, Duration::from_secs(timeout));
            Ok(status(&vm::run(&options, &job, &None)?))
        }
        Task::Vm(VmTask::Torture { options, wishes }) => {
            Ok(verdict(torture::run(&options, &wishes)?))
        }
        Task::Vm(VmTask::Faults { options }) => Ok(verdict(faults::run(&options)?)),
        Task::Vm(VmTask::Crash { options, wishes }) => Ok(verdict(crash::run(&options, &wishes)?)),
        Task::Vm(VmTask::Shell { options }) => {
            ensure!(terminal::is_there(), "vm shell needs a terminal; vm run needs none");
            Ok(status(&vm::run(&options, &Job::Terminal(vm::shell()), &None)?))
        }
        Task::Vm(VmTask::Fetch { update, kernels }) => {
            setup::require_lab()?;
            for suite in kernels {
                let kernel = if update { Kernel::update(suite)? } else { Kernel::get(suite)? };
                println!("{suite}: {}", kernel.release);
            }
            let rdma_core = if update { rdma_core::update()? } else { rdma_core::get()? };
            println!("rdma-core: {}", rdma_core.file_name().unwrap_or_default().display());
            Ok(0)
        }
    }
}

fn status(end: &End) -> u8 {
    match end {
        End::Exit(status) => *status,
        End::Lost { .. } => LAB_FAILED,
        End::PowerCut => LAB_FAILED,
        End::Interrupted(signal) => 128 + u8::try_from(*signal).unwrap_or(0),
    }
}

/// The last line of a test run.
fn verdict(tally: Tally) -> u8 {
    println!("{tally}");
    u8::from(tally.failed > 0)
}
