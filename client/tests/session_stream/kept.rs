//! Kept pins: what goes to the server when a session is lost or a pin is refused, and what the user
//! is told.

use std::time::Duration;

use pinfold_client::{
    Buffer, Error, InterruptionCause, KeepPolicy, KeptPin, KeptSession, Loss, PinRequest, Reason,
    RevocationReason,
};
use pinfold_proto::v1;
use pinfold_proto::v1::session_event::Event as Say;
use tonic::{Code, Status};

use crate::scripted::{Asked, Call, Conversation, SESSION_ID, Scripted, refusal, soon};

const IDENTITY: v1::FileIdentity = v1::FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };

/// A server, a kept session without RDMA, and what the server hears of the present one.
struct Stage {
    server: Scripted,
    session: KeptSession,
    /// Absent for a moment only.
    conversation: Option<Conversation>,
}

impl Stage {
    async fn open() -> Self {
        let policy = KeepPolicy::new().longest_delay(Duration::from_millis(1));
        let mut server = Scripted::start().await;
        let connecting = tokio::spawn(KeptSession::connect(server.options(), policy));
        let mut conversation = server.conversation().await;
        conversation.welcome_for_long().await;
        let session = soon(connecting).await.unwrap().expect("a session");
        Self { server, session, conversation: Some(conversation) }
    }

    async fn pin(&mut self, pin_id: u64) -> KeptPin {
        let granting = async {
            let asked = pin_asked(&mut self.server).await;
            assert_eq!(asked.request.expected_identity, None);
            asked.answer(grant(pin_id));
        };
        let request = PinRequest::read_write("data", "file");
        let (pin, ()) = tokio::join!(self.session.pin(request), granting);
        pin.expect("a pin")
    }

    /// The session ends without a word about its pins; the client opens another.
    async fn lose_session(&mut self) {
        self.conversation = None;
        let mut conversation = self.server.conversation().await;
        conversation.welcome_for_long().await;
        self.conversation = Some(conversation);
    }

    fn revoke(&self, pin_id: u64) {
        self.conversation.as_ref().expect("a session").say(Say::Revoked(v1::Revoked {
            pin_ids: vec![pin_id],
            generation: Some(generation(pin_id)),
            reason: v1::RevocationReason::LocalReader.into(),
            timings: None,
        }));
    }

    async fn buffer(&self, bytes: &[u8]) -> Buffer {
        let mut buffer = self.session.buffer(bytes.len()).await.unwrap();
        buffer.as_mut_slice().copy_from_slice(bytes);
        buffer
    }

    async fn put(&mut self, pin: &KeptPin, offset: u64) {
        let buffer = self.buffer(&[1]).await;
        let serving = async { self.server.write().await.answer(v1::WriteResponse {}) };
        let (written, ()) = tokio::join!(soon(pin.write(offset, buffer, 1)), serving);
        written.expect("written");
    }
}

fn generation(pin_id: u64) -> v1::Generation {
    v1::Generation { incarnation: 7, counter: pin_id }
}

fn grant(pin_id: u64) -> v1::PinResponse {
    v1::PinResponse {
        pin_id,
        generation: Some(generation(pin_id)),
        identity: Some(IDENTITY),
        range: Some(v1::ByteRange { start: 0, end: 1000 }),
        access: v1::Access::ReadWrite.into(),
        valid_end: 1000,
        ..Default::default()
    }
}

async fn pin_asked(server: &mut Scripted) -> Asked<v1::PinRequest, v1::PinResponse> {
    match server.call().await {
        Call::Pin(asked) => asked,
        _ => panic!("another call than Pin"),
    }
}

