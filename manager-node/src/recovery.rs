//! After a restore from a backup: what this manager revoked since then it no longer knows, but its seeders do, in epochs
//! that it signed itself. It asks them, and says in its new chain again what it finds. Without this, a seeder that joins
//! later would never hear of those revocations.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use node::{Protocol, Supervisor};
use protocol::api::{SEEDER_PROTOCOL, SeederRequest, SeederResponse};
use protocol::trust::{KeyPurpose, RevocationEpoch, Revocations as Added};
use protocol::{PeerAddrs, PeerId, RefusalCode};
use store::StoreError;

use crate::context::{Context, now_ms};
use crate::tables::MANAGER;
use crate::{audit, catalogue, placement};

const PROTOCOL: Protocol = Protocol::new(SEEDER_PROTOCOL);
/// A page of epochs is at most half a MiB.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Seeders asked at the same time.
const AT_ONCE: usize = 8;
/// Seeders looked up at once.
const PAGE: usize = 256;
/// Epochs taken from one seeder: a thousand revocations each, far more than lie between a backup and its restore.
const MAX_EPOCHS: usize = 4096;
/// Between two rounds over those that did not answer.
const PAUSE: Duration = Duration::from_secs(5);
/// Seeders that have not answered by then are not waited for, milliseconds: what they alone knew is lost.
const GIVE_UP_MS: u64 = 2 * 24 * 60 * 60 * 1000;

/// Asks in the background, where there was a restore after which nobody has been asked yet.
pub(crate) fn start(ctx: &Arc<Context>, supervisor: &Supervisor) {
    let (ctx, watched) = (Arc::clone(ctx), supervisor.clone());
    supervisor.spawn("revocations from before a restore", async move {
        let token = watched.token();
        tokio::select! {
            done = recover(&ctx) => if let Err(error) = done {
                watched.fail(format!("revocations from before a restore are not stored: {error}"));
            },
            () = token.cancelled() => {}
        }
    });
}

async fn recover(ctx: &Context) -> Result<(), StoreError> {
    let recovered = ctx.db.read(|txn| MANAGER.get(txn, &()))?.unwrap_or_default().recovered;
    if recovered >= ctx.restore {
        return Ok(());
    }
    let (mut answered, mut found) = (HashSet::new(), 0);
    let give_up = ctx.started_at.saturating_add(GIVE_UP_MS);
    loop {
        let (waiting, all) = not_yet(ctx, &answered)?;
        for some in waiting.chunks(AT_ONCE) {
            let told = futures::future::join_all(some.iter().map(|seeder| ask(ctx, seeder))).await;
            for (seeder, told) in some.iter().zip(told) {
                if told.whole {
                    answered.insert(seeder.peer);
                }
                found += take(ctx, told.epochs).await?;
            }
        }
        if (answered.len() >= all && all > 0) || now_ms() > give_up {
            break;
        }
        tokio::time::sleep(PAUSE).await;
    }
    let restore = ctx.restore;
    ctx.db
        .write(move |txn| {
            let mut record = MANAGER.get(txn, &())?.unwrap_or_default();
            record.recovered = restore;
            MANAGER.put(txn, &(), &record)
        })
        .await?;
    tracing::info!(
        seeders = answered.len(),
        revocations = found,
        "seeders were asked for revocations before the restore"
    );
    Ok(())
}

/// Seeders with an address that have not answered, and how many seeders could answer in all.
fn not_yet(ctx: &Context, answered: &HashSet<PeerId>) -> Result<(Vec<PeerAddrs>, usize), StoreError> {
    let (mut waiting, mut all, mut after) = (Vec::new(), 0, None);
    loop {
        let page = ctx.registry.seeders(after, PAGE)?;
        let full = page.len() == PAGE;
        for (peer, record) in page {
            after = Some(peer);
            // Never reported: it was enrolled and has heard of nothing.
            if record.last_report == 0 || ctx.revocations.with(|revoked| revoked.has_peer(&peer)) {
                continue;
            }
            all += 1;
            if !answered.contains(&peer) {
                waiting.push(PeerAddrs::new(peer, record.addrs));
            }
        }
        if !full {
            return Ok((waiting, all));
        }
    }
}

