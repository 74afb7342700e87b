//! Bytes that tell where they were meant to be and who wrote them.

/// A stream of bytes that depends on a seed and on the offset in the file, so that a piece in the
/// wrong place, or of another round, shows.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Pattern(pub u64);

impl Pattern {
    /// The byte at an offset; never zero, which is what an empty file holds.
    pub fn at(self, offset: u64) -> u8 {
        let mixed = (offset ^ self.0.rotate_left(32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        ((mixed >> 56) as u8) | 1
    }

    /// Fills a piece of the file.
    pub fn fill(self, offset: u64, piece: &mut [u8]) {
        for (byte, at) in piece.iter_mut().zip(offset..) {
            *byte = self.at(at);
        }
    }

    /// A piece of the file.
    pub fn bytes(self, offset: u64, len: usize) -> Vec<u8> {
        let mut piece = vec![0; len];
        self.fill(offset, &mut piece);
        piece
    }

    /// Fails with the first wrong byte, not with two pages of numbers.
    pub fn check(self, offset: u64, piece: &[u8], what: &str) {
        let wrong = piece.iter().zip(offset..).find(|(byte, at)| **byte != self.at(*at));
        if let Some((byte, at)) = wrong {
            panic!("{what}: byte {at} is {byte:#04x}, not {:#04x}", self.at(at));
        }
    }
}
