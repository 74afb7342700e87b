//! `pinfold get`: a pipeline from a pinned file into a local one.
//!
//! A fixed number of buffers go round: each is read into, written out in the order of the file, and
//! read into again. The local file gets its name when all of it is there.

use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_client::{Buffer, Error, Pin, PinRequest, ReadReport};
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::args::{Connection, Copying, FileArg, FolderArg, Get};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::many::{self, Many, Outcome, Tally};
use crate::partial::{Partial, sync_name, write_in_order};
use crate::same::{self, Proof};
use crate::stamp::demand_two_files;
use crate::table::printable;
use crate::transfer::{self, Carried, Copied, Job, blocking};
use crate::{terminal, tree, work};

const AGAIN: &str = "get it again";

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    /// Null: standard output.
    local: Option<String>,
    #[serde(flatten)]
    copied: Copied,
}

/// Where the bytes go.
enum Target {
    Stdout(Arc<File>),
    File(Partial),
}

/// How a file was got.
struct Done {
    /// How long it took to read both again, if they were, and are the same.
    checked: Option<Duration>,
    /// What had the name was that already.
    in_place: bool,
}

/// How much has come.
#[derive(Default)]
struct Progress {
    rdma_bytes: u64,
    stream_bytes: u64,
    kept_bytes: u64,
}

/// One request.
struct Reading {
    offset: u64,
    len: usize,
    /// Aborted when this is dropped.
    task: JoinHandle<Result<(Buffer, Came), Failure>>,
}

/// What became of one.
enum Came {
    Read(ReadReport),
    /// It was there.
    Not,
}

/// Copies, and says how it went.
pub(crate) async fn run(connection: Connection, args: Get) -> Result<(), Failure> {
    if args.how.recursive {
        return get_folder(connection, args).await;
    }
    let (how, transport) = (args.how, connection.transport);
    let file = args.remote.file()?;
    let target = Target::prepare(&args.local, &how)?;
    let to_stdout = target.is_stdout();
    let left_behind = target.left_behind();
    let window = Some(how.requests.window);
    let report = work::by_transport(connection, window, &left_behind, async |session| {
        let bar = transfer::progress_bar(file.to_string(), 0, how.json);
        let job = Job { session, transport, how, bar: bar.clone() };
        let got = get(&job, &file, &args.local, target).await;
        bar.finish_and_clear();
        got
    })
    .await?;
    match (to_stdout, how.json) {
        (false, false) => terminal::print(&report.to_string()),
        (false, true) => terminal::print_json(&report),
        (true, false) => terminal::note(&report.to_string()),
        (true, true) => terminal::note_json(&report),
    }
}

/// Makes the folders, and copies the files, some at a time.
async fn get_folder(connection: Connection, args: Get) -> Result<(), Failure> {
    let (how, transport) = (args.how, connection.transport);
    let from = args.remote.folder()?;
    if args.local == Path::new("-") {
        return Err(Failure::new(Exit::Usage, "a folder cannot go to standard output"));
    }
    let window = Some(many::window(&how));
    let left_behind = "with --resume the next one carries only what is missing";
    work::by_transport(connection, window, left_behind, async |session| {
        let found = tree::of_export(session, &from).await?;
        make_folder(&args.local)?;
        let tally = Tally::new("got", &found);
        let bar = transfer::progress_bar(from.to_string(), tally.bytes(), how.json);
        let job = Job { session, transport, how, bar };
        let get_one = async |path: String| {
            let local = args.local.join(&path);
            let target = Target::prepare(&local, &how)?;
            get(&job, &from.join(&path), &local, target).await
        };
        let make = async |path: &str| make_folder(&args.local.join(path));
        let name = |path: &str| FolderArg::join(&from, path).to_string();
        Many::new(&job, &tally).copy(found, name, make, get_one).await
    })
    .await
}

