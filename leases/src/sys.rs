//! The doors to the kernel that no crate has: one typed function per fcntl command and per memory
//! call, each with one unsafe block.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::NonNull;
use std::sync::LazyLock;
use std::time::Duration;

use nix::sys::mman::{MapFlags, MmapAdvise, MsFlags, ProtFlags};

use crate::door;

// <linux/fcntl.h>; libc has none of these for linux-gnu.
const F_SETSIG: libc::c_int = 10;
const F_GETSIG: libc::c_int = 11;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;
const F_GETDELEG: libc::c_int = 1039;
const F_SETDELEG: libc::c_int = 1040;

/// `struct f_owner_ex` of fcntl(2).
#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

/// `struct delegation` of <linux/fcntl.h> (6.19).
#[repr(C)]
#[derive(Default)]
struct Delegation {
    flags: u32,
    kind: u16,
    pad: u16,
}

/// The fields of `siginfo_t` that a signal set by `F_SETSIG` fills (`_sigpoll` in
/// <asm-generic/siginfo.h>).
#[repr(C)]
#[derive(Clone, Copy)]
struct SigPoll {
    signo: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    #[cfg(target_pointer_width = "64")]
    pad: libc::c_int,
    band: libc::c_long,
    fd: libc::c_int,
}

const _: () = assert!(size_of::<SigPoll>() <= size_of::<libc::siginfo_t>());
const _: () = assert!(size_of::<Delegation>() == 8);

/// What a lease or delegation allows, or what a break asks for (fcntl(2), `F_GETLEASE`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum LeaseType {
    /// `F_RDLCK`
    Read,
    /// `F_WRLCK`
    Write,
    /// `F_UNLCK`
    None,
}

impl LeaseType {
    fn raw(self) -> libc::c_int {
        match self {
            LeaseType::Read => libc::F_RDLCK,
            LeaseType::Write => libc::F_WRLCK,
            LeaseType::None => libc::F_UNLCK,
        }
    }

    fn from_raw(raw: libc::c_int) -> Self {
        match raw {
            libc::F_RDLCK => LeaseType::Read,
            libc::F_WRLCK => LeaseType::Write,
            _ => LeaseType::None,
        }
    }
}

fn pass(call: &'static str) -> io::Result<()> {
    door::pass(call)
}

fn fcntl_int(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    arg: libc::c_int,
) -> io::Result<libc::c_int> {
    // SAFETY: `fd` is open for the call, and every command passed here takes an int or nothing.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, arg) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// `F_SETLEASE`, fcntl(2).
pub(crate) fn lease_set(fd: BorrowedFd<'_>, kind: LeaseType) -> io::Result<()> {
    if kind != LeaseType::None {
        pass("fcntl(F_SETLEASE)")?;
    }
    fcntl_int(fd, libc::F_SETLEASE, kind.raw()).map(drop)
}

/// `F_GETLEASE`, fcntl(2): during a break, what the break asks for. Applies an expiry that is due.
pub(crate) fn lease_get(fd: BorrowedFd<'_>) -> io::Result<LeaseType> {
    pass("fcntl(F_GETLEASE)")?;
    fcntl_int(fd, libc::F_GETLEASE, 0).map(LeaseType::from_raw)
}

/// `F_SETDELEG`, F_SETDELEG(2const), Linux 6.19. `EINVAL` on older kernels.
pub(crate) fn delegation_set(fd: BorrowedFd<'_>, kind: LeaseType) -> io::Result<()> {
    if kind != LeaseType::None {
        pass("fcntl(F_SETDELEG)")?;
    }
    let mut arg = Delegation { kind: kind.raw() as u16, ..Delegation::default() };
    // SAFETY: `fd` is open for the call and `arg` is a live struct of the layout it expects.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETDELEG, &raw mut arg) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `F_GETDELEG`: as [`lease_get`], for a delegation.
pub(crate) fn delegation_get(fd: BorrowedFd<'_>) -> io::Result<LeaseType> {
    pass("fcntl(F_GETDELEG)")?;
    let mut arg = Delegation::default();
    // SAFETY: `fd` is open for the call and `arg` is a live, writable struct of its layout.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETDELEG, &raw mut arg) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(LeaseType::from_raw(arg.kind.into()))
    }
}

/// `struct fsxattr` of <linux/fs.h>.
#[repr(C)]
#[derive(Default)]
struct Fsxattr {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    pad: [u8; 8],
}

const _: () = assert!(size_of::<Fsxattr>() == 28);

const FS_IOC_FSGETXATTR: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
const FS_IOC_FSSETXATTR: libc::Ioctl = 0x401c_5820;
const FS_XFLAG_DAX: u32 = 0x8000;

/// Sets `FS_XFLAG_DAX` (ioctl_xfs_fsgetxattr(2)). The file system heeds it, if at all, from the
/// moment that it reads the inode anew.
pub(crate) fn ask_for_dax(fd: BorrowedFd<'_>) -> io::Result<()> {
    pass("ioctl(FS_IOC_FSSETXATTR)")?;
    let mut attributes = Fsxattr::default();
    // SAFETY: `fd` is open for the call and `attributes` is a live struct of the layout expected.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.flags |= FS_XFLAG_DAX;
    // SAFETY: as above.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FSSETXATTR, &raw const attributes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A piece of a file on its medium, in bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Extent {
    /// Where in the file.
    pub(crate) logical: u64,
    /// Where on the medium.
    pub(crate) physical: u64,
    /// How long.
    pub(crate) len: u64,
}

/// `struct fiemap_extent` of <linux/fiemap.h>.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    len: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

const EXTENTS_AT_ONCE: usize = 256;

/// `struct fiemap`, with room for extents.
#[repr(C)]
struct Fiemap {
    start: u64,
    len: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS_AT_ONCE],
}

