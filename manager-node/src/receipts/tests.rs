//! Receipts, good and bad, through a real manager: what is counted, what is not and why, and what is paid for it.

use protocol::api::{MailboxResponse, TransactionState};
use protocol::entitlement::MAX_GENERATIONS;
use protocol::manifest::KeyPolicy;
use protocol::receipt::{DeliveryId, Receipt};
use protocol::replication::ReplicationOrder;
use protocol::trust::KeyPurpose;
use protocol::{ChunkSet, Currency, Refusal, RefusalCode, Signed, TransactionId};
use serde_json::json;

use super::{accept_batch, accept_gossiped, accepted};
use crate::context::now_ms;
use crate::sales::tests::shop::{CHUNK, Outbox, Shop, Terms, random_key};
use crate::tables::{ORDERS, OrderRecord};
use crate::transactions::chore;

fn code<T: std::fmt::Debug>(result: Result<T, Refusal>) -> &'static str {
    result.unwrap_err().code.as_str()
}

async fn statuses(shop: &Shop) -> Vec<(String, Option<String>)> {
    let listed = shop.control(json!({"cmd": "receipts"})).await.unwrap();
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
    let mut lines: Vec<_> = listed["receipts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| (text(&line["status"]).unwrap(), text(&line["code"])))
        .collect();
    lines.reverse();
    lines
}

#[tokio::test]
async fn step_12_receipts_of_several_seeders_deliver_and_settle() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let (mut a, mut b) = (Outbox::of(&shop, 0), Outbox::of(&shop, 1));
    a.send(&shop, vec![shop.receipt(id, 0, 0..2)]).await;
    assert_eq!(shop.state(id), TransactionState::Delivering);
    a.send(&shop, vec![shop.receipt(id, 0, 0..4), shop.receipt(id, 0, 0..2)]).await;
    // Chunk 3 was acknowledged to both.
    b.send(&shop, vec![shop.receipt(id, 1, 3..10)]).await;
    assert_eq!(shop.state(id), TransactionState::Settled);
    let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
    let bytes: u64 = closed.lines.iter().map(|line| line.bytes).sum();
    assert_eq!(bytes, 10 * u64::from(CHUNK));
    let of = |n: usize| closed.lines.iter().find(|l| l.seeder == shop.seeders[n].peer_id()).unwrap().bytes;
    assert_eq!((of(0), of(1)), (7 * u64::from(CHUNK) / 2, 13 * u64::from(CHUNK) / 2));
    // 6.25 minor units at the full rate; seven are charged, two and four are whole, and the rest is carried.
    assert_eq!(closed.charged, 7);
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[0].peer_id())).await, -2);
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[1].peer_id())).await, -4);
    assert_eq!(shop.balance("seeder-pot").await, -1);
    assert_eq!(shop.balance("escrow").await, 0);
    let counted = |s: &str| (s.to_owned(), None);
    assert_eq!(
        statuses(&shop).await,
        [counted("counted"), counted("counted"), counted("duplicate"), counted("counted")]
    );
    shop.close().await;
}

#[tokio::test]
async fn a_completion_delivers_and_missing_receipts_are_still_waited_for() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let mut a = Outbox::of(&shop, 0);
    let mut receipt = shop.receipt(id, 0, 0..4);
    receipt.completion = Some(shop.completion(DeliveryId { transaction: id, delivery: 1 }));
    a.send(&shop, vec![receipt]).await;
    assert_eq!(shop.state(id), TransactionState::Delivered);
    let delivery = shop.delivery(id, 1).unwrap();
    assert!(delivery.closed.is_none());
    assert!(delivery.due_at <= now_ms() + shop.ctx.config.close_grace_ms);
    Outbox::of(&shop, 1).send(&shop, vec![shop.receipt(id, 1, 4..10)]).await;
    assert_eq!(shop.state(id), TransactionState::Settled);
    shop.close().await;
}

