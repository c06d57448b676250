//! The part of the streams behaviour that runs in the network task: which peers are connected how, who waits for
//! which of them, and the one place where a peer ID that is not an Ed25519 key is turned away.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, DialFailure};
use libp2p::swarm::{
    CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, PeerAddresses, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};

use super::accept::AcceptTable;
use super::connection::Handler;
use super::dialling::{Dialling, Next};
use super::faster::{self, Faster};
use super::open::{ToConnection, Want};
use super::parked::Parked;
use super::uses::{Use, Uses};
use super::{Accept, AcceptError, AcceptLimits, ConnInfo, OpenError, Protocol, Transport};
use crate::address::{address_from_libp2p, is_direct_tcp, is_quic, is_relayed, peer_from_libp2p, relay_over};
use crate::metrics::NodeMetrics;
use crate::reach::{CircuitLimit, Circuits};

/// Peers whose addresses are remembered after they told them, ten addresses each: 1,024 peers are about 1 MiB.
const KNOWN_PEERS: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Addresses at which TCP is tried for a peer that is connected over QUIC.
const MAX_TCP: usize = 8;

/// Dials whose beginning is noted; what more there are take as long as is usual.
const TIMED: usize = 1024;

/// A relayed connection is closed so long after a direct one took over: what runs on it is small and ends by then.
const OUTLIVES: Duration = Duration::from_secs(5);

/// What the network task has to see to.
#[derive(Debug)]
pub(crate) enum Event {
    /// Only these addresses are left to try, and relays are on the way: they are to be dialled by
    /// [`Behaviour::dial_relayed`] when the relays are ready.
    ViaRelays { peer: PeerId, addresses: Vec<Multiaddr> },
}

/// The peer's identity is not an Ed25519 key.
#[derive(Debug, thiserror::Error)]
#[error("peer ID is not an Ed25519 key")]
pub(crate) struct NotEd25519;

/// A peer has as many connections as it may, and goods flow on each.
#[derive(Debug, thiserror::Error)]
#[error("{peer} has {connections} connections with goods on each, and no room for another")]
pub(crate) struct PeerCrowded {
    peer: PeerId,
    connections: usize,
}

pub(crate) struct Behaviour {
    table: Arc<AcceptTable>,
    metrics: NodeMetrics,
    per_peer: usize,
    // Bounded by the connection limits.
    connections: HashMap<PeerId, Vec<Connection>>,
    dialling: Dialling,
    parked: Parked,
    faster: Faster,
    circuits: Circuits,
    // Of connections that are just being established.
    fresh: HashMap<ConnectionId, Uses>,
    // When dials under way began.
    began: HashMap<ConnectionId, Instant>,
    // Relayed connections that a direct one took over from.
    outlived: FuturesUnordered<BoxFuture<'static, (PeerId, ConnectionId)>>,
    known: PeerAddresses,
    events: VecDeque<ToSwarm<Event, ToConnection>>,
}

struct Connection {
    id: ConnectionId,
    info: ConnInfo,
    relay: Option<PeerId>,
    // The address that we dialled; an inbound connection shows a port that nobody listens on.
    dialled: Option<Multiaddr>,
    // From the dial until it was connected.
    took: Option<Duration>,
    // What it is used for now.
    uses: Uses,
    // It gave way to a newer one, and is being closed.
    leaving: bool,
}

