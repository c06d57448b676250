//! Sales and their deliveries as they are stored. What several services change (sales, mailbox, receipts, chores) is
//! changed here only, inside the caller's database transaction, so that state, money and indexes cannot part.

pub(crate) mod announcing;
pub(crate) mod chore;
mod closing;
mod control;
mod exposure;
mod state;
mod taken_back;
pub(crate) mod watch;

use std::ops::Bound;

use bincode::{Decode, Encode};
use protocol::api::{Reserve, TransactionState};
use protocol::entitlement::{Move, Recovery};
use protocol::manifest::KeyPolicy;
use protocol::receipt::{Ack, Completion, DeliveryId};
use protocol::settling::{Counting, Layout, Payout};
use protocol::ticket::{Endorsement, KeyGrant, Lease, Payer, TransactionData};
use protocol::{Amount, Currency, Digest, PeerId, Refusal, RefusalCode, Signed, TransactionId, wire};
use store::{Mark, StoreError, Table, Txn, WriteTransaction};

use crate::audit;
use crate::ledger::{LedgerError, Split};

pub(crate) use closing::{after_count, capture, end_lease, move_due, take_back};
pub(crate) use control::control;
pub(crate) use exposure::expose;
pub(crate) use state::{Event, is_over};
pub(crate) use taken_back::taken_back;

/// Every sale.
pub(crate) const SALES: Table<TransactionId, Sale> = Table::new("sales");
/// Which sale a merchant's order id stands for.
pub(crate) const ORDER_IDS: Table<(PeerId, String), SaleRef> = Table::new("sale-of-order");
/// Reservations that are open, or were cancelled, by the time when they expire.
pub(crate) const EXPIRING: Table<(u64, TransactionId), Mark> = Table::new("sales-expiring");
/// Released sales by client.
pub(crate) const MAILBOX: Table<(PeerId, TransactionId), Mark> = Table::new("sales-of-client");
/// Deliveries and replications that are or were counted.
pub(crate) const DELIVERIES: Table<(TransactionId, u32), Delivery> = Table::new("deliveries");
/// Open deliveries by the time when they are closed at the latest.
pub(crate) const DUE: Table<(u64, TransactionId, u32), Mark> = Table::new("deliveries-due");
/// The acknowledgement that counts of each seeder of a delivery, as the client signed it.
pub(crate) const ACKS: Table<(TransactionId, u32, PeerId), Signed<Ack>> = Table::new("delivery-acks");
/// The completion of a delivery, as the client signed it.
pub(crate) const COMPLETIONS: Table<(TransactionId, u32), Signed<Completion>> = Table::new("delivery-completions");
/// Transactions taken back in the books whose revocation is not yet in an epoch.
pub(crate) const REVOKING: Table<TransactionId, Mark> = Table::new("sales-revoking");
/// Sales that moved whose older generations are not yet void by an epoch.
pub(crate) const MOVING: Table<TransactionId, Generation> = Table::new("sales-moving");
/// Every change of hands, by the generation that it began.
pub(crate) const MOVES: Table<(TransactionId, u32), MoveRecord> = Table::new("sales-moved");
/// Generations that began at the holder that was there, because a lease became void; when, unix milliseconds.
pub(crate) const VOIDED: Table<(TransactionId, u32), Voided> = Table::new("sales-voided");
/// Ended sales by when they ended or were last asked back: they move out of the store after a time of rest.
pub(crate) const RESTING: Table<(u64, TransactionId), Mark> = Table::new("sales-resting");
/// What [`EXPIRING`] has of each merchant.
const STANDINGS: Table<PeerId, Standing> = Table::new("merchant-standings");

/// Number of the delivery that the price pays for. Later ones are fetched from the origin and earn nothing.
pub(crate) const PAID_DELIVERY: u32 = 1;

/// A sale, from its reservation on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Sale {
    /// Who sells.
    pub(crate) merchant: PeerId,
    /// The reservation as it was asked for.
    pub(crate) request: Reserve,
    /// Who receives: the client that the buyer designated, until the purchase moved.
    pub(crate) client: PeerId,
    /// Counts up with each move, and with each lease that becomes void.
    pub(crate) generation: u32,
    /// What it formed.
    pub(crate) data: Signed<TransactionData>,
    /// Digest of the signed manifest.
    pub(crate) manifest: Digest,
    /// For people.
    pub(crate) title: String,
    /// Bytes of all files.
    pub(crate) plain_bytes: u64,
    /// The content's chunks.
    pub(crate) layout: Layout,
    /// When key and money move.
    pub(crate) policy: KeyPolicy,
    /// Unix milliseconds.
    pub(crate) formed_at: u64,
    /// Void if not released by then, unix milliseconds.
    pub(crate) expires_at: u64,
    /// Where it stands …
    pub(crate) state: TransactionState,
    /// … since, unix milliseconds.
    pub(crate) changed_at: u64,
    /// From the release on.
    pub(crate) release: Option<Release>,
}

