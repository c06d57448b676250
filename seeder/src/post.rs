//! Sends receipts: a round that makes batches, and one that gets them to the manager, first through the mesh and, when
//! no mark comes back in time, by asking the manager directly. Where that fails, too, they go into the mesh again as soon as
//! it has forgotten them: for a seeder that reaches the manager only through others there is no other way. All goes on
//! until the node stops; what it does not manage before that is on disk.

use std::sync::Arc;
use std::time::Duration;

use protocol::api::{MeshRequest, MeshResponse, receipts_topic};
use protocol::trust::KeyPurpose;
use protocol::{PeerId, Refusal, RefusalCode};
use store::StoreError;
use tokio::time::Instant;

use crate::catching_up::Teller;
use crate::clock::{BackOff, noted_at, now_ms};
use crate::context::Seeder;
use crate::manager::AskError;
use crate::network::TakeError;
use crate::outbox::{self, BatchError};
use crate::sync::SyncError;
use crate::tables::BatchRecord;

/// Between two times that the outbox begins anew, at least: should the manager refuse the new one too, something else is
/// wrong.
const START_OVER_EVERY: Duration = Duration::from_secs(600);
/// With nothing to send, the outbox is looked at this often all the same.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// Batches that go into the mesh again at a time, the oldest first: while the manager is away they go in vain, and each
/// costs every seeder of its shard. When marks come for these, the next follow at once.
const AGAIN: u64 = 8;
/// The mesh forgets with its housekeeping, and not everybody at one moment: so many rounds of it later.
const FORGETTING_ROUNDS: u64 = 10;

/// Makes batches of receipts that are due.
pub(crate) async fn make_batches(seeder: Arc<Seeder>) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let every = Duration::from_millis(seeder.config.receipt_batch_ms);
    loop {
        // As late as this, so that receipts that come together go together.
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = tokio::time::sleep(every) => {}
        }
        loop {
            match outbox::make_batch(&seeder, now_ms()).await {
                Ok(Some(_)) => {
                    seeder.notes.receipts.clear();
                    seeder.wake.post.notify_one();
                }
                Ok(None) => break,
                Err(BatchError::Waits(reason)) => {
                    tracing::debug!(reason, "receipts wait");
                    seeder.notes.receipts.set(reason);
                    break;
                }
                Err(BatchError::Store(error)) => return Err(error),
            }
        }
    }
}

/// What was given to the mesh once more.
#[derive(Default)]
struct Again {
    /// When, unix milliseconds.
    at: u64,
    /// The newest of them.
    up_to: u64,
}

