//! Where peers see this node come from. Anybody can say anything about that, and again and again: what strangers say is not
//! listened to, of others what they say now, over connections that are open, so that there is never more of it than there
//! are connections, and what is no longer so goes with the connection that showed it.
//!
//! The port that is seen is seldom one that is listened on: a dial mostly leaves from a port of its own. So the listening
//! port takes its place, which is right where a router forwards it. Only a QUIC connection to a relay is known to leave from
//! the port listened on: where a router chooses ports itself, others get in at the one that was seen.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use libp2p::multiaddr::Protocol as Part;
use libp2p::swarm::ConnectionId;
use libp2p::{Multiaddr, PeerId};

use super::roads::Over;
use crate::address::is_public;

/// Candidates told at once: those of TCP and QUIC in both families, and what few routers make of them.
const CANDIDATES: usize = 16;
/// Of one peer.
const PER_PEER: usize = 4;
/// So many peers see this node at another address, and four times as many as at the old one, before it is believed to have
/// moved: one that lies does not move it, nor do two among those who are right.
const MOVED: usize = 2;
const MOVED_SHARE: usize = 4;

/// What trusted peers say, by connection; the newest is last.
#[derive(Debug, Default)]
pub(super) struct Observed(BTreeMap<ConnectionId, Sight>);

#[derive(Debug)]
struct Sight {
    peer: PeerId,
    ip: IpAddr,
    candidates: Vec<Multiaddr>,
}

impl Observed {
    /// A trusted peer says where it sees the other end of a connection. `exact` where that is known to be a port that is
    /// listened on.
    pub(super) fn saw<'a>(
        &mut self,
        (peer, id): (PeerId, ConnectionId),
        seen: &Multiaddr,
        exact: bool,
        listening: impl Iterator<Item = &'a Multiaddr>,
    ) {
        let Some(place @ (ip, ..)) = place(seen) else {
            self.closed(id);
            return;
        };
        let candidates = candidates(place, exact, listening);
        self.0.insert(id, Sight { peer, ip, candidates });
    }

    /// True when something was said over it.
    pub(super) fn closed(&mut self, id: ConnectionId) -> bool {
        self.0.remove(&id).is_some()
    }

    /// Addresses at which others may get through, the likeliest first. Those of a local network only where there is nothing
    /// else: elsewhere they lead to others.
    pub(super) fn candidates(&self) -> Vec<Multiaddr> {
        let mut of_peer: BTreeMap<PeerId, BTreeSet<&Multiaddr>> = BTreeMap::new();
        let mut peers: BTreeMap<&Multiaddr, usize> = BTreeMap::new();
        let public = self.0.values().any(|sight| is_public(&sight.ip));
        for sight in self.0.values().rev().filter(|sight| is_public(&sight.ip) || !public) {
            let told = of_peer.entry(sight.peer).or_default();
            for candidate in &sight.candidates {
                if told.len() < PER_PEER && told.insert(candidate) {
                    *peers.entry(candidate).or_default() += 1;
                }
            }
        }
        let mut all: Vec<(&Multiaddr, usize)> = peers.into_iter().collect();
        all.sort_by_key(|(_, peers)| std::cmp::Reverse(*peers));
        all.into_iter().take(CANDIDATES).map(|(candidate, _)| candidate.clone()).collect()
    }

    /// Has this node moved from this public address to another one of the same family? A manager's word is enough for that
    /// where nobody says otherwise: in a small network there may be nobody else.
    pub(super) fn moved_from(&self, ip: IpAddr, is_manager: impl Fn(&PeerId) -> bool) -> bool {
        // Of each peer what it says over its newest connection: one over QUIC outlives a move, and says for ever what it
        // said at first.
        let alike = |sight: &&Sight| sight.ip.is_ipv4() == ip.is_ipv4() && is_public(&sight.ip);
        let newest: BTreeMap<PeerId, IpAddr> =
            self.0.values().filter(alike).map(|sight| (sight.peer, sight.ip)).collect();
        let here = newest.values().filter(|at| **at == ip).count();
        let elsewhere = newest.iter().filter(|(_, at)| **at != ip);
        let elsewhere: usize = elsewhere.map(|(peer, _)| if is_manager(peer) { MOVED } else { 1 }).sum();
        elsewhere >= MOVED.max(MOVED_SHARE * here)
    }
}

