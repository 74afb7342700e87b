//! Which clients count as alive.

use std::time::{Duration, Instant};

use pinfold_proto::v1;

use crate::host::{Host, RawSession, until};

const TIME_TO_LIVE: Duration = Duration::from_secs(2);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_lives_while_it_makes_calls_though_its_heartbeats_do_not_come_through() {
    let host = Host::start_with(|config| config.live_for(TIME_TO_LIVE));
    host.make_file("file", b"x");
    let mut busy = RawSession::open(&host, 1 << 16).await;
    let begin = Instant::now();
    while begin.elapsed() < 3 * TIME_TO_LIVE {
        let request = v1::StatRequest {
            session_id: busy.id.clone(),
            export: "data".to_owned(),
            path: "file".to_owned(),
        };
        busy.client.stat(request).await.expect("the session lives");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // And no longer.
    let other = host.connect().await;
    let sessions = async || other.inspect().await.unwrap().sessions.len();
    until("the silent session has ended", async || sessions().await == 1).await;
}
