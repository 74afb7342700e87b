//! Folders, sparse files, copies that are gone on with, and checks.

use std::ffi::OsStr;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};

use super::*;

const PARTIAL: i32 = 13;
const DIFFERS: i32 = 12;

impl Running {
    /// How many bytes it has read by now (proc_pid_io(5)).
    fn has_read(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/io", self.child.id())).unwrap();
        text.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
    }
}

impl Finished {
    /// The lines of JSON, those of files in the order of their names.
    fn events(&self) -> Vec<Value> {
        let lines = self.stdout.lines().map(|line| serde_json::from_str(line).unwrap());
        let mut events: Vec<Value> = lines.collect();
        events.sort_by_key(|event| event["file"].as_str().unwrap_or("~").to_owned());
        events
    }
}

/// A folder of this host with something of everything.
fn make_tree(top: &Path) {
    fs::create_dir_all(top.join("in/deep")).unwrap();
    fs::create_dir(top.join("empty")).unwrap();
    fs::write(top.join("a"), pattern(ODD)).unwrap();
    fs::write(top.join("none"), b"").unwrap();
    fs::write(top.join("in/b"), pattern(4096)).unwrap();
    fs::write(top.join("in/deep/ü \n"), b"odd name").unwrap();
    for number in 0..20 {
        fs::write(top.join(format!("in/{number:02}")), pattern(1000 + number)).unwrap();
    }
}

/// Every name beneath, and what it has.
fn content(top: &Path) -> Vec<(PathBuf, Option<Vec<u8>>)> {
    let mut found = Vec::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = path.is_file().then(|| fs::read(&path).unwrap());
            found.push((path.strip_prefix(top).unwrap().to_owned(), bytes));
            if path.is_dir() {
                folders.push(path);
            }
        }
    }
    found.sort_unstable();
    found
}

#[test]
fn a_folder_goes_there_and_comes_back() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let (from, to) = (local.path().join("from"), local.path().join("to"));
    make_tree(&from);
    let put = host.run(&["put", "-r", text(&from), "data/tree", "--parallel", "3", "--verify"]);
    assert_eq!(put.code, 0, "{}{}", put.stdout, put.stderr);
    assert!(content(&host.path("tree")) == content(&from), "{:?}", content(&host.path("tree")));
    assert!(put.stdout.contains("data/tree/in/b: 4096 bytes in "), "{}", put.stdout);
    let reasons = put.stdout.lines().filter(|line| line.contains("by stream because: "));
    assert_eq!(reasons.count(), 1, "one for all: {}", put.stdout);
    let total = put.stdout.lines().last().unwrap();
    assert_eq!(put.stdout.lines().count(), 26, "{}", put.stdout);
    assert!(total.starts_with("in all: 24 files and 3 folders, "), "{total}");

    let got = host.run(&["get", "-r", "data/tree/", text(&to), "--json", "--verify"]);
    assert_eq!(got.code, 0, "{}", got.stderr);
    assert!(content(&to) == content(&from), "{:?}", content(&to));
    let events = got.events();
    assert_eq!(events.len(), 25);
    assert_eq!((&events[0]["event"], &events[0]["file"]), (&"file".into(), &"data/tree/a".into()));
    assert_eq!((&events[0]["verified"], &events[0]["size"]), (&true.into(), &ODD.into()));
    let total = &events[24];
    assert_eq!((&total["event"], &total["files"]), (&"total".into(), &24.into()), "{total}");
    assert_eq!((&total["folders"], &total["failed"]), (&3.into(), &0.into()), "{total}");

    // What is there already stays where it is; only what differs is carried.
    fs::write(from.join("in/b"), pattern(5000)).unwrap();
    fs::write(host.path("tree/other"), b"stays").unwrap();
    let put = host.run(&["put", "-r", text(&from), "data/tree", "--resume", "--json"]);
    assert_eq!(put.code, 0, "{}", put.stderr);
    let total = put.events().pop().unwrap();
    assert_eq!((&total["bytes"], &total["files"]), (&5000.into(), &24.into()), "{total}");
    assert_eq!(fs::read(host.path("tree/other")).unwrap(), b"stays");
    let got = host.run(&["get", "-r", "data", text(&to.join("again")), "--json"]);
    assert_eq!(got.code, 0, "{}", got.stderr);
    assert_eq!(fs::read(to.join("again/tree/in/b")).unwrap(), pattern(5000));
    let kept = host.run(&["get", "-r", "data", text(&to.join("again")), "--json", "--resume"]);
    assert_eq!(kept.code, 0, "{}", kept.stderr);
    assert_eq!(kept.events().pop().unwrap()["bytes"], 0, "{}", kept.stdout);
    host.assert_nothing_is_held();
}

