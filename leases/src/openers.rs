//! Who else has a file open, and who waits for it: what /proc tells, as far as rights go.

use std::fmt;
use std::fs;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};

use crate::description::{Description, FileIdentity};

/// How somebody has a file open.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OpenMode {
    /// Open for reading.
    Read,
    /// Open for writing, or for both.
    Write,
    /// No descriptor any more, but a mapping.
    Mapped,
    /// /proc does not tell.
    Unknown,
}

/// A process that has a file open or mapped.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Opener {
    /// Process id.
    pub pid: u32,
    /// The process's short name (`/proc/PID/comm`).
    pub command: String,
    /// Descriptor number; `None` for a mapping.
    pub fd: Option<u32>,
    /// How it is open.
    pub mode: OpenMode,
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({}", self.pid, self.command)?;
        match (self.fd, self.mode) {
            (Some(fd), OpenMode::Read) => write!(f, ", fd {fd}, reading)"),
            (Some(fd), OpenMode::Write) => write!(f, ", fd {fd}, writing)"),
            (Some(fd), _) => write!(f, ", fd {fd})"),
            (None, OpenMode::Mapped) => write!(f, ", mapped)"),
            (None, _) => write!(f, ")"),
        }
    }
}

/// Lists the processes that have a file open or mapped, `ours` left out. Processes that we may not
/// look into do not appear.
pub fn openers(file: FileIdentity, ours: Option<&Description>) -> Vec<Opener> {
    use std::os::fd::AsRawFd;
    let own_fd = ours.map(|description| description.fd().as_raw_fd() as u32);
    let me = std::process::id();
    let mut found = Vec::new();
    for pid in processes() {
        let before = found.len();
        for fd in descriptors_of(pid, file) {
            if pid == me && Some(fd) == own_fd {
                continue;
            }
            if let Some(mode) = mode(pid, fd) {
                found.push(Opener { pid, command: command(pid), fd: Some(fd), mode });
            }
        }
        if pid != me && found.len() == before && maps(pid, file) {
            found.push(Opener { pid, command: command(pid), fd: None, mode: OpenMode::Mapped });
        }
    }
    found
}

/// All locks and leases, and who waits for them: proc_locks(5).
pub(crate) fn locks() -> String {
    fs::read_to_string("/proc/locks").unwrap_or_default()
}

/// Lists the processes that the kernel holds back until a lease on this file is let go: the
/// `LEASE BREAKER` lines of /proc/locks, see proc_locks(5).
pub fn waiting_breakers(file: FileIdentity) -> Vec<Opener> {
    breaker_pids(&locks(), file)
        .into_iter()
        .map(|(pid, mode)| Opener { pid, command: command(pid), fd: None, mode })
        .collect()
}

/// What the kernel notes of a lease beside what `F_GETLEASE` tells.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct OwnLease {
    /// Somebody waits for it.
    pub(crate) breaking: bool,
    /// What it allows, or during a break what that asks for.
    pub(crate) kind: OwnKind,
}

/// As in /proc/locks: `WRITE`, `READ`, `UNLCK`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum OwnKind {
    Write,
    Read,
    None,
}

/// The lease or delegation on one of our descriptors, as `/proc/self/fdinfo` shows it: the one
/// place that tells a pending downgrade from one that is done. `None` if there is none, or if that
/// can't be learned.
pub(crate) fn own_lease(fd: std::os::fd::BorrowedFd<'_>) -> Option<OwnLease> {
    own_info(fd)?.lines().find_map(lease_line)
}

/// Whether our lease or delegation is what /proc/locks shows for an inode, as `00:1b:3`. The device
/// is compared with what the kernel says of the lease: `st_dev` is another one on btrfs.
pub(crate) fn is_inode(ours: &Description, inode: &str) -> bool {
    let number = inode.rsplit(':').next().and_then(|number| number.parse().ok());
    number == Some(ours.identity().inode)
        && own_info(ours.fd()).is_some_and(|info| {
            let mut lines = info.lines().filter(|line| lease_line(line).is_some());
            lines.any(|line| line.split_whitespace().any(|word| word == inode))
        })
}

fn own_info(fd: std::os::fd::BorrowedFd<'_>) -> Option<String> {
    use std::os::fd::AsRawFd;
    fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()
}

/// Reads `lock: 1: DELEG ACTIVE READ 70 00:1b:3 0 EOF` (`lock_get_status` in fs/locks.c).
fn lease_line(line: &str) -> Option<OwnLease> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_whitespace().collect();
    let [_, "LEASE" | "DELEG", state, kind, ..] = words[..] else { return None };
    let kind = match kind {
        "WRITE" => OwnKind::Write,
        "READ" => OwnKind::Read,
        _ => OwnKind::None,
    };
    Some(OwnLease { breaking: state != "ACTIVE", kind })
}

/// The process that holds a flock(2) on a file for itself alone, if /proc/locks shows it to us.
pub(crate) fn flock_holder(file: FileIdentity) -> Option<u32> {
    // A reading may skip a line while others lock and unlock.
    (0..5).find_map(|_| flock_pid(&locks(), file))
}

fn flock_pid(locks: &str, file: FileIdentity) -> Option<u32> {
    let inode = inode_in_locks(file);
    locks.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            [_, "FLOCK", _, "WRITE", pid, at, ..] if at == inode => pid.parse().ok(),
            _ => None,
        }
    })
}

