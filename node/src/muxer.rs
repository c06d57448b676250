//! Streams over one connection by yamux, as libp2p does it, but in larger pieces. libp2p's own wrapper cuts whatever is
//! sent into frames of 16 KiB, and both ends pay for each of them: an allocation, a copy, a wake-up and a pass through
//! TLS. On the wire it is the same `/yamux/1.0.0`, which leaves the length of frames to the sender, so that a node
//! understands every peer and every peer understands it.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use futures::future::{Ready, ready as done};
use futures::io::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use yamux::{Connection, ConnectionError, Mode, Stream};

use crate::counted::{Counted, Traffic};

/// Longest frame that is sent: half of a fresh stream's window. The receiver lets more through when it has half of a
/// window, and counts whole frames only: with frames as long as the window the sender stands still for a round trip after each,
/// and the window, which grows while it is used up quickly, never does. Other streams of the connection wait for the rest of a
/// frame: 0.1 s on a line of 10 Mbit/s.
const FRAME: usize = 128 * 1024;
/// Bytes that a peer may have under way to us unread, over all streams of a connection: the 128 MiB that the crate asks
/// for as 256 KiB for each of [`STREAMS`], and 64 MiB by which busy streams grow.
const CONNECTION_WINDOW: usize = 192 * 1024 * 1024;
/// Streams of a connection, in both directions.
const STREAMS: usize = 512;
/// Inbound streams that wait to be taken while the connection works on others; further ones are reset. A peer stops
/// opening at 256 that were not acknowledged, so it does not come to that.
const WAITING: usize = 256;

/// The upgrade that puts yamux on a secured connection.
#[derive(Clone, Debug)]
pub(crate) struct Yamux {
    config: yamux::Config,
    traffic: Traffic,
}

impl Yamux {
    /// What goes over its connections is added to `traffic`.
    pub(crate) fn new(traffic: Traffic) -> Self {
        let mut config = yamux::Config::default();
        config
            .set_max_num_streams(STREAMS)
            .set_max_connection_receive_window(Some(CONNECTION_WINDOW))
            .set_split_send_size(FRAME);
        Yamux { config, traffic }
    }

    fn on<C: AsyncRead + AsyncWrite + Unpin>(self, io: C, mode: Mode) -> Muxer<Counted<C>> {
        Muxer::new(Connection::new(Counted::new(io, self.traffic), self.config, mode))
    }
}

impl UpgradeInfo for Yamux {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once("/yamux/1.0.0")
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> InboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<Counted<C>>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Output>>;

    fn upgrade_inbound(self, io: C, _: Self::Info) -> Self::Future {
        done(Ok(self.on(io, Mode::Server)))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> OutboundConnectionUpgrade<C> for Yamux {
    type Output = Muxer<Counted<C>>;
    type Error = io::Error;
    type Future = Ready<io::Result<Self::Output>>;

    fn upgrade_outbound(self, io: C, _: Self::Info) -> Self::Future {
        done(Ok(self.on(io, Mode::Client)))
    }
}

/// A connection's streams.
#[derive(Debug)]
pub(crate) struct Muxer<C> {
    connection: Connection<C>,
    // yamux moves bytes only while it looks for inbound streams; those that turn up meanwhile are kept here.
    waiting: VecDeque<Stream>,
    taker: Option<Waker>,
}

impl<C: AsyncRead + AsyncWrite + Unpin> Muxer<C> {
    fn new(connection: Connection<C>) -> Self {
        Muxer { connection, waiting: VecDeque::new(), taker: None }
    }

    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        let inbound = ready!(self.connection.poll_next_inbound(cx));
        Poll::Ready(inbound.unwrap_or(Err(ConnectionError::Closed)).map_err(io_error))
    }
}

impl<C: AsyncRead + AsyncWrite + Unpin> StreamMuxer for Muxer<C> {
    type Substream = Stream;
    type Error = io::Error;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        if let Some(stream) = self.waiting.pop_front() {
            return Poll::Ready(Ok(stream));
        }
        let polled = self.poll_connection(cx);
        if polled.is_pending() {
            self.taker = Some(cx.waker().clone());
        }
        polled
    }

