//! The scheduler among many seeders, in virtual time: slow and fast ones, ones that hold only parts, break, hang, lie
//! or leave. A download must end whenever what the others hold is everything, and end about as soon as the sum of
//! their bandwidths allows.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout
)]

extern crate willcall_protocol as protocol;

mod world;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use proptest::prelude::*;
use protocol::fetching::{Crowd, Loss, Places, Room, Scheduler, SchedulerConfig, SourceView};
use protocol::{ChunkSet, PeerId};
use world::{Fixed, NOW};

const CHUNK: u32 = 1 << 20;

/// One seeder and the line to it.
#[derive(Clone, Debug)]
struct Line {
    /// Milliseconds that one chunk takes on the line.
    chunk_ms: u64,
    /// Milliseconds one way.
    latency: u64,
    holds: ChunkSet,
    /// Percent of chunks after which the connection breaks.
    breaks: u64,
    /// Percent of chunks that do not verify.
    lies: u64,
    /// Falls silent for ever at this time, without closing.
    hangs_at: u64,
    /// Refuses so many times before it serves.
    busy: u32,
    /// Chunks under way at most: half of the seeder's window, which opens as on a real stream.
    largest: u32,
    /// Percent by which the time of a chunk differs from the usual one, up and down.
    uneven: u64,
}

impl Line {
    fn new(chunk_ms: u64, holds: ChunkSet) -> Self {
        Line { chunk_ms, latency: 20, holds, breaks: 0, lies: 0, hangs_at: u64::MAX, busy: 0, largest: 16, uneven: 0 }
    }
}

#[derive(Debug)]
enum Event {
    Welcome,
    Refused,
    /// Words from the client, at the seeder.
    Want(ChunkSet),
    Cancel(ChunkSet),
    /// The line is free for the next chunk.
    Free,
    /// In the client's buffers, where it waits for its turn.
    Landed(u32),
    /// The client had its turn with it.
    Read(u32),
    /// At the client.
    Arrived(u32),
    Cancelled(ChunkSet),
    Broken,
}

#[derive(Debug, Default)]
struct Remote {
    epoch: u32,
    queue: ChunkSet,
    sending: bool,
    /// When it had sent the last chunk, which travels a little longer.
    sent_at: u64,
    in_flight: BTreeSet<u32>,
    /// Sent and not yet read by a client that keeps to a limit.
    unread: u32,
    landed: VecDeque<u32>,
    window: u32,
    received: u32,
    refused: u32,
    gone: bool,
}

struct Sim {
    now: u64,
    lines: Vec<Line>,
    remotes: Vec<Remote>,
    /// (time, order of making) -> seeder, its connection, what.
    events: BTreeMap<(u64, u64), (usize, u32, Event)>,
    made: u64,
    scheduler: Scheduler,
    total: u32,
    /// Chunks that went over a line, and those that were new.
    sent: u32,
    random: Fixed,
    limit: Option<Limit>,
    crowd: Option<Crowd>,
    /// Those that are busy are slow.
    slow: bool,
    /// How many are talked to at once; the others wait for a place.
    places: Option<Places>,
    waiting: VecDeque<usize>,
    /// Most seeders that were busy at a time.
    busiest: usize,
    /// The client is at a chunk; whose turn is next.
    reading: bool,
    turn: usize,
    /// Chunks on their way that the client has memory for; whoever begins one beyond that waits, one after the other.
    memory: Option<usize>,
    holding: BTreeSet<usize>,
    queue: VecDeque<usize>,
}

/// A client that reads no faster than it may: the seeders in turn. What it has not read yet fills the buffers on the way,
/// and is sent: it cannot be cancelled.
#[derive(Clone, Copy, Debug)]
struct Limit {
    /// Milliseconds for each chunk, from whomever.
    chunk_ms: u64,
    /// Chunks of one seeder that fit into the buffers.
    buffer: u32,
}

#[derive(Debug)]
struct Outcome {
    ms: u64,
    duplicates: u32,
    complete: bool,
    busiest: usize,
}

fn peer(n: usize) -> PeerId {
    PeerId::from_bytes([n as u8 + 1; 32])
}

impl Sim {
    fn new(total: u32, lines: Vec<Line>, seed: u64) -> Self {
        let mut scheduler = Scheduler::new(total, CHUNK, &ChunkSet::new(), SchedulerConfig::default());
        for n in 0..lines.len() {
            assert!(scheduler.add_source(peer(n), NOW));
        }
        let remotes = lines.iter().map(|_| Remote::default()).collect();
        let (events, random) = (BTreeMap::new(), Fixed::new(seed));
        Sim {
            now: NOW,
            lines,
            remotes,
            events,
            made: 0,
            scheduler,
            total,
            sent: 0,
            random,
            limit: None,
            crowd: None,
            slow: false,
            places: None,
            waiting: VecDeque::new(),
            busiest: 0,
            reading: false,
            turn: 0,
            memory: None,
            holding: BTreeSet::new(),
            queue: VecDeque::new(),
        }
    }

