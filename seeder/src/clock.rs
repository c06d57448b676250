//! The one place where this crate asks what time it is and draws jitter; everything that judges is given the time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::RngExt;

/// Unix milliseconds by this machine's clock.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// When something was noted, by a clock that shows `now`. A time that is still to come was noted by a clock that was ahead and
/// has been set right since: it tells nothing, and nobody is to wait for it.
pub(crate) fn noted_at(at: u64, now: u64) -> u64 {
    if at > now { 0 } else { at }
}

/// Is what is put off until `at`, and never by more than `most_ms`, due? Also where a clock that was ahead put it off.
pub(crate) fn is_due(at: u64, now: u64, most_ms: u64) -> bool {
    at.checked_sub(now).is_none_or(|left| left == 0 || left > most_ms)
}

/// Between half of `ms` and one and a half of it, so that many nodes do not come all at once.
pub(crate) fn jittered(ms: u64) -> u64 {
    let ms = ms.max(2);
    rand::rng().random_range(ms / 2..=ms.saturating_add(ms / 2))
}

/// A pause that doubles with each failure.
#[derive(Debug)]
pub(crate) struct BackOff {
    first_ms: u64,
    next_ms: u64,
}

/// Longest pause, milliseconds, before jitter.
const LONGEST_PAUSE_MS: u64 = 60_000;

impl BackOff {
    pub(crate) fn new(first_ms: u64) -> Self {
        BackOff { first_ms, next_ms: first_ms }
    }

    /// The pause after one more failure.
    pub(crate) fn pause(&mut self) -> Duration {
        let ms = jittered(self.next_ms);
        self.next_ms = self.next_ms.saturating_mul(2).min(LONGEST_PAUSE_MS.max(self.first_ms));
        Duration::from_millis(ms)
    }

    /// It worked.
    pub(crate) fn reset(&mut self) {
        self.next_ms = self.first_ms;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_clock_that_was_ahead_noted_is_not_waited_for() {
        assert_eq!((noted_at(10, 10), noted_at(11, 10), noted_at(0, 10)), (10, 0, 0));
        let due = [0, 10, 11, 15, 16, u64::MAX].map(|at| is_due(at, 10, 5));
        assert_eq!(due, [true, true, false, false, true, true]);
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_no_two_nodes_come_together() {
        let mut nodes: Vec<BackOff> = (0..100).map(|_| BackOff::new(1000)).collect();
        for base in [1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000] {
            let pauses: std::collections::BTreeSet<u128> = nodes.iter_mut().map(|n| n.pause().as_millis()).collect();
            assert!(pauses.iter().all(|&ms| ms >= base / 2 && ms <= base * 3 / 2), "{pauses:?}");
            assert!(pauses.len() > 50, "a hundred nodes come at {} moments", pauses.len());
        }
        let mut node = BackOff::new(1000);
        node.pause();
        node.reset();
        assert!(node.pause().as_millis() <= 1500);
    }
}
