//! The door for clients: connections without a session are few and get little time, and a process that runs
//! out of descriptors says so and pauses instead of spinning.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Sleep;
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use crate::sync::locked;

/// A connection that has been idle for so long is asked whether its peer is still there (tcp(7)).
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);

/// See [`Limits::newcomers_time`].
const NEWCOMERS_TIME: Duration = Duration::from_secs(30);
/// How long nobody is let in when no descriptor is left.
const PAUSE: Duration = Duration::from_millis(500);

/// How many connections there may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Limits {
    /// In all.
    pub(crate) connections: usize,
    /// Without a session. One more costs the oldest of them its place.
    pub(crate) newcomers: usize,
    /// How long one may be open before a call of a session came by it.
    pub(crate) newcomers_time: Duration,
}

impl Limits {
    /// For so many sessions, in a process that may have so many descriptors open.
    pub(crate) fn new(sessions: usize, descriptors: usize) -> Self {
        // A client has a second connection, for what must not wait behind its bytes.
        let connections = (2 * sessions + 256).min(descriptors / 2);
        let newcomers = (connections / 4).clamp(4, 128);
        Self { connections, newcomers, newcomers_time: NEWCOMERS_TIME }
    }
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Door {
    listener: TcpListener,
    limits: Limits,
    hall: Arc<Hall>,
    pause: Option<Pin<Box<Sleep>>>,
    /// Until somebody is let in again the log has it once.
    told: bool,
}

/// The connections that are open.
#[derive(Debug, Default)]
struct Hall {
    guests: AtomicUsize,
    last: AtomicU64,
    newcomers: Mutex<VecDeque<(u64, oneshot::Sender<()>)>>,
}

impl Hall {
    /// Takes one in; the oldest newcomer goes if there are too many.
    fn take_in(&self, newcomers_at_most: usize) -> (u64, oneshot::Receiver<()>) {
        let number = self.last.fetch_add(1, Ordering::Relaxed);
        let (leave, left) = oneshot::channel();
        let mut newcomers = locked(&self.newcomers);
        newcomers.push_back((number, leave));
        if newcomers.len() > newcomers_at_most {
            // Its sender is dropped, and it leaves.
            newcomers.pop_front();
        }
        (number, left)
    }

    fn settle(&self, number: u64) {
        let mut newcomers = locked(&self.newcomers);
        let Some(at) = newcomers.iter().position(|(known, _)| *known == number) else { return };
        if let Some((_, leave)) = newcomers.remove(at) {
            // It may have gone.
            let _ = leave.send(());
        }
    }
}

/// Names a connection in the calls that come by it.
#[derive(Clone, Debug)]
pub(crate) struct Connection {
    number: u64,
    hall: Arc<Hall>,
    settled: Arc<AtomicBool>,
}

impl Connection {
    /// Whether no call of a session came by it yet.
    pub(crate) fn is_new(&self) -> bool {
        !self.settled.load(Ordering::Relaxed)
    }

    /// A session's call came by it: it may stay.
    pub(crate) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
        self.hall.settle(self.number);
    }
}

/// A connection that was let in.
#[derive(Debug)]
pub(crate) struct Guest {
    stream: TcpStream,
    connection: Connection,
    leash: Option<Leash>,
}

/// Ends a connection that stays without a session.
#[derive(Debug)]
struct Leash {
    /// Told: it may stay; closed: it must leave.
    word: oneshot::Receiver<()>,
    deadline: Pin<Box<Sleep>>,
}

impl Door {
    pub(crate) fn new(listener: TcpListener, limits: Limits) -> Self {
        Self { listener, limits, hall: Arc::default(), pause: None, told: false }
    }

