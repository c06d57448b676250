//! Connections to relays that leave from a listening port. What a relay sees such a connection come from is where a
//! translation lets others in, and what two nodes tell each other before they dial at the same moment; an ordinary dial
//! leaves from a port of its own, which is of no use for that.

use std::collections::HashMap;

use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};

/// Relays at once; a peer's addresses name a handful.
const MAX_ROADS: usize = 64;

/// How far the connection to a relay is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Road {
    /// Being dialled.
    Dialling(ConnectionId),
    /// Connected, at this address; the relay has not said yet where it sees us come from.
    Open(ConnectionId, Multiaddr),
    /// And it has.
    Ready(ConnectionId, Multiaddr),
    /// It cannot be had.
    Failed(String),
}

#[derive(Debug, Default)]
pub(super) struct Roads(HashMap<PeerId, Road>);

impl Roads {
    pub(super) fn get(&self, relay: &PeerId) -> Option<&Road> {
        self.0.get(relay)
    }

    /// The dial that has to be made, unless there is a connection or a dial already.
    pub(super) fn build(&mut self, relay: PeerId, addresses: Vec<Multiaddr>) -> Option<DialOpts> {
        match self.0.get(&relay) {
            Some(Road::Dialling(_) | Road::Open(..) | Road::Ready(..)) => return None,
            Some(Road::Failed(_)) | None => {}
        }
        if self.0.len() >= MAX_ROADS {
            self.0.retain(|_, road| !matches!(road, Road::Failed(_)));
        }
        if self.0.len() >= MAX_ROADS {
            return None;
        }
        // From the listening port, and also beside a connection that does not leave from there.
        let dial = DialOpts::peer_id(relay).condition(PeerCondition::Always).addresses(addresses).build();
        self.0.insert(relay, Road::Dialling(dial.connection_id()));
        Some(dial)
    }

    pub(super) fn established(&mut self, peer: &PeerId, id: ConnectionId, address: &Multiaddr) {
        if let Some(road) = self.0.get_mut(peer)
            && *road == Road::Dialling(id)
        {
            *road = Road::Open(id, address.clone());
        }
    }

    /// The peer said over this connection where it sees us.
    pub(super) fn identified(&mut self, peer: &PeerId, id: ConnectionId) {
        if let Some(road) = self.0.get_mut(peer)
            && let Road::Open(open, address) = road
            && *open == id
        {
            *road = Road::Ready(id, address.clone());
        }
    }

    pub(super) fn failed(&mut self, peer: &PeerId, id: ConnectionId, reason: &str) {
        if let Some(road) = self.0.get_mut(peer)
            && *road == Road::Dialling(id)
        {
            *road = Road::Failed(reason.to_owned());
        }
    }

    /// Those who waited have been told; the next one tries again.
    pub(super) fn forget_failed(&mut self) {
        self.0.retain(|_, road| !matches!(road, Road::Failed(_)));
    }

    pub(super) fn closed(&mut self, peer: &PeerId, id: ConnectionId) {
        if let Some(Road::Open(open, _) | Road::Ready(open, _)) = self.0.get(peer)
            && *open == id
        {
            self.0.remove(peer);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_road_is_built_once_and_again_after_it_failed_or_closed() {
        let (mut roads, relay) = (Roads::default(), PeerId::random());
        let address: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let first = roads.build(relay, vec![address.clone()]).unwrap().connection_id();
        assert!(roads.build(relay, vec![address.clone()]).is_none());
        roads.failed(&relay, first, "no");
        assert_eq!(roads.get(&relay), Some(&Road::Failed("no".to_owned())));
        let second = roads.build(relay, vec![address.clone()]).unwrap().connection_id();
        // Another connection with the relay is not the road.
        roads.established(&relay, first, &address);
        roads.established(&relay, second, &address);
        roads.identified(&relay, first);
        assert_eq!(roads.get(&relay), Some(&Road::Open(second, address.clone())));
        roads.identified(&relay, second);
        assert_eq!(roads.get(&relay), Some(&Road::Ready(second, address)));
        roads.closed(&relay, first);
        assert!(roads.get(&relay).is_some());
        roads.closed(&relay, second);
        assert!(roads.get(&relay).is_none());
    }
}
