//! `pinfold ls`.

use pinfold_client::{Entry, EntryKind, Quiesced, Session};
use serde::Serialize;

use crate::args::{Connection, FolderArg, Ls};
use crate::failure::Failure;
use crate::table::{Align, Table, printable};
use crate::{terminal, work};

#[derive(Serialize)]
struct Report {
    /// Null: the exports.
    folder: Option<String>,
    entries: Vec<EntryReport>,
}

#[derive(Serialize)]
struct EntryReport {
    name: String,
    kind: &'static str,
    /// Null where it is no file.
    size: Option<u64>,
    allocated: Option<u64>,
    pins: u32,
    /// Null unless it is an export that is quiesced.
    quiesced: Option<QuiescedReport>,
}

#[derive(Serialize)]
pub(crate) struct QuiescedReport {
    seconds: u64,
    by: String,
    /// Whether nothing of it is open any more.
    complete: bool,
}

impl QuiescedReport {
    pub(crate) fn new(quiesced: Quiesced) -> Self {
        let Quiesced { time, by, complete } = quiesced;
        Self { seconds: time.as_secs(), by, complete }
    }

    /// For people, behind the export's name.
    pub(crate) fn shown(&self) -> String {
        let word = if self.complete { "quiesced" } else { "being quiesced" };
        format!("{word} for {} s, by {}", self.seconds, printable(&self.by))
    }
}

/// Lists, by gRPC alone.
pub(crate) async fn run(connection: Connection, args: Ls) -> Result<(), Failure> {
    let entries = work::by_control(connection, "nothing was changed", async |session| {
        list(session, args.folder.as_ref()).await
    })
    .await?;
    let entries: Vec<_> = entries.into_iter().map(EntryReport::new).collect();
    if args.json {
        let folder = args.folder.as_ref().map(ToString::to_string);
        return terminal::print_json(&Report { folder, entries });
    }
    terminal::print(&match args.long {
        true => table(&entries, terminal::look().colour),
        false => names(&entries),
    })
}

async fn list(session: &Session, folder: Option<&FolderArg>) -> Result<Vec<Entry>, Failure> {
    let Some(FolderArg { export, path }) = folder else {
        return Ok(session.list("", "").await?);
    };
    let refused = match session.list(export, path).await {
        Ok(entries) => return Ok(entries),
        Err(error) => error,
    };
    // Perhaps it is no folder but a file, and that can be shown too.
    if refused.reason().is_some()
        && !path.is_empty()
        && let Ok(stat) = session.stat(export, path).await
    {
        let name = path.rsplit('/').next().unwrap_or(path).to_owned();
        let (size, allocated, pins) = (stat.size, stat.allocated, stat.pins);
        let kind = EntryKind::File;
        return Ok(vec![Entry { name, kind, size, allocated, pins, quiesced: None }]);
    }
    Err(refused.into())
}

/// One per line; what can be listed in turn ends in a slash.
fn names(entries: &[EntryReport]) -> String {
    entries.iter().map(|entry| entry.shown() + "\n").collect()
}

fn table(entries: &[EntryReport], colour: bool) -> String {
    let mut table = Table::new([
        ("KIND", Align::Left),
        ("SIZE", Align::Right),
        ("STORAGE", Align::Right),
        ("PINS", Align::Right),
        ("NAME", Align::Left),
    ]);
    let bytes = |size: Option<u64>| size.map_or_else(|| "-".to_owned(), |size| size.to_string());
    for entry in entries {
        let pins = if entry.size.is_some() { entry.pins.to_string() } else { "-".to_owned() };
        table.push([
            entry.kind.to_owned(),
            bytes(entry.size),
            bytes(entry.allocated),
            pins,
            entry.shown_in_full(),
        ]);
    }
    table.draw(colour)
}

impl EntryReport {
    fn new(entry: Entry) -> Self {
        let is_file = entry.kind == EntryKind::File;
        Self {
            name: entry.name,
            kind: match entry.kind {
                EntryKind::Export => "export",
                EntryKind::Folder => "folder",
                EntryKind::File => "file",
                _ => "other",
            },
            size: is_file.then_some(entry.size),
            allocated: is_file.then_some(entry.allocated),
            pins: entry.pins,
            quiesced: entry.quiesced.map(QuiescedReport::new),
        }
    }

    fn shown_in_full(&self) -> String {
        match &self.quiesced {
            None => self.shown(),
            Some(quiesced) => format!("{}  ({})", self.shown(), quiesced.shown()),
        }
    }

    fn shown(&self) -> String {
        let slash = if matches!(self.kind, "export" | "folder") { "/" } else { "" };
        printable(&self.name) + slash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries() -> Vec<EntryReport> {
        let entry = |name: &str, kind, size| {
            let (name, allocated) = (name.to_owned(), 2 * size);
            EntryReport::new(Entry { name, kind, size, allocated, pins: 1, quiesced: None })
        };
        vec![
            entry("a\nb", EntryKind::File, 4096),
            entry("old", EntryKind::Folder, 0),
            entry("pipe", EntryKind::Other, 0),
        ]
    }

    #[test]
    fn names_stand_alone_on_their_lines() {
        assert_eq!(names(&entries()), "a\\nb\nold/\npipe\n");
    }

    #[test]
    fn the_long_form_is_a_table() {
        assert_eq!(
            table(&entries(), false),
            "KIND    SIZE  STORAGE  PINS  NAME\n\
             file    4096     8192     1  a\\nb\n\
             folder     -        -     -  old/\n\
             other      -        -     -  pipe\n",
        );
    }

    #[test]
    fn what_has_no_size_says_so_in_json() {
        let json = serde_json::to_value(entries()).unwrap();
        assert_eq!(json[0]["name"], "a\nb");
        assert_eq!(json[0]["allocated"], 8192);
        assert_eq!((&json[1]["kind"], &json[1]["size"]), (&"folder".into(), &().into()));
    }
}
