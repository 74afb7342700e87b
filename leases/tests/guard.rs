//! Real leases on this machine's own file systems: what breaks them, and that nobody gets through
//! before the fence. Delegations and DAX are in the lab.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pinfold_leases::{
    Break, BreakKind, Create, Description, Error, Export, FenceFailed, GuardState, GuardTier,
    RelativePath, Resized, Watcher, waiting_breakers,
};

/// Far beyond anything that works; only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(30);
const NEVER: Duration = Duration::from_secs(1_000_000);

/// Between fork and exec a child holds all our descriptors, those of other tests too, and keeps
/// their files open while they believe them closed. So one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

struct Bench {
    _alone: MutexGuard<'static, ()>,
    _folder: tempfile::TempDir,
    path: PathBuf,
    export: Export,
    watcher: Watcher,
    breaks: Receiver<Break>,
}

impl Bench {
    /// A file of 8192 bytes "x".
    fn new() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [b'x'; 8192]).unwrap();
        let export = Export::open(folder.path()).unwrap();
        // Only signals: a rescan would find a break whose signal was lost.
        let (watcher, breaks) = Watcher::start_rescanning(NEVER).unwrap();
        Self { _alone: alone, _folder: folder, path, export, watcher, breaks }
    }

    fn open(&self) -> Description {
        self.export.locate(&name("file")).unwrap().open().unwrap()
    }

    fn next_break(&self) -> Break {
        self.breaks.recv_timeout(DEADLINE).expect("no break was reported")
    }
}

fn name(path: &str) -> RelativePath {
    RelativePath::parse(path).unwrap()
}

/// Starts a process that empties the file: it blocks until the lease is let go.
fn truncater(path: &Path) -> Child {
    Command::new("sh").arg("-c").arg(": > \"$1\"").arg("sh").arg(path).spawn().unwrap()
}

fn reader(path: &Path) -> Child {
    Command::new("cat").arg(path).stdout(std::process::Stdio::null()).spawn().unwrap()
}

#[test]
fn a_truncate_waits_until_the_release() {
    let bench = Bench::new();
    let file = bench.open();
    let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(8192).unwrap();
    assert_eq!(guard.state().unwrap(), GuardState::Held);

    let mut child = truncater(&bench.path);
    let news = bench.next_break();
    assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Writer));
    assert_eq!(file.size().unwrap(), 8192, "the file is whole when we are told");
    // The kernel signals us a moment before it puts the breaker to sleep.
    let give_up = std::time::Instant::now() + DEADLINE;
    let waiting = loop {
        let waiting: Vec<u32> = waiting_breakers(file.identity()).iter().map(|o| o.pid).collect();
        if !waiting.is_empty() || std::time::Instant::now() > give_up {
            break waiting;
        }
        std::thread::yield_now();
    };
    assert_eq!(waiting, [child.id()], "the kernel names who waits");
    assert!(child.try_wait().unwrap().is_none(), "the truncater is held back");

    let released = guard.release(mapping.fence().unwrap()).unwrap();
    assert_eq!(released.broken, Some(BreakKind::Writer));
    assert!(!released.lapsed, "it got through because we let go");
    assert!(child.wait().unwrap().success());
    assert_eq!(file.size().unwrap(), 0);
}

