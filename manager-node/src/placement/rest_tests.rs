//! Placement and the removal of content at full seeders, played against each other in a time of their own: whatever joins,
//! is published and lost, each content moves a few times at most, and then nothing moves any more.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use proptest::prelude::*;
use protocol::{Digest, PeerId};

use super::hash::Candidate;
use super::market::Market;
use crate::handover::{has_more_room, may_go};
use crate::standing::Standing;

/// Rounds of reports, plans, copies and collections after the last event; the longest chains need a few.
const ROUNDS: usize = 60;

/// A seeder as `seeder::room` and `seeder::garbage` have it.
#[derive(Clone, Debug)]
struct Seeder {
    capacity: u64,
    high: u64,
    low: u64,
    held: BTreeSet<usize>,
    orders: BTreeSet<usize>,
}

impl Seeder {
    fn used(&self, lengths: &[u64]) -> u64 {
        self.held.iter().map(|content| lengths[*content]).sum()
    }

    fn below(&self, lengths: &[u64], percent: u64) -> u64 {
        (self.capacity * percent / 100).saturating_sub(self.used(lengths))
    }

    fn free(&self, lengths: &[u64]) -> u64 {
        self.below(lengths, (self.high - 1).max(self.low))
    }
}

#[derive(Debug)]
struct World {
    copies: usize,
    lengths: Vec<u64>,
    seeders: Vec<Seeder>,
    /// The manager's memory of what was given up.
    given_up: HashSet<(usize, usize)>,
    /// And what room was left after that.
    room_left: HashMap<usize, u64>,
    /// Copies made of each content, by the seeder.
    made: BTreeMap<(usize, usize), usize>,
    removed: usize,
}

fn peer(seeder: usize) -> PeerId {
    PeerId::from_bytes([u8::try_from(seeder + 1).unwrap(); 32])
}

fn manifest(content: usize) -> Digest {
    Digest::of("test", &[&content.to_le_bytes()])
}

impl World {
    fn new(copies: usize, seeders: &[(u64, u64, u64)]) -> World {
        let mut world = World {
            copies,
            lengths: Vec::new(),
            seeders: Vec::new(),
            given_up: HashSet::new(),
            room_left: HashMap::new(),
            made: BTreeMap::new(),
            removed: 0,
        };
        seeders.iter().for_each(|seeder| world.join(*seeder));
        world
    }

    fn join(&mut self, (capacity, high, low): (u64, u64, u64)) {
        self.seeders.push(Seeder { capacity, high, low, held: BTreeSet::new(), orders: BTreeSet::new() });
    }

    /// All say what room they have.
    fn report(&mut self) {
        for (number, seeder) in self.seeders.iter().enumerate() {
            let ordered: u64 = seeder.orders.iter().map(|content| self.lengths[*content]).sum();
            let spare = seeder.below(&self.lengths, seeder.low).saturating_sub(ordered);
            match self.room_left.get(&number) {
                None if self.given_up.iter().all(|(seeder, _)| *seeder != number) => {}
                None => drop(self.room_left.insert(number, spare)),
                Some(left) if has_more_room(*left, spare) => {
                    self.given_up.retain(|(seeder, _)| *seeder != number);
                    self.room_left.remove(&number);
                }
                Some(_) => {}
            }
        }
    }

    /// The manager looks, by what the seeders report. True where it ordered something.
    fn plan(&mut self) -> bool {
        self.report();
        let here: HashSet<PeerId> = (0..self.seeders.len()).map(peer).collect();
        let candidate = |(number, seeder): (usize, &Seeder)| Candidate {
            peer: peer(number),
            capacity: seeder.capacity,
            room: seeder.free(&self.lengths).into(),
            spare: seeder.below(&self.lengths, seeder.low).into(),
            surplus: 0,
        };
        let candidates = self.seeders.iter().enumerate().map(candidate).collect();
        let given_up = self.given_up.iter().map(|(seeder, content)| (peer(*seeder), manifest(*content))).collect();
        let standing = Standing { present: here.clone(), here, origin: true, ..Standing::default() };
        let mut market = Market::new(standing, candidates, given_up);
        for (number, seeder) in self.seeders.iter().enumerate() {
            seeder.orders.iter().for_each(|content| market.reserve(&peer(number), self.lengths[*content]));
        }
        for (content, length) in self.lengths.iter().enumerate() {
            let who = |has: &dyn Fn(&Seeder) -> bool| -> Vec<PeerId> {
                let found = self.seeders.iter().enumerate().filter(|(_, seeder)| has(seeder));
                found.map(|(number, _)| peer(number)).collect()
            };
            let holders = who(&|seeder| seeder.held.contains(&content)).into_iter().collect();
            let ordered = who(&|seeder| seeder.orders.contains(&content));
            market.content(manifest(content), *length, &holders, &ordered, |_| self.copies);
        }
        let numbers: HashMap<PeerId, usize> = (0..self.seeders.len()).map(|number| (peer(number), number)).collect();
        let contents: HashMap<Digest, usize> =
            (0..self.lengths.len()).map(|content| (manifest(content), content)).collect();
        let wanted = market.finish(usize::MAX).wanted;
        for wanted in &wanted {
            self.seeders[numbers[&wanted.peer]].orders.insert(contents[&wanted.manifest]);
        }
        !wanted.is_empty()
    }

    /// Removes what has copies enough until so much has gone.
    fn collect(&mut self, number: usize, mut bytes: u64) -> bool {
        let mut went = false;
        for content in self.seeders[number].held.clone() {
            if bytes == 0 {
                break;
            }
            let others = (0..self.seeders.len()).filter(|other| *other != number);
            let others = others.filter(|other| self.seeders[*other].held.contains(&content)).count();
            if may_go(others, 1, self.copies.min(self.seeders.len() - 1)) {
                self.seeders[number].held.remove(&content);
                self.given_up.insert((number, content));
                self.room_left.remove(&number);
                bytes = bytes.saturating_sub(self.lengths[content]);
                self.removed += 1;
                went = true;
            }
        }
        went
    }

