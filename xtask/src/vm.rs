//! `vm run` and `vm shell`: boots the lab's guest, carries the command's output and status out.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::console::{self, Tail, UntilMark, Verdict};
use crate::kernel::{Kernel, Suite};
use crate::qemu::{Accel, Kept, Machine, Port, Running};
use crate::{initramfs, kvm, mounts, paths, rdma_core, setup, signals, terminal};

/// A boot that is not up by then is dead: ten times what an idle machine needs under TCG.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long a dying kernel may still print its trace.
const LAST_WORDS: Duration = Duration::from_secs(3);
/// How long the end of the output and the power-off may take.
const END_LIMIT: Duration = Duration::from_secs(15);
/// Consoles of earlier runs that are kept.
const CONSOLES_KEPT: u32 = 50;
/// The device of the guest's third pmem region, region2.
const DEVDAX: &str = "/dev/dax2.0";

/// What the guest is like.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Kernel to boot
    #[arg(long, value_enum, default_value_t = Suite::Newest)]
    pub(crate) kernel: Suite,
    /// MiB of each of the two DAX file systems
    #[arg(long, value_name = "MIB", default_value_t = 384,
          value_parser = clap::value_parser!(u32).range(320..=8192))]
    pub(crate) fs_size: u32,
    /// Seconds that the kernel gives a lease holder (/proc/sys/fs/lease-break-time)
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub(crate) lease_break_time: u32,
    /// 2: the command runs on a second host, and finds the storage host over a wire
    #[arg(long, value_name = "1|2", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(crate) hosts: u8,
    /// Storage of an earlier guest, or for a later one
    #[arg(skip)]
    pub(crate) kept: Option<Kept>,
}

/// What to do in the guest.
#[derive(Clone, Debug)]
pub(crate) enum Job {
    /// Run a command without a terminal; the seconds are its limit.
    Run(Vec<OsString>, Duration),
    /// Run an interactive command on the caller's terminal.
    Terminal(Vec<OsString>),
}

/// How a session ended.
#[derive(Debug)]
pub(crate) enum End {
    /// The command ended with this status.
    Exit(u8),
    /// The VM was lost, before or after the command started.
    Lost { started: bool, why: String },
    /// We were told to stop, by this signal.
    Interrupted(i32),
    /// [`cut_power`] was called while the command ran.
    PowerCut,
}

impl End {
    /// The command's status; any other end is an error.
    pub(crate) fn status(self) -> Result<u8> {
        match self {
            End::Exit(status) => Ok(status),
            End::Lost { why, .. } => bail!("the VM was lost: {why}"),
            End::PowerCut => bail!("the VM's power was cut"),
            End::Interrupted(signal) => bail!("interrupted by signal {signal}"),
        }
    }
}

/// Where the command's standard output goes, besides our own.
pub(crate) type Copy = Option<Sender<Vec<u8>>>;

