//! What was bought goes with its owner from one device to the next, over the real protocols: what the old device has is
//! void within seconds, also in the middle of a download, and the new one downloads from the mailbox's ticket alone.

use std::collections::BTreeSet;

use client_node::{FetchError, LinkOptions, MoveChoice, Target};
use protocol::TransactionId;
use protocol::trust::JoinLine;
use serde_json::{Value, json};
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms, until};

use crate::{KIB, MIB, assert_same, by_ticket, show_logs};

async fn move_on(from: &Client, to: &Client, choice: MoveChoice, join: Option<&JoinLine>) -> Vec<Option<u32>> {
    let moved = client_node::move_purchases(from.home(), to.peer(), &choice, join, &LinkOptions::default()).await;
    moved.unwrap().items.into_iter().map(|item| item.generation).collect()
}

fn one(id: TransactionId) -> MoveChoice {
    MoveChoice::Some(BTreeSet::from([id]))
}

async fn fetch(client: &Client, id: TransactionId, join: &JoinLine) -> Result<client_node::FetchOutcome, FetchError> {
    let mut options = Client::options();
    options.join = Some(join.clone());
    client.fetch(Target::Transaction(id), options).done().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_purchase_moves_to_a_new_device_in_the_middle_of_a_download_and_back() {
    show_logs();
    let network = Network::start(Plan::new(2)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 2 * MIB, &Terms::default()).await.unwrap();
    let (old, new) = (network.client("old").await.unwrap(), network.client("new").await.unwrap());
    let (id, ticket) = network.ticket(&old, product.product).await.unwrap();
    let join = ticket.join.clone();
    let mut running = old.fetch(by_ticket(&ticket), Client::slow_options(200 * KIB));
    running.chunks(2).await.unwrap();

    assert_eq!(move_on(&old, &new, one(id), None).await, [Some(1)]);
    let progress = running.watch();
    let cut = running.done().await.unwrap_err();
    assert!(cut.to_string().contains("revoked"), "{cut}");
    // What it had by then is acknowledged to whom it came from, to the last chunk.
    let came = progress.borrow().transfer.new_bytes;
    let acknowledged = || async {
        let shown = network.transaction(id).await.ok()?;
        let seeders = shown["deliveries"][0]["seeders"].as_array()?.clone();
        (seeders.iter().map(|line| line["acknowledged_bytes"].as_u64().unwrap()).sum::<u64>() >= came).then_some(())
    };
    assert!(came > 0);
    until("the receipts for all of it", acknowledged).await.unwrap();
    // Also for a client that would not stop by itself: every seeder refuses the old ticket.
    for seeder in &network.seeders {
        let at = seeder.at().unwrap();
        let refused = || async {
            let shown = present(old.home().keypair(), &ticket, Tampering::None, &at).await.ok()?;
            matches!(&shown, Outcome::Refused(no) if no.code.as_str() == "revoked").then_some(())
        };
        until("the old ticket being refused", refused).await.unwrap();
    }
    // Asked again, because the answer might have been lost.
    assert_eq!(move_on(&old, &new, one(id), Some(&join)).await, [Some(1)]);

    let outcome = fetch(&new, id, &join).await.unwrap();
    assert_same(&goods, &outcome.path);
    let shown = network.transaction(id).await.unwrap();
    assert_eq!((&shown["client"], &shown["generation"]), (&json!(new.peer()), &json!(1)), "{shown}");

    // And back: the mailbox of the old device has a ticket of now, though its library has one of before.
    assert_eq!(move_on(&new, &old, MoveChoice::All, None).await, [Some(2)]);
    client_node::inbox(old.home(), Some(&join), &LinkOptions::default()).await.unwrap();
    let again = fetch(&old, id, &join).await.unwrap();
    assert_same(&goods, &again.path);
    network.books().await.unwrap();
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_merchant_gives_a_purchase_to_a_new_key_when_the_old_one_is_lost() {
    show_logs();
    let network = Network::start(Plan::new(1)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 300 * KIB, &Terms::default()).await.unwrap();
    let (lost, new) = (network.client("lost").await.unwrap(), network.client("new").await.unwrap());
    let bought = network.buy(&lost, product.product).await.unwrap();
    let (id, ticket) = (bought.transaction.unwrap(), bought.ticket.unwrap());
    let recover = |to| {
        let request = json!({"cmd": "recover", "order": bought.order, "to": to});
        network.merchants[0].control(request)
    };
    for _ in 0..2 {
        let answer: Value = recover(new.peer()).await.unwrap();
        assert_eq!((&answer["client"], &answer["generation"]), (&json!(new.peer()), &json!(1)), "{answer}");
    }
    let outcome = fetch(&new, id, &ticket.join).await.unwrap();
    assert_same(&goods, &outcome.path);
    let refused = lost.fetch_all(by_ticket(&ticket)).await.unwrap_err();
    assert!(refused.to_string().contains("revoked"), "{refused}");
    network.stop().await.unwrap();
}
