//! What a seeder believes of its network: whose word it takes, what it keeps of it, and what it tells its operator when
//! the words do not fit together.

use protocol::api::{GossipedBatch, News, news_topic, receipts_topic};
use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::receipt::{OutboxPlace, ReceiptBatch, SealedBatch};
use protocol::ticket::Ticket;
use protocol::trust::{AuditHead, KeyEntry, KeyPurpose, KeySet, KeyState, RevocationEpoch, Revocations};
use protocol::{ChunkSet, ContentId, Digest, Keypair, Nonce, RefusalCode, Signed, codec};
use serde_json::{Value, json};

use crate::client::Client;
use crate::world::{World, eventually, now, stop};

async fn control(world: &World, name: &str, request: Value) -> Value {
    node::control_call(&world.path(name), &request, |_| {}).await.unwrap()
}

#[tokio::test]
async fn two_key_sets_of_one_version_are_told_also_after_a_restart_until_a_newer_one_comes() {
    let world = World::new(true).await;
    let seeder = world.seeder("a", &[], |_| {}).await;
    let (handle, topic) = (&world.manager.handle, news_topic(&world.office.network));
    let _listening = handle.subscribe(&topic, 16).await.unwrap();
    let first = world.office.key_set().peek().unwrap();
    let says = |news: News| {
        let (topic, bytes) = (topic.clone(), codec::encode(&news));
        eventually("a mesh", move || {
            let (topic, bytes) = (topic.clone(), bytes.clone());
            async move { handle.publish(&topic, bytes).await.ok() }
        })
    };
    let sign = |set: &KeySet| Signed::sign(set, &world.office.root);
    let fork = || async { seeder.status().unwrap()["fork"].as_str().map(str::to_owned) };
    says(News::KeySet(sign(&KeySet { gossip_shards: 3, ..first.clone() }))).await;
    assert!(eventually("the fork being told", fork).await.contains("two different key sets of version 1"));
    // The first stays, and serves.
    assert_eq!(seeder.status().unwrap()["serving"], true);
    stop(seeder).await;

    let seeder = world.start("a").await;
    assert!(seeder.status().unwrap()["fork"].as_str().unwrap().contains("version 1"));
    says(News::KeySet(sign(&KeySet { version: 2, ..first }))).await;
    let clear = || async { seeder.status().unwrap()["fork"].is_null().then_some(()) };
    eventually("the newer key set ending it", clear).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_key_that_is_revoked_ends_what_runs_by_its_word_and_another_lease_goes_on_from_there() {
    let world = World::new(true).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let (handle, topic) = (&world.manager.handle, news_topic(&world.office.network));
    let _listening = handle.subscribe(&topic, 16).await.unwrap();
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..1).await;
    talk.chunk().await.unwrap();
    talk.say(ClientMessage::Ack(client.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..1)))).await;
    let heard = talk.hear().await;
    assert!(matches!(heard, Some(SeederMessage::Window { .. })), "{heard:?}");

    let next = Keypair::from_seed(&[230; 32]);
    let mut set = world.office.key_set().peek().unwrap();
    let stolen = set.keys.iter_mut().find(|entry| entry.purpose == KeyPurpose::Ticket).unwrap();
    stolen.state = KeyState::Revoked;
    set.keys.push(KeyEntry { purpose: KeyPurpose::Ticket, key: next.peer_id(), state: KeyState::Active });
    let set = Signed::sign(&KeySet { version: 2, ..set }, &world.office.root);
    let news = codec::encode(&News::KeySet(set));
    eventually("a mesh", || async { handle.publish(&topic, news.clone()).await.ok() }).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::KeyRetired);
    assert_eq!(client.show(&at, &ticket).await.refusal().await.code, RefusalCode::KeyRetired);

    // The sale is the same one, by the old key; the lease is by the new.
    let lease = Signed::sign(&ticket.lease.peek().unwrap(), &next);
    let (mut talk, welcome) = client.begin(&at, &Ticket { lease, ..ticket }).await;
    assert_eq!(welcome.ack.unwrap().peek().unwrap().chunks, ChunkSet::from_range(0..1));
    talk.want(1..2).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(1));
    stop(seeder).await;
}

