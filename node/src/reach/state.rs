//! The network task's part of being reached: it hears what the parts of the library find out, decides when to take a slot
//! at which relay, and prepares the way to peers that only a relay leads to.

mod confirmed;
mod own;
mod slots;
mod ways;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use libp2p::core::ConnectedPoint;
use libp2p::core::transport::ListenerId;
use libp2p::multiaddr::Protocol as Part;
use libp2p::swarm::SwarmEvent;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::{Multiaddr, PeerId, Swarm, dcutr, identify, mdns, relay, upnp};
use libp2p_autonat::v2::client as autonat;
use protocol::{Address, PeerAddrs};
use tokio::sync::watch;
use tokio::time::Instant;

use self::confirmed::Confirmed;
use self::slots::{Offer, Slot};
use self::ways::Way;
use super::forwarding::is_behind_router;
use super::observed::Observed;
use super::roads::{Over, Roads, State};
use super::{CircuitLimit, Members, PortMapping, Reach, ReachConfig, Reachability, RelaySlot, Tried};
use crate::address::{
    address_from_libp2p, address_to_libp2p, ip_of, is_relayed, peer_from_libp2p, peer_to_libp2p, relay_of,
};
use crate::metrics::NodeMetrics;
use crate::swarm::{NodeBehaviour, NodeBehaviourEvent};

/// Slots held at once: a second relay takes over when the first goes.
const SLOTS: usize = 2;
/// Addresses told for each slot: a relay's TCP and QUIC address, of both families.
const ADDRESSES_PER_SLOT: usize = 4;
/// Relays known; beyond it, those that nobody vouches for make room for those that somebody does.
const OFFERS: usize = 64;
/// A node that others do get through to learns it in this time, and takes no slot.
const GRACE: Duration = Duration::from_secs(2);
/// After a relay refused or failed; doubled with each time that follows, up to the maximum. Where it was not there, until it is.
const RETRY: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// A connection to a relay that is missing beside the one for the slot is made again after this time.
const MEND: Duration = Duration::from_secs(60);
/// A slot that is given back waits so long each time for what runs over the connection.
const LEAVES: Duration = Duration::from_secs(1);
/// And at most so long for what the relay may still find out: two rounds of tests, each of which may take ten seconds.
const HOPES: Duration = Duration::from_secs(30);
/// How long the way to a peer is prepared at most; after that it is dialled as it is.
const PREPARE: Duration = Duration::from_secs(2);
/// Ways prepared at once; further peers are dialled unprepared.
const PREPARED: usize = 256;
/// A node that begins to listen does so within this time.
const LISTENS: Duration = Duration::from_millis(100);
/// A router that is there has answered in this time, and forwards ports or does not. A search that finds none ends sooner.
const ROUTER_ANSWERS: Duration = Duration::from_secs(15);
/// Addresses whose last test is remembered: a node has a handful.
const TRIED: usize = 16;
/// Peers of the local network that are remembered, and addresses of each.
const LAN_PEERS: usize = 256;
const LAN_ADDRESSES: usize = 8;

pub(crate) struct ReachState {
    config: ReachConfig,
    members: Members,
    /// Relays that the node was started with: its managers.
    known: HashMap<PeerId, Vec<Multiaddr>>,
    /// External addresses of the configuration: where there are some, nothing else is claimed.
    configured: Vec<Multiaddr>,
    metrics: NodeMetrics,
    told: watch::Sender<Reach>,
    roads: Roads,
    observed: Observed,
    /// When what was observed since is looked at.
    observing: Option<Instant>,
    /// Addresses that somebody got through to, or that a router says it forwards.
    confirmed: Confirmed,
    /// Addresses that a relay tells, of those it listens on.
    claimed: Vec<Multiaddr>,
    offers: BTreeMap<PeerId, Offer>,
    ways: Vec<Way>,
    tried: Vec<Tried>,
    mapping: PortMapping,
    /// When the search for a router began, until its outcome is known.
    searching_since: Option<Instant>,
    lan: HashMap<PeerId, Vec<Address>>,
    listening_since: Option<Instant>,
    /// When what could be done was done.
    stepped: Instant,
    changed: bool,
}

