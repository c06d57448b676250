//! Times as people read them. Documents and messages have unix milliseconds; whoever reads a refusal or what a file proves
//! cannot read those.

use std::fmt;

/// Unix milliseconds that are printed as date and time, `2026-11-25 07:21:08.738 UTC`; without the part of a second where
/// there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Utc(pub u64);

const DAY_MS: u64 = 86_400_000;
/// Days of 400 years: then the calendar begins again.
const ERA_DAYS: u64 = 146_097;
/// From the first of March of the year 0 to the beginning of 1970.
const BEFORE_1970: u64 = 719_468;

impl fmt::Display for Utc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, ms) = (self.0 / DAY_MS + BEFORE_1970, self.0 % DAY_MS);
        // Years begin in March here, so that the day that is not in each of them is the last one.
        let (era, day) = (days / ERA_DAYS, days % ERA_DAYS);
        let year = (day - day / 1460 + day / 36_524 - day / (ERA_DAYS - 1)) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (year, month) = match month {
            0..=9 => (era * 400 + year, month + 3),
            _ => (era * 400 + year + 1, month - 9),
        };
        let (hour, minute, second) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
        write!(f, "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")?;
        match ms % 1000 {
            0 => f.write_str(" UTC"),
            ms => write!(f, ".{ms:03} UTC"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_a_date_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399_999, "2000-02-28 23:59:59.999 UTC"),
            (951_782_400_000, "2000-02-29 00:00:00 UTC"),
            (951_868_800_000, "2000-03-01 00:00:00 UTC"),
            (1_795_591_268_738, "2026-11-25 07:21:08.738 UTC"),
            (1_798_761_599_001, "2026-12-31 23:59:59.001 UTC"),
            (1_798_761_600_000, "2027-01-01 00:00:00 UTC"),
            (4_107_542_400_000, "2100-03-01 00:00:00 UTC"),
            (253_402_300_799_000, "9999-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(Utc(ms).to_string(), text);
        }
        // Whatever number stands in a document.
        assert!(Utc(u64::MAX).to_string().ends_with(" UTC"));
    }
}
