//! Who is judged by what: a seeder that sends something else is found, taken out, and back once it mended its disk; one that
//! is slandered stays; and one that reports what it does not have is no copy.

use serde_json::{Value, json};
use testnet::adversary::{Liar, complain};
use testnet::{Client, Network, Plan, Terms, corrupt, until};

use crate::{KIB, MIB, by_ticket, show_logs};

async fn line_of(network: &Network, seeder: usize) -> Value {
    let answer = network.manager.control(json!({"cmd": "seeders"})).await.unwrap();
    let name = json!(network.seeders[seeder].peer());
    answer["seeders"].as_array().unwrap().iter().find(|line| line["peer"] == name).cloned().unwrap()
}

/// What the audit log says of a seeder's audits.
async fn log_of(network: &Network, seeder: usize) -> Vec<String> {
    let log = network.manager.control(json!({"cmd": "audit"})).await.unwrap();
    let name = json!(network.seeders[seeder].peer());
    let lines = log["entries"].as_array().unwrap().iter().filter(|entry| entry["subject"] == name);
    let what = lines.map(|entry| entry["what"].as_str().unwrap().to_owned());
    what.filter(|what| what.starts_with("audit")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_that_sends_something_else_is_out_until_it_mended_it_and_a_slandered_one_stays() {
    show_logs();
    let plan = Plan::new(3).manager(|config| {
        config.audit_ms = 0;
        config.audit_pause_ms = 100;
    });
    let network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 2 * MIB, &Terms::default()).await.unwrap();

    // A machine whose memory turns bits. The origin, which every lease names first, is gone.
    let first = network.client("first").await.unwrap();
    let (sale, _) = network.ticket(&first, product.product).await.unwrap();
    network.manager.crash_origin().await.unwrap();
    network.seeders[0].running().unwrap().turn_bits(true);

    // Slander first: an audit, a delivery like any other for the seeder, with a receipt that counts, and nothing follows.
    let manager = network.manager.at().unwrap();
    let key = first.home().keypair().clone();
    let begun = network.seeders[1].count("deliveries_begun");
    complain(&key, &manager, sale, network.seeders[1].peer(), 3).await.unwrap();
    let audited = || async {
        let receipts = network.receipts().await.ok()?;
        let own = json!(network.seeders[1].peer());
        let counted = receipts.iter().find(|r| r["seeder"] == own && r["status"] == "counted" && r["delivery"] == 1)?;
        Some(counted["transaction"].clone())
    };
    let errand = until("the audited seeder's receipt", audited).await.unwrap();
    assert!(network.seeders[1].count("deliveries_begun") > begun);
    let bought = network.manager.control(json!({"cmd": "transaction", "id": errand})).await.unwrap();
    assert_eq!((&bought["audit"], &bought["replication"]), (&json!(true), &json!(false)), "{bought}");
    assert_eq!(line_of(&network, 1).await["failed_audit"], Value::Null);

    // A client finds the damage and complains by itself.
    let second = network.client("second").await.unwrap();
    let (_, ticket) = network.ticket(&second, product.product).await.unwrap();
    second.fetch(by_ticket(&ticket), Client::slow_options(1500 * KIB)).done().await.unwrap();
    let failed = || async { (line_of(&network, 0).await["failed_audit"] != Value::Null).then_some(()) };
    until("the failed audit", failed).await.unwrap();
    assert_eq!(log_of(&network, 0).await, ["audit-failed"]);
    let (_, ticket) = network.ticket(&second, product.product).await.unwrap();
    let sources = ticket.ticket.lease.peek().unwrap().sources;
    assert!(!sources.contains(&network.seeders[0].peer()), "nobody is sent there any more");
    assert!(sources.contains(&network.seeders[1].peer()));

    // Its memory is mended, and its disk was bad, too: it looks for itself, is told to make the copy whole again, does, is looked at, and is back.
    network.seeders[0].running().unwrap().turn_bits(false);
    let content = network.seeders[0].running().unwrap().contents().get(&product.manifest).unwrap();
    let every = u64::from(content.manifest().chunk_size);
    tokio::task::spawn_blocking(move || corrupt(&content, every)).await.unwrap().unwrap();
    let scrubbed = network.seeders[0].control(json!({"cmd": "scrub"})).await.unwrap();
    assert_eq!(network.seeders[0].count("damaged_chunks"), u64::from(product.chunks), "{scrubbed}");
    let back = || async { (line_of(&network, 0).await["failed_audit"] == Value::Null).then_some(()) };
    until("its passing", back).await.unwrap();
    assert!(network.seeders[0].holds(1).await);
    assert_eq!(log_of(&network, 0).await, ["audit-failed", "audit-passed"]);
    assert_eq!(log_of(&network, 1).await, Vec::<String>::new());
    let (_, ticket) = network.ticket(&second, product.product).await.unwrap();
    assert!(ticket.ticket.lease.peek().unwrap().sources.contains(&network.seeders[0].peer()));
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seeders_are_looked_at_without_a_hint_too() {
    show_logs();
    let network = Network::start(Plan::new(1).manager(|config| config.audit_ms = 300)).await.unwrap();
    network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    let looked = || async { (network.seeders[0].count("deliveries_begun") >= 1).then_some(()) };
    until("an audit by lot", looked).await.unwrap();
    assert_eq!(line_of(&network, 0).await["failed_audit"], Value::Null);
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_only_reported_does_not_count_for_ever() {
    show_logs();
    let plan = Plan::new(2)
        .copies(1)
        .manager(|config| (config.audit_ms, config.audit_pause_ms) = (300, 100))
        // The copy is the first one's share, but for a thousandth.
        .seeder(|number, config| config.capacity = if number == 0 { 1 << 40 } else { 1 << 30 });
    let mut network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    network.until_copies(product.product, 2).await.unwrap();
    assert!(network.seeders[0].holds(1).await && !network.seeders[1].holds(1).await);
    network.seeders[0].stop().await.unwrap();
    let (key, manager) = (network.seeders[0].keypair().unwrap(), network.manager.at().unwrap());
    let liar = Liar::start(key, manager, vec![product.manifest]).await.unwrap();
    let failed = || async {
        liar.report().await.unwrap();
        (line_of(&network, 0).await["failed_audit"] != Value::Null).then_some(())
    };
    until("the failed audit", failed).await.unwrap();
    let log = log_of(&network, 0).await;
    assert_eq!(log.len(), 1, "{log:?}");
    let client = network.client("client").await.unwrap();
    let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
    assert!(!ticket.ticket.lease.peek().unwrap().sources.contains(&network.seeders[0].peer()));
    // And the copy that there is to be is made by somebody else.
    until("a true copy", || async { network.seeders[1].holds(1).await.then_some(()) }).await.unwrap();
    liar.stop().await;
    network.stop().await.unwrap();
}
