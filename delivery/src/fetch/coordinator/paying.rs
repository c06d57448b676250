//! Of one delivery so many seeders are paid, and no more: while one of those is there, nobody else is asked for chunks that it
//! would send for nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use protocol::settling::Counting;
use protocol::{ChunkSet, PeerId};

use super::super::acks::AckStore;
use super::{Coordinator, Handle};

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
            return false;
        }
        self.all.entry(peer).or_insert(false);
        true
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
    pub(super) fn limit_payees(&mut self) {
        let payees = &mut self.payees;
        if payees.all.len() + self.handles.len() < Counting::MAX_SEEDERS && !payees.closed {
            return;
        }
        let missing = self.scheduler.missing();
        let has = |held: &ChunkSet| !held.intersection(missing).is_empty();
        let gives = |peer: &PeerId, handle: &Handle| match &handle.welcome {
            Some((held, _)) => has(held),
            // It is waited for once: those that are gone would keep others away for ever.
            None => self.book.is_untried(peer),
        };
        payees.gives = self.handles.iter().any(|(peer, handle)| payees.all.contains_key(peer) && gives(peer, handle));
        let (before, closed) = (payees.closed, payees.is_full() && payees.gives);
        payees.closed = closed;
        if !before && !closed {
            return;
        }
        for (peer, handle) in self.handles.iter().filter(|(peer, _)| !payees.all.contains_key(peer)) {
            if let Some((_, budget)) = &handle.welcome {
                self.scheduler.set_budget(peer, if closed { 0 } else { *budget });
            }
        }
    }
}
