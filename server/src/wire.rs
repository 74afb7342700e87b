//! Between the messages of `pinfold.v1` and the server's own types. What comes in is checked here
//! once; inside, only valid values travel.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use pinfold_leases::{
    BreakKind, Entry, EntryKind, FileIdentity, GuardTier, MappingKind, NameState, Opener,
    RelativePath,
};
use pinfold_proto::v1;
use pinfold_verbs::{Endpoint, Gid, QueuePairNumber, Quirks};

use crate::audit::{Teardown, micros};
use crate::breakers::Broken;
use crate::engine::{Granted, PageOrder, PinOrder, StreamPiece, TransportWish};
use crate::error::{Error, Result};
use crate::fabric::{QUEUE_PAIRS_MAX, Segment};
use crate::held::HeldFile;
use crate::ids::{Generation, Life, PinId, SessionId};
use crate::registry::{
    FileView, InspectPage, PagePlace, PinAccess, Reason, Record, SessionView, Stage, Timings,
    Transport,
};

/// Longest path in bytes (`PATH_MAX`).
const LONGEST_PATH: usize = 4096;
/// Names in one page of a listing: at their longest (255 bytes, none of them UTF-8) they fit in the
/// 4 MiB that gRPC libraries take.
const LARGEST_PAGE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(4_095);
/// Longest piece of the stream path in bytes: what a fence may have to wait for.
pub(crate) const STREAM_PIECE_BYTES_MAX: usize = 1 << 20;
/// A piece and what goes with it.
pub(crate) const LARGEST_MESSAGE: usize = STREAM_PIECE_BYTES_MAX + (16 << 10);

fn malformed(what: impl Into<String>) -> Error {
    Error::Malformed { what: what.into() }
}

/// 16 bytes.
pub(crate) fn session_id(bytes: &[u8]) -> Result<SessionId> {
    let bytes = bytes.try_into().map_err(|_| malformed("session_id is 16 bytes from Welcome"))?;
    Ok(SessionId::new(bytes))
}

/// Not too long, relative, without "..".
pub(crate) fn path(path: &str) -> Result<RelativePath> {
    if path.len() > LONGEST_PATH {
        return Err(malformed(format!("path is longer than {LONGEST_PATH} bytes")));
    }
    Ok(RelativePath::parse(path)?)
}

/// Which part of a folder to list.
pub(crate) fn page(size: u32, token: Vec<u8>) -> Result<PageOrder> {
    if token.len() > LONGEST_PATH {
        return Err(malformed("page_token is none that came from here"));
    }
    let size = NonZeroUsize::new(size as usize).map_or(LARGEST_PAGE, |size| size.min(LARGEST_PAGE));
    Ok(PageOrder { after: token, size })
}

/// Items of a page of an inspection, if its client has no wish.
const INSPECT_PAGE: NonZeroUsize = NonZeroUsize::MIN.saturating_add(32_767);

/// Which page of an inspection to make.
pub(crate) fn inspect_page(size: u32, token: &[u8]) -> Result<InspectPage> {
    let size = NonZeroUsize::new(size as usize).map_or(INSPECT_PAGE, |size| size.min(INSPECT_PAGE));
    let from = match token {
        [] => None,
        token => Some(parse_inspect_token(token).ok_or_else(|| {
            malformed("page_token is invalid: pass next_page_token of the page before")
        })?),
    };
    Ok(InspectPage { from, size })
}

fn parse_inspect_token(token: &[u8]) -> Option<PagePlace> {
    let (counter, pin) = token.split_first_chunk()?;
    let pin = PinId(u64::from_be_bytes(pin.try_into().ok()?));
    Some(PagePlace { counter: u64::from_be_bytes(*counter), pin })
}

/// What names a page for the client.
pub(crate) fn inspect_token(place: PagePlace) -> Vec<u8> {
    [place.counter.to_be_bytes(), place.pin.0.to_be_bytes()].concat()
}

/// A size that a file can have (`off_t`).
pub(crate) fn file_size(size: u64) -> Result<u64> {
    if i64::try_from(size).is_err() {
        return Err(malformed(format!("{size} bytes are more than a file can hold")));
    }
    Ok(size)
}

fn range(range: v1::ByteRange) -> Range<u64> {
    range.start..range.end
}

/// A peer's end of a connection; the numbers are checked by `verbs`.
pub(crate) fn endpoint(endpoint: Option<v1::Endpoint>) -> Result<Endpoint> {
    let endpoint = endpoint.ok_or_else(|| malformed("client endpoint is missing"))?;
    let gid: [u8; 16] =
        endpoint.gid.as_slice().try_into().map_err(|_| malformed("gid is not 16 bytes"))?;
    Ok(Endpoint {
        queue_pair_number: QueuePairNumber::new(endpoint.queue_pair_number),
        packet_sequence_number: endpoint.packet_sequence_number,
        gid: Gid::new(gid),
        lid: endpoint.lid.try_into().map_err(|_| malformed("lid is beyond 16 bits"))?,
        path_mtu_bytes: endpoint.max_path_mtu_bytes,
    })
}

