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
//!
//! A process that opens with `O_NONBLOCK` does not wait at all, and neither does nfsd for its clients:
//! they come back later, an NFS client after up to 15 s. A file that was guarded again by then would keep
//! them out for ever. So where nobody was seen waiting the file is left alone for longer than that, until
//! its change time moves or somebody opens it.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use pinfold_leases::FileIdentity;

/// The first pause: far longer than a process needs that has a processor.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// Shorter than a pin is ready to wait for a revocation.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A file that was guarded for so long begins anew.
const REMEMBERED: Duration = Duration::from_secs(10);
/// How long a file is left alone by default where nobody was seen waiting: longer than the longest pause
/// of those who try again by themselves.
pub const UNSEEN_PAUSE: Duration = Duration::from_secs(20);
/// As often at most is that time doubled while nobody comes.
const MOST_DOUBLINGS: u32 = 3;
/// For so long it is remembered that nobody came.
const REMEMBERED_UNSEEN: Duration = Duration::from_secs(600);
/// How long somebody may take to get there of whom /proc shows no descriptor, as of truncate(2).
const ON_THE_WAY: Duration = Duration::from_secs(2);

/// Files that were let go for somebody a moment ago.
#[derive(Debug)]
pub(crate) struct Passages {
    unseen_pause: Duration,
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
    /// Nobody was seen waiting.
    waits_for: Option<Visit>,
}

/// That somebody opens the file who did not wait.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Visit {
    pause: Duration,
    /// How often in a row nobody came.
    missed: u32,
    came: bool,
}

/// Whether anybody waits for a file that is let go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Waiting {
    /// Somebody was seen, or will not be told from one who was not.
    Seen,
    /// Nobody was seen, and it will be told when somebody opens the file.
    Unseen,
}

impl Passage {
    fn pause(&self) -> Duration {
        let short =
            FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(self.unseen)).min(LONGEST_PAUSE);
        short.max(self.awaited_visit().map_or(Duration::ZERO, |visit| visit.pause))
    }

    fn awaited_visit(&self) -> Option<Visit> {
        self.waits_for.filter(|visit| !visit.came)
    }

    fn is_remembered(&self, now: Instant) -> bool {
        let time = if self.awaited_visit().is_some() { REMEMBERED_UNSEEN } else { REMEMBERED };
        now.duration_since(self.at) < time
    }
}

impl Passages {
    /// Where nobody was seen waiting a file is left alone for so long.
    pub(crate) fn new(unseen_pause: Duration) -> Self {
        Self { unseen_pause, of: HashMap::new(), begun: VecDeque::new() }
    }

    /// The file was let go for somebody; `changed_ns` is its change time before that.
    pub(crate) fn begin(
        &mut self,
        file: FileIdentity,
        changed_ns: Option<u64>,
        waiting: Waiting,
        now: Instant,
    ) {
        self.forget(now);
        let last = self.of.get(&file).filter(|last| !last.over && last.is_remembered(now));
        let unseen = last.map_or(0, |last| last.unseen.saturating_add(1));
        let missed = last.and_then(Passage::awaited_visit).map_or(0, |visit| visit.missed + 1);
        let waits_for = (waiting == Waiting::Unseen).then(|| Visit {
            pause: self.unseen_pause.saturating_mul(1 << missed.min(MOST_DOUBLINGS)),
            missed,
            came: false,
        });
        self.of.insert(file, Passage { at: now, changed_ns, unseen, over: false, waits_for });
        self.begun.push_back((now, file));
    }

