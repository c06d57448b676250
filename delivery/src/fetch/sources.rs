//! What is known of each seeder beyond what the scheduler needs: where it is, why it was lost, whether it may be tried
//! again. From the reasons of all of them follows the one name for why nothing moves.

use std::collections::{BTreeMap, VecDeque};

use protocol::clock::ClockState;
use protocol::fetching::{Loss, Scheduler, SourceView};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode};

use super::end::{EndReason, is_about_credential};
use super::progress::clock_off_by;
use super::route;
use super::{SourceReport, StallCause};
use crate::clock::now_ms;

#[derive(Debug)]
pub(super) struct SourceBook {
    entries: BTreeMap<PeerId, Entry>,
    /// So many were added, those that were forgotten included.
    added: usize,
    /// Known and not yet handed to the scheduler, the best first.
    spare: VecDeque<PeerId>,
    /// How far clocks may differ, milliseconds.
    grace_ms: u64,
}

#[derive(Debug)]
struct Entry {
    target: PeerAddrs,
    /// Its place among all that were added: the best came first.
    number: usize,
    /// A search named it, and nobody else.
    found: bool,
    last: Option<Last>,
    clock: ClockState,
    closed: bool,
    banned: bool,
    /// It served something, and is to be told that it came.
    owed: bool,
    /// It confirmed the last word of this fetch.
    settled: bool,
    bad_chunk: Option<u32>,
    chunks: u32,
    bytes: u64,
}

#[derive(Debug)]
struct Last {
    text: String,
    brief: String,
    refusal: Option<Refusal>,
    unreachable: bool,
    /// Its machine was reached all the same.
    not_running: bool,
    relayed_only: bool,
    /// That was so the time before, not this time.
    relayed_earlier: bool,
    used_up: bool,
    /// It is greeted again because it holds nothing of what is missing.
    holds_nothing: bool,
    unknown_key: bool,
}

impl Entry {
    fn new(target: PeerAddrs, number: usize) -> Self {
        Entry {
            target,
            number,
            found: false,
            last: None,
            clock: ClockState::Unknown,
            closed: false,
            banned: false,
            owed: false,
            settled: false,
            bad_chunk: None,
            chunks: 0,
            bytes: 0,
        }
    }

    fn leads_nowhere(&self) -> bool {
        let unreachable = self.last.as_ref().is_some_and(|last| last.unreachable);
        self.found && unreachable && self.bytes == 0 && !self.owed && !self.banned
    }
}

impl SourceBook {
    pub(super) fn new(grace_ms: u64) -> Self {
        SourceBook { entries: BTreeMap::new(), added: 0, spare: VecDeque::new(), grace_ms }
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
        self.entries.insert(peer, Entry::new(target, self.added));
        self.added += 1;
        self.spare.push_back(peer);
        Added::New
    }

    /// Notes a seeder that a search named. Anybody can name many that do not exist: where the book is full, one gives way
    /// that was found and could not be reached, if it is to be forgotten.
    pub(super) fn add_found(&mut self, target: PeerAddrs, mut forget: impl FnMut(&PeerId) -> bool) -> Added {
        let peer = target.peer;
        if self.entries.len() >= Scheduler::MAX_SOURCES && !self.entries.contains_key(&peer) {
            let mut dead = self.entries.iter().filter(|(_, entry)| entry.leads_nowhere()).map(|(peer, _)| *peer);
            if let Some(dead) = dead.find(|peer| forget(peer)) {
                self.entries.remove(&dead);
            }
        }
        let added = self.add(target);
        if let (Added::New, Some(entry)) = (added, self.entries.get_mut(&peer)) {
            entry.found = true;
        }
        added
    }

