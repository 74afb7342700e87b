//! What the output goes to.

use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::AsFd;
use std::time::Duration;

use indicatif::ProgressBar;
use pinfold_cli::timeline::Look;

use crate::failure::Failure;

const TICK: Duration = Duration::from_millis(120);

/// For a pipe or a file: as wide as most terminals are at least.
const DEFAULT_WIDTH: usize = 80;

/// Prints to standard output.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|source| Failure::local("cannot write to standard output", source))
}

/// Prints a value as one line of JSON.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let line = serde_json::to_string(value).map_err(io::Error::from);
    print(&(line.map_err(|source| Failure::local("cannot write JSON", source))? + "\n"))
}

/// Says something to the person at the terminal that is no output of the command.
pub(crate) fn note(text: &str) -> Result<(), Failure> {
    let written = io::stderr().write_all(text.as_bytes());
    written.map_err(|source| Failure::local("cannot write to standard error", source))
}

/// The same as one line of JSON.
pub(crate) fn note_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let line = serde_json::to_string(value).map_err(io::Error::from);
    note(&(line.map_err(|source| Failure::local("cannot write JSON", source))? + "\n"))
}

/// Turns while something takes its time, on standard error, and only if that is a terminal.
pub(crate) fn spinner(doing: String, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner().with_message(doing);
    spinner.enable_steady_tick(TICK);
    spinner
}

/// Whether standard output shows what is drawn for people.
pub(crate) fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// How to draw on standard output.
pub(crate) fn look() -> Look {
    let out = io::stdout();
    let terminal = out.is_terminal();
    let width = rustix::termios::tcgetwinsize(out.as_fd()).map_or(0, |size| size.ws_col.into());
    Look {
        width: if terminal && width > 0 { width } else { DEFAULT_WIDTH },
        colour: terminal && colours_wanted(),
    }
}

/// <https://no-color.org>
fn colours_wanted() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}
