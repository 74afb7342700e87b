//! Measures Pinfold beside what it is to be compared with, side by side in one run: people read the
//! standard error output, programs the JSON on the standard output. `cargo xtask bench` starts it in
//! the lab.
#![forbid(unsafe_code)]

mod fence;
mod sample;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures Pinfold beside what it is to be compared with.
#[derive(Parser)]
#[command(bin_name = "pinfold-bench")]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// The fence in one call against deregistering the same regions, one after the other and side by
    /// side
    #[command(after_help = "Example:\n  pinfold-bench fence --dax /mnt/pmem0 --regions 4096")]
    Fence(fence::Wishes),
}

/// Where things are.
#[derive(clap::Args, Clone, Debug)]
struct Places {
    /// A folder on an fs-DAX file system
    #[arg(long, value_name = "FOLDER", env = "PINFOLD_LAB_EXT4")]
    dax: PathBuf,
    /// A folder on tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// The RDMA device
    #[arg(long, value_name = "NAME", env = "PINFOLD_LAB_RDMA_DEVICE")]
    device: String,
}

fn main() -> Result<()> {
    match Cli::parse().bench {
        Bench::Fence(wishes) => fence::run(&wishes),
    }
}
