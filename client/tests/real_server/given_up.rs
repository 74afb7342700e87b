//! A call that is given up leaves nothing behind, wherever its future is dropped.

use std::future::poll_fn;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::task::Poll;

use pinfold_client::{IfExists, KeepPolicy, KeptSession, Part, Pin, PinRequest, Session};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::host::{Host, soon, until};

const LEN: usize = 4096;

/// When a future is dropped.
#[derive(Clone, Copy, Debug)]
enum Drop {
    /// Right after its last poll.
    AtOnce,
    /// When it is woken after that: what it waited for is there, and nobody takes it.
    WhenWoken,
}

/// Polls a future so many times at most; `None`: it was dropped before its end.
async fn polled<F: Future>(future: F, times: usize, drop: Drop) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = times;
    poll_fn(move |context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match (future.as_mut().poll(context), drop) {
            (Poll::Ready(done), _) => Poll::Ready(Some(done)),
            (Poll::Pending, Drop::AtOnce) if left == 0 => Poll::Ready(None),
            (Poll::Pending, _) => Poll::Pending,
        }
    })
    .await
}

/// Gives a call up at its first poll, at its second, and so on until it completes.
async fn at_every_poll<T>(what: &str, mut call: impl AsyncFnMut() -> T) {
    for drop in [Drop::AtOnce, Drop::WhenWoken] {
        let mut times = 0;
        while soon(polled(call(), times, drop)).await.is_none() {
            times += 1;
        }
        println!("{what}: dropped at {times} polls, {drop:?}");
    }
}

/// A host with a file, a session to give calls up in, and one that looks.
struct Rig {
    host: Host,
    session: Session,
    observer: Session,
}

impl Rig {
    async fn start() -> Self {
        let host = Host::start();
        host.make_file("file", &[1; LEN]);
        let (session, observer) = (host.connect().await, host.connect().await);
        Self { host, session, observer }
    }

    fn request(&self) -> PinRequest {
        PinRequest::read_write("data", "file")
    }

    async fn pin(&self) -> Pin {
        self.session.pin(self.request()).await.unwrap()
    }

