//! Sources that send something else than the goods.

use serde_json::json;
use testnet::{Network, Plan, Terms, corrupt};

use crate::{KIB, assert_counted, assert_same, by_ticket, show_logs};

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
