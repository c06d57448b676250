//! Being reached: through a relay, directly after that, and what is said when only the relay is left. All on the loopback,
//! where nothing stands in the way: what a translation does is tried in `tests/reach`.

use node::{AcceptLimits, CircuitLimit, OpenError, Protocol, Reachability, RelayConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const ECHO: Protocol = Protocol::new("/test/echo/1");
const GOODS: Protocol = Protocol::bulk("/test/goods/1");
const WIDE: AcceptLimits = AcceptLimits { queue: 16, per_peer: 16 };

/// A relay, and a seeder that holds a slot there and answers every stream with one byte.
struct Relayed {
    relay: TestNode,
    seeder: TestNode,
    /// The seeder's address through the relay, and no other.
    through: PeerAddrs,
}

impl Relayed {
    async fn start(seed: u8, edit: impl FnOnce(&mut RelayConfig)) -> Self {
        let relay = TestNode::start(seed, |config| {
            config.reach.relay.enabled = true;
            edit(&mut config.reach.relay);
        })
        .await;
        let seeder = TestNode::start(seed + 1, |config| {
            config.bootstrap = vec![relay.at.clone()];
            config.dht = node::DhtMode::Server;
            (config.reach.reserve, config.reach.punch) = (true, true);
        })
        .await;
        // Before it asks for its slot: strangers get none.
        relay.vouch_for(&seeder).await;
        seeder.connect(&relay.at, LIMIT).await.unwrap();
        for protocol in [ECHO, GOODS] {
            let mut accept = seeder.accept(protocol, WIDE).await.unwrap();
            seeder.supervisor.spawn("service", async move {
                while let Some(mut stream) = accept.next().await {
                    let _ = stream.write_all(b"!").await;
                    let _ = stream.shutdown().await;
                }
            });
        }
        let mut changes = seeder.reach_changes();
        let reach = within(changes.wait_for(|reach| reach.slots.iter().any(|slot| !slot.addresses.is_empty()))).await;
        let addresses = reach.unwrap().slots[0].addresses.clone();
        assert!(addresses[0].as_str().ends_with("/p2p-circuit"), "{addresses:?}");
        let through = PeerAddrs::new(seeder.at.peer, addresses);
        Relayed { relay, seeder, through }
    }

    async fn stop(self) {
        self.seeder.stop().await;
        self.relay.stop().await;
    }
}

async fn client(seed: u8, punch: bool) -> TestNode {
    TestNode::start(seed, |config| {
        config.listen.clear();
        config.reach.punch = punch;
    })
    .await
}

async fn answers(stream: &mut node::Stream) {
    let mut answer = Vec::new();
    within(stream.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(answer, b"!");
}

fn punched(node: &TestNode, result: &str) -> u64 {
    metric(node, &format!("willcall_node_hole_punches_total{{result=\"{result}\"}}"))
}

#[tokio::test]
async fn a_relayed_connection_becomes_a_direct_one_before_goods_flow() {
    let net = Relayed::start(60, |_| {}).await;
    let client = client(62, true).await;
    let mut stream = client.open(&net.through, GOODS, LIMIT).await.unwrap();
    assert!(!stream.info().relayed, "{:?}", stream.info());
    answers(&mut stream).await;
    assert_eq!((punched(&client, "tried"), punched(&client, "succeeded")), (1, 1));
    let kinds = "willcall_node_connections{path=\"relayed\",transport=\"tcp\"}";
    assert_eq!(metric(&client, kinds), 1);
    // It is closed when the direct one has taken over, so that the relay has its place back.
    eventually(|| async { if metric(&client, kinds) == 0 { Ok(()) } else { Err("still relayed") } }).await;
    assert!(client.is_connected(net.seeder.at.peer).await.unwrap());
    assert_eq!(metric(&net.relay, "willcall_node_relayed_total{event=\"circuit-opened\"}"), 1);
    client.stop().await;
    net.stop().await;
}

#[tokio::test]
async fn over_a_relay_that_carries_no_goods_calls_pass_and_goods_are_refused_by_name() {
    let net = Relayed::start(63, |_| {}).await;
    // One that does not dial back.
    let client = client(65, false).await;
    let mut stream = client.open(&net.through, ECHO, LIMIT).await.unwrap();
    assert!(stream.info().relayed);
    answers(&mut stream).await;
    let error = client.open(&net.through, GOODS, LIMIT).await.unwrap_err();
    let limit = CircuitLimit { bytes: Some(128 * 1024), time: Some(Duration::from_secs(120)) };
    assert!(matches!(&error, OpenError::RelayedOnly { limit: Some(named), .. } if *named == limit), "{error:?}");
    assert!(error.to_string().contains("carries 128 KiB in 120 s, no goods"), "{error}");
    let refused = "willcall_node_streams_refused_total{protocol=\"/test/goods/1\",reason=\"relayed-only\"}";
    assert_eq!(metric(&client, refused), 1);
    client.stop().await;
    net.stop().await;
}

#[tokio::test]
async fn over_a_relay_with_raised_limits_goods_pass_when_nothing_better_comes() {
    let net = Relayed::start(66, |relay| relay.circuit_bytes = 0).await;
    let client = client(68, false).await;
    let mut stream = client.open(&net.through, GOODS, LIMIT).await.unwrap();
    assert!(stream.info().relayed);
    answers(&mut stream).await;
    client.stop().await;
    net.stop().await;
}

#[tokio::test]
async fn strangers_get_no_slot_and_are_told_so() {
    let relay = TestNode::start(69, |config| config.reach.relay.enabled = true).await;
    let stranger = TestNode::start(70, |config| {
        config.bootstrap = vec![relay.at.clone()];
        config.reach.reserve = true;
    })
    .await;
    stranger.connect(&relay.at, LIMIT).await.unwrap();
    let mut changes = stranger.reach_changes();
    let reach = within(changes.wait_for(|reach| !reach.slots.is_empty())).await.unwrap().clone();
    assert!(reach.slots[0].addresses.is_empty() && reach.slots[0].trouble.is_some(), "{reach:?}");
    assert_eq!(reach.announced(), stranger.at.addrs);
    stranger.stop().await;
    relay.stop().await;
}

#[tokio::test]
async fn a_node_that_peers_get_through_to_knows_it_and_takes_no_slot() {
    let relay = TestNode::start(71, |config| {
        config.reach.relay.enabled = true;
        config.reach.dial_back = true;
    })
    .await;
    let node = TestNode::start(72, |config| {
        config.bootstrap = vec![relay.at.clone()];
        config.dht = node::DhtMode::Server;
        config.reach.reserve = true;
    })
    .await;
    relay.vouch_for(&node).await;
    node.connect(&relay.at, LIMIT).await.unwrap();
    let mut changes = node.reach_changes();
    let known = |reach: &node::Reach| reach.reachability == Reachability::Public && reach.slots.is_empty();
    let reach = within(changes.wait_for(known)).await.unwrap().clone();
    assert_eq!(reach.external, node.at.addrs);
    assert_eq!(reach.tried.iter().map(|tried| &tried.why_not).collect::<Vec<_>>(), [&None]);
    assert_eq!(metric(&node, "willcall_node_reachability "), 2);
    node.stop().await;
    relay.stop().await;
}

/// One that is asked about an address that it does not see the node at says nothing about it.
#[tokio::test]
async fn an_address_that_one_peer_may_not_try_is_tried_by_another() {
    let on = |at: &'static str| move |config: &mut NodeConfig| config.listen = vec![Address::new(at).unwrap()];
    let mut servers = Vec::new();
    for (seed, at) in [(80, "/ip4/127.0.0.1/tcp/0"), (81, "/ip6/::1/tcp/0")] {
        let server = TestNode::start(seed, |config| {
            on(at)(config);
            config.reach.dial_back = true;
        });
        servers.push(server.await);
    }
    let node = TestNode::start(82, |config| {
        on("/ip4/127.0.0.1/tcp/0")(config);
        config.listen.push(Address::new("/ip6/::1/tcp/0").unwrap());
        config.reach.reserve = true;
    })
    .await;
    for server in &servers {
        node.vouch_for(server).await;
        node.connect(&server.at, LIMIT).await.unwrap();
    }
    let mut changes = node.reach_changes();
    let reach = within(changes.wait_for(|reach| reach.external.len() == 2)).await.unwrap().clone();
    assert!(reach.tried.iter().all(|tried| tried.why_not.is_none()), "{reach:?}");
    node.stop().await;
    for server in servers {
        server.stop().await;
    }
}

#[tokio::test]
async fn a_slot_is_given_back_when_others_get_through() {
    let net = Relayed::start(73, |_| {}).await;
    // The relay tests for nobody: the seeder is private until it meets somebody who does.
    let prober = TestNode::start(75, |config| config.reach.dial_back = true).await;
    net.seeder.vouch_for(&prober).await;
    net.seeder.connect(&prober.at, LIMIT).await.unwrap();
    let mut changes = net.seeder.reach_changes();
    let known = |reach: &node::Reach| reach.reachability == Reachability::Public && reach.slots.is_empty();
    within(changes.wait_for(known)).await.unwrap();
    parted(&net).await;
    // The relay knows it, too: nobody gets there by it any more, and another may have the place.
    let client = client(76, false).await;
    client.open(&net.through, ECHO, LIMIT).await.unwrap_err();
    assert_eq!(metric(&net.relay, "willcall_node_relayed_total{event=\"circuit-refused\"}"), 1);
    for node in [client, prober] {
        node.stop().await;
    }
    net.stop().await;
}

/// The first address that is confirmed does not take the connection away on which the others are tested.
#[tokio::test]
async fn a_relay_tests_all_addresses_before_its_slot_is_given_back() {
    let relay = TestNode::start(83, |config| {
        config.reach.relay.enabled = true;
        config.reach.dial_back = true;
    })
    .await;
    let node = TestNode::start(84, |config| {
        config.listen = vec![Address::new(TCP).unwrap(); 3];
        config.bootstrap = vec![relay.at.clone()];
        config.dht = node::DhtMode::Server;
        config.reach.reserve = true;
    })
    .await;
    relay.vouch_for(&node).await;
    node.connect(&relay.at, LIMIT).await.unwrap();
    let mut changes = node.reach_changes();
    let known = |reach: &node::Reach| reach.external.len() == 3 && reach.slots.is_empty();
    within(changes.wait_for(known)).await.unwrap();
    for node in [node, relay] {
        node.stop().await;
    }
}

#[tokio::test]
async fn whoever_is_no_member_any_more_loses_its_slot_when_somebody_comes_by_it() {
    let net = Relayed::start(77, |_| {}).await;
    net.relay.remove_dht_peer(net.seeder.at.peer).await;
    let client = client(79, false).await;
    // The circuit that shows it may be there for a moment.
    let _ = client.open(&net.through, ECHO, LIMIT).await;
    parted(&net).await;
    client.stop().await;
    net.stop().await;
}

async fn parted(net: &Relayed) {
    eventually(|| async {
        if net.relay.is_connected(net.seeder.at.peer).await.unwrap() { Err("still connected") } else { Ok(()) }
    })
    .await;
}
