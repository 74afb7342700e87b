//! Where things are, and the daemon on it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use pinfold_client::{ConnectOptions, IfExists, Pin, PinRequest, RdmaDevice, Session, Transport};

use crate::peer::Peer;

/// What the export is called.
pub(crate) const EXPORT: &str = "bench";

/// Of the daemon's log, where something goes wrong.
const LAST_LINES: usize = 20;

/// Where things are.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Places {
    /// A folder on an fs-DAX file system
    #[arg(long, value_name = "FOLDER", env = "PINFOLD_LAB_EXT4")]
    pub(crate) dax: PathBuf,
    /// A folder on tmpfs
    #[arg(long, value_name = "FOLDER", default_value = "/dev/shm")]
    pub(crate) tmpfs: PathBuf,
    /// The RDMA device
    #[arg(long, value_name = "NAME", env = "PINFOLD_LAB_RDMA_DEVICE")]
    pub(crate) device: String,
    /// An IP address of the device, by which librpma connects
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) address: IpAddr,
    /// The index of the device's GID by which perftest connects (RoCE: an IPv4 one; show_gids(8))
    #[arg(long, value_name = "INDEX", default_value = "1")]
    pub(crate) gid_index: u8,
    /// Where the compiled peers are, of bench/peers
    #[arg(long, value_name = "FOLDER")]
    pub(crate) peers: PathBuf,
}

/// A running `pinfoldd` that exports a folder of its own.
#[derive(Debug)]
pub(crate) struct Storage {
    pub(crate) places: Places,
    url: String,
    daemon: Peer,
    log: tempfile::NamedTempFile,
    folder: tempfile::TempDir,
    /// The daemon's state folder.
    _state: tempfile::TempDir,
}

impl Storage {
    /// Starts it.
    pub(crate) fn start(places: &Places) -> Result<Self> {
        let folder = tempfile::tempdir_in(&places.dax)
            .with_context(|| format!("no folder in {}", places.dax.display()))?;
        let export = format!("{EXPORT}={}", folder.path().display());
        let program = beside_us("pinfoldd")?;
        let device = &places.device;
        let state = tempfile::tempdir_in(&places.tmpfs)?;
        let state_dir = state.path().to_str().context("a folder whose name is no UTF-8")?;
        let arguments = [
            "--listen",
            "127.0.0.1:0",
            "--rdma-device",
            device,
            "--export",
            &export,
            "--state-dir",
            state_dir,
        ];
        // As to a journal: a terminal, or the lab's console, would cost more than what it tells of.
        let log = tempfile::NamedTempFile::new_in(&places.tmpfs)?;
        let mut daemon = Peer::start_with_log(&program, &arguments, log.reopen()?)?;
        let url = daemon
            .hear("pinfoldd: listening on")
            .with_context(|| std::fs::read_to_string(log.path()).unwrap_or_default())?;
        Ok(Self { places: places.clone(), url, daemon, log, folder, _state: state })
    }

    /// Where it listens.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// A new session with it.
    pub(crate) async fn connect(&self) -> Result<Session> {
        connect(&self.url, &self.places.device).await
    }

    /// A pin on a new file of that size.
    pub(crate) async fn pin(
        &self,
        session: &Session,
        name: &str,
        bytes: u64,
        transport: Transport,
    ) -> Result<Arc<Pin>> {
        pin(session, name, bytes, transport).await
    }

    /// Of a file in the export.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new file beside the export's own, allocated and zeroed as Pinfold does it.
    pub(crate) fn foreign_file(&self, name: &str, bytes: usize) -> Result<PathBuf> {
        let path = self.path(name);
        let failed = || format!("cannot write {}", path.display());
        std::fs::write(&path, vec![0; bytes]).with_context(failed)?;
        std::fs::File::open(&path).and_then(|file| file.sync_all()).with_context(failed)?;
        Ok(path)
    }

    /// The end of what the daemon has logged.
    pub(crate) fn last_words(&self) -> String {
        let log = std::fs::read_to_string(self.log.path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
    }

    /// The process id of the daemon.
    pub(crate) fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// A C program of `bench/peers`.
    pub(crate) fn peer(&self, name: &str) -> PathBuf {
        self.places.peers.join(name)
    }
}

/// A new session with a server.
pub(crate) async fn connect(url: &str, device: &str) -> Result<Session> {
    let device = RdmaDevice::Named(device.to_owned());
    Ok(Session::connect(ConnectOptions::new(url).rdma_device(device)).await?)
}

/// A pin on a new file of that size.
pub(crate) async fn pin(
    session: &Session,
    name: &str,
    bytes: u64,
    transport: Transport,
) -> Result<Arc<Pin>> {
    session.create(EXPORT, name, bytes, IfExists::Resize).await?;
    let request = PinRequest::read_write(EXPORT, name).transport(transport);
    Ok(Arc::new(session.pin(request).await?))
}

/// A path as an argument of a peer.
pub(crate) fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is no text", path.display()))
}

/// A program that was built with this one.
pub(crate) fn beside_us(name: &str) -> Result<PathBuf> {
    Ok(std::env::current_exe().context("where is this program?")?.with_file_name(name))
}

/// A runtime as most applications have it.
pub(crate) fn several_threads() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}
