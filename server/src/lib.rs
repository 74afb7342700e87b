//! The daemon: sessions, pins, revocation, policy.
//!
//! `registry` decides and does nothing (no clock, no I/O); `engine` does what it decided, against
//! leases and verbs; `fence` is the thread with the deadlines, `ladder`
//! what is done when a fence hangs; `file_system` has the threads for one file system, `pool` those of calls,
//! `ends` those of what ends; `held` is one guarded file, `fabric`
//! the RDMA device, `revocation_cost` how much of a file may be pinned; `service` and `session` speak gRPC, `wire` translates, `status` is the table of
//! errors, `audit` writes the record of each revocation; `doctor` says what a host is good for.
#![forbid(unsafe_code)]

pub mod config;
pub mod doctor;

mod allocation;
mod audit;
mod breakers;
mod door;
mod ends;
mod engine;
mod error;
mod fabric;
mod fence;
mod file_system;
mod flushes;
mod gate;
mod held;
mod ids;
mod ladder;
mod lives;
mod names;
mod passage;
mod policy;
mod pool;
mod registry;
mod revocation_cost;
mod room;
mod service;
mod session;
mod state;
mod status;
mod sync;
mod undeny;
mod wire;

use std::future::Future;

use pinfold_proto::v1::pinfold_server::PinfoldServer;
use tokio::net::TcpListener;

pub use error::{Error, NotDone, Result};
pub use registry::Limits;
pub use revocation_cost::TooMuch;
pub use undeny::{Undenied, undeny};

use config::Config;
use door::Door;
use engine::Engine;
use service::Service;

/// Calls on one connection; more wait on the client's side. Small requests that nobody has read yet count
/// as an attack if there are some 2,000 of them (`h2`, `DataFrameBudget`), and the connection is broken off.
const CALLS_AT_A_TIME: u32 = 512;

/// Calls that a client has reset and that the server has not begun: more at a time cost it the connection.
/// With the default of 20 a client that gives up many calls at once loses its session.
const RESET_CALLS_AT_A_TIME: usize = 8 * CALLS_AT_A_TIME as usize;

/// What a client may send of one call before the server has taken it: a piece of the stream path, with
/// what is around it, so that none stops on the way until its beginning has been read.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// The same of all calls on one connection: the pieces that a client has under way at a time.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// Each frame costs both sides a system call. A larger one would keep notices waiting behind it.
const FRAME_BYTES_MAX: u32 = 256 << 10;

/// How long clients may take to close their connections once everything has been taken back.
const LAST_WORDS: std::time::Duration = std::time::Duration::from_secs(2);

/// A server that has tested its device and opened its exports.
#[derive(Debug)]
pub struct Server {
    engine: std::sync::Arc<Engine>,
    config: Config,
}

impl Server {
    /// Opens the exports, tests the device, starts the threads.
    pub async fn start(config: Config) -> Result<Self> {
        let for_engine = config.clone();
        let engine = tokio::task::spawn_blocking(move || Engine::start(&for_engine)).await;
        Ok(Self { engine: engine.map_err(|_| Error::Task)??, config })
    }

    /// Serves until `shutdown` is done, then takes everything back, with notice, before it returns.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let engine = std::sync::Arc::clone(&self.engine);
        let limits = door::Limits::new(self.config.limits.sessions, room::descriptor_limit());
        let service = PinfoldServer::new(Service::new(self.engine, self.config))
            .max_decoding_message_size(wire::LARGEST_MESSAGE);
        let (gone, all_taken_back) = tokio::sync::oneshot::channel();
        let going_down = async move {
            shutdown.await;
            engine.shut_down().await;
            // Nobody waits: the connections have closed already.
            let _ = gone.send(());
        };
        let connections = Door::new(listener, limits);
        let serving = tonic::transport::Server::builder()
            .max_concurrent_streams(Some(CALLS_AT_A_TIME))
            .http2_max_pending_accept_reset_streams(Some(RESET_CALLS_AT_A_TIME))
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES_MAX)
            .add_service(service)
            .serve_with_incoming_shutdown(connections, going_down);
        tokio::select! {
            served = serving => served,
            // A client with a call under way, or one that reads nothing, does not keep us here.
            () = async {
                if all_taken_back.await.is_err() {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(LAST_WORDS).await;
            } => Ok(()),
        }
    }
}
