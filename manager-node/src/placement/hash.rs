//! Rendezvous hashing weighted by capacity: every seeder has a score for every content, and the best have it. So no seeder
//! is favoured, and one that comes or goes moves its own share and nothing else.

use std::collections::HashSet;

use protocol::{Digest, PeerId};

/// A seeder that may be given content.
pub(super) struct Candidate {
    pub(super) peer: PeerId,
    /// Bytes that it offers: its weight.
    pub(super) capacity: u64,
    /// Bytes that it has left for copies that are missing, less those of copies on their way there: below nothing where room
    /// is still to be made for these.
    pub(super) room: i128,
    /// Bytes that it takes beyond these, less the same.
    pub(super) spare: i128,
    /// Bytes of copies there that are not needed: it lets go of them for one that is.
    pub(super) surplus: i128,
}

impl Candidate {
    /// Counts a copy that is to come.
    pub(super) fn take(&mut self, length: u64) {
        self.room -= i128::from(length);
        self.spare -= i128::from(length);
    }
}

/// The `count` best of those that do not have it yet and that it fits, as indices, the best first.
pub(super) fn choose(
    candidates: &[Candidate],
    there: &HashSet<PeerId>,
    manifest: &Digest,
    count: usize,
    fits: impl Fn(&Candidate) -> bool,
) -> Vec<usize> {
    if count == 0 {
        return Vec::new();
    }
    let mut scored: Vec<(f64, usize)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| fits(candidate) && !there.contains(&candidate.peer))
        .map(|(index, candidate)| (score(manifest, &candidate.peer, candidate.capacity), index))
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.truncate(count);
    scored.into_iter().map(|(_, index)| index).collect()
}

/// The best candidate that does not have it, that it fits, and that belongs to the `copies` best of all who are there or could
/// be: a newcomer's own share, which it takes over although there are copies enough.
pub(super) fn rightful(
    candidates: &[Candidate],
    there: &HashSet<PeerId>,
    manifest: &Digest,
    copies: usize,
    fits: impl Fn(&Candidate) -> bool,
) -> Option<usize> {
    let best = *choose(candidates, there, manifest, 1, fits).first()?;
    let newcomer = candidates.get(best)?;
    let own = score(manifest, &newcomer.peer, newcomer.capacity);
    // Holders that are no candidates any more (leaving) give their place up.
    let better = candidates
        .iter()
        .filter(|candidate| there.contains(&candidate.peer))
        .filter(|candidate| score(manifest, &candidate.peer, candidate.capacity) > own)
        .count();
    (better < copies).then_some(best)
}

/// Those of the candidates among `serving` that are not the `copies` best of them, as indices.
pub(super) fn surplus(candidates: &[Candidate], serving: &[PeerId], manifest: &Digest, copies: usize) -> Vec<usize> {
    let Some(over) = serving.len().checked_sub(copies).filter(|over| *over > 0) else { return Vec::new() };
    let mut scored: Vec<(f64, usize)> = candidates
        .iter()
        .enumerate()
        .filter(|(_, candidate)| serving.contains(&candidate.peer))
        .map(|(index, candidate)| (score(manifest, &candidate.peer, candidate.capacity), index))
        .collect();
    scored.sort_by(|a, b| a.0.total_cmp(&b.0));
    scored.truncate(over);
    scored.into_iter().map(|(_, index)| index).collect()
}

/// Weighted rendezvous hashing (Schindelhauer and Schomaker 2005): -weight / ln(hash), hash uniform in (0, 1).
fn score(manifest: &Digest, peer: &PeerId, capacity: u64) -> f64 {
    let digest = Digest::of("willcall 2026-11 placement", &[manifest.as_bytes(), peer.as_bytes()]);
    let hash = digest.as_bytes().first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let uniform = ((hash >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
    -(capacity.max(1) as f64) / uniform.ln()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn candidates(capacities: &[u64]) -> Vec<Candidate> {
        let peer = |n: usize| PeerId::from_bytes([u8::try_from(n).unwrap(); 32]);
        capacities
            .iter()
            .enumerate()
            .map(|(n, c)| Candidate { peer: peer(n), capacity: *c, room: (*c).into(), spare: (*c).into(), surplus: 0 })
            .collect()
    }

    #[test]
    fn copies_follow_capacity_and_room() {
        let all = candidates(&[100, 100, 200, 10]);
        let mut counts = [0u32; 4];
        for n in 0..2000u32 {
            let manifest = Digest::of("test", &[&n.to_le_bytes()]);
            for index in choose(&all, &HashSet::new(), &manifest, 1, |c| c.room >= 5) {
                counts[index] += 1;
            }
        }
        assert!(counts[2] > counts[0] * 3 / 2 && counts[2] > counts[1] * 3 / 2, "{counts:?}");
        assert!(counts[3] < counts[0] / 3, "{counts:?}");

        let manifest = Digest::from_bytes([1; 32]);
        let no_room = choose(&all, &HashSet::new(), &manifest, 9, |c| c.room >= 50);
        assert_eq!(no_room.len(), 3, "the one of 10 bytes has no room");
        let there = HashSet::from([all[0].peer]);
        assert!(!choose(&all, &there, &manifest, 9, |c| c.room >= 5).contains(&0));
    }

    #[test]
    fn a_newcomer_takes_its_own_share_and_nothing_else() {
        let (few, more) = (candidates(&[100, 100, 100]), candidates(&[100, 100, 100, 100]));
        let mut taken = 0;
        for n in 0..400u32 {
            let manifest = Digest::of("test", &[&n.to_le_bytes()]);
            let before = choose(&few, &HashSet::new(), &manifest, 1, |c| c.room >= 1)[0];
            let there = HashSet::from([few[before].peer]);
            let after = choose(&more, &HashSet::new(), &manifest, 1, |c| c.room >= 1)[0];
            assert!(after == before || after == 3);
            // Content that is there already moves exactly where it would have been put with the newcomer present.
            assert_eq!(rightful(&more, &there, &manifest, 1, |c| c.spare >= 1), (after == 3).then_some(3));
            assert_eq!(
                rightful(&few, &there, &manifest, 1, |c| c.spare >= 1),
                None,
                "nothing moves while nobody comes"
            );
            taken += u32::from(after == 3);
            // Once both have it, the one that is not the best may let go of it for a copy that is needed.
            let both = [few[before].peer, more[3].peer];
            let lesser = if after == 3 { before } else { 3 };
            assert_eq!(surplus(&more, &both, &manifest, 1), [lesser]);
            assert!(surplus(&more, &both, &manifest, 2).is_empty());
        }
        assert!((60..140).contains(&taken), "a quarter of 400 and not {taken}");
    }
}
