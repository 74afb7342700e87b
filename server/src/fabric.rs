//! The server's RDMA device, tested before it is trusted, and what sessions and pins have on it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use pinfold_leases::{Mapping, MappingKind, PinnedShare, Share};
use pinfold_verbs::checkup::Examined;
use pinfold_verbs::{
    Access, Connected, Device, Endpoint, MemoryRegion, Mtu, ProtectionDomain, QueuePair,
    QueuePairBuilder, Quirks, RegionCost, RegistrationMode, flush_test, region_cost, self_test,
    with_causes,
};

use crate::config::DeviceChoice;
use crate::error::{Error, Result};
use crate::held::HeldFile;
use crate::registry::{PinAccess, Refusal};
use crate::revocation_cost::Charge;

/// Borders of segments lie on a multiple of this, so that a huge page is not cut.
const SEGMENT_BORDER: u64 = 2 << 20;
/// A region is invalidated and deregistered in one go, and what else the process has waits for that.
const LARGEST_ON_DEMAND: u64 = 4 << 30;
/// Pinning takes some 40 ms for 16 MiB (rxe), and a fence waits for the call that is under way.
const LARGEST_PINNED: u64 = 256 << 20;

/// A device and what its self-test found.
#[derive(Debug)]
pub(crate) struct Fabric {
    device: Device,
    /// For registration that follows page tables: its rules, or why it can't be used.
    on_demand: Result<Quirks, String>,
    /// For registration that pins pages.
    pinned: Result<Quirks, String>,
    /// Whether clients can flush with it what is registered on demand, or why they can't.
    flush: Result<(), String>,
    on_demand_cost: RegionCost,
    pinned_cost: RegionCost,
}

impl Fabric {
    /// Opens the devices and tests each in a loop with itself, which takes a second or two. None
    /// where there is none and none was asked for by name.
    pub(crate) fn open_all(choices: &[DeviceChoice]) -> Result<Vec<Self>> {
        let mut fabrics: Vec<Self> = Vec::new();
        for choice in choices {
            let device = match choice {
                DeviceChoice::None => continue,
                DeviceChoice::Named(name) => Device::open(name)?,
                DeviceChoice::Auto => match Device::open_first() {
                    Ok(device) => device,
                    Err(pinfold_verbs::Error::NoDevice) => continue,
                    Err(error) => return Err(error.into()),
                },
            };
            if fabrics.iter().all(|known| known.device.name() != device.name()) {
                fabrics.push(Self::test(device));
            }
        }
        Ok(fabrics)
    }

    fn test(device: Device) -> Self {
        let on_demand = tested(&device, RegistrationMode::OnDemand);
        let pinned = tested(&device, RegistrationMode::Pinned);
        let flush = flush_test(&device).map_err(|error| with_causes(&error));
        if let Err(reason) = &flush {
            tracing::info!(device = device.name(), reason, "no RDMA FLUSH");
        }
        let on_demand_cost = cost(&device, RegistrationMode::OnDemand, &on_demand);
        let pinned_cost = cost(&device, RegistrationMode::Pinned, &pinned);
        Self { device, on_demand, pinned, flush, on_demand_cost, pinned_cost }
    }

    /// One that has been tested already.
    pub(crate) fn examined(examined: Examined) -> Self {
        let Examined { device, on_demand, pinned, flush } = examined;
        let on_demand_cost = RegionCost::assumed(&device, RegistrationMode::OnDemand);
        let pinned_cost = RegionCost::assumed(&device, RegistrationMode::Pinned);
        Self { device, on_demand, pinned, flush, on_demand_cost, pinned_cost }
    }

    /// The device.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    /// Whether fs-DAX files can be registered.
    pub(crate) fn on_demand_paging(&self) -> bool {
        self.on_demand.is_ok()
    }

