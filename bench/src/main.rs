//! Measures Pinfold beside what it is to be compared with, side by side in one run: people read the
//! standard error output, programs the JSON on the standard output. `cargo xtask bench` starts it in
//! the lab.
#![forbid(unsafe_code)]

mod fence;
mod flush;
mod guard;
mod instructions;
mod job;
mod librpma;
mod one_sided;
mod peer;
mod perftest;
mod pins;
mod place;
mod plain;
mod report;
mod statistics;
mod stream;
mod truncate;
mod turns;

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use pinfold_verbs::Device;
use place::{Places, Storage};
use report::{Goal, Head, Report, Row};
use statistics::Pairs;

/// Rounds of each measurement, and of a quick run.
const ROUNDS: usize = 31;
const QUICK_ROUNDS: usize = 7;

/// Measures Pinfold beside what it is to be compared with.
#[derive(Parser)]
#[command(
    bin_name = "pinfold-bench",
    after_help = "Example:\n  pinfold-bench --dax /mnt/pmem0 --device mlx5_0 --address 192.0.2.1 --peers target/bench/peers one-sided"
)]
struct Cli {
    #[command(flatten)]
    places: Places,
    /// What to measure; all, if nothing is named
    #[arg(value_enum)]
    names: Vec<Name>,
    /// Fewer sizes and rounds
    #[arg(long)]
    quick: bool,
    /// How often each is measured, in turns
    #[arg(long)]
    rounds: Option<NonZeroUsize>,
    /// Transfers as it is told, from a server that runs already
    #[arg(long, hide = true, value_name = "URL")]
    obey: Option<String>,
    /// What is measured, for the report's head
    #[arg(long, value_name = "COMMIT", default_value = "unknown")]
    commit: String,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Name {
    /// Bandwidth and latency of one-sided writes and reads, beside C on libibverbs
    OneSided,
    /// What a write costs in instructions, beside C (counted by valgrind's callgrind)
    Instructions,
    /// Writes that are known to have arrived, beside librpma
    Librpma,
    /// Writes made durable by RDMA FLUSH, beside C and a commit (rdma-core 45 or newer, and a device that can)
    Flush,
    /// The stream path, beside a plain gRPC stream
    Stream,
    /// A guard taken and let go, beside C on fcntl(2)
    Guard,
    /// A pin taken and given back, beside C and empty calls
    Pin,
    /// How long a truncate waits, beside a lease holder in C (sets fs.lease-break-time for a moment)
    Truncate,
    /// The fence in one call, beside deregistering the same regions
    Fence,
    /// A pin where there are many pins and sessions, beside one where there are none
    Scale,
}

/// A run at work.
pub(crate) struct Run<'a> {
    pub(crate) storage: &'a Storage,
    pub(crate) rounds: usize,
    quick: bool,
    rows: Vec<Row>,
}

impl Run<'_> {
    /// The second if the run is to be quick.
    pub(crate) fn pick<'b, T>(&self, full: &'b [T], quick: &'b [T]) -> &'b [T] {
        if self.quick { quick } else { full }
    }

    /// Of what takes long: so many at the most, and fewer in a quick run.
    pub(crate) fn few_rounds(&self, full: usize, quick: usize) -> usize {
        self.rounds.min(if self.quick { quick } else { full })
    }

    /// Notes a measurement, and shows it.
    pub(crate) fn add(
        &mut self,
        name: String,
        peer: &'static str,
        unit: &'static str,
        pairs: &Pairs,
        goal: Goal,
    ) {
        let Some(row) = Row::new(name, peer, unit, pairs, goal) else { return };
        eprintln!("{}", row.line());
        self.rows.push(row);
    }
}

impl Name {
    fn run(self, run: &mut Run<'_>) -> Result<()> {
        match self {
            Self::OneSided => one_sided::run(run),
            Self::Instructions => instructions::run(run),
            Self::Librpma => librpma::run(run),
            Self::Flush => flush::run(run),
            Self::Stream => stream::run(run),
            Self::Guard => guard::run(run),
            Self::Pin => pins::run_alone(run),
            Self::Truncate => truncate::run(run),
            Self::Fence => fence::run(run),
            Self::Scale => pins::run_many(run),
        }
    }
}

fn main() -> Result<()> {
    let Cli { places, names, quick, rounds, obey, commit } = Cli::parse();
    if let Some(url) = obey {
        return instructions::obey(&places, &url);
    }
    let device = Device::open(&places.device)?;
    let head = Head::new(&device, commit, quick);
    drop(device);
    let storage = Storage::start(&places)?;
    let default = if quick { QUICK_ROUNDS } else { ROUNDS };
    let rounds = rounds.map_or(default, NonZeroUsize::get);
    let mut run = Run { storage: &storage, rounds, quick, rows: Vec::new() };
    eprintln!("{}", report::heading());
    for name in Name::value_variants() {
        if names.is_empty() || names.contains(name) {
            let started = Instant::now();
            name.run(&mut run)
                .with_context(|| format!("pinfoldd said:\n{}", storage.last_words()))?;
            eprintln!("{name:?} took {} s", started.elapsed().as_secs());
        }
    }
    println!("{}", serde_json::to_string_pretty(&Report::new(head, run.rows))?);
    Ok(())
}
