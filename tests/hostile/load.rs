//! Many at once on one machine's seeder: what two hundred deliveries cost it in memory, with the real process and two
//! hundred real connections.

use std::fs;
use std::sync::Arc;

use client_node::{BuyRequest, Home, buy};
use futures::StreamExt;
use node::{Node, NodeConfig, Protocol, Supervisor, read_message, write_message};
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::receipt::{Ack, DeliveryId};
use protocol::ticket::Ticket;
use protocol::{Address, ChunkSet, Keypair, NetworkId, PeerAddrs, Signed};
use tokio::io::AsyncReadExt;
use tokio::sync::Barrier;

use super::support::{LIMIT, Network, args, bytes, text};

/// Clients at once.
const CLIENTS: u64 = 200;
/// Chunks of 1 MiB: enough that windows are wide open before the end.
const CHUNKS: u32 = 12;
/// After so many every client stops reading until all have as many.
const HALF: u32 = 6;
/// The most that the seeder may have resident, KiB.
const MOST_KIB: u64 = 400 * 1024;

/// Clients being let in at once.
static DOOR: tokio::sync::Semaphore = tokio::sync::Semaphore::const_new(16);

/// TCP, which is what clients prefer for goods.
#[test]
fn two_hundred_clients_at_once_cost_a_seeder_less_than_400_mib() {
    two_hundred_over("/tcp/");
}

/// Clients whose network lets no TCP through.
#[test]
fn two_hundred_clients_at_once_over_quic_cost_a_seeder_less_than_400_mib() {
    two_hundred_over("/udp/");
}

/// Moves 2.4 GB over loopback: only when asked for.
fn two_hundred_over(transport: &str) {
    if std::env::var_os("WILLCALL_BIG_TESTS").is_none() {
        eprintln!("left out: set WILLCALL_BIG_TESTS=1 to serve 200 clients at once");
        return;
    }
    let mut network = Network::start_with(0, 1);
    // Who stops reading is not to be sent away while the last ones catch up.
    network.add_seeder("seeder-1", &["write-ms=900000", "idle-ms=900000", "window-wait-ms=900000"]);
    network.seeders = 1;
    let path = network.path("goods.bin");
    fs::write(&path, bytes(1, (CHUNKS as usize - 1) << 20)).unwrap();
    let product = network.publish(&path, &["--chunk-size", "1MiB", "--rate", "1000"]);
    let issued = network.of("merchant", args!["vouchers", "issue", "5000.00", "--currency", "USD"]).ok();
    let voucher = issued["codes"][0].as_str().unwrap().to_owned();
    let seeder = &network.daemons["seeder-1"];
    let mut addresses = seeder.ready["addresses"].as_array().unwrap().iter().map(|address| address.as_str().unwrap());
    let address: Address = addresses.find(|address| address.contains(transport)).unwrap().parse().unwrap();
    let at = PeerAddrs::new(text(&seeder.ready, "peer").parse().unwrap(), vec![address]);
    let before = seeder.memory_kib("VmRSS:");

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (stalled, sent) = runtime.block_on(async {
        let home = Home::open(&network.path("buyer"), None).unwrap();
        let request = |client: &Keypair| BuyRequest {
            merchant_url: network.shop(),
            product: text(&product, "product").parse().unwrap(),
            provider: "prepaid".to_owned(),
            token: voucher.clone(),
            client: Some(client.peer_id()),
            idempotency_key: None,
            place: None,
            wait: LIMIT,
        };
        let keys = (0..CLIENTS).map(|n| Keypair::from_seed(&blake3::hash(&n.to_le_bytes()).into()));
        let bought = futures::stream::iter(keys).map(|key| {
            let (home, request) = (&home, request(&key));
            async move { (key, Box::pin(buy(home, request)).await.unwrap().ticket.unwrap().ticket) }
        });
        let bought: Vec<(Keypair, Ticket)> = bought.buffer_unordered(8).collect().await;

        let (half, all) = (Arc::new(Barrier::new(CLIENTS as usize + 1)), Arc::new(Barrier::new(CLIENTS as usize + 1)));
        let clients: Vec<_> = bought
            .into_iter()
            .map(|(key, ticket)| tokio::spawn(take(key, ticket, at.clone(), Arc::clone(&half), Arc::clone(&all))))
            .collect();
        // Everybody is there, has had half, and reads no more: the seeder holds what it would like to send.
        tokio::time::timeout(LIMIT, half.wait()).await.expect("not everybody had half");
        let status = network.of("seeder-1", args!["status"]).ok();
        assert_eq!(status["deliveries"].as_u64(), Some(CLIENTS), "{status}");
        let stalled = network.daemons["seeder-1"].memory_kib("VmRSS:");
        tokio::time::timeout(LIMIT, all.wait()).await.expect("not everybody went on");
        let mut sent = 0;
        for client in clients {
            sent += client.await.unwrap();
        }
        (stalled, sent)
    });
    assert_eq!(sent, CLIENTS * u64::from(CHUNKS));
    let peak = network.daemons["seeder-1"].memory_kib("VmHWM:");
    eprintln!(
        "200 clients at once over {transport}, {} MiB each: the seeder's resident memory was {} MiB before, {} MiB with all of them stalled, {} \
         MiB at its peak",
        CHUNKS,
        before / 1024,
        stalled / 1024,
        peak / 1024
    );
    assert!(peak < MOST_KIB, "{peak} KiB");
}

