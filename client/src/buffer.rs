//! The buffer that transfers copy from and to.

use std::fmt;

use std::sync::Arc;

use memmap2::MmapMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::Error;
use crate::fabric::DeviceId;

/// What page sizes are multiples of, on every machine that has RDMA.
const GRAIN: usize = 4096;

/// Page-aligned memory, zeroed at first, that one transfer at a time owns.
///
/// In a session with RDMA it is registered with the session's device. Elsewhere it is plain memory.
/// It outlives the session: those of a [`KeptSession`](crate::KeptSession) stay registered when that
/// connects again.
///
/// A buffer that another session made, or that was made without a device, works too: what it
/// carries goes by the stream path, and the reports of its transfers say so. Only a pin that was
/// asked for with [`Transport::Rdma`](crate::Transport::Rdma) refuses it, with
/// [`Error::ForeignBuffer`].
pub struct Buffer(Memory);

enum Memory {
    Registered { buffer: pinfold_verbs::Buffer, device: DeviceId },
    Plain { memory: MmapMut, len: usize, _room: Option<OwnedSemaphorePermit> },
}

/// So many buffers of one size, registered once: to register one costs more than most transfers. A
/// buffer that is dropped goes back to its pool, also when the device is done with it long after its
/// caller stopped waiting. Clones share it.
///
/// Where the session has no RDMA there is nothing to register: then it only sees to it that there are
/// never more.
#[derive(Clone, Debug)]
pub struct BufferPool(Pool);

#[derive(Clone, Debug)]
enum Pool {
    Registered { pool: pinfold_verbs::BufferPool, device: DeviceId },
    Plain { capacity: usize, room: Arc<Semaphore> },
}

impl BufferPool {
    pub(crate) fn plain(count: usize, capacity: usize) -> Self {
        let room = Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS)));
        Self(Pool::Plain { capacity, room })
    }

    pub(crate) fn registered(pool: pinfold_verbs::BufferPool, device: DeviceId) -> Self {
        Self(Pool::Registered { pool, device })
    }

    /// Takes a buffer, with whatever bytes its last user left in it. Waits until one is there, in the
    /// order of the calls.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`], only without RDMA.
    pub async fn take(&self) -> Result<Buffer, Error> {
        match &self.0 {
            Pool::Registered { pool, device } => Ok(Buffer::registered(pool.take().await, *device)),
            Pool::Plain { capacity, room } => {
                Buffer::plain_within(*capacity, room.clone().acquire_owned().await.ok())
            }
        }
    }

    /// Takes a buffer if one is there.
    ///
    /// # Errors
    ///
    /// [`Error::NoMemory`], only without RDMA.
    pub fn try_take(&self) -> Result<Option<Buffer>, Error> {
        match &self.0 {
            Pool::Registered { pool, device } => {
                Ok(pool.try_take().map(|buffer| Buffer::registered(buffer, *device)))
            }
            Pool::Plain { capacity, room } => match room.clone().try_acquire_owned() {
                Ok(room) => Buffer::plain_within(*capacity, Some(room)).map(Some),
                Err(_) => Ok(None),
            },
        }
    }
}

impl Buffer {
    /// Memory that no device knows.
    pub(crate) fn plain(capacity: usize) -> Result<Self, Error> {
        Self::plain_within(capacity, None)
    }

    fn plain_within(capacity: usize, room: Option<OwnedSemaphorePermit>) -> Result<Self, Error> {
        let failed = |source| Error::NoMemory { capacity, source };
        let whole =
            whole_grains(capacity).ok_or_else(|| failed(std::io::ErrorKind::OutOfMemory.into()))?;
        let memory = MmapMut::map_anon(whole).map_err(failed)?;
        Ok(Self(Memory::Plain { memory, len: capacity, _room: room }))
    }

    /// Memory that this device knows.
    pub(crate) fn registered(buffer: pinfold_verbs::Buffer, device: DeviceId) -> Self {
        Self(Memory::Registered { buffer, device })
    }

