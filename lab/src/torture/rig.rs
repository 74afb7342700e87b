//! What all parts of a run share, and the run itself.

use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::crowd::Crowd;
use super::leaks::Footprint;
use super::life::{Life, Wrong};
use super::local::Local;
use super::outcome::{Finding, Latencies, Outcome};
use super::stuck;
use super::words::{Said, file_name};
use crate::{Daemon, EXPORT, FileSystem, LeaseBreakTimeSet};

/// How many files are pinned and visited.
pub const FILES: u32 = 6;
/// Seconds that the kernel gives a guard's holder: short, so that there are many rounds.
const LEASE_BREAK_TIME: u32 = 5;
/// Room that is left on the file system: for a second copy of each file, and the kernel's needs.
const ROOM: u64 = 12 << 20;
/// Events of a file that are told with a finding.
const EVENTS: usize = 40;
/// Findings of a kind that are told.
const FINDINGS: usize = 4;
/// Blocks by clients that a local process waits for before it takes a file.
const ENOUGH: usize = 8;
/// … and for how long, since clients may be stopped.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often it is looked whether the machine runs at all, …
const TICK: Duration = Duration::from_millis(50);
/// … and a look that comes so late says that it does not: then the server had no time either.
const STILL: Duration = Duration::from_millis(500);
/// Far beyond anything that works: only a hang reaches it.
const DEADLINE: Duration = Duration::from_secs(90);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    /// Where.
    pub file_system: FileSystem,
    /// For how long; a finding ends it earlier.
    pub time: Duration,
    /// What the schedule comes from.
    pub seed: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Rig {
    /// What was asked for.
    pub order: Order,
    /// What the daemon exports.
    pub folder: PathBuf,
    /// The daemon; another one after each time that it was killed.
    pub server: Mutex<Server>,
    files: Vec<(Mutex<FileState>, Condvar)>,
    lives: AtomicU64,
    began: Instant,
    over: (Mutex<bool>, Condvar),
    counts: Mutex<BTreeMap<String, u64>>,
    latencies: Mutex<Vec<u64>>,
    findings: Mutex<Vec<Finding>>,
    /// When the server was stopped, or the machine stood still.
    stops: Mutex<Vec<(Instant, Instant)>>,
    mutant: Option<String>,
    /// The mutant, unless it is the one without a mistake.
    mistake: Option<String>,
}

/// A daemon, and what it was like before it had clients.
#[derive(Debug)]
pub struct Server {
    /// The process.
    pub daemon: Daemon,
    /// Its size at the start.
    pub footprint: Footprint,
}

impl Server {
    fn new(daemon: Daemon) -> Self {
        let footprint = Footprint::of(&daemon);
        Self { daemon, footprint }
    }

    /// Takes the place of one that was killed, among its clients.
    fn among_clients(self, before: &Footprint) -> Self {
        Self { footprint: self.footprint.without_clients(before), ..self }
    }
}

#[derive(Debug)]
struct FileState {
    life: Life,
    events: VecDeque<String>,
}

/// Runs it, and says how it went.
pub fn run(order: Order) -> Outcome {
    let _limit = LeaseBreakTimeSet::to(LEASE_BREAK_TIME);
    let mount_point = order.file_system.mount_point();
    let folder = tempfile::tempdir_in(&mount_point).unwrap();
    let ballast = mount_point.join("ballast");
    let rig = Arc::new(Rig::new(order, folder.path()));
    rig.make_files();
    fill(&ballast, &mount_point);
    rig.torture();
    std::fs::remove_file(&ballast).unwrap();
    rig.outcome()
}

/// Leaves little room: whatever is freed is somebody else's soon.
fn fill(ballast: &Path, mount_point: &Path) {
    let file = std::fs::File::create(ballast).unwrap();
    let space = rustix::fs::statvfs(mount_point).unwrap();
    let mut len = (space.f_bavail * space.f_frsize).saturating_sub(ROOM);
    let flags = rustix::fs::FallocateFlags::empty();
    while len > 0 && rustix::fs::fallocate(&file, flags, 0, len).is_err() {
        len = len.saturating_sub(1 << 20);
    }
    file.sync_all().unwrap();
}

