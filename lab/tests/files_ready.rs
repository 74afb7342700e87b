//! Files made ready for hardware: DAX asked for file by file, and how large their pages can be.
#![forbid(unsafe_code)]

use std::process::Command;

use pinfold_lab::{Bench, FileSystem, on_each_bench};
use pinfold_leases::{Create, Error, Export, GuardTier, MappingKind, RelativePath, Resized, Under};

const HUGE: u64 = 2 << 20;

/// One of the lab's file systems, mounted with other options; as the lab has it after.
struct Remounted(FileSystem);

impl Remounted {
    fn with(file_system: FileSystem, options: &str) -> Self {
        file_system.remount(options);
        Self(file_system)
    }
}

impl Drop for Remounted {
    fn drop(&mut self) {
        self.0.remount("dax=always");
    }
}

fn dax_is_asked_for_file_by_file(file_system: FileSystem) {
    let _mounted = Remounted::with(file_system, "dax=inode");
    let folder = tempfile::tempdir_in(file_system.mount_point()).unwrap();
    let export = Export::open(folder.path()).unwrap();
    for (name, dax, kind) in
        [("with", true, MappingKind::FsDax), ("without", false, MappingKind::PageCache)]
    {
        let create = Create { size: HUGE, mode: 0o600, dax };
        let path = RelativePath::parse(name).unwrap();
        let file = export.create(&path, &create).unwrap();
        assert_eq!(file.kind().unwrap(), kind, "{name}");
        assert_eq!(file.size().unwrap(), HUGE);
        assert_eq!(export.locate(&path).unwrap().dax(), dax);
        let again = export.create(&path, &create);
        assert!(matches!(again, Err(Error::Exists { .. })));
    }
}

#[test]
fn dax_is_asked_for_file_by_file_on_ext4() {
    dax_is_asked_for_file_by_file(FileSystem::Ext4);
}

#[test]
fn dax_is_asked_for_file_by_file_on_xfs() {
    dax_is_asked_for_file_by_file(FileSystem::Xfs);
}

#[test]
fn a_quota_that_is_used_up_is_refused_and_the_file_stays_as_it_was() {
    // nobody's
    const OWNER: u32 = 65534;
    let _mounted = Remounted::with(FileSystem::Xfs, "dax=always,uquota");
    let bench = Bench::on(FileSystem::Xfs);
    let limit = format!("limit -u bhard=1m {OWNER}");
    let mut quota = Command::new("xfs_quota");
    quota.args(["-x", "-c", &limit]).arg(FileSystem::Xfs.mount_point());
    assert!(quota.status().unwrap().success());
    let path = bench.make("file", &[7; 4096]);
    std::os::unix::fs::chown(&path, Some(OWNER), None).unwrap();
    let file = bench.open("file");
    let used_up = |refused: Error| match refused {
        Error::NoSpace { source, .. } => source.raw_os_error() == Some(nix::libc::EDQUOT),
        error => panic!("{error}"),
    };
    let armed = file.arm_at_most(&bench.watcher, GuardTier::Lease).unwrap();
    assert!(used_up(armed.grow(HUGE, &mut |_| true).unwrap_err()));
    drop(armed);
    let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(4096).unwrap();
    let under = Under { tier: guard.tier(), lapsed: &|| false };
    assert!(used_up(file.grow(HUGE, under, &mut |_| true).unwrap_err()));
    assert_eq!(file.size().unwrap(), 4096);
    guard.release(mapping.fence().unwrap()).unwrap();
    assert!(bench.rest().is_empty());
    drop((file, mapping));
}

/// Free space of the file system that has this file, in bytes.
fn free_bytes(file: &std::path::Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(file).unwrap();
    stat.blocks_available() * stat.fragment_size()
}

