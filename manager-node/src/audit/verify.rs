//! The check of an exported log: that it is one chain, and that it is the one that the manager told its seeders of.

use std::collections::BTreeMap;
use std::io::BufRead;

use protocol::Digest;
use protocol::trust::DEFAULT_CLOCK_GRACE_MS;
use protocol::utc::Utc;
use serde::Serialize;

use super::heads::{SeenHead, Standing};
use super::{CUT, Line, RESTORE, START, digest};

/// Longest line of an export that is read.
const MAX_LINE: u64 = 8 * 1024;

/// An entry by which the log tells of a restore from a backup: it is the first one that is not in the backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct RestoreEntry {
    /// The entry's number.
    pub entry: u64,
    /// The restore number.
    pub restore: u64,
    /// When the manager ran again, unix milliseconds.
    pub at: u64,
}

impl RestoreEntry {
    /// Does this restore explain that the log has no such entry, or another one? Entries before the place where it went on
    /// were in the backup and are what they were; and no head of an older restore number is told once it was made.
    fn explains(&self, head: &SeenHead) -> bool {
        self.restore > head.restore
            && self.entry <= head.number
            && head.at <= self.at.saturating_add(DEFAULT_CLOCK_GRACE_MS)
    }
}

/// What became of the heads that seeders were told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct HeadsReport {
    /// Stand in the log as they were told.
    pub found: u64,
    /// Are of entries before the first of it, or after the last where it is said to be a part.
    pub outside: u64,
    /// Were of entries that the manager lost when it came back from a backup, by its own log.
    pub lost: u64,
    /// Were signed by a key that was revoked since, and prove nothing …
    pub revoked: u64,
    /// … and say something else than the log.
    pub revoked_differ: u64,
    /// Signatures were verified, with the network's key sets.
    pub verified: bool,
}

/// What a check of an exported log found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub struct AuditReport {
    /// Entries, all of them in the chain.
    pub entries: u64,
    /// Number of the first.
    pub first: u64,
    /// The entry that tells that what came before the first was exported and removed, where it did not begin with the
    /// log's first.
    pub cut_by: Option<u64>,
    /// Number of the last.
    pub last: u64,
    /// Digest of the last: compare it with a copy kept elsewhere.
    pub head: Digest,
    /// The restores that it tells of: what the manager said of later entries before each of them is not in it.
    pub restores: Vec<RestoreEntry>,
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
    /// What came before is missing.
    #[error(
        "the log begins with entry {first}, and no cut that it tells of explains that: what came before is missing; put \
         the parts together (cat), or say --part where it is in another file"
    )]
    Begins {
        /// The first entry.
        first: u64,
    },
    /// The manager said something else before.
    #[error(
        "entry {number} is not the one that the manager told a seeder at {}: it was {told} then, and is {found}; \
         the log was changed, and no restore from a backup that it tells of explains that",
        Utc(*at)
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
    /// The manager said more before.
    #[error(
        "the log ends with entry {last}, and the manager told a seeder of entry {number} at {}: its end was cut off, \
         or it was exported before that; export it again, or say --part where the rest is in another file",
        Utc(*at)
    )]
    CutOff {
        /// The last entry.
        last: u64,
        /// The newest that a seeder was told of.
        number: u64,
        /// When, unix milliseconds.
        at: u64,
    },
    /// Nothing to check.
    #[error("the log is empty")]
    Empty,
}

/// Compares a log with what seeders were told, while it is followed.
struct Comparison<'a> {
    by_number: BTreeMap<u64, Vec<&'a SeenHead>>,
    report: HeadsReport,
    differing: Vec<(&'a SeenHead, Digest)>,
    restores: Vec<RestoreEntry>,
}

impl<'a> Comparison<'a> {
    fn new(heads: &'a [SeenHead]) -> Self {
        let mut by_number: BTreeMap<u64, Vec<&SeenHead>> = BTreeMap::new();
        heads.iter().for_each(|head| by_number.entry(head.number).or_default().push(head));
        let count = |standing| heads.iter().filter(|head| head.standing == standing).count() as u64;
        let (revoked, verified) = (count(Standing::Revoked), count(Standing::Unchecked) == 0);
        let report = HeadsReport { revoked, verified, ..HeadsReport::default() };
        Comparison { by_number, report, differing: Vec::new(), restores: Vec::new() }
    }

    fn entry(&mut self, entry: &Line) {
        if entry.what == RESTORE
            && let Ok(restore) = entry.subject.parse()
        {
            self.restores.push(RestoreEntry { entry: entry.number, restore, at: entry.at });
        }
        for head in self.by_number.remove(&entry.number).unwrap_or_default() {
            match (head.digest == entry.digest, head.standing) {
                (true, Standing::Revoked) => {}
                (true, _) => self.report.found += 1,
                (false, _) => self.differing.push((head, entry.digest)),
            }
        }
    }

