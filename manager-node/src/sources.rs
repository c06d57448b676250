//! Which seeders a client is sent to: they hold the content, reported lately, did not fail an audit, do not want to be rid
//! of it; those with room for another client first, and each in another network before a second one of any.

use std::collections::HashMap;
use std::net::Ipv6Addr;

use protocol::{Address, Digest, PeerAddrs, PeerId};
use rand::RngExt;
use store::{StoreError, Txn};

use crate::audit_fetch;
use crate::handover;
use crate::registry::is_here;
use crate::tables::{HOLDERS, SEEDERS, SeederRecord};

/// Holders of one content that are looked at when sources are chosen: several times what a lease can list, so that
/// there is a choice, and few enough to read at every release.
const HOLDERS_LOOKED_AT: usize = 256;
/// Addresses of one source that are passed on: one of each transport and IP version.
pub(crate) const SOURCE_ADDRS: usize = 4;

/// Seeders other than the origin that could serve the content now.
pub(crate) fn holders(
    txn: &impl Txn,
    manifest: &Digest,
    origin: Option<PeerId>,
    now: u64,
    away_ms: u64,
) -> Result<Vec<(PeerId, SeederRecord)>, StoreError> {
    // Begins anywhere, so that content with very many holders does not burden the same few.
    let start = PeerId::from_bytes(rand::rng().random());
    let mut found = Vec::new();
    for peer in holders_from(txn, manifest, start)? {
        if Some(peer) == origin {
            continue;
        }
        match SEEDERS.get(txn, &peer)? {
            Some(record)
                if is_here(txn, &peer, &record, now, away_ms)?
                    && !record.addrs.is_empty()
                    && !audit_fetch::has_failed(txn, &peer)?
                    && !handover::is_leaving(txn, peer, manifest, now)? =>
            {
                found.push((peer, record));
            }
            _ => {}
        }
    }
    Ok(found)
}

fn holders_from(txn: &impl Txn, manifest: &Digest, start: PeerId) -> Result<Vec<PeerId>, StoreError> {
    let (low, high) = (PeerId::from_bytes([0; 32]), PeerId::from_bytes([0xff; 32]));
    let mut page = HOLDERS.range(txn, (*manifest, start)..=(*manifest, high), HOLDERS_LOOKED_AT)?;
    let left = HOLDERS_LOOKED_AT - page.len();
    page.extend(HOLDERS.range(txn, (*manifest, low)..(*manifest, start), left)?);
    Ok(page.into_iter().map(|((_, peer), _)| peer).collect())
}

/// At most `limit` of these: those that are not full (the first part) before those that are; then one of each network
/// before the second of any; then the freshest.
pub(crate) fn spread(mut found: Vec<(bool, PeerId, SeederRecord)>, limit: usize) -> Vec<PeerAddrs> {
    found.sort_by_key(|(full, _, record)| (*full, std::cmp::Reverse(record.last_report)));
    let mut seen: HashMap<String, usize> = HashMap::new();
    let mut ranked: Vec<(bool, usize, PeerAddrs)> = found
        .into_iter()
        .map(|(full, peer, mut record)| {
            let turn = seen.entry(record.addrs.first().map(network_of).unwrap_or_default()).or_default();
            *turn += 1;
            record.addrs.truncate(SOURCE_ADDRS);
            (full, *turn, PeerAddrs::new(peer, record.addrs))
        })
        .collect();
    ranked.sort_by_key(|(full, turn, _)| (*full, *turn));
    ranked.into_iter().take(limit).map(|(_, _, addrs)| addrs).collect()
}

/// What is probably one operator's network: an IPv4 /24, an IPv6 /48, or a host name.
fn network_of(address: &Address) -> String {
    let mut parts = address.as_str().split('/').skip(1);
    let (kind, host) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let prefix = match kind {
        "ip4" => host.split('.').take(3).collect::<Vec<_>>().join("."),
        // Written in many ways: the first three of its eight groups.
        "ip6" => host.parse().map_or_else(
            |_| host.to_owned(),
            |ip: Ipv6Addr| {
                let [first, second, third, ..] = ip.segments();
                format!("{first:x}:{second:x}:{third:x}")
            },
        ),
        _ => host.to_owned(),
    };
    format!("{kind}/{prefix}")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_what_one_operator_has() {
        let network = |text: &str| network_of(&Address::new(text).unwrap());
        assert_eq!(network("/ip4/192.0.2.1/tcp/1"), network("/ip4/192.0.2.250/udp/2/quic-v1"));
        assert_ne!(network("/ip4/192.0.2.1/tcp/1"), network("/ip4/192.0.3.1/tcp/1"));
        assert_eq!(network("/ip6/2001:db8:1::1/tcp/1"), network("/ip6/2001:db8:1:ffff:1:2:3:4/tcp/1"));
        assert_ne!(network("/ip6/2001:db8:1::1/tcp/1"), network("/ip6/2001:db8:2::1/tcp/1"));
        assert_ne!(network("/ip6/2001:db8::1/tcp/1"), network("/ip6/2001:db8:1::1/tcp/1"));
        assert_ne!(network("/dns4/a.example/tcp/1"), network("/dns4/b.example/tcp/1"));
    }
}
