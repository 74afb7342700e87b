//! A directory beneath which files are reached, and nothing outside it; or a device that is all there
//! is.

use std::collections::BinaryHeap;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};

use crate::dax_device;
use crate::description::{
    Description, FileIdentity, FileTimes, MappingKind, kind_of, on_hugetlbfs,
};
use crate::door::pass;
use crate::error::{Error, Result};
use crate::mapping::unmap_what_is_left;

/// A path inside an export: relative, not empty, without `..` and NUL. What it crosses is checked
/// by the kernel when it is opened.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct RelativePath(PathBuf);

impl RelativePath {
    /// Checks the form of a path.
    pub fn parse(path: &str) -> Result<Self> {
        let refuse = |why| Err(Error::OutsideExport { path: path.to_owned(), why });
        if path.is_empty() {
            return refuse("it is empty");
        }
        if path.starts_with('/') {
            return refuse("it starts at the root");
        }
        if path.contains('\0') {
            return refuse("it holds a NUL byte");
        }
        if path.ends_with('/') {
            return refuse("it ends in a slash, as a folder does");
        }
        if path.split('/').any(|part| part == "..") {
            return refuse("it holds \"..\"");
        }
        if path.split('/').all(|part| part.is_empty() || part == ".") {
            return refuse("it names the export itself");
        }
        Ok(Self(PathBuf::from(path)))
    }

    /// The path as given.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// A name in the export's own folder, in whatever bytes it is written.
    pub fn of_name(name: &OsStr) -> Result<Self> {
        let bytes = name.as_encoded_bytes();
        if bytes.contains(&b'/') || bytes.contains(&0) || matches!(bytes, b"" | b"." | b"..") {
            let path = name.to_string_lossy().into_owned();
            return Err(Error::OutsideExport { path, why: "it is no name of a file" });
        }
        Ok(Self(PathBuf::from(name)))
    }

    fn parent(&self) -> &Path {
        match self.0.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    pub(crate) fn file_name(&self) -> Result<&OsStr> {
        self.0.file_name().ok_or_else(|| Error::OutsideExport {
            path: self.0.display().to_string(),
            why: "it names no file",
        })
    }
}

/// A directory that is open for looking up files beneath it; or a DAX device, which is like a
/// directory with one file in it: itself, under its own name.
#[derive(Debug)]
pub struct Export {
    root: Arc<Root>,
    path: PathBuf,
    /// Open for as long as the export is: once it has been taken from its driver, a device can still
    /// be opened by its old name, and mapping it then is fatal to the kernel.
    device: Option<Description>,
}

/// An export's directory. Whatever was found or opened beneath it keeps it: all of these keep the file
/// system from being unmounted (`O_PATH` descriptors do too), so they are counted together.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) fd: OwnedFd,
    /// Behind the descriptor, which is closed by then.
    held: Arc<()>,
}

/// What this process has open of an export, the [`Export`] itself included.
#[derive(Clone, Debug)]
pub struct Leftovers(Weak<()>);

impl Leftovers {
    /// Whether nothing of the export is open or mapped by this process any more.
    pub fn are_gone(&self) -> bool {
        unmap_what_is_left();
        self.0.strong_count() == 0
    }

    /// Whether this file is one of them. A file can be reached by several exports, one of which lies in
    /// another; it keeps the one by which it was opened.
    pub fn include(&self, file: &Description) -> bool {
        self.0.as_ptr() == Arc::as_ptr(&file.root().held)
    }
}

