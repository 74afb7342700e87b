//! Whether both sides have the same bytes, found out without carrying them: the server's processor tells
//! the digest of what the file has there, and we make that of what is here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use pinfold_client::{Code, Error, Pin, Reason};
use tokio::task::JoinSet;

use crate::failure::Failure;
use crate::transfer::blocking;

/// Longest stretch that is compared at a time.
const STRETCH: usize = 1 << 20;

/// What `--resume` goes by, as long as the server can tell it.
#[derive(Debug)]
pub(crate) struct Proof {
    asks: AtomicBool,
    because: OnceLock<String>,
}

impl Proof {
    /// Asks only if there is something to be asked about.
    pub(crate) fn new(asks: bool) -> Self {
        Self { asks: AtomicBool::new(asks), because: OnceLock::new() }
    }

    /// Whether the file has these bytes there. What can't be told is not so.
    pub(crate) async fn has(&self, pin: &Pin, offset: u64, bytes: &[u8]) -> Result<bool, Error> {
        if !self.asks.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match has(pin, offset, bytes).await {
            Err(error) if cannot_be_told(&error) => {
                self.asks.store(false, Ordering::Relaxed);
                let _ = self.because.set(error.to_string());
                Ok(false)
            }
            told => told,
        }
    }

    /// Why the copy was made from the start, although it was to go on.
    pub(crate) fn missing_because(&self) -> Option<String> {
        self.because.get().cloned()
    }
}

/// A server that is too old for it, or a file that it can't read.
pub(crate) fn cannot_be_told(error: &Error) -> bool {
    match error {
        Error::Refused { reason: None, code, .. } => *code == Code::Unimplemented,
        error => error.reason() == Some(Reason::UnsupportedFile),
    }
}

async fn has(pin: &Pin, offset: u64, bytes: &[u8]) -> Result<bool, Error> {
    let mut at = offset;
    for stretch in bytes.chunks(STRETCH.min(pin.digest_bytes_max())) {
        if pin.digest(at, stretch.len()).await? != *blake3::hash(stretch).as_bytes() {
            return Ok(false);
        }
        at += stretch.len() as u64;
    }
    Ok(true)
}

/// A stretch in which the local file and the first `len` bytes of the pinned one differ; `None`: there
/// is none. So many stretches are compared at a time.
pub(crate) async fn difference(
    pin: &Arc<Pin>,
    file: &Arc<File>,
    len: u64,
    at_a_time: u32,
) -> Result<Option<Range<u64>>, Failure> {
    let next = Arc::new(AtomicU64::new(0));
    let mut running = JoinSet::new();
    for _ in 0..len.div_ceil(STRETCH as u64).min(at_a_time.into()) {
        running.spawn(find(pin.clone(), file.clone(), len, next.clone()));
    }
    let mut found: Option<Range<u64>> = None;
    while let Some(ended) = running.join_next().await {
        let other = match ended {
            Ok(other) => other?,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        if let Some(other) = other
            && found.as_ref().is_none_or(|found| other.start < found.start)
        {
            found = Some(other);
        }
    }
    Ok(found)
}

async fn find(
    pin: Arc<Pin>,
    file: Arc<File>,
    len: u64,
    next: Arc<AtomicU64>,
) -> Result<Option<Range<u64>>, Failure> {
    let mut bytes = vec![0; STRETCH];
    loop {
        let start = next.fetch_add(STRETCH as u64, Ordering::Relaxed);
        if start >= len {
            return Ok(None);
        }
        let stretch = start..len.min(start + STRETCH as u64);
        let (wanted, from) = ((stretch.end - start) as usize, file.clone());
        let read = blocking(move || {
            bytes.truncate(wanted);
            from.read_exact_at(&mut bytes, start).map(|()| bytes)
        });
        bytes = match read.await {
            Ok(bytes) => bytes,
            // It is shorter.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Some(stretch)),
            Err(error) => {
                let what = format!("cannot read the local file again at byte {start}");
                return Err(Failure::local(what, error));
            }
        };
        if !has(&pin, start, &bytes).await? {
            // The others need not go on.
            next.store(len, Ordering::Relaxed);
            return Ok(Some(stretch));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_cannot_tell_is_copied_to_from_the_start() {
        let refused = |reason, code| Error::Refused {
            doing: "tell the digest of 4096 bytes at byte 0 of data/log".to_owned(),
            reason,
            code,
            message: String::new(),
        };
        // A server from before there were digests; a file that it can't read.
        assert!(cannot_be_told(&refused(None, Code::Unimplemented)));
        assert!(cannot_be_told(&refused(Some(Reason::UnsupportedFile), Code::FailedPrecondition)));
        assert!(!cannot_be_told(&refused(None, Code::Unavailable)));
        assert!(!cannot_be_told(&refused(Some(Reason::FileDraining), Code::Unavailable)));
    }
}
