//! Sessions and their queue pairs.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use pinfold_verbs::{Endpoint, Mtu};
use tokio::sync::Mutex as AsyncMutex;

use super::{CONNECT_AT_MOST, Engine, SessionParts, locked};
use crate::error::{Error, NotDone, Result};
use crate::fabric::{Fabric, Link, Severed};
use crate::ids::{PinId, SessionId};
use crate::registry::Refusal;
use crate::session::Outbox;

/// Withdrawn requests of a session that are remembered: more than can be under way at a time.
const WITHDRAWN_KEPT: usize = 1024;

impl SessionParts {
    /// What to connect a queue pair with: on the session's own device, if it has one already.
    fn link_on(&self, fabric: Arc<Fabric>) -> Result<Link> {
        match &*locked(&self.link) {
            None => {}
            Some(link) if Arc::ptr_eq(link.fabric(), &fabric) => return Ok(link.beside()),
            Some(link) => {
                let why = format!(
                    "this session is on {} already; open another one for {}",
                    link.fabric().device().name(),
                    fabric.device().name()
                );
                return Err(Error::QueuePair { why });
            }
        }
        Link::new(fabric)
    }

    /// Destroys the queue pairs: when this returns, no request of the session lands any more.
    pub(super) fn disconnect(&self) {
        let severed = self.sever();
        severed.stop();
        severed.destroy();
    }

    /// Takes the queue pairs out: what the client connects later are others.
    pub(super) fn sever(&self) -> Severed {
        locked(&self.link).as_mut().map(Link::sever).unwrap_or_default()
    }
}

impl Engine {
    /// Takes a session up; what it is told goes to `outbox`.
    pub(crate) fn open_session(&self, outbox: Outbox, client_name: &str) -> Result<SessionId> {
        self.room.demand_descriptors()?;
        let id = SessionId::new(random());
        self.registry().open_session(id, client_name)?;
        let parts = SessionParts {
            outbox,
            link: Mutex::default(),
            device: OnceLock::new(),
            last_call: Mutex::new(Instant::now()),
            connecting: Arc::new(AsyncMutex::default()),
            withdrawn: Mutex::default(),
        };
        locked(&self.sessions).insert(id, Arc::new(parts));
        Ok(id)
    }

    /// Whether the session lives.
    pub(crate) fn demand_session(&self, id: SessionId) -> Result<()> {
        Ok(self.registry().demand_session(id)?)
    }

    /// A session makes a call, which is a sign of life.
    pub(crate) fn note_call(&self, id: SessionId) {
        if let Some(parts) = self.parts(id) {
            *locked(&parts.last_call) = Instant::now();
        }
    }

    /// When a session made its last call.
    pub(crate) fn last_call(&self, id: SessionId) -> Option<Instant> {
        self.parts(id).map(|parts| *locked(&parts.last_call))
    }

    /// Nobody waits for the answers to these pin requests any more.
    pub(crate) fn withdraw(&self, id: SessionId, numbers: &[u64]) {
        let Some(parts) = self.parts(id) else { return };
        let mut withdrawn = locked(&parts.withdrawn);
        withdrawn.extend(numbers.iter().take(WITHDRAWN_KEPT));
        while withdrawn.len() > WITHDRAWN_KEPT {
            withdrawn.pop_first();
        }
    }

    pub(super) fn is_withdrawn(&self, id: SessionId, number: u64) -> bool {
        self.parts(id).is_some_and(|parts| locked(&parts.withdrawn).contains(&number))
    }

    /// A session has nothing in flight on these pins any more.
    pub(crate) fn drained(&self, id: SessionId, pins: &[PinId]) {
        let actions = self.registry().drained(id, pins, Instant::now());
        // Only orders to the fence thread come out of this, so it does not block.
        self.perform(actions);
    }

    pub(super) fn session(&self, id: SessionId) -> Result<Arc<SessionParts>> {
        self.demand_session(id)?;
        self.parts(id).ok_or(Refusal::UnknownSession.into())
    }

    /// What there is of a session, also while it ends.
    pub(super) fn parts(&self, id: SessionId) -> Option<Arc<SessionParts>> {
        locked(&self.sessions).get(&id).cloned()
    }

    /// Connects a new queue pair to the client's end; one that was there before under its number is
    /// destroyed. A session stays on the device of its first queue pair: its keys are good on that one
    /// only.
    pub(crate) async fn connect(
        &self,
        id: SessionId,
        number: u32,
        client: Endpoint,
        device: String,
    ) -> Result<(Endpoint, Mtu)> {
        let fabric = self.fabric_named(&device)?;
        let session = self.session(id)?;
        let for_link = Arc::clone(&session);
        // One at a time, and those that wait hold no thread. The turn ends with the work, also if the caller
        // goes away or runs out of time before: a later call must not be overtaken by an earlier one that is
        // still in the kernel.
        let turn = Arc::clone(&session.connecting).lock_owned();
        let turn = tokio::time::timeout(CONNECT_AT_MOST, turn).await.map_err(|_| {
            let why = "an earlier connect of this session is still in the kernel";
            Error::QueuePair { why: why.to_owned() }
        })?;
        let engine = self.arc();
        let connecting = self.connecting.run(CONNECT_AT_MOST, move || {
            let _turn = turn;
            let link = for_link.link_on(fabric)?;
            // Without the lock: the kernel may take a second to resolve the address, and whoever has
            // to cut this session off must not wait for that.
            let connection = link.connect(&client)?;
            let answer = connection.answer;
            // The first one that worked: keys are good on that device only.
            let _ = for_link.device.set(link.fabric().device().name().to_owned());
            let before = locked(&for_link.link).get_or_insert(link).take_in(number, connection);
            before.destroy();
            // The session may have ended meanwhile; then nobody would destroy the new queue pair but
            // us.
            engine.demand_session(id).inspect_err(|_| for_link.disconnect())?;
            Ok(answer)
        });
        connecting.await.map_err(|why| match why {
            NotDone::Panicked => Error::Task,
            why => Error::QueuePair { why: format!("{why}; is the server's network up?") },
        })?
    }

    pub(super) fn fabric_named(&self, name: &str) -> Result<Arc<Fabric>> {
        let found = self.fabrics.iter().find(|f| name.is_empty() || f.device().name() == name);
        if let Some(fabric) = found {
            return Ok(Arc::clone(fabric));
        }
        if self.fabrics.is_empty() {
            return Err(no_device(self.rdma_declined));
        }
        let known: Vec<&str> = self.fabrics.iter().map(|f| f.device().name()).collect();
        Err(Error::UnknownDevice { name: name.to_owned(), known: known.join(", ") })
    }
}

/// `declined`: the operator wants none.
pub(super) fn no_device(declined: bool) -> Error {
    let why = if declined {
        "it was started with --rdma-device none; restart pinfoldd with --rdma-device auto or a \
         device's name, or use the stream path"
    } else {
        "there was none with an active port when it started; add one (rdma link add rxe0 type rxe \
         netdev IFACE makes a soft one) and restart pinfoldd, or use the stream path"
    };
    Error::NoRdmaDevice { why: why.to_owned() }
}

/// Random bytes from the kernel (getrandom(2)).
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        // Interrupted calls are tried again; others don't fail for so few bytes.
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut bytes[filled..], flags).unwrap_or(0);
    }
    bytes
}
