//! How a session begins, lives and ends, against a server that each test plays by hand. No device
//! is needed: what needs one is tested in the lab.
#![allow(clippy::single_range_in_vec_init, reason = "a fate is made of lists of ranges")]

mod kept;
mod pieces;
mod scripted;

use std::time::Duration;

use pinfold_client::{
    Code, ConnectOptions, Created, Error, Event, FileIdentity, IfExists, Loss, PinRequest,
    RdmaDevice, Reason, RemoteKey, RemoteSlice, RevocationReason, Session, Transport,
};
use pinfold_proto::v1;
use pinfold_proto::v1::session_event::Event as Say;
use pinfold_proto::v1::session_request::Message;
use scripted::{Conversation, HANGS, Scripted, refusal, soon};
use tokio::net::TcpSocket;
use tonic::Status;

/// A session in which time plays no part, and the server's side of it.
async fn open() -> (Session, Conversation) {
    let mut server = Scripted::start().await;
    let options = server.options();
    let connecting = tokio::spawn(Session::connect(options));
    let mut conversation = server.conversation().await;
    conversation.welcome_for_long().await;
    let session = soon(connecting).await.unwrap().expect("a session");
    (session, conversation)
}

#[tokio::test]
async fn a_session_begins_with_hello_and_welcome_and_ends_with_the_stream() {
    let mut server = Scripted::start().await;
    let options = server.options().client_name("a test");
    let connecting = tokio::spawn(Session::connect(options));
    let mut conversation = server.conversation().await;
    let long = Duration::from_secs(600);
    let hello = conversation.welcome(long, long).await;
    assert_eq!(hello.client_name, "a test");
    let session = soon(connecting).await.unwrap().unwrap();
    assert_eq!(session.server_version(), "1.2.3");

    let closing = tokio::spawn(session.close());
    assert_eq!(conversation.hear_past_heartbeats().await, None);
    drop(conversation);
    soon(closing).await.unwrap();
}

#[tokio::test]
async fn a_dropped_session_ends_too() {
    let (session, mut conversation) = open().await;
    drop(session);
    assert_eq!(conversation.hear_past_heartbeats().await, None);
}

#[tokio::test]
async fn heartbeats_keep_coming_while_they_are_answered() {
    let mut server = Scripted::start().await;
    let connecting = tokio::spawn(Session::connect(server.options()));
    let mut conversation = server.conversation().await;
    conversation.welcome(Duration::from_millis(3), Duration::from_secs(600)).await;
    let session = soon(connecting).await.unwrap().unwrap();
    for expected in 1..=20 {
        let Some(Message::Heartbeat(heartbeat)) = conversation.hear().await else {
            panic!("no heartbeat");
        };
        assert_eq!(heartbeat.sequence, expected);
        let reply = v1::HeartbeatReply { sequence: heartbeat.sequence };
        conversation.say(Say::HeartbeatReply(reply));
    }
    drop(session);
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let mut server = Scripted::start().await;
    let connecting = tokio::spawn(Session::connect(server.options()));
    let mut conversation = server.conversation().await;
    let time_to_live = Duration::from_millis(100);
    conversation.welcome(Duration::from_millis(30), time_to_live).await;
    let session = soon(connecting).await.unwrap().unwrap();
    let loss = Loss::Silence(time_to_live);
    assert_eq!(soon(session.events().next()).await, Some(Event::Disconnected { loss }));
    let error = soon(session.stat("data", "file")).await.unwrap_err();
    assert!(matches!(error, Error::SessionLost { loss: Loss::Silence(_), .. }), "{error}");
}

#[tokio::test]
async fn a_stream_that_ends_ends_the_session() {
    let (session, conversation) = open().await;
    let mut events = session.events();
    drop(conversation);
    let over = Event::Disconnected { loss: Loss::StreamEnded };
    assert_eq!(soon(events.next()).await, Some(over.clone()));
    assert_eq!(soon(events.next()).await, None);

    // A late subscriber hears it as well.
    let mut late = session.events();
    assert_eq!(soon(late.next()).await, Some(over));
    assert_eq!(soon(late.next()).await, None);
}

#[tokio::test]
async fn a_stream_that_fails_says_why() {
    let (session, conversation) = open().await;
    let mut events = session.events();
    conversation.fail(Status::unavailable("going down"));
    let Some(Event::Disconnected { loss: Loss::StreamFailed(message) }) = soon(events.next()).await
    else {
        panic!("no word of it");
    };
    assert_eq!(message, "going down");
}

