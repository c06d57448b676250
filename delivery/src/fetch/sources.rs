//! What is known of each seeder beyond what the scheduler needs: where it is, why it was lost, whether it may be tried
//! again. From the reasons of all of them follows the one name for why nothing moves.

use std::collections::{BTreeMap, VecDeque};

use protocol::fetching::{Loss, Scheduler, SourceView};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode};

use super::end::{EndReason, is_about_credential};
use super::{SourceReport, StallCause};

#[derive(Debug)]
pub(super) struct SourceBook {
    entries: BTreeMap<PeerId, Entry>,
    /// Known and not yet handed to the scheduler, the best first.
    spare: VecDeque<PeerId>,
}

#[derive(Debug)]
struct Entry {
    target: PeerAddrs,
    last: Option<Last>,
    closed: bool,
    banned: bool,
    bad_chunk: Option<u32>,
    chunks: u32,
    bytes: u64,
}

#[derive(Debug)]
struct Last {
    text: String,
    refusal: Option<Refusal>,
    unreachable: bool,
}

impl SourceBook {
    pub(super) fn new() -> Self {
        SourceBook { entries: BTreeMap::new(), spare: VecDeque::new() }
    }

    /// Notes a seeder and where it is.
    pub(super) fn add(&mut self, target: PeerAddrs) -> Added {
        if let Some(entry) = self.entries.get_mut(&target.peer) {
            for address in target.addrs {
                if !entry.target.addrs.contains(&address) && entry.target.addrs.len() < PeerAddrs::MAX_ADDRS {
                    entry.target.addrs.push(address);
                }
            }
            return if entry.closed { Added::No } else { Added::Known };
        }
        if self.entries.len() >= Scheduler::MAX_SOURCES {
            return Added::No;
        }
        let peer = target.peer;
        let entry = Entry { target, last: None, closed: false, banned: false, bad_chunk: None, chunks: 0, bytes: 0 };
        self.entries.insert(peer, entry);
        self.spare.push_back(peer);
        Added::New
    }

    pub(super) fn next_spare(&mut self) -> Option<PeerId> {
        self.spare.pop_front()
    }

    pub(super) fn has_spare(&self) -> bool {
        !self.spare.is_empty()
    }

    pub(super) fn target(&self, peer: &PeerId) -> PeerAddrs {
        self.entries.get(peer).map_or_else(|| PeerAddrs::from(*peer), |entry| entry.target.clone())
    }

    /// Seeders that were handed to the scheduler and are not given up for good.
    pub(super) fn open(&self) -> Vec<PeerId> {
        let open = self.entries.iter().filter(|(peer, entry)| !entry.closed && !self.spare.contains(peer));
        open.map(|(peer, _)| *peer).collect()
    }

    /// Is nobody left who might serve it later?
    pub(super) fn all_closed(&self) -> bool {
        self.entries.values().all(|entry| entry.closed)
    }

    /// Did every seeder tried so far end at least once?
    pub(super) fn all_ended(&self) -> bool {
        self.entries.values().all(|entry| entry.last.is_some())
    }

    pub(super) fn received(&mut self, peer: &PeerId, bytes: u32, new: bool) {
        if let Some(entry) = self.entries.get_mut(peer) {
            entry.bytes += u64::from(bytes);
            entry.chunks += u32::from(new);
        }
    }

    /// Notes why a stream ended.
    pub(super) fn ended(&mut self, peer: &PeerId, reason: &EndReason) -> Loss {
        let loss = reason.loss();
        let Some(entry) = self.entries.get_mut(peer) else { return loss };
        entry.closed |= matches!(loss, Loss::Useless | Loss::Banned);
        entry.banned |= loss == Loss::Banned;
        if let EndReason::BadChunk(chunk) = reason {
            entry.bad_chunk = Some(*chunk);
        }
        if !matches!(reason, EndReason::Finished | EndReason::Stopped) {
            entry.last = Some(Last {
                text: reason.to_string(),
                refusal: reason.refusal().cloned(),
                unreachable: matches!(reason, EndReason::Unreachable(_)),
            });
        }
        loss
    }

