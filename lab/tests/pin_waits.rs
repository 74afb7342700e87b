//! A pin that waits for others to close the file; and what else of pins can be seen on the storage
//! host.
#![forbid(unsafe_code)]

use std::time::Duration;

use pinfold_client::{Code, PinRequest, Reason};
use pinfold_lab::{
    Answer, DEADLINE, EXPORT, FileSystem, Lab, Opener, eventually, on_each_file_system,
};
use pinfold_leases::{Export, RelativePath};

const PAGE: u64 = 4096;

fn request() -> PinRequest {
    PinRequest::read_write(EXPORT, "file")
}

/// A pin that waits keeps the file open.
async fn waits(lab: &Lab) {
    eventually("the pin waits", async || lab.daemon.files_open_beneath(lab.folder()) > 0).await;
}

fn busy<'a>(says: &'a [&'a str]) -> Answer<'a> {
    let (code, reason) = (Code::FailedPrecondition, Reason::FileBusy);
    Answer { code, reason, exit: 6, says }
}

/// The locks of a file, as /proc/locks shows them: kind, first and last byte.
fn locks(lab: &Lab) -> Vec<(String, u64, String)> {
    use std::os::unix::fs::MetadataExt;
    let inode = format!(":{}", std::fs::metadata(lab.path("file")).unwrap().ino());
    let locks = std::fs::read_to_string("/proc/locks").unwrap();
    let mut found: Vec<_> = locks
        .lines()
        .filter_map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [_, "OFDLCK", _, kind, _, at, start, end] if at.ends_with(&inode) => {
                    Some((kind.to_owned(), start.parse().unwrap(), end.to_owned()))
                }
                _ => None,
            }
        })
        .collect();
    found.sort_by_key(|lock| lock.1);
    found
}

on_each_file_system! {
    async fn it_is_granted_when_the_last_opener_has_left(lab in Lab) {
        lab.make_file("file", PAGE);
        let path = lab.path("file");
        let (reading, writing) = (Opener::reading(&path), Opener::writing(&path));
        let (session, other) = (lab.session().await, lab.session().await);
        let wait = || request().wait(DEADLINE);
        let mut command = lab.start_pinfold(&["pin", "lab/file", "--hold", "--wait", "600"]);
        let leaving = async {
            waits(&lab).await;
            // One that does not want to wait has its answer meanwhile.
            let who = [&reading, &writing].map(|opener| format!("process {} (sh", opener.pid()));
            busy(&[&who[0], &who[1]]).check(other.pin(request()).await.unwrap_err());
            drop(reading);
            busy(&[&who[1]]).check(other.pin(request()).await.unwrap_err());
            drop(writing);
        };
        let (one, two, ()) = tokio::join!(session.pin(wait()), other.pin(wait()), leaving);
        command.wait_for_line("holding the pin");
        let (one, two) = (one.unwrap(), two.unwrap());
        assert_eq!(one.grant().generation, two.grant().generation);
        one.unpin().await.unwrap();
        two.unpin().await.unwrap();
        drop(command);
        lab.nothing_is_held().await;
    }

    async fn at_its_deadline_it_is_refused_with_who_is_in_the_way(lab in Lab) {
        lab.make_file("file", PAGE);
        let opener = Opener::reading(&lab.path("file"));
        let session = lab.session().await;
        let waiting = session.pin(request().wait(Duration::from_millis(700)));
        let who = format!("process {} (sh, fd 9, reading)", opener.pid());
        busy(&[&who]).check(waiting.await.unwrap_err());
        lab.nothing_is_held().await;
    }

    async fn it_ends_with_its_call_and_with_its_session(lab in Lab) {
        lab.make_file("file", PAGE);
        let opener = Opener::reading(&lab.path("file"));
        let session = lab.session().await;
        tokio::select! {
            pinned = session.pin(request().wait(DEADLINE * 10)) => panic!("{pinned:?}"),
            () = waits(&lab) => {}
        }
        lab.nothing_is_held().await;

        let other = lab.session().await;
        let waiting = tokio::spawn(async move { other.pin(request().wait(DEADLINE * 10)).await });
        waits(&lab).await;
        waiting.abort();
        lab.nothing_is_held().await;
        let command = lab.start_pinfold(&["pin", "lab/file", "--wait", "6000"]);
        waits(&lab).await;
        command.signal(nix::sys::signal::Signal::SIGKILL);
        drop(command);
        lab.nothing_is_held().await;
        drop(opener);
        session.pin(request()).await.unwrap();
    }

    async fn pinned_ranges_are_locked_for_all_to_see(lab in Lab) {
        lab.make_file("file", 8 * PAGE);
        let session = lab.session().await;
        let lock = |kind: &str, start, end: u64| (kind.to_owned(), start, end.to_string());
        assert_eq!(locks(&lab), []);
        let reading = PinRequest::read(EXPORT, "file").range(0..2 * PAGE);
        let reading = session.pin(reading).await.unwrap();
        assert_eq!(locks(&lab), [lock("READ", 0, 2 * PAGE - 1)]);
        let writing = session.pin(request().range(PAGE..4 * PAGE)).await.unwrap();
        let second = session.pin(request().range(3 * PAGE..4 * PAGE)).await.unwrap();
        let both = [lock("READ", 0, PAGE - 1), lock("WRITE", PAGE, 4 * PAGE - 1)];
        assert_eq!(locks(&lab), both);
        writing.unpin().await.unwrap();
        let left = [lock("READ", 0, 2 * PAGE - 1), lock("WRITE", 3 * PAGE, 4 * PAGE - 1)];
        assert_eq!(locks(&lab), left);
        reading.unpin().await.unwrap();
        second.unpin().await.unwrap();
        assert_eq!(locks(&lab), []);
    }

    async fn the_grant_says_how_large_the_pages_are(lab in Lab) {
        const LEN: u64 = 8 << 20;
        let session = lab.session().await;
        session.create(EXPORT, "file", LEN, pinfold_client::IfExists::Fail).await.unwrap();
        let export = Export::open(lab.folder()).unwrap();
        let path = RelativePath::parse("file").unwrap();
        let layout = export.locate(&path).unwrap().open().unwrap().layout().unwrap();
        let pin = session.pin(request()).await.unwrap();
        assert_eq!(u64::from(pin.grant().page_size_bytes), layout.page_size, "{layout:?}");
        let stat = session.stat(EXPORT, "file").await.unwrap();
        assert_eq!(u64::from(stat.page_size_bytes), layout.page_size);
        if lab.file_system == FileSystem::Ext4 {
            // XFS lays it out as it likes.
            assert_eq!(layout.page_size, 2 << 20, "an empty file system has room: {layout:?}");
        }
    }
}