    /// As a client does: what is not whole yet lies in memory, which is bounded.
    fn with_memory(self, chunks: usize) -> Self {
        Sim { memory: Some(chunks), ..self }
    }

    fn memory_is_free(&self) -> bool {
        self.memory.is_none_or(|memory| self.holding.len() < memory)
    }

    fn has_memory(&mut self, n: usize) -> bool {
        if self.memory_is_free() {
            return self.holding.insert(n);
        }
        if !self.queue.contains(&n) {
            self.queue.push_back(n);
        }
        false
    }

    fn give_memory_back(&mut self, n: usize) {
        self.holding.remove(&n);
        while self.memory_is_free() {
            let Some(next) = self.queue.pop_front() else { return };
            self.send_next(next);
        }
    }

    /// As a client does: talks to so many at once, in their order.
    fn with_places(self, first: usize, every_ms: u64) -> Self {
        let scheduler = Scheduler::new(self.total, CHUNK, &ChunkSet::new(), SchedulerConfig::default());
        let waiting = (0..self.lines.len()).collect();
        Sim { scheduler, waiting, places: Some(Places::new(first, every_ms)), ..self }
    }

    fn admit(&mut self) {
        let Some(places) = &mut self.places else { return };
        places.one_more(self.slow && !self.waiting.is_empty(), self.now);
        let has_place = |view: &&SourceView| !view.given_up && view.next_try.is_none_or(|at| at <= self.now);
        while self.scheduler.sources().iter().filter(has_place).count() < places.count() {
            let Some(n) = self.waiting.pop_front() else { return };
            assert!(self.scheduler.add_source(peer(n), self.now));
        }
    }

    /// As a client does: no more seeders at a time than the line is good for.
    fn crowded(self) -> Self {
        Sim { crowd: Some(Crowd::new(CHUNK)), ..self }
    }

    /// Whoever sends is heard, and what all of them send is the rate, as far as the client's line carries it.
    fn limit_busy(&mut self) {
        let mut rate = 0;
        for n in 0..self.lines.len() {
            if !self.is_sending(n) {
                continue;
            }
            self.scheduler.heard(&peer(n), self.now);
            if !self.queue.contains(&n) {
                rate += u64::from(CHUNK) * 1000 / self.lines[n].chunk_ms;
            }
        }
        if let Some(limit) = self.limit {
            rate = rate.min(u64::from(CHUNK) * 1000 / limit.chunk_ms);
        }
        if self.crowd.is_none() {
            return;
        }
        let busy = self.scheduler.busy(self.now);
        self.busiest = self.busiest.max(busy);
        if let Some(crowd) = &mut self.crowd {
            let (rate, idle) = ((busy > 0).then_some(rate), self.scheduler.has_idle());
            self.slow = crowd.is_slow(rate, busy);
            let room = crowd.room(rate, busy, idle, self.now);
            let untried = if self.slow { self.scheduler.untried() } else { 0 };
            self.scheduler.limit_busy(self.memory.map_or(room, |memory| room.within(memory, untried)));
        }
    }

    fn is_sending(&self, n: usize) -> bool {
        self.remotes[n].sending || self.remotes[n].unread > 0 || self.queue.contains(&n)
    }

    fn limited(self, limit: Limit) -> Self {
        Sim { limit: Some(limit), ..self }
    }

    fn after(&mut self, ms: u64, n: usize, event: Event) {
        self.made += 1;
        self.events.insert((self.now + ms, self.made), (n, self.remotes[n].epoch, event));
    }

    fn budget(&self, n: usize) -> u32 {
        let remote = &self.remotes[n];
        (remote.window / 2).max(1).saturating_sub(remote.in_flight.len() as u32)
    }

    fn lose(&mut self, n: usize, loss: Loss) {
        let remote = &mut self.remotes[n];
        remote.epoch += 1;
        remote.gone = true;
        (remote.queue, remote.sending, remote.unread) = (ChunkSet::new(), false, 0);
        remote.in_flight.clear();
        remote.landed.clear();
        self.queue.retain(|waiting| *waiting != n);
        self.give_memory_back(n);
        let random = self.random.below(1 << 32) as u32;
        self.scheduler.lost(&peer(n), loss, self.now, random);
    }

