//! Pins that are kept through revocations and lost sessions.
//!
//! One task per kept pin waits for the pin's end and pins again; the session is shared, and whoever
//! finds it lost connects it again, one at a time.

use std::future::Future;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::backoff::Backoff;
use crate::fabric::LocalDevice;
use crate::file::FileName;
use crate::kept_state::{Gap, KeptState, Stopped, View};
use crate::pin_state::Gone;
use crate::retry::passes;
use crate::{
    Buffer, CommitReport, ConnectOptions, DurableReport, Error, FileChange, FileIdentity,
    FlushReport, Grant, Interruption, InterruptionCause, KeepPolicy, Loss, Part, Pin, PinRequest,
    ReadReport, Reason, Session, TransferError, WriteFate, WriteReport,
};

/// How long a failed call waits for the notice that explains it: the two come on different streams.
const NOTICE_PATIENCE: Duration = Duration::from_secs(5);

/// A session that is opened again when it is lost, for the pins that are kept through it.
///
/// Cheap to clone; all clones are the same. When the last clone and the last of its pins are dropped
/// the session ends.
///
/// ```no_run
/// use pinfold_client::{ConnectOptions, Error, KeepPolicy, KeptSession, PinRequest};
///
/// # async fn example() -> Result<(), Error> {
/// let options = ConnectOptions::new("http://storage:7350");
/// let session = KeptSession::connect(options, KeepPolicy::default()).await?;
/// let pin = session.pin(PinRequest::read_write("data", "log")).await?;
/// let mut buffer = session.buffer(4096).await?; // stays registered when the session is lost
/// loop {
///     match pin.write(0, buffer, 4096).await {
///         Ok((back, _)) => buffer = back,
///         Err(failed) if matches!(failed.error, Error::Interrupted { .. }) => {
///             // Waits until the pin is held again; fails if the file is another one by now.
///             if let Some(interruption) = pin.resume().await? {
///                 println!("to be written again: {:?}", interruption.fate.unknown);
///             }
///             buffer = failed.buffer.expect("the runtime runs");
///             continue;
///         }
///         Err(failed) => return Err(failed.error),
///     }
///     pin.commit().await?;
/// # return Ok(());
/// }
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct KeptSession(Arc<Link>);

#[derive(Debug)]
struct Link {
    options: ConnectOptions,
    policy: KeepPolicy,
    /// Held while connecting.
    line: tokio::sync::Mutex<Line>,
    /// Opened once, so that buffers stay registered.
    device: Mutex<Option<Arc<LocalDevice>>>,
    /// Turns true when the user has closed it.
    closed: watch::Sender<bool>,
}

#[derive(Debug)]
struct Line {
    session: Arc<Session>,
    /// There since the last session was lost: how to go on, and not to try before then.
    failing: Option<(Backoff, Instant)>,
}

/// A pin that is had again when it is taken back, or when its session is lost.
///
/// It hides nothing: from an interruption on every read, write and commit fails with
/// [`Error::Interrupted`], reads too, as what they would return may be of another life of the file.
/// [`resume`](Self::resume) waits until the pin is held again and returns the report of what became
/// of the writes; only then do calls go through again, by the new grant. If the file is another one
/// by then, or shorter than what the pin could reach, or a local process has changed its bytes, calls fail with [`Error::FileChanged`] until
/// [`accept_change`](Self::accept_change).
///
/// Dropping it gives the pin back in the background; [`unpin`](Self::unpin) waits for that.
#[derive(Debug)]
pub struct KeptPin {
    file: FileName,
    state: watch::Sender<State>,
    orders: mpsc::UnboundedSender<Order>,
    keeper: JoinHandle<()>,
}

type State = KeptState<Arc<Pin>>;

/// What the user tells the keeper of a pin that is stopped.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Order {
    TryAgain,
    AcceptChange,
}

/// Waits for the end of a pin, and pins again.
struct Keeper {
    link: Arc<Link>,
    request: PinRequest,
    file: FileName,
    state: watch::Sender<State>,
    orders: mpsc::UnboundedReceiver<Order>,
}

