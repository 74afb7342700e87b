//! Copies that meet other copies, or a file that changes: nothing is ever mixed in silence.

use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};

use super::*;

const DIFFERS: i32 = 12;
const LEN: usize = 24 << 20;

/// One request at a time, of one page: there is time to step in.
const SLOW: [&str; 4] = ["--chunk", "4K", "--window", "1"];

#[test]
fn while_a_put_writes_a_file_no_other_copy_has_it() {
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let [a, b, got] = ["a", "b", "got"].map(|name| local.path().join(name));
    fs::write(&a, vec![b'A'; LEN]).unwrap();
    fs::write(&b, vec![b'B'; LEN]).unwrap();
    let putting = host.start_command(&[&["put", text(&a), "data/ab"], &SLOW[..]].concat());
    until("it is pinned", || !host.json(&["ps"])["files"].as_array().unwrap().is_empty());
    // So that it is not done before the others have tried.
    putting.stop();
    let holder = "of pinfold on ";
    host.assert_fails(&["put", text(&b), "data/ab"], 6, &["has 1 pin on it", holder]);
    host.assert_fails(&["put", text(&b), "data/ab", "--resume"], 6, &["has 1 pin on it", holder]);
    host.assert_fails(&["get", "data/ab", text(&got)], 6, &["exclusively", holder]);
    assert!(!got.exists());
    putting.signal(Signal::CONT);
    let put = putting.finish();
    assert_eq!(put.code, 0, "{}", put.stderr);
    assert!(fs::read(host.path("ab")).unwrap() == vec![b'A'; LEN], "all of one");

    // The other way round: a file that is read is not written meanwhile.
    let getting = host.start_command(&[&["get", "data/ab", text(&got)], &SLOW[..]].concat());
    until("it is pinned", || !host.json(&["ps"])["files"].as_array().unwrap().is_empty());
    getting.stop();
    host.assert_fails(&["put", text(&b), "data/ab"], 6, &["has 1 pin on it", holder]);
    getting.signal(Signal::CONT);
    assert_eq!(getting.finish().code, 0);
    assert!(fs::read(&got).unwrap() == vec![b'A'; LEN]);
    host.json(&["put", text(&b), "data/ab"]);
    assert!(fs::read(host.path("ab")).unwrap() == vec![b'B'; LEN]);
    host.assert_nothing_is_held();
}

#[test]
fn of_two_puts_at_once_one_has_the_file_and_the_other_says_who() {
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let sources = [b'A', b'B'].map(|byte| {
        let path = local.path().join(char::from(byte).to_string());
        fs::write(&path, vec![byte; LEN]).unwrap();
        (byte, path)
    });
    for round in 0..6 {
        // Whichever pins first: both have made the file by then, in most rounds.
        let putting = sources.each_ref().map(|(byte, path)| {
            (*byte, host.start_command(&["put", text(path), "data/ab", "--chunk", "64K"]))
        });
        let ended = putting.map(|(byte, putting)| (byte, putting.finish()));
        let codes = ended.each_ref().map(|(_, put)| put.code);
        println!("round {round}: {codes:?}");
        let there = fs::read(host.path("ab")).unwrap();
        assert_eq!(there.len(), LEN);
        assert!(there.iter().all(|byte| *byte == there[0]), "round {round}: a mixture, {codes:?}");
        for (byte, put) in &ended {
            // Both may have had it, one after the other.
            assert!([0, 6].contains(&put.code), "{}", put.stderr);
            assert!(put.code == 0 || put.stderr.contains("of pinfold on "), "{}", put.stderr);
            assert!(*byte != there[0] || put.code == 0, "{}", put.stderr);
        }
    }
    host.assert_nothing_is_held();
}

#[test]
fn a_file_that_changes_while_it_is_put_is_told() {
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let from = local.path().join("from");
    type Change<'a> = (&'a str, &'a dyn Fn(&fs::File));
    let changes: [Change; 3] = [
        ("its size went from 25165824 to 25165829 bytes", &|file| {
            file.write_all_at(b"grown", LEN as u64).unwrap();
        }),
        ("a program wrote to it", &|file| file.write_all_at(b"other", 0).unwrap()),
        ("ctime", &|file| {
            let modified = file.metadata().unwrap().modified().unwrap();
            file.write_all_at(b"other", 0).unwrap();
            file.set_modified(modified).unwrap();
        }),
    ];
    for (words, change) in changes {
        fs::write(&from, pattern(LEN)).unwrap();
        let putting = host.start_command(&[&["put", text(&from), "data/f"], &SLOW[..]].concat());
        until("its first bytes are read", || has_read(&putting) > 2 << 20);
        change(&fs::File::options().write(true).open(&from).unwrap());
        let put = putting.finish();
        assert_eq!(put.code, DIFFERS, "{words}: {}{}", put.stdout, put.stderr);
        assert_eq!(put.stdout, "");
        for words in [words, "changed while it was copied into data/f"] {
            assert!(put.stderr.contains(words), "{words}: {}", put.stderr);
        }
    }
    // Of several files it is told for the one.
    fs::write(&from, pattern(LEN)).unwrap();
    let folder = ["put", "-r", text(local.path()), "data/tree", "--json"];
    let putting = host.start_command(&[&folder[..], &SLOW].concat());
    until("its first bytes are read", || has_read(&putting) > 2 << 20);
    fs::File::options().write(true).open(&from).unwrap().write_all_at(b"other", 0).unwrap();
    let put = putting.finish();
    assert_eq!(put.code, 13, "{}{}", put.stdout, put.stderr);
    let failed: Value = serde_json::from_str(put.stdout.lines().next().unwrap()).unwrap();
    assert_eq!((&failed["event"], &failed["exit"]), (&"failed".into(), &DIFFERS.into()));
    // And what does not change is put.
    host.json(&["put", text(&from), "data/f"]);
    host.assert_nothing_is_held();
}

