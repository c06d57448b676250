//! Sales that are taken back while seeders have receipts of what they delivered: those are paid until a close that does
//! not wait for the end of the lease, and what was set aside for them comes back then.

use protocol::{RefusalCode, TransactionId};
use serde_json::Value;

use super::shop::{CHUNK, CHUNKS, Outbox, Shop, Terms};
use super::*;

/// What the merchant's credit and books say.
async fn credit(shop: &Shop) -> Value {
    let merchant = shop.merchant.peer_id();
    let asked = json!({"cmd": "credit", "merchant": merchant, "currency": "USD"});
    let shown = shop.control(asked).await.unwrap();
    let of = |field: &str| shown[field].as_i64().unwrap();
    json!([of("due"), of("earned"), of("open"), of("owed"), of("deposit")])
}

/// So much is paid in, and no credit is given beside it.
async fn deposit(shop: &Shop, minor: u64) {
    let merchant = shop.merchant.peer_id();
    let limit = json!({"cmd": "credit", "merchant": merchant, "currency": "USD", "limit_minor": 0});
    shop.control(limit).await.unwrap();
    let payment = json!({
        "cmd": "record-payment", "account": "merchant-due", "party": merchant, "minor": minor, "currency": "USD",
        "reference": "deposit",
    });
    shop.control(payment).await.unwrap();
}

async fn refund(shop: &Shop, transaction: TransactionId) {
    let answer = shop.sales(SalesRequest::Refund { transaction }).await.unwrap();
    assert_eq!(answer, SalesResponse::State(TransactionState::Refunded));
}

async fn postings(shop: &Shop, id: TransactionId) -> usize {
    let shown = shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap();
    shown["postings"].as_array().unwrap().len()
}

async fn statuses(shop: &Shop) -> Vec<(String, String)> {
    let listed = shop.control(json!({"cmd": "receipts"})).await.unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    listed["receipts"].as_array().unwrap().iter().map(|line| (text(&line["status"]), text(&line["code"]))).collect()
}

#[tokio::test]
async fn what_was_revoked_and_is_given_back_after_that_is_due_no_more() {
    for closed in [false, true] {
        let shop = Shop::open(Terms::default()).await;
        let (id, _) = shop.buy("o").await;
        Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..8)]).await;
        shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.unwrap();
        let close = async || chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
        if closed {
            close().await;
        }
        let merchant = shop.merchant.peer_id();
        let due = async || shop.balance(&format!("merchant-due:{merchant}")).await;
        assert_eq!(due().await, 999, "money stays where it is");
        refund(&shop, id).await;
        refund(&shop, id).await;
        close().await;
        // Half a MiB at 10 minor units a MiB.
        assert_eq!((due().await, shop.state(id)), (5, TransactionState::Refunded));
        for account in ["rights-holder:Band", "network-fee", "escrow", &format!("merchant-earned:{merchant}")] {
            assert_eq!(shop.balance(account).await, 0, "{account}");
        }
        assert!(shop.is_revoked(id));
        shop.close().await;
    }
    // Where nothing was paid, nothing goes back.
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.unwrap();
    let answer = shop.sales(SalesRequest::Refund { transaction: id }).await.unwrap();
    assert_eq!(answer, SalesResponse::State(TransactionState::Revoked));
    assert_eq!(postings(&shop, id).await, 0);
    shop.close().await;
}

