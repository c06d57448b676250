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
use super::reading::{Ahead, Chunk, MENDED_SOON, Reading};
use crate::chunks::ChunkError;
use crate::context::{Sending, Upload};
use crate::counts::Counts;

/// Bytes of a chunk that a client is to take in the time for them: some 9 kB a second.
const STRIDE: usize = 256 * 1024;

/// What is to be sent next.
pub(super) enum Outgoing {
    /// A message.
    Message(SeederMessage),
    /// Chaining values, which are read when it is their turn.
    Segment(u32),
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
    /// Set: chunks that are not begun are passed over, and chaining values.
    pub(super) cut: AtomicBool,
    /// Why a chunk or a segment could not be sent. Sending goes on without them, so that the client can be told.
    pub(super) failed: Mutex<Option<ChunkError>>,
    /// Woken when `failed` is set.
    pub(super) noticed: Notify,
}

impl Progress {
    fn is_cut(&self) -> bool {
        self.cut.load(Ordering::Acquire)
    }

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
    /// The rest of a chunk that was begun could not be read. The client waits for its bytes, so that it cannot be told.
    CutShort(ChunkError),
}

/// How a delivery's chunks go out.
pub(super) struct Way {
    pub(super) reading: Arc<Reading>,
    pub(super) upload: Line,
    /// A client has this long to take [`STRIDE`] bytes of a chunk, or a message.
    pub(super) limit: Duration,
}

/// The limits on what one delivery sends: its own, and the process's, which clients share by turns.
pub(super) struct Line {
    peer: PeerId,
    own: Pacing,
    process: Pacing,
    shared: Arc<Shares>,
    sending: Arc<AtomicU32>,
}

impl Line {
    pub(super) fn new(upload: &Upload, peer: PeerId) -> Line {
        Line {
            peer,
            own: Pacing::new([Arc::new(Pace::new(upload.per_delivery.clone()))]),
            process: Pacing::new([Arc::clone(&upload.process)]),
            shared: Arc::clone(&upload.shares),
            sending: Arc::clone(&upload.sending),
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
            Outgoing::Message(message) => send_message(&mut writer, &message, way).await?,
            Outgoing::Segment(index) => match way.reading.segment(index, || progress.is_cut()).await {
                Some(Ok(segment)) => {
                    let message = SeederMessage::Segment { index, segment: (*segment).clone() };
                    send_message(&mut writer, &message, way).await?;
                }
                Some(Err(error)) => progress.fail(error),
                None => {}
            },
            Outgoing::Chunk { index, ahead } => {
                let _sending = Sending::begin(&way.upload.sending);
                let chunk = way.reading.chunk(index, ahead);
                let length = chunk.length;
                if send_chunk(&mut writer, chunk, progress, way).await? {
                    progress.sent.fetch_add(1, Ordering::AcqRel);
                    counts.chunks_sent.inc();
                    counts.bytes_sent.inc_by(u64::from(length));
                }
            }
        }
    }
    Ok(writer)
}

async fn send_message<W: AsyncWrite + Unpin>(
    writer: &mut W,
    message: &SeederMessage,
    way: &Way,
) -> Result<(), SendEnd> {
    // Small ones tell how things stand; these may be as long as a chunk.
    if matches!(message, SeederMessage::Manifest(_) | SeederMessage::Segment { .. }) {
        way.upload.pass(codec::encode(message).len()).await;
    }
    let write = node::write_message(writer, message);
    in_time(way.limit, async { write.await.map_err(|error| own_fault(&error)) }).await
}

/// Sends a chunk as it comes from disk; false when it was not begun. The client has `limit` to take it; waiting for the disk
/// does not count.
async fn send_chunk<W: AsyncWrite + Unpin>(
    writer: &mut W,
    mut chunk: Chunk<'_>,
    progress: &Progress,
    way: &Way,
) -> Result<bool, SendEnd> {
    let mut head = head(chunk.index, chunk.length)?;
    let (mut begun, mut time) = (false, Time { limit: way.limit, left: way.limit, taken: 0 });
    while begun || !progress.is_cut() {
        let Some(read) = chunk.next().await else { return Ok(true) };
        let bytes = match read {
            // Cut while it was being read: what became of it does not matter any more.
            _ if !begun && progress.is_cut() => break,
            Ok(bytes) => bytes,
            Err(ChunkError::Mending(_)) => {
                tokio::time::sleep(MENDED_SOON).await;
                continue;
            }
            Err(error) if begun => return Err(SendEnd::CutShort(error)),
            Err(error) => {
                progress.fail(error);
                break;
            }
        };
        if !begun {
            begun = true;
            progress.begun.fetch_add(1, Ordering::AcqRel);
        }
        send_bytes(writer, std::mem::take(&mut head), &bytes, &mut time, &way.upload).await?;
    }
    Ok(false)
}

/// The message before a chunk's bytes.
fn head(index: u32, length: u32) -> Result<Vec<u8>, SendEnd> {
    let payload = codec::encode(&SeederMessage::Chunk { index, length });
    let size = u32::try_from(payload.len()).map_err(|_| SendEnd::Broken)?;
    let mut frame = Vec::with_capacity(payload.len() + 4);
    frame.extend_from_slice(&size.to_be_bytes());
    frame.extend_from_slice(&payload);
    Ok(frame)
}

/// A client has a time for every [`STRIDE`] bytes of a chunk. One with a slow line, which others send to as well, is not one
/// that does not read.
struct Time {
    limit: Duration,
    left: Duration,
    taken: usize,
}

impl Time {
    fn spend(&mut self, bytes: usize, time: Duration) {
        self.taken += bytes;
        self.left = self.left.saturating_sub(time);
        if self.taken >= STRIDE {
            (self.taken, self.left) = (0, self.limit);
        }
    }
}

/// Sends bytes after their head, piece by piece as the limits allow. Waiting for our own limits does not count as the client's
/// time.
async fn send_bytes<W: AsyncWrite + Unpin>(
    writer: &mut W,
    mut head: Vec<u8>,
    bytes: &[u8],
    time: &mut Time,
    line: &Line,
) -> Result<(), SendEnd> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let (piece, later) = rest.split_at_checked(line.piece().min(STRIDE)).unwrap_or((rest, &[]));
        line.pass(piece.len()).await;
        let began = tokio::time::Instant::now();
        let head = std::mem::take(&mut head);
        let write = async {
            writer.write_all(&head).await?;
            writer.write_all(piece).await?;
            writer.flush().await
        };
        in_time(time.left, async { write.await.map_err(|_: std::io::Error| SendEnd::Broken) }).await?;
        time.spend(piece.len(), began.elapsed());
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
