//! One file, pinned through two NICs at once: one fence cuts off both.
#![forbid(unsafe_code)]

use std::process::Command;

use pinfold_client::{CompletionStatus, DrainPolicy, PinRequest, RdmaDevice, Transport};
use pinfold_lab::{
    Daemon, EXPORT, FileSystem, Truncation, device_name, next_revocation, read_by_another_process,
    remote_slice,
};

const SECOND: &str = "rxe1";
const PAGE: usize = 4096;

fn run(line: &str) {
    let status = Command::new("sh").args(["-ec", line]).status().unwrap();
    assert!(status.success(), "{line}: {status}");
}

/// A second soft NIC, on an interface of its own.
fn add_device() {
    run("ip link add pinfold1 type dummy && ip addr add 10.77.0.1/24 dev pinfold1 \
         && ip link set pinfold1 mtu 4300 up");
    run(&format!("rdma link add {SECOND} type rxe netdev pinfold1"));
}

#[tokio::test]
async fn one_fence_cuts_off_all_of_them() {
    add_device();
    let folder = tempfile::tempdir_in(FileSystem::Ext4.mount_point()).unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![0; 8 * PAGE]).unwrap();
    let exports = [(EXPORT, folder.path())];
    let first = device_name();
    let daemon = Daemon::start_with(&exports, &["--rdma-device", &first, "--rdma-device", SECOND]);

    let mut sessions = Vec::new();
    for device in [first.as_str(), SECOND] {
        let options = pinfold_client::ConnectOptions::new(&daemon.url)
            .rdma_device(RdmaDevice::Named(device.to_owned()))
            .server_device(device)
            .drain_policy(DrainPolicy::Ignore);
        let session = pinfold_client::Session::connect(options).await.unwrap();
        let events = session.events();
        let request = PinRequest::read_write(EXPORT, "file").transport(Transport::Rdma);
        let pin = session.pin(request).await.unwrap();
        let mut buffer = session.buffer(PAGE).await.unwrap();
        buffer.as_mut_slice().fill(b'R');
        let (_, report) = pin.write(0, buffer, PAGE).await.unwrap();
        assert_eq!(report.rdma_bytes, PAGE as u64, "by {device}");
        sessions.push((session, pin, events));
    }
    let inspection = sessions[0].0.inspect().await.unwrap();
    let devices: Vec<_> = inspection.sessions.iter().map(|s| s.rdma_device.as_deref()).collect();
    assert_eq!(devices, [Some(first.as_str()), Some(SECOND)]);

    let truncation = Truncation::start(path.clone(), 0);
    let mut generations = Vec::new();
    for (_, _, events) in &mut sessions {
        generations.push(next_revocation(events).await.generation);
    }
    assert_eq!(generations[0], generations[1], "one revocation");
    truncation.done().await;
    for (session, pin, _) in &sessions {
        let key = pin.grant().segments[0];
        let mut buffer = session.buffer(PAGE).await.unwrap();
        buffer.as_mut_slice().fill(b'R');
        let (_, status) = session.raw_write(remote_slice(&key, 0, PAGE), buffer).await.unwrap();
        assert_eq!(status, CompletionStatus::RemoteAccess);
    }
    assert_eq!(read_by_another_process(&path), b"");
}
