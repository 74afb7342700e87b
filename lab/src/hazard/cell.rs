//! One cell: a guarded file, a process that does something to it, and what was seen.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{LazyLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use pinfold_leases::{
    Break, BreakKind, Description, Error, Export, Guard, GuardState, GuardTier, Mapping,
    RelativePath, Watcher, waiting_breakers,
};

use super::list::Thing;
use super::place::Place;
use crate::{Pattern, tool};

/// Far beyond anything that works: only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(60);
/// No look at the guards but by signals.
const NEVER: Duration = Duration::from_secs(1_000_000);
/// Of each file: whole blocks, the half of which the breakers cut off.
const LEN: u64 = 64 << 10;

/// What one cell showed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Seen {
    /// No guard was granted: the process had the file open before.
    pub refused_us: bool,
    /// We were told, and before anything was done to the file.
    pub told: Option<BreakKind>,
    /// The process waited for us.
    pub waited: bool,
    /// How it ended.
    pub errno: Option<Errno>,
    /// The file was changed while it was ours.
    pub changed: bool,
}

/// What that means for who has the file mapped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// It waits, we are told.
    Held,
    /// It fails at once; whether we are told.
    Refused {
        /// Why it fails.
        errno: Errno,
        /// The guard was broken by it.
        told: bool,
    },
    /// Who has the file open already gets us no guard.
    NoGuard,
    /// It goes through at once, and we are told before it can do harm.
    Told,
    /// It goes through and moves no byte of the file.
    Harmless,
    /// It goes through, and the file is not what it was.
    NotCovered,
    /// The kernel or the file system has no such thing.
    Absent,
}

impl Seen {
    /// Sorts it.
    pub fn outcome(&self) -> Outcome {
        if self.refused_us {
            return Outcome::NoGuard;
        }
        match (self.told, self.waited, self.errno) {
            _ if self.changed => Outcome::NotCovered,
            (Some(_), true, _) => Outcome::Held,
            (None, _, Some(Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::ENOTTY)) => Outcome::Absent,
            (told, _, Some(errno)) => Outcome::Refused { errno, told: told.is_some() },
            (Some(_), false, None) => Outcome::Told,
            (None, _, None) => Outcome::Harmless,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Held => f.write_str("held"),
            Self::Refused { errno, told: true } => write!(f, "told, refused ({errno:?})"),
            Self::Refused { errno, told: false } => write!(f, "refused ({errno:?})"),
            Self::NoGuard => f.write_str("no guard"),
            Self::Told => f.write_str("told"),
            Self::Harmless => f.write_str("harmless"),
            Self::NotCovered => f.write_str("not covered"),
            Self::Absent => f.write_str("n/a"),
        }
    }
}

/// What runs cells, several at a time.
///
/// Between fork and exec a child holds all descriptors of this process, and keeps files open that
/// other cells believe closed. So nothing is guarded while a process is being started; several are
/// started at a time.
#[derive(Debug, Default)]
pub struct Bench {
    /// Shared by those who start a process, had alone by who guards a file.
    starting: RwLock<()>,
}

enum News {
    Break(Break),
    Ended(ExitStatus),
}

/// A process that waits for the word to begin.
pub(super) struct Process {
    child: Child,
    says: BufReader<ChildStdout>,
    hears: ChildStdin,
}

/// A guarded file.
pub(super) struct Held {
    pub(super) file: Description,
    pub(super) guard: Guard,
    mapping: Mapping,
    _watcher: Watcher,
    news: Receiver<News>,
    sender: Sender<News>,
}

impl Bench {
    /// Whether a tier is granted on a place: not all kernels have delegations, and not all file
    /// systems can be sealed.
    pub(super) fn grants(&self, place: &Place, tier: GuardTier) -> bool {
        let (_folder, path) = make(place.path());
        let held = match self.hold(&path, tier) {
            Err(Error::NoSeal { .. }) => return false,
            held => held.unwrap(),
        };
        let granted = held.guard.tier();
        held.release();
        granted == tier
    }