    fn forget(&mut self, now: Instant) {
        let is_old = |at: Instant| now.duration_since(at) >= REMEMBERED_UNSEEN;
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

    /// Somebody has opened the file. Later than the pause it may have been this server.
    pub(crate) fn visited(&mut self, file: FileIdentity, now: Instant) {
        if self.left_alone(file, now).is_none() {
            return;
        }
        let passage = self.of.get_mut(&file);
        if let Some(visit) = passage.and_then(|passage| passage.waits_for.as_mut()) {
            visit.came = true;
        }
    }

    /// How long a file is still left alone for somebody who did not wait; `None`: it is not.
    pub(crate) fn left_alone(&self, file: FileIdentity, now: Instant) -> Option<Duration> {
        let passage = self.of.get(&file).filter(|passage| !passage.over)?;
        let left = passage.awaited_visit()?.pause.checked_sub(now.duration_since(passage.at))?;
        (!left.is_zero()).then_some(left)
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
        let mut passages = Passages::new(UNSEEN_PAUSE);
        passages.begin(OTHER, Some(7), Waiting::Seen, now);
        assert!(passages.is_over(FILE, Some(7), now));
        assert!(!passages.is_recent(FILE, now));
        assert!(!passages.is_over(OTHER, Some(7), now));
        assert!(passages.is_recent(OTHER, now));
    }

    #[test]
    fn a_change_to_the_file_ends_the_pause() {
        let now = Instant::now();
        let mut passages = Passages::new(UNSEEN_PAUSE);
        passages.begin(FILE, Some(7), Waiting::Seen, now);
        assert!(!passages.is_over(FILE, Some(7), now + MS));
        assert!(passages.is_over(FILE, Some(8), now + MS));
        assert!(passages.is_over(FILE, None, now + MS), "what was seen was seen");
        passages.begin(FILE, Some(9), Waiting::Seen, now + 2 * MS);
        assert!(passages.is_over(FILE, Some(9), now + 2 * MS + FIRST_PAUSE), "it begins anew");
    }

    #[test]
    fn the_pause_doubles_while_there_is_no_sign() {
        let mut now = Instant::now();
        let mut passages = Passages::new(UNSEEN_PAUSE);
        let mut pauses = Vec::new();
        for _ in 0..9 {
            passages.begin(FILE, Some(7), Waiting::Seen, now);
            let began = now;
            while !passages.is_over(FILE, Some(7), now) {
                now += MS;
            }
            pauses.push((now - began).as_millis());
        }
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1280, 2000, 2000]);
        now += REMEMBERED;
        passages.begin(FILE, Some(7), Waiting::Seen, now);
        assert!(passages.is_over(FILE, Some(7), now + FIRST_PAUSE), "it was calm for long");
    }

    #[test]
    fn a_change_time_that_cannot_be_read_is_no_sign() {
        let now = Instant::now();
        let mut passages = Passages::new(UNSEEN_PAUSE);
        passages.begin(FILE, Some(7), Waiting::Seen, now);
        assert!(!passages.is_over(FILE, None, now));
        assert!(passages.is_over(FILE, None, now + FIRST_PAUSE));
    }

    #[test]
    fn a_long_quiet_life_under_guard_is_forgotten() {
        let now = Instant::now();
        let mut passages = Passages::new(UNSEEN_PAUSE);
        passages.begin(FILE, Some(7), Waiting::Seen, now);
        passages.begin(OTHER, Some(7), Waiting::Seen, now + REMEMBERED_UNSEEN);
        assert_eq!(passages.of.len(), 1);
    }

    fn pause_of(passages: &mut Passages, now: Instant) -> Duration {
        let mut pause = Duration::ZERO;
        while !passages.is_over(FILE, Some(7), now + pause) {
            pause += Duration::from_millis(20);
        }
        pause
    }

    #[test]
    fn where_nobody_was_seen_waiting_the_file_is_left_alone_until_somebody_opens_or_changes_it() {
        let now = Instant::now();
        let mut passages = Passages::new(UNSEEN_PAUSE);
        passages.begin(FILE, Some(7), Waiting::Unseen, now);
        assert_eq!(pause_of(&mut passages, now), UNSEEN_PAUSE);
        assert_eq!(passages.left_alone(FILE, now + MS), Some(UNSEEN_PAUSE - MS));
        assert_eq!(passages.left_alone(FILE, now + UNSEEN_PAUSE), None);
        assert_eq!(passages.left_alone(OTHER, now), None);
        passages.visited(FILE, now + MS);
        passages.visited(OTHER, now + MS);
        assert_eq!(
            pause_of(&mut passages, now),
            FIRST_PAUSE,
            "one that reads leaves no other trace"
        );
        assert_eq!(passages.left_alone(FILE, now + MS), None);

        passages.begin(FILE, Some(8), Waiting::Unseen, now);
        assert!(passages.is_over(FILE, Some(9), now), "it was changed");
    }

    #[test]
    fn one_that_comes_back_ever_later_gets_in_all_the_same() {
        let mut passages = Passages::new(UNSEEN_PAUSE);
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..5 {
            passages.begin(FILE, Some(7), Waiting::Unseen, now);
            let pause = pause_of(&mut passages, now);
            pauses.push(pause.as_secs());
            // Guarded for a while, until it comes back in vain.
            passages.visited(FILE, now + pause);
            now += pause + REMEMBERED * 3;
        }
        assert_eq!(pauses, [20, 40, 80, 160, 160]);
        passages.visited(FILE, now - REMEMBERED * 3 - MS);
        passages.begin(FILE, Some(7), Waiting::Unseen, now);
        assert_eq!(pause_of(&mut passages, now), UNSEEN_PAUSE, "it came");
        now += UNSEEN_PAUSE + REMEMBERED_UNSEEN;
        passages.begin(FILE, Some(7), Waiting::Unseen, now);
        assert_eq!(pause_of(&mut passages, now), UNSEEN_PAUSE, "it was calm for long");
    }
}
