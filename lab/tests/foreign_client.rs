//! A client that was written from the `.proto` alone: what the contract says is all that it needs,
//! and whatever it does wrong is refused, or costs it its session, and nobody else anything.
#![forbid(unsafe_code)]

use pinfold_lab::{
    DEADLINE, FileSystem, ForeignClient, Lab, Opener, Pattern, Truncation, on_each_file_system,
    queue_pairs, read_by_another_process, reason_of,
};
use pinfold_proto::v1;
use pinfold_proto::v1::session_request::Message;
use pinfold_verbs::CompletionStatus;
use tonic::{Code, Status};

const PAGE: usize = 4096;
/// Calls.
const GIVEN_UP: usize = 5;

fn check(refused: &Status, code: Code, reason: &str, says: &[&str]) {
    let message = refused.message();
    assert_eq!((refused.code(), reason_of(refused).as_str()), (code, reason), "{message}");
    for word in says {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}

fn check_stale(refused: &Status) {
    check(refused, Code::Aborted, "STALE_GENERATION", &["is over", "pin it again"]);
}

on_each_file_system! {
    async fn the_contract_is_enough(lab in Lab) {
        lab.make_file("file", 4 * PAGE as u64);
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let device = client.welcome.rdma_device.clone().unwrap();
        assert!(device.on_demand_paging && device.active_mtu_bytes == 4096, "{device:?}");
        let early = client.stub.pin(client.pin_request("file")).await.unwrap_err();
        check(&early, Code::FailedPrecondition, "NO_QUEUE_PAIR", &["connect one before pinning"]);
        lab.nothing_is_held().await;

        let lane = client.connect().await;
        let pin = client.pin("file").await;
        let generation = pin.generation.unwrap();
        assert_eq!(generation.incarnation, client.welcome.incarnation);
        let key = &pin.segments[0];
        let pattern = Pattern(1);
        assert!(lane.write(key, 0, &pattern.bytes(0, PAGE)).await.is_success());
        pattern.check(0, &lane.read(key, 0, PAGE).await, "read back by RDMA");
        client.commit(pin.pin_id, pin.generation).await.unwrap();
        let wrong = v1::Generation { counter: generation.counter + 1, ..generation };
        check_stale(&client.commit(pin.pin_id, Some(wrong)).await.unwrap_err());

        // It is told to drain, and never answers.
        let truncation = Truncation::start(lab.path("file"), 2 * PAGE as i64);
        let draining = client.next_draining().await;
        assert_eq!((draining.pin_ids, draining.generation), (vec![pin.pin_id], pin.generation));
        assert_eq!(draining.reason, v1::RevocationReason::LocalWriter as i32);
        assert!(draining.drain_budget_ms > 0);
        let revoked = client.next_revoked().await;
        truncation.done().await;
        assert_eq!((revoked.pin_ids, revoked.generation), (vec![pin.pin_id], pin.generation));
        let timings = revoked.timings.unwrap();
        assert_eq!(timings.drained_us, None, "it said nothing");
        assert!(timings.break_pending_at_release, "the truncate went through because we let go");
        check_stale(&client.commit(pin.pin_id, pin.generation).await.unwrap_err());
        let late = lane.write(key, 0, &[0xee; PAGE]).await;
        assert_eq!(late, CompletionStatus::RemoteAccess);
        // To give back what is gone is no mistake: the two may cross.
        client.unpin(pin.pin_id).await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        assert_eq!(content.len(), 2 * PAGE);
        pattern.check(0, &content[..PAGE], "what was committed");

        // Its queue pair died of the late write; with another one it goes on.
        let lane = client.connect().await;
        let again = client.pin("file").await;
        assert_ne!(again.generation, pin.generation);
        check_stale(&client.commit(again.pin_id, pin.generation).await.unwrap_err());
        assert!(lane.write(&again.segments[0], 0, &Pattern(2).bytes(0, PAGE)).await.is_success());
        lane.read(&again.segments[0], 0, 1).await;
        client.commit(again.pin_id, again.generation).await.unwrap();
        client.close().await;
        lab.nothing_is_held().await;
        Pattern(2).check(0, &read_by_another_process(&lab.path("file"))[..PAGE], "the second pin");
    }

    async fn a_call_that_is_given_up_leaves_no_pin(lab in Lab) {
        lab.make_file("file", PAGE as u64);
        let mut holder = ForeignClient::open(&lab.daemon.url).await;
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let (_holders, _clients) = (holder.connect().await, client.connect().await);
        let first = holder.pin("file").await;
        let truncation = Truncation::start(lab.path("file"), 100);
        holder.next_draining().await;

        // While the file is being taken back a pin waits. An answer to a later call says that it is
        // there, but not that it has begun to wait: so there are several.
        for _ in 0..GIVEN_UP {
            let (mut stub, request) = (client.stub.clone(), client.pin_request("file"));
            let given_up = tokio::spawn(async move { stub.pin(request).await });
            client.stat("file").await;
            client.stat("file").await;
            given_up.abort();
            assert!(given_up.await.unwrap_err().is_cancelled());
        }
        let (mut stub, request) = (client.stub.clone(), client.pin_request("file"));
        let waiting = tokio::spawn(async move { stub.pin(request).await });
        client.stat("file").await;
        holder.say_drained(&[first.pin_id]);
        truncation.done().await;

        // Pins of one file are made in turn.
        let pin = waiting.await.unwrap().unwrap().into_inner();
        let made = pin.pin_id - first.pin_id - 1;
        println!("{made} of {GIVEN_UP} that were given up had been made");
        assert!(made > 0, "those that were given up were made before");
        pinfold_lab::eventually("one pin is on the file", async || {
            client.stat("file").await.pins == 1
        })
        .await;
        client.unpin(pin.pin_id).await.unwrap();
        lab.nothing_is_held().await;
    }
}

/// What the file system has no part in.
fn on_one_file_system<F: Future<Output = ()>>(test: impl FnOnce(Lab) -> F) {
    Lab::run(FileSystem::Ext4, test);
}

/// Opens a session with these as its first messages, and closes this half behind them.
async fn say_first(client: &mut ForeignClient, said: Vec<Message>) -> Status {
    let said = said.into_iter().map(|message| v1::SessionRequest { message: Some(message) });
    let said: Vec<_> = said.collect();
    client.stub.session(tokio_stream::iter(said)).await.unwrap_err()
}

#[test]
fn what_comes_before_a_session_is_refused() {
    on_one_file_system(async |lab| {
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let made_up = v1::PinRequest { session_id: vec![42; 16], ..client.pin_request("file") };
        let refused = client.stub.pin(made_up).await.unwrap_err();
        check(&refused, Code::NotFound, "UNKNOWN_SESSION", &["open a new one"]);

        let beat = Message::Heartbeat(v1::Heartbeat { sequence: 1 });
        let named = |len| Message::Hello(v1::Hello { client_name: "x".repeat(len) });
        for (said, word) in [
            (vec![beat, named(1)], "the first message of a session is Hello"),
            (vec![], "the first message of a session is Hello"),
            (vec![named(257)], "client_name is longer than 256 bytes"),
        ] {
            let refused = say_first(&mut client, said).await;
            check(&refused, Code::InvalidArgument, "MALFORMED_REQUEST", &[word]);
        }
        // A second hello, and an answer to what was never asked, change nothing.
        client.say_drained(&[1, 2, 3]);
        client.connect().await;
    });
}

#[test]
fn an_endpoint_that_can_not_be_right_is_refused() {
    on_one_file_system(async |lab| {
        lab.make_file("file", PAGE as u64);
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let good = v1::Endpoint {
            queue_pair_number: 17,
            packet_sequence_number: 1,
            gid: [&[0; 10][..], &[0xff, 0xff, 127, 0, 0, 1]].concat(),
            lid: 0,
            max_path_mtu_bytes: 4096,
        };
        let failed = (Code::FailedPrecondition, "QUEUE_PAIR_FAILED");
        let malformed = (Code::InvalidArgument, "MALFORMED_REQUEST");
        let bits_24 = 1 << 24;
        let set_mtu = "set the MTU of the network interfaces on both hosts to 4200 or more";
        for (end, (code, reason), word) in [
            (v1::Endpoint { max_path_mtu_bytes: 1024, ..good.clone() }, failed, set_mtu),
            (v1::Endpoint { max_path_mtu_bytes: 0, ..good.clone() }, failed, set_mtu),
            (v1::Endpoint { gid: vec![0; 16], ..good.clone() }, failed, "its GID is zero"),
            (v1::Endpoint { gid: vec![1; 15], ..good.clone() }, malformed, "gid is not 16 bytes"),
            (v1::Endpoint { gid: vec![], ..good.clone() }, malformed, "gid is not 16 bytes"),
            (
                v1::Endpoint { queue_pair_number: 0, ..good.clone() },
                failed,
                "queue pair number is 0",
            ),
            (v1::Endpoint { queue_pair_number: bits_24, ..good.clone() }, failed, "beyond 24 bits"),
            (
                v1::Endpoint { packet_sequence_number: bits_24, ..good.clone() },
                failed,
                "beyond 24 bits",
            ),
            (v1::Endpoint { lid: 1 << 16, ..good.clone() }, malformed, "lid is beyond 16 bits"),
        ] {
            let refused = client.connect_end(0, end.clone()).await.unwrap_err();
            println!("{end:?}: {}", refused.message());
            check(&refused, code, reason, &[word]);
        }
        let session_id = client.session_id();
        let request = v1::ConnectQueuePairRequest { session_id, ..Default::default() };
        let refused = client.stub.connect_queue_pair(request).await.unwrap_err();
        check(&refused, malformed.0, malformed.1, &["client endpoint is missing"]);

        // What was refused left no queue pair to pin with, and the session takes a good one.
        let early = client.stub.pin(client.pin_request("file")).await.unwrap_err();
        check(&early, Code::FailedPrecondition, "NO_QUEUE_PAIR", &[]);
        let lane = client.connect().await;
        let pin = client.pin("file").await;
        assert!(lane.write(&pin.segments[0], 0, &[1; PAGE]).await.is_success());
        client.unpin(pin.pin_id).await.unwrap();
    });
}

/// Waits for the server's timer: ten seconds.
#[test]
fn a_client_that_is_silent_for_its_time_to_live_loses_its_session() {
    on_one_file_system(async |lab| {
        lab.make_file("file", PAGE as u64);
        lab.make_file("other", PAGE as u64);
        let mut lively = ForeignClient::open(&lab.daemon.url).await;
        let mut silent = ForeignClient::open(&lab.daemon.url).await;
        let (livelys, silents) = (lively.connect().await, silent.connect().await);
        let kept = lively.pin("other").await;
        let pin = silent.pin("file").await;
        assert!(silents.write(&pin.segments[0], 0, &[1; PAGE]).await.is_success());
        assert!(queue_pairs().contains_key(&silents.server_queue_pair.into()));
        silent.fall_silent();
        let ended = tokio::time::timeout(DEADLINE, silent.next_event()).await;
        assert_eq!(ended.unwrap(), None, "the server ends the stream");

        pinfold_lab::eventually("its queue pair is gone", async || {
            !queue_pairs().contains_key(&silents.server_queue_pair.into())
        })
        .await;
        let standing = lively.stat("file").await;
        assert_eq!((standing.generation, standing.pins), (None, 0), "its pin went with it");
        let free = Opener::writing(&lab.path("file"));
        let refused = silent.stub.pin(silent.pin_request("file")).await.unwrap_err();
        check(&refused, Code::NotFound, "UNKNOWN_SESSION", &["open a new one"]);
        drop(free);

        // Who gave signs of life lost nothing.
        assert!(queue_pairs().contains_key(&livelys.server_queue_pair.into()));
        assert!(livelys.write(&kept.segments[0], 0, &[2; PAGE]).await.is_success());
        lively.commit(kept.pin_id, kept.generation).await.unwrap();
        lively.unpin(kept.pin_id).await.unwrap();
        lab.nothing_is_held().await;
    });
}
