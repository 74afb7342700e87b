//! `pinfold get`: a pipeline from a pinned file into a local one.
//!
//! A fixed number of buffers go round: each is read into, written out in the order of the file, and
//! read into again. The local file gets its name when all of it is there.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fmt, process};

use pinfold_client::{Buffer, Error, Pin, PinRequest, ReadReport, Session};
use serde::Serialize;
use tokio::task::JoinHandle;

use crate::args::{Connection, FileArg, Get, TransportArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::transfer::{self, Carried};
use crate::{terminal, work};

const AGAIN: &str = "get it again";

#[derive(Debug, Serialize)]
struct Report {
    file: String,
    /// Null: standard output.
    local: Option<String>,
    #[serde(flatten)]
    carried: Carried,
}

/// Where the bytes go.
enum Target {
    Stdout(Arc<File>),
    File(Partial),
}

/// A file beside the one to be; gone with this value, unless it took its place.
struct Partial {
    file: Arc<File>,
    path: PathBuf,
    /// What it becomes.
    target: PathBuf,
    placed: bool,
}

/// How much has come.
#[derive(Default)]
struct Progress {
    rdma_bytes: u64,
    stream_bytes: u64,
}

/// One request.
struct Reading {
    len: usize,
    /// Aborted when this is dropped.
    task: JoinHandle<Result<(Buffer, ReadReport), Error>>,
}

/// Copies, and says how it went.
pub(crate) async fn run(connection: Connection, args: Get) -> Result<(), Failure> {
    let target = Target::prepare(&args.local)?;
    let transport = connection.transport;
    let to_stdout = target.is_stdout();
    let left_behind = target.left_behind();
    let carried =
        work::by_transport(connection, Some(args.requests.window), &left_behind, async |session| {
            get(session, transport, &args, target).await
        })
        .await?;
    let local = (!to_stdout).then(|| args.local.display().to_string());
    let report = Report { file: args.file.to_string(), local, carried };
    match (to_stdout, args.json) {
        (false, false) => terminal::print(&report.to_string()),
        (false, true) => terminal::print_json(&report),
        (true, false) => terminal::note(&report.to_string()),
        (true, true) => terminal::note_json(&report),
    }
}

async fn get(
    session: &Session,
    transport: TransportArg,
    args: &Get,
    target: Target,
) -> Result<Carried, Failure> {
    let begin = Instant::now();
    let FileArg { export, path } = &args.file;
    let stat = session.stat(export, path).await?;
    if stat.size == 0 {
        // There is nothing to pin.
        target.finish().await?;
        return Ok(Carried::new(begin, 0, 0));
    }
    let request =
        PinRequest::read(export, path).expect_identity(stat.identity).transport(transport.into());
    let request = request.wait(Duration::from_secs(args.wait.into()));
    // Before the pin, so that nothing about it is missed.
    let mut events = session.events();
    let pin = Arc::new(session.pin(request).await?);
    let len = pin.grant().usable().end;
    let mut progress = Progress::default();
    if let Err(failure) = copy(session, args, &pin, len, &target, &mut progress).await {
        let cause = transfer::explain(failure, &pin, &mut events).await;
        let what = format!(
            "cannot get {} into {}: of {len} bytes, {} were read; {}",
            args.file,
            args.local.display(),
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
    target.finish().await?;
    let carried = Carried::new(begin, progress.rdma_bytes, progress.stream_bytes).because(
        transport,
        session,
        pin.grant(),
    );
    if let Some(pin) = Arc::into_inner(pin) {
        // The bytes are where they should be; a pin that can't be given back ends with the session.
        let _ = pin.unpin().await;
    }
    Ok(carried)
}

async fn copy(
    session: &Session,
    args: &Get,
    pin: &Arc<Pin>,
    len: u64,
    target: &Target,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let chunk = transfer::chunk_bytes(args.requests.chunk, len, pin.grant());
    let bar = transfer::progress_bar(&args.file, len, args.json);
    let mut offsets = (0..len).step_by(chunk);
    let start = |offset: u64, buffer: Buffer| {
        let len = (len - offset).min(chunk as u64) as usize;
        let pin = pin.clone();
        let read = async move { pin.read(offset, len, buffer).await.map_err(Error::from) };
        Reading { len, task: tokio::spawn(read) }
    };
    let mut readings = VecDeque::new();
    for offset in offsets.by_ref().take(args.requests.window as usize) {
        readings.push_back(start(offset, session.buffer(chunk).await?));
    }
    while let Some(reading) = readings.pop_front() {
        let len = reading.len;
        let (buffer, report) = reading.done().await?;
        progress.rdma_bytes += report.rdma_bytes;
        progress.stream_bytes += report.stream_bytes;
        if report.rdma_bytes + report.stream_bytes != len as u64 {
            let what = "the server's device read fewer bytes than the pin has";
            return Err(Failure::new(Exit::Failure, what));
        }
        let buffer = target.write(buffer, len).await?;
        bar.inc(len as u64);
        if let Some(offset) = offsets.next() {
            readings.push_back(start(offset, buffer));
        }
    }
    bar.finish_and_clear();
    Ok(())
}

impl Reading {
    async fn done(mut self) -> Result<(Buffer, ReadReport), Failure> {
        match (&mut self.task).await {
            Ok(read) => Ok(read?),
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
    fn prepare(local: &Path) -> Result<Self, Failure> {
        if local == Path::new("-") {
            let failed = |error| Failure::local("cannot use standard output", error);
            let fd = io::stdout().as_fd().try_clone_to_owned().map_err(failed)?;
            return Ok(Self::Stdout(Arc::new(File::from(fd))));
        }
        Partial::make(local).map(Self::File)
    }

    fn is_stdout(&self) -> bool {
        matches!(self, Self::Stdout(_))
    }

    /// What is there if the rest never comes.
    fn left_behind(&self) -> String {
        match self {
            Self::Stdout(_) => "what standard output got is not all of it".to_owned(),
            Self::File(partial) => format!("{} is as it was", partial.target.display()),
        }
    }

    fn file(&self) -> &Arc<File> {
        match self {
            Self::Stdout(file) => file,
            Self::File(partial) => &partial.file,
        }
    }

    /// Appends the buffer's first `len` bytes; the buffer comes back.
    async fn write(&self, buffer: Buffer, len: usize) -> Result<Buffer, Failure> {
        let file = self.file().clone();
        let write = move || (&*file).write_all(&buffer.as_slice()[..len]).map(|()| buffer);
        blocking(write).await.map_err(|error| self.unwritable(error))
    }

    fn unwritable(&self, error: io::Error) -> Failure {
        match self {
            Self::Stdout(_) => Failure::local("cannot write to standard output", error),
            Self::File(partial) => {
                Failure::local(format!("cannot write {}", partial.path.display()), error)
            }
        }
    }

    /// All bytes are written: makes them last, under their name.
    async fn finish(self) -> Result<(), Failure> {
        match self {
            Self::Stdout(_) => Ok(()),
            Self::File(partial) => blocking(move || partial.place()).await,
        }
    }
}

impl Partial {
    fn make(local: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::local(format!("cannot write {}", local.display()), error);
        // The file that a link leads to is replaced, not the link.
        let target = match fs::canonicalize(local) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => local.to_owned(),
            Err(error) => return Err(failed(error)),
        };
        let before = match fs::metadata(&target) {
            Ok(metadata) if metadata.is_file() => Some(metadata),
            Ok(_) => {
                let what = format!("cannot replace {}: it is no regular file", local.display());
                return Err(
                    Failure::new(Exit::LocalIo, what).or_hint("name a file; - is standard output")
                );
            }
            Err(_) => None,
        };
        let Some(name) = target.file_name() else {
            let what = format!("{} names no file", local.display());
            return Err(Failure::new(Exit::LocalIo, what));
        };
        let mut beside = OsString::from(".");
        beside.push(name);
        beside.push(format!(".pinfold-{}", process::id()));
        let path = target.with_file_name(beside);
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed)?;
        let partial = Self { file: Arc::new(file), path, target, placed: false };
        if let Some(before) = before {
            partial.file.set_permissions(before.permissions()).map_err(failed)?;
        }
        Ok(partial)
    }

    fn place(mut self) -> Result<(), Failure> {
        let failed = |doing: &str, error| {
            Failure::local(format!("cannot {doing} {}", self.target.display()), error)
        };
        self.file.sync_all().map_err(|error| failed("make durable", error))?;
        fs::rename(&self.path, &self.target).map_err(|error| failed("replace", error))?;
        let folder = match self.target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        let outcome = synced.map_err(|error| failed("make durable the name of", error));
        self.placed = true;
        outcome
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.placed {
            // Nothing to be done about one that stays: it says whose it is.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Progress {
    fn read(&self) -> u64 {
        self.rdma_bytes + self.stream_bytes
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.local.as_deref().unwrap_or(&self.file), self.carried)?;
        f.write_str(&self.carried.explanation())
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_file_takes_its_name_only_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let local = folder.path().join("log");
        fs::write(&local, "before").unwrap();
        fs::set_permissions(&local, fs::Permissions::from_mode(0o640)).unwrap();
        let partial = Partial::make(&local).unwrap();
        (&*partial.file).write_all(b"after").unwrap();
        assert_eq!(fs::read(&local).unwrap(), b"before");
        partial.place().unwrap();
        assert_eq!(fs::read(&local).unwrap(), b"after");
        assert_eq!(fs::metadata(&local).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(folder.path()), ["log"]);
    }

    #[test]
    fn a_partial_file_is_gone_with_its_value() {
        let folder = tempfile::tempdir().unwrap();
        let partial = Partial::make(&folder.path().join("log")).unwrap();
        assert_eq!(names(folder.path()).len(), 1);
        drop(partial);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        fs::write(&real, "before").unwrap();
        symlink("real", &link).unwrap();
        Partial::make(&link).unwrap().place().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&real).unwrap().len(), 0);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        for wrong in ["/dev/null", "/", "/nonexistent/folder/file", ".."] {
            let refused = Partial::make(Path::new(wrong));
            assert!(matches!(&refused, Err(failure) if failure.exit == Exit::LocalIo), "{wrong}");
        }
    }
}
