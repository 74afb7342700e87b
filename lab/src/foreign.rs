//! A client written from the `.proto` alone: it knows the messages and RDMA, and nothing of our
//! client library. It answers a notice only when the test says so, which shows what happens before.

use std::time::Duration;

use pinfold_proto::v1;
use pinfold_proto::v1::pinfold_client::PinfoldClient;
use pinfold_proto::v1::session_event::Event;
use pinfold_proto::v1::session_request::Message;
use pinfold_verbs::{
    Buffer, CompletionStatus, Device, Endpoint, Gid, Lane, Mtu, Piece, ProtectionDomain,
    QueuePairNumber, RemoteKey, RemoteSlice, UnconnectedLane,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::{EXPORT, device_name};

/// A session by hand.
#[derive(Debug)]
pub struct ForeignClient {
    /// For calls of any form; clones share the connection.
    pub stub: PinfoldClient<Channel>,
    /// The server's first words.
    pub welcome: v1::Welcome,
    said: mpsc::UnboundedSender<v1::SessionRequest>,
    heard: Streaming<v1::SessionEvent>,
    heart: JoinHandle<()>,
}

impl ForeignClient {
    /// Says hello, hears the welcome, and beats from then on.
    pub async fn open(url: &str) -> Self {
        let mut stub = PinfoldClient::connect(url.to_owned()).await.unwrap();
        let hello = v1::Hello { client_name: "a foreign client".to_owned() };
        let (said, stream) = mpsc::unbounded_channel();
        said.send(request(Message::Hello(hello))).unwrap();
        let stream = UnboundedReceiverStream::new(stream);
        let mut heard = stub.session(stream).await.unwrap().into_inner();
        let first = heard.message().await.unwrap().and_then(|event| event.event);
        let Some(Event::Welcome(welcome)) = first else { panic!("not welcome: {first:?}") };
        let every = Duration::from_millis(u64::from(welcome.heartbeat_interval_ms) / 2);
        let heart = tokio::spawn(beat(said.downgrade(), every));
        Self { stub, welcome, said, heard, heart }
    }

    /// What every other call carries.
    pub fn session_id(&self) -> Vec<u8> {
        self.welcome.session_id.clone()
    }

    /// Gives no more signs of life, but keeps the stream open.
    pub fn fall_silent(&self) {
        self.heart.abort();
    }

    /// Closes this half of the stream, which ends the session, and waits for the other half's end.
    pub async fn close(self) {
        let Self { said, mut heard, .. } = self;
        drop(said);
        while heard.message().await.unwrap().is_some() {}
    }

    /// Waits for the next notice; replies to heartbeats are passed over. `None`: the server has
    /// ended the session.
    pub async fn next_event(&mut self) -> Option<Event> {
        loop {
            match self.heard.message().await.unwrap()?.event.expect("an event without content") {
                Event::HeartbeatReply(_) => {}
                event => return Some(event),
            }
        }
    }

    /// Waits for the notice, which must be the next event.
    pub async fn next_draining(&mut self) -> v1::Draining {
        match self.next_event().await {
            Some(Event::Draining(draining)) => draining,
            other => panic!("not a notice: {other:?}"),
        }
    }

    /// Waits for the end of a revocation, which must be the next event.
    pub async fn next_revoked(&mut self) -> v1::Revoked {
        match self.next_event().await {
            Some(Event::Revoked(revoked)) => revoked,
            other => panic!("not the end of a revocation: {other:?}"),
        }
    }

    /// Answers a notice.
    pub fn say_drained(&self, pin_ids: &[u64]) {
        let drained = v1::Drained { pin_ids: pin_ids.to_vec() };
        self.said.send(request(Message::Drained(drained))).unwrap();
    }

    /// Connects a queue pair.
    pub async fn connect(&mut self) -> ForeignLane {
        self.connect_number(0).await
    }

    /// Connects a queue pair under this number.
    pub async fn connect_number(&mut self, number: u32) -> ForeignLane {
        let domain = ProtectionDomain::new(&Device::open(&device_name()).unwrap()).unwrap();
        let lane = UnconnectedLane::new(&domain, 4).unwrap();
        let client = to_wire(&lane.endpoint());
        let answer = self.connect_end(number, client).await.unwrap();
        let server = answer.server.unwrap();
        let server_queue_pair = server.queue_pair_number;
        let path_mtu = Mtu::from_bytes(answer.path_mtu_bytes).unwrap();
        let connect = move || lane.connect(&from_wire(&server), path_mtu).unwrap();
        let lane = tokio::task::spawn_blocking(connect).await.unwrap();
        ForeignLane { lane, domain, server_queue_pair }
    }

    /// Asks the server to connect to this end, whatever it is.
    pub async fn connect_end(
        &mut self,
        number: u32,
        client: v1::Endpoint,
    ) -> Result<v1::ConnectQueuePairResponse, Status> {
        let session_id = self.session_id();
        let server_device = String::new();
        let request =
            v1::ConnectQueuePairRequest { session_id, client: Some(client), server_device, number };
        Ok(self.stub.connect_queue_pair(request).await?.into_inner())
    }

    /// What asks for a pin by RDMA on a whole file of the lab's export.
    pub fn pin_request(&self, path: &str) -> v1::PinRequest {
        v1::PinRequest {
            session_id: self.session_id(),
            export: EXPORT.to_owned(),
            path: path.to_owned(),
            access: v1::Access::ReadWrite.into(),
            transport: v1::Transport::Rdma.into(),
            ..v1::PinRequest::default()
        }
    }

    /// Pins a whole file.
    pub async fn pin(&mut self, path: &str) -> v1::PinResponse {
        self.stub.pin(self.pin_request(path)).await.unwrap().into_inner()
    }

    /// Gives a pin back.
    pub async fn unpin(&mut self, pin_id: u64) -> Result<(), Status> {
        let request = v1::UnpinRequest { session_id: self.session_id(), pin_id };
        self.stub.unpin(request).await.map(drop)
    }

    /// Commits a whole pin under a generation that may be wrong.
    pub async fn commit(
        &mut self,
        pin_id: u64,
        generation: Option<v1::Generation>,
    ) -> Result<v1::CommitResponse, Status> {
        let session_id = self.session_id();
        let request = v1::CommitRequest { session_id, pin_id, generation, range: None };
        Ok(self.stub.commit(request).await?.into_inner())
    }

    /// Looks at a file of the lab's export.
    pub async fn stat(&mut self, path: &str) -> v1::StatResponse {
        let (export, path) = (EXPORT.to_owned(), path.to_owned());
        let request = v1::StatRequest { session_id: self.session_id(), export, path };
        self.stub.stat(request).await.unwrap().into_inner()
    }
}

/// A connection to the server's NIC.
#[derive(Debug)]
pub struct ForeignLane {
    /// The server's end.
    pub server_queue_pair: u32,
    lane: Lane<()>,
    domain: ProtectionDomain,
}

impl ForeignLane {
    /// Writes at an offset in a pinned file's first segment.
    pub async fn write(&self, key: &v1::Segment, offset: u64, bytes: &[u8]) -> CompletionStatus {
        let mut buffer = Buffer::new(&self.domain, bytes.len()).unwrap();
        buffer.as_mut_slice().copy_from_slice(bytes);
        self.lane.post_write(buffer, &[piece(key, offset, bytes.len())], ()).unwrap();
        self.lane.next_completion().await.unwrap().status
    }

    /// Flushes bytes at an offset in a pinned file's first segment (RDMA FLUSH).
    pub async fn flush(&self, key: &v1::Segment, offset: u64, len: usize) -> CompletionStatus {
        let buffer = Buffer::new(&self.domain, 1).unwrap();
        let range = piece(key, offset, len).remote;
        self.lane.post_flush(buffer, &[range], ()).unwrap();
        self.lane.next_completion().await.unwrap().status
    }

    /// Reads from an offset in a pinned file's first segment.
    pub async fn read(&self, key: &v1::Segment, offset: u64, len: usize) -> Vec<u8> {
        let buffer = Buffer::new(&self.domain, len).unwrap();
        self.lane.post_read(buffer, &[piece(key, offset, len)], ()).unwrap();
        let done = self.lane.next_completion().await.unwrap();
        assert!(done.status.is_success(), "reading: {}", done.status);
        done.buffer.as_slice().to_vec()
    }
}

fn piece(key: &v1::Segment, offset: u64, len: usize) -> Piece {
    let address = key.remote_address + offset;
    Piece {
        local: 0..len,
        remote: RemoteSlice { address, key: RemoteKey::new(key.remote_key), len },
    }
}

fn request(message: Message) -> v1::SessionRequest {
    v1::SessionRequest { message: Some(message) }
}

/// Ends with the session: it holds no end of the stream open.
async fn beat(said: mpsc::WeakUnboundedSender<v1::SessionRequest>, every: Duration) {
    let mut rhythm = tokio::time::interval(every);
    for sequence in 1.. {
        rhythm.tick().await;
        let Some(said) = said.upgrade() else { return };
        // Fails only when the server has ended the session; the test hears that elsewhere.
        let _ = said.send(request(Message::Heartbeat(v1::Heartbeat { sequence })));
    }
}

fn to_wire(end: &Endpoint) -> v1::Endpoint {
    v1::Endpoint {
        queue_pair_number: end.queue_pair_number.get(),
        packet_sequence_number: end.packet_sequence_number,
        gid: end.gid.octets().to_vec(),
        lid: end.lid.into(),
        max_path_mtu_bytes: end.path_mtu_bytes,
    }
}

fn from_wire(end: &v1::Endpoint) -> Endpoint {
    Endpoint {
        queue_pair_number: QueuePairNumber::new(end.queue_pair_number),
        packet_sequence_number: end.packet_sequence_number,
        gid: Gid::new(end.gid.as_slice().try_into().unwrap()),
        lid: end.lid.try_into().unwrap(),
        path_mtu_bytes: end.max_path_mtu_bytes,
    }
}

/// The reason that a refusal carries for programs.
pub fn reason_of(refused: &Status) -> String {
    use tonic_types::StatusExt;
    let info = refused.get_details_error_info();
    info.unwrap_or_else(|| panic!("a refusal without a reason: {refused:?}")).reason
}
