//! The stream path: which pieces go out, and what a drain makes of them.

use pinfold_client::{
    Buffer, Error, Event, Pin, PinRequest, ReadReport, Reason, RevocationReason, Session,
    Transport, WriteReport,
};
use pinfold_proto::v1;
use pinfold_proto::v1::session_event::Event as Say;
use pinfold_proto::v1::session_request::Message;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use crate::scripted::{Asked, Call, Conversation, PIECE, Scripted, refusal, soon};

const GENERATION: v1::Generation = v1::Generation { incarnation: 7, counter: 8 };
const FILE_BYTES: u64 = 1000;

/// A server, a session without RDMA, and what the server hears of it.
struct Stage {
    server: Scripted,
    session: Session,
    conversation: Conversation,
}

impl Stage {
    async fn open() -> Self {
        let mut server = Scripted::start().await;
        let connecting = tokio::spawn(Session::connect(server.options()));
        let mut conversation = server.conversation().await;
        conversation.welcome_for_long().await;
        let session = soon(connecting).await.unwrap().expect("a session");
        Self { server, session, conversation }
    }

    /// Pins, and hands out the request that the server got.
    async fn pin(&mut self, pin_id: u64, request: PinRequest) -> (Pin, v1::PinRequest) {
        let granting = async {
            let Call::Pin(asked) = self.server.call().await else {
                panic!("another call than Pin");
            };
            let request = asked.request.clone();
            asked.answer(grant(pin_id));
            request
        };
        let (pin, request) = tokio::join!(self.session.pin(request), granting);
        (pin.expect("a pin"), request)
    }

    async fn pin_all(&mut self, pin_id: u64) -> Pin {
        self.pin(pin_id, PinRequest::read_write("data", "file")).await.0
    }

    /// The server wants pins back.
    fn drain(&self, pin_ids: &[u64]) {
        self.conversation.say(Say::Draining(v1::Draining {
            pin_ids: pin_ids.to_vec(),
            generation: Some(GENERATION),
            reason: v1::RevocationReason::Shrink.into(),
            drain_budget_ms: 1000,
        }));
    }

    /// The server has taken pins back.
    fn revoke(&self, pin_ids: &[u64]) {
        self.conversation.say(Say::Revoked(v1::Revoked {
            pin_ids: pin_ids.to_vec(),
            generation: Some(GENERATION),
            reason: v1::RevocationReason::Remove.into(),
            timings: None,
        }));
    }

    async fn drained(&mut self) -> Vec<u64> {
        match self.conversation.hear_past_heartbeats().await {
            Some(Message::Drained(drained)) => drained.pin_ids,
            other => panic!("{other:?} instead of Drained"),
        }
    }

    async fn buffer(&self, bytes: &[u8]) -> Buffer {
        let mut buffer = self.session.buffer(bytes.len()).await.unwrap();
        buffer.as_mut_slice().copy_from_slice(bytes);
        buffer
    }
}

fn grant(pin_id: u64) -> v1::PinResponse {
    v1::PinResponse {
        pin_id,
        generation: Some(GENERATION),
        identity: Some(v1::FileIdentity::default()),
        range: Some(v1::ByteRange { start: 0, end: FILE_BYTES }),
        access: v1::Access::ReadWrite.into(),
        valid_end: FILE_BYTES,
        no_rdma_because: "it was not asked for".to_owned(),
        ..Default::default()
    }
}

/// Bytes that differ from their neighbours.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|index| (index * 7 + index / 251) as u8).collect()
}

fn stale() -> Status {
    refusal(Code::Aborted, Reason::StaleGeneration, "over")
}

fn draining() -> Status {
    refusal(Code::Unavailable, Reason::FileDraining, "being taken back")
}

#[tokio::test]
async fn a_session_without_rdma_asks_for_the_stream_path_and_says_why() {
    let mut stage = Stage::open().await;
    let request = PinRequest::read_write("data", "file").exclusive().reserve_end(5000);
    let (pin, asked) = stage.pin(1, request).await;
    assert_eq!(asked.transport(), v1::Transport::Stream);
    assert!(asked.exclusive);
    assert_eq!((asked.reserve_end, pin.grant().reserved_end), (5000, 5000));
    assert_eq!(pin.grant().no_rdma_because.as_deref(), stage.session.no_rdma_because());

    let request = PinRequest::read("data", "file").transport(Transport::Stream);
    let (pin, asked) = stage.pin(2, request).await;
    assert_eq!(asked.transport(), v1::Transport::Stream);
    assert_eq!(pin.grant().no_rdma_because.as_deref(), Some("it was not asked for"));
}

