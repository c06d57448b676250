//! How often a copy is ordered at one and the same seeder. Each order has a ceiling of its own, which the network pays; and
//! that a copy is damaged or gone is its seeder's own word, as what it acknowledges to another seeder is. So two of them who
//! are friends could draw any sum for copies that nobody makes. One that really lost a disk gets its copies again at once;
//! when it loses them again and again, it gets them all the same, but less often, and nobody is paid for them.

use std::collections::HashSet;
use std::ops::ControlFlow;

use protocol::{Digest, PeerId};
use store::{StoreError, Txn, WriteTransaction};

use super::plan::MAX_PER_RUN;
use crate::tables::{ORDERED, OrderedRecord};

/// Orders for one copy that may follow each other at any pace: the first, and one for what was lost or damaged since.
const AT_ONCE: u32 = 2;
/// Then the next that is paid for comes after one span, two, four and so on, up to so many. A span is the time that a
/// seeder has for an order.
const MOST_SPANS: u64 = 8;
/// Until then one is made in so many parts of a span that nobody is paid for.
const UNPAID: u64 = 24;
/// After so many without an order it begins anew.
const FORGOTTEN_SPANS: u64 = 32;

/// What the orders of the past say of new ones.
#[derive(Debug, Default)]
pub(super) struct Past {
    /// Copies that are not ordered there yet.
    pub(super) barred: HashSet<(PeerId, Digest)>,
    /// Of these nothing is remembered any more; as many as are deleted at once.
    pub(super) forgotten: Vec<(PeerId, Digest)>,
}