#[tokio::test]
async fn an_epoch_that_is_another_than_the_one_held_is_a_fork_however_old_it_is() {
    let world = World::new(true).await;
    for n in 1..=3 {
        world.office.revoke(Revocations { contents: vec![ContentId::from_bytes([n; 16])], ..Revocations::default() });
    }
    let seeder = world.seeder("a", &[], |_| {}).await;
    let held = || async { (seeder.status().unwrap()["revocation_epoch"] == 3).then_some(()) };
    eventually("the epochs", held).await;
    let (handle, topic) = (&world.manager.handle, news_topic(&world.office.network));
    let _listening = handle.subscribe(&topic, 16).await.unwrap();
    let contents = vec![ContentId::from_bytes([9; 16])];
    let other = RevocationEpoch {
        network: world.office.network,
        number: 1,
        previous: None,
        at: now(),
        added: Revocations { contents, ..Revocations::default() },
    };
    let told = codec::encode(&News::Epoch(Signed::sign(&other, world.office.key(KeyPurpose::Revocation))));
    eventually("a mesh", || async { handle.publish(&topic, told.clone()).await.ok() }).await;
    let fork = || async { seeder.status().unwrap()["fork"].as_str().map(str::to_owned) };
    assert!(eventually("the fork being told", fork).await.contains("two different revocation epochs 1"));
    assert_eq!(seeder.status().unwrap()["revocation_epoch"], 3);
    stop(seeder).await;
}

#[tokio::test]
async fn news_that_cannot_be_taken_are_asked_for_with_pauses_and_reports_go_on() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let revoke = |n| {
        let contents = vec![ContentId::from_bytes([n; 16])];
        world.office.revoke(Revocations { contents, ..Revocations::default() });
    };
    (101..=102).for_each(revoke);
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    // The manager's disk went back, and nobody told it: others take the places of those that seeders hold.
    world.office.says.lock().unwrap().epochs.clear();
    (111..=113).for_each(revoke);
    let peer = seeder.peer_id();
    let counts = |heard: &crate::manager::Heard| (heard.asked_for_heartbeats, heard.counts[&peer]);
    let before = counts(&world.office.heard.lock().unwrap());
    world.manager.nudge(&seeder.peer_addrs()).await;
    let after = |heard: &crate::manager::Heard| Some(counts(heard)).filter(|(_, reports)| *reports >= before.1 + 8);
    let after = world.office.until("reports all the same", after).await;
    let (asked, reports) = (after.0 - before.0, after.1 - before.1);
    assert!((1..=reports + 1).contains(&asked), "{asked} questions with {reports} reports");
    let status = seeder.status().unwrap();
    assert_eq!((&status["revocation_epoch"], &status["serving"]), (&json!(2), &json!(true)), "{status}");
    assert!(status["trouble"]["manager"].is_string(), "{status}");
    stop(seeder).await;
}

#[tokio::test]
async fn what_the_manager_said_of_its_log_is_kept_and_a_log_that_goes_back_is_told() {
    let world = World::new(false).await;
    let head = |number, digest| Some(AuditHead { number, digest: Digest::from_bytes([digest; 32]) });
    world.office.says.lock().unwrap().audit = head(7, 7);
    let seeder = world.seeder("a", &[], |_| {}).await;
    let kept =
        || async { control(&world, "a", json!({"cmd": "heads"})).await["heads"].as_array().unwrap().first().cloned() };
    let first = eventually("the head", kept).await;
    assert_eq!((&first["number"], &first["digest"]), (&json!(7), &json!(Digest::from_bytes([7; 32]))), "{first}");
    assert!(first["heartbeat"].as_str().unwrap().len() > 200, "{first}");
    assert!(seeder.status().unwrap()["fork"].is_null());
    world.office.says.lock().unwrap().audit = head(5, 5);
    world.manager.nudge(&seeder.peer_addrs()).await;
    let fork = || async { seeder.status().unwrap()["fork"].as_str().map(str::to_owned) };
    assert!(eventually("the fork being told", fork).await.contains("went back from entry 7 to 5: "));
    stop(seeder).await;
}

