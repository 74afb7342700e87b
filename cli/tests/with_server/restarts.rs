//! What a server knows of its earlier runs.

use super::*;

/// (incarnation, counter) of a new grant.
fn token(host: &Host) -> (u64, u64) {
    let granted = host.json(&["pin", "data/name"]);
    let generation = granted["generation"].as_str().unwrap();
    let (incarnation, counter) = generation.split_once('.').unwrap();
    (u64::from_str_radix(incarnation, 16).unwrap(), counter.parse().unwrap())
}

#[test]
fn fencing_tokens_ascend_from_run_to_run() {
    let mut host = Host::start();
    host.make_file("name", &pattern(4096));
    let mut tokens = vec![token(&host), token(&host)];
    for kill in [true, false, true] {
        if kill {
            host.kill_server();
        } else {
            host.end_server();
        }
        host.serve_again();
        tokens.extend([token(&host), token(&host)]);
    }
    assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");

    // The clock of the last run was far ahead.
    host.end_server();
    let last = host.state.path().join("incarnation");
    let known: u64 = fs::read_to_string(&last).unwrap().trim().parse().unwrap();
    let future = known + 1_000_000_000_000_000_000;
    fs::write(&last, format!("{future}\n")).unwrap();
    for _ in 0..2 {
        host.serve_again();
        tokens.push(token(&host));
        host.end_server();
    }
    assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
    assert!(tokens.last().unwrap().0 > future, "{tokens:?}");
    host.serve_again();
}

fn keep(host: &Host) -> Running {
    let mut keeping = host.start_command(&["pin", "data/name", "--keep", "--json"]);
    keeping.wait_for_stdout("{");
    keeping
}

fn assert_told_of_the_change(keeping: Running) {
    let kept = keeping.finish();
    assert_eq!(kept.code, 7, "{kept:?}");
    assert!(kept.stderr.contains("has changed its bytes"), "{kept:?}");
}

#[test]
fn a_kept_pin_learns_that_its_file_was_rewritten_while_the_server_was_down() {
    let mut host = Host::start();
    for kill in [true, false] {
        host.make_file("name", &pattern(4096));
        let keeping = keep(&host);
        if kill {
            host.kill_server();
        } else {
            host.end_server();
        }
        // As long as before, and older than it: only the inode's own time tells.
        host.make_file("name", &[7; 4096]);
        let file = fs::File::options().write(true).open(host.path("name")).unwrap();
        file.set_modified(std::time::SystemTime::now() - Duration::from_secs(1000)).unwrap();
        drop(file);
        host.serve_again();
        assert_told_of_the_change(keeping);
    }
}

#[test]
fn a_kept_pin_goes_on_after_a_restart_if_nobody_has_touched_its_file() {
    let mut host = Host::start();
    host.make_file("name", &pattern(4096));
    let mut keeping = keep(&host);
    for kill in [false, true, false] {
        if kill {
            host.kill_server();
        } else {
            host.end_server();
        }
        host.serve_again();
        loop {
            if event(&mut keeping)["event"] == "granted" {
                break;
            }
        }
    }
    keeping.signal(Signal::INT);
    assert_eq!(keeping.finish().code, 130);
}

#[test]
fn a_state_folder_has_one_server() {
    let host = Host::start();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "serve_until_standard_input_ends", "--nocapture"])
        .env(SERVE, folder.path())
        .env(STATE, host.state.path())
        .env(PORT, "0")
        .stdin(Stdio::null());
    let refused = Running::start(command).finish();
    assert_ne!(refused.code, 0);
    let told = refused.stdout + &refused.stderr;
    assert!(told.contains("StateFolderInUse"), "{told}");
}
