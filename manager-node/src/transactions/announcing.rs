//! Puts what was taken back, and generations that ended by a move, into revocation epochs. One task makes them, of the rows
//! that wait, and not one for each row: every node of the network stores every epoch, one after the other, and a merchant
//! that refunds as fast as it is answered would keep all of them behind.

use std::sync::Arc;
use std::time::Duration;

use node::Supervisor;
use protocol::TransactionId;
use protocol::trust::{Moved, Revocations as Added};
use store::{Step, StoreError};
use tokio::sync::Notify;

use super::{MOVING, REVOKING};
use crate::context::Context;
use crate::revocations::MAX_ENTRIES;

/// Between two epochs at least, but after a full one. What waits longer is in one of them with all that came meanwhile.
const PAUSE: Duration = Duration::from_millis(500);

/// Wakes the task.
#[derive(Debug, Default)]
pub(crate) struct Announcing {
    due: Notify,
}

impl Announcing {
    /// Something is to be revoked. It is in the books: nobody has to wait for the epoch.
    pub(crate) fn nudge(&self) {
        self.due.notify_one();
    }
}

/// Starts the task; a store that fails ends it, and with it the manager.
pub(crate) fn start(ctx: Arc<Context>, supervisor: &Supervisor) {
    let token = supervisor.token();
    supervisor.spawn_critical("revocation announcer", async move {
        let announcing = async {
            loop {
                ctx.announcing.due.notified().await;
                while let Some(made) = next(&ctx).await? {
                    // What was revoked without it, as the operator does, is in no epoch of its own. After a full one the rest
                    // is not made to wait: older sales come first, and a new one is not to be behind them for minutes.
                    if made == Made::Some {
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            done = announcing => done,
            () = token.cancelled() => Ok::<_, StoreError>(()),
        }
    });
}

/// Everything that waits, at once. For whoever looks at what others see.
pub(crate) async fn all(ctx: &Context) -> Result<(), StoreError> {
    while next(ctx).await?.is_some() {}
    Ok(())
}

/// What one round put into an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Made {
    /// All of it was revoked already.
    None,
    /// Everything that waited.
    Some,
    /// As much as it holds.
    Full,
}

/// One epoch of what waits, by transaction. `None` where nothing waits.
async fn next(ctx: &Context) -> Result<Option<Made>, StoreError> {
    let (waiting, moving) = ctx.db.read(|txn| {
        Ok::<_, StoreError>((REVOKING.range(txn, .., MAX_ENTRIES)?, MOVING.range(txn, .., MAX_ENTRIES)?))
    })?;
    let transactions: Vec<TransactionId> = waiting.into_iter().map(|(id, _)| id).collect();
    let moved: Vec<Moved> = moving
        .into_iter()
        .map(|(transaction, generation)| Moved { transaction, generation: generation.number })
        .collect();
    if transactions.is_empty() && moved.is_empty() {
        return Ok(None);
    }
    let made = if transactions.len().max(moved.len()) < MAX_ENTRIES { Made::Some } else { Made::Full };
    let before = ctx.revocations.number();
    let added = Added { transactions: transactions.clone(), moved: moved.clone(), ..Added::default() };
    let number = ctx.revocations.revoke(added).await?;
    ctx.db
        .write_step(Step::ManagerAnnounced, move |txn| {
            for id in &transactions {
                REVOKING.delete(txn, id)?;
            }
            for Moved { transaction, generation } in &moved {
                // It may have moved again meanwhile: that is for the next epoch.
                if MOVING.get(txn, transaction)?.is_some_and(|waiting| waiting.number == *generation) {
                    MOVING.delete(txn, transaction)?;
                }
            }
            Ok::<_, StoreError>(())
        })
        .await?;
    Ok(Some(if number > before { made } else { Made::None }))
}
