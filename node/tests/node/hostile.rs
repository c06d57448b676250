//! Whatever strangers send to the ports, the node goes on.

use node::{AcceptLimits, Protocol};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const ECHO: Protocol = Protocol::new("/test/echo/1");

fn port(address: &str) -> u16 {
    address.split('/').find_map(|part| part.parse().ok().filter(|p| *p > 1000)).unwrap()
}

/// Reproducible noise (an xorshift), so that a failure can be seen again.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}

#[tokio::test]
async fn random_bytes_on_both_ports_disturb_nothing() {
    let b = TestNode::on_both(111).await;
    let mut accept = b.accept(ECHO, AcceptLimits { queue: 8, per_peer: 8 }).await.unwrap();
    let tcp = port(b.only("/tcp/").addrs[0].as_str());
    let udp = port(b.only("/udp/").addrs[0].as_str());
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for n in 0..50_u64 {
        socket.send_to(&noise(n, 1 + (n as usize * 29) % 1300), ("127.0.0.1", udp)).await.unwrap();
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", tcp)).await.unwrap();
        let mut bytes = noise(n, 1 + (n as usize * 997) % 20_000);
        if n % 2 == 0 {
            // Past the first hurdle: the right greeting, then noise where the handshake should be.
            bytes.splice(0..0, b"\x13/multistream/1.0.0\n\x0b/tls/1.0.0\n".iter().copied());
        }
        // The node may hang up in the middle; that is its good right.
        let _ = stream.write_all(&bytes).await;
        if n % 3 == 0 {
            let _ = stream.shutdown().await;
            let mut rest = Vec::new();
            let _ = within(stream.read_to_end(&mut rest)).await;
        }
    }
    for (seed, part) in [(108, "/tcp/"), (109, "/quic-v1")] {
        let a = TestNode::start(seed, |_| {}).await;
        let mut stream = a.open(&b.only(part), ECHO, LIMIT).await.unwrap();
        stream.write_all(b"still there?").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut inbound = within(accept.next()).await.unwrap();
        let mut heard = Vec::new();
        within(inbound.read_to_end(&mut heard)).await.unwrap();
        assert_eq!(heard, b"still there?");
        drop((stream, inbound));
        a.stop().await;
    }
    eventually(|| async {
        let refused = metric(&b, "willcall_node_connections_refused_total{reason=\"handshake\"}");
        if refused >= 40 { Ok(()) } else { Err(refused) }
    })
    .await;
    b.stop().await;
}

#[tokio::test]
async fn connections_over_the_limit_are_closed_and_counted() {
    let server = TestNode::start(112, |config| config.limits.connections = 2).await;
    let mut clients = Vec::new();
    for n in 0..4 {
        let client = TestNode::start(113 + n, |config| config.listen.clear()).await;
        // The dial itself succeeds; a connection over the limit closes right after.
        let _ = client.connect(&server.at, LIMIT).await;
        clients.push(client);
    }
    eventually(|| async {
        let refused = metric(&server, "willcall_node_connections_refused_total{reason=\"limit\"}");
        if refused == 2 { Ok(()) } else { Err(refused) }
    })
    .await;
    assert_eq!(server.connected_peers().await.unwrap().len(), 2);
    for client in clients {
        client.stop().await;
    }
    server.stop().await;
}

/// A client that is killed leaves its connections over QUIC behind. The next process of the same key is heard all the
/// same, however many there were before; what the peer does over TCP meanwhile goes on.
#[tokio::test]
async fn the_connections_that_a_peer_left_behind_give_way_to_its_next() {
    let server = TestNode::on_both(120).await;
    let most = NodeConfig::new(Keypair::from_seed(&[120; 32])).limits.connections_per_peer;
    let mut accept = server.accept(ECHO, AcceptLimits { queue: 8, per_peer: 64 }).await.unwrap();
    let start = || TestNode::start(121, |config| config.listen.clear());
    let steady = start().await;
    let mut kept = within(steady.open(&server.only("tcp"), ECHO, LIMIT)).await.unwrap();
    kept.write_all(b"1").await.unwrap();
    let mut serving = within(accept.next()).await.unwrap();
    let mut before = Vec::new();
    for _ in 0..3 * most {
        let client = start().await;
        let mut stream = within(client.open(&server.only("quic"), ECHO, LIMIT)).await.unwrap();
        stream.write_all(b"1").await.unwrap();
        stream.flush().await.unwrap();
        // The server knows that it is connected, and to which.
        let inbound = within(accept.next()).await.unwrap();
        assert_eq!(inbound.peer(), steady.peer_id());
        before.push((client, stream, inbound));
    }
    assert_eq!(metric(&server, "willcall_node_connections_refused_total{reason=\"limit\"}"), 0);
    eventually(|| async {
        let open = metric(&server, "willcall_node_connections{path=\"direct\",transport=\"quic\"}");
        if open == u64::from(most) - 1 { Ok(()) } else { Err(open) }
    })
    .await;
    let mut byte = [0];
    kept.write_all(b"2").await.unwrap();
    kept.flush().await.unwrap();
    within(serving.read_exact(&mut byte)).await.unwrap();
    within(serving.read_exact(&mut byte)).await.unwrap();
    assert_eq!(&byte, b"2");
    for (client, ..) in before {
        client.stop().await;
    }
    steady.stop().await;
    server.stop().await;
}

