//! A session: everything a client has at a server hangs off one.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use pinfold_proto::v1::session_event::Event as Heard;
use pinfold_proto::v1::session_request::Message as Said;
use pinfold_verbs::{CompletionStatus, Piece, RemoteSlice, with_causes};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::control::{Control, LastAnswer};
use crate::event::Events;
use crate::fabric::{self, Fabric, Fabrics, Failure, LocalDevice, Of, Operation};
use crate::file::FileName;
use crate::grant::Malformed;
use crate::lane::{Asked, Direction};
use crate::pace::Pace;
use crate::pin_table::{PinCell, PinTable};
use crate::stream::{EventHub, Rhythm, SessionStream};
use crate::{
    Buffer, BufferPool, ConnectOptions, Created, Entry, Error, FileStat, Grant, GuardTier,
    IfExists, Inspection, Loss, Pin, PinRequest, Quieted, RdmaDevice, Reason, Records,
    TransferError, Transport,
};

/// Of what the server sends: each frame costs both sides a system call. A larger one would keep notices
/// waiting behind it.
const FRAME_BYTES_MAX: u32 = 256 << 10;

/// Files and pins on one page of an inspection.
const INSPECT_PAGE: u32 = 4096;

/// The server may take longer pieces of the stream path than it is good to hold in memory.
const STREAM_PIECE_BYTES_MAX: u64 = 1 << 20;

/// A session with a server, kept alive in the background.
///
/// Dropping it ends it, and every pin with it; [`close`](Self::close) waits for that.
#[derive(Debug)]
pub struct Session {
    core: Arc<Core>,
    server_version: String,
    on_server_host: bool,
    /// Says true, or is dropped, to end the session.
    closing: watch::Sender<bool>,
    keeper: JoinHandle<()>,
}

/// What a session and its pins share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) control: Control,
    pub(crate) pins: Arc<PinTable>,
    pub(crate) rdma: Rdma,
    /// Longest piece of the stream path.
    pub(crate) stream_piece_bytes_max: NonZeroU64,
    /// Pin requests so far: each has a number, by which it can be withdrawn.
    pin_requests: AtomicU64,
    /// Takes the numbers of those that are.
    withdrawn: mpsc::UnboundedSender<u64>,
    events: EventHub,
}

/// A pin request that the server may hold up for long. Dropped before its answer, it is withdrawn.
struct Waiting {
    core: Arc<Core>,
    number: u64,
    answered: bool,
}

/// Whether a session can do RDMA.
#[derive(Debug)]
pub(crate) enum Rdma {
    On(Fabrics),
    /// By the stream path only, for this reason.
    Off(String),
}

/// How a pin's bytes are to travel.
struct Way {
    /// What to ask the server for.
    transport: Transport,
    /// The pin's lane, if there is one.
    fabric: Option<Arc<Fabric>>,
    /// If that is less than what was wished: why.
    no_rdma: Option<String>,
}

impl Way {
    fn stream(no_rdma: Option<String>) -> Self {
        Self { transport: Transport::Stream, fabric: None, no_rdma }
    }
}

/// What is there as soon as the server has said `Welcome`. Dropping it ends the session.
struct Kept {
    control: Control,
    /// Lanes that the server allows.
    lanes_max: u32,
    pins: Arc<PinTable>,
    events: EventHub,
    closing: watch::Sender<bool>,
    keeper: JoinHandle<()>,
    withdrawn: mpsc::UnboundedSender<u64>,
}

impl Rdma {
    /// Where what goes to no pin goes.
    fn first(&self) -> Option<&Arc<Fabric>> {
        match self {
            Self::On(fabrics) => Some(fabrics.first()),
            Self::Off(_) => None,
        }
    }
}

impl Session {
    pub(crate) fn session_id(&self) -> Vec<u8> {
        self.core.control.session_id.clone()
    }

    pub(crate) fn control(&self) -> &Control {
        &self.core.control
    }

