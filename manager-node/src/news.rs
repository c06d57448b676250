//! What the manager says to the whole mesh and hears from it: heartbeats, key sets and revocation epochs go out, batches
//! of receipts come in. Gossip confirms nothing, so everything here can also be asked for or sent directly.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use node::{GossipMessage, NodeHandle, PublishError, SubscribeError, Supervisor};
use protocol::api::{self, GossipedBatch, News, is_to_blame};
use protocol::codec;
use protocol::trust::{Heartbeat, KeyPurpose};
use protocol::{NetworkId, RefusalCode, Signed};
use store::StoreError;

use crate::audit;
use crate::context::{Context, now_ms};
use crate::newer_keys;
use crate::receipts;
use crate::tables::MANAGER;

/// News waiting to be judged: heartbeats and epochs are few, marks of other managers a handful a second.
const NEWS_QUEUE: usize = 256;
/// A heartbeat that nobody heard, as after a start, is followed by the next one so soon.
const UNHEARD: Duration = Duration::from_secs(10);
/// Batches of one shard waiting to be judged; at 64 KiB each this is 4 MiB a shard. Further ones are not forwarded, and
/// their seeders send them directly.
const BATCH_QUEUE: usize = 64;

/// Publishes news. Best effort: whoever misses it asks for it or hears the next.
pub(crate) async fn publish(node: &NodeHandle, network: &NetworkId, news: &News) -> bool {
    match node.publish(&api::news_topic(network), codec::encode(news)).await {
        // Nobody to hear it, or everybody has: both are ordinary.
        Ok(()) | Err(PublishError::Duplicate) => return true,
        Err(PublishError::NoPeers) => {}
        Err(error) => tracing::debug!(%error, "news not published"),
    }
    false
}

