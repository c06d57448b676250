//! What a manager's operator takes back: the buyer's money follows by itself, and those concerned say what happened.

use std::fs;

use serde_json::{Value, json};

use super::support::{Job, Network, Settings, args, bytes, run, text, until};

#[test]
fn what_the_manager_refunds_is_paid_back_by_the_shop() {
    let settings = Settings {
        manager: &["sales-ms=100", "heartbeat-ms=1000", "close-grace-ms=2000"],
        merchant: &["orders-ms=100", "status-ms=200", "refresh-ms=500", "retry-min-ms=50", "retry-max-ms=500"],
        seeder: &["retry-ms=100", "receipt-batch-ms=50", "receipt-direct-ms=200"],
    };
    let mut network = Network::start_set(1, 1, settings);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let at_release = network.publish(&goods, &[]);
    let on_completion = network.publish(&goods, &["--policy", "on-completion"]);
    let (plain, completed, kept) =
        (network.buy(&at_release, "plain"), network.buy(&on_completion, "completed"), network.buy(&at_release, "kept"));
    completed.fetch(&network.path("out"));
    network.settled(&completed.transaction);
    let orders = |network: &Network| network.of("merchant", args!["orders"]).ok()["orders"].as_array().unwrap().clone();
    let order_of = |network: &Network, id: &str| -> Value {
        orders(network).into_iter().find(|order| order["transaction"] == id).unwrap()
    };
    until("the captures", || orders(&network).iter().all(|order| order["stage"] == "done").then_some(()));
    let voucher = |network: &Network| network.of("merchant", args!["vouchers", "list"]).ok()["vouchers"][0].clone();
    assert_eq!(voucher(&network)["spent"], json!(3 * 999));

    let said = network.of_plain("manager", args!["refund", &plain.transaction]);
    assert!(said.status.success() && said.stdout.contains("refunded; the shop hears of it"), "{}", said.stdout);
    until("the payment back", || (order_of(&network, &plain.transaction)["stage"] == "refunded").then_some(()));
    // Another while the shop is away.
    network.daemons.remove("merchant").unwrap().kill();
    network.of("manager", args!["refund", &completed.transaction]).ok();
    network.run_role("merchant");
    until("the payment back", || (order_of(&network, &completed.transaction)["stage"] == "refunded").then_some(()));
    assert_eq!(order_of(&network, &plain.transaction)["error"]["code"], "refunded");
    assert_eq!(order_of(&network, &kept.transaction)["stage"], "done");
    assert_eq!((&voucher(&network)["spent"], &voucher(&network)["held"]), (&json!(999), &json!(0)));
    network.assert_books();

    // Nobody's transaction is no transaction; one that a restore lost can be revoked by who says so.
    let epoch = || network.of("manager", args!["status"]).ok()["epoch"].clone();
    let (before, nobodys) = (epoch(), "019b0000-0000-7000-8000-000000000001");
    network.of("manager", args!["revoke", "transaction", nobodys]).refused(&[nobodys]);
    assert_eq!(epoch(), before);
    network.of("manager", args!["revoke", "transaction", nobodys, "--unknown"]).ok();
    assert_ne!(epoch(), before);

    let merchant = text(&network.of("merchant", args!["status"]).ok(), "peer");
    network.of("manager", args!["revoke", "merchant", merchant]).ok();
    until("the shop saying so", || {
        let status = network.of("merchant", args!["status"]).ok();
        (status["enrolled"] == false && status["health"]["ok"] == false && status["revoked"].is_string()).then_some(())
    });
}

