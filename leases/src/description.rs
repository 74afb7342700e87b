//! The one open file description that a file is guarded and mapped through.

use std::fmt;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::Advice;

use crate::dax_device::DaxDevice;
use crate::door::pass;
use crate::error::{Error, Result};
use crate::export::{Attributes, Root};
use crate::lock::RangeLocks;
use crate::mapping::HUGE_PAGE;

/// Names one inode for good. Inode numbers are used again, so the birth time belongs to it. Of a DAX
/// device it names the device, whatever node leads to it: `inode` is a digest then, and the rest is 0.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FileIdentity {
    /// `st_dev`
    pub device: u64,
    /// `st_ino`
    pub inode: u64,
    /// Nanoseconds since 1970; 0 where the file system keeps no birth time.
    pub birth_time_ns: u64,
}

impl fmt::Display for FileIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inode {} on device {:#x}", self.inode, self.device)
    }
}

/// When a file changed last, in nanoseconds since 1970, by the kernel's clock. Since Linux 6.13 a change
/// that comes after a time was asked for is later than what was answered (multigrain timestamps: ext4,
/// XFS, btrfs, tmpfs); before, the clock ticks in milliseconds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct FileTimes {
    /// Its inode (`st_ctime`): a name, a mode, a size, or bytes as for the other.
    pub changed_ns: Option<u64>,
    /// Its bytes (`st_mtime`): by write(2), a page's first store, or a change of size.
    pub modified_ns: Option<u64>,
}

impl FileTimes {
    /// Nobody notes a device's changes: as far as its bytes go it is always the same.
    pub(crate) const OF_DEVICE: Self = Self { changed_ns: None, modified_ns: Some(0) };
}

/// `f_type` of tmpfs, statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `f_type` of hugetlbfs.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// ext2 to ext4, XFS, btrfs and f2fs: what a lease on their files holds still is known. An overlay
/// is not among them: who opens the file below it does not meet the lease.
const KNOWN_DISK_FILE_SYSTEMS: [i64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

/// What the pages of a mapping are: it decides how hardware can be given them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum MappingKind {
    /// The medium itself (`STATX_ATTR_DAX`). The kernel refuses to pin it for long; hardware must
    /// follow page tables.
    FsDax,
    /// tmpfs, or hugetlbfs (which takes no lease, see [`Description::unguarded`]): memory that can
    /// be pinned.
    SharedMemory,
    /// The page cache of another file system. The kernel refuses to pin it for writing.
    PageCache,
    /// The medium itself, without a file system (`/dev/dax0.0`). It can be pinned.
    DeviceDax,
}

impl MappingKind {
    /// Whether [`Mapping::flush`](crate::Mapping::flush) makes anything durable. Memory has nothing to
    /// be durable on; for a device the CPU's caches are written back here, on x86-64 alone.
    pub fn can_be_durable(self) -> bool {
        match self {
            MappingKind::SharedMemory => false,
            MappingKind::FsDax | MappingKind::PageCache => true,
            MappingKind::DeviceDax => cfg!(target_arch = "x86_64"),
        }
    }
}

impl fmt::Display for MappingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MappingKind::FsDax => "fs-DAX",
            MappingKind::SharedMemory => "tmpfs",
            MappingKind::PageCache => "page cache",
            MappingKind::DeviceDax => "device-dax",
        })
    }
}

/// Whether it is known what a lease on a file system's files holds still.
pub(crate) fn is_known(magic: i64) -> bool {
    [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&magic) || KNOWN_DISK_FILE_SYSTEMS.contains(&magic)
}

/// The file system is asked first: an overlay says of its files that they are DAX if those below are.
pub(crate) fn kind_of(fd: BorrowedFd<'_>, dax: bool, path: &Path) -> Result<MappingKind> {
    match file_system_of(fd, path)? {
        magic if !is_known(magic) => Err(Error::UnknownFileSystem { path: path.to_owned(), magic }),
        TMPFS_MAGIC | HUGETLBFS_MAGIC => Ok(MappingKind::SharedMemory),
        _ if dax => Ok(MappingKind::FsDax),
        _ => Ok(MappingKind::PageCache),
    }
}

