//! The command `pinfold`: arguments, exit codes and nothing else; one file per subcommand.
#![forbid(unsafe_code)]

mod args;
mod doctor;
mod exit;
mod failure;
mod generate;
mod get;
mod holes;
mod interrupt;
mod list;
mod many;
mod operate;
mod partial;
mod pin;
mod ps;
mod put;
mod remove;
mod resize;
mod same;
mod size;
mod stamp;
mod stat;
mod table;
mod taken_back;
mod terminal;
mod transfer;
mod tree;
mod watch;
mod work;

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // `eprint!` would panic where nobody can be told.
            let _ = write!(std::io::stderr(), "{}", failure.report());
            failure.exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|error| Failure::local("cannot start the runtime", error))?;
    let Cli { connection, command } = cli;
    let outcome = runtime.block_on(async {
        match command {
            Command::Put(args) => put::run(connection, args).await,
            Command::Get(args) => get::run(connection, args).await,
            Command::Ls(args) => list::run(connection, args).await,
            Command::Stat(args) => stat::run(connection, args).await,
            Command::Pin(args) => pin::run(connection, args).await,
            Command::Ps(args) => ps::run(connection, args).await,
            Command::Watch(args) => watch::run(connection, args).await,
            Command::Rm(args) => remove::run(connection, args).await,
            Command::Grow(args) => resize::grow(connection, args).await,
            Command::Shrink(args) => resize::shrink(connection, args).await,
            Command::Revoke(args) => operate::revoke(connection, args).await,
            Command::Quiesce(args) => operate::quiesce(connection, args).await,
            Command::Resume(args) => operate::resume(connection, args).await,
            Command::Doctor(args) => doctor::run(connection, args).await,
            Command::Completions(args) => generate::completions(&args),
            Command::Man(args) => generate::man(&args),
        }
    });
    // An interrupted command does not wait for a read or a write of a local file or pipe.
    runtime.shutdown_background();
    outcome
}
