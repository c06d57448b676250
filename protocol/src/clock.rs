//! What a node knows of its own clock by comparing it with others'. Three answers, never two: a comparison that failed
//! says nothing about the clock, and must not be taken for a clock that is wrong.

use std::fmt;

use crate::refusal::{Refusal, RefusalCode};

/// A clock compared with another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockState {
    /// Not compared, or not lately.
    #[default]
    Unknown,
    /// Within the grace.
    Good,
    /// Behind the other clock by so many milliseconds.
    Behind(u64),
    /// Ahead of it.
    Ahead(u64),
}

impl ClockState {
    /// Compares this node's clock with another's, unix milliseconds; differences up to `grace_ms` do no harm.
    pub fn compare(ours: u64, theirs: u64, grace_ms: u64) -> Self {
        let (behind, ahead) = (theirs.saturating_sub(ours), ours.saturating_sub(theirs));
        match () {
            () if behind > grace_ms => ClockState::Behind(behind),
            () if ahead > grace_ms => ClockState::Ahead(ahead),
            () => ClockState::Good,
        }
    }

    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            ClockState::Unknown => "unknown",
            ClockState::Good => "good",
            ClockState::Behind(_) | ClockState::Ahead(_) => "off",
        }
    }

    /// How far it is off, milliseconds: negative when it is behind; `None` where it is not off.
    pub fn off_by_ms(self) -> Option<i64> {
        match self {
            ClockState::Unknown | ClockState::Good => None,
            ClockState::Behind(ms) => Some(-i64::try_from(ms).unwrap_or(i64::MAX)),
            ClockState::Ahead(ms) => Some(i64::try_from(ms).unwrap_or(i64::MAX)),
        }
    }

    /// What a seeder with such a clock refuses that is good, where it is off: the ticket's time is looked at by that clock.
    pub const fn refused_by_it(self) -> Option<&'static str> {
        match self {
            ClockState::Unknown | ClockState::Good => None,
            ClockState::Behind(_) => Some("tickets that were made within that time"),
            ClockState::Ahead(_) => {
                Some("tickets that end within that time, and those of products with a shorter staleness")
            }
        }
    }

    /// It is known to be wrong.
    pub fn is_off(self) -> bool {
        self.off_by_ms().is_some()
    }
}

/// Milliseconds and names, the largest first.
const UNITS: [(u64, &str); 4] = [(86_400_000, "day"), (3_600_000, "hour"), (60_000, "minute"), (1000, "second")];

/// `good`, `unknown`, `12 minutes behind`, `3 hours ahead`.
impl fmt::Display for ClockState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ms, which) = match self {
            ClockState::Unknown | ClockState::Good => return f.write_str(self.as_str()),
            ClockState::Behind(ms) => (*ms, "behind"),
            ClockState::Ahead(ms) => (*ms, "ahead"),
        };
        // The largest unit of which there are two or more: 90 minutes say more than one hour.
        let (unit, name) = UNITS.into_iter().find(|(unit, _)| ms >= 2 * unit).unwrap_or((1000, "second"));
        let count = ms.saturating_add(unit / 2) / unit;
        write!(f, "{count} {name}{} {which}", if count == 1 { "" } else { "s" })
    }
}

impl Refusal {
    /// The same refusal, as told to the node whose clock shows `ours`: one for time says how far that clock is off by the
    /// refuser's, where the difference is what the refusal may be about.
    #[must_use]
    pub fn compared_with(self, ours: u64, grace_ms: u64) -> Refusal {
        let for_time = matches!(self.code, RefusalCode::NotYetValid | RefusalCode::Expired);
        if !for_time || self.now == 0 {
            return self;
        }
        let state = ClockState::compare(ours, self.now, grace_ms);
        if !state.is_off() {
            return self;
        }
        let Refusal { code, detail, retry_after_ms, now } = self;
        let said = Refusal::new(code, format!("{detail}; your clock is {state}"));
        Refusal { retry_after_ms, now, ..said }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;

    #[test]
    fn a_clock_is_good_off_or_unknown() {
        let state = |ours, theirs| ClockState::compare(ours, theirs, 10 * MINUTE);
        assert_eq!(state(100 * MINUTE, 110 * MINUTE), ClockState::Good);
        assert_eq!(state(110 * MINUTE, 100 * MINUTE), ClockState::Good);
        assert_eq!(state(100 * MINUTE, 110 * MINUTE + 1), ClockState::Behind(10 * MINUTE + 1));
        assert_eq!(state(110 * MINUTE + 1, 100 * MINUTE), ClockState::Ahead(10 * MINUTE + 1));
        assert_eq!(state(0, u64::MAX).off_by_ms(), Some(-i64::MAX));
        assert!(!ClockState::Unknown.is_off());
        for state in [ClockState::Unknown, ClockState::Good, ClockState::Behind(1), ClockState::Ahead(1)] {
            assert_eq!(state.refused_by_it().is_some(), state.is_off(), "{state}");
        }
        assert_eq!(ClockState::default().as_str(), "unknown");
    }

    #[test]
    fn a_difference_is_told_in_words() {
        for (ms, text) in [
            (12 * MINUTE, "12 minutes"),
            (90 * MINUTE, "90 minutes"),
            (119 * MINUTE, "119 minutes"),
            (180 * MINUTE, "3 hours"),
            (72 * 60 * MINUTE, "3 days"),
            (1500, "2 seconds"),
            (400, "0 seconds"),
            (MINUTE, "60 seconds"),
        ] {
            assert_eq!(ClockState::Behind(ms).to_string(), format!("{text} behind"));
            assert_eq!(ClockState::Ahead(ms).to_string(), format!("{text} ahead"));
        }
    }

    #[test]
    fn a_refusal_for_time_says_whose_clock_is_off() {
        let refusal = Refusal::new(RefusalCode::NotYetValid, "the ticket begins in 720 s").at(100 * MINUTE);
        let told = refusal.clone().compared_with(88 * MINUTE, 10 * MINUTE);
        assert_eq!(told.detail, "the ticket begins in 720 s; your clock is 12 minutes behind");
        assert_eq!((told.code, told.now), (refusal.code, refusal.now));
        // Not because of the clock; not about time; without the refuser's clock.
        assert_eq!(refusal.clone().compared_with(95 * MINUTE, 10 * MINUTE), refusal);
        let other = Refusal::new(RefusalCode::Revoked, "x").at(100 * MINUTE);
        assert_eq!(other.clone().compared_with(0, 0), other);
        let silent = Refusal::new(RefusalCode::Expired, "x");
        assert_eq!(silent.clone().compared_with(5, 0), silent);
    }
}
