//! Exit codes: one table, for scripts that must tell apart what went wrong.

use std::process::ExitCode;

use pinfold_client::{Code, Error, FileChange, Reason, RevocationReason};

/// How the command ended.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
#[repr(u8)]
pub(crate) enum Exit {
    Failure = 1,
    Usage = 2,
    Unreachable = 3,
    NotFound = 4,
    BadRequest = 5,
    Busy = 6,
    Revoked = 7,
    Device = 8,
    Permission = 9,
    LocalIo = 10,
    NoRoom = 11,
    Differs = 12,
    Partial = 13,
    DataLoss = 14,
    Interrupted = 130,
}

/// For `--help`; a test holds it against the table above.
pub(crate) const HELP: &str = "\
Exit codes:
  0    done
  1    anything else
  2    the command line is wrong
  3    the server can't be reached, or the session was lost
  4    no such export or file
  5    the server refused the request as it is
  6    the file is in use, pinned, held or being taken back, or the export quiesced: try again later
  7    the pin was taken back, or the file is another one by now
  8    no usable RDMA device, or it failed
  9    permission denied, or the pin is for reading only
  10   a local file can't be read, or the output not written
  11   no space, or a limit of the server
  12   the copy is not what the local file has: it changed meanwhile, or --verify found other bytes
  13   of several files some were not copied: each is named, with the reason
  14   the server's medium failed: bytes that were written may be missing there
  130  interrupted";

impl Exit {
    #[cfg(test)]
    const ALL: [Self; 15] = [
        Self::Failure,
        Self::Usage,
        Self::Unreachable,
        Self::NotFound,
        Self::BadRequest,
        Self::Busy,
        Self::Revoked,
        Self::Device,
        Self::Permission,
        Self::LocalIo,
        Self::NoRoom,
        Self::Differs,
        Self::Partial,
        Self::DataLoss,
        Self::Interrupted,
    ];

    /// The code for an error of the library.
    pub(crate) fn of_error(error: &Error) -> Self {
        match error {
            Error::BadEndpoint { .. } => Self::Usage,
            Error::Unreachable { .. }
            | Error::NoWelcome { .. }
            | Error::Transport { .. }
            | Error::SessionLost { .. } => Self::Unreachable,
            Error::Refused { reason: Some(reason), .. } => Self::of_reason(*reason),
            Error::Refused { reason: None, code, .. } => Self::of_code(*code),
            Error::NoRdmaDevice { .. }
            | Error::StreamOnly { .. }
            | Error::ServerHasNoRdmaDevice { .. }
            | Error::Verbs { .. }
            | Error::LaneLost { .. } => Self::Device,
            Error::Draining { notice, .. } if is_of_write_back(notice.reason) => Self::DataLoss,
            Error::Revoked { revocation, .. } if is_of_write_back(revocation.reason) => {
                Self::DataLoss
            }
            Error::FileChanged { change: FileChange::NotWrittenBack, .. } => Self::DataLoss,
            Error::Draining { .. }
            | Error::Revoked { .. }
            | Error::RemoteRefused { .. }
            | Error::Interrupted { .. }
            | Error::FileChanged { .. } => Self::Revoked,
            Error::GaveUp { source, .. } => Self::of_error(source),
            Error::OutsidePin { .. }
            | Error::PastEnd { .. }
            | Error::Misaligned { .. }
            | Error::BadParts { .. }
            | Error::NoAtomics { .. }
            | Error::NoAtomicWrite { .. }
            | Error::NotAtomic { .. }
            | Error::BufferTooSmall { .. }
            | Error::ForeignBuffer { .. }
            | Error::NoFlush { .. } => Self::BadRequest,
            Error::ReadOnlyPin { .. } => Self::Permission,
            _ => Self::Failure,
        }
    }

