//! Shares of a guarded mapping as memory that may be registered.
//!
//! The promises are made here, and not in the server, which has no unsafe code; nor in the leases
//! crate, which knows nothing of RDMA.

use pinfold_leases::{PinnedShare, Share};

use crate::memory::{Memory, PinnableMemory};

// SAFETY: a share keeps the mapping's addresses reserved until it is dropped: the fence takes the
// access away, and only the last share unmaps. Address and length are those of the mapping, which
// doesn't move. Nobody makes references into it.
unsafe impl Memory for Share {
    fn as_ptr(&self) -> *mut u8 {
        Self::as_ptr(self)
    }

    fn len(&self) -> usize {
        Self::len(self)
    }
}

// SAFETY: as for `Share`.
unsafe impl Memory for PinnedShare {
    fn as_ptr(&self) -> *mut u8 {
        Self::as_ptr(self)
    }

    fn len(&self) -> usize {
        Self::len(self)
    }
}

// SAFETY: no fence is complete, and so no guard is released, before all pinned shares are dropped:
// until then whoever wants to truncate the file waits.
unsafe impl PinnableMemory for PinnedShare {}
