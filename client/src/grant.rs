//! What the server granted for a pin, parsed once and trusted from then on.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use pinfold_proto::v1;

use crate::FileIdentity;

/// Names one guarding of one file; never used again, across restarts of the server too. Those of one
/// export are ordered by when they were granted; those of different exports or servers are not comparable.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Generation {
    /// Of one run of the server, above that of every earlier run with the same state folder.
    pub incarnation: u64,
    /// Counts up within it.
    pub counter: u64,
}

/// A stretch of a file's life during which nobody but the server's clients has changed its bytes. A new one
/// begins when a local process has written to it, cut it or grown it while it was not pinned; to set its
/// times looks the same. A restart of the server does not end it; what a server that was killed can't know does.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Life {
    /// As in [`Generation`].
    pub incarnation: u64,
    /// Counts up within it.
    pub counter: u64,
}

/// What a pin lets its holder do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Access {
    /// One-sided reads.
    Read,
    /// One-sided reads and writes.
    ReadWrite,
}

/// What holds the file still while it is pinned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum GuardTier {
    /// A file lease: opens and truncate(2) wait.
    Lease,
    /// A delegation: unlink, rename, link and attribute changes wait too.
    Delegation,
    /// Nothing: whoever cuts the file does so unseen, and writes may vanish without a word. Only
    /// where the operator has asked for it by name.
    Unguarded,
    /// A delegation that the kernel has downgraded for a reader: readers pass, all others wait.
    ReadDelegation,
    /// The append-only flag: who would cut, rename or unlink the file fails at once, readers pass.
    Sealed,
    /// Nothing, and nothing is needed: a DAX device, which nobody can cut.
    NotNeeded,
    /// Something that this version does not know by name.
    Unknown,
}

/// A way to make writes survive power loss.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Durability {
    /// [`Pin::commit`](crate::Pin::commit) flushes.
    Commit,
    /// [`Pin::flush`](crate::Pin::flush) does, with no part for the server's processor.
    Flush,
}

/// How a pin's bytes travel.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Transport {
    /// By RDMA where it can be, else by the stream path: what hosts without a device do, and what
    /// quirks forbid. The grant and each transfer say which it was.
    #[default]
    Auto,
    /// By RDMA, or refuse.
    Rdma,
    /// By the stream path only: gRPC, through the server's processor. No key is made.
    Stream,
}

/// A rule of the server's device. The device reports success and misplaces data when it is broken,
/// so this library keeps it: what would break it goes by the stream path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Quirks {
    /// Every request starts at a remote address that is a multiple of this. 1: any.
    pub start_alignment_bytes: u32,
    /// If not 0: the queue pair has exactly this path MTU.
    pub path_mtu_bytes: u32,
}

/// A stretch of the file that one memory region of the server covers.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// What to put in an RDMA request for its first byte.
    pub remote_address: u64,
    /// The key that goes with it.
    pub remote_key: u32,
}

impl Segment {
    /// One past its last byte in the file.
    pub fn file_end(&self) -> u64 {
        self.file_offset + self.length
    }
}

/// What a pin may reach, and how.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Grant {
    /// The pin's number in its session.
    pub pin_id: u64,
    /// Which guarding of the file it belongs to.
    pub generation: Generation,
    /// The inode that is pinned.
    pub identity: FileIdentity,
    /// Which of the file's lives it is pinned in, if the server tells.
    pub life: Option<Life>,
    /// The bytes of the file that are pinned.
    pub range: Range<u64>,
    /// How they are reached by RDMA: ordered by file offset, without gaps, up to `reserved_end`.
    /// None: by the stream path only. The first may start later than the range, where the device
    /// can't reach its first bytes; those go by the stream path.
    pub segments: Vec<Segment>,
    /// How far the pin reaches when the file grows: the range's end, or what was reserved.
    pub reserved_end: u64,
    /// What may be done.
    pub access: Access,
    /// What holds the file still.
    pub guard: GuardTier,
    /// The file's end when it was pinned, to the byte. Bytes beyond it in the last page would vanish, so this library
    /// writes none.
    pub valid_end: u64,
    /// Size of the pages that map the file: 2 MiB where all that can be is huge on the medium, else
    /// the smallest there are.
    pub page_size_bytes: u32,
    /// Whether loads and stores reach the medium directly.
    pub dax: bool,
    /// Whether block allocation is durable before a page can be written.
    pub map_sync: bool,
    /// The ways to durability on offer.
    pub durability: Vec<Durability>,
    /// Rules of the server's device.
    pub quirks: Quirks,
    /// Why there are no segments, for people; absent if there are.
    pub no_rdma_because: Option<String>,
    /// Why [`Durability::Flush`] is not on offer, for people; absent if it is.
    pub no_flush_because: Option<String>,
    /// Why there are no [atomics](crate::Pin::fetch_add), for people; absent if there are.
    pub no_atomics_because: Option<String>,
    /// Why there is no [atomic write](crate::Pin::write_atomic), for people; absent if there is.
    pub no_atomic_write_because: Option<String>,
    /// How long the server takes to cut the file off when a local process wants it: all pins of the file,
    /// this one included. Zero: it has no keys, or the server does not tell.
    pub revocation_cost: Duration,
}

