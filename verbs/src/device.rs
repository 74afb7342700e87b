//! The device: finding it, opening it, and what it can do.

use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::str::FromStr;
use std::sync::Arc;

use crate::error::Error;
use crate::gid::{self, Address, Gid, GidKind};
use crate::sys::{self, ffi};

/// The name of an RDMA device, such as `mlx5_0` or `rxe0`: not empty, without slashes or spaces,
/// shorter than 64 bytes (the kernel's `IB_DEVICE_NAME_MAX`).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceName(String);

impl DeviceName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let wrong = |c: char| c == '/' || c.is_whitespace() || c.is_control();
        if name.is_empty() || name.len() >= 64 || name.contains(wrong) {
            return Err(Error::InvalidDeviceName { name: name.to_owned() });
        }
        Ok(Self(name.to_owned()))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceName({})", self.0)
    }
}

/// The names of the RDMA devices of this host, in the order of `ibv_get_device_list(3)`.
///
/// Empty where libibverbs isn't installed, where the kernel has no RDMA, and where there is no
/// device: to the caller that is all the same.
///
/// # Errors
///
/// [`Error::ListDevices`] when the list exists but can't be read.
pub fn devices() -> Result<Vec<DeviceName>, Error> {
    let list = DeviceList::read()?;
    Ok(list.iter().filter_map(name_of).collect())
}

/// An open RDMA device (`ibv_context`). Clones share it; it is closed with the last object on it.
///
/// A connection uses one port, which is chosen when the device is opened: the first active one.
///
/// Its descriptor (`/dev/infiniband/uverbs*`) is moved out of the way of descriptors that are opened
/// later: on SIGKILL the kernel closes the highest number first, and pinned regions must be gone
/// before the leases on the files behind them are. That holds for up to 65,000 files or so, less
/// where the limit on open files is lower.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    context: NonNull<ffi::ibv_context>,
    name: DeviceName,
    capabilities: Capabilities,
    port: Port,
}

