//! Keeps one session alive, from its hello to its last sign of life.

use std::sync::Arc;
use std::time::Duration;

use pinfold_proto::v1;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::config::Config;
use crate::engine::{Engine, WeakOutbox};
use crate::error::{Error, Result};
use crate::fabric::QUEUE_PAIRS_MAX;
use crate::ids::{PinId, SessionId};
use crate::wire;

/// Events that wait for a client to read them. One that lets more pile up loses them, and is fenced
/// by the deadline.
const OUTBOX_DEPTH: usize = 1024;
/// This process may have been stopped itself: what came meanwhile is heard before a client's silence is
/// held against it.
const SECOND_LOOK: Duration = Duration::from_millis(100);
/// Longest name of a client, in bytes.
const LONGEST_NAME: usize = 256;

/// What a session's stream carries to the client.
pub(crate) type Events = mpsc::Receiver<Result<v1::SessionEvent, Status>>;

/// Waits for the hello and starts the task that keeps the session.
pub(crate) async fn start(
    engine: Arc<Engine>,
    config: &Config,
    mut requests: Streaming<v1::SessionRequest>,
) -> Result<Events, Status> {
    let hello = tokio::time::timeout(config.time_to_live, requests.message())
        .await
        .map_err(|_| malformed("no Hello came in time"))??;
    let name = client_name(hello)?;
    let (outbox, events) = mpsc::channel(OUTBOX_DEPTH);
    let id = engine.open_session(outbox.clone(), &name)?;
    tracing::info!(session = %id, client = name, "session opened");
    let welcome = wire::welcome(welcome(&engine, config, id));
    // The queue is empty and its other end is held here.
    let _ = outbox.try_send(Ok(welcome));
    let keeper = Keeper {
        engine,
        id,
        outbox: outbox.downgrade(),
        grace: config.silence_grace(),
        time_to_live: config.time_to_live,
        pins_at_most: config.limits.pins_per_session,
    };
    tokio::spawn(keeper.run(requests));
    Ok(events)
}

fn malformed(what: &str) -> Error {
    Error::Malformed { what: what.to_owned() }
}

fn client_name(request: Option<v1::SessionRequest>) -> Result<String> {
    use v1::session_request::Message;
    match request.and_then(|request| request.message) {
        Some(Message::Hello(hello)) if hello.client_name.len() <= LONGEST_NAME => {
            Ok(hello.client_name)
        }
        Some(Message::Hello(_)) => Err(malformed("client_name is longer than 256 bytes")),
        _ => Err(malformed("the first message of a session is Hello")),
    }
}

fn welcome(engine: &Engine, config: &Config, id: SessionId) -> v1::Welcome {
    let devices: Vec<v1::RdmaDevice> = engine
        .fabrics()
        .iter()
        .map(|fabric| v1::RdmaDevice {
            name: fabric.device().name().to_owned(),
            active_mtu_bytes: fabric.device().port().active_mtu_bytes,
            on_demand_paging: fabric.on_demand_paging(),
        })
        .collect();
    v1::Welcome {
        session_id: id.as_bytes().to_vec(),
        incarnation: engine.incarnation(),
        heartbeat_interval_ms: wire::short_millis(config.heartbeat_interval),
        time_to_live_ms: wire::short_millis(config.time_to_live),
        silence_grace_ms: wire::short_millis(config.silence_grace()),
        rdma_device: devices.first().cloned(),
        server_version: env!("CARGO_PKG_VERSION").to_owned(),
        stream_piece_bytes_max: wire::count(wire::STREAM_PIECE_BYTES_MAX),
        rdma_devices: devices,
        queue_pairs_max: QUEUE_PAIRS_MAX,
    }
}

struct Keeper {
    engine: Arc<Engine>,
    id: SessionId,
    /// Weak, so that the stream ends when the engine forgets the session.
    outbox: WeakOutbox,
    grace: Duration,
    time_to_live: Duration,
    pins_at_most: usize,
}

/// What came from the client: as the stream gives it, or nothing in time.
type Heard = Option<Result<Option<v1::SessionRequest>, Status>>;

async fn hear(requests: &mut Streaming<v1::SessionRequest>, within: Duration) -> Heard {
    tokio::time::timeout(within, requests.message()).await.ok()
}

impl Keeper {
    async fn run(self, mut requests: Streaming<v1::SessionRequest>) {
        let why = loop {
            match self.next(&mut requests).await {
                Some(Ok(Some(request))) => self.handle(request),
                Some(Ok(None)) => break "closed by the client",
                Some(Err(_)) => break "its stream broke",
                None => break "it was silent for too long",
            }
        };
        tracing::info!(session = %self.id, why, "session ended");
        self.engine.end_session(self.id).await;
    }

    /// Cuts the client off when it is late, and gives it up when it is later still.
    async fn next(&self, requests: &mut Streaming<v1::SessionRequest>) -> Heard {
        if let Some(heard) = hear(requests, self.grace).await {
            return Some(heard);
        }
        if let Some(heard) = hear(requests, SECOND_LOOK).await {
            return Some(heard);
        }
        tracing::info!(session = %self.id, "a client is silent; its queue pair is destroyed");
        self.engine.cut_off(self.id);
        hear(requests, self.time_to_live.saturating_sub(self.grace + SECOND_LOOK)).await
    }

    fn handle(&self, request: v1::SessionRequest) {
        use v1::session_request::Message;
        match request.message {
            Some(Message::Heartbeat(beat)) => {
                // A full outbox: the client does not read; it will miss the reply and notice.
                let reply = Ok(wire::heartbeat_reply(beat.sequence));
                if let Some(outbox) = self.outbox.upgrade() {
                    let _ = outbox.try_send(reply);
                }
            }
            Some(Message::Drained(drained)) if drained.pin_ids.len() > self.pins_at_most => {
                tracing::warn!(session = %self.id, "drained more pins than a session can hold");
            }
            Some(Message::Drained(drained)) => {
                let pins: Vec<PinId> = drained.pin_ids.into_iter().map(PinId).collect();
                self.engine.drained(self.id, &pins);
            }
            Some(Message::Hello(_)) | None => {
                tracing::debug!(session = %self.id, "a message without meaning was passed over");
            }
        }
    }
}
