//! A transaction with all that its tables hold of it, as one value: what moves into a segment and back. Its index rows
//! (order id, mailbox) stay in the store.

use bincode::{Decode, Encode};
use protocol::receipt::{Ack, Completion};
use protocol::{PeerId, Signed, TransactionId, wire};
use store::{StoreError, Txn, WriteTransaction};

use super::segments::MAX_BODY;
use crate::evidence;
use crate::ledger::{self, Posting};
use crate::transactions::{ACKS, COMPLETIONS, DELIVERIES, Delivery, SALES, Sale};

/// A transaction, whole.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Whole {
    /// The sale.
    pub(crate) sale: Sale,
    /// Its deliveries by number.
    pub(crate) deliveries: Vec<(u32, Delivery)>,
    /// The acknowledgements that count, by delivery and seeder.
    pub(crate) acks: Vec<(u32, PeerId, Signed<Ack>)>,
    /// The completions, by delivery.
    pub(crate) completions: Vec<(u32, Signed<Completion>)>,
    /// When the first word of it came in, unix milliseconds.
    pub(crate) first_at: Option<u64>,
    /// Its postings in the ledger, by number.
    pub(crate) postings: Vec<(u64, Posting)>,
}

wire!(Whole => MAX_BODY);

impl Whole {
    /// What the tables hold; `None` where there is no such sale.
    pub(crate) fn gather(txn: &impl Txn, id: &TransactionId) -> Result<Option<Whole>, StoreError> {
        let Some(sale) = SALES.get(txn, id)? else { return Ok(None) };
        let deliveries = DELIVERIES.prefix(txn, id, usize::MAX)?;
        let acks = ACKS.prefix(txn, id, usize::MAX)?;
        let completions = COMPLETIONS.prefix(txn, id, usize::MAX)?;
        Ok(Some(Whole {
            sale,
            deliveries: deliveries.into_iter().map(|((_, number), delivery)| (number, delivery)).collect(),
            acks: acks.into_iter().map(|((_, number, seeder), ack)| (number, seeder, ack)).collect(),
            completions: completions.into_iter().map(|((_, number), signed)| (number, signed)).collect(),
            first_at: evidence::first_at(txn, id)?,
            postings: ledger::numbered_postings_of(txn, id)?,
        }))
    }

    /// A delivery by its number.
    pub(crate) fn delivery(&self, number: u32) -> Option<&Delivery> {
        self.deliveries.iter().find(|(n, _)| *n == number).map(|(_, delivery)| delivery)
    }

    /// Is one of its deliveries still counted?
    pub(crate) fn has_open_delivery(&self) -> bool {
        self.deliveries.iter().any(|(_, delivery)| delivery.closed.is_none())
    }

    /// Puts it back into the tables that it was gathered from.
    pub(crate) fn put(&self, txn: &WriteTransaction<'_>, id: &TransactionId) -> Result<(), StoreError> {
        SALES.put(txn, id, &self.sale)?;
        for (number, delivery) in &self.deliveries {
            DELIVERIES.put(txn, &(*id, *number), delivery)?;
        }
        for (number, seeder, ack) in &self.acks {
            ACKS.put(txn, &(*id, *number, *seeder), ack)?;
        }
        for (number, signed) in &self.completions {
            COMPLETIONS.put(txn, &(*id, *number), signed)?;
        }
        if let Some(at) = self.first_at {
            evidence::heard_at(txn, *id, at)?;
        }
        ledger::put_back(txn, &self.postings)
    }

    /// Takes it out of them.
    pub(crate) fn remove(&self, txn: &WriteTransaction<'_>, id: &TransactionId) -> Result<(), StoreError> {
        SALES.delete(txn, id)?;
        for (number, _) in &self.deliveries {
            DELIVERIES.delete(txn, &(*id, *number))?;
        }
        for (number, seeder, _) in &self.acks {
            ACKS.delete(txn, &(*id, *number, *seeder))?;
        }
        for (number, _) in &self.completions {
            COMPLETIONS.delete(txn, &(*id, *number))?;
        }
        if self.first_at.is_some() {
            evidence::forget(txn, id)?;
        }
        ledger::remove(txn, &self.postings)
    }
}
