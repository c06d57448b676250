//! Noise from strangers: on every port, on every protocol behind a good handshake, with lengths that lie. Every node has
//! to go on, in bounded memory, and the next sale has to go through.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::time::Duration;

use node::{Node, NodeConfig, Protocol, Supervisor};
use protocol::api::{MAILBOX_PROTOCOL, MESH_PROTOCOL, SALES_PROTOCOL, SEEDER_PROTOCOL};
use protocol::{Address, Keypair, PeerAddrs};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::support::{Network, args, bytes, same, until};

const PROTOCOLS: [&str; 5] =
    [protocol::deliver::PROTOCOL, SALES_PROTOCOL, MAILBOX_PROTOCOL, MESH_PROTOCOL, SEEDER_PROTOCOL];
/// What a node may grow by under all of this, KiB.
const GROWTH: u64 = 64 * 1024;
/// Longer than any node waits for a message that does not come.
const PATIENCE: Duration = Duration::from_secs(30);

fn addresses(ready: &Value) -> Vec<String> {
    ready["addresses"].as_array().unwrap().iter().map(|a| a.as_str().unwrap().to_owned()).collect()
}

/// `/ip4/127.0.0.1/tcp/4601` -> 4601
fn port(address: &str) -> u16 {
    address.split('/').nth(4).unwrap().parse().unwrap()
}

/// Noise that gets further the higher the round: none of a handshake, some of it, most of it.
fn tcp_noise(port: u16, http: bool) {
    let openings: &[&[u8]] = if http {
        &[
            b"",
            b"GET /",
            b"POST /v1/purchases HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\nIdempotency-Key: k\r\n\r\n",
            b"POST /v1/purchases HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\nIdempotency-Key: k\r\n\r\nffffffff\r\n",
        ]
    } else {
        &[
            b"",
            b"\x13/multistream/1.0.0\n",
            b"\x13/multistream/1.0.0\n\x0b/tls/1.0.0\n",
            b"\x13/multistream/1.0.0\n\x07/noise\n\xff\xff",
            b"\xff\xff\xff\xff\x0f",
        ]
    };
    for round in 0..20_u64 {
        for opening in openings {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let noise = [opening, bytes(round, 1 + round as usize * 997).as_slice()].concat();
            // The node may hang up in the middle: that is its good right.
            let _ = stream.write_all(&noise);
            let _ = stream.shutdown(Shutdown::Write);
            let mut answer = Vec::new();
            let _ = stream.take(1 << 20).read_to_end(&mut answer);
        }
    }
    let mut long = TcpStream::connect(("127.0.0.1", port)).unwrap();
    for part in 0..256 {
        if long.write_all(&bytes(part, 64 * 1024)).is_err() {
            break;
        }
    }
}

