//! Copies of content at seeders: what `plan` finds missing is ordered, and whoever is to make a copy is nudged and told at
//! its next report.

mod again;
mod hash;
mod market;
mod plan;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod rest_tests;

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use node::prometheus_client::metrics::gauge::Gauge;
use node::{NodeHandle, Protocol, Supervisor};
use protocol::api::{MeshResponse, SEEDER_PROTOCOL, SeederRequest, SeederResponse};
use protocol::replication::{Placement, ReplicationOrder};
use protocol::trust::KeyPurpose;
use protocol::{Digest, PeerId, RefusalCode, Signed, TransactionId};
use rand::RngExt;
use store::{Db, StoreError};
use tokio::sync::{Notify, mpsc};

use crate::context::{Context, now_ms};
use crate::pricing;
use crate::tables::{
    HELD, HOLDERS, ORDERED, ORDERS, OrderRecord, OrderRef, PENDING, PRODUCT_OF_MANIFEST, PRODUCTS, ProductRecord,
};
use again::Next;
pub(crate) use plan::copies_of;
use plan::{Plan, Wanted, plan};

const PROTOCOL: Protocol = Protocol::new(SEEDER_PROTOCOL);
/// Sources in one placement: a replicating seeder uses a handful at once.
const PLACEMENT_SOURCES: usize = 16;
/// Seeders waiting to be nudged; further ones find their orders at their next regular report.
const NUDGES: usize = 1024;
/// Seeders nudged at once.
const NUDGES_AT_ONCE: usize = 16;
const NUDGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes beyond the content's length that one seeder may send for one order: chunks sent again after damage.
const ALLOWANCE_ROOM: u64 = 16 * 1024 * 1024;

/// Front of the placement tables and of the loop that keeps copies at their number.
pub(crate) struct Placements {
    db: Db,
    nudges: mpsc::Sender<PeerId>,
    wake: Arc<Notify>,
    /// The last look found no room for a copy that is missing, or is still under way.
    short: AtomicBool,
    /// Copies of contents that are missing for want of room, by the last look at everything: an entry for a content at most.
    lacking: Mutex<HashMap<Digest, usize>>,
    contents_short: Gauge,
    copies_short: Gauge,
    /// Looks since the start. Each goes over all seeders, products and copies.
    looks: AtomicU64,
}

impl Placements {
    pub(crate) fn new(db: Db, node: &NodeHandle) -> (Self, mpsc::Receiver<PeerId>) {
        let (nudges, receiver) = mpsc::channel(NUDGES);
        let metrics = node.metrics();
        let placements = Placements {
            db,
            nudges,
            wake: Arc::new(Notify::new()),
            short: AtomicBool::new(true),
            lacking: Mutex::default(),
            contents_short: metrics
                .gauge("contents_short_of_room", "Contents with fewer copies than there are to be for want of room"),
            copies_short: metrics.gauge("copies_short_of_room", "Copies that are missing for want of room"),
            looks: AtomicU64::new(0),
        };
        (placements, receiver)
    }

    /// How many contents have fewer copies than there are to be because no seeder has room, and how many copies that is.
    pub(crate) fn short_of_room(&self) -> (usize, usize) {
        let lacking = self.lock_lacking();
        (lacking.len(), lacking.values().sum())
    }

    /// How many copies of this content are missing for want of room.
    pub(crate) fn lacks_room(&self, manifest: &Digest) -> usize {
        self.lock_lacking().get(manifest).copied().unwrap_or(0)
    }

    fn lock_lacking(&self) -> MutexGuard<'_, HashMap<Digest, usize>> {
        self.lacking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down what a look at everything found, and says so when it begins and when it ends.
    fn note_lacking(&self, lacking: HashMap<Digest, usize>) {
        let (before, contents) = (self.lock_lacking().len(), lacking.len());
        let copies: usize = lacking.values().sum();
        *self.lock_lacking() = lacking;
        self.contents_short.set(i64::try_from(contents).unwrap_or(i64::MAX));
        self.copies_short.set(i64::try_from(copies).unwrap_or(i64::MAX));
        match (before, contents) {
            (0, 0) => {}
            (0, _) => tracing::warn!(
                contents,
                copies,
                "copies are missing because no seeder has room: more capacity or more seeders are needed"
            ),
            (_, 0) => tracing::info!("no copy is missing for want of room any more"),
            _ => {}
        }
    }

