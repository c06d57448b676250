//! The one place where this crate reads the clock and waits at random: everything below takes time as an argument.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Now, unix milliseconds; 0 for a clock before 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long to wait after `failures` failures in a row: doubling from `min` up to `max` milliseconds, of which a random
/// half is taken off so that many nodes do not come back in step after an outage.
pub(crate) fn back_off(failures: u32, min: u64, max: u64) -> Duration {
    let doubled = min.saturating_mul(1u64.checked_shl(failures.min(32)).unwrap_or(u64::MAX)).clamp(1, max.max(1));
    Duration::from_millis(rand::random_range(doubled.div_ceil(2)..=doubled))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_bound() {
        for failures in 0..80 {
            let wait = back_off(failures, 100, 5_000).as_millis();
            let full = (100u128 << failures.min(40)).min(5_000);
            assert!(wait >= full / 2 && wait <= full, "{failures}: {wait}");
        }
    }
}
