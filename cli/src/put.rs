//! `pinfold put`: a pipeline from a local file into a pinned one.
//!
//! A fixed number of buffers go round: each is filled from the local file, written by RDMA or by
//! stream, and filled again when the server has taken it.

use std::fs::{File, Metadata, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, io};

use indicatif::ProgressBar;
use pinfold_client::{
    Buffer, Created, Durability, Error, FileIdentity, IfExists, Pin, PinRequest, Reason, Session,
    Transport,
};
use rustix::fs::OFlags;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::args::{Connection, FileArg, FolderArg, Put};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::holes::{self, Pieces};
use crate::many::{self, Many, Outcome, Tally};
use crate::same::Proof;
use crate::stamp::{Stamp, demand_two_files};
use crate::table::printable;
use crate::transfer::{self, Carried, Copied, Job};
use crate::tree;
use crate::{terminal, work};

const AGAIN: &str =
    "put it again; with --resume what is there already is not carried a second time";

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    /// False where the file was there and was resized.
    created: bool,
    #[serde(flatten)]
    copied: Copied,
    /// Of holes of the local file: not carried, and zero there.
    hole_bytes: u64,
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
    /// Whether it reads as zeroes, so that holes need not be carried.
    blank: bool,
}

/// The local file.
#[derive(Debug)]
struct Source {
    file: Arc<File>,
    path: PathBuf,
    len: u64,
    /// As it was when it was opened.
    metadata: Metadata,
}

/// How far a copy has come; shared by its workers.
#[derive(Debug)]
struct Progress {
    pieces: Mutex<Pieces>,
    /// Whether the holes are carried too.
    dense: bool,
    /// Bytes that a worker has read …
    taken: AtomicU64,
    /// … that were there already …
    kept: AtomicU64,
    /// … and that the server has taken, by path.
    rdma_bytes: AtomicU64,
    stream_bytes: AtomicU64,
    proof: Proof,
}

/// Copies, commits, and says how it went.
pub(crate) async fn run(connection: Connection, args: Put) -> Result<(), Failure> {
    if args.how.recursive {
        return put_folder(connection, args).await;
    }
    let (how, transport) = (args.how, connection.transport);
    let file = args.remote.file()?;
    let source = Source::open(&args.local, OFlags::empty())?;
    let left_behind = format!("{file} is incomplete on the server; --resume goes on there");
    let window = Some(how.requests.window);
    let report = work::by_transport(connection, window, &left_behind, async |session| {
        let bar = transfer::progress_bar(file.to_string(), source.len, how.json);
        let put = put(&Job { session, transport, how, bar: bar.clone() }, source, &file).await;
        bar.finish_and_clear();
        put
    })
    .await?;
    if how.json { terminal::print_json(&report) } else { terminal::print(&report.to_string()) }
}

/// Makes the folders, and copies the files, some at a time.
async fn put_folder(connection: Connection, args: Put) -> Result<(), Failure> {
    let (how, transport) = (args.how, connection.transport);
    let to = args.remote.folder()?;
    let found = tree::of_folder(&args.local)?;
    let tally = Tally::new("put", &found);
    let window = Some(many::window(&how));
    work::by_transport(connection, window, &tally, async |session| {
        let bar = transfer::progress_bar(to.to_string(), tally.bytes(), how.json);
        let job = Job { session, transport, how, bar };
        if !to.path.is_empty() {
            session.make_folder(&to.export, &to.path).await?;
        }
        let many = Many::new(&job, &tally);
        let put_one = async |path: String| {
            let source = Source::open(&args.local.join(&path), OFlags::NOFOLLOW)?;
            put(&job, source, &to.join(&path)).await
        };
        let make = async |path: &str| make_folder(session, &to, path).await;
        many.copy(found, |path| to.join(path).to_string(), make, put_one).await
    })
    .await
}

async fn make_folder(session: &Session, to: &FolderArg, path: &str) -> Result<(), Failure> {
    let FileArg { export, path } = to.join(path);
    session.make_folder(&export, &path).await?;
    Ok(())
}

