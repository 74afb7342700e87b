//! The wire between client and server is cut and mended: what was in flight never lands.
#![forbid(unsafe_code)]

use std::process::Command;

use pinfold_client::Code;
use pinfold_lab::{
    Answer, FileSystem, ForeignClient, Lab, device_name, eventually, queue_pairs,
    read_by_another_process, required, rewrite_by_another_process, shell,
};
use pinfold_proto::{Reason, v1};

const PAGE: usize = 4096;
const LEN: usize = 4 * PAGE;

/// The storage host's end of the wire is down; until it is dropped.
struct Cut;

impl Cut {
    fn start() -> Self {
        set_wire("down");
        Self
    }

    fn mend(self) {}
}

impl Drop for Cut {
    fn drop(&mut self) {
        set_wire("up");
    }
}

fn set_wire(to: &str) {
    let host = required("PINFOLD_LAB_SERVER_HOST");
    shell(&format!("ip -n {host} link set wire-{host} {to}"));
}

/// How many packets the client's NIC has sent (rdma-statistic(8): sysfs has no counters in a namespace).
fn sent() -> u64 {
    let link = format!("{}/1", device_name());
    let output = Command::new("rdma").args(["statistic", "show", "link", &link]).output().unwrap();
    let words = String::from_utf8(output.stdout).unwrap();
    let words: Vec<_> = words.split_whitespace().collect();
    let count = words.windows(2).find(|pair| pair[0] == "sent_pkts");
    count.unwrap_or_else(|| panic!("no counter in {words:?}"))[1].parse().unwrap()
}

async fn partitioned(mut lab: Lab) {
    // Short: its NIC sends for some 13 s, and the wire must be mended before that.
    lab.restart_with_time_to_live(2);
    lab.make_file("file", LEN as u64);
    let mut client = ForeignClient::open(&lab.daemon.url).await;
    let lane = client.connect().await;
    let pin = client.pin("file").await;
    let key = pin.segments[0];
    assert!(lane.write(&key, 0, &[b'R'; PAGE]).await.is_success());
    assert_eq!(queue_pairs().len(), 2);
    let cut = Cut::start();
    // Its NIC sends it again and again.
    let in_flight = tokio::spawn(async move { lane.write(&key, 0, &[b'R'; PAGE]).await });
    lab.daemon.logged("silent; its queue pair is destroyed");
    let gone = async || queue_pairs().len() == 1;
    eventually("the server's end is gone", gone).await;
    lab.daemon.logged("session ended");
    lab.nothing_is_held().await;
    rewrite_by_another_process(&lab.path("file"), 'L', LEN);
    assert!(!in_flight.is_finished(), "it is still sent");
    cut.mend();
    let before = sent();
    eventually("it is sent once more", async || sent() > before).await;
    in_flight.abort();

    let write = v1::WriteRequest {
        session_id: client.session_id(),
        pin_id: pin.pin_id,
        generation: pin.generation,
        offset: 0,
        data: vec![b'R'; PAGE].into(),
    };
    let refused = client.stub.write(write).await.unwrap_err();
    let (code, reason) = (Code::NotFound, Reason::UnknownSession);
    Answer { code, reason, exit: 3, says: &["open a new one"] }.check_status(&refused);
    let content = read_by_another_process(&lab.path("file"));
    assert_eq!(content, [b'L'; LEN], "it came too late");
}

#[test]
fn what_was_in_flight_when_the_wire_was_cut_never_lands() {
    Lab::run(FileSystem::Ext4, partitioned);
}
