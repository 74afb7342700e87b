//! What it costs to take files back, and the kernel memory that their regions hold: costs in, verdict out.
//! Nothing is granted that could not be taken back in time.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pinfold_verbs::RegionCost;

use crate::sync::locked;

/// A file may take this part of lease-break-time to be cut off. Clients drain for up to a third of it
/// before, and the measure was taken while nobody else had the processor.
const PART_OF_LEASE_BREAK_TIME: u32 = 4;
/// The kernel's default, for where it would wait for ever: people don't.
const USUAL_LEASE_BREAK_TIME: Duration = Duration::from_secs(45);
/// The regions of a server may take this part of the host's memory.
const PART_OF_MEMORY: u64 = 4;

/// What regions cost while they are registered.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Cost {
    /// From the fence until the local process goes on.
    pub(crate) time: Duration,
    /// The part of it that is the fence.
    pub(crate) fence: Duration,
    /// The part of the fence that grows with the pages. A local process that truncates the file walks them all
    /// once more, as long as the regions are there.
    pub(crate) walk: Duration,
    /// Kernel memory, in bytes.
    pub(crate) memory: u64,
}

impl Cost {
    /// Of one region of so many bytes: its fence and its deregistration.
    pub(crate) fn of_region(cost: &RegionCost, bytes: u64) -> Self {
        Self {
            time: cost.fence.of(bytes) + cost.deregister.of(bytes),
            fence: cost.fence.of(bytes),
            walk: cost.fence.of(bytes) - cost.fence.each,
            memory: cost.memory_of(bytes),
        }
    }

    /// Of one region for each of these ranges.
    pub(crate) fn of_regions(cost: &RegionCost, ranges: &[Range<u64>]) -> Self {
        let each = ranges.iter().map(|range| Self::of_region(cost, range.end - range.start));
        each.fold(Self::default(), Self::plus)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            time: self.time.saturating_add(other.time),
            fence: self.fence.saturating_add(other.fence),
            walk: self.walk.saturating_add(other.walk),
            memory: self.memory.saturating_add(other.memory),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            time: self.time.saturating_sub(other.time),
            fence: self.fence.saturating_sub(other.fence),
            walk: self.walk.saturating_sub(other.walk),
            memory: self.memory.saturating_sub(other.memory),
        }
    }
}

/// Why regions can't be had.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TooMuch {
    /// A local process that wants the file would wait for too long.
    #[error(
        "a local process would have to wait {:.2} s for it, and {:.2} s is the limit, a quarter of \
         fs.lease-break-time; pin fewer bytes of it, from fewer clients, or raise fs.lease-break-time",
        wanted.as_secs_f64(), limit.as_secs_f64()
    )]
    Time {
        /// How long, with what is registered already.
        wanted: Duration,
        /// How long is allowed.
        limit: Duration,
    },
    /// The kernel's tables of the pages of all regions would take too much.
    #[error(
        "the regions of this server would take {} MiB of kernel memory, and {} MiB is the limit \
         (--region-memory-max-mib); pin fewer bytes, or give pins back",
        wanted.div_ceil(1 << 20), limit >> 20
    )]
    Memory {
        /// Bytes, with what is registered already.
        wanted: u64,
        /// Bytes that are allowed.
        limit: u64,
    },
}

/// How long it may take to cut one file off.
pub(crate) fn time_limit(lease_break_time: Option<Duration>) -> Duration {
    lease_break_time.unwrap_or(USUAL_LEASE_BREAK_TIME) / PART_OF_LEASE_BREAK_TIME
}

/// What the regions of a server may take of a host with so many bytes of memory.
pub(crate) fn usual_memory_limit(host_memory: u64) -> u64 {
    host_memory / PART_OF_MEMORY
}

/// Bytes of memory that this host has.
pub(crate) fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(info.mem_unit.into())
}

/// Whether regions of such a cost can be had beside those of the file (`file`, and `None` for
/// `time_limit` where nobody waits for it in the kernel) and of the server (`memory`).
fn verdict(
    wanted: Cost,
    file: Cost,
    time_limit: Option<Duration>,
    memory: u64,
    memory_limit: u64,
) -> Result<(), TooMuch> {
    let with_it = memory.saturating_add(wanted.memory);
    if with_it > memory_limit {
        return Err(TooMuch::Memory { wanted: with_it, limit: memory_limit });
    }
    let time = file.time.saturating_add(wanted.time);
    match time_limit {
        Some(limit) if time > limit => Err(TooMuch::Time { wanted: time, limit }),
        _ => Ok(()),
    }
}

/// The kernel memory of all regions of a server. Under its lock nothing is allocated: regions are
/// given back while the process's memory lock is held by somebody who waits for that.
#[derive(Debug)]
pub(crate) struct Budget {
    limit: u64,
    held: Mutex<u64>,
}

/// What a file's regions cost now.
#[derive(Debug, Default)]
pub(crate) struct FileCost(Mutex<Cost>);

/// A region's part of both. Dropped when it has been deregistered.
#[derive(Debug)]
#[must_use = "dropping it gives it back"]
pub(crate) struct Charge {
    budget: Arc<Budget>,
    file: Arc<FileCost>,
    cost: Cost,
}

