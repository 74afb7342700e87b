//! The memory region: a key for peers, and a share of the memory behind it.

use std::error;
use std::fmt;
use std::io;
use std::mem;
use std::ops::Range;
use std::ptr::NonNull;

use crate::error::Error;
use crate::memory::Memory;
use crate::pd::ProtectionDomain;
use crate::sys::{self, ffi};

/// The key with which a peer reaches a region (the `rkey`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteKey(u32);

impl RemoteKey {
    /// A key from its number, as it came from the peer.
    #[must_use]
    pub const fn new(key: u32) -> Self {
        Self(key)
    }

    /// The number, to be told to the peer.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteKey({:#010x})", self.0)
    }
}

impl From<u32> for RemoteKey {
    fn from(key: u32) -> Self {
        Self(key)
    }
}

impl From<RemoteKey> for u32 {
    fn from(key: RemoteKey) -> Self {
        key.0
    }
}

/// How a region holds its memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum RegistrationMode {
    /// The pages are pinned.
    Pinned,
    /// Nothing is pinned: the device faults pages in, and loses them when the kernel takes them.
    OnDemand,
}

impl fmt::Display for RegistrationMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pinned => "pinned",
            Self::OnDemand => "on demand",
        })
    }
}

/// What may be done with a region, beside local reading, which always may.
///
/// Relaxed ordering isn't offered: a READ that follows WRITEs must see them in memory, and that
/// rests on the order of PCIe.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Access {
    /// This end's own device may write: the region is the target of a READ that this end posts.
    /// Implied by `remote_write` and `remote_atomic` (IBTA 10.6.3.1).
    pub local_write: bool,
    /// Peers may write.
    pub remote_write: bool,
    /// Peers may read.
    pub remote_read: bool,
    /// Peers may use atomics.
    pub remote_atomic: bool,
    /// Peers may ask for RDMA FLUSH to persistent memory. On demand, a device takes this for any memory:
    /// that it is persistent, whoever registers it must know.
    pub remote_flush: bool,
}

impl Access {
    const NONE: Self = Self {
        local_write: false,
        remote_write: false,
        remote_read: false,
        remote_atomic: false,
        remote_flush: false,
    };
    /// Local reading and writing; nothing for peers.
    pub const LOCAL: Self = Self { local_write: true, ..Self::NONE };
    /// Peers may read.
    pub const REMOTE_READ: Self = Self { remote_read: true, ..Self::NONE };
    /// Peers may write.
    pub const REMOTE_WRITE: Self = Self { remote_write: true, ..Self::LOCAL };
    /// Peers may read and write.
    pub const REMOTE_READ_WRITE: Self = Self { remote_read: true, ..Self::REMOTE_WRITE };

    /// `enum ibv_access_flags`.
    pub(crate) fn flags(self) -> u32 {
        use ffi::ibv_access_flags as bits;
        let local_write = self.local_write || self.remote_write || self.remote_atomic;
        [
            (local_write, bits::IBV_ACCESS_LOCAL_WRITE),
            (self.remote_write, bits::IBV_ACCESS_REMOTE_WRITE),
            (self.remote_read, bits::IBV_ACCESS_REMOTE_READ),
            (self.remote_atomic, bits::IBV_ACCESS_REMOTE_ATOMIC),
            (self.remote_flush, bits::IBV_ACCESS_FLUSH_PERSISTENT),
        ]
        .into_iter()
        .filter_map(|(wanted, bit)| wanted.then_some(bit.0))
        .fold(0, |flags, bit| flags | bit)
    }
}

