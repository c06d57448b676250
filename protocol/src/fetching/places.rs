//! How many seeders are talked to at once. Where all of those are slow, nothing is known of who waits for a place: any of
//! them may be far faster, and none of the slow ones goes away by itself. So there is one more place now and then, up to
//! twice as many; once a fast one has it, those that are slow do not matter any more.

/// The machine.
#[derive(Debug)]
pub struct Places {
    first: usize,
    more: usize,
    every_ms: u64,
    /// For so long it was slow since the last one was added, not in one piece: what comes slowly comes in jerks.
    slow_ms: u64,
    /// When that was looked at last.
    seen: Option<u64>,
}

impl Places {
    /// So many to begin with, and one more for each of these times, milliseconds, in which all of them are slow.
    pub fn new(first: usize, every_ms: u64) -> Self {
        Places { first, more: 0, every_ms, slow_ms: 0, seen: None }
    }

    /// Is there one more from now on? `wanted` says whether those that are busy are slow, as [`super::Crowd::is_slow`] knows
    /// it, while somebody waits for a place. Time is in milliseconds.
    pub fn one_more(&mut self, wanted: bool, now: u64) -> bool {
        let passed = self.seen.replace(now).map_or(0, |seen| now.saturating_sub(seen));
        if !wanted || self.more >= self.first {
            return false;
        }
        self.slow_ms = self.slow_ms.saturating_add(passed);
        if self.slow_ms < self.every_ms {
            return false;
        }
        (self.slow_ms, self.more) = (0, self.more + 1);
        true
    }

    /// So many there are.
    pub fn count(&self) -> usize {
        self.first.saturating_add(self.more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_more_for_each_time_in_which_it_is_slow_and_never_more_than_twice_as_many() {
        let (mut places, mut now) = (Places::new(3, 30_000), 0);
        let mut pass = |wanted, seconds: u64| {
            for _ in 0..seconds * 4 {
                now += 250;
                places.one_more(wanted, now);
            }
            places.count()
        };
        assert_eq!(pass(false, 1000), 3, "it is not slow, or nobody waits");
        assert_eq!((pass(true, 20), pass(false, 1000), pass(true, 9), pass(true, 1)), (3, 3, 3, 4));
        assert_eq!((pass(true, 30), pass(true, 29), pass(true, 1)), (5, 5, 6));
        assert_eq!(pass(true, 1000), 6);
    }
}
