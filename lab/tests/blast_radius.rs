//! Sixty-four files are wanted back at once, and the client of one of them ignores every notice:
//! who is hit by that, and who is not.
#![forbid(unsafe_code)]

use std::time::Instant;

use pinfold_client::{
    CompletionStatus, DrainPolicy, Error, Event, Events, Pin, PinRequest, RemoteSlice, Session,
};
use pinfold_lab::{
    EXPORT, FileSystem, Lab, LeaseBreakTimeSet, Truncation, eventually, next_revocation,
    queue_pairs, read_by_another_process, remote_slice,
};
use tokio::sync::watch;

/// Wanted back, beside the one of the client that ignores it.
const FILES: usize = 63;
const SESSIONS: usize = 3;
const PAGE: usize = 4096;
/// The longest that clients may drain is 5 s, from a lease-break-time of 15 s on.
const LEASE_BREAK_TIME: u32 = 20;

/// A client with its share of the files, and one more that nobody wants.
struct Client {
    session: Session,
    events: Events,
    wanted: Vec<Pin>,
    kept: Pin,
}

impl Client {
    async fn pin(lab: &Lab, session: Session, number: usize, wanted: Vec<String>) -> Self {
        let events = session.events();
        let mut pins = Vec::new();
        for name in &wanted {
            pins.push(pin(lab, &session, name).await);
        }
        let kept = pin(lab, &session, &format!("kept{number}")).await;
        Self { session, events, wanted: pins, kept }
    }

    /// Writes to one wanted file after the other until each has been taken back, and to the kept one
    /// in between. How often the kept one was written.
    async fn write_until_all_are_gone(&self) -> usize {
        let mut buffer = self.session.buffer(PAGE).await.unwrap();
        buffer.as_mut_slice().fill(b'W');
        let mut left: Vec<&Pin> = self.wanted.iter().collect();
        let mut kept_writes = 0;
        while !left.is_empty() {
            let mut still = Vec::new();
            for pin in left {
                match pin.write(0, buffer, PAGE).await {
                    Ok((back, _)) => {
                        still.push(pin);
                        buffer = back;
                    }
                    // Refused before it was posted: no error completion.
                    Err(failed) => {
                        let error = failed.error;
                        let told = matches!(error, Error::Draining { .. } | Error::Revoked { .. });
                        assert!(told, "a client that listens saw: {error}");
                        buffer = failed.buffer.expect("it was never posted");
                    }
                }
                let (back, _) = self.kept.write(0, buffer, PAGE).await.unwrap();
                buffer = back;
                kept_writes += 1;
            }
            left = still;
        }
        kept_writes
    }

