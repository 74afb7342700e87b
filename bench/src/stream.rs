//! The stream path beside a plain gRPC stream: same frames, same flow control, same kind of file.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use pinfold_client::Transport;

use crate::Run;
use crate::place::several_threads;
use crate::plain::Plain;
use crate::report::Goal;
use crate::turns::alternate;

/// What a transfer carries: several pieces.
const BYTES: usize = 8 << 20;

const PEER: &str = "one plain tonic stream of 1 MiB frames";

/// Writes and reads of several MiB.
pub(crate) fn run(run: &mut Run<'_>) -> Result<()> {
    let runtime = several_threads()?;
    let file = run.storage.foreign_file("plain", BYTES)?;
    let (session, pin, buffer, mut plain) = runtime.block_on(async {
        let session = run.storage.connect().await?;
        let pin = run.storage.pin(&session, "stream", BYTES as u64, Transport::Stream).await?;
        let buffer = session.buffer(BYTES).await?;
        anyhow::Ok((session, pin, buffer, Plain::start(&file).await?))
    })?;
    let mb_per_s = |started: Instant| BYTES as f64 / 1e6 / started.elapsed().as_secs_f64();
    let bytes: Arc<[u8]> = vec![7; BYTES].into();
    let mut place = vec![0; BYTES];
    let mut buffer = Some(buffer);
    let pairs = alternate(
        run.rounds,
        || {
            let own = buffer.take().context("no buffer left")?;
            let started = Instant::now();
            let (back, report) = runtime.block_on(pin.write(0, own, BYTES))?;
            buffer = Some(back);
            anyhow::ensure!(report.stream_bytes == BYTES as u64, "{report:?}");
            Ok(mb_per_s(started))
        },
        || {
            let started = Instant::now();
            runtime.block_on(plain.write(bytes.clone()))?;
            Ok(mb_per_s(started))
        },
    )?;
    run.add("stream_write/8 MiB".to_owned(), PEER, "MB/s", &pairs, Goal::AtLeast(0.9));
    let pairs = alternate(
        run.rounds,
        || {
            let own = buffer.take().context("no buffer left")?;
            let started = Instant::now();
            let (back, report) = runtime.block_on(pin.read(0, BYTES, own))?;
            buffer = Some(back);
            anyhow::ensure!(report.stream_bytes == BYTES as u64, "{report:?}");
            Ok(mb_per_s(started))
        },
        || {
            let started = Instant::now();
            runtime.block_on(plain.read(&mut place))?;
            Ok(mb_per_s(started))
        },
    )?;
    run.add("stream_read/8 MiB".to_owned(), PEER, "MB/s", &pairs, Goal::AtLeast(0.9));
    drop(pin);
    runtime.block_on(session.close());
    Ok(())
}
