//! "Why is it not moving?" is what users ask most of such programs. The answer is data with a name, computed here,
//! from which displays and JSON are made.

use std::collections::VecDeque;
use std::fmt;
use std::path::Path;

use protocol::clock::ClockState;
use protocol::trust::Trust;
use protocol::{PeerId, RefusalCode};

use crate::content_store::Lacks;

/// How far a fetch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Not even the manifest is here.
    #[default]
    Starting,
    /// Chunks are coming, or awaited.
    Fetching,
    /// Everything is here; the last words are said.
    Finishing,
    /// It is over.
    Done,
}

/// Where a fetch stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Progress {
    /// How far it is.
    pub phase: Phase,
    /// Chunks here, of those asked for.
    pub have_chunks: u32,
    /// Chunks asked for; 0 while that is unknown.
    pub total_chunks: u32,
    /// Bytes here, of those asked for.
    pub have_bytes: u64,
    /// Bytes asked for; 0 while that is unknown.
    pub total_bytes: u64,
    /// Bytes of new chunks that this fetch brought.
    pub new_bytes: u64,
    /// Bytes of chunks that came twice.
    pub duplicate_bytes: u64,
    /// Bytes per second over the last seconds.
    pub bytes_per_second: u64,
    /// This machine's clock beside the seeders'.
    pub clock: Clock,
    /// When the first chunk was verified, unix milliseconds.
    pub first_chunk_at: Option<u64>,
    /// Seeders that serve it now.
    pub active: usize,
    /// The seeders tried.
    pub sources: Vec<SourceProgress>,
    /// Why it is not moving.
    pub stalled: Option<Stall>,
}

impl Progress {
    /// Seconds left at the present rate.
    pub fn seconds_left(&self) -> Option<u64> {
        let left = self.total_bytes.checked_sub(self.have_bytes)?;
        (self.total_bytes > 0).then(|| left.checked_div(self.bytes_per_second)).flatten()
    }
}

/// One seeder.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct SourceProgress {
    /// Who.
    pub peer: PeerId,
    /// Serving now?
    pub connected: bool,
    /// Will not be tried again?
    pub given_up: bool,
    /// Chunks from it that were new.
    pub chunks: u32,
    /// Bytes from it, duplicates included.
    pub bytes: u64,
    /// Bytes per second.
    pub bytes_per_second: u64,
    /// When it is tried again, unix milliseconds.
    pub next_try: Option<u64>,
    /// Why its last stream ended.
    pub last_reason: Option<String>,
    /// The name of its refusal, if that was why.
    pub refusal: Option<RefusalCode>,
}

/// This machine's clock beside others'.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Clock {
    /// `good`, `off`, or `unknown` while there was nobody to compare it with.
    pub state: &'static str,
    /// By how much it is off, milliseconds: negative when it is behind.
    pub off_by_ms: Option<i64>,
}

impl From<ClockState> for Clock {
    fn from(state: ClockState) -> Self {
        Clock { state: state.as_str(), off_by_ms: state.off_by_ms() }
    }
}

impl Default for Clock {
    fn default() -> Self {
        ClockState::Unknown.into()
    }
}

/// It is not moving.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Stall {
    /// Why.
    #[serde(flatten)]
    pub cause: StallCause,
    /// When something is tried next, or when what is being tried ends at the latest, unix milliseconds; `None` once the
    /// fetch is over.
    pub next_try: Option<u64>,
}

/// Why a fetch is not moving.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "cause", rename_all = "kebab-case", rename_all_fields = "snake_case")]
pub enum StallCause {
    /// Nobody is known who might have it.
    NoSeederKnown,
    /// Seeders are being connected to.
    Connecting,
    /// Every seeder refuses; the code that most of them gave.
    AllRefused {
        /// The name.
        code: RefusalCode,
    },
    /// Every seeder has too much to do.
    Overloaded,
    /// Every seeder refuses the ticket because its lease is over.
    TicketExpires,
    /// Every seeder refuses the ticket for its time, and this machine's clock is not theirs.
    ClockOff {
        /// By how much it is off, milliseconds: negative when it is behind.
        off_by_ms: i64,
    },
    /// The seeders serve, but none of them holds what is still missing.
    NoSeederHolds {
        /// The first such chunk.
        chunk: u32,
        /// How many more there are.
        more: u32,
    },
    /// The seeders serve, but send nothing.
    Silent,
    /// No seeder can be reached.
    NetworkUnreachable,
    /// Seeders are reached by way of a relay only, and it carries no goods.
    RelayedOnly,
    /// Every seeder that serves it sent this client chunks that never arrived, up to what it lets out unacknowledged. Each
    /// lets the client in again after a while.
    WindowUsedUp,
    /// Every seeder failed or was given up, for different reasons, or does not run although its machine answers.
    NoSeederLeft,
    /// The disk is full.
    DiskFull {
        /// Where.
        path: Box<Path>,
        /// Bytes still to come.
        needed: u64,
        /// Of what there is none left.
        lacks: Lacks,
    },
    /// The manager is needed and cannot be reached. Not found out here: for those who ask it before or after a fetch.
    ManagerAway,
}

