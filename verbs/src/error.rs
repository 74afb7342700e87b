//! The crate's error: which call failed, on what, and what to do about it.

use std::io;

use crate::device::DeviceName;
use crate::extended::Lack;
use crate::queue_pair::{QueuePairNumber, QueuePairState};
use crate::region::RegistrationMode;

/// What went wrong: the failing call, the object it was about, and the system's own error as
/// [`source`](std::error::Error::source), which the message doesn't repeat.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `ibv_get_device_list(3)` failed for a reason other than "there is no RDMA here".
    #[error("cannot list the RDMA devices; check that /sys/class/infiniband can be read")]
    ListDevices {
        /// The system's error.
        source: io::Error,
    },

    /// No device has an active port.
    #[error(
        "no RDMA device with an active port; see `rdma link`, and for a soft one: \
         `rdma link add rxe0 type rxe netdev <interface>`"
    )]
    NoDevice,

    /// A device's name has characters that the kernel doesn't allow, or is empty.
    #[error("\"{name}\" can't be the name of an RDMA device; see `rdma dev` for the names")]
    InvalidDeviceName {
        /// The name as it was given.
        name: String,
    },

    /// There is no device of that name.
    #[error("no RDMA device \"{name}\"; {}", say_present(.present))]
    NoSuchDevice {
        /// The name that was asked for.
        name: String,
        /// The devices that there are.
        present: Vec<DeviceName>,
    },

    /// `ibv_open_device(3)` failed.
    #[error("cannot open RDMA device {device}; check the rights on /dev/infiniband/uverbs*")]
    OpenDevice {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_query_device_ex(3)` failed.
    #[error("cannot ask RDMA device {device} for its capabilities")]
    QueryDevice {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_query_port(3)` failed.
    #[error("cannot ask RDMA device {device} for the state of port {port}")]
    QueryPort {
        /// The device.
        device: DeviceName,
        /// The port's number, from 1.
        port: u8,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_query_gid_table(3)` failed.
    #[error("cannot read the GID table of RDMA device {device} (it needs rdma-core 32 or later)")]
    QueryGids {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// The port has no GID, so nothing can be addressed to it.
    #[error(
        "port {port} of RDMA device {device} has no GID; give its network interface an IP address"
    )]
    NoGid {
        /// The device.
        device: DeviceName,
        /// The port's number, from 1.
        port: u8,
    },

    /// `ibv_alloc_pd(3)` failed.
    #[error("cannot allocate a protection domain on RDMA device {device}")]
    AllocateProtectionDomain {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// The range to register is empty or reaches beyond the memory.
    #[error("cannot register bytes {start}..{end} of a memory of {len} bytes")]
    RangeOutOfBounds {
        /// Start of the range, in bytes within the memory.
        start: usize,
        /// End of the range (not included).
        end: usize,
        /// Length of the memory.
        len: usize,
    },

    /// A pinned registration was refused with EOPNOTSUPP: the memory is a file on an fs-DAX file
    /// system, which Linux never pins for long.
    #[error(
        "RDMA device {device} may not pin {len} bytes: the file is on a DAX file system, and Linux \
         refuses to pin those because truncating the file could not wait for the device; use a \
         device with on-demand paging (mlx5, or rxe on Linux 6.15 or later)"
    )]
    PinRefused {
        /// The device.
        device: DeviceName,
        /// Bytes to pin.
        len: usize,
        /// The system's error.
        source: io::Error,
    },

    /// A pinned registration was refused with EFAULT: these pages can't be pinned for writing.
    #[error(
        "RDMA device {device} cannot pin {len} bytes for writing: the memory is read-only, not \
         mapped, or a file in the page cache of a disk file system (refused since Linux 6.5); \
         use tmpfs, device-dax or a device with on-demand paging"
    )]
    PinFault {
        /// The device.
        device: DeviceName,
        /// Bytes to pin.
        len: usize,
        /// The system's error.
        source: io::Error,
    },

    /// A pinned registration was refused with ENOMEM, or EPERM: the limit of locked memory, as a
    /// rule.
    #[error(
        "RDMA device {device} cannot pin {len} bytes: too little memory, or above the limit of \
         locked memory; raise `ulimit -l` (LimitMEMLOCK= in a systemd unit) or give it CAP_IPC_LOCK"
    )]
    MemlockExceeded {
        /// The device.
        device: DeviceName,
        /// Bytes to pin.
        len: usize,
        /// The system's error.
        source: io::Error,
    },

    /// The device can't do on-demand paging for what we need.
    #[error(
        "RDMA device {device} has no on-demand paging for reliable connections; rxe has it from \
         Linux 6.15 on, mlx5 devices from ConnectX-4 on; memory that can be pinned (tmpfs, \
         device-dax) needs none"
    )]
    NoOnDemandPaging {
        /// The device.
        device: DeviceName,
    },

    /// `ibv_reg_mr(3)` failed for another reason.
    #[error("cannot register {len} bytes ({mode}) with RDMA device {device}")]
    Register {
        /// The device.
        device: DeviceName,
        /// Pinned or on demand.
        mode: RegistrationMode,
        /// Length of the region.
        len: usize,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_dereg_mr(3)` failed: the key still lives.
    #[error(
        "cannot deregister a region of {len} bytes from RDMA device {device}: its key is still \
         valid, and its memory is kept; destroying the queue pairs that may use it stops them"
    )]
    Deregister {
        /// The device.
        device: DeviceName,
        /// Length of the region.
        len: usize,
        /// The system's error.
        source: io::Error,
    },

    /// `mmap(2)` of a buffer failed.
    #[error("cannot map a buffer of {len} bytes")]
    MapBuffer {
        /// Length of the buffer.
        len: usize,
        /// The system's error.
        source: io::Error,
    },

    /// A buffer's new length is beyond its capacity.
    #[error("a buffer with a capacity of {capacity} bytes can't have a length of {len}")]
    BufferTooSmall {
        /// The length asked for.
        len: usize,
        /// What the buffer has.
        capacity: usize,
    },

    /// `ibv_create_comp_channel(3)` failed, or its descriptor couldn't be made non-blocking.
    #[error("cannot create a completion channel on RDMA device {device}")]
    CreateCompletionChannel {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_create_cq(3)` failed.
    #[error("cannot create a completion queue of {entries} entries on RDMA device {device}")]
    CreateCompletionQueue {
        /// The device.
        device: DeviceName,
        /// Entries asked for.
        entries: u32,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_poll_cq(3)` failed: the queue has overflowed or the device is gone.
    #[error("cannot poll a completion queue of RDMA device {device}; open a new connection")]
    PollCompletionQueue {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_req_notify_cq(3)` failed.
    #[error("cannot arm a completion queue of RDMA device {device}")]
    ArmCompletionQueue {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// Waiting on the completion channel, or `ibv_get_cq_event(3)`, failed.
    #[error("cannot wait for completions of RDMA device {device}")]
    AwaitCompletion {
        /// The device.
        device: DeviceName,
        /// The system's error.
        source: io::Error,
    },

    /// An async call outside a tokio runtime.
    #[error("waiting for a completion needs a tokio runtime with I/O enabled; or use `poll`")]
    NoRuntime,

    /// `ibv_create_qp(3)` failed.
    #[error(
        "cannot create a queue pair with {depth} work requests on RDMA device {device}; its \
         limits are in `ibv_devinfo -v`"
    )]
    CreateQueuePair {
        /// The device.
        device: DeviceName,
        /// Depth of the send queue, in work requests.
        depth: u32,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_modify_qp(3)` failed.
    #[error("cannot move queue pair {number} of RDMA device {device} to state {to}{}", say_hint(.source))]
    ModifyQueuePair {
        /// The device.
        device: DeviceName,
        /// The queue pair.
        number: QueuePairNumber,
        /// The state it should have entered.
        to: QueuePairState,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_query_qp(3)` failed.
    #[error("cannot ask queue pair {number} of RDMA device {device} for its state")]
    QueryQueuePair {
        /// The device.
        device: DeviceName,
        /// The queue pair.
        number: QueuePairNumber,
        /// The system's error.
        source: io::Error,
    },

    /// `ibv_destroy_qp(3)` failed: the queue pair still lives.
    #[error("cannot destroy queue pair {number} of RDMA device {device}: it may still transfer")]
    DestroyQueuePair {
        /// The device.
        device: DeviceName,
        /// The queue pair.
        number: QueuePairNumber,
        /// The system's error.
        source: io::Error,
    },

    /// No source of randomness for the first packet sequence number.
    #[error("cannot draw a random packet sequence number")]
    Random {
        /// The system's error.
        source: io::Error,
    },

    /// The path MTU asked for is beyond what one of the two ends can do.
    #[error(
        "a path MTU of {asked} bytes is beyond what {end} can do ({limit}); raise the MTU of its \
         network interface (path MTU 4096 needs at least 4200)"
    )]
    PathMtuTooLarge {
        /// What was asked for, in bytes.
        asked: u32,
        /// "this end" or "the peer".
        end: &'static str,
        /// What that end can do, in bytes.
        limit: u32,
    },

    /// The peer's endpoint can't be right.
    #[error("the peer's endpoint is unusable: {reason}")]
    BadEndpoint {
        /// What is wrong with it.
        reason: &'static str,
    },

    /// An operation without any piece.
    #[error("an operation needs at least one piece")]
    NoPieces,

    /// A piece of length zero, which a device may take for 2 GiB.
    #[error("piece {piece} of the operation has no bytes")]
    EmptyPiece {
        /// Its index in the operation.
        piece: usize,
    },

    /// A piece beyond the buffer's length, or with its start behind its end.
    #[error("piece {piece} covers bytes {start}..{end} of a buffer of {len} bytes")]
    PieceOutOfBounds {
        /// Its index in the operation.
        piece: usize,
        /// Start of the piece in the buffer.
        start: usize,
        /// End of the piece in the buffer (not included).
        end: usize,
        /// The buffer's length.
        len: usize,
    },

    /// A piece of which the local and the remote side differ in length.
    #[error("piece {piece} has {local} bytes here and {remote} bytes at the peer")]
    PieceLengthsDiffer {
        /// Its index in the operation.
        piece: usize,
        /// Bytes on this side.
        local: usize,
        /// Bytes at the peer.
        remote: usize,
    },

    /// A piece longer than the largest message that the port takes.
    #[error("piece {piece} has {len} bytes; split it, one message carries at most {limit}")]
    PieceTooLong {
        /// Its index in the operation.
        piece: usize,
        /// Its length in bytes.
        len: usize,
        /// [`Port::max_message_bytes`](crate::Port::max_message_bytes).
        limit: u32,
    },

    /// A remote range that wraps around the end of the address space.
    #[error("piece {piece} reaches beyond the end of the peer's address space")]
    RemoteOverflow {
        /// Its index in the operation.
        piece: usize,
    },

    /// The device has no atomics.
    #[error("{device} has no atomics on 8 bytes; read, change and write instead")]
    NoAtomics {
        /// The device.
        device: DeviceName,
    },

    /// An atomic on an address that is no multiple of 8 (IBTA 9.4.5).
    #[error("an atomic works on 8 bytes at a multiple of 8, not at {address:#x}")]
    MisalignedAtomic {
        /// The address at the peer.
        address: u64,
    },

    /// There is no RDMA FLUSH to be had.
    #[error("RDMA device {device} can't be used for RDMA FLUSH: {why}")]
    NoFlush {
        /// The device.
        device: DeviceName,
        /// What is missing.
        why: Lack,
    },

    /// There is no ATOMIC WRITE to be had.
    #[error(
        "RDMA device {device} can't be used for ATOMIC WRITE: {why}; compare-and-swap writes 8 bytes as one step, too"
    )]
    NoAtomicWrite {
        /// The device.
        device: DeviceName,
        /// What is missing.
        why: Lack,
    },

    /// The buffer was registered in another protection domain than the lane's.
    #[error("the buffer belongs to another protection domain than the lane")]
    ForeignBuffer,

    /// The send queue has too few free entries. Take completions first, then post again.
    #[error("the send queue is full: {pieces} pieces to post, {free} of {depth} entries are free")]
    QueueFull {
        /// Work requests that the operation needs.
        pieces: usize,
        /// Free entries at the time.
        free: u32,
        /// Entries of the send queue.
        depth: u32,
    },

    /// `ibv_post_send(3)` refused the operation as a whole: none of it was started.
    #[error("cannot post to queue pair {number} of RDMA device {device}")]
    PostSend {
        /// The device.
        device: DeviceName,
        /// The queue pair.
        number: QueuePairNumber,
        /// The system's error.
        source: io::Error,
    },
}

fn say_present(devices: &[DeviceName]) -> String {
    if devices.is_empty() {
        return "there is none at all (is libibverbs installed, and is a driver loaded?)".into();
    }
    let names: Vec<_> = devices.iter().map(DeviceName::as_str).collect();
    format!("there is: {}", names.join(", "))
}

fn say_hint(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::ETIMEDOUT | libc::EHOSTUNREACH | libc::ENETUNREACH) => {
            "; the peer's address doesn't answer"
        }
        _ => "",
    }
}

/// The message of an error and of everything below it, for where only text can go.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn an_absent_device_is_answered_with_those_present() {
        let present = vec!["rxe0".parse().unwrap(), "mlx5_0".parse().unwrap()];
        let error = Error::NoSuchDevice { name: "rxe7".into(), present };
        assert_eq!(error.to_string(), "no RDMA device \"rxe7\"; there is: rxe0, mlx5_0");
        let error = Error::NoSuchDevice { name: "rxe7".into(), present: Vec::new() };
        assert!(error.to_string().contains("is libibverbs installed"));
    }

    #[test]
    fn the_message_does_not_repeat_its_source() {
        let source = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
        let text = source.to_string();
        let error = Error::PinRefused { device: "rxe0".parse().unwrap(), len: 4096, source };
        assert!(!error.to_string().contains(&text));
        assert!(error.to_string().contains("on-demand paging"));
        assert!(error.source().is_some());
    }

    #[test]
    fn the_error_is_small_enough_to_return() {
        assert!(size_of::<Error>() <= 72, "{}", size_of::<Error>());
    }
}
