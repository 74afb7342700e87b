//! The clients: each in a process of its own, which can be killed and stopped.

use std::io::{BufRead, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use pinfold_client::{
    Buffer, ConnectOptions, DrainPolicy, Error, Event, Events, Grant, IfExists, Pin, PinRequest,
    RdmaDevice, Reason, Session, Transport,
};
use tokio::sync::broadcast;

use super::block::{BLOCK, BLOCKS, Block, FILE, Found, Way, area};
use super::schedule::{millis, stream};
use super::words::{Kind, NEW_FILE, Role, Said, Told, file_name, new_name};
use crate::{EXPORT, Random, device_name, remote_slice};

/// Blocks that one write covers at most.
const RUN: usize = 4;
/// Writes between two commits.
const COMMIT_EVERY: u64 = 6;
/// How long an old key is kept to be tried.
const AMBUSH: Duration = Duration::from_secs(4);
/// How often a hammer goes on with an old key before it asks for a new one.
const OLD_KEY_TRIES: usize = 12;

/// Plays a role until its standard input ends.
pub async fn play(role: Role) {
    let (told, _) = broadcast::channel(256);
    let mut tasks = tokio::task::JoinSet::new();
    for file in &role.files {
        let writer = Writer::new(&role, *file, told.clone());
        tasks.spawn(writer.run());
    }
    let over = tokio::task::spawn_blocking(move || pass_on(&told));
    // An end of the input is the end of the play; sessions end with their tasks.
    let _ = over.await;
    tasks.shutdown().await;
}

fn pass_on(told: &broadcast::Sender<Told>) {
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        if let Ok(word) = serde_json::from_str(&line) {
            // Nobody listens now: nobody is concerned.
            let _ = told.send(word);
        }
    }
}

