//! What can go wrong, as a program sees it: every message says what happened, to which file, and
//! what to do about it. A message never repeats its source: print the chain.

use std::error::Error as _;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pinfold_proto::{ERROR_DOMAIN, Reason};
use pinfold_verbs::CompletionStatus;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::file::FileName;
use crate::grant::Malformed;
use crate::kept_state::Stopped;
use crate::pin_state::Gone;
use crate::plan::{Reach, Refusal};
use crate::{Buffer, DrainNotice, FileChange, InterruptionCause, Loss, Revocation};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The server's address can't be understood.
    #[error("{endpoint:?} is no server address; write http://HOST:PORT")]
    BadEndpoint {
        /// What was given.
        endpoint: String,
    },

    /// Nobody answers at the server's address.
    #[error("cannot reach a server at {endpoint}; check the address and that pinfoldd runs there")]
    Unreachable {
        /// The server's address.
        endpoint: String,
        /// What the connection attempt ran into.
        source: tonic::transport::Error,
    },

    /// The server took the connection, but opened no session in time.
    #[error("the server at {endpoint} opened no session within {waited:?}")]
    NoWelcome {
        /// The server's address.
        endpoint: String,
        /// How long was waited.
        waited: Duration,
    },

    /// A call got no answer.
    #[error("no answer from {endpoint} to the request to {doing}")]
    Transport {
        /// The server's address.
        endpoint: String,
        /// What was asked for.
        doing: String,
        /// What the transport says.
        source: Status,
    },

    /// The server refused.
    #[error("the server refused to {doing}: {message}")]
    Refused {
        /// What was asked for.
        doing: String,
        /// Why, for programs; absent if the server named none, or one that this version does not
        /// know.
        reason: Option<Reason>,
        /// The gRPC status code.
        code: Code,
        /// Why, for people.
        message: String,
    },

    /// The server's answer contradicts the protocol.
    #[error("the server answered the request to {doing} with {what}; are the versions compatible?")]
    Protocol {
        /// What was asked for.
        doing: String,
        /// What is wrong with the answer.
        what: &'static str,
    },

    /// This host has no RDMA device that could be used, and one was asked for by name.
    #[error("no usable RDMA device on this host; `rdma link` lists them")]
    NoRdmaDevice {
        /// What the search ran into.
        source: pinfold_verbs::Error,
    },

    /// Only RDMA could do it, and the session has none.
    #[error("cannot {doing} without RDMA: {because}")]
    StreamOnly {
        /// What was asked for.
        doing: String,
        /// Why the session has no RDMA.
        because: String,
    },

    /// The server has no RDMA device, and RDMA was asked for by a device's name.
    #[error("the server at {endpoint} has no RDMA device; see `pinfoldd`'s log for the reason")]
    ServerHasNoRdmaDevice {
        /// The server's address.
        endpoint: String,
    },

    /// The RDMA device refused something that does not concern the server.
    #[error("the RDMA device failed to {doing}")]
    Verbs {
        /// What was tried.
        doing: &'static str,
        /// What the device or its driver says.
        source: pinfold_verbs::Error,
    },

    /// This host has no thread left for a session of the blocking flavour.
    #[error("cannot start the thread that keeps the session; see `ulimit -u`")]
    NoThread {
        /// What the system says.
        source: std::io::Error,
    },

    /// This host has no memory left for a buffer.
    #[error("cannot allocate a buffer of {capacity} bytes")]
    NoMemory {
        /// What was asked for.
        capacity: usize,
        /// What the kernel says.
        source: std::io::Error,
    },

    /// Only RDMA is to do it, and the session's device does not know the buffer.
    #[error(
        "cannot {doing} by RDMA: the buffer is not one of this session; use one from its own \
         `buffer`"
    )]
    ForeignBuffer {
        /// What was asked for.
        doing: String,
    },

    /// The pin can't be flushed by RDMA.
    #[error("cannot flush {file} by RDMA: {because}; `commit` makes writes durable")]
    NoFlush {
        /// Export and path.
        file: String,
        /// What the server's grant says, or what this host lacks.
        because: String,
    },

    /// The pin has no atomics.
    #[error("no atomics on {file}: {because}; read, change and write instead")]
    NoAtomics {
        /// Export and path.
        file: String,
        /// What the server's grant says, or what this host lacks.
        because: String,
    },

    /// The pin has no atomic write.
    #[error("no atomic write on {file}: {because}; `compare_swap` writes 8 bytes as one step, too")]
    NoAtomicWrite {
        /// Export and path.
        file: String,
        /// What the server's grant says, or what this host lacks.
        because: String,
    },

    /// An atomic where there can be none.
    #[error(
        "{file}: no atomic at byte {file_offset}; it must be at a multiple of 8, in the part of the \
         pin that RDMA reaches"
    )]
    NotAtomic {
        /// Export and path.
        file: String,
        /// Where it was to be.
        file_offset: u64,
    },

    /// The server wants the pin back: nothing new begins.
    #[error("the pin on {file} is being taken back ({}); pin it again afterwards", notice.reason)]
    Draining {
        /// Export and path.
        file: String,
        /// Why, and how long it may take.
        notice: DrainNotice,
    },

    /// The pin is gone. What was not committed is not known to be durable.
    #[error(
        "the pin on {file} was taken back ({}): generation {} is over; pin it again, and write \
         again what was not committed",
        revocation.reason,
        revocation.generation
    )]
    Revoked {
        /// Export and path.
        file: String,
        /// Why and how.
        revocation: Box<Revocation>,
    },

    /// The session is over, and every pin with it.
    #[error("the session with {endpoint} is over: {loss}; connect and pin again")]
    SessionLost {
        /// The server's address.
        endpoint: String,
        /// How it ended.
        loss: Loss,
    },

    /// A kept pin was interrupted: nothing goes through until the report is taken.
    #[error(
        "the kept pin on {file} was interrupted ({cause}); call `resume` for the report of what was \
         written, and go on"
    )]
    Interrupted {
        /// Export and path.
        file: String,
        /// What interrupted it.
        cause: Box<InterruptionCause>,
    },

    /// A kept pin was interrupted, and the file is no longer the one that was pinned.
    #[error(
        "{file} is not the file that was pinned: {change}; accept the change to pin what is there, \
         or give the pin back"
    )]
    FileChanged {
        /// Export and path.
        file: String,
        /// How it differs.
        change: FileChange,
    },

    /// A kept pin was interrupted, and could not be had again.
    #[error("the pin on {file} could not be had again, after {attempts} attempts")]
    GaveUp {
        /// Export and path.
        file: String,
        /// How often it was tried.
        attempts: u32,
        /// What the last attempt ran into.
        source: Arc<Error>,
    },

    /// The range is not pinned, or not all of it.
    #[error(
        "bytes {}..{} of {file} are not all pinned; the pin covers {}..{}",
        wanted.start, wanted.end, pinned.start, pinned.end
    )]
    OutsidePin {
        /// Export and path.
        file: String,
        /// What was asked for.
        wanted: Range<u64>,
        /// What is pinned.
        pinned: Range<u64>,
    },

    /// The range reaches past the end of the file, where bytes would vanish.
    #[error(
        "bytes {}..{} of {file} reach past its end at {valid_end}; make the file larger first",
        wanted.start, wanted.end
    )]
    PastEnd {
        /// Export and path.
        file: String,
        /// What was asked for.
        wanted: Range<u64>,
        /// The file's end.
        valid_end: u64,
    },

    /// A request would start where the server's device misplaces data, and the pin may not use the
    /// stream path instead.
    #[error(
        "a transfer at byte {file_offset} of {file} would break a quirk of the server's device \
         (requests start at multiples of {start_alignment_bytes} bytes, or data is misplaced); \
         start at such a multiple, or pin without asking for RDMA only"
    )]
    Misaligned {
        /// Export and path.
        file: String,
        /// Where the request would start.
        file_offset: u64,
        /// The device's quirk: [`start_alignment_bytes`](crate::Quirks::start_alignment_bytes).
        start_alignment_bytes: u32,
    },

    /// Several parts that can't be one transfer.
    #[error("{file}: {why}; make a transfer of each")]
    BadParts {
        /// Export and path.
        file: String,
        /// What is wrong with them.
        why: &'static str,
    },

    /// A write through a pin for reading.
    #[error("{file} is pinned for reading only; pin it with read-write access to write")]
    ReadOnlyPin {
        /// Export and path.
        file: String,
    },

    /// The buffer holds less than the transfer needs.
    #[error("a transfer of {wanted} bytes with a buffer of {capacity}; use a larger buffer")]
    BufferTooSmall {
        /// The transfer's length.
        wanted: usize,
        /// The buffer's capacity.
        capacity: usize,
    },

    /// The server's NIC refused a request: the key is dead, or does not reach that far. The queue
    /// pair died of it; the session makes a new one for the next request.
    #[error("cannot {doing}: {status}")]
    RemoteRefused {
        /// What was tried.
        doing: String,
        /// How the request ended.
        status: CompletionStatus,
    },

    /// The queue pair died while the request was in flight, or before it was sent: whether it took
    /// effect is not known. The session makes a new one for the next request.
    #[error("the RDMA connection broke while trying to {doing}: {status}; do it again")]
    LaneLost {
        /// What was tried.
        doing: String,
        /// How the request ended.
        status: CompletionStatus,
    },
}