    /// Of each wanted file one notice and then its end; and nothing else.
    async fn was_told(&mut self) {
        let mut noticed = Vec::new();
        let mut gone = 0;
        while gone < self.wanted.len() {
            match self.events.next().await.unwrap() {
                Event::Draining { pins, .. } => noticed.extend(pins),
                Event::Revoked { pins, revocation } => {
                    assert!(pins.iter().all(|pin| noticed.contains(pin)), "not told before");
                    let timings = revocation.timings.unwrap();
                    assert!(timings.break_pending_at_release, "{timings:?}");
                    assert!(timings.drained.is_some(), "it had to be cut off: {timings:?}");
                    gone += pins.len();
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

async fn pin(lab: &Lab, session: &Session, name: &str) -> Pin {
    lab.make_file(name, PAGE as u64);
    session.pin(PinRequest::read_write(EXPORT, name)).await.unwrap()
}

/// Writes with the key that it has, whatever it is told, until the NIC refuses.
async fn write_until_cut_off(
    session: &Session,
    key: RemoteSlice,
    written: watch::Sender<usize>,
) -> CompletionStatus {
    let mut buffer = session.buffer(PAGE).await.unwrap();
    buffer.as_mut_slice().fill(b'I');
    loop {
        let (back, status) = session.raw_write(key, buffer).await.unwrap();
        if !status.is_success() {
            return status;
        }
        buffer = back;
        written.send_modify(|written| *written += 1);
    }
}

async fn one_of_many_is_ignored(lab: Lab) {
    let _longest_drain = LeaseBreakTimeSet::to(LEASE_BREAK_TIME);
    let mut clients = Vec::new();
    for number in 0..SESSIONS {
        let names = (number..FILES).step_by(SESSIONS).map(|file| format!("file{file}"));
        let session = lab.session().await;
        clients.push(Client::pin(&lab, session, number, names.collect()).await);
    }
    let listening = queue_pairs();
    assert_eq!(listening.len(), 2 * SESSIONS, "{listening:?}");

    let deaf = lab.session_with(lab.options().drain_policy(DrainPolicy::Ignore)).await;
    let mut deaf_client = Client::pin(&lab, deaf, SESSIONS, vec!["ignored".to_owned()]).await;
    let deaf = &deaf_client.session;
    let key = remote_slice(&deaf_client.wanted[0].grant().segments[0], 0, PAGE);
    let ignoring_pairs: Vec<u64> =
        queue_pairs().into_keys().filter(|pair| !listening.contains_key(pair)).collect();
    assert_eq!(ignoring_pairs.len(), 2, "its two ends");
    let (count, mut written) = watch::channel(0);
    let ignoring = write_until_cut_off(deaf, key, count);

    let breaking = async {
        written.wait_for(|written| *written > 0).await.unwrap();
        // The one that is ignored is wanted first, so that all others come behind it.
        let ignored = Truncation::start(lab.path("ignored"), 0);
        assert!(matches!(deaf_client.events.next().await, Some(Event::Draining { .. })));
        let began = Instant::now();
        let others: Vec<_> = (0..FILES)
            .map(|number| Truncation::start(lab.path(&format!("file{number}")), 1))
            .collect();
        let [one, two, three] = &clients[..] else { panic!("{SESSIONS} sessions") };
        let writing = tokio::join!(
            one.write_until_all_are_gone(),
            two.write_until_all_are_gone(),
            three.write_until_all_are_gone()
        );
        let mut before = 0;
        for truncation in others {
            truncation.done().await;
            before += usize::from(!ignored.is_done());
        }
        println!("{FILES} files were given back in {:?}; kept writes {writing:?}", began.elapsed());
        assert!(before > FILES / 2, "only {before} did not wait for the one that is ignored");
        if before == FILES {
            let so_far = *written.borrow();
            let more = written.wait_for(|written| *written > so_far).await.is_ok();
            println!("it was still writing then: {more}");
        }
        let timings = next_revocation(&mut deaf_client.events).await.timings.unwrap();
        println!("{timings:?}");
        assert_eq!(timings.drained, None, "nobody drained it");
        assert!(timings.break_pending_at_release);
        ignored.done().await;
    };
    let (refused, ()) = tokio::join!(ignoring, breaking);
    assert_eq!(refused, CompletionStatus::RemoteAccess);

    // Who listens has the connection of before, at both ends, and every other pin.
    let now = queue_pairs();
    for (number, state) in &listening {
        assert_eq!(now.get(number), Some(state), "queue pair {number}: {now:?}");
    }
    for client in &mut clients {
        client.was_told().await;
        client.kept.commit().await.unwrap();
        assert!(client.session.loss().is_none());
    }
    // Who does not has lost its queue pair, and nothing else: the library connects a new one, and
    // its other pin has the key of before.
    let kept = &deaf_client.kept;
    let buffer = deaf.buffer(PAGE).await.unwrap();
    kept.write(0, buffer, PAGE).await.unwrap();
    kept.commit().await.unwrap();
    assert!(deaf.loss().is_none());
    let useless = async || {
        let now = queue_pairs();
        ignoring_pairs.iter().all(|pair| now.get(pair).is_none_or(|state| state != "RTS"))
    };
    eventually("the connection that was cut off is of no use", useless).await;
    for number in 0..FILES {
        let content = read_by_another_process(&lab.path(&format!("file{number}")));
        assert_eq!(content.len(), 1);
    }
}

/// No step of it depends on the file system, and it takes long: `many_files` has both.
#[test]
fn only_who_ignores_the_notice_is_cut_off_and_nobody_waits_for_it() {
    Lab::run(FileSystem::Ext4, one_of_many_is_ignored);
}