/// A memory region (`ibv_reg_mr(3)`): a key to a range of `M`, and a share of `M` itself, which it
/// lets go of only when the key is dead.
///
/// Dropping it deregisters. When the device refuses twice (it can: a region with a memory window bound
/// to it is refused with EINVAL), the key lives on, so the memory, the protection domain and the
/// device are leaked on purpose, with an error in the log. Who must know calls
/// [`deregister`](Self::deregister).
///
/// A region that has been deregistered is gone:
///
/// ```compile_fail,E0382
/// # fn f(region: pinfold_verbs::MemoryRegion<memmap2::MmapRaw>) {
/// let memory = region.deregister();
/// println!("{:?}", region.remote_key());
/// # }
/// ```
///
/// And memory that made no promise to wait for its fence can't be pinned:
///
/// ```compile_fail,E0277
/// # use pinfold_verbs::{Access, Memory, ProtectionDomain};
/// # struct Fenced(memmap2::MmapRaw);
/// unsafe impl Memory for Fenced {
/// #   fn as_ptr(&self) -> *mut u8 { self.0.as_mut_ptr() }
/// #   fn len(&self) -> usize { self.0.len() }
///     // ...
/// }
/// # fn f(pd: ProtectionDomain, memory: Fenced) {
/// pd.register_pinned(memory, 0..4096, Access::REMOTE_READ);
/// # }
/// ```
pub struct MemoryRegion<M: Memory> {
    /// Taken only by the calls that consume the region.
    held: Option<Held<M>>,
    address: u64,
    len: usize,
    key: RemoteKey,
    local_key: u32,
    mode: RegistrationMode,
}

/// What must outlive the key. It has no `Drop` of its own: whoever takes it, deregisters.
struct Held<M> {
    mr: NonNull<ffi::ibv_mr>,
    memory: M,
    domain: ProtectionDomain,
}

// SAFETY: verbs may be called on one region from any thread and from several at a time; `Memory`
// is `Send` and `Sync` by itself.
unsafe impl<M: Memory> Send for MemoryRegion<M> {}
// SAFETY: as above.
unsafe impl<M: Memory> Sync for MemoryRegion<M> {}

impl<M: Memory> MemoryRegion<M> {
    pub(crate) fn register(
        domain: &ProtectionDomain,
        memory: M,
        range: Range<usize>,
        access: Access,
        mode: RegistrationMode,
    ) -> Result<Self, RegisterError<M>> {
        let (start, len) = match check_range(&range, memory.len()) {
            Ok(checked) => checked,
            Err(error) => return Err(RegisterError { memory, error }),
        };
        let mut flags = access.flags();
        if mode == RegistrationMode::OnDemand {
            if !domain.device().capabilities().odp.supported {
                let error = Error::NoOnDemandPaging { device: domain.device().device_name() };
                return Err(RegisterError { memory, error });
            }
            flags |= ffi::ibv_access_flags::IBV_ACCESS_ON_DEMAND.0;
        }
        let address = memory.as_ptr().wrapping_add(start);
        // All flags are below `IBV_ACCESS_OPTIONAL_FIRST`, so the sign bit is not among them.
        let flags = flags.cast_signed();
        // Never `ibv_reg_mr_iova`: with on-demand paging a remote address that isn't the virtual
        // one crashes the kernel's rxe driver at the first write.
        let mr = sys::pass("ibv_reg_mr").and_then(|()| {
            // SAFETY: the domain is live. The range lies within `memory`, which promises (`Memory`,
            // and `PinnableMemory` for the pinned mode) to keep it until the region lets go of it.
            let mr =
                unsafe { ffi::ibv_reg_mr(domain.as_raw().as_ptr(), address.cast(), len, flags) };
            sys::check_pointer(mr)
        });
        let mr = match mr {
            Ok(mr) => mr,
            Err(source) => {
                let device = domain.device().device_name();
                let error = match (mode, source.raw_os_error()) {
                    (RegistrationMode::Pinned, Some(libc::EOPNOTSUPP)) => {
                        Error::PinRefused { device, len, source }
                    }
                    (RegistrationMode::Pinned, Some(libc::EFAULT)) => {
                        Error::PinFault { device, len, source }
                    }
                    // EPERM where the limit of locked memory is 0 (can_do_mlock in the kernel).
                    (RegistrationMode::Pinned, Some(libc::ENOMEM | libc::EPERM)) => {
                        Error::MemlockExceeded { device, len, source }
                    }
                    _ => Error::Register { device, mode, len, source },
                };
                return Err(RegisterError { memory, error });
            }
        };
        // SAFETY: `ibv_reg_mr` returned a region, which it has initialised.
        let raw = unsafe { mr.as_ref() };
        Ok(Self {
            address: address.addr() as u64,
            len,
            key: RemoteKey(raw.rkey),
            local_key: raw.lkey,
            mode,
            held: Some(Held { mr, memory, domain: domain.clone() }),
        })
    }

