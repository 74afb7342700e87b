//! RDMA FLUSH: what was written before it on the same connection is on the persistent medium when it
//! completes, and the peer's processor did nothing for that (IBTA release 1.6, annex A19).

use crate::buffer::Buffer;
use crate::error::Error;
use crate::extended::{Chained, Lack};
use crate::lane::{Lane, Piece, PostError, RemoteSlice, check_remote};

/// Bytes of one request: its length has 32 bits in the packet, and what is beyond is lost silently.
const FLUSH_BYTES_MAX: u32 = 1 << 30;

impl<T: Send> Lane<T> {
    /// Why [`post_flush`](Self::post_flush) is not for this lane, if so.
    #[must_use]
    pub fn no_flush_because(&self) -> Option<Lack> {
        self.queue_pair().no_flush_because()
    }

    /// Starts to make ranges of the peer's memory persistent (RDMA FLUSH, placement type
    /// persistence). When it ends well, all that was posted on this lane before it and lies in the
    /// ranges is on the peer's medium, if that is one: the peer must promise that, its device can't.
    /// The region's owner must have given [`Access::remote_flush`](crate::Access::remote_flush), and
    /// the far end of the connection too.
    ///
    /// The buffer has no part in it. It comes back with the completion, as from every operation.
    ///
    /// # Errors
    ///
    /// [`PostError`] with everything in it; nothing was started. [`Error::NoFlush`] where this host
    /// can't; [`Error::QueueFull`], [`Error::NoPieces`], [`Error::EmptyPiece`],
    /// [`Error::PieceTooLong`] (of 1 GiB), [`Error::RemoteOverflow`], [`Error::PostSend`].
    pub fn post_flush(
        &self,
        buffer: Buffer,
        ranges: &[RemoteSlice],
        tag: T,
    ) -> Result<(), PostError<T>> {
        match check_ranges(ranges) {
            Ok(()) => self.post_extended(buffer, &[], flushes(ranges), tag),
            Err(error) => Err(PostError { buffer, tag, error }),
        }
    }

    /// As [`post_write`](Self::post_write), and behind it, with the same call, as
    /// [`post_flush`](Self::post_flush).
    ///
    /// # Errors
    ///
    /// Those of both.
    pub fn post_write_flushed(
        &self,
        buffer: Buffer,
        pieces: &[Piece],
        ranges: &[RemoteSlice],
        tag: T,
    ) -> Result<(), PostError<T>> {
        match self.check(&buffer, pieces).and_then(|()| check_ranges(ranges)) {
            Ok(()) => self.post_extended(buffer, pieces, flushes(ranges), tag),
            Err(error) => Err(PostError { buffer, tag, error }),
        }
    }
}

fn flushes(ranges: &[RemoteSlice]) -> impl ExactSizeIterator<Item = Chained> {
    ranges.iter().map(|range| Chained::Flush(*range))
}

fn check_ranges(ranges: &[RemoteSlice]) -> Result<(), Error> {
    if ranges.is_empty() {
        return Err(Error::NoPieces);
    }
    let mut each = ranges.iter().enumerate();
    each.try_for_each(|(piece, range)| check_remote(piece, range, FLUSH_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::RemoteKey;

    #[test]
    fn ranges_are_checked() {
        let range = |address, len| RemoteSlice { address, key: RemoteKey::new(1), len };
        check_ranges(&[range(4096, 1), range(u64::MAX - 8, 8), range(0, 1 << 30)]).unwrap();
        assert!(matches!(check_ranges(&[]), Err(Error::NoPieces)));
        let wrong = |second| check_ranges(&[range(0, 1), second]).unwrap_err();
        assert!(matches!(wrong(range(0, 0)), Error::EmptyPiece { piece: 1 }));
        // What the kernel would cut to its lower 32 bits.
        assert!(matches!(wrong(range(0, (4 << 30) + 1)), Error::PieceTooLong { piece: 1, .. }));
        assert!(matches!(wrong(range(u64::MAX - 7, 8)), Error::RemoteOverflow { piece: 1 }));
    }
}
