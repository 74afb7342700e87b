//! Writes that are known to have arrived, beside librpma. Both sides prove it by a READ of a few bytes
//! that goes behind the WRITE.

use std::time::Duration;

use anyhow::Result;

use crate::Run;
use crate::job::{FILE_BYTES, Job, KIB, What, compare};
use crate::one_sided::Ours;
use crate::peer::Peer;
use crate::place::{Storage, several_threads, text};
use crate::report::Goal;

/// Where its target listens.
const PORT: &str = "7204";

const PEER: &str = "librpma: rpma_write, rpma_flush behind it, one completion; asleep, as we are";

struct Theirs {
    initiator: Peer,
    _target: Peer,
}

/// Latency only: it is about what one write costs.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let mut ours = Ours::start(run.storage, several_threads()?, "arrived")?;
    let mut theirs = Theirs::start(run.storage)?;
    for bytes in run.pick(&[8, 4 * KIB, 64 * KIB], &[4 * KIB]) {
        let job = Job::latency(What::WriteAndRead, *bytes);
        let peer = (PEER, Goal::AtMost(1.0));
        compare(run, job, "", peer, |job| ours.time(job), |job| theirs.time(job))?;
    }
    Ok(())
}

impl Theirs {
    fn start(storage: &Storage) -> Result<Self> {
        let (program, address) = (storage.peer("librpma"), storage.places.address.to_string());
        let file = storage.foreign_file("arrived-theirs", FILE_BYTES)?;
        let mut target = Peer::start(&program, &["target", &address, PORT, text(&file)?])?;
        target.hear("listening")?;
        let mut initiator = Peer::start(&program, &["initiator", &address, PORT])?;
        initiator.hear("ready")?;
        target.hear("ready")?;
        Ok(Self { initiator, _target: target })
    }

    fn time(&mut self, job: Job) -> Result<Duration> {
        let (stride, places) = (job.stride(), job.places());
        self.initiator.time(&format!("{} {} {stride} {places}", job.bytes, job.count))
    }
}
