//! What is over moves out of the store: ended transactions after a time of rest, old entries of the audit log, old
//! statements. They lie in append-only segments beside it (`segments`), and one small row each stays behind, so that the
//! store is as large as what is under way and not as what ever was.
//!
//! The order is always the same, so that a crash at any point loses and doubles nothing: the record is written and
//! flushed, then one transaction of the store puts the row that points to it, takes the original rows out and moves
//! the head. Before that transaction the record does not count, after it the rows are gone.
//!
//! Reading goes by [`Archive::whole`] and does not care where a transaction lies. What changes one brings it back first
//! ([`bring_back`]), and it rests anew.

mod chore;
mod segments;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests;
mod whole;

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use bincode::{Decode, Encode};
use protocol::api::TransactionState;
use protocol::codec::{self, Wire};
use protocol::{Digest, PeerId, TransactionId, wire};
use serde_json::{Value, json};
use store::{Db, Mark, StoreError, Table, Txn, WriteTransaction};

pub(crate) use chore::{start, step};
pub use segments::SegmentError;
pub(crate) use segments::{End, Head, Kind, Place, Segments};
pub(crate) use whole::Whole;

use crate::context::{Context, now_ms};
use crate::transactions::{ORDER_IDS, RESTING, SALES, Sale, SaleRef};

/// How far the segments are good.
const HEAD: Table<(), Head> = Table::new("segments");
/// How far each segment is good, by its number. Empty for those that an earlier version wrote.
const ENDS: Table<u32, End> = Table::new("segment-ends");
/// Transactions that moved out.
const ARCHIVED: Table<TransactionId, Archived> = Table::new("archived-sales");
/// Which of them a merchant's order id stands for, by a digest of both: a quarter of the row that it replaces.
const ARCHIVED_ORDERS: Table<[u8; 16], SaleRef> = Table::new("archived-sale-of-order");

/// What stays of a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Archived {
    place: Place,
    state: TransactionState,
}

wire!(Archived => 48);

/// A sale as far as it can be read.
#[derive(Debug)]
pub(crate) enum Seen {
    /// As it is.
    Whole(Box<Sale>),
    /// Its record is damaged: what its row says.
    State(TransactionState),
}

/// The segments, and reading from them.
#[derive(Debug)]
pub(crate) struct Archive {
    segments: Segments,
    /// Held from the look at the head to the commit of the next one: two chores move things out.
    moving: Mutex<()>,
}

impl Archive {
    /// Opens the segments that `db` knows of. Blocks.
    pub(crate) fn open(dir: &Path, db: &Db) -> Result<Archive, OpenError> {
        let (head, ends) = db.read(|txn| Ok::<_, StoreError>((head(txn)?, ends(txn)?)))?;
        Ok(Archive { segments: Segments::open(&dir.join("segments"), head, &ends)?, moving: Mutex::default() })
    }

    /// A transaction with all that is kept of it, wherever it lies.
    pub(crate) fn whole(&self, txn: &impl Txn, id: &TransactionId) -> Result<Option<Whole>, StoreError> {
        match Whole::gather(txn, id)? {
            Some(whole) => Ok(Some(whole)),
            None => self.archived(txn, id),
        }
    }

    /// One that moved out.
    pub(crate) fn archived(&self, txn: &impl Txn, id: &TransactionId) -> Result<Option<Whole>, StoreError> {
        let Some(row) = ARCHIVED.get(txn, id)? else { return Ok(None) };
        self.get(row.place, Kind::Transaction).map(Some)
    }

    /// A sale, wherever it lies.
    pub(crate) fn sale(&self, txn: &impl Txn, id: &TransactionId) -> Result<Option<Sale>, StoreError> {
        match SALES.get(txn, id)? {
            Some(sale) => Ok(Some(sale)),
            None => Ok(self.archived(txn, id)?.map(|whole| whole.sale)),
        }
    }

    /// A sale, wherever it lies, or what is left of it: among many, one that cannot be read is not to hide the others.
    pub(crate) fn seen(&self, txn: &impl Txn, id: &TransactionId) -> Result<Option<Seen>, StoreError> {
        match self.sale(txn, id) {
            Err(error @ StoreError::Corrupt { .. }) => {
                let row = ARCHIVED.get(txn, id)?;
                tracing::error!(transaction = %id, %error, "what moved out cannot be read: restore its segment");
                row.map(|row| Some(Seen::State(row.state))).ok_or(error)
            }
            read => Ok(read?.map(|sale| Seen::Whole(Box::new(sale)))),
        }
    }

