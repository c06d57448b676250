//! The manager's log of what it did to sales, enrolments, keys and revocations. Each entry holds the digest of the one
//! before, so that nothing can be changed, left out or put in between without changing every digest after it: whoever
//! keeps a copy of the last digest elsewhere can tell. Heartbeats carry it to every seeder, so that there are copies.

use bincode::{Decode, Encode};
use protocol::trust::AuditHead;
use protocol::{Digest, Refusal, RefusalCode, codec, wire};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use store::{StoreError, Table, Txn, WriteTransaction};

mod heads;
mod verify;

pub use heads::{HeadsError, SeenHead, Standing, read_heads};
pub use verify::{AuditError, AuditReport, HeadsReport, RestoreEntry, verify_audit};

use crate::archive::{Archive, Kind, Place};
use crate::context::Context;
use crate::transactions::SaleError;

/// The newest entries, from 1 on. It grows with the sales, by four or five entries of about 150 bytes each …
const AUDIT: Table<u64, Entry> = Table::new("audit");
/// … and what is older moves out, a page at a time: where a page lies, by the number of its last entry.
const PAGES: Table<u64, Place> = Table::new("audit-pages");
/// Entries that stay in the store at least: a page for whoever looks at what is new.
const KEPT: u64 = PAGE as u64;

/// Longest subject and detail, bytes: a peer ID with a name, a transaction with its order.
const MAX_TEXT: usize = 200;
/// Entries in one answer to the control socket, whose lines are at most 1 MiB.
const PAGE: usize = 1000;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Entry {
    /// Unix milliseconds.
    at: u64,
    /// Digest of the entry before, zeros before the first.
    previous: Digest,
    what: String,
    subject: String,
    detail: String,
}

/// Entries that moved out together.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct Page {
    /// Number of the first.
    first: u64,
    entries: Vec<Entry>,
}

wire! {
    Entry => 1024,
    Page => PAGE * 1024,
}

/// An entry as it is exported: one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
struct Line {
    number: u64,
    at: u64,
    previous: Digest,
    what: String,
    subject: String,
    detail: String,
    digest: Digest,
}

fn digest(number: u64, at: u64, previous: &Digest, texts: [&str; 3]) -> Digest {
    let [what, subject, detail] = texts.map(str::as_bytes);
    let (number, at) = (number.to_le_bytes(), at.to_le_bytes());
    Digest::of("willcall 2026-11 audit entry", &[&number, &at, previous.as_bytes(), what, subject, detail])
}

impl Entry {
    fn digest(&self, number: u64) -> Digest {
        digest(number, self.at, &self.previous, [&self.what, &self.subject, &self.detail])
    }
}

/// What an entry about a restore from a backup is called; its subject is the restore number.
pub(crate) const RESTORE: &str = "restore";

/// What an entry about a cut is called; its subject is the first entry that stayed.
const CUT: &str = "audit-cut";

/// Where the chain of a whole log begins.
const START: Digest = Digest::from_bytes([0; 32]);

/// Adds an entry, in the same transaction as what it tells of.
pub(crate) fn note(
    txn: &WriteTransaction<'_>,
    at: u64,
    what: &str,
    subject: impl std::fmt::Display,
    detail: impl Into<String>,
) -> Result<(), StoreError> {
    let cut = |mut text: String| {
        text.truncate(text.floor_char_boundary(MAX_TEXT));
        text
    };
    let (number, previous) = match AUDIT.last(txn)? {
        Some((number, entry)) => (number.saturating_add(1), entry.digest(number)),
        None => (1, START),
    };
    let (subject, detail) = (cut(subject.to_string()), cut(detail.into()));
    AUDIT.put(txn, &number, &Entry { at, previous, what: what.to_owned(), subject, detail })
}

