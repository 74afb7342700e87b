//! Who holds what on a server, and what it took back.

use std::ops::Range;
use std::time::Duration;

use pinfold_proto::v1;
use tonic::Streaming;

use crate::control::Control;
use crate::grant::{Malformed, parse_access};
use crate::{
    Access, Error, Generation, GuardTier, Loss, RevocationReason, RevocationTimings, Transport,
};

/// What [`inspect`](crate::Session::inspect) sees: who holds what at this moment.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Inspection {
    /// All sessions.
    pub sessions: Vec<SessionInfo>,
    /// All guarded files.
    pub files: Vec<FileInfo>,
    /// Files that processes of the server's host have wanted back within the last ten minutes, the
    /// most often first.
    pub broken: Vec<BrokenFile>,
    /// All exports.
    pub exports: Vec<ExportInfo>,
    /// Kernel memory that all memory regions of the server hold, in bytes …
    pub region_memory_bytes: u64,
    /// … and may hold.
    pub region_memory_bytes_max: u64,
}

/// How often processes of the server's host have wanted a file back lately.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BrokenFile {
    /// Its path on the server.
    pub path: String,
    /// How often.
    pub breaks: u64,
    /// How many of them by which command, the most often first. `unseen` did not wait, or was through
    /// before the server looked.
    pub by: Vec<(String, u64)>,
    /// Since the last one.
    pub last_ago: Duration,
}

/// A process of the server's host that has waited for a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Breaker {
    /// Its id there.
    pub pid: u32,
    /// Its short name.
    pub command: String,
}

/// An export, as clients see it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ExportInfo {
    /// Its name.
    pub name: String,
    /// Set while it is quiesced.
    pub quiesced: Option<Quiesced>,
}

/// How an export is quiesced: what names it is refused with
/// [`Reason::ExportQuiesced`](crate::Reason::ExportQuiesced) until it is resumed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Quiesced {
    /// For how long it has been.
    pub time: Duration,
    /// Who the client that quiesced it says it is.
    pub by: String,
    /// Whether nothing of it is open any more.
    pub complete: bool,
}

/// What [`quiesce`](crate::Session::quiesce) did.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Quieted {
    /// How many pins were revoked.
    pub revoked_pins: u32,
    /// Exports on the same file system that are not quiesced: to unmount it, quiesce them too.
    pub beside: Vec<String>,
}

/// A session, as others may see it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionInfo {
    /// Its number in this run of the server.
    pub number: u64,
    /// Who the client says it is.
    pub client_name: String,
    /// Whether it is the one that asks.
    pub yours: bool,
    /// How many pins it has.
    pub pins: u32,
    /// The server's RDMA device that it is connected to.
    pub rdma_device: Option<String>,
}

/// A guarded file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct FileInfo {
    /// Its path on the server.
    pub path: String,
    /// Its generation.
    pub generation: Generation,
    /// What holds it still.
    pub guard: GuardTier,
    /// How far it is in its life.
    pub state: FileState,
    /// The pins on it.
    pub pins: Vec<PinInfo>,
    /// How long the server takes to cut it off when a local process wants it.
    pub revocation_cost: Duration,
    /// Kernel memory that the memory regions on it hold, in bytes.
    pub region_memory_bytes: u64,
    /// What has become of the name by which it was pinned.
    pub name: NameState,
}

/// What has become of the name by which a file was pinned, as the server noticed last.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum NameState {
    /// It names the file.
    Stands,
    /// It names another file.
    Replaced,
    /// It names nothing, and the file has another name.
    Renamed,
    /// The file has no name left.
    Deleted,
    /// The server did not say, or something that this version does not know.
    Unknown,
}

/// How far a guarded file is in its life.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum FileState {
    /// Pinned, or about to be.
    Held,
    /// Being taken back: the clients finish what is in flight.
    Draining,
    /// Being taken back: the keys are dying.
    Fencing,
    /// Taken back, and not yet unmapped.
    Released,
    /// Something that this version does not know by name.
    Unknown,
}

/// A pin, as others may see it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PinInfo {
    /// Its number.
    pub pin_id: u64,
    /// Whose it is: [`SessionInfo::number`].
    pub session: u64,
    /// The bytes of the file that it reaches.
    pub range: Range<u64>,
    /// What it lets its holder do.
    pub access: Access,
    /// Whether it keeps others off.
    pub exclusive: bool,
    /// How its bytes travel.
    pub transport: Transport,
}

