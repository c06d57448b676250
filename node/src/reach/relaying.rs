//! Relaying for others: how much of it, and for whom. A slot is for members of the network only, so that a relay does not
//! become a way for strangers to hide behind; how long and how much a circuit carries is the operator's decision.

use std::collections::HashSet;
use std::num::NonZeroU32;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use libp2p::relay::{self, RateLimiter};
use libp2p::{Multiaddr, PeerId};
use serde::{Deserialize, Serialize};

/// The `[relay]` table of a node's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RelayConfig {
    /// Relays connections to enrolled seeders that nobody can dial. Needs a node that others reach. Default: false.
    pub enabled: bool,
    /// Seeders that hold a slot at once; further ones are refused one. Default: 128.
    pub slots: u32,
    /// Circuits at once; further ones are refused. Default: 64.
    pub circuits: u32,
    /// Bytes that a circuit carries in each direction before it is closed; 0 for no limit. Hole punching needs some
    /// kilobytes; goods go over a relay only from 16777216 (16 MiB) on. Default: 131072 (128 KiB).
    #[serde(deserialize_with = "crate::units::size")]
    pub circuit_bytes: u64,
    /// Time after which a circuit is closed; goods go over a relay only from 60000 on. Default: 120000 (2 minutes).
    pub circuit_ms: u64,
}

impl Default for RelayConfig {
    fn default() -> Self {
        RelayConfig { enabled: false, slots: 128, circuits: 64, circuit_bytes: 128 * 1024, circuit_ms: 120_000 }
    }
}

impl RelayConfig {
    /// Longest life of a circuit: the protocol tells it in seconds of 32 bits, and a day is long.
    const MAX_CIRCUIT_MS: u64 = 24 * 3600 * 1000;

    /// Checks the values; gives the key and what is wrong with it.
    ///
    /// # Errors
    /// The first value that makes no sense.
    pub fn check(&self) -> Result<(), (&'static str, &'static str)> {
        if self.slots == 0 || self.circuits == 0 {
            return Err(("relay", "has slots and circuits of at least 1; leave enabled at false to relay nothing"));
        }
        if !(1000..=Self::MAX_CIRCUIT_MS).contains(&self.circuit_ms) {
            return Err(("relay", "has a circuit-ms from 1000 to 86400000"));
        }
        Ok(())
    }
}

/// Peers that a role vouches for, as the DHT, the relay and the network task see them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Members(Arc<RwLock<HashSet<PeerId>>>);

impl Members {
    pub(crate) fn contains(&self, peer: &PeerId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(peer)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(crate) fn insert(&self, peer: PeerId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(peer);
    }

    pub(crate) fn remove(&self, peer: &PeerId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(peer);
    }
}

/// The library asks its rate limiters for each slot that is wanted: the place to say who may have one.
struct MembersOnly(Members);

impl RateLimiter for MembersOnly {
    fn try_next(&mut self, peer: PeerId, _: &Multiaddr, _: Instant) -> bool {
        self.0.contains(&peer)
    }
}

/// A slot ends with its holder's connection and not before: where the library lets one run out, or its holder renew it, it
/// stops the node if an answer to a renewal comes after that (a holder can see to it by not reading), and it refuses the
/// renewal where all slots are taken, as its own holder takes one of them.
const SLOT: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Circuits that one peer may open at once, and so often after that. A client whose holes cannot be punched tries each seeder
/// over each address of its relays, some dozen times a minute: with the library's 30 and one more in two minutes its own tries
/// kept it out for an hour, also once it had moved to where they would have led on. What a circuit carries, how long it
/// lasts and how many there are at once, has bounds of its own.
const CIRCUITS_OF_PEER: (NonZeroU32, Duration) = (NonZeroU32::MIN.saturating_add(59), Duration::from_secs(5));
/// The same for one address, behind which there may be many.
const CIRCUITS_OF_ADDRESS: (NonZeroU32, Duration) = (NonZeroU32::MIN.saturating_add(119), Duration::from_secs(1));

/// The library's settings for a relay, but for its rates; a seeder that was restarted takes its slot anew.
pub(crate) fn relay_config(config: &RelayConfig, members: &Members) -> relay::Config {
    let slots = usize::try_from(config.slots).unwrap_or(usize::MAX);
    let mut relay = relay::Config {
        max_reservations: slots,
        reservation_duration: SLOT,
        max_circuits: usize::try_from(config.circuits).unwrap_or(usize::MAX),
        max_circuit_bytes: config.circuit_bytes,
        max_circuit_duration: Duration::from_millis(config.circuit_ms),
        reservation_rate_limiters: vec![Box::new(MembersOnly(members.clone()))],
        circuit_src_rate_limiters: Vec::new(),
        ..relay::Config::default()
    };
    relay = relay
        .circuit_src_per_peer(CIRCUITS_OF_PEER.0, CIRCUITS_OF_PEER.1)
        .circuit_src_per_ip(CIRCUITS_OF_ADDRESS.0, CIRCUITS_OF_ADDRESS.1);
    if let Some(burst) = NonZeroU32::new(30) {
        relay = relay.reservation_rate_per_peer(burst, Duration::from_secs(60));
    }
    relay
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn values_that_make_no_sense_are_named() {
        assert_eq!(RelayConfig::default().check(), Ok(()));
        for wrong in [
            RelayConfig { slots: 0, ..RelayConfig::default() },
            RelayConfig { circuit_ms: 0, ..RelayConfig::default() },
            RelayConfig { circuit_ms: u64::MAX, ..RelayConfig::default() },
        ] {
            assert_eq!(wrong.check().unwrap_err().0, "relay");
        }
    }

    #[test]
    fn a_slot_is_there_for_as_long_as_its_holder_and_needs_no_renewal() {
        let relay = relay_config(&RelayConfig { slots: 7, ..RelayConfig::default() }, &Members::default());
        assert_eq!(relay.max_reservations, 7);
        let runs = tokio::time::Instant::now() + relay.reservation_duration;
        assert!(runs.duration_since(tokio::time::Instant::now()) > Duration::from_secs(365 * 24 * 3600));
    }

    #[test]
    fn a_client_that_tries_a_dozen_times_a_minute_gets_a_circuit_each_time_and_no_flood_does() {
        let mut relay = relay_config(&RelayConfig::default(), &Members::default());
        let (peer, address) = (PeerId::random(), "/ip4/192.0.2.1/tcp/1".parse().unwrap());
        let begun = Instant::now();
        let mut may = |peer, at| {
            let limiters = &mut relay.circuit_src_rate_limiters;
            limiters.iter_mut().all(|limiter| limiter.try_next(peer, &address, begun + Duration::from_secs(at)))
        };
        assert!((0..720).all(|n| may(peer, n * 5)), "an hour of it");
        let of_one = (0..1000).filter(|_| may(peer, 4000)).count();
        assert!((1..=60).contains(&of_one), "{of_one}");
        let of_many = (0..1000).filter(|_| may(PeerId::random(), 8000)).count();
        assert!((61..=120).contains(&of_many), "{of_many}");
    }

    #[test]
    fn only_members_get_a_slot() {
        let members = Members::default();
        let mut gate = MembersOnly(members.clone());
        let (peer, address) = (PeerId::random(), "/ip4/192.0.2.1/tcp/1".parse().unwrap());
        assert!(!gate.try_next(peer, &address, Instant::now()));
        members.insert(peer);
        assert!(gate.try_next(peer, &address, Instant::now()));
    }
}
