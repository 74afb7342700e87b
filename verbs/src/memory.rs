//! What may be registered: the two promises that memory must make.

use std::sync::Arc;

use memmap2::MmapRaw;

/// Memory that stays reserved for as long as the value lives.
///
/// "Reserved" is less than "mapped": the owner may take the access away (`mprotect(PROT_NONE)`) or
/// map inaccessible memory over it, which is how a fence works under on-demand paging. What it may
/// not do is let anything else take these addresses, because an on-demand key follows the *virtual
/// address*: a peer would reach whatever is mapped there next.
///
/// # Safety
///
/// For as long as the value lives, wherever it is moved:
///
/// * [`as_ptr`](Self::as_ptr) and [`len`](Self::len) don't change;
/// * no other mapping takes any of the addresses `as_ptr()..as_ptr() + len()`;
/// * the bytes are not owned by Rust references: peers may write them at any time, so whoever
///   looks does so through pointers (volatile or atomic), never through `&[u8]`.
pub unsafe trait Memory: Send + Sync + 'static {
    /// The address of the first byte.
    fn as_ptr(&self) -> *mut u8;

    /// The number of bytes.
    fn len(&self) -> usize;

    /// Without any byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Memory that may be pinned: the device then writes to the *pages*, whatever happens to the
/// mapping.
///
/// # Safety
///
/// Beside what [`Memory`] asks for: whoever takes the pages away (by truncating the file, or by
/// giving its blocks to somebody else) waits until the value is dropped. For memory that is no
/// file this holds by itself, since pinned pages aren't reused.
pub unsafe trait PinnableMemory: Memory {}

// SAFETY: the mapping is removed only when the value is dropped, and the addresses don't change
// (`remap` is unsafe and needs a `&mut` that a region doesn't give). It hands out pointers only.
unsafe impl Memory for MmapRaw {
    fn as_ptr(&self) -> *mut u8 {
        self.as_mut_ptr()
    }

    fn len(&self) -> usize {
        Self::len(self)
    }
}

// SAFETY: pinned pages live until they are unpinned. Nobody hands the blocks of a file to somebody
// else meanwhile: on a DAX file system, where that could happen, the kernel refuses to pin.
unsafe impl PinnableMemory for MmapRaw {}

// SAFETY: the value inside lives at least as long as any of its owners.
unsafe impl<T: Memory + ?Sized> Memory for Arc<T> {
    fn as_ptr(&self) -> *mut u8 {
        T::as_ptr(self)
    }

    fn len(&self) -> usize {
        T::len(self)
    }
}

// SAFETY: the value inside lives at least as long as any of its owners.
unsafe impl<T: PinnableMemory + ?Sized> PinnableMemory for Arc<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_and_its_shares_are_the_same_memory() {
        let map = MmapRaw::from(memmap2::MmapMut::map_anon(4096).unwrap());
        let address = Memory::as_ptr(&map);
        let shared = Arc::new(map);
        assert_eq!(Memory::as_ptr(&shared), address);
        assert_eq!(Memory::len(&shared), 4096);
        assert!(!Memory::is_empty(&shared));
    }
}
