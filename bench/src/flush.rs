//! Writes that survive power loss: by RDMA FLUSH, beside C and beside a commit by the server.

use anyhow::Result;

use crate::Run;
use crate::job::{Job, KIB, What, compare};
use crate::one_sided::{How, Ours, Theirs};
use crate::place::several_threads;
use crate::report::Goal;

const IN_C: &str = "C: WRITE and FLUSH in one post, one completion; asleep, as we are";
const COMMIT: &str = "ours: Pin::write, and Pin::commit_range in place of the flush";

pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let mut ours = Ours::start(run.storage, several_threads()?, "flushed")?;
    let mut theirs = Theirs::start_with_flush(run.storage)?;
    for bytes in run.pick(&[4 * KIB, 64 * KIB, 1024 * KIB], &[4 * KIB]) {
        let job = Job::latency(What::WriteAndFlush, *bytes);
        let peer = (IN_C, job.goal());
        compare(run, job, "", peer, |job| ours.time(job), |job| theirs.time(job, How::Asleep))?;
    }
    let mut committed = Ours::start(run.storage, several_threads()?, "committed")?;
    for bytes in run.pick(&[4 * KIB, 64 * KIB], &[4 * KIB]) {
        let job = Job::latency(What::WriteAndFlush, *bytes);
        let commit = |job: Job| committed.time(job.but(What::WriteAndCommit));
        compare(run, job, "", (COMMIT, Goal::None), |job| ours.time(job), commit)?;
    }
    Ok(())
}
