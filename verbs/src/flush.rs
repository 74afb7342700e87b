//! RDMA FLUSH: what was written before it on the same connection is on the persistent medium when it
//! completes, and the peer's processor did nothing for that (IBTA release 1.6, annex A19).
//!
//! The request is one of the extended interface's only (`ibv_wr_post(3)`), which wants a queue pair
//! that was made for it. Everything else goes through `ibv_post_send` as ever: both put their requests
//! into the same queue, in the order of the calls.

use std::ffi::c_int;
use std::fmt;
use std::io;
use std::ptr::NonNull;

use crate::buffer::Buffer;
use crate::device::{Capabilities, Device, DeviceName};
use crate::error::Error;
use crate::lane::{Lane, Piece, PostError, RemoteSlice, check_remote};
use crate::pd::ProtectionDomain;
use crate::queue_pair::{Connected, QueuePair};
use crate::sys::{self, ffi};

/// Bytes of one request: its length has 32 bits in the packet, and what is beyond is lost silently.
const FLUSH_BYTES_MAX: u32 = 1 << 30;

/// Why there is no RDMA FLUSH to persistent memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum NoFlush {
    /// The kernel's driver answers none.
    Driver,
    /// The kernel's driver answers none on memory that is registered on demand.
    OnDemand,
    /// The driver would, but nobody can ask for it on this host.
    Library,
}

impl NoFlush {
    /// What the driver lacks, if anything.
    pub(crate) fn of_driver(capabilities: &Capabilities) -> Option<Self> {
        if !capabilities.flush_persistent {
            return Some(Self::Driver);
        }
        (!capabilities.odp.rc_flush).then_some(Self::OnDemand)
    }
}

impl fmt::Display for NoFlush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => {
                "its driver has none to persistent memory (that of soft RoCE has, in newer kernels)"
            }
            Self::OnDemand => "its driver has none for memory that is registered on demand",
            Self::Library => {
                "this host's libibverbs or its provider can't ask for it (rdma-core 45 or newer can, \
                 for soft RoCE)"
            }
        })
    }
}

/// The queue pair's other face, with the calls that post. It lives as long as the queue pair does.
pub(crate) type Extended = NonNull<ffi::ibv_qp_ex>;

/// Creates a queue pair; one that can also post FLUSH, if that is wanted, and driver, provider and
/// library allow it.
pub(crate) fn create_queue_pair(
    domain: &ProtectionDomain,
    attr: &mut ffi::ibv_qp_init_attr,
    with_flush: bool,
) -> io::Result<(NonNull<ffi::ibv_qp>, Option<Extended>)> {
    if with_flush
        && NoFlush::of_driver(domain.device().capabilities()).is_none()
        && let Some(made) = create_extended(domain, attr)?
    {
        return Ok(made);
    }
    let raw = sys::pass("ibv_create_qp").and_then(|()| {
        // SAFETY: the domain is live, and so are the completion queues that the attributes name.
        sys::check_pointer(unsafe { ffi::ibv_create_qp(domain.as_raw().as_ptr(), attr) })
    })?;
    Ok((raw, None))
}

/// None where provider or library know no FLUSH.
fn create_extended(
    domain: &ProtectionDomain,
    attr: &mut ffi::ibv_qp_init_attr,
) -> io::Result<Option<(NonNull<ffi::ibv_qp>, Option<Extended>)>> {
    use ffi::ibv_qp_create_send_ops_flags as ops;
    use ffi::ibv_qp_init_attr_mask as mask;
    let mut wide: ffi::ibv_qp_init_attr_ex = sys::zeroed();
    (wide.send_cq, wide.recv_cq) = (attr.send_cq, attr.recv_cq);
    (wide.cap, wide.qp_type) = (attr.cap, attr.qp_type);
    wide.pd = domain.as_raw().as_ptr();
    wide.send_ops_flags = (ops::IBV_QP_EX_WITH_FLUSH | ops::IBV_QP_EX_WITH_RDMA_WRITE).0.into();
    wide.comp_mask = (mask::IBV_QP_INIT_ATTR_PD | mask::IBV_QP_INIT_ATTR_SEND_OPS_FLAGS).0;
    let context = domain.device().context().as_ptr();
    let raw = sys::pass("ibv_create_qp_ex").and_then(|()| {
        // SAFETY: the context and the domain are live, and so are the completion queues that the
        // attributes name.
        sys::check_pointer(unsafe { ffi::ibv_create_qp_ex(context, &raw mut wide) })
    });
    let raw = match raw {
        Ok(raw) => raw,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
        Err(error) => return Err(error),
    };
    // What the device has made of the wishes.
    attr.cap = wide.cap;
    // SAFETY: the queue pair was created just now.
    let extended = NonNull::new(unsafe { ffi::ibv_qp_to_qp_ex(raw.as_ptr()) });
    Ok(Some((raw, extended)))
}

