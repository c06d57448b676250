//! Is it really that late? What is closed, given back or void because its time is over stays so. A clock that is ahead when
//! the manager starts, or that jumps while it runs, would have it all done at once; so the wall clock is held against one
//! that nobody sets, and against those of seeders.

use std::fmt;

use protocol::clock::ClockState;

use crate::config::Config;

/// One moment by two clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    /// Unix milliseconds by this machine's clock, which may be set.
    pub(crate) wall: u64,
    /// Milliseconds since the manager started, which run on whatever is set.
    pub(crate) running: u64,
}

/// Receipts that could not come in while this manager was away come within minutes of its return: seeders try again every
/// minute and a half at least. So long a clock that jumped is distrusted, too. Milliseconds.
const WAIT_MS: u64 = 60 * 60 * 1000;
/// Until then seeders have compared their clocks with one that was set: they report every half minute. Milliseconds.
const COMPARED_MS: u64 = 5 * 60 * 1000;
/// Clocks are stepped by less than this without harm, whatever the grace, milliseconds.
const STEPPED_MS: u64 = 60 * 1000;

/// Why nothing is done that only time does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// What could not come in while the manager was away may come now.
    Started,
    /// The clock went ahead by so many milliseconds at once.
    Jumped(u64),
    /// Most seeders say that it is ahead, by so many milliseconds.
    Ahead(u64),
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Held::Started => f.write_str("the manager has just started"),
            Held::Jumped(by) => write!(f, "this machine's clock went {} at once", ClockState::Ahead(*by)),
            Held::Ahead(by) => write!(f, "this machine's clock is {} of most seeders'", ClockState::Ahead(*by)),
        }
    }
}

/// Tells whether the wall clock may be gone by.
#[derive(Debug)]
pub(crate) struct Watch {
    grace_ms: u64,
    wait_ms: u64,
    /// What the wall clock showed when the manager started, as far as it is believed. Moves with a clock that is set, unix
    /// milliseconds.
    believed: u64,
    /// When the clock was first seen ahead of that.
    jumped_at: Option<u64>,
}

impl Watch {
    /// Of a manager that started when its clock showed `started_at`.
    pub(crate) fn new(config: &Config, started_at: u64) -> Watch {
        Watch {
            grace_ms: config.clock_grace_ms.max(STEPPED_MS),
            wait_ms: config.close_grace_ms.min(WAIT_MS),
            believed: started_at,
            jumped_at: None,
        }
    }

    /// Why nothing is closed at this moment, if so; `clock` is what seeders say of it.
    ///
    /// # Errors
    /// [`Held`].
    pub(crate) fn look(&mut self, at: Moment, clock: ClockState) -> Result<(), Held> {
        // What it would have shown at the start: one that is only a little off from there was slewed.
        let shown = at.wall.saturating_sub(at.running);
        let ahead = shown.saturating_sub(self.believed);
        let jumped_at = (ahead > self.grace_ms).then(|| self.jumped_at.unwrap_or(at.running));
        let since = jumped_at.map(|jumped_at| at.running.saturating_sub(jumped_at));
        let believed = match since {
            None => true,
            Some(since) => since >= self.wait_ms.max(COMPARED_MS) || since >= COMPARED_MS && clock == ClockState::Good,
        };
        self.jumped_at = jumped_at.filter(|_| !believed);
        if believed {
            self.believed = shown;
        }
        match clock {
            ClockState::Ahead(by) => Err(Held::Ahead(by)),
            _ if !believed => Err(Held::Jumped(ahead)),
            _ if at.running < self.wait_ms => Err(Held::Started),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: u64 = 60_000;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    const START: u64 = 20_000 * DAY;

    fn watch(started_at: u64) -> Watch {
        Watch::new(&Config::default(), started_at)
    }

    fn at(wall: u64, running: u64) -> Moment {
        Moment { wall, running }
    }

    #[test]
    fn it_waits_after_a_start_and_goes_by_a_clock_that_runs() {
        let mut watch = watch(START);
        assert_eq!(watch.look(at(START, 0), ClockState::Unknown), Err(Held::Started));
        assert_eq!(watch.look(at(START + HOUR - 1, HOUR - 1), ClockState::Unknown), Err(Held::Started));
        for hours in 1..1000 {
            // It may be slewed all the time, as long as it is not stepped.
            let drifted = START + hours * (HOUR + 5 * MINUTE);
            assert_eq!(watch.look(at(drifted, hours * HOUR), ClockState::Unknown), Ok(()), "{hours}");
        }
    }

    #[test]
    fn a_jump_is_believed_after_an_hour_or_when_seeders_agree() {
        let mut watch = watch(START);
        assert_eq!(watch.look(at(START + DAY, DAY), ClockState::Good), Ok(()));
        let later = |ms: u64| at(START + 11 * DAY + ms, DAY + ms);
        // Seeders were last compared with before the jump.
        assert_eq!(watch.look(later(0), ClockState::Good), Err(Held::Jumped(10 * DAY)));
        // Set right: nothing is the matter, and the next jump is one of its own.
        assert_eq!(watch.look(at(START + DAY + MINUTE, DAY + MINUTE), ClockState::Unknown), Ok(()));
        assert_eq!(watch.look(later(HOUR), ClockState::Unknown), Err(Held::Jumped(10 * DAY)));
        assert_eq!(watch.look(later(2 * HOUR - 1), ClockState::Unknown), Err(Held::Jumped(10 * DAY)));
        assert_eq!(watch.look(later(2 * HOUR), ClockState::Unknown), Ok(()));
        // Then it counts on from there, and seeders that agree are enough.
        let further = |ms: u64| at(START + 15 * DAY + ms, 2 * DAY + ms);
        assert_eq!(watch.look(further(0), ClockState::Unknown), Err(Held::Jumped(3 * DAY)));
        assert_eq!(watch.look(further(COMPARED_MS), ClockState::Unknown), Err(Held::Jumped(3 * DAY)));
        assert_eq!(watch.look(further(COMPARED_MS), ClockState::Good), Ok(()));
    }

    #[test]
    fn a_clock_that_is_known_to_be_ahead_is_never_gone_by() {
        let mut watch = watch(START);
        for hours in 1..100 {
            let moment = at(START + hours * HOUR, hours * HOUR);
            assert_eq!(watch.look(moment, ClockState::Ahead(DAY)), Err(Held::Ahead(DAY)));
        }
        // One that is behind closes nothing too early.
        assert_eq!(watch.look(at(START + 100 * HOUR, 100 * HOUR), ClockState::Behind(DAY)), Ok(()));
    }

    #[test]
    fn a_clock_that_was_ahead_at_the_start_is_set_back_and_no_more() {
        let mut watch = watch(START + 365 * DAY);
        assert_eq!(watch.look(at(START + 365 * DAY + 1, 1), ClockState::Unknown), Err(Held::Started));
        assert_eq!(watch.look(at(START + MINUTE, MINUTE), ClockState::Unknown), Err(Held::Started));
        assert_eq!(watch.look(at(START + HOUR, HOUR), ClockState::Unknown), Ok(()));
        assert!(watch.look(at(START + 300 * DAY, 2 * HOUR), ClockState::Unknown).is_err());
    }
}
