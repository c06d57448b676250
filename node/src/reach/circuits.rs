//! What the relays on the way to peers let through. A relay that was not set up to carry goods cuts a circuit after 128
//! KiB without a word: who is about to send more has to know before.

use std::collections::HashMap;
use std::time::Duration;

use libp2p::PeerId;

/// Relays and peers whose limits are remembered; at the bound all are forgotten, and learnt again with the next circuit.
const REMEMBERED: usize = 4096;
/// A circuit carries goods where it lets so many bytes through, a seeder's largest window, …
const GOODS_BYTES: u64 = 16 * 1024 * 1024;
/// … and lives so long.
const GOODS_TIME: Duration = Duration::from_secs(60);

/// What a relay lets through one circuit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CircuitLimit {
    /// Bytes in each direction; none for no limit.
    pub bytes: Option<u64>,
    /// Time that a circuit lives; none for no limit.
    pub time: Option<Duration>,
}

impl CircuitLimit {
    /// Was the relay set up to carry goods?
    pub fn carries_goods(&self) -> bool {
        self.bytes.is_none_or(|bytes| bytes >= GOODS_BYTES) && self.time.is_none_or(|time| time >= GOODS_TIME)
    }
}

impl std::fmt::Display for CircuitLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.bytes {
            Some(bytes) => write!(f, "{} KiB", bytes / 1024)?,
            None => f.write_str("any number of bytes")?,
        }
        match self.time {
            Some(time) => write!(f, " in {} s", time.as_secs()),
            None => Ok(()),
        }
    }
}

/// The newest limits: by relay for circuits that we opened, by peer for those that a peer opened to us.
#[derive(Debug, Default)]
pub(crate) struct Circuits(HashMap<PeerId, CircuitLimit>);

impl Circuits {
    pub(crate) fn note(&mut self, peer: PeerId, limit: CircuitLimit) {
        if self.0.len() >= REMEMBERED {
            self.0.clear();
        }
        self.0.insert(peer, limit);
    }

    /// The limit of a circuit to `peer` over `relay`.
    pub(crate) fn limit(&self, peer: &PeerId, relay: Option<&PeerId>) -> Option<CircuitLimit> {
        relay.and_then(|relay| self.0.get(relay)).or_else(|| self.0.get(peer)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goods_need_more_than_signalling() {
        let limit = |bytes, seconds| CircuitLimit { bytes, time: Some(Duration::from_secs(seconds)) };
        assert!(!limit(Some(128 * 1024), 120).carries_goods());
        assert!(!limit(None, 5).carries_goods());
        assert!(limit(Some(GOODS_BYTES), 60).carries_goods());
        assert!(CircuitLimit { bytes: None, time: None }.carries_goods());
        assert_eq!(limit(Some(128 * 1024), 120).to_string(), "128 KiB in 120 s");
    }
}
