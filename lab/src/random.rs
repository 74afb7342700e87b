//! Random numbers that a seed repeats: for tests that must be able to fail in the same way again.

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random {
    seed: u64,
    state: u64,
}

impl Random {
    /// From a seed, which a failing test prints.
    pub fn new(seed: u64) -> Self {
        Self { seed, state: seed }
    }

    /// Where it began.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The next number.
    pub fn next_number(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is small enough for the bias not to matter.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.next_number() % limit as u64) as usize
    }

    /// Fills a piece with bytes.
    pub fn fill(&mut self, piece: &mut [u8]) {
        for chunk in piece.chunks_mut(8) {
            let bytes = self.next_number().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}
