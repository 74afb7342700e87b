//! What passes by itself and what does not: one table, for whoever tries to have a pin again.

use crate::{Code, Error, Reason};

/// Whether it makes sense to try again without anybody doing anything about it here.
pub(crate) fn passes(error: &Error) -> bool {
    match error {
        // The server is away, or this session is.
        Error::Unreachable { .. }
        | Error::NoWelcome { .. }
        | Error::Transport { .. }
        | Error::SessionLost { .. }
        // The pin was taken back on its way here.
        | Error::Draining { .. }
        | Error::Revoked { .. }
        | Error::Interrupted { .. }
        // A queue pair that could not be connected, as while the server's network comes up.
        | Error::Verbs { .. }
        | Error::RemoteRefused { .. }
        | Error::LaneLost { .. } => true,
        Error::Refused { reason: Some(reason), code, .. } => reason_passes(*reason, *code),
        Error::Refused { reason: None, code, .. } => code_passes(*code),
        // It takes other options, another device, another version, or another request.
        Error::BadEndpoint { .. }
        | Error::Protocol { .. }
        | Error::NoRdmaDevice { .. }
        | Error::StreamOnly { .. }
        | Error::ServerHasNoRdmaDevice { .. }
        | Error::NoMemory { .. }
        | Error::NoThread { .. }
        | Error::ForeignBuffer { .. }
        | Error::NoFlush { .. }
        | Error::NoAtomics { .. }
        | Error::NoAtomicWrite { .. }
        | Error::NotAtomic { .. }
        | Error::FileChanged { .. }
        | Error::GaveUp { .. }
        | Error::OutsidePin { .. }
        | Error::PastEnd { .. }
        | Error::BadParts { .. }
        | Error::Misaligned { .. }
        | Error::ReadOnlyPin { .. }
        | Error::BufferTooSmall { .. } => false,
    }
}

fn reason_passes(reason: Reason, code: Code) -> bool {
    match reason {
        // The session ends, the server goes, or the pin has gone again.
        Reason::UnknownSession
        | Reason::ShuttingDown
        | Reason::UnknownPin
        | Reason::StaleGeneration
        // Others use the file, or wait for it: they leave.
        | Reason::FileBusy
        | Reason::FileDraining
        | Reason::FilePinned
        | Reason::RangeHeld
        // An operator resumes it, or thaws its file system.
        | Reason::ExportQuiesced
        | Reason::ExportStalled
        // Others use up a limit: it had room for this pin before.
        | Reason::QuotaExceeded
        | Reason::NoSpace
        // The queue pair broke since it was made.
        | Reason::NoQueuePair
        | Reason::QueuePairFailed => true,
        Reason::MalformedRequest
        | Reason::ExportNotFound
        | Reason::PathOutsideExport
        | Reason::FileNotFound
        | Reason::FileExists
        | Reason::NotARegularFile
        | Reason::PermissionDenied
        | Reason::FileChanged
        | Reason::FileModified
        | Reason::UnsupportedFile
        | Reason::FixedSize
        | Reason::MediumLost
        | Reason::WriteBackFailed
        | Reason::BadRange
        | Reason::RangePastEnd
        | Reason::NoRdmaDevice
        | Reason::DeviceCannotRegister
        | Reason::ReadOnlyPin
        | Reason::Internal => false,
        // One that this version knows by its code only.
        _ => code_passes(code),
    }
}

fn code_passes(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable | Code::DeadlineExceeded | Code::Aborted | Code::ResourceExhausted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(reason: Option<Reason>, code: Code) -> Error {
        Error::Refused { doing: "pin data/log".to_owned(), reason, code, message: String::new() }
    }

    /// Written a second time, so that no reason comes or changes unnoticed.
    #[test]
    fn every_reason_is_in_the_table() {
        for reason in Reason::ALL {
            let expected = match reason.as_str() {
                "UNKNOWN_SESSION" | "SHUTTING_DOWN" | "UNKNOWN_PIN" | "STALE_GENERATION"
                | "FILE_BUSY" | "FILE_DRAINING" | "FILE_PINNED" | "RANGE_HELD"
                | "EXPORT_QUIESCED" | "EXPORT_STALLED" | "QUOTA_EXCEEDED" | "NO_SPACE"
                | "NO_QUEUE_PAIR" | "QUEUE_PAIR_FAILED" => true,
                "MALFORMED_REQUEST"
                | "EXPORT_NOT_FOUND"
                | "PATH_OUTSIDE_EXPORT"
                | "FILE_NOT_FOUND"
                | "FILE_EXISTS"
                | "NOT_A_REGULAR_FILE"
                | "PERMISSION_DENIED"
                | "FILE_CHANGED"
                | "FILE_MODIFIED"
                | "UNSUPPORTED_FILE"
                | "FIXED_SIZE"
                | "MEDIUM_LOST"
                | "WRITE_BACK_FAILED"
                | "BAD_RANGE"
                | "RANGE_PAST_END"
                | "NO_RDMA_DEVICE"
                | "DEVICE_CANNOT_REGISTER"
                | "READ_ONLY_PIN"
                | "INTERNAL" => false,
                new => panic!("{new} is not in the table yet"),
            };
            // With a code that says the opposite: a known reason has the word.
            let code = if expected { Code::NotFound } else { Code::Unavailable };
            assert_eq!(passes(&refused(Some(*reason), code)), expected, "{reason}");
        }
    }

    #[test]
    fn without_a_reason_the_code_decides() {
        assert!(passes(&refused(None, Code::Unavailable)));
        assert!(!passes(&refused(None, Code::NotFound)));
    }
}
