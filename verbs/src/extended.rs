//! Requests that only the extended interface has (`ibv_wr_post(3)`): RDMA FLUSH and ATOMIC WRITE (IBTA
//! release 1.6, annex A19). They want a queue pair that was made for them.
//!
//! Everything else goes through `ibv_post_send` as ever: both put their requests into the same queue, in
//! the order of the calls.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::io;
use std::ptr::NonNull;

use crate::device::{Capabilities, Device};
use crate::error::Error;
use crate::lane::{ATOMIC_BYTES, RemoteSlice};
use crate::pd::ProtectionDomain;
use crate::queue_pair::{Connected, QueuePair};
use crate::sys::{self, ffi};

/// Why there is no such request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Lack {
    /// The kernel's driver answers none; of flushes, none to persistent memory.
    Driver,
    /// The kernel's driver answers none on memory that is registered on demand.
    OnDemand,
    /// The driver would, but nobody can ask for it on this host.
    Library,
}

impl Lack {
    /// What the driver lacks of RDMA FLUSH, if anything.
    pub(crate) fn of_flush(capabilities: &Capabilities) -> Option<Self> {
        Self::of_driver(capabilities.flush_persistent, capabilities.odp.rc_flush)
    }

    /// What the driver lacks of ATOMIC WRITE, if anything.
    pub(crate) fn of_atomic_write(capabilities: &Capabilities) -> Option<Self> {
        Self::of_driver(capabilities.atomic_write, capabilities.odp.rc_atomic_write)
    }

    fn of_driver(at_all: bool, on_demand: bool) -> Option<Self> {
        if !at_all {
            return Some(Self::Driver);
        }
        (!on_demand).then_some(Self::OnDemand)
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Driver => "its driver has none (that of soft RoCE has, in newer kernels)",
            Self::OnDemand => "its driver has none for memory that is registered on demand",
            Self::Library => {
                "this host's libibverbs or its provider can't ask for it (rdma-core 45 or newer can, \
                 for soft RoCE)"
            }
        })
    }
}

/// The queue pair's other face, with the calls that post. It lives as long as the queue pair does.
#[derive(Clone, Copy)]
pub(crate) struct Extended {
    face: NonNull<ffi::ibv_qp_ex>,
    kinds: Kinds,
}

/// Kinds of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Kinds {
    flush: bool,
    atomic_write: bool,
}

impl Kinds {
    fn of_driver(capabilities: &Capabilities) -> Self {
        let flush = Lack::of_flush(capabilities).is_none();
        Self { flush, atomic_write: Lack::of_atomic_write(capabilities).is_none() }
    }

    /// What to ask for, best first: a library may know one and not the other.
    fn attempts(self) -> impl Iterator<Item = Self> {
        let flush = Self { flush: true, atomic_write: false };
        let atomic_write = Self { flush: false, atomic_write: true };
        let both = Self { flush: true, atomic_write: true };
        let within =
            move |it: &Self| self.flush >= it.flush && self.atomic_write >= it.atomic_write;
        [both, flush, atomic_write].into_iter().filter(within)
    }

    fn to_raw(self) -> u64 {
        use ffi::ibv_qp_create_send_ops_flags as ops;
        let flush = if self.flush { ops::IBV_QP_EX_WITH_FLUSH.0 } else { 0 };
        let atomic_write = if self.atomic_write { ops::IBV_QP_EX_WITH_ATOMIC_WRITE.0 } else { 0 };
        (ops::IBV_QP_EX_WITH_RDMA_WRITE.0 | flush | atomic_write).into()
    }
}

/// Creates a queue pair; one that can also post extended requests, if that is wanted, and driver, provider
/// and library allow it.
pub(crate) fn create_queue_pair(
    domain: &ProtectionDomain,
    attr: &mut ffi::ibv_qp_init_attr,
    extended: bool,
) -> io::Result<(NonNull<ffi::ibv_qp>, Option<Extended>)> {
    let known = Kinds::of_driver(domain.device().capabilities());
    for kinds in known.attempts().filter(|_| extended) {
        if let Some(made) = create_extended(domain, attr, kinds)? {
            return Ok(made);
        }
    }
    let raw = sys::pass("ibv_create_qp").and_then(|()| {
        // SAFETY: the domain is live, and so are the completion queues that the attributes name.
        sys::check_pointer(unsafe { ffi::ibv_create_qp(domain.as_raw().as_ptr(), attr) })
    })?;
    Ok((raw, None))
}

