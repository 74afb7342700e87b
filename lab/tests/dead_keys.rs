//! A key reaches nothing after its unpin, nothing from another session's queue pair, and no byte
//! outside its pin.
#![forbid(unsafe_code)]

use pinfold_client::{CompletionStatus, PinRequest, Segment, Session};
use pinfold_lab::{EXPORT, on_each_file_system, read_by_another_process, remote_slice};

const PAGE: usize = 4096;

async fn try_to_write(
    session: &Session,
    key: &Segment,
    offset: u64,
    len: usize,
) -> CompletionStatus {
    let mut buffer = session.buffer(len).await.unwrap();
    buffer.as_mut_slice().fill(0xee);
    session.raw_write(remote_slice(key, offset, len), buffer).await.unwrap().1
}

on_each_file_system! {
    async fn unpin_makes_the_key_useless(lab in Lab) {
        lab.make_file("file", 4 * PAGE as u64);
        let session = lab.session().await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        // Another pin keeps the file guarded and mapped, so that only the region is gone.
        let keeper = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let key = pin.grant().segments[0];
        assert!(try_to_write(&session, &key, 0, PAGE).await.is_success(), "while it is pinned");
        pin.unpin().await.unwrap();
        assert_eq!(try_to_write(&session, &key, PAGE as u64, PAGE).await, CompletionStatus::RemoteAccess);
        keeper.unpin().await.unwrap();
        assert_eq!(try_to_write(&session, &key, PAGE as u64, PAGE).await, CompletionStatus::RemoteAccess);
        let content = read_by_another_process(&lab.path("file"));
        assert!(content[PAGE..].iter().all(|byte| *byte == 0), "nothing landed after the unpin");
    }

    async fn another_sessions_queue_pair_cannot_use_a_key(lab in Lab) {
        lab.make_file("file", 4 * PAGE as u64);
        lab.make_file("theirs", PAGE as u64);
        let (owner, thief) = (lab.session().await, lab.session().await);
        let pin = owner.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        // A pin of its own, so that its queue pair and protection domain are in use.
        let own = thief.pin(PinRequest::read_write(EXPORT, "theirs")).await.unwrap();
        let key = pin.grant().segments[0];
        assert_eq!(try_to_write(&thief, &key, 0, PAGE).await, CompletionStatus::RemoteAccess);
        assert!(try_to_write(&owner, &key, PAGE as u64, PAGE).await.is_success());
        pin.unpin().await.unwrap();
        own.unpin().await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        assert!(content[..PAGE].iter().all(|byte| *byte == 0), "the thief wrote nothing");
        assert!(content[PAGE..2 * PAGE].iter().all(|byte| *byte == 0xee), "the owner did");
    }

    async fn a_key_ends_where_its_pin_ends(lab in Lab) {
        lab.make_file("file", 4 * PAGE as u64);
        let session = lab.session().await;
        let range = PAGE as u64..2 * PAGE as u64 + 333;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file").range(range)).await.unwrap();
        let key = pin.grant().segments[0];
        assert_eq!((key.file_offset, key.length), (PAGE as u64, PAGE as u64 + 333));
        assert!(try_to_write(&session, &key, 0, PAGE + 333).await.is_success(), "to its last byte");
        let beyond = try_to_write(&session, &key, PAGE as u64, 334).await;
        assert_eq!(beyond, CompletionStatus::RemoteAccess);
        pin.unpin().await.unwrap();
        let content = read_by_another_process(&lab.path("file"));
        let untouched = content[..PAGE].iter().chain(&content[2 * PAGE + 333..]);
        assert!(untouched.copied().all(|byte| byte == 0));
    }
}
