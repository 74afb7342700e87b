//! RDMA FLUSH, as devices and fences have it: only leases and verbs are at work.
#![forbid(unsafe_code)]

use std::time::Instant;

use pinfold_lab::barrier::{Note, Post, Remote, Round, Source, byte_of, round, write_page};
use pinfold_lab::{Random, device_name, on_each_bench, rdma_core_version};
use pinfold_verbs::{Access, Buffer, Device, Lane, flush_test};

const ROUNDS: usize = 50;
const PAGE: usize = 4096;
const PAGES: usize = 32;
const LEN: usize = PAGES * PAGE;
const ACCESS: Access = Access { remote_flush: true, ..Access::REMOTE_READ_WRITE };

/// A write of a page, and behind it a flush of that page, and so on.
fn write_and_flush(file: Remote, lane: &Lane<Note>, buffer: Buffer, note: Note) {
    let page = page_of(note.number());
    if note.number().is_multiple_of(2) {
        return write_page(file, page, lane, buffer, note);
    }
    lane.post_flush(buffer, &[file.slice(page * PAGE, PAGE)], note).unwrap();
}

/// Pages of its own for each stream: of the first, the even ones.
fn page_of(number: usize) -> usize {
    number / 2 * 2 % PAGES
}

fn next_page(file: Remote, lane: &Lane<Note>, buffer: Buffer, note: Note) {
    write_page(file, (note.number() * 2 + 1) % PAGES, lane, buffer, note);
}

/// Before the fence returned. How many flushes ended well.
fn flushed_pages_are_there(round: &Round) -> usize {
    let flushes = || round.done[0].iter().filter(|number| !number.is_multiple_of(2));
    for page in (0..PAGES).step_by(2) {
        let Some(newest) = flushes().filter(|number| page_of(**number) == page).max() else {
            continue;
        };
        // The page's next write may have come in behind it.
        let writes = [newest - 1, newest - 1 + PAGES].map(byte_of);
        let there = &round.then[page * PAGE..][..PAGE];
        let is_whole = there.iter().all(|byte| *byte == there[0]);
        assert!(is_whole && writes.contains(&there[0]), "page {page}: {} after {newest}", there[0]);
    }
    flushes().count()
}

#[test]
fn the_soft_nic_flushes_where_it_is_allowed_and_nowhere_else() {
    assert!(rdma_core_version() >= 45);
    let started = Instant::now();
    flush_test(&Device::open(&device_name()).unwrap()).unwrap();
    println!("tested in {:?}", started.elapsed());
}

on_each_bench! {
    fn no_flush_succeeds_after_the_fence_and_what_one_covered_was_there(bench in Bench) {
        bench.make("file", &[0; LEN]);
        let device = Device::open(&device_name()).unwrap();
        let mut sources = [Source::new(&device, ACCESS), Source::new(&device, ACCESS)];
        let mut random = Random::new(4711);
        let started = Instant::now();
        let (mut refused, mut flushed) = ([0, 0], 0);
        for _ in 0..ROUNDS {
            let posts: [Post<'_>; 2] = [&write_and_flush, &next_page];
            let round = round(&bench, LEN, &mut sources, posts, &mut random);
            flushed += flushed_pages_are_there(&round);
            refused = [refused[0] + round.refused[0], refused[1] + round.refused[1]];
        }
        assert!(flushed > 0, "nothing was flushed");
        println!(
            "{ROUNDS} fences in {:?}: {flushed} flushes before them; they refused {refused:?}",
            started.elapsed()
        );
    }
}
