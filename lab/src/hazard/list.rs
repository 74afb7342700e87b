//! Every hazard that one process and one file are enough for, in the words of the table.

use super::place::Place;

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Hazard {
    /// What a process does.
    pub name: &'static str,
    /// How.
    pub thing: Thing,
    /// Why it is harmless, or what it means that it is not covered; said where it is so.
    pub note: &'static str,
    /// File systems that it makes sense on; all if empty.
    pub only_on: &'static [&'static str],
}

/// How a hazard is brought about.
#[derive(Clone, Copy, Debug)]
pub enum Thing {
    /// By the breaker, under this name.
    Does(&'static str),
    /// By a program, with the file as last argument.
    Runs(&'static [&'static str]),
    /// By the breaker, which has the file open (or named) before we come.
    HasOpen(&'static str),
}

impl Hazard {
    /// Whether the row has a cell for this file system.
    pub fn applies_to(&self, place: &Place) -> bool {
        self.only_on.is_empty() || self.only_on.contains(&place.kind)
    }
}

const NAMES_ONLY: &str = "the name changes, the file and its extents stay";
const SAME_BYTES: &str = "it shares extents, and who writes next gets new ones";
const NO_EXTENT: &str = "it touches no extent";
const IN_PLACE: &str = "it changes an attribute, no extent";

const fn does(name: &'static str, thing: &'static str, note: &'static str) -> Hazard {
    Hazard { name, thing: Thing::Does(thing), note, only_on: &[] }
}

const fn has_open(name: &'static str, thing: &'static str) -> Hazard {
    Hazard { name, thing: Thing::HasOpen(thing), note: "", only_on: &[] }
}

const fn runs(
    name: &'static str,
    argv: &'static [&'static str],
    only_on: &'static [&'static str],
) -> Hazard {
    Hazard { name, thing: Thing::Runs(argv), note: NO_EXTENT, only_on }
}

/// The rows, in the order of the table.
pub const HAZARDS: &[Hazard] = &[
    does("open for reading", "open-read", NO_EXTENT),
    does("open for writing", "open-write", NO_EXTENT),
    does("open for reading and writing", "open-read-write", NO_EXTENT),
    does("open for appending", "open-append", NO_EXTENT),
    does("open with `O_CREAT`", "open-create", NO_EXTENT),
    does("open with `O_DIRECT`", "open-direct", NO_EXTENT),
    does("open with `O_TRUNC`", "open-truncate", ""),
    does("open with `O_RDONLY\\|O_TRUNC`", "open-read-truncate", ""),
    does("open for reading with `O_NONBLOCK`", "open-read-nonblock", NO_EXTENT),
    does("open for writing with `O_NONBLOCK`", "open-write-nonblock", NO_EXTENT),
    does("open with `O_TRUNC\\|O_NONBLOCK`, as coreutils' truncate", "open-truncate-nonblock", ""),
    does("open with `O_PATH`", "open-path", NO_EXTENT),
    does("stat", "stat", NO_EXTENT),
    does("truncate(2) to less", "truncate", ""),
    does("truncate(2) to more", "truncate-larger", ""),
    does("truncate(2) by /proc/self/fd of an `O_PATH` descriptor", "truncate-path", ""),
    does("open, then ftruncate", "open-ftruncate", ""),
    does("open, then pwrite", "open-pwrite", ""),
    does("open, then fallocate", "open-allocate", ""),
    does("open, then punch a hole", "open-punch", ""),
    does("open, then collapse a range", "open-collapse", ""),
    does("open, then insert a range", "open-insert", ""),
    does("open, then zero a range", "open-zero", ""),
    does("copy_file_range into it", "copy-range-to", ""),
    does("`FICLONE` from it", "clone-from", SAME_BYTES),
    does("`FICLONE` over it", "clone-to", ""),
    does("`FIDEDUPERANGE` from it", "dedupe-from", SAME_BYTES),
    does("`FIDEDUPERANGE` into it", "dedupe-to", SAME_BYTES),
    runs("`e4defrag` (`EXT4_IOC_MOVE_EXT`)", &["e4defrag"], &["ext4"]),
    runs("`xfs_fsr` (exchange of extents)", &["xfs_fsr", "-v"], &["xfs"]),
    does("execve", "execute", ""),
    does("open_by_handle_at for reading, as nfsd and backups", "handle-read", NO_EXTENT),
    does("open_by_handle_at for writing", "handle-write", NO_EXTENT),
    does("io_uring open for reading", "uring-open-read", NO_EXTENT),
    does("io_uring open with `O_TRUNC`", "uring-open-truncate", ""),
    does("io_uring unlink", "uring-unlink", NAMES_ONLY),
    does("open of an `O_PATH` descriptor by /proc/self/fd", "reopen-path", NO_EXTENT),
    does("open of our own descriptor by /proc/PID/fd", "reopen-holder", NO_EXTENT),
    does("unlink", "unlink", NAMES_ONLY),
    does("rename", "rename", NAMES_ONLY),
    does("rename over it", "rename-over", NAMES_ONLY),
    does("rename with `RENAME_EXCHANGE`", "rename-exchange", NAMES_ONLY),
    does("rename of its folder", "rename-folder", NAMES_ONLY),
    does("link", "link", NAMES_ONLY),
    does("symlink to it", "symlink", NO_EXTENT),
    does("chmod", "chmod", IN_PLACE),
    does("chown", "chown", IN_PLACE),
    does("utimensat", "utimes", IN_PLACE),
    does("setxattr", "setxattr", IN_PLACE),
    does("file_setattr(2), which opens nothing", "file-setattr", IN_PLACE),
    does("open, then chattr", "open-chattr", IN_PLACE),
    does(
        "open, then `chattr -a` by root",
        "open-clear-append-only",
        "a seal is gone then: it is looked at every two seconds, and its loss counts as a break",
    ),
    has_open("a descriptor for reading, opened before", "hold-read"),
    has_open("a descriptor for writing, opened before (ftruncate, fallocate …)", "hold-write"),
    has_open("a shared writable mapping, made before", "hold-mapped"),
    has_open("an `O_PATH` descriptor, opened before, then opened for real", "hold-path"),
];
