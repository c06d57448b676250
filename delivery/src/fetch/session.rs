//! The conversation with one seeder, from dialling to its last word. Bytes are verified and written on blocking
//! threads, a few chunks at a time; only what came back from there is acknowledged.

mod acknowledging;
mod ending;
mod metadata;

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use node::{FrameError, OpenError, Stream, write_message};
use protocol::certificate::SeederCert;
use protocol::deliver::{ClientMessage, Credential};
use protocol::fetching::{Session, SessionEvent, SessionTerms};
use protocol::manifest::{Manifest, SEGMENT_CHUNKS};
use protocol::receipt::{Ack, Completion};
use protocol::trust::{RevocationState, Trust};
use protocol::{ChunkSet, Keypair, PeerAddrs, PeerId, Signed};
use tokio::io::WriteHalf;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::FetchLimits;
use super::acks::AckStore;
use super::buffers::{Buffer, Buffers};
use super::connect::Connect;
use super::end::{EndReason, is_about_credential};
use super::incoming::{self, Incoming, Pulse};
use super::route;
use crate::clock::now_ms;
use crate::content_store::{Content, WriteError};
use crate::pace::Pacing;

/// Chunks of one seeder that are being verified and written at once: one hashes while another waits for the disk.
const WRITING: usize = 3;
/// Chunks read ahead of that; the reader waits at this bound.
const READ_AHEAD: usize = 1;

/// A window that is used up may open again by an acknowledgement that is on its way.
const SPENT_GRACE: Duration = Duration::from_secs(1);
/// For the last word to a seeder that has ended the delivery: it listens a little longer.
const LAST_ACK: Duration = Duration::from_secs(2);

/// To open a stream to a seeder to whose addresses there is no route.
const WITHOUT_ROUTE: Duration = Duration::from_millis(500);

/// What all sessions of a fetch share.
pub(super) struct Shared {
    pub(super) connect: Arc<dyn Connect>,
    pub(super) credential: watch::Receiver<Credential>,
    pub(super) terms: SessionTerms,
    pub(super) keypair: Keypair,
    pub(super) trust: Arc<Trust>,
    pub(super) revoked: Arc<RevocationState>,
    pub(super) acks: Arc<dyn AckStore>,
    pub(super) limits: FetchLimits,
    pub(super) buffers: Buffers,
    pub(super) pacing: Pacing,
    pub(super) places: Arc<Semaphore>,
    pub(super) looked_for: Mutex<ChunkSet>,
    pub(super) cancel: CancellationToken,
}

impl Shared {
    /// Those of `claims` that nobody looked for on disk yet; whoever asks does it.
    pub(super) fn to_look_for(&self, claims: &ChunkSet) -> ChunkSet {
        let mut looked_for = self.looked_for.lock().unwrap_or_else(PoisonError::into_inner);
        let claims = claims.difference(&looked_for);
        *looked_for = looked_for.union(&claims);
        claims
    }

    /// Is this an acknowledgement of this delivery?
    pub(super) fn is_ours(&self, ack: &Signed<Ack>, seeder: &PeerId) -> bool {
        let SessionTerms { network, delivery, manifest, .. } = &self.terms;
        Ack::check(ack, &self.keypair.peer_id(), network, *delivery, manifest, seeder).is_ok()
    }
}

/// A stream to a seeder; the number tells a later one from those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SessionId {
    pub(super) peer: PeerId,
    pub(super) number: u64,
}

/// From the coordinator.
#[derive(Debug)]
pub(super) enum Command {
    Want(ChunkSet),
    Cancel(ChunkSet),
    /// End the stream, to open another: what the seeder holds may have changed.
    GreetAgain,
    /// Acknowledge what is verified so far, and have that on paper: [`What::Remembered`] is the answer.
    Remember,
}

/// How the fetch ends, once it does.
#[derive(Clone, Debug, Default)]
pub(super) enum Ending {
    #[default]
    NotYet,
    Finish(Option<Signed<Completion>>),
}

/// To the coordinator.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) id: SessionId,
    pub(super) what: What,
}

#[derive(Debug)]
pub(super) enum What {
    /// The seeder's clock, unix milliseconds.
    Greeted(u64),
    Welcomed {
        held: ChunkSet,
        budget: u32,
    },
    Budget(u32),
    Manifest(Box<(Signed<Manifest>, Manifest)>),
    Verified {
        chunk: u32,
        bytes: u32,
        budget: u32,
    },
    /// Acknowledged to this seeder before a crash, and found on disk.
    Adopted(ChunkSet),
    /// After [`Command::Remember`].
    Remembered,
    /// These will not come after all.
    Released {
        chunks: ChunkSet,
        budget: u32,
    },
}