/// A request of a chain that ends with FLUSH.
pub(crate) enum Chained {
    /// Never inline: on soft RoCE (rdma-core 56) the queue pair failed with such a write in front of a FLUSH.
    Write {
        list: ffi::ibv_sge,
        remote: RemoteSlice,
    },
    Flush(RemoteSlice),
}

/// The calls of a queue pair that was made for FLUSH.
struct Calls {
    start: unsafe extern "C" fn(*mut ffi::ibv_qp_ex),
    write: unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64),
    set_list: unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64, u32),
    flush: unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64, usize, u8, u8),
    complete: unsafe extern "C" fn(*mut ffi::ibv_qp_ex) -> c_int,
}

impl Calls {
    fn of(extended: &ffi::ibv_qp_ex) -> Option<Self> {
        Some(Self {
            start: extended.wr_start?,
            write: extended.wr_rdma_write?,
            set_list: extended.wr_set_sge?,
            flush: extended.wr_flush?,
            complete: extended.wr_complete?,
        })
    }
}

impl QueuePair<Connected> {
    /// Posts a chain with one call, numbered by `id`; the last request tells of the end of all
    /// ([`Lane`]). After an error other than [`Error::NoFlush`] nobody knows what the device has taken.
    ///
    /// # Safety
    ///
    /// The memory that the writes name stays registered, and untouched by others, until the last request has completed or the queue pair is destroyed.
    pub(crate) unsafe fn post_chain(
        &self,
        chain: &[Chained],
        id: impl Fn(usize) -> u64,
    ) -> Result<(), Error> {
        let Some(extended) = self.extended() else {
            return Err(no_flush(self.protection_domain().device()));
        };
        // SAFETY: the queue pair is live: only a lane that is being dropped has none.
        let calls = Calls::of(unsafe { extended.as_ref() });
        let Some(calls) = calls else {
            return Err(no_flush(self.protection_domain().device()));
        };
        let pair = extended.as_ptr();
        let posted = sys::pass("ibv_wr_complete").and_then(|()| {
            // SAFETY: the queue pair is live, and each start is followed by one completion below. The
            // lane's lock keeps other posts out.
            unsafe { (calls.start)(pair) };
            for (index, request) in chain.iter().enumerate() {
                let last = index + 1 == chain.len();
                let signalled = ffi::ibv_send_flags::IBV_SEND_SIGNALED.0;
                // SAFETY: as above; the fields are read by the next call.
                unsafe { (*pair).wr_id = id(index) };
                // SAFETY: as above.
                unsafe { (*pair).wr_flags = if last { signalled } else { 0 } };
                // SAFETY: the same, and the caller's promise.
                unsafe { calls.put(pair, request) };
            }
            // SAFETY: after the start.
            sys::check(unsafe { (calls.complete)(pair) })
        });
        posted.map_err(|source| Error::PostSend {
            device: self.device_name(),
            number: self.endpoint().queue_pair_number,
            source,
        })
    }

    fn device_name(&self) -> DeviceName {
        self.protection_domain().device().device_name()
    }
}

impl Calls {
    /// Adds a request to what was started.
    ///
    /// # Safety
    ///
    /// The queue pair is live, and between start and completion; the memory that a write names is as
    /// [`QueuePair::post_chain`] wants it.
    unsafe fn put(&self, pair: *mut ffi::ibv_qp_ex, request: &Chained) {
        match request {
            Chained::Write { list, remote } => {
                // SAFETY: the caller's promise.
                unsafe { (self.write)(pair, remote.key.get(), remote.address) };
                // SAFETY: the caller's promise.
                unsafe { (self.set_list)(pair, list.lkey, list.addr, list.length) };
            }
            Chained::Flush(range) => {
                let (key, address) = (range.key.get(), range.address);
                let (kind, level) = (ffi::IBV_FLUSH_PERSISTENT as u8, ffi::IBV_FLUSH_RANGE as u8);
                // SAFETY: the caller's promise. It names no memory of this process.
                unsafe { (self.flush)(pair, key, address, range.len, kind, level) };
            }
        }
    }
}

