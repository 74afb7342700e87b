//! The command line.

use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use pinfold_client::{RdmaDevice, Transport};

use crate::exit::{self, Exit};
use crate::failure::Failure;
use crate::size::{NewSize, parse_size};

/// The options that all commands have.
const CONNECTION: &str = "Connection";

/// Pins files of a storage host, and writes and reads them by one-sided RDMA, or by gRPC where there
/// is none.
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
        default_value = "http://127.0.0.1:7350",
        help_heading = CONNECTION
    )]
    pub(crate) server: String,

    /// The RDMA device of this host; auto: the first one with an active port
    #[arg(
        long,
        global = true,
        value_name = "NAME|auto",
        default_value = "auto",
        value_parser = parse_device,
        help_heading = CONNECTION
    )]
    pub(crate) rdma_device: RdmaDevice,

    /// How the bytes of put, get and pin travel: by RDMA or not at all, by gRPC without a device, or
    /// by RDMA where it can be and else by gRPC
    #[arg(
        long,
        global = true,
        value_name = "HOW",
        default_value = "auto",
        help_heading = CONNECTION
    )]
    pub(crate) transport: TransportArg,
}

/// How bytes are to travel. The help of the option says what each is.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum TransportArg {
    Auto,
    Rdma,
    Stream,
}

impl From<TransportArg> for Transport {
    fn from(choice: TransportArg) -> Self {
        match choice {
            TransportArg::Auto => Self::Auto,
            TransportArg::Rdma => Self::Rdma,
            TransportArg::Stream => Self::Stream,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Copy a local file or folder to the storage host, durably
    #[command(after_help = "Examples:\n  pinfold put app.log data/logs/app.log\n  pinfold put \
        app.log data/logs/app.log --transport stream --json\n  pinfold put -r /var/lib/app data/app \
        --parallel 8 --verify\n  pinfold put image.raw data/image.raw --resume     # after one that was \
        interrupted\n\nThe file on the host is made, or \
        resized, to have exactly the bytes of LOCAL. It is pinned, written (by one-sided RDMA \
        where both hosts have a device, else by gRPC), committed and unpinned: when the command \
        succeeds, the bytes survive power loss. Holes of LOCAL are not carried: they are allocated \
        zeroes there. Modes, owners and times are not carried. Nobody else may have the file pinned \
        meanwhile (exit code 6). If LOCAL changes meanwhile, the exit code is 12.\n\nWith -r the \
        folder EXPORT/PATH has all that LOCAL has in the end, empty folders too; what else it had stays. Symbolic links and \
        special files in LOCAL are left out and named. A file that fails holds up no other: it is named, \
        and the exit code is 13.\n\n--resume takes nothing for granted: what is on the host is compared \
        with LOCAL, 1 MiB at a time, by a checksum that the server's processor makes, and only what \
        differs is carried. A server that can't do that is written to from the start, and the report says \
        so.\n\n--verify proves that the file on the host, as that host's processor reads it after the \
        commit, has the bytes that LOCAL has when it is read a second time; if not, the exit code is \
        12. It does not prove what the medium keeps: that is what the commit is for.")]
    Put(Put),

    /// Copy a file or folder of the storage host to a local one
    #[command(after_help = "Examples:\n  pinfold get data/logs/app.log app.log\n  pinfold get \
        data/logs/app.log - | grep panic\n  pinfold get -r data/app /srv/app --verify\n  pinfold get \
        data/image.raw image.raw --resume\n\nThe file is pinned for reading, so that nobody cuts it \
        meanwhile unnoticed. LOCAL is replaced at once when all bytes are there and durable: \
        if the command fails, it is what it was before. With - the report goes to standard error. Where \
        64 KiB are zero, LOCAL has a hole. Modes, owners and times are not carried.\n\nWith -r the \
        folder LOCAL has all that EXPORT/PATH has in the end, empty folders too; what else it had stays. \
        What is no file and no folder is left out and named. A file that fails holds up no other: it is \
        named, and the exit code is 13.\n\nWith --resume what has come is kept in .NAME.pinfold-partial \
        beside LOCAL if the command fails or is interrupted, and the next one with --resume goes on \
        there: what is in it, or in a LOCAL of the same size, is compared with the file on the host, 1 MiB \
        at a time, by a checksum that the server's processor makes, and only what differs is \
        carried.\n\n--verify proves that the local file, read a second time, has the bytes that the file \
        on the host has, as that host's processor reads it; if not, LOCAL is what it was, and the exit \
        code is 12.")]
    Get(Get),

    /// List exports, or a folder of one; opens nothing, so it disturbs nobody
    #[command(
        after_help = "Examples:\n  pinfold ls\n  pinfold ls data/logs -l\n  pinfold ls data \
        --json | jq -r '.entries[] | select(.pins > 0).name'"
    )]
    Ls(Ls),

