//! A file under guard: its guard, its mapping and the regions on it.

use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use pinfold_leases::{
    BreakKind, Description, Error as FileError, Fenced, Guard, GuardId, GuardState, GuardTier,
    LeaseBreakTime, LockKind, Mapping, MappingKind, Opener, RangeLock, Released,
};
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::fabric::Segment;
use crate::file_system::FileSystem;
use crate::flushes::Flushes;
use crate::gate::Gate;
use crate::ids::{Life, PinId};
use crate::ladder::Cutting;
use crate::names::Names;
use crate::policy::Policy;
use crate::registry::{Readers, Refusal};
use crate::revocation_cost::FileCost;
use crate::sync::locked;

/// See the module's documentation. What must go in order is in options that are taken.
#[derive(Debug)]
pub(crate) struct HeldFile {
    id: GuardId,
    tier: GuardTier,
    /// Not before it was guarded.
    guarded_at: Instant,
    /// Seen at least once: a writer's break hides it again.
    readers_pass: AtomicBool,
    policy: Policy,
    takes_stream_writes: bool,
    page_size_bytes: AtomicU32,
    kind: MappingKind,
    path: PathBuf,
    file_system: Arc<FileSystem>,
    description: Description,
    life: Life,
    guard: Mutex<Option<Guard>>,
    mapping: Mutex<Option<Arc<Mapping>>>,
    map_sync: bool,
    segments: Mutex<ByPin<Segment>>,
    /// What shows others which bytes are pinned.
    locks: Mutex<HashMap<PinId, RangeLock>>,
    /// Segments whose deregistration failed: their keys live until a later try succeeds.
    failed: Mutex<Failed>,
    cutting: Cutting,
    fence_failures: AtomicU32,
    flushes: Flushes,
    /// Who wanted it back, as far as they were seen.
    breakers: Mutex<Vec<Opener>>,
    gate: Arc<Gate>,
    cost: Arc<FileCost>,
    /// In how many pieces its mapping is fenced.
    pieces: u32,
    /// How many of them have been cut off, and how many regions deregistered, so far.
    steps: AtomicUsize,
    /// When the last region was deregistered, if that was before the release.
    regions_gone: OnceLock<Instant>,
    /// The exports by which it was pinned.
    exports: Mutex<Vec<String>>,
    names: Names,
    released: watch::Sender<bool>,
    /// Space is allocated past its end that nobody asked for.
    excess: AtomicBool,
}

/// What pins have, to be taken one after the other.
#[derive(Debug)]
struct ByPin<T> {
    of: BTreeMap<PinId, Vec<T>>,
    /// Pins before this one have nothing left: who takes the next one need not look at all that were
    /// taken before.
    first: PinId,
}

impl<T> Default for ByPin<T> {
    fn default() -> Self {
        Self { of: BTreeMap::new(), first: PinId::default() }
    }
}

impl<T> ByPin<T> {
    fn add(&mut self, pin: PinId, of: Vec<T>) {
        self.of.insert(pin, of);
        self.first = self.first.min(pin);
    }

    fn remove(&mut self, pin: PinId) -> Vec<T> {
        self.of.remove(&pin).unwrap_or_default()
    }

    /// Takes no memory, and gives none back.
    fn pop(&mut self) -> Option<T> {
        self.of.range_mut(self.first..).find_map(|(pin, of)| {
            self.first = *pin;
            of.pop()
        })
    }

    fn count(&self) -> usize {
        self.of.values().map(Vec::len).sum()
    }
}

#[derive(Debug, Default)]
struct Failed {
    segments: Vec<Segment>,
    /// So many of them are to be tried again.
    retry: usize,
}

/// What a file has of the export by which it is pinned first.
#[derive(Debug)]
pub(crate) struct Exported {
    /// What the operator wants of it.
    pub(crate) policy: Policy,
    /// What it lies on.
    pub(crate) file_system: Arc<FileSystem>,
}