/// What a seeder has told.
#[derive(Default)]
struct Told {
    epochs: Vec<RevocationEpoch>,
    /// It is to be asked for no more.
    whole: bool,
}

/// The epochs that a seeder has after the last one that this manager knows of the time before.
async fn ask(ctx: &Context, seeder: &PeerAddrs) -> Told {
    let mut told = Told::default();
    let Ok(mut after) = ctx.revocations.before_restore(ctx.restore) else { return told };
    let mut passed = 0;
    loop {
        let request = SeederRequest::Epochs { after };
        match ctx.node.call::<_, SeederResponse>(seeder, PROTOCOL, &request, CALL_TIMEOUT).await {
            Ok(SeederResponse::Epochs(page)) => {
                let (trust, before) = (ctx.trust(), after);
                for signed in page {
                    let opened = trust.open(&signed, KeyPurpose::Revocation, |epoch| epoch.at, now_ms());
                    let number = signed.peek().map_or(0, |epoch: RevocationEpoch| epoch.number);
                    // From there on it is what this manager says itself.
                    if number <= after || number >= ctx.restore || passed >= MAX_EPOCHS {
                        told.whole = true;
                        return told;
                    }
                    match opened {
                        Ok(epoch) => told.epochs.push(epoch),
                        // The backup may be from before that key: the key set that names it will be shown.
                        Err(refusal) if refusal.code == RefusalCode::UnknownKey => return told,
                        // A void key says nothing; where it was given up, the chain that was begun then says all of it again.
                        Err(_) => {}
                    }
                    (after, passed) = (number, passed + 1);
                }
                if after == before {
                    told.whole = true;
                    return told;
                }
            }
            Ok(_) => {
                told.whole = true;
                return told;
            }
            Err(error) => {
                tracing::debug!(peer = %seeder.peer, %error, "not asked for revocations yet");
                return told;
            }
        }
    }
}

/// Says again what is not known here. Gives how many revocations that were.
async fn take(ctx: &Context, epochs: Vec<RevocationEpoch>) -> Result<usize, StoreError> {
    let mut found = 0;
    for epoch in epochs {
        let fresh = ctx.revocations.fresh(epoch.added);
        if fresh.is_empty() {
            continue;
        }
        let Added { transactions, peers, contents, moved } = &fresh;
        found += transactions.len() + peers.len() + contents.len() + moved.len();
        for content in contents {
            withdraw(ctx, content).await?;
        }
        let lines: Vec<String> = transactions
            .iter()
            .map(|id| format!("transaction {id}"))
            .chain(peers.iter().map(|peer| format!("peer {peer}")))
            .chain(contents.iter().map(|content| format!("content {content}")))
            .chain(moved.iter().map(|m| format!("transaction {} before generation {}", m.transaction, m.generation)))
            .collect();
        let (number, now) = (epoch.number, now_ms());
        ctx.db
            .write(move |txn| {
                lines.iter().try_for_each(|line| {
                    audit::note(txn, now, "recovered", line, format!("revoked by epoch {number}, before the restore"))
                })
            })
            .await?;
        tracing::warn!(epoch = number, "revocations from before the restore are said again: see the audit log");
        ctx.revocations.revoke(fresh).await?;
    }
    Ok(found)
}

/// What was taken down is on sale again, by the backup.
async fn withdraw(ctx: &Context, content: &protocol::ContentId) -> Result<(), StoreError> {
    let Some(id) = ctx.catalogue.product_by_content(content)? else { return Ok(()) };
    ctx.db
        .write(move |txn| {
            let manifest = crate::tables::PRODUCTS.get(txn, &id)?.map(|record| record.manifest);
            catalogue::withdraw(txn, &id)?;
            manifest.map(|manifest| placement::cancel(txn, &manifest)).transpose().map(drop)
        })
        .await
}
