//! From the break to the audit record: notices, the fence, the release, the teardown.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pinfold_leases::{
    Break, BreakKind, Description, FenceFailed, FileIdentity, GuardId, GuardTier, Opener,
    waiting_breakers,
};
use pinfold_verbs::with_causes;
use tokio::sync::mpsc;

use super::exports::Served;
use super::{Cut, Engine, FILES_PER_TURN, Inode, PATIENCE, Retired, locked};
use crate::audit::{self, Teardown};
use crate::fence::Order;
use crate::held::HeldFile;
use crate::ladder::{Climbed, Fence};
use crate::passage::Waiting;
use crate::registry::{BreakTimes, Readers, Reason, Record};
use crate::wire;

/// A drain takes a third of lease-break-time, and never longer than this.
const LONGEST_DRAIN: Duration = Duration::from_secs(5);
/// How long their queue pairs may keep a server that goes down.
const LAST_QUEUE_PAIRS: Duration = Duration::from_secs(5);
/// How long the end of the server waits for its state folder.
const STATE_PATIENCE: Duration = Duration::from_secs(2);
/// How soon a fence that could not be completed is tried again.
const FENCE_RETRY_FIRST: Duration = Duration::from_millis(5);
/// … and how late at most.
const FENCE_RETRY_LAST: Duration = Duration::from_millis(100);

impl Engine {
    pub(super) fn handle_break(&self, news: Break) {
        let file = self.file(news.guard);
        let readers = match (&file, news.kind) {
            (Some(file), BreakKind::Reader) => file.readers(&self.lease_break_time),
            _ => Readers::Revoke,
        };
        let times = self.break_times(news.at);
        let actions = self.registry().handle_break(news.guard, news.kind, readers, &times);
        if let Some(file) = &file {
            self.close_if_going(file);
            tell_of_reader(file, readers);
        }
        self.perform(actions);
        if let Some(file) = file {
            self.look_for_breakers(&file);
        }
    }

    /// Once all is under way: who is it? As far as there is time to look. Where the fence falls at once
    /// there is none: this thread would only take the processor from those that cut the file off.
    fn look_for_breakers(&self, file: &HeldFile) {
        let began = Instant::now();
        if !self.registry().has_time(file.id()) || !locked(&self.looks).are_free(began) {
            return;
        }
        file.note_breakers(waiting_breakers(file.description().identity()));
        let now = Instant::now();
        locked(&self.looks).took(now - began, now);
    }

    fn break_times(&self, at: Instant) -> BreakTimes {
        BreakTimes { at, now: Instant::now(), budget: self.break_budget() }
    }

    /// Before anybody is told: from the break on no stream write enters the kernel.
    pub(super) fn close_if_going(&self, file: &HeldFile) {
        if self.registry().is_going(file.id()) {
            file.gate().close();
        }
    }

    /// Looks what became of a reader that was left to the kernel, when it is time.
    fn look_at_reader(&self, guard: GuardId) {
        if !self.registry().reader_is_due(guard, Instant::now()) {
            return;
        }
        let Some(file) = self.file(guard) else { return };
        let state = file.state();
        let times = self.break_times(Instant::now());
        let actions = self.registry().reader_looked_at(guard, state, &times);
        self.close_if_going(&file);
        let (path, guard) = (file.path().display(), file.tier());
        match actions.is_empty() {
            true => tracing::info!(%path, %guard, "readers pass"),
            false => tracing::warn!(%path, %guard, "a reader is still held up: revoking"),
        }
        self.perform(actions);
    }

    /// How long clients may drain now.
    pub(super) fn break_budget(&self) -> Duration {
        drain_budget(self.lease_break_time.read().unwrap_or_else(|error| {
            // Not to know is to assume the shortest.
            tracing::error!(error = with_causes(&error), "fencing at once");
            Some(Duration::from_secs(1))
        }))
    }