#[test]
fn of_a_folder_each_failure_is_told_and_holds_up_no_other_file() {
    let host = Host::start();
    let local = tempfile::tempdir().unwrap();
    let (from, to) = (local.path().join("from"), local.path().join("to"));
    make_tree(&from);
    symlink("a", from.join("link")).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, from.join("pipe"), 0o600.into()).unwrap();
    fs::write(from.join(OsStr::from_bytes(b"no\xff")), b"x").unwrap();
    // A folder where a file is to be.
    fs::create_dir_all(host.path("tree/in/b")).unwrap();
    let put = host.run(&["put", "-r", text(&from), "data/tree", "--json"]);
    assert_eq!(put.code, PARTIAL, "{}{}", put.stdout, put.stderr);
    assert!(put.stderr.contains("2 files failed, 23 of 25 files were put"), "{}", put.stderr);
    let events = put.events();
    let of = |kind: &str| {
        let of_kind = events.iter().filter(|event| event["event"] == kind);
        let told =
            |event: &Value| (event["file"].as_str().unwrap().to_owned(), event["exit"].clone());
        of_kind.map(told).collect::<Vec<_>>()
    };
    assert_eq!(
        of("failed"),
        [("data/tree/in/b".to_owned(), 5.into()), ("data/tree/no\u{fffd}".to_owned(), 5.into())]
    );
    let left_out = ["data/tree/link", "data/tree/pipe"].map(|name| (name.to_owned(), Value::Null));
    assert_eq!(of("left_out"), left_out);
    assert_eq!(of("file").len(), 23);

    // The other way round.
    symlink("a", host.path("tree/link")).unwrap();
    fs::write(host.path("tree").join(OsStr::from_bytes(b"no\xff")), b"x").unwrap();
    let held = fs::File::options().write(true).open(host.path("tree/a")).unwrap();
    let got = host.run(&["get", "-r", "data/tree", text(&to)]);
    assert_eq!(got.code, PARTIAL, "{}{}", got.stdout, got.stderr);
    drop(held);
    for line in [
        "pinfold: the server refused to pin data/tree/a: ",
        "pinfold: cannot get data/tree/no\u{fffd}: its name is no UTF-8",
        "pinfold: data/tree/link is left out: neither a file nor a folder",
        "pinfold: 2 files failed, 22 of 24 files were got",
    ] {
        assert!(got.stderr.contains(line), "{line}: {}", got.stderr);
    }
    assert!(to.join("in/b").is_dir() && to.join("empty").is_dir());
    assert!(!to.join("a").exists() && !to.join("link").exists());

    for (args, code, words) in [
        (&["put", text(&from), "data/tree2"] as &[&str], 10, "a folder is copied with -r"),
        (&["put", "-r", text(&from.join("a")), "data/tree2"], 10, "is no folder"),
        (&["put", "-r", text(&from), "data/none/tree"], 4, "data/none/tree"),
        (&["put", "-r", text(&from), "data/../out"], 5, "it holds \"..\""),
        (&["put", text(&from.join("a")), "data"], 2, "names no file"),
        (&["get", "-r", "data/tree/a", text(&to)], 4, "data/tree/a"),
        (&["get", "-r", "data/tree", "-"], 2, "standard output"),
        (&["get", "data/tree/a", "-", "--verify"], 2, "--verify"),
    ] {
        host.assert_fails(args, code, &[words]);
    }
    host.assert_nothing_is_held();
}

