//! What can go wrong, and what to do about it.

use std::io;
use std::path::PathBuf;

use crate::openers::Opener;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a file could not be opened, guarded, mapped or fenced.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path can't be used beneath an export.
    #[error(
        "{path:?} leaves the export: {why}; name a file by its path inside the export, without \"..\", \
         symbolic links or other mounts"
    )]
    OutsideExport {
        /// As the caller gave it.
        path: String,
        /// Which rule it broke.
        why: &'static str,
    },
    /// No such file, or a folder on the way is missing.
    #[error("there is no file {}", path.display())]
    NotFound {
        /// Export and path.
        path: PathBuf,
    },
    /// The file is there already.
    #[error("{} exists already; ask for it to be resized, or choose another name", path.display())]
    Exists {
        /// Export and path.
        path: PathBuf,
    },
    /// Only regular files have extents to keep in place.
    #[error("{} is {kind}, not a regular file", path.display())]
    NotRegular {
        /// Export and path.
        path: PathBuf,
        /// "a directory", "a FIFO", …
        kind: &'static str,
    },
    /// The export itself can't be used.
    #[error("can't use {} as an export; it must be a directory that this process may search, or a DAX device", path.display())]
    Export {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The device can't be an export.
    #[error("can't use the device {} as an export: {why}", path.display())]
    Device {
        /// The device.
        path: PathBuf,
        /// Why, and what would help.
        why: NoDaxDevice,
    },
    /// A device is as large as it is, and stays.
    #[error(
        "{} is a device: it is there, in its full size, and nothing in it can be created, resized or \
         removed; pin it and write", path.display()
    )]
    FixedSize {
        /// The device.
        path: PathBuf,
    },
    /// The bytes behind a mapping are gone.
    #[error(
        "bytes {start}..{end} of {} can't be reached: the medium has an error there (`ndctl list -M`), \
         or the device was taken from its driver", path.display()
    )]
    MediumLost {
        /// The device.
        path: PathBuf,
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// The kernel's word.
        source: io::Error,
    },
    /// The process may not do this to the file.
    #[error("may not {call} {}; run as the file's owner, or with {capability}", path.display())]
    Denied {
        /// The file.
        path: PathBuf,
        /// What was tried.
        call: &'static str,
        /// What would allow it.
        capability: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// Somebody else has the file open, so the kernel grants no guard.
    #[error("{} is in use by {}; a guard needs the file to itself: close it there and try again",
            path.display(), Listed(openers))]
    Busy {
        /// The file.
        path: PathBuf,
        /// Who, as far as /proc tells.
        openers: Vec<Opener>,
    },
    /// A description takes one guard at a time.
    #[error("{} has a guard already through this description; release it first", path.display())]
    AlreadyArmed {
        /// The file.
        path: PathBuf,
    },
    /// The file system takes neither delegations nor leases.
    #[error("{} lies on a file system that grants no leases (or fs.leases-enable is 0)", path.display())]
    NoGuard {
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A program that sealed the file is still at work on it, or ended without releasing it.
    #[error(
        "{} is sealed: append-only, and marked as ours; if no program holds it any more, lift the \
         seal (Located::unseal)", path.display()
    )]
    Sealed {
        /// The file.
        path: PathBuf,
    },
    /// The file system keeps no append-only flag, or no extended attributes to mark it with.
    #[error(
        "{} can't be sealed: {call} says no; use ext4, XFS, or another file system with user \
         extended attributes and chattr +a", path.display()
    )]
    NoSeal {
        /// The file.
        path: PathBuf,
        /// The system call.
        call: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// A reader can't be left to the kernel.
    #[error("no reader of {} can be outwaited: {why}", path.display())]
    CannotOutwait {
        /// The file.
        path: PathBuf,
        /// Why.
        why: NoOutwait,
    },
    /// Somebody cancelled the wait.
    #[error("the wait for {} was cancelled", path.display())]
    Cancelled {
        /// The file.
        path: PathBuf,
    },
    /// Another description has locked a part of the range (OFD lock, fcntl(2)).
    #[error(
        "bytes {start}..{end} of {} are locked by {}; unlock them there and try again",
        path.display(), ByWhom(pid)
    )]
    RangeLocked {
        /// The file.
        path: PathBuf,
        /// First byte asked for.
        start: u64,
        /// One past the last.
        end: u64,
        /// The holder, if it is a process's own lock and not a description's.
        pid: Option<u32>,
    },
    /// Another program serves the export.
    #[error(
        "{} is locked by {}; only one program may serve an export: end that one first",
        path.display(), ByWhom(pid)
    )]
    ExportLocked {
        /// The directory.
        path: PathBuf,
        /// The holder, if /proc/locks tells.
        pid: Option<u32>,
    },
    /// Nobody has checked what a lease on this file system is worth.
    #[error(
        "{} lies on a file system ({}) of which it is not known that leases hold its files still; \
         export a directory on ext4, XFS, btrfs, f2fs or tmpfs", path.display(), Named(*magic)
    )]
    UnknownFileSystem {
        /// The file.
        path: PathBuf,
        /// `f_type`, statfs(2).
        magic: i64,
    },
    /// The file system has no room, or a quota is used up.
    #[error(
        "no room for {bytes} bytes in {}{}; free space or raise the quota", path.display(),
        Kept(*kept_bytes)
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// How much was asked for.
        bytes: u64,
        /// Bytes of storage that a failed growth holds past the end of the file, and could not give back.
        kept_bytes: u64,
        /// `ENOSPC` or `EDQUOT`.
        source: io::Error,
    },
    /// The caller stopped the creation before it was finished.
    #[error("the creation of {} was stopped; nothing of it is left", path.display())]
    CreationStopped {
        /// Its path.
        path: PathBuf,
    },
    /// The file is there, whole, but the write of its folder failed.
    #[error(
        "{} was made, but its name may not survive a power cut: fsync of its folder failed; check the disk",
        path.display()
    )]
    NameNotDurable {
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// The kernel could not write the file back to its medium, or can't say whether it did. It reports
    /// that once for each open file description, and may count the bytes as written afterwards: bytes
    /// written since the last flush that succeeded may be missing on the medium.
    #[error(
        "{call} failed on {}: bytes written to it since it was last flushed may be missing on its medium; \
         free space there or replace the device, then write them again", path.display()
    )]
    WriteBack {
        /// "fsync" or "msync".
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's word: `EIO`, `ENOSPC`, `EDQUOT`, …
        source: io::Error,
    },
    /// A range that does not lie inside the mapping.
    #[error("bytes {start}..{end} are not inside the {len} bytes that are mapped")]
    OutOfMapping {
        /// First byte.
        start: u64,
        /// One past the last byte.
        end: u64,
        /// Length of the mapping.
        len: u64,
    },
    /// Nothing new may be built on a mapping that is fenced.
    #[error("the mapping is fenced already; pin the file again to get a new one")]
    AlreadyFenced,
    /// The guard was broken while work on it was under way.
    #[error("the guard on the file was broken meanwhile")]
    Broken,
    /// A system call on a file failed.
    #[error("{call} failed on {}", path.display())]
    File {
        /// The system call.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's word.
        source: io::Error,
    },
    /// A system call on a mapping failed.
    #[error("{call} failed on {len} bytes of a mapping of {}", path.display())]
    Memory {
        /// The system call.
        call: &'static str,
        /// The file.
        path: PathBuf,
        /// Length of the range.
        len: usize,
        /// The kernel's word.
        source: io::Error,
    },
    /// The watcher thread could not be started.
    #[error("could not start the thread that waits for lease breaks")]
    Watcher {
        /// Why.
        source: io::Error,
    },
    /// Waiting for a file did not work.
    #[error("{call} failed while waiting for a file")]
    Wait {
        /// The system call.
        call: &'static str,
        /// The kernel's word.
        source: io::Error,
    },
    /// A kernel setting could not be read.
    #[error("can't read {path}")]
    Sysctl {
        /// The file under /proc.
        path: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A file system by its `f_type` (linux/magic.h): those that people export by mistake have names.
struct Named(i64);

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.0 {
            0x794c_7630 => "overlay",
            0x8584_58f6 => "ramfs",
            0x9584_58f6 => "hugetlbfs",
            0x0102_1997 => "9p",
            0x6573_5546 => "FUSE",
            0x6969 => "NFS",
            0x4d44 => "FAT",
            0x7371_7368 => "squashfs",
            other => return write!(f, "type {other:#x}"),
        };
        f.write_str(name)
    }
}

