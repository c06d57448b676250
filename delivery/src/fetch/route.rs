//! Whether this machine has a way to a seeder at all. Without a network that is said at once, where a handshake by
//! datagrams would be waited for until its time is over.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use protocol::{Address, PeerAddrs};

/// Addresses are known, and the system has no route to any of them. It is asked for its routes; nothing is sent.
pub fn is_missing(to: &PeerAddrs) -> bool {
    !to.addrs.is_empty() && to.addrs.iter().all(is_unroutable)
}

/// The same for whom nothing comes from any more. Most nodes name a loopback address among others, which leads to them for
/// nobody but who is on their machine.
pub(super) fn is_gone(to: &PeerAddrs) -> bool {
    let mut others = to.addrs.iter().filter(|address| !is_loopback(address)).peekable();
    others.peek().is_some() && others.all(is_unroutable)
}

fn is_loopback(address: &Address) -> bool {
    let ip = address.as_str().split('/').nth(2).and_then(|ip| ip.parse::<IpAddr>().ok());
    ip.is_some_and(|ip| ip.is_loopback())
}

/// For [`answers`], over all addresses.
pub(super) const PROBE: Duration = Duration::from_millis(600);
/// Addresses that it tries.
const PROBED: u32 = 2;

/// Does the machine at one of these addresses answer, if only that nobody listens there? Then it is not the network that
/// keeps a seeder away: a handshake by datagrams is not answered at all by a machine on which it was killed. What is reached
/// through relays has its router answer for it, which says nothing. Blocks for [`PROBE`] at most.
pub(super) fn answers(to: &PeerAddrs) -> bool {
    if to.addrs.iter().any(is_relayed) {
        return false;
    }
    let mut tried = to.addrs.iter().filter_map(socket).take(PROBED as usize);
    tried.any(|at| match TcpStream::connect_timeout(&at, PROBE / PROBED) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionRefused,
    })
}

fn is_relayed(address: &Address) -> bool {
    address.as_str().split('/').any(|part| part == "p2p-circuit")
}

/// Where TCP leads directly.
fn socket(address: &Address) -> Option<SocketAddr> {
    let mut parts = address.as_str().split('/').skip(1);
    let (Some("ip4" | "ip6"), Some(ip), Some("tcp"), Some(port), None | Some("p2p")) =
        (parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    // Behind a peer's name there may be another one, of a relay's client.
    let ends = parts.count() <= 1;
    Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?)).filter(|_| ends)
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
        assert!(!is_missing(&peer.into()) && !is_gone(&peer.into()));
        for near in ["/ip4/127.0.0.1/tcp/4000", "/dns/seeder.example/tcp/4000"] {
            let at = PeerAddrs::new(peer, vec![Address::new(near).unwrap()]);
            assert!(!is_missing(&at) && !is_gone(&at), "{near}");
        }
    }

    #[test]
    fn a_machine_answers_also_where_nobody_listens() {
        let peer = PeerId::from_bytes([1; 32]);
        let at = |address: &str| PeerAddrs::new(peer, vec![Address::new(address).unwrap()]);
        // Just been let go, so that nobody else listens on it.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(answers(&at(&format!("/ip4/127.0.0.1/tcp/{port}"))));
        assert!(answers(&at(&format!("/ip4/127.0.0.1/tcp/{port}/p2p/{peer}"))));
        for other in ["/ip4/127.0.0.1/udp/4000/quic-v1", "/dns/seeder.example/tcp/4000"] {
            assert!(!answers(&at(other)), "{other}");
        }
        assert!(!answers(&at(&format!("/ip4/127.0.0.1/tcp/{port}/p2p/{peer}/p2p-circuit/p2p/{peer}"))));
        assert!(!answers(&peer.into()));
        let relayed = format!("/ip4/127.0.0.1/tcp/{port}/p2p/{peer}/p2p-circuit");
        let both = [format!("/ip4/127.0.0.1/tcp/{port}"), relayed].map(|address| Address::new(&address).unwrap());
        assert!(!answers(&PeerAddrs::new(peer, both.into())), "its router answers");
    }
}
