//! Which chunk is asked for where. Time and randomness come in as arguments; connections are somebody else's business.
//!
//! - A seeder continues its own run of chunks where it can (its disk and its acknowledgements stay sequential); a
//!   seeder without one starts in the middle of the longest free run, so that seeders grow apart. Where seeders hold
//!   only parts, the chunks that the fewest of them hold come first.
//! - As much is under way at a seeder as it delivers in [`SchedulerConfig::horizon_ms`], or in four times as long as it takes
//!   to answer where that is more, within its window.
//! - The last chunks are dealt out by who will have them first, so that no slow seeder holds up the end with a chunk
//!   that a fast one would have brought sooner.
//! - A chunk that does not come for [`SchedulerConfig::stall_ms`] is asked for elsewhere. When everything is under way,
//!   an idle seeder fetches what a much slower one still owes.
//! - A seeder that fails is tried again after a back-off that doubles, with jitter, [`SchedulerConfig::max_failures`]
//!   times in a row at most; one that says when to come back is not counted as failing; one that sends a bad chunk is
//!   not used again.

mod last_chunks;

use std::collections::BTreeMap;

use super::crowd::Room;
use super::pace::{Pace, millis};
use super::rarity::Rarity;
use crate::ids::PeerId;
use crate::ranges::ChunkSet;

/// A seeder far away has so many times as much under way as it delivers while a request travels: twice for the road there and
/// back of what is asked next, and twice again because a lost packet holds up all that follows it for that long.
const DISTANCES: f64 = 4.0;
/// A seeder that sent nothing for this part of the stall time is not counted on.
const SILENT_PART: u64 = 5;
/// Nobody is asked for more than is delivered in this time, however late the first answer was.
const LONGEST_HORIZON_MS: u64 = 3_000;

/// Numbers of the scheduler.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// As much is under way at a seeder as it delivers in this time, milliseconds, where it is not far away.
    pub horizon_ms: u64,
    /// A chunk that does not arrive while its seeder sends nothing at all for this long is asked for elsewhere.
    pub stall_ms: u64,
    /// First back-off after a failure, milliseconds; doubles with each further one.
    pub backoff_ms: u64,
    /// Longest back-off, milliseconds.
    pub max_backoff_ms: u64,
    /// Failures in a row after which a seeder is given up.
    pub max_failures: u32,
    /// So many bytes at the beginning come first, as what says where the rest belongs: rounded down to chunks, one at least
    /// and [`Scheduler::MAX_FIRST`] at most, none for 0.
    pub first_bytes: u32,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        SchedulerConfig {
            horizon_ms: 500,
            stall_ms: 10_000,
            backoff_ms: 250,
            max_backoff_ms: 30_000,
            max_failures: 12,
            first_bytes: 0,
        }
    }
}

/// Why a seeder was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The connection failed or broke, or the seeder stalled: try again later.
    Failed,
    /// It said when to come back, milliseconds from now.
    ComeBack(u64),
    /// It will not serve this: do not try again.
    Useless,
    /// It sent a chunk that does not verify: never again.
    Banned,
}

/// What became of a verified chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// It was not here before.
    pub new: bool,
    /// Others who are still asked for it: to be cancelled there.
    pub cancel: Vec<PeerId>,
}

/// A seeder as the scheduler sees it, for progress displays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceView {
    /// Who.
    pub peer: PeerId,
    /// Connected now?
    pub connected: bool,
    /// Given up or banned?
    pub given_up: bool,
    /// Chunks from it that were new.
    pub chunks: u32,
    /// Bytes from it, duplicates included.
    pub bytes: u64,
    /// Bytes per second, a moving average.
    pub rate: u64,
    /// When it is tried again, unix milliseconds, where it is waiting.
    pub next_try: Option<u64>,
}

#[derive(Debug)]
enum State {
    /// Known; to be connected at the given time.
    Waiting(u64),
    /// Being connected.
    Connecting,
    Connected(Connected),
    GivenUp,
}

