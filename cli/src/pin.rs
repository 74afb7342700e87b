//! `pinfold pin`.

use std::time::Duration;

use pinfold_cli::timeline;
use pinfold_client::{
    DrainNotice, Event, Events, Grant, GuardTier, Interruption, InterruptionCause, KeptPin,
    KeptSession, Pin, PinRequest, Revocation, Session,
};
use serde::Serialize;

use crate::args::{Connection, FileArg, Pin as Args, RangeArg, TransportArg};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::resize::target_size;
use crate::size::NewSize;
use crate::taken_back::{TimingsReport, token, verdict};
use crate::{terminal, work};

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
        exclusive: bool,
        transport: &'static str,
        no_rdma_because: Option<String>,
        no_flush_because: Option<String>,
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
    /// The session was lost, and the pin with it.
    Lost {
        pins: Vec<u64>,
        generation: String,
        reason: String,
    },
    /// A kept pin is held again; `granted` follows.
    Kept {
        generation: String,
        new_generation: String,
        attempts: u32,
        repeats: u32,
    },
}

#[derive(Serialize)]
struct SegmentReport {
    file_offset: u64,
    length: u64,
    remote_address: u64,
    remote_key: u32,
}

/// Pins, shows the grant, and holds it if asked.
pub(crate) async fn run(connection: Connection, args: Args) -> Result<(), Failure> {
    let transport = connection.transport;
    if args.keep {
        return work::kept(connection, "the pin is given back", async |session| {
            keep(session, transport, &args).await
        })
        .await;
    }
    work::by_transport(connection, None, "the pin is given back", async |session| {
        pinned(session, transport, &args).await
    })
    .await
}

async fn pinned(session: &Session, transport: TransportArg, args: &Args) -> Result<(), Failure> {
    // Before the pin, so that nothing about it is missed.
    let events = session.events();
    let pin = session.pin(request(session, transport, args).await?).await?;
    show_grant(session, args, pin.grant())?;
    if args.hold {
        return hold(args, &pin, events).await;
    }
    pin.unpin().await?;
    Ok(())
}