#[tokio::test]
async fn a_clock_is_good_off_or_unknown_and_an_unreachable_manager_makes_it_neither() {
    let mut world = World::new(false).await;
    let goods = world.publish(1, 1);
    let address = world.manager.at.addrs[0].clone();
    let seeder = world.seeder("a", &[&goods], |config| config.call_ms = 500).await;
    let state = |seeder: &seeder::Running| seeder.status().unwrap()["clock"]["state"].as_str().unwrap().to_owned();
    assert_eq!(state(&seeder), "good");
    stop(seeder).await;

    // Nobody answers: nothing is known, and nothing is refused for it.
    world.manager.stop().await;
    let seeder = world.start("a").await;
    let tried = || async { seeder.status().unwrap()["trouble"]["manager"].as_str().map(str::to_owned) };
    eventually("a try", tried).await;
    assert_eq!(state(&seeder), "unknown");
    let client = Client::new(10).await;
    client.begin(&seeder.peer_addrs(), &world.ticket(&goods, client.peer(), seeder.peer_id())).await;

    // The manager is back, and by its clock this one is behind.
    world.office.says.lock().unwrap().clock_ahead_ms = 12 * 60_000;
    world.manager = crate::manager::Manager::start(&world.office, Some(address), false).await;
    let off = || async { (state(&seeder) == "off").then(|| seeder.status().unwrap()) };
    let status = eventually("the clock being compared", off).await;
    assert_eq!(status["clock"]["text"], "12 minutes behind", "{status}");
    assert!(status["clock"]["off_by_ms"].as_i64().unwrap() < -11 * 60_000, "{status}");
    assert!(status["trouble"]["clock"].as_str().unwrap().contains("made within that time"), "{status}");
    // Revocations are heard all the same.
    world.office.revoke(Revocations { contents: vec![goods.manifest.content], ..Revocations::default() });
    world.manager.nudge(&seeder.peer_addrs()).await;
    let gone = || async { seeder.status().unwrap()["contents"].as_array().unwrap().is_empty().then_some(()) };
    eventually("the takedown", gone).await;
    // The clock was set.
    world.office.says.lock().unwrap().clock_ahead_ms = 0;
    world.manager.nudge(&seeder.peer_addrs()).await;
    eventually("the clock being good again", || async { (state(&seeder) == "good").then_some(()) }).await;
    assert_eq!(seeder.status().unwrap()["trouble"]["clock"], Value::Null);
    stop(seeder).await;
}

#[tokio::test]
async fn what_the_operator_denies_is_cut_off_purged_and_looks_as_if_it_had_never_been_here() {
    let world = World::new(false).await;
    let (goods, other) = (world.publish(1, 40), world.publish(2, 1));
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods, &other], |_| {}).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    let id = goods.manifest.content;
    let denied = control(&world, "a", json!({"cmd": "deny", "add": goods.digest()})).await;
    assert_eq!((&denied["added"], &denied["configured"]), (&json!([id]), &json!([])), "{denied}");
    assert_eq!(talk.refusal().await.code, RefusalCode::ContentNotHeld);
    let left = || async {
        let status = seeder.status().unwrap();
        let left: Vec<Value> = status["contents"].as_array().unwrap().iter().map(|c| c["content"].clone()).collect();
        (left == [json!(other.manifest.content)]).then_some(())
    };
    eventually("the purge", left).await;
    let mut refused = client.open(&at).await;
    refused.hello(&ticket).await;
    assert_eq!(refused.refusal().await.code, RefusalCode::ContentNotHeld);
    let peer = at.peer;
    let told = world.office.until("a report without it", |heard| {
        heard.reports.get(&peer).filter(|report| report.held == [other.digest()]).cloned()
    });
    told.await;
    stop(seeder).await;

    // It is kept; and can be taken back.
    let seeder = world.start("a").await;
    assert_eq!(control(&world, "a", json!({"cmd": "deny"})).await["added"], json!([id]));
    let removed = control(&world, "a", json!({"cmd": "deny", "remove": id})).await;
    assert_eq!((&removed["added"], &removed["changed"]), (&json!([]), &json!(true)));
    let unknown = node::control_call(&world.path("a"), &json!({"cmd": "deny", "add": "x"}), |_| {}).await;
    assert!(unknown.unwrap_err().to_string().contains("neither a content id"));
    stop(seeder).await;
}