    /// Seeders work on their orders, and look how full they are. True where something moved.
    fn work(&mut self) -> bool {
        let mut moved = false;
        for number in 0..self.seeders.len() {
            for content in self.seeders[number].orders.clone() {
                let (needed, seeder) = (self.lengths[content], &self.seeders[number]);
                let mark = seeder.capacity * (seeder.high - 1).max(seeder.low) / 100;
                if needed > seeder.free(&self.lengths) && needed <= mark {
                    let lacking = (seeder.used(&self.lengths) + needed).saturating_sub(mark);
                    moved |= self.collect(number, lacking);
                }
                if needed <= self.seeders[number].free(&self.lengths) {
                    let seeder = &mut self.seeders[number];
                    seeder.orders.remove(&content);
                    seeder.held.insert(content);
                    self.given_up.remove(&(number, content));
                    *self.made.entry((number, content)).or_default() += 1;
                    moved = true;
                }
            }
            let seeder = &self.seeders[number];
            let used = seeder.used(&self.lengths);
            if used > seeder.capacity * seeder.high / 100 {
                moved |= self.collect(number, used - seeder.capacity * seeder.low / 100);
            }
        }
        moved
    }

    /// Rounds until nothing moves any more.
    fn rest(&mut self) -> Option<usize> {
        (0..ROUNDS).find(|_| {
            let ordered = self.plan();
            let moved = self.work();
            !ordered && !moved
        })
    }

    fn held(&self, content: usize) -> usize {
        self.seeders.iter().filter(|seeder| seeder.held.contains(&content)).count()
    }
}

#[test]
fn a_newcomer_to_a_network_that_is_nearly_full_takes_its_share_and_then_nothing_moves() {
    let usual = (100_000_000, 95, 80);
    let mut world = World::new(1, &[usual; 3]);
    world.lengths = vec![8_000_000; 34];
    assert!(world.rest().is_some());
    let before: usize = world.made.values().sum();
    world.join(usual);
    assert!(world.rest().is_some(), "it never rests: {} removed", world.removed);
    let (share, moved) = (world.seeders[3].held.len(), world.made.values().sum::<usize>() - before);
    assert!((4..=10).contains(&share) && moved <= 12, "{share} of 34 taken over with {moved} copies");
    assert!((0..34).all(|content| world.held(content) >= 1));
    assert_eq!(world.removed, 0);

    // What is published then finds room although the first three are full: they hold what the newcomer has, too.
    world.lengths.extend([8_000_000; 8]);
    assert!(world.rest().is_some());
    assert!((0..42).all(|content| world.held(content) >= 1), "{world:?}");
}

fn marks() -> impl Strategy<Value = (u64, u64)> {
    (60u64..=100).prop_flat_map(|high| (Just(high), 30..=high))
}

fn seeder() -> impl Strategy<Value = (u64, u64, u64)> {
    (50u64..2000, marks()).prop_map(|(capacity, (high, low))| (capacity, high, low))
}

#[derive(Clone, Debug)]
enum Event {
    Publish(Vec<u64>),
    Join((u64, u64, u64)),
    /// By so many percent of what it was.
    Shrink(usize, u64),
    /// To so many percent of what it was.
    Grow(usize, u64),
    /// With all that it has.
    Lose(usize),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        3 => prop::collection::vec(1u64..120, 1..20).prop_map(Event::Publish),
        2 => seeder().prop_map(Event::Join),
        1 => (any::<usize>(), 30u64..100).prop_map(|(which, percent)| Event::Shrink(which, percent)),
        1 => (any::<usize>(), 100u64..400).prop_map(|(which, percent)| Event::Grow(which, percent)),
        1 => any::<usize>().prop_map(Event::Lose),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_it_comes_to_rest_and_no_content_moves_often(
        copies in 1usize..4,
        seeders in prop::collection::vec(seeder(), 1..6),
        lengths in prop::collection::vec(1u64..120, 1..40),
        events in prop::collection::vec(event(), 0..6),
    ) {
        let mut world = World::new(copies, &seeders);
        world.lengths = lengths;
        let happens = events.len();
        for event in std::iter::once(None).chain(events.into_iter().map(Some)) {
            match event {
                None => {}
                Some(Event::Publish(lengths)) => world.lengths.extend(lengths),
                Some(Event::Join(seeder)) => world.join(seeder),
                Some(Event::Shrink(which, percent) | Event::Grow(which, percent)) => {
                    let which = which % world.seeders.len();
                    world.seeders[which].capacity = world.seeders[which].capacity * percent / 100;
                }
                Some(Event::Lose(which)) => {
                    let which = which % world.seeders.len();
                    world.seeders[which].held.clear();
                    world.seeders[which].orders.clear();
                }
            }
            prop_assert!(world.rest().is_some(), "no rest after {} removals", world.removed);
        }
        for ((seeder, content), times) in &world.made {
            // Once as it came, and once more at most for each thing that happened.
            prop_assert!(*times <= 1 + happens, "seeder {seeder} got content {content} {times} times");
        }
        for seeder in &world.seeders {
            let full = seeder.used(&world.lengths) > seeder.capacity * seeder.high / 100;
            let needed = seeder.held.iter().all(|content| world.held(*content) <= copies);
            prop_assert!(!full || needed, "above its mark with copies that nobody needs: {seeder:?}");
        }
    }
}
