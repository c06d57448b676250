//! The seeder's end against clients that ask, lie, vanish and come back in any order, and against its own crashes: what
//! is sent and not acknowledged never passes the window, whatever happens.
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

use proptest::prelude::*;
use protocol::deliver::{ClientMessage, SeederMessage};
use protocol::receipt::{Ack, DeliveryId};
use protocol::serving::{ACK_WAITS_MS, FIRST_WINDOW, ServeAccount, ServeAction, ServeMachine, ServeTerms};
use protocol::{ChunkSet, RefusalCode, Signed};
use world::samples::{chunks, completion};
use world::*;

const CHUNKS: u32 = 400;

fn terms(listed: bool) -> ServeTerms {
    ServeTerms {
        network: network(),
        seeder: seeder().peer_id(),
        grant: grant(listed, u64::from(CHUNKS) * 2 * MIB),
        chunks: CHUNKS,
        chunk_size: 1 << 20,
        segments: 1,
        idle_ms: 60_000,
        window_wait_ms: 30_000,
    }
}

#[derive(Clone, Debug)]
enum Step {
    Want(u32, u32),
    Cancel(u32, u32),
    /// Acknowledges the first so many of the chunks received and not yet acknowledged.
    Ack(u32),
    /// Sends an acknowledgement that no seeder may take.
    Lie(u8),
    /// Takes up to so many actions of the machine.
    Act(u8),
    /// The disk is done with what the machine asked it to keep.
    Disk,
    /// The seeder dies; what the disk has not got is gone. The client comes back and says what it remembers.
    Crash(bool),
    /// The connection ends in order.
    Close,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..CHUNKS, 1u32..40).prop_map(|(a, n)| Step::Want(a, (a + n).min(CHUNKS))),
        1 => (0..CHUNKS, 1u32..40).prop_map(|(a, n)| Step::Cancel(a, (a + n).min(CHUNKS))),
        3 => (0u32..20).prop_map(Step::Ack),
        1 => (0u8..5).prop_map(Step::Lie),
        6 => (1u8..30).prop_map(Step::Act),
        4 => Just(Step::Disk),
        1 => any::<bool>().prop_map(Step::Crash),
        1 => Just(Step::Close),
    ]
}

/// A seeder with its disk, and what really happened beside what its machine believes.
struct Seeder {
    terms: ServeTerms,
    disk: ServeAccount,
    writing: Option<ServeAccount>,
    machine: ServeMachine,
    now: u64,
    /// Chunks that left, over all streams, one by one.
    sent: u32,
    wanted: ChunkSet,
    /// At the client.
    received: ChunkSet,
    acked: ChunkSet,
    last_ack: Option<Signed<Ack>>,
    /// The client claimed, in a hello, more than was sent.
    worst_outstanding: u32,
}

fn acked_in(account: &ServeAccount) -> ChunkSet {
    account.ack.as_ref().map(|ack| ack.peek().unwrap().chunks).unwrap_or_default()
}

impl Seeder {
    fn new(listed: bool) -> Self {
        let terms = terms(listed);
        let disk = ServeAccount::default();
        let machine =
            ServeMachine::new(terms.clone(), ChunkSet::from_range(0..CHUNKS), disk.clone(), None, NOW).unwrap();
        Seeder {
            terms,
            disk,
            writing: None,
            machine,
            now: NOW,
            sent: 0,
            wanted: ChunkSet::new(),
            received: ChunkSet::new(),
            acked: ChunkSet::new(),
            last_ack: None,
            worst_outstanding: 0,
        }
    }

    fn reconnect(&mut self, hello: Option<Signed<Ack>>) {
        self.writing = None;
        self.wanted = ChunkSet::new();
        let held = ChunkSet::from_range(0..CHUNKS);
        self.machine = ServeMachine::new(self.terms.clone(), held, self.disk.clone(), hello, self.now).unwrap();
    }

    /// The invariants, checked whenever a chunk leaves.
    fn chunk_leaves(&mut self, chunk: u32) {
        self.sent += 1;
        assert!(self.wanted.remove(chunk), "chunk {chunk} was not asked for");
        self.received.insert(chunk);
        assert!(self.sent <= self.disk.noted, "chunk {chunk} left before its note was durable");
        let acked = acked_in(&self.disk).len();
        let outstanding = self.sent - acked.min(self.sent);
        let window = self.terms.window(self.disk.honoured, acked);
        assert!(outstanding <= window, "{outstanding} chunks out, window {window}");
        self.worst_outstanding = self.worst_outstanding.max(outstanding - acked.min(outstanding) / 8);
    }