/// An earlier pin, as far as it matters for the next one.
struct Renewal {
    /// To be ended on the server first: its session was lost, and may live on there.
    left: Option<Arc<Pin>>,
    /// What the pin could reach of which file; absent: any file of that name will do.
    needed: Option<(Range<u64>, FileIdentity)>,
    /// What another life of the file means.
    another_life: FileChange,
}

/// How an attempt failed.
enum Missed {
    Changed(FileChange),
    Failed(Error),
    /// For a reason that was over when it was looked at.
    Over(Error),
}

impl KeptSession {
    /// Opens a session. This first attempt is made once; only what is lost later is had again.
    ///
    /// # Errors
    ///
    /// As [`Session::connect`].
    pub async fn connect(options: ConnectOptions, policy: KeepPolicy) -> Result<Self, Error> {
        let session = Arc::new(Session::connect(options.clone()).await?);
        let device = Mutex::new(session.device());
        let line = tokio::sync::Mutex::new(Line { session, failing: None });
        let closed = watch::Sender::new(false);
        Ok(Self(Arc::new(Link { options, policy, line, device, closed })))
    }

    /// Pins a range of a file, and keeps it. This first attempt is made once; only what is taken
    /// back or lost later is had again. Its writes are [tracked](PinRequest::track_writes).
    ///
    /// # Errors
    ///
    /// As [`Session::pin`].
    pub async fn pin(&self, request: PinRequest) -> Result<KeptPin, Error> {
        let request = request.track_writes();
        let pin = Arc::new(self.session().await?.pin(request.clone()).await?);
        Ok(KeptPin::start(self.0.clone(), request, pin))
    }

    /// Allocates a buffer, registered with the device of the first session that had one. It stays
    /// registered when the session is opened again, as the device stays open.
    ///
    /// # Errors
    ///
    /// As [`Session::buffer`].
    pub async fn buffer(&self, capacity: usize) -> Result<Buffer, Error> {
        match self.0.device() {
            Some(device) => device.buffer(capacity).await,
            None => Buffer::plain(capacity),
        }
    }

    /// The session as it is now, for all that has nothing to do with kept pins: to create, stat or
    /// list. If it was lost this makes one attempt to open another, not sooner than the policy says.
    /// Keep it no longer than for a call.
    ///
    /// # Errors
    ///
    /// As [`Session::connect`]; [`Error::SessionLost`] after [`close`](Self::close).
    pub async fn session(&self) -> Result<Arc<Session>, Error> {
        self.0.session().await
    }

    /// Ends the session for good, and waits until the server has ended it too: every key is dead
    /// then. Kept pins stop: their calls fail.
    pub async fn close(self) {
        self.0.closed.send_replace(true);
        let session = self.0.line.lock().await.session.clone();
        session.close_for_all().await;
    }
}

impl Link {
    /// The live session; opens one if there is none, which is tried once.
    async fn session(&self) -> Result<Arc<Session>, Error> {
        let mut closed = self.closed.subscribe();
        tokio::select! {
            biased;
            // The sender is here, so it can't be gone.
            _ = closed.wait_for(|closed| *closed) => Err(self.over(Loss::Closed)),
            session = self.connected() => session,
        }
    }

    async fn connected(&self) -> Result<Arc<Session>, Error> {
        let mut line = self.line.lock().await;
        if line.session.loss().is_none() {
            return Ok(line.session.clone());
        }
        if let Some((_, not_before)) = &line.failing {
            tokio::time::sleep_until(*not_before).await;
        }
        match Session::connect_with(self.options.clone(), self.device()).await {
            Ok(session) => {
                self.keep_device(&session);
                *line = Line { session: Arc::new(session), failing: None };
                Ok(line.session.clone())
            }
            Err(error) => {
                let now = Instant::now();
                let fresh = || (Backoff::endless(self.policy.clone(), now.into_std()), now);
                let (backoff, not_before) = line.failing.get_or_insert_with(fresh);
                *not_before = now + backoff.failed(now.into_std()).unwrap_or_default();
                Err(error)
            }
        }
    }

