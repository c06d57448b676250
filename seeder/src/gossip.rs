//! What this seeder hears and passes on in the mesh. Nothing is forwarded that was not judged here: news of the manager
//! by its signature, receipts of other seeders by their enrolment, signature, topic, size and rate. What is inside a
//! batch is nobody's business but the manager's.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use node::{GossipMessage, SubscribeError};
use protocol::api::{GossipedBatch, News, is_to_blame, news_topic, receipts_topic_of_shard, shards_carried};
use protocol::trust::{Trust, Update};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode, codec};
use store::StoreError;
use tokio_util::sync::CancellationToken;

use crate::clock::now_ms;
use crate::context::Seeder;
use crate::network::TakeError;
use crate::outbox;

/// Messages of one topic that wait to be judged, at most 64 KiB each; further ones are not forwarded.
const QUEUE: usize = 64;

/// A manager that was not heard for so long was away, milliseconds: the pauses after which it is tried again have grown long.
const SILENT_MS: u64 = 60_000;

/// Seeders whose rate is watched; beyond it the one heard longest ago is forgotten.
const WATCHED: usize = 4096;
/// Batches of a seeder that may come at once, and every minute: twice what the busiest one makes.
const NEW: Bound = Bound { at_once: 240.0, per_ms: 120.0 / 60_000.0 };
/// As much of what is so old that the mesh has forgotten it. A seeder sends a few of these again while the manager does not
/// mark them; but anybody may say all of them again, and that is not to keep its new ones out.
const OLD: Bound = Bound { at_once: 60.0, per_ms: 30.0 / 60_000.0 };

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Forward,
    /// Its sender should have known.
    Blame(RefusalCode),
    /// Nobody is at fault.
    Pass,
}

fn conclude(seeder: &Seeder, message: GossipMessage, verdict: Verdict) {
    match verdict {
        Verdict::Forward => message.accept(),
        Verdict::Pass => message.ignore(),
        Verdict::Blame(code) => {
            seeder.counts.gossip_refused.inc([code.as_str()]);
            tracing::debug!(from = %message.from, code = code.as_str(), "gossip message rejected");
            message.reject();
        }
    }
}

/// Listens to the manager's news.
pub(crate) async fn hear_news(seeder: Arc<Seeder>) -> Result<(), NewsError> {
    let mut topic = seeder.node.subscribe(&news_topic(&seeder.network.id), QUEUE).await?;
    let token = seeder.supervisor.token();
    loop {
        // The network outlasts those who use it: not to wait for its end is what lets it end.
        let message = tokio::select! {
            () = token.cancelled() => return Ok(()),
            message = topic.next() => match message {
                Some(message) => message,
                None => return Ok(()),
            },
        };
        let verdict = match codec::decode::<News>(&message.data) {
            Ok(news) => judge_news(&seeder, news).await?,
            Err(error) => Verdict::Blame(Refusal::from(error).code),
        };
        conclude(&seeder, message, verdict);
    }
}

