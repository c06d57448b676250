//! Between seeder and manager: joining, reporting, and what goes through the mesh.

use protocol::api::{
    GossipedBatch, MESH_PROTOCOL, MeshRequest, MeshResponse, News, SEEDER_PROTOCOL, SeederRequest, SeederResponse,
    news_topic, receipts_topic_of_shard,
};
use protocol::deliver::ClientMessage;
use protocol::trust::{KeyPurpose, Revocations};
use protocol::{ChunkSet, RefusalCode, Signed, codec};

use crate::client::Client;
use crate::manager::Manager;
use crate::world::{LIMIT, World, eventually, now, stop};

#[tokio::test]
async fn a_manager_that_is_heard_again_is_asked_at_once() {
    let world = World::new(true).await;
    let seeder = world
        .seeder("a", &[], |config| {
            // A failure is waited for longer than any test.
            (config.report_ms, config.retry_ms) = (200, 600_000);
        })
        .await;
    world.manager.stop().await;
    let trouble = || async { seeder.status().unwrap()["trouble"]["manager"].as_str().map(str::to_owned) };
    eventually("the manager being missed", trouble).await;
    let reports = |heard: &crate::manager::Heard| heard.counts.get(&seeder.peer_id()).copied().unwrap_or(0);
    let before = reports(&world.office.heard.lock().unwrap());

    // Minutes later, as the clock of its heartbeats says.
    world.office.says.lock().unwrap().clock_ahead_ms = 120_000;
    let again = Manager::start(&world.office, world.manager.at.addrs.first().cloned(), true).await;
    again.handle.connect(&seeder.peer_addrs(), LIMIT).await.unwrap();
    let topic = news_topic(&world.office.network);
    let _listening = again.handle.subscribe(&topic, 16).await.unwrap();
    let beat = codec::encode(&News::Heartbeat(world.office.heartbeat()));
    eventually("a mesh", || async { again.handle.publish(&topic, beat.clone()).await.ok() }).await;
    world.office.until("a report", |heard| (reports(heard) > before).then_some(())).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_seeder_that_is_not_enrolled_says_so_until_it_is() {
    let mut world = World::new(false).await;
    let goods = world.publish(1, 1);
    let client = Client::new(10).await;
    let address = world.manager.at.addrs[0].clone();
    world.set_up("a", &[&goods], |config| config.call_ms = 500);
    world.manager.stop().await;
    let seeder = world.start("a").await;
    let refusal = client.open(&seeder.peer_addrs()).await.refusal().await;
    assert_eq!(refusal.code, RefusalCode::NotEnrolled);
    assert!(!seeder.status().unwrap()["serving"].as_bool().unwrap());

    world.manager = Manager::start(&world.office, Some(address), false).await;
    let peer = seeder.peer_id();
    let report = world.office.until("a report", |heard| heard.reports.get(&peer).cloned()).await;
    assert_eq!(report.held, [goods.digest()]);
    assert!(report.free > 0 && report.first);
    assert_eq!(report.addrs, seeder.addresses());
    client.begin(&seeder.peer_addrs(), &world.ticket(&goods, client.peer(), peer)).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_revoked_seeder_serves_nobody_and_says_why() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    world.office.revoke(Revocations { peers: vec![at.peer], ..Revocations::default() });
    world.manager.nudge(&at).await;
    // By a name that no client takes for one of its ticket's.
    for refusal in [talk.refusal().await, client.open(&at).await.refusal().await] {
        assert!(refusal.code == RefusalCode::NotEnrolled && refusal.detail.contains("revoked"), "{refusal}");
    }
    let status = seeder.status().unwrap();
    assert!(status["not_serving_because"].as_str().unwrap().contains("revoked"), "{status}");
    assert_eq!(status["enrolled"], false, "{status}");
    stop(seeder).await;
}

#[tokio::test]
async fn a_seeder_that_stops_says_so_and_a_manager_that_is_away_does_not_hold_it_up() {
    let world = World::new(false).await;
    let seeder = world.seeder("a", &[], |config| config.report_ms = 50).await;
    let peer = seeder.peer_id();
    stop(seeder).await;
    let last = |heard: &crate::manager::Heard| (heard.counts[&peer], heard.stopped.get(&peer).copied());
    let (reports, stopped) = last(&world.office.heard.lock().unwrap());
    assert_eq!(stopped, Some(reports), "it is the last thing that it says");
    let seeder = world.start("a").await;
    world.office.until("a report", |heard| (heard.counts[&peer] > reports).then_some(())).await;
    world.manager.stop().await;
    let began = std::time::Instant::now();
    stop(seeder).await;
    assert!(began.elapsed() < std::time::Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(world.office.heard.lock().unwrap().stopped[&peer], reports);
}

#[tokio::test]
async fn who_missed_revocations_has_them_from_the_other_seeders_while_the_manager_is_away() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let client = Client::new(10).await;
    let quick = |config: &mut seeder::Config| config.call_ms = 500;
    let (a, b) = (world.seeder("a", &[], quick).await, world.seeder("b", &[&goods], quick).await);
    let known = |seeder: &seeder::Running| seeder.status().unwrap()["acquaintances"].as_u64().unwrap();
    a.handle().connect(&b.peer_addrs(), LIMIT).await.unwrap();
    for seeder in [&a, &b] {
        eventually("an acquaintance", || async { (known(seeder) == 1).then_some(()) }).await;
    }
    let peer = b.peer_id();
    stop(b).await;

    let terms = world.terms(&goods, client.peer(), peer);
    let transactions = vec![terms.transaction];
    let ticket = world.make(terms);
    // More of them than go into one answer.
    const MISSED: u64 = 2 * MeshResponse::EPOCHS_PAGE as u64 + 1;
    for _ in 0..MISSED - 1 {
        world.office.revoke(Revocations::default());
    }
    world.office.revoke(Revocations { transactions, ..Revocations::default() });
    world.manager.nudge(&a.peer_addrs()).await;
    let epoch = |seeder: &seeder::Running| seeder.status().unwrap()["revocation_epoch"].as_u64().unwrap();
    eventually("the epochs", || async { (epoch(&a) == MISSED).then_some(()) }).await;
    world.manager.stop().await;

    let b = world.start("b").await;
    eventually("the missed epochs", || async { (epoch(&b) == MISSED).then_some(()) }).await;
    assert_eq!(client.show(&b.peer_addrs(), &ticket).await.refusal().await.code, RefusalCode::Revoked);
    stop(a).await;
    stop(b).await;
}

#[tokio::test]
async fn only_a_manager_may_nudge() {
    let world = World::new(false).await;
    let seeder = world.seeder("a", &[], |_| {}).await;
    let stranger = Client::new(10).await;
    let protocol = node::Protocol::new(SEEDER_PROTOCOL);
    let answer: SeederResponse =
        stranger.node.call(&seeder.peer_addrs(), protocol, &SeederRequest::Nudge, LIMIT).await.unwrap();
    assert!(matches!(answer, SeederResponse::Refused(refusal) if refusal.code == RefusalCode::NotEntitled));
    stop(seeder).await;
}

#[tokio::test]
async fn seeders_that_meet_know_each_other_and_those_who_show_no_certificate_of_their_own_stay_strangers() {
    let world = World::new(false).await;
    let (a, b) = (world.seeder("a", &[], |_| {}).await, world.seeder("b", &[], |_| {}).await);
    let known = |seeder: &seeder::Running| seeder.status().unwrap()["acquaintances"].as_u64().unwrap();
    assert_eq!((known(&a), known(&b)), (0, 0), "nothing leads them to each other yet");
    let stranger = Client::new(10).await;
    let introduce = |certificate| MeshRequest::Introduce { certificate, addrs: Vec::new() };
    let stolen = introduce(world.office.certificate(b.peer_id()));
    let protocol = node::Protocol::new(MESH_PROTOCOL);
    let answer: MeshResponse = stranger.node.call(&a.peer_addrs(), protocol, &stolen, LIMIT).await.unwrap();
    assert!(matches!(&answer, MeshResponse::Refused(no) if no.code == RefusalCode::NotEnrolled), "{answer:?}");

    a.handle().connect(&b.peer_addrs(), LIMIT).await.unwrap();
    for seeder in [&a, &b] {
        eventually("an acquaintance", || async { (known(seeder) == 1).then_some(()) }).await;
    }
    world.office.revoke(Revocations { peers: vec![b.peer_id()], ..Revocations::default() });
    world.manager.nudge(&a.peer_addrs()).await;
    eventually("the revoked one being forgotten", || async { (known(&a) == 0).then_some(()) }).await;
    stop(a).await;
    stop(b).await;
}

#[tokio::test]
async fn a_seeder_that_moved_tells_those_who_know_it_and_of_too_many_addresses_the_first_are_taken() {
    let world = World::new(false).await;
    let a = world.seeder("a", &[], |_| {}).await;
    // Another seeder, which is in the table of this one from its introduction on, and so never met anew.
    let supervisor = node::Supervisor::new();
    let key = protocol::Keypair::from_seed(&[66; 32]);
    let config = node::NodeConfig {
        listen: vec![protocol::Address::new("/ip4/127.0.0.1/tcp/0").unwrap()],
        dht: node::DhtMode::Server,
        reach: node::ReachConfig {
            relay: node::RelayConfig { enabled: true, ..Default::default() },
            ..node::ReachConfig::default()
        },
        ..node::NodeConfig::new(key.clone())
    };
    let other = node::Node::start(config, &supervisor).await.unwrap();
    let certificate = world.office.certificate(key.peer_id());
    other.add_member(a.peer_id()).await;
    let (told, mut hears) = tokio::sync::mpsc::channel(16);
    let own = certificate.clone();
    let answer = move |_, request: MeshRequest| {
        let (told, certificate) = (told.clone(), own.clone());
        async move {
            if let MeshRequest::Introduce { addrs, .. } = request {
                told.send(addrs).await.unwrap();
            }
            MeshResponse::Introduced { certificate, addrs: Vec::new() }
        }
    };
    let protocol = node::Protocol::new(MESH_PROTOCOL);
    node::serve_calls(&supervisor, &other, protocol, node::CallLimits::default(), answer).await.unwrap();
    let mut addrs = other.peer_addrs().await.unwrap().addrs;
    addrs.extend((1..=20).map(|n| protocol::Address::new(&format!("/ip4/127.0.0.{n}/tcp/1")).unwrap()));
    let introduce = MeshRequest::Introduce { certificate, addrs };
    let answer: MeshResponse = other.call(&a.peer_addrs(), protocol, &introduce, LIMIT).await.unwrap();
    assert!(matches!(answer, MeshResponse::Introduced { .. }), "{answer:?}");
    stop(a).await;
    while hears.try_recv().is_ok() {}

    let a = world.start("a").await;
    let at_start = a.addresses();
    let heard = tokio::time::timeout(LIMIT, hears.recv()).await.unwrap().unwrap();
    assert_eq!(heard, at_start);
    // It moves: seconds later it has a slot at a relay, which happens to be the other one.
    let moved = async {
        loop {
            let heard = hears.recv().await.unwrap();
            if heard.iter().any(|address| address.as_str().contains("p2p-circuit")) {
                return heard;
            }
        }
    };
    let heard = tokio::time::timeout(LIMIT, moved).await.unwrap();
    assert_eq!(heard, a.addresses());
    stop(a).await;
    supervisor.shutdown(LIMIT).await.unwrap();
}

#[tokio::test]
async fn news_by_a_key_that_nobody_knows_sends_no_seeder_to_the_manager_again_and_again() {
    let world = World::new(true).await;
    let seeder = world.seeder("a", &[], |config| config.report_ms = 600_000).await;
    let peer = seeder.peer_id();
    let handle = &world.manager.handle;
    let news = news_topic(&world.office.network);
    let _listening = handle.subscribe(&news, 16).await.unwrap();
    let reports = || world.office.heard.lock().unwrap().counts[&peer];
    let before = reports();
    let stranger = protocol::Keypair::from_seed(&[77; 32]);
    for at in 0..20 {
        let epoch = protocol::trust::RevocationEpoch {
            network: world.office.network,
            number: 1,
            previous: None,
            at: now() + at,
            added: Revocations::default(),
        };
        let told = codec::encode(&News::Epoch(Signed::sign(&epoch, &stranger)));
        eventually("a mesh", || async { handle.publish(&news, told.clone()).await.ok() }).await;
        if at == 0 {
            // It may be of a newer key set: that is asked for.
            eventually("a report", || async { (reports() == before + 1).then_some(()) }).await;
        }
    }
    // What comes after all these is heard after them.
    world.office.revoke(Revocations::default());
    let good = world.office.says.lock().unwrap().epochs[0].clone();
    handle.publish(&news, codec::encode(&News::Epoch(good))).await.unwrap();
    let epoch = || seeder.status().unwrap()["revocation_epoch"] == 1;
    eventually("the epoch", || async { epoch().then_some(()) }).await;
    assert_eq!(reports(), before + 1);
    stop(seeder).await;
}

#[tokio::test]
async fn receipts_and_news_go_through_the_mesh() {
    let world = World::new(true).await;
    let goods = world.publish(1, 2);
    let client = Client::new(10).await;
    // Nothing is sent directly: what arrives came by gossip.
    let seeder = world.seeder("a", &[&goods], |config| config.receipt_direct_ms = 600_000).await;
    let at = seeder.peer_addrs();
    let handle = &world.manager.handle;
    let mut shards = Vec::new();
    for shard in 0..2 {
        shards.push(handle.subscribe(&receipts_topic_of_shard(&world.office.network, shard), 16).await.unwrap());
    }
    let news = news_topic(&world.office.network);
    let _listening = handle.subscribe(&news, 16).await.unwrap();

    // A revocation that nobody nudges about, but whose epoch is told in the mesh.
    let terms = world.terms(&goods, client.peer(), at.peer);
    let transactions = vec![terms.transaction];
    let ticket = world.make(terms);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    let epoch = protocol::trust::RevocationEpoch {
        network: world.office.network,
        number: 1,
        previous: None,
        at: now(),
        added: Revocations { transactions, ..Revocations::default() },
    };
    let epoch = Signed::sign(&epoch, world.office.key(KeyPurpose::Revocation));
    let told = codec::encode(&News::Epoch(epoch));
    eventually("a mesh", || async { handle.publish(&news, told.clone()).await.ok() }).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::Revoked);

    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..2).await;
    talk.chunk().await.unwrap();
    let ack = client.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..1));
    talk.say(ClientMessage::Ack(ack.clone())).await;
    let heard = async {
        let [one, two] = &mut shards[..] else { unreachable!() };
        tokio::select! { message = one.next() => message, message = two.next() => message }
    };
    let message = tokio::time::timeout(LIMIT, heard).await.expect("no receipts by gossip").unwrap();
    let gossiped: GossipedBatch = codec::decode(&message.data).unwrap();
    let batch = gossiped.batch.verify(&at.peer).unwrap();
    let opened = batch.open(world.office.key(KeyPurpose::ReceiptSealing)).unwrap();
    assert_eq!(opened.receipts[0].ack, ack);
    stop(seeder).await;
}
