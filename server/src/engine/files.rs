//! Files as clients see them: finding, removing, listing; and whose turn it is to open or guard one.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use pinfold_leases::{
    Description, Entry, Error as FileError, FileIdentity, GuardId, Located, Page, RelativePath,
};

use super::{Engine, Inode, PATIENCE, locked};
use crate::error::{Error, Result};
use crate::held::HeldFile;
use crate::registry::{Reason, Refusal, Standing};

/// Permission bits of the folders that clients create, before the umask.
const FOLDER_MODE: u32 = 0o755;

/// Which part of a folder to list.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PageOrder {
    /// The last name of the page before.
    pub(crate) after: Vec<u8>,
    /// At most so many names.
    pub(crate) size: NonZeroUsize,
}

/// The right to open, guard or resize an inode.
pub(super) struct Turn {
    engine: Arc<Engine>,
    identity: FileIdentity,
    held: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.held = None;
        self.engine.prune(self.identity);
    }
}

impl Inode {
    pub(super) fn is_unused(&self) -> bool {
        let closed = self.description.as_ref().is_none_or(|weak| weak.upgrade().is_none());
        closed && !self.is_written_late() && Arc::strong_count(&self.turn) == 1
    }

    /// Whether a stream write of an earlier guarding may still land.
    fn is_written_late(&self) -> bool {
        self.left_behind.iter().any(|gate| !gate.is_empty_for_good())
    }
}

impl Engine {
    /// Finds a file without opening it.
    pub(crate) async fn locate(&self, export: String, path: RelativePath) -> Result<Located> {
        self.call(&export.clone(), move |engine| Ok(engine.export(&export)?.locate(&path)?)).await
    }

    /// How a file stands now, if it is guarded.
    pub(crate) fn standing(&self, identity: FileIdentity) -> Option<Standing> {
        self.registry().standing(identity).map(|(_, standing)| standing)
    }

    /// Makes a folder, its name durable; false: it was there.
    pub(crate) async fn make_folder(&self, export: String, path: RelativePath) -> Result<bool> {
        self.call(&export.clone(), move |engine| {
            Ok(engine.export(&export)?.make_folder(&path, FOLDER_MODE)?)
        })
        .await
    }

    /// The guarded file, if it is one now.
    pub(crate) fn held(&self, identity: FileIdentity) -> Option<Arc<HeldFile>> {
        let (guard, _) = self.registry().standing(identity)?;
        self.file(guard)
    }

    pub(super) async fn demand_unpinned(&self, located: &Located) -> Result<()> {
        match self.settled(located).await? {
            Some((file, pins)) => {
                let holder = self.registry().a_holder(file.id()).map(str::to_owned);
                let holder = holder.unwrap_or_else(|| "a session that is ending".to_owned());
                Err(Error::FilePinned { path: file.path().to_owned(), pins, holder })
            }
            None => Ok(()),
        }
    }

    /// Removes a file; its pins are revoked with notice first, or it is refused. Returns how many.
    pub(crate) async fn remove(
        &self,
        export: String,
        path: RelativePath,
        revoke_pins: bool,
    ) -> Result<usize> {
        self.export(&export)?.demand_directory()?;
        let located = self.locate(export.clone(), path.clone()).await?;
        let turn = self.take_turn(&located).await?;
        if !revoke_pins {
            self.demand_unpinned(&located).await?;
        }
        self.demand_still_named(&export, &path, &located).await?;
        let revoked = self.take_back(&located, Reason::Remove).await?;
        self.call(&export.clone(), move |engine| {
            let _turn = turn;
            engine.demand_named(&export, &path, located.identity())?;
            lift_leftover(&located)?;
            engine.export(&export)?.remove(&path)?;
            Ok(revoked)
        })
        .await
    }

    /// Takes a file back, and waits until its guard is let go. Returns how many pins it had.
    pub(super) async fn take_back(&self, located: &Located, reason: Reason) -> Result<usize> {
        let Some((file, pins)) = self.settled(located).await? else { return Ok(0) };
        self.begin_to_take_back(&file, reason);
        drop(file);
        // Nobody can pin it meanwhile: that takes a turn.
        match self.settled(located).await? {
            None => Ok(pins),
            Some(_) => Err(Refusal::Draining.into()),
        }
    }

    /// Lists a page of a folder, with the number of pins on each file, and where the next starts.
    pub(crate) async fn list(
        &self,
        export: String,
        path: Option<RelativePath>,
        order: PageOrder,
    ) -> Result<(Vec<(Entry, usize)>, Option<Vec<u8>>)> {
        self.call(&export.clone(), move |engine| {
            let page = Page { after: &order.after, size: order.size };
            let listing = engine.export(&export)?.list(path.as_ref(), &page)?;
            let with_pins = |entry: Entry| {
                let pins = match engine.standing(entry.identity) {
                    Some(Standing::Held { granted, .. }) => granted,
                    Some(Standing::Going) | None => 0,
                };
                (entry, pins)
            };
            Ok((listing.entries.into_iter().map(with_pins).collect(), listing.next))
        })
        .await
    }

