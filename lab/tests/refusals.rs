//! Bad input gets a precise answer: a code, a reason for programs, a message that names the file,
//! the cause and the remedy, and an exit code of the command. And then the server goes on.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::unix::fs::symlink;
use std::process::Command;

use memmap2::MmapOptions;
use nix::sys::stat::Mode;
use nix::sys::statvfs::statvfs;
use pinfold_client::{
    Code, CompletionStatus, Error, IfExists, PinRequest, Reason, Session, Transport,
};
use pinfold_lab::{
    Answer, EXPORT, ForeignClient, Lab, Opener, Pattern, eventually, next_revocation,
    on_each_file_system, read_by_another_process, remote_slice,
};
use pinfold_proto::v1;
use tonic::Status;

const PAGE: usize = 4096;
/// More than there is anywhere.
const HUGE: u64 = 1 << 40;

/// One write and commit, and nothing left open.
async fn the_server_still_serves(lab: &Lab, session: &Session) {
    lab.make_file("last", PAGE as u64);
    let pin = session.pin(PinRequest::read_write(EXPORT, "last")).await.unwrap();
    let mut buffer = session.buffer(PAGE).await.unwrap();
    Pattern(9).fill(0, buffer.as_mut_slice());
    pin.write(0, buffer, PAGE).await.unwrap();
    pin.commit().await.unwrap();
    pin.unpin().await.unwrap();
    Pattern(9).check(0, &read_by_another_process(&lab.path("last")), "after the refusals");
    lab.nothing_is_held().await;
}

fn chattr(flag: &str, path: &std::path::Path) {
    assert!(Command::new("chattr").arg(flag).arg(path).status().unwrap().success());
}

