//! Who was let into a file goes first, however quickly its clients come back.
#![forbid(unsafe_code)]

use std::process::Command;

use pinfold_client::{Event, Pin, PinRequest, Reason, Session};
use pinfold_lab::{EXPORT, Process, on_each_file_system};

const LEN: u64 = 64 << 10;
const CLIENTS: usize = 4;
const READS: u64 = 40;

/// Pins the file again whenever the pin is lost, at once, until its name is another file's.
async fn come_back(session: Session, first: Pin) {
    let file = first.grant().identity;
    let mut events = session.events();
    let mut pin = first;
    loop {
        while !matches!(events.next().await.expect("the session ended"), Event::Draining { .. }) {}
        drop(pin);
        pin = loop {
            match session.pin(request().expect_identity(file)).await {
                Ok(pin) => break pin,
                Err(error) if error.reason() == Some(Reason::FileChanged) => return,
                Err(error) => println!("not yet: {error}"),
            }
        };
    }
}

fn request() -> PinRequest {
    PinRequest::read_write(EXPORT, "file")
}

on_each_file_system! {
    async fn a_process_with_little_time_gets_to_rename(lab in Lab) {
        lab.make_file("file", LEN);
        lab.make_file("other", LEN);
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            let session = lab.session().await;
            let pin = session.pin(request()).await.unwrap();
            clients.push(tokio::spawn(come_back(session, pin)));
        }
        let processors = std::thread::available_parallelism().unwrap().get();
        let _busy: Vec<_> = (0..processors).map(|_| Process::spinning()).collect();
        let mut rename = Command::new("nice");
        rename.args(["-n", "10", "mv", "-f"]).arg(lab.path("other")).arg(lab.path("file"));
        Process::start(&mut rename).done("the file is renamed").await;
        for client in clients {
            client.await.unwrap();
        }
    }

    async fn a_process_that_reads_again_and_again_gets_through_and_is_counted(lab in Lab) {
        lab.make_file("file", LEN);
        let session = lab.session().await;
        let pin = session.pin(request()).await.unwrap();
        let client = tokio::spawn(come_back(session, pin));
        // Reads that come while the file is not guarded again break nothing: the pause grows so fast
        // that all of them take less time than that many pauses would.
        let script = format!("for i in $(seq {READS}); do cat file > /dev/null || exit; done");
        let mut reads = Command::new("sh");
        let reads = reads.args(["-c", &script]).current_dir(lab.folder());
        Process::start(reads).done("all reads are done").await;
        let broken = lab.session().await.inspect().await.unwrap().broken;
        println!("{broken:?}");
        let file = broken.iter().find(|file| file.path.ends_with("/file")).unwrap();
        assert!((1..READS).contains(&file.breaks), "each read took the pin back");
        assert_eq!(file.by.iter().map(|(_, breaks)| breaks).sum::<u64>(), file.breaks);
        client.abort();
    }
}
