//! What becomes of pins when a local process takes the file's name away: no guard before Linux 6.19
//! holds that back.

use std::os::unix::fs::OpenOptionsExt as _;

use super::*;

/// The reason of the first notice or revocation that a holder with `--json` tells of.
fn told_reason(holding: &mut Running) -> String {
    loop {
        let event = event(holding);
        match event["event"].as_str().unwrap() {
            "granted" => {}
            "draining" | "revoked" => return event["reason"].as_str().unwrap().to_owned(),
            other => panic!("{other}: {event}"),
        }
    }
}

fn hold(host: &Host, file: &str) -> Running {
    let mut holding = host.start_command(&["pin", file, "--hold", "--json"]);
    holding.wait_for_stdout("{");
    holding
}

fn assert_taken_back(host: &Host, file: &str, what: &str, take: impl FnOnce()) {
    let mut holding = hold(host, file);
    take();
    assert_eq!(told_reason(&mut holding), "name_gone", "{what}");
    let held = holding.finish();
    assert_eq!(held.code, 7, "{what}: {}", held.stderr);
    assert!(held.stderr.contains("its path does not name it any more"), "{what}: {}", held.stderr);
    host.assert_nothing_is_held();
}

#[test]
fn a_pin_is_taken_back_when_its_name_goes() {
    let host = Host::start();
    let new_file = |name: &str| {
        let _ = fs::remove_file(host.path(name));
        host.make_file(name, &pattern(ODD));
    };
    new_file("a");
    assert_taken_back(&host, "data/a", "unlink", || fs::remove_file(host.path("a")).unwrap());
    new_file("a");
    new_file("b");
    let over = || fs::rename(host.path("b"), host.path("a")).unwrap();
    assert_taken_back(&host, "data/a", "rename over it", over);
    let away = || fs::rename(host.path("a"), host.path("b")).unwrap();
    assert_taken_back(&host, "data/a", "rename", away);
    new_file("a");
    let exchange = || {
        let cwd = rustix::fs::CWD;
        let flags = rustix::fs::RenameFlags::EXCHANGE;
        rustix::fs::renameat_with(cwd, host.path("a"), cwd, host.path("b"), flags).unwrap();
    };
    assert_taken_back(&host, "data/a", "RENAME_EXCHANGE", exchange);
    // The inode has another name, but the path names nothing.
    fs::hard_link(host.path("a"), host.path("c")).unwrap();
    assert_taken_back(&host, "data/a", "one of two names", || {
        fs::remove_file(host.path("a")).unwrap();
    });
    fs::create_dir_all(host.path("d/e")).unwrap();
    new_file("d/e/f");
    let folder_away = || fs::rename(host.path("d"), host.path("other")).unwrap();
    assert_taken_back(&host, "data/d/e/f", "rename of a folder above it", folder_away);
}

#[test]
fn what_leaves_the_name_alone_leaves_the_pin_alone() {
    let host = Host::start();
    fs::create_dir(host.path("d")).unwrap();
    host.make_file("d/f", &pattern(ODD));
    let holding = hold(&host, "data/d/f");
    let generation = host.json(&["stat", "data/d/f"])["generation"].clone();
    fs::hard_link(host.path("d/f"), host.path("d/g")).unwrap();
    fs::set_permissions(host.path("d/f"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(host.path("d/g")).unwrap();
    host.make_file("d/g", b"another one");
    // Away and back again, before anybody looks or after.
    let unchanged = host.json(&["stat", "data/d/f"]);
    assert_eq!((&unchanged["generation"], &unchanged["pins"]), (&generation, &1.into()));
    // Of the same file: the last news to come, behind all of the above.
    fs::remove_file(host.path("d/f")).unwrap();
    let held = holding.finish();
    assert_eq!(held.code, 7, "{}", held.stderr);
    assert!(held.stderr.contains("its path does not name it any more"), "{}", held.stderr);
}

#[test]
fn a_put_into_a_file_that_has_lost_its_name_fails() {
    let host = Host::start();
    let source = host.folder.path().join("source");
    fs::write(&source, pattern(24 << 20)).unwrap();
    for verify in [&["--verify"][..], &[]] {
        host.make_file("victim", &pattern(24 << 20));
        let small = ["put", text(&source), "data/victim", "--chunk", "4K", "--window", "1"];
        let mut put = host.start_command(&[&small[..], verify].concat());
        until("it is pinned", || host.json(&["stat", "data/victim"])["pins"] == 1);
        host.make_file("new", b"what an editor writes");
        fs::rename(host.path("new"), host.path("victim")).unwrap();
        let put = put.end();
        assert_eq!(put.code, 7, "{put:?}");
        assert!(!put.stdout.contains("durable"), "{put:?}");
        assert_eq!(fs::read(host.path("victim")).unwrap(), b"what an editor writes");
    }
    host.assert_nothing_is_held();
}

#[test]
fn ps_and_revoke_know_an_orphan() {
    let host = Host::start();
    let words = |take: &dyn Fn(), word: &str| {
        host.make_file("name", &pattern(ODD));
        let holding = hold(&host, "data/name");
        // It answers no notice: the pin stays until the time for that is over.
        holding.stop();
        take();
        until("it is being taken back", || host.json(&["ps"])["files"][0]["state"] == "draining");
        let ps = host.json(&["ps"]);
        assert_eq!(ps["files"][0]["name"], word, "{ps}");
        let told = host.run(&["ps"]).stdout;
        assert!(told.contains(&format!("/name ({word})\n")), "{told}");
        // The path names another file, or none; its pins were made by that path all the same.
        let revoked = host.run(&["revoke", "data/name", "--json"]);
        assert_eq!(revoked.code, 0, "{revoked:?}");
        holding.signal(Signal::CONT);
        assert_eq!(holding.finish().code, 7);
        host.assert_nothing_is_held();
    };
    words(&|| fs::remove_file(host.path("name")).unwrap(), "deleted");
    words(&|| fs::rename(host.path("name"), host.path("away")).unwrap(), "renamed");
    let over = || {
        host.make_file("new", b"x");
        fs::rename(host.path("new"), host.path("name")).unwrap();
    };
    words(&over, "replaced");
}

#[test]
fn a_grant_says_what_its_guard_does_not_hold_back() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    let told = host.run(&["pin", "data/name"]).stdout;
    let guard = told.lines().find(|line| line.starts_with("guard")).unwrap();
    assert!(guard.contains("lease") && guard.contains("rename and unlink"), "{guard}");
}

#[test]
fn an_opener_that_does_not_wait_gets_in_when_it_comes_back() {
    let host = Host::start();
    host.make_file("name", &pattern(ODD));
    let mut keeping = host.start_command(&["pin", "data/name", "--keep", "--json"]);
    assert_eq!(event(&mut keeping)["event"], "granted");
    let open = || {
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        fs::File::options().read(true).custom_flags(flags).open(host.path("name"))
    };
    for _ in 0..2 {
        assert_eq!(open().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        // The end of the pin is told with its new beginning.
        until("it is let go", || host.json(&["ps"])["files"].as_array().unwrap().is_empty());
        // As it comes back after a while: a kept pin would have the file again long before.
        std::thread::sleep(Duration::from_secs(3));
        let opened = open().expect("it is left alone");
        drop(opened);
        while event(&mut keeping)["event"] != "granted" {}
    }
    // One that waits gets in as ever, and is no reason to leave the file alone for long.
    drop(fs::File::open(host.path("name")).unwrap());
    while event(&mut keeping)["event"] != "granted" {}
    keeping.signal(Signal::INT);
    assert_eq!(keeping.finish().code, 130);
}
