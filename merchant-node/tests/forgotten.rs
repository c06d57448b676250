//! What a shop hears of its sales after they were released: that the manager lost them, or took them back.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod market;

use market::{LIMIT, Market, body, eventually};
use protocol::manifest::KeyPolicy;
use serde_json::json;

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
