//! RDMA FLUSH: the NIC makes durable what it wrote.

use std::ops::Range;
use std::sync::atomic::Ordering;

use pinfold_verbs::{Error as VerbsError, Piece};

use super::{CommitReport, Pin, again};
use crate::Error;
use crate::fabric::{Of, Operation};
use crate::lane::Asked;

/// What a flush did.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FlushReport {
    /// Absent: the server's NIC did it all, and its processor nothing. Else what the commit did that was
    /// needed instead: since the last commit of the whole pin a part of what was written had gone by the
    /// stream path, and of that the NIC knows nothing.
    pub commit: Option<CommitReport>,
}

impl Pin {
    /// Makes the writes to a range of the file survive power loss, as
    /// [`commit_range`](Self::commit_range) does, by RDMA FLUSH: the request goes behind the writes over
    /// the same connection. Where [`Durability::Flush`](crate::Durability::Flush) is
    /// [on offer](crate::Grant::durability).
    ///
    /// All writes to the range count that had returned before. A flush that has succeeded holds, also
    /// if the pin is taken back at the same time: the bytes are on the medium, and only who was let
    /// through to the file can change them there.
    ///
    /// # Errors
    ///
    /// [`Error::NoFlush`] where the server does not offer it, or this host's libibverbs can't ask for it;
    /// [`Error::OutsidePin`], and those of [`commit`](Self::commit); [`Error::RemoteRefused`] and
    /// [`Error::LaneLost`]: nothing is known to be durable then but what was before.
    pub async fn flush(&self, range: Range<u64>) -> Result<FlushReport, Error> {
        self.check()?;
        if let Some(because) = &self.grant.no_flush_because {
            return Err(self.no_flush(because.clone()));
        }
        let parts = self.reach().flush(range.clone());
        let parts =
            parts.map_err(|refusal| Error::from_refusal(refusal, &self.file, self.reach()))?;
        // First: what is acknowledged by now is counted below, too.
        let entry = self.enter_commit(Some(range.clone()));
        if self.streamed_committed.load(Ordering::Acquire) < self.streamed.load(Ordering::Acquire) {
            let commit = Some(self.commit_bytes(Some(range)).await?);
            return Ok(FlushReport { commit });
        }
        match self.flush_parts(&range, &parts).await {
            // On another queue pair it would not stand for what this one wrote.
            Err(Error::RemoteRefused { status, .. }) if again::is_refusal(status) => {
                drop(entry);
                let commit = Some(self.commit_bytes(Some(range)).await?);
                return Ok(FlushReport { commit });
            }
            flushed => flushed?,
        }
        if let Some(entry) = entry {
            entry.durable();
        }
        Ok(FlushReport { commit: None })
    }

    async fn flush_parts(&self, range: &Range<u64>, parts: &[Piece]) -> Result<(), Error> {
        let Some(fabric) = &self.fabric else {
            return Err(self.no_flush("the session is not connected by RDMA".to_owned()));
        };
        let doing = || format!("flush bytes {} to {} of {}", range.start, range.end, self.file);
        for parts in parts.chunks(fabric.depth()) {
            let operation = Operation {
                asked: Asked::Flush,
                pieces: parts,
                buffer: fabric.small_buffer().await?,
                of: Of::Pin(&self.cell),
            };
            match self.run(fabric, operation, doing).await {
                Ok(buffer) => fabric.return_small_buffer(buffer),
                Err((Error::Verbs { source: VerbsError::NoFlush { device, why }, .. }, _)) => {
                    return Err(self.no_flush(format!("RDMA device {device} of this host: {why}")));
                }
                Err((error, _)) => return Err(error),
            }
        }
        Ok(())
    }

    fn no_flush(&self, because: String) -> Error {
        Error::NoFlush { file: self.file.to_string(), because }
    }
}