/// The client wants the same file again.
async fn pinned_again(server: &mut Scripted, answer: Result<u64, Status>) {
    let asked = loop {
        // A pin that was revoked is given back too, whenever its turn comes.
        match server.call().await {
            Call::Pin(asked) => break asked,
            Call::Unpin(asked) => asked.answer(v1::UnpinResponse {}),
            _ => panic!("another call than Pin"),
        }
    };
    assert_eq!(asked.request.expected_identity, Some(IDENTITY));
    match answer {
        Ok(pin_id) => asked.answer(grant(pin_id)),
        Err(status) => asked.refuse(status),
    }
}

fn busy() -> Status {
    refusal(Code::FailedPrecondition, Reason::FileBusy, "open in 4711 (cat)")
}

fn counters(interruption: &pinfold_client::Interruption) -> (u64, Option<u64>) {
    (interruption.old.counter, interruption.new.map(|generation| generation.counter))
}

#[tokio::test]
async fn after_a_lost_session_the_old_pin_is_ended_before_it_is_pinned_again() {
    let mut stage = Stage::open().await;
    let pin = stage.pin(1).await;
    stage.put(&pin, 3).await;
    // A piece that nobody waits for, and that the server still has.
    let buffer = stage.buffer(&[1]).await;
    let inside = tokio::select! {
        _ = pin.write(5, buffer, 1) => panic!("it has no answer"),
        inside = stage.server.write() => inside,
    };
    stage.lose_session().await;
    let Call::Unpin(asked) = stage.server.call().await else {
        panic!("pinned beside what is left of the old session");
    };
    assert_eq!((asked.request.session_id.as_slice(), asked.request.pin_id), (SESSION_ID, 1));
    assert!(stage.server.is_quiet());
    // The server knows nothing of it any more.
    asked.refuse(refusal(Code::NotFound, Reason::UnknownSession, "no such session"));
    pinned_again(&mut stage.server, Ok(2)).await;
    let interruption = soon(pin.resume()).await.unwrap().expect("an interruption");
    assert_eq!(interruption.cause, InterruptionCause::SessionLost(Loss::StreamEnded));
    assert_eq!((counters(&interruption), interruption.attempts), ((1, Some(2)), 1));
    assert_eq!(interruption.fate.acknowledged, [3..4]);
    assert_eq!(interruption.fate.unknown, [5..6]);
    stage.put(&pin, 9).await;
    assert_eq!(pin.write_fate().acknowledged, [9..10]);
    drop(inside);
}

#[tokio::test]
async fn two_pins_share_one_new_session() {
    let mut stage = Stage::open().await;
    let (one, two) = (stage.pin(1).await, stage.pin(2).await);
    stage.lose_session().await;
    for _ in 0..4 {
        match stage.server.call().await {
            Call::Unpin(asked) => asked.answer(v1::UnpinResponse {}),
            Call::Pin(asked) => asked.answer(grant(3)),
            _ => panic!("another call"),
        }
    }
    soon(one.resume()).await.unwrap().expect("an interruption");
    soon(two.resume()).await.unwrap().expect("an interruption");
    assert!(stage.server.has_no_other_conversation(), "a second session");
}

#[tokio::test]
async fn what_passes_is_tried_again_and_what_does_not_stops_it() {
    let mut stage = Stage::open().await;
    let pin = stage.pin(1).await;
    stage.revoke(1);
    for _ in 0..5 {
        pinned_again(&mut stage.server, Err(busy())).await;
    }
    let denied = refusal(Code::PermissionDenied, Reason::PermissionDenied, "not yours");
    pinned_again(&mut stage.server, Err(denied)).await;
    let stopped = soon(pin.resume()).await.unwrap_err();
    let Error::GaveUp { attempts: 6, source, .. } = &stopped else { panic!("{stopped:?}") };
    assert_eq!(source.reason(), Some(Reason::PermissionDenied));
    assert!(matches!(pin.check(), Err(Error::GaveUp { .. })));
    pin.accept_change();
    assert!(matches!(pin.check(), Err(Error::GaveUp { .. })), "nothing of the kind");
    pin.try_again();
    pinned_again(&mut stage.server, Ok(2)).await;
    let interruption = soon(pin.resume()).await.unwrap().expect("an interruption");
    assert_eq!((counters(&interruption), interruption.attempts), ((1, Some(2)), 7));
}

