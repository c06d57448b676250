//! Chunks of one delivery on their way from disk: whole and ahead of their time as far as there is memory to share, part by
//! part as they are sent where there is none. So that each of many slow clients at once pins a part of a chunk, and not a
//! handful of chunks, and nobody who is admitted ever waits for memory.

use std::sync::Arc;
use std::time::Duration;

use delivery::Content;
use protocol::PeerId;
use protocol::manifest::Segment;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shares;
use crate::chunks::{self, ChunkBytes, ChunkError, ChunkReader};
use crate::context::Seeder;

/// Bytes that a chunk is read by where there is no memory for more of it: few enough that hundreds of clients that take
/// nothing hold little, and many enough that a part costs more than its errand.
pub(super) const PART: u32 = 128 * 1024;

/// Damaged chaining values that somebody makes good are looked at again after this. It takes seconds, and to wait for it in
/// a read would hold a thread and a turn that the deliveries of all other contents need.
pub(super) const MENDED_SOON: Duration = Duration::from_millis(100);

/// Bytes of a chunk, when they are there.
type Read = oneshot::Receiver<Result<ChunkBytes, ChunkError>>;

/// Reads the chunks of one delivery.
pub(super) struct Reading {
    peer: PeerId,
    content: Arc<Content>,
    chunks: Arc<ChunkReader>,
    turns: Arc<Shares>,
}

/// A chunk that is read ahead, and the memory for it.
pub(super) struct Ahead {
    read: Read,
    _memory: OwnedSemaphorePermit,
}

impl Reading {
    pub(super) fn new(seeder: &Seeder, peer: PeerId, content: Arc<Content>) -> Reading {
        Reading { peer, content, chunks: Arc::clone(&seeder.chunks), turns: Arc::clone(&seeder.reads) }
    }

    /// Has a chunk read ahead of its time, where there is memory for it.
    pub(super) fn ahead(&self, index: u32, seeder: &Seeder) -> Option<Ahead> {
        let memory = seeder.deliveries.ahead(self.content.manifest().chunk_size)?;
        let length = self.content.manifest().chunk_len(index);
        let read = self.begin(length, move |chunks, content| chunks.read(content, index));
        Some(Ahead { read, _memory: memory })
    }

    /// Chaining values: from memory, or read on a thread of their own, as there may be much to read for damaged ones. `None`
    /// where `over` says that they are of no use any more.
    pub(super) async fn segment(
        &self,
        index: u32,
        over: impl Fn() -> bool,
    ) -> Option<Result<Arc<Segment>, ChunkError>> {
        if let Some(segment) = self.content.segment_in_memory(index) {
            return Some(Ok(segment));
        }
        while !over() {
            let content = Arc::clone(&self.content);
            let mut reading = tokio::task::spawn_blocking(move || chunks::segment(&content, index));
            let read = loop {
                match tokio::time::timeout(MENDED_SOON, &mut reading).await {
                    Ok(read) => break read.unwrap_or_else(|error| Err(ChunkError::Disk(error.to_string()))),
                    Err(_) if over() => return None,
                    Err(_) => {}
                }
            };
            if !matches!(read, Err(ChunkError::Mending(_))) {
                return Some(read);
            }
            tokio::time::sleep(MENDED_SOON).await;
        }
        None
    }

    /// A chunk that is sent now.
    pub(super) fn chunk(&self, index: u32, ahead: Option<Ahead>) -> Chunk<'_> {
        Chunk { reading: self, index, length: self.content.manifest().chunk_len(index), given: 0, ahead }
    }

    /// Reads so many bytes when it is this client's turn.
    fn begin(
        &self,
        bytes: u32,
        read: impl FnOnce(&Arc<ChunkReader>, &Content) -> Result<ChunkBytes, ChunkError> + Send + 'static,
    ) -> Read {
        let (sender, answer) = oneshot::channel();
        let (chunks, content) = (Arc::clone(&self.chunks), Arc::clone(&self.content));
        self.turns.ask(self.peer, u64::from(bytes), move |turn| {
            tokio::task::spawn_blocking(move || {
                // Of a delivery that ended meanwhile nobody waits for it.
                if !sender.is_closed() {
                    let _ = sender.send(read(&chunks, &content));
                }
                drop(turn);
            });
        });
        answer
    }
}

/// A chunk's bytes in the order in which they are sent.
pub(super) struct Chunk<'a> {
    reading: &'a Reading,
    pub(super) index: u32,
    pub(super) length: u32,
    /// Bytes that were given out.
    given: u32,
    // Its memory is somebody else's when the chunk is dropped.
    ahead: Option<Ahead>,
}

impl Chunk<'_> {
    /// What comes next: all of it if it was read ahead, otherwise a part. `None` at its end.
    pub(super) async fn next(&mut self) -> Option<Result<ChunkBytes, ChunkError>> {
        let (index, from, left) = (self.index, self.given, self.length.saturating_sub(self.given));
        if left == 0 {
            return None;
        }
        let read = match &mut self.ahead {
            Some(ahead) => (&mut ahead.read).await,
            None => {
                let part =
                    move |chunks: &Arc<ChunkReader>, content: &Content| chunks.read_part(content, index, from, PART);
                self.reading.begin(left.min(PART), part).await
            }
        };
        let read = read.unwrap_or_else(|error| Err(ChunkError::Disk(error.to_string())));
        if matches!(read, Err(ChunkError::Mending(_))) {
            // An answer comes once: what is asked for again is read by parts.
            self.ahead = None;
        }
        if let Ok(bytes) = &read {
            self.given = from.saturating_add(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        }
        Some(read)
    }
}
