//! Whoever was let into a file goes first.
//!
//! Who opens or truncates a file has it, in the kernel's eyes, from before we let go until they
//! close it. Who unlinks, renames, links or changes modes has nothing: the kernel wakes them up, and
//! they start anew, walking the path and taking the locks of its folders (`do_unlinkat`,
//! `do_renameat2` in fs/namei.c). A file that is guarded again before they are there holds them up
//! again, and clients who pin again at once can do so for ever. So after a break a file stays
//! unguarded until its change time moves, which all of these do to it, or else for a pause that
//! doubles each time that it was too short. Who reads, as `find` and backups do, leaves no trace:
//! for them the pause bounds how often the clients of a file are told to go away.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use pinfold_leases::FileIdentity;

/// The first pause: far longer than a process needs that has a processor.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Shorter than a pin is ready to wait for a revocation.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A file that was guarded for so long begins anew.
const REMEMBERED: Duration = Duration::from_secs(10);
/// How long somebody may take to get there of whom /proc shows no descriptor, as of truncate(2).
const ON_THE_WAY: Duration = Duration::from_secs(2);

/// Files that were let go for somebody a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Passages {
    of: HashMap<FileIdentity, Passage>,
    /// Each beginning, the oldest first: so that forgetting costs nothing when thousands begin.
    begun: VecDeque<(Instant, FileIdentity)>,
}

#[derive(Clone, Copy, Debug)]
struct Passage {
    at: Instant,
    /// `st_ctime` in nanoseconds, if it could be read.
    changed_ns: Option<u64>,
    /// How often in a row the file was guarded again without a sign that they had passed.
    unseen: u32,
    /// They have passed.
    over: bool,
}

impl Passage {
    fn pause(&self) -> Duration {
        FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(self.unseen)).min(LONGEST_PAUSE)
    }
}

impl Passages {
    /// The file was let go for somebody; `changed_ns` is its change time before that.
    pub(crate) fn begin(&mut self, file: FileIdentity, changed_ns: Option<u64>, now: Instant) {
        self.forget(now);
        let unseen = match self.of.get(&file) {
            Some(last) if !last.over => last.unseen.saturating_add(1),
            _ => 0,
        };
        self.of.insert(file, Passage { at: now, changed_ns, unseen, over: false });
        self.begun.push_back((now, file));
    }

    fn forget(&mut self, now: Instant) {
        let is_old = |at: Instant| now.duration_since(at) >= REMEMBERED;
        while let Some((_, file)) = self.begun.front().copied().filter(|(at, _)| is_old(*at)) {
            self.begun.pop_front();
            // Unless another passage has begun since.
            if self.of.get(&file).is_some_and(|passage| is_old(passage.at)) {
                self.of.remove(&file);
            }
        }
    }

    /// Whether nobody is on their way that we know of, so that the file can be guarded.
    pub(crate) fn is_over(
        &mut self,
        file: FileIdentity,
        changed_ns: Option<u64>,
        now: Instant,
    ) -> bool {
        let Some(passage) = self.of.get_mut(&file) else { return true };
        passage.over |= changed_ns.is_some() && changed_ns != passage.changed_ns;
        passage.over || now.duration_since(passage.at) >= passage.pause()
    }

    /// Whether somebody may still be on their way into the file.
    pub(crate) fn is_recent(&self, file: FileIdentity, now: Instant) -> bool {
        self.of.get(&file).is_some_and(|passage| now.duration_since(passage.at) < ON_THE_WAY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };
    const OTHER: FileIdentity = FileIdentity { inode: 4, ..FILE };
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_file_that_nobody_wanted_is_free() {
        let now = Instant::now();
        let mut passages = Passages::default();
        passages.begin(OTHER, Some(7), now);
        assert!(passages.is_over(FILE, Some(7), now));
        assert!(!passages.is_recent(FILE, now));
        assert!(!passages.is_over(OTHER, Some(7), now));
        assert!(passages.is_recent(OTHER, now));
    }

    #[test]
    fn a_change_to_the_file_ends_the_pause() {
        let now = Instant::now();
        let mut passages = Passages::default();
        passages.begin(FILE, Some(7), now);
        assert!(!passages.is_over(FILE, Some(7), now + MS));
        assert!(passages.is_over(FILE, Some(8), now + MS));
        assert!(passages.is_over(FILE, None, now + MS), "what was seen was seen");
        passages.begin(FILE, Some(9), now + 2 * MS);
        assert!(passages.is_over(FILE, Some(9), now + 2 * MS + FIRST_PAUSE), "it begins anew");
    }

    #[test]
    fn the_pause_doubles_while_there_is_no_sign() {
        let mut now = Instant::now();
        let mut passages = Passages::default();
        let mut pauses = Vec::new();
        for _ in 0..9 {
            passages.begin(FILE, Some(7), now);
            let began = now;
            while !passages.is_over(FILE, Some(7), now) {
                now += MS;
            }
            pauses.push((now - began).as_millis());
        }
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        now += REMEMBERED;
        passages.begin(FILE, Some(7), now);
        assert!(passages.is_over(FILE, Some(7), now + FIRST_PAUSE), "it was calm for long");
    }

    #[test]
    fn a_change_time_that_cannot_be_read_is_no_sign() {
        let now = Instant::now();
        let mut passages = Passages::default();
        passages.begin(FILE, Some(7), now);
        assert!(!passages.is_over(FILE, None, now));
        assert!(passages.is_over(FILE, None, now + FIRST_PAUSE));
    }

    #[test]
    fn a_long_quiet_life_under_guard_is_forgotten() {
        let now = Instant::now();
        let mut passages = Passages::default();
        passages.begin(FILE, Some(7), now);
        passages.begin(OTHER, Some(7), now + REMEMBERED);
        assert_eq!(passages.of.len(), 1);
    }
}
