//! Many files of one command: some at a time, each told of when it has ended, and a line for all.

use std::cell::RefCell;
use std::fmt;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Instant;

use serde::Serialize;

use crate::args::Copying;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::table::printable;
use crate::terminal;
use crate::transfer::{Carried, Copied, Job};
use crate::tree::{Found, Kind};

/// As many as a lane takes from one file.
const LARGEST_WINDOW: u32 = 256;

/// What is told of a file that was copied.
pub(crate) trait Outcome: Serialize + fmt::Display {
    fn copied(&self) -> &Copied;
}

/// Requests in flight at a time, over all files.
pub(crate) fn window(how: &Copying) -> u32 {
    how.requests.window.saturating_mul(how.parallel).min(LARGEST_WINDOW)
}

/// How far it has come. Shown as what is left behind if it comes no further.
#[derive(Debug)]
pub(crate) struct Tally {
    /// What is done to them: put, or got.
    done: &'static str,
    files: usize,
    bytes: u64,
    begin: Instant,
    counts: RefCell<Counts>,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Counts {
    files: usize,
    folders: usize,
    /// Neither files nor folders.
    left_out: usize,
    /// Files and folders.
    failed: usize,
    failed_folders: usize,
    kept_bytes: u64,
    #[serde(skip)]
    rdma_bytes: u64,
    #[serde(skip)]
    stream_bytes: u64,
}

/// One line of JSON.
#[derive(Serialize)]
struct Line<'a, T> {
    event: &'static str,
    #[serde(flatten)]
    told: &'a T,
}

#[derive(Serialize)]
struct LeftOut<'a> {
    file: &'a str,
    why: &'a str,
}

#[derive(Serialize)]
struct Failed<'a> {
    file: &'a str,
    /// As the exit code of a command for this file alone.
    exit: u8,
    error: &'a str,
}

#[derive(Serialize)]
struct Total {
    #[serde(flatten)]
    counts: Counts,
    #[serde(flatten)]
    carried: Carried,
}

impl Tally {
    pub(crate) fn new(done: &'static str, found: &[Found]) -> Self {
        let sizes = found.iter().filter_map(|found| match found.kind {
            Kind::File(len) => Some(len),
            Kind::FailedFile(_) => Some(0),
            _ => None,
        });
        let (files, bytes) = (sizes.clone().count(), sizes.sum());
        Self { done, files, bytes, begin: Instant::now(), counts: RefCell::default() }
    }

    /// Of all files, as far as it is known.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let there = self.counts.borrow().files;
        write!(
            f,
            "{there} of {} files were {}; with --resume the next one ",
            self.files, self.done
        )?;
        f.write_str("carries only what is missing")
    }
}

/// The files of one command.
pub(crate) struct Many<'a> {
    job: &'a Job<'a>,
    tally: &'a Tally,
    /// Why no more is begun.
    over: RefCell<Option<Failure>>,
    /// What was explained last: most files have it in common.
    explained: RefCell<String>,
}

impl<'a> Many<'a> {
    pub(crate) fn new(job: &'a Job<'a>, tally: &'a Tally) -> Self {
        Self { job, tally, over: RefCell::new(None), explained: RefCell::default() }
    }

    /// Makes the folders in their order, then copies the files. One that fails holds up no other, unless
    /// the session is lost.
    pub(crate) async fn copy<R: Outcome>(
        &self,
        found: Vec<Found>,
        name: impl Fn(&str) -> String,
        make_folder: impl AsyncFn(&str) -> Result<(), Failure>,
        copy_file: impl AsyncFn(String) -> Result<R, Failure>,
    ) -> Result<(), Failure> {
        let mut files = Vec::new();
        for Found { path, kind } in found {
            if self.is_over() {
                break;
            }
            match kind {
                Kind::File(_) => files.push(path),
                Kind::Folder => match make_folder(&path).await {
                    Ok(()) => self.tally.counts.borrow_mut().folders += 1,
                    Err(failure) => self.failed_folder(&name(&path), failure),
                },
                Kind::Other(why) => self.left_out(&name(&path), why),
                Kind::FailedFile(failure) => self.failed(&name(&path), failure),
                Kind::FailedFolder(failure) => self.failed_folder(&name(&path), failure),
            }
        }
        each(files, self.job.how.parallel as usize, async |path: String| {
            if self.is_over() {
                return;
            }
            let named = name(&path);
            match copy_file(path).await {
                Ok(report) => self.copied(&report),
                Err(failure) => self.failed(&named, failure),
            }
        })
        .await;
        self.end()
    }

    fn is_over(&self) -> bool {
        self.over.borrow().is_some()
    }

    fn copied<R: Outcome>(&self, report: &R) {
        {
            let copied = report.copied();
            let mut counts = self.tally.counts.borrow_mut();
            counts.files += 1;
            counts.kept_bytes += copied.kept_bytes;
            counts.rdma_bytes += copied.carried.rdma_bytes();
            counts.stream_bytes += copied.carried.stream_bytes();
        }
        self.tell(|json| match json {
            true => terminal::print_json(&Line { event: "file", told: report }),
            false => terminal::print(&self.shown(report)),
        });
    }

