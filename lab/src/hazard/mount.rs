//! Hazards that concern a whole file system. They run one at a time.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pinfold_leases::GuardTier;

use super::cell::{Bench, Outcome, Seen, make};
use super::place::Place;

const PAGE: u64 = 4096;
/// As the machine-check handler would: "hard offline", Documentation/mm/hwpoison.rst. The address
/// follows.
const OFFLINE: [&str; 4] =
    ["run", "sh", "-c", "printf %s \"$0\" >/sys/devices/system/memory/hard_offline_page"];

/// A row of the table about the whole file system.
#[derive(Clone, Copy, Debug)]
pub struct MountHazard {
    /// What a process does.
    pub name: &'static str,
    /// Why it is harmless, or what it means that it is not covered; said where it is so.
    pub note: &'static str,
    /// Makes no sense on tmpfs.
    pub needs_device: bool,
    /// Brings it about.
    pub run: fn(&Bench, &Place, GuardTier) -> Outcome,
}

/// The rows, in the order of the table.
pub const MOUNT_HAZARDS: &[MountHazard] = &[
    MountHazard {
        name: "open for writing through a bind mount",
        note: "",
        needs_device: false,
        run: |bench, place, tier| {
            let (folder, path) = make(place.path());
            let again = place.mount_again(folder.path());
            let there = again.path().join("file");
            bench.does_elsewhere(&path, tier, &["open-write"], &there).outcome()
        },
    },
    MountHazard {
        name: "truncate(2) through a second mount",
        note: "",
        needs_device: true,
        run: |bench, place, tier| {
            let (_folder, path) = make(place.path());
            let again = place.mount_again(place.path());
            let there = below(again.path(), place, &path);
            bench.does_elsewhere(&path, tier, &["truncate"], &there).outcome()
        },
    },
    MountHazard {
        name: "umount",
        note: "",
        needs_device: false,
        run: |bench, place, tier| on_second_mount(bench, place, tier, "umount"),
    },
    MountHazard {
        name: "lazy umount, then an open by another mount",
        note: "the mount goes, the file system and the guard stay until we let go",
        needs_device: false,
        run: |bench, place, tier| {
            let (_folder, path) = make(place.path());
            let again = place.mount_again(place.path());
            let umount = bench.start(&["umount-lazy"], again.path());
            let open = bench.start(&["open-write"], &path);
            let held = bench.hold(&below(again.path(), place, &path), tier).unwrap();
            match held.undisturbed_by(umount) {
                None => harmless_before(held.watch(open).outcome(), tier),
                Some(errno) => Outcome::Refused { errno, told: false },
            }
        },
    },
    MountHazard {
        name: "remount read-only",
        note: "",
        needs_device: false,
        run: |bench, place, tier| on_second_mount(bench, place, tier, "remount-read-only"),
    },
    MountHazard {
        name: "freeze (`fsfreeze`, snapshots)",
        note: "the guard stands and can be let go meanwhile; but a remote fault that the frozen \
               file system holds up also holds up the fence (see below)",
        needs_device: true,
        run: |bench, place, tier| {
            let (_folder, path) = make(place.path());
            let freeze = bench.start(&["freeze"], place.path());
            let thaw = bench.start(&["thaw"], place.path());
            let held = bench.hold(&path, tier).unwrap();
            let frozen = held.undisturbed_by(freeze);
            let whole = held.is_whole();
            let thawed = held.undisturbed_by(thaw);
            held.release();
            assert_eq!(frozen, thawed, "freeze and thaw");
            Seen { refused_us: false, told: None, waited: false, errno: frozen, changed: !whole }
                .outcome()
        },
    },
    MountHazard {
        name: "shutdown (`XFS_IOC_GOINGDOWN`, `EXT4_IOC_SHUTDOWN`, a dying disk)",
        note: "the guard stands and no block goes to another file, but the file can't be read or \
               made durable any more",
        needs_device: true,
        run: |bench, place, tier| {
            let (folder, path) = make(place.path());
            let shutdown = bench.start(&["shutdown"], place.path());
            let held = bench.hold(&path, tier).unwrap();
            let errno = held.undisturbed_by(shutdown);
            let whole = held.is_whole();
            held.release();
            // The file system is dead: nothing can be removed from it.
            let _ = folder.keep();
            place.renew();
            Seen { refused_us: false, told: None, waited: false, errno, changed: !whole }.outcome()
        },
    },
    MountHazard {
        name: "a memory failure in one of its pages (pmem)",
        note: "the kernel unmaps the page; guard and process go on",
        needs_device: true,
        run: |bench, place, tier| {
            if !place.is_dax() {
                return Outcome::Absent;
            }
            let (_folder, path) = make(place.path());
            let held = bench.hold(&path, tier).unwrap();
            // Done by another process: who injects one into his own memory gets the signal of a
            // processor that ran into it.
            let address = format!("{:#x}", page_frame(&path) * PAGE);
            let failed = held.undisturbed_by(bench.start(&OFFLINE, Path::new(&address)));
            assert_eq!(failed, None, "injecting it");
            if !held.is_whole() {
                return Outcome::NotCovered;
            }
            let open = bench.start(&["open-write"], &path);
            harmless_before(held.watch(open).outcome(), tier)
        },
    },
];

/// What leaves the guard as it was, as the next one shows who opens the file for writing.
fn harmless_before(next: Outcome, tier: GuardTier) -> Outcome {
    match (next, tier) {
        (Outcome::Held, _)
        | (Outcome::Refused { .. }, GuardTier::Sealed)
        | (Outcome::Harmless, GuardTier::Unguarded) => Outcome::Harmless,
        _ => Outcome::NotCovered,
    }
}

/// The page frame of the first page of our own mapping of a file: proc_pid_pagemap(5).
fn page_frame(path: &Path) -> u64 {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with(path.to_str().unwrap())).unwrap();
    let address = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
    let mut entry = [0; 8];
    let pagemap = fs::File::open("/proc/self/pagemap").unwrap();
    pagemap.read_exact_at(&mut entry, address / PAGE * 8).unwrap();
    let entry = u64::from_le_bytes(entry);
    assert!(entry >> 63 == 1, "the page is not there: {entry:#x}");
    entry & ((1 << 55) - 1)
}

/// A file's path by another mount of its file system.
fn below(mount_point: &Path, place: &Place, path: &Path) -> PathBuf {
    mount_point.join(path.strip_prefix(place.path()).unwrap())
}

/// Does something to the mount that the guarded file is reached by.
fn on_second_mount(bench: &Bench, place: &Place, tier: GuardTier, thing: &str) -> Outcome {
    let (_folder, path) = make(place.path());
    let again = place.mount_again(place.path());
    let there = below(again.path(), place, &path);
    bench.does_elsewhere(&there, tier, &[thing], again.path()).outcome()
}