    /// How memory of this kind is to be registered, and by which rules; or why it can't be.
    pub(crate) fn mode_for(&self, kind: MappingKind) -> Result<(RegistrationMode, &Quirks), &str> {
        let (mode, tested) = match kind {
            // The kernel refuses to pin fs-DAX pages for long, and page cache for writing.
            MappingKind::FsDax | MappingKind::PageCache => {
                (RegistrationMode::OnDemand, &self.on_demand)
            }
            MappingKind::SharedMemory => (RegistrationMode::Pinned, &self.pinned),
            // Pinning works too, but does not hold the device: once it is taken from its driver, what
            // pins its pages writes to memory that is somebody else's (rxe: the kernel dies of it).
            MappingKind::DeviceDax => match &self.on_demand {
                Err(_) if self.pinned.is_ok() => (RegistrationMode::Pinned, &self.pinned),
                on_demand => (RegistrationMode::OnDemand, on_demand),
            },
        };
        tested.as_ref().map(|quirks| (mode, quirks)).map_err(String::as_str)
    }

    /// What regions of this kind cost.
    pub(crate) fn cost_of(&self, mode: RegistrationMode) -> &RegionCost {
        match mode {
            RegistrationMode::OnDemand => &self.on_demand_cost,
            RegistrationMode::Pinned => &self.pinned_cost,
        }
    }

    /// Whether a client may flush by itself what is mapped in this way, or why not. The device takes it
    /// for any memory, also such as loses all with the power.
    pub(crate) fn flush_for(&self, file: &HeldFile, access: PinAccess) -> Result<(), String> {
        let why = match (file.kind(), access) {
            (_, PinAccess::Read) => "the pin is for reading only".to_owned(),
            (MappingKind::FsDax, _) if file.map_sync() => return self.flush.clone(),
            (MappingKind::FsDax, _) => {
                "the mapping did not take MAP_SYNC, so that the file system has \
                                        a part in making writes durable"
                    .to_owned()
            }
            (kind, _) => format!("the file is {kind}, and only fs-DAX is flushed by the NIC"),
        };
        Err(why)
    }

    /// Whether a client may use atomics on what is registered by these rules, or why not.
    pub(crate) fn atomics_for(&self, quirks: &Quirks, access: PinAccess) -> Result<(), String> {
        match access {
            PinAccess::Read => Err("the pin is for reading only".to_owned()),
            PinAccess::ReadWrite if quirks.atomics => Ok(()),
            PinAccess::ReadWrite => {
                let device = self.device.name();
                Err(format!("RDMA device {device} of the server has none that work for this file"))
            }
        }
    }

    /// Whether a client may write 8 bytes as one step to what is registered by these rules, or why not. The
    /// keys don't tell it from a write, so this is what the device can, and no right.
    pub(crate) fn atomic_write_for(
        &self,
        quirks: &Quirks,
        access: PinAccess,
    ) -> Result<(), String> {
        match access {
            PinAccess::Read => Err("the pin is for reading only".to_owned()),
            PinAccess::ReadWrite => quirks.atomic_write.map_err(|why| {
                let device = self.device.name();
                format!("RDMA device {device} of the server can't be used for it: {why}")
            }),
        }
    }

    /// What a session's connection allows; each key narrows it further.
    fn access(&self) -> Access {
        let remote_atomic = self.tested().any(|quirks| quirks.atomics);
        Access { remote_flush: self.flush.is_ok(), remote_atomic, ..Access::REMOTE_READ_WRITE }
    }

    /// The rules of each kind of registration that can be used.
    fn tested(&self) -> impl Iterator<Item = &Quirks> {
        [&self.on_demand, &self.pinned].into_iter().filter_map(|tested| tested.as_ref().ok())
    }

