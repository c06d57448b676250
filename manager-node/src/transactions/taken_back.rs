//! Which released sales were taken back, counted for each merchant: its shop asks what is new, and gives the payment back
//! of what this manager's operator refunded.

use bincode::{Decode, Encode};
use protocol::api::{SalesResponse, TakenBack, TransactionState};
use protocol::{PeerId, TransactionId, wire};
use store::{StoreError, Table, Txn, WriteTransaction};

use super::{Sale, SaleError};
use crate::archive::Seen;
use crate::context::Context;

/// By merchant and number.
const TAKEN_BACK: Table<(PeerId, u64), Row> = Table::new("sales-taken-back");
/// Rows kept of one merchant, the newest. A shop that did not ask for so long learns of older ones that they were taken back
/// when it asks for the order alone, but not whether the price of a revoked one is due: its operator has to ask.
const KEPT: u64 = 65_536;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Row {
    transaction: TransactionId,
    order: String,
    state: TransactionState,
}

wire!(Row => 256);

/// Notes that a sale was taken back.
pub(super) fn note(txn: &WriteTransaction<'_>, id: TransactionId, sale: &Sale) -> Result<(), StoreError> {
    let all = (sale.merchant, 0)..=(sale.merchant, u64::MAX);
    let last = TAKEN_BACK.range_back(txn, all, 1)?.first().map_or(0, |((_, number), _)| *number);
    let number = last.saturating_add(1);
    let row = Row { transaction: id, order: sale.request.order.clone(), state: sale.state };
    TAKEN_BACK.put(txn, &(sale.merchant, number), &row)?;
    if let Some(old) = number.checked_sub(KEPT) {
        TAKEN_BACK.delete(txn, &(sale.merchant, old))?;
    }
    Ok(())
}

/// One page after the given number. Of a revoked sale that cannot be read nobody knows whether its price is due: it is left
/// out, and its shop has its operator ask. One that was refunded goes back whatever was taken.
pub(crate) fn taken_back(
    ctx: &Context,
    txn: &impl Txn,
    merchant: PeerId,
    after: u64,
) -> Result<Vec<TakenBack>, SaleError> {
    let mut told = Vec::with_capacity(SalesResponse::TAKEN_BACK_PAGE);
    let mut after = after;
    // Fewer than a page would say that this was all.
    loop {
        let range = (merchant, after.saturating_add(1))..=(merchant, u64::MAX);
        let missing = SalesResponse::TAKEN_BACK_PAGE.saturating_sub(told.len());
        let rows = TAKEN_BACK.range(txn, range, missing)?;
        let Some(((_, last), _)) = rows.last() else { return Ok(told) };
        after = *last;
        for ((_, number), Row { transaction, order, state }) in rows {
            let captured = match ctx.archive.seen(txn, &transaction)? {
                Some(Seen::Whole(sale)) => sale.release.is_some_and(|release| release.captured),
                Some(Seen::State(_)) if state == TransactionState::Refunded => true,
                Some(Seen::State(_)) => continue,
                None => false,
            };
            told.push(TakenBack { number, transaction, order, state, captured });
        }
    }
}
