//! People share their line with others: limits in bytes per second that can be changed while bytes flow, for receiving
//! (by reading no faster, so that the seeders' own flow control does the rest) and for sending. Many who share one limit
//! take turns piece by piece, so that each gets the same part of it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::FutureExt;
use tokio::sync::watch;

/// Saved-up time that a pause grants at most, so that a stall is not followed by a burst.
const BURST: Duration = Duration::from_millis(200);
/// Pieces a second that a limit is handed out in: with hundreds of takers each still gets one every few seconds.
const PIECES: u64 = 200;
/// Smallest piece, bytes: smaller ones would be all overhead.
const SMALLEST: u64 = 1024;
/// Largest piece, bytes.
const LARGEST: u64 = 64 * 1024;

/// Bytes per second; 0 for no limit. Clones are the same limit, and a change counts at once for all who keep to it.
#[derive(Clone, Debug)]
pub struct Rate(Arc<watch::Sender<u64>>);

impl Rate {
    /// A limit of so many bytes per second; 0 for none.
    pub fn new(bytes_per_second: u64) -> Rate {
        Rate(Arc::new(watch::Sender::new(bytes_per_second)))
    }

    /// Bytes per second; 0 for no limit.
    pub fn get(&self) -> u64 {
        *self.0.borrow()
    }

    /// Changes it: bytes per second, 0 for no limit. Those who wait by the old limit look at the new one.
    pub fn set(&self, bytes_per_second: u64) {
        self.0.send_replace(bytes_per_second);
    }
}

impl Default for Rate {
    fn default() -> Self {
        Rate::new(0)
    }
}

/// Hands out the right to move bytes at a [`Rate`].
#[derive(Debug)]
pub struct Pace {
    rate: Rate,
    used: Mutex<Used>,
}

#[derive(Debug)]
struct Used {
    /// The rate that `until` was reckoned by.
    rate: u64,
    /// When everything granted so far will have been used up.
    until: Instant,
}

impl Pace {
    /// A pace of its own for whoever keeps to `rate`.
    pub fn new(rate: Rate) -> Pace {
        let used = Mutex::new(Used { rate: rate.get(), until: Instant::now() });
        Pace { rate, used }
    }

    /// The limit that it keeps to.
    pub fn rate(&self) -> &Rate {
        &self.rate
    }

    /// How long to wait for so many bytes.
    fn spend(&self, bytes: usize, now: Instant) -> Duration {
        let rate = self.rate.get();
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.rate != rate {
            *used = Used { rate, until: now };
        }
        if rate == 0 {
            return Duration::ZERO;
        }
        let nanos = (bytes as u128 * 1_000_000_000) / u128::from(rate);
        let cost = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        used.until = used.until.max(earliest) + cost;
        used.until.saturating_duration_since(now)
    }
}

/// The limits that one stream of bytes keeps to, all of them at once: its own, its process's.
#[derive(Clone, Debug, Default)]
pub struct Pacing {
    paces: Vec<Arc<Pace>>,
}

impl Pacing {
    /// All of these.
    pub fn new(paces: impl IntoIterator<Item = Arc<Pace>>) -> Pacing {
        Pacing { paces: paces.into_iter().collect() }
    }

    /// These and one more.
    #[must_use]
    pub fn and(mut self, pace: Arc<Pace>) -> Pacing {
        self.paces.push(pace);
        self
    }

    /// Most bytes to move before the next call of [`Pacing::spend`].
    pub fn piece(&self) -> usize {
        let tightest = self.paces.iter().map(|pace| pace.rate.get()).filter(|rate| *rate > 0).min();
        let piece = tightest.map_or(u64::MAX, |rate| (rate / PIECES).clamp(SMALLEST, LARGEST));
        usize::try_from(piece).unwrap_or(usize::MAX)
    }

    /// Reckons so many bytes to every limit; gives how long to wait for them, or after them.
    pub fn spend(&self, bytes: usize) -> Duration {
        let now = Instant::now();
        self.paces.iter().map(|pace| pace.spend(bytes, now)).max().unwrap_or_default()
    }

    /// Waits so long, or until a limit is changed.
    pub async fn pause(&self, wait: Duration) {
        if wait.is_zero() {
            return;
        }
        let changes = self.paces.iter().map(|pace| {
            let mut seen = pace.rate.0.subscribe();
            async move {
                // The sender lives as long as this pace.
                let _ = seen.changed().await;
            }
            .boxed()
        });
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            _ = futures::future::select_all(changes), if !self.paces.is_empty() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_all_and_a_pause_saves_little() {
        let pace = Pace::new(Rate::new(1_000_000));
        let start = Instant::now() + Duration::from_secs(10);
        assert_eq!(pace.spend(200_000, start), Duration::ZERO, "the burst");
        assert_eq!(pace.spend(500_000, start), Duration::from_millis(500));
        assert_eq!(pace.spend(500_000, start), Duration::from_secs(1), "a second reader waits for the first");
    }

    #[test]
    fn a_change_counts_at_once() {
        let rate = Rate::default();
        let pace = Pace::new(rate.clone());
        let start = Instant::now() + Duration::from_secs(10);
        assert_eq!(pace.spend(usize::MAX, start), Duration::ZERO, "no limit");
        rate.set(1000);
        assert_eq!(pace.spend(500_000, start), Duration::from_secs(500));
        rate.set(1_000_000);
        assert_eq!(pace.spend(500_000, start), Duration::from_millis(500), "the old debt is forgotten");
    }

    #[tokio::test]
    async fn those_who_wait_by_an_old_limit_go_on_by_the_new_one() {
        let (rate, other) = (Rate::new(1), Rate::default());
        let paces = [rate.clone(), other].map(|rate| Arc::new(Pace::new(rate)));
        let pacing = Pacing::new(paces);
        assert_eq!(pacing.piece(), 1024);
        let wait = pacing.spend(1024);
        assert!(wait > Duration::from_secs(1000), "{wait:?}");
        let mut waiting = Box::pin(pacing.pause(wait));
        assert!(futures::poll!(&mut waiting).is_pending());
        rate.set(0);
        let limit = Duration::from_secs(60);
        assert!(tokio::time::timeout(limit, waiting).await.is_ok());
        assert_eq!(pacing.piece(), usize::MAX);
    }
}
