//! Connections to relays that leave from a listening port. What a relay sees such a connection come from is where a
//! translation lets others in, and what two nodes tell each other before they dial at the same moment; an ordinary dial
//! leaves from a port of its own, which is of no use for that. TCP and UDP ports are translated each for itself, so there
//! is a connection over each: over TCP the goods are faster, over QUIC two nodes get through more often, because a packet
//! that comes too early is only sent again and who of the two begins is all the same.

use std::collections::HashMap;

use libp2p::swarm::ConnectionId;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId};

use crate::address::is_direct_tcp;

/// Connections at once; a peer's addresses name a handful of relays.
const MAX_ROADS: usize = 128;

/// What a connection to a relay runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Over {
    Tcp,
    Quic,
}

impl Over {
    pub(super) const BOTH: [Over; 2] = [Over::Tcp, Over::Quic];

    fn of(address: &Multiaddr) -> Over {
        if is_direct_tcp(address) { Over::Tcp } else { Over::Quic }
    }
}

/// How far a connection to a relay is.
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

/// How far the connections to one relay are together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// None was begun.
    None,
    /// Something is still to come.
    Coming,
    /// All that can be had are there, and at least one is: where the first of them leads, TCP before QUIC.
    Ready(Multiaddr),
    /// None can be had.
    Failed(String),
}

#[derive(Debug, Default)]
pub(super) struct Roads(HashMap<(PeerId, Over), Road>);

impl Roads {
    pub(super) fn state(&self, relay: &PeerId) -> State {
        let mut state = State::None;
        for over in Over::BOTH {
            state = match (self.0.get(&(*relay, over)), state) {
                (None, before) => before,
                (Some(Road::Dialling(_) | Road::Open(..)), _) => return State::Coming,
                (Some(_), ready @ State::Ready(_)) => ready,
                (Some(Road::Ready(_, address)), _) => State::Ready(address.clone()),
                (Some(Road::Failed(reason)), State::Failed(before)) => State::Failed(format!("{before}; {reason}")),
                (Some(Road::Failed(reason)), _) => State::Failed(reason.clone()),
            };
        }
        state
    }

    /// The connections with the relay that are to be kept, or not any more.
    pub(super) fn connections(&self, relay: &PeerId) -> Vec<ConnectionId> {
        let roads = Over::BOTH.iter().filter_map(|over| self.0.get(&(*relay, *over)));
        let connections = roads.filter_map(|road| match road {
            Road::Open(id, _) | Road::Ready(id, _) => Some(*id),
            Road::Dialling(_) | Road::Failed(_) => None,
        });
        connections.collect()
    }

    /// The dials that have to be made: over each transport that has an address, and no connection or dial already.
    pub(super) fn build(&mut self, relay: PeerId, addresses: &[Multiaddr]) -> Vec<DialOpts> {
        let mut dials = Vec::new();
        for over in Over::BOTH {
            let at: Vec<Multiaddr> = addresses.iter().filter(|address| Over::of(address) == over).cloned().collect();
            let there =
                matches!(self.0.get(&(relay, over)), Some(Road::Dialling(_) | Road::Open(..) | Road::Ready(..)));
            if at.is_empty() || there {
                continue;
            }
            if self.0.len() >= MAX_ROADS {
                self.forget_failed();
            }
            if self.0.len() >= MAX_ROADS {
                break;
            }
            // From the listening port, and also beside a connection that does not leave from there.
            let dial = DialOpts::peer_id(relay).condition(PeerCondition::Always).addresses(at).build();
            self.0.insert((relay, over), Road::Dialling(dial.connection_id()));
            dials.push(dial);
        }
        dials
    }

    pub(super) fn established(&mut self, peer: &PeerId, id: ConnectionId, address: &Multiaddr) {
        if let Some(road) = self.find(peer, |road| *road == Road::Dialling(id)) {
            *road = Road::Open(id, address.clone());
        }
    }

