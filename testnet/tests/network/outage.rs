//! The manager out of reach of the seeders, of one or of all: receipts have only the mesh and the seeders' outboxes to come
//! from, and come from there, each once.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use client_node::{FetchOutcome, Target};
use manager_node::Published;
use protocol::ticket::TicketEnvelope;
use protocol::trust::JoinLine;
use protocol::{Address, PeerAddrs, PeerId};
use testnet::{Client, Goods, Network, Plan, Terms, until};

use crate::{KIB, assert_counted, assert_same, by_ticket, show_logs};

/// How long the mesh of these tests remembers: what got lost in it is sent again soon.
const MEMORY: Duration = Duration::from_millis(1000);
const CLIENTS: usize = 5;
const EACH: usize = 10;

fn forget(config: &mut seeder::Config) {
    config.gossip_heartbeat_ms = 100;
    config.gossip_memory_ms = 1000;
}

fn forgetful(seeders: usize) -> Plan {
    Plan::new(seeders).manager(|config| config.gossip_memory_ms = 1000).seeder(|_, config| forget(config))
}

/// A network with goods of which both seeders have a copy, and in which seeder 0, when it starts again, knows one address
/// of the manager where nobody answers, and seeder 1.
async fn with_a_seeder_cut_off() -> (Network, Goods, Published) {
    let plan = forgetful(2).seeder(|_, config| {
        forget(config);
        config.receipt_direct_ms = 600_000;
    });
    let mut network = Network::start(plan).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 600 * KIB, &Terms::default()).await.unwrap();
    network.seeders[0].stop().await.unwrap();
    let join: JoinLine = network.seeders[0].config.join.parse().unwrap();
    let manager = network.manager.running().unwrap().manager().peer_id();
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nowhere = Address::new(&format!("/ip4/127.0.0.1/tcp/{dead}")).unwrap();
    let managers = vec![PeerAddrs::new(manager, vec![nowhere]), network.seeders[1].at().unwrap()];
    network.seeders[0].config.join = JoinLine { managers, ..join }.to_string();
    (network, goods, product)
}

/// The DHT would lead a seeder to the manager by another address: whatever comes about between the two is cut at once.
fn cut(network: &Network, seeder: PeerId) -> tokio::task::JoinHandle<()> {
    let handle = network.manager.running().unwrap().manager().handle().clone();
    tokio::spawn(async move {
        let mut tick = tokio::time::interval(std::time::Duration::from_millis(2));
        while handle.disconnect(seeder).await.is_ok() {
            tick.tick().await;
        }
    })
}

async fn until_near(network: &Network) {
    let other = network.seeders[1].peer();
    let near = || async {
        let handle = network.seeders[0].running().ok()?.handle();
        handle.is_connected(other).await.ok()?.then_some(())
    };
    until("seeder 0 being connected to seeder 1", near).await.unwrap();
}

async fn until_marked(network: &Network) {
    let marked = || async { (network.seeders[0].count("batches_waiting") == 0).then_some(()) };
    until("the manager's mark coming back through the mesh", marked).await.unwrap();
}

