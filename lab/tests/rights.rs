//! Who may guard a file: its owner without any capability, others with CAP_LEASE; and what is left
//! where the file system takes no lease at all.
#![forbid(unsafe_code)]

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use pinfold_lab::{Holder, HugePages, on_each_bench};
use pinfold_leases::{Error, Export, GuardState, GuardTier, MappingKind, RelativePath, Watcher};

/// nobody, with none of root's rights.
const NOBODY: u32 = 65534;
const AS_NOBODY: [&str; 4] = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];

fn open_to_all(path: &Path) {
    std::fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
}

on_each_bench! {
    fn the_owner_needs_no_capability(bench in Bench) {
        let path = bench.make("file", b"x");
        open_to_all(bench.folder());
        chown(&path, Some(NOBODY), None).unwrap();
        let (holder, said) = Holder::start(&AS_NOBODY, "guard", bench.folder(), "file");
        assert_eq!(said, "held: delegation");
        assert!(holder.release().contains("lapsed: false"));
    }

    fn another_user_is_told_which_capability_it_needs(bench in Bench) {
        let path = bench.make("file", b"x");
        open_to_all(bench.folder());
        open_to_all(&path);
        let (holder, said) = Holder::start(&AS_NOBODY, "guard", bench.folder(), "file");
        assert!(said.starts_with("refused") && said.contains("CAP_LEASE"), "{said}");
        holder.kill();
        let with: Vec<_> = AS_NOBODY
            .into_iter()
            .chain(["--inh-caps=+lease", "--ambient-caps=+lease"])
            .collect();
        let (holder, said) = Holder::start(&with, "guard", bench.folder(), "file");
        assert_eq!(said, "held: delegation");
        holder.release();
    }

    fn unguarded_is_held_for_good_and_nobody_is_held_up(bench in Bench) {
        let path = bench.make("file", &[7; 8192]);
        let file = bench.open("file");
        let armed = file.unguarded(&bench.watcher).unwrap();
        assert!(matches!(file.arm(&bench.watcher), Err(Error::AlreadyArmed { .. })));
        let (guard, mapping) = armed.map(8192).unwrap();
        assert_eq!(guard.tier(), GuardTier::Unguarded);
        // From this very thread: it would wait for itself.
        nix::unistd::truncate(&path, 10).unwrap();
        assert_eq!(guard.state().unwrap(), GuardState::Held);
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (None, false));
        // And the next guard is a whole one.
        let (guard, mapping) = file.arm(&bench.watcher).unwrap().map(10).unwrap();
        let cutter = std::thread::spawn(move || nix::unistd::truncate(&path, 0));
        assert_eq!(bench.next_break().guard, guard.id());
        guard.release(mapping.fence().unwrap()).unwrap();
        cutter.join().unwrap().unwrap();
        assert!(bench.rest().is_empty());
    }
}

#[test]
fn hugetlbfs_takes_no_guard_and_no_seal_but_goes_unguarded() {
    const LEN: u64 = 4 << 20;
    let huge = HugePages::mount(4);
    let path = huge.path().join("file");
    let file = std::fs::File::create(&path).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, LEN).unwrap();
    drop(file);
    let (watcher, _breaks) = Watcher::start().unwrap();
    let export = Export::open(huge.path()).unwrap();
    let file = export.locate(&RelativePath::parse("file").unwrap()).unwrap().open().unwrap();
    assert_eq!(file.kind().unwrap(), MappingKind::SharedMemory);
    let refused = file.arm(&watcher).unwrap_err();
    assert!(matches!(refused, Error::NoGuard { .. }), "{refused}");
    let refused = file.arm_to_seal(&watcher).unwrap_err();
    assert!(matches!(refused, Error::NoSeal { .. }), "{refused}");
    let (guard, mapping) = file.unguarded(&watcher).unwrap().map(LEN).unwrap();
    mapping.populate(0..LEN, || true).unwrap();
    mapping.flush(0..LEN).unwrap();
    guard.release(mapping.fence().unwrap()).unwrap();
}
