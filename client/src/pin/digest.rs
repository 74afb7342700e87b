//! What the file has, without carrying it: digests by the server's processor.

use pinfold_proto::v1;

use super::Pin;
use crate::Error;

impl Pin {
    /// Longest stretch that one [`digest`](Self::digest) is of, in bytes.
    pub fn digest_bytes_max(&self) -> usize {
        usize::try_from(self.core.stream_piece_bytes_max.get()).unwrap_or(usize::MAX)
    }

    /// BLAKE3 of `len` bytes at `offset` in the file, as the server's processor reads them: what is compared
    /// with it does not travel, and a device that misplaces data both ways does not deceive it. Writes to
    /// the pin that have returned count.
    ///
    /// # Errors
    ///
    /// [`Error::Draining`], [`Error::Revoked`], and [`Error::Refused`], among others for more than
    /// [`digest_bytes_max`](Self::digest_bytes_max), bytes that are not pinned, or a server that is too
    /// old for this (`Unimplemented`).
    pub async fn digest(&self, offset: u64, len: usize) -> Result<[u8; 32], Error> {
        self.check()?;
        let range = offset..offset.saturating_add(len as u64);
        self.cell.settled(&range).await;
        self.prove_writes().await?;
        let doing = || format!("tell the digest of {len} bytes at byte {offset} of {}", self.file);
        let request = v1::DigestRequest {
            session_id: self.core.control.session_id.clone(),
            pin_id: self.grant.pin_id,
            generation: Some(self.grant.generation.into()),
            offset,
            // More than this is more than the server takes.
            length: u32::try_from(len).unwrap_or(u32::MAX),
        };
        let call = self.core.control.call(doing, async |mut client| client.digest(request).await);
        let answer = self.explained(call.await).await?;
        answer.blake3.try_into().map_err(|_| Error::Protocol {
            doing: doing(),
            what: "another number of bytes than a digest has",
        })
    }
}
