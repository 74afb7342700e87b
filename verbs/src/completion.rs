//! The completion queue: how transfers ended, and a channel that wakes a task.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::fs::OFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::device::Device;
use crate::error::Error;
use crate::sys::{self, ffi};

/// How a work request ended (`enum ibv_wc_status`; IBTA 11.6.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum CompletionStatus {
    /// Done. For a WRITE: the peer's device has accepted it. That the data is in memory, only a
    /// READ proves that follows on the same queue pair and completes.
    Success,
    /// The peer refused the key, the bounds or the kind of access.
    RemoteAccess,
    /// The local buffer isn't registered for this.
    LocalProtection,
    /// The local buffer or message has a wrong length.
    LocalLength,
    /// Never tried: an earlier request, or the program, had put the queue pair into the error state.
    Flushed,
    /// The peer didn't answer.
    RetryExceeded,
    /// The peer answered "not ready" too often.
    RnrRetryExceeded,
    /// The peer doesn't take such a request on this queue pair.
    RemoteInvalidRequest,
    /// The peer failed while it carried the request out.
    RemoteOperation,
    /// Refused by the local device at the post, after earlier pieces of the same operation had been
    /// accepted.
    NotPosted,
    /// Another status, with the number of `enum ibv_wc_status`.
    Other(u32),
}

impl CompletionStatus {
    /// The status for a number of `enum ibv_wc_status`.
    #[must_use]
    pub const fn from_raw(status: u32) -> Self {
        use ffi::ibv_wc_status as raw;
        match status {
            raw::IBV_WC_SUCCESS => Self::Success,
            raw::IBV_WC_LOC_LEN_ERR => Self::LocalLength,
            raw::IBV_WC_LOC_PROT_ERR => Self::LocalProtection,
            raw::IBV_WC_WR_FLUSH_ERR => Self::Flushed,
            raw::IBV_WC_REM_INV_REQ_ERR => Self::RemoteInvalidRequest,
            raw::IBV_WC_REM_ACCESS_ERR => Self::RemoteAccess,
            raw::IBV_WC_REM_OP_ERR => Self::RemoteOperation,
            raw::IBV_WC_RETRY_EXC_ERR => Self::RetryExceeded,
            raw::IBV_WC_RNR_RETRY_EXC_ERR => Self::RnrRetryExceeded,
            other => Self::Other(other),
        }
    }

    /// Done.
    #[must_use]
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Success)
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Success => "done",
            Self::RemoteAccess => {
                "the peer refused the access: the key is dead, it does not cover the range or kind of \
                 access, or the memory could not be reached in time"
            }
            Self::LocalProtection => "the local buffer isn't registered for this transfer",
            Self::LocalLength => "the local buffer or message has a wrong length",
            Self::Flushed => "not tried: the connection had failed or was shut down before",
            Self::RetryExceeded => "the peer doesn't answer: it or the network is down",
            Self::RnrRetryExceeded => "the peer said \"not ready\" too often",
            Self::RemoteInvalidRequest => "the peer doesn't take such requests on this connection",
            Self::RemoteOperation => "the peer failed to carry it out",
            Self::NotPosted => "the local device refused a part of the operation",
            Self::Other(status) => return write!(f, "completion status {status} (ibv_wc_status)"),
        })
    }
}

/// The end of one work request (`struct ibv_wc`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct WorkCompletion {
    /// The number that the request was posted with (`wr_id`).
    pub id: u64,
    /// How it ended.
    pub status: CompletionStatus,
    /// The vendor's own code for an error.
    pub vendor_error: u32,
}

impl WorkCompletion {
    fn from_raw(raw: &ffi::ibv_wc) -> Self {
        Self {
            id: raw.wr_id,
            status: CompletionStatus::from_raw(raw.status),
            vendor_error: raw.vendor_err,
        }
    }
}

/// Completions taken from the device at a time.
const BATCH: usize = 16;

/// A completion queue with its completion channel (`ibv_create_cq(3)`,
/// `ibv_create_comp_channel(3)`). Clones share it.
///
/// A [`Lane`](crate::Lane) makes its own; a target makes one for its queue pairs, on which nothing
/// ever arrives, since one-sided transfers leave no trace at the target.
#[derive(Clone)]
pub struct CompletionQueue(Arc<Inner>);

struct Inner {
    queue: NonNull<ffi::ibv_cq>,
    channel: Channel,
    /// An event was asked for and has not been taken yet. So there is never more than one.
    armed: AtomicBool,
    /// Made at the first wait, because it needs the runtime that will do the waiting.
    readiness: OnceLock<AsyncFd<ChannelFd>>,
    /// Held by who makes it.
    making_readiness: Mutex<()>,
}

