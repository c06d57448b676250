//! Seeders that served a purchase and that its ticket does not name: the DHT, the manager or the user led to them. When the
//! listed ones are away, and the manager too, nobody else may lead there again.

use std::path::PathBuf;

use bincode::{Decode, Encode};
use delivery::SourceProgress;
use protocol::{PeerAddrs, TransactionId, codec};

use super::ticket::Checked;
use crate::home::{FileError, Home, blocking, make_private_dir, read_file, replace_file};
use crate::link::Link;

/// As many as one question to the DHT finds.
const MOST: usize = 32;

#[derive(Debug, Default, PartialEq, Eq, Encode, Decode)]
struct Served {
    /// The newest first.
    seeders: Vec<PeerAddrs>,
}

const MAX: usize = 64 * 1024;

protocol::wire!(Served => MAX);

impl Served {
    /// These served now.
    fn with(mut self, now: Vec<PeerAddrs>) -> Served {
        self.seeders.retain(|known| now.iter().all(|now| now.peer != known.peer));
        self.seeders.splice(..0, now);
        self.seeders.truncate(MOST);
        self
    }

    fn read(home: &Home, transaction: &TransactionId) -> Result<Served, FileError> {
        let bytes = read_file(&list(home, transaction), MAX)?;
        // What cannot be read any more only led to somebody.
        Ok(bytes.and_then(|bytes| codec::decode(&bytes).ok()).unwrap_or_default())
    }
}

fn list(home: &Home, transaction: &TransactionId) -> PathBuf {
    home.delivery_dir(transaction).join("served")
}

/// Those of earlier runs.
pub(super) async fn load(home: &Home, transaction: TransactionId) -> Result<Vec<PeerAddrs>, FileError> {
    let home = home.clone();
    let mut served = blocking(move || Served::read(&home, &transaction)).await?;
    served.seeders.truncate(MOST);
    Ok(served.seeders)
}

/// Adds those of this run.
pub(super) async fn note(
    home: &Home,
    link: &Link,
    checked: &Checked,
    sources: &[SourceProgress],
) -> Result<(), FileError> {
    let envelope = &checked.purchase.envelope;
    let listed = |source: &SourceProgress| envelope.sources.iter().any(|listed| listed.peer == source.peer);
    let mut now = Vec::new();
    for source in sources.iter().filter(|source| source.chunks > 0 && !listed(source)).take(MOST) {
        let at = link.node().known_addresses(source.peer).await.ok();
        now.extend(at.filter(|at| !at.addrs.is_empty()));
    }
    if now.is_empty() {
        return Ok(());
    }
    let (home, transaction) = (home.clone(), checked.purchase.transaction);
    blocking(move || {
        let served = Served::read(&home, &transaction)?.with(now);
        make_private_dir(&home.delivery_dir(&transaction))?;
        replace_file(&list(&home, &transaction), &codec::encode(&served), false)
    })
    .await
}

#[cfg(test)]
mod tests {
    use protocol::PeerId;

    use super::*;

    #[test]
    fn the_newest_are_kept_each_once_and_no_more_than_so_many() {
        let at = |n: u8| PeerAddrs::from(PeerId::from_bytes([n; 32]));
        let served = Served::default().with((0..20).map(at).collect()).with((10..40).map(at).collect());
        let peers: Vec<PeerAddrs> = (10..40).chain(0..2).map(at).collect();
        assert_eq!(served, Served { seeders: peers });
        let long = protocol::Address::new(&format!("/dns4/{}/tcp/1", "a".repeat(200)));
        let most = PeerAddrs::new(PeerId::from_bytes([1; 32]), long.into_iter().cycle().take(16).collect());
        let served = Served { seeders: vec![most; MOST] };
        assert!(codec::encode(&served).len() <= MAX);
    }
}