impl Export {
    /// Opens a directory, or a DAX device.
    pub fn open(path: &Path) -> Result<Self> {
        let failed =
            |e: rustix::io::Errno| Error::Export { path: path.to_owned(), source: e.into() };
        let fd = pass("open")
            .and_then(|()| rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()))
            .map_err(failed)?;
        let root = Arc::new(Root { fd, held: Arc::default() });
        let device = match Attributes::of(root.fd.as_fd(), path)?.kind {
            FileType::Directory => None,
            FileType::CharacterDevice | FileType::BlockDevice => {
                Some(dax_device::open(&root, path)?)
            }
            _ => return Err(failed(rustix::io::Errno::NOTDIR)),
        };
        Ok(Self { root, path: path.to_owned(), device })
    }

    /// The device, if it is one.
    pub fn device(&self) -> Option<&Description> {
        self.device.as_ref()
    }

    /// Whether files can be made, resized and removed here: a device is [`Error::FixedSize`].
    pub fn demand_directory(&self) -> Result<()> {
        if self.device.is_some() {
            return Err(Error::FixedSize { path: self.path.clone() });
        }
        Ok(())
    }

    /// What the one file of a device is called.
    fn device_name(&self) -> &OsStr {
        self.path.file_name().unwrap_or(self.path.as_os_str())
    }

    fn locate_device(&self, device: &Description, path: &RelativePath) -> Result<Located> {
        let asked = path.as_path();
        if asked.strip_prefix(".").unwrap_or(asked) != self.device_name() {
            return Err(Error::NotFound { path: self.path.join(asked) });
        }
        let failed = |source| Error::File { call: "dup", path: self.path.clone(), source };
        let fd = self.root.fd.try_clone().map_err(failed)?;
        let attributes = Attributes::of_device(device)?;
        let (path, root) = (self.path.clone(), Arc::clone(&self.root));
        Ok(Located { fd, path, attributes, device: Some(device.clone()), root })
    }

    fn list_device(&self, device: &Description, page: &Page<'_>) -> Result<Listing> {
        let name = self.device_name();
        let mut entries = Vec::new();
        if name.as_encoded_bytes() > page.after {
            let name = name.to_string_lossy().into_owned();
            entries.push(Entry::new(name, &Attributes::of_device(device)?));
        }
        Ok(Listing { entries, next: None })
    }

    /// What tells, after this is dropped, whether something that was found or opened beneath it is still
    /// open: its file system can't be unmounted then.
    pub fn leftovers(&self) -> Leftovers {
        Leftovers(Arc::downgrade(&self.root.held))
    }

    /// Names the directory or device for good.
    pub fn identity(&self) -> Result<FileIdentity> {
        if let Some(device) = &self.device {
            return Ok(device.identity());
        }
        Ok(Attributes::of(self.root(), &self.path)?.identity)
    }

    pub(crate) fn shared_root(&self) -> Arc<Root> {
        Arc::clone(&self.root)
    }

    /// Opens the folder in which a path lies.
    pub(crate) fn open_folder_of(&self, path: &RelativePath) -> Result<OwnedFd> {
        self.open_beneath(path.parent(), OFlags::DIRECTORY, Mode::empty(), path)
    }

    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.fd.as_fd()
    }

    /// The directory as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Finds a file without opening it (`O_PATH`), so that no lease on it is broken.
    pub fn locate(&self, path: &RelativePath) -> Result<Located> {
        if let Some(device) = &self.device {
            return self.locate_device(device, path);
        }
        let fd = self.open_beneath(path.as_path(), OFlags::PATH, Mode::empty(), path)?;
        let path = self.path.join(path.as_path());
        let attributes = Attributes::of(fd.as_fd(), &path)?;
        attributes.demand_regular(&path)?;
        let root = Arc::clone(&self.root);
        Ok(Located { fd, path, attributes, device: None, root })
    }

    /// Makes a folder, and its name durable; false: it was there. A file, a link or whatever else has that
    /// name is [`Error::Exists`].
    pub fn make_folder(&self, path: &RelativePath, mode: u32) -> Result<bool> {
        self.demand_directory()?;
        let full = self.path.join(path.as_path());
        let folder = self.open_folder_of(path)?;
        let name = path.file_name()?;
        let made = pass("mkdirat")
            .and_then(|()| rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(mode)));
        match made {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return self.demand_folder(path, full),
            Err(e) => return Err(refusal(e.into(), "mkdir", path, &full)),
        }
        // Empty it can't be in anybody's way: if its name can't be made durable, it goes again.
        sync_folder(&folder, &full).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&folder, name, AtFlags::REMOVEDIR);
        })?;
        Ok(true)
    }

    fn demand_folder(&self, path: &RelativePath, full: PathBuf) -> Result<bool> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        match self.open_beneath(path.as_path(), flags, Mode::empty(), path) {
            Ok(_) => Ok(false),
            // Not a folder (`ENOTDIR`); or gone again, and the next try will tell.
            Err(Error::NotFound { .. }) => Err(Error::Exists { path: full }),
            Err(error) => Err(error),
        }
    }

    /// Lists a page of a folder, or of the export itself where `path` is `None`, ordered by name.
    /// Opens no file. Holds no more than a page's names, however large the folder is.
    pub fn list(&self, path: Option<&RelativePath>, page: &Page<'_>) -> Result<Listing> {
        if let Some(device) = &self.device {
            return match path {
                None => self.list_device(device, page),
                Some(path) => Err(Error::NotFound { path: self.path.join(path.as_path()) }),
            };
        }
        let here = RelativePath(PathBuf::from("."));
        let path = path.unwrap_or(&here);
        let full = self.path.join(path.as_path());
        let folder = self.open_beneath(path.as_path(), OFlags::DIRECTORY, Mode::empty(), path)?;
        let failed = |call| {
            let full = full.clone();
            move |e: rustix::io::Errno| Error::File { call, path: full, source: e.into() }
        };
        let mut first = FirstNames::of(page);
        for entry in pass("opendir")
            .and_then(|()| rustix::fs::Dir::read_from(&folder))
            .map_err(failed("opendir"))?
        {
            let entry = entry.map_err(failed("readdir"))?;
            if entry.file_name() != c"." && entry.file_name() != c".." {
                first.add(entry.file_name());
            }
        }
        let (names, next) = first.into_sorted();
        let entry = |name: CString| {
            // Gone since it was read: not there.
            let attributes = Attributes::at(&folder, &name).ok()?;
            Some(Entry::new(name.to_string_lossy().into_owned(), &attributes))
        };
        Ok(Listing { entries: names.into_iter().filter_map(entry).collect(), next })
    }

    /// Removes a file's name and makes that durable. Who holds the file guarded must let it go
    /// first: it would wait for itself.
    pub fn remove(&self, path: &RelativePath) -> Result<()> {
        self.demand_directory()?;
        let full = self.path.join(path.as_path());
        let folder = self.open_folder_of(path)?;
        let name = path.file_name()?;
        pass("unlinkat")
            .and_then(|()| rustix::fs::unlinkat(&folder, name, AtFlags::empty()))
            .map_err(|e| refusal(e.into(), "remove", path, &full))?;
        sync_folder(&folder, &full)
    }

    pub(crate) fn open_beneath(
        &self,
        what: &Path,
        flags: OFlags,
        mode: Mode,
        asked: &RelativePath,
    ) -> Result<OwnedFd> {
        let rules = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        pass("openat2")
            .and_then(|()| {
                rustix::fs::openat2(self.root(), what, flags | OFlags::CLOEXEC, mode, rules)
            })
            .map_err(|e| refusal(e.into(), "open", asked, &self.path.join(asked.as_path())))
    }
}

