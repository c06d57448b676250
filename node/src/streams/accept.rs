//! A stranger decides how many streams reach us, so the table of what is accepted also holds the bounds: a queue per
//! protocol, a number of open streams per peer, and a counted reason for each stream that is turned away.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use libp2p::StreamProtocol;
use protocol::PeerId;
use tokio::sync::mpsc;

use super::uses::Uses;
use super::{ConnInfo, Protocol, Stream};
use crate::metrics::NodeMetrics;

/// Bounds on the inbound streams of one protocol. A stream over a bound is reset and counted under its reason.
#[derive(Clone, Copy, Debug)]
pub struct AcceptLimits {
    /// Streams that wait for the service, over all peers (reason `queue-full`).
    pub queue: usize,
    /// Open streams of one peer, waiting ones included (reason `per-peer`).
    pub per_peer: usize,
}

/// Why a protocol cannot be accepted.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AcceptError {
    /// Somebody in this process already accepts it.
    #[error("{protocol} is already being accepted")]
    Taken {
        /// The protocol.
        protocol: Protocol,
    },
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

/// Receiving end of a protocol's inbound streams. Dropping it stops accepting the protocol.
#[derive(Debug)]
pub struct Accept {
    protocol: Protocol,
    streams: mpsc::Receiver<Stream>,
    table: Arc<AcceptTable>,
}

impl Accept {
    /// The next inbound stream; `None` when the node has stopped.
    pub async fn next(&mut self) -> Option<Stream> {
        self.streams.recv().await
    }

    /// The protocol accepted.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }
}

impl Drop for Accept {
    fn drop(&mut self) {
        self.table.remove(self.protocol);
    }
}

/// The protocols that this node accepts. Shared by the network task and all connection tasks.
#[derive(Debug)]
pub(crate) struct AcceptTable {
    entries: RwLock<Entries>,
    metrics: NodeMetrics,
}

#[derive(Debug, Default)]
struct Entries {
    by_name: HashMap<StreamProtocol, Arc<Slot>>,
    // What connections advertise: made anew at each change, because they ask far more often than it changes.
    names: Arc<[StreamProtocol]>,
    closed: bool,
}

#[derive(Debug)]
struct Slot {
    protocol: Protocol,
    per_peer: usize,
    queue: mpsc::Sender<Stream>,
    // Only peers with at least one open stream are in here, so connections times `per_peer` bounds it.
    open: Mutex<HashMap<PeerId, usize>>,
}

impl AcceptTable {
    pub(super) fn new(metrics: NodeMetrics) -> Arc<Self> {
        Arc::new(Self { entries: RwLock::default(), metrics })
    }

    pub(super) fn add(self: &Arc<Self>, protocol: Protocol, limits: AcceptLimits) -> Result<Accept, AcceptError> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        if entries.closed {
            return Err(AcceptError::Stopped);
        }
        let (queue, streams) = mpsc::channel(limits.queue.max(1));
        match entries.by_name.entry(protocol.to_libp2p()) {
            Entry::Occupied(_) => return Err(AcceptError::Taken { protocol }),
            Entry::Vacant(vacant) => {
                vacant.insert(Arc::new(Slot { protocol, per_peer: limits.per_peer, queue, open: Mutex::default() }))
            }
        };
        entries.renew_names();
        Ok(Accept { protocol, streams, table: Arc::clone(self) })
    }

    fn remove(&self, protocol: Protocol) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.by_name.remove(&protocol.to_libp2p());
        entries.renew_names();
    }

    /// Ends all [`Accept`]s: the node has stopped.
    pub(crate) fn close(&self) {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        entries.closed = true;
        entries.by_name.clear();
        entries.renew_names();
    }

    pub(super) fn names(&self) -> Arc<[StreamProtocol]> {
        Arc::clone(&self.entries.read().unwrap_or_else(PoisonError::into_inner).names)
    }

    /// Hands an inbound stream to whoever accepts its protocol, or drops it under a counted reason.
    pub(super) fn deliver(
        &self,
        stream: libp2p::Stream,
        name: &StreamProtocol,
        peer: PeerId,
        (info, uses): (ConnInfo, &Uses),
    ) {
        let slot = {
            let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
            entries.by_name.get(name).map(Arc::clone)
        };
        // Without a slot the service stopped between negotiation and now.
        let Some(slot) = slot else { return };
        let refused = match OpenGuard::take(&slot, peer) {
            None => "per-peer",
            Some(guard) => {
                let stream = Stream::new(stream, peer, slot.protocol, info, Some(guard), uses);
                match slot.queue.try_send(stream) {
                    Ok(()) => {
                        self.metrics.streams_accepted.inc([slot.protocol.as_str()]);
                        return;
                    }
                    Err(mpsc::error::TrySendError::Full(_)) => "queue-full",
                    Err(mpsc::error::TrySendError::Closed(_)) => "service-stopped",
                }
            }
        };
        self.metrics.streams_dropped.inc([slot.protocol.as_str(), refused]);
        tracing::debug!(%peer, protocol = %slot.protocol, reason = refused, "inbound stream dropped");
    }
}

impl Entries {
    fn renew_names(&mut self) {
        self.names = self.by_name.keys().cloned().collect();
    }
}

impl Slot {
    fn open(&self) -> MutexGuard<'_, HashMap<PeerId, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Counts one open inbound stream of a peer until it is dropped.
#[derive(Debug)]
pub(super) struct OpenGuard {
    slot: Arc<Slot>,
    peer: PeerId,
}

impl OpenGuard {
    fn take(slot: &Arc<Slot>, peer: PeerId) -> Option<Self> {
        let mut open = slot.open();
        let count = open.entry(peer).or_insert(0);
        if *count >= slot.per_peer {
            if *count == 0 {
                open.remove(&peer);
            }
            return None;
        }
        *count += 1;
        Some(Self { slot: Arc::clone(slot), peer })
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        let mut open = self.slot.open();
        if let Entry::Occupied(mut entry) = open.entry(self.peer) {
            *entry.get_mut() = entry.get().saturating_sub(1);
            if *entry.get() == 0 {
                entry.remove();
            }
        }
    }
}
