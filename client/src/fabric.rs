//! This host's RDMA device, which can outlive a session, and a session's use of it: lanes that are
//! made anew when they break.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{self, Arc, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use pinfold_proto::v1;
use pinfold_verbs::{
    Buffer, CompletionStatus, Device, Endpoint, Gid, Mtu, PROBE_BYTES, Piece, ProtectionDomain,
    QueuePairNumber, UnconnectedLane,
};
use tokio::sync::{Mutex, SemaphorePermit, watch};

use crate::control::Control;
use crate::lane::{Asked, InFlight, Lost, NotPosted, SharedLane};
use crate::patience::Patience;
use crate::pin_state::Gone;
use crate::pin_table::PinCell;
use crate::transfer::Transfer;
use crate::{Buffer as AnyBuffer, BufferPool, ConnectOptions, Error, Loss, RdmaDevice, buffer};

/// A lane can break between the moment it was found live and the moment it takes the work. More
/// often than this in a row is no accident.
const LANES_PER_OPERATION: usize = 3;

/// An open device and what is registered with it.
#[derive(Debug)]
pub(crate) struct LocalDevice {
    id: DeviceId,
    domain: ProtectionDomain,
    depth: u32,
    poll_at_most: Duration,
    /// For what reads a few bytes only, one after the other: kept, as to register one costs more.
    small_buffers: sync::Mutex<Vec<Buffer>>,
}

/// A session's lanes, at least one. All are on the same device.
#[derive(Debug)]
pub(crate) struct Fabrics(Vec<Arc<Fabric>>);

/// A device, and one of a session's lanes on it.
#[derive(Debug)]
pub(crate) struct Fabric {
    device: Arc<LocalDevice>,
    /// Which of the server's devices to connect to; empty: its first.
    server_device: String,
    /// Of the lane in its session.
    number: u32,
    lane: sync::Mutex<Weak<SharedLane>>,
    /// Held by who connects.
    connecting: Mutex<()>,
    /// For the lanes: somebody waits for what is in flight.
    urges: watch::Receiver<()>,
}

/// Tells the buffers of one opening of a device from those of another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct DeviceId(u64);

impl DeviceId {
    fn next() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

/// An operation on its way to the lane.
pub(crate) struct Operation<'a> {
    pub(crate) asked: Asked,
    /// At most [`Fabric::depth`] of them.
    pub(crate) pieces: &'a [Piece],
    pub(crate) buffer: Buffer,
    pub(crate) of: Of<'a>,
}

/// What an operation is a part of.
#[derive(Clone, Copy)]
pub(crate) enum Of<'a> {
    /// It goes to no pin.
    Nothing,
    Transfer(&'a Transfer<'a>),
    /// It is a transfer by itself.
    Pin(&'a Arc<PinCell>),
}

/// Why an operation was not begun at once.
pub(crate) enum NotBegun {
    /// There is no lane, or no room in its send queue; with the buffer.
    MustWait(Buffer),
    /// It can't be.
    Failed(Failure, Buffer),
}

/// Why an operation has no completion.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The pin takes none.
    Gone(Gone),
    /// Its completion can't be had, and the buffer is gone with it.
    Lost,
    /// It was never posted.
    Error(Error),
}

impl LocalDevice {
    /// Opens a device; `None` if none is wanted.
    pub(crate) async fn open(options: &ConnectOptions) -> Result<Option<Self>, Error> {
        let choice = options.rdma_device.clone();
        let open = move || match choice {
            RdmaDevice::Auto => Device::open_first().map(Some),
            RdmaDevice::Named(name) => Device::open(&name).map(Some),
            RdmaDevice::None => Ok(None),
        };
        let device = blocking(open).await.map_err(|source| Error::NoRdmaDevice { source })?;
        let Some(device) = device else {
            return Ok(None);
        };
        let depth = options.send_window.clamp(1, device.capabilities().max_qp_wr.max(1));
        let domain = ProtectionDomain::new(&device)
            .map_err(|source| Error::Verbs { doing: "allocate a protection domain", source })?;
        let small_buffers = sync::Mutex::default();
        let (id, poll_at_most) = (DeviceId::next(), options.poll_at_most);
        Ok(Some(Self { id, domain, depth, poll_at_most, small_buffers }))
    }

    /// Allocates and registers a buffer.
    pub(crate) async fn buffer(&self, capacity: usize) -> Result<AnyBuffer, Error> {
        let mut registered = self.registered(capacity).await?;
        // Shortening can't fail.
        let _ = registered.set_len(capacity);
        Ok(AnyBuffer::registered(registered, self.id))
    }

