//! Where the money of every sale is: double entry in integers, so that a sum that does not come out shows the fault at
//! the posting that made it. Each posting has a key of its own and is made once, however often a crash repeats it.

mod payout;
mod split;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::{Bound, ControlFlow};

use bincode::{Decode, Encode};
use protocol::{Currency, PeerId, TransactionId, wire};
use serde_json::{Value, json};
use store::{Mark, StoreError, Table, Txn, WriteTransaction};

pub(crate) use payout::{Bill, Source, pay_seeders};
pub(crate) use split::{Split, Terms};

/// Postings in the order in which they were made.
const POSTINGS: Table<u64, Posting> = Table::new("ledger-postings");
/// Number of the posting made under a key.
const POSTING_KEYS: Table<String, PostingNumber> = Table::new("ledger-posting-keys");
/// Postings of a transaction.
const POSTINGS_OF: Table<(TransactionId, u64), Mark> = Table::new("ledger-postings-of");
/// Number of the newest posting, whether it is here or moved out with its transaction.
const NEWEST: Table<(), PostingNumber> = Table::new("ledger-newest");
/// Balances that are not zero, by currency and account: settled escrows drop out, so the table stays as small as
/// the number of parties and open deliveries.
const BALANCES: Table<([u8; 3], String), Balance> = Table::new("ledger-balances");

/// Whose money. A balance is debits minus credits: positive is owed to the network, negative is owed by it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Encode, Decode)]
pub(crate) enum Account {
    /// What a merchant collected from buyers or owes for deliveries.
    MerchantDue(PeerId),
    /// A merchant's part of its sales.
    MerchantEarned(PeerId),
    /// A rights holder's part, by the name that the publication gives.
    RightsHolder(String),
    /// Set aside for one delivery.
    Escrow(TransactionId),
    /// Earned by seeders and not yet a whole minor unit of any of them.
    SeederPot,
    /// A seeder's pay.
    Seeder(PeerId),
    /// The network's fee.
    NetworkFee,
    /// What the network pays for replication.
    NetworkCost,
    /// Money that moved outside: paid in by merchants, paid out to the others.
    Bank,
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Account::MerchantDue(peer) => write!(f, "merchant-due:{peer}"),
            Account::MerchantEarned(peer) => write!(f, "merchant-earned:{peer}"),
            Account::RightsHolder(name) => write!(f, "rights-holder:{name}"),
            Account::Escrow(transaction) => write!(f, "escrow:{transaction}"),
            Account::SeederPot => f.write_str("seeder-pot"),
            Account::Seeder(peer) => write!(f, "seeder:{peer}"),
            Account::NetworkFee => f.write_str("network-fee"),
            Account::NetworkCost => f.write_str("network-cost"),
            Account::Bank => f.write_str("bank"),
        }
    }
}

/// One side of a posting.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Entry {
    /// Where.
    pub(crate) account: Account,
    /// Minor units; positive is debit.
    pub(crate) minor: i64,
    /// Of what.
    pub(crate) currency: Currency,
}

/// Money that moves: entries that add up to zero in each currency.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Posting {
    /// Made once under this name.
    pub(crate) key: String,
    /// Unix milliseconds.
    pub(crate) at: u64,
    /// The sale or replication order that it belongs to.
    pub(crate) transaction: Option<TransactionId>,
    /// For people.
    pub(crate) memo: String,
    /// The sides.
    pub(crate) entries: Vec<Entry>,
}