/// Which of a session's queue pairs.
pub(crate) fn queue_pair_number(number: u32) -> Result<u32> {
    if number >= QUEUE_PAIRS_MAX {
        return Err(malformed("number is not below queue_pairs_max"));
    }
    Ok(number)
}

/// Our end, for the client.
pub(crate) fn own_endpoint(endpoint: &Endpoint) -> v1::Endpoint {
    v1::Endpoint {
        queue_pair_number: endpoint.queue_pair_number.get(),
        packet_sequence_number: endpoint.packet_sequence_number,
        gid: endpoint.gid.octets().to_vec(),
        lid: endpoint.lid.into(),
        max_path_mtu_bytes: endpoint.path_mtu_bytes,
    }
}

/// A request for a pin.
pub(crate) fn pin_order(request: v1::PinRequest) -> Result<PinOrder> {
    let access = match request.access() {
        v1::Access::Read => PinAccess::Read,
        v1::Access::ReadWrite => PinAccess::ReadWrite,
        v1::Access::Unspecified => {
            return Err(malformed("access says neither READ nor READ_WRITE"));
        }
    };
    if request.steal && !request.exclusive {
        return Err(malformed("steal goes with exclusive only"));
    }
    let transport = match request.transport() {
        v1::Transport::Unspecified => TransportWish::Either,
        v1::Transport::Rdma => TransportWish::Rdma,
        v1::Transport::Stream => TransportWish::Stream,
    };
    Ok(PinOrder {
        path: path(&request.path)?,
        export: request.export,
        range: request.range.map(range),
        access,
        transport,
        exclusive: request.exclusive,
        steal: request.steal,
        reserve_end: file_size(request.reserve_end)?,
        wait: Duration::from_millis(request.wait_ms.into()),
        number: request.number,
        expected: request.expected_identity.map(known_identity),
        expected_life: request.expected_life.map(known_life),
    })
}

/// A request for a commit: pin, generation, range.
pub(crate) fn commit(
    request: &v1::CommitRequest,
) -> Result<(PinId, Generation, Option<Range<u64>>)> {
    let asked = known_generation(request.generation)?;
    Ok((PinId(request.pin_id), asked, request.range.map(range)))
}

fn known_generation(asked: Option<v1::Generation>) -> Result<Generation> {
    let asked = asked.ok_or_else(|| malformed("generation is missing"))?;
    Ok(Generation { incarnation: asked.incarnation, counter: asked.counter })
}

/// Where a piece of the stream path starts.
pub(crate) fn stream_piece(
    session: SessionId,
    pin: u64,
    asked: Option<v1::Generation>,
    offset: u64,
) -> Result<StreamPiece> {
    let generation = known_generation(asked)?;
    Ok(StreamPiece { session, pin: PinId(pin), generation, offset })
}

/// A piece is not longer than what was agreed on.
pub(crate) fn piece_len(len: usize) -> Result<usize> {
    if len > STREAM_PIECE_BYTES_MAX {
        return Err(malformed(format!("a piece is at most {STREAM_PIECE_BYTES_MAX} bytes")));
    }
    Ok(len)
}

/// As it goes over the wire.
pub(crate) fn identity(identity: FileIdentity) -> v1::FileIdentity {
    v1::FileIdentity {
        device: identity.device,
        inode: identity.inode,
        birth_time_ns: identity.birth_time_ns,
    }
}

fn known_identity(identity: v1::FileIdentity) -> FileIdentity {
    FileIdentity {
        device: identity.device,
        inode: identity.inode,
        birth_time_ns: identity.birth_time_ns,
    }
}

/// A file's life.
fn life(life: Life) -> v1::Life {
    v1::Life { incarnation: life.incarnation, counter: life.counter }
}

fn known_life(life: v1::Life) -> Life {
    Life { incarnation: life.incarnation, counter: life.counter }
}

/// As it goes over the wire.
pub(crate) fn generation(generation: Generation) -> v1::Generation {
    v1::Generation { incarnation: generation.incarnation, counter: generation.counter }
}

/// What a client must know of a region.
pub(crate) fn segment(segment: &Segment) -> v1::Segment {
    v1::Segment {
        file_offset: segment.range.start,
        length: segment.range.end - segment.range.start,
        remote_address: segment.remote_address(),
        remote_key: segment.remote_key(),
    }
}

/// The rules that a client must keep.
pub(crate) fn quirks(quirks: &Quirks) -> v1::Quirks {
    v1::Quirks {
        start_alignment_bytes: quirks.start_alignment_bytes,
        path_mtu_bytes: quirks.path_mtu_bytes.unwrap_or(0),
    }
}

