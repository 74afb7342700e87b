//! Leaving a reader to the kernel: it waits for as long as lease-break-time, is let through, and the
//! guard lives on against writers. Only these tests wait for the kernel's own timer.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pinfold_lab::{Bench, LeaseBreakTimeSet, on_each_bench, read_by_another_process};
use pinfold_leases::{
    BreakKind, Error, Guard, GuardState, GuardTier, LeaseBreakTime, Mapping, NoOutwait,
};
use rustix::fs::{Mode, OFlags};

const LONGEST: Duration = Duration::from_secs(10);
const LEN: u64 = 8192;

fn guarded(bench: &Bench, name: &str, strongest: GuardTier) -> (Guard, Mapping) {
    if !bench.path(name).exists() {
        bench.make(name, &[7; LEN as usize]);
    }
    let armed = bench.open(name).arm_at_most(&bench.watcher, strongest).unwrap();
    assert_eq!(armed.tier(), strongest);
    armed.map(LEN).unwrap()
}

fn reader(path: &Path) -> Child {
    Command::new("cat").arg(path).stdout(Stdio::null()).spawn().unwrap()
}

fn broken_by_reader(bench: &Bench, guard: &Guard) {
    let news = bench.next_break();
    assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Reader));
}

fn outwait(guard: &Guard) -> Result<Duration, NoOutwait> {
    match guard.outwait(&LeaseBreakTime::open().unwrap(), LONGEST) {
        Ok(time) => Ok(time),
        Err(Error::CannotOutwait { why, .. }) => Err(why),
        Err(error) => panic!("{error}"),
    }
}

