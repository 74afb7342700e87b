//! A file under guard: its guard, its mapping and the regions on it.

use std::collections::HashMap;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use pinfold_leases::{
    Description, FenceFailed, Fenced, Guard, GuardId, GuardState, GuardTier, Mapping, MappingKind,
    Released,
};
use tokio::sync::watch;

use crate::error::{Result, with_causes};
use crate::fabric::Segment;
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

    /// Whether the kernel's promise still holds.
    pub(crate) fn guard_holds(&self) -> bool {
        let guard = locked(&self.guard);
        guard.as_ref().is_some_and(|guard| matches!(guard.state(), Ok(GuardState::Held)))
    }

    /// Takes the regions of a pin in.
    pub(crate) fn add_segments(&self, pin: PinId, segments: Vec<Segment>) {
        locked(&self.segments).insert(pin, segments);
    }

    /// Deregisters the regions of one pin. How many failed: their keys live.
    pub(crate) fn drop_segments(&self, pin: PinId) -> usize {
        let segments = locked(&self.segments).remove(&pin);
        deregister(&self.path, segments.unwrap_or_default())
    }

    /// Deregisters whatever is registered. How many failed.
    pub(crate) fn drop_all_segments(&self) -> usize {
        let all = mem::take(&mut *locked(&self.segments));
        all.into_values().map(|segments| deregister(&self.path, segments)).sum()
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
            Ok(released) => {
                self.released.send_replace(true);
                Some(released)
            }
            Err(wrong) => unreachable!("this mapping's own fence: {wrong}"),
        }
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

fn deregister(path: &Path, segments: Vec<Segment>) -> usize {
    segments
        .into_iter()
        .filter_map(|segment| segment.deregister().err())
        .inspect(|error| {
            let error = with_causes(error);
            tracing::error!(path = %path.display(), error, "a memory region could not be deregistered");
        })
        .count()
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Every change made under these locks is a single insert, remove or take.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
