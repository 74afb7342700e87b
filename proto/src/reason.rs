//! The reasons that an error carries for programs (`google.rpc.ErrorInfo.reason`).

use std::fmt;
use std::str::FromStr;

/// The `domain` of every `ErrorInfo` that Pinfold sends.
pub const ERROR_DOMAIN: &str = "pinfold";

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),* $(,)?) => {
        /// Why a call was refused, as programs see it. docs/protocol.md lists status and remedy.
        #[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
        #[non_exhaustive]
        pub enum Reason { $($(#[$doc])* $variant),* }

        impl Reason {
            /// Every reason, in the order of docs/protocol.md.
            pub const ALL: &[Reason] = &[$(Reason::$variant),*];

            /// The name on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $name),* }
            }
        }

        impl FromStr for Reason {
            type Err = UnknownReason;

            fn from_str(name: &str) -> Result<Self, UnknownReason> {
                match name { $($name => Ok(Reason::$variant),)* _ => Err(UnknownReason) }
            }
        }
    };
}

/// A reason that this version does not know; treat the status code as the whole truth.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct UnknownReason;

reasons! {
    /// The session has ended, expired, or never was.
    UnknownSession = "UNKNOWN_SESSION",
    /// A message or field that must be there is missing or malformed.
    MalformedRequest = "MALFORMED_REQUEST",
    /// No export of that name.
    ExportNotFound = "EXPORT_NOT_FOUND",
    /// The export is quiesced: it is not served until it is resumed.
    ExportQuiesced = "EXPORT_QUIESCED",
    /// Calls don't come back from the export's file system: it is frozen, or its device is stuck.
    ExportStalled = "EXPORT_STALLED",
    /// The path leaves the export, is absolute, or crosses a symbolic link.
    PathOutsideExport = "PATH_OUTSIDE_EXPORT",
    /// No file of that name.
    FileNotFound = "FILE_NOT_FOUND",
    /// `Create` found a file and was told to fail.
    FileExists = "FILE_EXISTS",
    /// A directory, socket, FIFO or device where a regular file must be.
    NotARegularFile = "NOT_A_REGULAR_FILE",
    /// The server may not open the file, or may not guard it.
    PermissionDenied = "PERMISSION_DENIED",
    /// Other processes have the file open; the message names them.
    FileBusy = "FILE_BUSY",
    /// The file is being revoked right now.
    FileDraining = "FILE_DRAINING",
    /// The path names another file than expected.
    FileChanged = "FILE_CHANGED",
    /// A local process has changed the file's bytes since it was last pinned.
    FileModified = "FILE_MODIFIED",
    /// The file has pins that this operation would hurt.
    FilePinned = "FILE_PINNED",
    /// An exclusive pin overlaps; the message names its holder.
    RangeHeld = "RANGE_HELD",
    /// The file system can't guard or map the file.
    UnsupportedFile = "UNSUPPORTED_FILE",
    /// It is a device: nothing in it can be made, resized or removed.
    FixedSize = "FIXED_SIZE",
    /// The medium has an error, or the device is gone.
    MediumLost = "MEDIUM_LOST",
    /// The range is empty or ends before it starts.
    BadRange = "BAD_RANGE",
    /// The range reaches past the end of the file or of the pin.
    RangePastEnd = "RANGE_PAST_END",
    /// The file system is full.
    NoSpace = "NO_SPACE",
    /// The kernel could not write the file back: what was not committed before may be missing on the
    /// medium.
    WriteBackFailed = "WRITE_BACK_FAILED",
    /// The server has no usable RDMA device.
    NoRdmaDevice = "NO_RDMA_DEVICE",
    /// The session has no queue pair yet.
    NoQueuePair = "NO_QUEUE_PAIR",
    /// The device can't register this kind of mapping; the message says why.
    DeviceCannotRegister = "DEVICE_CANNOT_REGISTER",
    /// The queue pair could not be connected.
    QueuePairFailed = "QUEUE_PAIR_FAILED",
    /// The pin has been given back or revoked, or never was this session's.
    UnknownPin = "UNKNOWN_PIN",
    /// The pin's generation is over: what was not committed before is not durable.
    StaleGeneration = "STALE_GENERATION",
    /// The pin may only be read.
    ReadOnlyPin = "READ_ONLY_PIN",
    /// A limit of the server.
    QuotaExceeded = "QUOTA_EXCEEDED",
    /// The server is going down.
    ShuttingDown = "SHUTTING_DOWN",
    /// Something broke inside the server; its log has the details.
    Internal = "INTERNAL",
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for UnknownReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a reason that this version of Pinfold does not know")
    }
}

impl std::error::Error for UnknownReason {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_protocol_page_tells_of_every_reason() {
        let page = include_str!("../../docs/protocol.md");
        for reason in Reason::ALL {
            assert!(page.contains(&format!("\n| `{reason}` |")), "{reason}");
        }
    }

    #[test]
    fn every_reason_survives_the_wire() {
        for reason in Reason::ALL {
            assert_eq!(reason.as_str().parse(), Ok(*reason));
        }
        assert_eq!("NOT_A_REASON".parse::<Reason>(), Err(UnknownReason));
    }
}
