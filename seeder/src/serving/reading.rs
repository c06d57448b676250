//! Chunks of one delivery on their way from disk: the one to be sent next in the memory that every delivery has, those after
//! it ahead of time as far as there is memory to share. So that many slow clients at once pin one chunk each, and not a
//! handful, and nobody who is admitted ever waits for memory.

use std::sync::Arc;

use delivery::Content;
use protocol::PeerId;
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::Shares;
use crate::chunks::{ChunkBytes, ChunkError, ChunkReader};
use crate::context::Seeder;

/// A chunk's bytes, when they are there.
pub(super) type Read = oneshot::Receiver<Result<ChunkBytes, ChunkError>>;

/// Reads the chunks of one delivery.
pub(super) struct Reading {
    peer: PeerId,
    content: Arc<Content>,
    chunks: Arc<ChunkReader>,
    turns: Arc<Shares>,
}

/// A chunk that is read ahead, and the memory for it.
pub(super) struct Ahead {
    pub(super) read: Read,
    _memory: OwnedSemaphorePermit,
}

impl Reading {
    pub(super) fn new(seeder: &Seeder, peer: PeerId, content: Arc<Content>) -> Reading {
        Reading { peer, content, chunks: Arc::clone(&seeder.chunks), turns: Arc::clone(&seeder.reads) }
    }

    /// Has a chunk read when it is this client's turn.
    pub(super) fn begin(&self, index: u32) -> Read {
        let (sender, read) = oneshot::channel();
        let (chunks, content) = (Arc::clone(&self.chunks), Arc::clone(&self.content));
        let bytes = u64::from(content.manifest().chunk_len(index));
        self.turns.ask(self.peer, bytes, move |turn| {
            tokio::task::spawn_blocking(move || {
                // Of a delivery that ended meanwhile nobody waits for it.
                if !sender.is_closed() {
                    let _ = sender.send(chunks.read(&content, index));
                }
                drop(turn);
            });
        });
        read
    }

    /// The same ahead of time, where there is memory for it.
    pub(super) fn ahead(&self, index: u32, seeder: &Seeder) -> Option<Ahead> {
        let memory = seeder.deliveries.ahead(self.content.manifest().chunk_size)?;
        Some(Ahead { read: self.begin(index), _memory: memory })
    }
}