#[tokio::test]
async fn a_batch_is_counted_once_however_often_it_comes() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let mut outbox = Outbox::of(&shop, 0);
    let peer = outbox.key.peer_id();
    let first = outbox.batch(vec![shop.receipt(id, 0, 0..5)]);
    let answers = futures::future::join_all((0..8).map(|_| accept_batch(&shop.ctx, peer, first.clone()))).await;
    assert!(answers.iter().all(|answer| answer.as_ref().unwrap().peek().unwrap().number == 1));
    assert_eq!(statuses(&shop).await.len(), 1);

    let second = outbox.batch(vec![shop.receipt(id, 0, 0..6)]);
    let third = outbox.batch(vec![shop.receipt(id, 0, 0..7)]);
    let gap = accept_batch(&shop.ctx, peer, third.clone()).await.unwrap_err();
    assert_eq!(gap.code.as_str(), "wrong-state");
    assert!(gap.detail.contains("2 is next") && gap.retry_after_ms > 0, "{gap}");
    for batch in [second, third, first] {
        let mark = accept_batch(&shop.ctx, peer, batch).await.unwrap().peek().unwrap();
        assert_eq!(mark.seeder, peer);
    }
    let mark = outbox.send(&shop, vec![]).await;
    assert_eq!((mark.number, mark.restore), (4, shop.ctx.restore));

    // Another outbox of the same seeder, as after a lost disk, says the same again: nothing more is counted.
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..7)]).await;
    assert_eq!(statuses(&shop).await.last().unwrap().0, "duplicate");
    let counted = shop.delivery(id, 1).unwrap().counting;
    assert_eq!(counted.acked().map(|(_, chunks)| chunks.len()).collect::<Vec<_>>(), [7]);
    shop.close().await;
}

#[tokio::test]
async fn the_mark_of_a_batch_that_is_gossiped_again_and_again_is_told_now_and_then() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let mut outbox = Outbox::of(&shop, 0);
    let peer = outbox.key.peer_id();
    let batches = [outbox.batch(vec![shop.receipt(id, 0, 0..5)]), outbox.batch(vec![shop.receipt(id, 0, 0..6)])];
    // One moment for all: on a slow machine the rates would be there again meanwhile.
    let now = now_ms();
    let gossiped = async |batch: usize| {
        let mark = accept_gossiped(&shop.ctx, peer, batches[batch].clone(), now).await.unwrap();
        mark.map(|mark| mark.peek().unwrap().number)
    };
    assert_eq!(gossiped(0).await, Some(1));
    assert_eq!(gossiped(1).await, Some(2), "each new one has its mark");
    // It may have been missed.
    assert_eq!(gossiped(0).await, Some(2));
    for again in [0, 1, 0, 1] {
        assert_eq!(gossiped(again).await, None);
    }
    // Whoever asks for it gets it, and nobody else.
    for _ in 0..3 {
        let (mark, tell) = accepted(&shop.ctx, peer, batches[0].clone(), now).await.unwrap();
        assert_eq!((mark.peek().unwrap().number, tell), (2, false));
    }
    // New ones without end are marked as well; what all of the mesh hears of them has a rate.
    let mut told = 0;
    for n in 3..=300 {
        let (mark, tell) = accepted(&shop.ctx, peer, outbox.batch(Vec::new()), now).await.unwrap();
        assert_eq!(mark.peek().unwrap().number, n);
        told += u32::from(tell);
        if !tell {
            break;
        }
    }
    assert_eq!(told, 238, "240 at once, with the two at the beginning");
    shop.close().await;
}

#[tokio::test]
async fn batches_that_are_not_what_they_should_be_are_refused_whole() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let peer = shop.seeders[0].peer_id();
    let receipt = || vec![shop.receipt(id, 0, 0..5)];

    let mut outbox = Outbox::of(&shop, 0);
    outbox.place.previous = protocol::Digest::from_bytes([5; 32]);
    assert_eq!(code(accept_batch(&shop.ctx, peer, outbox.batch(receipt())).await), "bad-receipt");

    let mut outbox = Outbox::of(&shop, 0);
    outbox.sealed_to = random_key().peer_id();
    assert_eq!(code(accept_batch(&shop.ctx, peer, outbox.batch(receipt())).await), "unknown-key");

    // Signed by somebody else, and by somebody who is not enrolled.
    let batch = Outbox::of(&shop, 1).batch(receipt());
    assert_eq!(code(accept_batch(&shop.ctx, peer, batch).await), "bad-receipt");
    let mut outbox = Outbox::of(&shop, 0);
    outbox.key = random_key();
    let stranger = outbox.key.peer_id();
    assert_eq!(code(accept_batch(&shop.ctx, stranger, outbox.batch(receipt())).await), "not-enrolled");

    // Sealed for one place in the outbox and sent as another.
    let mut outbox = Outbox::of(&shop, 0);
    let mut moved = outbox.batch(receipt()).peek().unwrap();
    moved.incarnation = protocol::Nonce::from_bytes([3; 16]);
    let moved = Signed::sign(&moved, &shop.seeders[0]);
    assert_eq!(code(accept_batch(&shop.ctx, peer, moved).await), "bad-receipt");
    assert!(statuses(&shop).await.is_empty());
    shop.close().await;
}