pub(crate) fn on_hugetlbfs(fd: BorrowedFd<'_>, path: &Path) -> Result<bool> {
    Ok(file_system_of(fd, path)? == HUGETLBFS_MAGIC)
}

fn file_system_of(fd: BorrowedFd<'_>, path: &Path) -> Result<i64> {
    let failed = |e: rustix::io::Errno| Error::File {
        call: "fstatfs",
        path: path.to_owned(),
        source: e.into(),
    };
    Ok(pass("fstatfs").and_then(|()| rustix::fs::fstatfs(fd)).map_err(failed)?.f_type)
}

/// An open file description (open(2)), for reading and writing. A guard is granted only while it is
/// the file's single one, so it serves guard and mapping alike, is never duplicated and never
/// leaves the process. Clones share it.
#[derive(Clone, Debug)]
pub struct Description {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    path: PathBuf,
    identity: FileIdentity,
    device: Option<DaxDevice>,
    armed: AtomicBool,
    range_locks: Mutex<RangeLocks>,
    /// Behind the descriptor: see [`Root`].
    root: Arc<Root>,
}

/// A [`Description`] that may have been closed meanwhile. A file whose old mapping still lives can
/// be guarded again only through the description of that mapping, and this is how to find it.
#[derive(Clone, Debug)]
pub struct WeakDescription(Weak<Inner>);

impl WeakDescription {
    /// The description, if it is still open.
    pub fn upgrade(&self) -> Option<Description> {
        self.0.upgrade().map(|inner| Description { inner })
    }
}

impl Description {
    pub(crate) fn new(fd: OwnedFd, path: PathBuf, root: Arc<Root>) -> Result<Self> {
        Self::made(fd, path, None, root)
    }

    pub(crate) fn of_device(
        fd: OwnedFd,
        path: PathBuf,
        device: DaxDevice,
        root: Arc<Root>,
    ) -> Result<Self> {
        Self::made(fd, path, Some(device), root)
    }

    fn made(
        fd: OwnedFd,
        path: PathBuf,
        device: Option<DaxDevice>,
        root: Arc<Root>,
    ) -> Result<Self> {
        let identity = match device {
            Some(device) => device.identity,
            None => Attributes::of(fd.as_fd(), &path)?.identity,
        };
        let (armed, range_locks) = (AtomicBool::new(false), Mutex::default());
        let inner = Inner { fd, path, identity, device, armed, range_locks, root };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What it is, if it is no file.
    pub(crate) fn device(&self) -> Option<DaxDevice> {
        self.inner.device
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd.as_fd()
    }

    /// The export by which it was opened.
    pub(crate) fn root(&self) -> &Root {
        &self.inner.root
    }

    /// The name it was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    /// Names the inode for good.
    pub fn identity(&self) -> FileIdentity {
        self.inner.identity
    }

    /// The file's size in bytes now. Under a guard it can't change but through this description.
    pub fn size(&self) -> Result<u64> {
        match self.device() {
            Some(device) => Ok(device.size),
            None => Ok(self.attributes()?.size),
        }
    }

    /// When it changed last; neither time is known if that can't be read.
    pub fn times(&self) -> FileTimes {
        match self.device() {
            Some(_) => FileTimes::OF_DEVICE,
            None => self.attributes().map(|attributes| attributes.times).unwrap_or_default(),
        }
    }

    /// What a mapping of the file would consist of.
    pub fn kind(&self) -> Result<MappingKind> {
        if self.device().is_some() {
            return Ok(MappingKind::DeviceDax);
        }
        kind_of(self.fd(), self.attributes()?.dax, self.path())
    }

    pub(crate) fn attributes(&self) -> Result<Attributes> {
        Attributes::of(self.fd(), self.path())
    }

    pub(crate) fn demand_file(&self) -> Result<()> {
        match self.device() {
            Some(_) => Err(Error::FixedSize { path: self.path().to_owned() }),
            None => Ok(()),
        }
    }

    pub(crate) fn no_space(&self, bytes: u64, call: &'static str, source: std::io::Error) -> Error {
        match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => {
                Error::NoSpace { path: self.path().to_owned(), bytes, kept_bytes: 0, source }
            }
            _ => self.failed(call, source),
        }
    }

