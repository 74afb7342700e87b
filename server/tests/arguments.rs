//! What `pinfoldd` refuses before it starts, as a process: exit code and words.
#![forbid(unsafe_code)]

use std::process::Command;

fn refused(arguments: &[&str], says: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_pinfoldd")).args(arguments).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    for words in says {
        assert!(stderr.contains(words), "{words:?} is not in {stderr:?}");
    }
}

#[test]
fn contradictions_in_arguments_and_file_end_it_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    refused(&[], &["nothing is exported", "--export"]);
    let sealed = format!("logs={path},on_truncate=deny,guard=none");
    refused(&["--export", &sealed], &["export logs", "has to be guarded"]);
    let plain = format!("logs={path}");
    refused(&["--export", &plain, "--export", &plain], &["logs is given twice"]);

    let file = folder.path().join("pinfoldd.toml");
    let name = file.to_str().unwrap();
    refused(&["--config", name], &["can't read", name]);
    let text =
        format!("[exports.logs]\npath = \"{path}\"\non_read = \"outwait\"\nguard = \"lease\"\n");
    std::fs::write(&file, text).unwrap();
    refused(&["--config", name], &[name, "export logs", "wants guard=delegation"]);
    std::fs::write(&file, format!("[exports.other]\npath = \"{path}\"\n")).unwrap();
    refused(&["--config", name, "--export", &plain], &["the same directory"]);
}