/// Moves the oldest page out of the store, when there is more than one. True when there was.
pub(crate) fn move_page(ctx: &Context) -> Result<bool, StoreError> {
    let entries = ctx.db.read(|txn| {
        let (first, last) = (AUDIT.first(txn)?, AUDIT.last(txn)?);
        let number = |entry: Option<(u64, Entry)>| entry.map_or(0, |(number, _)| number);
        match number(last).saturating_sub(number(first)) >= KEPT + PAGE as u64 {
            true => AUDIT.range(txn, .., PAGE),
            false => Ok(Vec::new()),
        }
    })?;
    let (Some(&(first, _)), Some(&(last, _))) = (entries.first(), entries.last()) else { return Ok(false) };
    let page = Page { first, entries: entries.into_iter().map(|(_, entry)| entry).collect() };
    ctx.archive.move_out(&ctx.db, &[(Kind::Audit, codec::encode(&page))], move |txn, places| {
        AUDIT.delete_range(txn, first..=last, PAGE)?;
        places.first().map_or(Ok(()), |place| PAGES.put(txn, &last, place))
    })?;
    Ok(true)
}

/// At most a page of entries after the given number, wherever they lie.
fn entries_after(archive: &Archive, txn: &impl Txn, after: u64) -> Result<Vec<(u64, Entry)>, StoreError> {
    // A page that a cut went through is there as a whole; what was cut off of it is not in the log any more.
    let first = CUT_AT.get(txn, &())?.map_or(0, |cut| cut.first);
    let after = after.max(first.saturating_sub(1));
    let Some((_, place)) = PAGES.range(txn, after.saturating_add(1).., 1)?.pop() else {
        return AUDIT.range(txn, after.saturating_add(1).., PAGE);
    };
    let page: Page = archive.get(place, Kind::Audit)?;
    Ok((page.first..).zip(page.entries).filter(|(number, _)| *number > after).collect())
}

/// A page of entries after the given number, as lines, and the number and digest of the newest entry.
pub(crate) fn page(archive: &Archive, txn: &impl Txn, after: u64) -> Result<Value, StoreError> {
    let entries = entries_after(archive, txn, after)?;
    let lines: Vec<Value> = entries
        .into_iter()
        .map(|(number, entry)| {
            let digest = entry.digest(number);
            let Entry { at, previous, what, subject, detail } = entry;
            json!(Line { number, at, previous, what, subject, detail, digest })
        })
        .collect();
    Ok(json!({"entries": lines, "head": head(txn)?}))
}

/// The newest entry.
pub(crate) fn head(txn: &impl Txn) -> Result<Option<AuditHead>, StoreError> {
    Ok(AUDIT.last(txn)?.map(|(number, entry)| AuditHead { number, digest: entry.digest(number) }))
}

/// The first entry that a cut left. One row.
const CUT_AT: Table<(), CutAt> = Table::new("audit-cut");

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct CutAt {
    first: u64,
}

wire!(CutAt => 16);

/// Entries removed in one database transaction, which other writers wait for.
const STEP: usize = 2000;

/// What was asked to be cut off is not what the log has.
const NOT_THIS_LOG: &str = "the exported log is not this manager's, or not as it is now: the entry differs";

/// Removes the entries before `through`, whose digest is given: whoever asks has them. That one stays, so that the chain
/// goes on from it. Blocks.
pub(crate) fn cut(ctx: &Context, through: u64, digest: Digest, now: u64) -> Result<u64, SaleError> {
    let db = &ctx.db;
    let found = db.read(|txn| entries_after(&ctx.archive, txn, through.saturating_sub(1)))?;
    if found.first().is_none_or(|(number, entry)| *number != through || entry.digest(through) != digest) {
        return Err(Refusal::new(RefusalCode::WrongState, NOT_THIS_LOG).into());
    }
    let removed = db.write_blocking(move |txn| cut_here(txn, through, now))?;
    while db.write_blocking(move |txn| AUDIT.delete_range(txn, ..through, STEP))? == STEP {}
    Ok(removed)
}

/// From here on the log begins with `through`, and tells of that. What is left behind when the node dies now is removed with
/// the next cut. Gives how many entries are cut off.
fn cut_here(txn: &WriteTransaction<'_>, through: u64, now: u64) -> Result<u64, StoreError> {
    let first = CUT_AT.get(txn, &())?.map_or(1, |cut| cut.first);
    let removed = through.saturating_sub(first);
    if removed > 0 {
        CUT_AT.put(txn, &(), &CutAt { first: through })?;
        note(txn, now, CUT, through, format!("{removed} entries before it were exported and removed"))?;
    }
    // Pages that moved out are forgotten; the segment in which they lie stays as it is.
    PAGES.delete_range(txn, ..through, usize::MAX)?;
    Ok(removed)
}

#[cfg(test)]
mod tests;