impl Rig {
    fn new(order: Order, folder: &Path) -> Self {
        let daemon = Daemon::start(&[(EXPORT, folder)]);
        let file = |file| {
            let life = Life::fresh(file, u64::from(file) + 1);
            (Mutex::new(FileState { life, events: VecDeque::new() }), Condvar::new())
        };
        let mutant = std::env::var("PINFOLD_MUTANT").ok();
        Self {
            order,
            folder: folder.to_owned(),
            server: Mutex::new(Server::new(daemon)),
            files: (0..FILES).map(file).collect(),
            lives: AtomicU64::new(u64::from(FILES) + 1),
            began: Instant::now(),
            over: (Mutex::new(false), Condvar::new()),
            counts: Mutex::default(),
            latencies: Mutex::default(),
            findings: Mutex::default(),
            stops: Mutex::default(),
            mistake: mutant.clone().filter(|name| name != "slow"),
            mutant,
        }
    }

    fn make_files(&self) {
        for file in 0..FILES {
            std::fs::write(self.path(file), &self.life(file).base).unwrap();
        }
    }

    fn torture(self: &Arc<Self>) {
        let crowd = Arc::new(Crowd::start(self));
        let mut threads: Vec<_> = (0..FILES)
            .map(|file| {
                let local = Local::new(self, &crowd, file);
                spawn(file_name(file), move || local.run())
            })
            .collect();
        let (rig, accidents) = (Arc::clone(self), Arc::clone(&crowd));
        threads.push(spawn("accidents".to_owned(), move || accidents.suffer(&rig)));
        let rig = Arc::clone(self);
        threads.push(spawn("clock".to_owned(), move || rig.watch_the_clock()));
        self.pause(self.order.time);
        self.end();
        let finished = self.join(threads);
        if self.is_red() || !finished {
            crowd.kill();
            let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
            server.daemon.kill();
            return self.read_log(&mut server.daemon);
        }
        crowd.leave(self);
        for file in 0..FILES {
            Local::new(self, &crowd, file).last_look();
        }
        self.close_down();
    }

