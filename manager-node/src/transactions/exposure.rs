//! What the network would lose for deliveries if a merchant never paid again, against what it paid ahead. That is not
//! counted here but is in the ledger: a payment of what is due is none, and what was paid ahead is used up by what becomes
//! due later.

use bincode::{Decode, Encode};
use protocol::{Amount, Currency, PeerId, Refusal, RefusalCode, wire};
use store::{StoreError, Table, Txn, WriteTransaction};

use super::SaleError;
use crate::ledger::{Account, balance, currency_key};

/// What each merchant may come to owe for deliveries, by currency.
const EXPOSURES: Table<(PeerId, [u8; 3]), Exposure> = Table::new("merchant-exposure");
/// The same as it was kept before, with a count of what was paid in that took payments of what was due for payments ahead.
const EARLIER: Table<(PeerId, [u8; 3]), Earlier> = Table::new("merchant-exposures");

/// Minor units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Exposure {
    /// Ceilings of deliveries under way.
    open: u64,
    /// Cost of deliveries that were closed, less what was paid for them.
    owed: u64,
    /// So much of `open` is in what the merchant owes by the ledger already, as a part of prices.
    booked: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Earlier {
    open: u64,
    owed: u64,
    deposit: u64,
}

wire! {
    Exposure => 32,
    Earlier => 32,
}

/// What a merchant may come to owe for deliveries, minor units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Credit {
    /// Ceilings of deliveries under way.
    pub(super) open: u64,
    /// Cost of deliveries that were closed and not paid for.
    pub(super) owed: u64,
    /// Paid in beyond all that is due: it stands for what is open, and for what is sold next. One of it and `owed` is
    /// always 0.
    pub(super) deposit: u64,
}

impl Exposure {
    fn load(txn: &impl Txn, key: &(PeerId, [u8; 3])) -> Result<Exposure, StoreError> {
        match EXPOSURES.get(txn, key)? {
            Some(exposure) => Ok(exposure),
            // What was booked is not known of old deliveries: taken for nothing, less can be sold until they are closed.
            None => Ok(EARLIER.get(txn, key)?.map_or(Exposure::default(), |Earlier { open, owed, .. }| Exposure {
                open,
                owed,
                booked: 0,
            })),
        }
    }

    /// What was paid in beyond all that is due but for deliveries not paid for.
    fn ahead(&self, due: i128) -> u64 {
        let deliveries = i128::from(self.owed) + i128::from(self.booked.min(self.open));
        u64::try_from((deliveries - due).max(0)).unwrap_or(u64::MAX)
    }

    /// Pays what is owed from what was paid ahead.
    fn settle(&mut self, due: i128) {
        self.owed -= self.owed.min(self.ahead(due));
    }
}

/// What a merchant owes by the ledger, less what it paid in: also what it was paid as earned and has to give back since.
fn due(txn: &impl Txn, merchant: &PeerId, currency: Currency) -> Result<i128, StoreError> {
    let due = balance(txn, &Account::MerchantDue(*merchant), currency)?;
    let overpaid = balance(txn, &Account::MerchantEarned(*merchant), currency)?.max(0);
    Ok(i128::from(due) + i128::from(overpaid))
}

/// Changes what is kept of a merchant, and pays then what can be paid from what it paid ahead.
fn change<E: From<StoreError>>(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    currency: Currency,
    change: impl FnOnce(&mut Exposure, i128) -> Result<(), E>,
) -> Result<(), E> {
    let key = (*merchant, currency_key(currency));
    let (mut exposure, due) = (Exposure::load(txn, &key)?, due(txn, merchant, currency)?);
    change(&mut exposure, due)?;
    exposure.settle(due);
    Ok(EXPOSURES.put(txn, &key, &exposure)?)
}

/// Debits a merchant's credit with a delivery's ceiling, before the sale is in the books; `limit-reached` when it would go
/// beyond `limit` and what was paid ahead.
pub(crate) fn expose(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    escrow: Amount,
    limit: u64,
) -> Result<(), SaleError> {
    change(txn, merchant, escrow.currency, |exposure, due| {
        exposure.settle(due);
        let after = exposure.open.saturating_add(exposure.owed).saturating_add(escrow.minor);
        let deposit = exposure.ahead(due);
        if escrow.minor > 0 && after > limit.saturating_add(deposit) {
            let [limit, deposit] = [limit, deposit].map(|minor| Amount { minor, currency: escrow.currency });
            let detail =
                format!("the merchant's credit of {limit} and deposit of {deposit} for deliveries are used up; pay in");
            return Err(Refusal::new(RefusalCode::LimitReached, detail).into());
        }
        exposure.open = exposure.open.saturating_add(escrow.minor);
        Ok(())
    })
}

/// Notes that a sale was taken into the books whose delivery is under way.
pub(super) fn booked(txn: &WriteTransaction<'_>, merchant: &PeerId, escrow: Amount) -> Result<(), StoreError> {
    change(txn, merchant, escrow.currency, |exposure, _| {
        exposure.booked = exposure.booked.saturating_add(escrow.minor);
        Ok(())
    })
}

/// Replaces what was set aside for a delivery by what it cost, after that was posted.
pub(super) fn unexpose(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    escrow: Amount,
    captured: bool,
    charged: u64,
) -> Result<(), StoreError> {
    change(txn, merchant, escrow.currency, |exposure, _| {
        exposure.open = exposure.open.saturating_sub(escrow.minor);
        if captured {
            exposure.booked = exposure.booked.saturating_sub(escrow.minor).min(exposure.open);
        }
        exposure.owed = exposure.owed.saturating_add(charged);
        Ok(())
    })
}

/// Notes that a merchant paid in, after that was posted: deliveries that were closed are paid for first.
pub(super) fn paid_in(txn: &WriteTransaction<'_>, merchant: &PeerId, amount: Amount) -> Result<(), StoreError> {
    change(txn, merchant, amount.currency, |exposure, _| {
        exposure.owed = exposure.owed.saturating_sub(amount.minor);
        Ok(())
    })
}

/// What a merchant may come to owe.
pub(super) fn credit(txn: &impl Txn, merchant: &PeerId, currency: Currency) -> Result<Credit, StoreError> {
    let mut exposure = Exposure::load(txn, &(*merchant, currency_key(currency)))?;
    let due = due(txn, merchant, currency)?;
    exposure.settle(due);
    Ok(Credit { open: exposure.open, owed: exposure.owed, deposit: exposure.ahead(due) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use store::{Db, Options};

    #[test]
    fn what_an_earlier_build_kept_is_read_but_for_its_count_of_payments() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("m.redb"), Options::new(1)).unwrap();
        let (merchant, usd) = (PeerId::from_bytes([3; 32]), Currency::USD);
        let key = (merchant, currency_key(usd));
        let (open, owed) = (70, 5);
        db.write_blocking(move |txn| EARLIER.put(txn, &key, &Earlier { open, owed, deposit: 12_886 })).unwrap();
        let read = || db.read(|txn| credit(txn, &merchant, usd)).unwrap();
        // Nothing is due by the ledger: all was paid for.
        assert_eq!(read(), Credit { open, owed: 0, deposit: 0 });
        let escrow = Amount { minor: 7, currency: usd };
        let expose = |limit| db.write_blocking(move |txn| expose(txn, &merchant, escrow, limit));
        assert!(matches!(expose(76), Err(SaleError::Refused(refusal)) if refusal.code == RefusalCode::LimitReached));
        expose(77).unwrap();
        assert_eq!(read(), Credit { open: open + 7, owed: 0, deposit: 0 });
    }
}
