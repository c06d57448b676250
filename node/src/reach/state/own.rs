//! The node's own addresses: what trusted peers see is passed on to those parts that test it and offer it, and what somebody
//! got through to is believed as long as nothing speaks against it. The library would believe it for ever.

use std::net::IpAddr;

use libp2p::swarm::ConnectionId;

use super::*;
use crate::address::is_public;

/// What is observed is looked at so often, since a peer may say something else all the time.
const LOOKS: Duration = Duration::from_secs(1);

impl ReachState {
    /// A peer says where it sees this node.
    pub(super) fn observe(
        &mut self,
        swarm: &mut Swarm<NodeBehaviour>,
        from: (PeerId, ConnectionId),
        seen: &Multiaddr,
        road: Option<Over>,
    ) {
        if road.is_none() && !self.is_vouched(&from.0) {
            return;
        }
        self.observed.saw(from, seen, road == Some(Over::Quic), swarm.listeners());
        if road.is_some() {
            // Whoever waits for the relay is dialled over it at once, and told what is known by then.
            self.pass_on(swarm);
        } else {
            self.observing.get_or_insert_with(|| Instant::now() + LOOKS);
        }
    }

    /// A connection is closed.
    pub(super) fn unobserved(&mut self, id: ConnectionId) {
        if self.observed.closed(id) {
            self.observing.get_or_insert_with(|| Instant::now() + LOOKS);
        }
    }

    pub(super) fn pass_on(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        self.observing = None;
        let listening: Vec<IpAddr> = direct(swarm.listeners()).collect();
        // Where the machine has the address itself, that it leaves by another one says nothing.
        let is_manager = |peer: &PeerId| self.known.contains_key(peer);
        let left = |ip: &IpAddr| is_public(ip) && !listening.contains(ip) && self.observed.moved_from(*ip, is_manager);
        // Those that are told no longer, too: they would be tested again each hour for ever.
        let left: Vec<IpAddr> = self.confirmed.all().filter_map(ip_of).filter(left).collect();
        self.forget(swarm, |address| ip_of(address).is_some_and(|ip| left.contains(&ip)));
        let candidates = self.observed.candidates();
        let known = |address: &Multiaddr| swarm.external_addresses().any(|external| external == address);
        let unknown: Vec<Multiaddr> = candidates.iter().filter(|address| !known(address)).cloned().collect();
        if let Some(probing) = swarm.behaviour_mut().autonat.as_mut() {
            probing.test(unknown.into_iter(), self.confirmed.is_any_reached());
            probing.doubt(self.confirmed.in_doubt(Instant::now()));
        }
        if let Some(punching) = swarm.behaviour_mut().dcutr.as_mut() {
            punching.offer(candidates);
        }
    }

    /// Somebody got through to this address.
    pub(super) fn confirm(&mut self, swarm: &mut Swarm<NodeBehaviour>, address: &Multiaddr) {
        if is_relayed(address) || self.configured.contains(address) {
            return;
        }
        if let Some(other) = self.confirmed.reached(address, Instant::now()) {
            self.take_back(swarm, &other);
        }
    }

    /// A router says that it forwards this one: others are told, and somebody is to try it.
    pub(super) fn is_forwarded(&mut self, swarm: &mut Swarm<NodeBehaviour>, address: &Multiaddr) {
        swarm.add_external_address(address.clone());
        if let Some(other) = self.confirmed.forwarded(address) {
            self.take_back(swarm, &other);
        }
        self.observing.get_or_insert_with(|| Instant::now() + LOOKS);
    }

    /// Somebody tried an address.
    pub(super) fn tested(
        &mut self,
        swarm: &mut Swarm<NodeBehaviour>,
        tested: &Multiaddr,
        by: PeerId,
        why_not: Option<String>,
    ) {
        let (Some(address), now) = (address_from_libp2p(tested), Instant::now()) else { return };
        tracing::debug!(%address, ?why_not, server = %by, "a peer tried to get through");
        let failed = why_not.is_some();
        self.tried.retain(|tried| tried.address != address);
        if self.tried.len() >= TRIED {
            self.tried.remove(0);
        }
        self.tried.push(Tried { address, why_not, at: now });
        if failed && self.confirmed.not_reached(tested, by, now) && !self.claimed.contains(tested) {
            tracing::info!(address = %tested, "others do not get through to this address any more");
            swarm.remove_external_address(tested);
        }
        if !self.confirmed.in_doubt(now).is_empty() {
            self.observing.get_or_insert(now + LOOKS);
        }
    }

