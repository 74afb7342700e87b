//! The names by which a guarded file was pinned, and whether they still name it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use pinfold_leases::{Description, Export, NameState, NameWatch, NameWatcher, RelativePath};

use crate::error::Result;
use crate::ids::PinId;
use crate::sync::locked;

/// One name of a guarded file, watched for as long as a pin was made by it.
#[derive(Debug)]
pub(crate) struct Name {
    export_name: String,
    export: Arc<Export>,
    path: RelativePath,
    watch: NameWatch,
}

impl Name {
    fn is(&self, export: &str, path: &RelativePath) -> bool {
        self.export_name == export && self.path == *path
    }

    fn state(&self, file: &Description) -> Result<NameState> {
        Ok(self.export.name_of(&self.path, file)?)
    }
}

/// The names of one guarded file.
#[derive(Debug, Default)]
pub(crate) struct Names {
    known: Mutex<Known>,
    /// How the first of them was seen to have gone.
    gone: Mutex<Option<NameState>>,
}

#[derive(Debug, Default)]
struct Known {
    all: Vec<Weak<Name>>,
    of_pins: HashMap<PinId, Arc<Name>>,
}

impl Known {
    fn find(&self, export: &str, path: &RelativePath) -> Option<Arc<Name>> {
        self.all.iter().filter_map(Weak::upgrade).find(|name| name.is(export, path))
    }
}

impl Names {
    /// The name by which a pin is about to be made, and whether it is watched from just now on: then
    /// it has to be asked once more whether it names the file.
    pub(crate) fn watch(
        &self,
        watcher: &NameWatcher,
        (export_name, export): (&str, Arc<Export>),
        path: &RelativePath,
        file: &Description,
    ) -> (Arc<Name>, bool) {
        if let Some(known) = locked(&self.known).find(export_name, path) {
            return (known, false);
        }
        // Not under the lock: it looks up folders.
        let watch = watcher.watch(&export, path, file);
        let (export_name, path) = (export_name.to_owned(), path.clone());
        let name = Arc::new(Name { export_name, export, path, watch });
        let mut known = locked(&self.known);
        known.all.retain(|name| name.strong_count() > 0);
        known.all.push(Arc::downgrade(&name));
        (name, true)
    }

    /// The pin was made by this name.
    pub(crate) fn keep(&self, pin: PinId, name: Arc<Name>) {
        locked(&self.known).of_pins.insert(pin, name);
    }

    /// The pin is given back.
    pub(crate) fn drop(&self, pin: PinId) {
        let name = locked(&self.known).of_pins.remove(&pin);
        // Not under the lock: the last one ends a watch.
        drop(name);
    }

    /// Whether a pin was made by this name.
    pub(crate) fn include(&self, export: &str, path: &RelativePath) -> bool {
        locked(&self.known).find(export, path).is_some()
    }

    /// Whether the kernel tells of all that may take one of the names away.
    pub(crate) fn are_watched(&self) -> bool {
        self.now().iter().all(|name| name.watch.is_complete())
    }

    /// How the first of the names stands that does not name the file any more.
    pub(crate) fn look(&self, file: &Description) -> Result<NameState> {
        for name in self.now() {
            match name.state(file)? {
                NameState::Stands => {}
                gone => return Ok(gone),
            }
        }
        Ok(NameState::Stands)
    }

    /// How the name stands by which this pin was made.
    pub(crate) fn look_for(&self, pin: PinId, file: &Description) -> Result<NameState> {
        let name = locked(&self.known).of_pins.get(&pin).cloned();
        match name {
            Some(name) => name.state(file),
            None => self.look(file),
        }
    }

    fn now(&self) -> Vec<Arc<Name>> {
        locked(&self.known).all.iter().filter_map(Weak::upgrade).collect()
    }

    /// One of the names has gone; false: that is known.
    pub(crate) fn note_gone(&self, state: NameState) -> bool {
        let mut gone = locked(&self.gone);
        let is_news = gone.is_none();
        gone.get_or_insert(state);
        is_news
    }

    /// How the first of the names has gone that was seen to.
    pub(crate) fn gone(&self) -> Option<NameState> {
        *locked(&self.gone)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_name_is_asked_for_as_long_as_a_pin_was_made_by_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), b"x").unwrap();
        fs::hard_link(folder.path().join("a"), folder.path().join("b")).unwrap();
        let export = Arc::new(Export::open(folder.path()).unwrap());
        let path = |path| RelativePath::parse(path).unwrap();
        let file = export.locate(&path("a")).unwrap().open().unwrap();
        let (names, watcher) = (Names::default(), NameWatcher::new());
        for (pin, name) in [(1, "a"), (2, "b"), (3, "b")] {
            let by = ("x", Arc::clone(&export));
            let (name, is_new) = names.watch(&watcher, by, &path(name), &file);
            assert_eq!(is_new, pin < 3);
            names.keep(PinId(pin), name);
        }
        assert!(names.are_watched());
        assert_eq!(names.look(&file).unwrap(), NameState::Stands);

        fs::remove_file(folder.path().join("b")).unwrap();
        assert_eq!(names.look(&file).unwrap(), NameState::Renamed);
        assert_eq!(names.look_for(PinId(1), &file).unwrap(), NameState::Stands);
        assert_eq!(names.look_for(PinId(2), &file).unwrap(), NameState::Renamed);
        names.drop(PinId(2));
        assert!(names.include("x", &path("b")), "another pin");
        names.drop(PinId(3));
        assert!(!names.include("x", &path("b")));
        assert_eq!(names.look(&file).unwrap(), NameState::Stands, "nobody has a pin by that name");
        assert!(names.include("x", &path("a")) && !names.include("y", &path("a")));
    }
}
