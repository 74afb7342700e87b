//! From what was seen to the weakest rule that explains it: pure.

use std::fmt;

use crate::completion::CompletionStatus;
use crate::queue_pair::Mtu;

/// The page of the test, in bytes.
pub(super) const PAGE: usize = 4096;

/// Where messages start within a page: aligned to a page, to a cache line, odd, and such that even
/// two bytes cross into the next page.
pub(super) const OFFSETS: [usize; 4] = [0, 64, 333, 4095];

/// Lengths of messages: below and above a packet of either path MTU, and across pages.
pub(super) const LENGTHS: [usize; 5] = [1, 64, 1500, 4096, 6000];

/// The alignments of which a rule may be made.
const ALIGNMENTS: [usize; 3] = [1, 64, PAGE];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Direction {
    Write,
    Read,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Write => "a write",
            Self::Read => "a read",
        })
    }
}

/// One transfer, and where its bytes were found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Placement {
    pub(super) direction: Direction,
    pub(super) mtu: Mtu,
    /// Of the first byte within its page.
    pub(super) offset: usize,
    pub(super) len: usize,
    pub(super) outcome: PlacementOutcome,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PlacementOutcome {
    /// Success, and the bytes are where they belong, and no others changed.
    Right,
    /// Success, and they are not.
    Misplaced,
    /// An error, after which the connection is of no use.
    Failed(CompletionStatus),
}

impl PlacementOutcome {
    pub(super) fn is_failure(self) -> bool {
        matches!(self, Self::Failed(_))
    }
}

/// A rule on messages, under which a device places them right.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Rule {
    pub(super) start_alignment_bytes: u32,
    pub(super) path_mtu: Option<Mtu>,
}

impl Rule {
    pub(super) fn to_text(self) -> Option<String> {
        let alignment = (self.start_alignment_bytes > 1)
            .then(|| format!("messages start on a multiple of {}", self.start_alignment_bytes));
        let mtu = self.path_mtu.map(|mtu| format!("the path MTU is {mtu}"));
        let parts: Vec<_> = alignment.into_iter().chain(mtu).collect();
        (!parts.is_empty()).then(|| parts.join(" and "))
    }

    fn admits(self, placement: &Placement) -> bool {
        placement.offset.is_multiple_of(self.start_alignment_bytes as usize)
            && self.path_mtu.is_none_or(|mtu| mtu == placement.mtu)
    }

    /// Everything that it admits was right, and it admits enough to say so: in both directions a
    /// message of one packet, and one of several.
    fn holds(self, seen: &[Placement]) -> bool {
        let admitted = || seen.iter().filter(|placement| self.admits(placement));
        let covered = |direction, several: bool| {
            admitted().any(|placement| {
                placement.direction == direction
                    && (placement.len > placement.mtu.bytes() as usize) == several
            })
        };
        admitted().all(|placement| placement.outcome == PlacementOutcome::Right)
            && [Direction::Write, Direction::Read]
                .into_iter()
                .all(|direction| covered(direction, false) && covered(direction, true))
    }
}

/// The weakest rule that holds: none at all first, then a path MTU (the largest first), then an
/// alignment, then both. None when nothing helps.
pub(super) fn weakest(seen: &[Placement]) -> Option<Rule> {
    let mut mtus: Vec<_> = seen.iter().map(|placement| placement.mtu).collect();
    mtus.sort_unstable();
    mtus.dedup();
    let choices = || std::iter::once(None).chain(mtus.iter().rev().copied().map(Some));
    ALIGNMENTS
        .into_iter()
        .filter_map(|alignment| u32::try_from(alignment).ok())
        .flat_map(|start_alignment_bytes| {
            choices().map(move |path_mtu| Rule { start_alignment_bytes, path_mtu })
        })
        .find(|rule| rule.holds(seen))
}

