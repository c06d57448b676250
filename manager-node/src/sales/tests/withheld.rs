//! Purchases paid for on completion whose key is not given out any more: nobody pays for what nobody gets, and whoever
//! has paid gets the key.

use protocol::TransactionId;
use protocol::trust::Revocations as Added;

use super::shop::{Outbox, Shop, Terms};
use super::*;

fn on_completion() -> Terms {
    Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }
}

fn content(shop: &Shop) -> protocol::ContentId {
    shop.ctx.catalogue.product(&shop.product).unwrap().unwrap().manifest.peek().unwrap().content
}

/// The epoch alone, as when the manager stops right after it.
async fn epoch(shop: &Shop) {
    let contents = vec![content(shop)];
    shop.ctx.revocations.revoke(Added { contents, ..Added::default() }).await.unwrap();
}

async fn takedown(shop: &Shop) {
    shop.running.control(json!({"cmd": "revoke", "kind": "content", "id": shop.product})).await.unwrap();
}

/// A receipt of eight chunks with the completion.
async fn completed_receipt(shop: &Shop, id: TransactionId) {
    let mut receipt = shop.receipt(id, 0, 0..8);
    receipt.completion = Some(shop.completion(DeliveryId { transaction: id, delivery: 1 }));
    Outbox::of(shop, 0).send(shop, vec![receipt]).await;
}

fn is_captured(shop: &Shop, id: TransactionId) -> bool {
    shop.sale(id).release.unwrap().captured
}

/// Refunded, its seeder paid by the merchant, and nothing else in the books.
async fn given_back(shop: &Shop, id: TransactionId) {
    assert_eq!((shop.state(id), is_captured(shop, id)), (TransactionState::Refunded, false));
    assert!(shop.is_revoked(id), "seeders hear of it");
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(shop.balance("rights-holder:Band").await, 0);
    assert_eq!(shop.balance_of_seeders().await, 5);
    assert_eq!(shop.balance(&format!("merchant-due:{}", shop.merchant.peer_id())).await, 5);
    let SalesResponse::TakenBack { sales, .. } = shop.sales(SalesRequest::TakenBack { after: 0 }).await.unwrap() else {
        panic!("no list")
    };
    let listed: Vec<_> = sales.iter().map(|sale| (sale.transaction, sale.state, sale.captured)).collect();
    assert_eq!(listed, [(id, TransactionState::Refunded, false)], "the shop gives the payment back");
}

fn says_taken_down<T: std::fmt::Debug>(result: Result<T, Refusal>) {
    let refusal = result.unwrap_err();
    assert_eq!(refusal.code, RefusalCode::Revoked);
    assert!(refusal.detail.contains("taken down") && refusal.detail.contains("refunded"), "{refusal}");
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Completion,
    Receipt,
    Ticket,
    Time,
    Takedown,
}

#[tokio::test]
async fn what_is_taken_down_before_its_key_is_out_is_paid_by_nobody() {
    for by in [By::Completion, By::Receipt, By::Ticket, By::Time, By::Takedown] {
        let shop = Shop::open(on_completion()).await;
        let (id, _) = shop.buy("o").await;
        let mut seeder = Outbox::of(&shop, 0);
        if by != By::Receipt {
            seeder.send(&shop, vec![shop.receipt(id, 0, 0..8)]).await;
        }
        if by == By::Takedown {
            takedown(&shop).await
        } else {
            epoch(&shop).await
        }
        match by {
            By::Completion => says_taken_down(shop.complete(id).await),
            By::Receipt => completed_receipt(&shop, id).await,
            By::Ticket => says_taken_down(shop.ticket(id).await),
            By::Time => chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap(),
            By::Takedown => assert_eq!(shop.state(id), TransactionState::Refunded, "at once"),
        }
        // Again, and in every other way.
        says_taken_down(shop.complete(id).await);
        says_taken_down(shop.ticket(id).await);
        completed_receipt(&shop, id).await;
        takedown(&shop).await;
        given_back(&shop, id).await;
        shop.close().await;
    }
}

#[tokio::test]
async fn who_paid_before_a_takedown_gets_the_key_after_it() {
    for lease_ms in [7 * 86_400_000, 1] {
        for by_receipt in [true, false] {
            let shop = Shop::open(Terms { lease_ms, ..on_completion() }).await;
            let (id, envelope) = shop.buy("o").await;
            assert!(envelope.grant.is_none());
            if by_receipt {
                completed_receipt(&shop, id).await;
            } else {
                // The answer is lost.
                shop.complete(id).await.unwrap();
            }
            assert!(is_captured(&shop, id));
            takedown(&shop).await;
            wait_past(now_ms()).await;
            for _ in 0..2 {
                let MailboxResponse::Completed { grant } = shop.complete(id).await.unwrap() else { panic!("no grant") };
                let ticket = shop.ticket(id).await.unwrap();
                let (data, lease) = (ticket.ticket.data.peek().unwrap(), ticket.ticket.lease.peek().unwrap());
                for grant in [grant.unwrap(), ticket.grant.unwrap()] {
                    let secret = grant.open(&shop.client, &data, &lease).unwrap();
                    assert_eq!(secret.commitment(), shop.secret.commitment());
                }
            }
            assert!(is_captured(&shop, id) && !shop.is_revoked(id));
            assert_ne!(shop.state(id), TransactionState::Refunded);
            // To nobody else, and no more than the key: whoever it would be moved to can fetch nothing.
            assert!(shop.move_on(id, &shop.client, random_key().peer_id(), 1).await.is_err());
            shop.close().await;
        }
    }
}