    /// The seeder puts the next chunk on the line: the lowest wanted first, as the serving machine does.
    fn send_next(&mut self, n: usize) {
        let hung = self.now >= NOW.saturating_add(self.lines[n].hangs_at);
        let remote = &mut self.remotes[n];
        if remote.sending || hung || self.limit.is_some_and(|limit| remote.unread >= limit.buffer) {
            return;
        }
        let Some(chunk) = remote.queue.first() else { return };
        if self.holding.contains(&n) || !self.has_memory(n) {
            return;
        }
        let remote = &mut self.remotes[n];
        remote.queue.remove(chunk);
        remote.sending = true;
        self.sent += 1;
        let line = &self.lines[n];
        let (chunk_ms, latency) = (line.chunk_ms * (100 - line.uneven) / 100, line.latency);
        let chunk_ms = (chunk_ms + self.random.below(line.chunk_ms * line.uneven / 50 + 1)).max(1);
        let breaks = self.random.below(100) < line.breaks;
        self.after(chunk_ms, n, Event::Free);
        let arrives = match self.limit {
            Some(_) => {
                self.remotes[n].unread += 1;
                Event::Landed(chunk)
            }
            None => Event::Arrived(chunk),
        };
        self.after(chunk_ms + latency, n, if breaks { Event::Broken } else { arrives });
    }

    /// The client turns to the next seeder of whom something is there.
    fn read_next(&mut self) {
        let Some(limit) = self.limit.filter(|_| !self.reading) else { return };
        let count = self.lines.len();
        for n in (self.turn..self.turn + count).map(|n| n % count) {
            if let Some(chunk) = self.remotes[n].landed.pop_front() {
                (self.reading, self.turn) = (true, n + 1);
                self.after(limit.chunk_ms, n, Event::Read(chunk));
                return;
            }
        }
    }

    fn handle(&mut self, n: usize, event: Event) {
        let latency = self.lines[n].latency;
        match event {
            Event::Welcome => {
                self.remotes[n].gone = false;
                self.remotes[n].window = 2;
                let held = self.lines[n].holds.clone();
                let budget = self.budget(n);
                self.scheduler.connected(&peer(n), held, budget, self.now);
            }
            Event::Refused => {
                self.remotes[n].refused += 1;
                self.lose(n, Loss::ComeBack(300));
            }
            Event::Want(chunks) => {
                self.remotes[n].queue = self.remotes[n].queue.union(&chunks);
                self.send_next(n);
            }
            // Nor does it say that it heard of it.
            Event::Cancel(_) if self.now >= NOW.saturating_add(self.lines[n].hangs_at) => {}
            Event::Cancel(chunks) => {
                let queue = &mut self.remotes[n].queue;
                let gone = queue.intersection(&chunks);
                *queue = queue.difference(&chunks);
                self.after(latency, n, Event::Cancelled(gone));
            }
            Event::Free => {
                (self.remotes[n].sending, self.remotes[n].sent_at) = (false, self.now);
                self.give_memory_back(n);
                self.send_next(n);
            }
            Event::Cancelled(chunks) => {
                chunks.iter().for_each(|c| {
                    self.remotes[n].in_flight.remove(&c);
                });
                self.scheduler.released(&peer(n), &chunks);
                let budget = self.budget(n);
                self.scheduler.set_budget(&peer(n), budget);
            }
            Event::Landed(chunk) => {
                self.remotes[n].landed.push_back(chunk);
                self.read_next();
            }
            Event::Read(chunk) => {
                self.remotes[n].unread -= 1;
                self.handle(n, Event::Arrived(chunk));
                self.send_next(n);
            }
            Event::Broken => self.lose(n, Loss::Failed),
            Event::Arrived(_) if self.random.below(100) < self.lines[n].lies => self.lose(n, Loss::Banned),
            Event::Arrived(chunk) => {
                let remote = &mut self.remotes[n];
                remote.in_flight.remove(&chunk);
                remote.received += 1;
                // An acknowledgement after each quarter of the window doubles it.
                if remote.received.is_multiple_of((remote.window / 4).max(1)) {
                    remote.window = (remote.window * 2).min(self.lines[n].largest);
                }
                let verified = self.scheduler.verified(&peer(n), chunk, CHUNK, self.now);
                let budget = self.budget(n);
                self.scheduler.set_budget(&peer(n), budget);
                for other in verified.cancel {
                    let m = (0..self.lines.len()).find(|m| peer(*m) == other).unwrap();
                    let latency = self.lines[m].latency;
                    self.after(latency, m, Event::Cancel(ChunkSet::from_range(chunk..chunk + 1)));
                }
            }
        }
    }

