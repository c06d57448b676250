//! Statements of account for seeders: what became of every receipt and where every unit of pay comes from. Lines are
//! noted in the same database transaction as what they tell of; a statement only cuts them off, adds them up and signs.

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod damaged_tests;
mod explain;
mod make;
mod payouts;
mod renew;

use bincode::{Decode, Encode};
use protocol::statement::{EarningLine, PaymentLine, ReceiptFate, ReceiptLine, Statement, Unlisted};
use protocol::{Currency, Digest, PeerId, Signed, TransactionId, wire};
use store::{StoreError, Table, Txn, WriteTransaction};

use crate::archive::{Archive, Kind, Place};

pub(crate) use explain::explain;
pub(crate) use make::{after, make, start, step};
pub(crate) use payouts::{After, file, list, make_now, payouts};
pub(crate) use renew::renew_all;

/// What happened to a seeder's account, in order, until the statement that tells of it is old.
const JOURNAL: Table<(PeerId, u64), Entry> = Table::new("statement-journal");
/// Where in the journal a receipt is.
const FATES: Table<(PeerId, Digest), Fate> = Table::new("receipt-fates");
/// Where in the journal a delivery's pay is.
const EARNINGS: Table<(PeerId, TransactionId, u32), Fate> = Table::new("statement-earnings");
/// How far each seeder's statements are.
const BOOKS: Table<PeerId, Books> = Table::new("statement-books");
/// Signed statements. They are kept for as long as the books: those of the last months here …
const STATEMENTS: Table<(PeerId, u64), Signed<Statement>> = Table::new("statements");
/// … and older ones in segments.
const OLD_STATEMENTS: Table<(PeerId, u64), Place> = Table::new("old-statements");

/// Lines about receipts that did not count and are in no statement yet, at most, of one seeder: four full statements.
/// Further ones are only counted, so that nobody can fill the disk with what earns nothing. What counts is always noted.
const MAX_OPEN: u64 = 4096;

/// One line of a journal.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
enum Entry {
    Receipt(ReceiptLine),
    Earning(EarningLine),
    Payment(PaymentLine),
}

impl Entry {
    fn at(&self) -> u64 {
        match self {
            Entry::Receipt(line) => line.at,
            Entry::Earning(line) => line.at,
            Entry::Payment(line) => line.at,
        }
    }
}

/// Where something is in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Fate {
    sequence: u64,
    /// How often it came again.
    repeats: u64,
}

/// Where a seeder's statements stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Books {
    /// Number of the next line in the journal.
    next: u64,
    /// Lines before this one are in statements.
    covered: u64,
    /// Receipts without a line since the last statement.
    unlisted: Unlisted,
    /// Number of the last statement, 0 for none …
    number: u64,
    /// … its digest …
    last: Option<Digest>,
    /// … and the end of its period, unix milliseconds.
    until: u64,
    /// Owed and carried after it.
    balances: Vec<(Currency, u64, u128)>,
    /// First number of the journal that is still kept.
    kept_from: u64,
}

wire! {
    Entry => 512,
    Fate => 32,
    Books => 4096,
}

/// Notes what became of the receipts of a batch.
pub(crate) fn receipts(txn: &WriteTransaction<'_>, seeder: &PeerId, lines: Vec<ReceiptLine>) -> Result<(), StoreError> {
    let mut books = BOOKS.get(txn, seeder)?.unwrap_or_default();
    for mut line in lines {
        let key = (*seeder, line.receipt);
        let known = FATES.get(txn, &key)?;
        let counts = line.fate == ReceiptFate::Accepted;
        // The same bytes again, or too much that does not count: a number is enough.
        if !counts && (known.is_some() || books.next.saturating_sub(books.covered) >= MAX_OPEN) {
            if let Some(fate) = known {
                FATES.put(txn, &key, &Fate { repeats: fate.repeats.saturating_add(1), ..fate })?;
            }
            let count = match line.fate {
                ReceiptFate::Duplicate => &mut books.unlisted.duplicate,
                _ => &mut books.unlisted.rejected,
            };
            *count = count.saturating_add(1);
            continue;
        }
        if let ReceiptFate::Rejected { reason, .. } = &mut line.fate {
            reason.truncate(reason.floor_char_boundary(ReceiptLine::MAX_REASON));
        }
        FATES.put(txn, &key, &Fate { sequence: books.next, repeats: known.map_or(0, |fate| fate.repeats + 1) })?;
        JOURNAL.put(txn, &(*seeder, books.next), &Entry::Receipt(line))?;
        books.next = books.next.saturating_add(1);
    }
    BOOKS.put(txn, seeder, &books)
}

