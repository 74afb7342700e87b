//! Where everybody stands when a run does not come to its end.

use std::fs;
use std::path::{Path, PathBuf};

/// What is told of processes: the rig's own, its clients and the daemon, which it started.
const PROGRAMS: [&str; 2] = ["torture", "pinfoldd"];

/// A paragraph for each thread that sleeps in the kernel, with what it waits for (proc(5): `stat`,
/// `syscall`, `stack`).
pub(super) fn threads_of_all() -> String {
    let mut told = String::new();
    for process in numbered(Path::new("/proc")) {
        let program = read(&process.join("comm"));
        if PROGRAMS.contains(&program.trim()) {
            let threads = numbered(&process.join("task"));
            told.extend(threads.iter().map(|thread| thread_at(&program, thread)));
        }
    }
    told
}

fn thread_at(program: &str, thread: &Path) -> String {
    let stat = read(&thread.join("stat"));
    // The name stands in parentheses, and may hold some itself.
    let (name, state) = stat.rsplit_once(") ").unwrap_or_default();
    let name = name.split_once('(').map_or("", |(_, name)| name);
    let state = state.split(' ').next().unwrap_or_default();
    let call = read(&thread.join("syscall"));
    let stack = read(&thread.join("stack"));
    let frames: Vec<_> =
        stack.lines().map(|line| line.split(' ').next_back().unwrap_or_default()).collect();
    let thread = thread.file_name().unwrap_or_default().to_string_lossy();
    let frames = frames.join(" < ");
    format!("\n    {} {thread} {name}: {state}, {} [{frames}]", program.trim(), call.trim())
}

fn numbered(folder: &Path) -> Vec<PathBuf> {
    let is_number = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.bytes().all(|byte| byte.is_ascii_digit())
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(is_number).collect()
}

/// What is gone by now is empty.
fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}
