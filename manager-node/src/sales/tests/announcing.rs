//! Revocation epochs as the manager makes them by itself: of whatever was taken back, and few of them.

use std::time::{Duration, Instant};

use protocol::TransactionId;
use protocol::api::{MailboxRequest, SalesRequest};
use protocol::entitlement::Move;
use protocol::trust::RevocationState;
use serde_json::json;
use store::Mark;

use super::*;
use crate::transactions::REVOKING;

/// Waits for an epoch that nobody made by hand.
async fn heard(shop: &Shop, what: impl Fn(&RevocationState) -> bool) {
    let heard = async {
        while !shop.ctx.revocations.with(&what) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), heard).await.unwrap();
}

#[tokio::test]
async fn refunds_one_after_the_other_share_epochs() {
    let shop = Shop::open(Terms::default()).await;
    let mut sold = Vec::new();
    for n in 0..24 {
        sold.push(shop.buy(&n.to_string()).await.0);
    }
    let (before, began) = (shop.ctx.revocations.number(), Instant::now());
    for transaction in sold.clone() {
        shop.running.sales(shop.merchant.peer_id(), SalesRequest::Refund { transaction }).await.unwrap();
    }
    heard(&shop, |revoked| sold.iter().all(|id| revoked.has_transaction(id))).await;
    let made = shop.ctx.revocations.number() - before;
    // However long it takes: half a second is between two of them, by the timer's milliseconds.
    let most = began.elapsed().as_millis() / 499 + 1;
    assert!((1..=most).contains(&u128::from(made)), "{made} epochs, at most {most}");
    shop.close().await;
}

#[tokio::test]
async fn whatever_is_taken_back_comes_to_an_epoch_by_itself() {
    let shop = Shop::open(Terms::default()).await;
    let [moved, refunded, left] = [shop.buy("a").await.0, shop.buy("b").await.0, shop.buy("c").await.0];
    let (network, to) = (shop.ctx.network(), random_key().peer_id());
    let word = Move { network, transaction: moved, to, generation: 1, at: now_ms() };
    let word = Signed::sign(&word, &shop.client);
    shop.running.mailbox(shop.client.peer_id(), MailboxRequest::Move { word }).await.unwrap();
    heard(&shop, |revoked| revoked.has_moved_on(&moved, 0)).await;
    shop.running.control(json!({"cmd": "refund", "id": refunded})).await.unwrap();
    heard(&shop, |revoked| revoked.has_transaction(&refunded)).await;
    // The manager stopped before it came to it.
    shop.ctx.db.write(move |txn| REVOKING.put(txn, &left, &Mark)).await.unwrap();
    let shop = shop.crash().await;
    heard(&shop, |revoked| revoked.has_transaction(&left)).await;
    // More than go into one epoch.
    let many: Vec<TransactionId> = (0..300).map(|n| TransactionId::new(n, [0; 10])).collect();
    let rows = many.clone();
    shop.ctx.db.write(move |txn| rows.iter().try_for_each(|id| REVOKING.put(txn, id, &Mark))).await.unwrap();
    shop.ctx.announcing.nudge();
    heard(&shop, |revoked| many.iter().all(|id| revoked.has_transaction(id))).await;
    shop.close().await;
}