type Place = (IpAddr, Over, u16);

/// What an address names, if it is of the plain kind that a node listens on.
fn place(address: &Multiaddr) -> Option<Place> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Part::Ip4(ip) => IpAddr::from(ip),
        Part::Ip6(ip) => IpAddr::from(ip),
        _ => return None,
    };
    let (over, port) = match parts.next()? {
        Part::Tcp(port) => (Over::Tcp, port),
        Part::Udp(port) if matches!(parts.next()?, Part::QuicV1) => (Over::Quic, port),
        _ => return None,
    };
    matches!(parts.next(), None | Some(Part::P2p(_))).then_some(())?;
    (parts.next().is_none() && port != 0).then_some((ip, over, port))
}

fn address((ip, over, port): Place) -> Multiaddr {
    let at = Multiaddr::from(ip);
    match over {
        Over::Tcp => at.with(Part::Tcp(port)),
        Over::Quic => at.with(Part::Udp(port)).with(Part::QuicV1),
    }
}

fn candidates<'a>(
    (ip, over, port): Place,
    exact: bool,
    listening: impl Iterator<Item = &'a Multiaddr>,
) -> Vec<Multiaddr> {
    let alike = |(at, way, port): Place| (at.is_ipv4() == ip.is_ipv4() && way == over).then_some(port);
    let mut ports: BTreeSet<u16> = listening.filter_map(place).filter_map(alike).collect();
    if exact {
        ports.insert(port);
    }
    // What was seen itself is the likeliest where it may be right. That a connection left from one of the ports listened on
    // says nothing against the others: no further connection may come that does not.
    let mut ports: Vec<u16> = ports.into_iter().collect();
    ports.sort_by_key(|other| *other != port);
    ports.into_iter().take(PER_PEER).map(|port| address((ip, over, port))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn at(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn see(observed: &mut Observed, peer: PeerId, id: usize, seen: &str, exact: bool) {
        let listening = at(&["/ip4/192.168.1.5/tcp/4602", "/ip4/192.168.1.5/udp/4603/quic-v1", "/ip6/::1/tcp/4602"]);
        let id = ConnectionId::new_unchecked(id);
        observed.saw((peer, id), &seen.parse().unwrap(), exact, listening.iter());
    }

    #[test]
    fn the_listening_port_takes_the_place_of_the_one_that_was_seen() {
        let (mut observed, peer) = (Observed::default(), PeerId::random());
        see(&mut observed, peer, 1, "/ip4/198.51.100.7/tcp/50000", false);
        see(&mut observed, peer, 2, "/ip4/198.51.100.7/udp/50001/quic-v1", true);
        see(&mut observed, peer, 3, "/ip6/2001:db8::7/udp/50001/quic-v1", false);
        let relay = PeerId::random();
        see(&mut observed, peer, 4, &format!("/ip4/198.51.100.7/tcp/1/p2p/{relay}/p2p-circuit"), true);
        see(&mut observed, peer, 5, "/dns4/example.org/tcp/4602", true);
        let expected =
            ["/ip4/198.51.100.7/tcp/4602", "/ip4/198.51.100.7/udp/4603/quic-v1", "/ip4/198.51.100.7/udp/50001/quic-v1"];
        let sorted = |mut all: Vec<Multiaddr>| {
            all.sort();
            all
        };
        assert_eq!(sorted(observed.candidates()), sorted(at(&expected)));
        for id in 1..=5 {
            observed.closed(ConnectionId::new_unchecked(id));
        }
        assert!(observed.candidates().is_empty() && observed.0.is_empty());
    }

    #[test]
    fn from_whichever_port_a_connection_left_all_that_are_listened_on_are_tried() {
        let (mut observed, listening) = (Observed::default(), at(&["/ip4/0.0.0.0/tcp/1", "/ip4/192.168.1.5/tcp/2"]));
        let (from, seen) = ((PeerId::random(), ConnectionId::new_unchecked(1)), at(&["/ip4/198.51.100.7/tcp/2"]));
        observed.saw(from, &seen[0], false, listening.iter());
        let mut candidates = observed.candidates();
        candidates.sort();
        assert_eq!(candidates, at(&["/ip4/198.51.100.7/tcp/1", "/ip4/198.51.100.7/tcp/2"]));
    }

    #[test]
    fn a_peer_that_says_ever_something_else_takes_four_places_and_not_those_of_others() {
        let (mut observed, honest, liar) = (Observed::default(), PeerId::random(), PeerId::random());
        see(&mut observed, honest, 1, "/ip4/198.51.100.7/tcp/4602", false);
        see(&mut observed, PeerId::random(), 2, "/ip4/198.51.100.7/tcp/50000", false);
        for n in 0..10_000 {
            let seen = format!("/ip4/203.0.{}.{}/tcp/4602", n / 256 % 256, n % 256);
            see(&mut observed, liar, 3 + n % 16, &seen, false);
        }
        assert_eq!(observed.0.len(), 18);
        let candidates = observed.candidates();
        assert_eq!(candidates.len(), 1 + PER_PEER);
        assert_eq!(candidates.first(), at(&["/ip4/198.51.100.7/tcp/4602"]).first(), "what most say comes first");
    }

    #[test]
    fn a_local_address_is_offered_where_there_is_no_other() {
        let (mut observed, peer) = (Observed::default(), PeerId::random());
        see(&mut observed, peer, 1, "/ip4/192.168.1.5/tcp/4602", false);
        assert_eq!(observed.candidates(), at(&["/ip4/192.168.1.5/tcp/4602"]));
        see(&mut observed, peer, 2, "/ip4/198.51.100.7/tcp/4602", false);
        assert_eq!(observed.candidates(), at(&["/ip4/198.51.100.7/tcp/4602"]));
    }

    #[test]
    fn what_a_peer_says_over_its_newest_connection_counts_and_a_manager_is_believed_alone() {
        let (mut observed, manager) = (Observed::default(), PeerId::random());
        let old_ip: IpAddr = "198.51.100.7".parse().unwrap();
        let moved = |observed: &Observed| observed.moved_from(old_ip, |peer| *peer == manager);
        see(&mut observed, manager, 1, "/ip4/198.51.100.7/udp/4603/quic-v1", false);
        assert!(!moved(&observed));
        see(&mut observed, manager, 2, "/ip4/203.0.113.9/tcp/4602", false);
        assert!(moved(&observed));
        see(&mut observed, PeerId::random(), 3, "/ip4/198.51.100.7/tcp/4602", false);
        assert!(!moved(&observed), "somebody still sees it there");
    }

    #[test]
    fn two_peers_see_that_it_moved_and_one_does_not_say_so_alone() {
        let (mut observed, peers) = (Observed::default(), [(); 6].map(|()| PeerId::random()));
        let (old, new) = ("/ip4/198.51.100.7/tcp/4602", "/ip4/203.0.113.9/tcp/4602");
        let old_ip: IpAddr = "198.51.100.7".parse().unwrap();
        let mut seen = peers.iter().enumerate();
        let mut next = |observed: &mut Observed, at: &str| {
            let (id, peer) = seen.next().unwrap();
            see(observed, *peer, id, at, false);
        };
        next(&mut observed, old);
        next(&mut observed, new);
        assert!(!observed.moved_from(old_ip, |_| false));
        // As long as somebody sees it there, two others may be wrong.
        next(&mut observed, new);
        assert!(!observed.moved_from(old_ip, |_| false));
        next(&mut observed, new);
        next(&mut observed, new);
        assert!(observed.moved_from(old_ip, |_| false), "one may be wrong, too");
        observed.closed(ConnectionId::new_unchecked(4));
        assert!(!observed.moved_from(old_ip, |_| false));
        observed.closed(ConnectionId::new_unchecked(0));
        assert!(observed.moved_from(old_ip, |_| false));
        assert!(!observed.moved_from("203.0.113.9".parse().unwrap(), |_| false));
        // Nor does the other family, or the local network, say anything about it.
        for id in [1, 2, 3] {
            observed.closed(ConnectionId::new_unchecked(id));
        }
        for (id, at) in
            ["/ip6/2001:db8::7/tcp/1", "/ip6/2001:db8::8/tcp/1", "/ip4/10.0.0.1/tcp/1", "/ip4/10.0.0.2/tcp/1"]
                .into_iter()
                .enumerate()
        {
            see(&mut observed, PeerId::random(), 10 + id, at, false);
        }
        assert!(!observed.moved_from(old_ip, |_| false));
    }
}
