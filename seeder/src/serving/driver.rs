//! One delivery stream: the machine of `protocol::serving` decides, this moves the bytes. Reading messages, storing the
//! account, reading chunks ahead and sending go on at the same time; nothing waits for anything that it does not need.
//!
//! At its end, however it comes, the account is stored before the delivery is let go, so that a newer stream begins
//! with what this one really sent.

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use delivery::Content;
use futures::FutureExt;
use futures::future::{BoxFuture, FusedFuture};
use node::{FrameError, Stream, read_message};
use protocol::deliver::{ClientMessage, Grant, SeederMessage};
use protocol::serving::{ServeAccount, ServeAction, ServeMachine};
use protocol::{PeerId, Refusal, RefusalCode};
use store::{Step, StoreError};
use tokio::io::{AsyncRead, AsyncWriteExt, WriteHalf};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::places::{Seat, Turn, read_ahead, superseded_by_newer};
use super::reading::Reading;
use super::sending::{Line, Outgoing, Progress, SendEnd, Way, send};
use super::{LAST_WORD, bad_frame, internal, linger, note_refusal, shutting_down};
use crate::accounts::{self, Standing};
use crate::admission::Warrant;
use crate::chunks::ChunkError;
use crate::clock::now_ms;
use crate::context::Seeder;
use crate::tables::AccountKey;

/// Messages from the client that wait for the machine: it is fast, and at 12 KiB each they are 192 KiB at most.
const MESSAGES: usize = 16;
/// For the last acknowledgement of a client whose delivery is cut off: it verifies and writes what has just come first.
const LAST_ACK: Duration = Duration::from_secs(3);

/// A client that was told that a chunk is not held after all may come back for the others so soon, milliseconds.
const OTHER_CHUNKS_MS: u64 = 1_000;

/// What a driver is made of.
pub(super) struct Parts {
    pub(super) seeder: Arc<Seeder>,
    pub(super) peer: PeerId,
    pub(super) grant: Grant,
    pub(super) warrant: Warrant,
    pub(super) content: Arc<Content>,
    pub(super) key: AccountKey,
    /// How far the delivery was when this stream came.
    pub(super) before: Standing,
    pub(super) machine: ServeMachine,
    pub(super) turn: Turn,
    pub(super) seat: Seat,
}

/// One delivery stream.
pub(super) struct Driver {
    parts: Parts,
    reading: Arc<Reading>,
    /// Chunks that the machine counts as sent.
    drawn: u32,
    began: bool,
    /// Chunks were asked for.
    wanted: bool,
    /// The client said its last word.
    finishing: bool,
}

/// How a stream ended.
enum End {
    /// Everything asked for is said and durable.
    Finished,
    /// By name.
    Refused(Refusal),
    /// By name, and through no fault of the client: it may still acknowledge what it has.
    Cut(Refusal),
    /// The client went away.
    Gone,
}

type Persisting = Option<BoxFuture<'static, Result<(), StoreError>>>;
type Listening<'a> =
    (Pin<&'a mut (dyn FusedFuture<Output = ()> + Send)>, &'a mut mpsc::Receiver<Result<ClientMessage, FrameError>>);
type Sending<'a> = Pin<&'a mut (dyn FusedFuture<Output = Result<WriteHalf<Stream>, SendEnd>> + Send)>;

impl Driver {
    pub(super) fn new(parts: Parts) -> Self {
        let reading = Arc::new(Reading::new(&parts.seeder, parts.peer, Arc::clone(&parts.content)));
        Driver { parts, reading, drawn: 0, began: false, wanted: false, finishing: false }
    }

