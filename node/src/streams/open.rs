//! A request to open a stream travels from a caller through the network task to a connection's task. Its answer is a
//! one-shot channel all the way, so that a request lost on the road (the connection closed) answers itself, and a
//! caller who went away cancels it. The permit that travels along is what bounds all of them together.

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::{OpenError, Protocol, Stream};

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, OpenError>>;

/// A stream that a caller waits for.
#[derive(Debug)]
pub(crate) struct StreamRequest {
    pub(crate) protocol: Protocol,
    pub(crate) reply: Reply<Stream>,
    pub(crate) permit: OwnedSemaphorePermit,
}

/// What a caller wants of a peer.
#[derive(Debug)]
pub(crate) enum Want {
    /// A stream.
    Stream(StreamRequest),
    /// Just to be connected.
    Connection {
        /// Where the answer goes.
        reply: Reply<()>,
        /// Counts this request for as long as it lives.
        _permit: OwnedSemaphorePermit,
    },
}

impl Want {
    /// Whether the caller has gone away.
    pub(super) fn is_cancelled(&self) -> bool {
        match self {
            Self::Stream(request) => request.reply.is_closed(),
            Self::Connection { reply, .. } => reply.is_closed(),
        }
    }

    /// Whether it is a stream for goods.
    pub(super) fn is_bulk(&self) -> bool {
        matches!(self, Self::Stream(request) if request.protocol.is_bulk())
    }

    /// A caller who went away does not mind that the answer is lost.
    pub(super) fn fail(self, error: OpenError) {
        match self {
            Self::Stream(request) => drop(request.reply.send(Err(error))),
            Self::Connection { reply, .. } => drop(reply.send(Err(error))),
        }
    }
}

/// What the network task tells a connection's task.
#[derive(Debug)]
pub(crate) enum ToConnection {
    /// Open a stream.
    Open(StreamRequest),
    /// The accepted protocols changed: being woken is enough.
    ProtocolsChanged,
    /// Stay open without streams, or no longer.
    Keep(bool),
}
