//! Keeps one session alive, from its hello to its last sign of life.

mod notices;
mod outbox;
mod silence;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_proto::v1;
use tonic::{Status, Streaming};

use crate::config::Config;
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::fabric::QUEUE_PAIRS_MAX;
use crate::ids::{PinId, SessionId};
use crate::wire;

pub(crate) use outbox::{Events, Mailbox, Outbox};
use silence::{Silence, Verdict};

/// This process may have been stopped itself: what came meanwhile is heard before a client's silence is
/// held against it.
const SECOND_LOOK: Duration = Duration::from_millis(100);
/// Longest name of a client, in bytes.
const LONGEST_NAME: usize = 256;

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
    let mailbox = Mailbox::new(config.limits.pins_per_session);
    let id = engine.open_session(Outbox::new(mailbox.clone()), &name)?;
    tracing::info!(session = %id, client = name, "session opened");
    let events = mailbox.events(wire::welcome(welcome(&engine, config, id)));
    let keeper = Keeper {
        engine,
        id,
        mailbox,
        silence: Silence::new(config.silence_grace(), config.time_to_live, Instant::now()),
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
        host_boot_id: pinfold_proto::boot_id().unwrap_or_default(),
    }
}

struct Keeper {
    engine: Arc<Engine>,
    id: SessionId,
    mailbox: Mailbox,
    silence: Silence,
    /// For as long a client may take nothing of what it is told.
    time_to_live: Duration,
    pins_at_most: usize,
}

/// Whatever ends the keeper, a panic or the end of the runtime included, ends the session.
impl Drop for Keeper {
    fn drop(&mut self) {
        self.engine.end_session(self.id);
    }
}

/// What came from the client: as the stream gives it, or nothing in time.
type Heard = Option<Result<Option<v1::SessionRequest>, Status>>;

async fn hear(requests: &mut Streaming<v1::SessionRequest>, until: Instant) -> Heard {
    tokio::time::timeout_at(until.into(), requests.message()).await.ok()
}

impl Keeper {
    async fn run(mut self, mut requests: Streaming<v1::SessionRequest>) {
        let why = loop {
            match self.next(&mut requests).await {
                Some(Ok(Some(request))) => self.handle(request),
                Some(Ok(None)) => break "closed by the client",
                Some(Err(_)) => break "its stream broke",
                None if self.mailbox.is_stuck(self.time_to_live) => {
                    break "it does not read what it is told";
                }
                None => break "it was silent for too long",
            }
            if self.mailbox.is_stuck(self.time_to_live) {
                break "it does not read what it is told";
            }
        };
        tracing::info!(session = %self.id, why, "session ended");
    }

    /// Cuts the client off when it is late, and gives it up (`None`) when it is later still, or when it takes
    /// nothing of what it is told. Its other calls are signs of life too.
    async fn next(&mut self, requests: &mut Streaming<v1::SessionRequest>) -> Heard {
        loop {
            let mut heard = hear(requests, self.silence.judge_at()).await;
            if heard.is_none() {
                heard = hear(requests, Instant::now() + SECOND_LOOK).await;
            }
            if let Some(call) = self.engine.last_call(self.id) {
                self.silence.heard(call);
            }
            if heard.is_some() {
                self.silence.heard(Instant::now());
                return heard;
            }
            if self.mailbox.is_stuck(self.time_to_live) {
                return None;
            }
            match self.silence.judge(Instant::now()) {
                Verdict::Wait => {}
                Verdict::CutOff => {
                    tracing::info!(session = %self.id, "a client is silent; its queue pair is destroyed");
                    self.engine.cut_off(self.id);
                }
                Verdict::Over => return None,
            }
        }
    }

    fn handle(&self, request: v1::SessionRequest) {
        use v1::session_request::Message;
        match request.message {
            Some(Message::Heartbeat(beat)) => {
                self.mailbox.post(|notices, _| notices.answer(beat.sequence));
            }
            Some(Message::Drained(drained)) if drained.pin_ids.len() > self.pins_at_most => {
                tracing::warn!(session = %self.id, "drained more pins than a session can hold");
            }
            Some(Message::Drained(drained)) => {
                let pins: Vec<PinId> = drained.pin_ids.into_iter().map(PinId).collect();
                self.engine.drained(self.id, &pins);
            }
            Some(Message::Withdraw(withdrawn)) => {
                self.engine.withdraw(self.id, &withdrawn.numbers);
            }
            Some(Message::Hello(_)) | None => {
                tracing::debug!(session = %self.id, "a message without meaning was passed over");
            }
        }
    }
}
