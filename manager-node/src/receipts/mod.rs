//! Step 12: what seeders say they delivered. A batch is opened and every signature in it checked before the database is
//! written; then all of it is counted in one transaction together with the mark, so that a receipt is counted exactly
//! when the seeder is told that it is safe.

mod check;
mod count;
mod log;
mod telling;
#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "tests fail by panicking"
)]
mod tests;

use std::sync::Arc;

use node::Supervisor;
use protocol::api::News;
use protocol::receipt::{Mark, ReceiptBatch, SealedBatch};
use protocol::statement::Covered;
use protocol::trust::KeyPurpose;
use protocol::{PeerId, Refusal, RefusalCode, Signed};
use store::{Step, StoreError, Txn, WriteTransaction};
use tracing::{debug, info};

use crate::StartError;
use crate::context::{Context, now_ms};
use crate::news;
use crate::sales::blocking;
use crate::transactions::SaleError;

pub(crate) use log::to_json;
pub(crate) use telling::Telling;

/// How far each outbox of a seeder was taken.
pub(crate) fn covered(txn: &impl Txn, seeder: &PeerId) -> Result<Vec<Covered>, StoreError> {
    count::covered(txn, seeder)
}

/// Receipts come in through the mesh service and the gossip of the catalogue side, and are closed by the sales chore:
/// nothing runs on its own here.
#[expect(clippy::unused_async, reason = "all services are started alike")]
pub(crate) async fn start(_ctx: Arc<Context>, _supervisor: &Supervisor) -> Result<(), StartError> {
    Ok(())
}

/// Takes a batch that `peer` signed and brought, and gives the mark that it is safe. A number that was taken before gets the
/// newest mark of its outbox. Everybody else is told it, too, where it may be told.
pub(crate) async fn accept_batch(
    ctx: &Arc<Context>,
    peer: PeerId,
    batch: Signed<SealedBatch>,
) -> Result<Signed<Mark>, Refusal> {
    let (mark, tell) = accepted(ctx, peer, batch, now_ms()).await?;
    if tell {
        news::publish(&ctx.node, &ctx.network(), &News::Mark(mark.clone())).await;
    }
    Ok(mark)
}

/// Takes a batch that `peer` signed and anybody may have brought. `None` where everybody was told its mark before, and a
/// moment ago again.
pub(crate) async fn accept_gossiped(
    ctx: &Arc<Context>,
    peer: PeerId,
    batch: Signed<SealedBatch>,
    now: u64,
) -> Result<Option<Signed<Mark>>, Refusal> {
    let (mark, tell) = accepted(ctx, peer, batch, now).await?;
    Ok(tell.then_some(mark))
}

/// The mark, and whether everybody may be told it.
async fn accepted(
    ctx: &Arc<Context>,
    peer: PeerId,
    batch: Signed<SealedBatch>,
    now: u64,
) -> Result<(Signed<Mark>, bool), Refusal> {
    let (mark, tell, revoke) = blocking(ctx, move |ctx| {
        let taken = accept(ctx, peer, &batch, now)?;
        let tell = match taken.seen {
            true => ctx.marks.again((peer, taken.batch.incarnation), now),
            false => ctx.marks.first(peer, now),
        };
        Ok((mark(ctx, &taken, now), tell, taken.revoke))
    })
    .await?;
    if revoke {
        ctx.announcing.nudge();
    }
    Ok((mark, tell))
}

/// What became of a batch.
struct Taken {
    batch: SealedBatch,
    outbox: count::Outbox,
    /// It was taken before.
    seen: bool,
    /// Something is to be revoked now.
    revoke: bool,
}

fn accept(ctx: &Context, peer: PeerId, signed: &Signed<SealedBatch>, now: u64) -> Result<Taken, SaleError> {
    ctx.enrolled_seeder(&peer, now)?;
    let batch = signed.verify(&peer).map_err(|e| e.refusal(RefusalCode::BadReceipt))?;
    if batch.network != ctx.network() {
        return Err(Refusal::new(RefusalCode::WrongNetwork, "a batch of another network").into());
    }
    if batch.seeder != peer {
        return Err(Refusal::new(RefusalCode::BadReceipt, "the batch names another seeder than its signer").into());
    }
    // Before the decryption: most batches come twice, by gossip and directly.
    let place = ctx.db.read(|txn| count::place(txn, &batch))?;
    if let count::Place::Seen(outbox) = place {
        debug!(seeder = %peer, number = batch.number, "batch was taken before");
        return Ok(Taken { batch, outbox, seen: true, revoke: false });
    }
    // What it has on completions would be lost where it cannot be told yet whether they count: the seeder keeps it.
    ctx.knows_what_it_revoked()?;
    let opened = open(ctx, &batch)?;
    let checked = check::all(ctx, peer, opened, now)?;
    let (number, receipts) = (batch.number, checked.len());
    let grace_ms = ctx.config.close_grace_ms;
    let stored = batch.clone();
    let counting = move |txn: &WriteTransaction<'_>| count::all(txn, &stored, &checked, now, grace_ms);
    let counted = ctx.db.write_step_blocking(Step::ManagerCount, counting)?;
    info!(step = 12, seeder = %peer, number, receipts, counted = counted.counted, "receipts from seeder");
    Ok(Taken { batch, outbox: counted.outbox, seen: false, revoke: counted.revoke })
}

fn open(ctx: &Context, batch: &SealedBatch) -> Result<ReceiptBatch, Refusal> {
    let key = ctx.keys.opener(&batch.sealed_to).ok_or_else(|| {
        let detail = "the batch is sealed to a key that this manager does not have; fetch the newest key set";
        Refusal::new(RefusalCode::UnknownKey, detail)
    })?;
    batch.open(&key)
}

fn mark(ctx: &Context, Taken { batch, outbox, .. }: &Taken, now: u64) -> Signed<Mark> {
    let mark = Mark {
        network: batch.network,
        seeder: batch.seeder,
        incarnation: batch.incarnation,
        number: outbox.number,
        running: outbox.running,
        restore: ctx.restore,
        at: now,
    };
    ctx.keys.sign(KeyPurpose::Settlement, &mark)
}
