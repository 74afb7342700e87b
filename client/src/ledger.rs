//! What became of the bytes written through a pin: pure, no clock, no I/O.
//!
//! An interval map from stretches of the file to their fate. Neighbours of the same fate are one
//! stretch, so writing a file from its start to its end takes a single one, and what is kept grows
//! with the number of separate places written, not with bytes or with calls. Each stretch takes some
//! 50 bytes of memory; a commit looks at each one in its range.
//!
//! A write covers its bytes from its begin to its end; while any does, they are unknown. What counts
//! afterwards is how the last one ended, with three things to mind:
//! * A write that failed may have landed after another that was in flight at the same time and
//!   succeeded. So only a write that began after the failure clears it.
//! * The server may fail to write the file back. It can't say which bytes are missing on the medium then,
//!   so all that was acknowledged and not committed is unknown.
//! * A commit makes durable what was acknowledged when it began. So acknowledgements carry the epoch
//!   in which they came, and each commit begins a new one.

use std::collections::BTreeMap;
use std::ops::Range;

/// What became of the writes through a pin: ranges of the file, ordered, without overlaps, and none
/// of one kind touching another of the same. Bytes in none of the lists were never written through
/// the pin.
///
/// It tells of this pin's writes alone. After a revocation because a local process wants to change
/// the file, that process may have cut or overwritten any of the bytes, committed ones too.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct WriteFate {
    /// A commit that began after the write had returned was acknowledged: these bytes are on the
    /// medium and survive a crash and power loss.
    pub committed: Vec<Range<u64>>,
    /// The write returned success: the server's host had the bytes in the file. They survive the end
    /// of the pin, of the session and of the server's process, unless the file was cut; not for sure
    /// a crash of the host or power loss. Commit them again after pinning again, by writing them
    /// again.
    pub acknowledged: Vec<Range<u64>>,
    /// The write began, and no success was seen: it failed on its way, its future was dropped, or it
    /// is in flight. Or it was acknowledged, and the server could not write the file back to its medium
    /// ([`RevocationReason::WriteBackFailed`](crate::RevocationReason::WriteBackFailed)). Any part of it
    /// may be in the file. Write it again.
    pub unknown: Vec<Range<u64>>,
}

/// The map.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    /// By start; disjoint, without equal neighbours.
    stretches: BTreeMap<u64, Stretch>,
    /// Writes in flight.
    writing: u32,
    /// Numbers the failures that some write in flight may have been overtaken by.
    failures: u64,
    /// Commits under way.
    committing: u32,
    /// Counts commits begun.
    epoch: u64,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Stretch {
    end: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct State {
    /// Writes in flight over it.
    writing: u32,
    last: Last,
}

/// How the last write that ended went.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Last {
    /// None has ended.
    None,
    /// Badly; it was the failure of this number.
    Failed(u64),
    /// Well, in this epoch.
    Acknowledged(u64),
    /// Well, and a commit came after it.
    Committed,
}

/// A write in flight.
#[derive(Debug)]
pub(crate) struct Write {
    range: Range<u64>,
    /// How many failures there had been when it began.
    failures: u64,
}

/// A commit under way.
#[derive(Debug)]
pub(crate) struct Commit {
    range: Range<u64>,
    epoch: u64,
}

impl WriteFate {
    /// Whether every byte that was ever written is durable: nothing is to be written again.
    pub fn is_all_committed(&self) -> bool {
        self.acknowledged.is_empty() && self.unknown.is_empty()
    }
}

impl Ledger {
    /// A write begins.
    pub(crate) fn begin(&mut self, range: Range<u64>) -> Write {
        self.fill_gaps(&range);
        self.change(&range, |state| State { writing: state.writing + 1, ..state });
        self.writing += 1;
        Write { range, failures: self.failures }
    }

    /// It returned success.
    pub(crate) fn succeed(&mut self, write: Write) {
        let acknowledged = Last::Acknowledged(self.epoch);
        self.end(&write.range, |last| match last {
            Last::Failed(number) if number > write.failures => last,
            _ => acknowledged,
        });
    }

    /// It failed, or nobody waited for its end.
    pub(crate) fn fail(&mut self, write: Write) {
        self.failures += 1;
        let failed = Last::Failed(self.failures);
        self.end(&write.range, |_| failed);
    }

    fn end(&mut self, range: &Range<u64>, last: impl Fn(Last) -> Last) {
        self.change(range, |state| State { writing: state.writing - 1, last: last(state.last) });
        self.writing -= 1;
        if self.writing == 0 && self.failures > 0 {
            // No write is left that could have been overtaken: the numbers only keep stretches apart.
            self.failures = 0;
            self.change(&ALL, |state| match state.last {
                Last::Failed(_) => State { last: Last::Failed(0), ..state },
                _ => state,
            });
        }
    }

