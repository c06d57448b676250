//! What a seeder tells the DHT: everything it holds, again after a restart of either side, and a complaint when it does not
//! get through.

use std::time::Duration;

use protocol::PeerId;
use protocol::api::provider_key;

use crate::manager::Manager;
use crate::world::{Goods, World, eventually, stop};

/// Waits until whoever asks the manager's table is told of this seeder.
async fn found(world: &World, manager: &Manager, goods: &Goods, seeder: PeerId) {
    let key = *provider_key(&world.office.network, &goods.digest()).as_bytes();
    eventually("an announcement", || async {
        let found = manager.handle.find_providers(key, 8, Duration::from_secs(2)).await.unwrap();
        found.iter().any(|provider| provider.peer == seeder && !provider.addrs.is_empty()).then_some(())
    })
    .await;
}

pub(crate) fn metric(seeder: &seeder::Running, name: &str) -> i64 {
    let text = seeder.handle().metrics().encode();
    text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().parse().unwrap()
}

#[tokio::test]
async fn contents_are_announced_again_after_a_restart_of_the_seeder_and_of_those_who_remember_them() {
    let world = World::new(false).await;
    let goods = [world.publish(1, 1), world.publish(2, 1)];
    let seeder = world.seeder("a", &[&goods[0], &goods[1]], |config| config.announce_ms = 400).await;
    world.manager.handle.add_dht_peer(seeder.peer_addrs()).await.unwrap();
    for goods in &goods {
        found(&world, &world.manager, goods, seeder.peer_id()).await;
    }
    stop(seeder).await;
    world.manager.stop().await;

    // Its table is empty now.
    let again = Manager::start(&world.office, Some(world.manager.at.addrs[0].clone()), false).await;
    let seeder = world.start("a").await;
    again.handle.add_dht_peer(seeder.peer_addrs()).await.unwrap();
    for goods in &goods {
        found(&world, &again, goods, seeder.peer_id()).await;
    }
    assert_eq!(metric(&seeder, "willcall_seeder_announced_contents "), 2);
    stop(seeder).await;
    again.stop().await;
}

#[tokio::test]
async fn announcements_that_nobody_hears_are_counted_and_said_until_they_are_heard() {
    let world = World::new(false).await;
    let goods = world.publish(1, 1);
    world.set_up("a", &[&goods], |config| config.announce_ms = 400);
    world.manager.stop().await;
    let seeder = world.start("a").await;
    let trouble = || seeder.status().unwrap()["trouble"]["announcing"].clone();
    eventually("a complaint", || async { trouble().is_string().then_some(()) }).await;
    assert_eq!(trouble(), "1 of 1 contents are announced late in the DHT");
    assert_eq!(metric(&seeder, "willcall_seeder_late_announcements "), 1);

    let again = Manager::start(&world.office, Some(world.manager.at.addrs[0].clone()), false).await;
    again.handle.add_dht_peer(seeder.peer_addrs()).await.unwrap();
    found(&world, &again, &goods, seeder.peer_id()).await;
    eventually("the end of the complaint", || async { trouble().is_null().then_some(()) }).await;
    assert_eq!(metric(&seeder, "willcall_seeder_late_announcements "), 0);
    stop(seeder).await;
    again.stop().await;
}
