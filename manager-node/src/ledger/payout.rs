//! From what seeders earned, which is far below a minor unit for a small file, to whole minor units in their accounts.
//!
//! What is rounded is carried: a seeder's fraction until it makes a whole unit, and what a payer paid ahead by rounding
//! up until the next bill. The pot holds exactly both together, so no rounding is anybody's gain or loss.

use bincode::{Decode, Encode};
use protocol::receipt::DeliveryId;
use protocol::settling::Payouts;
use protocol::statement::EarningLine;
use protocol::{Currency, PeerId, TransactionId, wire};
use store::{Table, WriteTransaction};

use crate::statements;

use super::{Account, LedgerError, Posting, currency_key, enter, was_posted};

pub(crate) use protocol::statement::PARTS_PER_MINOR;

/// Fractions of a minor unit, by currency and holder's account: owed to a seeder, or paid ahead by a payer.
pub(crate) const CARRIED: Table<([u8; 3], String), Carried> = Table::new("ledger-carried");

/// Parts, always less than [`PARTS_PER_MINOR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Carried(pub(crate) u128);

wire!(Carried => 32);

/// Where the pay comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// From what was set aside of a sale: this many minor units; what is not spent goes to the merchant.
    Escrow {
        /// Set aside.
        minor: u64,
        /// Whose sale.
        merchant: PeerId,
    },
    /// A sale that was never captured: the merchant owes it.
    Merchant(PeerId),
    /// The network.
    Network,
}

/// One delivery that is to be paid.
#[derive(Clone, Debug)]
pub(crate) struct Bill<'a> {
    /// Key of the posting.
    pub(crate) key: String,
    /// Unix milliseconds.
    pub(crate) at: u64,
    /// The sale or order.
    pub(crate) transaction: TransactionId,
    /// Which delivery of it.
    pub(crate) delivery: u32,
    /// Of the pay.
    pub(crate) currency: Currency,
    /// Who pays.
    pub(crate) source: Source,
    /// Who earned what.
    pub(crate) payouts: &'a Payouts,
}

/// Pays the seeders of a delivery and returns what the payer was charged, minor units; `None` when that was done before.
pub(crate) fn pay_seeders(txn: &WriteTransaction<'_>, bill: &Bill<'_>) -> Result<Option<u64>, LedgerError> {
    if was_posted(txn, &bill.key)? {
        return Ok(None);
    }
    let payer = match bill.source {
        Source::Escrow { merchant, .. } | Source::Merchant(merchant) => Account::MerchantDue(merchant),
        Source::Network => Account::NetworkCost,
    };
    let mut posting = Posting::new(bill.key.clone(), bill.at, Some(bill.transaction), "delivery closed");
    let currency = bill.currency;

    let held = holder(currency, &payer);
    let ahead = carried(txn, &held)?;
    let short = bill.payouts.parts.saturating_sub(ahead);
    let charge = units(short.div_ceil(PARTS_PER_MINOR), bill, &payer)?;
    // Less than one unit, because only rounding up pays ahead.
    carry(txn, &held, ahead + u128::from(charge) * PARTS_PER_MINOR - bill.payouts.parts)?;

    match bill.source {
        Source::Escrow { minor, merchant } => {
            let rest = minor
                .checked_sub(charge)
                .ok_or_else(|| LedgerError::OutOfRange { key: bill.key.clone(), account: "escrow".to_owned() })?;
            posting.debit(Account::Escrow(bill.transaction), minor, currency)?;
            posting.credit(Account::MerchantEarned(merchant), rest, currency)?;
        }
        Source::Merchant(_) | Source::Network => posting.debit(payer, charge, currency)?,
    }
    posting.credit(Account::SeederPot, charge, currency)?;

    let mut paid = 0u64;
    for line in &bill.payouts.lines {
        let account = Account::Seeder(line.seeder);
        let held = holder(currency, &account);
        let owed = carried(txn, &held)? + line.parts;
        let whole = units(owed / PARTS_PER_MINOR, bill, &account)?;
        carry(txn, &held, owed % PARTS_PER_MINOR)?;
        posting.credit(account, whole, currency)?;
        let earning = EarningLine {
            delivery: DeliveryId { transaction: bill.transaction, delivery: bill.delivery },
            at: bill.at,
            bytes: line.bytes,
            parts: line.parts,
            currency,
            credited: whole,
            capped: bill.payouts.capped,
        };
        statements::earned(txn, &line.seeder, earning)?;
        paid = paid.saturating_add(whole);
    }
    posting.debit(Account::SeederPot, paid, currency)?;
    posting.check()?;
    enter(txn, &posting)?;
    Ok(Some(charge))
}

fn units(minor: u128, bill: &Bill<'_>, account: &Account) -> Result<u64, LedgerError> {
    u64::try_from(minor).map_err(|_| LedgerError::OutOfRange { key: bill.key.clone(), account: account.to_string() })
}

/// Under which name a fraction is carried.
fn holder(currency: Currency, account: &Account) -> ([u8; 3], String) {
    (currency_key(currency), account.to_string())
}

fn carried(txn: &WriteTransaction<'_>, holder: &([u8; 3], String)) -> Result<u128, LedgerError> {
    Ok(CARRIED.get(txn, holder)?.map_or(0, |carried| carried.0))
}

fn carry(txn: &WriteTransaction<'_>, holder: &([u8; 3], String), parts: u128) -> Result<(), LedgerError> {
    match parts {
        0 => drop(CARRIED.delete(txn, holder)?),
        parts => CARRIED.put(txn, holder, &Carried(parts))?,
    }
    Ok(())
}
