//! Nodes over real sockets on the loopback: what a stream, a call, a rumour and a stranger's bytes do to a node can
//! only be seen with the whole stack in place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

// The name that the rest of the workspace gives this crate.
extern crate willcall_node as node;

mod calls;
mod control;
mod dht;
mod gossip;
mod gossip_growth;
mod hostile;
mod keys;
mod metrics;
mod reach;
mod start;
mod streams;

use std::future::Future;
use std::time::Duration;

use node::{Node, NodeConfig, NodeHandle, Supervisor};
use protocol::{Address, Keypair, PeerAddrs};

/// Longest time that anything in these tests takes on a busy machine; reaching it is a failure.
const LIMIT: Duration = Duration::from_secs(60);
const TCP: &str = "/ip4/127.0.0.1/tcp/0";
const QUIC: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

struct TestNode {
    handle: NodeHandle,
    supervisor: Supervisor,
    at: PeerAddrs,
}

impl std::ops::Deref for TestNode {
    type Target = NodeHandle;

    fn deref(&self) -> &NodeHandle {
        &self.handle
    }
}

impl TestNode {
    async fn start(seed: u8, edit: impl FnOnce(&mut NodeConfig)) -> Self {
        let mut config = NodeConfig::new(Keypair::from_seed(&[seed; 32]));
        config.listen = vec![Address::new(TCP).unwrap()];
        config.gossip_heartbeat = Duration::from_millis(200);
        edit(&mut config);
        let supervisor = Supervisor::new();
        let handle = Node::start(config, &supervisor).await.unwrap();
        let at = handle.peer_addrs().await.unwrap();
        Self { handle, supervisor, at }
    }

    /// A node on TCP and QUIC.
    async fn on_both(seed: u8) -> Self {
        Self::start(seed, |config| config.listen = vec![Address::new(TCP).unwrap(), Address::new(QUIC).unwrap()]).await
    }

    /// Stops the node; a task that hangs fails the test.
    async fn stop(self) {
        self.supervisor.shutdown(Duration::from_secs(20)).await.unwrap();
        assert_eq!(self.supervisor.failure(), None);
    }

    /// As a role does for a peer whose enrolment it has checked.
    async fn vouch_for(&self, peer: &TestNode) {
        self.add_member(peer.at.peer).await;
    }

    fn only(&self, part: &str) -> PeerAddrs {
        let addrs = self.at.addrs.iter().filter(|a| a.as_str().contains(part)).cloned().collect();
        PeerAddrs::new(self.at.peer, addrs)
    }
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(LIMIT, future).await.expect("took too long")
}

/// Tries until it works: for states that other nodes reach on their own, such as a formed gossip mesh.
async fn eventually<T, E: std::fmt::Debug, F: Future<Output = Result<T, E>>>(mut attempt: impl FnMut() -> F) -> T {
    let begin = std::time::Instant::now();
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => assert!(begin.elapsed() < LIMIT, "never happened: {error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn metric(node: &NodeHandle, line: &str) -> u64 {
    let text = node.metrics().encode();
    let found = text.lines().find_map(|l| l.strip_prefix(line));
    found.map_or(0, |value| value.trim().parse().unwrap())
}
