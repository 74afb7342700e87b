//! Turns a file range into the parts of a transfer, or says exactly why not: pure arithmetic.
//!
//! The NIC would refuse a range outside the pin too, but at the price of the queue pair; and it
//! would report success for a request that breaks a [quirk](crate::Quirks) and misplace the data.
//! What a quirk forbids goes by the stream path, if the pin may use it.

use std::num::NonZeroU64;
use std::ops::Range;

use pinfold_verbs::{ATOMIC_BYTES, PROBE_BYTES, Piece, RemoteKey, RemoteSlice};

use crate::{Grant, Segment};

/// Largest request. Below what any device takes (2 GiB), and a multiple of any alignment.
const REQUEST_BYTES_MAX: u64 = 1 << 30;

/// A stretch of a file, and the bytes of a buffer that go there or come from there.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// Where it starts in the file.
    pub offset: u64,
    /// Bytes of the buffer, as many as of the file.
    pub bytes: Range<usize>,
}

/// What a pin reaches now: a file may have grown since the grant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reach<'a> {
    pub(crate) grant: &'a Grant,
    /// The file's end, as far as is known.
    pub(crate) valid_end: u64,
}

/// The ways that the bytes of one transfer may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ways {
    /// Whether the buffer and the session can do RDMA.
    pub(crate) rdma: bool,
    /// Longest piece of the stream path; absent: it is not to be used.
    pub(crate) stream: Option<NonZeroU64>,
}

/// A transfer's parts: together they cover its bytes once each. Both lists are ordered by file
/// offset, so the order within the whole is that of `local`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Plan {
    /// By RDMA.
    pub(crate) requests: Vec<Piece>,
    pub(crate) pieces: Vec<StreamPiece>,
}

/// By the stream path: a stretch of the buffer and where it goes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct StreamPiece {
    pub(crate) local: Range<usize>,
    pub(crate) file_offset: u64,
}

/// Why a range can't be transferred.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Refusal {
    /// Some of it is not pinned.
    OutsidePin { wanted: Range<u64> },
    /// Some of it is past the end of the file.
    PastEnd { wanted: Range<u64> },
    /// It, or its part in a later segment, starts at a place that the device mishandles, and the
    /// stream path is not to be used.
    Misaligned { file_offset: u64 },
    /// An atomic on bytes that start at no multiple of 8, or that no key reaches.
    NotAtomic { file_offset: u64 },
    /// Parts that make no sense together.
    BadParts(&'static str),
}

impl<'a> Reach<'a> {
    /// The bytes of the file that are pinned: what was reserved counts as far as the file goes.
    pub(crate) fn range(self) -> Range<u64> {
        let Range { start, end } = self.grant.range;
        start..end.max(self.grant.reserved_end.min(self.valid_end))
    }

    /// The parts of writing `len` bytes at a file offset.
    pub(crate) fn write(self, ways: Ways, offset: u64, len: usize) -> Result<Plan, Refusal> {
        let wanted = self.pinned(offset, len)?;
        self.whole(wanted).and_then(|wanted| self.split(ways, wanted))
    }

    /// The parts of writing several stretches, which must not overlap in the file.
    pub(crate) fn write_parts(self, ways: Ways, parts: &[Part]) -> Result<Plan, Refusal> {
        check_apart(parts, Part::stretch, "parts that overlap in the file")?;
        self.parts(ways, parts)
    }

    /// The parts of reading several stretches, all of which the file must have, to places in the buffer
    /// that don't overlap.
    pub(crate) fn read_parts(self, ways: Ways, parts: &[Part]) -> Result<Plan, Refusal> {
        let place = |part: &Part| part.bytes.start as u64..part.bytes.end as u64;
        check_apart(parts, place, "parts that overlap in the buffer")?;
        self.parts(ways, parts)
    }

    fn parts(self, ways: Ways, parts: &[Part]) -> Result<Plan, Refusal> {
        let mut plan = Plan::default();
        for part in parts {
            let wanted = self.whole(self.pinned(part.offset, part.bytes.len())?)?;
            let mut piece = self.split(ways, wanted)?;
            piece.shift(part.bytes.start);
            plan.requests.append(&mut piece.requests);
            plan.pieces.append(&mut piece.pieces);
        }
        Ok(plan)
    }

