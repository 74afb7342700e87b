//! Requests that the server's NIC refuses although their pin is valid: once more, on another queue pair.
//!
//! A page that can't be had in time (on-demand paging gives up after a second, while the server takes back
//! another file) looks to the NIC like a dead key. Of a key that has died the server tells; so what is
//! refused without a word is tried again, if it may land twice: writes and reads may, atomics not. A flush
//! stands only for what its own queue pair wrote, so in its place the server commits.

use std::time::Duration;

use pinfold_verbs::CompletionStatus;

use super::Pin;
use crate::lane::Asked;
use crate::{Buffer, Error, TransferError};

/// How often a request is tried. Each try takes as long as the page did not come.
pub(super) const TRIES: usize = 5;
/// How long the word may take that explains a refusal: it comes by another connection.
const A_MOMENT: Duration = Duration::from_millis(200);

/// Whether a completion says that the NIC would not, or could not.
pub(super) fn is_refusal(status: CompletionStatus) -> bool {
    matches!(status, CompletionStatus::RemoteAccess | CompletionStatus::RemoteOperation)
}

/// Whether it may land twice.
pub(super) fn may_repeat(asked: Asked) -> bool {
    match asked {
        Asked::Transfer(_) | Asked::WriteThen(..) => true,
        Asked::Flush | Asked::Atomic(_) => false,
    }
}

impl Pin {
    /// Waits a moment for the word that explains a refusal. `Ok`: there is none, and the pin is valid.
    pub(super) async fn refused_without_a_word(&self) -> Result<(), Error> {
        match tokio::time::timeout(A_MOMENT, self.cell.gone()).await {
            Ok(gone) => Err(self.gone(gone)),
            Err(_) => Ok(()),
        }
    }

    /// The buffer of a transfer that was refused without a word, for another try.
    pub(super) async fn for_another_try(
        &self,
        failed: TransferError,
    ) -> Result<Buffer, TransferError> {
        let (doing, status, buffer) = match failed {
            TransferError {
                error: Error::RemoteRefused { doing, status },
                buffer: Some(buffer),
            } if is_refusal(status) => (doing, status, buffer),
            other => return Err(other),
        };
        match self.refused_without_a_word().await {
            Ok(()) => {
                log_another_try(&doing, status);
                Ok(buffer)
            }
            Err(gone) => Err(TransferError::new(gone, buffer)),
        }
    }
}

pub(super) fn log_another_try(doing: &str, status: CompletionStatus) {
    tracing::warn!(
        doing,
        %status,
        "refused, though the pin is valid and nobody has taken it back: trying again on another queue pair"
    );
}

#[cfg(test)]
mod tests {
    use pinfold_verbs::Atomic;

    use super::*;
    use crate::lane::{Direction, Then};

    #[test]
    fn what_may_land_twice_is_repeated() {
        for asked in [
            Asked::Transfer(Direction::Write),
            Asked::Transfer(Direction::Read),
            Asked::WriteThen(Then::Probe, 1),
        ] {
            assert!(may_repeat(asked), "{asked:?}");
        }
        for asked in [Asked::Flush, Asked::Atomic(Atomic::FetchAdd(1))] {
            assert!(!may_repeat(asked), "{asked:?}");
        }
    }

    #[test]
    fn only_what_the_far_end_refused_is_a_refusal() {
        assert!(is_refusal(CompletionStatus::RemoteAccess));
        assert!(is_refusal(CompletionStatus::RemoteOperation));
        for other in [CompletionStatus::Flushed, CompletionStatus::RetryExceeded] {
            assert!(!is_refusal(other), "{other}");
        }
    }
}
