//! The seeder's end of a delivery as a machine: what may be sent, when it must first be made durable, what an
//! acknowledgement opens, and when to give up. It moves no bytes and keeps no time; `seeder` does both.
//!
//! The account of a delivery outlives its streams. `noted` counts chunks that may have been sent (it is made durable
//! *before* they are, in blocks, so that a restart grants no fresh window); acknowledged chunks come off it. The rest,
//! `outstanding`, never passes the window:
//!
//! ```text
//! window = min(2 * 2^honoured, largest) + acknowledged / 8
//! largest = max(2, 16 MiB / chunk size) for a listed source, 2 for any other enrolled seeder
//! ```
//!
//! A client that is shut out (its window is full of chunks that never arrived, and nothing new can be acknowledged)
//! finds [`FIRST_WINDOW`] chunks forgiven when it comes again after a second, the next time after two, and so on, doubling
//! up to ten minutes; sixteen times at most in one delivery. What bounds the loss is the number of times, not the waiting:
//! the first waits are short because whoever is killed or cut off at a bad moment is usually honest and back at once.
//!
//! The eighth is for honest clients whose connection broke with chunks under way: those chunks stay outstanding for
//! ever, and what the client acknowledges in the meantime buys room for them.

use std::collections::VecDeque;

use bincode::{Decode, Encode};

use crate::deliver::{ClientMessage, Grant, SeederMessage};
use crate::ids::{NetworkId, PeerId};
use crate::ranges::ChunkSet;
use crate::receipt::{Ack, Completion};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::Signed;
use crate::wire;

/// Bytes of the largest window.
pub const LARGEST_WINDOW_BYTES: u64 = 16 * 1024 * 1024;
/// Chunks of the window at the start, and at an unlisted seeder always.
pub const FIRST_WINDOW: u32 = 2;
/// One chunk of window is added for so many acknowledged ones.
pub const FORGIVENESS: u32 = 8;
/// A client that is shut out gets a first window again after this long, milliseconds, and twice as long each further time …
pub const FORGIVE_FIRST_MS: u64 = 1_000;
/// … up to this …
pub const FORGIVE_LONGEST_MS: u64 = 10 * 60 * 1000;
/// … so many times in one delivery: 32 chunks, beside the window, are the most that a seeder loses to it.
pub const FORGIVE_TIMES: u32 = 16;
/// So long an acknowledgement waits for a note to ride along with, milliseconds. One that opens the window, or that nothing
/// else would follow, does not wait.
pub const ACK_WAITS_MS: u64 = 200;
/// Ranges wanted at a time at most: a client that asks for more, scattered, gets `bad-want`.
const MAX_QUEUED_RANGES: usize = 1024;
/// Segments and manifests asked for and not yet sent, at most.
const MAX_QUEUED_META: usize = 64;
/// How often each may be asked for on one stream; a client needs each once.
const META_TIMES: u32 = 2;
/// So many questions for chunks count as a sign of life while none is sent.
const WANTS_IN_VAIN: u32 = 16;

/// What a seeder must not forget of one delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct ServeAccount {
    /// Chunks that may have been sent, over all streams.
    pub noted: u32,
    /// Acknowledgements up to the best one.
    pub honoured: u32,
    /// The best acknowledgement.
    pub ack: Option<Signed<Ack>>,
    /// The client's completion.
    pub completion: Option<Signed<Completion>>,
    /// When the first chunk was sent, unix milliseconds; 0 for never.
    pub first_at: u64,
    /// When the last acknowledgement came.
    pub last_at: u64,
    /// Chunks that never arrived and were forgiven.
    pub forgiven: u32,
    /// When the last of them was, unix milliseconds.
    pub forgiven_at: u64,
}

wire!(ServeAccount => 6 * 1024);

