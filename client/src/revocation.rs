//! Why and how a pin was taken back, and how a session was lost.

use std::fmt;
use std::time::Duration;

use pinfold_proto::v1;

use crate::Generation;

/// Why a pin is taken back.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum RevocationReason {
    /// A process on the storage host wants to read the file.
    LocalReader,
    /// A process on the storage host wants to change the file: truncate, open for writing, unlink …
    LocalWriter,
    /// The server is shutting down.
    Shutdown,
    /// A client asked for the file to be shrunk.
    Shrink,
    /// A client asked for the file to be removed.
    Remove,
    /// An operator revoked the file's pins.
    Operator,
    /// An operator quiesces the export: pins of it can be had again once it is resumed.
    Quiesce,
    /// Another client has [stolen](crate::PinRequest::steal) the file.
    Steal,
    /// A process on the storage host has unlinked, renamed or replaced the file, which its guard does not
    /// hold back: the path does not name it any more.
    NameGone,
    /// The server's kernel could not write the file back to its medium. Bytes that were written by any
    /// pin of the file and not committed before may be missing there.
    WriteBackFailed,
    /// Something that this version does not know by name.
    Unknown,
}

/// How a revocation went: from the kernel's break signal to the end of each step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RevocationTimings {
    /// The clients were told.
    pub noticed: Duration,
    /// The last client had drained; absent if the drain budget ran out first.
    pub drained: Option<Duration>,
    /// Nothing could land any more.
    pub fenced: Duration,
    /// The guard was let go and the local process proceeded.
    pub released: Duration,
    /// Whether the break was still pending in the kernel when the guard was released: a local process
    /// that waits proceeds because of that. Also true of one that does not wait (`O_NONBLOCK`). False: no
    /// local process wanted the file, or lease-break-time ran out.
    pub break_pending_at_release: bool,
}

/// The server wants pins back soon.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DrainNotice {
    /// The generation that ends.
    pub generation: Generation,
    /// Why.
    pub reason: RevocationReason,
    /// The fence falls when all clients have drained, or after this long.
    pub drain_budget: Duration,
}

/// Pins are gone: their keys are dead.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Revocation {
    /// The generation that ended. What was not committed under it is not known to be durable.
    pub generation: Generation,
    /// Why.
    pub reason: RevocationReason,
    /// How it went; absent if the server did not say.
    pub timings: Option<RevocationTimings>,
}

/// How a session came to its end.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Loss {
    /// This side closed it.
    Closed,
    /// The server ended the stream.
    StreamEnded,
    /// The server ended the stream with this status message.
    StreamFailed(String),
    /// The connection broke, as when the server dies.
    ConnectionBroke,
    /// The server said nothing for this long.
    Silence(Duration),
}

impl From<v1::RevocationReason> for RevocationReason {
    fn from(wire: v1::RevocationReason) -> Self {
        match wire {
            v1::RevocationReason::Unspecified => Self::Unknown,
            v1::RevocationReason::LocalReader => Self::LocalReader,
            v1::RevocationReason::LocalWriter => Self::LocalWriter,
            v1::RevocationReason::Shutdown => Self::Shutdown,
            v1::RevocationReason::Shrink => Self::Shrink,
            v1::RevocationReason::Remove => Self::Remove,
            v1::RevocationReason::Operator => Self::Operator,
            v1::RevocationReason::Quiesce => Self::Quiesce,
            v1::RevocationReason::Steal => Self::Steal,
            v1::RevocationReason::NameGone => Self::NameGone,
            v1::RevocationReason::WriteBackFailed => Self::WriteBackFailed,
        }
    }
}

impl From<v1::RevocationTimings> for RevocationTimings {
    fn from(wire: v1::RevocationTimings) -> Self {
        Self {
            noticed: Duration::from_micros(wire.noticed_us),
            drained: wire.drained_us.map(Duration::from_micros),
            fenced: Duration::from_micros(wire.fenced_us),
            released: Duration::from_micros(wire.released_us),
            break_pending_at_release: wire.break_pending_at_release,
        }
    }
}

impl From<&v1::Draining> for DrainNotice {
    fn from(wire: &v1::Draining) -> Self {
        Self {
            generation: wire.generation.unwrap_or_default().into(),
            reason: wire.reason().into(),
            drain_budget: Duration::from_millis(wire.drain_budget_ms.into()),
        }
    }
}

impl From<&v1::Revoked> for Revocation {
    fn from(wire: &v1::Revoked) -> Self {
        Self {
            generation: wire.generation.unwrap_or_default().into(),
            reason: wire.reason().into(),
            timings: wire.timings.map(RevocationTimings::from),
        }
    }
}

impl fmt::Display for RevocationReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LocalReader => "a local process wants to read the file",
            Self::LocalWriter => "a local process wants to change the file",
            Self::Shutdown => "the server is shutting down",
            Self::Shrink => "a client shrinks the file",
            Self::Remove => "a client removes the file",
            Self::Operator => "revoked by an operator",
            Self::Quiesce => "an operator quiesces the export",
            Self::Steal => "another client has stolen the file",
            Self::NameGone => {
                "a local process removed, renamed or replaced the file: its path does not name it any more"
            }
            Self::WriteBackFailed => "the server could not write the file back to its medium",
            Self::Unknown => "the server gave a reason that this version does not know",
        })
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("this client closed it"),
            Self::StreamEnded => f.write_str("the server ended it"),
            Self::StreamFailed(message) => write!(f, "the server ended it: {message}"),
            Self::ConnectionBroke => f.write_str("the connection broke"),
            Self::Silence(time) => write!(f, "the server said nothing for {time:?}"),
        }
    }
}
