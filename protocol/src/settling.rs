//! Who is paid what for one delivery, as arithmetic without a database: what clients acknowledged goes in, in any order
//! and any number of times, and the same payouts come out, never above the ceiling that the lease signed.
//!
//! Money here is counted in *parts*: 2^-20 of a millionth of a minor unit. A rate is millionths per MiB and a MiB is
//! 2^20 bytes, so bytes times rate is a whole number of parts and nothing is rounded before the ledger.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};

use crate::ids::PeerId;
use crate::manifest::Manifest;
use crate::ranges::ChunkSet;
use crate::refusal::RefusalCode;
use crate::wire;

/// Parts in a millionth of a minor unit.
pub const PARTS_PER_MICRO: u128 = 1 << 20;

/// The chunks of a content, as far as counting needs to know them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Layout {
    /// Bytes of ciphertext.
    pub length: u64,
    /// Bytes in each chunk but the last.
    pub chunk_size: u32,
}

impl From<&Manifest> for Layout {
    fn from(manifest: &Manifest) -> Self {
        Layout { length: manifest.length, chunk_size: manifest.chunk_size }
    }
}

impl Layout {
    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        u32::try_from(self.length.div_ceil(u64::from(self.chunk_size.max(1)))).unwrap_or(u32::MAX)
    }

    /// Bytes of one chunk; 0 past the end.
    pub fn chunk_len(&self, index: u32) -> u64 {
        let size = u64::from(self.chunk_size);
        self.length.saturating_sub(u64::from(index).saturating_mul(size)).min(size)
    }

    /// Bytes of a set of chunks.
    pub fn bytes(&self, chunks: &ChunkSet) -> u64 {
        chunks.ranges().map(|range| self.end_of(range.end).saturating_sub(self.end_of(range.start))).sum()
    }

    /// Where chunk `index` begins, or the end of the content.
    fn end_of(&self, index: u32) -> u64 {
        u64::from(index).saturating_mul(u64::from(self.chunk_size)).min(self.length)
    }
}

/// What became of an acknowledgement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It says more than what was known of this seeder.
    Counted {
        /// How many chunks more.
        new_chunks: u32,
    },
    /// It says nothing new.
    Duplicate,
    /// It does not count, and why.
    Rejected {
        /// The reason's name.
        code: RefusalCode,
        /// The reason, for people.
        why: &'static str,
    },
}

/// What each seeder earned with a delivery.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payouts {
    /// One line a seeder that was acknowledged, in the order of peer IDs.
    pub lines: Vec<Payout>,
    /// Sum of the lines' parts: at most the ceiling.
    pub parts: u128,
    /// The full rate came to more than the ceiling, and every line was scaled down.
    pub capped: bool,
}

/// One seeder's part of a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Payout {
    /// Who.
    pub seeder: PeerId,
    /// Bytes it is paid for: chunks that only it was acknowledged for in whole, others shared.
    pub bytes: u64,
    /// Pay, in parts.
    pub parts: u128,
}

impl Payout {
    /// Whole millionths of the minor unit; the remainder stays in `parts`.
    pub fn micros(&self) -> u64 {
        u64::try_from(self.parts / PARTS_PER_MICRO).unwrap_or(u64::MAX)
    }
}

/// The count of one delivery. Acknowledgements may come in any order and again; signatures were checked before.
///
/// Of one seeder the largest acknowledgement counts (by number of chunks, then by its ranges). An honest client's later
/// one is a superset, and so the largest; of others, which one counts must not depend on which came first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Counting {
    acked: BTreeMap<PeerId, ChunkSet>,
    completed: bool,
    closed: bool,
}

wire!(Counting => 256 * 1024);

impl Counting {
    /// Most seeders counted in one delivery: twice what a lease lists. With the largest acknowledgement of each
    /// the count stays below its encoded limit.
    pub const MAX_SEEDERS: usize = 64;

