//! What a seeder can lose to one client: a window, and the few that are forgiven as time goes by, whatever the client does
//! and however often it comes back.

use std::time::{Duration, Instant};

use protocol::ChunkSet;
use protocol::RefusalCode;
use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::serving::{FIRST_WINDOW, FORGIVE_TIMES};
use seeder::Running;

use crate::client::Client;
use crate::world::{World, eventually, kill, stop};

/// Long enough for a chunk that is on its way to arrive on a busy machine.
const QUIET: Duration = Duration::from_millis(300);

/// Chunks that may be lost since `began` to a client that acknowledges nothing: a first window, another after a second, a
/// third after two more, then after four, …
fn let_out(began: Instant) -> u64 {
    let times = (began.elapsed().as_secs() + 1).ilog2();
    u64::from(FIRST_WINDOW * (1 + times.min(FORGIVE_TIMES)))
}

#[tokio::test]
async fn a_client_that_never_acknowledges_gets_one_window_over_reconnects_and_restarts() {
    let world = World::new(false).await;
    let goods = world.publish(1, 64);
    let client = Client::new(10).await;
    let mut seeder = world.seeder("a", &[&goods], |_| {}).await;
    let ticket = world.ticket(&goods, client.peer(), seeder.peer_id());
    let (mut got, began) = (Vec::new(), Instant::now());
    for round in 0..20 {
        let at = seeder.peer_addrs();
        let (mut talk, welcome) = client.begin(&at, &ticket).await;
        assert!(welcome.outstanding <= welcome.window, "{welcome:?}");
        talk.want(0..64).await;
        // The last look is a long one; those between break off at once, or as soon as the first chunk is there.
        match round {
            0 => drop(talk),
            1 => got.extend(talk.chunk().await.ok().map(|chunk| chunk.0)),
            10 | 19 => got.extend(talk.drain(QUIET).await),
            _ => drop(talk),
        }
        if round % 7 == 3 {
            stop(seeder).await;
            seeder = world.start("a").await;
        }
        if round % 7 == 5 {
            kill(seeder).await;
            seeder = world.start("a").await;
        }
    }
    assert!(!got.is_empty() && got.len() as u64 <= let_out(began), "{got:?}");
    let (_, welcome) = client.begin(&seeder.peer_addrs(), &ticket).await;
    assert!(welcome.window == 2 && welcome.outstanding <= 2, "{welcome:?}");
    stop(seeder).await;
}

#[tokio::test]
async fn a_client_that_reconnects_a_thousand_times_and_draws_from_fifty_seeders_at_once_gets_two_chunks_of_each() {
    let world = World::new(false).await;
    let goods = world.publish(1, 16);
    let client = Client::new(10).await;
    let mut mesh = Vec::new();
    for number in 0..50 {
        world.set_up(&format!("s{number}"), &[&goods], |_| {});
        mesh.push(world.start(&format!("s{number}")).await);
    }
    let first = mesh[0].peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), first.peer);
    eventually("the network's keys at all of them", || async {
        for seeder in &mesh {
            let mut talk = client.show(&seeder.peer_addrs(), &ticket).await;
            if !matches!(talk.hear().await, Some(SeederMessage::Welcome { .. })) {
                return None;
            }
        }
        Some(())
    })
    .await;

    // The same ticket at all of them at once: one is listed, the others are not.
    let mut talks = Vec::new();
    for seeder in &mesh {
        let (mut talk, _) = client.begin(&seeder.peer_addrs(), &ticket).await;
        talk.want(0..16).await;
        talks.push(talk);
    }
    let drawn = futures::future::join_all(talks.iter_mut().map(|talk| talk.drain(QUIET))).await;
    assert!(drawn.iter().all(|got| got.len() == 2), "{drawn:?}");
    drop(talks);

    // Again and again at one of them, which is killed now and then. It lets this client in again after a second, then
    // after two more, then after four; what bounds that is how often it does so.
    let mut seeder = mesh.remove(0);
    let sent = |seeder: &Running| seeder.status().unwrap()["chunks_sent"].as_u64().unwrap();
    let (mut lost, began) = (0, Instant::now());
    for round in 0..1000 {
        let (mut talk, welcome) = client.begin(&seeder.peer_addrs(), &ticket).await;
        assert!(welcome.window == 2 && welcome.outstanding <= 2, "round {round}: {welcome:?}");
        talk.want(0..16).await;
        if round % 250 == 249 {
            lost += sent(&seeder);
            kill(seeder).await;
            seeder = world.start("s0").await;
        }
    }
    let (mut talk, _) = client.begin(&seeder.peer_addrs(), &ticket).await;
    talk.want(0..16).await;
    talk.drain(QUIET).await;
    lost += sent(&seeder);
    println!(
        "50 seeders: {} chunks at once; 1000 reconnects and 4 kills in {:.1} s: {lost} chunks of one seeder",
        drawn.iter().map(Vec::len).sum::<usize>(),
        began.elapsed().as_secs_f64()
    );
    assert!(lost >= 2 && lost <= let_out(began), "{lost}");
    stop(seeder).await;
    for seeder in mesh {
        stop(seeder).await;
    }
}

