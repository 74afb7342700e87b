//! `pin --exclusive --steal`: the old holder is fenced, and the new generation is the fencing token.
//! Two writers steal a file from each other in turns, and each goes on writing with what it has until
//! it is refused: who holds the file sees no byte change that it has not changed itself.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pinfold_client::{
    Code, Error, InterruptionCause, KeepPolicy, KeptSession, PinRequest, Reason, RevocationReason,
    Transport,
};
use pinfold_lab::{
    Answer, EXPORT, FileSystem, ForeignClient, ForeignLane, Lab, eventually,
    read_by_another_process, reason_of,
};
use pinfold_leases::{Export, LockKind, RelativePath};
use pinfold_proto::v1;
use pinfold_proto::v1::session_event::Event;
use tokio::task::JoinHandle;

const PAGE: usize = 4096;
const PAGES: usize = 16;
const ROUNDS: u8 = 4;
/// Writes at a time by the stream path.
const STREAMS: usize = 4;

/// Writes until it is refused; says how it ended.
struct Hammer {
    pin_id: u64,
    landed: Arc<AtomicUsize>,
    ends: Vec<JoinHandle<String>>,
}

impl Hammer {
    fn by_rdma(lane: ForeignLane, pin: &v1::PinResponse, byte: u8) -> Self {
        let (landed, key) = (Arc::new(AtomicUsize::new(0)), pin.segments[0]);
        let counter = Arc::clone(&landed);
        let end = tokio::spawn(async move {
            for page in (0..PAGES).cycle() {
                let status = lane.write(&key, (page * PAGE) as u64, &[byte; PAGE]).await;
                if !status.is_success() {
                    return status.to_string();
                }
                counter.fetch_add(1, Ordering::Relaxed);
            }
            unreachable!("the loop has no end")
        });
        Self { pin_id: pin.pin_id, landed, ends: vec![end] }
    }

    fn by_stream(client: &ForeignClient, pin: &v1::PinResponse, byte: u8) -> Self {
        let landed = Arc::new(AtomicUsize::new(0));
        let write = |first: usize| {
            let (mut stub, counter) = (client.stub.clone(), Arc::clone(&landed));
            let request = write_request(client, pin, first * PAGE, byte);
            async move {
                loop {
                    match stub.write(request.clone()).await {
                        Ok(_) => counter.fetch_add(1, Ordering::Relaxed),
                        Err(refused) => return reason_of(&refused),
                    };
                }
            }
        };
        let ends = (0..STREAMS).map(|first| tokio::spawn(write(first))).collect();
        Self { pin_id: pin.pin_id, landed, ends }
    }
}

fn write_request(
    client: &ForeignClient,
    pin: &v1::PinResponse,
    offset: usize,
    byte: u8,
) -> v1::WriteRequest {
    v1::WriteRequest {
        session_id: client.session_id(),
        pin_id: pin.pin_id,
        generation: pin.generation,
        offset: offset as u64,
        data: vec![byte; PAGE].into(),
    }
}

/// By the server's CPU: a READ by the NIC could repeat a mistake of the NIC's WRITE.
async fn content(client: &mut ForeignClient, pin: &v1::PinResponse) -> Vec<u8> {
    let request = v1::ReadRequest {
        session_id: client.session_id(),
        pin_id: pin.pin_id,
        generation: pin.generation,
        offset: 0,
        length: (PAGES * PAGE) as u32,
    };
    client.stub.read(request).await.unwrap().into_inner().data
}

/// Tells the lie of a client that goes on writing, and notes what it is told.
async fn give_in(client: &mut ForeignClient, pin_id: u64, told: &mut Vec<&'static str>) -> ! {
    let steal = v1::RevocationReason::Steal as i32;
    loop {
        match client.next_event().await {
            Some(Event::Draining(notice)) if notice.reason == steal => {
                client.say_drained(&[pin_id]);
                told.push("draining");
            }
            Some(Event::Revoked(revoked)) if revoked.reason == steal => told.push("revoked"),
            other => panic!("{other:?}"),
        }
    }
}

