//! What one gossiped receipt costs each member of the mesh, in bytes over its connections, as the network grows and
//! the number of shards with it. Every run has 50 members, who carry all shards, and 84, who carry four of seven, so that it
//! is seen to grow or not; `WILLCALL_GROWTH=1` has 50, 100 and 200, for `docs/scale.md`:
//! `WILLCALL_GROWTH=1 cargo test -p willcall-node --test node gossip_growth -- --nocapture`

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use node::PublishError;
use protocol::NetworkId;
use protocol::api::{receipts_topic, receipts_topic_of_shard, shards_carried};

use super::*;

const NETWORK: NetworkId = NetworkId::from_bytes([7; 32]);
/// Connections that each member opens to others of each shard that it carries; as many come from others.
const DIALS: usize = 3;
/// Members for each shard, at every size.
const MEMBERS_A_SHARD: usize = 12;
/// A batch of 16 receipts, each with an acknowledgement of a few ranges, and its seeder's certificate.
const BATCH: usize = 5 * 1024;
const RECEIPTS: usize = 16;
/// Batches on their way at a time.
const AT_ONCE: usize = 10;
/// Of a hundred members, so many have to hear of a batch for a round to be taken: gossip promises no more.
const ENOUGH: usize = 98;

struct Member {
    node: TestNode,
    shards: Vec<u16>,
}

/// What one round of batches, one from each member, cost.
struct Cost {
    members: usize,
    shards: u16,
    /// Bytes received and sent by the average member for one receipt of the whole network …
    a_receipt: f64,
    /// … and for one that it carries.
    a_carried_receipt: f64,
}

fn key(n: usize) -> Keypair {
    let mut seed = [3; 32];
    seed[..8].copy_from_slice(&(n as u64).to_le_bytes());
    Keypair::from_seed(&seed)
}

fn traffic(members: &[Member]) -> u64 {
    let of = |member: &Member| {
        metric(&member.node, "willcall_node_tcp_received_bytes_total")
            + metric(&member.node, "willcall_node_tcp_sent_bytes_total")
    };
    members.iter().map(of).sum()
}

/// Waits until so many messages were heard; false when no more come.
async fn reached(heard: &AtomicUsize, wanted: usize) -> bool {
    let (mut newest, mut since) = (0, std::time::Instant::now());
    loop {
        let now = heard.load(Ordering::Relaxed);
        if now >= wanted {
            return true;
        }
        if now > newest {
            (newest, since) = (now, std::time::Instant::now());
        }
        if since.elapsed() > Duration::from_secs(3) {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn measure(count: usize) -> Cost {
    let shards = u16::try_from(count / MEMBERS_A_SHARD).unwrap();
    let (heard, tasks) = (Arc::new(AtomicUsize::new(0)), tokio_util::task::TaskTracker::new());
    let mut members = Vec::new();
    for n in 0..count {
        let node = TestNode::start(0, |config| config.keypair = key(n)).await;
        let carried = shards_carried(&NETWORK, &node.at.peer, shards);
        for shard in &carried {
            let mut topic = node.subscribe(&receipts_topic_of_shard(&NETWORK, *shard), 1024).await.unwrap();
            let heard = Arc::clone(&heard);
            tasks.spawn(async move {
                while let Some(message) = topic.next().await {
                    if message.data.len() == BATCH {
                        heard.fetch_add(1, Ordering::Relaxed);
                    }
                    message.accept();
                }
            });
        }
        members.push(Member { node, shards: carried });
    }
    // Each shard is a ring with chords, whatever the number of members.
    for (n, member) in members.iter().enumerate() {
        let mut dialled = std::collections::BTreeSet::new();
        for shard in &member.shards {
            let after = (1..count).map(|step| (n + step) % count);
            dialled.extend(after.filter(|other| members[*other].shards.contains(shard)).take(DIALS));
        }
        for other in dialled {
            within(member.node.connect(&members[other].node.at, LIMIT)).await.unwrap();
        }
    }
    let listeners = |n: usize| {
        let topic = receipts_topic(&NETWORK, &members[n].node.at.peer, shards);
        let carries = |m: &&Member| m.shards.iter().any(|s| receipts_topic_of_shard(&NETWORK, *s) == topic);
        (topic.clone(), members.iter().filter(carries).count() - 1)
    };
    let publish = async |n: usize, tag: u8, len: usize| {
        let topic = listeners(n).0;
        let mut data = vec![tag; len];
        data[..8].copy_from_slice(&(n as u64).to_le_bytes());
        eventually(|| async {
            match members[n].node.publish(&topic, data.clone()).await {
                Err(PublishError::Duplicate) => Ok(()),
                other => other,
            }
        })
        .await;
    };
    let expected: usize = (0..count).map(|n| listeners(n).1).sum();
    // Until a round reaches everybody, the meshes are still forming.
    let mut tag = 0;
    loop {
        tag += 1;
        assert!(tag < 40, "the mesh never formed: {} of {expected}", heard.load(Ordering::Relaxed));
        let (before, bytes) = (heard.load(Ordering::Relaxed), traffic(&members));
        let mut due = 0;
        for n in 0..count {
            publish(n, tag, BATCH).await;
            due += listeners(n).1;
            // A mesh is not made for everybody's batch at the same moment: what waits too long in a queue is dropped.
            if n % AT_ONCE == AT_ONCE - 1 {
                reached(&heard, before + due * ENOUGH / 100).await;
            }
        }
        if !reached(&heard, before + expected * ENOUGH / 100).await {
            continue;
        }
        let arrived = heard.load(Ordering::Relaxed) - before;
        let spent = (traffic(&members) - bytes) as f64;
        for member in members {
            member.node.stop().await;
        }
        tasks.close();
        within(tasks.wait()).await;
        return Cost {
            members: count,
            shards,
            a_receipt: spent / (count * RECEIPTS * count) as f64,
            a_carried_receipt: spent / (arrived * RECEIPTS) as f64,
        };
    }
}

#[allow(clippy::print_stdout, reason = "the figures are what it is for")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gossiped_receipt_costs_a_member_no_more_when_the_mesh_grows_with_its_shards() {
    let sizes: &[usize] = if std::env::var_os("WILLCALL_GROWTH").is_some() { &[50, 100, 200] } else { &[50, 84] };
    let raw = (BATCH / RECEIPTS) as f64;
    let mut costs = Vec::new();
    for &size in sizes {
        let cost = measure(size).await;
        println!(
            "{} members, {} shards: a receipt of the network costs each member {:.0} bytes, one that it carries {:.0} \
             (received and sent; the receipt itself is {raw:.0})",
            cost.members, cost.shards, cost.a_receipt, cost.a_carried_receipt
        );
        // Gossip gives each member a message at most as often as it has neighbours in the mesh (twelve), and takes it
        // as often; the housekeeping of the mesh is in the figure, too.
        assert!(cost.a_carried_receipt < raw * 2.0 * 12.0, "{}", cost.a_carried_receipt);
        costs.push(cost);
    }
    let [first, .., last] = costs.as_slice() else { unreachable!("one size alone shows no growth") };
    assert!(last.a_carried_receipt < first.a_carried_receipt * 1.5, "it grows with the mesh");
    assert!(last.a_receipt < first.a_receipt, "more shards must mean less for each");
}
