//! `pinfold watch`.

use std::path::Path;

use pinfold_cli::timeline::{self, Step};
use pinfold_client::{Breaker, RevocationRecord, Session};
use serde::Serialize;

use crate::args::{Connection, FileArg, Watch};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::table::printable;
use crate::taken_back::{TimingsReport, token, verdict};
use crate::{terminal, work};

#[derive(Serialize)]
struct Report {
    /// On the server.
    path: String,
    generation: String,
    reason: &'static str,
    pins: u32,
    sessions: u32,
    timings: TimingsReport,
    deregistered_us: u128,
    /// When the local process was through, as far as is known.
    through_us: u128,
    unmapped_us: u128,
    late_stream_writes: u32,
    /// Who was seen waiting for the file.
    breakers: Vec<BreakerReport>,
    /// Why a reader was not left to the kernel.
    not_outwaited: Option<String>,
}

#[derive(Serialize)]
struct BreakerReport {
    pid: u32,
    command: String,
}

/// Tells until it has told enough.
pub(crate) async fn run(connection: Connection, args: Watch) -> Result<(), Failure> {
    let server = connection.server.clone();
    work::by_control(connection, "nothing is watched any more", async |session| {
        watch(session, &server, &args).await
    })
    .await
}

async fn watch(session: &Session, server: &str, args: &Watch) -> Result<(), Failure> {
    if let Some(FileArg { export, path }) = &args.file {
        // One that is not there is a slip of the pen, and would be waited for in vain.
        session.stat(export, path).await?;
    }
    let mut records = session.watch().await?;
    if !args.json {
        let what = args.file.as_ref().map_or_else(|| server.to_owned(), ToString::to_string);
        terminal::note(&format!("watching {what}; Ctrl-C ends it\n"))?;
    }
    let mut told = 0;
    while let Some(record) = records.next().await {
        let record = record?;
        if !args.file.as_ref().is_none_or(|file| is_of(file, &record.path)) {
            continue;
        }
        tell(args, &record)?;
        told += 1;
        if Some(told) == args.count {
            return Ok(());
        }
    }
    Err(Failure::new(Exit::Unreachable, format!("{server} ended the watch: it is going down")))
}

/// The server tells paths of its own: which export they lie in can't be seen.
fn is_of(file: &FileArg, path: &str) -> bool {
    let asked = Path::new(&file.path);
    Path::new(path).ends_with(asked.strip_prefix(".").unwrap_or(asked))
}

fn tell(args: &Watch, record: &RevocationRecord) -> Result<(), Failure> {
    if args.json {
        return terminal::print_json(&Report::new(record));
    }
    terminal::print(&line(record))?;
    if terminal::is_terminal() {
        let picture = timeline::draw(&steps(record), terminal::look());
        terminal::print(&format!("\n{picture}\n"))?;
    }
    Ok(())
}

fn line(record: &RevocationRecord) -> String {
    let late = match record.late_stream_writes {
        0 => String::new(),
        late => format!("; {late} stream writes ended after the release"),
    };
    let not_outwaited = match &record.not_outwaited {
        None => String::new(),
        Some(why) => format!(", and is not left to the kernel: {}", printable(why)),
    };
    format!(
        "{}: {}{}{not_outwaited}; {} of {} taken back, fenced after {}, released after {}; {}{late}\n",
        printable(&record.path),
        record.reason,
        names(&record.breakers),
        counted(record.pins, "pin"),
        counted(record.sessions, "session"),
        timeline::figure(record.timings.fenced),
        timeline::figure(record.timings.released),
        verdict(record.reason, &record.timings),
    )
}

/// ` (find, process 4711)`; nothing if nobody was seen.
fn names(breakers: &[Breaker]) -> String {
    let name = |one: &Breaker| format!("{}, process {}", printable(&one.command), one.pid);
    let names: Vec<String> = breakers.iter().map(name).collect();
    if names.is_empty() { String::new() } else { format!(" ({})", names.join("; ")) }
}