#[tokio::test]
async fn bad_receipts_are_kept_with_a_reason_and_spoil_no_good_one() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let seeder = shop.seeders[0].peer_id();
    let delivery = DeliveryId { transaction: id, delivery: 1 };
    let some = || ChunkSet::from_range(0..3);
    let of = |ack| Receipt { ack, completion: None, first_at: 1, last_at: 2 };
    let eve = random_key();
    let unknown = DeliveryId { transaction: TransactionId::from_bytes([4; 16]), delivery: 1 };
    let mut other_manifest = shop.ack(&shop.client, delivery, seeder, some()).peek().unwrap();
    other_manifest.manifest = protocol::Digest::from_bytes([8; 32]);
    let mut forged_completion = shop.receipt(id, 0, 0..4);
    forged_completion.completion = Some(Signed::sign(&shop.completion(delivery).peek().unwrap(), &eve));
    let bad = [
        (of(shop.ack(&eve, delivery, seeder, some())), "bad-ack"),
        (of(shop.ack(&shop.client, delivery, shop.seeders[1].peer_id(), some())), "bad-ack"),
        (of(Signed::sign(&other_manifest, &shop.client)), "bad-ack"),
        (of(shop.ack(&shop.client, delivery, seeder, ChunkSet::from_range(8..11))), "bad-ack"),
        (of(shop.ack(&shop.client, unknown, seeder, some())), "bad-receipt"),
        (of(shop.ack(&shop.client, DeliveryId { delivery: 2, ..delivery }, seeder, some())), "bad-receipt"),
        (of(shop.ack(&shop.client, DeliveryId { delivery: 0, ..delivery }, seeder, some())), "bad-receipt"),
        (forged_completion, "bad-receipt"),
    ];
    let mut receipts: Vec<Receipt> = bad.iter().map(|(receipt, _)| receipt.clone()).collect();
    receipts.insert(3, shop.receipt(id, 0, 0..2));
    Outbox::of(&shop, 0).send(&shop, receipts).await;

    let found = statuses(&shop).await;
    assert_eq!(found.iter().filter(|(status, _)| status == "counted").count(), 1);
    let codes: Vec<String> = found.into_iter().filter_map(|(_, code)| code).collect();
    assert_eq!(codes, bad.iter().map(|(_, code)| (*code).to_owned()).collect::<Vec<_>>());
    let kept = shop.control(json!({"cmd": "receipts", "seeder": seeder})).await.unwrap();
    assert_eq!(kept["receipts"].as_array().unwrap().len(), bad.len());
    assert_eq!(shop.delivery(id, 1).unwrap().counting.claimed_bytes(&shop.sale(id).layout), 2 * u64::from(CHUNK));
    assert_eq!(shop.state(id), TransactionState::Delivering);
    shop.close().await;
}

