//! The operator's view of sessions, files and pins: page by page, made on threads of its own.

use std::time::Instant;

use pinfold_proto::v1;

use super::{Engine, INSPECT_AT_MOST, locked};
use crate::error::{Error, Result};
use crate::ids::SessionId;
use crate::registry::{InspectPage, PagePlace};
use crate::wire;

/// Bytes of files and pins on one page, about. A client takes 4 MiB as a rule.
const PAGE_BYTES: usize = 2 << 20;
/// And of files that were wanted back.
const BROKEN_BYTES: usize = 1 << 20;
/// More than a pin takes on the wire, or a file beside its path.
const ITEM_BYTES: usize = 80;

impl Engine {
    /// A page of it, as seen by one session. The first page also has what is not files.
    pub(crate) async fn inspect(
        &self,
        id: SessionId,
        page: InspectPage,
    ) -> Result<v1::InspectResponse> {
        let engine = self.arc();
        let made = self.operators.run(INSPECT_AT_MOST, move || engine.inspect_at_once(id, page));
        made.await.map_err(|_| Error::Task)
    }

    fn inspect_at_once(&self, id: SessionId, page: InspectPage) -> v1::InspectResponse {
        let mut response = match page.from {
            None => self.all_but_files(id),
            Some(_) => v1::InspectResponse::default(),
        };
        let (views, mut next) = self.registry().files_view(page);
        let mut bytes = 0;
        for view in views {
            let Some(file) = self.file(view.guard) else { continue };
            bytes += file.path().as_os_str().len() + (view.pins.len() + 1) * ITEM_BYTES;
            if bytes > PAGE_BYTES && !response.files.is_empty() {
                next = Some(PagePlace::of(&view));
                break;
            }
            response.files.push(wire::file_info(&view, &file));
        }
        response.next_page_token = next.map(wire::inspect_token).unwrap_or_default();
        response
    }

    fn all_but_files(&self, id: SessionId) -> v1::InspectResponse {
        let device = |id| self.parts(id)?.device.get().cloned();
        let sessions = self.registry().sessions_view();
        let sessions = sessions
            .into_iter()
            .map(|view| wire::session_info(&view, view.id == id, device(view.id)))
            .collect();
        let now = Instant::now();
        let broken = locked(&self.breaks).view(now);
        let mut bytes = 0;
        let broken = broken.into_iter().map(|broken| wire::broken_file(broken, now));
        let broken = broken.take_while(|broken| {
            bytes += broken.path.len() + (broken.by.len() + 1) * ITEM_BYTES;
            bytes <= BROKEN_BYTES
        });
        v1::InspectResponse {
            sessions,
            exports: self.export_infos(),
            broken: broken.collect(),
            region_memory_bytes: self.region_budget.held(),
            region_memory_bytes_max: self.region_budget.limit(),
            ..Default::default()
        }
    }
}
