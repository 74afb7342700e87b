//! `pinfoldd doctor` and `pinfold doctor` in the lab: what they say is what there is.
#![forbid(unsafe_code)]

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;

use pinfold_lab::{
    FileSystem, Finished, Mounted, device_name, doctor, finding, on_each_file_system,
};
use serde_json::Value;

const DEVICE: i32 = 8;
const UNFIT: i32 = 5;

fn json(finished: &Finished) -> Value {
    serde_json::from_str(&finished.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}{}", finished.stdout, finished.stderr))
}

/// The subject's check came out so.
fn check(report: &Value, subject: &str, check: &str, result: &str, found: &str) {
    let finding = finding(report, subject, check);
    assert_eq!(finding["result"], result, "{finding}");
    assert!(finding["found"].as_str().unwrap().contains(found), "{found:?}: {finding}");
}

fn check_host(report: &Value) {
    check(report, "host", "kernel", "ok", "");
    check(report, "host", "guards", "ok", "delegation");
    check(report, "host", "leases_enable", "ok", "1");
    check(report, "host", "lease_break_time", "ok", "10 s; clients get 3.3 s");
    check(report, "host", "cap_lease", "ok", "held");
}

fn check_nic(report: &Value) {
    let device = device_name();
    check(report, "host", "rdma_devices", "ok", &device);
    check(report, &device, "port", "ok", "active");
    check(report, &device, "path_mtu", "ok", "4096");
    check(report, &device, "odp", "ok", "write, read");
    check(report, &device, "self_test_on_demand", "limited", "multiple of 4096");
    check(report, &device, "self_test_pinned", "ok", "passed");
    check(report, &device, "flush", "limited", "not usable");
}

on_each_file_system! {
    async fn a_dax_directory_has_all_that_there_is(lab in Lab) {
        lab.make_file("file", 4096);
        let folder = lab.folder().to_str().unwrap();
        let finished = doctor(&[], &["--json", folder]);
        assert_eq!(finished.code, 0, "{}{}", finished.stdout, finished.stderr);
        let report = json(&finished);
        println!("{}", doctor(&[], &[folder]).stdout);
        check_host(&report);
        check_nic(&report);
        check(&report, folder, "file_system", "ok", lab.file_system.kind());
        check(&report, folder, "dax", "ok", "in effect");
        check(&report, folder, "guard", "ok", "delegation");
        check(&report, folder, "map_sync", "ok", "taken");
        let registered = format!("{}: on demand", device_name());
        check(&report, folder, "registration", "ok", &registered);
        check(&report, folder, "seal", "ok", "possible");
        check(&report, folder, "access", "limited", "every user");
        std::fs::set_permissions(folder, Permissions::from_mode(0o750)).unwrap();
        let report = json(&doctor(&[], &["--json", folder]));
        check(&report, folder, "access", "ok", "owner");
        let left: Vec<_> = lab.folder().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["file"], "nothing is left behind");
    }

    async fn the_client_side_finds_server_and_rdma(lab in Lab) {
        let finished = lab.pinfold(&["doctor", "--json"]).await;
        assert_eq!(finished.code, 0, "{}{}", finished.stdout, finished.stderr);
        let report = json(&finished);
        check_nic(&report);
        check(&report, "server", "reachable", "ok", &lab.daemon.url);
        check(&report, "server", "exports", "ok", "lab");
        check(&report, "server", "rdma", "ok", "connected");

        let finished = lab.daemon.pinfold("nosuch0", &["doctor", "--json"]).await;
        assert_eq!(finished.code, DEVICE, "{}", finished.stderr);
        let report = json(&finished);
        check(&report, "server", "reachable", "ok", &lab.daemon.url);
        check(&report, "server", "rdma", "missing", "none");
        assert!(finding(&report, "server", "rdma")["why"].as_str().unwrap().contains("nosuch0"));
    }
}

#[test]
fn tmpfs_is_pinned_and_not_durable() {
    let folder = tempfile::tempdir_in(FileSystem::Tmpfs.mount_point()).unwrap();
    let folder = folder.path().to_str().unwrap();
    let finished = doctor(&[], &["--json", folder]);
    assert_eq!(finished.code, 0, "{}{}", finished.stdout, finished.stderr);
    let report = json(&finished);
    check(&report, folder, "file_system", "ok", "tmpfs");
    check(&report, folder, "dax", "limited", "memory");
    check(&report, folder, "guard", "ok", "delegation");
    check(&report, folder, "map_sync", "limited", "refused");
    check(&report, folder, "registration", "ok", &format!("{}: pinned", device_name()));
    // What may be locked is not enough for the file.
    let little =
        ["setpriv", "--bounding-set=-ipc_lock", "--", "prlimit", "--memlock=1048576", "--"];
    let finished = doctor(&little, &["--json", folder]);
    let report = json(&finished);
    check(&report, "host", "memlock", "limited", "1 MiB");
    check(&report, folder, "registration", "limited", "none");
}

#[test]
fn what_others_can_not_do_is_said_to_them() {
    let folder = tempfile::tempdir_in(FileSystem::Ext4.mount_point()).unwrap();
    std::os::unix::fs::chown(folder.path(), Some(65534), Some(65534)).unwrap();
    let folder = folder.path().to_str().unwrap();
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"];
    let finished = doctor(&nobody, &["--json", folder]);
    assert_eq!(finished.code, 0, "{}{}", finished.stdout, finished.stderr);
    let report = json(&finished);
    check(&report, "host", "cap_lease", "limited", "uid 65534");
    check(&report, "host", "cap_linux_immutable", "limited", "not held");
    check(&report, folder, "guard", "ok", "delegation");
    check(&report, folder, "seal", "limited", "not possible");
    let why = finding(&report, folder, "seal")["why"].to_string();
    assert!(why.contains("CAP_LINUX_IMMUTABLE"), "{why}");
}

#[test]
fn what_can_not_be_served_is_missing() {
    let ramfs = Mounted::new("ramfs", "mode=0755");
    let folder = ramfs.path().to_str().unwrap();
    let finished = doctor(&[], &["--json", folder]);
    assert_eq!(finished.code, UNFIT, "{}", finished.stdout);
    check(&json(&finished), folder, "file_system", "missing", "ramfs");
    let off = std::fs::read_to_string("/proc/sys/fs/leases-enable").unwrap();
    std::fs::write("/proc/sys/fs/leases-enable", "0").unwrap();
    let finished = doctor(&[], &["--json"]);
    std::fs::write("/proc/sys/fs/leases-enable", off).unwrap();
    assert_eq!(finished.code, UNFIT, "{}", finished.stdout);
    let report = json(&finished);
    check(&report, "host", "leases_enable", "missing", "0");
    check(&report, "host", "guards", "missing", "none");
}
