//! The session stream: heartbeats out, notices in, and the word when the session is over.

use std::error::Error as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pinfold_proto::v1;
use pinfold_proto::v1::session_event::Event as Heard;
use pinfold_proto::v1::session_request::Message as Said;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use tonic::{Status, Streaming};

use crate::control::LastAnswer;
use crate::event::{Event, Events};
use crate::pin_table::PinTable;
use crate::{DrainNotice, DrainPolicy, Loss, Revocation};

/// A subscriber that is further behind than this many events misses some.
const EVENTS_KEPT: usize = 256;

/// Pins or requests named by one message. A server takes no more than a session can hold.
const NUMBERS_PER_MESSAGE: usize = 1024;

/// Several heartbeats fit in the server's interval, so that a lost or late one does no harm.
const HEARTBEATS_PER_INTERVAL: u32 = 3;

/// The server's rhythm, from its `Welcome`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rhythm {
    heartbeat_interval: Duration,
    time_to_live: Duration,
}

/// Both ends of the stream, and all that its words concern.
pub(crate) struct SessionStream {
    pub(crate) incoming: Streaming<v1::SessionEvent>,
    /// Unbounded, yet never long: heartbeats until the time-to-live ends the session, and one
    /// `Drained` per pin.
    pub(crate) outgoing: mpsc::UnboundedSender<v1::SessionRequest>,
    pub(crate) rhythm: Rhythm,
    pub(crate) drain_policy: DrainPolicy,
    pub(crate) pins: Arc<PinTable>,
    /// Pins that the server waits for and that are drained now.
    pub(crate) drained: mpsc::UnboundedReceiver<u64>,
    /// Pin requests that nobody waits for any more.
    pub(crate) withdrawn: mpsc::UnboundedReceiver<u64>,
    /// Answers to calls, which are signs of life, too.
    pub(crate) heard: Arc<LastAnswer>,
    pub(crate) events: EventHub,
    /// Turns true, or is dropped, when the session is to end.
    pub(crate) closing: watch::Receiver<bool>,
    pub(crate) loss: watch::Sender<Option<Loss>>,
}

/// Where events go out; closed with the session.
#[derive(Clone, Debug)]
pub(crate) struct EventHub(Arc<Mutex<Hub>>);

#[derive(Debug)]
enum Hub {
    Open(broadcast::Sender<Event>),
    Over(Loss),
}

impl Rhythm {
    pub(crate) fn of(welcome: &v1::Welcome) -> Self {
        let millis = |value: u32| Duration::from_millis(value.max(1).into());
        Self {
            heartbeat_interval: millis(welcome.heartbeat_interval_ms),
            time_to_live: millis(welcome.time_to_live_ms),
        }
    }

    fn heartbeat_period(self) -> Duration {
        (self.heartbeat_interval / HEARTBEATS_PER_INTERVAL).max(Duration::from_millis(1))
    }
}

impl SessionStream {
    /// Keeps the session until it ends.
    pub(crate) async fn run(mut self) {
        let loss = self.keep().await;
        // Pins first: who hears of the end finds them dead.
        self.pins.lose(&loss);
        self.events.close(&loss);
        let Self { incoming, outgoing, rhythm, loss: told, .. } = self;
        drop(outgoing);
        // Fails only when nobody is left to be told.
        let _ = told.send(Some(loss.clone()));
        if loss == Loss::Closed {
            await_goodbye(incoming, rhythm.time_to_live).await;
        }
    }

    async fn keep(&mut self) -> Loss {
        let mut heartbeat = interval(self.rhythm.heartbeat_period());
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut closing = self.closing.clone();
        let mut sequence = 0;
        let mut silent_until = Instant::now() + self.rhythm.time_to_live;
        loop {
            tokio::select! {
                // What the server said is heard before its silence is judged: this process may
                // have been stopped for a while.
                biased;
                _ = closing.wait_for(|closing| *closing) => return Loss::Closed,
                heard = self.incoming.message() => match heard {
                    Ok(Some(event)) => {
                        silent_until = Instant::now() + self.rhythm.time_to_live;
                        self.hear(event);
                    }
                    Ok(None) => return Loss::StreamEnded,
                    Err(status) => return loss_of(&status),
                },
                Some(pin) = self.drained.recv() => self.say_drained(pin),
                Some(request) = self.withdrawn.recv() => self.say_withdrawn(request),
                () = sleep_until(silent_until) => {
                    silent_until = self.heard.last() + self.rhythm.time_to_live;
                    if silent_until <= Instant::now() {
                        return Loss::Silence(self.rhythm.time_to_live);
                    }
                }
                _ = heartbeat.tick() => {
                    sequence += 1;
                    self.say(Said::Heartbeat(v1::Heartbeat { sequence }));
                }
            }
        }
    }

