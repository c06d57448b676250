//! What others announced here, beside the store that has it: the store forgets a record only when somebody asks for that very
//! key, so that keys nobody asks for would fill it for good, and one peer with many keys would leave no room for others.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use libp2p::PeerId as NetPeerId;
use libp2p::kad::store::RecordStore;
use libp2p::kad::{ProviderRecord, RecordKey};

/// A record without an end of its own is kept for so long; the library gives all of them one.
const KEPT: Duration = Duration::from_secs(2 * 60 * 60);
/// Records that give way to a new one at most: a key is free when the last of its providers went.
const MOST_FOR_ONE: usize = 32;

type Key = [u8; 32];

/// When each record of others ends, and whose it is.
#[derive(Debug, Default)]
pub(crate) struct Announced {
    ends: HashMap<(NetPeerId, Key), Instant>,
    by_end: BTreeSet<(Instant, NetPeerId, Key)>,
    of: HashMap<NetPeerId, BTreeSet<(Instant, Key)>>,
}

impl Announced {
    /// Takes another's record into the store. Where that is full, records of whoever has the most give way.
    pub(crate) fn add<S: RecordStore>(&mut self, store: &mut S, record: ProviderRecord, now: Instant) {
        let Ok(key) = Key::try_from(record.key.as_ref()) else { return };
        let (provider, ends) = (record.provider, record.expires.unwrap_or(now + KEPT));
        self.drop_ended(store, now);
        if let Err(error) = self.make_room(store, |store| store.add_provider(record.clone())) {
            tracing::debug!(%error, "provider record refused");
            return;
        }
        // A key that has as many providers as it may keeps those.
        if store.providers(&record.key).iter().any(|known| known.provider == provider) {
            self.forget(provider, key);
            self.ends.insert((provider, key), ends);
            self.by_end.insert((ends, provider, key));
            self.of.entry(provider).or_default().insert((ends, key));
        }
    }

    /// Tries again and again what needs a place for a key, while there is somebody to give way.
    pub(crate) fn make_room<S: RecordStore, T, E>(
        &mut self,
        store: &mut S,
        mut attempt: impl FnMut(&mut S) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut result = attempt(store);
        for _ in 0..MOST_FOR_ONE {
            if result.is_ok() || !self.evict(store) {
                break;
            }
            result = attempt(store);
        }
        result
    }

    /// Drops what has ended.
    pub(crate) fn drop_ended<S: RecordStore>(&mut self, store: &mut S, now: Instant) {
        while let Some((ends, provider, key)) = self.by_end.first().copied()
            && ends <= now
        {
            self.drop(store, provider, key);
        }
    }

    /// Drops all that a peer announced.
    pub(crate) fn drop_of<S: RecordStore>(&mut self, store: &mut S, provider: &NetPeerId) {
        for (_, key) in self.of.get(provider).cloned().unwrap_or_default() {
            self.drop(store, *provider, key);
        }
    }

    /// The record that ends next of whoever has the most. False where there is none.
    pub(crate) fn evict<S: RecordStore>(&mut self, store: &mut S) -> bool {
        let fullest = self.of.iter().max_by_key(|(_, records)| records.len());
        let Some((provider, key)) = fullest.and_then(|(peer, of)| Some((*peer, of.first()?.1))) else { return false };
        self.drop(store, provider, key);
        true
    }

    fn drop<S: RecordStore>(&mut self, store: &mut S, provider: NetPeerId, key: Key) {
        store.remove_provider(&RecordKey::new(&key), &provider);
        self.forget(provider, key);
    }

    fn forget(&mut self, provider: NetPeerId, key: Key) {
        let Some(ends) = self.ends.remove(&(provider, key)) else { return };
        self.by_end.remove(&(ends, provider, key));
        if let Some(records) = self.of.get_mut(&provider) {
            records.remove(&(ends, key));
            if records.is_empty() {
                self.of.remove(&provider);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use libp2p::kad::store::{MemoryStore, MemoryStoreConfig};

    use super::*;

    fn store(keys: usize) -> MemoryStore {
        let config = MemoryStoreConfig { max_provided_keys: keys, max_providers_per_key: 2, ..Default::default() };
        MemoryStore::with_config(NetPeerId::random(), config)
    }

    fn record(provider: NetPeerId, key: u8, expires: Instant) -> ProviderRecord {
        ProviderRecord { key: RecordKey::new(&[key; 32]), provider, expires: Some(expires), addresses: Vec::new() }
    }

    fn has(store: &MemoryStore, provider: NetPeerId, key: u8) -> bool {
        store.providers(&RecordKey::new(&[key; 32])).iter().any(|known| known.provider == provider)
    }

    #[test]
    fn whoever_announces_most_gives_way_and_a_node_has_room_for_its_own() {
        let (mut store, mut announced, now) = (store(8), Announced::default(), Instant::now());
        let (greedy, other) = (NetPeerId::random(), NetPeerId::random());
        for key in 0..100 {
            announced.add(&mut store, record(greedy, key, now + KEPT + Duration::from_secs(key.into())), now);
        }
        assert_eq!((0..100).filter(|key| has(&store, greedy, *key)).count(), 8);
        assert!(has(&store, greedy, 99), "the newest of its own stay");
        for key in 100..103 {
            announced.add(&mut store, record(other, key, now + KEPT), now);
        }
        assert!((100..103).all(|key| has(&store, other, key)));
        assert_eq!((0..100).filter(|key| has(&store, greedy, *key)).count(), 5);
        announced.add(&mut store, record(greedy, 7, now + KEPT), now);
        assert!((100..103).all(|key| has(&store, other, key)), "the fullest is itself");
        let own = |store: &mut MemoryStore| store.add_provider(record(NetPeerId::random(), 200, now));
        assert!(own(&mut store).is_err());
        assert!(announced.make_room(&mut store, own).is_ok());
        announced.drop_of(&mut store, &greedy);
        assert_eq!((announced.ends.len(), announced.by_end.len(), announced.of.len()), (3, 3, 1));
    }

    #[test]
    fn what_nobody_asks_for_ends_too() {
        let (mut store, mut announced, now) = (store(4), Announced::default(), Instant::now());
        let peer = NetPeerId::random();
        announced.add(&mut store, record(peer, 1, now + Duration::from_secs(1)), now);
        announced.add(&mut store, record(peer, 2, now + Duration::from_secs(9)), now);
        // Announced again, it lasts longer.
        announced.add(&mut store, record(peer, 1, now + Duration::from_secs(5)), now);
        announced.drop_ended(&mut store, now + Duration::from_secs(4));
        assert!(has(&store, peer, 1) && has(&store, peer, 2));
        announced.drop_ended(&mut store, now + Duration::from_secs(5));
        assert!(!has(&store, peer, 1) && has(&store, peer, 2));
        // A third provider of one key is not kept, and not counted either.
        for _ in 0..3 {
            announced.add(&mut store, record(NetPeerId::random(), 3, now + Duration::from_secs(9)), now);
        }
        assert_eq!((announced.ends.len(), announced.by_end.len()), (3, 3));
        announced.drop_ended(&mut store, now + Duration::from_secs(9));
        assert_eq!((announced.ends.len(), announced.by_end.len(), announced.of.len()), (0, 0, 0));
        assert!((0..10).all(|key| store.providers(&RecordKey::new(&[key; 32])).is_empty()));
    }
}