    fn act(&mut self, most: u8) {
        for _ in 0..most {
            let Some(action) = self.machine.next_action(self.now) else { return };
            match action {
                ServeAction::SendChunk(chunk) => self.chunk_leaves(chunk),
                ServeAction::Persist(account) => {
                    assert!(self.writing.is_none(), "one at a time");
                    assert!(account.noted >= self.sent, "what left stays noted");
                    assert!(account.honoured >= self.disk.honoured);
                    assert!(acked_in(&account).is_superset(&acked_in(&self.disk)), "the best acknowledgement is kept");
                    self.writing = Some(account);
                }
                ServeAction::Say(SeederMessage::Cancelled { chunks }) => {
                    self.wanted = self.wanted.difference(&chunks);
                }
                ServeAction::Say(SeederMessage::Welcome { ack, window, outstanding, .. }) => {
                    assert_eq!(ack, self.disk.ack, "only what is durable is promised");
                    assert_eq!(window, self.terms.window(self.disk.honoured, acked_in(&self.disk).len()));
                    let acked = acked_in(&self.disk).len();
                    assert!((self.sent.max(acked)..=self.disk.noted).contains(&(outstanding + acked)));
                }
                ServeAction::Say(SeederMessage::Window { window, .. }) => {
                    assert_eq!(window, self.terms.window(self.disk.honoured, acked_in(&self.disk).len()));
                }
                ServeAction::Refuse(refusal) => {
                    assert_eq!(refusal.code, RefusalCode::AllowanceSpent, "{refusal}");
                    self.close();
                }
                other => panic!("{other:?} was not asked for"),
            }
        }
    }

    fn disk(&mut self) {
        if let Some(account) = self.writing.take() {
            self.disk = account;
            self.machine.persisted();
        }
    }

    fn ack(&mut self, most: u32) {
        let new: ChunkSet = self.received.difference(&self.acked).iter().take(most as usize).collect();
        let set = self.acked.union(&new);
        let repeated = new.is_empty();
        let signed = match (&self.last_ack, repeated) {
            (Some(ack), true) => ack.clone(),
            (None, true) => return,
            _ => Signed::sign(&ack_of(set.clone(), self.now), &client()),
        };
        self.machine.message(ClientMessage::Ack(signed.clone()), self.now).unwrap();
        (self.acked, self.last_ack) = (set, Some(signed));
    }

    /// Each lie is refused by name, and the stream ends; nothing of it is kept.
    fn lie(&mut self, kind: u8) {
        let mut ack = ack_of(self.acked.clone(), self.now);
        let mut by = client();
        match kind {
            0 => {
                // Shrinks.
                let Some(first) = ack.chunks.first() else { return };
                ack.chunks.remove(first);
                ack.chunks.insert_range(CHUNKS - 3..CHUNKS);
                if ack.chunks.is_superset(self.machine.acked()) {
                    return;
                }
            }
            1 => ack.chunks.insert_range(0..CHUNKS), // more than was ever sent
            2 => {
                ack.chunks.insert(CHUNKS); // does not exist
            }
            3 => by = stranger(),
            _ => ack.delivery = DeliveryId { delivery: 2, ..delivery() },
        }
        if kind == 1 && self.disk.noted >= CHUNKS {
            return;
        }
        let before = self.machine.closing_account();
        let refusal = self.machine.message(ClientMessage::Ack(Signed::sign(&ack, &by)), self.now).unwrap_err();
        assert_eq!(refusal.code, RefusalCode::BadAck, "{kind}: {refusal}");
        assert_eq!(self.machine.closing_account(), before, "{kind}");
        self.close();
    }