/// Whoever connects and says nothing keeps a place among the handshakes until its time is over: its own, not others'.
#[tokio::test]
async fn an_address_that_connects_and_says_nothing_does_not_keep_others_out() {
    let server = TestNode::on_both(130).await;
    let mut accept = server.accept(ECHO, AcceptLimits { queue: 8, per_peer: 8 }).await.unwrap();
    let at = std::net::SocketAddr::from(([127, 0, 0, 1], port(server.only("/tcp/").addrs[0].as_str())));
    let silent = async || {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(([127, 0, 0, 2], 0).into()).unwrap();
        socket.connect(at).await.unwrap()
    };
    assert_eq!(server.turned_away(), None);
    let mut silents = Vec::new();
    for _ in 0..1500 {
        silents.push(within(silent()).await);
    }
    for (seed, road) in [(131, "/tcp/"), (132, "/quic-v1")] {
        let client = TestNode::start(seed, |config| config.listen.clear()).await;
        within(client.connect(&server.only(road), LIMIT)).await.unwrap();
        let mut stream = within(client.open(&server.only(road), ECHO, LIMIT)).await.unwrap();
        stream.write_all(b"1").await.unwrap();
        stream.flush().await.unwrap();
        let mut inbound = within(accept.next()).await.unwrap();
        within(inbound.read_u8()).await.unwrap();
        client.stop().await;
    }
    // That there was no room, and for whom, is counted and told.
    let refused = |reason| metric(&server, &format!("willcall_node_connections_refused_total{{reason=\"{reason}\"}}"));
    assert!(refused("limit-per-address") >= 1000, "{}", refused("limit-per-address"));
    assert_eq!(refused("limit"), 0);
    let told = server.turned_away().unwrap();
    assert!(told.contains("connections from 127.0.0.2 over TCP"), "{told}");
    drop(silents);
    server.stop().await;
}

/// Goods, of which each stream says a byte and hears it again.
const GOODS: Protocol = Protocol::bulk("/test/goods/1");

/// Keys cost a stranger nothing. However many connections it keeps with them, they give way to those from elsewhere.
#[tokio::test]
async fn an_address_with_many_keys_does_not_keep_others_out() {
    let server = TestNode::start(140, |config| {
        config.listen = vec![Address::new(TCP).unwrap(), Address::new(QUIC).unwrap()];
        config.limits.connections = 16;
    })
    .await;
    let mut accept = server.accept(ECHO, AcceptLimits { queue: 32, per_peer: 8 }).await.unwrap();
    let mut talk = async |client: &TestNode, road: &str| {
        let mut stream = within(client.open(&server.only(road), ECHO, LIMIT)).await.ok()?;
        stream.write_all(b"1").await.ok()?;
        stream.flush().await.ok()?;
        // One that was turned away may have come as far as this, and is not heard.
        let mut inbound = tokio::select! {
            inbound = accept.next() => inbound?,
            _ = stream.read_u8() => return None,
        };
        (inbound.peer() == client.peer_id()).then_some(())?;
        within(inbound.read_u8()).await.ok()?;
        Some((stream, inbound))
    };
    let refused = |reason| metric(&server, &format!("willcall_node_connections_refused_total{{reason=\"{reason}\"}}"));
    let mut crowd = Vec::new();
    for seed in 0..16 {
        let client = TestNode::start(150 + seed, |config| config.listen.clear()).await;
        let streams = talk(&client, "/tcp/").await;
        crowd.push((client, streams));
    }
    // Two of the sixteen are kept for what the node dials.
    assert_eq!(crowd.iter().filter(|(_, streams)| streams.is_some()).count(), 14);
    assert_eq!((refused("limit"), refused("gave-way")), (2, 0));
    let mut others = Vec::new();
    for seed in 0..3 {
        let client = TestNode::start(170 + seed, |config| config.listen.clear()).await;
        let streams = talk(&client, "/quic-v1").await;
        assert!(streams.is_some(), "{seed}");
        others.push((client, streams));
    }
    assert_eq!((refused("limit"), refused("gave-way")), (2, 3));
    // Whoever was there first still is.
    let first = server.connected_peers().await.unwrap();
    assert!(crowd.iter().take(11).all(|(client, _)| first.contains(&client.peer_id())), "{first:?}");
    let told = server.turned_away().unwrap();
    assert!(told.contains("from 127.0.0.1 over TCP gave way"), "{told}");
    for (client, streams) in crowd.into_iter().chain(others) {
        drop(streams);
        client.stop().await;
    }
    server.stop().await;
}

