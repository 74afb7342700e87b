//! What `put` and `get` share: which path carried how much, how far it has come, why it failed.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanBytes, ProgressBar, ProgressStyle};
use pinfold_client::{AllocationProgress, Error, Events, Grant, Pin, Reason, Session};
use serde::Serialize;

use crate::args::{Copying, FileArg, TransportArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::same;

/// Longer than a drain takes by default.
const EXPLANATION_PATIENCE: Duration = Duration::from_secs(6);

const AGAIN_UNDISTURBED: &str = "copy it again, while no program writes to either of the two";

/// What the pin's pages, and the chunks with them, are aligned to at least.
const PAGE_BYTES: usize = 4096;

/// What all files of one command have in common.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub(crate) session: &'a Session,
    pub(crate) transport: TransportArg,
    pub(crate) how: Copying,
    pub(crate) bar: ProgressBar,
}

/// What came of one file.
#[derive(Debug, Serialize)]
pub(crate) struct Copied {
    pub(crate) size: u64,
    #[serde(flatten)]
    pub(crate) carried: Carried,
    /// Of those that were compared (`--resume`): the same on both sides, and not carried.
    pub(crate) kept_bytes: u64,
    /// Why nothing was compared although it was asked for; null if that was not so.
    pub(crate) anew_because: Option<String>,
    /// Whether both files were read again and compared (`--verify`).
    pub(crate) verified: bool,
}

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

impl Job<'_> {
    /// How long a file may be waited for.
    pub(crate) fn wait(&self) -> Duration {
        Duration::from_secs(self.how.wait.into())
    }

    /// Compares what is here with the pinned file, if that is asked for; says how long it took.
    pub(crate) async fn verify(
        &self,
        pin: &Arc<Pin>,
        local: &Arc<std::fs::File>,
        len: u64,
    ) -> Result<Option<Duration>, Failure> {
        if !self.how.verify {
            return Ok(None);
        }
        let begin = Instant::now();
        let differs = |stretch: Range<u64>| {
            let Range { start, end } = stretch;
            let what = format!("verification: the two files differ between byte {start} and {end}");
            Failure::new(Exit::Differs, what).or_hint(AGAIN_UNDISTURBED)
        };
        // Bytes behind the end of what was copied are compared with nothing.
        let there = local
            .metadata()
            .map_err(|error| Failure::local("cannot look at the local file again", error))?;
        if there.len() != len {
            let there = there.len();
            let what =
                format!("verification: the local file has {there} bytes, and {len} were copied");
            return Err(Failure::new(Exit::Differs, what).or_hint(AGAIN_UNDISTURBED));
        }
        match same::difference(pin, local, len, self.how.requests.window).await? {
            None => Ok(Some(begin.elapsed())),
            Some(stretch) => Err(differs(stretch)),
        }
    }
}

impl Copied {
    /// Of a file without bytes, which nobody has pinned.
    pub(crate) fn nothing(begin: Instant, verified: bool) -> Self {
        let carried = Carried::new(begin, 0, 0);
        Self { size: 0, carried, kept_bytes: 0, anew_because: None, verified }
    }

    /// Lines of their own for what needs a reason.
    pub(crate) fn explanations(&self) -> String {
        let anew = |because: &String| format!("  from the start because: {because}\n");
        let anew = self.anew_because.as_ref().map(anew).unwrap_or_default();
        self.carried.explanation() + &anew
    }
}

impl fmt::Display for Copied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.carried)?;
        if self.kept_bytes > 0 {
            write!(f, ", {} were there", self.kept_bytes)?;
        }
        match self.verified {
            true => f.write_str(", verified"),
            false => Ok(()),
        }
    }
}

impl Carried {
    pub(crate) fn rdma_bytes(&self) -> u64 {
        self.rdma_bytes
    }

    pub(crate) fn stream_bytes(&self) -> u64 {
        self.stream_bytes
    }

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
    let whole = usize::try_from(whole).unwrap_or(usize::MAX);
    asked.min(whole).next_multiple_of(alignment_bytes(grant))
}

/// Where requests start: at whole pages, and where the quirks allow it.
pub(crate) fn alignment_bytes(grant: &Grant) -> usize {
    PAGE_BYTES.max(grant.quirks.start_alignment_bytes as usize)
}

/// Works on a local file.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// On standard error, and only if that is a terminal: indicatif sees to it.
pub(crate) fn progress_bar(of: String, len: u64, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    const TEMPLATE: &str =
        "{msg}  {bar:30}  {bytes} of {total_bytes}  {binary_bytes_per_sec}  {eta}";
    let bar = ProgressBar::new(len).with_message(of);
    match ProgressStyle::with_template(TEMPLATE) {
        Ok(style) => bar.with_style(style.progress_chars("━╸─")),
        Err(_) => bar,
    }
}

/// Shows on the bar of a single file how much of it the server has allocated.
pub(crate) fn allocation(job: &Job<'_>, file: &FileArg) -> impl FnMut(AllocationProgress) {
    let (bar, of, shown) = (job.bar.clone(), file.to_string(), !job.how.recursive);
    move |AllocationProgress { done_bytes, total_bytes }| {
        if shown {
            let (done, total) = (BinaryBytes(done_bytes), BinaryBytes(total_bytes));
            bar.set_message(format!("{of}: allocated {done} of {total}"));
        }
    }
}

/// Ends what [`allocation`] shows.
pub(crate) fn allocated(job: &Job<'_>, file: &FileArg) {
    if !job.how.recursive {
        job.bar.set_message(file.to_string());
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

/// Gives a pin back when all is done: the bytes are where they should be, and one that can't be given
/// back ends with the session.
pub(crate) async fn give_back(pin: Arc<Pin>) {
    if let Some(pin) = Arc::into_inner(pin) {
        let _ = pin.unpin().await;
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
