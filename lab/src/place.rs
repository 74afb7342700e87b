//! Where in the lab things are: what the VM's init has set up and named in the environment.

use std::path::PathBuf;

use crate::shell;

/// A file system of the lab. ext4 and XFS are mounted with `dax=always` on emulated persistent
/// memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FileSystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// tmpfs: memory that can be pinned, and nothing that lasts.
    Tmpfs,
}

impl FileSystem {
    /// Where it is mounted.
    pub fn mount_point(self) -> PathBuf {
        PathBuf::from(required(match self {
            Self::Ext4 => "PINFOLD_LAB_EXT4",
            Self::Xfs => "PINFOLD_LAB_XFS",
            Self::Tmpfs => "TMPDIR",
        }))
    }

    /// Its name for mount(8).
    pub fn kind(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Tmpfs => "tmpfs",
        }
    }

    /// What it lies on; none for tmpfs.
    pub fn device(self) -> Option<String> {
        if self == Self::Tmpfs {
            return None;
        }
        let mount_point = self.mount_point();
        let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
        let device = mounts.lines().find_map(|line| {
            let mut words = line.split(' ');
            let device = words.next()?;
            (words.next()? == mount_point.to_str()?).then(|| device.to_owned())
        });
        assert!(device.is_some(), "nothing is mounted on {}", mount_point.display());
        device
    }

    /// Unmounts it, which fails if anything still holds a file or a folder; mounts it again with these
    /// options when what is returned is dropped.
    pub fn unmount(self, options: &str) -> Unmounted {
        let (at, device) = (self.mount_point(), self.device().expect("it lies on a device"));
        shell(&format!("umount {}", at.display()));
        Unmounted(format!("mount -t {} -o {options} {device} {}", self.kind(), at.display()))
    }

    /// Unmounts and mounts again, which fails if anything still holds a file.
    pub fn remount(self, options: &str) {
        self.unmount(options).mount();
    }
}

/// A file system that is not mounted for now.
#[derive(Debug)]
pub struct Unmounted(String);

impl Unmounted {
    /// Mounts it again.
    pub fn mount(self) {}
}

impl Drop for Unmounted {
    fn drop(&mut self) {
        shell(&self.0);
    }
}

/// The soft NIC.
pub fn device_name() -> String {
    required("PINFOLD_LAB_RDMA_DEVICE")
}

/// A variable that the lab's init sets.
pub fn required(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set: these tests run in the lab, by `cargo xtask vm test`")
    })
}
