//! One life of a file: what it must hold from one change by a local process to the next.

use std::fmt;

use super::block::{BLOCK, BLOCKS, Block, FILE, Found, Way, owner};

/// What a file holds and may hold.
#[derive(Clone, Debug)]
pub struct Life {
    /// Which file.
    pub file: u32,
    /// Which life; no two lives of any files have the same number.
    pub number: u64,
    /// What the local process left.
    pub base: Vec<u8>,
    /// The last write to each block that was acknowledged, and whether it was committed.
    acknowledged: Vec<Option<(u64, bool)>>,
}

/// What is wrong with a block.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Wrong {
    /// Something stands there that must not.
    Foreign {
        /// Where.
        index: u32,
        /// What.
        found: Found,
    },
    /// What was acknowledged is not there.
    Lost {
        /// Where.
        index: u32,
        /// What was acknowledged.
        sequence: u64,
        /// Whether as durable.
        committed: bool,
        /// What stands there instead.
        found: Found,
    },
    /// The file has another length.
    Length(usize),
}

impl Life {
    /// A file that a local process has written from end to end.
    pub fn fresh(file: u32, number: u64) -> Self {
        Self::after(file, number, local_bytes(file, number, 0..BLOCKS))
    }

    /// A file of which a local process has left this.
    pub fn after(file: u32, number: u64, base: Vec<u8>) -> Self {
        Self { file, number, base, acknowledged: vec![None; BLOCKS as usize] }
    }

    /// A write was acknowledged.
    pub fn acknowledge(&mut self, first: u32, count: u32, sequence: u64) {
        for index in first..first + count {
            self.acknowledged[index as usize] = Some((sequence, false));
        }
    }

    /// Everything of this writer that was acknowledged up to this write is durable.
    pub fn commit(&mut self, writer: u32, sequence: u64) {
        for index in super::block::area(writer) {
            if let Some((acknowledged, committed)) = &mut self.acknowledged[index as usize] {
                *committed |= *acknowledged <= sequence;
            }
        }
    }

    /// How many blocks have been written by clients.
    pub fn written(&self) -> usize {
        self.acknowledged.iter().flatten().count()
    }

    /// The first thing that is wrong, from the moment that nobody may write any more.
    pub fn check(&self, content: &[u8]) -> Result<(), Wrong> {
        if content.len() != self.base.len() {
            return Err(Wrong::Length(content.len()));
        }
        let blocks = content.chunks(BLOCK).zip(self.base.chunks(BLOCK));
        blocks.zip(0..).try_for_each(|((bytes, base), index)| self.check_block(index, bytes, base))
    }

    fn check_block(&self, index: u32, bytes: &[u8], base: &[u8]) -> Result<(), Wrong> {
        let acknowledged = self.acknowledged[index as usize];
        if acknowledged.is_none() && bytes == base {
            return Ok(());
        }
        let found = Block::find(bytes);
        let earliest = acknowledged.map_or(0, |(sequence, _)| sequence);
        let ours = match found {
            Found::Whole(block) if self.may_hold(index, &block) => {
                if block.sequence >= earliest {
                    return Ok(());
                }
                true
            }
            found => found == Found::Zeroes || bytes == base,
        };
        Err(match acknowledged {
            Some((sequence, committed)) if ours => {
                Wrong::Lost { index, sequence, committed, found }
            }
            _ => Wrong::Foreign { index, found },
        })
    }

    fn may_hold(&self, index: u32, block: &Block) -> bool {
        block.way == Way::Remote
            && (block.file, block.life, block.index) == (self.file, self.number, index)
            && owner(index) == Some(block.writer)
    }
}

/// The first block that is not as a local process has left it, while nobody else may write.
pub fn check_still(expected: &[u8], content: &[u8]) -> Result<(), Wrong> {
    if content.len() != expected.len() {
        return Err(Wrong::Length(content.len()));
    }
    let mut blocks = content.chunks(BLOCK).zip(expected.chunks(BLOCK)).zip(0..);
    let wrong = blocks.find(|((bytes, expected), _)| bytes != expected);
    wrong.map_or(Ok(()), |((bytes, _), index)| {
        Err(Wrong::Foreign { index, found: Block::find(bytes) })
    })
}

/// What a local process writes into these blocks.
pub fn local_bytes(file: u32, life: u64, blocks: std::ops::Range<u32>) -> Vec<u8> {
    let mut bytes = vec![0; blocks.len() * BLOCK];
    for (piece, index) in bytes.chunks_mut(BLOCK).zip(blocks) {
        Block::local(file, index, life).fill(piece);
    }
    bytes
}

/// Checks a file that was made for one client: its own blocks, and zeroes.
pub fn check_new(
    file: u32,
    number: u64,
    acknowledged: &[(u32, u64)],
    content: &[u8],
) -> Result<(), Wrong> {
    let mut life = Life::after(file, number, vec![0; FILE]);
    for (index, sequence) in acknowledged {
        life.acknowledge(*index, 1, *sequence);
    }
    life.check(content)
}

impl Wrong {
    /// One word for the result.
    pub fn check(&self) -> &'static str {
        match self {
            Self::Foreign { .. } => "foreign",
            Self::Lost { committed: true, .. } => "committed",
            Self::Lost { committed: false, .. } => "acknowledged",
            Self::Length(_) => "length",
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Foreign { index, found } => write!(f, "block {index} holds {found}"),
            Self::Lost { index, sequence, committed, found } => {
                let what = if *committed { "durable" } else { "written" };
                write!(
                    f,
                    "block {index} was acknowledged as {what} with sequence {sequence:#x}, "
                )?;
                write!(f, "and holds {found}")
            }
            Self::Length(len) => write!(f, "it has {len} bytes, not {FILE}"),
        }
    }
}
