//! Who is to get which copy: what is missing goes where there is room, or where room can be made by letting go of what is not
//! needed; and a newcomer takes over its share, as far as that makes nobody let go of anything. It knows no tables.

use std::collections::{HashMap, HashSet};

use protocol::{Digest, PeerId};

use super::hash::{Candidate, choose, rightful, surplus};
use super::plan::{Plan, Wanted};
use crate::standing::Standing;

/// Of the copies ordered in one go, those that a newcomer takes over although there are enough: it is to come into its share
/// over time, and not at once with everything.
const MAX_MOVED: usize = 32;

/// All seeders, and what was decided of the contents shown so far.
pub(super) struct Market {
    standing: Standing,
    candidates: Vec<Candidate>,
    /// Index of each in `candidates`.
    index: HashMap<PeerId, usize>,
    /// Contents that somebody waits to let go of.
    handed_over: HashSet<Digest>,
    /// Copies that their seeders removed because there were enough.
    given_up: HashSet<(PeerId, Digest)>,
    /// Orders that were not fulfilled in all their time, or whose seeders leave or will not have the content.
    pub(super) stale: HashSet<(PeerId, Digest)>,
    /// Copies that were ordered at their seeders too often.
    pub(super) barred: HashSet<(PeerId, Digest)>,
    wanted: Vec<Wanted>,
    moved: usize,
    missing: Vec<Missing>,
}

/// Copies that found no room.
struct Missing {
    manifest: Digest,
    length: u64,
    there: HashSet<PeerId>,
    copies: usize,
}

impl Market {
    pub(super) fn new(standing: Standing, candidates: Vec<Candidate>, given_up: HashSet<(PeerId, Digest)>) -> Market {
        Market {
            index: candidates.iter().enumerate().map(|(index, candidate)| (candidate.peer, index)).collect(),
            handed_over: standing.leaving.iter().map(|(_, manifest)| *manifest).collect(),
            standing,
            candidates,
            given_up,
            stale: HashSet::new(),
            barred: HashSet::new(),
            wanted: Vec::new(),
            moved: 0,
            missing: Vec::new(),
        }
    }

    pub(super) fn leaves(&self, peer: &PeerId) -> bool {
        self.standing.quitting.contains(peer)
    }

    pub(super) fn turns_down(&self, peer: &PeerId, manifest: &Digest) -> bool {
        self.standing.turns_down(peer, manifest)
    }

    fn is_barred(&self, peer: &PeerId, manifest: &Digest) -> bool {
        self.barred.contains(&(*peer, *manifest)) || self.turns_down(peer, manifest)
    }

    /// A copy of so many bytes is on its way there.
    pub(super) fn reserve(&mut self, peer: &PeerId, length: u64) {
        if let Some(candidate) = self.index.get(peer).and_then(|index| self.candidates.get_mut(*index)) {
            candidate.take(length);
        }
    }

    /// Copies ordered so far.
    pub(super) fn ordered(&self) -> usize {
        self.wanted.len()
    }

