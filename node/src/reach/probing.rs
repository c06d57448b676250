//! Asks peers whether they get through to an address. The library's client takes every address that anybody says for a
//! candidate, keeps all of them for ever, and never tests one again, whichever network the node is in by then. This one
//! takes those that [`super::observed`] vouches for, so many of them, and begins anew when the node has moved.

use std::collections::{HashMap, HashSet};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, NewExternalAddrCandidate};
use libp2p::swarm::derive_prelude::Either;
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};
use libp2p_autonat::v2::client;

/// Addresses that are tested, until the node moves or [`ANEW`] is over: a node has a handful.
const CANDIDATES: usize = 32;
/// And tests of them. A server that has no time for one says so, and it is repeated at another; each may cost 100 KB.
const TESTS: usize = 64;
/// Whoever used all that up begins anew after this time.
const ANEW: Duration = Duration::from_secs(3600);

/// What a connection told the library's client. The library gives the type no name that others can use.
type Said =
    <<<client::Behaviour as NetworkBehaviour>::ConnectionHandler as ConnectionHandler>::ToBehaviour as Of>::Left;

trait Of {
    type Left;
}

impl<L, R> Of for Either<L, R> {
    type Left = L;
}

pub(crate) struct Probing {
    inner: client::Behaviour,
    // Bounded by the connection limits.
    connections: HashMap<ConnectionId, Connection>,
    candidates: HashSet<Multiaddr>,
    tests: usize,
    since: Instant,
}

/// What the library's client has to be told again when it begins anew.
struct Connection {
    peer: PeerId,
    endpoint: ConnectedPoint,
    tests_others: bool,
}

impl Probing {
    pub(crate) fn new() -> Self {
        Self {
            inner: client::Behaviour::default(),
            connections: HashMap::new(),
            candidates: HashSet::new(),
            tests: 0,
            since: Instant::now(),
        }
    }

    /// These may lead here, and nobody has said so yet.
    pub(super) fn test(&mut self, candidates: impl Iterator<Item = Multiaddr>) {
        let used_up = self.candidates.len() >= CANDIDATES || self.tests >= TESTS;
        if used_up && self.since.elapsed() >= ANEW {
            self.begin_anew();
        }
        for addr in candidates {
            if self.candidates.len() < CANDIDATES && self.candidates.insert(addr.clone()) {
                let candidate = NewExternalAddrCandidate { addr: &addr };
                self.inner.on_swarm_event(FromSwarm::NewExternalAddrCandidate(candidate));
            }
        }
    }

    /// What was found out is no longer true.
    pub(super) fn begin_anew(&mut self) {
        self.inner = client::Behaviour::default();
        (self.tests, self.since) = (0, Instant::now());
        self.candidates.clear();
        for (id, connection) in &self.connections {
            self.inner.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id: connection.peer,
                connection_id: *id,
                endpoint: &connection.endpoint,
                failed_addresses: &[],
                other_established: 0,
            }));
            if connection.tests_others {
                let said = Either::Left(Said::PeerHasServerSupport);
                self.inner.on_connection_handler_event(connection.peer, *id, said);
            }
        }
    }
}

impl NetworkBehaviour for Probing {
    type ConnectionHandler = <client::Behaviour as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = client::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
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
        self.inner.handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            // Whoever says so may be anybody.
            FromSwarm::NewExternalAddrCandidate(_) => return,
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                let connection = Connection { peer: *peer_id, endpoint: (*endpoint).clone(), tests_others: false };
                self.connections.insert(*connection_id, connection);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                self.connections.remove(connection_id);
            }
            _ => {}
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        if let (Either::Left(Said::PeerHasServerSupport), Some(connection)) = (&event, self.connections.get_mut(&id)) {
            connection.tests_others = true;
        }
        self.inner.on_connection_handler_event(peer, id, event);
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            let polled = self.inner.poll(cx);
            if matches!(polled, Poll::Ready(ToSwarm::NotifyHandler { .. })) {
                // The library waits for the outcome of a test that nobody was asked for: it is over.
                if self.tests >= TESTS {
                    continue;
                }
                self.tests += 1;
            }
            return polled;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn connect(probing: &mut Probing, peer_id: PeerId, id: usize) {
        let endpoint = ConnectedPoint::Listener { local_addr: Multiaddr::empty(), send_back_addr: Multiaddr::empty() };
        probing.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id,
            connection_id: ConnectionId::new_unchecked(id),
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
    }

    fn at(n: usize) -> Multiaddr {
        format!("/ip4/198.51.{}.{}/tcp/4602", n / 256, n % 256).parse().unwrap()
    }

    /// Waits for the next round of tests; how many servers are asked for in it.
    async fn asked(probing: &mut Probing) -> usize {
        let mut count = 0;
        let round = std::future::poll_fn(|cx| {
            while let Poll::Ready(event) = probing.poll(cx) {
                count += usize::from(matches!(event, ToSwarm::NotifyHandler { .. }));
            }
            if count > 0 { Poll::Ready(()) } else { Poll::Pending }
        });
        tokio::time::timeout(Duration::from_secs(60), round).await.unwrap();
        count
    }

    #[tokio::test]
    async fn what_strangers_say_is_not_tested_and_what_is_tested_is_bounded_and_begins_anew() {
        let (mut probing, server) = (Probing::new(), PeerId::random());
        connect(&mut probing, server, 1);
        let id = ConnectionId::new_unchecked(1);
        probing.on_connection_handler_event(server, id, Either::Left(Said::PeerHasServerSupport));
        for n in 0..1000 {
            probing.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr: &at(n) }));
        }
        probing.test((0..1).map(at));
        assert_eq!(asked(&mut probing).await, 1);
        probing.test((0..1000).map(at));
        assert_eq!(probing.candidates.len(), CANDIDATES);
        // In another network, all of it is asked again, of those that are connected already.
        probing.begin_anew();
        assert_eq!(probing.candidates.len(), 0);
        probing.test((0..1).map(at));
        assert_eq!(asked(&mut probing).await, 1);
        // Nor do more tests go out than there may be.
        probing.tests = TESTS - 1;
        probing.test((1..5).map(at));
        assert_eq!(asked(&mut probing).await, 1);
    }
}
