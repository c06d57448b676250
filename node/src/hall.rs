//! Streams that hold others up by nothing but silence: a request that does not come, an answer that nobody takes. Keys cost
//! nothing, and neither does saying nothing, so a bound alone would keep out those who come after. Where there are too many,
//! one of the peer with most of them gives way, the one that has been silent for longest.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::PeerId;
use tokio_util::sync::CancellationToken;

/// Those who wait for their peer. What bounds their number is the caller's.
#[derive(Clone, Debug, Default)]
pub struct Hall(Arc<Mutex<Waits>>);

#[derive(Debug, Default)]
struct Waits {
    next: u64,
    /// Of each peer that has some, in the order in which they came.
    peers: HashMap<PeerId, BTreeMap<u64, CancellationToken>>,
}

/// One of them, until it is dropped.
#[derive(Debug)]
pub struct Waiting {
    hall: Hall,
    peer: PeerId,
    number: u64,
    crowded_out: CancellationToken,
}

impl Hall {
    /// A stream of `peer` begins to wait.
    pub fn wait(&self, peer: PeerId) -> Waiting {
        let crowded_out = CancellationToken::new();
        let mut waits = self.lock();
        let number = waits.next;
        waits.next += 1;
        waits.peers.entry(peer).or_default().insert(number, crowded_out.clone());
        drop(waits);
        Waiting { hall: self.clone(), peer, number, crowded_out }
    }

    /// Makes one give way, if any waits.
    pub fn make_room(&self) {
        let mut waits = self.lock();
        let silent_since = |of: &BTreeMap<u64, CancellationToken>| of.keys().next().copied();
        let most = waits.peers.iter().max_by_key(|(_, of)| (of.len(), Reverse(silent_since(of))));
        let Some(peer) = most.map(|(peer, _)| *peer) else { return };
        let Some(of) = waits.peers.get_mut(&peer) else { return };
        if let Some((_, oldest)) = of.pop_first() {
            oldest.cancel();
        }
        if of.is_empty() {
            waits.peers.remove(&peer);
        }
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().peers.values().map(BTreeMap::len).sum()
    }

    /// Does nobody wait?
    pub fn is_empty(&self) -> bool {
        self.lock().peers.is_empty()
    }

    // Whoever panicked while holding it was between plain map operations.
    fn lock(&self) -> MutexGuard<'_, Waits> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Returns when it is to give way.
    pub async fn crowded_out(&self) {
        self.crowded_out.cancelled().await;
    }

    /// Is it to give way?
    pub fn is_crowded_out(&self) -> bool {
        self.crowded_out.is_cancelled()
    }

    /// What the peer is waited for, or `None` when this one has to give way.
    pub(crate) async fn until<T>(self, what: impl Future<Output = T>) -> Option<T> {
        let done = tokio::select! {
            biased;
            () = self.crowded_out.cancelled() => return None,
            done = what => done,
        };
        // Its place was promised to another one at the last moment.
        if self.leave() { Some(done) } else { None }
    }

    /// False when it had to give way.
    fn leave(&self) -> bool {
        let mut waits = self.hall.lock();
        let Some(of) = waits.peers.get_mut(&self.peer) else { return false };
        let was_there = of.remove(&self.number).is_some();
        if of.is_empty() {
            waits.peers.remove(&self.peer);
        }
        was_there
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn gone(of: &[Waiting]) -> Vec<bool> {
        of.iter().map(|one| one.crowded_out.is_cancelled()).collect()
    }

    #[tokio::test]
    async fn the_oldest_of_the_peer_with_most_gives_way() {
        let hall = Hall::default();
        hall.make_room();
        let honest = [hall.wait(peer(1))];
        let many: Vec<Waiting> = (0..3).map(|_| hall.wait(peer(2))).collect();
        let two: Vec<Waiting> = (0..2).map(|_| hall.wait(peer(3))).collect();
        hall.make_room();
        assert_eq!((gone(&honest), gone(&many), gone(&two)), (vec![false], vec![true, false, false], vec![false; 2]));
        hall.make_room();
        hall.make_room();
        assert_eq!((gone(&honest), gone(&many), gone(&two)), (vec![false], vec![true, true, false], vec![true, false]));
        // As many of each now: whoever came first.
        hall.make_room();
        assert_eq!(gone(&honest), [true]);
        for one in honest.into_iter().chain(many).chain(two) {
            let gone = one.crowded_out.is_cancelled();
            assert_eq!(one.until(async { 1 }).await.is_none(), gone);
        }
        assert!(hall.lock().peers.is_empty());
    }

    #[tokio::test]
    async fn whoever_gave_way_while_it_was_done_gave_way() {
        let hall = Hall::default();
        let waiting = hall.wait(peer(1));
        assert_eq!(waiting.until(async { hall.make_room() }).await, None);
        let silent = hall.wait(peer(1));
        hall.make_room();
        assert_eq!(silent.until(std::future::pending::<()>()).await, None);
        assert!(hall.lock().peers.is_empty());
    }
}