on_each_bench! {
    fn by_the_kernels_timer_a_reader_passes_and_the_guard_lives_on(bench in Bench) {
        let setting = LeaseBreakTimeSet::to(2);
        let (guard, mapping) = guarded(&bench, "file", GuardTier::Delegation);
        let path = bench.path("file");
        let mut first = reader(&path);
        broken_by_reader(&bench, &guard);
        assert_eq!(outwait(&guard), Ok(Duration::from_secs(2)));
        assert_eq!(guard.state().unwrap(), GuardState::Broken(BreakKind::Reader), "still waiting");
        assert_eq!(guard.tier(), GuardTier::Delegation);
        assert!(!guard.lapsed());

        assert!(first.wait().unwrap().success(), "the kernel lets it through");
        assert_eq!(guard.state().unwrap(), GuardState::ReadersPass);
        assert_eq!(guard.tier().to_string(), "delegation (read)");
        mapping.populate(0..LEN, || true).unwrap();
        // Whoever waited from here on would wait for ever.
        setting.change(0);
        assert_eq!(read_by_another_process(&path), [7; LEN as usize], "readers pass at once");
        assert_eq!(guard.state().unwrap(), GuardState::ReadersPass);

        let target = path.clone();
        let writer = std::thread::spawn(move || nix::unistd::truncate(&target, 1));
        let news = bench.next_break();
        assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Writer));
        assert_eq!(guard.state().unwrap(), GuardState::Broken(BreakKind::Writer));
        assert_eq!(fs::metadata(&path).unwrap().len(), LEN, "it is whole until we let go");
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Writer), false));
        writer.join().unwrap().unwrap();
        // An old mapping would be in a new description's way.
        drop(mapping);

        // A new guard is a whole one again.
        setting.change(45);
        let (guard, mapping) = guarded(&bench, "file", GuardTier::Delegation);
        assert_eq!(guard.state().unwrap(), GuardState::Held);
        let mut third = reader(&path);
        broken_by_reader(&bench, &guard);
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Reader), false));
        assert!(third.wait().unwrap().success());
        assert!(bench.rest().is_empty());
    }

    fn by_the_kernels_timer_with_one_second_too_and_the_release_says_so(bench in Bench) {
        let _setting = LeaseBreakTimeSet::to(1);
        let (guard, mapping) = guarded(&bench, "file", GuardTier::Delegation);
        let mut cat = reader(&bench.path("file"));
        broken_by_reader(&bench, &guard);
        assert_eq!(outwait(&guard), Ok(Duration::from_secs(1)));
        assert!(cat.wait().unwrap().success());
        assert!(guard.lapsed());
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Reader), true));
    }

    fn by_the_kernels_timer_an_open_for_reading_that_truncates_is_caught_afterwards(bench in Bench) {
        let _setting = LeaseBreakTimeSet::to(1);
        let (guard, mapping) = guarded(&bench, "file", GuardTier::Delegation);
        let path = bench.path("file");
        let mut cat = reader(&path);
        broken_by_reader(&bench, &guard);
        assert!(cat.wait().unwrap().success());
        let emptied = rustix::fs::open(&path, OFlags::RDONLY | OFlags::TRUNC, Mode::empty());
        assert_eq!(emptied.unwrap_err(), rustix::io::Errno::AGAIN);
        assert_eq!(bench.next_break().kind, BreakKind::Writer);
        assert_eq!(fs::metadata(&path).unwrap().len(), LEN);
        guard.release(mapping.fence().unwrap()).unwrap();
    }

    fn by_the_kernels_timer_a_lease_has_the_hole_and_is_refused(bench in Bench) {
        let _setting = LeaseBreakTimeSet::to(1);
        let (guard, mapping) = guarded(&bench, "file", GuardTier::Lease);
        let path = bench.path("file");
        assert_eq!(outwait(&guard), Err(NoOutwait::NotADelegation { tier: GuardTier::Lease }));
        let mut cat = reader(&path);
        broken_by_reader(&bench, &guard);
        assert!(!guard.lapsed());
        assert!(cat.wait().unwrap().success());
        // It is never taken for a guard that holds against writers, since it does not.
        assert_eq!(guard.state().unwrap(), GuardState::Broken(BreakKind::Reader));
        assert!(guard.lapsed());
        rustix::fs::open(&path, OFlags::RDONLY | OFlags::TRUNC, Mode::empty()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0, "the hole");
        guard.release(mapping.fence().unwrap()).unwrap();
        assert!(bench.rest().is_empty(), "and nobody was told");
    }

    fn a_reader_that_would_wait_for_ever_or_too_long_is_refused(bench in Bench) {
        let setting = LeaseBreakTimeSet::to(0);
        let (guard, mapping) = guarded(&bench, "file", GuardTier::Delegation);
        assert_eq!(outwait(&guard), Err(NoOutwait::Never));
        setting.change(11);
        let time = Duration::from_secs(11);
        assert_eq!(outwait(&guard), Err(NoOutwait::TooLong { time, longest: LONGEST }));
        setting.change(10);
        assert_eq!(outwait(&guard), Ok(LONGEST));
        guard.release(mapping.fence().unwrap()).unwrap();
    }

    fn by_the_kernels_timer_the_setting_counts_as_it_was_when_the_break_began(bench in Bench) {
        let setting = LeaseBreakTimeSet::to(0);
        let (never, never_mapping) = guarded(&bench, "never", GuardTier::Delegation);
        let mut waiting = reader(&bench.path("never"));
        broken_by_reader(&bench, &never);
        setting.change(2);
        let (soon, soon_mapping) = guarded(&bench, "soon", GuardTier::Delegation);
        let mut passing = reader(&bench.path("soon"));
        broken_by_reader(&bench, &soon);
        setting.change(0);
        assert!(passing.wait().unwrap().success(), "two seconds, though it is \"never\" by now");
        assert_eq!(soon.state().unwrap(), GuardState::ReadersPass);
        // The other began earlier, and two seconds were over for it, too.
        assert_eq!(never.state().unwrap(), GuardState::Broken(BreakKind::Reader));
        assert!(waiting.try_wait().unwrap().is_none());
        never.release(never_mapping.fence().unwrap()).unwrap();
        assert!(waiting.wait().unwrap().success());
        soon.release(soon_mapping.fence().unwrap()).unwrap();
    }
}