/// Why news are heard no longer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NewsError {
    #[error(transparent)]
    Subscribe(#[from] SubscribeError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

async fn judge_news(seeder: &Seeder, news: News) -> Result<Verdict, StoreError> {
    if seeder.network.trust().is_none() {
        return Ok(Verdict::Pass);
    }
    let taken = match news {
        News::KeySet(signed) => {
            let taken = seeder.network.take_key_set(signed).await;
            // It may have made this seeder's certificate void: without another one it serves nobody.
            if matches!(taken, Ok(Update::Taken)) && seeder.network.certificate(now_ms()).is_err() {
                seeder.wake.sync.notify_one();
            }
            taken
        }
        News::Epoch(signed) => seeder.network.take_epoch(signed).await,
        News::Heartbeat(signed) => {
            let at = |seeder: &Seeder| seeder.network.heartbeat().map_or(0, |heartbeat| heartbeat.at);
            let before = at(seeder);
            let taken = seeder.network.take_heartbeat(signed).await;
            if matches!(taken, Ok(Update::Taken)) {
                if at(seeder) >= before.saturating_add(SILENT_MS) {
                    seeder.wake.returned.notify_waiters();
                }
                after_heartbeat(seeder).await?;
            }
            taken
        }
        News::Mark(mark) => match outbox::take_mark(seeder, &mark).await {
            Ok(outbox::Marked::UpTo { new: true, .. }) => {
                seeder.wake.post.notify_one();
                Ok(Update::Taken)
            }
            Ok(outbox::Marked::UpTo { new: false, .. } | outbox::Marked::Outdated) => Ok(Update::NotNewer),
            // It is for others. The mesh has forgotten an old one, and forwards it as often as somebody says it again.
            Ok(outbox::Marked::NotOurs) if is_old(seeder, mark.peek().map_or(0, |mark| mark.at)) => {
                Ok(Update::NotNewer)
            }
            Ok(outbox::Marked::NotOurs) => Ok(Update::Taken),
            // Good, and about batches that this seeder does not have: the others may still want it.
            Err(TakeError::Refused(refusal)) if refusal.code == RefusalCode::BadReceipt => Ok(Update::Taken),
            Err(error) => Err(error),
        },
    };
    Ok(match taken {
        Ok(Update::Taken) => Verdict::Forward,
        Ok(Update::NotNewer) => Verdict::Pass,
        Err(TakeError::Store(error)) => return Err(error),
        // Who forwarded it may have heard this one first. It is not for others: they have theirs.
        Err(TakeError::Fork(_)) => Verdict::Pass,
        Err(TakeError::Refused(refusal)) => match refusal.code {
            // Good, but what comes before it is missing here, or this clock is not right.
            RefusalCode::StaleRevocations | RefusalCode::NotYetValid => {
                seeder.wake.sync.notify_one();
                Verdict::Pass
            }
            // Signed by keys that this seeder has not heard of yet, if it is good; or by one that was given up, which a manager
            // that came back from a backup may not know, and who passed it on neither.
            RefusalCode::UnknownKey | RefusalCode::KeyRetired => {
                seeder.wake.stranger();
                Verdict::Pass
            }
            code if is_to_blame(code) => Verdict::Blame(code),
            _ => Verdict::Pass,
        },
    })
}

/// Did the manager say this before the mesh forgot it? By its own clock: this one may be wrong.
fn is_old(seeder: &Seeder, at: u64) -> bool {
    let newest = seeder.network.heartbeat().map_or(0, |heartbeat| heartbeat.at);
    newest.saturating_sub(at) > seeder.config.gossip_memory_ms
}

/// A heartbeat says what is new elsewhere: what is missing here is fetched at once.
pub(crate) async fn after_heartbeat(seeder: &Seeder) -> Result<(), StoreError> {
    let Some(heartbeat) = seeder.network.heartbeat() else { return Ok(()) };
    let version = seeder.network.trust().map_or(0, |trust| trust.key_set().version);
    if heartbeat.epoch > seeder.network.revoked().number() || heartbeat.key_set_version > version {
        seeder.wake.sync.notify_one();
    }
    after_restore(seeder).await
}

/// A heartbeat says whether the manager came back from a backup since: then it is sent the receipts again.
pub(crate) async fn after_restore(seeder: &Seeder) -> Result<(), StoreError> {
    let Some(heartbeat) = seeder.network.heartbeat() else { return Ok(()) };
    if outbox::restored(seeder, heartbeat.restore).await? {
        tracing::warn!(restore = heartbeat.restore, "the manager came back from a backup: sending receipts again");
        seeder.wake.post.notify_one();
    }
    Ok(())
}

/// Listens to the receipts of the shards that this seeder carries, to pass them on. The number of shards is the key set's.
pub(crate) async fn pass_receipts(seeder: Arc<Seeder>) -> Result<(), std::convert::Infallible> {
    let token = seeder.supervisor.token();
    let mut changes = seeder.network.changes();
    let rates = Arc::new(tokio::sync::Mutex::new(Rates::default()));
    let mut shards: BTreeMap<u16, CancellationToken> = BTreeMap::new();
    loop {
        let wanted = seeder.network.trust().map_or_else(Vec::new, |trust| {
            shards_carried(&seeder.network.id, &seeder.peer, trust.key_set().gossip_shards)
        });
        shards.retain(|shard, stop| {
            let stays = wanted.contains(shard);
            if !stays {
                stop.cancel();
            }
            stays
        });
        for shard in wanted {
            let Entry::Vacant(place) = shards.entry(shard) else { continue };
            let stop = token.child_token();
            place.insert(stop.clone());
            let task = pass_shard(Arc::clone(&seeder), shard, Arc::clone(&rates), stop);
            seeder.supervisor.spawn("receipts of others", task);
        }
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            // The sender of changes lives as long as the seeder.
            _ = changes.changed() => {}
        }
    }
}

