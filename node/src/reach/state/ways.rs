//! The way to peers that only relays lead to: it is prepared before they are dialled.

use super::*;

/// A peer that is dialled as soon as its relays are ready for it.
pub(super) struct Way {
    pub(super) peer: PeerId,
    pub(super) addresses: Vec<Multiaddr>,
    pub(super) relays: Vec<(PeerId, Vec<Multiaddr>)>,
    pub(super) until: Instant,
    /// It is connected, over a relay that was not ready: the two could not agree to dial each other.
    pub(super) again: bool,
}

impl ReachState {
    /// A peer that only relays lead to is to be dialled.
    pub(crate) fn prepare(&mut self, swarm: &mut Swarm<NodeBehaviour>, peer: PeerId, addresses: Vec<Multiaddr>) {
        if !self.config.punch || self.ways.len() >= PREPARED {
            swarm.behaviour_mut().streams.dial_relayed(peer, addresses);
            return;
        }
        self.make_way(swarm, peer, addresses, false);
    }

    /// A part of the library dialled a peer over a relay by itself. What this node offers such a peer to dial is settled with
    /// the connection; so it takes another one, over the relay when that is ready.
    pub(super) fn relayed_unprepared(&mut self, swarm: &mut Swarm<NodeBehaviour>, peer: PeerId, address: &Multiaddr) {
        let Some((relay, _)) = relay_of(address) else { return };
        let known = self.ways.iter().any(|way| way.peer == peer) || self.ways.len() >= PREPARED;
        if self.config.punch && !known && !matches!(self.roads.state(&relay), State::Ready(_)) {
            self.make_way(swarm, peer, vec![address.clone()], true);
        }
    }

    pub(super) fn make_way(
        &mut self,
        swarm: &mut Swarm<NodeBehaviour>,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        again: bool,
    ) {
        let me = *swarm.local_peer_id();
        let mut relays: Vec<(PeerId, Vec<Multiaddr>)> = Vec::new();
        for (relay, at) in addresses.iter().filter_map(relay_of).filter(|(relay, _)| *relay != me) {
            match relays.iter_mut().find(|(known, _)| *known == relay) {
                Some((_, all)) => all.push(at),
                None => relays.push((relay, vec![at])),
            }
        }
        // The peer may have named one of a relay's addresses only, and each transport counts.
        for (relay, at) in &mut relays {
            let told = swarm.behaviour_mut().streams.known_addresses(relay);
            let told = told.iter().filter_map(|address| address_to_libp2p(address, relay));
            let known = self.known.get(relay).into_iter().flatten().cloned();
            *at = own::useful_first(std::mem::take(at).into_iter().chain(known), told);
        }
        self.listen(swarm);
        self.ways.push(Way { peer, addresses, relays, until: Instant::now() + PREPARE, again });
        self.changed = true;
    }

    /// Two nodes can dial each other only if both have a port that they listen on.
    pub(super) fn listen(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        if self.listening_since.is_some() {
            return;
        }
        self.listening_since = Some(Instant::now());
        for any in ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1", "/ip6/::/tcp/0", "/ip6/::/udp/0/quic-v1"] {
            let listening = any.parse().map(|any: Multiaddr| swarm.listen_on(any));
            if !matches!(listening, Ok(Ok(_))) {
                tracing::debug!(address = any, "not listening for hole punching");
            }
        }
    }

    pub(super) fn dial_prepared(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        let mut ways = std::mem::take(&mut self.ways);
        let listens = self.listening_since.is_none_or(|since| now >= since + LISTENS);
        ways.retain(|way| {
            if listens {
                for (relay, addresses) in &way.relays {
                    // Those that failed stay so for this way.
                    if self.roads.state(relay) == State::None {
                        build(&mut self.roads, swarm, *relay, addresses);
                    }
                }
            }
            let done = |relay: &PeerId| matches!(self.roads.state(relay), State::Ready(_) | State::Failed(_));
            let ready = way.relays.iter().all(|(relay, _)| done(relay));
            if !ready && now < way.until {
                return true;
            }
            if !way.again {
                swarm.behaviour_mut().streams.dial_relayed(way.peer, way.addresses.clone());
                return false;
            }
            let some = way.relays.iter().any(|(relay, _)| matches!(self.roads.state(relay), State::Ready(_)));
            if some && !swarm.behaviour().streams.is_direct(&way.peer) {
                let dial =
                    DialOpts::peer_id(way.peer).condition(PeerCondition::Always).addresses(way.addresses.clone());
                if let Err(error) = swarm.dial(dial.build()) {
                    tracing::debug!(peer = %way.peer, %error, "no second connection over the relay");
                }
            }
            false
        });
        self.ways = ways;
    }
}