#[tokio::test]
async fn receipts_that_a_refund_overtakes_are_paid_and_the_rest_comes_back_at_the_close() {
    let shop = Shop::open(Terms::default()).await;
    deposit(&shop, 8).await;
    let (id, envelope) = shop.buy("o").await;
    // What was paid ahead stands for it no more: it is a part of what is due.
    assert_eq!(credit(&shop).await, json!([999 - 8, 274, 7, 0, 0]));
    // Both seeders delivered, and the receipts are still with them.
    let before = now_ms();
    for _ in 0..2 {
        refund(&shop, id).await;
    }
    assert!(shop.is_revoked(id));
    assert_eq!(shop.admitted(&shop.client, &envelope), Err(RefusalCode::Revoked));
    // The price is back, to the last unit but what is set aside.
    assert_eq!(credit(&shop).await, json!([7 - 8, 0, 7, 0, 8]));
    assert_eq!(shop.balance("rights-holder:Band").await, 0);
    assert_eq!(shop.balance("network-fee").await, 0);
    assert_eq!(shop.balance("escrow").await, -7);
    let due_at = shop.delivery(id, 1).unwrap().due_at;
    let grace_ms = shop.ctx.config.close_grace_ms;
    assert!((before + grace_ms..=now_ms() + grace_ms).contains(&due_at), "a week of lease is not waited for");

    let (mut a, mut b) = (Outbox::of(&shop, 0), Outbox::of(&shop, 1));
    let batch = a.batch(vec![shop.receipt(id, 0, 0..4), shop.receipt(id, 0, 0..2)]);
    for _ in 0..2 {
        crate::receipts::accept_batch(&shop.ctx, a.key.peer_id(), batch.clone()).await.unwrap();
    }
    b.send(&shop, vec![shop.receipt(id, 1, 4..8)]).await;
    let counted = |s: &str| (s.to_owned(), String::new());
    assert_eq!(statuses(&shop).await, [counted("counted"), counted("duplicate"), counted("counted")]);
    chore::step(&shop.ctx, due_at - 1).await.unwrap();
    refund(&shop, id).await;
    assert!(shop.delivery(id, 1).unwrap().closed.is_none());
    assert_eq!(credit(&shop).await, json!([7 - 8, 0, 7, 0, 8]), "the deposit is bound until the close");
    assert_eq!(shop.balance_of_seeders().await, 0);

    // Half a MiB at 10 minor units a MiB: five, of which each seeder has two and a half.
    for _ in 0..2 {
        chore::step(&shop.ctx, due_at).await.unwrap();
        refund(&shop, id).await;
        assert_eq!(shop.delivery(id, 1).unwrap().closed.unwrap().charged, 5);
        assert_eq!(credit(&shop).await, json!([5 - 8, 0, 0, 0, 3]));
        assert_eq!(shop.balance("escrow").await, 0);
        for n in 0..2 {
            assert_eq!(shop.balance(&format!("seeder:{}", shop.seeders[n].peer_id())).await, -2);
        }
        assert_eq!(shop.balance("seeder-pot").await, -1);
        assert_eq!(postings(&shop, id).await, 4, "sale, refund, close, and the rest");
    }
    assert_eq!(shop.state(id), TransactionState::Refunded);
    b.send(&shop, vec![shop.receipt(id, 1, 4..10)]).await;
    assert_eq!(statuses(&shop).await[0], ("rejected".to_owned(), "wrong-state".to_owned()));
    assert_eq!(shop.balance_of_seeders().await, 4);

    // What a seeder can show for it, and the evidence of the sale.
    let report = crate::evidence::pack(&shop.ctx, id, now_ms()).unwrap().verify(&shop.ctx.trust().root());
    assert!(report.ok, "{report:#?}");
    assert_eq!(report.facts.received.acknowledged_bytes, Some(8 * u64::from(CHUNK)));
    shop.close().await;
}

#[tokio::test]
async fn a_refunded_delivery_that_turns_out_whole_is_closed_at_once() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    refund(&shop, id).await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..CHUNKS)]).await;
    // 6.25 are earned, 7 charged, and nothing of the seven is left to come back.
    assert_eq!(shop.delivery(id, 1).unwrap().closed.unwrap().charged, 7);
    assert_eq!(credit(&shop).await, json!([7, 0, 0, 7, 0]));
    assert_eq!(shop.balance_of_seeders().await, 6);
    assert_eq!(shop.state(id), TransactionState::Refunded);
    shop.close().await;
}

#[tokio::test]
async fn a_completed_delivery_keeps_its_time_when_it_is_refunded() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let mut receipt = shop.receipt(id, 0, 0..4);
    receipt.completion = Some(shop.completion(DeliveryId { transaction: id, delivery: 1 }));
    Outbox::of(&shop, 0).send(&shop, vec![receipt]).await;
    assert_eq!(shop.state(id), TransactionState::Delivered);
    let due_at = shop.delivery(id, 1).unwrap().due_at;
    wait_past(now_ms()).await;
    refund(&shop, id).await;
    assert_eq!(shop.delivery(id, 1).unwrap().due_at, due_at);
    // Nor does a completion that comes after the refund move the close.
    let (other, _) = shop.buy("p").await;
    refund(&shop, other).await;
    let due_at = shop.delivery(other, 1).unwrap().due_at;
    wait_past(now_ms()).await;
    let mut receipt = shop.receipt(other, 1, 0..4);
    receipt.completion = Some(shop.completion(DeliveryId { transaction: other, delivery: 1 }));
    Outbox::of(&shop, 1).send(&shop, vec![receipt]).await;
    assert_eq!(shop.delivery(other, 1).unwrap().due_at, due_at);
    assert_eq!(shop.state(other), TransactionState::Refunded);
    chore::step(&shop.ctx, due_at).await.unwrap();
    assert_eq!(shop.balance("escrow").await, 0);
    assert_eq!(shop.balance_of_seeders().await, 4);
    shop.close().await;
}

#[tokio::test]
async fn a_revoked_sale_pays_its_seeders_and_leaves_the_rest_to_the_merchant() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    for _ in 0..2 {
        shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.unwrap();
    }
    assert_eq!(shop.state(id), TransactionState::Revoked);
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..8)]).await;
    assert_eq!(credit(&shop).await, json!([999, 274, 7, 0, 0]), "the money stays where it is");
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(credit(&shop).await, json!([999, 274 + 2, 0, 5, 0]));
    assert_eq!(shop.balance("escrow").await, 0);
    assert_eq!(shop.balance_of_seeders().await, 5);
    assert_eq!(shop.state(id), TransactionState::Revoked);
    shop.close().await;
}

