//! A trace of the kernel's, with a buffer of its own.

use std::path::PathBuf;

use crate::shell;

const TRACING: &str = "/sys/kernel/tracing";

/// Takes note of events until it is dropped (Documentation/trace/ftrace.rst, instances).
#[derive(Debug)]
pub(crate) struct Trace {
    instance: PathBuf,
}

/// The folder of all traces, mounted if it is not yet.
pub(crate) fn tracing() -> PathBuf {
    shell(&format!("mountpoint -q {TRACING} || mount -t tracefs tracefs {TRACING}"));
    PathBuf::from(TRACING)
}

impl Trace {
    /// Of these events, each with its system. No other trace may have the name.
    pub(crate) fn start(name: &str, events: &[&str]) -> Self {
        let instance = tracing().join(format!("instances/pinfold-{name}"));
        std::fs::create_dir(&instance).unwrap();
        let this = Self { instance };
        for event in events {
            std::fs::write(this.instance.join(format!("events/{event}/enable")), "1").unwrap();
        }
        this
    }

    /// The lines since the last time.
    pub(crate) fn take(&self) -> String {
        let file = self.instance.join("trace");
        let lines = std::fs::read_to_string(&file).unwrap();
        // Opening it for writing empties it.
        std::fs::write(&file, "").unwrap();
        lines
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Fails only while somebody else looks at it; the guest ends with the tests.
        let _ = std::fs::remove_dir(&self.instance);
    }
}