#[derive(Debug)]
struct Connected {
    held: ChunkSet,
    in_flight: BTreeMap<u32, u64>,
    budget: u32,
    /// Where its run goes on.
    next: Option<u32>,
    last_progress: u64,
    /// When bytes came last that the caller told of.
    heard: u64,
    /// It brings what it owes, to make room for others. Of seeders that are about as slow another would have to at each look,
    /// and none would ever be done.
    makes_room: bool,
}

#[derive(Debug)]
struct Source {
    /// The caller's order, the best first.
    number: usize,
    state: State,
    failures: u32,
    /// Times in a row that it said when to come back.
    deferrals: u32,
    chunks: u32,
    bytes: u64,
    pace: Pace,
}

/// The machine.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    chunk_size: u32,
    missing: ChunkSet,
    total: u32,
    sources: BTreeMap<PeerId, Source>,
    /// Over the connected seeders; made anew when one comes or goes.
    rarity: Option<Rarity>,
    /// Seeders that may send at once.
    room: Room,
}

impl Scheduler {
    /// Most seeders kept in mind; further ones are not taken.
    pub const MAX_SOURCES: usize = 256;
    /// Most chunks that come first.
    pub const MAX_FIRST: u32 = 8;

    /// A scheduler for `total` chunks of which `have` are here.
    pub fn new(total: u32, chunk_size: u32, have: &ChunkSet, config: SchedulerConfig) -> Self {
        let missing = ChunkSet::from_range(0..total).difference(have);
        let room = Room { most: usize::MAX, kept: usize::MAX };
        Scheduler { config, chunk_size, missing, total, sources: BTreeMap::new(), rarity: None, room }
    }

    /// A seeder that may hold something; known ones are passed over. False when the table is full.
    pub fn add_source(&mut self, peer: PeerId, now: u64) -> bool {
        if self.sources.contains_key(&peer) {
            return true;
        }
        if self.sources.len() >= Self::MAX_SOURCES {
            return false;
        }
        let state = State::Waiting(now);
        let number = self.sources.len();
        let source = Source { number, state, failures: 0, deferrals: 0, chunks: 0, bytes: 0, pace: Pace::default() };
        self.sources.insert(peer, source);
        true
    }

    /// Seeders to connect to now; each is handed out once, then [`Scheduler::connected`] or [`Scheduler::lost`] follows.
    pub fn due_connections(&mut self, now: u64) -> Vec<PeerId> {
        let mut due = Vec::new();
        for (peer, source) in &mut self.sources {
            if matches!(source.state, State::Waiting(at) if at <= now) {
                source.state = State::Connecting;
                due.push(*peer);
            }
        }
        due
    }

    /// A seeder welcomed this client.
    pub fn connected(&mut self, peer: &PeerId, held: ChunkSet, budget: u32, now: u64) {
        if let Some(source) = self.sources.get_mut(peer) {
            let in_flight = BTreeMap::new();
            let (next, makes_room) = (None, false);
            let connected = Connected { held, in_flight, budget, next, last_progress: now, heard: now, makes_room };
            source.state = State::Connected(connected);
            self.rarity = None;
        }
    }

    /// From now on at most so many seeders are to send at the same time; see [`super::Crowd`]. No limit until then.
    pub fn limit_busy(&mut self, room: Room) {
        self.room = Room { most: room.most.max(1), kept: room.kept.max(1) };
    }

    /// Bytes of a chunk came from a seeder, whether or not that is whole.
    pub fn heard(&mut self, peer: &PeerId, at: u64) {
        if let Some(Source { state: State::Connected(connected), pace, .. }) = self.sources.get_mut(peer) {
            connected.heard = connected.heard.max(at);
            pace.heard(at);
        }
    }

    /// Seeders that owe something and are sending it. One that has been silent for a while is none: it takes no part of
    /// the line.
    pub fn busy(&self, now: u64) -> usize {
        self.connected_sources().filter(|(_, connected)| self.is_busy(connected, now)).count()
    }