// SAFETY: verbs may be called on one queue from any thread and from several at a time; the rest is
// `Send` and `Sync` by itself.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl CompletionQueue {
    /// Creates a queue with room for that many completions. It must never overflow: give it at
    /// least the sum of the send depths of the queue pairs that use it.
    ///
    /// # Errors
    ///
    /// [`Error::CreateCompletionChannel`], [`Error::CreateCompletionQueue`].
    pub fn new(device: &Device, entries: u32) -> Result<Self, Error> {
        let channel = Channel::new(device)?;
        let failed =
            |source| Error::CreateCompletionQueue { device: device.device_name(), entries, source };
        let count = i32::try_from(entries.max(1))
            .map_err(|_| failed(io::Error::from_raw_os_error(libc::EINVAL)))?;
        sys::pass("ibv_create_cq").map_err(failed)?;
        // SAFETY: the context and the channel are live, and the queue keeps them so; vector 0 is
        // there on every device.
        let queue = unsafe {
            ffi::ibv_create_cq(
                device.context().as_ptr(),
                count,
                ptr::null_mut(),
                channel.raw.as_ptr(),
                0,
            )
        };
        let queue = sys::check_pointer(queue).map_err(failed)?;
        Ok(Self(Arc::new(Inner {
            queue,
            channel,
            armed: AtomicBool::new(false),
            readiness: OnceLock::new(),
            making_readiness: Mutex::new(()),
        })))
    }

    /// Takes up to `out.len()` completions (at most 16 at a time) without waiting, and returns how
    /// many.
    ///
    /// # Errors
    ///
    /// [`Error::PollCompletionQueue`]: the queue is of no use any more.
    pub fn poll(&self, out: &mut [WorkCompletion]) -> Result<usize, Error> {
        let room = out.len();
        let mut free = out.iter_mut();
        self.take(room, |completion| {
            if let Some(place) = free.next() {
                *place = completion;
            }
        })
    }

    /// Takes all completions that are there.
    pub(crate) fn drain(&self, mut each: impl FnMut(WorkCompletion)) -> Result<(), Error> {
        while self.take(BATCH, &mut each)? == BATCH {}
        Ok(())
    }

    /// Takes up to `room` completions, at most [`BATCH`], and returns how many.
    fn take(&self, room: usize, each: impl FnMut(WorkCompletion)) -> Result<usize, Error> {
        let mut raw = [const { MaybeUninit::<ffi::ibv_wc>::uninit() }; BATCH];
        let (first, room) = (raw.as_mut_ptr().cast(), room.min(BATCH));
        // SAFETY: the queue is live, and `raw` has room for `room` entries, which is no more than 16.
        let taken = unsafe { ffi::ibv_poll_cq(self.0.queue.as_ptr(), room as i32, first) };
        let taken = usize::try_from(taken).map_err(|_| Error::PollCompletionQueue {
            device: self.device().device_name(),
            source: io::Error::last_os_error(),
        })?;
        // SAFETY: the device has filled in so many, no more than there is room for.
        let taken = unsafe { std::slice::from_raw_parts(first.cast_const(), taken.min(room)) };
        taken.iter().map(WorkCompletion::from_raw).for_each(each);
        Ok(taken.len())
    }

    /// Asks for an event at the next completion (`ibv_req_notify_cq(3)`), and says whether that was
    /// necessary: not while an earlier one is out. What arrived before may give none: if it was, poll
    /// once more, and only then wait.
    pub(crate) fn arm(&self) -> Result<bool, Error> {
        if self.0.armed.swap(true, Ordering::AcqRel) {
            return Ok(false);
        }
        let armed = sys::pass("ibv_req_notify_cq").and_then(|()| {
            // SAFETY: the queue is live.
            sys::check(unsafe { ffi::ibv_req_notify_cq(self.0.queue.as_ptr(), 0) })
        });
        if let Err(source) = armed {
            self.0.armed.store(false, Ordering::Release);
            let device = self.device().device_name();
            return Err(Error::ArmCompletionQueue { device, source });
        }
        Ok(true)
    }

    /// Takes the event of a queue that was armed; if there is none yet, has the task woken when it
    /// comes. Of several tasks the last that polls is woken. May be ready without a completion: arm
    /// again.
    pub(crate) fn poll_event(&self, context: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let readiness = self.readiness()?;
        loop {
            let mut ready = ready!(readiness.poll_read_ready(context))
                .map_err(|source| self.cannot_await(source))?;
            let taken = self.0.take_event().map_err(|source| self.cannot_await(source))?;
            // There is but one, so nothing is left to be ready for.
            ready.clear_ready();
            if taken {
                self.0.armed.store(false, Ordering::Release);
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn readiness(&self) -> Result<&AsyncFd<ChannelFd>, Error> {
        if let Some(readiness) = self.0.readiness.get() {
            return Ok(readiness);
        }
        let _making = self.0.making_readiness.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(readiness) = self.0.readiness.get() {
            return Ok(readiness);
        }
        tokio::runtime::Handle::try_current().map_err(|_| Error::NoRuntime)?;
        let fd = ChannelFd(self.0.channel.descriptor());
        // SAFETY: the channel's descriptor is open and stays the same until the channel is
        // destroyed, before which `Inner::drop` drops this.
        let made = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
            .map_err(|refused| self.cannot_await(refused.into()))?;
        Ok(self.0.readiness.get_or_init(|| made))
    }

    fn cannot_await(&self, source: io::Error) -> Error {
        Error::AwaitCompletion { device: self.device().device_name(), source }
    }

    pub(crate) fn device(&self) -> &Device {
        &self.0.channel.device
    }

    pub(crate) fn as_raw(&self) -> NonNull<ffi::ibv_cq> {
        self.0.queue
    }
}

impl fmt::Debug for CompletionQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompletionQueue").field("device", self.device()).finish_non_exhaustive()
    }
}

