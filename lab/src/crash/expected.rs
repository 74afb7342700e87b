//! What must be there after a power cut: from what was asked for and what was acknowledged before it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use super::words::Said;
use crate::Pattern;

/// All files of a place.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    files: BTreeMap<u64, File>,
}

/// A file, each byte of which is written once, with the pattern of the file's number.
#[derive(Clone, Debug, Default)]
struct File {
    created: bool,
    /// Its size was acknowledged.
    sure: u64,
    /// Its size was asked for, and that may have been done or not.
    asked: u64,
    committed: Vec<Range<u64>>,
    removal: Removal,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum Removal {
    #[default]
    None,
    Asked,
    Acknowledged,
}

/// What is wrong with a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Wrong {
    /// Its creation was acknowledged, and there is none.
    Missing,
    /// Its removal was acknowledged, and there is one.
    StillThere,
    /// It is shorter than was acknowledged, or longer than was asked for.
    Size {
        /// What it has.
        found: u64,
        /// What is right.
        right: (u64, u64),
    },
    /// A byte that was committed is another one.
    Lost {
        /// Where.
        at: u64,
        /// What is there.
        found: u8,
    },
    /// A byte that nobody committed is neither what was written there nor zero.
    Foreign {
        /// Where.
        at: u64,
        /// What is there.
        found: u8,
    },
}

impl Expected {
    /// Takes in the next word.
    pub fn hear(&mut self, said: &Said) {
        let file = self.files.entry(said.file()).or_default();
        match said {
            Said::Creating { size, .. } | Said::Growing { size, .. } => file.asked = *size,
            Said::Created { .. } => (file.created, file.sure) = (true, file.asked),
            Said::Grew { .. } => file.sure = file.asked,
            Said::Committed { range, .. } => file.committed.push(range.clone()),
            Said::Removing { .. } => file.removal = Removal::Asked,
            Said::Removed { .. } => file.removal = Removal::Acknowledged,
        }
    }

    /// The numbers of all files that were asked for.
    pub fn files(&self) -> impl Iterator<Item = u64> {
        self.files.keys().copied()
    }

    /// Judges what is there under a file's name.
    pub fn check(&self, number: u64, content: Option<&[u8]>) -> Result<(), Wrong> {
        let Some(file) = self.files.get(&number).filter(|file| file.created) else {
            // Nobody was promised anything.
            return Ok(());
        };
        match (content, file.removal) {
            (None, Removal::None) => Err(Wrong::Missing),
            (None, _) => Ok(()),
            (Some(_), Removal::Acknowledged) => Err(Wrong::StillThere),
            (Some(content), _) => file.check(Pattern(number), content),
        }
    }
}

impl File {
    fn check(&self, pattern: Pattern, content: &[u8]) -> Result<(), Wrong> {
        let found = content.len() as u64;
        if !(self.sure..=self.asked).contains(&found) {
            return Err(Wrong::Size { found, right: (self.sure, self.asked) });
        }
        for (&found, at) in content.iter().zip(0..) {
            let is_right = found == pattern.at(at);
            if !is_right && self.committed.iter().any(|range| range.contains(&at)) {
                return Err(Wrong::Lost { at, found });
            }
            if !is_right && found != 0 {
                return Err(Wrong::Foreign { at, found });
            }
        }
        Ok(())
    }
}

impl Wrong {
    /// One word for the result.
    pub fn check(&self) -> &'static str {
        match self {
            Self::Missing | Self::StillThere => "name",
            Self::Size { .. } => "size",
            Self::Lost { .. } => "committed",
            Self::Foreign { .. } => "foreign",
        }
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("it was created, and is not there"),
            Self::StillThere => f.write_str("it was removed, and is there"),
            Self::Size { found, right: (least, most) } => {
                write!(f, "it has {found} bytes, and not {least} to {most}")
            }
            Self::Lost { at, found } => write!(f, "byte {at} was committed, and is {found:#04x}"),
            Self::Foreign { at, found } => {
                write!(f, "byte {at} is {found:#04x}, which nobody wrote")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: u64 = 3;

    fn heard(words: &[Said]) -> Expected {
        let mut expected = Expected::default();
        words.iter().for_each(|said| expected.hear(said));
        expected
    }

    fn created() -> Vec<Said> {
        vec![Said::Creating { file: FILE, size: 10 }, Said::Created { file: FILE }]
    }

    fn and(more: &[Said]) -> Expected {
        heard(&[&created()[..], more].concat())
    }

    #[test]
    fn only_what_was_acknowledged_is_promised() {
        let asked = heard(&created()[..1]);
        assert_eq!(asked.check(FILE, None), Ok(()));
        assert_eq!(asked.check(FILE, Some(b"")), Ok(()));
        assert_eq!(heard(&created()).check(FILE, None), Err(Wrong::Missing));
        let size = Wrong::Size { found: 9, right: (10, 10) };
        assert_eq!(heard(&created()).check(FILE, Some(&[0; 9])), Err(size));
        assert_eq!(heard(&created()).check(FILE, Some(&[0; 10])), Ok(()));
    }

    #[test]
    fn a_step_on_its_way_may_have_been_taken_or_not() {
        let growing = and(&[Said::Growing { file: FILE, size: 20 }]);
        assert_eq!(growing.check(FILE, Some(&[0; 10])), Ok(()));
        assert_eq!(growing.check(FILE, Some(&[0; 20])), Ok(()));
        assert!(growing.check(FILE, Some(&[0; 21])).is_err());
        let grew = and(&[Said::Growing { file: FILE, size: 20 }, Said::Grew { file: FILE }]);
        assert!(grew.check(FILE, Some(&[0; 10])).is_err());
        let removing = and(&[Said::Removing { file: FILE }]);
        assert_eq!(removing.check(FILE, None), Ok(()));
        assert_eq!(removing.check(FILE, Some(&[0; 10])), Ok(()));
        let removed = and(&[Said::Removing { file: FILE }, Said::Removed { file: FILE }]);
        assert_eq!(removed.check(FILE, None), Ok(()));
        assert_eq!(removed.check(FILE, Some(&[0; 10])), Err(Wrong::StillThere));
    }

    #[test]
    fn committed_bytes_are_there_and_no_foreign_ones() {
        let expected = and(&[Said::Committed { file: FILE, range: 2..4 }]);
        let mut content = [0; 10];
        assert_eq!(expected.check(FILE, Some(&content)), Err(Wrong::Lost { at: 2, found: 0 }));
        Pattern(FILE).fill(2, &mut content[2..7]);
        assert_eq!(expected.check(FILE, Some(&content)), Ok(()));
        content[9] = !Pattern(FILE).at(9);
        let foreign = Wrong::Foreign { at: 9, found: content[9] };
        assert_eq!(expected.check(FILE, Some(&content)), Err(foreign));
    }
}