/// Notes the pay for a delivery.
pub(crate) fn earned(txn: &WriteTransaction<'_>, seeder: &PeerId, line: EarningLine) -> Result<(), StoreError> {
    let books = BOOKS.get(txn, seeder)?.unwrap_or_default();
    let key = (*seeder, line.delivery.transaction, line.delivery.delivery);
    EARNINGS.put(txn, &key, &Fate { sequence: books.next, repeats: 0 })?;
    note(txn, seeder, books, &Entry::Earning(line))
}

/// Notes that a seeder was paid out.
pub(crate) fn paid(txn: &WriteTransaction<'_>, seeder: &PeerId, line: PaymentLine) -> Result<(), StoreError> {
    let books = BOOKS.get(txn, seeder)?.unwrap_or_default();
    note(txn, seeder, books, &Entry::Payment(line))
}

fn note(txn: &WriteTransaction<'_>, seeder: &PeerId, mut books: Books, entry: &Entry) -> Result<(), StoreError> {
    JOURNAL.put(txn, &(*seeder, books.next), entry)?;
    books.next = books.next.saturating_add(1);
    BOOKS.put(txn, seeder, &books)
}

/// A statement, wherever it lies.
pub(crate) fn get(
    archive: &Archive,
    txn: &impl Txn,
    seeder: PeerId,
    number: u64,
) -> Result<Option<Signed<Statement>>, StoreError> {
    if let Some(signed) = STATEMENTS.get(txn, &(seeder, number))? {
        return Ok(Some(signed));
    }
    match OLD_STATEMENTS.get(txn, &(seeder, number))? {
        Some(place) => archive.get(place, Kind::Statement).map(Some),
        None => Ok(None),
    }
}

/// The statement that has line `sequence` of a seeder's journal.
fn statement_of(
    archive: &Archive,
    txn: &impl Txn,
    seeder: &PeerId,
    books: &Books,
    line: &Entry,
    sequence: u64,
) -> Result<Option<u64>, StoreError> {
    if sequence >= books.covered {
        return Ok(None);
    }
    let statement = |number| Ok::<_, StoreError>(get(archive, txn, *seeder, number)?.and_then(|s| s.peek().ok()));
    // Periods follow one another: the first that ended after the line was noted has it, or one of the next where
    // several were made at once.
    // Those that moved out are looked at for lines as old as they are only: one of them may be damaged.
    let first = STATEMENTS.prefix(txn, seeder, 1)?.into_iter().next();
    let first = first.and_then(|((_, number), signed)| Some((number, signed.peek().ok()?.from)));
    let (mut low, mut high) = match first {
        Some((number, from)) if from <= line.at() => (number, books.number),
        Some((number, _)) => (1, number),
        None => (1, books.number),
    };
    while low < high {
        let middle = low + (high - low) / 2;
        match statement(middle)? {
            None => return Ok(None),
            Some(statement) if statement.until < line.at() => low = middle + 1,
            Some(_) => high = middle,
        }
    }
    for number in low..=books.number {
        let Some(statement) = statement(number)? else { return Ok(None) };
        let found = match line {
            Entry::Receipt(line) => statement.receipts.contains(line),
            Entry::Earning(line) => statement.earnings.contains(line),
            Entry::Payment(line) => statement.payments.contains(line),
        };
        if found {
            return Ok(Some(number));
        }
        if statement.from > line.at() {
            return Ok(None);
        }
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests;
