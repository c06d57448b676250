//! How many seeders are to send at the same time. Each chunk comes from one of them, in one piece: on a line that all of
//! them share, more of them do not bring more, but make each chunk take longer, until seeders take this client for one that
//! does not read. Where seeders are what is slow, every one of them helps. Which of the two it is shows when one is added:
//! beside all that are busy, or it would show nothing. So a fast one that came late is found, however many slow ones there
//! are, once it has a place among those that are talked to ([`super::Places`]); one that brought nothing is let go of again. One that was measured to be far faster than those that are busy is asked
//! beside them by the scheduler, whatever was tried before it came.

/// Seeders at the beginning, before anything is known of the line.
const FIRST: usize = 2;
/// While each of them would bring a chunk within this time, one more does no harm, milliseconds.
const SOON_MS: u64 = 4_000;
/// One that is added is judged by what comes after this time, milliseconds.
const TRIAL_MS: u64 = 6_000;
/// When it brought nothing, another is tried after this time, milliseconds; twice as long each time, up to the other.
const AGAIN_MS: u64 = 30_000;
const MOST_MS: u64 = 600_000;
/// Where each of them takes longer for a chunk, others are looked for, milliseconds.
const SLOW_MS: u64 = 30_000;
/// Less for each of them, bytes per second, and seeders begin to take their client for a hostile one.
const LEAST_RATE: u64 = 16 * 1024;

/// The machine.
#[derive(Debug)]
pub struct Crowd {
    chunk_size: u64,
    most: usize,
    kept: usize,
    trial: Trial,
    /// Pause after a trial that brought nothing: longer and longer while none does.
    again_ms: u64,
}

/// How many seeders are to be busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// While so many are, no other is asked.
    pub most: usize,
    /// So many of those who are go on, the fastest; the others bring what they owe.
    pub kept: usize,
}

impl Room {
    /// The same where so many chunks fit into memory at once: whoever is asked beyond that waits until a slow one's is whole,
    /// for each chunk anew, and its seeder with it. `untried` are those of whom nothing is known yet, while those that are busy
    /// are slow: the slowest of these make room for them, as many as half of all at a time.
    pub fn within(self, fits: usize, untried: usize) -> Room {
        let left = fits.saturating_sub(untried.min(fits / 2));
        Room { most: self.most.min(fits), kept: self.kept.min(left) }
    }
}

#[derive(Clone, Copy, Debug)]
enum Trial {
    /// None before this time.
    NotBefore(u64),
    /// Some are added: what came before that, bytes per second, from how many, what the most was, and when it is judged.
    Since { rate: u64, busy: usize, most: usize, until: u64 },
}

impl Crowd {
    /// For chunks of so many bytes.
    pub fn new(chunk_size: u32) -> Self {
        let chunk_size = u64::from(chunk_size.max(1));
        Crowd { chunk_size, most: FIRST, kept: usize::MAX, trial: Trial::NotBefore(0), again_ms: AGAIN_MS }
    }

    /// Would a chunk from each of those who are busy take so long at this rate that others are worth looking for?
    pub fn is_slow(&self, rate: Option<u64>, busy: usize) -> bool {
        let busy = u64::try_from(busy).unwrap_or(u64::MAX);
        // Not where more of them were tried, and brought nothing: it is the line then.
        self.kept == usize::MAX
            && rate.is_some_and(|rate| rate.saturating_mul(SLOW_MS) / 1000 < self.chunk_size.saturating_mul(busy))
    }

    /// Seeders that may owe something at once, when so many bytes per second come from all of them together, `None` while
    /// that cannot be told, and so many do. `others` says whether anybody else is there who could be asked: nothing is tried
    /// without them, so that whoever comes is tried at once. Time is in milliseconds.
    pub fn room(&mut self, rate: Option<u64>, busy: usize, others: bool, now: u64) -> Room {
        let most = self.most(rate, busy, others, now);
        Room { most, kept: self.kept.max(most) }
    }