impl GuardTier {
    pub(crate) fn from_wire(wire: i32) -> Self {
        match v1::GuardTier::try_from(wire) {
            Ok(v1::GuardTier::Lease) => Self::Lease,
            Ok(v1::GuardTier::Delegation) => Self::Delegation,
            Ok(v1::GuardTier::Unguarded) => Self::Unguarded,
            Ok(v1::GuardTier::ReadDelegation) => Self::ReadDelegation,
            Ok(v1::GuardTier::Sealed) => Self::Sealed,
            Ok(v1::GuardTier::NotNeeded) => Self::NotNeeded,
            Ok(v1::GuardTier::Unspecified) | Err(_) => Self::Unknown,
        }
    }
}

/// The server's answer contradicts the protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Malformed(pub(crate) &'static str);

impl Grant {
    /// The bytes that can be used: the pin, as far as the file goes.
    pub fn usable(&self) -> Range<u64> {
        self.range.start..self.range.end.min(self.valid_end).max(self.range.start)
    }

    /// Checks everything that later code relies on, so that arithmetic on a grant cannot overflow
    /// and a pin's bytes are in one segment each at most. `reserve_end` is what was asked for.
    pub(crate) fn parse(wire: v1::PinResponse, reserve_end: u64) -> Result<Self, Malformed> {
        let range = wire.range.ok_or(Malformed("a grant without a range"))?;
        if range.start >= range.end {
            return Err(Malformed("a grant of an empty range"));
        }
        let segments: Vec<_> = wire.segments.iter().map(Segment::from).collect();
        let reserved_end = check_cover(&segments, range.start..range.end)?
            .unwrap_or_else(|| range.end.max(reserve_end));
        let quirks = wire.quirks.unwrap_or_default();
        let durability: Vec<_> = wire.durability.into_iter().filter_map(parse_durability).collect();
        let flush = durability.contains(&Durability::Flush);
        Ok(Self {
            pin_id: wire.pin_id,
            generation: wire.generation.ok_or(Malformed("a grant without a generation"))?.into(),
            identity: wire.identity.ok_or(Malformed("a grant without an identity"))?.into(),
            life: wire.life.map(Into::into),
            range: range.start..range.end,
            no_rdma_because: segments.is_empty().then_some(wire.no_rdma_because),
            segments,
            reserved_end,
            access: parse_access(wire.access)?,
            guard: GuardTier::from_wire(wire.guard),
            valid_end: wire.valid_end,
            page_size_bytes: wire.page_size_bytes,
            dax: wire.dax,
            map_sync: wire.map_sync,
            no_flush_because: why_not(flush, wire.no_flush_because, "RDMA FLUSH"),
            no_atomics_because: why_not(wire.atomics, wire.no_atomics_because, "atomics"),
            no_atomic_write_because: why_not(
                wire.atomic_write,
                wire.no_atomic_write_because,
                "ATOMIC WRITE",
            ),
            revocation_cost: Duration::from_micros(wire.revocation_cost_us),
            durability,
            quirks: Quirks {
                // An absent rule is no rule.
                start_alignment_bytes: quirks.start_alignment_bytes.max(1),
                path_mtu_bytes: quirks.path_mtu_bytes,
            },
        })
    }
}