    /// Serves until the end.
    pub(super) async fn run(mut self, stream: Stream) {
        self.parts.seeder.drain.is_here(&self.parts.key);
        let (mut reader, writer) = tokio::io::split(stream);
        let ahead = read_ahead(self.parts.content.manifest().chunk_size);
        let (outgoing, queue) = mpsc::channel(ahead);
        let progress = Progress::default();
        let counts = self.parts.seeder.counts.clone();
        let limit = Duration::from_millis(self.parts.seeder.config.write_ms);
        let upload = Line::new(&self.parts.seeder.upload, self.parts.peer);
        let way = Way { reading: Arc::clone(&self.reading), upload, limit };
        let mut sending = Box::pin(send(writer, queue, &progress, &counts, &way).fuse());
        let (end, said) = self.converse(&mut reader, &outgoing, sending.as_mut(), &progress).await;

        progress.cut.store(true, Ordering::Release);
        let unsent = self.drawn.saturating_sub(progress.begun.load(Ordering::Acquire));
        let brought = self.close(unsent).await.is_past(&self.parts.before);
        self.parts.seeder.drain.ended(self.parts.key, brought);
        // A line that is dead looks like a client that takes or says nothing.
        if matches!(&end, End::Gone) || matches!(&end, End::Refused(why) if why.code == RefusalCode::Idle) {
            self.parts.seeder.drain.broke(self.parts.key, Instant::now());
        }
        let Driver { parts: Parts { seeder, peer, grant, turn, seat, .. }, .. } = self;
        // The newer stream need not wait for the last words of this one.
        let seat = turn.end(seat);
        let without_seat = seat.is_none().then(|| seeder.deliveries.last_word());

        let transaction = grant.delivery.transaction;
        let gone = matches!(end, End::Gone);
        let last = match end {
            End::Finished => Some(SeederMessage::Finished),
            End::Gone => None,
            End::Refused(refusal) | End::Cut(refusal) => {
                note_refusal(&seeder, peer, Some(transaction), &refusal);
                (!said).then_some(SeederMessage::Refusal(refusal))
            }
        };
        let farewell = async {
            if gone || sending.is_terminated() || matches!(without_seat, Some(None)) {
                return;
            }
            // The queue may be full of chunks that are passed over now; sending goes on meanwhile.
            let say = async move {
                let sent = match last {
                    Some(message) => outgoing.send(Outgoing::Message(message)).await,
                    None => Ok(()),
                };
                drop(outgoing);
                sent
            };
            let (_, sent) = futures::join!(say, sending.as_mut());
            let Ok(mut writer) = sent else { return };
            if writer.shutdown().await.is_ok() {
                linger(&seeder, &mut reader).await;
            }
        };
        // A client that does not take the last word goes without it.
        let _ = tokio::time::timeout(LAST_WORD, farewell).await;
        drop(seat);
        tracing::debug!(%peer, transaction = %transaction, "delivery stream ended");
    }

    /// The conversation, up to its end; true where its last word is on its way already.
    async fn converse<R: AsyncRead + Unpin + Send>(
        &mut self,
        reader: &mut R,
        outgoing: &mpsc::Sender<Outgoing>,
        mut sending: Sending<'_>,
        progress: &Progress,
    ) -> (End, bool) {
        let (heard, mut messages) = mpsc::channel(MESSAGES);
        let mut listening = Box::pin(listen(reader, heard).fuse());
        let end = self.talk((listening.as_mut(), &mut messages), outgoing, sending.as_mut(), progress).await;
        match end {
            End::Cut(refusal) => {
                progress.cut.store(true, Ordering::Release);
                let said = self.last_ack(&refusal, (listening.as_mut(), &mut messages), outgoing, sending).await;
                (End::Cut(refusal), said)
            }
            end => (end, false),
        }
    }

    /// A client whose delivery is cut off may have verified more than it acknowledged, which is what this seeder is paid by.
    /// It is told why, and has a moment for its last word. True when it was told.
    async fn last_ack(
        &mut self,
        refusal: &Refusal,
        (mut listening, messages): Listening<'_>,
        outgoing: &mpsc::Sender<Outgoing>,
        mut sending: Sending<'_>,
    ) -> bool {
        let stop = self.parts.seeder.supervisor.token();
        let superseded = self.parts.turn.superseded.clone();
        let deadline = Instant::now() + LAST_ACK;
        // The queue may be full of chunks that are passed over now.
        let mut telling = Box::pin(outgoing.send(Outgoing::Message(SeederMessage::Refusal(refusal.clone()))).fuse());
        let mut told = false;
        loop {
            tokio::select! {
                sent = &mut telling, if !telling.is_terminated() => told = sent.is_ok(),
                _ = sending.as_mut(), if !sending.is_terminated() => return told,
                () = listening.as_mut(), if !listening.is_terminated() => {}
                message = messages.recv() => match message {
                    Some(Ok(message @ (ClientMessage::Ack(_) | ClientMessage::Finish { .. }))) => {
                        let last = matches!(message, ClientMessage::Finish { .. });
                        // What does not hold is not taken: there is nothing left to refuse it by.
                        if self.parts.machine.message(message, now_ms()).is_err() || last {
                            return told;
                        }
                    }
                    // Under way before it heard.
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => return told,
                },
                () = superseded.cancelled() => return told,
                () = stop.cancelled() => return told,
                () = tokio::time::sleep_until(deadline) => return told,
            }
        }
    }

