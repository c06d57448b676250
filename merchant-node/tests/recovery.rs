//! A merchant that is stopped at any point of an order, and started again, finishes it as if nothing had happened: one
//! reservation, one endorsement, one payment.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod market;

use market::{Fault, LIMIT, Market, body, eventually};
use protocol::RefusalCode;
use protocol::api::TransactionState;
use protocol::manifest::KeyPolicy;
use serde_json::json;
use willcall_merchant_node as merchant_node;

/// Buys while something is broken, stops at `stage`, repairs it, starts again, and waits for `end`.
async fn interrupted(market: &mut Market, stage: &str, end: &str) {
    market.config.answer_ms = 300;
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    if stage == "authorised" {
        market.manager.down().await;
    }
    let request = body(&market.manager, "cash", "a");
    let reply = shop.post("k", &request).await;
    let order = shop.only_order_at(&market.dir, stage).await;
    shop.stop().await;

    market.cash.repair();
    market.manager.fault(Fault::None);
    if stage == "authorised" {
        market.manager.up().await;
    }
    let shop = market.open().await;
    shop.at_stage(&market.dir, &order, end).await;
    assert_eq!(shop.post("k", &request).await, reply, "the first answer stays the answer");
    assert_eq!(market.manager.reservations(), 1);
    let endorsements = market.manager.endorsements();
    assert!(endorsements.iter().all(|e| *e == endorsements[0]), "always the same endorsement");
    let shown = shop.get(&format!("/v1/purchases/{order}")).await.json();
    assert_eq!(shown.get("ticket").is_some(), end == "done");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_before_the_money_is_held() {
    let mut market = Market::new().await;
    market.cash.fail("authorise");
    interrupted(&mut market, "received", "done").await;
    assert_eq!(market.cash.states(), ["captured"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_before_the_reservation() {
    let mut market = Market::new().await;
    interrupted(&mut market, "authorised", "done").await;
    assert_eq!(market.cash.states(), ["captured"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_after_the_release_whose_answer_was_lost() {
    let mut market = Market::new().await;
    market.manager.fault(Fault::HoldRelease);
    interrupted(&mut market, "reserved", "done").await;
    assert_eq!(market.cash.states(), ["captured"]);
    assert!(market.manager.endorsements().len() >= 2, "it was asked again");
}

/// The buyer, who has the ticket from the mailbox, lost the lease before the shop came to ask for the ticket again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_release_that_is_repeated_after_the_lease_ended_is_no_forged_answer() {
    let mut market = Market::new().await;
    market.config.answer_ms = 300;
    market.manager.fault(Fault::HoldRelease);
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    shop.post("k", &body(&market.manager, "cash", "a")).await;
    let order = shop.only_order_at(&market.dir, "reserved").await;
    eventually("released", || async { (market.manager.states() == [TransactionState::Released]).then_some(()) }).await;
    shop.stop().await;

    market.manager.end_lease(&order);
    market.manager.fault(Fault::None);
    let shop = market.open().await;
    shop.at_stage(&market.dir, &order, "done").await;
    assert_eq!((market.cash.states(), market.manager.refund_calls()), (vec!["captured"], 0));
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_before_the_capture() {
    let mut market = Market::new().await;
    market.cash.fail("capture");
    interrupted(&mut market, "released", "done").await;
    assert_eq!(market.cash.states(), ["captured"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_before_the_money_goes_back() {
    let mut market = Market::new().await;
    market.cash.fail("void");
    market.manager.fault(Fault::RefuseRelease(RefusalCode::ReservationExpired));
    interrupted(&mut market, "voiding", "expired").await;
    assert_eq!(market.cash.states(), ["voided"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_in_a_refund() {
    let market = Market::new().await;
    let shop = market.open().await;
    let bought = shop.post("k", &body(&market.manager, "cash", "a")).await;
    assert_eq!(bought.status, 201);
    shop.at_stage(&market.dir, &bought.id(), "done").await;
    market.cash.fail("refund");
    let refund = json!({ "cmd": "refund", "order": bought.id() });
    let waits = shop.control(&market.dir, refund.clone()).await.unwrap_err().to_string();
    assert!(waits.contains("out of order"), "{waits}");
    assert_eq!(market.manager.states(), [TransactionState::Refunded], "revoked before the money goes back");
    shop.stop().await;
    market.cash.repair();
    let shop = market.open().await;
    shop.at_stage(&market.dir, &bought.id(), "refunded").await;
    assert_eq!(market.cash.states(), ["refunded"]);
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn payment_on_completion_waits_for_the_client() {
    for (state, end, money) in [
        (TransactionState::Delivered, "done", "captured"),
        (TransactionState::Settled, "done", "captured"),
        (TransactionState::Refunded, "refunded", "voided"),
        (TransactionState::Expired, "expired", "voided"),
    ] {
        let market = Market::new().await;
        market.manager.policy(KeyPolicy::OnCompletion);
        let shop = market.open().await;
        let bought = shop.post("k", &body(&market.manager, "cash", "a")).await;
        assert_eq!((bought.status, &bought.json()["payment"]), (201, &json!("held")));
        shop.at_stage(&market.dir, &bought.id(), "awaiting-completion").await;
        market.manager.set_state(TransactionState::Delivering);
        shop.stop().await;
        assert_eq!(market.cash.states(), ["held"]);
        market.manager.set_state(state);
        market.cash.fail("capture");
        let shop = market.open().await;
        if end == "done" {
            shop.at_stage(&market.dir, &bought.id(), "completed").await;
        }
        market.cash.repair();
        shop.at_stage(&market.dir, &bought.id(), end).await;
        assert_eq!(market.cash.states(), [money]);
        shop.stop().await;
        market.manager.down().await;
    }
}

/// The manager's operator takes a sale back before the shop hears that it was completed, or even that it was released.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_payment_of_a_sale_that_is_taken_back_ends_as_in_the_managers_books() {
    let (at_release, on_completion) = (KeyPolicy::AtRelease, KeyPolicy::OnCompletion);
    let (revoked, refunded) = (TransactionState::Revoked, TransactionState::Refunded);
    for (policy, state, captured, end, money) in [
        (on_completion, revoked, true, "done", "captured"),
        (on_completion, revoked, false, "cancelled", "voided"),
        (on_completion, refunded, false, "refunded", "voided"),
        (at_release, revoked, true, "done", "captured"),
        (at_release, refunded, true, "refunded", "voided"),
    ] {
        for answered in [true, false] {
            if answered && policy == at_release {
                // Its payment is taken at once: nothing is left to come in between.
                continue;
            }
            let mut market = Market::new().await;
            market.config.answer_ms = 300;
            market.manager.policy(policy);
            if !answered {
                market.manager.fault(Fault::HoldRelease);
            }
            let shop = market.open().await;
            eventually("catalogue", || async {
                (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
            })
            .await;
            shop.post("k", &body(&market.manager, "cash", "a")).await;
            let order =
                shop.only_order_at(&market.dir, if answered { "awaiting-completion" } else { "reserved" }).await;
            eventually("released", || async {
                (market.manager.states() == [TransactionState::Released]).then_some(())
            })
            .await;
            shop.stop().await;

            market.manager.fault(Fault::None);
            market.manager.knows_captured(captured);
            market.manager.take_back(&order, state);
            let shop = market.open().await;
            shop.at_stage(&market.dir, &order, end).await;
            assert_eq!(market.cash.states(), [money], "{policy:?} {state:?} {answered}");
            let show = json!({ "cmd": "order", "order": order });
            let shown = shop.control(&market.dir, show).await.unwrap();
            assert_eq!(shown["error"]["code"], state.as_str(), "{shown}");
            if end == "done" {
                // Whether the buyer gets it back is the merchant's to say.
                let refund = json!({ "cmd": "refund", "order": order });
                assert_eq!(shop.control(&market.dir, refund).await.unwrap()["stage"], "refunded");
                assert_eq!(market.cash.states(), ["refunded"]);
            }
            shop.stop().await;
            market.manager.down().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_cannot_be_reserved_expires() {
    let mut market = Market::new().await;
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    market.manager.down().await;
    let pending = shop.post("k", &body(&market.manager, "cash", "a")).await;
    assert_eq!(pending.status, 202);
    shop.stop().await;
    market.config.pending_ms = 0;
    let running = market.start().await;
    let shop = market::Shop::of(running);
    market.manager.up().await;
    shop.at_stage(&market.dir, &pending.id(), "expired").await;
    assert_eq!(market.cash.states(), ["voided"]);
    let shown = shop.get(&format!("/v1/purchases/{}", pending.id())).await.json();
    assert_eq!(shown["error"]["code"], "manager-away");
    shop.stop().await;
    market.manager.down().await;
}

/// The shop's folder is put back from a backup in which the order is not sold yet, and its time is over since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sold_after_the_backup_is_not_let_go_because_its_time_is_over() {
    let mut market = Market::new().await;
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    market.manager.down().await;
    let pending = shop.post("k", &body(&market.manager, "cash", "a")).await;
    assert_eq!(pending.status, 202);
    shop.at_stage(&market.dir, &pending.id(), "authorised").await;
    shop.stop().await;
    let (store, backup) = (market.dir.path().join("merchant.redb"), market.dir.path().join("before"));
    std::fs::copy(&store, &backup).unwrap();
    market.manager.up().await;
    let shop = market.open().await;
    shop.at_stage(&market.dir, &pending.id(), "done").await;
    shop.stop().await;

    std::fs::copy(&backup, &store).unwrap();
    market.config.pending_ms = 0;
    let shop = market::Shop::of(market.start().await);
    shop.at_stage(&market.dir, &pending.id(), "done").await;
    assert_eq!(market.cash.states(), ["captured"], "the manager wants its price");
    assert_eq!((market.manager.reservations(), market.manager.refund_calls()), (1, 0));
    shop.stop().await;
    market.manager.down().await;
}

/// The same, and the manager's operator revoked the sale meanwhile: whether its price is due, its list says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sold_after_the_backup_and_revoked_ends_as_in_the_managers_books() {
    for (captured, end, money) in [(true, "done", "captured"), (false, "cancelled", "refunded")] {
        let mut market = Market::new().await;
        let shop = market.open().await;
        eventually("catalogue", || async {
            (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
        })
        .await;
        market.manager.down().await;
        let pending = shop.post("k", &body(&market.manager, "cash", "a")).await;
        shop.at_stage(&market.dir, &pending.id(), "authorised").await;
        shop.stop().await;
        let (store, backup) = (market.dir.path().join("merchant.redb"), market.dir.path().join("before"));
        std::fs::copy(&store, &backup).unwrap();
        market.manager.up().await;
        let shop = market.open().await;
        shop.at_stage(&market.dir, &pending.id(), "done").await;
        shop.stop().await;

        market.manager.knows_captured(captured);
        market.manager.take_back(&pending.id(), TransactionState::Revoked);
        std::fs::copy(&backup, &store).unwrap();
        market.config.pending_ms = 0;
        let shop = market::Shop::of(market.start().await);
        shop.at_stage(&market.dir, &pending.id(), end).await;
        assert_eq!(market.cash.states(), [money], "captured: {captured}");
        shop.stop().await;
        market.manager.down().await;
    }
}

/// An earlier version passed over the row, or it came up behind where the shop had read to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_order_whose_row_was_passed_over_is_looked_for_once_more() {
    let market = Market::new().await;
    market.manager.policy(KeyPolicy::OnCompletion);
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    shop.post("k", &body(&market.manager, "cash", "a")).await;
    let order = shop.only_order_at(&market.dir, "awaiting-completion").await;
    market.manager.list_a_strangers(5);
    eventually("the list read", || async { (market.manager.asked_after() == 5).then_some(()) }).await;

    market.manager.knows_captured(true);
    market.manager.take_back(&order, TransactionState::Revoked);
    shop.at_stage(&market.dir, &order, "done").await;
    assert_eq!(market.cash.states(), ["captured"]);
    shop.stop().await;
    market.manager.down().await;
}

/// Sold after the backup, and the manager is not there when the restored shop starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_shop_waits_for_the_managers_word_on_what_it_may_have_sold() {
    let mut market = Market::new().await;
    let shop = market.open().await;
    eventually("catalogue", || async {
        (shop.get("/v1/products").await.json()["products"][0]["title"] == "An album").then_some(())
    })
    .await;
    market.manager.down().await;
    let pending = shop.post("k", &body(&market.manager, "cash", "a")).await;
    shop.at_stage(&market.dir, &pending.id(), "authorised").await;
    let backup = tempfile::tempdir().unwrap();
    let file = backup.path().join("yesterday");
    shop.control(&market.dir, json!({ "cmd": "backup", "path": file, "replace": false })).await.unwrap();
    market.manager.up().await;
    shop.at_stage(&market.dir, &pending.id(), "done").await;
    shop.stop().await;

    market.manager.down().await;
    std::fs::remove_file(market.dir.path().join("merchant.redb")).unwrap();
    merchant_node::restore_backup(&file, market.dir.path()).unwrap();
    market.config.pending_ms = 0;
    let shop = market::Shop::of(market.start().await);
    let show = json!({ "cmd": "order", "order": pending.id() });
    let shown = eventually("the order having asked, or been let go", || async {
        let shown = shop.control(&market.dir, show.clone()).await.unwrap();
        (shown["waits"].is_string() || shown["stage"] != "authorised").then_some(shown)
    })
    .await;
    assert_eq!(shown["stage"], "authorised", "{shown}");
    market.manager.up().await;
    shop.at_stage(&market.dir, &pending.id(), "done").await;
    assert_eq!(market.cash.states(), ["captured"], "the manager wants its price");
    shop.stop().await;
    market.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ports_are_kept_and_a_folder_has_one_merchant() {
    let market = Market::new().await;
    let shop = market.open().await;
    let address = shop.running.http_address();
    let second = merchant_node::start(market.dir.path(), market.config.clone()).await.unwrap_err().to_string();
    assert!(second.contains("is in use by process"), "{second}");
    shop.stop().await;
    let again = market.start().await;
    assert_eq!(again.http_address(), address);

    let other = Market::new().await;
    let mut config = other.config.clone();
    config.http = address;
    let taken = merchant_node::start(other.dir.path(), config).await.unwrap_err().to_string();
    assert!(taken.contains("choose another `http`"), "{taken}");
    let free = other.open().await;
    free.stop().await;
    again.stop(LIMIT).await.unwrap();
    market.manager.down().await;
    other.manager.down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_linger_do_not_hold_the_database() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let market = Market::new().await;
    let shop = market.open().await;
    let address = shop.running.http_address();
    let mut half = tokio::net::TcpStream::connect(address).await.unwrap();
    half.write_all(b"POST /v1/purchases HTTP/1.1\r\nHost: x\r\n").await.unwrap();
    let mut body_missing = tokio::net::TcpStream::connect(address).await.unwrap();
    let head = b"POST /v1/purchases HTTP/1.1\r\nHost: x\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\n\
        Content-Length: 10\r\n\r\n{";
    body_missing.write_all(head).await.unwrap();
    market.manager.fault(Fault::HoldReserve);
    // Several, so that some are woken by the end of their order's task and some by the stop itself.
    let requests: Vec<_> = ["a", "b", "c", "d"].map(|token| (token, body(&market.manager, "cash", token))).into();
    let posts = requests.iter().map(|(key, request)| shop.post(key, request));
    let (waiting, ()) = tokio::join!(futures::future::join_all(posts), async {
        eventually("at the manager", || async { (market.manager.reserve_calls() == 4).then_some(()) }).await;
        shop.running.supervisor().stop();
    });
    for answer in waiting {
        assert_eq!(answer.error(), (503, "shutting-down".to_owned()));
    }
    shop.stop().await;
    let mut rest = Vec::new();
    // Closed, with or without an answer.
    let _ = tokio::time::timeout(LIMIT, half.read_to_end(&mut rest)).await.unwrap();
    let _ = tokio::time::timeout(LIMIT, body_missing.read_to_end(&mut rest)).await.unwrap();
    market.manager.fault(Fault::None);
    let shop = market.open().await;
    for (key, request) in &requests {
        let sold = shop.post(key, request).await;
        assert_eq!(sold.status, 201, "\"pending\" while it stopped is no answer to keep: {}", sold.json());
    }
    assert_eq!(market.manager.reservations(), 4);
    shop.stop().await;
    market.manager.down().await;
}

/// Its invitation may be used up, or over: the certificate is what proves that it was enrolled.
#[tokio::test]
async fn a_manager_that_has_forgotten_the_shop_is_shown_its_certificate() {
    let market = Market::new().await;
    let shop = market.open().await;
    market.manager.forget_the_shop();
    eventually("known again", || async { market.manager.knows_the_shop().then_some(()) }).await;
    eventually("ready", || async { shop.running.not_ready().is_none().then_some(()) }).await;
    shop.stop().await;
}
