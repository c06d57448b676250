//! Dials peers that ask whether others get through to them. The library's server dials whatever address it is asked for,
//! which would make every such node a port scanner of its own local network, at anybody's service. This one dials only
//! where the asking peer is connected from, and not too often.

use std::collections::HashMap;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, DialFailure};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, DialError, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};
use libp2p_autonat::v2::server;

use crate::address::{ip_of, is_quic, is_relayed};

/// Dials at once; further ones are not made, and the peer asks another.
const AT_ONCE: usize = 16;
/// Dials for one peer in [`PERIOD`]: a node has a handful of addresses, and asks once about each.
const PER_PEER: u32 = 16;
const PERIOD: Duration = Duration::from_secs(60);
/// A dial that leads nowhere for so long is answered as one. Most routers drop what they do not forward, and the dial goes on
/// for ten seconds, after which nobody waits for an answer any more: the peer would never hear that nobody gets through.
const PATIENCE: Duration = Duration::from_secs(5);

/// A dial that is not made.
#[derive(Debug, thiserror::Error)]
#[error("not dialled: {0}")]
struct NotDialled(&'static str);

pub(crate) struct DialBacks {
    inner: server::Behaviour,
    // Bounded by the connection limits.
    connected: HashMap<PeerId, Asker>,
    // As many as the peers that are connected may ask for.
    probes: HashMap<ConnectionId, Probe>,
    /// Until the next one has been waited for long enough.
    wait: Option<Pin<Box<tokio::time::Sleep>>>,
    /// A connection over QUIC came about here: where none ever did, packets may be dropped on this side.
    has_quic: bool,
}

/// A dial for a peer that asked.
struct Probe {
    peer: Option<PeerId>,
    /// When it is answered as leading nowhere; `None` once it was, or where it never is.
    until: Option<Instant>,
}

struct Asker {
    from: Vec<(ConnectionId, IpAddr)>,
    dials: u32,
    since: Instant,
}

impl DialBacks {
    pub(crate) fn new() -> Self {
        Self {
            inner: server::Behaviour::default(),
            connected: HashMap::new(),
            probes: HashMap::new(),
            wait: None,
            has_quic: false,
        }
    }

    /// The library's answer to a dial that was not made would be that nobody gets through, for which the peer never asks
    /// again. That this node is not able to say makes it ask another.
    fn say_nothing(&mut self, id: ConnectionId, peer: PeerId) {
        let (address, port) = (Multiaddr::empty(), PortUse::New);
        // With the handler of the connection that is not there goes the question.
        drop(self.inner.handle_established_outbound_connection(id, peer, &address, Endpoint::Dialer, port));
    }

    /// Answers those that lead nowhere; true when there was one. What becomes of the dial after that is told to nobody.
    fn answer_silent(&mut self, now: Instant) -> bool {
        let over = |probe: &Probe| probe.until.is_some_and(|until| until <= now);
        let Some((id, probe)) = self.probes.iter_mut().find(|(_, probe)| over(probe)) else { return false };
        probe.until = None;
        let failure = DialFailure { peer_id: probe.peer, error: &DialError::Aborted, connection_id: *id };
        self.inner.on_swarm_event(FromSwarm::DialFailure(failure));
        true
    }

    fn wait_for_silent(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(next) = self.probes.values().filter_map(|probe| probe.until).min() else {
            self.wait = None;
            return Poll::Pending;
        };
        let wait = self.wait.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(next.into())));
        if wait.deadline() != next.into() {
            wait.as_mut().reset(next.into());
        }
        wait.as_mut().poll(cx)
    }

    fn may_dial(&mut self, peer: Option<&PeerId>, addresses: &[Multiaddr]) -> Result<(), NotDialled> {
        let asker = peer.and_then(|peer| self.connected.get_mut(peer)).ok_or(NotDialled("the peer has gone"))?;
        let from_there = |address: &Multiaddr| {
            !is_relayed(address) && ip_of(address).is_some_and(|ip| asker.from.iter().any(|(_, from)| *from == ip))
        };
        if !addresses.iter().all(from_there) {
            return Err(NotDialled("the peer is not connected from there"));
        }
        if self.probes.len() > AT_ONCE {
            return Err(NotDialled("too many are being dialled"));
        }
        if asker.since.elapsed() >= PERIOD {
            (asker.since, asker.dials) = (Instant::now(), 0);
        }
        asker.dials += 1;
        if asker.dials > PER_PEER {
            return Err(NotDialled("the peer asks too often"));
        }
        Ok(())
    }
}

impl NetworkBehaviour for DialBacks {
    type ConnectionHandler = <server::Behaviour as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = server::Event;

