//! Letting go: of content when the disk fills up, and of everything when the seeder leaves. Never of what somebody is being
//! served, and never of what the manager did not let go.

use std::sync::Arc;
use std::time::Duration;

use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::{ChunkSet, RefusalCode};
use serde_json::{Value, json};

use crate::client::Client;
use crate::world::{CHUNK, Goods, World, eventually, now, stop};

fn lets_go(world: &World, goods: &[&Goods]) {
    world.office.says.lock().unwrap().lets_go.extend(goods.iter().map(|goods| goods.digest()));
}

async fn ask(world: &World, request: Value) -> Value {
    node::control_call(&world.path("a"), &request, |_| {}).await.unwrap()
}

#[tokio::test]
async fn above_the_high_water_mark_only_what_nobody_needs_goes_and_the_longest_unserved_first() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=5).map(|seed| world.publish(seed, 4)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let [idle, asked_lately, being_served, leased, last_copy] = all[..] else { unreachable!() };
    let (one, two) = (Client::new(10).await, Client::new(11).await);
    let seeder = world
        .seeder("a", &all, |config| {
            // Five contents of four chunks are 100%: above the high mark, and three of them have to go.
            config.capacity = 20 * CHUNK as u64;
            (config.high_water_percent, config.low_water_percent) = (90, 40);
            config.gc_ms = 600_000;
            // What was acknowledged is over for this test as soon as its lease is.
            config.continuation_ms = 0;
        })
        .await;
    let at = seeder.peer_addrs();
    let holds = |goods: &Goods| seeder.contents().get(&goods.digest()).is_some();

    // One delivery under way, with a lease that is over: what keeps the content is that it is being served.
    let mut terms = world.terms(being_served, one.peer(), at.peer);
    terms.end = terms.start + 500;
    let (mut talk, _) = one.begin(&at, &world.make(terms)).await;
    // One client that was here and is away, with a lease that is not over.
    let ticket = world.ticket(leased, two.peer(), at.peer);
    let (mut away, _) = two.begin(&at, &ticket).await;
    away.want(0..1).await;
    away.chunk().await.unwrap();
    away.say(ClientMessage::Ack(two.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..1)))).await;
    world.office.until("its receipt", |heard| (!heard.receipts.is_empty()).then_some(())).await;
    drop(away);
    // One that was asked for, and whose lease was over then.
    let mut terms = world.terms(asked_lately, two.peer(), at.peer);
    terms.end = terms.start + 500;
    drop(two.begin(&at, &world.make(terms)).await);
    eventually("one delivery", || async { (seeder.status().unwrap()["deliveries"] == 1).then_some(()) }).await;

    lets_go(&world, &[idle, asked_lately, being_served, leased]);
    // A content that somebody looks at in this moment is passed over until the next collection, and a lease that is
    // not over yet keeps its content: so it is asked for again until the two are gone.
    eventually("the two that nobody needs gone", || async {
        ask(&world, json!({ "cmd": "collect" })).await;
        (!holds(idle) && !holds(asked_lately)).then_some(())
    })
    .await;
    assert_eq!([holds(being_served), holds(leased), holds(last_copy)], [true, true, true]);
    // Only what could not go for want of copies was to be copied elsewhere.
    let asked = world.office.heard.lock().unwrap().releases.clone();
    let mut moved = asked.iter().filter(|(_, hand_over)| *hand_over).flat_map(|(which, _)| which);
    assert!(moved.all(|digest| *digest == last_copy.digest()));
    for (which, _) in &asked {
        let place = |goods: &Goods| which.iter().position(|digest| *digest == goods.digest());
        if let (Some(idle), Some(lately)) = (place(idle), place(asked_lately)) {
            assert!(idle < lately, "the longest unserved first");
        }
        assert_eq!((place(being_served), place(leased)), (None, None), "nobody is asked for what stays");
    }
    // The delivery goes on to its end.
    talk.want(0..2).await;
    assert_eq!(talk.chunk().await.unwrap().1, being_served.chunk(0));

    // Between the marks nothing more goes, whatever may.
    lets_go(&world, &[last_copy]);
    ask(&world, json!({ "cmd": "collect" })).await;
    eventually("no trouble", || async { seeder.status().unwrap()["trouble"]["quota"].is_null().then_some(()) }).await;
    assert!(holds(last_copy));
    assert_eq!(seeder.status().unwrap()["quota"]["used_inodes"], 3 * 6);
    stop(seeder).await;
}