impl ReachState {
    pub(crate) fn new(
        config: &crate::NodeConfig,
        members: Members,
        metrics: NodeMetrics,
    ) -> (Self, watch::Receiver<Reach>) {
        let known = config.bootstrap.iter().filter_map(|peer| {
            let id = peer_to_libp2p(&peer.peer)?;
            let addresses = peer.addrs.iter().filter_map(|address| address_to_libp2p(address, &id));
            Some((id, addresses.filter(|address| !is_relayed(address)).collect()))
        });
        let (told, telling) = watch::channel(Reach::default());
        let state = Self {
            config: config.reach.clone(),
            members,
            known: known.collect(),
            configured: config.external.iter().filter_map(|address| address.as_str().parse().ok()).collect(),
            metrics,
            told,
            roads: Roads::default(),
            observed: Observed::default(),
            observing: None,
            confirmed: Confirmed::default(),
            claimed: Vec::new(),
            offers: BTreeMap::new(),
            ways: Vec::new(),
            tried: Vec::new(),
            mapping: PortMapping::Off,
            searching_since: None,
            lan: HashMap::new(),
            listening_since: (!config.listen.is_empty()).then(Instant::now),
            stepped: Instant::now(),
            changed: true,
        };
        (state, telling)
    }

    /// Once, when the node listens.
    pub(crate) fn start(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        if swarm.behaviour().upnp.is_enabled() {
            self.mapping = PortMapping::Searching;
            self.searching_since = Some(Instant::now());
        }
        self.claim(swarm);
        self.step(swarm);
    }

    /// When something is to be done without anything happening before.
    pub(crate) fn due(&self) -> Instant {
        let ways = self.ways.iter().map(|way| way.until);
        let listens = self.listening_since.map(|since| since + LISTENS).filter(|_| !self.ways.is_empty());
        let slots = self.offers.values().filter_map(|offer| match offer.slot {
            Slot::None => Some(offer.not_before),
            Slot::Held(..) | Slot::Leaving(..) => Some(offer.mend),
            Slot::Road | Slot::Asked(_) => None,
        });
        let router = self.searching_since.map(|since| since + ROUTER_ANSWERS);
        let later = self.stepped + Duration::from_secs(3600);
        // What was due then and could not be done for want of something else waits for that.
        ways.chain(listens)
            .chain(slots)
            .chain(router)
            .chain(self.observing)
            .filter(|at| *at > self.stepped)
            .min()
            .unwrap_or(later)
    }

    pub(crate) fn lan_peers(&self) -> Vec<PeerAddrs> {
        let peers = self.lan.iter();
        peers.filter_map(|(peer, at)| Some(PeerAddrs::new(peer_from_libp2p(peer)?, at.clone()))).collect()
    }

