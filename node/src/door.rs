//! Handshakes of strangers share one pool, and whoever says nothing keeps a place in it until its time is over; so do
//! their connections afterwards, and a stranger makes as many keys as it likes. So no address gets more handshakes than its
//! share, and where the connections are at their bound the address with most of them gives way: one host must not be able to
//! keep all others out.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::multiaddr::Protocol as Part;
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, ListenFailure};
use libp2p::swarm::{CloseConnection, ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, ToSwarm, dummy};
use libp2p::{Multiaddr, PeerId};

use crate::address::{is_quic, relay_of};
use crate::metrics::NodeMetrics;

/// What one address may have of the pool at most: room for two hundred clients behind one translation that come in the same
/// instant.
const SHARE: usize = 4;
/// And of what is free of it: however many addresses take their share, those that come after find something.
const FREE_SHARE: usize = 2;
/// Part of the pool that handshakes over QUIC may have together: where those come from nobody has proved yet, and whoever
/// forges senders has a share for each. Over TCP the sender has answered before it counts here.
const QUIC_SHARE: usize = 2;
/// Part of all connections that others may not take, since this node dials, too.
const OWN_SHARE: u32 = 8;

/// Where a handshake comes from, as far as a stranger cannot choose it freely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    // Each way has a share of its own, as clients try both at once.
    Ip { ip: IpAddr, quic: bool },
    Relay(PeerId),
    Unknown,
}

impl Source {
    fn is_quic(self) -> bool {
        matches!(self, Source::Ip { quic: true, .. })
    }

    fn of(local: &Multiaddr, remote: &Multiaddr) -> Self {
        if let Some((relay, _)) = relay_of(local) {
            return Source::Relay(relay);
        }
        let ip = remote.iter().find_map(|part| match part {
            Part::Ip4(v4) => Some(IpAddr::from(v4)),
            Part::Ip6(v6) => Some(v6.to_ipv4_mapped().map_or_else(|| IpAddr::from(network_of(v6)), IpAddr::from)),
            _ => None,
        });
        ip.map_or(Source::Unknown, |ip| Source::Ip { ip, quic: is_quic(remote) })
    }
}

/// Whoever has one IPv6 address has the 64 bits behind it, and a /48 is to be had for the asking.
fn network_of(ip: Ipv6Addr) -> Ipv6Addr {
    let [a, b, c, ..] = ip.segments();
    Ipv6Addr::new(a, b, c, 0, 0, 0, 0, 0)
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Ip { ip, quic } => {
                let net = if ip.is_ipv6() { "/48" } else { "" };
                write!(f, "{ip}{net} over {}", if *quic { "QUIC" } else { "TCP" })
            }
            Source::Relay(relay) => write!(f, "the relay {relay}"),
            Source::Unknown => f.write_str("an unknown address"),
        }
    }
}

/// An address has its share of the handshakes under way, or all over QUIC have.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Crowded {
    #[error("{under_way} connections from {from} are being set up and not finished, and no more of them are let in")]
    Address { from: Source, under_way: usize },
    #[error("{under_way} connections over QUIC are being set up and not finished, and no more of them are let in")]
    Quic { under_way: usize },
}

/// No room, and no address has more connections than the one that asks for another.
#[derive(Debug, thiserror::Error)]
#[error("{there} connections are from {from}, as many as from anywhere, and there is no room for more")]
pub(crate) struct Full {
    from: Source,
    there: usize,
}

/// The connections of others.
#[derive(Debug)]
struct Guests {
    room: usize,
    // Bounded by the limit of all connections.
    of: HashMap<ConnectionId, (PeerId, Source)>,
    /// Of each address, the oldest first.
    by_source: HashMap<Source, Vec<ConnectionId>>,
}

/// Who has to go for a new one.
#[derive(Debug, PartialEq, Eq)]
struct Gives {
    peer: PeerId,
    id: ConnectionId,
    from: Source,
    there: usize,
}

impl Guests {
    /// Makes room for one more from there. The newest of the address with most goes: those that were there before the
    /// crowd are the likelier to be of use.
    fn make_room(&mut self, from: Source) -> Result<Option<Gives>, Full> {
        if self.of.len() < self.room {
            return Ok(None);
        }
        let there = self.by_source.get(&from).map_or(0, Vec::len);
        let most = self.by_source.iter().max_by_key(|(_, ids)| ids.len());
        let Some((crowd, of_crowd)) = most.filter(|(_, ids)| ids.len() > there + 1) else {
            return Err(Full { from, there });
        };
        let (crowd, count) = (*crowd, of_crowd.len());
        let gives = of_crowd.last().copied().and_then(|id| Some((id, self.of.get(&id)?.0)));
        let Some((id, peer)) = gives else { return Err(Full { from, there }) };
        self.left(id);
        Ok(Some(Gives { peer, id, from: crowd, there: count }))
    }