fn sync_folder(folder: &OwnedFd, path: &Path) -> Result<()> {
    #[cfg(feature = "mutants")]
    if crate::mutant::syncs_no_names() {
        return Ok(());
    }
    pass("fsync").and_then(|()| rustix::fs::fsync(folder)).map_err(|e| Error::File {
        call: "fsync of the folder",
        path: path.to_owned(),
        source: e.into(),
    })
}

/// Which part of a folder's names to list.
#[derive(Clone, Copy, Debug)]
pub struct Page<'a> {
    /// Those behind this one in order; empty: from the first on.
    pub after: &'a [u8],
    /// At most so many.
    pub size: NonZeroUsize,
}

/// A page of a folder.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listing {
    /// Ordered by name.
    pub entries: Vec<Entry>,
    /// [`Page::after`] of the next page; `None`: there is none.
    pub next: Option<Vec<u8>>,
}

/// The first names behind a given one, of those that are added in any order.
struct FirstNames<'a> {
    page: &'a Page<'a>,
    /// The last one on top.
    names: BinaryHeap<CString>,
    more: bool,
}

impl<'a> FirstNames<'a> {
    fn of(page: &'a Page<'a>) -> Self {
        Self { page, names: BinaryHeap::new(), more: false }
    }

    fn add(&mut self, name: &CStr) {
        if name.to_bytes() <= self.page.after {
            return;
        }
        self.names.push(name.to_owned());
        if self.names.len() > self.page.size.get() {
            self.names.pop();
            self.more = true;
        }
    }

