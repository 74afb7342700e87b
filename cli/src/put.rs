//! `pinfold put`: a pipeline from a local file into a pinned one.
//!
//! A fixed number of buffers go round: each is filled from the local file, written by RDMA or by
//! stream, and filled again when the server has taken it.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{fmt, io};

use indicatif::ProgressBar;
use pinfold_client::{
    Buffer, Created, Durability, Error, FileIdentity, IfExists, Pin, PinRequest, Reason, Session,
    Transport,
};
use serde::Serialize;
use tokio::task::JoinSet;

use crate::args::{Connection, Put, TransportArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::transfer::{self, Carried};
use crate::{terminal, work};

const AGAIN: &str = "put it again";

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    /// False where the file was there and was resized.
    created: bool,
    #[serde(flatten)]
    carried: Carried,
    flush_us: u128,
    durable: bool,
}

/// Where the bytes go.
#[derive(Debug)]
struct Room {
    identity: FileIdentity,
    created: bool,
    /// Of all that is there.
    size: u64,
}

/// The local file.
#[derive(Debug)]
struct Source {
    file: File,
    path: PathBuf,
    len: u64,
}

/// How far a copy has come; shared by its workers.
#[derive(Debug, Default)]
struct Progress {
    /// The first byte that no worker has taken.
    next: AtomicU64,
    /// Bytes that the server has taken, by path.
    rdma_bytes: AtomicU64,
    stream_bytes: AtomicU64,
}

/// Copies, commits, and says how it went.
pub(crate) async fn run(connection: Connection, args: Put) -> Result<(), Failure> {
    let source = Arc::new(Source::open(&args.local)?);
    let transport = connection.transport;
    let left_behind = format!("{} is incomplete on the server", args.file);
    let report =
        work::by_transport(connection, Some(args.requests.window), &left_behind, async |session| {
            put(session, transport, &args, source).await
        })
        .await?;
    if args.json { terminal::print_json(&report) } else { terminal::print(&report.to_string()) }
}

async fn put(
    session: &Session,
    transport: TransportArg,
    args: &Put,
    source: Arc<Source>,
) -> Result<Report, Failure> {
    let begin = Instant::now();
    let (export, path) = (&args.file.export, &args.file.path);
    let give_up = begin + Duration::from_secs(args.wait.into());
    let made = make_room(session, args, source.len, give_up).await?;
    if source.len == 0 {
        // Its name is durable, and there is nothing to pin.
        let carried = Carried::new(begin, 0, 0);
        return Ok(Report::new(args, made.created, carried, Some(Duration::ZERO)));
    }
    let mut request = PinRequest::read_write(export, path)
        .expect_identity(made.identity)
        .transport(transport.into())
        .wait(left_until(give_up));
    if made.size != source.len {
        request = request.range(0..source.len);
    }
    // Before the pin, so that nothing about it is missed.
    let mut events = session.events();
    let pinned = session.pin(request).await;
    let pin = Arc::new(pinned.map_err(|error| not_pinned(args, source.len, error))?);
    check_size(args, made.size, pin.grant().valid_end)?;
    let progress = Arc::new(Progress::default());
    let copied = copy(session, args, &source, &pin, &progress).await;
    let finished = match copied {
        Ok(()) => commit(&pin).await,
        Err(failure) => Err(failure),
    };
    let flush = match finished {
        Ok(flush) => flush,
        Err(failure) => {
            let cause = transfer::explain(failure, &pin, &mut events).await;
            return Err(cause.within(incomplete(args, &source, &progress)).or_hint(AGAIN));
        }
    };
    let (by_rdma, by_stream) = progress.by_path();
    let carried = Carried::new(begin, by_rdma, by_stream).because(transport, session, pin.grant());
    if let Some(pin) = Arc::into_inner(pin) {
        // The bytes are where they should be; a pin that can't be given back ends with the session.
        let _ = pin.unpin().await;
    }
    Ok(Report::new(args, made.created, carried, flush))
}

