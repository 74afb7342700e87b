//! What becomes of pins whose file has lost the name that they were made by.
//!
//! A lease does not hold that back, and a client that goes on would commit into a file that nobody
//! finds. So the pins are taken back with notice as soon as the kernel tells (`leases/src/names.rs`),
//! and no commit succeeds without a look at the name.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use pinfold_leases::{
    FileIdentity, GuardState, GuardTier, NameNews, NameState, NameWatcher, RelativePath,
};
use pinfold_verbs::with_causes;

use super::files::still_draining;
use super::pins::{Found, PinOrder};
use super::{Engine, PATIENCE, locked, with};
use crate::error::{Error, Result};
use crate::held::HeldFile;
use crate::ids::PinId;
use crate::names::Name;
use crate::passage::Waiting;
use crate::registry::Reason;

/// How often names are looked at of which the kernel does not tell everything.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// The work of the thread that hears of names. It ends soon after the engine.
pub(super) fn hear(watcher: &NameWatcher, engine: &Weak<Engine>) {
    let mut look_at = Instant::now() + LOOK_EVERY;
    while engine.strong_count() > 0 {
        let news = watcher.wait(look_at.saturating_duration_since(Instant::now()));
        with(engine, |engine| news.into_iter().for_each(|news| engine.hear_of_name(news)));
        if Instant::now() >= look_at {
            with(engine, |engine| engine.look_at_names(|file| !file.names().are_watched()));
            with(engine, Engine::end_visits);
            look_at = Instant::now() + LOOK_EVERY;
        }
    }
}

impl Engine {
    fn hear_of_name(&self, news: NameNews) {
        match news {
            NameNews::Name(identity) => {
                if let Some(file) = self.held(identity) {
                    self.look_at_name(&file);
                }
            }
            NameNews::Visit(identity) => locked(&self.passages).visited(identity, Instant::now()),
            NameNews::Overflow => self.look_at_names(|_| true),
        }
    }

    /// Before a file is let go: has it told when somebody opens it, if nobody was seen waiting.
    pub(super) fn await_visit(&self, file: &HeldFile) -> Waiting {
        let is_wanted = matches!(file.state(), Some(GuardState::Broken(_)));
        // Nobody waits for a seal, and nobody comes back for it.
        if !is_wanted || file.tier() == GuardTier::Sealed || !file.breakers().is_empty() {
            return Waiting::Seen;
        }
        let watch = self.name_watcher.watch_file(file.description());
        // Without it nobody would be noticed who comes back.
        if !watch.is_complete() {
            return Waiting::Seen;
        }
        let before = locked(&self.visits).insert(file.description().identity(), watch);
        drop(before);
        Waiting::Unseen
    }

    fn end_visits(&self) {
        let now = Instant::now();
        let over: Vec<_> = {
            let passages = locked(&self.passages);
            let is_over = |file: &FileIdentity| passages.left_alone(*file, now).is_none();
            locked(&self.visits).extract_if(|file, _| is_over(file)).collect()
        };
        // Not under the locks: that ends watches.
        drop(over);
    }

    fn look_at_names(&self, which: impl Fn(&HeldFile) -> bool) {
        let files: Vec<_> = locked(&self.files).values().cloned().collect();
        files.iter().filter(|file| which(file)).for_each(|file| self.look_at_name(file));
    }

    fn look_at_name(&self, file: &HeldFile) {
        match file.names().look(file.description()) {
            Ok(NameState::Stands) => {}
            Ok(gone) => self.take_back_nameless(file, gone),
            // The next look may tell, and until then no commit succeeds.
            Err(error) => {
                let (path, error) = (file.path().display(), with_causes(&error));
                tracing::warn!(%path, error, "can't tell whether a pinned file has its name");
            }
        }
    }

    fn take_back_nameless(&self, file: &HeldFile, gone: NameState) {
        if file.names().note_gone(gone) {
            let path = file.path().display();
            tracing::warn!(%path, how = %gone, "a pinned file has lost its name: revoking");
        }
        self.begin_to_take_back(file, Reason::NameGone);
    }

    /// Watches the name by which a pin is about to be made, and checks that it names the file, now that
    /// a guard may keep others from renaming it and that a watch tells if they do.
    pub(super) fn demand_found(
        &self,
        file: &HeldFile,
        found: &Found,
        order: &PinOrder,
    ) -> Result<Arc<Name>> {
        let export = self.export(&order.export)?;
        let by = (order.export.as_str(), export);
        let (name, is_new) =
            file.names().watch(&self.name_watcher, by, &order.path, file.description());
        // One that was found while guard and watch were there already names it.
        if is_new || !file.held_its_name_since(found.at) {
            self.demand_named(&order.export, &order.path, found.located.identity())?;
        }
        Ok(name)
    }

    /// After the flush of a commit: bytes are not called durable in a file that the pin's path does not
    /// name.
    pub(super) fn demand_its_name(&self, file: &HeldFile, pin: PinId) -> Result<()> {
        match file.names().look_for(pin, file.description())? {
            NameState::Stands => Ok(()),
            gone => {
                self.take_back_nameless(file, gone);
                Err(Error::NameGone { path: file.path().to_owned(), how: gone })
            }
        }
    }

    /// Takes the pins back that were made by a path that names another file by now, or none, and waits
    /// until that is done. Returns how many files there were, and how many pins.
    pub(super) async fn revoke_orphans(
        &self,
        export: &str,
        path: &RelativePath,
    ) -> Result<(usize, usize)> {
        let (name, path) = (export.to_owned(), path.clone());
        let begun =
            self.call(export, move |engine| Ok(engine.begin_to_revoke_orphans(&name, &path)));
        let (files, pins) = begun.await?;
        for file in &files {
            let released = tokio::time::timeout(PATIENCE, file.wait_released()).await;
            released.map_err(|_| still_draining(file.path()))?;
        }
        Ok((files.len(), pins))
    }

    fn begin_to_revoke_orphans(
        &self,
        export: &str,
        path: &RelativePath,
    ) -> (Vec<Arc<HeldFile>>, usize) {
        let mut files: Vec<_> = locked(&self.files).values().cloned().collect();
        let stands = |file: &HeldFile| {
            file.names().look(file.description()).is_ok_and(|state| state == NameState::Stands)
        };
        files.retain(|file| file.names().include(export, path) && !stands(file));
        let pins = files.iter().map(|file| self.registry().pins_on(file.id())).sum();
        for file in &files {
            self.begin_to_take_back(file, Reason::Operator);
        }
        (files, pins)
    }
}
