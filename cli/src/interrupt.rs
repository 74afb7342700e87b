//! Ctrl-C and SIGTERM: the first asks to clean up, the second insists.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::Exit;
use crate::failure::Failure;

/// Hears both signals from its making on.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    pub(crate) fn listen() -> Result<Self, Failure> {
        let hear = |kind| signal(kind).map_err(|error| Failure::local(NO_SIGNALS, error));
        Ok(Self {
            interrupt: hear(SignalKind::interrupt())?,
            terminate: hear(SignalKind::terminate())?,
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }

    /// Runs the way out; one more signal cuts it short.
    pub(crate) async fn or_abandon<T>(&mut self, way_out: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = way_out => Some(done),
            () = self.next() => None,
        }
    }
}

/// The failure that an interrupted command ends with, and what it leaves behind.
pub(crate) fn interrupted(outcome: &str) -> Failure {
    Failure::new(Exit::Interrupted, format!("interrupted; {outcome}"))
}

const NO_SIGNALS: &str = "cannot listen for signals";
