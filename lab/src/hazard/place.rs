//! File systems for the hazard table: the lab's own, and one without DAX.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::FileSystem;

/// A mounted file system.
#[derive(Debug)]
pub struct Place {
    /// Its name in the table.
    pub name: &'static str,
    /// Its type for mount(8).
    pub kind: &'static str,
    /// What it lies on; none for tmpfs.
    pub device: Option<String>,
    /// Mount options that make it what it is.
    pub options: &'static str,
    path: PathBuf,
    /// The backing file of a loop device, unmounted with it.
    _image: Option<Image>,
}

#[derive(Debug)]
struct Image {
    _folder: tempfile::TempDir,
    mount_point: PathBuf,
    device: String,
}

impl Place {
    /// All of them.
    pub fn all() -> Vec<Self> {
        vec![
            Self::of("ext4 DAX", FileSystem::Ext4),
            Self::of("XFS DAX", FileSystem::Xfs),
            Self::of("tmpfs", FileSystem::Tmpfs),
            Self::ext4_without_dax(),
        ]
    }

    /// Where files can be made.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Mounts the file system a second time, or a folder of it.
    pub(super) fn mount_again(&self, what: &Path) -> Mount {
        let folder = tempfile::tempdir_in(FileSystem::Tmpfs.mount_point()).unwrap();
        let to = folder.path().to_str().unwrap();
        match &self.device {
            Some(device) if what == self.path => {
                run("mount", &["-t", self.kind, "-o", self.mount_options(), device, to]);
            }
            _ => run("mount", &["--bind", what.to_str().unwrap(), to]),
        }
        Mount { folder }
    }

    /// Makes it anew: for after it was shut down.
    pub(super) fn renew(&self) {
        let device = self.device.as_deref().unwrap();
        run("umount", &[self.path.to_str().unwrap()]);
        match self.kind {
            "xfs" => run("mkfs.xfs", &["-q", "-f", device]),
            _ => run("mkfs.ext4", &["-q", "-F", "-b", "4096", device]),
        }
        let to = self.path.to_str().unwrap();
        run("mount", &["-t", self.kind, "-o", self.mount_options(), device, to]);
    }

    pub(super) fn is_dax(&self) -> bool {
        self.options.contains("dax")
    }

    fn mount_options(&self) -> &str {
        if self.options.is_empty() { "rw" } else { self.options }
    }

    fn of(name: &'static str, file_system: FileSystem) -> Self {
        let path = file_system.mount_point();
        let device = file_system.device();
        let options = if device.is_some() { "dax=always" } else { "" };
        Self { name, kind: file_system.kind(), device, options, path, _image: None }
    }

    /// On a loop device over memory.
    fn ext4_without_dax() -> Self {
        let folder = tempfile::tempdir_in(FileSystem::Tmpfs.mount_point()).unwrap();
        let (file, path) = (folder.path().join("image"), folder.path().join("mnt"));
        std::fs::create_dir(&path).unwrap();
        std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        let file = file.to_str().unwrap();
        run("modprobe", &["loop"]);
        run("mkfs.ext4", &["-q", "-F", "-b", "4096", file]);
        let losetup = Command::new("losetup").args(["--find", "--show", file]).output().unwrap();
        let device = String::from_utf8(losetup.stdout).unwrap().trim_end().to_owned();
        assert!(!device.is_empty(), "{}", String::from_utf8_lossy(&losetup.stderr));
        run("mount", &["-t", "ext4", &device, path.to_str().unwrap()]);
        let image = Image { _folder: folder, mount_point: path.clone(), device: device.clone() };
        Self {
            name: "ext4",
            kind: "ext4",
            device: Some(device),
            options: "",
            path,
            _image: Some(image),
        }
    }
}

/// Another mount; it goes when it is dropped.
#[derive(Debug)]
pub(super) struct Mount {
    folder: tempfile::TempDir,
}

impl Mount {
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Who has unmounted it already leaves nothing to do.
        let _ = Command::new("umount").arg(self.path()).stderr(Stdio::null()).status();
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // A mount that stays keeps its folder; the guest ends soon.
        let _ = Command::new("umount").arg(&self.mount_point).status();
        let _ = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}

/// Runs a program that must succeed.
pub(super) fn run(program: &str, arguments: &[&str]) {
    let mut command = Command::new(program);
    let output = command.args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
}
