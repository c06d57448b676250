//! Slots at relays: which relay is asked for one, and when, and when one is given back.

use super::*;

/// A relay that could be asked for a slot.
pub(super) struct Offer {
    pub(super) addresses: Vec<Multiaddr>,
    pub(super) slot: Slot,
    pub(super) not_before: Instant,
    /// Slots that were refused or lost, one after the other.
    pub(super) failures: u32,
    /// Before that it is not asked again, as it was asked in vain: also where it was away meanwhile.
    pub(super) refused_until: Instant,
    /// Tries since then that did not even reach the relay.
    pub(super) unreached: u32,
    /// When missing connections to the relay are made again.
    pub(super) mend: Instant,
    pub(super) trouble: Option<String>,
}

pub(super) enum Slot {
    None,
    /// The connection is being made.
    Road,
    /// The relay was asked.
    Asked(ListenerId),
    Held(ListenerId, Vec<Address>),
    /// Not needed any more, and told to nobody. It goes with the connections to the relay, as soon as nothing runs over
    /// them; what the relay may still find out is waited for until the time given.
    Leaving(ListenerId, Vec<Address>, Instant),
}

impl ReachState {
    /// Anybody can say that it is a relay; only those that are vouched for are ever asked.
    pub(super) fn make_room(&mut self) -> bool {
        let idle = |offer: &Offer| matches!(offer.slot, Slot::None);
        let useless = self.offers.iter().find(|(relay, offer)| idle(offer) && !self.is_vouched(relay));
        let Some(useless) = useless.map(|(relay, _)| *relay) else { return false };
        self.offers.remove(&useless).is_some()
    }

    /// True when the address is one at a relay.
    pub(super) fn on_slot_address(&mut self, id: ListenerId, address: &Multiaddr) -> bool {
        for offer in self.offers.values_mut() {
            match &mut offer.slot {
                Slot::Asked(asked) if *asked == id => {
                    offer.slot = Slot::Held(id, own::with_slot_address(Vec::new(), address));
                }
                Slot::Held(held, addresses) | Slot::Leaving(held, addresses, _) if *held == id => {
                    *addresses = own::with_slot_address(std::mem::take(addresses), address);
                }
                _ => continue,
            }
            tracing::info!(%address, "reached through a relay");
            (offer.failures, offer.unreached, offer.trouble) = (0, 0, None);
            return true;
        }
        false
    }

    pub(super) fn on_slot_lost(&mut self, swarm: &mut Swarm<NodeBehaviour>, id: ListenerId, reason: Option<String>) {
        let lost = self.offers.iter_mut().find(|(_, offer)| {
            let (Slot::Asked(listener) | Slot::Held(listener, _) | Slot::Leaving(listener, ..)) = &offer.slot else {
                return false;
            };
            *listener == id
        });
        let Some((relay, offer)) = lost else { return };
        if matches!(offer.slot, Slot::Leaving(..)) {
            offer.slot = Slot::None;
            return;
        }
        let reason = reason.unwrap_or_else(|| "the relay gave the slot up".to_owned());
        tracing::info!(%relay, reason, "no slot at this relay");
        offer.fail(reason);
        keep(&self.roads, swarm, relay, false);
    }

    pub(super) fn keep_slots(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        if self.reachability(swarm) == Reachability::Public {
            self.give_back(swarm, now);
            return;
        }
        for (relay, offer) in &mut self.offers {
            if let Slot::Leaving(id, addresses, _) = &mut offer.slot {
                offer.slot = Slot::Held(*id, std::mem::take(addresses));
                keep(&self.roads, swarm, relay, true);
                self.changed = true;
            }
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
                keep(&self.roads, swarm, relay, true);
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
                State::Failed(reason) => offer.not_reached(reason),
                State::Coming => {}
                State::None => offer.not_reached("the connection to the relay closed".to_owned()),
            }
        }
    }
}

