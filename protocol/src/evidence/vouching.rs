//! What a key that was revoked signed proves nothing by itself, since whoever stole it gives any time. It counts where a
//! document of another key, which holds, names it by the digest of all its bytes: the manager vouches only for what is in
//! its own books.

use super::keys::KeySets;
use super::{DeliveryRecord, EvidencePack};
use crate::signed::{Document, Signed};
use crate::ticket::Lease;
use crate::trust::KeyPurpose;
use crate::utc::Utc;

/// What in a file vouches for its sale and its leases.
#[derive(Default)]
pub(super) struct Vouchers {
    sale: Option<String>,
    record: Option<DeliveryRecord>,
}

impl Vouchers {
    pub(super) fn of(pack: &EvidencePack, keys: &KeySets) -> Vouchers {
        let sale = pack.data.digest();
        let settlement = KeyPurpose::Settlement;
        let record = pack.record.as_ref().and_then(|signed| keys.open(signed, settlement, |r| r.at).ok());
        let record = record.filter(|record| record.transaction_data == sale);
        let nothing = pack.non_delivery.as_ref().and_then(|signed| keys.open(signed, settlement, |n| n.issued_at).ok());
        let nothing = nothing.filter(|word| word.transaction_data == sale);
        let lease = pack.leases.iter().position(|signed| {
            let opened = keys.open(signed, KeyPurpose::Ticket, |lease| lease.issued_at);
            opened.is_ok_and(|lease| lease.transaction_data == sale)
        });
        let by = match (&record, &nothing, lease) {
            (Some(_), _, _) => Some("the delivery record".to_owned()),
            (None, Some(_), _) => Some("the non-delivery".to_owned()),
            (None, None, lease) => lease.map(|number| format!("lease {}", number + 1)),
        };
        Vouchers { sale: by, record }
    }

    /// What vouches for the sale.
    pub(super) fn sale(&self) -> Option<String> {
        self.sale.clone()
    }

    /// What vouches for a lease. A newer lease does not: it names the sale, and no other lease.
    pub(super) fn lease<T>(&self, signed: &Signed<T>) -> Option<String>
    where
        T: Document,
    {
        let named = self.record.as_ref().is_some_and(|record| record.leases.contains(&signed.digest()));
        named.then(|| "the delivery record".to_owned())
    }

    /// What is to be said of a lease that the delivery record, made after it, does not name, though it names those by which
    /// the purchase was released.
    pub(super) fn unnamed(&self, signed: &Signed<Lease>, lease: &Lease) -> Option<String> {
        let record = self.record.as_ref().filter(|record| lease.issued_at <= record.at)?;
        if record.leases.contains(&signed.digest()) {
            return None;
        }
        let why = match record.restored_at.filter(|restored| lease.issued_at < *restored) {
            Some(restored) => {
                format!("the manager came back from a backup at {} and may have forgotten it", Utc(restored))
            }
            None => "another took its place, or it never was in the manager's books".to_owned(),
        };
        Some(format!("; the delivery record as of {} does not name it: {why}", Utc(record.at)))
    }
}

/// A document, and what vouches for it where its own key does not any more.
pub(super) type Vouched<T> = (T, Option<String>);

/// Opens a document by its key, or by what vouches for it if that was revoked.
pub(super) fn open<T: Document>(
    keys: &KeySets,
    signed: &Signed<T>,
    purpose: KeyPurpose,
    issued_at: impl Fn(&T) -> u64,
    voucher: Option<String>,
) -> Result<Vouched<T>, String> {
    let refusal = match keys.open(signed, purpose, issued_at) {
        Ok(document) => return Ok((document, None)),
        Err(refusal) => refusal,
    };
    match voucher {
        _ if !keys.is_revoked(signed, purpose) => Err(refusal.to_string()),
        None => Err(format!("{refusal}, and no other document in the file vouches for it")),
        Some(by) => match keys.open_revoked(signed, purpose) {
            Ok(document) => Ok((document, Some(by))),
            Err(refusal) => Err(refusal.to_string()),
        },
    }
}