    /// Counts what the client acknowledged to `seeder`.
    pub fn accept(&mut self, layout: &Layout, seeder: PeerId, chunks: &ChunkSet) -> Outcome {
        let rejected = |code, why| Outcome::Rejected { code, why };
        if chunks.end() > layout.chunks() {
            return rejected(RefusalCode::BadAck, "it names chunks that the content does not have");
        }
        if chunks.range_count() > ChunkSet::MAX_RANGES {
            return rejected(RefusalCode::TooLarge, "more than 256 ranges of chunks");
        }
        let held = self.acked.get(&seeder);
        if chunks.is_empty() || held.is_some_and(|held| held.is_superset(chunks)) {
            return Outcome::Duplicate;
        }
        if self.closed {
            return rejected(RefusalCode::WrongState, "the delivery was closed before it came");
        }
        if held.is_none() && self.acked.len() >= Self::MAX_SEEDERS {
            return rejected(RefusalCode::LimitReached, "64 other seeders were acknowledged in this delivery");
        }
        if held.is_some_and(|held| !is_larger(chunks, held)) {
            return rejected(RefusalCode::BadAck, "it contradicts a larger acknowledgement of the same client");
        }
        let before = held.map_or(0, ChunkSet::len);
        let new_chunks = chunks.len().saturating_sub(before);
        self.acked.insert(seeder, chunks.clone());
        Outcome::Counted { new_chunks }
    }

    /// Notes that the client signed the completion; false when that was known.
    pub fn complete(&mut self) -> bool {
        !std::mem::replace(&mut self.completed, true)
    }

    /// The client signed the completion.
    pub fn is_completed(&self) -> bool {
        self.completed
    }

    /// It was closed: nothing is counted any more.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Every chunk was acknowledged to some seeder.
    pub fn is_whole(&self, layout: &Layout) -> bool {
        let union = self.acked.values().fold(ChunkSet::new(), |union, chunks| union.union(chunks));
        union.len() == layout.chunks()
    }

    /// Bytes acknowledged over all seeders: chunks acknowledged to several count for each.
    pub fn claimed_bytes(&self, layout: &Layout) -> u64 {
        self.acked.values().map(|chunks| layout.bytes(chunks)).sum()
    }

    /// Who was acknowledged what.
    pub fn acked(&self) -> impl Iterator<Item = (&PeerId, &ChunkSet)> {
        self.acked.iter()
    }

    /// Closes the delivery: the pay for each chunk is shared by those whom the client acknowledged for it; where the
    /// whole would pass `ceiling` (millionths of the minor unit), every line is scaled down in proportion and the lines
    /// add up to the ceiling exactly. `rate` is millionths of the minor unit per MiB.
    pub fn close(&mut self, layout: &Layout, rate: u64, ceiling: u64) -> Payouts {
        self.closed = true;
        self.payouts(layout, rate, ceiling)
    }

    /// What [`close`](Self::close) would pay now.
    pub fn payouts(&self, layout: &Layout, rate: u64, ceiling: u64) -> Payouts {
        let bytes = self.shared_bytes(layout);
        let total: u128 = bytes.values().copied().map(u128::from).sum();
        let full = total * u128::from(rate);
        let ceiling = u128::from(ceiling) * PARTS_PER_MICRO;
        let capped = full > ceiling;
        let parts = if capped { divide(ceiling, &bytes, total) } else { at_rate(&bytes, rate) };
        let lines = bytes.iter().zip(parts).map(|((&seeder, &bytes), parts)| Payout { seeder, bytes, parts }).collect();
        Payouts { lines, parts: full.min(ceiling), capped }
    }

    /// Bytes that each seeder is paid for: every acknowledged byte once, a contested chunk split to the byte.
    fn shared_bytes(&self, layout: &Layout) -> BTreeMap<PeerId, u64> {
        // (chunk, starts here?, seeder): sweeping over them visits each run of chunks with the same claimants once.
        let mut edges = Vec::new();
        for (&seeder, chunks) in &self.acked {
            for range in chunks.ranges() {
                edges.push((range.start, true, seeder));
                edges.push((range.end, false, seeder));
            }
        }
        edges.sort_unstable();
        let last = layout.chunks().saturating_sub(1);
        let mut bytes: BTreeMap<PeerId, u64> = self.acked.keys().map(|&seeder| (seeder, 0)).collect();
        let mut claimants = BTreeSet::new();
        let mut from = 0;
        for (chunk, starts, seeder) in edges {
            // The last chunk may be shorter than the others: it is a run of its own.
            share(&mut bytes, &claimants, from, chunk.min(last), layout.chunk_len(from));
            share(&mut bytes, &claimants, from.max(last), chunk, layout.chunk_len(last));
            from = chunk;
            if starts {
                claimants.insert(seeder);
            } else {
                claimants.remove(&seeder);
            }
        }
        bytes
    }
}

