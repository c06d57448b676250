//! Ports that the system chose stay the same after a restart: join lines and tickets name them, and a node that came
//! back somewhere else could not be found.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use protocol::Address;

const FILE: &str = "ports";
/// Before the kind of a port that IPv6 addresses have.
const IP6: &str = "ip6/";

/// The configured addresses, with port 0 replaced by the port that was chosen at the first start.
///
/// # Errors
/// The file `ports` in `dir` is there but cannot be read.
pub fn recall(dir: &Path, configured: &[Address]) -> io::Result<Vec<Address>> {
    let text = match fs::read_to_string(dir.join(FILE)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(configured.to_vec()),
        Err(error) => return Err(error),
    };
    let ports: Vec<(&str, u16)> = text
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(kind, port)| Some((kind, port.trim().parse().ok()?)))
        .collect();
    let known = |address: &Address| {
        // IPv6 has ports of its own; where none was written down, as by older versions, the one of its kind is taken.
        let own = |kind: &&str| address.as_str().starts_with("/ip6/") && kind.starts_with(IP6);
        let (of_family, others): (Vec<_>, Vec<_>) = ports.iter().partition(|(kind, _)| own(kind));
        let plain = others.into_iter().filter(|(kind, _)| !kind.starts_with(IP6));
        for (kind, port) in of_family.into_iter().chain(plain) {
            let kind = kind.trim_start_matches(IP6);
            let (open, fixed) = (format!("/{kind}/0"), format!("/{kind}/{port}"));
            let text = address.as_str();
            let at_end = text.ends_with(&open) || text.contains(&format!("{open}/"));
            if at_end && let Ok(address) = Address::new(&text.replacen(&open, &fixed, 1)) {
                return address;
            }
        }
        address.clone()
    };
    Ok(configured.iter().map(known).collect())
}

/// Did a node listen here before, so that what it keeps must be here as well?
pub fn is_remembered(dir: &Path) -> bool {
    // What cannot be looked at is no reason to believe that there is nothing.
    dir.join(FILE).try_exists().unwrap_or(true)
}

/// Writes down the ports of the addresses that a node listens on.
///
/// # Errors
/// The file `ports` in `dir` cannot be written.
pub fn remember(dir: &Path, actual: &[Address]) -> io::Result<()> {
    let mut text = String::new();
    for kind in ["tcp", "udp"] {
        let port = |v6: bool| {
            let mut of_family = actual.iter().filter(|address| address.as_str().starts_with("/ip6/") == v6);
            of_family.find_map(|address| {
                let mut parts = address.as_str().split('/');
                parts.find(|part| *part == kind)?;
                parts.next()?.parse::<u16>().ok()
            })
        };
        for (family, port) in [("", port(false).or(port(true))), (IP6, port(true))] {
            if let Some(port) = port {
                text.push_str(&format!("{family}{kind} {port}\n"));
            }
        }
    }
    let partial = dir.join("ports.partial");
    let mut file = File::create(&partial)?;
    file.write_all(text.as_bytes())?;
    // On disk before it has the name: an empty one after a power cut would mean other ports than tickets and routers say.
    file.sync_all()?;
    fs::rename(partial, dir.join(FILE))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<Address> {
        texts.iter().map(|t| Address::new(t).unwrap()).collect()
    }

    #[test]
    fn chosen_ports_come_back_and_configured_ones_win() {
        let dir = tempfile::tempdir().unwrap();
        let open = addresses(&["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1", "/ip6/::1/tcp/4601"]);
        assert_eq!(recall(dir.path(), &open).unwrap(), open);
        remember(dir.path(), &addresses(&["/ip4/127.0.0.1/tcp/4100", "/ip4/127.0.0.1/udp/4200/quic-v1"])).unwrap();
        let expected = addresses(&["/ip4/127.0.0.1/tcp/4100", "/ip4/127.0.0.1/udp/4200/quic-v1", "/ip6/::1/tcp/4601"]);
        assert_eq!(recall(dir.path(), &open).unwrap(), expected);
    }

    #[test]
    fn each_family_gets_its_own_port_back() {
        let dir = tempfile::tempdir().unwrap();
        let open = addresses(&["/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/0", "/ip6/::/udp/0/quic-v1"]);
        let chosen = ["/ip6/::1/tcp/4200", "/ip4/127.0.0.1/tcp/4100", "/ip6/::1/udp/4300/quic-v1"];
        remember(dir.path(), &addresses(&chosen)).unwrap();
        let expected = addresses(&["/ip4/0.0.0.0/tcp/4100", "/ip6/::/tcp/4200", "/ip6/::/udp/4300/quic-v1"]);
        assert_eq!(recall(dir.path(), &open).unwrap(), expected);
        // As older versions wrote it.
        fs::write(dir.path().join(FILE), "tcp 4100\n").unwrap();
        let expected = addresses(&["/ip4/0.0.0.0/tcp/4100", "/ip6/::/tcp/4100", "/ip6/::/udp/0/quic-v1"]);
        assert_eq!(recall(dir.path(), &open).unwrap(), expected);
    }
}
