//! The queue pair: one end of a reliable connection, with its states as types.

use std::fmt;
use std::io;
use std::mem;
use std::ptr::{self, NonNull};

use crate::completion::CompletionQueue;
use crate::device::Device;
use crate::error::Error;
use crate::extended::{self, Extended};
use crate::gid::{Address, Gid};
use crate::pd::ProtectionDomain;
use crate::region::Access;
use crate::sys::{self, ffi};

/// The number of a queue pair on its device (24 bits).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct QueuePairNumber(u32);

impl QueuePairNumber {
    /// From the number, as it came from the peer.
    #[must_use]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number, to be told to the peer.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for QueuePairNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The largest payload of a packet on a path (`enum ibv_mtu`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Mtu {
    /// 256 bytes.
    Mtu256,
    /// 512 bytes.
    Mtu512,
    /// 1,024 bytes: what a network interface with an MTU of 1,500 allows.
    Mtu1024,
    /// 2,048 bytes.
    Mtu2048,
    /// 4,096 bytes: needs a network interface with an MTU of about 4,200 or more.
    Mtu4096,
}

impl Mtu {
    const ALL: [Self; 5] =
        [Self::Mtu256, Self::Mtu512, Self::Mtu1024, Self::Mtu2048, Self::Mtu4096];

    /// The payload in bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Mtu256 => 256,
            Self::Mtu512 => 512,
            Self::Mtu1024 => 1024,
            Self::Mtu2048 => 2048,
            Self::Mtu4096 => 4096,
        }
    }

    /// The MTU of exactly that many bytes.
    #[must_use]
    pub fn from_bytes(bytes: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|mtu| mtu.bytes() == bytes)
    }

    /// The largest MTU that is not above that many bytes; none below 256.
    #[must_use]
    pub fn largest_within(bytes: u32) -> Option<Self> {
        Self::ALL.into_iter().rev().find(|mtu| mtu.bytes() <= bytes)
    }

    fn as_raw(self) -> ffi::ibv_mtu::Type {
        match self {
            Self::Mtu256 => ffi::ibv_mtu::IBV_MTU_256,
            Self::Mtu512 => ffi::ibv_mtu::IBV_MTU_512,
            Self::Mtu1024 => ffi::ibv_mtu::IBV_MTU_1024,
            Self::Mtu2048 => ffi::ibv_mtu::IBV_MTU_2048,
            Self::Mtu4096 => ffi::ibv_mtu::IBV_MTU_4096,
        }
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// What the other end must know to connect. Plain data, exchanged over a channel that both ends
/// trust: who knows it can forge packets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// The queue pair.
    pub queue_pair_number: QueuePairNumber,
    /// The number of the first packet that this end sends (24 bits, random).
    pub packet_sequence_number: u32,
    /// The port's GID.
    pub gid: Gid,
    /// The port's local identifier on InfiniBand; 0 on RoCE.
    pub lid: u16,
    /// The largest path MTU that this end can do, in bytes.
    pub path_mtu_bytes: u32,
}

impl Endpoint {
    fn check(&self) -> Result<(), Error> {
        let reason = if self.gid.is_zero() {
            "its GID is zero"
        } else if self.queue_pair_number.0 == 0 || self.queue_pair_number.0 > BITS_24 {
            "its queue pair number is 0 or beyond 24 bits"
        } else if self.packet_sequence_number > BITS_24 {
            "its packet sequence number is beyond 24 bits"
        } else {
            return Ok(());
        };
        Err(Error::BadEndpoint { reason })
    }
}

/// The state of a queue pair as the device has it (`enum ibv_qp_state`; IBTA 10.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum QueuePairState {
    /// Just created.
    Reset,
    /// Bound to a port.
    Init,
    /// Answers requests.
    ReadyToReceive,
    /// Answers requests and sends its own.
    ReadyToSend,
    /// A request failed, or the program gave up: everything is flushed.
    Error,
    /// Another state, with the number of `enum ibv_qp_state`.
    Other(u32),
}

impl QueuePairState {
    fn from_raw(state: ffi::ibv_qp_state::Type) -> Self {
        use ffi::ibv_qp_state as raw;
        match state {
            raw::IBV_QPS_RESET => Self::Reset,
            raw::IBV_QPS_INIT => Self::Init,
            raw::IBV_QPS_RTR => Self::ReadyToReceive,
            raw::IBV_QPS_RTS => Self::ReadyToSend,
            raw::IBV_QPS_ERR => Self::Error,
            other => Self::Other(other),
        }
    }

