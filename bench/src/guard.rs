//! What the guard itself costs: taken and let go, with nothing mapped.

use std::time::Instant;

use anyhow::Result;
use pinfold_leases::{Create, Export, RelativePath, Watcher};

use crate::Run;
use crate::peer::Peer;
use crate::place::text;
use crate::report::Goal;
use crate::turns::alternate;

/// In a round.
const TIMES: u32 = 100;

/// Guards taken and let go per second.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let folder = tempfile::tempdir_in(&run.storage.places.dax)?;
    let (watcher, _) = Watcher::start()?;
    let create = Create { size: 4096, mode: 0o600, dax: false };
    let file = Export::open(folder.path())?.create(&RelativePath::parse("file")?, &create)?;
    let foreign = run.storage.foreign_file("armed", 4096)?;
    let mut peer = Peer::start(&run.storage.peer("guards"), &["arm", text(&foreign)?])?;
    peer.hear("ready")?;
    let pairs = alternate(
        run.rounds,
        || {
            let started = Instant::now();
            for _ in 0..TIMES {
                drop(file.arm(&watcher)?);
            }
            Ok(f64::from(TIMES) / started.elapsed().as_secs_f64())
        },
        || Ok(f64::from(TIMES) / peer.time(&format!("arm {TIMES}"))?.as_secs_f64()),
    )?;
    let peer = "C: F_SETSIG, F_SETOWN_EX, F_SETDELEG, and back";
    run.add("guard_set_and_release".to_owned(), peer, "per s", &pairs, Goal::None);
    Ok(())
}