    /// A replication order by its id, also one that was fulfilled long ago.
    pub(crate) fn order(&self, id: &TransactionId) -> Result<Option<Signed<ReplicationOrder>>, StoreError> {
        Ok(self.db.read(|txn| ORDERS.get(txn, id))?.map(|record| record.signed))
    }

    /// Number of copies ordered and not yet held.
    pub(crate) fn pending(&self) -> Result<u64, StoreError> {
        self.db.read(|txn| PENDING.len(txn))
    }

    /// Asks a seeder to report now. Best effort: it reports regularly anyway.
    pub(crate) fn nudge(&self, peer: PeerId) {
        if self.nudges.try_send(peer).is_err() {
            tracing::debug!(%peer, "nudge left out, too many are waiting");
        }
    }

    /// Looks for content with too few copies now instead of at the next regular time.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// A seeder has room that it had not, which matters only while a copy is missing for want of room. A look costs as
    /// much as there are seeders and copies, and each of the seeders reports every half minute: looking at each report
    /// would cost the square of their number.
    pub(crate) fn room_gained(&self) {
        if self.short.load(Relaxed) {
            self.wake();
        }
    }

    #[cfg(test)]
    pub(crate) fn looks(&self) -> u64 {
        self.looks.load(Relaxed)
    }
}