#[test]
fn a_check_compares_the_lengths_first() {
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let from = local.path().join("from");
    fs::write(&from, pattern(LEN)).unwrap();
    let args = [&["put", text(&from), "data/f", "--verify"], &SLOW[..]].concat();
    let putting = host.start_command(&args);
    until("its first bytes are read", || has_read(&putting) > 2 << 20);
    let file = fs::File::options().write(true).open(&from).unwrap();
    file.write_all_at(b"grown", LEN as u64).unwrap();
    let put = putting.finish();
    assert_eq!(put.code, DIFFERS, "{}{}", put.stdout, put.stderr);
    let words = "verification: the local file has 25165829 bytes, and 25165824 were copied";
    assert!(put.stderr.contains(words), "{}", put.stderr);
    host.assert_nothing_is_held();
}

#[test]
fn a_file_is_not_copied_onto_itself() {
    const USAGE: i32 = 2;
    let host = Host::start();
    host.make_file("f", &pattern(ODD));
    // What a put that did not look would destroy first: it makes a file with holes anew.
    let sparse = fs::File::create(host.path("sparse")).unwrap();
    sparse.set_len(8 << 20).unwrap();
    sparse.write_all_at(b"middle", 4 << 20).unwrap();
    drop(sparse);
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let link = local.path().join("link");
    symlink(host.path("f"), &link).unwrap();
    fs::hard_link(host.path("f"), host.path("second")).unwrap();
    let bytes = || ["f", "sparse"].map(|name| fs::read(host.path(name)).unwrap());
    let inode = || fs::metadata(host.path("f")).unwrap().ino();
    let before = (bytes(), inode());
    let [f, sparse, second] = ["f", "sparse", "second"].map(|name| host.path(name));
    let same = ["are the same file"];
    host.assert_fails(&["put", text(&f), "data/f"], USAGE, &same);
    host.assert_fails(&["put", text(&f), "data/f", "--wait", "60"], USAGE, &same);
    host.assert_fails(&["put", text(&sparse), "data/sparse"], USAGE, &same);
    host.assert_fails(&["put", text(&link), "data/f"], USAGE, &same);
    host.assert_fails(&["put", text(&second), "data/f", "--resume"], USAGE, &same);
    host.assert_fails(&["get", "data/f", text(&f)], USAGE, &same);
    host.assert_fails(&["get", "data/f", text(&link), "--resume"], USAGE, &same);
    assert!((bytes(), inode()) == before);
    let all = host.run(&["put", "-r", text(host.folder.path()), "data"]);
    assert_eq!(all.code, 13, "{}{}", all.stdout, all.stderr);
    assert_eq!(all.stderr.matches(same[0]).count(), 3, "{}", all.stderr);
    assert!((bytes(), inode()) == before);
    assert_eq!(names(host.folder.path()), ["f", "second", "sparse"]);
    // A copy beside it is none.
    host.json(&["put", text(&f), "data/copy"]);
    assert!(fs::read(host.path("copy")).unwrap() == pattern(ODD));
    host.assert_nothing_is_held();
}

#[test]
fn the_numbers_of_files_that_failed_add_up() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let from = local.path().join("from");
    fs::create_dir_all(from.join("in")).unwrap();
    for name in ["a", "b", "in/c"] {
        fs::write(from.join(name), name).unwrap();
    }
    fs::write(from.join(OsStr::from_bytes(b"no\xff")), b"x").unwrap();
    let put = host.run(&["put", "-r", text(&from), "data/one"]);
    assert_eq!(put.code, 13, "{}", put.stderr);
    assert!(put.stderr.contains("1 file failed, 3 of 4 files were put"), "{}", put.stderr);
    // A file where a folder is to be: the folder fails, and so does what is to lie in it.
    fs::create_dir(host.path("two")).unwrap();
    fs::write(host.path("two/in"), b"in the way").unwrap();
    let put = host.run(&["put", "-r", text(&from), "data/two", "--json"]);
    assert_eq!(put.code, 13, "{}", put.stderr);
    let words = "1 folder and 2 files failed, 2 of 4 files were put";
    assert!(put.stderr.contains(words), "{}", put.stderr);
    let total: Value = serde_json::from_str(put.stdout.lines().last().unwrap()).unwrap();
    let counts = ["files", "failed", "failed_folders"].map(|name| total[name].as_u64().unwrap());
    assert_eq!(counts, [2, 3, 1], "{total}");
}

fn has_read(running: &Running) -> u64 {
    let text = fs::read_to_string(format!("/proc/{}/io", running.child.id())).unwrap();
    text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}
