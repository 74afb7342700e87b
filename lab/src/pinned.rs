//! What must hold for memory that the device pins, on every kernel.

use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use pinfold_client::{
    Access, Code, CompletionStatus, DrainPolicy, Error, GuardTier, PinRequest, Quirks, Reason,
    RevocationReason,
};

use crate::{
    EXPORT, Lab, Pattern, Truncation, next_revocation, read_by_another_process, remote_slice,
};

const PAGE: usize = 4096;
const PAGES: u64 = 64;
const LEFT: u64 = PAGES / 2;
const OTHER_PINS: usize = 32;

/// Somebody truncates a file on tmpfs while a client that does not listen writes to it. There are
/// no page tables to follow here: only deregistering cuts the writes off, and what would land
/// after the truncate without it is lost without a word.
pub async fn truncate_under_pinned_registration(lab: Lab, tier: GuardTier) {
    let found = statfs(lab.folder()).unwrap().filesystem_type();
    assert_eq!(found, TMPFS_MAGIC, "{} is no tmpfs", lab.folder().display());
    lab.make_file("file", PAGES * PAGE as u64);
    let deaf = lab.session_with(lab.options().drain_policy(DrainPolicy::Ignore)).await;
    let mut events = deaf.events();
    let pin = deaf.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
    let grant = pin.grant();
    assert_eq!((grant.guard, grant.access), (tier, Access::ReadWrite));
    assert!(!grant.dax && !grant.map_sync, "{grant:?}");
    assert_eq!(grant.durability, [], "nothing on tmpfs survives power loss");
    // The path MTU is the connection's: it is set by what fs-DAX needs, where that works.
    assert_eq!(grant.quirks, Quirks { start_alignment_bytes: 1, path_mtu_bytes: 0 });
    let key = grant.segments[0];
    // More regions to deregister: whoever would not wait for all of them is far too early.
    let mut others = Vec::new();
    for _ in 0..OTHER_PINS {
        others.push(deaf.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap());
    }
    not_durable(&pin.commit().await.unwrap_err(), &lab);

    let mut acknowledged = vec![None; PAGES as usize];
    let mut truncation = None;
    let mut buffer = deaf.buffer(PAGE).await.unwrap();
    let mut round = 0;
    let (refused, unknown) = loop {
        let page = round % PAGES;
        let (offset, pattern) = (page * PAGE as u64, Pattern(round + 1));
        pattern.fill(offset, buffer.as_mut_slice());
        let cut = truncation.as_ref().is_some_and(Truncation::is_done);
        let (back, status) =
            deaf.raw_write(remote_slice(&key, offset, PAGE), buffer).await.unwrap();
        if !status.is_success() {
            break (status, page);
        }
        assert!(!cut, "a write that began after the truncate was taken, and is lost");
        buffer = back;
        acknowledged[page as usize] = Some(pattern);
        round += 1;
        if round == PAGES + LEFT {
            let len = (LEFT * PAGE as u64) as i64;
            truncation = Some(Truncation::start(lab.path("file"), len));
        }
    };
    assert_eq!(refused, CompletionStatus::RemoteAccess);
    truncation.expect("every page was written once").done().await;
    let revocation = next_revocation(&mut events).await;
    assert_eq!(revocation.reason, RevocationReason::LocalWriter);
    let timings = revocation.timings.unwrap();
    println!("{timings:?}");
    assert_eq!(timings.drained, None, "nobody drained");
    assert!(timings.break_pending_at_release, "the truncate went through because we let go");
    let record = lab.daemon.audit_record(&lab.path("file"));
    assert_eq!(
        (&record["guard"], &record["failed_regions"]),
        (&tier.to_string().into(), &0.into())
    );

    let content = read_by_another_process(&lab.path("file"));
    assert_eq!(content.len() as u64, LEFT * PAGE as u64, "the truncate cut it");
    for page in (0..LEFT).filter(|page| *page != unknown) {
        let offset = page * PAGE as u64;
        let piece = &content[offset as usize..offset as usize + PAGE];
        let pattern = acknowledged[page as usize].expect("one whole round was written");
        pattern.check(offset, piece, "an acknowledged write");
    }
    assert!(matches!(pin.commit().await, Err(Error::Revoked { .. })));
    for offset in [0, (PAGES - 1) * PAGE as u64] {
        let mut buffer = deaf.buffer(PAGE).await.unwrap();
        buffer.as_mut_slice().fill(0xee);
        let (_, status) = deaf.raw_write(remote_slice(&key, offset, PAGE), buffer).await.unwrap();
        assert_eq!(status, CompletionStatus::RemoteAccess, "the key is dead");
    }
    assert!(read_by_another_process(&lab.path("file")) == content, "no stale byte appeared");
    lab.nothing_is_held().await;

    // The server goes on, and says the truth about what it wrote.
    let pin = deaf.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
    let mut buffer = deaf.buffer(100).await.unwrap();
    Pattern(4711).fill(333, buffer.as_mut_slice());
    pin.write(333, buffer, 100).await.unwrap();
    not_durable(&pin.commit().await.unwrap_err(), &lab);
    pin.unpin().await.unwrap();
    let content = read_by_another_process(&lab.path("file"));
    Pattern(4711).check(333, &content[333..433], "written at an odd offset");
}

fn not_durable(error: &Error, lab: &Lab) {
    let Error::Refused { reason, code, message, .. } = error else { panic!("{error:?}") };
    assert_eq!((*reason, *code), (Some(Reason::UnsupportedFile), Code::FailedPrecondition));
    let path = lab.path("file");
    for word in [path.to_str().unwrap(), "tmpfs", "durable", "export a directory on pmem"] {
        assert!(message.contains(word), "{word:?} is not in {message:?}");
    }
}
