//! The demo: first the hazard, then the same under Pinfold. Runs in the lab (`make demo`).
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, ensure};
use memmap2::{MmapOptions, MmapRaw};
use pinfold_client::{
    CompletionStatus, ConnectOptions, DrainNotice, PinRequest, RdmaDevice, Session,
};
use pinfold_lab::{
    Daemon, EXPORT, FileSystem, Screen, device_name, read_by_another_process, remote_slice,
    rewrite_by_another_process, summary, taken_back,
};
use pinfold_verbs::{
    Access, Buffer, Connected, Device, Lane, MemoryRegion, Mtu, Piece, ProtectionDomain, QueuePair,
    QueuePairBuilder, RemoteSlice, UnconnectedLane,
};

const PAGE: usize = 4096;
const LEN: usize = 4 * PAGE;

#[tokio::main]
async fn main() -> ExitCode {
    let screen = Screen::from_args();
    match show(&screen).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn show(screen: &Screen) -> Result<()> {
    let file_system = FileSystem::Ext4;
    let folder = file_system.mount_point().join("demo");
    std::fs::create_dir(&folder)?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!(
        "A file on ext4 with DAX, a soft RDMA NIC ({}), Linux {}. Both hosts are this VM.",
        device_name(),
        kernel.trim()
    );
    screen.title("The hazard: a remote key, and nobody guards the file");
    hazard(screen, &folder.join("unguarded"))?;
    screen.title("The same with pinfoldd");
    guarded(screen, &folder).await
}

// ---------------------------------------------------------------------------------- the hazard

/// A server as people write it today: map, register, hand out the key.
struct Unguarded {
    region: MemoryRegion<Arc<MmapRaw>>,
    _responder: QueuePair<Connected>,
    lane: Lane<()>,
    domain: ProtectionDomain,
}

impl Unguarded {
    fn serve(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let memory = Arc::new(MmapOptions::new().len(LEN).map_raw(&file)?);
        let device = Device::open(&device_name())?;
        let server = ProtectionDomain::new(&device)?;
        let region = server.register_on_demand(memory, 0..LEN, Access::REMOTE_READ_WRITE)?;
        let responder = QueuePairBuilder::new(&server).build()?;
        let domain = ProtectionDomain::new(&device)?;
        let lane = UnconnectedLane::new(&domain, 4)?;
        let (client_end, server_end) = (lane.endpoint(), responder.endpoint());
        let responder = responder.connect(&client_end, Mtu::Mtu4096)?;
        let lane = lane.connect(&server_end, Mtu::Mtu4096)?;
        Ok(Self { region, _responder: responder, lane, domain })
    }

    fn remote_write(&self, byte: u8) -> Result<CompletionStatus> {
        let mut buffer = Buffer::new(&self.domain, PAGE)?;
        buffer.as_mut_slice().fill(byte);
        let key = self.region.remote_key();
        let remote = RemoteSlice { address: self.region.remote_address(), key, len: PAGE };
        self.lane.post_write(buffer, &[Piece { local: 0..PAGE, remote }], ())?;
        loop {
            if let Some(done) = self.lane.poll()? {
                return Ok(done.status);
            }
        }
    }
}

fn hazard(screen: &Screen, path: &Path) -> Result<()> {
    std::fs::write(path, [0; LEN])?;
    let server = Unguarded::serve(path)?;
    let status = server.remote_write(b'R')?;
    screen.step("remote", &format!("write 4096 x 'R' at 0   -> {}", outcome(status)));
    screen.step("local", ": > file; then 16384 x 'L' of its own");
    rewrite_by_another_process(path, 'L', LEN);
    screen.step(
        "local",
        &format!("reads its file          -> {}", summary(&read_by_another_process(path))),
    );
    let status = server.remote_write(b'R')?;
    screen.step(
        "remote",
        &format!("write 4096 x 'R' at 0   -> {}, with the old key", outcome(status)),
    );
    let content = read_by_another_process(path);
    screen.bad("local", &format!("reads its file          -> {}", summary(&content)));
    ensure!(status.is_success(), "the kernel refused the stale write; the hazard did not show");
    ensure!(content[..PAGE] == [b'R'; PAGE], "the stale write did not land; no hazard to show");
    screen.note("The local process lost a page of its data, and everybody was told \"success\".");
    Ok(())
}

// ---------------------------------------------------------------------------------- with pinfoldd

async fn guarded(screen: &Screen, folder: &Path) -> Result<()> {
    let path = folder.join("guarded");
    std::fs::write(&path, [0; LEN])?;
    let daemon = Daemon::start(&[(EXPORT, folder)]);
    screen.step("host", &format!("pinfoldd --export {EXPORT}={}", folder.display()));
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::Named(device_name()));
    let session = Session::connect(options).await?;
    let mut events = session.events();
    let pin = session.pin(PinRequest::read_write(EXPORT, "guarded")).await?;
    let old_key = pin.grant().segments[0];
    screen.step("remote", &format!("pin {EXPORT}/guarded         -> {}", grant(&pin)));
    write(&session, &pin, b'R').await?;
    pin.commit().await?;
    screen.step("remote", "write 4096 x 'R', commit -> durable");

    screen.step("local", ": > file; then 16384 x 'L' of its own ... waits");
    let job = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || rewrite_by_another_process(&path, 'L', LEN))
    };
    let told = |notice: &DrainNotice| {
        let budget = notice.drain_budget.as_millis();
        format!("is told: {}; drains (it may take {budget} ms)", notice.reason)
    };
    let through = "... goes through, because Pinfold let go after the fence:";
    taken_back(screen, &mut events, job, told, through).await?;

    let before = read_by_another_process(&path);
    screen.step("local", &format!("reads its file          -> {}", summary(&before)));
    let mut buffer = session.buffer(PAGE).await?;
    buffer.as_mut_slice().fill(b'R');
    let (_, status) = session.raw_write(remote_slice(&old_key, 0, PAGE), buffer).await?;
    ensure!(!status.is_success(), "the old key still works");
    screen.step(
        "remote",
        &format!("write 4096 x 'R' at 0   -> {}, with the old key", outcome(status)),
    );
    let after = read_by_another_process(&path);
    ensure!(before == after, "bytes changed under the local process");
    screen.good("local", &format!("reads its file          -> {}", summary(&after)));

    let pin = session.pin(PinRequest::read_write(EXPORT, "guarded")).await?;
    write(&session, &pin, b'N').await?;
    pin.commit().await?;
    pin.unpin().await?;
    let content = read_by_another_process(&path);
    ensure!(content[..PAGE] == [b'N'; PAGE], "the write after the new pin is not in the file");
    screen.step("remote", &format!("pins again, writes      -> {}", summary(&content)));
    session.close().await;
    screen.note("Nobody was surprised, and not one byte was lost.");
    Ok(())
}

async fn write(session: &Session, pin: &pinfold_client::Pin, byte: u8) -> Result<()> {
    let mut buffer = session.buffer(PAGE).await?;
    buffer.as_mut_slice().fill(byte);
    let (_, report) = pin.write(0, buffer, PAGE).await?;
    ensure!(report.rdma_bytes == PAGE as u64, "not by RDMA: {report:?}");
    Ok(())
}

fn grant(pin: &pinfold_client::Pin) -> String {
    let grant = pin.grant();
    let sync = if grant.map_sync { ", MAP_SYNC" } else { "" };
    format!("{} bytes, guard: {}{sync}", grant.usable().end - grant.usable().start, grant.guard)
}

fn outcome(status: CompletionStatus) -> String {
    match status {
        CompletionStatus::Success => "success".to_owned(),
        CompletionStatus::RemoteAccess => "refused: remote access error".to_owned(),
        other => other.to_string(),
    }
}