/// What the release added to a sale.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Release {
    /// Unix milliseconds.
    pub(crate) at: u64,
    /// The merchant's word.
    pub(crate) endorsement: Signed<Endorsement>,
    /// The newest lease …
    pub(crate) lease: Signed<Lease>,
    /// … its times, unix milliseconds …
    pub(crate) lease_start: u64,
    /// … and end.
    pub(crate) lease_end: u64,
    /// The delivery that the newest lease is for.
    pub(crate) delivery: u32,
    /// The key, once it may be given out and was asked for.
    pub(crate) grant: Option<KeyGrant>,
    /// How the price is split.
    pub(crate) split: Split,
    /// The sale is in the books.
    pub(crate) captured: bool,
    /// When the client's completion came in, unix milliseconds.
    pub(crate) completed_at: Option<u64>,
    /// What the paid delivery cost, minor units, once it was closed.
    pub(crate) charged: Option<u64>,
}

/// A generation of a purchase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Generation {
    pub(crate) number: u32,
}

/// A generation that nobody's word began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Voided {
    pub(crate) at: u64,
}

/// By whose word a purchase changed hands.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) enum Word {
    /// Its holder's.
    Holder(Signed<Move>),
    /// The merchant's, for a holder who lost the key.
    Merchant(Signed<Recovery>),
}

/// A change of hands.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct MoveRecord {
    /// Unix milliseconds.
    pub(crate) at: u64,
    /// Who had it …
    pub(crate) from: PeerId,
    /// … and who got it.
    pub(crate) to: PeerId,
    /// The last lease of the generation that ended: it proves whose acknowledgements counted.
    pub(crate) lease: Signed<Lease>,
    /// Why.
    pub(crate) word: Word,
}

/// The id of a sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct SaleRef {
    pub(crate) id: TransactionId,
}

/// One delivery (or replication) and its count.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Delivery {
    /// Whose acknowledgements count.
    pub(crate) client: PeerId,
    /// Digest of the signed manifest.
    pub(crate) manifest: Digest,
    /// The content's chunks.
    pub(crate) layout: Layout,
    /// Millionths of the minor unit per MiB.
    pub(crate) rate: u64,
    /// Most that is paid, millionths of the minor unit.
    pub(crate) ceiling: u64,
    /// Of rate and ceiling.
    pub(crate) currency: Currency,
    /// Most bytes that are acknowledged over all seeders before it is taken for abuse.
    pub(crate) claim_limit: u64,
    /// Who pays.
    pub(crate) payer: Payer,
    /// Closed then at the latest, unix milliseconds.
    pub(crate) due_at: u64,
    /// What was acknowledged.
    pub(crate) counting: Counting,
    /// From the closing on.
    pub(crate) closed: Option<Closed>,
}

/// How a delivery ended.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Closed {
    /// Unix milliseconds.
    pub(crate) at: u64,
    /// What the payer was charged, minor units.
    pub(crate) charged: u64,
    /// The ceiling was reached.
    pub(crate) capped: bool,
    /// Who earned what.
    pub(crate) lines: Vec<Payout>,
}

/// How many reservations a merchant has open, with those that it cancelled before their time was over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Standing {
    reservations: u32,
}

wire! {
    Sale => 32 * 1024,
    SaleRef => 32,
    Generation => 8,
    Voided => 16,
    MoveRecord => 3 * 1024,
    Delivery => 300 * 1024,
    Standing => 16,
}

/// Why a change of a sale was not made. Nothing of it is stored then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaleError {
    /// Somebody asked for what cannot be.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The books.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

impl SaleError {
    /// The store failed, until it is opened again: whoever goes through many ends here. Anything else is of the one alone.
    pub(crate) fn ends_all(&self) -> bool {
        matches!(self, SaleError::Store(StoreError::DiskFull { .. } | StoreError::Failed { .. }))
    }

    /// What the peer is told; this manager's own failures are logged and not described to it.
    pub(crate) fn into_refusal(self) -> Refusal {
        match self {
            SaleError::Refused(refusal) => refusal,
            SaleError::Store(error) => internal(&error),
            SaleError::Ledger(error) => internal(&error),
        }
    }
}

/// Logs an error of this manager's own and gives the refusal that stands for it.
pub(crate) fn internal(error: &dyn std::fmt::Display) -> Refusal {
    tracing::error!(%error, code = RefusalCode::Internal.as_str(), "the manager failed at its own work");
    Refusal::new(RefusalCode::Internal, "the manager failed at its own work; try again later").retry_after(5000)
}

impl Release {
    /// When a lease ends that takes the place of this one while the payment is held: not later, nor later than this one
    /// would from `now` on, where a clock that was ahead signed it.
    pub(crate) fn held_until(&self, now: u64) -> u64 {
        self.lease_end.min(now.saturating_add(self.lease_end.saturating_sub(self.lease_start)))
    }
}

impl Sale {
    /// The sale's id.
    pub(crate) fn id(&self) -> Result<TransactionId, Refusal> {
        Ok(self.data.peek()?.transaction)
    }