#[tokio::test]
async fn the_longest_unserved_goes_first_after_a_restart_too() {
    let world = World::new(false).await;
    let mut goods: Vec<Goods> = (1..=4).map(|seed| world.publish(seed, 2)).collect();
    // Served in the other order than that of their names.
    goods.sort_by_key(|goods| std::cmp::Reverse(goods.digest()));
    let all: Vec<&Goods> = goods.iter().collect();
    let client = Client::new(10).await;
    let seeder = world
        .seeder("a", &all, |config| {
            config.capacity = 8 * CHUNK as u64;
            (config.gc_ms, config.continuation_ms) = (600_000, 0);
        })
        .await;
    let at = seeder.peer_addrs();
    for goods in &all {
        let mut terms = world.terms(goods, client.peer(), at.peer);
        terms.end = terms.start + 500;
        let (mut talk, _) = client.begin(&at, &world.make(terms)).await;
        talk.want(0..1).await;
        talk.chunk().await.unwrap();
        let served = now();
        eventually("the next millisecond", || async { (now() > served).then_some(()) }).await;
    }
    stop(seeder).await;
    let seeder = world.start("a").await;
    let order: Vec<_> = all.iter().map(|goods| goods.digest()).collect();
    // What somebody looks at in this moment is not asked about.
    eventually("the question", || async {
        ask(&world, json!({ "cmd": "collect" })).await;
        let asked = world.office.heard.lock().unwrap().releases.clone();
        let (first, _) = asked.iter().find(|(which, _)| which.len() == order.len())?;
        assert_eq!(*first, order);
        Some(())
    })
    .await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_quota_of_files_is_a_quota() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=3).map(|seed| world.publish(seed, 1)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let seeder = world
        .seeder("a", &all, |config| {
            config.max_inodes = 18;
            // Three contents are above the high mark, and two would be above the low one.
            (config.high_water_percent, config.low_water_percent) = (90, 40);
            config.gc_ms = 600_000;
        })
        .await;
    assert_eq!(seeder.status().unwrap()["free_bytes"], 0, "no room for one more file is no room");
    lets_go(&world, &all);
    ask(&world, json!({ "cmd": "collect" })).await;
    eventually("two gone", || async { (seeder.contents().list().len() == 1).then_some(()) }).await;
    eventually("room", || async { (seeder.status().unwrap()["free_bytes"] != 0).then_some(()) }).await;
    // For one content more, which is not to go at once; but only where it is needed.
    assert_eq!(seeder.status().unwrap()["spare_bytes"], 0);
    stop(seeder).await;
}

