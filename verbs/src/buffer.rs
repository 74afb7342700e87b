//! The buffer: local memory that one transfer at a time owns.

use std::fmt;
use std::slice;
use std::sync::Arc;

use memmap2::{MmapMut, MmapRaw};

use crate::buffer_pool::Home;
use crate::error::Error;
use crate::pd::ProtectionDomain;
use crate::region::{Access, MemoryRegion};

/// Page-aligned anonymous memory, zeroed and pinned, that transfers copy from and to.
///
/// It gives no rights to peers, so between two transfers it is ordinary memory. A post moves it
/// into the [`Lane`](crate::Lane), and the completion hands it back: meanwhile nobody can free,
/// read or change it.
///
/// ```compile_fail,E0382
/// # use pinfold_verbs::{Buffer, Lane, Piece};
/// # fn f(lane: Lane<()>, mut buffer: Buffer, pieces: &[Piece]) {
/// lane.post_write(buffer, pieces, ());
/// buffer.as_mut_slice().fill(0);
/// # }
/// ```
pub struct Buffer {
    /// Taken only when it goes home.
    region: Option<Region>,
    len: usize,
    /// The pool that it is of.
    home: Option<Arc<Home>>,
}

/// Boxed: a buffer is moved about a lot, in results too.
pub(crate) type Region = Box<MemoryRegion<MmapRaw>>;

impl Buffer {
    /// Maps and registers a buffer of `capacity` bytes, rounded up to whole pages; its length is
    /// `capacity`.
    ///
    /// # Errors
    ///
    /// [`Error::MapBuffer`]; those of [`ProtectionDomain::register_pinned`], for a capacity of 0
    /// [`Error::RangeOutOfBounds`].
    pub fn new(domain: &ProtectionDomain, capacity: usize) -> Result<Self, Error> {
        let failed = |source| Error::MapBuffer { len: capacity, source };
        let whole = capacity
            .checked_next_multiple_of(rustix::param::page_size())
            .ok_or_else(|| failed(std::io::ErrorKind::OutOfMemory.into()))?;
        let memory = MmapRaw::from(MmapMut::map_anon(whole).map_err(failed)?);
        let region = domain.register_pinned(memory, 0..whole, Access::LOCAL)?;
        Ok(Self { region: Some(Box::new(region)), len: capacity, home: None })
    }

    /// One that goes back to a pool.
    pub(crate) fn at_home(region: Region, len: usize, home: Arc<Home>) -> Self {
        Self { region: Some(region), len, home: Some(home) }
    }

    pub(crate) fn into_region(mut self) -> Option<Region> {
        self.region.take()
    }

    fn region(&self) -> &Region {
        self.region.as_ref().expect("it is taken only by the drop")
    }

    /// The bytes that pieces may name.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Without any byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What [`len`](Self::len) may be set to.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.region().len()
    }

    /// Sets the length. Bytes keep what they had in them before, at first zero.
    ///
    /// # Errors
    ///
    /// [`Error::BufferTooSmall`] beyond the capacity.
    pub fn set_len(&mut self, len: usize) -> Result<(), Error> {
        if len > self.capacity() {
            return Err(Error::BufferTooSmall { len, capacity: self.capacity() });
        }
        self.len = len;
        Ok(())
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: `len` bytes of a mapping that lives as long as `self`, initialised by the kernel.
        // Peers have no right to it, and no transfer runs while the caller has the buffer.
        unsafe { slice::from_raw_parts(self.region().memory().as_mut_ptr(), self.len) }
    }

    /// The bytes, to be changed.
    #[must_use]
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as for `as_slice`; and `&mut self` is the only reference to them.
        unsafe { slice::from_raw_parts_mut(self.region().memory().as_mut_ptr(), self.len) }
    }

    pub(crate) fn address(&self) -> u64 {
        self.region().remote_address()
    }

    pub(crate) fn local_key(&self) -> u32 {
        self.region().local_key()
    }

    pub(crate) fn protection_domain(&self) -> &ProtectionDomain {
        self.region().protection_domain()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let (Some(home), Some(region)) = (self.home.take(), self.region.take()) {
            home.welcome(region);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("len", &self.len)
            .field("capacity", &self.capacity())
            .finish_non_exhaustive()
    }
}