on_each_file_system! {
    async fn what_names_no_file_or_no_bytes(lab in Lab) {
        let session = lab.session().await;
        lab.make_file("file", 10_000);
        lab.make_file("empty", 0);
        std::fs::create_dir(lab.path("folder")).unwrap();
        nix::unistd::mkfifo(&lab.path("fifo"), Mode::S_IRWXU).unwrap();
        symlink("/etc/passwd", lab.path("link")).unwrap();
        symlink("/etc", lab.path("away")).unwrap();
        symlink("file", lab.path("inside")).unwrap();

        let outside = Answer {
            code: Code::InvalidArgument,
            reason: Reason::PathOutsideExport,
            exit: 5,
            says: &[],
        };
        for (path, why) in [
            ("../x", "it holds \"..\""),
            ("a/../../x", "it holds \"..\""),
            ("/etc/passwd", "it starts at the root"),
            (".", "it names the export itself"),
            ("link", "it crosses a symbolic link"),
            ("away/passwd", "it crosses a symbolic link"),
            ("inside", "it crosses a symbolic link"),
        ] {
            let named = format!("{path:?} leaves the export");
            let says = [&named, why, "name a file by its path inside the export"];
            let answer = Answer { says: &says, ..outside };
            let request = PinRequest::read_write(EXPORT, path);
            answer.check(session.pin(request).await.unwrap_err());
            answer.check(session.stat(EXPORT, path).await.unwrap_err());
        }
        for (file, why) in [
            ("lab/../x", "it holds \"..\""),
            ("lab//etc/passwd", "it starts at the root"),
            ("lab/link", "it crosses a symbolic link"),
        ] {
            Answer { says: &["leaves the export", why], ..outside }
                .check_command(&lab, &["pin", file]).await;
        }
        let beside = lab.folder().parent().unwrap().join("beside");
        let create = session.create(EXPORT, "../beside", 1, IfExists::Fail).await;
        Answer { says: &["\"../beside\""], ..outside }.check(create.unwrap_err());
        assert!(!beside.exists(), "nothing was made outside the export");

        let missing =
            Answer { code: Code::NotFound, reason: Reason::FileNotFound, exit: 4, says: &[] };
        let no_export = Answer { reason: Reason::ExportNotFound, ..missing };
        Answer { says: &["no export \"bal\"", "this server exports lab"], ..no_export }
            .check_pin(&lab, &session, "bal/file", None).await;
        let path = lab.path("none");
        Answer { says: &["there is no file", path.to_str().unwrap()], ..missing }
            .check_pin(&lab, &session, "lab/none", None).await;

        let not_regular = Answer { reason: Reason::NotARegularFile, ..outside };
        for (name, what) in [("folder", "is a directory"), ("fifo", "is a FIFO")] {
            let path = lab.path(name);
            let says = [path.to_str().unwrap(), what, "not a regular file"];
            Answer { says: &says, ..not_regular }
                .check_pin(&lab, &session, &format!("lab/{name}"), None).await;
        }

        let bad_range = Answer { reason: Reason::BadRange, ..outside };
        Answer { says: &["bytes 5..5", "the range is empty"], ..bad_range }
            .check_pin(&lab, &session, "lab/file", Some(5..5)).await;
        Answer { says: &["bytes 8..7", "ends before it starts"], ..bad_range }
            .check_pin(&lab, &session, "lab/file", Some(Range { start: 8, end: 7 })).await;
        Answer { says: &["bytes 0..0", "the file is empty"], ..bad_range }
            .check_pin(&lab, &session, "lab/empty", None).await;
        let past_end = Answer {
            code: Code::OutOfRange,
            reason: Reason::RangePastEnd,
            exit: 5,
            says: &["bytes 0..10001", "past 10000, the end of the file", "ask for less"],
        };
        past_end.check_pin(&lab, &session, "lab/file", Some(0..10_001)).await;
        the_server_still_serves(&lab, &session).await;
    }

    async fn a_file_that_another_process_uses(lab in Lab) {
        let session = lab.session().await;
        lab.make_file("file", PAGE as u64);
        let path = lab.path("file");
        let busy = Answer {
            code: Code::FailedPrecondition,
            reason: Reason::FileBusy,
            exit: 6,
            says: &[],
        };
        for (opener, how) in
            [(Opener::reading(&path), "reading"), (Opener::writing(&path), "writing")]
        {
            // The other one may have the file open as well.
            let who = format!("process {} (sh, fd 9, {how})", opener.pid());
            Answer { says: &[path.to_str().unwrap(), &who, "close it there and try again"], ..busy }
                .check_pin(&lab, &session, "lab/file", None).await;
        }
        // Both are closed by now.
        session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap().unpin().await.unwrap();
        lab.nothing_is_held().await;

        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let mapping = MmapOptions::new().map_raw(&file).unwrap();
        drop(file);
        let pid = std::process::id();
        let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
        let who = format!("process {pid} ({}, mapped)", command.trim_end());
        Answer { says: &[path.to_str().unwrap(), &who], ..busy }
            .check_pin(&lab, &session, "lab/file", None).await;
        drop(mapping);
        session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap().unpin().await.unwrap();
        the_server_still_serves(&lab, &session).await;
    }

    async fn what_may_not_be_written_made_or_resized(lab in Lab) {
        let session = lab.session().await;
        lab.make_file("flagged", PAGE as u64);
        chattr("+i", &lab.path("flagged"));
        let path = lab.path("flagged");
        let says = [path.to_str().unwrap(), "may not open", "chattr -i", "Operation not permitted"];
        let (code, reason) = (Code::PermissionDenied, Reason::PermissionDenied);
        Answer { code, reason, exit: 9, says: &says }
            .check_pin(&lab, &session, "lab/flagged", None).await;
        chattr("-i", &path);

        lab.make_file("there", PAGE as u64);
        let path = lab.path("there");
        let says = [path.to_str().unwrap(), "exists already", "choose another name"];
        // No command asks for this.
        Answer { code: Code::AlreadyExists, reason: Reason::FileExists, exit: 0, says: &says }
            .check(session.create(EXPORT, "there", 1, IfExists::Fail).await.unwrap_err());

        let pin = session.pin(PinRequest::read_write(EXPORT, "there")).await.unwrap();
        let says = [path.to_str().unwrap(), "has 1 pin on it", "when it is given back"];
        let (code, reason) = (Code::FailedPrecondition, Reason::FilePinned);
        let pinned = Answer { code, reason, exit: 6, says: &says };
        pinned.check(session.create(EXPORT, "there", 1, IfExists::Resize).await.unwrap_err());
        pinned.check_command(&lab, &["put", "/etc/passwd", "lab/there"]).await;
        pin.check().unwrap();
        pin.unpin().await.unwrap();
        assert_eq!(read_by_another_process(&path), [0; PAGE], "it is as it was");
        the_server_still_serves(&lab, &session).await;
    }

    async fn a_file_system_without_room(lab in Lab) {
        let session = lab.session().await;
        let pattern = Pattern(5).bytes(0, 3 * PAGE);
        std::fs::write(lab.path("small"), &pattern).unwrap();
        let free = || statvfs(lab.folder()).unwrap().blocks_free();
        let local = tempfile::NamedTempFile::new().unwrap();
        local.as_file().set_len(HUGE).unwrap();
        let before = free();

        let path = lab.path("huge");
        let full =
            Answer { code: Code::ResourceExhausted, reason: Reason::NoSpace, exit: 11, says: &[] };
        let bytes = format!("no room for {HUGE} bytes");
        let huge = Answer { says: &[path.to_str().unwrap(), &bytes, "free space"], ..full };
        huge.check(session.create(EXPORT, "huge", HUGE, IfExists::Fail).await.unwrap_err());
        assert!(!path.exists(), "a file was left behind");
        huge.check_command(&lab, &["put", local.path().to_str().unwrap(), "lab/huge"]).await;
        assert!(!path.exists(), "a file was left behind");
        eventually("its blocks are free", async || free() >= before).await;

        // One that is there already stays as it is.
        let path = lab.path("small");
        let grow = session.create(EXPORT, "small", HUGE, IfExists::Resize).await;
        Answer { says: &[path.to_str().unwrap(), "no room for", "free space"], ..full }
            .check(grow.unwrap_err());
        assert!(read_by_another_process(&path) == pattern, "the file is another one now");
        // ext4 keeps a block of an extent tree that was larger once.
        eventually("its blocks are free", async || free() + 1 >= before).await;
        the_server_still_serves(&lab, &session).await;
    }

    async fn what_reaches_past_what_was_reserved(lab in Lab) {
        lab.make_file("file", PAGE as u64);
        let session = lab.session().await;
        let request = || PinRequest::read_write(EXPORT, "file").transport(Transport::Rdma);
        let reserved = 4 * PAGE as u64;
        let pin = session.pin(request().reserve_end(reserved)).await.unwrap();
        let key = pin.grant().segments[0];
        assert_eq!(key.length, reserved);
        let end = session.grow(EXPORT, "file", 8 * PAGE as u64).await.unwrap();
        pin.extend_to(end);
        let buffer = session.buffer(PAGE).await.unwrap();
        let refused = pin.write(reserved, buffer, PAGE).await.unwrap_err();
        let says = refused.to_string();
        let Error::OutsidePin { wanted, pinned, .. } = refused.error else { panic!("{says}") };
        assert_eq!((wanted, pinned), (reserved..reserved + PAGE as u64, 0..reserved));
        for word in ["bytes 16384..20480 of lab/file", "the pin covers 0..16384"] {
            assert!(says.contains(word), "{word:?} is not in {says:?}");
        }
        // The key itself reaches no further, whatever the client's library thinks.
        let buffer = session.buffer(PAGE).await.unwrap();
        let slice = remote_slice(&key, reserved - 1, PAGE);
        let (_, status) = session.raw_write(slice, buffer).await.unwrap();
        assert_eq!(status, CompletionStatus::RemoteAccess);
        let content = content_after_taking_it_back(&lab, &session).await;
        assert!(content.iter().all(|byte| *byte == 0), "something was written");

        // More than is mapped, while somebody has it pinned.
        let pin = session.pin(request()).await.unwrap();
        let says = ["bytes 32768..3145728", "past 2097152", "while others have it pinned",
            "wait until it has no pins"];
        let (code, reason) = (Code::OutOfRange, Reason::RangePastEnd);
        let past = Answer { code, reason, exit: 5, says: &says };
        past.check(session.pin(request().reserve_end(3 << 20)).await.unwrap_err());
        past.check_command(&lab, &["pin", "lab/file", "--reserve", "3M"]).await;
        pin.unpin().await.unwrap();
        // More than anybody may.
        let says = ["may reserve past the end of a file", "limited to"];
        let (code, reason) = (Code::ResourceExhausted, Reason::QuotaExceeded);
        let quota = Answer { code, reason, exit: 11, says: &says };
        quota.check(session.pin(request().reserve_end(HUGE)).await.unwrap_err());
        quota.check_command(&lab, &["pin", "lab/file", "--reserve", "1024G"]).await;
        the_server_still_serves(&lab, &session).await;
    }

    async fn a_quirk_that_a_foreign_client_breaks(lab in Lab) {
        let pattern = Pattern(6);
        std::fs::write(lab.path("file"), pattern.bytes(0, 5 * PAGE)).unwrap();
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let range = |start| v1::ByteRange { start, end: 4 * PAGE as u64 };
        // A pin that can be had by RDMA only where data would be misplaced can't be had.
        let odd = v1::PinRequest { range: Some(range(100)), ..client.pin_request("file") };
        let answer = Answer {
            code: Code::InvalidArgument,
            reason: Reason::BadRange,
            exit: 5,
            says: &["starts at byte 100", "multiples of 4096", "start the pin at one"],
        };
        answer.check_status(&client.stub.pin(odd).await.unwrap_err());
        let arguments = ["--transport", "rdma", "pin", "lab/file", "--range", "100..4096"];
        answer.check_command(&lab, &arguments).await;

        // Who starts a request elsewhere harms nothing but the own pin: the device takes it.
        let even = v1::PinRequest {
            range: Some(range(PAGE as u64)),
            ..client.pin_request("file")
        };
        let pin = client.stub.pin(even).await.unwrap().into_inner();
        assert_eq!(pin.quirks.as_ref().unwrap().start_alignment_bytes, PAGE as u32);
        for offset in [1, 100, 2 * PAGE as u64 + 4000] {
            let status = lane.write(&pin.segments[0], offset, &[0xee; 64]).await;
            println!("64 bytes at {offset}: {status}");
        }
        client.unpin(pin.pin_id).await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        pattern.check(0, &content[..PAGE], "before the pin");
        pattern.check(4 * PAGE as u64, &content[4 * PAGE..], "behind the pin");
        the_server_still_serves(&lab, &lab.session().await).await;
    }

    async fn a_queue_pair_outlives_the_try_to_connect_another(lab in Lab) {
        lab.make_file("file", PAGE as u64);
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let pin = client.pin("file").await;
        let end = v1::Endpoint {
            queue_pair_number: 17,
            packet_sequence_number: 1,
            gid: vec![1; 16],
            lid: 0,
            max_path_mtu_bytes: 4096,
        };
        let failed = Answer {
            code: Code::FailedPrecondition,
            reason: Reason::QueuePairFailed,
            exit: 0,
            says: &["could not be connected"],
        };
        let malformed =
            Answer { code: Code::InvalidArgument, reason: Reason::MalformedRequest, ..failed };
        for (garbage, answer) in [
            (end.clone(), failed),
            (v1::Endpoint { max_path_mtu_bytes: 256, ..end.clone() }, failed),
            (v1::Endpoint { gid: vec![1; 15], ..end }, Answer { says: &["gid"], ..malformed }),
        ] {
            answer.check_status(&client.connect_end(0, garbage).await.unwrap_err());
        }
        let bytes = Pattern(4).bytes(0, PAGE);
        assert!(lane.write(&pin.segments[0], 0, &bytes).await.is_success());
        client.commit(pin.pin_id, pin.generation).await.unwrap();
        client.unpin(pin.pin_id).await.unwrap();
        Pattern(4).check(0, &read_by_another_process(&lab.path("file")), "by the first one");
    }

    async fn what_belongs_to_nobody_or_to_another_session(lab in Lab) {
        lab.make_file("file", PAGE as u64);
        let mut owner = ForeignClient::open(&lab.daemon.url).await;
        let lane = owner.connect().await;
        let pin = owner.pin("file").await;
        let mut other = ForeignClient::open(&lab.daemon.url).await;
        let _other_lane = other.connect().await;

        // No command gets these.
        let malformed = Answer {
            code: Code::InvalidArgument,
            reason: Reason::MalformedRequest,
            exit: 0,
            says: &[],
        };
        let unknown = Answer { code: Code::NotFound, ..malformed };
        let no_session =
            Answer { reason: Reason::UnknownSession, says: &["open a new one"], ..unknown };
        let no_pin =
            Answer { reason: Reason::UnknownPin, says: &["pin the file again"], ..unknown };
        let bad_id = Answer { says: &["session_id is 16 bytes from Welcome"], ..malformed };
        for (id, answer) in [(vec![7; 16], no_session), (vec![7; 15], bad_id), (vec![], bad_id)] {
            for refused in every_call_under(&mut other, &id, &pin).await {
                answer.check_status(&refused);
            }
        }

        for id in [pin.pin_id, 4711] {
            no_pin.check_status(&other.unpin(id).await.unwrap_err());
            no_pin.check_status(&other.commit(id, pin.generation).await.unwrap_err());
        }

        let generation = pin.generation.unwrap();
        let stale = Answer {
            code: Code::Aborted,
            reason: Reason::StaleGeneration,
            exit: 0,
            says: &["is over", "pin it again and write it again"],
        };
        for wrong in [
            v1::Generation { counter: generation.counter + 1, ..generation },
            v1::Generation { counter: 0, ..generation },
            v1::Generation { incarnation: !generation.incarnation, ..generation },
        ] {
            stale.check_status(&owner.commit(pin.pin_id, Some(wrong)).await.unwrap_err());
        }
        let missing = owner.commit(pin.pin_id, None).await.unwrap_err();
        Answer { says: &["generation is missing"], ..malformed }.check_status(&missing);
        let request = v1::PinRequest { access: 0, ..owner.pin_request("file") };
        let refused = owner.stub.pin(request).await.unwrap_err();
        Answer { says: &["neither READ nor READ_WRITE"], ..malformed }.check_status(&refused);
        let refused = owner.stub.pin(owner.pin_request(&"x".repeat(4097))).await.unwrap_err();
        Answer { says: &["path is longer than 4096 bytes"], ..malformed }.check_status(&refused);
        let past = v1::CommitRequest {
            session_id: owner.session_id(),
            pin_id: pin.pin_id,
            generation: pin.generation,
            range: Some(v1::ByteRange { start: 0, end: PAGE as u64 + 1 }),
        };
        let says = &["bytes 0..4097", "the end of the pin"];
        Answer { code: Code::OutOfRange, reason: Reason::RangePastEnd, exit: 0, says }
            .check_status(&owner.stub.commit(past).await.unwrap_err());

        // The owner's pin took no harm from any of it.
        assert!(lane.write(&pin.segments[0], 0, &Pattern(3).bytes(0, PAGE)).await.is_success());
        owner.commit(pin.pin_id, pin.generation).await.unwrap();
        owner.unpin(pin.pin_id).await.unwrap();
        no_pin.check_status(&owner.unpin(pin.pin_id).await.unwrap_err());
        Pattern(3).check(0, &read_by_another_process(&lab.path("file")), "by the owner");
        the_server_still_serves(&lab, &lab.session().await).await;
    }
}

