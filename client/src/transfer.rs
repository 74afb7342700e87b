//! One transfer on a pin, and what is left of a write that nobody waits for any more.
//!
//! Who drops the future of a write stops nothing: the pieces that are on their way land when they
//! land, perhaps after a later write to the same bytes that took another way. So the pin remembers
//! such writes until they have ended, and a later transfer of the same bytes waits for them.

use std::ops::Range;
use std::sync::Arc;

use tokio::sync::watch;

use crate::lane::Direction;
use crate::pin_state::Gone;
use crate::pin_table::{PinCell, Ticket};

/// A transfer from its begin to the end of its last operation.
#[derive(Debug)]
pub(crate) struct Transfer {
    cell: Arc<PinCell>,
    pub(crate) direction: Direction,
    /// The bytes of the file.
    pub(crate) range: Range<u64>,
    /// Each operation holds a copy; when all are dropped it has ended.
    running: watch::Sender<()>,
    ended: bool,
}

/// A write that nobody waits for.
#[derive(Clone, Debug)]
pub(crate) struct Abandoned {
    range: Range<u64>,
    /// Closed when it has ended.
    running: watch::Receiver<()>,
}

impl Transfer {
    pub(crate) fn new(cell: &Arc<PinCell>, direction: Direction, range: Range<u64>) -> Self {
        Self { cell: cell.clone(), direction, range, running: watch::Sender::new(()), ended: false }
    }

    /// Counts an operation in.
    pub(crate) fn begin(&self) -> Result<Ticket, Gone> {
        self.cell.begin(self.running.clone())
    }

    /// Every operation has ended.
    pub(crate) fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        if self.ended || self.direction == Direction::Read {
            return;
        }
        let (range, running) = (self.range.clone(), self.running.subscribe());
        self.cell.abandon(Abandoned { range, running });
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