    fn device(&self) -> Option<Arc<LocalDevice>> {
        lock(&self.device).clone()
    }

    /// The first session may have had none to use.
    fn keep_device(&self, session: &Session) {
        let mut device = lock(&self.device);
        if device.is_none() {
            *device = session.device();
        }
    }

    fn over(&self, loss: Loss) -> Error {
        Error::SessionLost { endpoint: self.options.endpoint.clone(), loss }
    }
}

impl KeptPin {
    fn start(link: Arc<Link>, request: PinRequest, pin: Arc<Pin>) -> Self {
        let file = FileName::new(&request.export, &request.path);
        let state = watch::Sender::new(KeptState::new(pin.clone()));
        let (orders, incoming) = mpsc::unbounded_channel();
        let keeper =
            Keeper { link, request, file: file.clone(), state: state.clone(), orders: incoming };
        Self { file, state, orders, keeper: tokio::spawn(keeper.run(pin)) }
    }

    /// What calls go by now: the grant of the last report that was taken.
    pub fn grant(&self) -> Grant {
        self.usable_pin().grant().clone()
    }

    /// The bytes of the file that can be used by that grant.
    pub fn usable(&self) -> Range<u64> {
        self.usable_pin().usable()
    }

    /// As [`Pin::extend_to`].
    pub fn extend_to(&self, valid_end: u64) {
        self.usable_pin().extend_to(valid_end);
    }

    /// What became of the bytes written by that grant, as far as is known now.
    pub fn write_fate(&self) -> WriteFate {
        self.usable_pin().write_fate().unwrap_or_default()
    }

    /// Says whether a transfer could begin now, and if not why.
    ///
    /// # Errors
    ///
    /// [`Error::Interrupted`] until the report is taken; [`Error::FileChanged`] and
    /// [`Error::GaveUp`] if it is not to be had again.
    pub fn check(&self) -> Result<(), Error> {
        let pin = self.pin()?;
        let gone = pin.cell().check();
        gone.map_err(|gone| self.interrupted_by(gone.into()))
    }

    /// As [`Pin::write`].
    ///
    /// # Errors
    ///
    /// As [`Pin::write`], but those that tell of the end of the pin: they are
    /// [`Error::Interrupted`] here, and as [`check`](Self::check).
    pub async fn write(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.transfer(buffer, async |pin, buffer| pin.write(offset, buffer, len).await).await
    }

