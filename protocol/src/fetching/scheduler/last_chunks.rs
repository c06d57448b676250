//! The end of a download: who brings the last chunks soonest, and whose are fetched a second time.

use std::collections::BTreeMap;

use super::{Connected, Scheduler, State};
use crate::fetching::pace::millis;
use crate::ids::PeerId;
use crate::ranges::ChunkSet;

/// So many free chunks are left when they are dealt out one by one.
const ENDGAME: u32 = 128;

impl Scheduler {
    /// The end game: each of the last free chunks goes to the seeder that would have it first, all that it owes before
    /// it counted in. Returns how many fall to whom; `None` while there are many, or nobody was measured yet.
    pub(super) fn shares(&self, free: &ChunkSet, now: u64) -> Option<BTreeMap<PeerId, u32>> {
        if free.is_empty() || free.len() > ENDGAME {
            return None;
        }
        let paces = || self.connected_sources().filter_map(|(peer, _)| self.each_ms(&peer));
        let measured = paces().count();
        if measured == 0 {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "at most 256")]
        let usual = paces().sum::<f64>() / measured as f64;
        // One whose window is used up and who owes nothing brings nothing.
        let mut ends: Vec<(PeerId, &ChunkSet, f64, f64)> = self
            .connected_sources()
            .filter(|(_, c)| c.budget > 0 || !c.in_flight.is_empty())
            .map(|(peer, c)| (peer, &c.held, self.owes_ms(&peer, c, usual, now), self.each_ms(&peer).unwrap_or(usual)))
            .collect();
        let mut shares = BTreeMap::new();
        for chunk in free.iter() {
            let holders = ends.iter_mut().filter(|(_, held, _, _)| held.contains(chunk));
            if let Some(first) = holders.min_by(|a, b| (a.2 + a.3).total_cmp(&(b.2 + b.3))) {
                first.2 += first.3;
                *shares.entry(first.0).or_insert(0) += 1;
            }
        }
        Some(shares)
    }

    /// Milliseconds until a seeder has brought what it owes.
    fn owes_ms(&self, peer: &PeerId, connected: &Connected, usual: f64, now: u64) -> f64 {
        let each = self.each_ms(peer).unwrap_or(usual);
        let Ok(owed) = u32::try_from(connected.in_flight.len()) else { return f64::MAX };
        if owed == 0 {
            return self.sources.get(peer).map_or(0.0, |s| s.pace.reply_ms(self.chunk_size) - each).max(0.0);
        }
        f64::from(owed - 1) * each + first_due(each, millis(now.saturating_sub(connected.last_progress)))
    }

    /// For a seeder that was measured: one of the first chunks that is under way at another alone for twice as long as this
    /// one takes, and would come from here in less than half of the time that it still takes there. It does not wait for the
    /// end: until these are here, all others are in the way.
    pub(super) fn hurry(&self, peer: &PeerId, now: u64) -> Option<u32> {
        let mine = self.sources.get(peer)?;
        let State::Connected(me) = &mine.state else { return None };
        self.each_ms(peer)?;
        let here = mine.pace.reply_ms(self.chunk_size);
        let first = ChunkSet::from_range(0..self.first()).intersection(&self.missing).intersection(&me.held);
        first.iter().filter(|chunk| !me.in_flight.contains_key(chunk)).find(|chunk| {
            let mut askers = self.connected_sources().filter(|(_, c)| c.in_flight.contains_key(chunk));
            let (Some((other, connected)), None) = (askers.next(), askers.next()) else { return false };
            let asked = connected.in_flight.get(chunk).copied().unwrap_or(now);
            millis(now.saturating_sub(asked)) > 2.0 * here && self.left_ms(&other, connected, *chunk, now) > 2.0 * here
        })
    }

    /// Milliseconds until a seeder has brought a chunk that it was asked for. Seeders serve the lowest number first.
    fn left_ms(&self, peer: &PeerId, connected: &Connected, chunk: u32, now: u64) -> f64 {
        // One that never brought anything is given a second.
        let each = self.each_ms(peer).unwrap_or(1000.0);
        let before = u32::try_from(connected.in_flight.range(..chunk).count()).unwrap_or(u32::MAX);
        f64::from(before) * each + first_due(each, millis(now.saturating_sub(connected.last_progress)))
    }

    /// For an idle seeder: the chunk that would take another one longest, if this one brings it in less than half of
    /// that time.
    pub(super) fn hedge(&self, peer: &PeerId, now: u64) -> Option<u32> {
        let mine = self.sources.get(peer)?;
        let State::Connected(me) = &mine.state else { return None };
        self.each_ms(peer)?;
        if !me.in_flight.is_empty() {
            return None;
        }
        let here = mine.pace.reply_ms(self.chunk_size);
        let mut best: Option<(f64, u32)> = None;
        for (other, connected) in self.connected_sources() {
            if other == *peer {
                continue;
            }
            let silent = millis(now.saturating_sub(connected.last_progress));
            // One that never brought anything is given a second.
            let each = self.each_ms(&other).unwrap_or(1000.0);
            // Seeders serve the lowest number first.
            for (place, chunk) in (0u32..).zip(connected.in_flight.keys()) {
                let left = f64::from(place) * each + first_due(each, silent);
                if left <= 2.0 * here || best.is_some_and(|(most, _)| left <= most) || !me.held.contains(*chunk) {
                    continue;
                }
                // Here from elsewhere: it only waits for a silent seeder's word that it will not come.
                if !self.missing.contains(*chunk) {
                    continue;
                }
                let copies = self.connected_sources().filter(|(_, c)| c.in_flight.contains_key(chunk)).count();
                if copies == 1 {
                    best = Some((left, *chunk));
                }
            }
        }
        best.map(|(_, chunk)| chunk)
    }
}

/// Milliseconds until the next chunk of a seeder that takes `each` for one and sent nothing for `silent`. One that is
/// overdue is taken to need as long again as it is late.
fn first_due(each: f64, silent: f64) -> f64 {
    (each - silent).max(silent - each).max(each / 4.0)
}