fn is_larger(a: &ChunkSet, b: &ChunkSet) -> bool {
    let ranges = |set: &ChunkSet| set.ranges().map(|range| (range.start, range.end)).collect::<Vec<_>>();
    (a.len(), ranges(a)) > (b.len(), ranges(b))
}

/// Splits the chunks `from..to`, each of `len` bytes, among the claimants. The bytes that do not divide evenly go round
/// from chunk to chunk, so that no claimant gains by its place in the order.
fn share(bytes: &mut BTreeMap<PeerId, u64>, claimants: &BTreeSet<PeerId>, from: u32, to: u32, len: u64) {
    let shares = claimants.len() as u64;
    if shares == 0 || from >= to {
        return;
    }
    let chunks = u64::from(to - from);
    let (each, odd) = (len / shares, len % shares);
    // Over the run, `odd` bytes a chunk are dealt one by one in a circle that begins where chunk 0 would have put it.
    let (dealt, first) = (chunks * odd, u64::from(from) * odd % shares);
    let (rounds, rest) = (dealt / shares, dealt % shares);
    for (place, seeder) in (0u64..).zip(claimants) {
        let extra = u64::from((place + shares - first) % shares < rest);
        if let Some(sum) = bytes.get_mut(seeder) {
            *sum += chunks * each + rounds + extra;
        }
    }
}

fn at_rate(bytes: &BTreeMap<PeerId, u64>, rate: u64) -> Vec<u128> {
    bytes.values().map(|&bytes| u128::from(bytes) * u128::from(rate)).collect()
}

/// Divides `sum` in proportion to `bytes`, to the last part: what rounding down leaves goes to the largest remainders.
/// `sum` is below 2^84 and a content below 2^42 bytes, so the product fits.
fn divide(sum: u128, bytes: &BTreeMap<PeerId, u64>, total: u128) -> Vec<u128> {
    let total = total.max(1);
    let mut shares: Vec<u128> = bytes.values().map(|&bytes| sum * u128::from(bytes) / total).collect();
    let mut order: Vec<(u128, usize)> =
        bytes.values().enumerate().map(|(i, &bytes)| (sum * u128::from(bytes) % total, i)).collect();
    order.sort_by(|(a, i), (b, j)| b.cmp(a).then(i.cmp(j)));
    let left = sum.saturating_sub(shares.iter().sum());
    for &(_, i) in order.iter().take(usize::try_from(left).unwrap_or(usize::MAX)) {
        if let Some(share) = shares.get_mut(i) {
            *share += 1;
        }
    }
    shares
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]
mod tests {
    use super::*;
    use crate::codec;
    use proptest::prelude::*;

    const CHUNK: u32 = 64 * 1024;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn layout(length: u64) -> Layout {
        Layout { length, chunk_size: CHUNK }
    }

    fn set(ranges: &[(u32, u32)]) -> ChunkSet {
        let mut set = ChunkSet::new();
        ranges.iter().for_each(|&(start, end)| set.insert_range(start..end));
        set
    }