    /// Decides of a content that `holders` have, that was ordered at others, and of which there are to be so many `copies`.
    pub(super) fn content(
        &mut self,
        manifest: Digest,
        length: u64,
        holders: &HashSet<PeerId>,
        ordered: &[PeerId],
        copies: impl FnOnce(&[PeerId]) -> usize,
    ) {
        // A seeder that did not manage in time keeps its place in `there`: the copy goes to another one.
        let mut there: HashSet<PeerId> = holders.iter().chain(ordered).copied().collect();
        // Somebody waits to let go of it, and may when enough others are here: a copy that may come back is of no use to
        // that one. Nor is a copy that was only ordered, as long as nobody is there to make it who wants to have it.
        let handed_over = self.handed_over.contains(&manifest);
        let counts = |peer: &&PeerId| {
            let stands = if !holders.contains(*peer) {
                self.index.contains_key(*peer) && self.standing.serves(peer, &manifest)
            } else if handed_over {
                self.standing.serves(peer, &manifest)
            } else {
                self.standing.counts(peer, &manifest)
            };
            stands && !self.stale.contains(&(**peer, manifest))
        };
        let serving: Vec<PeerId> = holders.iter().filter(counts).copied().collect();
        let copies = copies(&serving);
        let missing = copies.saturating_sub(there.iter().filter(counts).count());
        let bytes = i128::from(length);
        let barred = |candidate: &Candidate| self.is_barred(&candidate.peer, &manifest);
        let mut to = choose(&self.candidates, &there, &manifest, missing, |candidate| {
            candidate.room >= bytes && !barred(candidate)
        });
        let without = missing - to.len();
        // What it takes over stays with those who have it until they want the room; no more than twice the copies. Whose seeder
        // is away for a while is nobody else's share.
        let here = |peer: &PeerId| self.standing.here.contains(peer);
        let settled =
            missing == 0 && ordered.is_empty() && serving.len() < copies.saturating_mul(2) && serving.iter().all(here);
        if settled && self.moved < MAX_MOVED {
            let given_up = |candidate: &Candidate| self.given_up.contains(&(candidate.peer, manifest));
            let newcomer = rightful(&self.candidates, &there, &manifest, copies, |candidate| {
                candidate.spare >= bytes && !given_up(candidate) && !barred(candidate)
            });
            self.moved += usize::from(newcomer.is_some());
            to.extend(newcomer);
        }
        let here: Vec<PeerId> = serving.into_iter().filter(|peer| self.standing.serves(peer, &manifest)).collect();
        for index in surplus(&self.candidates, &here, &manifest, copies) {
            if let Some(candidate) = self.candidates.get_mut(index) {
                candidate.surplus += bytes;
            }
        }
        there.extend(self.order(&to, manifest, length));
        if without > 0 {
            self.missing.push(Missing { manifest, length, there, copies: without });
        }
    }

    fn order(&mut self, to: &[usize], manifest: Digest, length: u64) -> Vec<PeerId> {
        let mut peers = Vec::with_capacity(to.len());
        for index in to {
            if let Some(candidate) = self.candidates.get_mut(*index) {
                candidate.take(length);
                peers.push(candidate.peer);
            }
        }
        self.wanted.extend(peers.iter().map(|peer| Wanted { peer: *peer, manifest, length }));
        peers
    }

    /// What is missing and found no room goes to seeders that have copies which are not needed: for an order that finds no
    /// room they let go of these. No more than `most` copies are ordered in all, or little more.
    pub(super) fn finish(mut self, most: usize) -> Plan {
        let (mut lacking, mut cut) = (HashMap::new(), false);
        for Missing { manifest, length, there, copies } in std::mem::take(&mut self.missing) {
            if self.wanted.len() >= most {
                cut = true;
                break;
            }
            let to = choose(&self.candidates, &there, &manifest, copies, |candidate| {
                let fits = candidate.room + candidate.surplus >= i128::from(length);
                candidate.surplus > 0 && fits && !self.is_barred(&candidate.peer, &manifest)
            });
            let ordered = self.order(&to, manifest, length);
            // Where there are fewer seeders than copies to be, room is not what is missing.
            let stay = |peer: &&PeerId| self.standing.here.contains(*peer) && !self.leaves(peer);
            // Who is away has no room either, and may well have its copy.
            let able = self.standing.present().saturating_sub(self.standing.unable(&manifest));
            let has = |peer: &&PeerId| stay(peer) && !self.turns_down(peer, &manifest);
            let others = able.saturating_sub(there.iter().chain(&ordered).filter(has).count());
            // Nor where a copy is not ordered again yet at somebody who has room for it.
            let waits = |candidate: &&Candidate| {
                let again = self.barred.contains(&(candidate.peer, manifest)) && !there.contains(&candidate.peer);
                again && candidate.room >= i128::from(length)
            };
            let others = others.saturating_sub(self.candidates.iter().filter(waits).count());
            let lacks = (copies - ordered.len()).min(others);
            if lacks > 0 {
                lacking.insert(manifest, lacks);
            }
        }
        Plan { wanted: self.wanted, stale: self.stale.into_iter().collect(), lacking, cut, ..Plan::default() }
    }
}
