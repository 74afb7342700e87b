//! What a pin costs: by itself, and when there are many.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pinfold_client::{IfExists, Pin, PinRequest, Session, Transport};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use crate::Run;
use crate::peer::Peer;
use crate::place::{EXPORT, Storage, several_threads, text};
use crate::plain::Plain;
use crate::report::Goal;
use crate::statistics::Pairs;
use crate::truncate;
use crate::turns::alternate;

const PAGE: u64 = 4096;

/// Of the pinned file.
const FILE_BYTES: u64 = 16 << 20;

/// Pins of a session, a page each: what the server allows, and one more that is measured.
const PINS_PER_SESSION: u64 = 4000;

/// The file that the many pins are on.
const CROWDED: &str = "crowd";

/// Calls under way at a time while many pins are made.
const SIDE_BY_SIDE: u64 = 8;

/// Pins taken and given back in a round, one after the other.
const TIMES: u32 = 4;

/// What a pin may cost in the server's own memory.
const BYTES_PER_PIN_MAX: f64 = 1024.0;

/// A session that pins and unpins in a file which is guarded already.
struct Pinner {
    session: Session,
    name: &'static str,
    _first: Arc<Pin>,
}

/// Pin and unpin on a file that is guarded already.
pub(crate) fn run_alone(run: &mut Run<'_>) -> Result<()> {
    let runtime = several_threads()?;
    let pinner = runtime.block_on(Pinner::start(run.storage, "pinned"))?;
    let foreign = run.storage.foreign_file("registered", FILE_BYTES as usize)?;
    let arguments = ["pin", &run.storage.places.device, text(&foreign)?];
    let mut peer = Peer::start(&run.storage.peer("guards"), &arguments)?;
    peer.hear("ready")?;
    let mut plain = runtime.block_on(Plain::start(&foreign))?;
    for (bytes, name) in [(PAGE, "4 KiB"), (1 << 20, "1 MiB")] {
        let sides = [
            (
                "C: populate, ibv_reg_mr, ibv_dereg_mr; and one empty gRPC call",
                1,
                Goal::AtMost(1.25),
            ),
            ("the same, and two empty gRPC calls, as pin and unpin are two", 2, Goal::None),
        ];
        for (what, calls, goal) in sides {
            let pairs = alternate(
                run.rounds,
                || runtime.block_on(pinner.time(bytes)).map(microseconds),
                || {
                    let pinned = peer.time(&format!("pin {bytes} {TIMES}"))?;
                    let called = runtime.block_on(plain.empty_calls(TIMES * calls))?;
                    Ok(microseconds(pinned + called))
                },
            )?;
            run.add(format!("pin_and_unpin/{name}"), what, "us", &pairs, goal);
        }
    }
    Ok(())
}

/// The same beside a server that has many pins and sessions already, and what those pins cost it.
pub(crate) fn run_many(run: &mut Run<'_>) -> Result<()> {
    let runtime = several_threads()?;
    let alone = runtime.block_on(Pinner::start(run.storage, "alone"))?;
    for sessions in run.pick(&[20, 200, 1000], &[20]) {
        let crowded = Storage::start(&run.storage.places)?;
        let busy = runtime.block_on(Pinner::start(&crowded, "busy"))?;
        let crowd = runtime.block_on(connect_many(&crowded, *sessions))?;
        let pairs = beside(run, &runtime, &busy, &alone)?;
        let name = format!("pin_and_unpin_beside_sessions/{sessions}");
        run.add(name, "the same beside one session", "us", &pairs, Goal::AtMost(1.25));
        drop(crowd);
    }
    for pins in run.pick(&[1000, 10_000, truncate::MOST], &[1000]) {
        let crowded = Storage::start(&run.storage.places)?;
        let busy = runtime.block_on(Pinner::start(&crowded, "busy"))?;
        let before = resident_bytes(&crowded)?;
        let crowd = runtime.block_on(pin_many(&crowded, *pins))?;
        let mut memory = Pairs::default();
        let grown = resident_bytes(&crowded)?.saturating_sub(before);
        memory.add(grown as f64 / *pins as f64, BYTES_PER_PIN_MAX);
        let name = format!("server_memory_per_pin/{pins}");
        run.add(name, "the limit", "B", &memory, Goal::AtMost(1.0));
        let pairs = beside(run, &runtime, &busy, &alone)?;
        let name = format!("pin_and_unpin_beside_pins/{pins}");
        run.add(name, "the same beside one pin", "us", &pairs, Goal::AtMost(1.25));
        if *pins == truncate::MOST {
            truncate::run_once(run, &crowded.path(CROWDED))?;
        }
        drop(crowd);
    }
    Ok(())
}