    /// Has nothing to do with a seeder, from the beginning.
    pub(super) fn ban(&mut self, peer: PeerId) {
        if self.entries.len() < Scheduler::MAX_SOURCES {
            let text = "it sent something else than the content in an earlier run".to_owned();
            let last = Some(Last {
                brief: text.clone(),
                text,
                refusal: None,
                unreachable: false,
                not_running: false,
                relayed_only: false,
                relayed_earlier: false,
                used_up: false,
                holds_nothing: false,
                unknown_key: false,
            });
            self.entries
                .insert(peer, Entry { closed: true, banned: true, last, ..Entry::new(peer.into(), self.added) });
        }
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

    /// Seeders that were handed to the scheduler and are not given up for good, the best first.
    pub(super) fn open(&self) -> Vec<PeerId> {
        let open = self.entries.iter().filter(|(peer, entry)| !entry.closed && !self.spare.contains(peer));
        let mut open: Vec<(usize, PeerId)> = open.map(|(peer, entry)| (entry.number, *peer)).collect();
        open.sort_unstable();
        open.into_iter().map(|(_, peer)| peer).collect()
    }

    /// Is nobody left who might serve it later?
    pub(super) fn all_closed(&self) -> bool {
        self.entries.values().all(|entry| entry.closed)
    }

    /// Has no stream to it ended yet?
    pub(super) fn is_untried(&self, peer: &PeerId) -> bool {
        self.entries.get(peer).is_some_and(|entry| entry.last.is_none())
    }

    /// Did every seeder tried so far end at least once?
    pub(super) fn all_ended(&self) -> bool {
        self.entries.values().all(|entry| entry.last.is_some())
    }

    pub(super) fn received(&mut self, peer: &PeerId, bytes: u32, new: bool) {
        if let Some(entry) = self.entries.get_mut(peer) {
            entry.bytes += u64::from(bytes);
            entry.owed = true;
            entry.chunks += u32::from(new);
        }
    }

    /// It is owed an acknowledgement from before.
    pub(super) fn owe(&mut self, peer: &PeerId) {
        if let Some(entry) = self.entries.get_mut(peer) {
            entry.owed = true;
        }
    }

    /// It is owed nothing that it would take.
    pub(super) fn forgive(&mut self, peer: &PeerId) {
        if let Some(entry) = self.entries.get_mut(peer) {
            entry.owed = false;
        }
    }

    /// Seeders that have not confirmed a last word, whether or not they are owed one.
    pub(super) fn unsettled(&self) -> Vec<PeerId> {
        let unsettled = self.entries.iter().filter(|(_, entry)| !entry.settled && !entry.banned);
        unsettled.map(|(peer, _)| *peer).collect()
    }

    /// Seeders that are owed an acknowledgement and did not confirm it. One that sent something else than the content
    /// keeps what it was told before.
    pub(super) fn owed(&self) -> Vec<PeerId> {
        let owed = self.entries.iter().filter(|(_, entry)| entry.owed && !entry.settled && !entry.banned);
        owed.map(|(peer, _)| *peer).collect()
    }

    /// Notes why a stream ended.
    pub(super) fn ended(&mut self, peer: &PeerId, reason: &EndReason) -> Loss {
        let loss = reason.loss();
        let Some(entry) = self.entries.get_mut(peer) else { return loss };
        entry.closed |= matches!(loss, Loss::Useless | Loss::Banned);
        entry.banned |= loss == Loss::Banned;
        entry.settled |= matches!(reason, EndReason::Finished);
        if let EndReason::BadChunk(chunk) = reason {
            entry.bad_chunk = Some(*chunk);
        }
        if !matches!(reason, EndReason::Finished | EndReason::Stopped) {
            // A relay that had led to it has no room for another try now: what is to be done is the same. Once only, since the
            // relay, or the way to it, may be what is missing since.
            let relayed_before = entry.last.as_ref().is_some_and(|last| last.relayed_only && !last.relayed_earlier);
            let relayed_earlier = relayed_before && matches!(reason, EndReason::Unreachable(_));
            entry.last = Some(Last {
                text: told(reason, now_ms(), self.grace_ms),
                brief: reason.brief(),
                refusal: reason.refusal().cloned(),
                unreachable: matches!(
                    reason,
                    EndReason::Unreachable(_) | EndReason::NotRunning(_) | EndReason::RelayedOnly(_)
                ),
                not_running: matches!(reason, EndReason::NotRunning(_)),
                relayed_only: matches!(reason, EndReason::RelayedOnly(_)) || relayed_earlier,
                relayed_earlier,
                used_up: matches!(reason, EndReason::WindowUsedUp),
                holds_nothing: matches!(reason, EndReason::GreetAgain),
                unknown_key: reason.is_newer(),
            });
        }
        loss
    }

    /// This machine's clock was compared with a seeder's.
    pub(super) fn compared(&mut self, peer: &PeerId, clock: ClockState) {
        if let Some(entry) = self.entries.get_mut(peer) {
            entry.clock = clock;
        }
    }

    /// What the seeders' clocks say of this machine's: the one in the middle, so that no single liar decides.
    pub(super) fn clock(&self) -> ClockState {
        let known = self.entries.values().filter(|entry| entry.clock != ClockState::Unknown);
        let mut off: Vec<i64> = known.map(|entry| entry.clock.off_by_ms().unwrap_or(0)).collect();
        off.sort_unstable();
        off.get(off.len() / 2).map_or(ClockState::Unknown, |ms| clock_off_by(*ms))
    }

    /// Takes those back that were given up for what they said of the credential: there is a newer one.
    pub(super) fn reopen(&mut self) -> Vec<PeerId> {
        let refused = |entry: &Entry| {
            let last = entry.last.as_ref().and_then(|last| last.refusal.as_ref());
            last.is_some_and(|refusal| is_about_credential(refusal.code))
        };
        let mut reopened = Vec::new();
        for (peer, entry) in self.entries.iter_mut().filter(|(_, entry)| !entry.banned && refused(entry)) {
            (entry.closed, entry.last) = (false, None);
            reopened.push(*peer);
        }
        reopened
    }

    /// A refusal of the credential that at least two seeders gave, and how many did; they must be more than those that say
    /// otherwise, by what they sent or by the reason for which they do not serve now. Liars come cheap and answer fast.
    pub(super) fn credential_refused(&self) -> Option<(Refusal, usize)> {
        let mut counts: BTreeMap<RefusalCode, (Refusal, usize)> = BTreeMap::new();
        let mut otherwise = 0;
        for entry in self.entries.values() {
            match entry.last.as_ref().and_then(|last| last.refusal.as_ref()) {
                Some(refusal) if is_about_credential(refusal.code) => {
                    counts.entry(refusal.code).or_insert_with(|| (refusal.clone(), 0)).1 += 1;
                }
                _ => {
                    let answered = entry.last.as_ref().is_some_and(|last| !last.unreachable);
                    otherwise += usize::from(!entry.banned && (answered || entry.chunks > 0));
                }
            }
        }
        let enough = counts.into_values().filter(|(_, count)| *count >= 2 && *count > otherwise);
        enough.max_by_key(|(_, count)| *count)
    }

    fn refusals(&self) -> impl Iterator<Item = &Refusal> {
        self.entries.values().filter_map(|entry| entry.last.as_ref()?.refusal.as_ref())
    }

    /// Has this machine no route to any of those that it knows (the cable is out)? Streams that are open do not show it: they
    /// fall silent.
    pub(super) fn out_of_reach(&self) -> bool {
        let mut known = self.entries.values().filter(|entry| !entry.banned).peekable();
        known.peek().is_some() && known.all(|entry| route::is_gone(&entry.target))
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
            // Where some could be reached, that is what something can be done about.
            return match () {
                () if ends.iter().any(|last| last.relayed_only) => StallCause::RelayedOnly,
                () if ends.iter().any(|last| last.not_running) => StallCause::NoSeederLeft,
                () => StallCause::NetworkUnreachable,
            };
        }
        // What those wait for that will serve it again: the others have nothing to do with it any more. But what is wrong
        // with the credential, those that wait would find, too.
        let void = self.refusals().any(|refusal| is_about_credential(refusal.code));
        let waiting = || self.entries.values().filter(|entry| !entry.closed).filter_map(|entry| entry.last.as_ref());
        let mut waiting = waiting().filter(|last| !last.unreachable).peekable();
        if waiting.peek().is_some() && !void {
            let (mut used_up, mut busy, mut stopping) = (true, true, true);
            for last in waiting {
                used_up &= last.used_up;
                let code = last.refusal.as_ref().map(|refusal| refusal.code);
                busy &= matches!(code, Some(RefusalCode::Overloaded | RefusalCode::ShuttingDown));
                stopping &= code == Some(RefusalCode::ShuttingDown);
            }
            if used_up {
                return StallCause::WindowUsedUp;
            }
            if stopping {
                return StallCause::AllRefused { code: RefusalCode::ShuttingDown };
            }
            if busy {
                return StallCause::Overloaded;
            }
        }
        let codes: Vec<RefusalCode> = self.refusals().map(|refusal| refusal.code).collect();
        // A lease that is over is so at those that cannot be reached, too; but not by one whose clock differs.
        let of_time = |code: &RefusalCode| matches!(code, RefusalCode::Expired | RefusalCode::NotYetValid);
        let alone = codes.len() < 2 && self.clock().is_off();
        let asked = match codes.iter().all(of_time) && !alone {
            true => ends.iter().filter(|last| !last.unreachable).count(),
            false => ends.len(),
        };
        if codes.len() < asked {
            return StallCause::NoSeederLeft;
        }
        let most = codes.iter().max_by_key(|code| codes.iter().filter(|other| other == code).count());
        match (most, self.clock().off_by_ms()) {
            (Some(RefusalCode::Expired | RefusalCode::NotYetValid), Some(off_by_ms)) => {
                StallCause::ClockOff { off_by_ms }
            }
            (Some(RefusalCode::Expired), None) => StallCause::TicketExpires,
            (Some(code), _) => StallCause::AllRefused { code: *code },
            (None, _) => StallCause::NoSeederLeft,
        }
    }

