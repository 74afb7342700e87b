//! `pinfold grow` and `pinfold shrink`.

use indicatif::BinaryBytes;
use pinfold_client::AllocationProgress;
use serde::Serialize;

use crate::args::{Connection, FileArg, Grow, Shrink};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::size::NewSize;
use crate::{terminal, work};

#[derive(Serialize)]
struct Grown {
    file: String,
    size: u64,
}

#[derive(Serialize)]
struct Shrunk {
    file: String,
    size: u64,
    revoked_pins: u32,
}

/// Makes longer, by gRPC alone.
pub(crate) async fn grow(connection: Connection, args: Grow) -> Result<(), Failure> {
    let spinner = terminal::spinner(format!("growing {}", args.file), args.json);
    let FileArg { export, path } = &args.file;
    let grown = work::by_control(connection, &unknown_size(&args.file), async |session| {
        let size = match args.size {
            NewSize::Absolute(size) => size,
            NewSize::More(_) => {
                target_size(&args.file, args.size, session.stat(export, path).await?.size)?
            }
        };
        let shown = |progress: AllocationProgress| {
            let (done, total) =
                (BinaryBytes(progress.done_bytes), BinaryBytes(progress.total_bytes));
            spinner.set_message(format!("growing {}: {done} of {total}", args.file));
        };
        Ok(session.grow_with_progress(export, path, size, shown).await?)
    })
    .await;
    spinner.finish_and_clear();
    let size = grown?;
    if args.json {
        return terminal::print_json(&Grown { file: args.file.to_string(), size });
    }
    terminal::print(&format!("{}: {size} bytes\n", args.file))
}

/// Makes shorter, by gRPC alone.
pub(crate) async fn shrink(connection: Connection, args: Shrink) -> Result<(), Failure> {
    let spinner = terminal::spinner(format!("shrinking {}", args.file), args.json);
    let FileArg { export, path } = &args.file;
    let shrunk = work::by_control(connection, &unknown_size(&args.file), async |session| {
        Ok(session.shrink(export, path, args.size).await?)
    })
    .await;
    spinner.finish_and_clear();
    let (size, revoked_pins) = (args.size, shrunk?);
    if args.json {
        return terminal::print_json(&Shrunk { file: args.file.to_string(), size, revoked_pins });
    }
    terminal::print(&match revoked_pins {
        0 => format!("{}: {size} bytes\n", args.file),
        pins => format!("{}: {size} bytes; pins that were revoked for it: {pins}\n", args.file),
    })
}

/// The size that is meant, if the file has this one.
pub(crate) fn target_size(file: &FileArg, wanted: NewSize, present: u64) -> Result<u64, Failure> {
    wanted.on_top_of(present).ok_or_else(|| {
        let what = format!("{file} has {present} bytes: no file can have as many more as that");
        Failure::new(Exit::BadRequest, what)
    })
}

fn unknown_size(file: &FileArg) -> String {
    format!("whether the size of {file} changed is not known; `pinfold stat` tells")
}
