//! The state folder: what a server knows of its earlier runs. One server at a time has it.
//!
//! * `incarnation`: the last one, so that generations ascend from run to run.
//! * `lives`: which life each file is in, see [`log`].
//! * `lock`: locked (flock(2)) while a server uses the folder.

mod log;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use pinfold_leases::{FileIdentity, FileTimes};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::fence::vital;
use crate::ids::Life;
use crate::lives::Lives;
use crate::sync::locked;
use log::{Line, Log};

/// How often it is written down that the server is alive, while files are held.
const SIGN_EVERY: Duration = Duration::from_secs(1);
/// How long the end of a server waits between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct StateFolder {
    path: PathBuf,
    /// Locked until it is closed.
    lock: Mutex<Option<File>>,
}

impl StateFolder {
    /// Makes the folder if it is not there, and locks it.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let failed = |source| Error::StateFolder { path: path.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let mut options = OpenOptions::new();
        let lock = options.create(true).truncate(false).write(true).mode(0o600);
        let lock = lock.open(path.join("lock")).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), lock: Mutex::new(Some(lock)) }),
            Err(Errno::WOULDBLOCK) => Err(Error::StateFolderInUse { path: path.to_owned() }),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The incarnation of this run, above that of every run before. It is on the medium when this
    /// returns.
    pub(crate) fn next_incarnation(&self) -> Result<u64> {
        let path = self.path.join("incarnation");
        let failed = |source| Error::StateFolder { path: path.clone(), source };
        let last = match fs::read_to_string(&path) {
            Ok(text) => Some(parse_incarnation(&text).map_err(failed)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error)),
        };
        let next = incarnation_after(last, now_ns());
        self.replace("incarnation", format!("{next}\n").as_bytes()).map_err(failed)?;
        Ok(next)
    }

    /// Another server may have it from here on.
    fn unlock(&self) {
        let lock = locked(&self.lock).take();
        drop(lock);
    }

    /// Writes a file in place of another one, so that a crash leaves one of the two.
    fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let new = self.path.join(format!("{name}.new"));
        let mut options = OpenOptions::new();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, self.path.join(name))?;
        File::open(&self.path)?.sync_all()
    }
}

fn parse_incarnation(text: &str) -> io::Result<u64> {
    let parsed: Option<u64> = text.strip_suffix('\n').and_then(|number| number.parse().ok());
    parsed.filter(|last| *last < u64::MAX).ok_or_else(|| {
        let why = "it holds no incarnation; remove it, and the clock alone orders this run after \
                   earlier ones";
        io::Error::new(io::ErrorKind::InvalidData, why)
    })
}

/// Above the last one also when the clock went back; and where the last one is not known, most likely
/// above it.
fn incarnation_after(last: Option<u64>, now_ns: u64) -> u64 {
    last.map_or(now_ns, |last| now_ns.max(last.saturating_add(1)))
}

fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// The incarnation of a run without a state folder.
pub(crate) fn first_incarnation() -> u64 {
    incarnation_after(None, now_ns())
}

/// As files get their times: no change that comes later has an earlier one, unless the clock is set
/// back.
fn file_clock_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// The lives of files, remembered in the state folder if there is one.
#[derive(Debug)]
pub(crate) struct LifeBook {
    /// Shared by those who guard a file, until it is known to the registry or let go again.
    guarding: RwLock<()>,
    lives: Mutex<Lives>,
    log: Option<Arc<Log>>,
}

impl LifeBook {
    /// Of this run of the server. Without a folder it begins empty, and ends with the run.
    pub(crate) fn open(folder: Option<StateFolder>, incarnation: u64) -> Result<Self> {
        let mut lives = Lives::new(incarnation);
        let log = match folder {
            None => None,
            Some(folder) => {
                let path = folder.path.join("lives");
                let (log, known) = Log::open(folder, file_clock_ns())
                    .map_err(|source| Error::StateFolder { path, source })?;
                known.into_iter().for_each(|(file, life, past)| lives.remember(file, life, past));
                let log = Arc::new(log);
                let writer = Arc::downgrade(&log);
                vital("pinfold-state", move || log::keep(&writer, SIGN_EVERY, file_clock_ns))?;
                Some(log)
            }
        };
        Ok(Self { guarding: RwLock::default(), lives: Mutex::new(lives), log })
    }

    /// To be held from before a file is guarded until others can see that it is, or it is let go again:
    /// the folder is not given up meanwhile.
    pub(crate) fn guarding(&self) -> RwLockReadGuard<'_, ()> {
        self.guarding.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file is guarded now. `before` is when it had changed last before it was opened, `now` under
    /// the guard. Says which life it is in.
    pub(crate) fn guarded(&self, file: FileIdentity, before: FileTimes, now: FileTimes) -> Life {
        let at_ns = file_clock_ns();
        let life = locked(&self.lives).guarded(file, before.changed_ns, now.modified_ns);
        if let Some(log) = &self.log {
            log.add(Line::Held { file, life, at_ns });
        }
        life
    }

    /// Writes down at once which files are held, so that it is known if the server is killed right after
    /// this. May block: only once the fence knows the file.
    pub(crate) fn write_down(&self) {
        if let Some(log) = &self.log {
            log.write_if_free();
        }
    }

