//! Inspect of more sessions, files and pins than fit into one message.
#![forbid(unsafe_code)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod daemon;

use std::collections::BTreeSet;

use daemon::{Client, Daemon, run};
use pinfold_proto::v1;

/// With the paths below more than 4 MiB, which a client takes of one message.
const FILES: usize = 1_250;

#[test]
fn all_pins_are_told_of_page_by_page() {
    let daemon = Daemon::start();
    run(async {
        let folder = vec!["f".repeat(250); 14].join("/");
        std::fs::create_dir_all(daemon.path(&folder)).unwrap();
        let mut client = Client::open(&daemon.url).await;
        let mut pins = BTreeSet::new();
        for number in 0..FILES {
            let name = format!("{folder}/{number}");
            std::fs::write(daemon.path(&name), b"x").unwrap();
            pins.insert(client.pin(&name).await.unwrap().pin_id);
        }
        // One file has many pins.
        for _ in 0..9 {
            pins.insert(client.pin(&format!("{folder}/7")).await.unwrap().pin_id);
        }

        // A client that knows no pages is answered, too.
        let first = client.inspect().await.unwrap();
        assert!(!first.files.is_empty() && !first.next_page_token.is_empty());
        assert_eq!((first.sessions.len(), first.exports.len()), (1, 1));
        for page_size in [0, 5, 100] {
            let mut seen = Vec::new();
            let mut page_token = Vec::new();
            loop {
                let session_id = client.id.clone();
                let request = v1::InspectRequest { session_id, page_size, page_token };
                let page = client.stub.inspect(request).await.unwrap().into_inner();
                let of_files = page.files.iter().flat_map(|file| &file.pins);
                seen.extend(of_files.map(|pin| pin.pin_id));
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            assert_eq!(seen.len(), pins.len(), "pages of {page_size}: none twice");
            assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), pins, "pages of {page_size}");
        }
    });
}
