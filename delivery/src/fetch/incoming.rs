//! The reading half of a stream to a seeder. It is a future of its own because a frame that is half read cannot be
//! given up, while the conversation must be able to turn to other things at any moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use node::{FrameError, Stream, read_message};
use protocol::deliver::SeederMessage;
use tokio::io::{AsyncReadExt, ReadHalf};
use tokio::sync::mpsc;

use super::buffers::{Buffer, Buffers};
use crate::clock::running_ms;
use crate::pace::Pacing;

/// Whoever waits for our own memory is not taken for silent: that is said so often.
const WAITS: Duration = Duration::from_millis(250);

/// What came from a seeder.
#[derive(Debug)]
pub(super) enum Incoming {
    Message(SeederMessage),
    /// A chunk's announcement and all of its bytes.
    Chunk {
        index: u32,
        length: u32,
        buffer: Buffer,
    },
    /// Nothing more will come, and why.
    Closed(String),
}

/// What reader and conversation both know.
#[derive(Debug, Default)]
pub(super) struct Pulse {
    /// When bytes came last, by [`running_ms`]; in the future while our own limit makes us wait.
    pub(super) last_byte: AtomicU64,
    /// The same of bytes of chunks.
    pub(super) last_of_chunk: AtomicU64,
    /// Bytes of chunks that came, over all streams of the fetch.
    pub(super) read: Arc<AtomicU64>,
    /// Until when the step that is under way is waited for, by [`running_ms`]; 0 before the first.
    pub(super) until: AtomicU64,
    /// It answers, and waits for a place among those that are talked to.
    pub(super) queues: AtomicBool,
    /// Longest chunk there may be; 0 while none is expected.
    pub(super) longest_chunk: AtomicU32,
}

/// Reads until the stream ends or breaks, then waits to be dropped.
pub(super) async fn read_all(
    mut stream: ReadHalf<Stream>,
    buffers: Buffers,
    pacing: Pacing,
    pulse: Arc<Pulse>,
    to: mpsc::Sender<Incoming>,
) -> std::convert::Infallible {
    let why = loop {
        let incoming = match read_one(&mut stream, &buffers, &pacing, &pulse).await {
            Ok(incoming) => incoming,
            Err(why) => break why,
        };
        if to.send(incoming).await.is_err() {
            break String::new();
        }
    };
    // Whoever dropped the other end does not mind.
    let _ = to.send(Incoming::Closed(why)).await;
    std::future::pending().await
}

impl Pulse {
    /// Bytes of a chunk came, or will be taken from then on.
    fn beat(&self, at: u64) {
        self.last_byte.store(at, Ordering::Relaxed);
        self.last_of_chunk.store(at, Ordering::Relaxed);
    }

    /// A step begins that is given up after this time.
    pub(super) fn wait_for(&self, limit: Duration) {
        self.until.store(running_ms().saturating_add(millis(limit)), Ordering::Relaxed);
    }
}

async fn read_one(
    stream: &mut ReadHalf<Stream>,
    buffers: &Buffers,
    pacing: &Pacing,
    pulse: &Pulse,
) -> Result<Incoming, String> {
    let message = match read_message::<SeederMessage, _>(stream).await {
        Ok(Some(message)) => message,
        Ok(None) => return Err("the seeder closed the stream".to_owned()),
        Err(FrameError::Io(error)) => return Err(format!("the connection broke: {error}")),
        Err(error) => return Err(error.to_string()),
    };
    pulse.last_byte.store(running_ms(), Ordering::Relaxed);
    let SeederMessage::Chunk { index, length } = message else { return Ok(Incoming::Message(message)) };
    if length > pulse.longest_chunk.load(Ordering::Relaxed) {
        return Err(format!("the seeder announced a chunk of {length} bytes"));
    }
    let mut buffer = room_for(length as usize, buffers, pulse).await.ok_or("stopping")?;
    let mut rest = buffer.bytes_mut();
    while !rest.is_empty() {
        let piece = rest.len().min(pacing.piece());
        let read = match stream.read(rest.get_mut(..piece).unwrap_or_default()).await {
            Ok(0) => return Err("the stream ended inside a chunk".to_owned()),
            Ok(read) => read,
            Err(error) => return Err(format!("the connection broke inside a chunk: {error}")),
        };
        rest = rest.get_mut(read..).unwrap_or_default();
        let now = running_ms();
        pulse.beat(now);
        pulse.read.fetch_add(read as u64, Ordering::Relaxed);
        let wait = pacing.spend(read);
        if !wait.is_zero() {
            pulse.beat(now.saturating_add(millis(wait)));
            pacing.pause(wait).await;
            pulse.beat(running_ms());
        }
    }
    Ok(Incoming::Chunk { index, length, buffer })
}

/// A buffer for the chunk that comes next. Until there is one, it is our own limit that makes us wait.
async fn room_for(length: usize, buffers: &Buffers, pulse: &Pulse) -> Option<Buffer> {
    let mut buffer = std::pin::pin!(buffers.get(length));
    loop {
        tokio::select! {
            biased;
            buffer = &mut buffer => return buffer,
            () = tokio::time::sleep(WAITS) => pulse.beat(running_ms()),
        }
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use node::{Protocol, write_message};
    use protocol::Keypair;
    use protocol::manifest::MAX_CHUNK_SIZE;
    use tokio::io::AsyncWriteExt;

    use super::*;

    /// Longer than anything here takes on a busy machine.
    const LIMIT: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn whoever_waits_for_our_memory_is_not_taken_for_silent() {
        let buffers = Buffers::new(0);
        let whole = MAX_CHUNK_SIZE as usize;
        let first = buffers.get(whole).await.unwrap();
        let _second = buffers.get(whole).await.unwrap();
        let [me, seeder] = [1, 2].map(|n| Keypair::from_seed(&[n; 32]).peer_id());
        let (ours, theirs) = Stream::pair(me, seeder, Protocol::new(protocol::deliver::PROTOCOL));
        let (reader, _writer) = tokio::io::split(ours);
        let (pulse, (to, mut from)) = (Arc::new(Pulse::default()), mpsc::channel(1));
        pulse.longest_chunk.store(MAX_CHUNK_SIZE, Ordering::Relaxed);
        let reading = read_all(reader, buffers.clone(), Pacing::default(), Arc::clone(&pulse), to);
        let reading = tokio::spawn(reading);
        let (_, mut seeder) = tokio::io::split(theirs);
        write_message(&mut seeder, &SeederMessage::Chunk { index: 7, length: MAX_CHUNK_SIZE }).await.unwrap();

        let heard = async {
            while pulse.last_of_chunk.load(Ordering::Relaxed) == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, heard).await.unwrap();
        assert_eq!(pulse.read.load(Ordering::Relaxed), 0);
        drop(first);
        let bytes = vec![3; whole];
        let (sent, came) = tokio::join!(seeder.write_all(&bytes), tokio::time::timeout(LIMIT, from.recv()));
        sent.unwrap();
        assert!(matches!(came.unwrap().unwrap(), Incoming::Chunk { index: 7, length: MAX_CHUNK_SIZE, .. }));
        reading.abort();
    }

    #[test]
    fn as_many_chunks_fit_as_there_is_memory_for() {
        let buffers = Buffers::new(64 << 20);
        assert_eq!((buffers.fits(MAX_CHUNK_SIZE), buffers.fits(1 << 20)), (16, 64));
        assert_eq!(Buffers::new(0).fits(MAX_CHUNK_SIZE), 2);
    }
}
