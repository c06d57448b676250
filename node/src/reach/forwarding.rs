//! Asks the router to forward the listening ports. The library asks for each local address of a port, and takes what the
//! router says of one for what it says of the port: a bridge for containers or a virtual network, which no router forwards
//! to, costs it a port that was forwarded, and it neither renews that nor asks again. This one shows it one address of each
//! port, the one that the search for the router leaves from. It searches anew when that changes, since the router may be
//! another one then, and from time to time where none is found or nothing is forwarded.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, UdpSocket};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use libp2p::core::Endpoint;
use libp2p::core::transport::{ListenerId, PortUse};
use libp2p::multiaddr::Protocol as Part;
use libp2p::swarm::behaviour::{ExpiredListenAddr, NewListenAddr};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent, THandlerOutEvent, ToSwarm,
    dummy,
};
use libp2p::{Multiaddr, PeerId, upnp};
use tokio::time::{Instant, Sleep};

use crate::address::is_relayed;

/// Addresses come and go several at a time: they are looked at when this has passed.
const SETTLES: Duration = Duration::from_secs(1);
/// And again so often: another way may lead out without an address having come or gone.
const LOOKS: Duration = Duration::from_secs(60);
/// Where nothing is forwarded, the search begins anew after this time: the router may have been starting, or is another one.
const ANEW: Duration = Duration::from_secs(3600);
/// So long what an older search had forwarded is given back.
const LEAVES: Duration = Duration::from_secs(30);
/// Whom the library's search asks.
const ROUTERS: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 255, 255, 250), 1900);

/// An address that is listened on.
type Listened = (ListenerId, Multiaddr);

pub(crate) struct Forwarding<I = upnp::tokio::Behaviour> {
    /// Nothing where there is nothing to forward to.
    inner: Option<I>,
    search: fn() -> I,
    leaves_from: fn() -> Option<Ipv4Addr>,
    /// Addresses that a router could forward to; never more than the machine has.
    listening: Vec<Listened>,
    /// Those of them that the library knows.
    shown: Vec<Listened>,
    /// What the router forwards: the address listened on, and its own.
    forwarded: Vec<(Multiaddr, Multiaddr)>,
    /// The library found no router that it could ask, and looks no further.
    is_over: bool,
    since: Instant,
    look: Pin<Box<Sleep>>,
    // One for each forwarded port.
    events: VecDeque<upnp::Event>,
}

impl Forwarding {
    pub(crate) fn new() -> Self {
        Self::with(upnp::tokio::Behaviour::default, search_leaves_from)
    }
}

/// The address of this machine that the system sends from to whom the search asks. Nothing is sent.
fn search_leaves_from() -> Option<Ipv4Addr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(ROUTERS).ok()?;
    match socket.local_addr().ok()?.ip() {
        std::net::IpAddr::V4(ip) => Some(ip),
        std::net::IpAddr::V6(_) => None,
    }
}

/// A router translates these.
pub(super) fn is_behind_router(address: &Multiaddr) -> bool {
    local_ip(address).is_some()
}

fn local_ip(address: &Multiaddr) -> Option<Ipv4Addr> {
    match address.iter().next() {
        Some(Part::Ip4(ip)) if ip.is_private() && !is_relayed(address) => Some(ip),
        _ => None,
    }
}

/// One address of each port: the one that leads to the router, else the one that was shown before, which a way out that is
/// gone for a moment does not cost its ports, else the only one.
fn choose(listening: &[Listened], shown: &[Listened], leaves_from: Option<Ipv4Addr>) -> Vec<Listened> {
    let has_port = |address: &Multiaddr, other: &Multiaddr| address.iter().skip(1).eq(other.iter().skip(1));
    let leads_there = |one: &Listened| leaves_from.is_some() && local_ip(&one.1) == leaves_from;
    let mut chosen: Vec<Listened> = Vec::new();
    for one in listening {
        if chosen.iter().any(|other| has_port(&one.1, &other.1)) {
            continue;
        }
        let alike: Vec<&Listened> = listening.iter().filter(|other| has_port(&one.1, &other.1)).collect();
        let known = alike.iter().find(|one| leads_there(one)).or_else(|| alike.iter().find(|one| shown.contains(one)));
        let only = || alike.first().filter(|_| alike.len() == 1);
        chosen.extend(known.or_else(only).map(|one| (*one).clone()));
    }
    chosen
}

