//! `pinfold ps`.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use pinfold_client::{
    BrokenFile, ExportInfo, FileInfo, FileState, GuardTier, Inspection, NameState, PinInfo,
    SessionInfo, Transport,
};
use serde::Serialize;

use crate::args::{Connection, Ps};
use crate::failure::Failure;
use crate::list::QuiescedReport;
use crate::table::{Align, Table, printable};
use crate::{terminal, work};

#[derive(Serialize)]
struct Report {
    sessions: Vec<SessionReport>,
    files: Vec<FileReport>,
    broken: Vec<BrokenReport>,
    /// Those that are not served for now.
    quiesced: Vec<ExportReport>,
    /// Kernel memory that the memory regions of all clients hold, and may hold.
    region_memory_bytes: u64,
    region_memory_bytes_max: u64,
}

#[derive(Serialize)]
struct ExportReport {
    export: String,
    #[serde(flatten)]
    quiesced: QuiescedReport,
}

#[derive(Serialize)]
struct SessionReport {
    session: u64,
    client: String,
    /// Whether it is the one of this command.
    yours: bool,
    pins: u32,
    /// Device of the server that it is connected to; null: none.
    rdma_device: Option<String>,
}

#[derive(Serialize)]
struct FileReport {
    /// On the server.
    path: String,
    generation: String,
    guard: String,
    state: &'static str,
    /// What has become of the name by which it was pinned; null: it names the file.
    name: Option<&'static str>,
    pins: Vec<PinReport>,
    /// How long the server takes to cut it off.
    revocation_cost_us: u128,
    region_memory_bytes: u64,
}

/// How often local processes have wanted a file back within the last ten minutes.
#[derive(Serialize)]
struct BrokenReport {
    /// On the server.
    path: String,
    breaks: u64,
    /// How many of them by which command.
    by: BTreeMap<String, u64>,
    last_ago_ms: u128,
}

#[derive(Serialize)]
struct PinReport {
    pin: u64,
    session: u64,
    /// Null: the session is over.
    client: Option<String>,
    start: u64,
    end: u64,
    access: String,
    exclusive: bool,
    transport: &'static str,
}

/// Looks, by gRPC alone.
pub(crate) async fn run(connection: Connection, args: Ps) -> Result<(), Failure> {
    let seen = work::by_control(connection, "nothing was changed", async |session| {
        Ok(session.inspect().await?)
    })
    .await?;
    let report = Report::new(seen);
    match args.json {
        true => terminal::print_json(&report),
        false => terminal::print(&report.tables(terminal::look().colour)),
    }
}

impl Report {
    fn new(seen: Inspection) -> Self {
        let clients: HashMap<u64, String> = seen
            .sessions
            .iter()
            .map(|session| (session.number, session.client_name.clone()))
            .collect();
        let quiet = |export: ExportInfo| {
            let quiesced = QuiescedReport::new(export.quiesced?);
            Some(ExportReport { export: export.name, quiesced })
        };
        Self {
            quiesced: seen.exports.into_iter().filter_map(quiet).collect(),
            sessions: seen.sessions.into_iter().map(SessionReport::new).collect(),
            files: seen.files.into_iter().map(|file| FileReport::new(file, &clients)).collect(),
            broken: seen.broken.into_iter().map(BrokenReport::new).collect(),
            region_memory_bytes: seen.region_memory_bytes,
            region_memory_bytes_max: seen.region_memory_bytes_max,
        }
    }

    fn tables(&self, colour: bool) -> String {
        let mut drawn = match self.files.is_empty() {
            true => "no file is pinned\n".to_owned(),
            false => self.files(colour),
        };
        drawn += &self.regions();
        for ExportReport { export, quiesced } in &self.quiesced {
            drawn += &format!("\nexport {}: {}\n", printable(export), quiesced.shown());
        }
        // The one of this command holds nothing and is gone when this is read.
        if self.sessions.iter().any(|session| !session.yours) {
            drawn.push('\n');
            drawn += &self.sessions(colour);
        }
        if !self.broken.is_empty() {
            drawn.push('\n');
            drawn += &self.broken(colour);
        }
        drawn
    }

    /// What the regions cost, where somebody could feel it.
    fn regions(&self) -> String {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        let slowest = self.files.iter().max_by_key(|file| file.revocation_cost_us);
        let Some(slowest) = slowest.filter(|file| file.revocation_cost_us >= 10_000) else {
            return String::new();
        };
        format!(
            "\nregions take {} of {} MiB of kernel memory; {} takes longest to cut off: {} ms\n",
            mib(self.region_memory_bytes),
            mib(self.region_memory_bytes_max),
            printable(&slowest.path),
            slowest.revocation_cost_us / 1000
        )
    }

