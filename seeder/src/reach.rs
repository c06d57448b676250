//! Can others reach this seeder, and if not, what is to be done? One that nobody reaches looks healthy from inside, and
//! earns nothing.

use node::ControlError;
use protocol::Address;
use protocol::api::{MeshRequest, MeshResponse};
use serde_json::{Value, json};

use crate::context::Seeder;

/// Has the manager dial the addresses of the last report.
pub(crate) async fn check(seeder: &Seeder) -> Result<Value, ControlError> {
    let tried = match seeder.manager.ask(&MeshRequest::DialBack).await {
        Ok(MeshResponse::Reach(tried)) => tried,
        Ok(_) => {
            return Err(ControlError::new("internal", "the manager answered something else; upgrade the older one"));
        }
        Err(error) => {
            let text = format!("nobody can be asked to try: {error}");
            return Err(ControlError::new("manager-away", text));
        }
    };
    let reached: Vec<&Address> = tried.iter().filter(|(_, why)| why.is_none()).map(|(address, _)| address).collect();
    let addresses: Vec<Value> = tried
        .iter()
        .map(|(address, why)| json!({ "address": address, "reached": why.is_none(), "why_not": why }))
        .collect();
    Ok(json!({
        "reachable": !reached.is_empty(),
        "public": reached.iter().any(|address| is_public(address)),
        "addresses": addresses,
        "advice": advice(&tried, &reached),
    }))
}

/// What to do, in a line.
fn advice(tried: &[(Address, Option<String>)], reached: &[&Address]) -> &'static str {
    if tried.is_empty() {
        return "this seeder tells no address that others could use: set external in config.toml, for example \
                [\"/ip4/203.0.113.7/tcp/4602\"], and start it again";
    }
    if reached.is_empty() {
        return "nobody gets through: open the listening ports (TCP, and UDP for QUIC) in this machine's firewall, forward \
                them at the router, and set external in config.toml to the public address if it differs";
    }
    if !reached.iter().any(|address| is_public(address)) {
        return "the manager gets through, by an address of its own network only: set external in config.toml to the public \
                address for clients elsewhere";
    }
    if reached.len() < tried.len() {
        return "others get through; the addresses that failed cost them time: take them out of listen or external, or open \
                their ports";
    }
    "nothing to do"
}

/// An address that means the same everywhere.
fn is_public(address: &Address) -> bool {
    let mut parts = address.as_str().split('/').skip(1);
    match (parts.next(), parts.next()) {
        (Some("ip4"), Some(host)) => host.parse::<std::net::Ipv4Addr>().is_ok_and(|ip| {
            // 100.64.0.0/10 lies behind a provider's translation (RFC 6598).
            let [a, b, ..] = ip.octets();
            let shared = a == 100 && (64..128).contains(&b);
            !(ip.is_private() || ip.is_loopback() || ip.is_link_local() || ip.is_unspecified() || shared)
        }),
        (Some("ip6"), Some(host)) => host.parse::<std::net::Ipv6Addr>().is_ok_and(|ip| {
            !(ip.is_loopback() || ip.is_unspecified() || ip.is_unique_local() || ip.is_unicast_link_local())
        }),
        (Some("dns" | "dns4" | "dns6"), Some(_)) => true,
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_advice_fits_what_was_found() {
        let at = |text: &str| Address::new(text).unwrap();
        let (home, lan) = (at("/ip4/127.0.0.1/tcp/1"), at("/ip4/192.168.1.9/tcp/1"));
        let (open, v6) = (at("/ip4/203.0.113.7/tcp/1"), at("/ip6/fd00::1/tcp/1"));
        assert!(!is_public(&home) && !is_public(&lan) && !is_public(&v6) && is_public(&open));
        assert!(!is_public(&at("/ip4/100.100.0.1/tcp/1")) && is_public(&at("/dns4/seeder.example/tcp/1")));
        let no = || Some("timed out".to_owned());
        assert!(advice(&[], &[]).contains("external"));
        assert!(advice(&[(open.clone(), no())], &[]).contains("forward"));
        assert!(advice(&[(lan.clone(), None)], &[&lan]).contains("public address"));
        assert!(advice(&[(open.clone(), None), (lan, no())], &[&open]).contains("cost them time"));
        assert_eq!(advice(&[(open.clone(), None)], &[&open]), "nothing to do");
    }
}
