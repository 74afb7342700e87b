//! `pinfold rm`.

use pinfold_client::Reason;
use serde::Serialize;

use crate::args::{Connection, Rm};
use crate::failure::Failure;
use crate::{terminal, work};

#[derive(Serialize)]
struct Report {
    file: String,
    revoked_pins: u32,
}

/// Removes, by gRPC alone.
pub(crate) async fn run(connection: Connection, args: Rm) -> Result<(), Failure> {
    let left_behind = format!("whether {} was removed is not known", args.file);
    let spinner = terminal::spinner(format!("removing {}", args.file), args.json);
    let removed = work::by_control(connection, &left_behind, async |session| {
        Ok(session.remove(&args.file.export, &args.file.path, args.revoke).await?)
    })
    .await;
    spinner.finish_and_clear();
    let revoked_pins = removed.map_err(remedy)?;
    if args.json {
        return terminal::print_json(&Report { file: args.file.to_string(), revoked_pins });
    }
    terminal::print(&match revoked_pins {
        0 => format!("{}: removed\n", args.file),
        pins => format!("{}: removed; pins that were revoked for it: {pins}\n", args.file),
    })
}

fn remedy(failure: Failure) -> Failure {
    match failure.reason() {
        Some(Reason::FilePinned) => {
            failure.with_hint("`pinfold ps` shows who has its pins; --revoke takes them back first")
        }
        _ => failure,
    }
}