    /// A row for each pin, complete in itself, so that it can be searched for.
    fn files(&self, colour: bool) -> String {
        let mut table = Table::new([
            ("STATE", Align::Left),
            ("GUARD", Align::Left),
            ("PIN", Align::Right),
            ("BYTES", Align::Left),
            ("ACCESS", Align::Left),
            ("BY", Align::Left),
            ("CLIENT", Align::Left),
            ("FILE", Align::Left),
        ]);
        for file in &self.files {
            let mut push = |[pin, bytes, access, by, client]: [String; 5]| {
                let (state, guard) = (file.state.to_owned(), file.guard.clone());
                table.push([state, guard, pin, bytes, access, by, client, file.shown_path()]);
            };
            if file.pins.is_empty() {
                push(std::array::from_fn(|_| "-".to_owned()));
            }
            for pin in &file.pins {
                push([
                    pin.pin.to_string(),
                    format!("{}..{}", pin.start, pin.end),
                    format!("{}{}", pin.access, if pin.exclusive { ", exclusive" } else { "" }),
                    pin.transport.to_owned(),
                    pin.client.as_deref().map_or_else(|| "gone".to_owned(), printable),
                ]);
            }
        }
        table.draw(colour)
    }

    fn sessions(&self, colour: bool) -> String {
        let mut table = Table::new([
            ("SESSION", Align::Right),
            ("PINS", Align::Right),
            ("DEVICE", Align::Left),
            ("CLIENT", Align::Left),
        ]);
        for session in self.sessions.iter().filter(|session| !session.yours) {
            table.push([
                session.session.to_string(),
                session.pins.to_string(),
                session.rdma_device.as_deref().map_or_else(|| "-".to_owned(), printable),
                printable(&session.client),
            ]);
        }
        table.draw(colour)
    }
}

impl Report {
    fn broken(&self, colour: bool) -> String {
        let mut table = Table::new([
            ("BREAKS", Align::Right),
            ("LAST", Align::Left),
            ("BY", Align::Left),
            ("FILE", Align::Left),
        ]);
        for file in &self.broken {
            let ago = Duration::from_millis(u64::try_from(file.last_ago_ms).unwrap_or(u64::MAX));
            let by = file.by.iter().map(|(command, breaks)| format!("{command} {breaks}"));
            let by: Vec<String> = by.collect();
            table.push([
                file.breaks.to_string(),
                format!("{} s ago", ago.as_secs()),
                printable(&by.join(", ")),
                printable(&file.path),
            ]);
        }
        table.draw(colour)
    }
}

impl BrokenReport {
    fn new(file: BrokenFile) -> Self {
        let (by, last_ago_ms) = (file.by.into_iter().collect(), file.last_ago.as_millis());
        Self { path: file.path, breaks: file.breaks, by, last_ago_ms }
    }
}

impl SessionReport {
    fn new(session: SessionInfo) -> Self {
        Self {
            session: session.number,
            client: session.client_name,
            yours: session.yours,
            pins: session.pins,
            rdma_device: session.rdma_device,
        }
    }
}

impl FileReport {
    fn new(file: FileInfo, clients: &HashMap<u64, String>) -> Self {
        Self {
            path: file.path,
            generation: file.generation.to_string(),
            guard: guard(file.guard),
            revocation_cost_us: file.revocation_cost.as_micros(),
            region_memory_bytes: file.region_memory_bytes,
            state: match file.state {
                FileState::Held => "held",
                FileState::Draining => "draining",
                FileState::Fencing => "fencing",
                FileState::Released => "released",
                _ => "unknown",
            },
            name: match file.name {
                NameState::Replaced => Some("replaced"),
                NameState::Renamed => Some("renamed"),
                NameState::Deleted => Some("deleted"),
                _ => None,
            },
            pins: file.pins.into_iter().map(|pin| PinReport::new(pin, clients)).collect(),
        }
    }
}

impl FileReport {
    /// As `lsof` marks what has no name.
    fn shown_path(&self) -> String {
        let path = printable(&self.path);
        match self.name {
            Some(name) => format!("{path} ({name})"),
            None => path,
        }
    }
}

fn guard(guard: GuardTier) -> String {
    guard.to_string()
}