/// One revocation, complete.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RevocationRecord {
    /// The file's path on the server.
    pub path: String,
    /// The generation that ended.
    pub generation: Generation,
    /// Why.
    pub reason: RevocationReason,
    /// How many pins it took.
    pub pins: u32,
    /// How many sessions had them.
    pub sessions: u32,
    /// From the break to the release, step by step.
    pub timings: RevocationTimings,
    /// From the break until the last region was deregistered.
    pub deregistered: Duration,
    /// From the break until the last region was out of the local process's way, as far as is known.
    pub through: Duration,
    /// From the break until the file was unmapped.
    pub unmapped: Duration,
    /// Stream writes that were still inside the kernel when the guard was let go.
    pub late_stream_writes: u32,
    /// Who was seen waiting for the file.
    pub breakers: Vec<Breaker>,
    /// Where readers are left to the kernel: why the pins were taken back for one all the same.
    pub not_outwaited: Option<String>,
}

/// The revocations of a server, from the call of [`Session::watch`](crate::Session::watch) on.
#[derive(Debug)]
pub struct Records {
    records: Streaming<v1::RevocationRecord>,
    control: Control,
    over: bool,
}

impl Records {
    pub(crate) fn new(records: Streaming<v1::RevocationRecord>, control: Control) -> Self {
        Self { records, control, over: false }
    }

    /// Waits for the next one. After an error, and after this client has closed the session, none
    /// comes.
    ///
    /// Cancellation-safe: a record is returned or still there.
    pub async fn next(&mut self) -> Option<Result<RevocationRecord, Error>> {
        if self.over {
            return None;
        }
        let doing = || "watch revocations".to_owned();
        let next = tokio::select! {
            biased;
            record = self.records.message() => match record {
                Ok(record) => record.map(|wire| {
                    RevocationRecord::parse(wire)
                        .map_err(|malformed| Error::from_malformed(malformed, doing()))
                }),
                Err(status) => {
                    Some(Err(Error::from_status(status, &self.control.endpoint, doing())))
                }
            },
            loss = self.control.ended() => match loss {
                Loss::Closed => None,
                loss => Some(Err(self.control.lost(loss))),
            },
        };
        self.over = !matches!(next, Some(Ok(_)));
        next
    }
}

impl Inspection {
    pub(crate) fn parse(wire: v1::InspectResponse) -> Result<Self, Malformed> {
        let files = wire.files.into_iter().map(FileInfo::parse).collect::<Result<_, _>>()?;
        let sessions = wire.sessions.into_iter().map(SessionInfo::from).collect();
        let broken = wire.broken.into_iter().map(BrokenFile::from).collect();
        let exports = wire.exports.into_iter().map(ExportInfo::from).collect();
        let (region_memory_bytes, region_memory_bytes_max) =
            (wire.region_memory_bytes, wire.region_memory_bytes_max);
        Ok(Self { sessions, files, broken, exports, region_memory_bytes, region_memory_bytes_max })
    }

    /// Adds the next page. Its first file may be the last one of this, with further pins.
    pub(crate) fn add(&mut self, page: Self) {
        self.sessions.extend(page.sessions);
        self.broken.extend(page.broken);
        self.exports.extend(page.exports);
        // Of the first page only.
        self.region_memory_bytes = self.region_memory_bytes.max(page.region_memory_bytes);
        self.region_memory_bytes_max =
            self.region_memory_bytes_max.max(page.region_memory_bytes_max);
        let mut files = page.files.into_iter().peekable();
        if let Some(last) = self.files.last_mut()
            && let Some(more) = files.next_if(|file| file.generation == last.generation)
        {
            last.pins.extend(more.pins);
        }
        self.files.extend(files);
    }
}

impl From<v1::NameState> for NameState {
    fn from(wire: v1::NameState) -> Self {
        match wire {
            v1::NameState::Unspecified => Self::Unknown,
            v1::NameState::Stands => Self::Stands,
            v1::NameState::Replaced => Self::Replaced,
            v1::NameState::Renamed => Self::Renamed,
            v1::NameState::Deleted => Self::Deleted,
        }
    }
}

impl FileInfo {
    fn parse(wire: v1::FileInfo) -> Result<Self, Malformed> {
        Ok(Self {
            generation: wire.generation.ok_or(Malformed("a file without a generation"))?.into(),
            guard: GuardTier::from_wire(wire.guard),
            state: wire.state().into(),
            name: wire.name().into(),
            path: wire.path,
            pins: wire.pins.into_iter().map(PinInfo::parse).collect::<Result<_, _>>()?,
            revocation_cost: Duration::from_micros(wire.revocation_cost_us),
            region_memory_bytes: wire.region_memory_bytes,
        })
    }
}

