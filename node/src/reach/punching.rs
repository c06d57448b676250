//! Two nodes that meet over a relay tell each other where to dial, and dial at the same moment. The library offers what
//! anybody said about this node. This one offers what [`super::observed`] vouches for.

use std::collections::HashMap;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, NewExternalAddrCandidate};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId, dcutr};

use crate::address::{ip_of, is_public, is_relayed};

pub(crate) struct Punching {
    me: PeerId,
    inner: dcutr::Behaviour,
    candidates: Vec<Multiaddr>,
    /// The library was told addresses of a local network, and tells them until it begins anew.
    told_local: bool,
    // Bounded by the connection limits.
    direct: HashMap<ConnectionId, PeerId>,
}

impl Punching {
    pub(crate) fn new(me: PeerId) -> Self {
        Self { me, inner: dcutr::Behaviour::new(me), candidates: Vec::new(), told_local: false, direct: HashMap::new() }
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
        self.told_local = local;
        for addr in self.candidates.iter().rev() {
            self.inner.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr }));
        }
    }

    fn begin_anew(&mut self) {
        self.inner = dcutr::Behaviour::new(self.me);
        for (id, peer) in &self.direct {
            let (local, remote) = (Multiaddr::empty(), Multiaddr::empty());
            // It only has to know that the connection is there.
            let _ = self.inner.handle_established_inbound_connection(*id, *peer, &local, &remote);
        }
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
                if !endpoint.is_relayed() {
                    self.direct.insert(*connection_id, *peer_id);
                }
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                self.direct.remove(connection_id);
            }
            _ => {}
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner.poll(cx)
    }
}
