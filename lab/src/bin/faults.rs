//! Each call to the kernel, or to libibverbs, fails once in a server that goes on, in its client, or in
//! one that starts or goes down: `cargo xtask vm faults` runs it in the lab.
//!
//! `faults FILE-SYSTEM [start-|end-]leases|[end-|own-]verbs` ends with 0 if nothing was left behind.
#![forbid(unsafe_code)]

#[path = "faults/ends.rs"]
mod ends;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pinfold_client::{Code, Error, Event, Events, IfExists, PinRequest, Session};
use pinfold_lab::torture::leaks::{descriptors, leases, rdma};
use pinfold_lab::{DEADLINE, EXPORT, FileSystem, Lab, Pattern, Truncation, device_name, in_time};
use pinfold_leases::fault::{Control, VERBS, reserved_pieces};
use pinfold_verbs::with_causes;

const PAGE: usize = 4096;
const LEN: u64 = 4 * PAGE as u64;
/// Only a hang reaches it.
const LIMIT: Duration = Duration::from_secs(550);
/// The kernel's answer to this decides what the record of a revocation says of who waited.
const ASKS_WHO_WAITS: &str = "fcntl(F_GETDELEG)";

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let file_system = match words.first().map(String::as_str) {
        Some("ext4") => FileSystem::Ext4,
        Some("xfs") => FileSystem::Xfs,
        other => panic!("ext4 or xfs, not {other:?}"),
    };
    let what = words.get(1).expect("whose calls");
    if let Some(run) = ends::Run::of(what) {
        return in_time(LIMIT, ends::run(file_system, run));
    }
    let whose = Whose::of(what);
    Lab::run_long(file_system, LIMIT, |lab| every_call_fails_once(lab, whose));
}

/// Whose calls fail.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Whose {
    ServersLeases,
    ServersVerbs,
    /// The client's, which is this process.
    OwnVerbs,
}

impl Whose {
    fn of(word: &str) -> Self {
        match word {
            "leases" => Self::ServersLeases,
            "verbs" => Self::ServersVerbs,
            "own-verbs" => Self::OwnVerbs,
            other => panic!("leases, verbs or own-verbs, not {other}"),
        }
    }

    fn arm(self, server: &mut Control, n: u64) {
        match self {
            Self::ServersLeases => server.arm("leases", n).unwrap(),
            Self::ServersVerbs => server.arm("verbs", n).unwrap(),
            Self::OwnVerbs => VERBS.arm(n),
        }
    }

    /// Which call has failed, if one has.
    fn disarm(self, server: &mut Control) -> Option<String> {
        match self {
            Self::ServersLeases => server.disarm("leases").expect("the server is there"),
            Self::ServersVerbs => server.disarm("verbs").expect("the server is there"),
            Self::OwnVerbs => VERBS.disarm().map(str::to_owned),
        }
    }

    /// Calls without which the run has shown nothing.
    fn wanted(self) -> &'static [&'static str] {
        match self {
            Self::ServersLeases => &[
                "fcntl(F_SETDELEG)",
                "mmap",
                "munmap",
                "mprotect",
                "madvise",
                "msync",
                "fallocate",
            ],
            Self::ServersVerbs => {
                &["ibv_reg_mr", "ibv_dereg_mr", "ibv_create_qp", "ibv_destroy_qp", "ibv_dealloc_pd"]
            }
            Self::OwnVerbs => &[
                "ibv_reg_mr",
                "ibv_create_cq",
                "ibv_create_qp_ex",
                "ibv_modify_qp",
                "ibv_post_send",
                "ibv_req_notify_cq",
                "ibv_destroy_qp",
            ],
        }
    }
}

/// What server, client and machine hold while no client is there.
#[derive(Debug, Eq, PartialEq)]
struct Held {
    server_descriptors: usize,
    client_descriptors: usize,
    files: usize,
    leases: Vec<String>,
    reserved: usize,
    rdma: BTreeMap<String, u64>,
}

impl Held {
    fn now(lab: &Lab) -> Self {
        let pid = lab.daemon.pid();
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        Self {
            server_descriptors: descriptors(pid),
            client_descriptors: descriptors(std::process::id()),
            files: lab.daemon.files_open_beneath(lab.folder()),
            leases: leases(pid),
            reserved: reserved_pieces(&maps),
            rdma: rdma(),
        }
    }
}

