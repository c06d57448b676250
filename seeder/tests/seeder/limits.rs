//! What one client may take from the others: nothing. Limits on what is sent, shared fairly; and clients that hold a place
//! and do nothing with it, cut off by name while others go on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::{ChunkSet, NetworkId, PeerId, RefusalCode};
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::announcing::metric;
use crate::client::{Client, Talk};
use crate::world::{CHUNK, LIMIT, World, eventually, stop};

/// Takes chunks from 0 on and acknowledges each; gives how many came in all, and when each did.
async fn take(
    client: &Client,
    talk: &mut Talk,
    (network, ticket, seeder): (NetworkId, &protocol::ticket::Ticket, PeerId),
    count: u32,
) -> Vec<Instant> {
    talk.want(0..count).await;
    let mut got = ChunkSet::new();
    let mut times = Vec::new();
    while got.len() < count {
        got.insert(talk.chunk().await.unwrap().0);
        times.push(Instant::now());
        talk.say(ClientMessage::Ack(client.ack(network, ticket, seeder, got.clone()))).await;
    }
    times
}

#[tokio::test]
async fn the_upload_limit_is_kept_shared_by_turns_and_changed_while_running() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let (one, two) = (Client::new(10).await, Client::new(11).await);
    let rate = 4 * CHUNK as u64;
    let seeder = world.seeder("a", &[&goods], |config| config.upload_limit = rate).await;
    let (at, network) = (seeder.peer_addrs(), world.office.network);
    let tickets = [world.ticket(&goods, one.peer(), at.peer), world.ticket(&goods, two.peer(), at.peer)];
    let (mut first, _) = one.begin(&at, &tickets[0]).await;
    let (mut second, _) = two.begin(&at, &tickets[1]).await;
    let began = Instant::now();
    let (a, b) = tokio::join!(
        take(&one, &mut first, (network, &tickets[0], at.peer), 4),
        take(&two, &mut second, (network, &tickets[1], at.peer), 4)
    );
    // Eight chunks at four a second, less a burst of a fifth of a second.
    let last = *a.iter().chain(&b).max().unwrap();
    assert!(last - began >= Duration::from_millis(1700), "{:?}", last - began);
    // Neither waits for the other to be served: when one has three, the other has one at least.
    assert!(a[2] > b[0] && b[2] > a[0], "{a:?} {b:?}");

    let request = json!({ "cmd": "limit", "upload": 0, "upload_per_delivery": 1 });
    let now = node::control_call(&world.path("a"), &request, |_| {}).await.unwrap();
    assert_eq!(now, json!({ "upload": 0, "upload_per_delivery": 1 }));
    assert_eq!(seeder.status().unwrap()["limits"], now);
    // At a byte a second this chunk would take most of a day.
    first.want(7..8).await;
    let request = json!({ "cmd": "limit", "upload_per_delivery": 0 });
    node::control_call(&world.path("a"), &request, |_| {}).await.unwrap();
    let chunk = tokio::time::timeout(LIMIT, first.chunk()).await.unwrap().unwrap();
    assert_eq!((chunk.0, &chunk.1[..]), (7, goods.chunk(7)));

    let request = json!({ "cmd": "limit", "upload": "5MB" });
    let error = node::control_call(&world.path("a"), &request, |_| {}).await.unwrap_err().to_string();
    assert!(error.contains("upload is a number of bytes per second"), "{error}");
    stop(seeder).await;
}

#[tokio::test]
async fn without_memory_to_read_ahead_every_chunk_comes_all_the_same() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.read_ahead_memory = 0).await;
    let (at, network) = (seeder.peer_addrs(), world.office.network);
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..4).await;
    for index in 0..4 {
        let chunk = talk.chunk().await.unwrap();
        assert_eq!((chunk.0, &chunk.1[..]), (index, goods.chunk(index)));
        let ack = client.ack(network, &ticket, at.peer, ChunkSet::from_range(0..index + 1));
        talk.say(ClientMessage::Ack(ack)).await;
    }
    stop(seeder).await;
}

