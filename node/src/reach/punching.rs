//! Two nodes that meet over a relay tell each other where to dial, and dial at the same moment. The library offers what
//! anybody said about this node, and dials whatever the other end names: any stranger who opens a circuit could have this
//! node try the addresses of its own local network. This one offers what [`super::observed`] vouches for, and dials public
//! addresses, and those of the network in which the two met.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, NewExternalAddrCandidate};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, dcutr};

use crate::address::{ip_of, is_public, is_relayed, relay_over, same_network};

/// Addresses of one peer that are dialled at once: as many as the library tells.
const ADDRESSES: usize = 20;

/// A dial that is not made.
#[derive(Debug, thiserror::Error)]
#[error("no hole is punched: {0}")]
struct NotPunched(&'static str);

pub(crate) struct Punching {
    me: PeerId,
    inner: dcutr::Behaviour,
    candidates: Vec<Multiaddr>,
    /// The library was told addresses of a local network, and tells them until it begins anew.
    told_local: bool,
    // These are bounded by the connection limits.
    direct: HashMap<ConnectionId, (PeerId, Option<IpAddr>)>,
    relayed: HashMap<ConnectionId, (PeerId, PeerId)>,
    dials: HashSet<ConnectionId>,
}

impl Punching {
    pub(crate) fn new(me: PeerId) -> Self {
        Self {
            me,
            inner: dcutr::Behaviour::new(me),
            candidates: Vec::new(),
            told_local: false,
            direct: HashMap::new(),
            relayed: HashMap::new(),
            dials: HashSet::new(),
        }
    }

    /// What the next peer that is met is told, the likeliest first.
    pub(super) fn offer(&mut self, candidates: Vec<Multiaddr>) {
        self.candidates = candidates;
    }

    /// What the library offers on a connection is settled with it. It forgets those that were told the longest ago.
    fn tell_library(&mut self) {
        let local = self.candidates.iter().any(|address| !ip_of(address).is_some_and(|ip| is_public(&ip)));
        // A peer that is told both dials neither.
        if self.told_local && !local {
            self.begin_anew();
        }
        self.told_local |= local;
        for addr in self.candidates.iter().rev() {
            self.inner.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr }));
        }
    }

    fn begin_anew(&mut self) {
        self.inner = dcutr::Behaviour::new(self.me);
        self.told_local = false;
        for (id, (peer, _)) in &self.direct {
            let (local, remote) = (Multiaddr::empty(), Multiaddr::empty());
            // It only has to know that the connection is there.
            let _ = self.inner.handle_established_inbound_connection(*id, *peer, &local, &remote);
        }
    }

    fn may_dial(&self, peer: Option<PeerId>, addresses: &[Multiaddr]) -> Result<(), NotPunched> {
        if addresses.len() > ADDRESSES {
            return Err(NotPunched("the peer names too many addresses"));
        }
        let met_at = self.relayed.values().filter(|(of, _)| Some(*of) == peer).map(|(_, relay)| relay);
        // By the connection with the relay: what a relayed address says of it anybody may have made up.
        let relays: Vec<&IpAddr> = met_at
            .flat_map(|relay| self.direct.values().filter(move |(of, _)| of == relay).filter_map(|(_, ip)| ip.as_ref()))
            .collect();
        let allowed = |address: &Multiaddr| {
            !is_relayed(address)
                && ip_of(address).is_some_and(|ip| is_public(&ip) || relays.iter().any(|at| same_network(at, &ip)))
        };
        if !addresses.iter().all(allowed) {
            return Err(NotPunched("the peer names an address of a local network that the two did not meet in"));
        }
        Ok(())
    }
}

