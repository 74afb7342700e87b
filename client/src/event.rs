//! What a session tells its user unasked.

use tokio::sync::broadcast;

use crate::{DrainNotice, Loss, Revocation};

/// News of a session.
#[derive(Clone, Debug, Eq, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// The server wants these pins back: nothing new begins on them.
    Draining {
        /// Why, and how long it may take.
        notice: DrainNotice,
        /// Their numbers: [`Grant::pin_id`](crate::Grant::pin_id).
        pins: Vec<u64>,
    },
    /// These pins are gone.
    Revoked {
        /// Why and how.
        revocation: Revocation,
        /// Their numbers: [`Grant::pin_id`](crate::Grant::pin_id).
        pins: Vec<u64>,
    },
    /// The session is over, and every pin with it. Nothing follows.
    Disconnected {
        /// How it ended.
        loss: Loss,
    },
    /// The subscriber was too slow: this many events are lost to it. What a pin's calls return is
    /// right all the same.
    Missed {
        /// How many.
        count: u64,
    },
}

/// A subscription to the events of a session, from the call of
/// [`Session::events`](crate::Session::events) on.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    /// The session was over before the subscription began.
    over: Option<Loss>,
}

impl Events {
    /// Waits for the next event; none comes after `Disconnected`.
    ///
    /// Cancellation-safe: an event is returned or still there.
    pub async fn next(&mut self) -> Option<Event> {
        if let Some(loss) = self.over.take() {
            return Some(Event::Disconnected { loss });
        }
        match self.receiver.recv().await {
            Ok(event) => Some(event),
            Err(broadcast::error::RecvError::Lagged(count)) => Some(Event::Missed { count }),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }

    pub(crate) fn new(receiver: broadcast::Receiver<Event>) -> Self {
        Self { receiver, over: None }
    }

    pub(crate) fn of_ended_session(loss: Loss) -> Self {
        let (_, receiver) = broadcast::channel(1);
        Self { receiver, over: Some(loss) }
    }
}