    fn as_raw(self) -> ffi::ibv_qp_state::Type {
        use ffi::ibv_qp_state as raw;
        match self {
            Self::Reset => raw::IBV_QPS_RESET,
            Self::Init => raw::IBV_QPS_INIT,
            Self::ReadyToReceive => raw::IBV_QPS_RTR,
            Self::ReadyToSend => raw::IBV_QPS_RTS,
            Self::Error => raw::IBV_QPS_ERR,
            Self::Other(other) => other,
        }
    }
}

impl fmt::Display for QueuePairState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => f.write_str("RESET"),
            Self::Init => f.write_str("INIT"),
            Self::ReadyToReceive => f.write_str("RTR"),
            Self::ReadyToSend => f.write_str("RTS"),
            Self::Error => f.write_str("ERR"),
            Self::Other(state) => write!(f, "state {state}"),
        }
    }
}

/// Settings of a queue pair before it is created.
#[derive(Clone, Debug)]
pub struct QueuePairBuilder {
    domain: ProtectionDomain,
    completions: Option<CompletionQueue>,
    send_depth: u32,
    inline_bytes: u32,
    extended: bool,
    access: Access,
}

impl QueuePairBuilder {
    /// A queue pair in that domain; as it stands, a target that answers writes and reads (the
    /// regions say which) and posts nothing itself.
    #[must_use]
    pub fn new(domain: &ProtectionDomain) -> Self {
        Self {
            domain: domain.clone(),
            completions: None,
            send_depth: 1,
            inline_bytes: 0,
            extended: false,
            access: Access::REMOTE_READ_WRITE,
        }
    }

    /// The completion queue. Without it, the queue pair gets a small one of its own.
    #[must_use]
    pub fn completion_queue(mut self, completions: &CompletionQueue) -> Self {
        self.completions = Some(completions.clone());
        self
    }

    /// Work requests that may be posted at a time.
    #[must_use]
    pub(crate) fn send_depth(mut self, requests: u32) -> Self {
        self.send_depth = requests;
        self
    }

    /// Bytes that a request may bring along instead of naming them. As many as the device can do, if it
    /// can't do so many.
    #[must_use]
    pub(crate) fn inline_bytes(mut self, bytes: u32) -> Self {
        self.inline_bytes = bytes;
        self
    }

    /// FLUSH and ATOMIC WRITE may be posted, where they can be had.
    #[must_use]
    pub(crate) fn extended_requests(mut self) -> Self {
        self.extended = true;
        self
    }

    /// What peers may do on this connection; each region narrows it further.
    #[must_use]
    pub fn remote_access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// Creates the queue pair (`ibv_create_qp(3)`) and brings it to INIT.
    ///
    /// # Errors
    ///
    /// [`Error::CreateQueuePair`], [`Error::ModifyQueuePair`]; those of
    /// [`Device::address`], [`Device::query_port`] and [`CompletionQueue::new`].
    pub fn build(self) -> Result<QueuePair<Init>, Error> {
        let device = self.domain.device();
        let address = device.address()?;
        let port = device.query_port()?;
        let completions = match &self.completions {
            Some(completions) => completions.clone(),
            None => CompletionQueue::new(device, self.send_depth)?,
        };
        let packet_sequence_number = random_24_bits()?;

        let create = |inline_bytes| self.create(&completions, inline_bytes);
        let created = match create(self.inline_bytes) {
            // A device has its limit for that, and no way to ask for it.
            Err(_) if self.inline_bytes > 0 => create(0),
            other => other,
        };
        let (raw, extended, inline_bytes) = created.map_err(|source| Error::CreateQueuePair {
            device: device.device_name(),
            depth: self.send_depth,
            source,
        })?;
        // SAFETY: the queue pair was created just now; its number doesn't change.
        let number = QueuePairNumber(unsafe { (*raw.as_ptr()).qp_num });

        let endpoint = Endpoint {
            queue_pair_number: number,
            packet_sequence_number,
            gid: address.gid,
            lid: port.lid,
            path_mtu_bytes: port.active_mtu_bytes,
        };
        let raw =
            Raw { qp: Some(raw), extended, number, domain: self.domain, completions, inline_bytes };
        let state = Init { address, access: self.access, tried: false };
        let pair = QueuePair { raw, endpoint, state };
        pair.enter_init()?;
        Ok(pair)
    }