#[tokio::test]
async fn what_is_offered_ends_below_the_marks_and_an_order_lets_go_only_of_what_has_copies_enough() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=3).map(|seed| world.publish(seed, 4)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let [needed, elsewhere, ordered] = all[..] else { unreachable!() };
    let source = world.seeder("a", &[ordered], |_| {}).await;
    let chunk = CHUNK as u64;
    let seeder = world
        .seeder("b", &[needed, elsewhere], |config| {
            config.capacity = 10 * chunk;
            (config.high_water_percent, config.low_water_percent) = (91, 80);
            config.gc_ms = 600_000;
        })
        .await;
    let peer = seeder.peer_id();
    // Used are eight chunks, the last of each a little shorter: nearly as much as the low mark allows.
    let used = (needed.bytes.len() + elsewhere.bytes.len()) as u64;
    let told = |heard: &crate::manager::Heard| heard.reports.get(&peer).map(|report| (report.free, report.spare));
    let offered = world.office.until("its room", |heard| told(heard).filter(|_| heard.counts[&peer] > 0)).await;
    assert_eq!(
        offered,
        (9 * chunk - used, 8 * chunk - used),
        "up to one percent below the high mark, and to the low one"
    );

    let placement = world.placement(ordered, peer, &[source.peer_addrs()]);
    world.office.says.lock().unwrap().placements.insert(peer, vec![placement]);
    world.manager.nudge(&seeder.peer_addrs()).await;
    // It asks, and may not: nothing goes, and nothing is to be moved elsewhere for it.
    world.office.until("its question", |heard| (!heard.releases.is_empty()).then_some(())).await;
    assert_eq!(seeder.contents().list().len(), 2);
    // What did not help is not said at once again: ten reports on, it has not asked ten times.
    for _ in 0..10 {
        let before = world.office.heard.lock().unwrap().counts[&peer];
        world.manager.nudge(&seeder.peer_addrs()).await;
        world.office.until("one more report", |heard| (heard.counts[&peer] > before).then_some(())).await;
    }
    let asked = world.office.heard.lock().unwrap().releases.len();
    assert!(asked < 8, "{asked}");
    lets_go(&world, &[elsewhere]);
    eventually("the copy", || async {
        world.manager.nudge(&seeder.peer_addrs()).await;
        seeder.contents().get(&ordered.digest()).filter(|content| content.is_complete()).map(|_| ())
    })
    .await;
    let holds = |goods: &Goods| seeder.contents().get(&goods.digest()).is_some();
    assert_eq!([holds(needed), holds(elsewhere)], [true, false]);
    assert!(world.office.heard.lock().unwrap().releases.iter().all(|(_, hand_over)| !hand_over));
    assert!(seeder.status().unwrap()["trouble"]["quota"].is_null());
    stop(seeder).await;
    stop(source).await;
}

#[tokio::test]
async fn an_order_that_finds_no_room_is_asked_about_with_pauses() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=3).map(|seed| world.publish(seed, 4)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let seeder = world
        .seeder("b", &all[..2], |config| {
            config.capacity = 10 * CHUNK as u64;
            (config.high_water_percent, config.low_water_percent) = (91, 80);
            config.gc_ms = 600_000;
        })
        .await;
    let (peer, at) = (seeder.peer_id(), seeder.peer_addrs());
    world.office.says.lock().unwrap().placements.insert(peer, vec![world.placement(all[2], peer, &[])]);
    world.manager.nudge(&at).await;
    world.office.until("its question", |heard| (!heard.releases.is_empty()).then_some(())).await;
    let many = world.office.until("many more of them", |heard| (heard.releases.len() > 12).then_some(()));
    assert!(tokio::time::timeout(Duration::from_secs(3), many).await.is_err(), "a report and a question without end");
    assert_eq!(seeder.contents().list().len(), 2);
    stop(seeder).await;
}

#[tokio::test]
async fn what_is_to_be_moved_is_said_in_each_report_until_it_is_not_meant_any_more() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=2).map(|seed| world.publish(seed, 4)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let small = |config: &mut seeder::Config| {
        config.capacity = 8 * CHUNK as u64;
        (config.high_water_percent, config.low_water_percent) = (90, 60);
    };
    let seeder = world.seeder("a", &all, small).await;
    let peer = seeder.peer_id();
    let moving = |heard: &crate::manager::Heard| heard.reports.get(&peer).map(|report| report.moving.len());
    ask(&world, json!({ "cmd": "collect" })).await;
    world.office.until("what is to be moved", |heard| moving(heard).filter(|moving| *moving == 1)).await;
    let reports = |heard: &crate::manager::Heard| heard.counts[&peer];
    let before = reports(&world.office.heard.lock().unwrap());
    world.manager.nudge(&seeder.peer_addrs()).await;
    world.office.until("one more report", |heard| (reports(heard) > before).then_some(())).await;
    assert_eq!(moving(&world.office.heard.lock().unwrap()), Some(1));
    // Once it may go, it goes, and nothing is to be moved any more.
    lets_go(&world, &all[..]);
    ask(&world, json!({ "cmd": "collect" })).await;
    world.office.until("nothing to be moved", |heard| moving(heard).filter(|moving| *moving == 0)).await;
    stop(seeder).await;
}