on_each_bench! {
    fn a_growth_that_finds_no_room_on_its_way_gives_back_what_it_took(bench in Bench) {
        let path = bench.make("file", &[7; 4096]);
        let file = bench.open("file");
        let used = file.allocated().unwrap();
        for tier in [GuardTier::Lease, GuardTier::Delegation] {
            let free = free_bytes(&path);
            let (guard, mapping) = file.arm_at_most(&bench.watcher, tier).unwrap().map(4096).unwrap();
            assert_eq!(guard.tier(), tier);
            let under = Under { tier, lapsed: &|| false };
            // There is room when the growth begins, and others take it then.
            let taken = bench.path("taken");
            let refused = file.grow(free / 4 * 3, under, &mut |_| {
                let others = std::fs::File::create(&taken).unwrap();
                nix::fcntl::fallocate(others, nix::fcntl::FallocateFlags::empty(), 0, (free / 2) as i64)
                    .unwrap();
                true
            });
            let Err(Error::NoSpace { kept_bytes, .. }) = refused else { panic!("{refused:?}") };
            println!("{tier}: {kept_bytes} bytes of {free} are kept");
            std::fs::remove_file(taken).unwrap();
            assert_eq!(file.size().unwrap(), 4096);
            // ext4 frees nothing past the end under a delegation.
            let ext4 = FileSystem::Ext4.mount_point();
            assert!(kept_bytes == 0 || (tier == GuardTier::Delegation && path.starts_with(ext4)));
            guard.release(mapping.fence().unwrap()).unwrap();
            drop(mapping);
            let armed = file.arm_at_most(&bench.watcher, GuardTier::Lease).unwrap();
            armed.give_back().unwrap();
            // ext4 keeps a block for its tree of extents.
            assert!(file.allocated().unwrap() <= used + (64 << 10));
        }
        assert!(bench.rest().is_empty());
    }

    fn a_growth_on_dax_writes_zeroes_and_stops_for_others(bench in Bench) {
        let path = bench.make("file", &[7; 4096]);
        let file = bench.open("file");
        let armed = file.arm_at_most(&bench.watcher, GuardTier::Lease).unwrap();
        let grown = armed.grow(2 * HUGE, &mut |_| true).unwrap();
        assert_eq!(grown, Resized { size: 2 * HUGE, complete: true });
        let layout = file.layout().unwrap();
        println!("{layout:?}");
        let mut child = None;
        let stopped = armed.grow(32 * HUGE, &mut |progress| {
            if progress.done_bytes > 0 && child.is_none() {
                let append = Command::new("sh").args(["-c", "printf x >> \"$1\"", "sh"]).arg(&path).spawn();
                child = Some(append.unwrap());
                while armed.is_held() {
                    std::thread::yield_now();
                }
            }
            true
        });
        let stopped = stopped.unwrap();
        assert!(!stopped.complete && stopped.size > 2 * HUGE && stopped.size < 32 * HUGE, "{stopped:?}");
        let spare = file.allocated().unwrap().saturating_sub(stopped.size.next_multiple_of(HUGE));
        println!("stopped at {}, {spare} bytes allocated past it", stopped.size);
        drop(armed);
        assert!(child.unwrap().wait().unwrap().success());
        assert_eq!(file.size().unwrap(), stopped.size + 1);
        let mut last = [0];
        file.read_at(&mut last, stopped.size).unwrap();
        assert_eq!(&last, b"x");
        assert!(spare < HUGE, "what was not used is given back");
    }

    fn the_layout_says_which_pieces_can_have_huge_pages(bench in Bench) {
        let create = Create { size: 4 * HUGE + 10, mode: 0o600, dax: false };
        let file = bench.export.create(&RelativePath::parse("large").unwrap(), &create).unwrap();
        let layout = file.layout().unwrap();
        println!("{layout:?}");
        assert_eq!(layout.whole_pieces, 4 * HUGE);
        assert!(layout.extents >= 1 && layout.huge_bytes <= layout.whole_pieces);
        let all = layout.huge_bytes == layout.whole_pieces;
        assert_eq!(layout.page_size, if all { HUGE } else { 4096 });
        // filefrag(8) counts the same extents, in another process, when we have closed it.
        drop(file);
        let output = Command::new("filefrag").arg(bench.path("large")).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let counted = text.split(": ").last().unwrap().split(' ').next().unwrap().to_owned();
        assert!(output.status.success() && counted == layout.extents.to_string(), "{text}");

        let small = Create { size: HUGE - 1, mode: 0o600, dax: false };
        let small = bench.export.create(&RelativePath::parse("small").unwrap(), &small).unwrap();
        assert_eq!(small.layout().unwrap().page_size, 4096);
    }

    fn what_there_is_no_room_for_is_refused_and_leaves_nothing(bench in Bench) {
        let create = Create { size: 1 << 40, mode: 0o600, dax: true };
        let refused = bench.export.create(&RelativePath::parse("huge").unwrap(), &create);
        let refused = refused.unwrap_err();
        assert!(matches!(refused, Error::NoSpace { bytes, .. } if bytes == 1 << 40), "{refused}");
        assert!(!bench.path("huge").exists());
    }
}
