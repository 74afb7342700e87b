//! The program before the power cut: one maker, whose every step is acknowledged before the next, so
//! that the last one before the cut has been made durable by itself alone; and beside it a writer that
//! never commits.

use std::convert::Infallible;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use pinfold_client::{
    Buffer, ConnectOptions, IfExists, Pin, PinRequest, RdmaDevice, Session, Transport,
};

use super::place::Place;
use super::words::{Said, name};
use crate::{Daemon, EXPORT, Pattern, Random, device_name};

/// Bytes of a file at most, before it grows.
const MOST: usize = 200_000;
/// Bytes of a piece at most.
const PIECE: usize = 64 << 10;
/// Each file of so many comes by `pinfold put`.
const PUT_EVERY: u64 = 5;
/// The file of whoever never commits.
const NEVER_COMMITTED: u64 = 1_000_000;

/// Works in a new folder of the place until the guest is gone; once this file is made, if there is one,
/// the maker takes no further step, which could make the file durable after all.
pub async fn work(place: Place, folder: &str, seed: u64, last: Option<u64>) -> Result<Infallible> {
    let folder = new_folder(place, folder)?;
    let daemon = Daemon::start(&[(EXPORT, &folder)]);
    let device = RdmaDevice::Named(device_name());
    let options = ConnectOptions::new(&daemon.url).rdma_device(device);
    let session = Session::connect(options.clone()).await?;
    let buffer = session.buffer(PIECE).await?;
    let writer = tokio::spawn(write_on(place, Session::connect(options).await?));
    let maker = Maker { place, session, random: Random::new(seed), last, buffer: Some(buffer) };
    let writer = async { writer.await? };
    tokio::try_join!(maker.run(&daemon.url), writer).map(|(never, _)| never)
}

/// Its own name must survive too.
fn new_folder(place: Place, name: &str) -> Result<PathBuf> {
    let mount_point = place.mount_point();
    let folder = mount_point.join(name);
    std::fs::create_dir(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
    std::fs::File::open(&mount_point)?.sync_all()?;
    Ok(folder)
}

/// In one piece, so that lines of several places don't mix.
fn say(place: Place, said: &Said) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(said.line(place).as_bytes())?;
    Ok(stdout.flush()?)
}

struct Maker {
    place: Place,
    session: Session,
    random: Random,
    last: Option<u64>,
    buffer: Option<Buffer>,
}

impl Maker {
    async fn run(mut self, url: &str) -> Result<Infallible> {
        for file in 0.. {
            if file % PUT_EVERY == PUT_EVERY - 1 {
                self.put(url, file)?;
            } else {
                self.make(file).await?;
            }
            if self.random.below(6) == 0 {
                self.say(&Said::Removing { file })?;
                self.session.remove(EXPORT, &name(file), false).await?;
                self.say(&Said::Removed { file })?;
            }
        }
        bail!("there are no more numbers")
    }

    fn say(&self, said: &Said) -> Result<()> {
        say(self.place, said)
    }

    fn size(&mut self) -> u64 {
        1 + self.random.below(MOST) as u64
    }

    async fn make(&mut self, file: u64) -> Result<()> {
        let size = self.size();
        create(self.place, &self.session, file, size).await?;
        if self.last == Some(file) {
            std::future::pending::<()>().await;
        }
        let grown = size + self.size();
        let request = PinRequest::read_write(EXPORT, name(file)).reserve_end(grown);
        let transport = [Transport::Auto, Transport::Auto, Transport::Stream][self.random.below(3)];
        let pin = self.session.pin(request.transport(transport)).await?;
        self.fill(&pin, file, 0..size).await?;
        if self.random.below(3) == 0 {
            self.say(&Said::Growing { file, size: grown })?;
            let end = self.session.grow(EXPORT, &name(file), grown).await?;
            self.say(&Said::Grew { file })?;
            pin.extend_to(end);
            self.fill(&pin, file, size..grown).await?;
        }
        Ok(pin.unpin().await?)
    }

    /// Piece by piece, of which some are committed, together with those before them or alone.
    async fn fill(&mut self, pin: &Pin, file: u64, range: Range<u64>) -> Result<()> {
        let Range { start: mut at, end } = range;
        while at < end {
            let len = (1 + self.random.below(PIECE)).min(usize::try_from(end - at)?);
            let mut buffer = self.buffer.take().context("the buffer was lost")?;
            Pattern(file).fill(at, &mut buffer.as_mut_slice()[..len]);
            self.buffer = Some(pin.write(at, buffer, len).await?.0);
            let piece = at..at + len as u64;
            at = piece.end;
            let committed = match self.random.below(3) {
                0 => continue,
                1 => {
                    pin.commit_range(piece.clone()).await?;
                    piece
                }
                _ => {
                    pin.commit().await?;
                    0..at
                }
            };
            self.say(&Said::Committed { file, range: committed })?;
        }
        Ok(())
    }

    fn put(&mut self, url: &str, file: u64) -> Result<()> {
        let size = self.size();
        let local = tempfile::NamedTempFile::new()?;
        std::fs::write(local.path(), Pattern(file).bytes(0, usize::try_from(size)?))?;
        self.say(&Said::Creating { file, size })?;
        put(url, local.path(), &format!("{EXPORT}/{}", name(file)))?;
        self.say(&Said::Created { file })?;
        self.say(&Said::Committed { file, range: 0..size })
    }
}

/// The command of a user, which lies beside this program.
fn put(url: &str, local: &Path, to: &str) -> Result<()> {
    let mut command = Command::new(std::env::current_exe()?.with_file_name("pinfold"));
    command.args(["--server", url, "--rdma-device", &device_name(), "put"]).arg(local).arg(to);
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "pinfold put: {}: {said}", output.status);
    Ok(())
}

async fn create(place: Place, session: &Session, file: u64, size: u64) -> Result<()> {
    say(place, &Said::Creating { file, size })?;
    session.create(EXPORT, &name(file), size, IfExists::Fail).await?;
    say(place, &Said::Created { file })
}

/// So that there is something in flight whenever the power goes.
async fn write_on(place: Place, session: Session) -> Result<Infallible> {
    let file = NEVER_COMMITTED;
    create(place, &session, file, 4 * PIECE as u64).await?;
    let pin = session.pin(PinRequest::read_write(EXPORT, name(file))).await?;
    let mut buffer = session.buffer(PIECE).await?;
    for piece in 0.. {
        let at = piece % 4 * PIECE as u64;
        Pattern(file).fill(at, buffer.as_mut_slice());
        buffer = pin.write(at, buffer, PIECE).await?.0;
    }
    bail!("there are no more pieces")
}