    /// The fence thread's work, for one file: fence, release, and hand the rest on.
    pub(super) fn fence(&self, guard: GuardId) {
        self.look_at_reader(guard);
        let Some(by) = self.registry().fence_due(guard, Instant::now()) else { return };
        let Some(file) = self.file(guard) else { return };
        if file.gate().close() > 0 {
            // The last one out orders the fence; who waits for the file waits until the deadline.
            match by {
                None => return,
                Some(by) if Instant::now() < by => return self.order(Order::At(guard, by)),
                Some(_) => {}
            }
        }
        let late_stream_writes = file.gate().cut();
        // Not to know is to assume the shortest.
        let limit = || self.lease_break_time.read().unwrap_or(Some(Duration::ZERO));
        let fenced = match self.ladder.climb(&file, limit) {
            Climbed::Done(Ok(fenced)) => fenced,
            Climbed::Done(Err(error)) => return self.fence_again(&file, &error),
            Climbed::UnderWay => return,
            Climbed::Late { look_at, hangs, news } => {
                return self.fence_is_late(&file, look_at, hangs, news);
            }
            Climbed::Slow { look_at, steps } => return self.fence_is_slow(&file, look_at, steps),
            Climbed::RegionsHang { news } => return self.regions_hang(&file, news),
        };
        if !file.cutting().was_held() {
            // No commit that ends later succeeds.
            self.registry().fenced(guard, Instant::now());
        }
        let fenced = match self.ladder.before_release(&file, fenced, limit) {
            Fence::Complete(fenced) => fenced,
            Fence::RegionsFirst { release_by } => return self.order(Order::At(guard, release_by)),
        };
        if late_stream_writes > 0 {
            // Before the file can be guarded again: they may land at any time until they are out.
            self.leave_behind(&file);
            let path = file.path().display();
            tracing::error!(%path, late_stream_writes, "released with stream writes inside");
        }
        let cut = Cut { file, fenced, late_stream_writes };
        match cut.file.tier() {
            // Nobody waits for a seal in the kernel, and to lift it is to write to its file system,
            // which may be frozen: not here, where other files wait.
            GuardTier::Sealed => drop(self.unseals.send(cut)),
            _ => self.let_go(cut),
        }
    }

    /// The release, and whatever comes of it.
    pub(super) fn let_go(&self, Cut { file, fenced, late_stream_writes }: Cut) {
        let guard = file.id();
        let description = file.description();
        let times = description.times();
        self.lives.leaving(description.identity());
        let waiting = self.await_visit(&file);
        if waiting == Waiting::Unseen {
            // The process that the release lets in may open the file before the next line.
            self.begin_passage(description, times.changed_ns, waiting);
        }
        let Some(released) = file.release(fenced) else { return };
        // Before it can be guarded again.
        let unwritten = file.flushes().have_failed();
        let modified = times.modified_ns.filter(|_| !released.lapsed && !unwritten);
        self.lives.let_go(description.identity(), modified);
        let now = Instant::now();
        let limit = self.lease_break_time.read().unwrap_or_default();
        if released.broken.is_some() && waiting == Waiting::Seen {
            self.begin_passage(description, times.changed_ns, waiting);
        }
        if released.lapsed {
            // The kernel has let a process through already: it need not come back.
            locked(&self.passages).visited(description.identity(), now);
        }
        // Nobody sees it let go before its clients have been told why: the answer to another call
        // would come before that. Only notices come out of this, which take no other lock for long.
        let record = {
            let mut registry = self.registry();
            let (actions, record) =
                registry.released(guard, now, |waited| still_pending(&released, waited, limit));
            self.perform(actions);
            record
        };
        file.announce_release();
        if released.still_sealed {
            let path = file.path().display();
            tracing::error!(%path, "the seal could not be lifted; pinfoldd undeny does it");
        }
        self.retire(&file, record, late_stream_writes);
    }

    /// Somebody was let into a file that had changed last at this time.
    pub(super) fn begin_passage(
        &self,
        description: &Description,
        changed_ns: Option<u64>,
        waiting: Waiting,
    ) {
        let now = Instant::now();
        locked(&self.passages).begin(description.identity(), changed_ns, waiting, now);
    }

