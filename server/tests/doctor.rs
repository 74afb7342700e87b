//! `pinfoldd doctor` on this host, whatever it is: the form of the report, and what is left behind.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn doctor(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pinfoldd"));
    command.arg("doctor").args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", text(&output.stdout), text(&output.stderr)))
}

/// The finding of this check about this subject.
fn finding<'a>(report: &'a Value, subject: &str, check: &str) -> &'a Value {
    let findings = report["findings"].as_array().unwrap();
    let found = findings.iter().find(|f| f["subject"] == subject && f["check"] == check);
    found.unwrap_or_else(|| panic!("no {check} of {subject} in {report:#}"))
}

fn names_in(folder: &Path) -> Vec<std::ffi::OsString> {
    folder.read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

#[test]
fn without_a_directory_the_host_is_looked_at_and_it_says_so() {
    let output = doctor(&[]);
    let said = text(&output.stdout);
    assert!(said.starts_with("host\n"), "{said}");
    assert!(said.contains("`pinfoldd doctor DIR`") || output.status.code() == Some(5), "{said}");
    assert!(!said.contains('\u{1b}'), "colours into a pipe: {said}");
    let report = report(&doctor(&["--json"]));
    assert_eq!(report["directories"], Value::Array(vec![]));
    for check in [
        "kernel",
        "guards",
        "leases_enable",
        "lease_break_time",
        "cap_lease",
        "cap_linux_immutable",
        "cap_sys_admin",
        "memlock",
        "open_files",
        "map_areas",
        "pending_signals",
        "rdma_devices",
    ] {
        let finding = finding(&report, "host", check);
        let result = finding["result"].as_str().unwrap();
        assert!(["ok", "limited", "missing"].contains(&result), "{finding}");
        assert!(!finding["found"].as_str().unwrap().is_empty(), "{finding}");
        assert_eq!(finding["why"].is_null(), result == "ok", "{finding}");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(finding(&report, "host", "kernel")["found"], release.trim());
}

#[test]
fn a_directory_is_tried_and_left_as_it_was() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::write(folder.path().join("file"), b"somebody's").unwrap();
    let path = folder.path().to_str().unwrap();
    let output = doctor(&["--json", path]);
    let report = report(&output);
    assert_eq!(names_in(folder.path()), ["file"]);
    assert_eq!(report["directories"][0], path);
    let servable = report["servable"].as_bool().unwrap();
    assert_eq!(output.status.code(), Some(if servable { 0 } else { 5 }), "{report:#}");
    for check in ["file_system", "space", "access"] {
        finding(&report, path, check);
    }
    if servable {
        for check in ["dax", "guard", "map_sync", "registration", "page_size", "seal"] {
            finding(&report, path, check);
        }
    }
}

#[test]
fn a_directory_that_can_not_be_served_has_its_own_exit_code() {
    for path in ["/nonexistent/folder", "/proc", "/dev/null"] {
        let output = doctor(&["--json", path]);
        assert_eq!(output.status.code(), Some(5), "{path}: {}", text(&output.stdout));
        let report = report(&output);
        assert_eq!((&report["servable"], &report["result"]), (&false.into(), &"missing".into()));
    }
    let report = report(&doctor(&["--json", "/nonexistent/folder"]));
    assert_eq!(finding(&report, "/nonexistent/folder", "directory")["result"], "missing");
}

#[test]
fn the_help_has_an_example_and_the_exit_codes() {
    let output = doctor(&["--help"]);
    let said = text(&output.stdout);
    assert!(said.contains("Example:") && said.contains("Exit codes:"), "{said}");
    assert_eq!(doctor(&["--frobnicate"]).status.code(), Some(2));
    // Serving still wants an export.
    let bare = Command::new(env!("CARGO_BIN_EXE_pinfoldd")).output().unwrap();
    assert_eq!(bare.status.code(), Some(2), "{}", text(&bare.stderr));
    assert!(text(&bare.stderr).contains("--export"), "{}", text(&bare.stderr));
}

#[test]
fn of_what_is_no_directory_nothing_is_said_to_be_in_order() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for path in ["/nonexistent", file.path().to_str().unwrap()] {
        let report = report(&doctor(&["--json", path]));
        let findings = report["findings"].as_array().unwrap().iter();
        let ok: Vec<_> = findings.filter(|f| f["subject"] == path && f["result"] == "ok").collect();
        // How much room there is on the file's disk is true of the file as well.
        assert!(ok.iter().all(|finding| finding["check"] == "space"), "{path}: {ok:?}");
    }
    let report = report(&doctor(&["--json", "/proc"]));
    let made = finding(&report, "/proc", "temporary_file");
    let remedy = made["remedy"].as_str().unwrap();
    assert!(
        remedy.contains("a file system that keeps files"),
        "another user would not help: {made}"
    );
}
