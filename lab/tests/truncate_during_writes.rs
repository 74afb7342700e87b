//! Somebody truncates the file in the middle of a stream of writes: the main hazard.
#![forbid(unsafe_code)]

use pinfold_client::{DrainPolicy, Error, Event, PinRequest, RevocationReason, Session};
use pinfold_lab::{
    EXPORT, Lab, Pattern, Truncation, next_revocation, on_each_file_system,
    read_by_another_process, remote_slice,
};

const BLOCK: usize = 64 << 10;
const BLOCKS: u64 = 32;
const LEFT: u64 = BLOCKS / 2;

/// What the stream of writes ended with.
struct Written {
    /// For each block, the last write that was acknowledged.
    acknowledged: Vec<Option<Pattern>>,
    /// The write whose fate is not known.
    unknown: Option<(u64, Pattern)>,
    error: Error,
}

/// Writes block after block, round and round, until a write fails. Says so once `started` writes
/// have been acknowledged.
async fn write_until_refused(
    session: &Session,
    pin: &pinfold_client::Pin,
    started: tokio::sync::oneshot::Sender<()>,
) -> Written {
    let mut started = Some(started);
    let mut acknowledged = vec![None; BLOCKS as usize];
    let mut buffer = session.buffer(BLOCK).await.unwrap();
    for round in 1.. {
        let block = round % BLOCKS;
        let (offset, pattern) = (block * BLOCK as u64, Pattern(round));
        pattern.fill(offset, buffer.as_mut_slice());
        match pin.write(offset, buffer, BLOCK).await {
            Ok((back, _)) => {
                buffer = back;
                acknowledged[block as usize] = Some(pattern);
            }
            Err(failed) => {
                let refused =
                    matches!(failed.error, Error::Draining { .. } | Error::Revoked { .. });
                let unknown = (!refused).then_some((block, pattern));
                return Written { acknowledged, unknown, error: failed.error };
            }
        }
        if round == BLOCKS + LEFT
            && let Some(started) = started.take()
        {
            started.send(()).unwrap();
        }
    }
    unreachable!("the loop has no end")
}

/// Every block that is left holds the last write to it that was acknowledged.
fn check_content(lab: &Lab, written: &Written) {
    let content = read_by_another_process(&lab.path("file"));
    assert_eq!(content.len() as u64, LEFT * BLOCK as u64, "the truncate cut it");
    for block in 0..LEFT {
        let offset = block * BLOCK as u64;
        let piece = &content[offset as usize..offset as usize + BLOCK];
        if written.unknown.is_some_and(|(unknown, _)| unknown == block) {
            continue;
        }
        let pattern = written.acknowledged[block as usize].expect("one whole round was written");
        pattern.check(offset, piece, "an acknowledged write");
    }
}

async fn the_server_still_serves(lab: &Lab, session: &Session) {
    let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
    let pattern = Pattern(4711);
    let mut buffer = session.buffer(BLOCK).await.unwrap();
    pattern.fill(0, buffer.as_mut_slice());
    pin.write(0, buffer, BLOCK).await.unwrap();
    pin.commit().await.unwrap();
    pin.unpin().await.unwrap();
    let content = read_by_another_process(&lab.path("file"));
    pattern.check(0, &content[..BLOCK], "written after the revocation");
}