    /// What the driver does between events.
    fn drive(&mut self) {
        for stalled in self.scheduler.stalled(self.now) {
            let n = (0..self.lines.len()).find(|m| peer(*m) == stalled).unwrap();
            // A chunk that trickles in is waited for.
            let quiet = self.now.saturating_sub(self.remotes[n].sent_at) >= SchedulerConfig::default().stall_ms;
            if self.crowd.is_none() || quiet && !self.is_sending(n) {
                self.lose(n, Loss::Failed);
            }
        }
        self.admit();
        for due in self.scheduler.due_connections(self.now) {
            let n = (0..self.lines.len()).find(|m| peer(*m) == due).unwrap();
            let (busy, hung) = (self.lines[n].busy, self.now >= NOW.saturating_add(self.lines[n].hangs_at));
            self.remotes[n].epoch += 1;
            let trip = 4 * self.lines[n].latency;
            let event = match () {
                () if hung => Event::Broken,
                () if self.remotes[n].refused < busy => Event::Refused,
                () => Event::Welcome,
            };
            self.after(trip, n, event);
        }
        self.limit_busy();
        for (to, chunks) in self.scheduler.plan(self.now) {
            let n = (0..self.lines.len()).find(|m| peer(*m) == to).unwrap();
            assert!(!chunks.is_empty() && self.lines[n].holds.is_superset(&chunks), "asked for what is not held");
            assert!(chunks.len() <= self.budget(n), "{} asked, budget {}", chunks.len(), self.budget(n));
            for chunk in chunks.iter() {
                assert!(self.remotes[n].in_flight.insert(chunk), "asked twice for chunk {chunk} at one seeder");
            }
            let latency = self.lines[n].latency;
            self.after(latency, n, Event::Want(chunks));
        }
    }

    fn run(mut self) -> Outcome {
        let limit = NOW + 24 * 3_600_000;
        self.drive();
        while !self.scheduler.is_complete() && !self.scheduler.is_abandoned() && self.now < limit {
            let next = self.events.keys().next().copied();
            let least = if self.crowd.is_some() { 100 } else { 1 };
            let wake = self.scheduler.next_wake(self.now).map(|at| at.max(self.now + least));
            match (next, wake) {
                (Some(key), wake) if wake.is_none_or(|at| key.0 <= at) => {
                    self.now = key.0;
                    let (n, epoch, event) = self.events.remove(&key).unwrap();
                    let read = matches!(event, Event::Read(_));
                    if epoch == self.remotes[n].epoch {
                        self.handle(n, event);
                    }
                    if read {
                        self.reading = false;
                        self.read_next();
                    }
                }
                (_, Some(at)) => self.now = at,
                (_, None) => break,
            }
            self.drive();
        }
        let complete = self.scheduler.is_complete();
        let (ms, duplicates, busiest) = (self.now - NOW, self.sent.saturating_sub(self.total), self.busiest);
        Outcome { ms, duplicates, complete, busiest }
    }
}

fn whole(total: u32) -> ChunkSet {
    ChunkSet::from_range(0..total)
}

/// Time that the lines together need at least, milliseconds. Half of a window a round trip is the most that one stream
/// carries, however fast the line; and four ways pass before the first chunk can be asked for.
fn ideal(total: u32, lines: &[Line]) -> f64 {
    let each = |line: &Line| {
        let trip = (2 * line.latency + line.chunk_ms) as f64;
        (line.chunk_ms as f64).max(trip / f64::from(line.largest / 2))
    };
    let connect = lines.iter().map(|line| 4 * line.latency).min().unwrap_or(0) as f64;
    connect + f64::from(total) / lines.iter().map(|line| 1.0 / each(line)).sum::<f64>()
}

#[test]
fn seeders_of_1_4_and_16_units_finish_within_a_tenth_of_the_ideal() {
    println!("uneven  chunks  unit ms  latency    ideal s   took s    over  duplicates");
    // At 80 ms a mebibyte every 5 ms is more than a window's round trips carry: there the opening of the window
    // decides, which is no matter of the scheduler's.
    let even = [(80, 1), (80, 20), (400, 1), (400, 20), (400, 80), (1600, 1), (1600, 20), (1600, 80)];
    let uneven = [(80, 1), (400, 1), (400, 20), (1600, 20), (1600, 80)];
    for total in [500, 1000, 4000] {
        even.into_iter().for_each(|(unit, latency)| one_four_sixteen(total, unit, latency, 0));
        uneven.into_iter().for_each(|(unit, latency)| one_four_sixteen(total, unit, latency, 60));
    }
}