fn no_flush(device: &Device) -> Error {
    Error::NoFlush { device: device.device_name(), why: why_no_flush(device) }
}

/// Of a queue pair on it that was made for FLUSH, and can't.
fn why_no_flush(device: &Device) -> NoFlush {
    NoFlush::of_driver(device.capabilities()).unwrap_or(NoFlush::Library)
}

impl<T: Send> Lane<T> {
    /// Why [`post_flush`](Self::post_flush) is not for this lane, if so.
    #[must_use]
    pub fn no_flush_because(&self) -> Option<NoFlush> {
        let pair = self.queue_pair();
        let lacks = pair.extended().is_none();
        lacks.then(|| why_no_flush(pair.protection_domain().device()))
    }

    /// Starts to make ranges of the peer's memory persistent (RDMA FLUSH, placement type
    /// persistence). When it ends well, all that was posted on this lane before it and lies in the
    /// ranges is on the peer's medium, if that is one: the peer must promise that, its device can't.
    /// The region's owner must have given [`Access::remote_flush`](crate::Access::remote_flush), and
    /// the far end of the connection too.
    ///
    /// The buffer has no part in it. It comes back with the completion, as from every operation.
    ///
    /// # Errors
    ///
    /// [`PostError`] with everything in it; nothing was started. [`Error::NoFlush`] where this host
    /// can't; [`Error::QueueFull`], [`Error::NoPieces`], [`Error::EmptyPiece`],
    /// [`Error::PieceTooLong`] (of 1 GiB), [`Error::RemoteOverflow`], [`Error::PostSend`].
    pub fn post_flush(
        &self,
        buffer: Buffer,
        ranges: &[RemoteSlice],
        tag: T,
    ) -> Result<(), PostError<T>> {
        match check_ranges(ranges) {
            Ok(()) => self.post_flushing(buffer, &[], ranges, tag),
            Err(error) => Err(PostError { buffer, tag, error }),
        }
    }

    /// As [`post_write`](Self::post_write), and behind it, with the same call, as
    /// [`post_flush`](Self::post_flush).
    ///
    /// # Errors
    ///
    /// Those of both.
    pub fn post_write_flushed(
        &self,
        buffer: Buffer,
        pieces: &[Piece],
        ranges: &[RemoteSlice],
        tag: T,
    ) -> Result<(), PostError<T>> {
        match self.check(&buffer, pieces).and_then(|()| check_ranges(ranges)) {
            Ok(()) => self.post_flushing(buffer, pieces, ranges, tag),
            Err(error) => Err(PostError { buffer, tag, error }),
        }
    }
}

fn check_ranges(ranges: &[RemoteSlice]) -> Result<(), Error> {
    if ranges.is_empty() {
        return Err(Error::NoPieces);
    }
    let mut each = ranges.iter().enumerate();
    each.try_for_each(|(piece, range)| check_remote(piece, range, FLUSH_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::OdpCapabilities;
    use crate::region::RemoteKey;

    #[test]
    fn ranges_are_checked() {
        let range = |address, len| RemoteSlice { address, key: RemoteKey::new(1), len };
        check_ranges(&[range(4096, 1), range(u64::MAX - 8, 8), range(0, 1 << 30)]).unwrap();
        assert!(matches!(check_ranges(&[]), Err(Error::NoPieces)));
        let wrong = |second| check_ranges(&[range(0, 1), second]).unwrap_err();
        assert!(matches!(wrong(range(0, 0)), Error::EmptyPiece { piece: 1 }));
        // What the kernel would cut to its lower 32 bits.
        assert!(matches!(wrong(range(0, (4 << 30) + 1)), Error::PieceTooLong { piece: 1, .. }));
        assert!(matches!(wrong(range(u64::MAX - 7, 8)), Error::RemoteOverflow { piece: 1 }));
    }

    #[test]
    fn what_the_driver_lacks_is_named() {
        let mut capabilities = Capabilities::default();
        assert_eq!(NoFlush::of_driver(&capabilities), Some(NoFlush::Driver));
        capabilities.flush_persistent = true;
        assert_eq!(NoFlush::of_driver(&capabilities), Some(NoFlush::OnDemand));
        capabilities.odp = OdpCapabilities { rc_flush: true, ..OdpCapabilities::default() };
        assert_eq!(NoFlush::of_driver(&capabilities), None);
    }
}
