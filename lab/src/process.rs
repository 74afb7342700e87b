//! Other processes on the storage host: those whom the guard is about.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::{eventually, required};

/// A binary of this workspace.
pub fn tool(name: &str) -> PathBuf {
    Path::new(&required("PINFOLD_BIN_DIR")).join(name)
}

/// A command that other commands start.
pub(crate) fn prefixed(prefix: &[&str], program: &Path) -> Command {
    let Some((first, rest)) = prefix.split_first() else { return Command::new(program) };
    let mut command = Command::new(first);
    command.args(rest).arg(program);
    command
}

/// Starts a program as root has it that may lock only so many bytes of memory, as others do.
pub(crate) fn memlock_prefix(bytes: usize) -> Vec<String> {
    let limit = format!("--memlock={bytes}:{bytes}");
    ["setpriv", "--bounding-set=-ipc_lock", "--", "prlimit", &limit, "--"]
        .map(str::to_owned)
        .to_vec()
}

/// Runs a line of a shell, as root on the storage host.
pub fn shell(line: &str) {
    let status = Command::new("sh").args(["-ec", line]).status().unwrap();
    assert!(status.success(), "{line}: {status}");
}

/// A process; killed when it is dropped.
#[derive(Debug)]
pub struct Process(Child);

impl Process {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// One that keeps a processor busy.
    pub fn spinning() -> Self {
        Self::start(Command::new("sh").args(["-c", "while :; do :; done"]))
    }

    /// Whether it has come to its end.
    pub fn has_ended(&mut self) -> bool {
        self.0.try_wait().unwrap().is_some()
    }

    /// Waits until it has done what it was started for.
    pub async fn done(&mut self, what: &str) {
        eventually(what, async || self.has_ended()).await;
        assert!(self.0.wait().unwrap().success(), "{what}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A processor on which no ordinary process gets any time; until it is dropped. Others are left to
/// the rest.
#[derive(Debug)]
pub struct Busy {
    _process: Process,
    limit: String,
    _debugfs: Mounted,
}

impl Busy {
    /// Its number.
    pub const PROCESSOR: &str = "1";
    const LIMIT: &str = "/proc/sys/kernel/sched_rt_runtime_us";

    /// Keeps it busy with a real-time process (sched(7)), once nothing takes time away from those:
    /// neither the limit of all of them nor, since Linux 6.12, what each processor keeps for others.
    pub fn start() -> Self {
        let limit = std::fs::read_to_string(Self::LIMIT).unwrap();
        std::fs::write(Self::LIMIT, "-1").unwrap();
        let debugfs = Mounted::new("debugfs", "mode=0700");
        let kept = debugfs.path().join(format!("sched/fair_server/cpu{}/runtime", Self::PROCESSOR));
        // Where it is nothing already, that can't be said again (EINVAL).
        if std::fs::read_to_string(&kept).is_ok_and(|runtime| runtime.trim() != "0") {
            std::fs::write(kept, "0").unwrap();
        }
        let mut command = Command::new("chrt");
        let script = "echo busy; while :; do :; done";
        command.args(["-f", "50", "taskset", "-c", Self::PROCESSOR, "sh", "-c", script]);
        let mut process = Process::start(command.stdout(Stdio::piped()));
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "busy\n");
        Self { _process: process, limit, _debugfs: debugfs }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let _ = std::fs::write(Self::LIMIT, self.limit.trim());
    }
}

/// A file system that is mounted; until it is dropped.
#[derive(Debug)]
pub struct Mounted(tempfile::TempDir);

impl Mounted {
    /// Mounts one without a device of its own (mount(8)).
    pub fn new(kind: &str, options: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new("mount");
        command.args(["-t", kind, "-o", options, kind]).arg(folder.path());
        let status = command.status().unwrap();
        assert!(status.success(), "mounting {kind} with {options}: {status}");
        Self(folder)
    }

    /// Mounts one that lies in a file.
    pub fn image(kind: &str, image: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (at, image) = (folder.path().display(), image.display());
        shell(&format!("modprobe loop && mount -t {kind} -o loop {image} {at}"));
        Self(folder)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Whoever still has a file of it open keeps it, out of sight.
        let status = Command::new("umount").arg("-l").arg(self.path()).status().unwrap();
        assert!(status.success(), "umount {}: {status}", self.path().display());
    }
}

/// A mounted hugetlbfs with room for some pages, given back after.
#[derive(Debug)]
pub struct HugePages(Option<Mounted>);

impl HugePages {
    /// Reserves so many pages of 2 MiB.
    pub fn mount(pages: u32) -> Self {
        shell(&format!("echo {pages} > /proc/sys/vm/nr_hugepages"));
        Self(Some(Mounted::new("hugetlbfs", "mode=0755,pagesize=2M")))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.0.as_ref().expect("taken only by drop").path()
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        drop(self.0.take());
        shell("echo 0 > /proc/sys/vm/nr_hugepages");
    }
}

/// A file system on which nothing can be written; until it is dropped.
#[derive(Debug)]
pub struct Frozen(PathBuf);

impl Frozen {
    /// Freezes it (fsfreeze(8)); what is being written comes to its end first.
    pub fn start(mount_point: PathBuf) -> Self {
        let frozen = Self(mount_point);
        frozen.call("-f");
        frozen
    }

    /// Lets it go on.
    pub fn thaw(self) {}

    fn call(&self, what: &str) {
        let status = Command::new("fsfreeze").arg(what).arg(&self.0).status().unwrap();
        assert!(status.success(), "fsfreeze {what} {}: {status}", self.0.display());
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.call("-u");
    }
}

/// Whether a NIC's write waits, inside a page fault, for the thaw of a file system.
pub fn remote_fault_hangs() -> bool {
    remote_faults_that_hang() > 0
}

/// How many do.
pub fn remote_faults_that_hang() -> usize {
    let hangs = |stack: &str| stack.contains("rxe_") && stack.contains("percpu_rwsem_wait");
    // Processes come and go, and only kernel threads are asked for.
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| std::fs::read_to_string(entry.ok()?.path().join("stack")).ok())
        .filter(|stack| hangs(stack))
        .count()
}

/// What another process finds in a file, by CPU loads: a READ by the NIC could repeat a mistake of
/// the NIC's WRITE.
pub fn read_by_another_process(path: &Path) -> Vec<u8> {
    let output = Command::new("cat").arg(path).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "cat {}: {}", path.display(), output.status);
    output.stdout
}