impl Past {
    pub(super) fn load(txn: &impl Txn, now: u64, span_ms: u64) -> Result<Past, StoreError> {
        let mut past = Past::default();
        ORDERED.scan::<StoreError>(txn, .., |key, record| {
            if is_forgotten(&record, now, span_ms) {
                if past.forgotten.len() < MAX_PER_RUN {
                    past.forgotten.push(key);
                }
            } else if next(Some(&record), now, span_ms) == Next::Later {
                past.barred.insert(key);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(past)
    }
}

/// What the next order for a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// One like any other.
    Paid,
    /// One that nobody is paid for.
    Unpaid,
    /// There is to be none yet.
    Later,
}

/// What an order for a copy would be now.
pub(super) fn look(txn: &impl Txn, key: &(PeerId, Digest), now: u64, span_ms: u64) -> Result<Next, StoreError> {
    let before = ORDERED.get(txn, key)?.filter(|record| !is_forgotten(record, now, span_ms));
    Ok(next(before.as_ref(), now, span_ms))
}

fn next(before: Option<&OrderedRecord>, now: u64, span_ms: u64) -> Next {
    let Some(before) = before else { return Next::Paid };
    if now >= free_at(before, span_ms) {
        Next::Paid
    } else if now >= before.at.max(before.unpaid_at).saturating_add(span_ms / UNPAID) {
        Next::Unpaid
    } else {
        Next::Later
    }
}

/// Takes down that a copy is ordered; false where this is not what the next order is.
pub(super) fn note(
    txn: &WriteTransaction<'_>,
    key: &(PeerId, Digest),
    paid: bool,
    now: u64,
    span_ms: u64,
) -> Result<bool, StoreError> {
    let before = ORDERED.get(txn, key)?.filter(|record| !is_forgotten(record, now, span_ms));
    let (record, fits) = match (before, next(before.as_ref(), now, span_ms)) {
        (before, Next::Paid) => {
            let before = before.unwrap_or(OrderedRecord { at: 0, times: 0, unpaid_at: 0 });
            (OrderedRecord { at: now, times: before.times.saturating_add(1), ..before }, paid)
        }
        (Some(before), Next::Unpaid) => (OrderedRecord { unpaid_at: now, ..before }, !paid),
        (_, _) => return Ok(false),
    };
    if fits {
        ORDERED.put(txn, key, &record)?;
    }
    Ok(fits)
}

/// Deletes what is forgotten, unless it was ordered again since it was looked at.
pub(super) fn forget(
    txn: &WriteTransaction<'_>,
    keys: &[(PeerId, Digest)],
    now: u64,
    span_ms: u64,
) -> Result<(), StoreError> {
    for key in keys {
        if ORDERED.get(txn, key)?.is_some_and(|record| is_forgotten(&record, now, span_ms)) {
            ORDERED.delete(txn, key)?;
        }
    }
    Ok(())
}

/// From when on the copy may be ordered there again.
fn free_at(record: &OrderedRecord, span_ms: u64) -> u64 {
    let Some(over) = record.times.checked_sub(AT_ONCE) else { return 0 };
    let spans = 1u64.checked_shl(over).unwrap_or(MOST_SPANS).min(MOST_SPANS);
    record.at.saturating_add(span_ms.saturating_mul(spans))
}

fn is_forgotten(record: &OrderedRecord, now: u64, span_ms: u64) -> bool {
    now.saturating_sub(record.at) > span_ms.saturating_mul(FORGOTTEN_SPANS)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::Address;
    use protocol::api::{MeshRequest, SeederReport};

    use super::*;
    use crate::context::now_ms;
    use crate::placement::wanted_at;
    use crate::sales::tests::shop::{Shop, Terms, random_key};
    use crate::tables::ORDERS;

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

    async fn report(shop: &Shop, peer: PeerId, held: bool, damaged: bool) {
        let report = SeederReport {
            addrs: vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()],
            held: Vec::from_iter(held.then_some(shop.manifest)),
            damaged: Vec::from_iter(damaged.then_some(shop.manifest)),
            first: true,
            // No room: what is ordered here is what is to be repaired.
            free: 0,
            capacity: 1 << 40,
            now: now_ms(),
            ..SeederReport::default()
        };
        shop.running.mesh(peer, MeshRequest::Report(report)).await.unwrap();
    }

    /// Orders for this seeder so far, and what all of them may cost, micros.
    fn orders(shop: &Shop, peer: PeerId) -> (usize, u64) {
        let (mut count, mut cost) = (0, 0);
        let counted = |txn: &store::ReadTransaction| {
            ORDERS.scan::<StoreError>(txn, .., |_, record| {
                let order = record.signed.peek().unwrap();
                if order.seeder == peer {
                    count += 1;
                    cost += order.ceiling;
                }
                Ok(ControlFlow::Continue(()))
            })
        };
        shop.ctx.db.read(counted).unwrap();
        (count, cost)
    }

    #[tokio::test]
    async fn what_a_seeder_says_to_be_damaged_again_and_again_is_not_paid_for_again_and_again() {
        let (shop, peers) = market(4).await;
        let [says, never_had, ..] = peers[..] else { panic!() };
        report(&shop, never_had, false, true).await;
        assert_eq!(orders(&shop, never_had), (0, 0), "it never had it, nor was it to");
        let mut one = 0;
        for round in 0..10 {
            report(&shop, says, true, false).await;
            report(&shop, says, false, true).await;
            if round == 0 {
                one = orders(&shop, says).1;
                assert_eq!(orders(&shop, says).0, 1);
            }
        }
        assert_eq!(orders(&shop, says), (2, 2 * one), "once for each time, and twice at once at most");
        // A day later it is paid once more, and then not for two days; until then it is made whole all the same.
        let (span, now) = (shop.ctx.config.order_ms, now_ms());
        for (at, count, paid) in
            [(span / 2, 3, 2), (span / 2 + 1, 3, 2), (span + 1, 4, 3), (2 * span, 5, 3), (3 * span + 2, 6, 4)]
        {
            report(&shop, says, true, false).await;
            report(&shop, says, false, true).await;
            crate::placement::repair(&shop.ctx, says, vec![shop.manifest], now + at).await.unwrap();
            assert_eq!(orders(&shop, says), (count, paid * one), "{at}");
        }
        shop.close().await;
    }

    #[tokio::test]
    async fn a_copy_that_is_lost_again_and_again_goes_to_another() {
        let (shop, peers) = market(4).await;
        let [loses, other, ..] = peers[..] else { panic!() };
        let (key, now, span) = ((loses, shop.manifest), now_ms(), shop.ctx.config.order_ms);
        let roomy = |capacity: u64| SeederReport {
            addrs: vec![Address::new("/ip4/10.0.0.1/tcp/1").unwrap()],
            first: true,
            free: 1 << 30,
            capacity,
            now: now_ms(),
            ..SeederReport::default()
        };
        let note = async || shop.ctx.db.write(move |txn| note(txn, &key, true, now, span)).await.unwrap();
        assert_eq!([note().await, note().await, note().await], [true, true, false]);
        let request = MeshRequest::Report(roomy(1 << 50));
        shop.running.mesh(loses, request).await.unwrap();
        let short = super::super::plan::plan(&shop.ctx, now_ms()).unwrap().lacking;
        assert!(short.is_empty(), "it has room, and waits: {short:?}");
        shop.running.mesh(other, MeshRequest::Report(roomy(1))).await.unwrap();
        let wanted = |at: u64| wanted_at(&shop.ctx, at).unwrap();
        assert!(!wanted(now_ms()).contains(&loses) && wanted(now_ms()).contains(&other));
        // After a while it gets it all the same, and nobody is paid for it.
        let unpaid = now_ms() + span / UNPAID;
        let barred = |at: u64| shop.ctx.db.read(|txn| Past::load(txn, at, span)).unwrap().barred;
        assert!(barred(now_ms()).contains(&key) && !barred(unpaid).contains(&key));
        assert_eq!(shop.ctx.db.read(|txn| look(txn, &key, unpaid, span)).unwrap(), Next::Unpaid);
        // What was long ago is forgotten, in the tables, too.
        let later = now + 33 * span;
        let past = shop.ctx.db.read(|txn| Past::load(txn, later, span)).unwrap();
        assert!(past.barred.is_empty() && past.forgotten.contains(&key));
        shop.ctx.db.write(move |txn| forget(txn, &past.forgotten, later, span)).await.unwrap();
        assert_eq!(shop.ctx.db.read(|txn| ORDERED.get(txn, &key)).unwrap(), None);
        shop.close().await;
    }

    #[test]
    fn each_loss_waits_longer_up_to_a_bound() {
        let waits = |times| free_at(&OrderedRecord { at: 1000, times, unpaid_at: 0 }, 10).saturating_sub(1000);
        assert_eq!([0, 1, 2, 3, 4, 5, 6, 70].map(waits), [0, 0, 10, 20, 40, 80, 80, 80]);
        assert_eq!(free_at(&OrderedRecord { at: u64::MAX, times: u32::MAX, unpaid_at: 0 }, u64::MAX), u64::MAX);
    }
}
