//! People share their line with others: a limit in bytes per second over all seeders of a fetch, kept by reading no
//! faster, so that the seeders' own flow control does the rest.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Saved-up time that a pause grants at most, so that a stall is not followed by a burst.
const BURST: Duration = Duration::from_millis(200);

/// Hands out the right to read bytes.
#[derive(Debug)]
pub(super) struct Pace {
    bytes_per_second: u64,
    // When everything granted so far will have been used up.
    used_until: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(bytes_per_second: u64) -> Self {
        Pace { bytes_per_second: bytes_per_second.max(1), used_until: Mutex::new(Instant::now()) }
    }

    /// How long to wait after reading so many bytes.
    pub(super) fn spend(&self, bytes: usize, now: Instant) -> Duration {
        let mut used_until = self.used_until.lock().unwrap_or_else(PoisonError::into_inner);
        let nanos = (bytes as u128 * 1_000_000_000) / u128::from(self.bytes_per_second);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        *used_until = (*used_until).max(earliest) + cost;
        used_until.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_all_and_a_pause_saves_little() {
        let pace = Pace::new(1_000_000);
        let start = Instant::now() + Duration::from_secs(10);
        assert_eq!(pace.spend(200_000, start), Duration::ZERO, "the burst");
        assert_eq!(pace.spend(500_000, start), Duration::from_millis(500));
        assert_eq!(pace.spend(500_000, start), Duration::from_secs(1), "a second reader waits for the first");
    }
}
