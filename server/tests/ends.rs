//! The daemon lives on, and what must end ends, where a limit, a signal or its output fails it.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod daemon;

use std::fs::OpenOptions;
use std::process::Stdio;

use daemon::{Client, Daemon, reason, run, threads, until};
use pinfold_proto::v1;
use pinfold_proto::v1::session_event::Event;
use rustix::process::Signal;
use tonic::Code;

#[test]
fn a_file_larger_than_the_limit_is_refused_and_kills_nobody() {
    let mut daemon = Daemon::start_by(&["prlimit", "--fsize=1048576"], Stdio::null());
    run(async {
        let mut client = Client::open(&daemon.url).await;
        let refused = client.create("large", 2 << 20).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert_eq!(reason(&refused), "NO_SPACE", "{refused}");
        client.create("small", 4096).await.unwrap();
    });
    assert!(daemon.is_running());
}

#[test]
fn signals_that_ask_for_no_end_change_nothing_and_sigterm_drains() {
    let mut daemon = Daemon::start();
    run(async {
        let mut client = Client::open(&daemon.url).await;
        client.create("file", 4096).await.unwrap();
        let pin = client.pin("file").await.unwrap();
        for (signal, name) in
            [(Signal::HUP, "SIGHUP"), (Signal::USR1, "SIGUSR1"), (Signal::USR2, "SIGUSR2")]
        {
            daemon.signal(signal);
            daemon.logged(name);
        }
        client.commit(&pin).await.unwrap();

        daemon.signal(Signal::TERM);
        let told = client.next_event().await;
        let Some(Event::Draining(notice)) = &told else { panic!("no notice: {told:?}") };
        assert_eq!(notice.reason(), v1::RevocationReason::Shutdown);
        client.say_drained(vec![pin.pin_id]);
    });
    assert_eq!(daemon.ended().code(), Some(0));
}

#[test]
fn a_full_standard_output_is_reported_and_ends_nothing() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut daemon = Daemon::start_by(&[], full.into());
    let line = daemon.logged("listening");
    assert!(line.contains("No space left"), "{line}");
    run(async { Client::open(&daemon.url).await.close().await });
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.ended().code(), Some(0));
}

/// Where a thread can't be had any more (`RLIMIT_NPROC`, `vm.max_map_count`, a frozen file system that holds
/// the process's memory lock), starting one fails, hangs, or ends the process.
#[test]
fn no_thread_is_started_once_the_daemon_serves() {
    let daemon = Daemon::start();
    run(async {
        let before = threads(daemon.pid());
        let mut clients = Vec::new();
        for number in 0..8 {
            let mut client = Client::open(&daemon.url).await;
            let name = format!("file{number}");
            client.create(&name, 4096).await.unwrap();
            let pin = client.pin(&name).await.unwrap();
            client.write(&pin, vec![7; 4096]).await.unwrap();
            client.commit(&pin).await.unwrap();
            client.inspect().await.unwrap();
            clients.push(client);
        }
        let (mut left, last) = (clients.split_off(1), clients.pop().unwrap());
        last.close().await;
        for client in left.drain(1..) {
            client.close().await;
        }
        let ended = async || left[0].inspect().await.unwrap().files.len() == 1;
        until("all but one file is let go", ended).await;
        let after = threads(daemon.pid());
        let new: Vec<_> = after.iter().filter(|thread| !before.contains(thread)).collect();
        assert!(new.is_empty(), "{} of {} threads are new", new.len(), after.len());
    });
}

/// Under a limit of open files that a few clients can use up.
fn with_few_descriptors() -> Daemon {
    Daemon::start_by(&["prlimit", "--nofile=96"], Stdio::null())
}

#[test]
fn idle_connections_keep_nobody_out() {
    let daemon = with_few_descriptors();
    run(async {
        let address = daemon.url.trim_start_matches("http://").to_owned();
        let mut settled = Client::open(&daemon.url).await;
        let mut idle = Vec::new();
        for _ in 0..150 {
            idle.push(tokio::net::TcpStream::connect(&address).await.unwrap());
        }
        // The session that was there first is served, and so is a new one.
        settled.create("file", 4096).await.unwrap();
        let pin = settled.pin("file").await.unwrap();
        let mut late = Client::open(&daemon.url).await;
        assert_eq!(late.inspect().await.unwrap().files.len(), 1);
        settled.commit(&pin).await.unwrap();
        drop(idle);
    });
}

#[test]
fn some_descriptors_are_kept_for_revocations() {
    let daemon = with_few_descriptors();
    run(async {
        let mut client = Client::open(&daemon.url).await;
        let mut pins = Vec::new();
        let refused = loop {
            let name = format!("file{}", pins.len());
            std::fs::write(daemon.path(&name), [0; 4096]).unwrap();
            match client.pin(&name).await {
                Ok(pin) => pins.push(pin),
                Err(refused) => break refused,
            }
            assert!(pins.len() < 96);
        };
        println!("{} files could be pinned", pins.len());
        assert!(pins.len() > 8, "few files are left: {refused}");
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert_eq!(reason(&refused), "QUOTA_EXCEEDED", "{refused}");
        assert!(refused.message().contains("LimitNOFILE"), "{refused}");
        // A local process gets its file, and other calls are served.
        let path = daemon.path("file0");
        let cut =
            tokio::task::spawn_blocking(move || std::fs::File::options().write(true).open(path));
        let told = client.next_event().await;
        let Some(Event::Draining(notice)) = &told else { panic!("no notice: {told:?}") };
        assert_eq!(notice.pin_ids, [pins[0].pin_id]);
        client.say_drained(vec![pins[0].pin_id]);
        cut.await.unwrap().unwrap();
        client.create("new", 4096).await.unwrap();
    });
}

#[test]
fn a_process_without_descriptors_pauses_and_says_so_once() {
    let daemon = with_few_descriptors();
    run(async {
        let mut client = Client::open(&daemon.url).await;
        client.create("file", 4096).await.unwrap();
        client.pin("file").await.unwrap();
        // Whatever it does it has none left from here on.
        let pid = daemon.pid().to_string();
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        let limited = std::process::Command::new("prlimit")
            .args(["--pid", &pid, &format!("--nofile={open}")])
            .status()
            .unwrap();
        assert!(limited.success());
        let address = daemon.url.trim_start_matches("http://").to_owned();
        let _waits = tokio::net::TcpStream::connect(&address).await.unwrap();
        daemon.logged("no more connections can be accepted");
        // The session that is there is served.
        client.inspect().await.unwrap();
        let path = daemon.path("file");
        let cut =
            tokio::task::spawn_blocking(move || std::fs::File::options().write(true).open(path));
        assert!(matches!(client.next_event().await, Some(Event::Draining(_))));
        let pins = client.inspect().await.unwrap().files.remove(0).pins;
        client.say_drained(pins.iter().map(|pin| pin.pin_id).collect());
        cut.await.unwrap().unwrap();
        assert_eq!(daemon.times_logged("no more connections can be accepted"), 1);
    });
}
