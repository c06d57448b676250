//! A batch proves itself for as long as its seeder is enrolled, so anybody may give an old one to the mesh again. Each mark is
//! a message to all of the mesh: one that was told before is told again only now and then, for who missed it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use protocol::{Nonce, PeerId};

/// Between two times that the mark of one outbox is told again, milliseconds.
const AGAIN_MS: u64 = 30_000;
/// Outboxes whose marks are told again in that time, at most.
const AT_MOST: usize = 1024;

/// Marks that were told again a moment ago.
#[derive(Debug, Default)]
pub(crate) struct Repeats {
    /// When, unix milliseconds.
    told: Mutex<HashMap<(PeerId, Nonce), u64>>,
}

impl Repeats {
    /// May the mark of this outbox be told again? If so, it counts as told.
    pub(super) fn may(&self, outbox: (PeerId, Nonce), now: u64) -> bool {
        // Whoever panicked while holding it was between plain map operations.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        // Either way: a clock may be put back.
        let lately = |at: &u64| now.abs_diff(*at) < AGAIN_MS;
        if told.get(&outbox).is_some_and(lately) {
            return false;
        }
        if told.len() >= AT_MOST {
            told.retain(|_, at| lately(at));
        }
        let may = told.len() < AT_MOST;
        if may {
            told.insert(outbox, now);
        }
        may
    }
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
        let repeats = Repeats::default();
        assert!(repeats.may(outbox(0), 1_000_000));
        assert!(!repeats.may(outbox(0), 1_000_000 + AGAIN_MS - 1));
        assert!(repeats.may(outbox(1), 1_000_000));
        assert!(repeats.may(outbox(0), 1_000_000 + AGAIN_MS));
        assert!(repeats.may(outbox(0), 500_000), "the clock was put back");
        let taken = (0..5000).filter(|n| repeats.may(outbox(*n), 2_000_000)).count();
        assert_eq!(taken, AT_MOST);
        assert!(repeats.may(outbox(4999), 2_000_000 + AGAIN_MS), "they make room");
    }
}