/// Most entries of one posting: two for each of the 64 seeders of a delivery, and as many rights holders again.
pub(crate) const MAX_ENTRIES: usize = 256;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct PostingNumber(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Balance(i64);

wire! {
    Posting => 96 * 1024,
    PostingNumber => 16,
    Balance => 16,
}

/// Why a posting was not made. Nothing of it is stored then.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LedgerError {
    /// The entries do not add up.
    #[error("posting {key} does not add up: {currency} is off by {sum} minor units")]
    Unbalanced { key: String, currency: Currency, sum: i128 },
    /// More entries than a posting holds.
    #[error("posting {key} has {entries} entries, at most 256 are stored")]
    TooMany { key: String, entries: usize },
    /// A sum that no balance can hold.
    #[error("posting {key}: the amount for {account} is out of range")]
    OutOfRange { key: String, account: String },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Posting {
    /// An empty posting under `key`.
    pub(crate) fn new(key: String, at: u64, transaction: Option<TransactionId>, memo: impl Into<String>) -> Self {
        Posting { key, at, transaction, memo: memo.into(), entries: Vec::new() }
    }

    /// Adds a debit; nothing for 0.
    pub(crate) fn debit(&mut self, account: Account, minor: u64, currency: Currency) -> Result<(), LedgerError> {
        self.entry(account, i64::try_from(minor).ok(), currency)
    }

    /// Adds a credit; nothing for 0.
    pub(crate) fn credit(&mut self, account: Account, minor: u64, currency: Currency) -> Result<(), LedgerError> {
        self.entry(account, i64::try_from(minor).ok().map(|minor| -minor), currency)
    }

    fn entry(&mut self, account: Account, minor: Option<i64>, currency: Currency) -> Result<(), LedgerError> {
        match minor {
            None => Err(LedgerError::OutOfRange { key: self.key.clone(), account: account.to_string() }),
            Some(0) => Ok(()),
            Some(minor) => {
                self.entries.push(Entry { account, minor, currency });
                Ok(())
            }
        }
    }

    fn check(&self) -> Result<(), LedgerError> {
        if self.entries.len() > MAX_ENTRIES {
            return Err(LedgerError::TooMany { key: self.key.clone(), entries: self.entries.len() });
        }
        let mut sums: BTreeMap<Currency, i128> = BTreeMap::new();
        for entry in &self.entries {
            *sums.entry(entry.currency).or_default() += i128::from(entry.minor);
        }
        match sums.into_iter().find(|(_, sum)| *sum != 0) {
            Some((currency, sum)) => Err(LedgerError::Unbalanced { key: self.key.clone(), currency, sum }),
            None => Ok(()),
        }
    }

    /// For people.
    pub(crate) fn to_json(&self, number: u64) -> Value {
        let entries: Vec<Value> = self
            .entries
            .iter()
            .map(|e| json!({"account": e.account.to_string(), "minor": e.minor, "currency": e.currency}))
            .collect();
        json!({
            "number": number, "key": self.key, "at": self.at, "transaction": self.transaction,
            "memo": self.memo, "entries": entries,
        })
    }
}

/// Makes a posting; false when one was made under its key before. A posting without entries only takes its key.
pub(crate) fn post(txn: &WriteTransaction<'_>, posting: &Posting) -> Result<bool, LedgerError> {
    posting.check()?;
    if was_posted(txn, &posting.key)? {
        return Ok(false);
    }
    enter(txn, posting)?;
    Ok(true)
}

/// Makes a posting that was checked and under whose key none was made.
fn enter(txn: &WriteTransaction<'_>, posting: &Posting) -> Result<(), LedgerError> {
    for entry in &posting.entries {
        let key = (currency_key(entry.currency), entry.account.to_string());
        let before = BALANCES.get(txn, &key)?.map_or(0, |balance| balance.0);
        let after = before
            .checked_add(entry.minor)
            .ok_or_else(|| LedgerError::OutOfRange { key: posting.key.clone(), account: key.1.clone() })?;
        if after == 0 {
            BALANCES.delete(txn, &key)?;
        } else {
            BALANCES.put(txn, &key, &Balance(after))?;
        }
    }
    let newest = match NEWEST.get(txn, &())? {
        Some(PostingNumber(number)) => number,
        None => POSTINGS.last(txn)?.map_or(0, |(number, _)| number),
    };
    let number = newest.saturating_add(1);
    NEWEST.put(txn, &(), &PostingNumber(number))?;
    Ok(put_numbered(txn, number, posting)?)
}

fn put_numbered(txn: &WriteTransaction<'_>, number: u64, posting: &Posting) -> Result<(), StoreError> {
    POSTINGS.put(txn, &number, posting)?;
    POSTING_KEYS.put(txn, &posting.key, &PostingNumber(number))?;
    match posting.transaction {
        Some(transaction) => POSTINGS_OF.put(txn, &(transaction, number), &Mark),
        None => Ok(()),
    }
}

/// Puts postings back that [`remove`] took out; balances are as they were all the time.
pub(crate) fn put_back(txn: &WriteTransaction<'_>, postings: &[(u64, Posting)]) -> Result<(), StoreError> {
    postings.iter().try_for_each(|(number, posting)| put_numbered(txn, *number, posting))
}

/// Takes the postings of a transaction that moves out of the store, with their keys: none can be made under them again
/// before the transaction is back.
pub(crate) fn remove(txn: &WriteTransaction<'_>, postings: &[(u64, Posting)]) -> Result<(), StoreError> {
    for (number, posting) in postings {
        POSTINGS.delete(txn, number)?;
        POSTING_KEYS.delete(txn, &posting.key)?;
        if let Some(transaction) = posting.transaction {
            POSTINGS_OF.delete(txn, &(transaction, *number))?;
        }
    }
    Ok(())
}

/// Was a posting made under this key?
pub(crate) fn was_posted(txn: &impl Txn, key: &str) -> Result<bool, StoreError> {
    POSTING_KEYS.contains(txn, key)
}

/// Debits minus credits of an account, minor units.
pub(crate) fn balance(txn: &impl Txn, account: &Account, currency: Currency) -> Result<i64, StoreError> {
    Ok(BALANCES.get(txn, &(currency_key(currency), account.to_string()))?.map_or(0, |balance| balance.0))
}

/// Every currency in which somebody has a balance.
pub(crate) fn currencies(txn: &impl Txn) -> Result<BTreeSet<Currency>, StoreError> {
    let mut found = BTreeSet::new();
    let mut after = Bound::Unbounded;
    // From one to the next, past all accounts of each: a peer ID or a name begins below this.
    while let Some(((key, _), _)) = BALANCES.range(txn, (after, Bound::Unbounded), 1)?.into_iter().next() {
        found.insert(currency_of(key)?);
        after = Bound::Excluded((key, "\u{10ffff}".to_owned()));
    }
    Ok(found)
}

/// Sums over all accounts of a currency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Trial {
    /// Sum of the positive balances.
    pub(crate) debit: i128,
    /// Sum of the negative ones, as a positive number: the same, or the ledger is damaged.
    pub(crate) credit: i128,
}