    /// The queue pair, and what it can take inline: that much at the least.
    fn create(
        &self,
        completions: &CompletionQueue,
        inline_bytes: u32,
    ) -> io::Result<(NonNull<ffi::ibv_qp>, Option<Extended>, u32)> {
        let mut attr: ffi::ibv_qp_init_attr = sys::zeroed();
        attr.send_cq = completions.as_raw().as_ptr();
        attr.recv_cq = completions.as_raw().as_ptr();
        attr.qp_type = ffi::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = self.send_depth;
        attr.cap.max_recv_wr = 1;
        attr.cap.max_send_sge = 1;
        attr.cap.max_recv_sge = 1;
        attr.cap.max_inline_data = inline_bytes;
        // The queue pair keeps domain and completion queue alive.
        let (raw, extended) = extended::create_queue_pair(&self.domain, &mut attr, self.extended)?;
        Ok((raw, extended, inline_bytes.min(attr.cap.max_inline_data)))
    }
}

/// One end of a reliable connection (RC), in state `S`: [`Init`] or [`Connected`].
///
/// Dropping it destroys it (`ibv_destroy_qp(3)`), and that is a barrier: when it returns, nothing
/// that came in through this queue pair lands any more. Moving it to the error state is none.
pub struct QueuePair<S> {
    raw: Raw,
    endpoint: Endpoint,
    state: S,
}

/// A queue pair that isn't connected yet (state INIT).
#[derive(Debug)]
pub struct Init {
    address: Address,
    access: Access,
    /// A connect went wrong and may have left another state than INIT.
    tried: bool,
}

/// A queue pair that is connected (state RTS, until something fails).
#[derive(Debug)]
pub struct Connected {
    peer: Endpoint,
    path_mtu: Mtu,
}

impl<S> QueuePair<S> {
    /// What the peer must know to connect to this end.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        self.endpoint
    }

    /// Bytes that a request may bring along.
    pub(crate) fn inline_bytes(&self) -> u32 {
        self.raw.inline_bytes
    }

    /// The protection domain that it is in.
    #[must_use]
    pub fn protection_domain(&self) -> &ProtectionDomain {
        &self.raw.domain
    }

    /// The state as the device has it now (`ibv_query_qp(3)`).
    ///
    /// # Errors
    ///
    /// [`Error::QueryQueuePair`].
    pub fn query_state(&self) -> Result<QueuePairState, Error> {
        let mut attr: ffi::ibv_qp_attr = sys::zeroed();
        let mut init: ffi::ibv_qp_init_attr = sys::zeroed();
        let mask = ffi::ibv_qp_attr_mask::IBV_QP_STATE.0.cast_signed();
        let queried = sys::pass("ibv_query_qp").and_then(|()| {
            // SAFETY: the queue pair is live, both structures may be written.
            let ret =
                unsafe { ffi::ibv_query_qp(self.raw.as_ptr(), &raw mut attr, mask, &raw mut init) };
            sys::check(ret)
        });
        queried.map_err(|source| Error::QueryQueuePair {
            device: self.raw.device().device_name(),
            number: self.raw.number,
            source,
        })?;
        Ok(QueuePairState::from_raw(attr.qp_state))
    }

    /// Destroys it (`ibv_destroy_qp(3)`), as dropping it does, but says when that fails.
    ///
    /// # Errors
    ///
    /// [`Error::DestroyQueuePair`]: the queue pair still lives, and what it stands on is leaked.
    pub fn destroy(mut self) -> Result<(), Error> {
        self.release()
    }

    /// Destroys it in place; a second call does nothing once it has succeeded.
    pub(crate) fn release(&mut self) -> Result<(), Error> {
        let number = self.raw.number;
        self.raw.release().map_err(|source| Error::DestroyQueuePair {
            device: self.raw.device().device_name(),
            number,
            source,
        })
    }
}