/// Takes what a [`type@Copy`] brings apart into lines, until the session is over; a line may come in
/// pieces.
pub(crate) fn each_line(output: Receiver<Vec<u8>>, mut take: impl FnMut(String)) {
    let mut held = Vec::new();
    for bytes in output {
        held.extend(bytes);
        while let Some(end) = held.iter().position(|&byte| byte == b'\n') {
            let line: Vec<_> = held.drain(..=end).collect();
            take(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    }
}

/// Boots, runs, and repeats once a boot that died before the command started.
pub(crate) fn run(options: &Options, job: &Job, copy: &Copy) -> Result<End> {
    setup::require_lab()?;
    let kernel = Kernel::get(options.kernel)?;
    let accel = kvm::accel(&kernel)?;
    let first = session(options, job, &kernel, accel, copy)?;
    let End::Lost { started: false, .. } = &first else { return Ok(first) };
    eprintln!("lab: the boot died before the command started: booting again (1 of 1)");
    session(options, job, &kernel, accel, copy)
}

/// One boot.
fn session(
    options: &Options,
    job: &Job,
    kernel: &Kernel,
    accel: Accel,
    copy: &Copy,
) -> Result<End> {
    let (console_path, console_log) = console_log()?;
    let initrd = Removed(console_path.with_extension("cpio"));
    let mark = end_mark();
    let settings = settings(options, job, kernel, &mark)?;
    initramfs::write(&initrd.0, kernel, &settings, &command_script(options, job)?)?;

    let (events, received) = mpsc::channel();
    signals::forward(events.clone());
    let (console, console_far) = UnixStream::pair()?;
    let (control, control_far) = UnixStream::pair()?;
    let mut channels: Vec<(Port, OwnedFd)> = vec![
        (Port::Serial, console_far.into()),
        (Port::Named("pinfold.control"), control_far.into()),
    ];
    let mut streams = 0;
    let mut terminal = None;
    match job {
        Job::Run(..) => {
            let (out, out_far) = UnixStream::pair()?;
            let (err, err_far) = UnixStream::pair()?;
            channels.push((Port::Named("pinfold.stdout"), out_far.into()));
            channels.push((Port::Named("pinfold.stderr"), err_far.into()));
            pump(out, std::io::stdout(), UntilMark::new(&mark), copy.clone(), events.clone());
            pump(err, std::io::stderr(), UntilMark::new(&mark), None, events.clone());
            streams = 2;
        }
        Job::Terminal(_) => {
            let (near, far) = UnixStream::pair()?;
            channels.push((Port::Terminal, far.into()));
            terminal = Some(near);
        }
    }
    watch_console(console, console_log.try_clone()?, "", events.clone());
    watch_control(control.try_clone()?, events.clone());

    let started = Instant::now();
    let image = kernel.image();
    let pmem_mib = options.fs_size;
    let kept = options.kept.as_ref();
    let machine = Machine { accel, kernel: &image, initrd: &initrd.0, pmem_mib, kept, channels };
    let mut running = machine.start()?;
    watch_console(running.take_stderr()?, console_log, "qemu: ", events);
    let mut watch = Watch {
        running: Some(running),
        control,
        received,
        terminal,
        raw: None,
        streams,
        limit: match job {
            Job::Run(_, limit) => Some(*limit),
            Job::Terminal(_) => None,
        },
        booted: None,
        status: None,
        lost: None,
        tail: Tail::default(),
        began: started,
        deadline: Some(started + BOOT_LIMIT),
        banner: format!("lab: kernel {} by {}", kernel.release, accel.name()),
    };
    let end = watch.attend()?;
    watch.raw = None;
    if let End::Lost { why, .. } = &end {
        report_loss(why, &watch.tail, &console_path);
    }
    Ok(end)
}

/// What happens around a running guest.
#[derive(Debug)]
pub(crate) enum Event {
    /// A line on the kernel's console.
    Console(String),
    /// The console is closed: QEMU has ended.
    ConsoleClosed,
    /// A line from the guest's init.
    Control(String),
    /// One of the command's streams has ended.
    StreamEnded,
    /// We got this signal.
    Signal(i32),
    /// The guest's power is to be cut.
    PowerCut,
}

/// Ends the guest that runs now as a power failure would: nothing in it learns of it. The session
/// ends with [`End::PowerCut`]; one that is over already is not concerned.
pub(crate) fn cut_power() {
    signals::tell(Event::PowerCut);
}

/// The state of one session.
struct Watch {
    running: Option<Running>,
    control: UnixStream,
    received: Receiver<Event>,
    terminal: Option<UnixStream>,
    raw: Option<terminal::Raw>,
    streams: u32,
    limit: Option<Duration>,
    booted: Option<Duration>,
    status: Option<u8>,
    lost: Option<String>,
    tail: Tail,
    began: Instant,
    deadline: Option<Instant>,
    banner: String,
}

impl Watch {
    fn attend(&mut self) -> Result<End> {
        loop {
            let Some(event) = self.next_event() else { return Ok(self.out_of_time()) };
            match event {
                Event::Console(line) => self.read_console(line),
                Event::ConsoleClosed => self.note_end(),
                Event::Control(line) => self.read_control(&line)?,
                Event::StreamEnded => self.streams -= 1,
                Event::Signal(signal) => return Ok(End::Interrupted(signal)),
                Event::PowerCut => {
                    // SIGKILL, and waits for its end.
                    drop(self.running.take());
                    return Ok(End::PowerCut);
                }
            }
            if let (Some(status), 0) = (self.status, self.streams) {
                return self.finish(status);
            }
        }
    }

    fn next_event(&self) -> Option<Event> {
        let Some(deadline) = self.deadline else { return self.received.recv().ok() };
        let left = deadline.saturating_duration_since(Instant::now());
        self.received.recv_timeout(left).ok()
    }

    fn read_console(&mut self, line: String) {
        let verdict = console::verdict(&line);
        self.tail.push(line);
        if let (Some(verdict), None) = (verdict, &self.lost) {
            self.lost = Some(match verdict {
                Verdict::InitFailed(why) => format!("the guest could not be set up: {why}"),
                Verdict::KernelDied(why) => format!("the guest's kernel died: {why}"),
            });
            self.deadline = Some(Instant::now() + LAST_WORDS);
        }
    }

    /// QEMU has ended; what it said on its way out may still be on the way to us.
    fn note_end(&mut self) {
        self.lost.get_or_insert_with(|| "the VM ended by itself".to_owned());
        self.deadline = Some(Instant::now() + Duration::from_millis(300));
    }

    fn read_control(&mut self, line: &str) -> Result<()> {
        if line == "started" {
            let boot = self.began.elapsed();
            self.booted = Some(boot);
            eprintln!("{}: booted in {} s", self.banner, boot.as_secs_f32().round());
            self.deadline = self.limit.map(|limit| Instant::now() + limit);
            if let Some(stream) = self.terminal.take() {
                self.raw = Some(terminal::attach(stream)?);
            }
            return Ok(());
        }
        let status = line.strip_prefix("status ").and_then(|status| status.parse().ok());
        self.status = Some(status.with_context(|| format!("the guest said {line:?}"))?);
        self.deadline = Some(Instant::now() + END_LIMIT);
        Ok(())
    }

    /// Everything is read: lets the guest power off.
    fn finish(&mut self, status: u8) -> Result<End> {
        self.control.write_all(b"read\n").context("the guest is gone before its end")?;
        if let Some(running) = self.running.take()
            && !running.ended_within(END_LIMIT)?
        {
            eprintln!("lab: the guest did not power off in {} s: killed", END_LIMIT.as_secs());
        }
        Ok(End::Exit(status))
    }

    fn out_of_time(&mut self) -> End {
        if let Some(status) = self.status {
            eprintln!("lab: the guest's output did not end: some of it may be missing");
            return End::Exit(status);
        }
        match (self.booted, self.limit) {
            (Some(_), Some(limit)) => {
                self.loss(&format!("the command took longer than {} s", limit.as_secs()))
            }
            _ => self.loss(&format!("the guest did not boot in {} s", BOOT_LIMIT.as_secs())),
        }
    }

    /// The first reason is the cause; what follows from it is not.
    fn loss(&mut self, otherwise: &str) -> End {
        let why = self.lost.take().unwrap_or_else(|| otherwise.to_owned());
        End::Lost { started: self.booted.is_some(), why }
    }
}

fn report_loss(why: &str, tail: &Tail, console: &Path) {
    eprintln!("lab: ---- the console's last lines");
    for line in tail.lines() {
        eprintln!("{line}");
    }
    eprintln!("lab: ---- the whole console: {}", console.display());
    eprintln!("lab: {why}");
}

/// Carries one stream of the command to ours.
fn pump(
    mut from: UnixStream,
    mut to: impl Write + Send + 'static,
    mut until: UntilMark,
    copy: Copy,
    events: Sender<Event>,
) {
    thread::spawn(move || {
        let mut buffer = [0; 1 << 16];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let (bytes, ended) = until.take(&buffer[..count]);
            // Who closed our output does not want the rest; the command still runs to its end.
            let _ = to.write_all(&bytes).and_then(|()| to.flush());
            if let Some(copy) = &copy {
                let _ = copy.send(bytes);
            }
            if ended {
                break;
            }
        }
        // Fails only when the session is over.
        let _ = events.send(Event::StreamEnded);
    });
}

/// Reads the kernel's console, or QEMU's own words, which get the prefix.
fn watch_console(
    from: impl Read + Send + 'static,
    mut log: fs::File,
    prefix: &'static str,
    events: Sender<Event>,
) {
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            let line = format!("{prefix}{}", String::from_utf8_lossy(&line).trim_end());
            if let Err(error) = writeln!(log, "{line}") {
                eprintln!("lab: the console log can't be written: {error}");
            }
            if events.send(Event::Console(line)).is_err() {
                return;
            }
        }
        if prefix.is_empty() {
            let _ = events.send(Event::ConsoleClosed);
        }
    });
}

