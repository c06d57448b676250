//! Where copies are: more of what is asked for, elsewhere when a seeder is lost, and a newcomer's share with the newcomer.

use testnet::{Network, Plan, Terms, until};

use crate::{KIB, show_logs};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_for_much_gets_more_copies_up_to_a_bound() {
    show_logs();
    let plan = Plan::new(4).copies(1).manager(|config| {
        config.demand_per_copy = 2;
        config.max_copies = 3;
    });
    let network = Network::start(plan).await.unwrap();
    let (_, wanted) = network.publish_noise("wanted", 200 * KIB, &Terms::default()).await.unwrap();
    let (_, other) = network.publish_noise("other", 201 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    for _ in 0..8 {
        network.ticket(&client, wanted.product).await.unwrap();
    }
    // The origin's, and three: four sales more would be a fourth and fifth, but three is the bound.
    network.until_copies(wanted.product, 4).await.unwrap();
    let holders = async |content| {
        let running = network.seeders.iter().filter_map(|seeder| seeder.running().ok());
        running.filter(|seeder| seeder.contents().get(&content).is_some()).count()
    };
    assert_eq!((holders(wanted.manifest).await, holders(other.manifest).await), (3, 1));
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newcomer_comes_into_its_share_and_a_lost_seeders_copies_are_made_elsewhere() {
    show_logs();
    let plan = Plan::new(1)
        .copies(1)
        .manager(|config| (config.seeder_away_ms, config.seeder_lost_ms) = (2000, 3000))
        // A thousand times the room is the whole share, but for a thousandth.
        .seeder(|number, config| config.capacity = if number == 1 { 1 << 40 } else { 1 << 30 });
    let mut network = Network::start(plan).await.unwrap();
    let mut contents = Vec::new();
    for (name, size) in [("one", 70), ("two", 80)] {
        contents.push(network.publish_noise(name, size * KIB, &Terms::default()).await.unwrap().1.manifest);
    }
    network.add_seeder().await.unwrap();
    let held_by = |network: &Network, number: usize| {
        let seeder = network.seeders[number].running().unwrap();
        contents.iter().filter(|content| seeder.contents().get(content).is_some_and(|c| c.is_complete())).count()
    };
    until("the newcomer's share", || async { (held_by(&network, 1) == 2).then_some(()) }).await.unwrap();
    // What it took over stays where it was, too, until somebody wants the room.
    assert_eq!(held_by(&network, 0), 2);

    // Both are lost, and somebody else has to have everything.
    network.add_seeder().await.unwrap();
    for lost in [0, 1] {
        network.seeders[lost].crash().await;
    }
    until("the copies of the lost", || async { (held_by(&network, 2) == 2).then_some(()) }).await.unwrap();
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_network_that_is_nearly_full_comes_to_rest_after_a_seeder_joined() {
    show_logs();
    // Ten contents at one seeder would be above its high mark and nine are below it; eight are below its low one.
    let plan = Plan::new(3).copies(1).seeder(|_, config| {
        config.capacity = 203_000;
        (config.report_ms, config.gc_ms) = (300, 100);
    });
    let mut network = Network::start(plan).await.unwrap();
    let publish = async |network: &Network, number: u64, size: u64| {
        network.publish_noise(&format!("goods-{number}"), size + number, &Terms::default()).await.unwrap();
    };
    for number in 0..26 {
        publish(&network, number, 20_000).await;
    }
    network.add_seeder().await.unwrap();
    let joined = || async { (network.seeders[3].count("replicated_bytes") > 0).then_some(()) };
    until("the newcomer's share", joined).await.unwrap();
    // The first three are full, and hold what the newcomer has, too: for what is needed they let go of that.
    for number in 26..34 {
        publish(&network, number, 20_000).await;
    }
    // What is small finds room; until it has its copy, everybody looks around again and again.
    for number in 34..44 {
        publish(&network, number, 1000).await;
    }
    let copied: u64 = network.seeders.iter().map(|seeder| seeder.count("replicated_bytes")).sum();
    // Each once, and what fits below the newcomer's low mark once more.
    assert!(copied < (34 + 9) * 20_300 + 10 * 4000, "{copied} bytes were copied for 34 contents of 20000");
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_seeder_that_does_not_leave_after_all_is_in_the_next_leases_also_after_a_restart() {
    show_logs();
    // The third has no room for its copy, so that the first cannot leave.
    let plan = Plan::new(3).copies(2).seeder(|number, config| {
        if number == 2 {
            config.capacity = 64 * KIB;
        }
    });
    let mut network = Network::start(plan).await.unwrap();
    let (_, product) = network.publish_noise("goods", 200 * KIB, &Terms::default()).await.unwrap();
    let client = network.client("client").await.unwrap();
    let peer = network.seeders[0].peer();
    for restarts in [false, true] {
        let named = async |network: &Network| {
            let (_, ticket) = network.ticket(&client, product.product).await.unwrap();
            ticket.ticket.lease.peek().unwrap().sources.contains(&peer)
        };
        assert!(named(&network).await);
        let leaving = async {
            let leaves = network.seeders[0].control(serde_json::json!({ "cmd": "drain", "patience_ms": 600_000 }));
            let seen = until("leaving", || async { (!named(&network).await).then_some(()) });
            tokio::select! {
                ended = leaves => panic!("it left: {ended:?}"),
                seen = seen => seen.unwrap(),
            }
        };
        leaving.await;
        // The one who asked is gone, and it goes on leaving.
        if restarts {
            network.seeders[0].crash().await;
            network.seeders[0].start().await.unwrap();
        } else {
            network.seeders[0].control(serde_json::json!({ "cmd": "drain", "cancel": true })).await.unwrap();
        }
        until("being a source again", || async { named(&network).await.then_some(()) }).await.unwrap();
    }
    network.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_seeders_but_one_leave_at_once_and_the_one_that_stays_has_everything() {
    show_logs();
    let network = Network::start(Plan::new(4).copies(2)).await.unwrap();
    let mut contents = Vec::new();
    for number in 0..6 {
        let (_, product) =
            network.publish_noise(&format!("goods-{number}"), 100 * KIB + number, &Terms::default()).await.unwrap();
        contents.push(product.manifest);
    }
    let drain = serde_json::json!({ "cmd": "drain", "patience_ms": 60_000 });
    let [one, two, three, stays] = &network.seeders[..] else { panic!("four seeders") };
    let (one, two, three) =
        tokio::join!(one.control(drain.clone()), two.control(drain.clone()), three.control(drain.clone()));
    for ended in [one, two, three] {
        let ended = ended.unwrap();
        assert_eq!(ended["complete"], serde_json::json!(true), "{ended}");
    }
    let stays = stays.running().unwrap().contents().clone();
    for content in contents {
        assert!(stays.get(&content).is_some_and(|content| content.is_complete()), "{content}");
    }
    network.stop().await.unwrap();
}