#[tokio::test]
async fn a_write_goes_out_in_pieces_a_few_at_a_time() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let bytes = pattern(10 * PIECE);
    let (offset, mut file) = (5, vec![0; FILE_BYTES as usize]);
    let buffer = stage.buffer(&bytes).await;
    let writing = tokio::spawn(async move { pin.write(offset, buffer, 10 * PIECE).await });

    // Cut at multiples of the longest piece: eleven, and four of them at a time.
    let mut open: Vec<Asked<v1::WriteRequest, v1::WriteResponse>> = Vec::new();
    for _ in 0..11 {
        if open.len() == 4 {
            assert!(stage.server.is_quiet(), "a fifth piece");
            open.remove(0).answer(v1::WriteResponse {});
        }
        let asked = stage.server.write().await;
        let request = &asked.request;
        assert_eq!((request.pin_id, request.generation), (1, Some(GENERATION)));
        assert!(request.data.len() <= PIECE);
        let at = request.offset as usize;
        file[at..at + request.data.len()].copy_from_slice(&request.data);
        open.push(asked);
    }
    for asked in open {
        asked.answer(v1::WriteResponse {});
    }
    let (_, report) = soon(writing).await.unwrap().expect("written");
    let expected = WriteReport { rdma_bytes: 0, stream_bytes: bytes.len() as u64 };
    assert_eq!(report, expected);
    let offset = offset as usize;
    assert_eq!(file[offset..offset + bytes.len()], bytes);
    assert!(file[offset + bytes.len()..].iter().all(|byte| *byte == 0));
}

#[tokio::test]
async fn a_read_ends_where_the_file_does() {
    let mut stage = Stage::open().await;
    let (pin, _) = stage.pin(1, PinRequest::read("data", "file").reserve_end(2000)).await;
    pin.extend_to(1010);
    assert_eq!(pin.usable(), 0..1010);
    let buffer = stage.buffer(&[0; 100]).await;
    let file = pattern(1010);
    let serving = async {
        // 1000..1008 and 1008..1010
        for _ in 0..2 {
            let asked = stage.server.read().await;
            let at = asked.request.offset as usize;
            let data = file[at..at + asked.request.length as usize].to_vec();
            asked.answer(v1::ReadResponse { data });
        }
    };
    let (read, ()) = tokio::join!(soon(pin.read(1000, 10, buffer)), serving);
    let (buffer, report) = read.expect("read");
    assert_eq!(report, ReadReport { rdma_bytes: 0, stream_bytes: 10 });
    assert_eq!(buffer.as_slice()[..10], file[1000..]);
    let failed = pin.read(1000, 11, buffer).await.unwrap_err();
    assert!(matches!(failed.error, Error::OutsidePin { .. }), "{failed}");
}

#[tokio::test]
async fn an_answer_of_another_length_is_told() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let buffer = stage.buffer(&[0; 8]).await;
    let serving = async {
        stage.server.read().await.answer(v1::ReadResponse { data: vec![1; 9] });
    };
    let (read, ()) = tokio::join!(soon(pin.read(0, 8, buffer)), serving);
    assert!(matches!(read.unwrap_err().error, Error::Protocol { .. }));
}

#[tokio::test]
async fn a_commit_goes_straight_out() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let serving = async {
        let Call::Commit(asked) = stage.server.call().await else {
            panic!("another call than Commit");
        };
        assert_eq!(asked.request.generation, Some(GENERATION));
        asked.answer(v1::CommitResponse { flush_us: 5 });
    };
    let (committed, ()) = tokio::join!(soon(pin.commit()), serving);
    assert_eq!(committed.unwrap().flush.as_micros(), 5);
}

