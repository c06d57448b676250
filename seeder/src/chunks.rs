//! Chunks from disk, on blocking threads, into buffers that are used again. Every chunk is checked when it is read, unless
//! that was done within the last minute and nobody touched the file since: disks lose bits silently, and a seeder that
//! passes damage on is dropped by its clients. Why so is in `docs/decisions/0018`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use delivery::{Content, Mending, ReadError, ReadSegmentError, ReadVerifiedError};
use protocol::ChunkSet;
use protocol::manifest::Segment;

use crate::clock::now_ms;
use crate::counts::Counts;
use crate::scrub::Suspects;

/// Bytes of buffers that are kept for the next reader although nobody uses them.
const SPARE_BYTES: usize = 16 * 1024 * 1024;

/// Why there is no chunk to send, or no chaining values.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChunkError {
    /// What lies on disk is not the chunk any more. It is not held from now on.
    #[error("chunk {0} is damaged on disk")]
    Damaged(u32),
    /// The content was removed, or the chunk is not held.
    #[error("the content is not held any more")]
    Gone,
    /// The chaining values are not held.
    #[error("this segment is not held any more")]
    NoSegment,
    /// Not now, but soon.
    #[error(transparent)]
    Mending(#[from] Mending),
    /// The disk failed.
    #[error("{0}")]
    Disk(String),
}

/// Chaining values of a content. Blocks for a read, and for whoever makes damaged ones good until that is done.
pub(crate) fn segment(content: &Content, index: u32) -> Result<Arc<Segment>, ChunkError> {
    match content.segment_now(index) {
        Ok(Some(segment)) => Ok(segment),
        Ok(None) => Err(ChunkError::NoSegment),
        Err(ReadSegmentError::Mending(mending)) => Err(mending.into()),
        Err(ReadSegmentError::File(error)) => Err(ChunkError::Disk(error.to_string())),
    }
}

/// Reads chunks for all deliveries.
pub(crate) struct ChunkReader {
    spare: Mutex<Spare>,
    counts: Counts,
    suspects: Arc<Suspects>,
    /// See [`ChunkReader::turn_bits`].
    turns_bits: AtomicBool,
}

#[derive(Default)]
struct Spare {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// Bytes of a chunk. Those of a whole one become, dropped, the buffer of another.
pub(crate) struct ChunkBytes {
    bytes: Vec<u8>,
    again: Option<Arc<ChunkReader>>,
}

impl std::ops::Deref for ChunkBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for ChunkBytes {
    fn drop(&mut self) {
        let Some(reader) = &self.again else { return };
        let mut spare = reader.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.bytes + self.bytes.capacity() <= SPARE_BYTES {
            spare.bytes += self.bytes.capacity();
            spare.buffers.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl ChunkReader {
    pub(crate) fn new(counts: Counts, suspects: Arc<Suspects>) -> Self {
        ChunkReader { spare: Mutex::default(), counts, suspects, turns_bits: AtomicBool::new(false) }
    }

    /// A machine whose memory fails, for tests of everybody who deals with one: from now on a bit of each chunk is wrong
    /// after it was checked.
    pub(crate) fn turn_bits(&self, on: bool) {
        self.turns_bits.store(on, Ordering::Relaxed);
    }

    /// Reads a chunk that is verified, now or lately. Blocks.
    pub(crate) fn read(self: &Arc<Self>, content: &Content, chunk: u32) -> Result<ChunkBytes, ChunkError> {
        let mut bytes = ChunkBytes { bytes: self.buffer(), again: Some(Arc::clone(self)) };
        let read = content.read_verified(chunk, &mut bytes.bytes, now_ms());
        self.looked_at(content, chunk, read)?;
        self.maybe_turn(&mut bytes);
        Ok(bytes)
    }

    /// The same for a part, at most `most` bytes from the chunk's byte `from` on.
    pub(crate) fn read_part(
        self: &Arc<Self>,
        content: &Content,
        chunk: u32,
        from: u32,
        most: u32,
    ) -> Result<ChunkBytes, ChunkError> {
        // A buffer of its own: a whole chunk's would hold that much memory for a part.
        let mut bytes = ChunkBytes { bytes: Vec::new(), again: None };
        let mut whole = ChunkBytes { bytes: self.buffer(), again: Some(Arc::clone(self)) };
        let into = (&mut bytes.bytes, &mut whole.bytes);
        let read = content.read_verified_part(chunk, from, most, into, now_ms());
        self.looked_at(content, chunk, read)?;
        self.maybe_turn(&mut bytes);
        Ok(bytes)
    }

    fn looked_at(
        &self,
        content: &Content,
        chunk: u32,
        read: Result<bool, ReadVerifiedError>,
    ) -> Result<(), ChunkError> {
        match read {
            Ok(verified) => {
                self.counts.chunks_verified.inc_by(u64::from(verified));
                Ok(())
            }
            Err(ReadVerifiedError::Damaged(_)) => Err(self.damaged(content, chunk)),
            Err(ReadVerifiedError::Mending(mending)) => Err(mending.into()),
            Err(ReadVerifiedError::Read(ReadError::NotHeld(_) | ReadError::Removed)) => Err(ChunkError::Gone),
            Err(ReadVerifiedError::Read(ReadError::File(error))) => Err(ChunkError::Disk(error.to_string())),
        }
    }

    fn maybe_turn(&self, bytes: &mut ChunkBytes) {
        if self.turns_bits.load(Ordering::Relaxed)
            && let Some(byte) = bytes.bytes.first_mut()
        {
            *byte ^= 1;
        }
    }

    fn damaged(&self, content: &Content, chunk: u32) -> ChunkError {
        self.counts.damaged.inc();
        tracing::error!(content = %content.digest(), chunk, "chunk is damaged on disk: not served, fetched again");
        if let Err(error) = content.forget(&ChunkSet::from_range(chunk..chunk.saturating_add(1))) {
            tracing::error!(content = %content.digest(), chunk, %error, "that a chunk is damaged cannot be noted");
        }
        // Damage seldom comes alone.
        self.suspects.add(content.digest());
        ChunkError::Damaged(chunk)
    }

    fn buffer(&self) -> Vec<u8> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = spare.buffers.pop().unwrap_or_default();
        spare.bytes = spare.bytes.saturating_sub(buffer.capacity());
        buffer
    }
}
