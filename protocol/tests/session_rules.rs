//! What the receiving end holds a seeder to, and what it must never sign: chunks that it did not get from this seeder,
//! or more ranges than an acknowledgement can name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::codec;
use protocol::deliver::{Credential, SeederMessage};
use protocol::fetching::{Session, SessionError, SessionEvent, SessionTerms};
use protocol::receipt::{Ack, DeliveryId};
use protocol::{ChunkSet, PeerId, Refusal, RefusalCode, Signed};
use world::samples::{chunks, seeder_cert};
use world::*;

fn me() -> PeerId {
    client().peer_id()
}

fn greeting() -> SeederMessage {
    let certificate = Signed::sign(&seeder_cert(), &network_key(protocol::trust::KeyPurpose::Enrolment));
    SeederMessage::Greeting { certificate, now: NOW, load: (0, 1) }
}

fn welcome(ack: Option<Signed<Ack>>, window: u32, outstanding: u32) -> SeederMessage {
    SeederMessage::Welcome { delivery: delivery(), held: ChunkSet::from_range(0..4000), ack, window, outstanding }
}

fn fresh() -> Session {
    let terms = SessionTerms {
        network: network(),
        delivery: delivery(),
        manifest: manifest_digest(),
        seeder: seeder().peer_id(),
    };
    Session::new(terms, None)
}

fn greeted() -> Session {
    let mut session = fresh();
    assert!(matches!(session.message(greeting(), &me()).unwrap(), SessionEvent::Greeted { .. }));
    session.hello(Credential::Ticket(Box::new(ticket())), None);
    session
}

fn open(window: u32) -> Session {
    let mut session = greeted();
    session.message(welcome(None, window, 0), &me()).unwrap();
    session
}

fn receive(session: &mut Session, index: u32) {
    session.message(SeederMessage::Chunk { index, length: 1 << 20 }, &me()).unwrap();
    session.verified(index);
}

#[test]
fn messages_out_of_their_order_are_the_seeders_fault() {
    let refused = |session: &mut Session, message| session.message(message, &me()).unwrap_err();
    assert!(matches!(refused(&mut fresh(), welcome(None, 2, 0)), SessionError::Unexpected(_)));
    let mut session = greeted();
    assert!(matches!(refused(&mut session, greeting()), SessionError::Unexpected(_)));
    assert!(matches!(refused(&mut session, SeederMessage::Finished), SessionError::Unexpected(_)));
    let chunk = SeederMessage::Chunk { index: 0, length: 1 };
    assert!(matches!(refused(&mut session, chunk.clone()), SessionError::Unexpected(_)));
    let mut session = open(4);
    assert!(matches!(refused(&mut session, welcome(None, 4, 0)), SessionError::Unexpected(_)));
    assert_eq!(refused(&mut session, chunk.clone()), SessionError::Unasked(0));
    session.want(&chunks(&[(0, 1)]));
    session.message(chunk.clone(), &me()).unwrap();
    assert_eq!(refused(&mut session, chunk), SessionError::Unasked(0), "the same chunk a second time");
    let refusal = Refusal::new(RefusalCode::Overloaded, "later");
    let event = fresh().message(SeederMessage::Refusal(refusal.clone()), &me()).unwrap();
    assert_eq!(event, SessionEvent::Refused(refusal), "a refusal may come at any time");
}

#[test]
fn a_welcome_to_something_else_is_not_accepted() {
    let other = SeederMessage::Welcome {
        delivery: DeliveryId { delivery: 2, ..delivery() },
        held: ChunkSet::new(),
        ack: None,
        window: 2,
        outstanding: 0,
    };
    assert_eq!(greeted().message(other, &me()), Err(SessionError::OtherDelivery));
    // Nor one that shows an acknowledgement which this client did not sign.
    for forged in [
        Signed::sign(&ack_of(chunks(&[(0, 9)]), NOW), &seeder()),
        Signed::sign(&Ack { seeder: stranger().peer_id(), ..ack_of(chunks(&[(0, 9)]), NOW) }, &client()),
    ] {
        let error = greeted().message(welcome(Some(forged), 4, 0), &me()).unwrap_err();
        assert!(matches!(error, SessionError::Unexpected(_)));
    }
}

#[test]
fn the_seeders_copy_of_an_acknowledgement_is_built_upon() {
    let mut session = greeted();
    let ack = Signed::sign(&ack_of(chunks(&[(0, 9)]), NOW), &client());
    session.message(welcome(Some(ack), 17, 3), &me()).unwrap();
    assert_eq!(session.budget(), 7, "half of what three lost chunks leave of seventeen");
    session.want(&chunks(&[(20, 21)]));
    receive(&mut session, 20);
    assert_eq!(session.ack(&client(), NOW).unwrap().peek().unwrap().chunks, chunks(&[(0, 9), (20, 21)]));
    assert_eq!(session.ack(&client(), NOW), None, "nothing new, nothing signed");
}

