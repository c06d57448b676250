//! Leases that end while the goods are on their way.

use client_node::FetchError;
use protocol::RefusalCode;
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms};

use crate::{KIB, assert_counted, assert_same, by_ticket, show_logs};

fn now_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_is_renewed_while_the_transfer_goes_on() {
    show_logs();
    // No seeder takes a ticket a moment longer than its lease says.
    let plan = Plan::new(1).seeder(|_, config| (config.clock_grace_ms, config.continuation_ms) = (0, 0));
    let mut network = Network::start(plan.manager(|config| config.close_grace_ms = 4000)).await.unwrap();
    let terms = Terms { lease_ms: Some(3000), ..Terms::default() };
    let (goods, product) = network.publish_noise("goods", 1400 * KIB, &terms).await.unwrap();
    let client = network.client("client").await.unwrap();
    network.manager.crash_origin().await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    let mut options = Client::slow_options(300 * KIB);
    options.link.clock_grace_ms = 0;
    let mut fetch = client.fetch(by_ticket(&ticket), options);
    let first = ticket.ticket.lease.peek().unwrap().end;
    fetch.chunks(2).await.unwrap();
    let longer = |p: &client_node::FetchProgress| p.lease.as_ref().is_some_and(|lease| lease.until > first);
    fetch.until("a longer lease", longer).await.unwrap();
    let seen = fetch.until("the end of the first lease", |_| now_ms() > first).await.unwrap();
    assert!(!fetch.is_over() && seen.transfer.have_chunks < product.chunks, "it was to be under way: {seen:?}");

    // Whoever begins a stream now with the ticket as it was sold is refused; the fetch goes on over a stream of its own.
    network.seeders[0].crash().await;
    network.seeders[0].start().await.unwrap();
    let at = network.seeders[0].at().unwrap();
    let refused = present(client.home().keypair(), &ticket, Tampering::None, &at).await.unwrap();
    assert!(matches!(&refused, Outcome::Refused(no) if no.code == RefusalCode::Expired), "{refused:?}");
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    assert_counted(&network, id, &outcome, product.chunks, &[]).await;
    network.stop().await.unwrap();
}

/// Its disk broke, and with it went what it had acknowledged: the one seeder that there is does not send that again in the
/// same delivery.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_download_that_was_lost_half_way_goes_on_in_a_further_delivery() {
    show_logs();
    let network = Network::start(Plan::new(0)).await.unwrap();
    let terms = Terms { price: "12.99".to_owned(), ..Terms::default() };
    let (goods, product) = network.publish_noise("goods", 40 * 1024 * KIB, &terms).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    let mut fetch = client.fetch(by_ticket(&ticket), Client::slow_options(16 * 1024 * KIB));
    fetch.chunks(product.chunks / 4 * 3).await.unwrap();
    assert!(matches!(fetch.stop().await, Err(FetchError::Cancelled)));
    std::fs::remove_dir_all(client.out()).unwrap();
    let outcome = client.fetch_all(by_ticket(&ticket)).await.unwrap();
    assert_same(&goods, &outcome.path);
    let shown = network.transaction(id).await.unwrap();
    let deliveries = shown["deliveries"].as_array().unwrap();
    // What came before it was lost is paid with the first one, in its time.
    assert_eq!((deliveries.len(), &deliveries[1]["rate"]), (2, &serde_json::json!(0)), "{shown}");
    assert_eq!((&deliveries[0]["completed"], &deliveries[1]["completed"]), (&false.into(), &true.into()), "{shown}");
    network.stop().await.unwrap();
}