/// Noise on streams whose handshake is good.
async fn stream_noise(ready: &Value, number: u64) {
    let supervisor = Supervisor::new();
    let keypair = Keypair::from_seed(&[number as u8 + 100; 32]);
    let node = Node::start(NodeConfig { gossip: false, ..NodeConfig::new(keypair) }, &supervisor).await.unwrap();
    let listed = addresses(ready).iter().map(|a| Address::new(a).unwrap()).collect();
    let at = PeerAddrs::new(ready["peer"].as_str().unwrap().parse().unwrap(), listed);
    for protocol in PROTOCOLS {
        for round in 0..16_u64 {
            let length: &[u8] = match round % 8 {
                0 => &[0xff; 4],
                1 => &[0xff; 10],
                2 => &[0x00, 0x00, 0x00, 0x00],
                3 => &[0x00, 0x01, 0x00, 0x00],
                4 => &[0x00, 0x00, 0x00, 0x20],
                5 => &[0x7f, 0xff, 0xff, 0xff],
                6 => &[0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
                _ => &[],
            };
            // Not every node speaks each of them, and one that is full may say no.
            let Ok(mut stream) = node.open(&at, Protocol::new(protocol), PATIENCE).await else { continue };
            let noise = [length, bytes(round, 1 + round as usize * 4000).as_slice()].concat();
            let _ = timeout(PATIENCE, stream.write_all(&noise)).await;
            // Half of them hang up, the others only stop talking, and are let go with the connection.
            if round < 8 {
                let _ = stream.shutdown().await;
                let mut answer = Vec::new();
                let mut bounded = (&mut stream).take(1 << 20);
                let read = timeout(PATIENCE, bounded.read_to_end(&mut answer)).await;
                assert!(read.is_ok(), "{protocol}: a stream that ended in noise is still open");
            }
        }
        // A length of the largest kind with all the bytes that it promises, as fast as they are taken.
        let Ok(mut stream) = node.open(&at, Protocol::new(protocol), PATIENCE).await else { continue };
        let _ = stream.write_all(&u32::MAX.to_be_bytes()).await;
        for part in 0..512 {
            let block = bytes(part, 64 * 1024);
            match timeout(Duration::from_secs(2), stream.write_all(&block)).await {
                Ok(Ok(())) => {}
                // Closed, or not read any further.
                _ => break,
            }
        }
    }
    supervisor.shutdown(Duration::from_secs(10)).await.unwrap();
}

#[test]
fn noise_on_every_port_and_protocol_disturbs_nobody() {
    let mut network = Network::start(1);
    let file = network.path("song");
    fs::write(&file, bytes(1, 400_000)).unwrap();
    let product = network.publish(&file, &[]);
    network.buy(&product, "warm-up").fetch(&network.path("warm-up-goods"));
    let before: Vec<(String, u64)> =
        network.daemons.iter().map(|(name, daemon)| (name.clone(), daemon.memory_kib("VmRSS:"))).collect();

    let mut ready: Vec<Value> = network.daemons.values().map(|daemon| daemon.ready.clone()).collect();
    let seeders = network.of("manager", args!["seeders"]).ok();
    ready.extend(seeders["seeders"].as_array().unwrap().iter().filter(|s| s["origin"] == true).cloned());
    std::thread::scope(|scope| {
        for node in &ready {
            scope.spawn(move || {
                for address in addresses(node) {
                    if address.contains("/tcp/") {
                        tcp_noise(port(&address), false);
                    } else {
                        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                        for round in 0..2000_u64 {
                            let mut noise = bytes(round, 1 + (round as usize * 29) % 1400);
                            // Long headers of QUIC version 1, sometimes of none.
                            noise[0] |= 0xc0;
                            if noise.len() > 1200 && round % 2 == 0 {
                                noise[1..5].copy_from_slice(&[0, 0, 0, 1]);
                            }
                            let _ = socket.send_to(&noise, ("127.0.0.1", port(&address)));
                        }
                    }
                }
            });
        }
    });
    let shop = network.shop();
    tcp_noise(shop.rsplit(':').next().unwrap().parse().unwrap(), true);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        for (number, node) in ready.iter().enumerate() {
            stream_noise(node, number as u64).await;
        }
    });

    for (name, before) in before {
        let daemon = network.daemons.get_mut(&name).unwrap();
        assert!(daemon.is_running(), "{name} ended");
        let status = network.of(&name, args!["status"]).ok();
        assert_eq!(status["role"], if name == "seeder-1" { "seeder" } else { name.as_str() }, "{status}");
        let log = fs::read_to_string(network.path(&format!("{name}.log"))).unwrap();
        assert!(!log.contains("panicked"), "{name}: {log}");
        until(&format!("{name} in bounded memory"), || {
            (network.daemons[&name].memory_kib("VmRSS:") < before + GROWTH).then_some(())
        });
    }
    let bought = network.buy(&product, "client");
    let (_, arrived) = bought.fetch(&network.path("goods"));
    same(&file, &arrived);
    network.settled(&bought.transaction);
    network.assert_books();
}