    /// Are those that can be reached and will serve again just being asked once more whether they hold anything by now?
    pub(super) fn hold_nothing(&self) -> bool {
        let waiting = || self.entries.values().filter(|entry| !entry.closed).filter_map(|entry| entry.last.as_ref());
        let mut waiting = waiting().filter(|last| !last.unreachable).peekable();
        waiting.peek().is_some() && waiting.all(|last| last.holds_nothing)
    }

    pub(super) fn last_reason(&self, peer: &PeerId) -> Option<String> {
        self.entries.get(peer)?.last.as_ref().map(|last| last.text.clone())
    }

    pub(super) fn last_refusal(&self, peer: &PeerId) -> Option<RefusalCode> {
        self.entries.get(peer)?.last.as_ref()?.refusal.as_ref().map(|refusal| refusal.code)
    }

    pub(super) fn reports(&self) -> Vec<SourceReport> {
        let report = |(peer, entry): (&PeerId, &Entry)| SourceReport {
            peer: *peer,
            chunks: entry.chunks,
            bytes: entry.bytes,
            last_refusal: entry.last.as_ref().and_then(|last| last.refusal.clone()),
            last_reason: entry.last.as_ref().map(|last| last.text.clone()),
            last_brief: entry.last.as_ref().map(|last| last.brief.clone()),
            unknown_key: entry.last.as_ref().is_some_and(|last| last.unknown_key),
            banned: entry.banned,
            bad_chunk: entry.bad_chunk,
        };
        self.entries.iter().map(report).collect()
    }
}

