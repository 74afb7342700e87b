//! The lives of files as lines that are added to one file, and written anew when they are many.
//!
//! A crash loses the last lines at most, and what they told counts as unknown: a file whose life is
//! not known begins a new one. Only a held file's life outlives a crash without its last lines: it goes
//! on if the file's times are below the last sign of life of the server, because then nobody has
//! changed the file since. The server writes such a sign each second while it holds files.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Condvar, Mutex, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use pinfold_leases::FileIdentity;

use super::{LOOK, StateFolder};
use crate::ids::Life;
use crate::lives::{MOST_FILES, Past};
use crate::sync::locked;

/// So many lines are added before the file is written anew.
const MOST_LINES: usize = 1 << 17;

const NAME: &str = "lives";

/// What is told of a file; the last line counts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Line {
    /// Guarded, in this life, at this time of the clock that files get their times from.
    Held { file: FileIdentity, life: Life, at_ns: u64 },
    /// Held by a run that is over, whose last sign of life came at this time.
    Left { file: FileIdentity, life: Life, alive_ns: u64 },
    /// Let go, modified last at this time.
    Free { file: FileIdentity, life: Life, modified_ns: u64 },
    /// Nothing is known any more.
    Gone { file: FileIdentity },
    /// The server holds at this time what it held at the line before.
    Alive { at_ns: u64 },
}