    /// Opens a session: device, stream, queue pair. Without RDMA it goes by the stream path, unless
    /// a device was asked for by its name.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] and [`Error::NoWelcome`] if the server does not answer;
    /// [`Error::Refused`] with the server's reason. If a device was asked for by its name:
    /// [`Error::NoRdmaDevice`] before anything is sent, [`Error::ServerHasNoRdmaDevice`],
    /// [`Error::Verbs`].
    pub async fn connect(options: ConnectOptions) -> Result<Self, Error> {
        Self::connect_with(options, None).await
    }

    /// As [`connect`](Self::connect), with a device that is open already, and its buffers.
    pub(crate) async fn connect_with(
        options: ConnectOptions,
        device: Option<Arc<LocalDevice>>,
    ) -> Result<Self, Error> {
        let endpoint = parse_endpoint(&options)?;
        let device = match device {
            Some(device) => Ok(device),
            None => open_device(&options).await?,
        };
        let bytes = PinfoldClient::new(endpoint.connect_lazy());
        let channel = endpoint
            .connect()
            .await
            .map_err(|source| Error::Unreachable { endpoint: options.endpoint.clone(), source })?;
        let mut client = PinfoldClient::new(channel);
        let opening = tokio::time::timeout(options.timeout, open_stream(&mut client, &options));
        let opened = opening.await.map_err(|_| Error::NoWelcome {
            endpoint: options.endpoint.clone(),
            waited: options.timeout,
        })??;
        let welcome = &opened.welcome;
        let stream_piece_bytes_max = NonZeroU64::new(welcome.stream_piece_bytes_max.into())
            .ok_or_else(|| Error::from_malformed(NO_STREAM_PATH, OPENING.to_owned()))?
            .min(NonZeroU64::MIN.saturating_add(STREAM_PIECE_BYTES_MAX - 1));
        let device = match device {
            Ok(_) if welcome.rdma_device.is_none() && may_do_without(&options) => {
                Err("the server has no RDMA device".to_owned())
            }
            Ok(_) if welcome.rdma_device.is_none() => {
                return Err(Error::ServerHasNoRdmaDevice { endpoint: options.endpoint });
            }
            device => device,
        };
        let server_version = welcome.server_version.clone();
        let on_server_host =
            pinfold_proto::boot_id().is_some_and(|here| here == welcome.host_boot_id);
        let kept = Kept::start((client, bytes), opened, &options);
        let rdma = connect_device(device, &kept, &options).await?;
        let Kept { control, pins, events, closing, keeper, withdrawn, .. } = kept;
        let core = Core {
            control,
            pins,
            rdma,
            stream_piece_bytes_max,
            // 0 on the wire: without a number.
            pin_requests: AtomicU64::new(1),
            withdrawn,
            events,
        };
        Ok(Self { core: Arc::new(core), server_version, on_server_host, closing, keeper })
    }

    /// Whether pins of this session can go by RDMA.
    pub fn has_rdma(&self) -> bool {
        matches!(self.core.rdma, Rdma::On(_))
    }

    /// Why the session goes by the stream path only, for people; absent if it has RDMA.
    pub fn no_rdma_because(&self) -> Option<&str> {
        match &self.core.rdma {
            Rdma::On(_) => None,
            Rdma::Off(because) => Some(because),
        }
    }