#[tokio::test]
async fn what_was_let_go_of_is_not_held_by_a_report_that_comes_before_its_removal() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=2).map(|seed| world.publish(seed, 4)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let small = |config: &mut seeder::Config| {
        config.capacity = 8 * CHUNK as u64;
        (config.high_water_percent, config.low_water_percent) = (90, 1);
        (config.gc_ms, config.report_ms) = (600_000, 600_000);
    };
    let seeder = world.seeder("a", &all, small).await;
    let peer = seeder.peer_id();
    lets_go(&world, &all);
    let thinking = world.office.thinking.write().await;
    ask(&world, json!({ "cmd": "collect" })).await;
    world.office.until("its question", |heard| (heard.asked_to_release > 0).then_some(())).await;
    // Somebody looks at both, so that neither can be removed at once.
    let looked_at = seeder.contents().list();
    assert_eq!(looked_at.len(), 2);
    drop(thinking);
    let reports = |heard: &crate::manager::Heard| heard.counts.get(&peer).copied().unwrap_or(0);
    let before = |heard: &crate::manager::Heard| (!heard.releases.is_empty()).then(|| reports(heard));
    let before = world.office.until("the answer", before).await;
    world.manager.nudge(&seeder.peer_addrs()).await;
    let held = |heard: &crate::manager::Heard| heard.reports[&peer].held.len();
    let next = |heard: &crate::manager::Heard| (reports(heard) > before).then(|| held(heard));
    assert_eq!(world.office.until("the next report", next).await, 0, "others let go of theirs by what it says");
    // What stays after all is held again.
    world.office.until("both held", |heard| (held(heard) == 2).then_some(())).await;
    drop(looked_at);
    ask(&world, json!({ "cmd": "collect" })).await;
    eventually("both gone", || async { seeder.contents().list().is_empty().then_some(()) }).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_damaged_copy_does_not_go_unasked() {
    let world = World::new(false).await;
    let goods: Vec<Goods> = (1..=2).map(|seed| world.publish(seed, 4)).collect();
    let all: Vec<&Goods> = goods.iter().collect();
    let small = |config: &mut seeder::Config| {
        config.capacity = 8 * CHUNK as u64;
        (config.high_water_percent, config.low_water_percent) = (90, 60);
        config.gc_ms = 600_000;
    };
    let seeder = world.seeder("a", &all, small).await;
    let holds = |goods: &Goods| seeder.contents().get(&goods.digest()).is_some();
    world.office.says.lock().unwrap().refuses = true;
    let hurt = seeder.contents().get(&all[1].digest()).unwrap();
    hurt.forget(&ChunkSet::from_range(2..3)).unwrap();
    drop(hurt);
    let trouble = || async {
        ask(&world, json!({ "cmd": "collect" })).await;
        let status = seeder.status().unwrap();
        let trouble = status["trouble"]["quota"].as_str().unwrap_or_default().to_owned();
        trouble.contains("above the quota, and the manager refused").then_some(())
    };
    eventually("the trouble", trouble).await;
    assert_eq!([holds(all[0]), holds(all[1])], [true, true], "it may be the last copy");

    // With the manager's word it goes first.
    world.office.says.lock().unwrap().refuses = false;
    lets_go(&world, &all);
    eventually("it gone", || async {
        ask(&world, json!({ "cmd": "collect" })).await;
        (!holds(all[1])).then_some(())
    })
    .await;
    assert!(holds(all[0]));
    stop(seeder).await;
}

#[tokio::test]
async fn a_seeder_that_leaves_finishes_what_runs_hands_its_copies_over_and_takes_nobody_new() {
    let world = World::new(false).await;
    let (goods, other) = (world.publish(1, 4), world.publish(2, 2));
    let (one, two) = (Client::new(10).await, Client::new(11).await);
    let seeder = Arc::new(world.seeder("a", &[&goods, &other], |config| config.hello_ms = 600_000).await);
    let (at, dir) = (seeder.peer_addrs(), world.path("a"));
    let ticket = world.ticket(&goods, one.peer(), at.peer);
    let (mut talk, _) = one.begin(&at, &ticket).await;
    // Whoever says nothing holds nobody up.
    let stranger = Client::new(12).await;
    let _silent = stranger.open(&at).await;

    let (told, mut hears) = tokio::sync::mpsc::channel(64);
    let draining = tokio::spawn(async move {
        node::control_call(&dir, &json!({ "cmd": "drain" }), |facts| drop(told.try_send(facts))).await
    });
    let facts = hears.recv().await.unwrap();
    assert_eq!((&facts["deliveries"], &facts["contents"]), (&json!(1), &json!(2)), "{facts}");
    world.office.until("its wish", |heard| heard.releases.iter().find(|(_, hand_over)| *hand_over).map(|_| ())).await;
    let refusal = two.show(&at, &world.ticket(&goods, two.peer(), at.peer)).await.refusal().await;
    assert_eq!(refusal.code, RefusalCode::ShuttingDown);
    assert!(refusal.retry_after_ms > 0);
    let says = |heard: &crate::manager::Heard| heard.reports.get(&at.peer).map(|r| (r.leaving, r.free, r.spare));
    world.office.until("no room", |heard| says(heard).filter(|says| *says == (true, 0, 0))).await;

    // What runs goes on, although the manager let it all go meanwhile; what was let go is not reported any more.
    lets_go(&world, &[&goods, &other]);
    let held = |heard: &crate::manager::Heard| heard.reports.get(&at.peer).map(|report| report.held.len());
    world.office.until("nothing held", |heard| held(heard).filter(|held| *held == 0).map(|_| ())).await;
    assert!(!draining.is_finished());
    talk.want(0..2).await;
    for chunk in 0..2 {
        assert_eq!(talk.chunk().await.unwrap().1, goods.chunk(chunk));
    }
    // Over another stream, too, where the first one breaks: what came is still to be acknowledged.
    let (mut again, _) = one.begin(&at, &ticket).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::Superseded);
    let ack = one.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..2));
    again.say(ClientMessage::Finish { ack: Some(ack.clone()), completion: None }).await;
    let ended = draining.await.unwrap().unwrap();
    assert_eq!((&ended["drain"], &ended["complete"]), (&json!("drained"), &json!(true)), "{ended}");
    let receipts = world.office.heard.lock().unwrap().receipts.iter().filter(|receipt| receipt.ack == ack).count();
    assert_eq!(receipts, 1, "its receipt is with the manager");
    tokio::time::timeout(Duration::from_secs(5), seeder.drained()).await.unwrap();
    stop(Arc::into_inner(seeder).unwrap()).await;
}