impl HeldFile {
    /// Of a file that was just guarded and mapped.
    pub(crate) fn new(
        description: Description,
        life: Life,
        kind: MappingKind,
        Exported { policy, file_system }: Exported,
        takes_stream_writes: bool,
        (guard, mapping): (Guard, Mapping),
    ) -> Self {
        let file = Self {
            id: guard.id(),
            tier: guard.tier(),
            guarded_at: Instant::now(),
            readers_pass: AtomicBool::new(false),
            policy,
            takes_stream_writes,
            page_size_bytes: AtomicU32::new(smallest_page()),
            kind,
            path: description.path().to_owned(),
            file_system,
            description,
            life,
            guard: Mutex::new(Some(guard)),
            map_sync: mapping.map_sync(),
            segments: Mutex::default(),
            locks: Mutex::default(),
            failed: Mutex::default(),
            cutting: Cutting::default(),
            fence_failures: AtomicU32::new(0),
            flushes: Flushes::default(),
            breakers: Mutex::default(),
            gate: Arc::default(),
            cost: Arc::default(),
            pieces: u32::try_from(mapping.pieces()).unwrap_or(u32::MAX),
            steps: AtomicUsize::new(0),
            regions_gone: OnceLock::new(),
            mapping: Mutex::new(Some(Arc::new(mapping))),
            exports: Mutex::default(),
            names: Names::default(),
            released: watch::Sender::new(false),
            excess: AtomicBool::new(false),
        };
        file.measure_pages();
        file
    }

    /// It is about to be pinned by this export.
    pub(crate) fn reach_by(&self, export: &str) {
        let mut exports = locked(&self.exports);
        if !exports.iter().any(|known| known == export) {
            exports.push(export.to_owned());
        }
    }

    /// Whether it may have pins that were had by this export.
    pub(crate) fn is_reached_by(&self, export: &str) -> bool {
        locked(&self.exports).iter().any(|known| known == export)
    }

    /// The names by which it is pinned.
    pub(crate) fn names(&self) -> &Names {
        &self.names
    }

    /// Names this guarding.
    pub(crate) fn id(&self) -> GuardId {
        self.id
    }

    /// What holds it still now, or held it last.
    pub(crate) fn tier(&self) -> GuardTier {
        self.look_for_readers();
        match self.tier {
            GuardTier::Delegation if self.readers_pass.load(Ordering::Relaxed) => {
                GuardTier::ReadDelegation
            }
            tier => tier,
        }
    }

    /// Whether its guard has kept everybody from renaming it since then: a lease does not.
    pub(crate) fn held_its_name_since(&self, then: Instant) -> bool {
        self.tier == GuardTier::Delegation && self.guarded_at <= then
    }

    fn look_for_readers(&self) {
        let now = locked(&self.guard).as_ref().map(Guard::tier);
        if now == Some(GuardTier::ReadDelegation) {
            self.readers_pass.store(true, Ordering::Relaxed);
        }
    }

    /// These are held up by its guard.
    pub(crate) fn note_breakers(&self, seen: Vec<Opener>) {
        let mut breakers = locked(&self.breakers);
        let new = seen.into_iter().filter(|one| breakers.iter().all(|known| known.pid != one.pid));
        let new: Vec<Opener> = new.collect();
        breakers.extend(new);
    }

    /// Those who were seen to be held up by its guard.
    pub(crate) fn breakers(&self) -> Vec<Opener> {
        locked(&self.breakers).clone()
    }

    /// What the operator wants of its export.
    pub(crate) fn policy(&self) -> Policy {
        self.policy
    }

    /// Whether write(2) works on it: not on hugetlbfs.
    pub(crate) fn demand_stream_writes(&self) -> Result<()> {
        if self.takes_stream_writes {
            return Ok(());
        }
        Err(Error::NoStreamWrites { path: self.path.clone() })
    }

    /// Size of the pages that map it.
    pub(crate) fn page_size_bytes(&self) -> u32 {
        self.page_size_bytes.load(Ordering::Relaxed)
    }

