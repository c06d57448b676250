//! Content at seeders: copies that are ordered, damage that is found, and content that has to go.

use std::fs;
use std::os::unix::fs::FileExt;

use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::trust::Revocations;
use protocol::{ContentId, RefusalCode};

use crate::client::Client;
use crate::world::{CHUNK, Goods, World, eventually, stop};

async fn holds(world: &World, seeder: &seeder::Running, goods: &Goods, wanted: bool) {
    let (peer, digest) = (seeder.peer_id(), goods.digest());
    let before = world.office.heard.lock().unwrap().counts.get(&peer).copied().unwrap_or(0);
    world
        .office
        .until("a report of what is held", |heard| {
            let fresh = heard.counts.get(&peer).is_some_and(|count| *count > before);
            let report = heard.reports.get(&peer)?;
            (report.held.contains(&digest) == wanted && fresh).then_some(())
        })
        .await;
}

#[tokio::test]
async fn an_ordered_copy_is_made_served_and_taken_down_again() {
    let world = World::new(false).await;
    let goods = world.publish(1, 40);
    let client = Client::new(10).await;
    let source = world.seeder("a", &[&goods], |_| {}).await;
    let copy = world.seeder("b", &[], |_| {}).await;
    let placement = world.placement(&goods, copy.peer_id(), &[source.peer_addrs()]);
    world.office.says.lock().unwrap().placements.insert(copy.peer_id(), vec![placement]);
    world.manager.nudge(&copy.peer_addrs()).await;
    holds(&world, &copy, &goods, true).await;

    let at = copy.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(39..40).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(39));
    // The source has receipts for the copy, signed by the seeder that made it.
    world
        .office
        .until("receipts of the copy", |heard| {
            let acks = heard.receipts.iter().filter(|r| r.ack.signer() == at.peer).filter_map(|r| r.ack.peek().ok());
            acks.into_iter().find(|ack| ack.chunks.len() == 40 && ack.seeder == source.peer_id()).map(|_| ())
        })
        .await;

    world.office.says.lock().unwrap().placements.clear();
    world.office.revoke(Revocations { contents: vec![ContentId::from_bytes([1; 16])], ..Revocations::default() });
    world.manager.nudge(&at).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::Revoked);
    holds(&world, &copy, &goods, false).await;
    eventually("the removal", || async { copy.contents().get(&goods.digest()).is_none().then_some(()) }).await;
    stop(copy).await;
    stop(source).await;
}