async fn says_and_hears((there, here): &mut (node::Stream, node::Stream)) {
    there.write_all(b"1").await.unwrap();
    there.flush().await.unwrap();
    within(here.read_u8()).await.unwrap();
}

/// Every command of one home is a program of its own with the same key. As many of them as a seeder gives deliveries to
/// stay connected, whatever transport they came over.
#[tokio::test]
async fn programs_with_one_key_do_not_cut_each_other_off() {
    let server = TestNode::on_both(140).await;
    let mut accept = server.accept(GOODS, AcceptLimits { queue: 8, per_peer: 64 }).await.unwrap();
    let mut running = Vec::new();
    for n in 0..8 {
        let client = TestNode::start(141, |config| config.listen.clear()).await;
        let at = if n % 2 == 0 { server.only("tcp") } else { server.at.clone() };
        within(client.connect(&server.only("quic"), LIMIT)).await.unwrap();
        let mut stream = within(client.open(&at, GOODS, LIMIT)).await.unwrap();
        stream.write_all(b"1").await.unwrap();
        stream.flush().await.unwrap();
        let mut inbound = within(accept.next()).await.unwrap();
        within(inbound.read_u8()).await.unwrap();
        running.push((client, (stream, inbound)));
    }
    for (_, streams) in &mut running {
        says_and_hears(streams).await;
    }
    for (client, _) in running {
        client.stop().await;
    }
    server.stop().await;
}

/// Where goods flow on all that a peer may have, the next is refused by name, and let in as soon as one of them rests.
#[tokio::test]
async fn a_connection_with_goods_on_it_does_not_give_way() {
    let server = TestNode::start(142, |config| config.limits.connections_per_peer = 2).await;
    let mut accept = server.accept(GOODS, AcceptLimits { queue: 8, per_peer: 64 }).await.unwrap();
    let mut running = Vec::new();
    for _ in 0..2 {
        let client = TestNode::start(143, |config| config.listen.clear()).await;
        let mut stream = within(client.open(&server.at, GOODS, LIMIT)).await.unwrap();
        stream.write_all(b"1").await.unwrap();
        stream.flush().await.unwrap();
        let mut inbound = within(accept.next()).await.unwrap();
        within(inbound.read_u8()).await.unwrap();
        running.push((client, (stream, inbound)));
    }
    let next = TestNode::start(143, |config| config.listen.clear()).await;
    let _ = within(next.connect(&server.at, LIMIT)).await;
    let refused = "willcall_node_connections_refused_total{reason=\"limit-per-peer\"}";
    eventually(|| async { if metric(&server, refused) > 0 { Ok(()) } else { Err("not refused") } }).await;
    let told = server.turned_away().unwrap();
    assert!(told.contains(&format!("{} has 2 connections with goods on each", next.peer_id())), "{told}");
    for (_, streams) in &mut running {
        says_and_hears(streams).await;
    }
    // One whose cable was pulled: it is not told, and a newer stream took the delivery over.
    let (lost, (_kept, inbound)) = running.remove(0);
    drop(inbound);
    let comes_in = async {
        loop {
            // A connection that is refused is told so only after the handshake.
            let Ok(mut stream) = next.open(&server.at, GOODS, LIMIT).await else { continue };
            if stream.write_all(b"1").await.is_err() || stream.flush().await.is_err() {
                continue;
            }
            tokio::select! {
                inbound = accept.next() => return (stream, inbound.unwrap()),
                ended = stream.read_u8() => drop(ended.unwrap_err()),
            }
        }
    };
    let (_stream, mut inbound) = within(comes_in).await;
    within(inbound.read_u8()).await.unwrap();
    for (_, streams) in &mut running {
        says_and_hears(streams).await;
    }
    for client in running.into_iter().map(|(client, _)| client).chain([lost, next]) {
        client.stop().await;
    }
    server.stop().await;
}
