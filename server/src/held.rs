//! A file under guard: its guard, its mapping and the regions on it.

use std::collections::HashMap;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pinfold_leases::{
    BreakKind, Description, FenceFailed, Fenced, Guard, GuardId, GuardState, GuardTier, Mapping,
    MappingKind, Released,
};
use tokio::sync::watch;

use crate::error::Result;
use crate::fabric::Segment;
use crate::gate::Gate;
use crate::ids::PinId;

/// See the module's documentation. What must go in order is in options that are taken.
#[derive(Debug)]
pub(crate) struct HeldFile {
    id: GuardId,
    tier: GuardTier,
    kind: MappingKind,
    path: PathBuf,
    description: Description,
    guard: Mutex<Option<Guard>>,
    mapping: Mutex<Option<Arc<Mapping>>>,
    map_sync: bool,
    segments: Mutex<HashMap<PinId, Vec<Segment>>>,
    /// Segments whose deregistration failed: their keys live until a later try succeeds.
    failed: Mutex<Vec<Segment>>,
    fence_failures: AtomicU32,
    gate: Arc<Gate>,
    released: watch::Sender<bool>,
}

impl HeldFile {
    /// Of a file that was just guarded and mapped.
    pub(crate) fn new(
        description: Description,
        kind: MappingKind,
        guard: Guard,
        mapping: Mapping,
    ) -> Self {
        Self {
            id: guard.id(),
            tier: guard.tier(),
            kind,
            path: description.path().to_owned(),
            description,
            guard: Mutex::new(Some(guard)),
            map_sync: mapping.map_sync(),
            mapping: Mutex::new(Some(Arc::new(mapping))),
            segments: Mutex::default(),
            failed: Mutex::default(),
            fence_failures: AtomicU32::new(0),
            gate: Arc::default(),
            released: watch::Sender::new(false),
        }
    }

    /// Names this guarding.
    pub(crate) fn id(&self) -> GuardId {
        self.id
    }

    /// What holds it still.
    pub(crate) fn tier(&self) -> GuardTier {
        self.tier
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

    /// The mapping, until it is given up.
    pub(crate) fn mapping(&self) -> Option<Arc<Mapping>> {
        locked(&self.mapping).clone()
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

    /// Whether the kernel has let somebody through on its own, or we have.
    pub(crate) fn lapsed(&self) -> bool {
        locked(&self.guard).as_ref().is_none_or(Guard::lapsed)
    }

    /// Takes the regions of a pin in.
    pub(crate) fn add_segments(&self, pin: PinId, segments: Vec<Segment>) {
        locked(&self.segments).insert(pin, segments);
    }

    /// Deregisters the regions of one pin, and waits until none of its stream transfers is inside
    /// the kernel. How many regions failed: their keys live.
    pub(crate) fn drop_segments(&self, pin: PinId) -> usize {
        self.gate.wait_until_out(pin);
        let segments = locked(&self.segments).remove(&pin);
        self.deregister(segments.unwrap_or_default())
    }

    /// Deregisters whatever is registered, and tries again what failed before. How many failed.
    pub(crate) fn drop_all_segments(&self) -> usize {
        let mut all = mem::take(&mut *locked(&self.failed));
        let live = mem::take(&mut *locked(&self.segments));
        all.extend(live.into_values().flatten());
        self.deregister(all)
    }

    fn deregister(&self, segments: Vec<Segment>) -> usize {
        let mut failed = 0;
        for segment in segments {
            if let Err((segment, error)) = segment.deregister() {
                tracing::error!(path = %self.path.display(), error, "a memory region could not be deregistered");
                locked(&self.failed).push(segment);
                failed += 1;
            }
        }
        failed
    }

    /// Whether regions are left whose deregistration failed.
    pub(crate) fn has_failed_segments(&self) -> bool {
        !locked(&self.failed).is_empty()
    }

    /// Counts a fence that was not complete; returns how many there have been.
    pub(crate) fn count_fence_failure(&self) -> u32 {
        self.fence_failures.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Cuts everything off. Regions that pin pages are deregistered, since nothing else cuts those.
    pub(crate) fn fence(&self) -> Option<Result<Fenced, FenceFailed>> {
        let mapping = self.mapping()?;
        let fenced = mapping.fence();
        if fenced.is_ok() {
            return Some(fenced);
        }
        self.drop_all_segments();
        Some(mapping.fence())
    }

    /// Lets the breaker through.
    pub(crate) fn release(&self, fenced: Fenced) -> Option<Released> {
        let guard = locked(&self.guard).take()?;
        match guard.release(fenced) {
            Ok(released) => Some(released),
            Err(wrong) => unreachable!("this mapping's own fence: {wrong}"),
        }
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

    /// After the release: deregisters what is left and gives the mapping up. Returns when each was
    /// done, and how many regions could not be deregistered.
    pub(crate) fn tear_down(&self) -> (Instant, Instant, usize) {
        let failed = self.drop_all_segments();
        let deregistered = Instant::now();
        drop(locked(&self.mapping).take());
        (deregistered, Instant::now(), failed)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Every change made under these locks is a single insert, remove or take.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
