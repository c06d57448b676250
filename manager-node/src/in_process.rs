//! The manager's services without a network between: for a merchant or seeder in the same process, and for measuring
//! what the manager itself takes. A request goes the way it goes when it comes by stream, from the first check on.

use std::sync::Arc;

use protocol::api::{MailboxRequest, MailboxResponse, MeshRequest, MeshResponse, SalesRequest, SalesResponse};
use protocol::{PeerId, Refusal};
use store::StoreError;

use crate::start::Running;
use crate::transactions::{SaleError, chore};
use crate::{archive, mesh, sales, statements};

impl Running {
    /// Answers a merchant whose connection proved to be `peer`.
    ///
    /// # Errors
    /// What the merchant would be refused with.
    pub async fn sales(&self, peer: PeerId, request: SalesRequest) -> Result<SalesResponse, Refusal> {
        Box::pin(sales::answer(self.context(), peer, request)).await
    }

    /// Answers a client whose connection proved to be `peer`.
    ///
    /// # Errors
    /// What the client would be refused with.
    pub async fn mailbox(&self, peer: PeerId, request: MailboxRequest) -> Result<MailboxResponse, Refusal> {
        sales::mailbox::answer(self.context(), peer, request).await
    }

    /// Answers a seeder whose connection proved to be `peer`.
    ///
    /// # Errors
    /// What the seeder would be refused with.
    pub async fn mesh(&self, peer: PeerId, request: MeshRequest) -> Result<MeshResponse, Refusal> {
        Box::pin(mesh::answer(self.context(), peer, request)).await
    }

    /// Does what chores do with time when it is `now` (unix milliseconds): reservations expire, deliveries are closed,
    /// statements are made, and what is over moves into segments.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn run_due(&self, now: u64) -> Result<(), StoreError> {
        chore::step(self.context(), now).await?;
        let ctx = Arc::clone(self.context());
        let work = tokio::task::spawn_blocking(move || {
            statements::step(&ctx, now).map_err(|error| match error {
                SaleError::Store(error) => error,
                other => StoreError::Failed { reason: other.to_string() },
            })?;
            archive::step(&ctx, now)
        });
        work.await.unwrap_or_else(|panic| Err(StoreError::Panicked(panic.to_string())))
    }
}
