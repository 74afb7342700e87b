//! Where nobody can ask for RDMA FLUSH, that is said, and commits serve as ever: Debian 12's rdma-core
//! is 44, and FLUSH came with 45.
#![forbid(unsafe_code)]

use pinfold_client::{Durability, Error, PinRequest, Session};
use pinfold_lab::{
    Daemon, EXPORT, FileSystem, Lab, device_name, doctor, finding, on_each_file_system,
    rdma_core_version,
};

const LEN: usize = 4096;
/// What an old rdma-core is told to lack.
const LACKS: &str = "this host's libibverbs or its provider can't ask for it (rdma-core 45 or newer \
                     can, for soft RoCE)";

/// A write, a flush that is refused with a reason, and a commit.
async fn refused(session: &Session) -> (Vec<Durability>, Option<String>, String) {
    let pin = session.pin(PinRequest::read_write(EXPORT, "file").track_writes()).await.unwrap();
    let buffer = session.buffer(LEN).await.unwrap();
    pin.write(0, buffer, LEN).await.unwrap();
    let refused = pin.flush(0..LEN as u64).await.unwrap_err();
    assert!(matches!(refused, Error::NoFlush { .. }), "{refused}");
    assert!(!pin.write_fate().unwrap().is_all_committed());
    pin.commit().await.unwrap();
    assert!(pin.write_fate().unwrap().is_all_committed());
    let grant = pin.grant();
    (grant.durability.clone(), grant.no_flush_because.clone(), refused.to_string())
}

on_each_file_system! {
    async fn a_server_with_an_old_library_says_why(lab in Lab) {
        assert!(rdma_core_version() < 45, "this is about hosts with an older one");
        lab.make_file("file", LEN as u64);
        let because = format!("RDMA device {} can't be used for RDMA FLUSH: {LACKS}", device_name());
        let (durability, why, refused) = refused(&lab.session().await).await;
        assert_eq!(durability, [Durability::Commit]);
        assert_eq!(why.as_ref(), Some(&because));
        assert_eq!(
            refused,
            format!("cannot flush lab/file by RDMA: {because}; `commit` makes writes durable")
        );
    }
}

#[test]
fn a_client_with_an_old_library_says_why() {
    Lab::run(FileSystem::Ext4, async |mut lab: Lab| {
        lab.make_file("file", LEN as u64);
        assert!(lab.daemon.terminate().success());
        lab.daemon = Daemon::start_as(&["newer-rdma-core"], &[(EXPORT, lab.folder())]);
        let (durability, why, refused) = refused(&lab.session().await).await;
        assert_eq!((durability, why), (vec![Durability::Commit, Durability::Flush], None));
        let device = device_name();
        assert_eq!(
            refused,
            format!(
                "cannot flush lab/file by RDMA: RDMA device {device} of this host: {LACKS}; \
                 `commit` makes writes durable"
            )
        );
    });
}

#[test]
fn the_doctor_says_why() {
    let finished = doctor(&[], &["--json"]);
    let report: serde_json::Value = serde_json::from_str(&finished.stdout).unwrap();
    let found = finding(&report, &device_name(), "flush");
    assert_eq!((&found["result"], &found["found"]), (&"limited".into(), &"not usable".into()));
    assert!(found["why"].as_str().unwrap().contains(LACKS), "{found}");
}
