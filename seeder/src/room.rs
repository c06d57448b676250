//! How full this seeder is, and how much more it offers. Content is removed above the high-water mark until the low-water mark
//! is reached; so what is offered ends below the one where copies are needed, and at the other where they are not: otherwise
//! what was placed here would be removed again, and placed again, for ever.

use crate::config::Config;
use crate::context::Seeder;

/// Files and folders of one content: its folder and the five files in it.
pub(crate) const INODES_PER_CONTENT: u64 = 6;

/// How full it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    /// Free on the disk, above what is to stay free; `None` where the system does not say.
    pub(crate) disk_bytes: Option<i128>,
    pub(crate) disk_inodes: Option<i128>,
}

/// What has to go to be below a mark.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Excess {
    pub(crate) bytes: u64,
    pub(crate) contents: u64,
}

impl Excess {
    pub(crate) fn is_none(self) -> bool {
        self == Excess::default()
    }

    pub(crate) fn less(self, bytes: u64) -> Excess {
        Excess { bytes: self.bytes.saturating_sub(bytes), contents: self.contents.saturating_sub(1) }
    }

    fn and(self, other: Excess) -> Excess {
        Excess { bytes: self.bytes.max(other.bytes), contents: self.contents.max(other.contents) }
    }
}

/// Bytes that may be placed here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Room {
    /// Of copies that are missing.
    pub(crate) free: u64,
    /// Of copies beyond those that there have to be.
    pub(crate) spare: u64,
}

impl Usage {
    pub(crate) fn of(seeder: &Seeder) -> Usage {
        let root = seeder.contents.root();
        let above = |free: Result<u64, _>, kept: u64| {
            let free: Result<u64, delivery::FileError> = free;
            free.ok().map(|free| i128::from(free) - i128::from(kept))
        };
        Usage {
            bytes: seeder.contents.total_bytes(),
            inodes: (seeder.contents.list().len() + seeder.contents.damaged().len()) as u64 * INODES_PER_CONTENT,
            disk_bytes: above(delivery::free_space(root), seeder.config.min_free),
            disk_inodes: above(delivery::free_inodes(root), seeder.config.min_free_inodes),
        }
    }

    /// What has to go now: nothing below the high-water mark of the quota, or of the disk's own limits; above it all down to
    /// the low one.
    pub(crate) fn overfull(&self, config: &Config) -> Excess {
        match self.excess(config, config.high_water_percent) {
            none if none.is_none() => none,
            _ => self.excess(config, config.low_water_percent),
        }
    }

    /// What is above `percent` of the quota, or of the disk's own limits.
    fn excess(&self, config: &Config, percent: u32) -> Excess {
        let above = |used: u64, quota: u64| {
            let mark = u128::from(quota) * u128::from(percent) / 100;
            u64::try_from(u128::from(used).saturating_sub(mark)).unwrap_or(u64::MAX)
        };
        let short = |left: Option<i128>| u64::try_from(left.map_or(0, |left| (-left).max(0))).unwrap_or(u64::MAX);
        let of_quota = if config.max_inodes == 0 { 0 } else { above(self.inodes, config.max_inodes) };
        Excess {
            bytes: above(self.bytes, config.capacity).max(short(self.disk_bytes)),
            contents: of_quota.max(short(self.disk_inodes)).div_ceil(INODES_PER_CONTENT),
        }
    }

    /// Where the system does not say what the disk has left, nothing is offered.
    pub(crate) fn room(&self, config: &Config) -> Room {
        Room { free: self.below(config, offered_percent(config)), spare: self.below(config, config.low_water_percent) }
    }

    /// Bytes up to `percent` of all that may be used; none where there is no place for one more content's files.
    fn below(&self, config: &Config, percent: u32) -> u64 {
        if !self.has_inodes(config, percent) {
            return 0;
        }
        let left = self.mark(config, percent) - i128::from(self.bytes);
        u64::try_from(left.max(0)).unwrap_or(u64::MAX)
    }

    /// `percent` of the bytes that may be used: of the capacity, or where the disk has less, of what is used and left there.
    fn mark(&self, config: &Config, percent: u32) -> i128 {
        let of_disk = self.disk_bytes.map_or(0, |left| i128::from(self.bytes) + left);
        i128::from(config.capacity).min(of_disk).max(0) * i128::from(percent) / 100
    }

    fn has_inodes(&self, config: &Config, percent: u32) -> bool {
        let quota = if config.max_inodes == 0 { i128::MAX / 200 } else { i128::from(config.max_inodes) };
        let of_disk = self.disk_inodes.map_or(i128::MAX / 200, |left| i128::from(self.inodes) + left);
        i128::from(self.inodes + INODES_PER_CONTENT) <= quota.min(of_disk) * i128::from(percent) / 100
    }

