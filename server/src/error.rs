//! What can go wrong in the server, in words for the one who asked.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::ids::PinId;
pub use crate::pool::NotDone;
use crate::registry::Refusal;
use crate::room::MAP_AREAS_RESERVED;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a long change of a file stopped early.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Stop {
    /// A local process opens, cuts or reads the file.
    #[error("another process wants the file")]
    Wanted,
    /// The client has cancelled the call.
    #[error("its caller has gone")]
    CallerGone,
    /// The client's session is over.
    #[error("the session has ended")]
    SessionEnded,
    /// The server goes down.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The export is not served for now.
    #[error("its export is being quiesced")]
    Quiesced,
}

/// Why a call is refused. `status.rs` gives each its gRPC code and reason.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The registry's word.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A field is missing or malformed.
    #[error("malformed request: {what}")]
    Malformed {
        /// Which, and what it should be.
        what: String,
    },
    /// No such export.
    #[error("there is no export {name:?}; this server exports {known}")]
    ExportNotFound {
        /// As asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The export is not served for now.
    #[error("export {name} has been quiesced for {} s, by {by}; `pinfold resume {name}` ends that",
            since.as_secs())]
    Quiesced {
        /// The export.
        name: String,
        /// For how long.
        since: Duration,
        /// By whom, as the client says.
        by: String,
    },
    /// The export is not served, and something of it is still open.
    #[error("export {name} is quiesced, but after {} s something of it is still open: {} (is the file \
             system frozen, or its device stuck?); quiesce it again to go on waiting, or resume it",
            waited.as_secs(), some_of(open))]
    StillOpen {
        /// The export.
        name: String,
        /// The files that are known to be.
        open: BTreeSet<PathBuf>,
        /// How long we waited.
        waited: Duration,
    },
    /// The export was resumed before it was quiet.
    #[error("export {name} was resumed before all of it was let go; quiesce it again")]
    ResumedMeanwhile {
        /// The export.
        name: String,
    },
    /// The export's path is another directory's.
    #[error("{} is not the directory or device that export {name} was before it was quiesced; mount \
             its file system there, or restart pinfoldd to serve what is there now", path.display())]
    OtherDirectory {
        /// The export.
        name: String,
        /// Its path.
        path: PathBuf,
    },
    /// The file can't be had.
    #[error(transparent)]
    File(#[from] pinfold_leases::Error),
    /// The path names another file by now.
    #[error("{} is not the file that it was: it has been replaced; read it again before you write", path.display())]
    FileChanged {
        /// The file.
        path: PathBuf,
    },
    /// Somebody else has written to the file, or cut it, since it was last pinned.
    #[error("{} has been changed by another process of the storage host since it was pinned; read it \
             again before you write", path.display())]
    FileModified {
        /// The file.
        path: PathBuf,
    },
    /// The file has lost the name by which it was pinned.
    #[error("{} was {how} by a local process of the storage host while it was pinned, so what was written \
             to the pin is not in a file of that name; pin it again and write it again", path.display())]
    NameGone {
        /// The path that named it.
        path: PathBuf,
        /// What became of the name.
        how: pinfold_leases::NameState,
    },
    /// The file has pins.
    #[error("{} has {} on it, {} of {holder}; try again when {} given back, or have {} revoked",
            path.display(), counted(*pins), if *pins == 1 { "the pin" } else { "one" },
            if *pins == 1 { "it is" } else { "they are" }, if *pins == 1 { "it" } else { "them" })]
    FilePinned {
        /// The file.
        path: PathBuf,
        /// How many.
        pins: usize,
        /// The client of one of them.
        holder: String,
    },
    /// A new file was given up before it was finished.
    #[error("the creation of {} was stopped, because {why}; nothing of it is left", path.display())]
    CreationStopped {
        /// The file.
        path: PathBuf,
        /// Why.
        why: Stop,
    },
    /// A change of size ended early.
    #[error("the size of {} reached {reached} bytes on the way to {wanted}, because {why}; ask for it again",
            path.display())]
    ResizeStopped {
        /// The file.
        path: PathBuf,
        /// Its size now.
        reached: u64,
        /// The size that was asked for.
        wanted: u64,
        /// Why.
        why: Stop,
    },
    /// The range holds nothing.
    #[error("bytes {start}..{end} hold nothing: {why}")]
    BadRange {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The device would misplace what is written to the first bytes of such a pin.
    #[error(
        "a pin that starts at byte {start} can't be had on this device: it places data rightly only \
         from multiples of {alignment} on; start the pin at one"
    )]
    MisalignedPin {
        /// First byte.
        start: u64,
        /// What it must be a multiple of.
        alignment: u64,
    },
    /// The range reaches too far.
    #[error("bytes {start}..{end} reach past {limit}, the end of {what}; ask for less{remedy}")]
    RangePastEnd {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// Where it must end.
        limit: u64,
        /// "the file" or "the pin".
        what: &'static str,
        /// What else could be done.
        remedy: &'static str,
    },
    /// No device.
    #[error("this server has no usable RDMA device: {why}")]
    NoRdmaDevice {
        /// Why not.
        why: String,
    },
    /// No device of that name.
    #[error("this server does not use an RDMA device {name:?}; it uses {known}")]
    UnknownDevice {
        /// As asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The session did not connect a queue pair.
    #[error("this session has no queue pair yet; connect one before pinning")]
    NoQueuePair,
    /// The device can't register this kind of memory.
    #[error("{} is a {kind} file, and {device} can't register that: {why}", path.display())]
    CannotRegister {
        /// The file.
        path: PathBuf,
        /// What its mapping consists of.
        kind: pinfold_leases::MappingKind,
        /// The device.
        device: String,
        /// Why, and what would help.
        why: String,
    },
    /// The file could not be taken back in time, or the host would run out of memory.
    #[error("no more of {} can be registered: {why}", path.display())]
    TooCostly {
        /// The file.
        path: PathBuf,
        /// Which limit, and its value.
        why: crate::revocation_cost::TooMuch,
    },
    /// Nothing on tmpfs outlives the host; and a device's bytes are flushed on x86-64 only.
    #[error("{} is {kind}, and nothing on that can be made durable here; export a directory on \
             pmem or disk for that", path.display())]
    NotDurable {
        /// The file.
        path: PathBuf,
        /// What its mapping consists of.
        kind: pinfold_leases::MappingKind,
    },
    /// A device has one way to be held, which is none.
    #[error("export {name}: {} is a device, which nobody can truncate, so guard, on_truncate, on_read \
             and dax mean nothing there; leave them out", path.display())]
    DevicePolicy {
        /// The export.
        name: String,
        /// The device.
        path: PathBuf,
    },
    /// hugetlbfs takes no lease.
    #[error("{} lies on hugetlbfs, which grants no leases, so nothing can hold it still; export its \
             directory with guard=none, or use a file on ext4, XFS, btrfs, f2fs or tmpfs", path.display())]
    CannotBeGuarded {
        /// The file.
        path: PathBuf,
    },
    /// hugetlbfs takes no writes but by mapping.
    #[error("{} lies on hugetlbfs, which takes no write(2), so its pins can't be written by the stream \
             path; use RDMA", path.display())]
    NoStreamWrites {
        /// The file.
        path: PathBuf,
    },
    /// The file is pinned through another export, with another policy.
    #[error("{} is pinned already through another export, which holds files in another way \
             ({tier}); pin it through that one, or wait until it has no pins", path.display())]
    HeldOtherwise {
        /// The file.
        path: PathBuf,
        /// How.
        tier: pinfold_leases::GuardTier,
    },
    /// The queue pair could not be connected.
    #[error("the queue pair could not be connected: {why}")]
    QueuePair {
        /// Why, and what would help.
        why: String,
    },
    /// A verb failed.
    #[error(transparent)]
    Verbs(#[from] pinfold_verbs::Error),
    /// Others needed the file for too long.
    #[error("{} was still being taken back after {} s; pin it again later", path.display(), waited.as_secs())]
    StillDraining {
        /// The file.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// A local process that did not wait for the file may come back for it.
    #[error("{} was wanted by a local process that did not wait (O_NONBLOCK, or an NFS client), so it is left \
             alone for up to {} s more until one has opened it; pin it again later", path.display(),
            left.as_secs() + 1)]
    LeftAlone {
        /// The file.
        path: PathBuf,
        /// At most so long.
        left: Duration,
    },
    /// A stream write from before the last release has not come out of the kernel yet.
    #[error("{} can't be used yet: a stream write that began before it was taken back is still inside \
             the kernel, and may land; try again when it is out (is the file system frozen, or its \
             device stuck?)", path.display())]
    WrittenLate {
        /// The file.
        path: PathBuf,
    },
    /// The device or the kernel refused a memory region.
    #[error("{} can't be registered", path.display())]
    Registration {
        /// The file.
        path: PathBuf,
        /// The device, the limit and the remedy.
        source: pinfold_verbs::Error,
    },
    /// Nothing comes back from the file system, or not this call.
    #[error(
        "{why} on the file system of {exports} (is it frozen, or its device stuck?); try again later"
    )]
    ExportStalled {
        /// Each with its name.
        exports: String,
        /// What does not come back.
        why: NotDone,
    },
    /// What is left is kept for revocations.
    #[error(
        "this server has {used} of {limit} descriptors open, and keeps the rest for revocations; give \
             pins back, or raise the limit of open files of pinfoldd (LimitNOFILE= in its unit)"
    )]
    NoDescriptors {
        /// Open now.
        used: usize,
        /// `RLIMIT_NOFILE`.
        limit: usize,
    },
    /// What is left is kept for revocations, and for the server itself.
    #[error(
        "this server has {used} memory mappings of {limit} that the kernel allows a process, and keeps \
             the last {MAP_AREAS_RESERVED} for itself; give pins back, or raise the sysctl \
             vm.max_map_count on the storage host"
    )]
    NoMapAreas {
        /// Mapped now.
        used: usize,
        /// The sysctl.
        limit: usize,
    },
    /// A pin's end does not come back.
    #[error("pin {pin} is given back, but after {} s a transfer of it is still inside the kernel (is the file \
             system frozen, or its device stuck?); its keys die when that is out", waited.as_secs())]
    UnpinHangs {
        /// The pin.
        pin: PinId,
        /// How long its client waited.
        waited: Duration,
    },
    /// Exports of several file systems in one process.
    #[error(
        "exports {one} and {other} lie on different file systems, and if one of them freezes, or its \
             device hangs, one process can be held up with both; start a pinfoldd for each, or accept \
             that with --share-fate (share_fate = true in the configuration file)"
    )]
    SharedFate {
        /// One export.
        one: String,
        /// One on another file system.
        other: String,
    },
    /// The state folder can't be read or written.
    #[error("can't use {} to remember earlier runs; name a folder that this process may write with \
             --state-dir", path.display())]
    StateFolder {
        /// The folder, or the file in it.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Two servers would mix up what they know.
    #[error("another pinfoldd uses the state folder {}; give each its own with --state-dir", path.display())]
    StateFolderInUse {
        /// The folder.
        path: PathBuf,
    },
    /// A thread of ours died.
    #[error("a task of the server failed; its log has the details")]
    Task,
    /// A thread could not be started.
    #[error("could not start the {name} thread")]
    Thread {
        /// Which.
        name: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

impl Error {
    /// The same error with the file whose registration ran into it.
    pub(crate) fn registering(self, path: &Path) -> Self {
        match self {
            Self::Verbs(source) => Self::Registration { path: path.to_owned(), source },
            other => other,
        }
    }
}

/// The first of the files by name, and how many more there are.
fn some_of(open: &BTreeSet<PathBuf>) -> String {
    let Some(first) = open.first() else { return "a call that has not ended yet".to_owned() };
    match open.len() {
        1 => first.display().to_string(),
        files => format!("{} and {} more", first.display(), files - 1),
    }
}

fn counted(pins: usize) -> String {
    format!("{pins} {}", if pins == 1 { "pin" } else { "pins" })
}
