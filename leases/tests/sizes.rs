//! Files are created whole, and change their size under a guard: what others see, keep and lose meanwhile.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::mpsc::Receiver;

use pinfold_leases::{
    Armed, Break, Create, Description, Error, Export, GuardTier, RelativePath, Watcher,
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// As many bytes are allocated between two looks.
const PIECE: u64 = 256 * MIB;

struct Bench {
    folder: tempfile::TempDir,
    export: Export,
    watcher: Watcher,
    _breaks: Receiver<Break>,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let export = Export::open(folder.path()).unwrap();
        let (watcher, breaks) = Watcher::start().unwrap();
        Self { folder, export, watcher, _breaks: breaks }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.folder.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn open(&self, name: &str) -> Description {
        self.export.locate(&relative(name)).unwrap().open().unwrap()
    }

    fn leased(&self, name: &str) -> Armed {
        self.open(name).arm_at_most(&self.watcher, GuardTier::Lease).unwrap()
    }
}

fn relative(name: &str) -> RelativePath {
    RelativePath::parse(name).unwrap()
}

fn of(size: u64) -> Create {
    Create { size, mode: 0o600, dax: false }
}

/// Appends a record as a program of the host does: it opens the file, and waits for a guard on it.
fn appender(path: &std::path::Path) -> Child {
    Command::new("sh").args(["-c", "printf record >> \"$1\"", "sh"]).arg(path).spawn().unwrap()
}

#[test]
fn a_new_file_has_no_name_before_it_is_whole() {
    let bench = Bench::new();
    let mut looks = 0;
    let unpublished = bench
        .export
        .prepare(&relative("new"), &of(3 * PIECE), &mut |progress| {
            looks += 1;
            assert_eq!(progress.total_bytes, 3 * PIECE);
            assert_eq!(bench.names(), [""; 0]);
            true
        })
        .unwrap();
    assert!(looks >= 3, "{looks}");
    assert_eq!(bench.names(), [""; 0]);
    let file = unpublished.publish().unwrap();
    assert_eq!(bench.names(), ["new"]);
    let there = fs::metadata(bench.path("new")).unwrap();
    assert_eq!((there.len(), file.size().unwrap()), (3 * PIECE, 3 * PIECE));
    assert!(file.allocated().unwrap() >= 3 * PIECE);
}

#[test]
fn a_new_file_takes_nobodys_name() {
    let bench = Bench::new();
    let unpublished = bench.export.prepare(&relative("new"), &of(MIB), &mut |_| true).unwrap();
    fs::write(bench.path("new"), "of another").unwrap();
    let refused = unpublished.publish();
    assert!(matches!(refused, Err(Error::Exists { .. })), "{refused:?}");
    assert_eq!(fs::read(bench.path("new")).unwrap(), b"of another");
    assert_eq!(bench.names(), ["new"]);
    let mut looks = 0;
    let refused = bench.export.prepare(&relative("new"), &of(MIB), &mut |_| {
        looks += 1;
        true
    });
    assert!(
        matches!(refused, Err(Error::Exists { .. })) && looks == 0,
        "before anything is allocated"
    );
}

#[test]
fn a_creation_that_is_stopped_leaves_nothing() {
    let bench = Bench::new();
    let stopped =
        bench.export.prepare(&relative("new"), &of(3 * PIECE), &mut |p| p.done_bytes < PIECE);
    assert!(matches!(stopped, Err(Error::CreationStopped { .. })), "{stopped:?}");
    drop(bench.export.prepare(&relative("new"), &of(MIB), &mut |_| true).unwrap());
    assert_eq!(bench.names(), [""; 0]);
}

#[test]
fn what_is_appended_while_a_growth_stops_is_kept() {
    let bench = Bench::new();
    fs::write(bench.path("log"), "first ").unwrap();
    let armed = bench.leased("log");
    let mut child = None;
    let grown = armed
        .grow(4 * PIECE, &mut |progress| {
            // Somebody opens the file as soon as the first piece is there.
            if progress.done_bytes >= PIECE - 6 && child.is_none() {
                child = Some(appender(&bench.path("log")));
                while armed.is_held() {
                    std::thread::yield_now();
                }
            }
            true
        })
        .unwrap();
    assert!(!grown.complete, "somebody waits");
    assert!((PIECE..4 * PIECE).contains(&grown.size), "{grown:?}");
    drop(armed);
    assert!(child.unwrap().wait().unwrap().success());
    let mut after = File::open(bench.path("log")).unwrap();
    assert_eq!(after.metadata().unwrap().len(), grown.size + 6);
    let mut end = Vec::new();
    std::io::Seek::seek(&mut after, std::io::SeekFrom::End(-6)).unwrap();
    std::io::Read::read_to_end(&mut after, &mut end).unwrap();
    assert_eq!(end, b"record");
}

#[test]
fn a_shrink_stops_for_who_waits() {
    let bench = Bench::new();
    File::create(bench.path("big")).unwrap().set_len(400 * GIB).unwrap();
    let armed = bench.leased("big");
    let mut child = None;
    let shrunk = armed
        .shrink(GIB, &mut |_| {
            if child.is_none() {
                child = Some(appender(&bench.path("big")));
                while armed.is_held() {
                    std::thread::yield_now();
                }
            }
            true
        })
        .unwrap();
    assert!(!shrunk.complete && shrunk.size > GIB, "{shrunk:?}");
    drop(armed);
    assert!(child.unwrap().wait().unwrap().success());
    assert_eq!(fs::metadata(bench.path("big")).unwrap().len(), shrunk.size + 6);
}

#[test]
fn what_there_is_no_room_for_takes_none() {
    let bench = Bench::new();
    File::create(bench.path("log")).unwrap().write_all(&[7; 8192]).unwrap();
    let armed = bench.leased("log");
    let before = bench.open_count_of_blocks("log");
    let refused = armed.grow(1 << 50, &mut |_| panic!("nothing is allocated"));
    assert!(matches!(refused, Err(Error::NoSpace { kept_bytes: 0, .. })), "{refused:?}");
    assert_eq!(bench.open_count_of_blocks("log"), before);
    assert_eq!(fs::metadata(bench.path("log")).unwrap().len(), 8192);
}

impl Bench {
    fn open_count_of_blocks(&self, name: &str) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&fs::metadata(self.path(name)).unwrap())
    }
}