    /// The registered memory, if it is this device's; or the buffer back.
    pub(crate) fn into_registered(self, with: DeviceId) -> Result<pinfold_verbs::Buffer, Self> {
        match self.0 {
            Memory::Registered { buffer, device } if device == with => Ok(buffer),
            other => Err(Self(other)),
        }
    }

    /// Whether this device knows it.
    pub(crate) fn is_registered(&self, with: DeviceId) -> bool {
        matches!(&self.0, Memory::Registered { device, .. } if *device == with)
    }

    /// The bytes that transfers may use.
    pub fn len(&self) -> usize {
        match &self.0 {
            Memory::Registered { buffer, .. } => buffer.len(),
            Memory::Plain { len, .. } => *len,
        }
    }

    /// Without any byte.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What [`len`](Self::len) may be set to: at least what was asked for.
    pub fn capacity(&self) -> usize {
        match &self.0 {
            Memory::Registered { buffer, .. } => buffer.capacity(),
            Memory::Plain { memory, .. } => memory.len(),
        }
    }

    /// Sets the length. Bytes keep what they had in them before, at first zero.
    ///
    /// # Errors
    ///
    /// [`Error::BufferTooSmall`] beyond the capacity.
    pub fn set_len(&mut self, wanted: usize) -> Result<(), Error> {
        let capacity = self.capacity();
        let too_small = || Error::BufferTooSmall { wanted, capacity };
        match &mut self.0 {
            Memory::Registered { buffer, .. } => buffer.set_len(wanted).map_err(|_| too_small()),
            Memory::Plain { .. } if wanted > capacity => Err(too_small()),
            Memory::Plain { len, .. } => {
                *len = wanted;
                Ok(())
            }
        }
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        match &self.0 {
            Memory::Registered { buffer, .. } => buffer.as_slice(),
            Memory::Plain { memory, len, .. } => &memory[..*len],
        }
    }

    /// The bytes, to be changed.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Registered { buffer, .. } => buffer.as_mut_slice(),
            Memory::Plain { memory, len, .. } => &mut memory[..*len],
        }
    }
}

/// Memory comes in whole grains, and at least one.
pub(crate) fn whole_grains(capacity: usize) -> Option<usize> {
    capacity.max(1).checked_next_multiple_of(GRAIN)
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registered = matches!(self.0, Memory::Registered { .. });
        f.debug_struct("Buffer")
            .field("len", &self.len())
            .field("capacity", &self.capacity())
            .field("registered", &registered)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_memory_is_zeroed_and_keeps_its_bytes_when_cut() {
        let mut buffer = Buffer::plain(5000).unwrap();
        assert_eq!((buffer.len(), buffer.capacity()), (5000, 8192));
        assert!(buffer.as_slice().iter().all(|byte| *byte == 0));
        buffer.as_mut_slice().fill(7);
        buffer.set_len(10).unwrap();
        assert_eq!(buffer.as_slice(), [7; 10]);
        buffer.set_len(8192).unwrap();
        assert_eq!(buffer.as_slice()[4999..5001], [7, 0]);
        let refused = buffer.set_len(8193);
        assert!(matches!(refused, Err(Error::BufferTooSmall { wanted: 8193, capacity: 8192 })));
    }

    #[tokio::test]
    async fn a_plain_pool_has_no_more_than_it_was_made_for() {
        let pool = BufferPool::plain(2, 100);
        let (one, two) = (pool.take().await.unwrap(), pool.try_take().unwrap().unwrap());
        assert_eq!((one.len(), two.len()), (100, 100));
        assert!(pool.try_take().unwrap().is_none());
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.take().await.unwrap().len() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(one);
        assert_eq!(waiting.await.unwrap(), 100);
    }

    #[test]
    fn an_empty_buffer_can_be_had() {
        assert!(Buffer::plain(0).unwrap().is_empty());
    }

    #[test]
    fn more_memory_than_there_can_be_is_refused() {
        assert!(matches!(Buffer::plain(usize::MAX), Err(Error::NoMemory { .. })));
    }
}