impl Behaviour {
    /// At most `per_peer` connections with one peer go on.
    pub(crate) fn new(metrics: NodeMetrics, per_peer: u32) -> Self {
        Self {
            table: AcceptTable::new(metrics.clone()),
            metrics,
            per_peer: usize::try_from(per_peer).unwrap_or(usize::MAX),
            connections: HashMap::new(),
            dialling: Dialling::default(),
            parked: Parked::default(),
            faster: Faster::default(),
            circuits: Circuits::default(),
            fresh: HashMap::new(),
            began: HashMap::new(),
            outlived: FuturesUnordered::new(),
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
        let known = self.known.get(&peer).map(|mut address| {
            address.pop(); // the trailing /p2p/ that the cache adds
            address
        });
        addresses.extend(known);
        let Some(want) = self.wait_for_tcp(peer, &addresses, want) else { return };
        let Some(want) = self.serve_connected(peer, want) else { return };
        let next = self.dialling.add(peer, addresses, want);
        self.go_on(peer, next);
    }

    /// Dials over relays that are ready now, unless the peer was reached meanwhile.
    pub(crate) fn dial_relayed(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        if let Some(opts) = self.dialling.dial_relayed(peer, addresses) {
            self.events.push_back(ToSwarm::Dial { opts });
        }
    }

    /// A circuit to or by way of `peer` lets this much through.
    pub(crate) fn note_circuit(&mut self, peer: PeerId, limit: CircuitLimit) {
        self.circuits.note(peer, limit);
    }

    /// Keeps a connection open without streams, or no longer.
    pub(crate) fn keep(&mut self, peer_id: PeerId, id: ConnectionId, keep: bool) {
        if self.connections.get(&peer_id).is_some_and(|all| all.iter().any(|connection| connection.id == id)) {
            let handler = NotifyHandler::One(id);
            self.events.push_back(ToSwarm::NotifyHandler { peer_id, handler, event: ToConnection::Keep(keep) });
        }
    }

    fn go_on(&mut self, peer: PeerId, next: Next) {
        match next {
            Next::Wait => {}
            Next::Dial(opts) => self.events.push_back(ToSwarm::Dial { opts }),
            Next::ViaRelays(addresses) => {
                self.events.push_back(ToSwarm::GenerateEvent(Event::ViaRelays { peer, addresses }));
            }
            Next::GiveUp(wants, reason) => {
                let Some(peer) = peer_from_libp2p(&peer) else { return };
                for want in wants {
                    want.fail(OpenError::Dial { peer, reason: reason.clone() });
                }
            }
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

    /// Is there a connection with the peer that no relay carries?
    pub(crate) fn is_direct(&self, peer: &PeerId) -> bool {
        self.best(peer).is_some_and(|best| !best.info.relayed)
    }

    /// Does nothing of ours run over the connections with the peer?
    pub(crate) fn is_idle(&self, peer: &PeerId) -> bool {
        self.connections.get(peer).into_iter().flatten().all(|connection| connection.uses.now() == Use::Idle)
    }

    fn best(&self, peer: &PeerId) -> Option<&Connection> {
        let connections = self.connections.get(peer)?;
        connections
            .iter()
            .filter(|connection| !connection.leaving)
            .min_by_key(|connection| connection.info.preference())
    }

    /// Serves a want over the best connection; gives it back if there is none.
    fn serve_connected(&mut self, peer: PeerId, want: Want) -> Option<Want> {
        let Some(best) = self.best(&peer) else { return Some(want) };
        let (id, relayed) = (best.id, best.info.relayed);
        if relayed && want.is_bulk() {
            self.parked.add(peer, want);
        } else {
            self.serve(peer, id, want);
        }
        None
    }

    /// Has a want for goods wait for TCP, where the peer is connected over QUIC and TCP was not tried; gives back others.
    fn wait_for_tcp(&mut self, peer: PeerId, addresses: &[Multiaddr], want: Want) -> Option<Want> {
        let quic = self.best(&peer).filter(|best| !best.info.relayed && best.info.transport == Transport::Quic);
        let Some(patience) = quic.filter(|_| want.is_bulk()).map(|quic| faster::patience(quic.took)) else {
            return Some(want);
        };
        let tcp = addresses.iter().filter(|address| is_direct_tcp(address)).take(MAX_TCP).cloned().collect();
        match self.faster.add(peer, tcp, want, patience) {
            Ok(dial) => self.events.extend(dial.map(|opts| ToSwarm::Dial { opts })),
            Err(want) => return Some(want),
        }
        None
    }

    /// TCP is there, or does not come: over whatever is the best now.
    fn serve_over_best(&mut self, peer: PeerId, wants: Vec<Want>) {
        for want in wants {
            if let Some(want) = self.serve_connected(peer, want)
                && let Some(peer) = peer_from_libp2p(&peer)
            {
                want.fail(OpenError::Closed { peer });
            }
        }
    }

    /// It was waited long enough for a direct connection with the peer.
    fn without_direct(&mut self, peer: PeerId) {
        let wants = self.parked.take(&peer);
        let Some(best) = self.best(&peer) else { return };
        let id = best.id;
        let limit = self.circuits.limit(&peer, best.relay.as_ref());
        if limit.is_some_and(|limit| limit.carries_goods()) {
            for want in wants {
                self.serve(peer, id, want);
            }
            return;
        }
        let Some(ours) = peer_from_libp2p(&peer) else { return };
        tracing::info!(peer = %ours, "only a relay leads there, and it carries no goods");
        for want in wants {
            want.fail(OpenError::RelayedOnly { peer: ours, limit });
        }
        // With the next attempt the two nodes dial each other anew.
        self.close(peer, id);
    }

    fn close(&mut self, peer_id: PeerId, id: ConnectionId) {
        self.events.push_back(ToSwarm::CloseConnection { peer_id, connection: CloseConnection::One(id) });
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

    fn handler(&mut self, id: ConnectionId, peer: &PeerId, info: ConnInfo) -> Result<Handler, ConnectionDenied> {
        let Some(ours) = peer_from_libp2p(peer) else {
            return Err(ConnectionDenied::new(NotEd25519));
        };
        let there = self.connections.get(peer).map(Vec::as_slice).unwrap_or_default();
        let staying = there.iter().filter(|connection| !connection.leaving);
        if staying.clone().count() >= self.per_peer && staying.clone().all(|one| one.uses.now() == Use::Goods) {
            return Err(ConnectionDenied::new(PeerCrowded { peer: *peer, connections: staying.count() }));
        }
        let uses = Uses::default();
        self.fresh.insert(id, uses.clone());
        Ok(Handler {
            peer: ours,
            info,
            uses,
            table: Arc::clone(&self.table),
            metrics: self.metrics.clone(),
            requests: VecDeque::new(),
            keep: false,
        })
    }

    fn on_established(&mut self, peer: PeerId, id: ConnectionId, endpoint: &ConnectedPoint) {
        let info = conn_info(id, endpoint.is_relayed(), endpoint.get_remote_address());
        let dialled = match endpoint {
            ConnectedPoint::Dialer { address, .. } => Some(address.clone()),
            ConnectedPoint::Listener { .. } => None,
        };
        let relay = relay_over(endpoint);
        let took = self.began.remove(&id).map(|began| began.elapsed());
        let uses = self.fresh.remove(&id).unwrap_or_default();
        let relay = relay.map(|(relay, _)| relay);
        let connection = Connection { id, info, relay, dialled, took, uses, leaving: false };
        self.metrics.connections.change(info, 1);
        let before = self.connections.entry(peer).or_default();
        if !info.relayed {
            let relayed = before.iter().filter(|connection| connection.info.relayed).map(|connection| connection.id);
            for id in relayed {
                self.outlived.push(tokio::time::sleep(OUTLIVES).map(move |()| (peer, id)).boxed());
            }
        }
        before.push(connection);
        let gone = make_room(before, self.per_peer);
        if let Some(gone) = gone {
            self.close(peer, gone);
        }
        let (mut wants, tcp) = self.dialling.connected(&peer);
        if let (Some(dial), false, Transport::Quic) = (tcp, info.relayed, info.transport) {
            let goods = wants.extract_if(.., |want| want.is_bulk()).collect();
            self.faster.join(peer, dial, goods, faster::patience(took));
        }
        if !info.relayed {
            wants.extend(self.parked.take(&peer));
        }
        if !info.relayed && info.transport == Transport::Tcp {
            wants.extend(self.faster.take(&peer));
        }
        for want in wants {
            // It is connected: nothing comes back.
            let _ = self.serve_connected(peer, want);
        }
    }

    fn on_closed(&mut self, peer: PeerId, id: ConnectionId) {
        let Some(connections) = self.connections.get_mut(&peer) else { return };
        for gone in connections.extract_if(.., |connection| connection.id == id) {
            self.metrics.connections.change(gone.info, -1);
        }
        if connections.is_empty() {
            self.connections.remove(&peer);
            let Some(ours) = peer_from_libp2p(&peer) else { return };
            for want in self.parked.take(&peer).into_iter().chain(self.faster.disconnected(&peer)) {
                want.fail(OpenError::Closed { peer: ours });
            }
        }
    }

    fn on_dial_failure(&mut self, peer: PeerId, failure: &DialFailure<'_>) {
        let wants = self.faster.failed(&peer, failure.connection_id);
        self.serve_over_best(peer, wants);
        let next = self.dialling.failed(&peer, failure.connection_id, failure.error);
        self.go_on(peer, next);
    }
}

/// Which connection gives way to the newest, where there are too many: the oldest, those without streams first, then one
/// over QUIC before others. A program that was killed leaves its connections over QUIC behind, which nobody ends until they
/// time out; whoever starts it again is not to be shut out by them. Several programs may run with one key, though: where
/// goods flow, nothing gives way. Of a delivery that was left behind its next stream takes the place, and its connection is
/// one without streams then.
fn make_room(connections: &mut [Connection], most: usize) -> Option<ConnectionId> {
    let staying = connections.iter().filter(|connection| !connection.leaving).count();
    let (_, older) = connections.split_last_mut().filter(|_| staying > most)?;
    let gone = older.iter_mut().filter(|connection| !connection.leaving && connection.uses.now() != Use::Goods);
    // Of several that are alike, the first is taken.
    let gone = gone.min_by_key(|connection| (connection.uses.now(), connection.info.transport != Transport::Quic))?;
    gone.leaving = true;
    Some(gone.id)
}

/// The library numbers its connections in this process but shows the number only as text. Of an inbound connection through
/// a relay only the local address tells.
fn conn_info(id: ConnectionId, relayed: bool, address: &Multiaddr) -> ConnInfo {
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
    type ToSwarm = Event;

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        _: Option<PeerId>,
        _: &[Multiaddr],
        _: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        if self.began.len() < TIMED {
            self.began.insert(id, Instant::now());
        }
        Ok(Vec::new())
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<Handler, ConnectionDenied> {
        self.handler(id, &peer, conn_info(id, is_relayed(local), remote))
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<Handler, ConnectionDenied> {
        self.handler(id, &peer, conn_info(id, is_relayed(address), address))
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
                self.began.remove(&failure.connection_id);
                self.fresh.remove(&failure.connection_id);
                if let Some(peer) = failure.peer_id {
                    self.on_dial_failure(peer, &failure);
                }
            }
            FromSwarm::ListenFailure(failure) => drop(self.fresh.remove(&failure.connection_id)),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Event, ToConnection>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(event);
            }
            if let Poll::Ready((peer, next)) = self.dialling.poll(cx) {
                self.go_on(peer, next);
            } else if let Poll::Ready(peer) = self.faster.poll(cx) {
                let wants = self.faster.take(&peer);
                self.serve_over_best(peer, wants);
            } else if let Poll::Ready(peer) = self.parked.poll(cx) {
                self.without_direct(peer);
            } else if let Poll::Ready(Some((peer, id))) = self.outlived.poll_next_unpin(cx) {
                self.close(peer, id);
            } else {
                return Poll::Pending;
            }
        }
    }
}
