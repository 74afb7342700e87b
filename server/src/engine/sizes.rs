//! Creating files and changing their size: under a guard from first to last, in pieces, with progress.
//!
//! The server changes no file that it does not guard. An unpinned file gets a lease for the change: under a
//! lease the holder may change the size, under a delegation that would break its own guard. A pinned file has
//! its guard already, and grows by fallocate(2) alone. Between two pieces the engine looks whether somebody
//! wants the file, and stops there.

use std::sync::Arc;

use pinfold_leases::{
    Armed, Create, Description, Error as FileError, FileIdentity, GuardTier, Located, Progress,
    RelativePath, Resized, Under,
};
use tokio::sync::watch;

use super::Engine;
use super::obstacles::{Obstacles, TRY_AGAIN};
use crate::error::{Error, Result, Stop};
use crate::held::HeldFile;
use crate::ids::{PinId, SessionId};
use crate::passage::Waiting;
use crate::registry::{Reason, Refusal};

/// Permission bits of the files that clients create, before the umask.
const FILE_MODE: u32 = 0o644;
/// Stands in a gate for work of the server's own; no pin has it.
const NO_PIN: PinId = PinId(0);

/// The call for which a file is created or changed. It is shown the progress, and once it has gone the work
/// stops.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    session: SessionId,
    progress: watch::Sender<Progress>,
}

impl Caller {
    /// The caller, and its end: dropping the receiver stops the work.
    pub(crate) fn new(session: SessionId) -> (Self, watch::Receiver<Progress>) {
        let (progress, shown) = watch::channel(Progress::default());
        (Self { session, progress }, shown)
    }
}

/// Looks between two pieces whether to go on.
struct Pace<'a> {
    engine: &'a Engine,
    export: &'a str,
    caller: &'a Caller,
    stop: Option<Stop>,
}

impl<'a> Pace<'a> {
    fn new(engine: &'a Engine, export: &'a str, caller: &'a Caller) -> Self {
        Self { engine, export, caller, stop: None }
    }

    fn goes_on(&mut self, progress: Progress) -> bool {
        self.caller.progress.send_replace(progress);
        self.engine.note_progress(self.export);
        self.stop = self.reason_to_stop();
        self.stop.is_none()
    }

    fn reason_to_stop(&self) -> Option<Stop> {
        if self.engine.registry().is_shutting_down() {
            return Some(Stop::ShuttingDown);
        }
        if self.engine.demand_session(self.caller.session).is_err() {
            return Some(Stop::SessionEnded);
        }
        if self.engine.export(self.export).is_err() {
            return Some(Stop::Quiesced);
        }
        self.caller.progress.is_closed().then_some(Stop::CallerGone)
    }

    /// Why it stopped; a guard stops by itself only for somebody who wants the file.
    fn stop(&self) -> Stop {
        self.stop.unwrap_or(Stop::Wanted)
    }
}

/// In which direction a file's size may change.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Resize {
    Exactly,
    Longer,
    Shorter,
}

impl Resize {
    /// Compares with the size that the file has once nobody else can change it.
    fn check(self, now: u64, wanted: u64) -> Result<()> {
        let why = match self {
            Self::Longer if wanted < now => {
                "a file grows to a size that is not below its own; shrink it instead"
            }
            Self::Shorter if wanted > now => {
                "a file shrinks to a size that is not above its own; grow it instead"
            }
            _ => return Ok(()),
        };
        Err(Error::BadRange { start: now, end: wanted, why })
    }
}

