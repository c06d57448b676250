//! The part of the streams behaviour that runs in the network task: which peers are connected how, who waits for
//! which of them, and the one place where a peer ID that is not an Ed25519 key is turned away.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::task::{Context, Poll};

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, DialFailure};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, PeerAddresses, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};

use super::accept::AcceptTable;
use super::connection::Handler;
use super::dialling::{Dialling, Next};
use super::open::{ToConnection, Want};
use super::{Accept, AcceptError, AcceptLimits, ConnInfo, OpenError, Protocol, Transport};
use crate::address::{address_from_libp2p, is_quic, is_relayed, peer_from_libp2p};
use crate::metrics::NodeMetrics;

/// Peers whose addresses are remembered after they told them, ten addresses each: 1,024 peers are about 1 MiB.
const KNOWN_PEERS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// The peer's identity is not an Ed25519 key.
#[derive(Debug, thiserror::Error)]
#[error("peer ID is not an Ed25519 key")]
pub(crate) struct NotEd25519;

pub(crate) struct Behaviour {
    table: Arc<AcceptTable>,
    metrics: NodeMetrics,
    // Bounded by the connection limits.
    connections: HashMap<PeerId, Vec<Connection>>,
    dialling: Dialling,
    known: PeerAddresses,
    events: VecDeque<ToSwarm<Infallible, ToConnection>>,
}

struct Connection {
    id: ConnectionId,
    info: ConnInfo,
    // The address that we dialled; an inbound connection shows a port that nobody listens on.
    dialled: Option<Multiaddr>,
}

impl Behaviour {
    pub(crate) fn new(metrics: NodeMetrics) -> Self {
        Self {
            table: AcceptTable::new(metrics.clone()),
            metrics,
            connections: HashMap::new(),
            dialling: Dialling::default(),
            known: PeerAddresses::new(KNOWN_PEERS),
            events: VecDeque::new(),
        }
    }

    pub(crate) fn table(&self) -> Arc<AcceptTable> {
        Arc::clone(&self.table)
    }

    /// Starts accepting a protocol and has all connections announce it.
    pub(crate) fn accept(&mut self, protocol: Protocol, limits: AcceptLimits) -> Result<Accept, AcceptError> {
        let accept = self.table.add(protocol, limits)?;
        for (peer_id, connections) in &self.connections {
            for connection in connections {
                self.events.push_back(ToSwarm::NotifyHandler {
                    peer_id: *peer_id,
                    handler: NotifyHandler::One(connection.id),
                    event: ToConnection::ProtocolsChanged,
                });
            }
        }
        Ok(accept)
    }

    /// Serves a want over the best connection with the peer, or dials.
    pub(crate) fn want(&mut self, peer: PeerId, mut addresses: Vec<Multiaddr>, want: Want) {
        if want.is_cancelled() {
            return;
        }
        if let Some(best) = self.best(&peer) {
            self.serve(peer, best, want);
            return;
        }
        addresses.extend(self.known.get(&peer).map(|mut address| {
            address.pop(); // the trailing /p2p/ that the cache adds
            address
        }));
        if let Some(opts) = self.dialling.add(peer, addresses, want) {
            self.events.push_back(ToSwarm::Dial { opts });
        }
    }

    /// Addresses at which the peer was reached or says it can be.
    pub(crate) fn known_addresses(&mut self, peer: &PeerId) -> Vec<protocol::Address> {
        let dialled = self.connections.get(peer).into_iter().flatten().filter_map(|c| c.dialled.clone());
        let mut addresses: Vec<_> =
            dialled.chain(self.known.get(peer)).filter_map(|a| address_from_libp2p(&a)).collect();
        addresses.sort();
        addresses.dedup();
        addresses
    }

    fn best(&self, peer: &PeerId) -> Option<ConnectionId> {
        let connections = self.connections.get(peer)?;
        connections.iter().min_by_key(|connection| connection.info.preference()).map(|connection| connection.id)
    }

    fn serve(&mut self, peer_id: PeerId, connection: ConnectionId, want: Want) {
        match want {
            Want::Stream(request) => self.events.push_back(ToSwarm::NotifyHandler {
                peer_id,
                handler: NotifyHandler::One(connection),
                event: ToConnection::Open(request),
            }),
            Want::Connection { reply, .. } => drop(reply.send(Ok(()))),
        }
    }

    fn handler(&self, id: ConnectionId, peer: &PeerId, address: &Multiaddr) -> Result<Handler, ConnectionDenied> {
        let Some(peer) = peer_from_libp2p(peer) else {
            return Err(ConnectionDenied::new(NotEd25519));
        };
        Ok(Handler {
            peer,
            info: conn_info(id, address),
            table: Arc::clone(&self.table),
            metrics: self.metrics.clone(),
            requests: VecDeque::new(),
        })
    }

    fn on_established(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint) {
        let info = conn_info(id, endpoint.get_remote_address());
        let dialled = match endpoint {
            ConnectedPoint::Dialer { address, .. } => Some(address.clone()),
            ConnectedPoint::Listener { .. } => None,
        };
        self.connections.entry(peer).or_default().push(Connection { id, info, dialled });
        for want in self.dialling.connected(&peer) {
            if let Some(best) = self.best(&peer) {
                self.serve(peer, best, want);
            }
        }
    }

    fn on_closed(&mut self, peer: PeerId, id: ConnectionId) {
        if let Some(connections) = self.connections.get_mut(&peer) {
            connections.retain(|connection| connection.id != id);
            if connections.is_empty() {
                self.connections.remove(&peer);
            }
        }
    }

    fn on_dial_failure(&mut self, peer: PeerId, failure: &DialFailure<'_>) {
        match self.dialling.failed(&peer, failure.connection_id, failure.error) {
            Next::Wait => {}
            Next::Dial(opts) => self.events.push_back(ToSwarm::Dial { opts }),
            Next::GiveUp(wants, reason) => {
                let Some(peer) = peer_from_libp2p(&peer) else { return };
                for want in wants {
                    want.fail(OpenError::Dial { peer, reason: reason.clone() });
                }
            }
        }
    }
}

/// The library numbers its connections in this process but shows the number only as text.
fn conn_info(id: ConnectionId, address: &Multiaddr) -> ConnInfo {
    let relayed = is_relayed(address);
    let transport = if is_quic(address) {
        Transport::Quic
    } else if crate::address::is_tcp(address) {
        Transport::Tcp
    } else {
        Transport::Other
    };
    ConnInfo { id: id.to_string().parse().unwrap_or(u64::MAX), relayed, transport }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        _: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        self.handler(id, &peer, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        self.handler(id, &peer, address)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        self.known.on_swarm_event(&event);
        match event {
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                self.on_established(peer_id, connection_id, endpoint);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, .. }) => {
                self.on_closed(peer_id, connection_id);
            }
            FromSwarm::DialFailure(failure) => {
                if let Some(peer) = failure.peer_id {
                    self.on_dial_failure(peer, &failure);
                }
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Infallible, ToConnection>> {
        if let Some(event) = self.events.pop_front() {
            return Poll::Ready(event);
        }
        self.dialling.poll(cx).map(|opts| ToSwarm::Dial { opts })
    }
}
