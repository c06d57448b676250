//! Asks peers whether they get through to an address. The library's client takes every address that anybody says for a
//! candidate, keeps all of them for ever, and never tests one again, whichever network the node is in by then. This one
//! takes those that [`super::observed`] vouches for, so many of them, and begins anew when the node has moved, and from time
//! to time where it is reached nowhere.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Endpoint};
use libp2p::swarm::behaviour::{ConnectionClosed, ConnectionEstablished, NewExternalAddrCandidate};
use libp2p::swarm::derive_prelude::Either;
use libp2p::swarm::{
    ConnectionDenied, ConnectionHandler, ConnectionId, FromSwarm, NetworkBehaviour, NotifyHandler, THandler,
    THandlerInEvent, THandlerOutEvent, ToSwarm,
};
use libp2p::{Multiaddr, PeerId};
use libp2p_autonat::v2::client;

use super::noes::Noes;
use crate::address::ip_of;

/// Addresses that are tested, until the node moves or [`ANEW`] is over: a node has a handful.
const CANDIDATES: usize = 32;
/// And tests of them. A server that has no time for one says so, and it is repeated at another; each may cost 100 KB.
const TESTS: usize = 64;
/// Tests that one connection may be asked for at once: the library drops those beyond, and waits for their outcome for ever.
const AT_ONCE: usize = 10;
/// Whoever used all that up, or is reached nowhere, begins anew after this time.
const ANEW: Duration = Duration::from_secs(3600);

/// What a connection told the library's client. The library gives the type no name that others can use.
type Said =
    <<<client::Behaviour as NetworkBehaviour>::ConnectionHandler as ConnectionHandler>::ToBehaviour as Of>::Left;

#[cfg(test)]
type DialledBack =
    <<<client::Behaviour as NetworkBehaviour>::ConnectionHandler as ConnectionHandler>::ToBehaviour as Of>::Right;

trait Of {
    type Left;
    #[cfg(test)]
    type Right;
}

impl<L, R> Of for Either<L, R> {
    type Left = L;
    #[cfg(test)]
    type Right = R;
}

pub(crate) struct Probing {
    inner: client::Behaviour,
    // Bounded by the connection limits.
    connections: HashMap<ConnectionId, Connection>,
    candidates: HashMap<Multiaddr, Candidate>,
    tests: usize,
    since: Instant,
    /// There are tests whose outcome never comes: they are repeated, when those that run are over.
    again: bool,
}

/// An address that may lead here.
#[derive(Default)]
struct Candidate {
    /// It is known whether it does.
    verdict: bool,
    noes: Noes,
}

/// What the library's client has to be told again when it begins anew.
struct Connection {
    peer: PeerId,
    endpoint: ConnectedPoint,
    tests_others: bool,
    /// Where the peer says that it sees this node come from: it tests no address of another host.
    sees: Option<IpAddr>,
    /// Tests that it was asked for, without an outcome yet.
    asked: usize,
}

impl Probing {
    pub(crate) fn new() -> Self {
        Self {
            inner: client::Behaviour::default(),
            connections: HashMap::new(),
            candidates: HashMap::new(),
            tests: 0,
            since: Instant::now(),
            again: false,
        }
    }

    /// These may lead here, and nobody has said so yet. Where nobody gets through anywhere it may be for a reason that has
    /// passed: a router that was starting, a port that is forwarded since.
    pub(super) fn test(&mut self, candidates: impl Iterator<Item = Multiaddr>, reached: bool) {
        let used_up = self.candidates.len() >= CANDIDATES || self.tests >= TESTS;
        if (used_up || !reached) && self.since.elapsed() >= ANEW {
            self.begin_anew();
        }
        for addr in candidates {
            if self.candidates.len() < CANDIDATES && !self.candidates.contains_key(&addr) {
                self.candidates.insert(addr, Candidate::default());
            }
        }
        self.offer();
    }

    /// A peer says where it sees this node come from. It may say what it likes: it is asked for what it says it can test.
    pub(super) fn seen(&mut self, id: ConnectionId, at: Option<IpAddr>) {
        if let Some(connection) = self.connections.get_mut(&id)
            && connection.sees != at
        {
            connection.sees = at;
            self.offer();
        }
    }

