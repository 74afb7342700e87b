//! How pins and sessions end: orders only, carried out by threads that were started before. Nothing here
//! waits, so it can be done on the runtime, in a destructor, or while a file system is frozen.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use pinfold_leases::GuardId;
use tokio::sync::{mpsc, oneshot};

use super::obstacles::TRY_AGAIN;
use super::{Engine, Leaving, SessionParts, Severance, UNPIN_AT_MOST, locked};
use crate::error::Result;
use crate::held::HeldFile;
use crate::ids::{PinId, SessionId};
use crate::registry::Action;

/// A pin that has been given back.
#[derive(Debug)]
pub(super) struct Unpinned {
    /// Its file, if it is let go with this pin or is being fenced: the fence kills the keys that its threads
    /// took out of this call's hands.
    pub(super) fenced: Option<Arc<HeldFile>>,
    /// Told, or closed, when its keys are dead. `None`: they were already.
    pub(super) done: Option<oneshot::Receiver<()>>,
    /// The guarding that it was of, if it had keys.
    pub(super) guard: Option<GuardId>,
}

impl Engine {
    /// Waits until a session that is over has no key left, for an unpin that was overtaken by its end.
    pub(super) async fn until_ended(&self, id: SessionId) {
        let give_up = tokio::time::Instant::now() + UNPIN_AT_MOST;
        let ends = || locked(&self.ended).get(&id).is_some_and(|parts| parts.strong_count() > 0);
        while ends() && tokio::time::Instant::now() < give_up {
            tokio::time::sleep(TRY_AGAIN).await;
        }
    }

    /// Ends a session: fences are ordered, then its queue pairs are stopped, and its pins end side by side.
    pub(crate) fn end_session(&self, id: SessionId) {
        let parts = self.parts(id);
        if let Some(parts) = &parts {
            let mut ended = locked(&self.ended);
            ended.retain(|_, parts| parts.strong_count() > 0);
            ended.insert(id, Arc::downgrade(parts));
        }
        let actions = self.registry().end_session(id, Instant::now());
        for action in actions {
            match action {
                Action::DropRegions { guard, pin, .. } => {
                    let parts = parts.clone();
                    self.drop_when_out(guard, pin, Leaving { parts, done: None });
                }
                action => self.perform_one(action),
            }
        }
    }

    /// Destroys a session's queue pairs; the session lives on.
    pub(crate) fn cut_off(&self, id: SessionId) {
        if let Some(parts) = self.parts(id) {
            self.sever(parts, None);
        }
    }

    /// Orders the end of a session's queue pairs.
    pub(super) fn sever(&self, parts: Arc<SessionParts>, done: Option<mpsc::Sender<Infallible>>) {
        let queue_pairs = parts.sever();
        // The threads end only with the engine.
        let _ = self.severances.send(Severance { queue_pairs, _parts: parts, _done: done });
    }

    /// Begins to give a pin back. From here on it ends whether or not anybody waits.
    pub(super) fn begin_unpin(&self, id: SessionId, pin: PinId) -> Result<Unpinned> {
        let actions = self.registry().unpin(id, pin, Instant::now())?;
        let (mut last_of, mut of, mut done) = (None, None, None);
        for action in actions {
            match action {
                Action::FenceNow { guard, .. } => last_of = self.file(guard),
                Action::DropRegions { guard, pin, session } => {
                    of = self.file(guard);
                    let (told, telling) = oneshot::channel();
                    done = Some(telling);
                    let leaving = Leaving { parts: self.parts(session), done: Some(told) };
                    self.drop_when_out(guard, pin, leaving);
                    continue;
                }
                _ => {}
            }
            self.perform_one(action);
        }
        let guard = of.as_ref().map(|file| file.id());
        let being_fenced = of.filter(|file| self.registry().is_fencing(file.id()));
        Ok(Unpinned { fenced: last_of.or(being_fenced), done, guard })
    }

    /// Orders a pin's regions deregistered as soon as none of its stream transfers is inside the kernel. One
    /// that hangs there holds no thread but its own.
    pub(super) fn drop_when_out(&self, guard: GuardId, pin: PinId, leaving: Leaving) {
        let Some(file) = self.file(guard) else { return };
        locked(&self.leaving).insert((guard, pin), leaving);
        self.drop_if_out(&file, pin);
    }

    /// To be called when a stream transfer has ended, too.
    pub(super) fn drop_if_out(&self, file: &Arc<HeldFile>, pin: PinId) {
        if file.gate().is_inside(pin) {
            return;
        }
        let leaving = locked(&self.leaving).remove(&(file.id(), pin));
        let Some(leaving) = leaving else { return };
        let (engine, of) = (self.arc(), Arc::clone(file));
        file.file_system().ends().order(file.id(), move || {
            engine.drop_regions(&of, pin, leaving.parts.as_deref());
            let identity = of.description().identity();
            // This may have been the last to keep the file open.
            drop(of);
            engine.prune(identity);
            if let Some(done) = leaving.done {
                // Nobody waits: no error.
                let _ = done.send(());
            }
        });
    }

    /// Deregisters a pin's regions now, where that may block.
    pub(super) fn drop_regions(&self, file: &HeldFile, pin: PinId, parts: Option<&SessionParts>) {
        let failed = file.drop_segments(pin);
        self.registry().left(file.id(), pin);
        if failed > 0 {
            // A key lives on. Only through the queue pairs of its own session, which share its
            // protection domain, could it be used; so those go.
            if let Some(parts) = parts {
                parts.disconnect();
            }
        }
    }
}
