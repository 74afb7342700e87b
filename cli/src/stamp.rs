//! Which local file this is, and whether it stayed as it was while it was copied.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;

use pinfold_client::{FileIdentity, Session};

use crate::exit::Exit;
use crate::failure::Failure;

/// What the kernel keeps about a file that changes with its bytes.
///
/// A write within one tick of the kernel's clock after the stamp was taken (4 ms as a rule) leaves
/// the times as they are, and so does a write through a mapping that was dirty already.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Stamp {
    size: u64,
    /// Seconds and nanoseconds since 1970 (`st_mtim`): utimensat(2) can set it.
    modified: (i64, i64),
    /// The same of the last change of any kind (`st_ctim`): no program can set it.
    changed: (i64, i64),
}

impl Stamp {
    /// The stamp of a file whose metadata was read just now.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// What is different now, for people; `None` if nothing is.
    pub(crate) fn change(&self, file: &File) -> io::Result<Option<String>> {
        Ok(self.compare(&Self::of(&file.metadata()?)))
    }

    fn compare(&self, now: &Self) -> Option<String> {
        if now.size != self.size {
            return Some(format!("its size went from {} to {} bytes", self.size, now.size));
        }
        if now.modified != self.modified {
            return Some("a program wrote to it".to_owned());
        }
        (now.changed != self.changed)
            .then(|| "its change time (ctime) is another, so its bytes may be, too".to_owned())
    }
}

/// Refuses to copy a file onto itself, as it is when this host serves the export that it lies in.
/// `local` is `None` if there is no local file yet.
pub(crate) fn demand_two_files(
    session: &Session,
    local: Option<&Metadata>,
    remote: FileIdentity,
    names: (impl std::fmt::Display, impl std::fmt::Display),
) -> Result<(), Failure> {
    let same = |local: &Metadata| (local.dev(), local.ino()) == (remote.device, remote.inode);
    if !session.is_on_server_host() || !local.is_some_and(same) {
        return Ok(());
    }
    let (from, to) = names;
    Err(Failure::new(Exit::Usage, format!("{from} and {to} are the same file: nothing is copied")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_the_three_tells_of_a_change() {
        let before = Stamp { size: 10, modified: (1, 2), changed: (3, 4) };
        assert_eq!(before.compare(&before), None);
        let size = Stamp { size: 11, modified: (9, 9), ..before };
        assert_eq!(before.compare(&size).unwrap(), "its size went from 10 to 11 bytes");
        let modified = Stamp { modified: (1, 3), changed: (3, 5), ..before };
        assert_eq!(before.compare(&modified).unwrap(), "a program wrote to it");
        let set_back = Stamp { changed: (3, 5), ..before };
        assert!(before.compare(&set_back).unwrap().contains("ctime"));
    }
}
