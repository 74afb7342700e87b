//! The systemd unit gives the daemon the rights that it needs, and no others: `pinfoldd` runs here
//! under exactly those, as a user that owns nothing.
#![forbid(unsafe_code)]

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};

use pinfold_client::{
    Code, ConnectOptions, Error, GuardTier, PinRequest, RdmaDevice, Reason, Session,
};
use pinfold_lab::{Daemon, EXPORT, FileSystem, Pattern, device_name, read_by_another_process};

const UNIT: &str = include_str!("../../packaging/pinfoldd@.service");
const DAEMON: u32 = 65534;
/// Neither root nor the daemon.
const OWNER: u32 = 4711;
const LEN: usize = 8192;

/// What the unit sets, in setpriv(1)'s words: `CAP_LEASE CAP_X` is `-all,+lease,+x`.
fn capabilities(setting: &str) -> String {
    let prefix = format!("{setting}=");
    let lines = UNIT.lines().filter_map(|line| line.strip_prefix(&prefix));
    let names = lines.flat_map(str::split_whitespace);
    let names =
        names.map(|name| format!(",+{}", name.strip_prefix("CAP_").unwrap().to_lowercase()));
    format!("-all{}", names.collect::<String>())
}

/// Starts the next command as this user, with these capabilities and no way to others.
fn rights(user: u32, ambient: &str, bounding: &str) -> Vec<String> {
    let user = [format!("--reuid={user}"), format!("--regid={user}")];
    let sets = [
        format!("--bounding-set={bounding}"),
        format!("--inh-caps={ambient}"),
        format!("--ambient-caps={ambient}"),
    ];
    let words = ["setpriv", "--clear-groups", "--no-new-privs"].map(str::to_owned);
    [&words[..], &user, &sets, &["--".to_owned()]].concat()
}

/// A folder with a file that belongs to neither root nor the daemon, and that all may write.
fn folder(file_system: FileSystem) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(file_system.mount_point()).unwrap();
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, [0; LEN]).unwrap();
    std::fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
    chown(&file, Some(OWNER), Some(OWNER)).unwrap();
    folder
}

/// A daemon with these rights, and a client of it.
async fn serve(folder: &tempfile::TempDir, rights: &[String]) -> (Daemon, Session) {
    let rights: Vec<&str> = rights.iter().map(String::as_str).collect();
    let daemon = Daemon::start_as(&rights, &[(EXPORT, folder.path())]);
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options).await.unwrap();
    (daemon, session)
}

/// One-sided writes through a pin, durable, and then the pin is given back.
async fn is_served(folder: &tempfile::TempDir, rights: &[String]) {
    let (_daemon, session) = serve(folder, rights).await;
    let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
    assert_eq!(pin.grant().guard, GuardTier::Delegation);
    let mut buffer = session.buffer(LEN).await.unwrap();
    Pattern(3).fill(0, buffer.as_mut_slice());
    let (_, report) = pin.write(0, buffer, LEN).await.unwrap();
    assert_eq!(report.rdma_bytes, LEN as u64);
    pin.commit().await.unwrap();
    pin.unpin().await.unwrap();
    session.close().await;
    Pattern(3).check(0, &read_by_another_process(&folder.path().join("file")), "written");
}

const EACH: [FileSystem; 2] = [FileSystem::Ext4, FileSystem::Xfs];

#[tokio::test]
async fn with_the_units_rights_a_file_of_another_owner_is_served() {
    assert_eq!(capabilities("AmbientCapabilities"), "-all,+lease", "and nothing else");
    let rights = rights(
        DAEMON,
        &capabilities("AmbientCapabilities"),
        &capabilities("CapabilityBoundingSet"),
    );
    for file_system in EACH {
        is_served(&folder(file_system), &rights).await;
    }
}

#[tokio::test]
async fn without_them_it_is_refused_and_the_capability_named() {
    for file_system in EACH {
        let folder = folder(file_system);
        let (_daemon, session) = serve(&folder, &rights(DAEMON, "-all", "-all")).await;
        let refused = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap_err();
        let Error::Refused { reason, code, message, .. } = refused else { panic!("{refused:?}") };
        assert_eq!((reason, code), (Some(Reason::PermissionDenied), Code::PermissionDenied));
        let path = folder.path().join("file");
        for words in ["CAP_LEASE", "file's owner", path.to_str().unwrap()] {
            assert!(message.contains(words), "{words:?}: {message}");
        }
    }
}

#[tokio::test]
async fn the_files_owner_needs_no_capability() {
    for file_system in EACH {
        is_served(&folder(file_system), &rights(OWNER, "-all", "-all")).await;
    }
}
