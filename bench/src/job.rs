//! One-sided transfers as both sides are told to do them, and what of them goes into a row.

use std::time::Duration;

use anyhow::Result;

use crate::Run;
use crate::report::Goal;
use crate::turns::alternate;

/// Of each file; transfers go round in it.
pub(crate) const FILE_BYTES: usize = 16 << 20;

/// Transfers in flight where bandwidth is measured.
pub(crate) const DEPTH: usize = 16;

/// What a round of a bandwidth carries, or more. Rounds are short: what disturbs the machine disturbs
/// few of them, and of those the median knows nothing.
/// Shorter ones had the same ratios.
const ROUND_BYTES: usize = 4 << 20;

/// Transfers in a round, one after the other.
const ROUND_TRANSFERS: u64 = 300;

pub(crate) const PAGE: usize = 4096;

pub(crate) const KIB: usize = 1 << 10;

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum What {
    Write,
    Read,
    /// A write, and a small read behind it: the write is in memory then.
    WriteAndRead,
    /// A write, and an RDMA FLUSH behind it.
    WriteAndFlush,
    /// A write, and a commit by the server.
    WriteAndCommit,
}

/// What of a round goes into the row.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Figure {
    /// Many at a time.
    Bandwidth,
    /// One after the other.
    Latency,
}

/// The transfers of a round, the same on both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) what: What,
    pub(crate) bytes: usize,
    pub(crate) depth: usize,
    pub(crate) count: u64,
    figure: Figure,
}

impl What {
    const ALL: [Self; 5] =
        [Self::Write, Self::Read, Self::WriteAndRead, Self::WriteAndFlush, Self::WriteAndCommit];

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::WriteAndRead => "write_and_read",
            Self::WriteAndFlush => "write_and_flush",
            Self::WriteAndCommit => "write_and_commit",
        }
    }
}

impl Job {
    pub(crate) fn bandwidth(what: What, bytes: usize) -> Self {
        let count = (ROUND_BYTES / bytes).max(2 * DEPTH) as u64;
        Self { what, bytes, depth: DEPTH, count, figure: Figure::Bandwidth }
    }

    pub(crate) fn latency(what: What, bytes: usize) -> Self {
        Self { what, bytes, depth: 1, count: ROUND_TRANSFERS, figure: Figure::Latency }
    }

    /// The same so many times.
    pub(crate) fn times(self, count: u64) -> Self {
        Self { count, ..self }
    }

    /// As a peer is told it.
    pub(crate) fn line(self) -> String {
        let Self { what, bytes, depth, count, .. } = self;
        format!("{} {bytes} {depth} {count} {} {}", what.word(), self.stride(), self.places())
    }

    /// What was told so.
    pub(crate) fn from_line(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [what, bytes, depth, count, ..] = words[..] else { return None };
        Some(Self {
            what: What::ALL.into_iter().find(|known| known.word() == what)?,
            bytes: bytes.parse().ok()?,
            depth: depth.parse().ok()?,
            count: count.parse().ok()?,
            figure: Figure::Latency,
        })
    }

    /// The same, but what is done.
    pub(crate) fn but(self, what: What) -> Self {
        Self { what, ..self }
    }

    /// Each begins on a page, as soft-RoCE needs it.
    pub(crate) fn stride(self) -> usize {
        self.bytes.next_multiple_of(PAGE)
    }

    pub(crate) fn places(self) -> usize {
        FILE_BYTES / self.stride()
    }

    pub(crate) fn offset(self, number: u64) -> u64 {
        number % self.places() as u64 * self.stride() as u64
    }

    /// Of a round that took so long: MB/s of all, or microseconds for each.
    pub(crate) fn figure(self, took: Duration) -> f64 {
        match self.figure {
            Figure::Bandwidth => (self.bytes as u64 * self.count) as f64 / 1e6 / took.as_secs_f64(),
            Figure::Latency => took.as_secs_f64() * 1e6 / self.count as f64,
        }
    }

    /// The row, of such transfers in a particular way.
    pub(crate) fn row(self, way: &str) -> String {
        let figure = match self.figure {
            Figure::Bandwidth => "bandwidth",
            Figure::Latency => "latency",
        };
        format!("{}_{figure}{way}/{}", self.what.word(), size(self.bytes))
    }

    pub(crate) fn unit(self) -> &'static str {
        match self.figure {
            Figure::Bandwidth => "MB/s",
            Figure::Latency => "us",
        }
    }

    /// What it should be beside a peer that does the same.
    pub(crate) fn goal(self) -> Goal {
        match self.figure {
            Figure::Bandwidth => Goal::AtLeast(0.98),
            Figure::Latency => Goal::AtMost(1.05),
        }
    }
}

/// Has both sides do the job in turns, and notes what comes of it.
pub(crate) fn compare(
    run: &mut Run<'_>,
    job: Job,
    way: &str,
    (peer, goal): (&'static str, Goal),
    mut ours: impl FnMut(Job) -> Result<Duration>,
    mut theirs: impl FnMut(Job) -> Result<Duration>,
) -> Result<()> {
    let pairs =
        alternate(run.rounds, || Ok(job.figure(ours(job)?)), || Ok(job.figure(theirs(job)?)))?;
    run.add(job.row(way), peer, job.unit(), &pairs, goal);
    Ok(())
}

/// For people.
fn size(bytes: usize) -> String {
    match bytes {
        0..KIB => format!("{bytes} B"),
        _ => format!("{} KiB", bytes / KIB),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_stays_within_the_file_and_starts_on_pages() {
        for bytes in [8, 4 * KIB, 5000, 1024 * KIB] {
            let job = Job::bandwidth(What::Write, bytes);
            for number in [0, 1, job.count - 1, u64::MAX] {
                let offset = job.offset(number) as usize;
                assert!(
                    offset.is_multiple_of(PAGE) && offset + bytes <= FILE_BYTES,
                    "{bytes} at {offset}"
                );
            }
        }
    }

    #[test]
    fn bandwidth_is_of_all_and_latency_of_each() {
        let took = Duration::from_millis(500);
        let many = Job { count: 2000, ..Job::bandwidth(What::Read, 1000) };
        assert_eq!(
            (many.figure(took), many.unit(), many.goal()),
            (4.0, "MB/s", Goal::AtLeast(0.98))
        );
        let single = Job { count: 2000, ..Job::latency(What::Read, 1000) };
        assert_eq!(
            (single.figure(took), single.unit(), single.goal()),
            (250.0, "us", Goal::AtMost(1.05))
        );
    }

    #[test]
    fn a_line_tells_what_is_to_be_done() {
        for what in What::ALL {
            let job = Job::bandwidth(what, 4 * KIB);
            let told = Job::from_line(&format!("{} sleep", job.line())).unwrap();
            let facts = |job: Job| (job.what, job.bytes, job.depth, job.count);
            assert_eq!(facts(told), facts(job));
        }
        assert!(Job::from_line("write 8 1").is_none() && Job::from_line("dance 8 1 1").is_none());
    }

    #[test]
    fn a_row_says_what_was_done_and_how() {
        assert_eq!(Job::bandwidth(What::Write, 4 * KIB).row(""), "write_bandwidth/4 KiB");
        let job = Job::latency(What::WriteAndRead, 8);
        assert_eq!(job.row("_one_thread"), "write_and_read_latency_one_thread/8 B");
    }
}