    fn came(&mut self, id: ConnectionId, peer: PeerId, from: Source) {
        self.of.insert(id, (peer, from));
        self.by_source.entry(from).or_default().push(id);
    }

    fn left(&mut self, id: ConnectionId) {
        let Some((_, from)) = self.of.remove(&id) else { return };
        if let Entry::Occupied(mut ids) = self.by_source.entry(from) {
            ids.get_mut().retain(|other| *other != id);
            if ids.get().is_empty() {
                ids.remove();
            }
        }
    }
}

/// The behaviour that lets handshakes begin, and connections stay.
#[derive(Debug)]
pub(crate) struct Door {
    pool: usize,
    // Bounded by the pool.
    under_way: HashMap<ConnectionId, Source>,
    by_source: HashMap<Source, usize>,
    over_quic: usize,
    guests: Guests,
    // One for each connection that came in since it was last asked.
    closing: VecDeque<Gives>,
    metrics: NodeMetrics,
}

impl Door {
    /// Of `pool` handshakes and `connections` at once.
    pub(crate) fn new(pool: u32, connections: u32, metrics: NodeMetrics) -> Self {
        let of = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        Self {
            pool: of(pool),
            under_way: HashMap::new(),
            by_source: HashMap::new(),
            over_quic: 0,
            guests: Guests {
                room: of(connections - connections / OWN_SHARE),
                of: HashMap::new(),
                by_source: HashMap::new(),
            },
            closing: VecDeque::new(),
            metrics,
        }
    }

    fn begin(&mut self, id: ConnectionId, from: Source) -> Result<(), Crowded> {
        let under_way = self.by_source.get(&from).copied().unwrap_or(0);
        let mut free = self.pool.saturating_sub(self.under_way.len()) / FREE_SHARE;
        if from.is_quic() {
            let quic = (self.pool / QUIC_SHARE).saturating_sub(self.over_quic);
            if quic == 0 {
                return Err(Crowded::Quic { under_way: self.over_quic });
            }
            // As much again as is left to others.
            free = free.min(quic);
        }
        let share = (self.pool / SHARE).min(free).max(1);
        if under_way >= share {
            return Err(Crowded::Address { from, under_way });
        }
        self.under_way.insert(id, from);
        self.over_quic += usize::from(from.is_quic());
        self.by_source.insert(from, under_way + 1);
        Ok(())
    }

    fn end(&mut self, id: ConnectionId) {
        let Some(from) = self.under_way.remove(&id) else { return };
        self.over_quic = self.over_quic.saturating_sub(usize::from(from.is_quic()));
        if let Entry::Occupied(mut count) = self.by_source.entry(from) {
            *count.get_mut() = count.get().saturating_sub(1);
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

impl NetworkBehaviour for Door {
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = Infallible;

    fn handle_pending_inbound_connection(
        &mut self,
        id: ConnectionId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<(), ConnectionDenied> {
        self.begin(id, Source::of(local, remote)).map_err(ConnectionDenied::new)
    }

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        _: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        self.end(id);
        let gives = self.guests.make_room(Source::of(local, remote)).map_err(ConnectionDenied::new)?;
        self.closing.extend(gives);
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            // Also where another part of the node turned it away.
            FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) => self.end(connection_id),
            FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint: ConnectedPoint::Listener { local_addr, send_back_addr },
                ..
            }) => self.guests.came(connection_id, peer_id, Source::of(local_addr, send_back_addr)),
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => self.guests.left(connection_id),
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Infallible>> {
        let Some(Gives { peer, id, from, there }) = self.closing.pop_front() else { return Poll::Pending };
        self.metrics.connections_refused.inc(["gave-way"]);
        let why =
            format!("there is no room for more, and one of the {there} from {from} gave way to one from elsewhere");
        if let Some(line) = self.metrics.turned_away.note(Instant::now(), why) {
            tracing::warn!("{line}");
        }
        Poll::Ready(ToSwarm::CloseConnection { peer_id: peer, connection: CloseConnection::One(id) })
    }
}

/// So long after the last one people are told that connections were turned away.
const TOLD: Duration = Duration::from_secs(5 * 60);
/// And so often the log is, at most.
const LOGGED: Duration = Duration::from_secs(60);

/// Connections that found no room, for people: whoever is turned away learns nothing, and the operator of this node would
/// not either.
#[derive(Clone, Debug, Default)]
pub(crate) struct TurnedAway(Arc<Mutex<Option<Turned>>>);

#[derive(Debug)]
struct Turned {
    first: Instant,
    last: Instant,
    logged: Instant,
    count: u64,
    why: String,
}

impl TurnedAway {
    /// Notes one; gives a line where it is time for one.
    pub(crate) fn note(&self, now: Instant, why: String) -> Option<String> {
        let mut turned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match turned.as_mut().filter(|turned| now.saturating_duration_since(turned.last) < TOLD) {
            Some(turned) => {
                (turned.last, turned.count, turned.why) = (now, turned.count.saturating_add(1), why);
                if now.saturating_duration_since(turned.logged) < LOGGED {
                    return None;
                }
                turned.logged = now;
            }
            None => *turned = Some(Turned { first: now, last: now, logged: now, count: 1, why }),
        }
        turned.as_ref().map(|turned| turned.text(now))
    }

