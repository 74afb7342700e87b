//! One record per revocation: what was taken back, why, and when each step was done.

use std::path::Path;
use std::time::Duration;

use pinfold_leases::{BreakKind, GuardTier, Opener};

use crate::registry::{Reason, Record};

/// The steps after the release, from the break on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Teardown {
    /// The last region was deregistered.
    pub deregistered: Duration,
    /// The mapping was given up.
    pub unmapped: Duration,
    /// Regions whose deregistration failed.
    pub failed_regions: usize,
    /// Stream transfers that were still inside the kernel when the guard was let go.
    pub late_stream_writes: usize,
}

impl Teardown {
    /// When the local process got through, as far as is known: it is held up by regions after the
    /// release too.
    pub(crate) fn through(&self, record: &Record) -> Duration {
        self.deregistered.max(record.timings.released)
    }
}

/// Writes the record to the log, target `pinfold::audit`.
pub(crate) fn revocation(
    path: &Path,
    tier: GuardTier,
    record: &Record,
    teardown: &Teardown,
    breakers: &[Opener],
) {
    let timings = &record.timings;
    tracing::info!(
        target: "pinfold::audit",
        path = %path.display(),
        generation = %record.generation,
        guard = %tier,
        reason = reason(record.reason),
        breakers = names(breakers),
        pins = record.pins,
        sessions = record.sessions,
        noticed_us = micros(timings.noticed),
        drained_us = timings.drained.map(micros),
        fenced_us = micros(timings.fenced),
        released_us = micros(timings.released),
        deregistered_us = micros(teardown.deregistered),
        through_us = micros(teardown.through(record)),
        unmapped_us = micros(teardown.unmapped),
        break_pending_at_release = timings.break_pending,
        failed_regions = teardown.failed_regions,
        not_outwaited = record.not_outwaited.map(tracing::field::display),
        late_stream_writes = teardown.late_stream_writes,
        "revoked"
    );
}

/// `find (4711), cat (4712)`; `None`: nobody was seen.
fn names(breakers: &[Opener]) -> Option<String> {
    let names = breakers.iter().map(|breaker| format!("{} ({})", breaker.command, breaker.pid));
    let names: Vec<String> = names.collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// One word for a log.
pub(crate) fn reason(reason: Reason) -> &'static str {
    match reason {
        Reason::Break(BreakKind::Reader) => "local reader",
        Reason::Break(BreakKind::Writer) => "local writer",
        Reason::Shutdown => "shutdown",
        Reason::Shrink => "shrink",
        Reason::Remove => "remove",
        Reason::Operator => "operator",
        Reason::Quiesce => "quiesce",
        Reason::Steal => "steal",
        Reason::NameGone => "name gone",
        Reason::WriteBackFailed => "write-back failed",
    }
}

/// Whole microseconds.
pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