impl Engine {
    /// Creates a file of exactly `size` bytes, allocated, zeroed and durable; its name appears last.
    pub(crate) async fn create(
        &self,
        caller: Caller,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<FileIdentity> {
        let create = Create { size, mode: FILE_MODE, dax: self.policy(&export)?.dax };
        self.long_call(&export.clone(), size, move |engine| {
            let mut pace = Pace::new(engine, &export, &caller);
            let prepared = engine
                .export(&export)?
                .prepare(&path, &create, &mut |progress| pace.goes_on(progress));
            let unpublished = match prepared {
                Err(FileError::CreationStopped { path }) => {
                    return Err(Error::CreationStopped { path, why: pace.stop() });
                }
                prepared => prepared?,
            };
            let identity = unpublished.identity();
            // A pin by the new name waits until the description is closed here.
            let _turn = engine.turn_if_free(identity);
            drop(unpublished.publish()?);
            Ok(identity)
        })
        .await
    }

    /// Gives an existing file another size. Refused while it has pins.
    pub(crate) async fn resize(
        &self,
        caller: Caller,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<FileIdentity> {
        let located = self.locate(export.clone(), path.clone()).await?;
        let identity = located.identity();
        let turn = self.take_turn(&located).await?;
        self.demand_unpinned(&located).await?;
        self.long_call(&export.clone(), size, move |engine| {
            // A caller that goes away gives its turn up only when this is done.
            let _turn = turn;
            let pace = Pace::new(engine, &export, &caller);
            engine.resize_unpinned(pace, &path, &located, size, Resize::Exactly)?;
            Ok(identity)
        })
        .await
    }

    /// Makes a file longer, under its guard if it has one. Returns its end.
    pub(crate) async fn grow(
        &self,
        caller: Caller,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<u64> {
        self.export(&export)?.demand_directory()?;
        let located = self.locate(export.clone(), path.clone()).await?;
        let turn = self.take_turn(&located).await?;
        let held = self.settled(&located).await?;
        self.long_call(&export.clone(), size, move |engine| {
            let _turn = turn;
            let pace = Pace::new(engine, &export, &caller);
            match held {
                Some((file, _)) => engine.grow_pinned(pace, &file, size)?,
                None => engine.resize_unpinned(pace, &path, &located, size, Resize::Longer)?,
            }
            Ok(size)
        })
        .await
    }

    /// Makes a file shorter, after its pins have been revoked with notice. Returns how many.
    pub(crate) async fn shrink(
        &self,
        caller: Caller,
        export: String,
        path: RelativePath,
        size: u64,
    ) -> Result<usize> {
        self.export(&export)?.demand_directory()?;
        let located = self.locate(export.clone(), path.clone()).await?;
        Resize::Shorter.check(located.size(), size)?;
        let turn = self.take_turn(&located).await?;
        self.demand_still_named(&export, &path, &located).await?;
        let revoked = self.take_back(&located, Reason::Shrink).await?;
        self.call(&export.clone(), move |engine| {
            let _turn = turn;
            let pace = Pace::new(engine, &export, &caller);
            engine.resize_unpinned(pace, &path, &located, size, Resize::Shorter)?;
            Ok(revoked)
        })
        .await
    }

    /// Grows a file under the guard of its pins, inside its gate: not once it has been given away.
    fn grow_pinned(&self, mut pace: Pace<'_>, file: &HeldFile, size: u64) -> Result<()> {
        let inside = file.gate().enter(NO_PIN, true).ok_or(Refusal::Draining)?;
        let grown = (|| {
            if !self.registry().is_held(file.id()) {
                return Err(Refusal::Draining.into());
            }
            Resize::Longer.check(file.description().size()?, size)?;
            let under = Under { tier: file.tier(), lapsed: &|| file.lapsed() };
            let grown = self.flush(file, || {
                Ok(file.description().grow(size, under, &mut |progress| {
                    self.registry().is_held(file.id()) && pace.goes_on(progress)
                })?)
            });
            if let Err(Error::File(FileError::NoSpace { kept_bytes: 1.., .. })) = &grown {
                file.note_excess();
            }
            file.measure_pages();
            let grown = grown?.ok_or(Refusal::Draining)?;
            completed(grown, size, &pace, file.description())
        })();
        drop(inside);
        self.fence_if_awaited(file);
        grown
    }

    /// Only in the inode's turn, while it is not guarded.
    fn resize_unpinned(
        &self,
        mut pace: Pace<'_>,
        path: &RelativePath,
        located: &Located,
        size: u64,
        resize: Resize,
    ) -> Result<()> {
        let description = self.open(located)?;
        let armed = self.arm_to_resize(pace.export, located, &description)?;
        self.demand_named(pace.export, path, located.identity())?;
        let now = description.size()?;
        resize.check(now, size)?;
        let before = description.times().modified_ns;
        let mut goes_on = |progress| pace.goes_on(progress);
        let resized = match size < now {
            true => armed.shrink(size, &mut goes_on),
            false => armed.grow(size, &mut goes_on),
        };
        let after = description.times();
        if !armed.is_held() {
            // A process that was let in may have made the change: the life does not go on.
            self.begin_passage(&description, after.changed_ns, Waiting::Seen);
        } else if resize == Resize::Longer {
            self.lives.grown(located.identity(), before, after.modified_ns);
        }
        completed(resized?, size, &pace, &description)
    }

    /// A lease on a file that nobody else has open.
    fn arm_to_resize(
        &self,
        export: &str,
        located: &Located,
        description: &Description,
    ) -> Result<Armed> {
        let strongest = self.policy(export)?.strongest().min(GuardTier::Lease);
        // The last guarding of the file may still be on its way out on another thread, which passes.
        let mut obstacles = Obstacles::default();
        loop {
            let armed = self
                .demand_quiet(located)
                .and_then(|()| Ok(description.arm_at_most(&self.watcher, strongest)?));
            match armed {
                Err(error) if obstacles.pass(&error, || self.just_let_through(located)) => {
                    std::thread::sleep(TRY_AGAIN);
                }
                armed => return armed,
            }
        }
    }

    /// Frees what a growth without room has left past the end of a file, now that its guard is gone.
    pub(super) fn give_excess_back(&self, file: &Arc<HeldFile>) {
        if !file.has_excess() {
            return;
        }
        let description = file.description();
        let given_back = self
            .turn_if_free(description.identity())
            .map(|_turn| description.arm_at_most(&self.watcher, GuardTier::Lease)?.give_back());
        if !matches!(given_back, Some(Ok(()))) {
            let path = file.path().display();
            tracing::warn!(
                %path,
                "a growth that failed has left space allocated past the end; grow or shrink the file to free it"
            );
        }
    }
}

fn completed(resized: Resized, wanted: u64, pace: &Pace<'_>, file: &Description) -> Result<()> {
    if resized.complete {
        return Ok(());
    }
    let (path, reached, why) = (file.path().to_owned(), resized.size, pace.stop());
    Err(Error::ResizeStopped { path, reached, wanted, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_changes_only_in_the_direction_that_was_asked_for() {
        assert!(Resize::Longer.check(10, 9).is_err());
        assert!(Resize::Shorter.check(10, 11).is_err());
        for resize in [Resize::Longer, Resize::Shorter, Resize::Exactly] {
            assert!(resize.check(10, 10).is_ok());
        }
        assert!(Resize::Longer.check(10, 11).is_ok() && Resize::Shorter.check(10, 9).is_ok());
    }
}
