//! Sets of chunks as sorted ranges: acknowledgements, wants and what a seeder holds are long runs, so ranges are small
//! where a bitmap of a large product is not, and they have a canonical form that can be signed.

use bincode::{Decode, Encode};

/// A set of chunk numbers, kept as sorted half-open ranges that neither touch nor overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode)]
pub struct ChunkSet {
    ranges: Vec<(u32, u32)>,
}

impl ChunkSet {
    /// Most ranges in a set that is sent or signed.
    pub const MAX_RANGES: usize = 256;

    /// The empty set.
    pub const fn new() -> Self {
        ChunkSet { ranges: Vec::new() }
    }

    /// All chunks in `range` (half open).
    pub fn from_range(range: std::ops::Range<u32>) -> Self {
        let mut set = ChunkSet::new();
        set.insert_range(range);
        set
    }

    /// Number of chunks.
    pub fn len(&self) -> u32 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    /// True when there is no chunk in it.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of ranges that it takes to write the set down.
    pub fn range_count(&self) -> usize {
        self.ranges.len()
    }

    /// The ranges in order.
    pub fn ranges(&self) -> impl DoubleEndedIterator<Item = std::ops::Range<u32>> + '_ {
        self.ranges.iter().map(|&(start, end)| start..end)
    }

    /// The chunks in order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.ranges().flatten()
    }

    /// One past the highest chunk, 0 for the empty set.
    pub fn end(&self) -> u32 {
        self.ranges.last().map_or(0, |&(_, end)| end)
    }

    /// The lowest chunk.
    pub fn first(&self) -> Option<u32> {
        self.ranges.first().map(|&(start, _)| start)
    }

    /// Is `chunk` in the set?
    pub fn contains(&self, chunk: u32) -> bool {
        let after = self.ranges.partition_point(|&(start, _)| start <= chunk);
        after.checked_sub(1).and_then(|i| self.ranges.get(i)).is_some_and(|&(_, end)| chunk < end)
    }

    /// Adds one chunk; false when it was there already.
    pub fn insert(&mut self, chunk: u32) -> bool {
        if self.contains(chunk) {
            return false;
        }
        self.insert_range(chunk..chunk.saturating_add(1));
        true
    }

    /// Adds a half-open range.
    pub fn insert_range(&mut self, range: std::ops::Range<u32>) {
        if range.start >= range.end {
            return;
        }
        // All ranges that overlap or touch the new one are replaced by their hull.
        let from = self.ranges.partition_point(|&(_, end)| end < range.start);
        let to = self.ranges.partition_point(|&(start, _)| start <= range.end);
        let (mut start, mut end) = (range.start, range.end);
        let touched = self.ranges.get(from..to).unwrap_or_default();
        if let (Some(first), Some(last)) = (touched.first(), touched.last()) {
            start = start.min(first.0);
            end = end.max(last.1);
        }
        self.ranges.splice(from..to.max(from), [(start, end)]);
    }

    /// Takes one chunk out; false when it was not there.
    pub fn remove(&mut self, chunk: u32) -> bool {
        let after = self.ranges.partition_point(|&(start, _)| start <= chunk);
        let Some(index) = after.checked_sub(1) else { return false };
        let Some(&(start, end)) = self.ranges.get(index) else { return false };
        if chunk >= end {
            return false;
        }
        let parts = [(start, chunk), (chunk + 1, end)];
        self.ranges.splice(index..=index, parts.into_iter().filter(|(s, e)| s < e));
        true
    }

    /// All chunks of both.
    #[must_use]
    pub fn union(&self, other: &ChunkSet) -> ChunkSet {
        ChunkSet { ranges: merge(self.ranges.iter().copied(), other.ranges.iter().copied()) }
    }

    /// Chunks of this set that are not in `other`.
    #[must_use]
    pub fn difference(&self, other: &ChunkSet) -> ChunkSet {
        let mut out = Vec::new();
        let mut others = other.ranges.iter().peekable();
        for &(mut start, end) in &self.ranges {
            while let Some(&&(o_start, o_end)) = others.peek() {
                if o_end <= start {
                    others.next();
                    continue;
                }
                if o_start >= end {
                    break;
                }
                if o_start > start {
                    out.push((start, o_start));
                }
                start = o_end;
                if o_end >= end {
                    break;
                }
            }
            if start < end {
                out.push((start, end));
            }
        }
        ChunkSet { ranges: out }
    }

    /// Chunks in both sets.
    #[must_use]
    pub fn intersection(&self, other: &ChunkSet) -> ChunkSet {
        self.difference(&self.difference(other))
    }

    /// Is every chunk of `other` in this set?
    pub fn is_superset(&self, other: &ChunkSet) -> bool {
        other.difference(self).is_empty()
    }

    fn is_canonical(&self) -> bool {
        self.ranges.iter().all(|(start, end)| start < end)
            && self.ranges.windows(2).all(|pair| matches!(pair, [(_, end), (start, _)] if end < start))
    }
}

