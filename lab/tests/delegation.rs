//! A delegation holds names and attributes too: whoever would change them waits until we let go,
//! the client is told, and then it is done. A reader waits as well, and reads all of it.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pinfold_lab::{
    ForeignClient, ForeignLane, Lab, Pattern, on_each_file_system, read_by_another_process,
};
use pinfold_proto::v1;
use pinfold_proto::v1::RevocationReason;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Timespec, Timestamps, XattrFlags};

const PAGE: usize = 4096;
const LEN: usize = 4 * PAGE;

/// What a local process does to a file, and how one sees that it is done without opening it.
struct Operation {
    name: &'static str,
    run: fn(&Path) -> io::Result<()>,
    done: fn(&Path) -> bool,
}

/// A second name, or another file, beside a file.
fn beside(path: &Path) -> PathBuf {
    path.with_extension("beside")
}

fn size(path: &Path) -> u64 {
    fs::metadata(path).unwrap().size()
}

const OPERATIONS: [Operation; 11] = [
    Operation { name: "unlink", run: |path| fs::remove_file(path), done: |path| !path.exists() },
    Operation {
        name: "rename",
        run: |path| fs::rename(path, beside(path)),
        done: |path| !path.exists() && beside(path).exists(),
    },
    Operation {
        name: "rename over it",
        run: |path| fs::rename(beside(path), path),
        done: |path| !beside(path).exists() && size(path) == 3,
    },
    Operation {
        name: "link",
        run: |path| fs::hard_link(path, beside(path)),
        done: |path| beside(path).exists(),
    },
    Operation {
        name: "chmod",
        run: |path| fs::set_permissions(path, fs::Permissions::from_mode(0o600)),
        done: |path| fs::metadata(path).unwrap().mode() & 0o777 == 0o600,
    },
    Operation {
        name: "chown",
        run: |path| std::os::unix::fs::chown(path, Some(1), None),
        done: |path| fs::metadata(path).unwrap().uid() == 1,
    },
    Operation {
        name: "utimensat",
        run: |path| {
            let time = Timespec { tv_sec: 4711, tv_nsec: 0 };
            let times = Timestamps { last_access: time, last_modification: time };
            Ok(rustix::fs::utimensat(CWD, path, &times, AtFlags::empty())?)
        },
        done: |path| fs::metadata(path).unwrap().mtime() == 4711,
    },
    Operation {
        name: "setxattr",
        run: |path| Ok(rustix::fs::setxattr(path, "user.lab", b"1", XattrFlags::empty())?),
        done: |path| rustix::fs::getxattr(path, "user.lab", &mut [0; 1]).is_ok(),
    },
    Operation {
        name: "truncate",
        run: |path| Ok(nix::unistd::truncate(path, PAGE as i64)?),
        done: |path| size(path) == PAGE as u64,
    },
    Operation {
        name: "truncate by a descriptor that only names it",
        run: |path| {
            let named = rustix::fs::open(path, OFlags::PATH, Mode::empty())?;
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&named));
            Ok(nix::unistd::truncate(link.as_str(), PAGE as i64)?)
        },
        done: |path| size(path) == PAGE as u64,
    },
    Operation {
        name: "append",
        run: |path| {
            io::Write::write_all(&mut fs::OpenOptions::new().append(true).open(path)?, b"x")
        },
        done: |path| size(path) == LEN as u64 + 1,
    },
];

/// Pins a new file, and starts what a local process wants with it.
async fn pinned(lab: &Lab, client: &mut ForeignClient, name: &str) -> v1::PinResponse {
    lab.make_file(name, LEN as u64);
    let pin = client.pin(name).await;
    assert_eq!(pin.guard, v1::GuardTier::Delegation as i32, "the newest kernel offers them");
    pin
}

/// Between the notice and our answer the file is ours: a write lands in it.
async fn write_while_it_waits(lane: &ForeignLane, pin: &v1::PinResponse) {
    let status = lane.write(&pin.segments[0], 0, &Pattern(7).bytes(0, LEN)).await;
    assert!(status.is_success(), "while the local process waits: {status}");
}

/// Answers the notice, and waits for the end: the local process was held until then.
async fn let_go(client: &mut ForeignClient, pin: &v1::PinResponse, name: &str) -> v1::Revoked {
    client.say_drained(&[pin.pin_id]);
    let revoked = client.next_revoked().await;
    assert_eq!((&revoked.pin_ids, revoked.generation), (&vec![pin.pin_id], pin.generation));
    let timings = revoked.timings.unwrap();
    assert!(timings.drained_us.is_some(), "{name}: the fence did not wait for the budget");
    assert!(timings.break_pending_at_release, "{name}: it was held until we let go");
    revoked
}

on_each_file_system! {
    async fn whoever_changes_the_file_or_its_name_waits_for_us(lab in Lab) {
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        for (number, Operation { name, run, done }) in OPERATIONS.into_iter().enumerate() {
            println!("{name}");
            let file = format!("file{number}");
            let path = lab.path(&file);
            if name == "rename over it" {
                fs::write(beside(&path), "new").unwrap();
            }
            let pin = pinned(&lab, &mut client, &file).await;
            let target = path.clone();
            let local = tokio::task::spawn_blocking(move || run(&target));
            let draining = client.next_draining().await;
            assert_eq!(draining.pin_ids, [pin.pin_id], "{name}");
            assert_eq!(draining.reason, RevocationReason::LocalWriter as i32, "{name}");
            write_while_it_waits(&lane, &pin).await;
            assert!(!local.is_finished() && !done(&path), "{name} did not wait for us");
            let revoked = let_go(&mut client, &pin, name).await;
            assert_eq!(revoked.reason, RevocationReason::LocalWriter as i32, "{name}");
            local.await.unwrap().unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(done(&path), "{name} was not done");
        }
        lab.nothing_is_held().await;
    }

    // The kernel takes it for a reader, and empties the file behind that.
    async fn an_open_for_reading_that_truncates_waits_for_us(lab in Lab) {
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let pin = pinned(&lab, &mut client, "file").await;
        let path = lab.path("file");
        let local = tokio::task::spawn_blocking(move || {
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::TRUNC, Mode::empty()).map(drop)
        });
        let draining = client.next_draining().await;
        assert_eq!(draining.reason, RevocationReason::LocalReader as i32);
        write_while_it_waits(&lane, &pin).await;
        assert!(!local.is_finished(), "it did not wait for us");
        assert_eq!(size(&lab.path("file")), LEN as u64, "it is whole as long as it is ours");
        let_go(&mut client, &pin, "open for reading that truncates").await;
        local.await.unwrap().unwrap();
        assert_eq!(size(&lab.path("file")), 0);
    }

    async fn a_reader_waits_for_us_and_reads_all_of_it(lab in Lab) {
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let pin = pinned(&lab, &mut client, "file").await;
        let path = lab.path("file");
        let reader = tokio::task::spawn_blocking(move || read_by_another_process(&path));
        let draining = client.next_draining().await;
        assert_eq!(draining.reason, RevocationReason::LocalReader as i32);
        write_while_it_waits(&lane, &pin).await;
        assert!(!reader.is_finished(), "the reader did not wait for us");
        let revoked = let_go(&mut client, &pin, "reading").await;
        assert_eq!(revoked.reason, RevocationReason::LocalReader as i32);
        let content = reader.await.unwrap();
        assert_eq!(content.len(), LEN);
        Pattern(7).check(0, &content, "what was written while the reader waited");
        assert_eq!(lab.daemon.audit_record(&lab.path("file"))["reason"], "local reader");
    }
}
