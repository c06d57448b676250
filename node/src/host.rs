//! The network task: it alone owns the swarm, everybody else sends it commands. Nothing in this loop waits, computes
//! or touches a disk, because all connections of the node stand still while it does.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::connection_limits::Exceeded;
use libp2p::swarm::{ConnectionDenied, ListenError, SwarmEvent};
use libp2p::{Multiaddr, Swarm, ping};
use protocol::{Address, PeerAddrs, PeerId};
use tokio::sync::{mpsc, oneshot};

use crate::address::{address_from_libp2p, is_relayed, peer_from_libp2p};
use crate::dht::{DhtCommand, DhtState};
use crate::door::{Crowded, Full};
use crate::gossip::{GossipCommand, GossipState, Verdict};
use crate::metrics::NodeMetrics;
use crate::reach::{ReachState, give_back};
use crate::streams::{self, Accept, AcceptError, AcceptLimits, NotEd25519, PeerCrowded, Protocol, Want, root_cause};
use crate::supervisor::Supervisor;
use crate::swarm::{NodeBehaviour, NodeBehaviourEvent};

/// Name of the network task at the supervisor.
pub(crate) const TASK: &str = "network";
/// After the stop signal the network stays up this long for the other tasks to end their streams in order.
const STOP_GRACE: Duration = Duration::from_secs(2);

/// What the rest of the node asks of the network task.
pub(crate) enum Command {
    Want { peer: libp2p::PeerId, addresses: Vec<Multiaddr>, want: Want },
    Accept { protocol: Protocol, limits: AcceptLimits, reply: oneshot::Sender<Result<Accept, AcceptError>> },
    ListenAddresses { reply: oneshot::Sender<Vec<Address>> },
    ConnectedPeers { reply: oneshot::Sender<Vec<PeerId>> },
    IsConnected { peer: libp2p::PeerId, reply: oneshot::Sender<bool> },
    Disconnect { peer: libp2p::PeerId, reply: oneshot::Sender<()> },
    KnownAddresses { peer: libp2p::PeerId, reply: oneshot::Sender<Vec<Address>> },
    LanPeers { reply: oneshot::Sender<Vec<PeerAddrs>> },
    Gossip(GossipCommand),
    Dht(DhtCommand),
}

pub(crate) struct Host {
    pub(crate) swarm: Swarm<NodeBehaviour>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) gossip: GossipState,
    pub(crate) verdicts: mpsc::Receiver<Verdict>,
    pub(crate) dht: DhtState,
    pub(crate) reach: ReachState,
    pub(crate) metrics: NodeMetrics,
}

impl Host {
    pub(crate) async fn run(mut self, supervisor: Supervisor) -> Result<(), Infallible> {
        let token = supervisor.token();
        tokio::select! {
            () = self.drive() => {}
            () = token.cancelled() => {}
        }
        self.swarm.behaviour().streams.table().close();
        let ports = give_back(self.reach.forwarded());
        let others = tokio::time::timeout(STOP_GRACE, supervisor.only(TASK));
        tokio::select! {
            () = self.drive() => {}
            // That some still run when their time is over is named by the supervisor.
            _ = futures::future::join(others, ports) => {}
        }
        Ok(())
    }

