//! Both ends of a delivery back to back: messages late, connections broken, either end killed in the middle. While what
//! is lost on the way stays below the window, the delivery completes; and never does a seeder lose more than that.
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

use std::collections::VecDeque;

use proptest::prelude::*;
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::fetching::{Session, SessionEvent, SessionTerms};
use protocol::receipt::Ack;
use protocol::serving::{ServeAccount, ServeAction, ServeMachine, ServeTerms};
use protocol::{ChunkSet, Signed};
use world::samples::{completion, seeder_cert};
use world::*;

const CHUNKS: u32 = 120;

fn terms(listed: bool) -> ServeTerms {
    ServeTerms {
        network: network(),
        seeder: seeder().peer_id(),
        grant: grant(listed, u64::from(CHUNKS) * 4 * MIB),
        chunks: CHUNKS,
        chunk_size: 1 << 20,
        segments: 1,
        idle_ms: 60_000,
        window_wait_ms: 30_000,
    }
}

fn chunks_of(ack: Option<&Signed<Ack>>) -> ChunkSet {
    ack.map(|ack| ack.peek().unwrap().chunks).unwrap_or_default()
}

/// One delivery, its two ends and the line between them.
struct Delivery {
    random: Fixed,
    terms: ServeTerms,
    // The seeder.
    disk: ServeAccount,
    writing: Option<ServeAccount>,
    machine: Option<ServeMachine>,
    sent: u32,
    // The line.
    up: VecDeque<ClientMessage>,
    down: VecDeque<SeederMessage>,
    // The client.
    session: Option<Session>,
    arriving: Vec<u32>,
    have: ChunkSet,
    last_ack: Option<Signed<Ack>>,
    saved_ack: Option<Signed<Ack>>,
    finishing: bool,
    done: bool,
    // What happened.
    faults: u32,
    lost: u32,
    worst_loss: u32,
}

impl Delivery {
    fn new(listed: bool, seed: u64) -> Self {
        Delivery {
            random: Fixed::new(seed),
            terms: terms(listed),
            disk: ServeAccount::default(),
            writing: None,
            machine: None,
            sent: 0,
            up: VecDeque::new(),
            down: VecDeque::new(),
            session: None,
            arriving: Vec::new(),
            have: ChunkSet::new(),
            last_ack: None,
            saved_ack: None,
            finishing: false,
            done: false,
            faults: 0,
            lost: 0,
            worst_loss: 0,
        }
    }

    fn connect(&mut self) {
        let before = self.last_ack.as_ref().map(|ack| ack.peek().unwrap());
        let terms = SessionTerms {
            network: network(),
            delivery: delivery(),
            manifest: manifest_digest(),
            seeder: seeder().peer_id(),
        };
        let mut session = Session::new(terms, before.as_ref());
        let certificate = Signed::sign(&seeder_cert(), &network_key(protocol::trust::KeyPurpose::Enrolment));
        let greeting = SeederMessage::Greeting { certificate, now: NOW, load: (0, 1) };
        session.message(greeting, &client().peer_id()).unwrap();
        let credential = Credential::Ticket(Box::new(ticket()));
        self.up.push_back(session.hello(credential, self.last_ack.clone()));
        self.session = Some(session);
        self.finishing = false;
    }

    /// The next message reaches the seeder. An honest client is never refused.
    fn up(&mut self) {
        let Some(message) = self.up.pop_front() else { return };
        if let ClientMessage::Hello { last_ack, .. } = message {
            let held = ChunkSet::from_range(0..CHUNKS);
            let machine = ServeMachine::new(self.terms.clone(), held, self.disk.clone(), last_ack, NOW).unwrap();
            self.machine = Some(machine);
        } else if let Some(machine) = &mut self.machine {
            machine.message(message, NOW).unwrap();
        }
    }