/// A line that takes `unit` milliseconds a chunk, one four times and one sixteen times as fast; the mean of some runs.
fn one_four_sixteen(total: u32, unit: u64, latency: u64, uneven: u64) {
    let runs = if total > 1000 { 2 } else { 7 };
    let line = |chunk_ms| Line { latency, uneven, ..Line::new(chunk_ms, whole(total)) };
    let lines = vec![line(unit), line(unit / 4), line(unit / 16)];
    let ideal = ideal(total, &lines);
    let (mut ms, mut duplicates) = (0, 0);
    for seed in 0..runs {
        let outcome = Sim::new(total, lines.clone(), u64::from(seed)).run();
        assert!(outcome.complete);
        ms += outcome.ms;
        duplicates += outcome.duplicates;
    }
    let took = ms as f64 / f64::from(runs);
    let over = (took / ideal - 1.0) * 100.0;
    let duplicates = f64::from(duplicates) / f64::from(runs * total) * 100.0;
    println!(
        "{uneven:>5}%  {total:>6}  {unit:>7}  {latency:>7}  {:>9.2}  {:>7.2}  {over:>5.1}%  {duplicates:.2}%",
        ideal / 1000.0,
        took / 1000.0
    );
    assert!(over <= 10.0, "{total} chunks, unit {unit} ms, latency {latency} ms: {over:.1} % over");
    assert!(duplicates <= 2.0, "{total} chunks, unit {unit} ms: {duplicates:.1} % duplicates");
}

/// Slow ones were there first and never stop; the fast ones come when these are busy.
#[test]
fn fast_seeders_that_come_late_are_asked_beside_slow_ones_that_are_busy() {
    println!("slow  kB/s   took s");
    for slow in [1, 2, 3, 5, 10] {
        for rate in [2, 6, 10, 15, 20] {
            let each = Line::new(u64::from(CHUNK) / rate, whole(2000));
            let fast = Line { busy: 6, ..Line::new(100, whole(2000)) };
            let lines = [vec![each; slow], vec![fast; 6]].concat();
            let outcome = Sim::new(2000, lines, 7).crowded().run();
            println!("{slow:>4}  {rate:>4}  {:>7.1}", outcome.ms as f64 / 1000.0);
            assert!(outcome.complete && outcome.ms < 15 * 60_000, "{slow} slow ones of {rate} kB/s: {outcome:?}");
        }
    }
}

/// Slow ones have all the places, and never stop; the fast one is behind as many others that wait.
#[test]
fn a_fast_seeder_is_found_although_slow_ones_took_all_places_first() {
    println!("kB/s   took s");
    for rate in [10, 20, 30] {
        let slow = Line::new(u64::from(CHUNK) / rate, whole(2000));
        let lines = [vec![slow; 31], vec![Line::new(100, whole(2000))]].concat();
        let outcome = Sim::new(2000, lines, 7).crowded().with_places(16, 30_000).run();
        println!("{rate:>4}  {:>7.1}", outcome.ms as f64 / 1000.0);
        assert!(outcome.complete && outcome.ms < 20 * 60_000, "slow ones of {rate} kB/s: {outcome:?}");
    }
}

/// The same where a client's memory is full of what the slow ones send: the fast one would bring a chunk for each of theirs.
#[test]
fn a_fast_seeder_is_found_although_slow_ones_fill_all_memory() {
    println!("first  kB/s   took s");
    for (before, minutes) in [(16, 15), (31, 35)] {
        for rate in [10, 20, 30] {
            let slow = Line::new(u64::from(CHUNK) / rate, whole(4000));
            let lines = [vec![slow; before], vec![Line::new(100, whole(4000))]].concat();
            let outcome = Sim::new(4000, lines, 7).crowded().with_places(16, 30_000).with_memory(16).run();
            println!("{before:>5}  {rate:>4}  {:>7.1}", outcome.ms as f64 / 1000.0);
            assert!(outcome.complete && outcome.ms < minutes * 60_000, "{before} of {rate} kB/s: {outcome:?}");
        }
    }
}

/// A client's own line carries so little that more seeders only make each chunk take longer.
#[test]
fn on_a_slow_line_few_seeders_are_asked_at_a_time() {
    for rate in [10, 30, 100] {
        let lines = vec![Line::new(100, whole(60)); 16];
        let limit = Limit { chunk_ms: u64::from(CHUNK) / rate, buffer: 2 };
        let outcome = Sim::new(60, lines, 7).limited(limit).crowded().run();
        assert!(outcome.complete && outcome.busiest <= 4, "{rate} kB/s: {outcome:?}");
    }
}

