//! Many who transfer at a time, over one queue pair: whoever takes the completions, each gets its own.
#![forbid(unsafe_code)]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use pinfold_client::{
    Buffer, Error, Part, Pin, PinRequest, Session, Transferred, Transport, WriteReport, blocking,
};
use pinfold_lab::{
    EXPORT, Pattern, Truncation, eventually, next_revocation, on_each_file_system,
    read_by_another_process,
};
use tokio::task::JoinSet;

const PAGE: usize = 4096;
const TASKS: u64 = 5;
const ROUNDS: u64 = 120;

async fn pin(session: &Session, name: &str) -> Pin {
    session.pin(PinRequest::read_write(EXPORT, name)).await.unwrap()
}

fn check_read(done: Transferred, expected: &[u8]) -> Buffer {
    let expected = &expected[done.offset as usize..][..done.bytes];
    assert_eq!(&done.buffer.as_slice()[..done.bytes], expected, "at {}", done.offset);
    done.buffer
}

fn by_rdma(bytes: usize) -> WriteReport {
    WriteReport { rdma_bytes: bytes as u64, stream_bytes: 0 }
}

/// Now alone, now together, now giving up half-way: what the tasks do to each other changes from write to
/// write. Each has a page of its own.
async fn write_together(session: &Session, name: &str) {
    let (pin, pool) = (pin(session, name).await, session.buffer_pool(3, PAGE).await.unwrap());
    let pin = Arc::new(pin);
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (pin, pool) = (pin.clone(), pool.clone());
        tasks.spawn(async move {
            for round in 0..ROUNDS {
                let mut buffer = pool.take().await.unwrap();
                let len = if (round + task).is_multiple_of(3) { PAGE } else { 8 };
                Pattern(round).fill(task * PAGE as u64, &mut buffer.as_mut_slice()[..len]);
                let mut write = Box::pin(pin.write(task * PAGE as u64, buffer, len));
                if (round * TASKS + task).is_multiple_of(7) {
                    // Nobody waits for this one; the next write to the page does.
                    let _ = write.as_mut().poll(&mut Context::from_waker(Waker::noop()));
                    continue;
                }
                assert_eq!(write.await.unwrap().1, by_rdma(len));
            }
            let (buffer, _) =
                pin.read(task * PAGE as u64, PAGE, pool.take().await.unwrap()).await.unwrap();
            Pattern(ROUNDS - 1).check(task * PAGE as u64, &buffer.as_slice()[..8], "read back");
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    // Also those that nobody waited for have come home.
    let mut all = Vec::new();
    for _ in 0..3 {
        all.push(pool.take().await.unwrap());
    }
    assert!(pool.try_take().unwrap().is_none(), "the pool has grown");
}

on_each_file_system! {
    async fn each_of_many_gets_its_own_completion(lab in Lab) {
        let session = lab.session().await;
        lab.make_file("asleep", TASKS * PAGE as u64);
        write_together(&session, "asleep").await;
        let polls = lab.options().poll_at_most(Duration::from_micros(200));
        let session = lab.session_with(polls).await;
        lab.make_file("polling", TASKS * PAGE as u64);
        write_together(&session, "polling").await;
    }

    /// Also what a quirk sends another way, to bytes that are under way, and beside a task of another kind.
    async fn one_task_has_several_under_way_and_in_order(lab in Lab) {
        const WINDOW: usize = 6;
        let session = lab.session().await;
        lab.make_file("file", 64 * PAGE as u64);
        let pin = Arc::new(session.pin(PinRequest::read_write(EXPORT, "file").track_writes()).await.unwrap());
        let beside = tokio::spawn({
            let (pin, mut buffer) = (pin.clone(), session.buffer(PAGE).await.unwrap());
            async move {
                for _ in 0..ROUNDS {
                    buffer = pin.write(63 * PAGE as u64, buffer, PAGE).await.unwrap().0;
                }
            }
        });
        let pool = session.buffer_pool(WINDOW, PAGE).await.unwrap();
        let mut pipeline = pin.pipeline(NonZeroUsize::new(WINDOW).unwrap());
        let (mut begun, mut ended) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let mut buffer = match pipeline.next_if_full().await {
                Some(done) => {
                    let done = done.unwrap();
                    ended.push((done.offset, done.bytes));
                    done.buffer
                }
                None => pool.take().await.unwrap(),
            };
            let page = round % 20 * PAGE as u64;
            // The same page twice: the second time a part of it, which goes by the stream path.
            let (offset, len) = if round % 5 == 4 { (page - PAGE as u64 + 100, 50) } else { (page, PAGE) };
            buffer.as_mut_slice()[..len].fill(round as u8);
            pipeline.write(offset, buffer, len).await;
            assert!(pipeline.len() <= WINDOW && !pipeline.is_empty());
            begun.push((offset, len));
        }
        while let Some(done) = pipeline.next().await {
            let done = done.unwrap();
            ended.push((done.offset, done.bytes));
        }
        assert_eq!(begun, ended);
        assert!(pipeline.is_empty());
        beside.await.unwrap();
        assert_eq!(pin.write_fate().unwrap().unknown, []);
        pin.commit().await.unwrap();
        assert!(pin.write_fate().unwrap().is_all_committed());

        // What is read is what was written last.
        let mut expected = vec![0; 20 * PAGE];
        for (round, (offset, len)) in begun.iter().enumerate() {
            expected[*offset as usize..][..*len].fill(round as u8);
        }
        for page in 0..20 {
            let buffer = match pipeline.next_if_full().await {
                Some(done) => check_read(done.unwrap(), &expected),
                None => pool.take().await.unwrap(),
            };
            pipeline.read(page * PAGE as u64, PAGE, buffer).await;
        }
        while let Some(done) = pipeline.next().await {
            check_read(done.unwrap(), &expected);
        }

        // Nobody waits for these; the buffers come home all the same.
        for page in 0..WINDOW as u64 {
            pipeline.write(page * PAGE as u64, pool.take().await.unwrap(), PAGE).await;
        }
        drop(pipeline);
        let mut all = Vec::new();
        for _ in 0..WINDOW {
            all.push(pool.take().await.unwrap());
        }
        pin.commit().await.unwrap();
    }

    /// The NIC may still be at it when the server's processor writes the same bytes.
    async fn a_write_by_another_way_lands_after_one_that_was_given_up(lab in Lab) {
        const PAGES: usize = 256;
        let session = lab.session().await;
        lab.make_file("file", (PAGES * PAGE) as u64);
        let pin = pin(&session, "file").await;
        let mut small = session.buffer(PAGE).await.unwrap();
        let last = ((PAGES - 1) * PAGE + 100) as u64;
        for round in 1..=10_u8 {
            let mut large = session.buffer(PAGES * PAGE).await.unwrap();
            large.as_mut_slice().fill(round);
            let mut write = Box::pin(pin.write(0, large, PAGES * PAGE));
            let begun = write.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(begun.is_pending(), "a MiB in no time");
            drop(write);
            small.as_mut_slice().fill(100 + round);
            let (buffer, report) = pin.write(last, small, 50).await.unwrap();
            assert_eq!(report.stream_bytes, 50);
            let (buffer, _) = pin.read(last - 100, PAGE, buffer).await.unwrap();
            let (before, rest) = buffer.as_slice().split_at(100);
            let expected = (vec![round; 100], vec![100 + round; 50], vec![round; PAGE - 150]);
            assert_eq!((before, &rest[..50], &rest[50..]), (&expected.0[..], &expected.1[..], &expected.2[..]));
            small = buffer;
        }
    }

    async fn each_result_of_a_pipeline_says_what_became_of_it(lab in Lab) {
        let session = lab.session().await;
        let mut events = session.events();
        lab.make_file("file", 8 * PAGE as u64);
        let pin = session.pin(PinRequest::read_write(EXPORT, "file").track_writes()).await.unwrap();
        let mut pipeline = pin.pipeline(NonZeroUsize::new(4).unwrap());
        let page = PAGE as u64;
        for offset in [0, 8 * page, page] {
            pipeline.write(offset, session.buffer(PAGE).await.unwrap(), PAGE).await;
        }
        assert_eq!(pipeline.next().await.unwrap().unwrap().offset, 0);
        let refused = pipeline.next().await.unwrap().unwrap_err();
        assert!(matches!(refused.error, Error::OutsidePin { .. }), "{refused}");
        assert_eq!(refused.buffer.unwrap().len(), PAGE);
        assert_eq!(pipeline.next().await.unwrap().unwrap().offset, page);

        let truncation = Truncation::start(lab.path("file"), 0);
        next_revocation(&mut events).await;
        truncation.done().await;
        pipeline.write(0, session.buffer(PAGE).await.unwrap(), PAGE).await;
        let late = pipeline.next().await.unwrap().unwrap_err();
        assert!(matches!(late.error, Error::Revoked { .. }), "{late}");
        assert!(late.buffer.is_some() && pipeline.next().await.is_none());
        assert_eq!(pin.write_fate().unwrap().unknown, [], "of what was not sent all is known");
    }

    /// A future that was posted and that nobody polls any more: its program is busy with something else,
    /// or waits for something else first.
    async fn a_drain_does_not_wait_for_who_does_not_look(lab in Lab) {
        let session = lab.session().await;
        let mut events = session.events();
        lab.make_file("file", 64 * PAGE as u64);
        let pin = pin(&session, "file").await;
        let mut buffer = session.buffer(64 * PAGE).await.unwrap();
        Pattern(1).fill(0, buffer.as_mut_slice());
        let mut write = loop {
            let mut write = Box::pin(pin.write(0, buffer, 64 * PAGE));
            match write.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Pending => break write,
                // It was over at once.
                Poll::Ready(done) => buffer = done.unwrap().0,
            }
        };
        let truncation = Truncation::start(lab.path("file"), 0);
        let revocation = next_revocation(&mut events).await;
        let timings = revocation.timings.unwrap();
        assert!(timings.drained.is_some(), "the server had to cut it off: {timings:?}");
        truncation.done().await;
        let (buffer, report) = write.as_mut().await.expect("it had ended before the fence");
        assert_eq!((buffer.len(), report), (64 * PAGE, by_rdma(64 * PAGE)));
    }

    async fn several_stretches_go_with_one_call(lab in Lab) {
        let session = lab.session().await;
        lab.make_file("file", 64 * PAGE as u64);
        let pin = pin(&session, "file").await;
        let mut buffer = session.buffer(16 * PAGE).await.unwrap();
        Pattern(3).fill(0, buffer.as_mut_slice());
        // Backwards; more than one request each way, and one that a quirk sends by the stream path.
        let page = PAGE as u64;
        let mut parts: Vec<_> = (0..15)
            .map(|part| Part { offset: (60 - 4 * part as u64) * page, bytes: part * PAGE..part * PAGE + 77 })
            .collect();
        parts.push(Part { offset: page + 100, bytes: 15 * PAGE..15 * PAGE + 50 });
        let (buffer, report) = pin.write_vectored(&parts, buffer).await.unwrap();
        assert_eq!(report, WriteReport { rdma_bytes: 15 * 77, stream_bytes: 50 });

        let expected = buffer.as_slice().to_vec();
        let mut back = session.buffer(16 * PAGE).await.unwrap();
        back.as_mut_slice().fill(0);
        let (back, report) = pin.read_vectored(&parts, back).await.unwrap();
        assert_eq!((report.rdma_bytes, report.stream_bytes), (15 * 77, 50));
        pin.unpin().await.unwrap();
        let file = read_by_another_process(&lab.path("file"));
        for part in &parts {
            let stretch = part.offset as usize..part.offset as usize + part.bytes.len();
            assert_eq!(file[stretch], expected[part.bytes.clone()], "in the file, at {}", part.offset);
            assert_eq!(back.as_slice()[part.bytes.clone()], expected[part.bytes.clone()]);
        }
        let touched: usize = parts.iter().map(|part| part.bytes.len()).sum();
        assert!(file.iter().filter(|byte| **byte != 0).count() <= touched, "more than was sent");

        let pin = self::pin(&session, "file").await;
        let overlapping = [Part { offset: 0, bytes: 0..10 }, Part { offset: 9, bytes: 20..30 }];
        let refused = pin.write_vectored(&overlapping, buffer).await.unwrap_err();
        assert!(matches!(refused.error, Error::BadParts { .. }), "{refused}");
        assert!(refused.buffer.is_some());
    }

    /// In the middle of a page, where soft-RoCE misplaces a write.
    async fn atomics_of_several_clients_are_single_steps(lab in Lab) {
        const COUNTER: u64 = PAGE as u64 + 616;
        const EACH: u64 = 40;
        lab.make_file("file", 4 * PAGE as u64);
        let mut clients = JoinSet::new();
        for _ in 0..3 {
            let session = lab.session().await;
            clients.spawn(async move {
                let pin = pin(&session, "file").await;
                assert_eq!(pin.grant().no_atomics_because, None);
                let mut found = Vec::new();
                for _ in 0..EACH {
                    found.push(pin.fetch_add(COUNTER, 1).await.unwrap());
                }
                pin.commit().await.unwrap();
                pin.unpin().await.unwrap();
                found
            });
        }
        let mut found = clients.join_all().await.concat();
        found.sort_unstable();
        assert_eq!(found, (0..3 * EACH).collect::<Vec<_>>(), "each number once");

        let session = lab.session().await;
        let pin = pin(&session, "file").await;
        assert_eq!(pin.compare_swap(COUNTER, 7, 1).await.unwrap(), 120, "it is not 7");
        assert_eq!(pin.compare_swap(COUNTER, 120, u64::MAX - 1).await.unwrap(), 120);
        assert_eq!(pin.fetch_add(COUNTER, 3).await.unwrap(), u64::MAX - 1);
        for (offset, what) in [(COUNTER + 4, "at a multiple of 8"), (4 * PAGE as u64, "not all pinned")] {
            let refused = pin.fetch_add(offset, 1).await.unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
        pin.unpin().await.unwrap();
        let mut expected = vec![0; 4 * PAGE];
        expected[COUNTER as usize..COUNTER as usize + 8].copy_from_slice(&1_u64.to_ne_bytes());
        assert_eq!(read_by_another_process(&lab.path("file")), expected);

        for (request, because) in [
            (PinRequest::read(EXPORT, "file"), "pinned for reading only"),
            (PinRequest::read_write(EXPORT, "file").transport(Transport::Stream), "the stream path only"),
        ] {
            let pin = session.pin(request).await.unwrap();
            let refused = pin.fetch_add(COUNTER, 1).await.unwrap_err().to_string();
            assert!(refused.contains(because), "{refused}");
            pin.unpin().await.unwrap();
        }
    }

    /// In the middle of a page, as above.
    async fn an_atomic_write_is_exact_and_accounted_for(lab in Lab) {
        const WORD: u64 = PAGE as u64 + 616;
        lab.make_file("file", 4 * PAGE as u64);
        let session = lab.session().await;
        let request = PinRequest::read_write(EXPORT, "file").track_writes();
        let pin = session.pin(request).await.unwrap();
        assert_eq!(pin.grant().no_atomic_write_because, None);
        pin.write_atomic(WORD, u64::MAX).await.unwrap();
        pin.write_atomic(WORD, 0x0123_4567_89ab_cdef).await.unwrap();
        let fate = pin.write_fate().unwrap();
        assert_eq!((fate.acknowledged, fate.unknown), (vec![WORD..WORD + 8; 1], vec![]));
        pin.commit().await.unwrap();
        assert!(pin.write_fate().unwrap().is_all_committed());
        for (offset, what) in [(WORD + 4, "at a multiple of 8"), (4 * PAGE as u64, "not all pinned")] {
            let refused = pin.write_atomic(offset, 1).await.unwrap_err().to_string();
            assert!(refused.contains(what), "{refused}");
        }
        let mut expected = vec![0; 4 * PAGE];
        expected[WORD as usize..WORD as usize + 8]
            .copy_from_slice(&0x0123_4567_89ab_cdef_u64.to_ne_bytes());
        assert_eq!(read_by_another_process(&lab.path("file")), expected);
        let late = pin.write_atomic(WORD, 1).await.unwrap_err();
        assert!(matches!(late, Error::Draining { .. } | Error::Revoked { .. }), "{late}");

        for (request, because) in [
            (PinRequest::read(EXPORT, "file"), "pinned for reading only"),
            (PinRequest::read_write(EXPORT, "file").transport(Transport::Stream), "the stream path only"),
        ] {
            let pin = session.pin(request).await.unwrap();
            let refused = pin.write_atomic(WORD, 1).await.unwrap_err().to_string();
            assert!(refused.contains(because), "{refused}");
            pin.unpin().await.unwrap();
        }
    }

    async fn a_program_without_a_runtime_has_the_same(lab in Lab) {
        lab.make_file("file", 4 * PAGE as u64);
        let options = lab.options();
        let program = std::thread::spawn(move || {
            let session = blocking::Session::connect(options).unwrap();
            let pin = session.pin(PinRequest::read_write(EXPORT, "file")).unwrap();
            let mut buffer = session.buffer(PAGE).unwrap();
            Pattern(9).fill(PAGE as u64, buffer.as_mut_slice());
            let (mut buffer, report) = pin.write(PAGE as u64, buffer, PAGE).unwrap();
            assert_eq!(report, by_rdma(PAGE));
            pin.commit().unwrap();
            buffer.as_mut_slice().fill(0);
            let (buffer, _) = pin.read(PAGE as u64, PAGE, buffer).unwrap();
            Pattern(9).check(PAGE as u64, buffer.as_slice(), "read back");
            pin.unpin().unwrap();
            session.close();
        });
        eventually("the program ends", async || program.is_finished()).await;
        program.join().unwrap();
        Pattern(9).check(PAGE as u64, &read_by_another_process(&lab.path("file"))[PAGE..2 * PAGE], "written");
    }
}