impl Budget {
    /// Of so many bytes.
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, held: Mutex::default() })
    }

    /// What there is, in bytes.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// What regions hold now, in bytes.
    pub(crate) fn held(&self) -> u64 {
        *locked(&self.held)
    }

    /// Takes what one region for each of these ranges of a file costs, or nothing.
    pub(crate) fn charge(
        self: &Arc<Self>,
        file: &Arc<FileCost>,
        time_limit: Option<Duration>,
        cost: &RegionCost,
        ranges: &[Range<u64>],
    ) -> Result<Vec<Charge>, TooMuch> {
        let wanted = Cost::of_regions(cost, ranges);
        {
            let (mut held, mut of_file) = (locked(&self.held), locked(&file.0));
            verdict(wanted, *of_file, time_limit, *held, self.limit)?;
            *held = held.saturating_add(wanted.memory);
            *of_file = of_file.plus(wanted);
        }
        let charge = |range: &Range<u64>| Charge {
            budget: Arc::clone(self),
            file: Arc::clone(file),
            cost: Cost::of_region(cost, range.end - range.start),
        };
        Ok(ranges.iter().map(charge).collect())
    }

    /// Whether the same could be had once all pins of the file are taken back.
    pub(crate) fn demand_room_after(
        &self,
        file: &FileCost,
        time_limit: Option<Duration>,
        wanted: Cost,
    ) -> Result<(), TooMuch> {
        let stays = self.held().saturating_sub(file.now().memory);
        verdict(wanted, Cost::default(), time_limit, stays, self.limit)
    }
}

impl FileCost {
    /// Of all regions that are there.
    pub(crate) fn now(&self) -> Cost {
        *locked(&self.0)
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        let (mut held, mut of_file) = (locked(&self.budget.held), locked(&self.file.0));
        *held = held.saturating_sub(self.cost.memory);
        *of_file = of_file.minus(self.cost);
    }
}

#[cfg(test)]
mod tests {
    use pinfold_verbs::Price;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn cost() -> RegionCost {
        let price = |ms| Price { each: Duration::ZERO, per_gib: Duration::from_millis(ms) };
        RegionCost {
            register: price(100),
            fence: price(6),
            deregister: price(4),
            memory_bytes_per_gib: 2 << 20,
        }
    }

    fn cost_of(time_ms: u64, walk_ms: u64, memory_mib: u64) -> Cost {
        let (time, walk) = (Duration::from_millis(time_ms), Duration::from_millis(walk_ms));
        Cost { time, fence: walk, walk, memory: memory_mib << 20 }
    }

    fn gib(count: u64) -> Vec<Range<u64>> {
        (0..count).map(|at| at * GIB..(at + 1) * GIB).collect()
    }

    #[test]
    fn a_file_is_charged_for_its_fence_and_the_deregistration() {
        let (budget, file) = (Budget::new(u64::MAX), Arc::new(FileCost::default()));
        let charges = budget.charge(&file, None, &cost(), &gib(3)).unwrap();
        assert_eq!(file.now(), cost_of(30, 18, 6));
        assert_eq!(budget.held(), 6 << 20);
        drop(charges);
        assert_eq!((file.now(), budget.held()), (Cost::default(), 0));
    }

    #[test]
    fn each_region_gives_its_own_part_back() {
        let (budget, file) = (Budget::new(u64::MAX), Arc::new(FileCost::default()));
        let mut charges = budget.charge(&file, None, &cost(), &[0..GIB, GIB..GIB * 4]).unwrap();
        drop(charges.pop());
        assert_eq!(file.now(), cost_of(10, 6, 2));
    }

    #[test]
    fn a_file_never_takes_longer_than_its_share_whoever_pins_it() {
        let limit = time_limit(Some(Duration::from_secs(2)));
        assert_eq!(limit, Duration::from_millis(500));
        let (budget, file) = (Budget::new(u64::MAX), Arc::new(FileCost::default()));
        let held = budget.charge(&file, Some(limit), &cost(), &gib(50)).unwrap();
        let refused = budget.charge(&file, Some(limit), &cost(), &gib(1)).unwrap_err();
        assert_eq!(refused, TooMuch::Time { wanted: Duration::from_millis(510), limit });
        assert_eq!(budget.held(), 100 << 20, "what is refused takes nothing");
        let other = Arc::new(FileCost::default());
        let _other = budget.charge(&other, Some(limit), &cost(), &gib(50)).unwrap();
        drop(held);
        let _again = budget.charge(&file, Some(limit), &cost(), &gib(50)).unwrap();
    }

    #[test]
    fn the_memory_is_the_servers_and_not_the_files() {
        let budget = Budget::new(10 << 20);
        let (one, other) = (Arc::new(FileCost::default()), Arc::new(FileCost::default()));
        let held = budget.charge(&one, None, &cost(), &gib(4)).unwrap();
        let refused = budget.charge(&other, None, &cost(), &gib(2)).unwrap_err();
        assert_eq!(refused, TooMuch::Memory { wanted: 12 << 20, limit: 10 << 20 });
        assert!(refused.to_string().contains("12 MiB"), "{refused}");
        let wanted = Cost::of_regions(&cost(), &gib(5));
        assert!(budget.demand_room_after(&one, None, wanted).is_ok(), "a steal takes it all");
        assert!(budget.demand_room_after(&other, None, wanted).is_err());
        drop(held);
        let _all = budget.charge(&other, None, &cost(), &gib(5)).unwrap();
    }

    #[test]
    fn what_nobody_could_ever_have_does_not_overflow() {
        let (budget, file) = (Budget::new(u64::MAX), Arc::new(FileCost::default()));
        let all = [0..u64::MAX; 1];
        let limit = Some(time_limit(None));
        assert!(matches!(budget.charge(&file, limit, &cost(), &all), Err(TooMuch::Time { .. })));
    }
}