    /// Nothing listens at this address any more. What is known of others by way of it goes, too.
    pub(super) fn deaf(&mut self, swarm: &mut Swarm<NodeBehaviour>, address: &Multiaddr) {
        let Some(gone) = ip_of(address).filter(|_| !is_relayed(address)) else { return };
        let routed = |ip: &IpAddr| match ip {
            IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
            IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
        };
        let alone = !direct(swarm.listeners()).any(|ip| ip.is_ipv4() == gone.is_ipv4() && routed(&ip));
        let is_gone = |ip: IpAddr| ip == gone || (alone && ip.is_ipv4() == gone.is_ipv4());
        self.forget(swarm, |at| ip_of(at).is_some_and(is_gone));
        self.claim(swarm);
        // What is seen may lead here by way of another one.
        self.observing.get_or_insert_with(|| Instant::now() + LOOKS);
    }

    /// Where a relay is reached is what it tells those who take a slot; whoever runs one says that it can be reached.
    pub(super) fn claim(&mut self, swarm: &mut Swarm<NodeBehaviour>) {
        if !self.config.relay.enabled || !self.configured.is_empty() {
            return;
        }
        let claimed = to_claim(swarm.listeners());
        for address in claimed.iter().filter(|address| !self.claimed.contains(address)) {
            swarm.add_external_address(address.clone());
        }
        let before = std::mem::replace(&mut self.claimed, claimed);
        for address in before {
            if !self.claimed.contains(&address) && !self.confirmed.tells(&address) {
                swarm.remove_external_address(&address);
            }
        }
    }

    pub(super) fn forget(&mut self, swarm: &mut Swarm<NodeBehaviour>, is_gone: impl Fn(&Multiaddr) -> bool) {
        let gone = self.confirmed.forget(is_gone);
        if gone.is_empty() {
            return;
        }
        for address in &gone {
            tracing::info!(%address, "this node is no longer at an address that others got through to");
            self.take_back(swarm, address);
        }
        // What was not reached before may be now, and the other way round.
        if let Some(probing) = swarm.behaviour_mut().autonat.as_mut() {
            probing.begin_anew();
        }
        self.changed = true;
    }

    fn take_back(&mut self, swarm: &mut Swarm<NodeBehaviour>, address: &Multiaddr) {
        swarm.remove_external_address(address);
        let ours = address_from_libp2p(address);
        self.tried.retain(|tried| Some(&tried.address) != ours.as_ref());
    }
}

/// How far an address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Leads {
    ToThisMachine,
    ToItsNetwork,
    Anywhere,
}

impl Leads {
    fn of(address: &Multiaddr) -> Self {
        match ip_of(address) {
            Some(ip) if ip.is_loopback() => Leads::ToThisMachine,
            Some(ip) if !is_public(&ip) => Leads::ToItsNetwork,
            _ => Leads::Anywhere,
        }
    }
}

/// Of each family those that lead the farthest: a bridge for containers leads nobody here, and only so many addresses are
/// passed on. For those who try it out on this machine alone, the loopback is all there is.
fn to_claim<'a>(listening: impl Iterator<Item = &'a Multiaddr>) -> Vec<Multiaddr> {
    let all: Vec<(Leads, bool, &Multiaddr)> = listening
        .filter(|address| !is_relayed(address))
        .map(|address| (Leads::of(address), ip_of(address).is_some_and(|ip| ip.is_ipv4()), address))
        .collect();
    let farthest = |of: &dyn Fn(bool) -> bool| all.iter().filter(|(_, v4, _)| of(*v4)).map(|(leads, ..)| *leads).max();
    let apart = farthest(&|_| true) > Some(Leads::ToThisMachine);
    let told = all.iter().filter(|(leads, v4, _)| {
        Some(*leads) == farthest(&|family| family == *v4) && (*leads > Leads::ToThisMachine || !apart)
    });
    told.map(|(.., address)| (*address).clone()).collect()
}