/// Starts the loop that keeps copies at their number, and the one that nudges seeders.
pub(crate) fn start(ctx: &Arc<Context>, supervisor: &Supervisor, nudges: mpsc::Receiver<PeerId>) {
    let (balancing, token) = (Arc::clone(ctx), supervisor.token());
    supervisor.spawn_critical("placement", async move {
        let pause = Duration::from_millis(balancing.config.placement_ms);
        loop {
            if let Err(error) = balance(&balancing, now_ms()).await {
                tracing::warn!(%error, "placement failed, it is tried again later");
            }
            tokio::select! {
                () = token.cancelled() => return Ok::<(), StoreError>(()),
                () = balancing.placements.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    });
    let (ctx, token) = (Arc::clone(ctx), supervisor.token());
    supervisor.spawn("nudges", async move {
        let waiting = futures::stream::unfold(nudges, |mut nudges| async { Some((nudges.recv().await?, nudges)) });
        let all = waiting.for_each_concurrent(NUDGES_AT_ONCE, |peer| nudge_one(&ctx, peer));
        tokio::select! {
            () = all => {}
            () = token.cancelled() => {}
        }
    });
}

async fn nudge_one(ctx: &Context, peer: PeerId) {
    let addrs = match ctx.registry.addresses(&peer) {
        Ok(addrs) => addrs,
        Err(error) => return tracing::warn!(%peer, %error, "seeder not nudged"),
    };
    let call = ctx.node.call::<_, SeederResponse>(&addrs, PROTOCOL, &SeederRequest::Nudge, NUDGE_TIMEOUT);
    match call.await {
        Ok(SeederResponse::Noted) => tracing::debug!(%peer, "seeder nudged"),
        Ok(SeederResponse::Refused(refusal)) => tracing::info!(%peer, code = %refusal.code, "seeder refused a nudge"),
        Ok(SeederResponse::Epochs(_)) => tracing::info!(%peer, "seeder answered a nudge with something else"),
        Err(error) => tracing::debug!(%peer, %error, "seeder not nudged"),
    }
}

/// Seeders at which a look at this moment finds a copy to be made, or found one.
#[cfg(test)]
pub(crate) fn wanted_at(ctx: &Context, now: u64) -> Result<HashSet<PeerId>, StoreError> {
    let mut peers: HashSet<PeerId> = plan(ctx, now)?.wanted.iter().map(|wanted| wanted.peer).collect();
    ctx.db.read(|txn| {
        PENDING.scan::<StoreError>(txn, .., |(peer, _), _| {
            peers.insert(peer);
            Ok(ControlFlow::Continue(()))
        })
    })?;
    Ok(peers)
}

/// Copies that a look at this moment finds missing for want of room.
#[cfg(test)]
pub(crate) fn lacking_at(ctx: &Context, now: u64) -> Result<HashMap<Digest, usize>, StoreError> {
    Ok(plan(ctx, now)?.lacking)
}

/// Orders the copies that are missing, and nudges those who are to make them.
async fn balance(ctx: &Arc<Context>, now: u64) -> Result<(), StoreError> {
    let planning = Arc::clone(ctx);
    // Before the look: room that is gained during it may not be seen by it.
    ctx.placements.short.store(true, Relaxed);
    ctx.placements.looks.fetch_add(1, Relaxed);
    let Plan { wanted, stale, forgotten, lacking, cut } = tokio::task::spawn_blocking(move || plan(&planning, now))
        .await
        .map_err(|e| StoreError::Panicked(e.to_string()))??;
    ctx.placements.short.store(cut || !lacking.is_empty(), Relaxed);
    if cut {
        // Comes back at once for the rest.
        ctx.placements.wake();
    } else {
        ctx.placements.note_lacking(lacking);
    }
    if !forgotten.is_empty() {
        let span_ms = ctx.config.order_ms;
        ctx.db.write(move |txn| again::forget(txn, &forgotten, now, span_ms)).await?;
    }
    if wanted.is_empty() && stale.is_empty() {
        return Ok(());
    }
    order(ctx, wanted.clone(), stale, now).await?;
    let peers: HashSet<PeerId> = wanted.iter().map(|copy| copy.peer).collect();
    tracing::info!(copies = wanted.len(), seeders = peers.len(), "copies ordered");
    peers.into_iter().for_each(|peer| ctx.placements.nudge(peer));
    Ok(())
}

/// Stores orders for these copies, and forgets those given up. Gives how many there are.
async fn order(
    ctx: &Arc<Context>,
    copies: Vec<Wanted>,
    stale: Vec<(PeerId, Digest)>,
    now: u64,
) -> Result<usize, StoreError> {
    let (origin, span_ms) = (ctx.registry.origin(), ctx.config.order_ms);
    let making = Arc::clone(ctx);
    let orders = tokio::task::spawn_blocking(move || {
        making.db.read(|txn| {
            let mut orders = Vec::with_capacity(copies.len());
            for copy in &copies {
                let next = match Some(copy.peer) == origin {
                    // The origin is this manager's own.
                    true => Next::Paid,
                    false => again::look(txn, &(copy.peer, copy.manifest), now, span_ms)?,
                };
                if next != Next::Later {
                    let paid = next == Next::Paid;
                    orders.push((copy.peer, copy.manifest, paid, new_order(&making, copy, paid, now)));
                }
            }
            Ok::<_, StoreError>(orders)
        })
    });
    let orders = orders.await.map_err(|e| StoreError::Panicked(e.to_string()))??;
    ctx.db
        .write(move |txn| {
            for key in &stale {
                PENDING.delete(txn, key)?;
            }
            let mut made = 0;
            for (peer, manifest, paid, (order, signed)) in &orders {
                let key = (*peer, *manifest);
                if HOLDERS.contains(txn, &(*manifest, *peer))? || PENDING.contains(txn, &key)? {
                    continue;
                }
                if Some(*peer) == origin || again::note(txn, &key, *paid, now, span_ms)? {
                    made += 1;
                    PENDING.put(txn, &key, &OrderRef { order: *order })?;
                    ORDERS.put(txn, order, &OrderRecord { signed: signed.clone() })?;
                }
            }
            Ok::<_, StoreError>(made)
        })
        .await
}

/// Those of `damaged` that `peer` held by the books, or was to hold: asked before its report is taken into them. Nothing
/// else is there to be made whole.
pub(crate) fn had(ctx: &Context, peer: PeerId, damaged: Vec<Digest>) -> Result<Vec<Digest>, StoreError> {
    ctx.db.read(|txn| {
        let mut had = Vec::with_capacity(damaged.len());
        for manifest in damaged {
            if HELD.contains(txn, &(peer, manifest))? || ORDERED.contains(txn, &(peer, manifest))? {
                had.push(manifest);
            }
        }
        Ok(had)
    })
}

/// Orders for a seeder to make its own damaged copies whole again: it has most of each already, and what is counted and
/// paid for is only what it fetches. What is not on sale any more stays as it is.
pub(crate) async fn repair(ctx: &Arc<Context>, peer: PeerId, damaged: Vec<Digest>, now: u64) -> Result<(), StoreError> {
    if damaged.is_empty() {
        return Ok(());
    }
    let reading = Arc::clone(ctx);
    let wanted = tokio::task::spawn_blocking(move || {
        reading.db.read(|txn| {
            let mut wanted = Vec::new();
            for manifest in damaged {
                let Some(product) = PRODUCT_OF_MANIFEST.get(txn, &manifest)? else { continue };
                let sold = |record: &ProductRecord| !record.withdrawn && record.manifest == manifest;
                let Some(record) = PRODUCTS.get(txn, &product.id)?.filter(sold) else { continue };
                if !PENDING.contains(txn, &(peer, manifest))? {
                    wanted.push(Wanted { peer, manifest, length: record.content_bytes });
                }
            }
            Ok::<_, StoreError>(wanted)
        })
    });
    let wanted = wanted.await.map_err(|e| StoreError::Panicked(e.to_string()))??;
    if wanted.is_empty() {
        return Ok(());
    }
    let copies = order(ctx, wanted, Vec::new(), now).await?;
    if copies > 0 {
        tracing::info!(%peer, copies, "damaged copies are to be made whole");
    }
    Ok(())
}

fn new_order(ctx: &Context, copy: &Wanted, paid: bool, now: u64) -> (TransactionId, Signed<ReplicationOrder>) {
    let id = TransactionId::new(now, rand::rng().random());
    let config = &ctx.config;
    let rate = if paid { config.rate } else { 0 };
    let order = ReplicationOrder {
        network: ctx.network(),
        order: id,
        manifest: copy.manifest,
        seeder: copy.peer,
        issued_at: now,
        until: now.saturating_add(config.order_ms),
        allowance: copy.length.saturating_add(copy.length / 4).saturating_add(ALLOWANCE_ROOM),
        rate,
        currency: config.currency,
        ceiling: pricing::ceiling_micros(rate, copy.length, config.ceiling_slack_millionths),
    };
    (id, ctx.keys.sign(KeyPurpose::Ticket, &order))
}

/// When an order was first made: UUID version 7 begins with it.
pub(crate) fn made_at(order: &TransactionId) -> u64 {
    order.as_bytes().iter().take(6).fold(0, |ms, byte| ms << 8 | u64::from(*byte))
}

/// What a seeder is to fetch now: its pending orders, the ones that end soon, or whose key was given up, signed anew under
/// the same id.
pub(crate) async fn for_seeder(ctx: &Arc<Context>, peer: PeerId, now: u64) -> Result<Vec<Placement>, StoreError> {
    let reading = Arc::clone(ctx);
    let found = tokio::task::spawn_blocking(move || pending_of(&reading, peer, now))
        .await
        .map_err(|e| StoreError::Panicked(e.to_string()))??;
    let mut renewed = Vec::new();
    let trust = ctx.trust();
    let mut placements = Vec::with_capacity(found.len());
    for (id, mut placement) in found {
        let Ok(mut order) = placement.order.peek() else { continue };
        let opened = trust.open(&placement.order, KeyPurpose::Ticket, |order| order.issued_at, now);
        let void =
            opened.is_err_and(|refusal| matches!(refusal.code, RefusalCode::KeyRetired | RefusalCode::UnknownKey));
        if void || order.until.saturating_sub(now) < ctx.config.order_ms / 4 {
            order.issued_at = now;
            order.until = now.saturating_add(ctx.config.order_ms);
            placement.order = ctx.keys.sign(KeyPurpose::Ticket, &order);
            renewed.push((id, placement.order.clone()));
        }
        placements.push(placement);
    }
    if !renewed.is_empty() {
        ctx.db
            .write(move |txn| {
                renewed.iter().try_for_each(|(id, signed)| ORDERS.put(txn, id, &OrderRecord { signed: signed.clone() }))
            })
            .await?;
    }
    Ok(placements)
}

/// Blocks.
fn pending_of(ctx: &Context, peer: PeerId, now: u64) -> Result<Vec<(TransactionId, Placement)>, StoreError> {
    let orders = ctx.db.read(|txn| {
        let mut orders = Vec::new();
        // Begins anywhere: orders that cannot be fulfilled do not keep the others from their seeder.
        let (low, high) = (Digest::from_bytes([0; 32]), Digest::from_bytes([0xff; 32]));
        let start = Digest::from_bytes(rand::rng().random());
        let mut page = PENDING.range(txn, (peer, start)..=(peer, high), MeshResponse::PLACEMENTS_PAGE)?;
        let left = MeshResponse::PLACEMENTS_PAGE - page.len();
        page.extend(PENDING.range(txn, (peer, low)..(peer, start), left)?);
        for ((_, manifest), found) in page {
            if let Some(record) = ORDERS.get(txn, &found.order)? {
                orders.push((found.order, manifest, record.signed));
            }
        }
        Ok::<_, StoreError>(orders)
    })?;
    let mut placements = Vec::with_capacity(orders.len());
    for (id, manifest, order) in orders {
        let mut sources = ctx.registry.sources_for(&manifest, now, PLACEMENT_SOURCES + 1)?;
        sources.retain(|source| source.peer != peer);
        sources.truncate(PLACEMENT_SOURCES);
        placements.push((id, Placement { order, sources }));
    }
    Ok(placements)
}

/// Takes a product's content off every seeder's list, within the caller's transaction; those who hold it hear of it by
/// the revocation epoch.
pub(crate) fn cancel(txn: &store::WriteTransaction<'_>, manifest: &Digest) -> Result<Vec<PeerId>, StoreError> {
    let mut peers: Vec<PeerId> =
        HOLDERS.prefix(txn, manifest, usize::MAX)?.into_iter().map(|((_, peer), _)| peer).collect();
    let mut pending = Vec::new();
    PENDING.scan::<StoreError>(txn, .., |(peer, of), _| {
        if of == *manifest {
            pending.push((peer, of));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    for key in pending {
        PENDING.delete(txn, &key)?;
        peers.push(key.0);
    }
    Ok(peers)
}

/// Who holds a content and who is to, at most `limit` each.
pub(crate) fn copies(db: &Db, manifest: &Digest, limit: usize) -> Result<(Vec<PeerId>, Vec<PeerId>), StoreError> {
    db.read(|txn| {
        let holders = HOLDERS.prefix(txn, manifest, limit)?.into_iter().map(|((_, peer), _)| peer).collect();
        let mut pending = Vec::new();
        PENDING.scan::<StoreError>(txn, .., |(peer, of), _| {
            if of == *manifest {
                pending.push(peer);
            }
            Ok(if pending.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        Ok((holders, pending))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reports_make_no_look_at_everything_unless_a_copy_lacks_room() {
        use crate::sales::tests::shop::{Shop, Terms, random_key};
        use protocol::Address;
        use protocol::api::{MeshRequest, SeederReport};

        const SEEDERS: usize = 60;
        let mut shop = Shop::open(Terms::default()).await;
        while shop.seeders.len() < SEEDERS {
            let seeder = random_key();
            shop.enrol_seeder(&seeder).await;
            shop.seeders.push(seeder);
        }
        let report = async |n: usize, free: u64, held: bool| {
            let held = Vec::from_iter(held.then_some(shop.manifest));
            let addrs = vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()];
            let report = SeederReport { addrs, held, first: true, free, ..SeederReport::default() };
            shop.running.mesh(shop.seeders[n].peer_id(), MeshRequest::Report(report)).await.unwrap()
        };
        let look = async || {
            let before = shop.ctx.placements.looks();
            shop.ctx.placements.wake();
            while shop.ctx.placements.looks() == before || shop.ctx.placements.short.load(Relaxed) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        // Three hold the product: no copy is missing.
        for n in 0..3 {
            report(n, 1 << 30, true).await;
        }
        tokio::time::timeout(Duration::from_secs(20), look()).await.unwrap();
        let before = shop.ctx.placements.looks();
        for round in 1..=3 {
            for n in 0..SEEDERS {
                report(n, round << 31, n < 3).await;
            }
        }
        let looks = shop.ctx.placements.looks() - before;
        assert!(looks <= 2, "{} reports, each with more room, made {looks} looks", 3 * SEEDERS);
        shop.close().await;
    }

    #[test]
    fn an_order_knows_when_it_was_made() {
        assert_eq!(made_at(&TransactionId::new(1_790_000_000_123, [0xff; 10])), 1_790_000_000_123);
    }
}
