//! Whether others get through to this node, and what it does about it: it lets peers try (AutoNAT), asks the router for
//! ports (UPnP), and behind a translation that lets nobody in it takes a slot at a relay, over which two nodes agree to
//! dial each other at the same moment (DCUtR). What a relay carries is for that agreement; goods go directly.

mod circuits;
mod dial_backs;
mod forwarding;
mod noes;
mod observed;
mod ports;
mod probing;
mod punching;
mod relaying;
mod roads;
mod state;

pub use circuits::CircuitLimit;
pub(crate) use circuits::Circuits;
pub(crate) use dial_backs::DialBacks;
pub(crate) use forwarding::Forwarding;
pub(crate) use ports::give_back;
pub(crate) use probing::Probing;
pub(crate) use punching::Punching;
pub use relaying::RelayConfig;
pub(crate) use relaying::{Members, relay_config};
pub(crate) use state::ReachState;

use protocol::{Address, PeerId};

/// What a node does to be reached, and for others to be.
#[derive(Clone, Debug, Default)]
pub struct ReachConfig {
    /// Has peers try whether they get through: for nodes that serve.
    pub probe: bool,
    /// Takes slots at relays for as long as nobody is known to get through directly, for which it has peers try, too.
    pub reserve: bool,
    /// Reaches peers behind a translation through their relays, and makes such a connection a direct one. A node that
    /// listens nowhere begins to listen, on ports chosen by the system, when it first needs to.
    pub punch: bool,
    /// Carries connections of others.
    pub relay: RelayConfig,
    /// Dials peers that ask whether they can be reached, at the address that they come from.
    pub dial_back: bool,
    /// Asks the router to forward the listening ports.
    pub upnp: bool,
    /// Finds peers on the local network by multicast, and is found.
    pub lan: bool,
}

/// What is known about who gets through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reachability {
    /// Nobody has tried yet.
    #[default]
    Unknown,
    /// Somebody tried, and nobody got through.
    Private,
    /// Somebody got through.
    Public,
}

impl Reachability {
    /// For people and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Reachability::Unknown => "unknown",
            Reachability::Private => "private",
            Reachability::Public => "public",
        }
    }
}

/// What became of asking the router for ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PortMapping {
    /// Not asked: switched off, or the node listens at no address that a router translates.
    #[default]
    Off,
    /// No answer yet.
    Searching,
    /// A router answers, and forwards nothing.
    Refused,
    /// No router answers.
    NoGateway,
    /// The router has no public address itself.
    NotPublic,
    /// The router says that it forwards ports at these addresses.
    Mapped(Vec<Address>),
}

/// A slot at a relay, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelaySlot {
    /// The relay.
    pub relay: PeerId,
    /// Where peers reach this node through it; empty without a slot.
    pub addresses: Vec<Address>,
    /// Why there is no slot, where one is needed.
    pub trouble: Option<String>,
}

/// An address that a peer tried, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// The address.
    pub address: Address,
    /// Why nobody got through there.
    pub why_not: Option<String>,
    /// When: one that others got through to is tried again each hour; one that failed when the node moves to another network,
    /// and each hour while none is reached.
    pub at: tokio::time::Instant,
}

/// How a node can be reached, as it knows itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// The verdict of those who tried.
    pub reachability: Reachability,
    /// Addresses that are configured, that somebody got through to, or that a router says it forwards.
    pub external: Vec<Address>,
    /// Addresses listened on.
    pub listening: Vec<Address>,
    /// What was tried, the newest result of each address.
    pub tried: Vec<Tried>,
    /// Ports at the router.
    pub port_mapping: PortMapping,
    /// Slots at relays.
    pub slots: Vec<RelaySlot>,
    /// Whether this node relays for others.
    pub relays: bool,
}

impl Reach {
    /// Addresses to tell others, the most useful first: where somebody got through, through relays, and what is listened
    /// on, which leads here from the same local network. As others pass only the first few on, there is one of each relay and
    /// transport before the rest of the relays'. Those of this machine alone are told only if there is nothing else:
    /// elsewhere they lead to others.
    pub fn announced(&self) -> Vec<Address> {
        let mut relayed: Vec<(usize, bool, &Address)> = Vec::new();
        for slot in &self.slots {
            for quic in [false, true] {
                let over = slot.addresses.iter().filter(|address| address.as_str().contains("/quic") == quic);
                relayed.extend(over.enumerate().map(|(n, address)| (n, quic, address)));
            }
        }
        relayed.sort_by_key(|(n, quic, _)| (*n, *quic));
        let (first, rest): (Vec<_>, Vec<_>) = relayed.into_iter().partition(|(n, ..)| *n == 0);
        let [first, rest] = [first, rest].map(|relayed| relayed.into_iter().map(|(.., address)| address));
        let mut announced: Vec<Address> = Vec::new();
        for address in self.external.iter().chain(first).chain(&self.listening).chain(rest) {
            if !announced.contains(address) {
                announced.push(address.clone());
            }
        }
        if announced.iter().any(|address| !crate::address::is_loopback(address)) {
            announced.retain(|address| !crate::address::is_loopback(address));
        }
        announced
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_second_relay_and_the_local_network_come_before_more_of_the_first() {
        let at = |text: &str| Address::new(text).unwrap();
        let slot = |n: u8| {
            let relay = protocol::Keypair::from_seed(&[n; 32]).peer_id();
            let of = |end: &str| at(&format!("/ip4/203.0.113.{n}/{end}/p2p/{relay}/p2p-circuit"));
            let addresses = vec![of("tcp/1"), of("tcp/2"), of("udp/1/quic-v1"), of("udp/2/quic-v1")];
            RelaySlot { relay, addresses, trouble: None }
        };
        let (one, two) = (slot(1), slot(2));
        let of = |slot: &RelaySlot, n: usize| slot.addresses.get(n).cloned().unwrap();
        let (home, lan) = (at("/ip4/127.0.0.1/tcp/1"), at("/ip4/192.168.1.5/tcp/1"));
        let reach =
            Reach { slots: vec![one.clone(), two.clone()], listening: vec![home, lan.clone()], ..Reach::default() };
        let first = [of(&one, 0), of(&two, 0), of(&one, 2), of(&two, 2), lan];
        let rest = [of(&one, 1), of(&two, 1), of(&one, 3), of(&two, 3)];
        assert_eq!(reach.announced(), [first.as_slice(), rest.as_slice()].concat());
    }
}