fn watch_control(from: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            if events.send(Event::Control(line)).is_err() {
                return;
            }
        }
    });
}

/// A new console log, numbered on from the newest; the oldest goes.
fn console_log() -> Result<(PathBuf, fs::File)> {
    let dir = paths::lab_dir()?;
    let newest = fs::read_dir(&dir)?.flatten().filter_map(|entry| {
        let name = entry.file_name();
        name.to_str()?.strip_prefix("console-")?.strip_suffix(".log")?.parse::<u32>().ok()
    });
    let mut number = newest.max().unwrap_or(0);
    loop {
        number += 1;
        let path = dir.join(format!("console-{number}.log"));
        match fs::File::create_new(&path) {
            Ok(file) => {
                if let Some(old) = number.checked_sub(CONSOLES_KEPT) {
                    let _ = fs::remove_file(dir.join(format!("console-{old}.log")));
                }
                return Ok((path, file));
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => bail!("cannot write {}: {error}", path.display()),
        }
    }
}

/// A file that is gone after use.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// A word that no output contains by accident.
fn end_mark() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("\u{1e}pinfold-end-{}-{now}\u{1e}", std::process::id())
}

/// What the guest's scripts are told, as shell assignments.
fn settings(options: &Options, job: &Job, kernel: &Kernel, mark: &str) -> Result<Vec<u8>> {
    let (Job::Run(argv, _) | Job::Terminal(argv)) = job;
    let program = argv.first().map(PathBuf::from).unwrap_or_default();
    let shown = mounts::shown(kernel, &program)?;
    let base = mounts::base(&shown)?;
    let modprobe = paths::program("modprobe").context("modprobe is missing")?;
    let ip = paths::program("ip").context("ip is missing")?;
    let rdma_core = rdma_core::get()?;
    let mode = if matches!(job, Job::Terminal(_)) { "shell" } else { "run" };
    let mut text = Vec::new();
    for (name, value) in [
        ("LAB_BASE", OsStr::new(base)),
        ("EXTRA_TMPFS", OsStr::new(mounts::extra(&shown, base))),
        ("MODE", OsStr::new(mode)),
        ("MODULE_TREE", kernel.tree.as_os_str()),
        ("HOST_MODPROBE", modprobe.as_os_str()),
        ("NEWER_RDMA_CORE", rdma_core.as_os_str()),
        ("HOST_LIBRARIES", OsStr::new(rdma_core::HOST_LIBRARIES)),
        ("LAB_DEVDAX", OsStr::new(DEVDAX)),
        ("LEASE_BREAK_TIME", OsStr::new(&options.lease_break_time.to_string())),
        ("HOST_IP", ip.as_os_str()),
        ("HOSTS", OsStr::new(&options.hosts.to_string())),
        ("STORAGE", OsStr::new(options.kept.as_ref().map_or("", Kept::word))),
        ("END_MARK", OsStr::new(mark)),
    ] {
        assign(&mut text, "", OsStr::new(name), value);
    }
    Ok(text)
}

