//! Sources that send something else than the goods.

use std::time::Duration;

use delivery::StallCause;
use serde_json::json;
use testnet::{Network, Plan, Terms, corrupt};

use crate::{KIB, MIB, assert_counted, assert_same, by_ticket, show_logs};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_corrupt_seeder_among_several_is_dropped_and_named() {
    show_logs();
    let network = Network::start(Plan::new(3).manager(|config| config.close_grace_ms = 3000)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 900 * KIB, &Terms::default()).await.unwrap();
    let peer = network.seeders[1].peer();
    network.manager.crash_origin().await.unwrap();
    network.seeders[1].running().unwrap().turn_bits(true);

    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    let outcome = client.fetch_all(by_ticket(&ticket)).await.unwrap();
    assert_same(&goods, &outcome.path);
    let bad = outcome.sources.iter().find(|source| source.peer == peer).unwrap();
    assert!(bad.banned, "{bad:?}");
    for source in outcome.sources.iter().filter(|source| source.peer != peer) {
        assert!(!source.banned, "{source:?}");
    }
    assert_counted(&network, id, &outcome, product.chunks, &[peer]).await;

    // Its disk turns bits as well: it looks at everything, serves none of it, and is made whole by the others.
    network.seeders[1].running().unwrap().turn_bits(false);
    let content = network.seeders[1].running().unwrap().contents().get(&product.manifest).unwrap();
    assert!(corrupt(&content, 64 * KIB).unwrap() > 0);
    let scrubbed = network.seeders[1].control(json!({"cmd": "scrub"})).await.unwrap();
    assert_eq!(network.seeders[1].count("damaged_chunks"), u64::from(product.chunks), "{scrubbed}");
    let whole = || async { network.seeders[1].holds(1).await.then_some(()) };
    testnet::until("the repair", whole).await.unwrap();
    network.stop().await.unwrap();
}

/// What one run can have of a seeder whose disk lost some chunks it has, and it says which are missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_chunks_cost_no_others_and_are_named() {
    show_logs();
    let mut network = Network::start(Plan::new(1)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 4 * MIB, &Terms::default()).await.unwrap();
    network.manager.crash_origin().await.unwrap();
    let content = network.seeders[0].running().unwrap().contents().get(&product.manifest).unwrap();
    assert_eq!(corrupt(&content, 24 * 64 * KIB).unwrap(), 3);

    let client = network.client("client").await.unwrap();
    let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
    let mut options = testnet::Client::options();
    options.limits.patience = Duration::from_secs(8);
    let mut fetch = client.fetch(by_ticket(&ticket), options.clone());
    // All others come, whatever it stumbled over on the way.
    let rest = |p: &client_node::FetchProgress| p.transfer.have_chunks == product.chunks - 3;
    fetch.until("the chunks that are whole", rest).await.unwrap();
    let holds_nobody = |p: &client_node::FetchProgress| {
        let stalled = p.transfer.stalled.as_ref();
        stalled.is_some_and(|stall| matches!(stall.cause, StallCause::NoSeederHolds { chunk: 0, more: 2 }))
    };
    fetch.until("the cause", holds_nobody).await.unwrap();
    let failed = fetch.done().await.unwrap_err();
    assert!(failed.to_string().contains("no connected seeder holds chunk 0 and 2 more"), "{failed}");

    // It goes on asking: who has them by then, the one that was made whole or another, gives them in the same run.
    let mut fetch = client.fetch(by_ticket(&ticket), testnet::Client::options());
    fetch.until("the cause", holds_nobody).await.unwrap();
    network.manager.crash().await;
    network.manager.start().await.unwrap();
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    network.stop().await.unwrap();
}