    /// The path MTU of a connection: what both ends can do and every kind of registration needs.
    fn path_mtu(&self, client: &Endpoint, server: &Endpoint) -> Result<Mtu> {
        let possible = client.path_mtu_bytes.min(server.path_mtu_bytes);
        let demanded = self.tested().filter_map(|quirks| quirks.path_mtu_bytes).max();
        match demanded {
            Some(bytes) if bytes > possible => Err(Error::QueuePair {
                why: format!(
                    "{} places data rightly only with a path MTU of {bytes}, and this path can do \
                     {possible}; set the MTU of the network interfaces on both hosts to 4200 or more",
                    self.device.name()
                ),
            }),
            Some(bytes) => Mtu::from_bytes(bytes).ok_or_else(|| bad_mtu(bytes)),
            None => Mtu::largest_within(possible).ok_or_else(|| bad_mtu(possible)),
        }
    }
}

fn bad_mtu(bytes: u32) -> Error {
    Error::QueuePair { why: format!("{bytes} bytes are no path MTU; 256 to 4096 are") }
}

fn tested(device: &Device, mode: RegistrationMode) -> Result<Quirks, String> {
    match self_test(device, mode) {
        Ok(report) => {
            tracing::info!(device = device.name(), %mode, quirks = %report.quirks,
                elapsed_ms = report.elapsed.as_millis() as u64, "self-test passed");
            Ok(report.quirks)
        }
        Err(error) => {
            let reason = with_causes(&error);
            tracing::warn!(device = device.name(), %mode, %reason, "self-test failed");
            Err(reason)
        }
    }
}

/// Measured, or where that can't be done a conservative figure.
fn cost(device: &Device, mode: RegistrationMode, tested: &Result<Quirks, String>) -> RegionCost {
    let Ok(quirks) = tested else { return RegionCost::assumed(device, mode) };
    match region_cost(device, mode, quirks.max_region_bytes) {
        Ok(cost) => {
            tracing::info!(device = device.name(), %mode, %cost, "regions measured");
            cost
        }
        Err(error) => {
            let (cost, error) = (RegionCost::assumed(device, mode), with_causes(&error));
            tracing::warn!(device = device.name(), %mode, error, %cost, "regions could not be measured");
            cost
        }
    }
}

/// Queue pairs of a session. More than a client has threads that post are of no use to it.
pub(crate) const QUEUE_PAIRS_MAX: u32 = 64;

/// What a session has on a device: a protection domain of its own, so that its keys work on no
/// other session's queue pairs, and some queue pairs.
#[derive(Debug)]
pub(crate) struct Link {
    fabric: Arc<Fabric>,
    domain: ProtectionDomain,
    /// By the client's numbers for them.
    queue_pairs: BTreeMap<u32, QueuePair<Connected>>,
}

/// A queue pair on its way into a [`Link`].
#[derive(Debug)]
pub(crate) struct Connection {
    queue_pair: QueuePair<Connected>,
    /// For the client: our end, and the path MTU to use.
    pub(crate) answer: (Endpoint, Mtu),
}

impl Link {
    /// An unconnected one.
    pub(crate) fn new(fabric: Arc<Fabric>) -> Result<Self> {
        let domain = ProtectionDomain::new(&fabric.device)?;
        Ok(Self { fabric, domain, queue_pairs: BTreeMap::new() })
    }

    /// The same session's without a queue pair, to connect one with while others use this.
    pub(crate) fn beside(&self) -> Self {
        let (fabric, domain) = (Arc::clone(&self.fabric), self.domain.clone());
        Self { fabric, domain, queue_pairs: BTreeMap::new() }
    }

    /// The device that it is on.
    pub(crate) fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// The session's protection domain, once it has a queue pair.
    pub(crate) fn domain(&self) -> Option<&ProtectionDomain> {
        (!self.queue_pairs.is_empty()).then_some(&self.domain)
    }

