//! What was delivered gets to the manager, whoever dies on the way.

use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::ticket::Ticket;
use protocol::trust::Revocations;
use protocol::{ChunkSet, PeerAddrs, TransactionId};

use crate::client::Client;
use crate::manager::Manager;
use crate::world::{World, eventually, kill, stop};

/// Fetches and acknowledges the first `chunks` chunks; returns once that is durable.
async fn deliver(world: &World, client: &Client, at: &PeerAddrs, ticket: &Ticket, chunks: u32, finish: bool) {
    let (mut talk, _) = client.begin(at, ticket).await;
    talk.want(0..chunks).await;
    let mut got = ChunkSet::new();
    while got.len() < chunks {
        got.insert(talk.chunk().await.unwrap().0);
        if got.len() == 2 || got.len() == chunks {
            talk.say(ClientMessage::Ack(client.ack(world.office.network, ticket, at.peer, got.clone()))).await;
        }
    }
    if finish {
        talk.say(ClientMessage::Finish { ack: None, completion: None }).await;
    }
    loop {
        match talk.hear().await.unwrap() {
            SeederMessage::Window { outstanding: 0, .. } if !finish => return,
            SeederMessage::Window { .. } => {}
            SeederMessage::Finished => return,
            other => panic!("{other:?}"),
        }
    }
}

/// Chunks in the newest receipt of a transaction.
async fn received(world: &World, transaction: TransactionId, chunks: u32) {
    world
        .office
        .until("the receipt", |heard| {
            let acks = heard.receipts.iter().filter_map(|receipt| receipt.ack.peek().ok());
            acks.into_iter()
                .find(|ack| ack.delivery.transaction == transaction && ack.chunks.len() == chunks)
                .map(|_| ())
        })
        .await;
}

async fn all_marked(seeder: &seeder::Running) {
    eventually("all receipts marked", || async {
        let status = seeder.status().unwrap();
        let done = status["batches_waiting"] == 0 && status["receipts_due"] == 0 && status["batches_made"] != 0;
        done.then_some(())
    })
    .await;
}

#[tokio::test]
async fn without_anybody_in_the_mesh_receipts_go_directly() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let transaction = ticket.data.peek().unwrap().transaction;
    deliver(&world, &client, &at, &ticket, 4, true).await;
    received(&world, transaction, 4).await;
    all_marked(&seeder).await;
    let listed = node::control_call(&world.path("a"), &serde_json::json!({ "cmd": "receipts" }), |_| {}).await.unwrap();
    assert_eq!(listed["receipts"][0]["state"], "marked", "{listed}");
    assert_eq!(listed["receipts"][0]["transaction"], transaction.to_string());
    stop(seeder).await;
}

#[tokio::test]
async fn receipts_outlive_a_manager_that_is_away_and_a_seeder_that_is_killed() {
    let mut world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let first = world.ticket(&goods, client.peer(), seeder.peer_id());
    let address = world.manager.at.addrs[0].clone();
    world.manager.stop().await;

    deliver(&world, &client, &seeder.peer_addrs(), &first, 2, false).await;
    kill(seeder).await;
    // It serves at once after the restart, although the manager is away.
    let seeder = world.start("a").await;
    let second = world.ticket(&goods, client.peer(), seeder.peer_id());
    deliver(&world, &client, &seeder.peer_addrs(), &second, 3, true).await;
    kill(seeder).await;
    let seeder = world.start("a").await;

    world.manager = Manager::start(&world.office, Some(address), false).await;
    received(&world, first.data.peek().unwrap().transaction, 2).await;
    received(&world, second.data.peek().unwrap().transaction, 3).await;
    all_marked(&seeder).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_manager_that_came_back_from_a_backup_gets_everything_again() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.heartbeat_silence_ms = 0).await;
    let at = seeder.peer_addrs();
    let tickets: Vec<_> = (0..3).map(|_| world.ticket(&goods, client.peer(), at.peer)).collect();
    for ticket in &tickets {
        deliver(&world, &client, &at, ticket, 2, true).await;
        all_marked(&seeder).await;
    }
    world.office.lose_everything();
    world.manager.nudge(&at).await;
    for ticket in &tickets {
        received(&world, ticket.data.peek().unwrap().transaction, 2).await;
    }
    all_marked(&seeder).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_mark_from_before_a_restore_does_not_end_the_resending() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.heartbeat_silence_ms = 0).await;
    let at = seeder.peer_addrs();
    let tickets: Vec<_> = (0..2).map(|_| world.ticket(&goods, client.peer(), at.peer)).collect();
    for ticket in &tickets {
        deliver(&world, &client, &at, ticket, 2, true).await;
        all_marked(&seeder).await;
    }
    world.office.repeat_mark();
    world.office.lose_everything();
    world.manager.nudge(&at).await;
    for ticket in &tickets {
        received(&world, ticket.data.peek().unwrap().transaction, 2).await;
    }
    all_marked(&seeder).await;
    stop(seeder).await;
}

