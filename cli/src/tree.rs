//! What is in a folder, on either side, in the order in which it is copied.

use std::fs;
use std::path::Path;

use pinfold_client::{Entry, EntryKind, Session};

use crate::args::FolderArg;
use crate::exit::Exit;
use crate::failure::Failure;

/// Something beneath a folder.
#[derive(Debug)]
pub(crate) struct Found {
    /// From the folder on, with a slash between names.
    pub(crate) path: String,
    pub(crate) kind: Kind,
}

/// What it is, and what becomes of it.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Made before what is in it.
    Folder,
    /// With so many bytes when it was looked at.
    File(u64),
    /// Left out, for this reason.
    Other(&'static str),
    /// A file that can't be copied.
    FailedFile(Failure),
    /// A folder that can't be read or named: what is in it is not known.
    FailedFolder(Failure),
}

impl Kind {
    fn failed(failure: Failure, is_folder: bool) -> Self {
        match is_folder {
            true => Self::FailedFolder(failure),
            false => Self::FailedFile(failure),
        }
    }
}

const NO_UTF8: &str = "its name is no UTF-8, and the protocol knows no other names";

/// Of a local folder; a link that leads to one will do. Each folder comes before what is in it, and the
/// names of each in their order.
pub(crate) fn of_folder(top: &Path) -> Result<Vec<Found>, Failure> {
    let failed = |error| Failure::local(format!("cannot read the folder {}", top.display()), error);
    if !fs::metadata(top).map_err(failed)?.is_dir() {
        let what = format!("{} is no folder", top.display());
        return Err(Failure::new(Exit::LocalIo, what).or_hint("leave -r out to copy one file"));
    }
    let mut walk = Walk::new(names_in(top, "").map_err(failed)?);
    while let Some(path) = walk.next_folder() {
        let folder = top.join(&path);
        let unreadable =
            |error| Failure::local(format!("cannot read the folder {}", folder.display()), error);
        walk.has(&path, names_in(&folder, &(path.clone() + "/")).map_err(unreadable));
    }
    Ok(walk.done)
}

/// A tree on its way from the top down: each folder before what is in it.
#[derive(Debug)]
struct Walk {
    done: Vec<Found>,
    /// The next one last.
    left: Vec<Found>,
}

impl Walk {
    /// Of what is at the top, in its order.
    fn new(mut top: Vec<Found>) -> Self {
        top.reverse();
        Self { done: Vec::new(), left: top }
    }

    /// The next folder to be looked into.
    fn next_folder(&mut self) -> Option<String> {
        while let Some(next) = self.left.pop() {
            let folder = matches!(next.kind, Kind::Folder).then(|| next.path.clone());
            self.done.push(next);
            if folder.is_some() {
                return folder;
            }
        }
        None
    }

    /// What is in it, in its order.
    fn has(&mut self, folder: &str, found: Result<Vec<Found>, Failure>) {
        match found {
            Ok(found) => self.left.extend(found.into_iter().rev()),
            Err(failure) => {
                self.done
                    .push(Found { path: folder.to_owned(), kind: Kind::FailedFolder(failure) });
            }
        }
    }
}

fn names_in(folder: &Path, above: &str) -> std::io::Result<Vec<Found>> {
    let mut names = fs::read_dir(folder)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<Vec<_>, _>>()?;
    names.sort_unstable();
    let look = |name: std::ffi::OsString| {
        let full = folder.join(&name);
        let Some(name) = name.to_str() else {
            let what = format!("cannot put {}: {NO_UTF8}", full.display());
            let path = above.to_owned() + &name.to_string_lossy();
            let failure = Failure::new(Exit::BadRequest, what);
            return Found {
                path,
                kind: Kind::failed(failure, full.is_dir() && !full.is_symlink()),
            };
        };
        Found { path: above.to_owned() + name, kind: kind_of(&full) }
    };
    Ok(names.into_iter().map(look).collect())
}

fn kind_of(path: &Path) -> Kind {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => Kind::Folder,
        Ok(metadata) if metadata.is_file() => Kind::File(metadata.len()),
        Ok(metadata) if metadata.is_symlink() => Kind::Other("a symbolic link"),
        Ok(_) => Kind::Other("no regular file"),
        Err(error) => {
            Kind::FailedFile(Failure::local(format!("cannot look at {}", path.display()), error))
        }
    }
}

/// Of a folder of the server, in the same order.
pub(crate) async fn of_export(session: &Session, top: &FolderArg) -> Result<Vec<Found>, Failure> {
    let listed = session.list(&top.export, &top.path).await;
    let listed = listed.map_err(|error| {
        Failure::from(error).or_hint("`pinfold ls` shows what there is; leave -r out for a file")
    })?;
    let mut walk = Walk::new(sorted(listed, top, ""));
    while let Some(path) = walk.next_folder() {
        let folder = top.join(&path);
        let listed = session.list(&folder.export, &folder.path).await;
        let found = listed.map(|listed| sorted(listed, top, &(path.clone() + "/")));
        walk.has(&path, found.map_err(Failure::from));
    }
    Ok(walk.done)
}