    fn most(&mut self, rate: Option<u64>, busy: usize, others: bool, now: u64) -> usize {
        let Some(rate) = rate else { return self.most };
        let ample = usize::try_from(rate.saturating_mul(SOON_MS) / 1000 / self.chunk_size).unwrap_or(usize::MAX);
        if ample > self.most {
            (self.most, self.kept, self.trial) = (ample, usize::MAX, Trial::NotBefore(now));
            self.again_ms = AGAIN_MS;
            return self.most;
        }
        let bearable = usize::try_from(rate / LEAST_RATE).unwrap_or(usize::MAX).max(1);
        match self.trial {
            // Whoever was let go of has to bring what it owes first.
            Trial::NotBefore(_) if busy > self.kept => {
                self.trial = Trial::NotBefore(now.saturating_add(self.again_ms));
            }
            Trial::NotBefore(at) if now >= at && busy >= self.most && others => {
                let until = now.saturating_add(TRIAL_MS);
                let more = if self.most <= bearable { (self.most / 2).max(1) } else { 1 };
                self.trial = Trial::Since { rate, busy, most: self.most, until };
                (self.most, self.kept) = (busy.saturating_add(more), usize::MAX);
            }
            Trial::Since { rate: before, busy: those, most, until } if now >= until => {
                // What came for each of them before, for half of those that were added.
                let added = u64::try_from(busy.min(self.most).saturating_sub(those)).unwrap_or(u64::MAX);
                let each = before / u64::try_from(those).unwrap_or(u64::MAX).max(1);
                let helps = rate >= before.saturating_add(each.saturating_mul(added) / 2) && added > 0;
                match () {
                    () if helps => self.again_ms = AGAIN_MS,
                    // Whoever was there is gone.
                    () if added == 0 => self.most = most,
                    () => {
                        (self.most, self.kept) = (most, those);
                        self.again_ms = self.again_ms.saturating_mul(2).min(MOST_MS);
                    }
                }
                let again = if helps || added == 0 { now } else { now.saturating_add(self.again_ms) };
                self.trial = Trial::NotBefore(again);
            }
            Trial::NotBefore(_) | Trial::Since { .. } => {}
        }
        if bearable < self.most && !matches!(self.trial, Trial::Since { .. }) {
            self.most = bearable.max(self.most / 2);
        }
        self.most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    /// What `most` comes to after a while, where so many seeders of `each` bytes per second share a line of `line`.
    fn settles(seeders: usize, each: u64, line: u64, seconds: u64) -> (usize, usize) {
        let mut crowd = Crowd::new(MIB);
        let (mut least, mut last) = (usize::MAX, 0);
        for tenth in 0..seconds * 10 {
            let busy = crowd.most.min(seeders);
            let rate = (each * busy as u64).min(line);
            last = crowd.most(Some(rate), busy, busy < seeders, tenth * 100).min(seeders);
            least = least.min(last);
        }
        (least, last)
    }

    #[test]
    fn no_more_are_busy_than_memory_holds_chunks_of_and_the_slowest_make_room_for_who_was_never_tried() {
        let room = |most, kept| Room { most, kept };
        let all = room(20, usize::MAX);
        assert_eq!((all.within(16, 0), all.within(16, 3)), (room(16, 16), room(16, 13)));
        assert_eq!((all.within(16, 30), all.within(2, 30)), (room(16, 8), room(2, 1)));
        assert_eq!(room(20, 10).within(16, 3), room(16, 10));
        assert_eq!(room(6, usize::MAX).within(16, 3), room(6, 13));
    }

    #[test]
    fn a_fast_line_is_for_all_of_them_at_once() {
        let mut crowd = Crowd::new(MIB);
        assert_eq!(crowd.most(None, 0, true, 0), FIRST);
        assert!(crowd.most(Some(50_000_000), 2, true, 30) >= 64);
    }

    #[test]
    fn a_slow_line_is_for_few() {
        for line in [30_000, 150_000, 300_000, 500_000] {
            let (_, most) = settles(16, u64::MAX / 64, line, 600);
            assert!(most <= 3, "{most} at {line}");
        }
        assert_eq!(settles(16, u64::MAX / 64, 10_000, 600).1, 1);
    }

    #[test]
    fn where_seeders_are_what_is_slow_each_of_them_is_asked() {
        assert_eq!(settles(16, 20_000, u64::MAX, 120).1, 16);
        assert_eq!(settles(50, 100_000, u64::MAX, 120).1, 50);
    }

    #[test]
    fn on_a_slow_line_one_more_is_tried_seldom_and_not_before_it_brought_what_it_owes() {
        let mut crowd = Crowd::new(MIB);
        // Two are busy all the time; whoever is added owes two chunks, which take long.
        let (mut busy, mut owes_until, mut trials, mut three) = (2, None, 0, 0);
        /// Four hours, in tenths of a second.
        const LONG: u64 = 4 * 36_000;
        for tenth in 0..LONG {
            let now = tenth * 100;
            let room = crowd.room(Some(20_000), busy, true, now);
            if busy == 2 && room.most > busy {
                (busy, owes_until, trials) = (3, Some(now + 2 * 157_000), trials + 1);
            }
            if owes_until.is_some_and(|until| now >= until) {
                (busy, owes_until) = (2, None);
            }
            three += u64::from(busy == 3);
        }
        assert!(trials > 1, "the line may be another by then");
        assert!(three < LONG / 2, "{three} of {LONG}");
    }

    #[test]
    fn a_line_that_becomes_faster_is_filled() {
        let mut crowd = Crowd::new(MIB);
        for tenth in 0..100 {
            crowd.most(Some(150_000), 2, true, tenth * 100);
        }
        assert!(crowd.most(Some(20_000_000), 2, true, 10_100) >= 16);
    }

    #[test]
    fn a_fast_one_that_comes_back_to_a_slow_one_that_sends_is_tried_at_once() {
        let mut crowd = Crowd::new(MIB);
        crowd.room(Some(5_000_000), 2, false, 0);
        // The fast one is away; what is left is a slow one, and nobody else.
        let mut now = 4_000;
        while now < 25_000 {
            assert!(crowd.room(Some(10_000), 1, false, now).most < 20);
            now += 100;
        }
        assert!(crowd.room(Some(10_000), 1, true, now).most > 1, "it is asked as soon as it is there");
    }
}
