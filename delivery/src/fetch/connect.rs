//! The one thing that a fetch needs of the network, so that it can be tested with pairs of streams in memory.

use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use node::{NodeHandle, OpenError, Protocol, Stream};
use protocol::PeerAddrs;

/// The delivery protocol.
pub(super) const DELIVER: Protocol = Protocol::bulk(protocol::deliver::PROTOCOL);

/// Opens delivery streams.
pub trait Connect: Send + Sync {
    /// A stream to the peer, within `timeout`.
    fn open(&self, target: PeerAddrs, timeout: Duration) -> BoxFuture<'static, Result<Stream, OpenError>>;
}

impl Connect for NodeHandle {
    fn open(&self, target: PeerAddrs, timeout: Duration) -> BoxFuture<'static, Result<Stream, OpenError>> {
        let node = self.clone();
        async move { NodeHandle::open(&node, &target, DELIVER, timeout).await }.boxed()
    }
}
