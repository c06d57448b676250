//! What the network would lose for deliveries if a merchant never paid again, against what it paid ahead. That is not
//! counted here but is in the ledger: a payment of what is due is none, and what was paid ahead is used up by what becomes
//! due later.

use bincode::{Decode, Encode};
use protocol::{Amount, Currency, PeerId, Refusal, RefusalCode, wire};
use store::{StoreError, Table, Txn, WriteTransaction};

use std::ops::ControlFlow;

use super::SaleError;
use crate::ledger::{Account, Split, balance, currency_key};

/// What each merchant may come to owe for deliveries, by currency.
const EXPOSURES: Table<(PeerId, [u8; 3]), Exposure> = Table::new("merchant-exposure");
/// The same as it was kept before, with a count of what was paid in that took payments of what was due for payments ahead.
const EARLIER: Table<(PeerId, [u8; 3]), Earlier> = Table::new("merchant-exposures");
/// What rights holders were paid of a merchant's sales that were refunded since, by currency and rights holder: the next
/// sales bring it back, and until then no delivery can be paid from it.
const LENT: Table<(PeerId, [u8; 3], String), Lent> = Table::new("merchant-lent");

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

/// What the prices of sales that are not completed yet may take of what a merchant paid ahead, by currency.
const PROMISED: Table<(PeerId, [u8; 3]), Promised> = Table::new("merchant-promised");

/// Minor units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Lent(u64);

/// Minor units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Promised(u64);

wire! {
    Lent => 16,
    Promised => 16,
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
    /// Prices of sales that are not completed yet may take so much of that.
    pub(super) promised: u64,
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

    /// Is every delivery paid for within `limit`, with that of a sale that is made now, whichever sales are completed? What
    /// was paid ahead pays for prices first, and where the rest of them is paid then, and paid out again, nothing stands for
    /// the deliveries of the others. A completed sale takes its price less its delivery of what was paid ahead, and needs
    /// nothing of it for its delivery then.
    fn holds_whatever_completes(&self, split: &Split, promised: u64, limit: u64, due: i128) -> bool {
        let others = self.open - self.booked.min(self.open);
        let ahead = u64::try_from((-due).max(0)).unwrap_or(u64::MAX);
        let stands = match others {
            0 => ahead.min(split.escrow),
            _ => ahead.saturating_sub(promised).saturating_sub(taken(split)),
        };
        others.saturating_add(split.escrow) <= limit.saturating_add(stands)
    }
}

/// What a sale takes of what stands for deliveries when it is completed: its price, but for its own delivery, for which
/// nothing else has to stand any more then.
fn taken(split: &Split) -> u64 {
    split.price.minor.saturating_sub(split.escrow)
}

/// Changes what the prices of sales that are not completed yet may take.
fn promise(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    currency: Currency,
    change: impl FnOnce(u64) -> u64,
) -> Result<(), StoreError> {
    let key = (*merchant, currency_key(currency));
    match change(promised(txn, merchant, currency)?) {
        0 => PROMISED.delete(txn, &key).map(drop),
        minor => PROMISED.put(txn, &key, &Promised(minor)),
    }
}

fn promised(txn: &impl Txn, merchant: &PeerId, currency: Currency) -> Result<u64, StoreError> {
    Ok(PROMISED.get(txn, &(*merchant, currency_key(currency)))?.map_or(0, |promised| promised.0))
}