impl PinInfo {
    fn parse(wire: v1::PinInfo) -> Result<Self, Malformed> {
        let range = wire.range.ok_or(Malformed("a pin without a range"))?;
        Ok(Self {
            pin_id: wire.pin_id,
            session: wire.session,
            range: range.start..range.end,
            access: parse_access(wire.access)?,
            exclusive: wire.exclusive,
            transport: wire.transport().into(),
        })
    }
}

impl RevocationRecord {
    fn parse(wire: v1::RevocationRecord) -> Result<Self, Malformed> {
        let reason = wire.reason().into();
        Ok(Self {
            path: wire.path,
            generation: wire.generation.ok_or(Malformed("a record without a generation"))?.into(),
            reason,
            pins: wire.pins,
            sessions: wire.sessions,
            timings: wire.timings.ok_or(Malformed("a record without timings"))?.into(),
            deregistered: Duration::from_micros(wire.deregistered_us),
            // A server that was made before there was the field.
            through: Duration::from_micros(wire.through_us.max(wire.deregistered_us)),
            unmapped: Duration::from_micros(wire.unmapped_us),
            late_stream_writes: wire.late_stream_writes,
            not_outwaited: Some(wire.not_outwaited).filter(|why| !why.is_empty()),
            breakers: wire.breakers.into_iter().map(Breaker::from).collect(),
        })
    }
}

impl From<v1::BrokenFile> for BrokenFile {
    fn from(wire: v1::BrokenFile) -> Self {
        let mut by: Vec<(String, u64)> =
            wire.by.into_iter().map(|by| (by.command, by.breaks)).collect();
        by.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        let last_ago = Duration::from_millis(wire.last_ago_ms);
        Self { path: wire.path, breaks: wire.breaks, by, last_ago }
    }
}

impl From<v1::Breaker> for Breaker {
    fn from(wire: v1::Breaker) -> Self {
        Self { pid: wire.pid, command: wire.command }
    }
}

impl From<v1::SessionInfo> for SessionInfo {
    fn from(wire: v1::SessionInfo) -> Self {
        Self {
            number: wire.number,
            client_name: wire.client_name,
            yours: wire.yours,
            pins: wire.pins,
            rdma_device: Some(wire.rdma_device).filter(|name| !name.is_empty()),
        }
    }
}

impl From<v1::ExportInfo> for ExportInfo {
    fn from(wire: v1::ExportInfo) -> Self {
        Self { name: wire.name, quiesced: wire.quiesced.map(Into::into) }
    }
}

impl From<v1::Quiesced> for Quiesced {
    fn from(wire: v1::Quiesced) -> Self {
        let v1::Quiesced { for_ms, by, complete } = wire;
        Self { time: Duration::from_millis(for_ms), by, complete }
    }
}

impl From<v1::FileState> for FileState {
    fn from(wire: v1::FileState) -> Self {
        match wire {
            v1::FileState::Unspecified => Self::Unknown,
            v1::FileState::Held => Self::Held,
            v1::FileState::Draining => Self::Draining,
            v1::FileState::Fencing => Self::Fencing,
            v1::FileState::Released => Self::Released,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(counter: u64, pins: &[u64]) -> FileInfo {
        let pin = |pin_id: &u64| PinInfo {
            pin_id: *pin_id,
            session: 1,
            range: 0..1,
            access: Access::Read,
            exclusive: false,
            transport: Transport::Stream,
        };
        FileInfo {
            path: "/x".to_owned(),
            generation: Generation { incarnation: 1, counter },
            guard: GuardTier::Lease,
            state: FileState::Held,
            pins: pins.iter().map(pin).collect(),
            revocation_cost: Duration::ZERO,
            region_memory_bytes: 0,
            name: NameState::Stands,
        }
    }

    #[test]
    fn a_file_that_goes_on_on_the_next_page_is_one_file() {
        let page = |files| Inspection { files, ..Inspection::default() };
        let mut seen = page(vec![file(1, &[1]), file(2, &[2, 3])]);
        seen.add(page(vec![file(2, &[4]), file(3, &[5])]));
        seen.add(page(vec![file(4, &[6])]));
        let expected = [file(1, &[1]), file(2, &[2, 3, 4]), file(3, &[5]), file(4, &[6])];
        assert_eq!(seen.files, expected);
    }
}