impl fmt::Display for StallCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StallCause::NoSeederKnown => f.write_str("no seeder is known that might have it"),
            StallCause::Connecting => f.write_str("connecting to seeders"),
            StallCause::AllRefused { code } => write!(f, "every seeder refuses ({code})"),
            StallCause::Overloaded => f.write_str("every seeder has too much to do at the moment"),
            StallCause::TicketExpires => f.write_str("the ticket's lease is over, and there is no longer one yet"),
            StallCause::ClockOff { off_by_ms } => {
                write!(f, "your clock is {}; set it, then go on", clock_off_by(*off_by_ms))
            }
            StallCause::NoSeederHolds { chunk, more: 0 } => write!(f, "no connected seeder holds chunk {chunk}"),
            StallCause::NoSeederHolds { chunk, more } => {
                write!(f, "no connected seeder holds chunk {chunk} and {more} more")
            }
            StallCause::Silent => f.write_str("the seeders are connected but send nothing"),
            StallCause::NetworkUnreachable => f.write_str("no seeder can be reached"),
            StallCause::RelayedOnly => {
                f.write_str("seeders are reached by way of a relay only, which carries no goods")
            }
            StallCause::WindowUsedUp => f.write_str(
                "every seeder waits for acknowledgements of chunks that never arrived, and sends more in a while",
            ),
            StallCause::NoSeederLeft => f.write_str("no seeder is left that would serve it"),
            StallCause::DiskFull { path, needed, lacks } => {
                write!(f, "no {lacks} left at {}: {needed} bytes are still to come", path.display())
            }
            StallCause::ManagerAway => f.write_str("the manager cannot be reached"),
        }
    }
}

/// A clock is not called off for less, milliseconds, however little grace a network gives.
const LEAST_OFF_MS: u64 = 30_000;

/// From what difference on a clock is off.
pub(super) fn clock_grace(trust: &Trust) -> u64 {
    trust.grace_ms().max(LEAST_OFF_MS)
}

/// The state of a clock that is off by so many milliseconds, negative when it is behind.
pub(super) fn clock_off_by(ms: i64) -> ClockState {
    match ms {
        0 => ClockState::Good,
        behind @ ..0 => ClockState::Behind(behind.unsigned_abs()),
        ahead => ClockState::Ahead(ahead.unsigned_abs()),
    }
}

/// Bytes per second over the last seconds.
#[derive(Debug, Default)]
pub(super) struct RateMeter {
    // (milliseconds that it ran, bytes in all by then), at most one sample a call, pruned to the span.
    samples: VecDeque<(u64, u64)>,
}

impl RateMeter {
    const SPAN_MS: u64 = 5_000;

    pub(super) fn sample(&mut self, now: u64, total: u64) -> u64 {
        self.samples.push_back((now, total));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(at, _)| at + Self::SPAN_MS < now) {
            self.samples.pop_front();
        }
        let Some(&(at, before)) = self.samples.front() else { return 0 };
        total.saturating_sub(before).saturating_mul(1000).checked_div(now.saturating_sub(at)).unwrap_or(0)
    }
}

/// Bytes per second of all seeders together, as long as any of them sends.
#[derive(Debug, Default)]
pub(super) struct LineMeter {
    // (milliseconds that it ran, bytes in all by then), a span of them.
    samples: VecDeque<(u64, u64)>,
    enough: u64,
}

impl LineMeter {
    const SPAN_MS: u64 = 4_000;
    const APART_MS: u64 = 20;
    /// From then on little is told as little.
    const LEAST_MS: u64 = 1_000;
    /// The first bytes come out of buffers and say nothing of the line; a chunk's do.
    pub(super) fn new(chunk_size: u32) -> Self {
        LineMeter { enough: u64::from(chunk_size), ..LineMeter::default() }
    }

    /// The rate by now, when so many bytes came in all; `None` while too little is known.
    pub(super) fn rate(&mut self, busy: bool, now: u64, total: u64) -> Option<u64> {
        if !busy {
            self.samples.clear();
            return None;
        }
        if self.samples.back().is_none_or(|(at, _)| now.saturating_sub(*at) >= Self::APART_MS) {
            self.samples.push_back((now, total));
        }
        while self.samples.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= Self::SPAN_MS) {
            self.samples.pop_front();
        }
        let &(since, before) = self.samples.front()?;
        let (ms, bytes) = (now.saturating_sub(since), total.saturating_sub(before));
        (bytes >= self.enough || ms >= Self::LEAST_MS).then(|| bytes.saturating_mul(1000) / ms.max(1))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn rate_is_of_the_last_seconds_only() {
        let mut meter = RateMeter::default();
        assert_eq!(meter.sample(0, 0), 0);
        assert_eq!(meter.sample(1_000, 500), 500);
        for second in 2..20 {
            meter.sample(second * 1000, 500);
        }
        assert_eq!(meter.sample(20_000, 500), 0);
    }

    #[test]
    fn the_line_is_known_when_enough_came_and_forgotten_when_nobody_sends() {
        let mut line = LineMeter::new(1 << 20);
        assert_eq!(line.rate(true, 0, 0), None);
        assert_eq!(line.rate(true, 5, 500_000), None, "that was in the buffers");
        assert_eq!(line.rate(true, 50, 2_000_000), Some(40_000_000));
        assert_eq!(line.rate(false, 60, 2_000_000), None);
        assert_eq!(line.rate(true, 100, 2_000_000), None);
        assert_eq!(line.rate(true, 1_100, 2_150_000), Some(150_000));
        for tenth in 0..100 {
            line.rate(true, 1_200 + tenth * 100, 2_150_000);
        }
        assert_eq!(line.rate(true, 11_200, 2_150_000), Some(0));
    }

    #[test]
    fn what_is_left_is_told_only_when_it_moves() {
        let mut progress = Progress { total_bytes: 100, have_bytes: 40, bytes_per_second: 20, ..Progress::default() };
        assert_eq!(progress.seconds_left(), Some(3));
        progress.bytes_per_second = 0;
        assert_eq!(progress.seconds_left(), None);
    }
}
