//! Which copies count: the one answer for those who place copies, let seeders let go of them, and show how it stands. A copy
//! that serves nobody is none: its seeder is revoked, sent something else than the content, has a clock by which it refuses
//! everybody, or is to be rid of it.

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use protocol::{Digest, PeerId};
use store::{StoreError, Txn};

use crate::audit_fetch;
use crate::context::Context;
use crate::handover;
use crate::registry::{is_heard, stopped};
use crate::tables::{SEEDERS, SeederRecord};

/// In this time, milliseconds, and that in which a silent seeder is away, all that run reach a manager that was away itself:
/// a seeder that fails to tries again within it.
const COME_BACK_MS: u64 = 90 * 1000;

/// How all seeders stand at one moment.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// Seeders other than the origin that serve, or are away for a while only.
    pub(crate) present: HashSet<PeerId>,
    /// Those of them who are here now.
    pub(crate) here: HashSet<PeerId>,
    /// The origin is here.
    pub(crate) origin: bool,
    /// Copies that their seeders want to be rid of.
    pub(crate) leaving: HashSet<(PeerId, Digest)>,
    /// Those of these whose seeders stay, and lack the room.
    pub(crate) moving: HashSet<(PeerId, Digest)>,
    /// Who will not have which content.
    pub(crate) unwanted: HashMap<Digest, HashSet<PeerId>>,
    /// Seeders that leave with all that they have.
    pub(crate) quitting: HashSet<PeerId>,
    /// Seeders that had no time yet to say that they are here, since the manager was started.
    pub(crate) awaited: HashSet<PeerId>,
}

