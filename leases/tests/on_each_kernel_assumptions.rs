//! What this crate takes for granted about the kernel, each with its number in docs/guarantees.md.
//! A kernel that changes one turns one test red. They need root, DAX file systems and old and new
//! kernels, so the lab runs them: `cargo xtask vm test assumptions`.
//!
//! Breakers are threads of this process: to the kernel a lease has no friends.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, Mode, OFlags};

// <linux/fcntl.h>; libc has none of these for linux-gnu.
const F_SETSIG: libc::c_int = 10;
const F_GETSIG: libc::c_int = 11;
const F_SETOWN_EX: libc::c_int = 15;
const F_GETOWN_EX: libc::c_int = 16;
const F_GETDELEG: libc::c_int = 1039;
const F_SETDELEG: libc::c_int = 1040;
/// `POLL_MSG`, what a break's signal says of itself.
const POLL_MSG: libc::c_int = 3;

/// Far beyond anything that works; only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(60);
const LEN: u64 = 64 << 10;
const LEASE_BREAK_TIME: &str = "/proc/sys/fs/lease-break-time";

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

#[repr(C)]
#[derive(Default)]
struct Delegation {
    flags: u32,
    kind: u16,
    pad: u16,
}

/// A file that this thread may hold by a lease or a delegation.
struct Held {
    fd: OwnedFd,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

/// A signal as it came.
#[derive(Debug, Eq, PartialEq)]
struct Came {
    signal: libc::c_int,
    code: libc::c_int,
    fd: libc::c_int,
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
    result.expect_err("it should fail").raw_os_error()
}

fn break_signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

impl Held {
    fn new(place: &Path) -> Self {
        block_signals();
        let folder = tempfile::tempdir_in(place).unwrap();
        let path = folder.path().join("file");
        fs::write(&path, vec![b'x'; LEN as usize]).unwrap();
        let fd = open(&path, OFlags::RDWR).unwrap();
        Self { fd, path, _folder: folder }
    }

    fn int(&self, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: the descriptor is open, and each command used here takes an int or nothing.
        checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), command, argument) })
    }

    /// Names signal and thread.
    fn prepare(&self) {
        self.int(F_SETSIG, break_signal()).unwrap();
        let owner = OwnerEx { kind: 0, pid: nix::unistd::gettid().as_raw() };
        // SAFETY: the descriptor is open and the struct of the layout that the command reads.
        checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), F_SETOWN_EX, &raw const owner) })
            .unwrap();
    }

    fn owner(&self) -> OwnerEx {
        let mut owner = OwnerEx::default();
        // SAFETY: the descriptor is open and the struct of the layout that the command writes.
        checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) }).unwrap();
        owner
    }

    fn set_lease(&self, kind: libc::c_int) -> io::Result<()> {
        self.int(libc::F_SETLEASE, kind).map(drop)
    }

    fn lease(&self) -> libc::c_int {
        self.int(libc::F_GETLEASE, 0).unwrap()
    }

    fn set_delegation(&self, kind: libc::c_int) -> io::Result<()> {
        let give_up = Instant::now() + DEADLINE;
        loop {
            let mut argument = Delegation { kind: kind as u16, ..Delegation::default() };
            // SAFETY: the descriptor is open and the struct of the layout that the command reads.
            let set =
                checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), F_SETDELEG, &raw mut argument) });
            // The inode's lock may be busy for a moment.
            match set {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && Instant::now() < give_up => {}
                set => return set.map(drop),
            }
        }
    }

    fn delegation(&self) -> libc::c_int {
        let mut argument = Delegation::default();
        // SAFETY: the descriptor is open and the struct of the layout that the command writes.
        checked(unsafe { libc::fcntl(self.fd.as_raw_fd(), F_GETDELEG, &raw mut argument) })
            .unwrap();
        argument.kind.into()
    }

    /// Armed by a lease, with a signal to this thread.
    fn leased(place: &Path) -> Self {
        let held = Self::new(place);
        held.prepare();
        held.set_lease(libc::F_WRLCK).unwrap();
        held
    }

    /// The same by a delegation; none where the kernel has none.
    fn delegated(place: &Path) -> Option<Self> {
        let held = Self::new(place);
        held.prepare();
        match held.set_delegation(libc::F_WRLCK) {
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                assert!(kernel() < (6, 19), "{e}");
                None
            }
            set => set.map(|()| Some(held)).unwrap(),
        }
    }

    fn size(&self) -> u64 {
        rustix::fs::fstat(&self.fd).unwrap().st_size as u64
    }

    fn opens(&self, flags: OFlags) -> Receiver<io::Result<()>> {
        let path = self.path.clone();
        begins(move || open(&path, flags).map(drop))
    }

    fn truncates(&self) -> Receiver<io::Result<()>> {
        let path = self.path.clone();
        begins(move || Ok(nix::unistd::truncate(&path, 0)?))
    }

    /// Waits until somebody waits for this file, as /proc/locks shows.
    fn is_waited_for(&self) {
        let inode = format!(":{} ", rustix::fs::fstat(&self.fd).unwrap().st_ino);
        let give_up = Instant::now() + DEADLINE;
        loop {
            let locks = fs::read_to_string("/proc/locks").unwrap();
            let mut lines = locks.lines().skip_while(|line| !line.contains(&inode)).skip(1);
            if lines.next().is_some_and(|line| line.contains("->")) {
                return;
            }
            assert!(Instant::now() < give_up, "nobody waits for {}:\n{locks}", self.path.display());
            std::thread::yield_now();
        }
    }
}

