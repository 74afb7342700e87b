//! Commits, and the end of a guarding whose file could not be written back.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_leases::{Error as FileError, MappingKind};

use super::Engine;
use super::pins::committed_range;
use crate::error::{Error, Result};
use crate::flushes::Flushed;
use crate::held::HeldFile;
use crate::ids::{Generation, PinId, SessionId};
use crate::registry::{PinView, Refusal};

impl Engine {
    /// Makes what landed in a range durable: only if the flush returned before the release, and none of
    /// the file has failed.
    pub(crate) async fn commit(
        &self,
        id: SessionId,
        pin: PinId,
        generation: Generation,
        range: Option<Range<u64>>,
    ) -> Result<Duration> {
        let (view, file) = self.begin_commit(id, pin, generation)?;
        let (engine, file_system) = (self.arc(), Arc::clone(file.file_system()));
        let bytes = view.range.end - view.range.start;
        drop(file);
        file_system.call(bytes, move || engine.commit_at_once(id, pin, generation, range)).await
    }

    /// The pin as it is now, and its file.
    fn begin_commit(
        &self,
        id: SessionId,
        pin: PinId,
        generation: Generation,
    ) -> Result<(PinView, Arc<HeldFile>)> {
        let view = self.registry().begin_commit(id, pin, generation)?;
        let stale = Refusal::Stale { pin, asked: generation };
        let file = self.file(view.guard).ok_or(stale)?;
        Ok((view, file))
    }

    fn commit_at_once(
        &self,
        id: SessionId,
        pin: PinId,
        generation: Generation,
        range: Option<Range<u64>>,
    ) -> Result<Duration> {
        let (view, file) = self.begin_commit(id, pin, generation)?;
        let range = committed_range(range, &view.range, file.description().size()?)?;
        let kind = file.kind();
        if !kind.can_be_durable() {
            return Err(Error::NotDurable { path: file.path().to_owned(), kind });
        }
        let stale = Refusal::Stale { pin, asked: generation };
        let flusher = file.mapping().ok_or(stale)?.share_for_flush();
        let start = Instant::now();
        let flushed = self.flush(&file, || Ok(flusher.make_durable(range)?))?;
        flushed.ok_or(Refusal::WriteBackFailed { pin })?;
        let took = start.elapsed();
        self.demand_not_let_go(&file, pin, generation)?;
        self.demand_its_name(&file, pin)?;
        Ok(took)
    }

    /// Runs what flushes a guarded file, as a commit and a change of its size do. `None`: it met no error,
    /// but another flush of the file has.
    pub(super) fn flush<T>(
        &self,
        file: &HeldFile,
        flush: impl FnOnce() -> Result<T>,
    ) -> Result<Option<T>> {
        // fs-DAX keeps a page dirty that it could not write back.
        let once = file.kind() == MappingKind::PageCache;
        match file.flushes().run(once, flush, is_of_write_back) {
            Flushed::Good(done) => Ok(Some(done)),
            Flushed::Spoilt => Ok(None),
            Flushed::Failed(error) => {
                if is_of_write_back(&error) {
                    self.end_unwritten(file, &error);
                }
                Err(error)
            }
        }
    }

    /// Takes a file back that could not be written back.
    fn end_unwritten(&self, file: &HeldFile, error: &Error) {
        let error = pinfold_verbs::with_causes(error);
        tracing::error!(path = %file.path().display(), error, "write-back failed: revoking all pins");
        let budget = self.break_budget();
        let actions = self.registry().write_back_failed(file.id(), Instant::now(), budget);
        self.close_if_going(file);
        self.perform(actions);
    }
}

fn is_of_write_back(error: &Error) -> bool {
    matches!(error, Error::File(FileError::WriteBack { .. }))
}
