//! The kernel's limit on the mappings of one process: pins stop well before it, and the daemon lives.
#![forbid(unsafe_code)]

use pinfold_client::{Code, Error, PinRequest, Reason, Transport};
use pinfold_lab::{Daemon, EXPORT, Sysctl, on_each_file_system};

const LIMIT: &str = "vm.max_map_count";

on_each_file_system! {
    async fn pins_are_refused_before_the_daemon_has_no_room(lab in Lab) {
        const FILES: usize = 40;
        let name = |number: usize| format!("file{number}");
        (0..FILES).for_each(|number| lab.make_file(&name(number), 4096));
        let session = lab.session().await;
        let first = session.pin(PinRequest::read_write(EXPORT, name(0))).await.unwrap();
        // What is kept free begins right here.
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", lab.daemon.pid())).unwrap();
        let _limit = Sysctl::set(LIMIT, &(maps.lines().count() + 2000 + 20).to_string());
        let mut pins = Vec::new();
        let refused = loop {
            let number = pins.len() + 1;
            assert!(number < FILES, "none was refused");
            match session.pin(PinRequest::read_write(EXPORT, name(number))).await {
                Ok(pin) => pins.push(pin),
                Err(refused) => break refused,
            }
        };
        println!("after {} pins: {refused}", pins.len());
        assert_eq!(refused.reason(), Some(Reason::QuotaExceeded), "{refused}");
        assert!(matches!(refused, Error::Refused { code: Code::ResourceExhausted, .. }));
        assert!(refused.to_string().contains(LIMIT), "{refused}");
        // The stream path maps, too.
        let by_stream = PinRequest::read_write(EXPORT, name(FILES - 1)).transport(Transport::Stream);
        assert_eq!(session.pin(by_stream).await.unwrap_err().reason(), Some(Reason::QuotaExceeded));
        first.commit().await.unwrap();
        first.unpin().await.unwrap();
        for pin in pins {
            pin.unpin().await.unwrap();
        }
        lab.nothing_is_held().await;
    }
}

#[test]
fn a_limit_too_small_to_start_with_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let _limit = Sysctl::set(LIMIT, "2100");
    let refused = Daemon::refused(&[(EXPORT, folder.path())], &["--rdma-device", "none"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.stderr.contains(LIMIT), "{refused:?}");
}
