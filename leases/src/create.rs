//! New files appear finished: a file gets its name only once it has its size, and its bytes are durable.
//!
//! The file is made without a name (`O_TMPFILE`) and linked at the end, so a crash leaves nothing. Where that
//! can't be done it has a hidden name in the same folder first: on file systems without `O_TMPFILE`, and
//! where DAX is asked for file by file, since the kernel looks at the flag again only when it opens the file
//! anew.

use std::ffi::{CString, OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::description::{Description, FileIdentity, MappingKind};
use crate::door::pass;
use crate::error::{Error, Result};
use crate::export::{Attributes, Export, RelativePath, denied_or_failed, refusal};
use crate::resize::{GoOn, Hold};

/// Longest name of a file on the file systems that are served (`NAME_MAX`), in bytes.
const NAME_MAX: usize = 255;

/// How [`Export::create`] makes a file.
#[derive(Debug)]
pub struct Create {
    /// Exactly this many bytes, allocated and reading as zeroes.
    pub size: u64,
    /// Permission bits before the umask.
    pub mode: u32,
    /// Ask for DAX on this file (`FS_XFLAG_DAX`), for file systems mounted with `dax=inode`, which
    /// is the default. Whether it came of it is what [`Description::kind`] says: the medium, the
    /// mount options and the kernel have their say too.
    pub dax: bool,
}

/// A file that is finished and has no name yet. Dropped, it leaves nothing behind.
#[derive(Debug)]
pub struct Unpublished {
    file: Description,
    place: Place,
    /// The name that it has meanwhile, if it could not be made without one.
    hidden: Option<Hidden>,
}

/// Where a file is to appear.
#[derive(Debug)]
struct Place {
    folder: OwnedFd,
    name: OsString,
    asked: RelativePath,
    full: PathBuf,
}

/// A name that nobody looks for; it is removed on drop.
#[derive(Debug)]
struct Hidden {
    folder: OwnedFd,
    name: OsString,
    /// Set once it is known: no other file of that name is removed.
    made: Option<FileIdentity>,
}

impl Export {
    /// Makes a file of exactly `create.size` bytes: its name appears when they are allocated, read as zeroes
    /// and are durable.
    ///
    /// On fs-DAX the zeroes are written. Elsewhere extents stay unwritten: the page cache fills them.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if the name is taken, at the beginning or at the end, [`Error::NoSpace`], and others:
    /// nothing is left then, but for [`Error::NameNotDurable`].
    pub fn create(&self, path: &RelativePath, create: &Create) -> Result<Description> {
        self.prepare(path, create, &mut |_| true)?.publish()
    }

    /// The same without the name: [`Unpublished::publish`] gives it.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create), and [`Error::CreationStopped`] if `go_on` says so.
    pub fn prepare(
        &self,
        path: &RelativePath,
        create: &Create,
        go_on: GoOn<'_>,
    ) -> Result<Unpublished> {
        self.demand_directory()?;
        let full = self.path().join(path.as_path());
        let folder = self.open_folder_of(path)?;
        let name = path.file_name()?.to_owned();
        let place = Place { folder, name, asked: path.clone(), full };
        place.demand_free()?;
        let unpublished = self.make(place, create)?;
        let file = &unpublished.file;
        let zeroed = file.kind()? == MappingKind::FsDax;
        let grown = file.grow_held(0..create.size, Hold::Unnamed, zeroed, go_on)?;
        if !grown.complete {
            return Err(Error::CreationStopped { path: file.path().to_owned() });
        }
        Ok(unpublished)
    }

    /// Makes it empty.
    fn make(&self, place: Place, create: &Create) -> Result<Unpublished> {
        let Some(fd) = place.open_unnamed(create)? else {
            return self.make_hidden(place, create);
        };
        if create.dax {
            place.ask_for_dax(&fd)?;
            if !Attributes::of(fd.as_fd(), &place.full)?.dax {
                return self.make_hidden(place, create);
            }
        }
        let file = Description::new(fd, place.full.clone(), self.shared_root())?;
        Ok(Unpublished { file, place, hidden: None })
    }

    fn make_hidden(&self, place: Place, create: &Create) -> Result<Unpublished> {
        let (mut hidden, mut fd) = place.make_hidden(create)?;
        let made = Attributes::of(fd.as_fd(), &place.full)?.identity;
        hidden.made = Some(made);
        if create.dax {
            place.ask_for_dax(&fd)?;
            // The flag counts from the moment that the inode is read anew, which the kernel does once nobody
            // has it open (`d_mark_dontcache`).
            drop(fd);
            fd = hidden.open_again(&place.full)?;
            if Attributes::of(fd.as_fd(), &place.full)?.identity != made {
                return Err(Error::NotFound { path: place.full.clone() });
            }
        }
        let file = Description::new(fd, place.full.clone(), self.shared_root())?;
        Ok(Unpublished { file, place, hidden: Some(hidden) })
    }
}

impl Place {
    /// Asked at the beginning, so that nobody waits for zeroes that are written in vain.
    fn demand_free(&self) -> Result<()> {
        let taken = match CString::new(self.name.as_bytes()) {
            Ok(name) => Attributes::at(&self.folder, &name).is_ok(),
            Err(_) => false,
        };
        if taken { Err(Error::Exists { path: self.full.clone() }) } else { Ok(()) }
    }

    /// `None`: the file system makes no files without a name.
    fn open_unnamed(&self, create: &Create) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(create.mode);
        match pass("create").and_then(|()| rustix::fs::openat(&self.folder, ".", flags, mode)) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::OPNOTSUPP | Errno::ISDIR) => Ok(None),
            Err(e) => Err(self.refused(e, "create")),
        }
    }

    fn make_hidden(&self, create: &Create) -> Result<(Hidden, OwnedFd)> {
        let name = hidden_name(&self.name);
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(create.mode);
        let failed = |source| Error::File { call: "dup", path: self.full.clone(), source };
        let folder = self.folder.try_clone().map_err(failed)?;
        let fd = pass("create")
            .and_then(|()| rustix::fs::openat(&self.folder, &name, flags, mode))
            .map_err(|e| self.refused(e, "create"))?;
        Ok((Hidden { folder, name, made: None }, fd))
    }

    fn ask_for_dax(&self, fd: &OwnedFd) -> Result<()> {
        match crate::sys::ask_for_dax(fd.as_fd()) {
            Ok(()) => Ok(()),
            // The file system has no such flag.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP)) => Ok(()),
            Err(e) => Err(denied_or_failed(e, "ioctl(FS_IOC_FSSETXATTR)", &self.full)),
        }
    }

    fn refused(&self, error: Errno, call: &'static str) -> Error {
        refusal(error.into(), call, &self.asked, &self.full)
    }

    fn sync(&self) -> Result<()> {
        #[cfg(feature = "mutants")]
        if crate::mutant::syncs_no_names() {
            return Ok(());
        }
        pass("fsync")
            .and_then(|()| rustix::fs::fsync(&self.folder))
            .map_err(|e| Error::NameNotDurable { path: self.full.clone(), source: e.into() })
    }
}