impl PinReport {
    fn new(pin: PinInfo, clients: &HashMap<u64, String>) -> Self {
        Self {
            pin: pin.pin_id,
            session: pin.session,
            client: clients.get(&pin.session).cloned(),
            start: pin.range.start,
            end: pin.range.end,
            access: pin.access.to_string(),
            exclusive: pin.exclusive,
            transport: match pin.transport {
                Transport::Rdma => "rdma",
                Transport::Stream => "stream",
                _ => "auto",
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pinfold_client::{Access, Generation, Quiesced};

    use super::*;

    fn session(number: u64, client_name: &str, yours: bool) -> SessionInfo {
        let client_name = client_name.to_owned();
        SessionInfo { number, client_name, yours, pins: 1, rdma_device: None }
    }

    fn seen() -> Inspection {
        let pin = |pin_id, session, exclusive| PinInfo {
            pin_id,
            session,
            range: 0..4096,
            access: Access::ReadWrite,
            exclusive,
            transport: Transport::Stream,
        };
        let file = |path: &str, state, name, pins| FileInfo {
            path: path.to_owned(),
            generation: Generation { incarnation: 1, counter: 2 },
            guard: GuardTier::Lease,
            state,
            pins,
            revocation_cost: Duration::from_micros(1234),
            region_memory_bytes: 1 << 20,
            name,
        };
        Inspection {
            region_memory_bytes: 3 << 19,
            region_memory_bytes_max: 740 << 20,
            sessions: vec![session(1, "app", false), session(2, "pinfold", true)],
            broken: vec![BrokenFile {
                path: "/data/a".to_owned(),
                breaks: 12,
                by: vec![("find".to_owned(), 11), ("sh".to_owned(), 1)],
                last_ago: Duration::from_millis(3400),
            }],
            exports: vec![],
            files: vec![
                file(
                    "/data/a",
                    FileState::Held,
                    NameState::Stands,
                    vec![pin(7, 1, true), pin(12, 9, false)],
                ),
                file("/data/b", FileState::Released, NameState::Replaced, vec![]),
            ],
        }
    }

    #[test]
    fn every_pin_has_a_row_with_its_client() {
        assert_eq!(
            Report::new(seen()).tables(false),
            "\
STATE     GUARD  PIN  BYTES    ACCESS                 BY      CLIENT  FILE
held      lease    7  0..4096  read-write, exclusive  stream  app     /data/a
held      lease   12  0..4096  read-write             stream  gone    /data/a
released  lease    -  -        -                      -       -       /data/b (replaced)

SESSION  PINS  DEVICE  CLIENT
      1     1  -       app

BREAKS  LAST     BY             FILE
    12  3 s ago  find 11, sh 1  /data/a
",
        );
    }

    #[test]
    fn a_file_that_takes_long_to_cut_off_is_told_of() {
        let mut seen = seen();
        assert!(!Report::new(seen.clone()).tables(false).contains("kernel memory"));
        seen.files[0].revocation_cost = Duration::from_millis(640);
        let drawn = Report::new(seen).tables(false);
        let words = "\nregions take 2 of 740 MiB of kernel memory; /data/a takes longest to cut off: \
                     640 ms\n";
        assert!(drawn.contains(words), "{drawn}");
    }

    #[test]
    fn an_idle_server_is_told_in_words() {
        let sessions = || vec![session(2, "pinfold", true)];
        let idle = Inspection { sessions: sessions(), ..Inspection::default() };
        assert_eq!(Report::new(idle).tables(false), "no file is pinned\n");
        let quiesced =
            Quiesced { time: Duration::from_secs(5), by: "ops".to_owned(), complete: true };
        let exports = vec![
            ExportInfo { name: "data".to_owned(), quiesced: Some(quiesced) },
            ExportInfo { name: "logs".to_owned(), quiesced: None },
        ];
        let quiet = Inspection { sessions: sessions(), exports, ..Inspection::default() };
        assert_eq!(
            Report::new(quiet).tables(false),
            "no file is pinned\n\nexport data: quiesced for 5 s, by ops\n"
        );
    }

    #[test]
    fn json_has_a_client_with_each_pin() {
        let json = serde_json::to_value(Report::new(seen())).unwrap();
        let pins = &json["files"][0]["pins"];
        assert_eq!((&pins[0]["client"], &pins[0]["exclusive"]), (&"app".into(), &true.into()));
        assert_eq!(pins[1]["client"], serde_json::Value::Null);
        assert_eq!(json["files"][1]["state"], "released");
        assert_eq!(json["files"][0]["name"], serde_json::Value::Null);
        assert_eq!(json["files"][1]["name"], "replaced");
        assert_eq!(json["sessions"][1]["yours"], true);
        assert_eq!(json["broken"][0]["by"]["find"], 11);
    }
}