    /// Allocates and registers several.
    pub(crate) async fn buffer_pool(
        &self,
        count: usize,
        capacity: usize,
    ) -> Result<BufferPool, Error> {
        let domain = self.domain.clone();
        let pool =
            blocking(move || pinfold_verbs::BufferPool::new(&domain, count, capacity.max(1)))
                .await
                .map_err(|source| Error::Verbs { doing: "register buffers", source })?;
        Ok(BufferPool::registered(pool, self.id))
    }

    async fn registered(&self, capacity: usize) -> Result<Buffer, Error> {
        let whole = buffer::whole_grains(capacity).unwrap_or(capacity);
        let domain = self.domain.clone();
        blocking(move || Buffer::new(&domain, whole))
            .await
            .map_err(|source| Error::Verbs { doing: "register a buffer", source })
    }

    fn kept_small_buffers(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.small_buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fabrics {
    /// A session's use of a device, by so many lanes.
    pub(crate) fn new(
        device: &Arc<LocalDevice>,
        server_device: &str,
        lanes: u32,
        urges: &watch::Receiver<()>,
    ) -> Self {
        let fabric = |number| {
            Arc::new(Fabric {
                device: device.clone(),
                server_device: server_device.to_owned(),
                number,
                lane: sync::Mutex::default(),
                connecting: Mutex::default(),
                urges: urges.clone(),
            })
        };
        Self((0..lanes.max(1)).map(fabric).collect())
    }

    /// For what goes to no pin.
    pub(crate) fn first(&self) -> &Arc<Fabric> {
        &self.0[0]
    }

    /// The one with the fewest pins.
    pub(crate) fn emptiest(&self) -> Arc<Fabric> {
        let pins = |fabric: &&Arc<Fabric>| Arc::strong_count(fabric);
        self.0.iter().min_by_key(pins).unwrap_or(self.first()).clone()
    }
}

impl Fabric {
    /// What it is a use of.
    pub(crate) fn device(&self) -> &Arc<LocalDevice> {
        &self.device
    }

    /// What the device's buffers are known by.
    pub(crate) fn id(&self) -> DeviceId {
        self.device.id
    }

    /// How many requests fit in the send queue.
    pub(crate) fn depth(&self) -> usize {
        self.device.depth as usize
    }

    /// Whether this host can ask for RDMA FLUSH; false also while there is no lane.
    pub(crate) fn can_flush(&self) -> bool {
        self.open_lane().is_some_and(|lane| lane.can_flush())
    }

    /// A buffer for a few bytes: for [`Reach::probe`](crate::plan::Reach::probe), or an atomic.
    pub(crate) async fn small_buffer(&self) -> Result<Buffer, Error> {
        let kept = self.device.kept_small_buffers().pop();
        match kept {
            Some(buffer) => Ok(buffer),
            None => self.device.registered(PROBE_BYTES).await,
        }
    }

    /// Keeps it for the next one.
    pub(crate) fn return_small_buffer(&self, buffer: Buffer) {
        self.device.kept_small_buffers().push(buffer);
    }

    /// Connects a lane, if there is none.
    pub(crate) async fn ensure_lane(self: &Arc<Self>, control: &Control) -> Result<(), Error> {
        self.lane(control).await.map(drop)
    }

    async fn lane(self: &Arc<Self>, control: &Control) -> Result<Arc<SharedLane>, Error> {
        if let Some(lane) = self.open_lane() {
            return Ok(lane);
        }
        let (fabric, for_calls) = (self.clone(), control.clone());
        // To its end, also if nobody waits for it: else the server would be left with half of a queue
        // pair, and the next one could be begun before this one has ended there.
        let connecting = async move { fabric.connected_lane(&for_calls).await };
        let connected = control.to_the_end(connecting).await;
        connected.unwrap_or_else(|| Err(control.lost(Loss::Closed)))
    }

    async fn connected_lane(&self, control: &Control) -> Result<Arc<SharedLane>, Error> {
        let _connecting = self.connecting.lock().await;
        // Another may have connected one meanwhile.
        if let Some(lane) = self.open_lane() {
            return Ok(lane);
        }
        let lane = self.connect(control).await?;
        *self.kept_lane() = lane.clone();
        lane.upgrade().ok_or_else(|| lost("connect a queue pair".to_owned()))
    }

    fn open_lane(&self) -> Option<Arc<SharedLane>> {
        self.kept_lane().upgrade().filter(|lane| lane.is_open())
    }

    fn kept_lane(&self) -> MutexGuard<'_, Weak<SharedLane>> {
        self.lane.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs an operation to its completion, waiting for room in the send queue. The buffer comes
    /// back, except when the completion can't be had.
    pub(crate) async fn run(
        self: &Arc<Self>,
        control: &Control,
        operation: Operation<'_>,
    ) -> Result<(Buffer, CompletionStatus), (Failure, Option<Buffer>)> {
        let Operation { asked, pieces, mut buffer, of } = operation;
        for _ in 0..LANES_PER_OPERATION {
            let lane = match self.lane(control).await {
                Ok(lane) => lane,
                Err(error) => return Err((Failure::Error(error), Some(buffer))),
            };
            let Ok(room) = lane.room(pieces.len() as u32).await else {
                continue;
            };
            let begun = post(&lane, room, Operation { asked, pieces, buffer, of });
            drop(lane);
            match begun {
                Ok(in_flight) => return in_flight.await.map_err(|Lost| (Failure::Lost, None)),
                Err(NotBegun::MustWait(back)) => buffer = back,
                Err(NotBegun::Failed(failure, buffer)) => return Err((failure, Some(buffer))),
            }
        }
        Ok((buffer, CompletionStatus::Flushed))
    }

    /// Begins an operation, if that can be done without waiting.
    pub(crate) fn begin(&self, operation: Operation<'_>) -> Result<InFlight, NotBegun> {
        let Some(lane) = self.kept_lane().upgrade() else {
            return Err(NotBegun::MustWait(operation.buffer));
        };
        match lane.room_now(operation.pieces.len() as u32) {
            Some(room) => post(&lane, room, operation),
            None => Err(NotBegun::MustWait(operation.buffer)),
        }
    }

    async fn connect(&self, control: &Control) -> Result<Weak<SharedLane>, Error> {
        let (domain, depth) = (self.device.domain.clone(), self.device.depth);
        let lane = blocking(move || UnconnectedLane::new(&domain, depth))
            .await
            .map_err(|source| Error::Verbs { doing: "create a queue pair", source })?;
        let ours = to_wire(&lane.endpoint());
        let connected = control.connect_queue_pair(ours, &self.server_device, self.number);
        let (server, path_mtu_bytes) = connected.await?;
        let unusable = |what| Error::Protocol { doing: "connect a queue pair".to_owned(), what };
        let server = from_wire(&server).ok_or_else(|| unusable("an unusable endpoint"))?;
        let path_mtu = Mtu::from_bytes(path_mtu_bytes).ok_or_else(|| unusable("no path MTU"))?;
        let lane = blocking(move || lane.connect(&server, path_mtu)).await.map_err(|failed| {
            Error::Verbs { doing: "connect a queue pair", source: failed.into() }
        })?;
        tracing::debug!(number = self.number, path_mtu_bytes, "lane connected");
        let patience = Patience::new(self.device.poll_at_most);
        Ok(SharedLane::start(lane, patience, control.clone(), self.urges.clone()).await)
    }
}

/// Posts an operation for which there is room.
fn post(
    lane: &Arc<SharedLane>,
    room: SemaphorePermit<'_>,
    operation: Operation<'_>,
) -> Result<InFlight, NotBegun> {
    let Operation { asked, pieces, buffer, of } = operation;
    // Last, so that whoever waits for room does not hold up a drain.
    let begun = match of {
        Of::Nothing => Ok(None),
        Of::Transfer(transfer) => transfer.begin().map(Some),
        Of::Pin(cell) => cell.begin(None).map(Some),
    };
    let ticket = match begun {
        Ok(ticket) => ticket,
        Err(gone) => return Err(NotBegun::Failed(Failure::Gone(gone), buffer)),
    };
    lane.post(asked, buffer, pieces, room, ticket).map_err(|not_posted| match not_posted {
        NotPosted::Closed(buffer) => NotBegun::MustWait(buffer),
        NotPosted::Refused(buffer, source) => {
            let error = Error::Verbs { doing: "post a request", source };
            NotBegun::Failed(Failure::Error(error), buffer)
        }
    })
}

/// Nobody knows how it ended.
pub(crate) fn lost(doing: String) -> Error {
    Error::LaneLost { doing, status: CompletionStatus::Flushed }
}

/// Verbs make system calls that can take a while: registering pins pages, connecting resolves the
/// peer's address.
async fn blocking<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(call).await {
        Ok(value) => value,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

fn to_wire(endpoint: &Endpoint) -> v1::Endpoint {
    v1::Endpoint {
        queue_pair_number: endpoint.queue_pair_number.get(),
        packet_sequence_number: endpoint.packet_sequence_number,
        gid: endpoint.gid.octets().to_vec(),
        lid: endpoint.lid.into(),
        max_path_mtu_bytes: endpoint.path_mtu_bytes,
    }
}

/// `None` for what no device can have; the rest is checked by `connect`.
fn from_wire(endpoint: &v1::Endpoint) -> Option<Endpoint> {
    Some(Endpoint {
        queue_pair_number: QueuePairNumber::new(endpoint.queue_pair_number),
        packet_sequence_number: endpoint.packet_sequence_number,
        gid: Gid::new(endpoint.gid.as_slice().try_into().ok()?),
        lid: endpoint.lid.try_into().ok()?,
        path_mtu_bytes: endpoint.max_path_mtu_bytes,
    })
}
