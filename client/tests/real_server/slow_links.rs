//! Slow and long links: a client that sends is alive, and its drains end in time.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pinfold_client::{
    ConnectOptions, Error, IfExists, PinRequest, RdmaDevice, RevocationReason, Session,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::host::{Host, soon, until};

const MIB: usize = 1 << 20;
/// What goes over the link at a time.
const CHUNK: usize = 2048;
/// Of each socket of the link: what is on its way waits at the client.
const SOCKET_BYTES: u32 = 16 << 10;

/// One direction of a link, shared by all connections over it.
struct Wire {
    bytes_per_second: f64,
    delay: Duration,
    free_at: Mutex<Instant>,
}

impl Wire {
    fn new(megabits: f64, delay: Duration) -> Arc<Self> {
        let free_at = Mutex::new(Instant::now());
        Arc::new(Self { bytes_per_second: megabits * 1e6 / 8.0, delay, free_at })
    }

    /// Waits for its turn and for as long as so many bytes take; says when they are there.
    async fn carry(&self, bytes: usize) -> Instant {
        let done = {
            let mut free_at = self.free_at.lock().unwrap();
            let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
            *free_at = (*free_at).max(Instant::now()) + takes;
            *free_at
        };
        sleep_until(done).await;
        done + self.delay
    }
}

async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin + Send + 'static,
    wire: Arc<Wire>,
) {
    let (sender, mut arriving) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
    tokio::spawn(async move {
        while let Some((at, bytes)) = arriving.recv().await {
            sleep_until(at).await;
            if to.write_all(&bytes).await.is_err() {
                return;
            }
        }
        // The other side may have gone first.
        let _ = to.shutdown().await;
    });
    let mut bytes = vec![0; CHUNK];
    while let Ok(len @ 1..) = from.read(&mut bytes).await {
        let at = wire.carry(len).await;
        if sender.send((at, bytes[..len].to_vec())).is_err() {
            return;
        }
    }
}

/// A link to the host; says how to reach it.
async fn link(host: &Host, megabits: f64, delay: Duration) -> ConnectOptions {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(SOCKET_BYTES).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(16).unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let server = host.endpoint.strip_prefix("http://").unwrap().parse().unwrap();
    let (up, down) = (Wire::new(megabits, delay), Wire::new(megabits, delay));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(SOCKET_BYTES).unwrap();
            let server: TcpStream = socket.connect(server).await.unwrap();
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::spawn(pump(from_client, to_server, up.clone()));
            tokio::spawn(pump(from_server, to_client, down.clone()));
        }
    });
    ConnectOptions::new(endpoint).rdma_device(RdmaDevice::None)
}

/// Puts a file over the link, and then has it taken back in the middle of another write.
async fn put_and_drain(megabits: f64, delay: Duration, bytes: usize) {
    let host = Host::start();
    let session = Session::connect(link(&host, megabits, delay).await).await.unwrap();
    session.create("data", "file", bytes as u64, IfExists::Fail).await.unwrap();
    let pin = session.pin(PinRequest::read_write("data", "file")).await.unwrap();
    let mut buffer = session.buffer(bytes).await.unwrap();
    buffer.as_mut_slice().fill(7);
    let begin = std::time::Instant::now();
    let (mut buffer, report) = soon(pin.write(0, buffer, bytes)).await.expect("put");
    println!("{bytes} bytes at {megabits} Mbit/s and {delay:?}: {:?}", begin.elapsed());
    assert_eq!(report.stream_bytes as usize, bytes);
    assert!(session.loss().is_none(), "{:?}", session.loss());

    // The second time a piece of it shall have arrived before the file is wanted.
    buffer.as_mut_slice().fill(8);
    let operator = host.connect().await;
    let look = operator.pin(PinRequest::read("data", "file")).await.unwrap();
    let first_byte = async || {
        let buffer = operator.buffer(1).await.unwrap();
        look.read(0, 1, buffer).await.unwrap().0.as_slice()[0]
    };
    assert_eq!(first_byte().await, 7);
    let revoke = async {
        until("a piece has arrived", async || first_byte().await == 8).await;
        operator.revoke("data", "file").await.unwrap()
    };
    let (written, revoked) =
        soon(async { tokio::join!(pin.write(0, buffer, bytes), revoke) }).await;
    assert_eq!(revoked, 2, "the writer's pin and the operator's own");
    let failed = written.expect_err("it was taken back");
    assert!(
        matches!(failed.error, Error::Draining { .. } | Error::Revoked { .. }),
        "{}",
        failed.error
    );
    until("the pin is revoked", async || matches!(pin.check(), Err(Error::Revoked { .. }))).await;
    let Err(Error::Revoked { revocation, .. }) = pin.check() else { unreachable!() };
    assert_eq!(revocation.reason, RevocationReason::Operator);
    let timings = revocation.timings.unwrap();
    println!("drained after {:?}", timings.drained);
    assert!(timings.drained.is_some(), "the drain ended by the deadline: {timings:?}");
    assert!(session.loss().is_none(), "{:?}", session.loss());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_and_a_drain_at_1_mbit_per_second() {
    // Less than elsewhere: it takes 17 seconds as it is.
    put_and_drain(1.0, Duration::ZERO, 2 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_and_a_drain_at_5_mbit_per_second() {
    put_and_drain(5.0, Duration::ZERO, 8 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_and_a_drain_at_10_mbit_per_second() {
    put_and_drain(10.0, Duration::ZERO, 8 * MIB).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_and_a_drain_with_200_ms_of_delay() {
    put_and_drain(10.0, Duration::from_millis(200), 8 * MIB).await;
}