    fn serve(&mut self) {
        let Some(action) = self.machine.as_mut().and_then(|machine| machine.next_action(NOW)) else { return };
        match action {
            ServeAction::SendChunk(index) => {
                self.sent += 1;
                assert!(self.sent <= self.disk.noted, "a chunk left before its note was durable");
                let acked = chunks_of(self.disk.ack.as_ref()).len();
                assert!(self.sent - acked.min(self.sent) <= self.terms.window(self.disk.honoured, acked));
                self.down.push_back(SeederMessage::Chunk { index, length: 1 << 20 });
            }
            ServeAction::Persist(account) => self.writing = Some(account),
            ServeAction::Say(message) => self.down.push_back(message),
            ServeAction::End => self.machine = None,
            other => panic!("{other:?}"),
        }
    }

    fn disk(&mut self) {
        if let (Some(account), Some(machine)) = (self.writing.take(), &mut self.machine) {
            let (before, after) = (chunks_of(self.disk.ack.as_ref()), chunks_of(account.ack.as_ref()));
            assert!(after.is_superset(&before));
            self.disk = account;
            machine.persisted();
        }
    }

    /// The next message reaches the client.
    fn down(&mut self) {
        let (Some(session), Some(message)) = (&mut self.session, self.down.pop_front()) else { return };
        match session.message(message, &client().peer_id()).unwrap() {
            SessionEvent::Chunk { index, .. } => self.arriving.push(index),
            SessionEvent::Finished => self.done = true,
            SessionEvent::Welcomed { .. } | SessionEvent::Window => {}
            other => panic!("{other:?}"),
        }
    }

    fn verify(&mut self) {
        if self.arriving.is_empty() {
            return;
        }
        let at = self.random.below(self.arriving.len() as u64) as usize;
        let chunk = self.arriving.swap_remove(at);
        if let Some(session) = &mut self.session {
            session.verified(chunk);
        }
        self.have.insert(chunk);
    }

    fn note_ack(&mut self, ack: &Signed<Ack>) {
        let (before, after) = (chunks_of(self.last_ack.as_ref()), chunks_of(Some(ack)));
        assert!(after.is_superset(&before) && after.len() > before.len(), "{after} after {before}");
        assert!(self.have.is_superset(&after), "only what is here");
        self.last_ack = Some(ack.clone());
        if self.random.chance(50) {
            self.saved_ack = self.last_ack.clone();
        }
    }

    fn fetch(&mut self) {
        let Some(session) = &mut self.session else { return };
        if session.ack_due() && !self.finishing {
            let ack = session.ack(&client(), NOW).unwrap();
            self.note_ack(&ack);
            self.up.push_back(ClientMessage::Ack(ack));
        }
        let Some(session) = &mut self.session else { return };
        if !session.is_open() {
            return;
        }
        if self.have.len() == CHUNKS {
            if self.arriving.is_empty() {
                let message = session.finish(&client(), Some(Signed::sign(&completion(), &client())), NOW);
                if let ClientMessage::Finish { ack: Some(ack), .. } = &message {
                    self.note_ack(&ack.clone());
                }
                self.up.push_back(message);
                self.finishing = true;
            }
            return;
        }
        let asked = session.in_flight().union(&self.arriving.iter().copied().collect());
        let missing = ChunkSet::from_range(0..CHUNKS).difference(&self.have).difference(&asked);
        let Some(range) = missing.ranges().nth(self.random.below(missing.range_count() as u64) as usize) else {
            return;
        };
        let count = session.budget().min(range.end - range.start).min(1 + self.random.below(8) as u32);
        let (message, left_out) = session.want(&ChunkSet::from_range(range.start..range.start + count));
        assert!(left_out.is_empty());
        self.up.extend(message);
    }