    /// Show what the server knows about a file; opens nothing, so it disturbs nobody
    #[command(after_help = "Example:\n  pinfold stat data/log --json")]
    Stat(Stat),

    /// Pin a file and show the grant
    #[command(after_help = "Examples:\n  pinfold pin data/log\n  pinfold pin data/log --range \
        1M..2M --read-only\n  pinfold pin data/log --hold     # then, on the host: : > \
        …/log\n  pinfold pin data/log --keep --json | jq .event\n  pinfold pin data/log --exclusive \
        --steal --hold\n\nWith --hold the pin is held \
        until Ctrl-C or until the host's file system wants the file back; then the steps of the \
        revocation are drawn to scale, and the exit code is 7. With --keep it is pinned again \
        after that, and after the server has gone away, until Ctrl-C: each interruption and each \
        new grant is shown. If the file is another one by then, or shorter, or a local process has \
        changed its bytes, the exit code is 7. With \
        --steal all pins of the file are taken back first, and the generation of the new grant is a \
        fencing token.")]
    Pin(Pin),

    /// Show who holds which files now
    #[command(after_help = "Examples:\n  pinfold ps\n  pinfold ps --json | jq '.files[].path'")]
    Ps(Ps),

    /// Tell of each revocation as it happens
    #[command(after_help = "Examples:\n  pinfold watch\n  pinfold watch data/log --count 1 \
        --json\n\nOne line per revocation, told when it is complete; on a terminal its steps are \
        drawn to scale. With EXPORT/PATH only those of that file: the server tells paths of its \
        own, of which the end has to be PATH.")]
    Watch(Watch),

    /// Remove a file from the storage host
    #[command(after_help = "Examples:\n  pinfold rm data/log\n  pinfold rm data/log --revoke\n\n\
        A file that is pinned is refused with exit code 6, unless its pins are to be revoked.")]
    Rm(Rm),

    /// Make a file longer; what is added is allocated and reads as zeroes, and pins stay
    #[command(
        after_help = "Examples:\n  pinfold grow data/log 64M     # to 64 MiB\n  pinfold grow \
        data/log +1M     # by 1 MiB"
    )]
    Grow(Grow),

    /// Make a file shorter; its pins are revoked first, with notice
    #[command(after_help = "Example:\n  pinfold shrink data/log 1M     # to 1 MiB")]
    Shrink(Shrink),

    /// Take all pins of a file back, with notice
    #[command(
        after_help = "Example:\n  pinfold revoke data/log\n\nThe clients are told to finish \
        what is in flight, then their keys die and the file is let go. Clients that keep their pins \
        (`pinfold pin --keep`) pin it again at once: `pinfold quiesce` keeps them away."
    )]
    Revoke(Revoke),

    /// Let go of an export, so that its file system can be frozen, snapshotted or unmounted
    #[command(
        after_help = "Example:\n  pinfold quiesce data && fsfreeze -f /mnt/pmem0     # then: \
        fsfreeze -u /mnt/pmem0 && pinfold resume data\n\nAll pins of its files are taken back, with \
        notice, and the server closes everything of it, the folder too. Until `pinfold resume` what \
        names the export is refused with exit code 6; clients that keep their pins, or wait for them, \
        come back by themselves. It does not outlive the server."
    )]
    Quiesce(Quiesce),

    /// Serve a quiesced export again
    #[command(
        after_help = "Example:\n  pinfold resume data\n\nThe export must be the folder that \
        it was: while its file system is not mounted the exit code is 4 or 7."
    )]
    Resume(Resume),

    /// Tell what this host's devices and the server are good for, and why not
    #[command(after_help = "Examples:\n  pinfold doctor --server http://storage:7350\n  pinfold \
        doctor --json | jq '.findings[] | select(.result != \"ok\")'\n\nIt tests each RDMA device \
        in a loop with itself, and connects to the server. The exit code is 3 if the server can't \
        be reached, and 8 if there is no RDMA to it although --transport rdma or --rdma-device \
        NAME asks for it. `pinfoldd doctor DIR` is the server's side.")]
    Doctor(Doctor),

    /// Print a completion script for a shell
    #[command(after_help = "Examples:\n  pinfold completions bash > \
        /etc/bash_completion.d/pinfold\n  pinfold completions zsh > \
        ~/.zfunc/_pinfold\n  pinfold completions fish > \
        ~/.config/fish/completions/pinfold.fish")]
    Completions(Completions),

    /// Print the manual page, or write one page for each command
    #[command(after_help = "Examples:\n  pinfold man | man -l -\n  pinfold man --dir \
        /usr/local/share/man/man1")]
    Man(Man),
}

