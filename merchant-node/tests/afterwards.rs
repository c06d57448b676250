//! What a shop hears of its sales after they were released: that the manager lost them, or took them back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod market;

use market::{Fault, LIMIT, Market, Shop, body, eventually};
use protocol::RefusalCode;
use protocol::api::TransactionState;
use protocol::manifest::KeyPolicy;
use serde_json::{Value, json};

#[tokio::test]
async fn a_sale_that_a_restored_manager_forgot_is_refunded_at_the_shop_and_no_other() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(999).await;
    let bought = shop.post("k", &body(&market.manager, "prepaid", &code)).await;
    shop.at_stage(&market.dir, &bought.id(), "done").await;
    let refund = json!({ "cmd": "refund", "order": bought.id() });

    // A manager that merely does not know it proves nothing.
    market.manager.forget(false);
    let refused = shop.control(&market.dir, refund.clone()).await.unwrap_err().to_string();
    assert!(refused.contains("restored from a backup") && refused.contains("manager restored"), "{refused}");
    assert_eq!(shop.stage(&market.dir, &bought.id()).await, "done");
    assert_eq!(shop.balance(&market.dir).await, (0, 0, 999));

    market.manager.forget(true);
    for _ in 0..2 {
        let done = shop.control(&market.dir, refund.clone()).await.unwrap();
        assert_eq!((&done["stage"], &done["error"]["code"]), (&json!("refunded"), &json!("forgotten")), "{done}");
        assert_eq!(shop.balance(&market.dir).await, (999, 0, 0));
    }
    shop.running.stop(LIMIT).await.unwrap();
    market.manager.down().await;
}

#[tokio::test]
async fn a_payment_that_waits_for_a_forgotten_sale_is_let_go() {
    let market = Market::new().await;
    market.manager.policy(KeyPolicy::OnCompletion);
    let shop = market.open().await;
    let code = shop.voucher(999).await;
    let bought = shop.post("k", &body(&market.manager, "prepaid", &code)).await;
    shop.at_stage(&market.dir, &bought.id(), "awaiting-completion").await;

    market.manager.forget(false);
    let order = json!({ "cmd": "order", "order": bought.id() });
    eventually("what it waits for", || async {
        let shown = shop.control(&market.dir, order.clone()).await.unwrap();
        shown["waits"].as_str().is_some_and(|why| why.contains("restored from a backup")).then_some(())
    })
    .await;
    assert_eq!(shop.stage(&market.dir, &bought.id()).await, "awaiting-completion");

    market.manager.forget(true);
    shop.at_stage(&market.dir, &bought.id(), "refunded").await;
    assert_eq!(shop.balance(&market.dir).await, (999, 0, 0));
    let shown = shop.control(&market.dir, order).await.unwrap();
    assert_eq!((&shown["error"]["code"], &shown["waits"]), (&json!("forgotten"), &json!(null)), "{shown}");
    shop.running.stop(LIMIT).await.unwrap();
    market.manager.down().await;
}

async fn sold(market: &Market, shop: &Shop, key: &str, code: &str) -> String {
    let order = shop.post(key, &body(&market.manager, "prepaid", code)).await.id();
    shop.at_stage(&market.dir, &order, "done").await;
    order
}

/// The order still says what happened, and not any more that the payment stays taken.
fn assert_given_back(order: &serde_json::Value, what: &str) {
    let message = order["error"]["message"].as_str().unwrap();
    assert!(message.contains(what) && message.contains("the shop gave the payment back"), "{message}");
    assert!(!message.contains("stays taken"), "{message}");
}

#[tokio::test]
async fn what_the_manager_refunds_is_paid_back_also_to_a_shop_that_was_away_and_after_a_restore() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(4 * 999).await;
    let first = sold(&market, &shop, "k1", &code).await;
    let away = sold(&market, &shop, "k2", &code).await;
    let later = sold(&market, &shop, "k3", &code).await;
    let kept = sold(&market, &shop, "k4", &code).await;

    market.manager.take_back(&first, TransactionState::Refunded);
    shop.at_stage(&market.dir, &first, "refunded").await;
    assert_eq!(shop.balance(&market.dir).await, (999, 0, 3 * 999));
    let shown = shop.get(&format!("/v1/purchases/{first}")).await.json();
    assert_eq!((&shown["payment"], &shown["error"]["code"]), (&json!("returned"), &json!("refunded")), "{shown}");
    assert_eq!(market.manager.refund_calls(), 0, "the manager did it already");

    shop.stop().await;
    market.manager.take_back(&away, TransactionState::Refunded);
    let shop = market.open().await;
    shop.at_stage(&market.dir, &away, "refunded").await;

    // The numbers begin anew: what comes now is not taken for what was seen before.
    market.manager.restored();
    market.manager.take_back(&later, TransactionState::Refunded);
    shop.at_stage(&market.dir, &later, "refunded").await;
    assert_eq!(shop.balance(&market.dir).await, (3 * 999, 0, 999));
    assert_eq!(shop.stage(&market.dir, &kept).await, "done");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test]