fn sorted(mut listed: Vec<Entry>, top: &FolderArg, above: &str) -> Vec<Found> {
    listed.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    let found = |entry: Entry| {
        let path = above.to_owned() + &entry.name;
        let kind = match untellable(&entry.name) {
            Some(why) => {
                let what = format!("cannot get {}: {why}", top.join(&path));
                let failure = Failure::new(Exit::BadRequest, what);
                Kind::failed(failure, entry.kind == EntryKind::Folder)
            }
            None => match entry.kind {
                EntryKind::Folder => Kind::Folder,
                EntryKind::File => Kind::File(entry.size),
                _ => Kind::Other("neither a file nor a folder"),
            },
        };
        Found { path, kind }
    };
    listed.into_iter().map(found).collect()
}

/// Why there can be no local file of this name; what a server says is not believed.
fn untellable(name: &str) -> Option<&'static str> {
    if name.contains(char::REPLACEMENT_CHARACTER) {
        return Some(NO_UTF8);
    }
    let one_step = !name.contains(['/', '\0']) && !matches!(name, "" | "." | "..");
    (!one_step).then_some("the server calls it by what is no name")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::symlink;

    use super::*;

    fn told(found: &[Found]) -> Vec<(&str, String)> {
        let kind = |kind: &Kind| match kind {
            Kind::Folder => "folder".to_owned(),
            Kind::File(len) => format!("file {len}"),
            Kind::Other(why) => (*why).to_owned(),
            Kind::FailedFile(failure) => (failure.exit as u8).to_string(),
            Kind::FailedFolder(failure) => format!("folder, {}", failure.exit as u8),
        };
        found.iter().map(|found| (found.path.as_str(), kind(&found.kind))).collect()
    }

    fn expected(found: &[(&'static str, &str)]) -> Vec<(&'static str, String)> {
        found.iter().map(|(path, kind)| (*path, (*kind).to_owned())).collect()
    }

    #[test]
    fn folders_come_before_what_is_in_them_and_links_are_not_followed() {
        let top = tempfile::tempdir().unwrap();
        let at = |name: &str| top.path().join(name);
        fs::create_dir_all(at("b/inner")).unwrap();
        fs::create_dir(at("empty")).unwrap();
        fs::write(at("b/inner/x"), "abc").unwrap();
        fs::write(at("b/a"), "").unwrap();
        fs::write(at("c"), "1").unwrap();
        symlink("b", at("link")).unwrap();
        fs::write(top.path().join(OsStr::from_bytes(b"\xff")), "").unwrap();
        let found = of_folder(top.path()).unwrap();
        let all = [
            ("b", "folder"),
            ("b/a", "file 0"),
            ("b/inner", "folder"),
            ("b/inner/x", "file 3"),
            ("c", "file 1"),
            ("empty", "folder"),
            ("link", "a symbolic link"),
            ("\u{fffd}", "5"),
        ];
        assert_eq!(told(&found), expected(&all));
        let by_link = of_folder(&at("link")).unwrap();
        assert_eq!(told(&by_link).len(), 3, "the top may be a link");
        assert_eq!(of_folder(&at("c")).unwrap_err().exit, Exit::LocalIo);
        assert_eq!(of_folder(&at("none")).unwrap_err().exit, Exit::LocalIo);
    }

    #[test]
    fn names_from_a_server_stay_in_their_folder() {
        let top = FolderArg { export: "data".to_owned(), path: String::new() };
        let entry = |name: &str, kind| {
            let name = name.to_owned();
            Entry { name, kind, size: 7, allocated: 0, pins: 0, quiesced: None }
        };
        let listed = vec![
            entry("..", EntryKind::Folder),
            entry("a/b", EntryKind::File),
            entry("/etc", EntryKind::Folder),
            entry("", EntryKind::File),
            entry("nul\0", EntryKind::File),
            entry("\u{fffd}", EntryKind::File),
            entry("good", EntryKind::File),
            entry("..good", EntryKind::Folder),
            entry("pipe", EntryKind::Other),
        ];
        let found = sorted(listed, &top, "in/");
        let all = [
            ("in/", "5"),
            ("in/..", "folder, 5"),
            ("in/..good", "folder"),
            ("in//etc", "folder, 5"),
            ("in/a/b", "5"),
            ("in/good", "file 7"),
            ("in/nul\0", "5"),
            ("in/pipe", "neither a file nor a folder"),
            ("in/\u{fffd}", "5"),
        ];
        assert_eq!(told(&found), expected(&all));
    }
}