    fn whole(self, wanted: Range<u64>) -> Result<Range<u64>, Refusal> {
        match wanted.end > self.valid_end {
            true => Err(Refusal::PastEnd { wanted }),
            false => Ok(wanted),
        }
    }

    /// The parts of reading up to `len` bytes at a file offset: as with pread(2), a read ends at
    /// the end of the file.
    pub(crate) fn read(self, ways: Ways, offset: u64, len: usize) -> Result<Plan, Refusal> {
        let wanted = self.pinned(offset, len)?;
        let end = wanted.end.min(self.valid_end);
        if end <= wanted.start {
            return Ok(Plan::default());
        }
        self.split(ways, wanted.start..end)
    }

    /// All these bytes as one request, if they can be that.
    pub(crate) fn one_request(self, offset: u64, len: usize) -> Option<Piece> {
        let wanted = self.whole(self.pinned(offset, len).ok()?).ok()?;
        let (found, segment) = self.rdma_from(offset)?;
        let fits = (1..=REQUEST_BYTES_MAX).contains(&(len as u64));
        let whole = fits && found.start == offset && wanted.end <= found.end;
        whole.then(|| request(segment, offset, 0..len))
    }

    /// The eight bytes at a file offset, for an atomic: no quirk matters, but they must be aligned, and
    /// within a key's reach.
    pub(crate) fn atomic(self, offset: u64) -> Result<Piece, Refusal> {
        let wanted = self.whole(self.pinned(offset, ATOMIC_BYTES)?)?;
        let mut segments = self.grant.segments.iter();
        let inside = |segment: &&Segment| {
            segment.file_offset <= wanted.start && wanted.end <= segment.file_end()
        };
        let piece = segments.find(inside).map(|segment| request(segment, offset, 0..ATOMIC_BYTES));
        piece
            .filter(|piece| piece.remote.address.is_multiple_of(ATOMIC_BYTES as u64))
            .ok_or(Refusal::NotAtomic { file_offset: offset })
    }

    /// A small read that the device takes, if it takes any in this pin. Where it takes none it
    /// can't have taken a write either.
    pub(crate) fn probe(self) -> Option<Piece> {
        let (found, segment) = self.rdma_from(self.grant.range.start)?;
        let end = found.end.min(self.valid_end).min(found.start.saturating_add(PROBE_BYTES as u64));
        let len = usize::try_from(end.checked_sub(found.start)?).ok()?;
        (len > 0).then(|| request(segment, found.start, 0..len))
    }

    /// The parts of flushing a range of the file, as far as keys reach it: what they don't reach never
    /// went by RDMA. What a quirk forbids for transfers is allowed.
    pub(crate) fn flush(self, wanted: Range<u64>) -> Result<Vec<Piece>, Refusal> {
        let pinned = self.range();
        if wanted.start > wanted.end || wanted.start < pinned.start || wanted.end > pinned.end {
            return Err(Refusal::OutsidePin { wanted });
        }
        let mut parts = Vec::new();
        for segment in &self.grant.segments {
            let mut at = wanted.start.max(segment.file_offset);
            let end = wanted.end.min(segment.file_end()).min(self.valid_end);
            while at < end {
                let len = (end - at).min(REQUEST_BYTES_MAX);
                let address = segment.remote_address + (at - segment.file_offset);
                let key = RemoteKey::new(segment.remote_key);
                // At most what one request may have.
                let remote = RemoteSlice { address, key, len: len as usize };
                parts.push(Piece { local: 0..0, remote });
                at += len;
            }
        }
        Ok(parts)
    }

    fn pinned(self, offset: u64, len: usize) -> Result<Range<u64>, Refusal> {
        let end = offset.saturating_add(len as u64);
        let (wanted, pinned) = (offset..end, self.range());
        if offset < pinned.start || end > pinned.end {
            return Err(Refusal::OutsidePin { wanted });
        }
        Ok(wanted)
    }

