//! Those who wait for a delegation without its holder being told.
//!
//! Who unlinks, renames, links or changes attributes has no count on the file while it waits. Woken
//! by a release, it may find that the file is guarded anew; then it goes back to waiting
//! (`any_leases_conflict` and `restart` in `__break_lease`, fs/locks.c) without a signal to the new
//! guard's holder, for as long as that holds. /proc/locks shows it: a delegation that nobody breaks,
//! and that somebody waits for. (Who opens or truncates a file keeps it from being guarded meanwhile.)
//!
//! Reading /proc/locks stops everybody's locking for a moment, so it is looked at only while there
//! is a guard that came soon after a release, and ever more seldom: who was overlooked for a while is
//! found after twice that time at most.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::description::FileIdentity;

/// How soon a new guard is looked after.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// How seldom at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Nobody who was let in takes longer than that to get a processor.
const REMEMBERED: Duration = Duration::from_secs(60);
/// Of the time, the looks may take one part in so many.
const SHARE_OF_TIME: u32 = 20;

/// When to look, and after which guards.
#[derive(Debug)]
pub(crate) struct Vigil {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    schedule: Schedule,
    over: bool,
}

impl Vigil {
    pub(crate) fn new(now: Instant) -> Self {
        let state = Mutex::new(State { schedule: Schedule::new(now), over: false });
        Self { state, changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // No code that holds it can leave it half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guard was let go for somebody.
    pub(crate) fn let_go(&self, file: FileIdentity) {
        self.state().schedule.let_go(file, Instant::now());
    }

    /// A file is guarded. Whether somebody may be overlooked by that.
    pub(crate) fn guarded(&self, file: FileIdentity) -> bool {
        let doubtful = self.state().schedule.guarded(file, Instant::now());
        if doubtful {
            self.changed.notify_one();
        }
        doubtful
    }

    /// Ends [`run`](Self::run).
    pub(crate) fn end(&self) {
        self.state().over = true;
        self.changed.notify_one();
    }

    /// Calls `look` whenever it is time, until the end. It says whether guards are left that came
    /// soon after a release.
    pub(crate) fn run(&self, mut look: impl FnMut() -> bool) {
        let mut state = self.state();
        while !state.over {
            let now = Instant::now();
            state = match state.schedule.next {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(at) if at > now => {
                    let waited = self.changed.wait_timeout(state, at - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                Some(_) => {
                    state.schedule.begin_look();
                    drop(state);
                    let any_left = look();
                    let mut state = self.state();
                    state.schedule.looked(any_left, now, Instant::now());
                    state
                }
            };
        }
    }
}

/// Pure.
#[derive(Debug)]
struct Schedule {
    began: Instant,
    let_go: HashMap<FileIdentity, Instant>,
    pause: Duration,
    next: Option<Instant>,
}

impl Schedule {
    fn new(now: Instant) -> Self {
        Self { began: now, let_go: HashMap::new(), pause: FIRST_PAUSE, next: None }
    }

    fn let_go(&mut self, file: FileIdentity, now: Instant) {
        if self.let_go.len() == self.let_go.capacity() {
            self.let_go.retain(|_, at| now.duration_since(*at) < REMEMBERED);
        }
        self.let_go.insert(file, now);
    }

    /// In the beginning nobody knows what an earlier process has let go.
    fn guarded(&mut self, file: FileIdentity, now: Instant) -> bool {
        let recent = |at: &Instant| now.duration_since(*at) < REMEMBERED;
        let doubtful = recent(&self.began) || self.let_go.get(&file).is_some_and(recent);
        if doubtful {
            self.pause = FIRST_PAUSE;
            let soon = now + FIRST_PAUSE;
            self.next = Some(self.next.map_or(soon, |at| at.min(soon)));
        }
        doubtful
    }

    fn begin_look(&mut self) {
        self.next = None;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }

    /// A guard that came during the look has set the pause back.
    fn looked(&mut self, any_left: bool, began: Instant, now: Instant) {
        if any_left || self.next.is_some() {
            let pause = self.pause.max((now - began) * (SHARE_OF_TIME - 1));
            self.next = Some(now + pause);
        }
    }
}

/// The inodes, as /proc/locks names them, of delegations that nobody breaks and somebody waits for.
///
/// A waiter's line follows the line of what it waits for, with the same number.
pub(crate) fn overlooked(locks: &str) -> Vec<&str> {
    let mut unbroken = None;
    let mut found = Vec::new();
    for line in locks.lines() {
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        match words[..] {
            ["->", "LEASE" | "DELEG", "BREAKER", ..] => found.extend(unbroken.take()),
            ["->", ..] => {}
            ["DELEG", "ACTIVE", _, _, inode, ..] => unbroken = Some(inode),
            _ => unbroken = None,
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };
    const OTHER: FileIdentity = FileIdentity { inode: 4, ..FILE };
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn only_an_unbroken_delegation_with_a_waiter_is_overlooked() {
        let locks = "1: DELEG  BREAKING  UNLCK 70 00:1b:2 0 EOF\n\
                     1: -> DELEG  BREAKER   WRITE 72 <none>:0 0 EOF\n\
                     2: DELEG  ACTIVE    WRITE 70 00:1b:3 0 EOF\n\
                     3: DELEG  ACTIVE    WRITE 70 00:1b:4 0 EOF\n\
                     3: -> DELEG  BREAKER   WRITE 74 <none>:0 0 EOF\n\
                     3: -> DELEG  BREAKER   WRITE 75 <none>:0 0 EOF\n\
                     4: POSIX  ADVISORY  WRITE 75 00:1b:5 0 EOF\n\
                     4: -> POSIX  ADVISORY  WRITE 76 00:1b:5 0 EOF\n\
                     5: LEASE  ACTIVE    WRITE 70 00:1b:6 0 EOF\n";
        assert_eq!(overlooked(locks), ["00:1b:4"]);
    }

    #[test]
    fn a_guard_soon_after_a_release_is_looked_after_ever_more_seldom() {
        let began = Instant::now();
        let mut now = began + REMEMBERED;
        let mut schedule = Schedule::new(began);
        assert!(!schedule.guarded(FILE, now));
        schedule.let_go(FILE, now);
        assert!(!schedule.guarded(OTHER, now));
        assert_eq!(schedule.next, None);
        assert!(schedule.guarded(FILE, now));
        let mut pauses = Vec::new();
        for _ in 0..14 {
            let at = schedule.next.unwrap();
            pauses.push((at - now).as_millis());
            now = at;
            schedule.begin_look();
            schedule.looked(true, now, now);
        }
        let doubled = [20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 40960];
        assert_eq!(pauses[..12], doubled);
        assert_eq!(pauses[12..], [60_000, 60_000]);
        now = schedule.next.unwrap();
        schedule.begin_look();
        schedule.looked(false, now, now);
        assert_eq!(schedule.next, None, "no such guard is left");
        assert!(!schedule.guarded(FILE, now), "it was let go long ago");
    }

    #[test]
    fn what_an_earlier_process_let_go_is_not_known() {
        let now = Instant::now();
        let mut schedule = Schedule::new(now);
        assert!(schedule.guarded(FILE, now + MS));
        assert!(!schedule.guarded(FILE, now + REMEMBERED));
    }

    #[test]
    fn a_new_guard_begins_anew() {
        let now = Instant::now();
        let mut schedule = Schedule::new(now);
        schedule.guarded(FILE, now);
        for _ in 0..5 {
            schedule.begin_look();
            schedule.looked(true, now, now);
        }
        schedule.begin_look();
        schedule.guarded(OTHER, now + MS);
        schedule.looked(true, now, now + 2 * MS);
        assert_eq!(schedule.next, Some(now + 2 * MS + 2 * MS * (SHARE_OF_TIME - 1)));
    }

    #[test]
    fn looks_take_a_twentieth_of_the_time() {
        let now = Instant::now();
        let mut schedule = Schedule::new(now);
        schedule.guarded(FILE, now);
        schedule.begin_look();
        let end = now + 100 * MS;
        schedule.looked(true, now, end);
        assert_eq!(schedule.next, Some(end + 1900 * MS));
    }

    #[test]
    fn what_was_let_go_long_ago_takes_no_room() {
        let began = Instant::now();
        let mut schedule = Schedule::new(began);
        for inode in 0..10_000 {
            let file = FileIdentity { inode, ..FILE };
            schedule.let_go(file, began + Duration::from_secs(inode));
        }
        assert!(schedule.let_go.len() < 500);
    }
}