    /// And the last of them, if there are more.
    fn into_sorted(self) -> (Vec<CString>, Option<Vec<u8>>) {
        let names = self.names.into_sorted_vec();
        let next = names.last().filter(|_| self.more).map(|name| name.to_bytes().to_vec());
        (names, next)
    }
}

/// What a folder holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// The name in the folder.
    pub name: String,
    /// What it is.
    pub kind: EntryKind,
    /// Names the inode for good.
    pub identity: FileIdentity,
    /// Bytes.
    pub size: u64,
    /// Bytes of storage.
    pub allocated: u64,
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EntryKind {
    /// A regular file, which can be guarded.
    File,
    /// A folder.
    Folder,
    /// A link, a device, a socket or a FIFO.
    Other,
}

impl Entry {
    fn new(name: String, attributes: &Attributes) -> Self {
        let kind = match attributes.kind {
            FileType::RegularFile => EntryKind::File,
            FileType::Directory => EntryKind::Folder,
            _ => EntryKind::Other,
        };
        let Attributes { identity, size, allocated, .. } = *attributes;
        Self { name, kind, identity, size, allocated }
    }
}

/// A file that was found but not opened.
#[derive(Debug)]
pub struct Located {
    fd: OwnedFd,
    path: PathBuf,
    attributes: Attributes,
    device: Option<Description>,
    /// Behind the descriptor: see [`Root`].
    root: Arc<Root>,
}

impl Located {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn root(&self) -> Arc<Root> {
        Arc::clone(&self.root)
    }

    /// Names the inode for good.
    pub fn identity(&self) -> FileIdentity {
        self.attributes.identity
    }

    /// Export and path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes when it was found.
    pub fn size(&self) -> u64 {
        self.attributes.size
    }

    /// Bytes of storage that the file held when it was found.
    pub fn allocated(&self) -> u64 {
        self.attributes.allocated
    }

    /// When it changed last, as seen when it was found.
    pub fn times(&self) -> FileTimes {
        self.attributes.times
    }

    /// Whether loads and stores reach the medium directly (`STATX_ATTR_DAX`).
    pub fn dax(&self) -> bool {
        self.attributes.dax
    }

    /// What a mapping of the file would consist of, before it is opened: on an overlay opening for
    /// writing alone copies the file.
    pub fn kind(&self) -> Result<MappingKind> {
        if self.device.is_some() {
            return Ok(MappingKind::DeviceDax);
        }
        kind_of(self.fd.as_fd(), self.attributes.dax, &self.path)
    }

    /// Whether its file system can grant a guard at all: hugetlbfs takes no lease, so its files can
    /// only be had [unguarded](Description::unguarded).
    pub fn can_be_guarded(&self) -> Result<bool> {
        Ok(!on_hugetlbfs(self.fd.as_fd(), &self.path)?)
    }

