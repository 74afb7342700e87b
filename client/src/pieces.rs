//! The stream path: pieces of a transfer over gRPC, a few at a time.
//!
//! Each piece runs in a task of its own, which counts as in flight on the pin until the server has
//! answered. So a caller that stops waiting stops no piece half-way, and the server hears `Drained`
//! only when none is running.

use std::collections::VecDeque;

use pinfold_proto::v1;
use tokio::task::JoinHandle;

use crate::control::Control;
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
        tokio::spawn(async move {
            let call = async |mut client: Client| client.write(request).await;
            let answer = control.call(|| doing, call).await;
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
        tokio::spawn(async move {
            let call = async |mut client: Client| client.read(request).await;
            let answer = control.call(|| doing.clone(), call).await;
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

/// Runs pieces in order of their start, a few at a time. Returns when all that were started have
/// ended; after the first error no more are started.
pub(crate) async fn run<T>(
    pieces: &[StreamPiece],
    mut start: impl FnMut(usize, &StreamPiece) -> Result<Running<T>, Error>,
    mut finish: impl FnMut(&StreamPiece, T),
) -> Result<(), Error> {
    let mut running: VecDeque<(&StreamPiece, Running<T>)> = VecDeque::new();
    let mut outcome = Ok(());
    let mut waiting = pieces.iter().enumerate();
    loop {
        while outcome.is_ok() && running.len() < WINDOW {
            let Some((index, piece)) = waiting.next() else { break };
            match start(index, piece) {
                Ok(task) => running.push_back((piece, task)),
                Err(error) => outcome = Err(error),
            }
        }
        let Some((piece, task)) = running.pop_front() else {
            return outcome;
        };
        match task.await {
            Ok(Ok(done)) => finish(piece, done),
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