#[tokio::test]
async fn a_client_with_many_deliveries_gets_one_share_of_what_all_have_to_share() {
    let world = World::new(false).await;
    let goods = world.publish(1, 64);
    let seeder = world
        .seeder("a", &[&goods], |config| {
            config.upload_limit = 32 * CHUNK as u64;
            config.reads_at_once = 1;
        })
        .await;
    let (at, network) = (seeder.peer_addrs(), world.office.network);
    // Eight deliveries at once that take whatever they get, before the others ask for anything.
    let greedy = Client::new(10).await;
    let got = std::sync::atomic::AtomicU32::new(0);
    let take_all = async |ticket: protocol::ticket::Ticket| {
        let (mut talk, _) = greedy.begin(&at, &ticket).await;
        talk.want(0..64).await;
        let mut chunks = ChunkSet::new();
        loop {
            chunks.insert(talk.chunk().await.unwrap().0);
            got.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            talk.say(ClientMessage::Ack(greedy.ack(network, &ticket, at.peer, chunks.clone()))).await;
        }
    };
    let taking = (0..8).map(|_| take_all(world.ticket(&goods, greedy.peer(), at.peer)));
    let modest = futures::future::join_all((0..8).map(|n| Client::new(11 + n))).await;
    let modest_ones = async {
        eventually("the greedy one being served", || async {
            (got.load(std::sync::atomic::Ordering::Relaxed) >= 8).then_some(())
        })
        .await;
        let begin = async |client| {
            let client: &Client = client;
            let ticket = world.ticket(&goods, client.peer(), at.peer);
            (client, client.begin(&at, &ticket).await.0, ticket)
        };
        let mut begun = futures::future::join_all(modest.iter().map(begin)).await;
        let before = got.load(std::sync::atomic::Ordering::Relaxed);
        let each = begun.iter_mut().map(|(client, talk, ticket)| take(client, talk, (network, ticket, at.peer), 4));
        futures::future::join_all(each).await;
        got.load(std::sync::atomic::Ordering::Relaxed) - before
    };
    let meanwhile = tokio::select! {
        _ = futures::future::join_all(taking) => unreachable!(),
        meanwhile = modest_ones => meanwhile,
    };
    // By deliveries it would have had as many as the eight together, 32.
    assert!(meanwhile < 16, "the greedy one got {meanwhile} chunks while eight others got 4 each");
    stop(seeder).await;
}

#[tokio::test]
async fn a_limit_of_our_own_is_not_held_against_the_client() {
    let world = World::new(false).await;
    let goods = world.publish(1, 2);
    let client = Client::new(10).await;
    // A chunk takes a second, and every patience with the client is much shorter.
    let seeder = world
        .seeder("a", &[&goods], |config| {
            config.upload_limit_per_delivery = CHUNK as u64;
            (config.idle_ms, config.window_wait_ms, config.write_ms) = (300, 300, 300);
        })
        .await;
    let at = seeder.peer_addrs();
    let (mut talk, _) = client.begin(&at, &world.ticket(&goods, client.peer(), at.peer)).await;
    talk.want(0..2).await;
    assert_eq!(talk.chunk().await.unwrap().0, 0);
    assert_eq!(talk.chunk().await.unwrap().0, 1);
    // From here on it is the client's turn.
    assert_eq!(talk.refusal().await.code, RefusalCode::Idle);
    stop(seeder).await;
}

