//! What the roles see of a stream: bytes in both directions and the peer that the handshake proved, nothing of libp2p.
//! The pair in memory behaves the same, so that services can be tested without a network.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use libp2p::core::upgrade::NegotiationError;
use protocol::PeerId;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use super::Protocol;
use super::accept::OpenGuard;
use super::uses::{InUse, Uses};

/// Bytes that a pair in memory buffers in each direction, as much as a fresh yamux window.
const PAIR_BUFFER: usize = 256 * 1024;

/// Bytes that a QUIC stream is given at once. The library copies what it is given, and keeps the copy until the last byte of
/// it is there: of a window's worth at once it would hold two.
const QUIC_WRITE: usize = 64 * 1024;

/// What carries a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP with TLS or Noise: the fast one.
    Tcp,
    /// QUIC.
    Quic,
    /// Anything else, such as a pair in memory.
    Other,
}

/// The connection that a stream runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnInfo {
    /// Number of the connection, unique in this process.
    pub id: u64,
    /// Whether it passes through a relay.
    pub relayed: bool,
    /// What carries it.
    pub transport: Transport,
}

impl ConnInfo {
    /// Smaller is better: direct before relayed, then TCP before QUIC, then the older connection.
    pub(super) fn preference(&self) -> (bool, u8, u64) {
        let transport = match self.transport {
            Transport::Tcp => 0,
            Transport::Quic => 1,
            Transport::Other => 2,
        };
        (self.relayed, transport, self.id)
    }
}

/// A stream to a peer. [`tokio::io::AsyncWriteExt::shutdown`] ends the sending half in order. Dropping the stream gives
/// it up: over TCP the other end sees an error, over QUIC possibly an ordinary end, so that a protocol must know from
/// its messages whether it is complete.
#[derive(Debug)]
pub struct Stream {
    inner: Inner,
    peer: PeerId,
    protocol: Protocol,
    info: ConnInfo,
    // Counts this stream against its peer's bound for as long as it lives.
    _guard: Option<OpenGuard>,
    // And as a use of its connection.
    _in_use: Option<InUse>,
}

#[derive(Debug)]
enum Inner {
    Net(Compat<libp2p::Stream>),
    Memory(DuplexStream),
}

impl Stream {
    pub(super) fn new(
        stream: libp2p::Stream,
        peer: PeerId,
        protocol: Protocol,
        info: ConnInfo,
        guard: Option<OpenGuard>,
        uses: &Uses,
    ) -> Self {
        let in_use = Some(uses.begin(protocol));
        Self { inner: Inner::Net(stream.compat()), peer, protocol, info, _guard: guard, _in_use: in_use }
    }

    /// Two ends of a stream in memory: the one that `a` holds, then the one that `b` holds.
    pub fn pair(a: PeerId, b: PeerId, protocol: Protocol) -> (Self, Self) {
        let (at_a, at_b) = tokio::io::duplex(PAIR_BUFFER);
        let info = ConnInfo { id: 0, relayed: false, transport: Transport::Other };
        let end =
            |stream, peer| Self { inner: Inner::Memory(stream), peer, protocol, info, _guard: None, _in_use: None };
        (end(at_a, b), end(at_b, a))
    }

    /// The peer at the other end, as the transport handshake proved it.
    pub fn peer(&self) -> PeerId {
        self.peer
    }

    /// The protocol spoken.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The connection underneath.
    pub fn info(&self) -> ConnInfo {
        self.info
    }

    // The peer's "no" to the protocol arrives with the first read; its own kind makes it recognisable.
    fn explain(&self, error: io::Error) -> io::Error {
        let failed = error
            .get_ref()
            .and_then(|inner| inner.downcast_ref::<NegotiationError>())
            .is_some_and(|negotiation| matches!(negotiation, NegotiationError::Failed));
        if failed {
            let text = format!("{} does not speak {}", self.peer, self.protocol);
            return io::Error::new(io::ErrorKind::Unsupported, text);
        }
        error
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = match &mut this.inner {
            Inner::Net(stream) => ready!(Pin::new(stream).poll_read(cx, buf)),
            Inner::Memory(stream) => ready!(Pin::new(stream).poll_read(cx, buf)),
        };
        Poll::Ready(result.map_err(|error| this.explain(error)))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = match &mut this.inner {
            Inner::Net(stream) => {
                let most = if this.info.transport == Transport::Quic { QUIC_WRITE } else { buf.len() };
                let piece = buf.get(..most).unwrap_or(buf);
                ready!(Pin::new(stream).poll_write(cx, piece))
            }
            Inner::Memory(stream) => ready!(Pin::new(stream).poll_write(cx, buf)),
        };
        Poll::Ready(result.map_err(|error| this.explain(error)))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = match &mut this.inner {
            Inner::Net(stream) => ready!(Pin::new(stream).poll_flush(cx)),
            Inner::Memory(stream) => ready!(Pin::new(stream).poll_flush(cx)),
        };
        Poll::Ready(result.map_err(|error| this.explain(error)))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = match &mut this.inner {
            Inner::Net(stream) => ready!(Pin::new(stream).poll_shutdown(cx)),
            Inner::Memory(stream) => ready!(Pin::new(stream).poll_shutdown(cx)),
        };
        Poll::Ready(result.map_err(|error| this.explain(error)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn each_end_of_a_pair_names_the_other() {
        let (a, b) = (PeerId::from_bytes([1; 32]), PeerId::from_bytes([2; 32]));
        let (mut at_a, mut at_b) = Stream::pair(a, b, Protocol::new("/test/1"));
        assert_eq!((at_a.peer(), at_b.peer()), (b, a));
        at_a.write_all(b"over").await.unwrap();
        at_a.shutdown().await.unwrap();
        let mut heard = String::new();
        at_b.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "over");
    }

    #[test]
    fn direct_comes_before_relayed_and_tcp_before_quic() {
        let info = |id, relayed, transport| ConnInfo { id, relayed, transport };
        let mut all = [
            info(1, true, Transport::Tcp),
            info(2, false, Transport::Quic),
            info(4, false, Transport::Tcp),
            info(3, false, Transport::Tcp),
        ];
        all.sort_by_key(ConnInfo::preference);
        assert_eq!(all.map(|info| info.id), [3, 4, 2, 1]);
    }
}