    /// The driver's orderly end: the closing account becomes durable, the client says its newest word again.
    fn close(&mut self) {
        let account = self.machine.closing_account();
        assert_eq!(account.noted.max(self.sent), account.noted);
        self.disk = account;
        self.reconnect(self.last_ack.clone());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn never_beyond_the_window(listed in any::<bool>(), steps in prop::collection::vec(step(), 1..160)) {
        let mut seeder = Seeder::new(listed);
        for step in steps {
            // All of it within a second: what is forgiven after that has a test of its own.
            seeder.now += 5;
            match step {
                Step::Want(from, to) => {
                    let set = ChunkSet::from_range(from..to);
                    seeder.wanted = seeder.wanted.union(&set);
                    seeder.machine.message(ClientMessage::Want { chunks: set }, seeder.now).unwrap();
                }
                Step::Cancel(from, to) => {
                    let set = ChunkSet::from_range(from..to);
                    seeder.machine.message(ClientMessage::Cancel { chunks: set }, seeder.now).unwrap();
                }
                Step::Ack(most) => seeder.ack(most),
                Step::Lie(kind) => seeder.lie(kind),
                Step::Act(most) => seeder.act(most),
                Step::Disk => seeder.disk(),
                Step::Crash(remembers) => {
                    let hello = seeder.last_ack.clone().filter(|_| remembers);
                    if !remembers {
                        // A client that kept nothing goes on from what the seeder shows it.
                        seeder.acked = acked_in(&seeder.disk);
                        seeder.last_ack = seeder.disk.ack.clone();
                    }
                    seeder.reconnect(hello);
                }
                Step::Close => seeder.close(),
            }
        }
        let largest = if listed { 16 } else { FIRST_WINDOW };
        prop_assert!(seeder.worst_outstanding <= largest + 1, "{} chunks beyond what was forgiven", seeder.worst_outstanding);
    }
}

/// Runs the machine with a disk that is never slow; returns what was sent.
fn run(seeder: &mut Seeder) -> u32 {
    let before = seeder.sent;
    loop {
        let (sent, disk) = (seeder.sent, seeder.disk.clone());
        seeder.act(200);
        seeder.disk();
        if (sent, &disk) == (seeder.sent, &seeder.disk) {
            return seeder.sent - before;
        }
    }
}

fn want(seeder: &mut Seeder, from: u32, to: u32) {
    let chunks = ChunkSet::from_range(from..to);
    seeder.wanted = seeder.wanted.union(&chunks);
    seeder.machine.message(ClientMessage::Want { chunks }, seeder.now).unwrap();
}

#[test]
fn the_window_opens_from_two_chunks_to_sixteen_mebibytes() {
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, CHUNKS);
    let mut steps = Vec::new();
    for _ in 0..7 {
        steps.push(run(&mut seeder));
        seeder.ack(u32::MAX);
    }
    // One chunk of an eighth comes on top for what was acknowledged.
    assert_eq!(steps, [2, 4, 8, 17, 19, 22, 25]);
    let mut seeder = Seeder::new(false);
    want(&mut seeder, 0, CHUNKS);
    let mut steps = Vec::new();
    for _ in 0..7 {
        steps.push(run(&mut seeder));
        seeder.ack(u32::MAX);
    }
    assert_eq!(steps, [2, 2, 2, 2, 3, 3, 3], "an unlisted seeder stays at two, and an eighth");
}

/// A client that takes each chunk at once and acknowledges every fourth; the disk takes as long as a chunk does. How often
/// something was written, and the most that was acknowledged and not yet on its way to the disk.
fn writes_of_a_delivery(seeder: &mut Seeder) -> (u32, u32) {
    want(seeder, 0, CHUNKS);
    let (mut writes, mut late) = (0, 0);
    while seeder.received.len() < CHUNKS {
        match seeder.machine.next_action(seeder.now) {
            Some(ServeAction::SendChunk(chunk)) => {
                seeder.chunk_leaves(chunk);
                if seeder.sent.is_multiple_of(4) || seeder.sent < 4 {
                    seeder.ack(u32::MAX);
                }
                seeder.disk();
            }
            Some(ServeAction::Persist(account)) => {
                writes += 1;
                seeder.writing = Some(account);
            }
            Some(_) => {}
            None => seeder.disk(),
        }
        let kept = acked_in(seeder.writing.as_ref().unwrap_or(&seeder.disk)).len();
        late = late.max(seeder.acked.len() - kept);
    }
    (writes, late)
}