/// Why a stream ended, in words.
fn told(reason: &EndReason, now: u64, grace_ms: u64) -> String {
    match reason.refusal().and_then(|refusal| apart(refusal, now, grace_ms)) {
        Some(apart) => format!("{reason}; {apart}"),
        None => reason.to_string(),
    }
}

/// How far this clock and that of a seeder that refused for time are apart. Which of them is wrong, only many together tell.
pub(super) fn apart(refusal: &Refusal, now: u64, grace_ms: u64) -> Option<String> {
    use RefusalCode as C;
    // A seeder whose own certificate is not good by its clock says that it is not enrolled.
    let for_time = matches!(refusal.code, C::NotYetValid | C::Expired | C::NotEnrolled) && refusal.now > 0;
    match for_time.then(|| ClockState::compare(refusal.now, now, grace_ms))? {
        off @ ClockState::Behind(_) => Some(format!("this seeder's clock is {off} yours")),
        off @ ClockState::Ahead(_) => Some(format!("this seeder's clock is {off} of yours")),
        ClockState::Unknown | ClockState::Good => None,
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

    /// One seeder says what it sees; that its clock and this one differ does not say which is wrong.
    #[test]
    fn a_refusal_for_time_says_how_far_the_clocks_are_apart() {
        const HOUR: u64 = 3_600_000;
        let says = |code, at| told(&EndReason::Refused(Refusal::new(code, "no").at(at)), 10 * HOUR, 600_000);
        let behind = says(RefusalCode::NotYetValid, 8 * HOUR);
        assert!(behind.ends_with("; this seeder's clock is 2 hours behind yours"), "{behind}");
        let not_begun = says(RefusalCode::NotEnrolled, 8 * HOUR);
        assert!(not_begun.ends_with("; this seeder's clock is 2 hours behind yours"), "{not_begun}");
        let ahead = says(RefusalCode::Expired, 13 * HOUR);
        assert!(ahead.ends_with("; this seeder's clock is 3 hours ahead of yours"), "{ahead}");
        for (code, at) in
            [(RefusalCode::Expired, 10 * HOUR), (RefusalCode::Expired, 0), (RefusalCode::Overloaded, HOUR)]
        {
            assert!(!says(code, at).contains("clock"), "{code}");
        }
    }

    fn peer(n: u8) -> PeerId {
        PeerId::from_bytes([n; 32])
    }

    #[test]
    fn whoever_was_found_and_is_not_there_gives_way_to_those_found_later() {
        let key = |n: u16| {
            let mut bytes = [0; 32];
            bytes.iter_mut().zip(n.to_be_bytes()).for_each(|(to, from)| *to = from);
            PeerId::from_bytes(bytes)
        };
        let full = u16::try_from(Scheduler::MAX_SOURCES).unwrap_or(u16::MAX);
        let (mut book, away) = (SourceBook::new(600_000), EndReason::Unreachable("no route".to_owned()));
        book.add(key(0).into());
        for n in 1..full {
            assert_eq!(book.add_found(key(n).into(), |_| false), Added::New);
        }
        let mut forgotten = Vec::new();
        let mut find = |book: &mut SourceBook, n: u16| {
            book.add_found(key(n).into(), |peer| {
                forgotten.push(*peer);
                *peer != key(3)
            })
        };
        assert_eq!(find(&mut book, full), Added::No, "nothing is known of the others yet");
        book.received(&key(1), 1000, true);
        for n in 0..5 {
            book.ended(&key(n), &away);
        }
        book.ended(&key(5), &refused(RefusalCode::Overloaded));
        assert_eq!(find(&mut book, full), Added::New);
        assert_eq!(find(&mut book, full), Added::Known);
        assert_eq!(find(&mut book, full + 1), Added::New);
        // The first was in the lease, the second served, the fourth is being connected to, the sixth is there.
        assert_eq!(find(&mut book, full + 2), Added::No);
        assert_eq!(forgotten, [key(2), key(3), key(4), key(3)]);
        assert_eq!(book.entries.len(), Scheduler::MAX_SOURCES);
        assert!(!book.entries.contains_key(&key(2)) && !book.entries.contains_key(&key(4)));
    }

    fn refused(code: RefusalCode) -> EndReason {
        EndReason::Refused(Refusal::new(code, "no"))
    }

    #[test]
    fn those_that_are_handed_over_keep_their_order() {
        let mut book = SourceBook::new(600_000);
        for n in [9, 3, 5, 4] {
            book.add(peer(n).into());
        }
        for _ in 0..3 {
            book.next_spare();
        }
        book.add_found(peer(1).into(), |_| false);
        assert_eq!(book.open(), [peer(9), peer(3), peer(5)], "the last two are still spare");
        while book.next_spare().is_some() {}
        assert_eq!(book.open(), [9, 3, 5, 4, 1].map(peer));
    }

    #[test]
    fn the_cause_is_what_all_reasons_have_in_common() {
        let mut book = SourceBook::new(600_000);
        assert_eq!(book.cause(), StallCause::NoSeederKnown);
        assert_eq!(book.add(peer(1).into()), Added::New);
        book.add(peer(2).into());
        book.add(peer(3).into());
        assert_eq!(book.cause(), StallCause::Connecting);
        for n in 1..=3 {
            book.ended(&peer(n), &EndReason::Unreachable("no route".to_owned()));
        }
        assert_eq!(book.cause(), StallCause::NetworkUnreachable);
        book.ended(&peer(2), &EndReason::RelayedOnly("a relay carries no goods".to_owned()));
        assert_eq!(book.cause(), StallCause::RelayedOnly);
        book.ended(&peer(2), &EndReason::Unreachable("the relay has no room".to_owned()));
        assert_eq!(book.cause(), StallCause::RelayedOnly, "the way over it is what there is");
        book.ended(&peer(2), &EndReason::Unreachable("no route".to_owned()));
        assert_eq!(book.cause(), StallCause::NetworkUnreachable, "not any more");
        book.ended(&peer(2), &EndReason::RelayedOnly("a relay carries no goods".to_owned()));
        // Killed: first their streams break, then nobody listens any more.
        for n in 1..=3 {
            book.ended(&peer(n), &EndReason::Closed("the seeder closed the stream".to_owned()));
        }
        for n in 1..=3 {
            assert_eq!(book.cause(), StallCause::NoSeederLeft);
            book.ended(&peer(n), &EndReason::NotRunning("nobody listens".to_owned()));
        }
        assert_eq!(book.cause(), StallCause::NoSeederLeft);
        book.ended(&peer(2), &EndReason::RelayedOnly("a relay carries no goods".to_owned()));
        assert_eq!(book.cause(), StallCause::RelayedOnly);
        for n in 1..=3 {
            book.ended(&peer(n), &EndReason::WindowUsedUp);
        }
        assert_eq!(book.cause(), StallCause::WindowUsedUp);
        assert!(!book.all_closed());
        // One that serves it no more has no part in why it waits, and one that is away neither.
        book.ended(&peer(3), &EndReason::Unreachable("no route".to_owned()));
        assert_eq!(book.cause(), StallCause::WindowUsedUp);
        assert!(!book.hold_nothing());
        book.ended(&peer(1), &EndReason::GreetAgain);
        assert!(!book.hold_nothing());
        book.ended(&peer(2), &EndReason::GreetAgain);
        assert!(book.hold_nothing(), "the third cannot be reached");
        let mut dear = SourceBook::new(600_000);
        for n in 1..=3 {
            dear.add(peer(n).into());
            dear.ended(&peer(n), &refused(RefusalCode::PriceBelowFloor));
        }
        assert_eq!(dear.cause(), StallCause::AllRefused { code: RefusalCode::PriceBelowFloor });
        for (reason, cause) in [
            (EndReason::WindowUsedUp, StallCause::WindowUsedUp),
            (refused(RefusalCode::Overloaded), StallCause::Overloaded),
            (EndReason::Silent, StallCause::NoSeederLeft),
        ] {
            dear.add(peer(4).into());
            dear.ended(&peer(4), &reason);
            assert_eq!(dear.cause(), cause);
        }
        for n in 1..=3 {
            book.ended(&peer(n), &refused(RefusalCode::ShuttingDown));
        }
        assert_eq!(book.cause(), StallCause::AllRefused { code: RefusalCode::ShuttingDown });
        for n in 1..=3 {
            book.ended(&peer(n), &refused(RefusalCode::Overloaded));
            assert_eq!(book.cause(), StallCause::Overloaded, "those that are stopping have even less room");
        }
        assert_eq!(book.cause(), StallCause::Overloaded);
        assert_eq!(book.credential_refused(), None);
        book.ended(&peer(1), &refused(RefusalCode::Expired));
        book.ended(&peer(2), &refused(RefusalCode::Expired));
        assert_eq!(book.cause(), StallCause::TicketExpires);
        book.ended(&peer(3), &EndReason::Unreachable("no route".to_owned()));
        assert_eq!(book.cause(), StallCause::TicketExpires, "for the one that is away, too");
        book.ended(&peer(3), &EndReason::Closed("the seeder closed the stream".to_owned()));
        assert_eq!(book.cause(), StallCause::NoSeederLeft);
        // One alone, by another clock, where nobody else can be asked.
        let mut lone = SourceBook::new(600_000);
        lone.add(peer(1).into());
        lone.add(peer(2).into());
        lone.ended(&peer(1), &refused(RefusalCode::Expired));
        lone.ended(&peer(2), &EndReason::Unreachable("no route".to_owned()));
        assert_eq!(lone.cause(), StallCause::TicketExpires);
        lone.compared(&peer(1), ClockState::Behind(7_200_000));
        assert_eq!(lone.cause(), StallCause::NoSeederLeft);
        book.ended(&peer(3), &refused(RefusalCode::Overloaded));
        assert_eq!(book.clock(), ClockState::Unknown);
        book.compared(&peer(1), ClockState::Behind(720_000));
        book.compared(&peer(2), ClockState::Behind(721_000));
        book.compared(&peer(3), ClockState::Good);
        assert_eq!(book.cause(), StallCause::ClockOff { off_by_ms: -720_000 });
        assert!(book.cause().to_string().starts_with("your clock is 12 minutes behind"), "{}", book.cause());
        book.compared(&peer(1), ClockState::Good);
        assert_eq!((book.clock(), book.cause()), (ClockState::Good, StallCause::TicketExpires));
        assert_eq!(book.credential_refused().map(|(_, by)| by), Some(2));
        // As many say something else: they serve it, but not now.
        book.add(peer(4).into());
        book.add(peer(5).into());
        assert_eq!(book.credential_refused().map(|(_, by)| by), Some(2), "one of three");
        book.ended(&peer(4), &refused(RefusalCode::Overloaded));
        assert_eq!(book.credential_refused(), None);
        book.ended(&peer(4), &EndReason::Unreachable("no route".to_owned()));
        assert_eq!(book.credential_refused().map(|(_, by)| by), Some(2), "who is away says nothing");
        book.received(&peer(4), 1000, true);
        assert_eq!(book.credential_refused(), None, "it has served it");
        book.ended(&peer(4), &refused(RefusalCode::Expired));
        assert_eq!(book.credential_refused().map(|(_, by)| by), Some(3));
        book.entries.remove(&peer(4));
        book.entries.remove(&peer(5));
        assert_eq!(book.reopen(), [peer(1), peer(2)]);
        assert!(!book.all_closed() && book.credential_refused().is_none());
        book.ended(&peer(1), &refused(RefusalCode::Expired));
        book.ended(&peer(2), &refused(RefusalCode::Expired));
        book.ended(&peer(3), &EndReason::BadChunk(7));
        assert_eq!(book.cause(), StallCause::NoSeederLeft);
        assert!(book.all_closed());
        let bad: Vec<Option<u32>> = book.reports().iter().map(|report| report.bad_chunk).collect();
        assert_eq!(bad, [None, None, Some(7)]);
        assert_eq!(book.add(peer(3).into()), Added::No);
    }
}
