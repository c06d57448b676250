//! Which copies are missing, and where they are to go: as many of each content as are configured, more of one that is asked
//! for much or whose seeders turn clients away, and the share of a newcomer.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use protocol::{Digest, PeerId};
use store::{StoreError, Txn};

use super::again::Past;
use super::hash::Candidate;
use super::made_at;
use super::market::Market;
use crate::context::Context;
use crate::handover;
use crate::standing::Standing;
use crate::tables::{HOLDERS, OrderRef, PENDING, PRODUCTS};

/// Copies ordered in one go; the rest follow in the next. It bounds the transaction that stores them.
pub(super) const MAX_PER_RUN: usize = 512;

/// A copy to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) peer: PeerId,
    pub(super) manifest: Digest,
    pub(super) length: u64,
}

/// What is to change.
#[derive(Debug, Default)]
pub(super) struct Plan {
    pub(super) wanted: Vec<Wanted>,
    /// Orders that were not fulfilled in all their time: given up, so that others get them.
    pub(super) stale: Vec<(PeerId, Digest)>,
    /// Copies that were ordered so long ago that it matters no more.
    pub(super) forgotten: Vec<(PeerId, Digest)>,
    /// Copies of contents that are missing because no seeder without one has room.
    pub(super) lacking: HashMap<Digest, usize>,
    /// There is more to be ordered than fits into one go, so that not everything was looked at.
    pub(super) cut: bool,
}

/// Which copies are missing, and where they are to go. Blocks.
pub(super) fn plan(ctx: &Context, now: u64) -> Result<Plan, StoreError> {
    let (config, origin) = (&ctx.config, ctx.registry.origin());
    ctx.db.read(|txn| {
        let (standing, candidates) = seeders(ctx, txn, now)?;
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
        let mut market = Market::new(standing, candidates, handover::given_up(txn, now)?);
        PENDING.scan::<StoreError>(txn, .., |(peer, manifest), OrderRef { order }| {
            let late = now.saturating_sub(made_at(&order)) > config.order_ms;
            if Some(peer) != origin && (late || market.leaves(&peer) || market.turns_down(&peer, &manifest)) {
                market.stale.insert((peer, manifest));
            }
            pending.entry(manifest).or_default().push(peer);
            market.reserve(&peer, lengths.get(&manifest).copied().unwrap_or(0));
            Ok(ControlFlow::Continue(()))
        })?;
        let past = Past::load(txn, now, config.order_ms)?;
        market.barred = past.barred;
        let (mut of_origin, mut cut) = (Vec::new(), false);
        for (manifest, length) in products {
            let holders: HashSet<PeerId> =
                HOLDERS.prefix(txn, &manifest, usize::MAX)?.into_iter().map(|((_, peer), _)| peer).collect();
            let ordered = pending.remove(&manifest).unwrap_or_default();
            if let Some(peer) = origin.filter(|origin| !holders.contains(origin) && !ordered.contains(origin)) {
                of_origin.push(Wanted { peer, manifest, length });
            }
            market.content(manifest, length, &holders, &ordered, |serving| copies_of(ctx, &manifest, serving, now));
            // What finds no room is no order: however much of it there is, what follows is looked at.
            if market.ordered() + of_origin.len() >= MAX_PER_RUN {
                cut = true;
                break;
            }
        }
        let mut plan = market.finish(MAX_PER_RUN);
        plan.cut |= cut;
        plan.wanted.extend(of_origin);
        plan.forgotten = past.forgotten;
        Ok(plan)
    })
}

/// Who is there, and who of them may be given more.
fn seeders(ctx: &Context, txn: &impl Txn, now: u64) -> Result<(Standing, Vec<Candidate>), StoreError> {
    let mut candidates = Vec::new();
    let standing = Standing::load(ctx, txn, now, |peer, record| {
        let (room, spare) = (i128::from(record.free), i128::from(ctx.registry.spare(&peer)));
        candidates.push(Candidate { peer, capacity: record.capacity, room, spare, surplus: 0 });
    })?;
    // Who wants to let go of content is given no other.
    let full = standing.letting_go();
    candidates.retain(|candidate| !full.contains(&candidate.peer));
    Ok((standing, candidates))
}

