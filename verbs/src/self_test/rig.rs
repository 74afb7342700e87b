//! The two ends of the self-test, the memory between them, and how bytes are compared.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{MmapMut, MmapOptions, MmapRaw};
use rustix::mm::{MprotectFlags, mprotect};

use super::SelfTestError;
use super::rules::{Direction, PAGE, PlacementOutcome};
use crate::buffer::Buffer;
use crate::completion::CompletionStatus;
use crate::device::{Device, DeviceName};
use crate::error::Error;
use crate::extended::Lack;
use crate::lane::{Atomic, Lane, Piece, PostError, RemoteSlice, UnconnectedLane};
use crate::memory::{Memory, PinnableMemory};
use crate::pd::ProtectionDomain;
use crate::queue_pair::{Connected, Mtu, QueuePair, QueuePairBuilder};
use crate::region::{Access, MemoryRegion, RegistrationMode, RemoteKey};

/// How long a transfer may take: beyond that the device is of no use. (An unanswered one ends after
/// some 15 seconds with [`CompletionStatus::RetryExceeded`]; nobody waits for that here.)
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of the target: room for the longest message at the last offset, and a page around it.
const TARGET_BYTES: usize = 4 * PAGE;

pub(super) struct Rig {
    pub(super) device: Device,
    pub(super) mode: RegistrationMode,
    pub(super) domain: ProtectionDomain,
    pub(super) active_mtu: Mtu,
}

impl Rig {
    pub(super) fn new(device: &Device, mode: RegistrationMode) -> Result<Self, SelfTestError> {
        let failed = |source| SelfTestError::Verbs { device: device.device_name(), source };
        let port = device.query_port().map_err(failed)?;
        let active_mtu = Mtu::largest_within(port.active_mtu_bytes).unwrap_or(Mtu::Mtu256);
        let domain = ProtectionDomain::new(device).map_err(failed)?;
        Ok(Self { device: device.clone(), mode, domain, active_mtu })
    }

    pub(super) fn device_name(&self) -> DeviceName {
        self.device.device_name()
    }

    pub(super) fn failed(&self, source: Error) -> SelfTestError {
        SelfTestError::Verbs { device: self.device_name(), source }
    }

    pub(super) fn target(&self) -> Result<Arc<Target>, SelfTestError> {
        let map = MmapMut::map_anon(TARGET_BYTES)
            .map_err(|source| self.failed(Error::MapBuffer { len: TARGET_BYTES, source }))?;
        let target = Target(MmapRaw::from(map));
        target.fill();
        Ok(Arc::new(target))
    }

    pub(super) fn register(
        &self,
        target: &Arc<Target>,
        range: Range<usize>,
        access: Access,
    ) -> Result<MemoryRegion<Arc<Target>>, SelfTestError> {
        let target = Arc::clone(target);
        match self.mode {
            RegistrationMode::Pinned => self.domain.register_pinned(target, range, access),
            RegistrationMode::OnDemand => self.domain.register_on_demand(target, range, access),
        }
        .map_err(|refused| self.failed(refused.into()))
    }

    /// Whether a region of that many bytes can be registered on demand: over memory that is only
    /// reserved, so it costs next to nothing.
    pub(super) fn can_register(&self, bytes: u64) -> Result<bool, SelfTestError> {
        let Ok(len) = usize::try_from(bytes) else { return Ok(false) };
        let map = MmapOptions::new().len(len).no_reserve_swap().map_anon();
        // An address space too small for it (ulimit -v) is too small for such regions, too.
        let Ok(map) = map else { return Ok(false) };
        let access = Access::REMOTE_READ_WRITE;
        match self.domain.register_on_demand(MmapRaw::from(map), 0..len, access) {
            Ok(region) => {
                region.deregister().map_err(|failed| self.failed(failed.into()))?;
                Ok(true)
            }
            Err(_) => Ok(false),
        }
    }

    /// A lane, connected to a queue pair in the domain `target`.
    pub(super) fn connect(
        &self,
        mtu: Mtu,
        target: &ProtectionDomain,
    ) -> Result<Pair, SelfTestError> {
        self.connect_allowing(Access::REMOTE_READ_WRITE, mtu, target)
    }

    /// The same, where the far end allows so much.
    pub(super) fn connect_allowing(
        &self,
        access: Access,
        mtu: Mtu,
        target: &ProtectionDomain,
    ) -> Result<Pair, SelfTestError> {
        let connect = || -> Result<Pair, Error> {
            let lane = UnconnectedLane::new(&self.domain, 2)?;
            let responder = QueuePairBuilder::new(target).remote_access(access).build()?;
            let (to_lane, to_responder) = (lane.endpoint(), responder.endpoint());
            let responder = responder.connect(&to_lane, mtu)?;
            let lane = lane.connect(&to_responder, mtu)?;
            let buffer = Buffer::new(&self.domain, TARGET_BYTES)?;
            Ok(Pair { lane, _responder: responder, buffer: Some(buffer) })
        };
        connect().map_err(|error| self.failed(error))
    }
}