#[tokio::test]
async fn a_lease_of_which_everything_is_signed_to_everybody_is_void_and_the_ceiling_holds() {
    // 64 MiB: three times 60 % of it is more than the content, a quarter and 16 MiB.
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, envelope) = shop.buy("o").await;
    let lease = envelope.ticket.lease.peek().unwrap();
    for n in 0..3 {
        Outbox::of(&shop, n).send(&shop, vec![shop.receipt(id, n, 0..620)]).await;
    }
    assert_eq!(shop.admitted(&shop.client, &envelope), Err(RefusalCode::Revoked), "seeders serve it no longer");
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
    let paid: u128 = closed.lines.iter().map(|line| line.parts).sum();
    assert!(paid <= u128::from(lease.ceiling) << 20);
    // Each acknowledged chunk was paid for once.
    assert_eq!(closed.lines.iter().map(|line| line.bytes).sum::<u64>(), 620 * u64::from(CHUNK));
    assert_eq!(shop.balance("escrow").await, 0);

    // Whoever has finished under the lease that was ended, and knows of no other, says so, and gets the key for that one.
    assert_eq!(shop.state(id), TransactionState::Settled);
    let data = envelope.ticket.data.peek().unwrap();
    let Ok(MailboxResponse::Completed { grant: Some(grant) }) = shop.complete(id).await else { panic!("no key") };
    let opened = grant.open(&shop.client, &data, &lease).unwrap();
    assert_eq!(opened.as_bytes(), shop.secret.as_bytes());
    // The purchase is the buyer's all the same: the next download is of the origin, for which nobody is paid.
    let again = shop.ticket(id).await.unwrap();
    assert_eq!(shop.admitted(&shop.client, &again), Ok(()));
    let next = again.ticket.lease.peek().unwrap();
    assert_eq!((next.delivery, next.generation, next.ceiling), (2, 1, 0));
    assert!(next.sources.iter().all(|source| Some(*source) == shop.ctx.registry.origin()));
    let opened = again.grant.unwrap().open(&shop.client, &data, &next).unwrap();
    assert_eq!(opened.as_bytes(), shop.secret.as_bytes());
    shop.close().await;
}

#[tokio::test]
async fn receipts_that_are_on_their_way_when_a_lease_ends_are_paid_and_nobody_is_waited_for_without_end() {
    let (at_release, on_completion) = (KeyPolicy::AtRelease, KeyPolicy::OnCompletion);
    for (policy, greedy) in [(at_release, false), (at_release, true), (on_completion, false), (on_completion, true)] {
        // 128 MiB: the lease allows 176.
        let shop = Shop::open(Terms { chunks: 2048, rate: 1_000_000, policy, ..Terms::default() }).await;
        let (id, envelope) = shop.buy("o").await;
        let before = now_ms();
        let mut outboxes: Vec<Outbox> = (0..3).map(|n| Outbox::of(&shop, n)).collect();
        outboxes[0].send(&shop, vec![shop.receipt(id, 0, 0..1600)]).await;
        outboxes[1].send(&shop, vec![shop.receipt(id, 1, 0..1600)]).await;
        assert_eq!(shop.admitted(&shop.client, &envelope), Err(RefusalCode::Revoked), "seeders serve it no longer");
        let delivery = shop.delivery(id, 1).unwrap();
        let grace_ms = shop.ctx.config.close_grace_ms;
        assert!(delivery.closed.is_none());
        assert!((before + grace_ms..=now_ms() + grace_ms).contains(&delivery.due_at), "the lease is not waited for");
        // The buyer does not wait: the next lease is for another delivery, which nobody pays for.
        match policy {
            KeyPolicy::AtRelease => {
                let next = shop.ticket(id).await.unwrap().ticket.lease.peek().unwrap();
                assert_eq!((next.delivery, next.generation, next.ceiling), (2, 1, 0));
            }
            KeyPolicy::OnCompletion => assert_eq!(shop.state(id), TransactionState::Revoked),
        }
        // Delivered before the seeder heard of it.
        outboxes[2].send(&shop, vec![shop.receipt(id, 2, 1600..1700)]).await;
        let open = shop.delivery(id, 1).unwrap();
        assert_eq!((open.closed, open.due_at), (None, delivery.due_at), "no receipt moves the close");
        assert_eq!(shop.sale(id).generation, u32::from(policy == KeyPolicy::AtRelease), "it ended once");
        if greedy {
            // Twice what the lease allows ends the waiting.
            for (n, outbox) in outboxes.iter_mut().enumerate() {
                assert!(shop.delivery(id, 1).unwrap().closed.is_none());
                outbox.send(&shop, vec![shop.receipt(id, n, 0..2040)]).await;
            }
        } else {
            chore::step(&shop.ctx, delivery.due_at - 1).await.unwrap();
            assert!(shop.delivery(id, 1).unwrap().closed.is_none());
            chore::step(&shop.ctx, delivery.due_at).await.unwrap();
        }
        let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
        let bytes = |n: usize| closed.lines.iter().find(|line| line.seeder == shop.seeders[n].peer_id()).unwrap().bytes;
        let chunks = if greedy { 2040 } else { 1700 };
        assert_eq!(closed.lines.iter().map(|line| line.bytes).sum::<u64>(), chunks * u64::from(CHUNK));
        assert_eq!(bytes(2), if greedy { 680 } else { 100 } * u64::from(CHUNK));
        assert_eq!(shop.balance("escrow").await, 0);
        let generation = u32::from(policy == at_release);
        assert_eq!(shop.sale(id).generation, generation, "it ended once");
        if policy != at_release {
            let said = shop.ticket(id).await.unwrap_err();
            assert!(said.detail.contains("given back") && said.detail.contains("bought again"), "{said}");
        }
        shop.close().await;
    }
}

