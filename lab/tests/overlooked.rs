//! Who unlinks, renames or changes modes has no count on the file while it waits. Woken by a release
//! and slow to get a processor, it finds a new guard, goes back to waiting, and the kernel tells its
//! holder nothing (`__break_lease` in fs/locks.c): the watcher looks for such.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Command, Stdio};

use pinfold_lab::{Bench, Busy, DEADLINE, Process, eventually, in_time, on_each_bench};
use pinfold_leases::{BreakKind, Error, GuardState, GuardTier, waiting_breakers};

const LEN: u64 = 8192;

/// Starts a command on the processor that can be kept busy.
fn there(words: &[&str], path: &Path) -> Process {
    let mut command = Command::new("taskset");
    Process::start(command.args(["-c", Busy::PROCESSOR]).args(words).arg(path).stdin(Stdio::null()))
}

/// It waits for our guard, and gets no processor when that is let go.
fn woken(bench: &Bench, words: &[&str]) -> (pinfold_leases::Description, Process, Busy) {
    bench.make("file", &[7; LEN as usize]);
    let file = bench.open("file");
    let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(LEN).unwrap();
    assert_eq!(guard.tier(), GuardTier::Delegation);
    let late = there(words, &bench.path("file"));
    let kind = bench.next_break().kind;
    let waits = async || !waiting_breakers(file.identity()).is_empty();
    in_time(DEADLINE, eventually("it waits", waits));
    let busy = Busy::start();
    let released = guard.release(mapping.fence().unwrap()).unwrap();
    assert_eq!(released.broken, Some(kind));
    (file, late, busy)
}

fn is_found(bench: &Bench, words: &[&str]) {
    let (file, mut late, busy) = woken(bench, words);
    let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(LEN).unwrap();
    assert_eq!(guard.state().unwrap(), GuardState::Held);
    drop(busy);

    let news = bench.next_break();
    assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Writer));
    assert_eq!(guard.state().unwrap(), GuardState::Broken(BreakKind::Writer));
    assert!(!late.has_ended(), "it waits for us");
    let released = guard.release(mapping.fence().unwrap()).unwrap();
    assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Writer), false));
    in_time(DEADLINE, late.done("it has the file"));
}

on_each_bench! {
    fn who_changes_modes_and_comes_late_is_found(bench in Bench) {
        is_found(&bench, &["chmod", "600"]);
    }

    fn who_unlinks_and_comes_late_is_found(bench in Bench) {
        is_found(&bench, &["unlink"]);
    }

    /// Who opens the file counts as having it, so that there is no new guard.
    fn who_opens_and_comes_late_has_the_file(bench in Bench) {
        for words in [["wc", "-c"].as_slice(), &["tee"]] {
            let (file, mut late, busy) = woken(&bench, words);
            let refused = file.arm(&bench.watcher).unwrap_err();
            assert!(matches!(refused, Error::Busy { .. }), "{refused}");
            drop(busy);
            in_time(DEADLINE, late.done("it has the file"));
        }
    }
}
