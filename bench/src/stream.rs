//! The stream path beside a plain gRPC stream: same frames, same flow control, same kind of file.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pinfold_client::{Buffer, Pin, Session, Transport};

use crate::Run;
use crate::place::{Storage, several_threads};
use crate::plain::Plain;
use crate::report::Goal;
use crate::turns::alternate;

/// What a transfer carries: several pieces.
const BYTES: usize = 8 << 20;

#[derive(Clone, Copy)]
enum What {
    Write,
    Read,
}

const PEER: &str = "one plain tonic stream of 1 MiB frames";

impl What {
    fn word(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
        }
    }
}

struct Ours {
    // Dropped in this order: the pin goes with its session.
    pin: Arc<Pin>,
    buffer: Option<Buffer>,
    session: Session,
}

struct Theirs {
    plain: Plain,
    bytes: Arc<[u8]>,
    place: Vec<u8>,
}

/// Writes and reads of several MiB.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let runtime = several_threads()?;
    let mut ours = runtime.block_on(Ours::start(run.storage))?;
    let mut theirs = runtime.block_on(Theirs::start(run.storage))?;
    for what in [What::Write, What::Read] {
        let pairs = alternate(
            run.rounds,
            || runtime.block_on(ours.time(what)).map(mb_per_s),
            || runtime.block_on(theirs.time(what)).map(mb_per_s),
        )?;
        let name = format!("stream_{}/8 MiB", what.word());
        run.add(name, PEER, "MB/s", &pairs, Goal::AtLeast(0.9));
    }
    let Ours { pin, session, .. } = ours;
    drop(pin);
    runtime.block_on(session.close());
    Ok(())
}

fn mb_per_s(took: Duration) -> f64 {
    BYTES as f64 / 1e6 / took.as_secs_f64()
}

impl Ours {
    async fn start(storage: &Storage) -> Result<Self> {
        let session = storage.connect().await?;
        let pin = storage.pin(&session, "stream", BYTES as u64, Transport::Stream).await?;
        let buffer = Some(session.buffer(BYTES).await?);
        Ok(Self { pin, buffer, session })
    }

    async fn time(&mut self, what: What) -> Result<Duration> {
        let buffer = self.buffer.take().context("no buffer left")?;
        let started = Instant::now();
        let (back, streamed) = match what {
            What::Write => {
                let (back, report) = self.pin.write(0, buffer, BYTES).await?;
                (back, report.stream_bytes)
            }
            What::Read => {
                let (back, report) = self.pin.read(0, BYTES, buffer).await?;
                (back, report.stream_bytes)
            }
        };
        let took = started.elapsed();
        ensure!(streamed == BYTES as u64, "only {streamed} of {BYTES} bytes by the stream path");
        self.buffer = Some(back);
        Ok(took)
    }
}

impl Theirs {
    async fn start(storage: &Storage) -> Result<Self> {
        let plain = Plain::start(&storage.foreign_file("plain", BYTES)?).await?;
        Ok(Self { plain, bytes: vec![7; BYTES].into(), place: vec![0; BYTES] })
    }

    async fn time(&mut self, what: What) -> Result<Duration> {
        let started = Instant::now();
        match what {
            What::Write => self.plain.write(self.bytes.clone()).await?,
            What::Read => self.plain.read(&mut self.place).await?,
        }
        Ok(started.elapsed())
    }
}
