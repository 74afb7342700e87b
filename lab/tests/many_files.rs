//! Many files are wanted back at once: each goes its own way, and one that is slow holds up none
//! of the others.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use pinfold_client::{Error, Event, PinRequest};
use pinfold_lab::{
    EXPORT, ForeignClient, Truncation, on_each_file_system, read_by_another_process,
};

const FILES: usize = 16;
const LEN: usize = 16 << 10;

fn name(number: usize) -> String {
    format!("file{number}")
}

on_each_file_system! {
    async fn sixteen_truncates_at_once_go_through_each_by_itself(lab in Lab) {
        let session = lab.session().await;
        let mut events = session.events();
        let mut pins = Vec::new();
        for number in 0..FILES {
            lab.make_file(&name(number), LEN as u64);
            let pin = session.pin(PinRequest::read_write(EXPORT, name(number))).await.unwrap();
            let mut buffer = session.buffer(LEN).await.unwrap();
            buffer.as_mut_slice().fill(number as u8);
            pin.write(0, buffer, LEN).await.unwrap();
            pins.push(pin);
        }
        let cut = |number: usize| 1 + number as i64;
        let truncations: Vec<_> = (0..FILES)
            .map(|number| Truncation::start(lab.path(&name(number)), cut(number)))
            .collect();
        for truncation in truncations {
            truncation.done().await;
        }

        // Of each pin one notice and one end, in this order, whatever the others do meanwhile.
        let (mut noticed, mut revoked) = (BTreeSet::new(), BTreeSet::new());
        while revoked.len() < FILES {
            match events.next().await.unwrap() {
                Event::Draining { pins, .. } => {
                    let [pin] = pins[..] else { panic!("files of one notice: {pins:?}") };
                    assert!(noticed.insert(pin), "told twice");
                }
                Event::Revoked { pins, revocation } => {
                    let [pin] = pins[..] else { panic!("files of one revocation: {pins:?}") };
                    assert!(noticed.contains(&pin), "revoked before it was told");
                    assert!(revoked.insert(pin), "revoked twice");
                    let timings = revocation.timings.unwrap();
                    assert!(timings.break_pending_at_release && timings.drained.is_some());
                }
                other => panic!("{other:?}"),
            }
        }
        let mut generations = BTreeSet::new();
        for (number, pin) in pins.into_iter().enumerate() {
            let grant = pin.grant();
            assert!(revoked.contains(&grant.pin_id));
            let record = lab.daemon.audit_record(&lab.path(&name(number)));
            assert_eq!(record["generation"], grant.generation.to_string());
            assert_eq!(record["break_pending_at_release"], true, "{record}");
            assert_eq!((&record["pins"], &record["failed_regions"]), (&1.into(), &0.into()));
            generations.insert(record["generation"].to_string());
            assert!(matches!(pin.check(), Err(Error::Revoked { .. })));
            let content = read_by_another_process(&lab.path(&name(number)));
            assert_eq!(content, vec![number as u8; cut(number) as usize]);
        }
        assert_eq!(generations.len(), FILES, "each file has a generation of its own");
        lab.nothing_is_held().await;
    }

    async fn one_that_is_not_given_back_holds_up_none_of_the_others(lab in Lab) {
        let mut client = ForeignClient::open(&lab.daemon.url).await;
        let lane = client.connect().await;
        let mut keys = Vec::new();
        for number in 0..FILES {
            lab.make_file(&name(number), LEN as u64);
            keys.push(client.pin(&name(number)).await);
        }
        let slow = keys[0].pin_id;
        // The slow one is wanted first, so that the others come behind it.
        let first = Truncation::start(lab.path(&name(0)), 0);
        assert_eq!(client.next_draining().await.pin_ids, [slow]);
        let others: Vec<_> =
            (1..FILES).map(|number| Truncation::start(lab.path(&name(number)), 0)).collect();
        let mut gone = BTreeSet::new();
        while gone.len() < FILES - 1 {
            use pinfold_proto::v1::session_event::Event;
            match client.next_event().await {
                Some(Event::Draining(draining)) => client.say_drained(&draining.pin_ids),
                Some(Event::Revoked(revoked)) => {
                    assert!(!revoked.pin_ids.contains(&slow), "it was the last to be given back");
                    assert!(revoked.timings.unwrap().break_pending_at_release);
                    gone.extend(revoked.pin_ids);
                }
                other => panic!("{other:?}"),
            }
        }
        for truncation in others {
            truncation.done().await;
        }
        // And all that time it was whole.
        assert!(lane.write(&keys[0].segments[0], 0, &[1; LEN]).await.is_success());
        client.say_drained(&[slow]);
        let revoked = client.next_revoked().await;
        assert_eq!(revoked.pin_ids, [slow]);
        let timings = revoked.timings.unwrap();
        assert!(timings.drained_us.is_some() && timings.break_pending_at_release, "{timings:?}");
        first.done().await;
        lab.nothing_is_held().await;
    }
}
