//! The whole life of a guarded file, with each of its system calls failing once.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::{LEASES, reserved_pieces};
use crate::{
    Break, Create, Description, Error, Export, FenceFailed, GuardTier, LockKind, Mapping,
    RelativePath, Result, Under, Watcher, openers,
};

/// Only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(30);
const NEVER: Duration = Duration::from_secs(1_000_000);
const LEN: u64 = 8192;

/// Descriptors and maps are those of the process, so the runs have one to themselves.
#[test]
fn every_call_of_a_life_fails_once_and_leaves_nothing() {
    let me = std::env::current_exe().unwrap();
    let run = ["--exact", "fault::life::in_a_process_of_its_own", "--ignored", "--nocapture"];
    let ended = Command::new(me).args(run).output().unwrap();
    let said = String::from_utf8_lossy(&ended.stdout);
    print!("{said}");
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    assert!(said.contains("1 passed"), "it did not run");
}

#[test]
#[ignore = "run by every_call_of_a_life_fails_once_and_leaves_nothing"]
fn in_a_process_of_its_own() {
    let bench = Bench::new();
    let made = bench.every_call_fails_once(life_of_a_guard);
    let lasting = ["fsync", "fallocate", "pwrite", "msync", "fcntl(F_SETLEASE)", "flock"];
    for call in ["openat2", "open", "statx", "mmap", "munmap", "mprotect", "madvise"]
        .into_iter()
        .chain(lasting)
    {
        assert!(made.contains_key(call), "{call} was never made: {made:?}");
    }
    if is_capable() {
        let made = bench.every_call_fails_once(life_of_a_seal);
        assert!(made.contains_key("FS_IOC_SETFLAGS"), "{made:?}");
    }
}

/// Seals are for those who have this capability; without it the lab has to do.
fn is_capable() -> bool {
    use rustix::thread::{CapabilitySet, capabilities};
    capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::LINUX_IMMUTABLE))
}

struct Bench {
    folder: tempfile::TempDir,
    watcher: Watcher,
    breaks: Receiver<Break>,
}

/// What the process holds of the folder.
#[derive(Debug, Eq, PartialEq)]
struct Held {
    descriptors: Vec<PathBuf>,
    maps: Vec<String>,
    locks: Vec<String>,
    reserved: usize,
    files: Vec<PathBuf>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), [b'x'; LEN as usize]).unwrap();
        let (watcher, breaks) = Watcher::start_rescanning(NEVER).unwrap();
        Self { folder, watcher, breaks }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Which calls there were, and how often.
    fn every_call_fails_once(
        &self,
        body: fn(&Self, &Export) -> Result<()>,
    ) -> BTreeMap<&'static str, usize> {
        let life = |bench: &Self| {
            let export = Export::open(bench.folder.path())?;
            let leftovers = export.leftovers();
            let ended = body(bench, &export);
            drop(export);
            assert!(leftovers.are_gone(), "still open: {ended:?}");
            ended
        };
        life(self).unwrap();
        let before = self.held();
        let began = Instant::now();
        let mut made = BTreeMap::new();
        for n in 1.. {
            LEASES.arm(n);
            let ended = life(self);
            let Some(call) = LEASES.disarm() else {
                ended.unwrap();
                println!("{} calls failed, in {:?}: {made:?}", n - 1, began.elapsed());
                break;
            };
            *made.entry(call).or_insert(0) += 1;
            let about = format!("call {n}, {call}: {ended:?}");
            if let Err(error) = &ended {
                tells_of_the_file(error, self.folder.path());
            }
            // The fault is past: the file can be guarded anew, and what was left is cleared up.
            life(self).unwrap_or_else(|e| panic!("{e}, after {about}"));
            assert_eq!(self.held(), before, "after {about}");
        }
        made
    }

    fn held(&self) -> Held {
        let folder = self.folder.path();
        let links = fs::read_dir("/proc/self/fd").unwrap();
        let descriptors = links.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let of_folder = |line: &&str| line.contains(folder.to_str().unwrap());
        let inode = format!(":{}", fs::metadata(self.path("file")).unwrap().ino());
        let is_lock = |line: &&str| line.split(' ').any(|word| word.ends_with(&inode));
        let mut files: Vec<_> =
            fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        Held {
            descriptors: descriptors.filter(|target| target.starts_with(folder)).collect(),
            maps: maps.lines().filter(of_folder).map(str::to_owned).collect(),
            locks: openers::locks().lines().filter(is_lock).map(str::to_owned).collect(),
            reserved: reserved_pieces(&maps),
            files,
        }
    }
}