async fn fight(lab: Lab, by_rdma: bool) {
    lab.make_file("file", (PAGES * PAGE) as u64);
    let mut one = ForeignClient::open(&lab.daemon.url).await;
    let mut two = ForeignClient::open(&lab.daemon.url).await;
    let mut held: Option<Hammer> = None;
    let mut token = 0;
    for round in 0..ROUNDS {
        let (thief, victim) =
            if round % 2 == 0 { (&mut one, &mut two) } else { (&mut two, &mut one) };
        // The one before died of a dead key.
        let lane = if by_rdma { Some(thief.connect().await) } else { None };
        let transport = if by_rdma { v1::Transport::Rdma } else { v1::Transport::Stream }.into();
        let request =
            v1::PinRequest { exclusive: true, steal: true, transport, ..thief.pin_request("file") };
        let mut told = Vec::new();
        let pin = match &held {
            None => thief.stub.pin(request).await.unwrap().into_inner(),
            Some(hammer) => {
                eventually("the holder writes", async || {
                    hammer.landed.load(Ordering::Relaxed) > 20
                })
                .await;
                tokio::select! {
                    pin = thief.stub.pin(request) => pin.unwrap().into_inner(),
                    never = give_in(victim, hammer.pin_id, &mut told) => never,
                }
            }
        };
        let mut expected = content(thief, &pin).await;
        let own = usize::from(round) * PAGE..usize::from(round + 1) * PAGE;
        let mine = write_request(thief, &pin, own.start, round);
        thief.stub.write(mine).await.unwrap();
        expected[own].fill(round);
        assert!(content(thief, &pin).await == expected, "somebody else writes");
        if let Some(hammer) = held.take() {
            let landed = hammer.landed.load(Ordering::Relaxed);
            for end in hammer.ends {
                let end = end.await.unwrap();
                println!("round {round}: {landed} writes, then {end}");
            }
            assert!(content(thief, &pin).await == expected, "the old holder has written");
            if told.len() < 2 {
                // The word of the end may come after the thief's grant.
                assert!(matches!(victim.next_event().await, Some(Event::Revoked(_))), "{told:?}");
            }
            assert_eq!(told.first(), Some(&"draining"));
        }
        assert!(content(thief, &pin).await == expected, "somebody else has written");
        let generation = pin.generation.unwrap().counter;
        assert!(generation > token, "{generation} after {token}");
        token = generation;
        let byte = 0x80 + round;
        held = Some(match lane {
            Some(lane) => Hammer::by_rdma(lane, &pin, byte),
            None => Hammer::by_stream(thief, &pin, byte),
        });
    }
    let last = held.expect("somebody has it");
    let winner = if ROUNDS % 2 == 1 { one } else { two };
    winner.close().await;
    for end in last.ends {
        end.await.unwrap();
    }
    lab.nothing_is_held().await;
    let file = read_by_another_process(&lab.path("file"));
    assert_eq!(file.len(), PAGES * PAGE);
}

#[test]
fn two_writers_that_fight_by_rdma_never_interleave() {
    Lab::run_on_both(|lab| fight(lab, true));
}

#[test]
fn two_writers_that_fight_by_the_stream_path_never_interleave() {
    Lab::run(FileSystem::Ext4, async |lab| fight(lab, false).await);
}

#[test]
fn who_keeps_a_pin_is_told_and_does_not_steal_it_back() {
    Lab::run(FileSystem::Ext4, kept);
}

/// Somebody has the file, and a steal that can't come to anything takes nothing away.
async fn in_vain(lab: &Lab, request: PinRequest, answer: Answer<'_>) {
    let holder = lab.session().await;
    let held =
        holder.pin(PinRequest::read_write(EXPORT, "file").range(0..PAGE as u64)).await.unwrap();
    let thief = lab.session().await;
    answer.check(thief.pin(request.clone().steal()).await.unwrap_err());
    held.check().expect("it was not taken back");
    let buffer = holder.buffer(PAGE).await.unwrap();
    held.write(0, buffer, PAGE).await.unwrap();
    held.unpin().await.unwrap();
    // It could never be had.
    answer.check(thief.pin(request).await.unwrap_err());
    lab.nothing_is_held().await;
}

