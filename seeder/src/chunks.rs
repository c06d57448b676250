//! Chunks from disk, on blocking threads, into buffers that are used again. A chunk is checked the first time that it is
//! read since the start: disks lose bits silently, and a seeder that passes damage on is dropped by its clients.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use delivery::{Content, ReadError};
use protocol::{ChunkSet, Digest};

use crate::counts::Counts;

/// Bytes of buffers that are kept for the next reader although nobody uses them.
const SPARE_BYTES: usize = 16 * 1024 * 1024;

/// Why there is no chunk to send.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChunkError {
    /// What lies on disk is not the chunk any more. It is not held from now on.
    #[error("chunk {0} is damaged on disk")]
    Damaged(u32),
    /// The content was removed, or the chunk is not held.
    #[error("the content is not held any more")]
    Gone,
    /// The disk failed.
    #[error("{0}")]
    Disk(String),
}

/// Reads chunks for all deliveries.
pub(crate) struct ChunkReader {
    verified: Mutex<HashMap<Digest, ChunkSet>>,
    spare: Mutex<Spare>,
    counts: Counts,
}

#[derive(Default)]
struct Spare {
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// A chunk's bytes; dropped, they are the buffer of another chunk.
pub(crate) struct ChunkBytes {
    bytes: Vec<u8>,
    reader: Arc<ChunkReader>,
}

impl std::ops::Deref for ChunkBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for ChunkBytes {
    fn drop(&mut self) {
        let mut spare = self.reader.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.bytes + self.bytes.capacity() <= SPARE_BYTES {
            spare.bytes += self.bytes.capacity();
            spare.buffers.push(std::mem::take(&mut self.bytes));
        }
    }
}

impl ChunkReader {
    pub(crate) fn new(counts: Counts) -> Self {
        ChunkReader { verified: Mutex::default(), spare: Mutex::default(), counts }
    }

    /// Reads a chunk; checks it if it was not checked since the start. Blocks.
    pub(crate) fn read(self: &Arc<Self>, content: &Content, chunk: u32) -> Result<ChunkBytes, ChunkError> {
        let mut bytes = ChunkBytes { bytes: self.buffer(), reader: Arc::clone(self) };
        match content.read_chunk(chunk, &mut bytes.bytes) {
            Ok(()) => {}
            Err(ReadError::NotHeld(_) | ReadError::Removed) => return Err(ChunkError::Gone),
            // A sector that cannot be read, or a file cut off: damage like any other.
            Err(ReadError::File(error)) if error.source.raw_os_error() == Some(EIO) => {
                return Err(self.damaged(content, chunk));
            }
            Err(ReadError::File(error)) if error.source.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(self.damaged(content, chunk));
            }
            Err(ReadError::File(error)) => return Err(ChunkError::Disk(error.to_string())),
        }
        if self.is_verified(content, chunk) {
            return Ok(bytes);
        }
        let value = content.chaining_value(chunk).map_err(|error| ChunkError::Disk(error.to_string()))?;
        if !value.is_some_and(|value| content.manifest().verifies(chunk, &value, &bytes)) {
            return Err(self.damaged(content, chunk));
        }
        let mut verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        verified.entry(content.digest()).or_default().insert(chunk);
        Ok(bytes)
    }

    /// What was checked of a content counts no longer: it was removed, or is to be checked again.
    pub(crate) fn forget(&self, content: &Digest) {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner).remove(content);
    }

    fn is_verified(&self, content: &Content, chunk: u32) -> bool {
        let verified = self.verified.lock().unwrap_or_else(PoisonError::into_inner);
        verified.get(&content.digest()).is_some_and(|chunks| chunks.contains(chunk))
    }

    fn damaged(&self, content: &Content, chunk: u32) -> ChunkError {
        self.counts.damaged.inc();
        tracing::error!(content = %content.digest(), chunk, "chunk is damaged on disk: not served, fetched again");
        if let Some(chunks) = self.verified.lock().unwrap_or_else(PoisonError::into_inner).get_mut(&content.digest()) {
            chunks.remove(chunk);
        }
        match content.forget(&ChunkSet::from_range(chunk..chunk.saturating_add(1))) {
            Ok(()) => ChunkError::Damaged(chunk),
            Err(error) => ChunkError::Disk(error.to_string()),
        }
    }

    fn buffer(&self) -> Vec<u8> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = spare.buffers.pop().unwrap_or_default();
        spare.bytes = spare.bytes.saturating_sub(buffer.capacity());
        buffer
    }
}

/// The system's number for an input/output error, on every system that this runs on.
const EIO: i32 = 5;