impl QueuePair<Init> {
    /// Connects to the peer: INIT → RTR → RTS, with a timeout of 2.1 seconds and six retries, so
    /// that a pause of some seconds at the peer doesn't cost the connection and a dead peer is
    /// noticed. Both ends connect, in any order, with the same path MTU.
    ///
    /// **It may block for a second** while the kernel resolves the peer's address: in async code
    /// call it on a thread that may block.
    ///
    /// # Errors
    ///
    /// [`ConnectFailed`] with the queue pair, which may be tried again. In it
    /// [`Error::PathMtuTooLarge`], [`Error::BadEndpoint`], or [`Error::ModifyQueuePair`]
    /// (ETIMEDOUT or EHOSTUNREACH: the peer's address doesn't answer).
    pub fn connect(
        mut self,
        peer: &Endpoint,
        path_mtu: Mtu,
    ) -> Result<QueuePair<Connected>, ConnectFailed> {
        match self.try_connect(peer, path_mtu) {
            Ok(()) => Ok(QueuePair {
                raw: self.raw,
                endpoint: self.endpoint,
                state: Connected { peer: *peer, path_mtu },
            }),
            Err(error) => Err(ConnectFailed { queue_pair: Box::new(self), error }),
        }
    }

    fn try_connect(&mut self, peer: &Endpoint, path_mtu: Mtu) -> Result<(), Error> {
        peer.check()?;
        let ends = [("this end", self.endpoint.path_mtu_bytes), ("the peer", peer.path_mtu_bytes)];
        for (end, limit) in ends {
            if path_mtu.bytes() > limit {
                return Err(Error::PathMtuTooLarge { asked: path_mtu.bytes(), end, limit });
            }
        }
        if mem::replace(&mut self.state.tried, true) {
            self.raw.modify(QueuePairState::Reset, sys::zeroed(), NO_ATTRIBUTES)?;
            self.enter_init()?;
        }
        self.enter_ready_to_receive(peer, path_mtu)?;
        self.enter_ready_to_send()
    }

    fn enter_init(&self) -> Result<(), Error> {
        use ffi::ibv_qp_attr_mask as mask;
        let mut attr: ffi::ibv_qp_attr = sys::zeroed();
        attr.pkey_index = 0;
        attr.port_num = self.raw.device().port().number;
        attr.qp_access_flags = self.state.access.flags();
        let given = mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS;
        self.raw.modify(QueuePairState::Init, attr, given)
    }

    fn enter_ready_to_receive(&self, peer: &Endpoint, path_mtu: Mtu) -> Result<(), Error> {
        use ffi::ibv_qp_attr_mask as mask;
        let device = self.raw.device();
        let mut attr: ffi::ibv_qp_attr = sys::zeroed();
        attr.path_mtu = path_mtu.as_raw();
        attr.dest_qp_num = peer.queue_pair_number.0;
        attr.rq_psn = peer.packet_sequence_number;
        attr.max_dest_rd_atomic = device.capabilities().max_qp_rd_atom.min(READS_IN_FLIGHT);
        attr.min_rnr_timer = MIN_RNR_TIMER;
        // A global route also where a local one would do (InfiniBand in one subnet): one path less.
        attr.ah_attr.is_global = 1;
        attr.ah_attr.port_num = device.port().number;
        attr.ah_attr.dlid = peer.lid;
        attr.ah_attr.grh.dgid.raw = peer.gid.octets();
        attr.ah_attr.grh.sgid_index = self.state.address.index;
        attr.ah_attr.grh.hop_limit = HOP_LIMIT;
        let given = mask::IBV_QP_AV
            | mask::IBV_QP_PATH_MTU
            | mask::IBV_QP_DEST_QPN
            | mask::IBV_QP_RQ_PSN
            | mask::IBV_QP_MAX_DEST_RD_ATOMIC
            | mask::IBV_QP_MIN_RNR_TIMER;
        self.raw.modify(QueuePairState::ReadyToReceive, attr, given)
    }

    fn enter_ready_to_send(&self) -> Result<(), Error> {
        use ffi::ibv_qp_attr_mask as mask;
        let mut attr: ffi::ibv_qp_attr = sys::zeroed();
        attr.sq_psn = self.endpoint.packet_sequence_number;
        attr.timeout = TIMEOUT;
        attr.retry_cnt = RETRY_COUNT;
        attr.rnr_retry = RETRY_COUNT;
        attr.max_rd_atomic =
            self.raw.device().capabilities().max_qp_init_rd_atom.min(READS_IN_FLIGHT);
        let given = mask::IBV_QP_SQ_PSN
            | mask::IBV_QP_TIMEOUT
            | mask::IBV_QP_RETRY_CNT
            | mask::IBV_QP_RNR_RETRY
            | mask::IBV_QP_MAX_QP_RD_ATOMIC;
        self.raw.modify(QueuePairState::ReadyToSend, attr, given)
    }
}