fn counted(number: u32, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Those of the client's picture, and the clearing up behind them.
fn steps(record: &RevocationRecord) -> Vec<Step> {
    let mut steps = timeline::revocation(&record.timings);
    steps.push(Step::at("deregistered", record.deregistered));
    steps.push(Step::at("unmapped", record.unmapped));
    steps
}

impl Report {
    fn new(record: &RevocationRecord) -> Self {
        Self {
            path: record.path.clone(),
            generation: record.generation.to_string(),
            reason: token(record.reason),
            pins: record.pins,
            sessions: record.sessions,
            timings: TimingsReport::new(&record.timings),
            deregistered_us: record.deregistered.as_micros(),
            through_us: record.through.as_micros(),
            unmapped_us: record.unmapped.as_micros(),
            late_stream_writes: record.late_stream_writes,
            breakers: record.breakers.iter().map(BreakerReport::new).collect(),
            not_outwaited: record.not_outwaited.clone(),
        }
    }
}

impl BreakerReport {
    fn new(breaker: &Breaker) -> Self {
        Self { pid: breaker.pid, command: breaker.command.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pinfold_client::{Generation, RevocationReason, RevocationTimings};

    use super::*;

    fn record() -> RevocationRecord {
        RevocationRecord {
            path: "/srv/data/logs/a".to_owned(),
            generation: Generation { incarnation: 1, counter: 2 },
            reason: RevocationReason::LocalWriter,
            pins: 2,
            sessions: 1,
            timings: RevocationTimings {
                noticed: Duration::from_micros(210),
                drained: Some(Duration::from_micros(4_800)),
                fenced: Duration::from_micros(9_100),
                released: Duration::from_micros(9_400),
                break_pending_at_release: true,
            },
            deregistered: Duration::from_micros(9_500),
            through: Duration::from_micros(9_500),
            unmapped: Duration::from_micros(9_600),
            late_stream_writes: 0,
            breakers: Vec::new(),
            not_outwaited: None,
        }
    }

    #[test]
    fn a_revocation_is_one_line() {
        assert_eq!(
            line(&record()),
            "/srv/data/logs/a: a local process wants to change the file; 2 pins of 1 session taken \
             back, fenced after 9.10 ms, released after 9.40 ms; the file was let go in time for \
             a local process that waits for it\n",
        );
        let late = RevocationRecord { late_stream_writes: 3, ..record() };
        assert!(line(&late).ends_with("; 3 stream writes ended after the release\n"));
        let breakers = vec![Breaker { pid: 4711, command: "sh".to_owned() }];
        let seen = line(&RevocationRecord { breakers, ..record() });
        assert!(seen.contains("wants to change the file (sh, process 4711); 2 pins"), "{seen}");
        let not_outwaited = Some("it is 0".to_owned());
        let why = line(&RevocationRecord { not_outwaited, ..record() });
        assert!(why.contains("file, and is not left to the kernel: it is 0; 2 pins"), "{why}");
    }

    #[test]
    fn the_picture_ends_with_the_clearing_up() {
        let look = timeline::Look { width: 80, colour: false };
        let picture = timeline::draw(&steps(&record()), look);
        assert!(picture.lines().last().unwrap().starts_with("unmapped"), "{picture}");
    }

    #[test]
    fn a_file_is_known_by_the_end_of_its_path() {
        let is = |file: &str, path| is_of(&file.parse().unwrap(), path);
        assert!(is("data/logs/a", "/srv/data/logs/a"));
        assert!(is("data/a", "/srv/data/logs/a"));
        assert!(is("data/./logs/a", "/srv/data/logs/a"));
        assert!(!is("data/ogs/a", "/srv/data/logs/a"), "whole names only");
        assert!(!is("data/b", "/srv/data/logs/a"));
    }

    #[test]
    fn json_has_every_figure() {
        let json = serde_json::to_value(Report::new(&record())).unwrap();
        assert_eq!(json["reason"], "local_writer");
        assert_eq!(json["timings"]["drained_us"], 4_800);
        assert_eq!((&json["deregistered_us"], &json["unmapped_us"]), (&9500.into(), &9600.into()));
        assert_eq!(json["generation"], "0000000000000001.2");
        assert_eq!(json["not_outwaited"], serde_json::Value::Null);
        let not_outwaited = Some("it is 0".to_owned());
        let record = RevocationRecord { not_outwaited, ..record() };
        let json = serde_json::to_value(Report::new(&record)).unwrap();
        assert_eq!(json["not_outwaited"], "it is 0");
    }
}