#[test]
fn holes_are_not_carried_and_read_as_zeroes_there() {
    const LEN: u64 = 64 << 20;
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (from, to) = (local.path().join("from"), local.path().join("to"));
    let file = fs::File::create(&from).unwrap();
    file.set_len(LEN).unwrap();
    file.write_all_at(&pattern(100_000), 5 << 20).unwrap();
    file.write_all_at(b"end", LEN - 3).unwrap();
    let expected = fs::read(&from).unwrap();
    let is_there = || fs::read(host.path("name")).unwrap() == expected;

    let put = host.json(&["put", text(&from), "data/name", "--verify"]);
    let carried = put["bytes"].as_u64().unwrap();
    assert!((100_003..1 << 20).contains(&carried), "{put}");
    assert_eq!((&put["hole_bytes"], &put["size"]), (&(LEN - carried).into(), &LEN.into()), "{put}");
    assert!(is_there(), "over nothing");

    fs::write(host.path("name"), vec![7; LEN as usize + 1000]).unwrap();
    let put = host.json(&["put", text(&from), "data/name"]);
    assert_eq!((&put["bytes"], &put["created"]), (&carried.into(), &false.into()), "{put}");
    assert!(is_there(), "over other bytes");

    let junk = fs::File::options().write(true).open(host.path("name")).unwrap();
    junk.write_all_at(&[7; 1000], 30 << 20).unwrap();
    drop(junk);
    let put = host.json(&["put", text(&from), "data/name", "--resume"]);
    assert_eq!(put["bytes"], 1 << 20, "what differs in a hole is carried: {put}");
    assert!(is_there(), "gone on with");

    let get = host.json(&["get", "data/name", text(&to), "--verify"]);
    assert_eq!(get["bytes"], LEN);
    assert!(fs::read(&to).unwrap() == expected);
    let blocks = fs::metadata(&to).unwrap().blocks() * 512;
    assert!(blocks < 2 << 20, "{blocks} bytes of storage");
    host.assert_nothing_is_held();
}

#[test]
fn a_put_that_was_killed_is_gone_on_with() {
    const LEN: usize = 24 << 20;
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let from = local.path().join("from");
    fs::write(&from, pattern(LEN)).unwrap();
    let put = ["put", text(&from), "data/name"];
    let slow = [&put[..], &["--chunk", "4K", "--window", "1"]].concat();
    for signal in [Signal::KILL, Signal::INT] {
        let mut putting = host.start_command(&slow);
        // More than the first stretch that is compared, which is changed below.
        until("some of it is there", || putting.has_read() > 4 << 20);
        putting.signal(signal);
        if signal == Signal::INT {
            let ended = putting.finish();
            assert_eq!(ended.code, 130, "{}", ended.stderr);
            assert!(ended.stderr.contains("--resume goes on there"), "{}", ended.stderr);
        } else {
            putting.child.wait().unwrap();
        }
        host.assert_nothing_is_held();
        assert!(fs::read(host.path("name")).unwrap() != pattern(LEN), "in the middle");
        // Whatever else has happened to it: what is there is looked at.
        let there = fs::File::options().write(true).open(host.path("name")).unwrap();
        there.write_all_at(b"other", 1000).unwrap();
        drop(there);
        let again = host.json(&[&put[..], &["--resume"]].concat());
        let (kept, carried) =
            (again["kept_bytes"].as_u64().unwrap(), again["bytes"].as_u64().unwrap());
        assert_eq!(kept + carried, LEN as u64, "{again}");
        assert!(kept > 0 && carried > 1 << 20, "{again}");
        assert!(fs::read(host.path("name")).unwrap() == pattern(LEN), "{again}");
        fs::remove_file(host.path("name")).unwrap();
    }
    let new = host.json(&[&put[..], &["--resume"]].concat());
    assert_eq!((&new["kept_bytes"], &new["anew_because"]), (&0.into(), &Value::Null), "{new}");
    // Longer than it was, and shorter.
    for len in [LEN + 1000, 5000] {
        fs::write(&from, pattern(len)).unwrap();
        let put = host.json(&[&put[..], &["--resume"]].concat());
        assert!(put["bytes"].as_u64().unwrap() <= 1000, "{put}");
        assert!(fs::read(host.path("name")).unwrap() == pattern(len), "{put}");
    }
}

