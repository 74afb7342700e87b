//! Debian 12's kernel: its soft NIC has no on-demand paging, and files there take leases only. What
//! can't be served is refused with the reason, and what can be is served and protected.
#![forbid(unsafe_code)]

use pinfold_client::{Code, Error, GuardTier, PinRequest, Reason, Transport};
use pinfold_lab::{
    EXPORT, FileSystem, Lab, Opener, Pattern, device_name, on_each_file_system,
    read_by_another_process, truncate_under_pinned_registration,
};

on_each_file_system! {
    async fn a_pin_on_dax_is_refused_with_the_reason_and_the_remedy(lab in Lab) {
        lab.make_file("file", 8192);
        let path = lab.path("file");
        let session = lab.session().await;
        let device = device_name();
        let words =
            [path.to_str().unwrap(), "fs-DAX", &device, "no on-demand paging", "6.15", "mlx5"];
        let by_rdma = PinRequest::read_write(EXPORT, "file").transport(Transport::Rdma);
        let refused = session.pin(by_rdma).await.unwrap_err();
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

        let command = lab.pinfold(&["--transport", "rdma", "pin", "lab/file"]).await;
        assert_eq!(command.code, 8, "{}", command.stderr);
        for word in words {
            assert!(command.stderr.contains(word), "{word:?} is not in {}", command.stderr);
        }
        lab.nothing_is_held().await;
    }

    async fn who_leaves_the_way_open_is_served_by_the_stream_path_and_told_why(lab in Lab) {
        lab.make_file("file", 8192);
        let session = lab.session().await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let because = pin.grant().no_rdma_because.as_deref().unwrap();
        assert!(because.contains("no on-demand paging"), "{because}");
        let mut buffer = session.buffer(8192).await.unwrap();
        Pattern(6).fill(0, buffer.as_mut_slice());
        let (_, report) = pin.write(0, buffer, 8192).await.unwrap();
        assert_eq!((report.rdma_bytes, report.stream_bytes), (0, 8192));
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        Pattern(6).check(0, &read_by_another_process(&lab.path("file")), "by the stream path");
    }
}

#[test]
fn a_truncate_on_tmpfs_is_fenced_by_deregistering() {
    Lab::run(FileSystem::Tmpfs, |lab| truncate_under_pinned_registration(lab, GuardTier::Lease));
}