    /// One cell.
    pub fn run(&self, place: &Place, tier: GuardTier, thing: &Thing) -> Seen {
        let (_folder, path) = make(place.path());
        match thing {
            Thing::Does(name) => self.does(&path, tier, &[name]),
            Thing::Runs(argv) => self.does(&path, tier, &[&["run"], *argv].concat()),
            Thing::HasOpen(name) => self.has_open(&path, tier, name),
        }
    }

    /// A process does something to a guarded file.
    fn does(&self, path: &Path, tier: GuardTier, words: &[&str]) -> Seen {
        self.does_elsewhere(path, tier, words, path)
    }

    /// A process does something at another place than where the guarded file is.
    pub(super) fn does_elsewhere(
        &self,
        path: &Path,
        tier: GuardTier,
        words: &[&str],
        elsewhere: &Path,
    ) -> Seen {
        let process = self.start(words, elsewhere);
        let held = self.hold(path, tier).unwrap();
        held.watch(process)
    }

    /// A process does something by way of a server in the kernel, which does not wait itself but
    /// has its clients ask again.
    pub(super) fn does_remotely(
        &self,
        path: &Path,
        tier: GuardTier,
        thing: &str,
        there: &Path,
    ) -> Seen {
        let process = self.start(&[thing], there);
        let held = self.hold(path, tier).unwrap();
        held.watch_remote(process)
    }

    /// A process has the file open before anybody guards it.
    fn has_open(&self, path: &Path, tier: GuardTier, name: &str) -> Seen {
        let mut process = self.start(&[name], path);
        process.go_on();
        process.expect("open");
        match self.hold(path, tier) {
            Ok(held) => held.watch(process),
            Err(Error::Busy { openers, .. }) => {
                let pids: Vec<u32> = openers.iter().map(|opener| opener.pid).collect();
                assert_eq!(pids, [process.child.id()], "{name}: who has it open is named");
                process.go_on();
                process.child.wait().unwrap();
                Seen { refused_us: true, told: None, waited: false, errno: None, changed: false }
            }
            Err(error) => panic!("{name}: {error}"),
        }
    }

    /// Guards and maps a file.
    pub(super) fn hold(&self, path: &Path, tier: GuardTier) -> Result<Held, Error> {
        let _alone = self.starting.write().unwrap_or_else(PoisonError::into_inner);
        let export = Export::open(path.parent().unwrap())?;
        let name = RelativePath::parse(path.file_name().unwrap().to_str().unwrap())?;
        let file = export.locate(&name)?.open()?;
        let (watcher, breaks) = Watcher::start_rescanning(NEVER)?;
        let (guard, mapping) = match tier {
            GuardTier::Sealed => file.arm_to_seal(&watcher)?.map(LEN)?,
            tier => file.arm_at_most(&watcher, tier)?.map(LEN)?,
        };
        mapping.populate(0..LEN, || true)?;
        let (sender, news) = channel();
        let to = sender.clone();
        std::thread::spawn(move || {
            for news in breaks {
                if to.send(News::Break(news)).is_err() {
                    return;
                }
            }
        });
        Ok(Held { file, guard, mapping, _watcher: watcher, news, sender })
    }

    /// Starts the breaker, which has closed what it inherited when it says that it is ready.
    pub(super) fn start(&self, words: &[&str], path: &Path) -> Process {
        let _no_guard = self.starting.read().unwrap_or_else(PoisonError::into_inner);
        let mut command = Command::new(tool("examples/breaker"));
        command.arg("--wait").args(words).arg(path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let says = BufReader::new(child.stdout.take().unwrap());
        let hears = child.stdin.take().unwrap();
        let mut process = Process { child, says, hears };
        process.expect("ready");
        process
    }
}

impl Process {
    fn expect(&mut self, word: &str) {
        let mut line = String::new();
        self.says.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), word, "the breaker said {line:?}");
    }

    fn go_on(&mut self) {
        // Fails only if it has ended, which is seen next.
        let _ = self.hears.write_all(b"\n");
    }
}

impl Held {
    /// Follows a process to its end, and lets the guard go when it waits for that.
    pub(super) fn watch(self, process: Process) -> Seen {
        self.follow(process, Self::ended_without_us)
    }