    /// Connects a new queue pair to the client's. Address resolution in the kernel may block for a
    /// second.
    pub(crate) fn connect(&self, client: &Endpoint) -> Result<Connection> {
        let queue_pair =
            QueuePairBuilder::new(&self.domain).remote_access(self.fabric.access()).build()?;
        let server = queue_pair.endpoint();
        let mtu = self.fabric.path_mtu(client, &server)?;
        let connected = queue_pair.connect(client, mtu).map_err(|failed| Error::QueuePair {
            why: with_causes(&pinfold_verbs::Error::from(failed)),
        })?;
        Ok(Connection { queue_pair: connected, answer: (server, mtu) })
    }

    /// Takes a new queue pair in under a number. The one before is to be destroyed before the client is
    /// answered.
    pub(crate) fn take_in(&mut self, number: u32, connection: Connection) -> Severed {
        Severed(self.queue_pairs.insert(number, connection.queue_pair).into_iter().collect())
    }

    /// Takes the queue pairs out, to be destroyed where nobody waits for a lock on this.
    pub(crate) fn sever(&mut self) -> Severed {
        Severed(std::mem::take(&mut self.queue_pairs).into_values().collect())
    }
}

/// Queue pairs that belong to no session any more.
#[derive(Debug, Default)]
#[must_use = "they transfer until they are destroyed"]
pub(crate) struct Severed(Vec<QueuePair<Connected>>);

impl Severed {
    /// Has them take no more requests. This waits for none that is under way, as their end does, which can
    /// hang with a write that hangs in a fault.
    pub(crate) fn stop(&self) {
        self.0.iter().for_each(|queue_pair| said(queue_pair.fail()));
    }

    /// Destroys the queue pairs: when this returns, no request of theirs lands any more.
    pub(crate) fn destroy(self) {
        self.0.into_iter().for_each(|queue_pair| said(queue_pair.destroy()));
    }
}

fn said(ended: std::result::Result<(), pinfold_verbs::Error>) {
    if let Err(error) = ended {
        tracing::error!(error = with_causes(&error), "a queue pair could not be stopped");
    }
}

/// One memory region over a part of a pin.
#[derive(Debug)]
pub(crate) struct Segment {
    /// Bytes of the file.
    pub range: Range<u64>,
    region: Region,
    /// Given back with the region, never before.
    charge: Charge,
}

#[derive(Debug)]
enum Region {
    OnDemand(MemoryRegion<Share>),
    Pinned(MemoryRegion<PinnedShare>),
}

impl Segment {
    /// The key to it.
    pub(crate) fn remote_key(&self) -> u32 {
        match &self.region {
            Region::OnDemand(region) => region.remote_key().get(),
            Region::Pinned(region) => region.remote_key().get(),
        }
    }

    /// What to put in a request for its first byte.
    pub(crate) fn remote_address(&self) -> u64 {
        match &self.region {
            Region::OnDemand(region) => region.remote_address(),
            Region::Pinned(region) => region.remote_address(),
        }
    }

    /// Deregisters. When this returns `Ok` the key is dead and the share of the mapping returned; on
    /// failure the key lives, and the segment comes back to be tried again.
    #[allow(
        clippy::result_large_err,
        reason = "to box it takes memory, while a fence waits for it"
    )]
    pub(crate) fn deregister(self) -> Result<(), (Self, String)> {
        let Self { range, region, charge } = self;
        let failed = match region {
            Region::OnDemand(region) => region.deregister().err().map(|failed| {
                let error = failed.to_string();
                (Region::OnDemand(failed.into_region()), error)
            }),
            Region::Pinned(region) => region.deregister().err().map(|failed| {
                let error = failed.to_string();
                (Region::Pinned(failed.into_region()), error)
            }),
        };
        match failed {
            None => Ok(()),
            Some((region, error)) => Err((Self { range, region, charge }, error)),
        }
    }
}

/// How a range is to be registered.
#[derive(Debug)]
pub(crate) struct Manner<'a> {
    /// What the kind of mapping demands.
    pub(crate) mode: RegistrationMode,
    /// What the device demands.
    pub(crate) quirks: &'a Quirks,
    /// What the client may do.
    pub(crate) access: PinAccess,
    /// And flush.
    pub(crate) flush: bool,
}

