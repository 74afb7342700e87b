//! The server dies without a word: the file system is free, and a new server takes over.
#![forbid(unsafe_code)]

use pinfold_client::{Event, PinRequest};
use pinfold_lab::{EXPORT, Pattern, on_each_file_system, read_by_another_process};

const LEN: usize = 64 << 10;

on_each_file_system! {
    async fn the_file_system_unmounts_and_a_new_server_serves_the_file(lab in Lab) {
        let mut lab = lab;
        lab.make_file("file", LEN as u64);
        let session = lab.session().await;
        let mut events = session.events();
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let generation = pin.grant().generation;
        let mut buffer = session.buffer(LEN).await.unwrap();
        Pattern(1).fill(0, buffer.as_mut_slice());
        pin.write(0, buffer, LEN).await.unwrap();
        pin.commit().await.unwrap();

        lab.daemon.kill();
        let Some(Event::Disconnected { loss }) = events.next().await else { panic!("not told") };
        println!("the client learned: {loss}");
        lab.file_system.remount("dax=always");
        Pattern(1).check(0, &read_by_another_process(&lab.path("file")), "what was committed");

        lab.restart();
        let session = lab.session().await;
        let pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        assert_ne!(pin.grant().generation.incarnation, generation.incarnation);
        let mut buffer = session.buffer(LEN).await.unwrap();
        Pattern(2).fill(0, buffer.as_mut_slice());
        pin.write(0, buffer, LEN).await.unwrap();
        pin.commit().await.unwrap();
        pin.unpin().await.unwrap();
        Pattern(2).check(0, &read_by_another_process(&lab.path("file")), "by the new server");
    }

    async fn a_server_that_is_asked_to_go_tells_its_clients(lab in Lab) {
        let mut lab = lab;
        lab.make_file("file", LEN as u64);
        let session = lab.session().await;
        let mut events = session.events();
        let _pin = session.pin(PinRequest::read_write(EXPORT, "file")).await.unwrap();
        let told = async {
            let revocation = pinfold_lab::next_revocation(&mut events).await;
            assert_eq!(revocation.reason, pinfold_client::RevocationReason::Shutdown);
        };
        let status = tokio::task::spawn_blocking(move || lab.daemon.terminate());
        let (status, ()) = tokio::join!(status, told);
        assert!(status.unwrap().success());
    }
}
