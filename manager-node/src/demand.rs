//! How much each content is asked for now: leases signed for it within the last hour or so, and whether its seeders turn
//! clients away. Kept in memory only: after a restart it is learned again sooner than a copy is made.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use protocol::{Digest, PeerId};

/// Contents counted at once; further ones are not counted until others are forgotten.
const MOST_CONTENTS: usize = 100_000;

/// The counts.
pub(crate) struct Demand {
    window_ms: u64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    asked: HashMap<Digest, Asked>,
    /// When a seeder last said that it turned clients away: an entry for each that did within the window.
    crowded: HashMap<PeerId, u64>,
}

/// Two windows: the one that runs, and the one before it.
#[derive(Clone, Copy, Default)]
struct Asked {
    window: u64,
    now: u32,
    before: u32,
}

impl Asked {
    fn roll(mut self, window: u64) -> Asked {
        if window > self.window {
            self.before = if window == self.window + 1 { self.now } else { 0 };
            (self.window, self.now) = (window, 0);
        }
        self
    }
}

impl Demand {
    /// `window_ms` is the time that counts.
    pub(crate) fn new(window_ms: u64) -> Self {
        Demand { window_ms: window_ms.max(1), inner: Mutex::default() }
    }

    /// A lease was signed for this content.
    pub(crate) fn asked(&self, content: Digest, now: u64) {
        let window = now / self.window_ms;
        let mut inner = self.lock();
        if inner.asked.len() >= MOST_CONTENTS && !inner.asked.contains_key(&content) {
            inner.asked.retain(|_, asked| window.saturating_sub(asked.window) <= 1);
            if inner.asked.len() >= MOST_CONTENTS {
                return;
            }
        }
        let asked = inner.asked.entry(content).or_insert(Asked { window, ..Asked::default() });
        *asked = asked.roll(window);
        asked.now = asked.now.saturating_add(1);
    }

    /// Leases signed for it within about one window up to now.
    pub(crate) fn recent(&self, content: &Digest, now: u64) -> u32 {
        let Some(asked) = self.lock().asked.get(content).map(|asked| asked.roll(now / self.window_ms)) else {
            return 0;
        };
        // Of the window before, the part that is within one window's time.
        let left = self.window_ms - now % self.window_ms;
        let before = u64::from(asked.before).saturating_mul(left) / self.window_ms;
        asked.now.saturating_add(u32::try_from(before).unwrap_or(u32::MAX))
    }

    /// What a seeder says of clients that it turned away since its last report.
    pub(crate) fn turned_away(&self, seeder: PeerId, clients: u32, now: u64) {
        let mut inner = self.lock();
        if clients > 0 {
            inner.crowded.insert(seeder, now);
        } else if inner.crowded.get(&seeder).is_some_and(|at| now.saturating_sub(*at) > self.window_ms) {
            inner.crowded.remove(&seeder);
        }
    }

    /// Whether a seeder turned clients away lately.
    pub(crate) fn is_crowded(&self, seeder: &PeerId, now: u64) -> bool {
        self.lock().crowded.get(seeder).is_some_and(|at| now.saturating_sub(*at) <= self.window_ms)
    }

    // A thread that panicked while it held this lock was between plain map operations.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demand_is_of_the_last_window_and_fades() {
        let demand = Demand::new(1000);
        let (content, other) = (Digest::from_bytes([1; 32]), Digest::from_bytes([2; 32]));
        for at in [5000, 5100, 5900, 5999] {
            demand.asked(content, at);
        }
        assert_eq!((demand.recent(&content, 5999), demand.recent(&other, 5999)), (4, 0));
        assert_eq!(demand.recent(&content, 6250), 3, "three quarters of the window before are within a second");
        demand.asked(content, 6250);
        assert_eq!(demand.recent(&content, 6500), 3);
        assert_eq!(demand.recent(&content, 7999), 0);
        assert_eq!(demand.recent(&content, 9000), 0);
    }

    #[test]
    fn a_seeder_is_crowded_for_a_while_after_it_turned_clients_away() {
        let (demand, seeder) = (Demand::new(1000), PeerId::from_bytes([1; 32]));
        demand.turned_away(seeder, 0, 5000);
        assert!(!demand.is_crowded(&seeder, 5000));
        demand.turned_away(seeder, 3, 5000);
        demand.turned_away(seeder, 0, 5500);
        assert!(demand.is_crowded(&seeder, 6000) && !demand.is_crowded(&seeder, 6001));
    }
}