#[tokio::test]
async fn a_damaged_chunk_is_never_served_and_is_made_whole_from_others() {
    let world = World::new(false).await;
    let goods = world.publish(1, 6);
    let client = Client::new(10).await;
    let whole = world.seeder("a", &[&goods], |_| {}).await;
    let config = world.set_up("b", &[&goods], |_| {});
    let data = config.content_path(&world.path("b")).join(goods.digest().to_string()).join("content");
    let file = fs::OpenOptions::new().write(true).open(&data).unwrap();
    file.write_all_at(&[goods.chunk(3)[5] ^ 1], 3 * CHUNK as u64 + 5).unwrap();
    let hurt = world.start("b").await;
    holds(&world, &hurt, &goods, true).await;

    let at = hurt.peer_addrs();
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(3..4).await;
    let refusal = talk.refusal().await;
    // The others are still to be had.
    assert!(refusal.code == RefusalCode::ContentNotHeld && refusal.retry_after_ms > 0, "{refusal:?}");
    holds(&world, &hurt, &goods, false).await;
    let (_, welcome) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    assert!(!welcome.held.contains(3) && welcome.held.len() == 5, "{welcome:?}");

    let placement = world.placement(&goods, at.peer, &[whole.peer_addrs()]);
    world.office.says.lock().unwrap().placements.insert(at.peer, vec![placement]);
    world.manager.nudge(&at).await;
    holds(&world, &hurt, &goods, true).await;
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(3..4).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(3));

    let file = fs::OpenOptions::new().write(true).open(&data).unwrap();
    file.write_all_at(&[goods.chunk(1)[0] ^ 1], CHUNK as u64).unwrap();
    world.office.says.lock().unwrap().placements.clear();
    let request = serde_json::json!({ "cmd": "scrub" });
    let scrubbed = node::control_call(&world.path("b"), &request, |_| {}).await.unwrap();
    let found = &scrubbed["contents"][0];
    assert_eq!((&found["damaged"], &found["damaged_chunks"]), (&"1".into(), &1.into()), "{scrubbed}");
    assert_eq!((&found["whole"], &found["state"]), (&false.into(), &"to be repaired".into()), "{scrubbed}");
    assert_eq!(scrubbed["damaged_chunks"], 1, "{scrubbed}");
    assert_eq!(hurt.status().unwrap()["damaged_chunks"], 2, "the one that was found when it was asked for, and this");
    holds(&world, &hurt, &goods, false).await;
    // Found before, and not fetched again yet.
    let again = node::control_call(&world.path("b"), &request, |_| {}).await.unwrap();
    assert_eq!((&again["damaged_chunks"], &again["contents"][0]["state"]), (&0.into(), &"not complete yet".into()));
    assert!(again["says"].as_str().unwrap().contains("1 of 1 contents are not complete"), "{again}");
    // Nobody has ordered it yet, so nobody is said to fetch it.
    for said in [&scrubbed, &again] {
        let says = said["says"].as_str().unwrap();
        assert!(
            says.ends_with("the manager is told of it now, and orders what is missing from other seeders"),
            "{says}"
        );
    }
    stop(hurt).await;
    stop(whole).await;
}

#[tokio::test]
async fn a_chunk_damaged_after_it_was_sent_is_not_sent_again_and_the_rest_is_looked_at() {
    let world = World::new(false).await;
    let goods = world.publish(1, 6);
    let client = Client::new(10).await;
    let hurt = world.seeder("a", &[&goods], |_| {}).await;
    holds(&world, &hurt, &goods, true).await;
    let at = hurt.peer_addrs();
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(0..1).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(0));

    let content = hurt.contents().get(&goods.digest()).unwrap();
    let file = fs::OpenOptions::new().write(true).open(content.folder().join("content")).unwrap();
    for chunk in [0, 2, 5] {
        file.write_all_at(&[goods.chunk(chunk)[7] ^ 1], u64::from(chunk) * CHUNK as u64 + 7).unwrap();
    }
    let another = Client::new(11).await;
    let (mut talk, _) = another.begin(&at, &world.ticket(&goods, another.peer(), at.peer)).await;
    talk.want(0..1).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::ContentNotHeld);
    // Nobody asked for the others yet: the seeder looks for itself.
    eventually("the scrub", || async { (content.have().len() == 3).then_some(()) }).await;
    assert!([1, 3, 4].iter().all(|chunk| content.has(*chunk)));
    eventually("the count", || async { (hurt.status().unwrap()["damaged_chunks"] == 3).then_some(()) }).await;
    holds(&world, &hurt, &goods, false).await;
    stop(hurt).await;
}

#[tokio::test]
async fn damage_that_the_disk_takes_no_note_of_is_not_promised_again() {
    let world = World::new(false).await;
    let goods = world.publish(1, 3);
    let client = Client::new(10).await;
    let hurt = world.seeder("a", &[&goods], |_| {}).await;
    let at = hurt.peer_addrs();
    let content = hurt.contents().get(&goods.digest()).unwrap();
    // In the place of the file that the note is to be written to.
    fs::create_dir(content.folder().join("have.new")).unwrap();
    let file = fs::OpenOptions::new().write(true).open(content.folder().join("content")).unwrap();
    file.write_all_at(&[goods.chunk(1)[7] ^ 1], CHUNK as u64 + 7).unwrap();
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(1..2).await;
    let refusal = talk.refusal().await;
    assert!(refusal.code == RefusalCode::ContentNotHeld && refusal.retry_after_ms > 0, "{refusal:?}");
    holds(&world, &hurt, &goods, false).await;
    let (mut talk, welcome) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    assert!(!welcome.held.contains(1) && welcome.held.len() == 2, "{welcome:?}");
    talk.want(2..3).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(2));
    stop(hurt).await;
}