    /// Serves commands and events for as long as it is polled. Cancel-safe: each step is finished when it returns.
    async fn drive(&mut self) {
        loop {
            let due = self.reach.due();
            tokio::select! {
                event = self.swarm.select_next_some() => {
                    self.reach.on_event(&mut self.swarm, &event);
                    self.on_event(event);
                    self.reach.step(&mut self.swarm);
                }
                () = tokio::time::sleep_until(due) => self.reach.step(&mut self.swarm),
                Some(command) = self.commands.recv() => self.on_command(command),
                Some(verdict) = self.verdicts.recv() => {
                    self.gossip.on_verdict(self.swarm.behaviour_mut().gossip.as_mut(), verdict);
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        // A caller who went away does not mind that an answer is lost.
        match command {
            Command::Want { peer, addresses, want } => self.swarm.behaviour_mut().streams.want(peer, addresses, want),
            Command::Accept { protocol, limits, reply } => {
                let _ = reply.send(self.swarm.behaviour_mut().streams.accept(protocol, limits));
            }
            Command::ListenAddresses { reply } => {
                let listeners = self.swarm.listeners().filter(|address| !is_relayed(address));
                let addresses = listeners.filter_map(address_from_libp2p).collect();
                let _ = reply.send(addresses);
            }
            Command::ConnectedPeers { reply } => {
                let _ = reply.send(self.swarm.connected_peers().filter_map(peer_from_libp2p).collect());
            }
            Command::IsConnected { peer, reply } => drop(reply.send(self.swarm.is_connected(&peer))),
            Command::Disconnect { peer, reply } => {
                // Not being connected is what was asked for.
                let _ = self.swarm.disconnect_peer_id(peer);
                let _ = reply.send(());
            }
            Command::KnownAddresses { peer, reply } => {
                let _ = reply.send(self.swarm.behaviour_mut().streams.known_addresses(&peer));
            }
            Command::LanPeers { reply } => drop(reply.send(self.reach.lan_peers())),
            Command::Gossip(command) => {
                self.gossip.on_command(self.swarm.behaviour_mut().gossip.as_mut(), command);
            }
            Command::Dht(command) => self.dht.on_command(self.swarm.behaviour_mut().kad.as_mut(), command),
        }
    }

    fn on_event(&mut self, event: SwarmEvent<NodeBehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(NodeBehaviourEvent::Streams(streams::Event::ViaRelays { peer, addresses })) => {
                self.reach.prepare(&mut self.swarm, peer, addresses);
            }
            SwarmEvent::Behaviour(NodeBehaviourEvent::Gossip(event)) => {
                if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
                    self.gossip.on_event(gossip, event);
                }
            }
            SwarmEvent::Behaviour(NodeBehaviourEvent::Kad(event)) => {
                if let Some(kad) = self.swarm.behaviour_mut().kad.as_mut() {
                    self.dht.on_event(kad, event);
                }
            }
            SwarmEvent::ConnectionClosed { peer_id, num_established: 0, .. } => self.dht.on_gone(&peer_id),
            // A peer whose cable was pulled says nothing; without this its streams would look alive for a quarter hour.
            SwarmEvent::Behaviour(NodeBehaviourEvent::Ping(ping::Event {
                peer,
                connection,
                result: Err(ping::Failure::Timeout),
            })) => {
                tracing::debug!(%peer, "no answer to ping: connection closed");
                self.swarm.close_connection(connection);
            }
            SwarmEvent::OutgoingConnectionError { error, .. } => {
                self.metrics.dials_failed.inc();
                tracing::debug!(%error, "dial failed");
            }
            SwarmEvent::IncomingConnectionError { error, .. } => {
                let crowded = |cause: &ConnectionDenied| cause.downcast_ref::<Crowded>().is_some();
                let quic =
                    |cause: &ConnectionDenied| matches!(cause.downcast_ref::<Crowded>(), Some(Crowded::Quic { .. }));
                let reason = match &error {
                    ListenError::Denied { cause } if quic(cause) => "limit",
                    ListenError::Denied { cause } if crowded(cause) => "limit-per-address",
                    ListenError::Denied { cause } if cause.downcast_ref::<PeerCrowded>().is_some() => "limit-per-peer",
                    ListenError::Denied { cause } if cause.downcast_ref::<Exceeded>().is_some() => "limit",
                    ListenError::Denied { cause } if cause.downcast_ref::<Full>().is_some() => "limit",
                    ListenError::Denied { cause } if cause.downcast_ref::<NotEd25519>().is_some() => "not-ed25519",
                    ListenError::Denied { .. } => "denied",
                    _ => "handshake",
                };
                self.metrics.connections_refused.inc([reason]);
                if let (ListenError::Denied { cause }, "limit-per-address" | "limit-per-peer" | "limit") =
                    (&error, reason)
                    && let Some(line) = self.metrics.turned_away.note(Instant::now(), root_cause(cause))
                {
                    tracing::warn!("{line}");
                }
                tracing::debug!(%error, reason, "inbound connection refused");
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "listener error"),
            SwarmEvent::ListenerClosed { addresses, reason: Err(error), .. } => {
                tracing::error!(?addresses, %error, "listener closed");
            }
            _ => {}
        }
    }
}

impl Drop for Host {
    // However the task ends, services that wait for streams learn of it.
    fn drop(&mut self) {
        self.swarm.behaviour().streams.table().close();
    }
}