/// What one delivery stream is about.
#[derive(Clone, Debug)]
pub struct ServeTerms {
    /// The network.
    pub network: NetworkId,
    /// This seeder.
    pub seeder: PeerId,
    /// What the verified ticket or order allows.
    pub grant: Grant,
    /// Number of chunks of the content.
    pub chunks: u32,
    /// Bytes in a chunk.
    pub chunk_size: u32,
    /// Number of segments of chaining values.
    pub segments: u32,
    /// A client that neither asks nor acknowledges for this long is let go, milliseconds.
    pub idle_ms: u64,
    /// A client that leaves the window full for this long is let go, milliseconds.
    pub window_wait_ms: u64,
}

impl ServeTerms {
    fn largest_window(&self) -> u32 {
        if !self.grant.listed {
            return FIRST_WINDOW;
        }
        let chunks = LARGEST_WINDOW_BYTES / u64::from(self.chunk_size.max(1));
        u32::try_from(chunks).unwrap_or(u32::MAX).max(FIRST_WINDOW)
    }

    /// The window after `honoured` acknowledgements of `acknowledged` chunks.
    pub fn window(&self, honoured: u32, acknowledged: u32) -> u32 {
        let grown = FIRST_WINDOW.saturating_mul(1u32.checked_shl(honoured.min(30)).unwrap_or(u32::MAX));
        grown.min(self.largest_window()).saturating_add(acknowledged / FORGIVENESS)
    }
}

/// What the driver is to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServeAction {
    /// Send the signed manifest.
    SendManifest,
    /// Send this segment of chaining values.
    SendSegment(u32),
    /// Read this chunk and send it.
    SendChunk(u32),
    /// Send this message.
    Say(SeederMessage),
    /// Make this durable, then call [`ServeMachine::persisted`]. One at a time; other actions may follow meanwhile.
    Persist(ServeAccount),
    /// Send this refusal and end the stream.
    Refuse(Refusal),
    /// Everything is said and durable: end the stream.
    End,
}

/// The machine of one delivery stream.
#[derive(Debug)]
pub struct ServeMachine {
    terms: ServeTerms,
    held: ChunkSet,
    /// What is durable.
    durable: ServeAccount,
    /// What is to be made durable.
    wanted: ServeAccount,
    /// What is on its way to the disk, and how many chunks its acknowledgement names.
    persisting: Option<(ServeAccount, u32)>,
    /// Chunks of the durable acknowledgement, and of the newest one.
    acked_durable: u32,
    acked: ChunkSet,
    /// Since when an acknowledgement waits to be made durable.
    ack_waits_since: Option<u64>,
    /// Chunks sent over all streams: never above `durable.noted`.
    sent: u32,
    queue: ChunkSet,
    meta: VecDeque<Option<u32>>,
    /// Cancelled, and not yet told to the client.
    cancelled: ChunkSet,
    say: VecDeque<SeederMessage>,
    welcomed: bool,
    finishing: bool,
    finished_said: bool,
    ended: bool,
    refused: bool,
    last_active: u64,
    /// Segments and manifests asked for.
    metas: u32,
    /// Questions for chunks since one was sent or acknowledged.
    in_vain: u32,
    blocked_since: Option<u64>,
}

