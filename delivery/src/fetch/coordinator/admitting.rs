//! Whom to talk to, and how many of them are to send at once.

use std::sync::atomic::Ordering;

use super::super::sources::is_idle;
use super::{Coordinator, Handle};

/// A seeder that has not answered for so long is on no line that others wait for, milliseconds.
const SLOW_MS: u64 = 1000;

impl Coordinator {
    /// Hands seeders to the scheduler as long as there are places for them.
    pub(super) fn admit(&mut self, now: u64) {
        let queues = |handle: &Handle| handle.pulse.queues.load(Ordering::Relaxed);
        let waits = self.book.has_spare() || self.handles.values().any(queues);
        if self.places.one_more(self.slow && waits, now) {
            tracing::debug!(places = self.places.count(), "all seeders are slow: there is a place for one more");
            self.shared.places.add_permits(1);
        }
        let sessions = self.places.count();
        while self.book.has_spare() {
            let busy = self.scheduler.sources().iter().filter(|view| !is_idle(view)).count();
            let due = self.scheduler.sources().iter().filter(|view| view.next_try.is_some_and(|at| at <= now)).count();
            // Those that are gone take their time to be given up: others need not wait for that. How many are talked to at
            // once is bounded when they answer.
            let slow = |handle: &&Handle| handle.welcome.is_none() && now >= handle.served_at.saturating_add(SLOW_MS);
            let slow = self.handles.values().filter(slow).count().min(sessions.saturating_mul(3));
            if busy.saturating_sub(slow) + due >= sessions {
                return;
            }
            if let Some(peer) = self.book.next_spare() {
                self.scheduler.add_source(peer, now);
            }
        }
    }

    /// As many seeders send at once as the line is good for, and there is memory for.
    pub(super) fn limit_busy(&mut self, now: u64) {
        for (peer, handle) in &self.handles {
            self.scheduler.heard(peer, handle.pulse.last_of_chunk.load(Ordering::Relaxed));
        }
        let (busy, read) = (self.scheduler.busy(now), self.read.load(Ordering::Relaxed));
        let rate = self.line.rate(busy > 0, now, read);
        self.slow = self.crowd.is_slow(rate, busy);
        let room = self.crowd.room(rate, busy, self.scheduler.has_idle(), now);
        let untried = if self.slow { self.scheduler.untried() } else { 0 };
        let fits = self.content.as_ref().map(|content| self.shared.buffers.fits(content.manifest().chunk_size));
        self.scheduler.limit_busy(fits.map_or(room, |fits| room.within(fits, untried)));
    }
}
