//! One content on disk. Its rules: no chunk is written that does not verify, none is noted as held before its bytes are
//! synced, and none is read that is not held.

use std::any::Any;
use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use protocol::codec::{self, Wire};
use protocol::manifest::{self, Manifest, SEGMENT_CHUNKS, Segment};
use protocol::trust::{KeyPurpose, Trust};
use protocol::{ChunkSet, Digest, Refusal, RefusalCode, Signed};
use store::Step;

use super::body::{Bodies, Body};
use super::disk::{self, At, FileError};
use super::error::{
    ContentError, Damaged, FinishError, Mending, ReadError, ReadSegmentError, ReadVerifiedError, SegmentError,
    SyncError, WriteError,
};
use super::freshness::{Freshness, Stamp};
use super::have;
use super::segments::Segments;

pub(super) const MANIFEST: &str = "manifest";
pub(super) const COMPLETE: &str = "complete";
pub(super) const HAVE: &str = "have";

/// One content, complete or not. All methods block.
#[derive(Debug)]
pub struct Content {
    folder: PathBuf,
    digest: Digest,
    signed: Signed<Manifest>,
    manifest: Manifest,
    pub(super) segments: Segments,
    body: Arc<dyn Body>,
    held: Mutex<Held>,
    // One writer of `have` at a time.
    syncing: Mutex<()>,
    removed: AtomicBool,
    freshness: Mutex<Freshness>,
    // Segments that could not be made good by the data: once tried is enough.
    pub(super) lost_segments: Mutex<BTreeSet<u32>>,
}

#[derive(Debug)]
struct Held {
    chunks: ChunkSet,
    // What the disk's note says, but for what it could not be taken out of; equal to `chunks` when there is nothing to sync.
    noted: ChunkSet,
    complete: bool,
}

impl Content {
    pub(super) fn open(folder: &Path, digest: Digest, bodies: &dyn Bodies) -> Result<Content, ContentError> {
        let content = Self::open_unnoted(folder, digest, bodies)?;
        let all = ChunkSet::from_range(0..content.manifest.chunks());
        let marker = folder.join(COMPLETE);
        let complete = marker.try_exists().at(&marker, "look for")?;
        let chunks = if complete { all } else { have::load(&folder.join(HAVE), content.manifest.chunks())? };
        *content.held() = Held { noted: chunks.clone(), chunks, complete };
        Ok(content)
    }