// SAFETY: verbs may be called on one context from any thread and from several at a time (rdma-core,
// Documentation/libibverbs.md); the rest is plain data that doesn't change.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Device {
    /// Opens the device of that name (`ibv_open_device(3)`). A port that is down is no error here:
    /// see [`Port::state`].
    ///
    /// # Errors
    ///
    /// [`Error::NoSuchDevice`] with the names that there are; [`Error::OpenDevice`],
    /// [`Error::QueryDevice`] or [`Error::QueryPort`] when the system refuses.
    pub fn open(name: &str) -> Result<Self, Error> {
        let list = DeviceList::read()?;
        let found = list.iter().find_map(|device| {
            let present = name_of(device)?;
            (present.as_str() == name).then_some((device, present))
        });
        match found {
            Some((device, name)) => Self::open_entry(device, name),
            None => Err(Error::NoSuchDevice {
                name: name.to_owned(),
                present: list.iter().filter_map(name_of).collect(),
            }),
        }
    }

    /// Opens the first device that has an active port.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] when there is none. When devices are there but can't be opened, the
    /// first such error.
    pub fn open_first() -> Result<Self, Error> {
        let list = DeviceList::read()?;
        let mut failed = None;
        for device in list.iter() {
            let Some(name) = name_of(device) else { continue };
            match Self::open_entry(device, name) {
                Ok(device) if device.port().state == PortState::Active => return Ok(device),
                Ok(_) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        Err(failed.unwrap_or(Error::NoDevice))
    }

    fn open_entry(device: NonNull<ffi::ibv_device>, name: DeviceName) -> Result<Self, Error> {
        let context = sys::pass("ibv_open_device").and_then(|()| {
            // SAFETY: `device` comes from the list that the caller holds until this returns.
            sys::check_pointer(unsafe { ffi::ibv_open_device(device.as_ptr()) })
        });
        let context =
            context.map_err(|source| Error::OpenDevice { device: name.clone(), source })?;
        let context = OpenContext(context);
        context.raise_descriptor(&name);

        let (capabilities, ports) = query_device(context.0)
            .map_err(|source| Error::QueryDevice { device: name.clone(), source })?;
        let mut chosen = None;
        for number in 1..=ports.max(1) {
            let port = query_port(context.0, number, &name)?;
            let active = port.state == PortState::Active;
            if active || chosen.is_none() {
                chosen = Some(port);
            }
            if active {
                break;
            }
        }
        let port = chosen.ok_or_else(|| Error::QueryPort {
            device: name.clone(),
            port: 1,
            source: io::ErrorKind::NotFound.into(),
        })?;
        Ok(Self(Arc::new(Inner { context: context.keep(), name, capabilities, port })))
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.name.as_str()
    }

    pub(crate) fn device_name(&self) -> DeviceName {
        self.0.name.clone()
    }

    /// What the device says it can do. What it really does, [`self_test`](crate::self_test) finds.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }

    /// The port in use, as it was when the device was opened.
    #[must_use]
    pub fn port(&self) -> Port {
        self.0.port
    }

    /// The port in use, as it is now (`ibv_query_port(3)`).
    ///
    /// # Errors
    ///
    /// [`Error::QueryPort`].
    pub fn query_port(&self) -> Result<Port, Error> {
        query_port(self.0.context, self.0.port.number, &self.0.name)
    }

    /// The address that connections use, from the port's GID table (`ibv_query_gid_table(3)`):
    /// RoCE v2 over IPv4 first, then other RoCE v2, then anything that isn't link-local, else the
    /// lowest index.
    ///
    /// # Errors
    ///
    /// [`Error::QueryGids`]; [`Error::NoGid`] when the table is empty.
    pub fn address(&self) -> Result<Address, Error> {
        let table = self.gid_table()?;
        gid::choose(&table)
            .ok_or_else(|| Error::NoGid { device: self.device_name(), port: self.0.port.number })
    }

    fn gid_table(&self) -> Result<Vec<Address>, Error> {
        // The table of all ports in one call. An index above 255 couldn't be put into an address
        // vector anyway (`ibv_global_route::sgid_index`).
        let mut entries: Vec<ffi::ibv_gid_entry> = Vec::new();
        entries.resize_with(GID_ENTRIES_MAX, sys::zeroed);
        let failed = |source| Error::QueryGids { device: self.device_name(), source };
        sys::pass("ibv_query_gid_table").map_err(failed)?;
        // SAFETY: the context is open, and `entries` has room for that many.
        let count = unsafe {
            ffi::ibv_query_gid_table(
                self.context().as_ptr(),
                entries.as_mut_ptr(),
                entries.len(),
                0,
            )
        };
        let count = usize::try_from(count).map_err(|_| failed(negative_errno(count)))?;
        let port = u32::from(self.0.port.number);
        Ok(entries
            .iter()
            .take(count)
            .filter(|entry| entry.port_num == port)
            .filter_map(|entry| {
                let index = u8::try_from(entry.gid_index).ok()?;
                // SAFETY: both variants of the union are plain bytes, all initialised.
                let raw = unsafe { entry.gid.raw };
                Some(Address { index, gid: Gid::new(raw), kind: gid_kind(entry.gid_type) })
            })
            .collect())
    }

    pub(crate) fn context(&self) -> NonNull<ffi::ibv_context> {
        self.0.context
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the context is open, and its descriptor doesn't change any more.
        let fd = unsafe { (*self.0.context.as_ptr()).cmd_fd };
        // SAFETY: it is open until the context is closed, which `self` outlives.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.0.name).finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let closed = sys::destroy("ibv_close_device", || {
            // SAFETY: the context is open, and nothing stands on it any more: whatever does, holds a
            // clone of the `Device`.
            unsafe { ffi::ibv_close_device(self.context.as_ptr()) }
        });
        if let Err(error) = closed {
            tracing::error!(device = %self.name, %error, "cannot close the RDMA device");
        }
    }
}