// No documentation: it would become that of the commands.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Requests {
    /// Bytes per request, rounded up to whole pages
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_chunk)]
    pub(crate) chunk: usize,

    /// Requests in flight at a time, for each file
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=256)
    )]
    pub(crate) window: u32,
}

// No documentation either.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Copying {
    /// Copy a folder with all that is in it
    #[arg(short, long)]
    pub(crate) recursive: bool,

    /// With -r: so many files at a time
    #[arg(
        long,
        value_name = "N",
        default_value_t = 4,
        value_parser = clap::value_parser!(u32).range(1..=64)
    )]
    pub(crate) parallel: u32,

    /// Carry only what is not there yet, as the server's checksums tell: goes on where a copy that was
    /// interrupted or failed has ended. For get also: keep what has come if it fails
    #[arg(long)]
    pub(crate) resume: bool,

    /// At the end read both files again, each on its own host, and compare their checksums (BLAKE3 of
    /// each 1 MiB)
    #[arg(long)]
    pub(crate) verify: bool,

    /// If a process of the storage host has a file open, or the export is quiesced, wait so long until
    /// it is free
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait: u32,

    /// Print one JSON object; with -r one for each file, and one for all
    #[arg(long)]
    pub(crate) json: bool,

    #[command(flatten)]
    pub(crate) requests: Requests,
}

#[derive(Args, Debug)]
pub(crate) struct Put {
    /// The file to copy; with -r: the folder
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) local: PathBuf,

    /// Where to: an export of the server and a path in it; with -r: the folder that is to have what
    /// LOCAL has, or an export
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) remote: PlaceArg,

    #[command(flatten)]
    pub(crate) how: Copying,
}

#[derive(Args, Debug)]
pub(crate) struct Get {
    /// The file to copy; with -r: the folder, or an export
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) remote: PlaceArg,

    /// Where to; -: standard output; with -r: the folder that is to have what EXPORT/PATH has
    #[arg(value_hint = ValueHint::AnyPath)]
    pub(crate) local: PathBuf,

    #[command(flatten)]
    pub(crate) how: Copying,
}

#[derive(Args, Debug)]
pub(crate) struct Ls {
    /// The folder to list; nothing: the exports
    #[arg(value_name = "EXPORT[/PATH]")]
    pub(crate) folder: Option<FolderArg>,

