//! The front of a node: starting it, and a clonable handle whose every method is a command to the network task with
//! an answer, so that a stopped node is an error value and nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use libp2p::core::transport::TransportError;
use libp2p::swarm::SwarmEvent;
use libp2p::{Multiaddr, Swarm};
use protocol::{Address, PeerAddrs, PeerId};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

use crate::address::{address_to_libp2p, peer_to_libp2p};
use crate::config::NodeConfig;
use crate::dht::DhtState;
use crate::gossip::GossipState;
use crate::host::{Command, Host, TASK};
use crate::metrics::{Metrics, NodeMetrics};
use crate::reach::{Members, Reach, ReachState};
use crate::streams::{Accept, AcceptError, AcceptLimits, OpenError, Protocol, Stream, StreamRequest, Want};
use crate::supervisor::Supervisor;
use crate::swarm::{self, NodeBehaviour, StartError};

/// Listening either works at once or not at all; this only guards against a system that answers neither way.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);

/// A node of the network.
#[derive(Debug)]
pub struct Node;

/// The node has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this node is stopping")]
pub struct Stopped;

/// Front of a running node. Clones are handles of the same node.
#[derive(Clone, Debug)]
pub struct NodeHandle {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    peer: PeerId,
    commands: mpsc::Sender<Command>,
    opens: Arc<Semaphore>,
    max_opens: usize,
    metrics: Metrics,
    counts: NodeMetrics,
    reach: watch::Receiver<Reach>,
    newcomers: watch::Receiver<BTreeSet<PeerId>>,
}

impl Node {
    /// Starts a node under `supervisor` and returns when it listens on all its addresses. The node runs until the
    /// supervisor stops.
    ///
    /// # Errors
    /// [`StartError`] says what is wrong and what to do about it.
    pub async fn start(config: NodeConfig, supervisor: &Supervisor) -> Result<NodeHandle, StartError> {
        swarm::refuse_key_log(config.allow_key_log)?;
        let counts = NodeMetrics::register(&config.metrics);
        let members = Members::default();
        // In a box, as it is large and all who wait for a node to start would carry it.
        let mut swarm = Box::new(swarm::build(&config, &counts, &members)?);
        listen(&mut swarm, &config.listen).await?;
        for address in &config.external {
            swarm.add_external_address(parse(address)?);
        }
        let mut dht = DhtState::new(&config.limits, members.clone());
        if let Some(kad) = swarm.behaviour_mut().kad.as_mut() {
            for peer in &config.bootstrap {
                if let Err(error) = dht.add(kad, peer) {
                    tracing::warn!(peer = %peer.peer, %error, "bootstrap peer left out");
                }
            }
            // Without bootstrap peers there is nothing to look up yet.
            let _ = kad.bootstrap();
        }
        let (gossip, verdicts) = GossipState::new(&config, counts.gossip.clone());
        let (mut reach, telling) = ReachState::new(&config, members, counts.clone());
        reach.start(&mut swarm);
        let newcomers = dht.newcomers();
        let (commands, receiver) = mpsc::channel(config.limits.commands.max(1));
        let host = Host { swarm: *swarm, commands: receiver, gossip, verdicts, dht, reach, metrics: counts.clone() };
        supervisor.spawn_critical(TASK, host.run(supervisor.clone()));
        let max_opens = config.limits.pending_opens.min(Semaphore::MAX_PERMITS);
        Ok(NodeHandle {
            inner: Arc::new(Inner {
                peer: config.keypair.peer_id(),
                commands,
                opens: Arc::new(Semaphore::new(max_opens)),
                max_opens,
                metrics: config.metrics,
                counts,
                reach: telling,
                newcomers,
            }),
        })
    }
}

fn parse(address: &Address) -> Result<Multiaddr, StartError> {
    address.as_str().parse().map_err(|error: libp2p::multiaddr::Error| StartError::BadAddress {
        address: address.clone(),
        reason: error.to_string(),
    })
}