    /// Creates a file of exactly `size` bytes, allocated and zeroed. Its name appears only once all of that is
    /// durable. [`create_with_progress`](Self::create_with_progress) shows how far it is.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], among others with [`Reason::FileExists`](crate::Reason::FileExists),
    /// [`Reason::FilePinned`](crate::Reason::FilePinned) and
    /// [`Reason::NoSpace`](crate::Reason::NoSpace).
    pub async fn create(
        &self,
        export: &str,
        path: &str,
        size: u64,
        if_exists: IfExists,
    ) -> Result<Created, Error> {
        let doing = || format!("create {}", FileName::new(export, path));
        let request = v1::CreateRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
            size,
            if_exists: v1::IfExists::from(if_exists).into(),
        };
        let answer =
            self.core.control.call(doing, async |mut client| client.create(request).await).await?;
        Created::parse(answer).map_err(|malformed| Error::from_malformed(malformed, doing()))
    }

    /// Makes a folder, its name durable; false: it was there. The folder that it lies in must be there.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], among others with [`Reason::FileExists`](crate::Reason::FileExists) where
    /// something else has that name.
    pub async fn make_folder(&self, export: &str, path: &str) -> Result<bool, Error> {
        let doing = || format!("make the folder {}", FileName::new(export, path));
        let request = v1::MakeFolderRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
        };
        let call =
            self.core.control.call(doing, async |mut client| client.make_folder(request).await);
        Ok(call.await?.created)
    }

    /// Tells what a file is. Opens nothing on the server, so it disturbs nobody.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason.
    pub async fn stat(&self, export: &str, path: &str) -> Result<FileStat, Error> {
        let doing = || format!("stat {}", FileName::new(export, path));
        let request = v1::StatRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
        };
        let answer =
            self.core.control.call(doing, async |mut client| client.stat(request).await).await?;
        let identity = answer
            .identity
            .ok_or_else(|| Error::from_malformed(Malformed("a file without identity"), doing()))?;
        Ok(FileStat {
            identity: identity.into(),
            size: answer.size,
            allocated: answer.allocated,
            dax: answer.dax,
            generation: answer.generation.map(Into::into),
            pins: answer.pins,
            guard: (answer.guard != 0).then(|| GuardTier::from_wire(answer.guard)),
            page_size_bytes: answer.page_size_bytes,
        })
    }

    /// Lists a folder of an export, ordered by name; an empty path is the export's top folder, an
    /// empty export lists the exports. Opens no file, so it disturbs nobody. A large folder comes page by
    /// page: a name that comes or goes meanwhile is in the list or not.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason.
    pub async fn list(&self, export: &str, path: &str) -> Result<Vec<Entry>, Error> {
        let doing = || match (export, path) {
            ("", _) => "list the exports".to_owned(),
            (export, "") => format!("list {export}"),
            (export, path) => format!("list {}", FileName::new(export, path)),
        };
        let mut entries = Vec::new();
        let mut page_token = Vec::new();
        loop {
            let request = v1::ListRequest {
                session_id: self.core.control.session_id.clone(),
                export: export.to_owned(),
                path: path.to_owned(),
                page_size: 0,
                page_token,
            };
            let call = self.core.control.call(doing, async |mut client| client.list(request).await);
            let answer = call.await?;
            entries.extend(answer.entries.into_iter().map(Entry::from));
            if answer.next_page_token.is_empty() {
                return Ok(entries);
            }
            page_token = answer.next_page_token;
        }
    }

    /// Makes a file longer, and returns its end. Its pins stay; one that
    /// [reserved](PinRequest::reserve_end) room can use it after [`Pin::extend_to`].
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], among others with [`Reason::BadRange`](crate::Reason::BadRange) for a
    /// size below the present one, [`Reason::NoSpace`](crate::Reason::NoSpace), after which the size is what
    /// it was, and [`Reason::FileDraining`](crate::Reason::FileDraining) if a local process wants the file
    /// meanwhile: then it has grown to the size that the message tells, and another call goes on there.
    pub async fn grow(&self, export: &str, path: &str, size: u64) -> Result<u64, Error> {
        let doing = || format!("grow {}", FileName::new(export, path));
        let request = v1::GrowRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
            size,
        };
        let answer =
            self.core.control.call(doing, async |mut client| client.grow(request).await).await?;
        Ok(answer.valid_end)
    }

    /// Makes a file shorter. All its pins, of all sessions, are revoked first, with notice; returns
    /// how many there were.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], among others with [`Reason::BadRange`](crate::Reason::BadRange) for a
    /// size above the present one.
    pub async fn shrink(&self, export: &str, path: &str, size: u64) -> Result<u32, Error> {
        let doing = || format!("shrink {}", FileName::new(export, path));
        let request = v1::ShrinkRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
            size,
        };
        let answer =
            self.core.control.call(doing, async |mut client| client.shrink(request).await).await?;
        Ok(answer.revoked_pins)
    }

    /// Removes a file. Its pins, of all sessions, are revoked first, with notice, if `revoke_pins`
    /// says so; returns how many there were.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], with [`Reason::FilePinned`](crate::Reason::FilePinned) if it has pins
    /// that are not to be revoked.
    pub async fn remove(&self, export: &str, path: &str, revoke_pins: bool) -> Result<u32, Error> {
        let doing = || format!("remove {}", FileName::new(export, path));
        let request = v1::RemoveRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
            revoke_pins,
        };
        let answer =
            self.core.control.call(doing, async |mut client| client.remove(request).await).await?;
        Ok(answer.revoked_pins)
    }

    /// Takes all pins of a file back, of all sessions, with notice, as an operator does; returns how many
    /// there were. The file is let go then; who keeps pins has it again at once.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason.
    pub async fn revoke(&self, export: &str, path: &str) -> Result<u32, Error> {
        let doing = || format!("revoke {}", FileName::new(export, path));
        let request = v1::RevokeRequest {
            session_id: self.core.control.session_id.clone(),
            export: export.to_owned(),
            path: path.to_owned(),
        };
        let answer =
            self.core.control.call(doing, async |mut client| client.revoke(request).await).await?;
        Ok(answer.revoked_pins)
    }

    /// Takes all pins of an export back, of all sessions, with notice, and has the server close all that
    /// it has open of it: then its file system can be frozen, snapshotted or unmounted. What names the
    /// export is refused with [`Reason::ExportQuiesced`](crate::Reason::ExportQuiesced) until
    /// [`resume`](Self::resume), also after this session's end.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], with [`Reason::FileDraining`](crate::Reason::FileDraining) if something of
    /// it could not be closed in time: it is quiesced all the same, and another call waits again.
    pub async fn quiesce(&self, export: &str) -> Result<Quieted, Error> {
        let doing = || format!("quiesce {export}");
        let session_id = self.core.control.session_id.clone();
        let request = v1::QuiesceRequest { session_id, export: export.to_owned() };
        let answer =
            self.core.control.call(doing, async |mut client| client.quiesce(request).await).await?;
        Ok(Quieted { revoked_pins: answer.revoked_pins, beside: answer.beside })
    }

    /// Has a quiesced export served again; returns whether it was quiesced.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`], with [`Reason::FileChanged`](crate::Reason::FileChanged) or
    /// [`Reason::FileNotFound`](crate::Reason::FileNotFound) while its path is not the folder that it
    /// was.
    pub async fn resume(&self, export: &str) -> Result<bool, Error> {
        let doing = || format!("resume {export}");
        let session_id = self.core.control.session_id.clone();
        let request = v1::ResumeRequest { session_id, export: export.to_owned() };
        let answer =
            self.core.control.call(doing, async |mut client| client.resume(request).await).await?;
        Ok(answer.was_quiesced)
    }

    /// Tells who holds what on the server now, over all sessions. Of a long list the pages are taken one
    /// after the other, so that what changes meanwhile may be missing or be seen twice.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason.
    pub async fn inspect(&self) -> Result<Inspection, Error> {
        let doing = || "inspect the server".to_owned();
        let mut seen = Inspection::default();
        let mut page_token = Vec::new();
        loop {
            let session_id = self.core.control.session_id.clone();
            let request = v1::InspectRequest { session_id, page_size: INSPECT_PAGE, page_token };
            let answer =
                self.core.control.call(doing, async |mut client| client.inspect(request).await);
            let mut answer = answer.await?;
            page_token = std::mem::take(&mut answer.next_page_token);
            let page = Inspection::parse(answer)
                .map_err(|malformed| Error::from_malformed(malformed, doing()))?;
            seen.add(page);
            if page_token.is_empty() {
                return Ok(seen);
            }
        }
    }

    /// Tells of every revocation on the server from now on, of all sessions, when it is complete.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason.
    pub async fn watch(&self) -> Result<Records, Error> {
        let doing = || "watch revocations".to_owned();
        let request = v1::WatchRequest { session_id: self.core.control.session_id.clone() };
        let records =
            self.core.control.call(doing, async |mut client| client.watch(request).await).await?;
        Ok(Records::new(records, self.core.control.clone()))
    }

    /// Pins a range of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason, such as
    /// [`Reason::FileBusy`](crate::Reason::FileBusy); [`Error::Draining`] or [`Error::Revoked`] if
    /// the pin was taken back on its way here; [`Error::StreamOnly`] for a pin by RDMA only in a
    /// session that has none.
    pub async fn pin(&self, request: PinRequest) -> Result<Pin, Error> {
        let core = self.core.clone();
        let number = core.pin_requests.fetch_add(1, Ordering::Relaxed);
        let waiting =
            request.waits().then(|| Waiting { core: core.clone(), number, answered: false });
        // A pin that is returned to nobody is dropped, and so given back.
        let pinning = async move { core.pin(request, number).await };
        let pinned = self.core.control.to_the_end(pinning).await;
        if let Some(waiting) = waiting {
            waiting.end();
        }
        pinned.unwrap_or_else(|| Err(self.core.control.lost(Loss::Closed)))
    }

    /// Allocates a buffer that transfers of this session can use, and registers it with the device
    /// if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Verbs`], as a rule for want of lockable memory; [`Error::NoMemory`].
    pub async fn buffer(&self, capacity: usize) -> Result<Buffer, Error> {
        match &self.core.rdma {
            Rdma::On(fabrics) => fabrics.first().device().buffer(capacity).await,
            Rdma::Off(_) => Buffer::plain(capacity),
        }
    }

    /// Allocates and registers `count` buffers, to be used again and again.
    ///
    /// # Errors
    ///
    /// [`Error::Verbs`], as a rule for want of lockable memory.
    pub async fn buffer_pool(&self, count: usize, capacity: usize) -> Result<BufferPool, Error> {
        match &self.core.rdma {
            Rdma::On(fabrics) => fabrics.first().device().buffer_pool(count, capacity).await,
            Rdma::Off(_) => Ok(BufferPool::plain(count, capacity)),
        }
    }

    /// Subscribes to what the server says unasked, from now on.
    pub fn events(&self) -> Events {
        self.core.events.subscribe()
    }

    /// How the session ended; absent while it lives.
    pub fn loss(&self) -> Option<Loss> {
        self.core.pins.loss()
    }

    /// What it has in common with its pins.
    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// The device that it uses, for a session after this one.
    pub(crate) fn device(&self) -> Option<Arc<LocalDevice>> {
        self.core.rdma.first().map(|fabric| fabric.device().clone())
    }

    /// As [`close`](Self::close), while others may hold the session too.
    pub(crate) async fn close_for_all(&self) {
        // Fails when the session has ended already.
        let _ = self.closing.send(true);
        // Its task drops the sender when it has heard the server's last word.
        let mut loss = self.core.control.loss.clone();
        while loss.changed().await.is_ok() {}
    }

    /// The server's version.
    pub fn server_version(&self) -> &str {
        &self.server_version
    }

    /// Whether the server runs under the same kernel as this program, in a container or not. Then a
    /// [`FileIdentity`](crate::FileIdentity) has the device and inode number that stat(2) reports here.
    pub fn is_on_server_host(&self) -> bool {
        self.on_server_host
    }

    /// Ends the session and waits until the server has ended it too: every key is dead then.
    pub async fn close(self) {
        // Fails when the session has ended already.
        let _ = self.closing.send(true);
        // Fails when the runtime shuts down, and the session with it.
        let _ = self.keeper.await;
    }

    /// Writes the buffer's first `remote.len` bytes to any address with any key, past all of this
    /// library's bookkeeping: no pin, no quirk, no drain stands in between. It is there to test
    /// that the server's NIC refuses what it must.
    ///
    /// A refused request breaks the lane; the next call makes a new one.
    ///
    /// # Errors
    ///
    /// Only if nothing could be posted: [`Error::StreamOnly`] in a session without RDMA,
    /// [`Error::ForeignBuffer`] for a buffer of another one. What the NIC says is the result.
    pub async fn raw_write(
        &self,
        remote: RemoteSlice,
        buffer: Buffer,
    ) -> Result<(Buffer, CompletionStatus), TransferError> {
        self.raw(Direction::Write, remote, buffer).await
    }

    /// Reads `remote.len` bytes into the buffer, as [`raw_write`](Self::raw_write) writes them.
    ///
    /// # Errors
    ///
    /// As [`raw_write`](Self::raw_write).
    pub async fn raw_read(
        &self,
        remote: RemoteSlice,
        buffer: Buffer,
    ) -> Result<(Buffer, CompletionStatus), TransferError> {
        self.raw(Direction::Read, remote, buffer).await
    }

    async fn raw(
        &self,
        direction: Direction,
        remote: RemoteSlice,
        buffer: Buffer,
    ) -> Result<(Buffer, CompletionStatus), TransferError> {
        let fabric = match &self.core.rdma {
            Rdma::On(fabrics) => fabrics.first(),
            Rdma::Off(because) => {
                let doing = "post a raw request".to_owned();
                let error = Error::StreamOnly { doing, because: because.clone() };
                return Err(TransferError::new(error, buffer));
            }
        };
        let own = |buffer| Buffer::registered(buffer, fabric.id());
        let buffer = match buffer.into_registered(fabric.id()) {
            Ok(buffer) => buffer,
            Err(buffer) => {
                let error = Error::ForeignBuffer { doing: "post a raw request".to_owned() };
                return Err(TransferError::new(error, buffer));
            }
        };
        let pieces = [Piece { local: 0..remote.len, remote }];
        let asked = Asked::Transfer(direction);
        let operation = Operation { asked, pieces: &pieces, buffer, of: Of::Nothing };
        match fabric.run(&self.core.control, operation).await {
            Ok((buffer, status)) => Ok((own(buffer), status)),
            Err((Failure::Error(error), buffer)) => {
                Err(TransferError { error, buffer: buffer.map(own) })
            }
            Err((Failure::Lost, _)) => {
                let error = fabric::lost("make a raw request".to_owned());
                Err(TransferError { error, buffer: None })
            }
            Err((Failure::Gone(_), _)) => unreachable!("a raw request goes to no pin"),
        }
    }
}