#[tokio::test]
async fn a_seeder_that_leaves_waits_for_a_client_whose_stream_broke() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let (at, dir) = (seeder.peer_addrs(), world.path("a"));
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..1).await;
    talk.chunk().await.unwrap();
    lets_go(&world, &[&goods]);
    let mut draining = tokio::spawn(async move { node::control_call(&dir, &json!({ "cmd": "drain" }), |_| {}).await });
    let held = |heard: &crate::manager::Heard| heard.reports.get(&at.peer).map(|report| report.held.len());
    world.office.until("nothing held", |heard| held(heard).filter(|held| *held == 0).map(|_| ())).await;

    drop(talk);
    eventually("nobody served", || async { (seeder.status().unwrap()["deliveries"] == 0).then_some(()) }).await;
    // It looked several times by then whether anything is left.
    assert!(
        tokio::time::timeout(Duration::from_secs(1), &mut draining).await.is_err(),
        "gone before it could come back"
    );
    let (mut again, _) = client.begin(&at, &ticket).await;
    let ack = client.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..1));
    again.say(ClientMessage::Finish { ack: Some(ack), completion: None }).await;
    let ended = draining.await.unwrap().unwrap();
    assert_eq!((&ended["drain"], &ended["complete"]), (&json!("drained"), &json!(true)), "{ended}");
    stop(seeder).await;
}

