//! The network library has peer IDs and addresses of its own; the conversions stand here once, because accepting a
//! peer ID that is not an Ed25519 key would let someone in whom no document can name.

use std::net::IpAddr;

use libp2p::core::ConnectedPoint;
use libp2p::multiaddr::Protocol as Part;
use libp2p::{Multiaddr, identity};
use protocol::{Address, PeerId};

/// Multihash code of "the bytes themselves": the peer ID contains the public key.
const IDENTITY: u64 = 0;
/// Protobuf form of an Ed25519 public key: field 1 (type) = 1, field 2 (data) of 32 bytes.
const ED25519_PREFIX: [u8; 4] = [0x08, 0x01, 0x12, 0x20];

/// Our form of a peer ID of the network library, or nothing if it is not an Ed25519 key in an identity multihash.
pub(crate) fn peer_from_libp2p(peer: &libp2p::PeerId) -> Option<PeerId> {
    let hash = peer.as_ref();
    if hash.code() != IDENTITY {
        return None;
    }
    let key = hash.digest().strip_prefix(&ED25519_PREFIX)?;
    Some(PeerId::from_bytes(key.try_into().ok()?))
}

/// The network library's form of a peer ID. Nothing comes back for 32 bytes that are not a point on the curve.
pub(crate) fn peer_to_libp2p(peer: &PeerId) -> Option<libp2p::PeerId> {
    let key = identity::ed25519::PublicKey::try_from_bytes(peer.as_bytes()).ok()?;
    Some(identity::PublicKey::from(key).to_peer_id())
}

/// Parses an address and takes a trailing `/p2p/…` off it; an address that names another peer than `peer` is dropped.
pub(crate) fn address_to_libp2p(address: &Address, peer: &libp2p::PeerId) -> Option<Multiaddr> {
    let mut parsed: Multiaddr = address.as_str().parse().ok()?;
    if let Some(Part::P2p(named)) = parsed.iter().last() {
        if named != *peer {
            return None;
        }
        parsed.pop();
    }
    (!parsed.is_empty()).then_some(parsed)
}

/// Our form of an address, without a trailing `/p2p/…`. Nothing comes back for one that is longer than we allow.
pub(crate) fn address_from_libp2p(address: &Multiaddr) -> Option<Address> {
    let mut address = address.clone();
    if matches!(address.iter().last(), Some(Part::P2p(_))) {
        address.pop();
    }
    Address::new(&address.to_string()).ok()
}

pub(crate) fn is_relayed(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Part::P2pCircuit))
}

/// The relay of a relayed address, and where the relay is.
pub(crate) fn relay_of(address: &Multiaddr) -> Option<(libp2p::PeerId, Multiaddr)> {
    let before: Multiaddr = address.iter().take_while(|part| !matches!(part, Part::P2pCircuit)).collect();
    if before.len() == address.len() {
        return None;
    }
    match before.iter().last() {
        Some(Part::P2p(relay)) => {
            let mut at = before;
            at.pop();
            Some((relay, at))
        }
        _ => None,
    }
}

/// The relay that a connection goes over, and where the relay is by the address of the connection.
pub(crate) fn relay_over(endpoint: &ConnectedPoint) -> Option<(libp2p::PeerId, Multiaddr)> {
    match endpoint {
        ConnectedPoint::Dialer { address, .. } => relay_of(address),
        ConnectedPoint::Listener { local_addr, .. } => relay_of(local_addr),
    }
}

/// The IP address that an address begins with.
pub(crate) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Part::Ip4(ip) => Some(ip.into()),
        Part::Ip6(ip) => Some(ip.to_ipv4_mapped().map_or_else(|| ip.into(), IpAddr::from)),
        _ => None,
    }
}

/// Means the same machine everywhere.
pub(crate) fn is_public(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            // 100.64.0.0/10 lies behind a provider's translation (RFC 6598).
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            let no_host = a == 0 || ip.is_multicast() || a >= 240;
            !(ip.is_private() || ip.is_loopback() || ip.is_link_local() || no_host || shared)
        }
        // All that was ever given out of the rest is for a machine, a line or an organization.
        IpAddr::V6(ip) => ip.segments().first().is_some_and(|first| first & 0xe000 == 0x2000),
    }
}

/// Both lie in one network, as far as the addresses show: the same block of those that anybody may use at home (a company or
/// an overlay network spans all of one), else the same half of an IPv4 address; the same site in IPv6.
pub(crate) fn same_network(one: &IpAddr, other: &IpAddr) -> bool {
    match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            let after = match one.octets() {
                [10, ..] => 24,
                [172, b, ..] if b & 0xf0 == 16 => 20,
                [100, b, ..] if b & 0xc0 == 64 => 22,
                _ => 16,
            };
            one.to_bits() >> after == other.to_bits() >> after
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => one.segments().iter().take(3).eq(other.segments().iter().take(3)),
        _ => false,
    }
}

