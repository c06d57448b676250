//! The manager's log of what it did to sales, enrolments, keys and revocations. Each entry holds the digest of the one
//! before, so that nothing can be changed, left out or put in between without changing every digest after it: whoever
//! keeps a copy of the last digest elsewhere can tell.

use std::io::BufRead;

use bincode::{Decode, Encode};
use protocol::{Digest, codec, wire};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use store::{StoreError, Table, Txn, WriteTransaction};

use crate::archive::{Archive, Kind, Place};
use crate::context::Context;

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
/// Longest line of an export that is read.
const MAX_LINE: u64 = 8 * 1024;

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

/// Where the chain of a whole log begins.
const START: Digest = Digest::from_bytes([0; 32]);

/// Adds an entry, in the same transaction as what it tells of.
pub(crate) fn note(
    txn: &WriteTransaction,
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
    let head = AUDIT.last(txn)?.map(|(number, entry)| json!({"number": number, "digest": entry.digest(number)}));
    Ok(json!({"entries": lines, "head": head}))
}

/// What a check of an exported log found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct AuditReport {
    /// Entries, all of them in the chain.
    pub entries: u64,
    /// Number of the first.
    pub first: u64,
    /// Digest of the last: compare it with a copy kept elsewhere.
    pub head: String,
}

/// Why an exported log does not hold.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// It cannot be read.
    #[error("line {line} cannot be read: {reason}")]
    Line {
        /// 1 for the first.
        line: u64,
        /// Why.
        reason: String,
    },
    /// An entry that does not fit.
    #[error("entry {number} in line {line} breaks the chain: {what}")]
    Broken {
        /// 1 for the first.
        line: u64,
        /// The entry's number.
        number: u64,
        /// What does not fit.
        what: &'static str,
    },
    /// Nothing to check.
    #[error("the log is empty")]
    Empty,
}

/// Follows the chain of an exported log, one JSON object a line. It may begin in the middle.
///
/// # Errors
/// [`AuditError`] names the first line that does not hold.
pub fn verify_audit(mut log: impl BufRead) -> Result<AuditReport, AuditError> {
    let mut report: Option<(AuditReport, u64, Digest)> = None;
    let mut number_of_line = 0;
    loop {
        number_of_line += 1;
        let unreadable = |reason: String| AuditError::Line { line: number_of_line, reason };
        let mut text = String::new();
        let read = std::io::Read::take(&mut log, MAX_LINE).read_line(&mut text);
        if read.map_err(|error| unreadable(error.to_string()))? == 0 {
            break;
        }
        if text.trim().is_empty() {
            continue;
        }
        let entry: Line = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        let broken = |what| Err(AuditError::Broken { line: number_of_line, number: entry.number, what });
        let texts = [entry.what.as_str(), &entry.subject, &entry.detail];
        if digest(entry.number, entry.at, &entry.previous, texts) != entry.digest {
            return broken("its digest is not the one of what it says");
        }
        let first = match &report {
            None if entry.number == 1 && entry.previous != START => return broken("the first entry follows none"),
            None => entry.number,
            Some((_, before, _)) if before.checked_add(1) != Some(entry.number) => {
                return broken("the numbers have a gap");
            }
            Some((_, _, digest)) if *digest != entry.previous => return broken("it follows another entry"),
            Some((report, _, _)) => report.first,
        };
        let entries = report.as_ref().map_or(0, |(report, _, _)| report.entries) + 1;
        let now = AuditReport { entries, first, head: entry.digest.to_string() };
        report = Some((now, entry.number, entry.digest));
    }
    report.map(|(report, _, _)| report).ok_or(AuditError::Empty)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::sales::tests::shop::{Outbox, Shop, Terms};

    #[tokio::test]
    async fn what_happens_to_sales_and_peers_is_chained_and_any_change_breaks_the_chain() {
        let shop = Shop::open(Terms::default()).await;
        let (id, _) = shop.buy("o").await;
        Outbox::of(&shop, 0).send(&shop, vec![shop.receipt(id, 0, 0..10)]).await;
        let (refunded, _) = shop.buy("p").await;
        shop.control(json!({"cmd": "refund", "id": refunded})).await.unwrap();
        let exported = shop.ctx.db.read(|txn| page(&shop.ctx.archive, txn, 0)).unwrap();
        let lines: Vec<String> = exported["entries"].as_array().unwrap().iter().map(Value::to_string).collect();
        let told: Vec<(String, String)> = exported["entries"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|line| line["subject"].as_str() == Some(&id.to_string()))
            .map(|line| (line["what"].as_str().unwrap().into(), line["detail"].as_str().unwrap().into()))
            .collect();
        assert!(told.iter().all(|(what, _)| what == "sale"));
        let steps: Vec<&str> = told.iter().map(|(_, detail)| detail.split(" -> ").last().unwrap()).collect();
        assert_eq!(steps, ["reserved", "released", "settled"]);
        let has = |text: &str| lines.iter().any(|line| line.contains(text));
        assert!(has("\"key-set\"") && has("\"seeder\"") && has("\"merchant\"") && has("\"revocation\""), "{lines:#?}");
        assert!(has("-> refunded"));

        let log = |lines: &[String]| lines.join("\n");
        let report = verify_audit(log(&lines).as_bytes()).unwrap();
        assert_eq!(report.entries, lines.len() as u64);
        assert_eq!(json!(report.head), exported["head"]["digest"]);
        // From the middle on it is still a chain.
        assert_eq!(verify_audit(log(&lines[2..]).as_bytes()).unwrap().first, 3);
        let why = |lines: &[String]| verify_audit(log(lines).as_bytes()).unwrap_err().to_string();
        let mut changed = lines.clone();
        changed[3] = changed[3].replacen("\"at\":1", "\"at\":2", 1);
        assert!(why(&changed).starts_with("entry 4 in line 4"), "{}", why(&changed));
        let mut gone = lines.clone();
        gone.remove(2);
        assert!(why(&gone).contains("gap"));
        assert!(why(&["x".to_owned()]).contains("line 1") && why(&[]).contains("empty"));
        shop.close().await;
    }
}
