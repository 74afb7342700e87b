//! No RDMA device: on neither side, on one, or not the one that was named.
#![forbid(unsafe_code)]

use pinfold_client::{Code, ConnectOptions, Error, RdmaDevice, Reason, Session};
use pinfold_lab::{Answer, Daemon, EXPORT, FileSystem, ForeignClient, device_name, shell};
use pinfold_proto::v1;

const ABSENT: &str = "nosuch0";
/// The command's exit code, and the daemon's.
const DEVICE: i32 = 8;
const BY_RDMA: [&str; 4] = ["--transport", "rdma", "pin", "lab/file"];
const AS_IT_CAN: [&str; 2] = ["pin", "lab/file"];

fn refusal<'a>(says: &'a [&'a str]) -> Answer<'a> {
    let (code, reason) = (Code::FailedPrecondition, Reason::NoRdmaDevice);
    Answer { code, reason, exit: DEVICE, says }
}

/// An export with one file.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir_in(FileSystem::Ext4.mount_point()).unwrap();
    std::fs::write(folder.path().join("file"), [0; 4096]).unwrap();
    folder
}

/// No client gets RDMA from this server, and each is told why; what needs none is done.
async fn refuses_rdma_and_serves_by_stream(daemon: &Daemon, says: &[&str]) {
    let answer = refusal(says);
    let mut foreign = ForeignClient::open(&daemon.url).await;
    assert_eq!(foreign.welcome.rdma_device, None);
    let refused = foreign.stub.pin(foreign.pin_request("file")).await.unwrap_err();
    answer.check_status(&refused);
    let end = v1::Endpoint { gid: vec![0; 16], max_path_mtu_bytes: 4096, ..Default::default() };
    answer.check_status(&foreign.connect_end(0, end).await.unwrap_err());
    let any = v1::PinRequest { transport: 0, ..foreign.pin_request("file") };
    let pin = foreign.stub.pin(any).await.unwrap().into_inner();
    assert_eq!(pin.segments, []);
    answer.check_words(&pin.no_rdma_because);
    foreign.unpin(pin.pin_id).await.unwrap();

    let by_rdma = daemon.pinfold("auto", &BY_RDMA).await;
    assert_eq!((by_rdma.code, by_rdma.stdout.as_str()), (DEVICE, ""), "{}", by_rdma.stderr);
    assert!(by_rdma.stderr.contains("hint: leave --transport out"), "{}", by_rdma.stderr);
    let as_it_can = daemon.pinfold("auto", &AS_IT_CAN).await;
    assert_eq!(as_it_can.code, 0, "{}", as_it_can.stderr);
}

#[tokio::test]
async fn a_server_that_wants_none() {
    let folder = folder();
    let daemon = Daemon::start_with(&[(EXPORT, folder.path())], &["--rdma-device", "none"]);
    let says = ["no usable RDMA device", "--rdma-device none", "--rdma-device auto"];
    refuses_rdma_and_serves_by_stream(&daemon, &says).await;

    // Who names its own device wants RDMA.
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let refused = Session::connect(options).await.unwrap_err();
    assert!(matches!(refused, Error::ServerHasNoRdmaDevice { .. }), "{refused:?}");
    for arguments in [&AS_IT_CAN as &[&str], &BY_RDMA] {
        let finished = daemon.pinfold(&device_name(), arguments).await;
        assert_eq!(finished.code, DEVICE, "{}", finished.stderr);
        for words in [daemon.url.as_str(), "has no RDMA device", "pinfoldd"] {
            assert!(finished.stderr.contains(words), "{words:?}: {}", finished.stderr);
        }
    }
}

/// The lab without its soft NIC, and without any that another test has left; until it is dropped.
struct NoNic;

impl NoNic {
    fn start() -> Self {
        for device in std::fs::read_dir("/sys/class/infiniband").unwrap() {
            shell(&format!("rdma link delete {}", device.unwrap().file_name().display()));
        }
        Self
    }
}

impl Drop for NoNic {
    fn drop(&mut self) {
        shell(&format!("rdma link add {} type rxe netdev lo", device_name()));
    }
}

#[tokio::test]
async fn none_on_either_side() {
    let _gone = NoNic::start();
    let folder = folder();
    let daemon = Daemon::start_with(&[(EXPORT, folder.path())], &["--rdma-device", "auto"]);
    let says = ["no usable RDMA device", "none with an active port", "rdma link add"];
    refuses_rdma_and_serves_by_stream(&daemon, &says).await;
    the_named_one_is_absent(&daemon, &device_name(), "there is none at all").await;
}

#[tokio::test]
async fn a_named_one_that_is_absent() {
    let folder = folder();
    let daemon = Daemon::start(&[(EXPORT, folder.path())]);
    let present = format!("there is: {}", device_name());
    the_named_one_is_absent(&daemon, ABSENT, &present).await;

    // On the server's side, by a client's wish.
    let mut foreign = ForeignClient::open(&daemon.url).await;
    let request = v1::ConnectQueuePairRequest {
        session_id: foreign.session_id(),
        client: Some(v1::Endpoint { gid: vec![0; 16], ..Default::default() }),
        server_device: ABSENT.to_owned(),
        number: 0,
    };
    let refused = foreign.stub.connect_queue_pair(request).await.unwrap_err();
    let says = [&format!("{ABSENT:?}") as &str, &format!("it uses {}", device_name())];
    Answer { code: Code::NotFound, ..refusal(&says) }.check_status(&refused);
}

/// The daemon does not start, the command does not go on; both list what there is.
async fn the_named_one_is_absent(daemon: &Daemon, name: &str, present: &str) {
    let named = format!("no RDMA device \"{name}\"");
    // A folder of its own: who serves one keeps others off it.
    let folder = folder();
    let refused = Daemon::refused(&[(EXPORT, folder.path())], &["--rdma-device", name]);
    assert_eq!((refused.code, refused.stdout.as_str()), (DEVICE, ""), "{}", refused.stderr);
    let finished = daemon.pinfold(name, &AS_IT_CAN).await;
    assert_eq!((finished.code, finished.stdout.as_str()), (DEVICE, ""), "{}", finished.stderr);
    for said in [&refused.stderr, &finished.stderr] {
        assert!(said.contains(&named) && said.contains(present), "{said}");
    }
    assert!(refused.stderr.starts_with("pinfoldd: "), "{}", refused.stderr);
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(name.to_owned()));
    let refused = Session::connect(options).await.unwrap_err();
    assert!(matches!(refused, Error::NoRdmaDevice { .. }), "{refused:?}");
}