    /// The same where no process stands in /proc/locks.
    fn watch_remote(self, process: Process) -> Seen {
        self.follow(process, |held| match held.news.try_recv() {
            Ok(News::Ended(status)) => Some(status),
            Ok(News::Break(_)) | Err(_) => None,
        })
    }

    fn follow(
        self,
        mut process: Process,
        ended_without_us: impl FnOnce(&Self) -> Option<ExitStatus>,
    ) -> Seen {
        let to = self.sender.clone();
        process.go_on();
        std::thread::spawn(move || {
            let ended = process.child.wait().unwrap();
            // Nobody listens when the cell has failed already.
            let _ = to.send(News::Ended(ended));
        });
        let (told, ended) = match self.next() {
            News::Break(news) => (Some(news.kind), None),
            News::Ended(status) => (self.told_late(), Some(status)),
        };
        let changed = !self.is_whole();
        let ended = ended.or_else(|| ended_without_us(&self));
        let waited = ended.is_none();
        self.guard.release(self.mapping.fence().unwrap()).unwrap();
        let status = ended.unwrap_or_else(|| {
            loop {
                if let News::Ended(status) = next(&self.news) {
                    break status;
                }
            }
        });
        Seen { refused_us: false, told, waited, errno: errno(status), changed }
    }

    /// Runs a process that leaves the guard alone, as is checked, and gives what it ended with.
    pub(super) fn undisturbed_by(&self, mut process: Process) -> Option<Errno> {
        process.go_on();
        let ended = process.child.wait().unwrap();
        // Of a seal on a file system that is shut down nothing can be known.
        assert!(!matches!(self.guard.state(), Ok(GuardState::Broken(_))), "{ended}");
        errno(ended)
    }

    fn next(&self) -> News {
        next(&self.news)
    }

    /// The process may end before the watcher's thread has come to the signal.
    fn told_late(&self) -> Option<BreakKind> {
        if self.guard.state().unwrap() == GuardState::Held {
            return None;
        }
        match self.next() {
            News::Break(news) => Some(news.kind),
            News::Ended(_) => unreachable!("a process ends once"),
        }
    }

    /// Waits until the kernel holds the process back, or it has ended: the signal comes before
    /// either.
    fn ended_without_us(&self) -> Option<ExitStatus> {
        let give_up = Instant::now() + DEADLINE;
        while Instant::now() < give_up {
            if let Ok(News::Ended(status)) = self.news.try_recv() {
                return Some(status);
            }
            if !waiting_breakers(self.file.identity()).is_empty() {
                return None;
            }
            std::thread::yield_now();
        }
        panic!("{}: neither waiting nor ended", self.file.path().display());
    }

    /// Whether size and content are what they were.
    pub(super) fn is_whole(&self) -> bool {
        let mut content = vec![0; LEN as usize];
        self.file.size().is_ok_and(|size| size == LEN)
            && self.file.read_at(&mut content, 0).is_ok()
            && content == *CONTENT
    }

    pub(super) fn release(self) {
        self.guard.release(self.mapping.fence().unwrap()).unwrap();
    }
}

fn next(news: &Receiver<News>) -> News {
    news.recv_timeout(DEADLINE).expect("neither a break nor the process's end")
}

/// The breaker ends with its errno; a program of others has no such habit.
fn errno(status: ExitStatus) -> Option<Errno> {
    match status.code() {
        Some(0) => None,
        Some(code) => Some(Errno::from_raw(code)),
        None => panic!("{status}"),
    }
}

/// A folder with a file, one of the same content and one of another beside it.
pub(super) fn make(mount_point: &Path) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir_in(mount_point).unwrap();
    let path = folder.path().join("file");
    for path in [&path, &path.with_extension("other"), &path.with_extension("same")] {
        let other = path.extension().is_some_and(|extension| extension == "other");
        fs::write(path, if other { &*OTHER_CONTENT } else { &*CONTENT }).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        fs::File::open(path).unwrap().sync_all().unwrap();
    }
    (folder, path)
}

static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| Pattern(3).bytes(0, LEN as usize));
static OTHER_CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| Pattern(4).bytes(0, LEN as usize));
