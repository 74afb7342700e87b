//! Clients that are stopped or killed: the queue pair goes first, then the pins, and nothing that was
//! in flight lands in what a local process makes of the file.
#![forbid(unsafe_code)]

use nix::sys::signal::Signal;
use pinfold_client::RdmaDevice;
use pinfold_lab::{
    FileSystem, Lab, Running, device_name, eventually, on_each_file_system, queue_pairs,
    read_by_another_process, rewrite_by_another_process,
};

const LEN: usize = 64 << 10;

/// A client that is in the middle of its writes.
fn writer(lab: &Lab, device: &str) -> Running {
    lab.make_file("file", LEN as u64);
    let mut writer = Running::writer(&lab.daemon.url, device, "lab/file");
    writer.wait_for_line("writing");
    writer
}

/// A local process gets the file at once, and what it makes of it stays.
fn rewrite(lab: &Lab) {
    rewrite_by_another_process(&lab.path("file"), 'L', LEN);
}

fn assert_untouched(lab: &Lab) {
    let content = read_by_another_process(&lab.path("file"));
    assert_eq!(content.len(), LEN);
    let foreign = content.iter().filter(|byte| **byte != b'L').count();
    assert_eq!(foreign, 0, "remote bytes in the second life");
}

/// What a client may be told that comes back too late.
fn assert_told(output: &str, start: &str) {
    const ERRORS: [&str; 4] = ["SessionLost", "LaneLost", "Revoked", "UnknownSession"];
    let line = output.lines().find(|line| line.starts_with(start));
    let line = line.unwrap_or_else(|| panic!("nothing of {start:?} in {output}"));
    assert!(ERRORS.iter().any(|error| line.contains(error)), "{line}");
}

async fn stopped(mut lab: Lab, device: &str) {
    lab.restart_with_time_to_live(8);
    let operator = lab.session_with(lab.options().rdma_device(RdmaDevice::None)).await;
    let writer = writer(&lab, device);
    let ends = if device == "none" { 0 } else { 1 };
    assert_eq!(queue_pairs().len(), 2 * ends, "while it writes");
    writer.signal(Signal::SIGSTOP);
    lab.daemon.logged("silent; its queue pair is destroyed");
    let gone = async || queue_pairs().len() == ends;
    eventually("the server's end is gone", gone).await;
    let seen = operator.inspect().await.unwrap();
    let pins: usize = seen.files.iter().map(|file| file.pins.len()).sum();
    assert_eq!(pins, 1, "its pin lives until the time-to-live: {seen:?}");
    lab.daemon.logged("session ended");
    lab.nothing_is_held().await;
    rewrite(&lab);
    writer.signal(Signal::SIGCONT);
    let ended = writer.finish().await;
    println!("{}", ended.stdout);
    assert_told(&ended.stdout, "ended ");
    assert_told(&ended.stdout, "again Err");
    assert_untouched(&lab);
    operator.inspect().await.expect("who gives signs of life loses nothing");
}

on_each_file_system! {
    async fn a_client_that_is_killed_leaves_nothing(lab in Lab) {
        for device in [device_name(), "none".to_owned()] {
            let writer = writer(&lab, &device);
            writer.signal(Signal::SIGKILL);
            // The end of its connection is the end of its session: nobody waits for a timer.
            lab.nothing_is_held().await;
            rewrite(&lab);
            assert_untouched(&lab);
            eventually("both ends are gone", async || queue_pairs().is_empty()).await;
        }
    }
}

#[test]
fn a_client_that_is_stopped_comes_back_too_late_to_write_by_rdma() {
    Lab::run(FileSystem::Xfs, async |lab| stopped(lab, &device_name()).await);
}

#[test]
fn a_client_that_is_stopped_comes_back_too_late_to_write_by_the_stream_path() {
    Lab::run(FileSystem::Ext4, async |lab| stopped(lab, "none").await);
}