/// What a device says about itself (`ibv_query_device_ex(3)`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Capabilities {
    /// On-demand paging.
    pub odp: OdpCapabilities,
    /// Largest memory region, in bytes. Drivers are generous here; see
    /// [`Quirks::max_region_bytes`](crate::Quirks::max_region_bytes).
    pub max_mr_size: u64,
    /// Page sizes that regions may be built of: bit n stands for 2^n bytes.
    pub page_size_cap: u64,
    /// Memory regions.
    pub max_mr: u32,
    /// Protection domains.
    pub max_pd: u32,
    /// Queue pairs.
    pub max_qp: u32,
    /// Work requests in one queue.
    pub max_qp_wr: u32,
    /// Pieces of memory in one work request.
    pub max_sge: u32,
    /// Completion queues.
    pub max_cq: u32,
    /// Entries of one completion queue.
    pub max_cqe: u32,
    /// Reads and atomics that a queue pair answers at a time.
    pub max_qp_rd_atom: u8,
    /// Reads and atomics that a queue pair asks for at a time.
    pub max_qp_init_rd_atom: u8,
    /// Atomics on 8 bytes (`IBV_ATOMIC_HCA` or more): atomic among themselves, on this device.
    pub atomics: bool,
    /// The driver knows RDMA FLUSH that makes data visible to all (`IB_UVERBS_DEVICE_FLUSH_GLOBAL`).
    pub flush_global: bool,
    /// The driver knows RDMA FLUSH to persistent memory (`IB_UVERBS_DEVICE_FLUSH_PERSISTENT`).
    pub flush_persistent: bool,
    /// The driver knows ATOMIC WRITE of 8 bytes (`IB_UVERBS_DEVICE_ATOMIC_WRITE`).
    pub atomic_write: bool,
    /// The vendor's number (the IEEE OUI).
    pub vendor_id: u32,
    /// The vendor's number for the part.
    pub vendor_part_id: u32,
}

/// On-demand paging (ODP), as far as reliable connections go: what the device can do to memory that
/// isn't pinned, by faulting it in and by following the kernel when it takes pages away.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct OdpCapabilities {
    /// There is any on-demand paging.
    pub supported: bool,
    /// The peer may write.
    pub rc_write: bool,
    /// The peer may read.
    pub rc_read: bool,
    /// The peer may use atomics.
    pub rc_atomic: bool,
    /// The memory may be the source of a send.
    pub rc_send: bool,
    /// The memory may be the target of a receive.
    pub rc_receive: bool,
    /// The peer may use RDMA FLUSH.
    pub rc_flush: bool,
    /// The peer may use ATOMIC WRITE.
    pub rc_atomic_write: bool,
}

impl OdpCapabilities {
    /// Enough for one-sided writes and reads.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.supported && self.rc_write && self.rc_read
    }
}

/// A port of a device (`ibv_query_port(3)`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Port {
    /// Its number, from 1.
    pub number: u8,
    /// Whether packets can go through it.
    pub state: PortState,
    /// The largest payload of a packet at present, in bytes: 256 to 4096. On RoCE it follows from
    /// the MTU of the network interface.
    pub active_mtu_bytes: u32,
    /// The longest message, in bytes.
    pub max_message_bytes: u32,
    /// The local identifier on InfiniBand; 0 on RoCE.
    pub lid: u16,
    /// The network under it.
    pub link_layer: LinkLayer,
}

/// The state of a port.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum PortState {
    /// No link.
    Down,
    /// A link that isn't configured yet.
    Initializing,
    /// Configured, not yet carrying data.
    Armed,
    /// Carries data.
    Active,
    /// Active with the link briefly lost.
    ActiveDefer,
    /// Another state, with the kernel's number.
    Other(u32),
}

impl fmt::Display for PortState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down => f.write_str("down"),
            Self::Initializing => f.write_str("initializing"),
            Self::Armed => f.write_str("armed"),
            Self::Active => f.write_str("active"),
            Self::ActiveDefer => f.write_str("active (deferred)"),
            Self::Other(state) => write!(f, "state {state}"),
        }
    }
}

/// The network under a port.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE, rxe.
    Ethernet,
    /// The driver doesn't say.
    Unspecified,
}

/// Above the number of files that one process is expected to hold; the table of descriptors grows
/// to it, at 8 bytes each.
const DESCRIPTOR_MAX: u64 = 65_536;
/// Room for other devices, and for what a process opens when it is at its limit.
const DESCRIPTORS_ABOVE: u64 = 64;