/// One client: half of it, a pause until everybody has as much, and the rest. Gives how many chunks came.
async fn take(key: Keypair, ticket: Ticket, seeder: PeerAddrs, half: Arc<Barrier>, all: Arc<Barrier>) -> u64 {
    let supervisor = Supervisor::new();
    let config = NodeConfig { gossip: false, ..NodeConfig::new(key.clone()) };
    let node = Box::pin(Node::start(config, &supervisor)).await.unwrap();
    // Clients come one after the other as fast as they are let in, and stay together.
    let door = DOOR.acquire().await.unwrap();
    let mut stream = node.open(&seeder, Protocol::new(protocol::deliver::PROTOCOL), LIMIT).await.unwrap();
    let (data, lease) = (ticket.data.peek().unwrap(), ticket.lease.peek().unwrap());
    let network: NetworkId = data.network;
    let delivery = DeliveryId { transaction: data.transaction, delivery: lease.delivery };
    let credential = Credential::Ticket(Box::new(ticket));
    write_message(&mut stream, &ClientMessage::Hello { credential, last_ack: None }).await.unwrap();
    write_message(&mut stream, &ClientMessage::Want { chunks: ChunkSet::from_range(0..CHUNKS) }).await.unwrap();
    let (mut got, mut bytes, mut door) = (ChunkSet::new(), Vec::new(), Some(door));
    while got.len() < CHUNKS {
        match read_message::<SeederMessage, _>(&mut stream).await.unwrap() {
            Some(SeederMessage::Chunk { index, length }) => {
                bytes.resize(length as usize, 0);
                stream.read_exact(&mut bytes).await.unwrap();
                got.insert(index);
                let (chunks, seeder) = (got.clone(), seeder.peer);
                let ack = Ack { network, delivery, manifest: data.manifest, seeder, chunks, at: lease.start };
                write_message(&mut stream, &ClientMessage::Ack(Signed::sign(&ack, &key))).await.unwrap();
                if got.len() == HALF {
                    half.wait().await;
                    all.wait().await;
                }
            }
            Some(SeederMessage::Refusal(refusal)) => panic!("{refusal}"),
            Some(SeederMessage::Welcome { .. }) => drop(door.take()),
            Some(_) => {}
            None => panic!("the stream ended after {} chunks", got.len()),
        }
    }
    let last = ClientMessage::Finish { ack: None, completion: None };
    write_message(&mut stream, &last).await.unwrap();
    supervisor.shutdown(LIMIT).await.unwrap();
    u64::from(got.len())
}
