//! Who wanted files back, and how often: for those who look after a server. Pure; what /proc says and
//! what time it is come in.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinfold_leases::{FileIdentity, Opener};

/// A file that was left alone for so long is forgotten.
const REMEMBERED: Duration = Duration::from_secs(600);
/// Files that are remembered at a time: those taken back last.
const MOST_FILES: usize = 1024;
/// Commands that are told apart for one file.
const MOST_COMMANDS: usize = 8;
/// Of who was not seen: it didn't wait (`O_NONBLOCK`), or was through before we looked.
pub(crate) const UNSEEN: &str = "unseen";
/// Of those beyond [`MOST_COMMANDS`].
const OTHERS: &str = "others";
/// That often within [`REMEMBERED`] is worth a warning, and each tenfold again.
const A_STORM: u64 = 10;

/// How often files were taken back for local processes, lately.
#[derive(Debug, Default)]
pub(crate) struct Breaks(HashMap<FileIdentity, Broken>);

/// One file's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Broken {
    /// Its path when it was pinned.
    pub(crate) path: PathBuf,
    /// Since it was left alone for long.
    pub(crate) breaks: u64,
    /// How many of them by which command.
    pub(crate) by: BTreeMap<String, u64>,
    /// The last one.
    pub(crate) last: Instant,
}

impl Broken {
    fn is_over(&self, now: Instant) -> bool {
        now.duration_since(self.last) >= REMEMBERED
    }

    /// Who did it most often.
    pub(crate) fn mostly_by(&self) -> &str {
        let most = self.by.iter().max_by_key(|(_, breaks)| **breaks);
        most.map_or(UNSEEN, |(command, _)| command)
    }
}

impl Breaks {
    /// A file was taken back for these. Gives the file if that happens so often that somebody should
    /// be told now.
    pub(crate) fn count(
        &mut self,
        file: FileIdentity,
        path: &Path,
        breakers: &[Opener],
        now: Instant,
    ) -> Option<&Broken> {
        self.make_room(file, now);
        let (breaks, by, path) = (0, BTreeMap::new(), path.to_owned());
        let broken = self.0.entry(file).or_insert(Broken { path, breaks, by, last: now });
        broken.breaks += 1;
        broken.last = now;
        let command = breakers.first().map_or(UNSEEN, |breaker| &breaker.command);
        let is_new = !broken.by.contains_key(command);
        let command = if is_new && broken.by.len() >= MOST_COMMANDS { OTHERS } else { command };
        *broken.by.entry(command.to_owned()).or_default() += 1;
        is_worth_a_word(broken.breaks).then_some(broken)
    }

    fn make_room(&mut self, file: FileIdentity, now: Instant) {
        if self.0.get(&file).is_some_and(|broken| broken.is_over(now)) {
            self.0.remove(&file);
        }
        if self.0.contains_key(&file) || self.0.len() < MOST_FILES {
            return;
        }
        self.0.retain(|_, broken| !broken.is_over(now));
        if self.0.len() < MOST_FILES {
            return;
        }
        let oldest = self.0.iter().min_by_key(|(_, broken)| broken.last).map(|(file, _)| *file);
        oldest.map(|file| self.0.remove(&file));
    }

    /// The files that were taken back lately, the most often first.
    pub(crate) fn view(&self, now: Instant) -> Vec<Broken> {
        let lately = self.0.values().filter(|broken| !broken.is_over(now));
        let mut files: Vec<Broken> = lately.cloned().collect();
        files.sort_by(|a, b| b.breaks.cmp(&a.breaks).then_with(|| a.path.cmp(&b.path)));
        files
    }
}

/// 10, 100, 1000 …
fn is_worth_a_word(breaks: u64) -> bool {
    breaks >= A_STORM && breaks == 10_u64.pow(breaks.ilog10())
}

/// Looking into /proc/locks takes longer the more files are guarded. A tenth of one thread's time is
/// what may go into it.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    not_before: Option<Instant>,
}

impl Looks {
    /// Whether there is time for a look.
    pub(crate) fn are_free(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| at <= now)
    }

    /// One took so long, and is over.
    pub(crate) fn took(&mut self, time: Duration, now: Instant) {
        self.not_before = Some(now + time * 9);
    }
}

#[cfg(test)]
mod tests {
    use pinfold_leases::OpenMode;

    use super::*;

    fn file(inode: u64) -> FileIdentity {
        FileIdentity { device: 1, inode, birth_time_ns: 0 }
    }

    fn by(command: &str) -> Vec<Opener> {
        let command = command.to_owned();
        vec![Opener { pid: 7, command, fd: None, mode: OpenMode::Read }]
    }

    #[test]
    fn breaks_are_counted_by_file_and_by_command() {
        let (mut breaks, now) = (Breaks::default(), Instant::now());
        for command in ["find", "find", "cp"] {
            breaks.count(file(1), Path::new("/d/a"), &by(command), now);
        }
        breaks.count(file(2), Path::new("/d/b"), &[], now);
        let view = breaks.view(now);
        assert_eq!(view.len(), 2);
        assert_eq!((view[0].path.as_path(), view[0].breaks), (Path::new("/d/a"), 3));
        assert_eq!(view[0].by, BTreeMap::from([("cp".to_owned(), 1), ("find".to_owned(), 2)]));
        assert_eq!(view[0].mostly_by(), "find");
        assert_eq!(view[1].mostly_by(), UNSEEN);
    }

    #[test]
    fn a_storm_is_told_ten_times_rarer_each_time() {
        let (mut breaks, now) = (Breaks::default(), Instant::now());
        let told: Vec<u64> = (1..=1000)
            .filter(|_| breaks.count(file(1), Path::new("/a"), &by("find"), now).is_some())
            .collect();
        assert_eq!(told, [10, 100, 1000]);
    }

    #[test]
    fn what_was_left_alone_is_forgotten_and_begins_anew() {
        let (mut breaks, now) = (Breaks::default(), Instant::now());
        breaks.count(file(1), Path::new("/a"), &by("find"), now);
        let later = now + REMEMBERED;
        assert_eq!(breaks.view(later), []);
        breaks.count(file(1), Path::new("/a"), &by("find"), later);
        assert_eq!(breaks.view(later)[0].breaks, 1);
    }

    #[test]
    fn many_files_and_many_commands_stay_bounded() {
        let (mut breaks, mut now) = (Breaks::default(), Instant::now());
        for inode in 0..2000 {
            now += Duration::from_millis(1);
            breaks.count(file(inode), Path::new("/a"), &by(&format!("c{inode}")), now);
            breaks.count(file(0), Path::new("/0"), &by(&format!("c{inode}")), now);
        }
        let view = breaks.view(now);
        assert_eq!(view.len(), MOST_FILES);
        assert_eq!(view[0].breaks, 2001, "the one that is broken all the time is kept");
        assert_eq!(view[0].by.len(), MOST_COMMANDS + 1);
        assert_eq!(view[0].mostly_by(), OTHERS);
    }

    #[test]
    fn looks_take_a_tenth_of_the_time() {
        let (mut looks, now) = (Looks::default(), Instant::now());
        let ms = Duration::from_millis;
        assert!(looks.are_free(now));
        looks.took(ms(2), now);
        assert!(!looks.are_free(now + ms(17)));
        assert!(looks.are_free(now + ms(18)));
    }
}