/// None where provider or library know not all of it.
fn create_extended(
    domain: &ProtectionDomain,
    attr: &mut ffi::ibv_qp_init_attr,
    kinds: Kinds,
) -> io::Result<Option<(NonNull<ffi::ibv_qp>, Option<Extended>)>> {
    use ffi::ibv_qp_init_attr_mask as mask;
    let mut wide: ffi::ibv_qp_init_attr_ex = sys::zeroed();
    (wide.send_cq, wide.recv_cq) = (attr.send_cq, attr.recv_cq);
    (wide.cap, wide.qp_type) = (attr.cap, attr.qp_type);
    wide.pd = domain.as_raw().as_ptr();
    wide.send_ops_flags = kinds.to_raw();
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
    let face = NonNull::new(unsafe { ffi::ibv_qp_to_qp_ex(raw.as_ptr()) });
    Ok(Some((raw, face.map(|face| Extended { face, kinds }))))
}

/// A request of a chain.
pub(crate) enum Chained {
    /// Never inline: on soft RoCE (rdma-core 56) the queue pair failed with such a write in front of a FLUSH.
    Write {
        list: ffi::ibv_sge,
        remote: RemoteSlice,
    },
    Flush(RemoteSlice),
    /// The bytes travel with the request.
    AtomicWrite(RemoteSlice, [u8; ATOMIC_BYTES]),
}

/// The calls of a queue pair that was made for extended requests.
struct Calls {
    start: unsafe extern "C" fn(*mut ffi::ibv_qp_ex),
    write: unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64),
    set_list: unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64, u32),
    flush: Option<unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64, usize, u8, u8)>,
    atomic_write: Option<unsafe extern "C" fn(*mut ffi::ibv_qp_ex, u32, u64, *const c_void)>,
    complete: unsafe extern "C" fn(*mut ffi::ibv_qp_ex) -> c_int,
}

impl Calls {
    /// # Safety
    ///
    /// The queue pair is live.
    unsafe fn of(extended: Extended) -> Option<Self> {
        let Extended { face, kinds } = extended;
        let face = face.as_ptr();
        // The structure ends earlier in a library that does not know a kind.
        let flush = kinds.flush.then(|| {
            // SAFETY: the caller's promise; the library has made the queue pair for it, so it has the field.
            unsafe { (*face).wr_flush }
        });
        let atomic_write = kinds.atomic_write.then(|| {
            // SAFETY: as above.
            unsafe { (*face).wr_atomic_write }
        });
        // SAFETY: the caller's promise.
        let start = unsafe { (*face).wr_start }?;
        // SAFETY: as above.
        let write = unsafe { (*face).wr_rdma_write }?;
        // SAFETY: as above.
        let set_list = unsafe { (*face).wr_set_sge }?;
        // SAFETY: as above.
        let complete = unsafe { (*face).wr_complete }?;
        let (flush, atomic_write) = (flush.flatten(), atomic_write.flatten());
        Some(Self { start, write, set_list, flush, atomic_write, complete })
    }

    fn know(&self, request: &Chained) -> bool {
        match request {
            Chained::Write { .. } => true,
            Chained::Flush(_) => self.flush.is_some(),
            Chained::AtomicWrite(..) => self.atomic_write.is_some(),
        }
    }

    /// Adds a request, which they know, to what was started.
    ///
    /// # Safety
    ///
    /// The queue pair is live, and between start and completion; the memory that a write names is as
    /// [`QueuePair::post_chain`] wants it.
    unsafe fn put(&self, pair: *mut ffi::ibv_qp_ex, request: &Chained) {
        match (request, self.flush, self.atomic_write) {
            (Chained::Write { list, remote }, ..) => {
                // SAFETY: the caller's promise.
                unsafe { (self.write)(pair, remote.key.get(), remote.address) };
                // SAFETY: the caller's promise.
                unsafe { (self.set_list)(pair, list.lkey, list.addr, list.length) };
            }
            (Chained::Flush(range), Some(flush), _) => {
                let (key, address) = (range.key.get(), range.address);
                let (kind, level) = (ffi::IBV_FLUSH_PERSISTENT as u8, ffi::IBV_FLUSH_RANGE as u8);
                // SAFETY: the caller's promise. It names no memory of this process.
                unsafe { flush(pair, key, address, range.len, kind, level) };
            }
            (Chained::AtomicWrite(remote, bytes), _, Some(write)) => {
                let (key, address) = (remote.key.get(), remote.address);
                // SAFETY: the caller's promise. The eight bytes are copied during the call.
                unsafe { write(pair, key, address, bytes.as_ptr().cast()) };
            }
            (Chained::Flush(_) | Chained::AtomicWrite(..), ..) => {
                unreachable!("who puts has asked what they know")
            }
        }
    }
}