const _: () = assert!(size_of::<FiemapExtent>() == 56);

const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b_u32 as libc::Ioctl;
const FIEMAP_EXTENT_LAST: u32 = 0x1;
/// UNKNOWN, DELALLOC, ENCODED, NOT_ALIGNED, INLINE and TAIL: their place means nothing.
const FIEMAP_EXTENT_NO_PLACE: u32 = 0x2 | 0x4 | 0x8 | 0x100 | 0x200 | 0x400;

/// `FS_IOC_FIEMAP`: the file's extents that have a place, in order.
pub(crate) fn extents(fd: BorrowedFd<'_>) -> io::Result<Vec<Extent>> {
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let piece = fiemap(fd, start)?;
        for extent in &piece {
            if extent.flags & FIEMAP_EXTENT_NO_PLACE == 0 {
                let FiemapExtent { logical, physical, len, .. } = *extent;
                found.push(Extent { logical, physical, len });
            }
        }
        match piece.last() {
            Some(last) if last.flags & FIEMAP_EXTENT_LAST == 0 => start = last.logical + last.len,
            _ => return Ok(found),
        }
    }
}

fn fiemap(fd: BorrowedFd<'_>, start: u64) -> io::Result<Vec<FiemapExtent>> {
    pass("ioctl(FS_IOC_FIEMAP)")?;
    let mut map = Fiemap {
        start,
        len: u64::MAX - start,
        flags: 0,
        mapped: 0,
        room: EXTENTS_AT_ONCE as u32,
        reserved: 0,
        extents: [FiemapExtent::default(); EXTENTS_AT_ONCE],
    };
    // SAFETY: `fd` is open for the call, `map` is a live struct of the layout that the request
    // expects, and `room` says how many extents it has space for.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(map.extents[..(map.mapped as usize).min(EXTENTS_AT_ONCE)].to_vec())
}

/// `F_SETSIG`: which signal a break sends. Must come again after each `F_UNLCK` or expiry, which
/// wipe it; without it the break sends SIGIO, whose default action ends the process.
pub(crate) fn signal_set(fd: BorrowedFd<'_>, signal: libc::c_int) -> io::Result<()> {
    pass("fcntl(F_SETSIG)")?;
    fcntl_int(fd, F_SETSIG, signal).map(drop)
}

/// `F_GETSIG`: 0 once the kernel has taken the lease away.
pub(crate) fn signal_get(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    fcntl_int(fd, F_GETSIG, 0)
}