    /// The file is about to be let go: from here on others may change it.
    pub(crate) fn leaving(&self, file: FileIdentity) {
        if let Some(log) = &self.log {
            log.add(Line::Gone { file });
        }
    }

    /// The file was let go; it had been modified last at this time. `None`: that is not known, or
    /// somebody has had the file already.
    pub(crate) fn let_go(&self, file: FileIdentity, modified_ns: Option<u64>) {
        let life = locked(&self.lives).let_go(file, modified_ns);
        self.add_free(file, life, modified_ns);
    }

    /// See [`Lives::grown`].
    pub(crate) fn grown(&self, file: FileIdentity, before: Option<u64>, after: Option<u64>) {
        let life = locked(&self.lives).grown(file, before, after);
        self.add_free(file, life, after);
    }

    fn add_free(&self, file: FileIdentity, life: Option<Life>, modified_ns: Option<u64>) {
        let (Some(log), Some(life), Some(modified_ns)) = (&self.log, life, modified_ns) else {
            return;
        };
        log.add(Line::Free { file, life, modified_ns });
    }

    /// Nothing is held any more. Waits until all is written, at most until then, and gives the folder
    /// up. What is not written will count as unknown.
    pub(crate) fn close(&self, until: Instant) {
        let Some(log) = &self.log else { return };
        while Instant::now() < until {
            if let Ok(_nobody_guards) = self.guarding.try_write() {
                return log.close(until);
            }
            std::thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incarnations_ascend_whatever_the_clock_does() {
        assert_eq!(incarnation_after(None, 100), 100);
        assert_eq!(incarnation_after(Some(50), 100), 100);
        assert_eq!(incarnation_after(Some(100), 100), 101);
        assert_eq!(incarnation_after(Some(900), 100), 901, "the clock went back");
    }

    #[test]
    fn four_runs_ascend_and_two_at_once_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let run = || StateFolder::open(&path).unwrap().next_incarnation().unwrap();
        let runs = [(); 4].map(|()| run());
        assert!(runs.is_sorted_by(|one, next| one < next), "{runs:?}");
        let future = now_ns() + 1_000_000_000_000_000;
        fs::write(path.join("incarnation"), format!("{future}\n")).unwrap();
        assert_eq!([run(), run()], [future + 1, future + 2]);

        let _first = StateFolder::open(&path).unwrap();
        let second = StateFolder::open(&path).unwrap_err();
        assert!(matches!(second, Error::StateFolderInUse { .. }), "{second}");
    }

    #[test]
    fn an_incarnation_that_cant_be_read_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::open(folder.path()).unwrap();
        for bad in ["", "12", "x\n", "18446744073709551615\n"] {
            fs::write(folder.path().join("incarnation"), bad).unwrap();
            let refused = state.next_incarnation().unwrap_err();
            assert!(matches!(refused, Error::StateFolder { .. }), "{bad:?}: {refused}");
        }
    }

    const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };

    fn times(at_ns: u64) -> FileTimes {
        FileTimes { changed_ns: Some(at_ns), modified_ns: Some(at_ns) }
    }

    /// One run of a server, which ends by being killed.
    fn run(path: &Path, incarnation: u64) -> LifeBook {
        LifeBook::open(Some(StateFolder::open(path).unwrap()), incarnation).unwrap()
    }

    fn in_time() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn kill(book: &LifeBook) {
        book.log.as_ref().unwrap().unlock();
    }

    #[test]
    fn a_life_goes_on_in_the_next_run_if_nobody_has_changed_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let book = run(folder.path(), 1);
        let life = book.guarded(FILE, times(10), times(10));
        book.leaving(FILE);
        book.let_go(FILE, Some(20));
        book.close(in_time());
        let book = run(folder.path(), 2);
        assert_eq!(book.guarded(FILE, times(20), times(20)), life);
        book.leaving(FILE);
        book.let_go(FILE, Some(20));
        book.close(in_time());
        let book = run(folder.path(), 3);
        assert_ne!(book.guarded(FILE, times(21), times(21)), life);
        kill(&book);
    }

    #[test]
    fn after_a_kill_a_life_goes_on_only_if_the_file_is_older_than_the_last_sign() {
        let now = file_clock_ns();
        for (changed, goes_on) in [(10, true), (now + 1_000_000_000_000, false)] {
            let folder = tempfile::tempdir().unwrap();
            let book = run(folder.path(), 1);
            let life = book.guarded(FILE, times(10), times(10));
            book.write_down();
            kill(&book);
            let book = run(folder.path(), 2);
            // Not pinned in this run, and the runs after it know nothing better.
            kill(&book);
            let book = run(folder.path(), 3);
            let next = book.guarded(FILE, times(changed), times(changed));
            assert_eq!(next == life, goes_on, "{changed}");
            kill(&book);
        }
    }

    #[test]
    fn what_was_let_go_and_not_closed_in_the_log_is_unknown() {
        let folder = tempfile::tempdir().unwrap();
        let book = run(folder.path(), 1);
        let life = book.guarded(FILE, times(10), times(10));
        book.leaving(FILE);
        book.close(in_time());
        let book = run(folder.path(), 2);
        assert_ne!(book.guarded(FILE, times(10), times(10)), life);
        kill(&book);
    }
}