/// A stream's task.
pub(super) struct SessionTask {
    pub(super) id: SessionId,
    pub(super) target: PeerAddrs,
    pub(super) shared: Arc<Shared>,
    pub(super) content: watch::Receiver<Option<Arc<Content>>>,
    pub(super) ending: watch::Receiver<Ending>,
    /// Opened at the end of the fetch, to give the seeder its last acknowledgement and for nothing else.
    pub(super) last_word: bool,
    pub(super) close: CancellationToken,
    pub(super) commands: mpsc::Receiver<Command>,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) pulse: Arc<Pulse>,
}

impl SessionTask {
    /// Talks until the end, whatever it is.
    pub(super) async fn run(mut self) -> (SessionId, EndReason) {
        let id = self.id;
        (id, self.talk().await)
    }

    async fn talk(&mut self) -> EndReason {
        let (close, mut ending) = (self.close.clone(), self.ending.clone());
        let opened = tokio::select! {
            opened = self.open() => opened,
            () = close.cancelled() => return EndReason::Silent,
            _ = ended(&mut ending), if !self.last_word => return EndReason::Stopped,
        };
        let (stream, before, _place) = match opened {
            Ok(opened) => opened,
            Err(reason) => return reason,
        };
        let (reader, writer) = tokio::io::split(stream);
        let (to, mut from) = mpsc::channel(READ_AHEAD);
        let shared = &self.shared;
        let reading =
            incoming::read_all(reader, shared.buffers.clone(), shared.pacing.clone(), Arc::clone(&self.pulse), to);
        let mut talk = Conversation::new(self, writer, before);
        let reason = {
            let talking = Box::pin(talk.run(&mut from, &mut self.commands, ending));
            tokio::select! {
                reason = talking => reason,
                never = reading => match never {},
                () = close.cancelled() => EndReason::Silent,
            }
        };
        talk.settle(reason).await
    }

    async fn open(&self) -> Result<(Stream, Option<Signed<Ack>>, tokio::sync::OwnedSemaphorePermit), EndReason> {
        let before = self.remembered_ack().await;
        let stream = self.dial().await?;
        // Not before it answers: those that are gone would hold the places of those that are there.
        let places = Arc::clone(&self.shared.places);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            return Ok((stream, before, place));
        }
        // A seeder waits a few seconds for the first word, and the place may take longer: there is a stream again when there is
        // something to say on it.
        drop(stream);
        self.pulse.queues.store(true, Ordering::Relaxed);
        // Closed by nobody; should it be, the fetch is over.
        let place = places.acquire_owned().await.map_err(|_| EndReason::Stopped)?;
        self.pulse.queues.store(false, Ordering::Relaxed);
        Ok((self.dial().await?, before, place))
    }

    async fn dial(&self) -> Result<Stream, EndReason> {
        // It is tried all the same: there may be a connection, or an address that only the node knows.
        let (no_route, limit) = (route::is_missing(&self.target), self.shared.limits.open_timeout);
        let limit = if no_route { limit.min(WITHOUT_ROUTE) } else { limit };
        self.pulse.wait_for(limit);
        let stream = match self.shared.connect.open(self.target.clone(), limit).await {
            Ok(stream) => stream,
            Err(OpenError::Stopped) => return Err(EndReason::Stopped),
            Err(relayed @ OpenError::RelayedOnly { .. }) => return Err(EndReason::RelayedOnly(relayed.to_string())),
            Err(_) if no_route => {
                let why = "this machine has no route to any of its addresses";
                return Err(EndReason::Unreachable(why.to_owned()));
            }
            Err(other) => {
                self.pulse.wait_for(route::PROBE);
                let target = self.target.clone();
                let answers = tokio::task::spawn_blocking(move || route::answers(&target)).await.unwrap_or(false);
                let why = other.to_string();
                return Err(if answers { EndReason::NotRunning(why) } else { EndReason::Unreachable(why) });
            }
        };
        if stream.peer() != self.id.peer {
            return Err(EndReason::Unreachable(format!("another peer answers there ({})", stream.peer())));
        }
        Ok(stream)
    }

    /// The newest acknowledgement to this seeder, if it is really one of this delivery.
    async fn remembered_ack(&self) -> Option<Signed<Ack>> {
        let (acks, peer) = (Arc::clone(&self.shared.acks), self.id.peer);
        let ack = tokio::task::spawn_blocking(move || acks.load(&peer)).await.ok().flatten()?;
        self.shared.is_ours(&ack, &peer).then_some(ack)
    }
}

