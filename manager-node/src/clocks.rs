//! Is this manager's clock right? Leases and heartbeats carry it, and a wrong one has good tickets refused everywhere. Every
//! seeder says in its reports what its own clock shows; one of them may be wrong, most of them are not.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use protocol::PeerId;
use protocol::clock::ClockState;
use serde_json::{Value, json};

/// A report says nothing about clocks any more after this time, milliseconds.
const KNOWN_MS: u64 = 60 * 60 * 1000;
/// Seeders whose clocks are remembered: far more than a median needs. Beyond it the one heard longest ago goes.
const MAX_SEEDERS: usize = 1024;
/// So many others must have reported before this manager's clock is called wrong.
const ENOUGH: usize = 3;

/// What the clocks of seeders showed.
#[derive(Debug, Default)]
pub(crate) struct Clocks(Mutex<HashMap<PeerId, Reading>>);

#[derive(Clone, Copy, Debug)]
struct Reading {
    /// The seeder's clock less this one, milliseconds.
    offset: i64,
    /// Unix milliseconds.
    at: u64,
}

/// The time that counts: this manager's, or that of most seeders where they agree that this one is wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Right {
    now: u64,
    right: u64,
    grace_ms: u64,
}

impl Right {
    /// A seeder's clock that was so far from this one.
    pub(crate) fn of_seeder(&self, offset: i64) -> ClockState {
        ClockState::compare(self.now.saturating_add_signed(offset), self.right, self.grace_ms)
    }
}

impl Clocks {
    /// Notes that the clock of `seeder` shows `theirs` when this one shows `now`.
    pub(crate) fn note(&self, seeder: PeerId, theirs: u64, now: u64) {
        let offset = offset(theirs, now);
        let mut readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if readings.len() >= MAX_SEEDERS && !readings.contains_key(&seeder) {
            let oldest = readings.iter().min_by_key(|(_, reading)| reading.at).map(|(peer, _)| *peer);
            oldest.and_then(|peer| readings.remove(&peer));
        }
        readings.insert(seeder, Reading { offset, at: now });
    }

    /// What clocks of seeders are compared with when this one shows `now`. All that are remembered are looked at for it: who
    /// asks about many seeders asks for this once.
    pub(crate) fn right(&self, now: u64, grace_ms: u64) -> Right {
        let by_most = self.state(now, grace_ms).off_by_ms().map_or(0, i64::saturating_neg);
        Right { now, right: now.saturating_add_signed(by_most), grace_ms }
    }

    /// This clock by the median of theirs: unknown while nobody has reported lately, or too few to contradict it.
    pub(crate) fn state(&self, now: u64, grace_ms: u64) -> ClockState {
        let readings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = readings.values().filter(|reading| now.abs_diff(reading.at) <= KNOWN_MS);
        let mut offsets: Vec<i64> = fresh.map(|reading| reading.offset).collect();
        offsets.sort_unstable();
        let Some(median) = offsets.get(offsets.len() / 2) else { return ClockState::Unknown };
        match ClockState::compare(now, now.saturating_add_signed(*median), grace_ms) {
            off if off.is_off() && offsets.len() < ENOUGH => ClockState::Unknown,
            state => state,
        }
    }

    /// As it is shown in `status`.
    pub(crate) fn to_json(&self, now: u64, grace_ms: u64) -> Value {
        let state = self.state(now, grace_ms);
        json!({ "state": state.as_str(), "off_by_ms": state.off_by_ms(), "text": state.to_string() })
    }
}

/// Milliseconds from this clock to another one.
pub(crate) fn offset(theirs: u64, now: u64) -> i64 {
    i64::try_from(i128::from(theirs) - i128::from(now)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;
    const GRACE: u64 = 10 * MINUTE;

    #[test]
    fn only_several_seeders_together_call_this_clock_wrong() {
        let (clocks, now) = (Clocks::default(), 1_000_000 * MINUTE);
        let peer = |n: u8| PeerId::from_bytes([n; 32]);
        let state = || clocks.state(now, GRACE);
        assert_eq!(state(), ClockState::Unknown);
        clocks.note(peer(1), now + 12 * MINUTE, now);
        clocks.note(peer(2), now + 12 * MINUTE, now);
        assert_eq!(state(), ClockState::Unknown, "two may be wrong together");
        clocks.note(peer(3), now + 12 * MINUTE, now);
        assert_eq!(state(), ClockState::Behind(12 * MINUTE));
        clocks.note(peer(3), now, now);
        clocks.note(peer(4), now + 1, now);
        clocks.note(peer(5), now, now);
        assert_eq!(state(), ClockState::Good, "two of five are wrong");
        // What was heard long ago says nothing: not that it is good, nor that it is off.
        assert_eq!(clocks.state(now + KNOWN_MS + 1, GRACE), ClockState::Unknown);
    }

    #[test]
    fn a_seeders_clock_is_judged_by_most_of_them_where_this_one_is_wrong() {
        let (clocks, now) = (Clocks::default(), 1_000_000 * MINUTE);
        let hours = |hours: i64| hours * 60 * i64::try_from(MINUTE).unwrap_or(0);
        assert_eq!(clocks.right(now, GRACE).of_seeder(hours(-2)), ClockState::Behind(120 * MINUTE));
        assert_eq!(clocks.right(now, GRACE).of_seeder(hours(2)), ClockState::Ahead(120 * MINUTE));
        assert_eq!(clocks.right(now, GRACE).of_seeder(1), ClockState::Good);
        for n in 1..=3 {
            clocks.note(PeerId::from_bytes([n; 32]), now + 120 * MINUTE, now);
        }
        assert_eq!(clocks.right(now, GRACE).of_seeder(hours(2)), ClockState::Good, "it is this one that is behind");
        assert_eq!(clocks.right(now, GRACE).of_seeder(0), ClockState::Behind(120 * MINUTE));
    }

    #[test]
    fn the_memory_is_bounded() {
        let clocks = Clocks::default();
        for n in 0..2 * MAX_SEEDERS as u64 {
            let mut bytes = [0; 32];
            bytes.iter_mut().zip(n.to_le_bytes()).for_each(|(to, from)| *to = from);
            clocks.note(PeerId::from_bytes(bytes), n, n);
        }
        assert_eq!(clocks.0.lock().map(|readings| readings.len()).ok(), Some(MAX_SEEDERS));
    }
}
