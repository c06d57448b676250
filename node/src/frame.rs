//! A stream carries bytes, the roles exchange messages: frames are what lies between. The length is checked before
//! anything is allocated, because it is the first thing that a hostile peer chooses.

use protocol::codec::{self, CodecError, Wire};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The frame is longer than the receiver takes. Nothing of it has been read (or written).
    #[error("frame of {len} bytes, at most {max} are allowed")]
    TooLarge {
        /// Length of the frame's payload, bytes.
        len: usize,
        /// Limit, bytes.
        max: usize,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The peer does not speak the protocol of this stream.
    #[error("{0}")]
    Unsupported(std::io::Error),
    /// The payload is not the expected message.
    #[error("the frame holds no valid message: {0}")]
    Codec(#[from] CodecError),
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(std::io::Error),
}

impl From<std::io::Error> for FrameError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Self::Truncated,
            std::io::ErrorKind::Unsupported => Self::Unsupported(error),
            _ => Self::Io(error),
        }
    }
}

/// Reads one frame: a big-endian u32 length, then that many bytes. `None` when the stream ended before the frame.
/// Not cancel-safe: a read that was dropped half way leaves the stream in the middle of a frame.
///
/// # Errors
/// [`FrameError::TooLarge`] when the frame announces more than `max` bytes.
pub async fn read_frame<R>(reader: &mut R, max: usize) -> Result<Option<Vec<u8>>, FrameError>
where
    R: AsyncRead + Unpin + ?Sized,
{
    let mut head = [0_u8; 4];
    if reader.read(&mut head[..1]).await? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut head[1..]).await?;
    let len = usize::try_from(u32::from_be_bytes(head)).unwrap_or(usize::MAX);
    if len > max {
        return Err(FrameError::TooLarge { len, max });
    }
    let mut payload = vec![0; len];
    reader.read_exact(&mut payload).await?;
    Ok(Some(payload))
}

/// Writes one frame and flushes it.
///
/// # Errors
/// [`FrameError::TooLarge`] when the payload does not fit a u32 length.
pub async fn write_frame<W>(writer: &mut W, payload: &[u8]) -> Result<(), FrameError>
where
    W: AsyncWrite + Unpin + ?Sized,
{
    let len = u32::try_from(payload.len())
        .map_err(|_| FrameError::TooLarge { len: payload.len(), max: u32::MAX as usize })?;
    // Small frames leave in one write, hence in one packet; large ones are not copied.
    if payload.len() <= 16 * 1024 {
        let mut frame = Vec::with_capacity(payload.len() + 4);
        frame.extend_from_slice(&len.to_be_bytes());
        frame.extend_from_slice(payload);
        writer.write_all(&frame).await?;
    } else {
        writer.write_all(&len.to_be_bytes()).await?;
        writer.write_all(payload).await?;
    }
    writer.flush().await?;
    Ok(())
}

/// Reads one message of type `T`, at most `T::MAX` bytes. `None` when the stream ended before it.
///
/// # Errors
/// As [`read_frame`], and [`FrameError::Codec`] when the payload is not a `T`.
pub async fn read_message<T, R>(reader: &mut R) -> Result<Option<T>, FrameError>
where
    T: Wire,
    R: AsyncRead + Unpin + ?Sized,
{
    match read_frame(reader, T::MAX).await? {
        Some(payload) => Ok(Some(codec::decode(&payload)?)),
        None => Ok(None),
    }
}

/// Writes one message of type `T` and flushes it. A message that the receiver would refuse for its length is refused
/// here, before anything is sent.
///
/// # Errors
/// As [`write_frame`], and [`FrameError::TooLarge`] beyond `T::MAX`.
pub async fn write_message<T, W>(writer: &mut W, message: &T) -> Result<(), FrameError>
where
    T: Wire,
    W: AsyncWrite + Unpin + ?Sized,
{
    let payload = codec::encode(message);
    if payload.len() > T::MAX {
        return Err(FrameError::TooLarge { len: payload.len(), max: T::MAX });
    }
    write_frame(writer, &payload).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_arrive_whole_and_the_end_is_visible() {
        let (mut a, mut b) = tokio::io::duplex(64);
        let big = vec![3; 100_000];
        let sent = big.clone();
        let writer = tokio::spawn(async move {
            for payload in [&[][..], &[1], &sent] {
                write_frame(&mut a, payload).await.unwrap();
            }
        });
        assert_eq!(read_frame(&mut b, 10).await.unwrap(), Some(vec![]));
        assert_eq!(read_frame(&mut b, 10).await.unwrap(), Some(vec![1]));
        assert_eq!(read_frame(&mut b, 100_000).await.unwrap(), Some(big));
        assert_eq!(read_frame(&mut b, 10).await.unwrap(), None);
        writer.await.unwrap();
    }

    #[tokio::test]
    async fn a_giant_length_is_refused_before_allocation() {
        let mut input = &[0xff, 0xff, 0xff, 0xff, 1, 2][..];
        let error = read_frame(&mut input, 1024).await.unwrap_err();
        assert!(matches!(error, FrameError::TooLarge { len: 0xffff_ffff, max: 1024 }), "{error}");
    }

    #[tokio::test]
    async fn a_cut_off_frame_is_not_an_end() {
        for input in [&[0, 0][..], &[0, 0, 0, 9, 1]] {
            let error = read_frame(&mut &*input, 1024).await.unwrap_err();
            assert!(matches!(error, FrameError::Truncated), "{error}");
        }
    }
}
