//! Payments held until a completion, over a restore from a backup: what was completed since the backup is forgotten, and is
//! not given back as if it had never been.

use protocol::TransactionId;

use super::shop::{Outbox, Shop, Terms};
use super::*;

fn on_completion() -> Terms {
    Terms { policy: KeyPolicy::OnCompletion, lease_ms: 1, ..Terms::default() }
}

async fn told(shop: &Shop, by: &protocol::Keypair, ids: &[TransactionId]) -> SalesResponse {
    shop.sales_as(by, SalesRequest::Captured { transactions: ids.to_vec() }).await.unwrap()
}

#[tokio::test]
async fn a_payment_that_the_shop_took_is_not_given_back_by_a_manager_that_forgot_why() {
    // Each of these was completed after the backup, but for the last.
    let shop = Shop::open(on_completion()).await;
    let (by_seeder, by_shop, by_client, never) =
        (shop.buy("1").await.0, shop.buy("2").await.0, shop.buy("3").await.0, shop.buy("4").await.0);
    let due_at = shop.delivery(never, 1).unwrap().due_at;
    wait_past(now_ms()).await;
    let shop = Box::pin(shop.restored()).await;

    // Its time was over while the manager was away: whoever knows more is waited for.
    let restored_at = shop.ctx.restored_at.unwrap();
    let until = restored_at + shop.ctx.config.close_grace_ms;
    let all = [by_seeder, by_shop, by_client, never];
    assert!(due_at < until);
    for at in [due_at, until - 1] {
        chore::step(&shop.ctx, at).await.unwrap();
    }
    for id in all {
        assert_eq!(shop.state(id), TransactionState::Released, "{id}");
    }

    let (fresh, _) = shop.buy("5").await;

    // A seeder sends the completion again, the client does, and the shop says what it took.
    let mut receipt = shop.receipt(by_seeder, 0, 0..4);
    receipt.completion = Some(shop.completion(DeliveryId { transaction: by_seeder, delivery: 1 }));
    Outbox::of(&shop, 0).send(&shop, vec![receipt]).await;
    shop.complete(by_client).await.unwrap();
    let rival = random_key();
    shop.enrol_merchant(&rival).await;
    assert_eq!(told(&shop, &rival, &[by_shop]).await, SalesResponse::States(vec![None]));
    assert!(!shop.sale(by_shop).release.unwrap().captured, "by its own merchant's word alone");
    assert!(shop.ticket(by_shop).await.unwrap().grant.is_none());
    let unknown = TransactionId::from_bytes([4; 16]);
    for _ in 0..2 {
        let SalesResponse::States(states) = told(&shop, &shop.merchant, &[by_shop, unknown, by_client, fresh]).await
        else {
            panic!("no states")
        };
        assert_eq!((states.len(), states[1]), (4, None));
    }
    assert!(!shop.sale(fresh).release.unwrap().captured, "of what was sold since, nobody's word is taken");
    // Who has paid has the key.
    assert!(shop.ticket(by_shop).await.unwrap().grant.is_some());
    assert_eq!(shop.balance(&format!("merchant-due:{}", shop.merchant.peer_id())).await, 3 * 999);

    // Then the rest is given back, and nothing else.
    chore::step(&shop.ctx, until).await.unwrap();
    assert_eq!(shop.state(never), TransactionState::Refunded);
    chore::step(&shop.ctx, until + 60_000).await.unwrap();
    for id in [by_seeder, by_shop, by_client] {
        assert!(shop.sale(id).release.unwrap().captured && !shop.is_revoked(id), "{id}");
        assert_eq!(shop.state(id), TransactionState::Settled, "{id}");
    }
    let SalesResponse::TakenBack { sales, .. } = shop.sales(SalesRequest::TakenBack { after: 0 }).await.unwrap() else {
        panic!("no list")
    };
    let listed: Vec<_> = sales.iter().map(|sale| (sale.transaction, sale.captured)).collect();
    assert_eq!(listed, [(never, false), (fresh, false)]);
    shop.control(json!({"cmd": "refund", "id": by_shop})).await.unwrap();
    let SalesResponse::TakenBack { sales, .. } = shop.sales(SalesRequest::TakenBack { after: 2 }).await.unwrap() else {
        panic!("no list")
    };
    assert_eq!((sales[0].transaction, sales[0].captured), (by_shop, true));
    shop.close().await;
}

