//! A stream write that hangs inside the kernel when somebody wants the file. The file system is
//! frozen meanwhile: pwrite(2) waits for its thaw, and opening for reading does not.
#![forbid(unsafe_code)]

use pinfold_client::{Code, Error, Event, PinRequest, Reason, Transport};
use pinfold_lab::{
    Answer, EXPORT, ForeignClient, Frozen, Lab, Opener, SystemCall, eventually, next_revocation,
    on_each_file_system, read_by_another_process,
};
use pinfold_proto::v1;

/// Longer than what enters the kernel at a time.
const LEN: usize = 256 << 10;
const PAGE: usize = 4096;
/// What enters the kernel at a time.
const CALL: usize = 64 << 10;

async fn stream_writes_hang(lab: &Lab, number: usize) {
    let hang = async || lab.daemon.threads_in(SystemCall::Pwrite) == number;
    eventually("the stream writes are inside the kernel", hang).await;
}

/// Another process opens the file, which takes as long as the kernel makes it wait.
fn reader(lab: &Lab) -> tokio::task::JoinHandle<Opener> {
    let path = lab.path("file");
    tokio::task::spawn_blocking(move || Opener::reading(&path))
}

/// A pin of a foreign client by the stream path, and a write to it, of one byte many times.
async fn foreign_write(
    lab: &Lab,
    offset: u64,
    byte: u8,
    len: usize,
) -> (ForeignClient, u64, v1::WriteRequest) {
    let mut client = ForeignClient::open(&lab.daemon.url).await;
    let transport = v1::Transport::Stream.into();
    let request = v1::PinRequest { transport, ..client.pin_request("file") };
    let pin = client.stub.pin(request).await.unwrap().into_inner();
    let write = v1::WriteRequest {
        session_id: client.session_id(),
        pin_id: pin.pin_id,
        generation: pin.generation,
        offset,
        data: vec![byte; len].into(),
    };
    (client, pin.pin_id, write)
}

fn by_stream() -> PinRequest {
    PinRequest::read_write(EXPORT, "file").transport(Transport::Stream)
}

on_each_file_system! {
    async fn one_that_ends_in_time_is_waited_for(lab in Lab) {
        lab.make_file("file", LEN as u64);
        let (mut client, pin, write) = foreign_write(&lab, 0, b'W', LEN).await;
        let frozen = Frozen::start(lab.file_system.mount_point());
        let mut stub = client.stub.clone();
        let writing = tokio::spawn(async move { stub.write(write).await });
        stream_writes_hang(&lab, 1).await;
        let reader = reader(&lab);
        client.next_draining().await;
        // It lies: what it has sent is not back yet. Only the gate knows.
        client.say_drained(&[pin]);
        frozen.thaw();
        writing.await.unwrap().unwrap();
        let opened = reader.await.unwrap();
        let timings = client.next_revoked().await.timings.unwrap();
        println!("{timings:?}");
        assert!(timings.drained_us.is_some() && timings.break_pending_at_release);
        assert_eq!(lab.daemon.audit_record(&lab.path("file"))["late_stream_writes"], 0);
        drop(opened);
        let content = read_by_another_process(&lab.path("file"));
        assert!(content == [b'W'; LEN], "an acknowledged write is in the file");
    }
}

#[test]
fn one_that_hangs_on_is_left_behind_and_keeps_out_of_the_files_next_life() {
    Lab::run_on_both(hangs_on);
}

async fn hangs_on(lab: Lab) {
    lab.make_file("file", (LEN + PAGE) as u64);
    let path = lab.path("file");
    let session = lab.session().await;
    let mut events = session.events();
    let pin = session.pin(by_stream()).await.unwrap();
    let mut buffer = session.buffer(LEN).await.unwrap();
    buffer.as_mut_slice().fill(0);
    // The library's pieces grow with each one that is quick: until one carries all of it.
    for _ in 0..4 {
        buffer = pin.write(0, buffer, LEN).await.unwrap().0;
    }
    buffer.as_mut_slice().fill(b'O');
    // One whose last call into the kernel is its first.
    let (client, _, short) = foreign_write(&lab, LEN as u64, b'S', PAGE).await;
    let frozen = Frozen::start(lab.file_system.mount_point());
    let mut stub = client.stub.clone();
    let short = tokio::spawn(async move { stub.write(short).await });
    let writing = async { pin.write(0, buffer, LEN).await.unwrap_err().error };
    let breaking = async {
        stream_writes_hang(&lab, 2).await;
        let reader = reader(&lab);
        assert!(matches!(events.next().await, Some(Event::Draining { .. })));
        // Nobody thaws it: the reader gets through because we let go.
        let opened = reader.await.unwrap();
        assert_eq!(lab.daemon.threads_in(SystemCall::Pwrite), 2, "they hang on");
        let timings = next_revocation(&mut events).await.timings.unwrap();
        println!("{timings:?}");
        assert_eq!(timings.drained, None, "the budget ran out");
        assert!(timings.break_pending_at_release);
        let record = lab.daemon.audit_record(&path);
        assert_eq!(record["late_stream_writes"], 2);
        let error = lab.daemon.logged_error("released with stream writes inside");
        assert_eq!(error["path"], path.to_str().unwrap());
        drop(opened);
        nothing_new_begins(&lab).await;

        // One that waits is served when the old one is out.
        let waiting = session.pin(by_stream());
        let thawing = async { frozen.thaw() };
        let (new, ()) = tokio::join!(waiting, thawing);
        let new = new.unwrap();
        assert_ne!(new.grant().generation, pin.grant().generation);
        stream_writes_hang(&lab, 0).await;
        new
    };
    let (refused, new) = tokio::join!(writing, breaking);
    assert!(matches!(refused, Error::Draining { .. } | Error::Revoked { .. }), "{refused}");
    // It has landed, but in whose file? So it is not acknowledged.
    let draining = Answer {
        code: Code::Unavailable,
        reason: Reason::FileDraining,
        exit: 0,
        says: &["is being taken back"],
    };
    draining.check_status(&short.await.unwrap().unwrap_err());

    let buffer = session.buffer(LEN + PAGE).await.unwrap();
    let (buffer, _) = new.read(0, LEN + PAGE, buffer).await.unwrap();
    let late = buffer.as_slice().iter().take_while(|byte| **byte == b'O').count();
    assert_eq!(late, CALL, "of the old write only what was in the kernel has landed");
    assert!(buffer.as_slice()[late..LEN].iter().all(|byte| *byte == 0));

    let mut buffer = buffer;
    buffer.as_mut_slice().fill(b'N');
    new.write(0, buffer, LEN + PAGE).await.unwrap();
    new.commit().await.unwrap();
    new.unpin().await.unwrap();
    let content = read_by_another_process(&path);
    assert!(content == [b'N'; LEN + PAGE], "nothing old over the new");
    lab.nothing_is_held().await;
}

/// While the old write hangs: no pin, no other size.
async fn nothing_new_begins(lab: &Lab) {
    let path = lab.path("file");
    let says = [path.to_str().unwrap(), "still inside the kernel", "try again when it is out"];
    let (code, reason) = (Code::Unavailable, Reason::FileDraining);
    let draining = Answer { code, reason, exit: 6, says: &says };
    let session = lab.session().await;
    let by_library = async { session.pin(by_stream()).await.unwrap_err() };
    let arguments = ["--transport", "stream", "pin", "lab/file"];
    let (refused, finished) = tokio::join!(by_library, lab.pinfold(&arguments));
    draining.check(refused);
    draining.check_finished(&finished, &arguments);
    draining.check(session.shrink(EXPORT, "file", 1).await.unwrap_err());
}