async fn every_call_fails_once(mut lab: Lab, whose: Whose) {
    lab.make_file("file", LEN);
    let mut calls = Control::connect().unwrap();
    // What is made once and kept is there then.
    for _ in 0..2 {
        life(&lab).await.unwrap();
    }
    let before = settled(&lab).await;
    println!("faults: {whose:?}: {before:?}");
    let began = Instant::now();
    let mut made = BTreeMap::<String, u32>::new();
    for n in 1.. {
        whose.arm(&mut calls, n);
        let ended = tokio::time::timeout(DEADLINE / 2, life(&lab)).await;
        let failed = whose.disarm(&mut calls);
        let ended = ended.unwrap_or_else(|_| panic!("a life hangs after call {n}, {failed:?}"));
        let Some(call) = failed else {
            ended.unwrap();
            break;
        };
        let about = format!("call {n}, {call}: {ended:?}");
        *made.entry(call.clone()).or_default() += 1;
        match ended {
            Err(Failed::Call(error)) => tells_what_to_look_at(&error, &lab),
            Err(Failed::NotByUs) if call == ASKS_WHO_WAITS => {}
            Err(failed) => panic!("{failed:?}, after {about}"),
            Ok(()) => {}
        }
        assert!(lab.daemon.ended().is_none(), "the server has died of {about}");
        let _ = std::fs::remove_file(lab.path("new"));
        guarded_anew(&lab).await.unwrap_or_else(|e| panic!("{}, after {about}", with_causes(&e)));
        is_as(&lab, &before, &about).await;
    }
    println!(
        "faults: {whose:?}: {} calls in {:?}: {made:?}",
        made.values().sum::<u32>(),
        began.elapsed()
    );
    for call in whose.wanted() {
        assert!(made.contains_key(*call), "{call} was never made");
    }
    assert!(lab.daemon.terminate().success());
    let said = lab.daemon.last_words();
    let panicked = said.iter().find(|(_, line)| line.to_string().contains("panicked"));
    assert!(panicked.is_none(), "{panicked:?}");
}

/// How a life ended before its time.
#[derive(Debug)]
enum Failed {
    Call(Error),
    /// Somebody who wanted the file got it from the kernel.
    NotByUs,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Call(error)
    }
}

/// A client creates and removes a file, pins another one, writes by RDMA, commits, grows it, lets go,
/// pins it again, and somebody cuts it.
async fn life(lab: &Lab) -> Result<(), Failed> {
    let session = Session::connect(lab.options()).await?;
    let ended = lived(&session, lab).await;
    session.close().await;
    ended
}

async fn lived(session: &Session, lab: &Lab) -> Result<(), Failed> {
    session.create(EXPORT, "new", LEN, IfExists::Fail).await?;
    session.remove(EXPORT, "new", false).await?;
    let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await?;
    let mut buffer = session.buffer(PAGE).await?;
    Pattern(1).fill(0, buffer.as_mut_slice());
    let (buffer, _) = pin.write(0, buffer, PAGE).await.map_err(pinfold_client::Error::from)?;
    drop(buffer);
    pin.commit().await?;
    session.grow(EXPORT, "file", 2 * LEN).await?;
    pin.unpin().await?;

    let mut events = session.events();
    let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await?;
    let truncation = Truncation::start(lab.path("file"), LEN as i64);
    let by_us = is_revoked_by_us(&mut events).await;
    truncation.done().await;
    drop(pin);
    if by_us { Ok(()) } else { Err(Failed::NotByUs) }
}

async fn is_revoked_by_us(events: &mut Events) -> bool {
    loop {
        match events.next().await.expect("the session ended") {
            Event::Revoked { revocation, .. } => {
                return revocation.timings.unwrap().break_pending_at_release;
            }
            Event::Draining { .. } => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Whoever reads it must know where to look.
fn tells_what_to_look_at(error: &Error, lab: &Lab) {
    let text = with_causes(error);
    let folder = lab.folder().to_str().unwrap().to_owned();
    // To list the devices is about none of them.
    let all_devices = "/sys/class/infiniband".to_owned();
    let names = [folder, format!("{EXPORT}/"), device_name(), all_devices];
    let names_it = names.iter().any(|name| text.contains(name));
    let is_plain = matches!(error, Error::Refused { code, .. } if *code != Code::Internal);
    assert!(names_it || is_plain, "neither file nor device is named: {text}");
}

async fn guarded_anew(lab: &Lab) -> Result<(), Error> {
    let session = Session::connect(lab.options()).await?;
    let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await?;
    let grant = pin.grant();
    assert!(!grant.segments.is_empty() && grant.map_sync, "not as before: {grant:?}");
    pin.unpin().await?;
    session.close().await;
    Ok(())
}

/// What is held once nothing changes any more.
async fn settled(lab: &Lab) -> Held {
    lab.nothing_is_held().await;
    let mut held = Held::now(lab);
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = Held::now(lab);
        if now == held {
            return held;
        }
        held = now;
    }
}

async fn is_as(lab: &Lab, before: &Held, about: &str) {
    let give_up = Instant::now() + DEADLINE / 4;
    loop {
        let now = Held::now(lab);
        if now == *before {
            return;
        }
        assert!(Instant::now() < give_up, "left after {about}: {now:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