async fn listen(swarm: &mut Swarm<NodeBehaviour>, addresses: &[Address]) -> Result<(), StartError> {
    let failed = |address: &Address, source| StartError::Listen { address: address.clone(), source };
    let mut parsed = Vec::with_capacity(addresses.len());
    for address in addresses {
        let multiaddr = parse(address)?;
        swarm::refuse_used_port(&multiaddr).map_err(|error| failed(address, error))?;
        parsed.push((address, multiaddr));
    }
    let mut waiting = Vec::with_capacity(parsed.len());
    for (address, multiaddr) in parsed {
        match swarm.listen_on(multiaddr) {
            Ok(id) => waiting.push((id, address)),
            Err(TransportError::MultiaddrNotSupported(_)) => {
                return Err(StartError::BadAddress {
                    address: address.clone(),
                    reason: "listening works on /ip4 or /ip6 with /tcp/PORT or /udp/PORT/quic-v1".to_owned(),
                });
            }
            Err(TransportError::Other(error)) => return Err(failed(address, plain_io(error))),
        }
    }
    let deadline = tokio::time::sleep(LISTEN_TIMEOUT);
    tokio::pin!(deadline);
    while let Some((_, first)) = waiting.first() {
        let event = tokio::select! {
            event = swarm.select_next_some() => event,
            () = &mut deadline => return Err(failed(first, std::io::ErrorKind::TimedOut.into())),
        };
        match event {
            SwarmEvent::NewListenAddr { listener_id, .. } => waiting.retain(|(id, _)| *id != listener_id),
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                if let Some((_, address)) = waiting.iter().find(|(id, _)| *id == listener_id) {
                    let error = reason.err().unwrap_or_else(|| std::io::ErrorKind::NotConnected.into());
                    return Err(failed(address, plain_io(error)));
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The library wraps the system's error in layers that do not lead back to it; its number survives in their text.
fn plain_io(error: std::io::Error) -> std::io::Error {
    let text = error.to_string();
    let code = text.rsplit_once("(os error ").and_then(|(_, rest)| rest.split(')').next()?.parse().ok());
    code.map_or(error, std::io::Error::from_raw_os_error)
}

impl NodeHandle {
    /// The node's own peer ID.
    pub fn peer_id(&self) -> PeerId {
        self.inner.peer
    }

    /// The registry that the node counts in.
    pub fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// The addresses that the node listens on, with the ports that the system chose.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn listen_addresses(&self) -> Result<Vec<Address>, Stopped> {
        self.ask(|reply| Command::ListenAddresses { reply }).await
    }

    /// This node and the addresses that it listens on.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn peer_addrs(&self) -> Result<PeerAddrs, Stopped> {
        Ok(PeerAddrs::new(self.peer_id(), self.listen_addresses().await?))
    }

    /// How this node can be reached, as far as it knows by now.
    pub fn reach(&self) -> Reach {
        self.inner.reach.borrow().clone()
    }

    /// Is woken whenever [`NodeHandle::reach`] changes; closes when the node stops.
    pub fn reach_changes(&self) -> watch::Receiver<Reach> {
        self.inner.reach.clone()
    }

    /// Peers that were found on the local network, where [`crate::ReachConfig::lan`] is on. Anybody there could claim to
    /// be one.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn lan_peers(&self) -> Result<Vec<PeerAddrs>, Stopped> {
        self.ask(|reply| Command::LanPeers { reply }).await
    }

    /// Accepts the inbound streams of a protocol.
    ///
    /// # Errors
    /// [`AcceptError::Taken`] when somebody in this process already does.
    pub async fn accept(&self, protocol: Protocol, limits: AcceptLimits) -> Result<Accept, AcceptError> {
        self.ask(|reply| Command::Accept { protocol, limits, reply }).await.map_err(|_| AcceptError::Stopped)?
    }

    /// Opens a stream: over the best existing connection (direct before relayed, TCP before QUIC), otherwise over a
    /// new one to the given addresses and whatever else the node knows. A [`Protocol::bulk`] stream waits for a direct
    /// connection where only a relay leads to the peer. Dropping the future cancels the request.
    ///
    /// # Errors
    /// [`OpenError`]; within `timeout` in any case.
    pub async fn open(&self, target: &PeerAddrs, protocol: Protocol, timeout: Duration) -> Result<Stream, OpenError> {
        let peer = target.peer;
        let attempts = async {
            // A connection may close (idle, or lost) just as the request reaches it: that is worth one more attempt.
            match self.open_once(target, protocol).await {
                Err(OpenError::Closed { .. }) => self.open_once(target, protocol).await,
                other => other,
            }
        };
        let opened =
            tokio::time::timeout(timeout, attempts).await.unwrap_or(Err(OpenError::Timeout { peer, limit: timeout }));
        if let Err(error) = &opened {
            self.inner.counts.streams_refused.inc([protocol.as_str(), error.name()]);
        }
        opened
    }

    async fn open_once(&self, target: &PeerAddrs, protocol: Protocol) -> Result<Stream, OpenError> {
        let closed = || OpenError::Closed { peer: target.peer };
        let want = |reply, permit| Want::Stream(StreamRequest { protocol, reply, permit });
        let mut stream = self.want(target, want).await?;
        // Sends the protocol's name at once, so that a service that speaks first sees the stream.
        stream.flush().await.map_err(|_| closed())?;
        Ok(stream)
    }

    /// Makes sure that the peer is connected.
    ///
    /// # Errors
    /// [`OpenError`]; within `timeout` in any case.
    pub async fn connect(&self, target: &PeerAddrs, timeout: Duration) -> Result<(), OpenError> {
        let peer = target.peer;
        let want = self.want(target, |reply, permit| Want::Connection { reply, _permit: permit });
        tokio::time::timeout(timeout, want).await.unwrap_or(Err(OpenError::Timeout { peer, limit: timeout }))
    }

    async fn want<T>(
        &self,
        target: &PeerAddrs,
        make: impl FnOnce(oneshot::Sender<Result<T, OpenError>>, tokio::sync::OwnedSemaphorePermit) -> Want,
    ) -> Result<T, OpenError> {
        if target.peer == self.inner.peer {
            return Err(OpenError::Myself);
        }
        let Some(peer) = peer_to_libp2p(&target.peer) else {
            return Err(OpenError::Dial { peer: target.peer, reason: "its ID is not a valid Ed25519 key".to_owned() });
        };
        let permit = Arc::clone(&self.inner.opens)
            .try_acquire_owned()
            .map_err(|_| OpenError::Busy { limit: self.inner.max_opens })?;
        let known = target.addrs.iter().take(PeerAddrs::MAX_ADDRS);
        let addresses = known.filter_map(|address| address_to_libp2p(address, &peer)).collect();
        let (reply, answer) = oneshot::channel();
        let command = Command::Want { peer, addresses, want: make(reply, permit) };
        self.inner.commands.send(command).await.map_err(|_| OpenError::Stopped)?;
        match answer.await {
            Ok(result) => result,
            Err(_) if self.inner.commands.is_closed() => Err(OpenError::Stopped),
            Err(_) => Err(OpenError::Closed { peer: target.peer }),
        }
    }

    /// Whether the peer is connected.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn is_connected(&self, peer: PeerId) -> Result<bool, Stopped> {
        match peer_to_libp2p(&peer) {
            Some(peer) => self.ask(|reply| Command::IsConnected { peer, reply }).await,
            None => Ok(false),
        }
    }

    /// The connected peers.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn connected_peers(&self) -> Result<Vec<PeerId>, Stopped> {
        self.ask(|reply| Command::ConnectedPeers { reply }).await
    }

    /// Closes all connections with the peer, and with them their streams.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn disconnect(&self, peer: PeerId) -> Result<(), Stopped> {
        match peer_to_libp2p(&peer) {
            Some(peer) => self.ask(|reply| Command::Disconnect { peer, reply }).await,
            None => Ok(()),
        }
    }

    /// Addresses at which the peer was reached or says that it can be.
    ///
    /// # Errors
    /// [`Stopped`].
    pub async fn known_addresses(&self, peer: PeerId) -> Result<PeerAddrs, Stopped> {
        let addresses = match peer_to_libp2p(&peer) {
            Some(peer) => self.ask(|reply| Command::KnownAddresses { peer, reply }).await?,
            None => Vec::new(),
        };
        Ok(PeerAddrs::new(peer, addresses))
    }

    /// That connections of strangers found no room here in the last minutes, for people to read: how many, and why.
    pub fn turned_away(&self) -> Option<String> {
        self.inner.counts.turned_away.text(Instant::now())
    }

    pub(crate) fn commands(&self) -> &mpsc::Sender<Command> {
        &self.inner.commands
    }

    pub(crate) fn newcomers(&self) -> &watch::Receiver<BTreeSet<PeerId>> {
        &self.inner.newcomers
    }

    pub(crate) fn counts(&self) -> &NodeMetrics {
        &self.inner.counts
    }

    pub(crate) async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Stopped> {
        let (reply, answer) = oneshot::channel();
        self.inner.commands.send(command(reply)).await.map_err(|_| Stopped)?;
        answer.await.map_err(|_| Stopped)
    }
}