    /// Looks how the file lies on its medium. To be repeated when it has grown.
    pub(crate) fn measure_pages(&self) {
        // Where the file system has no word on that (FIEMAP), the smallest is what is sure.
        let found = self.description.layout().map_or(smallest_page().into(), |l| l.page_size);
        let found = u32::try_from(found).unwrap_or_else(|_| smallest_page());
        self.page_size_bytes.store(found, Ordering::Relaxed);
    }

    /// What its mapping consists of.
    pub(crate) fn kind(&self) -> MappingKind {
        self.kind
    }

    /// Whether the mapping took `MAP_SYNC`.
    pub(crate) fn map_sync(&self) -> bool {
        self.map_sync
    }

    /// Export and path, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's description.
    pub(crate) fn description(&self) -> &Description {
        &self.description
    }

    /// Which of the file's lives this guarding belongs to.
    pub(crate) fn life(&self) -> Life {
        self.life
    }

    /// Reads through the kernel: a file by its description, a device by its mapping.
    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> Result<()> {
        match self.kind {
            MappingKind::DeviceDax => self.demand_mapping()?.read_at(data, offset)?,
            _ => self.description.read_at(data, offset)?,
        }
        Ok(())
    }

    /// Writes through the kernel, as [`read_at`](Self::read_at) reads.
    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> Result<()> {
        match self.kind {
            MappingKind::DeviceDax => self.demand_mapping()?.write_at(data, offset)?,
            _ => self.description.write_at(data, offset)?,
        }
        Ok(())
    }

    fn demand_mapping(&self) -> Result<Arc<Mapping>> {
        Ok(self.mapping().ok_or(Refusal::Draining)?)
    }

    /// The mapping, until it is given up.
    pub(crate) fn mapping(&self) -> Option<Arc<Mapping>> {
        locked(&self.mapping).clone()
    }

    /// What it lies on.
    pub(crate) fn file_system(&self) -> &Arc<FileSystem> {
        &self.file_system
    }

    /// The gate of the stream path.
    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Whether somebody wants the file, as the kernel says now; also once the guard is let go.
    pub(crate) fn broken(&self) -> Option<BreakKind> {
        match locked(&self.guard).as_ref().map(Guard::state) {
            Some(Ok(GuardState::Held)) => None,
            Some(Ok(GuardState::Broken(kind))) => Some(kind),
            Some(Ok(GuardState::ReadersPass)) => Some(BreakKind::Reader),
            // Not to know is to assume the worst.
            Some(Err(_)) | None => Some(BreakKind::Writer),
        }
    }

    /// What the kernel says of the guard; `None` if that can't be learned, or once it is let go.
    pub(crate) fn state(&self) -> Option<GuardState> {
        locked(&self.guard).as_ref().and_then(|guard| guard.state().ok())
    }

    /// Whether somebody wants the file for whom it will be taken back: where readers are left to the
    /// kernel, not for them.
    pub(crate) fn is_wanted(&self) -> bool {
        match self.broken() {
            None => false,
            Some(BreakKind::Reader) => self.policy.longest_outwait().is_none(),
            Some(BreakKind::Writer) => true,
        }
    }

    /// What may be done with a reader that wants the file now.
    pub(crate) fn readers(&self, limit: &LeaseBreakTime) -> Readers {
        let Some(longest) = self.policy.longest_outwait() else { return Readers::Revoke };
        match locked(&self.guard).as_ref().map(|guard| guard.outwait(limit, longest)) {
            Some(Ok(time)) => Readers::Outwait(time),
            Some(Err(FileError::CannotOutwait { why, .. })) => Readers::CannotOutwait(why),
            // Let go already, or the setting can't be read: the safe side.
            None | Some(Err(_)) => Readers::Revoke,
        }
    }

