//! The one table from errors to gRPC: code, reason, message.

use std::collections::HashMap;

use pinfold_leases::Error as FileError;
use pinfold_proto::{ERROR_DOMAIN, Reason};
use pinfold_verbs::with_causes;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::error::{Error, NotDone, Stop};
use crate::registry::Refusal;

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let (code, reason) = classify(&error);
        let message = with_causes(&error);
        if matches!(code, Code::Internal) {
            tracing::error!(%reason, "{message}");
        }
        let details = ErrorDetails::with_error_info(reason.as_str(), ERROR_DOMAIN, HashMap::new());
        Status::with_error_details(code, message, details)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        Error::from(refusal).into()
    }
}

fn classify(error: &Error) -> (Code, Reason) {
    match error {
        Error::Refused(refusal) => of_refusal(refusal),
        Error::File(error) => of_file(error),
        Error::Malformed { .. } => (Code::InvalidArgument, Reason::MalformedRequest),
        Error::ExportNotFound { .. } => (Code::NotFound, Reason::ExportNotFound),
        Error::Quiesced { .. } => (Code::Unavailable, Reason::ExportQuiesced),
        // Not Unavailable: what tries that again by itself would undo the resume.
        Error::ResumedMeanwhile { .. } => (Code::Aborted, Reason::ExportQuiesced),
        Error::StillOpen { .. } => (Code::Unavailable, Reason::FileDraining),
        Error::CreationStopped { why, .. } | Error::ResizeStopped { why, .. } => of_stop(*why),
        Error::OtherDirectory { .. } => (Code::FailedPrecondition, Reason::FileChanged),
        Error::FileChanged { .. } | Error::NameGone { .. } => {
            (Code::FailedPrecondition, Reason::FileChanged)
        }
        Error::FileModified { .. } => (Code::FailedPrecondition, Reason::FileModified),
        Error::FilePinned { .. } => (Code::FailedPrecondition, Reason::FilePinned),
        Error::BadRange { .. } | Error::MisalignedPin { .. } => {
            (Code::InvalidArgument, Reason::BadRange)
        }
        Error::RangePastEnd { .. } => (Code::OutOfRange, Reason::RangePastEnd),
        Error::NoRdmaDevice { .. } => (Code::FailedPrecondition, Reason::NoRdmaDevice),
        Error::UnknownDevice { .. } => (Code::NotFound, Reason::NoRdmaDevice),
        Error::NoQueuePair => (Code::FailedPrecondition, Reason::NoQueuePair),
        Error::CannotRegister { .. } => (Code::FailedPrecondition, Reason::DeviceCannotRegister),
        Error::TooCostly { .. } => (Code::ResourceExhausted, Reason::QuotaExceeded),
        Error::NotDurable { .. } | Error::CannotBeGuarded { .. } | Error::NoStreamWrites { .. } => {
            (Code::FailedPrecondition, Reason::UnsupportedFile)
        }
        // Only at the start, where nobody is told by gRPC.
        Error::DevicePolicy { .. }
        | Error::SharedFate { .. }
        | Error::StateFolder { .. }
        | Error::StateFolderInUse { .. } => (Code::Internal, Reason::Internal),
        Error::HeldOtherwise { .. } => (Code::FailedPrecondition, Reason::FilePinned),
        Error::QueuePair { .. } => (Code::FailedPrecondition, Reason::QueuePairFailed),
        Error::StillDraining { .. } | Error::WrittenLate { .. } | Error::LeftAlone { .. } => {
            (Code::Unavailable, Reason::FileDraining)
        }
        Error::Verbs(error) | Error::Registration { source: error, .. } => of_verbs(error),
        Error::NoDescriptors { .. } | Error::NoMapAreas { .. } => {
            (Code::ResourceExhausted, Reason::QuotaExceeded)
        }
        Error::UnpinHangs { .. } | Error::ExportStalled { why: NotDone::TooLong { .. }, .. } => {
            (Code::DeadlineExceeded, Reason::ExportStalled)
        }
        Error::ExportStalled { .. } => (Code::Unavailable, Reason::ExportStalled),
        Error::Task | Error::Thread { .. } => (Code::Internal, Reason::Internal),
    }
}

fn of_stop(why: Stop) -> (Code, Reason) {
    match why {
        Stop::Wanted => (Code::Unavailable, Reason::FileDraining),
        // Nobody is there to be told.
        Stop::CallerGone => (Code::Cancelled, Reason::FileDraining),
        Stop::SessionEnded => (Code::NotFound, Reason::UnknownSession),
        Stop::ShuttingDown => (Code::Unavailable, Reason::ShuttingDown),
        Stop::Quiesced => (Code::Unavailable, Reason::ExportQuiesced),
    }
}