impl ServeMachine {
    /// A stream whose credential was checked. `account` is what is durable of this delivery, `last_ack` what the client
    /// said in its hello.
    ///
    /// # Errors
    /// `bad-ack` when `last_ack` is not a valid acknowledgement of this delivery.
    pub fn new(
        terms: ServeTerms,
        held: ChunkSet,
        account: ServeAccount,
        last_ack: Option<Signed<Ack>>,
        now: u64,
    ) -> Result<Self, Refusal> {
        let acked = account.ack.as_ref().and_then(|a| a.peek().ok()).map(|a| a.chunks).unwrap_or_default();
        let mut machine = ServeMachine {
            acked_durable: acked.len(),
            acked,
            ack_waits_since: None,
            sent: account.noted,
            wanted: account.clone(),
            durable: account,
            persisting: None,
            terms,
            held,
            queue: ChunkSet::new(),
            meta: VecDeque::new(),
            cancelled: ChunkSet::new(),
            say: VecDeque::new(),
            welcomed: false,
            finishing: false,
            finished_said: false,
            ended: false,
            refused: false,
            last_active: now,
            metas: 0,
            in_vain: 0,
            blocked_since: None,
        };
        if let Some(ack) = last_ack {
            // Only worth something when this seeder lost its own: an older one is passed over.
            let chunks = machine.check_ack(&ack)?.chunks;
            if chunks.is_superset(&machine.acked) && chunks.len() > machine.acked.len() {
                machine.sent = machine.sent.max(chunks.len());
                machine.wanted.noted = machine.sent;
                machine.take_ack(ack, chunks, now);
            }
        }
        machine.forgive(now);
        Ok(machine)
    }

    fn check_ack(&self, ack: &Signed<Ack>) -> Result<Ack, Refusal> {
        let grant = &self.terms.grant;
        let checked =
            Ack::check(ack, &grant.client, &self.terms.network, grant.delivery, &grant.manifest, &self.terms.seeder)?;
        if checked.chunks.end() > self.terms.chunks {
            return Err(Refusal::new(RefusalCode::BadAck, "it names chunks that do not exist"));
        }
        Ok(checked)
    }

    fn take_ack(&mut self, ack: Signed<Ack>, chunks: ChunkSet, now: u64) {
        self.acked = chunks;
        self.ack_waits_since.get_or_insert(now);
        self.wanted.ack = Some(ack);
        self.wanted.honoured = self.wanted.honoured.saturating_add(1);
        self.wanted.last_at = now;
        (self.last_active, self.in_vain) = (now, 0);
    }

    /// Said once the acknowledgement of the hello is durable: the client counts from the figures in it.
    fn welcome(&self) -> SeederMessage {
        let (window, outstanding) = self.window_state();
        SeederMessage::Welcome {
            delivery: self.terms.grant.delivery,
            held: cut(&self.held),
            ack: self.durable.ack.clone(),
            window,
            outstanding,
        }
    }

    fn window_state(&self) -> (u32, u32) {
        self.window_by(self.durable.honoured, self.acked_durable)
    }

    /// As it will be when the newest acknowledgement is durable.
    fn coming_window_state(&self) -> (u32, u32) {
        self.window_by(self.wanted.honoured, self.acked.len())
    }

    /// The window, and what is out of it.
    fn window_by(&self, honoured: u32, acked: u32) -> (u32, u32) {
        let settled = acked.saturating_add(self.wanted.forgiven);
        (self.terms.window(honoured, acked), self.sent.saturating_sub(settled))
    }

    /// Lets a client in again that is shut out by chunks that never arrived.
    fn forgive(&mut self, now: u64) {
        if self.wanted.ack != self.durable.ack {
            return; // the acknowledgement in the hello lets it in already
        }
        let (window, outstanding) = self.window_state();
        let account = &mut self.wanted;
        // A time that is still to come was noted by a clock that was ahead, and is not waited for.
        let noted = [account.forgiven_at, account.last_at, account.first_at];
        let last = noted.into_iter().filter(|at| *at <= now).max().unwrap_or(0);
        let times = account.forgiven / FIRST_WINDOW;
        let doubled = FORGIVE_FIRST_MS.saturating_mul(1u64.checked_shl(times).unwrap_or(u64::MAX));
        let due = now >= last.saturating_add(doubled.min(FORGIVE_LONGEST_MS));
        if outstanding >= window && due && account.forgiven < FORGIVE_TIMES * FIRST_WINDOW {
            account.forgiven += FIRST_WINDOW;
            account.forgiven_at = now;
        }
    }

