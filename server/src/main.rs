//! `pinfoldd`: arguments, log and signals, and nothing else.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use pinfold_server::Server;
use pinfold_server::config::{
    Config, DEFAULT_PORT, DeviceChoice, ExportConfig, check_listen_address,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_appender::non_blocking::WorkerGuard;

/// Lets remote machines write into files by RDMA, and takes the right back before the file system
/// moves the bytes.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Example:\n  pinfoldd --export logs=/mnt/pmem0/logs\n\n\
    Exit codes: 0 after SIGTERM or SIGINT, 1 if it could not start or serve, 2 for bad arguments, \
    8 if an RDMA device that was named is not there or can't be opened."
)]
struct Args {
    /// A directory that clients may reach, and its name for them; may be given several times
    #[arg(long = "export", value_name = "NAME=DIR", required = true)]
    exports: Vec<ExportConfig>,

    /// Where to listen for clients; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDRESS", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_PORT)))]
    listen: SocketAddr,

    /// The RDMA device to use, auto for the first with an active port, if there is one, or none; may
    /// be given several times
    #[arg(long = "rdma-device", value_name = "NAME|auto|none", default_value = "auto")]
    rdma_devices: Vec<DeviceChoice>,

    /// Listen on the network although keys then travel in plain text
    #[arg(long)]
    plaintext_on_network: bool,

    /// How the log on standard error is written; RUST_LOG filters it
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
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

/// The same number as `pinfold` has for an RDMA device that can't be used.
const EXIT_DEVICE: u8 = 8;

fn main() -> ExitCode {
    match start() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pinfoldd: {error:#}");
            exit_code(&error)
        }
    }
}

fn exit_code(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref() {
        Some(pinfold_server::Error::Verbs(_)) => ExitCode::from(EXIT_DEVICE),
        _ => ExitCode::FAILURE,
    }
}

fn start() -> Result<()> {
    let args = Args::parse();
    #[cfg(feature = "mutants")]
    eprintln!("pinfoldd: {}", pinfold_leases::mutant::warning());
    let _flushed_at_exit = start_log(args.log_format);
    raise_descriptor_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let served = runtime.block_on(run(args));
    runtime.shutdown_timeout(LAST_CALLS);
    served
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

async fn run(args: Args) -> Result<()> {
    if let Err(reason) = check_listen_address(args.listen, args.plaintext_on_network) {
        bail!(reason);
    }
    let mut config = Config::new(args.exports);
    config.rdma_devices = args.rdma_devices;
    // Installed before anything is guarded, so that no signal finds us half-way.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = Server::start(config).await?;
    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("can't listen on {}", args.listen))?;
    println!("pinfoldd: listening on http://{}", listener.local_addr()?);
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("going down");
    };
    Ok(server.serve(listener, shutdown).await?)
}
