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