impl QueuePair<Connected> {
    /// Posts a chain with one call, numbered by `id`; the last request tells of the end of all
    /// ([`Lane`](crate::Lane)). After an error other than [`Error::NoFlush`] and [`Error::NoAtomicWrite`]
    /// nobody knows what the device has taken.
    ///
    /// # Safety
    ///
    /// The memory that the writes name stays registered, and untouched by others, until the last request has completed or the queue pair is destroyed.
    pub(crate) unsafe fn post_chain(
        &self,
        chain: &[Chained],
        id: impl Fn(usize) -> u64,
    ) -> Result<(), Error> {
        let extended = self.extended();
        // SAFETY: the queue pair is live: only a lane that is being dropped has none.
        let calls = extended.and_then(|extended| unsafe { Calls::of(extended) });
        let known = |request: &&Chained| calls.as_ref().is_some_and(|calls| calls.know(request));
        if let Some(unknown) = chain.iter().find(|request| !known(request)) {
            return Err(self.lacks(unknown));
        }
        let (Some(extended), Some(calls)) = (extended, calls) else { return Ok(()) };
        let pair = extended.face.as_ptr();
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
            device: self.device().device_name(),
            number: self.endpoint().queue_pair_number,
            source,
        })
    }

    /// Why it takes no FLUSH, if so.
    pub(crate) fn no_flush_because(&self) -> Option<Lack> {
        self.lack(|kinds| kinds.flush, Lack::of_flush)
    }

    /// Why it takes no ATOMIC WRITE, if so.
    pub(crate) fn no_atomic_write_because(&self) -> Option<Lack> {
        self.lack(|kinds| kinds.atomic_write, Lack::of_atomic_write)
    }

    fn lack(
        &self,
        has: fn(Kinds) -> bool,
        of_driver: fn(&Capabilities) -> Option<Lack>,
    ) -> Option<Lack> {
        let can = self.extended().is_some_and(|extended| has(extended.kinds));
        (!can).then(|| of_driver(self.device().capabilities()).unwrap_or(Lack::Library))
    }

    fn lacks(&self, request: &Chained) -> Error {
        let device = self.device().device_name();
        match request {
            Chained::AtomicWrite(..) => {
                let why = self.no_atomic_write_because().unwrap_or(Lack::Library);
                Error::NoAtomicWrite { device, why }
            }
            Chained::Write { .. } | Chained::Flush(_) => {
                let why = self.no_flush_because().unwrap_or(Lack::Library);
                Error::NoFlush { device, why }
            }
        }
    }

    fn device(&self) -> &Device {
        self.protection_domain().device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::OdpCapabilities;

    #[test]
    fn what_the_driver_lacks_is_named() {
        let mut capabilities = Capabilities::default();
        let lacks = |it: &Capabilities| (Lack::of_flush(it), Lack::of_atomic_write(it));
        assert_eq!(lacks(&capabilities), (Some(Lack::Driver), Some(Lack::Driver)));
        capabilities.flush_persistent = true;
        assert_eq!(lacks(&capabilities), (Some(Lack::OnDemand), Some(Lack::Driver)));
        capabilities.atomic_write = true;
        capabilities.odp = OdpCapabilities { rc_flush: true, ..OdpCapabilities::default() };
        assert_eq!(lacks(&capabilities), (None, Some(Lack::OnDemand)));
        capabilities.odp.rc_atomic_write = true;
        assert_eq!(lacks(&capabilities), (None, None));
    }

    #[test]
    fn no_kind_is_asked_for_that_the_driver_has_not() {
        let attempts = |flush, atomic_write| -> Vec<_> {
            let tried = Kinds { flush, atomic_write }.attempts();
            tried.map(|kinds| (kinds.flush, kinds.atomic_write)).collect()
        };
        assert_eq!(attempts(true, true), [(true, true), (true, false), (false, true)]);
        assert_eq!(attempts(true, false), [(true, false)]);
        assert_eq!(attempts(false, true), [(false, true)]);
        assert_eq!(attempts(false, false), []);
    }
}
