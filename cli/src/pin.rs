//! `pinfold pin`.

use pinfold_cli::timeline;
use pinfold_client::{
    ConnectOptions, DrainNotice, Event, Events, Grant, Pin, PinRequest, Revocation,
    RevocationReason, RevocationTimings, Session,
};
use serde::Serialize;

use crate::args::{Connection, FileArg, Pin as Args};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::interrupt::{Interrupts, interrupted};
use crate::terminal;

/// How long a pin lives here.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Report {
    Granted {
        file: String,
        pin: u64,
        generation: String,
        start: u64,
        end: u64,
        valid_end: u64,
        access: String,
        guard: String,
        page_size: u32,
        dax: bool,
        map_sync: bool,
        durability: Vec<String>,
        start_alignment: u32,
        path_mtu: u32,
        segments: Vec<SegmentReport>,
    },
    Draining {
        pins: Vec<u64>,
        generation: String,
        reason: &'static str,
        drain_budget_ms: u128,
    },
    Revoked {
        pins: Vec<u64>,
        generation: String,
        reason: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        timings: Option<TimingsReport>,
    },
}

#[derive(Serialize)]
struct SegmentReport {
    file_offset: u64,
    length: u64,
    remote_address: u64,
    remote_key: u32,
}

#[derive(Serialize)]
struct TimingsReport {
    noticed_us: u128,
    /// Null: the drain budget ran out first.
    drained_us: Option<u128>,
    fenced_us: u128,
    released_us: u128,
    break_pending_at_release: bool,
}

/// Pins, shows the grant, and holds it if asked.
pub(crate) async fn run(connection: Connection, args: Args) -> Result<(), Failure> {
    let mut interrupts = Interrupts::listen()?;
    let options = ConnectOptions::new(connection.server).rdma_device(connection.rdma_device);
    let session = Session::connect(options).await?;
    // Before the pin, so that nothing about it is missed.
    let events = session.events();
    let outcome = tokio::select! {
        outcome = pinned(&session, &args, events) => outcome,
        () = interrupts.next() => Err(interrupted("the pin is given back")),
    };
    // Its pins go with the session.
    interrupts.or_abandon(session.close()).await;
    outcome
}

async fn pinned(session: &Session, args: &Args, events: Events) -> Result<(), Failure> {
    let pin = session.pin(request(session, args).await?).await?;
    show_grant(args, pin.grant())?;
    if args.hold {
        return hold(args, &pin, events).await;
    }
    pin.unpin().await?;
    Ok(())
}

async fn request(session: &Session, args: &Args) -> Result<PinRequest, Failure> {
    let FileArg { export, path } = &args.file;
    let request = match args.read_only {
        true => PinRequest::read(export, path),
        false => PinRequest::read_write(export, path),
    };
    let Some(range) = args.range else {
        return Ok(request);
    };
    let size = match range.needs_size() {
        true => session.stat(export, path).await?.size,
        false => 0,
    };
    // Which bytes there are can't change between the two calls without the server noticing: the
    // range is checked again when it is pinned.
    Ok(match range.resolve(size) {
        Some(range) => request.range(range),
        None => request,
    })
}

/// Waits until the pin is gone, which is this command's only other way to end.
async fn hold(args: &Args, pin: &Pin, mut events: Events) -> Result<(), Failure> {
    if !args.json {
        terminal::print("holding the pin; Ctrl-C gives it back\n")?;
    }
    let id = pin.grant().pin_id;
    while let Some(event) = events.next().await {
        match event {
            Event::Draining { notice, pins } if pins.contains(&id) => {
                show_notice(args, notice, pins)?;
            }
            Event::Revoked { revocation, pins } if pins.contains(&id) => {
                show_revocation(args, &revocation, pins)?;
                return Err(revoked(args, &revocation));
            }
            Event::Missed { .. } => pin.check()?,
            _ => {}
        }
    }
    // The session is over, and says why.
    pin.check().map_err(Failure::from)
}

fn revoked(args: &Args, revocation: &Revocation) -> Failure {
    let what = format!("the pin on {} was taken back: {}", args.file, revocation.reason);
    Failure::new(Exit::Revoked, what)
}