impl QueuePair<Connected> {
    /// The other end.
    #[must_use]
    pub fn peer(&self) -> &Endpoint {
        &self.state.peer
    }

    /// The path MTU that it was connected with.
    #[must_use]
    pub fn path_mtu(&self) -> Mtu {
        self.state.path_mtu
    }

    /// Moves it to the error state: what was posted on it comes back flushed, and the peer's
    /// requests are refused soon. **This is no barrier**: a packet may still land; only
    /// [`destroy`](Self::destroy) is one.
    ///
    /// # Errors
    ///
    /// [`Error::ModifyQueuePair`].
    pub fn fail(&self) -> Result<(), Error> {
        self.raw.modify(QueuePairState::Error, sys::zeroed(), NO_ATTRIBUTES)
    }

    /// What FLUSH is posted with, if it can be.
    pub(crate) fn extended(&self) -> Option<Extended> {
        self.raw.extended
    }

    /// Posts a chain of work requests (`ibv_post_send(3)`) and says how many the device has taken.
    ///
    /// # Safety
    ///
    /// `first` starts a chain of initialised requests, linked by `next`, of which the scatter lists
    /// are valid for the call. The memory that they name stays registered, and untouched by
    /// anybody else, until their completion has been taken or the queue pair is destroyed.
    pub(crate) unsafe fn post(&self, first: *mut ffi::ibv_send_wr) -> Posted {
        // The first one, unless the device says otherwise.
        let mut refused = first;
        let posted = sys::pass("ibv_post_send").and_then(|()| {
            refused = ptr::null_mut();
            // SAFETY: the queue pair is live; the caller vouches for the chain.
            sys::check(unsafe { ffi::ibv_post_send(self.raw.as_ptr(), first, &raw mut refused) })
        });
        match posted {
            Ok(()) => Posted::All,
            Err(source) => Posted::UpTo {
                refused,
                error: Error::PostSend {
                    device: self.raw.device().device_name(),
                    number: self.raw.number,
                    source,
                },
            },
        }
    }
}

/// What became of a chain of work requests.
pub(crate) enum Posted {
    /// All are with the device.
    All,
    /// The device has taken those before `refused`; null when it didn't say how many.
    UpTo {
        /// The first request that wasn't taken.
        refused: *mut ffi::ibv_send_wr,
        /// Why.
        error: Error,
    },
}

impl<S: fmt::Debug> fmt::Debug for QueuePair<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QueuePair")
            .field("device", self.raw.device())
            .field("endpoint", &self.endpoint)
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

/// A connect that went wrong, with the queue pair.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct ConnectFailed {
    /// The queue pair, which may be tried again.
    pub queue_pair: Box<QueuePair<Init>>,
    /// Why.
    #[source]
    pub error: Error,
}

impl From<ConnectFailed> for Error {
    fn from(failed: ConnectFailed) -> Self {
        failed.error
    }
}

/// The queue pair itself, destroyed when dropped.
struct Raw {
    /// None once it is destroyed.
    qp: Option<NonNull<ffi::ibv_qp>>,
    /// The same one, where it can post FLUSH.
    extended: Option<Extended>,
    number: QueuePairNumber,
    domain: ProtectionDomain,
    completions: CompletionQueue,
    inline_bytes: u32,
}

// SAFETY: verbs may be called on one queue pair from any thread and from several at a time.
unsafe impl Send for Raw {}
// SAFETY: as above.
unsafe impl Sync for Raw {}

impl Raw {
    fn device(&self) -> &Device {
        self.domain.device()
    }

