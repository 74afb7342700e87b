//! `pinfoldd`: arguments, log and signals, and nothing else.
#![forbid(unsafe_code)]

mod signals;

use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand, ValueEnum};
use pinfold_server::config::{
    Config, DEFAULT_PORT, DeviceChoice, ExportConfig, check_exports, check_listen_address,
    default_state_folder, read_settings,
};
use pinfold_server::{Server, Undenied, doctor};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tracing_appender::non_blocking::WorkerGuard;

use crate::signals::Signals;

/// Lets remote machines write into files by RDMA, and takes the right back before the file system
/// moves the bytes.
#[derive(Debug, Parser)]
#[command(
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Example:\n  pinfoldd --export logs=/mnt/pmem0/logs\n\n\
    Exit codes: 0 after SIGTERM, SIGINT or SIGQUIT, 1 if it could not start or serve, 2 for bad arguments, \
    6 if another pinfoldd serves one of the exports or uses the state folder, 8 if an RDMA device that was \
    named is not \
    there or can't be opened."
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,

    /// A directory or a DAX device (/dev/dax0.0) that clients may reach, its name for them, and its
    /// policy; may be given several times. Keys, of directories: guard=delegation|lease|none (the strongest that is asked for),
    /// on_truncate=recall|deny, on_read=revoke|outwait, outwait_max_s=SECONDS, dax=true|false
    #[arg(long = "export", value_name = "NAME=DIR[,KEY=VALUE…]")]
    exports: Vec<ExportConfig>,

    /// A TOML file with more exports: [exports.NAME], path = "DIR", and the same keys
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Where to listen for clients; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)))]
    listen: SocketAddr,

    /// Serve exports of different file systems from this one process: if one of them freezes, or its device
    /// hangs, exports of the others may be held up with it
    #[arg(long)]
    share_fate: bool,

    /// The RDMA device to use, auto for the first with an active port, if there is one, or none; may
    /// be given several times
    #[arg(long = "rdma-device", value_name = "NAME|auto|none", default_value = "auto")]
    rdma_devices: Vec<DeviceChoice>,

    /// Listen on the network although keys then travel in plain text
    #[arg(long)]
    plaintext_on_network: bool,

    /// How long a client may be silent before its session is over; it loses its queue pair after half of
    /// that
    #[arg(long, value_name = "SECONDS", default_value_t = 10,
          value_parser = clap::value_parser!(u64).range(2..=3600))]
    time_to_live: u64,

    /// How much kernel memory the memory regions of all clients may take, in MiB; a quarter of the host's
    /// memory unless set. On a soft NIC 1 GiB of a pin takes 2 MiB, on others it is taken to be 6 MiB.
    /// What does not fit goes by the stream path
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 30))]
    region_memory_max_mib: Option<u64>,

    /// How long to leave a file alone that a local process wanted without waiting for it (O_NONBLOCK, NFS
    /// clients), unless one opens or changes it before: longer than it takes them to try again
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 20_000,
          value_parser = clap::value_parser!(u64).range(..=3_600_000))]
    unseen_breaker_pause_ms: u64,

    /// Where to remember earlier runs, a folder for this daemon alone: generations then ascend from run to
    /// run, and changes of files while it was down are noticed [default: $STATE_DIRECTORY, else
    /// /var/lib/pinfold for root, else $XDG_STATE_HOME/pinfold or ~/.local/state/pinfold]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// How the log on standard error is written; RUST_LOG filters it
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

/// What else there is to do than to serve.
#[derive(Debug, Subcommand)]
enum Command {
    /// Tell what this host and directories on it are good for, and why not
    Doctor(doctor::Args),
    /// Lift the seals (chattr +a) that a server with on_truncate=deny left behind when it was killed
    #[command(after_help = "Exit codes: 0 if no seal is left, 6 if a file is in use, 9 without \
        CAP_LINUX_IMMUTABLE or another right, 1 for any other failure. Only files with Pinfold's mark \
        are touched; pinning a file lifts its seal too.")]
    Undeny {
        /// Files, and folders with all that is beneath them on the same file system
        #[arg(required = true)]
        paths: Vec<PathBuf>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// How long a blocking call of a client may go on after everything has been taken back.
const LAST_CALLS: Duration = Duration::from_secs(2);

/// What clap has for bad arguments; a bad configuration is one.
const EXIT_ARGUMENTS: u8 = 2;
/// The same number as `pinfold` has for what somebody else uses.
const EXIT_BUSY: u8 = 6;
/// The same number as `pinfold` has for missing rights.
const EXIT_PERMISSION: u8 = 9;
/// The same number as `pinfold` has for an RDMA device that can't be used.
const EXIT_DEVICE: u8 = 8;

/// The arguments or the configuration file can't be meant so.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadConfiguration(String);

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match args.command {
        Some(Command::Doctor(args)) => {
            doctor::run(&args).map(ExitCode::from).context("can't write the report")
        }
        Some(Command::Undeny { paths }) => Ok(undeny(&paths)),
        None => start(args).map(|()| ExitCode::SUCCESS),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            complain(&format!("{error:#}"));
            exit_code(&error)
        }
    }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<BadConfiguration>() {
        return ExitCode::from(EXIT_ARGUMENTS);
    }
    match error.downcast_ref() {
        Some(pinfold_server::Error::File(pinfold_leases::Error::ExportLocked { .. })) => {
            ExitCode::from(EXIT_BUSY)
        }
        Some(pinfold_server::Error::StateFolderInUse { .. }) => ExitCode::from(EXIT_BUSY),
        Some(
            pinfold_server::Error::DevicePolicy { .. } | pinfold_server::Error::SharedFate { .. },
        ) => ExitCode::from(EXIT_ARGUMENTS),
        Some(pinfold_server::Error::Verbs(_)) => ExitCode::from(EXIT_DEVICE),
        _ => ExitCode::FAILURE,
    }
}