/// The grant.
pub(crate) fn granted(granted: Granted) -> v1::PinResponse {
    let file = &granted.file;
    let by_commit = file.kind().can_be_durable().then_some(v1::Durability::Commit.into());
    let by_flush = granted.ways.no_flush_because.is_none().then_some(v1::Durability::Flush.into());
    v1::PinResponse {
        pin_id: granted.pin.0,
        generation: Some(generation(granted.generation)),
        identity: Some(identity(file.description().identity())),
        range: Some(v1::ByteRange { start: granted.range.start, end: granted.range.end }),
        segments: granted.ways.segments,
        access: access(granted.access).into(),
        guard: tier(file.tier()).into(),
        valid_end: granted.valid_end,
        page_size_bytes: file.page_size_bytes(),
        dax: matches!(file.kind(), MappingKind::FsDax | MappingKind::DeviceDax),
        map_sync: file.map_sync(),
        durability: by_commit.into_iter().chain(by_flush).collect(),
        quirks: Some(granted.ways.quirks),
        no_rdma_because: granted.ways.no_rdma_because,
        no_flush_because: granted.ways.no_flush_because.unwrap_or_default(),
        atomics: granted.ways.no_atomics_because.is_none(),
        no_atomics_because: granted.ways.no_atomics_because.unwrap_or_default(),
        atomic_write: granted.ways.no_atomic_write_because.is_none(),
        no_atomic_write_because: granted.ways.no_atomic_write_because.unwrap_or_default(),
        life: Some(life(file.life())),
        revocation_cost_us: micros(file.cost().now().time),
    }
}

/// A number that can't reach four billion.
pub(crate) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn access(access: PinAccess) -> v1::Access {
    match access {
        PinAccess::Read => v1::Access::Read,
        PinAccess::ReadWrite => v1::Access::ReadWrite,
    }
}

/// As it goes over the wire.
pub(crate) fn tier(tier: GuardTier) -> v1::GuardTier {
    match tier {
        GuardTier::Lease => v1::GuardTier::Lease,
        GuardTier::Delegation => v1::GuardTier::Delegation,
        GuardTier::Unguarded => v1::GuardTier::Unguarded,
        GuardTier::ReadDelegation => v1::GuardTier::ReadDelegation,
        GuardTier::Sealed => v1::GuardTier::Sealed,
        GuardTier::NotNeeded => v1::GuardTier::NotNeeded,
    }
}

/// What a folder holds.
pub(crate) fn entry(entry: Entry, pins: usize) -> v1::Entry {
    let kind = match entry.kind {
        EntryKind::File => v1::EntryKind::File,
        EntryKind::Folder => v1::EntryKind::Folder,
        EntryKind::Other => v1::EntryKind::Unspecified,
    };
    let sized = |bytes| if entry.kind == EntryKind::File { bytes } else { 0 };
    v1::Entry {
        size: sized(entry.size),
        allocated: sized(entry.allocated),
        name: entry.name,
        kind: kind.into(),
        pins: count(pins),
        quiesced: None,
    }
}

/// An export as an entry of the top.
pub(crate) fn export_entry(name: String, quiesced: Option<v1::Quiesced>) -> v1::Entry {
    v1::Entry { name, kind: v1::EntryKind::Export.into(), quiesced, ..v1::Entry::default() }
}

/// An export that is not served for now.
pub(crate) fn quiesced(time: Duration, by: String, complete: bool) -> v1::Quiesced {
    v1::Quiesced { for_ms: millis(time), by, complete }
}

/// A session for the operator.
pub(crate) fn session_info(
    view: &SessionView,
    yours: bool,
    device: Option<String>,
) -> v1::SessionInfo {
    v1::SessionInfo {
        number: view.number,
        client_name: view.client_name.clone(),
        yours,
        pins: count(view.pins),
        rdma_device: device.unwrap_or_default(),
    }
}

/// A guarded file for the operator.
pub(crate) fn file_info(view: &FileView, file: &HeldFile) -> v1::FileInfo {
    let state = match view.stage {
        Stage::Held => v1::FileState::Held,
        Stage::Draining => v1::FileState::Draining,
        Stage::Fencing => v1::FileState::Fencing,
        Stage::Released => v1::FileState::Released,
    };
    let pins = view.pins.iter().map(|(pin, session, terms, transport)| v1::PinInfo {
        pin_id: pin.0,
        session: *session,
        range: Some(v1::ByteRange { start: terms.range.start, end: terms.range.end }),
        access: access(terms.access).into(),
        exclusive: terms.exclusive,
        transport: match transport {
            Transport::Rdma => v1::Transport::Rdma.into(),
            Transport::Stream => v1::Transport::Stream.into(),
        },
    });
    let cost = file.cost().now();
    v1::FileInfo {
        path: file.path().display().to_string(),
        generation: Some(generation(view.generation)),
        guard: tier(file.tier()).into(),
        state: state.into(),
        pins: pins.collect(),
        revocation_cost_us: micros(cost.time),
        region_memory_bytes: cost.memory,
        name: name(file.names().gone()).into(),
    }
}