/// A chunk that went through verification and the disk.
struct Written {
    chunk: u32,
    bytes: u32,
    result: Result<bool, WriteError>,
}

struct Conversation {
    id: SessionId,
    shared: Arc<Shared>,
    machine: Session,
    writer: WriteHalf<Stream>,
    reports: mpsc::Sender<Report>,
    pulse: Arc<Pulse>,
    contents: watch::Receiver<Option<Arc<Content>>>,
    content: Option<Arc<Content>>,
    writing: FuturesUnordered<JoinHandle<Written>>,
    /// Metadata asked for and not yet here; `None` is the manifest.
    asked: BTreeSet<Option<u32>>,
    asked_at: Instant,
    /// Segments that are known to be here.
    segments: BTreeSet<u32>,
    last_ack: Option<Signed<Ack>>,
    unsaved: bool,
    saving: Option<JoinHandle<()>>,
    first: bool,
    last_word: bool,
}

impl Conversation {
    fn new(task: &SessionTask, writer: WriteHalf<Stream>, before: Option<Signed<Ack>>) -> Self {
        let terms = SessionTerms { seeder: task.id.peer, ..task.shared.terms.clone() };
        let peeked = before.as_ref().and_then(|ack| ack.peek().ok());
        Conversation {
            id: task.id,
            shared: Arc::clone(&task.shared),
            machine: Session::new(terms, peeked.as_ref()),
            writer,
            reports: task.reports.clone(),
            pulse: Arc::clone(&task.pulse),
            contents: task.content.clone(),
            content: None,
            writing: FuturesUnordered::new(),
            asked: BTreeSet::new(),
            asked_at: Instant::now(),
            segments: BTreeSet::new(),
            last_ack: before,
            unsaved: false,
            saving: None,
            first: true,
            last_word: task.last_word,
        }
    }

    async fn run(
        &mut self,
        from: &mut mpsc::Receiver<Incoming>,
        commands: &mut mpsc::Receiver<Command>,
        mut ending: watch::Receiver<Ending>,
    ) -> EndReason {
        let serving = async {
            match self.last_word {
                true => self.greet(from).await?,
                false => tokio::select! {
                    greeted = self.greet(from) => greeted?,
                    _ = ended(&mut ending) => return Err(EndReason::Stopped),
                },
            }
            self.serve(from, commands, &mut ending).await
        };
        match serving.await {
            Ok(never) => match never {},
            Err(reason) => reason,
        }
    }

    /// Certificate, ticket, welcome.
    async fn greet(&mut self, from: &mut mpsc::Receiver<Incoming>) -> Result<(), EndReason> {
        let SessionEvent::Greeted { certificate, now } = self.next_event(from).await.map_err(before_greeting)? else {
            return Err(EndReason::Violation("the seeder did not begin with a greeting".to_owned()));
        };
        let Shared { trust, revoked, .. } = &*self.shared;
        SeederCert::check(&certificate, &self.id.peer, trust, revoked, now_ms()).map_err(EndReason::Certificate)?;
        let transaction = self.shared.terms.delivery.transaction;
        let credential = self.shared.credential.borrow().clone();
        let skew = i128::from(now) - i128::from(now_ms());
        tracing::info!(step = 9, %transaction, seeder = %self.id.peer, credential = credential.kind(),
            skew_ms = %skew, "transaction data shown to the seeder");
        if !self.last_word {
            self.report(What::Greeted(now)).await?;
        }
        let hello = self.machine.hello(credential, self.last_ack.clone());
        self.say(&hello).await?;
        let SessionEvent::Welcomed { held, ack } = self.next_event(from).await? else {
            return Err(EndReason::Violation("the seeder did not answer with a welcome".to_owned()));
        };
        // Lost here in a power cut, or with a home that came back from a copy.
        if let Some(ack) = ack {
            self.remember(ack).await;
        }
        if self.last_word {
            return Ok(());
        }
        self.attach();
        match self.content.clone() {
            Some(content) => self.adopt(content).await?,
            None => self.ask(None).await?,
        }
        self.report(What::Welcomed { held, budget: self.budget() }).await
    }