/// Another, idle pin drains at the notice: had the busy one been taken for drained, the server
/// would have heard of both at once.
#[tokio::test]
async fn a_piece_that_is_inside_delays_drained_and_no_other_begins() {
    let mut stage = Stage::open().await;
    let (busy, idle) = (stage.pin_all(1).await, stage.pin_all(2).await);
    let buffer = stage.buffer(&pattern(2 * PIECE)).await;
    let writing = tokio::spawn(async move {
        let written = busy.write(0, buffer, 2 * PIECE).await;
        (busy, written)
    });
    let inside = [stage.server.write().await, stage.server.write().await];
    stage.drain(&[1, 2]);
    assert_eq!(stage.drained().await, [2]);
    assert!(matches!(idle.check(), Err(Error::Draining { .. })));

    let [first, second] = inside;
    first.answer(v1::WriteResponse {});
    second.answer(v1::WriteResponse {});
    assert_eq!(stage.drained().await, [1]);
    let (busy, written) = soon(writing).await.unwrap();
    let (buffer, report) = written.expect("what was inside has ended well");
    assert_eq!(report.stream_bytes, 2 * PIECE as u64);

    let failed = soon(busy.write(0, buffer, 1)).await.unwrap_err();
    let Error::Draining { notice, .. } = failed.error else { panic!("{failed}") };
    assert_eq!(notice.reason, RevocationReason::Shrink);
    let failed = soon(busy.read(0, 1, failed.buffer.unwrap())).await.unwrap_err();
    assert!(matches!(failed.error, Error::Draining { .. }), "{failed}");
    assert!(stage.server.is_quiet(), "a piece after the drain");
}

#[tokio::test]
async fn a_notice_in_the_middle_ends_a_long_write() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let mut events = stage.session.events();
    let buffer = stage.buffer(&pattern(8 * PIECE)).await;
    let writing = tokio::spawn(async move {
        let written = pin.write(0, buffer, 8 * PIECE).await;
        (pin, written)
    });
    let mut inside = Vec::new();
    for _ in 0..4 {
        inside.push(stage.server.write().await);
    }
    stage.drain(&[1]);
    assert!(matches!(soon(events.next()).await, Some(Event::Draining { .. })));
    for asked in inside {
        asked.answer(v1::WriteResponse {});
    }
    assert_eq!(stage.drained().await, [1]);
    let (_pin, written) = soon(writing).await.unwrap();
    let failed = written.unwrap_err();
    assert!(matches!(failed.error, Error::Draining { .. }), "{failed}");
    assert!(failed.buffer.is_some());
    assert!(stage.server.is_quiet(), "a piece after the drain");
}

#[tokio::test]
async fn a_piece_that_nobody_waits_for_still_counts() {
    let mut stage = Stage::open().await;
    let (busy, _idle) = (stage.pin_all(1).await, stage.pin_all(2).await);
    let buffer = stage.buffer(&[1]).await;
    let inside = tokio::select! {
        _ = busy.write(0, buffer, 1) => panic!("it has no answer"),
        inside = stage.server.write() => inside,
    };
    // The write's future is gone.
    stage.drain(&[1, 2]);
    assert_eq!(stage.drained().await, [2]);
    inside.answer(v1::WriteResponse {});
    assert_eq!(stage.drained().await, [1]);
}

#[tokio::test]
async fn an_unpin_waits_for_the_piece_that_is_inside() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let buffer = stage.buffer(&[1]).await;
    let inside = tokio::select! {
        _ = pin.write(0, buffer, 1) => panic!("it has no answer"),
        inside = stage.server.write() => inside,
    };
    let unpinning = tokio::spawn(pin.unpin());
    // The piece of another pin passes: the server hears what the client says.
    let other = stage.pin_all(2).await;
    assert!(stage.server.is_quiet(), "an unpin under a piece");
    inside.answer(v1::WriteResponse {});
    let Call::Unpin(asked) = stage.server.call().await else {
        panic!("another call than Unpin");
    };
    assert_eq!(asked.request.pin_id, 1);
    asked.answer(v1::UnpinResponse {});
    soon(unpinning).await.unwrap().unwrap();
    drop(other);
}

