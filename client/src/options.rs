//! How to connect.

use std::fs;
use std::time::Duration;

/// The server cuts nothing off itself: it refuses a longer name.
const CLIENT_NAME_BYTES_MAX: usize = 256;

const DEFAULT_LANES: u32 = 1;
const DEFAULT_SEND_WINDOW: u32 = 64;
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// How to connect to a server.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    pub(crate) endpoint: String,
    pub(crate) client_name: String,
    pub(crate) rdma_device: RdmaDevice,
    pub(crate) server_device: String,
    pub(crate) lanes: u32,
    pub(crate) send_window: u32,
    pub(crate) poll_at_most: Duration,
    pub(crate) drain_policy: DrainPolicy,
    pub(crate) timeout: Duration,
}

/// Which RDMA device of this host a session uses.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum RdmaDevice {
    /// The first one with an active port. Where this host or the server has none, or the two can't
    /// be connected, the session goes by the stream path; [`Session::no_rdma_because`] tells why.
    ///
    /// [`Session::no_rdma_because`]: crate::Session::no_rdma_because
    #[default]
    Auto,
    /// The one of this name, such as `rxe0` or `mlx5_0`, or no session.
    Named(String),
    /// None: the session goes by the stream path.
    None,
}

/// What a session does when the server wants pins back.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum DrainPolicy {
    /// Lets nothing new begin on them, and answers when what was in flight has ended: no write is
    /// lost, and the queue pair survives.
    #[default]
    Automatic,
    /// Does nothing and goes on posting, until the keys die and the queue pair with them. This is
    /// the client that does not listen, against which the server has to protect the file; it is
    /// here to show and to test that.
    Ignore,
}

impl ConnectOptions {
    /// Connects to this server (`http://HOST:PORT`), with the first RDMA device of this host.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            client_name: default_client_name(),
            rdma_device: RdmaDevice::Auto,
            server_device: String::new(),
            lanes: DEFAULT_LANES,
            send_window: DEFAULT_SEND_WINDOW,
            poll_at_most: Duration::ZERO,
            drain_policy: DrainPolicy::Automatic,
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// Who connects, for the operator's eyes: cut off after 256 bytes. Default: program and host.
    #[must_use]
    pub fn client_name(mut self, name: impl Into<String>) -> Self {
        self.client_name = name.into();
        let mut end = self.client_name.len().min(CLIENT_NAME_BYTES_MAX);
        while !self.client_name.is_char_boundary(end) {
            end -= 1;
        }
        self.client_name.truncate(end);
        self
    }

    /// Which RDMA device to use. Default: [`RdmaDevice::Auto`].
    #[must_use]
    pub fn rdma_device(mut self, device: RdmaDevice) -> Self {
        self.rdma_device = device;
        self
    }

    /// Which of the server's RDMA devices to connect to; if it has none of that name there is no
    /// session. Default: its first.
    #[must_use]
    pub fn server_device(mut self, name: impl Into<String>) -> Self {
        self.server_device = name.into();
        self
    }

    /// Over how many lanes (queue pairs) the session's pins are spread; as many as the server allows (64),
    /// if that is less. Each pin gets the lane with the fewest others, and stays on it: so its transfers
    /// keep their order, and a commit has one lane to look after. A file that several threads write at full
    /// rate is pinned once for each. Default: 1.
    #[must_use]
    pub fn lanes(mut self, lanes: u32) -> Self {
        self.lanes = lanes.max(1);
        self
    }

    /// How many requests may be in flight on each lane; more wait for their turn. Default: 64.
    #[must_use]
    pub fn send_window(mut self, requests: u32) -> Self {
        self.send_window = requests.max(1);
        self
    }

    /// Has a transfer that is alone in flight look for its completion for a while before it sleeps: as
    /// long as transfers took lately, and never longer than this. It saves the way through the kernel, a
    /// few microseconds, and keeps a processor and a thread of the runtime busy meanwhile. Default: zero,
    /// which sleeps at once.
    #[must_use]
    pub fn poll_at_most(mut self, at_most: Duration) -> Self {
        self.poll_at_most = at_most;
        self
    }

    /// What to do when the server wants pins back. Default: [`DrainPolicy::Automatic`].
    #[must_use]
    pub fn drain_policy(mut self, policy: DrainPolicy) -> Self {
        self.drain_policy = policy;
        self
    }

    /// How long the server may take to open the session. Default: 10 s.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
}

fn default_client_name() -> String {
    let program = std::env::current_exe()
        .ok()
        .and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .unwrap_or_else(|| "unknown program".to_owned());
    match fs::read_to_string("/proc/sys/kernel/hostname") {
        Ok(host) => format!("{program} on {}", host.trim()),
        Err(_) => program,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_off_between_characters() {
        let options = ConnectOptions::new("http://localhost:1").client_name("ü".repeat(200));
        assert_eq!(options.client_name.len(), 256);
        let options = options.client_name("a".to_owned() + &"ü".repeat(200));
        assert_eq!(options.client_name.len(), 255);
    }
}
