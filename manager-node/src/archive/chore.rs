//! Moves out what has rested: a few dozen transactions with one flush of the segment and one of the store.

use std::sync::Arc;
use std::time::Duration;

use node::Supervisor;
use protocol::{TransactionId, codec};
use store::{Mark, StoreError};
use tracing::{debug, error};

use super::{ARCHIVED, ARCHIVED_ORDERS, Archived, Kind, Whole, order_key};
use crate::context::{Context, now_ms};
use crate::transactions::{EXPIRING, ORDER_IDS, RESTING, REVOKING, SaleRef, is_over};
use crate::{audit, transactions};

/// Transactions moved at once: other writers wait while their rows go.
const STEP: usize = 64;
/// Between two looks: what moves has rested for days.
const EVERY: Duration = Duration::from_secs(60);

/// Starts the chore; a store that fails ends it, and with it the manager.
pub(crate) fn start(ctx: Arc<Context>, supervisor: &Supervisor) {
    let token = supervisor.token();
    supervisor.spawn_critical("archive chore", async move {
        loop {
            tokio::select! {
                () = token.cancelled() => return Ok::<_, StoreError>(()),
                () = tokio::time::sleep(EVERY) => {}
            }
            let work = Arc::clone(&ctx);
            match tokio::task::spawn_blocking(move || step(&work, now_ms())).await {
                Ok(Err(error @ (StoreError::DiskFull { .. } | StoreError::Failed { .. }))) => return Err(error),
                Ok(Err(error)) => error!(%error, "nothing is moved into segments"),
                Ok(Ok(())) => {}
                Err(panic) => drop(transactions::internal(&panic)),
            }
        }
    });
}

/// Moves everything that has rested for long enough at `now`. Blocks.
pub(crate) fn step(ctx: &Context, now: u64) -> Result<(), StoreError> {
    let until = now.saturating_sub(ctx.config.archive_ms);
    while some_transactions(ctx, until)? == STEP {}
    while audit::move_page(ctx)? {}
    Ok(())
}

/// What becomes of one row of the queue.
enum Turn {
    /// It is moved.
    Move(Box<Whole>),
    /// It is looked at again then, unix milliseconds.
    Later(u64),
    /// There is nothing to move.
    Drop,
}

/// Gives the number of rows of the queue that were dealt with.
fn some_transactions(ctx: &Context, until: u64) -> Result<usize, StoreError> {
    let end = (until, TransactionId::from_bytes([0xff; 16]));
    let (mut records, mut moved, mut others) = (Vec::new(), Vec::new(), Vec::new());
    let rows = ctx.db.read(|txn| {
        let rows = RESTING.range(txn, ..=end, STEP)?;
        for &((at, id), _) in &rows {
            let turn = match Whole::gather(txn, &id)? {
                // It moved by an earlier row.
                None => Turn::Drop,
                Some(whole) if !is_over(whole.sale.state) => Turn::Drop,
                // The closing of a further delivery changes no state and so makes no row of its own.
                Some(whole) if whole.has_open_delivery() || REVOKING.contains(txn, &id)? => {
                    let due = whole.deliveries.iter().filter(|(_, d)| d.closed.is_none()).map(|(_, d)| d.due_at);
                    Turn::Later(due.max().unwrap_or(0).max(until.saturating_add(1)))
                }
                // Cancelled, and counted for its merchant until its time is over.
                Some(Whole { sale, .. }) if EXPIRING.contains(txn, &(sale.expires_at, id))? => {
                    Turn::Later(sale.expires_at.max(until.saturating_add(1)))
                }
                Some(whole) => Turn::Move(Box::new(whole)),
            };
            match turn {
                Turn::Move(whole) => {
                    let body = codec::encode(whole.as_ref());
                    if body.is_empty() || body.len() > super::segments::MAX_BODY {
                        debug!(transaction = %id, "too large for a segment: it stays in the store");
                        others.push((at, id, None));
                    } else {
                        records.push((Kind::Transaction, body));
                        moved.push((at, id, *whole));
                    }
                }
                Turn::Later(again) => others.push((at, id, Some(again))),
                Turn::Drop => others.push((at, id, None)),
            }
        }
        Ok::<_, StoreError>(rows.len())
    })?;
    if !others.is_empty() {
        ctx.db.write_blocking(move |txn| {
            for &(at, id, again) in &others {
                RESTING.delete(txn, &(at, id))?;
                if let Some(again) = again {
                    RESTING.put(txn, &(again, id), &Mark)?;
                }
            }
            Ok::<_, StoreError>(())
        })?;
    }
    if moved.is_empty() {
        return Ok(rows);
    }
    ctx.archive.move_out(&ctx.db, &records, move |txn, places| {
        for ((at, id, whole), place) in moved.iter().zip(places) {
            RESTING.delete(txn, &(*at, *id))?;
            // A renewal or a refund came in between: what was written does not hold any more, and the change put a row
            // into the queue where it has to.
            if Whole::gather(txn, id)?.as_ref() != Some(whole) {
                RESTING.put(txn, &(at.saturating_add(1), *id), &Mark)?;
                continue;
            }
            let sale = &whole.sale;
            whole.remove(txn, id)?;
            ORDER_IDS.delete(txn, &(sale.merchant, sale.request.order.as_str()))?;
            ARCHIVED_ORDERS.put(txn, &order_key(&sale.merchant, &sale.request.order), &SaleRef { id: *id })?;
            ARCHIVED.put(txn, id, &Archived { place: *place, state: sale.state })?;
        }
        Ok(())
    })?;
    Ok(rows)
}
