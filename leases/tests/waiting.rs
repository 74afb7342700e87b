//! Waiting until a file is free, on this machine's own file systems.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use pinfold_leases::{
    Break, Cancel, Description, Error, Export, GuardTier, Located, RelativePath, Watcher,
};

/// Far beyond anything that works; only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(30);

struct Bench {
    _folder: tempfile::TempDir,
    path: PathBuf,
    export: Export,
    watcher: Watcher,
    breaks: Mutex<Receiver<Break>>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let export = Export::open(folder.path()).unwrap();
        let (watcher, breaks) = Watcher::start().unwrap();
        let breaks = Mutex::new(breaks);
        Self { _folder: folder, path, export, watcher, breaks }
    }

    fn locate(&self) -> Located {
        self.export.locate(&RelativePath::parse("file").unwrap()).unwrap()
    }

    fn arm(&self, file: &Description, patience: Duration, cancel: &Cancel) -> Result<(), Error> {
        let until = Instant::now() + patience;
        file.arm_when_free(&self.watcher, GuardTier::Delegation, until, cancel).map(drop)
    }
}

#[test]
fn the_guard_is_granted_when_the_last_opener_has_left() {
    let bench = Bench::new();
    let (reader, writer) = (File::open(&bench.path).unwrap(), {
        File::options().append(true).open(&bench.path).unwrap()
    });
    let file = bench.locate().open().unwrap();
    let order = Mutex::new(Vec::new());
    let note = |what| order.lock().unwrap().push(what);
    let cancel = Cancel::new().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            let armed = bench.arm(&file, DEADLINE, &cancel);
            note("granted");
            armed
        });
        drop(reader);
        note("the first leaves");
        note("the last leaves");
        drop(writer);
        waiter.join().unwrap().unwrap();
    });
    assert_eq!(*order.lock().unwrap(), ["the first leaves", "the last leaves", "granted"]);
}

#[test]
fn a_mapping_counts_until_it_is_unmapped() {
    let bench = Bench::new();
    let mapped = {
        let other = bench.locate().open().unwrap();
        other.unguarded(&bench.watcher).unwrap().map(1).unwrap()
    };
    let file = bench.locate().open().unwrap();
    let cancel = Cancel::new().unwrap();
    assert!(matches!(bench.arm(&file, Duration::ZERO, &cancel), Err(Error::Busy { .. })));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| bench.arm(&file, DEADLINE, &cancel));
        let (guard, mapping) = mapped;
        guard.release(mapping.fence().unwrap()).unwrap();
        drop(mapping);
        waiter.join().unwrap().unwrap();
    });
}

#[test]
fn a_wait_that_is_over_names_who_is_in_the_way() {
    let bench = Bench::new();
    let other = File::open(&bench.path).unwrap();
    let file = bench.locate().open().unwrap();
    let over = bench.arm(&file, Duration::ZERO, &Cancel::new().unwrap()).unwrap_err();
    let Error::Busy { openers, .. } = over else { panic!("{over}") };
    assert_eq!(openers.iter().map(|o| o.pid).collect::<Vec<_>>(), [std::process::id()]);
    drop(other);
}

#[test]
fn a_wait_is_cancelled_from_another_thread_and_before_it_begins() {
    let bench = Bench::new();
    let other = File::open(&bench.path).unwrap();
    let file = bench.locate().open().unwrap();
    let cancel = Cancel::new().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| bench.arm(&file, DEADLINE, &cancel));
        cancel.cancel();
        assert!(matches!(waiter.join().unwrap(), Err(Error::Cancelled { .. })));
    });
    let again = bench.arm(&file, DEADLINE, &cancel.clone());
    assert!(matches!(again, Err(Error::Cancelled { .. })));
    drop(other);
}

#[test]
fn a_file_that_another_guards_is_opened_when_it_is_let_go() {
    let bench = Bench::new();
    let holder = bench.locate().open().unwrap();
    let (guard, mapping) = holder.arm(&bench.watcher).unwrap().map(1).unwrap();
    let located = bench.locate();
    let cancel = Cancel::new().unwrap();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| located.open_when_free(Instant::now() + DEADLINE, &cancel));
        let news = bench.breaks.lock().unwrap().recv_timeout(DEADLINE);
        let news = news.expect("the wait tells the holder");
        assert_eq!(news.guard, guard.id());
        assert!(!waiter.is_finished());
        guard.release(mapping.fence().unwrap()).unwrap();
        waiter.join().unwrap().unwrap();
    });
}
