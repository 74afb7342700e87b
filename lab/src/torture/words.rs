//! What the rig and its clients tell each other: one JSON object per line of stdin and stdout.

use serde::{Deserialize, Serialize};

/// How a client behaves.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub enum Kind {
    /// Drains when it is told.
    Drains,
    /// The same by the stream path.
    Streams,
    /// Goes on until it is cut off.
    Ignores,
    /// Past the library's bookkeeping; goes on with its old key after it was cut off.
    Hammers,
    /// Past the library's bookkeeping; keeps its queue pair whole when the file is wanted, and
    /// writes with its old key as soon as the file, or an address, has a new owner.
    Ambushes,
    /// Makes files, pins them, and gives them back: the next ones that get mapped.
    MakesFiles,
}

/// A client's orders.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Role {
    /// How it behaves.
    pub kind: Kind,
    /// Its number, which says what it may write.
    pub writer: u32,
    /// The files that it writes.
    pub files: Vec<u32>,
    /// Where the server is.
    pub url: String,
    /// How many processes have had this role before.
    pub incarnation: u64,
    /// Of the run.
    pub seed: u64,
}

/// What a client says.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Said {
    /// It has a pin.
    Pinned {
        /// Of this file.
        file: u32,
        /// In this life.
        life: u64,
        /// Under this generation.
        generation: u64,
    },
    /// A write was acknowledged.
    Wrote {
        /// To this file.
        file: u32,
        /// In this life.
        life: u64,
        /// From this block on.
        first: u32,
        /// So many blocks.
        count: u32,
        /// The writer's count.
        sequence: u64,
    },
    /// A write was not acknowledged.
    Failed {
        /// To this file.
        file: u32,
        /// Why.
        why: String,
    },
    /// Its writes up to this one are durable.
    Committed {
        /// To this file.
        file: u32,
        /// In this life.
        life: u64,
        /// The writer's count.
        sequence: u64,
    },
    /// A commit came too late.
    Stale {
        /// To this file.
        file: u32,
    },
    /// A write with an old key was refused.
    Refused {
        /// To this file.
        file: u32,
    },
    /// A write with a key that was to be dead, sooner or later, was acknowledged.
    Landed {
        /// To this file.
        file: u32,
    },
    /// Another file was mapped.
    Mapped,
    /// A new file was given back: it can be checked and removed.
    GaveBack {
        /// Its number, in its name and in its blocks.
        number: u64,
        /// Block and the writer's count, of each write that was acknowledged.
        acknowledged: Vec<(u32, u64)>,
    },
    /// Something is there that can't be.
    Odd {
        /// In this file.
        file: u32,
        /// What.
        what: String,
    },
}

/// What a client is told.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Told {
    /// A local process has this file, and has written to it.
    Rewritten {
        /// Which.
        file: u32,
    },
    /// Another file was mapped.
    Mapped,
    /// A file that it gave back was checked and removed.
    Checked {
        /// Which.
        number: u64,
    },
}

/// A pinned file's name.
pub fn file_name(file: u32) -> String {
    format!("file-{file}")
}

/// The name of a file that a client makes.
pub fn new_name(number: u64) -> String {
    format!("{NEW}{number:x}")
}

/// What all those names begin with.
pub const NEW: &str = "new-";
/// What stands in their blocks as the file's number.
pub const NEW_FILE: u32 = u32::MAX;