#[test]
fn acknowledgements_ride_along_with_notes() {
    let mut seeder = Seeder::new(true);
    let (writes, late) = writes_of_a_delivery(&mut seeder);
    println!("400 chunks, 102 acknowledgements: {writes} writes, at most {late} acknowledged chunks wait for one");
    // Notes alone are due after each two chunks at first, after eight at the end, when the window is 66.
    assert!(writes < 102, "no fewer than acknowledgements: {writes}");
    assert!(late <= 66 / 4, "{late}");
}

#[test]
fn an_acknowledgement_waits_for_a_note_a_moment_only() {
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, CHUNKS);
    for _ in 0..5 {
        run(&mut seeder);
        seeder.ack(u32::MAX);
    }
    // The window is as large as it gets, and the client has much more to ask for.
    while seeder.sent < 60 {
        seeder.act(1);
        seeder.disk();
    }
    seeder.disk();
    seeder.ack(1);
    let acked = seeder.last_ack.clone();
    assert_eq!(seeder.machine.deadline(), seeder.now + ACK_WAITS_MS);
    seeder.now += ACK_WAITS_MS;
    assert!(
        matches!(seeder.machine.next_action(seeder.now), Some(ServeAction::Persist(account)) if account.ack == acked)
    );
}

#[test]
fn a_client_that_never_acknowledges_gets_the_first_window_once_and_for_all() {
    let mut seeder = Seeder::new(true);
    for round in 0..20 {
        want(&mut seeder, 0, CHUNKS);
        let sent = run(&mut seeder);
        assert_eq!(sent, if round == 0 { FIRST_WINDOW } else { 0 }, "round {round}");
        if round % 2 == 0 { seeder.close() } else { seeder.reconnect(None) }
    }
}

#[test]
fn what_is_forgiven_to_a_client_that_is_shut_out_has_an_end() {
    use protocol::serving::{FORGIVE_FIRST_MS, FORGIVE_LONGEST_MS, FORGIVE_TIMES};
    let mut seeder = Seeder::new(false);
    let mut most = 0;
    // When it is let in again, in seconds after it was the time before.
    let (mut waits, mut waited) = (Vec::new(), 0);
    while waited <= 2 * FORGIVE_LONGEST_MS {
        let before = most;
        want(&mut seeder, 0, CHUNKS);
        // Not through the model's own count, which knows no forgiveness.
        loop {
            match seeder.machine.next_action(seeder.now) {
                Some(ServeAction::Persist(account)) => {
                    seeder.disk = account;
                    seeder.machine.persisted();
                }
                Some(ServeAction::SendChunk(_)) => most += 1,
                Some(_) => {}
                None => break,
            }
        }
        seeder.disk = seeder.machine.closing_account();
        if most > before {
            waits.push(waited / FORGIVE_FIRST_MS);
            waited = 0;
        }
        seeder.now += FORGIVE_FIRST_MS;
        waited += FORGIVE_FIRST_MS;
        seeder.reconnect(None);
    }
    assert_eq!(waits, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600, 600, 600, 600]);
    assert_eq!(most, FIRST_WINDOW * (1 + FORGIVE_TIMES));
}

#[test]
fn what_a_clock_that_was_ahead_noted_keeps_no_client_out() {
    let hours = 3 * 3_600_000;
    let forgiven = |account: ServeAccount, now| {
        let chunks = ChunkSet::from_range(0..CHUNKS);
        ServeMachine::new(terms(false), chunks, account, None, now).unwrap().closing_account().forgiven
    };
    let shut_out = ServeAccount { noted: FIRST_WINDOW, first_at: NOW + hours, ..ServeAccount::default() };
    assert_eq!(forgiven(shut_out.clone(), NOW), FIRST_WINDOW);
    // What was noted since the clock was set is waited for.
    let (noted, forgiven_at) = (2 * FIRST_WINDOW, NOW + hours);
    let again = ServeAccount { noted, forgiven: FIRST_WINDOW, forgiven_at, first_at: NOW - 500, ..shut_out };
    assert_eq!([forgiven(again.clone(), NOW), forgiven(again, NOW + 1500)], [FIRST_WINDOW, 2 * FIRST_WINDOW]);
}