/// Another process empties a file and grows it again for `len` bytes of its own.
pub fn rewrite_by_another_process(path: &Path, byte: char, len: usize) {
    let script = r#": > "$1" && head -c "$3" /dev/zero | tr '\0' "$2" > "$1" && sync "$1""#;
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(path).arg(byte.to_string()).arg(len.to_string());
    let status = command.status().unwrap();
    assert!(status.success(), "rewriting {}: {status}", path.display());
}

/// A truncate(2) that waits as long as the kernel makes it wait.
#[derive(Debug)]
pub struct Truncation(tokio::task::JoinHandle<nix::Result<()>>);

impl Truncation {
    /// Starts it, from this process, which is not the one that guards the file.
    pub fn start(path: PathBuf, len: i64) -> Self {
        Self(tokio::task::spawn_blocking(move || nix::unistd::truncate(&path, len)))
    }

    /// Whether it has gone through already.
    pub fn is_done(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits until it has gone through.
    pub async fn done(self) {
        self.0.await.unwrap().unwrap();
    }
}

/// Another process that has a file open, until it is dropped.
#[derive(Debug)]
pub struct Opener(Child);

impl Opener {
    /// Opens it for reading.
    pub fn reading(path: &Path) -> Self {
        Self::start("<", path)
    }

    /// Opens it for writing.
    pub fn writing(path: &Path) -> Self {
        Self::start(">>", path)
    }

    fn start(redirection: &str, path: &Path) -> Self {
        let script = format!(r#"exec 9{redirection}"$1" && echo open && read -r _"#);
        let mut command = Command::new("sh");
        command.args(["-c", &script, "sh"]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "open\n", "{} could not be opened", path.display());
        Self(child)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

/// It has closed the file when this returns.
impl Drop for Opener {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