/// A message: from the start of the pair's buffer, or into it.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    pub(super) direction: Direction,
    pub(super) address: u64,
    pub(super) key: RemoteKey,
    pub(super) len: usize,
}

/// A lane and the queue pair that answers it.
pub(super) struct Pair {
    lane: Lane<()>,
    _responder: QueuePair<Connected>,
    /// In the lane during a transfer, and lost with it when that never ends.
    buffer: Option<Buffer>,
}

impl Pair {
    /// One transfer between the buffer's start and the target, and how it ended.
    pub(super) fn run(
        &mut self,
        rig: &Rig,
        transfer: Transfer,
    ) -> Result<CompletionStatus, SelfTestError> {
        let Transfer { direction, address, key, len } = transfer;
        let piece = Piece { local: 0..len, remote: RemoteSlice { address, key, len } };
        self.wait(rig, |lane, buffer| match direction {
            Direction::Write => lane.post_write(buffer, &[piece], ()),
            Direction::Read => lane.post_read(buffer, &[piece], ()),
        })
    }

    /// A flush of the transfer's bytes, and how it ended.
    pub(super) fn flush(
        &mut self,
        rig: &Rig,
        transfer: Transfer,
    ) -> Result<CompletionStatus, SelfTestError> {
        let Transfer { address, key, len, .. } = transfer;
        let range = RemoteSlice { address, key, len };
        self.wait(rig, |lane, buffer| lane.post_flush(buffer, &[range], ()))
    }

    /// An atomic at an offset of the target, how it ended, and what it found there.
    pub(super) fn atomic(
        &mut self,
        rig: &Rig,
        region: &MemoryRegion<Arc<Target>>,
        offset: usize,
        atomic: Atomic,
    ) -> Result<(CompletionStatus, u64), SelfTestError> {
        let address = region.remote_address() + offset as u64;
        let remote = RemoteSlice { address, key: region.remote_key(), len: size_of::<u64>() };
        let status = self.wait(rig, |lane, buffer| lane.post_atomic(buffer, remote, atomic, ()))?;
        let bytes = self.buffer.as_ref().and_then(|buffer| buffer.as_slice().first_chunk());
        Ok((status, bytes.map_or(0, |bytes| u64::from_ne_bytes(*bytes))))
    }

    /// Why this end can't ask for ATOMIC WRITE, if so.
    pub(super) fn no_atomic_write_because(&self) -> Option<Lack> {
        self.lane.no_atomic_write_because()
    }

    /// Why this end can't ask for a flush, if so.
    pub(super) fn no_flush_because(&self) -> Option<Lack> {
        self.lane.no_flush_because()
    }

    fn wait(
        &mut self,
        rig: &Rig,
        post: impl FnOnce(&Lane<()>, Buffer) -> Result<(), PostError<()>>,
    ) -> Result<CompletionStatus, SelfTestError> {
        let stalled = || SelfTestError::Stalled { device: rig.device_name(), waited: PATIENCE };
        let buffer = self.buffer.take().ok_or_else(stalled)?;
        post(&self.lane, buffer).map_err(|refused| rig.failed(refused.into()))?;

        let started = Instant::now();
        loop {
            if let Some(done) = self.lane.poll().map_err(|error| rig.failed(error))? {
                self.buffer = Some(done.buffer);
                return Ok(done.status);
            }
            if started.elapsed() > PATIENCE {
                return Err(stalled());
            }
            thread::yield_now();
        }
    }

    /// One transfer at an offset of the target, and whether the bytes are where they belong.
    pub(super) fn place(
        &mut self,
        rig: &Rig,
        region: &MemoryRegion<Arc<Target>>,
        direction: Direction,
        offset: usize,
        len: usize,
    ) -> Result<PlacementOutcome, SelfTestError> {
        let target = region.memory();
        target.fill();
        // What is written differs from what was there in each byte, so that a byte that is missing
        // shows; and what is read into had other bytes before.
        let payload: Vec<u8> = (offset..offset + len).map(|index| !pattern(index)).collect();
        let Some(buffer) = &mut self.buffer else {
            return Err(SelfTestError::Stalled { device: rig.device_name(), waited: PATIENCE });
        };
        buffer.as_mut_slice()[..len].copy_from_slice(&payload);

        let (start, key) = (region.remote_address(), region.remote_key());
        let address = start + offset as u64;
        let status = self.run(rig, Transfer { direction, address, key, len })?;
        if !status.is_success() {
            return Ok(PlacementOutcome::Failed(status));
        }
        let right = match (direction, &self.buffer) {
            (Direction::Write, _) => {
                // The completion of a write says that it was accepted; that of a read behind it,
                // that it is in memory (PCIe ordering). What it reads doesn't matter.
                let behind = Transfer { direction: Direction::Read, address: start, key, len: 1 };
                let status = self.run(rig, behind)?;
                if !status.is_success() {
                    return Ok(PlacementOutcome::Failed(status));
                }
                let mut image: Vec<u8> = (0..TARGET_BYTES).map(pattern).collect();
                image[offset..offset + len].copy_from_slice(&payload);
                target.snapshot() == image
            }
            (Direction::Read, Some(buffer)) => {
                let bytes = &buffer.as_slice()[..len];
                (offset..).zip(bytes).all(|(index, byte)| *byte == pattern(index))
            }
            (Direction::Read, None) => false,
        };
        Ok(if right { PlacementOutcome::Right } else { PlacementOutcome::Misplaced })
    }
}

