//! Handshakes of strangers share one pool, and whoever says nothing keeps a place in it until its time is over. So no
//! address gets more than its share: one host must not be able to keep all others out.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::Endpoint;
use libp2p::core::transport::PortUse;
use libp2p::multiaddr::Protocol as Part;
use libp2p::swarm::behaviour::ListenFailure;
use libp2p::swarm::{ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, ToSwarm, dummy};
use libp2p::{Multiaddr, PeerId};

use crate::address::{is_quic, relay_of};

/// What one address may have of the pool at most: room for two hundred clients behind one translation that come in the same
/// instant.
const SHARE: usize = 4;
/// And of what is free of it: however many addresses take their share, those that come after find something.
const FREE_SHARE: usize = 2;

/// Where a handshake comes from, as far as a stranger cannot choose it freely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Source {
    // Each way has a share of its own, as clients try both at once.
    Ip { ip: IpAddr, quic: bool },
    Relay(PeerId),
    Unknown,
}

impl Source {
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

/// Whoever has one IPv6 address has the 64 bits behind it.
fn network_of(ip: Ipv6Addr) -> Ipv6Addr {
    let [a, b, c, d, ..] = ip.segments();
    Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0)
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Ip { ip, quic } => {
                let net = if ip.is_ipv6() { "/64" } else { "" };
                write!(f, "{ip}{net} over {}", if *quic { "QUIC" } else { "TCP" })
            }
            Source::Relay(relay) => write!(f, "the relay {relay}"),
            Source::Unknown => f.write_str("an unknown address"),
        }
    }
}

/// An address has its share of the handshakes under way.
#[derive(Debug, thiserror::Error)]
#[error("{under_way} connections from {from} are being set up and not finished, and no more of them are let in")]
pub(crate) struct Crowded {
    from: Source,
    under_way: usize,
}

/// The behaviour that lets handshakes begin.
#[derive(Debug)]
pub(crate) struct Door {
    pool: usize,
    // Bounded by the pool.
    under_way: HashMap<ConnectionId, Source>,
    by_source: HashMap<Source, usize>,
}

impl Door {
    pub(crate) fn new(pool: u32) -> Self {
        let pool = usize::try_from(pool).unwrap_or(usize::MAX);
        Self { pool, under_way: HashMap::new(), by_source: HashMap::new() }
    }

    fn begin(&mut self, id: ConnectionId, from: Source) -> Result<(), Crowded> {
        let under_way = self.by_source.get(&from).copied().unwrap_or(0);
        let free = self.pool.saturating_sub(self.under_way.len());
        let share = (self.pool / SHARE).min(free / FREE_SHARE).max(1);
        if under_way >= share {
            return Err(Crowded { from, under_way });
        }
        self.under_way.insert(id, from);
        self.by_source.insert(from, under_way + 1);
        Ok(())
    }

    fn end(&mut self, id: ConnectionId) {
        let Some(from) = self.under_way.remove(&id) else { return };
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
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<dummy::ConnectionHandler, ConnectionDenied> {
        self.end(id);
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
        // Also where another part of the node turned it away.
        if let FromSwarm::ListenFailure(ListenFailure { connection_id, .. }) = event {
            self.end(connection_id);
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: Infallible) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, Infallible>> {
        Poll::Pending
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
        let (mut door, mut next) = (Door::new(1024), 0);
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
    fn a_source_is_what_a_stranger_cannot_choose_freely() {
        assert_eq!(from("/ip4/192.0.2.1/tcp/9"), from("/ip4/192.0.2.1/tcp/10"));
        assert_eq!(from("/ip6/::ffff:192.0.2.1/tcp/9"), from("/ip4/192.0.2.1/tcp/10"));
        assert_ne!(from("/ip4/192.0.2.1/tcp/9"), from("/ip4/192.0.2.1/udp/9/quic-v1"));
        assert_eq!(from("/ip6/2001:db8::1/tcp/9"), from("/ip6/2001:db8::ffff:1/tcp/9"));
        assert_ne!(from("/ip6/2001:db8::1/tcp/9"), from("/ip6/2001:db8:0:1::1/tcp/9"));
        assert_eq!(from("/ip6/2001:db8::1/tcp/9").to_string(), "2001:db8::/64 over TCP");
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
