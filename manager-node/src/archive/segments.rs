//! Append-only files for what is over: a record is written once, flushed, and from then on only read. The store, which
//! is small and rewritten all the time, says how far the files are good and where each record lies.
//!
//! A segment is written by one run of the manager and never opened for writing again, so that nothing is ever cut off
//! or overwritten: what a crash left behind the last record that the store knows of is passed over by whoever reads.
//! Each record names the digest of the one before, across segments, so that none can be changed, left out or put in
//! between without changing the newest digest, which is in the store and, segment by segment, in the audit log.
//!
//! ```text
//! segment  "willcall segment 1\n", digest before its first record (32)
//! record   length of the body (u32), kind (1), digest before (32), digest (32), body     numbers are little endian
//! ```

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bincode::{Decode, Encode};
use protocol::{Digest, wire};
use store::StoreError;

const MAGIC: &[u8; 19] = b"willcall segment 1\n";
/// Bytes before the first record.
const SEGMENT_HEADER: u64 = 19 + 32;
/// Bytes before a record's body.
const RECORD_HEADER: usize = 4 + 1 + 32 + 32;
/// A segment that is longer gets no further record: a size that is quick to copy away, and few files for years.
const FULL: u64 = 256 * 1024 * 1024;
/// Longest body, bytes.
pub(crate) const MAX_BODY: usize = 4 * 1024 * 1024;

/// What a record is. The numbers are in the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A transaction, whole.
    Transaction = 1,
    /// Entries of the audit log.
    Audit = 2,
    /// A seeder's statement of account.
    Statement = 3,
}

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Place {
    segment: u32,
    offset: u64,
    /// Of the body.
    length: u32,
}

/// How far the segments are good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Head {
    /// Number of the newest segment, 0 for none …
    pub(crate) segment: u32,
    /// … and its bytes up to the end of the newest record.
    pub(crate) length: u64,
    /// Of the newest record, zeros for none.
    pub(crate) digest: Digest,
    /// Number of records in all segments.
    pub(crate) records: u64,
}

/// How far one segment is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct End {
    /// Its number.
    pub(crate) segment: u32,
    /// Its bytes up to the end of its newest record that counts.
    pub(crate) length: u64,
}

wire! {
    End => 16,
    Place => 32,
    Head => 64,
}

impl Head {
    /// Before the first record.
    pub(crate) const NONE: Head = Head { segment: 0, length: 0, digest: Digest::from_bytes([0; 32]), records: 0 };
}

/// Why a segment cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// The system's.
    #[error("cannot use the segment {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// It does not hold what the store says.
    #[error("the segment {} {what}: restore it from the backup that the database is from, or a later one", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A record longer than is kept in segments.
    #[error("a record of {0} bytes is too long for a segment")]
    TooLong(usize),
}

impl From<SegmentError> for StoreError {
    fn from(error: SegmentError) -> Self {
        match error {
            SegmentError::Io { path, source } if source.kind() == io::ErrorKind::StorageFull => {
                StoreError::DiskFull { path, needed: None }
            }
            other => StoreError::Corrupt { table: "segments", reason: other.to_string() },
        }
    }
}

/// The folder of segments, with at most one of them open for writing.
#[derive(Debug)]
pub(crate) struct Segments {
    dir: PathBuf,
    writer: Mutex<Writer>,
}

#[derive(Debug)]
struct Writer {
    /// The segment being written, and its bytes; none before the first record of this run.
    open: Option<(u32, File, u64)>,
    /// Number of the next segment: no file has it or a higher one.
    next: u32,
}