async fn request(
    session: &Session,
    transport: TransportArg,
    args: &Args,
) -> Result<PinRequest, Failure> {
    let FileArg { export, path } = &args.file;
    let mut request = match args.read_only {
        true => PinRequest::read(export, path),
        false => PinRequest::read_write(export, path),
    };
    request = request.transport(transport.into()).wait(Duration::from_secs(args.wait.into()));
    if args.exclusive {
        request = request.exclusive();
    }
    if args.steal {
        request = request.steal();
    }
    let relative = matches!(args.reserve, Some(NewSize::More(_)));
    let size = match relative || args.range.is_some_and(RangeArg::needs_size) {
        true => session.stat(export, path).await?.size,
        false => 0,
    };
    if let Some(reserve) = args.reserve {
        request = request.reserve_end(target_size(&args.file, reserve, size)?);
    }
    // Which bytes there are can't change between the two calls without the server noticing: the
    // range is checked again when it is pinned.
    Ok(match args.range.and_then(|range| range.resolve(size)) {
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

/// Holds the pin until it can't be had again.
async fn keep(session: &KeptSession, transport: TransportArg, args: &Args) -> Result<(), Failure> {
    let now = session.session().await?;
    let pin = session.pin(request(&now, transport, args).await?).await?;
    show_grant(&now, args, &pin.grant())?;
    drop(now);
    if !args.json {
        terminal::print("keeping the pin; Ctrl-C gives it back\n")?;
    }
    loop {
        let grant = pin.grant();
        let interruption = pin.interrupted().await;
        if let InterruptionCause::Draining(notice) = interruption.cause {
            show_notice(args, notice, vec![grant.pin_id])?;
        }
        let resumed = resume(&pin, args, &grant).await?;
        show_kept(args, &resumed)?;
        show_grant(&*session.session().await?, args, &pin.grant())?;
    }
}

/// Waits until the pin is held again, and tells of its end as soon as that is complete.
async fn resume(pin: &KeptPin, args: &Args, old: &Grant) -> Result<Interruption, Failure> {
    let resumed = pin.resume().await;
    // Only a report that nobody has taken is left there.
    let report = match &resumed {
        Ok(report) => report.clone(),
        Err(_) => pin.interruption(),
    };
    if let Some(interruption) = &report {
        show_cause(args, &interruption.cause, old)?;
    }
    resumed?;
    report
        .ok_or_else(|| Failure::new(Exit::Failure, "the interruption was over before it was told"))
}

fn show_cause(args: &Args, cause: &InterruptionCause, old: &Grant) -> Result<(), Failure> {
    let pins = vec![old.pin_id];
    match cause {
        InterruptionCause::Revoked(revocation) => show_revocation(args, revocation, pins),
        InterruptionCause::SessionLost(loss) if args.json => {
            let (generation, reason) = (old.generation.to_string(), loss.to_string());
            terminal::print_json(&Report::Lost { pins, generation, reason })
        }
        InterruptionCause::SessionLost(_) | InterruptionCause::Draining(_) => {
            terminal::print(&format!("\nthe pin is gone: {cause}\n"))
        }
    }
}

fn show_kept(args: &Args, interruption: &Interruption) -> Result<(), Failure> {
    let Interruption { attempts, repeats, .. } = *interruption;
    if args.json {
        let new = interruption.new.map(|generation| generation.to_string());
        return terminal::print_json(&Report::Kept {
            generation: interruption.old.to_string(),
            new_generation: new.unwrap_or_default(),
            attempts,
            repeats,
        });
    }
    let plural = if attempts == 1 { "" } else { "s" };
    terminal::print(&format!("\nheld again, after {attempts} attempt{plural}\n"))
}

fn revoked(args: &Args, revocation: &Revocation) -> Failure {
    let what = format!("the pin on {} was taken back: {}", args.file, revocation.reason);
    Failure::new(Exit::Revoked, what)
}

fn show_grant(session: &Session, args: &Args, grant: &Grant) -> Result<(), Failure> {
    let because = no_rdma_because(session, grant);
    if args.json {
        return terminal::print_json(&granted(args, grant, because));
    }
    let mut lines = format!(
        "file        {}\n\
         pin         {}, {}{}\n\
         transport   {}\n\
         bytes       {}..{}, of which usable up to {}\n\
         generation  {}\n\
         guard       {}\n\
         pages       {} bytes, {}{}\n\
         durability  {}\n\
         quirks      {}\n",
        args.file,
        grant.pin_id,
        grant.access,
        if args.exclusive { ", exclusive" } else { "" },
        match because {
            Some(because) => format!("stream: {because}"),
            None => by(grant).to_owned(),
        },
        grant.range.start,
        grant.range.end,
        grant.usable().end,
        grant.generation,
        guard(grant.guard),
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

fn by(grant: &Grant) -> &'static str {
    if grant.segments.is_empty() { "stream" } else { "rdma" }
}

/// Why the bytes go by stream, if they do; the side that knows better has the word.
fn no_rdma_because(session: &Session, grant: &Grant) -> Option<String> {
    if !grant.segments.is_empty() {
        return None;
    }
    let because = grant.no_rdma_because.clone();
    because.or_else(|| session.no_rdma_because().map(str::to_owned))
}

/// The guard, and what it does not hold back.
fn guard(guard: GuardTier) -> String {
    let weakness = match guard {
        GuardTier::Lease => {
            " (rename and unlink of the file are noticed afterwards, not held back)"
        }
        GuardTier::Unguarded => " (nothing is held back; rename and unlink are noticed afterwards)",
        _ => "",
    };
    format!("{guard}{weakness}")
}

fn listed(grant: &Grant) -> String {
    let offers: Vec<_> = grant.durability.iter().map(ToString::to_string).collect();
    let offers = if offers.is_empty() { "none on offer".to_owned() } else { offers.join(", ") };
    match &grant.no_flush_because {
        // That the stream path has none goes without saying.
        Some(because) if !grant.segments.is_empty() => format!("{offers} (no flush: {because})"),
        _ => offers,
    }
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

fn granted(args: &Args, grant: &Grant, because: Option<String>) -> Report {
    Report::Granted {
        file: args.file.to_string(),
        pin: grant.pin_id,
        generation: grant.generation.to_string(),
        start: grant.range.start,
        end: grant.range.end,
        valid_end: grant.valid_end,
        access: grant.access.to_string(),
        exclusive: args.exclusive,
        transport: by(grant),
        no_rdma_because: because,
        no_flush_because: grant.no_flush_because.clone(),
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