    /// A commit of this range, or of everything, begins.
    pub(crate) fn begin_commit(&mut self, range: Option<Range<u64>>) -> Commit {
        let epoch = self.epoch;
        self.epoch += 1;
        self.committing += 1;
        Commit { range: range.unwrap_or(ALL), epoch }
    }

    /// It has ended.
    pub(crate) fn end_commit(&mut self, commit: Commit, durable: bool) {
        self.committing -= 1;
        if durable {
            self.change(&commit.range, |state| match state.last {
                Last::Acknowledged(epoch) if epoch <= commit.epoch => {
                    State { last: Last::Committed, ..state }
                }
                _ => state,
            });
        }
        if self.committing == 0 {
            // The next commit treats all of them alike.
            let acknowledged = Last::Acknowledged(self.epoch);
            self.change(&ALL, |state| match state.last {
                Last::Acknowledged(_) => State { last: acknowledged, ..state },
                _ => state,
            });
        }
    }

    /// The server could not write the file back: what was acknowledged and not committed may be lost.
    pub(crate) fn write_back_failed(&mut self) {
        // A write in flight may have landed before it, so its success clears nothing.
        self.failures += u64::from(self.writing > 0);
        let failed = Last::Failed(self.failures);
        self.change(&ALL, |state| match state.last {
            Last::Acknowledged(_) => State { last: failed, ..state },
            _ => state,
        });
    }

    /// What is known now.
    pub(crate) fn fate(&self) -> WriteFate {
        let mut fate = WriteFate::default();
        for (&start, stretch) in &self.stretches {
            let ranges = match stretch.state {
                State { writing: 0, last: Last::Acknowledged(_) } => &mut fate.acknowledged,
                State { writing: 0, last: Last::Committed } => &mut fate.committed,
                _ => &mut fate.unknown,
            };
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = stretch.end,
                _ => ranges.push(start..stretch.end),
            }
        }
        fate
    }

    /// Makes stretches of what was never written.
    fn fill_gaps(&mut self, range: &Range<u64>) {
        let before = self.stretches.range(..range.start).next_back();
        let mut at = before.map_or(range.start, |(_, stretch)| stretch.end.max(range.start));
        let mut gaps = Vec::new();
        for (&start, stretch) in self.stretches.range(range.start.min(range.end)..range.end) {
            gaps.push(at..start);
            at = stretch.end;
        }
        gaps.push(at..range.end);
        let state = State { writing: 0, last: Last::None };
        for gap in gaps.into_iter().filter(|gap| gap.start < gap.end) {
            self.stretches.insert(gap.start, Stretch { end: gap.end, state });
        }
    }

    /// Changes every stretch, or part of one, in a range.
    fn change(&mut self, range: &Range<u64>, change: impl Fn(State) -> State) {
        if range.start >= range.end {
            return;
        }
        self.split(range.start);
        self.split(range.end);
        let inside: Vec<_> =
            self.stretches.range(range.clone()).map(|(at, it)| (*at, *it)).collect();
        for (start, _) in &inside {
            self.stretches.remove(start);
        }
        for (start, stretch) in inside {
            self.put(start, Stretch { state: change(stretch.state), ..stretch });
        }
        if let Some(behind) = self.stretches.remove(&range.end) {
            self.put(range.end, behind);
        }
    }

    fn split(&mut self, at: u64) {
        let Some((_, stretch)) = self.stretches.range_mut(..at).next_back() else { return };
        if stretch.end > at {
            let rest = *stretch;
            stretch.end = at;
            self.stretches.insert(at, rest);
        }
    }

    /// Adds a stretch, or makes the one before it longer if that ends there in the same state.
    fn put(&mut self, start: u64, stretch: Stretch) {
        match self.stretches.range_mut(..start).next_back() {
            Some((_, before)) if before.end == start && before.state == stretch.state => {
                before.end = stretch.end;
            }
            _ => {
                self.stretches.insert(start, stretch);
            }
        }
    }
}

/// Every byte that a file can have.
const ALL: Range<u64> = 0..u64::MAX;

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "a fate is made of lists of ranges")]
mod tests {
    use super::*;
    use crate::random::Random;

    fn wrote(ledger: &mut Ledger, range: Range<u64>) {
        let write = ledger.begin(range);
        ledger.succeed(write);
    }

    fn fate(
        committed: &[Range<u64>],
        acknowledged: &[Range<u64>],
        unknown: &[Range<u64>],
    ) -> WriteFate {
        WriteFate {
            committed: committed.to_vec(),
            acknowledged: acknowledged.to_vec(),
            unknown: unknown.to_vec(),
        }
    }

