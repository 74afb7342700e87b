//! The stream path: pieces of a transfer over gRPC, a few at a time.
//!
//! Each piece runs in a task of its own, which counts as in flight on the pin until the server has
//! answered. So a caller that stops waiting stops no piece half-way, and the server hears `Drained`
//! only when none is running.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Instant;

use pinfold_proto::v1;
use tokio::task::JoinHandle;

use crate::control::Control;
use crate::pace::Pace;
use crate::pin_table::Ticket;
use crate::plan::StreamPiece;
use crate::{Error, Generation};

/// Pieces of one call that run at a time: enough to keep the connection busy while the server's
/// kernel copies.
const WINDOW: usize = 4;

/// Sends and fetches pieces of one pin.
#[derive(Debug)]
pub(crate) struct StreamPath<'a> {
    pub(crate) control: &'a Control,
    pub(crate) pin_id: u64,
    pub(crate) generation: Generation,
    pub(crate) file: String,
}

type Running<T> = JoinHandle<Result<T, Error>>;

impl StreamPath<'_> {
    /// Starts to write a piece.
    pub(crate) fn write(&self, piece: &StreamPiece, data: Vec<u8>, ticket: Ticket) -> Running<()> {
        let control = self.control.clone();
        let (len, offset) = (data.len(), piece.file_offset);
        let request = v1::WriteRequest {
            session_id: control.session_id.clone(),
            pin_id: self.pin_id,
            generation: Some(self.generation.into()),
            offset,
            data: data.into(),
        };
        let doing = format!("write {len} bytes at byte {offset} of {}", self.file);
        control.runtime.clone().spawn(async move {
            let (begun, call) =
                (Instant::now(), async |mut client: Client| client.write(request).await);
            let answer = control.call_for_bytes(|| doing, call).await;
            control.pace.learn(len, begun);
            drop(ticket);
            answer.map(drop)
        })
    }

    /// Starts to read a piece.
    pub(crate) fn read(&self, piece: &StreamPiece, ticket: Ticket) -> Running<Vec<u8>> {
        let control = self.control.clone();
        let (len, offset) = (piece.local.len(), piece.file_offset);
        let request = v1::ReadRequest {
            session_id: control.session_id.clone(),
            pin_id: self.pin_id,
            generation: Some(self.generation.into()),
            offset,
            // A piece is never longer than what the server names in 32 bits.
            length: len as u32,
        };
        let doing = format!("read {len} bytes at byte {offset} of {}", self.file);
        control.runtime.clone().spawn(async move {
            let (begun, call) =
                (Instant::now(), async |mut client: Client| client.read(request).await);
            let answer = control.call_for_bytes(|| doing.clone(), call).await;
            control.pace.learn(len, begun);
            drop(ticket);
            let data = answer?.data;
            if data.len() != len {
                return Err(Error::Protocol { doing, what: "another number of bytes" });
            }
            Ok(data)
        })
    }
}

type Client = v1::pinfold_client::PinfoldClient<tonic::transport::Channel>;

/// A part of a planned piece, which goes over the link by itself.
#[derive(Debug)]
pub(crate) struct Part {
    /// Of the planned piece.
    pub(crate) index: usize,
    /// Which of the planned piece's bytes.
    pub(crate) within: Range<usize>,
    pub(crate) piece: StreamPiece,
}

/// The planned pieces, cut as the pace wants it when their turn comes.
struct Parts<'a> {
    planned: &'a [StreamPiece],
    index: usize,
    cut: usize,
}

impl Parts<'_> {
    fn next(&mut self, longest: usize) -> Option<Part> {
        let planned = self.planned.get(self.index)?;
        let within = self.cut..planned.local.len().min(self.cut + longest.max(1));
        let start = planned.local.start;
        let piece = StreamPiece {
            local: start + within.start..start + within.end,
            file_offset: planned.file_offset + within.start as u64,
        };
        let part = Part { index: self.index, within, piece };
        self.cut = part.within.end;
        if self.cut == planned.local.len() {
            (self.index, self.cut) = (self.index + 1, 0);
        }
        Some(part)
    }
}

/// Runs pieces in order of their start, a few at a time. Returns when all that were started have
/// ended; after the first error no more are started.
pub(crate) async fn run<T>(
    pace: &Pace,
    planned: &[StreamPiece],
    mut start: impl FnMut(&Part) -> Result<Running<T>, Error>,
    mut finish: impl FnMut(&StreamPiece, T),
) -> Result<(), Error> {
    let mut running: VecDeque<(StreamPiece, Running<T>)> = VecDeque::new();
    let mut outcome = Ok(());
    let mut waiting = Parts { planned, index: 0, cut: 0 };
    loop {
        while outcome.is_ok() && running.len() < WINDOW {
            let Some(part) = waiting.next(pace.piece_bytes()) else { break };
            match start(&part) {
                Ok(task) => running.push_back((part.piece, task)),
                Err(error) => outcome = Err(error),
            }
        }
        let Some((piece, task)) = running.pop_front() else {
            return outcome;
        };
        match task.await {
            Ok(Ok(done)) => finish(&piece, done),
            Ok(Err(error)) => outcome = outcome.and(Err(error)),
            Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
            Err(_) => outcome = outcome.and(Err(runtime_gone())),
        }
    }
}

fn runtime_gone() -> Error {
    let doing = "transfer by the stream path".to_owned();
    Error::Protocol { doing, what: "nothing, as this program's runtime is shutting down" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_cut_without_a_gap() {
        let planned = [
            StreamPiece { local: 10..20, file_offset: 100 },
            StreamPiece { local: 30..34, file_offset: 500 },
        ];
        let mut parts = Parts { planned: &planned, index: 0, cut: 0 };
        let mut cut = Vec::new();
        while let Some(Part { index, within, piece }) = parts.next(4) {
            cut.push((index, within, piece.local, piece.file_offset));
        }
        let expected = [
            (0, 0..4, 10..14, 100),
            (0, 4..8, 14..18, 104),
            (0, 8..10, 18..20, 108),
            (1, 0..4, 30..34, 500),
        ];
        assert_eq!(cut, expected);
    }
}
