//! What the coordinator tells of a fetch while it runs: how far it is, and why it is not moving.

use std::sync::atomic::Ordering;

use protocol::Refusal;
use protocol::fetching::SourceView;
use tokio::time::Instant;

use super::super::incoming::millis;
use super::super::progress::{Phase, Progress, SourceProgress, Stall, StallCause, clock_grace};
use super::super::sources::apart;
use super::{Coordinator, NEWS_EVERY_MS};
use crate::clock::{now_ms, running_ms, unix_ms};
use crate::content_store::bytes_of;

/// Progress is told at most this often, milliseconds.
const TELL_EVERY_MS: u64 = 100;
/// Nothing new for this long is a stall to be explained, milliseconds.
const STALL_TOLD_MS: u64 = 2_000;
/// Times to come that are no further apart than this are the same to whoever reads them, milliseconds.
const WAVERS_MS: u64 = 1_000;

impl Coordinator {
    pub(super) fn tell(&mut self, phase: Phase, always: bool) {
        let now = running_ms();
        if !always && now.saturating_sub(self.told_at) < TELL_EVERY_MS {
            return;
        }
        self.told_at = now;
        let mut progress = Progress { phase, ..Progress::default() };
        if phase == Phase::Fetching && self.content.is_none() {
            progress.phase = Phase::Starting;
        }
        if let Some(content) = &self.content {
            let manifest = content.manifest();
            let missing = self.scheduler.missing().intersection(&self.wanted);
            progress.total_chunks = self.wanted.len();
            progress.have_chunks = progress.total_chunks - missing.len();
            progress.total_bytes = bytes_of(manifest, &self.wanted);
            progress.have_bytes = progress.total_bytes.saturating_sub(bytes_of(manifest, &missing));
        }
        progress.clock = self.book.clock().into();
        progress.first_chunk_at = self.first_chunk_at;
        (progress.new_bytes, progress.duplicate_bytes) = (self.new_bytes, self.duplicate_bytes);
        progress.bytes_per_second = self.rate.sample(now, self.read.load(Ordering::Relaxed));
        progress.active = self.handles.values().filter(|handle| handle.welcome.is_some()).count();
        let views = self.scheduler.sources();
        let next_try = self.next_event(now, &views);
        progress.sources = views
            .into_iter()
            .map(|view| SourceProgress {
                peer: view.peer,
                connected: view.connected,
                given_up: view.given_up,
                chunks: view.chunks,
                bytes: view.bytes,
                bytes_per_second: view.rate,
                next_try: view.next_try.map(unix_ms),
                last_reason: self.book.last_reason(&view.peer),
                refusal: self.book.last_refusal(&view.peer),
            })
            .collect();
        let quiet = now.saturating_sub(self.last_sign(now)) >= STALL_TOLD_MS;
        if matches!(phase, Phase::Fetching)
            && self.creating.is_none()
            && (quiet || progress.active == 0 && self.book.all_ended())
        {
            progress.stalled = self.cause().map(|cause| Stall { cause, next_try: Some(self.steady(next_try)) });
        } else {
            self.told_next = 0;
        }
        self.job.progress.send_replace(progress);
    }

    /// The same time as was told before, where it is about the same: what follows from several clocks wavers.
    fn steady(&mut self, next_try: u64) -> u64 {
        let shown = unix_ms(next_try);
        if self.told_next <= now_ms() || self.told_next.abs_diff(shown) >= WAVERS_MS {
            self.told_next = shown;
        }
        self.told_next
    }

    /// When something is tried next, or what is being tried ends at the latest, by [`running_ms`]. At the latest the fetch
    /// itself is over then.
    fn next_event(&self, now: u64, views: &[SourceView]) -> u64 {
        let limits = &self.job.limits;
        let tries = views.iter().filter_map(|view| view.next_try);
        let steps = self.handles.values().map(|handle| match &handle.welcome {
            None => handle.pulse.until.load(Ordering::Relaxed),
            Some(_) if self.holds_nothing() => handle.served_at.saturating_add(NEWS_EVERY_MS),
            Some(_) => {
                let heard = handle.served_at.max(handle.pulse.last_byte.load(Ordering::Relaxed));
                heard.saturating_add(limits.scheduler.stall_ms)
            }
        });
        let searching = self.discovery.is_some();
        let search = match self.job.more_sources {
            Some(_) => {
                let waits = self.discovery_due.saturating_duration_since(Instant::now());
                let until = now.saturating_add(millis(waits));
                Some(if searching { self.discovery_until } else { until })
            }
            None => None,
        };
        let end = self.last_sign(now).saturating_add(millis(limits.patience));
        let all = tries.chain(steps).chain(search).chain([end]);
        all.filter(|at| *at > now).min().unwrap_or(now)
    }

    /// When there was last a new chunk, or bytes of one that does not take too long.
    pub(super) fn last_sign(&self, now: u64) -> u64 {
        // A seeder that greets and gives nothing is no sign.
        let bytes = self.handles.values().map(|handle| handle.pulse.last_of_chunk.load(Ordering::Relaxed)).max();
        let latest = self.progressed_at.saturating_add(millis(self.job.limits.slowest_chunk));
        self.progressed_at.max(bytes.unwrap_or(0).min(latest)).min(now)
    }

    pub(super) fn cause(&self) -> Option<StallCause> {
        if self.book.out_of_reach() {
            return Some(StallCause::NetworkUnreachable);
        }
        let served = self.handles.values().any(|handle| handle.welcome.is_some());
        // Nobody is asked again before all of it was missing everywhere.
        let asked_again = !served && self.content.is_some() && self.book.hold_nothing();
        if !served && !asked_again {
            return Some(self.book.cause());
        }
        let unheld = self.scheduler.unheld().intersection(&self.wanted);
        match unheld.first() {
            Some(chunk) if unheld.len() == self.scheduler_missing() => {
                Some(StallCause::NoSeederHolds { chunk, more: unheld.len() - 1 })
            }
            _ => Some(StallCause::Silent),
        }
    }

    /// A refusal that several gave: for this clock, where the clocks of all that were asked say so.
    pub(super) fn told_of_clocks(&self, refusal: Refusal) -> Refusal {
        let (now, grace) = (now_ms(), clock_grace(&self.job.trust));
        if self.book.clock().is_off() {
            return refusal.compared_with(now, grace);
        }
        let Some(apart) = apart(&refusal, now, grace) else { return refusal };
        let said = Refusal::new(refusal.code, format!("{}; {apart}", refusal.detail));
        Refusal { retry_after_ms: refusal.retry_after_ms, now: refusal.now, ..said }
    }
}