#[test]
fn a_budget_is_never_more_than_half_and_counts_what_is_being_verified() {
    let mut session = open(16);
    assert_eq!(session.budget(), 8);
    session.want(&chunks(&[(0, 8)]));
    assert_eq!(session.budget(), 0);
    for index in 0..8 {
        session.message(SeederMessage::Chunk { index, length: 1 << 20 }, &me()).unwrap();
    }
    assert_eq!(session.budget(), 8, "the line is free, half of the window is not");
    session.want(&chunks(&[(8, 16)]));
    for index in 8..16 {
        session.message(SeederMessage::Chunk { index, length: 1 << 20 }, &me()).unwrap();
    }
    assert_eq!(session.budget(), 0, "everything is here and nothing acknowledged");
    assert!(!session.ack_due(), "nothing is verified");
    session.verified(3);
    assert!(session.ack_due(), "the window is full: even one chunk is worth an acknowledgement");
    assert_eq!(session.ack(&client(), NOW).unwrap().peek().unwrap().chunks, chunks(&[(3, 4)]));
    assert!(!session.is_spent());
}

#[test]
fn only_verified_chunks_are_acknowledged() {
    let mut session = open(16);
    session.want(&chunks(&[(0, 3)]));
    for index in 0..3 {
        session.message(SeederMessage::Chunk { index, length: 1 << 20 }, &me()).unwrap();
    }
    assert_eq!(session.ack(&client(), NOW), None);
    session.verified(1);
    assert_eq!(session.ack(&client(), NOW).unwrap().peek().unwrap().chunks, chunks(&[(1, 2)]));
}

#[test]
fn wants_stay_within_what_an_acknowledgement_can_name() {
    let mut session = open(4000);
    let scattered: ChunkSet = (0..400).map(|i| 3 * i).collect();
    let (message, left_out) = session.want(&scattered);
    let asked = session.in_flight().clone();
    assert!(asked.range_count() < ChunkSet::MAX_RANGES && !left_out.is_empty());
    assert_eq!(asked.union(&left_out), scattered);
    assert!(codec::encode(&message.unwrap()).len() < 12 * 1024);
    // Chunks that close gaps are taken all the same.
    let (_, left_out) = session.want(&chunks(&[(1, 3)]));
    assert!(left_out.is_empty());
}

#[test]
fn what_is_being_verified_counts_among_what_an_acknowledgement_can_name() {
    let mut session = open(4000);
    session.want(&(0..400).map(|i| 3 * i).collect());
    for index in session.in_flight().clone().iter() {
        session.message(SeederMessage::Chunk { index, length: 1 << 20 }, &me()).unwrap();
    }
    assert!(session.in_flight().is_empty());
    let another = chunks(&[(3000, 3001)]);
    assert_eq!(session.want(&another), (None, another));
}

#[test]
fn what_was_not_taken_back_is_not_cancelled() {
    // One that could would be asked for the same again and again, and send nothing.
    let mut session = open(16);
    session.want(&chunks(&[(0, 4)]));
    assert!(session.cancel(&chunks(&[(2, 3)])).is_some());
    let cancelled = |session: &mut Session, part| session.message(SeederMessage::Cancelled { chunks: part }, &me());
    assert!(matches!(cancelled(&mut session, chunks(&[(1, 3)])), Err(SessionError::Unexpected(_))));
    assert!(cancelled(&mut session, chunks(&[(2, 3)])).is_ok());
    // Once, and not for what is asked for later.
    session.want(&chunks(&[(2, 3)]));
    assert!(matches!(cancelled(&mut session, chunks(&[(2, 3)])), Err(SessionError::Unexpected(_))));
    // Nor where it came before the seeder heard that it is not wanted any more.
    assert!(session.cancel(&chunks(&[(0, 1)])).is_some());
    receive(&mut session, 0);
    session.want(&chunks(&[(0, 1)]));
    assert!(matches!(cancelled(&mut session, chunks(&[(0, 1)])), Err(SessionError::Unexpected(_))));
}

#[test]
fn an_acknowledgement_can_be_read_whatever_was_cancelled() {
    // One long run, of which every second chunk is cancelled and the others arrive: more ranges than can be named.
    let mut session = open(4000);
    session.want(&chunks(&[(0, 1000)]));
    let odd: ChunkSet = (0..500).map(|i| 2 * i + 1).collect();
    for part in [odd.intersection(&chunks(&[(0, 500)])), odd.intersection(&chunks(&[(500, 1000)]))] {
        assert!(session.cancel(&part).is_some());
        session.message(SeederMessage::Cancelled { chunks: part }, &me()).unwrap();
    }
    for i in 0..500 {
        receive(&mut session, 2 * i);
    }
    let first = session.ack(&client(), NOW).unwrap();
    let named = first.peek().unwrap().chunks;
    assert_eq!(named.range_count(), ChunkSet::MAX_RANGES);
    assert!(codec::decode::<Signed<Ack>>(&codec::encode(&first)).unwrap().verify(&me()).is_ok());
    assert!(!session.ack_due() && session.ack(&client(), NOW).is_none(), "no more can be named, and nothing spins");
    // Gaps are closed, and the rest follows.
    let (_, left_out) = session.want(&odd);
    assert!(left_out.is_empty());
    odd.iter().for_each(|index| receive(&mut session, index));
    let second = session.ack(&client(), NOW).unwrap().peek().unwrap().chunks;
    assert_eq!(second, chunks(&[(0, 1000)]));
    assert!(second.is_superset(&named));
}