/// Gets batches to the manager.
pub(crate) async fn send_batches(seeder: Arc<Seeder>) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let mut post = Post {
        back_off: BackOff::new(seeder.config.retry_ms),
        not_before: Instant::now(),
        // What an earlier run gossiped is sent directly by this one.
        gossiped: outbox::state(&seeder.db)?.map_or(0, |state| state.next.saturating_sub(1)),
        heard_by_mesh: false,
        again: Again::default(),
        rewound: false,
        started_over: None,
        seeder,
    };
    loop {
        let next = post.round().await?.min(post.gossip_again().await?);
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            () = post.seeder.wake.post.notified() => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

struct Post {
    seeder: Arc<Seeder>,
    back_off: BackOff,
    not_before: Instant,
    /// The newest batch that was given to the mesh.
    gossiped: u64,
    /// The last batch found somebody in the mesh to take it.
    heard_by_mesh: bool,
    again: Again,
    /// Batches that were marked before are being sent again, because the manager does not know them.
    rewound: bool,
    started_over: Option<Instant>,
}

impl Post {
    /// Sends what can be sent now; says when to look again.
    async fn round(&mut self) -> Result<Instant, StoreError> {
        while let Some((number, record)) = outbox::next_unmarked(&self.seeder.db, self.gossiped)? {
            self.gossip(number, record).await;
        }
        let mut after = 0;
        loop {
            let Some((number, record)) = outbox::next_unmarked(&self.seeder.db, after)? else {
                self.count_waiting()?;
                return Ok(Instant::now() + LOOK_EVERY);
            };
            self.count_waiting()?;
            if Instant::now() < self.not_before {
                return Ok(self.not_before);
            }
            let wait = if self.heard_by_mesh { self.seeder.config.receipt_direct_ms } else { 0 };
            let now = now_ms();
            let left = noted_at(record.made_at, now).saturating_add(wait).saturating_sub(now);
            if left > 0 && !self.rewound {
                return Ok(Instant::now() + Duration::from_millis(left));
            }
            match self.directly(number, record).await? {
                Sent::Through(marked) => {
                    after = marked;
                    self.back_off.reset();
                }
                Sent::Again => after = 0,
                Sent::Later => {
                    self.not_before = Instant::now() + self.back_off.pause();
                    return Ok(self.not_before);
                }
            }
        }
    }

    fn count_waiting(&self) -> Result<(), StoreError> {
        let waiting = outbox::state(&self.seeder.db)?.map_or(0, |state| state.next - 1 - state.marked);
        self.seeder.counts.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        Ok(())
    }

    async fn gossip(&mut self, number: u64, record: BatchRecord) {
        self.gossiped = number;
        if let Some(heard) = self.publish(number, record).await {
            self.heard_by_mesh = heard;
        }
    }

    /// Gives a batch to the mesh: did somebody take it? `None` where it cannot be given.
    async fn publish(&self, number: u64, record: BatchRecord) -> Option<bool> {
        let seeder = &self.seeder;
        let trust = seeder.network.trust()?;
        let topic = receipts_topic(&seeder.network.id, &seeder.peer, trust.key_set().gossip_shards);
        let message = match outbox::gossiped(seeder, record.batch) {
            Ok(message) => message,
            Err(refusal) => {
                tracing::debug!(%refusal, "receipts are not gossiped");
                return None;
            }
        };
        let published = seeder.node.publish(&topic, message).await;
        match &published {
            Ok(()) => tracing::debug!(batch = number, "receipts gossiped"),
            Err(error) => tracing::debug!(batch = number, %error, "receipts not gossiped"),
        }
        Some(published.is_ok())
    }

    /// What was given to the mesh and never marked got lost there, or came while the manager was away: it is given again
    /// when nobody remembers it any more (before that nobody would pass it on). Says when to look again.
    async fn gossip_again(&mut self) -> Result<Instant, StoreError> {
        let config = &self.seeder.config;
        let forgotten_ms =
            config.gossip_memory_ms.saturating_add(config.gossip_heartbeat_ms.saturating_mul(FORGETTING_ROUNDS));
        let next = |after| {
            Ok::<_, StoreError>(outbox::next_unmarked(&self.seeder.db, after)?.filter(|(n, _)| *n <= self.gossiped))
        };
        let Some((oldest, record)) = next(0)? else {
            self.again.up_to = 0;
            return Ok(Instant::now() + LOOK_EVERY);
        };
        let now = now_ms();
        let arrived = self.again.up_to > 0 && oldest > self.again.up_to;
        let last = if arrived { 0 } else { noted_at(self.again.at, now) };
        let due = last.max(noted_at(record.made_at, now)).saturating_add(forgotten_ms);
        if now < due {
            return Ok(Instant::now() + Duration::from_millis(due - now).min(LOOK_EVERY));
        }
        let mut up_to = 0;
        for _ in 0..AGAIN {
            let Some((number, record)) = next(up_to)? else { break };
            if now < noted_at(record.made_at, now).saturating_add(forgotten_ms) {
                break;
            }
            self.publish(number, record).await;
            up_to = number;
        }
        self.again = Again { at: now, up_to };
        Ok(Instant::now() + Duration::from_millis(forgotten_ms).min(LOOK_EVERY))
    }

    async fn directly(&mut self, number: u64, record: BatchRecord) -> Result<Sent, StoreError> {
        let seeder = Arc::clone(&self.seeder);
        let sealed_to = record.batch.peek().ok().map(|batch| batch.sealed_to);
        let answer = seeder.manager.ask(&MeshRequest::Receipts(record.batch)).await;
        match answer {
            Ok(MeshResponse::Mark(mark)) => match outbox::take_mark(&seeder, &mark).await {
                Ok(outbox::Marked::UpTo { number: marked, .. }) => {
                    tracing::debug!(batch = number, marked, "receipts confirmed");
                    seeder.notes.receipts.clear();
                    self.rewound = self.rewound && marked < self.gossiped;
                    // The manager answers with how far it is; a batch that it passes over must not be asked for ever.
                    Ok(Sent::Through(marked.max(number)))
                }
                // To the manager this batch is one of another outbox: it will never mark this one.
                Ok(outbox::Marked::NotOurs) => {
                    tracing::warn!("the manager marked another outbox");
                    self.start_over().await
                }
                Ok(outbox::Marked::Outdated) => self.later("the manager's mark is from before its newest restore"),
                Err(TakeError::Refused(refusal)) if refusal.code == RefusalCode::BadReceipt => self.start_over().await,
                Err(TakeError::Refused(refusal)) => self.later(refusal),
                Err(TakeError::Fork(text)) => self.later(text),
                Err(TakeError::Store(error)) => Err(error),
            },
            Ok(_) => self.later(AskError::Unexpected("receipts")),
            // It misses earlier ones: marked before, and lost there since.
            Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::WrongState => {
                if !self.rewound && outbox::rewind(&seeder.db).await? {
                    tracing::warn!(%refusal, "sending receipts again from the oldest kept");
                    self.rewound = true;
                    return Ok(Sent::Again);
                }
                self.start_over().await
            }
            Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::BadReceipt => {
                tracing::warn!(%refusal, "the manager cannot follow this outbox");
                self.start_over().await
            }
            Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::UnknownKey => {
                self.seal_again(sealed_to, &refusal).await
            }
            Err(error) => self.later(error),
        }
    }

    /// The manager lost the key that this batch is sealed to, with everything since its backup. Where the newest key set
    /// names another one, all receipts that are kept go to that; until it does, they wait.
    async fn seal_again(&mut self, sealed_to: Option<PeerId>, refusal: &Refusal) -> Result<Sent, StoreError> {
        match Teller::Manager.key_set(&self.seeder).await {
            Ok(()) => {}
            Err(SyncError::Take(TakeError::Store(error))) => return Err(error),
            // It may have an older one than this seeder.
            Err(error) => tracing::debug!(%error, "no newer key set from the manager"),
        }
        let active = self.seeder.network.trust().and_then(|trust| trust.active_key(KeyPurpose::ReceiptSealing));
        if active.is_none() || active == sealed_to {
            return self.later(refusal);
        }
        tracing::warn!(
            "the manager does not have the key that receipts were sealed to: they are sealed to the next one"
        );
        self.begin_outbox().await
    }

    fn later(&self, reason: impl std::fmt::Display) -> Result<Sent, StoreError> {
        tracing::debug!(%reason, "receipts wait for the manager");
        self.seeder.notes.receipts.set(reason.to_string());
        Ok(Sent::Later)
    }

    async fn start_over(&mut self) -> Result<Sent, StoreError> {
        if self.started_over.is_some_and(|at| at.elapsed() < START_OVER_EVERY) {
            return self.later("the manager cannot follow this outbox, nor the new one that was begun");
        }
        self.started_over = Some(Instant::now());
        self.begin_outbox().await
    }

    async fn begin_outbox(&mut self) -> Result<Sent, StoreError> {
        tracing::warn!("beginning a new outbox: all receipts that are kept are made again");
        outbox::start_over(&self.seeder.db).await?;
        self.rewound = false;
        self.gossiped = 0;
        self.again = Again::default();
        Ok(Sent::Again)
    }
}

enum Sent {
    /// Up to this number.
    Through(u64),
    /// The outbox is another now: begin from its start.
    Again,
    /// Not now.
    Later,
}