    /// Opens exactly this inode for reading and writing. Breaks the leases of others, but does not
    /// wait for them: then the file is [`Error::Busy`]. A file that is sealed, by a program at work
    /// or by one that has crashed, is [`Error::Sealed`].
    pub fn open(&self) -> Result<Description> {
        if let Some(device) = &self.device {
            return Ok(device.clone());
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match pass("open").and_then(|()| rustix::fs::open(self.link(), flags, Mode::empty())) {
            Ok(fd) => Description::new(fd, self.path.clone(), self.root()),
            Err(rustix::io::Errno::PERM) if self.is_sealed() => {
                Err(Error::Sealed { path: self.path.clone() })
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::TXTBSY) => Err(Error::Busy {
                path: self.path.clone(),
                openers: crate::openers::openers(self.identity(), None),
            }),
            Err(e) => Err(denied_or_failed(e.into(), "open", &self.path)),
        }
    }
}

/// What statx(2) says of a file.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    pub(crate) identity: FileIdentity,
    pub(crate) size: u64,
    pub(crate) allocated: u64,
    pub(crate) dax: bool,
    pub(crate) times: FileTimes,
    pub(crate) kind: FileType,
    /// `st_nlink`
    pub(crate) names: u32,
    /// Of a device, what it is rather than where its node lies (`st_rdev`).
    pub(crate) device_number: u64,
}

impl Attributes {
    pub(crate) fn of(fd: BorrowedFd<'_>, path: &Path) -> Result<Self> {
        Self::read(fd, c"", AtFlags::EMPTY_PATH).map_err(|e| Error::File {
            call: "statx",
            path: path.to_owned(),
            source: e.into(),
        })
    }

    pub(crate) fn at(folder: &OwnedFd, name: &std::ffi::CStr) -> rustix::io::Result<Self> {
        Self::read(folder.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW)
    }

    pub(crate) fn read(
        fd: BorrowedFd<'_>,
        name: &std::ffi::CStr,
        flags: AtFlags,
    ) -> rustix::io::Result<Self> {
        let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let stat = pass("statx").and_then(|()| rustix::fs::statx(fd, name, flags, mask))?;
        let born = StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::BTIME);
        let birth_time_ns = match nanoseconds(&stat.stx_btime) {
            Some(nanoseconds) if born => nanoseconds,
            _ => 0,
        };
        Ok(Self {
            identity: FileIdentity {
                device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
                inode: stat.stx_ino,
                birth_time_ns,
            },
            size: stat.stx_size,
            allocated: stat.stx_blocks * 512,
            dax: stat.stx_attributes.contains(StatxAttributes::DAX),
            times: FileTimes {
                changed_ns: nanoseconds(&stat.stx_ctime),
                modified_ns: nanoseconds(&stat.stx_mtime),
            },
            kind: FileType::from_raw_mode(stat.stx_mode.into()),
            names: stat.stx_nlink,
            device_number: rustix::fs::makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
        })
    }

    /// As of a file that has all the device's bytes, and whose changes nobody notes.
    fn of_device(device: &Description) -> Result<Self> {
        let size = device.size()?;
        let attributes = Self::of(device.fd(), device.path())?;
        let identity = device.identity();
        let (dax, times, kind) = (true, FileTimes::OF_DEVICE, FileType::RegularFile);
        Ok(Self { identity, size, allocated: size, dax, times, kind, ..attributes })
    }

    fn demand_regular(&self, path: &Path) -> Result<()> {
        let kind = match self.kind {
            FileType::RegularFile => return Ok(()),
            FileType::Directory => "a directory",
            FileType::Fifo => "a FIFO",
            FileType::Socket => "a socket",
            FileType::Symlink => "a symbolic link",
            FileType::BlockDevice | FileType::CharacterDevice => "a device",
            _ => "of an unknown kind",
        };
        Err(Error::NotRegular { path: path.to_owned(), kind })
    }
}

