//! After a restore from a backup: what this manager revoked since then it no longer knows, but its seeders do, in epochs
//! that it signed itself. It asks them, and says in its new chain again what it finds. Without this, a seeder that joins
//! later would never hear of those revocations. Until some have answered it sells nothing and gives out no ticket and no
//! key: it would sell what was taken down, and give the key to whoever has the money back.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use node::{Protocol, Supervisor};
use protocol::api::{SEEDER_PROTOCOL, SeederRequest, SeederResponse};
use protocol::trust::{KeyPurpose, RevocationEpoch, Revocations as Added};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode};
use store::{Db, StoreError};

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
/// The same while nothing is sold for want of an answer.
const SOON: Duration = Duration::from_secs(1);
/// So many answers are waited for where more seeders could give one that does not come at once: a single one could lie.
const ENOUGH: usize = 3;
/// Pause before a shop or a client asks again.
const ASK_AGAIN_MS: u64 = 1000;
const NOT_RECALLED: &str = "this manager came back from a backup, and no seeder has told it yet what it had revoked since; \
                            until then it sells nothing and gives out no ticket and no key";
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

/// Was everybody asked after this restore?
pub(crate) fn is_done(db: &Db, restore: u64) -> Result<bool, StoreError> {
    Ok(db.read(|txn| MANAGER.get(txn, &()))?.unwrap_or_default().recovered >= restore)
}

impl Context {
    /// # Errors
    /// `overloaded`, with a time to come back, between a restore and the first answers of seeders.
    pub(crate) fn knows_what_it_revoked(&self) -> Result<(), Refusal> {
        match self.recalled.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(Refusal::new(RefusalCode::Overloaded, NOT_RECALLED).retry_after(ASK_AGAIN_MS)),
        }
    }

    /// Why this manager sells nothing after a restore.
    pub(crate) fn recall_trouble(&self) -> Option<String> {
        self.knows_what_it_revoked().err().map(|_| {
            format!("{NOT_RECALLED}; start seeders, or revoke those that are gone for good (`willcall manager revoke seeder`)")
        })
    }
}

async fn recover(ctx: &Context) -> Result<(), StoreError> {
    if is_done(&ctx.db, ctx.restore)? {
        return Ok(());
    }
    let recall = || {
        if !ctx.recalled.swap(true, Ordering::AcqRel) {
            tracing::info!("seeders told what was revoked since the backup, or there are none: it sells again");
        }
    };
    let (mut answered, mut found) = (HashSet::new(), 0);
    loop {
        let Asked { waiting, all, others } = not_yet(ctx, &answered)?;
        for some in waiting.chunks(AT_ONCE) {
            let told = futures::future::join_all(some.iter().map(|seeder| ask(ctx, seeder))).await;
            for (seeder, told) in some.iter().zip(told) {
                if told.whole {
                    answered.insert(seeder.peer);
                }
                found += take(ctx, told.epochs).await?;
            }
            if told_by_others(ctx, &answered) >= ENOUGH {
                recall();
            }
        }
        // All of them were asked now.
        let heard = others == 0 || told_by_others(ctx, &answered) > 0;
        let over = ctx.running_ms() > GIVE_UP_MS;
        if heard || over {
            recall();
        }
        if (answered.len() >= all && all > 0) || over {
            break;
        }
        tokio::time::sleep(if heard { PAUSE } else { SOON }).await;
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

/// Seeders whose memory is their own: the origin's may have been put back from the same backup.
fn told_by_others(ctx: &Context, answered: &HashSet<PeerId>) -> usize {
    let origin = ctx.registry.origin();
    answered.iter().filter(|peer| Some(**peer) != origin).count()
}

/// Who is to be asked.
#[derive(Default)]
struct Asked {
    /// Seeders that have not answered.
    waiting: Vec<PeerAddrs>,
    /// Seeders that could answer.
    all: usize,
    /// Of these, those beside the origin.
    others: usize,
}

fn not_yet(ctx: &Context, answered: &HashSet<PeerId>) -> Result<Asked, StoreError> {
    let (mut asked, mut after, origin) = (Asked::default(), None, ctx.registry.origin());
    loop {
        let page = ctx.registry.seeders(after, PAGE)?;
        let full = page.len() == PAGE;
        for (peer, record) in page {
            after = Some(peer);
            // Never reported: it was enrolled and has heard of nothing.
            if record.last_report == 0 || ctx.revocations.with(|revoked| revoked.has_peer(&peer)) {
                continue;
            }
            asked.all += 1;
            asked.others += usize::from(Some(peer) != origin);
            if !answered.contains(&peer) {
                asked.waiting.push(PeerAddrs::new(peer, record.addrs));
            }
        }
        if !full {
            return Ok(asked);
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