fn of_verbs(error: &pinfold_verbs::Error) -> (Code, Reason) {
    use pinfold_verbs::Error as E;
    match error {
        E::BadEndpoint { .. } => (Code::InvalidArgument, Reason::MalformedRequest),
        E::MemlockExceeded { .. } => (Code::ResourceExhausted, Reason::QuotaExceeded),
        E::PinRefused { .. } | E::PinFault { .. } | E::NoOnDemandPaging { .. } => {
            (Code::FailedPrecondition, Reason::DeviceCannotRegister)
        }
        _ => (Code::Internal, Reason::Internal),
    }
}

fn of_refusal(refusal: &Refusal) -> (Code, Reason) {
    match refusal {
        Refusal::UnknownSession => (Code::NotFound, Reason::UnknownSession),
        Refusal::UnknownPin { .. } => (Code::NotFound, Reason::UnknownPin),
        Refusal::Stale { .. } => (Code::Aborted, Reason::StaleGeneration),
        Refusal::WriteBackFailed { .. } => (Code::DataLoss, Reason::WriteBackFailed),
        Refusal::RangeHeld { .. } => (Code::FailedPrecondition, Reason::RangeHeld),
        Refusal::ReadOnly { .. } => (Code::PermissionDenied, Reason::ReadOnlyPin),
        Refusal::Draining => (Code::Unavailable, Reason::FileDraining),
        Refusal::Quota { .. } => (Code::ResourceExhausted, Reason::QuotaExceeded),
        Refusal::ShuttingDown => (Code::Unavailable, Reason::ShuttingDown),
    }
}

fn of_file(error: &FileError) -> (Code, Reason) {
    match error {
        FileError::OutsideExport { .. } => (Code::InvalidArgument, Reason::PathOutsideExport),
        FileError::NotFound { .. } => (Code::NotFound, Reason::FileNotFound),
        FileError::Exists { .. } => (Code::AlreadyExists, Reason::FileExists),
        FileError::NotRegular { .. } => (Code::InvalidArgument, Reason::NotARegularFile),
        FileError::Denied { .. } => (Code::PermissionDenied, Reason::PermissionDenied),
        FileError::Busy { .. } | FileError::Sealed { .. } | FileError::ExportLocked { .. } => {
            (Code::FailedPrecondition, Reason::FileBusy)
        }
        // Only a resume meets these two: at the start nobody is there to be told.
        FileError::Export { .. } => (Code::NotFound, Reason::FileNotFound),
        FileError::Device { .. } => (Code::FailedPrecondition, Reason::UnsupportedFile),
        FileError::FixedSize { .. } => (Code::FailedPrecondition, Reason::FixedSize),
        FileError::MediumLost { .. } => (Code::DataLoss, Reason::MediumLost),
        FileError::WriteBack { .. } => (Code::DataLoss, Reason::WriteBackFailed),
        FileError::RangeLocked { .. } => (Code::FailedPrecondition, Reason::RangeHeld),
        FileError::NoGuard { .. }
        | FileError::NoSeal { .. }
        | FileError::UnknownFileSystem { .. } => {
            (Code::FailedPrecondition, Reason::UnsupportedFile)
        }
        FileError::Cancelled { .. } => (Code::NotFound, Reason::UnknownSession),
        FileError::NoSpace { .. } => (Code::ResourceExhausted, Reason::NoSpace),
        FileError::Broken | FileError::AlreadyFenced => (Code::Unavailable, Reason::FileDraining),
        FileError::OutOfMapping { .. } => (Code::OutOfRange, Reason::RangePastEnd),
        _ => (Code::Internal, Reason::Internal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_code_reason_and_causes() {
        let denied = FileError::Denied {
            path: "/x".into(),
            call: "open",
            capability: "write permission",
            source: std::io::Error::from_raw_os_error(13),
        };
        let status = Status::from(Error::from(denied));
        assert_eq!(status.code(), Code::PermissionDenied);
        let info = status.get_details_error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), ("PERMISSION_DENIED", "pinfold"));
        assert!(status.message().contains("/x"), "{}", status.message());
        assert!(status.message().contains("Permission denied"), "{}", status.message());
    }

    #[test]
    fn a_stale_commit_is_aborted() {
        let refusal = Refusal::Stale {
            pin: crate::ids::PinId(3),
            asked: crate::ids::Generation { incarnation: 1, counter: 2 },
        };
        assert_eq!(Status::from(refusal).code(), Code::Aborted);
    }
}