    /// Is the log not what a head says because of a restore, or because the head is a forgery?
    fn explained(&mut self, head: &SeenHead) -> bool {
        let lost = self.restores.iter().any(|restore| restore.explains(head));
        match head.standing {
            Standing::Revoked if !lost => self.report.revoked_differ += 1,
            Standing::Revoked => {}
            Standing::Proven | Standing::Unchecked if lost => self.report.lost += 1,
            Standing::Proven | Standing::Unchecked => return false,
        }
        true
    }

    fn end(mut self, first: u64, last: u64, part: bool) -> Result<(HeadsReport, Vec<RestoreEntry>), AuditError> {
        for (head, found) in std::mem::take(&mut self.differing) {
            if !self.explained(head) {
                let SeenHead { number, digest: told, at, .. } = *head;
                return Err(AuditError::Contradicted { number, at, told, found });
            }
        }
        // Newest first: that is the one to be told.
        for (number, heads) in std::mem::take(&mut self.by_number).into_iter().rev() {
            for head in heads {
                match () {
                    () if number < first || part => {
                        self.report.outside += u64::from(head.standing != Standing::Revoked);
                    }
                    () if self.explained(head) => {}
                    () => return Err(AuditError::CutOff { last, number, at: head.at }),
                }
            }
        }
        Ok((self.report, self.restores))
    }
}

/// Follows the chain of an exported log, one JSON object a line, and compares it with what seeders were told of it. It may
/// begin where the manager's log was cut, by its own word; in the middle, and end before what seeders were told, only
/// where it is said to be a part. An entry may be there twice in a row: the one that a cut leaves ends one export and
/// begins the next.
///
/// # Errors
/// [`AuditError`] names the first line that does not hold.
pub fn verify_audit(mut log: impl BufRead, heads: &[SeenHead], part: bool) -> Result<AuditReport, AuditError> {
    let mut report: Option<AuditReport> = None;
    let mut comparison = Comparison::new(heads);
    let (mut before, mut cuts) = (String::new(), Vec::new());
    let mut number_of_line = 0;
    loop {
        number_of_line += 1;
        let unreadable = |reason: String| AuditError::Line { line: number_of_line, reason };
        let mut text = String::new();
        let read = std::io::Read::take(&mut log, MAX_LINE).read_line(&mut text);
        if read.map_err(|error| unreadable(error.to_string()))? == 0 {
            break;
        }
        let end = text.trim_end_matches(['\r', '\n']).len();
        text.truncate(end);
        if text.trim().is_empty() || text == before {
            continue;
        }
        let entry: Line = serde_json::from_str(&text).map_err(|error| unreadable(error.to_string()))?;
        let broken = |what| Err(AuditError::Broken { line: number_of_line, number: entry.number, what });
        let texts = [entry.what.as_str(), &entry.subject, &entry.detail];
        if digest(entry.number, entry.at, &entry.previous, texts) != entry.digest {
            return broken("its digest is not the one of what it says");
        }
        let (first, entries) = match &report {
            None if entry.number == 1 && entry.previous != START => return broken("the first entry follows none"),
            None => (entry.number, 0),
            Some(before) if before.last.checked_add(1) != Some(entry.number) => {
                return broken("the numbers have a gap");
            }
            Some(before) if before.head != entry.previous => return broken("it follows another entry"),
            Some(before) => (before.first, before.entries),
        };
        comparison.entry(&entry);
        if entry.what == CUT
            && let Ok(through) = entry.subject.parse::<u64>()
        {
            cuts.push((entry.number, through));
        }
        let (last, head) = (entry.number, entry.digest);
        let (cut_by, restores) = (None, Vec::new());
        report = Some(AuditReport { entries: entries + 1, first, cut_by, last, head, restores, heads: None });
        before = text;
    }
    let mut report = report.ok_or(AuditError::Empty)?;
    // It begins with the entry that stayed, or with the one after it.
    if report.first > 1 {
        let fits = |through: u64| through == report.first || through.checked_add(1) == Some(report.first);
        report.cut_by = cuts.into_iter().find(|(_, through)| fits(*through)).map(|(entry, _)| entry);
        if report.cut_by.is_none() && !part {
            return Err(AuditError::Begins { first: report.first });
        }
    }
    let (compared, restores) = comparison.end(report.first, report.last, part)?;
    report.heads = (!heads.is_empty()).then_some(compared);
    report.restores = restores;
    Ok(report)
}
