//! What is said before and after each step, one line each: `crash-intent PLACE JSON` and
//! `crash-ack PLACE JSON`. `xtask/src/crash.rs` counts the latter.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::place::Place;

const INTENT: &str = "crash-intent";
const ACKNOWLEDGED: &str = "crash-ack";

/// A step, before it is taken or once the server has acknowledged it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub enum Said {
    /// A file of this size is asked for.
    Creating {
        /// Its number.
        file: u64,
        /// Bytes.
        size: u64,
    },
    /// It is there.
    Created {
        /// Its number.
        file: u64,
    },
    /// A file is to have this size.
    Growing {
        /// Its number.
        file: u64,
        /// Bytes.
        size: u64,
    },
    /// It has.
    Grew {
        /// Its number.
        file: u64,
    },
    /// What was written to this range is durable.
    Committed {
        /// Its number.
        file: u64,
        /// Bytes.
        range: Range<u64>,
    },
    /// A file is to go.
    Removing {
        /// Its number.
        file: u64,
    },
    /// It is gone.
    Removed {
        /// Its number.
        file: u64,
    },
}

impl Said {
    /// The file that it is about.
    pub fn file(&self) -> u64 {
        match *self {
            Self::Creating { file, .. }
            | Self::Created { file }
            | Self::Growing { file, .. }
            | Self::Grew { file }
            | Self::Committed { file, .. }
            | Self::Removing { file }
            | Self::Removed { file } => file,
        }
    }

    fn word(&self) -> &'static str {
        match self {
            Self::Creating { .. } | Self::Growing { .. } | Self::Removing { .. } => INTENT,
            Self::Created { .. }
            | Self::Grew { .. }
            | Self::Committed { .. }
            | Self::Removed { .. } => ACKNOWLEDGED,
        }
    }

    /// As a line, with its end.
    pub fn line(&self, place: Place) -> String {
        let json = serde_json::to_string(self).expect("plain data");
        format!("{} {place} {json}\n", self.word())
    }

    /// Reads a line, if it is about this place.
    pub fn of_line(line: &str, place: Place) -> Option<Self> {
        let mut words = line.splitn(3, ' ');
        let (word, at, json) = (words.next()?, words.next()?, words.next()?);
        let is_ours = [INTENT, ACKNOWLEDGED].contains(&word) && at == place.to_string();
        is_ours.then(|| serde_json::from_str(json).expect("a line of ours"))
    }
}

/// A file's name in its export.
pub fn name(file: u64) -> String {
    format!("file-{file}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_for_its_own_place() {
        let said = Said::Committed { file: 7, range: 5..9 };
        let line = said.line(Place::Xfs);
        assert_eq!(
            line,
            "crash-ack xfs {\"Committed\":{\"file\":7,\"range\":{\"start\":5,\"end\":9}}}\n"
        );
        assert_eq!(Said::of_line(line.trim_end(), Place::Xfs), Some(said));
        assert_eq!(Said::of_line(line.trim_end(), Place::Ext4), None);
        assert_eq!(Said::of_line("pinfoldd: listening", Place::Xfs), None);
        assert!(Said::Removing { file: 1 }.line(Place::Ext4).starts_with("crash-intent ext4 "));
    }
}