#[tokio::test]
async fn without_a_restore_no_merchants_word_takes_the_place_of_a_completion() {
    let shop = Shop::open(on_completion()).await;
    let (id, _) = shop.buy("o").await;
    told(&shop, &shop.merchant, &[id]).await;
    assert!(!shop.sale(id).release.unwrap().captured);
    chore::step(&shop.ctx, shop.delivery(id, 1).unwrap().due_at).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Refunded);
    shop.close().await;
}

/// Paid with the release; the time in which receipts come is a minute.
fn short() -> Terms {
    let config = Config { close_grace_ms: 60_000, ..Terms::default().config };
    Terms { lease_ms: 1, config, ..Terms::default() }
}

#[tokio::test]
async fn receipts_whose_time_ran_out_while_the_manager_was_away_or_forgot_them_are_waited_for() {
    for restored in [false, true] {
        let shop = Shop::open(short()).await;
        let (id, _) = shop.buy("1").await;
        wait_past(shop.delivery(id, 1).unwrap().due_at - shop.ctx.config.close_grace_ms).await;
        let shop = Box::pin(async move { if restored { shop.restored().await } else { shop.crash().await } }).await;

        let due_at = shop.delivery(id, 1).unwrap().due_at;
        let until = shop.ctx.restored_at.max(Some(shop.ctx.started_at)).unwrap() + shop.ctx.config.close_grace_ms;
        assert!(due_at < until);
        for at in [due_at, until - 1] {
            chore::step(&shop.ctx, at).await.unwrap();
            assert!(shop.delivery(id, 1).unwrap().closed.is_none(), "restored: {restored}");
        }
        let receipt = shop.receipt(id, 0, 0..2);
        Outbox::of(&shop, 0).send(&shop, vec![receipt]).await;
        chore::step(&shop.ctx, until).await.unwrap();
        let closed = shop.delivery(id, 1).unwrap().closed.unwrap();
        assert!(closed.charged > 0 && shop.balance_of_seeders().await > 0, "restored: {restored}");
        assert_eq!(shop.state(id), TransactionState::Settled);
        shop.close().await;
    }
}

/// The buyer downloads again before the seeders of the first time are back: what they send again counts beside it.
#[tokio::test]
async fn a_download_after_a_restore_does_not_take_the_pay_of_those_whose_receipts_were_forgotten() {
    let terms = Terms { config: Config { close_grace_ms: 60_000, ..Terms::default().config }, ..Terms::default() };
    let shop = Shop::open(terms).await;
    let (id, _) = shop.buy("1").await;
    let before = [shop.receipt(id, 0, 0..6), shop.receipt(id, 1, 6..10)];
    let shop = Box::pin(shop.restored()).await;
    let restored_at = shop.ctx.restored_at.unwrap();
    wait_past(restored_at).await;
    Outbox::of(&shop, 2).send(&shop, vec![shop.receipt(id, 2, 0..10)]).await;
    assert_eq!(shop.state(id), TransactionState::Delivered);
    assert!(shop.delivery(id, 1).unwrap().closed.is_none());
    for (n, receipt) in before.into_iter().enumerate() {
        Outbox::of(&shop, n).send(&shop, vec![receipt]).await;
    }
    chore::step(&shop.ctx, restored_at.max(shop.ctx.started_at) + 60_000).await.unwrap();
    assert_eq!(shop.state(id), TransactionState::Settled);
    for seeder in &shop.seeders {
        let owed = -shop.balance(&format!("seeder:{}", seeder.peer_id())).await;
        assert!(owed > 0, "{owed}");
    }
    // Where only those of before come again, nothing is waited for.
    let (other, _) = shop.buy("2").await;
    let first = shop.receipt(other, 0, 0..10);
    let shop = Box::pin(shop.restored()).await;
    Outbox::of(&shop, 0).send(&shop, vec![first]).await;
    assert_eq!(shop.state(other), TransactionState::Settled);
    shop.close().await;
}