    /// The definition, chunk by chunk and byte by byte, against which the sweep is compared.
    fn shared_by_definition(counting: &Counting, layout: &Layout) -> BTreeMap<PeerId, u64> {
        let mut bytes: BTreeMap<PeerId, u64> = counting.acked().map(|(&seeder, _)| (seeder, 0)).collect();
        for chunk in 0..layout.chunks() {
            let claimants: Vec<PeerId> =
                counting.acked().filter(|(_, set)| set.contains(chunk)).map(|(&s, _)| s).collect();
            let Some(shares) = u64::try_from(claimants.len()).ok().filter(|&n| n > 0) else { continue };
            let (each, odd) = (layout.chunk_len(chunk) / shares, layout.chunk_len(chunk) % shares);
            for seeder in &claimants {
                *bytes.get_mut(seeder).unwrap() += each;
            }
            for i in 0..odd {
                let place = (u64::from(chunk) * odd + i) % shares;
                *bytes.get_mut(&claimants[place as usize]).unwrap() += 1;
            }
        }
        bytes
    }

    #[test]
    fn one_seeder_one_delivery() {
        let layout = layout(3 * u64::from(CHUNK) + 5);
        let mut counting = Counting::default();
        assert_eq!(counting.accept(&layout, peer(1), &set(&[(0, 2)])), Outcome::Counted { new_chunks: 2 });
        assert_eq!(counting.accept(&layout, peer(1), &set(&[(0, 2)])), Outcome::Duplicate);
        assert_eq!(counting.accept(&layout, peer(1), &set(&[(0, 1)])), Outcome::Duplicate);
        assert!(!counting.is_whole(&layout));
        assert_eq!(counting.accept(&layout, peer(1), &set(&[(0, 4)])), Outcome::Counted { new_chunks: 2 });
        assert!(counting.is_whole(&layout));
        let paid = counting.close(&layout, 1_000_000, u64::MAX);
        assert_eq!(paid.lines[0].bytes, layout.length);
        assert_eq!(paid.parts, u128::from(layout.length) * 1_000_000);
        assert_eq!(paid.lines[0].micros(), layout.length * 1_000_000 / (1 << 20));
    }

    #[test]
    fn what_cannot_be_is_rejected_by_name() {
        let layout = layout(4 * u64::from(CHUNK));
        let mut counting = Counting::default();
        let code = |outcome| match outcome {
            Outcome::Rejected { code, .. } => code.as_str(),
            Outcome::Counted { .. } => "counted",
            Outcome::Duplicate => "duplicate",
        };
        assert_eq!(code(counting.accept(&layout, peer(1), &set(&[(3, 5)]))), "bad-ack");
        assert_eq!(code(counting.accept(&layout, peer(1), &set(&[(0, 2)]))), "counted");
        assert_eq!(code(counting.accept(&layout, peer(1), &set(&[(3, 4)]))), "bad-ack");
        assert_eq!(code(counting.accept(&layout, peer(1), &set(&[]))), "duplicate");
        for n in 2..=64 {
            assert_eq!(code(counting.accept(&layout, peer(n), &set(&[(0, 1)]))), "counted");
        }
        assert_eq!(code(counting.accept(&layout, peer(65), &set(&[(0, 1)]))), "limit-reached");
        counting.close(&layout, 1, 1);
        assert_eq!(code(counting.accept(&layout, peer(1), &set(&[(0, 2)]))), "duplicate");
        let late = counting.accept(&layout, peer(1), &set(&[(0, 3)]));
        // Closed, by a refund as by a payment: what was paid is not for the count to say.
        assert!(matches!(late, Outcome::Rejected { why, .. } if !why.contains("paid")), "{late:?}");
        assert_eq!(code(late), "wrong-state");
    }

    #[test]
    fn the_largest_count_fits_its_byte_form() {
        let layout = Layout { length: u64::from(CHUNK) << 20, chunk_size: CHUNK };
        let mut counting = Counting::default();
        let wide: ChunkSet = (0..256u32).map(|i| (1 << 20) - 1 - 2 * i).collect();
        for n in 0..64 {
            assert!(matches!(counting.accept(&layout, peer(n), &wide), Outcome::Counted { new_chunks: 256 }));
        }
        counting.complete();
        let bytes = codec::encode(&counting);
        assert_eq!(codec::decode::<Counting>(&bytes).unwrap(), counting);
    }