fn beside(run: &Run<'_>, runtime: &Runtime, busy: &Pinner, alone: &Pinner) -> Result<Pairs> {
    alternate(
        run.rounds,
        || runtime.block_on(busy.time(PAGE)).map(microseconds),
        || runtime.block_on(alone.time(PAGE)).map(microseconds),
    )
}

impl Pinner {
    async fn start(storage: &Storage, name: &'static str) -> Result<Self> {
        let session = storage.connect().await?;
        let first = storage.pin(&session, name, FILE_BYTES, Transport::Rdma).await?;
        Ok(Self { session, name, _first: first })
    }

    /// Pins and unpins as often as a round has it.
    async fn time(&self, bytes: u64) -> Result<Duration> {
        let started = Instant::now();
        for _ in 0..TIMES {
            let request = PinRequest::read_write(EXPORT, self.name).range(0..bytes);
            self.session.pin(request.transport(Transport::Rdma)).await?.unpin().await?;
        }
        Ok(started.elapsed())
    }
}

/// Pins of a page each on one file, by as many sessions as that takes.
async fn pin_many(storage: &Storage, pins: u64) -> Result<Vec<(Arc<Session>, Vec<Pin>)>> {
    let mut crowd = Vec::new();
    let mut left = pins;
    while left > 0 {
        let own = left.min(PINS_PER_SESSION);
        let session = Arc::new(storage.connect().await?);
        if crowd.is_empty() {
            session.create(EXPORT, CROWDED, FILE_BYTES, IfExists::Resize).await?;
        }
        let pins = pin_pages(&session, CROWDED, own).await?;
        crowd.push((session, pins));
        left -= own;
    }
    Ok(crowd)
}

/// Pins the first so many pages, each by itself.
pub(crate) async fn pin_pages(
    session: &Arc<Session>,
    name: &'static str,
    pages: u64,
) -> Result<Vec<Pin>> {
    let mut tasks = JoinSet::new();
    for first in 0..SIDE_BY_SIDE {
        let session = session.clone();
        tasks.spawn(async move {
            let mut pins = Vec::new();
            for page in (first..pages).step_by(SIDE_BY_SIDE as usize) {
                let range = page * PAGE..(page + 1) * PAGE;
                let request = PinRequest::read_write(EXPORT, name).range(range);
                pins.push(session.pin(request.transport(Transport::Rdma)).await?);
            }
            anyhow::Ok(pins)
        });
    }
    let mut pins = Vec::new();
    while let Some(some) = tasks.join_next().await {
        pins.extend(some??);
    }
    Ok(pins)
}

async fn connect_many(storage: &Storage, sessions: usize) -> Result<Vec<Session>> {
    let mut crowd = Vec::new();
    for _ in 0..sessions {
        crowd.push(storage.connect().await?);
    }
    Ok(crowd)
}

/// Anonymous memory that the server uses (proc_pid_status(5)): neither its files nor what the kernel
/// keeps for it.
fn resident_bytes(storage: &Storage) -> Result<u64> {
    let path = format!("/proc/{}/status", storage.pid());
    let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    parse_anonymous(&status).with_context(|| format!("{path} has no RssAnon"))
}

fn parse_anonymous(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

/// For one pin.
fn microseconds(took: Duration) -> f64 {
    took.as_secs_f64() * 1e6 / f64::from(TIMES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_anonymous_memory_counts() {
        let status = "Name:\tx\nVmRSS:\t    900 kB\nRssAnon:\t     512 kB\nRssFile:\t 388 kB\n";
        assert_eq!(parse_anonymous(status), Some(512 << 10));
        assert_eq!(parse_anonymous("VmRSS:\t 900 kB\n"), None);
    }
}
