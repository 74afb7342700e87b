//! What a daemon holds, before it has had clients and after they are gone.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pinfold_client::{ConnectOptions, RdmaDevice, Session};

use super::rig::Rig;
use crate::{DEADLINE, Daemon};

/// Descriptors that the look itself takes: a connection, and what tokio keeps for it.
const FEW: usize = 3;
/// What an allocator may keep of memory that was freed.
const KEPT_KIB: u64 = 64 << 10;

/// How much a daemon holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Footprint {
    descriptors: usize,
    resident_kib: u64,
    /// Regions, queue pairs, protection domains … of the whole machine.
    rdma: BTreeMap<String, u64>,
}

impl Footprint {
    /// Now.
    pub fn of(daemon: &Daemon) -> Self {
        let pid = daemon.pid();
        Self { descriptors: descriptors(pid), resident_kib: resident_kib(pid), rdma: rdma() }
    }

    /// As it is when it starts with no client on the machine, like the one before it.
    pub(super) fn without_clients(self, before: &Self) -> Self {
        Self { rdma: before.rdma.clone(), ..self }
    }

    /// Nobody is there any more: the daemon must be as it was.
    pub(super) fn check(&self, rig: &Rig, daemon: &Daemon) {
        let leak = |what: String| rig.found("leak", what);
        if let Err(error) = nothing_is_held(&daemon.url) {
            leak(error);
        }
        let pid = daemon.pid();
        let free = || daemon.files_open_beneath(&rig.folder) == 0;
        if !comes_true(free) {
            leak("files of the export are still open or mapped".to_owned());
        }
        if !comes_true(|| leases(pid).is_empty()) {
            leak(format!("in /proc/locks: {:?}", leases(pid)));
        }
        if !comes_true(|| descriptors(pid) <= self.descriptors + FEW) {
            leak(format!("{} descriptors, {} at the start", descriptors(pid), self.descriptors));
        }
        if !comes_true(|| rdma() == self.rdma) {
            leak(format!("RDMA objects: {:?}, {:?} at the start", rdma(), self.rdma));
        }
        let resident = resident_kib(pid);
        rig.count("KiB resident at the server's start", self.resident_kib);
        rig.count("KiB resident at the end", resident);
        if resident > self.resident_kib + KEPT_KIB {
            leak(format!("{resident} KiB resident, {} at the start", self.resident_kib));
        }
    }
}

/// Asks until it is so; for what no event tells.
fn comes_true(mut is_so: impl FnMut() -> bool) -> bool {
    let give_up = Instant::now() + DEADLINE / 4;
    while !is_so() {
        if Instant::now() > give_up {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}

/// By the server's own account there is no session but ours, and no guarded file.
fn nothing_is_held(url: &str) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = ConnectOptions::new(url).rdma_device(RdmaDevice::None);
        let session = Session::connect(options).await.map_err(|error| error.to_string())?;
        let give_up = Instant::now() + DEADLINE / 4;
        loop {
            let seen = session.inspect().await.map_err(|error| error.to_string())?;
            if seen.files.is_empty() && seen.sessions.len() == 1 {
                session.close().await;
                return Ok(());
            }
            if Instant::now() > give_up {
                return Err(format!("the server still holds {seen:?}"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
}

/// How many descriptors a process has.
pub fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// A process's leases, by proc_locks(5): number, kind, mode, access, process …
pub fn leases(pid: u32) -> Vec<String> {
    let locks = std::fs::read_to_string(Path::new("/proc/locks")).unwrap();
    let pid = pid.to_string();
    let of_it = |line: &&str| {
        let words: Vec<_> = line.split_whitespace().collect();
        ["LEASE", "DELEG"].contains(&words[1]) && words.contains(&pid.as_str())
    };
    locks.lines().filter(of_it).map(str::to_owned).collect()
}

/// The RDMA objects of the machine, by rdma-resource(8): `0: rxe0: pd 1 cq 1 qp 2 …`
pub fn rdma() -> BTreeMap<String, u64> {
    let output = Command::new("rdma").args(["resource", "show"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let words: Vec<_> = text.split_whitespace().collect();
    let mut counts = BTreeMap::new();
    for pair in words.windows(2) {
        if let Ok(count) = pair[1].parse::<u64>() {
            *counts.entry(pair[0].to_owned()).or_default() += count;
        }
    }
    counts
}
