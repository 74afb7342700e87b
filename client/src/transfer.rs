//! One transfer on a pin, and what is left of a write that nobody waits for any more.
//!
//! Who drops the future of a write stops nothing: the pieces that are on their way land when they
//! land, perhaps after a later write to the same bytes that took another way. So the pin remembers
//! such writes until they have ended, and a later transfer of the same bytes waits for them.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use tokio::sync::watch;

use crate::lane::Direction;
use crate::pin_state::Gone;
use crate::pin_table::{PinCell, Ticket};

/// A transfer from its begin to the end of its last operation.
#[derive(Debug)]
pub(crate) struct Transfer<'a> {
    cell: &'a Arc<PinCell>,
    pub(crate) direction: Direction,
    /// The bytes of the file.
    pub(crate) range: Range<u64>,
    running: Arc<Running>,
    ended: bool,
}

/// Each operation of a transfer holds it; when all have dropped it, the transfer has ended.
#[derive(Debug, Default)]
pub(crate) struct Running {
    /// Made when the transfer is abandoned, for those who wait for its end.
    end: OnceLock<watch::Sender<()>>,
}

/// A write that nobody waits for.
#[derive(Clone, Debug)]
pub(crate) struct Abandoned {
    range: Range<u64>,
    /// Closed when it has ended.
    running: watch::Receiver<()>,
}

impl<'a> Transfer<'a> {
    pub(crate) fn new(cell: &'a Arc<PinCell>, direction: Direction, range: Range<u64>) -> Self {
        Self { cell, direction, range, running: Arc::default(), ended: false }
    }

    /// Counts an operation in.
    pub(crate) fn begin(&self) -> Result<Ticket, Gone> {
        self.cell.begin(Some(self.running.clone()))
    }

    /// Every operation has ended.
    pub(crate) fn end(&mut self) {
        self.ended = true;
    }
}

impl Drop for Transfer<'_> {
    fn drop(&mut self) {
        if self.ended || self.direction == Direction::Read {
            return;
        }
        let running = self.running.end.get_or_init(|| watch::Sender::new(())).subscribe();
        self.cell.abandon(Abandoned { range: self.range.clone(), running });
    }
}

impl Abandoned {
    pub(crate) fn has_ended(&self) -> bool {
        self.running.has_changed().is_err()
    }

    pub(crate) fn overlaps(&self, range: &Range<u64>) -> bool {
        self.range.start < range.end && range.start < self.range.end
    }

    pub(crate) async fn end(mut self) {
        while self.running.changed().await.is_ok() {}
    }
}