#[tokio::test]
async fn a_held_payment_is_given_back_where_more_is_acknowledged_than_the_lease_allows() {
    let terms = Terms { chunks: 1024, rate: 4_000_000, policy: KeyPolicy::OnCompletion, ..Terms::default() };
    let shop = Shop::open(terms).await;
    let (id, _) = shop.buy("o").await;
    for n in 0..3 {
        Outbox::of(&shop, n).send(&shop, vec![shop.receipt(id, n, 0..620)]).await;
    }
    assert_eq!(shop.state(id), TransactionState::Revoked);
    assert!(shop.is_revoked(id));
    assert_eq!(shop.balance("escrow").await, 0);
    shop.close().await;
}

#[tokio::test]
async fn who_loses_downloads_again_and_again_is_revoked_in_the_end() {
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    let mut outboxes: Vec<Outbox> = (0..3).map(|n| Outbox::of(&shop, n)).collect();
    for delivery in 1..=MAX_GENERATIONS + 1 {
        assert_eq!(shop.ticket(id).await.unwrap().ticket.lease.peek().unwrap().delivery, delivery);
        for (n, outbox) in outboxes.iter_mut().enumerate() {
            let of = DeliveryId { transaction: id, delivery };
            let ack = shop.ack(&shop.client, of, shop.seeders[n].peer_id(), ChunkSet::from_range(0..620));
            outbox.send(&shop, vec![Receipt { ack, completion: None, first_at: 1, last_at: 2 }]).await;
        }
    }
    assert_eq!(shop.state(id), TransactionState::Revoked);
    assert_eq!(shop.ticket(id).await.unwrap_err().code, RefusalCode::Revoked);
    shop.close().await;
}

#[tokio::test]
async fn a_client_and_two_seeders_that_claim_ten_times_what_was_sent_get_the_ceiling_and_reasons() {
    // Each of the two sent a hundred chunks and claims a thousand, and everything that they can think of beside. (Had
    // they claimed the whole content, the first claim would have closed the delivery, and the second come too late.)
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, envelope) = shop.buy("o").await;
    let lease = envelope.ticket.lease.peek().unwrap();
    let claimed = 1000 * u64::from(CHUNK);
    let of = |n: usize, delivery, chunks| Receipt {
        ack: shop.ack(&shop.client, delivery, shop.seeders[n].peer_id(), chunks),
        completion: None,
        first_at: 1,
        last_at: 2,
    };
    let paid = DeliveryId { transaction: id, delivery: 1 };
    let all = || ChunkSet::from_range(0..1000);
    let mut handed_in = Vec::new();
    for n in 0..2 {
        let receipts = vec![
            shop.receipt(id, n, 0..100),
            of(n, paid, all()),
            of(n, DeliveryId { delivery: 2, ..paid }, all()),
            of(n, DeliveryId { transaction: TransactionId::from_bytes([4; 16]), ..paid }, all()),
            of(n, paid, ChunkSet::from_range(0..10_240)),
        ];
        handed_in.extend(receipts.iter().map(|receipt| (n, receipt.id())));
        Outbox::of(&shop, n).send(&shop, receipts.clone()).await;
        // The same through an outbox that is said to be new.
        Outbox::of(&shop, n).send(&shop, receipts).await;
    }
    // Together more than the content, a quarter and 16 MiB: the lease is void from here on.
    assert!(2 * claimed > lease.allowance);
    assert_eq!(shop.admitted(&shop.client, &envelope), Err(RefusalCode::Revoked));
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Settled);
    let late = of(2, paid, all());
    handed_in.push((2, late.id()));
    Outbox::of(&shop, 2).send(&shop, vec![late]).await;

    let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
    let parts: u128 = closed.lines.iter().map(|line| line.parts).sum();
    assert!(parts <= u128::from(lease.ceiling) << 20, "over the ceiling");
    assert_eq!(closed.lines.iter().map(|line| line.bytes).sum::<u64>(), claimed, "every byte is paid once");
    let owed: i64 = shop.balance_of_seeders().await;
    assert!(u64::try_from(owed).unwrap() * 1_000_000 <= lease.ceiling && owed > 0, "{owed}");
    assert_eq!(shop.balance("escrow").await, 0);

    // Each seeder can ask of each receipt what became of it, and gets a reason for what is not paid.
    let mut fates = std::collections::BTreeMap::new();
    for (n, receipt) in &handed_in {
        let told = crate::statements::explain(&shop.ctx, shop.seeders[*n].peer_id(), *receipt).unwrap();
        let fate = told.line.fate.as_str();
        assert!(fate == "accepted" || told.summary().len() > fate.len() + 20, "{}", told.summary());
        *fates.entry(fate).or_insert(0) += 1;
    }
    println!("{} receipts: {fates:?}; {} of {} minor units paid", handed_in.len(), owed, lease.ceiling / 1_000_000);
    assert_eq!(fates.get("accepted"), Some(&4), "the hundreds that were sent, and the two thousands");
    assert_eq!(fates.values().sum::<usize>(), handed_in.len());
    shop.close().await;
}