/// The trial balance, by currency.
pub(crate) fn trial_balance(txn: &impl Txn) -> Result<BTreeMap<Currency, Trial>, StoreError> {
    let mut sums: BTreeMap<Currency, Trial> = BTreeMap::new();
    BALANCES.scan::<StoreError>(txn, .., |(currency, _), Balance(minor)| {
        let sum = sums.entry(currency_of(currency)?).or_default();
        if minor > 0 {
            sum.debit += i128::from(minor);
        } else {
            sum.credit -= i128::from(minor);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(sums)
}

/// The newest `limit` postings of those that did not move out with their transaction, oldest of them first, all balances but those of single escrows, and the trial balance.
pub(crate) fn to_json(txn: &impl Txn, before: Option<u64>, limit: usize) -> Result<Value, StoreError> {
    let end = before.map_or(Bound::Unbounded, Bound::Excluded);
    let mut postings = POSTINGS.range_back(txn, (Bound::Unbounded, end), limit)?;
    postings.reverse();
    let first = POSTINGS.first(txn)?.map(|(number, _)| number);
    let next = postings.first().map(|(number, _)| *number).filter(|oldest| first.is_some_and(|first| first < *oldest));
    let postings: Vec<Value> = postings.iter().map(|(number, posting)| posting.to_json(*number)).collect();
    let (mut accounts, mut accounts_left_out) = (Vec::new(), 0u64);
    let mut escrow: BTreeMap<Currency, i64> = BTreeMap::new();
    BALANCES.scan::<StoreError>(txn, .., |(currency, account), Balance(minor)| {
        let currency = currency_of(currency)?;
        if account.starts_with("escrow:") {
            let sum = escrow.entry(currency).or_default();
            *sum = sum.saturating_add(minor);
        } else if accounts.len() < MAX_ACCOUNTS_SHOWN {
            accounts.push(json!({"account": account, "minor": minor, "currency": currency}));
        } else {
            accounts_left_out += 1;
        }
        Ok(ControlFlow::Continue(()))
    })?;
    accounts.extend(escrow.iter().map(|(c, minor)| json!({"account": "escrow", "minor": minor, "currency": c})));
    let trial: Vec<Value> = trial_balance(txn)?
        .into_iter()
        .map(|(currency, t)| {
            json!({
                "currency": currency, "debit": i64::try_from(t.debit).ok(), "credit": i64::try_from(t.credit).ok(),
                "balanced": t.debit == t.credit,
            })
        })
        .collect();
    Ok(json!({
        "postings": postings, "next": next, "posting_count": POSTINGS.len(txn)?, "accounts": accounts,
        "accounts_left_out": accounts_left_out, "trial_balance": trial,
    }))
}

/// Most balances in one answer to the control socket, whose lines are at most 1 MiB.
const MAX_ACCOUNTS_SHOWN: usize = 4096;

/// The postings of one transaction that are in the store, with their numbers.
pub(crate) fn numbered_postings_of(
    txn: &impl Txn,
    transaction: &TransactionId,
) -> Result<Vec<(u64, Posting)>, StoreError> {
    let numbers = POSTINGS_OF.prefix(txn, transaction, usize::MAX)?;
    let mut out = Vec::with_capacity(numbers.len());
    for ((_, number), _) in numbers {
        out.extend(POSTINGS.get(txn, &number)?.map(|posting| (number, posting)));
    }
    Ok(out)
}

pub(crate) fn currency_key(currency: Currency) -> [u8; 3] {
    let mut key = [b'?'; 3];
    key.iter_mut().zip(currency.as_str().bytes()).for_each(|(to, from)| *to = from);
    key
}

fn currency_of(key: [u8; 3]) -> Result<Currency, StoreError> {
    std::str::from_utf8(&key)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| StoreError::Corrupt { table: BALANCES.name(), reason: "a key names no currency".to_owned() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests;
