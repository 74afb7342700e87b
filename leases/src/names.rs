//! Tells when a file may have lost its name, and when somebody opens it (inotify(7)).
//!
//! A lease holds neither unlink nor rename back, and no guard at all a rename of a folder above the
//! file. So the file and the folders above it are watched. A watch opens nothing and breaks no guard.
//! It tells that something *may* have happened: [`Export::name_of`] tells what.

use std::collections::HashMap;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::description::{Description, FileIdentity};
use crate::door::pass;
use crate::error::{Error, Result};
use crate::export::{Attributes, Export, RelativePath};

/// Bytes of news that are taken at a time.
const NEWS_BYTES: usize = 16 << 10;

/// How a file's name stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NameState {
    /// The path names the file.
    Stands,
    /// The path names another file.
    Replaced,
    /// The path names nothing, and the file has another name.
    Renamed,
    /// The file has no name left.
    Deleted,
}

impl fmt::Display for NameState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NameState::Stands => "stands",
            NameState::Replaced => "replaced",
            NameState::Renamed => "renamed",
            NameState::Deleted => "deleted",
        })
    }
}

impl Export {
    /// How the name stands by which a file was opened. Opens nothing and takes no descriptor.
    pub fn name_of(&self, path: &RelativePath, file: &Description) -> Result<NameState> {
        if self.device().is_some() {
            return Ok(NameState::Stands);
        }
        let full = || self.path().join(path.as_path());
        match Attributes::at_path(self.root(), path.as_path()) {
            Ok(there) if there.identity == file.identity() => return Ok(NameState::Stands),
            Ok(_) => return Ok(NameState::Replaced),
            Err(e) if is_absent(e) => {}
            Err(e) => {
                return Err(Error::File { call: "statx", path: full(), source: e.into() });
            }
        }
        let names = Attributes::of(file.fd(), file.path())?.names;
        Ok(if names == 0 { NameState::Deleted } else { NameState::Renamed })
    }
}

/// The path leads to nothing, or through something that is not a folder.
fn is_absent(errno: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(errno, Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
}

/// What was seen of watched files.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NameNews {
    /// This file's name, attributes or link count have changed, or a folder above it was moved.
    Name(FileIdentity),
    /// Somebody has opened this file.
    Visit(FileIdentity),
    /// More has happened than the kernel's queue takes: anything may have happened to any file.
    Overflow,
}

/// Watches names. One serves any number of files; clones are the same one.
#[derive(Clone, Debug)]
pub struct NameWatcher(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Absent where the user's inotify instances are used up.
    inotify: Option<OwnedFd>,
    watched: Mutex<HashMap<i32, Watched>>,
}

/// A file, or a folder above files.
#[derive(Debug, Default)]
struct Watched {
    /// And how many watches each has.
    files: HashMap<FileIdentity, usize>,
}

/// A watch on one file, until it is dropped.
#[derive(Debug)]
#[must_use = "the watch ends when this is dropped"]
pub struct NameWatch {
    watcher: NameWatcher,
    file: FileIdentity,
    watches: Vec<i32>,
    is_complete: bool,
}

impl NameWatch {
    /// Whether the kernel tells of all that may take the name away. It does not where a folder above
    /// the file may not be read, or where the user's inotify watches or instances are used up.
    pub fn is_complete(&self) -> bool {
        self.is_complete
    }
}

impl Drop for NameWatch {
    fn drop(&mut self) {
        let mut watched = self.watcher.watched();
        for number in self.watches.drain(..) {
            self.watcher.let_go(&mut watched, number, self.file);
        }
    }
}

impl Default for NameWatcher {
    fn default() -> Self {
        Self::new()
    }
}

impl NameWatcher {
    /// A new one. Where the user's inotify instances are used up it tells of nothing, and its watches
    /// are not [complete](NameWatch::is_complete).
    pub fn new() -> Self {
        let flags = CreateFlags::CLOEXEC | CreateFlags::NONBLOCK;
        let inotify = pass("inotify_init").and_then(|()| inotify::init(flags)).ok();
        Self(Arc::new(Inner { inotify, watched: Mutex::default() }))
    }

    /// Watches a file that was opened by this path, and the folders above it. What happened before is
    /// not told, so [`Export::name_of`] is to be asked once more after this.
    pub fn watch(&self, export: &Export, path: &RelativePath, file: &Description) -> NameWatch {
        let mut watch = self.watch_file(file);
        if file.device().is_some() {
            watch.is_complete = true;
            return watch;
        }
        for folder in folders_above(path.as_path()) {
            let opened =
                export.open_beneath(folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty(), path);
            let number =
                opened.ok().and_then(|folder| self.add(folder.as_fd(), OF_FOLDERS, watch.file));
            watch.take_in(number);
        }
        watch
    }