/// Why a reader can't be outwaited.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NoOutwait {
    /// A plain lease that was downgraded lets `open(O_RDONLY|O_TRUNC)` empty the file unseen.
    #[error(
        "the guard is \"{tier}\", and only a delegation (Linux 6.19) is safe once readers pass"
    )]
    NotADelegation {
        /// What it is.
        tier: crate::GuardTier,
    },
    /// The kernel never lets the reader through.
    #[error("fs.lease-break-time is 0, so the reader would wait for ever; set it to some seconds")]
    Never,
    /// The reader would wait for longer than the caller allows.
    #[error("fs.lease-break-time is {} s, above the limit of {} s; lower it", time.as_secs(), longest.as_secs())]
    TooLong {
        /// What it is.
        time: std::time::Duration,
        /// What is allowed.
        longest: std::time::Duration,
    },
}

/// Why a device can't be an export.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NoDaxDevice {
    /// `/dev/pmem0` or a disk.
    #[error(
        "it is a block device; mount a file system on it and export a directory, or make its \
         namespace a DAX device (`ndctl create-namespace -m devdax`)"
    )]
    Block,
    /// A terminal, a disk's raw side, …
    #[error("it is no DAX device; those are named like /dev/dax0.0 (`daxctl list`)")]
    OtherKind,
    /// The kernel's driver `kmem` has it.
    #[error(
        "the kernel uses it as memory of the host (mode system-ram); take it back with \
         `daxctl reconfigure-device -m devdax`"
    )]
    SystemRam,
    /// It is in /sys, and nothing is behind it.
    #[error("no driver has it; `daxctl reconfigure-device -m devdax` gives it one")]
    NoDriver,
    /// Its node is older than its driver's last coming.
    #[error(
        "it was taken from its driver and given back while a program had it open; end that program, \
         then `ndctl disable-namespace` and `ndctl enable-namespace`"
    )]
    Stale,
    /// Size 0.
    #[error("it has no bytes; give it some with `ndctl create-namespace -m devdax`")]
    Empty,
    /// Pages of 1 GiB: mprotect(2), the fence, has not been tried on them.
    #[error(
        "its pages have {align} bytes, and no more than 2 MiB are supported; make it with \
         `ndctl create-namespace -m devdax -a 2M`"
    )]
    Alignment {
        /// As sysfs says.
        align: u64,
    },
}

struct Kept(u64);

impl std::fmt::Display for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            bytes => write!(f, " ({bytes} bytes stay allocated past its end until it is unpinned)"),
        }
    }
}

struct ByWhom<'a>(&'a Option<u32>);

impl std::fmt::Display for ByWhom<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(pid) => write!(f, "process {pid}"),
            None => f.write_str("another open description"),
        }
    }
}

/// Joins openers for a message.
struct Listed<'a>(&'a [Opener]);

impl std::fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f
                .write_str("a process that /proc doesn't show to us (another user's, or nfsd)");
        }
        for (n, opener) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str(", ")?;
            }
            write!(f, "{opener}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those that the lab has no server or user-space part for.
    #[test]
    fn network_and_user_space_file_systems_are_refused_by_name() {
        for (magic, name) in [(0x6969, "NFS"), (0x6573_5546, "FUSE"), (0x0102_1997, "9p")] {
            assert!(!crate::description::is_known(magic), "{name}");
            let path = PathBuf::from("/export/file");
            let refused = Error::UnknownFileSystem { path, magic }.to_string();
            assert!(refused.contains(&format!("({name})")), "{refused}");
        }
    }
}
