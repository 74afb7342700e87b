//! Range locks and the export's lock: seen by other programs, and undone one by one.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use pinfold_leases::{Description, Error, Export, LockKind, RelativePath};

fn open(export: &Export) -> Description {
    export.locate(&RelativePath::parse("file").unwrap()).unwrap().open().unwrap()
}

fn folder_with_file() -> (tempfile::TempDir, Export) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), [0; 4096]).unwrap();
    let export = Export::open(folder.path()).unwrap();
    (folder, export)
}

/// `WRITE 0-99` and so on, as the kernel lists them by descriptor: unlike /proc/locks, which may
/// skip or repeat lines while others lock and unlock, all at once.
fn listed(file: &Description) -> Vec<String> {
    let inode = format!(":{}", file.identity().inode);
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
        // A descriptor of another test may be closed by now.
        let info = std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
        found.extend(
            info.lines()
                .filter_map(|line| line.strip_prefix("lock:"))
                .map(|line| line.split_whitespace().collect::<Vec<_>>())
                .filter(|words| words[1] == "OFDLCK" && words[5].ends_with(&inode))
                .map(|words| format!("{} {}-{}", words[3], words[6], words[7])),
        );
    }
    found.sort();
    found
}

#[test]
fn locked_ranges_are_listed_and_each_is_undone_by_itself() {
    let (_folder, export) = folder_with_file();
    let file = open(&export);
    let first = file.lock_range(0..100, LockKind::Shared).unwrap();
    let second = file.lock_range(50..200, LockKind::Exclusive).unwrap();
    assert_eq!(listed(&file), ["READ 0-49", "WRITE 50-199"]);
    let third = file.lock_range(60..70, LockKind::Shared).unwrap();
    assert_eq!(listed(&file), ["READ 0-49", "WRITE 50-199"], "it weakens no stronger one");
    drop(second);
    assert_eq!(listed(&file), ["READ 0-99"]);
    drop(first);
    assert_eq!(listed(&file), ["READ 60-69"]);
    drop(third);
    assert!(listed(&file).is_empty());
}

#[test]
fn many_ranges_are_unlocked_at_once_and_no_others() {
    let (_folder, export) = folder_with_file();
    let file = open(&export);
    let lock = |range, kind| file.lock_range(range, kind).unwrap();
    let mut going: Vec<_> =
        (0..100).map(|n| lock(n * 10..n * 10 + 10, LockKind::Exclusive)).collect();
    going.push(lock(2000..2100, LockKind::Shared));
    let staying = [lock(305..308, LockKind::Shared), lock(3000..3100, LockKind::Exclusive)];
    file.unlock_ranges(going);
    assert_eq!(listed(&file), ["READ 305-307", "WRITE 3000-3099"]);
    file.unlock_ranges(staying);
    file.unlock_ranges([]);
    assert!(listed(&file).is_empty());
}

#[test]
fn another_description_is_refused_and_gets_nothing_of_the_range() {
    let (_folder, export) = folder_with_file();
    let (file, other) = (open(&export), open(&export));
    let held = file.lock_range(100..200, LockKind::Shared).unwrap();
    let shared = other.lock_range(0..300, LockKind::Shared).unwrap();
    drop(shared);
    let refused = other.lock_range(0..300, LockKind::Exclusive).unwrap_err();
    let Error::RangeLocked { start: 0, end: 300, pid: None, .. } = refused else {
        panic!("{refused}")
    };
    assert_eq!(listed(&file), ["READ 100-199"]);
    drop(held);
    drop(other.lock_range(0..300, LockKind::Exclusive).unwrap());
    for range in [5..5, 0..u64::MAX] {
        assert!(matches!(file.lock_range(range, LockKind::Shared), Err(Error::File { .. })));
    }
}

#[test]
fn one_program_serves_an_export_and_the_other_is_told_which() {
    let (folder, export) = folder_with_file();
    let mut other = Command::new("flock")
        .args(["-F", "-n"])
        .arg(folder.path())
        .args(["sh", "-c", "echo locked; read _"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(other.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "locked\n");
    let refused = export.lock().unwrap_err();
    let Error::ExportLocked { pid, .. } = &refused else { panic!("{refused}") };
    assert_eq!(*pid, Some(other.id()), "{refused}");
    other.kill().unwrap();
    other.wait().unwrap();
    let lock = export.lock().unwrap();
    let again = Export::open(folder.path()).unwrap();
    assert!(matches!(again.lock(), Err(Error::ExportLocked { pid: Some(_), .. })));
    drop(lock);
    drop(again.lock().unwrap());
}