#[tokio::test]
async fn a_scrub_looks_at_the_disk_and_not_at_files_that_are_open_and_gone() {
    let world = World::new(false).await;
    let goods = world.publish(1, 300);
    let whole = world.seeder("a", &[&goods], |_| {}).await;
    let hurt = world.seeder("b", &[&goods], |_| {}).await;
    let (peer, content) = (hurt.peer_id(), hurt.contents().get(&goods.digest()).unwrap());
    let data = content.folder().join("content");
    let request = serde_json::json!({ "cmd": "scrub" });
    let scrub = async || node::control_call(&world.path("b"), &request, |_| {}).await.unwrap();
    let sound = scrub().await;
    let found = &sound["contents"][0];
    assert_eq!((&found["checked"], &found["damaged"], &found["whole"]), (&300.into(), &"".into(), &true.into()));

    // Another file in its place, as a copy that somebody restored.
    let mut bytes = fs::read(&data).unwrap();
    for chunk in [4, 100, 101, 102, 299] {
        bytes[chunk * CHUNK] ^= 1;
    }
    fs::write(data.with_extension("new"), &bytes).unwrap();
    fs::rename(data.with_extension("new"), &data).unwrap();
    let replaced = scrub().await;
    let found = &replaced["contents"][0];
    assert_eq!(found["damaged"], "4, 100 to 102, 299", "{replaced}");
    assert_eq!((&found["damaged_chunks"], &found["whole"]), (&5.into(), &false.into()), "{replaced}");

    // Deleted behind its back: it is fetched anew, as one that never was here.
    fs::remove_dir_all(content.folder()).unwrap();
    drop(content);
    let gone = scrub().await;
    let found = &gone["contents"][0];
    assert_eq!((&found["damaged_chunks"], &found["whole"]), (&295.into(), &false.into()), "{gone}");
    assert_eq!(hurt.status().unwrap()["damaged_chunks"], 300, "{gone}");
    holds(&world, &hurt, &goods, false).await;
    let placement = world.placement(&goods, peer, &[whole.peer_addrs()]);
    world.office.says.lock().unwrap().placements.insert(peer, vec![placement]);
    world.manager.nudge(&hurt.peer_addrs()).await;
    holds(&world, &hurt, &goods, true).await;
    assert!(data.exists());
    let sound = scrub().await;
    assert_eq!((&sound["damaged_chunks"], &sound["contents"][0]["whole"]), (&0.into(), &true.into()), "{sound}");
    stop(hurt).await;
    stop(whole).await;
}