    /// The peer said over this connection where it sees us: what the connection runs over, if it is one of these.
    pub(super) fn identified(&mut self, peer: &PeerId, id: ConnectionId) -> Option<Over> {
        let ours = |road: &Road| matches!(road, Road::Open(open, _) | Road::Ready(open, _) if *open == id);
        let road = self.find(peer, ours)?;
        if let Road::Open(_, address) = road {
            *road = Road::Ready(id, address.clone());
        }
        match road {
            Road::Ready(_, address) => Some(Over::of(address)),
            _ => None,
        }
    }

    pub(super) fn failed(&mut self, peer: &PeerId, id: ConnectionId, reason: &str) {
        if let Some(road) = self.find(peer, |road| *road == Road::Dialling(id)) {
            *road = Road::Failed(reason.to_owned());
        }
    }

    /// Those who waited have been told; the next one tries again.
    pub(super) fn forget_failed(&mut self) {
        self.0.retain(|_, road| !matches!(road, Road::Failed(_)));
    }

    /// True when it was one of these.
    pub(super) fn closed(&mut self, peer: &PeerId, id: ConnectionId) -> bool {
        for over in Over::BOTH {
            if let Some(Road::Open(open, _) | Road::Ready(open, _)) = self.0.get(&(*peer, over))
                && *open == id
            {
                self.0.remove(&(*peer, over));
                return true;
            }
        }
        false
    }

    fn find(&mut self, peer: &PeerId, is: impl Fn(&Road) -> bool) -> Option<&mut Road> {
        let found = Over::BOTH.into_iter().find(|over| self.0.get(&(*peer, *over)).is_some_and(&is))?;
        self.0.get_mut(&(*peer, found))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_road_is_built_once_and_again_after_it_failed_or_closed() {
        let (mut roads, relay) = (Roads::default(), PeerId::random());
        let address: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let build = |roads: &mut Roads| -> Vec<ConnectionId> {
            roads.build(relay, std::slice::from_ref(&address)).iter().map(DialOpts::connection_id).collect()
        };
        let first = build(&mut roads)[0];
        assert!(build(&mut roads).is_empty());
        roads.failed(&relay, first, "no");
        assert_eq!(roads.state(&relay), State::Failed("no".to_owned()));
        let second = build(&mut roads)[0];
        // Another connection with the relay is not the road.
        roads.established(&relay, first, &address);
        roads.established(&relay, second, &address);
        assert_eq!(roads.identified(&relay, first), None);
        assert_eq!(roads.state(&relay), State::Coming);
        assert_eq!(roads.identified(&relay, second), Some(Over::Tcp));
        assert_eq!((roads.state(&relay), roads.connections(&relay)), (State::Ready(address.clone()), vec![second]));
        assert!(!roads.closed(&relay, first) && roads.state(&relay) != State::None);
        assert!(roads.closed(&relay, second));
        assert_eq!(roads.state(&relay), State::None);
    }

    #[test]
    fn there_is_one_over_each_transport_and_the_faster_one_leads() {
        let (mut roads, relay) = (Roads::default(), PeerId::random());
        let tcp: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let quic: Multiaddr = "/ip4/192.0.2.1/udp/1/quic-v1".parse().unwrap();
        let both = [quic.clone(), tcp.clone()];
        let ids: Vec<ConnectionId> = roads.build(relay, &both).iter().map(DialOpts::connection_id).collect();
        let (by_tcp, by_quic) = (ids[0], ids[1]);
        roads.established(&relay, by_quic, &quic);
        roads.identified(&relay, by_quic);
        assert_eq!(roads.state(&relay), State::Coming, "both are waited for");
        roads.failed(&relay, by_tcp, "no");
        assert_eq!(roads.state(&relay), State::Ready(quic.clone()));
        // What failed is tried again beside what is there.
        let again = roads.build(relay, &both)[0].connection_id();
        roads.established(&relay, again, &tcp);
        roads.identified(&relay, again);
        assert_eq!(roads.state(&relay), State::Ready(tcp));
        assert_eq!(roads.connections(&relay), [again, by_quic]);
    }
}