async fn pass_shard(seeder: Arc<Seeder>, shard: u16, rates: Arc<tokio::sync::Mutex<Rates>>, stop: CancellationToken) {
    let topic = receipts_topic_of_shard(&seeder.network.id, shard);
    let mut receiver = match seeder.node.subscribe(&topic, QUEUE).await {
        Ok(receiver) => receiver,
        Err(error) => return tracing::warn!(%error, "receipts of others are not passed on"),
    };
    loop {
        let message = tokio::select! {
            () = stop.cancelled() => return,
            message = receiver.next() => match message {
                Some(message) => message,
                None => return,
            },
        };
        let verdict = match seeder.network.trust() {
            None => Verdict::Pass,
            Some(trust) => match judge_batch(&seeder, &trust, &message, now_ms()) {
                Err(refusal) => {
                    if refusal.code == RefusalCode::UnknownKey {
                        seeder.wake.stranger();
                    }
                    if is_to_blame(refusal.code) { Verdict::Blame(refusal.code) } else { Verdict::Pass }
                }
                Ok((sender, at)) => {
                    let now = now_ms();
                    let is_old = now.abs_diff(at) > seeder.config.gossip_memory_ms;
                    let (in_rate, first) = rates.lock().await.take(sender, is_old, now);
                    if first {
                        // Its enrolment is proven: it may take part in the DHT.
                        let _ = seeder.node.add_dht_peer(PeerAddrs::from(sender)).await;
                    }
                    if in_rate { Verdict::Forward } else { Verdict::Pass }
                }
            },
        };
        conclude(&seeder, message, verdict);
    }
}

/// Is this a batch that its sender may publish here? Gives the sender, and when it was made by its clock.
fn judge_batch(seeder: &Seeder, trust: &Trust, message: &GossipMessage, now: u64) -> Result<(PeerId, u64), Refusal> {
    let gossiped = codec::decode::<GossipedBatch>(&message.data)?;
    let sender = gossiped.check(&message.topic, trust, &seeder.network.revoked(), now)?;
    Ok((sender, gossiped.batch.peek().map_or(0, |batch| batch.at)))
}

/// How fast batches of each seeder come: two buckets of tokens each.
#[derive(Debug, Default)]
struct Rates {
    seeders: HashMap<PeerId, Rate>,
}

#[derive(Debug)]
struct Rate {
    new: Bucket,
    old: Bucket,
    /// Unix milliseconds.
    heard: u64,
}

#[derive(Clone, Copy, Debug)]
struct Bound {
    at_once: f64,
    per_ms: f64,
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    /// When they were counted, unix milliseconds.
    at: u64,
}

impl Bucket {
    fn take(&mut self, bound: Bound, now: u64) -> bool {
        // Milliseconds since the last one, at most ten minutes, are exact in a float.
        let passed = u32::try_from(now.saturating_sub(self.at).min(600_000)).unwrap_or(0);
        self.tokens = (self.tokens + f64::from(passed) * bound.per_ms).min(bound.at_once);
        self.at = now;
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }
}

impl Rates {
    /// Takes a token for a new batch or an old one: is it within its sender's rate, and is that heard for the first time?
    fn take(&mut self, sender: PeerId, is_old: bool, now: u64) -> (bool, bool) {
        let first = !self.seeders.contains_key(&sender);
        if first && self.seeders.len() >= WATCHED {
            let oldest = self.seeders.iter().min_by_key(|(_, rate)| rate.heard).map(|(peer, _)| *peer);
            oldest.and_then(|peer| self.seeders.remove(&peer));
        }
        let full = |bound: Bound| Bucket { tokens: bound.at_once, at: now };
        let rate = self.seeders.entry(sender).or_insert_with(|| Rate { new: full(NEW), old: full(OLD), heard: now });
        rate.heard = now;
        let in_rate = if is_old { rate.old.take(OLD, now) } else { rate.new.take(NEW, now) };
        (in_rate, first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seeder_that_floods_is_passed_over_and_the_table_is_bounded() {
        let mut rates = Rates::default();
        let peer = |n: u32| {
            let mut bytes = [0; 32];
            bytes.iter_mut().zip(n.to_le_bytes()).for_each(|(to, from)| *to = from);
            PeerId::from_bytes(bytes)
        };
        let taken = (0..1000).filter(|_| rates.take(peer(1), false, 0).0).count();
        assert_eq!(taken, 240);
        assert!(rates.take(peer(1), false, 1000).0, "two more each second");
        for n in 0..5000 {
            rates.take(peer(n), false, 2000);
        }
        assert_eq!(rates.seeders.len(), WATCHED);
    }
    #[test]
    fn old_batches_that_somebody_says_again_take_nothing_from_new_ones() {
        let (mut rates, peer) = (Rates::default(), PeerId::from_bytes([1; 32]));
        assert_eq!((0..1000).filter(|_| rates.take(peer, true, 0).0).count(), 60);
        assert_eq!((0..1000).filter(|_| rates.take(peer, false, 0).0).count(), 240);
        assert_eq!((0..10).filter(|_| rates.take(peer, true, 4000).0).count(), 2);
    }
}
