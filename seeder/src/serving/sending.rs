//! The sending half of a delivery stream: messages and chunks in order, each chunk within its time. Chunks are written
//! as they lie on disk, straight after their frame.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use delivery::{Pace, Pacing};
use node::FrameError;
use protocol::PeerId;
use protocol::codec::{self, Wire};
use protocol::deliver::SeederMessage;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

use super::Shares;
use super::reading::{Ahead, Reading};
use crate::chunks::{ChunkBytes, ChunkError};
use crate::context::Upload;
use crate::counts::Counts;

/// What is to be sent next.
pub(super) enum Outgoing {
    /// A message.
    Message(SeederMessage),
    /// A chunk.
    Chunk {
        /// Which one.
        index: u32,
        /// Where it is read ahead of its time.
        ahead: Option<Ahead>,
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

/// How a delivery's chunks go out.
pub(super) struct Way {
    pub(super) reading: Arc<Reading>,
    pub(super) upload: Line,
    /// A client has this long to take a chunk or a message.
    pub(super) limit: Duration,
}

/// The limits on what one delivery sends: its own, and the process's, which clients share by turns.
pub(super) struct Line {
    peer: PeerId,
    own: Pacing,
    process: Pacing,
    shared: Arc<Shares>,
}

impl Line {
    pub(super) fn new(upload: &Upload, peer: PeerId) -> Line {
        Line {
            peer,
            own: Pacing::new([Arc::new(Pace::new(upload.per_delivery.clone()))]),
            process: Pacing::new([Arc::clone(&upload.process)]),
            shared: Arc::clone(&upload.shares),
        }
    }

    /// Most bytes to send before the limits are asked again.
    fn piece(&self) -> usize {
        self.own.piece().min(self.process.piece())
    }

    /// Waits until so many bytes may be sent.
    async fn pass(&self, bytes: usize) {
        self.own.pause(self.own.spend(bytes)).await;
        if self.process.piece() == usize::MAX {
            return;
        }
        // Held while the process's line is busy with these bytes, and with nothing else that this delivery waits for.
        let turn = self.shared.turn(self.peer).await;
        self.process.pause(self.process.spend(bytes)).await;
        drop(turn);
    }
}

/// Sends until the queue ends.
pub(super) async fn send<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut queue: mpsc::Receiver<Outgoing>,
    progress: &Progress,
    counts: &Counts,
    way: &Way,
) -> Result<W, SendEnd> {
    while let Some(next) = queue.recv().await {
        match next {
            Outgoing::Message(message) => {
                let write = node::write_message(&mut writer, &message);
                in_time(way.limit, async { write.await.map_err(|error| own_fault(&error)) }).await?;
            }
            Outgoing::Chunk { index, mut ahead } => {
                let read = match &mut ahead {
                    Some(ahead) => (&mut ahead.read).await,
                    None if progress.cut.load(Ordering::Acquire) => continue,
                    None => way.reading.begin(index).await,
                };
                let bytes = match read {
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
                send_chunk(&mut writer, index, &bytes, way.limit, &way.upload).await?;
                // Its memory is somebody else's from here on.
                let bytes_sent = bytes.len() as u64;
                drop((bytes, ahead));
                progress.sent.fetch_add(1, Ordering::AcqRel);
                counts.chunks_sent.inc();
                counts.bytes_sent.inc_by(bytes_sent);
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
    line: &Line,
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
        let (piece, later) = rest.split_at_checked(line.piece()).unwrap_or((rest, &[]));
        line.pass(piece.len()).await;
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