/// The shell script that becomes the command: its variables, its folder, itself.
fn command_script(options: &Options, job: &Job) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for (name, value) in env::vars_os().filter(|(name, _)| is_passed(name)) {
        assign(&mut text, "export ", &name, &value);
    }
    text.extend_from_slice(
        b". \"${0%/*}/settings.sh\"\n\
          export PATH=\"$LAB_BASE/lab/bin:$PATH:/usr/sbin:/sbin\" TMPDIR=\"$LAB_BASE/tmp\"\n\
          export PINFOLD_LAB=1 PINFOLD_LAB_KERNEL=\"$(uname -r)\"\n\
          export PINFOLD_LAB_EXT4=\"$LAB_BASE/ext4\" PINFOLD_LAB_XFS=\"$LAB_BASE/xfs\"\n\
          export PINFOLD_LAB_DEVDAX=\"$LAB_DEVDAX\"\n",
    );
    assign(
        &mut text,
        "export ",
        OsStr::new("PINFOLD_LAB_SUITE"),
        options.kernel.to_string().as_ref(),
    );
    if options.kept.is_some() {
        text.extend_from_slice(b"export PINFOLD_LAB_DISK=\"$LAB_BASE/disk\"\n");
    }
    let (variables, prefix) = host(options);
    text.extend_from_slice(variables.as_bytes());
    text.extend_from_slice(b"cd ");
    quote(&mut text, env::current_dir().context("the current folder is gone")?.as_os_str());
    text.extend_from_slice(b" || exit 126\n");
    let (Job::Run(argv, _) | Job::Terminal(argv)) = job;
    if matches!(job, Job::Terminal(_)) {
        let (rows, columns) = terminal::size();
        text.extend_from_slice(format!("stty rows {rows} cols {columns}\n").as_bytes());
    }
    ensure!(!argv.is_empty(), "no command given");
    text.extend_from_slice(b"exec");
    text.extend_from_slice(prefix.as_bytes());
    for word in argv {
        text.push(b' ');
        quote(&mut text, word);
    }
    text.push(b'\n');
    Ok(text)
}