    /// As [`Pin::read`].
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), but for [`Error::ReadOnlyPin`] and [`Error::PastEnd`].
    pub async fn read(
        &self,
        offset: u64,
        len: usize,
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        self.transfer(buffer, async |pin, buffer| pin.read(offset, len, buffer).await).await
    }

    /// As [`Pin::write_vectored`].
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write), and [`Error::BadParts`].
    pub async fn write_vectored(
        &self,
        parts: &[Part],
        buffer: Buffer,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.transfer(buffer, async |pin, buffer| pin.write_vectored(parts, buffer).await).await
    }

    /// As [`Pin::read_vectored`].
    ///
    /// # Errors
    ///
    /// As [`write_vectored`](Self::write_vectored), but for [`Error::ReadOnlyPin`].
    pub async fn read_vectored(
        &self,
        parts: &[Part],
        buffer: Buffer,
    ) -> Result<(Buffer, ReadReport), TransferError> {
        self.transfer(buffer, async |pin, buffer| pin.read_vectored(parts, buffer).await).await
    }

    /// As [`Pin::write_visible`].
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write).
    pub async fn write_visible(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, WriteReport), TransferError> {
        self.transfer(buffer, async |pin, buffer| pin.write_visible(offset, buffer, len).await)
            .await
    }

    /// As [`Pin::write_durable`].
    ///
    /// # Errors
    ///
    /// As [`write`](Self::write) and [`commit`](Self::commit).
    pub async fn write_durable(
        &self,
        offset: u64,
        buffer: Buffer,
        len: usize,
    ) -> Result<(Buffer, DurableReport), TransferError> {
        self.transfer(buffer, async |pin, buffer| pin.write_durable(offset, buffer, len).await)
            .await
    }

    /// As [`Pin::fetch_add`].
    ///
    /// # Errors
    ///
    /// As [`Pin::fetch_add`], and [`Error::Interrupted`], as [`check`](Self::check).
    pub async fn fetch_add(&self, offset: u64, number: u64) -> Result<u64, Error> {
        let pin = self.pin()?;
        self.told(&pin, pin.fetch_add(offset, number).await).await
    }

    /// As [`Pin::write_atomic`].
    ///
    /// # Errors
    ///
    /// As [`Pin::write_atomic`], and [`Error::Interrupted`], as [`check`](Self::check).
    pub async fn write_atomic(&self, offset: u64, number: u64) -> Result<(), Error> {
        let pin = self.pin()?;
        self.told(&pin, pin.write_atomic(offset, number).await).await
    }

    /// As [`Pin::compare_swap`].
    ///
    /// # Errors
    ///
    /// As [`fetch_add`](Self::fetch_add).
    pub async fn compare_swap(&self, offset: u64, expected: u64, new: u64) -> Result<u64, Error> {
        let pin = self.pin()?;
        self.told(&pin, pin.compare_swap(offset, expected, new).await).await
    }

    /// As [`Pin::commit`]: of what was written by the present grant.
    ///
    /// # Errors
    ///
    /// As [`Pin::commit`], but those that tell of the end of the pin: they are
    /// [`Error::Interrupted`] here, and as [`check`](Self::check).
    pub async fn commit(&self) -> Result<CommitReport, Error> {
        let pin = self.pin()?;
        self.told(&pin, pin.commit().await).await
    }

    /// As [`Pin::commit_range`].
    ///
    /// # Errors
    ///
    /// As [`commit`](Self::commit), and [`Error::Refused`] for a range that is not pinned.
    pub async fn commit_range(&self, range: Range<u64>) -> Result<CommitReport, Error> {
        let pin = self.pin()?;
        self.told(&pin, pin.commit_range(range).await).await
    }

    /// As [`Pin::flush`].
    ///
    /// # Errors
    ///
    /// As [`commit_range`](Self::commit_range), and [`Error::NoFlush`].
    pub async fn flush(&self, range: Range<u64>) -> Result<FlushReport, Error> {
        let pin = self.pin()?;
        self.told(&pin, pin.flush(range).await).await
    }

    /// What is known of the interruption that has not been taken yet; takes nothing. Absent if there
    /// is none.
    pub fn interruption(&self) -> Option<Interruption> {
        report(&self.state.borrow())
    }

    /// Waits for an interruption, and tells what is known of it when it begins; takes nothing.
    ///
    /// Cancellation-safe.
    pub async fn interrupted(&self) -> Interruption {
        let mut state = self.state.subscribe();
        loop {
            if let Some(interruption) = report(&state.borrow_and_update()) {
                return interruption;
            }
            changed(&mut state).await;
        }
    }

    /// Waits until the pin is held again, takes the report of the interruption, and lets calls go
    /// through again. `None` if there is no interruption, or another task has taken the report.
    ///
    /// Cancellation-safe: the report is returned or still there.
    ///
    /// # Errors
    ///
    /// [`Error::FileChanged`] until [`accept_change`](Self::accept_change), [`Error::GaveUp`] until
    /// [`try_again`](Self::try_again); [`interruption`](Self::interruption) has the report all the
    /// same.
    pub async fn resume(&self) -> Result<Option<Interruption>, Error> {
        let mut state = self.state.subscribe();
        loop {
            let mut taken = None;
            state.mark_unchanged();
            self.state.send_if_modified(|state| {
                taken = state.take();
                taken.is_some()
            });
            if let Some((gap, new)) = taken {
                return Ok(Some(interruption(&gap, Some(&new))));
            }
            match state.borrow().view() {
                View::Held(pin) if pin.cell().check().is_ok() => return Ok(None),
                View::Held(_) | View::Interrupted(..) => {}
                View::Stopped(_, why) => return Err(Error::from_stopped(why, &self.file)),
            }
            changed(&mut state).await;
        }
    }

    /// After [`Error::FileChanged`]: pins what the path names now, in whatever size it has.
    /// [`resume`](Self::resume) waits for that. Without such an error it does nothing.
    pub fn accept_change(&self) {
        self.order(Order::AcceptChange);
    }

    /// After [`Error::GaveUp`]: tries again, with new patience. [`resume`](Self::resume) waits for
    /// that. Without such an error it does nothing.
    pub fn try_again(&self) {
        self.order(Order::TryAgain);
    }

    /// Gives the pin back, and keeps it no longer. When this returns, its keys are dead.
    ///
    /// # Errors
    ///
    /// As [`Pin::unpin`]. A pin that is interrupted is gone already: no error.
    pub async fn unpin(mut self) -> Result<(), Error> {
        self.keeper.abort();
        // Ends with a cancellation, as it was told to; then it has no pin of its own any more.
        let _ = (&mut self.keeper).await;
        let pin = match self.state.borrow().view() {
            View::Held(pin) | View::Interrupted(_, Some(pin)) => pin.clone(),
            View::Interrupted(_, None) | View::Stopped(..) => return Ok(()),
        };
        if pin.cell().check().is_err() {
            return Ok(());
        }
        pin.give_back().await
    }

    /// The order is for the present stop only: one that comes without is forgotten, and so is a
    /// second one.
    fn order(&self, order: Order) {
        let taken = self.state.send_if_modified(|state| {
            let wanted = match state.view() {
                View::Stopped(_, Stopped::Changed(_)) => order == Order::AcceptChange,
                View::Stopped(_, Stopped::GaveUp { .. }) => order == Order::TryAgain,
                View::Held(_) | View::Interrupted(..) => false,
            };
            if wanted {
                state.retry();
            }
            wanted
        });
        if taken {
            // Fails when the runtime shuts down.
            let _ = self.orders.send(order);
        }
    }

    /// The pin for a call.
    fn pin(&self) -> Result<Arc<Pin>, Error> {
        match self.state.borrow().view() {
            View::Held(pin) => Ok(pin.clone()),
            View::Interrupted(gap, _) => Err(self.interrupted_by(gap.cause.clone())),
            View::Stopped(_, why) => Err(Error::from_stopped(why, &self.file)),
        }
    }

    /// The last pin that calls could go by.
    fn usable_pin(&self) -> Arc<Pin> {
        match self.state.borrow().view() {
            View::Held(pin) => pin.clone(),
            View::Interrupted(gap, _) | View::Stopped(gap, _) => gap.old.clone(),
        }
    }

    async fn transfer<T, F>(
        &self,
        buffer: Buffer,
        run: impl FnOnce(Arc<Pin>, Buffer) -> F,
    ) -> Result<T, TransferError>
    where
        F: Future<Output = Result<T, TransferError>>,
    {
        let pin = match self.pin() {
            Ok(pin) => pin,
            Err(error) => return Err(TransferError::new(error, buffer)),
        };
        match run(pin.clone(), buffer).await {
            Ok(done) => Ok(done),
            Err(TransferError { error, buffer }) => {
                Err(TransferError { error: self.explained(&pin, error).await, buffer })
            }
        }
    }

    async fn told<T>(&self, pin: &Pin, done: Result<T, Error>) -> Result<T, Error> {
        match done {
            Ok(done) => Ok(done),
            Err(error) => Err(self.explained(pin, error).await),
        }
    }

    /// What ended the pin is an interruption, whichever way it was noticed first.
    async fn explained(&self, pin: &Pin, error: Error) -> Error {
        let patience = match &error {
            Error::Draining { .. }
            | Error::Revoked { .. }
            | Error::SessionLost { .. }
            | Error::Transport { .. }
            | Error::RemoteRefused { .. } => NOTICE_PATIENCE,
            Error::Refused {
                reason:
                    Some(
                        Reason::FileDraining
                        | Reason::StaleGeneration
                        | Reason::UnknownPin
                        | Reason::UnknownSession
                        | Reason::ShuttingDown,
                    ),
                ..
            } => NOTICE_PATIENCE,
            // A queue pair may have died of the end of the pin.
            Error::LaneLost { .. } => Duration::ZERO,
            _ => return error,
        };
        match tokio::time::timeout(patience, pin.cell().gone()).await {
            Ok(gone) => self.interrupted_by(gone.into()),
            Err(_) => error,
        }
    }

    fn interrupted_by(&self, cause: InterruptionCause) -> Error {
        Error::Interrupted { file: self.file.to_string(), cause: Box::new(cause) }
    }
}