    /// Show sizes, storage and pins too
    #[arg(short, long)]
    pub(crate) long: bool,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Ps {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Watch {
    /// Tell of this file only
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: Option<FileArg>,

    /// Print one JSON object per line
    #[arg(long)]
    pub(crate) json: bool,

    /// End after this many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

#[derive(Args, Debug)]
pub(crate) struct Rm {
    /// The file to remove
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// Take its pins back first, with notice, instead of refusing
    #[arg(long)]
    pub(crate) revoke: bool,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Grow {
    /// The file to make longer
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// The size to have, or +SIZE to add; suffixes K, M and G are powers of 1024
    #[arg(value_name = "[+]SIZE")]
    pub(crate) size: NewSize,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Shrink {
    /// The file to make shorter
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// The size to have; suffixes K, M and G are powers of 1024
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: u64,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Revoke {
    /// The file whose pins to take back
    #[arg(value_name = "EXPORT/PATH")]
    pub(crate) file: FileArg,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Quiesce {
    /// The export to let go of
    pub(crate) export: String,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Resume {
    /// The export to serve again
    pub(crate) export: String,

    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Doctor {
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Args, Debug)]
pub(crate) struct Man {
    /// Write pinfold.1 and one page per command to this folder
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub(crate) dir: Option<PathBuf>,
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

    /// Let nobody else pin these bytes; refused if somebody has, unless with --steal
    #[arg(long)]
    pub(crate) exclusive: bool,

    /// With --exclusive: take the file's pins back first, whoever has them, with notice
    #[arg(long, requires = "exclusive")]
    pub(crate) steal: bool,

    /// Reach up to this byte when the file grows; +SIZE: that far past its end
    #[arg(long, value_name = "[+]SIZE")]
    pub(crate) reserve: Option<NewSize>,

    /// If a process of the storage host has the file open, or the export is quiesced, wait so long until
    /// it is free
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub(crate) wait: u32,

    /// Hold the pin until Ctrl-C or until it is taken back
    #[arg(long)]
    pub(crate) hold: bool,

    /// Keep the pin until Ctrl-C: pin again when it is taken back or when the server has gone away
    #[arg(long, conflicts_with = "hold")]
    pub(crate) keep: bool,

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

/// What is copied from or to: a file, or with -r a folder or an export. As it was written.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct PlaceArg(String);

impl PlaceArg {
    /// Taken for a file.
    pub(crate) fn file(&self) -> Result<FileArg, Failure> {
        self.0.parse().map_err(|why: String| {
            Failure::new(Exit::Usage, format!("{:?} names no file: {why}", self.0))
                .or_hint("a folder is copied with -r")
        })
    }

    /// Taken for a folder.
    pub(crate) fn folder(&self) -> Result<FolderArg, Failure> {
        self.0.parse().map_err(|why: String| Failure::new(Exit::Usage, why))
    }
}

impl FromStr for PlaceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<FolderArg>().map(|_| Self(text.to_owned()))
    }
}

/// An export, or a folder in it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct FolderArg {
    pub(crate) export: String,
    /// Empty: the export itself.
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

impl FolderArg {
    /// A file or folder beneath it.
    pub(crate) fn join(&self, path: &str) -> FileArg {
        let path = match self.path.as_str() {
            "" => path.to_owned(),
            folder => format!("{folder}/{path}"),
        };
        FileArg { export: self.export.clone(), path }
    }
}

impl std::fmt::Display for FolderArg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.export),
            path => write!(f, "{}/{path}", self.export),
        }
    }
}

impl FromStr for FolderArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (export, path) = text.split_once('/').unwrap_or((text, ""));
        if export.is_empty() {
            return Err("write EXPORT or EXPORT/PATH, such as data/logs".to_owned());
        }
        // A folder may be written with its slash; the server takes none.
        Ok(Self { export: export.to_owned(), path: path.trim_end_matches('/').to_owned() })
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

    #[test]
    fn a_folder_may_be_an_export_and_end_in_a_slash() {
        for (text, export, path, shown) in [
            ("data", "data", "", "data"),
            ("data/", "data", "", "data"),
            ("data/logs", "data", "logs", "data/logs"),
            ("data/logs/old//", "data", "logs/old", "data/logs/old"),
        ] {
            let folder: FolderArg = text.parse().unwrap();
            assert_eq!((folder.export.as_str(), folder.path.as_str()), (export, path));
            assert_eq!(folder.to_string(), shown);
        }
        for wrong in ["", "/", "/logs"] {
            assert!(wrong.parse::<FolderArg>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn options_of_all_commands_go_before_and_after_the_command() {
        for line in [
            ["pinfold", "--transport", "stream", "stat", "data/x"],
            ["pinfold", "stat", "data/x", "--transport", "stream"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.connection.transport, TransportArg::Stream);
        }
    }

    #[test]
    fn every_command_and_every_argument_is_explained_and_every_command_has_an_example() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            assert!(command.get_about().is_some(), "{name}");
            let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(after.contains(&format!("  pinfold {name}")), "{name}: {after}");
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{name}: {argument}");
            }
        }
    }
}