    /// Opens it as if every chunk were there, to be verified.
    pub(super) fn open_unnoted(folder: &Path, digest: Digest, bodies: &dyn Bodies) -> Result<Content, ContentError> {
        let file = folder.join(MANIFEST);
        let damaged = |what: String| Damaged { file: file.clone(), what };
        let bytes =
            disk::read_small(&file, <Signed<Manifest>>::MAX)?.ok_or_else(|| damaged("it is missing".to_owned()))?;
        let signed: Signed<Manifest> = codec::decode(&bytes).map_err(|error| damaged(error.to_string()))?;
        if signed.digest() != digest {
            return Err(damaged("it is not the one that the folder is named after".to_owned()).into());
        }
        let manifest = signed.peek().map_err(|error| damaged(error.to_string()))?;
        manifest.check(manifest.network).map_err(|refusal| damaged(refusal.to_string()))?;
        let chunks = ChunkSet::from_range(0..manifest.chunks());
        Ok(Content {
            folder: folder.to_owned(),
            digest,
            signed,
            segments: Segments::new(folder),
            body: bodies.open(folder, &manifest)?,
            held: Mutex::new(Held { chunks, noted: ChunkSet::new(), complete: false }),
            syncing: Mutex::default(),
            removed: AtomicBool::new(false),
            freshness: Mutex::default(),
            lost_segments: Mutex::default(),
            manifest,
        })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The manifest as it was signed.
    pub fn signed_manifest(&self) -> &Signed<Manifest> {
        &self.signed
    }

    /// Does the network still stand by the key that signed the manifest? It was verified when the content was taken in.
    ///
    /// # Errors
    /// `key-retired`, also where the key set holds the key no longer.
    pub fn still_good(&self, trust: &Trust, now: u64) -> Result<(), Refusal> {
        let good = trust.still_good(&self.signed.signer(), KeyPurpose::Catalogue, self.manifest.published_at, now);
        good.map_err(|refusal| {
            let detail = format!("the product's manifest is void: {}", refusal.detail);
            Refusal::new(RefusalCode::KeyRetired, detail).at(now)
        })
    }

    /// Digest of the signed manifest: the content's name.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The folder with its files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The chunks that are here, in any number of ranges; see [`super::sendable`] before sending it.
    pub fn have(&self) -> ChunkSet {
        self.held().chunks.clone()
    }

    /// Is this chunk here?
    pub fn has(&self, chunk: u32) -> bool {
        self.held().chunks.contains(chunk)
    }

    /// Bytes that these chunks have.
    pub fn bytes_of(&self, chunks: &ChunkSet) -> u64 {
        bytes_of(self.manifest(), chunks)
    }

    /// Bytes of the chunks that are here.
    pub fn have_bytes(&self) -> u64 {
        bytes_of(&self.manifest, &self.held().chunks)
    }

    /// Is everything here, durable and checked against the content root? See [`Content::finish`].
    pub fn is_complete(&self) -> bool {
        self.held().complete
    }

    /// Are all chunks here?
    pub fn has_all(&self) -> bool {
        self.held().chunks.len() == self.manifest.chunks()
    }

    /// Was it removed from the store?
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Relaxed)
    }

    /// Are its data still where they were made? A data file that was deleted, or replaced by another, stays open and reads
    /// well; one that was put in its place is used from now on. Of the other files [`Content::mend`] sees to it.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    pub fn is_in_place(&self) -> Result<bool, FileError> {
        Ok(self.folder.try_exists().at(&self.folder, "look for")? && self.body.look_again()?)
    }

    pub(super) fn mark_removed(&self) {
        self.removed.store(true, Ordering::Relaxed);
    }

    /// Stores a segment of chaining values after checking it against the manifest.
    ///
    /// # Errors
    /// [`SegmentError::Refused`] when it is not the published one.
    pub fn put_segment(&self, index: u32, segment: Segment) -> Result<(), SegmentError> {
        if self.is_removed() {
            return Err(SegmentError::Removed);
        }
        self.manifest.check_segment(index, &segment).map_err(SegmentError::Refused)?;
        Ok(self.segments.put(index, segment)?)
    }

    /// A segment of chaining values, if it is here. Where chunks of it are, it was: one that lies damaged is made good by
    /// the data, since no chunk is worse for it. Whoever else needs one of this content meanwhile waits for that.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    pub fn segment(&self, index: u32) -> Result<Option<Arc<Segment>>, FileError> {
        match self.segments.get(&self.manifest, index)? {
            None if self.holds_of(index) => {
                self.segment_again(index, self.lost_segments.lock().unwrap_or_else(PoisonError::into_inner))
            }
            found => Ok(found),
        }
    }

    /// The same for those of whom there are many: only one of them makes it good, and none waits for that.
    ///
    /// # Errors
    /// [`ReadSegmentError`].
    pub fn segment_now(&self, index: u32) -> Result<Option<Arc<Segment>>, ReadSegmentError> {
        match self.segments.get(&self.manifest, index)? {
            None if self.holds_of(index) => match self.lost_segments.try_lock() {
                Ok(lost) => Ok(self.segment_again(index, lost)?),
                Err(TryLockError::Poisoned(lost)) => Ok(self.segment_again(index, lost.into_inner())?),
                Err(TryLockError::WouldBlock) => Err(Mending.into()),
            },
            found => Ok(found),
        }
    }

    /// One that was read or stored lately: in memory, at once.
    pub fn segment_in_memory(&self, index: u32) -> Option<Arc<Segment>> {
        self.segments.in_memory(index)
    }

    fn holds_of(&self, segment: u32) -> bool {
        let held = self.held();
        self.manifest.segment_chunks(segment).any(|chunk| held.chunks.contains(chunk))
    }

    /// The chaining value of a chunk, if it is here.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    pub fn chaining_value(&self, chunk: u32) -> Result<Option<[u8; 32]>, FileError> {
        Ok(value_in(self.segment(chunk / SEGMENT_CHUNKS)?, chunk))
    }

    /// Reads a chunk that is here into `buffer`, replacing what was in it.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn read_chunk(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<(), ReadError> {
        if self.is_removed() {
            return Err(ReadError::Removed);
        }
        if !self.has(chunk) {
            return Err(ReadError::NotHeld(chunk));
        }
        Ok(self.read_unchecked(chunk, buffer)?)
    }

    /// Reads a chunk that is here into `buffer`, and verifies it unless that was done less than [`super::FRESH_MS`] ago and
    /// the file is unchanged since. True when it was verified now. `now_ms` is unix time.
    ///
    /// # Errors
    /// [`ReadVerifiedError`]; what is in `buffer` is not to be used then.
    pub fn read_verified(&self, chunk: u32, buffer: &mut Vec<u8>, now_ms: u64) -> Result<bool, ReadVerifiedError> {
        let file = |error| ReadVerifiedError::Read(ReadError::File(error));
        let before = self.body.stamp().map_err(file)?;
        match self.read_chunk(chunk, buffer) {
            Err(ReadError::File(error)) if error.is_damage() => return Err(ReadVerifiedError::Damaged(chunk)),
            read => read?,
        }
        // Looked at after the reading: what was written during it shows.
        let after = self.body.stamp().map_err(file)?;
        if after.is_some_and(|stamp| self.freshness().holds(chunk, &stamp, now_ms)) {
            return Ok(false);
        }
        let segment = self.segment_now(chunk / SEGMENT_CHUNKS).map_err(|error| match error {
            ReadSegmentError::Mending(mending) => mending.into(),
            ReadSegmentError::File(error) => file(error),
        })?;
        if !value_in(segment, chunk).is_some_and(|value| self.manifest.verifies(chunk, &value, buffer)) {
            return Err(ReadVerifiedError::Damaged(chunk));
        }
        if let Some(stamp) = before {
            self.freshness().note(chunk, stamp, now_ms);
        }
        Ok(true)
    }

    /// The same for a part of a chunk, at most `most` bytes from its byte `from` on. A chunk that is to be verified is read
    /// whole into `whole` for that.
    ///
    /// # Errors
    /// Those of [`Content::read_verified`].
    pub fn read_verified_part(
        &self,
        chunk: u32,
        from: u32,
        most: u32,
        (part, whole): (&mut Vec<u8>, &mut Vec<u8>),
        now_ms: u64,
    ) -> Result<bool, ReadVerifiedError> {
        let file = |error| ReadVerifiedError::Read(ReadError::File(error));
        let length = self.manifest.chunk_len(chunk);
        let end = from.saturating_add(most).min(length);
        let range = from.min(end) as usize..end as usize;
        let fresh = |stamp: Option<Stamp>| stamp.is_some_and(|stamp| self.freshness().holds(chunk, &stamp, now_ms));
        if !self.is_removed() && self.has(chunk) && fresh(self.body.stamp().map_err(file)?) {
            part.resize(range.len(), 0);
            let read = match self.body.read_part(chunk, from, part) {
                Err(error) if error.is_damage() => return Err(ReadVerifiedError::Damaged(chunk)),
                read => read.map_err(file)?,
            };
            // Looked at after the reading, as above.
            if read && fresh(self.body.stamp().map_err(file)?) {
                return Ok(false);
            }
        }
        let verified = self.read_verified(chunk, whole, now_ms)?;
        part.clear();
        part.extend_from_slice(whole.get(range).unwrap_or_default());
        Ok(verified)
    }

    // A thread that panicked while it held this lock left less noted, at worst.
    fn freshness(&self) -> MutexGuard<'_, Freshness> {
        self.freshness.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read_unchecked(&self, chunk: u32, buffer: &mut Vec<u8>) -> Result<(), FileError> {
        buffer.resize(self.manifest.chunk_len(chunk) as usize, 0);
        self.body.read(chunk, buffer)
    }

    /// The body, if it is one of this kind.
    pub fn body<B: Body>(&self) -> Option<&B> {
        let body: &dyn Any = &*self.body;
        body.downcast_ref()
    }

    /// Bytes of it for which there is no room on the disk yet.
    ///
    /// # Errors
    /// [`FileError`] when the disk fails.
    pub fn unreserved(&self) -> Result<u64, FileError> {
        self.body.unreserved()
    }

    /// Stores a chunk in its place if it verifies against its chaining value; true when it was not here before. It
    /// survives a crash from the next [`Content::sync`] on. `bytes` may be used up.
    ///
    /// # Errors
    /// [`WriteError`]; nothing is changed then.
    pub fn write_verified_chunk(&self, chunk: u32, bytes: &mut [u8]) -> Result<bool, WriteError> {
        if self.is_removed() {
            return Err(WriteError::Removed);
        }
        let value = self.chaining_value(chunk)?.ok_or(WriteError::NoChainingValue(chunk))?;
        if !self.manifest.verifies(chunk, &value, bytes) {
            return Err(WriteError::Mismatch(chunk));
        }
        if self.has(chunk) {
            return Ok(false);
        }
        self.body.write(chunk, bytes).map_err(|error| self.full_or(error))?;
        Ok(self.held().chunks.insert(chunk))
    }

    /// A chunk that was found on disk and verified.
    pub(super) fn take(&self, chunk: u32) {
        self.held().chunks.insert(chunk);
    }

    fn full_or(&self, error: FileError) -> WriteError {
        if error.is_disk_full() {
            let needed = self.manifest.length.saturating_sub(self.have_bytes());
            return WriteError::DiskFull { path: self.folder.clone(), needed };
        }
        WriteError::Io(error)
    }

    /// Makes durable what was written, then notes it, in this order: after a crash the note claims nothing that the
    /// data do not hold.
    ///
    /// # Errors
    /// [`SyncError`]; the old note stays then.
    pub fn sync(&self) -> Result<(), SyncError> {
        self.sync_among(None)
    }

    /// The same for no other chunks than these: of the others it is not certain yet whom they came from.
    ///
    /// # Errors
    /// Those of [`Content::sync`].
    pub fn sync_only(&self, chunks: &ChunkSet) -> Result<(), SyncError> {
        self.sync_among(Some(chunks))
    }

    fn sync_among(&self, among: Option<&ChunkSet>) -> Result<(), SyncError> {
        if self.is_removed() {
            return Err(SyncError::Removed);
        }
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let chunks = {
            let held = self.held();
            let chunks =
                among.map_or_else(|| held.chunks.clone(), |among| held.chunks.intersection(among).union(&held.noted));
            if chunks == held.noted {
                return Ok(());
            }
            chunks
        };
        self.body.sync()?;
        self.segments.sync()?;
        Step::ContentNoted.before();
        have::save(&self.folder.join(HAVE), self.manifest.chunks(), &chunks)?;
        Step::ContentNoted.after();
        self.held().noted = chunks;
        Ok(())
    }

    /// Marks the content as complete, once all of it is here, after checking that the chaining values make up the
    /// content root.
    ///
    /// # Errors
    /// [`FinishError`].
    pub fn finish(&self) -> Result<(), FinishError> {
        if self.is_complete() {
            return Ok(());
        }
        let missing = self.manifest.chunks() - self.held().chunks.len();
        if missing > 0 {
            return Err(FinishError::Missing(missing));
        }
        match self.root()? {
            Some(root) if root == self.manifest.root => {}
            Some(_) => return Err(FinishError::Manifest("its segments do not make up its content root")),
            // Some of it is not here any more.
            None => return Err(FinishError::Missing(self.manifest.chunks() - self.held().chunks.len())),
        }
        self.sync()?;
        // With what is forgotten from here on the marker goes, too.
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = self.manifest.chunks() - self.held().chunks.len();
        if missing > 0 {
            return Err(FinishError::Missing(missing));
        }
        let marker = self.folder.join(COMPLETE);
        if let Err(error) = have::close(&self.folder.join(HAVE)) {
            tracing::warn!(%error, "a few bytes are taken that are of no more use");
        }
        Step::ContentWhole.before();
        File::create(&marker).and_then(|file| file.sync_all()).at(&marker, "write")?;
        disk::sync_folder(&self.folder)?;
        Step::ContentWhole.after();
        self.held().complete = true;
        Ok(())
    }

    /// The content root by all chaining values; those that lie damaged are made good from the data. `None` where that cannot
    /// be done: which of the data are sound nobody can say then, and they are forgotten, to come again.
    fn root(&self) -> Result<Option<Digest>, FileError> {
        let mut values = Vec::with_capacity(self.manifest.chunks() as usize);
        let mut lost = ChunkSet::new();
        for index in 0..self.manifest.segment_count() {
            match self.segment(index)? {
                Some(segment) => values.extend_from_slice(&segment.values),
                None => lost.insert_range(self.manifest.segment_chunks(index)),
            }
        }
        if !lost.is_empty() {
            self.forget(&lost)?;
            return Ok(None);
        }
        Ok(manifest::content_root(&values, self.manifest.length, self.manifest.chunk_size))
    }

    /// Writes the note anew where it lies damaged. True when it did.
    pub(super) fn mend_note(&self) -> Result<bool, FileError> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let (noted, complete) = {
            let held = self.held();
            (held.noted.clone(), held.complete)
        };
        let path = self.folder.join(HAVE);
        // Of a complete content it is not looked at.
        let sound = complete
            || match have::load(&path, self.manifest.chunks()) {
                Ok(_) => true,
                Err(ContentError::Damaged(_)) => false,
                Err(ContentError::File(error)) if error.is_damage() => false,
                Err(ContentError::File(error)) => return Err(error),
            };
        if !sound {
            have::save(&path, self.manifest.chunks(), &noted)?;
        }
        Ok(!sound)
    }

    /// Takes chunks that turned out damaged out of what is held, and out of the note. In memory first: a disk that takes no
    /// note any more must not have them promised, and asked for, again and again.
    ///
    /// # Errors
    /// [`FileError`] when that cannot be noted on disk. They are not held all the same; whoever opens the content next may
    /// find them in the note, and damaged.
    pub fn forget(&self, damaged: &ChunkSet) -> Result<(), FileError> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = {
            let mut held = self.held();
            held.chunks = held.chunks.difference(damaged);
            held.noted = held.noted.difference(damaged);
            held.complete = false;
            held.noted.clone()
        };
        have::save(&self.folder.join(HAVE), self.manifest.chunks(), &noted)?;
        disk::remove(&self.folder.join(COMPLETE))?;
        disk::sync_folder(&self.folder)
    }

    // A thread that panicked while it held this lock was between two plain assignments.
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that the note of a content below `root` says are here, and bytes in all; `None` where there is no such content,
/// or none that can be told of. Only looks: another process may have the store open, and may be writing.
pub fn noted(root: &Path, digest: &Digest) -> Option<(u64, u64)> {
    let folder = root.join(digest.to_string());
    let bytes = disk::read_small(&folder.join(MANIFEST), <Signed<Manifest>>::MAX).ok().flatten()?;
    let signed: Signed<Manifest> =
        codec::decode(&bytes).ok().filter(|signed: &Signed<_>| signed.digest() == *digest)?;
    let manifest = signed.peek().ok()?;
    manifest.check(manifest.network).ok()?;
    if folder.join(COMPLETE).exists() {
        return Some((manifest.length, manifest.length));
    }
    let chunks = have::load(&folder.join(HAVE), manifest.chunks()).ok()?;
    Some((bytes_of(&manifest, &chunks), manifest.length))
}

fn value_in(segment: Option<Arc<Segment>>, chunk: u32) -> Option<[u8; 32]> {
    segment.and_then(|segment| segment.values.get((chunk % SEGMENT_CHUNKS) as usize).copied())
}

/// Bytes of these chunks: all are of one size but the last.
pub(crate) fn bytes_of(manifest: &Manifest, chunks: &ChunkSet) -> u64 {
    chunks
        .ranges()
        .map(|range| {
            let end = manifest.chunk_offset(range.end).min(manifest.length);
            end.saturating_sub(manifest.chunk_offset(range.start))
        })
        .sum()
}