#[tokio::test]
async fn a_call_without_an_answer_ends_with_the_session() {
    let (session, conversation) = open().await;
    let (outcome, ()) = tokio::join!(soon(session.stat("data", HANGS)), async {
        drop(conversation);
    });
    assert!(matches!(outcome, Err(Error::SessionLost { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_refusal_keeps_its_reason() {
    let (session, _conversation) = open().await;
    let error = soon(session.stat("data", "absent")).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::FileNotFound));
    assert!(matches!(error, Error::Refused { code: Code::NotFound, .. }), "{error:?}");
    assert_eq!(error.to_string(), "the server refused to stat data/absent: no file data/absent");
}

#[tokio::test]
async fn an_unknown_session_is_told_apart() {
    let mut server = Scripted::start().await;
    let connecting = tokio::spawn(Session::connect(server.options()));
    let mut conversation = server.conversation().await;
    assert!(matches!(conversation.hear().await, Some(Message::Hello(_))));
    conversation.say(Say::Welcome(v1::Welcome {
        session_id: b"some other id".to_vec(),
        heartbeat_interval_ms: 60_000,
        time_to_live_ms: 600_000,
        stream_piece_bytes_max: 1 << 20,
        ..Default::default()
    }));
    let session = soon(connecting).await.unwrap().unwrap();
    let error = soon(session.stat("data", "file")).await.unwrap_err();
    assert_eq!(error.reason(), Some(Reason::UnknownSession));
}

#[tokio::test]
async fn create_carries_size_and_choice() {
    let (session, _conversation) = open().await;
    let identity = FileIdentity { device: 1, inode: 4096, birth_time_ns: 3 };
    let made = soon(session.create("data", "new", 4096, IfExists::Fail)).await.unwrap();
    assert_eq!(made, Created { identity, created: true });
    let made = soon(session.create("data", "new", 4096, IfExists::Resize)).await.unwrap();
    assert_eq!(made, Created { identity, created: false });
}

#[tokio::test]
async fn notices_become_events_and_an_idle_pin_on_its_way_is_drained() {
    let (session, mut conversation) = open().await;
    let mut events = session.events();
    let generation = Some(v1::Generation { incarnation: 7, counter: 8 });
    conversation.say(Say::Draining(v1::Draining {
        pin_ids: vec![1, 2],
        generation,
        reason: v1::RevocationReason::LocalWriter.into(),
        drain_budget_ms: 1500,
    }));
    let Some(Event::Draining { notice, pins }) = soon(events.next()).await else {
        panic!("no notice");
    };
    assert_eq!(pins, [1, 2]);
    assert_eq!(notice.reason, RevocationReason::LocalWriter);
    assert_eq!(notice.drain_budget, Duration::from_millis(1500));

    conversation.say(Say::Revoked(v1::Revoked {
        pin_ids: vec![1, 2],
        generation,
        reason: v1::RevocationReason::LocalWriter.into(),
        timings: Some(v1::RevocationTimings {
            noticed_us: 10,
            drained_us: None,
            fenced_us: 20,
            released_us: 30,
            break_pending_at_release: true,
        }),
    }));
    let Some(Event::Revoked { revocation, .. }) = soon(events.next()).await else {
        panic!("no revocation");
    };
    assert_eq!(revocation.generation.to_string(), "0000000000000007.8");
    let timings = revocation.timings.expect("timings");
    assert_eq!((timings.drained, timings.released), (None, Duration::from_micros(30)));

    // Nothing is in flight on pins that it does not have.
    let drained = Message::Drained(v1::Drained { pin_ids: vec![1, 2] });
    assert_eq!(conversation.hear_past_heartbeats().await, Some(drained));
    drop(session);
    assert_eq!(conversation.hear_past_heartbeats().await, None);
}

#[tokio::test]
async fn a_session_without_a_device_does_no_rdma() {
    let (session, _conversation) = open().await;
    assert!(!session.has_rdma());
    let because = "the session was opened without an RDMA device";
    assert_eq!(session.no_rdma_because(), Some(because));
    let request = PinRequest::read("data", "file").transport(Transport::Rdma);
    let error = soon(session.pin(request)).await.unwrap_err();
    assert!(matches!(error, Error::StreamOnly { .. }), "{error}");
    assert_eq!(error.to_string(), format!("cannot pin data/file without RDMA: {because}"));
    let remote = RemoteSlice { address: 0, key: RemoteKey::new(1), len: 1 };
    let buffer = session.buffer(1).await.unwrap();
    let failed = session.raw_write(remote, buffer).await.unwrap_err();
    assert!(matches!(failed.error, Error::StreamOnly { .. }), "{failed}");
    let buffer = failed.buffer.expect("the buffer");
    let failed = session.raw_read(remote, buffer).await.unwrap_err();
    assert!(matches!(failed.error, Error::StreamOnly { .. }), "{failed}");
}

/// Whether this host has a device or not: the server has none.
#[tokio::test]
async fn a_server_without_a_device_gets_a_session_without_rdma() {
    let mut server = Scripted::start().await;
    let options = server.options().rdma_device(RdmaDevice::Auto);
    let connecting = tokio::spawn(Session::connect(options));
    let mut conversation = server.conversation().await;
    conversation.welcome_for_long().await;
    let session = soon(connecting).await.unwrap().expect("a session");
    assert!(!session.has_rdma());
    assert!(session.no_rdma_because().is_some());
}

#[tokio::test]
async fn a_welcome_without_a_stream_path_is_none() {
    let mut server = Scripted::start().await;
    let connecting = tokio::spawn(Session::connect(server.options()));
    let mut conversation = server.conversation().await;
    assert!(matches!(conversation.hear().await, Some(Message::Hello(_))));
    conversation.say(Say::Welcome(v1::Welcome::default()));
    let error = soon(connecting).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
}

#[tokio::test]
async fn a_server_may_refuse_the_session() {
    let mut server = Scripted::start().await;
    let connecting = tokio::spawn(Session::connect(server.options()));
    let conversation = server.conversation().await;
    conversation.fail(refusal(Code::ResourceExhausted, Reason::QuotaExceeded, "too many"));
    let error = soon(connecting).await.unwrap().unwrap_err();
    assert_eq!(error.reason(), Some(Reason::QuotaExceeded));
}

#[tokio::test]
async fn the_first_word_must_be_welcome() {
    for first in [Some(Say::HeartbeatReply(v1::HeartbeatReply { sequence: 1 })), None] {
        let mut server = Scripted::start().await;
        let connecting = tokio::spawn(Session::connect(server.options()));
        let conversation = server.conversation().await;
        if let Some(first) = first {
            conversation.say(first);
        }
        drop(conversation);
        let error = soon(connecting).await.unwrap().unwrap_err();
        assert!(matches!(error, Error::Protocol { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_server_that_never_welcomes_is_given_up() {
    let mut server = Scripted::start().await;
    let options = server.options().timeout(Duration::from_secs(1));
    let connecting = tokio::spawn(Session::connect(options));
    let error = soon(connecting).await.unwrap().unwrap_err();
    assert!(matches!(error, Error::NoWelcome { .. }), "{error}");
    drop(server.conversation().await);
}

#[tokio::test]
async fn nobody_there_is_told_apart_from_a_bad_address() {
    // Bound, so that nobody else gets the port, but not listening.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint = format!("http://{}", socket.local_addr().unwrap());
    let options = ConnectOptions::new(&endpoint).rdma_device(RdmaDevice::None);
    let error = soon(Session::connect(options)).await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&endpoint), "{error}");

    for endpoint in ["", "localhost:7350", "https://localhost:7350", "http://a b"] {
        let options = ConnectOptions::new(endpoint).rdma_device(RdmaDevice::None);
        let error = soon(Session::connect(options)).await.unwrap_err();
        assert!(matches!(error, Error::BadEndpoint { .. }), "{endpoint}: {error}");
    }
}

#[tokio::test]
async fn an_absent_device_is_named() {
    let options = ConnectOptions::new("http://127.0.0.1:1")
        .rdma_device(RdmaDevice::Named("nosuchdevice9".to_owned()));
    let error = soon(Session::connect(options)).await.unwrap_err();
    let Error::NoRdmaDevice { source } = error else {
        panic!("{error}");
    };
    assert!(source.to_string().contains("nosuchdevice9"), "{source}");
}