impl<I> Forwarding<I>
where
    I: NetworkBehaviour<ToSwarm = upnp::Event> + Send,
{
    fn with(search: fn() -> I, leaves_from: fn() -> Option<Ipv4Addr>) -> Self {
        Self {
            inner: None,
            search,
            leaves_from,
            listening: Vec::new(),
            shown: Vec::new(),
            forwarded: Vec::new(),
            is_over: false,
            since: Instant::now(),
            look: Box::pin(tokio::time::sleep(SETTLES)),
            events: VecDeque::new(),
        }
    }

    fn changed(&mut self) {
        let settled = Instant::now() + SETTLES;
        if self.look.deadline() > settled {
            self.look.as_mut().reset(settled);
        }
    }

    fn look_again(&mut self) {
        self.look.as_mut().reset(Instant::now() + LOOKS);
        let wanted = choose(&self.listening, &self.shown, (self.leaves_from)());
        let is_gone = self.shown.iter().any(|shown| !wanted.contains(shown));
        let is_new = wanted.iter().any(|wanted| !self.shown.contains(wanted));
        let in_vain = self.forwarded.is_empty() && self.since.elapsed() >= ANEW;
        if is_gone || in_vain || (is_new && (self.is_over || self.inner.is_none())) {
            self.begin_anew(wanted);
            return;
        }
        if let Some(inner) = &mut self.inner {
            for (listener_id, addr) in wanted.iter().filter(|wanted| !self.shown.contains(wanted)) {
                inner.on_swarm_event(FromSwarm::NewListenAddr(NewListenAddr { listener_id: *listener_id, addr }));
            }
        }
        self.shown = wanted;
    }

    /// The library would forget nothing of what it asked for an address that went, nor search for another router.
    fn begin_anew(&mut self, wanted: Vec<Listened>) {
        if let Some(mut old) = self.inner.take()
            && !self.forwarded.is_empty()
        {
            for (listener_id, addr) in self.shown.iter().filter(|shown| !wanted.contains(shown)) {
                let listener_id = *listener_id;
                old.on_swarm_event(FromSwarm::ExpiredListenAddr(ExpiredListenAddr { listener_id, addr }));
            }
            // It asks the router to forward to these no longer.
            tokio::spawn(tokio::time::timeout(
                LEAVES,
                std::future::poll_fn(move |cx| -> Poll<()> {
                    while old.poll(cx).is_ready() {}
                    Poll::Pending
                }),
            ));
        }
        let gone = self.forwarded.drain(..);
        self.events.extend(
            gone.map(|(local_addr, external_addr)| upnp::Event::ExpiredExternalAddr { local_addr, external_addr }),
        );
        (self.is_over, self.since) = (false, Instant::now());
        if !wanted.is_empty() {
            let mut inner = (self.search)();
            for (listener_id, addr) in &wanted {
                inner.on_swarm_event(FromSwarm::NewListenAddr(NewListenAddr { listener_id: *listener_id, addr }));
            }
            self.inner = Some(inner);
        }
        self.shown = wanted;
    }

    fn heard(&mut self, event: &upnp::Event) {
        match event {
            upnp::Event::NewExternalAddr { local_addr, external_addr } => {
                self.forwarded.retain(|(_, known)| known != external_addr);
                self.forwarded.push((local_addr.clone(), external_addr.clone()));
            }
            upnp::Event::ExpiredExternalAddr { external_addr, .. } => {
                self.forwarded.retain(|(_, known)| known != external_addr);
                // It is asked again after that time where the library does not get it back.
                self.since = Instant::now();
            }
            upnp::Event::GatewayNotFound | upnp::Event::NonRoutableGateway => self.is_over = true,
        }
    }
}