    fn poll_outbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<Stream>> {
        self.connection.poll_new_outbound(cx).map_err(io_error)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.connection.poll_close(cx).map_err(io_error)
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<StreamMuxerEvent>> {
        let stream = ready!(self.poll_connection(cx))?;
        if self.waiting.len() < WAITING {
            self.waiting.push_back(stream);
            if let Some(taker) = self.taker.take() {
                taker.wake();
            }
        } else {
            tracing::warn!("inbound stream reset: too many wait on this connection");
        }
        // There may be more: after letting others run.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

fn io_error(error: ConnectionError) -> io::Error {
    match error {
        ConnectionError::Io(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::future::poll_fn;

    use futures::{AsyncReadExt, AsyncWriteExt};
    use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt};
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    const INFO: &str = "/yamux/1.0.0";

    /// Sends from one end to the other and back, more than a window each way.
    async fn exchange(mut dialler: StreamMuxerBox, mut listener: StreamMuxerBox) {
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| i.to_le_bytes()[1]).collect();
        let out = poll_fn(|cx| dialler.poll_outbound_unpin(cx)).await.unwrap();
        let driven = tokio::spawn(async move { while poll_fn(|cx| dialler.poll_unpin(cx)).await.is_ok() {} });
        let sent = bytes.clone();
        let asking = tokio::spawn(async move {
            let (mut reader, mut writer) = out.split();
            let mut back = vec![0; sent.len()];
            futures::join!(async { writer.write_all(&sent).await.unwrap() }, async {
                reader.read_exact(&mut back).await.unwrap()
            });
            writer.close().await.unwrap();
            back
        });
        let mut inbound = poll_fn(|cx| listener.poll_inbound_unpin(cx)).await.unwrap();
        let answering = tokio::spawn(async move { while poll_fn(|cx| listener.poll_unpin(cx)).await.is_ok() {} });
        let mut heard = vec![0; bytes.len()];
        inbound.read_exact(&mut heard).await.unwrap();
        assert!(heard == bytes);
        inbound.write_all(&heard).await.unwrap();
        assert!(asking.await.unwrap() == bytes);
        driven.abort();
        answering.abort();
    }

    fn pipe() -> (impl AsyncRead + AsyncWrite + Unpin + Send, impl AsyncRead + AsyncWrite + Unpin + Send) {
        let (a, b) = tokio::io::duplex(64 * 1024);
        (a.compat(), b.compat())
    }

    #[tokio::test]
    async fn it_speaks_with_itself() {
        let (a, b) = pipe();
        let dialler = Yamux::new(Traffic::default()).upgrade_outbound(a, INFO).await.unwrap();
        let listener = Yamux::new(Traffic::default()).upgrade_inbound(b, INFO).await.unwrap();
        exchange(StreamMuxerBox::new(dialler), StreamMuxerBox::new(listener)).await;
    }

    #[tokio::test]
    async fn it_speaks_with_the_yamux_of_libp2p_in_both_roles() {
        let (a, b) = pipe();
        let dialler = Yamux::new(Traffic::default()).upgrade_outbound(a, INFO).await.unwrap();
        let listener = libp2p::yamux::Config::default().upgrade_inbound(b, INFO).await.unwrap();
        exchange(StreamMuxerBox::new(dialler), StreamMuxerBox::new(listener)).await;

        let (a, b) = pipe();
        let dialler = libp2p::yamux::Config::default().upgrade_outbound(a, INFO).await.unwrap();
        let listener = Yamux::new(Traffic::default()).upgrade_inbound(b, INFO).await.unwrap();
        exchange(StreamMuxerBox::new(dialler), StreamMuxerBox::new(listener)).await;
    }
}
