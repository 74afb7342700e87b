//! The signals that the daemon takes: some end it in order, some are only told of, and none kills it
//! while files are guarded.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// `SIGXFSZ`: a write or fallocate(2) went past `RLIMIT_FSIZE`. With a handler it fails with `EFBIG`, which
/// a client is told of; without one the process dies.
const FILE_TOO_LARGE: i32 = 25;

/// Hears the signals from its making on.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    quit: Signal,
    hang_up: Signal,
    user_1: Signal,
    user_2: Signal,
    _file_too_large: Signal,
}

impl Signals {
    /// To be called before anything is guarded, so that no signal ends the process half-way.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            hang_up: signal(SignalKind::hangup())?,
            user_1: signal(SignalKind::user_defined1())?,
            user_2: signal(SignalKind::user_defined2())?,
            _file_too_large: signal(SignalKind::from_raw(FILE_TOO_LARGE))?,
        })
    }

    /// Waits for a signal that asks the daemon to end.
    pub(crate) async fn ask_to_end(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.quit.recv() => return,
                _ = self.hang_up.recv() => tracing::warn!(
                    "SIGHUP changes nothing: pinfoldd does not read its configuration again; restart \
                     it for that"
                ),
                _ = self.user_1.recv() => tracing::warn!("SIGUSR1 means nothing to pinfoldd"),
                _ = self.user_2.recv() => tracing::warn!("SIGUSR2 means nothing to pinfoldd"),
            }
        }
    }
}
