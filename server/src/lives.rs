//! Whether anybody else has changed a file between two guardings: pure.
//!
//! While a file is guarded nobody but this server changes its bytes. So its modification time when it
//! was let go is compared with that when it is guarded again. If they differ, a local process has
//! written, cut or grown the file meanwhile (or set its times), and a new *life* of the file begins. A
//! client that has lost its pin says of which life it was.
//!
//! Lives are remembered from run to run ([`state`](crate::state)). A run that was killed has let its
//! files go without a word. Such a file's life goes on if it has not changed since the last moment at
//! which that run is known to have held it.

use std::collections::{HashMap, VecDeque};

use pinfold_leases::FileIdentity;

use crate::ids::Life;

/// Files that are remembered after they were let go: the last ones. Of others a new life begins.
pub(crate) const MOST_FILES: usize = 16_384;

/// How a file was let go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Past {
    /// Modified last at this time; `None`: that is not known.
    Free { modified_ns: Option<u64> },
    /// By a run that was killed after this time, up to which it held the file.
    Left { alive_ns: u64 },
}

impl Past {
    /// `changed_ns` is when the file's inode had changed last before it was opened: a process can set
    /// the time of its bytes back, and not that.
    fn goes_on(self, changed_ns: Option<u64>, modified_ns: Option<u64>) -> bool {
        match self {
            Past::Free { modified_ns: then } => then.is_some() && then == modified_ns,
            Past::Left { alive_ns } => {
                let is_old = |time: Option<u64>| time.is_some_and(|time| time < alive_ns);
                is_old(changed_ns) && is_old(modified_ns)
            }
        }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Lives {
    incarnation: u64,
    of: HashMap<FileIdentity, Known>,
    /// Each letting-go, the oldest first.
    let_go: VecDeque<(u64, FileIdentity)>,
    last_life: u64,
    last_letting_go: u64,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    life: Life,
    /// Absent while it is guarded.
    let_go: Option<LetGo>,
}

#[derive(Clone, Copy, Debug)]
struct LetGo {
    number: u64,
    past: Past,
}

impl Lives {
    /// Of the run of the server that has this incarnation.
    pub(crate) fn new(incarnation: u64) -> Self {
        Self {
            incarnation,
            of: HashMap::new(),
            let_go: VecDeque::new(),
            last_life: 0,
            last_letting_go: 0,
        }
    }

    /// Takes in what an earlier run knew of a file.
    pub(crate) fn remember(&mut self, file: FileIdentity, life: Life, past: Past) {
        self.of.insert(file, Known { life, let_go: None });
        self.note(file, past);
    }

    /// The file is guarded. Its inode had changed last at `changed_ns` before it was opened, and now its
    /// bytes were modified last at `modified_ns`. Says which life it is in.
    pub(crate) fn guarded(
        &mut self,
        file: FileIdentity,
        changed_ns: Option<u64>,
        modified_ns: Option<u64>,
    ) -> Life {
        let goes_on = |known: &&Known| {
            known.let_go.is_none_or(|let_go| let_go.past.goes_on(changed_ns, modified_ns))
        };
        let life = match self.of.get(&file).filter(goes_on) {
            Some(known) => known.life,
            None => {
                self.last_life += 1;
                Life { incarnation: self.incarnation, counter: self.last_life }
            }
        };
        self.of.insert(file, Known { life, let_go: None });
        life
    }

    /// The file was let go, fenced; it was modified last at this time. `None`: that is not known, or
    /// somebody has had the file already. Says which life it was in.
    pub(crate) fn let_go(&mut self, file: FileIdentity, modified_ns: Option<u64>) -> Option<Life> {
        let life = self.of.get(&file)?.life;
        self.note(file, Past::Free { modified_ns });
        Some(life)
    }

    fn note(&mut self, file: FileIdentity, past: Past) {
        let Some(known) = self.of.get_mut(&file) else { return };
        self.last_letting_go += 1;
        let number = self.last_letting_go;
        known.let_go = Some(LetGo { number, past });
        self.let_go.push_back((number, file));
        while self.let_go.len() > MOST_FILES {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let Some((number, file)) = self.let_go.pop_front() else { return };
        // Unless it was guarded or let go since.
        let is_old = |known: &Known| known.let_go.is_some_and(|let_go| let_go.number == number);
        if self.of.get(&file).is_some_and(is_old) {
            self.of.remove(&file);
        }
    }

    /// This server has changed a file that it did not guard, and no byte that was there: its
    /// modification times before and after that. Says which life it is in, if that goes on.
    pub(crate) fn grown(
        &mut self,
        file: FileIdentity,
        before: Option<u64>,
        after: Option<u64>,
    ) -> Option<Life> {
        let known = self.of.get_mut(&file)?;
        let let_go = known.let_go.as_mut()?;
        if let_go.past != (Past::Free { modified_ns: before }) {
            return None;
        }
        let_go.past = Past::Free { modified_ns: after };
        Some(known.life)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };
    const OTHER: FileIdentity = FileIdentity { inode: 4, ..FILE };

    #[test]
    fn a_file_that_nobody_changed_lives_on() {
        let mut lives = Lives::new(7);
        let life = lives.guarded(FILE, Some(0), Some(10));
        assert_ne!(lives.guarded(OTHER, Some(0), Some(10)), life);
        // What clients write moves the time too.
        lives.let_go(FILE, Some(11));
        assert_eq!(lives.guarded(FILE, Some(0), Some(11)), life);
        lives.let_go(FILE, Some(12));
        assert_ne!(lives.guarded(FILE, Some(0), Some(13)), life);
    }

    #[test]
    fn a_time_that_is_not_known_is_no_proof() {
        let mut lives = Lives::new(7);
        let life = lives.guarded(FILE, Some(0), Some(10));
        lives.let_go(FILE, None);
        let next = lives.guarded(FILE, Some(0), Some(10));
        assert_ne!(next, life);
        lives.let_go(FILE, Some(10));
        assert_ne!(lives.guarded(FILE, Some(0), None), next);
        lives.let_go(FILE, None);
        assert_ne!(lives.guarded(FILE, Some(0), None), next);
    }

    #[test]
    fn what_the_server_grew_itself_lives_on() {
        let mut lives = Lives::new(7);
        let life = lives.guarded(FILE, Some(0), Some(10));
        lives.let_go(FILE, Some(11));
        lives.grown(FILE, Some(11), Some(20));
        assert_eq!(lives.guarded(FILE, Some(0), Some(20)), life);
        lives.let_go(FILE, Some(20));
        // Somebody came before.
        lives.grown(FILE, Some(25), Some(30));
        assert_ne!(lives.guarded(FILE, Some(0), Some(30)), life);
        lives.grown(OTHER, Some(1), Some(2));
    }

    #[test]
    fn it_remembers_so_many_files_and_those_that_are_guarded() {
        let mut lives = Lives::new(7);
        let file = |inode| FileIdentity { inode, ..FILE };
        let guarded = lives.guarded(file(u64::MAX), Some(0), Some(1));
        let first = lives.guarded(file(0), Some(0), Some(1));
        lives.let_go(file(0), Some(1));
        let again = lives.guarded(file(0), Some(0), Some(1));
        assert_eq!(again, first);
        for inode in 1..=2 * MOST_FILES as u64 {
            lives.guarded(file(inode), Some(0), Some(1));
            lives.let_go(file(inode), Some(1));
        }
        assert_eq!(lives.of.len(), MOST_FILES + 2);
        lives.let_go(file(0), Some(1));
        lives.let_go(file(u64::MAX), Some(1));
        assert_eq!(lives.guarded(file(0), Some(0), Some(1)), first);
        assert_eq!(lives.guarded(file(u64::MAX), Some(0), Some(1)), guarded);
        assert!(lives.guarded(file(1), Some(0), Some(1)).counter > 2 * MOST_FILES as u64);
    }

    #[test]
    fn a_run_that_was_killed_says_nothing_of_what_came_after_its_last_sign() {
        let life = Life { incarnation: 3, counter: 9 };
        let guarded = |changed, modified| {
            let mut lives = Lives::new(7);
            lives.remember(FILE, life, Past::Left { alive_ns: 100 });
            lives.guarded(FILE, changed, modified)
        };
        assert_eq!(guarded(Some(99), Some(99)), life);
        for (changed, modified) in [
            (Some(100), Some(100)),
            (Some(500), Some(50)),
            (Some(50), Some(500)),
            (None, Some(50)),
            (Some(50), None),
        ] {
            let next = guarded(changed, modified);
            assert_eq!((next.incarnation, next.counter), (7, 1), "{changed:?} {modified:?}");
        }
    }

    #[test]
    fn an_earlier_runs_word_counts_as_this_ones() {
        let life = Life { incarnation: 3, counter: 9 };
        let mut lives = Lives::new(7);
        lives.remember(FILE, life, Past::Free { modified_ns: Some(10) });
        assert_eq!(lives.grown(FILE, Some(10), Some(12)), Some(life));
        assert_eq!(lives.guarded(FILE, Some(0), Some(12)), life);
        assert_eq!(lives.let_go(FILE, Some(13)), Some(life));
        assert_ne!(lives.guarded(FILE, Some(0), Some(14)), life);
    }
}