impl ReachState {
    /// Others get through directly. One that was asked for is given back when it is there: the library cannot take a
    /// question back. Nor can it close a slot while it is being renewed, which a relay may draw out as it likes; the end of
    /// the connection ends all of it, and the relay has its place back.
    fn give_back(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        for (relay, offer) in &mut self.offers {
            if matches!(offer.slot, Slot::Road) {
                offer.slot = Slot::None;
                keep(&self.roads, swarm, relay, false);
            }
            if let Slot::Held(id, addresses) = &mut offer.slot {
                tracing::info!(%relay, "others get through directly: a slot at a relay is given back");
                offer.slot = Slot::Leaving(*id, std::mem::take(addresses), now + HOPES);
                offer.mend = now;
                keep(&self.roads, swarm, relay, false);
                self.changed = true;
            }
            if let Slot::Leaving(.., until) = offer.slot
                && now >= offer.mend
            {
                offer.mend = now + LEAVES;
                // The relay may be the only one that tests this node's other addresses.
                let probing = swarm.behaviour().autonat.as_ref();
                let hopes = now < until && probing.is_some_and(|probing| probing.hopes_for(relay));
                if !hopes && swarm.behaviour().streams.is_idle(relay) {
                    // One that is not connected has no slot any more.
                    let _ = swarm.disconnect_peer_id(*relay);
                }
            }
        }
    }
}

impl Offer {
    /// One at a relay that nobody has asked yet.
    pub(super) fn new(addresses: Vec<Multiaddr>, now: Instant) -> Self {
        let at = now + GRACE;
        Offer {
            addresses,
            slot: Slot::None,
            not_before: at,
            failures: 0,
            refused_until: at,
            unreached: 0,
            mend: at,
            trouble: None,
        }
    }