    /// What lies at `place`.
    pub(crate) fn get<T: Wire>(&self, place: Place, kind: Kind) -> Result<T, StoreError> {
        let body = self.segments.read(place, kind)?;
        codec::decode(&body)
            .map_err(|error| StoreError::Corrupt { table: "segments", reason: format!("a record: {error}") })
    }

    /// Damages what lies at `place`.
    #[cfg(test)]
    pub(crate) fn spoil(&self, place: Place) {
        self.segments.spoil(place);
    }

    /// Moves records out: they are flushed, and then `rows`, which puts what points to them and takes out what they
    /// hold, becomes durable together with the new head. Blocks.
    pub(crate) fn move_out(
        &self,
        db: &Db,
        records: &[(Kind, Vec<u8>)],
        mut rows: impl FnMut(&WriteTransaction<'_>, &[Place]) -> Result<(), StoreError> + Send + 'static,
    ) -> Result<(), StoreError> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let (places, after) = self.segments.append(db.read(head)?, records)?;
        db.write_blocking(move |txn| {
            rows(txn, &places)?;
            ENDS.put(txn, &after.segment, &End { segment: after.segment, length: after.length })?;
            HEAD.put(txn, &(), &after)
        })
    }
}

/// Why the archive does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A segment.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn head(txn: &impl Txn) -> Result<Head, StoreError> {
    Ok(HEAD.get(txn, &())?.unwrap_or(Head::NONE))
}

/// Of all segments that have records.
fn ends(txn: &impl Txn) -> Result<Vec<End>, StoreError> {
    Ok(ENDS.range(txn, .., usize::MAX)?.into_iter().map(|(_, end)| end).collect())
}

fn order_key(merchant: &PeerId, order: &str) -> [u8; 16] {
    let digest = Digest::of("willcall 2026-11 archived order", &[merchant.as_bytes(), order.as_bytes()]);
    digest.as_bytes().first_chunk::<16>().copied().unwrap_or_default()
}

/// Did this sale move out?
pub(crate) fn is_archived(txn: &impl Txn, id: &TransactionId) -> Result<bool, StoreError> {
    ARCHIVED.contains(txn, id)
}

/// Which sale a merchant's order id stands for, wherever it lies.
pub(crate) fn sale_of_order(
    txn: &impl Txn,
    merchant: &PeerId,
    order: &str,
) -> Result<Option<TransactionId>, StoreError> {
    if let Some(SaleRef { id }) = ORDER_IDS.get(txn, &(*merchant, order))? {
        return Ok(Some(id));
    }
    Ok(ARCHIVED_ORDERS.get(txn, &order_key(merchant, order))?.map(|found| found.id))
}

/// Ids and states of at most `limit` transactions before the given one that moved out, newest first.
pub(crate) fn archived_before(
    txn: &impl Txn,
    before: std::ops::Bound<TransactionId>,
    limit: usize,
) -> Result<Vec<(TransactionId, TransactionState)>, StoreError> {
    let rows = ARCHIVED.range_back(txn, (std::ops::Bound::Unbounded, before), limit)?;
    Ok(rows.into_iter().map(|(id, row)| (id, row.state)).collect())
}

/// Puts a transaction that moved out back into the store, for a change; nothing where it is there. Blocks.
pub(crate) fn bring_back(ctx: &Context, id: TransactionId) -> Result<(), StoreError> {
    let Some(row) = ctx.db.read(|txn| ARCHIVED.get(txn, &id))? else { return Ok(()) };
    let whole: Whole = ctx.archive.get(row.place, Kind::Transaction)?;
    ctx.db.write_blocking(move |txn| {
        // Another call may have done it meanwhile.
        if ARCHIVED.get(txn, &id)? != Some(row) {
            return Ok(());
        }
        let sale = &whole.sale;
        whole.put(txn, &id)?;
        ORDER_IDS.put(txn, &(sale.merchant, sale.request.order.as_str()), &SaleRef { id })?;
        ARCHIVED_ORDERS.delete(txn, &order_key(&sale.merchant, &sale.request.order))?;
        ARCHIVED.delete(txn, &id)?;
        RESTING.put(txn, &(now_ms(), id), &Mark)
    })
}

/// How much moved out, and with `verify` whether all of it is as it was written. Blocks.
pub(crate) fn report(ctx: &Context, verify: bool) -> Result<Value, StoreError> {
    let (head, transactions, ends) =
        ctx.db.read(|txn| Ok::<_, StoreError>((head(txn)?, ARCHIVED.len(txn)?, ends(txn)?)))?;
    let verified = if verify { Some(ctx.archive.segments.verify(head, &ends)?) } else { None };
    Ok(json!({
        "transactions": transactions, "records": head.records, "segments": head.segment, "head": head.digest,
        "verified": verified,
    }))
}