/// A server that was made before there was any says nothing.
fn why_not(offered: bool, because: String, what: &str) -> Option<String> {
    match (offered, because.is_empty()) {
        (true, _) => None,
        (false, true) => Some(format!("this server knows no {what}")),
        (false, false) => Some(because),
    }
}

/// Returns where the last segment ends, if there are any. They may start late and end late: an
/// unaligned head has none, and what was reserved lies past the range.
fn check_cover(segments: &[Segment], range: Range<u64>) -> Result<Option<u64>, Malformed> {
    let Some(first) = segments.first() else {
        return Ok(None);
    };
    if first.file_offset < range.start {
        return Err(Malformed("a segment before the granted range"));
    }
    let mut reached = first.file_offset;
    for segment in segments {
        if segment.file_offset != reached || segment.length == 0 {
            return Err(Malformed("segments with a gap, an overlap or no bytes"));
        }
        reached = reached
            .checked_add(segment.length)
            .ok_or(Malformed("a segment past the last file offset"))?;
        segment
            .remote_address
            .checked_add(segment.length)
            .ok_or(Malformed("a segment past the last address"))?;
    }
    if reached < range.end {
        return Err(Malformed("segments that end before the granted range"));
    }
    Ok(Some(reached))
}

pub(crate) fn parse_access(wire: i32) -> Result<Access, Malformed> {
    match v1::Access::try_from(wire) {
        Ok(v1::Access::Read) => Ok(Access::Read),
        Ok(v1::Access::ReadWrite) => Ok(Access::ReadWrite),
        Ok(v1::Access::Unspecified) | Err(_) => Err(Malformed("a pin of unknown access")),
    }
}

/// An offer that this version does not know is no offer.
fn parse_durability(wire: i32) -> Option<Durability> {
    match v1::Durability::try_from(wire) {
        Ok(v1::Durability::Commit) => Some(Durability::Commit),
        Ok(v1::Durability::Flush) => Some(Durability::Flush),
        Ok(v1::Durability::Unspecified) | Err(_) => None,
    }
}

impl From<&v1::Segment> for Segment {
    fn from(wire: &v1::Segment) -> Self {
        Self {
            file_offset: wire.file_offset,
            length: wire.length,
            remote_address: wire.remote_address,
            remote_key: wire.remote_key,
        }
    }
}

impl From<v1::Generation> for Generation {
    fn from(wire: v1::Generation) -> Self {
        Self { incarnation: wire.incarnation, counter: wire.counter }
    }
}

impl From<Generation> for v1::Generation {
    fn from(generation: Generation) -> Self {
        Self { incarnation: generation.incarnation, counter: generation.counter }
    }
}

impl From<v1::Life> for Life {
    fn from(wire: v1::Life) -> Self {
        Self { incarnation: wire.incarnation, counter: wire.counter }
    }
}

impl From<Life> for v1::Life {
    fn from(life: Life) -> Self {
        Self { incarnation: life.incarnation, counter: life.counter }
    }
}

impl From<Access> for v1::Access {
    fn from(access: Access) -> Self {
        match access {
            Access::Read => Self::Read,
            Access::ReadWrite => Self::ReadWrite,
        }
    }
}

impl From<Transport> for v1::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Auto => Self::Unspecified,
            Transport::Rdma => Self::Rdma,
            Transport::Stream => Self::Stream,
        }
    }
}

impl From<v1::Transport> for Transport {
    fn from(wire: v1::Transport) -> Self {
        match wire {
            v1::Transport::Unspecified => Self::Auto,
            v1::Transport::Rdma => Self::Rdma,
            v1::Transport::Stream => Self::Stream,
        }
    }
}

/// As the server's log and audit write it.
impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}.{}", self.incarnation, self.counter)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::ReadWrite => "read-write",
        })
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Rdma => "rdma",
            Self::Stream => "stream",
        })
    }
}

