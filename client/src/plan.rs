//! Turns a file range into one-sided requests, or says exactly why not: pure arithmetic.
//!
//! The NIC would refuse a range outside the pin too, but at the price of the queue pair; and it
//! would report success for a request that breaks a [quirk](crate::Quirks) and misplace the data.

use std::ops::Range;

use crate::{Grant, Quirks};

/// Largest request. Below what any device takes (2 GiB), and a multiple of any alignment.
const REQUEST_BYTES_MAX: u64 = 1 << 30;

/// A probe that makes sure that earlier writes are in memory has no use for more.
pub(crate) const PROBE_BYTES: usize = 8;

/// One request: a stretch of the buffer and where it goes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Request {
    pub(crate) local: Range<usize>,
    pub(crate) remote_address: u64,
    pub(crate) remote_key: u32,
}

/// Why a range can't be transferred.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Refusal {
    /// Some of it is not pinned.
    OutsidePin { wanted: Range<u64> },
    /// Some of it is past the end of the file.
    PastEnd { wanted: Range<u64> },
    /// It, or its part in a later segment, starts at a place that the device mishandles.
    Misaligned { file_offset: u64 },
}

/// The requests for writing `len` bytes at a file offset.
pub(crate) fn write(grant: &Grant, offset: u64, len: usize) -> Result<Vec<Request>, Refusal> {
    let wanted = pinned_range(grant, offset, len)?;
    if wanted.end > grant.valid_end {
        return Err(Refusal::PastEnd { wanted });
    }
    split(grant, wanted)
}

/// The requests for reading up to `len` bytes at a file offset: as with pread(2), a read ends at
/// the end of the file.
pub(crate) fn read(grant: &Grant, offset: u64, len: usize) -> Result<Vec<Request>, Refusal> {
    let wanted = pinned_range(grant, offset, len)?;
    let end = wanted.end.min(grant.valid_end);
    if end <= wanted.start {
        return Ok(Vec::new());
    }
    split(grant, wanted.start..end)
}

/// A small read that the device takes, if it takes any in this pin. Where it takes none it can't
/// have taken a write either.
pub(crate) fn probe(grant: &Grant) -> Option<Request> {
    let usable = grant.usable();
    grant.segments.iter().find_map(|segment| {
        let alignment = u64::from(grant.quirks.start_alignment_bytes);
        let address = segment.remote_address.checked_next_multiple_of(alignment)?;
        let file_offset = segment.file_offset.checked_add(address - segment.remote_address)?;
        let end =
            segment.file_end().min(usable.end).min(file_offset.saturating_add(PROBE_BYTES as u64));
        let len = usize::try_from(end.checked_sub(file_offset)?).ok()?;
        (len > 0).then_some(Request {
            local: 0..len,
            remote_address: address,
            remote_key: segment.remote_key,
        })
    })
}

fn pinned_range(grant: &Grant, offset: u64, len: usize) -> Result<Range<u64>, Refusal> {
    let end = offset.saturating_add(len as u64);
    let wanted = offset..end;
    if offset < grant.range.start || end > grant.range.end {
        return Err(Refusal::OutsidePin { wanted });
    }
    Ok(wanted)
}

fn split(grant: &Grant, wanted: Range<u64>) -> Result<Vec<Request>, Refusal> {
    let first = grant.segments.partition_point(|segment| segment.file_end() <= wanted.start);
    let mut requests = Vec::new();
    for segment in &grant.segments[first..] {
        let mut start = segment.file_offset.max(wanted.start);
        let end = segment.file_end().min(wanted.end);
        while start < end {
            let next = end.min(start + REQUEST_BYTES_MAX);
            let remote_address = segment.remote_address + (start - segment.file_offset);
            if !is_aligned(remote_address, grant.quirks) {
                return Err(Refusal::Misaligned { file_offset: start });
            }
            requests.push(Request {
                local: buffer_index(start, &wanted)..buffer_index(next, &wanted),
                remote_address,
                remote_key: segment.remote_key,
            });
            start = next;
        }
    }
    Ok(requests)
}