    #[test]
    fn a_byte_is_unknown_then_acknowledged_then_committed() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.fate(), fate(&[], &[], &[]));
        let write = ledger.begin(10..20);
        assert_eq!(ledger.fate(), fate(&[], &[], &[10..20]));
        ledger.succeed(write);
        assert_eq!(ledger.fate(), fate(&[], &[10..20], &[]));
        let commit = ledger.begin_commit(None);
        assert_eq!(ledger.fate(), fate(&[], &[10..20], &[]));
        ledger.end_commit(commit, true);
        assert_eq!(ledger.fate(), fate(&[10..20], &[], &[]));
        assert!(ledger.fate().is_all_committed());

        let write = ledger.begin(15..25);
        assert_eq!(ledger.fate(), fate(&[10..15], &[], &[15..25]));
        ledger.fail(write);
        assert_eq!(ledger.fate(), fate(&[10..15], &[], &[15..25]));
        assert!(!ledger.fate().is_all_committed());
    }

    #[test]
    fn a_commit_moves_only_what_was_acknowledged_when_it_began() {
        let mut ledger = Ledger::default();
        wrote(&mut ledger, 0..10);
        let during = ledger.begin(20..30);
        let commit = ledger.begin_commit(None);
        ledger.succeed(during);
        wrote(&mut ledger, 5..7);
        ledger.end_commit(commit, true);
        assert_eq!(ledger.fate(), fate(&[0..5, 7..10], &[5..7, 20..30], &[]));
        let refused = ledger.begin_commit(None);
        ledger.end_commit(refused, false);
        assert_eq!(ledger.fate(), fate(&[0..5, 7..10], &[5..7, 20..30], &[]));
        let part = ledger.begin_commit(Some(6..25));
        ledger.end_commit(part, true);
        assert_eq!(ledger.fate(), fate(&[0..5, 6..10, 20..25], &[5..6, 25..30], &[]));
    }

    #[test]
    fn a_failure_is_cleared_only_by_a_write_that_began_after_it() {
        let mut ledger = Ledger::default();
        let (one, two) = (ledger.begin(0..10), ledger.begin(5..15));
        ledger.fail(one);
        ledger.succeed(two);
        assert_eq!(ledger.fate(), fate(&[], &[10..15], &[0..10]));
        wrote(&mut ledger, 0..10);
        assert_eq!(ledger.fate(), fate(&[], &[0..15], &[]));
    }

    #[test]
    fn what_could_not_be_written_back_is_unknown_until_it_is_written_again() {
        let mut ledger = Ledger::default();
        wrote(&mut ledger, 0..10);
        let commit = ledger.begin_commit(Some(0..5));
        ledger.end_commit(commit, true);
        let during = ledger.begin(8..12);
        let commit = ledger.begin_commit(None);
        ledger.write_back_failed();
        ledger.end_commit(commit, false);
        ledger.succeed(during);
        assert_eq!(ledger.fate(), fate(&[0..5], &[10..12], &[5..10]));
        ledger.write_back_failed();
        assert_eq!(ledger.fate(), fate(&[0..5], &[], &[5..12]));
        wrote(&mut ledger, 5..12);
        assert_eq!(ledger.fate(), fate(&[0..5], &[5..12], &[]));
    }

    #[test]
    fn writing_on_and_on_takes_one_stretch() {
        let mut ledger = Ledger::default();
        for piece in 0..1000 {
            wrote(&mut ledger, piece * 10..(piece + 1) * 10);
        }
        assert_eq!(ledger.stretches.len(), 1);
        for piece in 0..100 {
            let write = ledger.begin(piece * 10..(piece + 1) * 10);
            ledger.fail(write);
        }
        assert_eq!(ledger.stretches.len(), 2);
        let commit = ledger.begin_commit(None);
        wrote(&mut ledger, 5000..5010);
        ledger.end_commit(commit, false);
        assert_eq!(ledger.stretches.len(), 2, "nothing is left of a commit that failed");
    }

    #[test]
    fn empty_writes_and_the_last_byte_of_all_do_no_harm() {
        let mut ledger = Ledger::default();
        wrote(&mut ledger, 7..7);
        assert_eq!(ledger.fate(), fate(&[], &[], &[]));
        wrote(&mut ledger, 0..10);
        wrote(&mut ledger, 5..5);
        wrote(&mut ledger, u64::MAX - 5..u64::MAX);
        let reversed = Range { start: 9, end: 8 };
        let commit = ledger.begin_commit(Some(reversed));
        ledger.end_commit(commit, true);
        assert_eq!(ledger.fate(), fate(&[], &[0..10, u64::MAX - 5..u64::MAX], &[]));
    }

    /// One byte, by the definitions.
    #[derive(Clone, Default)]
    struct Byte {
        touched: bool,
        in_flight: Vec<usize>,
        /// Writes that were in flight when one failed.
        tainted: Vec<usize>,
        failed: bool,
        /// When it was acknowledged.
        acknowledged: Option<usize>,
        committed: bool,
    }

    impl Byte {
        fn begin(&mut self, write: usize) {
            self.touched = true;
            self.in_flight.push(write);
        }

        fn end(&mut self, write: usize, success: bool, step: usize) {
            self.in_flight.retain(|other| *other != write);
            if !success {
                self.failed = true;
                self.tainted = self.in_flight.clone();
            } else if !self.failed || !self.tainted.contains(&write) {
                self.failed = false;
                self.committed = false;
                self.acknowledged = Some(step);
            }
        }

        fn write_back_failed(&mut self) {
            if !self.failed && self.acknowledged.is_some() && !self.committed {
                self.failed = true;
                self.tainted = self.in_flight.clone();
            }
        }

        fn commit(&mut self, began: usize) {
            if !self.failed && self.acknowledged.is_some_and(|when| when < began) {
                self.committed = true;
            }
        }

        fn fate(&self) -> Option<&'static str> {
            match () {
                () if !self.touched => None,
                () if self.failed || !self.in_flight.is_empty() => Some("unknown"),
                () if self.committed => Some("committed"),
                () => Some("acknowledged"),
            }
        }
    }

    impl Random {
        fn range(&mut self, bytes: u64) -> Range<u64> {
            let start = self.below(bytes);
            start..start + self.below(bytes - start + 1)
        }
    }

    fn assert_agrees(ledger: &Ledger, bytes: &[Byte], what: &str) {
        let found = ledger.fate();
        let lists = [
            ("committed", &found.committed),
            ("acknowledged", &found.acknowledged),
            ("unknown", &found.unknown),
        ];
        let mut told = vec![None; bytes.len()];
        for (name, ranges) in lists {
            assert!(ranges.iter().all(|range| range.start < range.end), "{what}: {found:?}");
            assert!(ranges.windows(2).all(|two| two[0].end < two[1].start), "{what}: {found:?}");
            for at in ranges.iter().cloned().flatten() {
                assert_eq!(told[at as usize].replace(name), None, "{what}: byte {at}: {found:?}");
            }
        }
        let expected: Vec<_> = bytes.iter().map(Byte::fate).collect();
        assert_eq!(told, expected, "{what}");
        let stretches: Vec<_> = ledger.stretches.iter().collect();
        for two in stretches.windows(2) {
            let ((_, left), (start, right)) = (two[0], two[1]);
            assert!(left.end <= *start, "{what}: overlap");
            assert!(left.end < *start || left.state != right.state, "{what}: not one stretch");
        }
    }

    /// Writes and commits that overlap in space and time, drawn by lot, beside a model that keeps
    /// each byte by itself.
    #[test]
    fn it_agrees_with_a_model_of_single_bytes() {
        const BYTES: u64 = 24;
        for seed in 0..300 {
            let mut random = Random(seed);
            let mut ledger = Ledger::default();
            let mut bytes = vec![Byte::default(); BYTES as usize];
            let mut writes: Vec<(usize, Write)> = Vec::new();
            let mut commits: Vec<(usize, Commit)> = Vec::new();
            for step in 1..150 {
                match random.below(11) {
                    10 if random.below(3) == 0 => {
                        bytes.iter_mut().for_each(Byte::write_back_failed);
                        ledger.write_back_failed();
                    }
                    0..4 => {
                        let range = random.range(BYTES);
                        range.clone().for_each(|at| bytes[at as usize].begin(step));
                        writes.push((step, ledger.begin(range)));
                    }
                    4..8 if !writes.is_empty() => {
                        let chosen = random.below(writes.len() as u64) as usize;
                        let (id, write) = writes.swap_remove(chosen);
                        let success = random.below(4) > 0;
                        write.range.clone().for_each(|at| {
                            bytes[at as usize].end(id, success, step);
                        });
                        if success { ledger.succeed(write) } else { ledger.fail(write) }
                    }
                    8 => {
                        let range = (random.below(2) == 0).then(|| random.range(BYTES));
                        commits.push((step, ledger.begin_commit(range)));
                    }
                    9 if !commits.is_empty() => {
                        let chosen = random.below(commits.len() as u64) as usize;
                        let (began, commit) = commits.swap_remove(chosen);
                        let durable = random.below(3) > 0;
                        if durable {
                            for at in commit.range.start..commit.range.end.min(BYTES) {
                                bytes[at as usize].commit(began);
                            }
                        }
                        ledger.end_commit(commit, durable);
                    }
                    _ => {}
                }
                assert_agrees(&ledger, &bytes, &format!("seed {seed}, step {step}"));
            }
        }
    }
}