impl Line {
    fn add_to(self, text: &mut String) {
        let mut line = |word: &str, file: FileIdentity, rest: Option<(Life, u64)>| {
            let FileIdentity { device, inode, birth_time_ns } = file;
            let _ = write!(text, "{word} {device} {inode} {birth_time_ns}");
            if let Some((Life { incarnation, counter }, ns)) = rest {
                let _ = write!(text, " {incarnation} {counter} {ns}");
            }
            text.push('\n');
        };
        match self {
            Line::Held { file, life, at_ns } => line("held", file, Some((life, at_ns))),
            Line::Left { file, life, alive_ns } => line("left", file, Some((life, alive_ns))),
            Line::Free { file, life, modified_ns } => line("free", file, Some((life, modified_ns))),
            Line::Gone { file } => line("gone", file, None),
            Line::Alive { at_ns } => {
                let _ = writeln!(text, "alive {at_ns}");
            }
        }
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let word = words.next()?;
        let numbers: Vec<u64> = words.map(|word| word.parse().ok()).collect::<Option<_>>()?;
        let file = |numbers: &[u64]| match *numbers {
            [device, inode, birth_time_ns] => Some(FileIdentity { device, inode, birth_time_ns }),
            _ => None,
        };
        let (first, rest) = numbers.split_at_checked(3).unwrap_or((&[], &numbers));
        match (word, rest) {
            ("gone", []) => Some(Line::Gone { file: file(first)? }),
            ("alive", [at_ns]) => Some(Line::Alive { at_ns: *at_ns }),
            (_, [incarnation, counter, ns]) => {
                let life = Life { incarnation: *incarnation, counter: *counter };
                let (file, ns) = (file(first)?, *ns);
                match word {
                    "held" => Some(Line::Held { file, life, at_ns: ns }),
                    "left" => Some(Line::Left { file, life, alive_ns: ns }),
                    "free" => Some(Line::Free { file, life, modified_ns: ns }),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// What an earlier run knew of a file.
pub(super) type Remembered = (FileIdentity, Life, Past);

/// What the lines of a file come to.
#[derive(Debug, Default)]
struct Known {
    /// The last line of each file, and which line it was.
    of: HashMap<FileIdentity, (usize, Line)>,
    alive_ns: u64,
}

impl Known {
    /// A line that can't be read ends it: what comes behind was not written whole.
    fn read(text: &str) -> Self {
        let mut known = Self::default();
        let whole = text.split_inclusive('\n').map_while(|line| line.strip_suffix('\n'));
        for (number, line) in whole.map_while(Line::parse).enumerate() {
            match line {
                Line::Alive { at_ns } => known.alive_ns = at_ns,
                Line::Gone { file } => drop(known.of.remove(&file)),
                Line::Held { file, .. } | Line::Left { file, .. } | Line::Free { file, .. } => {
                    known.of.insert(file, (number, line));
                }
            }
        }
        known
    }

    /// As the next run sees it: the server holds nothing any more.
    fn left(mut self, now_ns: u64) -> Self {
        for (_, line) in self.of.values_mut() {
            if let Line::Held { file, life, at_ns } = *line {
                let alive_ns = at_ns.max(self.alive_ns);
                *line = Line::Left { file, life, alive_ns };
            }
        }
        // The clock went back: later changes may have earlier times.
        self.of.retain(
            |_, (_, line)| !matches!(line, Line::Left { alive_ns, .. } if *alive_ns > now_ns),
        );
        self.alive_ns = 0;
        self
    }

    /// The last ones, oldest first. None that is held is left out.
    fn lines(&self) -> Vec<Line> {
        let mut lines: Vec<(usize, Line)> = self.of.values().copied().collect();
        lines.sort_unstable_by_key(|(number, _)| *number);
        let mut too_many = lines.len().saturating_sub(MOST_FILES);
        lines.retain(|(_, line)| {
            let goes = too_many > 0 && !matches!(line, Line::Held { .. });
            too_many -= usize::from(goes);
            !goes
        });
        lines.into_iter().map(|(_, line)| line).collect()
    }

    fn text(&self) -> String {
        let mut text = String::new();
        self.lines().into_iter().for_each(|line| line.add_to(&mut text));
        if self.alive_ns > 0 {
            Line::Alive { at_ns: self.alive_ns }.add_to(&mut text);
        }
        text
    }
}

/// The lines, and those that are to be added. Who adds one never waits for the file.
#[derive(Debug)]
pub(super) struct Log {
    folder: StateFolder,
    to_add: Mutex<ToAdd>,
    /// There are lines to add.
    more: Condvar,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct ToAdd {
    lines: Vec<Line>,
    held: HashMap<FileIdentity, ()>,
}

#[derive(Debug)]
struct Written {
    file: File,
    lines: usize,
    /// Told once.
    failed: bool,
    /// It is another server's.
    closed: bool,
}

impl Log {
    /// Reads what earlier runs have left, and begins a file of this run's.
    pub(super) fn open(folder: StateFolder, now_ns: u64) -> io::Result<(Self, Vec<Remembered>)> {
        let text = match fs::read(folder.path.join(NAME)) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error),
        };
        let known = Known::read(&text).left(now_ns);
        let lives = known.lines().into_iter().filter_map(past).collect();
        folder.replace(NAME, known.text().as_bytes())?;
        let written = Mutex::new(Written::begin(&folder, known.of.len())?);
        let log = Self { folder, to_add: Mutex::default(), more: Condvar::new(), written };
        Ok((log, lives))
    }

    /// Waits for nothing but others who add.
    pub(super) fn add(&self, line: Line) {
        let mut to_add = locked(&self.to_add);
        match line {
            Line::Held { file, .. } => drop(to_add.held.insert(file, ())),
            Line::Gone { file } => drop(to_add.held.remove(&file)),
            _ => {}
        }
        to_add.lines.push(line);
        drop(to_add);
        self.more.notify_all();
    }

    /// Writes what there is to add, unless somebody is at it.
    pub(super) fn write_if_free(&self) {
        match self.written.try_lock() {
            Ok(mut written) => self.write(&mut written, None),
            Err(TryLockError::Poisoned(poisoned)) => self.write(&mut poisoned.into_inner(), None),
            // They, or the thread, write it right after this.
            Err(TryLockError::WouldBlock) => {}
        }
    }

    /// `sign`: the time at which the server was alive, read before the lines are taken, so that a file
    /// that was let go before is not among the held ones.
    fn write(&self, written: &mut Written, sign: Option<u64>) {
        let (mut lines, holds) = {
            let mut to_add = locked(&self.to_add);
            (std::mem::take(&mut to_add.lines), !to_add.held.is_empty())
        };
        lines.extend(sign.filter(|_| holds).map(|at_ns| Line::Alive { at_ns }));
        if lines.is_empty() || written.closed {
            return;
        }
        if let Err(error) = written.add(&self.folder, &lines) {
            written.fail(&self.folder, &error);
        }
    }

    /// Looks until all is written, or it is too late. From then on nothing is written any more, and
    /// another server may have the folder.
    pub(super) fn close(&self, until: Instant) {
        loop {
            // The thread writes: it may hang there, and this must end.
            self.more.notify_all();
            if let Ok(mut written) = self.written.try_lock()
                && locked(&self.to_add).lines.is_empty()
            {
                written.closed = true;
                return self.folder.unlock();
            }
            // The writer hangs: the process's end unlocks the folder.
            if Instant::now() >= until {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// As a kill does it.
    #[cfg(test)]
    pub(super) fn unlock(&self) {
        locked(&self.written).closed = true;
        self.folder.unlock();
    }

    fn wait_for_more(&self, at_most: Duration) {
        let to_add = locked(&self.to_add);
        let nothing = |to_add: &mut ToAdd| to_add.lines.is_empty();
        drop(
            self.more
                .wait_timeout_while(to_add, at_most, nothing)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}

/// The work of the thread that writes.
pub(super) fn keep(log: &Weak<Log>, sign_every: Duration, clock: fn() -> u64) {
    let mut sign_at = Instant::now() + sign_every;
    while let Some(log) = log.upgrade() {
        log.wait_for_more(sign_at.saturating_duration_since(Instant::now()).min(LONGEST_WAIT));
        let sign = (Instant::now() >= sign_at).then(|| {
            sign_at = Instant::now() + sign_every;
            clock()
        });
        log.write(&mut locked(&log.written), sign);
    }
}

/// So soon it is noticed that the server has ended.
const LONGEST_WAIT: Duration = Duration::from_millis(100);

fn past(line: Line) -> Option<Remembered> {
    match line {
        Line::Left { file, life, alive_ns } => Some((file, life, Past::Left { alive_ns })),
        Line::Free { file, life, modified_ns } => {
            Some((file, life, Past::Free { modified_ns: Some(modified_ns) }))
        }
        Line::Held { .. } | Line::Gone { .. } | Line::Alive { .. } => None,
    }
}

impl Written {
    fn begin(folder: &StateFolder, lines: usize) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.append(true).mode(0o600).open(folder.path.join(NAME))?;
        Ok(Self { file, lines, failed: false, closed: false })
    }

    fn add(&mut self, folder: &StateFolder, lines: &[Line]) -> io::Result<()> {
        let mut text = String::new();
        lines.iter().for_each(|line| line.add_to(&mut text));
        self.file.write_all(text.as_bytes())?;
        self.lines += lines.len();
        if self.lines > MOST_LINES {
            let known = Known::read(&fs::read_to_string(folder.path.join(NAME))?);
            folder.replace(NAME, known.text().as_bytes())?;
            *self = Self::begin(folder, known.of.len())?;
        }
        Ok(())
    }

    /// Lines are missing now, so none of those that are there can be relied on.
    fn fail(&mut self, folder: &StateFolder, error: &io::Error) {
        let _ = self.file.set_len(0);
        if !std::mem::replace(&mut self.failed, true) {
            let path = folder.path.display();
            tracing::error!(%path, %error, "can't write the state folder: the next run will not know the lives of files");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileIdentity = FileIdentity { device: 1, inode: 2, birth_time_ns: 3 };
    const OTHER: FileIdentity = FileIdentity { inode: 4, ..FILE };
    const LIFE: Life = Life { incarnation: 5, counter: 6 };

    fn text(lines: &[Line]) -> String {
        let mut text = String::new();
        lines.iter().for_each(|line| line.add_to(&mut text));
        text
    }

    #[test]
    fn lines_come_back_as_they_were() {
        for line in [
            Line::Held { file: FILE, life: LIFE, at_ns: 7 },
            Line::Left { file: FILE, life: LIFE, alive_ns: 7 },
            Line::Free { file: FILE, life: LIFE, modified_ns: 7 },
            Line::Gone { file: FILE },
            Line::Alive { at_ns: 7 },
        ] {
            assert_eq!(Line::parse(text(&[line]).trim_end()), Some(line));
        }
        for bad in ["", "held", "held 1 2 3", "free 1 2 3 4 5 x", "what 1 2 3 4 5 6", "gone 1 2"] {
            assert_eq!(Line::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn wherever_a_crash_cuts_it_no_file_is_held_that_was_let_go() {
        let whole = text(&[
            Line::Held { file: FILE, life: LIFE, at_ns: 10 },
            Line::Alive { at_ns: 20 },
            Line::Gone { file: FILE },
            Line::Free { file: FILE, life: LIFE, modified_ns: 15 },
            Line::Held { file: OTHER, life: LIFE, at_ns: 30 },
            Line::Alive { at_ns: 40 },
        ]);
        for end in 0..=whole.len() {
            let known = Known::read(&whole[..end]).left(1000);
            match known.of.get(&FILE).map(|(_, line)| *line) {
                None => {}
                Some(Line::Left { alive_ns, .. }) => assert!(alive_ns <= 20, "{end}"),
                Some(line) => assert!(matches!(line, Line::Free { .. }), "{end}: {line:?}"),
            }
        }
        let known = Known::read(&whole).left(1000);
        assert_eq!(known.of[&OTHER].1, Line::Left { file: OTHER, life: LIFE, alive_ns: 40 });
        assert!(!Known::read(&whole).left(39).of.contains_key(&OTHER), "the clock went back");
    }

    #[test]
    fn signs_of_a_later_run_say_nothing_of_what_an_earlier_one_held() {
        let first = text(&[Line::Held { file: FILE, life: LIFE, at_ns: 10 }]);
        let second = Known::read(&first).left(1000).text() + &text(&[Line::Alive { at_ns: 500 }]);
        let third = Known::read(&second).left(1000);
        assert_eq!(third.of[&FILE].1, Line::Left { file: FILE, life: LIFE, alive_ns: 10 });
    }

    #[test]
    fn the_oldest_are_left_out_but_none_that_is_held() {
        let file = |inode| FileIdentity { inode, ..FILE };
        let held = Line::Held { file: file(0), life: LIFE, at_ns: 1 };
        let free = |inode| Line::Free { file: file(inode), life: LIFE, modified_ns: 1 };
        let mut lines = vec![held];
        lines.extend((1..=MOST_FILES as u64 + 5).map(free));
        let kept = Known::read(&text(&lines)).lines();
        assert_eq!(kept.len(), MOST_FILES);
        assert_eq!((kept[0], kept[1]), (held, free(7)));
    }
}