/// Makes a folder, its name durable, unless it is there.
fn make_folder(path: &Path) -> Result<(), Failure> {
    let failed =
        |error| Failure::local(format!("cannot make the folder {}", path.display()), error);
    match fs::create_dir(path) {
        Ok(()) => sync_name(path).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

async fn get(
    job: &Job<'_>,
    file: &FileArg,
    local: &Path,
    target: Target,
) -> Result<Report, Failure> {
    let begin = Instant::now();
    let (session, FileArg { export, path }) = (job.session, file);
    let shown = (!target.is_stdout()).then(|| local.display().to_string());
    let report = |copied| Report { file: file.to_string(), local: shown, copied };
    let stat = session.stat(export, path).await?;
    if let Target::File(partial) = &target {
        let names = (file, local.display());
        demand_two_files(session, partial.before.as_deref(), stat.identity, names)?;
    }
    if stat.size == 0 {
        // There is nothing to pin.
        target.complete(0).await?;
        target.place().await?;
        return Ok(report(Copied::nothing(begin, job.how.verify)));
    }
    let request = PinRequest::read(export, path)
        .expect_identity(stat.identity)
        .transport(job.transport.into())
        .wait(job.wait());
    // Before the pin, so that nothing about it is missed.
    let mut events = session.events();
    let pin = Arc::new(session.pin(request).await?);
    let len = pin.grant().usable().end;
    if job.bar.length() == Some(0) {
        // Of a folder all sizes are known before.
        job.bar.set_length(len);
    }
    let mut progress = Progress::default();
    let proof = Arc::new(Proof::new(job.how.resume));
    let worked = work_on(job, &pin, len, &target, &proof, &mut progress).await;
    let Done { checked, in_place } = match worked {
        Ok(done) => done,
        Err(failure) => {
            let cause = transfer::explain(failure, &pin, &mut events).await;
            let what = format!(
                "cannot get {file} into {}: of {len} bytes, {} were read; {}",
                local.display(),
                progress.read(),
                target.left_behind(),
            );
            let failure = cause.within(what);
            return Err(match failure.exit {
                // It would only fail again.
                Exit::LocalIo => failure,
                _ => failure.or_hint(AGAIN),
            });
        }
    };
    if !in_place {
        target.place().await?;
    }
    // The check is no part of the rate.
    let begin = begin + checked.unwrap_or_default();
    let carried = Carried::new(begin, progress.rdma_bytes, progress.stream_bytes);
    let copied = Copied {
        size: len,
        carried: carried.because(job.transport, session, pin.grant()),
        kept_bytes: progress.kept_bytes,
        anew_because: proof.missing_because(),
        verified: checked.is_some(),
    };
    transfer::give_back(pin).await;
    Ok(report(copied))
}

/// From the first byte to the last check.
async fn work_on(
    job: &Job<'_>,
    pin: &Arc<Pin>,
    len: u64,
    target: &Target,
    proof: &Arc<Proof>,
    progress: &mut Progress,
) -> Result<Done, Failure> {
    if let Target::File(partial) = target
        && let Some(there) = partial.finished(len)
        && is_the_same(job, pin, &there, len).await?
    {
        progress.kept_bytes = len;
        job.bar.inc(len);
        let checked = job.how.verify.then_some(Duration::ZERO);
        return Ok(Done { checked, in_place: true });
    }
    copy(job, pin, len, target, proof, progress).await?;
    target.complete(len).await?;
    let checked = match target {
        Target::Stdout(_) => None,
        Target::File(partial) => job.verify(pin, &partial.file, len).await?,
    };
    Ok(Done { checked, in_place: false })
}

/// Whether an earlier command has done it all. What can't be told is not so.
async fn is_the_same(
    job: &Job<'_>,
    pin: &Arc<Pin>,
    there: &Arc<File>,
    len: u64,
) -> Result<bool, Failure> {
    match same::difference(pin, there, len, job.how.requests.window).await {
        Ok(difference) => Ok(difference.is_none()),
        Err(failure) if failure.library_error().is_some_and(same::cannot_be_told) => Ok(false),
        Err(failure) => Err(failure),
    }
}

async fn copy(
    job: &Job<'_>,
    pin: &Arc<Pin>,
    len: u64,
    target: &Target,
    proof: &Arc<Proof>,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let requests = job.how.requests;
    let chunk = transfer::chunk_bytes(requests.chunk, len, pin.grant());
    let mut offsets = (0..len).step_by(chunk);
    let start = |offset: u64, buffer: Buffer| {
        let len = (len - offset).min(chunk as u64) as usize;
        let (pin, proof) = (pin.clone(), proof.clone());
        let earlier = target.earlier(offset + len as u64);
        let read = async move {
            let mut buffer = buffer;
            if let Some(file) = earlier {
                buffer = read_again(file, offset, len, buffer).await?;
                if proof.has(&pin, offset, &buffer.as_slice()[..len]).await? {
                    return Ok((buffer, Came::Not));
                }
            }
            let (buffer, report) = pin.read(offset, len, buffer).await.map_err(Error::from)?;
            Ok((buffer, Came::Read(report)))
        };
        Reading { offset, len, task: tokio::spawn(read) }
    };
    let mut readings = VecDeque::new();
    for offset in offsets.by_ref().take(requests.window as usize) {
        readings.push_back(start(offset, job.session.buffer(chunk).await?));
    }
    while let Some(reading) = readings.pop_front() {
        let (offset, len) = (reading.offset, reading.len);
        let (mut buffer, came) = reading.done().await?;
        match came {
            Came::Not => progress.kept_bytes += len as u64,
            Came::Read(report) => {
                progress.rdma_bytes += report.rdma_bytes;
                progress.stream_bytes += report.stream_bytes;
                if report.rdma_bytes + report.stream_bytes != len as u64 {
                    let what = "the server's device read fewer bytes than the pin has";
                    return Err(Failure::new(Exit::Failure, what));
                }
                buffer = target.write(offset, buffer, len).await?;
            }
        }
        job.bar.inc(len as u64);
        if let Some(offset) = offsets.next() {
            readings.push_back(start(offset, buffer));
        }
    }
    Ok(())
}

/// What an earlier command has got.
async fn read_again(
    file: Arc<File>,
    offset: u64,
    len: usize,
    mut buffer: Buffer,
) -> Result<Buffer, Failure> {
    let read =
        move || file.read_exact_at(&mut buffer.as_mut_slice()[..len], offset).map(|()| buffer);
    blocking(read).await.map_err(|error| {
        Failure::local(format!("cannot read what was got before at byte {offset}"), error)
    })
}

impl Reading {
    async fn done(mut self) -> Result<(Buffer, Came), Failure> {
        match (&mut self.task).await {
            Ok(read) => read,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Target {
    /// Looks at the name before anything else is done, and makes the file beside it.
    fn prepare(local: &Path, how: &Copying) -> Result<Self, Failure> {
        if local != Path::new("-") {
            return Partial::make(local, how.resume).map(Self::File);
        }
        if how.resume || how.verify {
            let what = "what went to standard output cannot be read again: --resume and --verify \
                        need a file";
            return Err(Failure::new(Exit::Usage, what));
        }
        let failed = |error| Failure::local("cannot use standard output", error);
        let fd = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
        Ok(Self::Stdout(Arc::new(File::from(fd))))
    }

    fn is_stdout(&self) -> bool {
        matches!(self, Self::Stdout(_))
    }

    /// What is there if the rest never comes.
    fn left_behind(&self) -> String {
        match self {
            Self::Stdout(_) => "what standard output got is not all of it".to_owned(),
            Self::File(partial) => partial.left_behind(),
        }
    }

    /// What an earlier command has got, if it goes up to here.
    fn earlier(&self, end: u64) -> Option<Arc<File>> {
        match self {
            Self::File(partial) if partial.earlier >= end => Some(partial.file.clone()),
            _ => None,
        }
    }

    /// Appends the buffer's first `len` bytes, which are those at `offset`; the buffer comes back.
    async fn write(&self, offset: u64, buffer: Buffer, len: usize) -> Result<Buffer, Failure> {
        let written = match self {
            Self::Stdout(file) => {
                let file = file.clone();
                let write = move || (&*file).write_all(&buffer.as_slice()[..len]).map(|()| buffer);
                blocking(write).await
            }
            Self::File(partial) => {
                let (file, earlier) = (partial.file.clone(), partial.earlier);
                let write = move || {
                    write_in_order(&file, earlier, offset, &buffer.as_slice()[..len])
                        .map(|()| buffer)
                };
                blocking(write).await
            }
        };
        written.map_err(|error| self.unwritable(error))
    }

    fn unwritable(&self, error: io::Error) -> Failure {
        match self {
            Self::Stdout(_) => Failure::local("cannot write to standard output", error),
            Self::File(partial) => {
                Failure::local(format!("cannot write {}", partial.path.display()), error)
            }
        }
    }

    /// All bytes are written: makes them last.
    async fn complete(&self, len: u64) -> Result<(), Failure> {
        let Self::File(partial) = self else { return Ok(()) };
        let file = partial.file.clone();
        let completed = blocking(move || file.set_len(len).and_then(|()| file.sync_all()));
        completed.await.map_err(|error| self.unwritable(error))
    }

    /// Gives them their name.
    async fn place(self) -> Result<(), Failure> {
        match self {
            Self::Stdout(_) => Ok(()),
            Self::File(partial) => blocking(move || partial.place()).await,
        }
    }
}

impl Progress {
    fn read(&self) -> u64 {
        self.rdma_bytes + self.stream_bytes
    }
}

impl Outcome for Report {
    fn copied(&self) -> &Copied {
        &self.copied
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = printable(self.local.as_deref().unwrap_or(&self.file));
        writeln!(f, "{name}: {}", self.copied)?;
        f.write_str(&self.copied.explanations())
    }
}