async fn put(job: &Job<'_>, source: Source, file: &FileArg) -> Result<Report, Failure> {
    let begin = Instant::now();
    let (source, session) = (Arc::new(source), job.session);
    let give_up = begin + job.wait();
    demand_another_file(session, &source, file).await?;
    let made = make_room(job, &source, file, give_up).await?;
    transfer::allocated(job, file);
    if source.len == 0 {
        // Its name is durable, and there is nothing to pin.
        demand_unchanged(&source, file)?;
        let copied = Copied::nothing(begin, job.how.verify);
        return Ok(Report::new(file, made.created, copied, Some(Duration::ZERO)));
    }
    // Exclusive: with two copies at once the file would end up with stripes of both, and a reader would
    // get a mixture. It also keeps what `--resume` has compared.
    let mut request = PinRequest::read_write(&file.export, &file.path)
        .exclusive()
        .expect_identity(made.identity)
        .transport(job.transport.into())
        .wait(left_until(give_up));
    if made.size != source.len {
        request = request.range(0..source.len);
    }
    // Before the pin, so that nothing about it is missed.
    let mut events = session.events();
    let pinned = session.pin(request).await;
    let pin = Arc::new(pinned.map_err(|error| not_pinned(&source, file, error))?);
    check_size(&source, file, made.size, pin.grant().valid_end)?;
    let progress = Arc::new(Progress::new(job, &source, &made, &pin));
    let committed = match copy(job, &source, &pin, &progress).await {
        Ok(()) => commit(&pin).await,
        Err(failure) => Err(failure),
    };
    let flush = match committed {
        Ok(flush) => flush,
        Err(failure) => {
            let cause = transfer::explain(failure, &pin, &mut events).await;
            return Err(cause.within(incomplete(&source, file, &progress)).or_hint(AGAIN));
        }
    };
    let checked = match job.verify(&pin, &source.file, source.len).await {
        Ok(checked) => checked,
        Err(failure) => {
            let cause = transfer::explain(failure, &pin, &mut events).await;
            return Err(unverified(&source, file, flush, cause));
        }
    };
    demand_unchanged(&source, file)?;
    let (by_rdma, by_stream) = progress.by_path();
    // The check is no part of the rate.
    let carried = Carried::new(begin + checked.unwrap_or_default(), by_rdma, by_stream);
    let copied = Copied {
        size: source.len,
        carried: carried.because(job.transport, session, pin.grant()),
        kept_bytes: progress.kept.load(Ordering::Relaxed),
        anew_because: progress.proof.missing_because(),
        verified: checked.is_some(),
    };
    transfer::give_back(pin).await;
    Ok(Report::new(file, made.created, copied, flush))
}

