//! Create and Grow as they come by gRPC: with one answer, or with the progress before it.

use std::pin::pin;
use std::sync::Arc;

use pinfold_leases::{Progress, RelativePath};
use pinfold_proto::v1;
use pinfold_proto::v1::allocate_event::Event;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use crate::engine::{Caller, Engine};
use crate::error::{Error, Result};
use crate::ids::SessionId;
use crate::wire;

/// Events that wait for the client to read them: progress that finds no place is not sent.
const DEPTH: usize = 1;

/// The events that an Allocate call carries to the client.
pub(crate) type Events = mpsc::Receiver<Result<v1::AllocateEvent, Status>>;

/// A file to create, or to give another size.
#[derive(Debug)]
pub(crate) struct Creation {
    session: SessionId,
    export: String,
    path: RelativePath,
    size: u64,
    if_exists: v1::IfExists,
}

impl Creation {
    /// Checks the form of a request.
    pub(crate) fn parse(request: v1::CreateRequest) -> Result<Self> {
        let if_exists = request.if_exists();
        Ok(Self {
            session: wire::session_id(&request.session_id)?,
            path: wire::path(&request.path)?,
            size: wire::file_size(request.size)?,
            export: request.export,
            if_exists,
        })
    }

    async fn run(self, engine: &Engine, caller: Caller) -> Result<v1::CreateResponse> {
        let Self { export, path, size, if_exists, .. } = self;
        let made = engine.create(caller.clone(), export.clone(), path.clone(), size).await;
        let (identity, created) = match made {
            Err(Error::File(pinfold_leases::Error::Exists { .. }))
                if if_exists == v1::IfExists::Resize =>
            {
                (engine.resize(caller, export, path, size).await?, false)
            }
            made => (made?, true),
        };
        Ok(v1::CreateResponse { identity: Some(wire::identity(identity)), created })
    }
}

/// A file to make longer.
#[derive(Debug)]
pub(crate) struct Growth {
    session: SessionId,
    export: String,
    path: RelativePath,
    size: u64,
}

impl Growth {
    /// Checks the form of a request.
    pub(crate) fn parse(request: v1::GrowRequest) -> Result<Self> {
        Ok(Self {
            session: wire::session_id(&request.session_id)?,
            path: wire::path(&request.path)?,
            size: wire::file_size(request.size)?,
            export: request.export,
        })
    }

    async fn run(self, engine: &Engine, caller: Caller) -> Result<v1::GrowResponse> {
        let valid_end = engine.grow(caller, self.export, self.path, self.size).await?;
        Ok(v1::GrowResponse { valid_end })
    }
}

/// One of the two.
#[derive(Debug)]
pub(crate) enum Allocation {
    Create(Creation),
    Grow(Growth),
}

impl Allocation {
    /// Checks the form of a request.
    pub(crate) fn parse(request: v1::AllocateRequest) -> Result<Self> {
        use v1::allocate_request::What;
        match request.what {
            Some(What::Create(create)) => Ok(Self::Create(Creation::parse(create)?)),
            Some(What::Grow(grow)) => Ok(Self::Grow(Growth::parse(grow)?)),
            None => {
                Err(Error::Malformed { what: "nothing to allocate: set create or grow".into() })
            }
        }
    }

    fn session(&self) -> SessionId {
        match self {
            Self::Create(creation) => creation.session,
            Self::Grow(growth) => growth.session,
        }
    }

    async fn run(self, engine: &Engine, caller: Caller) -> Result<Event> {
        Ok(match self {
            Self::Create(creation) => Event::Created(creation.run(engine, caller).await?),
            Self::Grow(growth) => Event::Grown(growth.run(engine, caller).await?),
        })
    }
}

/// Each call is a sign of life of its session.
fn begin(engine: &Engine, session: SessionId) -> Result<()> {
    engine.note_call(session);
    engine.demand_session(session)
}

/// Creates a file. Given up, it stops and leaves nothing.
pub(crate) async fn create(engine: &Engine, creation: Creation) -> Result<v1::CreateResponse> {
    begin(engine, creation.session)?;
    let (caller, _listening) = Caller::new(creation.session);
    creation.run(engine, caller).await
}

/// Makes a file longer. Given up, it stops where it is.
pub(crate) async fn grow(engine: &Engine, growth: Growth) -> Result<v1::GrowResponse> {
    begin(engine, growth.session)?;
    let (caller, _listening) = Caller::new(growth.session);
    growth.run(engine, caller).await
}

/// Does either, and shows the progress.
pub(crate) fn start(engine: Arc<Engine>, allocation: Allocation) -> Result<Events> {
    begin(&engine, allocation.session())?;
    let (events, received) = mpsc::channel(DEPTH);
    tokio::spawn(async move {
        let (caller, progress) = Caller::new(allocation.session());
        let work = allocation.run(&engine, caller);
        let shown = async {
            let mut work = pin!(work);
            show(&events, progress, work.as_mut()).await
        };
        if let Some(last) = shown.await {
            // A client that has gone wants no answer.
            let _ = events.send(last).await;
        }
    });
    Ok(received)
}

/// Shows the progress until the work ends, or until nobody looks.
async fn show(
    events: &mpsc::Sender<Result<v1::AllocateEvent, Status>>,
    mut progress: watch::Receiver<Progress>,
    mut work: impl Future<Output = Result<Event>> + Unpin,
) -> Option<Result<v1::AllocateEvent, Status>> {
    let event = |event| v1::AllocateEvent { event: Some(event) };
    loop {
        tokio::select! {
            biased;
            done = &mut work => return Some(done.map(event).map_err(Status::from)),
            () = events.closed() => return None,
            // The sender lives as long as the work.
            Ok(()) = progress.changed() => {
                let Progress { done_bytes, total_bytes } = *progress.borrow_and_update();
                let progress = v1::Progress { done_bytes, total_bytes };
                let _ = events.try_send(Ok(event(Event::Progress(progress))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_goes_ends_the_work() {
        let (events, received) = mpsc::channel(DEPTH);
        let (shown, progress) = watch::channel(Progress::default());
        let never = std::future::pending::<Result<Event>>();
        drop(received);
        let last = show(&events, progress, pin!(never)).await;
        assert!(last.is_none());
        assert!(shown.is_closed(), "what creates the file sees that nobody looks");
    }

    #[tokio::test]
    async fn the_answer_comes_last() {
        let (events, mut received) = mpsc::channel::<Result<v1::AllocateEvent, Status>>(DEPTH);
        let (shown, progress) = watch::channel(Progress::default());
        let (end, ended) = tokio::sync::oneshot::channel();
        let work = async { Ok(ended.await.expect("an answer")) };
        let looks = async {
            shown.send_replace(Progress { done_bytes: 1, total_bytes: 2 });
            let first = received.recv().await.unwrap().unwrap();
            end.send(Event::Grown(v1::GrowResponse { valid_end: 2 })).unwrap();
            first
        };
        let work = pin!(work);
        let (last, first) = tokio::join!(show(&events, progress, work), looks);
        assert!(matches!(first.event, Some(Event::Progress(v1::Progress { done_bytes: 1, .. }))));
        assert!(matches!(last.unwrap().unwrap().event, Some(Event::Grown(_))));
    }
}
