//! Calls to the network's managers. Whichever of the join line's managers answers first is asked; nothing but documents
//! that verify is believed of any of them.

use std::time::Duration;

use node::{CallError, NodeHandle, Protocol};
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse};
use protocol::trust::DEFAULT_CLOCK_GRACE_MS;
use protocol::{PeerAddrs, PeerId, Refusal};

use crate::clock::now_ms;

const MESH: Protocol = Protocol::new(MESH_PROTOCOL);

/// Why the manager did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// No manager answered; the last reason.
    #[error("no manager can be reached: {0}")]
    Unreachable(#[from] CallError),
    /// It said no.
    #[error("the manager refused: {0}")]
    Refused(#[from] Refusal),
    /// It answered something else.
    #[error("the manager answered {0} with something else")]
    Unexpected(&'static str),
}

/// The managers of the join line.
pub(crate) struct ManagerLink {
    node: NodeHandle,
    managers: Vec<PeerAddrs>,
    timeout: Duration,
}

impl ManagerLink {
    pub(crate) fn new(node: NodeHandle, managers: Vec<PeerAddrs>, timeout: Duration) -> Self {
        ManagerLink { node, managers, timeout }
    }

    /// Is this one of the managers in the join line?
    pub(crate) fn is_manager(&self, peer: &PeerId) -> bool {
        self.managers.iter().any(|manager| manager.peer == *peer)
    }

    /// The managers and where they are.
    pub(crate) fn addresses(&self) -> &[PeerAddrs] {
        &self.managers
    }

    /// Asks one manager after the other until one answers. `Refused` is an answer.
    pub(crate) async fn ask(&self, request: &MeshRequest) -> Result<MeshResponse, AskError> {
        let mut last = AskError::Unexpected("nobody");
        for manager in &self.managers {
            match self.node.call::<_, MeshResponse>(manager, MESH, request, self.timeout).await {
                Ok(MeshResponse::Refused(refusal)) => {
                    return Err(refusal.compared_with(now_ms(), DEFAULT_CLOCK_GRACE_MS).into());
                }
                Ok(response) => return Ok(response),
                Err(error) => last = error.into(),
            }
        }
        Err(last)
    }
}