/// The regions that a range is registered as: one, or several where the device allows none so large,
/// or where one call would take so long that a fence had to wait for it.
pub(crate) fn regions(
    range: Range<u64>,
    mode: RegistrationMode,
    quirks: &Quirks,
) -> Vec<Range<u64>> {
    let largest = match mode {
        RegistrationMode::OnDemand => quirks.max_region_bytes.min(LARGEST_ON_DEMAND),
        RegistrationMode::Pinned => quirks.max_region_bytes.min(LARGEST_PINNED),
    };
    pieces(range, largest)
}

/// Registers ranges of a mapping, one region each. Stops between two when `go_on` says no.
pub(crate) fn register(
    domain: &ProtectionDomain,
    mapping: &Mapping,
    ranges: Vec<(Range<u64>, Charge)>,
    manner: &Manner<'_>,
    go_on: impl Fn() -> bool,
) -> Result<Vec<Segment>> {
    let access = match manner.access {
        PinAccess::Read => Access::REMOTE_READ,
        PinAccess::ReadWrite => Access {
            remote_flush: manner.flush,
            remote_atomic: manner.quirks.atomics,
            ..Access::REMOTE_READ_WRITE
        },
    };
    ranges
        .into_iter()
        .map(|(piece, charge)| {
            if !go_on() {
                return Err(Refusal::Draining.into());
            }
            let bytes = piece.start as usize..piece.end as usize;
            let region = match manner.mode {
                RegistrationMode::OnDemand => {
                    let share = mapping.share()?;
                    let made = domain.register_on_demand(share, bytes, access);
                    Region::OnDemand(made.map_err(pinfold_verbs::Error::from)?)
                }
                RegistrationMode::Pinned => {
                    let share = mapping.pinned_share()?;
                    let made = domain.register_pinned(share, bytes, access);
                    Region::Pinned(made.map_err(pinfold_verbs::Error::from)?)
                }
            };
            Ok(Segment { range: piece, region, charge })
        })
        .collect()
}

/// Cuts a range into pieces of at most `largest` bytes, at multiples of 2 MiB.
fn pieces(range: Range<u64>, largest: u64) -> Vec<Range<u64>> {
    let step = (largest / SEGMENT_BORDER * SEGMENT_BORDER).max(SEGMENT_BORDER);
    let mut pieces = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let aligned = at / SEGMENT_BORDER * SEGMENT_BORDER;
        let end = range.end.min(aligned.saturating_add(step));
        pieces.push(at..end);
        at = end;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_small_range_is_one_piece_to_the_byte() {
        assert_eq!(pieces(5..333, 2048 * MIB - 4096), vec![5..333; 1]);
    }

    #[test]
    fn a_large_range_is_cut_at_huge_pages_without_gaps() {
        let range = 3 * MIB + 7..20 * MIB + 1;
        let cut = pieces(range.clone(), 8 * MIB - 4096);
        assert_eq!(cut.first().unwrap().start, range.start);
        assert_eq!(cut.last().unwrap().end, range.end);
        for pair in cut.windows(2) {
            assert_eq!(pair[0].end, pair[1].start);
            assert_eq!(pair[0].end % SEGMENT_BORDER, 0);
        }
        assert!(cut.iter().all(|piece| piece.end - piece.start <= 6 * MIB), "{cut:?}");
    }

    #[test]
    fn no_region_takes_long_on_a_device_without_a_limit() {
        use RegistrationMode::{OnDemand, Pinned};
        let cut = |mode| regions(0..1 << 40, mode, &Quirks::NONE);
        assert_eq!((cut(OnDemand).len(), cut(Pinned).len()), (256, 4096));
        let limited = Quirks { max_region_bytes: (2 << 30) - 4096, ..Quirks::NONE };
        assert_eq!(regions(0..1 << 40, OnDemand, &limited).len(), 513);
    }
}