impl Inner {
    /// Takes one event from the channel and acknowledges it; false when there is none.
    fn take_event(&self) -> io::Result<bool> {
        let mut queue = ptr::null_mut();
        let mut context = ptr::null_mut();
        loop {
            // SAFETY: the channel is live and non-blocking, and both pointers may be written.
            let ret = unsafe {
                ffi::ibv_get_cq_event(self.channel.raw.as_ptr(), &raw mut queue, &raw mut context)
            };
            if ret == 0 {
                break;
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::WouldBlock => return Ok(false),
                io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            }
        }
        // SAFETY: one event of this queue (the only one of the channel) was taken just now.
        // `ibv_destroy_cq` waits for this, so no event is ever left without it.
        unsafe { ffi::ibv_ack_cq_events(self.queue.as_ptr(), 1) };
        Ok(true)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The descriptor leaves the runtime before the channel closes it.
        drop(self.readiness.take());
        let destroyed = sys::destroy("ibv_destroy_cq", || {
            // SAFETY: the queue is live, no queue pair uses it any more (they hold clones), and all
            // events are acknowledged.
            unsafe { ffi::ibv_destroy_cq(self.queue.as_ptr()) }
        });
        if let Err(error) = destroyed {
            let device = self.channel.device.name();
            tracing::error!(device, %error, "cannot destroy a completion queue; it is leaked");
            self.channel.leaked = true;
        }
    }
}

/// The channel, destroyed after its queue.
struct Channel {
    raw: NonNull<ffi::ibv_comp_channel>,
    device: Device,
    leaked: bool,
}

impl Channel {
    fn new(device: &Device) -> Result<Self, Error> {
        let failed =
            |source| Error::CreateCompletionChannel { device: device.device_name(), source };
        sys::pass("ibv_create_comp_channel").map_err(failed)?;
        // SAFETY: the context is open, and the channel keeps it so.
        let raw = unsafe { ffi::ibv_create_comp_channel(device.context().as_ptr()) };
        let raw = sys::check_pointer(raw).map_err(failed)?;
        let channel = Self { raw, device: device.clone(), leaked: false };

        // SAFETY: the channel, and with it the descriptor, lives until the end of this function.
        let fd = unsafe { BorrowedFd::borrow_raw(channel.descriptor()) };
        let flags = rustix::fs::fcntl_getfl(fd).map_err(|errno| failed(errno.into()))?;
        rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
        Ok(channel)
    }

    fn descriptor(&self) -> RawFd {
        // SAFETY: the channel is live, and its descriptor is set once, at creation.
        unsafe { (*self.raw.as_ptr()).fd }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        if self.leaked {
            // The queue still stands on the channel, and both on the context.
            std::mem::forget(self.device.clone());
            return;
        }
        let destroyed = sys::destroy("ibv_destroy_comp_channel", || {
            // SAFETY: the channel is live and its queue is destroyed (or was never made).
            unsafe { ffi::ibv_destroy_comp_channel(self.raw.as_ptr()) }
        });
        if let Err(error) = destroyed {
            let device = self.device.name();
            tracing::error!(device, %error, "cannot destroy a completion channel; it is leaked");
            std::mem::forget(self.device.clone());
        }
    }
}

/// The channel's descriptor, for the runtime. It doesn't close it.
struct ChannelFd(RawFd);

impl AsRawFd for ChannelFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_of_the_header_are_told_apart() {
        use CompletionStatus as S;
        let known = [
            (0, S::Success),
            (1, S::LocalLength),
            (4, S::LocalProtection),
            (5, S::Flushed),
            (9, S::RemoteInvalidRequest),
            (10, S::RemoteAccess),
            (11, S::RemoteOperation),
            (12, S::RetryExceeded),
            (13, S::RnrRetryExceeded),
            (21, S::Other(21)),
            (u32::MAX, S::Other(u32::MAX)),
        ];
        for (raw, status) in known {
            assert_eq!(S::from_raw(raw), status);
            assert_eq!(status.is_success(), raw == 0);
        }
    }

    #[test]
    fn a_status_says_what_it_means() {
        assert!(CompletionStatus::RemoteAccess.to_string().contains("key is dead"));
        assert!(CompletionStatus::Other(21).to_string().contains("21"));
    }
}
