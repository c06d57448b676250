//! Whose bytes are next when all cannot have theirs at once: clients take turns by bytes, whatever number of deliveries
//! or chunks each of them asks for, so that one in a hurry takes nothing from fifty who are slow.
//!
//! It is deficit round robin (Shreedhar and Varghese 1996) over peers: each in turn is given the same credit, and is
//! served as long as its next piece costs no more than it saved.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use protocol::PeerId;

/// Credit of one round, bytes: the smallest chunk, so that one of the largest waits for 64 rounds and nobody for it.
const CREDIT: u64 = 64 * 1024;

/// Begins what a turn was asked for; the turn lasts until [`Held`] is dropped.
type Begin = Box<dyn FnOnce(Held) + Send>;

/// Turns, so many at once, shared by peers.
pub(crate) struct Shares {
    at_once: usize,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    held: usize,
    rounds: Rounds<Begin>,
    /// Somebody hands turns out: whoever gives one back meanwhile leaves that to them.
    handing_out: bool,
}

/// A turn, given back when dropped.
pub(crate) struct Held {
    shares: Arc<Shares>,
}

impl Shares {
    pub(crate) fn new(at_once: u32) -> Arc<Self> {
        Arc::new(Shares { at_once: at_once.max(1) as usize, inner: Mutex::default() })
    }

    /// Calls `begin` when it is the turn of `peer` for so many bytes; at once where nobody else waits. Who asks is
    /// bounded by deliveries and their read-ahead.
    pub(super) fn ask(self: &Arc<Self>, peer: PeerId, bytes: u64, begin: impl FnOnce(Held) + Send + 'static) {
        self.lock().rounds.push(peer, bytes, Box::new(begin));
        self.hand_out();
    }

    /// Waits for the turn of `peer`, a whole round's worth whatever is done with it: for pieces that are of one size, and so
    /// small that what one saved would be many of them.
    pub(super) async fn turn(self: &Arc<Self>, peer: PeerId) -> Option<Held> {
        let (sender, turn) = tokio::sync::oneshot::channel();
        // Whoever has stopped waiting gives it back by not taking it.
        self.ask(peer, CREDIT, move |held| drop(sender.send(held)));
        turn.await.ok()
    }

    fn hand_out(self: &Arc<Self>) {
        let mut inner = self.lock();
        if inner.handing_out {
            return;
        }
        inner.handing_out = true;
        while inner.held < self.at_once {
            let Some(begin) = inner.rounds.next() else { break };
            inner.held += 1;
            drop(inner);
            begin(Held { shares: Arc::clone(self) });
            inner = self.lock();
        }
        inner.handing_out = false;
    }

    // A thread that panicked while it held this lock was between plain map operations.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.shares.lock().held -= 1;
        self.shares.hand_out();
    }
}

/// What waits, by peer, and whose round it is.
struct Rounds<T> {
    lines: HashMap<PeerId, Line<T>>,
    order: VecDeque<PeerId>,
}

struct Line<T> {
    credit: u64,
    /// Has had its credit of this round.
    credited: bool,
    waiting: VecDeque<(u64, T)>,
}

impl<T> Default for Rounds<T> {
    fn default() -> Self {
        Rounds { lines: HashMap::new(), order: VecDeque::new() }
    }
}

impl<T> Rounds<T> {
    fn push(&mut self, peer: PeerId, bytes: u64, what: T) {
        let line = self.lines.entry(peer).or_insert_with(|| {
            self.order.push_back(peer);
            Line { credit: 0, credited: false, waiting: VecDeque::new() }
        });
        line.waiting.push_back((bytes, what));
    }

    fn next(&mut self) -> Option<T> {
        loop {
            let peer = *self.order.front()?;
            let Some(line) = self.lines.get_mut(&peer) else {
                self.order.pop_front();
                continue;
            };
            if !line.credited {
                line.credited = true;
                line.credit += CREDIT;
            }
            if line.waiting.front().is_some_and(|(bytes, _)| *bytes > line.credit) {
                line.credited = false;
                self.order.rotate_left(1);
                continue;
            }
            let next = line.waiting.pop_front();
            if let Some((bytes, _)) = &next {
                line.credit -= bytes;
            }
            if line.waiting.is_empty() {
                // Who asks for nothing saves nothing.
                self.lines.remove(&peer);
                self.order.pop_front();
            }
            if let Some((_, what)) = next {
                return Some(what);
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    #[test]
    fn one_in_a_hurry_takes_nothing_from_fifty_who_ask_for_one_chunk_at_a_time() {
        let mut rounds = Rounds::default();
        // The first has sixty-four chunks waiting all the time (eight deliveries of eight), the others one each.
        (0..64).for_each(|_| rounds.push(peer(0), CREDIT, 0));
        (1..=50).for_each(|n| rounds.push(peer(n), CREDIT, n));
        let mut served = [0u32; 51];
        for _ in 0..51 * 20 {
            let who = rounds.next().unwrap();
            served[usize::from(who)] += 1;
            rounds.push(peer(who), CREDIT, who);
        }
        assert!(served.iter().all(|count| (19..=21).contains(count)), "{served:?}");
        assert_eq!(rounds.lines.len(), rounds.order.len(), "a peer stands in line once");
    }

    #[test]
    fn shares_are_of_bytes_and_not_of_chunks() {
        let mut rounds = Rounds::default();
        let (small, large) = (CREDIT, 64 * CREDIT);
        let mut bytes = [0u64; 2];
        (0..4).for_each(|_| rounds.push(peer(0), large, 0));
        (0..4).for_each(|_| rounds.push(peer(1), small, 1));
        for _ in 0..650 {
            let who: u8 = rounds.next().unwrap();
            let size = if who == 0 { large } else { small };
            bytes[usize::from(who)] += size;
            rounds.push(peer(who), size, who);
        }
        assert!(bytes[0].abs_diff(bytes[1]) <= large + small, "{bytes:?}");
        assert!(bytes[0] >= 9 * large, "the large ones are served, too: {bytes:?}");
    }

    #[tokio::test]
    async fn so_many_at_once_and_those_who_stopped_waiting_hold_nobody_up() {
        let shares = Shares::new(2);
        let held = [shares.turn(peer(1)).await.unwrap(), shares.turn(peer(2)).await.unwrap()];
        let mut waiting = Box::pin(shares.turn(peer(3)));
        assert!(futures::poll!(&mut waiting).is_pending());
        // A thousand that gave up before their turn, and one behind them.
        for n in 0..1000u32 {
            let mut gone = Box::pin(shares.turn(peer(u8::try_from(4 + n % 200).unwrap())));
            assert!(futures::poll!(&mut gone).is_pending());
        }
        let mut last = Box::pin(shares.turn(peer(255)));
        assert!(futures::poll!(&mut last).is_pending());
        drop(held);
        let turns = (waiting.await.unwrap(), last.await.unwrap());
        assert_eq!(shares.lock().held, 2);
        drop(turns);
        assert_eq!(shares.lock().held, 0);
        assert!(shares.lock().rounds.lines.is_empty() && shares.lock().rounds.order.is_empty());
    }
}