#[test]
fn a_get_that_was_killed_is_gone_on_with() {
    const LEN: usize = 24 << 20;
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let to = local.path().join("to");
    let part = local.path().join(".to.pinfold-partial");
    host.make_file("name", &pattern(LEN));
    fs::write(&to, "before").unwrap();
    let get = ["get", "data/name", text(&to), "--resume"];
    let slow = [&get[..], &["--chunk", "4K", "--window", "1"]].concat();
    for signal in [Signal::KILL, Signal::INT] {
        let mut getting = host.start_command(&slow);
        // The second one first reads what the first one has got.
        let read = if signal == Signal::INT { 1 << 20 } else { 0 };
        until("some has come", || {
            fs::metadata(&part).is_ok_and(|part| part.len() > 2 << 20) && getting.has_read() > read
        });
        getting.signal(signal);
        if signal == Signal::INT {
            let ended = getting.finish();
            assert_eq!(ended.code, 130, "{}", ended.stderr);
            assert!(
                ended.stderr.contains("is as it was; --resume goes on with"),
                "{}",
                ended.stderr
            );
        } else {
            getting.child.wait().unwrap();
        }
        assert_eq!(fs::read(&to).unwrap(), b"before");
        let part = fs::File::options().write(true).open(&part).unwrap();
        part.write_all_at(b"other", 1000).unwrap();
        // Not a whole piece either.
        part.set_len(part.metadata().unwrap().len() - 1).unwrap();
        host.assert_nothing_is_held();
    }
    // Of what the partial file has, one piece is other bytes.
    let again = host.json(&get);
    let (kept, carried) = (again["kept_bytes"].as_u64().unwrap(), again["bytes"].as_u64().unwrap());
    assert_eq!(kept + carried, LEN as u64, "{again}");
    assert!(kept > 0 && carried > 1 << 20, "{again}");
    assert!(fs::read(&to).unwrap() == pattern(LEN), "{again}");
    assert_eq!(names(local.path()), ["to"]);
    // What is complete is not touched.
    let inode = fs::metadata(&to).unwrap().ino();
    let same = host.json(&get);
    assert_eq!((&same["kept_bytes"], &same["bytes"]), (&LEN.into(), &0.into()), "{same}");
    assert_eq!(fs::metadata(&to).unwrap().ino(), inode);
    let mut flipped = fs::File::options().write(true).open(&to).unwrap();
    flipped.seek(SeekFrom::Start(LEN as u64 - 1)).unwrap();
    flipped.write_all(&[!pattern(LEN)[LEN - 1]]).unwrap();
    drop(flipped);
    assert_eq!(host.json(&get)["bytes"], LEN, "what differs is got");
    assert!(fs::read(&to).unwrap() == pattern(LEN));
}