    /// A connection that breaks (0), a seeder that is killed (1), a client that is killed (2). With `bounded`, only
    /// where the loss leaves something of the window.
    fn fault(&mut self, bounded: bool) {
        if self.machine.is_none() || self.session.as_ref().is_none_or(|session| !session.is_open()) {
            return;
        }
        let kind = self.random.below(3);
        if kind < 2 {
            // What came is verified, and acknowledged on paper for the next stream.
            while !self.arriving.is_empty() {
                self.verify();
            }
            if let Some(ack) = self.session.as_mut().and_then(|session| session.ack(&client(), NOW)) {
                self.note_ack(&ack);
                self.up.push_back(ClientMessage::Ack(ack));
            }
            self.saved_ack = self.last_ack.clone();
        }
        // The seeder's account as the next stream finds it: an end in order, or what the disk has.
        let written = self.random.chance(50);
        let account = match (kind, &self.writing, &self.machine) {
            (1, Some(account), _) if written => account.clone(),
            (1, _, _) => self.disk.clone(),
            (_, _, Some(machine)) => machine.closing_account(),
            _ => return,
        };
        // The client's word is newer than the seeder's, or the other way round.
        let (durable, said) = (chunks_of(account.ack.as_ref()), chunks_of(self.saved_ack.as_ref()));
        let honoured = account.honoured + u32::from(said.len() > durable.len());
        let known = said.len().max(durable.len());
        let lost = account.noted.max(known) - known;
        if bounded && lost >= self.terms.window(honoured, known) {
            return;
        }
        self.faults += 1;
        self.lost = lost;
        self.worst_loss = self.worst_loss.max(lost);
        self.disk = account;
        (self.machine, self.writing, self.session) = (None, None, None);
        (self.up, self.down) = (VecDeque::new(), VecDeque::new());
        self.arriving.clear();
        self.last_ack = self.saved_ack.clone();
    }

    fn step(&mut self, faults: u64, bounded: bool) {
        if self.session.is_none() {
            self.connect();
        }
        if self.random.below(1000) < faults {
            return self.fault(bounded);
        }
        match self.random.below(6) {
            0 => self.up(),
            1 => self.serve(),
            2 => self.disk(),
            3 => self.down(),
            4 => self.verify(),
            _ => self.fetch(),
        }
    }

    /// Until the end, or until so many steps brought none.
    fn run(&mut self, faults: u64, bounded: bool) {
        for _ in 0..200_000 {
            // Where losses have no bound, a window that is used up is an end as well.
            let spent = !bounded && self.session.as_ref().is_some_and(Session::is_spent);
            if self.done || spent {
                return;
            }
            self.step(faults, bounded);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(120) })]

    #[test]
    fn it_completes_while_the_losses_stay_below_the_window(
        listed in any::<bool>(), seed in any::<u64>(), faults in prop::sample::select(vec![0u64, 2, 10, 40]),
    ) {
        let mut delivery = Delivery::new(listed, seed);
        delivery.run(faults, true);
        prop_assert!(
            delivery.done,
            "{} of {CHUNKS} chunks after {} faults, {} lost, disk {:?}",
            delivery.have.len(), delivery.faults, delivery.lost, delivery.disk
        );
        // The seeder holds the client's last word durably, and it names everything the client could attribute.
        prop_assert!(delivery.disk.completion.is_some());
        // A client that was killed may have forgotten a word that the seeder has.
        prop_assert!(chunks_of(delivery.disk.ack.as_ref()).is_superset(&chunks_of(delivery.last_ack.as_ref())));
        prop_assert!(delivery.disk.first_at > 0);
        if faults == 0 {
            prop_assert_eq!(chunks_of(delivery.disk.ack.as_ref()).len(), CHUNKS);
            prop_assert_eq!(delivery.sent, CHUNKS);
        }
    }

    #[test]
    fn without_a_bound_on_faults_no_seeder_loses_more_than_the_window(
        listed in any::<bool>(), seed in any::<u64>(), faults in 1u64..80,
    ) {
        // The window itself is checked at each chunk that leaves.
        let mut delivery = Delivery::new(listed, seed);
        delivery.run(faults, false);
        if !delivery.done {
            // Then both ends agree that this stream brings nothing more: the client turns to another seeder.
            let spent = delivery.session.as_ref().is_some_and(Session::is_spent);
            prop_assert!(delivery.done || spent, "neither done nor spent: {:?}", delivery.disk);
        }
    }
}

