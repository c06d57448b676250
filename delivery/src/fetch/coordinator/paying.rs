//! Of one delivery so many seeders are paid, and no more: while one of those is there and brings what is missing in useful time,
//! nobody else is asked for chunks that it would send for nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use protocol::settling::Counting;
use protocol::{ChunkSet, PeerId};

use super::super::acks::AckStore;
use super::{Coordinator, Handle};

/// Where those that are paid are so slow for so long, others are asked, milliseconds.
const SLOW_FOR_MS: u64 = 30_000;

/// Those that are paid.
#[derive(Debug, Default)]
pub(super) struct Payees {
    /// True for those that were acknowledged something in this delivery, by this run or an earlier one; false for those that
    /// are asked for the first time and may send nothing.
    all: BTreeMap<PeerId, bool>,
    /// One of them is there and has something that is missing, or is being connected to for the first time.
    gives: bool,
    /// Others are not asked.
    closed: bool,
    /// Somebody was planned for and not asked since that was looked at.
    refused: bool,
    /// Since when those that are asked are slow, by [`running_ms`](crate::clock::running_ms).
    slow_since: Option<u64>,
}

impl Payees {
    /// Those that earlier runs acknowledged something to.
    pub(super) async fn before(acks: &Arc<dyn AckStore>) -> Payees {
        let acks = Arc::clone(acks);
        let seeders = tokio::task::spawn_blocking(move || {
            acks.all().iter().filter_map(|ack| Some((ack.peek().ok()?.seeder, true))).collect()
        });
        Payees { all: seeders.await.unwrap_or_default(), ..Payees::default() }
    }

    fn is_full(&self) -> bool {
        self.all.len() >= Counting::MAX_SEEDERS
    }

    /// It is about to be asked. False where it would be one too many, and is not to be.
    pub(super) fn ask(&mut self, peer: PeerId) -> bool {
        if self.is_full() && self.gives && !self.all.contains_key(&peer) {
            self.refused = true;
            return false;
        }
        self.all.entry(peer).or_insert(false);
        true
    }

    /// Is there anything to be said of who may be asked, with so many seeders there?
    fn matters(&self, there: usize) -> bool {
        self.all.len() + there >= Counting::MAX_SEEDERS || self.closed || self.refused
    }

    /// Are they still waited for, when each chunk of theirs takes long and it is not known to be the line?
    fn waits(&mut self, slow: bool, now: u64) -> bool {
        self.slow_since = slow.then(|| self.slow_since.unwrap_or(now));
        self.slow_since.is_none_or(|since| now.saturating_sub(since) < SLOW_FOR_MS)
    }

    /// Whether others are not to be asked from now on, where that is to be said.
    fn close(&mut self) -> Option<bool> {
        // Whoever was one too many is let in again like all others.
        let before = self.closed || std::mem::take(&mut self.refused);
        self.closed = self.is_full() && self.gives;
        (before || self.closed).then_some(self.closed)
    }

    /// A chunk came from it, which is acknowledged.
    pub(super) fn served(&mut self, peer: PeerId) {
        self.all.insert(peer, true);
    }

    /// Its stream is over: whoever sent nothing takes nobody's place.
    pub(super) fn ended(&mut self, peer: &PeerId) {
        if self.all.get(peer) == Some(&false) {
            self.all.remove(peer);
        }
    }
}

impl Coordinator {
    /// Sees to it that nobody is planned for who would not be paid. Where none of those that are can give what is missing, it
    /// comes from whoever has it: the goods were paid for.
    pub(super) fn limit_payees(&mut self, now: u64) {
        let payees = &mut self.payees;
        let waits = payees.waits(self.slow, now);
        if !payees.matters(self.handles.len()) {
            return;
        }
        let missing = self.scheduler.missing();
        let has = |held: &ChunkSet| !held.intersection(missing).is_empty();
        let gives = |peer: &PeerId, handle: &Handle| match &handle.welcome {
            Some((held, _)) => has(held),
            // It is waited for once: those that are gone would keep others away for ever. So would one that waits itself, for a
            // place that others hold who are not asked.
            None => self.book.is_untried(peer) && !handle.pulse.queues.load(Ordering::Relaxed),
        };
        let any = self.handles.iter().any(|(peer, handle)| payees.all.contains_key(peer) && gives(peer, handle));
        payees.gives = any && waits;
        let Some(closed) = payees.close() else { return };
        for (peer, handle) in self.handles.iter().filter(|(peer, _)| !payees.all.contains_key(peer)) {
            if let Some((_, budget)) = &handle.welcome {
                self.scheduler.set_budget(peer, if closed { 0 } else { *budget });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: usize) -> PeerId {
        PeerId::from_bytes([u8::try_from(n).unwrap_or(u8::MAX); 32])
    }

    fn almost_full() -> Payees {
        Payees { all: (1..Counting::MAX_SEEDERS).map(|n| (peer(n), true)).collect(), gives: true, ..Payees::default() }
    }

    #[test]
    fn whoever_was_one_too_many_is_let_in_again_when_the_last_place_is_free() {
        let mut payees = almost_full();
        assert!(payees.ask(peer(101)) && !payees.ask(peer(102)));
        payees.ended(&peer(101));
        assert!(payees.matters(1));
        assert_eq!(payees.close(), Some(false));
        assert!(payees.ask(peer(102)));
        assert_eq!((payees.close(), payees.close()), (Some(true), Some(true)));
        assert!(!payees.ask(peer(101)));
    }

    #[test]
    fn those_that_are_paid_are_not_waited_for_for_ever_where_they_are_slow() {
        let mut payees = almost_full();
        assert!(payees.waits(false, 1_000) && payees.waits(true, 50_000) && payees.waits(true, 79_999));
        assert!(!payees.waits(true, 80_000));
        assert!(payees.waits(false, 80_100) && payees.waits(true, 80_200), "it begins anew");
    }
}