    fn split(self, ways: Ways, wanted: Range<u64>) -> Result<Plan, Refusal> {
        let mut plan = Plan::default();
        let mut at = wanted.start;
        while at < wanted.end {
            let found = if ways.rdma { self.rdma_from(at) } else { None };
            let by_stream = found.as_ref().map_or(wanted.end, |(range, _)| range.start);
            if at < by_stream {
                let longest = ways.stream.ok_or(Refusal::Misaligned { file_offset: at })?;
                let gap = at..by_stream.min(wanted.end);
                plan.pieces.extend(pieces(gap.clone(), longest, wanted.start));
                at = gap.end;
            } else if let Some((range, segment)) = found {
                // It may end anywhere: only where it starts matters.
                let end = range.end.min(wanted.end).min(at.saturating_add(REQUEST_BYTES_MAX));
                plan.requests.push(request(segment, at, buffer_range(at..end, wanted.start)));
                at = end;
            }
        }
        Ok(plan)
    }

    /// The first stretch at or after a file offset that one segment covers and whose start the
    /// device takes.
    fn rdma_from(self, at: u64) -> Option<(Range<u64>, &'a Segment)> {
        let segments = &self.grant.segments;
        let alignment = u64::from(self.grant.quirks.start_alignment_bytes);
        let first = segments.partition_point(|segment| segment.file_end() <= at);
        segments[first..].iter().find_map(|segment| {
            let skipped = at.saturating_sub(segment.file_offset);
            let address = (segment.remote_address + skipped).checked_next_multiple_of(alignment)?;
            let start = segment.file_offset.checked_add(address - segment.remote_address)?;
            (start < segment.file_end()).then(|| (start..segment.file_end(), segment))
        })
    }
}

impl Plan {
    /// How many bytes it carries.
    pub(crate) fn len(&self) -> usize {
        self.places().map(|place| place.len()).sum()
    }

    /// One past the last byte of the buffer that it uses.
    pub(crate) fn buffer_end(&self) -> usize {
        self.places().map(|place| place.end).max().unwrap_or(0)
    }

    fn places(&self) -> impl Iterator<Item = &Range<usize>> {
        let pieces = self.pieces.iter().map(|piece| &piece.local);
        self.requests.iter().map(|request| &request.local).chain(pieces)
    }

    fn shift(&mut self, by: usize) {
        let requests = self.requests.iter_mut().map(|request| &mut request.local);
        for place in requests.chain(self.pieces.iter_mut().map(|piece| &mut piece.local)) {
            *place = place.start + by..place.end + by;
        }
    }
}

impl Part {
    /// The bytes of the file.
    pub(crate) fn stretch(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.bytes.len() as u64)
    }
}

/// Two requests of one transfer may be carried out in any order.
fn check_apart(
    parts: &[Part],
    range: impl Fn(&Part) -> Range<u64>,
    otherwise: &'static str,
) -> Result<(), Refusal> {
    if parts.iter().any(|part| part.bytes.start > part.bytes.end) {
        return Err(Refusal::BadParts("a part whose bytes end before they start"));
    }
    let mut ranges: Vec<_> = parts.iter().map(range).filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    match ranges.windows(2).any(|pair| pair[1].start < pair[0].end) {
        true => Err(Refusal::BadParts(otherwise)),
        false => Ok(()),
    }
}

fn request(segment: &Segment, file_offset: u64, local: Range<usize>) -> Piece {
    let remote = RemoteSlice {
        address: segment.remote_address + (file_offset - segment.file_offset),
        key: RemoteKey::new(segment.remote_key),
        len: local.len(),
    };
    Piece { local, remote }
}

/// Cut at multiples of the longest piece, so that no page of the file is in two of them.
fn pieces(gap: Range<u64>, longest: NonZeroU64, wanted_start: u64) -> Vec<StreamPiece> {
    let mut pieces = Vec::new();
    let mut at = gap.start;
    while at < gap.end {
        let border = (at / longest + 1).saturating_mul(longest.get());
        let end = border.min(gap.end);
        pieces.push(StreamPiece { local: buffer_range(at..end, wanted_start), file_offset: at });
        at = end;
    }
    pieces
}