impl Kept {
    fn start(
        (client, bytes): (PinfoldClient<Channel>, PinfoldClient<Channel>),
        opened: Opened,
        options: &ConnectOptions,
    ) -> Self {
        let (drained_sender, drained) = mpsc::unbounded_channel();
        let (withdrawn_sender, withdrawn) = mpsc::unbounded_channel();
        let heard = LastAnswer::now();
        let (loss_sender, loss) = watch::channel(None);
        let (closing, closing_receiver) = watch::channel(false);
        let pins = Arc::new(PinTable::new(drained_sender));
        let events = EventHub::new();
        let stream = SessionStream {
            incoming: opened.incoming,
            outgoing: opened.outgoing,
            rhythm: Rhythm::of(&opened.welcome),
            drain_policy: options.drain_policy,
            pins: pins.clone(),
            drained,
            withdrawn,
            heard: heard.clone(),
            events: events.clone(),
            closing: closing_receiver,
            loss: loss_sender,
        };
        // A server from before there were several says nothing of them.
        let lanes_max = opened.welcome.queue_pairs_max.max(1);
        let session_id = opened.welcome.session_id;
        let control = Control {
            client,
            bytes,
            pace: Arc::new(Pace::new()),
            endpoint: options.endpoint.clone(),
            session_id,
            loss,
            heard,
            runtime: Handle::current(),
        };
        let (keeper, withdrawn) = (tokio::spawn(stream.run()), withdrawn_sender);
        Self { control, lanes_max, pins, events, closing, keeper, withdrawn }
    }
}

