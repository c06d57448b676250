//! The network task's part of being reached: it hears what the parts of the library find out, decides when to take a slot
//! at which relay, and prepares the way to peers that only a relay leads to.

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

use super::roads::{Over, Roads, State};
use super::{CircuitLimit, Members, PortMapping, Reach, ReachConfig, Reachability, RelaySlot, Tried};
use crate::address::{
    address_from_libp2p, address_to_libp2p, is_loopback, is_relayed, peer_from_libp2p, peer_to_libp2p, relay_of,
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
/// After a relay refused or failed; doubled with each time that follows, up to the maximum.
const RETRY: Duration = Duration::from_secs(10);
const RETRY_MAX: Duration = Duration::from_secs(600);
/// A connection to a relay that is missing beside the one for the slot is made again after this time.
const MEND: Duration = Duration::from_secs(60);
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

/// A relay that could be asked for a slot.
struct Offer {
    addresses: Vec<Multiaddr>,
    slot: Slot,
    not_before: Instant,
    failures: u32,
    /// When missing connections to the relay are made again.
    mend: Instant,
    trouble: Option<String>,
}

enum Slot {
    None,
    /// The connection is being made.
    Road,
    /// The relay was asked.
    Asked(ListenerId),
    Held(ListenerId, Vec<Address>),
}

/// A peer that is dialled as soon as its relays are ready for it.
struct Way {
    peer: PeerId,
    addresses: Vec<Multiaddr>,
    relays: Vec<(PeerId, Vec<Multiaddr>)>,
    until: Instant,
    /// It is connected, over a relay that was not ready: the two could not agree to dial each other.
    again: bool,
}

pub(crate) struct ReachState {
    config: ReachConfig,
    members: Members,
    /// Relays that the node was started with: its managers.
    known: HashMap<PeerId, Vec<Multiaddr>>,
    /// External addresses were configured: nothing else is claimed.
    configured: bool,
    metrics: NodeMetrics,
    told: watch::Sender<Reach>,
    roads: Roads,
    offers: BTreeMap<PeerId, Offer>,
    ways: Vec<Way>,
    tried: Vec<Tried>,
    mapping: PortMapping,
    /// When the search for a router began, until its outcome is known.
    searching_since: Option<Instant>,
    lan: HashMap<PeerId, Vec<Address>>,
    listening_since: Option<Instant>,
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
            configured: !config.external.is_empty(),
            metrics,
            told,
            roads: Roads::default(),
            offers: BTreeMap::new(),
            ways: Vec::new(),
            tried: Vec::new(),
            mapping: PortMapping::Off,
            searching_since: None,
            lan: HashMap::new(),
            listening_since: (!config.listen.is_empty()).then(Instant::now),
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
        let listening: Vec<Multiaddr> = swarm.listeners().cloned().collect();
        for address in listening {
            self.claim(swarm, &address);
        }
        self.step(swarm);
    }

    /// Where a relay is reached is what it tells those who take a slot; whoever runs one says that it can be reached.
    fn claim(&self, swarm: &mut Swarm<NodeBehaviour>, address: &Multiaddr) {
        let elsewhere = |address: &Multiaddr| {
            !is_relayed(address) && address_from_libp2p(address).is_some_and(|address| !is_loopback(&address))
        };
        if !self.config.relay.enabled || self.configured {
            return;
        }
        // On this machine alone, for those who try it out, the loopback is all there is.
        if elsewhere(address) || !swarm.listeners().any(elsewhere) {
            swarm.add_external_address(address.clone());
        }
    }

    /// When something is to be done without anything happening before.
    pub(crate) fn due(&self) -> Instant {
        let ways = self.ways.iter().map(|way| way.until);
        let listens = self.listening_since.map(|since| since + LISTENS).filter(|_| !self.ways.is_empty());
        let slots = self.offers.values().filter_map(|offer| match offer.slot {
            Slot::None => Some(offer.not_before),
            Slot::Held(..) => Some(offer.mend),
            Slot::Road | Slot::Asked(_) => None,
        });
        let router = self.searching_since.map(|since| since + ROUTER_ANSWERS);
        let now = Instant::now();
        let later = now + Duration::from_secs(3600);
        // What is due and cannot be done for want of something else waits for that.
        ways.chain(listens).chain(slots).chain(router).filter(|at| *at > now).min().unwrap_or(later)
    }

    pub(crate) fn lan_peers(&self) -> Vec<PeerAddrs> {
        let peers = self.lan.iter();
        peers.filter_map(|(peer, at)| Some(PeerAddrs::new(peer_from_libp2p(peer)?, at.clone()))).collect()
    }

    /// A peer that only relays lead to is to be dialled.
    pub(crate) fn prepare(&mut self, swarm: &mut Swarm<NodeBehaviour>, peer: PeerId, addresses: Vec<Multiaddr>) {
        if !self.config.punch || self.ways.len() >= PREPARED {
            swarm.behaviour_mut().streams.dial_relayed(peer, addresses);
            return;
        }
        self.make_way(swarm, peer, addresses, false);
    }

    /// A part of the library dialled a peer over a relay by itself. What this node offers such a peer to dial is settled with
    /// the connection; so it takes another one, over the relay when that is ready.
    fn relayed_unprepared(&mut self, swarm: &mut Swarm<NodeBehaviour>, peer: PeerId, address: &Multiaddr) {
        let Some((relay, _)) = relay_of(address) else { return };
        let known = self.ways.iter().any(|way| way.peer == peer) || self.ways.len() >= PREPARED;
        if self.config.punch && !known && !matches!(self.roads.state(&relay), State::Ready(_)) {
            self.make_way(swarm, peer, vec![address.clone()], true);
        }
    }

    fn make_way(&mut self, swarm: &mut Swarm<NodeBehaviour>, peer: PeerId, addresses: Vec<Multiaddr>, again: bool) {
        let me = *swarm.local_peer_id();
        let mut relays: Vec<(PeerId, Vec<Multiaddr>)> = Vec::new();
        for (relay, at) in addresses.iter().filter_map(relay_of).filter(|(relay, _)| *relay != me) {
            match relays.iter_mut().find(|(known, _)| *known == relay) {
                Some((_, all)) => all.push(at),
                None => relays.push((relay, vec![at])),
            }
        }
        // The peer may have named one of a relay's addresses only, and each transport counts.
        for (relay, at) in &mut relays {
            let told = swarm.behaviour_mut().streams.known_addresses(relay);
            let told = told.iter().filter_map(|address| address_to_libp2p(address, relay));
            at.extend(told.chain(self.known.get(relay).cloned().unwrap_or_default()).filter(|at| !is_relayed(at)));
            at.sort();
            at.dedup();
            at.truncate(PeerAddrs::MAX_ADDRS);
        }
        self.listen(swarm);
        self.ways.push(Way { peer, addresses, relays, until: Instant::now() + PREPARE, again });
        self.changed = true;
    }

    /// Two nodes can dial each other only if both have a port that they listen on.
    fn listen(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        if self.listening_since.is_some() {
            return;
        }
        self.listening_since = Some(Instant::now());
        for any in ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1", "/ip6/::/tcp/0", "/ip6/::/udp/0/quic-v1"] {
            let listening = any.parse().map(|any: Multiaddr| swarm.listen_on(any));
            if !matches!(listening, Ok(Ok(_))) {
                tracing::debug!(address = any, "not listening for hole punching");
            }
        }
    }

    pub(crate) fn on_event(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &SwarmEvent<NodeBehaviourEvent>) {
        self.changed = true;
        match event {
            SwarmEvent::Behaviour(NodeBehaviourEvent::Identify(event)) => self.on_identify(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::RelayClient(event)) => on_circuit(swarm, event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::Relay(event)) => self.on_relayed(event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::Dcutr(dcutr::Event { remote_peer_id, result })) => {
                let outcome = if result.is_ok() { "succeeded" } else { "failed" };
                self.metrics.hole_punches.inc([outcome]);
                tracing::debug!(peer = %remote_peer_id, ?result, "hole punching");
            }
            SwarmEvent::Behaviour(NodeBehaviourEvent::Autonat(event)) => self.on_tried(event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::DialBacks(event)) => {
                self.metrics.dial_backs.inc([if event.result.is_ok() { "answered" } else { "failed" }]);
            }
            SwarmEvent::Behaviour(NodeBehaviourEvent::Upnp(event)) => self.on_port_mapping(event),
            SwarmEvent::Behaviour(NodeBehaviourEvent::Mdns(event)) => self.on_lan(swarm, event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                if endpoint.is_relayed() {
                    self.metrics.hole_punches.inc(["tried"]);
                    if let ConnectedPoint::Dialer { address, .. } = endpoint {
                        self.relayed_unprepared(swarm, *peer_id, address);
                    }
                } else {
                    self.roads.established(peer_id, *connection_id, endpoint.get_remote_address());
                }
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, .. } => {
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
                    self.claim(swarm, address);
                }
            }
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                self.on_slot_lost(swarm, *listener_id, reason.as_ref().err().map(ToString::to_string));
            }
            SwarmEvent::ExpiredListenAddr { .. }
            | SwarmEvent::ExternalAddrConfirmed { .. }
            | SwarmEvent::ExternalAddrExpired { .. } => {}
            _ => self.changed = false,
        }
    }

    fn on_identify(&mut self, swarm: &mut Swarm<NodeBehaviour>, event: &identify::Event) {
        let identify::Event::Received { connection_id, peer_id, info } = event else { return };
        if let Some(over) = self.roads.identified(peer_id, *connection_id) {
            if over == Over::Quic {
                swarm.behaviour_mut().seen.at(info.observed_addr.clone());
            }
            // The translation lets others in for as long as it sees this connection.
            let kept = self.offers.get(peer_id).is_some_and(|offer| !matches!(offer.slot, Slot::None));
            swarm.behaviour_mut().streams.keep(*peer_id, *connection_id, kept);
        }
        if !self.config.reserve || !info.protocols.contains(&relay::HOP_PROTOCOL_NAME) {
            return;
        }
        let mut addresses = self.known.get(peer_id).cloned().unwrap_or_default();
        addresses.extend(info.listen_addrs.iter().filter(|address| !is_relayed(address)).cloned());
        addresses.sort();
        addresses.dedup();
        addresses.truncate(PeerAddrs::MAX_ADDRS);
        if let Some(offer) = self.offers.get_mut(peer_id) {
            offer.addresses = addresses;
        } else if self.offers.len() < OFFERS || (self.is_vouched(peer_id) && self.make_room()) {
            let not_before = Instant::now() + GRACE;
            let offer = Offer { addresses, slot: Slot::None, not_before, failures: 0, mend: not_before, trouble: None };
            self.offers.insert(*peer_id, offer);
        }
    }

    fn is_vouched(&self, relay: &PeerId) -> bool {
        self.known.contains_key(relay) || self.members.contains(relay)
    }

    /// Anybody can say that it is a relay; only those that are vouched for are ever asked.
    fn make_room(&mut self) -> bool {
        let idle = |offer: &Offer| matches!(offer.slot, Slot::None);
        let useless = self.offers.iter().find(|(relay, offer)| idle(offer) && !self.is_vouched(relay));
        let Some(useless) = useless.map(|(relay, _)| *relay) else { return false };
        self.offers.remove(&useless).is_some()
    }

    fn on_relayed(&self, event: &relay::Event) {
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

    fn on_tried(&mut self, event: &autonat::Event) {
        let Some(address) = address_from_libp2p(&event.tested_addr) else { return };
        let why_not = event.result.as_ref().err().map(ToString::to_string);
        tracing::debug!(%address, ?why_not, server = %event.server, "a peer tried to get through");
        self.tried.retain(|tried| tried.address != address);
        if self.tried.len() >= TRIED {
            self.tried.remove(0);
        }
        self.tried.push(Tried { address, why_not, at: Instant::now() });
    }

    fn on_port_mapping(&mut self, event: &upnp::Event) {
        self.searching_since = None;
        self.mapping = match event {
            upnp::Event::NewExternalAddr { external_addr, .. } => {
                let mut addresses = self.forwarded();
                addresses.extend(address_from_libp2p(external_addr));
                tracing::info!(address = %external_addr, "the router forwards a port");
                PortMapping::Mapped(addresses)
            }
            upnp::Event::ExpiredExternalAddr { external_addr, .. } => {
                let mut addresses = self.forwarded();
                let gone = address_from_libp2p(external_addr);
                addresses.retain(|address| Some(address) != gone.as_ref());
                tracing::warn!(address = %external_addr, "the router forwards a port no longer");
                if addresses.is_empty() { PortMapping::Refused } else { PortMapping::Mapped(addresses) }
            }
            upnp::Event::GatewayNotFound => PortMapping::NoGateway,
            upnp::Event::NonRoutableGateway => PortMapping::NotPublic,
        };
    }

    /// The library is silent about a router that answers and refuses.
    fn judge_router(&mut self, swarm: &Swarm<NodeBehaviour>, now: Instant) {
        if self.searching_since.is_some_and(|since| now >= since + ROUTER_ANSWERS) {
            self.searching_since = None;
            let private = |address: &Multiaddr| matches!(address.iter().next(), Some(Part::Ip4(ip)) if ip.is_private());
            self.mapping = if swarm.listeners().any(private) { PortMapping::Refused } else { PortMapping::Off };
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

    /// True when the address is one at a relay.
    fn on_slot_address(&mut self, id: ListenerId, address: &Multiaddr) -> bool {
        for offer in self.offers.values_mut() {
            let held = match &offer.slot {
                Slot::Asked(asked) if *asked == id => Vec::new(),
                Slot::Held(held, addresses) if *held == id => addresses.clone(),
                _ => continue,
            };
            let ours = address_from_libp2p(address);
            let addresses: Vec<Address> = held.into_iter().chain(ours).take(ADDRESSES_PER_SLOT).collect();
            tracing::info!(?addresses, "reached through a relay");
            offer.slot = Slot::Held(id, addresses);
            (offer.failures, offer.trouble) = (0, None);
            return true;
        }
        false
    }

    fn on_slot_lost(&mut self, swarm: &mut Swarm<NodeBehaviour>, id: ListenerId, reason: Option<String>) {
        let lost = self.offers.iter_mut().find(
            |(_, offer)| matches!(&offer.slot, Slot::Asked(listener) | Slot::Held(listener, _) if *listener == id),
        );
        let Some((relay, offer)) = lost else { return };
        let reason = reason.unwrap_or_else(|| "the relay gave the slot up".to_owned());
        tracing::info!(%relay, reason, "no slot at this relay");
        offer.fail(reason);
        for connection in self.roads.connections(relay) {
            swarm.behaviour_mut().streams.keep(*relay, connection, false);
        }
    }

    /// Does what can be done by now.
    pub(crate) fn step(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        let now = Instant::now();
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

    fn dial_prepared(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        let mut ways = std::mem::take(&mut self.ways);
        let listens = self.listening_since.is_none_or(|since| now >= since + LISTENS);
        ways.retain(|way| {
            if listens {
                for (relay, addresses) in &way.relays {
                    // Those that failed stay so for this way.
                    if self.roads.state(relay) == State::None {
                        build(&mut self.roads, swarm, *relay, addresses);
                    }
                }
            }
            let done = |relay: &PeerId| matches!(self.roads.state(relay), State::Ready(_) | State::Failed(_));
            let ready = way.relays.iter().all(|(relay, _)| done(relay));
            if !ready && now < way.until {
                return true;
            }
            if !way.again {
                swarm.behaviour_mut().streams.dial_relayed(way.peer, way.addresses.clone());
                return false;
            }
            let some = way.relays.iter().any(|(relay, _)| matches!(self.roads.state(relay), State::Ready(_)));
            if some && !swarm.behaviour().streams.is_direct(&way.peer) {
                let dial =
                    DialOpts::peer_id(way.peer).condition(PeerCondition::Always).addresses(way.addresses.clone());
                if let Err(error) = swarm.dial(dial.build()) {
                    tracing::debug!(peer = %way.peer, %error, "no second connection over the relay");
                }
            }
            false
        });
        self.ways = ways;
    }

    fn keep_slots(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        if self.reachability(swarm) == Reachability::Public {
            for (relay, offer) in &mut self.offers {
                // One that was only asked for is given back when it is there: the library cannot take a question back.
                if let Slot::Held(id, _) = offer.slot {
                    tracing::info!("others get through directly: a slot at a relay is given back");
                    offer.slot = Slot::None;
                    swarm.remove_listener(id);
                    for connection in self.roads.connections(relay) {
                        swarm.behaviour_mut().streams.keep(*relay, connection, false);
                    }
                    self.changed = true;
                }
            }
            return;
        }
        let mut taken = self.offers.values().filter(|offer| !matches!(offer.slot, Slot::None)).count();
        for (relay, offer) in &mut self.offers {
            if matches!(offer.slot, Slot::None) {
                let vouched = self.known.contains_key(relay) || self.members.contains(relay);
                if taken >= SLOTS || now < offer.not_before || !vouched {
                    continue;
                }
                taken += 1;
                offer.slot = Slot::Road;
                self.changed = true;
                offer.mend = now + MEND;
                build(&mut self.roads, swarm, *relay, &offer.addresses);
                for connection in self.roads.connections(relay) {
                    swarm.behaviour_mut().streams.keep(*relay, connection, true);
                }
            }
            if matches!(offer.slot, Slot::Held(..)) && now >= offer.mend {
                offer.mend = now + MEND;
                build(&mut self.roads, swarm, *relay, &offer.addresses);
            }
            if !matches!(offer.slot, Slot::Road) {
                continue;
            }
            match self.roads.state(relay) {
                State::Ready(address) => {
                    let mut circuit = address;
                    if matches!(circuit.iter().last(), Some(Part::P2p(_))) {
                        circuit.pop();
                    }
                    match swarm.listen_on(circuit.with(Part::P2p(*relay)).with(Part::P2pCircuit)) {
                        Ok(listener) => offer.slot = Slot::Asked(listener),
                        Err(error) => offer.fail(error.to_string()),
                    }
                }
                State::Failed(reason) => offer.fail(reason),
                State::Coming => {}
                State::None => offer.fail("the connection to the relay closed".to_owned()),
            }
        }
    }

    fn reachability(&self, swarm: &Swarm<NodeBehaviour>) -> Reachability {
        if swarm.external_addresses().any(|address| !is_relayed(address)) {
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
            if addresses.is_empty() && offer.trouble.is_none() {
                return None;
            }
            Some(RelaySlot { relay: peer_from_libp2p(relay)?, addresses, trouble: offer.trouble.clone() })
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

impl Offer {
    fn fail(&mut self, reason: String) {
        let wait = RETRY.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX);
        self.failures += 1;
        self.slot = Slot::None;
        self.not_before = Instant::now() + wait;
        self.trouble = Some(reason);
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