#[tokio::test]
async fn a_damaged_manifest_is_named_by_a_scrub_and_costs_the_content_neither_now_nor_after_a_restart() {
    let world = World::new(false).await;
    let goods = world.publish(1, 6);
    let client = Client::new(10).await;
    let hurt = world.seeder("a", &[&goods], |_| {}).await;
    let request = serde_json::json!({ "cmd": "scrub" });
    let scrub = async || node::control_call(&world.path("a"), &request, |_| {}).await.unwrap();
    let folder = hurt.contents().get(&goods.digest()).unwrap().folder().to_owned();
    let manifest = folder.join("manifest");
    let sound = fs::read(&manifest).unwrap();
    let damage = || {
        let file = fs::OpenOptions::new().write(true).open(&manifest).unwrap();
        file.write_all_at(b"garbage!", 50).unwrap();
    };
    damage();
    let scrubbed = scrub().await;
    let found = &scrubbed["contents"][0];
    assert_eq!((&found["damaged_files"], &found["damaged_chunks"]), (&"manifest".into(), &0.into()), "{scrubbed}");
    assert_eq!((&scrubbed["damaged_files"], &found["whole"]), (&1.into(), &true.into()), "{scrubbed}");
    assert_eq!(fs::read(&manifest).unwrap(), sound);
    assert_eq!(scrub().await["damaged_files"], 0);
    stop(hurt).await;

    // Nobody knows the manifest now but the manager, which is away for a while; and one chunk is damaged, too.
    damage();
    let data = fs::OpenOptions::new().write(true).open(folder.join("content")).unwrap();
    data.write_all_at(&[goods.chunk(3)[5] ^ 1], 3 * CHUNK as u64 + 5).unwrap();
    world.office.says.lock().unwrap().refuses = true;
    let hurt = world.start("a").await;
    let status = hurt.status().unwrap();
    let told = status["damaged_contents"][0].as_str().unwrap();
    assert!(told.contains("manifest is damaged") && told.contains("seeder scrub"), "{told}");
    let used = status["used_bytes"].as_u64().unwrap();
    assert!(used >= goods.bytes.len() as u64, "{used} bytes lie there");
    let scrubbed = scrub().await;
    let found = &scrubbed["contents"][0];
    assert_eq!((&found["damaged_files"], &found["whole"]), (&"manifest".into(), &false.into()), "{scrubbed}");
    assert!(found["state"].as_str().unwrap().contains("cannot be used, and is tried again"), "{scrubbed}");
    assert!(scrubbed["says"].as_str().unwrap().contains("cannot be used for that, see their states: 1"), "{scrubbed}");
    let trouble = hurt.status().unwrap()["trouble"]["storage"].as_str().map(str::to_owned);
    assert!(trouble.is_some_and(|trouble| trouble.contains("manifest is damaged")), "{scrubbed}");
    let peer = hurt.peer_id();
    world.office.says.lock().unwrap().refuses = false;
    // The manager hears of it, and orders what is missing.
    let digest = goods.digest();
    world
        .office
        .until("a report of the damage", |heard| {
            heard.reports.get(&peer).filter(|report| report.damaged.contains(&digest)).map(|_| ())
        })
        .await;
    let whole = world.seeder("b", &[&goods], |_| {}).await;
    let placement = world.placement(&goods, peer, &[whole.peer_addrs()]);
    world.office.says.lock().unwrap().placements.insert(peer, vec![placement]);
    world.manager.nudge(&hurt.peer_addrs()).await;
    holds(&world, &hurt, &goods, true).await;
    assert_eq!(hurt.status().unwrap()["replicated_bytes"], CHUNK, "what was good is kept");
    assert_eq!(hurt.status().unwrap()["damaged_contents"], serde_json::json!([]));
    let at = hurt.peer_addrs();
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(3..4).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(3));
    let scrubbed = scrub().await;
    assert_eq!((&scrubbed["damaged_files"], &scrubbed["damaged_chunks"]), (&0.into(), &0.into()), "{scrubbed}");
    stop(hurt).await;
    stop(whole).await;
}

#[tokio::test]
async fn a_damaged_content_is_made_good_at_the_start_or_removed_where_nobody_knows_it() {
    let world = World::new(false).await;
    let (goods, gone) = (world.publish(1, 3), world.publish(2, 2));
    let seeder = world.seeder("a", &[&goods, &gone], |_| {}).await;
    let root = seeder.contents().root().to_owned();
    stop(seeder).await;
    for content in [&goods, &gone] {
        fs::write(root.join(content.digest().to_string()).join("manifest"), b"nonsense").unwrap();
    }
    world.office.says.lock().unwrap().manifests.remove(&gone.digest());
    let seeder = world.start("a").await;
    holds(&world, &seeder, &goods, true).await;
    eventually("the removal", || async { seeder.contents().damaged().is_empty().then_some(()) }).await;
    assert!(!root.join(gone.digest().to_string()).exists());
    let status = seeder.status().unwrap();
    assert_eq!((&status["used_bytes"], &status["replicated_bytes"]), (&goods.bytes.len().into(), &0.into()));
    stop(seeder).await;
}