    /// Watches a file without the folders above it.
    pub fn watch_file(&self, file: &Description) -> NameWatch {
        let (watcher, file_watched) = (self.clone(), file.identity());
        let mut watch =
            NameWatch { watcher, file: file_watched, watches: Vec::new(), is_complete: true };
        // Nobody can rename a device in a way that matters to its bytes.
        if file.device().is_none() {
            watch.take_in(self.add(file.fd(), OF_FILES, file_watched));
        }
        watch
    }

    fn add(&self, what: BorrowedFd<'_>, flags: WatchFlags, file: FileIdentity) -> Option<i32> {
        let inotify = self.0.inotify.as_ref()?;
        let link = format!("/proc/self/fd/{}", what.as_raw_fd());
        // Under the lock: the last watch on the same inode may end at this moment.
        let mut watched = self.watched();
        let number = pass("inotify_add_watch")
            .and_then(|()| inotify::add_watch(inotify, &link, flags))
            .ok()?;
        *watched.entry(number).or_default().files.entry(file).or_default() += 1;
        Some(number)
    }

    fn let_go(&self, watched: &mut HashMap<i32, Watched>, number: i32, file: FileIdentity) {
        // No entry: the kernel has ended the watch.
        let Some(entry) = watched.get_mut(&number) else { return };
        let Some(count) = entry.files.get_mut(&file) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        entry.files.remove(&file);
        if entry.files.is_empty() {
            watched.remove(&number);
            if let Some(inotify) = &self.0.inotify {
                // It fails where the kernel has ended it.
                let _ = inotify::remove_watch(inotify, number);
            }
        }
    }

    fn watched(&self) -> MutexGuard<'_, HashMap<i32, Watched>> {
        // No code that holds it can leave the map half-changed.
        self.0.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for news, at most for so long. One thread at a time.
    pub fn wait(&self, at_most: Duration) -> Vec<NameNews> {
        let Some(inotify) = &self.0.inotify else {
            std::thread::sleep(at_most);
            return Vec::new();
        };
        let timeout = Timespec {
            tv_sec: at_most.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: at_most.subsec_nanos().into(),
        };
        // Interrupted or not: what there is is read.
        let _ = poll(&mut [PollFd::new(inotify, PollFlags::IN)], Some(&timeout));
        self.read(inotify)
    }

    fn read(&self, inotify: &OwnedFd) -> Vec<NameNews> {
        let mut news = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); NEWS_BYTES];
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            let (number, what) = (event.wd(), event.events());
            if what.contains(ReadFlags::QUEUE_OVERFLOW) {
                news.push(NameNews::Overflow);
                continue;
            }
            news.extend(self.sort(number, what));
        }
        news.dedup();
        news
    }

    fn sort(&self, number: i32, what: ReadFlags) -> Vec<NameNews> {
        let mut watched = self.watched();
        let Some(entry) = watched.get_mut(&number) else { return Vec::new() };
        let of_all =
            |news: fn(FileIdentity) -> NameNews| entry.files.keys().copied().map(news).collect();
        if what.contains(ReadFlags::OPEN) {
            return of_all(NameNews::Visit);
        }
        let news = of_all(NameNews::Name);
        if what.contains(ReadFlags::IGNORED) {
            watched.remove(&number);
        }
        news
    }
}

impl NameWatch {
    fn take_in(&mut self, number: Option<i32>) {
        self.is_complete &= number.is_some();
        self.watches.extend(number);
    }
}

/// Of a file: its link count, its moves; and opens, of which there are none while it is guarded.
const OF_FILES: WatchFlags = WatchFlags::ATTRIB
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::OPEN);

/// Of a folder above one.
const OF_FOLDERS: WatchFlags = WatchFlags::DELETE_SELF.union(WatchFlags::MOVE_SELF);

/// Those beneath the export.
fn folders_above(path: &Path) -> impl Iterator<Item = &Path> {
    let is_below = |folder: &&Path| !folder.as_os_str().is_empty() && *folder != Path::new(".");
    path.ancestors().skip(1).filter(is_below)
}

