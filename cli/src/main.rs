//! The command `pinfold`: arguments, exit codes and nothing else; one file per subcommand.
#![forbid(unsafe_code)]

mod args;
mod exit;
mod failure;
mod interrupt;
mod pin;
mod put;
mod stat;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;

use crate::args::{Cli, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{}", failure.report());
            failure.exit.into()
        }
    }
}

fn run(cli: Cli) -> Result<(), Failure> {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|error| Failure::local("cannot start the runtime", error))?;
    runtime.block_on(async {
        match cli.command {
            Command::Put(args) => put::run(cli.connection, args).await,
            Command::Pin(args) => pin::run(cli.connection, args).await,
            Command::Stat(args) => stat::run(cli.connection, args).await,
        }
    })
}
