//! The same fetch over real sockets: what a pair of streams in memory cannot show is half-closed connections, protocol
//! negotiation and peers that are proved by a handshake.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod fixture;

use std::sync::Arc;
use std::time::Duration;

use fixture::seeders::{DELIVER, TestSeeder, Vice};
use fixture::{CHUNK, LIMIT, World, keypair};
use node::{AcceptLimits, Node, NodeConfig, NodeHandle, Supervisor};
use protocol::{Address, Keypair, PeerAddrs};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use willcall_delivery::{AckMemory, ContentStore, FetchJob, FetchLimits, Progress, fetch};

async fn start(keypair: Keypair, supervisor: &Supervisor) -> NodeHandle {
    let mut config = NodeConfig::new(keypair);
    config.listen = vec![Address::new("/ip4/127.0.0.1/tcp/0").unwrap()];
    config.gossip = false;
    Node::start(config, supervisor).await.unwrap()
}

async fn serve(seeder: &Arc<TestSeeder>, supervisor: &Supervisor) -> PeerAddrs {
    let node = start(seeder.keypair.clone(), supervisor).await;
    let mut streams = node.accept(DELIVER, AcceptLimits { queue: 16, per_peer: 4 }).await.unwrap();
    let (seeder, token) = (Arc::clone(seeder), supervisor.token());
    let tasks = supervisor.clone();
    supervisor.spawn("seeder", async move {
        while let Some(stream) = streams.next().await {
            let (seeder, token) = (Arc::clone(&seeder), token.clone());
            tasks.spawn("delivery", async move {
                tokio::select! {
                    () = seeder.serve(stream) => {}
                    () = token.cancelled() => {}
                }
            });
        }
    });
    node.peer_addrs().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_product_comes_over_tcp_from_two_good_seeders_a_bad_one_and_a_dead_address() {
    let supervisor = Supervisor::new();
    let world = Arc::new(World::new());
    let product = Arc::new(world.product(200 * CHUNK + 1));
    let vices = [Vice::None, Vice::Leaves(20), Vice::Corrupts(1)];
    let seeders: Vec<_> =
        (1u8..).zip(vices).map(|(n, vice)| Arc::new(TestSeeder::new(n, &world, &product, vice))).collect();
    let mut sources = vec![PeerAddrs::new(keypair(99).peer_id(), vec![Address::new("/ip4/127.0.0.1/tcp/1").unwrap()])];
    for seeder in &seeders {
        sources.push(serve(seeder, &supervisor).await);
    }
    let client = keypair(50);
    let (credential, delivery) = world.order(client.peer_id(), product.digest);
    let folder = tempfile::tempdir().unwrap();
    let store = ContentStore::open(folder.path()).unwrap();
    let mut limits = FetchLimits::default();
    limits.scheduler.backoff_ms = 20;
    let job = FetchJob {
        connect: Arc::new(start(client.clone(), &supervisor).await),
        store: store.clone(),
        manifest: product.digest,
        only: None,
        credential: tokio::sync::watch::channel(credential).1,
        delivery,
        keypair: client,
        sources,
        banned: Vec::new(),
        more_sources: None,
        trust: Arc::clone(&world.trust),
        revoked: Arc::clone(&world.revoked),
        acks: Arc::new(AckMemory::default()),
        progress: watch::Sender::new(Progress::default()),
        adopted: Arc::default(),
        limits,
        cancel: CancellationToken::new(),
    };
    let report = tokio::time::timeout(LIMIT, Box::pin(fetch(job))).await.expect("it hangs").unwrap();
    product.assert_equals(&store.get(&product.digest).unwrap());
    assert_eq!(report.chunks, 201);
    assert!(seeders[0].completed(delivery));
    for seeder in &seeders {
        let of_seeder = report.sources.iter().find(|source| source.peer == seeder.peer()).unwrap();
        assert!(seeder.acked(delivery).len() <= seeder.sent());
        assert_eq!(of_seeder.banned, matches!(seeder.vice, Vice::Corrupts(_)) && seeder.sent() > 1);
    }
    supervisor.shutdown(Duration::from_secs(10)).await.unwrap();
}
