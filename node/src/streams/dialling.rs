//! Peers that someone wants to talk to and that are not connected yet. The wants of all callers for one peer share
//! its dials, TCP gets a head start over QUIC because it carries twice the bytes for the same work, and each want
//! learns in the end what happened at each address. Dials leave from a port of their own: from the listening port, as
//! the library would, a reconnect can meet the remains of the connection before.

use std::collections::{HashMap, HashSet};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use libp2p::{Multiaddr, PeerId};

use super::error::dial_reason;
use super::open::Want;
use crate::address::is_direct_tcp;

/// How long TCP is tried alone. Twice a long round trip; a peer that only QUIC reaches costs this much more.
const HEAD_START: Duration = Duration::from_millis(300);

/// Addresses tried for one peer until its wants fail: callers give 16 each at most, and there may be several callers.
const MAX_ADDRESSES: usize = 64;

#[derive(Default)]
pub(super) struct Dialling {
    // Each entry holds at least one want, so the permits of the wants bound the table.
    peers: HashMap<PeerId, Pending>,
    head_starts: FuturesUnordered<BoxFuture<'static, PeerId>>,
}

#[derive(Default)]
struct Pending {
    wants: Vec<Want>,
    running: HashSet<ConnectionId>,
    seen: HashSet<Multiaddr>,
    queue: Vec<Multiaddr>,
    // Whether what the other parts of the node know about the peer's addresses has been asked for.
    asked_others: bool,
    reasons: Vec<String>,
}

/// The outcome of a failed dial.
pub(super) enum Next {
    /// Nothing of ours, or other dials still run.
    Wait,
    /// Dial on.
    Dial(DialOpts),
    /// All failed: tell these, with this reason.
    GiveUp(Vec<Want>, String),
}

impl Dialling {
    /// Adds a want for a peer that is not connected; gives the dial to start, if one is due now.
    pub(super) fn add(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, want: Want) -> Option<DialOpts> {
        let pending = self.peers.entry(peer).or_default();
        pending.wants.retain(|want| !want.is_cancelled());
        pending.wants.push(want);
        for address in addresses {
            if pending.seen.len() < MAX_ADDRESSES && pending.seen.insert(address.clone()) {
                pending.queue.push(address);
            }
        }
        if !pending.running.is_empty() {
            return None;
        }
        let (fast, rest): (Vec<_>, Vec<_>) = pending.queue.drain(..).partition(is_direct_tcp);
        pending.queue = rest;
        if fast.is_empty() {
            return Some(pending.dial_all(peer));
        }
        self.head_starts.push(tokio::time::sleep(HEAD_START).map(move |()| peer).boxed());
        let dial =
            DialOpts::peer_id(peer).condition(PeerCondition::Disconnected).addresses(fast).allocate_new_port().build();
        pending.running.insert(dial.connection_id());
        Some(dial)
    }

    /// The peer is connected: gives those who waited for it.
    pub(super) fn connected(&mut self, peer: &PeerId) -> Vec<Want> {
        self.peers.remove(peer).map(|pending| pending.wants).unwrap_or_default()
    }

    pub(super) fn failed(&mut self, peer: &PeerId, dial: ConnectionId, error: &DialError) -> Next {
        let Some(pending) = self.peers.get_mut(peer) else { return Next::Wait };
        if !pending.running.remove(&dial) {
            return Next::Wait;
        }
        let (reason, telling) = dial_reason(error);
        if telling || pending.reasons.is_empty() {
            pending.reasons.push(reason);
        }
        if !pending.running.is_empty() {
            return Next::Wait;
        }
        pending.wants.retain(|want| !want.is_cancelled());
        if !pending.wants.is_empty() && (!pending.asked_others || !pending.queue.is_empty()) {
            return Next::Dial(pending.dial_all(*peer));
        }
        match self.peers.remove(peer) {
            Some(pending) => Next::GiveUp(pending.wants, pending.reasons.join("; ")),
            None => Next::Wait,
        }
    }

    /// Dials that became due because a head start is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<DialOpts> {
        while let Poll::Ready(Some(peer)) = self.head_starts.poll_next_unpin(cx) {
            if let Some(pending) = self.peers.get_mut(&peer)
                && !pending.asked_others
            {
                return Poll::Ready(pending.dial_all(peer));
            }
        }
        Poll::Pending
    }
}

impl Pending {
    /// Dials all that is left, and whatever else the node knows about the peer.
    fn dial_all(&mut self, peer: PeerId) -> DialOpts {
        self.asked_others = true;
        let dial = DialOpts::peer_id(peer)
            .condition(PeerCondition::Disconnected)
            .addresses(std::mem::take(&mut self.queue))
            .extend_addresses_through_behaviour()
            .allocate_new_port()
            .build();
        self.running.insert(dial.connection_id());
        dial
    }
}
