//! How long it takes to cut off every region of a file. With on-demand paging: in one call, against
//! deregistering each. With pinned pages, where nothing else is a fence: one after the other against
//! side by side.

use std::num::NonZeroUsize;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use pinfold_leases::{Create, Export, Guard, Mapping, RelativePath, Watcher};
use pinfold_verbs::{Access, Device, Memory, MemoryRegion, ProtectionDomain};
use serde::Serialize;

use crate::Places;
use crate::sample::Sample;

const PAGE: usize = 4096;

/// What is to be measured.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Wishes {
    #[command(flatten)]
    places: Places,
    /// Regions of a page each
    #[arg(long, default_value = "4096")]
    regions: NonZeroUsize,
    /// How often each is measured, in turns
    #[arg(long, default_value = "9")]
    rounds: NonZeroUsize,
    /// Threads that deregister side by side
    #[arg(long, default_value = "16")]
    threads: NonZeroUsize,
}

/// What came of it.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    kernel: String,
    device: String,
    regions: usize,
    threads: usize,
    /// mprotect(2) over the mapping of an fs-DAX file.
    fence_in_one_call: Sample,
    /// The same regions, `ibv_dereg_mr(3)` one after the other.
    deregister_on_demand: Sample,
    /// Pinned regions of a file on tmpfs, one after the other.
    deregister_pinned: Sample,
    /// The same by several threads.
    deregister_pinned_side_by_side: Sample,
    /// How many times as long deregistering takes as the fence in one call.
    deregister_to_fence: f64,
    /// How many times as long one thread takes as several.
    one_thread_to_several: f64,
}

/// Measures, and prints.
pub(crate) fn run(wishes: &Wishes) -> Result<()> {
    let bench = Bench::new(wishes)?;
    let mut report = bench.empty_report();
    // In turns, so that what changes meanwhile concerns all alike.
    for _ in 0..wishes.rounds.get() {
        report.fence_in_one_call.add(bench.fence_in_one_call()?);
        report.deregister_on_demand.add(bench.deregister_on_demand()?);
        report.deregister_pinned.add(bench.deregister_pinned(1)?);
        report.deregister_pinned_side_by_side.add(bench.deregister_pinned(wishes.threads.get())?);
    }
    report.deregister_to_fence = report.deregister_on_demand.ratio_to(&report.fence_in_one_call);
    report.one_thread_to_several =
        report.deregister_pinned.ratio_to(&report.deregister_pinned_side_by_side);
    report.show();
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}

impl Report {
    fn show(&self) {
        eprintln!("{} regions of a page each, {} on {}", self.regions, self.device, self.kernel);
        eprintln!("  on demand: fence in one call      {}", self.fence_in_one_call.summary());
        eprintln!("             deregister each        {}", self.deregister_on_demand.summary());
        eprintln!("             {:.1} times as long", self.deregister_to_fence);
        eprintln!("  pinned:    deregister each        {}", self.deregister_pinned.summary());
        let several = self.deregister_pinned_side_by_side.summary();
        eprintln!("             by {:2} threads          {several}", self.threads);
        eprintln!("             {:.1} times as fast", self.one_thread_to_several);
    }
}

struct Bench<'a> {
    wishes: &'a Wishes,
    device: Device,
    domain: ProtectionDomain,
    watcher: Watcher,
    dax: tempfile::TempDir,
    tmpfs: tempfile::TempDir,
}

impl<'a> Bench<'a> {
    fn new(wishes: &'a Wishes) -> Result<Self> {
        let places = &wishes.places;
        let folder = |place: &Path| {
            tempfile::tempdir_in(place).with_context(|| format!("no folder in {}", place.display()))
        };
        let device = Device::open(&places.device)?;
        let domain = ProtectionDomain::new(&device)?;
        let (watcher, _) = Watcher::start()?;
        let (dax, tmpfs) = (folder(&places.dax)?, folder(&places.tmpfs)?);
        Ok(Self { wishes, device, domain, watcher, dax, tmpfs })
    }

    fn empty_report(&self) -> Report {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Report {
            bench: "fence",
            kernel: kernel.trim().to_owned(),
            device: self.device.name().to_owned(),
            regions: self.wishes.regions.get(),
            threads: self.wishes.threads.get(),
            fence_in_one_call: Sample::default(),
            deregister_on_demand: Sample::default(),
            deregister_pinned: Sample::default(),
            deregister_pinned_side_by_side: Sample::default(),
            deregister_to_fence: 0.0,
            one_thread_to_several: 0.0,
        }
    }

    /// A new file, mapped and populated.
    fn map(&self, folder: &Path) -> Result<(Guard, Mapping)> {
        let export = Export::open(folder)?;
        let path = RelativePath::parse("file")?;
        let size = self.len() as u64;
        let file = export.create(&path, &Create { size, mode: 0o600, dax: false })?;
        // Nobody else knows it, and a guard would be in the way of its removal.
        let (guard, mapping) = file.unguarded(&self.watcher)?.map(size)?;
        std::fs::remove_file(folder.join("file"))?;
        mapping.populate(0..size, || true)?;
        Ok((guard, mapping))
    }

    fn len(&self) -> usize {
        self.wishes.regions.get() * PAGE
    }

    /// A region for each page.
    fn register<M: Memory>(
        &self,
        one: impl Fn(std::ops::Range<usize>) -> Result<MemoryRegion<M>>,
    ) -> Result<Vec<MemoryRegion<M>>> {
        (0..self.wishes.regions.get()).map(|page| one(page * PAGE..(page + 1) * PAGE)).collect()
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