#[tokio::test]
async fn a_damaged_list_of_chaining_values_costs_no_chunk() {
    let world = World::new(false).await;
    let goods = world.publish(1, 300);
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let request = serde_json::json!({ "cmd": "scrub" });
    let scrub = async || node::control_call(&world.path("a"), &request, |_| {}).await.unwrap();
    let segments = seeder.contents().get(&goods.digest()).unwrap().folder().join("segments");
    let sound = fs::read(&segments).unwrap();
    // Once with the list in memory, once as a process that never saw it whole.
    let mut seeder = Some(seeder);
    for restarted in [false, true] {
        if restarted {
            stop(seeder.take().unwrap()).await;
        }
        let file = fs::OpenOptions::new().write(true).open(&segments).unwrap();
        file.write_all_at(b"garbage!", 5000).unwrap();
        if restarted {
            seeder = Some(world.start("a").await);
        }
        let scrubbed = scrub().await;
        let found = &scrubbed["contents"][0];
        assert_eq!((&found["damaged_files"], &found["damaged_chunks"]), (&"segments".into(), &0.into()), "{scrubbed}");
        assert_eq!((&found["whole"], &scrubbed["damaged_files"]), (&true.into(), &1.into()), "{scrubbed}");
        assert_eq!(fs::read(&segments).unwrap(), sound);
        let again = scrub().await;
        assert_eq!((&again["damaged_files"], &again["contents"][0]["state"]), (&0.into(), &"good".into()), "{again}");
    }
    stop(seeder.take().unwrap()).await;

    // Nobody scrubs: what it is first asked for is served.
    let file = fs::OpenOptions::new().write(true).open(&segments).unwrap();
    file.write_all_at(b"garbage!", 5000).unwrap();
    let seeder = world.start("a").await;
    holds(&world, &seeder, &goods, true).await;
    let (at, client) = (seeder.peer_addrs(), Client::new(10).await);
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(156..157).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(156));
    assert_eq!(fs::read(&segments).unwrap(), sound);
    assert_eq!(seeder.status().unwrap()["damaged_chunks"], 0);
    holds(&world, &seeder, &goods, true).await;
    stop(seeder).await;
}

/// All tasks of this test share one thread, as all of a seeder's do on a small machine.
#[tokio::test]
async fn chaining_values_that_the_disk_is_slow_with_hold_up_their_own_deliveries_only() {
    let world = World::new(false).await;
    let (slow, goods) = (world.publish(1, 2), world.publish(2, 2));
    let seeder = world.seeder("a", &[&slow, &goods], |_| {}).await;
    let segments = seeder.contents().get(&slow.digest()).unwrap().folder().join("segments");
    stop(seeder).await;
    // Whoever opens it waits until somebody writes to it.
    fs::remove_file(&segments).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&segments).status().unwrap().success());
    let seeder = world.start("a").await;
    holds(&world, &seeder, &goods, true).await;
    let (at, client) = (seeder.peer_addrs(), Client::new(10).await);
    let (mut waits, _) = client.begin(&at, &world.ticket(&slow, client.peer(), at.peer)).await;
    waits.say(ClientMessage::Meta { segment: Some(0) }).await;
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.say(ClientMessage::Meta { segment: Some(0) }).await;
    let heard = talk.hear().await;
    assert!(matches!(heard, Some(SeederMessage::Segment { index: 0, .. })), "{heard:?}");
    talk.want(1..2).await;
    assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(1));
    // The disk answers that it cannot.
    let write = move || drop(fs::OpenOptions::new().write(true).open(&segments).unwrap());
    tokio::task::spawn_blocking(write).await.unwrap();
    assert_eq!(waits.refusal().await.code, RefusalCode::Internal);
    stop(seeder).await;
}