/// A delivery to which seeder 0 contributes.
async fn delivery(client: &Client, ticket: &TicketEnvelope, goods: &Goods, seeder: PeerId) -> FetchOutcome {
    let outcome = client.fetch(by_ticket(ticket), Client::slow_options(500 * KIB)).done().await.unwrap();
    assert_same(goods, &outcome.path);
    let part = outcome.sources.iter().find(|source| source.peer == seeder).unwrap();
    assert!(part.chunks > 0, "{:?}", outcome.sources);
    outcome
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipts_of_a_seeder_that_cannot_reach_the_manager_come_through_another() {
    show_logs();
    let (mut network, goods, product) = with_a_seeder_cut_off().await;
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    network.seeders[0].start().await.unwrap();
    let peer = network.seeders[0].peer();
    let guard = cut(&network, peer);
    until_near(&network).await;
    let outcome = delivery(&client, &ticket, &goods, peer).await;
    assert_counted(&network, id, &outcome, product.chunks, &[]).await;
    until_marked(&network).await;
    guard.abort();
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn receipts_that_the_mesh_carried_in_vain_are_given_to_it_again() {
    show_logs();
    let (mut network, goods, product) = with_a_seeder_cut_off().await;
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    network.seeders[0].start().await.unwrap();
    let peer = network.seeders[0].peer();
    let guard = cut(&network, peer);
    until_near(&network).await;
    // With nobody there to mark them: whoever passes these receipts on does so for nothing.
    network.manager.crash().await;
    guard.await.unwrap();
    let outcome = delivery(&client, &ticket, &goods, peer).await;
    let gossiped = || async { (network.seeders[0].count("batches_waiting") > 0).then_some(()) };
    until("the receipts being in batches", gossiped).await.unwrap();
    network.manager.start().await.unwrap();
    let guard = cut(&network, peer);
    assert_counted(&network, id, &outcome, product.chunks, &[]).await;
    until_marked(&network).await;
    guard.abort();
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_deliveries_while_the_manager_is_away_longer_than_any_cache_lives_count_once_each() {
    show_logs();
    let plan = forgetful(3);
    let mut network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 100 * KIB, &Terms::default()).await.unwrap();
    let mut buyers = Vec::new();
    for n in 0..CLIENTS {
        let client = network.client(&format!("client-{n}")).await.unwrap();
        let mut tickets = Vec::new();
        for _ in 0..EACH {
            tickets.push(network.ticket(&client, product.product).await.unwrap());
        }
        // The network's keys, which a new client has to ask the manager for.
        client_node::inbox(client.home(), Some(&tickets[0].1.join), &client_node::LinkOptions::default())
            .await
            .unwrap();
        buyers.push((client, tickets));
    }

    network.manager.crash().await;
    let away = Instant::now();
    let fetches = buyers.into_iter().map(|(client, tickets)| async move {
        let mut done = Vec::new();
        for (id, _) in tickets {
            // From one seeder each: of chunks that come twice, one may be told of after the delivery is closed.
            let mut options = Client::options();
            options.limits.sessions = 1;
            let outcome = client.fetch(Target::Transaction(id), options).done().await.unwrap();
            assert!(!outcome.reported, "reported to a manager that is away");
            // The next purchase of the same has the same name.
            std::fs::rename(&outcome.path, client.out().join(id.to_string())).unwrap();
            done.push((id, outcome));
        }
        done
    });
    let done: Vec<_> = futures::future::join_all(fetches).await.into_iter().flatten().collect();
    assert_eq!(done.len(), CLIENTS * EACH);

    // All of them are in batches, the batches were gossiped, and nobody in the mesh remembers them.
    let batched = || async {
        let waiting = |seeder: &testnet::Seeder| seeder.count("receipts_due") == 0;
        network.seeders.iter().all(waiting).then_some(Instant::now())
    };
    let last = until("the receipts being in batches", batched).await.unwrap();
    let forgotten = MEMORY + Duration::from_millis(6 * 100);
    until("the mesh's forgetting", || async { (last.elapsed() > forgotten).then_some(()) }).await.unwrap();
    let waiting: u64 = network.seeders.iter().map(|seeder| seeder.count("batches_waiting")).sum();
    assert!(waiting > 0, "somebody marked what nobody could");

    let away_for = away.elapsed();
    network.manager.start().await.unwrap();
    for (id, outcome) in &done {
        let settled = assert_counted(&network, *id, outcome, product.chunks, &[]).await;
        let postings = settled["postings"].as_array().unwrap();
        let closings = postings.iter().filter(|p| p["key"].as_str().is_some_and(|key| key.starts_with("close:")));
        assert_eq!(closings.count(), 1, "{settled}");
    }
    let marked = || async { network.seeders.iter().all(|seeder| seeder.count("batches_waiting") == 0).then_some(()) };
    until("the manager's marks", marked).await.unwrap();
    // What came a second time, from a seeder that had no answer yet, says nothing new. Where a delivery was held up half-way,
    // what was acknowledged until then has a receipt of its own; the next one counts for the rest.
    let counted = network.receipts().await.unwrap().into_iter().filter(|line| line["status"] == "counted");
    let (mut each, mut seen) = (BTreeMap::<String, u64>::new(), BTreeSet::new());
    for line in counted {
        assert!(seen.insert(line["receipt"].to_string()), "counted twice: {line}");
        *each.entry(line["transaction"].as_str().unwrap().to_owned()).or_default() +=
            line["new_chunks"].as_u64().unwrap();
    }
    let once = done.iter().filter(|(id, _)| each.get(&id.to_string()) == Some(&u64::from(product.chunks))).count();
    assert_eq!(once, CLIENTS * EACH, "{each:?}");
    println!("{once} deliveries counted once each, of {waiting} batches, after {away_for:?} without the manager");
    network.stop().await.unwrap();
}
