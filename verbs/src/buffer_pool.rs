//! Buffers that are registered once, and used again and again.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Semaphore;

use crate::buffer::{Buffer, Region};
use crate::error::Error;
use crate::pd::ProtectionDomain;

/// So many buffers of one size. A buffer that is dropped, also by a lane whose caller stopped waiting,
/// goes back to its pool. Clones share it; it is freed with the last buffer.
#[derive(Clone)]
pub struct BufferPool(Arc<Home>);

/// Where buffers go back to.
pub(crate) struct Home {
    free: Mutex<Vec<Region>>,
    /// How many there are in `free`, for those who wait.
    there: Semaphore,
    count: usize,
    capacity: usize,
}

impl BufferPool {
    /// Registers `count` buffers of `capacity` bytes each, rounded up to whole pages.
    ///
    /// # Errors
    ///
    /// Those of [`Buffer::new`].
    pub fn new(domain: &ProtectionDomain, count: usize, capacity: usize) -> Result<Self, Error> {
        let buffers: Result<Vec<_>, _> =
            (0..count).map(|_| Buffer::new(domain, capacity)).collect();
        let free: Vec<_> = buffers?.into_iter().filter_map(Buffer::into_region).collect();
        let there = Semaphore::new(free.len());
        Ok(Self(Arc::new(Home { free: Mutex::new(free), there, count, capacity })))
    }

    /// Takes a buffer, as long as the pool's are, with whatever bytes its last user left in it. Waits
    /// until one is there, in the order of the calls.
    pub async fn take(&self) -> Buffer {
        loop {
            if let Ok(permit) = self.0.there.acquire().await {
                permit.forget();
            }
            if let Some(buffer) = self.pop() {
                return buffer;
            }
        }
    }

    /// Takes a buffer if one is there.
    #[must_use]
    pub fn try_take(&self) -> Option<Buffer> {
        self.0.there.try_acquire().ok()?.forget();
        self.pop()
    }

    /// How many buffers it has, and how many of them are there now.
    #[must_use]
    pub fn count(&self) -> (usize, usize) {
        (self.0.count, self.0.there.available_permits())
    }

    fn pop(&self) -> Option<Buffer> {
        let region = self.0.free().pop()?;
        Some(Buffer::at_home(region, self.0.capacity, Arc::clone(&self.0)))
    }
}

impl Home {
    /// Takes a buffer's memory back.
    pub(crate) fn welcome(&self, region: Region) {
        self.free().push(region);
        self.there.add_permits(1);
    }

    fn free(&self) -> MutexGuard<'_, Vec<Region>> {
        // Every change of it is a single step.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, there) = self.count();
        f.debug_struct("BufferPool")
            .field("count", &count)
            .field("there", &there)
            .field("capacity", &self.0.capacity)
            .finish_non_exhaustive()
    }
}