#[tokio::test]
async fn the_manager_is_told_of_what_it_ordered_and_the_operator_denies_for_as_long_as_it_is_denied() {
    let world = World::new(false).await;
    let (goods, other) = (world.publish(1, 1), world.publish(2, 1));
    let seeder = world.seeder("a", &[&other], |_| {}).await;
    let (peer, at, id) = (seeder.peer_id(), seeder.peer_addrs(), goods.manifest.content);
    control(&world, "a", json!({"cmd": "deny", "add": id})).await;
    let unwanted = |heard: &crate::manager::Heard| heard.reports.get(&peer).map(|report| report.unwanted.clone());
    let placements = vec![world.placement(&goods, peer, &[])];
    world.office.says.lock().unwrap().placements.insert(peer, placements);
    world.manager.nudge(&at).await;
    world.office.until("it being told", |heard| unwanted(heard).filter(|said| *said == [goods.digest()])).await;
    // Also in the next one, which finds nothing ordered any more.
    world.office.says.lock().unwrap().placements.clear();
    let reports = |heard: &crate::manager::Heard| heard.counts[&peer];
    let before = reports(&world.office.heard.lock().unwrap());
    world.manager.nudge(&at).await;
    world.office.until("one more report", |heard| (reports(heard) > before).then_some(())).await;
    assert_eq!(unwanted(&world.office.heard.lock().unwrap()), Some(vec![goods.digest()]));
    // It is denied no more, and said without being asked.
    control(&world, "a", json!({"cmd": "deny", "remove": id})).await;
    world.office.until("nothing unwanted", |heard| unwanted(heard).filter(Vec::is_empty)).await;
    stop(seeder).await;
}

#[tokio::test]
async fn neighbours_that_pass_on_what_newer_keys_are_needed_for_are_still_listened_to() {
    let world = World::new(true).await;
    let seeder = world.seeder("a", &[], |_| {}).await;
    let handle = &world.manager.handle;
    let (network, set) = (world.office.network, world.office.key_set().peek().unwrap());
    let other = Keypair::from_seed(&[77; 32]);
    let topics = [news_topic(&network), receipts_topic(&network, &other.peer_id(), set.gossip_shards)];
    let mut listening = Vec::new();
    for topic in &topics {
        listening.push(handle.subscribe(topic, 16).await.unwrap());
    }
    let publish = async |topic: &str, data: Vec<u8>| {
        eventually("a mesh", || async { handle.publish(topic, data.clone()).await.ok() }).await;
    };
    // Sealed to the key of the next key set, as by those who have it already: more than what puts a neighbour out.
    for number in 1..=10 {
        let incarnation = Nonce::from_bytes([number; 16]);
        let place = OutboxPlace { network, incarnation, number: 1, previous: Digest::from_bytes([0; 32]) };
        let (empty, next) = (ReceiptBatch { receipts: Vec::new() }, Keypair::from_seed(&[230; 32]).peer_id());
        let batch = SealedBatch::seal(&empty, &place, &other, next, now(), &mut rand::rng()).unwrap();
        let certificate = world.office.certificate(other.peer_id());
        publish(&topics[1], codec::encode(&GossipedBatch { certificate, batch })).await;
    }
    // Whoever asks this manager gets the first key set: this one is heard by gossip or not at all.
    let newer = Signed::sign(&KeySet { version: 2, ..set }, &world.office.root);
    publish(&topics[0], codec::encode(&News::KeySet(newer))).await;
    let there = || async { (seeder.status().unwrap()["key_set_version"] == 2).then_some(()) };
    eventually("the newer key set", there).await;
    stop(seeder).await;
}