impl Error {
    /// Why the server refused, if it did and this version knows the reason.
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::Refused { reason, .. } => *reason,
            _ => None,
        }
    }

    /// Sorts a failed call: the server's own words, or those of the transport in between.
    pub(crate) fn from_status(status: Status, endpoint: &str, doing: String) -> Self {
        let from_transport = status.source().is_some();
        if from_transport {
            return Self::Transport { endpoint: endpoint.to_owned(), doing, source: status };
        }
        let reason = status
            .get_details_error_info()
            .filter(|info| info.domain == ERROR_DOMAIN)
            .and_then(|info| info.reason.parse().ok());
        Self::Refused { doing, reason, code: status.code(), message: status.message().to_owned() }
    }

    pub(crate) fn from_malformed(malformed: Malformed, doing: String) -> Self {
        Self::Protocol { doing, what: malformed.0 }
    }

    pub(crate) fn from_gone(gone: Gone, file: &FileName, endpoint: &str) -> Self {
        match gone {
            Gone::Draining(notice) => Self::Draining { file: file.to_string(), notice },
            Gone::Revoked(revocation) => {
                Self::Revoked { file: file.to_string(), revocation: Box::new(revocation) }
            }
            Gone::Lost(loss) => Self::SessionLost { endpoint: endpoint.to_owned(), loss },
        }
    }

    pub(crate) fn from_stopped(stopped: &Stopped, file: &FileName) -> Self {
        let file = file.to_string();
        match stopped {
            Stopped::Changed(change) => Self::FileChanged { file, change: *change },
            Stopped::GaveUp { attempts, source } => {
                Self::GaveUp { file, attempts: *attempts, source: source.clone() }
            }
        }
    }

    pub(crate) fn from_refusal(refusal: Refusal, file: &FileName, reach: Reach<'_>) -> Self {
        let file = file.to_string();
        match refusal {
            Refusal::OutsidePin { wanted } => {
                Self::OutsidePin { file, wanted, pinned: reach.range() }
            }
            Refusal::PastEnd { wanted } => {
                Self::PastEnd { file, wanted, valid_end: reach.valid_end }
            }
            Refusal::BadParts(why) => Self::BadParts { file, why },
            Refusal::NotAtomic { file_offset } => Self::NotAtomic { file, file_offset },
            Refusal::Misaligned { file_offset } => Self::Misaligned {
                file,
                file_offset,
                start_alignment_bytes: reach.grant.quirks.start_alignment_bytes,
            },
        }
    }
}

/// A transfer failed; the buffer comes back if the device has let go of it.
#[derive(Debug)]
pub struct TransferError {
    /// Why.
    pub error: Error,
    /// The buffer. Absent only if the runtime that drives the session is shutting down.
    pub buffer: Option<Buffer>,
}

impl TransferError {
    pub(crate) fn new(error: Error, buffer: Buffer) -> Self {
        Self { error, buffer: Some(buffer) }
    }
}

/// Speaks as the error in it.
impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for TransferError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<TransferError> for Error {
    fn from(failed: TransferError) -> Self {
        failed.error
    }
}