    /// Null once it is destroyed, which only a lane that is being dropped has seen.
    fn as_ptr(&self) -> *mut ffi::ibv_qp {
        self.qp.map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    fn modify(
        &self,
        to: QueuePairState,
        mut attr: ffi::ibv_qp_attr,
        given: ffi::ibv_qp_attr_mask,
    ) -> Result<(), Error> {
        attr.qp_state = to.as_raw();
        let mask = (given | ffi::ibv_qp_attr_mask::IBV_QP_STATE).0.cast_signed();
        let modified = sys::pass("ibv_modify_qp").and_then(|()| {
            // SAFETY: the queue pair is live, and the attributes that the mask names are filled in.
            sys::check(unsafe { ffi::ibv_modify_qp(self.as_ptr(), &raw mut attr, mask) })
        });
        modified.map_err(|source| Error::ModifyQueuePair {
            device: self.device().device_name(),
            number: self.number,
            to,
            source,
        })
    }

    fn release(&mut self) -> io::Result<()> {
        if let Some(qp) = self.qp {
            sys::destroy("ibv_destroy_qp", || {
                // SAFETY: the queue pair is live: this is left out once it has succeeded.
                unsafe { ffi::ibv_destroy_qp(qp.as_ptr()) }
            })?;
            self.qp = None;
        }
        Ok(())
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = self.release() {
            tracing::error!(
                device = self.device().name(),
                queue_pair = self.number.get(),
                %error,
                "cannot destroy a queue pair; it is leaked with all that it stands on"
            );
            mem::forget(self.domain.clone());
            mem::forget(self.completions.clone());
        }
    }
}

fn random_24_bits() -> Result<u32, Error> {
    let mut bytes = [0; 4];
    let flags = rustix::rand::GetRandomFlags::empty();
    // Four bytes come whole or not at all (getrandom(2): up to 256 are not interrupted).
    rustix::rand::getrandom(&mut bytes[..], flags)
        .map_err(|errno| Error::Random { source: errno.into() })?;
    Ok(u32::from_ne_bytes(bytes) & BITS_24)
}

const BITS_24: u32 = 0xff_ffff;
const NO_ATTRIBUTES: ffi::ibv_qp_attr_mask = ffi::ibv_qp_attr_mask(0);
/// 4.096 µs * 2^19 = 2.1 s (IBTA 9.9.2.1.1). Shorter ones die within a drain.
const TIMEOUT: u8 = 19;
/// Not 7: that means "for ever" for "not ready" answers, and rxe takes it so for all retries.
const RETRY_COUNT: u8 = 6;
/// 0.64 ms (IBTA table 46).
const MIN_RNR_TIMER: u8 = 12;
/// Reads in flight, as far as the devices can: what every RoCE device can do.
const READS_IN_FLIGHT: u8 = 16;
const HOP_LIMIT: u8 = 64;

#[cfg(test)]
impl<S> QueuePair<S> {
    /// From here on the kernel doesn't find it, so that it can't be destroyed.
    pub(crate) fn lose_handle(&self) {
        // SAFETY: the queue pair is live, and only the test's thread uses it.
        unsafe { (*self.raw.as_ptr()).handle = u32::MAX };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mtus_are_found_by_their_bytes() {
        for mtu in Mtu::ALL {
            assert_eq!(Mtu::from_bytes(mtu.bytes()), Some(mtu));
            assert_eq!(Mtu::largest_within(mtu.bytes() + 1), Some(mtu));
        }
        assert_eq!(Mtu::from_bytes(1500), None);
        assert_eq!(Mtu::largest_within(255), None);
        assert_eq!(Mtu::largest_within(9000), Some(Mtu::Mtu4096));
    }

    #[test]
    fn states_go_to_the_header_and_back() {
        for raw in 0..8 {
            assert_eq!(QueuePairState::from_raw(raw).as_raw(), raw);
        }
    }

    #[test]
    fn endpoints_are_checked() {
        let good = Endpoint {
            queue_pair_number: QueuePairNumber::new(17),
            packet_sequence_number: BITS_24,
            gid: std::net::Ipv4Addr::LOCALHOST.into(),
            lid: 0,
            path_mtu_bytes: 4096,
        };
        good.check().unwrap();
        let number = QueuePairNumber::new;
        for wrong in [
            Endpoint { gid: Gid::default(), ..good },
            Endpoint { queue_pair_number: number(0), ..good },
            Endpoint { queue_pair_number: number(1 << 24), ..good },
            Endpoint { packet_sequence_number: 1 << 24, ..good },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn packet_sequence_numbers_are_random() {
        let drawn: Vec<_> = (0..4).map(|_| random_24_bits().unwrap()).collect();
        assert!(drawn.iter().all(|number| *number <= BITS_24));
        assert!(drawn.iter().any(|number| *number != drawn[0]), "{drawn:?}");
    }
}
