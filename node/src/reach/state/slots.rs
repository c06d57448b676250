//! Slots at relays: which relay is asked for one, and when, and when one is given back.

use super::*;

/// A relay that could be asked for a slot.
pub(super) struct Offer {
    pub(super) addresses: Vec<Multiaddr>,
    pub(super) slot: Slot,
    pub(super) not_before: Instant,
    pub(super) failures: u32,
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
    /// Not needed any more, and told to nobody. It goes with the connections to the relay, as soon as nothing runs over them.
    Leaving(ListenerId, Vec<Address>),
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
            let held = match &offer.slot {
                Slot::Asked(asked) if *asked == id => Vec::new(),
                Slot::Held(held, addresses) if *held == id => addresses.clone(),
                _ => continue,
            };
            let addresses = own::with_slot_address(held, address);
            tracing::info!(?addresses, "reached through a relay");
            offer.slot = Slot::Held(id, addresses);
            (offer.failures, offer.trouble) = (0, None);
            return true;
        }
        false
    }

    pub(super) fn on_slot_lost(&mut self, swarm: &mut Swarm<NodeBehaviour>, id: ListenerId, reason: Option<String>) {
        let lost = self.offers.iter_mut().find(|(_, offer)| {
            let (Slot::Asked(listener) | Slot::Held(listener, _) | Slot::Leaving(listener, _)) = &offer.slot else {
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
        for connection in self.roads.connections(relay) {
            swarm.behaviour_mut().streams.keep(*relay, connection, false);
        }
    }

    pub(super) fn keep_slots(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        if self.reachability(swarm) == Reachability::Public {
            self.give_back(swarm, now);
            return;
        }
        for offer in self.offers.values_mut() {
            if let Slot::Leaving(id, addresses) = &mut offer.slot {
                offer.slot = Slot::Held(*id, std::mem::take(addresses));
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
}

impl ReachState {
    /// Others get through directly. One that was only asked for is given back when it is there: the library cannot take a
    /// question back. Nor can it close a slot while it is being renewed, which a relay may draw out as it likes; the end of
    /// the connection ends all of it, and the relay has its place back.
    fn give_back(&mut self, swarm: &mut Swarm<NodeBehaviour>, now: Instant) {
        for (relay, offer) in &mut self.offers {
            if let Slot::Held(id, addresses) = &mut offer.slot {
                tracing::info!(%relay, "others get through directly: a slot at a relay is given back");
                offer.slot = Slot::Leaving(*id, std::mem::take(addresses));
                // The relay may be testing the node's other addresses, and the library never asks again what is cut off.
                offer.mend = now + TESTED;
                for connection in self.roads.connections(relay) {
                    swarm.behaviour_mut().streams.keep(*relay, connection, false);
                }
                self.changed = true;
            }
            if matches!(offer.slot, Slot::Leaving(..)) && now >= offer.mend {
                offer.mend = now + LEAVES;
                if swarm.behaviour().streams.is_idle(relay) {
                    // One that is not connected has no slot any more.
                    let _ = swarm.disconnect_peer_id(*relay);
                }
            }
        }
    }
}

impl Offer {
    pub(super) fn fail(&mut self, reason: String) {
        let wait = RETRY.saturating_mul(1 << self.failures.min(10)).min(RETRY_MAX);
        self.failures += 1;
        self.slot = Slot::None;
        self.not_before = Instant::now() + wait;
        self.trouble = Some(reason);
    }
}
