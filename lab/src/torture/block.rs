//! A block that tells where it was meant to be and who wrote it.

use std::fmt;
use std::ops::Range;

use crate::Random;

/// Bytes of a block: a page, which one request writes as a whole or not at all.
pub const BLOCK: usize = 4096;
/// Blocks of a file.
pub const BLOCKS: u32 = 64;
/// Bytes of a file.
pub const FILE: usize = BLOCK * BLOCKS as usize;
/// Blocks that one writer has for itself, after the first block, which names the file's life.
const AREA: u32 = 10;

const REMOTE: u64 = u64::from_le_bytes(*b"PFREMOTE");
const LOCAL: u64 = u64::from_le_bytes(*b"PFLOCAL.");
const WORDS: usize = BLOCK / 8;
const HEAD_WORDS: usize = 7;

/// The blocks that a writer may write.
pub fn area(writer: u32) -> Range<u32> {
    let start = 1 + writer * AREA;
    start..start + AREA
}

/// Who may write a block; none for those that only local processes write.
pub fn owner(index: u32) -> Option<u32> {
    let writer = index.checked_sub(1)? / AREA;
    (area(writer).end <= BLOCKS).then_some(writer)
}

/// By which way a block came into the file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Way {
    /// A client wrote it.
    Remote,
    /// A local process did.
    Local,
}

/// What stands in a block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Block {
    /// How it came.
    pub way: Way,
    /// Which client; 0 for a local process.
    pub writer: u32,
    /// For which file.
    pub file: u32,
    /// For which place in it.
    pub index: u32,
    /// For which life of the file: between two changes by local processes.
    pub life: u64,
    /// Under which generation of the pin; 0 for a local process.
    pub generation: u64,
    /// The writer's count.
    pub sequence: u64,
}

/// What is found where a block should be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Found {
    /// A whole block.
    Whole(Block),
    /// The head of a block, with other bytes behind it.
    Torn(Block),
    /// Zeroes only.
    Zeroes,
    /// Bytes of nobody's.
    Unknown([u8; 16]),
}

impl Block {
    /// A local process's block.
    pub fn local(file: u32, index: u32, life: u64) -> Self {
        Self { way: Way::Local, writer: 0, file, index, life, generation: 0, sequence: 0 }
    }

    /// Fills a block's bytes: the head, a stream that depends on it, and a checksum over both.
    pub fn fill(&self, bytes: &mut [u8]) {
        let head = self.head();
        let mut random = Random::new(head.iter().fold(0, |sum, word| mix(sum, *word)));
        let mut sum = 0;
        for (at, place) in bytes.chunks_exact_mut(8).enumerate() {
            let word = match at {
                at if at < HEAD_WORDS => head[at],
                at if at == WORDS - 1 => sum,
                _ => random.next_number(),
            };
            sum = mix(sum, word);
            place.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn head(&self) -> [u64; HEAD_WORDS] {
        let magic = match self.way {
            Way::Remote => REMOTE,
            Way::Local => LOCAL,
        };
        [
            magic,
            self.writer.into(),
            self.file.into(),
            self.index.into(),
            self.life,
            self.generation,
            self.sequence,
        ]
    }

    fn from_head(head: [u64; HEAD_WORDS]) -> Option<Self> {
        let way = match head[0] {
            REMOTE => Way::Remote,
            LOCAL => Way::Local,
            _ => return None,
        };
        let [_, writer, file, index, life, generation, sequence] = head;
        let (writer, file, index) =
            (writer.try_into().ok()?, file.try_into().ok()?, index.try_into().ok()?);
        Some(Self { way, writer, file, index, life, generation, sequence })
    }

    /// Reads what is there.
    pub fn find(bytes: &[u8]) -> Found {
        let mut words = bytes.chunks_exact(8).map(|word| {
            let word: [u8; 8] = word.try_into().expect("eight bytes");
            u64::from_le_bytes(word)
        });
        let head: [u64; HEAD_WORDS] = std::array::from_fn(|_| words.next().unwrap_or_default());
        let Some(block) = Self::from_head(head) else {
            let first = std::array::from_fn(|at| bytes.get(at).copied().unwrap_or_default());
            let empty = bytes.iter().all(|byte| *byte == 0);
            return if empty { Found::Zeroes } else { Found::Unknown(first) };
        };
        let mut sum = head.iter().fold(0, |sum, word| mix(sum, *word));
        let mut last = 0;
        for (at, word) in (HEAD_WORDS..).zip(words) {
            last = word;
            if at < WORDS - 1 {
                sum = mix(sum, word);
            }
        }
        if last == sum { Found::Whole(block) } else { Found::Torn(block) }
    }
}

fn mix(sum: u64, word: u64) -> u64 {
    (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { writer, file, index, life, generation, sequence, .. } = self;
        match self.way {
            Way::Local => write!(f, "a local block for file {file}, block {index}, life {life}"),
            Way::Remote => write!(
                f,
                "a remote block by writer {writer} for file {file}, block {index}, life {life}, \
                 generation {generation}, sequence {sequence:#x}"
            ),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(block) => block.fmt(f),
            Self::Torn(block) => write!(f, "a piece of {block}"),
            Self::Zeroes => f.write_str("zeroes"),
            Self::Unknown(bytes) => write!(f, "bytes of nobody's: {bytes:02x?}"),
        }
    }
}