/// `F_SETOWN_EX` with `F_OWNER_TID`: the signal goes to this one thread.
pub(crate) fn owner_set(fd: BorrowedFd<'_>, thread: libc::pid_t) -> io::Result<()> {
    pass("fcntl(F_SETOWN_EX)")?;
    let owner = OwnerEx { kind: F_OWNER_TID, pid: thread };
    // SAFETY: `fd` is open for the call and `owner` is a live struct of the layout it expects.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The real-time signal that breaks come by. The highest ones are the least used, and the signal
/// is sent to the watcher thread alone.
pub(crate) static BREAK_SIGNAL: LazyLock<libc::c_int> = LazyLock::new(|| libc::SIGRTMAX() - 7);

/// A signal set of every signal that the watcher waits for.
pub(crate) struct WatchedSignals(libc::sigset_t);

impl WatchedSignals {
    /// Blocks *all* signals in the calling thread and returns the set to wait for: the break
    /// signal, and SIGIO, which the kernel falls back to when its queue is full.
    pub(crate) fn block_in_this_thread() -> io::Result<Self> {
        let mut all = empty_set();
        // SAFETY: `all` is an initialised set.
        unsafe { libc::sigfillset(&raw mut all) };
        // SAFETY: `all` is an initialised set; a null old set is allowed (pthread_sigmask(3)).
        let error = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut())
        };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        let mut watched = empty_set();
        for signal in [*BREAK_SIGNAL, libc::SIGIO] {
            // SAFETY: `watched` is an initialised set and both numbers are valid signals.
            unsafe { libc::sigaddset(&raw mut watched, signal) };
        }
        Ok(Self(watched))
    }

    /// Waits for one of the signals; `Timeout` after `patience`.
    pub(crate) fn wait(&self, patience: Duration) -> io::Result<Signal> {
        let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
        let timeout = libc::timespec {
            tv_sec: patience.as_secs() as libc::time_t,
            tv_nsec: patience.subsec_nanos().into(),
        };
        // SAFETY: the set is initialised, `info` is writable, `timeout` is a live timespec.
        let signal =
            unsafe { libc::sigtimedwait(&raw const self.0, info.as_mut_ptr(), &raw const timeout) };
        if signal < 0 {
            let error = io::Error::last_os_error();
            return match error.raw_os_error() {
                Some(libc::EAGAIN) => Ok(Signal::Timeout),
                Some(libc::EINTR) => Ok(Signal::Other),
                _ => Err(error),
            };
        }
        // SAFETY: `info` is zeroed or filled by the kernel, at least as large as `SigPoll`, and
        // aligned for it (asserted above); all bit patterns are valid.
        let poll = unsafe { info.as_ptr().cast::<SigPoll>().read() };
        Ok(match (signal, poll.code) {
            (libc::SIGIO, _) => Signal::Overflow,
            // SI_USER, SI_QUEUE and SI_TKILL are not positive: a wake-up, not a break.
            (_, code) if code <= 0 => Signal::Other,
            _ => Signal::Break(poll.fd),
        })
    }
}

/// What ended a wait.
pub(crate) enum Signal {
    /// A break of the lease on this descriptor.
    Break(RawFd),
    /// The signal queue was full: any lease may be broken.
    Overflow,
    /// Nothing came.
    Timeout,
    /// A wake-up.
    Other,
}

fn empty_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `set` is writable; sigemptyset can't fail on a valid pointer.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: sigemptyset initialised it.
    unsafe { set.assume_init() }
}

/// The calling thread's id (gettid(2)).
pub(crate) fn thread_id() -> libc::pid_t {
    nix::unistd::gettid().as_raw()
}

/// Wakes a thread of this process that waits in [`WatchedSignals::wait`].
pub(crate) fn wake_thread(thread: libc::pid_t) {
    // SAFETY: tgkill takes three integers; a thread that is gone yields ESRCH, which is harmless.
    unsafe {
        libc::syscall(libc::SYS_tgkill, std::process::id() as libc::pid_t, thread, *BREAK_SIGNAL)
    };
}

/// Reserves `len` bytes of addresses that nothing can touch.
pub(crate) fn reserve(len: std::num::NonZeroUsize) -> io::Result<NonNull<u8>> {
    pass("mmap")?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice disturbs nothing.
    let address = unsafe {
        nix::sys::mman::mmap_anonymous(
            None,
            len,
            ProtFlags::PROT_NONE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE,
        )
    }?;
    Ok(address.cast())
}

/// Maps `len` bytes of a file from offset 0, at `place` if nothing is there, else at addresses of the
/// kernel's choice. (`MAP_FIXED_NOREPLACE` is not for `MAP_SHARED_VALIDATE`: EOPNOTSUPP, since
/// `LEGACY_MAP_MASK` lacks it.)
pub(crate) fn map_near(
    place: NonNull<u8>,
    len: std::num::NonZeroUsize,
    flags: MapFlags,
    fd: BorrowedFd<'_>,
) -> io::Result<NonNull<u8>> {
    pass("mmap")?;
    let place = Some(place.addr());
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping that replaces nothing disturbs nothing.
    let address = unsafe { nix::sys::mman::mmap(place, len, protection, flags, fd, 0) }?;
    Ok(address.cast())
}

/// Maps `len` bytes of a file from offset 0 for reading, at addresses of the kernel's choice.
pub(crate) fn map_for_reading(
    len: std::num::NonZeroUsize,
    fd: BorrowedFd<'_>,
) -> io::Result<NonNull<u8>> {
    pass("mmap")?;
    // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
    let address = unsafe {
        nix::sys::mman::mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, fd, 0)
    }?;
    Ok(address.cast())
}

