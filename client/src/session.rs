//! A session: everything a client has at a server hangs off one.

use std::sync::Arc;
use std::time::Duration;

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use pinfold_proto::v1::session_event::Event as Heard;
use pinfold_proto::v1::session_request::Message as Said;
use pinfold_verbs::{Buffer, CompletionStatus, Piece, RemoteSlice};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::control::Control;
use crate::event::Events;
use crate::fabric::{Fabric, Failure, Operation};
use crate::file::FileName;
use crate::grant::Malformed;
use crate::lane::Direction;
use crate::pin_table::{PinCell, PinTable};
use crate::stream::{EventHub, Rhythm, SessionStream};
use crate::{
    ConnectOptions, Created, Error, FileStat, Grant, IfExists, Pin, PinRequest, Reason,
    TransferError,
};

/// A session with a server, kept alive in the background.
///
/// Dropping it ends it, and every pin with it; [`close`](Self::close) waits for that.
#[derive(Debug)]
pub struct Session {
    core: Arc<Core>,
    server_version: String,
    /// Says true, or is dropped, to end the session.
    closing: watch::Sender<bool>,
    keeper: JoinHandle<()>,
}

/// What a session and its pins share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) control: Control,
    pub(crate) pins: Arc<PinTable>,
    pub(crate) fabric: Option<Arc<Fabric>>,
    /// Gives back pins whose handle was dropped.
    pub(crate) runtime: Handle,
    events: EventHub,
}

impl Session {
    /// Opens a session: device, stream, queue pair.
    ///
    /// # Errors
    ///
    /// [`Error::NoRdmaDevice`] before anything is sent; [`Error::Unreachable`] and
    /// [`Error::NoWelcome`] if the server does not answer; [`Error::ServerHasNoRdmaDevice`];
    /// [`Error::Refused`] with the server's reason.
    pub async fn connect(options: ConnectOptions) -> Result<Self, Error> {
        let endpoint = parse_endpoint(&options)?;
        let fabric = Fabric::open(options.rdma_device.clone(), options.send_window).await?;
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
        if fabric.is_some() && opened.welcome.rdma_device.is_none() {
            return Err(Error::ServerHasNoRdmaDevice { endpoint: options.endpoint });
        }
        let session = Self::keep(client, opened, fabric, options);
        if let Some(fabric) = &session.core.fabric {
            fabric.lane(&session.core.control).await?;
        }
        Ok(session)
    }

    /// Makes a file of exactly `size` bytes, allocated and zeroed on the medium, its name durable.
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
        let identity = answer
            .identity
            .ok_or_else(|| Error::from_malformed(Malformed("a file without identity"), doing()))?;
        Ok(Created { identity: identity.into(), created: answer.created })
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
        })
    }

    /// Pins a range of a file.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the server's reason, such as
    /// [`Reason::FileBusy`](crate::Reason::FileBusy); [`Error::Draining`] or [`Error::Revoked`] if
    /// the pin was taken back on its way here; [`Error::ControlOnly`] in a session without a
    /// device.
    pub async fn pin(&self, request: PinRequest) -> Result<Pin, Error> {
        let file = FileName::new(&request.export, &request.path);
        let fabric = self.core.fabric(|| format!("pin {file}"))?;
        // The server grants no key to a session without a queue pair.
        fabric.lane(&self.core.control).await?;
        let expected = self.core.pins.expect();
        let wire = request.to_wire(self.core.control.session_id.clone());
        let doing = || format!("pin {file}");
        let answer =
            self.core.control.call(doing, async |mut client| client.pin(wire).await).await?;
        let pin_id = answer.pin_id;
        let cell = expected.admit(pin_id);
        // From here on the handle's drop gives the pin back, whatever comes.
        let grant = match Grant::parse(answer) {
            Ok(grant) => grant,
            Err(malformed) => {
                self.core.give_back(pin_id, cell);
                return Err(Error::from_malformed(malformed, doing()));
            }
        };
        let pin = Pin::new(self.core.clone(), fabric.clone(), file, grant, cell);
        pin.check()?;
        Ok(pin)
    }

    /// Allocates a buffer that transfers of this session can use, and registers it with the device.
    ///
    /// # Errors
    ///
    /// [`Error::Verbs`], as a rule for want of lockable memory; [`Error::ControlOnly`] in a session
    /// without a device.
    pub async fn buffer(&self, capacity: usize) -> Result<Buffer, Error> {
        self.core.fabric(|| "register a buffer".to_owned())?.buffer(capacity).await
    }

    /// Subscribes to what the server says unasked, from now on.
    pub fn events(&self) -> Events {
        self.core.events.subscribe()
    }

    /// The server's version.
    pub fn server_version(&self) -> &str {
        &self.server_version
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
    /// Only if nothing could be posted. What the NIC says is the result.
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
    /// Only if nothing could be posted. What the NIC says is the result.
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
        let fabric = match self.core.fabric(|| "post a raw request".to_owned()) {
            Ok(fabric) => fabric,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        let pieces = vec![Piece { local: 0..remote.len, remote }];
        let operation = Operation { direction, pieces, buffer, pin: None };
        fabric.run(&self.core.control, operation).await.map_err(|(failure, buffer)| {
            let error = match failure {
                Failure::Error(error) => error,
                Failure::Gone(_) => unreachable!("a raw request goes to no pin"),
            };
            TransferError { error, buffer }
        })
    }

    fn keep(
        client: PinfoldClient<Channel>,
        opened: Opened,
        fabric: Option<Fabric>,
        options: ConnectOptions,
    ) -> Self {
        let (drained_sender, drained) = mpsc::unbounded_channel();
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
            events: events.clone(),
            closing: closing_receiver,
            loss: loss_sender,
        };
        let control = Control {
            client,
            endpoint: options.endpoint,
            session_id: opened.welcome.session_id,
            loss,
        };
        let fabric = fabric.map(Arc::new);
        let core = Core { control, pins, fabric, runtime: Handle::current(), events };
        Self {
            core: Arc::new(core),
            server_version: opened.welcome.server_version,
            closing,
            keeper: tokio::spawn(stream.run()),
        }
    }
}

impl Core {
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
        self.runtime.spawn(async move {
            if let Err(error) = core.unpin(pin_id, &cell).await {
                tracing::debug!(pin_id, %error, "cannot give back a dropped pin");
            }
        });
    }

    /// The device, or why there is none. `doing` completes "cannot … in a session without a
    /// device".
    pub(crate) fn fabric(&self, doing: impl FnOnce() -> String) -> Result<&Arc<Fabric>, Error> {
        self.fabric.as_ref().ok_or_else(|| Error::ControlOnly { doing: doing() })
    }
}

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
    let doing = || "open a session".to_owned();
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
    Ok(endpoint.connect_timeout(options.timeout).tcp_keepalive(Some(Duration::from_secs(30))))
}
