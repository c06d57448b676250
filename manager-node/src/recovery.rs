//! After a restore from a backup: what this manager revoked since then it no longer knows, but its seeders do, in epochs
//! that it signed itself. It asks them, and says in its new chain again what it finds. Without this, a seeder that joins
//! later would never hear of those revocations. Until some have answered it sells nothing and gives out no ticket and no
//! key: it would sell what was taken down, and give the key to whoever has the money back.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

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
/// Pages of epochs that one seeder is asked for before what it said is taken, and others have their turn. Most epochs name
/// one sale: thousands of them may have been made between a backup and its restore.
const PIECE: usize = 64;
/// The same for one that takes its time.
const PIECE_TIME: Duration = CALL_TIMEOUT;
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
        let (token, mesh) = (watched.token(), Mesh(&ctx));
        tokio::select! {
            done = recover(&ctx, &mesh) => if let Err(error) = done {
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

/// Whom it asks, and how long it waits in between.
trait Seeders: Sync {
    /// The epochs that a seeder has after the given number; none where it does not say.
    fn epochs(&self, seeder: &PeerAddrs, after: u64) -> impl Future<Output = Option<SeederResponse>> + Send;
    /// Between two rounds; `heard` once somebody has answered.
    fn pause(&self, heard: bool) -> impl Future<Output = ()> + Send;
}

/// Those of the mesh.
struct Mesh<'a>(&'a Context);

impl Seeders for Mesh<'_> {
    async fn epochs(&self, seeder: &PeerAddrs, after: u64) -> Option<SeederResponse> {
        let answer = self.0.node.call(seeder, PROTOCOL, &SeederRequest::Epochs { after }, CALL_TIMEOUT).await;
        answer.inspect_err(|error| tracing::debug!(peer = %seeder.peer, %error, "not asked for revocations yet")).ok()
    }

    async fn pause(&self, heard: bool) {
        tokio::time::sleep(if heard { PAUSE } else { SOON }).await;
    }
}

async fn recover(ctx: &Context, seeders: &impl Seeders) -> Result<(), StoreError> {
    if is_done(&ctx.db, ctx.restore)? {
        return Ok(());
    }
    let recall = || {
        if !ctx.recalled.swap(true, Ordering::AcqRel) {
            tracing::info!("seeders told what was revoked since the backup, or there are none: it sells again");
        }
    };
    let (mut answered, mut found) = (HashSet::new(), 0);
    // How far each of the others was heard.
    let mut places: HashMap<PeerId, u64> = HashMap::new();
    // The last forgotten epoch whose number the new chain would come to.
    let mut above = 0;
    loop {
        let Asked { waiting, all, others } = not_yet(ctx, &answered)?;
        let over = ctx.running_ms() > GIVE_UP_MS;
        if over || (waiting.is_empty() && all > 0) {
            break;
        }
        let mut more = false;
        for some in waiting.chunks(AT_ONCE) {
            let asking = some.iter().map(|seeder| ask(ctx, seeders, seeder, places.get(&seeder.peer).copied()));
            let told = futures::future::join_all(asking).await;
            let mut heard_whole = false;
            for (seeder, told) in some.iter().zip(told) {
                if told.whole {
                    answered.insert(seeder.peer);
                    heard_whole = true;
                } else if let Some(after) = told.after {
                    places.insert(seeder.peer, after);
                    // The newest come last. What counts for nothing could come without end: a later round will do.
                    more |= !told.epochs.is_empty();
                }
                above = told.epochs.last().map_or(above, |epoch| above.max(epoch.number));
                found += take(ctx, told.epochs).await?;
            }
            // Not for each piece: a new chain says everything again.
            if heard_whole {
                begin_above(ctx, above).await?;
            }
            if told_by_others(ctx, &answered) >= ENOUGH {
                recall();
            }
        }
        // Some have not said all, and go on at once. Those that never come to an end are not waited for any more once so many
        // others have told everything.
        if more {
            continue;
        }
        // All of them were asked now.
        let heard = others == 0 || told_by_others(ctx, &answered) > 0;
        if heard {
            recall();
        }
        if waiting.is_empty() || waiting.iter().any(|seeder| !answered.contains(&seeder.peer)) {
            seeders.pause(heard).await;
        }
    }
    begin_above(ctx, above).await?;
    recall();
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
    // One that was revoked since is a witness no longer.
    let counts = |peer: &&PeerId| Some(**peer) != origin && !ctx.revocations.with(|revoked| revoked.has_peer(peer));
    answered.iter().filter(counts).count()
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
    /// The last one that was looked at; none where nothing was.
    after: Option<u64>,
    /// It is to be asked for no more.
    whole: bool,
}

