//! The demo for a laptop: no RDMA, no VM, the machine's own file system (`make demo-local`).
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Result, ensure};
use pinfold_client::{ConnectOptions, DrainNotice, Pin, PinRequest, RdmaDevice, Session};
use pinfold_lab::{
    Daemon, EXPORT, Screen, read_by_another_process, rewrite_by_another_process, summary,
    taken_back,
};

const PIECE: usize = 4096;
const LEN: usize = 4 * PIECE;

#[tokio::main]
async fn main() -> ExitCode {
    match show(&Screen::from_args()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo-local: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn show(screen: &Screen) -> Result<()> {
    let folder = tempfile::Builder::new().prefix("pinfold-demo-").tempdir_in(place())?;
    let path = folder.path().join("log");
    std::fs::write(&path, [0; LEN])?;
    println!("A file on this machine's own file system; no RDMA, so the bytes go by gRPC.\n");

    let daemon = Daemon::start_with(&[(EXPORT, folder.path())], &["--rdma-device", "none"]);
    screen.step("host", &format!("pinfoldd --export {EXPORT}={}", folder.path().display()));
    let options = ConnectOptions::new(&daemon.url).rdma_device(RdmaDevice::None);
    let session = Session::connect(options).await?;
    let mut events = session.events();
    let pin = session.pin(PinRequest::read_write(EXPORT, "log")).await?;
    screen.step("remote", &format!("pin {EXPORT}/log            -> guard: {}", pin.grant().guard));
    write(&session, &pin, b'R').await?;
    screen.step("remote", "write 4096 x 'R' at 0, commit -> durable");

    screen.step("local", ": > file; then 16384 x 'L' of its own ... waits");
    let job = {
        let path = path.clone();
        tokio::task::spawn_blocking(move || rewrite_by_another_process(&path, 'L', LEN))
    };
    let told = |notice: &DrainNotice| format!("is told: {}; drains", notice.reason);
    let through = "... goes through, because Pinfold let go:";
    taken_back(screen, &mut events, job, told, through).await?;

    let refused = write(&session, &pin, b'R').await.expect_err("the pin still works");
    screen.step("remote", &format!("write 4096 x 'R' at 0   -> {refused}"));
    let content = read_by_another_process(&path);
    ensure!(content == [b'L'; LEN], "remote bytes in the local process's data");
    screen.good("local", &format!("reads its file          -> {}", summary(&content)));
    let pin = session.pin(PinRequest::read_write(EXPORT, "log")).await?;
    write(&session, &pin, b'N').await?;
    pin.unpin().await?;
    let content = read_by_another_process(&path);
    screen.step("remote", &format!("pins again, writes      -> {}", summary(&content)));
    session.close().await;
    screen.note("Nobody was surprised, and not one byte was lost.");
    Ok(())
}

/// Where files take leases and can be made durable: not on an overlay, as a container's root is.
fn place() -> PathBuf {
    let candidates = [std::env::temp_dir(), PathBuf::from("/var/tmp"), PathBuf::from(".")];
    let kind = |path: &Path| Command::new("stat").args(["-f", "-c", "%T"]).arg(path).output();
    let known = |path: &&PathBuf| {
        kind(path).is_ok_and(|output| {
            let kind = String::from_utf8_lossy(&output.stdout);
            ["ext2/ext3", "xfs", "btrfs", "f2fs"].contains(&kind.trim())
        })
    };
    candidates.iter().find(known).unwrap_or(&candidates[0]).clone()
}

async fn write(session: &Session, pin: &Pin, byte: u8) -> Result<(), pinfold_client::Error> {
    let mut buffer = session.buffer(PIECE).await?;
    buffer.as_mut_slice().fill(byte);
    pin.write(0, buffer, PIECE).await?;
    pin.commit().await?;
    Ok(())
}