impl fmt::Display for GuardTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lease => "lease",
            Self::Delegation => "delegation",
            Self::Unguarded => "unguarded",
            Self::ReadDelegation => "delegation (read)",
            Self::Sealed => "sealed",
            Self::NotNeeded => "not needed",
            Self::Unknown => "unknown",
        })
    }
}

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Commit => f.write_str("commit"),
            Self::Flush => f.write_str("flush"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wire() -> v1::PinResponse {
        let segment = |file_offset, length, remote_address| v1::Segment {
            file_offset,
            length,
            remote_address,
            remote_key: 7,
        };
        v1::PinResponse {
            pin_id: 1,
            generation: Some(v1::Generation { incarnation: 2, counter: 3 }),
            identity: Some(v1::FileIdentity { device: 4, inode: 5, birth_time_ns: 6 }),
            range: Some(v1::ByteRange { start: 100, end: 300 }),
            segments: vec![segment(100, 150, 0x1000), segment(250, 50, 0x9000)],
            access: v1::Access::ReadWrite.into(),
            guard: v1::GuardTier::Lease.into(),
            valid_end: 280,
            durability: vec![v1::Durability::Commit.into(), 99],
            ..Default::default()
        }
    }

    #[test]
    fn a_good_grant_is_taken() {
        let grant = Grant::parse(wire(), 0).unwrap();
        assert_eq!(grant.range, 100..300);
        assert_eq!(grant.usable(), 100..280);
        assert_eq!(grant.durability, [Durability::Commit]);
        assert_eq!(grant.quirks.start_alignment_bytes, 1);
    }

    #[test]
    fn who_offers_no_flush_says_why() {
        let because = |wire| Grant::parse(wire, 0).unwrap().no_flush_because;
        assert_eq!(because(wire()).unwrap(), "this server knows no RDMA FLUSH");
        let no_flush_because = "the driver has none".to_owned();
        assert_eq!(
            because(v1::PinResponse { no_flush_because, ..wire() }).unwrap(),
            "the driver has none"
        );
        let durability = vec![v1::Durability::Commit.into(), v1::Durability::Flush.into()];
        let flushing = v1::PinResponse { durability, ..wire() };
        assert_eq!(because(flushing.clone()), None);
        let offers = Grant::parse(flushing, 0).unwrap().durability;
        assert_eq!(offers, [Durability::Commit, Durability::Flush]);
    }

    #[test]
    fn every_guard_has_a_name() {
        for (number, name) in [
            "unknown",
            "lease",
            "delegation",
            "unguarded",
            "delegation (read)",
            "sealed",
            "not needed",
            "unknown",
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(GuardTier::from_wire(number as i32).to_string(), name);
        }
    }

    #[test]
    fn a_grant_past_the_end_of_the_file_has_nothing_usable() {
        let grant = Grant::parse(v1::PinResponse { valid_end: 50, ..wire() }, 0).unwrap();
        assert!(grant.usable().is_empty());
    }

    #[test]
    fn segments_may_start_late_and_end_late() {
        let mut late = wire();
        late.segments[0].file_offset += 10;
        late.segments[0].length -= 10;
        late.segments[1].length += 1000;
        let grant = Grant::parse(late, 1300).unwrap();
        assert_eq!((grant.range, grant.reserved_end), (100..300, 1300));
        assert_eq!(grant.no_rdma_because, None);
    }

    #[test]
    fn without_segments_what_was_asked_for_is_reserved() {
        let mut stream = wire();
        stream.segments.clear();
        stream.no_rdma_because = "no device".to_owned();
        let grant = Grant::parse(stream.clone(), 900).unwrap();
        assert_eq!(grant.reserved_end, 900);
        assert_eq!(grant.no_rdma_because.as_deref(), Some("no device"));
        assert_eq!(Grant::parse(stream, 0).unwrap().reserved_end, 300);
    }

    #[test]
    fn segments_must_cover_the_range() {
        for break_it in [
            (|wire| wire.segments[1].file_offset = 251) as fn(&mut v1::PinResponse),
            |wire| wire.segments[1].file_offset = 249,
            |wire| wire.segments[1].length = 49,
            |wire| wire.segments[0].file_offset = 99,
            |wire| wire.segments[1].length = u64::MAX,
            |wire| wire.segments[0].remote_address = u64::MAX - 10,
            |wire| wire.range = Some(v1::ByteRange { start: 300, end: 100 }),
            |wire| wire.range = None,
            |wire| wire.generation = None,
            |wire| wire.identity = None,
            |wire| wire.access = 0,
        ] {
            let mut broken = wire();
            break_it(&mut broken);
            assert!(Grant::parse(broken.clone(), 0).is_err(), "{broken:?}");
        }
    }
}
