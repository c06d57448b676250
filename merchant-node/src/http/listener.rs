//! Strangers can open connections and say nothing; so there is a bound on them, one on silence, and an end to all of
//! them when the node stops: a connection that lingered would keep the database open.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use node::Supervisor;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};

/// A connection on which nothing was read or written for so long is closed. Longer than any answer takes.
const SILENCE: Duration = Duration::from_secs(75);
/// After the stop signal, requests under way have this long.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(2);
/// After the stop signal, nothing more is read from a connection that is silent for so long.
const STOP_SILENCE: Duration = Duration::from_millis(500);

/// A listener that accepts only while there are places.
pub(crate) struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
    supervisor: Supervisor,
}

impl Bounded {
    pub(crate) fn new(listener: TcpListener, connections: usize, supervisor: Supervisor) -> Self {
        let places = Arc::new(Semaphore::new(connections.clamp(1, Semaphore::MAX_PERMITS)));
        Bounded { listener, places, supervisor }
    }
}

impl axum::serve::Listener for Bounded {
    type Io = Placed;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Placed, SocketAddr) {
        // The semaphore is never closed.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        // Answers are small and whole: nothing is gained by waiting for more of them.
        let _ = stream.set_nodelay(true);
        let token = self.supervisor.token();
        let stopped: Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(async move {
            token.cancelled_owned().await;
            tokio::time::sleep(STOP_SILENCE).await;
        });
        (
            Placed { stream, silence: Box::pin(tokio::time::sleep(SILENCE)), stopped: Some(stopped), _place: place },
            address,
        )
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that gives its place back when it closes.
pub(crate) struct Placed {
    stream: TcpStream,
    silence: Pin<Box<Sleep>>,
    // None once it has ended: a future is not polled after that.
    stopped: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Placed {
    /// Something moved: the time starts anew. Nothing did: has it run out?
    fn judge<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match polled {
            Poll::Ready(result) => {
                self.silence.as_mut().reset(Instant::now() + SILENCE);
                Poll::Ready(result)
            }
            Poll::Pending => self.silence.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into())),
        }
    }
}

impl AsyncRead for Placed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        if polled.is_pending() && this.stopped.as_mut().is_none_or(|stopped| stopped.as_mut().poll(cx).is_ready()) {
            this.stopped = None;
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        this.judge(cx, polled)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.judge(cx, polled)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
