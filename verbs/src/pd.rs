//! The protection domain: what binds keys to the queue pairs that may use them.

use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::device::Device;
use crate::error::Error;
use crate::memory::{Memory, PinnableMemory};
use crate::region::{Access, MemoryRegion, RegisterError, RegistrationMode};
use crate::sys::{self, ffi};

/// A protection domain (`ibv_alloc_pd(3)`; IBTA 10.2.3): a key of one domain is refused when it
/// comes in through a queue pair of another. Clones share it; it is freed with the last object on
/// it.
#[derive(Clone)]
pub struct ProtectionDomain(Arc<Inner>);

struct Inner {
    pd: NonNull<ffi::ibv_pd>,
    device: Device,
}

// SAFETY: verbs may be called on one domain from any thread and from several at a time.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl ProtectionDomain {
    /// Allocates a domain.
    ///
    /// # Errors
    ///
    /// [`Error::AllocateProtectionDomain`], when the device has no more.
    pub fn new(device: &Device) -> Result<Self, Error> {
        let failed =
            |source| Error::AllocateProtectionDomain { device: device.device_name(), source };
        sys::pass("ibv_alloc_pd").map_err(failed)?;
        // SAFETY: the context is open, and the domain keeps it so.
        let pd = unsafe { ffi::ibv_alloc_pd(device.context().as_ptr()) };
        let pd = sys::check_pointer(pd).map_err(failed)?;
        Ok(Self(Arc::new(Inner { pd, device: device.clone() })))
    }

    /// The device that it is on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.0.device
    }

    /// Registers bytes `range` of `memory`, with their pages pinned for as long as the region
    /// lives.
    ///
    /// # Errors
    ///
    /// Each gives the memory back. [`Error::RangeOutOfBounds`] for a range that is empty or beyond
    /// the memory; [`Error::PinRefused`] (EOPNOTSUPP) for a file on a DAX file system;
    /// [`Error::PinFault`] (EFAULT) for pages that can't be pinned for writing;
    /// [`Error::MemlockExceeded`] (ENOMEM); [`Error::Register`] for the rest.
    pub fn register_pinned<M: PinnableMemory>(
        &self,
        memory: M,
        range: Range<usize>,
        access: Access,
    ) -> Result<MemoryRegion<M>, RegisterError<M>> {
        MemoryRegion::register(self, memory, range, access, RegistrationMode::Pinned)
    }

    /// Registers bytes `range` of `memory` with on-demand paging (`IBV_ACCESS_ON_DEMAND`): nothing
    /// is pinned, the device follows the page tables, and taking the access away (`mprotect(2)`)
    /// makes the key useless at once.
    ///
    /// The range may reach past the end of a mapped file; a peer gets an access error there until
    /// the file has grown.
    ///
    /// # Errors
    ///
    /// Each gives the memory back. [`Error::RangeOutOfBounds`] for a range that is empty or beyond
    /// the memory; [`Error::NoOnDemandPaging`] when the device has none; [`Error::Register`] for
    /// the rest, among them EINVAL for a region of 2 GiB or more on rxe.
    pub fn register_on_demand<M: Memory>(
        &self,
        memory: M,
        range: Range<usize>,
        access: Access,
    ) -> Result<MemoryRegion<M>, RegisterError<M>> {
        MemoryRegion::register(self, memory, range, access, RegistrationMode::OnDemand)
    }

    pub(crate) fn as_raw(&self) -> NonNull<ffi::ibv_pd> {
        self.0.pd
    }

    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for ProtectionDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtectionDomain").field("device", &self.0.device).finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let freed = sys::destroy("ibv_dealloc_pd", || {
            // SAFETY: the domain is live, and nothing is left in it: whatever is, holds a clone.
            unsafe { ffi::ibv_dealloc_pd(self.pd.as_ptr()) }
        });
        if let Err(error) = freed {
            let device = self.device.name();
            tracing::error!(device, %error, "cannot free a protection domain; it is leaked");
            // The context can't be closed under it.
            std::mem::forget(self.device.clone());
        }
    }
}