fn open(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// Does something that may have to wait, in a thread.
fn begins(what: impl FnOnce() -> io::Result<()> + Send + 'static) -> Receiver<io::Result<()>> {
    let (done, ended) = channel();
    std::thread::spawn(move || {
        block_signals();
        let _ = done.send(what());
    });
    ended
}

fn ends(ended: &Receiver<io::Result<()>>) -> io::Result<()> {
    ended.recv_timeout(DEADLINE).expect("it hangs")
}

fn has_not_ended(ended: &Receiver<io::Result<()>>) -> bool {
    ended.try_recv().is_err()
}

fn signal_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is writable.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in [break_signal(), libc::SIGIO] {
        // SAFETY: the set is initialised and the signal is one.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: sigemptyset has initialised it.
    unsafe { set.assume_init() }
}

fn block_signals() {
    let set = signal_set();
    // SAFETY: an initialised set; a null old set is allowed.
    let error =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    assert_eq!(error, 0);
}

/// The next signal of this thread within `patience`.
fn signal_within(patience: Duration) -> Option<Came> {
    let set = signal_set();
    let time = libc::timespec {
        tv_sec: patience.as_secs() as libc::time_t,
        tv_nsec: patience.subsec_nanos().into(),
    };
    let mut info = std::mem::MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: an initialised set, writable info, a live timespec.
    let signal = unsafe { libc::sigtimedwait(&raw const set, info.as_mut_ptr(), &raw const time) };
    if signal < 0 {
        return None;
    }
    // SAFETY: the kernel has filled it, and it was zeroed before.
    let info = unsafe { info.assume_init() };
    // `si_fd` of `_sigpoll`: behind three ints, padding and a long.
    // SAFETY: siginfo_t has 128 bytes on Linux, and every bit pattern is an int.
    let fd = unsafe { (&raw const info).cast::<libc::c_int>().wrapping_add(6).read() };
    Some(Came { signal, code: info.si_code, fd })
}

fn next_signal() -> Came {
    signal_within(DEADLINE).expect("no signal came")
}

/// Nothing is on its way: to be asked once the breaker waits or has ended, as the signal comes first.
fn no_signal() -> bool {
    signal_within(Duration::ZERO).is_none()
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set: run in the lab")).into()
}

fn dax_places() -> [PathBuf; 2] {
    ["PINFOLD_LAB_EXT4", "PINFOLD_LAB_XFS"].map(variable)
}

fn places() -> [PathBuf; 3] {
    ["PINFOLD_LAB_EXT4", "PINFOLD_LAB_XFS", "TMPDIR"].map(variable)
}

/// Major and minor number.
fn kernel() -> (u32, u32) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// Another lease-break-time, until it is dropped.
struct BreakTime(String);

impl BreakTime {
    fn seconds(seconds: i32) -> Self {
        let before = fs::read_to_string(LEASE_BREAK_TIME).unwrap();
        fs::write(LEASE_BREAK_TIME, seconds.to_string()).unwrap();
        Self(before)
    }
}

impl Drop for BreakTime {
    fn drop(&mut self) {
        fs::write(LEASE_BREAK_TIME, &self.0).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a01_a_write_lease_is_granted_to_the_only_open_description() {
    for place in places() {
        let held = Held::new(&place);
        let map = memmap2::MmapOptions::new().map_raw(&held.fd).unwrap();
        held.set_lease(libc::F_WRLCK).unwrap();
        held.set_lease(libc::F_UNLCK).unwrap();
        drop(map);

        let same = held.fd.try_clone().unwrap();
        held.set_lease(libc::F_WRLCK).expect("a duplicate is the same description");
        held.set_lease(libc::F_UNLCK).unwrap();
        drop(same);

        let named = open(&held.path, OFlags::PATH).unwrap();
        held.set_lease(libc::F_WRLCK).expect("a name opens nothing");
        held.set_lease(libc::F_UNLCK).unwrap();
        drop(named);

        for flags in [OFlags::RDONLY, OFlags::WRONLY] {
            let other = open(&held.path, flags).unwrap();
            assert_eq!(errno(held.set_lease(libc::F_WRLCK)), Some(libc::EAGAIN), "{flags:?}");
            drop(other);
        }
        let other = open(&held.path, OFlags::RDWR).unwrap();
        let map = memmap2::MmapOptions::new().map_raw(&other).unwrap();
        drop(other);
        assert_eq!(errno(held.set_lease(libc::F_WRLCK)), Some(libc::EAGAIN), "a mapping is left");
        drop(map);
        held.set_lease(libc::F_WRLCK).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a02_a_writable_description_gets_no_read_lease() {
    for place in places() {
        let held = Held::new(&place);
        assert_eq!(errno(held.set_lease(libc::F_RDLCK)), Some(libc::EAGAIN));
        held.set_lease(libc::F_WRLCK).unwrap();
        assert_eq!(errno(held.set_lease(libc::F_RDLCK)), Some(libc::EAGAIN));
        assert_eq!(held.lease(), libc::F_WRLCK, "and keeps what it has");
    }
}

#[test]
#[ignore = "needs the lab"]
fn a03_a_break_is_signalled_with_its_descriptor_while_the_file_is_whole() {
    for place in places() {
        for (breaker, told) in [(OFlags::RDONLY, libc::F_RDLCK), (OFlags::WRONLY, libc::F_UNLCK)] {
            let held = Held::leased(&place);
            let ended = held.opens(breaker);
            let fd = held.fd.as_raw_fd();
            let came = Came { signal: break_signal(), code: POLL_MSG, fd };
            assert_eq!(next_signal(), came);
            assert_eq!(held.lease(), told, "F_GETLEASE says what the breaker wants");
            held.is_waited_for();
            assert!(has_not_ended(&ended));
            held.set_lease(libc::F_UNLCK).unwrap();
            ends(&ended).unwrap();
        }
        let held = Held::leased(&place);
        let ended = held.truncates();
        next_signal();
        assert_eq!(held.lease(), libc::F_UNLCK);
        held.is_waited_for();
        assert!(has_not_ended(&ended));
        assert_eq!(held.size(), LEN);
        held.set_lease(libc::F_UNLCK).unwrap();
        ends(&ended).unwrap();
        assert_eq!(held.size(), 0);
    }
}

#[test]
#[ignore = "needs the lab"]
fn a04_unlocking_wipes_signal_and_owner() {
    for place in places() {
        let held = Held::leased(&place);
        held.set_lease(libc::F_UNLCK).unwrap();
        assert_eq!(held.int(F_GETSIG, 0).unwrap(), 0);
        assert_eq!(held.owner().pid, 0);
    }
}

#[test]
#[ignore = "needs the lab"]
fn a05_arming_over_a_pending_break_succeeds_and_is_deaf() {
    for place in places() {
        let held = Held::leased(&place);
        let passer_by = OFlags::WRONLY | OFlags::NONBLOCK;
        assert_eq!(errno(ends(&held.opens(passer_by))), Some(libc::EAGAIN));
        next_signal();
        held.set_lease(libc::F_WRLCK).expect("it pretends");
        assert_eq!(held.lease(), libc::F_UNLCK, "and goes on breaking");
        assert_eq!(errno(ends(&held.opens(passer_by))), Some(libc::EAGAIN));
        assert!(no_signal(), "the second breaker is not told of");
        held.set_lease(libc::F_UNLCK).unwrap();
        // In the right order the next break is heard.
        held.prepare();
        held.set_lease(libc::F_WRLCK).unwrap();
        let third = held.truncates();
        next_signal();
        held.set_lease(libc::F_UNLCK).unwrap();
        ends(&third).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a06_a_nonblocking_breaker_is_sent_away_and_breaks_all_the_same() {
    for place in places() {
        let held = Held::leased(&place);
        let ended = held.opens(OFlags::WRONLY | OFlags::NONBLOCK);
        assert_eq!(errno(ends(&ended)), Some(libc::EAGAIN));
        next_signal();
        assert_eq!(held.lease(), libc::F_UNLCK);
        held.set_lease(libc::F_UNLCK).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a07_the_holder_may_change_the_size_under_a_lease() {
    for place in places() {
        let held = Held::leased(&place);
        rustix::fs::ftruncate(&held.fd, LEN / 2).unwrap();
        rustix::fs::fallocate(&held.fd, FallocateFlags::empty(), 0, LEN).unwrap();
        assert_eq!((held.size(), held.lease()), (LEN, libc::F_WRLCK));
        assert!(no_signal());
    }
}

#[test]
#[ignore = "needs the lab"]
fn a08_under_a_delegation_the_holder_may_allocate_but_not_truncate() {
    for place in places() {
        let Some(held) = Held::delegated(&place) else { return };
        rustix::fs::fallocate(&held.fd, FallocateFlags::empty(), 0, 2 * LEN).unwrap();
        rustix::fs::fsync(&held.fd).unwrap();
        rustix::io::pwrite(&held.fd, b"x", 0).unwrap();
        assert_eq!((held.size(), held.delegation()), (2 * LEN, libc::F_WRLCK));
        assert!(no_signal());
        let own = rustix::fs::ftruncate(&held.fd, LEN);
        assert_eq!(own, Err(rustix::io::Errno::AGAIN), "it waits for nobody, and breaks its own");
        next_signal();
        assert_eq!(held.size(), 2 * LEN);
        held.set_delegation(libc::F_UNLCK).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a09_a_delegation_is_not_seen_by_f_getlease_and_stands_alone() {
    for place in places() {
        let Some(held) = Held::delegated(&place) else { return };
        assert_eq!((held.lease(), held.delegation()), (libc::F_UNLCK, libc::F_WRLCK));
        held.set_lease(libc::F_WRLCK).expect("it pretends");
        assert_eq!((held.lease(), held.delegation()), (libc::F_UNLCK, libc::F_WRLCK));
        held.set_delegation(libc::F_UNLCK).unwrap();
        held.prepare();
        held.set_lease(libc::F_WRLCK).unwrap();
        assert_eq!((held.lease(), held.delegation()), (libc::F_WRLCK, libc::F_UNLCK));
    }
}

#[test]
#[ignore = "needs the lab"]
fn a10_an_old_mapping_keeps_others_out_but_not_its_own_description() {
    for place in places() {
        let held = Held::leased(&place);
        let map = memmap2::MmapOptions::new().map_raw(&held.fd).unwrap();
        held.set_lease(libc::F_UNLCK).unwrap();
        held.set_lease(libc::F_WRLCK).expect("the same description may be armed again");
        held.set_lease(libc::F_UNLCK).unwrap();
        let Held { fd, path, _folder } = held;
        drop(fd);
        let fresh = Held { fd: open(&path, OFlags::RDWR).unwrap(), path, _folder };
        assert_eq!(errno(fresh.set_lease(libc::F_WRLCK)), Some(libc::EAGAIN));
        drop(map);
        fresh.set_lease(libc::F_WRLCK).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a11_only_dax_takes_map_sync() {
    let map = |held: &Held| {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                LEN as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC,
                held.fd.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the mapping just made, which nothing refers to.
        checked(unsafe { libc::munmap(address, LEN as usize) }).map(drop)
    };
    for place in dax_places() {
        map(&Held::new(&place)).unwrap();
    }
    let tmpfs = Held::new(&variable("TMPDIR"));
    assert_eq!(errno(map(&tmpfs)), Some(libc::EOPNOTSUPP));
}

#[test]
#[ignore = "needs the lab"]
fn a12_a_mapping_may_reach_past_the_end_and_is_populated_up_to_it() {
    for place in places() {
        let held = Held::new(&place);
        let len = 4 * LEN as usize;
        let map = memmap2::MmapOptions::new().len(len).map_raw(&held.fd).unwrap();
        let populate = |len: usize| {
            // SAFETY: our own mapping; this advice changes no content.
            checked(unsafe {
                libc::madvise(map.as_mut_ptr().cast(), len, libc::MADV_POPULATE_WRITE)
            })
        };
        populate(LEN as usize).unwrap();
        assert_eq!(errno(populate(len)), Some(libc::EFAULT));
        rustix::fs::fallocate(&held.fd, FallocateFlags::empty(), 0, len as u64).unwrap();
        populate(len).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a13_a_full_signal_queue_falls_back_to_sigio_without_a_descriptor() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let before = getrlimit(Resource::RLIMIT_SIGPENDING).unwrap();
    let held = Held::leased(&variable("TMPDIR"));
    setrlimit(Resource::RLIMIT_SIGPENDING, 0, before.1).unwrap();
    let ended = held.truncates();
    held.is_waited_for();
    let came = next_signal();
    setrlimit(Resource::RLIMIT_SIGPENDING, before.0, before.1).unwrap();
    assert_eq!(came.signal, libc::SIGIO);
    held.set_lease(libc::F_UNLCK).unwrap();
    ends(&ended).unwrap();
}

#[test]
#[ignore = "needs the lab"]
fn a14_expiry_lets_a_writer_through_and_wipes_the_lease() {
    let _time = BreakTime::seconds(1);
    for place in places() {
        let held = Held::leased(&place);
        ends(&held.truncates()).unwrap();
        next_signal();
        assert_eq!((held.size(), held.lease()), (0, libc::F_UNLCK));
        assert_eq!((held.int(F_GETSIG, 0).unwrap(), held.owner().pid), (0, 0));
    }
}

#[test]
#[ignore = "needs the lab"]
fn a15_expiry_leaves_a_read_lease_to_who_outwaits_a_reader() {
    let _time = BreakTime::seconds(1);
    for place in places() {
        let held = Held::leased(&place);
        ends(&held.opens(OFlags::RDONLY)).unwrap();
        next_signal();
        assert_eq!(held.lease(), libc::F_RDLCK);
        ends(&held.opens(OFlags::RDONLY)).expect("later readers pass");
        assert!(no_signal());
        let writer = held.truncates();
        next_signal();
        held.is_waited_for();
        assert_eq!(held.lease(), libc::F_UNLCK);
        held.set_lease(libc::F_UNLCK).unwrap();
        ends(&writer).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a16_expiry_opens_the_hole_of_o_rdonly_o_trunc_in_a_lease() {
    let _time = BreakTime::seconds(1);
    for place in places() {
        let held = Held::leased(&place);
        ends(&held.opens(OFlags::RDONLY)).unwrap();
        next_signal();
        ends(&held.opens(OFlags::RDONLY | OFlags::TRUNC)).unwrap();
        assert!(no_signal(), "it passes for a reader");
        assert_eq!((held.size(), held.lease()), (0, libc::F_RDLCK));
    }
}

#[test]
#[ignore = "needs the lab"]
fn a17_expiry_leaves_no_such_hole_in_a_delegation() {
    let _time = BreakTime::seconds(1);
    for place in places() {
        let Some(held) = Held::delegated(&place) else { return };
        ends(&held.opens(OFlags::RDONLY)).unwrap();
        next_signal();
        assert_eq!(held.delegation(), libc::F_RDLCK);
        let hole = held.opens(OFlags::RDONLY | OFlags::TRUNC);
        assert_eq!(errno(ends(&hole)), Some(libc::EAGAIN));
        next_signal();
        assert_eq!(held.size(), LEN);
        held.set_delegation(libc::F_UNLCK).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a18_expiry_to_a_read_delegation_can_not_be_taken_back_but_still_tells_of_writers() {
    let _time = BreakTime::seconds(1);
    for place in places() {
        let Some(held) = Held::delegated(&place) else { return };
        ends(&held.opens(OFlags::RDONLY)).unwrap();
        next_signal();
        held.set_delegation(libc::F_WRLCK).expect("it pretends");
        assert_eq!(held.delegation(), libc::F_RDLCK);
        let writer = held.truncates();
        next_signal();
        held.set_delegation(libc::F_UNLCK).unwrap();
        ends(&writer).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a19_expiry_never_comes_with_a_lease_break_time_of_zero() {
    let _time = BreakTime::seconds(0);
    let held = Held::leased(&variable("TMPDIR"));
    let ended = held.truncates();
    next_signal();
    held.is_waited_for();
    let waited = ended.recv_timeout(Duration::from_secs(3));
    assert!(waited.is_err(), "it went through: {waited:?}");
    assert_eq!(held.size(), LEN);
    held.set_lease(libc::F_UNLCK).unwrap();
    ends(&ended).unwrap();
}

#[test]
#[ignore = "needs the lab"]
fn a20_a_lease_lives_as_long_as_a_mapping_of_its_description() {
    for place in places() {
        let Held { fd, path, _folder } = Held::leased(&place);
        let map = memmap2::MmapOptions::new().map_raw(&fd).unwrap();
        let number = fd.as_raw_fd();
        drop(fd);
        let truncated = path.clone();
        let ended = begins(move || Ok(nix::unistd::truncate(&truncated, 0)?));
        assert_eq!(next_signal().fd, number, "by the number that is closed by now");
        assert!(has_not_ended(&ended));
        drop(map);
        ends(&ended).unwrap();
    }
}

#[test]
#[ignore = "needs the lab"]
fn a21_only_the_owner_or_cap_lease_may_set_one() {
    for place in places() {
        let held = Held::new(&place);
        std::os::unix::fs::fchown(&held.fd, Some(4711), None).unwrap();
        held.set_lease(libc::F_WRLCK).expect("root has CAP_LEASE");
        held.set_lease(libc::F_UNLCK).unwrap();
        let fd = held.fd.try_clone().unwrap();
        // Of this thread alone: the raw call, not libc's, which changes them all.
        let refused = std::thread::spawn(move || {
            // SAFETY: three integers.
            let set = unsafe { libc::syscall(libc::SYS_setresuid, 4712, 4712, 4712) };
            assert_eq!(set, 0);
            // SAFETY: the descriptor is open, and the command takes an int.
            checked(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) })
        });
        assert_eq!(errno(refused.join().unwrap()), Some(libc::EACCES));
    }
}

#[test]
#[ignore = "needs the lab"]
fn a22_the_append_only_flag_refuses_at_once_what_a_guard_would_hold() {
    for place in dax_places() {
        let held = Held::new(&place);
        let map = memmap2::MmapOptions::new().map_raw(&held.fd).unwrap();
        let flags = rustix::fs::ioctl_getflags(&held.fd).unwrap();
        rustix::fs::ioctl_setflags(&held.fd, flags | rustix::fs::IFlags::APPEND).unwrap();
        let eperm = Some(libc::EPERM);
        assert_eq!(errno(ends(&held.truncates())), eperm);
        assert_eq!(errno(ends(&held.opens(OFlags::WRONLY | OFlags::TRUNC))), eperm);
        assert_eq!(errno(ends(&held.opens(OFlags::RDWR))), eperm);
        assert_eq!(errno(fs::remove_file(&held.path)), eperm);
        assert_eq!(errno(fs::rename(&held.path, held.path.with_extension("new"))), eperm);
        assert_eq!(errno(fs::hard_link(&held.path, held.path.with_extension("new"))), eperm);
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let own = rustix::fs::fallocate(&held.fd, punch, 0, LEN);
        assert_eq!(own, Err(rustix::io::Errno::PERM), "through an older descriptor too");
        assert_eq!(rustix::fs::ftruncate(&held.fd, 0), Err(rustix::io::Errno::PERM));
        assert_eq!(fs::read(&held.path).unwrap().len() as u64, LEN, "readers pass");
        rustix::fs::ioctl_setflags(&held.fd, flags).unwrap();
        drop(map);
        File::options().write(true).truncate(true).open(&held.path).unwrap();
    }
}