#[tokio::test]
async fn a_price_that_leaves_little_bounds_what_is_paid() {
    // 640 KiB at 1,000 minor units a MiB would cost more than the 281 that are left of the price.
    let shop = Shop::open(Terms { rate: 1_000_000_000, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    assert_eq!(shop.balance("escrow").await, -281);
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
    assert_eq!(shop.state(id), TransactionState::Settled);
    let paid = -shop.balance(&format!("seeder:{}", shop.seeders[0].peer_id())).await;
    assert!((250..=281).contains(&paid), "{paid}");
    shop.close().await;
}

#[tokio::test]
async fn replications_are_counted_under_their_order_and_paid_by_the_network() {
    let shop = Shop::open(Terms::default()).await;
    let order = TransactionId::from_bytes([6; 16]);
    let now = now_ms();
    let receiver = shop.seeders[1].clone();
    let document = ReplicationOrder {
        network: shop.ctx.network(),
        order,
        manifest: shop.manifest,
        seeder: receiver.peer_id(),
        issued_at: now,
        until: now + 1000,
        allowance: 1 << 20,
        rate: 10_000_000,
        currency: Currency::USD,
        ceiling: 7_000_000,
    };
    let signed = shop.ctx.keys.sign(KeyPurpose::Ticket, &document);
    shop.ctx.db.write(move |txn| ORDERS.put(txn, &order, &OrderRecord { signed: signed.clone() })).await.unwrap();
    let delivery = DeliveryId { transaction: order, delivery: ReplicationOrder::DELIVERY };
    let receipt = |by: &protocol::Keypair, n: usize, chunks| Receipt {
        ack: shop.ack(by, delivery, shop.seeders[n].peer_id(), ChunkSet::from_range(chunks)),
        completion: None,
        first_at: 1,
        last_at: 2,
    };
    let mut outbox = Outbox::of(&shop, 0);
    outbox.send(&shop, vec![receipt(&receiver, 0, 0..3), receipt(&shop.client, 0, 0..9)]).await;
    outbox.send(&shop, vec![receipt(&receiver, 0, 0..10)]).await;
    // The receiver cannot sell to itself.
    Outbox::of(&shop, 1).send(&shop, vec![receipt(&receiver, 1, 0..10)]).await;
    let codes: Vec<Option<String>> = statuses(&shop).await.into_iter().map(|(_, code)| code).collect();
    assert_eq!(codes, [None, Some("bad-ack".into()), None, Some("bad-receipt".into())]);
    let closed = shop.delivery(order, 0).unwrap().closed.unwrap();
    assert_eq!(closed.charged, 7);
    assert_eq!(shop.balance("network-cost").await, 7);
    assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[0].peer_id())).await, -6);
    let shown = shop.control(json!({"cmd": "transaction", "id": order})).await.unwrap();
    assert_eq!(shown["replication"], true);
    shop.close().await;
}
