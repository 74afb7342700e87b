//! Words and figures for a revocation, for people and for programs.

use pinfold_client::{RevocationReason, RevocationTimings};
use serde::Serialize;

/// Microseconds from the beginning to the end of each step.
#[derive(Debug, Serialize)]
pub(crate) struct TimingsReport {
    noticed_us: u128,
    /// Null: the drain budget ran out first.
    drained_us: Option<u128>,
    fenced_us: u128,
    released_us: u128,
    break_pending_at_release: bool,
}

impl TimingsReport {
    pub(crate) fn new(timings: &RevocationTimings) -> Self {
        Self {
            noticed_us: timings.noticed.as_micros(),
            drained_us: timings.drained.map(|when| when.as_micros()),
            fenced_us: timings.fenced.as_micros(),
            released_us: timings.released.as_micros(),
            break_pending_at_release: timings.break_pending_at_release,
        }
    }
}

/// The reason for programs.
pub(crate) fn token(reason: RevocationReason) -> &'static str {
    match reason {
        RevocationReason::LocalReader => "local_reader",
        RevocationReason::LocalWriter => "local_writer",
        RevocationReason::Shutdown => "shutdown",
        RevocationReason::Shrink => "shrink",
        RevocationReason::Remove => "remove",
        RevocationReason::Operator => "operator",
        RevocationReason::Quiesce => "quiesce",
        RevocationReason::Steal => "steal",
        RevocationReason::WriteBackFailed => "write_back_failed",
        RevocationReason::NameGone => "name_gone",
        _ => "unknown",
    }
}

/// What the release did for the one who wanted the file.
pub(crate) fn verdict(reason: RevocationReason, timings: &RevocationTimings) -> &'static str {
    use RevocationReason::{
        NameGone, Operator, Quiesce, Remove, Shrink, Shutdown, Steal, WriteBackFailed,
    };
    match (reason, timings.break_pending_at_release) {
        (Shutdown, _) => "nobody waited for the file",
        (Shrink | Remove | Steal, _) => {
            "no local process waited for the file: a client asked for it"
        }
        (WriteBackFailed, _) => {
            "no local process waited for the file: the kernel could not write it back to its medium"
        }
        (Operator | Quiesce, _) => "no local process waited for the file: an operator asked for it",
        (NameGone, _) => "no local process waited for the file: its name was taken without asking",
        (_, true) => "the file was let go in time for a local process that waits for it",
        (_, false) => "the kernel had let the local process through before the file was let go",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn timings(break_pending_at_release: bool) -> RevocationTimings {
        RevocationTimings {
            noticed: Duration::from_micros(1),
            drained: None,
            fenced: Duration::from_micros(2),
            released: Duration::from_micros(3),
            break_pending_at_release,
        }
    }

    #[test]
    fn only_a_break_has_a_local_process_waiting() {
        for reason in [RevocationReason::LocalReader, RevocationReason::LocalWriter] {
            assert!(verdict(reason, &timings(true)).contains("let go in time"));
            assert!(verdict(reason, &timings(false)).contains("kernel had let"));
        }
        for reason in [
            RevocationReason::Shrink,
            RevocationReason::Remove,
            RevocationReason::Shutdown,
            RevocationReason::Operator,
            RevocationReason::Quiesce,
            RevocationReason::Steal,
            RevocationReason::WriteBackFailed,
            RevocationReason::NameGone,
        ] {
            assert!(!verdict(reason, &timings(false)).contains("kernel had let"), "{reason}");
        }
    }

    #[test]
    fn a_drain_that_never_ended_is_null() {
        let json = serde_json::to_value(TimingsReport::new(&timings(true))).unwrap();
        assert_eq!(json["drained_us"], serde_json::Value::Null);
        assert_eq!(json["released_us"], 3);
    }
}
