//! Where a file lies on its medium, and whether hardware can have it in huge pages.

use std::fs;

use crate::dax_device::DaxDevice;
use crate::description::{Description, MappingKind};
use crate::error::Result;
use crate::mapping::HUGE_PAGE;
use crate::sys::{self, Extent};

/// The page that CPUs and devices like best. Mappings start on a multiple of it.
const HUGE: u64 = HUGE_PAGE as u64;

/// How a file lies on its medium (FIEMAP).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Layout {
    /// In how many pieces.
    pub extents: usize,
    /// Bytes up to the file's end that lie in whole pieces of 2 MiB, on multiples of 2 MiB in file
    /// and medium alike.
    pub huge_bytes: u64,
    /// Bytes that could, by the file's size: its whole pieces of 2 MiB.
    pub whole_pieces: u64,
    /// Bytes per page in the worst part of a mapping of the file: 2 MiB where all whole pieces are
    /// huge, else what the system's pages are. A mapping's tail always has small pages.
    pub page_size: u64,
}

impl Description {
    /// Looks how the file lies on its medium. On fs-DAX that decides the page size of the mapping;
    /// elsewhere pages are memory, and [`Layout::page_size`] is the system's. Breaks no guard. To be
    /// asked after the file was flushed: what is not allocated yet has no place.
    pub fn layout(&self) -> Result<Layout> {
        if let Some(DaxDevice { size, align, .. }) = self.device() {
            let huge_bytes = if align == HUGE { size } else { 0 };
            return Ok(Layout { extents: 1, huge_bytes, whole_pieces: size, page_size: align });
        }
        let extents =
            sys::extents(self.fd()).map_err(|e| self.failed("ioctl(FS_IOC_FIEMAP)", e))?;
        let size = self.size()?;
        let whole_pieces = size - size % HUGE;
        let huge_bytes = match self.kind()? {
            MappingKind::FsDax => huge_bytes(&extents, partition_start(self), whole_pieces),
            _ => 0,
        };
        let all = whole_pieces > 0 && huge_bytes == whole_pieces;
        let page_size = if all { HUGE } else { rustix::param::page_size() as u64 };
        Ok(Layout { extents: extents.len(), huge_bytes, whole_pieces, page_size })
    }
}

/// Where the file's partition starts on its disk, in bytes: extents count from there. 0 for a whole
/// disk. (A disk of persistent memory starts on a huge page itself.)
fn partition_start(file: &Description) -> u64 {
    let device = file.identity().device;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let start = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/start"));
    start.ok().and_then(|sectors| sectors.trim().parse::<u64>().ok()).unwrap_or(0) * 512
}

/// Counts the bytes below `end` in whole huge pieces that one run of extents covers, at a place that
/// is a multiple of their size too.
fn huge_bytes(extents: &[Extent], disk_offset: u64, end: u64) -> u64 {
    runs(extents)
        .into_iter()
        .filter(|run| (run.physical + disk_offset) % HUGE == run.logical % HUGE)
        .map(|run| {
            let last = (run.logical + run.len).min(end);
            let (first, last) = (run.logical.next_multiple_of(HUGE), last - last % HUGE);
            last.saturating_sub(first)
        })
        .sum()
}

/// Joins what follows one another in the file and on the medium.
fn runs(extents: &[Extent]) -> Vec<Extent> {
    let mut runs: Vec<Extent> = Vec::new();
    for extent in extents {
        match runs.last_mut() {
            Some(run)
                if run.logical + run.len == extent.logical
                    && run.physical + run.len == extent.physical =>
            {
                run.len += extent.len;
            }
            _ => runs.push(*extent),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1 << 10;

    fn extent(logical: u64, physical: u64, len: u64) -> Extent {
        Extent { logical, physical, len }
    }

    #[test]
    fn a_piece_is_huge_where_file_and_medium_agree() {
        let aligned = [extent(0, 8 * HUGE, 4 * HUGE)];
        assert_eq!(huge_bytes(&aligned, 0, 4 * HUGE), 4 * HUGE);
        assert_eq!(huge_bytes(&aligned, 0, 3 * HUGE), 3 * HUGE, "not past the end");
        assert_eq!(huge_bytes(&aligned, 4 * KIB, 4 * HUGE), 0, "the partition is crooked");
        assert_eq!(huge_bytes(&[extent(0, 4 * KIB, 4 * HUGE)], 0, 4 * HUGE), 0);
        let crooked_alike = [extent(4 * KIB, HUGE + 4 * KIB, 2 * HUGE)];
        assert_eq!(huge_bytes(&crooked_alike, 0, 2 * HUGE), HUGE, "one whole piece inside");
    }

    #[test]
    fn extents_that_follow_one_another_are_one_run() {
        let half = HUGE / 2;
        let joined = [extent(0, 0, half), extent(half, half, half)];
        assert_eq!(huge_bytes(&joined, 0, HUGE), HUGE);
        let apart = [extent(0, 0, half), extent(half, 3 * half, half)];
        assert_eq!(huge_bytes(&apart, 0, HUGE), 0);
        let hole = [extent(0, 0, half), extent(HUGE + half, HUGE + half, half)];
        assert_eq!(huge_bytes(&hole, 0, 2 * HUGE), 0);
    }
}
