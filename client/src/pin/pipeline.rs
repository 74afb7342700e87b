//! Several transfers at a time from one task.

use std::collections::VecDeque;
use std::fmt;
use std::num::NonZeroUsize;
use std::ops::Range;

use super::Pin;
use super::at_once::AtOnce;
use crate::lane::Direction;
use crate::{Buffer, TransferError};

/// Transfers on one pin from one task, up to so many at a time: the task posts them and takes their
/// completions by itself, where a task for each would have to be woken for each. Their results come in the
/// order in which they were begun.
///
/// ```no_run
/// # use std::num::NonZeroUsize;
/// # async fn f(session: &pinfold_client::Session, pin: &pinfold_client::Pin)
/// # -> Result<(), pinfold_client::Error> {
/// const PAGE: usize = 4096;
/// let mut pipeline = pin.pipeline(NonZeroUsize::new(16).unwrap());
/// for page in 0..1000 {
///     let mut buffer = match pipeline.next_if_full().await {
///         Some(done) => done?.buffer,
///         None => session.buffer(PAGE).await?,
///     };
///     buffer.as_mut_slice().fill(page as u8);
///     pipeline.write(page * PAGE as u64, buffer, PAGE).await;
/// }
/// while let Some(done) = pipeline.next().await {
///     done?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// What goes by RDMA is posted at once. What a quirk or the lack of a device sends by the stream path, and
/// what must wait for room in the send queue, waits for the end of those before it, so transfers of the same
/// bytes keep their order.
///
/// Dropping it is giving up on those that are under way, as with [`Pin::write`].
pub struct Pipeline<'a> {
    pin: &'a Pin,
    window: usize,
    begun: VecDeque<Begun<'a>>,
    /// How many of them have not ended yet: the last so many.
    under_way: usize,
}

/// A transfer of a [`Pipeline`] that has ended well.
#[derive(Debug)]
pub struct Transferred {
    /// Where it was in the file.
    pub offset: u64,
    /// Bytes that were transferred: fewer than asked for, where a read met the end of the file.
    pub bytes: usize,
    /// Its buffer.
    pub buffer: Buffer,
}

type Ended = Result<Transferred, TransferError>;

enum Begun<'a> {
    UnderWay(AtOnce<'a>),
    Ended(Ended),
}

impl Pin {
    /// For up to so many transfers at a time from one task. More than fit in the send queue
    /// ([`ConnectOptions::send_window`](crate::ConnectOptions::send_window)) are of no use.
    pub fn pipeline(&self, window: NonZeroUsize) -> Pipeline<'_> {
        Pipeline { pin: self, window: window.get(), begun: VecDeque::new(), under_way: 0 }
    }
}

impl Pipeline<'_> {
    /// Begins a [write](Pin::write). Waits for the oldest if the window is full, and keeps its result.
    /// Whatever goes wrong with this one, its result tells.
    pub async fn write(&mut self, offset: u64, buffer: Buffer, len: usize) {
        self.begin(Direction::Write, offset, buffer, len).await;
    }

    /// Begins a [read](Pin::read); else as [`write`](Self::write).
    pub async fn read(&mut self, offset: u64, len: usize, buffer: Buffer) {
        self.begin(Direction::Read, offset, buffer, len).await;
    }

    /// Waits for the oldest transfer, and takes its result; `None` if all have been taken.
    ///
    /// Cancellation-safe: the result is returned or still there.
    ///
    /// # Errors
    ///
    /// Those of [`Pin::write`] and [`Pin::read`]. Transfers after one that failed may have ended well, or
    /// not: theirs tell.
    pub async fn next(&mut self) -> Option<Ended> {
        if self.begun.len() == self.under_way {
            self.end_oldest().await;
        }
        self.begun.pop_front().map(Begun::result)
    }

    /// As [`next`](Self::next) if the window is full; else `None`: another transfer can begin without
    /// waiting for one.
    ///
    /// # Errors
    ///
    /// As [`next`](Self::next).
    pub async fn next_if_full(&mut self) -> Option<Ended> {
        if self.begun.len() < self.window {
            return None;
        }
        self.next().await
    }

    /// Transfers whose results have not been taken.
    pub fn len(&self) -> usize {
        self.begun.len()
    }

    /// Whether every result has been taken.
    pub fn is_empty(&self) -> bool {
        self.begun.is_empty()
    }
}

impl<'a> Pipeline<'a> {
    async fn begin(&mut self, direction: Direction, offset: u64, buffer: Buffer, len: usize) {
        while self.under_way >= self.window {
            self.end_oldest().await;
        }
        let pin = self.pin;
        match pin.at_once(direction.into(), offset, len, buffer) {
            Ok(transfer) => {
                self.under_way += 1;
                self.begun.push_back(Begun::UnderWay(transfer));
            }
            Err(buffer) => {
                while self.under_way > 0 {
                    self.end_oldest().await;
                }
                let ended = alone(pin, direction, offset, buffer, len).await;
                self.begun.push_back(Begun::Ended(ended));
            }
        }
    }

    async fn end_oldest(&mut self) {
        let at = self.begun.len() - self.under_way;
        let Some(begun) = self.begun.get_mut(at) else { return };
        if let Begun::UnderWay(transfer) = begun {
            transfer.wait().await;
        }
        self.under_way -= 1;
    }
}

impl Begun<'_> {
    fn result(self) -> Ended {
        match self {
            Self::UnderWay(mut transfer) => {
                let Range { start, end } = transfer.range();
                // As long as a buffer.
                let bytes = (end - start) as usize;
                transfer.result().map(|buffer| Transferred { offset: start, bytes, buffer })
            }
            Self::Ended(ended) => ended,
        }
    }
}

async fn alone(pin: &Pin, direction: Direction, offset: u64, buffer: Buffer, len: usize) -> Ended {
    let (buffer, bytes) = match direction {
        Direction::Write => {
            let (buffer, report) = pin.write(offset, buffer, len).await?;
            (buffer, report.rdma_bytes + report.stream_bytes)
        }
        Direction::Read => {
            let (buffer, report) = pin.read(offset, len, buffer).await?;
            (buffer, report.rdma_bytes + report.stream_bytes)
        }
    };
    // No more than was asked for.
    Ok(Transferred { offset, bytes: bytes as usize, buffer })
}

impl fmt::Debug for Pipeline<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline")
            .field("window", &self.window)
            .field("begun", &self.begun.len())
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}