#[tokio::test]
async fn what_was_acknowledged_is_kept_over_a_restart_and_opens_the_window() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, welcome) = client.begin(&at, &ticket).await;
    assert_eq!(welcome.held, ChunkSet::from_range(0..8));
    talk.want(0..8).await;
    for expected in 0..2 {
        let (index, bytes) = talk.chunk().await.unwrap();
        assert_eq!((index, bytes.as_slice()), (expected, goods.chunk(expected)));
    }
    let ack = client.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..2));
    talk.say(ClientMessage::Ack(ack.clone())).await;
    let opened = talk.hear().await;
    let Some(SeederMessage::Window { window, .. }) = opened else { panic!("{opened:?}") };
    assert_eq!(window, 4);
    drop(talk);
    kill(seeder).await;

    let seeder = world.start("a").await;
    let (_, welcome) = client.begin(&seeder.peer_addrs(), &ticket).await;
    assert_eq!(welcome.ack, Some(ack));
    assert_eq!(welcome.window, 4);
    stop(seeder).await;
}

#[tokio::test]
async fn a_whole_content_comes_through_a_growing_window() {
    let world = World::new(false).await;
    let goods = world.publish(1, 200);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..200).await;
    let mut got = ChunkSet::new();
    while got.len() < 200 {
        let (index, bytes) = talk.chunk().await.unwrap();
        assert_eq!(bytes, goods.chunk(index));
        got.insert(index);
        let ack = client.ack(world.office.network, &ticket, at.peer, got.clone());
        talk.say(ClientMessage::Ack(ack)).await;
    }
    talk.say(ClientMessage::Finish { ack: None, completion: None }).await;
    loop {
        match talk.hear().await {
            Some(SeederMessage::Finished) => break,
            Some(SeederMessage::Window { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seeder.status().unwrap()["chunks_sent"], 200);
    stop(seeder).await;
}

#[tokio::test]
async fn a_newer_stream_takes_over_and_the_older_one_is_told() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut older, _) = client.begin(&at, &ticket).await;
    older.want(0..1).await;
    older.chunk().await.unwrap();
    let (mut newer, welcome) = client.begin(&at, &ticket).await;
    assert_eq!(welcome.outstanding, 1, "what the older one sent counts on");
    assert_eq!(older.refusal().await.code, RefusalCode::Superseded);
    newer.want(1..2).await;
    assert_eq!(newer.chunk().await.unwrap().0, 1);
    stop(seeder).await;
}

#[tokio::test]
async fn a_client_that_was_cut_off_is_not_kept_out_by_its_own_dead_stream() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let (client, other) = (Client::new(10).await, Client::new(11).await);
    let seeder = world.seeder("a", &[&goods], |config| config.max_deliveries = 1).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut dead, _) = client.begin(&at, &ticket).await;
    dead.want(0..1).await;
    dead.chunk().await.unwrap();
    assert_eq!(other.open(&at).await.refusal().await.code, RefusalCode::Overloaded);
    let (mut newer, welcome) = client.begin(&at, &ticket).await;
    assert_eq!(welcome.outstanding, 1);
    assert_eq!(other.open(&at).await.refusal().await.code, RefusalCode::Overloaded, "the place is taken over");
    newer.want(1..2).await;
    assert_eq!(newer.chunk().await.unwrap().0, 1);
    // Another delivery of the same client has no stream to take over from.
    let another = world.ticket(&goods, client.peer(), at.peer);
    assert_eq!(client.show(&at, &another).await.refusal().await.code, RefusalCode::Overloaded);
    stop(seeder).await;
}

#[tokio::test]
async fn a_full_window_and_a_silent_client_are_let_go_by_name() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| (config.idle_ms, config.window_wait_ms) = (1500, 300)).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..8).await;
    talk.chunk().await.unwrap();
    talk.chunk().await.unwrap();
    assert_eq!(talk.refusal().await.code, RefusalCode::WindowExceeded);
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::Idle);
    stop(seeder).await;
}
