//! The built command, as a shell runs it: exit codes and words on this side of the server. What
//! needs a server is in `with_server.rs`, what needs a device in the lab.

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Output, Stdio};

/// Runs `pinfold` with nothing of the caller's environment that could change its mind.
fn pinfold(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .args(args)
        .env_remove("PINFOLD_SERVER")
        .env("NO_COLOR", "1")
        .stdin(Stdio::null())
        .output()
        .expect("the command starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

fn assert_fails(output: &Output, code: i32, word: &str) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.contains(word), "{word:?} is not in: {text}");
    assert_eq!(stdout(output), "");
}

/// An address at which nobody listens. It is taken and let go again: should another process get it
/// meanwhile, that one is no server of ours, and the command fails in another way.
fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

const COMMANDS: [&str; 13] = [
    "put",
    "get",
    "ls",
    "stat",
    "pin",
    "ps",
    "watch",
    "rm",
    "grow",
    "shrink",
    "doctor",
    "completions",
    "man",
];

#[test]
fn every_help_has_an_example_or_the_exit_codes() {
    let output = pinfold(&["--help"]);
    assert!(output.status.success());
    let help = stdout(&output);
    assert!(help.contains("Exit codes:"), "{help}");
    for command in COMMANDS {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is not in {help}");
        let output = pinfold(&[command, "--help"]);
        assert!(output.status.success());
        let text = stdout(&output);
        assert!(text.contains("Example"), "{text}");
        assert!(text.contains(&format!("\n  pinfold {command}")), "{text}");
        assert!(!text.contains('\u{1b}'), "colours into a pipe: {text}");
    }
}

#[test]
fn completions_and_manual_pages_need_no_server() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = pinfold(&["completions", shell]);
        assert!(output.status.success(), "{}", stderr(&output));
        for command in COMMANDS {
            assert!(stdout(&output).contains(command), "{shell}: {command}");
        }
    }
    assert_fails(&pinfold(&["completions", "tcsh"]), 2, "tcsh");
    let output = pinfold(&["man"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains(".TH pinfold 1"), "{}", stdout(&output));
    let folder = tempfile::tempdir().unwrap();
    let output = pinfold(&["man", "--dir", folder.path().to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "");
    for command in COMMANDS {
        assert!(folder.path().join(format!("pinfold-{command}.1")).is_file(), "{command}");
    }
    assert_fails(&pinfold(&["man", "--dir", "/dev/null"]), 10, "/dev/null");
}

#[test]
fn a_wrong_command_line_is_refused() {
    for (args, word) in [
        (&[] as &[&str], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["stat"], "EXPORT/PATH"),
        (&["stat", "no-slash"], "write EXPORT/PATH"),
        (&["put", "file", "data/"], "write EXPORT/PATH"),
        (&["put", "file", "data/x", "--chunk", "0"], "at least one byte"),
        (&["put", "file", "data/x", "--chunk", "2G"], "at most 1G"),
        (&["put", "file", "data/x", "--window", "0"], "1..=256"),
        (&["pin", "data/x", "--range", "1M"], "START..END"),
        (&["pin", "data/x", "--range", "1T..2T"], "no size"),
        (&["pin", "data/x", "--rdma-device", ""], "name a device"),
        (&["pin", "data/x", "--reserve", "much"], "no size"),
        (&["put", "file", "data/x", "--transport", "pigeon"], "pigeon"),
        (&["get", "data/x"], "LOCAL"),
        (&["get", "no-slash", "file"], "write EXPORT/PATH"),
        (&["ls", "/data"], "write EXPORT or EXPORT/PATH"),
        (&["watch", "--count", "0"], "0"),
        (&["rm"], "EXPORT/PATH"),
        (&["grow", "data/x"], "SIZE"),
        (&["grow", "data/x", "++1"], "no size"),
        (&["shrink", "data/x", "+1"], "no size"),
    ] {
        assert_fails(&pinfold(args), 2, word);
    }
}

#[test]
fn an_address_that_is_none_is_a_wrong_command_line() {
    for server in ["localhost:7350", "https://localhost:7350", ""] {
        assert_fails(&pinfold(&["stat", "data/x", "--server", server]), 2, "http://HOST:PORT");
    }
}

#[test]
fn a_server_that_is_not_there_has_its_own_exit_code() {
    let server = format!("http://{}", nobody());
    let output = pinfold(&["--server", &server, "stat", "data/x"]);
    assert_fails(&output, 3, &server);
    assert!(stderr(&output).contains("hint: "), "{}", stderr(&output));
}

#[test]
fn the_doctor_reports_although_the_server_is_not_there() {
    let server = format!("http://{}", nobody());
    let output = pinfold(&["--server", &server, "doctor", "--json"]);
    assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
    let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let of = |check: &str| findings.iter().find(|finding| finding["check"] == check).unwrap();
    assert_eq!(of("reachable")["result"], "missing");
    assert_eq!(of("reachable")["found"], server);
    assert_eq!(of("rdma_devices")["subject"], "host");
}

#[test]
fn the_server_may_come_from_the_environment() {
    let server = format!("http://{}", nobody());
    let output = Command::new(env!("CARGO_BIN_EXE_pinfold"))
        .args(["stat", "data/x"])
        .env("PINFOLD_SERVER", &server)
        .output()
        .unwrap();
    assert_fails(&output, 3, &server);
}

#[test]
fn an_absent_device_has_its_own_exit_code() {
    let args = ["--rdma-device", "nosuchdevice9", "pin", "data/x"];
    assert_fails(&pinfold(&args), 8, "nosuchdevice9");
}

#[test]
fn a_local_file_that_cannot_be_read_is_told_before_all_else() {
    assert_fails(&pinfold(&["put", "/nonexistent/file", "data/x"]), 10, "/nonexistent/file");
    assert_fails(&pinfold(&["put", "/", "data/x"]), 10, "no regular file");
    assert_fails(&pinfold(&["put", "/dev/null", "data/x"]), 10, "no regular file");
}

#[test]
fn a_local_file_that_cannot_be_written_is_told_before_all_else() {
    assert_fails(&pinfold(&["get", "data/x", "/nonexistent/file"]), 10, "/nonexistent/file");
    assert_fails(&pinfold(&["get", "data/x", "/"]), 10, "no regular file");
    assert_fails(&pinfold(&["get", "data/x", "/dev/null"]), 10, "no regular file");
}

#[test]
fn a_get_from_nobody_leaves_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let local = folder.path().join("x");
    let server = format!("http://{}", nobody());
    let output = pinfold(&["get", "data/x", local.to_str().unwrap(), "--server", &server]);
    assert_fails(&output, 3, &server);
    assert_eq!(folder.path().read_dir().unwrap().count(), 0);
}
