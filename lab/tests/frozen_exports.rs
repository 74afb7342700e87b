//! One export's file system is frozen, and its calls hang inside the kernel: exports of other file systems
//! are served on by the same process, and what can't be done is refused at once.
#![forbid(unsafe_code)]

use pinfold_client::{Code, Reason};
use pinfold_lab::{
    DEADLINE, Daemon, FileSystem, ForeignClient, Frozen, SystemCall, eventually, in_time,
};
use pinfold_proto::v1;
use tempfile::TempDir;
use tonic_types::StatusExt as _;

const PAGE: usize = 4096;
/// More than there are places for the calls of one file system.
const CREATES: usize = 70;

struct Both {
    cold: TempDir,
    _warm: TempDir,
    daemon: Daemon,
}

/// A process that serves two file systems by the stream path.
fn both(cold: FileSystem, warm: FileSystem) -> Both {
    let folder = |at: FileSystem| {
        let folder = tempfile::tempdir_in(at.mount_point()).unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, [0; PAGE]).unwrap();
        std::fs::File::open(path).unwrap().sync_all().unwrap();
        folder
    };
    let (cold, warm) = (folder(cold), folder(warm));
    let exports = [("cold", cold.path()), ("warm", warm.path())];
    let daemon = Daemon::start_with(&exports, &["--rdma-device", "none"]);
    Both { cold, _warm: warm, daemon }
}

fn pin_of(client: &ForeignClient, export: &str) -> v1::PinRequest {
    let transport = v1::Transport::Stream.into();
    v1::PinRequest { export: export.to_owned(), transport, ..client.pin_request("file") }
}

fn reason(status: &tonic::Status) -> Option<Reason> {
    status.get_details_error_info().and_then(|info| info.reason.parse().ok())
}

async fn calls_on_the_other_go_on(cold: FileSystem, warm: FileSystem) {
    let Both { cold: folder, daemon, .. } = &both(cold, warm);
    let crowd = ForeignClient::open(&daemon.url).await;
    let mut other = ForeignClient::open(&daemon.url).await;
    let ice = Frozen::start(cold.mount_point());
    let create = |number: usize| v1::CreateRequest {
        session_id: crowd.session_id(),
        export: "cold".to_owned(),
        path: format!("new{number}"),
        size: PAGE as u64,
        ..Default::default()
    };
    let creating: Vec<_> = (0..CREATES)
        .map(|number| {
            let (mut stub, request) = (crowd.stub.clone(), create(number));
            tokio::spawn(async move { stub.create(request).await })
        })
        .collect();
    let inside = async || daemon.threads_in(SystemCall::Openat) >= 8;
    eventually("creates are inside the kernel", inside).await;

    let pin = other.stub.pin(pin_of(&other, "warm")).await.unwrap().into_inner();
    other.commit(pin.pin_id, pin.generation).await.unwrap();
    let stat = v1::StatRequest {
        session_id: other.session_id(),
        export: "warm".to_owned(),
        path: "file".to_owned(),
    };
    other.stub.stat(stat).await.unwrap();
    other.unpin(pin.pin_id).await.unwrap();

    // The server refuses one more call on the frozen export, and says why.
    let refused = other.stub.create(create(CREATES)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    assert_eq!(reason(&refused), Some(Reason::ExportStalled), "{refused}");
    for words in ["cold", "frozen", "try again"] {
        assert!(refused.message().contains(words), "{words:?} is not in {:?}", refused.message());
    }
    ice.thaw();

    let mut made = 0;
    for created in creating {
        match created.await.unwrap() {
            Ok(_) => made += 1,
            Err(refused) => assert_eq!(reason(&refused), Some(Reason::ExportStalled), "{refused}"),
        }
    }
    let names = std::fs::read_dir(folder.path()).unwrap();
    let names = names.filter(|name| name.as_ref().unwrap().file_name() != "file").count();
    println!("{made} of {CREATES} creates were inside the kernel");
    assert_eq!(names, made, "one that was refused took effect");
    assert!((1..CREATES).contains(&made));
    // It is served as before.
    other.stub.create(create(CREATES)).await.unwrap();
}

async fn a_dead_clients_other_files_are_free(cold: FileSystem, warm: FileSystem) {
    let Both { daemon, .. } = &both(cold, warm);
    let mut dying = ForeignClient::open(&daemon.url).await;
    let stuck = dying.stub.pin(pin_of(&dying, "cold")).await.unwrap().into_inner();
    let exclusive = v1::PinRequest { exclusive: true, ..pin_of(&dying, "warm") };
    dying.stub.pin(exclusive.clone()).await.unwrap();
    let ice = Frozen::start(cold.mount_point());
    let write = v1::WriteRequest {
        session_id: dying.session_id(),
        pin_id: stuck.pin_id,
        generation: stuck.generation,
        offset: 0,
        data: vec![7; PAGE].into(),
    };
    let mut stub = dying.stub.clone();
    let writing = tokio::spawn(async move { stub.write(write).await });
    let inside = async || daemon.threads_in(SystemCall::Pwrite) == 1;
    eventually("its write is inside the kernel", inside).await;
    drop(dying);

    let standby = ForeignClient::open(&daemon.url).await;
    let wanted = v1::PinRequest { session_id: standby.session_id(), ..exclusive };
    let taken = async || match standby.stub.clone().pin(wanted.clone()).await {
        Ok(_) => true,
        Err(refused) => {
            println!("not yet: {refused}");
            false
        }
    };
    eventually("the standby has the other file", taken).await;
    assert_eq!(daemon.threads_in(SystemCall::Pwrite), 1, "it was thawed too soon");
    ice.thaw();
    let _ = writing.await.unwrap();
}

fn each_way(test: impl AsyncFn(FileSystem, FileSystem)) {
    for (cold, warm) in [(FileSystem::Ext4, FileSystem::Xfs), (FileSystem::Xfs, FileSystem::Ext4)] {
        in_time(DEADLINE, test(cold, warm));
    }
}

#[test]
fn calls_on_another_file_system_go_on_and_those_on_the_frozen_one_fail_fast() {
    each_way(calls_on_the_other_go_on);
}

#[test]
fn a_session_ends_file_by_file() {
    each_way(a_dead_clients_other_files_are_free);
}