    pub(crate) fn on_event(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &SwarmEvent<NodeBehaviourEvent>) {
        self.changed = true;
        match event {
            SwarmEvent::Behaviour(NodeBehaviourEvent::Identify(event)) => self.on_identify(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::RelayClient(event)) => on_circuit(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::Relay(event)) => self.on_relayed(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::Dcutr(dcutr::Event { remote_peer_id, result })) => {
                let outcome = if result.is_ok() { "succeeded" } else { "failed" };
                self.metrics.hole_punches.inc([outcome]);
                tracing::debug!(peer = %remote_peer_id, ?result, "hole punching");
            }
            SwarmEvent::Behaviour(NodeBehaviourEvent::Autonat(event)) => self.on_tried(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::DialBacks(event)) => {
                self.metrics.dial_backs.inc([if event.result.is_ok() { "answered" } else { "failed" }]);
            }
            SwarmEvent::Behaviour(NodeBehaviourEvent::Upnp(event)) => self.on_port_mapping(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::Mdns(event)) => self.on_lan(swarm, event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, num_established, .. } => {
                if endpoint.is_relayed() {
                    self.metrics.hole_punches.inc(["tried"]);
                    if let ConnectedPoint::Dialer { address, .. } = endpoint {
                        self.relayed_unprepared(swarm, *peer_id, address);
                    }
                } else {
                    self.roads.established(peer_id, *connection_id, endpoint.get_remote_address());
                    if num_established.get() == 1
                        && let Some(offer) = self.offers.get_mut(peer_id)
                    {
                        offer.is_back(Instant::now());
                    }
                }
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, .. } => {
                self.unobserved(*connection_id);
                if self.roads.closed(peer_id, *connection_id)
                    && let Some(offer) = self.offers.get_mut(peer_id)
                {
                    offer.mend = Instant::now() + RETRY;
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), connection_id, error } => {
                self.roads.failed(peer, *connection_id, &error.to_string());
            }
            SwarmEvent::NewListenAddr { listener_id, address } => {
                if !self.on_slot_address(*listener_id, address) {
                    self.claim(swarm);
                }
            }
            SwarmEvent::ListenerClosed { listener_id, reason, addresses } => {
                self.on_slot_lost(swarm, *listener_id, reason.as_ref().err().map(ToString::to_string));
                addresses.iter().for_each(|address| self.deaf(swarm, address));
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => self.deaf(swarm, address),
            SwarmEvent::ExternalAddrConfirmed { address } => self.confirm(swarm, address),
            SwarmEvent::ExternalAddrExpired { address } => drop(self.confirmed.forget(|known| known == address)),
            _ => self.changed = false,
        }
    }

    fn on_identify(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &identify::Event) {
        let identify::Event::Received { connection_id, peer_id, info } = event else { return };
        if let Some(probing) = swarm.behaviour_mut().autonat.as_mut() {
            let seen = Some(&info.observed_addr).filter(|seen| !is_relayed(seen));
            probing.seen(*connection_id, seen.and_then(ip_of));
        }
        let road = self.roads.identified(peer_id, *connection_id);
        self.observe(swarm, (*peer_id, *connection_id), &info.observed_addr, road);
        if road.is_some() {
            // The translation lets others in for as long as it sees this connection.
            let slot = self.offers.get(peer_id).map(|offer| &offer.slot);
            let kept = slot.is_some_and(|slot| !matches!(slot, Slot::None | Slot::Leaving(..)));
            swarm.behaviour_mut().streams.keep(*peer_id, *connection_id, kept);
        }
        if !self.config.reserve || !info.protocols.contains(&relay::HOP_PROTOCOL_NAME) {
            return;
        }
        let known = self.known.get(peer_id).into_iter().flatten().cloned();
        let addresses = own::useful_first(known, info.listen_addrs.iter().cloned());
        if let Some(offer) = self.offers.get_mut(peer_id) {
            offer.addresses = addresses;
            if let Slot::Held(_, held) | Slot::Leaving(_, held, _) = &mut offer.slot
                && let Some(addresses) = own::slot_as_of_now(held, *peer_id, &info.listen_addrs)
            {
                tracing::info!(?addresses, "the relay is reached elsewhere now");
                *held = addresses;
            }
        } else if self.offers.len() < OFFERS || (self.is_vouched(peer_id) && self.make_room()) {
            self.offers.insert(*peer_id, Offer::new(addresses, Instant::now()));
        }
    }

    fn is_vouched(&self, relay: &PeerId) -> bool {
        self.known.contains_key(relay) || self.members.contains(relay)
    }

    fn on_relayed(&self, swarm: &mut Swarm<NodeBehaviour>, event: &relay::Event) {
        // Slots are not renewed: that one's holder is no member any more shows when it is used.
        if let relay::Event::CircuitReqAccepted { dst_peer_id, .. } = event
            && !self.members.contains(dst_peer_id)
        {
            // One that has gone meanwhile has no slot any more.
            let _ = swarm.disconnect_peer_id(*dst_peer_id);
        }
        let what = match event {
            relay::Event::ReservationReqAccepted { renewed: false, .. } => "slot-granted",
            relay::Event::ReservationReqDenied { .. } => "slot-refused",
            relay::Event::CircuitReqAccepted { .. } => "circuit-opened",
            relay::Event::CircuitReqDenied { .. } => "circuit-refused",
            relay::Event::CircuitClosed { .. } => "circuit-closed",
            _ => return,
        };
        self.metrics.relayed.inc([what]);
        tracing::debug!(?event, "relaying");
    }

    fn on_tried(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &autonat::Event) {
        let why_not = event.result.as_ref().err().map(ToString::to_string);
        self.tested(swarm, &event.tested_addr, event.server, why_not);
    }

    fn on_port_mapping(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &upnp::Event) {
        self.searching_since = None;
        self.mapping = match event {
            upnp::Event::NewExternalAddr { external_addr, .. } => {
                let mut addresses = self.forwarded();
                addresses.extend(address_from_libp2p(external_addr).filter(|new| !addresses.contains(new)));
                tracing::info!(address = %external_addr, "the router forwards a port");
                self.is_forwarded(swarm, external_addr);
                PortMapping::Mapped(addresses)
            }
            upnp::Event::ExpiredExternalAddr { external_addr, .. } => {
                let mut addresses = self.forwarded();
                let gone = address_from_libp2p(external_addr);
                addresses.retain(|address| Some(address) != gone.as_ref());
                tracing::warn!(address = %external_addr, "the router forwards a port no longer");
                self.forget(swarm, |address| address == external_addr);
                if addresses.is_empty() {
                    // There may be nothing left to forward to.
                    self.searching_since = Some(Instant::now());
                    PortMapping::Refused
                } else {
                    PortMapping::Mapped(addresses)
                }
            }
            upnp::Event::GatewayNotFound => PortMapping::NoGateway,
            upnp::Event::NonRoutableGateway => PortMapping::NotPublic,
        };
    }

    /// The library is silent about a router that answers and refuses.
    fn judge_router(&mut self, swarm: &Swarm<NodeBehaviour>, now: Instant) {
        if self.searching_since.is_some_and(|since| now >= since + ROUTER_ANSWERS) {
            self.searching_since = None;
            let asked = swarm.listeners().any(is_behind_router);
            self.mapping = if asked { PortMapping::Refused } else { PortMapping::Off };
            self.changed = true;
        }
    }

    /// Ports that the router forwards to this node, by its own addresses.
    pub(crate) fn forwarded(&self) -> Vec<Address> {
        match &self.mapping {
            PortMapping::Mapped(addresses) => addresses.clone(),
            _ => Vec::new(),
        }
    }

    fn on_lan(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &mdns::Event) {
        match event {
            mdns::Event::Discovered(found) => {
                for (peer, address) in found {
                    let Some(ours) = address_from_libp2p(address) else { continue };
                    if !self.lan.contains_key(peer) && self.lan.len() >= LAN_PEERS {
                        continue;
                    }
                    let known = self.lan.entry(*peer).or_default();
                    if known.len() < LAN_ADDRESSES && !known.contains(&ours) {
                        known.push(ours);
                        swarm.add_peer_address(*peer, address.clone());
                    }
                }
            }
            mdns::Event::Expired(gone) => {
                for (peer, address) in gone {
                    if let Some(known) = self.lan.get_mut(peer) {
                        known.retain(|ours| address_from_libp2p(address).as_ref() != Some(ours));
                        if known.is_empty() {
                            self.lan.remove(peer);
                        }
                    }
                }
            }
        }
    }

    /// Does what can be done by now.
    pub(crate) fn step(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        let now = Instant::now();
        self.stepped = now;
        if self.observing.is_some_and(|at| now >= at) {
            self.pass_on(swarm);
        }
        self.dial_prepared(swarm, now);
        if self.config.reserve {
            self.keep_slots(swarm, now);
        }
        self.judge_router(swarm, now);
        if self.ways.is_empty() {
            self.roads.forget_failed();
        }
        if std::mem::take(&mut self.changed) {
            self.tell(swarm);
        }
    }

    fn reachability(&self, swarm: &Swarm<NodeBehaviour>) -> Reachability {
        // That a router says so is no proof.
        let sure = |address: &Multiaddr| self.claimed.contains(address) || !self.confirmed.is_hearsay(address);
        if swarm.external_addresses().any(|address| !is_relayed(address) && sure(address)) {
            Reachability::Public
        } else if self.tried.iter().any(|tried| tried.why_not.is_some()) {
            Reachability::Private
        } else {
            Reachability::Unknown
        }
    }

    fn tell(&self, swarm: &Swarm<NodeBehaviour>) {
        let ours = |addresses: &mut dyn Iterator<Item = &Multiaddr>| -> Vec<Address> {
            addresses.filter(|address| !is_relayed(address)).filter_map(address_from_libp2p).collect()
        };
        let reachability = self.reachability(swarm);
        let slots = self.offers.iter().filter_map(|(relay, offer)| {
            let addresses = if let Slot::Held(_, addresses) = &offer.slot { addresses.clone() } else { Vec::new() };
            // Where none is needed none is asked for: that the last one was refused would be told for ever.
            let trouble = offer.trouble.clone().filter(|_| reachability != Reachability::Public);
            if addresses.is_empty() && trouble.is_none() {
                return None;
            }
            Some(RelaySlot { relay: peer_from_libp2p(relay)?, addresses, trouble })
        });
        let reach = Reach {
            reachability,
            external: ours(&mut swarm.external_addresses()),
            listening: ours(&mut swarm.listeners()),
            tried: self.tried.clone(),
            port_mapping: self.mapping.clone(),
            slots: slots.collect(),
            relays: self.config.relay.enabled,
        };
        self.metrics.reachability.set(match reachability {
            Reachability::Unknown => 0,
            Reachability::Private => 1,
            Reachability::Public => 2,
        });
        let held = self.offers.values().filter(|offer| matches!(offer.slot, Slot::Held(..))).count();
        self.metrics.relay_slots.set(i64::try_from(held).unwrap_or(i64::MAX));
        self.told.send_if_modified(|before| {
            let changed = *before != reach;
            *before = reach;
            changed
        });
    }
}

/// Dials a relay over each transport that no connection leads to it by.
fn build(roads: &mut Roads, swarm: &mut Swarm<NodeBehaviour>, relay: PeerId, addresses: &[Multiaddr]) {
    for dial in roads.build(relay, addresses) {
        let id = dial.connection_id();
        if let Err(error) = swarm.dial(dial) {
            roads.failed(&relay, id, &error.to_string());
        }
    }
}

/// What a relay lets through is told with each circuit.
fn on_circuit(swarm: &mut Swarm<NodeBehaviour>, event: &relay::client::Event) {
    let (peer, bytes, time) = match event {
        relay::client::Event::OutboundCircuitEstablished { relay_peer_id: peer, limit }
        | relay::client::Event::InboundCircuitEstablished { src_peer_id: peer, limit } => {
            let limit = limit.as_ref();
            (peer, limit.and_then(|limit| limit.data_in_bytes()), limit.and_then(|limit| limit.duration()))
        }
        relay::client::Event::ReservationReqAccepted { .. } => return,
    };
    // Some relays write "no limit" as a limit of nothing.
    let limit = CircuitLimit { bytes: bytes.filter(|bytes| *bytes > 0), time: time.filter(|time| !time.is_zero()) };
    swarm.behaviour_mut().streams.note_circuit(*peer, limit);
}
