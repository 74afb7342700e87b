//! Other programs that take part: what we are compared with, and `pinfoldd`.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// A program that is told what to do line by line, and answers so; killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Peer {
    name: String,
    child: Child,
    /// Absent only at the end.
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// Starts one.
    pub(crate) fn start(program: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_with_log(program, arguments, Stdio::inherit())
    }

    /// Starts one that finds other things in its environment, too.
    pub(crate) fn start_with<'a>(
        program: &Path,
        arguments: &[&str],
        environment: impl IntoIterator<Item = (&'a str, &'a Path)>,
    ) -> Result<Self> {
        Self::spawn(Command::new(program).args(arguments).envs(environment))
    }

    /// Starts one whose log goes elsewhere than ours.
    pub(crate) fn start_with_log(
        program: &Path,
        arguments: &[&str],
        log: impl Into<Stdio>,
    ) -> Result<Self> {
        Self::spawn(Command::new(program).args(arguments).stderr(log))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{name} does not start; `cargo xtask bench` builds it"))?;
        let input = child.stdin.take().context("a peer without standard input")?;
        let output = child.stdout.take().context("a peer without standard output")?;
        Ok(Self { name, child, input: Some(input), output: BufReader::new(output) })
    }

    /// Tells it something.
    pub(crate) fn say(&mut self, line: &str) -> Result<()> {
        let gone = || format!("{} is gone", self.name);
        writeln!(self.input.as_mut().with_context(gone)?, "{line}").with_context(gone)
    }

    /// Has it end by itself, which it does when nobody tells it anything any more.
    pub(crate) fn end(mut self) -> Result<()> {
        drop(self.input.take());
        let status = self.child.wait()?;
        ensure!(status.success(), "{} ended with {status}", self.name);
        Ok(())
    }

    /// Its next line, without its first word, which must be this one.
    pub(crate) fn hear(&mut self, word: &str) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).with_context(|| format!("{} is gone", self.name))?;
        match line.trim_end().strip_prefix(word) {
            Some(rest) => Ok(rest.trim_start().to_owned()),
            None => bail!("{} was to say `{word}` and said `{}`", self.name, line.trim_end()),
        }
    }

    /// Has it do something, and gives what that took by its own clock.
    pub(crate) fn time(&mut self, line: &str) -> Result<Duration> {
        self.say(line)?;
        let took = self.hear("took")?;
        let nanoseconds = took.parse().with_context(|| format!("{} took `{took}`", self.name))?;
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Fails if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
