//! Bytes that mean nothing, and messages that mean harm.

use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::trust::Revocations;
use protocol::{ChunkSet, Keypair, RefusalCode, Signed};
use tokio::io::AsyncWriteExt;

use crate::client::Client;
use crate::world::{CHUNK, World, eventually, stop};

#[tokio::test]
async fn random_bytes_on_the_stream_end_that_stream_only() {
    let world = World::new(false).await;
    let goods = world.publish(1, 2);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |config| config.hello_ms = 500).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, client.peer(), at.peer);
    let (mut steady, _) = client.begin(&at, &ticket).await;
    for round in 0u32..40 {
        let mut bytes = vec![0; 1 + round as usize * 13];
        blake3::Hasher::new().update(&round.to_le_bytes()).finalize_xof().fill(&mut bytes);
        let other = world.ticket(&goods, client.peer(), at.peer);
        // Half of them before, half of them after a good hello; some with a length that fits.
        let mut talk = match round % 2 {
            0 => client.open(&at).await,
            _ => client.begin(&at, &other).await.0,
        };
        if round % 4 < 2 {
            let _ = talk.stream.write_all(&(bytes.len() as u32).to_be_bytes()).await;
        }
        let _ = talk.stream.write_all(&bytes).await;
        let _ = talk.stream.shutdown().await;
        while let Some(message) = talk.hear().await {
            assert!(!matches!(message, SeederMessage::Chunk { .. }));
        }
    }
    steady.want(0..2).await;
    assert_eq!(steady.chunk().await.unwrap().1, goods.chunk(0));
    stop(seeder).await;
}

#[tokio::test]
async fn false_acknowledgements_and_wants_end_the_stream_by_name() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let network = world.office.network;
    let fresh = || world.ticket(&goods, client.peer(), at.peer);

    let ticket = fresh();
    let mut of_another = Client::new(12).await;
    of_another.key = Keypair::from_seed(&[99; 32]);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..1).await;
    talk.chunk().await.unwrap();
    talk.say(ClientMessage::Ack(of_another.ack(network, &ticket, at.peer, ChunkSet::from_range(0..1)))).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::BadAck);

    let ticket = fresh();
    let (mut talk, _) = client.begin(&at, &ticket).await;
    let too_much: Signed<_> = client.ack(network, &ticket, at.peer, ChunkSet::from_range(0..8));
    talk.say(ClientMessage::Ack(too_much)).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::BadAck);

    let (mut talk, _) = client.begin(&at, &fresh()).await;
    talk.want(7..9).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::BadWant);

    let (mut talk, _) = client.begin(&at, &fresh()).await;
    talk.hello(&fresh()).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::Malformed);
    stop(seeder).await;
}

#[tokio::test]
async fn a_reader_that_stops_reading_is_let_go_and_holds_nobody_up() {
    let world = World::new(false).await;
    let goods = world.publish(1, 256);
    let (slow, quick) = (Client::new(10).await, Client::new(11).await);
    let seeder = world.seeder("a", &[&goods], |config| config.write_ms = 700).await;
    let at = seeder.peer_addrs();
    let ticket = world.ticket(&goods, slow.peer(), at.peer);
    let (mut talk, _) = slow.begin(&at, &ticket).await;
    // Opens the window by reading and acknowledging, then reads no more.
    talk.want(0..256).await;
    let mut got = ChunkSet::new();
    while got.len() < 30 {
        got.insert(talk.chunk().await.unwrap().0);
        talk.say(ClientMessage::Ack(slow.ack(world.office.network, &ticket, at.peer, got.clone()))).await;
    }
    let (mut other, _) = quick.begin(&at, &world.ticket(&goods, quick.peer(), at.peer)).await;
    other.want(0..1).await;
    assert_eq!(other.chunk().await.unwrap().1.len(), CHUNK);
    eventually("the slow reader let go", || async {
        (seeder.status().unwrap()["refusals"]["idle"] == 1).then_some(())
    })
    .await;
    stop(seeder).await;
}

#[tokio::test]
async fn a_revocation_cuts_a_running_delivery() {
    let world = World::new(false).await;
    let goods = world.publish(1, 8);
    let client = Client::new(10).await;
    let seeder = world.seeder("a", &[&goods], |_| {}).await;
    let at = seeder.peer_addrs();
    let terms = world.terms(&goods, client.peer(), at.peer);
    let transactions = vec![terms.transaction];
    let ticket = world.make(terms);
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..1).await;
    talk.chunk().await.unwrap();
    world.office.revoke(Revocations { transactions, ..Revocations::default() });
    world.manager.nudge(&at).await;
    assert_eq!(talk.refusal().await.code, RefusalCode::Revoked);
    assert_eq!(client.show(&at, &ticket).await.refusal().await.code, RefusalCode::Revoked);
    // A restart forgets no revocation, although nobody is asked.
    stop(seeder).await;
    world.office.says.lock().unwrap().refuses = true;
    let seeder = world.start("a").await;
    assert_eq!(client.show(&seeder.peer_addrs(), &ticket).await.refusal().await.code, RefusalCode::Revoked);
    stop(seeder).await;
}
