//! Which seeders a client is sent to: they hold the content, reported lately, did not fail an audit, do not want to be rid
//! of it; those with room for another client first, and each in another network before a second one of any.

use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex, PoisonError};

use protocol::{Address, Digest, PeerAddrs, PeerId};
use rand::RngExt;
use store::{Db, StoreError, Txn};

use crate::audit_fetch;
use crate::handover;
use crate::registry::is_heard;
use crate::tables::{HOLDERS, LEAVING, SEEDERS, STOPPED, SeederRecord};

/// Holders of one content that are looked at when sources are chosen: several times what a lease can list, so that
/// there is a choice, and few enough to read for a release.
const HOLDERS_LOOKED_AT: usize = 256;
/// Addresses of one source that are passed on: one of each transport and IP version.
pub(crate) const SOURCE_ADDRS: usize = 4;
/// Contents whose holders are remembered: what is sold most, at some 64 KiB for one with very many holders.
const REMEMBERED: usize = 64;

/// One seeder that has a content, as the tables have it.
pub(crate) struct Holder {
    pub(crate) peer: PeerId,
    last_report: u64,
    /// At most [`SOURCE_ADDRS`], and at least one.
    addrs: Vec<Address>,
    network: String,
    /// When it last said that it wants to be rid of this content.
    unwanted_since: Option<u64>,
}

impl Holder {
    /// Whether it is taken to be there, and to keep the content.
    pub(crate) fn serves(&self, now: u64, away_ms: u64) -> bool {
        is_heard(self.last_report, now, away_ms)
            && self.unwanted_since.is_none_or(|said_at| !handover::still_meant(said_at, now))
    }
}

/// Who holds what is being sold. On a launch day one product is sold thousands of times between two reports of its
/// seeders: going through their records each time would take longer than signing the lease.
#[derive(Default)]
pub(crate) struct Holders(Mutex<HashMap<Digest, Remembered>>);

struct Remembered {
    /// Of the [`TABLES`], before they were read.
    changes: u64,
    holders: Arc<[Holder]>,
}

/// What [`holders`] reads.
const TABLES: [&str; 5] = [HOLDERS.name(), SEEDERS.name(), STOPPED.name(), audit_fetch::FAILED.name(), LEAVING.name()];

impl Holders {
    /// Seeders that could serve the content, the origin among them, as the tables have it now.
    pub(crate) fn of(&self, db: &Db, manifest: &Digest) -> Result<Arc<[Holder]>, StoreError> {
        let changes = db.changes(&TABLES);
        let remembered = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = remembered().get(manifest).filter(|known| known.changes == changes) {
            return Ok(Arc::clone(&known.holders));
        }
        let holders: Arc<[Holder]> = db.read(|txn| holders(txn, manifest))?.into();
        let mut remembered = remembered();
        if remembered.len() >= REMEMBERED && !remembered.contains_key(manifest) {
            // Those of before the last change are of no use; if there is none, who is sold now comes again at once.
            remembered.retain(|_, known| known.changes == changes);
            if remembered.len() >= REMEMBERED {
                remembered.clear();
            }
        }
        remembered.insert(*manifest, Remembered { changes, holders: Arc::clone(&holders) });
        Ok(holders)
    }
}

fn holders(txn: &impl Txn, manifest: &Digest) -> Result<Vec<Holder>, StoreError> {
    // Begins anywhere, so that content with very many holders does not burden the same few.
    let start = PeerId::from_bytes(rand::rng().random());
    let mut found = Vec::new();
    for peer in holders_from(txn, manifest, start)? {
        let Some(SeederRecord { last_report, mut addrs, .. }) = SEEDERS.get(txn, &peer)? else { continue };
        let Some(network) = addrs.first().map(network_of) else { continue };
        if STOPPED.contains(txn, &peer)? || audit_fetch::has_failed(txn, &peer)? {
            continue;
        }
        addrs.truncate(SOURCE_ADDRS);
        let unwanted_since = LEAVING.get(txn, &(peer, *manifest))?.map(|record| record.asked_at);
        found.push(Holder { peer, last_report, addrs, network, unwanted_since });
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
pub(crate) fn spread(mut found: Vec<(bool, &Holder)>, limit: usize) -> Vec<PeerAddrs> {
    found.sort_by_key(|(full, holder)| (*full, std::cmp::Reverse(holder.last_report)));
    let mut seen: HashMap<&str, usize> = HashMap::new();
    let mut ranked: Vec<(bool, usize, &Holder)> = found
        .into_iter()
        .map(|(full, holder)| {
            let turn = seen.entry(&holder.network).or_default();
            *turn += 1;
            (full, *turn, holder)
        })
        .collect();
    ranked.sort_by_key(|(full, turn, _)| (*full, *turn));
    let chosen = ranked.into_iter().take(limit);
    chosen.map(|(_, _, holder)| PeerAddrs::new(holder.peer, holder.addrs.clone())).collect()
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

    #[tokio::test]
    async fn holders_are_read_again_when_what_they_are_made_from_changed() {
        let dir = tempfile::tempdir().unwrap();
        let db = Db::open(dir.path().join("m.redb"), store::Options::new(1)).unwrap();
        let holders = Holders::default();
        let digest = |n: u8| Digest::from_bytes([n; 32]);
        let first = holders.of(&db, &digest(0)).unwrap();
        assert!(Arc::ptr_eq(&first, &holders.of(&db, &digest(0)).unwrap()));
        // A sale writes none of these tables.
        db.write(|txn| crate::tables::MANIFESTS.delete(txn, &Digest::from_bytes([0; 32])).map(drop)).await.unwrap();
        assert!(Arc::ptr_eq(&first, &holders.of(&db, &digest(0)).unwrap()));
        let peer = PeerId::from_bytes([1; 32]);
        for table in 0..2 {
            let before = holders.of(&db, &digest(0)).unwrap();
            let write = move |txn: &store::WriteTransaction<'_>| match table {
                0 => HOLDERS.put(txn, &(Digest::from_bytes([0; 32]), peer), &store::Mark),
                _ => STOPPED.put(txn, &peer, &store::Mark),
            };
            db.write(write).await.unwrap();
            assert!(!Arc::ptr_eq(&before, &holders.of(&db, &digest(0)).unwrap()));
        }
        // However many contents are sold, so many are remembered.
        for n in 0..=200 {
            holders.of(&db, &digest(n)).unwrap();
            assert!(holders.0.lock().unwrap().len() <= REMEMBERED);
        }
    }
}
