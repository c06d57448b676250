//! Nodes that go away at bad moments: deliveries go on as long as anybody has the goods, and every receipt is counted
//! once in the end.

use client_node::FetchOptions;
use protocol::api::provider_key;
use protocol::trust::JoinLine;
use testnet::adversary::{Outcome, Tampering, present};
use testnet::{Client, Network, Plan, Terms, until};

use crate::{KIB, MIB, assert_counted, assert_same, by_ticket, show_logs};

/// A completed delivery waits for missing receipts a few seconds and not two days.
fn plan(seeders: usize) -> Plan {
    Plan::new(seeders).manager(|config| config.close_grace_ms = 10_000)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_manager_may_be_away_during_deliveries() {
    show_logs();
    let mut network = Network::start(plan(2)).await.unwrap();
    let origin = network.manager.origin().unwrap();
    let (goods, product) = network.publish_noise("goods", MIB, &Terms::default()).await.unwrap();
    let mut fetches = Vec::new();
    for n in 0..4 {
        let client = network.client(&format!("client-{n}")).await.unwrap();
        let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
        let fetch = client.fetch(by_ticket(&ticket), Client::slow_options(400 * KIB));
        fetches.push((id, client, ticket, fetch));
    }
    for (.., fetch) in &mut fetches {
        fetch.chunks(2).await.unwrap();
    }
    network.manager.crash().await;

    // Whether a ticket is good is decided without the manager.
    let at = network.seeders[0].at().unwrap();
    let stranger = network.client("stranger").await.unwrap();
    let refused = present(stranger.home().keypair(), &fetches[0].2, Tampering::None, &at).await.unwrap();
    assert!(matches!(&refused, Outcome::Refused(no) if no.code.as_str() == "wrong-client"), "{refused:?}");
    let forged = present(fetches[0].1.home().keypair(), &fetches[0].2, Tampering::ForgedLease, &at).await.unwrap();
    assert!(matches!(&forged, Outcome::Refused(no) if no.code.as_str() == "bad-manager-signature"), "{forged:?}");

    let mut outcomes = Vec::new();
    for (id, _, _, fetch) in fetches {
        let outcome = fetch.done().await.unwrap();
        assert_same(&goods, &outcome.path);
        assert!(!outcome.reported, "reported to a manager that is away");
        outcomes.push((id, outcome));
    }
    // Seeders stop and start over what waits in their outboxes.
    network.seeders[0].crash().await;
    network.seeders[0].start().await.unwrap();
    network.manager.start().await.unwrap();
    for (id, outcome) in &outcomes {
        let settled = assert_counted(&network, *id, outcome, product.chunks, &[origin]).await;
        // One posting closes the delivery, however often receipts came.
        let postings = settled["postings"].as_array().unwrap();
        let closings = postings.iter().filter(|p| p["key"].as_str().is_some_and(|key| key.starts_with("close:")));
        assert_eq!(closings.count(), 1, "{settled}");
    }
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_of_four_seeders_and_the_origin_may_die_one_after_another() {
    show_logs();
    let mut network = Network::start(plan(4)).await.unwrap();
    let mut killed = vec![network.manager.origin().unwrap()];
    let (goods, product) = network.publish_noise("goods", 2 * MIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    let mut fetch = client.fetch(by_ticket(&ticket), Client::slow_options(700 * KIB));
    fetch.chunks(2).await.unwrap();
    network.manager.crash().await;
    for (number, chunks) in [(2, 6), (0, 12), (3, 18)] {
        fetch.chunks(chunks).await.unwrap();
        network.seeders[number].crash().await;
        killed.push(network.seeders[number].peer());
    }
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    let last = outcome.sources.iter().find(|source| source.peer == network.seeders[1].peer()).unwrap();
    assert!(last.chunks > 0, "{:?}", outcome.sources);

    // All come back: what each of them delivered is counted.
    network.manager.start().await.unwrap();
    for seeder in &mut network.seeders {
        seeder.start().await.unwrap();
    }
    assert_counted(&network, id, &outcome, product.chunks, &killed).await;
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seven_of_eight_seeders_and_the_origin_may_die_one_after_another() {
    show_logs();
    let mut network = Network::start(plan(8)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 4 * MIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
    let mut fetch = client.fetch(by_ticket(&ticket), Client::slow_options(MIB));
    fetch.chunks(1).await.unwrap();
    network.manager.crash().await;
    let survivor = usize::from(ticket.join.network().as_bytes()[0]) % 8;
    let dying = (0..8).map(|n| (n * 3 + survivor) % 8).filter(|number| *number != survivor);
    for (number, chunks) in dying.zip((1..).map(|n| n * 7)) {
        fetch.chunks(chunks).await.unwrap();
        network.seeders[number].crash().await;
    }
    assert!(!fetch.is_over(), "it was to be under way");
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    let last = outcome.sources.iter().find(|source| source.peer == network.seeders[survivor].peer());
    assert!(last.unwrap().chunks > 0 && outcome.first_chunk_ms.is_some(), "{outcome:?}");
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_that_is_killed_and_restarted_goes_on_where_it_was() {
    show_logs();
    let mut network = Network::start(plan(1)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 2 * MIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    network.manager.crash_origin().await.unwrap();
    let mut fetch = client.fetch(by_ticket(&ticket), Client::slow_options(700 * KIB));
    fetch.chunks(8).await.unwrap();
    network.seeders[0].crash().await;
    network.seeders[0].start().await.unwrap();
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    let all = outcome.sources.iter().map(|source| source.chunks).sum::<u32>();
    assert_eq!(all, product.chunks);
    let seeder = network.seeders[0].peer();
    assert_counted(&network, id, &outcome, product.chunks, &[seeder]).await;
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_met_nobody_yet_needs_only_its_ticket_and_a_seeder() {
    show_logs();
    let mut network = Network::start(Plan::new(2)).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 300 * KIB, &Terms::default()).await.unwrap();
    let (buyer, client) = (network.client("buyer").await.unwrap(), network.client("client").await.unwrap());
    let voucher = network.voucher(10_000).await.unwrap();
    let bought = buyer.buy(&network.merchants[0], product.product, &voucher, Some(client.peer())).await.unwrap();
    // Its ticket is all that this client has: not even the network's keys, which it gets from a seeder.
    network.manager.crash().await;
    let mut fetch = client.fetch(by_ticket(&bought.ticket.unwrap()), Client::options());
    let heard = fetch.until("word of the manager", |progress| progress.manager_seen_at.is_some()).await.unwrap();
    assert!(heard.manager_seen_at.unwrap() > 0);
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    network.manager.start().await.unwrap();
    assert_counted(&network, bought.transaction.unwrap(), &outcome, product.chunks, &[]).await;
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_all_listed_sources_dead_others_are_found() {
    show_logs();
    let plan = Plan::new(2).manager(|config| config.seeder_away_ms = 2500);
    let mut network = Network::start(plan).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 600 * KIB, &Terms::default()).await.unwrap();
    // Seeder 1 is away while the lease is made, and so it is not listed.
    network.seeders[1].stop().await.unwrap();
    let gone = || async { (!network.is_here(network.seeders[1].peer()).await.ok()?).then_some(()) };
    until("seeder 1 being away", gone).await.unwrap();
    let client = network.client("client").await.unwrap();
    let (id, ticket) = network.ticket(&client, product.product).await.unwrap();
    let listed = ticket.ticket.lease.peek().unwrap().sources;
    assert!(!listed.contains(&network.seeders[1].peer()) && !listed.is_empty(), "{listed:?}");
    network.seeders[1].start().await.unwrap();
    network.seeders[0].crash().await;
    network.manager.crash_origin().await.unwrap();
    let outcome = client.fetch_all(by_ticket(&ticket)).await.unwrap();
    assert_same(&goods, &outcome.path);
    let from = |number: usize| outcome.sources.iter().find(|s| s.peer == network.seeders[number].peer());
    assert_eq!(from(1).unwrap().chunks, product.chunks, "{:?}", outcome.sources);
    assert_counted(&network, id, &outcome, product.chunks, &[]).await;
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_that_stops_in_order_is_named_in_no_lease_until_it_is_back() {
    show_logs();
    // Who is only silent is a source for minutes.
    let plan = Plan::new(2).manager(|config| config.seeder_away_ms = 180_000);
    let mut network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 64 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let peers = [network.seeders[0].peer(), network.seeders[1].peer()];
    network.seeders[1].stop().await.unwrap();
    assert!(!network.is_here(peers[1]).await.unwrap());
    network.seeders[0].crash().await;
    assert!(network.is_here(peers[0]).await.unwrap());
    let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
    let listed = ticket.ticket.lease.peek().unwrap().sources;
    assert_eq!((listed.contains(&peers[0]), listed.contains(&peers[1])), (true, false), "{listed:?}");
    network.seeders[1].start().await.unwrap();
    let back = || async { network.is_here(peers[1]).await.ok()?.then_some(()) };
    until("seeder 1 being back", back).await.unwrap();
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_chunk_is_there_in_a_tenth_of_a_second_and_by_way_of_the_dht_in_one() {
    show_logs();
    // The first has no room for goods and only leads to the others.
    let plan = Plan::new(3).copies(2).seeder(|number, config| {
        config.announce_ms = 2000;
        if number == 0 {
            config.capacity = 64 * KIB;
        }
    });
    let mut network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 2 * MIB, &Terms::default()).await.unwrap();
    let join: JoinLine = network.seeders[0].config.join.parse().unwrap();
    let key = *provider_key(&join.network(), &product.manifest).as_bytes();
    let table = network.seeders[0].running().unwrap().handle().clone();
    let known = || async {
        let providers = table.find_providers(key, 8, std::time::Duration::from_secs(1)).await.ok()?;
        let announced = |seeder: &testnet::Seeder| providers.iter().any(|found| found.peer == seeder.peer());
        network.seeders.iter().skip(1).all(announced).then_some(())
    };
    until("both seeders announcing the content", known).await.unwrap();

    // Programs that are not optimised take about three times as long for a handshake and a signature.
    let most = if cfg!(debug_assertions) { 300 } else { 100 };
    // The best of a few, and of some more where the machine has other work to do.
    let mut lonely = Vec::new();
    let (mut listed, mut found) = (u64::MAX, u64::MAX);
    for n in 0..16 {
        if n >= 4 && listed < most {
            break;
        }
        let client = network.client(&format!("client-{n}")).await.unwrap();
        let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
        let outcome = client.fetch_all(by_ticket(&ticket)).await.unwrap();
        listed = listed.min(outcome.first_chunk_ms.unwrap());
        if n >= 4 {
            continue;
        }
        // The lease names seeders, and nothing says where they are.
        let client = network.client(&format!("lonely-{n}")).await.unwrap();
        let (_, mut ticket) = network.ticket(&client, product.product).await.unwrap();
        ticket.sources.clear();
        lonely.push((client, ticket));
    }
    network.manager.crash().await;
    for (client, ticket) in lonely {
        let options = FetchOptions { sources: vec![network.seeders[0].at().unwrap()], ..Client::options() };
        let outcome = client.fetch(by_ticket(&ticket), options).done().await.unwrap();
        found = found.min(outcome.first_chunk_ms.unwrap());
    }
    tracing::info!("first chunk after {listed} ms from listed sources, after {found} ms by way of the DHT");
    assert!(listed < most && found < 1000, "{listed} ms, {found} ms");
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_one_address_of_any_seeder_a_new_client_finds_one_that_came_back_after_the_manager_was_gone() {
    show_logs();
    // The first has no room for goods and only leads to others; the second will be listed, and the third be found.
    let (bootstrap, listed, found) = (0, 1, 2);
    let plan = Plan::new(3).copies(2).manager(|config| config.seeder_away_ms = 2500).seeder(move |number, config| {
        config.announce_ms = 5000;
        if number == bootstrap {
            config.capacity = 64 * KIB;
        }
    });
    let mut network = Network::start(plan).await.unwrap();
    let (goods, product) = network.publish_noise("goods", 600 * KIB, &Terms::default()).await.unwrap();
    for number in [listed, found] {
        assert!(network.seeders[number].holds(1).await);
    }
    // Nobody bought anything yet. They know each other because they met.
    for seeder in &network.seeders {
        let met = || async { (seeder.count("acquaintances") >= 3).then_some(()) };
        until("all seeders knowing each other", met).await.unwrap();
    }

    // One holder is away while the lease is made; the other one, the manager and the origin are gone when it is used.
    network.seeders[found].stop().await.unwrap();
    let gone = || async { (!network.is_here(network.seeders[found].peer()).await.ok()?).then_some(()) };
    until("the seeder being away", gone).await.unwrap();
    let (buyer, client) = (network.client("buyer").await.unwrap(), network.client("client").await.unwrap());
    let voucher = network.voucher(10_000).await.unwrap();
    let bought = buyer.buy(&network.merchants[0], product.product, &voucher, Some(client.peer())).await.unwrap();
    let ticket = bought.ticket.unwrap();
    let sources = ticket.ticket.lease.peek().unwrap().sources;
    assert!(!sources.contains(&network.seeders[found].peer()), "{sources:?}");
    network.manager.crash().await;
    network.seeders[listed].crash().await;
    network.seeders[bootstrap].crash().await;
    for number in [bootstrap, found] {
        network.seeders[number].start().await.unwrap();
    }
    let key = *provider_key(&ticket.join.network(), &product.manifest).as_bytes();
    let table = network.seeders[bootstrap].running().unwrap().handle().clone();
    let back = network.seeders[found].peer();
    let announced = || async {
        let providers = table.find_providers(key, 8, std::time::Duration::from_secs(1)).await.ok()?;
        providers.iter().any(|provider| provider.peer == back).then_some(())
    };
    until("the content being announced without the manager", announced).await.unwrap();

    let options = FetchOptions { sources: vec![network.seeders[bootstrap].at().unwrap()], ..Client::options() };
    let fetch = client.fetch(by_ticket(&ticket), options);
    let outcome = fetch.done().await.unwrap();
    assert_same(&goods, &outcome.path);
    let from = outcome.sources.iter().find(|source| source.peer == back).unwrap();
    assert_eq!(from.chunks, product.chunks, "{:?}", outcome.sources);
    network.stop().await.unwrap();
}