/// Some of the epochs that a seeder has after `from`, or after the last one that this manager knows of the time before.
async fn ask(ctx: &Context, seeders: &impl Seeders, seeder: &PeerAddrs, from: Option<u64>) -> Told {
    let mut told = Told { after: from, ..Told::default() };
    let before = ctx.revocations.before_restore(ctx.restore);
    let Some(mut after) = from.or_else(|| before.ok()) else { return told };
    let began = Instant::now();
    for _ in 0..PIECE {
        if began.elapsed() >= PIECE_TIME {
            break;
        }
        let page = match seeders.epochs(seeder, after).await {
            Some(SeederResponse::Epochs(page)) => page,
            Some(answer) => {
                // It may know of some all the same: its database failed, or it is overloaded.
                tracing::debug!(peer = %seeder.peer, ?answer, "not told of revocations yet");
                return told;
            }
            None => return told,
        };
        let (trust, last) = (ctx.trust(), after);
        for signed in page {
            let opened = trust.open(&signed, KeyPurpose::Revocation, |epoch| epoch.at, now_ms());
            let number = signed.peek().map_or(0, |epoch: RevocationEpoch| epoch.number);
            if number <= after {
                told.whole = true;
                return told;
            }
            // From a restore on most of it is what this manager says itself. Not all, where epochs of the time before were
            // more than there were seconds.
            let own = number >= ctx.restore && ctx.revocations.has_made(number, &signed).unwrap_or(false);
            match opened {
                Ok(_) if own => {}
                Ok(epoch) => told.epochs.push(epoch),
                // The backup may be from before that key: the key set that names it will be shown.
                Err(refusal) if refusal.code == RefusalCode::UnknownKey => return told,
                // A void key says nothing; where it was given up, the chain that was begun then says all of it again.
                Err(_) => {}
            }
            after = number;
            told.after = Some(after);
        }
        if after == last {
            told.whole = true;
            return told;
        }
    }
    told
}

/// Says again what is not known here. Gives how many revocations that were.
async fn take(ctx: &Context, epochs: Vec<RevocationEpoch>) -> Result<usize, StoreError> {
    let (mut all, mut lines) = (Added::default(), Vec::new());
    let mut last = None;
    for epoch in epochs {
        let (number, fresh) = (epoch.number, ctx.revocations.fresh(epoch.added));
        last = Some(number);
        let Added { transactions, peers, contents, moved } = fresh;
        let names = (transactions.iter().map(|id| format!("transaction {id}")))
            .chain(peers.iter().map(|peer| format!("peer {peer}")))
            .chain(contents.iter().map(|content| format!("content {content}")))
            .chain(moved.iter().map(|m| format!("transaction {} before generation {}", m.transaction, m.generation)));
        lines.extend(names.map(|name| (name, number)));
        all.transactions.extend(transactions);
        all.peers.extend(peers);
        all.contents.extend(contents);
        all.moved.extend(moved);
    }
    let found = lines.len();
    if found > 0 {
        for content in &all.contents {
            withdraw(ctx, content).await?;
        }
        let now = now_ms();
        ctx.db
            .write(move |txn| {
                lines.iter().try_for_each(|(name, number)| {
                    audit::note(txn, now, "recovered", name, format!("revoked by epoch {number}, before the restore"))
                })
            })
            .await?;
        tracing::warn!(epoch = last, "revocations from before the restore are said again: see the audit log");
        // Together: an epoch that names one sale has most of its size beside it.
        ctx.revocations.revoke(all).await?;
    }
    Ok(found)
}

