//! The one place where this crate asks what time it is; the machines are told. There are two times: what is signed or
//! shown goes by the wall clock, which is set and jumps; what lasts goes by the time that this process runs.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two looks at the clock no more time than this counts: a fetch that runs looks four times a second. What is
/// longer, the machine slept or the process was stopped, and nobody can have answered it.
const MOST_AT_ONCE: Duration = Duration::from_secs(1);
/// Times begin well after 0, which stands for never.
const BEGIN: Duration = Duration::from_secs(24 * 3600);

/// Unix milliseconds; 0 for a clock that stands before 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds that this process ran, from no particular beginning: for durations only.
pub(crate) fn running_ms() -> u64 {
    static CLOCK: Mutex<Option<RunningClock>> = Mutex::new(None);
    // A thread that panicked while it held this lock was between two plain assignments.
    let mut clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    // Read under the lock, or two threads' looks could come in the wrong order.
    let now = Instant::now();
    clock.get_or_insert(RunningClock { looked: now, ran: BEGIN }).look(now)
}

/// A time of [`running_ms`] as people and other programs read it: unix milliseconds.
pub(crate) fn unix_ms(running: u64) -> u64 {
    let now = running_ms();
    now_ms().saturating_add(running.saturating_sub(now)).saturating_sub(now.saturating_sub(running))
}

#[derive(Debug)]
struct RunningClock {
    looked: Instant,
    ran: Duration,
}

impl RunningClock {
    fn look(&mut self, now: Instant) -> u64 {
        self.ran += now.saturating_duration_since(self.looked).min(MOST_AT_ONCE);
        self.looked = now;
        u64::try_from(self.ran.as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_the_process_did_not_run_does_not_count() {
        let start = Instant::now();
        let mut clock = RunningClock { looked: start, ran: BEGIN };
        let mut at = start;
        for _ in 0..40 {
            at += Duration::from_millis(250);
            clock.look(at);
        }
        let before = clock.look(at);
        assert_eq!(before, clock.look(start + Duration::from_secs(10)), "ten seconds of running are ten seconds");
        let slept = clock.look(at + Duration::from_secs(9 * 3600));
        assert_eq!(slept - before, 1_000, "nine hours of sleep are none");
        assert_eq!(clock.look(start), slept, "and it never goes back");
    }

    #[test]
    fn a_time_to_come_is_shown_by_the_wall_clock() {
        let shown = unix_ms(running_ms() + 60_000);
        assert!(shown.abs_diff(now_ms() + 60_000) < 5_000, "{shown}");
    }
}
