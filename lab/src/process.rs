//! Other processes on the storage host: those whom the guard is about.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::required;

/// A binary of this workspace.
pub fn tool(name: &str) -> PathBuf {
    Path::new(&required("PINFOLD_BIN_DIR")).join(name)
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

    /// Waits until it has gone through.
    pub async fn done(self) {
        self.0.await.unwrap().unwrap();
    }
}