impl Attributes {
    /// Of what a path beneath a folder leads to now; the last step is not followed.
    fn at_path(folder: BorrowedFd<'_>, path: &Path) -> rustix::io::Result<Self> {
        use rustix::path::Arg;
        path.into_with_c_str(|path| {
            Self::read(folder, path, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Only a hang reaches it.
    const DEADLINE: Duration = Duration::from_secs(30);

    struct World {
        folder: tempfile::TempDir,
        export: Export,
        watcher: NameWatcher,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let export = Export::open(folder.path()).unwrap();
            Self { folder, export, watcher: NameWatcher::new() }
        }

        fn file(&self, path: &str) -> (RelativePath, Description) {
            let full = self.folder.path().join(path);
            fs::create_dir_all(full.parent().unwrap()).unwrap();
            fs::write(&full, b"x").unwrap();
            let path = RelativePath::parse(path).unwrap();
            let file = self.export.locate(&path).unwrap().open().unwrap();
            (path, file)
        }

        fn next(&self) -> NameNews {
            *self.watcher.wait(DEADLINE).first().expect("news")
        }

        fn all(&self) -> Vec<NameNews> {
            self.watcher.wait(Duration::ZERO)
        }
    }

    #[test]
    fn a_name_that_goes_is_told_whichever_way_it_goes() {
        let world = World::new();
        let at = |path: &str| world.folder.path().join(path);
        let ways: [(&str, &dyn Fn(), NameState); 5] = [
            ("a", &|| fs::remove_file(at("a")).unwrap(), NameState::Deleted),
            ("b", &|| fs::rename(at("b"), at("other")).unwrap(), NameState::Renamed),
            ("c", &|| fs::rename(at("new"), at("c")).unwrap(), NameState::Replaced),
            ("d/e/f", &|| fs::rename(at("d"), at("moved")).unwrap(), NameState::Renamed),
            ("g", &|| fs::remove_file(at("g")).unwrap(), NameState::Renamed),
        ];
        fs::write(at("new"), b"y").unwrap();
        for (path, take, state) in ways {
            let (path, file) = world.file(path);
            if path.as_path() == Path::new("g") {
                fs::hard_link(at("g"), at("h")).unwrap();
            }
            let watch = world.watcher.watch(&world.export, &path, &file);
            assert!(watch.is_complete());
            assert_eq!(world.export.name_of(&path, &file).unwrap(), NameState::Stands);
            assert_eq!(world.all(), []);
            take();
            assert_eq!(world.next(), NameNews::Name(file.identity()), "{path:?}");
            assert_eq!(world.export.name_of(&path, &file).unwrap(), state, "{path:?}");
            drop(watch);
        }
        assert!(world.watcher.watched().is_empty());
    }

    #[test]
    fn a_visit_is_an_open_that_succeeds() {
        use std::os::unix::fs::OpenOptionsExt;
        let world = World::new();
        let (path, file) = world.file("a");
        let full = world.folder.path().join(path.as_path());
        let (watcher, breaks) = crate::Watcher::start().unwrap();
        let armed = file.arm(&watcher).unwrap();
        let watch = world.watcher.watch_file(&file);
        let open = || fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&full);
        assert_eq!(open().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        breaks.recv_timeout(DEADLINE).unwrap();
        drop(armed);
        assert_eq!(world.all(), [], "it did not get in, and our own descriptor was there before");
        let opened = open().unwrap();
        assert_eq!(world.next(), NameNews::Visit(file.identity()));
        drop((opened, file));
        assert_eq!(world.all(), []);
        drop(watch);
        drop(open().unwrap());
        assert_eq!(world.all(), []);
    }

    #[test]
    fn watches_on_one_file_end_one_by_one() {
        let world = World::new();
        let (path, file) = world.file("d/a");
        let (other_path, other) = world.file("d/b");
        let one = world.watcher.watch(&world.export, &path, &file);
        let two = world.watcher.watch(&world.export, &path, &file);
        let beside = world.watcher.watch(&world.export, &other_path, &other);
        drop((one, beside));
        fs::rename(world.folder.path().join("d"), world.folder.path().join("e")).unwrap();
        assert_eq!(world.all(), [NameNews::Name(file.identity())]);
        drop(two);
        fs::rename(world.folder.path().join("e"), world.folder.path().join("d")).unwrap();
        assert_eq!(world.all(), []);
    }

    #[test]
    fn a_watch_breaks_no_guard() {
        let world = World::new();
        let (path, file) = world.file("a");
        let (watcher, breaks) = crate::Watcher::start().unwrap();
        let armed = file.arm(&watcher).unwrap();
        let watch = world.watcher.watch(&world.export, &path, &file);
        assert_eq!(world.export.name_of(&path, &file).unwrap(), NameState::Stands);
        armed.demand_held().unwrap();
        assert!(breaks.try_recv().is_err());
        drop((watch, armed));
    }
}