/// The file that is on the server may be the local one.
async fn demand_another_file(
    session: &Session,
    source: &Source,
    file: &FileArg,
) -> Result<(), Failure> {
    if !session.is_on_server_host() {
        return Ok(());
    }
    match session.stat(&file.export, &file.path).await {
        Ok(there) => {
            let names = (source.path.display(), file);
            demand_two_files(session, Some(&source.metadata), there.identity, names)
        }
        // There is none yet, or the next call is refused for the same reason.
        Err(error) if error.reason().is_some() => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What was read at different times need not belong together.
fn demand_unchanged(source: &Source, file: &FileArg) -> Result<(), Failure> {
    let path = source.path.display();
    let unreadable = |error| Failure::local(format!("cannot look at {path} again"), error);
    match Stamp::of(&source.metadata).change(&source.file).map_err(unreadable)? {
        None => Ok(()),
        Some(change) => {
            let what = format!(
                "{path} changed while it was copied into {file}: {change}; the copy may be a mixture \
                 of old and new bytes"
            );
            Err(Failure::new(Exit::Differs, what)
                .or_hint("put it again, while no program writes to it"))
        }
    }
}

/// Makes the file as long as the local one. A device has the size that it has: there it must fit.
async fn make_room(
    job: &Job<'_>,
    source: &Source,
    file: &FileArg,
    give_up: Instant,
) -> Result<Room, Failure> {
    let len = source.len;
    let refused = match create_when_free(job, file, len, give_up).await {
        Ok(made) if made.created => return Ok(Room::of(made, len, true)),
        Ok(made) => return blank(job, source, file, made).await,
        Err(refused) if refused.reason() == Some(Reason::FixedSize) => refused,
        Err(refused) => return Err(refused.into()),
    };
    let device = job.session.stat(&file.export, &file.path).await?;
    if device.size < len {
        let (local, size) = (source.path.display(), device.size);
        let why = format!("cannot put {local} ({len} bytes) into {file}, of {size} bytes");
        return Err(Failure::from(refused).within(why));
    }
    Ok(Room { identity: device.identity, created: false, size: device.size, blank: false })
}

/// Of a file that was there: where the local one has holes it is made anew, so that it reads as zeroes.
/// Not if it is to be gone on with: then what there is in the holes is compared, and overwritten.
async fn blank(
    job: &Job<'_>,
    source: &Source,
    file: &FileArg,
    made: Created,
) -> Result<Room, Failure> {
    let unreadable = |error| source.unreadable(0, error);
    if job.how.resume || !holes::has_holes(&source.file, source.len).map_err(unreadable)? {
        return Ok(Room::of(made, source.len, false));
    }
    let FileArg { export, path } = file;
    job.session.create(export, path, 0, IfExists::Resize).await?;
    let shown = transfer::allocation(job, file);
    let again =
        job.session.create_with_progress(export, path, source.len, IfExists::Resize, shown).await?;
    Ok(Room { created: made.created, ..Room::of(again, source.len, true) })
}

/// Makes the file, or gives it another size, as soon as nobody has it open. Only a pin can wait for that.
async fn create_when_free(
    job: &Job<'_>,
    file: &FileArg,
    len: u64,
    give_up: Instant,
) -> Result<Created, Error> {
    let FileArg { export, path } = file;
    let session = job.session;
    loop {
        let shown = transfer::allocation(job, file);
        let made = session.create_with_progress(export, path, len, IfExists::Resize, shown).await;
        let refused = match made {
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
fn not_pinned(source: &Source, file: &FileArg, error: Error) -> Failure {
    match error.reason() {
        Some(Reason::BadRange) => changed_size(source, file, source.len, 0),
        _ => error.into(),
    }
}

/// Between its making and its pin the file is anybody's: one that was cut takes only a part of the
/// bytes, and one that grew would keep more behind them.
fn check_size(source: &Source, file: &FileArg, made: u64, found: u64) -> Result<(), Failure> {
    if found == made {
        return Ok(());
    }
    Err(changed_size(source, file, made, found))
}

fn changed_size(source: &Source, file: &FileArg, made: u64, found: u64) -> Failure {
    let what = format!(
        "cannot put {} into {file}: a process on the storage host changed its size from {made} to \
         {found} bytes meanwhile",
        source.path.display(),
    );
    Failure::new(Exit::Revoked, what).or_hint(AGAIN)
}

/// All of it was put, but the check at the end says something else, or nothing.
fn unverified(source: &Source, file: &FileArg, flush: Option<Duration>, cause: Failure) -> Failure {
    let committed = if flush.is_some() { " and committed" } else { "" };
    let but = match cause.exit {
        Exit::Differs => "is not the same",
        _ => "could not be verified",
    };
    cause.within(format!("{} was put into {file}{committed}, but {but}", source.path.display()))
}

/// What is known about the bytes when a copy fails: the commit comes last.
fn incomplete(source: &Source, file: &FileArg, progress: &Progress) -> String {
    let written = progress.written();
    let kept = progress.kept.load(Ordering::Relaxed);
    let taken = progress.taken.load(Ordering::Relaxed);
    format!(
        "cannot put {} into {file}: of {} bytes, none is known to be committed, {written} were \
         written, {} are in doubt",
        source.path.display(),
        source.len,
        taken.saturating_sub(written + kept),
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
    job: &Job<'_>,
    source: &Arc<Source>,
    pin: &Arc<Pin>,
    progress: &Arc<Progress>,
) -> Result<(), Failure> {
    let requests = job.how.requests;
    let chunk = transfer::chunk_bytes(requests.chunk, source.len, pin.grant());
    let workers = source.len.div_ceil(chunk as u64).min(requests.window.into());
    let mut running = JoinSet::new();
    for _ in 0..workers {
        let worker = Worker {
            source: source.clone(),
            pin: pin.clone(),
            progress: progress.clone(),
            bar: job.bar.clone(),
        };
        running.spawn(worker.run(job.session.buffer(chunk).await?));
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
    job.bar.inc(source.len.saturating_sub(progress.taken.load(Ordering::Relaxed)));
    outcome
}

struct Worker {
    source: Arc<Source>,
    pin: Arc<Pin>,
    progress: Arc<Progress>,
    bar: ProgressBar,
}

impl Worker {
    async fn run(self, mut buffer: Buffer) -> Result<(), Failure> {
        let progress = &self.progress;
        loop {
            let (filled, piece) =
                Source::fill(self.source.clone(), progress.clone(), buffer).await?;
            let Some(Range { start, end }) = piece else { return Ok(()) };
            let len = (end - start) as usize;
            if progress.proof.has(&self.pin, start, &filled.as_slice()[..len]).await? {
                progress.kept.fetch_add(len as u64, Ordering::Relaxed);
                buffer = filled;
            } else {
                let report;
                (buffer, report) = self.pin.write(start, filled, len).await.map_err(Error::from)?;
                progress.rdma_bytes.fetch_add(report.rdma_bytes, Ordering::Relaxed);
                progress.stream_bytes.fetch_add(report.stream_bytes, Ordering::Relaxed);
            }
            self.bar.inc(len as u64);
        }
    }
}

impl Room {
    fn of(made: Created, size: u64, blank: bool) -> Self {
        Self { identity: made.identity, created: made.created, size, blank }
    }
}

impl Source {
    /// Not by waiting: a FIFO without a writer is no file either.
    fn open(path: &Path, flags: OFlags) -> Result<Self, Failure> {
        let failed = |error| Failure::local(format!("cannot open {}", path.display()), error);
        let flags = (flags | OFlags::NONBLOCK).bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            let failure =
                Failure::new(Exit::LocalIo, format!("{} is no regular file", path.display()));
            return Err(match metadata.is_dir() {
                true => failure.or_hint("a folder is copied with -r"),
                false => failure,
            });
        }
        let (path, len) = (path.to_owned(), metadata.len());
        Ok(Self { file: Arc::new(file), path, len, metadata })
    }

    /// Reads the next piece into the buffer, which comes back; without one at the end.
    async fn fill(
        source: Arc<Self>,
        progress: Arc<Progress>,
        mut buffer: Buffer,
    ) -> Result<(Buffer, Option<Range<u64>>), Failure> {
        let read = move || {
            let next = progress.next(&source).map_err(|error| source.unreadable(0, error))?;
            let Some(piece) = next else { return Ok((buffer, None)) };
            let bytes = &mut buffer.as_mut_slice()[..(piece.end - piece.start) as usize];
            source
                .file
                .read_exact_at(bytes, piece.start)
                .map_err(|error| source.unreadable(piece.start, error))?;
            progress.taken.fetch_add(piece.end - piece.start, Ordering::Relaxed);
            Ok((buffer, Some(piece)))
        };
        transfer::blocking(read).await
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
    fn new(job: &Job<'_>, source: &Source, made: &Room, pin: &Pin) -> Self {
        let grant = pin.grant();
        let chunk = transfer::chunk_bytes(job.how.requests.chunk, source.len, grant);
        let pieces = Pieces::new(source.len, chunk, transfer::alignment_bytes(grant));
        Self {
            pieces: Mutex::new(pieces),
            dense: !made.blank,
            taken: AtomicU64::new(0),
            kept: AtomicU64::new(0),
            rdma_bytes: AtomicU64::new(0),
            stream_bytes: AtomicU64::new(0),
            proof: Proof::new(job.how.resume && !made.created),
        }
    }

    fn next(&self, source: &Source) -> io::Result<Option<Range<u64>>> {
        // A step that fails changes nothing.
        let mut pieces = self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        pieces.next(|at| match self.dense {
            true => Ok(Some(at..source.len)),
            false => holes::data_from(&source.file, at),
        })
    }

    fn by_path(&self) -> (u64, u64) {
        (self.rdma_bytes.load(Ordering::Relaxed), self.stream_bytes.load(Ordering::Relaxed))
    }

    fn written(&self) -> u64 {
        let (by_rdma, by_stream) = self.by_path();
        by_rdma + by_stream
    }
}

impl Report {
    fn new(file: &FileArg, created: bool, copied: Copied, flush: Option<Duration>) -> Self {
        let carried = copied.carried.rdma_bytes() + copied.carried.stream_bytes();
        Self {
            file: file.to_string(),
            created,
            hole_bytes: copied.size.saturating_sub(carried + copied.kept_bytes),
            copied,
            flush_us: flush.unwrap_or_default().as_micros(),
            durable: flush.is_some(),
        }
    }
}

impl Outcome for Report {
    fn copied(&self) -> &Copied {
        &self.copied
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let durable = match self.durable {
            true => "durable",
            false => "NOT durable: the server offers no way here",
        };
        write!(f, "{}: {}", printable(&self.file), self.copied)?;
        if self.hole_bytes > 0 {
            write!(f, ", {} in holes", self.hole_bytes)?;
        }
        writeln!(f, ", {durable}")?;
        f.write_str(&self.copied.explanations())
    }
}

#[cfg(test)]
mod tests {
    use pinfold_client::Code;

    use super::*;

    #[test]
    fn a_file_that_was_cut_to_nothing_is_told_like_any_other_size() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        let source = Source { file: file.into(), path: "app.log".into(), len: 10, metadata };
        let file = FileArg { export: "data".to_owned(), path: "log".to_owned() };
        let refused = |reason| Error::Refused {
            doing: "pin data/log".to_owned(),
            reason: Some(reason),
            code: Code::InvalidArgument,
            message: "bytes 0..0 hold nothing: the file is empty".to_owned(),
        };
        let cut = not_pinned(&source, &file, refused(Reason::BadRange));
        assert_eq!(cut.exit, Exit::Revoked);
        assert_eq!(cut.to_string(), changed_size(&source, &file, 10, 0).to_string());
        assert!(cut.to_string().contains("its size from 10 to 0 bytes"), "{cut}");
        assert_eq!(not_pinned(&source, &file, refused(Reason::FileBusy)).exit, Exit::Busy);
    }
}
