//! The manager's log of what it did to sales, enrolments, keys and revocations. Each entry holds the digest of the one
//! before, so that nothing can be changed, left out or put in between without changing every digest after it: whoever
//! keeps a copy of the last digest elsewhere can tell. Heartbeats carry it to every seeder, so that there are copies.

use std::collections::HashMap;
use std::io::BufRead;

use bincode::{Decode, Encode};
use protocol::trust::AuditHead;
use protocol::{Digest, Refusal, RefusalCode, codec, wire};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use store::{StoreError, Table, Txn, WriteTransaction};

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

/// What an entry about a restore from a backup is called; its subject is the restore number.
pub(crate) const RESTORE: &str = "restore";

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
    // Whole pages that moved out are forgotten; the segment in which they lie stays as it is.
    let pages = db.write_blocking(move |txn| PAGES.delete_range(txn, ..through, usize::MAX))?;
    let mut removed = (pages * PAGE) as u64;
    loop {
        let step = db.write_blocking(move |txn| AUDIT.delete_range(txn, ..through, STEP))?;
        removed += step as u64;
        if step < STEP {
            break;
        }
    }
    if removed > 0 {
        let detail = format!("{removed} entries before it were exported and removed");
        db.write_blocking(move |txn| note(txn, now, "audit-cut", through, detail.clone()))?;
    }
    Ok(removed)
}

/// The newest entry as a seeder was told of it, a line of `willcall seeder heads`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub struct SeenHead {
    /// The entry's number.
    pub number: u64,
    /// Its digest.
    pub digest: Digest,
    /// When the manager said so, unix milliseconds.
    pub at: u64,
    /// The restore number that it said so under.
    pub restore: u64,
}

/// What became of the heads that seeders were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct HeadsReport {
    /// Stand in the log as they were told.
    pub found: u64,
    /// Are of entries before the first or after the last of it.
    pub outside: u64,
    /// Were of entries that the manager lost when it came back from a backup, by its own log.
    pub lost: u64,
}

/// What a check of an exported log found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct AuditReport {
    /// Entries, all of them in the chain.
    pub entries: u64,
    /// Number of the first.
    pub first: u64,
    /// Number of the last.
    pub last: u64,
    /// Digest of the last: compare it with a copy kept elsewhere.
    pub head: Digest,
    /// The comparison with what seeders were told, where that was given.
    pub heads: Option<HeadsReport>,
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
    /// The manager said something else before.
    #[error(
        "entry {number} is not the one that the manager told a seeder at {at} ms: it was {told} then, and is {found}; \
         the log was changed"
    )]
    Contradicted {
        /// The entry.
        number: u64,
        /// When the seeder was told, unix milliseconds.
        at: u64,
        /// Its digest then …
        told: Digest,
        /// … and in the log.
        found: Digest,
    },
    /// Nothing to check.
    #[error("the log is empty")]
    Empty,
}

/// Compares a log with what seeders were told, while it is followed.
struct Comparison<'a> {
    by_number: HashMap<u64, Vec<&'a SeenHead>>,
    report: HeadsReport,
    differing: Vec<(&'a SeenHead, Digest)>,
    /// Newest restore that the log tells of.
    restore: u64,
}

impl<'a> Comparison<'a> {
    fn new(heads: &'a [SeenHead]) -> Self {
        let mut by_number: HashMap<u64, Vec<&SeenHead>> = HashMap::new();
        heads.iter().for_each(|head| by_number.entry(head.number).or_default().push(head));
        Comparison { by_number, report: HeadsReport::default(), differing: Vec::new(), restore: 0 }
    }

    fn entry(&mut self, entry: &Line) {
        if entry.what == RESTORE {
            self.restore = entry.subject.parse().unwrap_or(self.restore).max(self.restore);
        }
        for head in self.by_number.remove(&entry.number).unwrap_or_default() {
            match head.digest == entry.digest {
                true => self.report.found += 1,
                false => self.differing.push((head, entry.digest)),
            }
        }
    }

    /// Only a restore that the log itself tells of explains that it is another one than it was.
    fn end(mut self) -> Result<HeadsReport, AuditError> {
        for (head, found) in self.differing {
            if head.restore >= self.restore {
                let SeenHead { number, digest: told, at, .. } = *head;
                return Err(AuditError::Contradicted { number, at, told, found });
            }
            self.report.lost += 1;
        }
        self.report.outside = self.by_number.values().map(|heads| heads.len() as u64).sum();
        Ok(self.report)
    }
}