#[tokio::test]
async fn a_refused_piece_is_explained_by_the_notice_whichever_comes_first() {
    for notice_first in [true, false] {
        let mut stage = Stage::open().await;
        let pin = stage.pin_all(1).await;
        let buffer = stage.buffer(&[1]).await;
        let writing = tokio::spawn(async move {
            let written = pin.write(0, buffer, 1).await;
            (pin, written)
        });
        let asked = stage.server.write().await;
        if notice_first {
            stage.drain(&[1]);
        }
        asked.refuse(draining());
        if !notice_first {
            stage.drain(&[1]);
        }
        let (pin, written) = soon(writing).await.unwrap();
        let failed = written.unwrap_err();
        assert!(matches!(failed.error, Error::Draining { .. }), "{failed}");
        assert_eq!(stage.drained().await, [1], "refused is not in flight");
        drop(pin);
    }
}

#[tokio::test]
async fn a_stale_piece_is_explained_by_the_revocation() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let buffer = stage.buffer(&[1]).await;
    let reading = tokio::spawn(async move { pin.read(0, 1, buffer).await });
    stage.server.read().await.refuse(stale());
    stage.revoke(&[1]);
    let failed = soon(reading).await.unwrap().unwrap_err();
    let Error::Revoked { revocation, .. } = failed.error else { panic!("{failed}") };
    assert_eq!(revocation.reason, RevocationReason::Remove);
}

#[tokio::test]
async fn another_refusal_is_told_as_it_is() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let buffer = stage.buffer(&[1]).await;
    let full = refusal(Code::ResourceExhausted, Reason::NoSpace, "full");
    let serving = async { stage.server.write().await.refuse(full) };
    let (written, ()) = tokio::join!(soon(pin.write(0, buffer, 1)), serving);
    let failed = written.unwrap_err();
    assert_eq!(failed.error.reason(), Some(Reason::NoSpace));
    assert!(failed.buffer.is_some());
}

#[tokio::test]
async fn a_lost_session_ends_a_transfer() {
    let mut stage = Stage::open().await;
    let pin = stage.pin_all(1).await;
    let buffer = stage.buffer(&[1]).await;
    let writing = tokio::spawn(async move { pin.write(0, buffer, 1).await });
    let _inside = stage.server.write().await;
    drop(stage.conversation);
    let failed = soon(writing).await.unwrap().unwrap_err();
    assert!(matches!(failed.error, Error::SessionLost { .. }), "{failed}");
    assert!(failed.buffer.is_some());
}

#[tokio::test]
async fn records_come_until_the_session_ends() {
    let mut stage = Stage::open().await;
    let (say, said) = mpsc::unbounded_channel();
    let serving = async {
        let Call::Watch(asked) = stage.server.call().await else {
            panic!("another call than Watch");
        };
        asked.answer(said);
    };
    let (records, ()) = tokio::join!(soon(stage.session.watch()), serving);
    let mut records = records.unwrap();
    say.send(Ok(v1::RevocationRecord {
        path: "/srv/file".to_owned(),
        generation: Some(GENERATION),
        reason: v1::RevocationReason::Shrink.into(),
        pins: 3,
        timings: Some(v1::RevocationTimings::default()),
        unmapped_us: 40,
        ..Default::default()
    }))
    .unwrap();
    let record = soon(records.next()).await.unwrap().unwrap();
    assert_eq!((record.path.as_str(), record.pins), ("/srv/file", 3));
    assert_eq!((record.reason, record.unmapped.as_micros()), (RevocationReason::Shrink, 40));

    drop(stage.conversation);
    let lost = soon(records.next()).await.unwrap().unwrap_err();
    assert!(matches!(lost, Error::SessionLost { .. }), "{lost}");
    assert!(soon(records.next()).await.is_none());
}

/// Leaves a write of one byte behind, with its piece in the server's hands.
async fn abandon(
    stage: &mut Stage,
    pin: &Pin,
    offset: u64,
) -> Asked<v1::WriteRequest, v1::WriteResponse> {
    let buffer = stage.buffer(&[1]).await;
    tokio::select! {
        _ = pin.write(offset, buffer, 1) => panic!("it has no answer"),
        inside = stage.server.write() => inside,
    }
}