/// `IB_UVERBS_DEVICE_FLUSH_GLOBAL`, `IB_UVERBS_DEVICE_FLUSH_PERSISTENT` and
/// `IB_UVERBS_DEVICE_ATOMIC_WRITE` of <rdma/ib_user_verbs.h>: libibverbs passes them on and names none.
const DEVICE_FLUSH_GLOBAL: u64 = 1 << 38;
const DEVICE_FLUSH_PERSISTENT: u64 = 1 << 39;
const DEVICE_ATOMIC_WRITE: u64 = 1 << 40;

/// More than any device's table has been seen to hold for what an address vector can name.
const GID_ENTRIES_MAX: usize = 1024;

/// The list of `ibv_get_device_list(3)`, freed when dropped.
struct DeviceList {
    list: Option<NonNull<*mut ffi::ibv_device>>,
    count: usize,
}

impl DeviceList {
    fn read() -> Result<Self, Error> {
        let mut count = 0;
        let list = sys::pass("ibv_get_device_list").and_then(|()| {
            // SAFETY: `count` may be written.
            sys::check_pointer(unsafe { ffi::ibv_get_device_list(&raw mut count) })
        });
        match list {
            Ok(list) => {
                let count = usize::try_from(count).unwrap_or(0);
                Ok(Self { list: Some(list), count })
            }
            // No libibverbs (EOPNOTSUPP, from the loader), or no RDMA in the kernel.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOENT)
                ) =>
            {
                Ok(Self { list: None, count: 0 })
            }
            Err(source) => Err(Error::ListDevices { source }),
        }
    }

    fn iter(&self) -> impl Iterator<Item = NonNull<ffi::ibv_device>> + '_ {
        let first = self.list.map_or(ptr::null_mut(), NonNull::as_ptr);
        (0..self.count).filter_map(move |index| {
            let entry = first.wrapping_add(index);
            // SAFETY: the list has `count` entries (if it is there at all) and lives as long as
            // `self`.
            NonNull::new(unsafe { *entry })
        })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if let Some(list) = self.list {
            // SAFETY: it came from `ibv_get_device_list` and is freed once. Contexts that were
            // opened meanwhile keep their device by themselves.
            unsafe { ffi::ibv_free_device_list(list.as_ptr()) }
        }
    }
}

/// A context that is closed again when opening goes wrong half-way.
struct OpenContext(NonNull<ffi::ibv_context>);

impl OpenContext {
    /// Moves the context's descriptor to a high number. Where that fails, it stays where it is.
    fn raise_descriptor(&self, device: &DeviceName) {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.unwrap_or(u64::MAX).min(DESCRIPTOR_MAX);
        let least = i32::try_from(limit.saturating_sub(DESCRIPTORS_ABOVE)).unwrap_or(0);
        // SAFETY: the context is open.
        let fd = unsafe { (*self.0.as_ptr()).cmd_fd };
        if fd >= least {
            return;
        }
        // SAFETY: it is the context's, which is open until the end of this function.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        match rustix::io::fcntl_dupfd_cloexec(borrowed, least) {
            Ok(higher) => {
                // SAFETY: the context is open and nobody else has seen it. The field is public
                // (verbs.h); libibverbs and the providers read it at each use, and closing the
                // context closes what is in it.
                unsafe { (*self.0.as_ptr()).cmd_fd = higher.into_raw_fd() };
                // SAFETY: the context has let go of it, so it is ours to close.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Err(error) => {
                tracing::warn!(
                    %device, %error, fd,
                    "cannot move the device's descriptor above those of files"
                );
            }
        }
    }

    fn keep(self) -> NonNull<ffi::ibv_context> {
        let context = self.0;
        std::mem::forget(self);
        context
    }
}

impl Drop for OpenContext {
    fn drop(&mut self) {
        // SAFETY: the context is open and nothing else has seen it. The error of the step that
        // failed says more than one of this call could.
        let _ = unsafe { ffi::ibv_close_device(self.0.as_ptr()) };
    }
}