#[test]
fn a_full_window_is_waited_for_and_then_given_up_by_name() {
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, 10);
    run(&mut seeder);
    let deadline = seeder.machine.deadline();
    assert_eq!(deadline, seeder.now + 30_000);
    assert_eq!(seeder.machine.next_action(deadline - 1), None);
    match seeder.machine.next_action(deadline) {
        Some(ServeAction::Refuse(refusal)) => assert_eq!(refusal.code, RefusalCode::WindowExceeded),
        other => panic!("{other:?}"),
    }
    assert_eq!(seeder.machine.next_action(deadline + 1), None, "a refusal is the last word");
}

#[test]
fn what_was_cancelled_is_not_held_against_the_client() {
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, 10);
    run(&mut seeder);
    seeder.machine.message(ClientMessage::Cancel { chunks: chunks(&[(0, 10)]) }, seeder.now).unwrap();
    seeder.act(10);
    assert!(seeder.wanted.is_empty(), "all that was not sent was cancelled: {}", seeder.wanted);
    assert_eq!(seeder.machine.deadline(), seeder.now + 60_000, "only idleness counts now");
    match seeder.machine.next_action(seeder.now + 60_000) {
        Some(ServeAction::Refuse(refusal)) => assert_eq!(refusal.code, RefusalCode::Idle),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_asks_for_nothing_new_keeps_no_stream_open() {
    // Nothing that is not held already; wants that are taken back at once; the same acknowledgement again.
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, 1);
    run(&mut seeder);
    let begun = seeder.now;
    let mut ended = None;
    for _ in 0..100 {
        seeder.now += 10_000;
        let again = ClientMessage::Want { chunks: ChunkSet::new() };
        seeder.machine.message(again, seeder.now).unwrap();
        seeder.machine.message(ClientMessage::Want { chunks: chunks(&[(5, 6)]) }, seeder.now).unwrap();
        seeder.machine.message(ClientMessage::Cancel { chunks: chunks(&[(5, 6)]) }, seeder.now).unwrap();
        while let Some(action) = seeder.machine.next_action(seeder.now) {
            match action {
                ServeAction::Refuse(refusal) => {
                    ended.get_or_insert((seeder.now, refusal.code));
                }
                ServeAction::Persist(_) => seeder.machine.persisted(),
                _ => {}
            }
        }
    }
    let (at, code) = ended.expect("it is kept open");
    assert_eq!(code, RefusalCode::Idle);
    assert!(at - begun <= 60_000 + 17 * 10_000, "after {} ms", at - begun);
}

#[test]
fn segments_are_asked_for_once_and_not_again_and_again() {
    let mut seeder = Seeder::new(true);
    let mut refused = None;
    for asked in 0..1000 {
        match seeder.machine.message(ClientMessage::Meta { segment: None }, seeder.now) {
            Ok(()) => while seeder.machine.next_action(seeder.now).is_some() {},
            Err(refusal) => {
                refused = Some((asked, refusal.code));
                break;
            }
        }
    }
    let (asked, code) = refused.expect("there is a bound");
    assert_eq!(code, RefusalCode::LimitReached);
    assert!((2..=64).contains(&asked), "{asked}");
}

#[test]
fn every_cancelled_chunk_is_told_however_scattered() {
    let mut seeder = Seeder::new(true);
    // Wanted in pieces, cancelled through pieces that cut them again: more than 256 ranges.
    let odd: ChunkSet = (0..CHUNKS / 2).map(|i| 2 * i).collect();
    for part in [odd.intersection(&chunks(&[(0, 200)])), odd.intersection(&chunks(&[(200, CHUNKS)]))] {
        seeder.wanted = seeder.wanted.union(&part);
        seeder.machine.message(ClientMessage::Want { chunks: part.clone() }, seeder.now).unwrap();
    }
    seeder.machine.message(ClientMessage::Cancel { chunks: ChunkSet::from_range(0..CHUNKS) }, seeder.now).unwrap();
    seeder.act(10);
    assert!(seeder.wanted.is_empty(), "never told: {}", seeder.wanted);
}