    /// Takes in a message.
    ///
    /// # Errors
    /// The refusal with which the stream is to end: `bad-want`, `bad-ack`, `bad-receipt`, `malformed`, `limit-reached`.
    pub fn message(&mut self, message: ClientMessage, now: u64) -> Result<(), Refusal> {
        if self.finishing {
            return Ok(()); // what was under way when the client made an end is passed over
        }
        match message {
            ClientMessage::Hello { .. } => Err(Refusal::new(RefusalCode::Malformed, "a second hello on one stream")),
            ClientMessage::Meta { segment } => {
                if segment.is_some_and(|s| s >= self.terms.segments) {
                    return Err(Refusal::new(RefusalCode::BadWant, "there is no such segment"));
                }
                if self.meta.len() >= MAX_QUEUED_META {
                    return Err(Refusal::new(RefusalCode::LimitReached, "too many segments asked for at once"));
                }
                // They are in nobody's window, and nobody pays for them.
                self.metas = self.metas.saturating_add(1);
                if self.metas > META_TIMES.saturating_mul(self.terms.segments.saturating_add(META_TIMES)) {
                    return Err(Refusal::new(RefusalCode::LimitReached, "the same segments were asked for too often"));
                }
                self.meta.push_back(segment);
                self.last_active = now;
                Ok(())
            }
            ClientMessage::Want { chunks } => {
                if chunks.end() > self.terms.chunks {
                    return Err(Refusal::new(RefusalCode::BadWant, "it names chunks that do not exist"));
                }
                if !self.held.is_superset(&chunks) {
                    return Err(Refusal::new(RefusalCode::BadWant, "it names chunks that this seeder does not hold"));
                }
                // Wanted again before the client was told that it is cancelled: then it was not.
                self.cancelled = self.cancelled.difference(&chunks);
                // To ask for chunks and take them back at once keeps no stream open.
                if !self.queue.is_superset(&chunks) && self.in_vain < WANTS_IN_VAIN {
                    self.in_vain += 1;
                    self.last_active = now;
                }
                self.queue = self.queue.union(&chunks);
                if self.queue.range_count() > MAX_QUEUED_RANGES {
                    return Err(Refusal::new(RefusalCode::BadWant, "too many scattered chunks wanted at once"));
                }
                Ok(())
            }
            ClientMessage::Cancel { chunks } => {
                let cancelled = self.queue.intersection(&chunks);
                self.queue = self.queue.difference(&chunks);
                self.cancelled = self.cancelled.union(&cancelled);
                if self.cancelled.range_count() > MAX_QUEUED_RANGES {
                    return Err(Refusal::new(RefusalCode::LimitReached, "too many scattered chunks cancelled at once"));
                }
                Ok(())
            }
            ClientMessage::Ack(ack) => self.ack(ack, now),
            ClientMessage::Finish { ack, completion } => {
                if let Some(ack) = ack {
                    self.ack(ack, now)?;
                }
                if let Some(completion) = completion {
                    let grant = &self.terms.grant;
                    Completion::check(
                        &completion,
                        &grant.client,
                        &self.terms.network,
                        grant.delivery,
                        &grant.manifest,
                    )?;
                    self.wanted.completion = Some(completion);
                }
                self.last_active = now;
                self.queue = ChunkSet::new();
                // Nothing more is sent: what was only noted ahead is not lost to the window.
                self.wanted.noted = self.sent;
                self.finishing = true;
                Ok(())
            }
        }
    }

    fn ack(&mut self, ack: Signed<Ack>, now: u64) -> Result<(), Refusal> {
        if self.wanted.ack.as_ref() == Some(&ack) {
            return Ok(()); // repeated: nothing new, nothing wrong
        }
        let chunks = self.check_ack(&ack)?.chunks;
        if !chunks.is_superset(&self.acked) || chunks.len() == self.acked.len() {
            return Err(Refusal::new(RefusalCode::BadAck, "it is no strict superset of the one before"));
        }
        if chunks.len() > self.sent {
            return Err(Refusal::new(RefusalCode::BadAck, "it names more chunks than were sent"));
        }
        self.take_ack(ack, chunks, now);
        Ok(())
    }

