//! One file system with exports on it: the threads for its calls and its ends, which no other file system
//! waits for.

use std::time::Duration;

use crate::ends::{self, Ends};
use crate::error::{Error, Result};
use crate::fence::Order;
use crate::ladder::{self, Regions};
use crate::pool::{NotDone, Pool};

/// Control calls that may be inside the file system at a time.
const CALLS_AT_A_TIME: usize = 32;
/// Pieces of the stream path that may be, so that pins and commits need not wait behind those.
const PIECES_AT_A_TIME: usize = 32;
/// When all places are taken and no call has begun or ended for so long, the file system is taken to be
/// frozen, and calls are refused.
const STANDS_STILL_AFTER: Duration = Duration::from_secs(2);
/// How long a call may take that does not depend on the size of anything.
const CALL_AT_MOST: Duration = Duration::from_secs(60);
/// No storage that is worth waiting for is slower.
const SLOWEST_BYTES_PER_SECOND: u64 = 4 << 20;

/// Threads of one file system.
pub(crate) const THREADS: usize =
    CALLS_AT_A_TIME + PIECES_AT_A_TIME + ends::FILES_AT_A_TIME + ladder::THREADS;

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct FileSystem {
    /// Its exports, for messages.
    exports: String,
    calls: Pool,
    pieces: Pool,
    ends: Ends,
    regions: Regions,
}

impl FileSystem {
    /// Starts the threads.
    pub(crate) fn start(exports: String, fences: &std::sync::mpsc::Sender<Order>) -> Result<Self> {
        Ok(Self {
            exports,
            calls: Pool::start("pinfold-call", CALLS_AT_A_TIME, STANDS_STILL_AFTER)?,
            pieces: Pool::start("pinfold-piece", PIECES_AT_A_TIME, STANDS_STILL_AFTER)?,
            ends: Ends::start()?,
            regions: Regions::start(fences)?,
        })
    }

    /// Does a control call's work that may touch so many bytes.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        bytes: u64,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.named(self.calls.run(call_at_most(bytes), work).await)
    }

    /// A long call has finished a piece, so its file system does not stand still.
    pub(crate) fn note_progress(&self) {
        self.calls.note_progress();
    }

    /// Moves a piece of the stream path.
    pub(crate) async fn piece<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.named(self.pieces.run(CALL_AT_MOST, work).await)
    }

    /// Where the ends of pins on its files are done.
    pub(crate) fn ends(&self) -> &Ends {
        &self.ends
    }

    /// The threads that deregister the regions of its files.
    pub(crate) fn regions(&self) -> &Regions {
        &self.regions
    }

    fn named<T>(&self, done: std::result::Result<Result<T>, NotDone>) -> Result<T> {
        match done {
            Ok(done) => done,
            Err(NotDone::Panicked) => Err(Error::Task),
            Err(why) => Err(Error::ExportStalled { exports: self.exports.clone(), why }),
        }
    }
}

fn call_at_most(bytes: u64) -> Duration {
    CALL_AT_MOST + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND)
}
