//! Whether this machine has a way to a seeder at all. Without a network that is said at once, where a handshake by
//! datagrams would be waited for until its time is over.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use protocol::{Address, PeerAddrs};

/// Addresses are known, and the system has no route to any of them. It is asked for its routes; nothing is sent.
pub(super) fn is_missing(to: &PeerAddrs) -> bool {
    !to.addrs.is_empty() && to.addrs.iter().all(is_unroutable)
}

/// False for what is not known, as for names.
fn is_unroutable(address: &Address) -> bool {
    let mut parts = address.as_str().split('/').skip(1);
    let (Some("ip4" | "ip6"), Some(ip)) = (parts.next(), parts.next()) else { return false };
    let Ok(ip) = ip.parse::<IpAddr>() else { return false };
    let own = if ip.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    match UdpSocket::bind((own, 0)) {
        // Which port does not matter.
        Ok(socket) => socket.connect((ip, 9)).is_err_and(|error| {
            matches!(error.kind(), ErrorKind::NetworkUnreachable | ErrorKind::HostUnreachable | ErrorKind::NetworkDown)
        }),
        // A system without IPv6.
        Err(_) => ip.is_ipv6(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use protocol::PeerId;

    use super::*;

    #[test]
    fn what_is_near_or_not_known_is_never_said_to_be_out_of_reach() {
        let peer = PeerId::from_bytes([1; 32]);
        assert!(!is_missing(&peer.into()));
        for near in ["/ip4/127.0.0.1/tcp/4000", "/dns/seeder.example/tcp/4000"] {
            assert!(!is_missing(&PeerAddrs::new(peer, vec![Address::new(near).unwrap()])), "{near}");
        }
    }
}
