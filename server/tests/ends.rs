//! The daemon lives on, and what must end ends, where a limit, a signal or its output fails it.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod daemon;

use std::fs::OpenOptions;
use std::process::Stdio;

use daemon::{Client, Daemon, reason, run};
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