/// How /proc/locks and /proc/PID/maps name an inode's device, and the first also the inode.
fn inode_in_locks(file: FileIdentity) -> String {
    format!("{}:{}", device_in_proc(file), file.inode)
}

fn device_in_proc(file: FileIdentity) -> String {
    format!("{:02x}:{:02x}", rustix::fs::major(file.device), rustix::fs::minor(file.device))
}

/// A waiter's line carries no inode of its own; it follows the line of the lease it waits for, with
/// the same number.
fn breaker_pids(locks: &str, file: FileIdentity) -> Vec<(u32, OpenMode)> {
    let inode = inode_in_locks(file);
    let mut ours = false;
    let mut found = Vec::new();
    for line in locks.lines() {
        let mut words = line.split_whitespace().skip(1);
        match words.next() {
            Some("->") => {
                let words: Vec<&str> = words.collect();
                if let ["LEASE" | "DELEG", "BREAKER", kind, pid, ..] = words[..]
                    && ours
                    && let Ok(pid) = pid.parse()
                {
                    let mode = if kind == "READ" { OpenMode::Read } else { OpenMode::Write };
                    found.push((pid, mode));
                }
            }
            _ => ours = line.split_whitespace().any(|word| word == inode),
        }
    }
    found
}

fn processes() -> impl Iterator<Item = u32> {
    numbers_in(Path::new("/proc"))
}

fn numbers_in(folder: &Path) -> impl Iterator<Item = u32> + use<> {
    fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

fn descriptors_of(pid: u32, file: FileIdentity) -> impl Iterator<Item = u32> {
    let folder = format!("/proc/{pid}/fd");
    numbers_in(Path::new(&folder)).filter(move |fd| {
        // statx through the link opens nothing, so it breaks no lease; DONT_SYNC, so that a file
        // on a dead network mount, open in whatever process, does not hang us.
        let link = format!("{folder}/{fd}");
        let (flags, mask) = (AtFlags::STATX_DONT_SYNC, StatxFlags::INO | StatxFlags::TYPE);
        statx(CWD, link.as_str(), flags, mask).is_ok_and(|found| {
            makedev(found.stx_dev_major, found.stx_dev_minor) == file.device
                && found.stx_ino == file.inode
        })
    })
}

/// `None` for an `O_PATH` descriptor: it names the file but does not open it.
fn mode(pid: u32, fd: u32) -> Option<OpenMode> {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
    let flags = info
        .lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok());
    match flags {
        Some(flags) if flags & libc::O_PATH != 0 => None,
        Some(flags) if flags & libc::O_ACCMODE == libc::O_RDONLY => Some(OpenMode::Read),
        Some(_) => Some(OpenMode::Write),
        None => Some(OpenMode::Unknown),
    }
}

fn maps(pid: u32, file: FileIdentity) -> bool {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let device = device_in_proc(file);
    let inode = file.inode.to_string();
    maps.lines().any(|line| {
        let mut words = line.split_whitespace().skip(3);
        words.next() == Some(&device) && words.next() == Some(&inode)
    })
}

fn command(pid: u32) -> String {
    match fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => name.trim_end().to_owned(),
        Err(_) => "gone".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_read_from_fdinfo() {
        let lease = |line: &str| lease_line(line).map(|lease| (lease.breaking, lease.kind));
        let read = "lock:\t1: DELEG  ACTIVE    READ 70 00:1b:3 0 EOF";
        assert_eq!(lease(read), Some((false, OwnKind::Read)));
        let waited_for = read.replace("ACTIVE", "BREAKING");
        assert_eq!(lease(&waited_for), Some((true, OwnKind::Read)));
        let write = "lock:\t1: LEASE  ACTIVE    WRITE 70 00:1b:3 0 EOF";
        assert_eq!(lease(write), Some((false, OwnKind::Write)));
        let broken = "lock:\t2: LEASE  BREAKING  UNLCK 70 00:1b:3 0 EOF";
        assert_eq!(lease(broken), Some((true, OwnKind::None)));
        assert_eq!(lease("lock:\t1: OFDLCK ADVISORY  WRITE -1 00:1b:3 0 EOF"), None);
        assert_eq!(lease("flags:\t0100002"), None);
    }

    #[test]
    fn a_breaker_belongs_to_the_lease_line_before_it() {
        let locks = "1: LEASE  BREAKING  UNLCK 70 00:1b:2 0 EOF\n\
                     1: -> LEASE  BREAKER   WRITE 72 <none>:0 0 EOF\n\
                     1: -> LEASE  BREAKER   READ 73 <none>:0 0 EOF\n\
                     2: DELEG  BREAKING  READ 70 00:1b:3 0 EOF\n\
                     2: -> DELEG  BREAKER   READ 74 <none>:0 0 EOF\n\
                     3: POSIX  ADVISORY  WRITE 75 00:1b:2 0 EOF\n";
        let file =
            |inode| FileIdentity { device: rustix::fs::makedev(0, 0x1b), inode, birth_time_ns: 0 };
        assert_eq!(breaker_pids(locks, file(2)), [(72, OpenMode::Write), (73, OpenMode::Read)]);
        assert_eq!(breaker_pids(locks, file(3)), [(74, OpenMode::Read)]);
        assert_eq!(breaker_pids(locks, file(4)), []);
    }
}
