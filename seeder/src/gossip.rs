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
/// Seeders whose rate is watched; beyond it the one heard longest ago is forgotten.
const WATCHED: usize = 4096;
/// Batches that a seeder may send at once, and every minute: twice what the busiest one makes.
const BURST: f64 = 240.0;
/// Batches a millisecond that a seeder may send for long.
const PER_MS: f64 = 120.0 / 60_000.0;

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
            let taken = seeder.network.take_heartbeat(signed).await;
            if matches!(taken, Ok(Update::Taken)) {
                after_heartbeat(seeder).await?;
            }
            taken
        }
        News::Mark(mark) => match outbox::take_mark(seeder, &mark).await {
            Ok(outbox::Marked::UpTo(_)) => {
                seeder.wake.post.notify_one();
                Ok(Update::Taken)
            }
            Ok(outbox::Marked::NotOurs) => Ok(Update::Taken),
            Ok(outbox::Marked::Outdated) => Ok(Update::NotNewer),
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

/// A heartbeat says what is new elsewhere: what is missing here is fetched at once.
pub(crate) async fn after_heartbeat(seeder: &Seeder) -> Result<(), StoreError> {
    let Some(heartbeat) = seeder.network.heartbeat() else { return Ok(()) };
    let version = seeder.network.trust().map_or(0, |trust| trust.key_set().version);
    if heartbeat.epoch > seeder.network.revoked().number() || heartbeat.key_set_version > version {
        seeder.wake.sync.notify_one();
    }
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
                Ok(sender) => {
                    let (in_rate, first) = rates.lock().await.take(sender, now_ms());
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

/// Is this a batch that its sender may publish here? Gives the sender.
fn judge_batch(seeder: &Seeder, trust: &Trust, message: &GossipMessage, now: u64) -> Result<PeerId, Refusal> {
    codec::decode::<GossipedBatch>(&message.data)?.check(&message.topic, trust, &seeder.network.revoked(), now)
}

/// How fast each seeder publishes: a bucket of tokens each.
#[derive(Debug, Default)]
struct Rates {
    // Tokens left, and when they were counted (unix milliseconds).
    seeders: HashMap<PeerId, (f64, u64)>,
}

impl Rates {
    /// Takes a token: is the sender within its rate, and is it heard for the first time?
    fn take(&mut self, sender: PeerId, now: u64) -> (bool, bool) {
        let first = !self.seeders.contains_key(&sender);
        if first && self.seeders.len() >= WATCHED {
            let oldest = self.seeders.iter().min_by_key(|(_, (_, at))| *at).map(|(peer, _)| *peer);
            oldest.and_then(|peer| self.seeders.remove(&peer));
        }
        let (tokens, at) = self.seeders.entry(sender).or_insert((BURST, now));
        // Milliseconds since the last one, at most a minute, are exact in a float.
        let passed = u32::try_from(now.saturating_sub(*at).min(600_000)).unwrap_or(0);
        *tokens = (*tokens + f64::from(passed) * PER_MS).min(BURST);
        *at = now;
        let enough = *tokens >= 1.0;
        if enough {
            *tokens -= 1.0;
        }
        (enough, first)
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
        let taken = (0..1000).filter(|_| rates.take(peer(1), 0).0).count();
        assert_eq!(taken, 240);
        assert!(rates.take(peer(1), 1000).0, "two more each second");
        for n in 0..5000 {
            rates.take(peer(n), 2000);
        }
        assert_eq!(rates.seeders.len(), WATCHED);
    }
}