on_each_file_system! {
    async fn a_client_that_drains_loses_nothing_and_keeps_its_connection(lab in Lab) {
        lab.make_file("file", BLOCKS * BLOCK as u64);
        let session = lab.session().await;
        let mut events = session.events();
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let generation = pin.grant().generation;
        let (started, streaming) = tokio::sync::oneshot::channel();
        let writing = write_until_refused(&session, &pin, started);
        let cutting = async {
            streaming.await.unwrap();
            Truncation::start(lab.path("file"), (LEFT * BLOCK as u64) as i64).done().await;
        };
        let (written, ()) = tokio::join!(writing, cutting);

        // In order: the notice, then the end.
        let Some(Event::Draining { notice, .. }) = events.next().await else { panic!("no notice") };
        assert_eq!((notice.generation, notice.reason), (generation, RevocationReason::LocalWriter));
        let revocation = next_revocation(&mut events).await;
        assert_eq!(revocation.generation, generation);
        let timings = revocation.timings.unwrap();
        println!("{timings:?}");
        assert!(timings.break_pending_at_release, "the truncate went through because we let go");
        assert!(timings.drained.is_some(), "the fence did not wait for the budget to run out");
        assert!(timings.noticed <= timings.drained.unwrap());
        assert!(timings.drained.unwrap() <= timings.fenced && timings.fenced <= timings.released);

        assert!(written.unknown.is_none(), "no write failed in flight: {}", written.error);
        check_content(&lab, &written);
        assert!(matches!(pin.commit().await, Err(Error::Revoked { .. })));

        let record = lab.daemon.audit_record(&lab.path("file"));
        assert_eq!(record["reason"], "local writer");
        assert_eq!(record["failed_regions"], 0);
        let step = |name: &str| record[name].as_u64().unwrap_or_else(|| panic!("{name}: {record}"));
        assert!(step("fenced_us") <= step("released_us"));
        assert!(step("released_us") <= step("deregistered_us"));
        assert!(step("deregistered_us") <= step("unmapped_us"));
        the_server_still_serves(&lab, &session).await;
    }

    async fn a_client_that_does_not_listen_is_fenced(lab in Lab) {
        lab.make_file("file", BLOCKS * BLOCK as u64);
        let deaf = lab.session_with(lab.options().drain_policy(DrainPolicy::Ignore)).await;
        let mut events = deaf.events();
        let mut records = deaf.watch().await.unwrap();
        let pin = deaf.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let key = pin.grant().segments[0];
        let (started, streaming) = tokio::sync::oneshot::channel();
        let writing = write_until_refused(&deaf, &pin, started);
        let cutting = async {
            streaming.await.unwrap();
            Truncation::start(lab.path("file"), (LEFT * BLOCK as u64) as i64).done().await;
        };
        let (written, ()) = tokio::join!(writing, cutting);
        let timings = next_revocation(&mut events).await.timings.unwrap();
        println!("{timings:?}");
        assert_eq!(timings.drained, None, "nobody drained");
        assert!(timings.break_pending_at_release, "and still it was we who let go");
        check_content(&lab, &written);
        let record = records.next().await.unwrap().unwrap();
        let pids: Vec<u32> = record.breakers.iter().map(|breaker| breaker.pid).collect();
        assert_eq!(pids, [std::process::id()], "the truncate is ours: {record:?}");
        let broken = deaf.inspect().await.unwrap().broken;
        let by = vec![(record.breakers[0].command.clone(), 1)];
        assert!(broken.iter().any(|file| file.breaks == 1 && file.by == by), "{broken:?}");

        let before = read_by_another_process(&lab.path("file"));
        let mut buffer = deaf.buffer(BLOCK).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let (_, status) = deaf.raw_write(remote_slice(&key, 0, BLOCK), buffer).await.unwrap();
        assert!(!status.is_success(), "the key is dead, but the write went through");
        assert!(read_by_another_process(&lab.path("file")) == before, "not one byte changed");
        the_server_still_serves(&lab, &deaf).await;
    }

    async fn a_second_session_is_told_as_well_and_its_other_pins_live_on(lab in Lab) {
        lab.make_file("file", BLOCK as u64);
        lab.make_file("other", BLOCK as u64);
        let (one, two) = (lab.session().await, lab.session().await);
        let mut told = (one.events(), two.events());
        let _first = one.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let _second = two.pin(PinRequest::read(EXPORT, "file")).await.unwrap();
        let other = two.pin(PinRequest::read_write(EXPORT, "other")).await.unwrap();
        let truncation = Truncation::start(lab.path("file"), 0);
        next_revocation(&mut told.0).await;
        next_revocation(&mut told.1).await;
        truncation.done().await;
        let buffer = two.buffer(BLOCK).await.unwrap();
        other.write(0, buffer, BLOCK).await.unwrap();
        other.commit().await.unwrap();
    }
}