    /// There are no other pins than so many, no other sessions than these two, and both live.
    async fn assert_nothing_left(&self, pins: usize) {
        let found = async || {
            let seen = self.observer.inspect().await.unwrap();
            let held = seen.files.iter().map(|file| file.pins.len()).sum::<usize>();
            (held, seen.sessions.len())
        };
        until("nothing else is left", async || found().await == (pins, 2)).await;
        self.session.stat("data", "file").await.expect("the session lives");
        if pins == 0 {
            // Nobody has to be asked for it.
            let mut events = self.session.events();
            let path = self.host.path("file");
            let open = move || std::fs::File::options().write(true).open(path).map(std::mem::drop);
            soon(tokio::task::spawn_blocking(open)).await.unwrap().unwrap();
            self.session.stat("data", "file").await.expect("the session lives");
            let heard = polled(events.next(), 1, Drop::AtOnce).await;
            assert!(heard.is_none(), "somebody had to give the file back: {heard:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pins_leave_nothing() {
    let rig = Rig::start().await;
    at_every_poll("pin", async || rig.session.pin(rig.request()).await.unwrap()).await;
    rig.assert_nothing_left(0).await;
    at_every_poll("exclusive pin", async || {
        // Refused while the one before is still on its way out.
        let _ = rig.session.pin(rig.request().exclusive()).await;
    })
    .await;
    rig.assert_nothing_left(0).await;
    at_every_poll("pin and unpin", async || {
        let _ = rig.pin().await.unpin().await;
    })
    .await;
    rig.assert_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_a_session_leave_nothing() {
    let rig = Rig::start().await;
    let session = &rig.session;
    at_every_poll("connect", async || Session::connect(rig.host.options()).await.unwrap()).await;
    rig.assert_nothing_left(0).await;
    at_every_poll("close", async || rig.host.connect().await.close().await).await;
    rig.assert_nothing_left(0).await;
    at_every_poll("stat", async || session.stat("data", "file").await.unwrap()).await;
    at_every_poll("list", async || session.list("data", "").await.unwrap()).await;
    at_every_poll("inspect", async || session.inspect().await.unwrap()).await;
    at_every_poll("watch", async || session.watch().await.unwrap()).await;
    at_every_poll("make_folder", async || session.make_folder("data", "folder").await.unwrap())
        .await;
    at_every_poll("buffer", async || session.buffer(LEN).await.unwrap()).await;
    at_every_poll("buffer_pool", async || session.buffer_pool(2, LEN).await.unwrap()).await;
    // What is refused while the call before is still at work is as good.
    at_every_poll("create", async || {
        let _ = session.create("data", "new", 10, IfExists::Resize).await;
    })
    .await;
    at_every_poll("grow", async || {
        let _ = session.grow("data", "new", 20).await;
    })
    .await;
    at_every_poll("shrink", async || {
        let _ = session.shrink("data", "new", 5).await;
    })
    .await;
    at_every_poll("remove", async || {
        let _ = session.remove("data", "new", true).await;
    })
    .await;
    at_every_poll("revoke", async || session.revoke("data", "file").await.unwrap()).await;
    rig.assert_nothing_left(0).await;
    at_every_poll("quiesce and resume", async || {
        let _ = session.quiesce("data").await;
        let _ = session.resume("data").await;
    })
    .await;
    let resumed = async || {
        let _ = session.resume("data").await;
        session.stat("data", "file").await.is_ok()
    };
    until("a given-up quiesce has ended", resumed).await;
    rig.assert_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_a_pin_leave_nothing_and_the_pin_usable() {
    let rig = Rig::start().await;
    let (session, pin) = (&rig.session, &rig.pin().await);
    let buffer = async || session.buffer(LEN).await.unwrap();
    let parts = [Part { offset: 0, bytes: 0..10 }, Part { offset: 100, bytes: 10..20 }];
    at_every_poll("write", async || pin.write(0, buffer().await, LEN).await.unwrap()).await;
    at_every_poll("read", async || pin.read(0, LEN, buffer().await).await.unwrap()).await;
    at_every_poll("write_vectored", async || {
        pin.write_vectored(&parts, buffer().await).await.unwrap()
    })
    .await;
    at_every_poll("read_vectored", async || {
        pin.read_vectored(&parts, buffer().await).await.unwrap()
    })
    .await;
    at_every_poll("write_visible", async || {
        pin.write_visible(0, buffer().await, LEN).await.unwrap()
    })
    .await;
    at_every_poll("digest", async || pin.digest(0, LEN).await.unwrap()).await;
    // A medium that keeps nothing refuses these.
    at_every_poll("write_durable", async || {
        let _ = pin.write_durable(0, buffer().await, LEN).await;
    })
    .await;
    at_every_poll("commit", async || {
        let _ = pin.commit().await;
    })
    .await;
    at_every_poll("commit_range", async || {
        let _ = pin.commit_range(0..10).await;
    })
    .await;
    at_every_poll("pipeline", async || {
        let mut pipeline = pin.pipeline(NonZeroUsize::new(2).unwrap());
        for _ in 0..3 {
            if let Some(done) = pipeline.next_if_full().await {
                done.unwrap();
            }
            pipeline.write(0, buffer().await, LEN).await;
            pipeline.read(0, LEN, buffer().await).await;
        }
        while let Some(done) = pipeline.next().await {
            done.unwrap();
        }
    })
    .await;
    rig.assert_nothing_left(1).await;
    // The pin is as good as before: what was abandoned has landed before this.
    let mut last = buffer().await;
    last.as_mut_slice().fill(9);
    pin.write(0, last, LEN).await.unwrap();
    assert_eq!(std::fs::read(rig.host.path("file")).unwrap(), [9; LEN]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_of_a_kept_pin_leave_nothing() {
    let rig = Rig::start().await;
    let (options, policy) = (rig.host.options(), KeepPolicy::default());
    at_every_poll("keep and close", async || {
        let kept = KeptSession::connect(options.clone(), policy.clone()).await.unwrap();
        kept.session().await.unwrap();
        kept.close().await;
    })
    .await;
    rig.assert_nothing_left(0).await;
    let kept = KeptSession::connect(options, policy).await.unwrap();
    at_every_poll("keep a pin", async || kept.pin(rig.request()).await.unwrap()).await;
    at_every_poll("keep a pin and unpin", async || {
        let _ = kept.pin(rig.request()).await.unwrap().unpin().await;
    })
    .await;
    let pin = kept.pin(rig.request()).await.unwrap();
    at_every_poll("write", async || {
        pin.write(0, kept.buffer(LEN).await.unwrap(), LEN).await.unwrap()
    })
    .await;
    at_every_poll("read", async || {
        pin.read(0, LEN, kept.buffer(LEN).await.unwrap()).await.unwrap()
    })
    .await;
    assert!(polled(pin.interrupted(), 1, Drop::AtOnce).await.is_none());
    // Interrupted, and resumed with a call that is given up again and again.
    rig.observer.revoke("data", "file").await.unwrap();
    soon(pin.interrupted()).await;
    let mut taken = 0;
    at_every_poll("resume", async || {
        taken += usize::from(pin.resume().await.unwrap().is_some());
    })
    .await;
    assert_eq!(taken, 1, "the report is taken once, and not lost");
    pin.unpin().await.unwrap();
    kept.close().await;
    rig.assert_nothing_left(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_calls_given_up_at_once_cost_nobody_a_session() {
    let rig = Rig::start().await;
    for _ in 0..2000 {
        polled(rig.session.stat("data", "file"), 1, Drop::AtOnce).await;
    }
    rig.assert_nothing_left(0).await;
}

/// Of a client that resets its calls: all of that arrives before the server has begun any of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hundreds_of_calls_reset_at_once_cost_nobody_a_connection() {
    let host = Host::start();
    let address = host.endpoint.strip_prefix("http://").unwrap().to_owned();
    let mut connection = TcpStream::connect(address).await.unwrap();
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    frame(&mut sent, SETTINGS, 0, 0, &[]);
    for call in 0..500 {
        frame(&mut sent, HEADERS, END_HEADERS, 2 * call + 1, &stat_headers());
        frame(&mut sent, RST_STREAM, 0, 2 * call + 1, &CANCEL);
    }
    frame(&mut sent, PING, 0, 0, &[7; 8]);
    connection.write_all(&sent).await.unwrap();
    loop {
        let mut head = [0; 9];
        soon(connection.read_exact(&mut head)).await.expect("the connection lives");
        let mut body = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
        soon(connection.read_exact(&mut body)).await.expect("the connection lives");
        assert_ne!(head[3], GOAWAY, "{}", String::from_utf8_lossy(&body));
        if (head[3], head[4], &body[..]) == (PING, ACK, &[7; 8]) {
            break;
        }
    }
}

// RFC 9113, section 6.
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const CANCEL: [u8; 4] = [0, 0, 0, 8];

fn frame(to: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, body: &[u8]) {
    to.extend([0, (body.len() >> 8) as u8, body.len() as u8, kind, flags]);
    to.extend(stream.to_be_bytes());
    to.extend(body);
}

/// HPACK (RFC 7541): indexed fields, and literals with an indexed name.
fn stat_headers() -> Vec<u8> {
    const METHOD_POST: u8 = 0x83;
    const SCHEME_HTTP: u8 = 0x86;
    let mut block = vec![METHOD_POST, SCHEME_HTTP];
    let (authority, path, content_type) = (&[0x01][..], &[0x04][..], &[0x0f, 0x10][..]);
    for (name, value) in [
        (authority, "localhost"),
        (path, "/pinfold.v1.Pinfold/Stat"),
        (content_type, "application/grpc"),
    ] {
        block.extend(name);
        block.push(value.len() as u8);
        block.extend(value.as_bytes());
    }
    block
}