    fn join(&self, threads: Vec<(String, JoinHandle<()>)>) -> bool {
        let give_up = Instant::now() + DEADLINE;
        for (name, thread) in threads {
            while !thread.is_finished() {
                if Instant::now() > give_up {
                    let threads = stuck::threads_of_all();
                    let what = format!("{name} did not come to its end{threads}");
                    self.found("hang", what + &self.all_events());
                    return false;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            if thread.join().is_err() {
                self.found("rig", format!("{name} panicked"));
            }
        }
        true
    }

    /// Nobody is there any more: nothing may be left, and the daemon goes when it is asked to.
    fn close_down(&self) {
        let mut server = self.server.lock().unwrap();
        let Server { daemon, footprint } = &mut *server;
        if let Some(status) = daemon.ended() {
            self.found("server", format!("it ended by itself: {status}"));
        } else {
            footprint.check(self, daemon);
            let status = daemon.terminate();
            if !status.success() {
                self.found("server", format!("told to go, it ended with {status}"));
            }
        }
        self.read_log(daemon);
    }

    /// Puts another daemon in the place of the one that is killed.
    pub fn kill_server(&self) {
        let mut server = self.server.lock().unwrap();
        if let Some(status) = server.daemon.ended() {
            self.found("server", format!("it ended by itself: {status}"));
        }
        server.daemon.kill();
        self.read_log(&mut server.daemon);
        let next = Server::new(server.daemon.successor(&[(EXPORT, &self.folder)]));
        *server = next.among_clients(&server.footprint);
    }

    /// Notes when nobody gets any time, as when the host of this guest has more to do than it can.
    fn watch_the_clock(&self) {
        loop {
            let from = Instant::now();
            let goes_on = self.pause(TICK);
            if from.elapsed() > TICK + STILL {
                self.count("times that the machine stood still", 1);
                self.stops.lock().unwrap().push((from, Instant::now()));
            }
            if !goes_on {
                return;
            }
        }
    }

    /// Stops the daemon for a while.
    pub fn stop_server(&self, time: Duration) {
        let server = self.server.lock().unwrap();
        let from = Instant::now();
        super::crowd::stop(server.daemon.pid(), || {
            self.pause(time);
        });
        self.stops.lock().unwrap().push((from, Instant::now()));
    }

    fn read_log(&self, daemon: &mut Daemon) {
        for (at, line) in daemon.last_words() {
            if line["target"] == "pinfold::audit" {
                self.read_record(at, &line);
            } else if line["level"] == "ERROR" {
                self.found("log", line.to_string());
            } else if line.as_str().is_some_and(|line| line.contains("panicked")) {
                self.found("panic", line.to_string());
            }
        }
    }

    fn read_record(&self, at: Instant, record: &Value) {
        let reason = record["reason"].as_str().unwrap_or("no reason");
        self.count(&format!("revocations: {reason}"), 1);
        if !reason.starts_with("local") {
            return;
        }
        let micros = |name: &str| record[name].as_u64().unwrap_or_default();
        self.latencies.lock().unwrap().push(micros("released_us"));
        let since = at - Duration::from_micros(micros("unmapped_us"));
        let excused = self.stops.lock().unwrap().iter().any(|stop| stop.0 <= at && since <= stop.1);
        match record["break_pending_at_release"].as_bool() {
            Some(true) => {}
            _ if excused => self.count("breaks that the timer ended, in a standstill", 1),
            _ => self.found("timer", format!("the kernel let somebody through: {record}")),
        }
    }

    // ------------------------------------------------------------------------------ time

    /// Waits for so long, or until the run is over; whether it goes on.
    pub fn pause(&self, time: Duration) -> bool {
        let over = self.over.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (over, _) = self.over.1.wait_timeout_while(over, time, |over| !*over).unwrap();
        !*over
    }

    fn end(&self) {
        *self.over.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.over.1.notify_all();
        for (_, changed) in &self.files {
            changed.notify_all();
        }
    }

    // ------------------------------------------------------------------------------ files

    /// Where a file is.
    pub fn path(&self, file: u32) -> PathBuf {
        self.folder.join(file_name(file))
    }

    fn state(&self, file: u32) -> MutexGuard<'_, FileState> {
        self.files[file as usize].0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a file must hold now.
    pub fn life(&self, file: u32) -> Life {
        self.state(file).life.clone()
    }

    /// A number for a new life.
    pub fn next_life(&self) -> u64 {
        self.lives.fetch_add(1, Ordering::Relaxed)
    }

    /// From here on a file must hold this.
    pub fn begin_life(&self, life: Life) {
        let mut state = self.state(life.file);
        state.life = life;
    }

    /// Waits until clients have written to the file, if they do.
    pub fn wait_for_writes(&self, file: u32) {
        let (_, changed) = &self.files[file as usize];
        let too_few =
            |state: &mut FileState| state.life.written() < ENOUGH && !*self.over.0.lock().unwrap();
        let (_state, waited) =
            changed.wait_timeout_while(self.state(file), PATIENCE, too_few).unwrap();
        if waited.timed_out() {
            self.count("visits to a file with few writes", 1);
        }
    }

    /// Keeps what happened to a file.
    pub fn note(&self, file: u32, what: &str) {
        // A file that a client makes has no other history.
        if file >= FILES {
            return;
        }
        let at = self.began.elapsed().as_millis();
        let mut state = self.state(file);
        if state.events.len() == EVENTS {
            state.events.pop_front();
        }
        state.events.push_back(format!("{at:>7} ms  {what}"));
    }

    // ------------------------------------------------------------------------------ results

    /// Counts.
    pub fn count(&self, what: &str, times: u64) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what.to_owned()).or_default() += times;
    }