    /// What was acknowledged is not sent again beyond the window. So before anything is asked for, look whether it is on
    /// disk although a crash kept it from being noted. What this client remembers was looked for already; the seeder may
    /// remember more, where the power was cut here.
    async fn adopt(&mut self, content: Arc<Content>) -> Result<(), EndReason> {
        let claims = self.shared.to_look_for(self.machine.acked());
        if claims.is_empty() {
            return Ok(());
        }
        let cancel = self.shared.cancel.clone();
        let adopted = blocking(move || content.adopt_while(&claims, &|| !cancel.is_cancelled())).await??;
        match adopted.is_empty() {
            true => Ok(()),
            false => self.report(What::Adopted(adopted)).await,
        }
    }

    async fn next_event(&mut self, from: &mut mpsc::Receiver<Incoming>) -> Result<SessionEvent, EndReason> {
        let limit = self.shared.limits.message_timeout;
        self.pulse.wait_for(limit);
        match tokio::time::timeout(limit, from.recv()).await {
            Err(_) => Err(EndReason::Silent),
            Ok(Some(Incoming::Message(message))) => {
                match self.machine.message(message, &self.shared.keypair.peer_id())? {
                    SessionEvent::Refused(refusal) => Err(EndReason::Refused(refusal)),
                    event => Ok(event),
                }
            }
            Ok(Some(Incoming::Chunk { .. })) => Err(EndReason::Violation("a chunk before its welcome".to_owned())),
            Ok(Some(Incoming::Closed(why))) => Err(EndReason::Closed(why)),
            Ok(None) => Err(EndReason::Closed("the stream ended".to_owned())),
        }
    }

    /// Takes notice of the content as soon as the coordinator has it.
    fn attach(&mut self) {
        if self.content.is_none() {
            self.content = self.contents.borrow_and_update().clone();
            if let Some(content) = &self.content {
                self.pulse.longest_chunk.store(content.manifest().chunk_len(0), Ordering::Relaxed);
            }
        }
    }

    async fn serve(
        &mut self,
        from: &mut mpsc::Receiver<Incoming>,
        commands: &mut mpsc::Receiver<Command>,
        ending: &mut watch::Receiver<Ending>,
    ) -> Result<std::convert::Infallible, EndReason> {
        let mut spent_since = self.machine.is_spent().then(Instant::now);
        loop {
            let spent_due = spent_since.unwrap_or_else(Instant::now) + SPENT_GRACE;
            let meta_due = self.asked_at + Duration::from_millis(self.shared.limits.scheduler.stall_ms);
            tokio::select! {
                completion = ended(ending) => return self.finish(completion, from).await,
                Some(command) = commands.recv() => self.command(command).await?,
                Some(written) = self.writing.next() => self.written(written).await?,
                incoming = from.recv(), if self.writing.len() < WRITING => match incoming {
                    Some(incoming) => self.incoming(incoming).await?,
                    None => return Err(EndReason::Closed("the stream ended".to_owned())),
                },
                () = tokio::time::sleep_until(meta_due), if !self.asked.is_empty() => return Err(EndReason::Silent),
                () = tokio::time::sleep_until(spent_due), if spent_since.is_some() => {
                    return Err(EndReason::WindowUsedUp);
                }
            }
            if self.machine.ack_due() {
                self.acknowledge().await?;
            }
            spent_since = self.machine.is_spent().then(|| spent_since.unwrap_or_else(Instant::now));
        }
    }

    async fn command(&mut self, command: Command) -> Result<(), EndReason> {
        match command {
            Command::Cancel(chunks) => match self.machine.cancel(&chunks) {
                Some(message) => self.say(&message).await,
                None => Ok(()),
            },
            Command::Want(chunks) => self.want(chunks).await,
            Command::GreetAgain => Err(EndReason::GreetAgain),
            Command::Remember => {
                if self.machine.is_open() {
                    self.acknowledge().await?;
                }
                self.save_last().await;
                self.report(What::Remembered).await
            }
        }
    }

    async fn want(&mut self, chunks: ChunkSet) -> Result<(), EndReason> {
        self.attach();
        let mut asked = ChunkSet::new();
        let budget = self.budget();
        for chunk in chunks.iter().take(budget as usize) {
            if self.prepare(chunk / SEGMENT_CHUNKS).await? {
                asked.insert(chunk);
            }
        }
        let (message, scattered) = self.machine.want(&asked);
        if let Some(message) = message {
            self.say(&message).await?;
        } else if !scattered.is_empty() && self.machine.in_flight().is_empty() && self.writing.is_empty() {
            return Err(EndReason::Scattered);
        }
        let left = chunks.difference(&asked).union(&scattered);
        if left.is_empty() {
            return Ok(());
        }
        // What was left out for being scattered would be left out again at once.
        let budget = if scattered.is_empty() { self.budget() } else { 0 };
        self.report(What::Released { chunks: left, budget }).await
    }