impl Drop for KeptPin {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl Keeper {
    async fn run(mut self, mut pin: Arc<Pin>) {
        loop {
            let gone = pin.cell().gone().await;
            self.state.send_modify(|state| state.interrupt(gone.into()));
            let gone = pin.cell().ended().await;
            tracing::info!(file = %self.file, cause = %InterruptionCause::from(gone.clone()),
                "kept pin interrupted");
            self.state.send_modify(|state| state.explain(gone.clone().into()));
            pin = self.renewed(pin, &gone).await;
            self.state.send_modify(|state| state.renewed(pin.clone()));
        }
    }

    /// Pins again, however long that takes, and whatever the user has to decide about it.
    async fn renewed(&mut self, old: Arc<Pin>, gone: &Gone) -> Arc<Pin> {
        // What the user could reach, which is another pin than the last one if that was not taken.
        let needed = match self.state.borrow().view() {
            View::Held(pin) => pin.usable(),
            View::Interrupted(gap, _) | View::Stopped(gap, _) => gap.old.usable(),
        };
        let identity = old.grant().identity;
        self.request.expect(old.grant());
        let left = matches!(gone, Gone::Lost(_)).then_some(old);
        let another_life = match gone.is_of_write_back() {
            true => FileChange::NotWrittenBack,
            false => FileChange::Modified,
        };
        let mut renewal = Renewal { left, needed: Some((needed, identity)), another_life };
        self.request.no_longer_steal();
        loop {
            let why = match self.try_for_long(&mut renewal).await {
                Ok(pin) => return pin,
                Err(why) => why,
            };
            tracing::warn!(file = %self.file, ?why, "kept pin stopped");
            self.state.send_modify(|state| state.stop(why));
            match self.orders.recv().await {
                Some(Order::TryAgain) => {}
                Some(Order::AcceptChange) => {
                    renewal.needed = None;
                    self.request.expect_any();
                }
                // The pin's handle is gone, and this task in a moment.
                None => std::future::pending().await,
            }
        }
    }