#[test]
fn a_reader_breaks_the_guard_too() {
    let bench = Bench::new();
    let file = bench.open();
    let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(8192).unwrap();
    let mut child = reader(&bench.path);
    assert_eq!(bench.next_break().kind, BreakKind::Reader);
    let released = guard.release(mapping.fence().unwrap()).unwrap();
    assert_eq!(released.broken, Some(BreakKind::Reader));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_second_break_after_arming_again_is_signalled() {
    let bench = Bench::new();
    let file = bench.open();
    let mut old = Vec::new();
    for _ in 0..3 {
        let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(8192).unwrap();
        let mut child = truncater(&bench.path);
        let news = bench.next_break();
        assert_eq!(news.guard, guard.id());
        guard.release(mapping.fence().unwrap()).unwrap();
        assert!(child.wait().unwrap().success());
        // An older, fenced mapping of the same description does not stand in the way.
        old.push(mapping);
    }
}

#[test]
fn a_file_that_others_have_open_is_refused_and_they_are_named() {
    let bench = Bench::new();
    let other = std::fs::File::open(&bench.path).unwrap();
    let refused = bench.open().arm(&bench.watcher).unwrap_err();
    let Error::Busy { openers, .. } = &refused else { panic!("{refused}") };
    assert_eq!(openers.len(), 1);
    assert_eq!(openers[0].pid, std::process::id());
    let text = refused.to_string();
    assert!(text.contains("reading") && text.contains(&openers[0].command), "{text}");
    drop(other);
    bench.open().arm(&bench.watcher).unwrap();
}

#[test]
fn a_description_takes_one_guard_at_a_time() {
    let bench = Bench::new();
    let file = bench.open();
    let armed = file.arm(&bench.watcher).unwrap();
    assert!(matches!(file.arm(&bench.watcher), Err(Error::AlreadyArmed { .. })));
    drop(armed);
    file.arm(&bench.watcher).unwrap();
}

#[test]
fn an_armed_file_without_a_mapping_is_let_go_by_dropping_it() {
    let bench = Bench::new();
    let file = bench.open();
    drop(file.arm(&bench.watcher).unwrap());
    assert!(truncater(&bench.path).wait().unwrap().success());
}

#[test]
fn a_fence_makes_the_mapping_inaccessible_and_keeps_its_addresses() {
    let bench = Bench::new();
    let (guard, mapping) = bench.open().arm(&bench.watcher).unwrap().map(8192).unwrap();
    let share = mapping.share().unwrap();
    let start = format!("{:x}-", share.as_ptr() as usize);
    let protection = || {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .find(|l| l.starts_with(&start))
            .map(|l| l.split(' ').nth(1).unwrap().to_owned())
    };
    assert_eq!(protection().as_deref(), Some("rw-s"));
    guard.release(mapping.fence().unwrap()).unwrap();
    assert_eq!(protection().as_deref(), Some("---s"));
    assert!(matches!(mapping.share(), Err(Error::AlreadyFenced)));
    drop(mapping);
    assert_eq!(protection().as_deref(), Some("---s"), "a share keeps the addresses reserved");
    drop(share);
    assert_eq!(protection(), None, "the last share unmaps");
}

#[test]
fn a_pinned_share_forbids_the_fence_until_it_is_returned() {
    let bench = Bench::new();
    let (guard, mapping) = bench.open().arm(&bench.watcher).unwrap().map(8192).unwrap();
    let share = mapping.pinned_share().unwrap();
    assert!(matches!(mapping.fence(), Err(FenceFailed::PinnedShares { shares: 1 })));
    assert!(matches!(mapping.pinned_share(), Err(Error::AlreadyFenced)));
    drop(share);
    guard.release(mapping.fence().unwrap()).unwrap();
}

#[test]
fn every_share_returned_is_a_fence_without_a_system_call() {
    let bench = Bench::new();
    let (guard, mapping) = bench.open().arm(&bench.watcher).unwrap().map(8192).unwrap();
    let (share, pinned) = (mapping.share().unwrap(), mapping.pinned_share().unwrap());
    assert!(matches!(mapping.fenced_by_return(), Err(FenceFailed::Shares { shares: 2 })));
    assert!(matches!(mapping.share(), Err(Error::AlreadyFenced)), "there would be no end");
    drop(share);
    assert!(matches!(mapping.fenced_by_return(), Err(FenceFailed::Shares { shares: 1 })));
    drop(pinned);
    guard.release(mapping.fenced_by_return().unwrap()).unwrap();
}

#[test]
fn a_fence_of_another_file_releases_nothing() {
    let one = Bench::new();
    let (guard, mapping) = one.open().arm(&one.watcher).unwrap().map(8192).unwrap();
    // Another armed file of the same watcher, so that the ids differ.
    let second =
        one.export.create(&name("second"), &Create { size: 1, mode: 0o600, dax: false }).unwrap();
    let (other_guard, other) = second.arm(&one.watcher).unwrap().map(1).unwrap();
    let wrong = guard.release(other.fence().unwrap()).unwrap_err();
    assert_eq!(wrong.guard.state().unwrap(), GuardState::Held);
    other_guard.release(wrong.fenced).unwrap();
    wrong.guard.release(mapping.fence().unwrap()).unwrap();
}

#[test]
fn create_makes_exactly_the_bytes_and_removes_what_failed() {
    let bench = Bench::new();
    let made = bench
        .export
        .create(&name("new"), &Create { size: 5_000_001, mode: 0o600, dax: false })
        .unwrap();
    assert_eq!(made.size().unwrap(), 5_000_001);
    let located = bench.export.locate(&name("new")).unwrap();
    assert_eq!(located.identity(), made.identity());
    assert!(located.allocated() >= 5_000_001, "{} allocated", located.allocated());
    let armed = made.arm_at_most(&bench.watcher, GuardTier::Lease).unwrap();
    let resized = |size| Resized { size, complete: true };
    assert_eq!(armed.shrink(10, &mut |_| true).unwrap(), resized(10));
    assert_eq!(armed.grow(20, &mut |_| true).unwrap(), resized(20));
    assert_eq!(armed.grow(15, &mut |_| true).unwrap(), resized(20), "a growth cuts nothing");
    drop(armed);
    let content = std::fs::read(bench.path.with_file_name("new")).unwrap();
    assert_eq!(content, [0; 20]);

    let again = bench.export.create(&name("new"), &Create { size: 1, mode: 0o600, dax: false });
    assert!(matches!(again, Err(Error::Exists { .. })));
    let huge =
        bench.export.create(&name("huge"), &Create { size: 1 << 60, mode: 0o600, dax: false });
    assert!(matches!(huge, Err(Error::NoSpace { .. })), "{huge:?}");
    assert!(!bench.path.with_file_name("huge").exists(), "a failed creation leaves nothing");
}

#[test]
fn nothing_outside_the_export_is_reached() {
    let bench = Bench::new();
    let folder = bench.path.parent().unwrap();
    std::os::unix::fs::symlink("/etc/hostname", folder.join("out")).unwrap();
    std::os::unix::fs::symlink("file", folder.join("in")).unwrap();
    std::fs::create_dir(folder.join("dir")).unwrap();
    for link in ["out", "in"] {
        let refused = bench.export.locate(&name(link));
        assert!(matches!(refused, Err(Error::OutsideExport { .. })), "{link}: {refused:?}");
    }
    assert!(matches!(bench.export.locate(&name("dir")), Err(Error::NotRegular { .. })));
    assert!(matches!(bench.export.locate(&name("none")), Err(Error::NotFound { .. })));
    assert!(matches!(bench.export.locate(&name("file/x")), Err(Error::NotFound { .. })));
}

#[test]
fn a_folder_is_made_beneath_the_export_once_and_in_nobodys_place() {
    let bench = Bench::new();
    let folder = bench.path.parent().unwrap();
    let away = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(away.path(), folder.join("out")).unwrap();
    let make = |path: &str| bench.export.make_folder(&name(path), 0o755);
    assert!(make("new").unwrap());
    assert!(make("new/inner").unwrap());
    assert!(folder.join("new/inner").is_dir());
    assert!(!make("new").unwrap(), "it is there, with what is in it");
    assert!(folder.join("new/inner").is_dir());
    let refused = make("file");
    assert!(matches!(refused, Err(Error::Exists { .. })), "{refused:?}");
    for link in ["out", "out/new"] {
        let refused = make(link);
        assert!(matches!(refused, Err(Error::OutsideExport { .. })), "{link}: {refused:?}");
    }
    assert_eq!(std::fs::read_dir(away.path()).unwrap().count(), 0, "nothing is made outside");
    for missing in ["none/new", "file/new"] {
        let refused = make(missing);
        assert!(matches!(refused, Err(Error::NotFound { .. })), "{missing}: {refused:?}");
    }
}

#[test]
fn looking_at_a_file_breaks_nothing() {
    let bench = Bench::new();
    let file = bench.open();
    let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(8192).unwrap();
    assert_eq!(bench.export.locate(&name("file")).unwrap().size(), 8192);
    assert_eq!(guard.state().unwrap(), GuardState::Held);
    guard.release(mapping.fence().unwrap()).unwrap();
    assert!(bench.breaks.try_recv().is_err());
}

#[test]
fn populating_and_flushing_keep_to_the_mapping() {
    let bench = Bench::new();
    let (guard, mapping) = bench.open().arm(&bench.watcher).unwrap().map(8192).unwrap();
    mapping.populate(0..8192, || true).unwrap();
    mapping.flush(1..8191).unwrap();
    assert!(matches!(mapping.populate(0..8192, || false), Err(Error::Broken)));
    let len = mapping.len() as u64;
    for range in [10..10, 0..len + 1, len..len + 1] {
        assert!(matches!(mapping.flush(range), Err(Error::OutOfMapping { .. })));
    }
    guard.release(mapping.fence().unwrap()).unwrap();
}

#[test]
fn looking_and_listening_together_report_a_break_once() {
    let mut bench = Bench::new();
    (bench.watcher, bench.breaks) = Watcher::start_rescanning(Duration::from_millis(1)).unwrap();
    let (guard, mapping) = bench.open().arm(&bench.watcher).unwrap().map(8192).unwrap();
    let mut child = truncater(&bench.path);
    assert_eq!(bench.next_break().guard, guard.id());
    guard.release(mapping.fence().unwrap()).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(bench.breaks.try_recv().is_err());
}
