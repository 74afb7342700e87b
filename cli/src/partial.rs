//! The file beside the one to be, until all of it is there.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::exit::Exit;
use crate::failure::Failure;
use crate::holes;

/// A file beside the one to be; gone with this value, unless it took its place or is to be gone on with.
#[derive(Debug)]
pub(crate) struct Partial {
    pub(crate) file: Arc<File>,
    pub(crate) path: PathBuf,
    /// What it becomes.
    pub(crate) target: PathBuf,
    /// Bytes of an earlier one, if it is to be gone on with.
    pub(crate) earlier: u64,
    /// The file that it replaces, if there is one.
    pub(crate) before: Option<Box<Metadata>>,
    resume: bool,
    placed: bool,
}

impl Partial {
    /// To be gone on with later: it is found again by its name. Only one at a time is at that.
    pub(crate) fn make(local: &Path, resume: bool) -> Result<Self, Failure> {
        let failed = |error| Failure::local(format!("cannot write {}", local.display()), error);
        // The file that a link leads to is replaced, not the link.
        let target = match fs::canonicalize(local) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => local.to_owned(),
            Err(error) => return Err(failed(error)),
        };
        let before = match fs::metadata(&target) {
            Ok(metadata) if metadata.is_file() => Some(Box::new(metadata)),
            Ok(_) => {
                let what = format!("cannot replace {}: it is no regular file", local.display());
                return Err(
                    Failure::new(Exit::LocalIo, what).or_hint("name a file; - is standard output")
                );
            }
            Err(_) => None,
        };
        let Some(name) = target.file_name() else {
            let what = format!("{} names no file", local.display());
            return Err(Failure::new(Exit::LocalIo, what));
        };
        let mut beside = OsString::from(".");
        beside.push(name);
        beside.push(match resume {
            true => ".pinfold-partial".to_owned(),
            false => format!(".pinfold-{}", process::id()),
        });
        let path = target.with_file_name(beside);
        let file = match resume {
            true => open_again(&path)?,
            false => {
                let mut options = OpenOptions::new();
                options.read(true).write(true).create_new(true).open(&path).map_err(failed)?
            }
        };
        let earlier = file.metadata().map_err(failed)?.len();
        let file = Arc::new(file);
        let partial = Self { file, path, target, earlier, before, resume, placed: false };
        if let Some(before) = &partial.before {
            partial.file.set_permissions(before.permissions()).map_err(failed)?;
        }
        Ok(partial)
    }

    /// What has the name now, if that is what is to be gone on with: there is nothing else.
    pub(crate) fn finished(&self, len: u64) -> Option<Arc<File>> {
        if !self.resume || self.earlier > 0 {
            return None;
        }
        let there = File::open(&self.target).ok()?;
        (there.metadata().ok()?.len() == len).then(|| Arc::new(there))
    }

    /// Gives a complete one its name.
    pub(crate) fn place(mut self) -> Result<(), Failure> {
        let failed = |doing: &str, error| {
            Failure::local(format!("cannot {doing} {}", self.target.display()), error)
        };
        fs::rename(&self.path, &self.target).map_err(|error| failed("replace", error))?;
        let outcome =
            sync_name(&self.target).map_err(|error| failed("make durable the name of", error));
        self.placed = true;
        outcome
    }

    /// What is there if the rest never comes.
    pub(crate) fn left_behind(&self) -> String {
        let as_it_was = format!("{} is as it was", self.target.display());
        match self.resume {
            true => format!("{as_it_was}; --resume goes on with {}", self.path.display()),
            false => as_it_was,
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let of_use = self.resume && self.file.metadata().is_ok_and(|there| there.len() > 0);
        if !self.placed && !of_use {
            // Nothing to be done about one that stays: it says whose it is.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Writes in the order of the file. Zeroes become holes behind what was there `earlier`.
pub(crate) fn write_in_order(
    file: &File,
    earlier: u64,
    offset: u64,
    bytes: &[u8],
) -> io::Result<()> {
    if offset < earlier {
        return file.write_all_at(bytes, offset);
    }
    let runs = holes::not_zero(bytes);
    let written = runs.last().map_or(0, |run| run.end);
    for run in runs {
        file.write_all_at(&bytes[run.clone()], offset + run.start as u64)?;
    }
    if written < bytes.len() {
        file.set_len(offset + bytes.len() as u64)?;
    }
    Ok(())
}

/// Makes the name of a file or a folder last.
pub(crate) fn sync_name(path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    File::open(folder).and_then(|folder| folder.sync_all())
}

/// Opens the one that an earlier command has left, or makes it, and keeps others off.
fn open_again(path: &Path) -> Result<File, Failure> {
    let failed = |error| Failure::local(format!("cannot write {}", path.display()), error);
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    loop {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).custom_flags(flags);
        let file = options.open(path).map_err(failed)?;
        let ours = file.metadata().map_err(failed)?;
        if !ours.is_file() {
            let what = format!("{} is no regular file", path.display());
            return Err(Failure::new(Exit::LocalIo, what).or_hint("remove it"));
        }
        if let Err(errno) = flock(&file, FlockOperation::NonBlockingLockExclusive) {
            return Err(failed(errno.into()).or_hint("another `pinfold get --resume` is at it"));
        }
        // It may have got its name, or be gone, since it was opened.
        let same = |there: fs::Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
        if fs::symlink_metadata(path).is_ok_and(same) {
            return Ok(file);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn write(partial: &Partial, offset: u64, bytes: &[u8]) {
        write_in_order(&partial.file, partial.earlier, offset, bytes).unwrap();
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_file_takes_its_name_only_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let local = folder.path().join("log");
        fs::write(&local, "before").unwrap();
        fs::set_permissions(&local, fs::Permissions::from_mode(0o640)).unwrap();
        let partial = Partial::make(&local, false).unwrap();
        write(&partial, 0, b"after");
        partial.file.set_len(5).unwrap();
        assert_eq!(fs::read(&local).unwrap(), b"before");
        partial.place().unwrap();
        assert_eq!(fs::read(&local).unwrap(), b"after");
        assert_eq!(fs::metadata(&local).unwrap().permissions().mode() & 0o777, 0o640);
        assert_eq!(names(folder.path()), ["log"]);
    }

    #[test]
    fn a_partial_file_is_gone_with_its_value() {
        let folder = tempfile::tempdir().unwrap();
        let partial = Partial::make(&folder.path().join("log"), false).unwrap();
        assert_eq!(names(folder.path()).len(), 1);
        drop(partial);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_link_stays_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (real, link) = (folder.path().join("real"), folder.path().join("link"));
        fs::write(&real, "before").unwrap();
        symlink("real", &link).unwrap();
        Partial::make(&link, false).unwrap().place().unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::metadata(&real).unwrap().len(), 0);
    }

    #[test]
    fn what_is_no_file_is_not_replaced() {
        for wrong in ["/dev/null", "/", "/nonexistent/folder/file", ".."] {
            let refused = Partial::make(Path::new(wrong), false);
            assert!(matches!(&refused, Err(failure) if failure.exit == Exit::LocalIo), "{wrong}");
        }
    }

    #[test]
    fn one_that_is_to_be_gone_on_with_stays_and_is_found_again_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let local = folder.path().join("log");
        drop(Partial::make(&local, true).unwrap());
        assert!(names(folder.path()).is_empty(), "nothing came");
        let partial = Partial::make(&local, true).unwrap();
        assert_eq!(partial.earlier, 0);
        write(&partial, 0, b"some");
        let refused = Partial::make(&local, true).unwrap_err();
        assert!(refused.report().contains("another"), "{}", refused.report());
        drop(partial);
        assert_eq!(names(folder.path()), [".log.pinfold-partial"]);
        let partial = Partial::make(&local, true).unwrap();
        assert_eq!(partial.earlier, 4);
        write(&partial, 2, &[0; 7]);
        partial.file.set_len(8).unwrap();
        partial.place().unwrap();
        assert_eq!(fs::read(&local).unwrap(), b"so\0\0\0\0\0\0");
        assert_eq!(names(folder.path()), ["log"]);
    }

    #[test]
    fn zeroes_are_written_only_where_something_was() {
        use std::os::unix::fs::MetadataExt as _;
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let partial = Partial::make(&folder.path().join("log"), false).unwrap();
        write(&partial, 0, &vec![0; 4 << 20]);
        write(&partial, 4 << 20, b"end");
        partial.file.set_len((4 << 20) + 3).unwrap();
        let there = fs::metadata(&partial.path).unwrap();
        assert_eq!(there.len(), (4 << 20) + 3);
        assert!(there.blocks() * 512 < 1 << 20, "{} blocks", there.blocks());
    }
}