impl Segments {
    /// Opens the folder, which is made if it is not there, and checks that what the store knows of is there: `ends` are the
    /// ends of the segments, the newest of which is `head`.
    ///
    /// # Errors
    /// [`SegmentError`] names the first segment that is missing or cut off.
    pub(crate) fn open(dir: &Path, head: Head, ends: &[End]) -> Result<Segments, SegmentError> {
        let failed = |source| SegmentError::Io { path: dir.to_owned(), source };
        DirBuilder::new().mode(0o700).recursive(true).create(dir).map_err(failed)?;
        let mut newest = head.segment;
        for entry in fs::read_dir(dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".seg")).and_then(|n| n.parse().ok());
            newest = newest.max(number.unwrap_or(0));
        }
        let writer = Mutex::new(Writer { open: None, next: newest.saturating_add(1) });
        let segments = Segments { dir: dir.to_owned(), writer };
        let newest = (head.segment > 0).then_some(End { segment: head.segment, length: head.length });
        for end in ends.iter().copied().chain(newest) {
            segments.reaches(end)?;
        }
        Ok(segments)
    }

    fn reaches(&self, end: End) -> Result<(), SegmentError> {
        let path = self.path(end.segment);
        match fs::metadata(&path) {
            Ok(found) if found.len() >= end.length => Ok(()),
            Ok(_) => Err(SegmentError::Damaged { path, what: "is shorter than it was" }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(SegmentError::Damaged { path, what: "is missing" })
            }
            Err(source) => Err(SegmentError::Io { path, source }),
        }
    }

    fn path(&self, segment: u32) -> PathBuf {
        self.dir.join(format!("{segment:08}.seg"))
    }

    fn file(&self, segment: u32) -> Result<(PathBuf, File), SegmentError> {
        let path = self.path(segment);
        match File::open(&path) {
            Ok(file) => Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(SegmentError::Damaged { path, what: "is missing" })
            }
            Err(source) => Err(SegmentError::Io { path, source }),
        }
    }

    /// Writes records after `head`, the newest one in the store, and flushes them. They do not count before the store
    /// holds the head that this gives. Blocks.
    ///
    /// # Errors
    /// [`SegmentError`]; what was written of them is passed over.
    pub(crate) fn append(&self, head: Head, records: &[(Kind, Vec<u8>)]) -> Result<(Vec<Place>, Head), SegmentError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out, and put back only after success: a segment with a record that does not count is not gone on with.
        let open = writer.open.take().filter(|(n, _, length)| (*n, *length) == (head.segment, head.length));
        let (segment, mut file, mut length) = match open {
            Some(open) if open.2 < FULL => open,
            _ => {
                let number = writer.next;
                writer.next = number.saturating_add(1);
                (number, self.create(number, &head.digest)?, SEGMENT_HEADER)
            }
        };
        let failed = |source| SegmentError::Io { path: self.path(segment), source };
        let mut bytes = Vec::with_capacity(records.iter().map(|(_, body)| RECORD_HEADER + body.len()).sum());
        let mut places = Vec::with_capacity(records.len());
        let mut digest = head.digest;
        for (kind, body) in records {
            let body_len = u32::try_from(body.len()).ok().filter(|_| body.len() <= MAX_BODY);
            let body_len = body_len.ok_or(SegmentError::TooLong(body.len()))?;
            let next = digest_of(&digest, *kind as u8, body);
            bytes.extend_from_slice(&body_len.to_le_bytes());
            bytes.push(*kind as u8);
            bytes.extend_from_slice(digest.as_bytes());
            bytes.extend_from_slice(next.as_bytes());
            bytes.extend_from_slice(body);
            places.push(Place { segment, offset: length, length: body_len });
            length = length.saturating_add((RECORD_HEADER + body.len()) as u64);
            digest = next;
        }
        file.write_all(&bytes).and_then(|()| file.sync_data()).map_err(failed)?;
        writer.open = Some((segment, file, length));
        let records = head.records.saturating_add(places.len() as u64);
        Ok((places, Head { segment, length, digest, records }))
    }

    fn create(&self, segment: u32, before: &Digest) -> Result<File, SegmentError> {
        let path = self.path(segment);
        let failed = |source| SegmentError::Io { path: path.clone(), source };
        let mut file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        file.write_all(&[MAGIC.as_slice(), before.as_bytes()].concat()).map_err(failed)?;
        // Its name must be on disk before the store names it.
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        Ok(file)
    }

    /// The body of a record. Blocks.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] also when it is not, to the last bit, what was written.
    pub(crate) fn read(&self, place: Place, kind: Kind) -> Result<Vec<u8>, SegmentError> {
        let (path, file) = self.file(place.segment)?;
        let mut bytes = vec![0; RECORD_HEADER + place.length as usize];
        file.read_exact_at(&mut bytes, place.offset)
            .map_err(|source| SegmentError::Io { path: path.clone(), source })?;
        let record = Record::parse(&bytes).filter(|record| record.body.len() == place.length as usize);
        match record {
            Some(record) if record.kind == kind as u8 && record.is_sound() => Ok(record.body.to_vec()),
            _ => Err(SegmentError::Damaged { path, what: "holds a damaged record" }),
        }
    }

    /// Follows all records from the first segment to `head` and gives their number. One that is not among `ends`, where these
    /// are known, has none that counts, unless it fits: it may be from a time that a restore forgot. Blocks for as long as
    /// reading all files takes.
    ///
    /// # Errors
    /// [`SegmentError::Damaged`] names the first segment that does not fit.
    pub(crate) fn verify(&self, head: Head, ends: &[End]) -> Result<u64, SegmentError> {
        // From the newest back: a segment says after which record of the one before it begins, and so how much of that
        // one counts.
        let (mut wanted, mut records) = (head.digest, 0);
        for segment in (1..=head.segment).rev() {
            if wanted == Head::NONE.digest {
                break;
            }
            let path = self.path(segment);
            let counts = ends.is_empty() || segment == head.segment || ends.iter().any(|end| end.segment == segment);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound && !counts => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(SegmentError::Damaged { path, what: "is missing" });
                }
                Err(source) => return Err(SegmentError::Io { path, source }),
            };
            match count_to(&bytes, &wanted) {
                Some((before, counted)) => {
                    records += counted;
                    wanted = before;
                }
                None if counts => return Err(SegmentError::Damaged { path, what: "breaks the chain of records" }),
                None => {}
            }
        }
        match records == head.records {
            true => Ok(records),
            false => Err(SegmentError::Damaged { path: self.dir.clone(), what: "lacks records" }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
impl Segments {
    /// Damages the body of a record.
    pub(super) fn spoil(&self, place: Place) {
        let file = OpenOptions::new().write(true).open(self.path(place.segment)).unwrap();
        file.write_all_at(&[0xff; 8], place.offset + RECORD_HEADER as u64).unwrap();
    }
}

fn digest_of(before: &Digest, kind: u8, body: &[u8]) -> Digest {
    Digest::of("willcall 2026-11 segment record", &[before.as_bytes(), &[kind], body])
}

/// One record in a segment's bytes.
struct Record<'a> {
    kind: u8,
    before: Digest,
    digest: Digest,
    body: &'a [u8],
}

impl<'a> Record<'a> {
    /// The record that `bytes` begin with.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (&kind, rest) = rest.split_first()?;
        let (before, rest) = rest.split_first_chunk::<32>()?;
        let (digest, rest) = rest.split_first_chunk::<32>()?;
        let body = rest.get(..usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
        Some(Record { kind, before: Digest::from_bytes(*before), digest: Digest::from_bytes(*digest), body })
    }

    fn is_sound(&self) -> bool {
        digest_of(&self.before, self.kind, self.body) == self.digest
    }
}

/// The digest before a segment's first record, and how many records it has up to the one with the digest `wanted`.
fn count_to(segment: &[u8], wanted: &Digest) -> Option<(Digest, u64)> {
    let rest = segment.strip_prefix(MAGIC.as_slice())?;
    let (first, mut rest) = rest.split_first_chunk::<32>()?;
    let first = Digest::from_bytes(*first);
    let (mut before, mut records) = (first, 0);
    while before != *wanted {
        let record = Record::parse(rest).filter(|record| record.before == before && record.is_sound())?;
        rest = rest.get(RECORD_HEADER + record.body.len()..)?;
        before = record.digest;
        records += 1;
    }
    Some((first, records))
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]
mod tests {
    use super::*;

    fn record(text: &str) -> (Kind, Vec<u8>) {
        (Kind::Transaction, text.as_bytes().to_vec())
    }

    #[test]
    fn what_was_flushed_and_is_not_in_the_store_does_not_count_and_spoils_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let segments = Segments::open(dir.path(), Head::NONE, &[]).unwrap();
        let (places, first) = segments.append(Head::NONE, &[record("one"), record("two")]).unwrap();
        // A commit that failed: the next records go after `first` all the same.
        segments.append(first, &[record("lost")]).unwrap();
        let (more, second) = segments.append(first, &[record("three")]).unwrap();
        assert_ne!(second.segment, first.segment, "nothing is written behind what does not count");
        // A run that ended between the flush and the commit.
        segments.append(second, &[record("lost again")]).unwrap();
        let segments = Segments::open(dir.path(), second, &[]).unwrap();
        let (last, third) = segments.append(second, &[record("four")]).unwrap();
        let texts: Vec<Vec<u8>> = [places, more, last]
            .concat()
            .into_iter()
            .map(|place| segments.read(place, Kind::Transaction).unwrap())
            .collect();
        assert_eq!(texts, [b"one".as_slice(), b"two", b"three", b"four"]);
        assert_eq!(segments.verify(third, &[]).unwrap(), 4);
        // The same head goes on in one file.
        assert_eq!(segments.append(third, &[record("five")]).unwrap().1.segment, third.segment);
    }

    #[test]
    fn an_older_segment_that_is_missing_or_cut_off_is_named_at_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let (mut head, mut ends) = (Head::NONE, Vec::new());
        for text in ["one", "two", "three"] {
            let segments = Segments::open(dir.path(), head, &ends).unwrap();
            head = segments.append(head, &[record(text)]).unwrap().1;
            ends.push(End { segment: head.segment, length: head.length });
            // What does not count may be missing.
            segments.append(Head::NONE, &[record("lost")]).unwrap();
        }
        for uncounted in [2, 4, 6] {
            fs::remove_file(dir.path().join(format!("{uncounted:08}.seg"))).unwrap();
        }
        assert_eq!(ends.iter().map(|end| end.segment).collect::<Vec<_>>(), [1, 3, 5]);
        let open = || Segments::open(dir.path(), head, &ends);
        let segments = open().unwrap();
        for end in &ends {
            let path = segments.path(end.segment);
            let whole = fs::read(&path).unwrap();
            fs::write(&path, &whole[..whole.len() - 1]).unwrap();
            let error = open().unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()) && error.contains("shorter"), "{error}");
            fs::remove_file(&path).unwrap();
            let error = open().unwrap_err().to_string();
            assert!(error.contains(&path.display().to_string()) && error.contains("missing"), "{error}");
            fs::write(&path, &whole).unwrap();
        }
        open().unwrap();
    }

    #[test]
    fn segments_of_a_time_that_a_restore_forgot_spoil_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let write = |head: Head, ends: &mut Vec<End>, text: &str| {
            // Another run each time.
            let segments = Segments::open(dir.path(), head, ends).unwrap();
            let head = segments.append(head, &[record(text)]).unwrap().1;
            ends.push(End { segment: head.segment, length: head.length });
            (segments, head)
        };
        let mut ends = Vec::new();
        let (segments, backup) = write(Head::NONE, &mut ends, "one");
        let kept = ends.clone();
        // What came after the backup: one record in the same segment, and one that begins where that ends.
        let after = segments.append(backup, &[record("two")]).unwrap().1;
        write(after, &mut ends, "three");
        // The database of the backup, with these segments in the folder.
        let mut ends = kept;
        let (segments, head) = write(backup, &mut ends, "two again");
        assert_eq!(ends.iter().map(|end| end.segment).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(segments.verify(head, &ends).unwrap(), 2);
        fs::remove_file(segments.path(2)).unwrap();
        assert_eq!(segments.verify(head, &ends).unwrap(), 2);
        fs::remove_file(segments.path(1)).unwrap();
        let error = segments.verify(head, &ends).unwrap_err().to_string();
        assert!(error.contains("00000001.seg is missing"), "{error}");
    }

    #[test]
    fn what_is_missing_cut_off_or_changed_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let segments = Segments::open(dir.path(), Head::NONE, &[]).unwrap();
        let (places, head) = segments.append(Head::NONE, &[record("one"), record("two")]).unwrap();
        let path = segments.path(1);
        let whole = fs::read(&path).unwrap();
        let why = |error: SegmentError| error.to_string();

        for at in SEGMENT_HEADER as usize..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            fs::write(&path, &changed).unwrap();
            let error = segments.verify(head, &[]).unwrap_err();
            assert!(why(error).contains("breaks the chain"), "byte {at}");
        }
        let mut changed = whole.clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(&path, &changed).unwrap();
        assert!(segments.read(places[0], Kind::Transaction).is_ok());
        assert!(why(segments.read(places[1], Kind::Transaction).unwrap_err()).contains("damaged record"));
        assert!(segments.read(places[0], Kind::Audit).is_err());

        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(why(Segments::open(dir.path(), head, &[]).unwrap_err()).contains("shorter"));
        fs::remove_file(&path).unwrap();
        assert!(why(Segments::open(dir.path(), head, &[]).unwrap_err()).contains("missing"));
        assert!(why(segments.verify(head, &[]).unwrap_err()).contains("missing"));
    }
}