    /// The account last handed out by [`ServeAction::Persist`] is durable.
    pub fn persisted(&mut self) {
        let Some((account, acked)) = self.persisting.take() else { return };
        self.durable = account;
        if acked > self.acked_durable {
            self.acked_durable = acked;
            if self.welcomed {
                let (window, outstanding) = self.window_state();
                self.say.push_back(SeederMessage::Window { window, outstanding });
            }
        }
    }

    /// Tells the machine that more chunks are held now (replication goes on while serving).
    pub fn hold(&mut self, held: ChunkSet) {
        self.held = held;
    }

    /// Chunks are on their way out, and it is this end that takes its time (a limit on what it sends). The client has
    /// nothing to answer yet: its time begins anew.
    pub fn sending(&mut self, now: u64) {
        self.last_active = now;
        self.blocked_since = self.blocked_since.map(|_| now);
    }

    /// What to do next; `None` means wait for a message, for [`ServeMachine::persisted`], or until
    /// [`ServeMachine::deadline`].
    pub fn next_action(&mut self, now: u64) -> Option<ServeAction> {
        if self.refused || self.ended {
            return None;
        }
        if self.finished_said {
            self.ended = true;
            return Some(ServeAction::End);
        }
        if !self.welcomed && self.wanted.ack == self.durable.ack {
            self.welcomed = true;
            return Some(ServeAction::Say(self.welcome()));
        }
        if let Some(message) = self.say.pop_front() {
            return Some(ServeAction::Say(message));
        }
        if !self.cancelled.is_empty() {
            let chunks = cut(&self.cancelled);
            self.cancelled = self.cancelled.difference(&chunks);
            return Some(ServeAction::Say(SeederMessage::Cancelled { chunks }));
        }
        if self.welcomed
            && let Some(meta) = self.meta.pop_front()
        {
            return Some(meta.map_or(ServeAction::SendManifest, ServeAction::SendSegment));
        }
        self.note_ahead(now);
        // Before chunks: what is noted ahead becomes durable while the block before it is being sent.
        if self.persisting.is_none() && self.is_write_due(now) {
            self.ack_waits_since = None;
            self.persisting = Some((self.wanted.clone(), self.acked.len()));
            return Some(ServeAction::Persist(self.wanted.clone()));
        }
        let chunk = if self.welcomed { self.next_chunk(now) } else { None };
        if let Some(ServeAction::Refuse(_)) = &chunk {
            self.refused = true;
        }
        if chunk.is_some() {
            return chunk;
        }
        if self.finishing && self.persisting.is_none() {
            self.finished_said = true;
            return Some(ServeAction::Say(SeederMessage::Finished));
        }
        if now >= self.patience_ends() {
            self.refused = true;
            return Some(ServeAction::Refuse(self.timeout(now)));
        }
        None
    }

    /// Is there something to be made durable now? An acknowledgement that changes nothing yet goes with the next note: a
    /// write for each of them would cost a fast delivery several per cent.
    fn is_write_due(&self, now: u64) -> bool {
        let (wanted, durable) = (&self.wanted, &self.durable);
        let more_than_an_ack = (wanted.noted, wanted.first_at, wanted.forgiven, wanted.forgiven_at)
            != (durable.noted, durable.first_at, durable.forgiven, durable.forgiven_at)
            || wanted.completion != durable.completion;
        if more_than_an_ack {
            return true;
        }
        let Some(since) = self.ack_waits_since else { return false };
        let (window, outstanding) = self.window_state();
        let grows = self.terms.window(durable.honoured, 0) < self.terms.largest_window();
        let nearly_full = outstanding >= window - window / 4;
        // Who has nothing more to ask for may go away.
        let idle = self.queue.is_empty() || self.finishing || !self.welcomed;
        grows || nearly_full || idle || now >= since.saturating_add(ACK_WAITS_MS)
    }