/// What is in the file now; whoever has it pinned loses that.
async fn content_after_taking_it_back(lab: &Lab, session: &Session) -> Vec<u8> {
    let mut events = session.events();
    let path = lab.path("file");
    let reading = tokio::task::spawn_blocking(move || read_by_another_process(&path));
    next_revocation(&mut events).await;
    reading.await.unwrap()
}

/// Each call but the session's own, under this session id.
async fn every_call_under(
    client: &mut ForeignClient,
    id: &[u8],
    pin: &v1::PinResponse,
) -> [Status; 8] {
    let session_id = || id.to_vec();
    let (export, path) = (EXPORT.to_owned(), "file".to_owned());
    let end = v1::Endpoint {
        queue_pair_number: 17,
        packet_sequence_number: 1,
        gid: vec![1; 16],
        lid: 0,
        max_path_mtu_bytes: 4096,
    };
    let connect = v1::ConnectQueuePairRequest {
        session_id: session_id(),
        client: Some(end),
        ..Default::default()
    };
    let create = v1::CreateRequest {
        session_id: session_id(),
        export: export.clone(),
        path: "made".to_owned(),
        size: 1,
        if_exists: 0,
    };
    let make_folder = v1::MakeFolderRequest {
        session_id: session_id(),
        export: export.clone(),
        path: "folder".to_owned(),
    };
    let digest = v1::DigestRequest {
        session_id: session_id(),
        pin_id: pin.pin_id,
        generation: pin.generation,
        offset: 0,
        length: 1,
    };
    let stat = v1::StatRequest { session_id: session_id(), export, path };
    let pinning = v1::PinRequest { session_id: session_id(), ..client.pin_request("file") };
    let unpin = v1::UnpinRequest { session_id: session_id(), pin_id: pin.pin_id };
    let commit = v1::CommitRequest {
        session_id: session_id(),
        pin_id: pin.pin_id,
        generation: pin.generation,
        range: None,
    };
    [
        client.stub.connect_queue_pair(connect).await.unwrap_err(),
        client.stub.create(create).await.unwrap_err(),
        client.stub.make_folder(make_folder).await.unwrap_err(),
        client.stub.digest(digest).await.unwrap_err(),
        client.stub.stat(stat).await.unwrap_err(),
        client.stub.pin(pinning).await.unwrap_err(),
        client.stub.unpin(unpin).await.unwrap_err(),
        client.stub.commit(commit).await.unwrap_err(),
    ]
}