fn name(gone: Option<NameState>) -> v1::NameState {
    match gone {
        None | Some(NameState::Stands) => v1::NameState::Stands,
        Some(NameState::Replaced) => v1::NameState::Replaced,
        Some(NameState::Renamed) => v1::NameState::Renamed,
        Some(NameState::Deleted) => v1::NameState::Deleted,
    }
}

/// A complete revocation, for those who watch.
pub(crate) fn record(
    path: &Path,
    record: &Record,
    teardown: &Teardown,
    breakers: &[Opener],
) -> v1::RevocationRecord {
    let breakers = breakers.iter();
    v1::RevocationRecord {
        path: path.display().to_string(),
        generation: Some(generation(record.generation)),
        reason: reason(record.reason).into(),
        pins: count(record.pins),
        sessions: count(record.sessions),
        timings: Some(timings(&record.timings)),
        deregistered_us: micros(teardown.deregistered),
        through_us: micros(teardown.through(record)),
        unmapped_us: micros(teardown.unmapped),
        late_stream_writes: count(teardown.late_stream_writes),
        breakers: breakers
            .map(|breaker| v1::Breaker { pid: breaker.pid, command: breaker.command.clone() })
            .collect(),
        not_outwaited: record.not_outwaited.map(|why| why.to_string()).unwrap_or_default(),
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// For times that 49 days are enough for.
pub(crate) fn short_millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// How often a file was taken back for local processes.
pub(crate) fn broken_file(broken: Broken, now: Instant) -> v1::BrokenFile {
    v1::BrokenFile {
        path: broken.path.display().to_string(),
        breaks: broken.breaks,
        by: broken
            .by
            .into_iter()
            .map(|(command, breaks)| v1::BreaksBy { command, breaks })
            .collect(),
        last_ago_ms: millis(now - broken.last),
    }
}

fn reason(reason: Reason) -> v1::RevocationReason {
    match reason {
        Reason::Break(BreakKind::Reader) => v1::RevocationReason::LocalReader,
        Reason::Break(BreakKind::Writer) => v1::RevocationReason::LocalWriter,
        Reason::Shutdown => v1::RevocationReason::Shutdown,
        Reason::Shrink => v1::RevocationReason::Shrink,
        Reason::Remove => v1::RevocationReason::Remove,
        Reason::Operator => v1::RevocationReason::Operator,
        Reason::Quiesce => v1::RevocationReason::Quiesce,
        Reason::Steal => v1::RevocationReason::Steal,
        Reason::NameGone => v1::RevocationReason::NameGone,
        Reason::WriteBackFailed => v1::RevocationReason::WriteBackFailed,
    }
}

fn pin_ids(pins: &[PinId]) -> Vec<u64> {
    pins.iter().map(|pin| pin.0).collect()
}

fn event(event: v1::session_event::Event) -> v1::SessionEvent {
    v1::SessionEvent { event: Some(event) }
}

/// The notice.
pub(crate) fn draining(
    pins: &[PinId],
    revoked: Generation,
    why: Reason,
    budget: Duration,
) -> v1::SessionEvent {
    event(v1::session_event::Event::Draining(v1::Draining {
        pin_ids: pin_ids(pins),
        generation: Some(generation(revoked)),
        reason: reason(why).into(),
        drain_budget_ms: short_millis(budget),
    }))
}

/// The end of a revocation.
pub(crate) fn revoked(
    pins: &[PinId],
    revoked: Generation,
    why: Reason,
    timings: &Timings,
) -> v1::SessionEvent {
    event(v1::session_event::Event::Revoked(v1::Revoked {
        pin_ids: pin_ids(pins),
        generation: Some(generation(revoked)),
        reason: reason(why).into(),
        timings: Some(self::timings(timings)),
    }))
}

fn timings(timings: &Timings) -> v1::RevocationTimings {
    v1::RevocationTimings {
        noticed_us: micros(timings.noticed),
        drained_us: timings.drained.map(micros),
        fenced_us: micros(timings.fenced),
        released_us: micros(timings.released),
        break_pending_at_release: timings.break_pending,
    }
}

/// The first event of a session.
pub(crate) fn welcome(welcome: v1::Welcome) -> v1::SessionEvent {
    event(v1::session_event::Event::Welcome(welcome))
}

/// The answer to a heartbeat.
pub(crate) fn heartbeat_reply(sequence: u64) -> v1::SessionEvent {
    event(v1::session_event::Event::HeartbeatReply(v1::HeartbeatReply { sequence }))
}