    fn let_in(&mut self, stream: TcpStream) -> Option<Guest> {
        if self.hall.guests.load(Ordering::Relaxed) >= self.limits.connections {
            if !std::mem::replace(&mut self.told, true) {
                let limit = self.limits.connections;
                tracing::warn!(limit, "too many connections: more are refused");
            }
            return None;
        }
        self.told = false;
        // A notice must not wait for the acknowledgement of the message before it.
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection ended at once");
            return None;
        }
        // A host that has vanished says nothing more, and an idle connection of it would stay for ever.
        let kept = rustix::net::sockopt::set_socket_keepalive(&stream, true)
            .and_then(|()| rustix::net::sockopt::set_tcp_keepidle(&stream, KEEPALIVE_AFTER));
        if let Err(error) = kept {
            tracing::debug!(%error, "a connection has no keepalive");
        }
        let (number, word) = self.hall.take_in(self.limits.newcomers);
        self.hall.guests.fetch_add(1, Ordering::Relaxed);
        let deadline = Box::pin(tokio::time::sleep(self.limits.newcomers_time));
        let (hall, settled) = (Arc::clone(&self.hall), Arc::default());
        let connection = Connection { number, hall, settled };
        Some(Guest { stream, connection, leash: Some(Leash { word, deadline }) })
    }

    fn failed(&mut self, error: &io::Error) {
        if !is_exhausted(error) {
            // The client has gone again.
            tracing::debug!(%error, "a connection was not accepted");
            return;
        }
        if !std::mem::replace(&mut self.told, true) {
            tracing::warn!(
                %error,
                "no more connections can be accepted: raise the limit of open files (LimitNOFILE= in \
                 the unit)"
            );
        }
        self.pause = Some(Box::pin(tokio::time::sleep(PAUSE)));
    }
}

/// Whether accept(2) failed for lack of descriptors or memory: at once again it would fail again.
fn is_exhausted(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    exhausted.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

impl Stream for Door {
    type Item = io::Result<Guest>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok((stream, _)) => {
                    if let Some(guest) = self.let_in(stream) {
                        return Poll::Ready(Some(Ok(guest)));
                    }
                }
                Err(error) => self.failed(&error),
            }
        }
    }
}

impl Leash {
    /// Whether it is to leave; pending: not yet.
    fn poll_leave(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        match Pin::new(&mut self.word).poll(cx) {
            Poll::Ready(word) => Poll::Ready(word.is_err()),
            Poll::Pending => self.deadline.as_mut().poll(cx).map(|()| true),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.connection.settle();
        self.connection.hall.guests.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Connected for Guest {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl Guest {
    /// Asked before each read and each write: a peer that reads nothing would keep the connection in its
    /// writes.
    fn check_leash(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(leash) = &mut self.leash else { return Ok(()) };
        match leash.poll_leave(cx) {
            Poll::Ready(true) => {
                let why = "a connection without a session gave way or ran out of time";
                return Err(io::Error::new(io::ErrorKind::TimedOut, why));
            }
            Poll::Ready(false) => self.leash = None,
            Poll::Pending => {}
        }
        Ok(())
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_leash(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_leash(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_leash(cx)?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_leash(cx)?;
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio_stream::StreamExt as _;

    use super::*;

    #[test]
    fn the_oldest_newcomer_gives_way_and_settled_ones_never_do() {
        let hall = Hall::default();
        let (first, mut first_word) = hall.take_in(2);
        hall.settle(first);
        assert_eq!(first_word.try_recv(), Ok(()));
        let (_, mut second) = hall.take_in(2);
        let (_, mut third) = hall.take_in(2);
        assert_eq!(second.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        let (_, _fourth) = hall.take_in(2);
        assert_eq!(second.try_recv(), Err(oneshot::error::TryRecvError::Closed));
        assert_eq!(third.try_recv(), Err(oneshot::error::TryRecvError::Empty));
    }

    #[test]
    fn half_of_the_descriptors_are_for_files() {
        let of = |descriptors| {
            let Limits { connections, newcomers, .. } = Limits::new(1024, descriptors);
            (connections, newcomers)
        };
        assert_eq!(of(65_536), (2304, 128));
        assert_eq!(of(96), (48, 12));
    }

    #[tokio::test]
    async fn time_without_a_session_ends_a_connection_and_a_session_stops_the_clock() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let newcomers_time = Duration::from_millis(1);
        let mut door = Door::new(listener, Limits { connections: 9, newcomers: 9, newcomers_time });
        let mut clients = Vec::new();
        let mut guests = Vec::new();
        for _ in 0..2 {
            clients.push(TcpStream::connect(address).await.unwrap());
            guests.push(door.next().await.unwrap().unwrap());
        }
        let (mut settled, mut idle) = (guests.pop().unwrap(), guests.pop().unwrap());
        settled.connection.settle();
        let ended = idle.read_u8().await.unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::TimedOut);
        // What its client says arrives, however late.
        clients[1].write_u8(7).await.unwrap();
        assert_eq!(settled.read_u8().await.unwrap(), 7);
    }
}
