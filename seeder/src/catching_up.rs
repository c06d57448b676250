//! What is new of keys and revocations, fetched from whoever has it. It is signed by the network's keys, so that it is as good
//! from any seeder as from the manager: while that is away, those who missed something have it from the others.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use node::Protocol;
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse};
use protocol::trust::Update;
use protocol::{PeerAddrs, PeerId};
use store::StoreError;

use crate::context::Seeder;
use crate::gossip::after_heartbeat;
use crate::manager::AskError;
use crate::network::TakeError;
use crate::sync::SyncError;

const MESH: Protocol = Protocol::new(MESH_PROTOCOL);
/// Seeders asked at a time: one may know as little, another may keep it back.
const OTHERS: usize = 3;

/// Who is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Teller {
    /// Whichever manager answers.
    Manager,
    /// Another seeder.
    Seeder(PeerId),
}

impl Teller {
    pub(crate) async fn ask(self, seeder: &Seeder, request: &MeshRequest) -> Result<MeshResponse, AskError> {
        match self {
            Teller::Manager => seeder.manager.ask(request).await,
            Teller::Seeder(peer) => {
                let limit = Duration::from_millis(seeder.config.call_ms);
                match seeder.node.call(&PeerAddrs::from(peer), MESH, request, limit).await? {
                    MeshResponse::Refused(refusal) => Err(refusal.into()),
                    response => Ok(response),
                }
            }
        }
    }

    /// Takes the newest key set that it has.
    pub(crate) async fn key_set(self, seeder: &Seeder) -> Result<(), SyncError> {
        match self.ask(seeder, &MeshRequest::KeySet).await? {
            MeshResponse::KeySet(signed) => {
                seeder.network.take_key_set(signed).await?;
                Ok(())
            }
            _ => Err(AskError::Unexpected("a question for the key set").into()),
        }
    }

    /// Takes the revocation epochs that it has and that are missing here: up to number `wanted` at least, if one is given,
    /// otherwise as many as there are.
    pub(crate) async fn epochs(self, seeder: &Seeder, wanted: Option<u64>) -> Result<(), SyncError> {
        loop {
            let after = seeder.network.revoked().number();
            if wanted.is_some_and(|wanted| after >= wanted) {
                return Ok(());
            }
            let MeshResponse::Epochs(epochs) = self.ask(seeder, &MeshRequest::Epochs { after }).await? else {
                return Err(AskError::Unexpected("a question for revocation epochs").into());
            };
            seeder.network.take_epochs(epochs).await?;
            if seeder.network.revoked().number() == after {
                return match wanted {
                    Some(_) => Err(AskError::Unexpected("a question for revocation epochs").into()),
                    None => Ok(()),
                };
            }
        }
    }

    /// Takes all that it has heard of the manager.
    async fn everything(self, seeder: &Seeder) -> Result<(), SyncError> {
        // What is signed by a key of a newer key set can be checked only then.
        self.key_set(seeder).await?;
        self.epochs(seeder, None).await?;
        let MeshResponse::Heartbeat(signed) = self.ask(seeder, &MeshRequest::Heartbeat).await? else {
            return Err(AskError::Unexpected("a question for the heartbeat").into());
        };
        if seeder.network.take_heartbeat(signed).await? == Update::Taken {
            after_heartbeat(seeder).await?;
        }
        Ok(())
    }
}

/// Asks other seeders, another few at each `turn`, for what the manager would tell if it could be reached.
pub(crate) async fn from_others(seeder: &Arc<Seeder>, turn: usize) -> Result<(), StoreError> {
    let others = seeder.acquaintances.in_turn(&seeder.peer, turn, OTHERS);
    let asked = others.into_iter().map(|peer| async move { (peer, Teller::Seeder(peer).everything(seeder).await) });
    for (peer, outcome) in join_all(asked).await {
        match outcome {
            Ok(()) => {}
            Err(SyncError::Take(TakeError::Store(error))) => return Err(error),
            // It may be away as well, or know nothing yet.
            Err(error) => tracing::debug!(%peer, %error, "no news from another seeder"),
        }
    }
    Ok(())
}