impl Waiting {
    /// It has its answer.
    fn end(mut self) {
        self.answered = true;
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if !self.answered {
            // Fails only when the session is over, and the wait with it.
            let _ = self.core.withdrawn.send(self.number);
        }
    }
}

impl Core {
    async fn pin(self: Arc<Self>, request: PinRequest, number: u64) -> Result<Pin, Error> {
        let file = FileName::new(&request.export, &request.path);
        let doing = || format!("pin {file}");
        let Way { transport, fabric, no_rdma } = self.way(request.transport, doing).await?;
        let expected = self.pins.expect();
        let wire = request.to_wire(self.control.session_id.clone(), transport, number);
        let answer = self.control.call(doing, async |mut client| client.pin(wire).await).await?;
        let pin_id = answer.pin_id;
        let cell = expected.admit(pin_id);
        // From here on the handle's drop gives the pin back, whatever comes.
        let mut grant = match Grant::parse(answer, request.reserve_end) {
            Ok(grant) => grant,
            Err(malformed) => {
                self.give_back(pin_id, cell);
                return Err(Error::from_malformed(malformed, doing()));
            }
        };
        if no_rdma.is_some() && grant.segments.is_empty() {
            grant.no_rdma_because = no_rdma;
        }
        let pin = Pin::new(self.clone(), fabric, &request, file, grant, cell);
        pin.check()?;
        Ok(pin)
    }