    async fn talk(
        &mut self,
        (mut listening, messages): Listening<'_>,
        outgoing: &mpsc::Sender<Outgoing>,
        mut sending: Sending<'_>,
        progress: &Progress,
    ) -> End {
        let stop = self.parts.seeder.supervisor.token();
        let superseded = self.parts.turn.superseded.clone();
        let mut changes = self.parts.seeder.network.changes();
        let mut persisting: Persisting = None;
        loop {
            if let Err(refusal) = self.still_allowed() {
                return End::Cut(refusal);
            }
            if self.drawn > progress.sent.load(Ordering::Acquire) {
                // A client that does not take what is sent is let go by the sender.
                self.parts.machine.sending(now_ms());
            }
            // The machine is asked only when there is room for what it says.
            let mut room = true;
            loop {
                let Ok(place) = outgoing.try_reserve() else {
                    room = false;
                    break;
                };
                match self.parts.machine.next_action(now_ms()) {
                    None => break,
                    Some(ServeAction::Persist(account)) => persisting = Some(self.persist(account)),
                    Some(ServeAction::Refuse(refusal)) => return End::Refused(refusal),
                    Some(ServeAction::End) => return End::Finished,
                    Some(action) => match self.outgoing(action) {
                        Ok(next) => place.send(next),
                        Err(refusal) => return End::Refused(refusal),
                    },
                }
            }
            let wait = self.parts.machine.deadline().saturating_sub(now_ms()).max(1);
            let deadline = Instant::now() + Duration::from_millis(wait);
            tokio::select! {
                () = superseded.cancelled() => return End::Refused(superseded_by_newer()),
                () = stop.cancelled() => return End::Refused(shutting_down()),
                // The sender of changes lives as long as the seeder.
                _ = changes.changed() => {}
                () = listening.as_mut(), if !listening.is_terminated() => {}
                message = messages.recv(), if !self.finishing => match message {
                    Some(Ok(message)) => {
                        if let Err(refusal) = self.hear(message) {
                            return End::Refused(refusal);
                        }
                    }
                    Some(Err(error)) => return bad_frame(error).map_or(End::Gone, End::Refused),
                    // The client closed its half without a last message.
                    None => return End::Gone,
                },
                stored = async { match persisting.as_mut() { Some(store) => store.await, None => futures::future::pending().await } } => {
                    persisting = None;
                    match stored {
                        Ok(()) => self.parts.machine.persisted(),
                        Err(error) => {
                            self.parts.seeder.supervisor.fail(format!("cannot store a delivery's account: {error}"));
                            return End::Refused(internal());
                        }
                    }
                }
                () = progress.noticed.notified() => {
                    let error = progress.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
                    return End::Cut(self.no_chunk(&error.unwrap_or(ChunkError::Gone)));
                }
                sent = sending.as_mut(), if !sending.is_terminated() => return match sent {
                    // Impossible while the queue is open.
                    Ok(_) | Err(SendEnd::Broken) => End::Gone,
                    Err(SendEnd::CutShort(error)) => End::Refused(self.no_chunk(&error)),
                    Err(SendEnd::Slow) => {
                        End::Refused(Refusal::new(RefusalCode::Idle, "a chunk was not taken in time"))
                    }
                },
                place = outgoing.reserve(), if !room => drop(place),
                () = tokio::time::sleep_until(deadline), if room => {}
            }
        }
    }

    /// A revocation cuts a running delivery: of the key that signed the lease or the manifest, the transaction, the
    /// content, the client or this seeder. So does that none can be heard of for longer than the product allows.
    fn still_allowed(&self) -> Result<(), Refusal> {
        let Parts { seeder, grant, warrant, content, .. } = &self.parts;
        if let Some(trust) = seeder.network.trust() {
            warrant.still_good(&trust, seeder.network.informed(), now_ms())?;
            // A void manifest is shown all the same: a client that knows the new keys sees by it that no other lease helps.
            if self.wanted {
                content.still_good(&trust, now_ms())?;
            }
        }
        let revoked = seeder.network.revoked();
        let no = |what| Err(Refusal::new(RefusalCode::Revoked, what));
        if revoked.has_transaction(&grant.delivery.transaction) {
            return no("this transaction was revoked");
        }
        if revoked.has_moved_on(&grant.delivery.transaction, grant.generation) {
            return no(protocol::ticket::MOVED_ON);
        }
        if revoked.has_peer(&grant.client) {
            return no("this client was revoked");
        }
        if revoked.has_peer(&seeder.peer) {
            // The ticket is as good as it was, and others serve it.
            return Err(Refusal::new(RefusalCode::NotEnrolled, "this seeder's certificate was revoked"));
        }
        if revoked.has_content(&content.manifest().content) {
            return no("this content was taken down");
        }
        if seeder.denied.contains(&content.manifest().content) {
            return Err(Refusal::new(RefusalCode::ContentNotHeld, "this seeder does not hold the content any more"));
        }
        Ok(())
    }