/// Reports each file, and the worst of what happened as the exit code.
fn undeny(paths: &[PathBuf]) -> ExitCode {
    let mut untold = None;
    let done = pinfold_server::undeny(paths, |report| match report {
        Ok(report) => untold = say(&report.to_string()).err().or(untold.take()),
        Err(failure) => complain(&failure.to_string()),
    });
    if let Some(error) = untold {
        complain(&format!("can't write the report to standard output: {error}"));
    }
    match done {
        Undenied::All => ExitCode::SUCCESS,
        Undenied::Busy => ExitCode::from(EXIT_BUSY),
        Undenied::Denied => ExitCode::from(EXIT_PERMISSION),
        Undenied::Failed => ExitCode::FAILURE,
    }
}

fn start(args: Args) -> Result<()> {
    #[cfg(feature = "mutants")]
    complain(&pinfold_leases::mutant::warning());
    let _flushed_at_exit = start_log(args.log_format);
    #[cfg(feature = "mutants")]
    pinfold_leases::fault::obey()?;
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers())
        // For the start alone: what may block later has threads of its own, which are there by then.
        .max_blocking_threads(1)
        .enable_all()
        .build()?;
    let served = runtime.block_on(run(args));
    runtime.shutdown_timeout(LAST_CALLS);
    served
}

/// Half of the processors. What blocks, and most of what takes long, is done on other threads, and each
/// worker that is woken for nothing costs more than a small call.
fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, NonZeroUsize::get).div_ceil(2)
}

/// Every guarded file takes a descriptor, and the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "could not raise the limit of open files");
    }
}

/// The log goes through a thread of its own and loses lines rather than wait: a terminal or pipe
/// that nobody reads must not hold up the thread on which fences fall.
fn start_log(format: LogFormat) -> WorkerGuard {
    let (writer, guard) = tracing_appender::non_blocking(std::io::stderr());
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    match format {
        LogFormat::Text => {
            use std::io::IsTerminal;
            log.with_ansi(std::io::stderr().is_terminal()).init();
        }
        LogFormat::Json => log.json().flatten_event(true).init(),
    }
    guard
}

/// Prints a line. `println!` would panic where standard output is full or closed.
fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush())
}

/// Says on standard error what went wrong; `eprintln!` would panic where nobody can be told.
fn complain(what: &str) {
    let _ = writeln!(std::io::stderr(), "pinfoldd: {what}");
}

/// From the arguments and from the file, together.
fn settings(
    mut exports: Vec<ExportConfig>,
    mut share_fate: bool,
    file: Option<PathBuf>,
) -> Result<Config, BadConfiguration> {
    if let Some(file) = file {
        let settings = read_settings(&file).map_err(BadConfiguration)?;
        exports.extend(settings.exports);
        share_fate |= settings.share_fate;
    }
    check_exports(&exports).map_err(BadConfiguration)?;
    let mut config = Config::new(exports);
    config.share_fate = share_fate;
    Ok(config)
}

fn state_folder(named: Option<PathBuf>) -> Result<PathBuf, BadConfiguration> {
    let is_root = rustix::process::geteuid().is_root();
    let default = || default_state_folder(|name| std::env::var_os(name), is_root);
    named.map_or_else(default, Ok).map_err(BadConfiguration)
}

async fn run(args: Args) -> Result<()> {
    if let Err(reason) = check_listen_address(args.listen, args.plaintext_on_network) {
        bail!(reason);
    }
    let mut config = settings(args.exports, args.share_fate, args.config)?
        .live_for(Duration::from_secs(args.time_to_live));
    config.rdma_devices = args.rdma_devices;
    config.region_memory_bytes_max = args.region_memory_max_mib.map(|mib| mib << 20);
    config.unseen_breaker_pause = Duration::from_millis(args.unseen_breaker_pause_ms);
    config.state_folder = Some(state_folder(args.state_dir)?);
    let mut signals = Signals::listen().context("can't listen for signals")?;
    let server = Server::start(config).await?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("can't listen on {}", args.listen))?;
    let url = format!("http://{}", listener.local_addr()?);
    match say(&format!("pinfoldd: listening on {url}")) {
        Ok(()) => tracing::info!(url, "listening"),
        Err(error) => {
            tracing::warn!(%error, url, "listening, but standard output can't be written");
        }
    }
    let shutdown = async move {
        signals.ask_to_end().await;
        tracing::info!("going down");
    };
    Ok(server.serve(listener, shutdown).await?)
}