fn is_aligned(remote_address: u64, quirks: Quirks) -> bool {
    remote_address.is_multiple_of(quirks.start_alignment_bytes.into())
}

/// Fits, as the range was made from a `usize` length.
fn buffer_index(file_offset: u64, wanted: &Range<u64>) -> usize {
    (file_offset - wanted.start) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Access, FileIdentity, Generation, GuardTier, Segment};

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
        }
    }

    fn request(local: Range<usize>, remote_address: u64, remote_key: u32) -> Request {
        Request { local, remote_address, remote_key }
    }

    #[test]
    fn a_write_is_split_at_a_segment_border() {
        let grant = grant(&[(0, 8192, 0x10000), (8192, 8192, 0x90000)], 16384, 4096);
        assert_eq!(
            write(&grant, 4096, 8192).unwrap(),
            [request(0..4096, 0x11000, 1), request(4096..8192, 0x90000, 8193)],
        );
    }

    #[test]
    fn a_write_is_split_at_the_largest_request() {
        let grant = grant(&[(0, 3 << 30, 0x1000)], 3 << 30, 4096);
        let lengths: Vec<_> = write(&grant, 0, (2 << 30) + 5)
            .unwrap()
            .into_iter()
            .map(|request| request.local.len())
            .collect();
        assert_eq!(lengths, [1 << 30, 1 << 30, 5]);
    }

    #[test]
    fn a_write_past_the_end_of_the_file_is_refused_and_a_read_ends_there() {
        let grant = grant(&[(0, 4096, 0x1000)], 1000, 1);
        assert_eq!(write(&grant, 900, 101), Err(Refusal::PastEnd { wanted: 900..1001 }));
        assert_eq!(write(&grant, 900, 100).unwrap(), [request(0..100, 0x1384, 1)]);
        assert_eq!(read(&grant, 900, 4096 - 900).unwrap(), [request(0..100, 0x1384, 1)]);
        assert_eq!(read(&grant, 1000, 1).unwrap(), []);
        assert_eq!(read(&grant, 2000, 1).unwrap(), []);
    }

    #[test]
    fn nothing_outside_the_pin_is_touched() {
        let grant = grant(&[(4096, 4096, 0x1000)], 1 << 20, 1);
        assert_eq!(write(&grant, 4095, 1), Err(Refusal::OutsidePin { wanted: 4095..4096 }));
        assert_eq!(write(&grant, 8191, 2), Err(Refusal::OutsidePin { wanted: 8191..8193 }));
        assert_eq!(read(&grant, 8192, 1), Err(Refusal::OutsidePin { wanted: 8192..8193 }));
        assert!(write(&grant, u64::MAX, usize::MAX).is_err());
    }

    #[test]
    fn a_start_that_the_device_mishandles_is_refused() {
        let grant = grant(&[(0, 16384, 0x10000)], 16384, 4096);
        assert_eq!(write(&grant, 100, 64), Err(Refusal::Misaligned { file_offset: 100 }));
        assert_eq!(read(&grant, 1, 1), Err(Refusal::Misaligned { file_offset: 1 }));
        assert!(write(&grant, 4096, 1).is_ok());
    }

    #[test]
    fn the_alignment_is_that_of_the_address_not_of_the_offset() {
        let odd = grant(&[(100, 8000, 0x10064)], 8100, 4096);
        assert!(write(&odd, 4096, 10).is_ok());
        assert!(write(&odd, 100, 10).is_err());
    }

    #[test]
    fn the_probe_stays_in_the_pin_and_in_the_quirk() {
        let odd = grant(&[(100, 8000, 0x10064)], 8100, 4096);
        assert_eq!(probe(&odd), Some(request(0..8, 0x11000, 101)));
        let short = grant(&[(4096, 4096, 0x10000)], 4099, 4096);
        assert_eq!(probe(&short), Some(request(0..3, 0x10000, 4097)));
        let unreachable = grant(&[(100, 200, 0x10064)], 300, 4096);
        assert_eq!(probe(&unreachable), None);
        let past_end = grant(&[(4096, 4096, 0x10000)], 4096, 1);
        assert_eq!(probe(&past_end), None);
    }

    /// A small deterministic generator (SplitMix64), so that a failure names its case.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (z ^ (z >> 31)) % bound
        }

        fn grant(&mut self) -> Grant {
            let alignment = 1 << self.below(14);
            let mut file_offset = self.below(3) * self.below(10_000);
            let segments: Vec<_> = (0..=self.below(4))
                .map(|index| {
                    let length = 1 + self.below(20_000);
                    // As mmap does it: address and file offset agree within the page.
                    let address = ((index + 1) << 32) + file_offset % 4096;
                    let segment = (file_offset, length, address);
                    file_offset += length;
                    segment
                })
                .collect();
            let valid_end = self.below(file_offset + 5000);
            grant(&segments, valid_end, alignment)
        }
    }

    /// What every accepted plan must be, checked byte by byte against the grant.
    fn check_plan(grant: &Grant, offset: u64, end: u64, requests: &[Request]) {
        let mut reached = 0;
        for request in requests {
            assert_eq!(request.local.start, reached, "a gap or an overlap in the buffer");
            assert!(!request.local.is_empty());
            reached = request.local.end;
            let segment = grant
                .segments
                .iter()
                .find(|segment| segment.remote_key == request.remote_key)
                .expect("a key of the grant");
            let within = request.remote_address - segment.remote_address;
            assert_eq!(segment.file_offset + within, offset + request.local.start as u64);
            assert!(within + request.local.len() as u64 <= segment.length);
            assert!(is_aligned(request.remote_address, grant.quirks));
        }
        assert_eq!(offset + reached as u64, end, "all of it, and no more");
    }

    #[test]
    fn every_plan_covers_its_range_exactly_or_is_refused_with_cause() {
        let mut random = Random(42);
        let (mut accepted, mut refused) = (0, 0);
        for _ in 0..100_000 {
            let grant = random.grant();
            let offset = random.below(grant.range.end + 1000) & !(random.below(2) * 4095);
            let len = 1 + random.below(30_000);
            let end = offset + len;
            let inside = offset >= grant.range.start && end <= grant.range.end;
            match write(&grant, offset, len as usize) {
                Ok(requests) => {
                    assert!(inside && end <= grant.valid_end);
                    check_plan(&grant, offset, end, &requests);
                    accepted += 1;
                }
                Err(Refusal::OutsidePin { .. }) => {
                    assert!(!inside);
                    refused += 1;
                }
                Err(Refusal::PastEnd { .. }) => assert!(inside && end > grant.valid_end),
                Err(Refusal::Misaligned { file_offset }) => {
                    assert!(grant.quirks.start_alignment_bytes > 1);
                    assert!((offset..end).contains(&file_offset));
                }
            }
            if let Ok(requests) = read(&grant, offset, len as usize) {
                check_plan(&grant, offset, end.min(grant.valid_end).max(offset), &requests);
            }
        }
        assert!(accepted > 1000 && refused > 1000, "{accepted} accepted, {refused} refused");
    }

    #[test]
    fn every_probe_is_a_read_that_could_be_planned() {
        let mut random = Random(7);
        for _ in 0..20_000 {
            let grant = random.grant();
            let Some(request) = probe(&grant) else {
                continue;
            };
            let segment = grant
                .segments
                .iter()
                .find(|segment| segment.remote_key == request.remote_key)
                .expect("a key of the grant");
            let offset = segment.file_offset + (request.remote_address - segment.remote_address);
            assert_eq!(read(&grant, offset, request.local.len()), Ok(vec![request]));
        }
    }
}