    /// Whether the kernel has let somebody through on its own, or we have. A reader does not count
    /// where readers are left to it.
    pub(crate) fn lapsed(&self) -> bool {
        let outwaited = || {
            self.policy.longest_outwait().is_some() && self.state() == Some(GuardState::ReadersPass)
        };
        let lapsed = locked(&self.guard).as_ref().is_none_or(Guard::lapsed);
        lapsed && !outwaited()
    }

    /// Shows others which bytes a pin has (/proc/locks, lslocks(8)), and refuses where another
    /// program has locked a part of them.
    pub(crate) fn lock_for(&self, pin: PinId, range: Range<u64>, kind: LockKind) -> Result<()> {
        let lock = self.description.lock_range(range, kind)?;
        locked(&self.locks).insert(pin, lock);
        Ok(())
    }

    /// What its regions cost.
    pub(crate) fn cost(&self) -> &Arc<FileCost> {
        &self.cost
    }

    /// How long one piece of its fence should take.
    pub(crate) fn time_of_a_piece(&self) -> Duration {
        self.cost.now().fence / self.pieces.max(1)
    }

    /// Another piece is cut off, or another region deregistered.
    pub(crate) fn step(&self) {
        self.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// How often that was so.
    pub(crate) fn steps(&self) -> usize {
        self.steps.load(Ordering::Relaxed)
    }

    /// The last region was deregistered just now, before the release.
    pub(crate) fn regions_are_gone(&self) {
        let _ = self.regions_gone.set(Instant::now());
    }

    /// Takes the regions of a pin in.
    pub(crate) fn add_segments(&self, pin: PinId, segments: Vec<Segment>) {
        locked(&self.segments).add(pin, segments);
    }

    /// Deregisters the regions of one pin, and waits until none of its stream transfers is inside
    /// the kernel. How many regions failed: their keys live.
    pub(crate) fn drop_segments(&self, pin: PinId) -> usize {
        self.gate.wait_until_out(pin);
        self.names.drop(pin);
        let lock = locked(&self.locks).remove(&pin);
        drop(lock);
        let segments = locked(&self.segments).remove(pin);
        self.deregister(segments)
    }

    /// What is being done to cut it off.
    pub(crate) fn cutting(&self) -> &Cutting {
        &self.cutting
    }

    /// To be called before [`drop_regions`](Self::drop_regions), which many threads may do at a time.
    /// From here on nothing is registered any more. How many regions there are.
    pub(crate) fn begin_dropping_regions(&self) -> usize {
        let closed = self.mapping().map(|mapping| mapping.fenced_by_return());
        drop(closed);
        let live = locked(&self.segments).count();
        live + self.retry_failed()
    }

    /// How many regions are still to be deregistered.
    pub(crate) fn regions_left(&self) -> usize {
        locked(&self.segments).count()
    }

    fn retry_failed(&self) -> usize {
        let mut failed = locked(&self.failed);
        failed.retry = failed.segments.len();
        failed.retry
    }

    /// Deregisters one region after the other until none is left. How many failed.
    pub(crate) fn drop_regions(&self) -> usize {
        self.deregister(std::iter::from_fn(|| self.next_segment()))
    }

    /// Takes no memory, and gives none back: the process's memory lock may be held by somebody
    /// who waits for this.
    fn next_segment(&self) -> Option<Segment> {
        let mut failed = locked(&self.failed);
        if failed.retry > 0 {
            failed.retry -= 1;
            return Some(failed.segments.swap_remove(0));
        }
        drop(failed);
        locked(&self.segments).pop()
    }

    fn deregister(&self, segments: impl IntoIterator<Item = Segment>) -> usize {
        let mut failed = 0;
        for segment in segments {
            let deregistered = segment.deregister();
            self.step();
            if let Err((segment, error)) = deregistered {
                tracing::error!(path = %self.path.display(), error, "a memory region could not be deregistered");
                locked(&self.failed).segments.push(segment);
                failed += 1;
            }
        }
        failed
    }

    /// Whether regions are left whose deregistration failed.
    pub(crate) fn has_failed_segments(&self) -> bool {
        !locked(&self.failed).segments.is_empty()
    }

    /// Its flushes, by commits and by changes of its size.
    pub(crate) fn flushes(&self) -> &Flushes {
        &self.flushes
    }

    /// Has the next reads of a range come from the medium, as far as nobody has written to it since it
    /// was flushed. Where there is no page cache they do anyway.
    pub(crate) fn drop_cached(&self, range: Range<u64>) -> Result<()> {
        if self.kind != MappingKind::PageCache {
            return Ok(());
        }
        Ok(self.demand_mapping()?.drop_cached(range)?)
    }

    /// Counts a fence that was not complete; returns how many there have been.
    pub(crate) fn count_fence_failure(&self) -> u32 {
        self.fence_failures.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Lets the breaker through.
    pub(crate) fn release(&self, fenced: Fenced) -> Option<Released> {
        // The last moment at which the kernel tells.
        self.look_for_readers();
        let guard = locked(&self.guard).take()?;
        match guard.release(fenced) {
            Ok(released) => Some(released),
            Err(wrong) => unreachable!("this mapping's own fence: {wrong}"),
        }
    }

    /// A growth without room could not give back what it had allocated past the end.
    pub(crate) fn note_excess(&self) {
        self.excess.store(true, Ordering::Relaxed);
    }

    /// Whether space past its end is to be given back after the release.
    pub(crate) fn has_excess(&self) -> bool {
        self.excess.load(Ordering::Relaxed)
    }

    /// Wakes who waits for the release, once the registry knows of it.
    pub(crate) fn announce_release(&self) {
        self.released.send_replace(true);
    }

    /// Waits until the guard has been let go.
    pub(crate) async fn wait_released(&self) {
        // It can't be closed: `self` holds the sender.
        let _ = self.released.subscribe().wait_for(|released| *released).await;
    }

    /// So that whoever reads the file next sees what is there.
    fn drop_what_is_not_on_the_medium(&self) {
        if let Err(error) = self.description.drop_cached(0..u64::MAX) {
            let path = self.path.display();
            tracing::error!(%path, %error, "the page cache still has what the medium lacks");
        }
    }

    /// After the release: deregisters what is left and gives the mapping up. Returns when each was
    /// done, and how many regions could not be deregistered.
    pub(crate) fn tear_down(&self) -> (Instant, Instant, usize) {
        self.retry_failed();
        let failed = self.drop_regions();
        let deregistered = match self.regions_gone.get() {
            Some(before_release) if failed == 0 => *before_release,
            _ => Instant::now(),
        };
        let locks = mem::take(&mut *locked(&self.locks));
        self.description.unlock_ranges(locks.into_values());
        let mapping = locked(&self.mapping).take();
        // Not under the lock: unmapping may hang, and others only look.
        drop(mapping);
        if self.flushes.have_failed() && self.kind == MappingKind::PageCache {
            self.drop_what_is_not_on_the_medium();
        }
        (deregistered, Instant::now(), failed)
    }
}

/// Of this system.
pub(crate) fn smallest_page() -> u32 {
    u32::try_from(rustix::param::page_size()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_pins_have_is_taken_once_also_what_comes_late() {
        let mut all = ByPin::default();
        all.add(PinId(3), vec![30, 31]);
        all.add(PinId(7), vec![70]);
        all.add(PinId(5), Vec::new());
        all.add(PinId(6), vec![60]);
        assert_eq!(all.remove(PinId(6)), [60]);
        assert_eq!(all.count(), 3);
        let popped: Vec<_> = std::iter::from_fn(|| all.pop()).collect();
        assert_eq!(popped, [31, 30, 70]);
        // Its registration was under way meanwhile.
        all.add(PinId(4), vec![40]);
        all.add(PinId(8), vec![80]);
        let popped: Vec<_> = std::iter::from_fn(|| all.pop()).collect();
        assert_eq!(popped, [40, 80]);
        assert_eq!(all.count(), 0);
    }
}