/// Where a relay is dialled: at what is known of it, then where it says it is, first what leads the farthest, and last the
/// range that container networks are made in. A machine with many of them names more than there is room for.
pub(super) fn useful_first(
    known: impl Iterator<Item = Multiaddr>,
    says: impl Iterator<Item = Multiaddr>,
) -> Vec<Multiaddr> {
    let mut says: Vec<Multiaddr> = says.collect();
    let for_containers = |at: &Multiaddr| match ip_of(at) {
        Some(IpAddr::V4(ip)) => matches!(ip.octets(), [172, 16..=31, ..]),
        _ => false,
    };
    says.sort_by_key(|at| (std::cmp::Reverse(Leads::of(at)), for_containers(at)));
    let mut all: Vec<Multiaddr> = Vec::new();
    for address in known.chain(says).filter(|address| !is_relayed(address)) {
        if all.len() < PeerAddrs::MAX_ADDRS && !all.contains(&address) {
            all.push(address);
        }
    }
    all
}

/// The addresses of a slot, with another one: those that lead anywhere first, since no more than so many are told.
pub(super) fn with_slot_address(mut held: Vec<Address>, address: &Multiaddr) -> Vec<Address> {
    held.extend(address_from_libp2p(address).filter(|new| !held.contains(new)));
    let leads = |address: &Address| address.as_str().parse().map_or(Leads::ToThisMachine, |at| Leads::of(&at));
    held.sort_by_key(|address| std::cmp::Reverse(leads(address)));
    held.truncate(ADDRESSES_PER_SLOT);
    held
}

/// The addresses of a slot by what its relay says of itself now, if none of a family that it was given with leads there from
/// anywhere any more: a relay that was just started knows those of its local network only, and that it has an IPv6 address
/// long before where its router lets others in. A name leads there in both.
pub(super) fn slot_as_of_now(held: &[Address], relay: PeerId, says: &[Multiaddr]) -> Option<Vec<Address>> {
    struct At {
        family: Option<bool>,
        far: bool,
        circuit: Multiaddr,
    }
    let at = |at: &Multiaddr| {
        let (family, far) = (ip_of(at).map(|ip| ip.is_ipv4()), Leads::of(at) == Leads::Anywhere);
        let mut circuit = at.clone();
        if matches!(circuit.iter().last(), Some(Part::P2p(_))) {
            circuit.pop();
        }
        At { family, far, circuit: circuit.with(Part::P2p(relay)).with(Part::P2pCircuit) }
    };
    let is_held = |at: &At| address_from_libp2p(&at.circuit).is_some_and(|at| held.contains(&at));
    let (mut stay, mut new): (Vec<At>, Vec<At>) = says.iter().filter(|at| !is_relayed(at)).map(at).partition(is_held);
    let covers = |stays: &At, new: &At| {
        stays.far && (stays.family.is_none() || new.family.is_none() || stays.family == new.family)
    };
    new.retain(|new| new.far && !stay.iter().any(|stays| covers(stays, new)));
    if new.is_empty() {
        return None;
    }
    // Both families have room.
    stay.retain(|stays| new.iter().all(|new| new.family != stays.family));
    stay.sort_by_key(|stays| !stays.far);
    stay.truncate(ADDRESSES_PER_SLOT / 2);
    Some(stay.iter().chain(&new).map(|at| &at.circuit).fold(Vec::new(), with_slot_address))
}

