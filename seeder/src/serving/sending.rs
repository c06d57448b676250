//! The sending half of a delivery stream: messages and chunks in order, each chunk within its time. Chunks are written
//! as they lie on disk, straight after their frame.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use delivery::Pacing;
use node::FrameError;
use protocol::codec::{self, Wire};
use protocol::deliver::SeederMessage;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;

use crate::chunks::{ChunkBytes, ChunkError};
use crate::counts::Counts;

/// What is to be sent next.
pub(super) enum Outgoing {
    /// A message.
    Message(SeederMessage),
    /// A chunk that is being read.
    Chunk {
        /// Which one.
        index: u32,
        /// Its bytes, when they are there.
        read: JoinHandle<Result<ChunkBytes, ChunkError>>,
    },
}

/// What driver and sender tell each other beside the queue.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Chunks of which at least the frame went out.
    pub(super) begun: AtomicU32,
    /// Chunks that went out whole.
    pub(super) sent: AtomicU32,
    /// Set: chunks that are not begun are passed over.
    pub(super) cut: AtomicBool,
    /// Why a chunk could not be sent. Sending goes on without chunks, so that the client can be told.
    pub(super) failed: Mutex<Option<ChunkError>>,
    /// Woken when `failed` is set.
    pub(super) noticed: Notify,
}

impl Progress {
    fn fail(&self, error: ChunkError) {
        self.cut.store(true, Ordering::Release);
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        self.noticed.notify_one();
    }
}

/// Why sending ended before the queue did.
#[derive(Debug)]
pub(super) enum SendEnd {
    /// The client does not take what is sent.
    Slow,
    /// The stream broke.
    Broken,
}

/// Sends until the queue ends.
pub(super) async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::Receiver<Outgoing>,
    progress: &Progress,
    counts: &Counts,
    limit: Duration,
    pacing: &Pacing,
) -> Result<W, SendEnd> {
    while let Some(next) = queue.recv().await {
        match next {
            Outgoing::Message(message) => {
                let write = node::write_message(&mut writer, &message);
                in_time(limit, async { write.await.map_err(|error| own_fault(&error)) }).await?;
            }
            Outgoing::Chunk { index, read } => {
                let bytes = match read.await {
                    Ok(Ok(bytes)) => bytes,
                    // Cut while it was being read: what became of it does not matter any more.
                    _ if progress.cut.load(Ordering::Acquire) => continue,
                    Ok(Err(error)) => {
                        progress.fail(error);
                        continue;
                    }
                    Err(error) => {
                        progress.fail(ChunkError::Disk(error.to_string()));
                        continue;
                    }
                };
                if progress.cut.load(Ordering::Acquire) {
                    continue;
                }
                progress.begun.fetch_add(1, Ordering::AcqRel);
                send_chunk(&mut writer, index, &bytes, limit, pacing).await?;
                progress.sent.fetch_add(1, Ordering::AcqRel);
                counts.chunks_sent.inc();
                counts.bytes_sent.inc_by(bytes.len() as u64);
            }
        }
    }
    Ok(writer)
}

/// Sends a chunk piece by piece as the limits allow. The client has `limit` to take it; waiting for our own limits does not
/// count.
async fn send_chunk<W: AsyncWrite + Unpin>(
    writer: &mut W,
    index: u32,
    bytes: &ChunkBytes,
    limit: Duration,
    pacing: &Pacing,
) -> Result<(), SendEnd> {
    let length = u32::try_from(bytes.len()).map_err(|_| SendEnd::Broken)?;
    let payload = codec::encode(&SeederMessage::Chunk { index, length });
    let head = u32::try_from(payload.len()).map_err(|_| SendEnd::Broken)?;
    let mut frame = Vec::with_capacity(payload.len() + 4);
    frame.extend_from_slice(&head.to_be_bytes());
    frame.extend_from_slice(&payload);
    let mut left = limit;
    let (mut head, mut rest): (&[u8], &[u8]) = (&frame, bytes);
    while !rest.is_empty() {
        let (piece, later) = rest.split_at_checked(pacing.piece()).unwrap_or((rest, &[]));
        pacing.pause(pacing.spend(piece.len())).await;
        let began = tokio::time::Instant::now();
        let write = async {
            writer.write_all(std::mem::take(&mut head)).await?;
            writer.write_all(piece).await?;
            writer.flush().await
        };
        in_time(left, async { write.await.map_err(|_: std::io::Error| SendEnd::Broken) }).await?;
        left = left.saturating_sub(began.elapsed());
        rest = later;
    }
    Ok(())
}

async fn in_time(limit: Duration, write: impl Future<Output = Result<(), SendEnd>>) -> Result<(), SendEnd> {
    tokio::time::timeout(limit, write).await.unwrap_or(Err(SendEnd::Slow))
}

fn own_fault(error: &FrameError) -> SendEnd {
    if matches!(error, FrameError::TooLarge { .. }) {
        tracing::error!(%error, max = SeederMessage::MAX, "own message is longer than the protocol allows");
    }
    SendEnd::Broken
}