/// Makes the file as long as the local one. A device has the size that it has: there it must fit.
async fn make_room(
    session: &Session,
    args: &Put,
    len: u64,
    give_up: Instant,
) -> Result<Room, Failure> {
    let (export, path) = (&args.file.export, &args.file.path);
    let refused = match create_when_free(session, args, len, give_up).await {
        Ok(made) => {
            return Ok(Room { identity: made.identity, created: made.created, size: len });
        }
        Err(refused) if refused.reason() == Some(Reason::FixedSize) => refused,
        Err(refused) => return Err(refused.into()),
    };
    let device = session.stat(export, path).await?;
    if device.size < len {
        let local = args.local.display();
        let size = device.size;
        let why = format!("cannot put {local} ({len} bytes) into {}, of {size} bytes", args.file);
        return Err(Failure::from(refused).within(why));
    }
    Ok(Room { identity: device.identity, created: false, size: device.size })
}

/// Makes the file, or gives it another size, as soon as nobody has it open. Only a pin can wait for that.
async fn create_when_free(
    session: &Session,
    args: &Put,
    len: u64,
    give_up: Instant,
) -> Result<Created, Error> {
    let (export, path) = (&args.file.export, &args.file.path);
    loop {
        let refused = match session.create(export, path, len, IfExists::Resize).await {
            Err(refused) if is_in_use(&refused) => refused,
            done => return done,
        };
        let left = left_until(give_up);
        if left.is_zero() {
            return Err(refused);
        }
        let request = PinRequest::read(export, path).transport(Transport::Stream).wait(left);
        match session.pin(request).await {
            Ok(pin) => pin.unpin().await?,
            // It is free: it has no bytes to pin, or is not there.
            Err(error)
                if matches!(error.reason(), Some(Reason::BadRange | Reason::FileNotFound)) => {}
            Err(_) => return Err(refused),
        }
    }
}

fn is_in_use(refused: &Error) -> bool {
    matches!(refused.reason(), Some(Reason::FileBusy | Reason::ExportQuiesced))
}

fn left_until(give_up: Instant) -> Duration {
    give_up.saturating_duration_since(Instant::now())
}

/// Of a whole file only an empty one has no bytes to pin, and this one was made with some.
fn not_pinned(args: &Put, made: u64, error: Error) -> Failure {
    match error.reason() {
        Some(Reason::BadRange) => changed_size(args, made, 0),
        _ => error.into(),
    }
}

/// Between its making and its pin the file is anybody's: one that was cut takes only a part of the
/// bytes, and one that grew would keep more behind them.
fn check_size(args: &Put, made: u64, found: u64) -> Result<(), Failure> {
    if found == made {
        return Ok(());
    }
    Err(changed_size(args, made, found))
}

fn changed_size(args: &Put, made: u64, found: u64) -> Failure {
    let what = format!(
        "cannot put {} into {}: a process on the storage host changed its size from {made} to \
         {found} bytes meanwhile",
        args.local.display(),
        args.file,
    );
    Failure::new(Exit::Revoked, what).or_hint(AGAIN)
}

/// What is known about the bytes when a copy fails: the commit comes last.
fn incomplete(args: &Put, source: &Source, progress: &Progress) -> String {
    let written = progress.written();
    let taken = progress.next.load(Ordering::Relaxed).min(source.len);
    format!(
        "cannot put {} into {}: of {} bytes, none is known to be committed, {written} were \
         written, {} are in doubt",
        args.local.display(),
        args.file,
        source.len,
        taken.saturating_sub(written),
    )
}

/// `None`: the server offers no durability here.
async fn commit(pin: &Pin) -> Result<Option<Duration>, Failure> {
    if !pin.grant().durability.contains(&Durability::Commit) {
        return Ok(None);
    }
    Ok(Some(pin.commit().await?.flush))
}

