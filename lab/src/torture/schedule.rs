//! What happens, in which order: everything that a seed decides.

use std::ops::Range;
use std::time::Duration;

use super::block::BLOCKS;
use crate::Random;

/// What a local process does to a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Opens it for reading.
    Read,
    /// Opens it and writes over a part.
    WriteInPlace,
    /// Opens it with `O_TRUNC` and writes it anew.
    Empty,
    /// truncate(2) to nothing, then writes it anew.
    EmptyByPath,
    /// Cuts the second half off and writes that anew.
    Cut,
    /// Punches a hole and writes that anew.
    Punch,
    /// Unlinks it and makes another one of that name.
    Replace,
    /// Renames it, makes another one of that name, and opens the old one again.
    RenameAway,
    /// Renames another one over it.
    RenameOver,
}

const ACTIONS: [Action; 9] = [
    Action::Read,
    Action::WriteInPlace,
    Action::Empty,
    Action::EmptyByPath,
    Action::Cut,
    Action::Punch,
    Action::Replace,
    Action::RenameAway,
    Action::RenameOver,
];

/// One visit of a local process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Visit {
    /// How long clients are left alone before.
    pub after: Duration,
    /// What is done.
    pub action: Action,
    /// The blocks that a part of the file consists of.
    pub part: Range<u32>,
    /// How long the process keeps the file open.
    pub stay: Duration,
}

/// All visits to one file, for ever.
#[derive(Debug)]
pub struct Visits(Random);

impl Visits {
    /// Those that a seed has for a file.
    pub fn new(seed: u64, file: u32) -> Self {
        Self(stream(seed, 1, file.into()))
    }
}

impl Iterator for Visits {
    type Item = Visit;

    fn next(&mut self) -> Option<Visit> {
        let random = &mut self.0;
        // The first block, which names the life, is written anew in any case.
        let start = 1 + random.below(BLOCKS as usize - 1) as u32;
        let len = 1 + random.below((BLOCKS - start) as usize) as u32;
        Some(Visit {
            after: millis(random, 50..500),
            action: ACTIONS[random.below(ACTIONS.len())],
            part: start..start + len,
            stay: millis(random, 5..200),
        })
    }
}

/// Who is hit.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Target {
    /// The daemon.
    Server,
    /// A client's process.
    Client(usize),
}

/// How.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Blow {
    /// SIGKILL; another process takes its place.
    Kill,
    /// SIGSTOP, and SIGCONT after this long.
    Stop(Duration),
}

/// A process is killed or stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Accident {
    /// How long after the one before.
    pub after: Duration,
    /// Who.
    pub target: Target,
    /// How.
    pub blow: Blow,
}

/// All accidents, for ever.
#[derive(Debug)]
pub struct Accidents {
    random: Random,
    clients: usize,
}

impl Accidents {
    /// Those that a seed has for so many clients.
    pub fn new(seed: u64, clients: usize) -> Self {
        Self { random: stream(seed, 2, 0), clients }
    }
}

impl Iterator for Accidents {
    type Item = Accident;

    fn next(&mut self) -> Option<Accident> {
        let random = &mut self.random;
        let after = millis(random, 300..2000);
        let (target, blow) = match random.below(10) {
            0 => (Target::Server, Blow::Kill),
            // Shorter than the time between a fence's deadline and the kernel's.
            1 | 2 => (Target::Server, Blow::Stop(millis(random, 50..800))),
            3..=5 => (Target::Client(random.below(self.clients)), Blow::Kill),
            _ => {
                (Target::Client(random.below(self.clients)), Blow::Stop(millis(random, 100..3000)))
            }
        };
        Some(Accident { after, target, blow })
    }
}

/// The numbers that a seed has for one purpose.
pub fn stream(seed: u64, purpose: u64, number: u64) -> Random {
    let mut random = Random::new(seed ^ (purpose << 56) ^ (number << 32));
    // Seeds that are close together begin alike.
    Random::new(random.next_number())
}

/// A time in a range of milliseconds.
pub fn millis(random: &mut Random, range: Range<u64>) -> Duration {
    Duration::from_millis(range.start + random.below((range.end - range.start) as usize) as u64)
}
