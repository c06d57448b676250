//! On-completion products: the key against the client's word that everything is there, and the money at that moment.
//! Whoever goes silent, nobody has goods unpaid and nobody pays for nothing.

use client_node::{FetchPhase, Target};
use protocol::manifest::KeyPolicy;
use serde_json::{Value, json};
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms, until};

use crate::{KIB, assert_same, by_ticket, show_logs};

fn terms(lease_ms: Option<u64>) -> Terms {
    Terms { policy: KeyPolicy::OnCompletion, lease_ms, ..Terms::default() }
}

/// Cents left on each voucher and cents spent, over all vouchers of the merchant.
async fn vouchers(network: &Network) -> (u64, u64, u64) {
    let answer = network.merchants[0].control(json!({"cmd": "vouchers-list"})).await.unwrap();
    let sum = |name: &str| answer["vouchers"].as_array().unwrap().iter().filter_map(|v| v[name].as_u64()).sum();
    (sum("available"), sum("held"), sum("spent"))
}

async fn until_stage(network: &Network, order: &str, stage: &str) -> Value {
    let ask = || async {
        let found = network.merchants[0].control(json!({"cmd": "order", "order": order})).await.ok()?;
        (found["stage"] == stage).then_some(found)
    };
    until(&format!("order {order} being {stage}"), ask).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_never_completes_is_refunded_and_shut_out() {
    show_logs();
    let plan = Plan::new(1).manager(|config| config.close_grace_ms = 300);
    let network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 600 * KIB, &terms(Some(4000))).await.unwrap();

    // One never comes, one stops half way.
    let (absent, halting) = (network.client("absent").await.unwrap(), network.client("halting").await.unwrap());
    let first = network.buy(&absent, product.product).await.unwrap();
    let second = network.buy(&halting, product.product).await.unwrap();
    assert_eq!(vouchers(&network).await, (2 * 9001, 2 * 999, 0), "held, not taken");
    let ticket = second.ticket.clone().unwrap();
    assert!(ticket.grant.is_none(), "no key before the completion");
    let mut fetch = halting.fetch(by_ticket(&ticket), Client::slow_options(100 * KIB));
    fetch.chunks(2).await.unwrap();
    assert_eq!(fetch.stop().await.unwrap_err().cause(), "stopped");

    for purchase in [&first, &second] {
        let refunded = network.until_state(purchase.transaction.unwrap(), "refunded").await.unwrap();
        assert_eq!(refunded["release"]["captured"], false, "{refunded}");
        until_stage(&network, &purchase.order, "refunded").await;
    }
    let all_back = || async { (vouchers(&network).await == (20_000, 0, 0)).then_some(()) };
    until("the vouchers' money", all_back).await.unwrap();
    // Seeders hear of it and refuse by that name, not only because the lease is over.
    let at = network.seeders[0].at().unwrap();
    let refused = || async {
        let answer = present(halting.home().keypair(), &ticket, Tampering::None, &at).await.ok()?;
        matches!(&answer, Outcome::Refused(no) if ["revoked", "expired"].contains(&no.code.as_str())).then_some(())
    };
    until("the seeder refusing it by that name", refused).await.unwrap();
    let error = halting.fetch_all(by_ticket(&ticket)).await.unwrap_err();
    assert_eq!(error.cause(), "revoked", "{error}");
    // What was delivered until then is nobody's loss but the merchant's, and the books say so.
    let books = network.books().await.unwrap();
    assert_eq!(books.balance("rights-holder:"), 0, "{books:?}");
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_key_comes_when_the_manager_is_back_and_the_money_when_the_merchant_is() {
    show_logs();
    // What the killed origin had sent and nobody acknowledged is waited for no longer than this.
    let plan = Plan::new(2).manager(|config| config.close_grace_ms = 3000);
    let mut network = Network::start(plan).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 600 * KIB, &terms(None)).await.unwrap();
    let client = network.client("client").await.unwrap();
    let purchase = network.buy(&client, product.product).await.unwrap();
    let (id, ticket) = (purchase.transaction.unwrap(), purchase.ticket.unwrap());

    let mut fetch = client.fetch(by_ticket(&ticket), Client::slow_options(300 * KIB));
    fetch.chunks(2).await.unwrap();
    network.manager.crash().await;
    network.merchants[0].crash().await;
    let waiting = fetch
        .until("waiting for the key", |p| p.phase == FetchPhase::AwaitingKey && p.waiting.is_some())
        .await
        .unwrap();
    let waiting = serde_json::to_value(waiting.waiting.unwrap()).unwrap();
    assert_eq!(waiting["cause"], "manager-away", "{waiting}");

    // The client goes too, and comes back: the ciphertext is not fetched again.
    assert_eq!(fetch.stop().await.unwrap_err().cause(), "stopped");
    let fetch = client.fetch(Target::Transaction(id), Client::options());
    network.manager.start().await.unwrap();
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    assert_eq!((outcome.bytes, outcome.resumed_from), (0, product.content_bytes));
    let state = network.transaction(id).await.unwrap();
    assert_eq!(state["release"]["captured"], true, "the key is out, so the sale is in the books: {state}");

    network.merchants[0].start().await.unwrap();
    until_stage(&network, &purchase.order, "done").await;
    assert_eq!(vouchers(&network).await, (9001, 0, 999));
    network.until_state(id, "settled").await.unwrap();
    let books = network.books().await.unwrap();
    assert!(books.balance("rights-holder:") < 0, "{books:?}");
    network.stop().await.unwrap();
}