#[tokio::test]
async fn a_seeder_that_offers_nothing_is_not_set_up() {
    let world = World::new(false).await;
    let config = seeder::Config::new(&world.join(), "a", 0);
    let error = seeder::init_with(&world.path("a"), &config).unwrap_err().to_string();
    assert_eq!(error, "capacity must not be 0: say how much disk space is offered, such as 500GB");
    assert!(!world.path("a").exists());
}

/// One place for copies, and an order that comes first each time and finds no source.
#[tokio::test]
async fn an_order_that_cannot_be_fulfilled_now_does_not_hold_up_the_others() {
    let world = World::new(false).await;
    let mut goods = [world.publish(1, 4), world.publish(2, 4)];
    goods.sort_by_key(Goods::digest);
    let [first, second] = &goods;
    let source = world.seeder("a", &[second], |_| {}).await;
    let tweak = |config: &mut seeder::Config| (config.replications, config.replication_patience_ms) = (1, 500);
    let copy = world.seeder("b", &[], tweak).await;
    let orders = goods.iter().map(|goods| world.placement(goods, copy.peer_id(), &[source.peer_addrs()])).collect();
    world.office.says.lock().unwrap().placements.insert(copy.peer_id(), orders);
    world.manager.nudge(&copy.peer_addrs()).await;
    holds(&world, &copy, second, true).await;
    assert!(!copy.contents().get(&first.digest()).is_some_and(|content| content.is_complete()));
    stop(copy).await;
    stop(source).await;
}

#[tokio::test]
async fn what_does_not_fit_is_not_fetched_and_the_reason_is_told() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let source = world.seeder("a", &[&goods], |_| {}).await;
    let small = world.seeder("b", &[], |config| config.capacity = 3 * CHUNK as u64).await;
    let placement = world.placement(&goods, small.peer_id(), &[source.peer_addrs()]);
    world.office.says.lock().unwrap().placements.insert(small.peer_id(), vec![placement]);
    world.manager.nudge(&small.peer_addrs()).await;
    let reason = eventually("the reason", || async {
        small.status().unwrap()["trouble"]["storage"].as_str().map(str::to_owned)
    })
    .await;
    assert!(reason.contains(&goods.bytes.len().to_string()) && reason.contains("content"), "{reason}");
    assert!(small.contents().list().is_empty());
    let heard = world.office.heard.lock().unwrap().reports.get(&small.peer_id()).map(|report| report.capacity);
    assert_eq!(heard, Some(3 * CHUNK as u64), "what the configuration says now is what the manager hears");
    stop(small).await;
    stop(source).await;
}

#[tokio::test]
async fn a_store_that_is_shared_is_reported_as_soon_as_it_is_published_into() {
    let world = World::new(false).await;
    let goods = world.publish(1, 2);
    let config = world.set_up("origin", &[], |config| config.report_ms = 600_000);
    let dir = world.path("origin");
    let store = delivery::ContentStore::open(config.content_path(&dir)).unwrap();
    let origin = seeder::start_sharing(&dir, config, store.clone()).await.unwrap();
    let peer = origin.peer_id();
    world.office.until("the first report", |heard| heard.reports.get(&peer).map(|_| ())).await;
    goods.store(&store);
    origin.report_now();
    holds(&world, &origin, &goods, true).await;
    stop(origin).await;
}

#[tokio::test]
async fn a_directory_holds_one_node_and_one_process() {
    let world = World::new(false).await;
    let config = world.set_up("a", &[], |_| {});
    let error = seeder::init_with(&world.path("a"), &config).unwrap_err().to_string();
    assert!(error.contains("already holds a node; use run, or choose another --dir"), "{error}");
    let running = world.start("a").await;
    let error = seeder::start(&world.path("a"), config).await.unwrap_err().to_string();
    assert!(error.contains("in use by process"), "{error}");
    let ports = running.addresses();
    stop(running).await;
    let again = world.start("a").await;
    assert_eq!(again.addresses(), ports, "the port that the system chose is kept");
    stop(again).await;
}
