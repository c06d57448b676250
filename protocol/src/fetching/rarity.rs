//! Which chunks the fewest seeders hold: where seeders hold only parts, those come first, while the ones that everybody
//! holds can wait for anybody.

use crate::ranges::ChunkSet;

/// Runs of chunks and how many of the connected seeders hold them.
#[derive(Debug, Default)]
pub(super) struct Rarity {
    /// Start, end, number of holders; in order.
    runs: Vec<(u32, u32, u32)>,
}

impl Rarity {
    /// Counts over what the connected seeders hold.
    pub(super) fn of<'a>(held: impl Iterator<Item = &'a ChunkSet>) -> Self {
        let mut edges: Vec<(u32, bool)> =
            held.flat_map(|set| set.ranges().flat_map(|range| [(range.start, true), (range.end, false)])).collect();
        edges.sort_unstable();
        let (mut runs, mut holders, mut from) = (Vec::new(), 0u32, 0);
        for (at, begins) in edges {
            if holders > 0 && from < at {
                runs.push((from, at, holders));
            }
            from = at;
            holders = if begins { holders.saturating_add(1) } else { holders.saturating_sub(1) };
        }
        Rarity { runs }
    }

    /// Those of `chunks` that the fewest hold.
    pub(super) fn rarest(&self, chunks: &ChunkSet) -> ChunkSet {
        let (mut fewest, mut rarest) = (u32::MAX, ChunkSet::new());
        let mut runs = self.runs.iter().peekable();
        for range in chunks.ranges() {
            while let Some(&&(start, end, holders)) = runs.peek() {
                let (from, to) = (start.max(range.start), end.min(range.end));
                if from < to && holders <= fewest {
                    if holders < fewest {
                        (fewest, rarest) = (holders, ChunkSet::new());
                    }
                    rarest.insert_range(from..to);
                }
                if end > range.end {
                    break; // it may reach into the next range
                }
                runs.next();
            }
        }
        rarest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set() -> impl Strategy<Value = ChunkSet> {
        prop::collection::vec((0u32..50, 1u32..12), 0..5)
            .prop_map(|ranges| ranges.into_iter().flat_map(|(start, len)| start..start + len).collect())
    }

    proptest! {
        #[test]
        fn the_sweep_is_the_definition(held in prop::collection::vec(set(), 0..6), chunks in set()) {
            let holders = |chunk: u32| held.iter().filter(|set| set.contains(chunk)).count();
            let fewest = chunks.iter().map(holders).filter(|n| *n > 0).min();
            let expected: ChunkSet = chunks.iter().filter(|c| Some(holders(*c)) == fewest).collect();
            prop_assert_eq!(Rarity::of(held.iter()).rarest(&chunks), expected);
        }
    }
}