#[tokio::test]
async fn what_is_sold_with_its_key_is_as_it_was_after_a_takedown() {
    let shop = Shop::open(Terms::default()).await;
    let (id, _) = shop.buy("o").await;
    let (delivered, _) = shop.buy("p").await;
    Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(delivered, 0, 0..10)]).await;
    let asked = json!({"cmd": "revoke", "kind": "content", "id": shop.product});
    let answer = shop.running.control(asked).await.unwrap();
    assert_eq!(code(shop.ticket(id).await), "revoked");
    assert_eq!((shop.state(id), is_captured(&shop, id)), (TransactionState::Released, true));
    // Who has paid and gets nothing is named: in the books it ends like a delivery.
    let void = &answer["void"];
    assert_eq!((&void["purchase_count"], &void["purchases"][0]["transaction"]), (&json!(1), &json!(id)));
    shop.close().await;
}

/// The purchases are in the backup; that they were revoked, is not, and comes back from the seeders.
async fn revoked_since_the_backup(shop: Shop, transactions: Vec<TransactionId>) -> Shop {
    let shop = Box::pin(shop.restored()).await;
    shop.ctx.revocations.revoke(Added { transactions, ..Added::default() }).await.unwrap();
    shop
}

#[tokio::test]
async fn after_a_restore_nothing_is_captured_against_a_revocation_that_seeders_still_had() {
    let shop = Shop::open(on_completion()).await;
    let (by_client, by_seeder) = (shop.buy("1").await.0, shop.buy("2").await.0);
    let reserved = shop.reserve("3").await;
    let shop = revoked_since_the_backup(shop, vec![by_client, by_seeder, reserved.peek().unwrap().transaction]).await;
    for _ in 0..2 {
        assert_eq!(code(shop.complete(by_client).await), "revoked");
        assert_eq!(code(shop.ticket(by_client).await), "revoked");
        completed_receipt(&shop, by_seeder).await;
    }
    for id in [by_client, by_seeder] {
        assert!(!is_captured(&shop, id));
        assert!(shop.sale(id).release.unwrap().grant.is_none());
    }
    let endorsement = shop.endorse(&reserved, "3");
    let transaction = reserved.peek().unwrap().transaction;
    assert_eq!(code(shop.sales(SalesRequest::Release { transaction, endorsement }).await), "revoked");
    // Nothing is booked, and in time the held payments go back.
    assert_eq!(shop.balance(&format!("merchant-due:{}", shop.merchant.peer_id())).await, 0);
    let due = [by_client, by_seeder].map(|id| shop.delivery(id, 1).unwrap().due_at);
    chore::step(&shop.ctx, due.into_iter().max().unwrap()).await.unwrap();
    for id in [by_client, by_seeder] {
        assert_eq!((shop.state(id), is_captured(&shop, id)), (TransactionState::Refunded, false));
    }
    // The seeder has its pay, from the merchant.
    assert_eq!(shop.balance_of_seeders().await, 5);
    shop.close().await;
}

#[tokio::test]
async fn after_a_restore_a_takedown_waits_for_the_word_of_a_shop_that_was_paid_before_it() {
    let shop = Shop::open(on_completion()).await;
    let (paid, unpaid) = (shop.buy("1").await.0, shop.buy("2").await.0);
    let shop = Box::pin(shop.restored()).await;
    takedown(&shop).await;
    for id in [paid, unpaid] {
        // Not for good: the client keeps what it has, and asks again.
        let refusal = shop.complete(id).await.unwrap_err();
        assert!(refusal.code == RefusalCode::Overloaded && refusal.retry_after_ms > 0, "{refusal}");
        completed_receipt(&shop, id).await;
        assert_eq!((shop.state(id), is_captured(&shop, id)), (TransactionState::Delivering, false));
    }
    shop.sales(SalesRequest::Captured { transactions: vec![paid] }).await.unwrap();
    let MailboxResponse::Completed { grant } = shop.complete(paid).await.unwrap() else { panic!("no grant") };
    assert!(grant.is_some());
    chore::step(&shop.ctx, shop.delivery(unpaid, 1).unwrap().due_at).await.unwrap();
    assert_eq!((shop.state(unpaid), is_captured(&shop, unpaid)), (TransactionState::Refunded, false));
    shop.close().await;
}