fn say(said: &Said) {
    let line = serde_json::to_string(said).expect("plain data");
    let mut stdout = std::io::stdout().lock();
    // The rig is gone: the end of the input follows.
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// One role on one file.
struct Writer {
    role: Role,
    file: u32,
    random: Random,
    sequence: u64,
    told: broadcast::Sender<Told>,
}

/// A pin, and what its writes say of it.
struct Held {
    pin: Pin,
    grant: Grant,
    life: u64,
}

impl Writer {
    fn new(role: &Role, file: u32, told: broadcast::Sender<Told>) -> Self {
        let purpose = 100 + u64::from(role.writer);
        let random = stream(role.seed, purpose, u64::from(file) | role.incarnation << 16);
        // Later than everything that a process before has written; and no two files that are made
        // have the same number.
        let maker = u64::from(NEW_FILE.saturating_sub(file)) & 0xff;
        let sequence = role.incarnation << 32 | maker << 24;
        Self { role: role.clone(), file, random, sequence, told }
    }

    async fn run(mut self) {
        loop {
            if let Ok(session) = Session::connect(self.options()).await {
                while session.loss().is_none() {
                    self.visit(&session).await;
                    let pause = millis(&mut self.random, 5..60);
                    tokio::time::sleep(pause).await;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    fn options(&self) -> ConnectOptions {
        let policy = match self.role.kind {
            Kind::Drains | Kind::Streams | Kind::MakesFiles => DrainPolicy::Automatic,
            Kind::Ignores | Kind::Hammers | Kind::Ambushes => DrainPolicy::Ignore,
        };
        let device = match self.role.kind {
            Kind::Streams => RdmaDevice::None,
            _ => RdmaDevice::Named(device_name()),
        };
        let name = format!("{:?} {}", self.role.kind, self.role.writer);
        let options = ConnectOptions::new(&self.role.url).client_name(name);
        options.rdma_device(device).drain_policy(policy)
    }

    /// From a pin to its end.
    async fn visit(&mut self, session: &Session) {
        if self.role.kind == Kind::MakesFiles {
            if let Err(error) = self.make_file(session).await {
                // The next file is another one.
                self.failed(error);
            }
            return;
        }
        let events = session.events();
        let Some(held) = self.pin(session).await else {
            // The server looks through all of /proc for who has the file: not too often.
            let pause = millis(&mut self.random, 60..200);
            return tokio::time::sleep(pause).await;
        };
        match self.role.kind {
            Kind::Drains | Kind::Streams | Kind::Ignores => self.write_on(session, &held).await,
            Kind::Hammers => self.hammer(session, &held).await,
            Kind::Ambushes => self.ambush(session, &held, events).await,
            Kind::MakesFiles => unreachable!("it pins its own files"),
        }
        if self.role.kind == Kind::Drains && self.random.below(4) == 0 {
            // A pin that was taken back, or whose session is lost, is gone all the same.
            let _ = held.pin.unpin().await;
        }
    }

    async fn pin(&mut self, session: &Session) -> Option<Held> {
        let transport = match self.role.kind {
            Kind::Streams => Transport::Stream,
            _ => Transport::Rdma,
        };
        let request = PinRequest::read_write(EXPORT, file_name(self.file)).transport(transport);
        // Refused while a local process has the file.
        let pin = session.pin(request).await.ok()?;
        let buffer = session.buffer(BLOCK).await.ok()?;
        let (buffer, _) = pin.read(0, BLOCK, buffer).await.ok()?;
        let grant = pin.grant().clone();
        match Block::find(&buffer.as_slice()[..BLOCK]) {
            Found::Whole(Block { way: Way::Local, file, index: 0, life, .. })
                if file == self.file =>
            {
                let generation = grant.generation.counter;
                say(&Said::Pinned { file, life, generation });
                if self.role.kind == Kind::Drains {
                    say(&Said::Mapped);
                }
                Some(Held { pin, grant, life })
            }
            // What a pin by the stream path reads while it is taken back can be of any time: a fence
            // waits for no reads.
            _ if self.role.kind == Kind::Streams => None,
            found => {
                let what = format!("the head of a pinned file is {found}");
                say(&Said::Odd { file: self.file, what });
                None
            }
        }
    }

    /// Fills some blocks in a row of those that this writer has.
    fn next_run(&mut self, held: &Held, buffer: &mut Buffer, longest: usize) -> (u32, u32) {
        let area = area(self.role.writer);
        let first = area.start + self.random.below(area.len()) as u32;
        let count = (1 + self.random.below(longest) as u32).min(area.end - first);
        self.sequence += 1;
        for (piece, index) in buffer.as_mut_slice().chunks_mut(BLOCK).zip(first..first + count) {
            self.block(index, held.life, held.grant.generation.counter).fill(piece);
        }
        (first, count)
    }

    fn block(&self, index: u32, life: u64, generation: u64) -> Block {
        let (writer, file, sequence) = (self.role.writer, self.file, self.sequence);
        Block { way: Way::Remote, writer, file, index, life, generation, sequence }
    }

    fn wrote(&self, held: &Held, (first, count): (u32, u32)) {
        let (file, life, sequence) = (self.file, held.life, self.sequence);
        say(&Said::Wrote { file, life, first, count, sequence });
    }

    fn failed(&self, why: impl ToString) {
        say(&Said::Failed { file: self.file, why: why.to_string() });
    }

    async fn breathe(&mut self) {
        let pause = millis(&mut self.random, 0..12);
        tokio::time::sleep(pause).await;
    }

    /// By the library, until a write or a commit fails.
    async fn write_on(&mut self, session: &Session, held: &Held) {
        let Ok(mut buffer) = session.buffer(RUN * BLOCK).await else { return };
        for round in 1.. {
            let run = self.next_run(held, &mut buffer, RUN);
            let len = run.1 as usize * BLOCK;
            match held.pin.write(u64::from(run.0) * BLOCK as u64, buffer, len).await {
                Ok((back, _)) => {
                    buffer = back;
                    self.wrote(held, run);
                }
                Err(failed) => return self.failed(failed.error),
            }
            if round % COMMIT_EVERY == 0 && self.commit(held).await.is_break() {
                return;
            }
            self.breathe().await;
        }
    }

    async fn commit(&self, held: &Held) -> ControlFlow<()> {
        let (file, life, sequence) = (self.file, held.life, self.sequence);
        match held.pin.commit().await {
            Ok(_) => {
                say(&Said::Committed { file, life, sequence });
                ControlFlow::Continue(())
            }
            Err(Error::Refused { reason: Some(Reason::StaleGeneration), .. }) => {
                say(&Said::Stale { file });
                ControlFlow::Break(())
            }
            Err(Error::Draining { .. } | Error::Revoked { .. }) => {
                say(&Said::Stale { file });
                ControlFlow::Break(())
            }
            Err(error) => {
                self.failed(error);
                ControlFlow::Break(())
            }
        }
    }

    /// One write past the library; whether it was acknowledged. None: nothing could be posted.
    async fn raw(
        &mut self,
        session: &Session,
        held: &Held,
        buffer: &mut Option<Buffer>,
    ) -> Option<(bool, (u32, u32))> {
        let mut mine = buffer.take()?;
        let run = self.next_run(held, &mut mine, 1);
        let key = held.grant.segments.first()?;
        let remote = remote_slice(key, u64::from(run.0) * BLOCK as u64, run.1 as usize * BLOCK);
        match session.raw_write(remote, mine).await {
            Ok((back, status)) => {
                *buffer = Some(back);
                Some((status.is_success(), run))
            }
            Err(failed) => {
                *buffer = failed.buffer;
                None
            }
        }
    }

    /// Without a pause, and on with the old key when it has died.
    async fn hammer(&mut self, session: &Session, held: &Held) {
        let mut buffer = session.buffer(BLOCK).await.ok();
        while let Some((true, run)) = self.raw(session, held, &mut buffer).await {
            self.wrote(held, run);
            self.breathe().await;
        }
        self.failed("cut off");
        for _ in 0..OLD_KEY_TRIES {
            self.try_old_key(session, held, &mut buffer).await;
        }
    }

    async fn try_old_key(
        &mut self,
        session: &Session,
        held: &Held,
        buffer: &mut Option<Buffer>,
    ) -> bool {
        let file = self.file;
        match self.raw(session, held, buffer).await {
            Some((true, _)) => {
                say(&Said::Landed { file });
                true
            }
            Some((false, _)) => {
                say(&Said::Refused { file });
                false
            }
            None => false,
        }
    }

    /// Until the file is wanted; then waits for the moment at which an old key would do harm.
    async fn ambush(&mut self, session: &Session, held: &Held, mut events: Events) {
        let mut told = self.told.subscribe();
        let mut buffer = session.buffer(BLOCK).await.ok();
        let wanted = tokio::spawn(async move {
            loop {
                match events.next().await {
                    Some(Event::Draining { notice, .. }) => break Some(notice.generation),
                    Some(Event::Revoked { revocation, .. }) => break Some(revocation.generation),
                    Some(Event::Disconnected { .. }) | None => break None,
                    Some(_) => {}
                }
            }
        });
        while !wanted.is_finished() {
            match self.raw(session, held, &mut buffer).await {
                Some((true, run)) => self.wrote(held, run),
                _ => return self.failed("cut off"),
            }
            self.breathe().await;
        }
        let lie_in_wait = async {
            while let Ok(word) = told.recv().await {
                let mine = Told::Rewritten { file: self.file };
                if word == Told::Mapped {
                    // Once: before the fence it may land, and the queue pair is to be whole after it.
                    self.try_old_key(session, held, &mut buffer).await;
                }
                if word == mine {
                    while self.try_old_key(session, held, &mut buffer).await {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                    return;
                }
            }
        };
        // Nobody came, or the words were lost: another pin, another time.
        let _ = tokio::time::timeout(AMBUSH, lie_in_wait).await;
    }

    /// Makes a file, writes to it, gives it back, and waits until it was checked.
    async fn make_file(&mut self, session: &Session) -> Result<(), Error> {
        self.sequence += 1;
        let number = self.sequence;
        let name = new_name(number);
        session.create(EXPORT, &name, FILE as u64, IfExists::Fail).await?;
        let pin = session.pin(PinRequest::read_write(EXPORT, &name)).await?;
        let generation = pin.grant().generation.counter;
        let mut told = self.told.subscribe();
        let mut acknowledged = Vec::new();
        let mut buffer = session.buffer(BLOCK).await?;
        say(&Said::Mapped);
        for at in 0..3 {
            let index = area(self.role.writer).start + at;
            let block = Block { file: NEW_FILE, ..self.block(index, number, generation) };
            block.fill(buffer.as_mut_slice());
            let offset = u64::from(index) * BLOCK as u64;
            buffer = pin.write(offset, buffer, BLOCK).await?.0;
            acknowledged.push((index, block.sequence));
            let pause = millis(&mut self.random, 5..40);
            tokio::time::sleep(pause).await;
        }
        pin.commit().await?;
        pin.unpin().await?;
        say(&Said::GaveBack { number, acknowledged });
        let checked =
            async { while told.recv().await.is_ok_and(|word| word != Told::Checked { number }) {} };
        // The rig may have lost it with the server: the next file is another one.
        let _ = tokio::time::timeout(Duration::from_secs(10), checked).await;
        Ok(())
    }
}

const _: () = assert!(BLOCKS as usize * BLOCK == FILE);