/// Whatever the lines do, a download ends while what the good ones hold is everything.
fn any_line(total: u32) -> impl Strategy<Value = Line> {
    let part = (0..total, 0..total).prop_map(|(a, b)| ChunkSet::from_range(a.min(b)..a.max(b) + 1));
    let holds = prop_oneof![2 => Just(whole(total)), 1 => part];
    let hangs = prop_oneof![3 => Just(u64::MAX), 1 => 0u64..20_000];
    let lies = prop_oneof![4 => Just(0u64), 1 => 1u64..30];
    let breaks = prop_oneof![2 => Just(0u64), 1 => 1u64..40];
    (20u64..2000, 1u64..200, holds, breaks, lies, hangs, 0u32..15, prop::sample::select(vec![2u32, 16, 64])).prop_map(
        |(chunk_ms, latency, holds, breaks, lies, hangs_at, busy, largest)| Line {
            chunk_ms,
            latency,
            holds,
            breaks,
            lies,
            hangs_at,
            busy,
            largest,
            uneven: 50,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn it_ends_whenever_those_who_stay_hold_everything(
        mut lines in prop::collection::vec(any_line(120), 1..8), cut in 0u32..120, seed in any::<u64>(),
    ) {
        // Two that hold only a part each, and are honest and stay (with a connection that breaks now and then).
        let steady = |range| Line { breaks: 10, latency: 50, ..Line::new(300, ChunkSet::from_range(range)) };
        lines.extend([steady(0..cut), steady(cut..120)].into_iter().filter(|line| !line.holds.is_empty()));
        let outcome = Sim::new(120, lines, seed).run();
        prop_assert!(outcome.complete, "{outcome:?}");
    }
}

#[test]
fn what_only_the_slow_one_holds_is_asked_for_there_first() {
    // The slow one holds a quarter that nobody else has: everything else can come meanwhile.
    let total = 400;
    let lines = vec![
        Line::new(200, ChunkSet::from_range(0..200)),
        Line::new(50, ChunkSet::from_range(100..400)),
        Line::new(50, ChunkSet::from_range(100..400)),
    ];
    let outcome = Sim::new(total, lines, 1).run();
    let least = 100.0 * 200.0;
    println!("a quarter only at the slow one: {:.1} s, at least {:.1} s", outcome.ms as f64 / 1000.0, least / 1000.0);
    assert!(outcome.complete && outcome.ms as f64 <= least * 1.05, "{outcome:?}");
}

#[test]
fn a_seeder_that_falls_silent_costs_less_than_the_stall_time() {
    let total = 500;
    let steady = || Line::new(50, whole(total));
    let lines = vec![steady(), steady(), Line { hangs_at: 5_000, ..steady() }];
    let outcome = Sim::new(total, lines.clone(), 1).run();
    // After the silence two lines carry what is left; its few chunks are fetched again when nothing else is left.
    let until = 5_000.0 / 50.0 * 3.0;
    let least = 5_000.0 + (f64::from(total) - until) * 25.0;
    println!("one of three falls silent: {:.1} s, at least {:.1} s", outcome.ms as f64 / 1000.0, least / 1000.0);
    assert!(outcome.complete && outcome.ms as f64 <= least * 1.15, "{outcome:?}");
}

#[test]
fn under_a_limit_a_seeder_that_falls_silent_costs_only_what_it_owes() {
    println!("seeders  chunks  limit ms  buffer  hangs at   took s   ideal s  twice");
    for seeders in [2, 4, 8] {
        for (total, chunk_ms) in [(48, 60), (120, 30), (500, 20), (1000, 10)] {
            for buffer in [8, 32] {
                for at in [1, 3, 6] {
                    limited_and_silent(seeders, total, Limit { chunk_ms, buffer }, at);
                }
            }
        }
    }
}

/// All lines are far faster than the client's limit; the last one falls silent after so many tenths of the time.
fn limited_and_silent(seeders: usize, total: u32, limit: Limit, at: u64) {
    let fast = || Line::new(2, whole(total));
    let ideal = u64::from(total) * limit.chunk_ms;
    let mut lines: Vec<Line> = (0..seeders).map(|_| fast()).collect();
    lines[seeders - 1].hangs_at = ideal * at / 10;
    let Outcome { ms, duplicates, complete, .. } = Sim::new(total, lines, 1).limited(limit).run();
    let (chunk_ms, buffer, hangs_at) = (limit.chunk_ms, limit.buffer, ideal * at / 10);
    let (took, least) = (ms as f64 / 1000.0, ideal as f64 / 1000.0);
    println!(
        "{seeders:>7}  {total:>6}  {chunk_ms:>8}  {buffer:>6}  {hangs_at:>8}  {took:>7.2}  {least:>8.2}  {duplicates:>5}"
    );
    // A seeder owes a window's half at most, and what it owes is fetched one after another by those who are idle.
    assert!(complete && duplicates <= 16 && took <= least * 1.15 + 1.0, "{ms} ms, {duplicates} twice");
}

#[test]
fn a_busy_seeder_is_waited_for_however_often_it_says_so() {
    let lines = vec![Line { busy: 40, ..Line::new(50, whole(50)) }];
    assert!(Sim::new(50, lines, 1).run().complete);
}

#[test]
fn seeders_that_are_all_gone_are_given_up_in_the_end() {
    let lines = vec![Line { hangs_at: 0, ..Line::new(50, whole(50)) }, Line { lies: 100, ..Line::new(50, whole(50)) }];
    let sim = Sim::new(50, lines, 1);
    let outcome = sim.run();
    assert!(!outcome.complete && outcome.ms < 3_600_000, "{outcome:?}");
}

#[test]
fn one_that_is_there_and_not_asked_is_not_given_up_for_having_nothing_to_do() {
    let config = SchedulerConfig::default();
    let (most, mut now) = (config.max_failures, NOW);
    let mut scheduler = Scheduler::new(50, CHUNK, &ChunkSet::new(), config.clone());
    assert!(scheduler.add_source(peer(0), now));
    for asked in [false, true] {
        for _ in 0..=most {
            assert_eq!(scheduler.due_connections(now), [peer(0)]);
            scheduler.connected(&peer(0), whole(50), 16, now);
            if asked {
                assert_eq!(scheduler.plan(now).len(), 1);
            }
            now += 60_000;
            scheduler.lost(&peer(0), Loss::Failed, now, u32::MAX);
            now += config.max_backoff_ms;
        }
        assert_eq!(scheduler.is_abandoned(), asked, "one that breaks off what it was asked for is");
    }
}

#[test]
fn a_full_table_has_room_again_when_one_is_forgotten_that_is_not_connected() {
    let peer = |n: usize| PeerId::from_bytes([[n as u8; 16], [(n >> 8) as u8; 16]].concat().try_into().unwrap());
    let mut scheduler = Scheduler::new(50, CHUNK, &ChunkSet::new(), SchedulerConfig::default());
    for n in 0..Scheduler::MAX_SOURCES {
        assert!(scheduler.add_source(peer(n), NOW));
    }
    assert_eq!(scheduler.due_connections(NOW).len(), Scheduler::MAX_SOURCES);
    scheduler.connected(&peer(0), whole(50), 16, NOW);
    scheduler.lost(&peer(1), Loss::Failed, NOW, 0);
    scheduler.lost(&peer(2), Loss::Useless, NOW, 0);
    let new = peer(Scheduler::MAX_SOURCES);
    assert!(!scheduler.add_source(new, NOW));
    assert!(!scheduler.forget(&peer(0)) && !scheduler.forget(&peer(3)) && !scheduler.forget(&new));
    assert!(scheduler.forget(&peer(1)) && scheduler.forget(&peer(2)) && !scheduler.forget(&peer(2)));
    assert!(scheduler.add_source(new, NOW) && scheduler.add_source(peer(1), NOW));
    assert_eq!(scheduler.due_connections(NOW).len(), 2);
}

#[test]
fn a_fast_one_that_comes_back_is_asked_beside_the_slow_ones_whatever_was_tried_before() {
    let mut now = NOW;
    let mut scheduler = Scheduler::new(400, CHUNK, &ChunkSet::new(), SchedulerConfig::default());
    for n in 0..4 {
        assert!(scheduler.add_source(peer(n), now));
    }
    assert_eq!(scheduler.due_connections(now).len(), 4);
    // Two fast ones, which are measured and go away.
    for n in [0, 1] {
        scheduler.connected(&peer(n), whole(400), 16, now);
        for (fast, chunks) in scheduler.plan(now) {
            for chunk in chunks.iter() {
                now += 50;
                scheduler.verified(&fast, chunk, CHUNK, now);
            }
        }
        scheduler.lost(&peer(n), Loss::Failed, now, 0);
    }
    // Slow ones, of which the line seems to bear one: a second one brought nothing, and nobody is tried for minutes.
    scheduler.limit_busy(Room { most: 1, kept: 1 });
    for n in [2, 3] {
        scheduler.connected(&peer(n), whole(400), 16, now);
    }
    let asked = scheduler.plan(now);
    let [(slow, chunks)] = &asked[..] else { panic!("{asked:?}") };
    now += 30_000;
    scheduler.verified(slow, chunks.first().unwrap(), CHUNK, now);
    let names = |asked: Vec<(PeerId, ChunkSet)>| -> Vec<PeerId> { asked.into_iter().map(|(peer, _)| peer).collect() };
    assert_eq!(names(scheduler.plan(now)), [*slow], "the other slow one is not");

    for n in [0, 1] {
        scheduler.connected(&peer(n), whole(400), 16, now);
    }
    let asked = scheduler.plan(now);
    let [(fast, chunks)] = &asked[..] else { panic!("one of them, to begin with: {asked:?}") };
    assert!([peer(0), peer(1)].contains(fast));
    assert!(scheduler.plan(now).is_empty());
    // It is the line: measured anew it is as slow as the other, and has no place beyond what the line bears any more.
    for chunk in chunks.iter() {
        now += 30_000;
        scheduler.heard(slow, now);
        scheduler.verified(fast, chunk, CHUNK, now);
    }
    assert!(!names(scheduler.plan(now)).contains(fast));
}

/// The first answer of the fast one came while others filled the client's line. That is no measure of what it would take now.
#[test]
fn a_fast_one_that_first_had_a_part_of_the_line_brings_the_last_chunk_that_a_slow_one_owes() {
    let (slow, fast) = (peer(0), peer(1));
    let mut scheduler = Scheduler::new(16, CHUNK, &ChunkSet::new(), SchedulerConfig::default());
    for peer in [slow, fast] {
        assert!(scheduler.add_source(peer, NOW));
    }
    assert_eq!(scheduler.due_connections(NOW).len(), 2);
    scheduler.connected(&slow, whole(16), 1, NOW);
    scheduler.connected(&fast, whole(16), 16, NOW);
    let mut owed: BTreeMap<PeerId, ChunkSet> = scheduler.plan(NOW).into_iter().collect();
    scheduler.heard(&fast, NOW + 100);
    let arrives = |scheduler: &mut Scheduler, owed: &mut BTreeMap<PeerId, ChunkSet>, from: PeerId, now| {
        let chunk = owed[&from].first().unwrap();
        owed.get_mut(&from).unwrap().remove(chunk);
        assert!(scheduler.verified(&from, chunk, CHUNK, now).new);
        scheduler.set_budget(&from, if from == slow { 1 } else { 16 });
        for (to, chunks) in scheduler.plan(now) {
            let all = owed[&to].union(&chunks);
            owed.insert(to, all);
        }
    };
    // A part of the line, half of it, and at last nearly all.
    for at in [10_000, 14_000, 17_000, 20_000, 23_000, 26_000] {
        arrives(&mut scheduler, &mut owed, fast, NOW + at);
    }
    arrives(&mut scheduler, &mut owed, slow, NOW + 26_200);
    let last = owed[&slow].clone();
    assert_eq!(last.len(), 1, "it would have it first, as it seems");
    let mut at = 26_200;
    while !owed[&fast].is_empty() && owed[&fast] != last {
        at += 1_500;
        arrives(&mut scheduler, &mut owed, fast, NOW + at);
    }
    assert_eq!((scheduler.missing(), &owed[&fast]), (&last, &last), "idle while {last:?} takes until 52 s, at {at} ms");
}

/// The list of a product's files is at its beginning: what comes before it has no place yet.
#[test]
fn what_comes_first_is_asked_of_a_faster_seeder_too_long_before_the_end() {
    for (first_bytes, hurried) in [(0, false), (CHUNK, true)] {
        let config = SchedulerConfig { first_bytes, ..SchedulerConfig::default() };
        let mut scheduler = Scheduler::new(200, CHUNK, &ChunkSet::new(), config);
        let [slow, fast] = [0, 1].map(peer);
        for each in [slow, fast] {
            scheduler.add_source(each, NOW);
        }
        scheduler.due_connections(NOW);
        scheduler.connected(&slow, whole(200), 16, NOW);
        assert_eq!(scheduler.plan(NOW), [(slow, ChunkSet::from_range(0..2))]);
        scheduler.connected(&fast, whole(200), 100, NOW);
        let mut asked: Vec<u32> = Vec::new();
        let (mut at, mut hurry_at) = (NOW, None);
        for _ in 0..20 {
            for (who, chunks) in scheduler.plan(at) {
                assert_eq!(who, fast, "the slow one owes two");
                asked.extend(chunks.iter());
                hurry_at = hurry_at.or_else(|| chunks.contains(0).then_some(at - NOW));
            }
            let chunk = asked.remove(0);
            at += 40;
            // Bytes of its first chunk come all the time.
            scheduler.heard(&slow, at);
            let verified = scheduler.verified(&fast, chunk, CHUNK, at);
            assert!(verified.new && verified.cancel == if chunk == 0 { vec![slow] } else { vec![] });
        }
        assert_eq!(hurry_at.is_some(), hurried, "{hurry_at:?}");
        assert!(hurry_at.is_none_or(|after| after <= 120) && !asked.contains(&0), "{hurry_at:?}");
        assert_eq!(scheduler.missing().contains(0), !hurried);
    }
}

#[test]
fn ten_equal_seeders_share_evenly() {
    let total = 1000;
    let lines: Vec<Line> = (0..10).map(|_| Line::new(200, whole(total))).collect();
    let ideal = ideal(total, &lines);
    let outcome = Sim::new(total, lines, 1).run();
    println!("ten equal seeders: {} ms, at least {ideal:.0} ms, {} duplicates", outcome.ms, outcome.duplicates);
    assert!(outcome.complete && outcome.ms as f64 <= ideal * 1.05 && outcome.duplicates <= 20, "{outcome:?}");
}