/// A transfer of other bytes goes out while the one under test has to wait: had that not waited, the
/// server would have heard of it first.
#[tokio::test]
async fn an_abandoned_piece_can_not_overtake_a_later_transfer_of_the_same_bytes() {
    let mut stage = Stage::open().await;
    let pin = std::sync::Arc::new(stage.pin_all(1).await);
    let inside = abandon(&mut stage, &pin, 40).await;
    let buffers = (stage.buffer(&[2; 8]).await, stage.buffer(&[0; 8]).await);
    let (writer, reader) = (pin.clone(), pin.clone());
    let writing = tokio::spawn(async move { writer.write(35, buffers.0, 6).await });
    let reading = tokio::spawn(async move { reader.read(40, 1, buffers.1).await });
    // They have had their turn: one thread runs all of this test's tasks.
    tokio::task::yield_now().await;
    let buffer = stage.buffer(&[3; 2]).await;
    let elsewhere = tokio::spawn({
        let pin = pin.clone();
        async move { pin.write(41, buffer, 2).await }
    });
    let asked = stage.server.write().await;
    assert_eq!(asked.request.offset, 41, "the bytes next to it need not wait");
    asked.answer(v1::WriteResponse {});
    soon(elsewhere).await.unwrap().expect("written");
    assert!(stage.server.is_quiet(), "a transfer beside the abandoned piece");
    assert!(!writing.is_finished() && !reading.is_finished());

    inside.answer(v1::WriteResponse {});
    for _ in 0..2 {
        match stage.server.call().await {
            Call::Write(asked) => {
                assert_eq!((asked.request.offset, asked.request.data.len()), (35, 6));
                asked.answer(v1::WriteResponse {});
            }
            Call::Read(asked) => asked.answer(v1::ReadResponse { data: vec![2] }),
            _ => panic!("neither of the two"),
        }
    }
    soon(writing).await.unwrap().expect("written");
    soon(reading).await.unwrap().expect("read");
}

#[tokio::test]
async fn the_report_tells_which_bytes_are_durable_acknowledged_or_neither() {
    let mut stage = Stage::open().await;
    let (plain, _) = stage.pin(1, PinRequest::read_write("data", "file")).await;
    assert_eq!(plain.write_fate(), None, "nobody asked for it");
    let (pin, _) = stage.pin(2, PinRequest::read_write("data", "file").track_writes()).await;
    let nothing = pin.write_fate().unwrap();
    assert!(nothing.is_all_committed(), "{nothing:?}");

    let buffer = stage.buffer(&pattern(20)).await;
    let serving = async {
        for _ in 0..2 {
            stage.server.write().await.answer(v1::WriteResponse {});
        }
    };
    let (written, ()) = tokio::join!(soon(pin.write(0, buffer, 20)), serving);
    let (buffer, _) = written.expect("written");

    // While the commit runs, a write returns.
    let committing = async {
        let Call::Commit(commit) = stage.server.call().await else { panic!("no commit") };
        let writing = async {
            stage.server.write().await.answer(v1::WriteResponse {});
        };
        let (written, ()) = tokio::join!(soon(pin.write(18, buffer, 2)), writing);
        commit.answer(v1::CommitResponse { flush_us: 5 });
        written.expect("written").0
    };
    let (committed, buffer) = tokio::join!(soon(pin.commit()), committing);
    committed.unwrap();
    drop(abandon(&mut stage, &pin, 40).await);
    let inside = abandon(&mut stage, &pin, 5).await;

    // A write that fails half-way, one that is refused before it begins, and one without an answer.
    let serving = async {
        stage.server.write().await.answer(v1::WriteResponse {});
        stage.server.write().await.refuse(refusal(
            Code::ResourceExhausted,
            Reason::NoSpace,
            "full",
        ));
    };
    let (failed, ()) = tokio::join!(soon(pin.write(100, buffer, 20)), serving);
    let failed = failed.unwrap_err();
    let failed = pin.write(FILE_BYTES, failed.buffer.unwrap(), 1).await.unwrap_err();
    assert!(matches!(failed.error, Error::OutsidePin { .. }), "{failed}");

    stage.revoke(&[2]);
    let mut events = stage.session.events();
    if pin.check().is_ok() {
        soon(events.next()).await;
    }
    assert!(matches!(pin.check(), Err(Error::Revoked { .. })));
    let fate = pin.write_fate().unwrap();
    assert_eq!(fate.committed, [0..5, 6..18]);
    assert_eq!(fate.acknowledged, [18..20], "not by the commit that began before it returned");
    assert_eq!(fate.unknown, [5..6, 40..41, 100..120]);
    inside.answer(v1::WriteResponse {});
}