impl Standing {
    /// Looks at all seeders, and shows each that is here to `each`. Blocks.
    pub(crate) fn load(
        ctx: &Context,
        txn: &impl Txn,
        now: u64,
        mut each: impl FnMut(PeerId, &SeederRecord),
    ) -> Result<Standing, StoreError> {
        let (config, origin) = (&ctx.config, ctx.registry.origin());
        let (failed, stopped) = (audit_fetch::failed(txn)?, stopped(txn)?);
        // As long as the manager was away it heard nobody: that is held against nobody.
        let starting = |ms: u64| now < ctx.started_at.saturating_add(ms);
        let was_heard = |last: u64| {
            starting(config.seeder_lost_ms) && is_heard(last, ctx.registry.listened_until(), config.seeder_lost_ms)
        };
        let come_back_ms = config.seeder_away_ms.saturating_add(COME_BACK_MS);
        let right = ctx.registry.right_time(now);
        let mut standing = Standing { leaving: handover::leaving(txn, now)?, ..Standing::default() };
        SEEDERS.scan::<StoreError>(txn, .., |peer, record| {
            let is_here = is_heard(record.last_report, now, config.seeder_away_ms) && !stopped.contains(&peer);
            if Some(peer) == origin {
                standing.origin = is_here;
                return Ok(ControlFlow::Continue(()));
            }
            let serves = !failed.contains(&peer)
                && !ctx.registry.clock_by(&peer, right).is_off()
                && !ctx.revocations.with(|revoked| revoked.has_peer(&peer));
            let heard = is_heard(record.last_report, now, config.seeder_lost_ms) || was_heard(record.last_report);
            if serves && heard {
                standing.present.insert(peer);
                for digest in ctx.registry.unwanted(&peer) {
                    standing.unwanted.entry(digest).or_default().insert(peer);
                }
                if ctx.registry.leaves(&peer) && handover::still_meant(record.last_report, now) {
                    standing.quitting.insert(peer);
                } else {
                    let moving = ctx.registry.moving(&peer).into_iter().map(|digest| (peer, digest));
                    let meant: Vec<_> = moving.filter(|key| standing.leaving.contains(key)).collect();
                    standing.moving.extend(meant);
                }
                if is_here {
                    standing.here.insert(peer);
                    each(peer, &record);
                } else if starting(come_back_ms) && record.last_report < ctx.started_at && !stopped.contains(&peer) {
                    standing.awaited.insert(peer);
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(standing)
    }

    /// Whether this seeder's copy of the content serves clients now. The origin's is not among these.
    pub(crate) fn serves(&self, peer: &PeerId, manifest: &Digest) -> bool {
        self.here.contains(peer) && self.is_kept(peer, manifest)
    }

    /// Whether it does, or will when its seeder comes back.
    pub(crate) fn counts(&self, peer: &PeerId, manifest: &Digest) -> bool {
        self.present.contains(peer) && self.is_kept(peer, manifest)
    }

    fn is_kept(&self, peer: &PeerId, manifest: &Digest) -> bool {
        !self.quitting.contains(peer) && !self.leaving.contains(&(*peer, *manifest)) && !self.turns_down(peer, manifest)
    }

    /// Whether the copy stands as long as nobody is allowed to let go of it: it serves, or its seeder stays and lacks the
    /// room. So those who want to let go of the same content do not wait for each other: the first may.
    pub(crate) fn stands(&self, peer: &PeerId, manifest: &Digest) -> bool {
        self.serves(peer, manifest) || self.here.contains(peer) && self.moving.contains(&(*peer, *manifest))
    }

    /// How many copies of one content there can be: the seeders that are here and stay, and those that may be.
    pub(crate) fn able(&self) -> usize {
        self.here.union(&self.awaited).filter(|peer| !self.quitting.contains(*peer)).count()
    }

    /// Seeders that are here and stay.
    pub(crate) fn present(&self) -> usize {
        self.here.iter().filter(|peer| !self.quitting.contains(*peer)).count()
    }

    /// Whether the seeder will not have this content.
    pub(crate) fn turns_down(&self, peer: &PeerId, manifest: &Digest) -> bool {
        self.unwanted.get(manifest).is_some_and(|peers| peers.contains(peer))
    }

    /// How many of those who are able to have copies will have none of this content.
    pub(crate) fn unable(&self, manifest: &Digest) -> usize {
        let peers = self.unwanted.get(manifest).into_iter().flatten();
        peers.filter(|peer| self.here.contains(*peer) && !self.quitting.contains(*peer)).count()
    }

    /// Seeders that want to be rid of something.
    pub(crate) fn letting_go(&self) -> HashSet<PeerId> {
        self.leaving.iter().map(|(peer, _)| *peer).chain(self.quitting.iter().copied()).collect()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::Address;
    use protocol::api::{KeptBecause, MeshRequest, MeshResponse, SeederReport};
    use serde_json::{Value, json};

    use super::*;
    use crate::context::now_ms;
    use crate::placement;
    use crate::sales::tests::shop::{Shop, Terms, random_key};
    use crate::tables::PENDING;

    const HOURS: u64 = 60 * 60 * 1000;

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

    /// What a seeder says that holds the content, or nothing.
    fn said(shop: &Shop, held: bool) -> SeederReport {
        SeederReport {
            addrs: vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()],
            held: Vec::from_iter(held.then_some(shop.manifest)),
            first: true,
            free: 1 << 30,
            capacity: if held { 1 << 40 } else { 1 },
            now: now_ms(),
            ..SeederReport::default()
        }
    }

    async fn report(shop: &Shop, peer: PeerId, report: SeederReport) {
        shop.running.mesh(peer, MeshRequest::Report(report)).await.unwrap();
    }

    async fn release(shop: &Shop, peer: PeerId, hand_over: bool) -> usize {
        let request = MeshRequest::Release { contents: vec![shop.manifest], hand_over };
        match shop.running.mesh(peer, request).await.unwrap() {
            MeshResponse::Released { contents, .. } => contents.len(),
            other => panic!("{other:?}"),
        }
    }

    fn is_source(shop: &Shop, peer: PeerId) -> bool {
        let sources = shop.ctx.registry.sources_for(&shop.manifest, now_ms(), 32).unwrap();
        sources.iter().any(|source| source.peer == peer)
    }

    async fn shown(shop: &Shop, peer: PeerId) -> Value {
        let answer = crate::control::answer(&shop.ctx, json!({ "cmd": "seeders" }), None).await.unwrap();
        let found = answer["seeders"].as_array().unwrap().iter().find(|row| row["peer"] == json!(peer));
        found.unwrap().clone()
    }

    /// The copies that a look finds wanting.
    fn wants(shop: &Shop, peer: PeerId) -> bool {
        placement::wanted_at(&shop.ctx, now_ms()).unwrap().contains(&peer)
    }

    #[tokio::test]
    async fn a_copy_whose_seeder_has_a_wrong_clock_counts_for_nobody_until_it_is_set() {
        let (shop, peers) = market(4).await;
        let [wrong, other, leaves, empty] = peers[..] else { panic!() };
        for peer in [other, leaves] {
            report(&shop, peer, said(&shop, true)).await;
        }
        let late = SeederReport { now: now_ms() - 2 * HOURS, ..said(&shop, true) };
        report(&shop, wrong, late).await;
        assert!(!is_source(&shop, wrong) && is_source(&shop, other));
        let row = shown(&shop, wrong).await;
        assert_eq!((&row["here"], &row["clock"]["state"]), (&json!(false), &json!("off")), "{row}");
        let trouble = row["trouble"].as_str().unwrap();
        assert!(trouble.contains("2 hours behind") && trouble.contains("made within that time"), "{row}");
        // Three copies there are to be, and two count.
        report(&shop, empty, said(&shop, false)).await;
        assert!(wants(&shop, empty) && !wants(&shop, wrong));
        assert_eq!(release(&shop, leaves, false).await, 0);

        // One that is ahead goes on to serve what lasts longer: it is not said to refuse everybody.
        let early = SeederReport { now: now_ms() + 2 * HOURS, ..said(&shop, true) };
        report(&shop, wrong, early).await;
        let row = shown(&shop, wrong).await;
        let trouble = row["trouble"].as_str().unwrap();
        assert!(trouble.contains("2 hours ahead") && trouble.contains("end within that time"), "{row}");

        // Within the grace, as ever.
        let early = SeederReport { now: now_ms() + HOURS / 10, ..said(&shop, true) };
        report(&shop, wrong, early).await;
        assert!(is_source(&shop, wrong));
        let row = shown(&shop, wrong).await;
        assert_eq!((&row["here"], &row["trouble"]), (&json!(true), &Value::Null), "{row}");
        report(&shop, empty, said(&shop, true)).await;
        assert_eq!(release(&shop, leaves, false).await, 1);
        shop.close().await;
    }

    #[tokio::test]
    async fn a_copy_whose_seeder_failed_an_audit_lets_nobody_go() {
        let (shop, peers) = market(5).await;
        let [failed, leaves, ..] = peers[..] else { panic!() };
        for peer in &peers[..4] {
            report(&shop, *peer, said(&shop, true)).await;
        }
        report(&shop, peers[4], said(&shop, false)).await;
        audit_fetch::fail(&shop.ctx, failed, shop.manifest, now_ms()).await;
        assert_eq!(release(&shop, leaves, false).await, 0, "two others serve, and there are to be three copies");
        report(&shop, peers[4], said(&shop, true)).await;
        assert_eq!(release(&shop, leaves, false).await, 1);
        shop.close().await;
    }

    #[tokio::test]
    async fn who_stays_after_all_is_a_source_and_gets_copies_again_with_its_next_report() {
        let (shop, peers) = market(4).await;
        let [stays, ..] = peers[..] else { panic!() };
        for peer in &peers[1..3] {
            report(&shop, *peer, said(&shop, true)).await;
        }
        // Here, and without room: of three copies one is missing as long as this one is to go.
        report(&shop, peers[3], SeederReport { free: 0, ..said(&shop, false) }).await;
        let leaving = || SeederReport { leaving: true, free: 0, ..said(&shop, true) };
        let moving = || SeederReport { moving: vec![shop.manifest], free: 0, ..said(&shop, true) };
        report(&shop, stays, leaving()).await;
        assert_eq!(release(&shop, stays, true).await, 0);
        // Said again, it stays meant.
        report(&shop, stays, leaving()).await;
        assert!(!is_source(&shop, stays));
        report(&shop, stays, said(&shop, true)).await;
        assert!(is_source(&shop, stays), "called off, or started again");

        report(&shop, stays, moving()).await;
        assert!(!is_source(&shop, stays), "said in a report, it needs no question");
        report(&shop, stays, said(&shop, true)).await;
        assert!(is_source(&shop, stays), "given more room");

        // And what is missing may be placed there.
        report(&shop, stays, SeederReport { capacity: 1, ..said(&shop, false) }).await;
        assert!(wants(&shop, stays));
        shop.close().await;
    }

    fn leaving(shop: &Shop) -> SeederReport {
        SeederReport { leaving: true, free: 0, ..said(shop, true) }
    }

    #[tokio::test]
    async fn seeders_that_leave_at_once_do_not_wait_for_each_other() {
        let (shop, peers) = market(5).await;
        assert_eq!(shop.ctx.config.copies, 3);
        let [first, second, stays, empty, origin] = peers[..] else { panic!() };
        for peer in &peers[..3] {
            report(&shop, *peer, said(&shop, true)).await;
        }
        // It holds nothing and leaves all the same: nothing is placed there, and no copy at it is waited for.
        report(&shop, empty, SeederReport { leaving: true, free: 1 << 30, ..said(&shop, false) }).await;
        for peer in [first, second] {
            report(&shop, peer, leaving(&shop)).await;
        }
        assert!(!wants(&shop, empty));
        assert_eq!(release(&shop, first, true).await, 1, "the only one that stays has it");
        assert_eq!(release(&shop, second, true).await, 1);
        // The last one goes as a single one does, by the origin's copy only.
        let (_, kept) = handover::release(&shop.ctx, stays, vec![shop.manifest], true, now_ms()).await.unwrap();
        let [kept] = kept[..] else { panic!("{kept:?}") };
        assert_eq!((kept.copies, kept.wanted, kept.because), (0, 1, KeptBecause::NobodyElse));
        shop.ctx.registry.set_origin(origin).await.unwrap();
        report(&shop, origin, said(&shop, true)).await;
        assert_eq!(release(&shop, stays, true).await, 1);
        shop.close().await;
    }

    #[tokio::test]
    async fn who_leaves_after_all_waits_for_the_one_that_was_to_leave_and_stays() {
        let (shop, peers) = market(4).await;
        let [first, second, third, fourth] = peers[..] else { panic!() };
        for peer in [first, second] {
            report(&shop, peer, leaving(&shop)).await;
        }
        report(&shop, third, said(&shop, true)).await;
        report(&shop, fourth, said(&shop, false)).await;
        assert_eq!(release(&shop, first, true).await, 0, "two stay, and one of them has it");
        report(&shop, second, said(&shop, true)).await;
        assert_eq!(release(&shop, first, true).await, 0, "three stay, and two of them have it");
        report(&shop, fourth, said(&shop, true)).await;
        assert_eq!(release(&shop, first, true).await, 1);
        shop.close().await;
    }

    #[tokio::test]
    async fn an_order_at_a_seeder_that_leaves_goes_to_another() {
        let (shop, peers) = market(4).await;
        let [first, second, leaves, takes] = peers[..] else { panic!() };
        for peer in [first, second] {
            report(&shop, peer, said(&shop, true)).await;
        }
        report(&shop, leaves, said(&shop, false)).await;
        shop.ctx.placements.wake();
        let ordered = |peer: PeerId| shop.ctx.db.read(|txn| PENDING.contains(txn, &(peer, shop.manifest))).unwrap();
        let until = async |peer: PeerId, there: bool| {
            let look = async {
                while ordered(peer) != there {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(std::time::Duration::from_secs(20), look).await.unwrap();
        };
        until(leaves, true).await;
        report(&shop, leaves, SeederReport { leaving: true, free: 0, ..said(&shop, false) }).await;
        report(&shop, takes, said(&shop, false)).await;
        shop.ctx.placements.wake();
        until(takes, true).await;
        until(leaves, false).await;
        shop.close().await;
    }

    #[tokio::test]
    async fn who_leaves_and_who_lacks_room_do_not_wait_for_each_other_and_the_last_copy_stays() {
        let (shop, peers) = market(3).await;
        let [leaves, full, other] = peers[..] else { panic!() };
        let moving = || SeederReport { moving: vec![shop.manifest], free: 0, ..said(&shop, true) };
        report(&shop, leaves, leaving(&shop)).await;
        for peer in [full, other] {
            report(&shop, peer, said(&shop, true)).await;
            report(&shop, peer, moving()).await;
        }
        assert_eq!(release(&shop, leaves, true).await, 1, "both that stay have it, and keep it until others do");
        assert_eq!(release(&shop, full, true).await, 1, "the other keeps it");
        assert_eq!(release(&shop, other, true).await, 0, "it is the last");
        report(&shop, full, said(&shop, true)).await;
        assert_eq!(release(&shop, other, true).await, 1);
        shop.close().await;
    }

    /// The manager is started again, having heard each of these so long ago.
    async fn after_outage(shop: Shop, silent: &[(PeerId, u64)]) -> Shop {
        let silent = silent.to_vec();
        let stored = shop.ctx.db.write(move |txn| {
            for (peer, ms) in &silent {
                let mut record = SEEDERS.get(txn, peer)?.unwrap();
                record.last_report = now_ms() - ms;
                SEEDERS.put(txn, peer, &record)?;
            }
            Ok::<_, StoreError>(())
        });
        stored.await.unwrap();
        shop.crash().await
    }

    #[tokio::test]
    async fn nobody_goes_because_the_others_had_no_time_to_report_since_the_start() {
        let (shop, peers) = market(5).await;
        let [leaves, second, third, fourth, origin] = peers[..] else { panic!() };
        shop.ctx.registry.set_origin(origin).await.unwrap();
        for peer in [leaves, second, third, origin] {
            report(&shop, peer, said(&shop, true)).await;
        }
        report(&shop, fourth, said(&shop, false)).await;
        let ten_minutes = Vec::from_iter(peers.iter().map(|peer| (*peer, HOURS / 6)));
        let shop = after_outage(shop, &ten_minutes).await;
        report(&shop, origin, said(&shop, true)).await;
        for hand_over in [true, false] {
            assert_eq!(release(&shop, leaves, hand_over).await, 0, "the origin's is the only other copy");
        }
        for peer in [second, third] {
            report(&shop, peer, said(&shop, true)).await;
        }
        assert_eq!(release(&shop, leaves, true).await, 0, "of the three that stay one is without it");
        report(&shop, fourth, said(&shop, true)).await;
        assert_eq!(release(&shop, leaves, true).await, 1);
        shop.close().await;
    }

    #[tokio::test]
    async fn the_time_in_which_the_manager_was_away_makes_nobody_lost() {
        for (first_ago, missing) in [(2 * HOURS, false), (4 * HOURS, true)] {
            let (shop, peers) = market(4).await;
            for (n, peer) in peers.iter().enumerate() {
                report(&shop, *peer, said(&shop, n < 3)).await;
            }
            let ago = |n: usize| if n == 0 { first_ago } else { 2 * HOURS };
            let silent = Vec::from_iter(peers.iter().enumerate().map(|(n, peer)| (*peer, ago(n))));
            let shop = after_outage(shop, &silent).await;
            report(&shop, peers[3], said(&shop, false)).await;
            assert_eq!(wants(&shop, peers[3]), missing, "the first was lost before that, or it was not");
            shop.close().await;
        }
    }

    #[tokio::test]
    async fn what_a_long_report_has_not_come_to_yet_is_held() {
        let (shop, peers) = market(4).await;
        for peer in &peers[..3] {
            report(&shop, *peer, said(&shop, true)).await;
        }
        report(&shop, peers[3], said(&shop, false)).await;
        let invented = |n: usize| Digest::of("test", &[&n.to_le_bytes()]);
        let part = |first: bool, contents: usize| SeederReport {
            held: (0..contents).map(invented).collect(),
            first,
            free: 0,
            ..said(&shop, false)
        };
        report(&shop, peers[0], part(true, SeederReport::MAX_HELD)).await;
        assert!(!wants(&shop, peers[3]) && is_source(&shop, peers[0]));
        assert_eq!(release(&shop, peers[1], false).await, 0, "three others are here, and two of them have it");
        report(&shop, peers[0], part(false, 3)).await;
        assert!(wants(&shop, peers[3]) && !is_source(&shop, peers[0]), "the last part did not name it, either");
        shop.close().await;
    }

    #[tokio::test]
    async fn what_the_books_do_not_have_is_not_let_go_of_for_that() {
        let (shop, peers) = market(3).await;
        let peer = peers[0];
        for peer in &peers {
            report(&shop, *peer, said(&shop, *peer == peers[0])).await;
        }
        let unknown = async |shop: &Shop| {
            let contents = vec![Digest::of("test", &[b"unknown"])];
            handover::release(&shop.ctx, peer, contents, false, now_ms()).await.unwrap().0.len()
        };
        assert_eq!(unknown(&shop).await, 1);
        let shop = shop.restored().await;
        shop.ctx.db.write(move |txn| crate::registry::forget_holdings(txn, &peer)).await.unwrap();
        assert_eq!(release(&shop, peer, false).await, 0, "it has the only copy");
        assert_eq!(unknown(&shop).await, 0, "it may have been sold after the backup");
        report(&shop, peer, leaving(&shop)).await;
        assert_eq!(unknown(&shop).await, 1, "who leaves keeps its files");
        shop.close().await;
    }

    #[tokio::test]
    async fn what_is_asked_for_much_is_not_let_go_of_below_its_copies() {
        let (shop, peers) = market(6).await;
        for (n, peer) in peers.iter().enumerate() {
            report(&shop, *peer, said(&shop, n < 5)).await;
        }
        for _ in 0..2 * shop.ctx.config.demand_per_copy {
            shop.ctx.demand.asked(shop.manifest, now_ms());
        }
        assert_eq!(release(&shop, peers[0], false).await, 0, "it would be ordered again at once");
        shop.close().await;
    }

    #[tokio::test]
    async fn what_was_given_up_for_want_of_room_is_forgotten_when_there_is_more_room() {
        let (shop, peers) = market(5).await;
        let gave_up = peers[0];
        for peer in &peers {
            report(&shop, *peer, SeederReport { capacity: 1, ..said(&shop, true) }).await;
        }
        assert_eq!(release(&shop, gave_up, false).await, 1);
        let with_room = |spare: u64| SeederReport { capacity: 1 << 60, spare, ..said(&shop, false) };
        for spare in [2 << 20, 1 << 20, 2 << 20] {
            report(&shop, gave_up, with_room(spare)).await;
            assert!(!wants(&shop, gave_up), "no more than was left when it had gone");
        }
        report(&shop, gave_up, with_room(1 << 30)).await;
        assert!(wants(&shop, gave_up), "its capacity was raised");
        shop.close().await;
    }

    #[tokio::test]
    async fn what_a_seeder_let_go_of_is_not_given_back_to_it_as_its_share() {
        let (shop, peers) = market(6).await;
        let [gave_up, newcomer, ..] = peers[..] else { panic!() };
        for peer in peers.iter().filter(|peer| **peer != newcomer) {
            report(&shop, *peer, SeederReport { capacity: 1, ..said(&shop, true) }).await;
        }
        // So large that everything is its share.
        let huge = || SeederReport { capacity: 1 << 60, spare: 1 << 30, ..said(&shop, false) };
        assert_eq!(release(&shop, gave_up, false).await, 1);
        report(&shop, gave_up, huge()).await;
        assert!(!wants(&shop, gave_up));
        report(&shop, newcomer, SeederReport { spare: 0, ..huge() }).await;
        assert!(!wants(&shop, newcomer), "a share that would have to be removed again is none");
        report(&shop, newcomer, huge()).await;
        assert!(wants(&shop, newcomer));
        let remembered = |now: u64| shop.ctx.db.read(|txn| handover::given_up(txn, now)).unwrap().len();
        assert_eq!((remembered(now_ms()), remembered(now_ms() + 8 * 24 * HOURS)), (1, 0));
        // Where it is needed it may have it again.
        for peer in &peers[2..5] {
            report(&shop, *peer, said(&shop, false)).await;
        }
        assert!(wants(&shop, gave_up));
        report(&shop, gave_up, said(&shop, true)).await;
        assert_eq!(remembered(now_ms()), 0);
        shop.close().await;
    }

    /// Waits until the copies on their way, but for the origin's, are those of these seeders.
    async fn on_their_way(shop: &Shop, expected: &[PeerId]) {
        let expected: HashSet<PeerId> = expected.iter().copied().collect();
        let look = async {
            loop {
                let mut found = HashSet::new();
                let scan = |txn: &store::ReadTransaction| {
                    PENDING.scan::<StoreError>(txn, .., |(peer, _), _| {
                        found.insert(peer);
                        Ok(ControlFlow::Continue(()))
                    })
                };
                shop.ctx.db.read(scan).unwrap();
                if found == expected {
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), look).await.unwrap();
    }

    #[tokio::test]
    async fn what_a_seeder_will_not_have_is_taken_back_and_ordered_elsewhere_until_it_says_so_no_more() {
        let (shop, peers) = market(4).await;
        assert_eq!(shop.ctx.config.copies, 3);
        let [first, second, denies, other] = peers[..] else { panic!() };
        for peer in [first, second] {
            report(&shop, peer, said(&shop, true)).await;
        }
        report(&shop, denies, said(&shop, false)).await;
        shop.ctx.placements.wake();
        on_their_way(&shop, &[denies]).await;
        report(&shop, other, said(&shop, false)).await;
        assert!(!wants(&shop, other), "three copies, one of them on its way");

        let unwanted = || SeederReport { unwanted: vec![shop.manifest], ..said(&shop, false) };
        let answer = shop.running.mesh(denies, MeshRequest::Report(unwanted())).await.unwrap();
        assert_eq!(answer, MeshResponse::Placements(Vec::new()), "it is not told once more");
        on_their_way(&shop, &[other]).await;
        report(&shop, denies, unwanted()).await;
        assert!(wants(&shop, other) && !wants(&shop, denies));

        // Where nobody will have it, it is not room that is missing, and nobody waits for a copy.
        report(&shop, other, unwanted()).await;
        on_their_way(&shop, &[]).await;
        let lacks = placement::lacking_at(&shop.ctx, now_ms()).unwrap();
        assert_eq!(lacks.get(&shop.manifest), None);
        assert_eq!(release(&shop, first, true).await, 1, "the only one that will have it has it");

        report(&shop, denies, said(&shop, false)).await;
        assert!(wants(&shop, denies), "it is denied no more");
        let many = vec![shop.manifest; SeederReport::MAX_UNWANTED + 1];
        let long = MeshRequest::Report(SeederReport { unwanted: many, ..said(&shop, false) });
        let refusal = shop.running.mesh(denies, long).await.unwrap_err();
        assert_eq!(refusal.code, protocol::RefusalCode::TooLarge);
        shop.close().await;
    }
}