/// The memory that is written and read remotely. The device may change it at any time, so it is
/// looked at in volatile words and never through references.
pub(super) struct Target(MmapRaw);

impl Target {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    fn words(&self) -> impl Iterator<Item = *mut u64> {
        let first = self.0.as_mut_ptr().cast::<u64>();
        (0..self.0.len() / size_of::<u64>()).map(move |index| first.wrapping_add(index))
    }

    /// Writes the pattern, by the processor.
    pub(super) fn fill(&self) {
        for (index, word) in self.words().enumerate() {
            let bytes = std::array::from_fn(|byte| pattern(index * size_of::<u64>() + byte));
            // SAFETY: an aligned word of the mapping, which is accessible: the self-test fences it
            // in one place, and lifts that before it looks again.
            unsafe { word.write_volatile(u64::from_ne_bytes(bytes)) };
        }
    }

    /// The bytes, as the processor sees them.
    pub(super) fn snapshot(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.len());
        for word in self.words() {
            // SAFETY: as in `fill`.
            let word = unsafe { word.read_volatile() };
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    /// Whether all bytes are as `fill` left them.
    pub(super) fn is_filled(&self) -> bool {
        (0..).zip(self.snapshot()).all(|(index, byte)| byte == pattern(index))
    }

    /// Takes the access away or gives it back (`mprotect(2)`).
    pub(super) fn protect(&self, accessible: bool) -> Result<(), Error> {
        let flags = if accessible {
            MprotectFlags::READ | MprotectFlags::WRITE
        } else {
            MprotectFlags::empty()
        };
        let start: *mut c_void = self.0.as_mut_ptr().cast();
        // SAFETY: the range is exactly this mapping, to which there are no references.
        unsafe { mprotect(start, self.0.len(), flags) }
            .map_err(|errno| Error::MapBuffer { len: self.0.len(), source: errno.into() })
    }
}

// SAFETY: the mapping stays until the value is dropped, at its place; `protect` changes its access
// only; and it is looked at through pointers only.
unsafe impl Memory for Target {
    fn as_ptr(&self) -> *mut u8 {
        self.0.as_mut_ptr()
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

// SAFETY: anonymous memory: its pinned pages belong to nobody else before they are unpinned.
unsafe impl PinnableMemory for Target {}

/// The byte at an index of the target: without a period that a page or a packet would share.
fn pattern(index: usize) -> u8 {
    let mixed = (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed.to_be_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::super::rules::{LENGTHS, OFFSETS};
    use super::*;

    #[test]
    fn the_longest_message_fits() {
        let offset = OFFSETS.into_iter().max().unwrap();
        let len = LENGTHS.into_iter().max().unwrap();
        assert!(offset + len < TARGET_BYTES);
    }

    #[test]
    fn a_read_from_the_wrong_place_shows() {
        // rxe under on-demand paging forgets the offset within the page.
        for offset in OFFSETS.into_iter().filter(|offset| *offset > 0) {
            for len in LENGTHS {
                let right: Vec<_> = (offset..offset + len).map(pattern).collect();
                let wrong: Vec<_> = (0..len).map(pattern).collect();
                assert_ne!(right, wrong, "{len} bytes at {offset}");
            }
        }
    }

    #[test]
    fn what_was_filled_is_found_and_a_changed_byte_too() {
        let target = Target(MmapRaw::from(MmapMut::map_anon(TARGET_BYTES).unwrap()));
        assert!(!target.is_filled());
        target.fill();
        assert!(target.is_filled());
        let byte = target.0.as_mut_ptr().wrapping_add(4999);
        // SAFETY: within the mapping, and nobody else uses it.
        unsafe { byte.write_volatile(!pattern(4999)) };
        assert!(!target.is_filled());
        assert_eq!(target.snapshot()[4999], !pattern(4999));
    }

    #[test]
    fn a_fence_is_lifted_with_the_bytes_kept() {
        let target = Target(MmapRaw::from(MmapMut::map_anon(TARGET_BYTES).unwrap()));
        target.fill();
        target.protect(false).unwrap();
        target.protect(true).unwrap();
        assert!(target.is_filled());
    }
}
