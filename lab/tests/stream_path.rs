//! The stream path on a DAX file: same rights, same revocation; the fence covers it.
#![forbid(unsafe_code)]

use pinfold_client::{Error, PinRequest, RdmaDevice, Transport};
use pinfold_lab::{
    EXPORT, Pattern, Truncation, next_revocation, on_each_file_system, read_by_another_process,
};

const PIECE: usize = 10_007;
const LEN: u64 = 64 * PIECE as u64;

on_each_file_system! {
    async fn a_host_without_a_device_writes_by_grpc(lab in Lab) {
        lab.make_file("file", LEN);
        let session = lab.session_with(lab.options().rdma_device(RdmaDevice::None)).await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        assert!(pin.grant().segments.is_empty());
        println!("no RDMA: {:?}", pin.grant().no_rdma_because);
        let pattern = Pattern(3);
        let mut buffer = session.buffer(PIECE).await.unwrap();
        for round in 0..LEN / PIECE as u64 {
            let offset = round * PIECE as u64;
            pattern.fill(offset, &mut buffer.as_mut_slice()[..PIECE]);
            let (back, report) = pin.write(offset, buffer, PIECE).await.unwrap();
            assert_eq!((report.rdma_bytes, report.stream_bytes), (0, PIECE as u64));
            buffer = back;
        }
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        pattern.check(0, &read_by_another_process(&lab.path("file")), "written by gRPC");
    }

    async fn a_truncate_waits_for_the_stream_too_and_nothing_comes_after_it(lab in Lab) {
        lab.make_file("file", LEN);
        let session = lab.session().await;
        let mut events = session.events();
        let request = PinRequest::read_write(EXPORT, "file").transport(Transport::Stream);
        let pin = session.pin(request).await.unwrap();
        let (started, streaming) = tokio::sync::oneshot::channel();
        let writing = async {
            let mut started = Some(started);
            let mut buffer = session.buffer(PIECE).await.unwrap();
            buffer.as_mut_slice().fill(b'R');
            for round in 0.. {
                let offset = round % 64 * PIECE as u64;
                match pin.write(offset, buffer, PIECE).await {
                    Ok((back, _)) => buffer = back,
                    Err(failed) => return failed.error,
                }
                if round == 20 && let Some(started) = started.take() {
                    started.send(()).unwrap();
                }
            }
            unreachable!("the loop has no end")
        };
        let cutting = async {
            streaming.await.unwrap();
            Truncation::start(lab.path("file"), 0).done().await;
        };
        let (error, ()) = tokio::join!(writing, cutting);
        assert!(matches!(error, Error::Draining { .. } | Error::Revoked { .. }), "{error}");
        let timings = next_revocation(&mut events).await.timings.unwrap();
        println!("{timings:?}");
        assert!(timings.break_pending_at_release && timings.drained.is_some());
        let record = lab.daemon.audit_record(&lab.path("file"));
        assert_eq!(record["late_stream_writes"], 0);
        assert_eq!(read_by_another_process(&lab.path("file")), b"", "not one byte came after");
    }
}
