//! A sealed file: whoever would cut it, move it or take its name away fails at once, readers pass,
//! and nothing is revoked. A crash leaves it sealed, and the mark says that it may be lifted.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pinfold_lab::{Bench, Holder, Opener, on_each_bench, read_by_another_process};
use pinfold_leases::{BreakKind, Error, Guard, GuardState, GuardTier, Mapping};
use rustix::fs::{FallocateFlags, fallocate};

const LEN: u64 = 64 << 10;
const MARK: &str = "user.pinfold.seal";

fn sealed(bench: &Bench) -> (PathBuf, Guard, Mapping) {
    let path = bench.make("file", &[7; LEN as usize]);
    let armed = bench.open("file").arm_to_seal(&bench.watcher).unwrap();
    let (guard, mapping) = armed.map(LEN).unwrap();
    assert_eq!((guard.tier(), guard.state().unwrap()), (GuardTier::Sealed, GuardState::Held));
    (path, guard, mapping)
}

fn is_marked(path: &Path) -> bool {
    rustix::fs::getxattr(path, MARK, &mut [0; 16]).is_ok()
}

fn chattr(change: &str, path: &Path) {
    assert!(Command::new("chattr").arg(change).arg(path).status().unwrap().success());
}

fn is_append_only(path: &Path) -> bool {
    let output = Command::new("lsattr").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().contains('a')
}

/// As an appender, the only kind of writer that gets in, and then more than appending.
fn on_appender(path: &Path, flags: FallocateFlags) -> io::Result<()> {
    let file = OpenOptions::new().append(true).open(path)?;
    Ok(fallocate(&file, flags, 0, 4096)?)
}

type Operation = (&'static str, fn(&Path) -> io::Result<()>);

const FORBIDDEN: [Operation; 11] = [
    ("truncate", |path| Ok(nix::unistd::truncate(path, 10)?)),
    ("grow", |path| Ok(nix::unistd::truncate(path, 1 << 20)?)),
    ("open for writing", |path| OpenOptions::new().write(true).open(path).map(drop)),
    ("open and empty", |path| File::create(path).map(drop)),
    ("open for appending and empty", |path| {
        let flags =
            rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::APPEND | rustix::fs::OFlags::TRUNC;
        Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map(drop)?)
    }),
    ("open for reading and empty", |path| {
        let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::TRUNC;
        Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty()).map(drop)?)
    }),
    ("punch", |path| on_appender(path, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE)),
    ("collapse", |path| on_appender(path, FallocateFlags::COLLAPSE_RANGE)),
    ("unlink", |path| fs::remove_file(path)),
    ("rename", |path| fs::rename(path, path.with_extension("moved"))),
    ("link", |path| fs::hard_link(path, path.with_extension("linked"))),
];

fn is_eperm(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::EPERM)
}