/// Subscribes to everything and starts the loops.
pub(crate) async fn start(ctx: &Arc<Context>, supervisor: &Supervisor) -> Result<(), SubscribeError> {
    let (trust, network) = (ctx.trust(), ctx.network());
    let mut news = ctx.node.subscribe(&api::news_topic(&network), NEWS_QUEUE).await?;
    let (hearing, token) = (Arc::clone(ctx), supervisor.token());
    supervisor.spawn("news", async move {
        loop {
            let message = tokio::select! {
                message = news.next() => message,
                () = token.cancelled() => return,
            };
            match message {
                Some(message) => hear(&hearing, message).await,
                None => return,
            }
        }
    });
    for shard in 0..trust.key_set().gossip_shards.max(1) {
        let mut batches = ctx.node.subscribe(&api::receipts_topic_of_shard(&network, shard), BATCH_QUEUE).await?;
        let (ctx, token) = (Arc::clone(ctx), supervisor.token());
        supervisor.spawn(format!("receipts shard {shard}"), async move {
            loop {
                let message = tokio::select! {
                    message = batches.next() => message,
                    () = token.cancelled() => return,
                };
                match message {
                    Some(message) => take_batch(&ctx, message).await,
                    None => return,
                }
            }
        });
    }
    let (ctx, token) = (Arc::clone(ctx), supervisor.token());
    supervisor.spawn_critical("heartbeat", async move {
        let pause = Duration::from_millis(ctx.config.heartbeat_ms);
        loop {
            let heard = beat(&ctx).await.unwrap_or_else(|error| {
                tracing::error!(%error, "no heartbeat");
                true
            });
            // The first seeder that is back passes it on to all who wait for this manager.
            let pause = if heard { pause } else { pause.min(UNHEARD) };
            tokio::select! {
                () = token.cancelled() => return Ok::<(), StoreError>(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
    Ok(())
}

/// Signs, stores and publishes a heartbeat, and with it what newcomers need. False when nobody heard it.
pub(crate) async fn beat(ctx: &Context) -> Result<bool, StoreError> {
    let trust = ctx.trust();
    // A key dies while the manager runs, and a crash may have come between a new key set and this.
    ctx.revocations.renew(&trust, now_ms()).await?;
    let signed = sign_heartbeat(ctx)?;
    let stored = signed.clone();
    ctx.db
        .write(move |txn| {
            let mut record = MANAGER.get(txn, &())?.unwrap_or_default();
            record.heartbeat = Some(stored.clone());
            MANAGER.put(txn, &(), &record)
        })
        .await?;
    ctx.refresh_addresses().await;
    publish(&ctx.node, &trust.network(), &News::KeySet(trust.signed_key_set().clone())).await;
    if let Some(epoch) = ctx.revocations.newest()? {
        publish(&ctx.node, &trust.network(), &News::Epoch(epoch)).await;
    }
    Ok(publish(&ctx.node, &trust.network(), &News::Heartbeat(signed)).await)
}

/// The time of the next heartbeat after one of `last`, by a clock that shows `now`. No two have the same time, and a later one
/// never says less than an earlier one: seeders take either for a sign that the manager says different things to different
/// nodes. But a clock that was further ahead than anybody takes, and was put back, is right now: what it said was not taken
/// by those whose clocks are good, and to go on from there would make all of them look wrong.
fn next_beat(last: u64, now: u64, grace_ms: u64) -> u64 {
    if last.saturating_sub(now) > grace_ms { now } else { now.max(last.saturating_add(1)) }
}

/// For so long the last heartbeat is given again where another one would say the same. Anybody may ask: with a time of its
/// own for each answer, whoever asks more than once a millisecond would set the heartbeats' time ahead of the clock.
const SAME_BEAT_MS: u64 = 50;

/// A heartbeat of this moment.
pub(crate) fn sign_heartbeat(ctx: &Context) -> Result<Signed<Heartbeat>, StoreError> {
    let mut last = ctx.last_beat.lock().unwrap_or_else(PoisonError::into_inner);
    let (trust, now) = (ctx.trust(), now_ms());
    let before = last.as_ref().and_then(|signed| signed.peek().ok());
    let heartbeat = Heartbeat {
        network: trust.network(),
        at: next_beat(before.as_ref().map_or(0, |before| before.at), now, trust.grace_ms()),
        epoch: ctx.revocations.number(),
        key_set_version: trust.key_set().version,
        key_set: trust.signed_key_set().digest(),
        restore: ctx.restore,
        audit: ctx.db.read(audit::head)?,
    };
    if let (Some(signed), Some(before)) = (&*last, before)
        && (before.at..=before.at.saturating_add(SAME_BEAT_MS)).contains(&heartbeat.at)
        && before == (Heartbeat { at: before.at, ..heartbeat.clone() })
    {
        return Ok(signed.clone());
    }
    let signed = ctx.keys.sign(KeyPurpose::Revocation, &heartbeat);
    *last = Some(signed.clone());
    Ok(signed)
}

/// Judges news that passes through: what the network's keys did not sign is not forwarded.
async fn hear(ctx: &Arc<Context>, message: GossipMessage) {
    let (trust, now) = (ctx.trust(), now_ms());
    let Ok(news) = codec::decode::<News>(&message.data) else { return message.reject() };
    let verdict = match news {
        News::Heartbeat(signed) => trust.open(&signed, KeyPurpose::Revocation, |h| h.at, now).map(drop),
        News::Mark(signed) => trust.open(&signed, KeyPurpose::Settlement, |m| m.at, now).map(drop),
        News::KeySet(signed) => match trust.verify_key_set(&signed) {
            // One that this manager forgot, perhaps. It is good, whatever comes of it here.
            Ok(()) => {
                if let Err(refusal) = newer_keys::shown(ctx, signed).await {
                    tracing::error!(%refusal, "a key set of the mesh could not be followed");
                }
                Ok(())
            }
            Err(refusal) => Err(refusal),
        },
        News::Epoch(signed) => match trust.open(&signed, KeyPurpose::Revocation, |e| e.at, now) {
            Ok(epoch) => {
                if epoch.number > ctx.revocations.number() && epoch.network == trust.network() {
                    let number = epoch.number;
                    match ctx.revocations.adopt(epoch, signed).await {
                        Ok(true) => tracing::warn!(number, "took back a revocation epoch from before a restore"),
                        Ok(false) => tracing::error!(number, "the mesh knows a revocation epoch that does not follow"),
                        Err(error) => tracing::error!(number, %error, "a revocation epoch could not be stored"),
                    }
                }
                Ok(())
            }
            Err(refusal) => Err(refusal),
        },
    };
    match verdict {
        Ok(()) => message.accept(),
        Err(refusal) => {
            tracing::debug!(from = %message.from, code = %refusal.code, "news not forwarded");
            // By a key that was given up since: not everybody has heard of that. By one that is unknown to its manager nobody
            // passes anything on.
            if refusal.code == RefusalCode::KeyRetired { message.ignore() } else { message.reject() }
        }
    }
}

async fn take_batch(ctx: &Arc<Context>, message: GossipMessage) {
    let Ok(gossiped) = codec::decode::<GossipedBatch>(&message.data) else {
        return message.reject();
    };
    let trust = ctx.trust();
    let judged = ctx.revocations.with(|revoked| gossiped.check(&message.topic, &trust, revoked, now_ms()));
    let seeder = match judged {
        Ok(seeder) => seeder,
        Err(refusal) => {
            tracing::debug!(from = %message.from, code = %refusal.code, "batch not forwarded");
            return if is_to_blame(refusal.code) { message.reject() } else { message.ignore() };
        }
    };
    match receipts::accept_gossiped(ctx, seeder, gossiped.batch, now_ms()).await {
        Ok(Some(mark)) => {
            message.accept();
            publish(&ctx.node, &ctx.network(), &News::Mark(mark)).await;
        }
        Ok(None) => message.ignore(),
        Err(refusal) => {
            let (code, detail) = (refusal.code, refusal.detail);
            match code {
                RefusalCode::BadReceipt | RefusalCode::Malformed => {
                    tracing::warn!(%seeder, %code, detail, "a seeder's batch is not good");
                }
                _ => tracing::debug!(%seeder, %code, detail, "batch not taken"),
            }
            // What is wrong now is inside of it, or in what came before: nobody on the way could see that.
            message.ignore();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::next_beat;

    #[test]
    fn heartbeats_go_forward_and_follow_a_clock_that_was_put_right() {
        const GRACE: u64 = 5_000;
        assert_eq!(next_beat(0, 1_000, GRACE), 1_000);
        assert_eq!(next_beat(1_000, 1_000, GRACE), 1_001, "no two of one time");
        assert_eq!(next_beat(1_000 + GRACE, 1_000, GRACE), 1_001 + GRACE, "seeders may have taken it");
        assert_eq!(next_beat(1_001 + GRACE, 1_000, GRACE), 1_000, "they did not");
    }
}
