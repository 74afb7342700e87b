//! `on_truncate=deny`: pinned files are sealed. Who would cut or move one fails at once, readers pass,
//! the NIC goes on, and nothing is taken back. What a crash leaves is lifted.
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;
use std::process::{Command, Output};

use pinfold_client::{Code, GuardTier, PinRequest, Reason, RevocationReason, Session, Transport};
use pinfold_lab::{
    Answer, Daemon, EXPORT, FileSystem, Pattern, next_revocation, on_each_file_system_with,
    read_by_another_process, tool,
};

const DENY: &str = "on_truncate=deny";
const PAGE: usize = 4096;
const LEN: usize = 16 * PAGE;

fn is_append_only(path: &Path) -> bool {
    let output = Command::new("lsattr").arg(path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.split(' ').next().unwrap().contains('a')
}

fn chattr(change: &str, path: &Path) {
    assert!(Command::new("chattr").arg(change).arg(path).status().unwrap().success());
}

fn undeny(path: &Path) -> Output {
    Command::new(tool("pinfoldd")).arg("undeny").arg(path).output().unwrap()
}

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// From this process, which holds nothing: each call returns at once, or the test hangs.
fn cuts_and_moves_fail(path: &Path) {
    let truncated = nix::unistd::truncate(path, 1).map_err(io::Error::from);
    let renamed = std::fs::rename(path, path.with_extension("moved"));
    let opened = std::fs::OpenOptions::new().write(true).open(path).map(drop);
    for (what, done) in [
        ("truncate", truncated),
        ("rename", renamed),
        ("unlink", std::fs::remove_file(path)),
        ("open for writing", opened),
        ("open and empty", std::fs::File::create(path).map(drop)),
    ] {
        let error = done.err().unwrap_or_else(|| panic!("{what} went through"));
        assert_eq!(error.raw_os_error(), Some(nix::libc::EPERM), "{what}: {error}");
    }
}

async fn write(session: &Session, pin: &pinfold_client::Pin, at: u64, len: usize) {
    let mut buffer = session.buffer(len).await.unwrap();
    Pattern(7).fill(at, buffer.as_mut_slice());
    pin.write(at, buffer, len).await.unwrap();
}

on_each_file_system_with! { "on_truncate=deny";
    async fn cuts_fail_at_once_readers_pass_and_the_nic_goes_on(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let path = lab.path("file");
        let session = lab.session().await;
        let grown = 2 * LEN as u64;
        let by_rdma = PinRequest::read_write(EXPORT, "file").transport(Transport::Rdma);
        let pin = session.pin(by_rdma.reserve_end(grown)).await.unwrap();
        assert_eq!(pin.grant().guard, GuardTier::Sealed);
        assert_eq!(session.inspect().await.unwrap().files[0].guard, GuardTier::Sealed);
        assert_eq!(session.stat(EXPORT, "file").await.unwrap().guard, Some(GuardTier::Sealed));
        cuts_and_moves_fail(&path);
        assert_eq!(read_by_another_process(&path), [0; LEN]);
        write(&session, &pin, 0, LEN).await;
        pin.commit().await.unwrap();

        // Our own growth, and the stream path, through the description that was open before.
        pin.extend_to(session.grow(EXPORT, "file", grown).await.unwrap());
        write(&session, &pin, LEN as u64, PAGE).await;
        let by_stream = PinRequest::read_write(EXPORT, "file").transport(Transport::Stream);
        let stream = session.pin(by_stream).await.unwrap();
        write(&session, &stream, (LEN + PAGE) as u64, PAGE).await;
        stream.commit().await.unwrap();
        pin.commit().await.unwrap();
        pin.check().expect("nothing was taken back");
        stream.unpin().await.unwrap();
        pin.unpin().await.unwrap();
        lab.nothing_is_held().await;

        let content = read_by_another_process(&path);
        assert_eq!(content.len(), 2 * LEN);
        Pattern(7).check(0, &content[..LEN + 2 * PAGE], "under the seal");
        assert!(!is_append_only(&path));
        nix::unistd::truncate(&path, 1).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    async fn a_flag_that_is_taken_away_is_a_break(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let path = lab.path("file");
        let session = lab.session().await;
        let mut events = session.events();
        let _pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        chattr("-a", &path);
        let revocation = next_revocation(&mut events).await;
        assert_eq!(revocation.reason, RevocationReason::LocalWriter);
        assert_eq!(lab.daemon.audit_record(&path)["guard"], "sealed");
        let again = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        assert_eq!(again.grant().guard, GuardTier::Sealed);
        cuts_and_moves_fail(&path);
    }

    async fn our_own_shrink_and_removal_lift_the_seal(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let session = lab.session().await;
        let request = || PinRequest::read_write(EXPORT, "file");
        let _pin = session.pin(request()).await.unwrap();
        assert_eq!(session.shrink(EXPORT, "file", PAGE as u64).await.unwrap(), 1);
        let _again = session.pin(request()).await.unwrap();
        assert_eq!(session.remove(EXPORT, "file", true).await.unwrap(), 1);
        assert!(!lab.path("file").exists());
    }

    async fn a_crash_leaves_seals_that_a_pin_or_undeny_lifts(mut lab in Lab) {
        let names = ["pinned", "undenied", "removed"];
        let session = lab.session().await;
        let mut pins = Vec::new();
        for name in names {
            lab.make_file(name, LEN as u64);
            pins.push(session.pin(PinRequest::read_write(EXPORT, name)).await.unwrap());
        }
        lab.make_file("log", 1);
        chattr("+a", &lab.path("log"));

        let (code, _, stderr) = said(&undeny(lab.folder()));
        let holder = format!("process {}", lab.daemon.pid());
        assert_eq!(code, 6, "{stderr}");
        assert!(stderr.contains(&holder) && stderr.contains("undenied"), "{stderr}");
        for name in names {
            cuts_and_moves_fail(&lab.path(name));
        }

        lab.daemon.kill();
        for name in names {
            cuts_and_moves_fail(&lab.path(name));
        }
        let path = lab.path("undenied");
        let (code, stdout, stderr) = said(&undeny(&path));
        assert_eq!((code, stderr.as_str()), (0, ""));
        assert_eq!(stdout, format!("{}: the seal is lifted\n", path.display()));
        assert!(!is_append_only(&path));
        assert!(said(&undeny(&path)).1.contains("not sealed"));

        // By a server with any policy.
        lab.restart();
        let session = lab.session().await;
        session.pin(PinRequest::read_write(EXPORT, "pinned")).await.unwrap();
        lab.daemon.logged_of(&lab.path("pinned"), "lifted the seal");
        session.remove(EXPORT, "removed", false).await.unwrap();
        assert!(!lab.path("removed").exists());

        let (code, stdout, _) = said(&undeny(lab.folder()));
        assert_eq!((code, stdout.as_str()), (0, ""), "nothing of ours is left");
        assert!(is_append_only(&lab.path("log")), "an administrator's own");
        chattr("-a", &lab.path("log"));
    }

    async fn undeny_lifts_all_beneath_a_folder(mut lab in Lab) {
        std::fs::create_dir_all(lab.path("a/b")).unwrap();
        let session = lab.session().await;
        let mut pins = Vec::new();
        for name in ["one", "a/two", "a/b/three"] {
            lab.make_file(name, PAGE as u64);
            pins.push(session.pin(PinRequest::read_write(EXPORT, name)).await.unwrap());
        }
        lab.daemon.kill();
        let (code, stdout, stderr) = said(&undeny(lab.folder()));
        assert_eq!((code, stderr.as_str()), (0, ""));
        for name in ["one", "a/two", "a/b/three"] {
            assert!(stdout.contains(lab.path(name).to_str().unwrap()), "{stdout}");
            assert!(!is_append_only(&lab.path(name)));
        }
    }
}

#[tokio::test]
async fn without_the_capability_it_is_refused_by_its_name() {
    let folder = tempfile::tempdir_in(FileSystem::Ext4.mount_point()).unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, [7; PAGE]).unwrap();
    let without =
        ["setpriv", "--inh-caps=-linux_immutable", "--bounding-set=-linux_immutable", "--"];
    let daemon = Daemon::start_with_policy(&without, folder.path(), DENY);
    let says = [path.to_str().unwrap(), "CAP_LINUX_IMMUTABLE"];
    let (code, reason) = (Code::PermissionDenied, Reason::PermissionDenied);
    let answer = Answer { code, reason, exit: 9, says: &says };
    let arguments = ["pin", "lab/file"];
    answer.check_finished(&daemon.pinfold("auto", &arguments).await, &arguments);
    assert!(!is_append_only(&path));
    assert_eq!(daemon.files_open_beneath(folder.path()), 0);
}