/// Two lists of sorted ranges as one, looking at each range once: inserting them one by one would move those behind each
/// time, and a manager does this for up to 64 seeders with 256 ranges each at every receipt of a delivery.
fn merge(a: impl Iterator<Item = (u32, u32)>, b: impl Iterator<Item = (u32, u32)>) -> Vec<(u32, u32)> {
    let (mut a, mut b) = (a.peekable(), b.peekable());
    let mut out: Vec<(u32, u32)> = Vec::new();
    loop {
        let first = match (a.peek(), b.peek()) {
            (Some(x), Some(y)) if x <= y => a.next(),
            (Some(_), None) => a.next(),
            _ => b.next(),
        };
        let Some((start, end)) = first else { return out };
        match out.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => out.push((start, end)),
        }
    }
}

impl FromIterator<u32> for ChunkSet {
    fn from_iter<I: IntoIterator<Item = u32>>(chunks: I) -> Self {
        let mut set = ChunkSet::new();
        for chunk in chunks {
            set.insert(chunk);
        }
        set
    }
}

impl std::fmt::Display for ChunkSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 8;
        if self.is_empty() {
            return f.write_str("none");
        }
        for (i, &(start, end)) in self.ranges.iter().take(SHOWN).enumerate() {
            let comma = if i == 0 { "" } else { "," };
            if end - start == 1 {
                write!(f, "{comma}{start}")?;
            } else {
                write!(f, "{comma}{start}-{}", end - 1)?;
            }
        }
        match self.ranges.len() {
            n if n > SHOWN => write!(f, ",… ({} chunks)", self.len()),
            _ => Ok(()),
        }
    }
}

impl<C> Decode<C> for ChunkSet {
    fn decode<D: bincode::de::Decoder<Context = C>>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let set = ChunkSet { ranges: Vec::<(u32, u32)>::decode(decoder)? };
        if set.ranges.len() > Self::MAX_RANGES {
            return Err(bincode::error::DecodeError::Other("more than 256 ranges in a set of chunks"));
        }
        if !set.is_canonical() {
            return Err(bincode::error::DecodeError::Other("ranges of chunks that are not sorted or touch"));
        }
        Ok(set)
    }
}

bincode::impl_borrow_decode!(ChunkSet);

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn model(set: &ChunkSet) -> BTreeSet<u32> {
        set.iter().collect()
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(a in prop::collection::vec((0u32..60, 0u32..8), 0..20), b in prop::collection::vec(0u32..60, 0..40)) {
            let mut set = ChunkSet::new();
            let mut expected = BTreeSet::new();
            for (start, len) in a {
                set.insert_range(start..start + len);
                expected.extend(start..start + len);
                prop_assert!(set.is_canonical());
            }
            let other: ChunkSet = b.iter().copied().collect();
            let other_model: BTreeSet<u32> = b.iter().copied().collect();
            prop_assert_eq!(model(&set), expected.clone());
            prop_assert_eq!(set.len() as usize, expected.len());
            prop_assert_eq!(model(&set.union(&other)), &expected | &other_model);
            prop_assert_eq!(model(&set.difference(&other)), &expected - &other_model);
            prop_assert_eq!(model(&set.intersection(&other)), &expected & &other_model);
            prop_assert_eq!(set.is_superset(&other), expected.is_superset(&other_model));
            prop_assert!(set.difference(&other).is_canonical());
            for chunk in b {
                prop_assert_eq!(set.remove(chunk), expected.remove(&chunk));
                prop_assert!(set.is_canonical());
            }
            prop_assert_eq!(model(&set), expected);
        }
    }

    #[test]
    fn a_union_looks_at_each_range_once() {
        // 64 seeders with 256 ranges each, interleaved so that none touches another: the largest count of a delivery.
        let looked = std::cell::Cell::new(0_usize);
        let mut union: Vec<(u32, u32)> = Vec::new();
        for seeder in 0..64_u32 {
            let ranges = (0..256_u32).map(|i| (i * 128 + seeder * 2, i * 128 + seeder * 2 + 1));
            let before = union.len();
            let (had, new) = (std::mem::take(&mut union), looked.get());
            union = merge(
                had.into_iter().inspect(|_| looked.set(looked.get() + 1)),
                ranges.inspect(|_| looked.set(looked.get() + 1)),
            );
            assert_eq!(looked.get() - new, before + 256);
        }
        assert_eq!(union.len(), 64 * 256);
    }

    #[test]
    fn only_the_canonical_form_is_decoded() {
        let config = bincode::config::standard();
        for bad in [vec![(3u32, 3u32)], vec![(0, 2), (2, 4)], vec![(5, 6), (1, 2)], vec![(0, 9), (3, 4)]] {
            let bytes = bincode::encode_to_vec(&bad, config).unwrap();
            assert!(bincode::decode_from_slice::<ChunkSet, _>(&bytes, config).is_err(), "{bad:?}");
        }
        let many: Vec<(u32, u32)> = (0..257).map(|i| (i * 2, i * 2 + 1)).collect();
        let bytes = bincode::encode_to_vec(&many, config).unwrap();
        assert!(bincode::decode_from_slice::<ChunkSet, _>(&bytes, config).is_err());
    }
}