/// Since 1970; `None` before that.
fn nanoseconds(time: &rustix::fs::StatxTimestamp) -> Option<u64> {
    let seconds = u64::try_from(time.tv_sec).ok()?;
    Some(seconds.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec.into()))
}

/// Turns the errno of a look-up or creation beneath the export into what the caller can act on.
pub(crate) fn refusal(
    source: io::Error,
    call: &'static str,
    asked: &RelativePath,
    full: &Path,
) -> Error {
    let outside = |why| Error::OutsideExport { path: asked.as_path().display().to_string(), why };
    match source.raw_os_error() {
        Some(libc::EXDEV) => {
            outside("it leaves the directory or enters another mounted file system")
        }
        Some(libc::ELOOP) => outside("it crosses a symbolic link"),
        Some(libc::ENOENT | libc::ENOTDIR) => Error::NotFound { path: full.to_owned() },
        Some(libc::EEXIST) => Error::Exists { path: full.to_owned() },
        Some(libc::ENAMETOOLONG) => outside("a name in it is too long"),
        Some(libc::EISDIR) => Error::NotRegular { path: full.to_owned(), kind: "a directory" },
        _ => denied_or_failed(source, call, full),
    }
}

/// Tells "may not" from "did not work".
pub(crate) fn denied_or_failed(source: io::Error, call: &'static str, path: &Path) -> Error {
    let path = path.to_owned();
    let capability = match source.raw_os_error() {
        Some(libc::EACCES) => "write permission on the file and its folder",
        Some(libc::EROFS) => "the file system mounted for writing (mount -o remount,rw)",
        // Root gets it too, and then these flags are why.
        Some(libc::EPERM) => "its immutable and append-only flags cleared (chattr -i -a)",
        _ => return Error::File { call, path, source },
    };
    Error::Denied { path, call, capability, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_leave_the_export_are_refused() {
        for path in ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", ".", "./", "a/", "a\0b"]
        {
            let refused = RelativePath::parse(path);
            assert!(matches!(refused, Err(Error::OutsideExport { .. })), "{path:?}");
        }
    }

    #[test]
    fn a_name_is_one_step_and_no_other() {
        use std::os::unix::ffi::OsStrExt;
        for bad in [&b""[..], b".", b"..", b"a/b", b"/", b"a\0"] {
            assert!(RelativePath::of_name(OsStr::from_bytes(bad)).is_err(), "{bad:?}");
        }
        assert!(RelativePath::of_name(OsStr::from_bytes(b"\xff..")).is_ok());
    }

    #[test]
    fn the_pages_of_a_folder_are_all_its_names_in_order() {
        let names = [c"d", c"a", c"c", c"\xff", c"b", c"aa", c"e"];
        let mut found = Vec::new();
        let mut after = Vec::new();
        for pages in 1.. {
            let page = Page { after: &after, size: NonZeroUsize::new(3).unwrap() };
            let mut first = FirstNames::of(&page);
            names.iter().for_each(|name| first.add(name));
            let (some, next) = first.into_sorted();
            assert!(some.len() <= 3);
            found.extend(some);
            let Some(next) = next else {
                assert_eq!(pages, 3);
                break;
            };
            after = next;
        }
        let mut sorted = names.map(CStr::to_owned);
        sorted.sort();
        assert_eq!(found, sorted);
    }

    #[test]
    fn a_page_that_is_just_full_is_the_last() {
        let page = Page { after: b"", size: NonZeroUsize::new(2).unwrap() };
        let mut first = FirstNames::of(&page);
        [c"b", c"a"].into_iter().for_each(|name| first.add(name));
        assert_eq!(first.into_sorted(), (vec![c"a".to_owned(), c"b".to_owned()], None));
    }

    #[test]
    fn paths_inside_the_export_are_taken() {
        for path in ["a", "a/b", "./a", "..a", "a..b/c", "a b"] {
            assert!(RelativePath::parse(path).is_ok(), "{path:?}");
        }
    }
}