#[tokio::test]
async fn those_who_do_nothing_trickle_or_never_acknowledge_are_cut_off_by_name_while_others_go_on() {
    let world = World::new(false).await;
    let goods = world.publish(1, 128);
    let seeder = world
        .seeder("a", &[&goods], |config| {
            config.hello_ms = 400;
            config.idle_ms = 600;
            config.window_wait_ms = 500;
            config.write_ms = 700;
            config.max_deliveries = 8;
        })
        .await;
    let (at, network) = (seeder.peer_addrs(), world.office.network);

    // Opens and says nothing.
    let mute = Client::new(10).await;
    let mut silent = mute.open(&at).await;
    // Shows its ticket and asks for nothing.
    let lazy = Client::new(11).await;
    let (mut asks_nothing, _) = lazy.begin(&at, &world.ticket(&goods, lazy.peer(), at.peer)).await;
    // Takes what the window allows and never acknowledges.
    let taker = Client::new(12).await;
    let (mut acks_nothing, _) = taker.begin(&at, &world.ticket(&goods, taker.peer(), at.peer)).await;
    acks_nothing.want(0..64).await;
    // Opens its window wide like an honest client, then reads a byte now and then.
    let trickler = Client::new(13).await;
    let ticket = world.ticket(&goods, trickler.peer(), at.peer);
    let (mut trickles, _) = trickler.begin(&at, &ticket).await;
    trickles.want(0..128).await;
    let mut got = ChunkSet::new();
    while got.len() < 24 {
        got.insert(trickles.chunk().await.unwrap().0);
        trickles.say(ClientMessage::Ack(trickler.ack(network, &ticket, at.peer, got.clone()))).await;
    }
    let trickling = async {
        let mut byte = [0];
        while matches!(trickles.stream.read(&mut byte).await, Ok(read) if read > 0) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    // An honest client beside them, served all the time.
    let honest = Client::new(14).await;
    let served = world.ticket(&goods, honest.peer(), at.peer);
    let (mut good, _) = honest.begin(&at, &served).await;
    let serving = take(&honest, &mut good, (network, &served, at.peer), 128);
    let cut = async {
        let none = silent.refusal().await;
        let idle = asks_nothing.refusal().await;
        let mut window = None;
        while window.is_none() {
            match acks_nothing.hear().await {
                Some(protocol::deliver::SeederMessage::Chunk { length, .. }) => {
                    let mut bytes = vec![0; length as usize];
                    acks_nothing.stream.read_exact(&mut bytes).await.unwrap();
                }
                Some(protocol::deliver::SeederMessage::Refusal(refusal)) => window = Some(refusal),
                Some(_) => {}
                None => break,
            }
        }
        (none.code, idle.code, window.map(|refusal| refusal.code))
    };
    let slow = async {
        // Of the trickler the refusal does not get through: it is counted.
        eventually("the trickler let go", || async {
            (seeder.status().unwrap()["refusals"]["idle"].as_u64() >= Some(3)).then_some(())
        })
        .await;
    };
    let all = async {
        tokio::select! {
            () = async { let _ = tokio::join!(trickling, std::future::pending::<()>()); } => unreachable!(),
            done = async { tokio::join!(serving, cut, slow) } => done,
        }
    };
    let (times, codes, ()) = tokio::time::timeout(LIMIT, all).await.unwrap();
    assert_eq!(times.len(), 128);
    assert_eq!(codes, (RefusalCode::Idle, RefusalCode::Idle, Some(RefusalCode::WindowExceeded)));
    drop(good);
    // Their places are free again.
    eventually("all places back", || async { (seeder.status().unwrap()["deliveries"] == 0).then_some(()) }).await;
    stop(seeder).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_streams_from_fifty_peers_are_each_served_or_refused_by_name() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let seeder = world
        .seeder("a", &[&goods], |config| {
            config.max_deliveries = 100;
            config.max_deliveries_per_peer = 6;
        })
        .await;
    let at = seeder.peer_addrs();
    let mut streams = tokio::task::JoinSet::new();
    for peer in 0..50 {
        let client = std::sync::Arc::new(Client::new(100 + peer).await);
        for _ in 0..10 {
            let (client, at) = (std::sync::Arc::clone(&client), at.clone());
            let ticket = world.ticket(&goods, client.peer(), at.peer);
            streams.spawn(async move {
                // Panics where the stream ends without a greeting.
                let mut talk = client.show(&at, &ticket).await;
                let said = match talk.hear().await.expect("neither welcome nor refusal") {
                    SeederMessage::Welcome { .. } => "served",
                    SeederMessage::Refusal(refusal) => refusal.code.as_str(),
                    other => panic!("{other:?}"),
                };
                (said, talk, client)
            });
        }
    }
    let mut outcomes = BTreeMap::new();
    // Those that are served keep their places until all have their answer.
    let mut open = Vec::new();
    let all = async {
        while let Some(ended) = streams.join_next().await {
            let (said, talk, client) = ended.unwrap();
            *outcomes.entry(said).or_insert(0) += 1;
            open.push((talk, client));
        }
    };
    tokio::time::timeout(LIMIT, all).await.expect("took too long");
    assert_eq!(outcomes.values().sum::<u32>(), 500, "{outcomes:?}");
    assert_eq!(outcomes["served"], 100, "{outcomes:?}");
    let named = outcomes.get("overloaded").unwrap_or(&0) + outcomes.get("limit-reached").unwrap_or(&0);
    assert_eq!(named, 400, "{outcomes:?}");
    let metrics = seeder.handle().metrics().encode();
    assert!(!metrics.contains("willcall_node_streams_dropped_total{protocol=\"/willcall/deliver/1\""), "{metrics}");
    // And nothing is left of them.
    drop(open);
    eventually("the end of all deliveries", || async {
        (seeder.status().unwrap()["deliveries"] == 0 && seeder.supervisor().running("delivery") == 0).then_some(())
    })
    .await;
    stop(seeder).await;
}

/// The operator hears of it: whoever is turned away before it said who it is hears nothing.
#[tokio::test]
async fn that_an_address_keeps_connections_open_and_says_nothing_is_in_the_status() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let trouble = || seeder.status().unwrap()["trouble"]["connections"].clone();
    assert!(trouble().is_null());
    let at = seeder.peer_addrs().addrs.iter().find_map(|address| {
        let port = address.as_str().strip_prefix("/ip4/127.0.0.1/tcp/")?;
        Some(std::net::SocketAddr::from(([127, 0, 0, 1], port.parse().ok()?)))
    });
    let mut silent = Vec::new();
    for _ in 0..300 {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
        silent.push(socket.connect(at.unwrap()).await.unwrap());
    }
    let text = eventually("a complaint", || async { trouble().as_str().map(str::to_owned) }).await;
    assert!(text.contains("turned away") && text.contains("connections from 127.0.0.2 over TCP"), "{text}");
    assert!(metric(&seeder, "willcall_node_connections_refused_total{reason=\"limit-per-address\"} ") > 0);
    stop(seeder).await;
    world.manager.stop().await;
}
