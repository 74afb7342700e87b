//! `pinfold stat`.

use pinfold_client::FileStat;
use serde::Serialize;

use crate::args::{Connection, Stat};
use crate::failure::Failure;
use crate::{terminal, work};

#[derive(Serialize)]
struct Report {
    file: String,
    size: u64,
    allocated: u64,
    device: u64,
    inode: u64,
    birth_time_ns: u64,
    dax: bool,
    generation: Option<String>,
    pins: u32,
    /// Null: not guarded now.
    guard: Option<String>,
    page_size: u32,
}

/// Looks, by gRPC alone.
pub(crate) async fn run(connection: Connection, args: Stat) -> Result<(), Failure> {
    let stat = work::by_control(connection, "nothing was changed", async |session| {
        Ok(session.stat(&args.file.export, &args.file.path).await?)
    })
    .await?;
    let report = Report::new(args.file.to_string(), stat);
    if args.json { terminal::print_json(&report) } else { terminal::print(&report.lines()) }
}

impl Report {
    fn new(file: String, stat: FileStat) -> Self {
        Self {
            file,
            size: stat.size,
            allocated: stat.allocated,
            device: stat.identity.device,
            inode: stat.identity.inode,
            birth_time_ns: stat.identity.birth_time_ns,
            dax: stat.dax,
            generation: stat.generation.map(|generation| generation.to_string()),
            pins: stat.pins,
            guard: stat.guard.map(|guard| guard.to_string()),
            page_size: stat.page_size_bytes,
        }
    }

    fn lines(&self) -> String {
        format!(
            "file        {}\n\
             size        {} bytes, {} allocated\n\
             inode       {} on device {}\n\
             dax         {}\n\
             pages       {}\n\
             guard       {}\n\
             generation  {}\n\
             pins        {}\n",
            self.file,
            self.size,
            self.allocated,
            self.inode,
            self.device,
            if self.dax { "yes" } else { "no" },
            match self.page_size {
                0 => "of unknown size".to_owned(),
                bytes => format!("{bytes} bytes"),
            },
            self.guard.as_deref().unwrap_or("none: not guarded now"),
            self.generation.as_deref().unwrap_or("none"),
            self.pins,
        )
    }
}
