//! The room that is kept free for revocations: descriptors and memory mappings that new pins and sessions
//! may not take.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use crate::error::{Error, Result};
use crate::sync::locked;

/// Memory mappings that pins may not take: threads, allocations and fences want some.
pub(crate) const MAP_AREAS_RESERVED: usize = 2000;
/// Descriptors that pins and sessions may not take, at most; and at least.
const DESCRIPTORS_RESERVED: (usize, usize) = (16, 512);
/// And this part of all.
const DESCRIPTORS_PART: usize = 8;
/// What guarding one file takes at most: mappings, or descriptors.
const EACH: usize = 8;
/// After a refusal it is not counted again for so long.
const COUNTED_AGAIN_AFTER: Duration = Duration::from_secs(1);

/// The kernel's limit on the mappings of one process.
const MAX_MAP_COUNT: &str = "/proc/sys/vm/max_map_count";

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Room {
    map_areas: Mutex<Meter>,
    descriptors: Mutex<Meter>,
}

impl Room {
    /// Whether another file may be guarded.
    pub(crate) fn demand_for_file(&self) -> Result<()> {
        self.demand_descriptors()?;
        let limit = max_map_count();
        let line = limit.saturating_sub(MAP_AREAS_RESERVED);
        locked(&self.map_areas)
            .demand(line, Instant::now(), count_map_areas)
            .map_err(|used| Error::NoMapAreas { used, limit })
    }

    /// Whether another session may be opened, or file guarded.
    pub(crate) fn demand_descriptors(&self) -> Result<()> {
        let limit = descriptor_limit();
        let line = limit - reserved_descriptors(limit);
        locked(&self.descriptors)
            .demand(line, Instant::now(), count_descriptors)
            .map_err(|used| Error::NoDescriptors { used, limit })
    }
}

/// Whether there is room to start, with so many threads.
pub(crate) fn demand_to_start(threads: usize) -> Result<()> {
    // A stack and its guard page, and the same of the stack for signals.
    const EACH_THREAD: usize = 4;
    let (used, limit) = (count_map_areas(), max_map_count());
    match used + EACH_THREAD * threads + MAP_AREAS_RESERVED <= limit {
        true => Ok(()),
        false => Err(Error::NoMapAreas { used, limit }),
    }
}

fn reserved_descriptors(limit: usize) -> usize {
    let (least, most) = DESCRIPTORS_RESERVED;
    (limit / DESCRIPTORS_PART).clamp(least, most).min(limit)
}

/// Descriptors that this process may have open.
pub(crate) fn descriptor_limit() -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// The kernel's limit of the moment; without a word from it, its default.
pub(crate) fn max_map_count() -> usize {
    const DEFAULT: usize = 65_530;
    let text = std::fs::read_to_string(MAX_MAP_COUNT).unwrap_or_default();
    text.trim().parse().unwrap_or(DEFAULT)
}

/// Where it can't be counted, nothing is refused.
fn count_map_areas() -> usize {
    let lines = |text: Vec<u8>| text.iter().filter(|byte| **byte == b'\n').count();
    std::fs::read("/proc/self/maps").map_or(0, lines)
}

fn count_descriptors() -> usize {
    let folder = Path::new("/proc/self/fd");
    // Since Linux 6.2 its size is their number.
    match folder.metadata().map(|folder| folder.len()) {
        Ok(size) if size > 0 => usize::try_from(size).unwrap_or(usize::MAX),
        _ => folder.read_dir().map_or(0, Iterator::count),
    }
}

/// Counts what is used, the less often the more there is left.
#[derive(Debug, Default)]
struct Meter {
    used: usize,
    /// So many more may be taken before it is counted again.
    unseen: usize,
    counted: Option<Instant>,
    /// What it was counted for: a limit can be changed at any time.
    line: usize,
}

impl Meter {
    /// Whether one more may be taken below the line; else how much is used.
    fn demand(
        &mut self,
        line: usize,
        now: Instant,
        count: impl FnOnce() -> usize,
    ) -> std::result::Result<(), usize> {
        if std::mem::replace(&mut self.line, line) != line {
            (self.unseen, self.counted) = (0, None);
        }
        let refused_just_now = self.used >= line
            && self.counted.is_some_and(|at| now.duration_since(at) < COUNTED_AGAIN_AFTER);
        if refused_just_now {
            return Err(self.used);
        }
        if self.unseen == 0 {
            self.used = count();
            self.counted = Some(now);
            self.unseen = line.saturating_sub(self.used) / EACH;
        }
        if self.used >= line {
            return Err(self.used);
        }
        self.unseen = self.unseen.saturating_sub(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_counted_more_often_the_less_is_left() {
        let (mut meter, now) = (Meter::default(), Instant::now());
        let mut counts = 0;
        for taken in 0.. {
            let used = 20 + taken * EACH;
            let counted = |counts: &mut usize| {
                *counts += 1;
                used
            };
            if meter.demand(1000, now, || counted(&mut counts)).is_err() {
                assert!((1000..1000 + 2 * EACH).contains(&used), "{used}");
                break;
            }
        }
        assert!(counts < 12, "{counts} of some 120");
    }

    #[test]
    fn a_limit_that_is_lowered_counts_at_once() {
        let (mut meter, now) = (Meter::default(), Instant::now());
        assert_eq!(meter.demand(1000, now, || 20), Ok(()));
        assert_eq!(meter.demand(30, now, || 40), Err(40));
        assert_eq!(meter.demand(1000, now, || 40), Ok(()));
    }

    #[test]
    fn a_refusal_is_looked_at_again_after_a_while() {
        let (mut meter, now) = (Meter::default(), Instant::now());
        assert_eq!(meter.demand(10, now, || 10), Err(10));
        assert_eq!(meter.demand(10, now, || panic!("it was counted just now")), Err(10));
        assert_eq!(meter.demand(10, now + COUNTED_AGAIN_AFTER, || 9), Ok(()));
    }

    #[test]
    fn a_part_of_the_descriptors_is_kept() {
        assert_eq!(reserved_descriptors(65_536), 512);
        assert_eq!(reserved_descriptors(96), 16);
        assert_eq!(reserved_descriptors(1024), 128);
        assert_eq!(reserved_descriptors(8), 8);
        assert!(count_descriptors() > 2 && count_map_areas() > 5);
    }
}
