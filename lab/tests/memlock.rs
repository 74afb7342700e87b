//! Too little memory may be locked (RLIMIT_MEMLOCK): what the device pins is refused with the limit's
//! names, on the server and on the client.
#![forbid(unsafe_code)]

use pinfold_client::{Code, ConnectOptions, PinRequest, RdmaDevice, Reason, Session, Transport};
use pinfold_lab::{Answer, Daemon, EXPORT, FileSystem, device_name, on_each_file_system};

const MIB: usize = 1 << 20;
/// Enough for the device's self-test and for small pins.
const LITTLE: usize = 4 * MIB;
const FILE: usize = 16 * MIB;
/// What would help.
const REMEDIES: [&str; 3] = ["ulimit -l", "LimitMEMLOCK=", "CAP_IPC_LOCK"];

/// A server that may lock so many bytes, with a file on tmpfs, whose pages its device must pin.
async fn server(memlock: usize) -> (tempfile::TempDir, Daemon, Session) {
    let folder = tempfile::tempdir_in(FileSystem::Tmpfs.mount_point()).unwrap();
    std::fs::write(folder.path().join("file"), vec![0; FILE]).unwrap();
    let daemon = Daemon::start_with_memlock(&[(EXPORT, folder.path())], memlock);
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options).await.unwrap();
    (folder, daemon, session)
}

async fn check(daemon: &Daemon, session: &Session, answer: Answer<'_>) {
    let by_rdma = PinRequest::read_write(EXPORT, "file").transport(Transport::Rdma);
    answer.check(session.pin(by_rdma).await.unwrap_err());
    let arguments = ["--transport", "rdma", "pin", "lab/file"];
    answer.check_finished(&daemon.pinfold(&device_name(), &arguments).await, &arguments);
    // Who leaves the way open is served by the other, and told why.
    let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
    answer.check_words(pin.grant().no_rdma_because.as_deref().unwrap());
    pin.unpin().await.unwrap();
}

#[tokio::test]
async fn too_little_for_a_pin_on_the_server() {
    let (folder, daemon, session) = server(LITTLE).await;
    let path = folder.path().join("file");
    let bytes = format!("cannot pin {FILE} bytes");
    let device = device_name();
    let says = [&[path.to_str().unwrap(), &device, &bytes], &REMEDIES as &[_]].concat();
    let (code, reason) = (Code::ResourceExhausted, Reason::QuotaExceeded);
    check(&daemon, &session, Answer { code, reason, exit: 11, says: &says }).await;
    let small = PinRequest::read_write(EXPORT, "file").range(0..MIB as u64);
    let pin = session.pin(small.transport(Transport::Rdma)).await.unwrap();
    assert_eq!(pin.grant().segments.len(), 1, "what fits is pinned");
}

#[tokio::test]
async fn too_little_for_the_servers_own_test_of_its_device() {
    let (folder, daemon, session) = server(0).await;
    let path = folder.path().join("file");
    let device = device_name();
    let says = [&[path.to_str().unwrap(), &device], &REMEDIES as &[_]].concat();
    let (code, reason) = (Code::FailedPrecondition, Reason::DeviceCannotRegister);
    check(&daemon, &session, Answer { code, reason, exit: 8, says: &says }).await;
}

on_each_file_system! {
    async fn too_little_for_a_buffer_of_the_client(lab in Lab) {
        let local = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(local.path(), vec![7; FILE]).unwrap();
        let local = local.path().to_str().unwrap();
        let put = ["put", local, "lab/file", "--chunk", "8M", "--window", "1"];
        let refused = lab.pinfold_with_memlock(LITTLE, &put).await;
        assert_eq!((refused.code, refused.stdout.as_str()), (8, ""), "{}", refused.stderr);
        let bytes = format!("cannot pin {} bytes", 8 * MIB);
        for words in [&[local, "lab/file", &device_name(), &bytes], &REMEDIES as &[_]].concat() {
            assert!(refused.stderr.contains(words), "{words:?}: {}", refused.stderr);
        }
        // In smaller pieces it fits; and a lane needs none.
        let put = ["put", local, "lab/file", "--chunk", "1M", "--window", "1"];
        let done = lab.pinfold_with_memlock(LITTLE, &put).await;
        assert_eq!(done.code, 0, "{}", done.stderr);
        lab.nothing_is_held().await;
    }
}
