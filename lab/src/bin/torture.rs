//! The torture rig (`pinfold_lab::torture`): `cargo xtask vm torture` runs it in the lab.
//!
//! `torture FILE-SYSTEM SECONDS SEED` ends with 0 if nothing was found, with 1 if something was.
//! `torture client ROLE` is one of its clients.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use pinfold_lab::FileSystem;
use pinfold_lab::torture::client::play;
use pinfold_lab::torture::rig::{Order, run};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["client", role] => be_client(role),
        [file_system, seconds, seed] => torture(file_system, seconds, seed),
        _ => panic!("torture FILE-SYSTEM SECONDS SEED"),
    }
}

fn torture(file_system: &str, seconds: &str, seed: &str) -> ExitCode {
    let file_system = match file_system {
        "ext4" => FileSystem::Ext4,
        "xfs" => FileSystem::Xfs,
        other => panic!("ext4 or xfs, not {other}"),
    };
    let time = Duration::from_secs(seconds.parse().expect("seconds"));
    let outcome = run(Order { file_system, time, seed: seed.parse().expect("a seed") });
    outcome.print();
    if outcome.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A panic in any task ends the process: the rig must see it.
fn be_client(role: &str) -> ExitCode {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::exit(101);
    }));
    let role = serde_json::from_str(role).expect("a role");
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(play(role));
    ExitCode::SUCCESS
}