#[test]
fn a_check_finds_a_byte_that_differs() {
    const LEN: usize = 16 << 20;
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (from, to) = (local.path().join("from"), local.path().join("to"));
    let flip = |path: &Path, at: usize| {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(&[!pattern(LEN)[at]], at as u64).unwrap();
    };
    fs::write(&from, pattern(LEN)).unwrap();
    let slow = ["--verify", "--chunk", "4K", "--window", "1"];
    let putting = host.start_command(&[&["put", text(&from), "data/name"], &slow[..]].concat());
    until("its first bytes are read", || putting.has_read() > 2 << 20);
    flip(&from, 77);
    let put = putting.finish();
    assert_eq!(put.code, DIFFERS, "{}", put.stderr);
    assert_eq!(put.stdout, "");
    assert!(
        put.stderr.contains("the two files differ between byte 0 and 1048576"),
        "{}",
        put.stderr
    );
    assert!(
        put.stderr.contains("into data/name and committed, but is not the same"),
        "{}",
        put.stderr
    );
    assert!(fs::read(host.path("name")).unwrap() == pattern(LEN), "it was put as it was read");

    let getting = host.start_command(&[&["get", "data/name", text(&to)], &slow[..]].concat());
    let part = || names(local.path()).into_iter().find(|name| name.starts_with(".to.pinfold-"));
    let some = || {
        part().is_some_and(|part| {
            fs::metadata(local.path().join(part)).is_ok_and(|part| part.len() > 5 << 20)
        })
    };
    until("some has come", some);
    flip(&local.path().join(part().unwrap()), (5 << 20) - 1);
    let got = getting.finish();
    assert_eq!(got.code, DIFFERS, "{}", got.stderr);
    assert!(got.stderr.contains("differ between byte 4194304 and 5242880"), "{}", got.stderr);
    assert_eq!(names(local.path()), ["from"], "and it has no name");
    let got = host.json(&["get", "data/name", text(&to), "--verify"]);
    assert_eq!(got["verified"], true, "{got}");
    let plain = host.json(&["get", "data/name", text(&to)]);
    assert_eq!(plain["verified"], false, "who does not ask is not told so: {plain}");
    host.assert_nothing_is_held();
}

#[test]
fn what_a_put_has_compared_nobody_else_writes() {
    let host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let from = local.path().join("from");
    fs::write(&from, vec![7; 64 << 20]).unwrap();
    let slow = ["put", text(&from), "data/name", "--resume", "--chunk", "4K", "--window", "1"];
    let putting = host.start_command(&slow);
    until("it is pinned", || !host.json(&["ps"])["files"].as_array().unwrap().is_empty());
    host.assert_fails(&["pin", "data/name"], 6, &["exclusive"]);
    putting.signal(Signal::INT);
    assert_eq!(putting.finish().code, 130);
    host.assert_nothing_is_held();
}

#[test]
fn a_folder_that_is_interrupted_or_loses_its_server_says_how_far_it_came() {
    let mut host = Host::start();
    let local = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    fs::write(local.path().join("a"), b"quick").unwrap();
    fs::write(local.path().join("b"), vec![7; 64 << 20]).unwrap();
    let slow = ["put", "-r", text(local.path()), "data/tree", "--chunk", "4K", "--window", "1"];
    for (code, why) in [(130, "interrupted; "), (3, "because: ")] {
        let mut putting = host.start_command(&slow);
        putting.wait_for_stdout("data/tree/a: 5 bytes");
        until("the other one is on its way", || putting.has_read() > 1 << 20);
        match code {
            130 => putting.signal(Signal::INT),
            _ => host.kill_and_serve_again(),
        }
        let put = putting.finish();
        assert_eq!(put.code, code, "{}", put.stderr);
        let far = "1 of 2 files were put; with --resume the next one carries only what is missing";
        assert!(put.stderr.contains(far) && put.stderr.contains(why), "{}", put.stderr);
        host.assert_nothing_is_held();
    }
    let put = host.run(&["put", "-r", text(local.path()), "data/tree", "--resume", "--json"]);
    assert_eq!(put.code, 0, "{}", put.stderr);
    let total = put.events().pop().unwrap();
    assert!(total["kept_bytes"].as_u64().unwrap() > 0, "{total}");
    assert!(fs::read(host.path("tree/b")).unwrap() == vec![7; 64 << 20]);
}