/// Seeders that hold a forgotten epoch would take nothing more of a chain that counts up to there from below.
async fn begin_above(ctx: &Context, last: u64) -> Result<(), StoreError> {
    if last < ctx.restore {
        return Ok(());
    }
    ctx.revocations.begin_above(last).await
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use std::sync::Mutex;

    use protocol::api::SeederReport;
    use protocol::trust::RevocationState;
    use protocol::{Digest, Signed, TransactionId};
    use tokio::sync::{Notify, watch};

    use super::*;
    use crate::sales::tests::shop::{Shop, Terms, random_key};

    /// Seeders as what they say; who is not in it is away.
    struct Says<'a> {
        ctx: &'a Context,
        told: Mutex<HashMap<PeerId, SeederResponse>>,
        /// It sold before somebody had told all of it.
        early: Mutex<bool>,
        rounds: watch::Sender<usize>,
        next: Notify,
    }

    impl Says<'_> {
        fn new(ctx: &Context) -> Says<'_> {
            let (told, early) = (Mutex::default(), Mutex::default());
            Says { ctx, told, early, rounds: watch::Sender::new(0), next: Notify::new() }
        }

        fn tell(&self, peer: PeerId, says: SeederResponse) {
            self.told.lock().unwrap().insert(peer, says);
        }

        async fn round(&self, n: usize) {
            self.rounds.subscribe().wait_for(|rounds| *rounds == n).await.unwrap();
        }
    }

    impl Seeders for Says<'_> {
        async fn epochs(&self, seeder: &PeerAddrs, after: u64) -> Option<SeederResponse> {
            *self.early.lock().unwrap() |= self.ctx.recalled.load(Ordering::Acquire);
            let said = self.told.lock().unwrap().get(&seeder.peer)?.clone();
            let SeederResponse::Epochs(all) = said else { return Some(said) };
            let from = all.partition_point(|epoch| epoch.peek().unwrap().number <= after);
            Some(SeederResponse::Epochs(all[from..].iter().take(4).cloned().collect()))
        }

        async fn pause(&self, _heard: bool) {
            self.rounds.send_modify(|rounds| *rounds += 1);
            self.next.notified().await;
        }
    }

    /// A shop that came back from a backup, and whose first seeders had reported before.
    async fn restored(reported: usize) -> Shop {
        let shop = Shop::open(Terms::default()).await;
        for seeder in &shop.seeders[..reported] {
            let report = SeederReport { first: true, ..SeederReport::default() };
            shop.ctx.registry.report(seeder.peer_id(), report, now_ms()).await.unwrap();
        }
        let shop = Box::pin(shop.restored()).await;
        shop.ctx.recalled.store(false, Ordering::Release);
        shop
    }

    /// The epochs of a chain that the manager made and forgot.
    fn chain(ctx: &Context, first: u64, added: Vec<Added>) -> Vec<Signed<RevocationEpoch>> {
        let mut previous: Option<Digest> = None;
        let epochs = (first..).zip(added).map(|(number, added)| {
            let epoch = RevocationEpoch { network: ctx.network(), number, previous, at: now_ms(), added };
            let signed = ctx.keys.sign(KeyPurpose::Revocation, &epoch);
            previous = Some(signed.digest());
            signed
        });
        epochs.collect()
    }

    #[tokio::test]
    async fn everything_revoked_since_the_backup_is_heard_before_anything_is_sold() {
        let shop = restored(1).await;
        let (ctx, seeder) = (&*shop.ctx, shop.seeders[0].peer_id());
        let late = Added {
            transactions: vec![TransactionId::new(7, [7; 10])],
            peers: vec![shop.merchant.peer_id()],
            ..Added::default()
        };
        // Faster than seconds pass: the newest of them have numbers that the new chain would come to.
        let mut added = vec![Added::default(); 5000];
        added.push(late.clone());
        let forgotten = chain(ctx, ctx.restore - 3000, added);
        let mut held = RevocationState::default();
        for signed in &forgotten {
            held.apply(signed.digest(), &signed.peek().unwrap()).unwrap();
        }
        let says = Says::new(ctx);
        says.tell(seeder, SeederResponse::Epochs(forgotten));
        recover(ctx, &says).await.unwrap();
        assert!(!*says.early.lock().unwrap(), "it sold before it had heard the newest");
        assert!(ctx.recalled.load(Ordering::Acquire) && is_done(&ctx.db, ctx.restore).unwrap());
        assert_eq!(ctx.revocations.fresh(late), Added::default());
        // The seeder that holds them follows the manager again.
        for signed in ctx.revocations.after(held.number()).unwrap() {
            held.apply(signed.digest(), &signed.peek().unwrap()).unwrap();
        }
        assert_eq!(held.number(), ctx.revocations.number());
        shop.close().await;
    }

    #[tokio::test]
    async fn who_refused_or_was_away_is_asked_again_also_where_others_were_revoked_since() {
        let shop = restored(3).await;
        let ctx = &*shop.ctx;
        let [revoked, other, away] = [0, 1, 2].map(|n| shop.seeders[n].peer_id());
        let says = Says::new(ctx);
        let peers = |peer| Added { peers: vec![peer], ..Added::default() };
        for peer in [revoked, other] {
            says.tell(peer, SeederResponse::Epochs(chain(ctx, 1, vec![peers(revoked)])));
        }
        let alone = peers(shop.client.peer_id());
        let asking = async {
            says.round(1).await;
            assert!(ctx.revocations.with(|known| known.has_peer(&revoked)));
            says.tell(away, SeederResponse::Refused(Refusal::new(RefusalCode::Internal, "its database failed")));
            says.next.notify_one();
            says.round(2).await;
            assert!(!is_done(&ctx.db, ctx.restore).unwrap(), "nobody heard the third");
            says.tell(away, SeederResponse::Epochs(chain(ctx, 1, vec![peers(revoked), alone.clone()])));
            says.next.notify_one();
        };
        let (recovered, ()) = tokio::join!(recover(ctx, &says), asking);
        recovered.unwrap();
        assert_eq!(ctx.revocations.fresh(alone.clone()), Added::default());
        shop.close().await;
    }

    /// Says one epoch at a time without end; all others have nothing to tell.
    struct Endless<'a> {
        ctx: &'a Context,
        slow: PeerId,
        said: Mutex<u64>,
    }

    impl Seeders for Endless<'_> {
        async fn epochs(&self, seeder: &PeerAddrs, after: u64) -> Option<SeederResponse> {
            if seeder.peer != self.slow || self.ctx.recalled.load(Ordering::Acquire) {
                return Some(SeederResponse::Epochs(Vec::new()));
            }
            *self.said.lock().unwrap() += 1;
            assert!(*self.said.lock().unwrap() < 10_000, "one seeder keeps it from selling");
            Some(SeederResponse::Epochs(chain(self.ctx, after + 1, vec![Added::default()])))
        }

        async fn pause(&self, _heard: bool) {}
    }

    #[tokio::test]
    async fn one_seeder_that_tells_without_end_does_not_keep_it_from_selling() {
        let shop = restored(3).await;
        let (ctx, fourth) = (&*shop.ctx, random_key());
        shop.enrol_seeder(&fourth).await;
        let report = SeederReport { first: true, ..SeederReport::default() };
        ctx.registry.report(fourth.peer_id(), report, now_ms()).await.unwrap();
        let seeders = Endless { ctx, slow: shop.seeders[0].peer_id(), said: Mutex::default() };
        recover(ctx, &seeders).await.unwrap();
        assert!(*seeders.said.lock().unwrap() > 0 && is_done(&ctx.db, ctx.restore).unwrap());
        shop.close().await;
    }

    #[tokio::test]
    async fn a_refusal_is_no_answer_after_which_it_sells() {
        let shop = restored(1).await;
        let (ctx, seeder) = (&*shop.ctx, shop.seeders[0].peer_id());
        let says = Says::new(ctx);
        says.tell(seeder, SeederResponse::Refused(Refusal::new(RefusalCode::Overloaded, "later")));
        let asking = async {
            says.round(1).await;
            assert!(!ctx.recalled.load(Ordering::Acquire));
            says.tell(seeder, SeederResponse::Epochs(Vec::new()));
            says.next.notify_one();
        };
        let (recovered, ()) = tokio::join!(recover(ctx, &says), asking);
        recovered.unwrap();
        assert!(ctx.recalled.load(Ordering::Acquire));
        shop.close().await;
    }
}
