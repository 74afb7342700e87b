//! Debian 12's kernel: its soft NIC has no on-demand paging, and files there take leases only. What
//! can't be served is refused with the reason, and what can be is served and protected.
#![forbid(unsafe_code)]

use pinfold_client::{Code, Error, GuardTier, PinRequest, Reason};
use pinfold_lab::{
    EXPORT, FileSystem, Lab, Opener, device_name, on_each_file_system,
    truncate_under_pinned_registration,
};

on_each_file_system! {
    async fn a_pin_on_dax_is_refused_with_the_reason_and_the_remedy(lab in Lab) {
        lab.make_file("file", 8192);
        let path = lab.path("file");
        let session = lab.session().await;
        let device = device_name();
        let words =
            [path.to_str().unwrap(), "fs-DAX", &device, "no on-demand paging", "6.15", "mlx5"];
        let refused = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap_err();
        let Error::Refused { reason, code, message, .. } = refused else { panic!("{refused:?}") };
        assert_eq!(reason, Some(Reason::DeviceCannotRegister));
        assert_eq!(code, Code::FailedPrecondition);
        for word in words {
            assert!(message.contains(word), "{word:?} is not in {message:?}");
        }

        // Not left guarded: another process may open it in any way, and the daemon has not.
        lab.nothing_is_held().await;
        assert_eq!(session.stat(EXPORT, "file").await.unwrap().generation, None);
        drop((Opener::reading(&path), Opener::writing(&path)));

        let command = lab.pinfold(&["pin", "lab/file"]).await;
        assert_eq!(command.code, 8, "{}", command.stderr);
        for word in words {
            assert!(command.stderr.contains(word), "{word:?} is not in {}", command.stderr);
        }
        lab.nothing_is_held().await;
    }
}

#[test]
fn a_truncate_on_tmpfs_is_fenced_by_deregistering() {
    Lab::run(FileSystem::Tmpfs, |lab| truncate_under_pinned_registration(lab, GuardTier::Lease));
}
