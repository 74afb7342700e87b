//! Thousands of guarded files, wanted back all at once: every break is reported, once, by signals
//! alone, also where the kernel's signal queue is too small for them.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pinfold_lab::{Bench, FileSystem, on_each_bench};
use pinfold_leases::{BreakKind, Description, Guard, GuardId, GuardState, Mapping};

const FILES: usize = 4096;
const PROCESSES: usize = 8;
/// Files, and what else a process has open.
const DESCRIPTORS: u64 = FILES as u64 + 512;

fn name(number: usize) -> String {
    format!("file{number}")
}

/// Sets the soft limit of this process, and puts it back after.
struct Limit(Resource, u64);

impl Limit {
    fn set(resource: Resource, limit: u64) -> Self {
        let (soft, hard) = getrlimit(resource).unwrap();
        setrlimit(resource, limit, hard.max(limit)).unwrap();
        Self(resource, soft)
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        let (_, hard) = getrlimit(self.0).unwrap();
        setrlimit(self.0, self.1, hard).unwrap();
    }
}

type Held = BTreeMap<GuardId, (Guard, Mapping)>;

fn arm_all(bench: &Bench, files: &[Description]) -> Held {
    let arm = |file: &Description| file.arm(&bench.watcher).unwrap().map(1).unwrap();
    files.iter().map(arm).map(|(guard, mapping)| (guard.id(), (guard, mapping))).collect()
}

/// Processes that want one file after the other, and are told each time to come again later: so
/// the breaks come as fast as they can be made.
fn storm(paths: &[PathBuf]) -> Vec<Child> {
    paths
        .chunks(paths.len().div_ceil(PROCESSES))
        .map(|share| {
            let mut command = Command::new("truncate");
            command.args(["-c", "-s", "0"]).args(share).stderr(Stdio::null());
            command.spawn().unwrap()
        })
        .collect()
}

/// One break of each, and lets each go.
fn take_breaks(bench: &Bench, mut held: Held) {
    while !held.is_empty() {
        let news = bench.next_break();
        let (guard, mapping) = held.remove(&news.guard).expect("reported twice, or of no guard");
        assert_eq!(news.kind, BreakKind::Writer);
        assert_eq!(guard.state().unwrap(), GuardState::Broken(BreakKind::Writer));
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Writer), false));
    }
}

/// Two storms over the same files, with the signal queue as it is or as small as asked for.
fn storms(queue: Option<u64>) {
    let _descriptors = Limit::set(Resource::RLIMIT_NOFILE, DESCRIPTORS);
    let bench = Bench::on(FileSystem::Ext4);
    let paths: Vec<_> = (0..FILES).map(|number| bench.make(&name(number), b"x")).collect();
    let files: Vec<_> = (0..FILES).map(|number| bench.open(&name(number))).collect();
    let _queue = queue.map(|limit| Limit::set(Resource::RLIMIT_SIGPENDING, limit));
    for _ in 0..2 {
        let held = arm_all(&bench, &files);
        let processes = storm(&paths);
        take_breaks(&bench, held);
        for mut process in processes {
            assert!(!process.wait().unwrap().success(), "it was told to come again later");
        }
    }
    assert_eq!(bench.rest().len(), 0, "some were reported twice");
}

#[test]
fn each_of_thousands_of_breaks_is_reported_once() {
    storms(None);
}

#[test]
fn each_is_reported_once_though_no_signal_can_be_queued() {
    storms(Some(0));
}

#[test]
fn each_is_reported_once_though_the_queue_overflows_now_and_then() {
    storms(Some(3));
}

on_each_bench! {
    fn while_one_is_not_let_go_the_others_are(bench in Bench) {
        const FEW: usize = 32;
        let paths: Vec<_> = (0..FEW).map(|number| bench.make(&name(number), b"x")).collect();
        let files: Vec<_> = (0..FEW).map(|number| bench.open(&name(number))).collect();
        let guards = files.iter().map(|file| file.arm(&bench.watcher).unwrap().map(1).unwrap());
        let mut held: Vec<_> = guards.map(Some).collect();
        let ids: Vec<_> = held.iter().flatten().map(|(guard, _)| guard.id()).collect();
        let number_of = |id| ids.iter().position(|other| *other == id).unwrap();
        let mut cutters: Vec<_> = paths
            .into_iter()
            .map(|path| std::thread::spawn(move || nix::unistd::truncate(&path, 0)))
            .collect();
        let slow = number_of(bench.next_break().guard);
        let mut seen = BTreeSet::from([slow]);
        while seen.len() < FEW {
            let number = number_of(bench.next_break().guard);
            assert!(seen.insert(number), "reported twice");
            let (guard, mapping) = held[number].take().unwrap();
            guard.release(mapping.fence().unwrap()).unwrap();
        }
        let (guard, mapping) = held[slow].take().unwrap();
        let last = cutters.swap_remove(slow);
        for cutter in cutters {
            cutter.join().unwrap().unwrap();
        }
        assert!(!last.is_finished(), "it waits for us");
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Writer), false));
        last.join().unwrap().unwrap();
        assert!(bench.rest().is_empty());
    }

    fn a_writer_behind_a_reader_is_reported_too(bench in Bench) {
        let path = bench.make("file", b"x");
        let (guard, mapping) = bench.open("file").arm(&bench.watcher).unwrap().map(1).unwrap();
        let mut cat = Command::new("cat").arg(&path).stdout(Stdio::null()).spawn().unwrap();
        let news = bench.next_break();
        assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Reader));
        let cutter = std::thread::spawn(move || nix::unistd::truncate(&path, 0));
        let news = bench.next_break();
        assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Writer));
        guard.release(mapping.fence().unwrap()).unwrap();
        assert!(cat.wait().unwrap().success());
        cutter.join().unwrap().unwrap();
        assert!(bench.rest().is_empty());
    }
}
