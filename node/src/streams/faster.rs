//! Streams for goods that wait because only QUIC leads to their peer so far, and TCP, which carries twice the bytes for the
//! same work, has not been tried: the DHT connects over whatever answers first. They wait for as long as TCP's head start
//! is anywhere, once in the life of the connection.

use std::collections::{HashMap, HashSet};
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};

use super::dialling::HEAD_START;
use super::open::Want;

#[derive(Default)]
pub(super) struct Faster {
    // Each entry holds at least one want, so the permits of the wants bound the table.
    waiting: HashMap<PeerId, Waiting>,
    // Connected peers that TCP was tried for: bounded by the connection limits.
    tried: HashSet<PeerId>,
    head_starts: FuturesUnordered<BoxFuture<'static, PeerId>>,
}

struct Waiting {
    dial: ConnectionId,
    wants: Vec<Want>,
}

impl Faster {
    /// Lets a want wait for TCP; gives it back where there is nothing to wait for. The dial is to be made.
    pub(super) fn add(&mut self, peer: PeerId, tcp: Vec<Multiaddr>, want: Want) -> Result<Option<DialOpts>, Want> {
        if let Some(waiting) = self.waiting.get_mut(&peer) {
            waiting.wants.retain(|want| !want.is_cancelled());
            waiting.wants.push(want);
            return Ok(None);
        }
        if tcp.is_empty() || !self.tried.insert(peer) {
            return Err(want);
        }
        let dial = DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(tcp).allocate_new_port().build();
        self.waiting.insert(peer, Waiting { dial: dial.connection_id(), wants: vec![want] });
        self.head_starts.push(tokio::time::sleep(HEAD_START).map(move |()| peer).boxed());
        Ok(Some(dial))
    }

    /// Those who wait for TCP with this peer.
    pub(super) fn take(&mut self, peer: &PeerId) -> Vec<Want> {
        self.waiting.remove(peer).map(|waiting| waiting.wants).unwrap_or_default()
    }

    /// A dial failed: if it was ours, nobody waits for it any more.
    pub(super) fn failed(&mut self, peer: &PeerId, dial: ConnectionId) -> Vec<Want> {
        match self.waiting.get(peer) {
            Some(waiting) if waiting.dial == dial => self.take(peer),
            _ => Vec::new(),
        }
    }

    /// There is no connection with the peer any more: gives those who waited.
    pub(super) fn disconnected(&mut self, peer: &PeerId) -> Vec<Want> {
        self.tried.remove(peer);
        self.take(peer)
    }

    /// The next peer whose head start is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<PeerId> {
        while let Poll::Ready(Some(peer)) = self.head_starts.poll_next_unpin(cx) {
            if self.waiting.contains_key(&peer) {
                return Poll::Ready(peer);
            }
        }
        Poll::Pending
    }
}
