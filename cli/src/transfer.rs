//! What `put` and `get` share: which path carried how much, how far it has come, why it failed.

use std::fmt;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use pinfold_client::{Error, Events, Grant, Pin, Reason, Session};
use serde::Serialize;

use crate::args::{FileArg, TransportArg};
use crate::failure::Failure;

/// Longer than a drain takes by default.
const EXPLANATION_PATIENCE: Duration = Duration::from_secs(6);

/// What the pin's pages, and the chunks with them, are aligned to at least.
const PAGE_BYTES: usize = 4096;

/// How a transfer went.
#[derive(Debug, Serialize)]
pub(crate) struct Carried {
    bytes: u64,
    seconds: f64,
    bytes_per_second: f64,
    rdma_bytes: u64,
    stream_bytes: u64,
    /// Why some went by stream; null if none did, or if that was asked for.
    stream_because: Option<String>,
}

impl Carried {
    pub(crate) fn new(begin: Instant, rdma_bytes: u64, stream_bytes: u64) -> Self {
        let seconds = begin.elapsed().as_secs_f64();
        let bytes = rdma_bytes + stream_bytes;
        Self {
            bytes,
            seconds,
            bytes_per_second: bytes as f64 / seconds.max(1e-9),
            rdma_bytes,
            stream_bytes,
            stream_because: None,
        }
    }

    /// Says why bytes went by stream, if that needs a word.
    pub(crate) fn because(mut self, asked: TransportArg, session: &Session, grant: &Grant) -> Self {
        if self.stream_bytes > 0 && asked != TransportArg::Stream {
            self.stream_because = Some(why_stream(session, grant));
        }
        self
    }
}

impl Carried {
    /// A line of its own for why bytes went by stream; nothing if that needs no word.
    pub(crate) fn explanation(&self) -> String {
        let line = |because: &String| format!("  by stream because: {because}\n");
        self.stream_because.as_ref().map(line).unwrap_or_default()
    }
}

/// Why bytes of this pin go by stream: all of them, or those that a quirk forbids.
fn why_stream(session: &Session, grant: &Grant) -> String {
    if let Some(because) = &grant.no_rdma_because {
        return because.clone();
    }
    if let Some(because) = session.no_rdma_because() {
        return because.to_owned();
    }
    format!(
        "the server's device places data rightly only from multiples of {} bytes on",
        grant.quirks.start_alignment_bytes
    )
}

impl fmt::Display for Carried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes in {:.2} s ({}/s), {} by RDMA and {} by stream",
            self.bytes,
            self.seconds,
            HumanBytes(self.bytes_per_second as u64),
            self.rdma_bytes,
            self.stream_bytes,
        )
    }
}

/// Bytes per request: as asked, but no more than there are, in whole pages and quirks.
pub(crate) fn chunk_bytes(asked: usize, whole: u64, grant: &Grant) -> usize {
    let alignment = PAGE_BYTES.max(grant.quirks.start_alignment_bytes as usize);
    asked.min(usize::try_from(whole).unwrap_or(usize::MAX)).next_multiple_of(alignment)
}

/// On standard error, and only if that is a terminal: indicatif sees to it.
pub(crate) fn progress_bar(file: &FileArg, len: u64, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    const TEMPLATE: &str =
        "{msg}  {bar:30}  {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta}";
    let bar = ProgressBar::new(len).with_message(file.to_string());
    match ProgressStyle::with_template(TEMPLATE) {
        Ok(style) => bar.with_style(style.progress_chars("━╸─")),
        Err(_) => bar,
    }
}

/// The device, or the refusal of a call, only says that a transfer failed. If that was because the
/// pin or the session ended, the server's word, or its silence, comes soon and says more.
pub(crate) async fn explain(failure: Failure, pin: &Pin, events: &mut Events) -> Failure {
    if !failure.library_error().is_some_and(may_be_the_pin) {
        return failure;
    }
    let gone = async {
        while !matches!(pin.check(), Err(Error::Revoked { .. } | Error::SessionLost { .. })) {
            if events.next().await.is_none() {
                break;
            }
        }
    };
    // Without a word within this time the failure itself knows best.
    let _ = tokio::time::timeout(EXPLANATION_PATIENCE, gone).await;
    match pin.check() {
        Err(error) => error.into(),
        Ok(()) => failure,
    }
}

/// Whether the end of the pin or of the session could be behind it.
fn may_be_the_pin(error: &Error) -> bool {
    use Reason::{FileDraining, ShuttingDown, StaleGeneration, UnknownPin, UnknownSession};
    match error {
        Error::RemoteRefused { .. }
        | Error::LaneLost { .. }
        | Error::Draining { .. }
        | Error::Transport { .. } => true,
        _ => matches!(
            error.reason(),
            Some(FileDraining | ShuttingDown | StaleGeneration | UnknownPin | UnknownSession)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_says_which_path_carried_how_much_and_why() {
        let mut carried = Carried::new(Instant::now(), 4096, 77);
        let text = carried.to_string();
        assert!(text.starts_with("4173 bytes in "), "{text}");
        assert!(text.ends_with(", 4096 by RDMA and 77 by stream"), "{text}");
        assert_eq!(carried.explanation(), "");
        carried.stream_because = Some("no device".to_owned());
        assert_eq!(carried.explanation(), "  by stream because: no device\n");
    }
}
