//! Sparse files: which bytes of one are to be carried, and which are to be written.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// So many zeroes in a row, from a multiple of it on, become a hole. Smaller holes would leave files in
/// many pieces.
const GRAIN: usize = 64 << 10;

static ZEROES: [u8; GRAIN] = [0; GRAIN];

/// A file in pieces, without its holes: each starts at a multiple of the alignment, and is as long as a
/// request at most.
#[derive(Debug)]
pub(crate) struct Pieces {
    /// Of the file.
    len: u64,
    /// A multiple of the alignment.
    chunk: u64,
    alignment: u64,
    /// All before this was looked at.
    at: u64,
    /// And up to here it is known that there are bytes.
    data_end: u64,
}

impl Pieces {
    pub(crate) fn new(len: u64, chunk: usize, alignment: usize) -> Self {
        Self { len, chunk: chunk as u64, alignment: alignment as u64, at: 0, data_end: 0 }
    }

    /// The next piece. `data_from` finds the first bytes at an offset or behind it.
    pub(crate) fn next(
        &mut self,
        data_from: impl FnOnce(u64) -> io::Result<Option<Range<u64>>>,
    ) -> io::Result<Option<Range<u64>>> {
        if self.at >= self.data_end {
            let found = if self.at < self.len { data_from(self.at)? } else { None };
            let Some(data) = found.filter(|data| data.start < self.len) else {
                self.at = self.len;
                return Ok(None);
            };
            // What the rounding adds reads as zeroes.
            self.at = self.at.max(data.start - data.start % self.alignment);
            self.data_end = data.end.checked_next_multiple_of(self.alignment).unwrap_or(self.len);
            self.data_end = self.data_end.min(self.len);
        }
        let piece = self.at..self.data_end.min(self.at + self.chunk);
        self.at = piece.end;
        Ok(Some(piece))
    }
}

/// The first bytes at an offset or behind it that are no hole (`SEEK_DATA`, lseek(2)). A file system that
/// knows no holes has none.
pub(crate) fn data_from(file: &File, at: u64) -> io::Result<Option<Range<u64>>> {
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..u64::MAX)),
        Err(error) => return Err(error.into()),
    };
    match seek(file, SeekFrom::Hole(start)) {
        // Filled and emptied meanwhile: somebody is at it, and its reader will see what.
        Ok(end) if end <= start => Ok(Some(start..start + 1)),
        Ok(end) => Ok(Some(start..end)),
        // It was cut meanwhile.
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether there is a hole before the end.
pub(crate) fn has_holes(file: &File, len: u64) -> io::Result<bool> {
    Ok(data_from(file, 0)?.is_none_or(|data| data.start > 0 || data.end < len))
}

/// What is to be written of these bytes, so that the rest can be a hole.
pub(crate) fn not_zero(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for (index, grain) in bytes.chunks(GRAIN).enumerate() {
        if grain == &ZEROES[..grain.len()] {
            continue;
        }
        let start = index * GRAIN;
        match found.last_mut() {
            Some(last) if last.end == start => last.end += grain.len(),
            _ => found.push(start..start + grain.len()),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    /// Starts and ends; at most 16 bytes each, from a multiple of 4 on.
    fn pieces(len: u64, data: &[(u64, u64)]) -> Vec<(u64, u64)> {
        let mut pieces = Pieces::new(len, 16, 4);
        let find = |at| {
            let found = data.iter().find(|(_, end)| *end > at);
            Ok(found.map(|(start, end)| at.max(*start)..*end))
        };
        let next = || pieces.next(find).unwrap().map(|piece| (piece.start, piece.end));
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn a_file_without_holes_is_cut_into_requests() {
        assert_eq!(pieces(40, &[(0, 40)]), [(0, 16), (16, 32), (32, 40)]);
        assert_eq!(pieces(0, &[]), []);
        assert_eq!(pieces(3, &[(0, u64::MAX)]), [(0, 3)]);
    }

    #[test]
    fn holes_are_left_out_and_pieces_start_where_they_may() {
        assert_eq!(pieces(1000, &[]), []);
        assert_eq!(
            pieces(1000, &[(5, 7), (100, 101), (990, 1000)]),
            [(4, 8), (100, 104), (988, 1000)]
        );
        // Two stretches in one unit are carried once.
        assert_eq!(pieces(64, &[(1, 2), (3, 9)]), [(0, 4), (4, 12)]);
        assert_eq!(pieces(64, &[(0, 1), (2, 3)]), [(0, 4)]);
    }

    #[test]
    fn a_file_that_grew_is_carried_as_far_as_it_was() {
        assert_eq!(pieces(10, &[(0, 50)]), [(0, 10)]);
        assert_eq!(pieces(10, &[(20, 50)]), []);
    }

    #[test]
    fn grains_of_zeroes_are_not_written() {
        let mut bytes = vec![0; 5 * GRAIN + 7];
        assert_eq!(not_zero(&bytes), []);
        bytes[GRAIN] = 1;
        bytes[3 * GRAIN - 1] = 1;
        bytes[5 * GRAIN + 6] = 1;
        assert_eq!(not_zero(&bytes), [GRAIN..3 * GRAIN, 5 * GRAIN..5 * GRAIN + 7]);
        assert_eq!(not_zero(&[]), []);
    }

    #[test]
    fn the_kernel_tells_where_the_bytes_of_a_file_are() {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.set_len(8 << 20).unwrap();
        assert!(has_holes(&file, 8 << 20).unwrap());
        assert_eq!(data_from(&file, 0).unwrap(), None);
        file.write_all_at(&[1], 4 << 20).unwrap();
        let found = data_from(&file, 0).unwrap().unwrap();
        assert!(found.start <= 4 << 20 && found.end > 4 << 20, "{found:?}");
        assert!(found.end < 8 << 20, "a file system with holes: {found:?}");
        let full = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        full.write_all_at(&[1; 5000], 0).unwrap();
        assert!(!has_holes(&full, 5000).unwrap());
    }
}
