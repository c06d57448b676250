//! Chunks on their way from the network to the disk: the memory is bounded over all seeders together, and used again
//! instead of being cleared for every chunk.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a permit stands for: the smallest chunk.
const UNIT: usize = protocol::manifest::MIN_CHUNK_SIZE as usize;

/// Buffers of one chunk each, bounded by their bytes.
#[derive(Clone, Debug)]
pub(super) struct Buffers {
    permits: Arc<Semaphore>,
    /// As many permits there are, taken or free.
    units: usize,
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffers {
    /// At most `bytes` in all, but never less than two of the largest chunks.
    pub(super) fn new(bytes: u64) -> Self {
        let least = 2 * protocol::manifest::MAX_CHUNK_SIZE as usize;
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX).max(least);
        let units = (bytes / UNIT).min(Semaphore::MAX_PERMITS);
        Buffers { permits: Arc::new(Semaphore::new(units)), units, free: Arc::default() }
    }

    /// So many chunks of this size there is room for at once.
    pub(super) fn fits(&self, chunk_size: u32) -> usize {
        let each = (chunk_size as usize).div_ceil(UNIT).max(1);
        self.units / each
    }

    /// A buffer of `len` bytes, at most a chunk, with anything in it; waits until there is room.
    pub(super) async fn get(&self, len: usize) -> Option<Buffer> {
        let units = u32::try_from(len.div_ceil(UNIT)).ok()?;
        // The semaphore is never closed.
        let permit = Arc::clone(&self.permits).acquire_many_owned(units).await.ok()?;
        let mut bytes = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        bytes.resize(len, 0);
        Some(Buffer { bytes, pool: self.clone(), _permit: permit })
    }
}

/// A buffer; returned when dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    pool: Buffers,
    _permit: OwnedSemaphorePermit,
}

impl Buffer {
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.pool.free.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
    }
}
