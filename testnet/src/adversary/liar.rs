//! A seeder that reports content which it does not have: it counts as a copy and earns a place in leases, and everybody who
//! comes for the content is told that it is not there.

use node::{AcceptLimits, Node, NodeConfig, NodeHandle, Protocol, Supervisor, write_message};
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse, SeederReport};
use protocol::deliver::SeederMessage;
use protocol::{Address, Digest, Keypair, PeerAddrs, Refusal, RefusalCode};

use super::crook::{CrookError, LIMIT, now};

/// An enrolled seeder's key, and a node that serves nothing.
pub struct Liar {
    node: NodeHandle,
    supervisor: Supervisor,
    manager: PeerAddrs,
    held: Vec<Digest>,
}

impl Liar {
    /// Starts it: with this key, reporting these contents to this manager.
    ///
    /// # Errors
    /// [`CrookError`].
    pub async fn start(key: Keypair, manager: PeerAddrs, held: Vec<Digest>) -> Result<Liar, CrookError> {
        let supervisor = Supervisor::new();
        let mut config = NodeConfig { gossip: false, ..NodeConfig::new(key) };
        config.listen = Address::new("/ip4/127.0.0.1/tcp/0").into_iter().collect();
        let node = Node::start(config, &supervisor).await?;
        let limits = AcceptLimits { queue: 16, per_peer: 16 };
        let mut accept = node.accept(Protocol::new(protocol::deliver::PROTOCOL), limits).await?;
        supervisor.spawn("refusing", async move {
            while let Some(mut stream) = accept.next().await {
                let no = Refusal::new(RefusalCode::ContentNotHeld, "this seeder does not hold the content");
                // Who came may have gone again.
                let _ = write_message(&mut stream, &SeederMessage::Refusal(no)).await;
            }
        });
        Ok(Liar { node, supervisor, manager, held })
    }

    /// Reports once more.
    ///
    /// # Errors
    /// [`CrookError`].
    pub async fn report(&self) -> Result<(), CrookError> {
        let report = SeederReport {
            addrs: self.node.peer_addrs().await?.addrs,
            held: self.held.clone(),
            first: true,
            capacity: 1 << 40,
            now: now(),
            ..SeederReport::default()
        };
        let request = MeshRequest::Report(report);
        match self.node.call(&self.manager, Protocol::new(MESH_PROTOCOL), &request, LIMIT).await? {
            MeshResponse::Refused(refusal) => Err(refusal.into()),
            _ => Ok(()),
        }
    }

    /// Ends it.
    pub async fn stop(self) {
        // Nothing of value runs here.
        let _ = self.supervisor.shutdown(LIMIT).await;
    }
}
