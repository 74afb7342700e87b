//! The command line.

use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueHint};
use pinfold_client::RdmaDevice;

use crate::exit;

/// Pins files of a storage host and writes them by one-sided RDMA.
#[derive(Debug, Parser)]
#[command(name = "pinfold", version, after_help = exit::HELP, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) connection: Connection,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to reach the server.
#[derive(Args, Debug)]
pub(crate) struct Connection {
    /// The server's address
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "PINFOLD_SERVER",
        default_value = "http://127.0.0.1:7350"
    )]
    pub(crate) server: String,

    /// The RDMA device of this host; auto: the first one with an active port
    #[arg(
        long,
        global = true,
        value_name = "NAME|auto",
        default_value = "auto",
        value_parser = parse_device
    )]
    pub(crate) rdma_device: RdmaDevice,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy a local file to the storage host, durably
    #[command(after_help = "Example:\n  pinfold put app.log data/logs/app.log\n\nThe file on the \
        host is made, or resized, to have exactly the bytes of LOCAL. It is pinned, written by \
        one-sided RDMA, committed and unpinned: when the command succeeds, the bytes survive \
        power loss.")]
    Put(Put),

    /// Pin a file and show the grant
    #[command(after_help = "Examples:\n  pinfold pin data/log\n  pinfold pin data/log --range \
        1M..2M --read-only\n  pinfold pin data/log --hold     # then, on the host: truncate -s 0 \
        …/log\n\nWith --hold the pin is kept until Ctrl-C or until the host's file system wants \
        the file back; then the steps of the revocation are drawn to scale, and the exit code \
        is 7.")]
    Pin(Pin),

    /// Show what the server knows about a file; opens nothing, so it disturbs nobody
    #[command(after_help = "Example:\n  pinfold stat data/log --json")]
    Stat(Stat),
}

#[derive(Args, Debug)]
pub(crate) struct Put {
    /// The file to copy
    #[arg(value_hint = ValueHint::FilePath)]
    pub(crate) local: PathBuf,

    /// Where to: an export of the server and a path in it
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,

    /// Bytes per request, rounded up to whole pages
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_chunk)]
    pub(crate) chunk: usize,

    /// Requests in flight at a time
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=256)
    )]
    pub(crate) window: u32,
}

#[derive(Args, Debug)]
pub(crate) struct Pin {
    /// The file to pin
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// The bytes to pin; suffixes K, M and G are powers of 1024, and either side may be left out
    #[arg(long, value_name = "START..END")]
    pub(crate) range: Option<RangeArg>,

    /// Pin for reading only
    #[arg(long)]
    pub(crate) read_only: bool,

    /// Keep the pin until Ctrl-C or until it is taken back
    #[arg(long)]
    pub(crate) hold: bool,

    /// Print one JSON object per line: the grant, then each event
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Stat {
    /// The file to look at
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// A file of an export.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct FileArg {
    pub(crate) export: String,
    pub(crate) path: String,
}

/// A range as it was written: a side that is left out is the file's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct RangeArg {
    pub(crate) start: Option<u64>,
    pub(crate) end: Option<u64>,
}

impl RangeArg {
    /// Whether it takes the file's size to know it.
    pub(crate) fn needs_size(self) -> bool {
        self.end.is_none() && self.start.is_some()
    }

    /// The bytes to ask for; `None`: the whole file. An empty or reversed range is asked for as it
    /// is: the server has the say, and the precise words.
    pub(crate) fn resolve(self, size: u64) -> Option<Range<u64>> {
        if self.start.is_none() && self.end.is_none() {
            return None;
        }
        Some(Range { start: self.start.unwrap_or(0), end: self.end.unwrap_or(size) })
    }
}

impl std::fmt::Display for FileArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.export, self.path)
    }
}

impl FromStr for FileArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('/') {
            Some((export, path)) if !export.is_empty() && !path.is_empty() => {
                Ok(Self { export: export.to_owned(), path: path.to_owned() })
            }
            _ => Err("write EXPORT/PATH, such as data/logs/app.log".to_owned()),
        }
    }
}

impl FromStr for RangeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (start, end) = text.split_once("..").ok_or("write START..END, such as 1M..2M")?;
        let side = |text: &str| match text {
            "" => Ok(None),
            _ => parse_size(text).map(Some),
        };
        Ok(Self { start: side(start)?, end: side(end)? })
    }
}

fn parse_size(text: &str) -> Result<u64, String> {
    let unsuffixed = text.strip_suffix(['K', 'k', 'M', 'm', 'G', 'g']).unwrap_or(text);
    let unit: u64 = match text[unsuffixed.len()..].to_ascii_uppercase().as_str() {
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => 1,
    };
    let number: u64 = unsuffixed
        .parse()
        .map_err(|_| format!("{text:?} is no size; write a number, with K, M or G if you like"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is too large"))
}

fn parse_chunk(text: &str) -> Result<usize, String> {
    const LARGEST: u64 = 1 << 30;
    match parse_size(text)? {
        0 => Err("a request has at least one byte".to_owned()),
        size if size > LARGEST => Err("a request has at most 1G".to_owned()),
        size => Ok(size as usize),
    }
}

fn parse_device(name: &str) -> Result<RdmaDevice, String> {
    match name {
        "" => Err("name a device, or write auto".to_owned()),
        "auto" => Ok(RdmaDevice::Auto),
        _ => Ok(RdmaDevice::Named(name.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("17"), Ok(17));
        assert_eq!(parse_size("4K"), Ok(4096));
        assert_eq!(parse_size("2m"), Ok(2 << 20));
        assert_eq!(parse_size("3G"), Ok(3 << 30));
        for wrong in ["", "K", "-1", "1.5M", "1T", "1KK", "ü", "99999999999G"] {
            assert!(parse_size(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn ranges_may_be_open_empty_or_reversed() {
        let resolve = |text: &str| text.parse::<RangeArg>().unwrap().resolve(1000);
        assert_eq!(resolve(".."), None);
        assert_eq!(resolve("1K..2K"), Some(1024..2048));
        assert_eq!(resolve("..2K"), Some(0..2048));
        assert_eq!(resolve("10.."), Some(10..1000));
        assert_eq!(resolve("7..7"), Some(7..7));
        assert_eq!(resolve("8..7"), Some(Range { start: 8, end: 7 }));
        assert!("7".parse::<RangeArg>().is_err());
        assert!("a..b".parse::<RangeArg>().is_err());
    }

    #[test]
    fn a_file_is_an_export_and_a_path() {
        let file: FileArg = "data/logs/app.log".parse().unwrap();
        assert_eq!((file.export.as_str(), file.path.as_str()), ("data", "logs/app.log"));
        assert_eq!(file.to_string(), "data/logs/app.log");
        // Not resolved here: the server knows what leaves an export.
        assert_eq!("data//etc/passwd".parse::<FileArg>().unwrap().path, "/etc/passwd");
        for wrong in ["", "data", "data/", "/log"] {
            assert!(wrong.parse::<FileArg>().is_err(), "{wrong:?}");
        }
    }
}
