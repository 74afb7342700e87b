//! The clients' processes: started, told, heard, killed and stopped.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::life::check_new;
use super::rig::{FILES, Rig, remove};
use super::schedule::{Accidents, Blow, Target};
use super::words::{Kind, NEW, NEW_FILE, Role, Said, Told, new_name};

/// How long a client may take to leave.
const LEAVE: Duration = Duration::from_secs(60);

/// All clients.
#[derive(Debug)]
pub struct Crowd {
    clients: Vec<Client>,
}

#[derive(Debug)]
struct Client {
    role: Mutex<Role>,
    process: Mutex<Option<Process>>,
    stdin: Stdin,
    /// Of those who want to know of every file that is mapped.
    ambushers: Arc<Vec<Stdin>>,
}

/// Absent while there is no process.
type Stdin = Arc<Mutex<Option<ChildStdin>>>;

#[derive(Debug)]
struct Process {
    child: Child,
    reader: JoinHandle<()>,
}

/// Who there is, and what they write. The last file has nobody who does not listen: its breaks are
/// over as soon as everybody has drained.
fn roles() -> Vec<(Kind, Vec<u32>)> {
    vec![
        (Kind::Drains, (0..FILES).collect()),
        (Kind::Streams, vec![1, 4]),
        (Kind::Ignores, vec![0, 3]),
        (Kind::Hammers, vec![1, 2]),
        (Kind::Ambushes, vec![0, 2, 3, 4]),
        (Kind::MakesFiles, vec![NEW_FILE, NEW_FILE - 1, NEW_FILE - 2]),
    ]
}

impl Crowd {
    /// Starts them.
    pub fn start(rig: &Arc<Rig>) -> Self {
        let url = rig.server.lock().unwrap().daemon.url.clone();
        let seed = rig.order.seed;
        let roles: Vec<_> =
            roles().into_iter().map(|(kind, files)| (kind, files, Stdin::default())).collect();
        let ambushes = roles.iter().filter(|role| role.0 == Kind::Ambushes);
        let ambushers = Arc::new(ambushes.map(|role| Arc::clone(&role.2)).collect::<Vec<_>>());
        let client = |((kind, files, stdin), writer)| {
            let role = Role { kind, writer, files, url: url.clone(), incarnation: 0, seed };
            let client = Client {
                role: Mutex::new(role),
                process: Mutex::new(None),
                stdin,
                ambushers: Arc::clone(&ambushers),
            };
            client.start(rig);
            client
        };
        Self { clients: roles.into_iter().zip(0..).map(client).collect() }
    }

    /// Tells those who lie in wait.
    pub fn tell(&self, told: &Told) {
        let ambushers = self.clients.first().into_iter().flat_map(|client| &*client.ambushers);
        ambushers.for_each(|stdin| tell(stdin, told));
    }

    /// Lets happen what the schedule has, until the run is over.
    pub fn suffer(&self, rig: &Arc<Rig>) {
        for accident in Accidents::new(rig.order.seed, self.clients.len()) {
            if !rig.pause(accident.after) {
                return;
            }
            self.look_for_the_dead(rig);
            match (accident.target, accident.blow) {
                (Target::Server, Blow::Kill) => {
                    rig.count("kills of the server", 1);
                    rig.kill_server();
                }
                (Target::Server, Blow::Stop(time)) => {
                    rig.count("stops of the server", 1);
                    rig.stop_server(time);
                }
                (Target::Client(number), Blow::Kill) => {
                    rig.count("kills of clients", 1);
                    self.clients[number].kill(rig);
                    self.clients[number].start(rig);
                }
                (Target::Client(number), Blow::Stop(time)) => {
                    rig.count("stops of clients", 1);
                    self.clients[number].stop(rig, time);
                }
            }
        }
    }

    /// Who dies without being killed says something.
    fn look_for_the_dead(&self, rig: &Rig) {
        for client in &self.clients {
            let mut process = client.process.lock().unwrap();
            let ended = process.as_mut().and_then(|process| process.child.try_wait().unwrap());
            if let Some(status) = ended {
                rig.found("client", format!("{:?} ended: {status}", client.role.lock().unwrap()));
            }
        }
    }

