//! Streams between nodes: over which connection, how many, and what becomes of those that cannot be had.

use std::collections::BTreeMap;

use node::{AcceptLimits, OpenError, Protocol, Transport};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

const ECHO: Protocol = Protocol::new("/test/echo/1");
const GREET: Protocol = Protocol::new("/test/greet/1");
const WIDE: AcceptLimits = AcceptLimits { queue: 64, per_peer: 64 };

/// The kind that moves goods.
const GOODS: Protocol = Protocol::bulk("/test/goods/1");

/// Sends back all that comes on each stream.
async fn serve_echo(node: &TestNode, limits: AcceptLimits) {
    let mut accept = node.accept(ECHO, limits).await.unwrap();
    let (supervisor, token) = (node.supervisor.clone(), node.supervisor.token());
    node.supervisor.spawn("echo", async move {
        while let Some(stream) = accept.next().await {
            let token = token.clone();
            supervisor.spawn("echo stream", async move {
                let (mut reader, mut writer) = tokio::io::split(stream);
                tokio::select! {
                    _ = tokio::io::copy(&mut reader, &mut writer) => { let _ = writer.shutdown().await; }
                    () = token.cancelled() => {}
                }
            });
        }
    });
}

#[tokio::test]
async fn streams_run_over_tcp_and_quic_and_say_so() {
    let a = TestNode::on_both(1).await;
    for (seed, listen, transport) in [(2, TCP, Transport::Tcp), (3, QUIC, Transport::Quic)] {
        let b = TestNode::start(seed, |config| config.listen = vec![Address::new(listen).unwrap()]).await;
        serve_echo(&b, WIDE).await;
        let mut stream = a.open(&b.at, ECHO, LIMIT).await.unwrap();
        assert_eq!(stream.info().transport, transport);
        assert!(!stream.info().relayed);
        assert_eq!(stream.peer(), b.at.peer);
        assert_eq!(stream.protocol(), ECHO);
        let sent = vec![7; 300_000];
        let (mut reader, mut writer) = tokio::io::split(&mut stream);
        let write = async {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let mut back = Vec::new();
        let (read, ()) = within(async { tokio::join!(reader.read_to_end(&mut back), write) }).await;
        read.unwrap();
        assert_eq!(back, sent);
        drop(stream);
        b.stop().await;
    }
    a.stop().await;
}

#[tokio::test]
async fn tcp_is_preferred_and_an_existing_connection_is_used() {
    let (a, b) = (TestNode::on_both(3).await, TestNode::on_both(4).await);
    serve_echo(&b, WIDE).await;
    let first = a.open(&b.at, ECHO, LIMIT).await.unwrap();
    assert_eq!(first.info().transport, Transport::Tcp);
    // No address is given: only the connection that is there can serve this.
    let second = a.open(&b.at.peer.into(), ECHO, LIMIT).await.unwrap();
    assert_eq!(second.info().id, first.info().id);
    // And the accepting side can open streams over it, although `a`'s port for this connection is nobody's.
    serve_echo(&a, WIDE).await;
    let back = b.open(&a.at.peer.into(), ECHO, LIMIT).await.unwrap();
    assert_eq!(back.peer(), a.at.peer);
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_service_that_speaks_first_sees_the_stream_at_once() {
    let (a, b) = (TestNode::start(5, |_| {}).await, TestNode::start(6, |_| {}).await);
    let mut accept = b.accept(GREET, WIDE).await.unwrap();
    let mut stream = a.open(&b.at, GREET, LIMIT).await.unwrap();
    let mut inbound = within(accept.next()).await.unwrap();
    assert_eq!(inbound.peer(), a.at.peer);
    inbound.write_all(b"hello").await.unwrap();
    inbound.flush().await.unwrap();
    let mut greeting = [0; 5];
    within(stream.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"hello");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_protocol_nobody_speaks_has_a_name() {
    let (a, b) = (TestNode::start(7, |_| {}).await, TestNode::start(8, |_| {}).await);
    let error = match a.open(&b.at, ECHO, LIMIT).await {
        Ok(mut stream) => within(stream.read_u8()).await.unwrap_err().to_string(),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("does not speak /test/echo/1"), "{error}");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn an_address_that_is_known_from_before_too_is_named_once() {
    let (a, b) = (TestNode::start(11, |_| {}).await, TestNode::start(12, |_| {}).await);
    let at = b.at.clone();
    // Whatever comes of it: the node knows the address from here on by itself.
    let _ = within(a.open(&at, ECHO, LIMIT)).await;
    b.stop().await;
    let failed = async {
        loop {
            match a.open(&at, ECHO, LIMIT).await {
                Err(error @ OpenError::Dial { .. }) => return error.to_string(),
                // Over the connection of before, until that is seen to be gone.
                Ok(_) | Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    let error = within(failed).await;
    let reasons: Vec<&str> = error.split("; ").collect();
    for reason in &reasons {
        assert_eq!(reasons.iter().filter(|other| other == &reason).count(), 1, "{error}");
    }
    a.stop().await;
}

#[tokio::test]
async fn dead_addresses_and_wrong_peers_fail_by_name_within_the_limit() {
    let (a, b) = (TestNode::start(9, |_| {}).await, TestNode::start(10, |_| {}).await);
    let nobody = Keypair::from_seed(&[99; 32]).peer_id();

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let dead = Address::new(&format!("/ip4/127.0.0.1/tcp/{port}")).unwrap();
    let error = within(a.open(&PeerAddrs::new(nobody, vec![dead]), ECHO, LIMIT)).await.unwrap_err();
    assert!(matches!(&error, OpenError::Dial { reason, .. } if reason.contains("refused")), "{error}");
    assert!(!error.to_string().contains("/p2p/"), "{error}");

    let error = within(a.open(&nobody.into(), ECHO, LIMIT)).await.unwrap_err();
    assert!(matches!(&error, OpenError::Dial { reason, .. } if reason.contains("no address")), "{error}");

    let error = within(a.open(&PeerAddrs::new(nobody, b.at.addrs.clone()), ECHO, LIMIT)).await.unwrap_err();
    assert!(matches!(&error, OpenError::Dial { reason, .. } if reason.contains(&b.at.peer.to_string())), "{error}");

    let error = a.open(&a.at, ECHO, LIMIT).await.unwrap_err();
    assert!(matches!(error, OpenError::Myself));

    // Takes connections and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let mute = PeerAddrs::new(nobody, vec![Address::new(&format!("/ip4/127.0.0.1/tcp/{port}")).unwrap()]);
    let begin = std::time::Instant::now();
    let limit = Duration::from_millis(500);
    let error = a.open(&mute, ECHO, limit).await.unwrap_err();
    assert!(matches!(error, OpenError::Timeout { .. }), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(10));
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn requests_at_once_are_bounded_and_cancelled_by_dropping() {
    let a = TestNode::start(11, |config| {
        config.limits.pending_opens = 3;
        config.connection_timeout = Duration::from_secs(2);
    })
    .await;
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let mute = |n: u8| {
        let address = Address::new(&format!("/ip4/127.0.0.1/tcp/{port}")).unwrap();
        PeerAddrs::new(Keypair::from_seed(&[100 + n; 32]).peer_id(), vec![address])
    };
    let waiting: Vec<_> = (0..3)
        .map(|n| {
            let (handle, target) = (a.handle.clone(), mute(n));
            tokio::spawn(async move { handle.open(&target, ECHO, LIMIT).await })
        })
        .collect();
    eventually(|| async {
        match a.open(&mute(3), ECHO, Duration::from_millis(10)).await {
            Err(OpenError::Busy { limit: 3 }) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    for task in waiting {
        task.abort();
    }
    // The places come back at the latest when the dials of the cancelled requests end.
    eventually(|| async {
        match a.open(&mute(3), ECHO, Duration::from_millis(10)).await {
            Err(OpenError::Timeout { .. }) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    a.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_opens_from_fifty_peers_are_each_served_or_named() {
    let limits = AcceptLimits { queue: 8, per_peer: 6 };
    let server = TestNode::start(20, |_| {}).await;
    serve_echo(&server, limits).await;
    let mut clients = Vec::new();
    for n in 0..50 {
        clients.push(TestNode::start(120 + n, |config| config.listen.clear()).await);
    }
    let mut attempts = tokio::task::JoinSet::new();
    for client in &clients {
        for _ in 0..10 {
            let (handle, target) = (client.handle.clone(), server.at.clone());
            attempts.spawn(async move {
                let mut stream = match handle.open(&target, ECHO, LIMIT).await {
                    Ok(stream) => stream,
                    Err(OpenError::Dial { .. }) => return "dial",
                    Err(OpenError::Closed { .. }) => return "closed",
                    Err(error) => panic!("{error}"),
                };
                let exchange = async {
                    stream.write_all(b"ping").await?;
                    stream.shutdown().await?;
                    let mut back = Vec::new();
                    stream.read_to_end(&mut back).await.map(|_| back)
                };
                match exchange.await {
                    Ok(back) if back == b"ping" => "served",
                    Ok(_) => "reset",
                    Err(_) => "reset",
                }
            });
        }
    }
    let mut outcomes = BTreeMap::new();
    within(async {
        while let Some(outcome) = attempts.join_next().await {
            *outcomes.entry(outcome.unwrap()).or_insert(0) += 1;
        }
    })
    .await;
    assert_eq!(outcomes.values().sum::<u32>(), 500, "{outcomes:?}");
    let served = u64::from(outcomes["served"]);
    assert!(served >= limits.queue as u64, "{outcomes:?}");
    assert_eq!(served + u64::from(*outcomes.get("reset").unwrap_or(&0)), 500, "{outcomes:?}");
    // Each stream reached the server and is accounted for there, by name.
    let count = |name: &str, labels: &str| {
        metric(&server, &format!("willcall_node_streams_{name}_total{{protocol=\"/test/echo/1\"{labels}}}"))
    };
    assert_eq!(count("accepted", ""), served, "{outcomes:?}");
    let dropped = count("dropped", ",reason=\"queue-full\"") + count("dropped", ",reason=\"per-peer\"");
    assert_eq!(dropped, 500 - served, "{outcomes:?}");
    // Nothing is left over: the same peers get as many streams as before.
    eventually(|| async { if server.supervisor.running("echo stream") == 0 { Ok(()) } else { Err("streams left") } })
        .await;
    let mut streams = Vec::new();
    for _ in 0..limits.per_peer {
        let mut stream = clients[0].open(&server.at, ECHO, LIMIT).await.unwrap();
        stream.write_all(b"!").await.unwrap();
        stream.flush().await.unwrap();
        assert_eq!(within(stream.read_u8()).await.unwrap(), b'!');
        streams.push(stream);
    }
    assert_eq!(server.supervisor.running("echo stream"), limits.per_peer);
    for client in clients {
        client.stop().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn goods_wait_for_tcp_where_only_quic_was_there() {
    let (a, b) = (TestNode::on_both(5).await, TestNode::on_both(6).await);
    let mut goods = b.accept(GOODS, WIDE).await.unwrap();
    serve_echo(&b, WIDE).await;
    let small = a.open(&b.only("/quic-v1"), ECHO, LIMIT).await.unwrap();
    assert_eq!(small.info().transport, Transport::Quic);
    // Small talk goes on over what is there; goods wait until TCP is there as well, all that come at once.
    let (one, two) = tokio::join!(a.open(&b.at, GOODS, LIMIT), a.open(&b.at, GOODS, LIMIT));
    let (one, two) = (one.unwrap(), two.unwrap());
    assert_eq!((one.info().transport, two.info().id), (Transport::Tcp, one.info().id));
    within(goods.next()).await.unwrap();
    within(goods.next()).await.unwrap();
    a.stop().await;
    b.stop().await;

    // Where TCP leads nowhere they go over QUIC.
    let a = TestNode::on_both(7).await;
    let b = TestNode::start(8, |config| config.listen = vec![Address::new(QUIC).unwrap()]).await;
    let _goods = b.accept(GOODS, WIDE).await.unwrap();
    a.connect(&b.at, LIMIT).await.unwrap();
    let mut at = b.at.clone();
    at.addrs.push(Address::new("/ip4/127.0.0.1/tcp/1").unwrap());
    for _ in 0..2 {
        let stream = a.open(&at, GOODS, LIMIT).await.unwrap();
        assert_eq!(stream.info().transport, Transport::Quic);
    }
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_peers_that_come_in_the_same_instant_are_all_let_in() {
    let server = TestNode::on_both(150).await;
    serve_echo(&server, AcceptLimits { queue: 256, per_peer: 4 }).await;
    for road in ["/tcp/", "/quic-v1", "/"] {
        let mut clients = Vec::new();
        for n in 0..200u32 {
            let key = Keypair::from_seed(&seed_of(n, road));
            let supervisor = Supervisor::new();
            let handle = Node::start(NodeConfig { gossip: false, ..NodeConfig::new(key) }, &supervisor).await.unwrap();
            clients.push((handle, supervisor));
        }
        let at = server.only(road);
        let opened = clients.iter().map(|(client, _)| client.open(&at, ECHO, LIMIT));
        let failed: Vec<_> = futures::future::join_all(opened).await.into_iter().filter_map(Result::err).collect();
        assert!(failed.is_empty(), "{road}: {} of 200: {:?}", failed.len(), failed.first());
        for (_, supervisor) in clients {
            supervisor.shutdown(LIMIT).await.unwrap();
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn one_peer_cannot_hold_more_than_its_share() {
    let (a, b) = (TestNode::start(50, |_| {}).await, TestNode::start(51, |_| {}).await);
    let mut accept = b.accept(GREET, AcceptLimits { queue: 16, per_peer: 2 }).await.unwrap();
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(a.open(&b.at, GREET, LIMIT).await.unwrap());
    }
    let dropped = "willcall_node_streams_dropped_total{protocol=\"/test/greet/1\",reason=\"per-peer\"}";
    eventually(|| async { if metric(&b, dropped) == 1 { Ok(()) } else { Err("not dropped") } }).await;
    let held = [within(accept.next()).await.unwrap(), within(accept.next()).await.unwrap()];
    drop(held);
    // Streams that ended no longer count.
    let _fourth = a.open(&b.at, GREET, LIMIT).await.unwrap();
    assert!(within(accept.next()).await.is_some());
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn services_learn_that_the_node_stopped() {
    let (a, b) = (TestNode::start(52, |_| {}).await, TestNode::start(53, |_| {}).await);
    let mut accept = b.accept(GREET, WIDE).await.unwrap();
    let again = b.accept(GREET, WIDE).await.unwrap_err();
    assert_eq!(again.to_string(), "/test/greet/1 is already being accepted");
    let handle = b.handle.clone();
    let mut stream = a.open(&b.at, GREET, LIMIT).await.unwrap();
    assert!(within(accept.next()).await.is_some());
    b.stop().await;
    assert!(within(accept.next()).await.is_none());
    assert!(handle.connected_peers().await.is_err());
    assert!(matches!(handle.open(&a.at, GREET, LIMIT).await, Err(OpenError::Stopped)));
    // The other end of the stream ends too, in whichever way.
    let mut rest = Vec::new();
    let _ = within(stream.read_to_end(&mut rest)).await;
    a.stop().await;
}

#[tokio::test]
async fn addresses_of_a_peer_are_remembered() {
    let (a, b) = (TestNode::start(54, |_| {}).await, TestNode::start(55, |_| {}).await);
    a.connect(&b.at, LIMIT).await.unwrap();
    assert_eq!(a.connected_peers().await.unwrap(), [b.at.peer]);
    let known = a.known_addresses(b.at.peer).await.unwrap();
    assert_eq!(known, b.at);
    // What identify told about `a` lets `b` reach it again, without being given an address.
    eventually(|| async {
        let known = b.known_addresses(a.at.peer).await.unwrap();
        if known == a.at { Ok(()) } else { Err(known) }
    })
    .await;
    b.disconnect(a.at.peer).await.unwrap();
    eventually(|| async { if b.is_connected(a.at.peer).await.unwrap() { Err("connected") } else { Ok(()) } }).await;
    b.connect(&a.at.peer.into(), LIMIT).await.unwrap();
    a.stop().await;
    b.stop().await;
}

fn seed_of(n: u32, road: &str) -> [u8; 32] {
    let mut seed = [road.len() as u8; 32];
    seed[..4].copy_from_slice(&n.to_le_bytes());
    seed
}