    async fn incoming(&mut self, incoming: Incoming) -> Result<(), EndReason> {
        let (message, buffer) = match incoming {
            Incoming::Message(message) => (message, None),
            Incoming::Chunk { index, length, buffer } => {
                (protocol::deliver::SeederMessage::Chunk { index, length }, Some(buffer))
            }
            Incoming::Closed(why) => return Err(EndReason::Closed(why)),
        };
        match (self.machine.message(message, &self.shared.keypair.peer_id())?, buffer) {
            (SessionEvent::Refused(refusal), _) => Err(EndReason::Refused(refusal)),
            (SessionEvent::Window, _) => self.report(What::Budget(self.budget())).await,
            (SessionEvent::Cancelled { chunks }, _) => {
                self.report(What::Released { chunks, budget: self.budget() }).await
            }
            (SessionEvent::Manifest(signed), _) => self.manifest(*signed).await,
            (SessionEvent::Segment { index, segment }, _) => self.segment(index, segment).await,
            (SessionEvent::Chunk { index, length }, Some(buffer)) => self.chunk(index, length, buffer),
            _ => Err(EndReason::Violation("a message that does not belong here".to_owned())),
        }
    }

    fn chunk(&mut self, chunk: u32, bytes: u32, mut buffer: Buffer) -> Result<(), EndReason> {
        let Some(content) = self.content.clone() else {
            return Err(EndReason::Violation("a chunk before it was asked for".to_owned()));
        };
        // Verified right where the bytes are warm in the cache, then written.
        self.writing.push(tokio::task::spawn_blocking(move || {
            let result = content.write_verified_chunk(chunk, buffer.bytes_mut());
            Written { chunk, bytes, result }
        }));
        Ok(())
    }

    async fn written(&mut self, written: Result<Written, tokio::task::JoinError>) -> Result<(), EndReason> {
        let Written { chunk, bytes, result } = written.map_err(|error| EndReason::Closed(error.to_string()))?;
        match result {
            Ok(_) => {}
            Err(WriteError::Mismatch(chunk)) => return Err(EndReason::BadChunk(chunk)),
            Err(error @ WriteError::NoChainingValue(_)) => return Err(EndReason::Violation(error.to_string())),
            Err(error) => return Err(EndReason::Disk(error)),
        }
        if std::mem::take(&mut self.first) {
            let transaction = self.shared.terms.delivery.transaction;
            tracing::info!(step = 11, %transaction, seeder = %self.id.peer, chunk, "first chunk of the product verified");
        }
        self.machine.verified(chunk);
        self.report(What::Verified { chunk, bytes, budget: self.budget() }).await
    }

    fn budget(&self) -> u32 {
        self.machine.budget()
    }

    async fn report(&mut self, what: What) -> Result<(), EndReason> {
        self.reports.send(Report { id: self.id, what }).await.map_err(|_| EndReason::Stopped)
    }

    async fn say(&mut self, message: &ClientMessage) -> Result<(), EndReason> {
        match tokio::time::timeout(self.shared.limits.message_timeout, write_message(&mut self.writer, message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(FrameError::Io(error))) => Err(EndReason::Closed(format!("the connection broke: {error}"))),
            Ok(Err(error)) => Err(EndReason::Closed(error.to_string())),
            Err(_) => Err(EndReason::Silent),
        }
    }
}

/// Who has not seen the credential yet has nothing to say of it: it may be nobody at all whose word that is.
fn before_greeting(reason: EndReason) -> EndReason {
    match reason {
        EndReason::Refused(refusal) if is_about_credential(refusal.code) => {
            EndReason::Violation(format!("it refused what it had not been shown: {refusal}"))
        }
        other => other,
    }
}

/// Waits until the fetch ends; gives the completion, if there is one.
async fn ended(ending: &mut watch::Receiver<Ending>) -> Option<Signed<Completion>> {
    match ending.wait_for(|ending| !matches!(ending, Ending::NotYet)).await.as_deref() {
        Ok(Ending::Finish(completion)) => completion.clone(),
        // The coordinator is gone without a word.
        Ok(Ending::NotYet) | Err(_) => None,
    }
}

/// Runs on a blocking thread. A panic there ends only this stream.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, EndReason> {
    tokio::task::spawn_blocking(work).await.map_err(|error| EndReason::Closed(error.to_string()))
}