impl<I> NetworkBehaviour for Forwarding<I>
where
    I: NetworkBehaviour<ConnectionHandler = dummy::ConnectionHandler, ToSwarm = upnp::Event> + Send,
{
    type ConnectionHandler = dummy::ConnectionHandler;
    type ToSwarm = upnp::Event;

    fn handle_established_inbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn handle_established_outbound_connection(
        &mut self,
        _: ConnectionId,
        _: PeerId,
        _: &Multiaddr,
        _: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        Ok(dummy::ConnectionHandler)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::NewListenAddr(NewListenAddr { listener_id, addr }) if is_behind_router(addr) => {
                self.listening.push((listener_id, addr.clone()));
                self.changed();
            }
            FromSwarm::ExpiredListenAddr(ExpiredListenAddr { listener_id, addr }) if is_behind_router(addr) => {
                self.listening.retain(|(id, known)| *id != listener_id || known != addr);
                self.changed();
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Poll::Ready(ToSwarm::GenerateEvent(event));
            }
            if self.look.as_mut().poll(cx).is_ready() {
                self.look_again();
                continue;
            }
            let Some(inner) = &mut self.inner else { return Poll::Pending };
            match ready!(inner.poll(cx)) {
                // The event that follows says so, and more.
                ToSwarm::ExternalAddrConfirmed(_) | ToSwarm::ExternalAddrExpired(_) => {}
                ToSwarm::GenerateEvent(event) => {
                    self.heard(&event);
                    return Poll::Ready(ToSwarm::GenerateEvent(event));
                }
                // The library does nothing else.
                other => return Poll::Ready(other),
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What the library was told, over all searches.
    type Log = Arc<Mutex<Vec<String>>>;

    thread_local! {
        static LOG: Log = Log::default();
        static LEAVES_FROM: std::cell::Cell<Option<Ipv4Addr>> = const { std::cell::Cell::new(None) };
    }

    struct Search {
        log: Log,
        says: VecDeque<ToSwarm<upnp::Event, std::convert::Infallible>>,
    }

    impl Search {
        fn begin() -> Self {
            let log = LOG.with(Arc::clone);
            log.lock().unwrap().push("search".to_owned());
            Search { log, says: VecDeque::new() }
        }
    }

    impl NetworkBehaviour for Search {
        type ConnectionHandler = dummy::ConnectionHandler;
        type ToSwarm = upnp::Event;

        fn handle_established_inbound_connection(
            &mut self,
            _: ConnectionId,
            _: PeerId,
            _: &Multiaddr,
            _: &Multiaddr,
        ) -> Result<THandler<Self>, ConnectionDenied> {
            Ok(dummy::ConnectionHandler)
        }

        fn handle_established_outbound_connection(
            &mut self,
            _: ConnectionId,
            _: PeerId,
            _: &Multiaddr,
            _: Endpoint,
            _: PortUse,
        ) -> Result<THandler<Self>, ConnectionDenied> {
            Ok(dummy::ConnectionHandler)
        }

        fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
            let said = match event {
                FromSwarm::NewListenAddr(NewListenAddr { addr, .. }) => format!("+{addr}"),
                FromSwarm::ExpiredListenAddr(ExpiredListenAddr { addr, .. }) => format!("-{addr}"),
                _ => return,
            };
            self.log.lock().unwrap().push(said);
        }

        fn on_connection_handler_event(&mut self, _: PeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
            match event {}
        }

        fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
            self.says.pop_front().map_or(Poll::Pending, Poll::Ready)
        }
    }

    struct Home {
        forwarding: Forwarding<Search>,
        listener: ListenerId,
    }

    impl Home {
        fn new(leaves_from: &str) -> Self {
            let forwarding = Forwarding::with(Search::begin, || LEAVES_FROM.get());
            let home = Home { forwarding, listener: ListenerId::next() };
            home.leaves_from(leaves_from);
            LOG.with(Arc::clone).lock().unwrap().clear();
            home
        }

        fn leaves_from(&self, ip: &str) {
            LEAVES_FROM.set(ip.parse().ok());
        }

        fn listens(&mut self, addresses: &[&str]) {
            for address in addresses {
                let (listener_id, addr) = (self.listener, &address.parse().unwrap());
                let event = FromSwarm::NewListenAddr(NewListenAddr { listener_id, addr });
                self.forwarding.on_swarm_event(event);
            }
        }

        fn is_deaf(&mut self, address: &str) {
            let (listener_id, addr) = (self.listener, &address.parse().unwrap());
            self.forwarding.on_swarm_event(FromSwarm::ExpiredListenAddr(ExpiredListenAddr { listener_id, addr }));
        }

        fn polled(&mut self) -> Vec<String> {
            let mut cx = Context::from_waker(std::task::Waker::noop());
            let mut told = Vec::new();
            while let Poll::Ready(event) = self.forwarding.poll(&mut cx) {
                let ToSwarm::GenerateEvent(event) = event else { unreachable!("{event:?}") };
                told.push(match event {
                    upnp::Event::NewExternalAddr { external_addr, .. } => format!("+{external_addr}"),
                    upnp::Event::ExpiredExternalAddr { external_addr, .. } => format!("-{external_addr}"),
                    other => format!("{other:?}"),
                });
            }
            told
        }

        fn router_says(&mut self, event: upnp::Event) -> Vec<String> {
            let says = &mut self.forwarding.inner.as_mut().unwrap().says;
            if let upnp::Event::NewExternalAddr { external_addr, .. } = &event {
                says.push_back(ToSwarm::ExternalAddrConfirmed(external_addr.clone()));
            }
            says.push_back(ToSwarm::GenerateEvent(event));
            self.polled()
        }

        /// When so much time has passed: what the library is told by then, and what others are.
        fn after(&mut self, time: Duration) -> (Vec<String>, Vec<String>) {
            let (forwarding, now) = (&mut self.forwarding, Instant::now());
            forwarding.since = forwarding.since.checked_sub(time).unwrap();
            if forwarding.look.deadline() <= now + time {
                forwarding.look_again();
            }
            let told = self.polled();
            (std::mem::take(&mut *LOG.with(Arc::clone).lock().unwrap()), told)
        }
    }

    fn forwards(to: &str, at: &str) -> upnp::Event {
        upnp::Event::NewExternalAddr { local_addr: to.parse().unwrap(), external_addr: at.parse().unwrap() }
    }

    const NOTHING: [String; 0] = [];
    const DOCKER: [&str; 2] = ["/ip4/172.17.0.1/tcp/4602", "/ip4/172.17.0.1/udp/4602/quic-v1"];
    const LAN: [&str; 2] = ["/ip4/192.168.1.5/tcp/4602", "/ip4/192.168.1.5/udp/4602/quic-v1"];
    const WAN: [&str; 2] = ["/ip4/198.51.100.7/tcp/4602", "/ip4/198.51.100.7/udp/4602/quic-v1"];

    #[tokio::test]
    async fn of_each_port_the_router_is_asked_for_the_address_that_leads_to_it() {
        let mut home = Home::new("192.168.1.5");
        home.listens(&DOCKER);
        home.listens(&["/ip4/127.0.0.1/tcp/4602", "/ip6/2001:db8::7/tcp/4602", "/ip4/198.51.100.7/tcp/4602"]);
        home.listens(&LAN);
        let relay = PeerId::random();
        home.listens(&[&format!("/ip4/192.168.1.9/tcp/4602/p2p/{relay}/p2p-circuit")]);
        assert_eq!(home.polled(), NOTHING);
        let shown = ["search".to_owned(), format!("+{}", LAN[0]), format!("+{}", LAN[1])];
        assert_eq!(home.after(SETTLES).0, shown);
        for (to, at) in LAN.iter().zip(WAN) {
            assert_eq!(home.router_says(forwards(to, at)), [format!("+{at}")], "it confirms nothing");
        }
        // Another network of containers comes, and both go.
        home.listens(&["/ip4/172.18.0.1/tcp/4602"]);
        assert_eq!(home.after(SETTLES).0, NOTHING);
        for gone in DOCKER.iter().chain(&["/ip4/172.18.0.1/tcp/4602"]) {
            home.is_deaf(gone);
        }
        assert_eq!(home.after(ANEW), (Vec::new(), Vec::new()), "what is forwarded stays");
    }

    #[tokio::test]
    async fn where_another_way_leads_out_another_router_is_searched() {
        let mut home = Home::new("192.168.1.5");
        home.listens(&LAN);
        home.listens(&["/ip4/10.0.0.9/tcp/4602"]);
        home.after(SETTLES);
        home.router_says(forwards(LAN[0], WAN[0]));
        home.router_says(forwards(LAN[1], WAN[1]));
        home.leaves_from("10.0.0.9");
        let (library, told) = home.after(LOOKS);
        let anew =
            [format!("-{}", LAN[0]), "search".to_owned(), "+/ip4/10.0.0.9/tcp/4602".into(), format!("+{}", LAN[1])];
        assert_eq!(library, anew);
        assert_eq!(told, WAN.map(|at| format!("-{at}")));
        // And nothing is searched where nothing is left.
        home.is_deaf("/ip4/10.0.0.9/tcp/4602");
        LAN.iter().for_each(|gone| home.is_deaf(gone));
        assert_eq!(home.after(SETTLES), (Vec::new(), Vec::new()));
        assert_eq!(home.after(ANEW), (Vec::new(), Vec::new()));
        home.listens(&LAN);
        assert_eq!(home.after(SETTLES).0.len(), 3);
    }

    #[tokio::test]
    async fn where_it_is_not_known_which_leads_to_the_router_it_is_asked_for_none_or_the_only_one() {
        let mut home = Home::new("");
        home.listens(&DOCKER[..1]);
        home.listens(&LAN);
        assert_eq!(home.after(SETTLES).0, ["search".to_owned(), format!("+{}", LAN[1])]);
        home.leaves_from("192.168.1.5");
        assert_eq!(home.after(LOOKS).0, [format!("+{}", LAN[0])]);
        home.router_says(forwards(LAN[0], WAN[0]));
        home.leaves_from("");
        home.listens(&DOCKER[1..]);
        assert_eq!(home.after(SETTLES), (Vec::new(), Vec::new()), "what was known stays");
    }

    #[tokio::test]
    async fn a_router_that_was_not_there_or_forwards_nothing_is_searched_again() {
        let mut home = Home::new("192.168.1.5");
        home.listens(&LAN[..1]);
        home.after(SETTLES);
        assert_eq!(home.router_says(upnp::Event::GatewayNotFound), ["GatewayNotFound"]);
        assert_eq!(home.after(LOOKS).0, NOTHING);
        home.listens(&LAN[1..]);
        let all = ["search".to_owned(), format!("+{}", LAN[0]), format!("+{}", LAN[1])];
        assert_eq!(home.after(SETTLES).0, all, "for one that came later, too");
        assert_eq!(home.after(ANEW).0, all);
        home.router_says(forwards(LAN[0], WAN[0]));
        assert_eq!(home.after(ANEW).0, NOTHING);
        let (local_addr, external_addr) = (LAN[0].parse().unwrap(), WAN[0].parse().unwrap());
        home.router_says(upnp::Event::ExpiredExternalAddr { local_addr, external_addr });
        assert_eq!(home.after(LOOKS).0, NOTHING, "the library asks again by itself at first");
        assert_eq!(home.after(ANEW).0, all);
    }
}