fn by_rdma() -> PinRequest {
    PinRequest::read_write(EXPORT, "file").transport(Transport::Rdma)
}

#[test]
fn a_steal_from_a_byte_that_the_device_misplaces_takes_nothing() {
    Lab::run(FileSystem::Ext4, async |lab| {
        lab.make_file("file", 2 * PAGE as u64);
        let (code, reason) = (Code::InvalidArgument, Reason::BadRange);
        let says = &["starts at byte 100", "multiples of 4096"];
        let misaligned = Answer { code, reason, exit: 5, says };
        in_vain(&lab, by_rdma().range(100..2 * PAGE as u64), misaligned).await;
    });
}

#[test]
fn a_steal_that_the_device_can_not_register_takes_nothing() {
    Lab::run(FileSystem::Tmpfs, async |lab| {
        lab.make_file("file", PAGE as u64);
        let (code, reason) = (Code::FailedPrecondition, Reason::DeviceCannotRegister);
        let can_not =
            Answer { code, reason, exit: 8, says: &["past the end of a file", "reserve"] };
        in_vain(&lab, by_rdma().reserve_end(2 * PAGE as u64), can_not).await;
    });
}

#[test]
fn a_steal_of_bytes_that_another_program_has_locked_takes_nothing() {
    Lab::run_with_policy(FileSystem::Ext4, "guard=none", async |lab| {
        lab.make_file("file", 2 * PAGE as u64);
        let export = Export::open(lab.folder()).unwrap();
        let other = export.locate(&RelativePath::parse("file").unwrap()).unwrap().open().unwrap();
        let page = PAGE as u64;
        let _lock = other.lock_range(page..2 * page, LockKind::Shared).unwrap();
        let (code, reason) = (Code::FailedPrecondition, Reason::RangeHeld);
        let says = &["are locked by another open description"];
        let locked = Answer { code, reason, exit: 6, says };
        in_vain(&lab, PinRequest::read_write(EXPORT, "file"), locked).await;
    });
}

async fn kept(lab: Lab) {
    lab.make_file("file", (PAGES * PAGE) as u64);
    lab.make_file("other", PAGE as u64);
    let request = || PinRequest::read_write(EXPORT, "file").steal();
    let old = KeptSession::connect(lab.options(), KeepPolicy::default()).await.unwrap();
    let old_pin = old.pin(request()).await.unwrap();
    let buffer = old.buffer(PAGE).await.unwrap();
    let (buffer, _) = old_pin.write(0, buffer, PAGE).await.unwrap();
    let new = lab.session().await;
    let beside = new.pin(PinRequest::read_write(EXPORT, "other")).await.unwrap();
    // Bytes that the file has not are asked for in vain, and at nobody's cost.
    let beyond = request().range(0..(PAGES * PAGE) as u64 + 1);
    let refused = new.pin(beyond).await.unwrap_err();
    assert_eq!(refused.reason(), Some(Reason::RangePastEnd));
    old_pin.check().unwrap();

    let pin = new.pin(request()).await.unwrap();
    let interruption = old_pin.interrupted().await;
    let reason = match interruption.cause {
        InterruptionCause::Draining(notice) => notice.reason,
        InterruptionCause::Revoked(revocation) => revocation.reason,
        other => panic!("{other}"),
    };
    assert_eq!(reason, RevocationReason::Steal);
    let refused = old_pin.write(0, buffer, PAGE).await.unwrap_err();
    assert!(matches!(refused.error, Error::Interrupted { .. }), "{}", refused.error);
    eventually("it is tried again", async || {
        old_pin.interruption().is_some_and(|interruption| interruption.attempts > 2)
    })
    .await;
    pin.check().expect("it waits until it can have the file without stealing");
    let record = lab.daemon.audit_record(&lab.path("file"));
    assert_eq!(record["reason"], "steal");
    beside.check().unwrap();
    beside.unpin().await.unwrap();
    pin.unpin().await.unwrap();
    assert!(old_pin.resume().await.unwrap().is_some());
    old_pin.unpin().await.unwrap();
    lab.nothing_is_held().await;
}
