//! `on_read=outwait`: the first reader waits for the kernel, later ones don't, and the pins stay.
//! Writers are held back as ever.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::{Child, Command, Stdio};

use pinfold_client::{GuardTier, Pin, PinRequest, RevocationReason, Session};
use pinfold_lab::{
    EXPORT, Lab, LeaseBreakTimeSet, Pattern, Truncation, next_revocation, on_each_file_system_with,
    read_by_another_process,
};

const LEN: usize = 8192;

fn request() -> PinRequest {
    PinRequest::read_write(EXPORT, "file")
}

fn reader(path: &Path) -> Child {
    Command::new("cat").arg(path).stdout(Stdio::null()).spawn().unwrap()
}

async fn ended(mut reader: Child) {
    let status = tokio::task::spawn_blocking(move || reader.wait().unwrap()).await.unwrap();
    assert!(status.success(), "{status}");
}

async fn write(session: &Session, pin: &Pin, seed: u64) {
    let mut buffer = session.buffer(LEN).await.unwrap();
    Pattern(seed).fill(0, buffer.as_mut_slice());
    pin.write(0, buffer, LEN).await.unwrap();
    pin.commit().await.unwrap();
}

/// The tier as operators see it.
async fn guard(session: &Session) -> GuardTier {
    session.inspect().await.unwrap().files[0].guard
}

on_each_file_system_with! { "on_read=outwait";
    async fn readers_pass_the_pins_stay_and_a_writer_takes_them(lab in Lab) {
        let setting = LeaseBreakTimeSet::to(2);
        lab.make_file("file", LEN as u64);
        let path = lab.path("file");
        let session = lab.session().await;
        let mut events = session.events();
        let pin = session.pin(request()).await.unwrap();
        assert_eq!(guard(&session).await, GuardTier::Delegation);
        let first = reader(&path);
        lab.daemon.logged_of(&path, "left to the kernel");
        // While it waits, and after: keys, commits and new pins are good.
        write(&session, &pin, 1).await;
        let second = session.pin(request()).await.unwrap();
        ended(first).await;
        assert_eq!(guard(&session).await, GuardTier::ReadDelegation);
        lab.daemon.logged_of(&path, "readers pass");
        // Whoever waited from here on would wait for ever.
        setting.change(0);
        ended(reader(&path)).await;
        write(&session, &pin, 2).await;
        let third = session.pin(request()).await.unwrap();
        assert_eq!(third.grant().guard, GuardTier::ReadDelegation);
        Pattern(2).check(0, &read_by_another_process(&path), "while readers pass");
        for pin in [&pin, &second, &third] {
            pin.check().expect("nothing was taken back");
        }

        setting.change(45);
        let truncation = Truncation::start(path.clone(), 10);
        let revocation = next_revocation(&mut events).await;
        assert_eq!(revocation.reason, RevocationReason::LocalWriter);
        assert!(revocation.timings.unwrap().break_pending_at_release, "because we let go");
        truncation.done().await;
        let record = lab.daemon.audit_record(&path);
        assert_eq!(record["guard"], "delegation (read)");
        assert_eq!(record["not_outwaited"], serde_json::Value::Null);
        assert_eq!(record["pins"], 3);

        // A new guarding is a whole one.
        let _again = session.pin(request()).await.unwrap();
        assert_eq!(guard(&session).await, GuardTier::Delegation);
    }

    async fn where_the_kernel_never_lets_it_through_the_pins_are_taken_back(lab in Lab) {
        let _setting = LeaseBreakTimeSet::to(0);
        revoked_for_a_reader(lab, "fs.lease-break-time is 0").await;
    }

    async fn where_the_reader_would_wait_for_too_long_the_pins_are_taken_back(lab in Lab) {
        let _setting = LeaseBreakTimeSet::to(45);
        revoked_for_a_reader(lab, "above the limit of 10 s").await;
    }
}

async fn revoked_for_a_reader(lab: Lab, why: &str) {
    lab.make_file("file", LEN as u64);
    let path = lab.path("file");
    let session = lab.session().await;
    let mut events = session.events();
    let mut records = session.watch().await.unwrap();
    let _pin = session.pin(request()).await.unwrap();
    let reading = reader(&path);
    let revocation = next_revocation(&mut events).await;
    assert_eq!(revocation.reason, RevocationReason::LocalReader);
    ended(reading).await;
    let watched = records.next().await.unwrap().unwrap();
    assert!(watched.not_outwaited.as_ref().is_some_and(|told| told.contains(why)), "{watched:?}");
    let record = lab.daemon.audit_record(&path);
    let told = record["not_outwaited"].as_str().unwrap();
    assert!(told.contains(why), "{told}");
    lab.daemon.logged_of(&path, "can't be left to the kernel");
}
