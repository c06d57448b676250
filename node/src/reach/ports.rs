//! Gives ports at the router back when the node stops. The library asks for them and renews them, but forgets them with the
//! node: for up to an hour the router would go on forwarding to a machine that listens no more, and refuse the port to
//! another one.

use std::time::Duration;

use igd_next::{PortMappingProtocol, SearchOptions};
use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol as Part;
use protocol::Address;

/// A router answers at once; one that does not has to let its own time limit pass.
const LIMIT: Duration = Duration::from_secs(2);

/// Asks the router to forward to `addresses`, which are its own, no longer. What does not succeed is noted in the log: the
/// router forgets it by itself in time.
pub(crate) async fn give_back(addresses: Vec<Address>) {
    let ports: Vec<_> = addresses.iter().filter_map(port).collect();
    if ports.is_empty() {
        return;
    }
    if tokio::time::timeout(LIMIT, give_back_ports(&ports)).await.is_err() {
        tracing::warn!("the router did not say that it forwards no longer; it forgets that by itself within an hour");
    }
}

async fn give_back_ports(ports: &[(PortMappingProtocol, u16)]) {
    let options = SearchOptions { timeout: Some(LIMIT), single_search_timeout: Some(LIMIT), ..Default::default() };
    let router = match igd_next::aio::tokio::search_gateway(options).await {
        Ok(router) => router,
        Err(error) => return tracing::warn!(%error, "the router is gone, with it the ports that it forwarded"),
    };
    for (over, port) in ports {
        match router.remove_port(*over, *port).await {
            Ok(()) => tracing::info!(%over, port, "the router forwards a port no longer"),
            Err(error) => tracing::warn!(%over, port, %error, "the router would not stop forwarding a port"),
        }
    }
}

/// What an address says about the port at the router.
fn port(address: &Address) -> Option<(PortMappingProtocol, u16)> {
    let address: Multiaddr = address.as_str().parse().ok()?;
    address.iter().find_map(|part| match part {
        Part::Tcp(port) => Some((PortMappingProtocol::TCP, port)),
        Part::Udp(port) => Some((PortMappingProtocol::UDP, port)),
        _ => None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_the_port() {
        let at = |text: &str| port(&Address::new(text).unwrap());
        assert_eq!(at("/ip4/198.51.100.7/tcp/4602"), Some((PortMappingProtocol::TCP, 4602)));
        assert_eq!(at("/ip4/198.51.100.7/udp/4603/quic-v1"), Some((PortMappingProtocol::UDP, 4603)));
        assert_eq!(at("/dns4/seeder.example"), None);
    }
}