/// Fits, as the range was made from a `usize` length.
fn buffer_range(bytes: Range<u64>, wanted_start: u64) -> Range<usize> {
    (bytes.start - wanted_start) as usize..(bytes.end - wanted_start) as usize
}
#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::{Access, FileIdentity, Generation, GuardTier, Quirks};

    const BOTH: Ways = Ways { rdma: true, stream: NonZeroU64::new(1 << 20) };
    const RDMA: Ways = Ways { rdma: true, stream: None };

    fn grant(segments: &[(u64, u64, u64)], valid_end: u64, alignment: u32) -> Grant {
        let segments: Vec<_> = segments
            .iter()
            .map(|&(file_offset, length, remote_address)| Segment {
                file_offset,
                length,
                remote_address,
                remote_key: file_offset as u32 + 1,
            })
            .collect();
        let range = segments[0].file_offset..segments[segments.len() - 1].file_end();
        Grant {
            pin_id: 1,
            generation: Generation { incarnation: 1, counter: 1 },
            identity: FileIdentity { device: 1, inode: 1, birth_time_ns: 1 },
            life: None,
            reserved_end: range.end,
            range,
            segments,
            access: Access::ReadWrite,
            guard: GuardTier::Lease,
            valid_end,
            page_size_bytes: 4096,
            dax: true,
            map_sync: true,
            durability: Vec::new(),
            quirks: Quirks { start_alignment_bytes: alignment, path_mtu_bytes: 0 },
            no_rdma_because: None,
            no_flush_because: None,
            no_atomics_because: None,
            no_atomic_write_because: None,
            revocation_cost: std::time::Duration::ZERO,
        }
    }

    impl Grant {
        fn reach(&self) -> Reach<'_> {
            Reach { grant: self, valid_end: self.valid_end }
        }
    }

    #[test]
    fn a_flush_covers_what_keys_reach_and_quirks_are_no_matter() {
        const GIB: u64 = 1 << 30;
        let two = grant(&[(100, 3 * GIB, 0x1000), (100 + 3 * GIB, 1000, 0x9000)], 4 * GIB, 4096);
        let part = |address, key, len: u64| Piece {
            local: 0..0,
            remote: RemoteSlice { address, key: RemoteKey::new(key), len: len as usize },
        };
        assert_eq!(two.reach().flush(107..110).unwrap(), [part(0x1007, 101, 3)]);
        let (end, second) = (100 + 3 * GIB, (100 + 3 * GIB) as u32 + 1);
        assert_eq!(
            two.reach().flush(end - GIB - 1..end + 5).unwrap(),
            [
                part(0x1000 + 2 * GIB - 1, 101, GIB),
                part(0x1000 + 3 * GIB - 1, 101, 1),
                part(0x9000, second, 5)
            ]
        );
        assert!(matches!(two.reach().flush(99..200), Err(Refusal::OutsidePin { .. })));
        assert!(matches!(two.reach().flush(end..end + 1001), Err(Refusal::OutsidePin { .. })));
        // A head that no key reaches, and what is past the end of the file.
        let mut late = grant(&[(4096, 4096, 0x1000)], 5000, 4096);
        late.range.start = 1;
        assert_eq!(late.reach().flush(1..8192).unwrap(), [part(0x1000, 4097, 904)]);
    }

    fn by_rdma(requests: impl Into<Vec<Piece>>) -> Plan {
        Plan { requests: requests.into(), pieces: Vec::new() }
    }

    fn request(local: Range<usize>, address: u64, key: u32) -> Piece {
        let remote = RemoteSlice { address, key: RemoteKey::new(key), len: local.len() };
        Piece { local, remote }
    }

    fn piece(local: Range<usize>, file_offset: u64) -> StreamPiece {
        StreamPiece { local, file_offset }
    }

    #[test]
    fn a_write_is_split_at_a_segment_border() {
        let grant = grant(&[(0, 8192, 0x10000), (8192, 8192, 0x90000)], 16384, 4096);
        assert_eq!(
            grant.reach().write(BOTH, 4096, 8192).unwrap(),
            by_rdma([request(0..4096, 0x11000, 1), request(4096..8192, 0x90000, 8193)]),
        );
    }

    #[test]
    fn a_write_is_split_at_the_largest_request() {
        let grant = grant(&[(0, 3 << 30, 0x1000)], 3 << 30, 4096);
        let plan = grant.reach().write(BOTH, 0, (2 << 30) + 5).unwrap();
        let lengths: Vec<_> = plan.requests.iter().map(|request| request.local.len()).collect();
        assert_eq!(lengths, [1 << 30, 1 << 30, 5]);
        assert_eq!(plan.pieces, []);
    }

    #[test]
    fn an_unaligned_head_goes_by_stream_and_the_rest_in_one_message() {
        let grant = grant(&[(0, 1 << 20, 0x10000)], 1 << 20, 4096);
        let plan = grant.reach().write(BOTH, 100, 20_001).unwrap();
        assert_eq!(plan.pieces, [piece(0..3996, 100)]);
        assert_eq!(plan.requests, [request(3996..20_001, 0x11000, 1)]);
        assert_eq!(plan.len(), 20_001);
        let inside_a_page = grant.reach().write(BOTH, 100, 200).unwrap();
        assert_eq!(inside_a_page.pieces, [piece(0..200, 100)]);
        assert_eq!((inside_a_page.requests, inside_a_page.pieces[0].local.len()), (vec![], 200));
    }

    #[test]
    fn a_segment_that_starts_late_leaves_the_head_to_the_stream_path() {
        let mut grant = grant(&[(4096, 4096, 0x10000)], 8192, 4096);
        grant.range = 100..8192;
        let plan = grant.reach().read(BOTH, 100, 8092).unwrap();
        assert_eq!(plan.pieces, [piece(0..3996, 100)]);
        assert_eq!(plan.requests, [request(3996..8092, 0x10000, 4097)]);
        let refused = grant.reach().write(RDMA, 100, 8092);
        assert_eq!(refused, Err(Refusal::Misaligned { file_offset: 100 }));
    }

    #[test]
    fn a_later_segment_that_starts_unaligned_has_a_head_of_its_own() {
        let grant = grant(&[(0, 8192, 0x10000), (8192, 8192, 0x90010)], 16384, 4096);
        let plan = grant.reach().write(BOTH, 0, 16384).unwrap();
        assert_eq!(
            plan.requests,
            [request(0..8192, 0x10000, 1), request(12272..16384, 0x91000, 8193)]
        );
        assert_eq!(plan.pieces, [piece(8192..12272, 8192)]);
        let refused = grant.reach().write(RDMA, 0, 16384);
        assert_eq!(refused, Err(Refusal::Misaligned { file_offset: 8192 }));
    }

    #[test]
    fn without_rdma_all_goes_by_stream_in_pieces_cut_at_their_multiples() {
        let mut grant = grant(&[(0, 8192, 0x10000)], 8192, 1);
        grant.segments.clear();
        let ways = Ways { rdma: false, stream: NonZeroU64::new(1000) };
        let plan = grant.reach().write(ways, 900, 1200).unwrap();
        let expected = [piece(0..100, 900), piece(100..1100, 1000), piece(1100..1200, 2000)];
        assert_eq!(plan.pieces, expected);
        assert_eq!(plan.requests, []);
    }

    #[test]
    fn one_request_is_a_plan_of_nothing_else() {
        let mut random = Random(11);
        let mut found = 0;
        for _ in 0..20_000 {
            let grant = random.grant();
            let offset = random.below(grant.reserved_end) & !(random.below(2) * 4095);
            let len = random.below(9000) as usize;
            let planned = grant.reach().write(RDMA, offset, len);
            let alone = grant.reach().one_request(offset, len);
            match planned {
                Ok(Plan { requests, .. }) if requests.len() == 1 => {
                    assert_eq!(alone.as_ref(), requests.first());
                    found += 1;
                }
                _ => assert_eq!(alone, None),
            }
        }
        assert!(found > 1000, "only {found}");
        let large = grant(&[(0, 3 << 30, 0x1000)], 3 << 30, 4096);
        assert!(large.reach().one_request(0, 1 << 30).is_some());
        assert_eq!(large.reach().one_request(0, (1 << 30) + 1), None);
    }

    #[test]
    fn parts_go_where_they_belong_and_come_from_where_they_are() {
        let grant = grant(&[(0, 1 << 20, 0x10000)], 1 << 20, 4096);
        let reach = grant.reach();
        let parts = [
            Part { offset: 8192, bytes: 4096..4196 },
            Part { offset: 100, bytes: 0..50 },
            Part { offset: 0, bytes: 7..7 },
        ];
        let plan = reach.write_parts(BOTH, &parts).unwrap();
        assert_eq!(plan.requests, [request(4096..4196, 0x12000, 1)]);
        assert_eq!(plan.pieces, [piece(0..50, 100)]);
        assert_eq!((plan.len(), plan.buffer_end()), (150, 4196));
        assert_eq!(reach.read_parts(BOTH, &parts).unwrap(), plan);
        assert_eq!(reach.write_parts(BOTH, &[]).unwrap(), Plan::default());
    }

    #[test]
    fn an_atomic_is_on_eight_aligned_bytes_that_a_key_reaches() {
        let mut grant = grant(&[(4096, 4096, 0x10000)], 8000, 4096);
        grant.range.start = 0;
        let reach = grant.reach();
        assert_eq!(reach.atomic(4104).unwrap(), request(0..8, 0x10008, 4097));
        for offset in [4100, 4092, 0] {
            assert_eq!(reach.atomic(offset), Err(Refusal::NotAtomic { file_offset: offset }));
        }
        assert!(matches!(reach.atomic(7996), Err(Refusal::PastEnd { .. })));
        assert!(matches!(reach.atomic(8192), Err(Refusal::OutsidePin { .. })));
    }

    #[test]
    fn parts_that_would_meet_are_refused() {
        let grant = grant(&[(0, 1 << 20, 0x10000)], 1 << 20, 1);
        let reach = grant.reach();
        let in_the_file = [Part { offset: 10, bytes: 0..10 }, Part { offset: 5, bytes: 20..26 }];
        assert!(matches!(reach.write_parts(BOTH, &in_the_file), Err(Refusal::BadParts(_))));
        reach.read_parts(BOTH, &in_the_file).unwrap();
        let in_the_buffer = [Part { offset: 10, bytes: 0..10 }, Part { offset: 50, bytes: 9..26 }];
        assert!(matches!(reach.read_parts(BOTH, &in_the_buffer), Err(Refusal::BadParts(_))));
        reach.write_parts(BOTH, &in_the_buffer).unwrap();
        let reversed = [Part { offset: 10, bytes: Range { start: 9, end: 8 } }];
        assert!(matches!(reach.write_parts(BOTH, &reversed), Err(Refusal::BadParts(_))));
        let past_the_end = [Part { offset: (1 << 20) - 1, bytes: 0..2 }];
        assert!(matches!(reach.read_parts(BOTH, &past_the_end), Err(Refusal::OutsidePin { .. })));
        let last = u64::MAX - 3;
        let beyond_all = [Part { offset: last, bytes: 0..100 }];
        assert!(matches!(reach.read_parts(BOTH, &beyond_all), Err(Refusal::OutsidePin { .. })));
    }

    #[test]
    fn a_write_past_the_end_of_the_file_is_refused_and_a_read_ends_there() {
        let grant = grant(&[(0, 4096, 0x1000)], 1000, 1);
        let reach = grant.reach();
        assert_eq!(reach.write(BOTH, 900, 101), Err(Refusal::PastEnd { wanted: 900..1001 }));
        let to_the_end = by_rdma([request(0..100, 0x1384, 1)]);
        assert_eq!(reach.write(BOTH, 900, 100).unwrap(), to_the_end);
        assert_eq!(reach.read(BOTH, 900, 4096 - 900).unwrap(), to_the_end);
        assert_eq!(reach.read(BOTH, 1000, 1).unwrap(), Plan::default());
        assert_eq!(reach.read(BOTH, 2000, 1).unwrap(), Plan::default());
    }

    #[test]
    fn nothing_outside_the_pin_is_touched() {
        let grant = grant(&[(4096, 4096, 0x1000)], 1 << 20, 1);
        let outside = |offset: u64, len: usize| {
            let wanted = offset..offset.saturating_add(len as u64);
            let refused = Err(Refusal::OutsidePin { wanted });
            assert_eq!(grant.reach().write(BOTH, offset, len), refused);
            assert_eq!(grant.reach().read(BOTH, offset, len), refused);
        };
        outside(4095, 1);
        outside(8191, 2);
        outside(u64::MAX, 2);
        assert_eq!(grant.reach().write(BOTH, 4096, 0), Ok(Plan::default()));
    }

    #[test]
    fn what_was_reserved_can_be_used_as_far_as_the_file_goes() {
        let mut grant = grant(&[(0, 16384, 0x10000)], 4096, 1);
        grant.range = 0..4096;
        let refused = grant.reach().write(BOTH, 4096, 1);
        assert_eq!(refused, Err(Refusal::OutsidePin { wanted: 4096..4097 }));
        let grown = Reach { grant: &grant, valid_end: 10_000 };
        assert_eq!(grown.range(), 0..10_000);
        assert_eq!(grown.write(BOTH, 4096, 10).unwrap().len(), 10);
        let grown_further = Reach { grant: &grant, valid_end: 1 << 30 };
        assert_eq!(grown_further.range(), 0..16384);
    }

    #[test]
    fn the_probe_stays_in_the_pin_and_in_the_quirk() {
        let odd = grant(&[(100, 8000, 0x10064)], 8100, 4096);
        assert_eq!(odd.reach().probe(), Some(request(0..8, 0x11000, 101)));
        let short = grant(&[(4096, 4096, 0x10000)], 4099, 4096);
        assert_eq!(short.reach().probe(), Some(request(0..3, 0x10000, 4097)));
        let unreachable = grant(&[(100, 200, 0x10064)], 300, 4096);
        assert_eq!(unreachable.reach().probe(), None);
        let past_end = grant(&[(4096, 4096, 0x10000)], 4096, 1);
        assert_eq!(past_end.reach().probe(), None);
    }

    impl Random {
        fn grant(&mut self) -> Grant {
            let alignment = 1 << self.below(14);
            let start = self.below(3) * self.below(10_000);
            // An unaligned head has no segment.
            let mut file_offset = start + self.below(2) * self.below(5000);
            let shift = self.below(2) * self.below(4096);
            let segments: Vec<_> = (0..=self.below(4))
                .map(|index| {
                    let length = 1 + self.below(20_000);
                    // As mmap does it, address and file offset mostly agree within the page.
                    let address = ((index + 1) << 32) + file_offset % 4096 + shift;
                    let segment = (file_offset, length, address);
                    file_offset += length;
                    segment
                })
                .collect();
            let valid_end = self.below(file_offset + 5000);
            let mut grant = grant(&segments, valid_end, alignment);
            let end = start + 1 + self.below(file_offset - start);
            grant.range = start..end;
            if self.below(8) == 0 {
                grant.segments.clear();
            }
            grant
        }

        fn ways(&mut self) -> Ways {
            let longest = 1 + self.below(8000);
            let stream = (self.below(4) > 0).then_some(longest).and_then(NonZeroU64::new);
            Ways { rdma: stream.is_none() || self.below(4) > 0, stream }
        }
    }

    /// What every accepted plan must be: carried out on a model of the file, it touches each of
    /// the wanted bytes once, at its place, and nothing else.
    fn check_plan(grant: &Grant, ways: Ways, wanted: Range<u64>, plan: &Plan) {
        let mut file = vec![0_u8; wanted.end as usize + 1];
        let mut buffer = vec![0_u8; (wanted.end - wanted.start) as usize];
        let mut touch = |file_offset: u64, local: &Range<usize>| {
            assert_eq!(file_offset, wanted.start + local.start as u64, "a shift");
            assert!(!local.is_empty());
            buffer[local.clone()].iter_mut().for_each(|byte| *byte += 1);
            let bytes = file_offset as usize..file_offset as usize + local.len();
            file[bytes].iter_mut().for_each(|byte| *byte += 1);
        };
        for request in &plan.requests {
            assert!(ways.rdma);
            let segment = grant
                .segments
                .iter()
                .find(|segment| segment.remote_key == request.remote.key.get())
                .expect("a key of the grant");
            let within = request.remote.address - segment.remote_address;
            assert!(within + request.local.len() as u64 <= segment.length);
            let alignment = u64::from(grant.quirks.start_alignment_bytes);
            assert!(request.remote.address.is_multiple_of(alignment), "misplaced data");
            touch(segment.file_offset + within, &request.local);
        }
        for piece in &plan.pieces {
            let longest = ways.stream.expect("the stream path may be used");
            assert!(piece.local.len() as u64 <= longest.get());
            touch(piece.file_offset, &piece.local);
        }
        assert!(buffer.iter().all(|times| *times == 1), "every byte of the buffer once");
        for (offset, times) in file.iter().enumerate() {
            assert_eq!(*times, u8::from(wanted.contains(&(offset as u64))), "byte {offset}");
        }
        assert_eq!(plan.len(), buffer.len());
    }

    /// What the device takes goes by RDMA: no byte that follows an aligned one in its segment is
    /// left to the stream path.
    fn check_thrift(grant: &Grant, ways: Ways, plan: &Plan) {
        if !ways.rdma {
            return;
        }
        let alignment = u64::from(grant.quirks.start_alignment_bytes);
        for piece in &plan.pieces {
            let end = piece.file_offset + piece.local.len() as u64;
            for segment in &grant.segments {
                let start = segment.file_offset.max(piece.file_offset);
                if start < end.min(segment.file_end()) {
                    let address = segment.remote_address + (start - segment.file_offset);
                    let aligned = address.next_multiple_of(alignment) - address + start;
                    assert!(aligned >= end.min(segment.file_end()), "{piece:?} could go by RDMA");
                }
            }
        }
    }

    #[test]
    fn every_plan_covers_its_range_exactly_or_is_refused_with_cause() {
        let mut random = Random(42);
        let (mut accepted, mut mixed, mut outside, mut misaligned) = (0, 0, 0, 0);
        for _ in 0..30_000 {
            let (grant, ways) = (random.grant(), random.ways());
            let offset = random.below(grant.reserved_end + 1000) & !(random.below(2) * 4095);
            let len = 1 + random.below(30_000);
            let wanted = offset..offset + len;
            let reach = grant.reach();
            let pinned = reach.range();
            let inside = wanted.start >= pinned.start && wanted.end <= pinned.end;
            match reach.write(ways, offset, len as usize) {
                Ok(plan) => {
                    assert!(inside && wanted.end <= grant.valid_end);
                    check_plan(&grant, ways, wanted.clone(), &plan);
                    check_thrift(&grant, ways, &plan);
                    accepted += 1;
                    mixed += u32::from(!plan.requests.is_empty() && !plan.pieces.is_empty());
                }
                Err(Refusal::OutsidePin { .. }) => {
                    assert!(!inside);
                    outside += 1;
                }
                Err(Refusal::PastEnd { .. }) => assert!(inside && wanted.end > grant.valid_end),
                Err(Refusal::BadParts(_) | Refusal::NotAtomic { .. }) => panic!("it is one part"),
                Err(Refusal::Misaligned { file_offset }) => {
                    assert!(ways.stream.is_none());
                    assert!(wanted.contains(&file_offset));
                    misaligned += 1;
                }
            }
            if let Ok(plan) = reach.read(ways, offset, len as usize) {
                let end = wanted.end.min(grant.valid_end).max(offset);
                check_plan(&grant, ways, offset..end, &plan);
            }
        }
        let counts = [accepted, mixed, outside, misaligned];
        assert!(counts.iter().all(|count| *count > 500), "too few of a kind: {counts:?}");
    }

    #[test]
    fn every_probe_is_a_read_that_could_be_planned() {
        let mut random = Random(7);
        for _ in 0..20_000 {
            let grant = random.grant();
            let Some(request) = grant.reach().probe() else {
                continue;
            };
            let segment = grant
                .segments
                .iter()
                .find(|segment| segment.remote_key == request.remote.key.get())
                .expect("a key of the grant");
            let offset = segment.file_offset + (request.remote.address - segment.remote_address);
            let grown = Reach { grant: &grant, valid_end: grant.valid_end };
            if offset + request.local.len() as u64 <= grown.range().end {
                let planned = grown.read(RDMA, offset, request.local.len());
                assert_eq!(planned, Ok(by_rdma([request])));
            }
        }
    }
}
