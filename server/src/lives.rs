//! Whether anybody else has changed a file between two guardings: pure.
//!
//! While a file is guarded nobody but this server changes its bytes. So its modification time when it
//! was let go and that when it is guarded again tell: if they differ, a local process has written,
//! cut or grown it meanwhile (or set its times), and a new *life* of the file begins. A client that
//! has lost its pin says of which life it was.

use std::collections::{HashMap, VecDeque};

use pinfold_leases::FileIdentity;

/// Files that are remembered after they were let go: the last ones. Of others a new life begins.
const MOST_FILES: usize = 16_384;

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Lives {
    of: HashMap<FileIdentity, Known>,
    /// Each letting-go, the oldest first.
    let_go: VecDeque<(u64, FileIdentity)>,
    last_life: u64,
    last_letting_go: u64,
}

#[derive(Clone, Copy, Debug)]
struct Known {
    life: u64,
    /// Absent while it is guarded.
    let_go: Option<LetGo>,
}

#[derive(Clone, Copy, Debug)]
struct LetGo {
    number: u64,
    modified_ns: Option<u64>,
}

impl Lives {
    /// The file is guarded, and was modified last at this time. Says which life it is in: a number that
    /// no other life of any file has.
    pub(crate) fn guarded(&mut self, file: FileIdentity, modified_ns: Option<u64>) -> u64 {
        let goes_on = |known: &&Known| match known.let_go {
            None => true,
            Some(let_go) => modified_ns.is_some() && let_go.modified_ns == modified_ns,
        };
        let life = match self.of.get(&file).filter(goes_on) {
            Some(known) => known.life,
            None => {
                self.last_life += 1;
                self.last_life
            }
        };
        self.of.insert(file, Known { life, let_go: None });
        life
    }

    /// The file is about to be let go, fenced; it was modified last at this time. `None`: that is not
    /// known, or somebody has had the file already.
    pub(crate) fn let_go(&mut self, file: FileIdentity, modified_ns: Option<u64>) {
        let Some(known) = self.of.get_mut(&file) else { return };
        self.last_letting_go += 1;
        let number = self.last_letting_go;
        known.let_go = Some(LetGo { number, modified_ns });
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
    /// modification times before and after that.
    pub(crate) fn grown(&mut self, file: FileIdentity, before: Option<u64>, after: Option<u64>) {
        let let_go = self.of.get_mut(&file).and_then(|known| known.let_go.as_mut());
        if let Some(let_go) = let_go.filter(|let_go| let_go.modified_ns == before) {
            let_go.modified_ns = after;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };
    const OTHER: FileIdentity = FileIdentity { inode: 4, ..FILE };

    #[test]
    fn a_file_that_nobody_changed_lives_on() {
        let mut lives = Lives::default();
        let life = lives.guarded(FILE, Some(10));
        assert_ne!(lives.guarded(OTHER, Some(10)), life);
        // What clients write moves the time too.
        lives.let_go(FILE, Some(11));
        assert_eq!(lives.guarded(FILE, Some(11)), life);
        lives.let_go(FILE, Some(12));
        assert_ne!(lives.guarded(FILE, Some(13)), life);
    }

    #[test]
    fn a_time_that_is_not_known_is_no_proof() {
        let mut lives = Lives::default();
        let life = lives.guarded(FILE, Some(10));
        lives.let_go(FILE, None);
        let next = lives.guarded(FILE, Some(10));
        assert_ne!(next, life);
        lives.let_go(FILE, Some(10));
        assert_ne!(lives.guarded(FILE, None), next);
        lives.let_go(FILE, None);
        assert_ne!(lives.guarded(FILE, None), next);
    }

    #[test]
    fn what_the_server_grew_itself_lives_on() {
        let mut lives = Lives::default();
        let life = lives.guarded(FILE, Some(10));
        lives.let_go(FILE, Some(11));
        lives.grown(FILE, Some(11), Some(20));
        assert_eq!(lives.guarded(FILE, Some(20)), life);
        lives.let_go(FILE, Some(20));
        // Somebody came before.
        lives.grown(FILE, Some(25), Some(30));
        assert_ne!(lives.guarded(FILE, Some(30)), life);
        lives.grown(OTHER, Some(1), Some(2));
    }

    #[test]
    fn it_remembers_so_many_files_and_those_that_are_guarded() {
        let mut lives = Lives::default();
        let file = |inode| FileIdentity { inode, ..FILE };
        let guarded = lives.guarded(file(u64::MAX), Some(1));
        let first = lives.guarded(file(0), Some(1));
        lives.let_go(file(0), Some(1));
        let again = lives.guarded(file(0), Some(1));
        assert_eq!(again, first);
        for inode in 1..=2 * MOST_FILES as u64 {
            lives.guarded(file(inode), Some(1));
            lives.let_go(file(inode), Some(1));
        }
        assert_eq!(lives.of.len(), MOST_FILES + 2);
        lives.let_go(file(0), Some(1));
        lives.let_go(file(u64::MAX), Some(1));
        assert_eq!(lives.guarded(file(0), Some(1)), first);
        assert_eq!(lives.guarded(file(u64::MAX), Some(1)), guarded);
        assert!(lives.guarded(file(1), Some(1)) > 2 * MOST_FILES as u64);
    }
}