    /// Region by region now; if that does not go on either, there is one rung left.
    fn fence_is_late(&self, file: &HeldFile, look_at: Instant, hangs: bool, news: bool) {
        let path = file.path().display();
        match (news, hangs) {
            (false, _) => {}
            (true, true) => tracing::warn!(
                %path,
                "the fence hangs, as it does while a file system is frozen: deregistering region by region"
            ),
            (true, false) => {
                let cost = file.cost().now();
                let expected_ms = cost.time.as_millis() as u64;
                tracing::info!(%path, expected_ms, "the fence takes long: the file has large regions, \
                     or another file's fence comes first");
            }
        }
        self.order(Order::At(file.id(), look_at));
    }

    fn fence_is_slow(&self, file: &HeldFile, look_at: Instant, steps: usize) {
        let (path, left) = (file.path().display(), file.regions_left());
        tracing::info!(%path, steps, regions_left = left, "the fence is slow, and goes on");
        self.order(Order::At(file.id(), look_at));
    }

    /// Each time: a session may have connected another queue pair since the last try.
    fn regions_hang(&self, file: &HeldFile, news: bool) {
        if news {
            tracing::error!(
                path = %file.path().display(),
                "regions hang too: destroying the queue pairs; whoever wants the file waits for the thaw"
            );
        }
        self.sever_sessions_on(file);
    }

    /// On another thread, which ends only with the engine: this one waits for no device.
    fn sever_sessions_on(&self, file: &HeldFile) {
        for session in self.registry().sessions_on(file.id()) {
            self.cut_off(session);
        }
    }

    /// Something still reaches the file: a region that is being registered at this moment, and will
    /// be dropped as soon as that is done, or one that the device refuses to deregister. For the
    /// second case the queue pairs go too, which is as good a barrier, and the next try finds the
    /// regions again.
    pub(super) fn fence_again(&self, file: &HeldFile, error: &FenceFailed) {
        let tries = file.count_fence_failure();
        if tries == 1 {
            let error = with_causes(error);
            tracing::warn!(path = %file.path().display(), error, "a fence is not complete yet");
        }
        if file.has_failed_segments() {
            self.sever_sessions_on(file);
        }
        let pause = FENCE_RETRY_FIRST * 2_u32.saturating_pow(tries.min(8));
        let at = Instant::now() + pause.min(FENCE_RETRY_LAST);
        file.cutting().pause(at);
        self.order(Order::At(file.id(), at));
    }

    /// Hands a released file to the thread that takes it down.
    pub(super) fn retire(
        &self,
        file: &Arc<HeldFile>,
        record: Option<Record>,
        late_stream_writes: usize,
    ) {
        let file = Arc::clone(file);
        // The thread ends only with the engine.
        let _ = self.teardowns.send(Retired { file, record, late_stream_writes });
    }

    /// Deregisters and unmaps, and writes the audit record.
    pub(super) fn take_down(&self, Retired { file, record, late_stream_writes }: Retired) {
        let (deregistered, unmapped, failed_regions) = file.tear_down();
        if let Some(record) = record {
            let teardown = Teardown {
                deregistered: deregistered - record.since,
                unmapped: unmapped - record.since,
                failed_regions,
                late_stream_writes,
            };
            let breakers = file.breakers();
            audit::revocation(file.path(), file.tier(), &record, &teardown, &breakers);
            if let Reason::Break(_) = record.reason {
                self.count_break(&file, &breakers);
            }
            // Nobody watches: no error.
            let _ = self.records.send(wire::record(file.path(), &record, &teardown, &breakers));
        }
        self.give_excess_back(&file);
        self.forget(file);
    }

    fn count_break(&self, file: &HeldFile, breakers: &[Opener]) {
        let (identity, now) = (file.description().identity(), Instant::now());
        let mut breaks = locked(&self.breaks);
        if let Some(storm) = breaks.count(identity, file.path(), breakers, now) {
            let (path, breaks, mostly_by) = (storm.path.display(), storm.breaks, storm.mostly_by());
            tracing::warn!(%path, breaks, mostly_by, "taken back again and again: keep it off");
        }
    }

    pub(super) fn forget(&self, file: Arc<HeldFile>) {
        let identity = file.description().identity();
        self.registry().retired(file.id());
        locked(&self.files).remove(&file.id());
        drop(file);
        self.prune(identity);
        self.retired.notify_waiters();
    }