    async fn try_for_long(&self, renewal: &mut Renewal) -> Result<Arc<Pin>, Stopped> {
        let mut backoff = Backoff::new(self.link.policy.clone(), Instant::now().into_std());
        let mut attempts = 0;
        let gave_up = |attempts, error| Stopped::GaveUp { attempts, source: Arc::new(error) };
        let mut last = self.link.over(Loss::StreamEnded);
        loop {
            attempts += 1;
            self.state.send_modify(State::attempt);
            let trying = self.attempt(renewal);
            let tried = match backoff.give_up_at() {
                Some(end) => tokio::time::timeout_at(end.into(), trying).await,
                None => Ok(trying.await),
            };
            let (error, again, connected) = match tried {
                Ok(Ok(pin)) => return Ok(pin),
                Ok(Err((Missed::Changed(change), _))) => return Err(Stopped::Changed(change)),
                Ok(Err((Missed::Failed(error), connected))) => {
                    let again = passes(&error);
                    (error, again, connected)
                }
                Ok(Err((Missed::Over(error), connected))) => (error, true, connected),
                Err(_) => return Err(gave_up(attempts, last)),
            };
            tracing::debug!(file = %self.file, attempts, %error, "kept pin not had yet");
            let closed = *self.link.closed.borrow();
            let delay = backoff.failed(Instant::now().into_std());
            match delay.filter(|_| again && !closed) {
                // The session waits by itself before it connects again.
                Some(delay) if connected => tokio::time::sleep(delay).await,
                Some(_) => {}
                None => return Err(gave_up(attempts, error)),
            }
            last = error;
        }
    }