    /// Lets everybody go, and waits until they have gone.
    pub fn leave(&self, rig: &Rig) {
        self.look_for_the_dead(rig);
        let give_up = Instant::now() + LEAVE;
        for client in &self.clients {
            drop(client.stdin.lock().unwrap().take());
        }
        for client in &self.clients {
            let Some(mut process) = client.process.lock().unwrap().take() else { continue };
            let mut status = process.child.try_wait().unwrap();
            while status.is_none() && Instant::now() < give_up {
                std::thread::sleep(Duration::from_millis(10));
                status = process.child.try_wait().unwrap();
            }
            if !status.is_some_and(|status| status.success()) {
                rig.found("client", format!("{:?} left: {status:?}", client.role.lock().unwrap()));
            }
            process.end();
        }
        clean(rig);
    }

    /// Ends everybody at once.
    pub fn kill(&self) {
        for client in &self.clients {
            let process = client.process.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(process) = process {
                process.end();
            }
        }
    }
}

impl Client {
    fn start(&self, rig: &Arc<Rig>) {
        let role = self.role.lock().unwrap().clone();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("client").arg(serde_json::to_string(&role).unwrap());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        *self.stdin.lock().unwrap() = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (rig, stdin) = (Arc::clone(rig), Arc::clone(&self.stdin));
        let ambushers = Arc::clone(&self.ambushers);
        let reader = std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // Who is killed may be in the middle of a line.
                let Ok(said) = serde_json::from_str(&line) else { continue };
                rig.hear(role.writer, &said);
                if said == Said::Mapped {
                    ambushers.iter().for_each(|stdin| tell(stdin, &Told::Mapped));
                }
                if let Said::GaveBack { number, acknowledged } = &said {
                    check_and_remove(&rig, *number, acknowledged);
                    tell(&stdin, &Told::Checked { number: *number });
                }
            }
        });
        *self.process.lock().unwrap() = Some(Process { child, reader });
    }

    fn kill(&self, rig: &Rig) {
        if let Some(process) = self.process.lock().unwrap().take() {
            process.end();
        }
        let mut role = self.role.lock().unwrap();
        role.incarnation += 1;
        if role.kind == Kind::MakesFiles {
            clean(rig);
        }
    }

    fn stop(&self, rig: &Rig, time: Duration) {
        let process = self.process.lock().unwrap();
        let Some(process) = &*process else { return };
        stop(process.child.id(), || {
            rig.pause(time);
        });
    }
}

impl Process {
    /// Everything that it has said is heard when this returns.
    fn end(mut self) {
        // Fails if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = self.reader.join();
    }
}

/// Stops a process meanwhile.
pub(super) fn stop(pid: u32, meanwhile: impl FnOnce()) {
    let pid = Pid::from_raw(pid as i32);
    if kill(pid, Signal::SIGSTOP).is_ok() {
        meanwhile();
        kill(pid, Signal::SIGCONT).unwrap();
    }
}

fn tell(stdin: &Stdin, told: &Told) {
    let mut stdin = stdin.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(stdin) = &mut *stdin {
        let line = serde_json::to_string(told).expect("plain data");
        // Who is gone need not be told.
        let _ = writeln!(stdin, "{line}");
    }
}

/// A file that a client made and gave back holds what that client wrote, and nothing else.
fn check_and_remove(rig: &Rig, number: u64, acknowledged: &[(u32, u64)]) {
    let path = rig.folder.join(new_name(number));
    match std::fs::read(&path) {
        Ok(content) => {
            rig.count("new files checked", 1);
            if let Err(wrong) = check_new(NEW_FILE, number, acknowledged, &content) {
                rig.found(wrong.check(), format!("{}: {wrong}", path.display()));
            }
        }
        Err(error) => rig.found("local", format!("{}: {error}", path.display())),
    }
    if let Err(error) = remove(&path) {
        rig.found("local", format!("{}: {error}", path.display()));
    }
}

/// Removes what a client that was killed has left.
fn clean(rig: &Rig) {
    for entry in std::fs::read_dir(&rig.folder).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with(NEW)
            && let Err(error) = remove(&entry.path())
        {
            rig.found("local", format!("{}: {error}", entry.path().display()));
        }
    }
}