/// Where the command is: what it must know of that, and what puts it there.
fn host(options: &Options) -> (&'static str, &'static str) {
    match options.hosts {
        2 => (
            "export PINFOLD_LAB_RDMA_DEVICE=rxe-b PINFOLD_LAB_SERVER_DEVICE=rxe-a\n\
             export PINFOLD_LAB_SERVER_HOST=a PINFOLD_LAB_SERVER_ADDRESS=10.78.0.1\n",
            " ip netns exec b",
        ),
        _ => ("export PINFOLD_LAB_RDMA_DEVICE=rxe0\n", ""),
    }
}

/// Variables of the caller that the command sees.
fn is_passed(name: &OsStr) -> bool {
    let name = name.as_bytes();
    let names: [&[u8]; 8] =
        [b"PATH", b"HOME", b"USER", b"TERM", b"LANG", b"NO_COLOR", b"CARGO_TARGET_DIR", b"SHELL"];
    names.contains(&name) || name.starts_with(b"RUST_") || name.starts_with(b"PINFOLD_")
}

/// An interactive shell, as a command.
pub(crate) fn shell() -> Vec<OsString> {
    // A read-only home is no place for the caller's own start-up files.
    let argv: &[&str] =
        if Path::new("/bin/bash").is_file() { &["/bin/bash", "--norc"] } else { &["/bin/sh"] };
    argv.iter().map(OsString::from).collect()
}

fn assign(text: &mut Vec<u8>, prefix: &str, name: &OsStr, value: &OsStr) {
    text.extend_from_slice(prefix.as_bytes());
    text.extend_from_slice(name.as_bytes());
    text.push(b'=');
    quote(text, value);
    text.push(b'\n');
}

/// A word for a shell, whatever is in it.
pub(crate) fn quoted(word: &str) -> String {
    let mut text = Vec::new();
    quote(&mut text, OsStr::new(word));
    String::from_utf8_lossy(&text).into_owned()
}

fn quote(text: &mut Vec<u8>, word: &OsStr) {
    text.push(b'\'');
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend_from_slice(b"'\\''"),
            byte => text.push(byte),
        }
    }
    text.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quoted("a b$c\n"), "'a b$c\n'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn only_named_variables_are_passed() {
        assert!(is_passed(OsStr::new("PINFOLD_BIN_DIR")));
        assert!(is_passed(OsStr::new("RUST_LOG")));
        assert!(!is_passed(OsStr::new("SSH_AUTH_SOCK")));
    }
}