    /// Is a seeder there that could be asked for something, and owes nothing?
    pub fn has_idle(&self) -> bool {
        self.connected_sources().any(|(_, connected)| self.is_idle(connected))
    }

    /// How many of these were never measured?
    pub fn untried(&self) -> usize {
        let idle = self.connected_sources().filter(|(_, connected)| self.is_idle(connected));
        idle.filter(|(peer, _)| self.each_ms(peer).is_none()).count()
    }

    fn is_idle(&self, connected: &Connected) -> bool {
        let asked = !connected.in_flight.is_empty() || connected.budget == 0;
        !asked && !connected.held.intersection(&self.missing).is_empty()
    }

    fn is_busy(&self, connected: &Connected, now: u64) -> bool {
        let heard = connected.heard.max(connected.last_progress);
        !connected.in_flight.is_empty() && now.saturating_sub(heard) < self.config.stall_ms / SILENT_PART
    }

    /// How many more chunks its window allows now.
    pub fn set_budget(&mut self, peer: &PeerId, budget: u32) {
        if let Some(Source { state: State::Connected(connected), .. }) = self.sources.get_mut(peer) {
            connected.budget = budget;
        }
    }

    /// A seeder is gone. `random` spreads the next try over the second half of the back-off.
    pub fn lost(&mut self, peer: &PeerId, loss: Loss, now: u64, random: u32) {
        let config = &self.config;
        let Some(source) = self.sources.get_mut(peer) else { return };
        if matches!(source.state, State::GivenUp) {
            return;
        }
        self.rarity = None;
        // One that was asked for nothing, and ended its stream for that, did not fail.
        let owed_nothing = matches!(&source.state, State::Connected(connected) if connected.in_flight.is_empty());
        let loss = if loss == Loss::Failed && owed_nothing { Loss::ComeBack(0) } else { loss };
        let times = match loss {
            Loss::ComeBack(_) => &mut source.deferrals,
            _ => &mut source.failures,
        };
        *times = times.saturating_add(1);
        let backoff = config
            .backoff_ms
            .saturating_mul(1u64.checked_shl((*times).min(20) - 1).unwrap_or(u64::MAX))
            .min(config.max_backoff_ms);
        let wait = backoff / 2 + (backoff / 2).saturating_mul(u64::from(random)) / u64::from(u32::MAX);
        source.state = match loss {
            Loss::Banned | Loss::Useless => State::GivenUp,
            Loss::Failed if source.failures > config.max_failures => State::GivenUp,
            Loss::ComeBack(ms) => State::Waiting(now.saturating_add(ms.clamp(1, config.max_backoff_ms).max(wait))),
            Loss::Failed => State::Waiting(now.saturating_add(wait)),
        };
    }

    /// A seeder that was given up (but not banned by the caller's own list) gets another chance.
    pub fn readmit(&mut self, peer: &PeerId, now: u64) {
        if let Some(source) = self.sources.get_mut(peer)
            && matches!(source.state, State::GivenUp)
        {
            source.state = State::Waiting(now);
            source.failures = 0;
        }
    }

    /// Makes room for another seeder. False for one that is connected or being connected.
    pub fn forget(&mut self, peer: &PeerId) -> bool {
        let idle = |source: &Source| matches!(source.state, State::Waiting(_) | State::GivenUp);
        let forgets = self.sources.get(peer).is_some_and(idle);
        if forgets {
            self.sources.remove(peer);
        }
        forgets
    }

    /// A chunk from `peer` arrived, was verified and written.
    pub fn verified(&mut self, peer: &PeerId, chunk: u32, bytes: u32, now: u64) -> Verified {
        let new = self.missing.remove(chunk);
        if let Some(source) = self.sources.get_mut(peer) {
            (source.failures, source.deferrals) = (0, 0);
            source.bytes += u64::from(bytes);
            source.chunks += u32::from(new);
            source.pace.arrived(bytes, now);
            if let State::Connected(connected) = &mut source.state {
                connected.in_flight.remove(&chunk);
                connected.last_progress = now;
            }
        }
        let cancel = self
            .sources
            .iter()
            .filter(|(other, source)| {
                *other != peer && matches!(&source.state, State::Connected(c) if c.in_flight.contains_key(&chunk))
            })
            .map(|(other, _)| *other)
            .collect();
        Verified { new, cancel }
    }