    /// The key for peers.
    #[must_use]
    pub fn remote_key(&self) -> RemoteKey {
        self.key
    }

    /// The address by which peers name the region's first byte: its virtual address here.
    #[must_use]
    pub fn remote_address(&self) -> u64 {
        self.address
    }

    /// The region's length in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Registered with on-demand paging.
    #[must_use]
    pub fn is_on_demand(&self) -> bool {
        self.mode == RegistrationMode::OnDemand
    }

    /// The memory that it holds.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.held().memory
    }

    /// The protection domain that it is in.
    #[must_use]
    pub fn protection_domain(&self) -> &ProtectionDomain {
        &self.held().domain
    }

    pub(crate) fn local_key(&self) -> u32 {
        self.local_key
    }

    /// Deregisters (`ibv_dereg_mr(3)`) and gives the memory back. When it returns `Ok`, the key is
    /// dead: nothing that a peer has in flight lands any more.
    ///
    /// # Errors
    ///
    /// [`DeregisterFailed`] with the region in it, whole: **the key still lives**.
    pub fn deregister(mut self) -> Result<M, DeregisterFailed<M>> {
        match self.held.take() {
            Some(held) => match held.deregister() {
                Ok(()) => Ok(held.memory),
                Err(source) => {
                    let error = self.failed(&held.domain, source);
                    self.held = Some(held);
                    Err(DeregisterFailed { region: self, error })
                }
            },
            None => unreachable!("only calls that consume the region take what it holds"),
        }
    }

    fn held(&self) -> &Held<M> {
        self.held.as_ref().expect("only calls that consume the region take what it holds")
    }

    fn failed(&self, domain: &ProtectionDomain, source: io::Error) -> Error {
        Error::Deregister { device: domain.device().device_name(), len: self.len, source }
    }
}

impl<M> Held<M> {
    /// To be called until it succeeds, and not after.
    fn deregister(&self) -> io::Result<()> {
        sys::pass("ibv_dereg_mr")?;
        // SAFETY: the region is registered: it leaves its owner only after this has succeeded. A
        // failed call leaves it as it was.
        sys::check(unsafe { ffi::ibv_dereg_mr(self.mr.as_ptr()) })
    }
}

impl<M: Memory> Drop for MemoryRegion<M> {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        if let Err(error) = held.deregister().or_else(|_| held.deregister()) {
            tracing::error!(
                device = held.domain.device().name(),
                key = ?self.key,
                len = self.len,
                %error,
                "cannot deregister a memory region: its key lives on, so its memory is leaked"
            );
            mem::forget(held);
        }
    }
}

impl<M: Memory> fmt::Debug for MemoryRegion<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryRegion")
            .field("address", &format_args!("{:#x}", self.address))
            .field("len", &self.len)
            .field("key", &self.key)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

/// A registration that was refused, with the memory.
pub struct RegisterError<M> {
    memory: M,
    error: Error,
}

impl<M> RegisterError<M> {
    /// Why.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The memory, to be registered in another way.
    #[must_use]
    pub fn into_memory(self) -> M {
        self.memory
    }

    /// Why, and the memory.
    #[must_use]
    pub fn into_parts(self) -> (M, Error) {
        (self.memory, self.error)
    }
}

impl<M> From<RegisterError<M>> for Error {
    fn from(failed: RegisterError<M>) -> Self {
        failed.error
    }
}

impl<M> fmt::Display for RegisterError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<M> fmt::Debug for RegisterError<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RegisterError").field(&self.error).finish()
    }
}

impl<M> error::Error for RegisterError<M> {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.error.source()
    }
}

/// A deregistration that the device refused: the key lives, and so does the region in here.
///
/// Dropping it tries once more, and then leaks the memory as dropping the region does.
pub struct DeregisterFailed<M: Memory> {
    region: MemoryRegion<M>,
    error: Error,
}

impl<M: Memory> DeregisterFailed<M> {
    /// Why.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// The region, to try again or to keep.
    #[must_use]
    pub fn into_region(self) -> MemoryRegion<M> {
        self.region
    }
}

