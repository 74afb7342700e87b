//! What every command that talks to the server does: connect, work, be interrupted, close.

use std::fmt;

use pinfold_client::{ConnectOptions, KeepPolicy, KeptSession, RdmaDevice, Session};

use crate::args::{Connection, TransportArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::interrupt::{Interrupts, interrupted};

/// Works in a session that needs no device: by gRPC alone.
pub(crate) async fn by_control<T>(
    connection: Connection,
    left_behind: impl fmt::Display,
    work: impl AsyncFnOnce(&Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let options = ConnectOptions::new(connection.server).rdma_device(RdmaDevice::None);
    in_session(options, left_behind, work).await
}

/// Works in a session whose bytes travel as asked, with this many requests in flight.
pub(crate) async fn by_transport<T>(
    connection: Connection,
    send_window: Option<u32>,
    left_behind: impl fmt::Display,
    work: impl AsyncFnOnce(&Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let transport = connection.transport;
    let mut options = options(connection);
    if let Some(requests) = send_window {
        options = options.send_window(requests);
    }
    in_session(options, left_behind, async |session: &Session| {
        demand(transport, session)?;
        work(session).await
    })
    .await
}

/// Works in a session that is opened again when it is lost.
pub(crate) async fn kept<T>(
    connection: Connection,
    left_behind: impl fmt::Display,
    work: impl AsyncFnOnce(&KeptSession) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut interrupts = Interrupts::listen()?;
    let transport = connection.transport;
    let session = tokio::select! {
        session = KeptSession::connect(options(connection), KeepPolicy::default()) => session?,
        () = interrupts.next() => return Err(interrupted(NO_SESSION)),
    };
    let working = async {
        let first = session.session().await?;
        demand(transport, &first)?;
        drop(first);
        work(&session).await
    };
    let outcome = tokio::select! {
        outcome = working => outcome,
        () = interrupts.next() => Err(interrupted(&left_behind.to_string())),
    };
    interrupts.or_abandon(session.close()).await;
    outcome
}

/// How to connect for bytes that travel as asked.
pub(crate) fn options(connection: Connection) -> ConnectOptions {
    let device = match connection.transport {
        TransportArg::Stream => RdmaDevice::None,
        TransportArg::Auto | TransportArg::Rdma => connection.rdma_device,
    };
    ConnectOptions::new(connection.server).rdma_device(device)
}

/// Who wants RDMA or nothing gets that.
fn demand(transport: TransportArg, session: &Session) -> Result<(), Failure> {
    if transport != TransportArg::Rdma || session.has_rdma() {
        return Ok(());
    }
    let why = session.no_rdma_because().unwrap_or("there is no connection by RDMA");
    let what = format!("the bytes cannot go by RDMA, as --transport rdma wants: {why}");
    Err(Failure::new(Exit::Device, what)
        .or_hint("leave --transport out, and they go by gRPC where there is no RDMA"))
}

/// The first Ctrl-C, SIGTERM or SIGHUP ends the work and closes the session, and every pin goes with it; the
/// second one does not wait for that. `left_behind` says what an interrupted command leaves.
async fn in_session<T>(
    options: ConnectOptions,
    left_behind: impl fmt::Display,
    work: impl AsyncFnOnce(&Session) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut interrupts = Interrupts::listen()?;
    let session = tokio::select! {
        session = Session::connect(options) => session?,
        () = interrupts.next() => return Err(interrupted(NO_SESSION)),
    };
    let outcome = tokio::select! {
        outcome = work(&session) => outcome,
        () = interrupts.next() => Err(interrupted(&left_behind.to_string())),
    };
    interrupts.or_abandon(session.close()).await;
    outcome
}

const NO_SESSION: &str = "there was no session yet";
