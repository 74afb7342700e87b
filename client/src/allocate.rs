//! Creating and growing files with their progress shown, for sizes that take the server a while.

use pinfold_proto::v1;
use pinfold_proto::v1::allocate_event::Event;
use pinfold_proto::v1::allocate_request::What;
use tonic::{Response, Status};

use crate::file::FileName;
use crate::grant::Malformed;
use crate::{Created, Error, IfExists, Session};

/// How far the server has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AllocationProgress {
    /// Bytes that are allocated, and zeroed where they have to be.
    pub done_bytes: u64,
    /// Bytes that there are to do.
    pub total_bytes: u64,
}

impl Session {
    /// As [`create`](Self::create), and calls `progress` while the server is at it. If the future is dropped,
    /// the server stops: a new file is gone then, and one that was there keeps the size that it has reached.
    ///
    /// # Errors
    ///
    /// As [`create`](Self::create).
    pub async fn create_with_progress(
        &self,
        export: &str,
        path: &str,
        size: u64,
        if_exists: IfExists,
        progress: impl FnMut(AllocationProgress),
    ) -> Result<Created, Error> {
        let doing = || format!("create {}", FileName::new(export, path));
        let create = v1::CreateRequest {
            session_id: self.session_id(),
            export: export.to_owned(),
            path: path.to_owned(),
            size,
            if_exists: v1::IfExists::from(if_exists).into(),
        };
        match self.allocate(doing, What::Create(create), progress).await? {
            Event::Created(answer) => Created::parse(answer)
                .map_err(|malformed| Error::from_malformed(malformed, doing())),
            _ => Err(Error::from_malformed(Malformed("the answer to another request"), doing())),
        }
    }

    /// As [`grow`](Self::grow), and calls `progress` while the server is at it. If the future is dropped, the
    /// server stops, and the file keeps the size that it has reached.
    ///
    /// # Errors
    ///
    /// As [`grow`](Self::grow).
    pub async fn grow_with_progress(
        &self,
        export: &str,
        path: &str,
        size: u64,
        progress: impl FnMut(AllocationProgress),
    ) -> Result<u64, Error> {
        let doing = || format!("grow {}", FileName::new(export, path));
        let (export, path) = (export.to_owned(), path.to_owned());
        let grow = v1::GrowRequest { session_id: self.session_id(), export, path, size };
        match self.allocate(doing, What::Grow(grow), progress).await? {
            Event::Grown(answer) => Ok(answer.valid_end),
            _ => Err(Error::from_malformed(Malformed("the answer to another request"), doing())),
        }
    }

    /// Returns the last event.
    async fn allocate(
        &self,
        doing: impl Fn() -> String,
        what: What,
        mut progress: impl FnMut(AllocationProgress),
    ) -> Result<Event, Error> {
        let request = v1::AllocateRequest { what: Some(what) };
        let control = self.control();
        control
            .call_until_dropped(doing, async |mut client| {
                let mut events = client.allocate(request).await?.into_inner();
                while let Some(event) = events.message().await? {
                    match event.event {
                        Some(Event::Progress(v1::Progress { done_bytes, total_bytes })) => {
                            progress(AllocationProgress { done_bytes, total_bytes });
                        }
                        Some(last) => return Ok(Response::new(last)),
                        // Of a newer server.
                        None => {}
                    }
                }
                Err(Status::internal("the server ended the call without an answer"))
            })
            .await
    }
}