fn direct<'a>(addresses: impl Iterator<Item = &'a Multiaddr>) -> impl Iterator<Item = IpAddr> {
    addresses.filter(|address| !is_relayed(address)).filter_map(ip_of)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
pub(super) mod tests {
    use super::*;
    use crate::config::NodeConfig;
    use crate::metrics::Metrics;

    pub(in crate::reach::state) struct Own {
        pub(in crate::reach::state) swarm: Swarm<NodeBehaviour>,
        pub(in crate::reach::state) state: ReachState,
        members: Members,
        next: usize,
    }

    impl Own {
        pub(in crate::reach::state) fn new() -> Self {
            let mut config = NodeConfig::new(protocol::Keypair::from_seed(&[77; 32]));
            config.reach.reserve = true;
            config.reach.punch = true;
            let (metrics, members) = (NodeMetrics::register(&Metrics::default()), Members::default());
            let swarm = crate::swarm::build(&config, &metrics, &members).unwrap();
            let (state, _) = ReachState::new(&config, members.clone(), metrics);
            Own { swarm, state, members, next: 0 }
        }

        /// As the library does it.
        fn confirmed(&mut self, address: &str) {
            let address: Multiaddr = address.parse().unwrap();
            self.swarm.add_external_address(address.clone());
            self.state.on_event(&mut self.swarm, &SwarmEvent::ExternalAddrConfirmed { address: address.clone() });
            let address = address_from_libp2p(&address).unwrap();
            self.state.tried.push(Tried { address, why_not: None, at: Instant::now() });
        }

        fn seen_at(&mut self, address: &str) {
            let peer = PeerId::random();
            self.members.insert(peer);
            self.next += 1;
            let from = (peer, ConnectionId::new_unchecked(self.next));
            self.state.observe(&mut self.swarm, from, &address.parse().unwrap(), None);
            self.state.pass_on(&mut self.swarm);
        }

        fn external(&self) -> Vec<String> {
            let mut all: Vec<String> = self.swarm.external_addresses().map(ToString::to_string).collect();
            all.sort();
            all
        }
    }

    #[test]
    fn a_relay_tells_those_of_its_addresses_that_lead_the_farthest() {
        let claims = |listening: &[&str]| -> Vec<String> {
            let listening: Vec<Multiaddr> = listening.iter().map(|text| text.parse().unwrap()).collect();
            to_claim(listening.iter()).iter().map(ToString::to_string).collect()
        };
        let (home, docker, lan) = ("/ip4/127.0.0.1/tcp/1", "/ip4/172.17.0.1/tcp/1", "/ip4/192.168.1.5/tcp/1");
        let (public, v6, local6) = ("/ip4/203.0.113.7/tcp/1", "/ip6/2001:db8::7/tcp/1", "/ip6/fd00::7/tcp/1");
        assert_eq!(claims(&[home, docker, public, lan, "/ip6/::1/tcp/1"]), [public]);
        assert_eq!(claims(&[home, docker, lan, v6, local6]), [docker, lan, v6]);
        assert_eq!(claims(&[home, "/ip6/::1/tcp/1"]), [home, "/ip6/::1/tcp/1"]);
        assert!(claims(&[]).is_empty());
    }

    #[test]
    fn a_relay_on_a_machine_with_many_networks_is_dialled_where_it_is_reached() {
        let at = |text: &str| -> Multiaddr { text.parse().unwrap() };
        let on = |ip: &str| [at(&format!("/ip4/{ip}/tcp/1")), at(&format!("/ip4/{ip}/udp/1/quic-v1"))];
        let mut says = on("127.0.0.1").to_vec();
        says.extend((17..=24).flat_map(|n| on(&format!("172.{n}.0.1"))));
        let circuit = at(&format!("/ip4/203.0.113.9/tcp/1/p2p/{}/p2p-circuit", PeerId::random()));
        let (lan, public, v6) = (on("192.168.1.10"), on("203.0.113.7"), at("/ip6/2001:db8::7/tcp/1"));
        says.extend([circuit, v6.clone()].into_iter().chain(lan.clone()).chain(public.clone()));
        let name = at("/dns4/relay.example.org/tcp/1");
        let dialled = useful_first([name.clone(), public[0].clone()].into_iter(), says.into_iter());
        let first = [name, public[0].clone(), v6, public[1].clone(), lan[0].clone(), lan[1].clone()];
        assert!(dialled.starts_with(&first), "{dialled:?}");
        assert_eq!(dialled.len(), PeerAddrs::MAX_ADDRS);
        assert_eq!(dialled.get(first.len()), on("172.17.0.1").first());
    }

    #[test]
    fn a_slot_is_told_by_the_addresses_of_its_relay_that_lead_anywhere() {
        let relay = PeerId::random();
        let by = |ip: &str| format!("/ip4/{ip}/tcp/1/p2p/{relay}/p2p-circuit");
        let mut held = Vec::new();
        for ip in ["172.18.0.1", "172.19.0.1", "172.20.0.1", "172.17.0.1", "172.18.0.1", "203.0.113.7"] {
            held = with_slot_address(held, &by(ip).parse().unwrap());
        }
        let told: Vec<&str> = held.iter().map(Address::as_str).collect();
        assert_eq!(told, [by("203.0.113.7"), by("172.18.0.1"), by("172.19.0.1"), by("172.20.0.1")]);
    }

    #[tokio::test]
    async fn where_others_see_it_elsewhere_an_address_is_no_longer_its_own() {
        let mut own = Own::new();
        own.confirmed("/ip4/198.51.100.7/tcp/4602");
        own.confirmed("/ip6/2001:db8::7/tcp/4602");
        own.confirmed("/ip4/192.168.1.5/tcp/4602");
        own.seen_at("/ip4/203.0.113.9/tcp/50001");
        assert_eq!(own.external().len(), 3, "one may say what it likes");
        own.seen_at("/ip4/203.0.113.9/tcp/50002");
        assert_eq!(own.external(), ["/ip4/192.168.1.5/tcp/4602", "/ip6/2001:db8::7/tcp/4602"]);
        assert_eq!(own.state.tried.len(), 2);
        assert_eq!(own.state.reachability(&own.swarm), Reachability::Public);
        for address in ["/ip6/2001:db8::7/tcp/4602", "/ip4/192.168.1.5/tcp/4602"] {
            let gone =
                SwarmEvent::ExpiredListenAddr { listener_id: ListenerId::next(), address: address.parse().unwrap() };
            own.state.on_event(&mut own.swarm, &gone);
        }
        assert!(own.external().is_empty() && own.state.tried.is_empty());
        assert_eq!(own.state.reachability(&own.swarm), Reachability::Unknown);
    }

    #[tokio::test]
    async fn an_address_behind_a_router_goes_with_the_last_one_that_leads_there() {
        let mut own = Own::new();
        own.confirmed("/ip4/198.51.100.7/tcp/4602");
        let address = "/ip4/192.168.1.5/tcp/4602".parse().unwrap();
        let gone = SwarmEvent::ExpiredListenAddr { listener_id: ListenerId::next(), address };
        own.state.on_event(&mut own.swarm, &gone);
        assert!(own.external().is_empty());
    }

    #[tokio::test]
    async fn a_port_at_the_router_goes_when_the_router_says_so() {
        let mut own = Own::new();
        let (tcp, quic) = ("/ip4/198.51.100.7/tcp/4602", "/ip4/198.51.100.7/udp/4602/quic-v1");
        let parsed = |mapped: &str| ("/ip4/192.168.1.5/tcp/1".parse().unwrap(), mapped.parse().unwrap());
        for mapped in [tcp, quic] {
            let (local_addr, external_addr) = parsed(mapped);
            own.state.on_port_mapping(&mut own.swarm, &upnp::Event::NewExternalAddr { local_addr, external_addr });
        }
        own.confirmed("/ip6/2001:db8::7/tcp/4700");
        assert_eq!(own.external().len(), 3);
        for (gone, left) in [(tcp, vec![quic]), (quic, Vec::new())] {
            let (local_addr, external_addr) = parsed(gone);
            own.state.on_port_mapping(&mut own.swarm, &upnp::Event::ExpiredExternalAddr { local_addr, external_addr });
            let forwarded = own.state.forwarded();
            assert_eq!(forwarded.iter().map(Address::as_str).collect::<Vec<_>>(), left);
            assert_eq!(own.external().len(), 1 + left.len());
        }
        assert_eq!(own.external(), ["/ip6/2001:db8::7/tcp/4700"]);
        assert_eq!(own.state.mapping, PortMapping::Refused);
        // Nothing is left that it could forward to.
        own.state.judge_router(&own.swarm, Instant::now() + ROUTER_ANSWERS);
        assert_eq!(own.state.mapping, PortMapping::Off);
    }

    #[tokio::test]
    async fn an_address_that_others_do_not_get_through_to_any_more_is_told_no_longer() {
        let mut own = Own::new();
        let (tcp, quic) = ("/ip4/198.51.100.7/tcp/4602", "/ip4/198.51.100.7/udp/4602/quic-v1");
        own.confirmed(tcp);
        own.confirmed(quic);
        let fails = |own: &mut Own, address: &str| {
            let (address, why_not) = (address.parse().unwrap(), Some("no connection".to_owned()));
            own.state.tested(&mut own.swarm, &address, PeerId::random(), why_not);
        };
        fails(&mut own, tcp);
        assert_eq!(own.external(), [tcp, quic], "one may be wrong");
        assert!(own.state.observing.is_some(), "another one is asked at once");
        fails(&mut own, tcp);
        assert_eq!(own.external(), [quic]);
        assert_eq!(own.state.reachability(&own.swarm), Reachability::Public);
        fails(&mut own, quic);
        fails(&mut own, quic);
        assert!(own.external().is_empty());
        assert_eq!(own.state.reachability(&own.swarm), Reachability::Private);
        assert_eq!(own.state.tried.iter().filter(|tried| tried.why_not.is_some()).count(), 2, "it is known why");
        own.confirmed(tcp);
        assert_eq!(own.external(), [tcp]);
        assert_eq!(own.state.reachability(&own.swarm), Reachability::Public);
    }

    #[tokio::test]
    async fn an_address_that_is_told_no_longer_goes_with_the_place_as_well() {
        let mut own = Own::new();
        let told_no_longer = "/ip4/198.51.100.7/tcp/4602";
        own.confirmed(told_no_longer);
        for _ in 0..2 {
            let (address, why_not) = (told_no_longer.parse().unwrap(), Some("no connection".to_owned()));
            own.state.tested(&mut own.swarm, &address, PeerId::random(), why_not);
        }
        assert!(own.external().is_empty() && own.state.confirmed.all().count() == 1 && own.state.tried.len() == 1);
        for port in 1..=2 {
            own.seen_at(&format!("/ip4/203.0.113.9/tcp/{port}"));
        }
        assert!(own.state.confirmed.all().next().is_none() && own.state.tried.is_empty());
    }

    #[tokio::test]
    async fn of_many_addresses_the_newest_are_believed() {
        let mut own = Own::new();
        for n in 0..100 {
            own.confirmed(&format!("/ip4/198.51.100.{n}/tcp/4602"));
        }
        assert_eq!(own.external().len(), 8);
        assert!(own.external().contains(&"/ip4/198.51.100.99/tcp/4602".to_owned()));
    }

    #[tokio::test]
    async fn what_becomes_due_while_something_else_is_done_is_done_next() {
        let mut own = Own::new();
        own.state.step(&mut own.swarm);
        let soon = own.state.stepped + Duration::from_nanos(1);
        own.state.observing = Some(soon);
        while Instant::now() <= soon {}
        assert_eq!(own.state.due(), soon);
        own.state.step(&mut own.swarm);
        assert!(own.state.observing.is_none() && own.state.due() > own.state.stepped);
    }

    #[tokio::test]
    async fn strangers_are_not_listened_to() {
        let mut own = Own::new();
        for n in 0..100 {
            let from = (PeerId::random(), ConnectionId::new_unchecked(n));
            own.state.observe(&mut own.swarm, from, &"/ip4/203.0.113.9/tcp/4602".parse().unwrap(), None);
        }
        assert!(own.state.observed.candidates().is_empty() && own.state.observing.is_none());
    }
}