    /// Makes the file's content and metadata durable (fsync(2)). Breaks no guard. Of a device
    /// there is only content: [`Mapping::flush`](crate::Mapping::flush). Fails with
    /// [`Error::WriteBack`], whatever the kernel says: one error may stand for another that it has
    /// reported with this call and will not report again.
    pub fn sync(&self) -> Result<()> {
        #[cfg(feature = "mutants")]
        if crate::mutant::syncs_nothing() {
            return Ok(());
        }
        if self.device().is_some() {
            return Ok(());
        }
        pass("fsync")
            .and_then(|()| rustix::fs::fsync(self.fd()))
            .map_err(|e| self.not_written_back("fsync", e.into()))
    }

    pub(crate) fn not_written_back(&self, call: &'static str, source: std::io::Error) -> Error {
        Error::WriteBack { call, path: self.path().to_owned(), source }
    }

    /// Has the next reads of a range come from the medium: drops its pages from the page cache
    /// (posix_fadvise(2), `POSIX_FADV_DONTNEED`). Dirty pages stay, and begin to be written back; so do
    /// pages that are mapped. A page that could not be written back is clean, and goes. Does nothing for
    /// files that have no pages there.
    pub fn drop_cached(&self, range: Range<u64>) -> Result<()> {
        if self.device().is_some() {
            return Ok(());
        }
        // A large folio goes only as a whole.
        let start = range.start - range.start % HUGE_PAGE as u64;
        let len = range.end.checked_next_multiple_of(HUGE_PAGE as u64).and_then(|end| {
            // None: up to the file's end.
            NonZeroU64::new(end.saturating_sub(start))
        });
        pass("posix_fadvise")
            .and_then(|()| rustix::fs::fadvise(self.fd(), start, len, Advice::DontNeed))
            .map_err(|e| self.failed("posix_fadvise", e.into()))
    }

    /// Writes all of `data` at `offset` (pwrite(2)), through the kernel, so that nothing can fault.
    /// A device takes no pwrite(2): [`Mapping::write_at`](crate::Mapping::write_at). Breaks no guard. The caller keeps within the file's size, which this would change.
    pub fn write_at(&self, mut data: &[u8], mut offset: u64) -> Result<()> {
        while !data.is_empty() {
            let written =
                match pass("pwrite").and_then(|()| rustix::io::pwrite(self.fd(), data, offset)) {
                    Err(rustix::io::Errno::INTR) => continue,
                    written => {
                        written.map_err(|e| self.no_space(data.len() as u64, "pwrite", e.into()))?
                    }
                };
            data = &data[written..];
            offset += written as u64;
        }
        Ok(())
    }

    /// Fills `data` from `offset` (pread(2)). Fails with `UnexpectedEof` past the file's end.
    pub fn read_at(&self, mut data: &mut [u8], mut offset: u64) -> Result<()> {
        while !data.is_empty() {
            let read = match pass("pread")
                .and_then(|()| rustix::io::pread(self.fd(), &mut *data, offset))
            {
                Ok(0) => Err(std::io::ErrorKind::UnexpectedEof.into()),
                Err(rustix::io::Errno::INTR) => continue,
                read => read.map_err(Into::into),
            }
            .map_err(|source| self.failed("pread", source))?;
            data = &mut data[read..];
            offset += read as u64;
        }
        Ok(())
    }

    /// A reference that doesn't keep the description open.
    pub fn downgrade(&self) -> WeakDescription {
        WeakDescription(Arc::downgrade(&self.inner))
    }

    /// Whether it is the same one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    pub(crate) fn range_locks(&self) -> MutexGuard<'_, RangeLocks> {
        // No code that holds it can leave the list half-changed.
        self.inner.range_locks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right to arm this description; false if it is armed.
    pub(crate) fn claim(&self) -> bool {
        !self.inner.armed.swap(true, Ordering::SeqCst)
    }

    /// Gives the right to arm back.
    pub(crate) fn disclaim(&self) {
        self.inner.armed.store(false, Ordering::SeqCst);
    }

    pub(crate) fn failed(&self, call: &'static str, source: std::io::Error) -> Error {
        Error::File { call, path: self.path().to_owned(), source }
    }
}