#[tokio::test]
async fn a_pin_that_goes_again_before_the_report_is_taken_is_one_interruption() {
    let mut stage = Stage::open().await;
    let pin = stage.pin(1).await;
    stage.put(&pin, 3).await;
    stage.revoke(1);
    pinned_again(&mut stage.server, Ok(2)).await;
    soon(async {
        while pin.interruption().expect("it is not taken").new.is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    stage.revoke(2);
    pinned_again(&mut stage.server, Ok(3)).await;
    let interruption = soon(async {
        loop {
            let interruption = soon(pin.resume()).await.unwrap().expect("an interruption");
            if interruption.new.is_some_and(|new| new.counter == 3) {
                break interruption;
            }
        }
    })
    .await;
    assert_eq!((counters(&interruption), interruption.repeats), ((1, Some(3)), 1));
    assert_eq!(interruption.fate.acknowledged, [3..4]);
    let InterruptionCause::Revoked(revocation) = interruption.cause else { panic!("another") };
    assert_eq!(revocation.reason, RevocationReason::LocalReader);
    assert_eq!(revocation.generation.counter, 1);
}

/// The server refuses before its notice has come: it is an interruption all the same.
#[tokio::test]
async fn a_refusal_that_overtakes_the_notice_is_an_interruption() {
    let mut stage = Stage::open().await;
    let pin = std::sync::Arc::new(stage.pin(1).await);
    let committing = tokio::spawn({
        let pin = pin.clone();
        async move { pin.commit().await }
    });
    let Call::Commit(asked) = stage.server.call().await else { panic!("another call") };
    asked.refuse(refusal(Code::Aborted, Reason::StaleGeneration, "over"));
    stage.revoke(1);
    let failed = soon(committing).await.unwrap().unwrap_err();
    let Error::Interrupted { cause, .. } = failed else { panic!("{failed}") };
    assert!(matches!(*cause, InterruptionCause::Revoked(_)), "{cause:?}");
}

#[tokio::test]
async fn closing_the_session_is_the_end() {
    let mut stage = Stage::open().await;
    let pin = stage.pin(1).await;
    stage.put(&pin, 3).await;
    let closing = tokio::spawn(stage.session.clone().close());
    let mut conversation = stage.conversation.take().expect("a session");
    assert_eq!(conversation.hear_past_heartbeats().await, None);
    assert!(!closing.is_finished(), "the server has not ended it yet");
    drop(conversation);
    soon(closing).await.unwrap();
    let stopped = soon(pin.resume()).await.unwrap_err();
    let Error::GaveUp { source, .. } = &stopped else { panic!("{stopped}") };
    assert!(matches!(source.as_ref(), Error::SessionLost { loss: Loss::Closed, .. }), "{source}");
    assert_eq!(pin.interruption().unwrap().fate.acknowledged, [3..4], "it is not forgotten");
    let refused = soon(stage.session.session()).await.unwrap_err();
    assert!(matches!(refused, Error::SessionLost { loss: Loss::Closed, .. }), "{refused}");
    soon(pin.unpin()).await.expect("nothing is held");
}

#[tokio::test]
async fn an_unpin_gives_back_what_is_held_now() {
    let mut stage = Stage::open().await;
    let pin = stage.pin(1).await;
    let unpinning = tokio::spawn(pin.unpin());
    let Call::Unpin(asked) = stage.server.call().await else { panic!("another call") };
    assert_eq!(asked.request.pin_id, 1);
    asked.answer(v1::UnpinResponse {});
    soon(unpinning).await.unwrap().unwrap();

    let pin = stage.pin(2).await;
    drop(pin);
    let Call::Unpin(asked) = stage.server.call().await else { panic!("another call") };
    assert_eq!(asked.request.pin_id, 2);
}