    /// Has the library test what has no verdict and somebody may test. Of what nobody may, it would ask again and again, and
    /// each time send all that whoever tests wants to have before it says no.
    fn offer(&mut self) {
        if self.open().next().is_none() {
            return;
        }
        let seen = self.seen_by(|_| true);
        let may = |addr: &&Multiaddr| ip_of(addr).is_some_and(|ip| seen.contains(&ip));
        let open: Vec<Multiaddr> = self.open().filter(may).cloned().collect();
        for addr in &open {
            self.inner.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr }));
        }
    }

    /// Where those of these peers that test others see this node, over whichever connection.
    fn seen_by(&self, is_asked: impl Fn(&PeerId) -> bool) -> HashSet<IpAddr> {
        let test = self.connections.values().filter(|known| known.tests_others && is_asked(&known.peer));
        let test: HashSet<PeerId> = test.map(|known| known.peer).collect();
        self.connections.values().filter(|known| test.contains(&known.peer)).filter_map(|known| known.sees).collect()
    }

    /// What has no verdict.
    fn open(&self) -> impl Iterator<Item = &Multiaddr> {
        self.candidates.iter().filter(|(_, known)| !known.verdict).map(|(addr, _)| addr)
    }

    /// Whom to ask for a test: the one that the library chose by lot, unless it sees this node nowhere that is to be tested, or
    /// was asked for as much as it takes.
    fn tester(&self, chosen: ConnectionId) -> Option<(PeerId, ConnectionId)> {
        let open: HashSet<IpAddr> = self.open().filter_map(ip_of).collect();
        let see = self.connections.values().filter(|known| known.sees.is_some_and(|ip| open.contains(&ip)));
        let see: HashSet<PeerId> = see.map(|known| known.peer).collect();
        let may = |known: &Connection| known.tests_others && known.asked < AT_ONCE && see.contains(&known.peer);
        let able: Vec<_> = self.connections.iter().filter(|(_, known)| may(known)).collect();
        let chosen = able.iter().find(|(id, _)| **id == chosen);
        // By turns: one of them may not test either.
        let other = || able.get(self.tests.checked_rem(able.len())?);
        chosen.or_else(other).map(|(id, known)| (known.peer, **id))
    }

    /// The library believes the first one that does not get through.
    fn tested(&mut self, address: &Multiaddr, by: PeerId, reached: bool) {
        let Some(known) = self.candidates.get_mut(address) else { return };
        if reached {
            known.noes = Noes::default();
        }
        known.verdict = reached || known.noes.add(by);
        self.again |= !known.verdict;
    }

    /// Somebody is to try these again, whatever was found out before. While a test runs none of those that have a verdict is:
    /// to forget a verdict the library's client has to begin again, and would know nothing of that test.
    pub(super) fn doubt(&mut self, addresses: Vec<Multiaddr>) {
        let is_busy = self.connections.values().any(|connection| connection.asked > 0);
        let (known, new): (Vec<_>, Vec<_>) =
            addresses.into_iter().partition(|address| self.candidates.contains_key(address));
        self.test(new.into_iter(), true);
        let mut again = false;
        for address in known.iter().filter(|_| !is_busy) {
            again |= self.candidates.get_mut(address).is_some_and(|known| std::mem::take(&mut known.verdict));
        }
        if again {
            self.begin_again();
        }
    }

    /// What was found out is no longer true.
    pub(super) fn begin_anew(&mut self) {
        (self.tests, self.since) = (0, Instant::now());
        self.candidates.clear();
        self.begin_again();
    }

    /// Is there something that this peer may still find out?
    pub(super) fn hopes_for(&self, peer: &PeerId) -> bool {
        let seen = self.seen_by(|known| known == peer);
        self.open().filter_map(ip_of).any(|ip| seen.contains(&ip))
    }

    /// What has a verdict keeps it; the rest is tested again. A test that runs fails: the peer gets through, and finds nobody
    /// here who waits for it.
    fn begin_again(&mut self) {
        (self.inner, self.again) = (client::Behaviour::default(), false);
        for (id, connection) in &self.connections {
            self.inner.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
                peer_id: connection.peer,
                connection_id: *id,
                endpoint: &connection.endpoint,
                failed_addresses: &[],
                other_established: 0,
            }));
            if connection.tests_others {
                let said = Either::Left(Said::PeerHasServerSupport);
                self.inner.on_connection_handler_event(connection.peer, *id, said);
            }
        }
        self.offer();
    }
}

