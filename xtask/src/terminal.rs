//! The caller's terminal, lent to the guest's shell.

use std::io::{IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// A terminal in raw mode: every key goes to the guest. Dropping it puts it back.
pub(crate) struct Raw(Termios);

impl Raw {
    fn new() -> Result<Raw> {
        let before = tcgetattr(std::io::stdin()).context("cannot read the terminal's mode")?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).context("cannot set raw mode")?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.0) {
            eprintln!("lab: the terminal keeps raw mode ({error}): type `reset`");
        }
    }
}

/// Whether somebody can type.
pub(crate) fn is_there() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Connects the terminal with the guest's until the guest is gone.
pub(crate) fn attach(guest: UnixStream) -> Result<Raw> {
    let raw = Raw::new()?;
    let to_guest = guest.try_clone()?;
    thread::spawn(move || copy(std::io::stdin(), to_guest));
    thread::spawn(move || copy(guest, std::io::stdout()));
    Ok(raw)
}

/// Rows and columns; 24 by 80 where the terminal does not say.
pub(crate) fn size() -> (u32, u32) {
    let output = Command::new("stty").arg("size").stdin(std::process::Stdio::inherit()).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.ok().and_then(|text| parse_size(&text)).unwrap_or((24, 80))
}

fn parse_size(text: &str) -> Option<(u32, u32)> {
    let (rows, columns) = text.trim().split_once(' ')?;
    let (rows, columns) = (rows.parse().ok()?, columns.parse().ok()?);
    (rows > 0 && columns > 0).then_some((rows, columns))
}

/// Byte by byte as they come; either end may vanish at any time, which is the end.
fn copy(mut from: impl Read, mut to: impl Write) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_of_nothing_is_no_size() {
        assert_eq!(parse_size("48 120\n"), Some((48, 120)));
        assert_eq!(parse_size("0 0\n"), None);
        assert_eq!(parse_size(""), None);
    }
}
