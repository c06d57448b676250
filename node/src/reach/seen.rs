//! Where a relay sees this node's listening ports. Identify guesses that a port seen from outside is the one listened on,
//! which a router that chooses ports itself makes untrue. A QUIC connection to a relay is known to leave from the port
//! listened on, so that its address is passed on as it was seen, to those parts of the library that offer it to peers. (A
//! TCP connection leaves from another port where the old one is still in use, and nobody says so.)

use std::collections::VecDeque;
use std::convert::Infallible;
use std::task::{Context, Poll};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    dummy,
};
use libp2p::{Multiaddr, PeerId};

/// Addresses that wait to be passed on; the next ones are seen again with the next connection.
const WAITING: usize = 16;

/// Passes addresses on.
#[derive(Debug, Default)]
pub(crate) struct Seen(VecDeque<Multiaddr>);

impl Seen {
    pub(super) fn at(&mut self, address: Multiaddr) {
        if self.0.len() < WAITING {
            self.0.push_back(address);
        }
    }
}

impl NetworkBehaviour for Seen {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, _: FromSwarm<'_>) {}

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        // The swarm polls again after each event and each command.
        match self.0.pop_front() {
            Some(address) => Poll::Ready(ToSwarm::NewExternalAddrCandidate(address)),
            None => Poll::Pending,
        }
    }
}
