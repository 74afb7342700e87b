//! `pinfold revoke`, `pinfold quiesce` and `pinfold resume`.

use pinfold_client::Reason;
use serde::Serialize;

use crate::args::{Connection, Quiesce, Resume, Revoke};
use crate::failure::Failure;
use crate::{terminal, work};

#[derive(Serialize)]
struct Revoked {
    file: String,
    revoked_pins: u32,
}

#[derive(Serialize)]
struct Quieted {
    export: String,
    revoked_pins: u32,
    /// Exports on the same file system that are served on.
    beside: Vec<String>,
}

#[derive(Serialize)]
struct Resumed {
    export: String,
    was_quiesced: bool,
}

/// Takes the pins of a file back, by gRPC alone.
pub(crate) async fn revoke(connection: Connection, args: Revoke) -> Result<(), Failure> {
    let spinner = terminal::spinner(format!("revoking {}", args.file), args.json);
    let left_behind = format!("whether {} was let go is not known; `pinfold ps` tells", args.file);
    let revoked = work::by_control(connection, &left_behind, async |session| {
        Ok(session.revoke(&args.file.export, &args.file.path).await?)
    })
    .await;
    spinner.finish_and_clear();
    let (file, revoked_pins) = (args.file.to_string(), revoked?);
    if args.json {
        return terminal::print_json(&Revoked { file, revoked_pins });
    }
    terminal::print(&match revoked_pins {
        0 => format!("{file}: it had no pins\n"),
        pins => format!("{file}: let go; pins that were revoked: {pins}\n"),
    })
}

/// Takes all of an export back, by gRPC alone.
pub(crate) async fn quiesce(connection: Connection, args: Quiesce) -> Result<(), Failure> {
    let spinner = terminal::spinner(format!("quiescing {}", args.export), args.json);
    let left_behind = format!(
        "{0} is quiesced or about to be; `pinfold ls -l` tells, `pinfold resume {0}` ends it",
        args.export
    );
    let quieted = work::by_control(connection, &left_behind, async |session| {
        Ok(session.quiesce(&args.export).await?)
    })
    .await
    .map_err(|failure| match failure.reason() {
        Some(Reason::FileDraining) => {
            failure.with_hint("quiesce it again to go on waiting; `pinfold ps` shows what is held")
        }
        _ => failure,
    });
    spinner.finish_and_clear();
    let (export, quieted) = (args.export, quieted?);
    let (revoked_pins, beside) = (quieted.revoked_pins, quieted.beside);
    if args.json {
        return terminal::print_json(&Quieted { export, revoked_pins, beside });
    }
    let mut told = format!(
        "{export}: quiesced, nothing of it is open; pins that were revoked: {revoked_pins}\n"
    );
    if !beside.is_empty() {
        told += &format!("on the same file system and served on: {}\n", beside.join(", "));
    }
    terminal::print(&told)
}

/// Serves an export again, by gRPC alone.
pub(crate) async fn resume(connection: Connection, args: Resume) -> Result<(), Failure> {
    let left_behind = format!("whether {} is served again, `pinfold ls -l` tells", args.export);
    let was_quiesced = work::by_control(connection, &left_behind, async |session| {
        Ok(session.resume(&args.export).await?)
    })
    .await
    .map_err(|failure| match failure.reason() {
        Some(Reason::FileNotFound | Reason::FileChanged) => {
            failure.with_hint("mount the export's file system, then resume it again")
        }
        Some(Reason::FileBusy) => failure.with_hint("end the other server, then resume it again"),
        _ => failure,
    })?;
    let export = args.export;
    if args.json {
        return terminal::print_json(&Resumed { export, was_quiesced });
    }
    terminal::print(&match was_quiesced {
        true => format!("{export}: served again\n"),
        false => format!("{export}: it was not quiesced\n"),
    })
}
