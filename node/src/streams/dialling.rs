//! Peers that someone wants to talk to and that are not connected yet. The wants of all callers for one peer share
//! its dials, TCP gets a head start over QUIC because it carries twice the bytes for the same work, and each want
//! learns in the end what happened at each address. Addresses by way of a relay come last. Dials leave from a port of their own: from the listening port, as
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

use super::error::dial_reasons;
use super::open::Want;
use crate::address::{is_direct_tcp, is_relayed};

/// How long TCP is tried alone. Twice a long round trip; a peer that only QUIC reaches costs this much more.
pub(super) const HEAD_START: Duration = Duration::from_millis(300);

/// How long direct addresses are tried before relays are used: a peer on the same local network answers in this time, and a
/// private address of another network never does.
const DIRECT_HEAD_START: Duration = Duration::from_secs(1);

/// Addresses tried for one peer until its wants fail: callers give 16 each at most, and there may be several callers.
const MAX_ADDRESSES: usize = 64;

#[derive(Default)]
pub(super) struct Dialling {
    // Each entry holds at least one want, so the permits of the wants bound the table.
    peers: HashMap<PeerId, Pending>,
    head_starts: FuturesUnordered<BoxFuture<'static, (PeerId, Over)>>,
}

/// Which head start is over.
#[derive(Clone, Copy)]
enum Over {
    /// Of TCP before all other direct addresses.
    Tcp,
    /// Of direct addresses before those by way of relays.
    Direct,
}

#[derive(Default)]
struct Pending {
    wants: Vec<Want>,
    running: HashSet<ConnectionId>,
    // The one over TCP alone.
    tcp: Option<ConnectionId>,
    seen: HashSet<Multiaddr>,
    queue: Vec<Multiaddr>,
    // Addresses by way of relays that were not tried yet.
    relayed: Vec<Multiaddr>,
    // Relays are being made ready; a dial will follow.
    relays_asked: bool,
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
    /// Have the relays of these made ready; [`Dialling::dial_relayed`] follows.
    ViaRelays(Vec<Multiaddr>),
    /// All failed: tell these, with this reason.
    GiveUp(Vec<Want>, String),
}

impl Dialling {
    /// Adds a want for a peer that is not connected; says what is due now.
    pub(super) fn add(&mut self, peer: PeerId, addresses: Vec<Multiaddr>, want: Want) -> Next {
        let pending = self.peers.entry(peer).or_default();
        pending.wants.retain(|want| !want.is_cancelled());
        pending.wants.push(want);
        for address in addresses {
            if pending.seen.len() < MAX_ADDRESSES && pending.seen.insert(address.clone()) {
                let queue = if is_relayed(&address) { &mut pending.relayed } else { &mut pending.queue };
                queue.push(address);
            }
        }
        if !pending.running.is_empty() || pending.relays_asked {
            return Next::Wait;
        }
        if pending.queue.is_empty()
            && let Some(addresses) = pending.via_relays()
        {
            return Next::ViaRelays(addresses);
        }
        if !pending.relayed.is_empty() {
            let over = tokio::time::sleep(DIRECT_HEAD_START).map(move |()| (peer, Over::Direct));
            self.head_starts.push(over.boxed());
        }
        let (fast, rest): (Vec<_>, Vec<_>) = pending.queue.drain(..).partition(is_direct_tcp);
        pending.queue = rest;
        if fast.is_empty() {
            return Next::Dial(pending.dial_all(peer));
        }
        self.head_starts.push(tokio::time::sleep(HEAD_START).map(move |()| (peer, Over::Tcp)).boxed());
        let dial =
            DialOpts::peer_id(peer).condition(PeerCondition::Disconnected).addresses(fast).allocate_new_port().build();
        pending.running.insert(dial.connection_id());
        pending.tcp = Some(dial.connection_id());
        Next::Dial(dial)
    }

    /// The dial over relays that are ready, if somebody still waits for the peer.
    pub(super) fn dial_relayed(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) -> Option<DialOpts> {
        let pending = self.peers.get_mut(&peer)?;
        pending.relays_asked = false;
        let dial = DialOpts::peer_id(peer).condition(PeerCondition::Disconnected).addresses(addresses).build();
        pending.running.insert(dial.connection_id());
        Some(dial)
    }

    /// The peer is connected: gives those who waited for it, and the dial over TCP if that has not ended.
    pub(super) fn connected(&mut self, peer: &PeerId) -> (Vec<Want>, Option<ConnectionId>) {
        let Some(pending) = self.peers.remove(peer) else { return (Vec::new(), None) };
        (pending.wants, pending.tcp.filter(|dial| pending.running.contains(dial)))
    }

    pub(super) fn failed(&mut self, peer: &PeerId, dial: ConnectionId, error: &DialError) -> Next {
        let Some(pending) = self.peers.get_mut(peer) else { return Next::Wait };
        if !pending.running.remove(&dial) {
            return Next::Wait;
        }
        let (reasons, telling) = dial_reasons(error);
        if telling || pending.reasons.is_empty() {
            // What was dialled for its own sake is dialled once more where another part of the node knows it, too.
            let new: Vec<String> = reasons.into_iter().filter(|reason| !pending.reasons.contains(reason)).collect();
            pending.reasons.extend(new);
        }
        if !pending.running.is_empty() {
            return Next::Wait;
        }
        pending.wants.retain(|want| !want.is_cancelled());
        if !pending.wants.is_empty() && (!pending.asked_others || !pending.queue.is_empty()) {
            return Next::Dial(pending.dial_all(*peer));
        }
        if pending.relays_asked {
            return Next::Wait;
        }
        if !pending.wants.is_empty()
            && let Some(addresses) = pending.via_relays()
        {
            return Next::ViaRelays(addresses);
        }
        match self.peers.remove(peer) {
            Some(pending) => Next::GiveUp(pending.wants, pending.reasons.join("; ")),
            None => Next::Wait,
        }
    }

    /// What became due because a head start is over.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<(PeerId, Next)> {
        while let Poll::Ready(Some((peer, over))) = self.head_starts.poll_next_unpin(cx) {
            let Some(pending) = self.peers.get_mut(&peer) else { continue };
            let next = match over {
                Over::Tcp if !pending.asked_others => Next::Dial(pending.dial_all(peer)),
                Over::Direct if !pending.relays_asked => match pending.via_relays() {
                    Some(addresses) => Next::ViaRelays(addresses),
                    None => continue,
                },
                Over::Tcp | Over::Direct => continue,
            };
            return Poll::Ready((peer, next));
        }
        Poll::Pending
    }
}

impl Pending {
    /// The addresses by way of relays, once.
    fn via_relays(&mut self) -> Option<Vec<Multiaddr>> {
        if self.relayed.is_empty() {
            return None;
        }
        self.relays_asked = true;
        Some(std::mem::take(&mut self.relayed))
    }

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