/// The first few transfers that went wrong, in words.
pub(super) fn describe(seen: &[Placement]) -> String {
    const SHOWN: usize = 3;
    let wrong: Vec<_> = seen
        .iter()
        .filter(|placement| placement.outcome != PlacementOutcome::Right)
        .map(|Placement { direction, mtu, offset, len, outcome }| {
            let what = match outcome {
                PlacementOutcome::Failed(status) => format!("failed ({status})"),
                _ => "went elsewhere".to_owned(),
            };
            format!("{direction} of {len} bytes at page + {offset}, path MTU {mtu}, {what}")
        })
        .collect();
    let more = wrong.len().saturating_sub(SHOWN);
    let mut text = wrong[..wrong.len().min(SHOWN)].join("; ");
    if more > 0 {
        text.push_str(&format!("; and {more} more of {}", seen.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All transfers of the test, right as far as `right` says.
    fn table(mtus: &[Mtu], right: impl Fn(&Placement) -> bool) -> Vec<Placement> {
        let mut seen = Vec::new();
        for &mtu in mtus {
            for direction in [Direction::Write, Direction::Read] {
                for offset in OFFSETS {
                    for len in LENGTHS {
                        let outcome = PlacementOutcome::Right;
                        let mut placement = Placement { direction, mtu, offset, len, outcome };
                        if !right(&placement) {
                            placement.outcome = PlacementOutcome::Misplaced;
                        }
                        seen.push(placement);
                    }
                }
            }
        }
        seen
    }

    const BOTH: [Mtu; 2] = [Mtu::Mtu1024, Mtu::Mtu4096];

    fn rule(start_alignment_bytes: u32, path_mtu: Option<Mtu>) -> Option<Rule> {
        Some(Rule { start_alignment_bytes, path_mtu })
    }

    #[test]
    fn a_sound_device_needs_no_rule() {
        assert_eq!(weakest(&table(&BOTH, |_| true)), rule(1, None));
        assert_eq!(weakest(&table(&[Mtu::Mtu1024], |_| true)), rule(1, None));
        assert_eq!(rule(1, None).unwrap().to_text(), None);
    }

    /// rxe before a fix: each packet lands at the start of the page in which it belongs.
    fn rxe(placement: &Placement) -> bool {
        let mtu = placement.mtu.bytes() as usize;
        (0..placement.len.div_ceil(mtu)).all(|n| (placement.offset + n * mtu).is_multiple_of(PAGE))
    }

    #[test]
    fn rxe_on_demand_needs_page_starts_and_whole_page_packets() {
        let found = weakest(&table(&BOTH, rxe));
        assert_eq!(found, rule(4096, Some(Mtu::Mtu4096)));
        assert_eq!(
            found.unwrap().to_text().unwrap(),
            "messages start on a multiple of 4096 and the path MTU is 4096"
        );
    }

    #[test]
    fn rxe_on_demand_is_refused_without_a_path_mtu_of_a_page() {
        let seen = table(&[Mtu::Mtu1024], rxe);
        assert_eq!(weakest(&seen), None);
        let text = describe(&seen);
        assert!(text.starts_with("a write of 1500 bytes at page + 0, path MTU 1024"), "{text}");
        assert!(text.ends_with("more of 40"), "{text}");
    }

    #[test]
    fn a_rule_of_one_kind_is_enough_where_it_is() {
        let odd = |placement: &Placement| placement.offset.is_multiple_of(64);
        assert_eq!(weakest(&table(&BOTH, odd)), rule(64, None));
        let small = |placement: &Placement| placement.mtu == Mtu::Mtu1024;
        assert_eq!(weakest(&table(&BOTH, small)), rule(1, Some(Mtu::Mtu1024)));
    }

    #[test]
    fn nothing_saves_a_device_that_fails_at_random() {
        let broken = |placement: &Placement| placement.len != 4096;
        assert_eq!(weakest(&table(&BOTH, broken)), None);
        let one_way = |placement: &Placement| placement.direction == Direction::Write;
        assert_eq!(weakest(&table(&BOTH, one_way)), None);
    }

    #[test]
    fn nothing_seen_proves_nothing() {
        assert_eq!(weakest(&[]), None);
        let mut writes = table(&BOTH, |_| true);
        writes.retain(|placement| placement.direction == Direction::Write);
        assert_eq!(weakest(&writes), None);
    }

    #[test]
    fn a_failure_is_not_right() {
        let mut seen = table(&BOTH, |_| true);
        seen[0].outcome = PlacementOutcome::Failed(CompletionStatus::RemoteAccess);
        assert!(seen[0].outcome.is_failure());
        assert_eq!(weakest(&seen), rule(1, Some(Mtu::Mtu4096)));
        assert!(describe(&seen).contains("failed (the peer refused"));
    }
}
