//! Several queue pairs in one session: its pins are spread over them, and what becomes of one of them is
//! nothing to the others; what becomes of the session is.
#![forbid(unsafe_code)]

use pinfold_client::{CompletionStatus, DrainPolicy, Event, Pin, PinRequest, Session, WriteReport};
use pinfold_lab::{
    EXPORT, ForeignClient, Lab, Pattern, Truncation, eventually, next_revocation,
    on_each_file_system, queue_pairs, read_by_another_process, remote_slice,
};
use pinfold_proto::v1;
use tokio::task::JoinSet;
use tonic::Code;

const PAGE: usize = 4096;
const LANES: usize = 3;

/// Ends of queue pairs that are connected, in this process and the server.
fn connected() -> usize {
    queue_pairs().values().filter(|state| *state == "RTS").count()
}

async fn pin(session: &Session, name: &str) -> Pin {
    session.pin(PinRequest::read_write(EXPORT, name)).await.unwrap()
}

/// Of no client.
fn nowhere() -> v1::Endpoint {
    v1::Endpoint { gid: vec![1; 16], ..v1::Endpoint::default() }
}

async fn session(lab: &Lab, policy: DrainPolicy) -> Session {
    lab.session_with(lab.options().lanes(LANES as u32).drain_policy(policy)).await
}

on_each_file_system! {
    async fn pins_are_spread_over_the_lanes_and_written_at_a_time(lab in Lab) {
        const ROUNDS: u64 = 40;
        lab.make_file("file", (2 * LANES * PAGE) as u64);
        let session = session(&lab, DrainPolicy::Automatic).await;
        assert_eq!(connected(), 2, "a session begins with one");
        let mut pins = Vec::new();
        for number in 0..2 * LANES {
            pins.push(pin(&session, "file").await);
            assert_eq!(connected(), 2 * LANES.min(number + 1), "pin {number}");
        }
        let mut writers = JoinSet::new();
        for (number, pin) in pins.into_iter().enumerate() {
            let mut buffer = session.buffer(PAGE).await.unwrap();
            writers.spawn(async move {
                let offset = (number * PAGE) as u64;
                for round in 0..ROUNDS {
                    Pattern(round).fill(offset, buffer.as_mut_slice());
                    let (back, report) = pin.write(offset, buffer, PAGE).await.unwrap();
                    assert_eq!(report, WriteReport { rdma_bytes: PAGE as u64, stream_bytes: 0 });
                    buffer = back;
                }
                pin.commit().await.unwrap();
                pin.unpin().await.unwrap();
            });
        }
        while let Some(ended) = writers.join_next().await {
            ended.unwrap();
        }
        Pattern(ROUNDS - 1).check(0, &read_by_another_process(&lab.path("file")), "in the file");
        // No pin is left to be spread: the next one goes where there are the fewest, and connects nothing.
        pin(&session, "file").await.unpin().await.unwrap();
        assert_eq!(connected(), 2 * LANES);
        session.close().await;
        eventually("all of them go with the session", async || queue_pairs().is_empty()).await;
    }

    /// Who drains keeps all of its queue pairs; who does not loses the one that it goes on writing with.
    async fn who_ignores_a_notice_loses_one_of_them(lab in Lab) {
        for name in ["file", "other"] {
            lab.make_file(name, PAGE as u64);
        }
        let listens = session(&lab, DrainPolicy::Automatic).await;
        let deaf = session(&lab, DrainPolicy::Ignore).await;
        let wanted = pin(&deaf, "file").await;
        // On the second lane; raw requests go by the first.
        let other = pin(&deaf, "other").await;
        let mut pins = vec![pin(&deaf, "file").await];
        for _ in 0..LANES {
            pins.push(pin(&listens, "file").await);
        }
        assert_eq!(connected(), 4 * LANES);
        let (mut told, mut ignored) = (listens.events(), deaf.events());
        let truncation = Truncation::start(lab.path("file"), 0);
        assert!(matches!(ignored.next().await, Some(Event::Draining { .. })));
        next_revocation(&mut told).await;
        next_revocation(&mut ignored).await;
        truncation.done().await;

        assert_eq!(connected(), 4 * LANES, "a break is no reason to lose one");
        let key = remote_slice(&wanted.grant().segments[0], 0, PAGE);
        let (_, status) = deaf.raw_write(key, deaf.buffer(PAGE).await.unwrap()).await.unwrap();
        assert_eq!(status, CompletionStatus::RemoteAccess);
        let lost = async || connected() == 4 * LANES - 2;
        eventually("both ends of the lane that it wrote by are lost", lost).await;
        let mut buffer = deaf.buffer(PAGE).await.unwrap();
        buffer.as_mut_slice().fill(b'O');
        other.write(0, buffer, PAGE).await.expect("it has another lane");
        other.commit().await.unwrap();
        other.unpin().await.unwrap();
        assert_eq!(read_by_another_process(&lab.path("other")), [b'O'; PAGE]);
    }

    /// The numbers are the client's, and each has one queue pair at a time.
    async fn a_number_has_one_queue_pair(lab in Lab) {
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        lab.make_file("file", PAGE as u64);
        let first = client.connect_number(63).await;
        let key = client.pin("file").await.segments[0];
        assert_eq!(first.write(&key, 0, &[1; PAGE]).await, CompletionStatus::Success);
        let second = client.connect_number(7).await;
        assert_eq!(second.write(&key, 0, &[2; PAGE]).await, CompletionStatus::Success);
        let third = client.connect_number(63).await;
        assert!(!queue_pairs().contains_key(&first.server_queue_pair.into()));
        assert_eq!(third.write(&key, 0, &[3; PAGE]).await, CompletionStatus::Success);
        assert_eq!(second.write(&key, 0, &[4; PAGE]).await, CompletionStatus::Success);

        let refused = client.connect_end(64, nowhere()).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("queue_pairs_max"), "{refused}");
        client.close().await;
        assert_eq!(read_by_another_process(&lab.path("file")), [4; PAGE]);
    }
}