    /// Chunks that will not come from this seeder after all (cancelled, or left out of a want).
    pub fn released(&mut self, peer: &PeerId, chunks: &ChunkSet) {
        if let Some(Source { state: State::Connected(connected), .. }) = self.sources.get_mut(peer) {
            for chunk in chunks.iter() {
                connected.in_flight.remove(&chunk);
            }
        }
    }

    /// Seeders that owe chunks and sent nothing for the stall time: the caller closes them and reports them lost.
    pub fn stalled(&self, now: u64) -> Vec<PeerId> {
        let stall = self.config.stall_ms;
        self.connected_sources()
            .filter(|(_, c)| !c.in_flight.is_empty() && now.saturating_sub(c.last_progress) >= stall)
            .map(|(peer, _)| peer)
            .collect()
    }

    fn connected_sources(&self) -> impl Iterator<Item = (PeerId, &Connected)> {
        self.sources.iter().filter_map(|(peer, source)| match &source.state {
            State::Connected(connected) => Some((*peer, connected)),
            _ => None,
        })
    }

    /// What to ask for now, at most one set a seeder.
    pub fn plan(&mut self, now: u64) -> Vec<(PeerId, ChunkSet)> {
        let mut free = self.missing.clone();
        for (_, connected) in self.connected_sources() {
            for chunk in connected.in_flight.keys() {
                free.remove(*chunk);
            }
        }
        // Where everybody holds everything, nothing is rare.
        let partial = self.connected_sources().any(|(_, c)| !c.held.is_superset(&self.missing));
        if partial && self.rarity.is_none() {
            self.rarity = Some(Rarity::of(self.connected_sources().map(|(_, c)| &c.held)));
        }
        let shares = self.shares(&free, now);
        let mut requests = Vec::new();
        let busy = self.busy(now);
        let (mut places, mut kept) = (self.room.most.saturating_sub(busy), self.room.kept);
        // One at a time goes beyond that: what was measured before may be so no more, and is measured anew.
        let beyond = self.usual_ms(now).filter(|_| busy <= self.room.most);
        let beyond = beyond.and_then(|usual| self.far_faster(usual));
        for (peer, idle) in self.in_order(now) {
            let makes_room = !idle && kept == 0;
            self.makes_room(&peer, makes_room);
            if idle && places == 0 && beyond != Some(peer) || makes_room {
                continue;
            }
            kept -= usize::from(!idle);
            let room = self.room(&peer);
            let wanted = shares.as_ref().map_or(room, |shares| room.min(shares.get(&peer).copied().unwrap_or(0)));
            let mut chunks = ChunkSet::new();
            if room > 0
                && let Some(chunk) = self.hurry(&peer, now)
            {
                chunks.insert(chunk);
                self.note_asked(&peer, chunk, now);
            }
            while chunks.len() < wanted {
                let Some(run) = self.pick(&peer, &free, partial, wanted - chunks.len()) else { break };
                for chunk in run {
                    free.remove(chunk);
                    chunks.insert(chunk);
                    self.note_asked(&peer, chunk, now);
                    self.continue_at(&peer, chunk + 1);
                }
            }
            if chunks.is_empty()
                && room > 0
                && let Some(chunk) = self.hedge(&peer, now)
            {
                chunks.insert(chunk);
                self.note_asked(&peer, chunk, now);
            }
            if !chunks.is_empty() {
                places = places.saturating_sub(usize::from(idle));
                requests.push((peer, chunks));
            }
        }
        requests
    }

