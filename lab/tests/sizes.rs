//! Files that grow, shrink and go, and pins larger than one region, with RDMA on.
#![forbid(unsafe_code)]

use pinfold_client::{Error, PinRequest, Reason, RevocationReason, Transport};
use pinfold_lab::{EXPORT, Pattern, next_revocation, on_each_file_system, read_by_another_process};

const PAGE: usize = 4096;

on_each_file_system! {
    async fn a_log_grows_under_a_pin_that_reserved_room(lab in Lab) {
        lab.make_file("log", PAGE as u64);
        let session = lab.session().await;
        let request = PinRequest::read_write(EXPORT, "log").reserve_end(16 * PAGE as u64);
        let pin = session.pin(request.transport(Transport::Rdma)).await.unwrap();
        let end = session.grow(EXPORT, "log", 8 * PAGE as u64).await.unwrap();
        assert_eq!(end, 8 * PAGE as u64);
        pin.extend_to(end);
        let pattern = Pattern(8);
        let mut buffer = session.buffer(8 * PAGE).await.unwrap();
        pattern.fill(0, buffer.as_mut_slice());
        let (_, report) = pin.write(0, buffer, 8 * PAGE).await.unwrap();
        assert_eq!(report.rdma_bytes, 8 * PAGE as u64, "by the key that was there before");
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        pattern.check(0, &read_by_another_process(&lab.path("log")), "the grown log");
    }

    async fn a_shrink_takes_the_pins_back_first(lab in Lab) {
        lab.make_file("file", 8 * PAGE as u64);
        let (holder, other) = (lab.session().await, lab.session().await);
        let mut events = holder.events();
        let pin = holder.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        assert_eq!(other.shrink(EXPORT, "file", 100).await.unwrap(), 1);
        assert_eq!(next_revocation(&mut events).await.reason, RevocationReason::Shrink);
        assert!(matches!(pin.commit().await, Err(Error::Revoked { .. })));
        assert_eq!(read_by_another_process(&lab.path("file")).len(), 100);
        holder.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
    }

    async fn a_pinned_file_is_removed_only_by_who_says_so(lab in Lab) {
        lab.make_file("file", PAGE as u64);
        let session = lab.session().await;
        let mut events = session.events();
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let refused = session.remove(EXPORT, "file", false).await.unwrap_err();
        assert_eq!(refused.reason(), Some(Reason::FilePinned), "{refused}");
        assert_eq!(session.remove(EXPORT, "file", true).await.unwrap(), 1);
        assert!(!lab.path("file").exists());
        // The answer and the notice come by ways of their own.
        next_revocation(&mut events).await;
        assert!(matches!(pin.commit().await, Err(Error::Revoked { .. })));
        assert_eq!(session.list(EXPORT, "").await.unwrap(), []);
    }

    async fn a_pin_larger_than_a_region_is_several_of_them(lab in Lab) {
        // Sparse: only what is touched takes room.
        let len: u64 = (5 << 30) + 12_345;
        let file = std::fs::File::create(lab.path("large")).unwrap();
        file.set_len(len).unwrap();
        drop(file);
        let session = lab.session().await;
        let request = PinRequest::read(EXPORT, "large").transport(Transport::Rdma);
        let pin = session.pin(request).await.unwrap();
        let segments = &pin.grant().segments;
        assert!(segments.len() >= 3, "{segments:?}");
        assert!(segments.iter().all(|segment| segment.length < 2 << 30));
        // Across the border between two of them.
        let border = segments[1].file_offset;
        let mut buffer = session.buffer(4 * PAGE).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let (buffer, report) =
            pin.read(border - 2 * PAGE as u64, 4 * PAGE, buffer).await.unwrap();
        assert_eq!(report.rdma_bytes, 4 * PAGE as u64);
        assert!(buffer.as_slice()[..4 * PAGE].iter().all(|byte| *byte == 0));
    }
}