#[tokio::test]
async fn a_client_that_comes_again_and_again_for_nothing_keeps_no_seeder_from_leaving() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let (at, dir) = (seeder.peer_addrs(), world.path("a"));
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..1).await;
    talk.chunk().await.unwrap();
    let draining = tokio::spawn(async move { node::control_call(&dir, &json!({ "cmd": "drain" }), |_| {}).await });
    eventually("leaving", || async { (seeder.status().unwrap()["quota"]["drain"] == "draining").then_some(()) }).await;
    // What is new lets it come on.
    let ack = client.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..1));
    talk.say(ClientMessage::Ack(ack)).await;
    talk.want(1..2).await;
    talk.chunk().await.unwrap();
    let mut came = 0;
    let mut before = talk;
    let refusal = loop {
        let mut next = client.show(&at, &ticket).await;
        match next.hear().await.unwrap() {
            SeederMessage::Welcome { .. } => came += 1,
            SeederMessage::Refusal(refusal) => break refusal,
            other => panic!("no welcome but {other:?}"),
        }
        assert!(came < 20, "it is let in for ever");
        before = next;
    };
    assert_eq!(refusal.code, RefusalCode::ShuttingDown);
    // The first of them ended the one that brought something, and one more is let in while the last is not over.
    assert_eq!(came, 9);
    drop(before);
    lets_go(&world, &[&goods]);
    let ended = draining.await.unwrap().unwrap();
    assert_eq!((&ended["drain"], &ended["complete"]), (&json!("drained"), &json!(true)), "{ended}");
    stop(seeder).await;
}

#[tokio::test]
async fn leaving_can_be_called_off_and_has_an_end_where_nobody_takes_the_copies() {
    let world = World::new(false).await;
    let goods = world.publish(1, 2);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let (at, dir) = (seeder.peer_addrs(), world.path("a"));
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let draining = tokio::spawn(async move { node::control_call(&dir, &json!({ "cmd": "drain" }), |_| {}).await });
    eventually("leaving", || async { (seeder.status().unwrap()["quota"]["drain"] == "draining").then_some(()) }).await;
    let stays = ask(&world, json!({ "cmd": "drain", "cancel": true })).await;
    assert_eq!(stays, json!({ "drain": "no" }));
    let leaving = |heard: &crate::manager::Heard| heard.reports.get(&at.peer).map(|report| report.leaving);
    world.office.until("it stays", |heard| leaving(heard).filter(|leaving| !leaving)).await;
    assert!(draining.await.unwrap().unwrap_err().to_string().contains("stays after all"));
    client.begin(&at, &ticket).await;
    eventually("nobody served", || async { (seeder.status().unwrap()["deliveries"] == 0).then_some(()) }).await;

    let ended = ask(&world, json!({ "cmd": "drain", "patience_ms": 300 })).await;
    assert_eq!((&ended["complete"], &ended["left"]["contents"]), (&json!(false), &json!(1)), "{ended}");
    assert_eq!(ended["drain"], "cut short", "{ended}");
    let waits = ended["left"]["waits_for"].as_str().unwrap();
    let content = goods.digest().to_string();
    assert!(
        waits.contains(&content) && waits.contains("1 of 3 copies") && waits.contains("no other seeder"),
        "{waits}"
    );
    tokio::time::timeout(Duration::from_secs(5), seeder.drained()).await.unwrap();
    stop(seeder).await;
}
