//! The owner of a fetch: it holds the scheduler, starts a task for each seeder, hands out chunks, looks for more
//! seeders, keeps what is stored durable, and decides when it is over. It never waits for a seeder.

mod admitting;
mod ending;
mod last_words;
mod noting;
mod paying;
mod placing;
mod telling;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, OptionFuture};
use protocol::clock::ClockState;
use protocol::fetching::{Crowd, Loss, Places, Scheduler, SessionTerms};
use protocol::{ChunkSet, PeerAddrs, PeerId, Refusal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use paying::Payees;
use placing::Placed;

use super::buffers::Buffers;
use super::end::EndReason;
use super::incoming::{Pulse, millis};
use super::progress::{LineMeter, Phase, RateMeter, Stall, clock_grace};
use super::session::{Command, Ending, Report, SessionId, SessionTask, Shared, What};
use super::sources::{Added, SourceBook};
use super::{FetchError, FetchJob, StallCause, Stored};
use crate::clock::{now_ms, running_ms};
use crate::content_store::{Content, CreateError, Lacks, SyncError, WriteError, bytes_of};

/// Reports waiting for the coordinator; sessions wait at this bound. It takes them in batches, without waiting itself.
const REPORTS: usize = 256;
/// Commands waiting for a session; further ones are given to others. A session is asked for chunks again only when it
/// reported some, so a handful is usual.
const COMMANDS: usize = 32;
/// A seeder that holds nothing of what is missing is asked again whether it does at this interval, milliseconds.
const NEWS_EVERY_MS: u64 = 5_000;
/// Searches for more seeders are at most so many times rarer than at first.
const RAREST_DISCOVERY: u32 = 16;

/// A session's task as the coordinator sees it.
struct Handle {
    number: u64,
    commands: mpsc::Sender<Command>,
    close: CancellationToken,
    pulse: Arc<Pulse>,
    /// What it holds, once it welcomed us, and its budget.
    welcome: Option<(ChunkSet, u32)>,
    /// When it was last without debts or gave a chunk, by [`running_ms`].
    served_at: u64,
}

pub(super) struct Coordinator {
    job: FetchJob,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    book: SourceBook,
    content: Option<Arc<Content>>,
    wanted: ChunkSet,
    contents: watch::Sender<Option<Arc<Content>>>,
    ending: watch::Sender<Ending>,
    sessions: JoinSet<(SessionId, EndReason)>,
    handles: BTreeMap<PeerId, Handle>,
    payees: Payees,
    next_number: u64,
    reports: mpsc::Receiver<Report>,
    to_reports: mpsc::Sender<Report>,
    /// The content's place is being made, or looked through.
    creating: Option<JoinHandle<Result<Placed, CreateError>>>,
    syncing: Option<JoinHandle<Result<(), SyncError>>>,
    /// Streams that are asked to have on paper what they acknowledged, and the chunks that are noted as stored then.
    remembering: Option<(BTreeMap<PeerId, u64>, ChunkSet)>,
    discovery: Option<BoxFuture<'static, Vec<PeerAddrs>>>,
    discovery_due: Instant,
    /// By [`running_ms`].
    discovery_until: u64,
    discovery_rounds: u32,
    /// A search came back without anybody new since the last seeder was lost.
    searched: bool,
    /// Since when several seeders refuse the credential and nobody serves, by [`running_ms`].
    refused_since: Option<u64>,
    fatal: Option<FetchError>,
    started: Instant,
    /// By [`running_ms`].
    progressed_at: u64,
    unsynced: u64,
    /// What an earlier run left is not noted yet.
    found: bool,
    synced_at: Instant,
    new_bytes: u64,
    new_chunks: u32,
    duplicate_bytes: u64,
    adopted_bytes: u64,
    /// Unix milliseconds.
    first_chunk_at: Option<u64>,
    rate: RateMeter,
    /// Bytes of chunks that came, whole or not.
    read: Arc<AtomicU64>,
    line: LineMeter,
    crowd: Crowd,
    /// Those who are asked are so slow that others are looked for.
    slow: bool,
    /// As many there are as `shared.places` has, taken or free.
    places: Places,
    /// By [`running_ms`].
    told_at: u64,
    /// When something is tried next, as it was told last, unix milliseconds.
    told_next: u64,
}

impl Coordinator {
    pub(super) fn new(job: FetchJob) -> Self {
        let limits = &job.limits;
        let terms = SessionTerms {
            network: job.trust.network(),
            delivery: job.delivery,
            manifest: job.manifest,
            seeder: job.keypair.peer_id(),
        };
        let shared = Arc::new(Shared {
            connect: Arc::clone(&job.connect),
            credential: job.credential.clone(),
            terms,
            keypair: job.keypair.clone(),
            trust: Arc::clone(&job.trust),
            revoked: Arc::clone(&job.revoked),
            acks: Arc::clone(&job.acks),
            buffers: Buffers::new(limits.buffer_bytes),
            pacing: limits.own_pacing(),
            places: limits.places(),
            looked_for: Mutex::default(),
            cancel: job.cancel.clone(),
            limits: limits.clone(),
        });
        let (to_reports, reports) = mpsc::channel(REPORTS);
        // Stands in until the manifest says how many chunks there are; nothing is planned before.
        let scheduler = Scheduler::new(1, 1, &ChunkSet::new(), limits.scheduler.clone());
        let mut book = SourceBook::new(clock_grace(&job.trust));
        for banned in &job.banned {
            book.ban(*banned);
        }
        for source in &job.sources {
            book.add(source.clone());
        }
        let now = Instant::now();
        let places = Places::new(limits.first_places(), millis(limits.places_every));
        Coordinator {
            shared,
            scheduler,
            book,
            content: None,
            wanted: ChunkSet::new(),
            contents: watch::Sender::new(None),
            ending: watch::Sender::new(Ending::NotYet),
            sessions: JoinSet::new(),
            handles: BTreeMap::new(),
            payees: Payees::default(),
            next_number: 0,
            reports,
            to_reports,
            creating: None,
            syncing: None,
            remembering: None,
            discovery: None,
            discovery_due: now,
            discovery_until: 0,
            discovery_rounds: 0,
            searched: job.more_sources.is_none(),
            refused_since: None,
            fatal: None,
            started: now,
            progressed_at: running_ms(),
            unsynced: 0,
            found: false,
            synced_at: now,
            new_bytes: 0,
            new_chunks: 0,
            duplicate_bytes: 0,
            adopted_bytes: 0,
            first_chunk_at: None,
            rate: RateMeter::default(),
            read: Arc::default(),
            line: LineMeter::default(),
            crowd: Crowd::new(1),
            slow: false,
            places,
            told_at: 0,
            told_next: 0,
            job,
        }
    }

    /// Returns when everything is durable, with [`Coordinator::settle`] to come, or there is an end of another kind.
    pub(super) async fn run(mut self) -> Result<Stored, FetchError> {
        self.payees = Payees::before(&self.job.acks).await;
        if let Some(content) = self.job.store.get(&self.job.manifest) {
            self.look_through(content);
        }
        let outcome = self.drive().await;
        self.tell(Phase::Finishing, true);
        let outcome = match outcome {
            Ok(()) => self.complete().await,
            Err(error) => {
                self.wind_up(None).await;
                if let Some(content) = self.content.clone()
                    && let Ok(Err(error)) = tokio::task::spawn_blocking(move || content.sync()).await
                {
                    tracing::warn!(%error, "what was fetched last is not noted and may be fetched again");
                }
                Err(error)
            }
        };
        let stalled = match &outcome {
            Err(FetchError::DiskFull { path, needed, lacks }) => {
                Some(StallCause::DiskFull { path: path.clone(), needed: *needed, lacks: *lacks })
            }
            Err(FetchError::NoSource { cause, .. }) => Some(cause.clone()),
            _ => None,
        };
        let report = match outcome {
            Ok(report) => report,
            Err(error) => {
                self.tell(Phase::Done, true);
                if let Some(cause) = stalled {
                    self.job.progress.send_modify(|progress| progress.stalled = Some(Stall { cause, next_try: None }));
                }
                return Err(error);
            }
        };
        Ok(Stored { report, coordinator: Box::new(self) })
    }

    /// Works until everything asked for is verified and written, or there is a reason to stop.
    async fn drive(&mut self) -> Result<(), FetchError> {
        loop {
            let now = running_ms();
            if self.creating.is_some() {
                self.progressed_at = now;
            }
            if let Some(verdict) = self.verdict(now) {
                return verdict;
            }
            self.admit(now);
            self.connect_due(now);
            self.close_stalled(now);
            self.ask_what_is_new(now);
            self.plan(now);
            self.sync_if_due();
            self.search_if_due();
            self.tell(Phase::Fetching, false);
            let wake = self.wake(now);
            tokio::select! {
                () = self.job.cancel.cancelled() => {
                    let total = self.wanted.len();
                    let have = total - self.scheduler_missing();
                    return Err(FetchError::Cancelled { have, total });
                }
                Some(report) = self.reports.recv() => {
                    self.on_report(report);
                    self.on_waiting_reports();
                }
                Some(ended) = self.sessions.join_next() => {
                    // What it reported before it ended comes first.
                    self.on_waiting_reports();
                    self.on_ended(ended);
                }
                Some(created) = OptionFuture::from(self.creating.as_mut()) => {
                    self.creating = None;
                    let Placed { content, adopted } = joined(created)??;
                    self.adopted(content.bytes_of(&adopted));
                    self.attach(content);
                }
                Some(synced) = OptionFuture::from(self.syncing.as_mut()) => {
                    self.syncing = None;
                    match joined(synced)? {
                        Ok(()) => {}
                        Err(SyncError::Removed) => return Err(FetchError::Removed),
                        Err(SyncError::File(error)) => return Err(self.disk_failed(WriteError::Io(error))),
                    }
                }
                Ok(()) = self.job.credential.changed() => {
                    // Those who refused the one before may take this one. Who did before the content had its place is not in the
                    // scheduler that was made then.
                    let now = running_ms();
                    for peer in self.book.reopen() {
                        self.scheduler.add_source(peer, now);
                        self.scheduler.readmit(&peer, now);
                    }
                }
                Some(found) = OptionFuture::from(self.discovery.as_mut()) => {
                    self.discovery = None;
                    self.on_found(found, running_ms());
                }
                () = tokio::time::sleep(wake) => {}
            }
        }
    }

    fn connect_due(&mut self, now: u64) {
        for peer in self.scheduler.due_connections(now) {
            if !self.handles.contains_key(&peer) {
                self.open_session(peer, false, now);
            }
        }
    }

    fn open_session(&mut self, peer: PeerId, last_word: bool, now: u64) {
        self.next_number += 1;
        let id = SessionId { peer, number: self.next_number };
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let pulse = Pulse { read: Arc::clone(&self.read), ..Pulse::default() };
        let (close, pulse) = (CancellationToken::new(), Arc::new(pulse));
        let task = SessionTask {
            id,
            target: self.book.target(&peer),
            shared: Arc::clone(&self.shared),
            content: self.contents.subscribe(),
            ending: self.ending.subscribe(),
            last_word,
            close: close.clone(),
            commands: receiver,
            reports: self.to_reports.clone(),
            pulse: Arc::clone(&pulse),
        };
        let handle = Handle { number: id.number, commands, close, pulse, welcome: None, served_at: now };
        self.handles.insert(peer, handle);
        self.sessions.spawn(Box::pin(task.run()));
    }

    /// Closes those who owe chunks and send nothing. Bytes that trickle count, for the time that a chunk may take.
    fn close_stalled(&self, now: u64) {
        let stall = self.job.limits.scheduler.stall_ms;
        let slowest = millis(self.job.limits.slowest_chunk);
        for peer in self.scheduler.stalled(now) {
            let Some(handle) = self.handles.get(&peer) else { continue };
            let quiet = now.saturating_sub(handle.pulse.last_byte.load(Ordering::Relaxed));
            if quiet >= stall || now.saturating_sub(handle.served_at) >= slowest {
                handle.close.cancel();
            }
        }
    }

    /// Seeders that are still making their own copy say what they hold only in their welcome. Where all that is missing
    /// is held by nobody, they are greeted again from time to time.
    fn ask_what_is_new(&mut self, now: u64) {
        if !self.holds_nothing() {
            return;
        }
        for handle in self.handles.values_mut().filter(|handle| handle.welcome.is_some()) {
            if now.saturating_sub(handle.served_at) >= NEWS_EVERY_MS {
                handle.served_at = now;
                // Not taken: the next time, then.
                let _ = handle.commands.try_send(Command::GreetAgain);
            }
        }
    }

    /// Is all that is missing held by nobody who serves?
    fn holds_nothing(&self) -> bool {
        self.content.is_some() && self.scheduler.unheld() == *self.scheduler.missing()
    }

    fn plan(&mut self, now: u64) {
        if self.content.is_none() {
            return;
        }
        self.limit_busy(now);
        self.limit_payees(now);
        for (peer, chunks) in self.scheduler.plan(now) {
            let Some(handle) = self.handles.get_mut(&peer) else { continue };
            if !self.payees.ask(peer) {
                self.scheduler.released(&peer, &chunks);
                self.scheduler.set_budget(&peer, 0);
                continue;
            }
            if now.saturating_sub(handle.pulse.last_byte.load(Ordering::Relaxed)) > 1_000 {
                handle.served_at = now.max(handle.served_at);
            }
            if handle.commands.try_send(Command::Want(chunks.clone())).is_err() {
                // It does not listen at the moment, or is about to be reported as ended.
                self.scheduler.released(&peer, &chunks);
                self.scheduler.set_budget(&peer, 0);
            }
        }
    }

    fn on_waiting_reports(&mut self) {
        for _ in 0..REPORTS {
            match self.reports.try_recv() {
                Ok(report) => self.on_report(report),
                Err(_) => return,
            }
        }
    }

    fn on_report(&mut self, Report { id, what }: Report) {
        let now = running_ms();
        // Reports of a stream that was given up are only good for what they say of chunks.
        let current = self.handles.get_mut(&id.peer).filter(|handle| handle.number == id.number);
        match (what, current) {
            (What::Welcomed { held, budget }, Some(handle)) => {
                handle.welcome = Some((held.clone(), budget));
                handle.served_at = now;
                if self.content.is_some() {
                    self.scheduler.connected(&id.peer, held, budget, now);
                }
            }
            (What::Budget(budget), Some(handle)) => {
                if let Some(welcome) = &mut handle.welcome {
                    welcome.1 = budget;
                }
                self.scheduler.set_budget(&id.peer, budget);
            }
            (What::Released { chunks, budget }, Some(_)) => {
                self.scheduler.released(&id.peer, &chunks);
                self.scheduler.set_budget(&id.peer, budget);
            }
            (What::Verified { chunk, bytes, budget }, current) => {
                if let Some(handle) = current {
                    handle.served_at = now;
                    self.scheduler.set_budget(&id.peer, budget);
                }
                self.on_verified(&id.peer, chunk, bytes, now);
            }
            // Nothing is planned yet: what is held by then is found when it is.
            (What::Adopted(chunks), _) if self.content.is_none() => {
                let bytes = self.contents.borrow().as_ref().map_or(0, |content| content.bytes_of(&chunks));
                self.adopted(bytes);
            }
            (What::Adopted(chunks), _) => {
                let own = self.job.keypair.peer_id();
                // Another session may have found some of them, too.
                let new = chunks.iter().filter(|chunk| self.scheduler.verified(&own, *chunk, 0, now).new);
                let new: ChunkSet = new.collect();
                let bytes = self.content.as_ref().map_or(0, |content| content.bytes_of(&new));
                self.adopted(bytes);
                self.progressed_at = now;
            }
            (What::Manifest(manifest), _) => self.create(*manifest),
            (What::Remembered, _) => self.remembered(id),
            (What::Greeted(theirs), _) => {
                self.book.compared(&id.peer, ClockState::compare(now_ms(), theirs, clock_grace(&self.job.trust)));
            }
            (What::Welcomed { .. } | What::Budget(_) | What::Released { .. }, None) => {}
        }
    }

    fn on_verified(&mut self, peer: &PeerId, chunk: u32, bytes: u32, now: u64) {
        let verified = self.scheduler.verified(peer, chunk, bytes, now);
        self.payees.served(*peer);
        self.book.received(peer, bytes, verified.new);
        if verified.new {
            self.new_bytes += u64::from(bytes);
            self.new_chunks += 1;
            self.unsynced += u64::from(bytes);
            self.progressed_at = now;
            self.first_chunk_at.get_or_insert_with(now_ms);
        } else {
            self.duplicate_bytes += u64::from(bytes);
        }
        for other in verified.cancel {
            if let Some(handle) = self.handles.get(&other) {
                // Not taken: the chunk comes twice, no more than that.
                let _ = handle.commands.try_send(Command::Cancel(ChunkSet::from_range(chunk..chunk + 1)));
            }
        }
    }

    fn on_ended(&mut self, ended: Result<(SessionId, EndReason), JoinError>) {
        let Ok((id, reason)) = joined(ended) else { return };
        self.remembered(id);
        if self.handles.get(&id.peer).is_some_and(|handle| handle.number == id.number) {
            self.handles.remove(&id.peer);
            self.payees.ended(&id.peer);
        }
        let loss = self.book.ended(&id.peer, &reason);
        tracing::debug!(seeder = %id.peer, %reason, ?loss, "stream to the seeder ended");
        self.scheduler.lost(&id.peer, loss, running_ms(), rand::random());
        if loss == Loss::Banned {
            tracing::warn!(seeder = %id.peer, %reason, "seeder banned");
        }
        self.searched = self.job.more_sources.is_none();
        match reason {
            EndReason::Disk(error) => self.fatal = Some(self.disk_failed(error)),
            EndReason::Manifest(refusal) => self.fatal = Some(FetchError::Manifest(refusal)),
            _ => {}
        }
    }

    fn disk_failed(&self, error: WriteError) -> FetchError {
        match error {
            WriteError::DiskFull { path, needed } => {
                let lacks = Lacks::at(&path);
                FetchError::DiskFull { path: path.into(), needed, lacks }
            }
            WriteError::Removed => FetchError::Removed,
            WriteError::Io(error) if error.is_disk_full() => {
                let missing = self.scheduler.missing().intersection(&self.wanted);
                let needed = self.content.as_ref().map_or(0, |content| bytes_of(content.manifest(), &missing));
                let lacks = Lacks::at(&error.path);
                FetchError::DiskFull { path: error.path.into(), needed, lacks }
            }
            WriteError::Io(error) => FetchError::File(error),
            other @ (WriteError::Mismatch(_) | WriteError::NoChainingValue(_)) => {
                FetchError::Manifest(Refusal::new(protocol::RefusalCode::Internal, other.to_string()))
            }
        }
    }

    /// Looks for more seeders when those there are do not do.
    fn search_if_due(&mut self) {
        let Some(more) = &self.job.more_sources else { return };
        let needy = self.handles.values().filter(|handle| handle.welcome.is_some()).count() < 2
            || !self.scheduler.unheld().is_empty()
            || self.slow;
        if !needy || self.discovery.is_some() || Instant::now() < self.discovery_due {
            return;
        }
        let rarer = 1u32.checked_shl(self.discovery_rounds).unwrap_or(RAREST_DISCOVERY).min(RAREST_DISCOVERY);
        self.discovery_rounds += 1;
        self.discovery_due = Instant::now() + self.job.limits.discovery_every.saturating_mul(rarer);
        let (search, limit) = (more(), self.job.limits.discovery_timeout);
        self.discovery_until = running_ms().saturating_add(millis(limit));
        let search = async move { tokio::time::timeout(limit, search).await.unwrap_or_default() };
        self.discovery = Some(search.boxed());
    }

    fn on_found(&mut self, found: Vec<PeerAddrs>, now: u64) {
        self.searched = true;
        for target in found {
            let peer = target.peer;
            match self.book.add_found(target, |dead| self.scheduler.forget(dead)) {
                Added::New => self.searched = false,
                // It may have come back, or be found at another address.
                Added::Known => self.scheduler.readmit(&peer, now),
                Added::No => {}
            }
        }
    }

    fn scheduler_missing(&self) -> u32 {
        self.scheduler.missing().intersection(&self.wanted).len()
    }

    fn wake(&self, now: u64) -> Duration {
        // Whatever the machines say: often enough for the timers here, and never in a busy loop.
        let at = self.scheduler.next_wake(now).unwrap_or(u64::MAX);
        Duration::from_millis(at.saturating_sub(now).clamp(10, 250))
    }
}

/// A bug on another thread is a bug of the fetch and must not be swallowed here; the runtime's end is an end.
fn joined<T>(result: Result<T, JoinError>) -> Result<T, FetchError> {
    result.map_err(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(_) => FetchError::Cancelled { have: 0, total: 0 },
    })
}
