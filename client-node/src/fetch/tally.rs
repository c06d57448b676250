//! What one run brought: sums over its transfers, and what came for the second time when everything was there already.

use std::time::Duration;

use delivery::{FetchReport, Progress, SourceReport};
use protocol::PeerId;

use super::FetchOutcome;

/// What came for the second time when everything was there already.
#[derive(Default)]
pub(super) struct Late {
    bytes: u64,
    by: Vec<(PeerId, u64)>,
}

impl Late {
    pub(super) fn between(before: &FetchReport, after: &FetchReport) -> Late {
        let known = |peer| before.sources.iter().find(|source| source.peer == peer).map_or(0, |source| source.bytes);
        let by = after.sources.iter().map(|source| (source.peer, source.bytes.saturating_sub(known(source.peer))));
        Late {
            bytes: after.duplicate_bytes.saturating_sub(before.duplicate_bytes),
            by: by.filter(|(_, bytes)| *bytes > 0).collect(),
        }
    }

    pub(super) fn add(&mut self, mut other: Late) {
        self.bytes += other.bytes;
        self.by.append(&mut other.by);
    }

    /// It is acknowledged like everything that came, and therefore told of.
    pub(super) fn tell_in(&self, outcome: &mut FetchOutcome) {
        outcome.duplicate_bytes += self.bytes;
        for (peer, bytes) in &self.by {
            match outcome.sources.iter_mut().find(|source| source.peer == *peer) {
                Some(source) => source.bytes += bytes,
                None => outcome.sources.push(SourceReport::of(*peer, 0, *bytes)),
            }
        }
    }
}

/// What came of the transfers of one run.
#[derive(Default)]
pub(super) struct Tally {
    pub(super) bytes: u64,
    pub(super) duplicate_bytes: u64,
    pub(super) duration: Duration,
    pub(super) sources: Vec<SourceReport>,
}

impl Tally {
    pub(super) fn add(&mut self, report: &FetchReport) {
        self.add_parts(report.bytes, report.duplicate_bytes, report.duration, report.sources.clone());
    }

    /// What came before a transfer failed came all the same.
    pub(super) fn add_failed(&mut self, last: &Progress, duration: Duration, mut sources: Vec<SourceReport>) {
        if sources.is_empty() {
            let served = last.sources.iter().filter(|source| source.bytes > 0);
            sources = served.map(|source| SourceReport::of(source.peer, source.chunks, source.bytes)).collect();
        }
        self.add_parts(last.new_bytes, last.duplicate_bytes, duration, sources);
    }

    fn add_parts(&mut self, bytes: u64, duplicate_bytes: u64, duration: Duration, sources: Vec<SourceReport>) {
        self.bytes += bytes;
        self.duplicate_bytes += duplicate_bytes;
        self.duration += duration;
        for source in sources {
            match self.sources.iter_mut().find(|known| known.peer == source.peer) {
                Some(known) => {
                    known.chunks += source.chunks;
                    known.bytes += source.bytes;
                    known.banned |= source.banned;
                    known.bad_chunk = source.bad_chunk.or(known.bad_chunk);
                    known.last_refusal = source.last_refusal;
                    known.last_reason = source.last_reason;
                    known.last_brief = source.last_brief;
                }
                None => self.sources.push(source),
            }
        }
    }
}
