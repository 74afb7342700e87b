//! `bench`: measures in the lab, beside peers that are compiled for it, and keeps what was measured.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::vm::{self, End, Job, Options};
use crate::{cargo, paths, plot, setup};

/// A full run takes less than half an hour; an emulated and busy machine more.
const LIMIT: Duration = Duration::from_secs(3600);

/// C programs of `bench/peers`, and what they are linked with.
const PEERS: [(&str, &[&str]); 3] = [
    ("guards", &["-libverbs"]),
    ("librpma", &["-lrpma", "-libverbs"]),
    ("one_sided", &["-libverbs"]),
];

/// A soft NIC that rdma_cm finds, for librpma: the loopback has no route for it. On-demand data needs
/// an MTU of whole pages. The newer rdma-core has RDMA FLUSH; many sessions take many descriptors.
const STAGE: &str = r#"set -e
"$(cat /proc/sys/kernel/modprobe)" rdma_ucm
ip link add bench0 type dummy
ip link set bench0 mtu 4300 up
ip address add 10.79.0.1/24 dev bench0
rdma link add rxe-bench type rxe netdev bench0
ulimit -n 65536
exec newer-rdma-core "$@""#;
const STAGED: [&str; 4] = ["--device", "rxe-bench", "--address", "10.79.0.1"];

/// What is to be measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Wishes {
    /// What to measure, as `pinfold-bench --help` names it; all, if nothing is named
    names: Vec<OsString>,
    /// Fewer sizes and rounds: less than three minutes on an idle machine
    #[arg(long)]
    quick: bool,
    /// How often each is measured, in turns
    #[arg(long)]
    rounds: Option<u32>,
}

/// Builds, measures in a guest, and writes the JSON down, with a picture of it: of all that there is to
/// `docs/performance/`, of a part or a quick run to `target/bench/`.
pub(crate) fn run(options: &Options, wishes: &Wishes) -> Result<End> {
    setup::require_bench()?;
    let program = cargo::bench_programs()?.join("pinfold-bench").into_os_string();
    let peers = compile_peers()?;
    let mut argv: Vec<OsString> = ["sh", "-c", STAGE, "sh"].map(OsString::from).into();
    argv.extend([program, "--peers".into(), peers.into()]);
    argv.extend(["--commit".into(), paths::commit()?.into()]);
    argv.extend(STAGED.map(OsString::from));
    if wishes.quick {
        argv.push("--quick".into());
    }
    if let Some(rounds) = wishes.rounds {
        argv.push(format!("--rounds={rounds}").into());
    }
    argv.extend(wishes.names.iter().cloned());
    let (output, printed) = mpsc::channel();
    let end = vm::run(options, &Job::Run(argv, LIMIT), &Some(output))?;
    if matches!(end, End::Exit(0)) {
        let json: Vec<u8> = printed.try_iter().flatten().collect();
        let path = result_path(wishes)?;
        let results = serde_json::from_slice(&json).context("the bench printed no JSON")?;
        let picture = plot::svg(&results)?.into_bytes();
        for (path, text) in [(path.with_extension("svg"), picture), (path, json)] {
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            eprintln!("written to {}", path.display());
        }
    }
    Ok(end)
}

fn result_path(wishes: &Wishes) -> Result<PathBuf> {
    let whole = wishes.names.is_empty() && !wishes.quick && wishes.rounds.is_none();
    let folder = match whole {
        true => paths::root().join("docs/performance"),
        false => folder()?,
    };
    fs::create_dir_all(&folder)?;
    Ok(folder.join("results.json"))
}

/// The same compiler and as much optimisation as ours.
fn compile_peers() -> Result<PathBuf> {
    let folder = folder()?.join("peers");
    fs::create_dir_all(&folder)?;
    for (peer, libraries) in PEERS {
        let source = paths::root().join("bench/peers").join(peer).with_extension("c");
        let mut command = Command::new("cc");
        command.args(["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"]);
        command.arg(folder.join(peer)).arg(&source).args(libraries);
        let status = command.status().context("cc did not start")?;
        ensure!(status.success(), "cc cannot compile {}: {status}", source.display());
    }
    Ok(folder)
}

fn folder() -> Result<PathBuf> {
    Ok(paths::target_dir()?.join("bench"))
}