#[test]
fn a_hello_brings_back_what_a_crash_took() {
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, CHUNKS);
    for _ in 0..4 {
        run(&mut seeder);
        seeder.ack(u32::MAX);
    }
    run(&mut seeder);
    // The seeder's disk comes back from an old backup, the client kept its word.
    seeder.disk = ServeAccount::default();
    seeder.sent = seeder.acked.len(); // what was out beyond the acknowledgement is written off
    let hello = seeder.last_ack.clone();
    seeder.reconnect(hello.clone());
    // The welcome waits for the disk.
    assert!(
        matches!(seeder.machine.next_action(seeder.now), Some(ServeAction::Persist(account)) if account.ack == hello)
    );
    assert_eq!(seeder.machine.next_action(seeder.now), None);
    let account = seeder.machine.closing_account();
    seeder.reconnect(hello.clone());
    seeder.act(1);
    seeder.disk();
    assert_eq!(seeder.disk.ack, hello);
    assert_eq!(seeder.disk.noted, account.noted);
    want(&mut seeder, 31, CHUNKS);
    assert!(run(&mut seeder) >= FIRST_WINDOW);
    // A forged word in the hello ends the stream at once.
    let forged = Signed::sign(&hello.unwrap().peek().unwrap(), &stranger());
    let refusal =
        ServeMachine::new(terms(true), ChunkSet::new(), seeder.disk.clone(), Some(forged), seeder.now).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::BadAck);
}

#[test]
fn the_end_is_said_once_everything_is_durable_and_nothing_follows_it() {
    let mut seeder = Seeder::new(true);
    want(&mut seeder, 0, 2);
    run(&mut seeder);
    let ack = Signed::sign(&ack_of(seeder.received.clone(), seeder.now), &client());
    let done = Signed::sign(&completion(), &client());
    let finish = ClientMessage::Finish { ack: Some(ack.clone()), completion: Some(done.clone()) };
    seeder.machine.message(finish, seeder.now).unwrap();
    // What comes after is passed over.
    seeder.machine.message(ClientMessage::Want { chunks: chunks(&[(0, 9)]) }, seeder.now).unwrap();
    let Some(ServeAction::Persist(account)) = seeder.machine.next_action(seeder.now) else { panic!("not persisted") };
    assert_eq!((account.ack.as_ref(), account.completion.as_ref(), account.noted), (Some(&ack), Some(&done), 2));
    assert_eq!(seeder.machine.next_action(seeder.now), None, "not before the disk has it");
    seeder.machine.persisted();
    let window = SeederMessage::Window { window: 4, outstanding: 0 };
    assert_eq!(seeder.machine.next_action(seeder.now), Some(ServeAction::Say(window)));
    assert_eq!(seeder.machine.next_action(seeder.now), Some(ServeAction::Say(SeederMessage::Finished)));
    assert_eq!(seeder.machine.next_action(seeder.now), Some(ServeAction::End));
    assert_eq!(seeder.machine.next_action(seeder.now), None);
}

#[test]
fn wants_that_cannot_be_are_refused_by_name() {
    let held = chunks(&[(0, 10)]);
    let machine = || ServeMachine::new(terms(true), held.clone(), ServeAccount::default(), None, NOW).unwrap();
    let code = |message| machine().message(message, NOW).unwrap_err().code;
    assert_eq!(code(ClientMessage::Want { chunks: chunks(&[(0, CHUNKS + 1)]) }), RefusalCode::BadWant);
    assert_eq!(code(ClientMessage::Want { chunks: chunks(&[(5, 11)]) }), RefusalCode::BadWant);
    assert_eq!(code(ClientMessage::Meta { segment: Some(1) }), RefusalCode::BadWant);
    let mut machine = machine();
    for _ in 0..6 {
        machine.message(ClientMessage::Meta { segment: None }, NOW).unwrap();
    }
    let refusal = machine.message(ClientMessage::Meta { segment: None }, NOW).unwrap_err();
    assert_eq!(refusal.code, RefusalCode::LimitReached);
}

#[test]
fn the_allowance_ends_what_the_window_would_go_on_with() {
    let mut seeder = Seeder::new(true);
    seeder.terms.grant.allowance = 20 * MIB;
    seeder.reconnect(None);
    want(&mut seeder, 0, CHUNKS);
    for _ in 0..40 {
        let open = seeder.sent;
        run(&mut seeder);
        seeder.ack(u32::MAX);
        if seeder.sent == open {
            want(&mut seeder, 0, CHUNKS);
        }
    }
    // The chunk that passes the allowance is still sent: a content's last chunk is shorter than the others.
    assert_eq!(seeder.sent, 21);
}
