//! The DHT: found through a third node, and only those that somebody vouches for.

use node::{DhtError, DhtMode};

use super::*;

const KEY: [u8; 32] = [42; 32];

fn server(config: &mut NodeConfig) {
    config.dht = DhtMode::Server;
}

#[tokio::test]
async fn providers_are_found_through_a_third_node() {
    let hub = TestNode::start(90, server).await;
    let bootstrap = hub.at.clone();
    let seeder = TestNode::start(91, |config| {
        server(config);
        config.bootstrap = vec![bootstrap.clone()];
    })
    .await;
    let client = TestNode::start(92, |config| {
        config.dht = DhtMode::Client;
        config.listen.clear();
        config.bootstrap = vec![bootstrap];
    })
    .await;
    hub.add_dht_peer(seeder.at.clone()).await.unwrap();
    let found = eventually(|| async {
        seeder.provide(KEY).await.map_err(|e| e.to_string())?;
        let found = client.find_providers(KEY, 10, Duration::from_secs(5)).await.map_err(|e| e.to_string())?;
        if found.is_empty() { Err("nobody".to_owned()) } else { Ok(found) }
    })
    .await;
    assert_eq!(found, std::slice::from_ref(&seeder.at));
    client.connect(&found[0], LIMIT).await.unwrap();
    assert_eq!(client.find_providers([1; 32], 10, Duration::from_secs(5)).await.unwrap(), []);
    for node in [hub, seeder, client] {
        node.stop().await;
    }
}

#[tokio::test]
async fn the_records_of_strangers_are_not_kept() {
    let hub = TestNode::start(93, server).await;
    let stranger = TestNode::start(94, |config| {
        server(config);
        config.bootstrap = vec![hub.at.clone()];
    })
    .await;
    stranger.provide(KEY).await.unwrap();
    assert_eq!(hub.find_providers(KEY, 10, Duration::from_secs(5)).await.unwrap(), []);
    hub.stop().await;
    stranger.stop().await;
}

#[tokio::test]
async fn what_the_dht_cannot_do_has_a_name() {
    let off = TestNode::start(95, |_| {}).await;
    assert_eq!(off.provide(KEY).await, Err(DhtError::Off));
    assert_eq!(off.find_providers(KEY, 1, LIMIT).await, Err(DhtError::Off));
    let alone = TestNode::start(96, |config| {
        server(config);
        config.limits.dht_peers = 1;
    })
    .await;
    assert_eq!(alone.bootstrap().await, Err(DhtError::NoPeers));
    alone.add_dht_peer(off.at.clone()).await.unwrap();
    let second = Keypair::from_seed(&[97; 32]).peer_id().into();
    assert_eq!(alone.add_dht_peer(second).await, Err(DhtError::Full));
    alone.remove_dht_peer(off.at.peer).await;
    alone.add_dht_peer(PeerAddrs::from(Keypair::from_seed(&[97; 32]).peer_id())).await.unwrap();
    off.stop().await;
    alone.stop().await;
}

#[tokio::test]
async fn an_answer_that_names_many_peers_of_many_addresses_is_still_read() {
    let hub = TestNode::start(98, server).await;
    let bootstrap = hub.at.clone();
    let seeder = TestNode::start(99, |config| {
        server(config);
        config.bootstrap = vec![bootstrap.clone()];
    })
    .await;
    hub.add_dht_peer(seeder.at.clone()).await.unwrap();
    let client = TestNode::start(124, |config| {
        config.dht = DhtMode::Client;
        config.listen.clear();
        config.bootstrap = vec![bootstrap];
    })
    .await;
    eventually(|| async {
        seeder.provide(KEY).await.map_err(|e| e.to_string())?;
        match client.find_providers(KEY, 1, LIMIT).await {
            Ok(found) if !found.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // One answer names twenty. Whoever connects to these hears nothing: where nobody is, the address would be forgotten.
    let silent = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    for n in 0..24u8 {
        let peer = Keypair::from_seed(&[100 + n; 32]).peer_id();
        for night in 0..6 {
            let direct = (0..8).map(|a| format!("/ip4/127.{n}.{night}.{}/tcp/{port}", a + 1));
            let relayed = (0..8).map(|a| format!("/ip4/127.{n}.{night}.{}/tcp/{port}/p2p/{peer}/p2p-circuit", a + 1));
            let addrs = direct.chain(relayed).map(|text| Address::new(&text).unwrap()).collect();
            hub.add_dht_peer(PeerAddrs::new(peer, addrs)).await.unwrap();
        }
    }
    // Another one's silence ends after ten seconds.
    let found = client.find_providers(KEY, 1, Duration::from_secs(8)).await.unwrap();
    assert_eq!(found, std::slice::from_ref(&seeder.at));
    for node in [hub, seeder, client] {
        node.stop().await;
    }
}