    /// Asked before pins are revoked, so that nobody loses them for a path that names another file
    /// by now.
    pub(super) async fn demand_still_named(
        &self,
        export: &str,
        path: &RelativePath,
        located: &Located,
    ) -> Result<()> {
        let (name, path, identity) = (export.to_owned(), path.clone(), located.identity());
        self.call(export, move |engine| engine.demand_named(&name, &path, identity)).await
    }

    /// The path must still name the file: it may have been renamed or replaced since we looked.
    pub(super) fn demand_named(
        &self,
        export: &str,
        path: &RelativePath,
        identity: FileIdentity,
    ) -> Result<()> {
        let export = self.export(export)?;
        match export.locate(path) {
            Ok(found) if found.identity() == identity => Ok(()),
            Ok(_) | Err(FileError::NotFound { .. }) => {
                Err(Error::FileChanged { path: export.path().join(path.as_path()) })
            }
            Err(error) => Err(error.into()),
        }
    }

    pub(super) async fn take_turn(&self, located: &Located) -> Result<Turn> {
        let identity = located.identity();
        let next = locked(&self.inodes).entry(identity).or_default().turn.clone();
        // Made first: it forgets the inode again, also if the wait is given up.
        let mut turn = Turn { engine: self.arc(), identity, held: None };
        let held = tokio::time::timeout(PATIENCE, next.lock_owned()).await;
        turn.held = Some(held.map_err(|_| still_draining(located.path()))?);
        Ok(turn)
    }

    /// The turn, if nobody has it and nobody waits for it.
    pub(super) fn turn_if_free(&self, identity: FileIdentity) -> Option<Turn> {
        let next = locked(&self.inodes).entry(identity).or_default().turn.clone();
        let mut turn = Turn { engine: self.arc(), identity, held: None };
        turn.held = next.try_lock_owned().ok();
        turn.held.is_some().then_some(turn)
    }

    /// Waits for a revocation that is under way, and returns the guarded file with the number of
    /// its pins, or `None` where the file is not guarded.
    pub(super) async fn settled(
        &self,
        located: &Located,
    ) -> Result<Option<(Arc<HeldFile>, usize)>> {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        loop {
            let Some((guard, standing)) = self.registry().standing(located.identity()) else {
                return Ok(None);
            };
            let Some(file) = self.file(guard) else { return Ok(None) };
            if let Standing::Held { pins, .. } = standing {
                return Ok(Some((file, pins)));
            }
            tokio::time::timeout_at(give_up, file.wait_released())
                .await
                .map_err(|_| still_draining(located.path()))?;
        }
    }

    /// Opens a file, by the description that it has already if an old mapping keeps one. Only to
    /// be called in the inode's turn, while it is not guarded: to open a file that we have guarded
    /// ourselves would break that guard and wait for ourselves.
    pub(super) fn open(&self, located: &Located) -> Result<Description> {
        let identity = located.identity();
        let known = locked(&self.inodes).get(&identity).and_then(|inode| inode.description.clone());
        if let Some(description) = known.and_then(|weak| weak.upgrade()) {
            if self.is_to_close(&description) {
                return Err(Refusal::Draining.into());
            }
            return Ok(description);
        }
        lift_leftover(located)?;
        let description = located.open()?;
        let mut inodes = locked(&self.inodes);
        inodes.entry(identity).or_default().description = Some(description.downgrade());
        Ok(description)
    }

    /// Remembers a file that is let go although stream writes are inside the kernel.
    pub(super) fn leave_behind(&self, file: &HeldFile) {
        let mut inodes = locked(&self.inodes);
        let inode = inodes.entry(file.description().identity()).or_default();
        inode.left_behind.push(Arc::clone(file.gate()));
    }

    /// A file is guarded, cut or lengthened anew only when no stream write of an earlier guarding can
    /// land in it any more.
    pub(super) fn demand_quiet(&self, located: &Located) -> Result<()> {
        let mut inodes = locked(&self.inodes);
        let Some(inode) = inodes.get_mut(&located.identity()) else { return Ok(()) };
        inode.left_behind.retain(|gate| !gate.is_empty_for_good());
        if inode.left_behind.is_empty() {
            return Ok(());
        }
        Err(Error::WrittenLate { path: located.path().to_owned() })
    }

    /// Whether somebody who was let through may still be on their way into the file.
    pub(super) fn just_let_through(&self, located: &Located) -> bool {
        locked(&self.passages).is_recent(located.identity(), Instant::now())
    }

    pub(super) fn file(&self, guard: GuardId) -> Option<Arc<HeldFile>> {
        locked(&self.files).get(&guard).cloned()
    }
}

/// A server that crashed has left its seal behind: no other one serves this export, and one that
/// holds the file open all the same is in the kernel's way.
fn lift_leftover(located: &Located) -> Result<()> {
    if !located.is_sealed() || !located.unseal()? {
        return Ok(());
    }
    let path = located.path().display();
    tracing::warn!(%path, "lifted the seal that a server left behind when it ended");
    Ok(())
}

pub(super) fn still_draining(path: &Path) -> Error {
    Error::StillDraining { path: path.to_owned(), waited: PATIENCE }
}