    /// The price.
    pub(crate) fn price(&self) -> Amount {
        self.request.price
    }

    /// The newest lease is of an earlier generation: it was ended, and nobody has asked for the next one yet.
    pub(crate) fn lease_ended(&self, release: &Release) -> bool {
        release.lease.peek().is_ok_and(|lease| lease.generation < self.generation)
    }

    /// Released, with the payment held until the client has completed.
    pub(crate) fn awaits_completion(&self) -> bool {
        !state::is_taken_back(self.state) && self.release.as_ref().is_some_and(|release| !release.captured)
    }

    /// Why the event cannot follow, if it cannot.
    pub(crate) fn may(&self, event: Event) -> Result<(), Refusal> {
        state::next(self.state, event).map(drop)
    }

    /// Takes the state on.
    pub(crate) fn advance(&mut self, event: Event, now: u64) -> Result<(), Refusal> {
        let next = state::next(self.state, event)?;
        if next != self.state {
            self.state = next;
            self.changed_at = now;
        }
        Ok(())
    }
}

/// The paid delivery of a sale that is released with this lease.
pub(crate) fn delivery_of(lease: &Lease, manifest: Digest, layout: Layout, due_at: u64) -> Delivery {
    Delivery {
        client: lease.client,
        manifest,
        layout,
        rate: lease.rate,
        ceiling: lease.ceiling,
        currency: lease.currency,
        claim_limit: lease.allowance,
        payer: lease.payer,
        due_at,
        counting: Counting::default(),
        closed: None,
    }
}

/// Puts a new or changed sale, and its new state into the audit log. `before` is the state in which it is stored until
/// now; `None` for a new one.
pub(crate) fn put_sale(
    txn: &WriteTransaction<'_>,
    id: &TransactionId,
    before: Option<TransactionState>,
    sale: &Sale,
) -> Result<(), StoreError> {
    if before != Some(sale.state) {
        let detail = match before {
            Some(before) => format!("{} -> {}", before.as_str(), sale.state.as_str()),
            None => format!("order {} of {}: -> {}", sale.request.order, sale.merchant, sale.state.as_str()),
        };
        audit::note(txn, sale.changed_at, "sale", id, detail)?;
        if is_over(sale.state) {
            RESTING.put(txn, &(sale.changed_at, *id), &Mark)?;
        }
    }
    SALES.put(txn, id, sale)
}

/// Puts a new or changed delivery.
pub(crate) fn put_delivery(txn: &WriteTransaction<'_>, id: DeliveryId, delivery: &Delivery) -> Result<(), StoreError> {
    DELIVERIES.put(txn, &(id.transaction, id.delivery), delivery)
}

/// Puts a delivery that was not there before, and when it is due.
pub(crate) fn open_delivery(txn: &WriteTransaction<'_>, id: DeliveryId, delivery: &Delivery) -> Result<(), StoreError> {
    DUE.put(txn, &(delivery.due_at, id.transaction, id.delivery), &Mark)?;
    put_delivery(txn, id, delivery)
}

/// A page of what is open in the order of its time, after the given place.
pub(crate) fn open_sales(
    txn: &impl Txn,
    after: Option<(u64, TransactionId, u32)>,
) -> Result<Vec<(u64, TransactionId, u32)>, StoreError> {
    const PAGE: usize = 256;
    let start = after.map_or(Bound::Unbounded, Bound::Excluded);
    Ok(DUE.range(txn, (start, Bound::Unbounded), PAGE)?.into_iter().map(|(key, _)| key).collect())
}

/// A sale and the delivery of it, for a change.
pub(crate) fn get_delivery(txn: &impl Txn, id: DeliveryId) -> Result<Option<Delivery>, StoreError> {
    DELIVERIES.get(txn, &(id.transaction, id.delivery))
}

/// Counts one more open reservation of a merchant; `limit-reached` when it has as many as it may.
pub(crate) fn add_reservation(txn: &WriteTransaction<'_>, merchant: &PeerId, limit: u32) -> Result<(), SaleError> {
    let mut standing = STANDINGS.get(txn, merchant)?.unwrap_or_default();
    if standing.reservations >= limit {
        let detail = format!(
            "{limit} reservations are open or were cancelled before their time; release some, or wait until it is over"
        );
        return Err(Refusal::new(RefusalCode::LimitReached, detail).retry_after(10_000).into());
    }
    standing.reservations += 1;
    Ok(STANDINGS.put(txn, merchant, &standing)?)
}

/// Takes a sale out of the open reservations.
pub(crate) fn drop_reservation(txn: &WriteTransaction<'_>, id: TransactionId, sale: &Sale) -> Result<(), StoreError> {
    if EXPIRING.delete(txn, &(sale.expires_at, id))? {
        let mut standing = STANDINGS.get(txn, &sale.merchant)?.unwrap_or_default();
        standing.reservations = standing.reservations.saturating_sub(1);
        STANDINGS.put(txn, &sale.merchant, &standing)?;
    }
    Ok(())
}