    /// What needs a reason has it once, as long as it is the same one.
    fn shown<R: Outcome>(&self, report: &R) -> String {
        let (shown, why) = (report.to_string(), report.copied().explanations());
        let again = *self.explained.borrow() == why;
        match shown.strip_suffix(&why) {
            Some(line) if again => return line.to_owned(),
            _ if !why.is_empty() => drop(self.explained.replace(why)),
            _ => {}
        }
        shown
    }

    fn left_out(&self, file: &str, why: &str) {
        self.tally.counts.borrow_mut().left_out += 1;
        self.tell(|json| match json {
            true => terminal::print_json(&Line { event: "left_out", told: &LeftOut { file, why } }),
            false => terminal::note(&format!("pinfold: {} is left out: {why}\n", printable(file))),
        });
    }

    fn failed(&self, file: &str, failure: Failure) {
        if failure.exit == Exit::Unreachable {
            self.over.borrow_mut().get_or_insert(failure);
            return;
        }
        self.tally.counts.borrow_mut().failed += 1;
        let report = failure.report();
        let exit = failure.exit as u8;
        self.tell(|json| match json {
            true => {
                let error = report.trim_end();
                terminal::print_json(&Line { event: "failed", told: &Failed { file, exit, error } })
            }
            // Names of a server's files may hold anything.
            false => report.lines().try_for_each(|line| terminal::note(&(printable(line) + "\n"))),
        });
    }

    fn failed_folder(&self, folder: &str, failure: Failure) {
        let before = self.tally.counts.borrow().failed;
        self.failed(folder, failure);
        let mut counts = self.tally.counts.borrow_mut();
        counts.failed_folders += counts.failed - before;
    }

    /// Beside the bar, if there is one. Who can't be told any more wants no more.
    fn tell(&self, tell: impl FnOnce(bool) -> Result<(), Failure>) {
        if let Err(failure) = self.job.bar.suspend(|| tell(self.job.how.json)) {
            self.over.borrow_mut().get_or_insert(failure);
        }
    }

    fn end(&self) -> Result<(), Failure> {
        self.job.bar.finish_and_clear();
        let Tally { done, files, begin, .. } = *self.tally;
        let counts = self.tally.counts.borrow().clone();
        let carried = Carried::new(begin, counts.rdma_bytes, counts.stream_bytes);
        let total = Total { counts, carried };
        self.tell(|json| match json {
            true => terminal::print_json(&Line { event: "total", told: &total }),
            false => terminal::print(&format!("{total}\n")),
        });
        if let Some(failure) = self.over.take() {
            return Err(failure.within(self.tally.to_string()));
        }
        match total.counts.failed {
            0 => Ok(()),
            _ => {
                let failed = total.counts.failures();
                let what =
                    format!("{failed} failed, {} of {files} files were {done}", total.counts.files);
                Err(Failure::new(Exit::Partial, what).or_hint(
                    "each is named above; with --resume the next one carries only what is missing",
                ))
            }
        }
    }
}

impl Counts {
    /// Such as "1 folder and 2 files".
    fn failures(&self) -> String {
        let counted = |count: usize, what: &str| {
            let plural = if count == 1 { "" } else { "s" };
            (count > 0).then(|| format!("{count} {what}{plural}"))
        };
        let files = counted(self.failed - self.failed_folders, "file");
        let folders = counted(self.failed_folders, "folder");
        folders.into_iter().chain(files).collect::<Vec<_>>().join(" and ")
    }
}

impl fmt::Display for Total {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { files, folders, left_out, failed, kept_bytes, .. } = self.counts;
        write!(f, "in all: {files} files and {folders} folders, {}", self.carried)?;
        for (count, what) in [
            (kept_bytes, "bytes were there"),
            (left_out as u64, "left out"),
            (failed as u64, "failed"),
        ] {
            if count > 0 {
                write!(f, ", {count} {what}")?;
            }
        }
        Ok(())
    }
}

/// Does this with each of them, so many at a time, on this task.
async fn each<T>(items: impl IntoIterator<Item = T>, at_a_time: usize, work: impl AsyncFn(T)) {
    let items = RefCell::new(items.into_iter());
    let worker = async || {
        loop {
            let next = items.borrow_mut().next();
            match next {
                Some(item) => work(item).await,
                None => return,
            }
        }
    };
    let mut running: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> = Vec::new();
    running.resize_with(at_a_time.max(1), || Box::pin(worker()));
    poll_fn(|context| {
        running.retain_mut(|worker| worker.as_mut().poll(context).is_pending());
        if running.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[tokio::test]
    async fn each_is_done_once_and_so_many_at_a_time() {
        let (under_way, most) = (Cell::new(0), Cell::new(0));
        let done = RefCell::new(Vec::new());
        each(0..20, 3, async |item| {
            under_way.set(under_way.get() + 1);
            most.set(most.get().max(under_way.get()));
            // Some end later than others that began later.
            for _ in 0..item % 4 {
                tokio::task::yield_now().await;
            }
            under_way.set(under_way.get() - 1);
            done.borrow_mut().push(item);
        })
        .await;
        assert_eq!(most.get(), 3);
        let mut done = done.into_inner();
        assert!(!done.is_sorted(), "one that takes its time holds up no other");
        done.sort_unstable();
        assert_eq!(done, (0..20).collect::<Vec<_>>());
        each(0..0, 0, async |_: i32| unreachable!()).await;
    }
}