/// Copies from a mapping into `to` (process_vm_writev(2) on ourselves), and says how much came until
/// a byte could not be read.
///
/// The kernel reads the mapping as the caller's own memory and writes to `to` as to another
/// process's. So a page that is gone, or inaccessible, is EFAULT and not SIGBUS, and a read error of
/// the medium too: of its own reads of user memory the kernel survives those (x86's
/// `EX_TYPE_UACCESS`). The other way round it would not.
///
/// # Safety
/// `from..from + to.len()` must be the caller's own mapping, and `to` no part of it.
pub(crate) unsafe fn copy_out(from: NonNull<u8>, to: &mut [u8]) -> io::Result<usize> {
    let mapping = libc::iovec { iov_base: from.as_ptr().cast(), iov_len: to.len() };
    let memory = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let me = std::process::id() as libc::pid_t;
    pass("process_vm_writev")?;
    // SAFETY: both ranges are the caller's, and only `to` is written, which is borrowed for it.
    let done =
        unsafe { libc::process_vm_writev(me, &raw const mapping, 1, &raw const memory, 1, 0) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Copies `from` into a mapping (process_vm_readv(2) on ourselves), as [`copy_out`].
///
/// # Safety
/// `to..to + from.len()` must be the caller's own mapping of a file, with no reference into it.
pub(crate) unsafe fn copy_in(to: NonNull<u8>, from: &[u8]) -> io::Result<usize> {
    let mapping = libc::iovec { iov_base: to.as_ptr().cast(), iov_len: from.len() };
    let memory = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let me = std::process::id() as libc::pid_t;
    pass("process_vm_readv")?;
    // SAFETY: both ranges are the caller's, and only the mapping is written.
    let done =
        unsafe { libc::process_vm_readv(me, &raw const mapping, 1, &raw const memory, 1, 0) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Bytes of a cache line, of every x86-64 processor.
#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;

/// Writes the cache lines of a range back to the medium (CLFLUSH, which every x86-64 has), whatever
/// address they were written by, and waits until they are on their way (MFENCE).
///
/// # Safety
/// The lines must be the caller's own mapping, and readable: a fault is a signal here.
#[cfg(target_arch = "x86_64")]
pub(crate) unsafe fn write_back(address: NonNull<u8>, len: usize) {
    let head = address.as_ptr() as usize % CACHE_LINE;
    // SAFETY: a line does not cross a page, so the first one starts in the caller's mapping.
    let first = unsafe { address.sub(head) };
    for offset in (0..head + len).step_by(CACHE_LINE) {
        // SAFETY: the offset is below the end of what the caller has vouched for.
        let line = unsafe { first.add(offset) };
        // SAFETY: the line is mapped and readable, as demanded; its content stays.
        unsafe { core::arch::x86_64::_mm_clflush(line.as_ptr()) };
    }
    // SAFETY: MFENCE is in every x86-64.
    unsafe { core::arch::x86_64::_mm_mfence() };
}

/// Elsewhere nothing is promised: see [`MappingKind::can_be_durable`](crate::MappingKind).
///
/// # Safety
/// None.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn write_back(_address: NonNull<u8>, _len: usize) {}

/// munmap(2).
///
/// # Safety
/// The range must be the caller's own mapping and nothing may use it any more, hardware included.
pub(crate) unsafe fn unmap(address: NonNull<u8>, len: usize) -> io::Result<()> {
    pass("munmap")?;
    // SAFETY: demanded of the caller.
    unsafe { nix::sys::mman::munmap(address.cast(), len) }?;
    Ok(())
}

/// `mprotect(PROT_NONE)`: every access faults from the moment this returns.
///
/// # Safety
/// The range must be the caller's own mapping, and no reference into it may exist.
pub(crate) unsafe fn make_inaccessible(address: NonNull<u8>, len: usize) -> io::Result<()> {
    pass("mprotect")?;
    // SAFETY: demanded of the caller.
    unsafe { nix::sys::mman::mprotect(address.cast(), len, ProtFlags::PROT_NONE) }?;
    Ok(())
}

/// madvise(2) with advice that changes no content.
///
/// # Safety
/// The range must be the caller's own mapping, and `advice` must not discard pages.
pub(crate) unsafe fn advise(
    address: NonNull<u8>,
    len: usize,
    advice: MmapAdvise,
) -> io::Result<()> {
    pass("madvise")?;
    // SAFETY: demanded of the caller.
    unsafe { nix::sys::mman::madvise(address.cast(), len, advice) }?;
    Ok(())
}

/// msync(2) with `MS_SYNC`: what was stored in the range is on the medium when this returns.
///
/// # Safety
/// The range must be the caller's own mapping.
pub(crate) unsafe fn sync(address: NonNull<u8>, len: usize) -> io::Result<()> {
    pass("msync")?;
    // SAFETY: demanded of the caller; MS_SYNC neither discards nor moves pages.
    unsafe { nix::sys::mman::msync(address.cast(), len, MsFlags::MS_SYNC) }?;
    Ok(())
}