impl<M: Memory> From<DeregisterFailed<M>> for Error {
    /// Drops the region: see there.
    fn from(failed: DeregisterFailed<M>) -> Self {
        failed.error
    }
}

impl<M: Memory> fmt::Display for DeregisterFailed<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<M: Memory> fmt::Debug for DeregisterFailed<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeregisterFailed")
            .field("region", &self.region)
            .field("error", &self.error)
            .finish()
    }
}

impl<M: Memory> error::Error for DeregisterFailed<M> {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        self.error.source()
    }
}

/// Start and length of a range that is not empty and within `len` bytes.
fn check_range(range: &Range<usize>, len: usize) -> Result<(usize, usize), Error> {
    if range.start < range.end && range.end <= len {
        Ok((range.start, range.end - range.start))
    } else {
        Err(Error::RangeOutOfBounds { start: range.start, end: range.end, len })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        assert_eq!(check_range(&(0..4096), 4096).unwrap(), (0, 4096));
        assert_eq!(check_range(&(333..334), 4096).unwrap(), (333, 1));
        let backwards = Range { start: 7, end: 6 };
        for wrong in [0..0, 0..4097, 4096..4097, backwards, 0..usize::MAX] {
            assert!(check_range(&wrong, 4096).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn remote_writing_implies_local_writing() {
        assert_eq!(Access::default().flags(), 0);
        assert_eq!(Access::LOCAL.flags(), 1);
        assert_eq!(Access { remote_write: true, ..Access::default() }.flags(), 1 | 2);
        assert_eq!(Access::REMOTE_WRITE.flags(), 1 | 2);
        assert_eq!(Access::REMOTE_READ.flags(), 4);
        assert_eq!(Access::REMOTE_READ_WRITE.flags(), 1 | 2 | 4);
        assert_eq!(Access { remote_atomic: true, ..Access::default() }.flags(), 1 | 8);
    }

    #[test]
    fn keys_print_as_hexadecimal() {
        assert_eq!(format!("{:?}", RemoteKey::new(0x2a)), "RemoteKey(0x0000002a)");
    }

    /// Memory that says when it goes.
    #[derive(Debug)]
    struct Told(memmap2::MmapRaw, std::sync::Arc<std::sync::atomic::AtomicBool>);

    impl Drop for Told {
        fn drop(&mut self) {
            self.1.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }

    // SAFETY: as the map inside.
    unsafe impl Memory for Told {
        fn as_ptr(&self) -> *mut u8 {
            self.0.as_mut_ptr()
        }

        fn len(&self) -> usize {
            self.0.len()
        }
    }

    // SAFETY: as the map inside.
    unsafe impl crate::PinnableMemory for Told {}

    #[test]
    #[ignore = "needs an RDMA device: cargo xtask vm run"]
    fn a_failed_deregistration_keeps_the_memory() {
        let device = crate::Device::open_first().unwrap();
        let domain = ProtectionDomain::new(&device).unwrap();
        let gone = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let is_gone = || gone.load(std::sync::atomic::Ordering::SeqCst);
        let map = memmap2::MmapRaw::from(memmap2::MmapMut::map_anon(4096).unwrap());
        let memory = Told(map, std::sync::Arc::clone(&gone));
        let region = domain.register_pinned(memory, 0..4096, Access::REMOTE_READ).unwrap();

        let failed = device.while_deaf(|| region.deregister().unwrap_err());
        assert!(matches!(failed.error(), Error::Deregister { len: 4096, .. }), "{failed}");
        assert!(error::Error::source(&failed).is_some());
        assert!(!is_gone(), "the region holds it");
        let region = failed.into_region();
        assert_eq!(region.len(), 4096);

        // Once the device listens again, the same region comes off.
        let memory = region.deregister().unwrap();
        assert!(!is_gone(), "the caller holds it");

        // Dropped while the device doesn't listen: leaked, with a message in the log.
        let region = domain.register_pinned(memory, 0..4096, Access::REMOTE_READ).unwrap();
        device.while_deaf(|| drop(region));
        assert!(!is_gone(), "its key lives on, so it must stay");
    }
}
