//! Carries a session's [`Notices`] from the threads that make them to the stream of its client.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pinfold_proto::v1;
use tokio_stream::Stream;
use tonic::Status;

use super::notices::{Notice, Notices};
use crate::sync::locked;
use crate::wire;

/// Where notices for a session go. Adding one never waits.
#[derive(Clone, Debug)]
pub(crate) struct Mailbox(Arc<Mutex<Inner>>);

/// The engine's hold on a mailbox: when it is dropped, the stream ends after what waits in it.
#[derive(Debug)]
pub(crate) struct Outbox(Mailbox);

/// What a session's stream carries to the client.
#[derive(Debug)]
pub(crate) struct Events {
    welcome: Option<v1::SessionEvent>,
    mailbox: Mailbox,
}

#[derive(Debug)]
struct Inner {
    notices: Notices,
    closed: bool,
    reader: Option<Waker>,
}

impl Mailbox {
    /// For a session that can hold so many pins.
    pub(crate) fn new(pins_of_session: usize) -> Self {
        let notices = Notices::new(pins_of_session);
        Self(Arc::new(Mutex::new(Inner { notices, closed: false, reader: None })))
    }

    /// The stream, which begins with the welcome.
    pub(crate) fn events(&self, welcome: v1::SessionEvent) -> Events {
        Events { welcome: Some(welcome), mailbox: self.clone() }
    }

    /// Adds to what waits.
    pub(crate) fn post(&self, add: impl FnOnce(&mut Notices, Instant)) {
        let mut inner = locked(&self.0);
        add(&mut inner.notices, Instant::now());
        let reader = inner.reader.take();
        drop(inner);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// See [`Notices::is_stuck`].
    pub(crate) fn is_stuck(&self, patience: Duration) -> bool {
        locked(&self.0).notices.is_stuck(patience, Instant::now())
    }
}

impl Outbox {
    pub(crate) fn new(mailbox: Mailbox) -> Self {
        Self(mailbox)
    }

    /// See [`Mailbox::post`].
    pub(crate) fn post(&self, add: impl FnOnce(&mut Notices, Instant)) {
        self.0.post(add);
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        let mut inner = locked(&self.0.0);
        inner.closed = true;
        let reader = inner.reader.take();
        drop(inner);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

impl Stream for Events {
    type Item = Result<v1::SessionEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(welcome) = self.welcome.take() {
            return Poll::Ready(Some(Ok(welcome)));
        }
        let mut inner = locked(&self.mailbox.0);
        if let Some(notice) = inner.notices.take(Instant::now()) {
            return Poll::Ready(Some(Ok(event(notice))));
        }
        if inner.closed {
            return Poll::Ready(None);
        }
        inner.reader = Some(context.waker().clone());
        Poll::Pending
    }
}

fn event(notice: Notice) -> v1::SessionEvent {
    match notice {
        Notice::HeartbeatReply { sequence } => wire::heartbeat_reply(sequence),
        Notice::Draining { pins, generation, reason, budget } => {
            wire::draining(&pins, generation, reason, budget)
        }
        Notice::Revoked { pins, generation, reason, timings } => {
            wire::revoked(&pins, generation, reason, &timings)
        }
    }
}