async fn what_was_completed_is_told_to_a_restored_manager_and_not_paid_back_where_it_has_forgotten_it() {
    let market = Market::new().await;
    market.manager.policy(KeyPolicy::OnCompletion);
    let shop = market.open().await;
    let code = shop.voucher(3 * 999).await;
    let buy = body(&market.manager, "prepaid", &code);
    let completed = shop.post("completed", &buy).await.id();
    shop.at_stage(&market.dir, &completed, "awaiting-completion").await;
    market.manager.set_state(TransactionState::Delivered);
    shop.at_stage(&market.dir, &completed, "done").await;
    let waiting = shop.post("waiting", &buy).await.id();
    shop.at_stage(&market.dir, &waiting, "awaiting-completion").await;
    let show = json!({ "cmd": "order", "order": completed });
    let transaction = shop.control(&market.dir, show.clone()).await.unwrap()["transaction"].clone();

    // Away while the manager comes back, and there again: told all the same, and of what was paid for alone.
    shop.stop().await;
    market.manager.set_state(TransactionState::Released);
    market.manager.restored();
    let shop = market.open().await;
    eventually("the payment being told of", || async { (!market.manager.told().is_empty()).then_some(()) }).await;
    assert_eq!(json!(market.manager.told()), json!([transaction]));

    // One that refunds it all the same had the buyer's goods for nothing.
    market.manager.knows_captured(false);
    market.manager.take_back(&completed, TransactionState::Refunded);
    market.manager.take_back(&waiting, TransactionState::Refunded);
    shop.at_stage(&market.dir, &waiting, "refunded").await;
    let shown = eventually("the reason on the order", || async {
        shop.running.nudge();
        let shown = shop.control(&market.dir, show.clone()).await.unwrap();
        (shown["error"]["code"] == "refunded").then_some(shown)
    })
    .await;
    assert_eq!(shown["stage"], "done", "{shown}");
    assert!(shown["error"]["message"].as_str().unwrap().contains("unless the shop refunds it"), "{shown}");
    assert_eq!(shop.balance(&market.dir).await, (2 * 999, 0, 999));
    // The merchant may.
    let refunded = shop.control(&market.dir, json!({ "cmd": "refund", "order": completed })).await.unwrap();
    assert_eq!(refunded["stage"], "refunded");
    assert_given_back(&refunded, "the buyer may have the goods");
    assert_eq!(shop.balance(&market.dir).await, (3 * 999, 0, 0));
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test]
async fn what_the_manager_revokes_says_so_and_is_paid_back_when_the_merchant_wants_it() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(999).await;
    let order = sold(&market, &shop, "k", &code).await;
    market.manager.take_back(&order, TransactionState::Revoked);
    let show = json!({ "cmd": "order", "order": order });
    eventually("the reason on the order", || async {
        shop.running.nudge();
        let shown = shop.control(&market.dir, show.clone()).await.unwrap();
        (shown["error"]["code"] == "revoked").then_some(())
    })
    .await;
    assert_eq!(shop.stage(&market.dir, &order).await, "done");
    assert_eq!(shop.balance(&market.dir).await, (0, 0, 999));
    let refunded = shop.control(&market.dir, json!({ "cmd": "refund", "order": order })).await.unwrap();
    assert_eq!(refunded["stage"], "refunded");
    assert_given_back(&refunded, "the manager revoked this sale");
    assert_eq!(shop.balance(&market.dir).await, (999, 0, 0));
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test]
async fn a_refund_whose_money_is_not_back_yet_is_told_to_a_restored_manager_as_well() {
    let market = Market::new().await;
    let shop = market.open().await;
    let order = shop.post("k", &body(&market.manager, "cash", "a")).await.id();
    shop.at_stage(&market.dir, &order, "done").await;
    market.cash.fail("refund");
    let waits = shop.control(&market.dir, json!({ "cmd": "refund", "order": order })).await.unwrap_err().to_string();
    assert!(waits.contains("out of order"), "{waits}");
    assert_eq!(shop.stage(&market.dir, &order).await, "voiding");

    // The manager forgets it: the price is due again by its books.
    market.manager.set_state(TransactionState::Settled);
    market.manager.restored();
    eventually("the refund at the manager", || async {
        shop.running.nudge();
        (market.manager.states() == [TransactionState::Refunded]).then_some(())
    })
    .await;
    market.cash.repair();
    shop.at_stage(&market.dir, &order, "refunded").await;
    assert_eq!(market.cash.states(), ["refunded"]);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test]