    /// What has to go so that `needed` more bytes find room; nothing where they never do.
    pub(crate) fn lacks(&self, config: &Config, needed: u64) -> Excess {
        let percent = offered_percent(config);
        let (mark, needed) = (self.mark(config, percent), i128::from(needed));
        if needed > mark {
            return Excess::default();
        }
        let bytes = u64::try_from((i128::from(self.bytes) + needed - mark).max(0)).unwrap_or(u64::MAX);
        Excess { bytes, contents: u64::from(!self.has_inodes(config, percent)) }
    }

    /// What has to go, for both reasons.
    pub(crate) fn must_go(&self, config: &Config, needed: u64) -> Excess {
        let ordered = if needed == 0 { Excess::default() } else { self.lacks(config, needed) };
        self.overfull(config).and(ordered)
    }
}

/// One below the high-water mark: what is offered and used to the last byte makes nothing go.
fn offered_percent(config: &Config) -> u32 {
    config.high_water_percent.saturating_sub(1).max(config.low_water_percent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_of_the_quota_and_of_the_disk() {
        let config = Config { capacity: 1000, max_inodes: 60, ..Config::default() };
        let usage = Usage { bytes: 960, inodes: 30, disk_bytes: Some(5), disk_inodes: None };
        assert_eq!(usage.excess(&config, 95), Excess { bytes: 10, contents: 0 });
        assert_eq!(usage.excess(&config, 80), Excess { bytes: 160, contents: 0 });
        assert!(usage.has_inodes(&config, 94));
        let many = Usage { bytes: 10, inodes: 60, disk_bytes: Some(-7), disk_inodes: Some(-13) };
        assert_eq!(many.excess(&config, 95), Excess { bytes: 7, contents: 3 });
        assert!(!many.has_inodes(&config, 94));
        let endless = Config { max_inodes: 0, ..config };
        assert_eq!(Usage { inodes: 1 << 40, ..Usage::default() }.excess(&endless, 95), Excess::default());
    }

    #[test]
    fn what_is_offered_and_used_makes_nothing_go() {
        let config = Config { capacity: 1000, max_inodes: 0, ..Config::default() };
        let ample = Usage { disk_bytes: Some(1 << 40), disk_inodes: Some(1 << 20), ..Usage::default() };
        assert_eq!(ample.room(&config), Room { free: 940, spare: 800 });
        for usage in [ample, Usage { bytes: 700, ..ample }, Usage { bytes: 790, disk_bytes: Some(100), ..ample }] {
            let Room { free, spare } = usage.room(&config);
            assert!(spare < free, "{usage:?}");
            let fill = |bytes: u64| Usage {
                bytes: usage.bytes + bytes,
                disk_bytes: usage.disk_bytes.map(|left| left - i128::from(bytes)),
                ..usage
            };
            assert!(fill(free).overfull(&config).is_none());
            assert_eq!(fill(free).room(&config).free, 0, "what is used is not offered again");
            assert!(fill(free).disk_bytes.is_some_and(|left| left > 0), "the disk has a margin, too");
            assert_eq!(fill(spare).room(&config).spare, 0);
        }
        // Down to the low-water mark, and nothing is taken in addition for that.
        let over = Usage { bytes: 960, ..ample };
        assert_eq!((over.overfull(&config).bytes, over.room(&config)), (160, Room::default()));
        assert_eq!(Usage { bytes: 800, ..ample }.room(&config), Room { free: 140, spare: 0 });
        // The same for files.
        let config = Config { max_inodes: 60, ..config };
        assert_eq!(Usage { inodes: 42, ..ample }.room(&config), Room { free: 940, spare: 800 });
        assert_eq!(Usage { inodes: 48, ..ample }.room(&config), Room { free: 940, spare: 0 });
        assert_eq!(Usage { inodes: 54, ..ample }.room(&config), Room::default());
        // A disk of which nothing is known offers nothing.
        assert_eq!(Usage { disk_bytes: None, ..ample }.room(&config), Room::default());
    }

    #[test]
    fn an_order_makes_as_much_go_as_it_needs() {
        let config = Config { capacity: 1000, max_inodes: 0, ..Config::default() };
        let usage = Usage { bytes: 900, disk_bytes: Some(1 << 40), disk_inodes: None, ..Usage::default() };
        assert_eq!(usage.must_go(&config, 0), Excess::default());
        assert_eq!(usage.must_go(&config, 40), Excess::default());
        assert_eq!(usage.must_go(&config, 100), Excess { bytes: 60, contents: 0 });
        assert_eq!(usage.must_go(&config, 941), Excess::default(), "it never fits");
        assert_eq!(Usage { bytes: 960, ..usage }.must_go(&config, 10), Excess { bytes: 160, contents: 0 });
        let config = Config { max_inodes: 60, ..config };
        assert_eq!(Usage { inodes: 54, ..usage }.must_go(&config, 40), Excess { bytes: 0, contents: 1 });
    }
}
