//! Ctrl-C, SIGTERM and SIGHUP: the first asks to clean up, the second insists.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::exit::Exit;
use crate::failure::Failure;

/// Hears the signals from its making on.
#[derive(Debug)]
pub(crate) struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
    /// None: ignored from the start, as by nohup(1), and so it stays.
    hang_up: Option<Signal>,
}

impl Interrupts {
    pub(crate) fn listen() -> Result<Self, Failure> {
        let hear = |kind| signal(kind).map_err(|error| Failure::local(NO_SIGNALS, error));
        Ok(Self {
            interrupt: hear(SignalKind::interrupt())?,
            terminate: hear(SignalKind::terminate())?,
            hang_up: match is_ignored(SignalKind::hangup()) {
                true => None,
                false => Some(hear(SignalKind::hangup())?),
            },
        })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = hang_up => {}
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

/// Whether this process ignores a signal; a handler of the runtime would end that.
fn is_ignored(signal: SignalKind) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ignores(&status, signal)
}

/// Reads the mask of ignored signals in `/proc/PID/status`.
fn ignores(status: &str, signal: SignalKind) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask & (1 << (signal.as_raw_value() - 1)) != 0
}

/// The failure that an interrupted command ends with, and what it leaves behind.
pub(crate) fn interrupted(outcome: &str) -> Failure {
    Failure::new(Exit::Interrupted, format!("interrupted; {outcome}"))
}

const NO_SIGNALS: &str = "cannot listen for signals";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mask_says_which_signals_are_ignored() {
        let status = "Name:\tsh\nSigIgn:\t0000000000001001\nSigCgt:\tffffffffffffffff\n";
        assert!(ignores(status, SignalKind::hangup()));
        assert!(!ignores(status, SignalKind::interrupt()));
        assert!(!ignores("", SignalKind::hangup()));
    }
}
