//! Reads and digests on the stream path: an answer holds bytes of the generation that was asked for.

use std::sync::Arc;

use super::{Engine, StreamPiece};
use crate::error::Result;
use crate::held::HeldFile;
use crate::ids::{Generation, PinId};
use crate::registry::{PinAccess, Refusal};

impl Engine {
    /// Reads bytes of a pin through the kernel.
    pub(crate) async fn stream_read(&self, piece: StreamPiece, len: usize) -> Result<Vec<u8>> {
        self.streaming(piece, PinAccess::Read, move |engine| {
            engine.read_inside(piece, len, HeldFile::read_at)
        })
        .await
    }

    /// BLAKE3 of bytes of a pin, as the medium has them: bytes that could not be written back stay in the
    /// page cache and look well there. No fence waits for the sum.
    pub(crate) async fn stream_digest(&self, piece: StreamPiece, len: usize) -> Result<Vec<u8>> {
        let digest = move |data: Vec<u8>| blake3::hash(&data).as_bytes().to_vec();
        let work =
            move |engine: &Arc<Self>| engine.read_inside(piece, len, read_from_medium).map(digest);
        self.streaming(piece, PinAccess::Read, work).await
    }

    /// A fence does not wait for reads, so `copy` may return bytes of the file's next life. The
    /// generation is checked again after it.
    fn read_inside(
        &self,
        piece: StreamPiece,
        len: usize,
        copy: impl FnOnce(&HeldFile, &mut [u8], u64) -> Result<()>,
    ) -> Result<Vec<u8>> {
        self.inside(piece, len as u64, PinAccess::Read, |file, _| {
            let mut data = vec![0; len];
            copy(file, &mut data, piece.offset)?;
            self.demand_not_let_go(file, piece.pin, piece.generation)?;
            Ok(data)
        })
    }

    /// Refuses what ended too late: once the fence has fallen, or the kernel has let somebody through
    /// by itself, the file is another's.
    pub(super) fn demand_not_let_go(
        &self,
        file: &HeldFile,
        pin: PinId,
        generation: Generation,
    ) -> Result<()> {
        self.registry().demand_unfenced(file.id(), pin, generation)?;
        if file.lapsed() { Err(Refusal::Stale { pin, asked: generation }.into()) } else { Ok(()) }
    }
}

/// Bytes that are not flushed yet come from the page cache all the same; a commit tells of them.
fn read_from_medium(file: &HeldFile, data: &mut [u8], offset: u64) -> Result<()> {
    file.drop_cached(offset..offset + data.len() as u64)?;
    file.read_at(data, offset)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::num::NonZeroUsize;
    use std::time::{Duration, Instant};

    use pinfold_leases::RelativePath;

    use super::super::{PinOrder, TransportWish};
    use super::*;
    use crate::config::{Config, ExportConfig};
    use crate::error::Error;
    use crate::ids::SessionId;
    use crate::registry::{InspectPage, Stage};
    use crate::session::{Mailbox, Outbox};

    const LEN: usize = 4096;

    fn order() -> PinOrder {
        PinOrder {
            export: "data".to_owned(),
            path: RelativePath::parse("file").unwrap(),
            range: None,
            access: PinAccess::ReadWrite,
            expected: None,
            expected_life: None,
            transport: TransportWish::Stream,
            exclusive: false,
            steal: false,
            reserve_end: 0,
            wait: Duration::ZERO,
            number: 0,
        }
    }

    fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !is_so() {
            assert!(begin.elapsed() < Duration::from_secs(60), "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn engine_on(folder: &std::path::Path) -> (Arc<Engine>, SessionId) {
        let mut config = Config::new(vec![ExportConfig::new("data", folder)]);
        config.rdma_devices = Vec::new();
        let engine = Engine::start(&config).unwrap();
        let outbox = Outbox::new(Mailbox::new(16));
        let session = engine.open_session(outbox, "reader").unwrap();
        (engine, session)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_grant_that_gets_lost_on_its_way_leaves_no_pin() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), [b'O'; LEN]).unwrap();
        let (engine, session) = engine_on(folder.path());
        let mut told = engine.pin(session, order()).await.unwrap();
        told.claim.take();
        let identity = told.file.description().identity();
        drop(told);
        let lost = engine.pin(session, order()).await.unwrap();
        let pins = |engine: &Engine| match engine.standing(identity) {
            Some(crate::registry::Standing::Held { pins, .. }) => pins,
            _ => 0,
        };
        assert_eq!(pins(&engine), 2);
        drop(lost);
        until("the second is given back", || pins(&engine) == 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_read_that_a_local_process_overtakes_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, [b'O'; LEN]).unwrap();
        let (engine, session) = engine_on(folder.path());
        let pin = engine.pin(session, order()).await.unwrap();
        let generation = pin.generation;
        let piece = StreamPiece { session, pin: pin.pin, generation, offset: 0 };
        drop(pin.file);
        let stage = move |engine: &Engine| {
            let all = InspectPage { from: None, size: NonZeroUsize::MAX };
            let (files, _) = engine.registry().files_view(all);
            files.into_iter().find(|file| file.generation == generation).map(|file| file.stage)
        };
        let reading = Arc::clone(&engine);
        let read = tokio::task::spawn_blocking(move || {
            reading.read_inside(piece, LEN, |file, data, offset| {
                // The kernel is slow, and somebody cuts the file and writes it anew meanwhile.
                let rewriting = std::thread::spawn(move || {
                    fs::File::create(&path).unwrap().write_all(&[b'N'; LEN]).unwrap();
                });
                until("the clients are told", || stage(&reading) == Some(Stage::Draining));
                reading.drained(session, &[piece.pin]);
                rewriting.join().unwrap();
                file.read_at(data, offset)
            })
        });
        let refused = read.await.unwrap().map(|data| data.first().copied());
        let stale = matches!(refused, Err(Error::Refused(Refusal::Stale { .. })));
        assert!(stale, "{refused:?}");
    }
}