impl NetworkBehaviour for Probing {
    type ConnectionHandler = <client::Behaviour as NetworkBehaviour>::ConnectionHandler;
    type ToSwarm = client::Event;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_inbound_connection(id, peer, local, remote)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        self.inner.handle_established_outbound_connection(id, peer, address, role, port)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match &event {
            // Whoever says so may be anybody.
            FromSwarm::NewExternalAddrCandidate(_) => return,
            FromSwarm::ConnectionEstablished(ConnectionEstablished { peer_id, connection_id, endpoint, .. }) => {
                let endpoint = (*endpoint).clone();
                let connection = Connection { peer: *peer_id, endpoint, tests_others: false, sees: None, asked: 0 };
                self.connections.insert(*connection_id, connection);
            }
            FromSwarm::ConnectionClosed(ConnectionClosed { connection_id, .. }) => {
                // The library waits for the outcomes for ever.
                self.again |= self.connections.remove(connection_id).is_some_and(|gone| gone.asked > 0);
            }
            _ => {}
        }
        self.inner.on_swarm_event(event);
    }

    fn on_connection_handler_event(&mut self, peer: PeerId, id: ConnectionId, event: THandlerOutEvent<Self>) {
        let mut is_new = false;
        match (&event, self.connections.get_mut(&id)) {
            (Either::Left(Said::PeerHasServerSupport), Some(connection)) => {
                is_new = !std::mem::replace(&mut connection.tests_others, true);
            }
            (Either::Left(Said::TestOutcome { .. }), Some(connection)) => {
                connection.asked = connection.asked.saturating_sub(1);
            }
            _ => {}
        }
        self.inner.on_connection_handler_event(peer, id, event);
        if is_new {
            self.offer();
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            match self.inner.poll(cx) {
                Poll::Ready(ToSwarm::NotifyHandler { handler: NotifyHandler::One(id), event, .. }) => {
                    // The library waits for the outcome of a test that nobody was asked for: it is over.
                    if self.tests >= TESTS {
                        continue;
                    }
                    let Some((peer_id, id)) = self.tester(id) else {
                        self.again = true;
                        continue;
                    };
                    if let Some(connection) = self.connections.get_mut(&id) {
                        connection.asked += 1;
                    }
                    self.tests += 1;
                    return Poll::Ready(ToSwarm::NotifyHandler { peer_id, handler: NotifyHandler::One(id), event });
                }
                Poll::Ready(ToSwarm::GenerateEvent(event)) => {
                    self.tested(&event.tested_addr, event.server, event.result.is_ok());
                    return Poll::Ready(ToSwarm::GenerateEvent(event));
                }
                Poll::Pending if self.again && self.connections.values().all(|connection| connection.asked == 0) => {
                    self.begin_again();
                }
                polled => return polled,
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use std::task::Waker;

    use super::*;
    use crate::reach::noes::NOES_OF_ONE;

    fn tests_others_at(probing: &mut Probing, peer_id: PeerId, id: usize, sees: &Multiaddr) {
        let connection_id = ConnectionId::new_unchecked(id);
        let endpoint = ConnectedPoint::Listener { local_addr: Multiaddr::empty(), send_back_addr: Multiaddr::empty() };
        probing.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
            peer_id,
            connection_id,
            endpoint: &endpoint,
            failed_addresses: &[],
            other_established: 0,
        }));
        probing.on_connection_handler_event(peer_id, connection_id, Either::Left(Said::PeerHasServerSupport));
        probing.seen(connection_id, ip_of(sees));
    }

    fn at(n: usize) -> Multiaddr {
        format!("/ip4/198.51.100.7/tcp/{}", 4602 + n).parse().unwrap()
    }

    fn tests_others(probing: &mut Probing, peer_id: PeerId, id: usize) {
        tests_others_at(probing, peer_id, id, &at(0));
    }

    /// A test that somebody was asked for.
    struct Asked {
        peer: PeerId,
        id: ConnectionId,
        nonce: u64,
    }

    /// Waits for the next round of tests.
    async fn round(probing: &mut Probing) -> Vec<Asked> {
        let mut asked = Vec::new();
        let round = std::future::poll_fn(|cx| {
            while let Poll::Ready(told) = probing.poll(cx) {
                if let ToSwarm::NotifyHandler { peer_id: peer, handler: NotifyHandler::One(id), event } = told {
                    // The library shows it nowhere else.
                    let told = format!("{event:?}");
                    let nonce = told.split("nonce: ").nth(1).unwrap();
                    let nonce = nonce.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap();
                    asked.push(Asked { peer, id, nonce });
                }
            }
            if asked.is_empty() { Poll::Pending } else { Poll::Ready(()) }
        });
        tokio::time::timeout(Duration::from_secs(60), round).await.unwrap();
        asked
    }

    async fn asked(probing: &mut Probing) -> usize {
        round(probing).await.len()
    }

    fn gets_through(probing: &mut Probing, test: &Asked, at: &Multiaddr) {
        let (sender, _answer) = futures::channel::oneshot::channel();
        let dialled_back = DialledBack { nonce: test.nonce, sender };
        probing.on_connection_handler_event(test.peer, test.id, Either::Right(dialled_back));
        says(probing, test, at);
    }

    fn says(probing: &mut Probing, test: &Asked, at: &Multiaddr) {
        let said = Said::TestOutcome { nonce: test.nonce, outcome: Ok((at.clone(), 0)) };
        probing.on_connection_handler_event(test.peer, test.id, Either::Left(said));
    }

    fn close(probing: &mut Probing, peer_id: PeerId, connection_id: ConnectionId) {
        let (endpoint, cause) = (probing.connections.get(&connection_id).unwrap().endpoint.clone(), None);
        let closed = ConnectionClosed { peer_id, connection_id, endpoint: &endpoint, cause, remaining_established: 0 };
        probing.on_swarm_event(FromSwarm::ConnectionClosed(closed));
    }

    #[tokio::test]
    async fn what_whoever_was_asked_takes_along_is_asked_of_another() {
        let mut probing = Probing::new();
        let servers = [PeerId::random(), PeerId::random()];
        for (id, server) in servers.into_iter().enumerate() {
            tests_others(&mut probing, server, id);
        }
        assert!(!probing.hopes_for(&servers[0]), "there is nothing to test");
        probing.test((0..1).map(at), false);
        assert!(servers.iter().all(|server| probing.hopes_for(server)) && !probing.hopes_for(&PeerId::random()));
        let asked = round(&mut probing).await;
        close(&mut probing, asked[0].peer, asked[0].id);
        let other = servers.iter().find(|server| **server != asked[0].peer).unwrap();
        assert_eq!(round(&mut probing).await.first().map(|asked| &asked.peer), Some(other));
        assert_eq!(probing.tests, 2, "it counts as another one");
    }

    /// The library would say that nobody got through there, and the address would not be tested again.
    #[tokio::test]
    async fn a_test_that_runs_is_not_cut_off_when_another_one_is() {
        let mut probing = Probing::new();
        for id in 0..2 {
            tests_others(&mut probing, PeerId::random(), id);
        }
        let both = |asked: &[Asked]| asked.iter().any(|test| test.id != asked[0].id);
        let mut asked = Vec::new();
        while !both(&asked) {
            probing.begin_anew();
            probing.connections.values_mut().for_each(|connection| connection.asked = 0);
            probing.test((0..8).map(at), false);
            asked = round(&mut probing).await;
        }
        let gone = (asked[0].peer, asked[0].id);
        close(&mut probing, gone.0, gone.1);
        assert!(std::future::poll_fn(|cx| Poll::Ready(probing.poll(cx).is_pending())).await);
        let left: Vec<&Asked> = asked.iter().filter(|test| test.id != gone.1).collect();
        for test in &left {
            let (sender, answer) = futures::channel::oneshot::channel();
            let dialled_back = DialledBack { nonce: test.nonce, sender };
            probing.on_connection_handler_event(test.peer, test.id, Either::Right(dialled_back));
            assert!(answer.await.unwrap().is_ok(), "somebody waits for it");
        }
        for (n, test) in left.iter().enumerate() {
            says(&mut probing, test, &at(n));
        }
        let again = round(&mut probing).await;
        assert_eq!(again.len(), asked.len() - left.len(), "those that are over are not repeated");
        assert!(again.iter().all(|test| test.id == left[0].id));
    }

    #[tokio::test]
    async fn nobody_is_asked_for_more_at_once_than_the_library_takes() {
        let mut probing = Probing::new();
        let server = PeerId::random();
        tests_others(&mut probing, server, 1);
        probing.test((0..AT_ONCE + 2).map(at), false);
        let first = round(&mut probing).await;
        assert_eq!(first.len(), AT_ONCE);
        let full = std::future::poll_fn(|cx| {
            assert!(probing.poll(cx).is_pending());
            if probing.again { Poll::Ready(()) } else { Poll::Pending }
        });
        tokio::time::timeout(Duration::from_secs(60), full).await.unwrap();
        for (n, test) in first.iter().enumerate() {
            gets_through(&mut probing, test, &at(n));
        }
        let tested = probing.candidates.len() - AT_ONCE;
        assert_eq!(asked(&mut probing).await, tested);
    }

    #[tokio::test]
    async fn an_address_that_failed_is_tested_again_after_an_hour_where_none_is_reached() {
        let mut probing = Probing::new();
        tests_others(&mut probing, PeerId::random(), 1);
        probing.test((0..1).map(at), false);
        assert_eq!(asked(&mut probing).await, 1);
        probing.candidates.get_mut(&at(0)).unwrap().verdict = true;
        probing.test((0..1).map(at), false);
        assert!(probing.candidates[&at(0)].verdict, "not yet");
        probing.since = probing.since.checked_sub(ANEW).unwrap();
        probing.test((0..1).map(at), true);
        assert!(probing.candidates[&at(0)].verdict, "others get through elsewhere");
        probing.test((0..1).map(at), false);
        assert_eq!(asked(&mut probing).await, 1);
    }

    #[tokio::test]
    async fn that_one_does_not_get_through_is_asked_of_another_before_it_is_believed() {
        let mut probing = Probing::new();
        for id in 0..2 {
            tests_others(&mut probing, PeerId::random(), id);
        }
        probing.test((0..1).map(at), true);
        let says_no = async |probing: &mut Probing| {
            let asked = round(probing).await;
            // The library shows nobody how to say no.
            says(probing, &asked[0], &at(0));
            probing.tested(&at(0), asked[0].peer, false);
            asked[0].peer
        };
        let first = says_no(&mut probing).await;
        let mut noes = 1;
        while !probing.candidates[&at(0)].verdict {
            assert!(probing.hopes_for(&first));
            noes += 1;
            let second = says_no(&mut probing).await;
            assert_eq!(probing.candidates[&at(0)].verdict, second != first || noes == NOES_OF_ONE);
        }
        assert!(noes > 1 && !probing.hopes_for(&first));
        // One that is alone has to say so more often, and whoever gets through ends it.
        probing.begin_anew();
        probing.test((0..1).map(at), true);
        for _ in 1..NOES_OF_ONE {
            probing.tested(&at(0), first, false);
            assert!(!probing.candidates[&at(0)].verdict && probing.again);
        }
        probing.tested(&at(0), first, true);
        assert!(probing.candidates[&at(0)].verdict);
        probing.tested(&at(0), first, false);
        assert!(!probing.candidates[&at(0)].verdict);
    }

    #[tokio::test]
    async fn what_has_a_verdict_is_tested_again_when_it_is_in_doubt() {
        let (mut probing, server) = (Probing::new(), PeerId::random());
        tests_others(&mut probing, server, 1);
        probing.doubt(vec![at(0)]);
        probing.test((1..2).map(at), true);
        assert_eq!(asked(&mut probing).await, 2, "one that nobody tried is tried");
        let verdict = |probing: &mut Probing, n: usize| probing.candidates.get_mut(&at(n)).unwrap().verdict = true;
        let over = |probing: &mut Probing| {
            let connection = probing.connections.get_mut(&ConnectionId::new_unchecked(1)).unwrap();
            connection.asked -= 1;
        };
        verdict(&mut probing, 0);
        over(&mut probing);
        probing.doubt(vec![at(0)]);
        assert!(probing.candidates[&at(0)].verdict, "a test runs");
        verdict(&mut probing, 1);
        over(&mut probing);
        probing.doubt(vec![at(0)]);
        assert!(probing.hopes_for(&server));
        assert_eq!(asked(&mut probing).await, 1);
        assert!(probing.candidates[&at(1)].verdict, "nobody doubts that one");
        assert_eq!(probing.tests, 3);
    }

    #[tokio::test]
    async fn an_address_that_no_connected_peer_may_test_is_tested_when_one_comes_that_may() {
        let mut probing = Probing::new();
        let (v4, v6): (Multiaddr, Multiaddr) = (at(0), "/ip6/2001:db8::7/tcp/4602".parse().unwrap());
        let server = PeerId::random();
        tests_others_at(&mut probing, server, 1, &v4);
        probing.doubt(vec![v6.clone()]);
        assert!(!probing.hopes_for(&server), "it does not see this node there");
        // Nor is it asked beside another one.
        probing.test(std::iter::once(v4.clone()), true);
        let asked = round(&mut probing).await;
        assert_eq!(asked.len(), 1);
        gets_through(&mut probing, &asked[0], &v4);
        let is_heard =
            |probing: &mut Probing| while probing.poll(&mut Context::from_waker(Waker::noop())).is_ready() {};
        is_heard(&mut probing);
        // Among many that may not, the one that may is asked.
        for id in 2..20 {
            tests_others_at(&mut probing, PeerId::random(), id, &v4);
        }
        let able = PeerId::random();
        tests_others_at(&mut probing, able, 20, &v6);
        assert!(probing.hopes_for(&able) && !probing.hopes_for(&server));
        let asked = round(&mut probing).await;
        assert_eq!(asked.iter().map(|test| test.peer).collect::<Vec<_>>(), [able]);
        assert_eq!(probing.tests, 2);
        // Where it goes, nobody is asked in its place.
        let gone = ConnectionId::new_unchecked(20);
        close(&mut probing, able, gone);
        assert!(!probing.hopes_for(&able));
        for id in 21..23 {
            tests_others_at(&mut probing, able, id, &v6);
        }
        let asked = round(&mut probing).await;
        gets_through(&mut probing, &asked[0], &v6);
        is_heard(&mut probing);
        assert_eq!((asked.len(), probing.tests), (1, 3));
        assert!(asked[0].peer == able && !probing.hopes_for(&able));
    }

    #[tokio::test]
    async fn what_strangers_say_is_not_tested_and_what_is_tested_is_bounded_and_begins_anew() {
        let (mut probing, server) = (Probing::new(), PeerId::random());
        tests_others(&mut probing, server, 1);
        for n in 0..1000 {
            probing.on_swarm_event(FromSwarm::NewExternalAddrCandidate(NewExternalAddrCandidate { addr: &at(n) }));
        }
        probing.test((0..1).map(at), false);
        assert_eq!(asked(&mut probing).await, 1);
        probing.test((0..1000).map(at), false);
        assert_eq!(probing.candidates.len(), CANDIDATES);
        // In another network, all of it is asked again, of those that are connected already.
        probing.begin_anew();
        assert_eq!(probing.candidates.len(), 0);
        probing.test((0..1).map(at), false);
        assert_eq!(asked(&mut probing).await, 1);
        // Nor do more tests go out than there may be.
        probing.tests = TESTS - 1;
        probing.test((1..5).map(at), false);
        assert_eq!(asked(&mut probing).await, 1);
    }
}