/// A completion that comes before it is known what was given back is not lost: its seeder is to send it again.
#[tokio::test]
async fn no_batch_is_taken_before_it_is_known_what_was_revoked() {
    let shop = Shop::open(Terms { policy: KeyPolicy::OnCompletion, ..Terms::default() }).await;
    let (id, _) = shop.buy("1").await;
    let shop = Box::pin(shop.restored()).await;
    let known = |known| shop.ctx.recalled.store(known, std::sync::atomic::Ordering::Release);
    known(false);
    let mut receipt = shop.receipt(id, 0, 0..10);
    let delivery = protocol::receipt::DeliveryId { transaction: id, delivery: 1 };
    receipt.completion = Some(shop.completion(delivery));
    let batch = Outbox::of(&shop, 0).batch(vec![receipt]);
    let take = async || crate::receipts::accept_batch(&shop.ctx, shop.seeders[0].peer_id(), batch.clone()).await;
    let refusal = take().await.unwrap_err();
    assert!(refusal.code == RefusalCode::Overloaded && refusal.retry_after_ms > 0, "{refusal}");
    assert_eq!(shop.state(id), TransactionState::Released);
    known(true);
    take().await.unwrap();
    assert!(shop.sale(id).release.unwrap().captured);
    shop.close().await;
}

async fn pay(shop: &Shop, again: bool) -> Result<serde_json::Value, String> {
    let command = json!({"cmd": "record-payment", "account": "seeder", "party": shop.seeders[0].peer_id(), "minor": 6,
        "currency": "USD", "reference": "r", "again": again});
    shop.control(command).await
}

/// What was earned since the backup is forgotten like the payment of it: nothing is owed yet when the payment is booked again.
#[tokio::test]
async fn a_payment_is_booked_again_before_what_it_was_for_is_known_again() {
    let terms = Terms { config: Config { close_grace_ms: 60_000, ..Terms::default().config }, ..Terms::default() };
    let shop = Shop::open(terms).await;
    let (id, _) = shop.buy("1").await;
    let seeder = shop.seeders[0].peer_id();
    let account = format!("seeder:{seeder}");
    let make = |shop: &Shop| crate::statements::make(&shop.ctx, seeder, now_ms()).unwrap();
    assert_eq!(pay(&shop, true).await, Err("malformed".to_owned()), "nothing was lost");
    let [first, second] = [shop.receipt(id, 0, 0..4), shop.receipt(id, 0, 0..10)];
    let shop = Box::pin(shop.restored()).await;

    assert_eq!(pay(&shop, false).await, Err("limit-reached".to_owned()));
    pay(&shop, true).await.unwrap();
    assert_eq!(pay(&shop, true).await, Err("idempotency-conflict".to_owned()), "once");
    assert_eq!(shop.balance(&account).await, 6);
    let payouts = shop.control(json!({"cmd": "payouts"})).await.unwrap();
    assert!(payouts["payouts"].as_array().unwrap().iter().all(|line| line["owed_minor"] == 0), "{payouts}");
    let log = shop.ctx.db.read(|txn| crate::audit::page(&shop.ctx.archive, txn, 0)).unwrap();
    let noted = log["entries"].as_array().unwrap().iter().find(|entry| entry["what"] == "payment").unwrap();
    assert_eq!(noted["detail"], "0.06 USD paid out, reference r; again, more than was owed after the restore");

    // Its statements hold meanwhile, and have the payment once it was earned.
    assert_eq!(make(&shop), 0);
    let mut outbox = Outbox::of(&shop, 0);
    outbox.send(&shop, vec![first]).await;
    assert_eq!(make(&shop), 1);
    outbox.send(&shop, vec![second]).await;
    // By then it is closed at the latest.
    let until = shop.ctx.restored_at.unwrap().max(shop.ctx.started_at) + shop.ctx.config.close_grace_ms;
    chore::step(&shop.ctx, until).await.unwrap();
    assert_eq!((make(&shop), shop.balance(&account).await), (2, 0));
    let told = [0, 1].map(|after| crate::statements::after(&shop.ctx, seeder, after).unwrap().unwrap().peek().unwrap());
    assert_eq!(told.each_ref().map(|statement| statement.payments.len()), [0, 1]);
    let [usd] = &told[1].balances[..] else { panic!("{told:?}") };
    assert_eq!((usd.credited, usd.paid, usd.after), (6, 6, 0));
    assert_eq!(make(&shop), 2);
    shop.close().await;
}