impl Hidden {
    fn open_again(&self, full: &Path) -> Result<OwnedFd> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        pass("open")
            .and_then(|()| rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty()))
            .map_err(|e| denied_or_failed(e.into(), "open", full))
    }

    fn rename_to(mut self, place: &Place) -> Result<()> {
        let (from, to) = ((&self.folder, &self.name), (&place.folder, &place.name));
        pass("renameat2")
            .and_then(|()| {
                rustix::fs::renameat_with(from.0, from.1, to.0, to.1, RenameFlags::NOREPLACE)
            })
            .map_err(|e| place.refused(e, "rename"))?;
        // It has gone: whatever has that name from now on is not ours.
        self.name.clear();
        Ok(())
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let Ok(name) = CString::new(self.name.as_bytes()) else { return };
        if name.is_empty() {
            return;
        }
        let there = Attributes::at(&self.folder, &name).map(|there| there.identity);
        let ours = match self.made {
            Some(made) => there.is_ok_and(|there| there == made),
            // The name is random, and it was made with `O_EXCL`.
            None => true,
        };
        if ours {
            // A failure here changes nothing: the caller has the first error.
            let _ = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

impl Unpublished {
    /// Names the inode for good.
    pub fn identity(&self) -> FileIdentity {
        self.file.identity()
    }

    /// Gives the file its name, which replaces nothing, and makes that durable.
    ///
    /// # Errors
    ///
    /// [`Error::Exists`] if somebody else took the name meanwhile: nothing is left. [`Error::NameNotDurable`]:
    /// the file is there, and others may have it open, so it stays.
    pub fn publish(self) -> Result<Description> {
        let Self { file, place, hidden } = self;
        match hidden {
            Some(hidden) => hidden.rename_to(&place)?,
            None => link(&file, &place)?,
        }
        place.sync()?;
        Ok(file)
    }
}

fn link(file: &Description, place: &Place) -> Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.fd().as_raw_fd());
    pass("linkat")
        .and_then(|()| {
            let follow = AtFlags::SYMLINK_FOLLOW;
            rustix::fs::linkat(rustix::fs::CWD, &unnamed, &place.folder, &place.name, follow)
        })
        .map_err(|e| place.refused(e, "link"))
}

/// `.NAME.pinfold-new-RANDOM`, with as much of the name as there is room for.
fn hidden_name(name: &OsStr) -> OsString {
    let mut random = [0; 8];
    // Where the kernel has no random bytes yet, `O_EXCL` still refuses a name that is taken.
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    let end = format!(".pinfold-new-{:016x}", u64::from_ne_bytes(random));
    let room = NAME_MAX - end.len() - 1;
    let bytes = name.as_bytes();
    let mut hidden = OsString::from(".");
    hidden.push(OsStr::from_bytes(&bytes[..bytes.len().min(room)]));
    hidden.push(end);
    hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hidden_name_fits_and_differs() {
        let long = OsString::from("x".repeat(NAME_MAX));
        let (one, two) = (hidden_name(&long), hidden_name(&long));
        assert_eq!(one.len(), NAME_MAX);
        assert_ne!(one, two);
        assert!(hidden_name(OsStr::new("log")).to_str().unwrap().starts_with(".log.pinfold-new-"));
    }
}