    fn hear(&mut self, message: ClientMessage) -> Result<(), Refusal> {
        self.finishing = matches!(message, ClientMessage::Finish { .. });
        let content = &self.parts.content;
        if matches!(message, ClientMessage::Want { .. }) {
            if !content.is_complete() {
                self.parts.machine.hold(content.have());
            }
            self.wanted = true;
        }
        self.parts.machine.message(message, now_ms())
    }

    fn persist(&self, account: ServeAccount) -> BoxFuture<'static, Result<(), StoreError>> {
        let due = now_ms().saturating_add(self.parts.seeder.config.receipt_interval_ms);
        let step = if account.ack.is_some() { Step::SeederAcknowledged } else { Step::SeederNoted };
        self.save(step, account, due).boxed()
    }

    fn save(
        &self,
        step: Step,
        account: ServeAccount,
        due: u64,
    ) -> impl Future<Output = Result<(), StoreError>> + use<> {
        let Parts { seeder, grant, key, .. } = &self.parts;
        let keep_until = grant.until.saturating_add(seeder.config.account_keep_ms);
        accounts::save(seeder.db.clone(), step, *key, account, grant.manifest, keep_until, due)
    }

    fn outgoing(&mut self, action: ServeAction) -> Result<Outgoing, Refusal> {
        let content = &self.parts.content;
        Ok(match action {
            ServeAction::Say(message) => Outgoing::Message(message),
            ServeAction::SendManifest => Outgoing::Message(SeederMessage::Manifest(content.signed_manifest().clone())),
            ServeAction::SendSegment(index) => Outgoing::Segment(index),
            ServeAction::SendChunk(index) => {
                self.drawn += 1;
                if !self.began {
                    self.began = true;
                    let id = self.parts.grant.delivery.transaction;
                    tracing::info!(step = 11, transaction = %id, peer = %self.parts.peer, "first chunk to client");
                }
                Outgoing::Chunk { index, ahead: self.reading.ahead(index, &self.parts.seeder) }
            }
            // Handled by the caller.
            ServeAction::Persist(_) | ServeAction::Refuse(_) | ServeAction::End => return Err(internal()),
        })
    }

    /// What is said of a chunk that was promised and cannot be sent. The others are still there: the next welcome names them.
    fn no_chunk(&self, error: &ChunkError) -> Refusal {
        let seeder = &self.parts.seeder;
        let come_back = || Refusal::new(RefusalCode::ContentNotHeld, error.to_string()).retry_after(OTHER_CHUNKS_MS);
        match error {
            ChunkError::Damaged(_) => {
                // The manager learns that the content is not whole and has it made whole.
                seeder.wake.sync.notify_one();
                come_back()
            }
            // Mostly because it was taken down a moment ago, or found damaged after it was promised.
            ChunkError::Gone => match self.still_allowed() {
                Err(refusal) => refusal,
                Ok(()) if self.parts.content.is_removed() => {
                    Refusal::new(RefusalCode::ContentNotHeld, error.to_string())
                }
                Ok(()) => come_back(),
            },
            ChunkError::NoSegment => Refusal::new(RefusalCode::ContentNotHeld, error.to_string()),
            ChunkError::Mending(_) => come_back(),
            ChunkError::Disk(reason) => {
                tracing::error!(reason, "cannot read a chunk or its chaining values");
                seeder.notes.storage.set(reason.clone());
                internal()
            }
        }
    }

    /// Stores what this stream did, and tells how far the delivery is. Chunks drawn from the machine and never begun were
    /// not sent.
    async fn close(&self, unsent: u32) -> Standing {
        let mut account = self.parts.machine.closing_account();
        account.noted = account.noted.saturating_sub(unsent);
        let standing = Standing::of(&account);
        if account == ServeAccount::default() {
            return standing;
        }
        let acked = account.ack.is_some();
        if let Err(error) = self.save(Step::SeederClosed, account, now_ms()).await {
            self.parts.seeder.supervisor.fail(format!("cannot store a delivery's account: {error}"));
            return standing;
        }
        if acked {
            let id = self.parts.grant.delivery.transaction;
            tracing::info!(step = 12, transaction = %id, peer = %self.parts.peer, "receipt is due");
        }
        standing
    }
}

/// Reads messages until the stream ends, which ends the channel.
async fn listen<R: AsyncRead + Unpin>(reader: &mut R, heard: mpsc::Sender<Result<ClientMessage, FrameError>>) {
    loop {
        let message = match read_message(reader).await {
            Ok(Some(message)) => Ok(message),
            Ok(None) => return,
            Err(error) => Err(error),
        };
        let last = message.is_err();
        if heard.send(message).await.is_err() || last {
            return;
        }
    }
}