    /// Tries once; a failure comes with whether there was a session.
    async fn attempt(&self, renewal: &mut Renewal) -> Result<Arc<Pin>, (Missed, bool)> {
        let session = self.link.session().await.map_err(|error| (Missed::Failed(error), false))?;
        let pinned = self.pin_again(&session, renewal).await;
        pinned.map_err(|missed| (missed, true))
    }

    async fn pin_again(
        &self,
        session: &Session,
        renewal: &mut Renewal,
    ) -> Result<Arc<Pin>, Missed> {
        if let Some(left) = &renewal.left {
            let ended = session.core().end_pin_of(left.core(), left.grant().pin_id).await;
            ended.map_err(Missed::Failed)?;
            renewal.left = None;
        }
        let pin = match session.pin(self.request.clone()).await {
            Ok(pin) => pin,
            Err(error) => return Err(self.missed(session, renewal, error).await),
        };
        let Some((needed, _)) = &renewal.needed else { return Ok(Arc::new(pin)) };
        let usable = pin.usable();
        if usable.start <= needed.start && needed.end <= usable.end {
            return Ok(Arc::new(pin));
        }
        Err(Missed::Changed(FileChange::Shrunk { needed: needed.end, size: pin.grant().valid_end }))
    }

    /// Sorts a refusal: that the file is another one, or shorter, is for the user to decide about. The
    /// server may have seen the file in the middle of a change, so it is looked at once more.
    async fn missed(&self, session: &Session, renewal: &Renewal, error: Error) -> Missed {
        let Some((needed, identity)) = &renewal.needed else { return Missed::Failed(error) };
        let doubtful =
            [Reason::FileChanged, Reason::FileModified, Reason::BadRange, Reason::RangePastEnd];
        let Some(reason) = error.reason().filter(|reason| doubtful.contains(reason)) else {
            return Missed::Failed(error);
        };
        match session.stat(&self.request.export, &self.request.path).await {
            Ok(stat) if stat.identity != *identity => Missed::Changed(FileChange::Replaced),
            Ok(stat) if stat.size < needed.end => {
                Missed::Changed(FileChange::Shrunk { needed: needed.end, size: stat.size })
            }
            // That does not pass.
            Ok(_) if reason == Reason::FileModified => Missed::Changed(renewal.another_life),
            Ok(_) => Missed::Over(error),
            Err(error) => Missed::Failed(error),
        }
    }
}

/// The report as it stands.
fn report(state: &State) -> Option<Interruption> {
    match state.view() {
        View::Held(_) => None,
        View::Interrupted(gap, new) => Some(interruption(gap, new)),
        View::Stopped(gap, _) => Some(interruption(gap, None)),
    }
}

fn interruption(gap: &Gap<Arc<Pin>>, new: Option<&Arc<Pin>>) -> Interruption {
    Interruption {
        cause: gap.cause.clone(),
        fate: gap.old.write_fate().unwrap_or_default(),
        old: gap.old.grant().generation,
        new: new.map(|pin| pin.grant().generation),
        attempts: gap.attempts,
        repeats: gap.repeats,
    }
}

/// Waits for a change; the sender lives as long as the pin that waits.
async fn changed(state: &mut watch::Receiver<State>) {
    if state.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Every change is a single step.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