    /// Connected seeders, each with whether it takes a place among those that are busy when it is asked for something: first
    /// those that have one, the fastest before the others. Then those that were faster than these are, then those that were
    /// never measured, in the caller's order, and the slow ones.
    fn in_order(&self, now: u64) -> Vec<(PeerId, bool)> {
        if self.room.most >= self.sources.len() && self.room.kept >= self.sources.len() {
            return self.connected_sources().map(|(peer, c)| (peer, !self.is_busy(c, now))).collect();
        }
        let all = || self.connected_sources().map(|(peer, _)| peer);
        let usual = self.usual_ms(now).or_else(|| self.mean_ms(all())).unwrap_or(0.0);
        let place = |(peer, connected): (PeerId, &Connected)| {
            let number = self.sources.get(&peer).map_or(usize::MAX, |source| source.number);
            let idle = !self.is_busy(connected, now);
            let (class, each) = match self.each_ms(&peer) {
                each if connected.makes_room && each.is_none_or(|each| each >= usual / 2.0) => (2, each.unwrap_or(0.0)),
                Some(each) if !idle || each <= usual => (0, each),
                None => (1, 0.0),
                Some(each) => (2, each),
            };
            (idle, class, each, number, peer)
        };
        let mut order: Vec<(bool, u8, f64, usize, PeerId)> = self.connected_sources().map(place).collect();
        order.sort_unstable_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)).then(a.2.total_cmp(&b.2)).then(a.3.cmp(&b.3)));
        order.into_iter().map(|(idle, _, _, _, peer)| (peer, idle)).collect()
    }

    /// What a chunk takes from each of those that are busy, as far as they were measured.
    fn usual_ms(&self, now: u64) -> Option<f64> {
        let busy = self.connected_sources().filter(|(_, connected)| self.is_busy(connected, now));
        self.mean_ms(busy.map(|(peer, _)| peer))
    }

    fn mean_ms(&self, of: impl Iterator<Item = PeerId>) -> Option<f64> {
        let each = of.filter_map(|peer| self.each_ms(&peer));
        let (sum, count) = each.fold((0.0, 0.0), |(sum, n), each| (sum + each, n + 1.0));
        (count > 0.0).then(|| sum / count)
    }

    /// The fastest of those that owe nothing and could bring something, where it takes less than half of this for a chunk.
    fn far_faster(&self, usual: f64) -> Option<PeerId> {
        let idle = self.connected_sources().filter(|(_, connected)| self.is_idle(connected));
        let fast = idle.filter_map(|(peer, _)| Some((self.each_ms(&peer)?, peer)));
        let fast = fast.filter(|(each, _)| *each < usual / 2.0).min_by(|a, b| a.0.total_cmp(&b.0));
        fast.map(|(_, peer)| peer)
    }

    fn note_asked(&mut self, peer: &PeerId, chunk: u32, now: u64) {
        let Some(source) = self.sources.get_mut(peer) else { return };
        if let State::Connected(connected) = &mut source.state {
            if connected.in_flight.is_empty() {
                connected.last_progress = now;
                source.pace.begins(now);
            }
            connected.in_flight.insert(chunk, now);
            connected.budget = connected.budget.saturating_sub(1);
        }
    }

    fn makes_room(&mut self, peer: &PeerId, makes_room: bool) {
        if let Some(Source { state: State::Connected(connected), .. }) = self.sources.get_mut(peer) {
            connected.makes_room = makes_room;
        }
    }

    fn continue_at(&mut self, peer: &PeerId, chunk: u32) {
        if let Some(Source { state: State::Connected(connected), .. }) = self.sources.get_mut(peer) {
            connected.next = Some(chunk);
        }
    }

    /// How many more chunks are to be under way at this seeder.
    fn room(&self, peer: &PeerId) -> u32 {
        let Some(source) = self.sources.get(peer) else { return 0 };
        let State::Connected(connected) = &source.state else { return 0 };
        let under_way = u32::try_from(connected.in_flight.len()).unwrap_or(u32::MAX);
        self.target(source).saturating_sub(under_way).min(connected.budget)
    }

    /// How much a seeder delivers within the horizon, in chunks; two at least, so that there is always one on the way
    /// while another is being verified.
    fn target(&self, source: &Source) -> u32 {
        let far = source.pace.distance_ms(self.chunk_size) * DISTANCES;
        let horizon = far.min(millis(LONGEST_HORIZON_MS)).max(millis(self.config.horizon_ms));
        let chunks = source.pace.rate() * horizon / 1000.0 / f64::from(self.chunk_size.max(1));
        // A rate is finite and not negative; the cast saturates.
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped right here")]
        let chunks = chunks.ceil().clamp(2.0, 64.0) as u32;
        chunks
    }

    fn each_ms(&self, peer: &PeerId) -> Option<f64> {
        self.sources.get(peer)?.pace.each_ms(self.chunk_size)
    }

    /// The next run for this seeder out of the free chunks.
    fn pick(&self, peer: &PeerId, free: &ChunkSet, partial: bool, most: u32) -> Option<std::ops::Range<u32>> {
        let Some(Source { state: State::Connected(connected), .. }) = self.sources.get(peer) else { return None };
        let mut usable = free.intersection(&connected.held);
        let first = self.first();
        if let Some(start) = usable.first().filter(|start| *start < first) {
            let end = usable.ranges().next().map_or(start, |run| run.end);
            return Some(start..end.min(first).min(start.saturating_add(most)));
        }
        if let (true, Some(rarity)) = (partial, &self.rarity) {
            usable = rarity.rarest(&usable);
        }
        if let Some(next) = connected.next
            && usable.contains(next)
        {
            let end = usable.ranges().find(|r| r.contains(&next)).map_or(next, |r| r.end);
            return Some(next..end.min(next.saturating_add(most)));
        }
        let longest = usable.ranges().max_by_key(|r| r.end - r.start)?;
        // The run's owner, if there is one, is working towards its start: begin in the middle.
        let busy = longest.start > 0
            && self.connected_sources().any(|(other, c)| other != *peer && c.next == Some(longest.start));
        let start = if busy { longest.start + (longest.end - longest.start) / 2 } else { longest.start };
        Some(start..longest.end.min(start.saturating_add(most)))
    }

    /// How many chunks at the beginning come before all others.
    fn first(&self) -> u32 {
        match self.config.first_bytes {
            0 => 0,
            bytes => (bytes / self.chunk_size.max(1)).clamp(1, Self::MAX_FIRST).min(self.total),
        }
    }

    /// Is everything here?
    pub fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    /// Chunks not yet here.
    pub fn missing(&self) -> &ChunkSet {
        &self.missing
    }

    /// Chunks of the content.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Missing chunks that no connected seeder holds.
    pub fn unheld(&self) -> ChunkSet {
        self.connected_sources().fold(self.missing.clone(), |left, (_, c)| left.difference(&c.held))
    }

    /// True when no seeder is connected, being connected or waiting: without new ones nothing will come.
    pub fn is_abandoned(&self) -> bool {
        self.sources.values().all(|s| matches!(s.state, State::GivenUp))
    }

    /// When to look again although nothing happened, unix milliseconds: the next connection, stall or hedge.
    pub fn next_wake(&self, now: u64) -> Option<u64> {
        let waiting = self.sources.values().filter_map(|s| match s.state {
            State::Waiting(at) => Some(at),
            _ => None,
        });
        let stalls = self
            .connected_sources()
            .filter(|(_, c)| !c.in_flight.is_empty())
            .map(|(_, c)| c.last_progress.saturating_add(self.config.stall_ms).min(now.saturating_add(1000)));
        waiting.chain(stalls).min()
    }

    /// All seeders, for displays and reports.
    pub fn sources(&self) -> Vec<SourceView> {
        self.sources
            .iter()
            .map(|(peer, source)| SourceView {
                peer: *peer,
                connected: matches!(source.state, State::Connected(_)),
                given_up: matches!(source.state, State::GivenUp),
                chunks: source.chunks,
                bytes: source.bytes,
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "a rate; the cast saturates"
                )]
                rate: source.pace.rate() as u64,
                next_try: match source.state {
                    State::Waiting(at) => Some(at),
                    _ => None,
                },
            })
            .collect()
    }
}