    /// What there is to say now.
    pub(crate) fn text(&self, now: Instant) -> Option<String> {
        let turned = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turned
            .as_ref()
            .filter(|turned| now.saturating_duration_since(turned.last) < TOLD)
            .map(|turned| turned.text(now))
    }
}

impl Turned {
    fn text(&self, now: Instant) -> String {
        let ago = |then: Instant| now.saturating_duration_since(then).as_secs();
        match self.count {
            1 => format!("a connection was turned away {} s ago: {}", ago(self.last), self.why),
            count => format!(
                "{count} connections were turned away in {} s, the last {} s ago: {}",
                ago(self.first),
                ago(self.last),
                self.why
            ),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn from(remote: &str) -> Source {
        Source::of(&"/ip4/192.0.2.9/tcp/4001".parse().unwrap(), &remote.parse().unwrap())
    }

    /// Takes places from there until there are none; says how many there were.
    fn fill(door: &mut Door, next: &mut usize, source: Source) -> usize {
        let before = *next;
        while door.begin(ConnectionId::new_unchecked(*next), source).is_ok() {
            *next += 1;
        }
        *next - before
    }

    #[test]
    fn whoever_comes_after_many_that_took_all_they_get_still_finds_room() {
        let metrics = NodeMetrics::register(&Metrics::default());
        let (mut door, mut next) = (Door::new(1024, 1024, metrics), 0);
        let shares: Vec<usize> =
            (1..=10).map(|n| fill(&mut door, &mut next, from(&format!("/ip4/192.0.2.{n}/tcp/9")))).collect();
        assert_eq!(shares.first(), Some(&256));
        assert!(shares.iter().all(|share| *share > 0) && next < 1024, "{shares:?}");
        assert!(fill(&mut door, &mut next, from("/ip4/198.51.100.1/tcp/9")) > 5, "{shares:?}");
        // Places that are given back are there for all.
        for id in 0..next {
            door.end(ConnectionId::new_unchecked(id));
        }
        assert!(door.under_way.is_empty() && door.by_source.is_empty());
        assert_eq!(fill(&mut door, &mut next, from("/ip4/192.0.2.1/tcp/10")), 256);
    }

    #[test]
    fn forged_senders_over_quic_leave_half_of_the_room_to_those_over_tcp() {
        let metrics = NodeMetrics::register(&Metrics::default());
        let (mut door, mut next) = (Door::new(1024, 1024, metrics), 0);
        assert_eq!(fill(&mut door, &mut next, from("/ip4/192.0.2.1/udp/9/quic-v1")), 256);
        let forged = |n: usize| from(&format!("/ip4/203.{}.{}.{}/udp/9/quic-v1", n >> 16, n >> 8 & 255, n & 255));
        for n in 0..5000 {
            fill(&mut door, &mut next, forged(n));
        }
        assert_eq!(door.under_way.len(), 512);
        let refused = door.begin(ConnectionId::new_unchecked(next), forged(5000)).unwrap_err();
        assert!(matches!(refused, Crowded::Quic { under_way: 512 }), "{refused}");
        assert!(fill(&mut door, &mut next, from("/ip4/198.51.100.1/tcp/9")) > 100);
        for id in 0..next {
            door.end(ConnectionId::new_unchecked(id));
        }
        assert_eq!((door.over_quic, door.under_way.len()), (0, 0));
        assert_eq!(fill(&mut door, &mut next, forged(0)), 256);
    }

    #[test]
    fn when_all_room_is_taken_the_largest_crowd_gives_way_and_never_to_itself() {
        let mut guests = Guests { room: 100, of: HashMap::new(), by_source: HashMap::new() };
        let address = |n: u8| from(&format!("/ip4/192.0.2.{n}/tcp/9"));
        let mut next = 0;
        let mut come = |guests: &mut Guests, from| {
            let gave = guests.make_room(from)?;
            guests.came(ConnectionId::new_unchecked(next), PeerId::random(), from);
            next += 1;
            Ok::<_, Full>(gave)
        };
        for _ in 0..10 {
            assert_eq!(come(&mut guests, address(1)).unwrap(), None);
        }
        let of_the_crowd = (0..).take_while(|_| come(&mut guests, address(2)).is_ok()).count();
        assert_eq!(of_the_crowd, 90);
        let full = come(&mut guests, address(2)).unwrap_err().to_string();
        assert!(full.starts_with("90 connections are from 192.0.2.2 over TCP"), "{full}");
        // Others find room, the newest of the crowd goes for each, until all have as many.
        let gave = come(&mut guests, address(3)).unwrap().unwrap();
        assert_eq!((gave.id, gave.from, gave.there), (ConnectionId::new_unchecked(99), address(2), 90));
        while come(&mut guests, address(3)).is_ok() {}
        let there = |guests: &Guests, n| guests.by_source.get(&address(n)).map_or(0, Vec::len);
        assert_eq!([1, 2, 3].map(|n| there(&guests, n)), [10, 45, 45]);
        assert_eq!(guests.of.len(), 100);
        let ids: Vec<ConnectionId> = guests.of.keys().copied().collect();
        ids.into_iter().for_each(|id| guests.left(id));
        assert!(guests.of.is_empty() && guests.by_source.is_empty());
    }

    #[test]
    fn a_source_is_what_a_stranger_cannot_choose_freely() {
        assert_eq!(from("/ip4/192.0.2.1/tcp/9"), from("/ip4/192.0.2.1/tcp/10"));
        assert_eq!(from("/ip6/::ffff:192.0.2.1/tcp/9"), from("/ip4/192.0.2.1/tcp/10"));
        assert_ne!(from("/ip4/192.0.2.1/tcp/9"), from("/ip4/192.0.2.1/udp/9/quic-v1"));
        assert_eq!(from("/ip6/2001:db8::1/tcp/9"), from("/ip6/2001:db8::ffff:1/tcp/9"));
        assert_eq!(from("/ip6/2001:db8::1/tcp/9"), from("/ip6/2001:db8:0:1::1/tcp/9"));
        assert_ne!(from("/ip6/2001:db8::1/tcp/9"), from("/ip6/2001:db8:1::1/tcp/9"));
        assert_eq!(from("/ip6/2001:db8::1/tcp/9").to_string(), "2001:db8::/48 over TCP");
        let relay = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
        let circuit = format!("/ip4/192.0.2.9/tcp/4001/p2p/{relay}/p2p-circuit").parse().unwrap();
        let by = Source::of(&circuit, &"/ip4/192.0.2.9/tcp/4001".parse().unwrap());
        assert_eq!(by, Source::Relay(relay.parse().unwrap()));
    }

    #[test]
    fn people_are_told_once_in_a_while_and_no_longer_than_it_matters() {
        let (turned, start) = (TurnedAway::default(), Instant::now());
        assert_eq!(turned.text(start), None);
        assert!(turned.note(start, "full".to_owned()).unwrap().ends_with("0 s ago: full"));
        assert_eq!(turned.note(start + Duration::from_secs(59), "full".to_owned()), None);
        let line = turned.note(start + LOGGED, "fuller".to_owned()).unwrap();
        assert_eq!(line, "3 connections were turned away in 60 s, the last 0 s ago: fuller");
        assert_eq!(turned.text(start + LOGGED).as_deref(), Some(line.as_str()));
        assert_eq!(turned.text(start + LOGGED + TOLD), None);
        assert!(turned.note(start + LOGGED + TOLD, "full".to_owned()).unwrap().starts_with("a connection"));
    }
}
