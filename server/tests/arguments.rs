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

#[test]
fn exports_of_two_file_systems_share_their_fate_only_if_that_is_wanted() {
    let (disk, memory) = (
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(),
        tempfile::tempdir_in("/dev/shm").unwrap(),
    );
    let export =
        |name: &str, folder: &tempfile::TempDir| format!("{name}={}", folder.path().display());
    let (one, other) = (export("one", &disk), export("other", &memory));
    let arguments = ["--rdma-device", "none", "--export", &one, "--export", &other];
    refused(&arguments, &["exports one and other", "different file systems", "--share-fate"]);
    // Of one file system it asks for nothing: this is refused for the port alone.
    let beside = disk.path().join("beside");
    std::fs::create_dir(&beside).unwrap();
    let beside = format!("beside={}", beside.display());
    for served in [[&one, &beside, ""], [&one, &other, "--share-fate"]] {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pinfoldd"));
        command.args(["--rdma-device", "none", "--listen", &address]);
        command.args(["--export", served[0], "--export", served[1]]);
        command.args(served[2..].iter().filter(|argument| !argument.is_empty()));
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{served:?}: {stderr}");
        assert!(stderr.contains("can't listen"), "{served:?}: {stderr}");
    }
}
