//! Which chunks need not be verified again right now: those that were a moment ago, in a file that nobody has touched
//! since. What is read often lies in the system's cache, so verifying it once more would look at the same memory; a disk
//! that lost bits shows when the file is read from it again, which is after this memory has run out.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use protocol::ChunkSet;

/// A chunk is verified again this long after it last was, at the latest. Milliseconds.
pub const FRESH_MS: u64 = 60_000;

/// Half of it: what was verified is kept in two sets, and the older one is dropped whole.
const TURN_MS: u64 = FRESH_MS / 2;

/// A file system's clock is coarse: a file that was written to this short a time ago could be again without its times
/// showing it. Milliseconds.
const COARSE_MS: u64 = 2_000;

/// What tells that a file is still the one that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    file: (u64, u64),
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    pub(super) fn of(found: &Metadata) -> Stamp {
        Stamp {
            file: (found.dev(), found.ino()),
            length: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }

    /// Would a write from now on show in the times?
    fn has_settled(&self, now_ms: u64) -> bool {
        let newest = self.modified.max(self.changed).0;
        u64::try_from(newest).is_ok_and(|s| s.saturating_add(1).saturating_mul(1_000) + COARSE_MS <= now_ms)
    }
}

/// The chunks of one content that were verified lately. Time is unix milliseconds; a clock that is set makes it forget.
#[derive(Debug, Default)]
pub(super) struct Freshness {
    stamp: Option<Stamp>,
    recent: ChunkSet,
    older: ChunkSet,
    turned_at: u64,
}

impl Freshness {
    /// Was the chunk verified lately, in a file that had this stamp, and has it now?
    pub(super) fn holds(&mut self, chunk: u32, stamp: &Stamp, now_ms: u64) -> bool {
        self.age(now_ms);
        self.stamp.as_ref() == Some(stamp) && (self.recent.contains(chunk) || self.older.contains(chunk))
    }

    /// The chunk was verified in a file that had this stamp before it was read.
    pub(super) fn note(&mut self, chunk: u32, stamp: Stamp, now_ms: u64) {
        if !stamp.has_settled(now_ms) {
            return;
        }
        self.age(now_ms);
        if self.stamp != Some(stamp) {
            *self = Freshness { stamp: Some(stamp), turned_at: now_ms, ..Freshness::default() };
        }
        self.recent.insert(chunk);
    }

    fn age(&mut self, now_ms: u64) {
        let Some(age) = now_ms.checked_sub(self.turned_at).filter(|age| *age < 2 * TURN_MS) else {
            *self = Freshness { turned_at: now_ms, stamp: self.stamp, ..Freshness::default() };
            return;
        };
        if age >= TURN_MS {
            self.older = std::mem::take(&mut self.recent);
            self.turned_at = now_ms;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn stamp(seconds_ago: i64) -> Stamp {
        let at = (NOW / 1_000) as i64 - seconds_ago;
        Stamp { file: (1, 2), length: 3, modified: (at, 0), changed: (at, 0) }
    }

    #[test]
    fn it_holds_for_less_than_a_minute_whenever_it_was_noted() {
        for begin in [0, 1, TURN_MS - 1, TURN_MS, FRESH_MS] {
            let mut fresh = Freshness::default();
            // Something else sets the beat.
            fresh.note(7, stamp(100), NOW);
            fresh.note(1, stamp(100), NOW + begin);
            assert!(fresh.holds(1, &stamp(100), NOW + begin));
            let mut last = 0;
            for after in 0..3 * FRESH_MS / 500 {
                if fresh.holds(1, &stamp(100), NOW + begin + after * 500) {
                    last = after * 500;
                }
            }
            assert!((TURN_MS - 500..FRESH_MS).contains(&last), "noted after {begin}, held for {last} ms");
        }
    }

    #[test]
    fn a_file_that_was_touched_holds_nothing() {
        let mut fresh = Freshness::default();
        let before = stamp(100);
        fresh.note(1, before, NOW);
        for touched in [
            Stamp { file: (1, 3), ..before },
            Stamp { length: 4, ..before },
            Stamp { modified: (before.modified.0, 1), ..before },
            Stamp { changed: (before.changed.0, 1), ..before },
        ] {
            assert!(fresh.holds(1, &before, NOW));
            assert!(!fresh.holds(1, &touched, NOW), "{touched:?}");
            let mut fresh = Freshness::default();
            fresh.note(1, before, NOW);
            fresh.note(2, touched, NOW);
            assert!(!fresh.holds(1, &before, NOW), "only one stamp is kept");
            assert!(!fresh.holds(1, &touched, NOW));
        }
    }

    #[test]
    fn nothing_is_noted_of_a_file_that_was_just_written() {
        for seconds_ago in [-5, 0, 1, 2] {
            let mut fresh = Freshness::default();
            fresh.note(1, stamp(seconds_ago), NOW);
            assert!(!fresh.holds(1, &stamp(seconds_ago), NOW), "{seconds_ago}");
        }
        let mut fresh = Freshness::default();
        fresh.note(1, stamp(3), NOW);
        assert!(fresh.holds(1, &stamp(3), NOW));
    }

    #[test]
    fn a_clock_that_is_set_makes_it_forget() {
        for now in [NOW - 1, 0, NOW + FRESH_MS, u64::MAX] {
            let mut fresh = Freshness::default();
            fresh.note(1, stamp(100), NOW);
            assert!(!fresh.holds(1, &stamp(100), now), "{now}");
        }
    }
}