#[tokio::test]
async fn a_held_payment_that_was_given_back_is_never_taken_and_its_seeders_are_paid() {
    for revoke in [false, true] {
        let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
        let (id, _) = shop.buy("o").await;
        let state = if revoke {
            shop.control(json!({"cmd": "revoke-transaction", "id": id})).await.unwrap();
            TransactionState::Revoked
        } else {
            refund(&shop, id).await;
            TransactionState::Refunded
        };
        let mut receipt = shop.receipt(id, 0, 0..8);
        receipt.completion = Some(shop.completion(DeliveryId { transaction: id, delivery: 1 }));
        Outbox::of(&shop, 0).send(&shop, vec![receipt]).await;
        assert_eq!(code(shop.complete(id).await), "revoked");
        assert!(!shop.sale(id).release.unwrap().captured);
        assert_eq!(credit(&shop).await, json!([0, 0, 7, 0, 0]));
        for _ in 0..2 {
            chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
            // What was delivered is the merchant's cost, and nothing else was ever booked.
            assert_eq!(credit(&shop).await, json!([5, 0, 0, 5, 0]));
            assert_eq!(shop.balance("rights-holder:Band").await, 0);
            assert_eq!(shop.balance_of_seeders().await, 5);
            assert_eq!(shop.state(id), state);
        }
        shop.close().await;
    }
}

#[tokio::test]
async fn whoever_signs_too_much_after_a_refund_ends_the_waiting() {
    let shop = Shop::open(Terms { chunks: 1024, rate: 4_000_000, ..Terms::default() }).await;
    let (id, envelope) = shop.buy("o").await;
    let lease = envelope.ticket.lease.peek().unwrap();
    refund(&shop, id).await;
    let epoch = shop.ctx.revocations.number();
    for n in 0..3 {
        Outbox::of(&shop, n).send(&shop, vec![shop.receipt(id, n, 0..620)]).await;
    }
    let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
    assert!(closed.lines.iter().map(|line| line.parts).sum::<u128>() <= u128::from(lease.ceiling) << 20);
    assert_eq!(closed.lines.iter().map(|line| line.bytes).sum::<u64>(), 620 * u64::from(CHUNK));
    assert_eq!((shop.state(id), shop.sale(id).generation), (TransactionState::Refunded, 0));
    assert_eq!(shop.ctx.revocations.number(), epoch, "seeders heard of it before");
    assert_eq!(shop.balance("escrow").await, 0);
    let charged = i64::try_from(closed.charged).unwrap();
    assert_eq!(credit(&shop).await, json!([charged, 0, 0, charged, 0]));
    shop.close().await;
}

#[tokio::test]
async fn a_moved_purchase_that_is_refunded_pays_for_its_first_delivery_only() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let phone = random_key();
    shop.move_on(id, &shop.client, phone.peer_id(), 1).await.unwrap();
    refund(&shop, id).await;
    assert!(shop.delivery(id, 1).unwrap().closed.is_none());
    assert_eq!(shop.delivery(id, 2).unwrap().closed.unwrap().charged, 0, "nothing was set aside for it");
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..8)]).await;
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(credit(&shop).await, json!([5, 0, 0, 5, 0]));
    assert_eq!(shop.balance_of_seeders().await, 5);
    shop.close().await;
}

#[tokio::test]
async fn a_refunded_sale_moves_out_of_the_store_once_its_delivery_is_closed() {
    let config = Config { archive_ms: 1000, ..Terms::default().config };
    let shop = Shop::open(Terms { config, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    refund(&shop, id).await;
    let archived = async || shop.control(json!({"cmd": "transaction", "id": id})).await.unwrap()["archived"].take();
    let due_at = shop.delivery(id, 1).unwrap().due_at;
    shop.running.run_due(due_at - 1).await.unwrap();
    assert_eq!(archived().await, false, "receipts may still come");
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..8)]).await;
    shop.running.run_due(due_at).await.unwrap();
    shop.running.run_due(due_at + 2000).await.unwrap();
    assert_eq!(archived().await, true);
    assert_eq!(credit(&shop).await, json!([5, 0, 0, 5, 0]));
    let before = shop.balance_of_seeders().await;
    // A refund that is repeated then brings it back and changes nothing.
    refund(&shop, id).await;
    assert_eq!(postings(&shop, id).await, 4);
    assert_eq!((credit(&shop).await, shop.balance_of_seeders().await), (json!([5, 0, 0, 5, 0]), before));
    shop.close().await;
}

#[tokio::test]
async fn a_free_sale_and_one_that_was_not_released_have_nothing_to_wait_for() {
    // A rate of nothing: nothing is set aside.
    let shop = Shop::open(Terms { rate: 0, ..Terms::default() }).await;
    let (id, _) = shop.buy("o").await;
    refund(&shop, id).await;
    assert!(shop.delivery(id, 1).unwrap().closed.is_some());
    assert_eq!(shop.control(json!({"cmd": "ledger"})).await.unwrap()["accounts"], json!([]));
    let reserved = shop.reserve("p").await.peek().unwrap().transaction;
    shop.control(json!({"cmd": "revoke-transaction", "id": reserved})).await.unwrap();
    assert!(shop.delivery(reserved, 1).is_none());
    shop.close().await;
}
