//! The fence as a barrier: writes, reads, atomics and atomic writes are streaming when it falls, and from the moment
//! that it returns not one byte of the file changes. (FLUSH: `on_newer_rdma_core_flush`.)
#![forbid(unsafe_code)]

use std::time::Instant;

use pinfold_lab::barrier::{Note, Remote, Source, round, write_page};
use pinfold_lab::{Random, device_name, on_each_bench};
use pinfold_verbs::{Access, Atomic, Buffer, Device, Lane, Piece};

const ROUNDS: usize = 100;
const PAGE: usize = 4096;
const WRITTEN_PAGES: usize = 32;
/// One word is added to, another one swapped, a third one written, again and again.
const ATOMICS_PAGE: usize = WRITTEN_PAGES;
const READ_PAGE: usize = WRITTEN_PAGES + 1;
const PAGES: usize = WRITTEN_PAGES + 2;
const LEN: usize = PAGES * PAGE;
const WORD: usize = 8;
/// Kinds of operations that take turns beside the writes, and which of them is the atomic write.
const KINDS: usize = 4;
const WRITTEN: usize = 3;
const ACCESS: Access = Access { remote_atomic: true, ..Access::REMOTE_READ_WRITE };

/// An addition, a swap, a read, an atomic write, and so on. `swapped`: what the swapped word is at first.
fn other(file: Remote, swapped: u64, lane: &Lane<Note>, buffer: Buffer, note: Note) {
    let word = |index| file.slice(ATOMICS_PAGE * PAGE + index * WORD, WORD);
    let expected = swapped + note.number() as u64 / KINDS as u64;
    match note.number() % KINDS {
        0 => lane.post_atomic(buffer, word(0), Atomic::FetchAdd(1), note),
        1 => {
            let swap = Atomic::CompareSwap { expected, new: expected + 1 };
            lane.post_atomic(buffer, word(1), swap, note)
        }
        WRITTEN => {
            let number = note.number() as u64;
            lane.post_atomic(buffer, word(2), Atomic::Write(number), note)
        }
        _ => {
            let remote = file.slice(READ_PAGE * PAGE, PAGE);
            lane.post_read(buffer, &[Piece { local: 0..PAGE, remote }], note)
        }
    }
    .unwrap();
}

fn number_in(content: &[u8], word: usize) -> u64 {
    let at = ATOMICS_PAGE * PAGE + word * WORD;
    u64::from_ne_bytes(content[at..at + WORD].try_into().unwrap())
}

on_each_bench! {
    fn nothing_in_flight_lands_after_it(bench in Bench) {
        bench.make("file", &[0; LEN]);
        let device = Device::open(&device_name()).unwrap();
        let odp = &device.capabilities().odp;
        assert!(device.capabilities().atomics && odp.rc_atomic && odp.rc_atomic_write);
        let mut sources = [Source::new(&device, ACCESS), Source::new(&device, ACCESS)];
        let mut random = Random::new(4711);
        let started = Instant::now();
        let (mut refused, mut swapped) = ([0, 0], 0);
        for _ in 0..ROUNDS {
            let write = |file, lane: &Lane<Note>, buffer, note: Note| {
                write_page(file, note.number() % WRITTEN_PAGES, lane, buffer, note);
            };
            let other = |file, lane: &Lane<Note>, buffer, note: Note| {
                other(file, swapped, lane, buffer, note);
            };
            let round = round(&bench, LEN, &mut sources, [&write, &other], &mut random);
            let number = |word| (number_in(&round.before, word), number_in(&round.then, word));
            let (added, swap) = (number(0), number(1));
            assert!(added.1 > added.0, "nothing was added");
            assert!(swap.1 > swap.0 || round.done[1].len() < 3, "nothing was swapped");
            let acknowledged = round.done[1].iter().rev().find(|number| *number % KINDS == WRITTEN);
            if let Some(acknowledged) = acknowledged {
                assert!(number(2).1 >= *acknowledged as u64, "an atomic write is gone");
            }
            swapped = swap.1;
            refused = [refused[0] + round.refused[0], refused[1] + round.refused[1]];
        }
        println!("{ROUNDS} fences in {:?}; they refused {refused:?}", started.elapsed());
    }
}
