//! `pinfoldd doctor`: what this host and the directories and DAX devices on it are good for, and why not.
//!
//! `host`, `directory` and `device` each hold facts, how they are found, and what they mean: the meaning is
//! pure, so that it can be tried with facts of other hosts. The devices are `verbs`' part. Whatever
//! is tried on a file system is tried on a file of the doctor's own, which has no name any more.

mod device;
mod directory;
mod host;
mod trial;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use pinfold_verbs::checkup::{self, Finding, Verdict};
use serde::Serialize;

use crate::fabric::Fabric;

/// The exit code if a directory, or this host, can't be served: the same number as `pinfold` has for
/// what a server can't do.
pub const EXIT_UNFIT: u8 = 5;

/// The arguments of `pinfoldd doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  pinfoldd doctor /mnt/pmem0/logs\n  pinfoldd doctor --json \
    /mnt/pmem0 | jq '.findings[] | select(.result != \"ok\")'\n\nRun it as the user that serves. It \
    opens no file of others: what it tries, it tries on a temporary file of its own in DIR, which \
    has no name while it is tried; of a DAX device no byte is touched.\n\nExit codes: 0 if all that was named can be served, 2 for bad \
    arguments, 5 if a DIR or this host can't be served, 1 if the report could not be written.")]
pub struct Args {
    /// Directories and DAX devices to export; without one, only the host is looked at
    #[arg(value_name = "DIR")]
    directories: Vec<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    /// The worst finding.
    result: Verdict,
    /// Whether all that was named can be served.
    servable: bool,
    directories: Vec<String>,
    findings: Vec<Finding>,
}

/// Looks, reports, and gives the exit code. Blocks for some seconds.
pub fn run(args: &Args) -> io::Result<u8> {
    let report = Report::make(args);
    let text = if args.json { report.json()? } else { report.text() };
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush())?;
    Ok(if report.servable { 0 } else { EXIT_UNFIT })
}

impl Report {
    fn make(args: &Args) -> Self {
        let mut findings = host::examine();
        let (of_devices, devices) = checkup::examine();
        findings.extend(of_devices);
        let fabrics: Vec<Fabric> = devices.into_iter().map(Fabric::examined).collect();
        for directory in &args.directories {
            findings.extend(match device::is_device(directory) {
                true => device::examine(directory, &fabrics),
                false => directory::examine(directory, &fabrics),
            });
        }
        let shown = |path: &PathBuf| path.display().to_string();
        let directories: Vec<_> = args.directories.iter().map(shown).collect();
        let servable = servable(&findings, &directories);
        Self { result: checkup::worst(&findings), servable, directories, findings }
    }

    fn json(&self) -> io::Result<String> {
        Ok(serde_json::to_string(self)? + "\n")
    }

    fn text(&self) -> String {
        let mut text = checkup::draw(&self.findings, colours_wanted());
        text += match (self.directories.is_empty(), self.servable) {
            (true, true) => {
                "\nonly the host was looked at: `pinfoldd doctor DIR` looks at a directory to \
                 export\n"
            }
            (true, false) => "\nthis host can't serve files\n",
            (false, true) => "\nall of it can be served\n",
            (false, false) => "\nnot all of it can be served: see what is missing\n",
        };
        text
    }
}

/// A missing RDMA device leaves the stream path; what is missing of a directory or of the kernel's
/// guards leaves nothing.
fn servable(findings: &[Finding], directories: &[String]) -> bool {
    let essential = |finding: &&Finding| {
        directories.contains(&finding.subject) || host::ESSENTIAL.contains(&finding.check)
    };
    findings.iter().filter(essential).all(|finding| finding.result != Verdict::Missing)
}

/// Colours are for terminals, and for who wants them (<https://no-color.org>).
fn colours_wanted() -> bool {
    let set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    io::stdout().is_terminal() && !set("NO_COLOR") && !dumb
}

/// `4096`, `2 MiB`, `17.5 GiB`.
fn bytes(count: u64) -> String {
    const UNITS: [(u64, &str); 4] =
        [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    match UNITS.into_iter().find(|(unit, _)| count >= *unit) {
        Some((unit, name)) if count.is_multiple_of(unit) => format!("{} {name}", count / unit),
        Some((unit, name)) => format!("{:.1} {name}", count as f64 / unit as f64),
        None => format!("{count} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_no_reason_not_to_serve() {
        let of = |finding: Finding| servable(&[finding], &["/data".to_owned()]);
        assert!(of(Finding::missing("rdma_devices", "none", "")));
        assert!(of(Finding::missing("port", "down", "").about("rxe0")));
        assert!(of(Finding::limited("guard", "lease", "").about("/data")));
        assert!(!of(Finding::missing("guard", "none", "").about("/data")));
        assert!(!of(Finding::missing("guards", "none", "")));
        assert!(!of(Finding::missing("leases_enable", "0", "")));
    }

    #[test]
    fn sizes_are_told_in_whole_units_where_they_are() {
        assert_eq!(bytes(4095), "4.0 KiB");
        assert_eq!(bytes(8 << 20), "8 MiB");
        assert_eq!(bytes((17 << 30) + (1 << 29)), "17.5 GiB");
        assert_eq!(bytes(12), "12 bytes");
    }
}
