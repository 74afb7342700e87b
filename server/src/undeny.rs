//! Lifts the seals that a server left behind when it was killed.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pinfold_leases::{Error as FileError, Export, Located, RelativePath};
use pinfold_verbs::with_causes;

/// How it went with all files together: the worst counts.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Undenied {
    /// No seal is left.
    All,
    /// A server is at work on a file.
    Busy,
    /// The right to lift a seal, or to look for one, is missing.
    Denied,
    /// Something else went wrong.
    Failed,
}

/// What was done with one file, in words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lifted {
    path: PathBuf,
    lifted: bool,
}

impl fmt::Display for Lifted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.lifted {
            true => write!(f, "{path}: the seal is lifted"),
            false => write!(f, "{path}: not sealed"),
        }
    }
}

/// Lifts the seals of these files, and of all that lie beneath these folders on the same file
/// system. Files without our mark are left alone and not even opened; of those beneath a folder they
/// are not reported either. `tell` hears of each file, and of each failure.
pub fn undeny(paths: &[PathBuf], mut tell: impl FnMut(Result<Lifted, String>)) -> Undenied {
    let mut worst = Undenied::All;
    for path in paths {
        let mut work = Work { tell: &mut tell, worst };
        work.start(path);
        worst = work.worst;
    }
    worst
}

struct Work<'a> {
    tell: &'a mut dyn FnMut(Result<Lifted, String>),
    worst: Undenied,
}

impl Work<'_> {
    fn start(&mut self, path: &Path) {
        // What was named may be a link; what lies beneath may not.
        match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => self.folder(path, found.dev()),
            Ok(_) => self.file(path, true),
            Err(error) => self.io_failed(path, &error),
        }
    }

    fn folder(&mut self, folder: &Path, device: u64) {
        let entries = match std::fs::read_dir(folder) {
            Ok(entries) => entries,
            Err(error) => return self.io_failed(folder, &error),
        };
        for entry in entries {
            match entry {
                Ok(entry) => self.entry(&entry.path(), device),
                Err(error) => self.io_failed(folder, &error),
            }
        }
    }

    fn entry(&mut self, path: &Path, device: u64) {
        match std::fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() && found.dev() == device => self.folder(path, device),
            Ok(found) if found.is_file() => self.file(path, false),
            // Gone since the folder was read: it has no seal.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => self.io_failed(path, &error),
            Ok(_) => {}
        }
    }

    fn file(&mut self, path: &Path, named: bool) {
        match lift(path) {
            Ok(false) if !named => {}
            Ok(lifted) => (self.tell)(Ok(Lifted { path: path.to_owned(), lifted })),
            Err(error) => {
                self.worst = self.worst.max(match error {
                    FileError::Busy { .. } => Undenied::Busy,
                    FileError::Denied { .. } => Undenied::Denied,
                    _ => Undenied::Failed,
                });
                (self.tell)(Err(with_causes(&error)));
            }
        }
    }

    fn io_failed(&mut self, path: &Path, error: &std::io::Error) {
        let denied = error.kind() == std::io::ErrorKind::PermissionDenied;
        self.worst = self.worst.max(if denied { Undenied::Denied } else { Undenied::Failed });
        (self.tell)(Err(format!("can't look at {}: {error}", path.display())));
    }
}

fn lift(path: &Path) -> Result<bool, FileError> {
    let located = locate(path)?;
    if located.is_sealed() { located.unseal() } else { Ok(false) }
}

/// By its folder, so that a name in whatever bytes will do, and no link is followed.
fn locate(path: &Path) -> Result<Located, FileError> {
    let not_found = || FileError::NotFound { path: path.to_owned() };
    let name = path.file_name().ok_or_else(not_found)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    Export::open(folder.unwrap_or(Path::new(".")))?.locate(&RelativePath::of_name(name)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_seal_is_left_alone_and_what_is_not_there_is_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("link")).unwrap();
        std::fs::create_dir(folder.path().join("inner")).unwrap();
        let missing = folder.path().join("missing");
        let mut told = Vec::new();
        let paths = [folder.path().to_owned(), file.clone()];
        assert_eq!(undeny(&paths, |report| told.push(report)), Undenied::All);
        assert_eq!(told, [Ok(Lifted { path: file, lifted: false })], "only what was named");
        assert_eq!(undeny(&[missing], |report| assert!(report.is_err())), Undenied::Failed);
    }
}