/// What a merchant owes by the ledger, less what it paid in: also what it and the rights holders of its sales were paid as
/// earned and have to give back since.
fn due(txn: &impl Txn, merchant: &PeerId, currency: Currency) -> Result<i128, StoreError> {
    let due = balance(txn, &Account::MerchantDue(*merchant), currency)?;
    let overpaid = overpaid(txn, &Account::MerchantEarned(*merchant), currency)?;
    let mut lent = 0;
    let first = (*merchant, currency_key(currency), String::new());
    LENT.scan(txn, first.clone().., |(of, key, holder), Lent(minor)| {
        if (of, key) != (first.0, first.1) {
            return Ok::<_, StoreError>(ControlFlow::Break(()));
        }
        // Another merchant's sale may have brought it back.
        lent += i128::from(minor.min(self::overpaid(txn, &Account::RightsHolder(holder), currency)?));
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(i128::from(due) + i128::from(overpaid) + lent)
}

/// What somebody was paid beyond all that it earned, minor units.
fn overpaid(txn: &impl Txn, account: &Account, currency: Currency) -> Result<u64, StoreError> {
    Ok(u64::try_from(balance(txn, account, currency)?).unwrap_or(0))
}

/// Notes, after that was posted, that rights holders got their parts of a sale, or gave them back where it was refunded.
pub(super) fn shared(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    split: &Split,
    refunded: bool,
) -> Result<(), StoreError> {
    let currency = split.price.currency;
    for (holder, minor) in &split.rights {
        let key = (*merchant, currency_key(currency), holder.clone());
        let before = LENT.get(txn, &key)?.map_or(0, |lent| lent.0);
        let after = if refunded { before.saturating_add(*minor) } else { before.saturating_sub(*minor) };
        match after.min(overpaid(txn, &Account::RightsHolder(key.2.clone()), currency)?) {
            0 if before == 0 => {}
            0 => drop(LENT.delete(txn, &key)?),
            after => LENT.put(txn, &key, &Lent(after))?,
        }
    }
    Ok(())
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
/// beyond `limit` and what was paid ahead, now or when sales that await their completion are completed. With `awaits` this
/// is one of them.
pub(crate) fn expose(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    split: &Split,
    awaits: bool,
    limit: u64,
) -> Result<(), SaleError> {
    let currency = split.price.currency;
    let promised = promised(txn, merchant, currency)?;
    change(txn, merchant, currency, |exposure, due| {
        exposure.settle(due);
        let after = exposure.open.saturating_add(exposure.owed).saturating_add(split.escrow);
        let deposit = exposure.ahead(due);
        let refused = |why: &str| {
            let [limit, deposit] = [limit, deposit].map(|minor| Amount { minor, currency });
            let detail = format!(
                "the merchant's credit of {limit} and deposit of {deposit} for deliveries are used up{why}; pay in"
            );
            Err::<(), SaleError>(Refusal::new(RefusalCode::LimitReached, detail).into())
        };
        if split.escrow > 0 && after > limit.saturating_add(deposit) {
            return refused("");
        }
        // One whose delivery costs nothing takes its price all the same.
        if split.price.minor > 0 && !exposure.holds_whatever_completes(split, promised, limit, due) {
            return refused(" as soon as the prices of sales under way become due");
        }
        exposure.open = exposure.open.saturating_add(split.escrow);
        Ok(())
    })?;
    match awaits {
        true => Ok(promise(txn, merchant, currency, |minor| minor.saturating_add(taken(split)))?),
        false => Ok(()),
    }
}

/// Notes that a sale was taken into the books whose delivery is under way; with `awaited` one that awaited its completion.
pub(super) fn booked(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    split: &Split,
    awaited: bool,
) -> Result<(), StoreError> {
    if awaited {
        promise(txn, merchant, split.price.currency, |minor| minor.saturating_sub(taken(split)))?;
    }
    change(txn, merchant, split.price.currency, |exposure, _| {
        exposure.booked = exposure.booked.saturating_add(split.escrow);
        Ok(())
    })
}

/// Replaces what was set aside for a delivery by what it cost, after that was posted.
pub(super) fn unexpose(
    txn: &WriteTransaction<'_>,
    merchant: &PeerId,
    split: &Split,
    captured: bool,
    charged: u64,
) -> Result<(), StoreError> {
    if !captured {
        promise(txn, merchant, split.price.currency, |minor| minor.saturating_sub(taken(split)))?;
    }
    change(txn, merchant, split.price.currency, |exposure, _| {
        exposure.open = exposure.open.saturating_sub(split.escrow);
        if captured {
            exposure.booked = exposure.booked.saturating_sub(split.escrow).min(exposure.open);
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
    let promised = promised(txn, merchant, currency)?;
    Ok(Credit { open: exposure.open, owed: exposure.owed, deposit: exposure.ahead(due), promised })
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
        assert_eq!(read(), Credit { open, owed: 0, deposit: 0, promised: 0 });
        let expose = |limit| {
            let price = Amount { minor: 7, currency: usd };
            let split =
                Split { price, rights: Vec::new(), fee: 0, escrow: 7, merchant: 0, rate: 1, ceiling: 7_000_000 };
            db.write_blocking(move |txn| expose(txn, &merchant, &split, false, limit))
        };
        assert!(matches!(expose(76), Err(SaleError::Refused(refusal)) if refusal.code == RefusalCode::LimitReached));
        expose(77).unwrap();
        assert_eq!(read(), Credit { open: open + 7, owed: 0, deposit: 0, promised: 0 });
    }
}