fn name_of(device: NonNull<ffi::ibv_device>) -> Option<DeviceName> {
    // SAFETY: `device` comes from a list that is still held.
    let name = NonNull::new(unsafe { ffi::ibv_get_device_name(device.as_ptr()) }.cast_mut())?;
    // SAFETY: a C string within the device, which is still held.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) };
    name.to_str().ok()?.parse().ok()
}

fn query_device(context: NonNull<ffi::ibv_context>) -> io::Result<(Capabilities, u8)> {
    sys::pass("ibv_query_device_ex")?;
    let mut attr: ffi::ibv_device_attr_ex = sys::zeroed();
    // SAFETY: the context is open, the attributes may be written.
    let ret = unsafe { ffi::ibv_query_device_ex(context.as_ptr(), ptr::null(), &raw mut attr) };
    sys::check(ret)?;

    let base = &attr.orig_attr;
    let count = |value: i32| u32::try_from(value).unwrap_or(0);
    let small = |value: i32| u8::try_from(value.clamp(0, 255)).unwrap_or(u8::MAX);
    let rc = attr.odp_caps.per_transport_caps.rc_odp_caps;
    let has = |bit: ffi::ibv_odp_transport_cap_bits| rc & bit.0 != 0;
    use ffi::ibv_odp_transport_cap_bits as bits;
    let general = u64::from(ffi::ibv_odp_general_caps::IBV_ODP_SUPPORT.0);
    let odp = OdpCapabilities {
        supported: attr.odp_caps.general_caps & general != 0,
        rc_write: has(bits::IBV_ODP_SUPPORT_WRITE),
        rc_read: has(bits::IBV_ODP_SUPPORT_READ),
        rc_atomic: has(bits::IBV_ODP_SUPPORT_ATOMIC),
        rc_send: has(bits::IBV_ODP_SUPPORT_SEND),
        rc_receive: has(bits::IBV_ODP_SUPPORT_RECV),
        rc_flush: has(bits::IBV_ODP_SUPPORT_FLUSH),
        rc_atomic_write: has(bits::IBV_ODP_SUPPORT_ATOMIC_WRITE),
    };
    let capabilities = Capabilities {
        odp,
        max_mr_size: base.max_mr_size,
        page_size_cap: base.page_size_cap,
        max_mr: count(base.max_mr),
        max_pd: count(base.max_pd),
        max_qp: count(base.max_qp),
        max_qp_wr: count(base.max_qp_wr),
        max_sge: count(base.max_sge),
        max_cq: count(base.max_cq),
        max_cqe: count(base.max_cqe),
        max_qp_rd_atom: small(base.max_qp_rd_atom),
        max_qp_init_rd_atom: small(base.max_qp_init_rd_atom),
        atomics: base.atomic_cap != ffi::ibv_atomic_cap::IBV_ATOMIC_NONE,
        flush_global: attr.device_cap_flags_ex & DEVICE_FLUSH_GLOBAL != 0,
        flush_persistent: attr.device_cap_flags_ex & DEVICE_FLUSH_PERSISTENT != 0,
        atomic_write: attr.device_cap_flags_ex & DEVICE_ATOMIC_WRITE != 0,
        vendor_id: base.vendor_id,
        vendor_part_id: base.vendor_part_id,
    };
    Ok((capabilities, base.phys_port_cnt))
}

fn query_port(
    context: NonNull<ffi::ibv_context>,
    number: u8,
    device: &DeviceName,
) -> Result<Port, Error> {
    // Zeroed, because an old libibverbs fills in only the fields that it knows.
    let mut attr: ffi::ibv_port_attr = sys::zeroed();
    let queried = sys::pass("ibv_query_port").and_then(|()| {
        // SAFETY: the context is open, the attributes may be written.
        sys::check(unsafe { ffi::ibv_query_port(context.as_ptr(), number, &raw mut attr) })
    });
    queried.map_err(|source| Error::QueryPort { device: device.clone(), port: number, source })?;
    Ok(Port {
        number,
        state: port_state(attr.state),
        active_mtu_bytes: mtu_bytes(attr.active_mtu),
        max_message_bytes: attr.max_msg_sz,
        lid: attr.lid,
        link_layer: match attr.link_layer {
            ffi::IBV_LINK_LAYER_INFINIBAND => LinkLayer::InfiniBand,
            ffi::IBV_LINK_LAYER_ETHERNET => LinkLayer::Ethernet,
            _ => LinkLayer::Unspecified,
        },
    })
}

