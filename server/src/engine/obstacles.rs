//! What stands in the way of a pin, and whether it is worth waiting for.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pinfold_leases::{CloseWatch, Description, Error as FileError, Located, Opener};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::{Engine, PATIENCE, PINS_WAITING_AT_A_TIME, locked};
use crate::error::{Error, Result};
use crate::registry::Refusal;

/// How soon a pin is tried again when what stands in its way will pass.
pub(super) const TRY_AGAIN: Duration = Duration::from_millis(20);
/// How often a file is tried again that somebody has open whom /proc doesn't show, if nobody was let
/// through just now: they may have closed it before we looked.
const UNSEEN_TRIES: u32 = 3;
/// The kernel tells of a close a moment before it counts the description as gone: so after each one
/// there are several tries, at growing distances.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// How often a waiting pin looks without being told of a close: for what nobody tells, such as the
/// lease of another process, and the end of its own session.
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Who or what is in the way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Obstacle {
    /// A revocation, or what is left of our own last guarding: it passes.
    Ours,
    /// Somebody whom /proc doesn't show: a truncate(2) that was let through, or another user's
    /// process.
    Unseen,
    /// Another process has the file open.
    Others,
    /// Nobody, for a while: somebody who did not wait may come back.
    LeftAlone,
    /// The export is quiesced.
    Quiet,
    /// It won't pass by itself.
    Lasting,
}

fn obstacle(error: &Error, me: u32) -> Obstacle {
    let ours = |openers: &[Opener]| openers.iter().all(|opener| opener.pid == me);
    match error {
        Error::Refused(Refusal::Draining) | Error::WrittenLate { .. } => Obstacle::Ours,
        Error::File(FileError::Broken | FileError::AlreadyFenced) => Obstacle::Ours,
        Error::File(FileError::Busy { openers, .. }) if openers.is_empty() => Obstacle::Unseen,
        // Our own descriptor, which is being closed.
        Error::File(FileError::Busy { openers, .. }) if ours(openers) => Obstacle::Ours,
        Error::File(FileError::Busy { .. }) => Obstacle::Others,
        Error::LeftAlone { .. } => Obstacle::LeftAlone,
        Error::Quiesced { .. } => Obstacle::Quiet,
        _ => Obstacle::Lasting,
    }
}

/// Counts what one call has met.
#[derive(Debug)]
pub(super) struct Obstacles {
    give_up: Instant,
    unseen: u32,
}

impl Default for Obstacles {
    fn default() -> Self {
        Self { give_up: Instant::now() + PATIENCE, unseen: 0 }
    }
}

impl Obstacles {
    /// Whether what stands in the way will be gone in a moment, so that the call tries again.
    /// `just_let_through` is whether somebody was let into the file just now.
    pub(super) fn pass(&mut self, error: &Error, just_let_through: impl FnOnce() -> bool) -> bool {
        if Instant::now() >= self.give_up {
            return false;
        }
        match obstacle(error, std::process::id()) {
            Obstacle::Ours | Obstacle::LeftAlone => true,
            Obstacle::Unseen => {
                self.unseen += 1;
                self.unseen <= UNSEEN_TRIES || just_let_through()
            }
            Obstacle::Others | Obstacle::Quiet | Obstacle::Lasting => false,
        }
    }
}

/// How long one pin waits for others to close its file, or for its export to be resumed, if its client
/// wants that.
#[derive(Debug)]
pub(super) struct FileWait {
    until: Option<Instant>,
    /// Kept open meanwhile, so that our own closes tell nobody of us. All who wait share it.
    kept_open: KeptOpen,
    begun: Option<Begun>,
}

/// What a try to guard a file leaves for the next one.
pub(super) type KeptOpen = Arc<Mutex<Option<Description>>>;

#[derive(Debug)]
struct Begun {
    _place: OwnedSemaphorePermit,
    /// None: while the export is quiesced nothing of it is kept open.
    watched: Option<Watched>,
    pause: Duration,
}

#[derive(Debug)]
struct Watched {
    located: Located,
    /// None: the kernel doesn't tell.
    closes: Option<AsyncFd<CloseWatch>>,
}

impl FileWait {
    /// For a client that wants to wait so long at most.
    pub(super) fn new(at_most: Duration) -> Self {
        let until = (!at_most.is_zero()).then(|| Instant::now() + at_most);
        Self { until, kept_open: KeptOpen::default(), begun: None }
    }

    /// Where to leave the file open; `None`: nobody waits.
    pub(super) fn kept_open(&self) -> Option<KeptOpen> {
        self.until.map(|_| Arc::clone(&self.kept_open))
    }

    /// Whether it is worth waiting for this to pass.
    pub(super) fn is_worth(&self, error: &Error) -> bool {
        let waits = match obstacle(error, std::process::id()) {
            Obstacle::Unseen | Obstacle::Others | Obstacle::Quiet | Obstacle::LeftAlone => true,
            Obstacle::Ours | Obstacle::Lasting => false,
        };
        waits && self.until.is_some_and(|until| Instant::now() < until)
    }