/// How many copies there are to be of a content that these seeders serve.
pub(crate) fn copies_of(ctx: &Context, manifest: &Digest, serving: &[PeerId], now: u64) -> usize {
    let config = &ctx.config;
    let recent = ctx.demand.recent(manifest, now);
    let more = recent.checked_div(config.demand_per_copy).unwrap_or(0);
    let mut copies = usize::try_from(config.copies.saturating_add(more)).unwrap_or(usize::MAX);
    let crowded = serving.iter().filter(|seeder| ctx.demand.is_crowded(seeder, now)).count();
    // Asked for at all, and most of those who have it turn clients away: one more than there are now.
    if recent > 0 && crowded > 0 && crowded * 2 >= serving.len() {
        copies = copies.max(serving.len() + 1);
    }
    let most = config.max_copies.max(config.copies);
    copies.min(usize::try_from(most).unwrap_or(usize::MAX))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::Address;
    use protocol::api::{MeshRequest, SeederReport};

    use super::*;
    use crate::context::now_ms;
    use crate::sales::tests::shop::{Shop, Terms, random_key};
    use crate::tables::SEEDERS;

    /// Who holds nothing has room, and so small a capacity that nothing is its share: it gets what is missing, only.
    async fn report(shop: &Shop, peer: PeerId, held: bool) {
        let capacity = if held { 1 << 40 } else { 1 };
        let held = Vec::from_iter(held.then_some(shop.manifest));
        let addrs = vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()];
        let report = SeederReport { addrs, held, first: true, free: 1 << 30, capacity, ..SeederReport::default() };
        shop.running.mesh(peer, MeshRequest::Report(report)).await.unwrap();
    }

    /// Not heard of for a while, which is not so long that it is given up.
    async fn away(shop: &Shop, peer: PeerId) {
        let away_ms = shop.ctx.config.seeder_away_ms;
        assert!(2 * away_ms < shop.ctx.config.seeder_lost_ms);
        shop.ctx
            .db
            .write(move |txn| {
                let mut record = SEEDERS.get(txn, &peer)?.unwrap();
                record.last_report -= 2 * away_ms;
                SEEDERS.put(txn, &peer, &record)
            })
            .await
            .unwrap();
    }

    async fn market(seeders: usize) -> (Shop, Vec<PeerId>) {
        let mut shop = Shop::open(Terms::default()).await;
        while shop.seeders.len() < seeders {
            let seeder = random_key();
            shop.enrol_seeder(&seeder).await;
            shop.seeders.push(seeder);
        }
        let peers = shop.seeders.iter().map(protocol::Keypair::peer_id).collect();
        (shop, peers)
    }

    fn ordered_at(shop: &Shop) -> HashSet<PeerId> {
        let origin = shop.ctx.registry.origin();
        let plan = plan(&shop.ctx, now_ms()).unwrap();
        let mut at: HashSet<PeerId> = plan.wanted.iter().map(|wanted| wanted.peer).collect();
        let pending = |txn: &store::ReadTransaction| {
            let mut found = Vec::new();
            PENDING.scan::<StoreError>(txn, .., |(peer, _), _| {
                found.push(peer);
                Ok(ControlFlow::Continue(()))
            })?;
            Ok::<_, StoreError>(found)
        };
        at.extend(shop.ctx.db.read(pending).unwrap());
        at.retain(|peer| Some(*peer) != origin);
        at
    }

    /// Waits until a copy is ordered.
    async fn ordered(shop: &Shop) {
        shop.ctx.placements.wake();
        let given = async {
            while shop.ctx.db.read(|txn| PENDING.len(txn)).unwrap() == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), given).await.unwrap();
    }

    #[tokio::test]
    async fn room_is_not_what_is_missing_where_a_seeder_is_away() {
        let (shop, peers) = market(3).await;
        let [here, away_with_it, away_without] = peers[..] else { panic!() };
        report(&shop, here, true).await;
        report(&shop, away_with_it, true).await;
        report(&shop, away_without, false).await;
        ordered(&shop).await;
        away(&shop, away_with_it).await;
        away(&shop, away_without).await;
        assert_eq!(plan(&shop.ctx, now_ms()).unwrap().lacking, HashMap::new());
        shop.close().await;
    }

    #[tokio::test]
    async fn a_copy_at_a_seeder_that_is_away_does_not_hold_up_one_that_wants_to_leave() {
        let (shop, peers) = market(6).await;
        assert_eq!(shop.ctx.config.copies, 3);
        let [leaves, comes_back, third, fourth, has_room, was_asked] = peers[..] else { panic!() };
        report(&shop, leaves, true).await;
        report(&shop, comes_back, true).await;
        report(&shop, was_asked, false).await;
        ordered(&shop).await;
        report(&shop, third, true).await;
        report(&shop, fourth, true).await;
        report(&shop, has_room, false).await;
        away(&shop, comes_back).await;
        away(&shop, was_asked).await;
        assert!(!ordered_at(&shop).contains(&has_room), "who is away may come back, and there are enough copies");
        let (released, kept) = handover::release(&shop.ctx, leaves, vec![shop.manifest], true, now_ms()).await.unwrap();
        assert_eq!((released.len(), kept.len()), (0, 1), "two are here of the three that there are to be");
        assert!(ordered_at(&shop).contains(&has_room), "so it is copied to the one with room");
        shop.close().await;
    }

    #[tokio::test]
    async fn a_seeder_that_stops_in_order_is_away_at_once_and_not_given_up() {
        let (shop, peers) = market(5).await;
        for (n, peer) in peers.iter().enumerate() {
            report(&shop, *peer, n < 4).await;
        }
        let stopping = shop.running.mesh(peers[0], MeshRequest::Stopping).await.unwrap();
        assert_eq!(stopping, protocol::api::MeshResponse::Noted);
        let sources = shop.ctx.registry.sources_for(&shop.manifest, now_ms(), 32).unwrap();
        assert!(sources.iter().all(|source| source.peer != peers[0]) && sources.len() >= 2, "{sources:?}");
        assert!(!ordered_at(&shop).contains(&peers[4]), "it may come back, and there are enough copies");
        let (released, _) = handover::release(&shop.ctx, peers[1], vec![shop.manifest], false, now_ms()).await.unwrap();
        assert_eq!(released.len(), 0, "its copy does not count for who wants to let go of one");
        report(&shop, peers[0], true).await;
        let sources = shop.ctx.registry.sources_for(&shop.manifest, now_ms(), 32).unwrap();
        assert!(sources.iter().any(|source| source.peer == peers[0]), "{sources:?}");
        assert!(shop.running.mesh(random_key().peer_id(), MeshRequest::Stopping).await.is_err());
        shop.close().await;
    }

    #[tokio::test]
    async fn however_much_finds_no_room_it_is_told_and_what_finds_room_is_ordered() {
        use crate::sales::tests::shop::CHUNK;

        const MORE: usize = MAX_PER_RUN + 88;
        let terms = Terms::default();
        let (shop, peers) = market(3).await;
        for _ in 0..MORE {
            let id = protocol::ProductId::new(now_ms(), rand::random());
            shop.publish(id, terms.policy, terms.lease_ms, terms.rate, 1);
        }
        let room = async |peer: PeerId, contents: u64| {
            let addrs = vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()];
            let free = contents * u64::from(CHUNK);
            let report = SeederReport { addrs, first: true, free, capacity: 1, ..SeederReport::default() };
            shop.running.mesh(peer, MeshRequest::Report(report)).await.unwrap();
        };
        let told = async |contents: usize, copies: usize| {
            let look = async {
                while shop.ctx.placements.short_of_room() != (contents, copies) {
                    tokio::task::yield_now().await;
                }
            };
            let found = tokio::time::timeout(std::time::Duration::from_secs(30), look).await;
            assert!(found.is_ok(), "{:?} instead of {contents}, {copies}", shop.ctx.placements.short_of_room());
        };
        for peer in &peers[..2] {
            room(*peer, 0).await;
        }
        // Three copies there are to be, and there are two seeders: of the third it is not room that is missing.
        told(MORE + 1, 2 * (MORE + 1)).await;
        let found = plan(&shop.ctx, now_ms()).unwrap();
        assert!(found.wanted.is_empty() && !found.cut, "nothing is ordered, and it would look again at once");
        room(peers[0], 1 << 20).await;
        told(MORE + 1, MORE + 1).await;
        let status = crate::control::answer(&shop.ctx, serde_json::json!({ "cmd": "status" }), None).await.unwrap();
        assert_eq!(status["short_of_room"], serde_json::json!({ "contents": MORE + 1, "copies": MORE + 1 }));
        let asked = serde_json::json!({ "cmd": "product", "id": shop.product });
        let product = crate::control::answer(&shop.ctx, asked, None).await.unwrap();
        assert_eq!(product["copies_short_of_room"], serde_json::json!(1));
        // And of so many orders not always the same few are told.
        let mut placed = HashSet::new();
        for _ in 0..4 {
            let page = super::super::for_seeder(&shop.ctx, peers[0], now_ms()).await.unwrap();
            placed.extend(page.into_iter().map(|placement| placement.order.peek().unwrap().manifest));
        }
        assert!(placed.len() > protocol::api::MeshResponse::PLACEMENTS_PAGE);
        room(peers[1], 1 << 20).await;
        told(0, 0).await;
        shop.close().await;
    }

    /// The share of who is away for a while is not given to others, which would make as many copies again.
    #[tokio::test]
    async fn who_is_away_for_a_while_keeps_its_share() {
        let (shop, peers) = market(6).await;
        let large = |held: bool| {
            let held = Vec::from_iter(held.then_some(shop.manifest));
            let addrs = vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()];
            let (free, spare, capacity) = (1 << 30, 1 << 30, 1 << 40);
            SeederReport { addrs, held, first: true, free, spare, capacity, ..SeederReport::default() }
        };
        let (holders, others) = peers.split_at(3);
        for peer in holders {
            shop.running.mesh(*peer, MeshRequest::Report(large(true))).await.unwrap();
            away(&shop, *peer).await;
        }
        for peer in others {
            shop.running.mesh(*peer, MeshRequest::Report(large(false))).await.unwrap();
        }
        assert_eq!(crate::placement::wanted_at(&shop.ctx, now_ms()).unwrap(), HashSet::new());
        shop.close().await;
    }

    #[tokio::test]
    async fn a_copy_that_is_ordered_at_a_seeder_that_went_away_is_ordered_elsewhere() {
        let (shop, peers) = market(4).await;
        for (n, peer) in peers.iter().take(3).enumerate() {
            report(&shop, *peer, n < 2).await;
        }
        ordered(&shop).await;
        assert_eq!(ordered_at(&shop), HashSet::from([peers[2]]));
        away(&shop, peers[2]).await;
        report(&shop, peers[3], false).await;
        assert!(ordered_at(&shop).contains(&peers[3]));
        shop.close().await;
    }
}