async fn copy(
    session: &Session,
    args: &Put,
    source: &Arc<Source>,
    pin: &Arc<Pin>,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let chunk = transfer::chunk_bytes(args.requests.chunk, source.len, pin.grant());
    let bar = transfer::progress_bar(&args.file, source.len, args.json);
    let workers = source.len.div_ceil(chunk as u64).min(args.requests.window.into());
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let worker = Worker {
            source: source.clone(),
            pin: pin.clone(),
            progress: progress.clone(),
            bar: bar.clone(),
            chunk,
        };
        running.spawn(worker.run(session.buffer(chunk).await?));
    }
    let mut outcome = Ok(());
    while let Some(ended) = running.join_next().await {
        match ended {
            Ok(Ok(())) => {}
            // The first failure says most: it takes the others along.
            Ok(Err(failure)) if outcome.is_ok() => {
                outcome = Err(failure);
                running.abort_all();
            }
            Ok(Err(_)) => {}
            Err(stopped) if stopped.is_cancelled() => {}
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
    bar.finish_and_clear();
    outcome
}

struct Worker {
    source: Arc<Source>,
    pin: Arc<Pin>,
    progress: Arc<Progress>,
    bar: ProgressBar,
    chunk: usize,
}

impl Worker {
    async fn run(self, mut buffer: Buffer) -> Result<(), Failure> {
        loop {
            let offset = self.progress.next.fetch_add(self.chunk as u64, Ordering::Relaxed);
            if offset >= self.source.len {
                return Ok(());
            }
            let len = (self.source.len - offset).min(self.chunk as u64) as usize;
            buffer = Source::fill(self.source.clone(), offset, len, buffer).await?;
            let report;
            (buffer, report) = self.pin.write(offset, buffer, len).await.map_err(Error::from)?;
            self.progress.rdma_bytes.fetch_add(report.rdma_bytes, Ordering::Relaxed);
            self.progress.stream_bytes.fetch_add(report.stream_bytes, Ordering::Relaxed);
            self.bar.inc(len as u64);
        }
    }
}

impl Source {
    fn open(path: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::local(format!("cannot open {}", path.display()), error);
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let what = format!("{} is no regular file", path.display());
            return Err(Failure::new(Exit::LocalIo, what));
        }
        Ok(Self { file, path: path.to_owned(), len: metadata.len() })
    }

    /// Reads into the buffer, which comes back.
    async fn fill(
        source: Arc<Self>,
        offset: u64,
        len: usize,
        mut buffer: Buffer,
    ) -> Result<Buffer, Failure> {
        let read = move || {
            let done = source.file.read_exact_at(&mut buffer.as_mut_slice()[..len], offset);
            done.map(|()| buffer).map_err(|error| source.unreadable(offset, error))
        };
        match tokio::task::spawn_blocking(read).await {
            Ok(filled) => filled,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }

    fn unreadable(&self, offset: u64, error: io::Error) -> Failure {
        let path = self.path.display();
        if error.kind() == io::ErrorKind::UnexpectedEof {
            let what =
                format!("{path} shrank while it was read: it had {} bytes at the start", self.len);
            return Failure::new(Exit::LocalIo, what);
        }
        Failure::local(format!("cannot read {path} at byte {offset}"), error)
    }
}

impl Progress {
    fn by_path(&self) -> (u64, u64) {
        (self.rdma_bytes.load(Ordering::Relaxed), self.stream_bytes.load(Ordering::Relaxed))
    }

    fn written(&self) -> u64 {
        let (by_rdma, by_stream) = self.by_path();
        by_rdma + by_stream
    }
}

impl Report {
    fn new(args: &Put, created: bool, carried: Carried, flush: Option<Duration>) -> Self {
        Self {
            file: args.file.to_string(),
            created,
            carried,
            flush_us: flush.unwrap_or_default().as_micros(),
            durable: flush.is_some(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let durable = match self.durable {
            true => "durable",
            false => "NOT durable: the server offers no way here",
        };
        writeln!(f, "{}: {}, {durable}", self.file, self.carried)?;
        f.write_str(&self.carried.explanation())
    }
}

#[cfg(test)]
mod tests {
    use pinfold_client::Code;

    use super::*;
    use crate::args::{FileArg, Requests};

    #[test]
    fn a_file_that_was_cut_to_nothing_is_told_like_any_other_size() {
        let args = Put {
            local: "app.log".into(),
            file: FileArg { export: "data".to_owned(), path: "log".to_owned() },
            wait: 0,
            json: false,
            requests: Requests { chunk: 1 << 20, window: 8 },
        };
        let refused = |reason| Error::Refused {
            doing: "pin data/log".to_owned(),
            reason: Some(reason),
            code: Code::InvalidArgument,
            message: "bytes 0..0 hold nothing: the file is empty".to_owned(),
        };
        let cut = not_pinned(&args, 10, refused(Reason::BadRange));
        assert_eq!(cut.exit, Exit::Revoked);
        assert_eq!(cut.to_string(), changed_size(&args, 10, 0).to_string());
        assert!(cut.to_string().contains("its size from 10 to 0 bytes"), "{cut}");
        assert_eq!(not_pinned(&args, 10, refused(Reason::FileBusy)).exit, Exit::Busy);
    }
}