    /// Forgets an inode that nobody uses.
    pub(super) fn prune(&self, identity: FileIdentity) {
        let mut inodes = locked(&self.inodes);
        if inodes.get(&identity).is_some_and(Inode::is_unused) {
            inodes.remove(&identity);
        }
    }

    /// Takes everything back, with the same notices as for a break. Returns when nothing is guarded
    /// any more, or when that takes far too long.
    pub(crate) async fn shut_down(&self) {
        let budget = self.break_budget();
        let (now, guards) = (Instant::now(), self.registry().begin_shut_down());
        for some in guards.chunks(FILES_PER_TURN) {
            for guard in some {
                let taken_back =
                    self.registry().take_back_for(*guard, Reason::Shutdown, now, budget);
                self.perform(taken_back);
            }
            tokio::task::yield_now().await;
        }
        let give_up = tokio::time::Instant::now() + budget + PATIENCE;
        loop {
            let changed = self.retired.notified();
            if self.registry().is_idle() {
                break;
            }
            if tokio::time::timeout_at(give_up, changed).await.is_err() {
                tracing::error!("files are still guarded; the kernel lets go of them now");
                break;
            }
        }
        if self.registry().is_idle() {
            // From here on another server may have them.
            self.exports.values().for_each(Served::unlock);
            // On this thread, which has little else to do: the end asks for no other one.
            self.lives.close(Instant::now() + STATE_PATIENCE);
        }
        self.disconnect_all().await;
    }

    /// Destroys the queue pairs of all sessions, and ends their streams. A write that hangs in a fault holds
    /// up its own session's, and not the end of this server.
    async fn disconnect_all(&self) {
        let sessions = std::mem::take(&mut *locked(&self.sessions));
        let (done, mut all_done) = mpsc::channel(1);
        for parts in sessions.into_values() {
            self.sever(parts, Some(done.clone()));
        }
        drop(done);
        if tokio::time::timeout(LAST_QUEUE_PAIRS, all_done.recv()).await.is_err() {
            tracing::error!("queue pairs hang; they end with this process");
        }
    }
}

fn tell_of_reader(file: &HeldFile, readers: Readers) {
    let path = file.path().display();
    match readers {
        Readers::Revoke => {}
        Readers::Outwait(time) => {
            let seconds = time.as_secs();
            tracing::info!(%path, seconds, "a reader is left to the kernel");
        }
        Readers::CannotOutwait(why) => {
            tracing::warn!(%path, %why, "a reader can't be left to the kernel: revoking");
        }
    }
}

/// A third of the time that the kernel holds a breaker back, at most five seconds; nothing where
/// the kernel waits for one second only.
pub(crate) fn drain_budget(lease_break_time: Option<Duration>) -> Duration {
    match lease_break_time {
        None => LONGEST_DRAIN,
        Some(time) if time <= Duration::from_secs(1) => Duration::ZERO,
        Some(time) => (time / 3).min(LONGEST_DRAIN),
    }
}

/// Whether the kernel still held the breaker back when we let go. A reader's expiry leaves a read
/// lease behind, so for readers the clock decides.
pub(super) fn still_pending(
    released: &pinfold_leases::Released,
    waited: Duration,
    lease_break_time: Option<Duration>,
) -> bool {
    let expired = lease_break_time.is_some_and(|time| waited >= time);
    match released.broken {
        None => false,
        Some(BreakKind::Writer) => !released.lapsed,
        Some(BreakKind::Reader) => !released.lapsed && !expired,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drain_leaves_time_before_the_kernel_lets_go() {
        let budget = |seconds| drain_budget(Some(Duration::from_secs(seconds)));
        assert_eq!(drain_budget(None), Duration::from_secs(5), "the kernel waits for ever");
        assert_eq!(budget(1), Duration::ZERO);
        assert_eq!(budget(3), Duration::from_secs(1));
        assert_eq!(budget(45), Duration::from_secs(5));
        for seconds in 1..100 {
            assert!(budget(seconds) * 2 < Duration::from_secs(seconds), "{seconds}");
        }
    }
}