/// Breaks a listed delivery of 1 MiB chunks at its worst moment, again and again, after so many chunks came whole: all
/// that was asked for is sent and never arrives. Returns what each break cost.
fn worst_breaks(listed: bool, whole: u32) -> Vec<u32> {
    let mut delivery = Delivery::new(listed, 1);
    delivery.connect();
    while delivery.have.len() < whole {
        delivery.step(0, true);
    }
    let mut losses = Vec::new();
    loop {
        // Everything that came is acknowledged and durable, and the line is empty.
        for _ in 0..2000 {
            match delivery.random.below(5) {
                0 => delivery.up(),
                1 => delivery.serve(),
                2 => delivery.disk(),
                3 => delivery.down(),
                _ => delivery.verify(),
            }
            let session = delivery.session.as_mut().unwrap();
            if session.in_flight().is_empty()
                && let Some(ack) = session.ack(&client(), NOW)
            {
                delivery.note_ack(&ack);
                delivery.up.push_back(ClientMessage::Ack(ack));
            }
        }
        let session = delivery.session.as_mut().unwrap();
        if session.is_spent() {
            return losses;
        }
        let before = delivery.sent;
        let missing = ChunkSet::from_range(0..CHUNKS).difference(&delivery.have);
        let wanted: ChunkSet = missing.iter().take(session.budget() as usize).collect();
        delivery.up.extend(session.want(&wanted).0);
        for _ in 0..100 {
            delivery.up();
            delivery.serve();
            delivery.disk();
        }
        losses.push(delivery.sent - before);
        delivery.disk = delivery.machine.as_ref().unwrap().closing_account();
        (delivery.machine, delivery.session, delivery.writing) = (None, None, None);
        (delivery.up, delivery.down) = (VecDeque::new(), VecDeque::new());
        delivery.connect();
    }
}

#[test]
fn the_bound_in_figures() {
    println!("chunks of 1 MiB, each break at its worst moment, nothing acknowledged in between");
    for (listed, whole) in [(true, 0), (true, 2), (true, 8), (true, 40), (true, 80), (false, 0), (false, 40)] {
        let losses = worst_breaks(listed, whole);
        let sum: u32 = losses.iter().sum();
        let kind = if listed { "listed" } else { "unlisted" };
        println!(
            "{kind:>8}, {whole:>2} chunks here: breaks cost {losses:?}, {sum} MiB in all, then this seeder is spent"
        );
        let window = if listed { 16 } else { 2 };
        assert!(sum <= window + CHUNKS / 8);
        match (listed, whole) {
            (_, 0) => assert_eq!(losses, [1, 1], "two breaks before the first acknowledgement use up a seeder"),
            (true, 40) => assert!(losses.len() >= 5 && sum >= 16),
            _ => {}
        }
    }
}

#[test]
fn a_chunk_that_waits_for_its_hash_does_not_block_the_window() {
    // The window's last places are taken by chunks that lie with the verifier: once they are verified they have to be
    // acknowledged although another is asked for and cannot be sent.
    let mut delivery = Delivery::new(true, 3);
    for _ in 0..200_000 {
        if delivery.done {
            return;
        }
        // The verifier is a hundred times slower than everything else.
        match delivery.random.below(500) {
            0 => delivery.verify(),
            _ if delivery.session.is_none() => delivery.connect(),
            n => match n % 5 {
                0 => delivery.up(),
                1 => delivery.serve(),
                2 => delivery.disk(),
                3 => delivery.down(),
                _ => delivery.fetch(),
            },
        }
    }
    panic!("blocked at {} chunks", delivery.have.len());
}