fn port_state(state: ffi::ibv_port_state::Type) -> PortState {
    use ffi::ibv_port_state as raw;
    match state {
        raw::IBV_PORT_DOWN => PortState::Down,
        raw::IBV_PORT_INIT => PortState::Initializing,
        raw::IBV_PORT_ARMED => PortState::Armed,
        raw::IBV_PORT_ACTIVE => PortState::Active,
        raw::IBV_PORT_ACTIVE_DEFER => PortState::ActiveDefer,
        other => PortState::Other(other),
    }
}

/// `enum ibv_mtu` in bytes; 0 for a value that the headers don't know.
fn mtu_bytes(mtu: ffi::ibv_mtu::Type) -> u32 {
    match mtu {
        1..=5 => 128 << mtu,
        _ => 0,
    }
}

fn gid_kind(kind: u32) -> GidKind {
    match kind {
        ffi::IBV_GID_TYPE_IB => GidKind::InfiniBand,
        ffi::IBV_GID_TYPE_ROCE_V1 => GidKind::RoceV1,
        ffi::IBV_GID_TYPE_ROCE_V2 => GidKind::RoceV2,
        other => GidKind::Other(other),
    }
}

fn negative_errno(ret: isize) -> io::Error {
    match i32::try_from(ret.unsigned_abs()) {
        Ok(errno) if errno > 0 => io::Error::from_raw_os_error(errno),
        _ => io::Error::last_os_error(),
    }
}

#[cfg(test)]
impl Device {
    /// Runs `calls` while each call to the device fails with EBADF. For one thread only.
    pub(crate) fn while_deaf<R>(&self, calls: impl FnOnce() -> R) -> R {
        let was = self.replace_descriptor(-1);
        let result = calls();
        self.replace_descriptor(was);
        result
    }

    fn replace_descriptor(&self, fd: i32) -> i32 {
        // SAFETY: the context is open, and the test's only thread is here.
        let context = unsafe { self.context().as_mut() };
        std::mem::replace(&mut context.cmd_fd, fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        assert_eq!("rxe0".parse::<DeviceName>().unwrap().to_string(), "rxe0");
        for wrong in ["", "a/b", "a b", "a\n", &"x".repeat(64)] {
            assert!(wrong.parse::<DeviceName>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn listing_never_fails_without_a_device() {
        devices().unwrap();
    }

    #[test]
    fn an_absent_device_is_refused_by_name() {
        let error = Device::open("no-such-device").unwrap_err();
        assert!(matches!(error, Error::NoSuchDevice { .. }), "{error}");
    }

    #[test]
    fn mtus_are_in_bytes() {
        let known = [(1, 256), (2, 512), (3, 1024), (4, 2048), (5, 4096), (0, 0), (6, 0)];
        for (raw, bytes) in known {
            assert_eq!(mtu_bytes(raw), bytes);
        }
    }

    #[test]
    fn enumerations_keep_what_they_do_not_know() {
        assert_eq!(port_state(4), PortState::Active);
        assert_eq!(port_state(99), PortState::Other(99));
        assert_eq!(gid_kind(2), GidKind::RoceV2);
        assert_eq!(gid_kind(99), GidKind::Other(99));
    }

    #[test]
    fn a_negative_result_is_its_errno() {
        let error = negative_errno(-isize::try_from(libc::EOPNOTSUPP).unwrap());
        assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP));
    }

    #[test]
    fn writes_and_reads_are_what_on_demand_paging_is_for() {
        let mut odp = OdpCapabilities { supported: true, rc_write: true, ..Default::default() };
        assert!(!odp.is_usable());
        odp.rc_read = true;
        assert!(odp.is_usable());
    }
}
