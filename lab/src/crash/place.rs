//! Where files are to survive.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::{FileSystem, required};

/// A file system whose medium outlives the guest.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// ext4 with DAX: what is stored is on the medium at once, but for its metadata.
    Ext4,
    /// XFS with DAX: the same.
    Xfs,
    /// ext4 on a disk: what is not flushed is in the guest's page cache, and lost with it.
    PageCache,
}

impl Place {
    /// Where it is mounted.
    pub fn mount_point(self) -> PathBuf {
        match self {
            Self::Ext4 => FileSystem::Ext4.mount_point(),
            Self::Xfs => FileSystem::Xfs.mount_point(),
            Self::PageCache => PathBuf::from(required("PINFOLD_LAB_DISK")),
        }
    }

    /// What the kernel logs when it mounts the file system after a power cut, and only then.
    pub fn replay(self) -> &'static str {
        match self {
            Self::Ext4 => "EXT4-fs (pmem0): recovery complete",
            Self::Xfs => "XFS (pmem1): Starting recovery",
            Self::PageCache => "EXT4-fs (vda): recovery complete",
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = [Self::Ext4, Self::Xfs, Self::PageCache];
        let found = all.into_iter().find(|place| place.to_string() == name);
        found.ok_or_else(|| format!("ext4, xfs or page-cache, not {name}"))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::PageCache => "page-cache",
        })
    }
}