#[tokio::test]
async fn what_is_sealed_to_a_key_that_the_manager_lost_is_sealed_again_to_the_next_one() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.heartbeat_silence_ms = 0).await;
    let at = seeder.peer_addrs();
    let tickets: Vec<_> = (0..3).map(|_| world.ticket(&goods, client.peer(), at.peer)).collect();
    let knows = async |version: u64| {
        world.manager.nudge(&at).await;
        let known = || async { (seeder.status().unwrap()["key_set_version"] == version).then_some(()) };
        eventually("the key set", known).await;
    };
    deliver(&world, &client, &at, &tickets[0], 2, true).await;
    all_marked(&seeder).await;
    world.office.rotate_sealing();
    knows(2).await;
    deliver(&world, &client, &at, &tickets[1], 3, true).await;
    all_marked(&seeder).await;

    // Back from a backup of before, without the new key: what was marked since is lost, and nobody can open it.
    world.office.lose_everything();
    world.office.lose_sealing();
    world.manager.nudge(&at).await;
    world.office.until("a batch that it cannot open", |heard| (heard.not_opened > 0).then_some(())).await;
    deliver(&world, &client, &at, &tickets[2], 4, true).await;
    world.office.rotate_sealing();
    knows(3).await;
    for (ticket, chunks) in tickets.iter().zip([2, 3, 4]) {
        received(&world, ticket.data.peek().unwrap().transaction, chunks).await;
    }
    all_marked(&seeder).await;
    let not_opened = world.office.heard.lock().unwrap().not_opened;
    let later = world.ticket(&goods, client.peer(), at.peer);
    deliver(&world, &client, &at, &later, 2, true).await;
    received(&world, later.data.peek().unwrap().transaction, 2).await;
    all_marked(&seeder).await;
    assert_eq!(world.office.heard.lock().unwrap().not_opened, not_opened);
    stop(seeder).await;
}

#[tokio::test]
async fn a_manager_that_lost_its_books_without_saying_so_gets_them_again_too() {
    let world = World::new(false).await;
    let goods = world.publish(1, 4);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let first = world.ticket(&goods, client.peer(), at.peer);
    deliver(&world, &client, &at, &first, 2, true).await;
    all_marked(&seeder).await;
    world.office.lose_everything();
    world.office.says.lock().unwrap().restore = 0;
    let second = world.ticket(&goods, client.peer(), at.peer);
    deliver(&world, &client, &at, &second, 2, true).await;
    received(&world, first.data.peek().unwrap().transaction, 2).await;
    received(&world, second.data.peek().unwrap().transaction, 2).await;
    all_marked(&seeder).await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_client_that_is_cut_off_has_a_moment_to_acknowledge_what_it_has() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let [honest, greedy] = [world.ticket(&goods, client.peer(), at.peer), world.ticket(&goods, client.peer(), at.peer)];
    let id = |ticket: &Ticket| ticket.data.peek().unwrap().transaction;
    let mut talks = Vec::new();
    for ticket in [&honest, &greedy] {
        let (mut talk, _) = client.begin(&at, ticket).await;
        talk.want(0..2).await;
        for _ in 0..2 {
            talk.chunk().await.unwrap();
        }
        talks.push(talk);
    }
    let transactions = vec![id(&honest), id(&greedy)];
    world.office.revoke(Revocations { transactions, ..Revocations::default() });
    world.manager.nudge(&at).await;
    for (talk, (ticket, chunks)) in talks.iter_mut().zip([(&honest, 0..2), (&greedy, 0..3)]) {
        let heard = talk.hear().await;
        assert!(matches!(&heard, Some(SeederMessage::Refusal(no)) if no.code.as_str() == "revoked"), "{heard:?}");
        // Nothing more is sent, whatever is asked for.
        talk.want(2..4).await;
        let ack = client.ack(world.office.network, ticket, at.peer, ChunkSet::from_range(chunks));
        talk.say(ClientMessage::Finish { ack: Some(ack), completion: None }).await;
        assert!(talk.hear().await.is_none(), "the refusal was the last word");
    }
    received(&world, id(&honest), 2).await;
    all_marked(&seeder).await;
    let acks = world.office.until("the receipts", |heard| Some(heard.receipts.clone())).await;
    assert!(acks.iter().all(|receipt| receipt.ack.peek().unwrap().delivery.transaction == id(&honest)));
    stop(seeder).await;
}