    #[test]
    fn amounts_at_the_edge_of_the_integers() {
        let layout = Layout { length: u64::from(4u32 << 20) << 20, chunk_size: 4 << 20 };
        let mut counting = Counting::default();
        for n in 0..64 {
            counting.accept(&layout, peer(n), &set(&[(0, 1 << 20)]));
        }
        let paid = counting.payouts(&layout, u64::MAX, u64::MAX);
        assert!(paid.capped);
        assert_eq!(paid.parts, u128::from(u64::MAX) * PARTS_PER_MICRO);
        assert_eq!(paid.lines.iter().map(|l| l.parts).sum::<u128>(), paid.parts);
        assert_eq!(paid.lines.iter().map(|l| l.bytes).sum::<u64>(), layout.length);
    }

    #[derive(Clone, Debug)]
    struct Case {
        length: u64,
        acks: Vec<(u8, ChunkSet)>,
        rate: u64,
        ceiling: u64,
    }

    fn case() -> impl Strategy<Value = Case> {
        let ack = (0u8..5, prop::collection::vec((0u32..24, 1u32..9), 1..4));
        (1u64..25 * u64::from(CHUNK), prop::collection::vec(ack, 0..14), 0u64..3_000_000, 0u64..4_000_000).prop_map(
            |(length, acks, rate, ceiling)| {
                let acks =
                    acks.into_iter().map(|(n, r)| (n, r.into_iter().flat_map(|(s, l)| s..s + l).collect())).collect();
                Case { length, acks, rate, ceiling }
            },
        )
    }

    fn run(case: &Case, order: impl Iterator<Item = usize>) -> Counting {
        let mut counting = Counting::default();
        for i in order {
            let (n, chunks) = &case.acks[i];
            counting.accept(&layout(case.length), peer(*n), chunks);
        }
        counting
    }

    proptest! {
        #[test]
        fn neither_order_nor_replays_matter(case in case(), seed in any::<u64>()) {
            let n = case.acks.len();
            let straight = run(&case, 0..n);
            let backwards = run(&case, (0..n).rev());
            // A walk that visits every receipt at least once, many of them again.
            let shuffled = run(&case, (0..3 * n).map(|i| (i * 7 + seed as usize % 5) % n.max(1)).chain(0..n));
            prop_assert_eq!(&straight, &backwards);
            prop_assert_eq!(&straight, &shuffled);
        }

        #[test]
        fn pay_is_bounded_and_nothing_is_lost(case in case()) {
            let layout = layout(case.length);
            let counting = run(&case, 0..case.acks.len());
            let paid = counting.payouts(&layout, case.rate, case.ceiling);
            let ceiling = u128::from(case.ceiling) * PARTS_PER_MICRO;
            prop_assert!(paid.parts <= ceiling);
            prop_assert_eq!(paid.lines.iter().map(|l| l.parts).sum::<u128>(), paid.parts);
            let acked: ChunkSet = counting.acked().flat_map(|(_, set)| set.iter()).collect();
            let acked_bytes = layout.bytes(&acked);
            prop_assert_eq!(paid.lines.iter().map(|l| l.bytes).sum::<u64>(), acked_bytes);
            prop_assert_eq!(paid.parts, ceiling.min(u128::from(acked_bytes) * u128::from(case.rate)));
            for (line, (seeder, chunks)) in paid.lines.iter().zip(counting.acked()) {
                prop_assert_eq!(&line.seeder, seeder);
                prop_assert!(line.bytes <= layout.bytes(chunks));
                prop_assert!(line.parts <= u128::from(line.bytes) * u128::from(case.rate));
            }
        }

        #[test]
        fn the_sweep_is_the_definition(case in case()) {
            let counting = run(&case, 0..case.acks.len());
            let layout = layout(case.length);
            prop_assert_eq!(counting.shared_bytes(&layout), shared_by_definition(&counting, &layout));
        }

        #[test]
        fn bytes_of_a_set_are_the_sum_of_its_chunks(case in case()) {
            let layout = layout(case.length);
            for (_, set) in &case.acks {
                prop_assert_eq!(layout.bytes(set), set.iter().map(|i| layout.chunk_len(i)).sum::<u64>());
            }
        }
    }
}
