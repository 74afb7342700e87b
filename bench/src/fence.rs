//! How long it takes to cut off every region of a file. With on-demand paging: in one call, against
//! deregistering each. With pinned pages, where nothing else is a fence: one after the other against
//! side by side.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use pinfold_leases::{Create, Export, Guard, Mapping, RelativePath, Watcher};
use pinfold_verbs::{Access, Device, Memory, MemoryRegion, ProtectionDomain};

use crate::Run;
use crate::place::Places;
use crate::report::Goal;
use crate::turns::alternate;

const PAGE: usize = 4096;

/// Regions of a page each.
const REGIONS: usize = 4096;

/// Threads that deregister side by side.
const THREADS: usize = 16;

/// Each round registers thousands of regions, and what is compared differs by factors.
const ROUNDS_MAX: usize = 9;
const QUICK_ROUNDS_MAX: usize = 5;

/// Fence and deregistration.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let bench = Bench::new(&run.storage.places)?;
    let rounds = run.few_rounds(ROUNDS_MAX, QUICK_ROUNDS_MAX);
    let ms = |took: Duration| took.as_secs_f64() * 1e3;
    let pairs = alternate(
        rounds,
        || bench.fence_in_one_call().map(ms),
        || bench.deregister_on_demand().map(ms),
    )?;
    let peer = "ibv_dereg_mr of each of the same regions";
    run.add(format!("fence/{REGIONS}"), peer, "ms", &pairs, Goal::AtMost(0.1));
    let pairs = alternate(
        rounds,
        || bench.deregister_pinned(THREADS).map(ms),
        || bench.deregister_pinned(1).map(ms),
    )?;
    let name = format!("deregister_pinned_by_{THREADS}_threads/{REGIONS}");
    run.add(name, "ibv_dereg_mr by one thread", "ms", &pairs, Goal::None);
    Ok(())
}

struct Bench {
    domain: ProtectionDomain,
    watcher: Watcher,
    dax: tempfile::TempDir,
    tmpfs: tempfile::TempDir,
}

impl Bench {
    fn new(places: &Places) -> Result<Self> {
        let folder = |place: &Path| {
            tempfile::tempdir_in(place).with_context(|| format!("no folder in {}", place.display()))
        };
        let domain = ProtectionDomain::new(&Device::open(&places.device)?)?;
        let (watcher, _) = Watcher::start()?;
        let (dax, tmpfs) = (folder(&places.dax)?, folder(&places.tmpfs)?);
        Ok(Self { domain, watcher, dax, tmpfs })
    }

    /// A new file, mapped and populated.
    fn map(&self, folder: &Path) -> Result<(Guard, Mapping)> {
        let export = Export::open(folder)?;
        let path = RelativePath::parse("file")?;
        let size = (REGIONS * PAGE) as u64;
        let file = export.create(&path, &Create { size, mode: 0o600, dax: false })?;
        // Nobody else knows it, and a guard would be in the way of its removal.
        let (guard, mapping) = file.unguarded(&self.watcher)?.map(size)?;
        std::fs::remove_file(folder.join("file"))?;
        mapping.populate(0..size, || true)?;
        Ok((guard, mapping))
    }

    /// A region for each page.
    fn register<M: Memory>(
        &self,
        one: impl Fn(std::ops::Range<usize>) -> Result<MemoryRegion<M>>,
    ) -> Result<Vec<MemoryRegion<M>>> {
        (0..REGIONS).map(|page| one(page * PAGE..(page + 1) * PAGE)).collect()
    }

    fn fence_in_one_call(&self) -> Result<Duration> {
        let (guard, mapping) = self.map(self.dax.path())?;
        let regions = self.on_demand(&mapping)?;
        let started = Instant::now();
        let fenced = mapping.fence()?;
        let took = started.elapsed();
        guard.release(fenced)?;
        drop(regions);
        Ok(took)
    }

    fn deregister_on_demand(&self) -> Result<Duration> {
        let (guard, mapping) = self.map(self.dax.path())?;
        let took = deregister(self.on_demand(&mapping)?, 1)?;
        guard.release(mapping.fence()?)?;
        Ok(took)
    }

    fn on_demand(&self, mapping: &Mapping) -> Result<Vec<MemoryRegion<pinfold_leases::Share>>> {
        self.register(|range| {
            let share = mapping.share()?;
            let made = self.domain.register_on_demand(share, range, Access::REMOTE_READ_WRITE);
            made.map_err(|failed| pinfold_verbs::Error::from(failed).into())
        })
    }

    fn deregister_pinned(&self, threads: usize) -> Result<Duration> {
        let (guard, mapping) = self.map(self.tmpfs.path())?;
        let regions = self.register(|range| {
            let share = mapping.pinned_share()?;
            let made = self.domain.register_pinned(share, range, Access::REMOTE_READ_WRITE);
            made.map_err(|failed| pinfold_verbs::Error::from(failed).into())
        })?;
        let took = deregister(regions, threads)?;
        guard.release(mapping.fence()?)?;
        Ok(took)
    }
}

/// Deregisters all, each thread its part, and says how long that took. The threads are started before,
/// as the server's are.
fn deregister<M: Memory + 'static>(
    mut regions: Vec<MemoryRegion<M>>,
    threads: usize,
) -> Result<Duration> {
    let each = regions.len().div_ceil(threads);
    let start = std::sync::Barrier::new(threads + 1);
    thread::scope(|scope| {
        let mut workers = Vec::new();
        for _ in 0..threads {
            let own = regions.split_off(regions.len().saturating_sub(each));
            let start = &start;
            workers.push(scope.spawn(move || {
                start.wait();
                own.into_iter().try_for_each(|region| match region.deregister() {
                    Ok(_) => Ok(()),
                    Err(failed) => Err(anyhow!("{failed}")),
                })
            }));
        }
        start.wait();
        let started = Instant::now();
        for worker in workers {
            worker.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        Ok(started.elapsed())
    })
}