    /// The relay was asked in vain, or took the slot back.
    pub(super) fn fail(&mut self, reason: String) {
        self.refused_until = Instant::now() + pause(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.unreached = 0;
        self.wait(self.refused_until, reason);
    }

    /// There was no way to the relay.
    pub(super) fn not_reached(&mut self, reason: String) {
        let until = Instant::now() + pause(self.failures.saturating_add(self.unreached));
        self.unreached = self.unreached.saturating_add(1);
        self.wait(until, reason);
    }

    fn wait(&mut self, until: Instant, reason: String) {
        self.slot = Slot::None;
        self.not_before = until;
        self.trouble = Some(reason);
    }

    /// The relay is there again: how long it was away is no reason to wait. One that was just started may not know its members
    /// yet, and is asked again soon. Whatever it refused itself counts as before, so that one that refuses is asked no more
    /// often for connecting anew.
    pub(super) fn is_back(&mut self, now: Instant) {
        if matches!(self.slot, Slot::None) && self.unreached > 0 {
            self.unreached = 0;
            self.not_before = self.not_before.min(self.refused_until.max(now + GRACE));
        }
    }
}

fn pause(failures: u32) -> Duration {
    RETRY.saturating_mul(1 << failures.min(10)).min(RETRY_MAX)
}

/// Has the connections to a relay stay without streams, or no longer.
fn keep(roads: &Roads, swarm: &mut Swarm<NodeBehaviour>, relay: &PeerId, kept: bool) {
    for connection in roads.connections(relay) {
        swarm.behaviour_mut().streams.keep(*relay, connection, kept);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use std::task::{Context, Poll, Waker};

    use libp2p::core::Endpoint;
    use libp2p::core::transport::PortUse;
    use libp2p::swarm::behaviour::ConnectionEstablished;
    use libp2p::swarm::{FromSwarm, NetworkBehaviour, ToSwarm};

    use super::*;
    use crate::reach::state::own::tests::Own;
    use crate::streams::ToConnection;

    /// What the streams tell their connections next: to stay, or not.
    fn kept(swarm: &mut Swarm<NodeBehaviour>) -> Option<bool> {
        match swarm.behaviour_mut().streams.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(ToSwarm::NotifyHandler { event: ToConnection::Keep(keep), .. }) => Some(keep),
            _ => None,
        }
    }

    fn held(now: Instant, addresses: Vec<Address>) -> Offer {
        let slot = Slot::Held(ListenerId::next(), addresses);
        Offer { slot, not_before: now, mend: now + MEND, ..Offer::new(Vec::new(), now) }
    }

    #[tokio::test]
    async fn a_slot_is_told_by_where_its_relay_is_reached_now() {
        let Own { mut swarm, mut state, .. } = Own::new();
        let public_key = libp2p::identity::Keypair::generate_ed25519().public();
        let relay = public_key.to_peer_id();
        let by = |at: &str| format!("{at}/p2p/{relay}/p2p-circuit");
        let (lan, first, second) = ("/ip4/192.168.1.5/tcp/1", "/ip4/203.0.113.7/tcp/1", "/ip4/198.51.100.9/tcp/1");
        let (v6, named) = ("/ip6/2001:db8::7/tcp/1", "/dns4/relay.example.org/tcp/1");
        let many: Vec<String> = (1..7).map(|port| format!("/ip4/203.0.113.7/tcp/{port}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let given = [Address::new(&by(lan)).unwrap()];
        state.offers.insert(relay, held(Instant::now(), given.to_vec()));
        for (says, told) in [
            (vec![lan, "/ip4/127.0.0.1/tcp/1"], vec![lan]),
            (vec![lan, first], vec![first]),
            (vec![second, first], vec![first]),
            (vec![lan], vec![first]),
            (vec![lan, second], vec![second]),
            // Those who have addresses of one family only come by that one.
            (vec![lan, second, v6], vec![second, v6]),
            (vec![second, first, v6], vec![second, v6]),
            (many.clone(), many[..4].to_vec()),
            ([&many[..], &[v6]].concat(), vec![many[0], many[1], v6]),
            (vec![lan, named], vec![named]),
            (vec![first, named], vec![named]),
            (vec![lan, v6], vec![v6]),
            (vec![lan, first], vec![first]),
        ] {
            let info = identify::Info {
                public_key: public_key.clone(),
                protocol_version: String::new(),
                agent_version: String::new(),
                listen_addrs: says.iter().map(|at| at.parse().unwrap()).collect(),
                protocols: vec![relay::HOP_PROTOCOL_NAME],
                observed_addr: Multiaddr::empty(),
                signed_peer_record: None,
            };
            let connection_id = libp2p::swarm::ConnectionId::new_unchecked(1);
            let leaving = |slot: &mut Slot| match slot {
                Slot::Held(id, told) => *slot = Slot::Leaving(*id, std::mem::take(told), Instant::now()),
                Slot::Leaving(id, told, _) => *slot = Slot::Held(*id, std::mem::take(told)),
                _ => {}
            };
            // One that is given back is told again where it is needed again.
            state.offers.get_mut(&relay).map(|offer| leaving(&mut offer.slot)).unwrap();
            state.on_identify(&mut swarm, &identify::Event::Received { connection_id, peer_id: relay, info });
            assert_eq!(told_by(&state, &relay), told.iter().map(|at| by(at)).collect::<Vec<_>>(), "{says:?}");
        }
    }

    fn told_by(state: &ReachState, relay: &PeerId) -> Vec<String> {
        let (Slot::Held(_, told) | Slot::Leaving(_, told, _)) = &state.offers[relay].slot else { panic!("no slot") };
        told.iter().map(|address| address.as_str().to_owned()).collect()
    }

    #[tokio::test]
    async fn a_slot_that_is_needed_again_before_it_is_gone_keeps_its_connections_again() {
        let Own { mut swarm, mut state, .. } = Own::new();
        let relay = peer_to_libp2p(&protocol::Keypair::from_seed(&[78; 32]).peer_id()).unwrap();
        let address: Multiaddr = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let connection_id = state.roads.build(relay, std::slice::from_ref(&address))[0].connection_id();
        state.roads.established(&relay, connection_id, &address);
        let endpoint = ConnectedPoint::Dialer { address, role_override: Endpoint::Dialer, port_use: PortUse::Reuse };
        swarm.behaviour_mut().streams.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id: relay,
            connection_id,
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
        let now = Instant::now();
        state.offers.insert(relay, held(now, Vec::new()));
        state.keep_slots(&mut swarm, now);
        assert_eq!(kept(&mut swarm), None);
        let direct: Multiaddr = "/ip4/198.51.100.7/tcp/4602".parse().unwrap();
        swarm.add_external_address(direct.clone());
        state.keep_slots(&mut swarm, now);
        assert!(matches!(state.offers[&relay].slot, Slot::Leaving(..)));
        assert_eq!(kept(&mut swarm), Some(false));
        swarm.remove_external_address(&direct);
        state.keep_slots(&mut swarm, now);
        assert!(matches!(state.offers[&relay].slot, Slot::Held(..)));
        assert_eq!(kept(&mut swarm), Some(true));
        // One that was not even asked for is not asked for any more.
        state.offers.get_mut(&relay).unwrap().slot = Slot::Road;
        swarm.add_external_address(direct);
        state.keep_slots(&mut swarm, now);
        assert!(matches!(state.offers[&relay].slot, Slot::None));
        assert_eq!(kept(&mut swarm), Some(false));
    }

    #[tokio::test]
    async fn what_a_relay_says_of_itself_while_its_slot_is_given_back_is_told_with_it_again() {
        let Own { mut state, .. } = Own::new();
        let (relay, now) = (PeerId::random(), Instant::now());
        let by = |at: &str| -> Multiaddr { format!("{at}/p2p/{relay}/p2p-circuit").parse().unwrap() };
        let id = ListenerId::next();
        let offer = Offer { slot: Slot::Asked(id), ..held(now, Vec::new()) };
        state.offers.insert(relay, offer);
        let (lan, first) = (by("/ip4/192.168.1.5/tcp/1"), by("/ip4/203.0.113.7/tcp/1"));
        assert!(state.on_slot_address(id, &lan));
        let Slot::Held(_, told) = &state.offers[&relay].slot else { panic!("no slot") };
        state.offers.get_mut(&relay).unwrap().slot = Slot::Leaving(id, told.clone(), now);
        assert!(state.on_slot_address(id, &first) && matches!(state.offers[&relay].slot, Slot::Leaving(..)));
        assert_eq!(told_by(&state, &relay), [first.to_string(), lan.to_string()]);
    }

    #[tokio::test]
    async fn a_slot_is_kept_until_somebody_gets_through_where_the_router_says_it_forwards() {
        let Own { mut swarm, mut state, .. } = Own::new();
        let (relay, now) = (PeerId::random(), Instant::now());
        state.offers.insert(relay, held(now, Vec::new()));
        let external_addr: Multiaddr = "/ip4/198.51.100.7/tcp/4602".parse().unwrap();
        let local_addr = "/ip4/192.168.1.5/tcp/4602".parse().unwrap();
        let forwards = upnp::Event::NewExternalAddr { local_addr, external_addr: external_addr.clone() };
        state.on_port_mapping(&mut swarm, &forwards);
        assert!(swarm.external_addresses().eq([&external_addr]), "others are told");
        assert_eq!(state.reachability(&swarm), Reachability::Unknown);
        state.keep_slots(&mut swarm, now);
        assert!(matches!(state.offers[&relay].slot, Slot::Held(..)));
        for _ in 0..2 {
            let why_not = Some("no connection".to_owned());
            state.tested(&mut swarm, &external_addr, PeerId::random(), why_not);
        }
        assert_eq!(state.reachability(&swarm), Reachability::Private);
        assert_eq!(swarm.external_addresses().count(), 0);
        state.keep_slots(&mut swarm, now);
        assert!(matches!(state.offers[&relay].slot, Slot::Held(..)));
        swarm.add_external_address(external_addr.clone());
        state.on_event(&mut swarm, &SwarmEvent::ExternalAddrConfirmed { address: external_addr });
        assert_eq!(state.reachability(&swarm), Reachability::Public);
        state.keep_slots(&mut swarm, now);
        assert!(matches!(state.offers[&relay].slot, Slot::Leaving(..)));
    }

    fn connected(state: &mut ReachState, swarm: &mut Swarm<NodeBehaviour>, peer_id: PeerId, already: u32) {
        let address = "/ip4/192.0.2.1/tcp/1".parse().unwrap();
        let endpoint = ConnectedPoint::Dialer { address, role_override: Endpoint::Dialer, port_use: PortUse::New };
        let event = SwarmEvent::ConnectionEstablished {
            peer_id,
            connection_id: libp2p::swarm::ConnectionId::new_unchecked(1),
            endpoint,
            num_established: std::num::NonZeroU32::MIN.saturating_add(already),
            concurrent_dial_errors: None,
            established_in: Duration::ZERO,
        };
        state.on_event(swarm, &event);
    }

    #[tokio::test]
    async fn a_relay_that_was_away_for_long_is_asked_soon_after_it_is_back() {
        let Own { mut swarm, mut state, .. } = Own::new();
        let (relay, now) = (PeerId::random(), Instant::now());
        let mut offer = held(now, Vec::new());
        // It goes, and is away.
        offer.fail("closed".to_owned());
        for _ in 0..20 {
            offer.not_reached("no connection".to_owned());
        }
        assert!(offer.not_before > now + RETRY_MAX / 2);
        state.offers.insert(relay, offer);
        connected(&mut state, &mut swarm, relay, 1);
        assert!(state.offers[&relay].not_before > now + RETRY_MAX / 2, "it was there all the time");
        connected(&mut state, &mut swarm, relay, 0);
        let offer = state.offers.get_mut(&relay).unwrap();
        assert!(offer.not_before < Instant::now() + RETRY + GRACE);
        // It does not know its members yet: the pauses begin anew.
        offer.fail("refused".to_owned());
        assert!(offer.not_before < Instant::now() + RETRY.saturating_mul(3));
    }

    #[tokio::test]
    async fn that_no_slot_is_to_be_had_is_told_for_as_long_as_one_is_needed() {
        let Own { mut swarm, mut state, .. } = Own::new();
        let relay = peer_to_libp2p(&protocol::Keypair::from_seed(&[78; 32]).peer_id()).unwrap();
        let now = Instant::now();
        let id = ListenerId::next();
        state.offers.insert(relay, Offer { slot: Slot::Asked(id), ..held(now, Vec::new()) });
        let direct: Multiaddr = "/ip4/198.51.100.7/tcp/4602".parse().unwrap();
        swarm.add_external_address(direct.clone());
        state.keep_slots(&mut swarm, now);
        state.on_slot_lost(&mut swarm, id, Some("refused".to_owned()));
        state.tell(&swarm);
        assert!(state.told.borrow().slots.is_empty());
        swarm.remove_external_address(&direct);
        state.tell(&swarm);
        assert_eq!(state.told.borrow().slots[0].trouble.as_deref(), Some("refused"));
    }

    #[tokio::test]
    async fn a_relay_that_refuses_is_asked_no_more_often_for_connecting_anew() {
        let Own { mut swarm, mut state, .. } = Own::new();
        let (relay, now) = (PeerId::random(), Instant::now());
        let mut offer = held(now, Vec::new());
        for _ in 0..20 {
            offer.fail("refused".to_owned());
        }
        let not_before = offer.not_before;
        assert!(not_before >= now + RETRY_MAX);
        state.offers.insert(relay, offer);
        connected(&mut state, &mut swarm, relay, 0);
        assert_eq!(state.offers[&relay].not_before, not_before);
        // Nor for being away in between.
        state.offers.get_mut(&relay).unwrap().not_reached("no connection".to_owned());
        connected(&mut state, &mut swarm, relay, 0);
        let offer = state.offers.get_mut(&relay).unwrap();
        assert_eq!(offer.not_before, not_before);
        offer.fail("refused".to_owned());
        assert!(offer.not_before >= now + RETRY_MAX);
    }
}
