//! The client side of Pinfold: pin a range of a file on a storage host, and write and read it with
//! one-sided RDMA, without the host's processor, until its file system wants it back. Without an
//! RDMA device the same calls go over gRPC.
//!
//! ```no_run
//! use pinfold_client::{ConnectOptions, IfExists, PinRequest, Session};
//!
//! # async fn example() -> Result<(), pinfold_client::Error> {
//! let session = Session::connect(ConnectOptions::new("http://storage:7350")).await?;
//! session.create("data", "log", 1 << 20, IfExists::Fail).await?;
//! let pin = session.pin(PinRequest::read_write("data", "log")).await?;
//!
//! let mut buffer = session.buffer(4096).await?;
//! buffer.as_mut_slice().fill(7);
//! let (buffer, _) = pin.write(8192, buffer, 4096).await?;
//! pin.commit().await?; // survives power loss from here on
//!
//! let (buffer, report) = pin.read(8192, 4096, buffer).await?;
//! assert_eq!((buffer.as_slice()[0], report.rdma_bytes + report.stream_bytes), (7, 4096));
//! pin.unpin().await?;
//! session.close().await;
//! # Ok(())
//! # }
//! ```
//!
//! * **A pin can be taken back at any time**, when a process on the storage host wants the file. The
//!   session lets what is in flight end, lets nothing new begin, and says so to the server; then
//!   every call on the pin returns [`Error::Revoked`]. [`Session::events`] tells as it happens. What
//!   a [`commit`](Pin::commit) or [`flush`](Pin::flush) acknowledged before is durable; the rest is to be written again.
//! * **A transfer owns its buffer**, and gives it back with its result. A future can be dropped at
//!   any time: the buffer stays with the device until the device is done with it.
//! * **Every offset and length works, on any device**: what the device can't do or would misplace (a
//!   quirk) goes by the stream path, which is gRPC through the server's processor. So do all bytes
//!   of a session without RDMA; [`Session::no_rdma_because`] and [`Grant::no_rdma_because`] say why,
//!   and each transfer reports which way its bytes went.
//! * **Who wants the pin again gets it from [`KeptSession`] and [`KeptPin`]**: after a revocation or a
//!   lost session they connect and pin again, with backoff, the same file only, and report which bytes
//!   were committed, which were acknowledged, and of which nothing is known ([`WriteFate`]). Nothing
//!   goes through before that [`Interruption`] is taken. A plain pin has the same account if asked:
//!   [`PinRequest::track_writes`].
//! * **A queue pair that breaks is replaced** by the next call; other pins go on.
#![forbid(unsafe_code)]

mod allocate;
mod backoff;
pub mod blocking;
mod book;
mod buffer;
mod control;
mod error;
mod event;
mod fabric;
mod file;
mod grant;
mod inspection;
mod keep;
mod kept_state;
mod lane;
mod ledger;
mod options;
mod pace;
mod patience;
mod pieces;
mod pin;
mod pin_state;
mod pin_table;
mod plan;
#[cfg(test)]
mod random;
mod retry;
mod revocation;
mod session;
mod stream;
mod transfer;

pub use allocate::AllocationProgress;
pub use backoff::KeepPolicy;
pub use buffer::{Buffer, BufferPool};
pub use error::{Error, TransferError};
pub use event::{Event, Events};
pub use file::{Created, Entry, EntryKind, FileIdentity, FileStat, IfExists};
pub use grant::{
    Access, Durability, Generation, Grant, GuardTier, Life, Quirks, Segment, Transport,
};
pub use inspection::{
    Breaker, BrokenFile, ExportInfo, FileInfo, FileState, Inspection, NameState, PinInfo, Quiesced,
    Quieted, Records, RevocationRecord, SessionInfo,
};
pub use keep::{KeptPin, KeptSession};
pub use kept_state::{FileChange, Interruption, InterruptionCause};
pub use ledger::WriteFate;
pub use options::{ConnectOptions, DrainPolicy, RdmaDevice};
pub use pin::{
    CommitReport, DurableReport, FlushReport, Pin, PinRequest, Pipeline, ReadReport, Transferred,
    WriteReport,
};
pub use pinfold_proto::Reason;
pub use pinfold_verbs::checkup;
pub use pinfold_verbs::{CompletionStatus, Error as VerbsError, RemoteKey, RemoteSlice};
pub use plan::Part;
pub use revocation::{DrainNotice, Loss, Revocation, RevocationReason, RevocationTimings};
pub use session::Session;
pub use tonic::Code;