    fn of_reason(reason: Reason) -> Self {
        match reason {
            Reason::UnknownSession | Reason::ShuttingDown => Self::Unreachable,
            Reason::ExportNotFound | Reason::FileNotFound => Self::NotFound,
            Reason::MalformedRequest
            | Reason::PathOutsideExport
            | Reason::FileExists
            | Reason::NotARegularFile
            | Reason::UnsupportedFile
            | Reason::FixedSize
            | Reason::BadRange
            | Reason::RangePastEnd => Self::BadRequest,
            Reason::PermissionDenied | Reason::ReadOnlyPin => Self::Permission,
            Reason::FileBusy
            | Reason::FileDraining
            | Reason::FilePinned
            | Reason::RangeHeld
            | Reason::ExportQuiesced
            | Reason::ExportStalled => Self::Busy,
            Reason::FileChanged
            | Reason::FileModified
            | Reason::UnknownPin
            | Reason::StaleGeneration => Self::Revoked,
            Reason::NoSpace | Reason::QuotaExceeded => Self::NoRoom,
            Reason::MediumLost | Reason::WriteBackFailed => Self::DataLoss,
            Reason::NoRdmaDevice
            | Reason::NoQueuePair
            | Reason::DeviceCannotRegister
            | Reason::QueuePairFailed => Self::Device,
            _ => Self::Failure,
        }
    }

    /// For a refusal without a reason that this version knows.
    fn of_code(code: Code) -> Self {
        match code {
            Code::Unavailable | Code::DeadlineExceeded => Self::Unreachable,
            Code::NotFound => Self::NotFound,
            Code::InvalidArgument | Code::OutOfRange | Code::AlreadyExists => Self::BadRequest,
            Code::PermissionDenied | Code::Unauthenticated => Self::Permission,
            Code::ResourceExhausted => Self::NoRoom,
            Code::Aborted => Self::Busy,
            Code::DataLoss => Self::DataLoss,
            _ => Self::Failure,
        }
    }
}

fn is_of_write_back(reason: RevocationReason) -> bool {
    reason == RevocationReason::WriteBackFailed
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_reason_but_what_broke_on_the_server_has_a_code_of_its_kind() {
        for reason in Reason::ALL {
            let general = Exit::of_reason(*reason) == Exit::Failure;
            assert_eq!(general, *reason == Reason::Internal, "{reason}");
        }
    }

    #[test]
    fn each_reason_has_the_code_that_the_help_tells() {
        // Written a second time, so that no reason changes its code unnoticed.
        for reason in Reason::ALL {
            let expected = match reason.as_str() {
                "INTERNAL" => 1,
                "MEDIUM_LOST" | "WRITE_BACK_FAILED" => 14,
                "UNKNOWN_SESSION" | "SHUTTING_DOWN" => 3,
                "EXPORT_NOT_FOUND" | "FILE_NOT_FOUND" => 4,
                "MALFORMED_REQUEST"
                | "PATH_OUTSIDE_EXPORT"
                | "FILE_EXISTS"
                | "NOT_A_REGULAR_FILE"
                | "UNSUPPORTED_FILE"
                | "FIXED_SIZE"
                | "BAD_RANGE"
                | "RANGE_PAST_END" => 5,
                "FILE_BUSY" | "FILE_DRAINING" | "FILE_PINNED" | "RANGE_HELD"
                | "EXPORT_QUIESCED" | "EXPORT_STALLED" => 6,
                "FILE_CHANGED" | "FILE_MODIFIED" | "UNKNOWN_PIN" | "STALE_GENERATION" => 7,
                "NO_RDMA_DEVICE"
                | "NO_QUEUE_PAIR"
                | "DEVICE_CANNOT_REGISTER"
                | "QUEUE_PAIR_FAILED" => 8,
                "PERMISSION_DENIED" | "READ_ONLY_PIN" => 9,
                "NO_SPACE" | "QUOTA_EXCEEDED" => 11,
                new => panic!("{new} has no code here yet"),
            };
            assert_eq!(Exit::of_reason(*reason) as u8, expected, "{reason}");
        }
    }

    #[test]
    fn reason_goes_before_status_code() {
        let error = |reason| Error::Refused {
            doing: "pin data/log".to_owned(),
            reason,
            code: Code::NotFound,
            message: String::new(),
        };
        assert_eq!(Exit::of_error(&error(Some(Reason::FileBusy))), Exit::Busy);
        assert_eq!(Exit::of_error(&error(None)), Exit::NotFound);
    }

    #[test]
    fn the_help_lists_each_code_once() {
        let listed: Vec<u8> =
            HELP.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
        let mut expected: Vec<u8> = Exit::ALL.iter().map(|exit| *exit as u8).collect();
        expected.insert(0, 0);
        assert_eq!(listed, expected);
        assert_eq!(listed.iter().collect::<HashSet<_>>().len(), listed.len());
    }
}