on_each_bench! {
    fn who_would_cut_or_move_it_fails_at_once_and_readers_pass(bench in Bench) {
        let (path, guard, mapping) = sealed(&bench);
        let inode = format!(":{} ", bench.locate("file").identity().inode);
        let locks = fs::read_to_string("/proc/locks").unwrap();
        assert!(!locks.contains(&inode), "the flag alone holds it, and no reader waits: {locks}");
        for (name, operation) in FORBIDDEN {
            let error = operation(&path).err().unwrap_or_else(|| panic!("{name} went through"));
            assert!(is_eperm(&error), "{name}: {error}");
        }
        let other = bench.make("other", b"other");
        assert!(is_eperm(&fs::rename(&other, &path).unwrap_err()), "rename over it");
        assert_eq!(read_by_another_process(&path), [7; LEN as usize]);
        let reading = Opener::reading(&path);
        mapping.populate(0..LEN, || true).unwrap();
        mapping.flush(0..LEN).unwrap();
        drop(reading);
        assert_eq!(guard.state().unwrap(), GuardState::Held);
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed, released.still_sealed), (None, false, false));
        assert!(!is_append_only(&path) && !is_marked(&path));
        // And it is a file like any other again.
        nix::unistd::truncate(&path, 0).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(bench.rest().is_empty(), "nothing was a break");
    }

    fn what_appenders_add_lies_past_the_mapped_content(bench in Bench) {
        let (path, guard, mapping) = sealed(&bench);
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"more").unwrap();
        let content = read_by_another_process(&path);
        assert_eq!(content[..LEN as usize], [7; LEN as usize]);
        assert_eq!(&content[LEN as usize..], b"more");
        assert_eq!(guard.state().unwrap(), GuardState::Held);
        guard.release(mapping.fence().unwrap()).unwrap();
        assert!(bench.rest().is_empty());
    }

    fn a_flag_that_is_gone_is_a_break(bench in Bench) {
        let (path, guard, mapping) = sealed(&bench);
        chattr("-a", &path);
        let news = bench.next_break();
        assert_eq!((news.guard, news.kind), (guard.id(), BreakKind::Writer));
        assert_eq!(guard.state().unwrap(), GuardState::Broken(BreakKind::Writer));
        let released = guard.release(mapping.fence().unwrap()).unwrap();
        assert_eq!((released.broken, released.lapsed), (Some(BreakKind::Writer), true));
        assert!(!released.still_sealed && !is_marked(&path));
        assert!(bench.rest().is_empty(), "it was reported once");
    }

    fn a_crash_leaves_it_sealed_until_it_is_lifted_by_the_mark(bench in Bench) {
        let path = bench.make("file", &[7; LEN as usize]);
        let (holder, said) = Holder::start(&[], "seal", bench.folder(), "file");
        assert_eq!(said, "held: sealed");
        let located = bench.locate("file");
        let Err(Error::Busy { openers, .. }) = located.unseal() else { panic!("lifted under it") };
        assert_eq!(openers.iter().map(|opener| opener.pid).collect::<Vec<_>>(), [holder.pid()]);
        assert!(is_append_only(&path) && is_marked(&path));

        holder.kill();
        assert!(located.is_sealed());
        assert!(is_eperm(&nix::unistd::truncate(&path, 0).map_err(io::Error::from).unwrap_err()));
        let refused = located.open().unwrap_err();
        assert!(matches!(refused, Error::Sealed { .. }), "{refused}");
        assert!(refused.to_string().contains("unseal"), "{refused}");
        assert!(located.unseal().unwrap());
        assert!(!is_append_only(&path) && !is_marked(&path) && !located.is_sealed());
        assert!(!located.unseal().unwrap(), "there is none any more");
        assert_eq!(read_by_another_process(&path), [7; LEN as usize]);
        let (guard, mapping) =
            located.open().unwrap().arm_to_seal(&bench.watcher).unwrap().map(LEN).unwrap();
        guard.release(mapping.fence().unwrap()).unwrap();
    }

    fn an_administrators_own_flag_is_left_alone(bench in Bench) {
        let path = bench.make("file", b"log");
        chattr("+a", &path);
        let located = bench.locate("file");
        let refused = located.open().unwrap_err();
        assert!(refused.to_string().contains("chattr"), "{refused}");
        assert!(!located.unseal().unwrap());
        assert!(is_append_only(&path), "it was not ours to clear");
        chattr("-a", &path);
    }

    fn a_seal_needs_the_file_to_itself_and_leaves_no_mark_where_it_fails(bench in Bench) {
        let path = bench.make("file", b"used");
        let other = Opener::reading(&path);
        let refused = bench.open("file").arm_to_seal(&bench.watcher).unwrap_err();
        let Error::Busy { openers, .. } = refused else { panic!("{refused}") };
        assert_eq!(openers[0].pid, other.pid());
        assert!(!is_marked(&path) && !is_append_only(&path));
        drop(other);
        drop(bench.open("file").arm_to_seal(&bench.watcher).unwrap());
        assert!(!is_marked(&path) && !is_append_only(&path), "armed, and let go again");
    }

    fn who_asked_to_cut_it_before_it_was_sealed_is_a_break(bench in Bench) {
        let path = bench.make("file", &[7; 100]);
        let armed = bench.open("file").arm_to_seal(&bench.watcher).unwrap();
        let target = path.clone();
        let cutter = std::thread::spawn(move || nix::unistd::truncate(&target, 10));
        assert_eq!(bench.next_break().kind, BreakKind::Writer);
        let refused = armed.map(100).unwrap_err();
        assert!(matches!(refused, Error::Broken), "{refused}");
        cutter.join().unwrap().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 10);
        assert!(!is_append_only(&path) && !is_marked(&path));
    }

    fn who_asked_to_read_it_before_it_was_sealed_reads_it(bench in Bench) {
        let path = bench.make("file", &[7; 100]);
        let armed = bench.open("file").arm_to_seal(&bench.watcher).unwrap();
        let mut cat = Command::new("cat").arg(&path).stdout(Stdio::null()).spawn().unwrap();
        assert_eq!(bench.next_break().kind, BreakKind::Reader);
        let (guard, mapping) = armed.map(100).unwrap();
        assert!(cat.wait().unwrap().success());
        assert_eq!(guard.state().unwrap(), GuardState::Held);
        guard.release(mapping.fence().unwrap()).unwrap();
    }

    fn without_the_capability_it_is_refused_by_its_name(bench in Bench) {
        let path = bench.make("file", b"x");
        let without = ["setpriv", "--inh-caps=-linux_immutable", "--bounding-set=-linux_immutable"];
        let (holder, said) = Holder::start(&without, "seal", bench.folder(), "file");
        assert!(said.contains("refused") && said.contains("CAP_LINUX_IMMUTABLE"), "{said}");
        holder.kill();
        assert!(!is_marked(&path) && !is_append_only(&path));
    }
}
