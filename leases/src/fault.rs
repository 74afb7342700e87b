//! The n-th system call fails, so that tests see what becomes of each failure. Compiled in for tests
//! and by the feature `mutants` alone.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::mapping::HUGE_PAGE;

/// The variable that names the socket for [`obey`] and [`Control`].
pub const VARIABLE: &str = "PINFOLD_FAULTS";
/// The variable that has a call fail before there is anybody to ask for it, as [`obey`] begins: `leases 3`.
pub const AT_START: &str = "PINFOLD_FAULTS_AT_START";
/// What is said of a call when it fails.
const TOLD: &str = "fault: no ";

/// The calls of this crate.
pub static LEASES: Seam = Seam::new();
/// The calls of the crate `pinfold-verbs`.
pub static VERBS: Seam = Seam::new();

/// Calls that are counted together, by all threads.
#[derive(Debug)]
pub struct Seam {
    /// How many more calls until one fails, that one included; 0: none will.
    left: AtomicU64,
    failed: Mutex<Option<&'static str>>,
}

/// Whether standard error is told of a call that fails: by a process that may have ended before anybody
/// can [`disarm`](Seam::disarm).
static ALOUD: AtomicBool = AtomicBool::new(false);

/// The call that a line of standard error is about.
pub fn told_in(line: &str) -> Option<&str> {
    line.strip_prefix(TOLD)
}

impl Seam {
    const fn new() -> Self {
        Self { left: AtomicU64::new(0), failed: Mutex::new(None) }
    }

    /// Of the calls from now on the `n`-th fails, and it alone; 0: none.
    pub fn arm(&self, n: u64) {
        *self.failed() = None;
        self.left.store(n, Ordering::SeqCst);
    }

    /// Lets all calls pass from now on. Which one has failed, if so many came since
    /// [`arm`](Self::arm).
    pub fn disarm(&self) -> Option<&'static str> {
        self.left.store(0, Ordering::SeqCst);
        *self.failed()
    }

    fn failed(&self) -> std::sync::MutexGuard<'_, Option<&'static str>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called right before a foreign call: fails in its place if it is its turn.
    pub fn pass<E: OfErrno>(&self, call: &'static str) -> Result<(), E> {
        if SPARED.get() {
            return Ok(());
        }
        let one_less = |left: u64| left.checked_sub(1);
        let is_last = self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) == Ok(1);
        if !is_last {
            return Ok(());
        }
        *self.failed() = Some(call);
        if ALOUD.load(Ordering::SeqCst) {
            eprintln!("{TOLD}{call}");
        }
        Err(E::of_errno(errno(call)))
    }
}

thread_local! {
    static SPARED: Cell<bool> = const { Cell::new(false) };
}

/// This thread's calls are not counted and never fail: it makes them by the clock, so that no run
/// would be like the other.
pub(crate) fn spare_this_thread() {
    SPARED.set(true);
}

/// Obeys a test in another process: makes the socket that `PINFOLD_FAULTS` names, if it does, and takes
/// lines there, on a thread of its own. See [`Control`], and [`AT_START`].
pub fn obey() -> io::Result<()> {
    ALOUD.store(true, Ordering::SeqCst);
    if let Ok(line) = std::env::var(AT_START) {
        obey_line(&line);
    }
    let Some(path) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let listener = UnixListener::bind(path)?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            // It ends with the other side.
            let _ = obey_lines(stream);
        }
    });
    Ok(())
}

fn obey_lines(mut stream: UnixStream) -> io::Result<()> {
    let lines = BufReader::new(stream.try_clone()?).lines();
    for line in lines {
        writeln!(stream, "{}", obey_line(&line?).unwrap_or_default())?;
    }
    Ok(())
}

/// With a number a seam is armed, without one disarmed: then which call has failed.
fn obey_line(line: &str) -> Option<&'static str> {
    let (name, n) = line.split_once(' ').unwrap_or((line, ""));
    let seam = if name == "verbs" { &VERBS } else { &LEASES };
    match n.parse() {
        Ok(n) => {
            seam.arm(n);
            None
        }
        Err(_) => seam.disarm(),
    }
}

/// A server's seams, as a test in another process has them in hand.
#[derive(Debug)]
pub struct Control(BufReader<UnixStream>);

impl Control {
    /// Of the server that was started last with this process's `PINFOLD_FAULTS`.
    pub fn connect() -> io::Result<Self> {
        let path = std::env::var_os(VARIABLE).ok_or(io::ErrorKind::NotFound)?;
        Self::connect_to(path.as_ref())
    }

    /// Of the server that was started with this path as its `PINFOLD_FAULTS`.
    pub fn connect_to(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).map(|stream| Self(BufReader::new(stream)))
    }

    /// As [`Seam::arm`], of `leases` or `verbs`.
    pub fn arm(&mut self, seam: &str, n: u64) -> io::Result<()> {
        self.ask(&format!("{seam} {n}")).map(drop)
    }

    /// As [`Seam::disarm`].
    pub fn disarm(&mut self, seam: &str) -> io::Result<Option<String>> {
        let failed = self.ask(seam)?;
        Ok(Some(failed).filter(|call| !call.is_empty()))
    }

    fn ask(&mut self, line: &str) -> io::Result<String> {
        writeln!(self.0.get_mut(), "{line}")?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        Ok(answer.trim_end().to_owned())
    }
}

/// Pieces of 2 MiB that nothing can touch, in what /proc/PID/maps says: more than the allocator's and the
/// stacks'.
pub fn reserved_pieces(maps: &str) -> usize {
    maps.lines().filter_map(reserved_bytes).sum::<usize>() / HUGE_PAGE
}

/// Of a map without rights and without a file.
fn reserved_bytes(line: &str) -> Option<usize> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [range, "---p", _, _, "0"] = words[..] else { return None };
    let (start, end) = range.split_once('-')?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    Some(number(end)? - number(start)?)
}

/// What a call may well fail with.
fn errno(call: &str) -> i32 {
    match call {
        "fallocate" | "pwrite" | "fsetxattr" => libc::ENOSPC,
        "open" | "openat2" | "dup" | "eventfd" | "create" => libc::EMFILE,
        "flock" => libc::ENOLCK,
        "fcntl(F_OFD_SETLK)" => libc::ENOLCK,
        _ if call.starts_with("fcntl") => libc::ENOMEM,
        "mmap" | "munmap" | "mprotect" | "madvise" => libc::ENOMEM,
        _ if call.starts_with("process_vm") => libc::ENOMEM,
        _ if call.starts_with("ibv_") => libc::ENOMEM,
        _ => libc::EIO,
    }
}

/// An error that can be made of an error number.
pub trait OfErrno {
    /// Makes it.
    fn of_errno(errno: i32) -> Self;
}

impl OfErrno for io::Error {
    fn of_errno(errno: i32) -> Self {
        Self::from_raw_os_error(errno)
    }
}

impl OfErrno for rustix::io::Errno {
    fn of_errno(errno: i32) -> Self {
        Self::from_raw_os_error(errno)
    }
}

impl OfErrno for nix::Error {
    fn of_errno(errno: i32) -> Self {
        Self::from_raw(errno)
    }
}

#[cfg(test)]
mod life;