    /// Waits until another try may succeed. The first time it returns at once, with a watch set up:
    /// so no close falls between a try and the wait.
    pub(super) async fn pause(&mut self, engine: &Engine, located: Located) -> Result<()> {
        let Some(until) = self.until else { return Ok(()) };
        let begun = self.begun(engine)?;
        let Some(watched) = &begun.watched else {
            begun.watched = Some(Watched::new(located));
            return Ok(());
        };
        // It is there already.
        drop(located);
        let pause = begun.pause.min(until.saturating_duration_since(Instant::now()));
        begun.pause = match tokio::time::timeout(pause, watched.closed()).await {
            Ok(()) => SHORTEST_PAUSE,
            Err(_) => (begun.pause * 2).min(LONGEST_PAUSE),
        };
        Ok(())
    }

    /// Closes the file, and waits for a moment: its export is quiesced.
    pub(super) async fn pause_outside(&mut self, engine: &Engine) -> Result<()> {
        let Some(until) = self.until else { return Ok(()) };
        self.close(engine);
        self.begun(engine)?;
        let left = until.saturating_duration_since(Instant::now());
        tokio::time::sleep(left.min(LONGEST_PAUSE)).await;
        Ok(())
    }

    fn begun(&mut self, engine: &Engine) -> Result<&mut Begun> {
        let begun = match self.begun.take() {
            Some(begun) => begun,
            None => Begun::new(engine)?,
        };
        Ok(self.begun.insert(begun))
    }

    fn close(&mut self, engine: &Engine) {
        let kept_open = locked(&self.kept_open).take();
        drop(kept_open);
        let watched = self.begun.as_mut().and_then(|begun| begun.watched.take());
        if let Some(Watched { located, .. }) = watched {
            engine.prune(located.identity());
        }
    }

    /// Closes the file and gives the place up.
    pub(super) fn end(mut self, engine: &Engine) {
        self.close(engine);
    }
}

impl Begun {
    fn new(engine: &Engine) -> Result<Self> {
        let place = Arc::clone(&engine.waiting_pins).try_acquire_owned().map_err(|_| {
            let what = "the number of pins that wait for a file to be closed";
            Refusal::Quota { what, limit: PINS_WAITING_AT_A_TIME as u64 }
        })?;
        Ok(Self { _place: place, watched: None, pause: LONGEST_PAUSE })
    }
}

impl Watched {
    fn new(located: Located) -> Self {
        #[allow(
            deprecated,
            reason = "a CloseWatch owns its descriptor from its making to its drop"
        )]
        let register = |watch| AsyncFd::with_interest(watch, Interest::READABLE).ok();
        let closes = located.watch_closes().and_then(register);
        Self { located, closes }
    }

    async fn closed(&self) {
        let Some(closes) = &self.closes else { return std::future::pending().await };
        match closes.readable().await {
            Ok(mut ready) => {
                closes.get_ref().drain();
                ready.clear_ready();
            }
            Err(_) => std::future::pending().await,
        }
    }
}

/// Leaves a description for the next try.
pub(super) fn keep_open(slot: Option<&KeptOpen>, description: &Description) {
    if let Some(slot) = slot {
        *locked(slot) = Some(description.clone());
    }
}

#[cfg(test)]
mod tests {
    use pinfold_leases::OpenMode;

    use super::*;

    fn busy(pids: &[u32]) -> Error {
        let opener =
            |pid| Opener { pid, command: "x".to_owned(), fd: None, mode: OpenMode::Unknown };
        let openers = pids.iter().copied().map(opener).collect();
        FileError::Busy { path: "/x".into(), openers }.into()
    }

    fn quiesced() -> Error {
        Error::Quiesced { name: "x".to_owned(), since: Duration::ZERO, by: "y".to_owned() }
    }

    #[test]
    fn only_what_is_ours_passes_by_itself() {
        for (error, expected) in [
            (busy(&[7, 7]), Obstacle::Ours),
            (busy(&[7, 8]), Obstacle::Others),
            (busy(&[8]), Obstacle::Others),
            (busy(&[]), Obstacle::Unseen),
            (Refusal::Draining.into(), Obstacle::Ours),
            (quiesced(), Obstacle::Quiet),
            (Refusal::UnknownSession.into(), Obstacle::Lasting),
        ] {
            assert_eq!(obstacle(&error, 7), expected, "{error}");
        }
    }

    #[test]
    fn somebody_unseen_is_waited_for_only_where_they_were_let_through() {
        let mut obstacles = Obstacles::default();
        for _ in 0..UNSEEN_TRIES {
            assert!(obstacles.pass(&busy(&[]), || false), "they may be gone by now");
        }
        assert!(!obstacles.pass(&busy(&[]), || false));
        assert!(obstacles.pass(&busy(&[]), || true), "a truncate on its way");
        let other = std::process::id() + 1;
        assert!(!obstacles.pass(&busy(&[other]), || true), "at once");
    }

    #[tokio::test]
    async fn who_does_not_want_to_wait_does_not() {
        assert!(!FileWait::new(Duration::ZERO).is_worth(&busy(&[1])));
        let wait = FileWait::new(Duration::from_secs(60));
        assert!(wait.is_worth(&busy(&[1])) && wait.is_worth(&busy(&[])));
        assert!(wait.is_worth(&quiesced()), "it will be resumed");
        assert!(!wait.is_worth(&Refusal::UnknownSession.into()));
    }
}