/// Follows the chain of an exported log, one JSON object a line, and compares it with what seeders were told of it. It may
/// begin in the middle.
///
/// # Errors
/// [`AuditError`] names the first line that does not hold.
pub fn verify_audit(mut log: impl BufRead, heads: &[SeenHead]) -> Result<AuditReport, AuditError> {
    let mut report: Option<(AuditReport, u64, Digest)> = None;
    let mut comparison = Comparison::new(heads);
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
        comparison.entry(&entry);
        let entries = report.as_ref().map_or(0, |(report, _, _)| report.entries) + 1;
        let now = AuditReport { entries, first, last: entry.number, head: entry.digest, heads: None };
        report = Some((now, entry.number, entry.digest));
    }
    let (mut report, _, _) = report.ok_or(AuditError::Empty)?;
    let compared = comparison.end()?;
    report.heads = (!heads.is_empty()).then_some(compared);
    Ok(report)
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
        let report = verify_audit(log(&lines).as_bytes(), &[]).unwrap();
        assert_eq!((report.entries, report.last), (lines.len() as u64, lines.len() as u64));
        assert_eq!(json!(report.head), exported["head"]["digest"]);
        // From the middle on it is still a chain.
        assert_eq!(verify_audit(log(&lines[2..]).as_bytes(), &[]).unwrap().first, 3);
        let why = |lines: &[String]| verify_audit(log(lines).as_bytes(), &[]).unwrap_err().to_string();
        let mut changed = lines.clone();
        changed[3] = changed[3].replacen("\"at\":1", "\"at\":2", 1);
        assert!(why(&changed).starts_with("entry 4 in line 4"), "{}", why(&changed));
        let mut gone = lines.clone();
        gone.remove(2);
        assert!(why(&gone).contains("gap"));
        assert!(why(&["x".to_owned()]).contains("line 1") && why(&[]).contains("empty"));
        shop.close().await;
    }

    #[tokio::test]
    async fn an_exported_log_is_cut_off_and_what_seeders_were_told_still_fits() {
        let shop = Shop::open(Terms::default()).await;
        let told = |restore| {
            let heartbeat = crate::news::sign_heartbeat(&shop.ctx).unwrap().peek().unwrap();
            let AuditHead { number, digest } = heartbeat.audit.unwrap();
            SeenHead { number, digest, at: heartbeat.at, restore }
        };
        let export = |after: u64| {
            let page = shop.ctx.db.read(|txn| page(&shop.ctx.archive, txn, after)).unwrap();
            page["entries"].as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
        };
        let early = told(0);
        shop.buy("o").await;
        let (late, log) = (told(0), export(0));
        let report = verify_audit(log.as_bytes(), &[early.clone(), late.clone()]).unwrap();
        assert_eq!(report.heads, Some(HeadsReport { found: 2, outside: 0, lost: 0 }));

        let cut = json!({"cmd": "audit-cut", "through": report.last, "digest": early.digest});
        assert_eq!(shop.control(cut).await.unwrap_err(), "wrong-state");
        let cut = json!({"cmd": "audit-cut", "through": report.last, "digest": report.head});
        let answer = shop.control(cut.clone()).await.unwrap();
        assert_eq!(answer["removed"], report.last - 1);
        assert_eq!(shop.control(cut).await.unwrap()["removed"], 0);
        shop.buy("p").await;
        // The archive and the rest are one chain, and the rest alone is one from its first entry on.
        let rest = export(report.last);
        let whole = verify_audit(format!("{log}\n{rest}").as_bytes(), &[early.clone(), late.clone(), told(0)]).unwrap();
        assert_eq!(whole.heads, Some(HeadsReport { found: 3, outside: 0, lost: 0 }));
        let alone = verify_audit(rest.as_bytes(), &[early.clone(), late.clone()]).unwrap();
        assert_eq!(alone.heads, Some(HeadsReport { found: 0, outside: 2, lost: 0 }));

        // A log that is another one than seeders were told: only a restore that it tells of explains that.
        let forged = SeenHead { digest: Digest::from_bytes([7; 32]), ..early };
        let error = verify_audit(log.as_bytes(), std::slice::from_ref(&forged)).unwrap_err();
        assert!(matches!(&error, AuditError::Contradicted { number, .. } if *number == forged.number), "{error}");
        shop.ctx.db.write(|txn| note(txn, 1, RESTORE, 5u64, "")).await.unwrap();
        let log = format!("{log}\n{}", export(report.last));
        let report = verify_audit(log.as_bytes(), std::slice::from_ref(&forged)).unwrap();
        assert_eq!(report.heads, Some(HeadsReport { found: 0, outside: 0, lost: 1 }));
        let after = SeenHead { restore: 5, ..forged };
        assert!(verify_audit(log.as_bytes(), &[after]).is_err());
        shop.close().await;
    }
}
