//! The pure parts of the torture rig: blocks, lives, schedules. A rig that sees nothing would be
//! green for ever.
#![forbid(unsafe_code)]

use pinfold_lab::torture::block::{BLOCK, BLOCKS, Block, FILE, Found, Way, area, owner};
use pinfold_lab::torture::life::{Life, Wrong, check_new, check_still, local_bytes};
use pinfold_lab::torture::outcome::Latencies;
use pinfold_lab::torture::schedule::{Accidents, Visits};

const WRITER: u32 = 2;

fn remote(index: u32, life: u64, sequence: u64) -> Block {
    Block { way: Way::Remote, writer: WRITER, file: 1, index, life, generation: 9, sequence }
}

fn put(content: &mut [u8], index: u32, block: Block) {
    block.fill(&mut content[index as usize * BLOCK..][..BLOCK]);
}

fn mine() -> u32 {
    area(WRITER).start
}

#[test]
fn a_block_tells_its_origin_and_whether_it_is_whole() {
    let block = remote(mine(), 7, 1 << 33);
    let mut bytes = vec![0; BLOCK];
    assert_eq!(Block::find(&bytes), Found::Zeroes);
    block.fill(&mut bytes);
    assert_eq!(Block::find(&bytes), Found::Whole(block));
    for at in [BLOCK - 1, BLOCK / 2, 60] {
        let mut torn = bytes.clone();
        torn[at] ^= 1;
        assert_eq!(Block::find(&torn), Found::Torn(block), "byte {at}");
    }
    assert!(matches!(Block::find(&[b'x'; BLOCK]), Found::Unknown(_)));
}

#[test]
fn areas_do_not_overlap_and_leave_the_head_alone() {
    assert_eq!(owner(0), None);
    for writer in 0..6 {
        assert!(area(writer).all(|index| owner(index) == Some(writer)), "{writer}");
    }
    assert_eq!(owner(BLOCKS - 1), None);
}

#[test]
fn what_clients_wrote_in_this_life_is_where_it_belongs() {
    let mut life = Life::fresh(1, 7);
    let mut content = life.base.clone();
    assert_eq!(life.check(&content), Ok(()));
    put(&mut content, mine(), remote(mine(), 7, 5));
    assert_eq!(life.check(&content), Ok(()), "not acknowledged, and there all the same");
    life.acknowledge(mine(), 1, 5);
    assert_eq!((life.check(&content), life.written()), (Ok(()), 1));
    put(&mut content, mine(), remote(mine(), 7, 6));
    assert_eq!(life.check(&content), Ok(()), "a later one");
}

#[test]
fn what_was_acknowledged_and_is_not_there_is_lost() {
    let mut life = Life::fresh(1, 7);
    let mut content = life.base.clone();
    life.acknowledge(mine(), 2, 5);
    life.commit(WRITER, 4);
    let lost = |life: &Life, content: &[u8]| life.check(content).unwrap_err().check();
    assert_eq!(lost(&life, &content), "acknowledged", "the base is still there");
    life.commit(WRITER, 5);
    assert_eq!(lost(&life, &content), "committed");
    put(&mut content, mine(), remote(mine(), 7, 4));
    assert_eq!(lost(&life, &content), "committed", "an earlier one");
    content[mine() as usize * BLOCK..][..BLOCK].fill(0);
    assert_eq!(lost(&life, &content), "committed", "zeroes");
}

#[test]
fn whatever_belongs_elsewhere_is_foreign() {
    let life = Life::fresh(1, 7);
    let right = remote(mine(), 7, 5);
    for wrong in [
        Block { life: 6, ..right },
        Block { file: 2, ..right },
        Block { index: mine() + 1, ..right },
        Block { writer: WRITER + 1, ..right },
        Block { way: Way::Local, ..right },
    ] {
        let mut content = life.base.clone();
        put(&mut content, mine(), wrong);
        let found = life.check(&content).unwrap_err();
        assert_eq!(found, Wrong::Foreign { index: mine(), found: Found::Whole(wrong) });
    }
    let mut content = life.base.clone();
    content[FILE - 1] ^= 1;
    assert_eq!(life.check(&content).unwrap_err().check(), "foreign", "one bit");
    assert_eq!(life.check(&content[..BLOCK]), Err(Wrong::Length(BLOCK)));
}

#[test]
fn nothing_may_change_under_a_local_process() {
    let expected = local_bytes(1, 7, 0..BLOCKS);
    let mut content = expected.clone();
    assert_eq!(check_still(&expected, &content), Ok(()));
    let block = remote(mine(), 7, 5);
    put(&mut content, mine(), block);
    let wrong = Wrong::Foreign { index: mine(), found: Found::Whole(block) };
    assert_eq!(check_still(&expected, &content), Err(wrong));
}

#[test]
fn a_new_file_holds_its_writers_blocks_and_zeroes() {
    let mut content = vec![0; FILE];
    let block = remote(mine(), 77, 77);
    put(&mut content, mine(), block);
    assert_eq!(check_new(1, 77, &[(mine(), 77)], &content), Ok(()));
    assert!(check_new(1, 77, &[(mine() + 1, 77)], &content).is_err(), "one is missing");
    assert!(check_new(1, 78, &[], &content).is_err(), "another file's");
}

#[test]
fn a_seed_repeats_its_schedule_and_another_has_another() {
    let visits = |seed, file| Visits::new(seed, file).take(50).collect::<Vec<_>>();
    assert_eq!(visits(1, 0), visits(1, 0));
    assert_ne!(visits(1, 0), visits(2, 0));
    assert_ne!(visits(1, 0), visits(1, 1));
    let inside = |blocks: &std::ops::Range<u32>| {
        blocks.start > 0 && blocks.end <= BLOCKS && !blocks.is_empty()
    };
    assert!(visits(3, 0).iter().all(|visit| inside(&visit.part)));
    let accidents = |seed| Accidents::new(seed, 6).take(50).collect::<Vec<_>>();
    assert_eq!(accidents(1), accidents(1));
    assert_ne!(accidents(1), accidents(2));
}

#[test]
fn latencies_are_sorted_into_their_places() {
    let latencies = Latencies::of((1..=100).rev().collect());
    assert_eq!((latencies.p50, latencies.p90, latencies.p99), (50, 90, 99));
    assert_eq!((latencies.count, latencies.max), (100, 100));
    assert_eq!(Latencies::of(Vec::new()).max, 0);
}