    fn hear(&self, event: v1::SessionEvent) {
        match event.event {
            Some(Heard::Draining(notice)) => self.hear_draining(notice),
            Some(Heard::Revoked(notice)) => self.hear_revoked(notice),
            // A heartbeat's answer has done its work by arriving; what this version does not know
            // is not for it.
            Some(Heard::HeartbeatReply(_) | Heard::Welcome(_)) | None => {}
        }
    }

    fn hear_draining(&self, wire: v1::Draining) {
        let notice = DrainNotice::from(&wire);
        tracing::info!(pins = ?wire.pin_ids, generation = %notice.generation, "draining");
        if self.drain_policy == DrainPolicy::Automatic {
            self.pins.drain(&wire.pin_ids, notice);
        }
        self.events.send(Event::Draining { notice, pins: wire.pin_ids });
    }

    fn hear_revoked(&self, wire: v1::Revoked) {
        let revocation = Revocation::from(&wire);
        tracing::info!(pins = ?wire.pin_ids, generation = %revocation.generation, "revoked");
        self.pins.revoke(&wire.pin_ids, revocation);
        self.events.send(Event::Revoked { revocation, pins: wire.pin_ids });
    }

    /// Says it for all pins that are drained by now at once: a file's pins drain together.
    fn say_drained(&mut self, first: u64) {
        let pin_ids = all_there(first, &mut self.drained);
        self.say(Said::Drained(v1::Drained { pin_ids }));
    }

    fn say_withdrawn(&mut self, first: u64) {
        let numbers = all_there(first, &mut self.withdrawn);
        self.say(Said::Withdraw(v1::Withdraw { numbers }));
    }

    fn say(&self, message: Said) {
        // Fails only when the stream is over; its other half says so in a moment.
        let _ = self.outgoing.send(v1::SessionRequest { message: Some(message) });
    }
}

/// What is in a channel by now, as much as one message takes.
fn all_there(first: u64, rest: &mut mpsc::UnboundedReceiver<u64>) -> Vec<u64> {
    let mut all = vec![first];
    while all.len() < NUMBERS_PER_MESSAGE
        && let Ok(next) = rest.try_recv()
    {
        all.push(next);
    }
    all
}

/// Sorts the end of the stream: the server's own words have no source, those of the transport do.
fn loss_of(status: &Status) -> Loss {
    match status.source() {
        Some(_) => Loss::ConnectionBroke,
        None => Loss::StreamFailed(status.message().to_owned()),
    }
}

/// Waits until the server has ended its half of the stream too: the session is over there then.
async fn await_goodbye(mut incoming: Streaming<v1::SessionEvent>, patience: Duration) {
    let goodbye = async { while let Ok(Some(_)) = incoming.message().await {} };
    // A server that is gone says nothing.
    let _ = tokio::time::timeout(patience, goodbye).await;
}

impl EventHub {
    pub(crate) fn new() -> Self {
        let (sender, _) = broadcast::channel(EVENTS_KEPT);
        Self(Arc::new(Mutex::new(Hub::Open(sender))))
    }

    pub(crate) fn subscribe(&self) -> Events {
        match &*self.lock() {
            Hub::Open(sender) => Events::new(sender.subscribe()),
            Hub::Over(loss) => Events::of_ended_session(loss.clone()),
        }
    }

    fn send(&self, event: Event) {
        if let Hub::Open(sender) = &*self.lock() {
            // Fails when nobody subscribed, which is fine.
            let _ = sender.send(event);
        }
    }

    fn close(&self, loss: &Loss) {
        self.send(Event::Disconnected { loss: loss.clone() });
        *self.lock() = Hub::Over(loss.clone());
    }

    fn lock(&self) -> MutexGuard<'_, Hub> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