#[test]
fn seeders_are_paid_for_what_was_fetched_before_a_refund_that_is_faster_than_their_receipts() {
    let settings = Settings {
        manager: &["sales-ms=100", "heartbeat-ms=1000", "close-grace-ms=20000"],
        merchant: &["orders-ms=100", "status-ms=200", "refresh-ms=500", "retry-min-ms=50", "retry-max-ms=500"],
        // Long enough for the refund to come first.
        seeder: &["retry-ms=100", "receipt-batch-ms=3000", "receipt-direct-ms=3000"],
    };
    let network = Network::start_set(1, 1, settings);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 8 << 20)).unwrap();
    let product = network.publish(&goods, &[]);
    let bought = network.buy(&product, "friend");
    bought.fetch(&network.path("out"));
    let order = text(&network.transaction(&bought.transaction), "order");
    let merchant = text(&network.of("merchant", args!["status"]).ok(), "peer");
    network.of("merchant", args!["refund", &order]).ok();

    let content = product["content_bytes"].as_u64().unwrap();
    let shown = until("the pay of the seeders", || {
        let shown = network.transaction(&bought.transaction);
        shown["release"]["delivery_cost"].is_u64().then_some(shown)
    });
    assert_eq!(shown["state"], "refunded");
    let delivery = &shown["deliveries"][0];
    let paid: u64 = delivery["seeders"].as_array().unwrap().iter().map(|s| s["paid_bytes"].as_u64().unwrap()).sum();
    assert_eq!((paid, &delivery["whole"]), (content, &json!(true)), "{shown}");
    // One minor unit a MiB, rounded up; the price and the rest of what was set aside are the buyer's again.
    let cost = content.div_ceil(1 << 20);
    assert_eq!(shown["release"]["delivery_cost"], cost, "{shown}");
    let credit = network.of("manager", args!["credit", &merchant, "--currency", "USD"]).ok();
    assert_eq!((&credit["due"], &credit["earned"], &credit["open"]), (&json!(cost), &json!(0), &json!(0)), "{credit}");
    network.assert_books();
}

#[test]
fn a_takedown_before_the_key_is_out_is_paid_by_nobody() {
    let settings = Settings {
        manager: &["sales-ms=100", "heartbeat-ms=1000", "close-grace-ms=60000"],
        merchant: &["orders-ms=100", "status-ms=200", "refresh-ms=500", "retry-min-ms=50", "retry-max-ms=500"],
        seeder: &["retry-ms=100", "receipt-batch-ms=50", "receipt-direct-ms=200"],
    };
    let mut network = Network::start_set(1, 1, settings);
    let goods = network.path("goods.bin");
    fs::write(&goods, bytes(7, 150_000)).unwrap();
    let product = network.publish(&goods, &["--policy", "on-completion"]);
    let (before, after) = (network.buy(&product, "before"), network.buy(&product, "after"));
    let (first, out) = (network.path("out-before"), network.path("out-after"));
    // One is done; of the other everything is fetched but the key.
    before.fetch(&first);
    network.settled(&before.transaction);
    network.daemons.remove("manager").unwrap().kill();
    let fetching = Job::start(after.fetching(&out));
    let home = network.path("after");
    until("everything but the key", || {
        let shown = run(args!["status", "--home", &home]).ok();
        let delivery = &shown["deliveries"][0];
        (delivery["state"] == "fetched").then_some(())
    });
    fetching.kill();
    network.daemons.remove("seeder-1").unwrap().kill();
    network.run_role("manager");
    network.of("manager", args!["takedown", text(&product, "product")]).ok();

    let shown = network.transaction(&after.transaction);
    assert_eq!((&shown["state"], &shown["release"]["captured"]), (&json!("refunded"), &json!(false)), "{shown}");
    run(after.fetching(&out)).refused(&["taken down", "refunded"]);
    let status = run(args!["status", "--home", &home]).ok();
    let delivery = &status["deliveries"][0];
    assert_eq!((&delivery["state"], &delivery["trouble"]["cause"]), (&json!("refused"), &json!("revoked")), "{status}");
    network.run_role("seeder-1");
    let order_of = |id: &str| text(&network.transaction(id), "order");
    let stage = |id: &str| network.of("merchant", args!["order", order_of(id)]).ok()["stage"].clone();
    until("the payment back", || (stage(&after.transaction) == "refunded").then_some(()));
    let voucher = || network.of("merchant", args!["vouchers", "list"]).ok()["vouchers"][0].clone();
    until("no more held", || (voucher()["held"] == 0).then_some(()));
    assert_eq!(voucher()["spent"], 999, "the other is paid for");
    // What the seeder delivered is paid once its receipts are in, with the completion among them.
    let paid = || {
        let delivery = network.transaction(&after.transaction)["deliveries"][0].clone();
        (delivery["closed_at"].is_u64() && delivery["completion"] == true)
            .then(|| delivery["seeders"][0]["paid_bytes"].clone())
    };
    assert_eq!(until("the pay of the seeder", paid), product["content_bytes"]);
    let shown = network.transaction(&after.transaction);
    assert_eq!((&shown["state"], &shown["release"]["captured"]), (&json!("refunded"), &json!(false)), "{shown}");
    assert_eq!(network.transaction(&before.transaction)["state"], "settled");
    network.assert_books();
}
