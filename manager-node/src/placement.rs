//! Which seeder holds a copy of what. Content goes where rendezvous hashing weighted by capacity puts it, so that no
//! seeder is favoured and a new one takes its part; a copy once made stays where it is.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use futures::StreamExt;
use node::{Protocol, Supervisor};
use protocol::api::{MeshResponse, SEEDER_PROTOCOL, SeederRequest, SeederResponse};
use protocol::replication::{Placement, ReplicationOrder};
use protocol::trust::KeyPurpose;
use protocol::{Digest, PeerId, Signed, TransactionId};
use rand::RngExt;
use store::{Db, StoreError};
use tokio::sync::{Notify, mpsc};

use crate::context::{Context, now_ms};
use crate::handover;
use crate::pricing;
use crate::registry::is_here;
use crate::tables::{HOLDERS, ORDERS, OrderRecord, OrderRef, PENDING, PRODUCTS, SEEDERS};

const PROTOCOL: Protocol = Protocol::new(SEEDER_PROTOCOL);
/// Copies ordered in one go; the rest follow in the next. It bounds the transaction that stores them.
const MAX_PER_RUN: usize = 512;
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
    /// Looks since the start. Each goes over all seeders, products and copies.
    looks: AtomicU64,
}

impl Placements {
    pub(crate) fn new(db: Db) -> (Self, mpsc::Receiver<PeerId>) {
        let (nudges, receiver) = mpsc::channel(NUDGES);
        let (short, looks) = (AtomicBool::new(true), AtomicU64::new(0));
        (Placements { db, nudges, wake: Arc::new(Notify::new()), short, looks }, receiver)
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

/// A copy to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    peer: PeerId,
    manifest: Digest,
    length: u64,
}

/// What is to change.
#[derive(Debug, Default)]
struct Plan {
    wanted: Vec<Wanted>,
    /// Orders that were not fulfilled in all their time: given up, so that others get them.
    stale: Vec<(PeerId, Digest)>,
    /// There was no room for a copy.
    short: bool,
}

/// Orders the copies that are missing, and nudges those who are to make them.
async fn balance(ctx: &Arc<Context>, now: u64) -> Result<(), StoreError> {
    let planning = Arc::clone(ctx);
    // Before the look: room that is gained during it may not be seen by it.
    ctx.placements.short.store(true, Relaxed);
    ctx.placements.looks.fetch_add(1, Relaxed);
    let Plan { wanted, stale, short } = tokio::task::spawn_blocking(move || plan(&planning, now))
        .await
        .map_err(|e| StoreError::Panicked(e.to_string()))??;
    ctx.placements.short.store(short, Relaxed);
    if wanted.is_empty() && stale.is_empty() {
        return Ok(());
    }
    let orders: Vec<_> = wanted.iter().map(|copy| (copy.peer, copy.manifest, new_order(ctx, copy, now))).collect();
    ctx.db
        .write(move |txn| {
            for key in &stale {
                PENDING.delete(txn, key)?;
            }
            for (peer, manifest, (order, signed)) in &orders {
                if !HOLDERS.contains(txn, &(*manifest, *peer))?
                    && PENDING.insert_new(txn, &(*peer, *manifest), &OrderRef { order: *order })?
                {
                    ORDERS.put(txn, order, &OrderRecord { signed: signed.clone() })?;
                }
            }
            Ok::<_, StoreError>(())
        })
        .await?;
    let peers: HashSet<PeerId> = wanted.iter().map(|copy| copy.peer).collect();
    tracing::info!(copies = wanted.len(), seeders = peers.len(), "copies ordered");
    peers.into_iter().for_each(|peer| ctx.placements.nudge(peer));
    Ok(())
}

fn new_order(ctx: &Context, copy: &Wanted, now: u64) -> (TransactionId, Signed<ReplicationOrder>) {
    let id = TransactionId::new(now, rand::rng().random());
    let config = &ctx.config;
    let order = ReplicationOrder {
        network: ctx.network(),
        order: id,
        manifest: copy.manifest,
        seeder: copy.peer,
        issued_at: now,
        until: now.saturating_add(config.order_ms),
        allowance: copy.length.saturating_add(copy.length / 4).saturating_add(ALLOWANCE_ROOM),
        rate: config.rate,
        currency: config.currency,
        ceiling: pricing::ceiling_micros(config.rate, copy.length, config.ceiling_slack_millionths),
    };
    (id, ctx.keys.sign(KeyPurpose::Ticket, &order))
}

struct Candidate {
    peer: PeerId,
    capacity: u64,
    room: u64,
}

/// Which copies are missing, and where they are to go. Blocks.
fn plan(ctx: &Context, now: u64) -> Result<Plan, StoreError> {
    let (config, origin) = (&ctx.config, ctx.registry.origin());
    ctx.db.read(|txn| {
        let mut candidates = Vec::new();
        let mut present = HashSet::new();
        SEEDERS.scan::<StoreError>(txn, .., |peer, record| {
            let revoked = ctx.revocations.with(|revoked| revoked.has_peer(&peer));
            if !revoked && is_here(record.last_report, now, config.seeder_lost_ms) && Some(peer) != origin {
                present.insert(peer);
                if is_here(record.last_report, now, config.seeder_away_ms) {
                    candidates.push(Candidate { peer, capacity: record.capacity, room: record.free });
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        let leaving = handover::leaving(txn, now)?;
        // Who wants to let go of content is given no other.
        let full: HashSet<PeerId> = leaving.iter().map(|(peer, _)| *peer).collect();
        candidates.retain(|candidate: &Candidate| !full.contains(&candidate.peer));
        let mut products = Vec::new();
        let mut lengths = HashMap::new();
        PRODUCTS.scan::<StoreError>(txn, .., |_, record| {
            if !record.withdrawn {
                lengths.insert(record.manifest, record.content_bytes);
                products.push((record.manifest, record.content_bytes));
            }
            Ok(ControlFlow::Continue(()))
        })?;
        let mut pending: HashMap<Digest, Vec<PeerId>> = HashMap::new();
        let mut reserved: HashMap<PeerId, u64> = HashMap::new();
        let mut stale = HashSet::new();
        PENDING.scan::<StoreError>(txn, .., |(peer, manifest), OrderRef { order }| {
            if Some(peer) != origin && now.saturating_sub(made_at(&order)) > config.order_ms {
                stale.insert((peer, manifest));
            }
            pending.entry(manifest).or_default().push(peer);
            *reserved.entry(peer).or_default() += lengths.get(&manifest).copied().unwrap_or(0);
            Ok(ControlFlow::Continue(()))
        })?;
        for candidate in &mut candidates {
            let taken = reserved.get(&candidate.peer).copied().unwrap_or(0);
            candidate.room = candidate.room.saturating_sub(taken);
        }
        let copies = usize::try_from(config.copies).unwrap_or(usize::MAX);
        let (mut wanted, mut short) = (Vec::new(), false);
        for (manifest, length) in products {
            let mut there: HashSet<PeerId> =
                HOLDERS.prefix(txn, &manifest, usize::MAX)?.into_iter().map(|((_, peer), _)| peer).collect();
            there.extend(pending.remove(&manifest).unwrap_or_default());
            if let Some(origin) = origin.filter(|origin| !there.contains(origin)) {
                wanted.push(Wanted { peer: origin, manifest, length });
            }
            // A seeder that did not manage in time keeps its place in `there`: the copy goes to another one.
            let gone = |peer: &PeerId| stale.contains(&(*peer, manifest)) || leaving.contains(&(*peer, manifest));
            let counts = |peer: &&PeerId| present.contains(*peer) && !gone(peer);
            let missing = copies.saturating_sub(there.iter().filter(counts).count());
            let chosen = choose(&candidates, &there, &manifest, length, missing);
            short |= chosen.len() < missing;
            for index in chosen {
                if let Some(candidate) = candidates.get_mut(index) {
                    candidate.room = candidate.room.saturating_sub(length);
                    wanted.push(Wanted { peer: candidate.peer, manifest, length });
                }
            }
            if wanted.len() >= MAX_PER_RUN {
                // The loop comes back at once for the rest.
                ctx.placements.wake();
                break;
            }
        }
        Ok(Plan { wanted, stale: stale.into_iter().collect(), short })
    })
}

/// When an order was first made: UUID version 7 begins with it.
fn made_at(order: &TransactionId) -> u64 {
    order.as_bytes().iter().take(6).fold(0, |ms, byte| ms << 8 | u64::from(*byte))
}

/// The `count` best of those with room that do not have it yet, as indices.
fn choose(
    candidates: &[Candidate],
    there: &HashSet<PeerId>,
    manifest: &Digest,
    length: u64,
    count: usize,
) -> Vec<usize> {
    if count == 0 {
        return Vec::new();
    }
    let mut scored: Vec<(f64, usize)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| candidate.room >= length && !there.contains(&candidate.peer))
        .map(|(index, candidate)| (score(manifest, &candidate.peer, candidate.capacity), index))
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.truncate(count);
    scored.into_iter().map(|(_, index)| index).collect()
}

/// Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): -weight / ln(hash), hash uniform in (0, 1).
fn score(manifest: &Digest, peer: &PeerId, capacity: u64) -> f64 {
    let digest = Digest::of("willcall 2026-11 placement", &[manifest.as_bytes(), peer.as_bytes()]);
    let hash = digest.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let uniform = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -(capacity.max(1) as f64) / uniform.ln()
}

/// What a seeder is to fetch now: its pending orders, the ones that end soon signed anew under the same id.
pub(crate) async fn for_seeder(ctx: &Arc<Context>, peer: PeerId, now: u64) -> Result<Vec<Placement>, StoreError> {
    let reading = Arc::clone(ctx);
    let found = tokio::task::spawn_blocking(move || pending_of(&reading, peer, now))
        .await
        .map_err(|e| StoreError::Panicked(e.to_string()))??;
    let mut renewed = Vec::new();
    let mut placements = Vec::with_capacity(found.len());
    for (id, mut placement) in found {
        let Ok(mut order) = placement.order.peek() else { continue };
        if order.until.saturating_sub(now) < ctx.config.order_ms / 4 {
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
        for ((_, manifest), found) in PENDING.prefix(txn, &peer, MeshResponse::PLACEMENTS_PAGE)? {
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
pub(crate) fn cancel(txn: &store::WriteTransaction, manifest: &Digest) -> Result<Vec<PeerId>, StoreError> {
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

    fn candidates(capacities: &[u64]) -> Vec<Candidate> {
        let peer = |n: usize| PeerId::from_bytes([u8::try_from(n).unwrap(); 32]);
        capacities.iter().enumerate().map(|(n, c)| Candidate { peer: peer(n), capacity: *c, room: *c }).collect()
    }

    #[test]
    fn copies_follow_capacity_and_room() {
        let all = candidates(&[100, 100, 200, 10]);
        let mut counts = [0u32; 4];
        for n in 0..2000u32 {
            let manifest = Digest::of("test", &[&n.to_le_bytes()]);
            for index in choose(&all, &HashSet::new(), &manifest, 5, 1) {
                counts[index] += 1;
            }
        }
        assert!(counts[2] > counts[0] * 3 / 2 && counts[2] > counts[1] * 3 / 2, "{counts:?}");
        assert!(counts[3] < counts[0] / 3, "{counts:?}");

        let manifest = Digest::from_bytes([1; 32]);
        let no_room = choose(&all, &HashSet::new(), &manifest, 50, 9);
        assert_eq!(no_room.len(), 3, "the one of 10 bytes has no room");
        let there = HashSet::from([all[0].peer]);
        assert!(!choose(&all, &there, &manifest, 5, 9).contains(&0));
    }

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
            let report = SeederReport { addrs, held, first: true, free, deliveries: 0, now: 0 };
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

    #[test]
    fn a_newcomer_only_takes_its_own_part() {
        let (few, more) = (candidates(&[100, 100, 100]), candidates(&[100, 100, 100, 100]));
        for n in 0..200u32 {
            let manifest = Digest::of("test", &[&n.to_le_bytes()]);
            let before = choose(&few, &HashSet::new(), &manifest, 1, 1)[0];
            let after = choose(&more, &HashSet::new(), &manifest, 1, 1)[0];
            assert!(after == before || after == 3);
        }
    }
}