    /// A refusal of the credential that at least two seeders gave, and how many did.
    pub(super) fn credential_refused(&self) -> Option<(Refusal, usize)> {
        let mut counts: BTreeMap<RefusalCode, (Refusal, usize)> = BTreeMap::new();
        for refusal in self.refusals().filter(|refusal| is_about_credential(refusal.code)) {
            counts.entry(refusal.code).or_insert_with(|| (refusal.clone(), 0)).1 += 1;
        }
        counts.into_values().filter(|(_, count)| *count >= 2).max_by_key(|(_, count)| *count)
    }

    fn refusals(&self) -> impl Iterator<Item = &Refusal> {
        self.entries.values().filter_map(|entry| entry.last.as_ref()?.refusal.as_ref())
    }

    /// Why nothing comes while no seeder serves.
    pub(super) fn cause(&self) -> StallCause {
        if self.entries.is_empty() {
            return StallCause::NoSeederKnown;
        }
        let ends: Vec<&Last> = self.entries.values().filter_map(|entry| entry.last.as_ref()).collect();
        if ends.len() < self.entries.len() {
            return StallCause::Connecting;
        }
        if ends.iter().all(|last| last.unreachable) {
            return StallCause::NetworkUnreachable;
        }
        let codes: Vec<RefusalCode> = self.refusals().map(|refusal| refusal.code).collect();
        if codes.len() < ends.len() {
            return StallCause::NoSeederLeft;
        }
        if codes.iter().all(|code| matches!(code, RefusalCode::Overloaded | RefusalCode::ShuttingDown)) {
            return StallCause::Overloaded;
        }
        let most = codes.iter().max_by_key(|code| codes.iter().filter(|other| other == code).count());
        most.map_or(StallCause::NoSeederLeft, |code| StallCause::AllRefused { code: *code })
    }

    pub(super) fn last_reason(&self, peer: &PeerId) -> Option<String> {
        self.entries.get(peer)?.last.as_ref().map(|last| last.text.clone())
    }

    pub(super) fn reports(&self) -> Vec<SourceReport> {
        let report = |(peer, entry): (&PeerId, &Entry)| SourceReport {
            peer: *peer,
            chunks: entry.chunks,
            bytes: entry.bytes,
            last_refusal: entry.last.as_ref().and_then(|last| last.refusal.clone()),
            last_reason: entry.last.as_ref().map(|last| last.text.clone()),
            banned: entry.banned,
            bad_chunk: entry.bad_chunk,
        };
        self.entries.iter().map(report).collect()
    }
}

/// What became of a seeder that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Added {
    New,
    Known,
    /// Given up for good, or the book is full.
    No,
}

/// Neither serving, nor being connected to, nor to be tried again soon: its place is free for another.
pub(super) fn is_idle(view: &SourceView) -> bool {
    view.given_up || view.next_try.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    fn refused(code: RefusalCode) -> EndReason {
        EndReason::Refused(Refusal::new(code, "no"))
    }

    #[test]
    fn the_cause_is_what_all_reasons_have_in_common() {
        let mut book = SourceBook::new();
        assert_eq!(book.cause(), StallCause::NoSeederKnown);
        assert_eq!(book.add(peer(1).into()), Added::New);
        book.add(peer(2).into());
        book.add(peer(3).into());
        assert_eq!(book.cause(), StallCause::Connecting);
        for n in 1..=3 {
            book.ended(&peer(n), &EndReason::Unreachable("no route".to_owned()));
        }
        assert_eq!(book.cause(), StallCause::NetworkUnreachable);
        for n in 1..=3 {
            book.ended(&peer(n), &refused(RefusalCode::Overloaded));
        }
        assert_eq!(book.cause(), StallCause::Overloaded);
        assert_eq!(book.credential_refused(), None);
        book.ended(&peer(1), &refused(RefusalCode::Expired));
        book.ended(&peer(2), &refused(RefusalCode::Expired));
        assert_eq!(book.cause(), StallCause::AllRefused { code: RefusalCode::Expired });
        assert_eq!(book.credential_refused().map(|(_, by)| by), Some(2));
        book.ended(&peer(3), &EndReason::BadChunk(7));
        assert_eq!(book.cause(), StallCause::NoSeederLeft);
        assert!(book.all_closed());
        let bad: Vec<Option<u32>> = book.reports().iter().map(|report| report.bad_chunk).collect();
        assert_eq!(bad, [None, None, Some(7)]);
        assert_eq!(book.add(peer(3).into()), Added::No);
    }
}