impl NetworkBehaviour for Punching {
    type ConnectionHandler = <dcutr::Behaviour as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = dcutr::Event;

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        if self.dials.contains(&id) {
            self.may_dial(peer, addresses).map_err(ConnectionDenied::new)?;
        }
        self.inner.handle_pending_outbound_connection(id, peer, addresses, role)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if is_relayed(local) {
            self.tell_library();
        }
        self.inner.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if is_relayed(address) {
            self.tell_library();
        }
        self.inner.handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            // Whoever says so may be anybody.
            FromSwarm::NewExternalAddrCandidate(_) => return,
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                self.dials.remove(connection_id);
                if !endpoint.is_relayed() {
                    self.direct.insert(*connection_id, (*peer_id, ip_of(endpoint.get_remote_address())));
                } else if let Some((relay, _)) = relay_over(endpoint) {
                    self.relayed.insert(*connection_id, (*peer_id, relay));
                }
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                self.direct.remove(connection_id);
                self.relayed.remove(connection_id);
            }
            FromSwarm::DialFailure(failure) => drop(self.dials.remove(&failure.connection_id)),
            _ => {}
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        let polled = self.inner.poll(cx);
        if let Poll::Ready(ToSwarm::Dial { opts }) = &polled {
            self.dials.insert(opts.connection_id());
        }
        polled
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use libp2p::core::ConnectedPoint;

    use super::*;

    fn at(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn meet(punching: &mut Punching, relay_at: &str) -> PeerId {
        let (relay, peer) = (PeerId::random(), PeerId::random());
        let ip = ip_of(&relay_at.parse().unwrap());
        let next = punching.direct.len() * 2;
        punching.direct.insert(ConnectionId::new_unchecked(next), (relay, ip));
        punching.relayed.insert(ConnectionId::new_unchecked(next + 1), (peer, relay));
        peer
    }

    #[test]
    fn nobody_has_the_local_network_scanned_over_a_relay() {
        let mut punching = Punching::new(PeerId::random());
        let outside = meet(&mut punching, "/ip4/198.51.100.1/tcp/4601");
        let may = |punching: &Punching, peer, texts: &[&str]| punching.may_dial(Some(peer), &at(texts)).is_ok();
        assert!(may(&punching, outside, &["/ip4/203.0.113.9/tcp/1", "/ip6/2001:db8::9/udp/1/quic-v1"]));
        for local in
            ["/ip4/192.168.1.1/tcp/80", "/ip4/127.0.0.1/tcp/9600", "/ip6/::ffff:10.0.0.1/tcp/1", "/dns4/router/tcp/80"]
        {
            assert!(!may(&punching, outside, &["/ip4/203.0.113.9/tcp/1", local]), "{local}");
        }
        let many: Vec<String> = (0..=ADDRESSES).map(|port| format!("/ip4/203.0.113.9/tcp/{}", port + 1)).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(!may(&punching, outside, &many));
        // Those who meet over a relay of their own network are in it.
        let inside = meet(&mut punching, "/ip4/192.168.1.10/tcp/4601");
        assert!(may(&punching, inside, &["/ip4/192.168.1.20/tcp/1"]));
        assert!(
            !may(&punching, inside, &["/ip4/10.0.0.1/tcp/1"]) && !may(&punching, outside, &["/ip4/192.168.1.20/tcp/1"])
        );
    }

    #[test]
    fn once_it_has_a_public_address_a_node_offers_none_of_its_local_network() {
        let (mut punching, peer_id) = (Punching::new(PeerId::random()), PeerId::random());
        // One that is open all the time: the library stops the node where one closes that it does not know.
        let (connection_id, nowhere) = (ConnectionId::new_unchecked(1), Multiaddr::empty());
        punching.handle_established_inbound_connection(connection_id, peer_id, &nowhere, &nowhere).unwrap();
        let endpoint = ConnectedPoint::Listener { local_addr: nowhere.clone(), send_back_addr: nowhere };
        punching.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id,
            connection_id,
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
        for (offered, local) in [("/ip4/192.168.1.5/tcp/1", true), ("/ip4/198.51.100.7/tcp/1", false)] {
            punching.offer(at(&[offered]));
            punching.tell_library();
            assert_eq!(punching.told_local, local, "as long as the library was not begun anew, it tells them");
        }
        punching.on_swarm_event(FromSwarm::ConnectionClosed(ConnectionClosed {
            peer_id,
            connection_id,
            endpoint: &endpoint,
            cause: None,
            remaining_established: 0,
        }));
        assert!(punching.direct.is_empty());
    }
}
