//! Streams for goods that wait because only QUIC leads to their peer so far. TCP carries twice the bytes for the same work,
//! and on a lossy line what the system's congestion control makes of it; but it takes four round trips to be connected where
//! QUIC takes one, and the DHT connects over whatever answers first. They wait for as long as TCP takes at the distance that
//! the peer is at, once in the life of the connection.

use std::collections::{HashMap, HashSet};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};

use super::dialling::HEAD_START;
use super::open::Want;

/// TCP with TLS and the muxer is connected in four round trips, QUIC in one; a quarter more for the peer's work.
const TCP_BY_QUIC: u32 = 5;
/// Nobody waits for longer, however far away the peer is.
const LONGEST: Duration = Duration::from_secs(5);

/// How long TCP is waited for where QUIC took so long to be connected, if that is known.
pub(super) fn patience(quic_took: Option<Duration>) -> Duration {
    quic_took.map_or(HEAD_START, |took| took.saturating_mul(TCP_BY_QUIC).clamp(HEAD_START, LONGEST))
}

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
    /// Lets a want wait for TCP, for so long at most; gives it back where there is nothing to wait for. The dial is to be made.
    pub(super) fn add(
        &mut self,
        peer: PeerId,
        tcp: Vec<Multiaddr>,
        want: Want,
        patience: Duration,
    ) -> Result<Option<DialOpts>, Want> {
        if let Some(waiting) = self.waiting.get_mut(&peer) {
            waiting.wants.retain(|want| !want.is_cancelled());
            waiting.wants.push(want);
            return Ok(None);
        }
        if tcp.is_empty() || !self.tried.insert(peer) {
            return Err(want);
        }
        let dial = DialOpts::peer_id(peer).condition(PeerCondition::Always).addresses(tcp).allocate_new_port().build();
        self.wait(peer, dial.connection_id(), vec![want], patience);
        Ok(Some(dial))
    }

    /// Lets wants wait for a dial over TCP that is under way already.
    pub(super) fn join(&mut self, peer: PeerId, dial: ConnectionId, wants: Vec<Want>, patience: Duration) {
        self.tried.insert(peer);
        if let Some(waiting) = self.waiting.get_mut(&peer) {
            waiting.wants.extend(wants);
        } else if !wants.is_empty() {
            self.wait(peer, dial, wants, patience);
        }
    }

    fn wait(&mut self, peer: PeerId, dial: ConnectionId, wants: Vec<Want>, patience: Duration) {
        self.waiting.insert(peer, Waiting { dial, wants });
        self.head_starts.push(tokio::time::sleep(patience).map(move |()| peer).boxed());
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
