//! Which pages of a DAX file the kernel writes back: flushes out of the processor's caches, to the
//! medium.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::trace::Trace;

const EVENT: &str = "dax_writeback_one";

/// Notes each page of one file that is written back, from `dax_writeback_one` in `fs/dax.c`, by its
/// tracepoint; until it is dropped.
#[derive(Debug)]
pub struct WriteBacks {
    trace: Trace,
    inode: String,
}

impl WriteBacks {
    /// Of this file.
    pub fn of(file: &Path) -> Self {
        let number = std::fs::metadata(file).unwrap().ino();
        let trace = Trace::start(&number.to_string(), &[&format!("fs_dax/{EVENT}")]);
        Self { trace, inode: format!("ino {number:#x}") }
    }

    /// The pages since the last time, by their number in the file.
    pub fn take(&self) -> BTreeSet<u64> {
        let trace = self.trace.take();
        let ours = trace.lines().filter(|line| {
            line.contains(EVENT) && line.split_once(&self.inode).is_some_and(is_whole_word)
        });
        ours.flat_map(|line| {
            let (first, count) = (number(line, "pgoff "), number(line, "pglen "));
            first..first + count
        })
        .collect()
    }
}

fn is_whole_word((_, rest): (&str, &str)) -> bool {
    rest.starts_with(' ')
}

/// The hexadecimal number behind these words.
fn number(line: &str, words: &str) -> u64 {
    let text = line.split_once(words).unwrap_or_else(|| panic!("no {words} in {line}")).1;
    let text = text.split_whitespace().next().unwrap_or_default();
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|_| panic!("{line}"))
}
