//! Counts what goes over connections, where it can be counted whatever sends it: below the streams, so that gossip, calls,
//! deliveries and their framing are all in it. What encryption adds (about one part in a thousand) is not.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use futures::io::{AsyncRead, AsyncWrite};
use prometheus_client::metrics::counter::Counter;

/// Bytes over all TCP connections of a node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) received: Counter,
    pub(crate) sent: Counter,
}

/// A connection whose bytes are counted.
#[derive(Debug)]
pub(crate) struct Counted<C> {
    inner: C,
    traffic: Traffic,
}

impl<C> Counted<C> {
    pub(crate) fn new(inner: C, traffic: Traffic) -> Self {
        Counted { inner, traffic }
    }
}

/// Adds what one call moved.
fn note(counter: &Counter, moved: &Poll<io::Result<usize>>) {
    if let Poll::Ready(Ok(bytes)) = moved {
        counter.inc_by(*bytes as u64);
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Counted<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.inner).poll_read(cx, buf);
        note(&self.traffic.received, &moved);
        moved
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Counted<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.inner).poll_write(cx, buf);
        note(&self.traffic.sent, &moved);
        moved
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let moved = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        note(&self.traffic.sent, &moved);
        moved
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}
