//! Sources that send something else than the goods.

use serde_json::json;
use testnet::{Network, Plan, Terms, corrupt};

use crate::{KIB, assert_counted, assert_same, by_ticket, show_logs};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_corrupt_seeder_among_several_is_dropped_and_named() {
    show_logs();
    let mut network = Network::start(Plan::new(3).manager(|config| config.close_grace_ms = 3000)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 900 * KIB, &Terms::default()).await.unwrap();
    // A seeder that has sent all of it once does not check it again.
    let peer = network.seeders[1].peer();
    let first = network.client("first").await.unwrap();
    let (_, ticket) = network.ticket(&first, product.product).await.unwrap();
    network.manager.crash_origin().await.unwrap();
    network.seeders[0].crash().await;
    network.seeders[2].crash().await;
    first.fetch_all(by_ticket(&ticket)).await.unwrap();
    network.seeders[0].start().await.unwrap();
    network.seeders[2].start().await.unwrap();
    let content = network.seeders[1].running().unwrap().contents().get(&product.manifest).unwrap();
    assert!(corrupt(&content, 64 * KIB).unwrap() > 0);

    let second = network.client("second").await.unwrap();
    let (id, ticket) = network.ticket(&second, product.product).await.unwrap();
    let outcome = second.fetch_all(by_ticket(&ticket)).await.unwrap();
    assert_same(&goods, &outcome.path);
    let bad = outcome.sources.iter().find(|source| source.peer == peer).unwrap();
    assert!(bad.banned, "{bad:?}");
    for source in outcome.sources.iter().filter(|source| source.peer != peer) {
        assert!(!source.banned, "{source:?}");
    }
    assert_counted(&network, id, &outcome, product.chunks, &[peer]).await;

    // After a restart it looks at everything again, serves none of it, and is made whole by the others.
    let before = network.seeders[1].count("damaged_chunks");
    network.seeders[1].crash().await;
    network.seeders[1].start().await.unwrap();
    let scrubbed = network.seeders[1].control(json!({"cmd": "scrub"})).await.unwrap();
    let damaged = scrubbed["contents"][0]["damaged"].as_array().unwrap().len() as u64;
    assert!(damaged + before > 0, "{scrubbed}");
    let whole = || async { network.seeders[1].holds(1).await.then_some(()) };
    testnet::until("the repair", whole).await.unwrap();
    network.stop().await.unwrap();
}
