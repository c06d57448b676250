//! Seeders that say in their reports that they hold a content, and to who comes for it that they do not. Nobody is judged by
//! one such answer: a copy may have been lost or removed just then, and the report that says so be under way. Who goes on
//! saying both is a copy in the books only, by which others would let go of theirs.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use protocol::{Digest, PeerId};

/// Seeders in doubt at once; further ones take the place of others.
const MAX_DOUBTS: usize = 1024;
/// Reports that have to name the content after the answer: the first may have been made before it, the second was not, for a
/// seeder makes one after the other.
const REPORTS: u32 = 2;

/// One content of each seeder in doubt.
#[derive(Debug, Default)]
pub(super) struct Doubts(Mutex<BTreeMap<PeerId, Doubt>>);

#[derive(Clone, Copy, Debug)]
struct Doubt {
    manifest: Digest,
    chunk: u32,
    /// Reports since that named it as held.
    reports: u32,
}

impl Doubts {
    /// The seeder answered that it does not hold a content which by the books it does. True where it answered that before and
    /// reported the content as held since: then it is not believed any more.
    pub(super) fn answered(&self, peer: PeerId, manifest: Digest, chunk: u32) -> bool {
        let mut doubts = self.lock();
        match doubts.get(&peer) {
            Some(doubt) if doubt.manifest == manifest && doubt.reports >= REPORTS => {
                doubts.remove(&peer);
                return true;
            }
            // Asked again too early.
            Some(doubt) if doubt.manifest == manifest => return false,
            Some(_) => {}
            None if doubts.len() >= MAX_DOUBTS => drop(doubts.pop_first()),
            None => {}
        }
        doubts.insert(peer, Doubt { manifest, chunk, reports: 0 });
        false
    }

    /// The content of this seeder that is in doubt.
    pub(super) fn of(&self, peer: &PeerId) -> Option<Digest> {
        self.lock().get(peer).map(|doubt| doubt.manifest)
    }

    /// A report named the content as held. True, with the chunk, where it is time to ask again.
    pub(super) fn reported(&self, peer: &PeerId, manifest: &Digest) -> Option<u32> {
        let mut doubts = self.lock();
        let doubt = doubts.get_mut(peer).filter(|doubt| doubt.manifest == *manifest)?;
        doubt.reports = doubt.reports.saturating_add(1);
        (doubt.reports == REPORTS).then_some(doubt.chunk)
    }

    /// It served the content after all, or holds it no more by the books.
    pub(super) fn settled(&self, peer: &PeerId, manifest: &Digest) {
        let mut doubts = self.lock();
        if doubts.get(peer).is_some_and(|doubt| doubt.manifest == *manifest) {
            doubts.remove(peer);
        }
    }

    // A thread that panicked while it held this lock was between plain map operations.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PeerId, Doubt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_says_both_again_after_a_report_is_not_believed() {
        let (doubts, peer) = (Doubts::default(), PeerId::from_bytes([1; 32]));
        let (content, other) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
        assert!(!doubts.answered(peer, content, 7));
        assert!(!doubts.answered(peer, content, 7), "no report came since");
        assert_eq!(doubts.reported(&peer, &content), None, "it may have been under way");
        assert!(!doubts.answered(peer, content, 7));
        assert_eq!((doubts.reported(&peer, &other), doubts.reported(&peer, &content)), (None, Some(7)));
        assert!(doubts.answered(peer, content, 7));
        assert_eq!(doubts.of(&peer), None);

        // Lost, said so, and made again: nothing is left of it.
        assert!(!doubts.answered(peer, content, 7));
        doubts.settled(&peer, &content);
        assert_eq!((doubts.reported(&peer, &content), doubts.reported(&peer, &content)), (None, None));
        assert!(!doubts.answered(peer, content, 7));
        for n in 0..=MAX_DOUBTS as u64 {
            let mut bytes = [9; 32];
            bytes.iter_mut().zip(n.to_le_bytes()).for_each(|(to, from)| *to = from);
            doubts.answered(PeerId::from_bytes(bytes), content, 0);
        }
        assert_eq!(doubts.lock().len(), MAX_DOUBTS);
    }
}