async fn a_merchant_whose_certificate_was_revoked_says_so() {
    let market = Market::new().await;
    let shop = market.open().await;
    let status = || async { shop.control(&market.dir, json!({ "cmd": "status" })).await.unwrap() };
    assert_eq!((&status().await["enrolled"], shop.get("/health").await.status), (&json!(true), 200));
    market.manager.revoke_merchant(true);
    let shown = eventually("the revocation", || async {
        let shown = status().await;
        (shown["enrolled"] == false).then_some(shown)
    })
    .await;
    assert!(shown["revoked"].is_string() && shown["health"]["ok"] == false, "{shown}");
    let health = shop.get("/health").await;
    assert_eq!(health.status, 503);
    assert!(health.json()["reasons"][0].as_str().unwrap().starts_with("revoked: "), "{:?}", health.json());
    market.manager.revoke_merchant(false);
    eventually("the end of it", || async { (status().await["enrolled"] == true).then_some(()) }).await;
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test]
async fn a_shop_that_is_refused_a_sale_as_revoked_knows_at_once_whether_it_is() {
    let mut market = Market::new().await;
    market.config.refresh_ms = 600_000;
    let shop = market.open().await;
    let code = shop.voucher(2 * 999).await;
    let buy = body(&market.manager, "prepaid", &code);
    let status = || async { shop.control(&market.dir, json!({ "cmd": "status" })).await.unwrap() };
    // A product that was taken down is no word about the shop.
    market.manager.fault(Fault::RefuseReserve(RefusalCode::Revoked));
    assert_eq!(shop.post("product", &buy).await.error().1, "revoked");
    assert_eq!((&status().await["enrolled"], shop.get("/health").await.status), (&json!(true), 200));
    market.manager.revoke_merchant(true);
    assert_eq!(shop.post("shop", &buy).await.error().1, "revoked");
    let shown = status().await;
    assert!(shown["enrolled"] == false && shown["revoked"].is_string(), "{shown}");
    assert_eq!(shop.get("/health").await.status, 503);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test]
async fn a_revoked_shop_takes_no_money_after_a_restart_while_the_manager_is_away() {
    let market = Market::new().await;
    let shop = market.open().await;
    let code = shop.voucher(2 * 999).await;
    let buy = body(&market.manager, "prepaid", &code);
    market.manager.revoke_merchant(true);
    let refused = |shown: Value| (shown["enrolled"] == false && shown["revoked"].is_string()).then_some(());
    let status = json!({ "cmd": "status" });
    eventually("the revocation", || async { refused(shop.control(&market.dir, status.clone()).await.unwrap()) }).await;
    assert_eq!(shop.post("before", &buy).await.error(), (503, "revoked".to_owned()));
    shop.stop().await;
    market.manager.down().await;

    // Nobody is there to say it again.
    let shop = market.open().await;
    let shown = shop.control(&market.dir, status.clone()).await.unwrap();
    assert!(refused(shown.clone()).is_some(), "{shown}");
    assert_eq!(shop.get("/health").await.status, 503);
    assert_eq!(shop.post("away", &buy).await.error(), (503, "revoked".to_owned()));
    let shown = shop.control(&market.dir, status.clone()).await.unwrap();
    assert_eq!((&shown["orders"]["total"], shop.balance(&market.dir).await), (&json!(0), (2 * 999, 0, 0)), "{shown}");

    // A manager that is back and says the same changes nothing; one that sells again does, also at the next start.
    market.manager.up().await;
    assert_eq!(shop.post("back", &buy).await.error(), (503, "revoked".to_owned()));
    market.manager.revoke_merchant(false);
    let sells = |shown: Value| (shown["enrolled"] == true && shown["revoked"].is_null()).then_some(());
    eventually("the end of it", || async {
        shop.running.nudge();
        sells(shop.control(&market.dir, status.clone()).await.unwrap())
    })
    .await;
    assert_eq!(shop.post("good", &buy).await.status, 201);
    shop.stop().await;
    market.manager.down().await;
    let shop = market.open().await;
    assert!(sells(shop.control(&market.dir, status).await.unwrap()).is_some());
    assert_eq!(shop.stage(&market.dir, &shop.only_order_at(&market.dir, "done").await).await, "done");
    shop.stop().await;
}
