//! A seeder that reports deliveries which never happened, with the help of a client that signs whatever it is asked to.
//! Both signatures are genuine: what keeps them from being paid for it can only be how things are counted.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use node::{Node, NodeConfig, Protocol, Supervisor};
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse};
use protocol::receipt::{Ack, Completion, DeliveryId, OutboxPlace, Receipt, ReceiptBatch, SealedBatch};
use protocol::statement::Explanation;
use protocol::ticket::TicketEnvelope;
use protocol::trust::{KeyPurpose, KeyState};
use protocol::{ChunkSet, Digest, Keypair, NetworkId, Nonce, PeerAddrs, PeerId, Refusal, Signed, codec};
use rand::RngExt;

pub(super) const LIMIT: Duration = Duration::from_secs(20);

/// Why a crook's report did not reach the manager.
#[derive(Debug, thiserror::Error)]
pub enum CrookError {
    /// Its node did not start.
    #[error(transparent)]
    Start(#[from] node::StartError),
    /// Its node serves already, or stops.
    #[error(transparent)]
    Accept(#[from] node::AcceptError),
    /// Its node stops.
    #[error(transparent)]
    Stopped(#[from] node::Stopped),
    /// The manager could not be asked.
    #[error(transparent)]
    Call(#[from] node::CallError),
    /// The manager refused the report as a whole.
    #[error("the manager refused: {0}")]
    Refused(#[from] Refusal),
    /// The batch could not be sealed.
    #[error(transparent)]
    Seal(#[from] protocol::keys::SealError),
    /// The key set cannot be read, or names no key for receipts.
    #[error("the manager's key set cannot be used: {0}")]
    KeySet(String),
    /// The manager answered something else than it was asked.
    #[error("the manager's answer does not fit the question")]
    Unfitting,
}

/// An enrolled seeder's key in the wrong hands.
pub struct Crook {
    key: Keypair,
    manager: PeerAddrs,
}

impl Crook {
    /// The seeder with this key, which reports to this manager.
    pub fn new(key: Keypair, manager: PeerAddrs) -> Crook {
        Crook { key, manager }
    }

    /// Its peer ID.
    pub fn peer(&self) -> PeerId {
        self.key.peer_id()
    }

    /// Reports these receipts as the first batch of an outbox that nobody has seen before.
    ///
    /// # Errors
    /// [`CrookError`]; single receipts that are not counted are no error.
    pub async fn report(&self, receipts: Vec<Receipt>) -> Result<(), CrookError> {
        let supervisor = Supervisor::new();
        let node = Node::start(NodeConfig { gossip: false, ..NodeConfig::new(self.key.clone()) }, &supervisor).await?;
        let sent = self.send(&node, receipts).await;
        // Nothing of value runs here.
        let _ = supervisor.shutdown(Duration::from_secs(5)).await;
        sent
    }

    /// What the manager says became of each of these receipts.
    ///
    /// # Errors
    /// [`CrookError`]; the manager's refusal where it cannot say.
    pub async fn explained(&self, receipts: &[Digest]) -> Result<Vec<Explanation>, CrookError> {
        let supervisor = Supervisor::new();
        let node = Node::start(NodeConfig { gossip: false, ..NodeConfig::new(self.key.clone()) }, &supervisor).await?;
        let asked = async {
            let mut told = Vec::with_capacity(receipts.len());
            for &receipt in receipts {
                match self.ask(&node, MeshRequest::Explain { receipt }).await? {
                    MeshResponse::Explained(explanation) => told.push(*explanation),
                    _ => return Err(CrookError::Unfitting),
                }
            }
            Ok(told)
        };
        let told = asked.await;
        let _ = supervisor.shutdown(Duration::from_secs(5)).await;
        told
    }

    async fn send(&self, node: &node::NodeHandle, receipts: Vec<Receipt>) -> Result<(), CrookError> {
        let (network, sealed_to) = match self.ask(node, MeshRequest::KeySet).await? {
            MeshResponse::KeySet(signed) => {
                let set = signed.peek().map_err(|error| CrookError::KeySet(error.to_string()))?;
                let active =
                    |purpose| move |e: &&protocol::trust::KeyEntry| e.purpose == purpose && e.state == KeyState::Active;
                let key = set.keys.iter().find(active(KeyPurpose::ReceiptSealing));
                (set.network, key.ok_or_else(|| CrookError::KeySet("no key for receipts".to_owned()))?.key)
            }
            _ => return Err(CrookError::Unfitting),
        };
        let place = OutboxPlace {
            network,
            incarnation: Nonce::from_bytes(rand::rng().random()),
            number: 1,
            previous: Digest::from_bytes([0; 32]),
        };
        let batch = ReceiptBatch { receipts };
        let sealed = SealedBatch::seal(&batch, &place, &self.key, sealed_to, now(), &mut rand::rng())?;
        self.ask(node, MeshRequest::Receipts(sealed)).await.map(drop)
    }

    async fn ask(&self, node: &node::NodeHandle, request: MeshRequest) -> Result<MeshResponse, CrookError> {
        match node.call(&self.manager, Protocol::new(MESH_PROTOCOL), &request, LIMIT).await? {
            MeshResponse::Refused(refusal) => Err(refusal.into()),
            answer => Ok(answer),
        }
    }
}

/// The receipt of a delivery that did not happen: `client` signs that these chunks came from `seeder`, at a time that its
/// clock puts `skew_ms` ahead; and where that is all of them, that it has everything.
///
/// # Errors
/// The ticket cannot be read.
pub fn false_receipt(
    client: &Keypair,
    network: NetworkId,
    envelope: &TicketEnvelope,
    seeder: PeerId,
    (chunks, of): (ChunkSet, u32),
    skew_ms: u64,
) -> Result<Receipt, codec::CodecError> {
    let (data, lease) = (envelope.ticket.data.peek()?, envelope.ticket.lease.peek()?);
    let delivery = DeliveryId { transaction: data.transaction, delivery: lease.delivery };
    let (manifest, at) = (data.manifest, now().saturating_add(skew_ms));
    let whole = chunks.len() == of;
    let ack = Ack { network, delivery, manifest, seeder, chunks, at };
    let completion = Completion { network, delivery, manifest, at };
    Ok(Receipt {
        ack: Signed::sign(&ack, client),
        completion: whole.then(|| Signed::sign(&completion, client)),
        first_at: at,
        last_at: at,
    })
}

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
