//! A session with more pins than any queue holds hears of each of them.

use std::time::{Duration, Instant};

use pinfold_client::{Error, Pin, PinRequest, RevocationReason, Session};
use pinfold_proto::v1;
use pinfold_proto::v1::session_request::Message;

use crate::host::{Host, RawSession, soon, until};

const FILES: usize = 3000;

async fn pin_all(host: &Host, session: &Session) -> Vec<Pin> {
    let mut pins = Vec::with_capacity(FILES);
    for number in 0..FILES {
        let name = format!("{number}");
        host.make_file(&name, b"x");
        pins.push(session.pin(PinRequest::read_write("data", name)).await.unwrap());
    }
    pins
}

/// Each pin has heard that it was taken back for this reason, and the server that it was drained.
async fn assert_all_drained(pins: &[Pin], wanted: RevocationReason) {
    for pin in pins {
        until("the pin is revoked", async || matches!(pin.check(), Err(Error::Revoked { .. })))
            .await;
        let Err(Error::Revoked { revocation, .. }) = pin.check() else { unreachable!() };
        assert_eq!(revocation.reason, wanted);
        let timings = revocation.timings.expect("timings");
        assert!(timings.drained.is_some(), "its drain ended by the deadline: {timings:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quiesce_tells_every_pin_of_a_large_session() {
    let host = Host::start();
    let (session, operator) = (host.connect().await, host.connect().await);
    let pins = pin_all(&host, &session).await;
    let begin = Instant::now();
    let quieted = soon(operator.quiesce("data")).await.unwrap();
    println!("{FILES} files quiesced in {:?}", begin.elapsed());
    assert_eq!(quieted.revoked_pins as usize, FILES);
    assert_all_drained(&pins, RevocationReason::Quiesce).await;
    assert!(session.loss().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shutdown_tells_every_pin_of_a_large_session() {
    let mut host = Host::start();
    let session = host.connect().await;
    let pins = pin_all(&host, &session).await;
    host.begin_to_stop();
    assert_all_drained(&pins, RevocationReason::Shutdown).await;
}

/// A client that sends heartbeats, and takes nothing of what it is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_that_can_not_be_told_is_ended() {
    let host = Host::start_with(|config| config.live_for(Duration::from_secs(2)));
    // The welcome fits, and then no more until the client has read it.
    let mut deaf = RawSession::open(&host, 64).await;
    let say = deaf.say.clone();
    let heartbeats = tokio::spawn(async move {
        for sequence in 0.. {
            let beat = v1::Heartbeat { sequence };
            let message = v1::SessionRequest { message: Some(Message::Heartbeat(beat)) };
            if say.send(message).is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    for number in 0..20 {
        let path = format!("{number}");
        host.make_file(&path, b"x");
        let request = v1::PinRequest {
            session_id: deaf.id.clone(),
            export: "data".to_owned(),
            path,
            access: v1::Access::Read.into(),
            ..Default::default()
        };
        deaf.client.pin(request).await.unwrap();
    }
    let other = host.connect().await;
    let clients = async || other.inspect().await.unwrap().sessions.len();
    assert_eq!(clients().await, 2);
    soon(other.quiesce("data")).await.unwrap();
    until("its session has ended", async || clients().await == 1).await;
    heartbeats.abort();
}