    /// Notes chunks as sent before they are, in blocks of a quarter of the window: few writes, and little lost to a crash.
    /// It is the window that the newest acknowledgement opens, which becomes durable with the note.
    fn note_ahead(&mut self, now: u64) {
        let (window, outstanding) = self.coming_window_state();
        if self.queue.is_empty() || outstanding >= window {
            return;
        }
        let block = (window / 4).max(1);
        if self.sent.saturating_add(block / 2) >= self.wanted.noted {
            // Never further than may be sent: neither past the window nor past what is asked for.
            let room = (window - outstanding).min(self.queue.len()).min(block);
            self.wanted.noted = self.wanted.noted.max(self.sent.saturating_add(room));
            // Durable with the first note: what is forgiven to a client counts from here, also after a crash.
            if self.wanted.first_at == 0 {
                self.wanted.first_at = now;
            }
        }
    }

    fn next_chunk(&mut self, now: u64) -> Option<ServeAction> {
        let Some(chunk) = self.queue.first() else {
            self.blocked_since = None;
            return None;
        };
        let (window, outstanding) = self.window_state();
        if outstanding >= window {
            self.blocked_since.get_or_insert(now);
            return None;
        }
        self.blocked_since = None;
        let bytes = u64::from(self.sent.saturating_add(1)) * u64::from(self.terms.chunk_size);
        if bytes > self.terms.grant.allowance.saturating_add(u64::from(self.terms.chunk_size)) {
            return Some(ServeAction::Refuse(Refusal::new(
                RefusalCode::AllowanceSpent,
                "this delivery's allowance at this seeder is used up",
            )));
        }
        if self.sent >= self.durable.noted {
            return None;
        }
        self.queue.remove(chunk);
        self.sent += 1;
        (self.last_active, self.in_vain) = (now, 0);
        Some(ServeAction::SendChunk(chunk))
    }

    /// When to ask [`ServeMachine::next_action`] again although nothing happened, unix milliseconds.
    pub fn deadline(&self) -> u64 {
        let patience = self.patience_ends();
        match self.ack_waits_since {
            // What is being written now comes first; its end is an event of its own.
            Some(since) if self.persisting.is_none() => patience.min(since.saturating_add(ACK_WAITS_MS)),
            _ => patience,
        }
    }

    fn patience_ends(&self) -> u64 {
        let idle = self.last_active.saturating_add(self.terms.idle_ms);
        match self.blocked_since {
            Some(since) => idle.min(since.saturating_add(self.terms.window_wait_ms)),
            None => idle,
        }
    }

    fn timeout(&self, now: u64) -> Refusal {
        match self.blocked_since {
            Some(since) if now >= since.saturating_add(self.terms.window_wait_ms) => Refusal::new(
                RefusalCode::WindowExceeded,
                "more was asked for than is sent without an acknowledgement, and none came",
            ),
            _ => Refusal::new(RefusalCode::Idle, "nothing was asked for or acknowledged for too long"),
        }
    }

    /// What is to be remembered when the stream ends without [`ServeAction::End`]: what was really sent is noted, so
    /// that blocks noted ahead are not lost to the window by an orderly end.
    pub fn closing_account(&self) -> ServeAccount {
        let mut account = self.wanted.clone();
        account.noted = self.sent;
        account
    }

    /// The credential's facts.
    pub fn grant(&self) -> &Grant {
        &self.terms.grant
    }

    /// Chunks acknowledged, durable or not.
    pub fn acked(&self) -> &ChunkSet {
        &self.acked
    }
}

/// A set as it may be sent: the first 256 ranges.
fn cut(set: &ChunkSet) -> ChunkSet {
    let mut out = ChunkSet::new();
    for range in set.ranges().take(ChunkSet::MAX_RANGES) {
        out.insert_range(range);
    }
    out
}