    /// How a new pin's bytes are to travel.
    async fn way(&self, wish: Transport, doing: impl FnOnce() -> String) -> Result<Way, Error> {
        let fabric = match (&self.rdma, wish) {
            (_, Transport::Stream) => return Ok(Way::stream(None)),
            (Rdma::Off(because), Transport::Rdma) => {
                return Err(Error::StreamOnly { doing: doing(), because: because.clone() });
            }
            (Rdma::Off(because), Transport::Auto) => {
                return Ok(Way::stream(Some(because.clone())));
            }
            (Rdma::On(fabrics), Transport::Auto | Transport::Rdma) => fabrics.emptiest(),
        };
        // The server grants no key to a session without a queue pair.
        match fabric.ensure_lane(&self.control).await {
            Ok(()) => Ok(Way { transport: wish, fabric: Some(fabric), no_rdma: None }),
            Err(error) if wish == Transport::Auto && stream_survives(&error) => {
                Ok(Way::stream(Some(with_causes(&error))))
            }
            Err(error) => Err(error),
        }
    }

    /// Ends a pin of a session before this one, if the server still has it: what is left of it on
    /// the way can land no more then. It may have: the server waits for a silent client for as long
    /// as the client waits for a silent server.
    pub(crate) async fn end_pin_of(&self, earlier: &Self, pin_id: u64) -> Result<(), Error> {
        let session_id = earlier.control.session_id.clone();
        let request = v1::UnpinRequest { session_id, pin_id };
        let doing = || format!("end pin {pin_id} of the session before");
        let answer = self.control.call(doing, async |mut client| client.unpin(request).await).await;
        match answer {
            Err(Error::Refused {
                reason: Some(Reason::UnknownPin | Reason::UnknownSession),
                ..
            }) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Gives a pin back. First whatever is still in flight on it (a caller may have stopped waiting)
    /// has to end: a key that died under it would take the queue pair along.
    pub(crate) async fn unpin(&self, pin_id: u64, cell: &PinCell) -> Result<(), Error> {
        cell.idle().await;
        let request = v1::UnpinRequest { session_id: self.control.session_id.clone(), pin_id };
        let doing = || format!("unpin pin {pin_id}");
        let answer = self.control.call(doing, async |mut client| client.unpin(request).await).await;
        self.pins.remove(pin_id);
        match answer {
            // It was revoked before the request arrived.
            Err(Error::Refused { reason: Some(Reason::UnknownPin), .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Gives a pin back in the background.
    pub(crate) fn give_back(self: &Arc<Self>, pin_id: u64, cell: Arc<PinCell>) {
        let core = self.clone();
        self.control.runtime.spawn(async move {
            if let Err(error) = core.unpin(pin_id, &cell).await {
                tracing::debug!(pin_id, %error, "cannot give back a dropped pin");
            }
        });
    }
}

/// Whether a session without RDMA is as good: nobody asked for a device by its name.
fn may_do_without(options: &ConnectOptions) -> bool {
    options.rdma_device == RdmaDevice::Auto && options.server_device.is_empty()
}

/// Opens this host's device, or says why the session is to go without.
async fn open_device(options: &ConnectOptions) -> Result<Result<Arc<LocalDevice>, String>, Error> {
    match LocalDevice::open(options).await {
        Ok(Some(device)) => Ok(Ok(Arc::new(device))),
        Ok(None) => Ok(Err("the session was opened without an RDMA device".to_owned())),
        Err(error) if may_do_without(options) => Ok(Err(with_causes(&error))),
        Err(error) => Err(error),
    }
}

/// Connects the first queue pair, or says why the session is to go without.
async fn connect_device(
    device: Result<Arc<LocalDevice>, String>,
    kept: &Kept,
    options: &ConnectOptions,
) -> Result<Rdma, Error> {
    let device = match device {
        Ok(device) => device,
        Err(because) => return Ok(Rdma::Off(because)),
    };
    let lanes = options.lanes.min(kept.lanes_max);
    let fabrics = Fabrics::new(&device, &options.server_device, lanes, &kept.pins.urges());
    match fabrics.first().ensure_lane(&kept.control).await {
        Ok(()) => Ok(Rdma::On(fabrics)),
        Err(error) if may_do_without(options) && stream_survives(&error) => {
            let because = with_causes(&error);
            tracing::info!(because, "going on without RDMA");
            Ok(Rdma::Off(because))
        }
        Err(error) => Err(error),
    }
}

/// Whether a queue pair that can't be had for this reason leaves the stream path in order.
fn stream_survives(error: &Error) -> bool {
    match error {
        Error::Verbs { .. } => true,
        error => matches!(error.reason(), Some(Reason::NoRdmaDevice | Reason::QueuePairFailed)),
    }
}

/// Completes "the server refused to …".
const OPENING: &str = "open a session";
const NO_STREAM_PATH: Malformed = Malformed("no word of the stream path");

/// A stream on which the server has said `Welcome`.
struct Opened {
    welcome: v1::Welcome,
    incoming: Streaming<v1::SessionEvent>,
    outgoing: mpsc::UnboundedSender<v1::SessionRequest>,
}

async fn open_stream(
    client: &mut PinfoldClient<Channel>,
    options: &ConnectOptions,
) -> Result<Opened, Error> {
    let doing = || OPENING.to_owned();
    let refused = |status: Status| Error::from_status(status, &options.endpoint, doing());
    let malformed = |what| Error::from_malformed(Malformed(what), doing());

    let (outgoing, said) = mpsc::unbounded_channel();
    let hello = v1::Hello { client_name: options.client_name.clone() };
    // Before the call: the server answers it only then.
    let _ = outgoing.send(v1::SessionRequest { message: Some(Said::Hello(hello)) });
    let stream = UnboundedReceiverStream::new(said);
    let mut incoming = client.session(stream).await.map_err(refused)?.into_inner();
    let first = incoming.message().await.map_err(refused)?;
    match first.and_then(|event| event.event) {
        Some(Heard::Welcome(welcome)) => Ok(Opened { welcome, incoming, outgoing }),
        Some(_) => Err(malformed("something before its welcome")),
        None => Err(malformed("no welcome")),
    }
}

/// Only plain HTTP for now, so that nobody believes to be encrypted.
fn parse_endpoint(options: &ConnectOptions) -> Result<Endpoint, Error> {
    let endpoint = Endpoint::from_shared(options.endpoint.clone())
        .ok()
        .filter(|endpoint| endpoint.uri().scheme_str() == Some("http"))
        .ok_or_else(|| Error::BadEndpoint { endpoint: options.endpoint.clone() })?;
    let endpoint = endpoint.connect_timeout(options.timeout).max_frame_size(FRAME_BYTES_MAX);
    Ok(endpoint.tcp_keepalive(Some(Duration::from_secs(30))))
}
