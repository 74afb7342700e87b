//! A local process: takes a file from the clients, changes it, looks at it, and leaves.
//!
//! While it has the file open nobody can pin it, so whatever changes under its hands is a write that
//! came after the release.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, fallocate};

use super::block::{BLOCK, BLOCKS, FILE};
use super::crowd::Crowd;
use super::life::{Life, check_still, local_bytes};
use super::rig::{Rig, remove};
use super::schedule::{Action, Visit, Visits};
use super::words::Told;

/// How long a full file system may stay full: what was unlinked is freed in the background.
const FULL: Duration = Duration::from_secs(30);

/// Who visits one file.
#[derive(Debug)]
pub struct Local {
    rig: Arc<Rig>,
    crowd: Arc<Crowd>,
    file: u32,
    path: PathBuf,
}

/// A file that is open, and what must be in it.
struct Taken {
    file: File,
    life: Life,
}

impl Local {
    /// Of this file.
    pub fn new(rig: &Arc<Rig>, crowd: &Arc<Crowd>, file: u32) -> Self {
        let path = rig.path(file);
        Self { rig: Arc::clone(rig), crowd: Arc::clone(crowd), file, path }
    }

    /// Visits it again and again.
    pub fn run(&self) {
        for visit in Visits::new(self.rig.order.seed, self.file) {
            if !self.rig.pause(visit.after) {
                return;
            }
            self.rig.wait_for_writes(self.file);
            let action = visit.action;
            self.rig.count(&format!("visits: {action:?}"), 1);
            if let Err(error) = self.visit(&visit) {
                self.rig.found_in(self.file, "local", &format!("{action:?}: {error}"));
            }
        }
    }

    /// When all clients are gone.
    pub fn last_look(&self) {
        if let Err(error) = self.read().map(drop) {
            self.rig.found_in(self.file, "local", &format!("at the end: {error}"));
        }
    }

    fn visit(&self, visit: &Visit) -> io::Result<()> {
        self.note(&format!("{:?} begins", visit.action));
        let mut left = None;
        let taken = match visit.action {
            Action::Read => self.read()?,
            Action::WriteInPlace => self.rewrite(&visit.part, |_, _| Ok(()))?,
            Action::Cut => self.rewrite(&(BLOCKS / 2..BLOCKS), cut)?,
            Action::Punch => self.rewrite(&visit.part, punch)?,
            Action::Empty => self.write_anew(OpenOptions::new().truncate(true))?,
            Action::EmptyByPath => {
                nix::unistd::truncate(&self.path, 0)?;
                self.write_anew(&mut OpenOptions::new())?
            }
            Action::Replace => {
                remove(&self.path)?;
                self.write_anew(OpenOptions::new().create_new(true))?
            }
            Action::RenameAway => {
                let aside = self.path.with_extension("aside");
                std::fs::rename(&self.path, &aside)?;
                left = Some((aside, self.rig.life(self.file)));
                self.write_anew(OpenOptions::new().create_new(true))?
            }
            Action::RenameOver => self.rename_over()?,
        };
        self.stay(&taken, visit)?;
        drop(taken.file);
        self.note(&format!("{:?} has ended", visit.action));
        match left {
            Some((aside, life)) => self.look_again(&aside, &life),
            None => Ok(()),
        }
    }

    fn note(&self, what: &str) {
        self.rig.note(self.file, what);
    }

    fn took(&self, began: Instant) {
        self.note(&format!("the file is ours after {} ms", began.elapsed().as_millis()));
    }

    /// Says that the file has changed, and stays for a while: it must remain as it was left.
    fn stay(&self, taken: &Taken, visit: &Visit) -> io::Result<()> {
        self.crowd.tell(&Told::Rewritten { file: self.file });
        let expected = &taken.life.base;
        for when in ["after the release", "a while after the release"] {
            let found = check_still(expected, &content(&taken.file)?);
            self.rig.judge(self.file, when, found);
            self.rig.pause(visit.stay);
        }
        let found = check_still(expected, &content(&taken.file)?);
        self.rig.judge(self.file, "long after the release", found);
        Ok(())
    }

    /// Takes the file, and looks whether everything is there that must be.
    fn take(&self, options: &OpenOptions) -> io::Result<(File, Vec<u8>)> {
        let began = Instant::now();
        let file = options.open(&self.path)?;
        self.took(began);
        let found = content(&file)?;
        self.rig.judge(self.file, "at the release", self.rig.life(self.file).check(&found));
        Ok((file, found))
    }

    fn read(&self) -> io::Result<Taken> {
        let (file, found) = self.take(OpenOptions::new().read(true))?;
        // It lives on: what clients wrote still counts.
        let number = self.rig.life(self.file).number;
        Ok(Taken { file, life: Life::after(self.file, number, found) })
    }

    /// Changes a part, and keeps the rest.
    fn rewrite(
        &self,
        part: &Range<u32>,
        change: fn(&File, &Range<u32>) -> io::Result<()>,
    ) -> io::Result<Taken> {
        let (file, mut base) = self.take(OpenOptions::new().read(true).write(true))?;
        change(&file, part)?;
        let number = self.rig.next_life();
        for blocks in [0..1, part.clone()] {
            let bytes = local_bytes(self.file, number, blocks.clone());
            let start = blocks.start as usize * BLOCK;
            write_all(&file, &bytes, start as u64)?;
            base[start..start + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(self.begin(file, Life::after(self.file, number, base)))
    }

    /// Opens the file, or makes it, and writes all of it.
    fn write_anew(&self, options: &mut OpenOptions) -> io::Result<Taken> {
        let life = Life::fresh(self.file, self.rig.next_life());
        let began = Instant::now();
        let file = with_room(|| options.read(true).write(true).open(&self.path))?;
        self.took(began);
        write_all(&file, &life.base, 0)?;
        Ok(self.begin(file, life))
    }

    fn rename_over(&self) -> io::Result<Taken> {
        let life = Life::fresh(self.file, self.rig.next_life());
        let other = self.path.with_extension("other");
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let file = with_room(|| options.open(&other))?;
        write_all(&file, &life.base, 0)?;
        let began = Instant::now();
        std::fs::rename(&other, &self.path)?;
        self.took(began);
        Ok(self.begin(file, life))
    }

    fn begin(&self, file: File, life: Life) -> Taken {
        self.note(&format!("life {} begins", life.number));
        self.rig.begin_life(life.clone());
        Taken { file, life }
    }

    /// A file that was renamed holds what it held, whoever has its name now.
    fn look_again(&self, aside: &Path, life: &Life) -> io::Result<()> {
        let file = File::open(aside)?;
        let found = content(&file)?;
        self.rig.judge(self.file, "renamed away", life.check(&found));
        remove(aside)
    }
}

fn cut(file: &File, part: &Range<u32>) -> io::Result<()> {
    file.set_len(u64::from(part.start) * BLOCK as u64)?;
    file.set_len(FILE as u64)
}

fn punch(file: &File, part: &Range<u32>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let block = BLOCK as u64;
    Ok(fallocate(file, flags, u64::from(part.start) * block, part.len() as u64 * block)?)
}

/// Reads a file by CPU loads.
fn content(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

fn write_all(file: &File, bytes: &[u8], start: u64) -> io::Result<()> {
    with_room(|| file.write_all_at(bytes, start))
}

/// Tries again while the file system is full.
fn with_room<T>(mut work: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let give_up = Instant::now() + FULL;
    loop {
        match work() {
            Err(error)
                if error.kind() == io::ErrorKind::StorageFull && Instant::now() < give_up =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}