fn show_grant(args: &Args, grant: &Grant) -> Result<(), Failure> {
    if args.json {
        return terminal::print_json(&granted(args, grant));
    }
    let mut lines = format!(
        "file        {}\n\
         pin         {}, {}\n\
         bytes       {}..{}, of which usable up to {}\n\
         generation  {}\n\
         guard       {}\n\
         pages       {} bytes, {}{}\n\
         durability  {}\n\
         quirks      {}\n",
        args.file,
        grant.pin_id,
        grant.access,
        grant.range.start,
        grant.range.end,
        grant.usable().end,
        grant.generation,
        grant.guard,
        grant.page_size_bytes,
        if grant.dax { "DAX" } else { "no DAX" },
        if grant.map_sync { ", MAP_SYNC" } else { "" },
        listed(grant),
        quirks(grant),
    );
    for segment in &grant.segments {
        lines += &format!(
            "segment     {}..{} at {:#x}, key {:#010x}\n",
            segment.file_offset,
            segment.file_end(),
            segment.remote_address,
            segment.remote_key
        );
    }
    terminal::print(&lines)
}

fn listed(grant: &Grant) -> String {
    let offers: Vec<_> = grant.durability.iter().map(ToString::to_string).collect();
    if offers.is_empty() { "none on offer".to_owned() } else { offers.join(", ") }
}

fn quirks(grant: &Grant) -> String {
    let mut rules = Vec::new();
    if grant.quirks.start_alignment_bytes > 1 {
        let bytes = grant.quirks.start_alignment_bytes;
        rules.push(format!("requests start at multiples of {bytes} bytes"));
    }
    if grant.quirks.path_mtu_bytes > 0 {
        rules.push(format!("path MTU {}", grant.quirks.path_mtu_bytes));
    }
    if rules.is_empty() { "none".to_owned() } else { rules.join(", ") }
}

fn show_notice(args: &Args, notice: DrainNotice, pins: Vec<u64>) -> Result<(), Failure> {
    if args.json {
        return terminal::print_json(&Report::Draining {
            pins,
            generation: notice.generation.to_string(),
            reason: token(notice.reason),
            drain_budget_ms: notice.drain_budget.as_millis(),
        });
    }
    terminal::print(&format!(
        "\nnotice: {}; the pin goes back, within {}\n",
        notice.reason,
        timeline::figure(notice.drain_budget),
    ))
}

fn show_revocation(args: &Args, revocation: &Revocation, pins: Vec<u64>) -> Result<(), Failure> {
    if args.json {
        return terminal::print_json(&Report::Revoked {
            pins,
            generation: revocation.generation.to_string(),
            reason: token(revocation.reason),
            timings: revocation.timings.as_ref().map(TimingsReport::new),
        });
    }
    let Some(timings) = &revocation.timings else {
        return Ok(());
    };
    let picture = timeline::draw(&timeline::revocation(timings), terminal::look());
    terminal::print(&format!("\n{picture}\n{}\n", verdict(revocation.reason, timings)))
}

fn verdict(reason: RevocationReason, timings: &RevocationTimings) -> &'static str {
    match (reason, timings.break_pending_at_release) {
        (RevocationReason::Shutdown, _) => "nobody waited for the file",
        (_, true) => "the local process was let through by the release",
        (_, false) => "the local process had given up, or the kernel had let it through",
    }
}

fn granted(args: &Args, grant: &Grant) -> Report {
    Report::Granted {
        file: args.file.to_string(),
        pin: grant.pin_id,
        generation: grant.generation.to_string(),
        start: grant.range.start,
        end: grant.range.end,
        valid_end: grant.valid_end,
        access: grant.access.to_string(),
        guard: grant.guard.to_string(),
        page_size: grant.page_size_bytes,
        dax: grant.dax,
        map_sync: grant.map_sync,
        durability: grant.durability.iter().map(ToString::to_string).collect(),
        start_alignment: grant.quirks.start_alignment_bytes,
        path_mtu: grant.quirks.path_mtu_bytes,
        segments: grant
            .segments
            .iter()
            .map(|segment| SegmentReport {
                file_offset: segment.file_offset,
                length: segment.length,
                remote_address: segment.remote_address,
                remote_key: segment.remote_key,
            })
            .collect(),
    }
}

/// The reason for programs.
fn token(reason: RevocationReason) -> &'static str {
    match reason {
        RevocationReason::LocalReader => "local_reader",
        RevocationReason::LocalWriter => "local_writer",
        RevocationReason::Shutdown => "shutdown",
        _ => "unknown",
    }
}

impl TimingsReport {
    fn new(timings: &RevocationTimings) -> Self {
        Self {
            noticed_us: timings.noticed.as_micros(),
            drained_us: timings.drained.map(|when| when.as_micros()),
            fenced_us: timings.fenced.as_micros(),
            released_us: timings.released.as_micros(),
            break_pending_at_release: timings.break_pending_at_release,
        }
    }
}
