//! Ports that the system chose stay the same after a restart: join lines and tickets name them, and a node that came
//! back somewhere else could not be found.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use protocol::Address;

const FILE: &str = "ports";

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
        for (kind, port) in &ports {
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
        let port = actual.iter().find_map(|address| {
            let mut parts = address.as_str().split('/');
            parts.find(|part| *part == kind)?;
            parts.next()?.parse::<u16>().ok()
        });
        if let Some(port) = port {
            text.push_str(&format!("{kind} {port}\n"));
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
}