    /// Something that must not be: the run ends, as a rule.
    pub fn found(&self, check: &str, what: String) {
        let at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        let finding = Finding { check: check.to_owned(), what, at_ms };
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        // What follows from the first few tells no more.
        let alike = findings.iter().filter(|earlier| earlier.check == check).count();
        if alike < FINDINGS {
            findings.push(finding);
        }
        drop(findings);
        // A mistake on purpose does more than one harm; what it does to bytes must be seen.
        if self.mistake.is_none() || check == "foreign" {
            self.end();
        }
    }

    fn events(&self, file: u32) -> String {
        self.state(file).events.iter().map(|event| format!("\n    {event}")).collect()
    }

    fn all_events(&self) -> String {
        let told = |file| format!("\n  {}:{}", file_name(file), self.events(file));
        (0..FILES).map(told).collect()
    }

    /// Something in a file that must not be: tells what happened to it before.
    pub fn found_in(&self, file: u32, check: &str, what: &str) {
        let events = self.events(file);
        self.found(check, format!("{}: {what}{events}", file_name(file)));
    }

    /// Judges what was read from a file.
    pub fn judge(&self, file: u32, when: &str, checked: Result<(), Wrong>) {
        self.count("looks at a whole file", 1);
        if let Err(wrong) = checked {
            self.found_in(file, wrong.check(), &format!("{when}, {wrong}"));
        }
    }

    fn is_red(&self) -> bool {
        !self.findings.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Takes in what a client says.
    pub fn hear(&self, writer: u32, said: &Said) {
        match said {
            Said::Pinned { file, life, generation } => {
                self.count("pins", 1);
                let what = format!("writer {writer} has a pin: life {life}, {generation}");
                self.note(*file, &what);
            }
            Said::Wrote { file, life, first, count, sequence } => {
                self.count("writes acknowledged", 1);
                let mut state = self.state(*file);
                if state.life.number == *life {
                    state.life.acknowledge(*first, *count, *sequence);
                    self.files[*file as usize].1.notify_all();
                }
            }
            Said::Committed { file, life, sequence } => {
                self.count("commits durable", 1);
                let mut state = self.state(*file);
                if state.life.number == *life {
                    state.life.commit(writer, *sequence);
                }
            }
            Said::Stale { .. } => self.count("commits too late", 1),
            Said::Failed { file: FILES.., why } => {
                self.count("new files that were not made", 1);
                eprintln!("torture: a new file: {why}");
            }
            Said::Failed { file, why } => {
                self.count("writes failed", 1);
                self.note(*file, &format!("a write by {writer} failed: {why}"));
            }
            Said::Refused { file } => {
                self.count("old keys refused", 1);
                self.note(*file, &format!("writer {writer}: an old key was refused"));
            }
            Said::Landed { file } => {
                self.count("old keys that were not dead yet", 1);
                self.note(*file, &format!("writer {writer}: an old key worked"));
            }
            Said::Odd { file, what } => self.found_in(*file, "foreign", what),
            Said::Mapped => self.count("words that a file was mapped", 1),
            Said::GaveBack { .. } => {}
        }
    }

    fn outcome(&self) -> Outcome {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
        Outcome {
            file_system: self.order.file_system.kind().to_owned(),
            kernel: release.unwrap_or_default().trim().to_owned(),
            seed: self.order.seed,
            seconds: self.began.elapsed().as_secs(),
            mutant: self.mutant.clone(),
            counts: self.counts.lock().unwrap().clone(),
            break_to_release_us: Latencies::of(self.latencies.lock().unwrap().clone()),
            findings: self.findings.lock().unwrap().clone(),
        }
    }
}

/// A thread that has its name wherever threads are told.
fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> (String, JoinHandle<()>) {
    let thread = std::thread::Builder::new().name(name.clone());
    (name, thread.spawn(work).unwrap())
}

/// Removes a file that may be gone already.
pub fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        done => done,
    }
}