/// Leads to this machine only.
pub(crate) fn is_loopback(address: &Address) -> bool {
    let text = address.as_str();
    text.starts_with("/ip4/127.") || text.starts_with("/ip6/::1/")
}

pub(crate) fn is_tcp(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Part::Tcp(_)))
}

pub(crate) fn is_direct_tcp(address: &Multiaddr) -> bool {
    !is_relayed(address) && is_tcp(address)
}

pub(crate) fn is_quic(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Part::QuicV1 | Part::Quic))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn peer_ids_go_both_ways_and_read_the_same() {
        let ours = protocol::Keypair::from_seed(&[7; 32]).peer_id();
        let theirs = peer_to_libp2p(&ours).unwrap();
        assert_eq!(theirs.to_base58(), ours.to_string());
        assert_eq!(peer_from_libp2p(&theirs), Some(ours));
    }

    #[test]
    fn a_hashed_peer_id_is_not_ours() {
        let hashed: libp2p::PeerId = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN".parse().unwrap();
        assert_eq!(peer_from_libp2p(&hashed), None);
    }

    #[test]
    fn the_peer_part_of_an_address_must_match() {
        let peer = peer_to_libp2p(&protocol::Keypair::from_seed(&[7; 32]).peer_id()).unwrap();
        let other = peer_to_libp2p(&protocol::Keypair::from_seed(&[8; 32]).peer_id()).unwrap();
        let plain = Address::new("/ip4/127.0.0.1/tcp/4001").unwrap();
        let named = Address::new(&format!("/ip4/127.0.0.1/tcp/4001/p2p/{peer}")).unwrap();
        assert_eq!(address_to_libp2p(&plain, &peer), address_to_libp2p(&named, &peer));
        assert_eq!(address_to_libp2p(&named, &other), None);
    }

    #[test]
    fn an_ip_address_is_public_or_of_one_network() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for public in ["11.0.0.1", "203.0.113.7", "2001:db8::1"] {
            assert!(is_public(&ip(public)), "{public}");
        }
        for local in ["10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255", "0.0.0.0"] {
            assert!(!is_public(&ip(local)), "{local}");
        }
        for local in ["::1", "::", "fe80::1", "fd00::1", "ff02::1", "::7f00:1", "64:ff9b::a00:1"] {
            assert!(!is_public(&ip(local)), "{local}");
        }
        assert!(same_network(&ip("192.168.1.1"), &ip("192.168.7.1")) && same_network(&ip("::1"), &ip("::1")));
        assert!(!same_network(&ip("192.168.1.1"), &ip("192.169.1.1")));
        for (one, other, outside) in [
            ("10.1.0.1", "10.250.0.1", "11.1.0.1"),
            ("172.16.0.1", "172.31.0.1", "172.32.0.1"),
            ("100.64.0.1", "100.127.0.1", "100.128.0.1"),
        ] {
            assert!(same_network(&ip(one), &ip(other)) && same_network(&ip(other), &ip(one)));
            assert!(!same_network(&ip(one), &ip(outside)) && !same_network(&ip(outside), &ip(one)));
        }
        assert!(!same_network(&ip("fd00:1::1"), &ip("fd00:2::1")) && !same_network(&ip("127.0.0.1"), &ip("::1")));
        assert_eq!(ip_of(&"/ip6/::ffff:10.0.0.1/tcp/1".parse().unwrap()), Some(ip("10.0.0.1")));
        assert_eq!(ip_of(&"/dns4/example.org/tcp/1".parse().unwrap()), None);
    }

    #[test]
    fn a_relayed_address_keeps_its_relay_and_loses_its_end() {
        let peer = peer_to_libp2p(&protocol::Keypair::from_seed(&[7; 32]).peer_id()).unwrap();
        let relay = peer_to_libp2p(&protocol::Keypair::from_seed(&[8; 32]).peer_id()).unwrap();
        let circuit = Address::new(&format!("/ip4/192.0.2.1/tcp/4001/p2p/{relay}/p2p-circuit")).unwrap();
        let named = Address::new(&format!("{circuit}/p2p/{peer}")).unwrap();
        let parsed = address_to_libp2p(&named, &peer).unwrap();
        assert_eq!(address_to_libp2p(&circuit, &peer), Some(parsed.clone()));
        assert_eq!(address_from_libp2p(&named.as_str().parse().unwrap()), Some(circuit));
        assert_eq!(relay_of(&parsed), Some((relay, "/ip4/192.0.2.1/tcp/4001".parse().unwrap())));
        assert_eq!(relay_of(&"/ip4/192.0.2.1/tcp/4001".parse().unwrap()), None);
    }
}
