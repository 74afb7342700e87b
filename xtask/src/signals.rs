//! Turns the signals that end a program into events, so that a guest is ended in order.

use std::sync::Mutex;
use std::sync::mpsc::Sender;
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

use crate::vm::Event;

/// The session that runs now.
static SESSION: Mutex<Option<Sender<Event>>> = Mutex::new(None);

fn ours() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// Takes SIGINT, SIGTERM and SIGHUP over. Call it before other threads start: they inherit that
/// the signals are blocked, so only the one here gets them.
pub(crate) fn take_over() -> Result<()> {
    let set = ours();
    set.thread_block().context("cannot block signals")?;
    thread::spawn(move || {
        while let Ok(signal) = set.wait() {
            let session = SESSION.lock().ok().and_then(|session| session.clone());
            let told = session.is_some_and(|s| s.send(Event::Signal(signal as i32)).is_ok());
            if !told {
                std::process::exit(128 + signal as i32);
            }
        }
    });
    Ok(())
}

/// Starts a child that can be interrupted itself: it inherits what this thread blocks, and its own
/// children after it, tests of Ctrl-C among them.
pub(crate) fn unblocked<T>(start: impl FnOnce() -> T) -> Result<T> {
    let set = ours();
    set.thread_unblock().context("cannot unblock signals")?;
    let started = start();
    set.thread_block().context("cannot block signals")?;
    Ok(started)
}

/// From now on signals are events of this session; once it is over they end the program.
pub(crate) fn forward(events: Sender<Event>) {
    if let Ok(mut session) = SESSION.lock() {
        *session = Some(events);
    }
}

/// Tells the session that runs now, if there is one.
pub(crate) fn tell(event: Event) {
    let session = SESSION.lock().ok().and_then(|session| session.clone());
    if let Some(session) = session {
        // Fails only when that session is over.
        let _ = session.send(event);
    }
}
