//! Each mark is a message to all of the mesh, on the topic of revocations: a seeder is not to fill that with what it sends. New
//! batches of one seeder have a rate, and a mark that was told before is told again only now and then, for who missed it: a
//! batch proves itself for as long as its seeder is enrolled, so anybody may give an old one to the mesh again. Whoever brought
//! a batch itself has the mark in the answer, whatever the others are told.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};

use protocol::{Nonce, PeerId};

/// Between two times that the mark of one outbox is told again, milliseconds.
const AGAIN_MS: u64 = 30_000;
/// Marks of new batches of one seeder that are told at once: as many batches as seeders pass on …
const AT_ONCE: u64 = 240;
/// … and from then on one in so many milliseconds.
const NEW_MS: u64 = 500;
/// Outboxes whose marks are told again, and seeders whose new ones are told faster than they may be in the long run, at most.
const AT_MOST: usize = 1024;

/// Marks that were told a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Telling {
    /// Of new batches: until when the seeder's rate is used up, unix milliseconds.
    first: Mutex<HashMap<PeerId, u64>>,
    /// Of batches that were taken before: when, unix milliseconds.
    again: Mutex<HashMap<(PeerId, Nonce), u64>>,
}

impl Telling {
    /// May the mark of a new batch of this seeder be told? If so, it counts as told.
    pub(super) fn first(&self, seeder: PeerId, now: u64) -> bool {
        let most = AT_ONCE * NEW_MS;
        // A clock that was put back takes nothing from anybody.
        let used = |until: u64| Some(until.saturating_sub(now)).filter(|used| (1..=most).contains(used));
        may(
            &self.first,
            seeder,
            |until| used(*until).is_some(),
            |until| {
                let used = until.and_then(|until| used(*until)).unwrap_or(0) + NEW_MS;
                (used <= most).then(|| now.saturating_add(used))
            },
        )
    }

    /// May the mark of this outbox be told again? If so, it counts as told.
    pub(super) fn again(&self, outbox: (PeerId, Nonce), now: u64) -> bool {
        // Either way: a clock may be put back.
        let lately = |at: &u64| now.abs_diff(*at) < AGAIN_MS;
        may(&self.again, outbox, lately, |at| (!at.is_some_and(lately)).then_some(now))
    }
}

/// Stores what `next` makes of the row, and says whether there was something and room for it; rows that are not `kept` make
/// room.
fn may<K: Eq + Hash>(
    rows: &Mutex<HashMap<K, u64>>,
    key: K,
    kept: impl Fn(&u64) -> bool,
    next: impl FnOnce(Option<&u64>) -> Option<u64>,
) -> bool {
    // Whoever panicked while holding it was between plain map operations.
    let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(row) = next(rows.get(&key)) else { return false };
    if rows.len() >= AT_MOST && !rows.contains_key(&key) {
        rows.retain(|_, row| kept(row));
    }
    let may = rows.len() < AT_MOST || rows.contains_key(&key);
    if may {
        rows.insert(key, row);
    }
    may
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outbox(n: u32) -> (PeerId, Nonce) {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(n.to_le_bytes()).for_each(|(to, from)| *to = from);
        (PeerId::from_bytes([1; 32]), Nonce::from_bytes(bytes))
    }

    #[test]
    fn a_mark_is_told_again_now_and_then_and_the_table_is_bounded() {
        let marks = Telling::default();
        assert!(marks.again(outbox(0), 1_000_000));
        assert!(!marks.again(outbox(0), 1_000_000 + AGAIN_MS - 1));
        assert!(marks.again(outbox(1), 1_000_000));
        assert!(marks.again(outbox(0), 1_000_000 + AGAIN_MS));
        assert!(marks.again(outbox(0), 500_000), "the clock was put back");
        let taken = (0..5000).filter(|n| marks.again(outbox(*n), 2_000_000)).count();
        assert_eq!(taken, AT_MOST);
        assert!(marks.again(outbox(4999), 2_000_000 + AGAIN_MS), "they make room");
    }

    #[test]
    fn marks_of_new_batches_have_a_rate_for_each_seeder() {
        let (marks, start) = (Telling::default(), 1_000_000);
        let seeder = |n: u32| {
            let mut bytes = [0; 32];
            bytes.iter_mut().zip(n.to_le_bytes()).for_each(|(to, from)| *to = from);
            PeerId::from_bytes(bytes)
        };
        let told = |n, now| (0..1000).filter(|_| marks.first(seeder(n), now)).count();
        assert_eq!(told(0, start), 240);
        assert_eq!(told(0, start + 60_000), 120, "as much again as the time makes up for");
        assert_eq!(told(1, start + 60_000), 240, "another's are its own");
        assert_eq!(told(0, start - 500_000), 240, "the clock was put back");
        assert_eq!((2..5000).filter(|n| marks.first(seeder(*n), start)).count(), AT_MOST);
        assert!(marks.first(seeder(4999), start + 1_000_000), "they make room");
    }
}