    fn handle_pending_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: Option<PeerId>,
        addresses: &[Multiaddr],
        role: Endpoint,
    ) -> Result<Vec<Multiaddr>, ConnectionDenied> {
        if let Some(probe) = self.probes.get_mut(&id) {
            let shows = self.has_quic || !addresses.iter().any(is_quic);
            probe.until = shows.then(|| Instant::now() + PATIENCE);
            self.may_dial(peer.as_ref(), addresses).map_err(ConnectionDenied::new)?;
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
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                self.probes.remove(connection_id);
                // Where a peer dialled from is what it is told, and what it asks about; through a relay it is the relay's.
                let remote = endpoint.get_remote_address();
                self.has_quic |= !endpoint.is_relayed() && is_quic(remote);
                if let (false, Some(ip)) = (endpoint.is_relayed(), ip_of(remote)) {
                    let new = || Asker { from: Vec::new(), dials: 0, since: Instant::now() };
                    self.connected.entry(*peer_id).or_insert_with(new).from.push((*connection_id, ip));
                }
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { peer_id, connection_id, .. }) => {
                if let Some(asker) = self.connected.get_mut(peer_id) {
                    asker.from.retain(|(id, _)| id != connection_id);
                    if asker.from.is_empty() {
                        self.connected.remove(peer_id);
                    }
                }
            }
            FromSwarm::DialFailure(DialFailure { peer_id, connection_id, error }) => {
                if self.probes.remove(connection_id).is_some()
                    && let (DialError::Denied { .. }, Some(peer)) = (error, peer_id)
                {
                    self.say_nothing(*connection_id, *peer);
                }
            }
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
            let probe = Probe { peer: opts.get_peer_id(), until: None };
            self.probes.insert(opts.connection_id(), probe);
        }
        if polled.is_pending() {
            // The answers go by themselves: nothing comes of them here.
            while self.wait_for_silent(cx).is_ready() {
                if !self.answer_silent(tokio::time::Instant::now().into_std()) {
                    break;
                }
            }
        }
        polled
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dial_that_leads_nowhere_is_answered_while_the_peer_still_waits() {
        let mut server = DialBacks::new();
        let (peer, from) = (PeerId::random(), "198.51.100.7".parse().unwrap());
        let (tcp, quic) = ("/ip4/198.51.100.7/tcp/1", "/ip4/198.51.100.7/udp/1/quic-v1");
        let asker = Asker { from: vec![(ConnectionId::new_unchecked(1), from)], dials: 0, since: Instant::now() };
        server.connected.insert(peer, asker);
        let dial = |server: &mut DialBacks, n, at: &str| {
            let (id, at) = (ConnectionId::new_unchecked(n), at.parse().unwrap());
            server.probes.insert(id, Probe { peer: Some(peer), until: None });
            drop(server.handle_pending_outbound_connection(id, Some(peer), &[at], Endpoint::Dialer).unwrap());
            server.probes.get(&id).unwrap().until.is_some()
        };
        // Nothing ever came over QUIC: it may be dropped on this side.
        assert!(!dial(&mut server, 2, quic));
        let before = Instant::now();
        assert!(dial(&mut server, 3, tcp));
        let probe = server.probes.get_mut(&ConnectionId::new_unchecked(3)).unwrap();
        // Whoever asked waits for ten seconds, from before it had sent what is asked for a test.
        assert!(probe.until.unwrap().duration_since(before) < Duration::from_secs(8));
        probe.until = Some(before + Duration::from_millis(20));
        std::future::poll_fn(|cx| server.wait_for_silent(cx)).await;
        let now = tokio::time::Instant::now().into_std();
        assert!(server.answer_silent(now) && !server.answer_silent(now), "once");
        // It counts among those under way until it is.
        assert_eq!(server.probes.len(), 2);
        assert!(futures::poll!(std::future::poll_fn(|cx| server.wait_for_silent(cx))).is_pending());
        server.has_quic = true;
        assert!(dial(&mut server, 4, quic));
    }

    #[test]
    fn only_where_the_peer_comes_from_and_not_too_often() {
        let mut server = DialBacks::new();
        let (peer, at) = (PeerId::random(), |text: &str| vec![text.parse::<Multiaddr>().unwrap()]);
        let from: IpAddr = "198.51.100.7".parse().unwrap();
        assert!(server.may_dial(Some(&peer), &at("/ip4/198.51.100.7/tcp/1")).is_err());
        let id = ConnectionId::new_unchecked(1);
        server.connected.insert(peer, Asker { from: vec![(id, from)], dials: 0, since: Instant::now() });
        assert!(server.may_dial(Some(&peer), &at("/ip4/198.51.100.7/tcp/1")).is_ok());
        assert!(server.may_dial(Some(&peer), &at("/ip4/192.168.1.1/tcp/80")).is_err());
        assert!(server.may_dial(Some(&peer), &at("/dns4/localhost/tcp/80")).is_err());
        let circuit = format!("/ip4/198.51.100.7/tcp/1/p2p/{}/p2p-circuit", PeerId::random());
        assert!(server.may_dial(Some(&peer), &at(&circuit)).is_err());
        for _ in 1..PER_PEER {
            assert!(server.may_dial(Some(&peer), &at("/ip4/198.51.100.7/tcp/1")).is_ok());
        }
        assert!(server.may_dial(Some(&peer), &at("/ip4/198.51.100.7/tcp/1")).is_err());
    }
}