/// What has failed, why, and on which file: that is what the reader can act on.
fn tells_of_the_file(error: &Error, folder: &Path) {
    let text = error.to_string();
    assert!(text.contains(folder.to_str().unwrap()), "no file is named: {text}");
    assert!(error.source().is_some(), "no cause is given: {text}");
}

fn open(export: &Export) -> Result<Description> {
    export.locate(&RelativePath::parse("file").unwrap())?.open()
}

/// Somebody creates a file and removes it; a file is guarded, mapped, used, wanted by somebody else,
/// fenced and let go.
fn life_of_a_guard(bench: &Bench, export: &Export) -> Result<()> {
    let _lock = export.lock()?;
    create_and_remove(bench, export)?;

    let file = open(export)?;
    file.kind()?;
    {
        let armed = file.arm_at_most(&bench.watcher, GuardTier::Lease)?;
        armed.shrink(LEN, &mut |_| true)?;
        armed.grow(LEN, &mut |_| true)?;
    }
    let (guard, mapping) = file.arm(&bench.watcher)?.map(LEN)?;
    let share = mapping.share()?;
    let used = use_it(&file, &mapping);
    let wanted = format!(": > '{}'", bench.path("file").display());
    let mut breaker = Command::new("sh").args(["-c", &wanted]).spawn().unwrap();
    let news = bench.breaks.recv_timeout(DEADLINE).expect("no break was reported");
    assert_eq!(news.guard, guard.id());
    let fenced = match mapping.fence() {
        // Deregistering is a fence too.
        Err(FenceFailed::Kernel { .. }) => {
            drop(share);
            mapping.fence()
        }
        fenced => fenced,
    };
    let released = guard.release(fenced.unwrap()).unwrap();
    assert!(!released.lapsed, "it got through because we let go");
    assert!(breaker.wait().unwrap().success());
    used
}

fn create_and_remove(bench: &Bench, export: &Export) -> Result<()> {
    make_folder(bench, export)?;
    let name = RelativePath::parse("new").unwrap();
    let made = export.create(&name, &Create { size: LEN, mode: 0o600, dax: true });
    let unsure = matches!(made, Err(Error::NameNotDurable { .. }));
    let there = bench.path("new").exists();
    assert_eq!(made.is_ok() || unsure, there, "a failed creation leaves nothing");
    if unsure {
        fs::remove_file(bench.path("new")).unwrap();
    }
    let shrunk = made?
        .arm_at_most(&bench.watcher, GuardTier::Lease)
        .and_then(|armed| armed.shrink(LEN / 2, &mut |_| true));
    // Whether its name is gone for good is all that a removal can be unsure of.
    let removed = export.remove(&name);
    if bench.path("new").exists() {
        fs::remove_file(bench.path("new")).unwrap();
    }
    shrunk.map(drop).and(removed)
}

fn make_folder(bench: &Bench, export: &Export) -> Result<()> {
    let made = export.make_folder(&RelativePath::parse("folder").unwrap(), 0o700);
    assert_eq!(made.is_ok(), bench.path("folder").exists(), "a failed creation leaves nothing");
    if bench.path("folder").exists() {
        fs::remove_dir(bench.path("folder")).unwrap();
    }
    made.map(|made| assert!(made))
}

fn use_it(file: &Description, mapping: &Mapping) -> Result<()> {
    let _locked = file.lock_range(0..LEN, LockKind::Exclusive)?;
    mapping.populate(0..LEN, || true)?;
    file.layout()?;
    let mut byte = [0];
    mapping.write_at(b"y", 1)?;
    file.read_at(&mut byte, 1)?;
    assert_eq!(&byte, b"y");
    file.write_at(b"z", 1)?;
    mapping.read_at(&mut byte, 1)?;
    assert_eq!(&byte, b"z");
    mapping.share_for_flush().make_durable(0..LEN)?;
    let under = Under { tier: GuardTier::Lease, lapsed: &|| false };
    file.grow(2 * LEN, under, &mut |_| true).map(drop)
}

fn life_of_a_seal(bench: &Bench, export: &Export) -> Result<()> {
    let file = open(export)?;
    let (guard, mapping) = file.arm_to_seal(&bench.watcher)?.map(LEN)?;
    assert_eq!(guard.tier(), GuardTier::Sealed);
    let released = guard.release(mapping.fence().expect("no share is out")).unwrap();
    drop((mapping, file));
    if released.still_sealed {
        // As after a crash.
        let left = export.locate(&RelativePath::parse("file").unwrap())?;
        assert!(left.unseal()?);
    }
    Ok(())
}
